"""Runs side by side: what is read and what is refused, fronts and stability by hand, and the notebook on runs made up here."""

import base64
import csv
import json
import re
import subprocess

import filelock
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing import plugin_event_multiplexer
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import backend_context
from torch.utils.tensorboard import SummaryWriter

import comparing
import experiment
import listing
import report
import sae_utils as u
import storing

DIGESTS = {"model_fingerprint": "m1", "tokenizer_fingerprint": "t1", "dataset_fingerprint": "d1", "dtype": "float32", "split": "s1"}


def make_run(root, name, seed=0, k=4, architecture="batchtopk", fvu=0.25, l0=4.0, rise=0.5, directions=None, n_dead=5, doctor=(), key=None, **given):
    """A finished run of a small SAE; `directions` (48, 16) replaces its decoder; returns the folder."""
    folder, knob = root / name, {"l1_coeff": 1e-3} if architecture == "relu" else {"k": k}
    given = {"model_name": "org/model", "layer": 1, "dataset_name": "org/text.jsonl", "seed": seed, "architecture": architecture, "run_dir": str(folder)} | knob | given
    params = experiment.check_params("sae_training", given)
    sae = u.SAE(16, 48, seed=seed, architecture=architecture, k=params["k"])
    if directions is not None:
        sae.W_dec.data.copy_(directions)
    sae.density[n_dead:] = l0 / (48 - n_dead)
    sae.config = params | DIGESTS | {"hook_name": f"model.layers.{params['layer']}.mlp.down_proj"} | (key or {})
    sae.save(folder / "sae.pth")
    three = lambda value: [value, value - 0.125, value + 0.125]
    arm = lambda fvu, rise, l0: {"fvu": three(fvu), "ce_increase": three(rise), "l0": three(l0)}
    storing.write_json(folder / "params.json", {"parameters": params, "versions": {}, "hook_name": sae.config["hook_name"]})
    storing.write_json(folder / "metrics.json", {
        "fvu": fvu, "l0": l0, "dead": n_dead / 48, "ce_clean": 2.0, "ce_spliced": 2.0 + rise, "ce_recovered": 0.875, "kl": 0.25, "rows": 1500, "d_in": 16, "d_sae": 48,
        "doctor": list(doctor), "fidelity": {"sae": arm(fvu, rise, l0), "pca": arm(0.75, 1.5, round(l0)), "kmeans": arm(0.5, 1.0, 1.0), "untrained": arm(0.875, 2.0, l0)},
    })  # fmt: skip
    report.write_csv(folder / "history.csv", [{"epoch": e, "step": 9 * e, "held_out_fvu": fvu + 1 / e, "held_out_l0": l0 + 1 / e, "held_out_dead": 0.0} for e in (1, 2, 3)])
    (folder / ".done").write_text("finished\n")
    return folder


def only(runs):
    (run,) = runs
    return run


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def test_a_whole_run_is_read(tmp_path):
    make_run(tmp_path, "a", seed=3, doctor=["only few."])
    for other in ("activations/x", "compare", "tiny-world", "empty", ".a.removed"):
        (tmp_path / other).mkdir(parents=True)
    (tmp_path / ".a.removed" / "params.json").touch()
    run = only(listing.find_runs(tmp_path))
    assert (run.name, run.state, run.reason, run.remarks) == ("a", "finished", "", ["doctor: only few."])
    assert run.figures["ce_increase"] == 0.5 and run.figures["fvu"] == 0.25 and run.values["k"] == 4 and run.values["seed"] == 3 and len(run.history) == 3
    assert "l1_coeff" not in run.settings and "seed" not in run.settings and "dead_after" not in run.settings  # auxk_weight is 0
    assert run.key["hook_name"] == "model.layers.1.mlp.down_proj" and run.key["dataset_fingerprint"] == "d1"


def change_json(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def failed(folder, ename="UserError"):
    (folder / ".done").unlink()
    outputs = [nbformat.v4.new_output("error", ename=ename, evalue="k 99 is more\nthan there are.", traceback=[])]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=outputs)]), folder / "sae_training.failed.ipynb")


def other_sae(folder):
    sae = u.SAE.load(folder / "sae.pth")
    sae.density *= 1.25
    sae.save(folder / "sae.pth")


def no_digest(folder):
    sae = u.SAE.load(folder / "sae.pth")
    del sae.config["dataset_fingerprint"]
    sae.save(folder / "sae.pth")


def older_sae(folder):
    saved = torch.load(folder / "sae.pth", weights_only=True)
    torch.save(saved | {"format_version": 1}, folder / "sae.pth")


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:300])


BROKEN = {
    "cut metrics": (cut("metrics.json"), r"metrics.json is cut off, or not of this project"),
    "empty metrics": (lambda f: (f / "metrics.json").write_text(""), r"metrics.json is cut off, or not of this project"),
    "no metrics": (lambda f: (f / "metrics.json").unlink(), r"there is no .*metrics.json"),
    "binary metrics": (lambda f: (f / "metrics.json").write_bytes(b"\xff\xfe\x00"), r"metrics.json is cut off, or not of this project"),
    "a list": (lambda f: (f / "metrics.json").write_text("[1]"), r"metrics.json is cut off, or not of this project .it holds no object"),
    "foreign metrics": (lambda f: (f / "metrics.json").write_text('{"accuracy": 1}'), r"metrics.json is not of a training run: it has none of fvu"),
    "no number": (lambda f: change_json(f / "metrics.json", lambda m: m.update(fvu="low")), r"metrics.json has no number for fvu"),
    "null": (lambda f: change_json(f / "metrics.json", lambda m: m.update(fvu=None)), r"metrics.json has no number for fvu"),
    "odd arms": (lambda f: change_json(f / "metrics.json", lambda m: m["fidelity"].update(sae=5)), r"its files are not of this project .TypeError"),
    "older metrics": (lambda f: change_json(f / "metrics.json", lambda m: m["fidelity"].pop("kmeans")), r"metrics.json is of an older version: it lacks fvu of kmeans"),
    "oldest metrics": (lambda f: change_json(f / "metrics.json", lambda m: m.pop("fidelity")), r"metrics.json is of an older version: it lacks fvu of sae"),
    "metrics of another": (other_sae, r"metrics.json is of another SAE than sae.pth: l0 is 4 in one and 5 in the other"),
    "no SAE": (lambda f: (f / "sae.pth").unlink(), r"there is no SAE at .*sae.pth"),
    "cut SAE": (cut("sae.pth"), r"sae.pth is damaged"),
    "older SAE": (older_sae, r"sae.pth has format 1"),
    "SAE without digests": (no_digest, r"sae.pth is of an older version: it does not say dataset_fingerprint"),
    "cut params": (cut("params.json"), r"params.json is cut off, or not of this project"),
    "no params": (lambda f: (f / "params.json").unlink(), r"there is no .*params.json"),
    "foreign params": (lambda f: (f / "params.json").write_text('{"parameters": {"lr": 1}}'), r"params.json is not of a training run"),
    "renamed": (lambda f: change_json(f / "params.json", lambda p: p["parameters"].update(l1=1)), r"of another version: sae_training has no parameter l1"),
    "unfinished": (lambda f: (f / ".done").unlink(), r"not finished, or still at work"),
    "failed": (failed, r"UserError: k 99 is more than there are."),
    "stopped, unfinished": (lambda f: failed(f, "KeyboardInterrupt"), r"not finished, or still at work"),
    "at work again, unfinished": (lambda f: (failed(f), (f / "sae_training.running.ipynb").touch()), r"not finished, or still at work"),
    "failed before it began": (lambda f: (failed(f), (f / "params.json").unlink()), r"UserError: k 99 is more than there are."),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_every_broken_run_is_named_and_hides_no_other(tmp_path, how):
    spoil, message = BROKEN[how]
    make_run(tmp_path, "whole")
    spoil(make_run(tmp_path, "spoilt"))
    spoilt, whole = listing.find_runs(tmp_path)
    assert re.search(message, spoilt.reason) and not whole.reason, spoilt.reason
    assert spoilt.state == ("failed" if "failed" in how else "unfinished" if "unfinished" in how else "finished")
    line = next(line for line in listing.table_of_runs(tmp_path).splitlines() if line.startswith("spoilt"))
    assert spoilt.state in line or "broken" in line


def test_what_is_only_remarked(tmp_path):
    older, curveless = make_run(tmp_path, "older"), make_run(tmp_path, "x")
    change_json(older / "params.json", lambda p: p["parameters"].pop("trained_sae"))
    (curveless / "history.csv").write_text("epoch,step\n1,two\n")
    first, second = listing.find_runs(tmp_path)
    assert first.remarks == ["of an older version, without trained_sae: taken at the default"] and first.settings == second.settings
    assert second.remarks == ["history.csv is missing or cut off: no curves"] and not first.reason and not second.reason


def test_patterns_and_an_empty_folder(tmp_path):
    with pytest.raises(u.UserError, match="there is no run in .* yet: try `make demo`"):
        listing.find_runs(tmp_path)
    for name in ("a-1", "a-2", "b-1", "b-2"):
        make_run(tmp_path, name)
    assert [run.name for run in listing.find_runs(tmp_path, "a-* b-2", whole=False)] == ["a-1", "a-2", "b-2"]
    with pytest.raises(u.UserError, match="no run in .* is called 'c.'; there are: a-1, a-2, b-1, b-2"):
        listing.find_runs(tmp_path, "c*")


# ---------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------


OTHER_ROWS = [{name: "other"} for name in DIGESTS] + [{"hook_name": "h"}, {"seq_len": 64}, {"chat": True}, {"held_out_fraction": 0.2}, {"activation_dtype": "float32"}, {"text_column": "body"}]


@pytest.mark.parametrize("key", OTHER_ROWS, ids=lambda key: next(iter(key)))
def test_runs_on_other_rows_are_another_group(tmp_path, key):
    for name, more in (("a", {}), ("b", {"seed": 1, "k": 8, "lr": 1e-4}), ("c", {"key": key})):
        make_run(tmp_path, name, **more)
    groups = comparing.grouped(listing.find_runs(tmp_path), lambda run: run.key)
    assert [[run.name for run in group] for group in groups] == [["a", "b"], ["c"]]
    name, value = only(key.items())
    assert comparing.unlike(groups[0][0].key, groups[1][0].key) == [[name, str(groups[0][0].key[name]), str(value)]]
    first, second = comparing.titles(groups)
    assert first.startswith("model, model.layers.1.mlp.down_proj, text.jsonl, 1,500 rows") and first != second


def test_fewer_rows_of_the_same_text_are_another_group(tmp_path):
    make_run(tmp_path, "a")
    change_json(make_run(tmp_path, "b") / "metrics.json", lambda m: m.update(rows=1499))
    assert len(comparing.grouped(listing.find_runs(tmp_path), lambda run: run.key)) == 2


def test_the_front_by_hand_and_by_its_definition():
    points = [(1, 5), (2, 3), (3, 3), (2, 4), (4, 1), (5, 1), (2, 3), (6, 0.5)]
    assert comparing.pareto(points) == [0, 1, 6, 4, 7]
    assert comparing.pareto([(1, 1)]) == [0] and comparing.pareto([]) == []
    points = [tuple(point) for point in torch.randint(0, 12, (40, 2)).tolist()]
    front = set(comparing.pareto(points))
    for i, (x, y) in enumerate(points):
        better = [q for q in points if q[0] <= x and q[1] <= y and (q[0] < x or q[1] < y)]
        assert (i in front) == (not better)


def test_the_front_is_drawn_through_its_settings_with_bars_over_seeds(tmp_path):
    for name, k, seed, l0, fvu in (("a", 4, 0, 4.0, 0.5), ("b", 4, 1, 6.0, 0.375), ("c", 8, 0, 8.0, 0.25), ("d", 16, 0, 16.0, 0.375)):  # d is beaten by c
        make_run(tmp_path, name, k=k, seed=seed, l0=l0, fvu=fvu)
    ax = plt.figure().add_subplot()
    comparing.front(ax, listing.find_runs(tmp_path), "fvu")
    *yardsticks, points, line = [drawn for drawn in ax.get_lines() if drawn.get_marker() not in "_|"]  # these end the bars
    assert [mark.get_label() for mark in yardsticks] == ["principal components", "k-means", "random directions"]
    assert points.get_xydata().tolist() == [[5.0, 0.4375], [8.0, 0.25], [16.0, 0.375]] and line.get_xydata().tolist() == [[5.0, 0.4375], [8.0, 0.25]]
    (bars,) = ax.containers
    across, up = ([segment.tolist() for segment in bar.get_segments()] for bar in bars[2])
    assert across[0] == [[4.0, 0.4375], [6.0, 0.4375]] and up[0] == [[5.0, 0.375], [5.0, 0.5]] and across[1] == [[8.0, 0.25]] * 2
    assert [words.get_text() for words in ax.texts] == ["4", "8"]
    plt.close()


def test_seeds_are_joined_and_nothing_else(tmp_path):
    for seed, fvu, l0 in ((0, 0.25, 4.0), (1, 0.5, 6.0), (2, 0.375, 5.0)):
        make_run(tmp_path, f"k4-{seed}", seed=seed, fvu=fvu, l0=l0)
    make_run(tmp_path, "k8", k=8, fvu=0.125)
    make_run(tmp_path, "relu", architecture="relu", eval_windows=100)
    points = comparing.joined(listing.find_runs(tmp_path), "l0", "fvu")
    assert [(len(p["runs"]), p["runs"][0].settings["architecture"]) for p in points] == [(3, "batchtopk"), (1, "batchtopk"), (1, "relu")]
    assert points[0]["fvu"] == (0.375, 0.25, 0.5) and points[0]["l0"] == (5.0, 4.0, 6.0) and points[1]["fvu"] == (0.125, 0.125, 0.125)


def test_a_parameter_that_does_nothing_makes_no_difference(tmp_path):
    for name, more in (("a", {"l1_coeff": 1e-3}), ("b", {"l1_coeff": 1e-2, "l0_weight": 0.5, "dead_after": 7}), ("c", {"auxk_weight": 0.03, "dead_after": 7})):
        make_run(tmp_path, name, **more)
    a, b, c = listing.find_runs(tmp_path)
    assert a.settings == b.settings and {name for name, *_ in comparing.unlike(a.settings, c.settings)} == {"auxk_weight", "dead_after"}
    assert ["dead_after", "-", "7"] in comparing.unlike(a.settings, c.settings)


def test_order_of_the_table(tmp_path):
    for name, k, fvu in (("a", 4, 0.5), ("b", 16, 0.125), ("c", 8, 0.25)):
        make_run(tmp_path, name, k=k, fvu=fvu)
    make_run(tmp_path, "d", architecture="relu", fvu=0.375, doctor=["x"])
    runs = listing.find_runs(tmp_path)
    names = lambda sort: "".join(run.name for run in comparing.ranked(runs, sort))
    assert (names("fvu"), names("-fvu"), names("k"), names("-k")) == ("bcda", "adcb", "acbd", "bcad")
    with pytest.raises(u.UserError, match="nothing called 'loss' to sort by; there are: architecture, k, .*fvu"):
        comparing.ranked(runs, "loss")
    headings, *lines = comparing.cells(comparing.ranked(runs, "k"))
    assert headings == ["run", "architecture", "k", "L0", "fvu", "CE increase", "CE recovered", "KL", "dead"]
    assert lines[0] == ["a", "batchtopk", "4", "4.0", "0.5000", "+0.5000\n+0.3750 to +0.6250", "0.875", "0.25", "10.4%"] and lines[3][:3] == ["d*", "relu", "-"]


def test_cells_of_the_heatmap(tmp_path):
    for seed, k, layer, fvu in ((0, 4, 1, 0.25), (1, 4, 1, 0.75), (0, 8, 1, 0.125), (0, 8, 10, 1.0)):
        make_run(tmp_path, f"{seed}-{k}-{layer}", seed=seed, k=k, layer=layer, fvu=fvu)
    make_run(tmp_path, "relu", architecture="relu")
    runs = listing.find_runs(tmp_path)
    xs, ys, means, counts, mixed = comparing.heat(runs, "layer", "k", "fvu")
    assert xs == [1, 10] and ys == [4, 8] and mixed == ["seed"] and counts.tolist() == [[2, 0], [1, 1]]
    assert means[0, 0] == 0.5 and np.isnan(means[0, 1]) and means[1].tolist() == [0.125, 1.0]
    assert comparing.widest(runs) == ["layer", "k"] and comparing.widest(runs[:1]) == []
    with pytest.raises(u.UserError, match="no parameter epoch to lay runs out by; those that vary: layer, architecture, "):
        comparing.heat(runs, "epoch", "k", "fvu")
    with pytest.raises(u.UserError, match="no run has loss and both layer and k"):
        comparing.heat(runs, "layer", "k", "loss")


# ---------------------------------------------------------------------------------------------
# Stability
# ---------------------------------------------------------------------------------------------


def cosines(a, b):
    a, b = a.double(), b.double()
    return (a @ b.T) / (a.norm(dim=1)[:, None] * b.norm(dim=1)[None])


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_best_match_against_float64(chunk):
    a, b = torch.randn(37, 12) * torch.rand(37, 1), torch.randn(23, 12) * 5
    cosine, which = comparing.best_match(a, b, chunk)
    expected = cosines(a, b).max(1)
    assert torch.allclose(cosine.double(), expected.values, atol=1e-6) and torch.equal(which, expected.indices)


def test_stability_is_the_share_that_other_seeds_find_again(tmp_path):
    mine = torch.nn.functional.normalize(torch.randn(48, 16), dim=1)
    again = torch.nn.functional.normalize(torch.cat([mine[:30] + 0.1 * torch.randn(30, 16), torch.randn(18, 16)])[torch.randperm(48)], dim=1)
    third, other, far = (torch.nn.functional.normalize(torch.randn(48, 16), dim=1) for _ in range(3))
    other[10:14] = mine[10:14]
    make_run(tmp_path, "a", seed=0, directions=mine)
    make_run(tmp_path, "b", seed=1, directions=again)
    make_run(tmp_path, "c", seed=2, directions=third)
    make_run(tmp_path, "twin", seed=0, directions=mine, k=5)  # of the same seed: never compared
    make_run(tmp_path, "near", seed=1, directions=other, k=5, l0=4.25)
    make_run(tmp_path, "far", seed=1, directions=far, k=40, l0=40.0)
    make_run(tmp_path, "given", seed=1, directions=mine, trained_sae="x")
    group = listing.find_runs(tmp_path)
    of = {run.name: run for run in group}
    stable = comparing.stability(of["a"], group, above=0.9, most=1)
    live = lambda rows: rows[5:]  # the first five are dead
    best = torch.stack([cosines(live(mine), live(rows)).max(1).values for rows in (again, third)])
    assert stable["live"] == 43 and stable["seeds"] == 2 and stable["others"] == ["near"] and 0.1 < stable["same"] < 0.5
    assert stable["same"] == pytest.approx((best > 0.9).double().mean().item())
    assert stable["other"] == pytest.approx((cosines(live(mine), live(other)).max(1).values > 0.9).double().mean().item()) and stable["other"] >= 4 / 43
    assert torch.allclose(torch.from_numpy(stable["each"]).double(), best.mean(0), atol=1e-6)
    kept = np.load(of["a"].folder / "stability.npz")
    assert kept["runs"].tolist() == ["b", "c"] and np.isnan(kept["cosine"][:, :5]).all() and (kept["match"][:, :5] == -1).all() and np.isnan(kept["stability"][:5]).all()
    assert np.allclose(kept["cosine"][:, 5:], best.numpy(), atol=1e-6) and np.allclose(kept["stability"][5:], best.mean(0).numpy(), atol=1e-6)
    i, j = 20, int(kept["match"][0, 20])  # numbers are those of the whole dictionaries
    assert cosines(mine[i : i + 1], again[j : j + 1]).item() == pytest.approx(kept["cosine"][0, i], abs=1e-6)
    alone = comparing.stability(of["given"], group)
    assert alone["same"] is alone["other"] is None and len(alone["each"]) == 0 and not (of["given"].folder / "stability.npz").exists()


def test_the_random_baseline_is_not_what_an_sae_begins_with(tmp_path):
    make_run(tmp_path, "untrained", seed=1)
    group = listing.find_runs(tmp_path)
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal((48, 16)))
    rows = u.SAE.load(group[0].folder / "sae.pth").W_dec.detach()[5:]
    for above in (0.5, 0.9):
        assert comparing.stability(group[0], group, above)["random"] == pytest.approx((cosines(rows, noise).max(1).values > above).double().mean().item())
    assert comparing.stability(group[0], group)["random"] < 0.1


# ---------------------------------------------------------------------------------------------
# make runs, make remove
# ---------------------------------------------------------------------------------------------


def test_the_table_of_runs(tmp_path):
    make_run(tmp_path, "a", seed=3, rise=-0.25)
    make_run(tmp_path, "b", architecture="relu")
    make_run(tmp_path, "given", trained_sae="some/sae")
    cut("metrics.json")(make_run(tmp_path, "spoilt"))
    headings, a, b, given, spoilt, empty, why = listing.table_of_runs(tmp_path).splitlines()
    assert headings.split() == ["run", "state", "model", "layer", "recipe", "L0", "fvu", "CE", "+", "dead", "size", "age"] and empty == ""
    assert re.fullmatch(r"a +finished +model +1 +batchtopk k 4, seed 3 +4.0 +0.2500 +-0.2500 +10.4% +\d\.\d MB +0.0 h", a)
    assert "relu l1_coeff 0.001 " in b and "SAE from some/sae" in given and re.match(r"spoilt +broken +model +1 +batchtopk k 4", spoilt) and re.match(r"spoilt: .*metrics.json is cut off", why)


def test_a_run_is_thrown_away_only_when_asked_for(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path, "a")
    (folder / "patches" / "p").mkdir(parents=True)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(u.UserError, match="nobody can be asked .*: say YES=1"):
        listing.remove(tmp_path, "a")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, gone in (("", False), ("n", False), ("yes please", False), ("Y", True)):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert listing.remove(tmp_path, "a") is gone and folder.exists() is not gone
    assert "batchtopk k 4" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
    make_run(tmp_path, "a")
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail("asked"))
    assert listing.remove(tmp_path, "a", yes=True) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "activations", "tiny-model", "tiny-world", "compare", "notes", "nothing", "../elsewhere", "a/../a", "link", "odd"])
def test_nothing_else_is_thrown_away(tmp_path, name):
    root = tmp_path / "runs"
    kept = [make_run(root, run) for run in ("a", "activations", "tiny-model", "tiny-world", "compare")] + [make_run(tmp_path, "elsewhere")]
    (root / "notes").mkdir()
    (root / "odd").mkdir()
    (root / "odd" / "params.json").write_text('{"parameters": {"epochs": 3}}')
    (root / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(u.UserError, match="is no run in|is not touched"):
        listing.remove(root, name, yes=True)
    assert all((folder / ".done").exists() for folder in kept) and (root / "notes").exists() and (root / "odd" / "params.json").exists()


@pytest.mark.parametrize("lock", [".lock", ".claim"])
def test_a_run_that_is_at_work_is_left_alone(tmp_path, lock):
    folder = make_run(tmp_path, "a")
    with filelock.FileLock(folder / lock), pytest.raises(u.UserError, match="is being worked on"):
        listing.remove(tmp_path, "a", yes=True)
    assert (folder / "sae.pth").exists()


def test_the_words_of_make():
    plan = lambda *words: subprocess.run(["make", "-n", "-o", ".venv/.ready", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert plan("compare").stdout.strip().endswith("experiment.py compare_runs") and plan("runs").stdout.strip().endswith("experiment.py runs")
    assert 'remove "$RUN" yes' in plan("remove", "RUN=x", "YES=1").stdout and plan("remove", "RUN=x").stdout.strip().endswith('remove "$RUN"')
    assert "say which run" in plan("remove").stderr
    for word in experiment.KEPT:
        with pytest.raises(u.UserError, match="is kept for other things"):
            experiment.run_folder(experiment.check_params("sae_training", {"run_dir": f"runs/{word}"}))


# ---------------------------------------------------------------------------------------------
# TensorBoard, and the notebook
# ---------------------------------------------------------------------------------------------


def test_tensorboard_shows_what_varies_and_the_headline_figures_first(tmp_path):
    arm = {name: (0.5, 0.25, 0.75) for name in ("ce", "ce_increase", "kl", "top1_changed", "ce_recovered", "ce_recovered_mean", "fvu", "cosine", "norm_ratio", "l0")}
    metrics = {"fvu": 0.25, "l0": 7.0, "dead": 0.125, "ce_clean": 2.0, "ce_spliced": 2.5, "ce_recovered": 0.5, "kl": 0.5, "findings": ["x"], "fidelity": {"clean": arm, "sae": arm}}
    for seed, k, chat in ((0, 32, False), (1, 32, False), (0, 64, True)):  # 32, 0 and False are the defaults: no reason to leave them out
        params = experiment.check_params("sae_training", {"seed": seed, "k": k, "chat": chat, "device": "cpu", "run_dir": f"/runs/{seed}"})
        with SummaryWriter(str(tmp_path / f"{seed}-{k}")) as writer:
            for name in ("epoch/dead", "epoch/loss", "step/loss"):
                writer.add_scalar(name, 1.0, 1)
            report.add_to_tensorboard(writer, params, metrics, {})
    found = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    found.Reload()
    assert sorted(found.Runs()) == ["0-32", "0-64", "1-32"]
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(found, str(tmp_path))))
    asked = RequestContext()
    shown = context.experiment_from_metadata(asked, "", True, context.hparams_metadata(asked, ""), [])
    infos = {info.name: info for info in shown.hparam_infos}
    assert list(infos)[:3] == ["chat", "k", "seed"] and [name for name, info in infos.items() if info.differs] == ["chat", "k", "seed"]
    assert sorted(infos["chat"].domain_discrete) == ["false", "true"]
    assert (infos["k"].domain_interval.min_value, infos["k"].domain_interval.max_value) == (32, 64) and not {"run_dir", "device", "checkpoint_minutes"} & set(infos)
    assert [info.name.tag for info in shown.metric_infos][:5] == ["Final/ce_increase", "Final/ce_recovered", "Final/dead", "Final/fvu", "Final/l0"]
    events = EventAccumulator(str(tmp_path / "0-32")).Reload()
    assert events.Scalars("Final/ce_increase")[0].value == 0.5 and events.Scalars("Final/l0")[0].value == 7.0


def test_the_notebook_on_made_up_runs(tmp_path, capsys):
    hostile = "<script>alert(1)</script> $$"
    for seed in (0, 1):
        for k, fvu, l0 in ((4, 0.5, 4.0), (8, 0.25, 8.0)):
            make_run(tmp_path, f"k{k}-{seed}", seed=seed, k=k, fvu=fvu + seed / 16, l0=l0, rise=0.375 - fvu + seed / 16)  # the lowest fvu has not the lowest rise
        make_run(tmp_path, f"relu-{seed} $1", seed=seed, architecture="relu", fvu=0.75, l0=20.0, doctor=[hostile])
    make_run(tmp_path, "other-layer", layer=2)
    cut("metrics.json")(make_run(tmp_path, "spoilt"))
    assert experiment.main(["compare_runs", "-p", "runs_dir", str(tmp_path), "-p", "axes", "layer kk"]) == 2
    assert re.match("Error: kk cannot be shown: axes takes two of layer, architecture, .*; figure one of fvu, .*, ce_increase; two the names of two runs", capsys.readouterr().err) and not (tmp_path / "compare").exists()
    code = experiment.main(["compare_runs", "-p", "runs_dir", str(tmp_path), "-p", "sort", "l0"])
    assert code == 0, capsys.readouterr().err
    out = tmp_path / "compare"
    assert {file.name for file in out.iterdir()} - {".lock"} == {"compare.csv", "compare.html", "compare.pdf", "compare_runs.ipynb"}
    lines = list(csv.DictReader((out / "compare.csv").open(encoding="utf-8")))
    assert [line["run"] for line in lines] == ["k4-0", "k4-1", "k8-0", "k8-1", "relu-0 $1", "relu-1 $1", "other-layer"]
    assert [line["group"] for line in lines] == ["1"] * 6 + ["2"] and lines[2]["k"] == "8" and lines[4]["k"] == "" and float(lines[1]["fvu"]) == 0.5625
    page = (out / "compare.html").read_text()
    assert page.count("<script>") == 1 and "&lt;script&gt;alert(1)" in page and not re.search(r'(src|href)="(?!data:)', page) and "url(" not in page
    drawn = [base64.b64decode(data).decode() for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)]
    assert len(drawn) == 6 and all("<svg" in svg for svg in drawn)  # two fronts, a heatmap, two of curves, one of stability
    assert "Lowest fvu 0.2500 at an L0 of 8.0 (k8-0); lowest rise of cross-entropy -0.1250 nats at an L0 of 4.0 (k4-0)." in page
    assert re.search(r"k8-0\s*<br>\s*fvu 0.2500, L0 8.0.*?k4-0\s*<br>\s*ce_increase -0.1250, L0 4.0|k8-0\nfvu 0.2500, L0 8.0.*?k4-0\nce_increase -0.1250, L0 4.0", page, re.DOTALL), "the table of best runs"
    for text in ("spoilt", "metrics.json is cut off", "hook_name: model.layers.2.mlp.down_proj", "k4-0 and k8-0", "relu-0 $1*", "1 of 8 folders are not compared"):
        assert text in page, text
    data = (out / "compare.pdf").read_bytes()
    assert data[:5] == b"%PDF-" and len(re.findall(rb"/Type /Page\b", data)) >= 3
    assert sorted(path.parent.name for path in tmp_path.glob("*/stability.npz")) == ["k4-0", "k4-1", "k8-0", "k8-1", "relu-0 $1", "relu-1 $1"]
    assert experiment.compare_folder({"runs_dir": str(tmp_path)}) == (out, False)  # made anew, however often
    assert "there is no folder" in str(pytest.raises(u.UserError, experiment.compare_folder, {"runs_dir": str(tmp_path / "no")}).value)
    outputs = [o for cell in nbformat.read(out / "compare_runs.ipynb", 4).cells for o in cell.get("outputs", [])]
    assert not any("Warning" in o.get("text", "") for o in outputs if o.output_type == "stream")
