"""A small run on a real model, and what matters there: `make test-real MODEL=path LAYER=n`, some minutes on two cores.

Reads the model from MODEL and the text from DATASET, or else this repository's three READMEs; a model with a chat
template is asked through it as well.
"""

import json
import math
import os

import pytest
import torch
from conftest import ROOT

import checking
import editing
import experiment
import fidelity
import harvest
import patching
import sae_utils

QUESTIONS = ["Name ten animals that live in the sea.", "Tell a long story about a dog who finds a letter under a tree, and what is in it."]
OPENINGS = ["The history of the town begins with", "In the spring of that year the two brothers left the house of their father, and"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(model, tokenizer, hook, sae, rows, metrics) of a run of sae_training.ipynb on few rows."""
    name, layer, folder = os.environ["MODEL"], os.environ["LAYER"], tmp_path_factory.mktemp("real")
    text = os.environ.get("DATASET")
    if not text:
        text = folder / "text.jsonl"
        paragraphs = "\n\n".join((ROOT / where / "README.md").read_text(encoding="utf-8") for where in ("", "notebooks", "tests")).split("\n\n")
        text.write_text("".join(json.dumps({"text": "\n\n".join(paragraphs[i : i + 3])}) + "\n" for i in range(0, len(paragraphs), 3)), encoding="utf-8")
    flags = f"-p model_name {name} -p layer {layer} -p dataset_name {text} -p n_activations 12000 -p architecture batchtopk -p k 32 -p normalize scale"
    flags += f" -p auxk_weight 0.03 -p dead_after 5000 -p epochs 8 -p eval_windows 24 -p expansion 2 -p seq_len 64 -p run_dir {folder}/run"
    done = experiment.launch("sae_training", flags.split())
    sae = sae_utils.SAE.load(done / "sae.pth")
    model, tokenizer = sae_utils.load_model(sae.config["model_name"], "", "cpu", sae.config["dtype"])
    rows = harvest.get_rows(model, tokenizer, sae.config["hook_name"], sae.config, experiment.cache_folder(done))
    return model, tokenizer, sae.config["hook_name"], sae, rows, json.loads((done / "metrics.json").read_text())


@torch.inference_mode()
def test_rows_belong_to_their_tokens(run):
    """Three windows, one at a time, through the whole model."""
    model, _, hook, _, rows, _ = run
    caught = []
    handle = model.get_submodule(hook).register_forward_hook(lambda module, args, out: caught.append(sae_utils.first_output(out).clone()))
    for window in (0, len(rows.windows) // 2, int(rows.window[-1])):
        model(input_ids=torch.tensor([rows.windows[window]]), use_cache=False)
        here = rows.window == window
        x = caught[-1].reshape(-1, rows.activations.shape[1])
        assert rows.token_ids[here].tolist() == [rows.windows[window][p] for p in rows.position[here]] and len(x) > here.sum() > 0
        torch.testing.assert_close(rows.activations[here].float(), x[rows.position[here]].float(), rtol=0.02, atol=0.01 * x.abs().max().item())
        assert (rows.activations[here].float() - x[rows.position[here] - 1].float()).abs().max() > 0.1 * x.abs().max()  # not a token's neighbour's
    handle.remove()


@torch.inference_mode()
def test_cross_entropies_are_those_of_the_whole_model(run):
    """With layers shared and logits at some positions, against a plain pass for each window and each arm."""
    model, tokenizer, hook, sae, rows, _ = run
    windows = [rows.windows[w] for w in (0, 3, 7)]
    arms = fidelity.arms(hook, sae.mean, sae=lambda x: fidelity.through_sae(sae, x))
    sums = fidelity.text_sums(model, tokenizer, arms, windows)
    for a, change in enumerate([lambda x: x, lambda x: sae(x).to(x.dtype), torch.zeros_like, lambda x: sae.mean.to(x).expand_as(x)]):
        for w, window in enumerate(windows):
            text = torch.tensor([i > 0 and t not in sae_utils.special_ids(tokenizer) for i, t in enumerate(window)])[:, None]
            handle = model.get_submodule(hook).register_forward_hook(lambda module, args, out, text=text, change=change: torch.where(text, change(out), out))
            logprobs = model(input_ids=torch.tensor([window]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
            handle.remove()
            ce = -logprobs.gather(1, torch.tensor(window[1:])[:, None]).double().sum().item()
            assert sums[w, a, 0].item() == pytest.approx(ce, rel=1e-4), (list(arms)[a], w)


def test_the_figures_are_finite_and_in_order(run):
    *_, metrics = run
    assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))
    figures = metrics["fidelity"]
    rise, fvu = ({arm: figures[arm][name][0] for arm in ("sae", "untrained")} for name in ("ce_increase", "fvu"))
    kl = {arm: found["kl"][0] for arm, found in figures.items() if arm != "clean"}
    assert 0 < fvu["sae"] < fvu["untrained"] < 1.5 and rise["sae"] < rise["untrained"]
    # KL, since on text that the model knows badly an SAE that was fitted to it may well lower the cross-entropy
    assert 25 < metrics["l0"] < 40 and 0 < kl["sae"] < min(kl[arm] for arm in ("untrained", "mean", "zero"))
    assert metrics["ce_clean"] < 8  # the model knows this language


def test_the_check_has_nothing_to_say(run):
    """`make check`, whose lines hold the stop at the hook and the empty edit to the bit among others."""
    config = run[3].config
    checking.check({name: config[name] for name in experiment.declared_params("sae_training")})


@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "last"])
@pytest.mark.parametrize("chat", [False, True])
def test_scopes_reach_what_they_say(run, scope, chat):
    """With a KV cache and padding, and without a cache one prompt at a time: the same texts, and as many positions as there are."""
    model, tokenizer, hook, sae, _, _ = run
    if chat and not tokenizer.chat_template:
        pytest.skip("this model has no chat template")
    prompts, new = patching.encode_prompts(tokenizer, QUESTIONS if chat else OPENINGS, chat), 8
    special = set(sae_utils.special_ids(tokenizer))
    first = int(tokenizer.bos_token_id is None)  # left alone, as BOS is where there is one
    edit, texts, counts = editing.set_value(sae.density.topk(20).indices.tolist(), 3 * sae.max_act.max().item()), [], []
    with editing.intervene(model, hook, sae, tokenizer, edit, scope=scope) as wrapper:
        together = editing.generate(model, tokenizer, prompts, new)
        reached = wrapper.tracker.reached()
        for prompt in prompts:
            texts += editing.generate(model, tokenizer, [prompt], new, use_cache=False)
            counts += wrapper.tracker.reached()
    assert texts == together and counts == reached
    for prompt, text, count in zip(prompts, together, reached, strict=True):
        in_prompt, in_text = sum(t not in special for t in prompt[first:]), len(text) - 1 if len(text) == new else len(text)  # the last token written is never read
        assert count == {"all": in_prompt + in_text, "prompt": in_prompt, "generated": in_text, "last": 1}[scope]
    assert together != editing.generate(model, tokenizer, prompts, new)  # and it does something
