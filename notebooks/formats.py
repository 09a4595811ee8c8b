"""SAEs of other tools in, ours out: a table of file formats, one reader and one writer for all of them.

    sae = load("runs/demo")                                                       a run of ours
    sae = load("google/gemma-scope-2-1b-it/mlp_out/layer_13_width_16k_l0_small")  hub id, folder in it, [@revision]
    export(sae, folder, "saelens", about)

Whatever is loaded is a `sae_utils.SAE` with rows of W_dec of norm 1, like our own; `sae.config` says what it was
made for. A fact that a file does not tell is left empty.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

import sae_utils
import storing
from sae_utils import UserError

# ---------------------------------------------------------------------------------------------
# The formats
# ---------------------------------------------------------------------------------------------


TRANSCODER = "is a transcoder: it reads one place and writes to another, which cannot stand in one module's place; choose a plain SAE"
AGAIN = "copy or download both files again, from one place"


@dataclass
class Told:
    """What a format's config says of an SAE; what it does not say may be given as None."""

    kind: str  # its architecture, by the format's own name
    k: int = 0
    apply_b_dec_to_input: bool = False
    model: str = ""
    hook: str = ""  # as the format names it
    seq_len: int = 0
    dataset: str = ""
    shape: tuple[int | None, int | None] = (None, None)  # d_in, d_sae
    normalize: str = "none"
    norm_scale: float = 1.0
    rescaled: bool = False  # a latent is chosen by its activation times its decoder norm, which is also its activation
    trained_as: str = ""
    refused: str = ""  # why it cannot be read here
    more: dict = field(default_factory=dict)

    def __post_init__(self):
        self.kind, self.model, self.hook, self.dataset, self.trained_as = (str(v or "") for v in (self.kind, self.model, self.hook, self.dataset, self.trained_as))
        self.k, self.seq_len, self.norm_scale = int(self.k or 0), int(self.seq_len or 0), float(self.norm_scale)
        if not 0 <= self.norm_scale < math.inf:
            raise ValueError("norm_scale")


@dataclass
class Format:
    """`weights` is the file that tells the format; `tensors`: by architecture (the format's name for it), our name of each
    tensor -> the format's, with .T where it lies the other way round. `told(config, words)` reads the config; `words` is
    the source, whose folders' names are all that some formats tell."""

    weights: str
    config: str
    told: Callable[[dict, str], Told]
    tensors: dict[str, dict[str, str]]
    unused: tuple[str, ...] = ()  # tensors that say nothing of what is computed
    config_above: str = ""  # a config of the whole run, in the folder above
    optional: bool = False  # whether it is whole without its config


def _saelens(config: dict, words: str) -> Told:
    told = config | (config.get("metadata") or {})
    activation = told.get("activation_fn") or told.get("activation_fn_str") or "relu"
    of_activation = told.get("activation_fn_kwargs") or {}
    kind, normalize = told.get("architecture") or "standard", told.get("normalize_activations") or "none"
    if normalize is True:
        normalize = "expected_average_only_in"
    refused = ""
    if normalize not in ("none", "constant_norm_rescale"):
        refused = f"normalises its input by {normalize}, which its weights do not hold; save it in SAELens with save_inference_model, which folds what can be folded"
    elif activation not in ("relu", "topk"):
        refused = f"has the activation function {activation}, which no architecture here has; choose another SAE"
    elif told.get("hook_head_index") is not None:
        refused = "reads one attention head, which is no module's output; choose an SAE of a whole layer"
    elif told.get("hook_name_out") or told.get("d_out") not in (None, told.get("d_in")):
        refused = TRANSCODER
    return Told(
        "topk" if activation == "topk" else kind, told.get("k") or of_activation.get("k"), bool(told.get("apply_b_dec_to_input", True)),
        told.get("model_name"), told.get("hf_hook_name") or told.get("hook_name") or told.get("hook_point"), told.get("context_size"), told.get("dataset_path"),
        (config.get("d_in"), config.get("d_sae")), normalize, rescaled=bool(told.get("rescale_acts_by_decoder_norm")), trained_as=told.get("training_architecture"), refused=refused,
    )  # fmt: skip


SITES = (  # a folder's or a repository's name -> the place, in a Gemma layer; or why not
    ("transcoder|clt", TRANSCODER), ("embedding", "reads the embeddings at a scale of their own, which no module's output has"),
    ("resid_post|-res/", ".output"), ("mlp_out|-mlp/", ".post_feedforward_layernorm.output"), ("attn_out|-att/", ".self_attn.o_proj.input"),
)  # fmt: skip


def _gemma_scope(config: dict, words: str) -> Told:
    named = re.search(r"gemma-scope-(2-)?(\w+)-(pt|it)", words)
    layer = re.search(r"layer_(\d+)", words)
    site = next((module for pattern, module in SITES if re.search(pattern, words)), "") if named else ""
    model = str(config.get("model_name") or "").replace("gemma-v3", "gemma-3")
    if not model and named:
        base = named[2] == "270m" or not named[1]  # google/gemma-3-270m and google/gemma-2-2b have no -pt
        model = f"gemma-{3 if named[1] else 2}-{named[2]}" + ("" if named[3] == "pt" and base else f"-{named[3]}")
    if "270m" in model:
        model = model.removesuffix("-pt")
    hook = config.get("hf_hook_point_in") or (f"model.layers.{layer[1]}{site}" if layer and site.startswith(".") else "")
    refused = "" if site.startswith(".") else site
    if config.get("affine_connection") or config.get("type", "sae") != "sae" or config.get("hf_hook_point_out") not in (None, "", hook):
        refused = TRANSCODER
    more = {"l0_told": config["l0"]} if "l0" in config else {}
    return Told(config.get("architecture") or "jump_relu", model=model, hook=hook, seq_len=1024, shape=(None, config.get("width")), refused=refused, more=more)


def _sparsify(config: dict, words: str) -> Told:
    run, d_in = config.get("run") or {}, config.get("d_in")
    width = config.get("num_latents") or (d_in * config["expansion_factor"] if d_in and config.get("expansion_factor") else None)
    module = next((part for part in reversed(words.split("/")) if re.search(r"\.\d+(\.|$)", part)), "")
    base = family(run.get("model") or "").get("base", "")  # the folder's name is the module's within the base model
    hook = f"{base}.{module}.output" if base and module else module and f"hookpoint {module}"
    refused = TRANSCODER if config.get("transcode") or config.get("skip_connection") else ""
    return Told(config.get("activation") or "topk", config.get("k"), True, run.get("model"), hook, run.get("ctx_len"), run.get("dataset"), (d_in, width), refused=refused)


def _dictionary_learning(config: dict, words: str) -> Told:
    told, buffer = config.get("trainer") or {}, config.get("buffer") or {}
    kind, module, layer = told.get("dict_class"), told.get("submodule_name") or "", told.get("layer")
    hook = module if re.search(r"\.\d+(\.|$)", module) else module and f"submodule {module}"
    if re.match(r"resid_(post|out)", module) and isinstance(layer, int):
        hook = f"blocks.{layer}.hook_resid_post"
    if buffer.get("io", "out") != "out":
        hook = f"the input of {module or 'a module it does not name'}"
    return Told(
        kind, told.get("k"), kind not in ("JumpReluAutoEncoder", "AutoEncoderNew"), told.get("lm_name"), hook, buffer.get("ctx_len"),
        shape=(told.get("activation_dim"), told.get("dict_size")), refused=TRANSCODER if buffer.get("io") == "in_and_out" else "",
    )  # fmt: skip


def _plain(config: dict, words: str) -> Told:
    about = config.get("config") or {}
    return Told(
        config.get("architecture"), config.get("k"), bool(config["apply_b_dec_to_input"]), about.get("model_name"), about.get("hook_name"), about.get("seq_len"),
        about.get("dataset_name"), (config.get("d_in"), config.get("d_sae")), norm_scale=config["norm_scale"], more=about,
    )  # fmt: skip


PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
JUMP, GATE = {"threshold": "threshold"}, {"r_mag": "r_mag", "b_mag": "b_mag"}
LINEAR = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "b_dec"}  # torch's nn.Linear
NEVER = 1e-10  # SAELens adds this to a density before it takes the logarithm
MEASURED = {name: name for name in ("mean", "density", "max_act")}
GEMMA = PLAIN | {"W_enc": "w_enc", "W_dec": "w_dec"} | JUMP
FORMATS = {
    "ours": Format("sae.pth", "", _plain, {}),
    "saelens": Format("sae_weights.safetensors", "cfg.json", _saelens, {
        "standard": PLAIN, "topk": PLAIN, "jumprelu": PLAIN | JUMP, "gated": PLAIN | {"b_enc": "b_gate"} | GATE,
    }, unused=("scaling_factor",)),
    "gemma-scope-2": Format("params.safetensors", "config.json", _gemma_scope, {"jump_relu": GEMMA}, optional=True),
    "gemma-scope-1": Format("params.npz", "", _gemma_scope, {"jump_relu": PLAIN | JUMP}, unused=("scaling_factor",), optional=True),
    "sparsify": Format("sae.safetensors", "cfg.json", _sparsify, {"topk": LINEAR | {"W_dec": "W_dec"}}, config_above="config.json"),
    "dictionary_learning": Format("ae.pt", "config.json", _dictionary_learning, {
        "AutoEncoder": LINEAR | {"b_dec": "bias"}, "AutoEncoderNew": LINEAR | {"b_dec": "decoder.bias"}, "AutoEncoderTopK": LINEAR,
        "BatchTopKSAE": LINEAR | JUMP, "MatryoshkaBatchTopKSAE": PLAIN | JUMP, "JumpReluAutoEncoder": PLAIN | JUMP,
        "GatedAutoEncoder": {**LINEAR, "b_enc": "gate_bias", "b_dec": "decoder_bias", "r_mag": "r_mag", "b_mag": "mag_bias"},
    }, unused=("k", "group_sizes", "threshold")),
    "safetensors": Format("weights.safetensors", "sae.json", _plain, {
        "relu": PLAIN | MEASURED, "topk": PLAIN | MEASURED, "gated": PLAIN | GATE | MEASURED,
        **{kind: PLAIN | JUMP | MEASURED for kind in ("jumprelu", "batchtopk", "matryoshka")},
    }),
}  # fmt: skip
OURS = {  # our architecture, by the formats' names
    "standard": "relu", "jump_relu": "jumprelu", "AutoEncoder": "relu", "AutoEncoderNew": "relu", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka", "JumpReluAutoEncoder": "jumprelu", "GatedAutoEncoder": "gated",
}  # fmt: skip

# ---------------------------------------------------------------------------------------------
# Hooks: other tools' names for them, as the module whose output is read
# ---------------------------------------------------------------------------------------------

# By a model's name, or by its config's model_type where it is a local folder: what stands before the names of its modules,
# its layers, and what of a layer TransformerLens' hook_mlp_out and hook_attn_out are: what is added to the residual stream.
FAMILIES = (
    (r"^gemma3$|gemma-3-(4b|12b|27b)", "model", "model.language_model.layers", "post_feedforward_layernorm", "post_attention_layernorm"),
    (r"^gemma[23](_text)?$|gemma-[23]-", "model", "model.layers", "post_feedforward_layernorm", "post_attention_layernorm"),
    (r"gpt2", "transformer", "transformer.h", "mlp", "attn"),
    (r"pythia|gpt_neox", "gpt_neox", "gpt_neox.layers", "mlp", "attention"),
    (r"llama|mistral|qwen[23]|smollm|^gemma$|gemma-(2b|7b)", "model", "model.layers", "mlp", "self_attn"),
)


def hub_id(model: str) -> str:
    """TransformerLens' short name of a model as its hub id; any other name as it is."""
    if "/" in model:
        return model
    if model == "gpt2-small":
        return "gpt2"
    return next((owner + model for start, owner in (("pythia-", "EleutherAI/"), ("gemma-", "google/")) if model.startswith(start)), model)


def family(model: str) -> dict[str, str]:
    """What FAMILIES says of the model; nothing where it is of none of them."""
    name = model
    try:
        name = json.loads((sae_utils.resolve(model) / "config.json").read_text())["model_type"] if model else ""
    except (OSError, ValueError, KeyError):
        pass
    for pattern, *row in FAMILIES:
        if re.search(pattern, name.lower()):
            return dict(zip(("base", "layers", "hook_mlp_out", "hook_attn_out"), row, strict=True))
    return {}


def module_of(hook: str, model: str) -> str:
    """The full name of the module whose output is what `hook` reads, by another tool's name for it; "" where that is not known."""
    found = family(model)
    lens = re.fullmatch(r"blocks\.(\d+)\.(hook_\w+)", hook)
    if lens:
        layer, place = int(lens[1]), lens[2]
        if place == "hook_resid_pre" and layer > 0:
            layer, place = layer - 1, "hook_resid_post"
        if not found or place not in (*found, "hook_resid_post"):
            return ""
        return f"{found['layers']}.{layer}" + ("" if place == "hook_resid_post" else f".{found[place]}")
    name = hook.removesuffix(".output")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*\.\d+(\.\w+)*", name) or name.endswith(".input") or "hook_" in name or name.startswith("blocks."):
        return ""
    return re.sub(r"^model\.layers\b", found.get("layers", "model.layers"), name)


# ---------------------------------------------------------------------------------------------
# In
# ---------------------------------------------------------------------------------------------


def load(source: str, hook: str = "", device: str = "cpu", *, another_hook: bool = False) -> sae_utils.SAE:
    """The SAE in `source`: a local folder or file, or a hub id with a folder inside it and @revision where wanted.

    `hook` is the module whose output it shall read: the one it was made for, or with `another_hook` any; it must be
    named where the files do not tell one that is known here.
    Its config has model_name, hook_name, layer, seq_len, dataset_name ("" and 0: not told), source, format and,
    where there is something to know, notice. density is what the format tells, else zeros, and max_act is zeros:
    both are measured on text afterwards. Activations are in the format's own units where its decoder rows are of one
    length, else times the length of each latent's row. UserError, one sentence, for whatever cannot be read.
    """
    words, fetch = opened(source)
    for name, form in FORMATS.items():
        file = fetch(form.weights)
        if file is not None:
            break
    else:
        raise UserError(f"{source} holds no SAE of a format known here: a file {', '.join(form.weights for form in FORMATS.values())}; name the folder in which it lies.")
    if name == "ours":
        sae = sae_utils.SAE.load(file)
        told = sae.config.get("hook_name", "")
    else:
        sae, told = read(form, file, fetch, words, f"{words}/{form.weights}")
    known = module_of(told, sae.config.get("model_name", "")) if name != "ours" else told
    if not known and not hook:
        what = f"reads {told}, for which no module is known here" if told else "does not tell what it reads"
        raise UserError(f"{source} {what}: name the module whose output that is, HOOK=model.layers.6.mlp say.")
    if hook and known and hook != known and not another_hook:
        raise UserError(f"{source} was made for {known}, not {hook}: leave `hook` away, or say another_hook=True.")
    at = hook or known
    layer = re.search(r"\.(\d+)(\.|$)", at)
    sae.config = {"model_name": "", "model_revision": "", "seq_len": 0, "dataset_name": ""} | sae.config | {"hook_name": at, "layer": int(layer[1]) if layer else None, "source": source, "format": name}
    if at != known:
        sae.config["made_for"] = known or told
    return sae.to(device).eval().requires_grad_(False)


def doubts(sae: sae_utils.SAE, model_name: str, d_in: int) -> list[str]:
    """What a reader of figures should know of an SAE that `load` gave, looked at on activations `d_in` wide of the model
    `model_name`: a sentence each. UserError where it is for another width."""
    if d_in != sae.d_in:
        raise UserError(f"{sae.config['source']} is for activations {sae.d_in} wide, those of {sae.config['hook_name']} are {d_in}: name its own model and layer.")
    made_for, last = sae.config["model_name"], lambda name: name.rstrip("/").rpartition("/")[2]
    said = [f"{sae.config['source']} was made for {made_for} and is looked at on {model_name}."] if made_for and last(made_for) != last(model_name) else []
    said += [f"it was made for {sae.config['made_for']}, and reads {sae.config['hook_name']} because that was asked for."] if "made_for" in sae.config else []
    said += [sae.config["notice"]] if "notice" in sae.config else []
    return said


def opened(source: str) -> tuple[str, Callable[[str], Path | None]]:
    """(the source without its revision, a function that gives the file of a name in it, or None)."""
    local = sae_utils.find(source)
    if source and local.exists():
        folder = local if local.is_dir() else local.parent

        def on_disk(name: str) -> Path | None:
            if local.is_file() and name == "sae.pth" and local.suffix == ".pth":
                return local
            asked = local.is_dir() or name == local.name or name not in {form.weights for form in FORMATS.values()}
            return folder / name if asked and (folder / name).is_file() else None

        return sae_utils.show_path(folder), on_disk
    words, _, revision = source.partition("@")
    parts = words.strip("/").split("/")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[^\s/]+)*/?", words) or parts[0] in ("runs", "params", "notebooks") or ".." in parts:
        raise UserError(f"SAE {source}: there is no such file or folder, and it is no hub id (owner/name/folder@revision).")
    repo, folder = "/".join(parts[:2]), parts[2:]
    sae_utils.use_hf_token()

    def on_hub(name: str) -> Path | None:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        inside = [*folder, *name.split("/")]
        while ".." in inside:  # the folder above
            at = inside.index("..")
            inside[max(at - 1, 0) : at + 1] = []
        with sae_utils.hub_errors("SAE", repo):
            try:
                return Path(huggingface_hub.hf_hub_download(repo, "/".join(inside), revision=revision or None))
            except EntryNotFoundError as error:
                seen = huggingface_hub.try_to_load_from_cache(repo, "/".join(inside), revision=revision or None)
                if isinstance(error, LocalEntryNotFoundError) and isinstance(seen, (str, type(None))):
                    raise  # no network, and it was not seen before that there is no such file
                return None

    return words, on_hub


def read_tensors(file: Path, shown: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .npz or .pt file by name. Nothing in the file is run."""
    try:
        if file.suffix == ".safetensors":
            found = safetensors.torch.load_file(file)
        elif file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                found = {name: torch.from_numpy(np.asarray(archive[name])) for name in archive.files}
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds
        said = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        if re.search("weights.only|allow_pickle|Unsupported (global|operand)", str(error), re.IGNORECASE):
            raise UserError(f"{shown} holds objects or code beside tensors, which are never run: ask for a file of plain tensors.") from None
        raise UserError(f"{shown} is damaged ({said}): copy or download it again.") from None
    if isinstance(found, dict) and isinstance(found.get("ae"), dict):
        raise UserError(f"{shown} is a backup of a training that was cut short, not a finished SAE: go on with that training, or save its `ae` alone.")
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{shown} holds something else than tensors by name: {AGAIN}, or name another SAE.")
    return found


def read_config(form: Format, fetch, shown: str) -> dict:
    """The format's config, {} where it needs none; that of the whole run, where there is one, as `run`."""
    file = fetch(form.config) if form.config else None
    if file is None:
        if form.config and not form.optional:
            raise UserError(f"{shown} stands without {form.config}, which says what it is: copy that file beside it.")
        return {}
    config = parsed(file, form.config, shown)
    above = fetch(f"../{form.config_above}") if form.config_above else None
    return config if above is None else config | {"run": parsed(above, form.config_above, shown)}


def parsed(file: Path, name: str, shown: str) -> dict:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{name} beside {shown} is no JSON object: copy or download it again.")
    return config


def read(form: Format, file: Path, fetch, words: str, shown: str) -> tuple[sae_utils.SAE, str]:
    """(the SAE, its hook as the format names it)."""
    config = read_config(form, fetch, shown)
    try:
        told = form.told(config, words)
    except (TypeError, ValueError, KeyError, AttributeError):  # a list where a name is, a word where a number is
        raise UserError(f"{form.config} beside {shown} is not as this format's own tool writes it: copy or download it again.") from None
    if told.refused:
        raise UserError(f"{shown} {told.refused}.")
    if told.kind not in form.tensors:
        raise UserError(f"{shown} is of architecture {told.kind or '(not told)'}, of which {', '.join(form.tensors)} are read here: choose one of these (a checkpoint of a SAELens training is saved anew with its save_inference_model).")
    found = read_tensors(file, shown)
    if "log_threshold" in found and "threshold" not in found:  # SAELens, until 2024
        found["threshold"] = found.pop("log_threshold").exp()
    if "k" in found and told.k and int(found["k"]) != told.k:
        raise UserError(f"{shown} keeps k = {int(found['k'])} latents where its {form.config} says {told.k}, so they do not belong together: {AGAIN}.")
    tensors = checked(form, told, found, shown)
    architecture = OURS.get(told.kind, told.kind)
    if sae_utils.ARCHITECTURES[architecture].name == "topk" and not 1 <= told.k <= len(tensors["b_enc"]):
        raise UserError(f"{shown} keeps k = {told.k} of {len(tensors['b_enc'])} latents, which cannot be: look into its {form.config}.")
    notice = []
    measured = {name: tensors.pop(name) for name in MEASURED if name in tensors}
    scale = told.norm_scale
    if told.normalize == "constant_norm_rescale":  # √d_in times x / ‖x‖ is what it sees
        scale, root = 0.0, math.sqrt(len(tensors["b_dec"]))
        tensors |= {"W_enc": tensors["W_enc"] * root, "W_dec": tensors["W_dec"] / root, "b_dec": tensors["b_dec"] / root}
    tensors, scale, said = unit_rows(tensors, architecture, scale, told.rescaled)
    notice += [said] if said else []
    sae = sae_utils.SAE(1, 1, architecture=architecture, k=told.k, norm_scale=scale, apply_b_dec_to_input=told.apply_b_dec_to_input)
    for name in [name for name, _ in sae.named_parameters()]:
        setattr(sae, name, nn.Parameter(tensors[name].contiguous()))
    for name in [name for name, _ in sae.named_buffers()]:
        empty = torch.zeros(sae.d_in if name == "mean" else sae.d_sae)
        setattr(sae, name, tensors.get(name, measured.get(name, empty)).clone())
    sparsity = fetch("sparsity.safetensors") if form is FORMATS["saelens"] else None
    if sparsity is not None:
        logs = read_tensors(sparsity, f"{words}/sparsity.safetensors").get("sparsity")
        if logs is not None and logs.shape == (sae.d_sae,):
            density = 10.0 ** logs.double() - NEVER
            sae.density = torch.where(density > NEVER, density, 0.0).float()
    sae.config = {
        **told.more, "model_name": hub_id(told.model), "seq_len": told.seq_len, "dataset_name": told.dataset, "normalize": "scale" if scale else "unit",
        **({"trained_as": told.trained_as} if told.trained_as else {}), **({"notice": " ".join(notice)} if notice else {}),
    }  # fmt: skip
    return sae, told.hook


def checked(form: Format, told: Told, found: dict[str, Tensor], shown: str) -> dict[str, Tensor]:
    """Our tensors by our names in float32, the way round that we have them. UserError where one is missing, of another
    shape, not finite or not of floats, or where there are others."""
    table = form.tensors[told.kind]
    theirs = {name: other.removesuffix(".T") for name, other in table.items()}
    missing = [other for other in theirs.values() if other not in found]
    beyond = [name for name in found if name not in theirs.values() and name not in form.unused]
    if missing:
        has = f" (it has {', '.join(sorted(found)[:12])})"
        raise UserError(f"{shown} lacks {', '.join(missing)} of an SAE of architecture {told.kind}{has}: {AGAIN}.")
    if {"W_skip", "affine_skip_connection"} & {*beyond}:
        raise UserError(f"{shown} {TRANSCODER}.")
    if beyond:
        raise UserError(f"{shown} holds {', '.join(beyond)}, which an SAE of architecture {told.kind} has not: {AGAIN}.")
    if "scaling_factor" in form.unused and "scaling_factor" in found and not torch.all(found["scaling_factor"] == 1):
        raise UserError(f"{shown} has a scaling_factor of its latents that is not 1, which no architecture here has: save it in SAELens with save_inference_model.")
    tensors = {}
    for name, other in table.items():
        tensor = found[theirs[name]]
        if not tensor.is_floating_point():
            raise UserError(f"{shown} has {theirs[name]} in {str(tensor.dtype).removeprefix('torch.')}, not in floats: quantised weights are not read, so choose another SAE.")
        tensors[name] = (tensor.T if other.endswith(".T") else tensor).float()
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"{shown} has NaN or infinite values in {theirs[name]}: its training went wrong, or the file is damaged: download it again, or name another SAE.")
    d_in, d_sae = (len(tensors[name]) if tensors[name].ndim == 1 else None for name in ("b_dec", "b_enc"))
    for said, has, what in ((told.shape[0], d_in, "wide"), (told.shape[1], d_sae, "latents")):
        if said and has and said != has:
            raise UserError(f"{shown} has {has} ({what}) where its {form.config} says {said!r}, so they do not belong together: {AGAIN}.")
    threshold = tensors.get("threshold")
    if threshold is not None and threshold.ndim == 0:
        if threshold < 0:
            raise UserError(f"{shown} has no threshold yet (it is {threshold.item():g}): its training ended before one was measured, so choose another SAE.")
        tensors["threshold"] = threshold.expand(d_sae or 0).clone()
    for name, tensor in tensors.items():
        wanted = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,), "mean": (d_in,)}.get(name, (d_sae,))
        if tuple(tensor.shape) != wanted:
            across = "it lies the other way round than in this format, so save it anew with its own tool" if tuple(tensor.shape) == wanted[::-1] else f"it belongs to another SAE, so {AGAIN}"
            stored = tuple(found[theirs[name]].shape)
            raise UserError(f"{shown} has {theirs[name]} of shape {stored}, which does not go with {d_in} wide and {d_sae} latents: {across}.")
    return tensors


def unit_rows(tensors: dict[str, Tensor], architecture: str, scale: float, rescaled: bool) -> tuple[dict[str, Tensor], float, str]:
    """(tensors with rows of W_dec of norm 1, norm_scale, what could not be done), computing the same.

    Rows of one length make norm_scale, and activations stay what they are; other rows' lengths go into the activations
    (encoder, biases, threshold), but for topk, where others would then be the largest: unless that is how it `rescaled`.
    """
    norms = torch.linalg.vector_norm(tensors["W_dec"], dim=1, dtype=torch.float64)
    low, high = (norms[norms > 0].min().item(), norms.max().item()) if norms.any() else (1.0, 1.0)
    norms = torch.where(norms > 0, norms, high)  # a row of zeros stays one
    same = high - low < 1e-5 * high
    if same and abs(high - 1) < 1e-5:
        return tensors, scale, ""
    if same and scale and not rescaled:
        factor = norms.mean().item()
        changed = {"W_enc": tensors["W_enc"] * factor, "W_dec": tensors["W_dec"] / factor, "b_dec": tensors["b_dec"] / factor}
        return tensors | changed, scale * factor, ""
    if architecture == "topk" and not (rescaled or same):
        return tensors, scale, f"Its decoder rows have norms from {low:.3g} to {high:.3g}: equal activations of two latents are not equal pushes."
    changed = {"W_dec": tensors["W_dec"] / norms[:, None].float()}
    changed |= {name: tensors[name] * norms.float() for name in ("W_enc", "b_enc", "b_mag", "threshold") if name in tensors}
    return tensors | changed, scale, ""


# ---------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------

EXPORTS = {  # the files that each writes
    "saelens": r"cfg\.json|sae_weights\.safetensors|sparsity\.safetensors",
    "safetensors": r"sae\.json|weights\.safetensors",
    "neuronpedia": r"batch-\d+\.json|skipped_indexes\.json|run_settings\.json",
}


def export(sae: sae_utils.SAE, folder: str | Path, format: str, about: dict) -> Path:
    """Writes the SAE into `folder` in one of EXPORTS, whole or not at all, and returns the folder.

    `about` has run, its name; metrics, of its metrics.json; settings, the parameters that it was trained with, where the run
    trained it; for neuronpedia also features (what features.npz holds) and as_text (a token's text by its id). What the same run
    exported there before is replaced; a folder that holds anything else is left alone. UserError there, and for what the format cannot hold.
    """
    if format not in EXPORTS:
        raise UserError(f"there is no export format {format or '(none named)'}: FORMAT is {', '.join(EXPORTS)}.")
    folder = sae_utils.resolve(folder)
    before = replaceable(folder, EXPORTS[format], about["run"])
    files = {"saelens": saelens_files, "safetensors": plain_files, "neuronpedia": neuronpedia_files}[format](sae, about)
    files = itertools.chain([next(files)], files)  # what refuses does so before anything is made
    new = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    new.mkdir(parents=True)
    try:
        for name, content in files:
            if name.endswith(".json"):
                storing.write_json(new / name, content)
            else:
                (new / name).write_bytes(safetensors.torch.save({key: tensor.detach().cpu().float().contiguous() for key, tensor in content.items()}))
        for file in before:
            file.unlink()
        if folder.is_dir():
            folder.rmdir()
        new.replace(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def replaceable(folder: Path, pattern: str, run: str) -> list[Path]:
    """The files of an earlier export of the same run in the folder. UserError where it holds anything else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{sae_utils.show_path(folder)} is a file: name another folder with OUT=.")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    other = [file.name for file in files if not (file.is_file() and re.fullmatch(pattern, file.name))]
    owners = [file.read_text(errors="replace") for file in files if file.name in ("cfg.json", "sae.json", "run_settings.json")]
    if files and not other and [f'"run": {json.dumps(run)}' in owner for owner in owners] != [True]:
        other = ["files that no export of this run wrote"]
    if other:
        raise UserError(f"{sae_utils.show_path(folder)} holds {', '.join(other[:3])}: name an empty folder with OUT=, or empty this one.")
    return files


def folded(sae: sae_utils.SAE) -> dict[str, Tensor]:
    """The SAE's tensors by name in float64, for raw activations: normalisation is in the weights, activations are the same.
    UserError where each token has its own norm."""
    if not sae.norm_scale:
        raise UserError(
            "this SAE normalises each token by its own norm (normalize: unit), which weights cannot hold: train it with `-p normalize scale` to export it, or use FORMAT=safetensors."
        )
    t = {name: tensor.detach().cpu().double() for name, tensor in sae.state_dict().items()}
    mean, scale = sae.mean.cpu().double(), sae.norm_scale
    t |= {"W_enc": t["W_enc"] / scale, "W_dec": t["W_dec"] * scale, "b_dec": t["b_dec"] * scale + mean}
    if not sae.apply_b_dec_to_input:  # else the folded b_dec takes the mean away
        shift = mean @ t["W_enc"]
        t["b_enc"] = t["b_enc"] - shift
        if "b_mag" in t:
            t["b_mag"] = t["b_mag"] - t["r_mag"].exp() * shift
    return t


def saelens_files(sae: sae_utils.SAE, about: dict):
    """Yields (name, content) of a folder that SAELens 6 loads with SAE.load_from_disk."""
    kind = {"relu": "standard", "topk": "topk", "gated": "gated"}.get(sae.architecture, "jumprelu")
    tensors, config, metrics = folded(sae), sae.config, about.get("metrics", {})
    names = FORMATS["saelens"].tensors[kind]
    data = metrics.get("data", {})
    metadata = {
        "sae_lens_version": "6.54.12",  # whose layout this is; without it SAELens takes the folder for one of before 6.0
        "sae_lens_training_version": None, "model_name": config.get("model_name"), "hook_name": config.get("hook_name"),
        "model_class_name": "AutoModelForCausalLM", "context_size": config.get("seq_len") or None, "prepend_bos": data["bos_tokens"] > 0 if "bos_tokens" in data else None,
        "dataset_path": config.get("dataset_name"), "exclude_special_tokens": True, "training_architecture": sae.architecture,
        "training_settings": about.get("settings"), "trained_on_rows": metrics.get("train_rows") if "settings" in about else None,
        "run": about["run"], "l0": metrics.get("l0"), "fvu": metrics.get("fvu"), "num_dead_features": round(metrics["dead"] * sae.d_sae) if "dead" in metrics else None,
    }  # fmt: skip
    topk = {"k": sae.k, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {}
    yield "cfg.json", {
        "architecture": kind, "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none", "reshape_activations": "none", **topk, "metadata": {name: value for name, value in metadata.items() if value is not None},
    }  # fmt: skip
    yield "sae_weights.safetensors", {theirs: tensors[name] for name, theirs in names.items()}
    yield "sparsity.safetensors", {"sparsity": torch.log10(sae.density.cpu().double() + NEVER)}


def plain_files(sae: sae_utils.SAE, about: dict):
    """Yields (name, content): the tensors as they are, and whatever is no tensor."""
    shape = {"architecture": sae.architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "k": sae.k, "apply_b_dec_to_input": sae.apply_b_dec_to_input}
    figures = {name: about.get("metrics", {}).get(name) for name in ("fvu", "l0", "dead", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl")}
    encode = "acts = f((x - mean) / norm_scale @ W_enc + b_enc), x_hat = (acts @ W_dec + b_dec) * norm_scale + mean; norm_scale 0: each token's own norm"
    yield "sae.json", {"run": about["run"], "formula": encode, **shape, "norm_scale": sae.norm_scale, "figures": figures, "config": sae.config}
    yield "weights.safetensors", {**sae.state_dict(), "mean": sae.mean, "density": sae.density, "max_act": sae.max_act}


def neuronpedia_files(sae: sae_utils.SAE, about: dict, at_a_time: int = 128):
    """Yields (name, content) of the files that SAEDashboard's NeuronpediaRunner writes, with its names of fields, and that
    Neuronpedia's uploader takes. Counts in a histogram are estimates: shares of the sample that features.npz kept."""
    if "features" not in about:
        raise UserError(f"{about['run']} has no features.npz: FORMAT=neuronpedia is made of it.")
    found, config, metrics = about["features"], sae.config, about.get("metrics", {})
    texts, rounded = lambda tokens: [str(about["as_text"](int(token))) for token in tokens], lambda values: [round(float(value), 3) for value in values]
    rows, live = metrics.get("rows", 0), np.flatnonzero(np.asarray(found["density"]) > 0)
    head = {"model_id": Path(str(config.get("model_name"))).name, "layer": config.get("layer"), "sae_set": about["run"], "sae_id_suffix": None}
    data = {"n_prompts_total": metrics.get("data", {}).get("windows", 0), "n_tokens_in_prompt": config.get("seq_len", 0), "dataset": config.get("dataset_name", "")}
    middle, n_top = found["tokens"].shape[2] // 2, found["top_rows"].shape[1]

    def activation(latent: int, place: int, bounds: dict) -> dict:
        tokens, acts = found["tokens"][latent, place], found["acts"][latent, place]
        return {**bounds, "tokens": texts(tokens[tokens >= 0]), "values": rounded(acts[tokens >= 0]), "qualifying_token_index": int((tokens[:middle] >= 0).sum())}

    def feature(latent: int) -> dict:
        highest, bars, starts = float(max(found["max_act"][latent], found["top_values"][latent, 0])), found["histogram"][latent], found["decile_values"][latent, :, 0]
        places = [activation(latent, place, {"bin_min": -1, "bin_max": 99, "bin_contains": -1}) for place in range(n_top) if found["top_rows"][latent, place] >= 0]
        deciles = np.flatnonzero(starts > 0).tolist()
        for i, end in zip(deciles, [*starts[deciles[1:]], highest], strict=bool(deciles)):
            places.append(activation(latent, n_top + i, {"bin_min": float(starts[i]), "bin_max": float(end), "bin_contains": 0.1}))
        listed = {f"{kind}_{part}": [] for kind in ("neuron_alignment", "correlated_neurons", "correlated_features") for part in ("indices", "l1")}
        listed |= {"neuron_alignment_values": [], "correlated_neurons_pearson": [], "correlated_features_pearson": []}
        return {
            "feature_index": latent, **listed,
            "neg_str": texts(found["suppressed"][latent]), "neg_values": rounded(found["suppressed_by"][latent]),
            "pos_str": texts(found["promoted"][latent]), "pos_values": rounded(found["promoted_by"][latent]),
            "frac_nonzero": float(found["density"][latent]),
            "freq_hist_data_bar_values": rounded(highest * (np.arange(len(bars)) + 0.5) / len(bars)),
            "freq_hist_data_bar_heights": [round(float(bar) * float(found["density"][latent]) * rows) for bar in bars],
            "logits_hist_data_bar_heights": [], "logits_hist_data_bar_values": [], **data, "decoder_weights_dist": [], "activations": places, "vector": [],
        }  # fmt: skip

    yield "run_settings.json", {"run": about["run"], **head, **data, "huggingface_dataset_path": data["dataset"], "n_features_at_a_time": at_a_time}
    dead = {"model_id": head["model_id"], "layer": str(head["layer"]), "sae_set": head["sae_set"], "log_sparsity": -10}
    yield "skipped_indexes.json", dead | {"skipped_indexes": np.setdiff1d(np.arange(sae.d_sae), live).tolist()}
    for number, part in enumerate(np.split(live, range(at_a_time, len(live), at_a_time))):
        yield f"batch-{number}.json", {**head, "features": [feature(int(latent)) for latent in part]}
