"""Tiny models of many families: the hook is found, rows are right, edits land, the norm after the hook is known by what it does."""

import json

import pytest
import test_activations
import torch
import transformers
from conftest import loaded_params, word_tokenizer

import editing
import features
import fidelity
import harvest
import patching
import sae_utils as u

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
GPT = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}
EXPERTS = {  # the names that families have for the same few numbers
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "moe_layer_start_index": 0, "n_shared_experts": 1, "num_dense_layers": 0, "decoder_sparse_step": 1,
}  # fmt: skip
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DENSE = {
    "bloom": {"hidden_size": 16, "n_layer": 3, "n_head": 2}, "falcon": {name: SHAPE[name] for name in SHAPE if name != "head_dim"},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 3, "max_seq_len": 64, "expansion_ratio": 2},
    "gpt_neo": {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "attention_types": [[["global", "local", "global"], 1]], "max_position_embeddings": 64},
    "gpt2": GPT, "gpt_bigcode": GPT, "gptj": GPT | {"rotary_dim": 4}, "codegen": GPT | {"rotary_dim": 4, "n_head": 4}, "opt": SHAPE | {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "xglm": {"d_model": 16, "ffn_dim": 32, "num_layers": 3, "attention_heads": 2, "max_position_embeddings": 64}, "gpt_neox_japanese": SHAPE | {"intermediate_multiple_size": 2},
} | dict.fromkeys((
    "gpt_neox", "starcoder2", "biogpt", "phi", "phi3", "llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "glm", "glm4", "cohere", "stablelm", "persimmon", "nemotron",
    "granite", "smollm3", "exaone4", "ernie4_5", "nanochat", "mistral", "olmo", "cohere2", "helium", "seed_oss", "arcee", "vaultgemma", "hunyuan_v1_dense", "bitnet", "apertus",
), SHAPE)  # fmt: skip
MIXTURES = dict.fromkeys((
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "gpt_oss", "phimoe", "jetmoe", "glm4_moe", "dots1", "ernie4_5_moe", "minimax", "solar_open", "granitemoe", "afmoe",
    "hunyuan_v1_moe", "minimax_m2", "exaone_moe", "llama4_text",
), SHAPE | EXPERTS | {"interleave_moe_layer_step": 1}) | dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), SHAPE | EXPERTS | LATENT | {"head_dim": 8, "num_key_value_heads": 2})  # fmt: skip
FAMILIES = DENSE | MIXTURES


def tiny(family: str, **changes):
    """A model of the family with 3 layers, 16 wide, whose random weights make every layer matter."""
    config = transformers.AutoConfig.for_model(family, vocab_size=24, pad_token_id=0, eos_token_id=1, bos_token_id=3, **FAMILIES[family] | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model.eval().requires_grad_(False)


def hook_of(model, layer: int = 1) -> str:
    return u.HOOKS.get(model.config.model_type, u.DEFAULT_HOOK).format(layer=layer)


def test_every_hook_of_the_table_is_tried():
    assert set(u.HOOKS) <= {*FAMILIES, "gemma3"}  # that one is tried in test_activations.py


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_whole_models(family, tmp_path, folder, tokenizer):
    """The hook is found from the config; rows harvested equal what the whole model's module returns, a window at a time."""
    model, captured = tiny(family), {}
    model.config.save_pretrained(tmp_path)
    hook = u.find_hook(str(tmp_path), 1)
    assert hook == hook_of(model)
    model.get_submodule(hook).register_forward_hook(lambda module, args, out: captured.update(out=u.first_output(out).clone()))
    rows = harvest.get_rows(model, tokenizer, hook, loaded_params(folder, model, tokenizer, n_activations=1000), folder / "activations")
    assert rows.activations.shape == (1000, 16) and rows.activations.std() > 1e-3
    for w in torch.randint(0, int(rows.window.max()), (8,)).tolist():
        model(input_ids=torch.tensor([rows.windows[w]]), use_cache=False)
        here = rows.window == w
        expected = captured["out"].view(-1, 16)[rows.position[here]]
        torch.testing.assert_close(rows.activations[here], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_land(family, tokenizer):
    """Nothing edited: the same logits bit for bit. An edit changes them, and lands alike with a KV cache and without."""
    model = tiny(family)
    hook, sae, prompts = hook_of(model), u.SAE(16, 40, seed=1).requires_grad_(False), [[3, 5, 6, 7, 8], [3, 9, 20]]
    ids, mask = u.pad(prompts, side="left")
    call = lambda: model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    before = call()
    with editing.intervene(model, hook, sae, tokenizer, lambda acts: acts.clone()):
        assert torch.equal(call().view(torch.int32), before.view(torch.int32))
    model.generation_config, endless = transformers.GenerationConfig(), type("", (), {"bos_token_id": None, "eos_token_id": 10**6})
    with editing.intervene(model, hook, sae, tokenizer, editing.set_value([3], 5.0), scope="last") as wrapper:
        assert not torch.equal(call(), before)
        texts = editing.generate(model, endless, prompts, 5)
        assert wrapper.tracker.reached() == [1, 1]
        assert texts == editing.generate(model, endless, prompts, 5, use_cache=False)


NORMS = {
    "gemma2": "post_feedforward_layernorm", "gemma3_text": "post_feedforward_layernorm", "olmo2": "post_feedforward_layernorm", "olmo3": "post_feedforward_layernorm",
    "exaone4": "post_feedforward_layernorm", "flex_olmo": "post_feedforward_layernorm", "glm4": "post_mlp_layernorm", "afmoe": "post_mlp_layernorm",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_norm_after_the_hook(family):
    model = tiny(family)
    for layer in (0, 2):
        hook = hook_of(model, layer)
        expected = f"model.layers.{layer}.{NORMS[family]}" if family in NORMS else ""
        assert fidelity.post_norm_name(model, hook) == expected
        if hook.endswith(".mlp.down_proj"):
            assert fidelity.post_norm_name(model, hook.removesuffix(".down_proj")) == expected  # the MLP as a whole
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_that_share_the_layers_below(family):
    """The same logits bit for bit without the layers below the hook, and with the head at some positions alone."""
    model, ids = tiny(family), torch.tensor([[3, 5, 6, 7, 8], [3, 9, 20, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.inference_mode():
        below = fidelity.Below(model, hook_of(model, 2))
        assert len(below.layers) == 2 and below.agrees(ids, mask) and below.layers
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        some = editing.logits_at(model, ids, mask, mask.bool())
    assert some.shape == (1, 8, whole.shape[2])
    torch.testing.assert_close(some[0], whole[mask.bool()], rtol=1e-5, atol=1e-5)


def test_keys_that_later_layers_take_from_earlier_ones():
    """Gemma 3n's last layers have no keys and values of their own: leaving out a layer that makes them is noticed."""
    six = SHAPE | {"num_hidden_layers": 6, "intermediate_size": [32] * 6, "activation_sparsity_pattern": [0.0] * 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
    config = transformers.AutoConfig.for_model(
        "gemma3n_text", vocab_size=24, vocab_size_per_layer_input=24, hidden_size_per_layer_input=8, num_kv_shared_layers=3, laurel_rank=4, pad_token_id=0, eos_token_id=1, bos_token_id=3, **six
    )
    model, ids = transformers.AutoModelForCausalLM.from_config(config).eval(), torch.tensor([[3, 5, 6, 7, 8]])
    with torch.inference_mode():
        early, late = (fidelity.Below(model, f"model.layers.{layer}.mlp.down_proj") for layer in (1, 4))
        assert early.agrees(ids, torch.ones_like(ids)) and early.layers
        assert not late.agrees(ids, torch.ones_like(ids)) and not late.layers


def test_the_norm_inside_a_model_that_sees():
    config = test_activations.FAMILIES["gemma3"]
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert fidelity.post_norm_name(model, hook_of(model)) == "model.language_model.layers.1.post_feedforward_layernorm"


def test_the_norm_after_other_hooks():
    model, passes = tiny("gemma3_text", intermediate_size=16), []
    model.model.layers[2].register_forward_pre_hook(lambda *a: passes.append(1))
    assert fidelity.post_norm_name(model, "model.layers.1.self_attn.o_proj") == "model.layers.1.post_attention_layernorm"
    assert fidelity.post_norm_name(model, "model.layers.1.mlp.gate_proj") == ""  # what follows is an activation function inside the MLP
    assert fidelity.post_norm_name(model, "model.layers.1") == fidelity.post_norm_name(model, "model.norm") == ""
    model.model.layers[1].mlp.down_proj.weight.zero_()  # a norm makes nothing of nothing, and is one all the same
    assert fidelity.post_norm_name(model, "model.layers.1.mlp.down_proj") == "model.layers.1.post_feedforward_layernorm"
    assert not passes  # each pass ends with the layer


NARROW = {"word_embed_proj_dim": 8}  # OPT's smaller sizes: a projection stands between the layers and the head
PATHS = [("glm4", {}), ("afmoe", {}), ("gemma2", {"final_logit_softcapping": None}), ("olmo2", {}), ("mixtral", {}), ("bloom", {}), ("falcon", {})]
PATHS += [("opt", NARROW), ("opt", NARROW | {"do_layer_norm_before": False})]


@pytest.mark.parametrize(("family", "changes"), PATHS)
def test_token_effects_against_finite_differences(family, changes, fresh_seed):
    """Of the ten tokens that each latent promotes nine are those whose logits grow most when the last layer's output is pushed."""
    model = tiny(family, **changes).double()
    if family in MIXTURES:
        model.set_experts_implementation("eager")  # grouped products know no float64
    hook, sae = hook_of(model, 2), u.SAE(16, 20, seed=fresh_seed % 1000).requires_grad_(False)
    window = [3, *torch.randint(4, 24, (6,)).tolist()]
    found = features.token_effects(model, hook, sae, [window], u.special_ids(word_tokenizer()), k=24, most=1)

    def logits(push):
        def pushed(module, args, out):
            x = u.first_output(out)
            new = x.clone()
            new.view(-1, 16)[1] += push
            return (new, *out[1:]) if isinstance(out, tuple) else new

        handle = model.get_submodule(hook).register_forward_hook(pushed)
        result = model(input_ids=torch.tensor([window])).logits[0, 1].double()
        handle.remove()
        return result

    common = 0
    for latent in range(20):
        step = 1e-2 * sae.W_dec[latent].double()
        slope = (logits(step) - logits(-step)) / 2e-2
        mine = torch.zeros(24, dtype=torch.double)
        mine[found["promoted"][latent].long()] = found["promoted_by"][latent].double()
        torch.testing.assert_close(mine, slope, rtol=0, atol=1e-2 * slope.abs().max().item())
        common += len(set(found["promoted"][latent, :10].tolist()) & set(slope.topk(10).indices.tolist()))
    assert common / 20 >= 9


@pytest.mark.parametrize("hook", ["mlp.dense_4h_to_h", "self_attention.dense", "self_attention", "mlp"])
def test_layers_that_are_changed_in_place_afterwards(hook, folder, tokenizer):
    """Falcon's layers add the attention's output to the MLP's in place: harvested together as each alone, and as a copy made at once."""
    model, copied = tiny("falcon", hidden_size=64, num_hidden_layers=2), {}
    hooks, loaded = [f"transformer.h.{layer}.{hook}" for layer in (0, 1)], loaded_params(folder, model, tokenizer)
    together = harvest.fill(model, tokenizer, hooks, loaded, folder / "together")
    for name in hooks:
        alone = harvest.fill(model, tokenizer, [name], loaded, folder / "alone")[name]
        assert (alone / "rows.bin").read_bytes() == (together[name] / "rows.bin").read_bytes()
        rows = harvest.open_rows(together[name])
        handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: copied.update(out=u.first_output(out).clone()))
        model(input_ids=torch.tensor([rows.windows[0]]), use_cache=False)
        handle.remove()
        here = rows.window == 0
        torch.testing.assert_close(rows.activations[here], copied["out"][0, rows.position[here]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
def test_gradients_where_the_output_is_changed_in_place(layer, fresh_seed):
    """The output as it was when the module returned it, and the gradient with respect to it, by finite differences."""
    model, hook = tiny("falcon", hidden_size=64, num_hidden_layers=2).double(), f"transformer.h.{layer}.mlp.dense_4h_to_h"
    ids = torch.tensor([[3, *torch.randint(4, 24, (5,)).tolist()]])
    (x,) = u.run_to_hooks(model, [hook], ids, None)
    with editing.to_differentiate(model, hook) as caught:
        value = model(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)[7]
        (gradient,) = torch.autograd.grad(value, caught["x"])
    torch.testing.assert_close(caught["x"].detach().reshape(x.shape), x.clone(), rtol=1e-6, atol=1e-6)  # a float64 model still norms in float32 in places
    direction = torch.randn(x.shape, dtype=torch.double)

    def moved(step):
        handle = model.get_submodule(hook).register_forward_hook(lambda module, args, out: out + step * direction.reshape(out.shape))
        result = model(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)[7].item()
        handle.remove()
        return result

    slope = (moved(1e-3) - moved(-1e-3)) / 2e-3
    assert (gradient.reshape(x.shape) * direction).sum().item() == pytest.approx(slope, rel=1e-2, abs=1e-3 * abs(slope) + 1e-5)


def test_every_stage_with_a_head_narrower_than_the_layers(folder, tokenizer):
    """OPT-350m's shape: what follows the training runs through, on logits of the whole model."""
    model = tiny("opt", **NARROW)
    hook, sae = hook_of(model), u.SAE(16, 40, seed=1).requires_grad_(False)
    rows = harvest.get_rows(model, tokenizer, hook, loaded_params(folder, model, tokenizer), folder / "activations")
    texts = [rows.windows[w] for w in range(6)]
    sums = fidelity.text_sums(model, tokenizer, fidelity.arms(hook, sae.mean, sae=lambda x: fidelity.through_sae(sae, x)), texts)
    logits = [model(input_ids=torch.tensor([text])).logits[0, :-1].log_softmax(-1) for text in texts]
    expected = [-logp.gather(1, torch.tensor(text[1:])[:, None]).sum().item() for logp, text in zip(logits, texts, strict=True)]
    torch.testing.assert_close(sums[:, 0, 0], torch.tensor(expected, dtype=torch.double), rtol=1e-4, atol=1e-4)
    assert len(features.token_effects(model, hook, sae, texts, u.special_ids(tokenizer))["promoted"]) == 40
    prompt, latents = texts[0][:6], list(range(40))
    exact = patching.ablation_effects(model, tokenizer, hook, sae, prompt, 7, latents)
    assert exact.abs().max() > 0 and patching.rank_correlation(exact, patching.gradient_effects(model, tokenizer, hook, sae, prompt, 7)) > 0.5
    assert features.measured_effect(model, tokenizer, hook, sae, 0, rows, torch.arange(3))["kl"] >= 0


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_a_program_that_comes_with_a_model_is_not_run_and_not_asked_about(part, folder, capfd, monkeypatch):
    """A model of a kind of its own is refused; a tokenizer that transformers can do without its program is loaded without it."""
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    (folder / "model" / "mine.py").write_text('raise SystemExit("this was run")')
    about = json.loads((folder / "model" / part).read_text())
    if part == "config.json":
        about |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    else:
        about |= {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["mine.MyTokenizer", None]}}
    (folder / "model" / part).write_text(json.dumps(about))
    for call in (lambda: u.find_hook(str(folder / "model"), 1), lambda: u.load_model(str(folder / "model"))):
        if part == "config.json":
            with pytest.raises(u.UserError, match="comes with a program of its own .trust_remote_code., which is never run here"):
                call()
        else:
            call()
    said = capfd.readouterr()
    assert "[y/N]" not in said.out + said.err and "this was run" not in said.out + said.err
