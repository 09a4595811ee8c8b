"""An outside referee: files saved by sae-lens, dictionary-learning and eai-sparsify themselves and read here, ours read
by SAELens and SAEDashboard, and SAELens's evaluation of an exported run beside ours. `make test-interop [RUN=name]`."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import sae_lens
import sparsify
import torch
from conftest import ROOT
from dictionary_learning import trainers
from dictionary_learning import utils as dictionary_utils
from dictionary_learning.training import trainSAE
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler

import experiment
import fidelity
import formats
import harvest
import sae_utils

D, M, K, N = 24, 96, 7, 256  # d_in, d_sae, k, rows compared
RUN = ROOT / "runs" / os.environ.get("RUN", "interop")
HOOK = "model.layers.3.mlp"


@torch.no_grad()
def shuffled(module: torch.nn.Module) -> torch.nn.Module:
    """The module with random values everywhere, so that nothing is right by being zero or alike."""
    for name, tensor in [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if "threshold" in n)]:
        if name.endswith("threshold") or name == "log_threshold":
            tensor.uniform_(0.05, 0.3)
        else:
            tensor.normal_(std=tensor.shape[-1] ** -0.5 if tensor.ndim == 2 else 0.1)
    return module


LINES = []


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """What was found, printed at the end."""
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *LINES, sep="\n")


def compare(what: str, ours: tuple, theirs: tuple, lengths=1.0, gate=1e-5) -> None:
    """The largest differences of (acts, x_hat), in units of 1 or of the value where that is larger; fails above `gate`. Rows in
    which a latent fires in one only, being within rounding of its threshold, are counted: one in a hundred at most."""
    acts = theirs[0] * lengths
    flips = ((ours[0] > 0) != (acts > 0)).any(1)
    far = [((a.double() - b.double()).abs() / (1 + b.double().abs()))[~flips].max().item() for a, b in zip(ours, (acts, theirs[1]), strict=True)]
    active = (acts > 0).sum(-1).double().mean().item()
    LINES.append(f"{what:<72} encode {far[0]:.1e}  decode {far[1]:.1e}  (L0 {active:.1f}{f', {int(flips.sum())} rows at a threshold' if flips.any() else ''})")
    assert 0 < active < acts.shape[-1] and max(far) < gate and flips.double().mean() < 0.01


@torch.no_grad()
def both(sae, theirs, x):
    return (sae.encode(x), sae(x)), (acts := theirs.encode(x), theirs.decode(acts))


# ---------------------------------------------------------------------------------------------
# Theirs, read here
# ---------------------------------------------------------------------------------------------

SAELENS = {
    "StandardTrainingSAE": {}, "TopKTrainingSAE": {"k": K}, "TopKTrainingSAE, not rescaled": {"k": K, "rescale_acts_by_decoder_norm": False},
    "BatchTopKTrainingSAE": {"k": K}, "MatryoshkaBatchTopKTrainingSAE": {"k": K, "matryoshka_widths": [M // 4, M]}, "JumpReLUTrainingSAE": {}, "GatedTrainingSAE": {},
}  # fmt: skip


@pytest.mark.parametrize("less_b_dec", [False, True])
@pytest.mark.parametrize("name", SAELENS)
def test_saved_by_saelens(tmp_path, name, less_b_dec):
    kind = name.partition(",")[0]
    about = SAEMetadata(model_name="gpt2-small", hook_name="blocks.3.hook_mlp_out", context_size=64)
    config = getattr(sae_lens, kind + "Config")(d_in=D, d_sae=M, apply_b_dec_to_input=less_b_dec, metadata=about, **SAELENS[name])
    trained = shuffled(getattr(sae_lens, kind)(config))
    if hasattr(trained, "topk_threshold"):
        trained.topk_threshold.fill_(0.2)
    trained.save_inference_model(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    sae = formats.load(str(tmp_path))
    same = sae.architecture == "topk" and "notice" in sae.config or getattr(theirs.cfg, "rescale_acts_by_decoder_norm", False)
    lengths = 1.0 if same else theirs.W_dec.detach().norm(dim=1)
    compare(f"SAELens {name}{', less b_dec' if less_b_dec else ''}, read here", *both(sae, theirs, torch.randn(N, D)), lengths=lengths)
    assert sae.config["hook_name"] == "transformer.h.3.mlp"


TRAINERS = {
    "StandardTrainer": {"sparsity_warmup_steps": None}, "TopKTrainer": {"k": K}, "BatchTopKTrainer": {"k": K},
    "JumpReluTrainer": {"target_l0": K, "sparsity_warmup_steps": None}, "GatedSAETrainer": {"sparsity_warmup_steps": None},
    "MatryoshkaBatchTopKTrainer": {"k": K, "group_fractions": [0.25, 0.75]},
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINERS)
def test_saved_by_dictionary_learning(tmp_path, name):
    modules = (vars(trainers), *(vars(module) for module in vars(trainers).values() if hasattr(module, "__path__") or type(module).__name__ == "module"))
    trainer = next(found[name] for found in modules if name in found)
    about = {"trainer": trainer, "activation_dim": D, "dict_size": M, "layer": 3, "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_3"}
    about |= {"steps": 3, "device": "cpu", "warmup_steps": 1, "lr": 1e-3} | TRAINERS[name]
    trainSAE(data=(torch.randn(32, D) for _ in range(200)), trainer_configs=[about], steps=3, save_dir=str(tmp_path), device="cpu")
    folder = tmp_path / "trainer_0"
    theirs, _ = dictionary_utils.load_dictionary(str(folder), "cpu")
    state = shuffled(theirs).state_dict()
    if "threshold" in state and state["threshold"].ndim == 0:
        state["threshold"].fill_(0.2)
    torch.save(state, folder / "ae.pt")
    theirs, config = dictionary_utils.load_dictionary(str(folder), "cpu")
    sae = formats.load(str(folder))
    saved = state["W_dec"] if "W_dec" in state else state["decoder.weight"].T
    folded_by_them = name == "StandardTrainer"  # from_pretrained normalises its decoder
    lengths = 1.0 if sae.architecture == "topk" or folded_by_them else saved.norm(dim=1)
    compare(f"dictionary_learning {config['trainer']['dict_class']}, read here", *both(sae, theirs, torch.randn(N, D)), lengths=lengths)
    assert sae.config["hook_name"] == "gpt_neox.layers.3"


@pytest.mark.parametrize("d_sae", [M, D])
def test_saved_by_sparsify(tmp_path, d_sae):
    theirs = shuffled(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=d_sae, k=K)))
    theirs.set_decoder_norm_to_unit_norm()
    theirs.save_to_disk(tmp_path / "layers.3.mlp")
    (tmp_path / "config.json").write_text(json.dumps({"model": "HuggingFaceTB/SmolLM2-135M"}))
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "layers.3.mlp")
    sae, x = formats.load(str(tmp_path / "layers.3.mlp")), torch.randn(N, D)
    with torch.no_grad():
        found = theirs.encode(x)
        acts = torch.zeros(N, d_sae).scatter(1, found.top_indices, found.top_acts)
        compare(f"sparsify topk, {d_sae} latents, read here", (sae.encode(x), sae(x)), (acts, theirs.decode(found.top_acts, found.top_indices)))
    assert sae.config["hook_name"] == HOOK


# ---------------------------------------------------------------------------------------------
# Ours, read there
# ---------------------------------------------------------------------------------------------


def ours(architecture: str, less_b_dec: bool) -> sae_utils.SAE:
    sae = sae_utils.SAE(D, M, architecture=architecture, k=K, norm_scale=2.3, apply_b_dec_to_input=less_b_dec)
    shuffled(sae)
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        sae.W_enc.mul_(3)
        sae.mean.normal_()
    sae.config = {"model_name": "google/gemma-3-270m", "hook_name": HOOK, "seq_len": 32, "layer": 3}
    return sae.eval().requires_grad_(False)


@pytest.mark.parametrize("less_b_dec", [False, True])
@pytest.mark.parametrize("architecture", sae_utils.ARCHITECTURES)
def test_read_by_saelens(tmp_path, architecture, less_b_dec):
    sae = ours(architecture, less_b_dec)
    theirs = sae_lens.SAE.load_from_disk(formats.export(sae, tmp_path / "out", "saelens", {"run": "one", "metrics": {"l0": 5.0}}))
    x = sae.mean + 2.3 * torch.randn(N, D)
    compare(f"our {architecture}{', less b_dec' if less_b_dec else ''}, read by SAELens as {theirs.cfg.architecture()}", *both(sae, theirs, x))
    assert theirs.cfg.metadata.hook_name == HOOK and theirs.cfg.metadata.l0 == 5.0 and theirs.cfg.metadata.context_size == 32


def test_the_run_read_by_saelens():
    """A trained run on its own stored rows, raw."""
    sae, theirs = exported()
    found = fetched_rows(sae)
    if found is None:
        pytest.skip("no stored activations of this run")
    compare(f"{RUN.name} ({sae.architecture}), read by SAELens, {len(found):,} stored rows", *both(sae, theirs, found))


def exported():
    sae = sae_utils.SAE.load(RUN / "sae.pth")
    return sae, sae_lens.SAE.load_from_disk(experiment.export(str(RUN), "saelens", str(RUN / "export" / "saelens")))


def fetched_rows(sae, most: int = 8192):
    """Raw rows (most, d_in) float32 of the run's store, evenly spread, or None where there is none."""
    for manifest in (ROOT / "runs" / "activations").glob("*/manifest.json"):
        told, config = json.loads(manifest.read_text()), sae.config
        key, wanted = told["key"], ("model_fingerprint", "dataset_fingerprint", "seq_len")
        if key.get("hook") == config["hook_name"] and all(key.get(name) == config.get(name) for name in wanted):
            rows = torch.from_file(str(manifest.parent / "rows.bin"), size=told["rows"] * told["d_in"], dtype=getattr(torch, key["activation_dtype"]))
            return rows.view(-1, told["d_in"])[:: max(1, told["rows"] // most)].float()
    return None


def test_neuronpedia_read_by_saedashboard():
    """Its own classes take our files, and would write the same fields."""
    if not (RUN / "features.npz").exists():
        pytest.skip("no features.npz")
    folder = experiment.export(str(RUN), "neuronpedia")
    package = Path(importlib.util.find_spec("sae_dashboard").origin).parent  # not imported: it pulls older packages
    spec = importlib.util.spec_from_file_location("np_dashboard", package / "neuronpedia" / "neuronpedia_dashboard.py")
    dashboard = sys.modules["np_dashboard"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dashboard)
    n = 0
    for file in sorted(folder.glob("batch-*.json")):
        written = json.loads(file.read_text())
        read = dashboard.NeuronpediaDashboardBatch(**written).to_dict()
        assert read == written  # the same fields, and nothing lost
        n += len(read["features"])
    LINES.append(f"{RUN.name}: {n} features read by SAEDashboard's NeuronpediaDashboardBatch, all fields the same")
    assert n


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def counted_as_theirs(model, hook: str, sae, special: list[int], windows: list[list[int]], batch: int = 4) -> dict:
    """Cross-entropies as SAELens counts them: what a special token predicts is left out, and zero ablation is of every position."""
    module, total = model.get_submodule(hook), {"clean": [], "sae": [], "zero": []}
    for start in range(0, len(windows), batch):
        ids = torch.tensor(windows[start : start + batch])
        plain = ~torch.isin(ids, torch.tensor(special))
        edits = {"clean": lambda x: x, "sae": lambda x, plain=plain: torch.where(plain[..., None], sae(x), x), "zero": torch.zeros_like}
        for name, edit in edits.items():
            handle = module.register_forward_hook(lambda module, args, output, edit=edit: edit(output))
            logits = model(input_ids=ids, use_cache=False).logits.float()
            handle.remove()
            # rows of logits, not (batch, vocabulary, sequence): there torch adds up 262,144 float32 terms less exactly, by 1e-3
            ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            total[name].append(ce[plain[:, :-1].flatten()].double())
    return {name: torch.cat(values).mean().item() for name, values in total.items()}


def test_figures(n_windows: int = int(os.environ.get("WINDOWS", 32))):
    """SAELens's run_evals of the exported run beside ours, on the same windows."""
    sae, theirs = exported()
    params, hook = json.loads((RUN / "params.json").read_text())["parameters"], sae.config["hook_name"]
    model, tokenizer = sae_utils.load_model(params["model_name"], dtype="float32")
    cut, _ = harvest.cut_windows(tokenizer, list(harvest.open_text(params)), params["seq_len"], 10**9)
    cut = list(harvest.Windows(cut["flat"], cut["starts"]))
    length = sorted(map(len, cut))[-4 * n_windows :][0]  # of one length: SAELens knows no padding
    full = [window[:length] for window in cut if len(window) >= length]
    windows = [list(map(int, window)) for window in full[:: max(1, len(full) // n_windows)]][:n_windows]
    special = sae_utils.special_ids(tokenizer)

    proxy = HookedProxyLM(model, tokenizer, hook_names=[hook])
    parts = [torch.tensor(windows[start : start + 4]) for start in range(0, len(windows), 4)]
    store = SimpleNamespace(left=[], store_batch_size_prompts=4, context_size=length, reset_input_dataset=lambda: store.left.clear())

    def get_batch_tokens(n):  # the store it takes tokens from: the same windows, in order, again from the start after a reset
        store.left = store.left or [*parts]
        return store.left.pop(0)

    store.get_batch_tokens = get_batch_tokens
    config = EvalConfig(4, len(parts), False, True, len(parts), compute_sparsity_metrics=True, compute_variance_metrics=True)
    told = run_evals(theirs, store, proxy, ActivationScaler(), config)[0]
    lens = told["model_performance_preservation"]

    ids = torch.tensor(windows)
    x = torch.cat([sae_utils.run_to_hook(model, hook, part, None).flatten(0, 1) for part in parts])[~torch.isin(ids, torch.tensor(special)).flatten()]
    arms = fidelity.arms(hook, x.mean(0), sae=lambda x: fidelity.through_sae(sae, x))
    arms.pop("mean")
    sums = fidelity.text_sums(model, tokenizer, arms, windows).sum(0)
    as_defined = dict(zip(arms, (sums[:, 0] / sums[:, -1]).tolist(), strict=True))
    rows = fidelity.row_sums(lambda x: fidelity.through_sae(sae, x), x, torch.arange(len(x)), torch.zeros(len(x), dtype=torch.long))[0]
    same = counted_as_theirs(model, hook, sae, special, windows)
    lines = {  # SAELens, ours on the same positions, ours by our definitions
        "CE without SAE": (lens["ce_loss_without_sae"], same["clean"], as_defined["clean"]),
        "CE with SAE": (lens["ce_loss_with_sae"], same["sae"], as_defined["sae"]),
        "CE with zero ablation": (lens["ce_loss_with_ablation"], same["zero"], as_defined["zero"]),
        "CE recovered": (lens["ce_loss_score"], (same["zero"] - same["sae"]) / (same["zero"] - same["clean"]), (as_defined["zero"] - as_defined["sae"]) / (as_defined["zero"] - as_defined["clean"])),
        "explained variance": (told["reconstruction_quality"]["explained_variance"], *[1 - (rows[1] / rows[2]).item()] * 2),
        "L0": (told["sparsity"]["l0"], *[(rows[5] / rows[0]).item()] * 2),
    }  # fmt: skip
    LINES.append(f"{RUN.name}: {len(windows)} windows of {length} tokens, {len(x):,} rows")
    LINES.append(f"{'':<24}{'SAELens':>10}{'ours, same positions':>22}{'ours, as defined':>18}")
    LINES.extend(f"{name:<24}{a:>10.5f}{b:>22.5f}{c:>18.5f}" for name, (a, b, c) in lines.items())
    LINES.append("Positions: SAELens leaves out what BOS predicts (sae_lens/evals.py 6.54.12, line 375: metric_value[mask]) and zeroes the activation at BOS")
    LINES.append("too (line 734, in standard_zero_ablate_hook); here the prediction at BOS counts, and BOS keeps its activation in every arm.")
    for name, (a, b, _) in lines.items():
        assert abs(a - b) < 5e-5 * abs(a) + 1e-9, name
