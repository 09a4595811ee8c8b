"""What lies under runs/: every run as it is found, the table of `make runs`, and `make remove`.

What is wrong with a run is kept as a sentence, so that one broken folder never hides the others. Two runs may be
compared where they are judged on the same rows, that is of one model, hook, text and split, told by the digests that
an SAE carries; where nothing but the seed differs beside that, they are of the same settings.
"""

import csv
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import filelock
import numpy as np

import experiment
import sae_utils
import showing
import storing
from sae_utils import UserError

NOTEBOOK = "sae_training"
FIGURES = ("fvu", "l0", "dead", "ce_clean", "ce_spliced")  # every run has these
YARDSTICKS = ("pca", "kmeans", "untrained")
# What two runs must share to be judged on the same rows, beside the hook and the number of rows; from an SAE's config.
SAME = ("model_fingerprint", "tokenizer_fingerprint", "dataset_fingerprint", "text_column", "chat", "seq_len")
SAME += ("held_out_fraction", "split", "activation_dtype", "dtype", "non_finite")
# Parameters that say which rows and how much is measured, and no more: no part of the settings of an SAE.
ROWS = {"model_name", "model_revision", "hook", "layer", "dataset_name", "dataset_revision", "dataset_config", "dataset_split"}
ROWS |= {"text_column", "n_activations", "chat", "seq_len", "held_out_fraction", "activation_dtype", "dtype", "non_finite"}
UNFINISHED = "not finished, or still at work: the same command goes on with it"
NO_SETTING = ROWS | {"seed", "run_dir", "eval_windows"} | experiment.FREE


@dataclass
class Run:
    """A folder as it was found. `reason`: why it is not compared, "" where it is; `remarks`: what else a reader should know."""

    name: str
    folder: Path
    state: str = ""  # finished, unfinished or failed
    reason: str = ""
    remarks: list[str] = field(default_factory=list)
    params: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    history: list[dict] = field(default_factory=list)
    key: dict = field(default_factory=dict)  # equal where figures may be compared
    settings: dict = field(default_factory=dict)  # parameters that do something, but for the seed
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def values(self) -> dict:
        """What a run can be sorted or laid out by: settings, layer and seed."""
        return {"layer": self.params["layer"], **self.settings, "seed": self.params["seed"]}


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def why_failed(notebook: Path) -> str:
    """The error that a notebook's executed copy ends with."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        outputs = [out for cell in cells for out in cell.get("outputs", [])]
        error = next(out for out in reversed(outputs) if out["output_type"] == "error")
        return f"{error['ename']}: {' '.join(error['evalue'].split())[:300]}"
    except (OSError, ValueError, LookupError, StopIteration, TypeError, AttributeError):
        return f"see {notebook.name}"


def active(params: dict) -> dict:
    """Those of a training run's parameters that do something beside the others."""
    without_a_say = experiment.idle(params)
    return {name: value for name, value in params.items() if name not in without_a_say}


def read_run(folder: Path, whole: bool = True) -> Run:
    """The run in `folder`; with `whole` its SAE is opened too, and held against the figures."""
    failed, running = (folder / f"{NOTEBOOK}.{word}.ipynb" for word in ("failed", "running"))
    state = "finished" if experiment.is_finished(folder) else "failed" if failed.exists() and not running.exists() else "unfinished"
    if state == "failed" and why_failed(failed).startswith("KeyboardInterrupt"):
        state = "unfinished"  # somebody stopped it
    run = Run(folder.name, folder, state)
    try:
        recorded = storing.read_json(folder / "params.json").get("parameters")
        if not isinstance(recorded, dict) or "architecture" not in recorded:
            raise UserError("params.json is not of a training run of this project")
        run.params = experiment.check_params(NOTEBOOK, recorded)
        if fresh := sorted(set(run.params) - set(recorded)):
            run.remarks.append(f"of an older version, without {', '.join(fresh)}: taken at the default")
        if state != "finished":
            raise UserError(state)
        read_figures(run)
        if whole:
            read_sae(run)
            read_history(run)
    except UserError as error:
        other = "of another version: " if "has no parameter" in str(error) else ""
        run.reason = {"failed": why_failed(failed), "unfinished": UNFINISHED}.get(state, f"{other}{error}".rstrip("."))
    except (TypeError, AttributeError, LookupError, ValueError) as error:  # files of somebody else's, with names like ours
        run.reason = f"its files are not of this project ({type(error).__name__}: {error})"
    return run


def read_figures(run: Run) -> None:
    """`metrics`, `figures` (every number of metrics.json, and the increase of CE) and the doctor's lines."""
    metrics = storing.read_json(run.folder / "metrics.json")
    missing = [name for name in FIGURES if name not in metrics]
    if len(missing) == len(FIGURES):
        raise UserError("metrics.json is not of a training run: it has none of " + ", ".join(FIGURES))
    arms = metrics.get("fidelity") if isinstance(metrics.get("fidelity"), dict) else {}
    missing += [f"{name} of {arm}" for arm in ("sae", *YARDSTICKS) for name in ("fvu", "l0", "ce_increase") if name not in arms.get(arm, {})]
    if missing or not {"rows", "d_in", "d_sae", "doctor"} <= set(metrics):
        raise UserError(f"metrics.json is of an older version: it lacks {', '.join(missing[:4]) or 'rows, d_in, d_sae or doctor'}; train it again")
    number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
    if wrong := [name for name in FIGURES if not number(metrics[name])]:
        raise UserError(f"metrics.json has no number for {', '.join(wrong)}")
    run.metrics, run.settings = metrics, {name: value for name, value in active(run.params).items() if name not in NO_SETTING}
    run.figures = {name: value for name, value in metrics.items() if number(value)} | {"ce_increase": metrics["ce_spliced"] - metrics["ce_clean"]}
    run.remarks += [f"doctor: {line}" for line in metrics["doctor"]]


def read_sae(run: Run) -> None:
    """`key`, from the SAE's config. UserError where the file is not whole, or not the one that the figures are of."""
    sae = sae_utils.SAE.load(run.folder / "sae.pth")
    if missing := [name for name in (*SAME, "hook_name") if name not in sae.config]:
        raise UserError(f"sae.pth is of an older version: it does not say {', '.join(missing)}")
    found = {"d_in": sae.d_in, "d_sae": sae.d_sae, "l0": sae.density.double().sum().item(), "dead": (sae.density == 0).double().mean().item()}
    if wrong := [name for name, value in found.items() if not np.isclose(value, run.metrics[name], rtol=1e-3, atol=1e-6)]:
        raise UserError(f"metrics.json is of another SAE than sae.pth: {wrong[0]} is {run.metrics[wrong[0]]:.6g} in one and {found[wrong[0]]:.6g} in the other")
    run.key = {"hook_name": sae.config["hook_name"], "rows": run.metrics["rows"], **{name: sae.config[name] for name in SAME}}
    run.settings["architecture"] = sae.architecture


def read_history(run: Run) -> None:
    """`history`: a table of numbers for each epoch; a remark where there is none."""
    try:
        with (run.folder / "history.csv").open(newline="", encoding="utf-8") as file:
            run.history = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError):
        run.remarks += [] if run.params["trained_sae"] else ["history.csv is missing or cut off: no curves"]


def find_runs(root: Path, patterns: str = "*", whole: bool = True) -> list[Run]:
    """Every run under `root` whose folder's name fits one of the `patterns`, by name. UserError where there is none."""
    holds = lambda folder: any(folder.glob(f"{NOTEBOOK}.*")) or any((folder / name).exists() for name in ("params.json", "metrics.json", "sae.pth"))
    folders = [f for f in sorted(root.glob("*/")) if f.name not in experiment.KEPT and not f.name.startswith(".") and holds(f)]
    if not folders:
        raise UserError(f"there is no run in {sae_utils.show_path(root)} yet: try `make demo`.")
    fitting = [f for f in folders if any(fnmatch(f.name, pattern) for pattern in patterns.split())]
    if not fitting:
        raise UserError(f"no run in {sae_utils.show_path(root)} is called {patterns!r}; there are: {', '.join(f.name for f in folders)}.")
    return [read_run(folder, whole) for folder in fitting]


# ---------------------------------------------------------------------------------------------
# The table of `make runs`, and `make remove`
# ---------------------------------------------------------------------------------------------


def in_words(run: Run) -> str:
    """The recipe in a few words: the architecture, what sets its sparsity, and what else differs from the default."""
    if run.params["trained_sae"]:
        return f"SAE from {run.params['trained_sae']}"
    rule, default = sae_utils.ARCHITECTURES[run.params["architecture"]], experiment.check_params(NOTEBOOK, {})
    more = [name for name in ("expansion", "normalize", "epochs", "seed") if run.params[name] != default[name]]
    return ", ".join([f"{rule.name} {rule.knob} {run.params[rule.knob]:g}", *(f"{name} {run.params[name]}" for name in more)])


def line_of(run: Run) -> list[str]:
    """Name, state, model, layer, recipe, L0, fvu, increase of CE, dead, size on disk and age of a run."""
    files = {file: file.stat() for file in run.folder.rglob("*") if file.is_file()}
    ended = (run.folder / ".done").stat().st_mtime if run.state == "finished" else max((stat.st_mtime for stat in files.values()), default=time.time())
    hours = (time.time() - ended) / 3600
    about = [Path(run.params["model_name"]).name, str(run.params["layer"]), in_words(run)] if run.params else [""] * 3
    formats = {"l0": ".1f", "fvu": ".4f", "ce_increase": "+.4f", "dead": ".1%"}
    numbers = [f"{run.figures[name]:{form}}" if run.figures else "" for name, form in formats.items()]
    state = "broken" if run.state == "finished" and not run.figures else run.state
    return [run.name, state, *about, *numbers, showing.in_bytes(sum(stat.st_size for stat in files.values())), f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.0f} d"]


def table_of_runs(root: Path, patterns: str = "*") -> str:
    """A line for each run, and below what is amiss with some."""
    runs = find_runs(root, patterns, whole=False)
    lines = [["run", "state", "model", "layer", "recipe", "L0", "fvu", "CE +", "dead", "size", "age"], *map(line_of, runs)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.rjust(width) if 5 <= i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]
    return "\n".join(table + [""] * any(run.reason for run in runs) + [f"{run.name}: {run.reason}" for run in runs if run.reason])


def remove(root: Path, name: str, yes: bool = False) -> bool:
    """Deletes the run `name` under `root`, after asking on a terminal; `yes` does not ask. Whether it is gone. UserError
    where that is no run, where something is at work on it, or where nobody can be asked."""
    folder = root / name
    if name in ("", ".", "..", *experiment.KEPT) or Path(name).name != name or folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{name!r} is no run in {sae_utils.show_path(root)}: `make runs` lists them.")
    run, shown = read_run(folder, whole=False), sae_utils.show_path(folder)
    if not run.params:
        raise UserError(f"{shown} is not touched: no params.json says that it is a run ({run.reason}). Look at it, and delete it by hand.")
    try:
        with filelock.FileLock(folder / ".lock", timeout=0), filelock.FileLock(folder / ".claim", timeout=0):
            print(f"{shown}: {', '.join(word for word in line_of(run)[1:] if word)}; {len(list(folder.glob('patches/*/')))} patching experiments in it")
            if not yes and not sys.stdin.isatty():
                raise UserError(f"nobody can be asked whether to delete {shown}: say YES=1.")
            try:
                if not yes and input("delete it? [y/N] ").strip().lower() not in ("y", "yes"):
                    return False
            except EOFError:  # Ctrl-D
                return False
            storing.sweep_temporary(root)
            going = root / f".{name}.{os.getpid()}.tmp"  # at once: what is stopped half-way is no run that looks whole
            shutil.rmtree(folder.rename(going))
            return True
    except filelock.Timeout:
        raise UserError(f"{shown} is being worked on in another notebook or process: stop it, or wait for it.") from None
