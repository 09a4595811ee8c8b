"""A day of faults: `make test-faults`. Kills, full disks, damaged files, two at once, bad inputs, on a very small world.

    python tests/faults.py [--short] [--seed N] [kills full damage twice inputs]

Prints a table of what was tried and what was survived, and a line for whatever was not. A notebook is executed here in a
forked child, cell after cell, as a kernel would: a start costs a tenth of a second where a kernel's costs several, so that
many moments can be tried. What only a kernel and the launcher have is tried with them, a few times.

survived means, of a kill or a full disk: the same command again ends with the very results of an undisturbed run; of a
damaged file: one sentence that names it, or the same results as if it were whole; of an input that is none: one sentence,
and of one that is odd but right: it is accepted.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "IPYTHONDIR": str(ROOT / ".venv" / "ipython"), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
    os.environ.pop(name, None)

import numpy as np
import torch

import datasets, IPython.display, ipywidgets, matplotlib.pyplot, papermill.cli, tensorboard, transformers.models.gemma3.modeling_gemma3  # noqa: E401, F401
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

import choosing, editing, experiment, features, fidelity, formats, harvest, known, patching, report, sae_utils, training  # noqa: E401, F401  imported once, for all children

torch.set_num_threads(1)

# A phase of a notebook, by what stands in its cell.
PHASES = {
    "sae_training": {
        "folder": "experiment.start_run", "harvest": "harvest.get_rows", "split": "harvest.split_windows", "train": "for epoch in range(place", "SAE": "training.settle", "held out": "held_out = fidelity.score_rows",
        "fidelity": "fidelity.text_sums", "contexts": "features.contexts(", "page": "features.write_page", "metrics": 'out_dir / "metrics.json"', "report": "report.open_report", "TensorBoard": "report.add_to_tensorboard",
    },
    "patch_neurons": {"folder": "experiment.start_patch", "choice": "choosing.candidates(", "edit": "patched = run(pairs", "controls": "patching.matched(", "doses": "doses.append", "files": "patching.write_page"},
}  # fmt: skip


SKIPPED: list[str] = []  # phases that are left out; the short form writes no report, which takes longest and is read by none


# ---------------------------------------------------------------------------------------------
# Children
# ---------------------------------------------------------------------------------------------


@functools.cache
def cells_of(notebook: str) -> list[str]:
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code" and not {"colab", "parameters"} & set(cell["metadata"].get("tags", []))]


def cell_of(notebook: str, phase: str) -> int:
    found = [i for i, source in enumerate(cells_of(notebook)) if PHASES[notebook][phase] in source]
    assert found, f"no cell of {notebook} holds {PHASES[notebook][phase]!r}: PHASES is out of date"
    return found[0]


def execute(notebook: str, params: dict, before=None, until: int = 10**6) -> None:
    """The notebook's cells in this process, with parameters as papermill injects them; `before(i)` is called ahead of each."""
    os.chdir(ROOT / "notebooks")
    params = experiment.check_params(notebook, params)
    scope = {"__name__": "__main__", "In": ["# Parameters\n" + "\n".join(f"{name} = {value!r}" for name, value in params.items())], **params}
    for i, source in enumerate(cells_of(notebook)):
        if i >= until:
            return
        if before:
            before(i)
        if any(PHASES[notebook].get(phase, "\0") in source for phase in SKIPPED):
            continue
        exec(compile(source, f"{notebook}, code cell {i}", "exec"), scope)
    folder = experiment.FOLDERS[notebook](params)[0]
    if not (folder / ".done").exists():
        (folder / ".done").write_text("finished\n")  # as the launcher does


def told(error: BaseException) -> tuple[str, int]:
    """What the launcher says of an error, and the code it ends with; nothing: a traceback."""
    if hasattr(experiment, "told"):
        return experiment.told(error)
    return (f"Error: {error}", 2) if isinstance(error, sae_utils.UserError) or isinstance(error, OSError) and error.errno in sae_utils.CANNOT_WRITE else ("", 1)


class Child:
    """A forked process that does `work()`, its output in a file. Ends with 0, 2 for one sentence, 1 for a traceback."""

    def __init__(self, work, log: Path):
        self.log, self.begun = log, time.monotonic()
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1), os.dup2(out, 2)
                code = work() or 0
            except BaseException as error:
                said, code = told(error)
                print(said) if said else traceback.print_exc()
            finally:
                with contextlib.suppress(BaseException):
                    sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)

    def over(self) -> bool:
        if not hasattr(self, "code"):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code, self.took = os.waitstatus_to_exitcode(status), time.monotonic() - self.begun
        return hasattr(self, "code")

    def wait(self, seconds: float = 240.0) -> int | None:
        """Its exit code, or None where it took longer: it is then killed."""
        while not self.over():
            if time.monotonic() - self.begun > seconds:
                self.kill()
                return None
            time.sleep(0.01)
        return self.code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        while not self.over():
            time.sleep(0.005)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def sentence(self) -> str:
        """What it said where it ended with one sentence: the last line, and no traceback before it."""
        text = self.said().strip()
        return text.splitlines()[-1] if self.code in (1, 2) and "Traceback (most recent" not in text and text.splitlines()[-1].startswith("Error: ") else ""


# ---------------------------------------------------------------------------------------------
# The world, its runs, and what they come to
# ---------------------------------------------------------------------------------------------


class World:
    """A model of 16 dimensions with random weights, a text, and where runs go. The repository is a copy, since some
    inputs name places in it."""

    def __init__(self, folder: Path, seed: int):
        shutil.copytree(ROOT / "notebooks", folder / "copy" / "notebooks", ignore=shutil.ignore_patterns("secret_tokens.py", "__pycache__"))
        (folder / "copy" / "runs").mkdir()
        (folder / "copy" / "tests").mkdir()
        (folder / "home").mkdir()
        (folder / "home" / "letters.txt").write_text("kept")
        sae_utils.ROOT, os.environ["HOME"] = folder / "copy", str(folder / "home")
        self.folder, self.random, self.table, self.failures, self.count = folder, random.Random(seed), {}, [], 0
        assert self.child(self.make).wait() == 0

    def make(self):
        import conftest

        conftest.gemma().save_pretrained(self.folder / "model")
        conftest.word_tokenizer().save_pretrained(self.folder / "model")
        texts = conftest.sentences(200)
        (self.folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def child(self, work) -> Child:
        self.count += 1
        return Child(work, self.folder / f"{self.count}.log")

    def training(self, run: Path, **more) -> dict:
        given = {"model_name": str(self.folder / "model"), "dataset_name": str(self.folder / "text.jsonl"), "layer": 1, "n_activations": 1500, "seq_len": 16}
        given |= {"activation_dtype": "float32", "l1_coeff": 0.02, "epochs": 15, "batch_size": 64, "checkpoint_minutes": 0.0, "eval_windows": 24, "device": "cpu"}
        return given | {"run_dir": str(run)} | more

    def patching(self, run: Path, **more) -> dict:
        return {"run_dir": str(run), "name": "p", "n_prompts": 2, "n_controls": 2, "exact_latents": 4, "max_new_tokens": 4, "device": "cpu"} | more

    def note(self, what: str, survived: bool, why: str = "") -> None:
        tried, good = self.table.get(what, (0, 0))
        self.table[what] = tried + 1, good + survived
        if not survived:
            self.failures.append(f"{what}: {why}")
            print("  NOT survived:", self.failures[-1], flush=True)


def results(run: Path) -> dict:
    """Everything that two equal runs share, as text and digests."""
    saved = torch.load(run / "sae.pth", weights_only=True)
    archive = np.load(run / "features.npz")
    return {
        "sae": sae_utils.digest({name: saved[name] for name in ("state_dict", "activation_mean", "density", "max_act", "norm_scale")}),
        "metrics": {name: value for name, value in json.loads((run / "metrics.json").read_text()).items() if name != "digest"},
        "history": (run / "history.csv").read_text(), "features": sae_utils.digest({name: archive[name] for name in archive}),
    }  # fmt: skip


def patched(folder: Path) -> dict:
    return json.loads(re.sub(r"make patch RUN=\S+", "make patch RUN=run", (folder / "patching.json").read_text()))


def apart(one: dict, other: dict) -> str:
    """The names under which two results differ."""
    return ", ".join(name for name in {**one, **other} if one.get(name) != other.get(name))


# ---------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------


def timed(world: World, notebook: str, params: dict) -> tuple[Child, dict[int, float]]:
    """An undisturbed run, and how long each of its cells took."""
    clock = world.folder / f"{notebook}.clock"
    child = world.child(lambda: execute(notebook, params, lambda i: clock.open("a").write(f"{i} {time.monotonic()}\n")))
    assert child.wait() == 0, child.said()
    at = [(int(i), float(t)) for i, t in map(str.split, clock.read_text().splitlines())]
    return child, {i: max(0.01, later - t) for (i, t), (_, later) in zip(at, [*at[1:], (0, at[-1][1] + 0.2)], strict=True)}


def killed_at(world: World, notebook: str, params: dict, phase: str, seconds: float) -> Child:
    """The notebook, killed with all its processes so long after the phase began."""
    clock, cell = world.folder / "reached", cell_of(notebook, phase)
    clock.unlink(missing_ok=True)
    child = world.child(lambda: execute(notebook, params, lambda i: clock.touch() if i == cell else None))
    while not clock.exists() and not child.over():
        time.sleep(0.002)
    end = time.monotonic() + seconds
    while time.monotonic() < end and not child.over():
        time.sleep(0.002)
    child.kill()
    return child


def kills(world: World, short: bool) -> None:
    """One run is killed in each phase in turn, at a random moment of it, and goes on each time from what is left."""
    for number in range(1 if short else 3):
        for notebook in ["sae_training"] if short else PHASES:
            training_run, made = notebook == "sae_training", world.folder / "runs" / f"killed{number}"
            params = world.training(made) if training_run else world.patching(made)
            phases, done = list(PHASES[notebook]), made if training_run else made / "patches" / "p"
            tried = sorted(world.random.sample(phases[: phases.index("page")], 3), key=phases.index) if short else phases
            for phase in tried:
                seconds = world.seconds[notebook][cell_of(notebook, phase)] * world.random.random()
                killed_at(world, notebook, params, phase, seconds)
                if (done / ".done").exists():  # the last phase was over before the signal came
                    break
            code, child = 0, None
            if not (done / ".done").exists():
                child = world.child(lambda: execute(notebook, params))
                code = child.wait()
            same = apart(world.whole, results(done)) if training_run and code == 0 else apart(world.patch, patched(done)) if code == 0 else f"{code}, {child.said()[-300:]}"
            for phase in tried:
                world.note(f"SIGKILL, {notebook}" + ("" if short else f", {phase}"), not same, f"chain {number}: {same}")
            left = [file.name for file in done.rglob("*") if file.name.endswith(".tmp")]
            if left:
                print("  left behind:", ", ".join(left))


# ---------------------------------------------------------------------------------------------
# A full disk
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "24m"):
    """A disk of its own in memory; None where this user may not mount one."""
    folder.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def fill_up(folder: Path) -> None:
    """Fills the folder's disk to the last byte."""
    with (folder / "filler").open("ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def full(world: World, short: bool) -> None:
    """The disk fills up as a phase begins: one sentence, and with room again the same results."""
    with small_disk(world.folder / "disk") as disk:
        if disk is None:
            print("skipped: full disks, as no tmpfs can be mounted here (it takes root)")
            return
        for notebook in PHASES:
            training_run, made = notebook == "sae_training", disk / "runs" / "one"
            params = world.training(made) if training_run else world.patching(made)
            phases = ["train", "page"] if short and training_run else [] if short else list(PHASES[notebook])
            for phase in phases:
                cell = cell_of(notebook, phase)
                child = world.child(lambda: execute(notebook, params, lambda i: fill_up(disk) if i == cell else None))
                code = child.wait()
                (disk / "filler").unlink(missing_ok=True)
                said = child.sentence()
                world.note(f"disk full, {notebook}, {phase}", bool(said) and any(word in said for word in ("No space left", "is full", "are free")), f"{code}: {child.said()[-400:]}")
                shutil.rmtree(made if training_run else made / "patches", ignore_errors=True) if code == 0 else None
            if phases:
                child = world.child(lambda: execute(notebook, params))
                done = made if training_run else made / "patches" / "p"
                same = apart(world.whole, results(done)) if training_run and child.wait() == 0 else apart(world.patch, patched(done)) if child.wait() == 0 else child.said()[-300:]
                world.note(f"room again, {notebook}", not same, same)
        if short:
            return
        for words in (["labels", str(disk / "runs" / "one")], ["export", str(disk / "runs" / "one"), "safetensors"]):
            fill_up(disk)
            child = world.child(lambda: experiment.main(words))
            code = child.wait()
            world.note(f"disk full, {words[0]}", bool(child.sentence()) and "No space left" in child.sentence(), f"{code}: {child.said()[-400:]}")
            (disk / "filler").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=False)
        tries = {words[0]: lambda words=words: experiment.main(words) for words in (["labels", str(disk / "runs" / "one")], ["export", str(disk / "runs" / "one"), "safetensors"])}
        tries |= {"patch_neurons": lambda: execute("patch_neurons", world.patching(disk / "runs" / "one", name="q")), "sae_training": lambda: execute("sae_training", world.training(disk / "runs" / "two"))}
        for name, work in tries.items():
            child = world.child(work)
            code = child.wait()
            world.note(f"read-only disk, {name}", "Read-only" in child.sentence(), f"{code}: {child.said()[-400:]}")


# ---------------------------------------------------------------------------------------------
# Damaged files
# ---------------------------------------------------------------------------------------------


def damages(data: bytes, chance: random.Random, flips: int = 1) -> list[tuple[str, bytes]]:
    """What may become of a file: some with one flipped bit each, one cut off, an empty one."""
    bits = [chance.randrange(8 * max(1, len(data))) for _ in range(flips)]
    flipped = [data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :] if data else b"\x01" for bit in bits]
    return [*(("a flipped bit", one) for one in flipped), ("a truncation", data[: chance.randrange(max(1, len(data)))]), ("emptied", b"")]


def damage(world: World, short: bool) -> None:
    """Each file of a run is damaged in each way, and then read by the commands that read it."""
    whole = world.folder / "runs" / "whole"
    here = world.folder / "runs" / "hurt"  # no word that a sentence has of its own
    commands = {
        "labels": (("sae.pth", "features.npz", "params.json", "labels.csv"), lambda: experiment.main(["labels", str(here)])),
        "export": (("sae.pth", "metrics.json", "params.json"), lambda: experiment.main(["export", str(here), "safetensors"])),
        "patch": (("sae.pth", "features.npz", "metrics.json", "params.json"), lambda: execute("patch_neurons", world.patching(here))),
        "train again": (("params.json", ".done", "sae.pth"), lambda: experiment.main(["sae_training", *flags_of(world.training(here))])),
        "runs": (("sae.pth", "metrics.json", "params.json", "history.csv"), lambda: print(__import__("listing").table_of_runs(here.parent, "hurt"))),
    }
    makes = {  # what a command makes of a run
        "labels": lambda child: (here / "features.html").read_bytes(), "patch": lambda child: patched(here / "patches" / "p"), "runs": lambda child: child.said(), "train again": lambda child: [(here / name).read_bytes() for name in ("history.csv", "metrics.json")],
        "export": lambda child: {file.name: file.read_bytes() for file in (here / "export" / "safetensors").iterdir()},
    }  # fmt: skip

    def tried(work, **changed: bytes) -> Child:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(whole, here, ignore=shutil.ignore_patterns("patches", "export"))
        for name, data in changed.items():
            (here / name).write_bytes(data)
        child = world.child(work)
        child.wait()
        return child

    for command in ["labels", "export"] if short else commands:
        names, work = commands[command]
        child = tried(work)
        assert child.code == 0, child.said()
        right = makes[command](child)
        for name in names[:2] if short else names:
            data = (whole / name).read_bytes() if name != "labels.csv" else b"3,red\n5,blue\n"
            for kind, damaged in damages(data, world.random, 1 if short else 3):
                if short and kind != "a flipped bit":
                    continue
                child = tried(work, **{name: damaged})
                told = child.sentence() or (child.said() if command == "runs" else "")
                free = name in ("labels.csv", "history.csv", ".done")  # which people edit, which nothing goes on from, or which is only there
                survived = child.code == 0 and (free or makes[command](child) == right) or name in told
                world.note(f"{kind}: {name}, then {command}", survived, f"{child.code}, other results without a word" if child.code == 0 else f"{child.code}: {child.said()[-400:]}")
    # A run that was stopped: what it goes on from is damaged.
    SKIPPED[:] = ["report", "TensorBoard"]
    stopped = world.folder / "runs" / "stopped"
    killed_at(world, "sae_training", world.training(stopped), "contexts", 0.0)
    kept = {name: (stopped / name).read_bytes() for name in ("checkpoint.pth", "fidelity.npz", "params.json", "sae.pth") if (stopped / name).exists()}
    world.note("a stopped run keeps what it goes on from", {"checkpoint.pth", "fidelity.npz", "params.json"} <= set(kept), str(sorted(kept)))
    for name in ["checkpoint.pth"] if short else kept:
        for kind, damaged in damages(kept[name], world.random):
            if short and kind != "a truncation":
                continue
            shutil.rmtree(stopped, ignore_errors=True)
            stopped.mkdir()
            for other, data in kept.items():
                (stopped / other).write_bytes(damaged if other == name else data)
            child = world.child(lambda: execute("sae_training", world.training(stopped)))
            code, what = child.wait(), f"{kind}: {name}, then train on"
            if child.sentence():
                world.note(what, name in child.sentence() and name == "params.json", f"{code}: {child.said()[-300:]}")
            else:
                same = "" if code else apart(world.whole, without_notices(results(stopped)))
                world.note(what, code == 0 and not same, f"{code}, {same}: {child.said()[-300:]}")


def without_notices(found: dict) -> dict:
    """Results but for the notice that something was made again."""
    metrics = dict(found["metrics"])
    metrics["notices"] = [text for text in metrics["notices"] if "starts again" not in text]
    return found | {"metrics": metrics}


def flags_of(params: dict) -> list[str]:
    return [flag for name, value in params.items() for flag in ("-y", json.dumps({name: value}))]


# ---------------------------------------------------------------------------------------------
# Two at once
# ---------------------------------------------------------------------------------------------


def twice(world: World, short: bool) -> None:
    """Two of every command at once, by the launcher: both end, with 0 or one sentence, at least one with 0."""
    if short:
        return
    whole, runs = world.folder / "runs" / "whole", world.folder / "runs"
    shutil.copytree(whole, runs / "spare", ignore=shutil.ignore_patterns("patches"))
    text = json.dumps({"model_name": str(world.folder / "model"), "dataset_name": str(world.folder / "text.jsonl"), "n_activations": 1000, "seq_len": 12, "run_dir": str(runs / "any"), "device": "cpu"})
    commands = {
        "train": ["sae_training", *flags_of(world.training(runs / "both"))],
        "patch": ["patch_neurons", *flags_of(world.patching(whole, name="both"))],
        "activations": ["activations", "0 2", "-y", text], "labels": ["labels", str(whole)], "export": ["export", str(whole), "safetensors"],
        "compare": ["compare_runs", "-p", "runs_dir", str(runs), "-p", "runs", "whole"],
    }  # fmt: skip
    for name, words in commands.items():
        both = [world.child(lambda words=words: experiment.main(words)) for _ in range(2)]
        codes = [child.wait() for child in both]
        fine = all(code == 0 or child.sentence() for code, child in zip(codes, both, strict=True)) and 0 in codes
        if name == "train" and fine:
            fine = not apart(world.whole, results(runs / "both"))
        world.note(f"two at once: {name}", fine, f"{codes}: " + " | ".join(child.said()[-300:] for child in both))


# ---------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------


def wrong_values(chance: random.Random) -> dict[str, list]:
    """By a parameter's type, values that none may have."""
    word = "".join(chance.choice("abcxyz") for _ in range(6))
    return {
        "int": [-1, 1.5, word, "", None, [], {}, True, float("nan"), float("inf"), -(10**30), "1e3", "0x10", [1]],
        "float": [word, None, [], {}, True, float("nan"), float("inf"), -float("inf"), "1,5", [0.1]],
        "bool": [word, 2, -1, None, [], "yes please", 0.5],
        "str": [None, [], {}, ["a"], "a\0b", "\ud800"],
        "list": [5, None, {}, True, [None], [[1]], [{}], [0.5]],
    }


def inputs(world: World, short: bool) -> None:
    """Generated inputs that are none, and some that are odd but right."""
    whole, chance = world.folder / "runs" / "whole", world.random
    tried: list[tuple[str, dict, dict, bool]] = []  # notebook, parameters, those of them that are tried, whether they are right
    small = {"run_dir": str(whole), "name": "none", "n_prompts": 1, "n_controls": 1, "exact_latents": 1, "max_new_tokens": 2, "device": "cpu"}
    for notebook, base in (("sae_training", {"run_dir": str(world.folder / "runs" / "none")}), ("patch_neurons", {"run_dir": str(whole), "name": "none"})):
        declared = experiment.declared_params(notebook)
        for name, param in declared.items():
            for value in chance.sample(wrong_values(chance)[param.type.partition("[")[0]], 1 if short else 2):
                tried.append((notebook, base, {name: value}, False))
        for _ in range(2 if short else 8):
            name = chance.choice(list(declared))
            tried.append((notebook, base, {name[:-1] + chance.choice("qzj"): declared[name].default}, False))
    edits = world.folder / "edits"
    edits.mkdir(exist_ok=True)

    def file(content: str | bytes, ending: str = "yaml") -> str:
        path = edits / f"{len(list(edits.iterdir()))}.{ending}"
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return str(path)

    patch = [
        {"latents": [3, 3]}, {"latents": [128]}, {"latents": [-1]}, {"latents": [[3]]}, {"latents": [3.0]}, {"latents": [10**30]}, {"latents": [None]}, {"latents": [True]},
        {"source_words": [5]}, {"source_words": [False, True]}, {"source_words": [None]}, {"source_words": [""]}, {"source_words": ["\ud800"]}, {"topic_words": [3]}, {"topic_words": [[]]}, {"topic_words": ["dog"], "target_word": "cat"},
        {"target_word": "unheardof"}, {"target_word": "\ud800"}, {"target_word": "dog", "source_words": ["dog"]}, {"strength": 1e39, "latents": [3]}, {"strength": 1e300}, {"temperature": 1e-320}, {"temperature": 1e-9}, {"max_new_tokens": 10**9}, {"max_new_tokens": 127},
        {"seed": 10**30}, {"prompts": [5]}, {"prompts": [""]}, {"prompts": ["a \ud800"]}, {"prompts": [None]}, {"prompts": [["a"]]}, {"prompts": ["dog " * 200]}, {"prompts_file": "nowhere.txt"}, {"prompts_file": "/dev/zero"}, {"prompts_file": "/tmp"},
        {"prompts_file": file(b"caf\xe9 \xff", "txt")}, {"prompts_file": file("", "txt")}, {"prompts_file": file("{", "jsonl")}, {"prompts_file": file('"\\ud800"', "jsonl")}, {"prompts_file": file("[1]", "jsonl")}, {"prompts_file": "x" * 300},
        {"edits": "nowhere.yaml"}, {"edits": "/dev/zero"}, {"edits": file(b"\xff\xfe")}, {"edits": file("")}, {"edits": file("- 1")}, {"edits": file("text")}, {"edits": file("edits: [")}, {"edits": file("edits: []")}, {"edits": file("edits: [{latents: [1]}]")},
        {"edits": file("edits: [{latents: [1], operation: ablate, scope: [" + "9" * 30 + "]}]")}, {"edits": file("edits: [{latents: [1, 1], operation: ablate}]")}, {"edits": file("edits: [{latents: [1], operation: set_value, strength: 1e39}]")},
        {"edits": file("edits: [{latents: [1], operation: ablate, scope: {tokens: [5]}}]")}, {"edits": file("edits: 2001-99-99")}, {"edits": file("[" * 3000)}, {"edits": file("edits: [{latents: [[1]], operation: ablate}]")}, {"text": "\ud800"}, {"text": " "},
        {"run_dir": "/nowhere"}, {"run_dir": str(world.folder / "text.jsonl")}, {"run_dir": ""}, {"run_dir": str(whole / "patches")}, {"name": "x" * 300}, {"name": "a\0b"}, {"scope": "some"}, {"operation": "boost"}, {"device": "cpu:99"}, {"device": "tpu"}, {"chat": True, "prompts": ["a dog"]},
    ]  # fmt: skip
    train = [
        {"layer": 99}, {"hook": "model.nowhere"}, {"model_name": "/nowhere"}, {"model_name": ""}, {"model_name": "\ud800"}, {"model_name": "../../etc"}, {"dataset_name": "/nowhere.jsonl"}, {"dataset_name": ""}, {"dataset_name": str(world.folder)},
        {"text_column": "nothing"}, {"seq_len": 10**6}, {"seed": 10**30}, {"k": 10**6, "architecture": "topk"}, {"expansion": 10**9}, {"architecture": "other"}, {"dtype": "float8"}, {"device": "cpu:99"}, {"held_out_fraction": 0.9}, {"lr": 0.0},
        {"trained_sae": "/nowhere.pth"}, {"trained_sae": str(world.folder / "text.jsonl")}, {"run_dir": "."}, {"run_dir": "~"}, {"run_dir": "notebooks"}, {"run_dir": "runs/x/../../tests"}, {"run_dir": str(world.folder / "text.jsonl")}, {"run_dir": "x" * 300},
        {"dataset_name": file(b"\xff\xfe", "jsonl")}, {"dataset_name": file("", "jsonl")}, {"dataset_name": file('{"text": 5}\n', "jsonl")}, {"dataset_name": file("[1]\n", "jsonl")}, {"dataset_name": file('{"text": "a', "jsonl")}, {"dataset_name": file(b"\xff", "txt")}, {"dataset_name": file("", "txt")},
    ]  # fmt: skip
    good_patch = [{"latents": [3]}, {"operation": "ablate", "latents": [3, 5]}, {"temperature": 0.7, "seed": 2**31 - 1}, {"prompts": ["the dog sees", "a"], "latents": [7], "max_new_tokens": 1}, {"target_word": "dog"}, {"strength": 0.0, "latents": [3]}]
    good_train = [{"seed": 2**30}, {"architecture": "topk", "k": 4}, {"lr": "1e-3"}, {"layer": "1"}, {"chat": "false"}]
    for right, of_patch, of_train in ((False, patch, train), (True, good_patch, good_train)):
        tried += [("patch_neurons", small, more, right) for more in of_patch[:: 6 if short else 1]]
        tried += [("sae_training", world.training(world.folder / "runs" / "none"), more, right) for more in of_train[:: 6 if short else 1]]
    if short:
        tried = chance.sample(tried, min(24, len(tried)))
    sorted_into = {"sentence": 0, "accepted": 0, "traceback": 0, "hang": 0}
    for notebook, base, more, right in tried:
        until = cell_of(notebook, "harvest") if notebook == "sae_training" else 10**6
        child = world.child(lambda notebook=notebook, given=base | more, until=until: execute(notebook, given, until=until))
        code = child.wait(90)
        outcome = "hang" if code is None else "accepted" if code == 0 else "sentence" if child.sentence() else "traceback"
        sorted_into[outcome] += 1
        world.note(f"inputs, {notebook}, {'odd but right' if right else 'none'}", outcome == ("accepted" if right else "sentence"), f"{outcome}: {str(more)[:120]} … {child.said().strip()[-260:]}")
        for made in (whole / "patches" / "none", world.folder / "runs" / "none"):
            shutil.rmtree(made, ignore_errors=True)
    print("inputs sorted into", sorted_into)


# ---------------------------------------------------------------------------------------------


PARTS = {"kills": kills, "full": full, "damage": damage, "twice": twice, "inputs": inputs}


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all, where none is named")
    words.add_argument("--short", action="store_true", help="a few of each, in some seconds")
    words.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"))
    asked = words.parse_args()
    print(f"to repeat: --seed {asked.seed}")
    SKIPPED.extend(["report", "TensorBoard"] if asked.short else [])
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        world = World(Path(folder), asked.seed)
        whole = world.folder / "runs" / "whole"
        _, train_seconds = timed(world, "sae_training", world.training(whole))
        world.seconds, world.whole = {"sae_training": train_seconds}, results(whole)
        if not asked.short:
            world.seconds["patch_neurons"] = timed(world, "patch_neurons", world.patching(whole))[1]
            world.patch = patched(whole / "patches" / "p")
        slowest = sorted(((s, n, i) for n, cells in world.seconds.items() for i, s in cells.items()), reverse=True)[:6]
        print("slowest cells:", ", ".join(f"{s:.1f} s {cells_of(n)[i][:40]!r}" for s, n, i in slowest))
        print("undisturbed: " + ", ".join(f"{name} {sum(cells.values()):.1f} s" for name, cells in world.seconds.items()))
        for name in asked.parts or PARTS:
            start = time.monotonic()
            SKIPPED[:] = ["report", "TensorBoard"] if asked.short else []
            PARTS[name](world, asked.short)
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    width = max(map(len, world.table))
    print(f"\n{'':{width}}  tried  survived")
    for what, (tried, good) in sorted(world.table.items()):
        print(f"{what:{width}}  {tried:5}  {good:8}" + ("" if good == tried else "  <--"))
    tried, good = (sum(column) for column in zip(*world.table.values(), strict=True))
    print(f"{'all':{width}}  {tried:5}  {good:8}   in {time.monotonic() - begin:.0f} s")
    print("\n".join(world.failures))
    return int(bool(world.failures))


if __name__ == "__main__":
    sys.exit(main())
