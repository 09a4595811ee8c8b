"""All notebooks in two minutes, on a world half the size: that they run, and that their figures are in order.

`make smoke` runs this file; `make test` runs the notebooks at full size instead.
"""

import json
import math

import pytest
from conftest import ROOT

import experiment


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """metrics.json and patching.json of a run that is small in every respect."""
    folder = tmp_path_factory.mktemp("smoke")
    experiment.launch("tiny_model", f"-p model_dir {folder}/model -p world_dir {folder}/world -p n_documents 6000 -p steps 700".split())
    flags = f"-f {ROOT}/params/tiny.yaml -p model_name {folder}/model -p dataset_name {folder}/world/corpus.jsonl -p n_activations 300000 -p run_dir {folder}/run"
    run = experiment.launch("sae_training", flags.split())
    patch = experiment.launch("patch_neurons", f"-f {ROOT}/params/patch-tiny.yaml -p run_dir {run} -p n_prompts 4 -p n_controls 4 -p exact_latents 20".split())
    return json.loads((run / "metrics.json").read_text()), json.loads((patch / "patching.json").read_text())


def test_the_figures_are_finite_and_in_order(results):
    metrics, _ = results
    assert 0 < metrics["kl"] < 0.1 and abs(metrics["ce_spliced"] - metrics["ce_clean"]) < 0.02 < 0.1 < metrics["ce_zero"] - metrics["ce_clean"] and 0 < metrics["fvu"] < 0.5 and 5 < metrics["l0"] < 9
    assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))


def test_the_edit_is_at_one_place_and_does_something(results):
    _, patching = results
    assert patching["positions_edited"] == [1] * 4 and patching["unedited_is_the_same_bits"]
    assert patching["change"] > 1
    assert {row["dose"]: row["surprise"] for row in patching["doses"]}[1] < 3
