"""What was typed, as it was typed: papermill's flags for parameters, and the files of parameters that they name.

YAML makes 8 of 010, 750 of 12:30 and False of no, and papermill inf of infinity. Here every value is a text, or a list of
texts, until the line of the notebook's parameters cell that declares it says what it is (experiment.Param).
"""

import base64
import re
import shlex
from collections import deque
from pathlib import Path

import yaml

import sae_utils
import showing
from sae_utils import UserError

MOST = 1_000_000  # bytes of a file of parameters
FLAGS = {"-p": 2, "-r": 2, "-f": 1, "-y": 1, "-b": 1, "--run": 1, "--words": 1}
LONG = {"--parameters": "-p", "--parameters_raw": "-r", "--parameters_file": "-f", "--parameters_yaml": "-y", "--parameters_base64": "-b"}
HOW = "parameters are given as -p NAME VALUE, -f FILE, or -y 'NAME: VALUE' (P=\"-p NAME VALUE\")"
NAME = r"\w[\w.-]*(/\w[\w.-]*)*"  # of a run, or a sweep: letters, digits and . - _, a folder of sweeps before it


class Loader(yaml.SafeLoader):
    """Composes a tree of YAML in which nothing stands twice."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name) is not understood here", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def as_typed(node: yaml.Node):
    """Text, list or dict of a node, its scalars as they were written."""
    wrong = lambda what, at: yaml.constructor.ConstructorError(None, None, what, at.start_mark)
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.rpartition(":")[2] not in {"str", "int", "float", "bool", "null", "timestamp", "merge", "value", "seq", "map"}:
        raise wrong(f"the tag {node.tag} is not understood here", node)
    if isinstance(node, yaml.SequenceNode):
        return [as_typed(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        try:  # JSON writes a character beyond the first plane as two halves
            return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise wrong("half of a character (a lone surrogate)", node) from None
    found = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise wrong("a name is a text", key)
        if as_typed(key) in found:
            raise wrong(f"{key.value} stands there twice", key)
        found[as_typed(key)] = as_typed(value)
    return found


def read_yaml(text: str, where: str):
    """What the YAML says, every scalar as text; None where it says nothing. UserError, with the line, for what is no YAML."""
    try:
        node = yaml.compose(text, Loader=Loader)
        return None if node is None else as_typed(node)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise UserError(f"{where}: it is nested too deeply.") from None


def read_file(path: str | Path, what: str) -> str:
    """The text of a small file. UserError, which names it, where it is none, is large, or holds no UTF-8."""
    path = sae_utils.resolve(path, Path.cwd())
    where = f"{what} {sae_utils.show_path(path)}"
    try:
        if not path.is_file():
            raise UserError(f"{where}: {'that is no file' if path.exists() else 'there is no such file'}.")
        with path.open("rb") as file:
            content = file.read(MOST + 1)
        if len(content) > MOST:
            raise UserError(f"{where}: it is larger than {showing.in_bytes(MOST)}, which no such file is.")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8: save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}.") from None


def table(text: str, where: str) -> dict:
    """{name: text or list of texts} of a YAML of parameters."""
    found = read_yaml(text, where)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UserError(f"{where}: it holds {'a list' if isinstance(found, list) else 'only a text'}, and should hold lines of name: value.")
    return found


def from_base64(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode("utf-8")
    except ValueError:
        raise UserError("what follows -b is no base64 of a text in UTF-8.") from None


def split(words: str) -> list[str]:
    """The words of a text as a shell divides them; nothing in it is run or replaced."""
    try:
        return shlex.split(words)
    except ValueError as error:
        raise UserError(f"{words!r} cannot be divided into words: {str(error)[0].lower()}{str(error)[1:]}.") from None


def check_text(text: str, what: str) -> str:
    """`text`. UserError where it holds what no text in UTF-8 does: NUL, or bytes that are none of it."""
    if "\0" in text or text.encode("utf-8", "ignore").decode() != text:
        raise UserError(f"{what}, {ascii(text)[:100]}, holds what no text in UTF-8 does.")
    return text


def run_dir(name: str) -> str:
    """The folder of the run of that name, under runs/. UserError where it is no name."""
    if not re.fullmatch(NAME, name):
        raise UserError(f"RUN {name!r} is no name of a run: letters, digits, '.', '-' and '_' will do (a folder elsewhere: -p run_dir).")
    return f"runs/{name}"


def parameters(flags: list[str]) -> dict:
    """{name: text or list} of papermill's flags for parameters; -p wins over -y, -y over -f, -f over -b, and of two the later one.

    Beside papermill's own: --words TEXT, more flags in one text, and --run NAME, the run of that name.
    """
    words, given = deque(flags), {flag: [] for flag in "bfyp"}
    while words:
        flag = words.popleft()
        flag, equals, value = flag.partition("=") if flag.startswith("--") else (flag, "", "")
        kind = LONG.get(flag, flag)
        if equals and FLAGS.get(kind) == 1:
            words.appendleft(value)
        elif equals or kind not in FLAGS:
            raise UserError(f"{flag + equals + value} is not understood: {HOW}.")
        if len(words) < FLAGS[kind]:
            raise UserError(f"{' '.join([flag, *words])} lacks its value: {HOW}.")
        values = [words.popleft() for _ in range(FLAGS[kind])]
        if kind == "--words":
            words.extendleft(reversed(split(*values)))
        elif kind == "--run":
            given["p"].append(("run_dir", run_dir(*values)))
        else:
            given["p" if kind == "-r" else kind[1]].append(values)
    found = {}
    for (text,) in given["b"]:
        found |= table(from_base64(text), "the parameters behind -b")
    for (path,) in given["f"]:
        found |= table(read_file(path, "the parameters in"), f"the parameters in {path}")
    for (text,) in given["y"]:
        found |= table(text, "the parameters behind -y")
    return found | dict(given["p"])


def listed(text: str, of_numbers: bool, name: str) -> list[str]:
    """The items of a list that was given as one text: [a, b] as YAML has it, or else numbers with spaces or commas
    between, or one text."""
    if text.strip()[:1] == "[" and text.strip()[-1:] == "]":
        items = read_yaml(text, f"parameter {name}")
        if not isinstance(items, list):
            raise UserError(f"parameter {name}: {text!r} is no list.")
        return items
    return text.replace(",", " ").split() if of_numbers else [text] if text else []
