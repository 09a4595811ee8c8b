"""A notebook's run: its parameters, its folder, and executing it headless.

    python notebooks/experiment.py NOTEBOOK [papermill flags]

is what `make train` and `make patch` call (in place of a notebook, `activations "2 6 10"` harvests
those layers; JOBS has this one and the others). papermill executes whatever it is given and writes over
what is there; so parameters are checked and the run's folder is looked at first, in a second and
with one sentence for a mistake. The notebooks make the same checks in their first cells.
"""

import ast
import atexit
import contextlib
import difflib
import errno
import hashlib
import importlib.metadata
import inspect
import json
import logging
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sae_utils
import showing
import storing
import typed


FREE = {"device", "checkpoint_minutes", "eval_dataset"}  # parameters that do not change what an experiment is
KEPT = ("activations", "tiny-model", "tiny-world", "compare")  # folders under runs/ that are no runs
OURS = r"\..*|sae_training\..*|events\.out\..*"  # what may lie in a run's folder before its params.json does
# What a finished run or experiment is made of, as far as it made it; beside it, the executed notebook.
FILES = "params.json sae.pth metrics.json history.csv features.npz features.html report.pdf overview.png patching.json patching.html".split()
LAUNCHED = "SAE_LAUNCHED"  # in the environment of a kernel: the folder into which `execute` will put the executed notebook


@dataclass
class Param:
    """One line of a notebook's parameters cell: `name: type = default  # help [allowed]`."""

    name: str
    type: str  # str, int, float, bool, list[str] or list[int]
    default: object
    help: str
    allowed: str  # "", "from 1", "1 to 9", "above 0 to 9", "0 | 1 to 9" or "relu | topk"; no "=", papermill trips over it

    def checked(self, value):
        """The value in the declared type, where it has that type or is a text that says one of it, as what was typed is.
        Raises UserError for a wrong type or range."""
        if self.type.startswith("list"):
            item = Param(self.name, self.type[5:-1], None, self.help, self.allowed)
            items = typed.listed(value, item.type == "int", self.name) if isinstance(value, str) else value
            if not isinstance(items, list):
                raise self._refused(value)
            if isinstance(value, str) and item.type == "int" and any(isinstance(read_int(one), str) for one in items):
                raise self._refused(value)  # which says how a list is given
            return [item.checked(one) for one in items]
        if isinstance(value, str):
            value = READ.get(self.type, str)(value)
        elif self.type == "float" and type(value) is int and abs(value) < 1e300:
            value = float(value)
        if type(value).__name__ != self.type or not self._allows(value):
            raise self._refused(value)
        return typed.check_text(value, f"parameter {self.name}") if isinstance(value, str) else value

    def _refused(self, value) -> sae_utils.UserError:
        names = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "list[int]": "a list of whole numbers", "list[str]": "a list of texts"}
        how = {"list[int]": ": -p {0} '17 23', or {0}: [17, 23] in a file", "list[str]": ": -p {0} '[one, two]', or {0}: [one, two] in a file"}.get(self.type, "")
        bounds, said = f" ({self.allowed})" if self.allowed else "", repr(value)
        return sae_utils.UserError(f"parameter {self.name} must be {names[self.type]}{bounds}, not {said[:100]}{'…' * (len(said) > 100)}{how.format(self.name)}.")

    def _allows(self, value) -> bool:
        choices = self.allowed.split(" | ") if self.allowed else []
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return not choices or (value in choices if isinstance(value, str) else any(within(value, choice) for choice in choices))


def within(number: float, choice: str) -> bool:
    """Whether the number is one that "5", "from 5", "5 to 9" or "above 5 to 9" names."""
    word, low, high = re.fullmatch(r"(from |above |)(\S+)(?: to (\S+))?", choice).groups()
    highest = float(high) if high else math.inf if word else float(low)
    return (number > float(low) if word == "above " else number >= float(low)) and number <= highest


def read_int(text: str):
    """The whole number; what reads in more than one way (010, 0x8, 12:30) stays text."""
    return int(text) if len(text) < 100 and re.fullmatch(r"\s*[+-]?(0|[1-9]\d*(_\d+)*)\s*", text, re.ASCII) else text


def read_float(text: str):
    """The number; what is none, or is not 0 and too small for one, stays text."""
    try:
        value = float(text)
    except ValueError:
        return text
    return text if not value and re.search("[1-9]", text.lower().partition("e")[0]) else value


READ = {"bool": lambda text: {"true": True, "false": False}.get(text.lower(), text), "int": read_int, "float": read_float}


def declared_params(notebook: str, text: str = "") -> dict[str, Param]:
    """What the parameters cell of `notebooks/<notebook>.ipynb` declares, read from the file itself, or from its `text`."""
    cells = json.loads(text or (sae_utils.ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    source = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
    lines = source.splitlines()
    declared = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign):
            comment = lines[node.end_lineno - 1].partition("  # ")[2].strip()
            allowed = re.search(r"\[([^\[\]]+)\]$", comment)
            declared[node.target.id] = Param(
                node.target.id, ast.unparse(node.annotation), ast.literal_eval(node.value),
                comment, allowed.group(1) if allowed else "",
            )  # fmt: skip
    return declared


def check_params(notebook: str, given: dict) -> dict:
    """All parameters of the notebook, defaults filled in, checked by name, type and range.

    `given` is a plain dict, or the notebook's globals(): then the names come from the cell that
    papermill injected, since by itself papermill accepts a misspelt name. Raises UserError.
    """
    declared = declared_params(notebook)
    names = given.keys()
    if "In" in given:  # a running notebook: look at the sources of the cells executed so far
        injected = [cell for cell in given["In"] if cell.startswith("# Parameters\n")]
        names = [node.targets[0].id for cell in injected for node in ast.parse(cell).body]
    for name in names:
        if name not in declared:
            near = difflib.get_close_matches(name, declared, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else f" It has: {', '.join(declared)}."
            raise sae_utils.UserError(f"{notebook} has no parameter {name}.{hint}")
    return {name: p.checked(given.get(name, p.default)) for name, p in declared.items()}


# Parameters of sae_training.ipynb that only the training of an SAE asks for.
OF_TRAINING = """architecture k auxk_weight dead_after expansion normalize apply_b_dec_to_input l1_coeff l0_weight batch_size lr warmup_steps
    lr_min_ratio lr_decay_fraction epochs early_stop_epochs checkpoint_minutes"""
# Those that do nothing under others: which, when, and whether it is so.
IDLE = [
    (OF_TRAINING, "where an SAE is trained already (trained_sae)", lambda p: p["trained_sae"]),
    ("k", "with architecture {architecture}", lambda p: sae_utils.ARCHITECTURES[p["architecture"]].knob != "k"),
    ("l1_coeff", "with architecture {architecture}", lambda p: sae_utils.ARCHITECTURES[p["architecture"]].knob != "l1_coeff"),
    ("l0_weight", "with architecture {architecture}", lambda p: p["architecture"] != "jumprelu"),
    ("dead_after", "without auxk_weight", lambda p: not p["auxk_weight"]),
    ("lr_decay_fraction", "with lr_min_ratio 1", lambda p: p["lr_min_ratio"] == 1),
    ("dataset_config dataset_split dataset_revision", "on local text", lambda p: sae_utils.resolve(p["dataset_name"]).exists()),
    ("text_column", "on .txt files", lambda p: p["dataset_name"].endswith(".txt")),
    ("model_revision", "with a local model", lambda p: sae_utils.resolve(p["model_name"]).exists()),
]  # fmt: skip


def idle(params: dict) -> dict[str, str]:
    """{name: why} of the parameters of a training run that do nothing under the others."""
    found = {}
    for names, why, is_so in IDLE:
        if is_so(params):
            found = {name: f"{name} does nothing {why.format(**params)}" for name in names.split()} | found
    return found


def given_in_vain(params: dict) -> list[str]:
    """A sentence, or none, on those of them that are not as the notebook declares them: somebody gave them."""
    declared, without_a_say = declared_params("sae_training"), idle(params)
    given = [without_a_say[name] for name in declared if name in without_a_say and params[name] != declared[name].default]
    return ["; ".join(given) + "."] if given else []


def differing(params: dict, notebook: str, without: set[str]) -> str:
    """What differs from the notebook's defaults, in a few letters; a digest where that would be long."""
    parts = []
    for name, default in declared_params(notebook).items():
        value = params[name]
        if name not in without and value != default.default:
            short = f"{value:g}" if isinstance(value, float) else Path(str(value)).stem if value else "none"
            parts.append(name.replace("_", "") + short)
    text = "-".join(parts)
    return hashlib.sha256(text.encode()).hexdigest()[:8] if len(text) > 60 else text


def safe_name(*parts: str) -> str:
    """The parts that are not empty as one file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(part for part in parts if part))


def place_for(path: str | Path, kept: tuple = ()) -> Path:
    """The folder `path`, where a notebook may write. UserError where it is a file's, or lies in this repository but not
    under runs/, in one of those `kept` there for other things, in another run, or around other runs."""
    folder, runs = sae_utils.resolve(path), sae_utils.resolve("runs")
    shown, inside = sae_utils.show_path(folder), folder.is_relative_to(runs)
    if folder == runs or any(folder.is_relative_to(sae_utils.resolve(runs / name)) for name in kept):
        raise sae_utils.UserError(f"{shown} is kept for other things: choose another run name.")
    if not inside and (folder.is_relative_to(sae_utils.ROOT) or sae_utils.ROOT.is_relative_to(folder)):
        raise sae_utils.UserError(f"{shown} is part of this repository: runs lie under runs/, or elsewhere.")
    above = [parent for parent in folder.parents if parent.is_relative_to(runs) or parent == folder.parent]
    if around := next((parent for parent in above if (parent / "params.json").exists()), None):
        raise sae_utils.UserError(f"{shown} lies in another run, {sae_utils.show_path(around)}: choose another run name.")
    if within := next(folder.glob("*/params.json"), None):
        raise sae_utils.UserError(f"{shown} holds other runs, such as {within.parent.name}: choose another run name.")
    if file := next((part for part in (folder, *folder.parents) if part.exists() and not part.is_dir()), None):
        raise sae_utils.UserError(f"{sae_utils.show_path(file)} is a file, and no folder for a run: choose another run name.")
    return folder


def run_folder(params: dict) -> tuple[Path, bool]:
    """The folder of a training run and whether that run is finished.

    Raises UserError where the folder holds a run made with other parameters, and where there is no finished run for eval_dataset.
    """
    suffix = differing(params, "sae_training", {"model_name", "layer", "run_dir", "trained_sae", *FREE})
    name = safe_name(Path(params["model_name"]).name, f"L{params['layer']}", Path(params["trained_sae"]).name, suffix)
    run_dir = place_for(params["run_dir"] or f"runs/{name}", KEPT)
    strange = [file.name for file in run_dir.iterdir() if not re.fullmatch(OURS, file.name)] if run_dir.is_dir() and not (run_dir / "params.json").exists() else []
    if strange:
        raise sae_utils.UserError(f"{sae_utils.show_path(run_dir)} holds {min(strange)} and no run: choose another run name.")
    refuse_other_params(run_dir / "params.json", params, "sae_training")
    finished = is_finished(run_dir)
    if params["eval_dataset"] and params["trained_sae"]:
        raise sae_utils.UserError("with trained_sae, dataset_name is the text to judge on: leave eval_dataset out.")
    if params["eval_dataset"] and not finished:
        raise sae_utils.UserError(f"eval_dataset is text to judge a finished run on, and {sae_utils.show_path(run_dir)} is none: train it without eval_dataset, then open it again with it.")
    return run_dir, finished


def cache_folder(run_dir: Path) -> Path:
    """Where runs share activations: runs/activations, or beside a run that lies elsewhere."""
    inside = run_dir.is_relative_to(sae_utils.ROOT)
    return (sae_utils.ROOT / "runs" if inside else run_dir.parent) / "activations"


def start_run(params: dict, **more):
    """Claims the folder of a training run and writes params.json there, with `more`.

    Returns (folder, claim, finished): the folder is this process's as long as `claim` lives. What an unfinished
    run with the same parameters left is gone on with from its checkpoint, or started again. Of a run that is finished
    already, `finished` is its folder (else None), and the folder to write to one of this process's own (`again`).
    UserError where another process is at work on it.
    """
    run_dir, finished = run_folder(params)
    if finished:
        return again(run_dir), None, run_dir
    claim = claim_folder(run_dir)
    begin_again(run_dir)
    if not (run_dir / "checkpoint.pth").exists():
        for stale in run_dir.glob("events.out.tfevents.*"):  # its points would stand beside the new ones
            stale.unlink()
        record_params(run_dir / "params.json", params, **as_it_stands("sae_training"), **more)
    return run_dir, claim, None


def again(run_dir: Path) -> Path:
    """A scratch folder for another look at a finished run, which goes when this process does: whatever a notebook writes goes
    there, and nothing in the run's folder is touched. What saves time is copied."""
    scratch = Path(tempfile.mkdtemp(prefix=f"{run_dir.name}-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    for name in ("params.json", "labels.csv", "fidelity.npz"):
        if (run_dir / name).exists():
            shutil.copy(run_dir / name, scratch)
    return scratch


def claim_folder(folder: Path):
    """A lock on the folder, for as long as the object that is returned lives. UserError where another
    process has it. A kernel that was killed lets go by itself."""
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    claim = filelock.FileLock(folder / ".claim", is_singleton=True)  # a cell that is run again finds it its own
    try:
        claim.acquire(timeout=10)  # a kernel whose parent was killed takes a moment to notice
    except filelock.Timeout:
        raise sae_utils.UserError(f"{sae_utils.show_path(folder)} is being worked on in another notebook or process: close it, or wait for it.") from None
    return claim


def patch_folder(params: dict) -> tuple[Path, bool]:
    """The folder of a patching experiment, `<run>/patches/<name>/`, and whether it is finished.

    Raises UserError where the run does not exist or is not finished, or where an experiment of
    that name was made with other parameters.
    """
    run_dir = finished_run(params["run_dir"])
    name = params["name"] or differing(params, "patch_neurons", {"name", "run_dir", *FREE}) or "default"
    if not (name := safe_name(name).lstrip(".")):
        raise sae_utils.UserError(f"name {params['name']!r} is no name of an experiment: letters, digits, '.', '-' and '_' will do.")
    folder = sae_utils.resolve(run_dir / "patches" / name)
    refuse_other_params(folder / "params.json", params, "patch_neurons")
    return folder, is_finished(folder)


def start_patch(params: dict):
    """Claims the folder of a patching experiment, as `start_run` does for a training run."""
    folder, finished = patch_folder(params)
    if finished:
        raise sae_utils.UserError(f"{sae_utils.show_path(folder)} is finished: look at patching.html there, or give this experiment another name.")
    claim = claim_folder(folder)
    begin_again(folder)
    record_params(folder / "params.json", params, **as_it_stands("patch_neurons"))
    return folder, claim


def is_finished(folder: Path) -> bool:
    """Whether a run or an experiment is finished: its .done says so, and no file that this names is missing. A flipped bit in
    .done is no reason to train again: of "finished" and the names of files one is enough, and what is no such name says nothing."""
    try:
        word, *names = (folder / ".done").read_bytes().decode("utf-8", "replace").split("\n")
    except OSError:
        return False
    made = [name for name in names if name in FILES or name.endswith(".ipynb")]
    said = word == "finished" or bool(made)
    return said and all((folder / name).is_file() for name in made) and not any(folder.glob("*.running.ipynb"))


def begin_again(folder: Path) -> None:
    """Before a notebook writes into a folder that it has claimed: what says that it is finished goes, and what a killed process left."""
    for name in (".done", ".made"):
        (folder / name).unlink(missing_ok=True)
    storing.sweep_temporary(folder)


def finish(folder: Path, notebook: str) -> None:
    """A notebook's last word: the run in `folder` is finished. Where the launcher executes the notebook it is the launcher
    that says so, once the executed copy is in its place, and this only notes what was made. In Jupyter the cells that were
    executed are kept, in that order, so that a changed loop leaves its trace."""
    launched = os.environ.get(LAUNCHED) == str(folder)
    if not launched:
        keep_cells(folder / f"{notebook}.ipynb")
    made = [name for name in FILES if (folder / name).exists()]
    with sae_utils.atomic(folder / (".made" if launched else ".done")) as temporary:
        temporary.write_text("\n".join(["finished", *made, ""]), encoding="utf-8")
    if not launched:
        for file in (folder / "checkpoint.pth", *folder.glob("*.running.ipynb")):  # of a launcher that was killed
            file.unlink(missing_ok=True)


def keep_cells(path: Path) -> None:
    """Writes what was executed in this kernel as a notebook; nothing outside of one."""
    import nbformat
    from IPython import get_ipython

    if not (shell := get_ipython()):
        return
    cells = [nbformat.v4.new_code_cell(source, execution_count=n) for n, source in enumerate(shell.user_ns.get("In", [])) if source.strip()]
    told = nbformat.v4.new_markdown_cell("Run in Jupyter. These are the cells in the order in which they were executed; their outputs were not kept.")
    with sae_utils.atomic(path) as temporary:
        nbformat.write(nbformat.v4.new_notebook(cells=[told, *cells]), temporary)


def settle(folder: Path, executed: Path) -> bool:
    """What is left to do after a notebook has noted what it made: the executed copy, if it is whole, into its place, and
    last of all .done. Whether that could be done; it goes on where a process was killed in the middle of it."""
    running = executed.with_suffix(".running.ipynb")
    try:
        made = (folder / ".made").read_text(encoding="utf-8")
        about = json.loads((running if running.exists() else executed).read_text(encoding="utf-8"))["metadata"]["papermill"]
        whole = about["end_time"] and not about["exception"] and all((folder / name).is_file() for name in made.split("\n")[1:-1])
    except (OSError, ValueError, LookupError, TypeError):
        return False
    if not whole:
        return False
    if running.exists():
        running.replace(executed)
    executed.with_suffix(".failed.ipynb").unlink(missing_ok=True)
    (folder / "checkpoint.pth").unlink(missing_ok=True)
    with sae_utils.atomic(folder / ".done") as temporary:
        temporary.write_text(f"{made}{executed.name}\n", encoding="utf-8")
    (folder / ".made").unlink()
    return True


def finished_run(run_dir: str) -> Path:
    """The folder of a finished training run. Raises UserError where there is none."""
    run_dir = typed.run_dir(run_dir.removeprefix("runs/").rstrip("/")) if run_dir.startswith("runs/") else run_dir
    folder = sae_utils.resolve(run_dir) if run_dir else sae_utils.ROOT / "runs"
    if not run_dir or not folder.is_dir():
        known = sorted(f.parent.name for f in (sae_utils.ROOT / "runs").glob("*/.done") if is_finished(f.parent))
        raise sae_utils.UserError(f"there is no run {sae_utils.show_path(folder)}; finished runs: {', '.join(known) or 'none yet, try `make demo`'}.")
    if not is_finished(folder):
        raise sae_utils.UserError(f"{sae_utils.show_path(folder)} is not finished: train it with the same `make train` command first.")
    return folder


def recorded_params(file: Path, notebook: str) -> dict:
    """The parameters that `file`, a params.json, records; those that are newer than it at their defaults."""
    try:
        recorded = dict(storing.read_json(file)["parameters"])
    except sae_utils.UserError as error:
        raise sae_utils.UserError(f"{str(error).removesuffix('.')}: look at it, or take another name (RUN=, SWEEP=).") from None
    except (ValueError, KeyError, TypeError):
        raise sae_utils.UserError(f"{sae_utils.show_path(file)} holds no parameters of this project: look at it, or take another name (RUN=, SWEEP=).") from None
    return {name: p.default for name, p in declared_params(notebook).items()} | recorded


def refuse_other_params(file: Path, params: dict, notebook: str) -> None:
    """Raises UserError if `file` records an experiment with other parameters than these."""
    if not file.exists():
        return
    before = recorded_params(file, notebook)
    free = {"run_dir", "name", *FREE}
    different = [
        f"{name} was {before.get(name)!r}, now {params.get(name)!r}"
        for name in sorted((set(before) | set(params)) - free)
        if before.get(name) != params.get(name)
    ]
    if different:
        raise sae_utils.UserError(
            f"{sae_utils.show_path(file.parent)} already holds a run with other parameters ({'; '.join(different)}): "
            "give this one another name (RUN=, or -p name for an experiment)."
        )


def record_params(file: Path, params: dict, **more) -> None:
    """Writes params.json: the parameters as resolved, package versions, git commit."""
    packages = ("torch", "transformers", "datasets", "numpy", "papermill")
    storing.write_json(file, {
        "parameters": params,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "git_commit": (git("rev-parse", "HEAD") or "").strip() or None,
        **more,
    }, sealed=True)  # fmt: skip


def git(*words: str) -> str | None:
    """What git says of this checkout; None where there is none."""
    try:
        done = subprocess.run(["git", *words], cwd=sae_utils.ROOT, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return None
    return done.stdout if done.returncode == 0 else None


def as_it_stands(notebook: str) -> dict:
    """For params.json: a digest of the notebook's cells of code, and which files of the code are not as the commit has them."""
    cells = json.loads((sae_utils.ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "notebooks", "sae_utils.py")
    return {"notebook_digest": sae_utils.digest(code), "changed_since_commit": None if changed is None else [line[3:] for line in changed.splitlines()]}


def edited_defaults(notebook: str) -> list[str]:
    """A sentence, or none, on parameters whose default is not the commit's: an edit saved in Jupyter holds for make as well."""
    if not (committed := git("show", f"HEAD:notebooks/{notebook}.ipynb")):
        return []
    before, now = declared_params(notebook, committed), declared_params(notebook)
    edited = [f"{name} {p.default!r}" + (f", not {before[name].default!r}" if name in before else ", new") for name, p in now.items() if name not in before or p.default != before[name].default]
    return [f"defaults in {notebook}.ipynb are not those of the commit: {'; '.join(edited)}."] if edited else []


def compare_folder(params: dict) -> tuple[Path, bool]:
    """Where a comparison of runs goes, and False: it is made anew each time."""
    root = sae_utils.resolve(params["runs_dir"])
    if not root.is_dir():
        raise sae_utils.UserError(f"there is no folder {sae_utils.show_path(root)} with runs in it.")
    return place_for(root / "compare"), False


def world_folder(params: dict) -> tuple[Path, bool]:
    """Where the tiny model's notebook goes, beside its world, and False: it is made anew each time. UserError where world or
    model would go into a run, or into what is kept under runs/ for other things."""
    others = tuple(name for name in KEPT if not name.startswith("tiny-"))
    model, world = (place_for(params[name], others) for name in ("model_dir", "world_dir"))
    if run := next((folder for folder in (model, world) if (folder / "params.json").exists()), None):
        raise sae_utils.UserError(f"{sae_utils.show_path(run)} is a run: choose another folder.")
    return world, False


# Where a notebook's executed copy goes, and whether what it makes is finished already.
FOLDERS = {
    "sae_training": run_folder,
    "patch_neurons": patch_folder,
    "tiny_model": world_folder,
    "compare_runs": compare_folder,
}


def launch(name: str, flags: list[str]) -> Path:
    """Executes notebooks/<name>.ipynb into its folder, and returns that.

    What is finished with the same parameters is left as it is; with others it is refused, and so is
    what another process is at work on.
    """
    import filelock

    source = sae_utils.ROOT / "notebooks" / f"{name}.ipynb"
    params = check_params(name, typed.parameters(flags))
    folder, finished = FOLDERS[name](params)
    for notice in edited_defaults(name):
        print("Notice:", notice)
    if not finished:
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        try:
            with lock.acquire(timeout=0):
                finished = FOLDERS[name](params)[1] or settle(folder, folder / source.name)  # by another process just now, or by one that was killed
                if not finished:
                    storing.sweep_temporary(folder)
                    before = {file.name for file in folder.iterdir()}
                    try:
                        execute(source, folder, params)
                    except BaseException as error:
                        if getattr(error, "ename", "") == "UserError":
                            forget(folder, before, new)
                        raise
                    return folder
        except filelock.Timeout:
            raise sae_utils.UserError(f"{sae_utils.show_path(folder)} is being worked on by another process: wait for it.") from None
        except OSError as error:  # a write that fails does not say where
            error.filename = error.filename or str(folder)
            raise
    if params.get("eval_dataset"):
        raise sae_utils.UserError(f"{sae_utils.show_path(folder)} is finished, and eval_dataset is for opening it again in Jupyter: `make features SAE={sae_utils.show_path(folder)} DATASET={shlex.quote(params['eval_dataset'])}` judges it on that text.")
    print(f"{sae_utils.show_path(folder)} is finished: nothing to do.")
    return folder


def forget(folder: Path, before: set[str], new: bool) -> None:
    """After a mistake, where nothing was made yet: what the command put into the folder goes, and the folder where it is
    `new`, so that the corrected command finds the name free. `before`: the names that stood there when it began."""
    now = {file.name for file in folder.iterdir()}
    if now - before <= {*(name for name in now if name.endswith(".failed.ipynb")), "params.json", ".lock", ".claim"}:
        for name in now if new else now - before:
            (folder / name).unlink()
        if new:
            folder.rmdir()


def execute(source: Path, folder: Path, params: dict) -> None:
    """Executes a notebook into `folder`: <name>.running.ipynb until it is whole, <name>.failed.ipynb if it failed."""
    import papermill

    executed = folder / source.name
    running, failed = executed.with_suffix(".running.ipynb"), executed.with_suffix(".failed.ipynb")
    literal = lambda path: str(path).replace("{", "{{").replace("}", "}}")  # papermill puts parameters into paths
    os.environ[LAUNCHED] = str(folder)
    try:
        papermill.execute_notebook(
            literal(source), literal(running), params, kernel_name="python3", cwd=str(source.parent), progress_bar=False, log_output=True
        )
    except BaseException:
        with contextlib.suppress(OSError):
            running.replace(failed)
        raise
    finally:
        del os.environ[LAUNCHED]
    if not (folder / ".made").exists():  # a notebook that is made anew each time
        running.replace(executed)
        failed.unlink(missing_ok=True)
    elif not settle(folder, executed):
        raise RuntimeError(f"{running} was executed, and is not whole")


def harvest_layers(layers: str, flags: list[str]) -> None:
    """Harvests the activations of several layers in one pass, for training runs with the same flags.

    Wrong layers are told at the end, when the others are done.
    """
    import harvest

    params = check_params("sae_training", typed.parameters(flags))
    layer = declared_params("sae_training")["layer"]
    hooks, mistakes = [], []
    for word in layers.replace(",", " ").split():
        try:
            number = layer.checked(word)
            hooks.append(sae_utils.find_hook(params["model_name"], number, params["hook"], params["model_revision"], params["seq_len"]))
        except sae_utils.UserError as error:
            mistakes.append(str(error))
    if not hooks and not mistakes:
        raise sae_utils.UserError('no layer is named: make activations LAYERS="2 6 10".')
    if hooks:
        text = harvest.open_text(params)
        device = sae_utils.pick_device(params["device"])
        model, tokenizer = sae_utils.load_model(params["model_name"], params["model_revision"], device, params["dtype"])
        loaded = harvest.as_loaded(params, model, tokenizer, text)
        cache = cache_folder(sae_utils.resolve(params["run_dir"] or "runs/any"))
        folders = harvest.fill(model, tokenizer, list(dict.fromkeys(hooks)), loaded, cache, lambda plan: print(harvest.card(plan), flush=True))
        for hook, folder in folders.items():
            print(f"{hook}: {sae_utils.show_path(folder)}")
    if mistakes:
        raise sae_utils.UserError(" ".join(dict.fromkeys(mistakes)))


def as_text_of(sae: sae_utils.SAE) -> showing.TokenText:
    """The text of tokens of the model that the SAE was trained on."""
    import transformers

    name, revision = sae.config["model_name"], sae.config["model_revision"]
    sae_utils.use_hf_token()
    with sae_utils.hub_errors("model", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(sae_utils.local_or_hub(name, "model"), revision=revision or None, trust_remote_code=False)
    return showing.TokenText(tokenizer)


def read_sae(run: Path) -> sae_utils.SAE:
    """The SAE of a finished run. UserError where it does not say what it was trained on."""
    import patching

    sae = sae_utils.SAE.load(run / "sae.pth")
    patching.check_run(sae, run)
    return sae


def relabel(run_dir: str) -> Path:
    """Writes a finished run's features.html anew, with the names that its labels.csv now gives to latents."""
    import features

    folder = finished_run(run_dir)
    storing.sweep_temporary(folder)
    sae, labels = read_sae(folder), features.read_labels(folder / "labels.csv")
    for latent in labels:
        sae_utils.check_latent(latent, sae.d_sae)
    kept, page, as_text = features.read(folder), folder / "features.html", as_text_of(sae)
    features.write_page(page, features.title_of(sae), kept, sae.density, sae.max_act, as_text, labels, features.about_run(folder, as_text))
    print(f"{sae_utils.show_path(page)}: {len(labels)} of {int((sae.density > 0).sum()):,} latents have a name")
    return page


def look(run_dir: str, text: str) -> Path:
    """Which latents of a finished run fire on each token of a text: printed, and as a page that leads into the run's features.html."""
    import features
    import harvest
    import looking

    folder, text = finished_run(run_dir), typed.check_text(text, "TEXT")
    storing.sweep_temporary(folder / "looks")
    sae, kept, names = read_sae(folder), features.read(folder), features.read_labels(folder / "labels.csv")
    config = sae.config
    if harvest.model_fingerprint(config["model_name"], config["model_revision"]) != config["model_fingerprint"]:
        raise sae_utils.UserError(f"{config['model_name']} is no longer the model this SAE was trained on: train it again.")
    model, tokenizer = sae_utils.load_model(config["model_name"], config["model_revision"], sae_utils.pick_device(), config["dtype"])
    found = looking.look(model, tokenizer, config["hook_name"], sae.to(model.device), text, kept, names)
    page = folder / "looks" / f"{safe_name(text.strip()[:40])}-{hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:6]}.html"
    looking.write_page(page, f"What fires on a sentence: {folder.name}", text, found, "../features.html")
    print(looking.as_lines(found))
    print(sae_utils.show_path(page))
    return page


def judge(source: str, flags: list[str], look_again: bool = True) -> Path:
    """`launch` of sae_training on an SAE that is trained already: where the flags do not say which model and layer, the
    ones it was made for; where they name no run, one named after it. Without `look_again` a finished look at this SAE in
    the same folder is enough, however large."""
    import formats

    there = sae_utils.resolve(source)
    source = sae_utils.show_path(there) if there.exists() else source  # however its path was written
    given = typed.parameters(flags)
    named = there.name if Path(source).is_absolute() else source.removeprefix("runs/").replace("/", "-")
    folder = given.get("run_dir") or f"runs/{safe_name('look', named)}"
    if not look_again and is_finished(sae_utils.resolve(folder)):
        if recorded_params(sae_utils.resolve(folder) / "params.json", "sae_training")["trained_sae"] == source:
            return sae_utils.resolve(folder)
    hook = str(given.get("hook", "")).replace("{layer}", str(given.get("layer", "")))
    made_for = formats.load(source, hook, another_hook=True).config
    found = ["-p", "trained_sae", source, "-p", "run_dir", str(folder)]
    for name in {"model_name", "layer"} - {*given}:
        if made_for[name] in ("", None):
            raise sae_utils.UserError(f"{source} does not say which {name.removesuffix('_name')} it was made for: name it with {name.removesuffix('_name').upper()}=.")
        found += ["-p", name, str(made_for[name])]
    return launch("sae_training", [*found, *flags])


def patch_elsewhere(source: str, flags: list[str]) -> Path:
    """`launch` of patch_neurons on an SAE from elsewhere, which is looked at first where that was not done yet: the flags
    before "--" are for the look, those behind it for the experiment, and checked before the look begins."""
    if "--" not in flags:
        raise sae_utils.UserError("patch: the flags of the look and those of the experiment are parted by --.")
    cut = flags.index("--")
    look, own = flags[:cut], flags[cut + 1 :]
    check_params("patch_neurons", typed.parameters(own))
    return launch("patch_neurons", [*own, "-p", "run_dir", str(judge(source, look, look_again=False))])


def check_model(flags: list[str]) -> None:
    """Tries whether a model will do for a training run with these flags: a line for each check. UserError where one fails."""
    import checking

    given = typed.parameters(flags)
    if "layer" not in given:
        raise sae_utils.UserError("say which layer: make check MODEL=id-or-folder LAYER=n.")
    checking.check(check_params("sae_training", given))


def export(run_dir: str, format: str, out: str = "") -> Path:
    """Writes a finished run's SAE for other tools, into `out` or the run's export/<format>."""
    import features
    import formats

    folder = finished_run(run_dir)
    storing.sweep_temporary(folder / "export")
    sae, params = sae_utils.SAE.load(folder / "sae.pth"), recorded_params(folder / "params.json", "sae_training")
    about = {"run": folder.name, "metrics": storing.read_json(folder / "metrics.json")}
    if not params["trained_sae"]:  # how an SAE from elsewhere was trained is not known here
        without_a_say = {"run_dir", "trained_sae", *FREE, *idle(params)}
        about["settings"] = {name: value for name, value in params.items() if name not in without_a_say}
    if format == "neuronpedia" and (folder / "features.npz").exists():
        about |= {"features": features.read(folder), "as_text": as_text_of(sae)}
    written = formats.export(sae, out or folder / "export" / format, format, about)
    files = sorted(file.name for file in written.iterdir())
    print(f"{sae_utils.show_path(written)}: {', '.join(files[:4])}" + f" and {len(files) - 4} more" * (len(files) > 4))
    return written


def publish(run_dir: str, repo: str, format: str = "saelens", *words: str) -> Path:
    """Exports a finished run and pushes it to `repo` on the hub with a model card; `words`: dry, public."""
    import publishing

    return publishing.publish(finished_run(run_dir), export(run_dir, format), repo, dry_run="dry" in words, private="public" not in words)


def list_runs(patterns: str = "*") -> None:
    """Prints a table of the runs under runs/ whose names fit."""
    import listing

    print(listing.table_of_runs(sae_utils.ROOT / "runs", patterns))


def remove_run(name: str, *words: str) -> None:
    """Deletes a run under runs/; the word "yes" answers the question before it is asked."""
    import listing

    gone = listing.remove(sae_utils.ROOT / "runs", name, "yes" in words)
    print("deleted" if gone else "left as it is")


def sweep_cells(grid: str, name: str, *flags: str) -> None:
    """Prints the cells of a sweep as a makefile."""
    import sweep

    print(sweep.plan(grid, name, [*flags]))


def sweep_table(file: str) -> None:
    """Prints what came of the cells of such a makefile."""
    import sweep

    sweep.table(file)


JOBS = {  # what a first word that is no notebook does
    "activations": lambda layers, *flags: harvest_layers(layers, [*flags]),  # LAYERS: their rows, in one pass
    "labels": relabel,  # RUN: its features.html anew
    "look": look,  # RUN TEXT: which latents fire on it
    "features": lambda source, *flags: judge(source, [*flags]),  # SAE: looked at as our own is
    "patch": lambda source, *flags: patch_elsewhere(source, [*flags]),  # SAE, flags of its look, --, flags of the experiment
    "check": lambda *flags: check_model([*flags]),  # whether a model will do
    "export": export,  # RUN FORMAT [FOLDER]: its SAE for other tools
    "runs": list_runs,  # [PATTERNS]: a table of them
    "remove": remove_run,  # RUN [yes]: throws it away
    "cells": sweep_cells,  # GRID SWEEP: a sweep as a makefile
    "table": sweep_table,  # that file: what came of its cells
    "publish": publish,  # RUN REPO [FORMAT] [dry] [public]: that on the hub, with a card
}


def readable(record: logging.LogRecord) -> bool:
    """A filter of papermill's log: out with its own noise, with what only a notebook can show (figures, tables, widgets,
    of which a log has but the type's name), and with blank lines after outputs."""
    noise = ("Executing", "Ending", "Input", "Output", "Working", "Passed unknown")
    shown = r"<Figure size \S+ with \d+ Axes>|<IPython\.[\w.]+ object( at 0x\w+)?>|\w+\((children|value|layout)=.*"
    record.msg, record.args = record.getMessage().rstrip("\n"), ()
    return bool(record.msg) and not record.msg.startswith(noise) and not re.fullmatch(shown, record.msg)


def told(error: BaseException, job: str = "sae_training") -> tuple[str, int]:
    """What is said of an error of a job, and what the program ends with: 2 for a mistake the user can mend, one sentence; 1 for what
    the machine did, one sentence too; 130 interrupted; "" for whatever is to be shown whole."""
    import nbclient
    import papermill

    again = GOES_ON.get(job, "give the same command again.")
    said, number = str(error), error.errno if isinstance(error, OSError) else None
    if isinstance(error, papermill.PapermillExecutionError):
        said, found = error.evalue, re.match(r"\[Errno (\d+)\]", error.evalue)
        number = int(found[1]) if found else None
    if isinstance(error, sae_utils.UserError) or getattr(error, "ename", "") == "UserError":
        return f"Error: {said}".replace("\n", " "), 2
    if number in MACHINE:
        return f"Error: {said.partition('] ')[2]}: {MACHINE[number]}; then {again}", 1
    if isinstance(error, KeyboardInterrupt):
        return f"Interrupted: {again}", 130
    if isinstance(error, nbclient.exceptions.DeadKernelError) or isinstance(error, RuntimeError) and "Kernel died" in said:
        return f"Error: the notebook's process was killed, most often for want of memory: {again}", 1
    return "", 1


TRAINS = "the same command goes on from the last checkpoint; what was harvested is kept."
GOES_ON = {"sae_training": TRAINS, "features": TRAINS, "patch": TRAINS, "activations": "the same command goes on; what was harvested is kept."}
MACHINE = {  # what to do about what a system says
    errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EFBIG: "take another disk", errno.EROFS: "write elsewhere, or make it writable",
    errno.EACCES: "write elsewhere, or ask for the right to", errno.EPERM: "write elsewhere, or ask for the right to", errno.EIO: "look at the disk",
    errno.ENAMETOOLONG: "take a shorter name", errno.ENOTDIR: "take another name", errno.EEXIST: "take another name",
}  # fmt: skip


def main(args: list[str]) -> int:
    """Does what the words ask for. Returns 0 when all went well, or what `told` says of what happened."""
    import papermill

    for stream in (sys.stdout, sys.stderr):  # a file's name may hold bytes that are no UTF-8
        stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
    logging.getLogger("papermill").addFilter(readable)
    try:
        name, words = (args or [""])[0], args[1:]
        if name not in FOLDERS and name not in JOBS:
            raise sae_utils.UserError(f"{name!r} is no job: there are {', '.join([*FOLDERS, *JOBS])}.")
        if name in JOBS:
            try:
                inspect.signature(JOBS[name]).bind(*words)
            except TypeError as error:
                raise sae_utils.UserError(f"{name}: {error}.") from None
            JOBS[name](*words)
        else:
            launch(name, words)
    except BrokenPipeError:  # whoever read what this prints has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        said, code = told(error, (args or [""])[0])
        if not said and isinstance(error, papermill.PapermillExecutionError):
            said = "\n".join(error.traceback)
        if not said:
            raise
        print(said, file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
