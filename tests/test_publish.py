"""What `make publish` writes and pushes: the card against the run's own files, and a hub that only remembers."""

import errno
import json
import re
import subprocess

import huggingface_hub
import pytest
import torch
import yaml
from conftest import ROOT, gemma, sentences, word_tokenizer

import experiment
import formats
import publishing
import sae_utils as u
import storing


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small finished run, normalised by one scale."""
    folder = tmp_path_factory.mktemp("publish")
    gemma().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(200)))
    flags = f"-p model_name {folder}/model -p dataset_name {folder}/text.jsonl -p layer 1 -p n_activations 1500 -p seq_len 16 -p epochs 5 -p normalize scale"
    return experiment.launch("sae_training", [*flags.split(), "-p", "architecture", "topk", "-p", "k", "4", "-p", "run_dir", str(folder / "runs" / "one")])


@pytest.fixture
def hub(monkeypatch):
    """What a hub was asked to do; `files`: what lies in the repository before, None where there is none."""
    asked = {"files": None, "error": None}

    class Hub:
        def repo_exists(self, repo):
            if asked["error"]:
                raise asked["error"]
            return asked["files"] is not None

        def list_repo_files(self, repo):
            return asked["files"]

        def create_repo(self, repo, private, exist_ok):
            asked["created"] = (repo, private)

        def upload_folder(self, repo_id, folder_path, commit_message):
            asked["uploaded"] = (repo_id, sorted(file.name for file in folder_path.iterdir()))
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return asked


def changed(run, tmp_path, metrics=None, **params):
    """A copy of what the card is made of, with other parameters and figures."""
    record, figures = (storing.read_json(run / name) for name in ("params.json", "metrics.json"))
    record["parameters"] |= params
    (tmp_path / "params.json").write_text(json.dumps(record))
    (tmp_path / "metrics.json").write_text(json.dumps(figures | (metrics or {})))
    return tmp_path


def header_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_the_run_found(run):
    card, metrics = publishing.model_card(run, "user/name"), json.loads((run / "metrics.json").read_text())
    assert header_of(card)["library_name"] == "saelens" and {"sparse-autoencoder", "topk"} <= set(header_of(card)["tags"])
    assert metrics["finding"] in card and all(finding in card for finding in metrics["findings"]) and all(notice in card for notice in metrics["notices"])
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line.startswith(("| this SAE", "| k-means", "| |", "|  | CE", "| zero"))]
    heads = next(line for line in table if "FVU" in line)
    ours, zero = (next(line for line in table if line[0] == name) for name in ("this SAE", "zero"))
    for column, (figure, digits) in {"CE (nats)": ("ce", 3), "increase of CE": ("ce_increase", 3), "FVU": ("fvu", 3), "L0": ("l0", 1)}.items():
        said = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", ours[heads.index(column)])]
        assert said == pytest.approx(metrics["fidelity"]["sae"][figure], abs=0.6 * 10**-digits), column
    assert float(zero[1].split()[0]) == pytest.approx(metrics["ce_zero"], abs=1e-3) and zero[heads.index("FVU")] == ""
    assert f"{metrics['held_out_rows']:,} held-out rows" in card and f"{len(metrics['latents']['dead'])} of {metrics['d_sae']} latents never fired" in card
    assert "| `k` | 4 |" in card and "| `normalize` | scale |" in card and "A norm of the model follows the hook" in card
    assert 'SAE.load_from_disk(snapshot_download("user/name"))' in card and 'formats.load("user/name")' in card
    assert "`l1_coeff`" not in card and "`dead_after`" not in card and "`hook`" not in card  # which had no say
    assert not re.search(r"None|nan|\{\{|Undefined", card) and "\n\n\n" not in card and "|\n\nMade with" in card and card.count("\n\n## ") == card.count("\n## ") == 5


@pytest.mark.parametrize("format", ["saelens", "safetensors"])
def test_no_path_of_this_machine_is_published(format, run, hub):
    """A local model is neither a base model nor a data set of the hub; the exported files keep its folder's name."""
    assert experiment.main(["publish", str(run), "user/name", format]) == 0
    texts = [file.read_text() for file in (run / "export" / "publish").iterdir() if file.suffix in (".json", ".md")]
    assert len(texts) == 2 and not any(str(run.parent.parent) in text for text in texts) and '"model_name": "model"' in "".join(texts)
    exported = json.loads(next((run / "export" / format).glob("*.json")).read_text())
    assert publishing.without_places(exported) == json.loads(next((run / "export" / "publish").glob("*.json")).read_text()) != exported
    card = publishing.model_card(run, "user/name")
    assert str(run.parent.parent) not in card and "`model`" in card and "`text.jsonl`" in card and not {"base_model", "datasets"} & set(header_of(card))


def test_names_of_the_hub_are_linked(run, tmp_path):
    there = changed(run, tmp_path, model_name="google/gemma-3-270m", dataset_name="Salesforce/wikitext", dataset_config="wikitext-2-raw-v1")
    card = publishing.model_card(there, "user/name")
    assert header_of(card)["base_model"] == "google/gemma-3-270m" and header_of(card)["datasets"] == ["Salesforce/wikitext"]
    assert "[google/gemma-3-270m](https://huggingface.co/google/gemma-3-270m)" in card and "datasets/Salesforce/wikitext) wikitext-2-raw-v1 train" in card


def test_limits_follow_the_figures(run, tmp_path):
    metrics = json.loads((run / "metrics.json").read_text())
    figures = {arm: values for arm, values in metrics["fidelity"].items() if arm != "mean_post_norm"}
    for interval, said in (([0.1, -0.01, 0.2], True), ([0.1, 0.05, 0.2], False)):
        other = figures | {"sae": figures["sae"] | {"ce_increase": interval}}
        card = publishing.model_card(changed(run, tmp_path, {"fidelity": other, "notices": ["something to know"]}), "user/name")
        assert ("-0.0100 to +0.2000 nats, holds zero" in card) == said and "- something to know\n" in card and "A norm of the model" not in card


def test_a_run_without_figures_is_refused(run, tmp_path):
    there = changed(run, tmp_path)
    figures = json.loads((there / "metrics.json").read_text())
    del figures["fidelity"], figures["notices"]
    (there / "metrics.json").write_text(json.dumps(figures))
    with pytest.raises(u.UserError, match="metrics.json lacks fidelity, notices: train the run again"):
        publishing.model_card(there, "user/name")


def test_a_dry_run_writes_and_asks_nobody(run, hub, capsys):
    hub["error"] = ZeroDivisionError()
    for _ in range(2):
        assert experiment.main(["publish", str(run), "user/name", "saelens", "dry"]) == 0
    folder = run / "export" / "publish"
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"]
    assert (folder / "README.md").read_text() == publishing.model_card(run, "user/name") and "published" not in capsys.readouterr().out
    assert "uploaded" not in hub
    sae, x = u.SAE.load(run / "sae.pth"), 3 * torch.randn(50, 16)
    torch.testing.assert_close(formats.load(str(folder)).encode(x), sae.encode(x), rtol=1e-4, atol=1e-5)  # what lies there is that SAE


def test_a_card_that_was_edited_is_kept_and_what_is_not_ours_is_not_deleted(run, hub, capsys):
    folder, again = run / "export" / "publish", ["publish", str(run), "user/name", "saelens", "dry"]
    assert experiment.main(again) == 0
    with (folder / "README.md").open("a") as card:
        card.write("My own words.")
    assert experiment.main(again) == 0 and "is kept as you left it" in capsys.readouterr().out
    assert (folder / "README.md").read_text().endswith("My own words.")
    (folder / "notes.txt").write_text("mine")
    assert experiment.main(again) == 2 and "holds notes.txt, which this does not write" in capsys.readouterr().err
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    (folder / "README.md").unlink()
    assert experiment.main(again) == 0 and "My own words" not in (folder / "README.md").read_text()


def test_an_edited_card_outlives_a_full_disk_and_a_kill(run, hub, monkeypatch, capsys):
    folder, again = run / "export" / "publish", ["publish", str(run), "user/name", "saelens", "dry"]
    assert experiment.main(again) == 0
    with (folder / "README.md").open("a") as card:
        card.write("My own words.")
    edited, files = (folder / "README.md").read_text(), sorted(folder.iterdir())

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as there:
        there.setattr(publishing.shutil, "copytree", full)
        assert experiment.main(again) == 2 and "No space left on device" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == edited and sorted(folder.iterdir()) == files
    folder.rename(folder.with_name(".publish.old"))  # killed before the new one stood in its place
    assert experiment.main(again) == 0 and (folder / "README.md").read_text() == edited
    assert [file.name for file in (run / "export").glob(".publish*")] == []
    (folder / "README.md").unlink()  # the run is other tests' as well


@pytest.mark.parametrize("words", [[], ["public"]])
def test_what_is_pushed_is_what_lies_there(words, run, hub, capsys):
    assert experiment.main(["publish", str(run), "user/name", "saelens", *words]) == 0
    assert hub["created"] == ("user/name", not words) and hub["uploaded"] == ("user/name", sorted(file.name for file in (run / "export" / "publish").iterdir()))
    assert "published: https://huggingface.co/user/name" in capsys.readouterr().out


def test_other_formats(run, hub):
    assert experiment.main(["publish", str(run), "user/name", "safetensors", "dry"]) == 0
    card = (run / "export" / "publish" / "README.md").read_text()
    assert "sae_lens" not in card and "library_name" not in header_of(card) and (run / "export" / "publish" / "weights.safetensors").exists()


def test_a_repository_of_something_else_is_left_alone(run, hub, capsys):
    hub["files"] = [".gitattributes", "README.md", "model.safetensors"]
    assert experiment.main(["publish", str(run), "user/name"]) == 2
    assert "user/name holds model.safetensors, which is none of this" in capsys.readouterr().err and "created" not in hub
    hub["files"] = [".gitattributes", "README.md", "cfg.json"]  # an earlier one is written over
    assert experiment.main(["publish", str(run), "user/name"]) == 0 and hub["uploaded"]


def test_what_the_hub_refuses_is_one_sentence(run, hub, capsys):
    hub["error"] = OSError("401 Client Error.\nmore")
    assert experiment.main(["publish", str(run), "user/name"]) == 2
    assert "user/name cannot be written on the hub (401 Client Error.): set HF_TOKEN" in capsys.readouterr().err
    hub["error"] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is shown as one
        experiment.main(["publish", str(run), "user/name"])


@pytest.mark.parametrize("repo", ["name", "user/", "https://huggingface.co/user/name", "user/na me", "-p"])
def test_a_name_that_is_none(repo, run, hub, capsys):
    assert experiment.main(["publish", str(run), repo]) == 2
    assert "is no repository on the hub: say user/name" in capsys.readouterr().err and "created" not in hub


def test_a_run_that_is_not_there(capsys):
    assert experiment.main(["publish", "runs/nowhere", "user/name"]) == 2 and "there is no run runs/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [([], ["saelens"]), (["DRY_RUN=1"], ["saelens", "dry"]), (["PRIVATE=0", "FORMAT=safetensors"], ["$FORMAT", "public"]), (["DRY_RUN=0", "PRIVATE=1"], ["saelens"])],
)
def test_the_job_and_its_words(given, words):
    plan = ["make", "-n", "-o", ".venv/.ready", "publish", "RUN=x", "REPO=a/b", *given]
    line = subprocess.run(plan, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.sub(r"[\\\"\s]+", " ", line).split()[2:] == ["publish", "runs/$RUN", "$REPO", *words]
    assert subprocess.run(plan[:-1 - len(given)], cwd=ROOT, capture_output=True, check=False).returncode == 2  # without REPO
