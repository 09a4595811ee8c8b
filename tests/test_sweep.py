"""Sweeps: what a grid means, what is refused, and make as the scheduler of a small one."""

import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import filelock
import psutil
import pytest
import torch
from conftest import ROOT, training_params

import experiment
import sae_utils as u
import showing
import sweep
import training

POOL = {
    "layer": [0, 1, 2, 5], "k": [1, 4, 16, 300], "seed": [0, 1, 2], "expansion": [2, 4, 8], "lr": [1e-3, 0.002, 3e-5], "chat": [True, False],
    "architecture": ["topk", "batchtopk", "matryoshka", "jumprelu"], "normalize": ["unit", "scale"], "seq_len": [8, 16], "n_activations": [1000, 2000],
}  # fmt: skip


def given(folder, **more) -> dict:
    """Parameters of a small run on `folder`."""
    about = {"model_name": f"{folder}/model", "dataset_name": f"{folder}/text.jsonl", "layer": 1, "n_activations": 1500, "seq_len": 16}
    return about | {"architecture": "topk", "activation_dtype": "float32"} | more


def as_flags(parameters: dict) -> list[str]:
    return [word for name, value in parameters.items() for word in ("-p", name, str(value))]


def read_plan(plan: str) -> tuple[dict[str, dict], dict[str, list]]:
    """{cell: {parameter: word}} with what it waits for as `after`, and {harvest: its layers}, of what `sweep.plan` writes."""
    lines = plan.splitlines()
    cells = {name: {} for name in lines[0].removeprefix("CELLS := ").split()}
    rows = {name: [] for name in lines[1].removeprefix("ROWS := ").split()}
    for line in lines[2:]:
        target, _, rest = line.partition(": ")
        if rest.startswith("AT := "):
            rows[target] = rest.split()[2:]
        elif rest.startswith("| "):
            cells[target]["after"] = rest[2:]
        elif target in cells:
            words = shlex.split(rest.removeprefix("SETTINGS := "))
            assert words[::3] == ["-p"] * (len(words) // 3)
            cells[target] |= dict(zip(words[1::3], words[2::3], strict=True))
    return cells, rows


@pytest.mark.parametrize("trial", range(5))
def test_a_grid_is_the_product_of_its_axes(folder, fresh_seed, trial):
    chance = random.Random(fresh_seed + trial)
    axes = {name: chance.sample(POOL[name], chance.randint(1, len(POOL[name]))) for name in chance.sample(sorted(POOL), chance.randint(1, 4))}
    words = [f"{name}={','.join(str(value) for value in values)}" for name, values in axes.items()]
    assert sweep.read_grid("  ".join(words)) == axes
    cells, rows = read_plan(sweep.plan(" ".join(words), str(folder / "runs" / "try"), as_flags(given(folder))))
    wanted = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    assert len(cells) == len(wanted) == len({target.lower() for target in cells})
    of_rows = {"layer", "chat", "seq_len", "n_activations"}
    for (target, cell), here in zip(cells.items(), wanted, strict=True):
        run_dir, after = cell.pop("run_dir"), cell.pop("after")
        assert target == run_dir + "/.done" and run_dir.startswith(str(folder / "runs" / "try-"))
        checked = experiment.check_params("sae_training", given(folder) | cell)
        assert {name: checked[name] for name in here} == here and cell.keys() == here.keys() | given(folder).keys()
        assert str(here.get("layer", 1)) in rows[after]
        for name in here.keys() & of_rows - {"layer"}:
            assert f"-{name.replace('_', '')}{here[name]}-" in after
    groups = {tuple(here[name] for name in here if name in of_rows - {"layer"}) for here in wanted}
    assert len(rows) == len(groups) and all(layers == [str(layer) for layer in axes.get("layer", [1])] for layers in rows.values())


@pytest.mark.parametrize(
    ("grid", "sentence"),
    [
        ("", "the grid is empty: make sweep GRID="),
        ("k=", "the axis k= lacks a value"),
        ("k", "the axis k lacks a value"),
        ("k=1,,2", "the axis k=1,,2 lacks a value"),
        ("layr=1", "no parameter layr. Did you mean layer"),
        ("k=4,many", "k must be a whole number .1 to 1_000_000., not 'many'"),
        ("normalize=unit,none", "normalize must be text .unit . scale., not 'none'"),
        ("k=1,2 k=3", "names k twice"),
        ("lr=1e-3,0.001", "names lr=1e-3,0.001 twice"),
        ("lr=0.001,0.00100000001", "two cells would be called try-lr0.001"),
        ("run_dir=a", "run_dir is no axis"),
        ("device=cpu", "device is no axis"),
        ("l1_coeff=1e-3,1e-4", "l1_coeff does nothing with architecture topk"),
        ("architecture=topk,relu k=4,8", "k does nothing with architecture relu"),
        ("architecture=gated k=4,8", "k does nothing with architecture gated"),
        ("l0_weight=1,2", "l0_weight does nothing with architecture topk"),
        ("dead_after=10,20", "dead_after does nothing without auxk_weight"),
        ("dataset_config=a,b", "dataset_config does nothing on local text"),
        ("dataset_split=a,b", "dataset_split does nothing on local text"),
        ("model_revision=a,b", "model_revision does nothing with a local model"),
        ("trained_sae=x.pth lr=1e-3,1e-4", "lr does nothing where an SAE is trained already"),
    ],
)
def test_what_is_no_grid_is_one_sentence(folder, grid, sentence):
    with pytest.raises(u.UserError, match=sentence) as refusal:
        sweep.plan(grid, str(folder / "runs" / "try"), as_flags(given(folder)))
    assert "\n" not in str(refusal.value) and not (folder / "runs").exists()


def test_names_of_sweeps_and_of_runs_that_are_taken(folder):
    for name in ("", "a b", "a'b", "$(shell)", "a/", "../a", "ü"):
        with pytest.raises(u.UserError, match="names no sweep"):
            sweep.plan("k=1", name, as_flags(given(folder)))
    taken = folder / "runs" / "try-k4"
    experiment.record_params(taken / "params.json", training_params(folder, architecture="topk", k=4, lr=0.1) | {"run_dir": str(taken)})
    with pytest.raises(u.UserError, match="already holds a run with other parameters .*lr was 0.1"):
        sweep.plan("k=2,4", str(folder / "runs" / "try"), as_flags(given(folder)))
    for foreign in ("", "{", "[1]", '{"accuracy": 1}', '{"parameters": 3}'):
        (taken / "params.json").write_text(foreign)
        with pytest.raises(u.UserError, match="params.json (is cut off, or not of|holds no parameters of) this project.*: look at it, or take another name"):
            sweep.plan("k=2,4", str(folder / "runs" / "try"), as_flags(given(folder)))


def test_what_make_reads_is_what_was_given(folder):
    awkward = "it's $5 $(x) `y` #1 \\# \\"
    cell = f"dataset_name={folder}/{awkward}".replace(" ", "_")  # a grid's values hold no spaces
    flags = [*as_flags(given(folder)), "--words", f"-p text_column {shlex.quote(awkward)}"]
    plan = sweep.plan(cell, str(folder / "runs" / "try"), flags)
    settings = next(line for line in plan.splitlines() if "SETTINGS" in line).partition(": ")[2]
    (folder / "plan.mk").write_text(plan + f"\nall:\n\t@printf '%s\\n' $(SETTINGS)\nall: {settings}\n")
    out = subprocess.run(["make", "-f", str(folder / "plan.mk"), "all"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[: len(flags) + 3] == [*flags, "-p", "dataset_name", cell.partition("=")[2]]
    with pytest.raises(u.UserError, match="leave line breaks out"):
        sweep.plan("k=2", str(folder / "runs" / "try"), [*flags, "-p", "hook", "a\nb"])


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({}, {"k", "l0_weight", "dead_after"}),
        ({"architecture": "gated", "auxk_weight": 0.03}, {"k", "l0_weight"}),
        ({"architecture": "batchtopk"}, {"l1_coeff", "l0_weight", "dead_after"}),
        ({"architecture": "jumprelu", "lr_min_ratio": 1.0}, {"l1_coeff", "dead_after", "lr_decay_fraction"}),
    ],
)
def test_parameters_that_do_nothing_are_told_where_they_were_given(folder, changes, idle):
    params = experiment.check_params("sae_training", changes)  # a model and a text from the hub
    assert set(experiment.idle(params)) == idle and experiment.given_in_vain(params) == []  # defaults are nobody's mistake
    params = training_params(folder, l1_coeff=3e-4, **changes)
    assert set(experiment.idle(params)) == idle | {"dataset_config", "dataset_split", "dataset_revision", "model_revision"}
    assert experiment.given_in_vain(params) == []
    (told,) = experiment.given_in_vain(params | {"dataset_split": "test", "l0_weight": 1.0, "k": 5, "epochs": 2})
    assert "dataset_split does nothing on local text" in told and ("k does nothing" in told) == ("k" in idle) and ("l0_weight" in told) == ("l0_weight" in idle)
    assert "epochs" not in told
    everything = experiment.idle(params | {"trained_sae": "x.pth"})
    assert {"architecture", "epochs", "lr", "expansion"} <= set(everything) and not {"seed", "eval_windows", "layer"} & set(everything)


@pytest.mark.parametrize(("name", "value"), [("k", 9), ("l1_coeff", 0.5), ("l0_weight", 0.5), ("dead_after", 40)])
@pytest.mark.parametrize("architecture", list(u.ARCHITECTURES))
def test_what_is_said_to_do_nothing_does_nothing(architecture, name, value):
    """Two short trainings that differ in one parameter end with the same weights just where it is idle."""

    def train(**changes):
        p = {"k": 4, "l1_coeff": 0.02, "l0_weight": 0.03, "dead_after": 100_000, "auxk_weight": 0.0} | changes
        sae = u.SAE(16, 64, seed=1, architecture=architecture, k=p["k"])
        trainer = training.Trainer(sae, p["l1_coeff"], p["auxk_weight"], p["dead_after"], p["l0_weight"])
        for step in range(6):
            trainer.step(torch.nn.functional.normalize(torch.randn(64, 16, generator=torch.Generator().manual_seed(step)), dim=1), 1e-2)
            trainer.read()
        return torch.cat([parameter.detach().flatten() for parameter in sae.parameters()])

    params = experiment.check_params("sae_training", {"architecture": architecture})
    assert torch.equal(train(), train(**{name: value})) == (name in experiment.idle(params))


def test_a_long_epoch_is_not_silent(capsys, monkeypatch):
    """Two seconds a step: of the last 29 steps, of 100 rows each, half as many again are to come."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    trainer, rows = training.Trainer(u.SAE(8, 32, seed=0, architecture="topk", k=4)), torch.nn.functional.normalize(torch.randn(3000, 8), dim=1)
    progress = training.Progress(trainer, 60, 0.2, 0.0)
    for step, batch in enumerate(rows.split(100), 1):
        trainer.step(batch, 1e-3)
        now[0] += 2
        before = {name: value.clone() for name, value in trainer.state.items()}
        progress(100 * step, 3000)
        assert all(torch.equal(value, before[name]) for name, value in trainer.state.items()) and not trainer.any_dead
    lines = capsys.readouterr().out.splitlines()
    found = trainer.means()
    assert len(lines) == 30 and found["l0"] == pytest.approx(4)
    assert lines[-1] == f"step 30 of 60 (50%), 100% of the epoch: fvu {found['mse'] / 0.2:.4f}, l0 {found['l0']:.1f}; 50 rows/s, {showing.duration(60)} left"
    training.Progress(trainer, 60, 0.2, 10.0)(100, 3000)
    assert capsys.readouterr().out == ""  # an epoch that is younger than that says nothing


def asked(folder, grid: str, *words: str, runner: str = "tests/brief.py", **environment) -> dict:
    """What subprocess.run takes to make a sweep on `folder`, into its runs/s-…"""
    small = given(folder, k=3, auxk_weight=0.03, batch_size=16, epochs=25, checkpoint_minutes=0.0)
    (folder / "p.yaml").write_text(json.dumps(small))
    make = ["make", "-o", ".venv/.ready", f"PY={sys.executable}", f"RUNNER={sys.executable} {runner}"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "notebooks")])
    return {
        "args": [*make, "sweep", f"GRID={grid}", f"SWEEP={folder}/runs/s", f"PARAMS={folder}/p.yaml", *words],
        "cwd": ROOT, "env": clean | {"PYTHONPATH": paths} | environment, "text": True,
    }  # fmt: skip


def names_of(lines) -> set[str]:
    """What lines of cells and harvests begin with."""
    return {match[1] for line in lines if (match := re.match(r"(s-[\w.-]+): ", line))}


def test_make_shows_what_it_would_do(folder):
    out = subprocess.run(**asked(folder, "k=3,5", "-n", "-j2", "SEEDS=0 1", "LAYERS=1", "LAUNCH=nice -n 5"), capture_output=True, check=True).stdout
    cells = [line for line in out.splitlines() if "sae_training" in line]
    assert len(cells) == 4 and all(line.startswith("nice -n 5 ") for line in cells)
    for k, seed in itertools.product((3, 5), (0, 1)):
        assert sum(f"-f {folder}/p.yaml -p layer 1 -p k {k} -p seed {seed} -p run_dir {folder}/runs/s-layer1-k{k}-seed{seed} " in line for line in cells) == 1
    assert sum(" activations '1' " in line for line in out.splitlines()) == 1 and not (folder / "runs").exists()
    refused = subprocess.run(**asked(folder, "k=3,x"), capture_output=True)
    assert refused.returncode == 2 and "Error: parameter k must be a whole number" in refused.stderr and not (folder / "runs").exists()


def figures(**changes) -> dict:
    """A run's metrics.json, as far as it is read here."""
    arm = {name: [0.25, 0.2, 0.3] for name in ("fvu", "l0", "ce_increase")}
    metrics = {"fvu": 0.25, "l0": 3.14, "ce_spliced": 2.5, "ce_clean": 2.25, "ce_zero": 9.0, "dead": 0.125, "kl": 0.1, "ce_recovered": 0.9, "doctor": [], "rows": 9, "d_in": 4, "d_sae": 8}
    return metrics | {"fidelity": dict.fromkeys(("sae", "kmeans", "pca", "untrained"), arm)} | changes


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"fvu": 1.0}', json.dumps(figures(fvu="low"))])
def test_a_table_of_runs_whose_files_do_not_tell(tmp_path, capsys, content):
    names = ("odd", "good", "none", "broken", "torn", "jupyter", "again")
    for name in names:
        if name != "none":
            experiment.record_params(tmp_path / name / "params.json", experiment.check_params("sae_training", {}))
            (tmp_path / name / "sae_training.ipynb").write_text('{"metadata": {"papermill": {"duration": 90}}}')
    (tmp_path / "jupyter" / "sae_training.ipynb").unlink()
    for name, text in (("odd", content), ("good", json.dumps(figures())), ("jupyter", json.dumps(figures()))):
        (tmp_path / name / "metrics.json").write_text(text)
        (tmp_path / name / ".done").write_text("finished\n")
    error = {"output_type": "error", "ename": "ValueError", "evalue": "too few"}
    for name in ("broken", "again"):
        (tmp_path / name / "sae_training.failed.ipynb").write_text(json.dumps({"cells": [{"outputs": [{"output_type": "stream"}, error]}, {}]}))
    (tmp_path / "again" / "sae_training.running.ipynb").touch()  # at work once more, or killed at it
    (tmp_path / "torn" / "sae_training.failed.ipynb").write_text(content)
    (tmp_path / "plan.mk").write_text("CELLS := " + " ".join(f"{tmp_path}/{name}/.done" for name in names) + "\nROWS :=\n")
    sweep.table(str(tmp_path / "plan.mk"))
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines[:7]] == list(names) and lines[7].startswith("3 of 7 cells are finished; ")
    assert "metrics.json" in lines[0] and lines[1].split()[1:] == ["0.2500", "3.1", "+0.2500", "12.5%", "1.5"]
    assert "not begun" in lines[2] and lines[3].endswith("ValueError: too few") and "see sae_training.failed.ipynb" in lines[4]
    assert lines[5].split()[1:] == ["0.2500", "3.1", "+0.2500", "12.5%", "-"] and "not finished, or still at work" in lines[6]


@pytest.mark.repeats
def test_a_sweep_that_is_killed_and_in_which_a_cell_fails(folder):
    """Of eval_windows training knows nothing: a cell that was killed half-way and one that was not must end the same."""
    runs, grid = folder / "runs", "k=3,5 eval_windows=8,9"
    k3, undisturbed, *_ = cells = [runs / f"s-k{k}-evalwindows{n}" for k in (3, 5) for n in (8, 9)]
    undisturbed.mkdir(parents=True)
    with filelock.FileLock(undisturbed / ".lock"):  # another process is at work there: that cell fails
        make = subprocess.Popen(**asked(folder, grid), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while not (k3 / "checkpoint.pth").exists():
            assert make.poll() is None, make.stdout.read()
            time.sleep(0.02)
        time.sleep(random.random() / 2)
        family = [*psutil.Process(make.pid).children(recursive=True), psutil.Process(make.pid)]
        for process in family:
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(family)
        assert names_of(make.communicate()[0].splitlines()) >= {"s-rows", k3.name} and not (k3 / ".done").exists()

        second = subprocess.run(**asked(folder, grid, "-j2", "-k"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines = second.stdout.splitlines()
    assert second.returncode == 2 and [cell.name for cell in cells if (cell / ".done").exists()] == [cell.name for cell in cells if cell != undisturbed], second.stdout
    assert any(line.startswith(f"{undisturbed.name}: Error: ") and "worked on by another process" in line for line in lines)
    assert any(line.startswith(f"{k3.name}: going on from step") for line in lines)
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("run  ")) :]
    assert [line.split()[0] for line in table[1:5]] == [cell.name for cell in cells] and "not finished" in table[2]
    for cell, line in zip(cells, table[1:5], strict=True):
        if cell != undisturbed:
            metrics = json.loads((cell / "metrics.json").read_text())
            fvu, l0, rise, dead, minutes = line.split()[1:]
            assert (float(fvu), float(l0), float(rise)) == pytest.approx((metrics["fvu"], metrics["l0"], metrics["ce_spliced"] - metrics["ce_clean"]), abs=0.05)
            assert float(dead.rstrip("%")) == pytest.approx(100 * metrics["dead"], abs=0.06) and float(minutes) > 0
    assert table[5] == "3 of 4 cells are finished; asked again, only the others run."
    headings = lines.index(table[0])
    for line in lines[:headings]:  # every line has a name, but make's own
        assert re.match(r"s-[\w.-]+: |make(\[\d+\])?: |.*: \d of 4 cells|$", line), line
        assert not re.search(r"<Figure|<IPython|VBox\(|object at 0x", line), line

    third = subprocess.run(**asked(folder, grid, "-j2", "-k"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert third.returncode == 0 and "4 of 4 cells are finished." in third.stdout
    assert names_of(third.stdout.splitlines()) == {"s-rows", undisturbed.name}  # only what was missing
    assert len([path for path in (runs / "activations").iterdir() if path.is_dir()]) == 1  # one harvest for all
    assert (k3 / "history.csv").read_bytes() == (undisturbed / "history.csv").read_bytes()
    one, other = (torch.load(cell / "sae.pth", weights_only=True)["state_dict"] for cell in (k3, undisturbed))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
