"""SAEs of other tools in, ours out: files of every format made by hand, and the format's own formula in float64."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

import experiment
import formats
import sae_utils

D, M, K = 12, 32, 5  # d_in, d_sae, k
HOOK = "model.layers.3.post_feedforward_layernorm"


def weights(*more: str, unit: bool = False) -> dict[str, torch.Tensor]:
    """Random tensors by our names; rows of W_dec of all lengths, or of norm 1."""
    t = {"W_enc": torch.randn(D, M) / D**0.5, "b_enc": 0.1 * torch.randn(M), "W_dec": torch.randn(M, D), "b_dec": 0.3 * torch.randn(D)}
    if unit:
        t["W_dec"] /= t["W_dec"].norm(dim=1, keepdim=True)
    drawn = {"threshold": 0.3 * torch.rand(M), "r_mag": 0.2 * torch.randn(M), "b_mag": 0.1 * torch.randn(M)}
    return t | {name: drawn[name] for name in more}


def kept_largest(p, k):
    return torch.zeros_like(p).scatter(-1, p.topk(k).indices, 1.0) * p.relu()


RULES = {  # acts of pre_acts, in float64
    "relu": lambda p, t, k: p.relu(),
    "topk": lambda p, t, k: kept_largest(p, k),
    "jumprelu": lambda p, t, k: p.relu() * (p > t["threshold"]),
    "gated": lambda p, t, k: (p > 0) * ((p - t["b_enc"]) * t["r_mag"].exp() + t["b_mag"]).relu(),
}


def near(found, wanted) -> bool:
    """Within 1e-5, of the value where that is above 1."""
    return bool(((found.double() - wanted.double()).abs() / (1 + wanted.double().abs())).max() < 1e-5)


def inputs(t: dict, less_b_dec: bool = False, k: int = K, scale: float = 1.0):
    """x (about 64, d_in), random, without rows on which rounding decides whether a latent fires."""
    x = scale * torch.randn(96, D)
    p = (x.double() - t["b_dec"].double() * less_b_dec) @ t["W_enc"].double() + t["b_enc"].double()
    largest = (p * t["W_dec"].double().norm(dim=1)).sort(descending=True).values, p.sort(descending=True).values
    edges = [(p - t.get("threshold", torch.zeros(())).double()).abs().amin(1), *((s[:, k - 1] - s[:, k]).abs() for s in largest)]
    return x[torch.stack(edges).amin(0) > 1e-5]


def by_formula(t: dict, rule: str, x, less_b_dec: bool, k: int = K, rescaled: bool = False):
    """(acts, x_hat) in float64, by the format's own formula."""
    t = {name: value.double() for name, value in t.items()}
    p = (x.double() - t["b_dec"] * less_b_dec) @ t["W_enc"] + t["b_enc"]
    norms = t["W_dec"].norm(dim=1) if rescaled else 1.0
    acts = RULES[rule](p * norms, t, k)
    return acts, acts / norms @ t["W_dec"] + t["b_dec"]


def same_as_formula(sae, t, rule, less_b_dec, unit=False, **given):
    """The loaded SAE encodes (but for the rows' lengths, where these differ) and decodes as the formula does; rows have norm 1."""
    x = inputs(t, less_b_dec)
    acts, x_hat = by_formula(t, rule, x, less_b_dec, **given)
    lengths = 1.0 if unit or given.get("rescaled") else t["W_dec"].double().norm(dim=1)
    assert (acts > 0).any() and (acts == 0).any()
    assert near(sae.encode(x), acts * lengths) and near(sae(x), x_hat)
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    assert not sae.mean.any() and not sae.max_act.any()


# ---------------------------------------------------------------------------------------------
# Files of every format
# ---------------------------------------------------------------------------------------------


def saelens(folder, t, kind="standard", flat=False, tensors=None, **config):
    folder.mkdir(parents=True, exist_ok=True)
    names = {"b_enc": "b_gate"} if kind == "gated" else {}
    safetensors.torch.save_file({names.get(n, n): v for n, v in t.items()} | (tensors or {}), folder / "sae_weights.safetensors")
    about = {"model_name": "gemma-2-2b", "hook_name": "blocks.3.hook_mlp_out", "context_size": 128, "dataset_path": "some/text"}
    made = {"architecture": kind, "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu"}
    made |= about if flat else {"metadata": {"sae_lens_version": "6.54.12", **about, **config.pop("metadata", {})}}
    (folder / "cfg.json").write_text(json.dumps(made | config))
    return str(folder)


def gemma_scope_2(folder, t, **config):
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({n.replace("W_", "w_"): v for n, v in t.items()}, folder / "params.safetensors")
    made = {"hf_hook_point_in": HOOK + ".output", "hf_hook_point_out": "", "width": M, "model_name": "google/gemma-3-1b-it", "architecture": "jump_relu", "l0": 60}
    (folder / "config.json").write_text(json.dumps(made | {"affine_connection": False, "type": "sae"} | config))
    return str(folder)


def gemma_scope_1(root, t):
    folder = root / "gemma-scope-2b-pt-mlp" / "layer_3" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{n: v.numpy() for n, v in t.items()})
    return str(folder)


def sparsify(root, t, hookpoint="layers.3.mlp", **config):
    folder = root / hookpoint
    folder.mkdir(parents=True, exist_ok=True)
    linear = {"encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    safetensors.torch.save_file(linear, folder / "sae.safetensors")
    made = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": M, "k": K, "multi_topk": False, "skip_connection": False}
    (folder / "cfg.json").write_text(json.dumps(made | {"transcode": False, "d_in": D} | config))
    (root / "config.json").write_text(json.dumps({"model": "HuggingFaceTB/SmolLM2-135M", "dataset": "some/text", "ctx_len": 256}))
    return str(folder)


LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
DICTIONARIES = {  # class: our rule, names where they are not ours, further tensors
    "AutoEncoder": ("relu", LINEAR | {"b_dec": "bias"}, {}),
    "AutoEncoderNew": ("relu", LINEAR | {"b_dec": "decoder.bias"}, {}),
    "AutoEncoderTopK": ("topk", LINEAR, {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.2)}),
    "BatchTopKSAE": ("jumprelu", LINEAR, {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.2)}),
    "MatryoshkaBatchTopKSAE": ("jumprelu", {}, {"k": torch.tensor(K), "threshold": torch.tensor(0.2), "group_sizes": torch.tensor([8, 24])}),
    "JumpReluAutoEncoder": ("jumprelu", {}, {}),
    "GatedAutoEncoder": ("gated", LINEAR | {"b_enc": "gate_bias", "b_mag": "mag_bias", "b_dec": "decoder_bias"}, {}),
}


def dictionary(folder, t, kind, more=None, io="out", **trainer):
    folder.mkdir(parents=True, exist_ok=True)
    names, further = DICTIONARIES[kind][1:]
    lie = lambda name, value: value.T.contiguous() if name in ("encoder.weight", "decoder.weight") else value
    made = {names.get(n, n): lie(names.get(n, n), v) for n, v in t.items() if n not in further}
    torch.save(made | further | (more or {}), folder / "ae.pt")
    about = {"dict_class": kind, "activation_dim": D, "dict_size": M, "layer": 3, "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_3"}
    about |= {"k": K} if "k" in further else {}
    (folder / "config.json").write_text(json.dumps({"trainer": about | trainer, "buffer": {"io": io, "ctx_len": 64}}))
    return str(folder)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind, rule, more", [("standard", "relu", ()), ("topk", "topk", ()), ("jumprelu", "jumprelu", ("threshold",)), ("gated", "gated", ("r_mag", "b_mag"))])
@pytest.mark.parametrize("less_b_dec", [False, True])
def test_saelens(tmp_path, kind, rule, more, less_b_dec, flat):
    t = weights(*more, unit=kind == "topk")
    config = {"apply_b_dec_to_input": less_b_dec}
    if kind == "topk":
        config |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}} if flat else {"k": K}
    sae = formats.load(saelens(tmp_path, t, kind, flat, **config))
    same_as_formula(sae, t, rule, less_b_dec, unit=kind == "topk")
    wanted = {"model_name": "google/gemma-2-2b", "hook_name": HOOK, "layer": 3, "seq_len": 128, "dataset_name": "some/text", "format": "saelens"}
    assert {name: sae.config[name] for name in wanted} == wanted and sae.architecture == rule and sae.norm_scale == 1.0
    assert not any(p.requires_grad for p in sae.parameters()) and "notice" not in sae.config


def test_saelens_b_dec_is_subtracted_where_the_config_does_not_say(tmp_path):
    t = weights()
    same_as_formula(formats.load(saelens(tmp_path, t)), t, "relu", True)


def test_saelens_density(tmp_path):
    source, density = saelens(tmp_path, weights()), torch.rand(M)
    density[:3] = 0
    safetensors.torch.save_file({"sparsity": torch.log10(density + 1e-10)}, tmp_path / "sparsity.safetensors")
    found = formats.load(source).density
    assert torch.allclose(found, density, rtol=1e-5, atol=1e-8) and not found[:3].any()


def test_saelens_batchtopk_is_saved_as_jumprelu(tmp_path):
    t = weights("threshold", unit=True)
    sae = formats.load(saelens(tmp_path, t, "jumprelu", metadata={"training_architecture": "batchtopk"}))
    same_as_formula(sae, t, "jumprelu", True, unit=True)
    assert sae.config["trained_as"] == "batchtopk"


def test_old_log_threshold(tmp_path):
    t = weights("threshold")
    log = {n: v for n, v in t.items() if n != "threshold"} | {"log_threshold": t["threshold"].log()}
    same_as_formula(formats.load(saelens(tmp_path, log, "jumprelu")), t, "jumprelu", True)


def test_topk_rescaled_by_decoder_norms(tmp_path):
    t = weights()
    sae = formats.load(saelens(tmp_path, t, "topk", k=K, rescale_acts_by_decoder_norm=True))
    same_as_formula(sae, t, "topk", True, rescaled=True)


def test_topk_with_rows_of_different_lengths_is_left_and_says_so(tmp_path):
    t = weights()
    sae, x = formats.load(saelens(tmp_path, t, "topk", k=K)), inputs(t, True)
    acts, x_hat = by_formula(t, "topk", x, True)
    assert "not equal pushes" in sae.config["notice"]
    assert near(sae.encode(x), acts) and near(sae(x), x_hat)


@pytest.mark.parametrize("rule, kind, more", [("topk", "topk", {"k": K}), ("relu", "standard", {})])
def test_rows_of_one_length_leave_activations_as_they_are(tmp_path, rule, kind, more):
    t = weights(unit=True)
    t["W_dec"] *= 3.7
    sae, x = formats.load(saelens(tmp_path, t, kind, **more)), inputs(t, True)
    acts, x_hat = by_formula(t, rule, x, True)
    assert abs(sae.norm_scale - 3.7) < 1e-5 and (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6
    assert near(sae.encode(x), acts) and near(sae(x), x_hat)


@pytest.mark.parametrize("less_b_dec", [False, True])
def test_constant_norm_rescale(tmp_path, less_b_dec):
    t, x = weights(), 3 * torch.randn(64, D)
    sae = formats.load(saelens(tmp_path, t, normalize_activations="constant_norm_rescale", apply_b_dec_to_input=less_b_dec))
    factor = D**0.5 / x.double().norm(dim=1, keepdim=True)
    acts, x_hat = by_formula(t, "relu", x * factor, less_b_dec)
    lengths = t["W_dec"].double().norm(dim=1) / D**0.5
    assert near(sae.encode(x), acts * lengths) and near(sae(x), x_hat / factor)
    assert sae.norm_scale == 0


def test_gemma_scope_2(tmp_path):
    t = weights("threshold")
    sae = formats.load(gemma_scope_2(tmp_path / "layer_3_width_16k_l0_small", t))
    same_as_formula(sae, t, "jumprelu", False)
    wanted = {"model_name": "google/gemma-3-1b-it", "hook_name": HOOK, "layer": 3, "seq_len": 1024, "format": "gemma-scope-2"}
    assert {name: sae.config[name] for name in wanted} == wanted


def test_gemma_scope_1(tmp_path):
    t = weights("threshold")
    sae = formats.load(gemma_scope_1(tmp_path, t))
    same_as_formula(sae, t, "jumprelu", False)
    assert (sae.config["model_name"], sae.config["hook_name"]) == ("google/gemma-2-2b", HOOK)


def test_gemma_scope_1_whose_folders_tell_nothing(tmp_path):
    np.savez(tmp_path / "params.npz", **{n: v.numpy() for n, v in weights("threshold").items()})
    with pytest.raises(sae_utils.UserError, match="does not tell what it reads: name the module .*HOOK="):
        formats.load(str(tmp_path))
    sae = formats.load(str(tmp_path), hook="model.layers.2")
    assert (sae.config["hook_name"], sae.config["model_name"], sae.config["layer"]) == ("model.layers.2", "", 2)


def test_sparsify(tmp_path):
    t = weights(unit=True)
    sae = formats.load(sparsify(tmp_path / "run", t))
    same_as_formula(sae, t, "topk", True, unit=True)
    wanted = {"model_name": "HuggingFaceTB/SmolLM2-135M", "hook_name": "model.layers.3.mlp", "seq_len": 256, "dataset_name": "some/text", "format": "sparsify"}
    assert {name: sae.config[name] for name in wanted} == wanted and sae.k == K


def test_sparsify_as_wide_as_its_input_is_not_transposed(tmp_path):
    t = {"W_enc": torch.randn(D, D), "b_enc": torch.randn(D), "W_dec": torch.randn(D, D), "b_dec": torch.randn(D)}
    t["W_dec"] /= t["W_dec"].norm(dim=1, keepdim=True)
    same_as_formula(formats.load(sparsify(tmp_path, t, num_latents=D)), t, "topk", True, unit=True)


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_dictionary_learning(tmp_path, kind):
    rule, _, further = DICTIONARIES[kind]
    more = {"jumprelu": ("threshold",), "gated": ("r_mag", "b_mag")}.get(rule, ())
    t = weights(*more, unit=rule == "topk")
    if "threshold" in further and rule == "jumprelu":
        t["threshold"] = further["threshold"].expand(M).clone()
    sae = formats.load(dictionary(tmp_path, t, kind))
    same_as_formula(sae, t, rule, kind not in ("JumpReluAutoEncoder", "AutoEncoderNew"), unit=rule == "topk")
    wanted = {"model_name": "EleutherAI/pythia-70m", "hook_name": "gpt_neox.layers.3", "seq_len": 64, "format": "dictionary_learning"}
    assert {name: sae.config[name] for name in wanted} == wanted


def test_half_precision_is_read_as_float32(tmp_path):
    t = {n: v.to(torch.bfloat16) for n, v in weights("threshold").items()}
    sae = formats.load(gemma_scope_2(tmp_path, t))
    assert sae.W_enc.dtype == torch.float32
    same_as_formula(sae, {n: v.float() for n, v in t.items()}, "jumprelu", False)


def test_ours_from_folder_and_file(tmp_path, sae):
    sae.config = {"model_name": "m", "hook_name": "model.layers.1.mlp.down_proj", "model_revision": "abc", "layer": 1}
    sae.save(tmp_path / "sae.pth")
    sae.save(tmp_path / "copy.pth")
    x = torch.randn(5, 16)
    for source in (tmp_path, tmp_path / "sae.pth", tmp_path / "copy.pth"):
        found = formats.load(str(source))
        assert torch.equal(found.encode(x), sae.encode(x)) and found.config["format"] == "ours" and found.config["model_revision"] == "abc"


# ---------------------------------------------------------------------------------------------
# Hooks
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook, model, module", [
    ("blocks.3.hook_mlp_out", "google/gemma-3-270m", HOOK), ("blocks.3.hook_mlp_out", "gpt2", "transformer.h.3.mlp"),
    ("blocks.3.hook_mlp_out", "meta-llama/Llama-3.2-1B", "model.layers.3.mlp"), ("blocks.3.hook_attn_out", "google/gemma-2-2b", "model.layers.3.post_attention_layernorm"),
    ("blocks.3.hook_resid_post", "EleutherAI/pythia-70m", "gpt_neox.layers.3"), ("blocks.3.hook_resid_pre", "gpt2", "transformer.h.2"),
    ("blocks.0.hook_resid_pre", "gpt2", ""), ("blocks.3.hook_mlp_out", "somebody/unknown", ""), ("blocks.3.attn.hook_z", "gpt2", ""),
    ("model.layers.3.output", "google/gemma-3-1b-it", "model.layers.3"), ("model.layers.3.output", "google/gemma-3-4b-it", "model.language_model.layers.3"),
    ("model.layers.3.self_attn.o_proj.input", "google/gemma-3-1b-it", ""), ("model.layers.3.mlp.down_proj", "", "model.layers.3.mlp.down_proj"),
    ("ln_final.hook_normalized", "gpt2", ""), ("", "gpt2", ""),
])  # fmt: skip
def test_hooks_of_other_tools(hook, model, module):
    assert formats.module_of(hook, model) == module


def test_a_local_models_family_is_read_from_its_config(folder):
    assert formats.module_of("blocks.1.hook_mlp_out", str(folder / "model")) == "model.layers.1.post_feedforward_layernorm"


def test_another_hook_must_be_asked_for(tmp_path):
    source = saelens(tmp_path, weights())
    with pytest.raises(sae_utils.UserError, match=f"was made for {HOOK}, not model.layers.4"):
        formats.load(source, hook="model.layers.4")
    sae = formats.load(source, hook="model.layers.4", another_hook=True)
    assert (sae.config["hook_name"], sae.config["layer"], sae.config["made_for"]) == ("model.layers.4", 4, HOOK)
    assert "made_for" not in formats.load(source, hook=HOOK).config


# ---------------------------------------------------------------------------------------------
# Bad input: one sentence each
# ---------------------------------------------------------------------------------------------


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def plain(root, without="", **changes):
    """Our own plain export, its JSON without a key or with others' values."""
    formats.export(ours("relu"), root, "safetensors", ABOUT)
    config = json.loads((root / "sae.json").read_text())
    (root / "sae.json").write_text(json.dumps({key: value for key, value in config.items() if key != without} | changes))
    return str(root)


def broken(root, what):
    """A source that cannot be read, as `what` says."""
    t = weights()
    with_nan = t | {"W_enc": t["W_enc"].clone().index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(float("nan")))}
    make = {
        "another architecture": lambda: saelens(root, t, architecture="gated"),
        "a tensor too many": lambda: saelens(root, weights("threshold"), "standard"),
        "an unknown architecture": lambda: saelens(root, t, "temporal"),
        "nan": lambda: saelens(root, with_nan),
        "transposed": lambda: saelens(root, t | {"W_enc": t["W_enc"].T.contiguous()}),
        "both transposed": lambda: saelens(root, t | {"W_enc": t["W_dec"], "W_dec": t["W_enc"]}),
        "of another SAE": lambda: saelens(root, t | {"W_dec": torch.randn(M, D + 1)}),
        "config of another": lambda: saelens(root, t, d_in=D + 1),
        "missing tensor": lambda: saelens(root, {n: v for n, v in t.items() if n != "b_dec"}),
        "integers": lambda: saelens(root, t | {"W_enc": (100 * t["W_enc"]).to(torch.int8)}),
        "layer norm": lambda: saelens(root, t, normalize_activations="layer_norm"),
        "unfolded scale": lambda: saelens(root, t, flat=True, normalize_activations=True),
        "scaling factor": lambda: saelens(root, t, tensors={"scaling_factor": torch.full((M,), 1.1)}),
        "one head": lambda: saelens(root, t, flat=True, hook_head_index=2),
        "words for numbers": lambda: saelens(root, t, "topk", k="five"),
        "metadata a list": lambda: saelens(root, t, flat=True, metadata=[1]),
        "k too large": lambda: saelens(root, t, "topk", k=M + 1),
        "no k": lambda: saelens(root, t, "topk"),
        "transcoder": lambda: gemma_scope_2(root, weights("threshold"), hf_hook_point_out="model.layers.3.mlp.output"),
        "affine": lambda: gemma_scope_2(root, weights("threshold"), affine_connection=True),
        "sparsify transcoder": lambda: sparsify(root, t, transcode=True),
        "groupmax": lambda: sparsify(root, t, activation="groupmax"),
        "no threshold yet": lambda: dictionary(root, t, "BatchTopKSAE", {"threshold": torch.tensor(-1.0)}),
        "another k": lambda: dictionary(root, t, "BatchTopKSAE", k=K + 1),
        "float8 nan": lambda: saelens(root, with_nan | {"W_enc": with_nan["W_enc"].to(torch.float8_e4m3fn)}),
        "another output": lambda: saelens(root, t, flat=True, hook_name_out="blocks.3.hook_resid_post"),
        "other d_out": lambda: saelens(root, t, flat=True, d_out=D + 1),
        "input dictionary": lambda: dictionary(root, t, "AutoEncoder", io="in"),
        "in and out": lambda: dictionary(root, t, "AutoEncoder", io="in_and_out"),
        "crosscoder": lambda: gemma_scope_2(root, weights("threshold"), type="crosscoder"),
        "plain without b_dec rule": lambda: plain(root, "apply_b_dec_to_input"),
        "plain bad norm": lambda: plain(root, "", norm_scale=-1.0),
        "class not known": lambda: dictionary(root, t, "AutoEncoder", dict_class="IdentityDict"),
        "class of another": lambda: dictionary(root, t, "AutoEncoder", dict_class="GatedAutoEncoder"),
    }  # fmt: skip
    if what in make:
        return make[what]()
    source = {"npz cut": lambda: gemma_scope_1(root, weights("threshold")), "npz with objects": lambda: gemma_scope_1(root, weights("threshold"))}.get(what)
    source = source() if source else dictionary(root, t, "AutoEncoder") if what.startswith("ae") else saelens(root, t)
    at = next(root.rglob("params.npz")).parent if what.startswith("npz") else root
    if what in ("safetensors cut", "npz cut", "ae cut"):
        cut(at / {"s": "sae_weights.safetensors", "n": "params.npz", "a": "ae.pt"}[what[0]])
    elif what == "empty":
        (at / "sae_weights.safetensors").write_bytes(b"")
    elif what == "config cut":
        cut(at / "cfg.json")
    elif what == "config a list":
        (at / "cfg.json").write_text("[]")
    elif what == "no config":
        (at / "cfg.json").unlink()
    elif what == "npz with objects":
        np.savez(at / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    elif what == "ae backup":
        torch.save({"step": 3, "ae": {"bias": t["b_dec"]}, "optimizer": {}, "config": {}, "norm_factor": 1.0}, at / "ae.pt")
    elif what == "ae a list":
        torch.save([t["b_dec"]], at / "ae.pt")
    return source


SAID = {
    "another architecture": r"sae_weights\.safetensors lacks b_gate, r_mag, b_mag of an SAE of architecture gated .*download both files again",
    "a tensor too many": r"holds threshold, which an SAE of architecture standard has not",
    "an unknown architecture": r"is of architecture temporal, of which standard, topk, jumprelu, gated are read here: choose one of these",
    "nan": r"has NaN or infinite values in W_enc", "transposed": r"W_enc of shape \(32, 12\).*the other way round",
    "both transposed": r"W_enc of shape \(32, 12\).*the other way round", "of another SAE": r"W_dec of shape \(32, 13\).*belongs to another SAE",
    "config of another": r"has 12 \(wide\) where its cfg\.json says 13", "missing tensor": r"lacks b_dec", "integers": r"W_enc in int8.*quantised",
    "layer norm": r"normalises its input by layer_norm", "unfolded scale": r"by expected_average_only_in.*save_inference_model",
    "words for numbers": r"cfg\.json beside .* is not as this format's own tool writes it", "metadata a list": r"is not as this format's own tool",
    "scaling factor": r"scaling_factor", "one head": r"one attention head", "k too large": r"k = 33 of 32 latents", "no k": r"k = 0 of 32 latents",
    "transcoder": r"is a transcoder", "affine": r"is a transcoder", "sparsify transcoder": r"is a transcoder", "groupmax": r"of architecture groupmax",
    "no threshold yet": r"has no threshold yet", "another k": r"k = 5 latents where its config\.json says 6", "class not known": r"of architecture IdentityDict",
    "class of another": r"ae\.pt lacks encoder.* of architecture GatedAutoEncoder|ae\.pt lacks", "safetensors cut": r"sae_weights\.safetensors is damaged.*again",
    "npz cut": r"params\.npz is damaged", "ae cut": r"ae\.pt is damaged", "empty": r"sae_weights\.safetensors is damaged", "config cut": r"cfg\.json beside .* is no JSON object",
    "config a list": r"cfg\.json beside .* is no JSON object", "no config": r"stands without cfg\.json", "npz with objects": r"params\.npz holds objects or code.*never run",
    "float8 nan": r"has NaN or infinite values in W_enc.*download it again", "another output": r"is a transcoder", "other d_out": r"is a transcoder", "input dictionary": r"reads the input of resid_post_layer_3, for which no module is known",
    "in and out": r"is a transcoder", "crosscoder": r"is a transcoder", "plain without b_dec rule": r"sae\.json beside .* is not as this format's own tool", "plain bad norm": r"sae\.json beside .* is not as this format's own tool",
    "ae backup": r"ae\.pt is a backup of a training", "ae a list": r"something else than tensors",
}  # fmt: skip


@pytest.mark.parametrize("what", SAID)
def test_bad_input_gives_one_sentence(tmp_path, what):
    source = broken(tmp_path, what)
    with pytest.raises(sae_utils.UserError, match=SAID[what]) as raised:
        formats.load(source)
    said = str(raised.value)
    assert "\n" not in said and said.endswith(".") and str(tmp_path) in said


class Planted:
    """Unpickled, it writes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path, kind):
    source = dictionary(tmp_path, weights(), "AutoEncoder")
    planted = {"bias": torch.zeros(D), "more": Planted(tmp_path / "ran")}
    if kind == "torch":
        torch.save(planted, tmp_path / "ae.pt")
    else:
        (tmp_path / "ae.pt").write_bytes(pickle.dumps(planted))
    with pytest.raises(sae_utils.UserError, match="ae.pt holds objects or code .* never run"):
        formats.load(source)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "ae.pt", weights_only=False) if kind == "torch" else pickle.loads((tmp_path / "ae.pt").read_bytes())
    assert (tmp_path / "ran").exists()  # it would have


def test_a_skip_connection_is_refused(tmp_path):
    t = weights("threshold")
    source = gemma_scope_2(tmp_path, t | {"affine_skip_connection": torch.zeros(D, D)})
    with pytest.raises(sae_utils.UserError, match="is a transcoder"):
        formats.load(source)


def test_another_width_is_refused(tmp_path):
    source = saelens(tmp_path, weights())
    with pytest.raises(sae_utils.UserError, match="activations 12 wide, those of .* are 640: name its own model and layer"):
        formats.doubts(formats.load(source), "any", 640)


def test_what_a_reader_should_know_is_said(tmp_path):
    sae = formats.load(saelens(tmp_path, weights()))
    made_for, hook = sae.config["model_name"], sae.config["hook_name"]
    assert formats.doubts(sae, made_for, D) == formats.doubts(sae, f"/some/where/{made_for.rpartition('/')[2]}/", D) == []
    assert formats.doubts(sae, made_for + "-it", D) == [f"{tmp_path} was made for {made_for} and is looked at on {made_for}-it."]
    other = formats.load(str(tmp_path), "model.layers.0.mlp", another_hook=True)
    other.config["notice"] = "Something."
    assert formats.doubts(other, made_for, D) == [f"it was made for {hook}, and reads model.layers.0.mlp because that was asked for.", "Something."]


@pytest.mark.parametrize("source", ["", "name", "runs/not-there", "/not/there", "a/../b", "owner/name with spaces", "../etc/passwd"])
def test_what_is_neither_a_path_nor_an_id(source):
    with pytest.raises(sae_utils.UserError, match="there is no such file or folder, and it is no hub id"):
        formats.load(source)


def test_a_folder_without_an_sae(tmp_path):
    (tmp_path / "README.md").write_text("text")
    with pytest.raises(sae_utils.UserError, match="holds no SAE of a format known here"):
        formats.load(str(tmp_path))


# ---------------------------------------------------------------------------------------------
# The hub
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one repository, a folder; `asked` are the files asked for."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repo, file, revision=None):
        assert ".." not in file.split("/")  # a hub has no folder above
        asked.append((repo, file, revision))
        if not (tmp_path / "hub" / file).is_file():
            raise EntryNotFoundError(f"404: {file}")
        return str(tmp_path / "hub" / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return tmp_path / "hub", asked


def test_hub_id_with_folder_and_revision(hub):
    root, asked = hub
    t = weights("threshold")
    gemma_scope_2(root / "mlp_out" / "layer_3_width_16k_l0_small", t)
    sae = formats.load("google/gemma-scope-2-1b-it/mlp_out/layer_3_width_16k_l0_small@abc")
    same_as_formula(sae, t, "jumprelu", False)
    assert sae.config["source"] == "google/gemma-scope-2-1b-it/mlp_out/layer_3_width_16k_l0_small@abc" and sae.config["hook_name"] == HOOK
    assert {(repo, revision) for repo, _, revision in asked} == {("google/gemma-scope-2-1b-it", "abc")}
    assert not any("examples" in file for _, file, _ in asked)


@pytest.mark.parametrize("repo, model", [("gemma-scope-2-270m-pt", "google/gemma-3-270m"), ("gemma-scope-2-1b-pt", "google/gemma-3-1b-pt"), ("gemma-scope-2-4b-it", "google/gemma-3-4b-it")])
def test_gemma_scope_2_without_its_config_is_known_by_its_path(hub, repo, model):
    root, _ = hub
    gemma_scope_2(root / "resid_post" / "layer_3_width_16k", weights("threshold"))
    (root / "resid_post" / "layer_3_width_16k" / "config.json").unlink()
    sae = formats.load(f"google/{repo}/resid_post/layer_3_width_16k")
    assert sae.config["model_name"] == model and sae.config["hook_name"].endswith("layers.3")


@pytest.mark.parametrize("site", ["transcoder", "clt"])
def test_gemma_scope_2_transcoders_are_known_by_their_path(hub, site):
    root, _ = hub
    gemma_scope_2(root / site / "layer_3_width_16k", weights("threshold"), hf_hook_point_out=None)
    with pytest.raises(sae_utils.UserError, match="is a transcoder"):
        formats.load(f"google/gemma-scope-2-1b-it/{site}/layer_3_width_16k")


def test_sparsify_from_the_hub_finds_the_runs_config_above(hub):
    root, _ = hub
    t = weights(unit=True)
    sparsify(root, t)
    sae = formats.load("owner/name/layers.3.mlp")
    assert sae.config["model_name"] == "HuggingFaceTB/SmolLM2-135M" and sae.config["hook_name"] == "model.layers.3.mlp"


@pytest.mark.parametrize("error, said", [("GatedRepoError", "is gated: accept its licence"), ("RepositoryNotFoundError", "does not exist on the Hugging Face hub")])
def test_gated_and_absent_repositories(monkeypatch, error, said):
    import httpx
    import huggingface_hub

    def download(*args, **kwargs):
        raise getattr(huggingface_hub.errors, error)("no", response=httpx.Response(401, request=httpx.Request("GET", "https://example.org")))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(sae_utils.UserError, match=f"SAE owner/name {said}"):
        formats.load("owner/name/folder")


def test_what_the_hub_gave_before_is_read_without_a_network(monkeypatch, tmp_path):
    import huggingface_hub

    commit = "a" * 40
    cache, root = tmp_path / "hub", tmp_path / "hub" / "models--google--gemma-scope-2-1b-it"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    t = weights("threshold")
    gemma_scope_2(root / "snapshots" / commit / "mlp_out" / "layer_3", t)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    source = "google/gemma-scope-2-1b-it/mlp_out/layer_3"
    with pytest.raises(sae_utils.UserError, match="cannot be reached"):  # it may have an sae.pth, for all that is known
        formats.load(source)
    for name in ("sae.pth", "sae_weights.safetensors"):
        mark = root / ".no_exist" / commit / "mlp_out" / "layer_3" / name
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    same_as_formula(formats.load(source), t, "jumprelu", False)


def test_no_network(monkeypatch):
    with pytest.raises(sae_utils.UserError, match="is not on this disk and the Hugging Face hub cannot be reached"):
        formats.load("owner/name/folder")


# ---------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------


def ours(architecture: str, norm_scale: float = 2.3, less_b_dec: bool = False, **more):
    """An SAE of ours with random values everywhere."""
    sae = sae_utils.SAE(D, M, seed=1, architecture=architecture, k=K, norm_scale=norm_scale, apply_b_dec_to_input=less_b_dec)
    with torch.no_grad():
        for name in ("b_enc", "b_dec", "r_mag", "b_mag"):
            if hasattr(sae, name):
                getattr(sae, name).normal_(std=0.1)
        if hasattr(sae, "threshold"):
            sae.threshold.uniform_(0.05, 0.3)
        sae.W_enc.mul_(0.7).add_(0.05 * torch.randn(D, M))
        sae.mean.normal_()
        sae.density.uniform_()
        sae.max_act.uniform_(1, 2)
    sae.config = {"model_name": "google/gemma-3-270m", "hook_name": HOOK, "seq_len": 32, "dataset_name": "some/text", "lr": 1e-3, "layer": 3} | more
    return sae.eval().requires_grad_(False)


ABOUT = {"run": "one", "metrics": {"l0": 5.0, "fvu": 0.25, "dead": 0.125, "rows": 1000, "train_rows": 900, "data": {"bos_tokens": 3, "windows": 40}}, "settings": {"lr": 1e-3}}


@pytest.mark.parametrize("architecture", sae_utils.ARCHITECTURES)
@pytest.mark.parametrize("less_b_dec", [False, True])
def test_saelens_round_trip(tmp_path, architecture, less_b_dec):
    sae = ours(architecture, less_b_dec=less_b_dec)
    folder = formats.export(sae, tmp_path / "out", "saelens", ABOUT)
    t = safetensors.torch.load_file(folder / "sae_weights.safetensors")
    config = json.loads((folder / "cfg.json").read_text())
    rule = {"standard": "relu"}.get(config["architecture"], config["architecture"])
    assert config["architecture"] == {"relu": "standard", "topk": "topk", "gated": "gated"}.get(architecture, "jumprelu")
    t = {{"b_gate": "b_enc"}.get(n, n): v for n, v in t.items()}
    x = inputs(t, less_b_dec, scale=3.0)
    acts, x_hat = by_formula(t, rule, x, config["apply_b_dec_to_input"])
    assert near(sae.encode(x), acts) and near(sae(x), x_hat)
    back = formats.load(str(folder))
    assert near(back.encode(x), sae.encode(x)) and near(back(x), sae(x))
    assert torch.allclose(back.density, sae.density, atol=1e-6) and torch.allclose(back.W_dec, sae.W_dec, atol=1e-6)
    assert all(back.config[name] == sae.config[name] for name in ("model_name", "hook_name", "seq_len", "dataset_name", "layer"))
    metadata = config["metadata"]
    assert metadata["l0"] == 5.0 and metadata["num_dead_features"] == 4 and metadata["training_architecture"] == architecture and metadata["prepend_bos"] is True
    assert metadata["fvu"] == 0.25 and metadata["trained_on_rows"] == 900 and metadata["sae_lens_version"].startswith("6.")
    assert metadata["training_settings"] == {"lr": 1e-3} and metadata["context_size"] == 32 and metadata["model_class_name"] == "AutoModelForCausalLM"


@pytest.mark.parametrize("norm_scale", [0.0, 2.3])
@pytest.mark.parametrize("architecture", sae_utils.ARCHITECTURES)
def test_plain_round_trip_is_exact(tmp_path, architecture, norm_scale):
    sae, x = ours(architecture, norm_scale, True), torch.randn(64, D)
    back = formats.load(str(formats.export(sae, tmp_path / "out", "safetensors", ABOUT)))
    assert torch.equal(back.encode(x), sae.encode(x)) and torch.equal(back(x), sae(x))
    assert torch.equal(back.density, sae.density) and torch.equal(back.max_act, sae.max_act) and torch.equal(back.mean, sae.mean)
    assert back.architecture == architecture and back.k == sae.k and back.config["lr"] == 1e-3 and back.config["hook_name"] == HOOK


def test_per_token_norms_cannot_be_folded_and_nothing_is_written(tmp_path):
    with pytest.raises(sae_utils.UserError, match="normalize: unit.*normalize scale"):
        formats.export(ours("relu", norm_scale=0.0), tmp_path / "a" / "out", "saelens", ABOUT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["another file", "another run", "a folder inside"])
def test_a_folder_with_something_else_is_left_alone(tmp_path, content):
    folder = formats.export(ours("relu"), tmp_path / "out", "saelens", ABOUT | ({"run": "other"} if content == "another run" else {}))
    if content == "another file":
        (folder / "notes.txt").write_text("mine")
    if content == "a folder inside":
        (folder / "cfg.json.d").mkdir()
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    with pytest.raises(sae_utils.UserError, match="name an empty folder with OUT="):
        formats.export(ours("topk"), folder, "saelens", ABOUT)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_same_runs_export_is_replaced(tmp_path):
    folder = formats.export(ours("relu"), tmp_path / "out", "saelens", ABOUT)
    formats.export(ours("topk"), folder, "saelens", ABOUT)
    assert formats.load(str(folder)).architecture == "topk"
    assert sorted(file.name for file in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors", "sparsity.safetensors"]


def test_a_format_that_is_not_there(tmp_path):
    with pytest.raises(sae_utils.UserError, match="no export format onnx: FORMAT is saelens, safetensors, neuronpedia"):
        formats.export(ours("relu"), tmp_path / "out", "onnx", ABOUT)


FEATURE = {  # SAEDashboard 0.8.0, NeuronpediaDashboardFeature.to_dict and NeuronpediaDashboardActivation.to_dict
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices", "correlated_neurons_l1",
    "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson", "neg_str", "neg_values", "pos_str",
    "pos_values", "frac_nonzero", "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_heights", "logits_hist_data_bar_values",
    "n_prompts_total", "n_tokens_in_prompt", "dataset", "decoder_weights_dist", "activations", "vector",
}  # fmt: skip
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}


def test_neuronpedia(tmp_path):
    sae, generator = ours("relu"), np.random.default_rng()
    tokens = generator.integers(0, 20, (M, 20, 17)).astype(np.int32)
    acts = generator.random((M, 20, 17)).astype(np.float16)
    tokens[2, 0, :3] = -1  # a window's start
    density = generator.random(M).astype(np.float32)
    density[5] = 0
    top_values = np.sort(generator.random((M, 10)).astype(np.float32))[:, ::-1]
    top_rows, top_rows[3, 4:] = np.arange(M * 10).reshape(M, 10), -1
    deciles = np.sort(generator.random((M, 10)).astype(np.float32))[:, :, None] * np.ones((1, 1, 5), np.float32)
    deciles[3, 4:] = 0
    listed = {name: generator.integers(0, 20, (M, 10)) for name in ("promoted", "suppressed")}
    listed |= {name: generator.random((M, 10)) for name in ("promoted_by", "suppressed_by")}
    found = {"tokens": tokens, "acts": acts, "density": density, "max_act": np.ones(M, np.float32), "top_values": top_values, "top_rows": top_rows}
    found |= {"decile_values": deciles, "histogram": np.full((M, 20), 0.05, np.float32), **listed}
    folder = formats.export(sae, tmp_path / "out", "neuronpedia", ABOUT | {"features": found, "as_text": lambda token: f"<{token}>"})
    batch = json.loads((folder / "batch-0.json").read_text())
    assert {name: batch[name] for name in batch if name != "features"} == {"model_id": "gemma-3-270m", "layer": 3, "sae_set": "one", "sae_id_suffix": None}
    assert [feature["feature_index"] for feature in batch["features"]] == [i for i in range(M) if i != 5]
    assert json.loads((folder / "skipped_indexes.json").read_text())["skipped_indexes"] == [5]
    for feature in batch["features"]:
        assert feature.keys() == FEATURE and all(activation.keys() == ACTIVATION for activation in feature["activations"])
        assert all(len(activation["tokens"]) == len(activation["values"]) > activation["qualifying_token_index"] for activation in feature["activations"])
    two, three = batch["features"][2], batch["features"][3]
    first = two["activations"][0]
    assert first["qualifying_token_index"] == 5 and first["tokens"] == [f"<{t}>" for t in tokens[2, 0, 3:]] and (first["bin_min"], first["bin_max"], first["bin_contains"]) == (-1, 99, -1)
    assert first["values"] == [round(float(v), 3) for v in acts[2, 0, 3:]]
    assert two["pos_str"] == [f"<{t}>" for t in listed["promoted"][2]] and two["neg_values"] == [round(v, 3) for v in listed["suppressed_by"][2]]
    assert two["neg_str"] == [f"<{t}>" for t in listed["suppressed"][2]] and two["pos_values"] == [round(v, 3) for v in listed["promoted_by"][2]]
    assert two["frac_nonzero"] == pytest.approx(float(density[2])) and two["freq_hist_data_bar_heights"] == [round(0.05 * float(density[2]) * 1000)] * 20
    assert len(two["activations"]) == 20 and len(three["activations"]) == 8
    bins = [(a["bin_min"], a["bin_max"]) for a in two["activations"][10:]]
    assert [b[0] for b in bins] == [float(v) for v in deciles[2, :, 0]] and all(a[1] == b[0] for a, b in zip(bins, bins[1:])) and bins[-1][1] == 1.0


def test_neuronpedia_needs_features(tmp_path):
    with pytest.raises(sae_utils.UserError, match="has no features.npz"):
        formats.export(ours("relu"), tmp_path / "out", "neuronpedia", ABOUT)
    assert not list(tmp_path.iterdir())


def test_export_of_a_run(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    ours("batchtopk").save(run / "sae.pth")
    (run / "metrics.json").write_text(json.dumps(ABOUT["metrics"]))
    (run / "params.json").write_text(json.dumps({"parameters": {"architecture": "batchtopk", "k": 3}}))
    with pytest.raises(sae_utils.UserError, match="is not finished"):
        experiment.export(str(run), "saelens")
    (run / ".done").write_text("finished\n")
    assert experiment.main(["export", str(run), "saelens"]) == 0 and "cfg.json" in capsys.readouterr().out
    assert formats.load(str(run / "export" / "saelens")).architecture == "jumprelu"
    assert experiment.main(["export", str(run), "safetensors", str(tmp_path / "there")]) == 0 and (tmp_path / "there" / "sae.json").exists()
    assert experiment.main(["export", str(run), ""]) == 2 and "FORMAT is saelens" in capsys.readouterr().err


def test_a_zip_that_is_no_archive_of_arrays(tmp_path):
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as archive:
        archive.writestr("readme.txt", "text")
    with pytest.raises(sae_utils.UserError, match="params.npz"):
        formats.load(str(tmp_path))
