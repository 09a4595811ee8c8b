"""The card of a run's stages: what follows from trials, for the sizes that are asked for."""

import math

import pytest
import torch
from conftest import HOOK

import budget
import sae_utils as u
import training

PARAMS = {
    "n_activations": 200_000, "seq_len": 101, "held_out_fraction": 0.1, "batch_size": 500, "l1_coeff": 0.0, "auxk_weight": 0.03, "l0_weight": 0.0,
    "epochs": 10, "activation_dtype": "bfloat16", "eval_windows": 400,
}  # fmt: skip
NAMES = ["activations", "training", "scores and baselines", "cross-entropies", "contexts", "effects", "pages, start and rest"]


@pytest.fixture
def planned(model, monkeypatch):
    """{stage: its line}, where every trial took 2 seconds, a training step 0.01 and the first ones 0.03."""
    monkeypatch.setattr(budget, "seconds", lambda work: 2.0)
    monkeypatch.setattr(training, "probe", lambda *a: (0.01, 0.03))
    sae = u.SAE(16, 128, architecture="batchtopk", k=4)
    return lambda stored=False, **changes: {stage["stage"]: stage for stage in budget.stages(model, HOOK, sae, PARAMS | changes, stored)}


def test_stages_by_hand(planned):
    found = planned()
    assert list(found) == NAMES
    batch = 2048 // 101 * 101  # tokens of the trial pass
    assert found["activations"]["seconds"] == pytest.approx(200_000 * 101 / 100 * 2 / batch)  # BOS is read too
    assert found["training"]["seconds"] == pytest.approx(10 * 360 * 0.01 + 200 * 0.02)
    assert found["activations"]["bytes"] == 200_000 * 16 * 2
    window = 101 * (2 / batch + 3.5 * 0.85 * (2 / 101 - 2 / batch))  # three arms and a half on average
    assert found["cross-entropies"]["at_most"] == pytest.approx(400 * window) and found["cross-entropies"]["seconds"] == pytest.approx(52 * window)
    assert found["cross-entropies"]["bytes"] == 3 * 4 * 24 * 101 * 32  # three batches of logits, of 32 windows each


def test_what_does_not_fit_is_told(monkeypatch):
    monkeypatch.setattr(budget, "free_memory", lambda device: 16 * 2 * 100 * 800 + 4 * 10 * 800)
    budget.refuse_what_does_not_fit(100, 800, 10, "cpu")
    with pytest.raises(u.UserError, match="801 latents of 100 dimensions, 10 rows a step, take at least 2.6 MB of memory, and 2.6 MB are free on cpu: lower expansion or batch_size"):
        budget.refuse_what_does_not_fit(100, 801, 10, "cpu")
    budget.refuse_what_does_not_fit(100, 3000, 0, "cpu")  # only looked at: the weights


def test_what_changes_with_what(planned):
    before = planned()
    assert planned(stored=True)["activations"]["seconds"] == 0
    assert planned(epochs=20)["training"]["seconds"] - before["training"]["seconds"] == pytest.approx(36)
    assert planned(activation_dtype="float32")["activations"]["bytes"] == 2 * before["activations"]["bytes"]
    assert planned(n_activations=400_000)["activations"]["seconds"] == pytest.approx(2 * before["activations"]["seconds"])
    assert planned(eval_windows=20)["cross-entropies"]["seconds"] == planned(eval_windows=20)["cross-entropies"]["at_most"]


def test_trials_are_real_ones(model):
    for architecture in u.ARCHITECTURES:
        sae = u.SAE(16, 32, architecture=architecture, k=4)
        before = {name: value.clone() for name, value in sae.state_dict().items() if name == "W_dec"}
        found = budget.stages(model, HOOK, sae, PARAMS | {"seq_len": 32, "batch_size": 8192}, False)
        assert [stage["stage"] for stage in found] == NAMES and torch.equal(before["W_dec"], sae.W_dec)
        assert all(math.isfinite(stage["seconds"]) and stage["seconds"] > 0 and stage["bytes"] > 0 for stage in found)


def test_a_line_for_each_stage(planned):
    lines = budget.card(list(planned().values()), 3).splitlines()
    assert [line.split(":")[0].strip() for line in lines[:-1]] == [*NAMES, "in all"] and "3 threads" in lines[-1]
    assert "at most" in lines[3] and "at most" not in lines[1]
    assert "stored" in budget.card(list(planned(stored=True).values()), 1).splitlines()[0]
