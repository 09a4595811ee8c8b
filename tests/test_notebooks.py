"""The notebooks, executed as `make demo` does, judged by the numbers in the files they write."""

import csv
import hashlib
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import editing
import experiment
import fidelity
import harvest
import known
import patching
import sae_utils as u

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny model and its world, built by their notebook."""
    folder = tmp_path_factory.mktemp("tiny")
    experiment.launch("tiny_model", ["-p", "model_dir", str(folder / "model"), "-p", "world_dir", str(folder / "world"), "-p", "threads", "1"])
    return folder


@pytest.fixture(scope="module")
def run(tiny):
    """An SAE trained on it with the demo's parameters."""
    flags = ["-f", str(ROOT / "params" / "tiny.yaml"), "-p", "model_name", str(tiny / "model"), "-p", "run_dir", str(tiny / "runs" / "demo")]
    return experiment.launch("sae_training", [*flags, "-p", "dataset_name", str(tiny / "world" / "corpus.jsonl")])


@pytest.fixture(scope="module")
def patch(run):
    return experiment.launch("patch_neurons", ["-f", str(ROOT / "params" / "patch-tiny.yaml"), "-p", "run_dir", str(run)])


def read(path):
    return json.loads(path.read_text())


def test_the_world_is_the_same_everywhere_and_rich_enough(tiny):
    text = (tiny / "world" / "corpus.jsonl").read_bytes()
    assert hashlib.sha256(text).hexdigest()[:16] == "944e745f5f5ed2d8"
    words = {word for line in text.decode().splitlines() for word in json.loads(line)["text"].split()}
    variables, codes = read(tiny / "world" / "variables.json"), np.load(tiny / "world" / "variables.npz")
    assert len(words) >= 200 and len(variables) >= 12 and sum(not v["visible"] for v in variables.values()) >= 6
    first = json.loads(text.splitlines()[0])["text"].split()
    assert codes["offsets"][1] == len(first) and all(len(codes[name]) == codes["offsets"][-1] for name in variables)
    for name, variable in variables.items():
        assert codes[name].max() == len(variable["values"]) - 1, name
    assert len(variables["form"]["values"]) - 1 >= 25


def test_hidden_variables_are_true_of_the_text(tiny):
    texts = [json.loads(line)["text"].split() for line in (tiny / "world" / "corpus.jsonl").open()][:300]
    variables, codes = read(tiny / "world" / "variables.json"), np.load(tiny / "world" / "variables.npz")
    checked = 0
    for name in (n for n in variables if n.startswith("next_")):
        for d, words in enumerate(texts):
            for i, code in enumerate(codes[name][codes["offsets"][d] : codes["offsets"][d + 1]]):
                value = variables[name]["values"][code]
                if value != "none":
                    assert words[i + 1] == value.split("_")[0], (name, d, i)
                    checked += 1
    assert checked > 1000


def test_the_tiny_model_has_learnt_its_world(tiny):
    world = read(tiny / "model" / "world_metrics.json")
    assert 0 < world["held_out_ce"] - world["entropy_rate"] < 0.1 and world["trigram_ce"] - world["held_out_ce"] > 0.3
    assert world["zero_ablation_cost"][1] >= 0.3
    config = read(tiny / "model" / "config.json")
    assert config["architectures"] == ["Gemma3ForCausalLM"] and set(config["layer_types"]) == {"sliding_attention", "full_attention"}
    _, tokenizer = u.load_model(str(tiny / "model"))
    text = json.loads((tiny / "world" / "corpus.jsonl").open().readline())["text"]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text and tokenizer.bos_token_id is not None


def test_training_reaches_its_numbers(run):
    metrics = read(run / "metrics.json")
    assert metrics["ce_recovered"] > 0.98 and metrics["fvu"] < 0.02 and 6 < metrics["l0"] < 8 and metrics["dead"] < 0.15
    assert metrics["ce_zero"] - metrics["ce_clean"] > 0.3, "where the layer hardly matters ce_recovered says nothing"
    assert metrics["ce_clean"] < metrics["ce_spliced"] < metrics["ce_zero"] and metrics["kl"] > 0
    assert metrics["rows"] == 900_000 == metrics["train_rows"] + metrics["watched_rows"] + metrics["held_out_rows"] and metrics["notices"] == []
    assert abs(metrics["fvu"] - metrics["train_fvu"]) < 0.02


def test_the_sae_is_better_than_what_knows_nothing(run):
    figures = read(run / "metrics.json")["fidelity"]
    for baseline in ("kmeans", "pca", "untrained"):
        for figure, better in (("ce_increase", -1), ("kl", -1), ("top1_changed", -1), ("fvu", -1), ("ce_recovered", 1), ("cosine", 1)):
            mine, theirs = figures["sae"][figure], figures[baseline][figure]
            assert better * (mine[0] - theirs[0]) > 0, (baseline, figure)
            assert figure == "top1_changed" or mine[1] > theirs[2] or mine[2] < theirs[1], (baseline, figure)  # intervals apart; of first choices few change
        assert abs(figures[baseline]["l0"][0] - (1 if baseline == "kmeans" else figures["sae"]["l0"][0])) < 0.6
    for arm in figures.values():
        for value, low, high in filter(None, arm.values()):
            assert low <= value <= high


def test_latents_match_variables_that_nothing_shows(run):
    metrics = read(run / "metrics.json")
    known = metrics["known"]
    assert known["hidden"] >= 88 and known["found"]["trained"] >= 25
    assert known["found"]["untrained"] < 8 and known["found"]["pca"] < 8 < known["found"]["kmeans"] < known["found"]["trained"] - 5
    table = list(csv.DictReader((run / "known.csv").open(encoding="utf-8")))
    for name, n in known["found"].items():
        assert sum(row["hidden"] == "True" and float(row[f"f1_{name}"]) >= 0.9 for row in table) == n
    assert any(row["variable"] == "token" and row["value"] == "blue" for row in table)
    assert any(row["members_f1"] > row["class_f1"] + 0.2 for row in known["splits"])  # one latent for each colour, none for colours
    assert str(known["found"]["trained"]) in metrics["findings"][-1]


def test_what_is_said_of_latents_holds(run):
    sae, metrics, found = u.SAE.load(run / "sae.pth"), read(run / "metrics.json"), np.load(run / "features.npz")
    assert metrics["latents"]["dead"] == (sae.density == 0).nonzero().flatten().tolist()
    assert metrics["latents"]["ultra_dense"] == (sae.density > 0.1).nonzero().flatten().tolist()
    for name in ("density", "max_act", "mean_act", "nearest", "histogram", "fired_tokens", "fired_classes", "promoted", "decile_rows"):
        assert len(found[name]) == 512, name
    live = sae.density.numpy() > 0
    assert (found["mean_act"][live] > 0).all() and (found["mean_act"] <= found["max_act"] + 1e-6).all()
    assert len(metrics["effects"]) == 20 and sum(effect["kl"] for effect in metrics["effects"].values()) > 0.1
    assert (run / "features.npz").stat().st_size < 2e6 and (run / "sae_training.ipynb").stat().st_size < 2e6


def test_a_run_leaves_every_file(run):
    names = {path.name for path in run.iterdir()}
    assert {"params.json", "sae_training.ipynb", "sae.pth", "metrics.json", "history.csv", "report.pdf", "features.npz", "features.html", "overview.png", ".done"} <= names
    assert not [name for name in names if name.endswith(".tmp") or "running" in name or "failed" in name]
    assert (run / "report.pdf").read_bytes()[:5] == b"%PDF-" and (run / "report.pdf").stat().st_size < 2e6
    recorded = read(run / "params.json")
    assert recorded["parameters"]["layer"] == 1 and recorded["versions"]["torch"].startswith("2.13.0")


def test_history_and_tensorboard_tell_the_same(run):
    history = list(csv.DictReader((run / "history.csv").open()))
    epochs = read(run / "params.json")["parameters"]["epochs"]
    assert [int(row["epoch"]) for row in history] == list(range(1, epochs + 1))
    assert float(history[-1]["loss"]) < float(history[0]["loss"]) and float(history[-1]["held_out_fvu"]) < float(history[0]["held_out_fvu"])
    assert all(float(row["l0"]) == pytest.approx(7, abs=0.01) for row in history[1:]) and 7.5 < float(history[0]["l0"]) < 14  # k falls from three times as many
    assert all(float(row["loss"]) >= float(row["mse"]) for row in history)  # no L1; AuxK once latents are silent
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    for name in ("loss", "mse", "l1", "l0", "dead", "density_median", "newly_dead", "lr"):
        points = events.Scalars(f"epoch/{name}")
        assert [p.value for p in points] == pytest.approx([float(row[name]) for row in history], rel=1e-5)
    texts = events.Tags()["tensors"]
    assert {f"{name}/text_summary" for name in ("settings", "fidelity", "findings")} <= set(texts)
    assert b"| architecture | batchtopk |" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def test_the_saved_sae_is_the_one_that_was_scored(run, tiny):
    sae, metrics, params = u.SAE.load(run / "sae.pth"), read(run / "metrics.json"), read(run / "params.json")["parameters"]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae), atol=1e-5, rtol=0)
    model, tokenizer = u.load_model(params["model_name"])
    rows = harvest.get_rows(model, tokenizer, sae.config["hook_name"], sae.config, run.parent / "activations")
    train, held_out = harvest.split_windows(rows.window_document, params["held_out_fraction"])
    _, judging, apart = fidelity.watch_and_judge(held_out, rows.window_document)
    index = judging[rows.window].nonzero().flatten()
    assert apart and 0 < metrics["watched_rows"] < 0.2 * len(index)
    torch.testing.assert_close(sae.mean.double(), rows.activations[train[rows.window]].double().mean(0), rtol=1e-4, atol=1e-5)
    x, x_hat = rows.activations[index].double(), sae(rows.activations[index]).double()
    fvu = ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert metrics["fvu"] == pytest.approx(fvu, rel=1e-4) and metrics["held_out_rows"] == len(index)
    assert metrics["l0"] == pytest.approx((sae.encode(rows.activations[index]) > 0).sum(1).float().mean().item(), rel=1e-5)


def test_contexts_are_where_latents_fire(run):
    sae, found = u.SAE.load(run / "sae.pth"), np.load(run / "features.npz")
    live = (sae.density > 0).numpy()
    assert (found["top_rows"][live, 0] >= 0).all() and (found["top_values"][live, 0] >= sae.max_act[live].numpy() - 1e-4).all()
    assert (np.diff(found["top_values"], axis=1) <= 0).all()
    np.testing.assert_allclose(found["acts"][live, 0, 8], found["top_values"][live, 0], rtol=2e-3)
    page = (run / "features.html").read_text()
    assert f"{live.sum():,} live latents" in page and len(page) < 15e6


def test_names_come_onto_the_page_of_a_finished_run(run, capsys):
    page, sae = run / "features.html", u.SAE.load(run / "sae.pth")
    before, live = page.read_bytes(), int(sae.density.argmax())
    (run / "labels.csv").write_text(f"{live},full <stops>\n")
    assert experiment.main(["labels", str(run)]) == 0 and "1 of" in capsys.readouterr().out
    text = page.read_text()
    assert f'"{live}": "full \\u003cstops>"' in text and "<stops>" not in text
    (run / "labels.csv").write_text("512,none\n")
    assert experiment.main(["labels", str(run)]) == 2 and "valid latents are 0 to 511" in capsys.readouterr().err
    (run / "labels.csv").unlink()
    assert experiment.main(["labels", str(run)]) == 0 and page.read_bytes() == before  # without names it is the page the notebook wrote


def test_the_patch_does_something_a_person_can_see(patch):
    result = read(patch / "patching.json")
    assert result["prompts"] == 10 and result["prompts_hit"] >= 8 and result["unedited_is_the_same_bits"]
    assert result["control_hits_median"] <= 3 and len(result["controls"]) == len(result["control_hits"]) == 20
    assert result["positions_edited"] == [1] * 10 == [row["positions"] for row in result["comparison"]] and "edited at 1 position of each" in result["finding"]
    for row in result["comparison"]:  # text, and not babble: no token over and over, and after the word it goes on much as before
        patched = [piece["text"] for piece in row["patched"]]
        assert len(set(patched)) > len(patched) / 3 and not any(a == b for a, b in zip(patched, patched[1:], strict=False)), patched
        assert patched.count(" red") <= 2 + sum(piece["text"] == " red" for piece in row["original"])
    assert sum(row["patched"][0]["text"].strip() == "red" for row in result["comparison"]) == result["target_is_first_choice"] >= 8
    surprise = {row["dose"]: row["surprise"] for row in result["doses"]}
    assert surprise[0] < 0.8 and surprise[1] < 2
    assert result["target_was_first_choice"] == 0 and result["stands_out"] and "It stands out" in result["finding"]
    edit = sum(r["after"] - r["before"] for r in result["comparison"]) / 10
    assert result["change"] == pytest.approx(edit) and edit > 6
    assert result["controls_as_good"] == 0 and result["control_interval"][1] < result["change_interval"][0] < edit < result["change_interval"][1]
    for row in result["comparison"]:
        texts = {arm: "".join(piece["text"] for piece in row[arm]) for arm in ("original", "reconstruction", "patched")}
        assert all(texts.values()) and not any(piece["differs"] for piece in row["original"])
        if texts["patched"] != texts["original"] and len(row["patched"]) == len(row["original"]):
            assert sum(piece["differs"] for piece in row["patched"]) == 1
            first = next(i for i, piece in enumerate(row["patched"]) if piece["differs"])
            assert [p["text"] for p in row["patched"][:first]] == [p["text"] for p in row["original"][:first]] and row["patched"][first]["text"] != row["original"][first]["text"]
        assert row["original"][0]["kl"] > max(piece["kl"] for piece in row["original"][1:])  # the edit was of one place
    ablated = sum(result["ablation_log_odds_change"]) / len(result["ablation_log_odds_change"])
    assert ablated < -0.5 and ablated < min(result["ablation_controls"])
    page = (patch / "patching.html").read_text()
    assert result["finding"].split(":")[0] in page and "http" not in page and (patch / ".done").exists()


def test_doses_go_from_no_edit_through_the_edit(patch):
    result = read(patch / "patching.json")
    by_dose = {row["dose"]: row for row in result["doses"]}
    assert by_dose[0]["measure"] == pytest.approx(sum(row["before"] for row in result["comparison"]) / 10) and by_dose[1]["measure"] == pytest.approx(sum(row["after"] for row in result["comparison"]) / 10)
    assert by_dose[0.25]["measure"] > by_dose[0]["measure"] and by_dose[1]["surprise"] > by_dose[0]["surprise"]
    assert len(result["control_doses"]) == 3 and len(result["control_changes"]) == 20
    for line, change in zip(result["control_doses"], result["control_changes"], strict=False):
        assert len(line) == len(by_dose) and line[0] == pytest.approx(by_dose[0]["measure"], abs=1e-3) and line[list(by_dose).index(1.0)] == pytest.approx(by_dose[0]["measure"] + change, abs=1e-3)


def test_by_default_a_word_is_found_and_brought(run):
    """Nothing is named: of words and latents that announce them, those that do something when they are set."""
    result = read(experiment.launch("patch_neurons", ["-p", "run_dir", str(run), "-p", "name", "found"]) / "patching.json")
    assert result["prompts"] == 10 and result["stands_out"] and result["target_is_first_choice"] >= 8 > result["target_was_first_choice"]
    assert result["target"].isalpha() and len(result["sources"]) == len(set(result["sources"])) >= 2 and not set(result["edited"]) & set(result["silenced"])
    assert all("make patch RUN=demo P=" in c["command"] for c in result["candidates"]) and len(result["candidates"]) >= 5


def test_a_topic_is_brought_into_what_the_model_writes(run):
    topic = {"topic_words": ["zoo"], "strength": 2.4, "n_latents": 2, "max_new_tokens": 24, "name": "zoo"}
    patched = experiment.launch("patch_neurons", ["-p", "run_dir", str(run), "-y", json.dumps(topic)])
    result, page = read(patched / "patching.json"), (patched / "patching.html").read_text()
    assert result["scope"] == "generated" and result["operation"] == "set_value" and all(n > 10 for n in result["positions_edited"]) and not result["silenced"]
    assert result["strength"] / 2.4 * 8 in range(1, 8) and result["edits"][0]["strength"] == result["strength"] and len(result["edited"]) <= 2
    texts = {arm: ["".join(piece["text"] for piece in row[arm]) for row in result["comparison"]] for arm in ("original", "patched")}
    assert result["topic_said"] == sum("zoo" in text for text in texts["patched"]) > result["topic_said_before"] == sum("zoo" in text for text in texts["original"])
    change = [row["after"] - row["before"] for row in result["comparison"]]
    assert result["change"] == pytest.approx(sum(change) / 10) and result["topic_moved"] == sum(c > 1e-3 for c in change) and result["p"] == pytest.approx((result["controls_as_good"] + 1) / 21)
    cost, (own, repeats) = {row["dose"]: row["surprise"] for row in result["doses"]}, result["repeats"]
    assert result["stands_out"] == (result["p"] <= 0.05 and cost[1.0] - cost[0.0] <= 1 and repeats - own <= 0.2) and "Words of the topic: <b>zoo" in page and result["attribution"] == []


def test_a_topics_edit_is_chosen_on_prompts_of_its_own(run):
    said = {"topic_words": ["zoo"], "strength": 2.4, "n_controls": 2, "max_new_tokens": 6, "prompts": ["one day"], "pilot_prompts": ["then the", "at night a"]}
    patched = experiment.launch("patch_neurons", ["-p", "run_dir", str(run), "-y", json.dumps(said | {"name": "pilot"})])
    outputs = [out.get("text", "") for cell in read(patched / "patch_neurons.ipynb")["cells"] for out in cell.get("outputs", [])]
    assert re.search(r"up in [0-2] of 2, ", "".join(map("".join, outputs))) and len(read(patched / "patching.json")["comparison"]) == 1
    assert experiment.main(["patch_neurons", "-p", "run_dir", str(run), "-y", json.dumps(said | {"name": "both", "prompts": ["then the"]})]) == 2


def test_the_model_says_its_word_by_the_latent_that_announces_it(patch):
    result = read(patch / "patching.json")
    assert len(result["attribution"]) == 10 and sum(place == 1 for place in result["announcing_latent_is_number"]) >= 6
    for found in result["attribution"]:
        assert len(found["latents"]) == len(found["exact"]) == len(found["gradient"]) <= 200 and min(found["exact"]) < 0


@pytest.fixture(scope="module")
def matches(run, tiny):
    """(sae, model, tokenizer, rows, index, facts, truth, best): latents and what they match, on held-out rows."""
    sae = u.SAE.load(run / "sae.pth")
    model, tokenizer = u.load_model(sae.config["model_name"])
    rows = harvest.get_rows(model, tokenizer, sae.config["hook_name"], sae.config, run.parent / "activations")
    _, held_out = harvest.split_windows(rows.window_document, 0.1)
    index = held_out[rows.window].nonzero().flatten()
    facts, truth = known.read(tiny / "world", rows, index)
    return sae, model, tokenizer, rows, index, facts, truth, known.best_f1(sae.encode(rows.activations[index]), truth)


def test_edits_do_what_they_mean(matches):
    """Ablating the latent of 'X comes next' takes X away where it fires and nothing elsewhere; setting it
    brings X in where another of its kind is due; a random latent of like density does neither."""
    sae, model, tokenizer, rows, index, facts, truth, best = matches
    acts, hook, generator = sae.encode(rows.activations[index]), sae.config["hook_name"], torch.Generator().manual_seed(0)
    kinds = ("next_colour", "next_place", "next_food", "next_mood", "next_capital")
    chosen = [i for i in best["f1"].argsort(descending=True).tolist() if facts[i]["variable"] in kinds and facts[i]["value"] != "any" and best["f1"][i] > 0.8][:12]
    assert len(chosen) == 12
    took, brought, control_took, control_brought = [], [], [], []
    for i in chosen:
        latent, token = int(best["column"][i]), tokenizer.convert_tokens_to_ids(facts[i]["value"])
        fires = acts[:, latent] > best["threshold"][i]
        prompts = lambda where: [rows.windows[rows.window[row]][: rows.position[row] + 1] for row in index[where.nonzero().flatten()[:8]].tolist()]
        due, elsewhere = prompts(truth[:, i] & fires), prompts(~truth[:, i] & (acts[:, latent] == 0))
        rivals = [f for f, fact in enumerate(facts) if fact["variable"] == facts[i]["variable"] and fact["value"] not in ("any", facts[i]["value"])]
        of_kind = prompts(truth[:, rivals].any(1) & ~truth[:, i])
        (other,) = patching.matched(sae, [latent], [], 1, int(torch.randint(10**6, (), generator=generator)))
        for ids, fell, rose in (([latent], took, brought), ([other[latent]], control_took, control_brought)):

            def change(prompts, patch):
                before = editing.next_logprobs(model, prompts)
                with editing.intervene(model, hook, sae, tokenizer, patch, scope="last"):
                    return (editing.next_logprobs(model, prompts) - before)[:, token].mean().item()

            fell.append(change(due, editing.ablate(ids)))
            rose.append(change(of_kind, editing.set_value(ids, 2 * sae.max_act[latent].item())))
            if ids == [latent]:
                assert change(elsewhere, editing.ablate(ids)) == 0.0  # it is silent there: nothing is touched
    median = lambda values: sorted(values)[len(values) // 2]
    assert median(took) < -0.1 and sum(t < -0.01 for t in took) >= 9 and median(brought) > 2 and sum(b > 1 for b in brought) >= 9
    assert abs(median(control_took)) < 0.05 and sum(b > c for b, c in zip(brought, control_brought, strict=True)) >= 10


def test_edits_from_a_file_and_prompts_of_ones_own(run, capsys):
    sae, folder = u.SAE.load(run / "sae.pth"), run.parent
    live = sae.density.argsort(descending=True)[100:103].tolist()
    dead = (sae.density == 0).nonzero().flatten().tolist()[:1]
    edits = [{"latents": live[:1] + dead, "operation": "add", "strength": 1.0, "scope": "generated"}, {"latents": live[1:], "operation": "clamp", "low": 0.0, "high": 0.1, "scope": [3]}]
    (folder / "edits.yaml").write_text(json.dumps({"edits": edits}))
    (folder / "prompts.txt").write_text("Tom is a happy boy from Peru . he has a blue ball .\nAnna is a sad girl from Japan .\n")
    flags = ["-p", "run_dir", str(run), "-p", "name", "own", "-p", "edits", str(folder / "edits.yaml"), "-p", "prompts_file", str(folder / "prompts.txt"), "-p", "n_controls", "2"]
    (run / "labels.csv").write_text(f"latent,name\n{live[0]},<b>my</b> name\n")
    patched = experiment.launch("patch_neurons", flags)
    result, page = read(patched / "patching.json"), (patched / "patching.html").read_text()
    assert result["edits"] == edits and result["prompts"] == 2 and result["comparison"][0]["prompt"].endswith("ball .")
    assert "&lt;b&gt;my&lt;/b&gt; name" in page and "<b>my</b>" not in page
    assert [str(dead[0]) in notice for notice in result["notices"]] == [True] * len(dead)
    assert result["positions_edited"] == [row["positions"] for row in result["comparison"]] and all(n >= 2 for n in result["positions_edited"])
    nothing = ["-p", "scope", "generated", "-p", "max_new_tokens", "1", "-p", "prompts_file", str(folder / "prompts.txt")]  # the only new token is never read
    assert experiment.main(["patch_neurons", "-p", "run_dir", str(run), "-p", "name", "bad", *nothing]) == 2
    assert "prompt 1 (…" in (said := capsys.readouterr().err) and "is edited at no position: scope generated reaches none" in said
    assert not (run / "patches" / "bad" / ".done").exists()


def test_nothing_is_written_over(run, patch, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    params = read(run / "params.json")["parameters"]
    flags = [f for name, value in params.items() for f in ("-y", json.dumps({name: value}))]
    assert experiment.main(["sae_training", *flags]) == 0 and "nothing to do" in capsys.readouterr().out
    assert experiment.main(["sae_training", *flags, "-p", "lr", "0.1"]) == 2 and "lr was 0.003, now 0.1" in capsys.readouterr().err
    patch_flags = ["-f", str(ROOT / "params" / "patch-tiny.yaml"), "-p", "run_dir", str(run)]
    assert experiment.main(["patch_neurons", *patch_flags]) == 0
    assert experiment.main(["patch_neurons", *patch_flags, "-p", "strength", "3"]) == 2 and "strength" in capsys.readouterr().err
    assert experiment.main(["patch_neurons", "-y", "{latents: [99999]}", "-p", "name", "new", "-p", "run_dir", str(run)]) == 2
    assert "valid latents are 0 to 511" in capsys.readouterr().err and not (run / "patches" / "new").exists()
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
