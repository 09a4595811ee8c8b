"""What is typed arrives as it was typed, by every way in; what cannot be what was declared is one sentence."""

import base64
import json
import os
import random
import subprocess
import sys

import nbformat
import papermill
import pytest
import yaml
from conftest import ROOT

import experiment
import sae_utils as u
import typed

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
# Each of these is something else for YAML, papermill, a shell, make or Python.
WORDS = "infinity nan 007 010 0x1f 1e3 12e4567 2024_01 1.10 1_000 12:30 1:2:3.5 no yes on off y null ~ None True false .inf - = << 2024-01-01 0012345 +1 1. .5".split()
WORDS += [" red", "a b", "it's", '"', "$HOME $$ $(x) `x`", "a;b", "#", "a: b", "[", "{", "[x", "&a", "*a", "!x", "%", "@", "|", ">", "?", "猫 é", "\U0001f600", "a\\nb", "\\", "back\\slash", "--help", "-p", "tab\there", "two\nlines"]


def as_yaml(name: str, value) -> str:
    return f"{name}: {json.dumps(value, ensure_ascii=random.random() < 0.5)}\n"


def ways(tmp_path, name: str, value: str):
    """Flags that give one parameter, in every way."""
    (tmp_path / "given.yaml").write_text(as_yaml(name, value), encoding="utf-8")
    yield ["-p", name, value]
    yield ["-r", name, value]
    yield ["--parameters", name, value]
    yield ["-y", as_yaml(name, value)]
    yield [f"--parameters_yaml={as_yaml(name, value)}"]
    yield ["-f", str(tmp_path / "given.yaml")]
    yield ["-b", base64.b64encode(as_yaml(name, value).encode()).decode()]
    if "'" not in value:
        yield ["--words", f"-p {name} '{value}'"]


@pytest.mark.parametrize("word", WORDS)
def test_a_text_arrives_as_it_was_typed(tmp_path, word):
    for name in ("target_word", "name", "prompts_file"):
        for flags in ways(tmp_path, name, word):
            assert experiment.check_params("patch_neurons", typed.parameters(flags))[name] == word, flags
    for name in ("source_words", "topic_words", "prompts"):
        for flags in (["-y", as_yaml(name, [word, "x", word])], ["-p", name, json.dumps([word, "x", word])]):
            assert experiment.check_params("patch_neurons", typed.parameters(flags))[name] == [word, "x", word], flags


@pytest.mark.parametrize("word", [word for word in WORDS if word not in "- = << & | > [ { ?".split()])
def test_what_yaml_takes_for_something_else_is_the_text_that_stands_there(word):
    try:
        plain = yaml.compose(f"x: {word}").value[0][1]
    except yaml.YAMLError:
        return  # in a file this needs quotes
    if isinstance(plain, yaml.ScalarNode) and plain.value == word:
        for name, text, value in (("target_word", f"target_word: {word}", word), ("topic_words", f"topic_words:\n - {word}\n - war", [word, "war"])):
            assert experiment.check_params("patch_neurons", typed.parameters(["-y", text]))[name] == value


def test_the_notebook_gets_what_was_typed(tmp_path):
    """Through papermill's cell of parameters, for all texts at once."""
    given = {"target_word": "007", "topic_words": WORDS, "latents": [5, 17], "strength": 2.5, "keep_error": False}
    for word in WORDS:
        params = experiment.check_params("patch_neurons", given | {"name": word})
        prepared = papermill.execute_notebook(str(ROOT / "notebooks" / "patch_neurons.ipynb"), str(tmp_path / "out.ipynb"), params, prepare_only=True)
        cell = next(cell for cell in prepared.cells if "injected-parameters" in cell.metadata.get("tags", []))
        found = {}
        exec(cell.source, found)
        assert {name: found[name] for name in params} == params
    nbformat.validate(prepared)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_number_has_bounds_and_they_are_kept(notebook):
    for name, declared in experiment.declared_params(notebook).items():
        if declared.type not in ("int", "float"):
            continue
        choices = declared.allowed.split(" | ")
        assert " to " in choices[-1], f"{name} has no upper bound"
        low, high = (float(word) for word in choices[-1].removeprefix("above ").split(" to "))
        for value in (10**30, -(10**30), high * 2 + 1, high + 1, -1 if low == 0 else low / 2 - 1, "1e400", "-1e400", "nan", "inf", "1e-400", "010", "0x10", "1:30", "", "ten", "1 2", "9" * 5000, True, None, [1]):
            if declared.type == "float" and value == "010":
                continue
            with pytest.raises(u.UserError, match=f"parameter {name} must be a (whole )?number") as told:
                experiment.check_params(notebook, {name: value})
            assert len(str(told.value)) < 300
        for value in [high, random.uniform(max(low, 1e-3 * high), high), choices[0] if len(choices) > 1 else high]:
            value = float(value) if declared.type == "float" else int(float(value))
            for said in (value, repr(value), f" {value!r}"):
                assert experiment.check_params(notebook, {name: said})[name] == value


@pytest.mark.parametrize(("notebook", "given", "told"), [
    ("sae_training", "layer: 010", "layer must be a whole number .0 to 9999., not '010'"),
    ("sae_training", "layer: 1\nlayer: 2", "line 2: layer stands there twice"),
    ("sae_training", "{layer: 1, seed: 2, 'layer': 3}", "layer stands there twice"),
    ("sae_training", "chat: yes", "chat must be true or false, not 'yes'"),
    ("sae_training", "chat: 1", "chat must be true or false, not '1'"),
    ("sae_training", "lr: 1:30", "lr must be a number"),
    ("sae_training", "lr: .inf", "lr must be a number"),
    ("sae_training", "seed:", "seed must be a whole number .*, not ''"),
    ("sae_training", "hook: [a]", "hook must be text, not .'a'."),
    ("sae_training", "hook: {a: b}", "hook must be text, not .'a': 'b'."),
    ("sae_training", "n_activations: 3e6", "n_activations must be a whole number"),
    ("patch_neurons", "temperature: 1e-320", "temperature must be a number .0 . 0.001 to 1000., not 1e-320"),
    ("patch_neurons", "latents: [1, two]", "latents must be a whole number, not 'two'"),
    ("patch_neurons", "latents: [1, [2]]", "latents must be a whole number, not .'2'."),
    ("patch_neurons", "latents: {1: 2}", "latents must be a list of whole numbers, not .'1': '2'.: -p latents '17 23', or latents: .17, 23. in a file"),
    ("patch_neurons", "prompts: [a, {b: c}]", "prompts must be text, not .'b': 'c'."),
    ("patch_neurons", "prompts: '[INST] say [/INST]'", "parameter prompts, line 1: "),
    ("patch_neurons", 'target_word: "\\ud800"', "line 1: half of a character"),
    ("patch_neurons", 'target_word: "a\\0b"', "target_word, 'a.x00b', holds what no text in UTF-8 does"),
    ("patch_neurons", "a: &x [1]\nb: *x", "line 2: an alias"),
    ("patch_neurons", "name: !!python/name:os.system x", "the tag tag:yaml.org,2002:python/name:os.system is not understood"),
    ("patch_neurons", "name: !x y", "the tag !x is not understood"),
    ("patch_neurons", "[a]: b", "a name is a text"),
    ("patch_neurons", "<<: {name: x}", "has no parameter <<"),
    ("patch_neurons", "- a\n- b", "it holds a list, and should hold lines of name: value"),
    ("patch_neurons", "just text", "it holds only a text, and should hold lines"),
    ("patch_neurons", "name: x\n---\nname: y", "line 2"),
    ("patch_neurons", "name: x: y", "line 1"),
    ("patch_neurons", "name: \x01", "-y: "),
    ("patch_neurons", "[" * 20_000, "nested too deeply"),
    ("patch_neurons", "\t- x", "line 1"),
])  # fmt: skip
def test_what_is_refused(tmp_path, notebook, given, told):
    (tmp_path / "given.yaml").write_text(given)
    for flags, where in ((["-y", given], "-y"), (["-f", str(tmp_path / "given.yaml")], "given.yaml")):
        with pytest.raises(u.UserError, match=told.replace("-y: ", f"{where}: ")) as refusal:
            experiment.check_params(notebook, typed.parameters(flags))
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


def test_lists_in_a_line():
    read = lambda *flags: experiment.check_params("patch_neurons", typed.parameters([*flags]))
    for text in ("17 23", "17,23", " 17,  23 ", "[17, 23]", "[17,23]"):
        assert read("-p", "latents", text)["latents"] == read("-y", f"latents: {text!r}")["latents"] == [17, 23]
    assert read("-p", "latents", "17")["latents"] == read("-y", "latents: 17")["latents"] == [17] and read("-p", "latents", "")["latents"] == []
    assert read("-p", "source_words", " blue")["source_words"] == [" blue"] and read("-p", "prompts", "The cat, no dog")["prompts"] == ["The cat, no dog"]
    assert read("-p", "source_words", "[no, 5, 007]")["source_words"] == read("-y", "source_words: [no, 5, 007]")["source_words"] == ["no", "5", "007"]


def test_later_and_nearer_words_win(tmp_path):
    for name, seed in (("one.yaml", 1), ("two.yaml", 2)):
        (tmp_path / name).write_text(f"# a comment\nseed: {seed}\nk: {seed}\n")
    both = ["-f", str(tmp_path / "one.yaml"), "-f", str(tmp_path / "two.yaml")]
    assert typed.parameters(both) == {"seed": "2", "k": "2"}
    assert typed.parameters(["-p", "seed", "5", *both, "-y", "{seed: 3, k: 4}", "-p", "seed", "6"]) == {"seed": "6", "k": "4"}
    assert typed.parameters(["--run", "x", "--words", "-p run_dir elsewhere"])["run_dir"] == "elsewhere"
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert typed.parameters(["-f", str(tmp_path / "empty.yaml"), "-y", ""]) == {}


@pytest.mark.parametrize(("flags", "told"), [
    (["-p", "name"], "-p name lacks its value: parameters are given as -p NAME VALUE"), (["-f"], "-f lacks its value"), (["--help"], "--help is not understood"), (["-h"], "-h is not"),
    (["-p"], "-p lacks"), (["name", "x"], "name is not understood"), (["--log-output"], "--log-output is not understood"), (["-k", "python3"], "-k is not"), (["--cwd=/tmp"], "--cwd=/tmp is not"),
    (["--words", "-p name 'x"], "cannot be divided into words: no closing quotation"), (["--words", "-p name"], "-p name lacks its value"), (["-b", "***"], "no base64"),
    (["-b", base64.b64encode(b"\xff").decode()], "no base64 of a text in UTF-8"), (["--parameters=name", "x"], "--parameters=name is not understood"), ([""], "is not understood"),
])  # fmt: skip
def test_flags_that_are_none(flags, told):
    with pytest.raises(u.UserError, match=told) as refusal:
        typed.parameters(flags)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("make", "told"), [
    (lambda p: None, "there is no such file"), (lambda p: p.mkdir(), "that is no file"), (lambda p: p.symlink_to("/dev/zero"), "/dev/zero: that is no file"), (os.mkfifo, "that is no file"),
    (lambda p: p.write_bytes("run_dir: caf\xe9\n".encode("latin-1")), "byte 13 is not UTF-8"), (lambda p: p.write_bytes(bytes(random.Random(0).randbytes(1000))), "is not UTF-8"),
    (lambda p: p.write_bytes(b"\0" * 10), "special characters are not allowed"), (lambda p: p.write_bytes(b"a" * 2_000_000), "larger than 1.0 MB"), (lambda p: p.symlink_to(p), "is no path"),
])  # fmt: skip
def test_files_of_parameters_that_are_none(tmp_path, make, told):
    path = tmp_path / "wrong.yaml"
    make(path)
    with pytest.raises(u.UserError, match=told) as refusal:
        typed.parameters(["-f", str(path)])
    assert ("wrong.yaml" in str(refusal.value) or "/dev/zero" in str(refusal.value)) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("path", ["a\0b", "x" * 256, "é" * 128, "runs/" + "y" * 300 + "/z", "~nobody-of-this-name/x", "/".join(["d" * 200] * 30)])
def test_what_can_be_no_path(path):
    with pytest.raises(u.UserError, match="is no path: ") as told:
        u.resolve(path).exists()
    assert len(str(told.value)) < 300


def test_bytes_that_are_no_utf8_on_the_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "notebooks" / "experiment.py"), "patch_neurons", "-p", "target_word", b"caf\xe9"]
    said = subprocess.run(command, capture_output=True, check=False)
    assert said.returncode == 2 and said.stderr == b"Error: parameter target_word, 'caf\\udce9', holds what no text in UTF-8 does.\n"
