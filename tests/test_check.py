"""`make check` on a tiny model of every family, and on models that will not do."""

import json
import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import test_activations
import tokenizers
import torch
import transformers
from conftest import WORDS, gpt2, training_params, word_tokenizer
from test_families import FAMILIES, NORMS, hook_of, tiny

import budget
import checking
import experiment
import sae_utils as u

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }} <eos>{% endfor %}{% if add_generation_prompt %} a cat{% endif %}"
PASSES = ["after the hook", "shape", "stop at the hook", "empty patch", "scope all", "scope prompt", "scope generated", "scope last", "time and memory"]
ONE_STAGE = [{"stage": "activations", "seconds": 60.0, "bytes": 10**6}, {"stage": "training", "seconds": 120.0, "bytes": 10**7}]


@pytest.fixture
def lines(folder, capsys, monkeypatch):
    """A function that checks the model in `folder`, or another, and returns {name: (ok or TO DO or "", what is said)};
    `failed`: which checks should fail. Trials of times are left out."""
    monkeypatch.setattr(budget, "stages", lambda *a, **k: ONE_STAGE)

    def checked(*failed, **changes):
        params = training_params(folder, **changes)
        if failed:
            with pytest.raises(u.UserError, match=rf"to do, as the lines say: {', '.join(failed)}\.$"):
                checking.check(params)
        else:
            checking.check(params)
        out = capsys.readouterr().out
        print(out)
        found = {m[1]: (m[2].strip(), m[3]) for m in re.finditer(r"^ *(\S.*?)  (ok   |TO DO|     )  (.*)$", out, re.MULTILINE)}
        assert list(found) == list(checking.CHECKS) and [name for name, (status, _) in found.items() if status == "TO DO"] == list(failed)
        assert all(said.startswith("not tried, as it needs: ") for status, said in found.values() if not status)
        return found

    return checked


def save(model, tokenizer, folder):
    shutil.rmtree(folder / "model")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"])
def test_every_family_passes(family, lines, folder, tokenizer):
    seen = test_activations.FAMILIES["gemma3"]
    model = tiny(family) if family in FAMILIES else transformers.AutoModelForCausalLM.from_config(seen).eval().requires_grad_(False)
    save(model, tokenizer, folder)
    found = lines()
    assert all(status == "ok" for status, _ in found.values())
    norm = {"gemma3": "post_feedforward_layernorm"} | NORMS
    assert found["after the hook"][1].startswith(hook_of(model).rpartition(".mlp")[0] + f".{norm[family]} changes" if family in norm else "nothing changes")
    assert re.match("the same bits as the whole pass", found["stop at the hook"][1]) and "same to the bit" in found["empty patch"][1]
    width, layers = model.config.get_text_config().hidden_size, model.config.get_text_config().num_hidden_layers
    assert found["shape"][1].startswith(f"activations {width} wide, {layers} layers") and f"{8 * width} latents" in found["shape"][1]


def test_scopes_by_hand(lines, folder, tokenizer):
    """Of a prompt of three words behind BOS and four that are written, the last of which is never read."""
    (folder / "text.jsonl").write_text(json.dumps({"text": "the cat sees"}) + "\n" + json.dumps({"text": "a dog " * 40}) + "\n")
    found = lines()
    said = {where: found[f"scope {where}"][1] for where in ("all", "prompt", "generated", "last")}
    assert said["prompt"] == "3 of 7 tokens:  the| cat| sees" and said["last"] == "1 of 7 tokens:  sees"
    assert int(said["all"].split()[0]) == 3 + int(said["generated"].split()[0])
    assert "on 24 tokens of" in found["stop at the hook"][1]  # the shortest window, and the first two: 4, 4 and 16


def test_a_chat_goes_through_the_template(lines, folder, model, tokenizer):
    spoken = word_tokenizer()
    spoken.chat_template = TEMPLATE
    save(model, spoken, folder)
    (folder / "text.jsonl").write_text(json.dumps({"text": "the cat sees\nhas a dog"}) + "\n" + json.dumps({"text": "a dog\n" + "big " * 40}) + "\n")
    found = lines(chat=True)
    assert found["chat template"][1] == "a prompt ends in  <unk>| <eos>| a| cat, of which ' a', ' cat' counts as text"
    assert found["scope last"][1].endswith(" cat") and "the| cat| sees| has| a| dog| a| cat" in found["scope prompt"][1]
    spoken.chat_template = "{{ bos_token }} " + TEMPLATE
    spoken.save_pretrained(folder / "model")
    assert "begins with BOS '<bos>' twice" in lines("chat template", chat=True)["chat template"][1]
    spoken.chat_template = "{{ raise_exception('a system message comes first') }}"
    spoken.save_pretrained(folder / "model")
    refusal = "refuses a single question of the user's (a system message comes first)"
    assert refusal in lines()["chat template"][1] and refusal in lines("chat template", chat=True)["chat template"][1]


def test_a_tokenizer_that_lacks_things(lines, folder, model):
    """No BOS and no padding are told and will do; a chat without a template will not."""
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(["<eos>", "<unk>", *WORDS])}, unk_token="<unk>"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    save(model, transformers.PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<eos>"), folder)
    found = lines()
    assert "no BOS: the first token of each window is left out" in found["tokenizer"][1] and "no padding token" in found["tokenizer"][1]
    assert found["chat template"] == ("ok", "none: text is read as it is")
    reached, of = (int(word) for word in found["scope all"][1].split()[0:3:2])
    assert reached == of - 1  # the first takes BOS's part


def test_a_chat_without_a_template(lines):
    found = lines("chat template", chat=True)
    assert found["shape"][0] == found["time and memory"][0] == "ok" and "needs: chat template" in found["scope all"][1]
    assert "has no chat template: use an instruct model, or chat false" in found["chat template"][1]


def test_a_tokenizer_of_another_model(lines, folder, tokenizer):
    save(gpt2(), tokenizer, folder)
    tokenizer_file = folder / "model" / "tokenizer.json"
    state = json.loads(tokenizer_file.read_text())
    state["model"]["vocab"]["more"] = 24
    tokenizer_file.write_text(json.dumps(state))
    assert "ids go up to 24, and the model has 24" in lines("tokenizer")["tokenizer"][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook": "model.layers.{layer}.mlp.down"}, "matches no module.*near matches: model.layers.1.mlp.down_proj"),
        ({"layer": 3}, "layer 3 is outside .*valid layers are 0 to 2"),
        ({"seq_len": 129}, "more than the 128 positions"),
    ],
)
def test_a_hook_that_is_not_there(changes, message, lines):
    """What does not hang on it is tried all the same."""
    found = lines("hook", **changes)
    assert re.search(message, found["hook"][1])
    assert found["model"][0] == found["tokenizer"][0] == found["text"][0] == "ok" and all(found[name][0] == "" for name in PASSES)


def test_more_kept_than_there_are(lines):
    assert "k 129 is more than the 128 latents" in lines("shape", architecture="topk", k=129)["shape"][1]


def test_which_layer_has_to_be_said(folder, capsys):
    assert experiment.main(["check", "-p", "model_name", str(folder / "model")]) == 2
    assert "say which layer: make check MODEL=id-or-folder LAYER=n" in capsys.readouterr().err


def test_from_the_command_line(folder, capsys):
    """With real trials of the times."""
    flags = f"-p model_name {folder}/model -p layer 1 -p dataset_name {folder}/text.jsonl -p n_activations 2000 -p epochs 2 -p seq_len 32"
    assert experiment.main(["check", *flags.split()]) == 0
    out = capsys.readouterr().out
    assert out.count("  ok  ") == len(checking.CHECKS) and "cross-entropies: " in out and re.search(r"in all: .*\n.*\n\d+ seconds", out)
    assert experiment.main(["check", *flags.split(), "-p", "layer", "7"]) == 2
    captured = capsys.readouterr()
    assert captured.err.endswith("layer 7: to do, as the lines say: hook.\n") and "TO DO" in captured.out


def unsteady(module_name):
    """A loader of models in which that module's output is another each time."""
    load = u.load_model

    def loaded(*args):
        model, tokenizer = load(*args)
        model.get_submodule(module_name).register_forward_hook(lambda module, args, out: out + 0.1 * torch.randn_like(out))
        return model, tokenizer

    return loaded


def test_a_model_that_does_not_repeat_itself(lines, monkeypatch):
    monkeypatch.setattr(u, "load_model", unsteady("model.layers.0.mlp"))
    monkeypatch.setitem(checking.CHECKS, "scope all", ((), lambda *a: "not looked at"))
    for where in ("prompt", "generated", "last"):
        monkeypatch.setitem(checking.CHECKS, f"scope {where}", ((), lambda *a: "not looked at"))
    found = lines("stop at the hook", "empty patch")
    assert "does not repeat itself" in found["stop at the hook"][1] and "where nothing is edited" in found["empty patch"][1]


def test_a_model_that_changes_above_the_hook(lines, monkeypatch):
    monkeypatch.setattr(u, "load_model", unsteady("model.layers.2.mlp"))
    found = lines("empty patch")
    assert found["stop at the hook"][1].startswith("the same bits") and "where nothing is edited" in found["empty patch"][1]


@pytest.mark.parametrize("change", [lambda out: out + out.mean(0, keepdim=True), lambda out: out + out.roll(-1, 1)], ids=["other texts", "later tokens"])
def test_rows_on_which_something_else_has_a_say(change, lines, folder, monkeypatch):
    """Also where all windows are of one length, so that none is padded."""
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("the cat sees " * 5, "a dog has " * 5, "big red bird " * 5)))
    load = u.load_model

    def loaded(*args):
        model, tokenizer = load(*args)
        model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: change(out))
        return model, tokenizer

    monkeypatch.setattr(u, "load_model", loaded)
    assert "differ from those of each window alone" in lines("stop at the hook")["stop at the hook"][1]


def test_a_hook_whose_output_leads_nowhere(lines, folder, model, tokenizer):
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    saved.model.layers[1].post_feedforward_layernorm.weight.data.fill_(-1.0)  # Gemma's norms multiply by 1 + weight
    save(saved, tokenizer, folder)
    assert "an edit at model.layers.1.mlp.down_proj changes no logit" in lines("empty patch")["empty patch"][1]


def test_an_edit_that_lands_elsewhere(lines, monkeypatch):
    where = checking.editing.TokenTracker.where
    monkeypatch.setattr(checking.editing.TokenTracker, "where", lambda self, scope: where(self, "all" if scope == "prompt" else scope))
    assert "edits land at [1, 2" in lines("scope prompt")["scope prompt"][1]


def test_a_refusal_of_the_tracker_is_a_line(lines, monkeypatch):
    def refuse(*args):
        raise u.UserError("where the edit should go cannot be told.")

    monkeypatch.setattr(checking.editing.TokenTracker, "check_positions", refuse)
    lines("empty patch", "scope all", "scope prompt", "scope generated", "scope last")


def test_a_mistake_of_ours_is_no_line(lines, monkeypatch):
    monkeypatch.setattr(u, "run_to_hook", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lines()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_that_lacks_weights(sharded, lines, folder, model, tokenizer):
    """Random weights of the shape stand for them, so that everything else is known."""
    shutil.rmtree(folder / "model")
    model.save_pretrained(folder / "model", max_shard_size="5KB" if sharded else "1GB")
    tokenizer.save_pretrained(folder / "model")
    files = sorted((folder / "model").glob("*.safetensors"))
    assert (len(files) > 2) == sharded
    files[-1].unlink()
    found = lines("weights")
    assert f"lacks {files[-1].name}: copy the weights there" in found["weights"][1] and "made with random weights" in found["model"][1]


def test_a_checkpoint_of_another_architecture(lines, folder):
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, "layer_types": config["layer_types"] + ["full_attention"]}))
    assert "lacks" in lines("model")["model"][1]


def test_a_model_from_the_hub_before_its_weights_are_fetched(lines, folder, model, tokenizer, tmp_path, monkeypatch):
    """In a cache that holds the config and the tokenizer alone, as after the first lines; the hub says the rest."""
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "cache"
    snapshot = cache / "models--some--model" / "snapshots" / commit
    shutil.copytree(folder / "model", snapshot)
    (snapshot / "model.safetensors").unlink()
    (cache / "models--some--model" / "refs").mkdir()
    (cache / "models--some--model" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    sizes = {"README.md": 10**9, "model-00001-of-00002.safetensors": 10**6, "model-00002-of-00002.safetensors": 10**6, "pytorch_model.bin": 5 * 10**6, "consolidated.safetensors": 10**9}
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, **more: SimpleNamespace(siblings=files))
    found = lines(model_name="some/model")
    assert found["weights"][1].startswith("not here yet: 2.0 MB to fetch in 2 files") and "random weights" in found["model"][1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "2.0 MB would be fetched" in lines("weights", "time and memory", model_name="some/model")["weights"][1]
    files[:] = files[:1]
    assert "no model*.safetensors or pytorch_model*.bin" in lines("weights", "time and memory", model_name="some/model")["weights"][1]
    monkeypatch.undo()


def test_a_hub_that_cannot_be_reached(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = lines("access", model_name="some/model")
    assert "the Hugging Face hub cannot be reached" in found["access"][1] and found["text"][0] == "ok" and not any(found[name][0] for name in PASSES)


def test_a_gated_model(lines, monkeypatch):
    def gated(*args, **more):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", gated)
    assert "is gated: accept its licence on huggingface.co/some/model" in lines("access", model_name="some/model")["access"][1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "has an encoder and a decoder: a causal language model is needed"),
        ({"model_type": "vit"}, "has no head that writes text: a causal language model"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "trust_remote_code.*never run here"),
        ({}, "no config.json|could not be loaded"),
        ({"model_type": "of-tomorrow"}, "could not be loaded: .*of-tomorrow"),
    ],
)
def test_models_of_other_kinds(config, message, lines, folder):
    (folder / "model" / "config.json").write_text(json.dumps(config))
    assert re.search(message, lines("access")["access"][1])


def test_a_text_that_is_not_there(lines, folder, model):
    """Sentences built in stand for it; a tokenizer that knows none of their words takes each for one and the same."""
    one = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<bos>": 0, "other": 1}, unk_token="other"))
    one.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    save(model, transformers.PreTrainedTokenizerFast(tokenizer_object=one, bos_token="<bos>"), folder)
    found = lines("text", dataset_name="nowhere.jsonl")
    assert "no such file or folder" in found["text"][1] and "built-in sentences stand for it" in found["text"][1] and "of built-in sentences" in found["stop at the hook"][1]


tales = test_activations.hub  # a dataset me/tales in a hub's place


def test_a_text_on_the_hub_is_not_fetched_for_a_check(lines, tales, tmp_path):
    """However small it is, and though the run would fetch it."""
    _, calls, sizes = tales
    sizes["num_bytes"] = 10**6
    assert "of me/tales" in lines(dataset_name="me/tales", n_activations=3_000_000)["stop at the hook"][1]
    assert calls == [("me/tales", True)] and not (tmp_path / "cache" / "parquet").exists()


def test_an_sae_that_does_not_fit_is_told_before_it_is_made(lines, monkeypatch):
    monkeypatch.setattr(u, "SAE", lambda *args, **kwargs: pytest.fail("memory was asked for"))
    said = lines("shape", expansion=4096, batch_size=10**6)["shape"][1]
    assert re.search(r"[\d,]+ latents of 16 dimensions, 1,000,000 rows a step, take at least [\d.]+ GB of memory, and [\d.]+ GB are free on cpu: lower expansion or batch_size", said)


def test_what_does_not_fit(lines, monkeypatch):
    monkeypatch.setattr(budget, "free_memory", lambda device: 1000)
    found = lines("model")
    assert "and 0.0 MB of memory are free on cpu" in found["model"][1]
    monkeypatch.setattr(budget, "free_memory", lambda device: 10**6)
    assert "training needs 10.0 MB of memory beside the model, and 1.0 MB are free" in lines("time and memory")["time and memory"][1]
