"""Parameters: what the notebooks declare, what params/ holds, and one clear sentence for a mistake."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import datasets
import filelock
import huggingface_hub
import nbformat
import papermill
import pytest
import safetensors
import tokenizers
import torch
import transformers
import yaml
from conftest import ROOT, training_params

import experiment
import harvest
import patching
import sae_utils as u
import showing
import storing
import typed

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
PARAMS = sorted((ROOT / "params").glob("*.yaml"))


def notebook_of(path):
    return "patch_neurons" if path.stem.startswith(("patch-", "topic-")) else "sae_training"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_papermill_and_we_read_the_same_parameters(name):
    source = str(ROOT / "notebooks" / f"{name}.ipynb")
    theirs, ours = papermill.inspect_notebook(source), experiment.declared_params(name)
    assert list(theirs) == list(ours)
    assert all(theirs[n]["inferred_type_name"] == p.type and theirs[n]["help"] == p.help and p.help for n, p in ours.items())
    cell = next(c for c in json.loads(Path(source).read_text())["cells"] if "parameters" in c["metadata"].get("tags", []))
    assert len(ours) == sum(":" in line.split("#")[0] for line in cell["source"])  # every line was understood
    assert experiment.check_params(name, {}) == {n: p.default for n, p in ours.items()}  # the defaults are legal


@pytest.mark.parametrize("path", PARAMS + sorted((ROOT / "params" / "patches").glob("topic-*.yaml")), ids=lambda p: p.stem)
def test_params_files_fit_the_notebook(path):
    given, declared = yaml.safe_load(path.read_text()), experiment.declared_params(notebook_of(path))
    assert path.read_text().startswith("#"), "the first line says why the file exists"
    for name, value in given.items():
        assert type(value).__name__ == declared[name].type.partition("[")[0], name
    assert typed.parameters(["-f", str(path)]).keys() == given.keys()
    assert experiment.check_params(notebook_of(path), typed.parameters(["-f", str(path)])) == experiment.check_params(notebook_of(path), given)
    experiment.check_params(notebook_of(path), given)


PATCHES = sorted((ROOT / "params" / "patches").glob("*.yaml"))


@pytest.mark.parametrize("path", [path for path in PATCHES if not path.stem.startswith("topic-")], ids=lambda p: p.stem)
def test_files_of_edits_can_be_read(path):
    assert path.read_text().startswith("#") and all(edit["operation"] in patching.OPERATIONS for edit in patching.read_edits(path))


def test_reference_file_is_the_notebooks_defaults():
    given = yaml.safe_load((ROOT / "params" / "gemma-3-1b-it.yaml").read_text())
    declared = experiment.declared_params("sae_training")
    assert given == {name: declared[name].default for name in given} and len(given) >= 15


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"l1_coef": 1e-3}, "no parameter l1_coef. Did you mean l1_coeff"),
        ({"lr": "fast"}, "lr must be a number .above 0 to 10., not 'fast'"),
        ({"lr": -1.0}, "lr must be a number .above 0 to 10., not -1.0"),
        ({"lr": float("nan")}, "lr must be a number"),
        ({"epochs": 2.5}, "epochs must be a whole number .1 to 1_000_000., not 2.5"),
        ({"epochs": 0}, "epochs must be"),
        ({"epochs": True}, "epochs must be a whole number"),
        ({"epochs": None}, "epochs must be a whole number"),
        ({"lr_min_ratio": 1.5}, "lr_min_ratio must be a number .0 to 1., not 1.5"),
        ({"normalize": "none"}, "normalize must be text .unit . scale., not 'none'"),
        ({"architecture": "vanilla"}, "architecture must be text .relu . topk . batchtopk . matryoshka . jumprelu . gated."),
    ],
)
def test_wrong_parameters_are_named(given, message):
    with pytest.raises(u.UserError, match=message):
        experiment.check_params("sae_training", given)


def test_words_that_say_what_was_declared():
    checked = experiment.check_params("patch_neurons", {"keep_error": "false", "strength": "1e1", "latents": "17"})
    assert checked["keep_error"] is False and checked["strength"] == 10.0 and checked["latents"] == [17]
    assert isinstance(experiment.check_params("sae_training", {"lr": 1})["lr"], float)


def test_names_come_from_the_injected_cell_of_a_running_notebook():
    running = {"In": ["", "lr: float = 3e-3", "# Parameters\nlr = 1e-4\nepocs = 3\n"], "lr": 1e-4, "np": torch, "epocs": 3}
    with pytest.raises(u.UserError, match="epocs. Did you mean epochs"):
        experiment.check_params("sae_training", running)
    assert experiment.check_params("sae_training", {"In": ["", "x = 1"], "x": 1, "lr": 1e-4})["lr"] == 1e-4


def test_run_names():
    name = lambda **given: experiment.run_folder(experiment.check_params("sae_training", given))[0].name
    assert name() == "gemma-3-1b-it-L6" and name(layer=3, seed=1) == "gemma-3-1b-it-L3-seed1"
    assert name(l1_coeff=1e-4) == "gemma-3-1b-it-L6-l1coeff0.0001"
    many = {"lr": 1e-4, "epochs": 3, "n_activations": 5000, "batch_size": 64, "expansion": 2, "seq_len": 64}
    assert name(**many) == name(**many) != name(**many | {"lr": 2e-4}) and len(name(**many)) < 40


def test_a_name_with_other_parameters_is_refused(folder):
    params = training_params(folder)
    run_dir, claim, finished = experiment.start_run(params)
    assert experiment.start_run(params) == (run_dir, claim, None) and finished is None  # the same again: an unfinished run starts anew
    before = (run_dir / "params.json").read_text()
    with pytest.raises(u.UserError, match="lr was 0.003, now 0.001") as refusal:
        experiment.start_run(params | {"lr": 1e-3})
    assert "epochs" not in str(refusal.value) and (run_dir / "params.json").read_text() == before
    (run_dir / ".done").write_text("finished\n")
    with pytest.raises(u.UserError, match="lr was 0.003, now 0.001"):
        experiment.start_run(params | {"lr": 1e-3})


def test_a_finished_run_opens_again_and_no_file_of_it_is_touched(folder):
    params = training_params(folder)
    run_dir, claim, _ = experiment.start_run(params)
    (run_dir / "labels.csv").write_text("3,three\n")
    experiment.finish(run_dir, "sae_training")
    claim.release()
    state = lambda: {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in run_dir.iterdir()}
    before = state()
    scratch, claim, finished = experiment.start_run(params)
    assert finished == run_dir and claim is None and scratch != run_dir and {file.name for file in scratch.iterdir()} == {"params.json", "labels.csv"}
    (scratch / "sae.pth").touch()
    experiment.finish(scratch, "sae_training")
    assert state() == before


def test_params_say_how_the_code_differs_from_the_commit(tmp_path, monkeypatch):
    """In a checkout of its own, with a parameters cell that somebody edited and saved."""
    (tmp_path / "notebooks").mkdir()
    text = (ROOT / "notebooks" / "sae_training.ipynb").read_text()
    notebook, run = tmp_path / "notebooks" / "sae_training.ipynb", lambda *words: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True)
    notebook.write_text(text)
    (tmp_path / "sae_utils.py").write_text("1")
    monkeypatch.setattr(u, "ROOT", tmp_path)
    assert experiment.edited_defaults("sae_training") == [] and experiment.as_it_stands("sae_training")["changed_since_commit"] is None  # no checkout at all
    run("init", "-q"), run("add", "."), run("commit", "-q", "-m", "x")
    clean = experiment.as_it_stands("sae_training")
    assert experiment.edited_defaults("sae_training") == [] and clean["changed_since_commit"] == []
    assert text.count("epochs: int = 300") == 1
    notebook.write_text(text.replace("epochs: int = 300", "epochs: int = 7").replace("lr: float = 3e-3", "lr: float = 1e-3"))
    edited = experiment.as_it_stands("sae_training")
    assert edited["changed_since_commit"] == ["notebooks/sae_training.ipynb"] and edited["notebook_digest"] != clean["notebook_digest"]
    assert experiment.edited_defaults("sae_training") == ["defaults in sae_training.ipynb are not those of the commit: lr 0.001, not 0.003; epochs 7, not 300."]
    outputs = json.loads(text)
    outputs["cells"][2]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x"}]
    notebook.write_text(json.dumps(outputs))
    assert experiment.as_it_stands("sae_training")["notebook_digest"] == clean["notebook_digest"]  # outputs are no code


def test_cells_that_were_run_in_jupyter_are_kept(tmp_path, monkeypatch):
    import IPython

    experiment.keep_cells(tmp_path / "a.ipynb")
    assert not (tmp_path / "a.ipynb").exists()  # no notebook, nothing to keep
    monkeypatch.setattr(IPython, "get_ipython", lambda: types.SimpleNamespace(user_ns={"In": ["", "epochs = 3", " ", "train(changed=True)"]}))
    experiment.finish(tmp_path, "sae_training")
    kept = nbformat.read(tmp_path / "sae_training.ipynb", 4)
    nbformat.validate(kept)
    assert [(c.cell_type, c.source, c.get("execution_count")) for c in kept.cells[1:]] == [("code", "epochs = 3", 1), ("code", "train(changed=True)", 3)]
    monkeypatch.setenv(experiment.LAUNCHED, str(tmp_path / "b"))
    (tmp_path / "b").mkdir()
    experiment.finish(tmp_path / "b", "sae_training")  # the launcher puts the executed copy there itself
    assert [file.name for file in (tmp_path / "b").iterdir()] == [".made"]


def test_wrong_layer_and_hook(folder):
    where = str(folder / "model")
    with pytest.raises(u.UserError, match="layer 3 is outside .*valid layers are 0 to 2"):
        u.find_hook(where, 3)
    with pytest.raises(u.UserError, match="matches no module.*model.layers.1.mlp.down_proj"):
        u.find_hook(where, 1, "model.layers.{layer}.mlp.downproj")
    assert u.find_hook(where, 2, "model.layers.{layer}.mlp") == "model.layers.2.mlp"


@pytest.mark.parametrize(
    ("name", "message"),
    [("./nowhere", "there is no such file or folder"), ("runs/tiny-modle", "make tiny-model"), ("google/gemma-3-1b-it", "cannot be reached.*make demo")],
)
def test_models_that_cannot_be_had(name, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(u.UserError, match=message):
        u.find_hook(name, 1)


def test_a_gated_model_says_what_to_do():
    gated = OSError("You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/x/y.\n401 Client Error")
    with pytest.raises(u.UserError, match="accept its licence on huggingface.co/x/y, then set HF_TOKEN"), u.hub_errors("model", "x/y"):
        raise gated


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"text": ""}\n{"text": " "}\n', "is empty"),
        ('{"body": "x"}\n', "no column text; it has: body"),
        ("not json\n", "text.jsonl, line 1 is not JSON"),
        ('{"text": 5}\n', "column text does not hold text"),
    ],
)
def test_texts_that_hold_nothing(content, message, tmp_path):
    (tmp_path / "text.jsonl").write_text(content)
    with pytest.raises(u.UserError, match=message):
        harvest.open_text(experiment.check_params("sae_training", {"dataset_name": str(tmp_path / "text.jsonl")}))


def test_files_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(u.UserError, match="must be .jsonl, .txt, .parquet files, all of one kind; it holds .md"):
        harvest.open_text(experiment.check_params("sae_training", {"dataset_name": str(tmp_path / "a.md")}))
    (tmp_path / "b.txt").write_text("x")
    (tmp_path / "c.jsonl").write_text('{"text": "x"}')
    with pytest.raises(u.UserError, match="it holds .jsonl, .txt"):
        harvest.open_text(experiment.check_params("sae_training", {"dataset_name": str(tmp_path)}))


def test_a_window_longer_than_the_model_is_refused(folder):
    with pytest.raises(u.UserError, match="seq_len 129 is more than the 128 positions"):
        u.find_hook(str(folder / "model"), 1, seq_len=129)


def test_a_local_path_is_never_called_gated(tmp_path):
    (tmp_path / "exp401").mkdir()
    with pytest.raises(u.UserError, match="could not be loaded"):
        u.find_hook(str(tmp_path / "exp401"), 1)


def test_a_name_that_the_hub_does_not_know():
    class RepositoryNotFoundError(OSError):
        pass

    with pytest.raises(u.UserError, match="model x/y does not exist on the Hugging Face hub, or is private"), u.hub_errors("model", "x/y"):
        raise OSError("401 Client Error") from RepositoryNotFoundError()


@pytest.mark.parametrize("bug", [TypeError, AttributeError, NameError, KeyError, IndexError, AssertionError, ZeroDivisionError])
def test_mistakes_in_a_program_are_not_taken_for_a_model_that_cannot_be_had(bug):
    mistake = bug("ours")
    with pytest.raises(bug) as raised, u.hub_errors("model", "x/y"):
        raise mistake
    assert raised.value is mistake


def test_what_the_libraries_raise_is_one_sentence_that_keeps_its_cause(tmp_path):
    library = [huggingface_hub.errors.EntryNotFoundError, datasets.exceptions.DatasetsError, safetensors.SafetensorError, OSError, ConnectionError, ValueError, RuntimeError]
    for kind in library:
        cause = kind.__new__(kind)
        with pytest.raises(u.UserError, match="model x/y could not be loaded: ") as raised, u.hub_errors("model", "x/y"):
            raise cause
        assert raised.value.__cause__ is cause
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(u.UserError, match="model m could not be loaded: ") as raised, u.hub_errors("model", "m"):
        safetensors.safe_open(tmp_path / "model.safetensors", "pt")
    assert isinstance(raised.value.__cause__, safetensors.SafetensorError)


MODEL_FAULTS = {  # what is wrong with a model's folder, and what is said of it
    "unknown type": (lambda d: change_config(d, model_type="foo"), "model type `foo`"),
    "of another kind": (lambda d: (d / "config.json").write_text('{"model_type": "vit"}'), "ViTConfig"),
    "text for a number": (lambda d: change_config(d, hidden_size="big"), "hidden_size"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no file named model.safetensors"),
    "weights cut off": (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]), "deserializing header"),
    "weights of another kind": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), ""),
    "tokenizer in part": (lambda d: (d / "tokenizer.json").write_text('{"added_tokens": []}'), ""),
}


def change_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_model_that_is_not_whole_is_told_in_one_sentence(fault, folder):
    spoil, message = MODEL_FAULTS[fault]
    spoil(folder / "model")
    with pytest.raises(u.UserError, match=f"model .* could not be loaded: .*{message}") as raised:
        u.find_hook(str(folder / "model"), 1)
        u.load_model(str(folder / "model"))
    assert raised.value.__cause__ is not None and len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["activations", "tiny-model", "."])
def test_names_kept_for_other_things(name):
    with pytest.raises(u.UserError, match="is kept for other things"):
        experiment.run_folder(experiment.check_params("sae_training", {"run_dir": f"runs/{name}"}))


def test_two_processes_do_not_work_on_one_run(folder, capsys):
    flags = ["-p", "model_name", f"{folder}/model", "-p", "dataset_name", f"{folder}/text.jsonl", "-p", "run_dir", f"{folder}/one"]
    (folder / "one").mkdir()
    with filelock.FileLock(folder / "one" / ".lock"):
        assert experiment.main(["sae_training", *flags]) == 2
    assert "is being worked on by another process" in capsys.readouterr().err


def test_patching_needs_a_finished_run(folder):
    with pytest.raises(u.UserError, match="there is no run"):
        experiment.finished_run(str(folder / "runs" / "none"))
    experiment.start_run(training_params(folder))
    with pytest.raises(u.UserError, match="is not finished"):
        experiment.finished_run(str(folder / "runs" / "one"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("-p l1_coef 1e-3", "Did you mean l1_coeff?"),
        ("-p lr fast", "parameter lr must be a number"),
        ("-f params/missing.yaml", "params/missing.yaml"),
        ("-x 3", "-x is not understood: parameters are given as -p NAME VALUE"),
    ],
)
def test_launching_with_a_mistake_ends_at_once_with_one_sentence(flags, sentence, folder, capsys):
    assert experiment.main(["sae_training", *flags.split(), "-p", "run_dir", str(folder / "new")]) == 2
    err = capsys.readouterr().err.strip()
    assert sentence in err and len(err.splitlines()) == 1 and not (folder / "new").exists()


def test_a_mistake_found_in_the_notebook_leaves_no_trace(folder, capsys):
    flags = f"-p model_name {folder}/model -p dataset_name {folder}/text.jsonl -p run_dir {folder}/new -p layer 9"
    assert experiment.main(["sae_training", *flags.split()]) == 2
    err = capsys.readouterr().err.strip()
    assert "valid layers are 0 to 2" in err and len(err.splitlines()) == 1 and not (folder / "new").exists()


def test_tokens_file_beside_the_notebooks_is_honoured(tmp_path, monkeypatch, capsys):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "secret_tokens.py").write_text('HF_TOKEN = "from-the-file"\n')
    monkeypatch.setattr(u, "ROOT", tmp_path)
    monkeypatch.setenv("HF_TOKEN", "from-outside")
    u.use_hf_token()
    assert u.os.environ["HF_TOKEN"] == "from-outside"
    monkeypatch.delenv("HF_TOKEN")
    u.use_hf_token()
    assert u.os.environ["HF_TOKEN"] == "from-the-file" and capsys.readouterr().out == ""
    monkeypatch.delenv("HF_TOKEN")


def test_files_appear_only_when_whole(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyError), u.atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    storing.write_json(tmp_path / "a.json", {"nan": float("nan"), 1: [float("inf"), "é"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"nan": None, "1": [None, "é"]}


def test_characters_spread_over_tokens_are_put_together():
    byte_level = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(["a"], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=300))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level)
    ids = u.encode_text(tokenizer, ["é 猫"])[0]
    assert len(ids) == 6 and showing.TokenText(tokenizer)(ids) == "é 猫"


def test_token_text_and_escapes(tokenizer):
    as_text = showing.TokenText(tokenizer)
    assert as_text(tokenizer("the red cat")["input_ids"]) == " the red cat" == "".join(map(as_text, tokenizer("the red cat")["input_ids"]))
    assert showing.plot_text("a$b$\n\t") == r"a\$b\$··"
    page = showing.shade(["<script>", '"&', "猫"], [0.0, 4.0, 1.0])
    assert "<script>" not in page and "&lt;script&gt;" in page and "&quot;&amp;" in page
    assert [float(alpha) for alpha in re.findall(r"255,140,0,([0-9.]+)\)", page)] == [0, 1, 0.25]


def test_a_run_that_another_process_works_on_is_refused(folder, monkeypatch):
    params = training_params(folder)
    code = f"import filelock, sys; lock = filelock.FileLock({str(Path(params['run_dir']) / '.claim')!r}); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    Path(params["run_dir"]).mkdir(parents=True)
    events = Path(params["run_dir"]) / "events.out.tfevents.1"
    events.touch()
    acquire = filelock.FileLock.acquire
    monkeypatch.setattr(filelock.FileLock, "acquire", lambda self, timeout: acquire(self, timeout=0.1))
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(u.UserError, match="being worked on in another notebook or process"):
            experiment.start_run(params)
        assert events.exists()
        other.stdin.close()
    experiment.start_run(params)
    assert not events.exists()


def test_activations_of_no_layer_are_refused(folder, capsys):
    flags = ["-p", "model_name", str(folder / "model"), "-p", "dataset_name", str(folder / "text.jsonl"), "-p", "run_dir", str(folder / "runs" / "x")]
    assert experiment.main(["activations", " ", *flags]) == 2 and "no layer is named" in capsys.readouterr().err
    assert experiment.main(["activations", "1 9", *flags, "-p", "n_activations", "1000", "-p", "seq_len", "16"]) == 2
    told = capsys.readouterr()
    assert "layer 9 is outside" in told.err and "model.layers.1.mlp.down_proj: " in told.out
