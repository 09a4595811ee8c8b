"""Runs from outside: make's jobs, committed notebooks, warnings, and runs that are killed."""

import csv
import json
import random
import re
import signal
import subprocess
import sys
import time

import nbformat
import papermill
import psutil
import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import experiment
import sae_utils as u
import storing

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_notebooks_are_stripped_and_executable(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.language_info.name == "python"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert not any(re.search(r"\b(interact|interactive|Output)\(", cell.source) for cell in code)  # Output widgets can hang a headless run


def test_make_knows_its_jobs():
    help_text = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for job in "setup lab demo activations check train features patch export publish labels sweep tensorboard test test-browser test-slurm smoke bench bench-peers test-interop clean".split():
        assert f"make {job}" in help_text
    plan = ["make", "-n", "-o", ".venv/.ready", f"PY={sys.executable}", "sweep", "LAYERS=1 2", "L1S=1e-4 3e-4", "SWEEP=try", "P=-p epochs 3"]
    lines = [line for line in subprocess.run(plan, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines() if "sae_training" in line]
    assert sum("-p run_dir runs/try-layer2-l1coeff0.0003" in line and "--words '-p epochs 3'" in line for line in lines) == 1 and len(lines) == 4


def test_warnings_do_not_stop_a_run_and_are_kept(folder, monkeypatch):
    secret = "hf_" + "x" * 30
    monkeypatch.setenv("HF_TOKEN", secret)
    flags = f"-p model_name {folder}/model -p dataset_name {folder}/text.jsonl -p run_dir {folder}/runs/small -p layer 1 -p epochs 30"
    flags += " -p early_stop_epochs 2 -p lr 1e-12"  # nothing is learnt, so nothing improves
    assert experiment.main(["sae_training", *flags.split(), "-p", "n_activations", "1000000", "-p", "seq_len", "16"]) == 0
    run = folder / "runs" / "small"
    metrics = read(run / "metrics.json")
    copies, fewer, few_held_out, weight, warm_up, stopped, dense, wide, few_documents = metrics["notices"]
    assert copies == "the text holds 200 documents, 199 of them different: equal ones stand on one side of every split, and count as one."
    assert re.fullmatch(r"the text measured is 1\d documents: .*", few_documents)
    assert "is not less than the 16 dimensions" in dense and metrics["l0"] >= 16
    assert re.fullmatch(r"stopped after epoch (\d+) of 30: .* for 2 epochs.", stopped) and metrics["epochs"] < 30
    assert f"only {metrics['held_out_rows']} rows are held out" in few_held_out
    assert f"holds {metrics['rows']:,} rows, fewer than the 1,000,000" in fewer
    for row in csv.DictReader((run / "history.csv").open()):
        assert float(row["loss"]) == pytest.approx(float(row["mse"]) + 3e-4 * float(row["l1"]), rel=1e-4)
    assert "far weaker than the reference's 0.35 (l1_coeff 0.022)" in weight and metrics["l1_weight"] == pytest.approx(3e-4 * 16)
    planned = metrics["steps"] // metrics["epochs"] * 30
    assert warm_up == f"the warm-up takes {planned // 20} of {planned} steps, a twentieth, in place of warmup_steps 500."
    assert re.fullmatch(rf"increase of CE .*: {metrics['ce_windows']} windows do not tell it well; .*", wide)
    outputs = [out for cell in nbformat.read(run / "sae_training.ipynb", 4).cells for out in cell.get("outputs", [])]
    assert sum(out.get("text", "").count("Notice: ") for out in outputs) == 9
    leaks = [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert not leaks


def test_an_sae_that_is_trained_already_is_looked_at_and_left_as_it_is(folder, capfd):
    text = f"-p dataset_name {folder}/text.jsonl -p n_activations 1500 -p seq_len 16 -p normalize scale"
    own = experiment.launch("sae_training", f"-p model_name {folder}/model -p layer 1 -p run_dir {folder}/runs/own -p epochs 3 -p architecture jumprelu -p k 6 {text}".split())
    exported = folder / "elsewhere"
    assert experiment.main(["export", str(own), "saelens", str(exported)]) == 0
    settings = read(exported / "cfg.json")["metadata"]["training_settings"]
    assert settings["epochs"] == 3 and settings["k"] == 6 and "l1_coeff" not in settings and "run_dir" not in settings
    for name, source in (("again", own / "sae.pth"), ("other", exported)):
        flags = f"-p run_dir {folder}/runs/{name} {text}".split()
        assert experiment.main(["features", str(source), *flags]) == 0, capfd.readouterr().err
        judged = folder / "runs" / name
        metrics, before = read(judged / "metrics.json"), read(own / "metrics.json")
        assert read(judged / "params.json")["parameters"]["layer"] == 1  # as the SAE says
        assert metrics["steps"] == metrics["epochs"] == 0 and metrics["doctor"] == []
        assert not {"history.csv", "checkpoint.pth"} & {path.name for path in judged.iterdir()} and (judged / ".done").exists()
        for figure in ("fvu", "l0", "dead", "ce_clean", "ce_spliced", "kl", "norm_ratio"):
            assert metrics[figure] == pytest.approx(before[figure], rel=1e-4, abs=1e-6), figure
        for arm in ("kmeans", "pca", "untrained"):
            assert metrics["fidelity"][arm]["fvu"][0] == pytest.approx(before["fidelity"][arm]["fvu"][0], rel=1e-4), arm
        config = u.SAE.load(judged / "sae.pth").config
        assert config["trained_sae"] and config.get("epochs") == (3 if name == "again" else None)  # as it was trained, where that is known
        assert experiment.main(["export", str(judged), "saelens"]) == 0
        metadata = read(judged / "export" / "saelens" / "cfg.json")["metadata"]
        assert not {"training_settings", "trained_on_rows"} & {*metadata} and metadata["training_architecture"] == "jumprelu"
        assert experiment.main(["publish", str(judged), "user/name", "saelens", "dry"]) == 2 and "was not trained in this run" in capfd.readouterr().err
        assert torch.allclose(u.SAE.load(judged / "sae.pth").density, u.SAE.load(own / "sae.pth").density)
        assert (judged / "features.html").exists() and "lr:" not in (judged / "sae_training.ipynb").read_text().partition("report.pdf")[2]
    before = storing.read_json(own / "params.json")
    (own / "params.json").write_text(json.dumps(before | {"parameters": {name: value for name, value in before["parameters"].items() if name != "trained_sae"}}))
    assert experiment.run_folder(before["parameters"]) == (own, True)  # a run from before there was such a parameter is still that run
    assert experiment.main(["export", str(own), "safetensors"]) == 0
    assert experiment.main(["features", str(exported), *flags, "-p", "layer", "2", "-p", "run_dir", f"{folder}/runs/wrong"]) == 2
    assert "is not in layer 2: set layer to its own" in capfd.readouterr().err and not (folder / "runs" / "wrong").exists()


def test_a_finished_run_is_judged_on_other_text_and_left_as_it_is(folder, capfd):
    other = folder / "other.jsonl"
    other.write_text("".join(json.dumps({"text": " ".join(reversed(json.loads(line)["text"].split()))}) + "\n" for line in (folder / "text.jsonl").open()))
    flags = f"-p model_name {folder}/model -p layer 1 -p n_activations 1500 -p seq_len 16 -p normalize scale".split()
    of_run = [*flags, "-p", "run_dir", f"{folder}/runs/own", "-p", "dataset_name", f"{folder}/text.jsonl", "-p", "architecture", "topk", "-p", "k", "6", "-p", "epochs", "3"]
    assert experiment.main(["sae_training", *of_run, "-p", "eval_dataset", str(other)]) == 2
    assert "runs/own is none: train it without eval_dataset" in capfd.readouterr().err and not (folder / "runs").exists()
    own = experiment.launch("sae_training", of_run)
    assert experiment.main(["features", str(own), *flags, "-p", "dataset_name", str(other), "-p", "run_dir", f"{folder}/runs/there"]) == 0
    before = {path: path.read_bytes() for path in own.iterdir()}
    assert experiment.main(["sae_training", *of_run, "-p", "eval_dataset", str(other)]) == 2
    assert f"make features SAE={u.show_path(own)} DATASET={other}" in capfd.readouterr().err
    assert experiment.main(["sae_training", *flags, "-p", "trained_sae", str(own), "-p", "eval_dataset", str(other)]) == 2
    assert "dataset_name is the text to judge on" in capfd.readouterr().err
    params = read(own / "params.json")["parameters"] | {"eval_dataset": str(other)}
    papermill.execute_notebook(str(ROOT / "notebooks" / "sae_training.ipynb"), str(folder / "again.ipynb"), params, kernel_name="python3", cwd=str(ROOT / "notebooks"), progress_bar=False)
    said = "".join(out.get("text", "") for cell in nbformat.read(folder / "again.ipynb", 4).cells for out in cell.get("outputs", []))
    expected, own_figures = read(folder / "runs" / "there" / "metrics.json"), read(own / "metrics.json")
    assert f"fvu: held out {expected['fvu']:.4f}" in said and f"{expected['fvu']:.4f}" != f"{own_figures['fvu']:.4f}" and f", on {other}, and nothing in that folder is touched" in said
    assert {path: path.read_bytes() for path in own.iterdir()} == before


def launch_and_kill(flags, checkpoint, wait):
    """Starts a training run as `make train` does and kills launcher and kernel `wait` seconds after a checkpoint is written."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    child = subprocess.Popen([sys.executable, str(ROOT / "notebooks" / "experiment.py"), "sae_training", *flags], stdout=subprocess.DEVNULL)
    while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
        assert child.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    time.sleep(wait)
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(family)
    child.wait()


@pytest.mark.repeats
def test_a_killed_training_run_goes_on_and_ends_the_same_to_the_bit(folder, fresh_seed):
    given = {"model_name": folder / "model", "dataset_name": folder / "text.jsonl", "layer": 1, "n_activations": 1500, "seq_len": 16}
    given |= {"architecture": "batchtopk", "k": 4, "auxk_weight": 0.03, "batch_size": 16, "epochs": 60, "checkpoint_minutes": 0.0, "eval_windows": 20}
    flags = [word for name, value in given.items() for word in ("-p", name, str(value))]
    whole, killed = (folder / "runs" / name for name in ("whole", "killed"))
    for _ in range(2):
        launch_and_kill([*flags, "-p", "run_dir", str(killed)], killed / "checkpoint.pth", random.Random(fresh_seed).random())
        assert not (killed / ".done").exists()
    for run_dir in (killed, whole):
        experiment.launch("sae_training", [*flags, "-p", "run_dir", str(run_dir)])
    assert "going on from step" in (killed / "sae_training.ipynb").read_text()
    assert not (killed / "checkpoint.pth").exists()
    for file in ("history.csv", "metrics.json", "features.html"):
        assert (whole / file).read_bytes() == (killed / file).read_bytes().replace(b"runs/killed", b"runs/whole"), file  # the page says its run's name
    one, other = (torch.load(run_dir / "sae.pth", weights_only=True) for run_dir in (whole, killed))
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    assert torch.equal(one["density"], other["density"]) and torch.equal(one["activation_mean"], other["activation_mean"])
    for tag in ("step/loss", "epoch/held_out_fvu"):  # no point stands twice, none is missing
        steps = []
        for run_dir in (whole, killed):
            events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
            events.Reload()
            steps.append([(point.step, point.value) for point in events.Scalars(tag)])
        assert steps[0] == steps[1], tag
