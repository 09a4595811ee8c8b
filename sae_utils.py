"""Sparse autoencoders (SAEs) on a transformer's MLP outputs: the code the notebooks share.

    x_unit     = (x - mean) / norm                     norm: ‖x - mean‖ of each token
    acts       = relu(x_unit @ W_enc + b_enc)          (…, d_sae), mostly zeros
    x_unit_hat = acts @ W_dec + b_dec                  rows of W_dec have unit norm
    x_hat      = x_unit_hat * norm + mean

Sections, in the order the data flows: small things, matrix products, model, activations, architectures, SAE.
notebooks/harvest.py brings text to the model and activations to the disk;
notebooks/editing.py edits latents while the model runs.
Importing this module does nothing else.
"""

from __future__ import annotations

import ast
import difflib
import errno
import hashlib
import operator
import os
import platform
import re
import sys
import warnings
import zipfile
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent
FORMAT_VERSION = 2
ONEDNN_FROM = 2**20  # multiplications of a product; in smaller ones its start costs more than it saves
REFERENCE_L1_WEIGHT = 0.35  # 3e-4 * 1152: the reference's weight against the summed squared error


class UserError(Exception):
    """A mistake the user can mend: shown as one sentence, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for this instead of its own traceback
        return [f"Error: {self}"]


class Damaged(UserError):
    """A file of ours that is not as it was written."""


# ---------------------------------------------------------------------------------------------
# Small things: mistakes, paths, files, devices, progress
# ---------------------------------------------------------------------------------------------


def resolve(path: str | Path, base: Path | None = None) -> Path:
    """The path, relative ones counted from `base`, by default the repository root, wherever the kernel was started.

    Raises UserError for what can be no path: a name of more than 255 bytes, NUL, a ~ of nobody, links in a circle.
    """
    text = str(path)
    try:
        if "\0" in text or any(len(os.fsencode(part)) > 255 for part in text.split(os.sep)):
            raise ValueError("a name has at most 255 bytes, and no NUL")
        found = ((base or ROOT) / Path(path).expanduser()).resolve()
        if len(os.fsencode(found)) > 4000:
            raise ValueError("it is longer than 4000 bytes")
        return found
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"{text[:80]!r}{'…' * (len(text) > 80)} is no path: {getattr(error, 'strerror', None) or error}.") from None


def find(path: str | Path) -> Path:
    """As `resolve`, but for a relative path that exists from the current folder: it is that one."""
    found, here = resolve(path), Path(path).expanduser()
    return here.resolve() if str(path) and here.exists() else found


# What a disk says that is full, or that may not be written to.
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def writing(path: str | Path):
    """Turns a full disk, or one that may not be written to, into one sentence that names `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch's archives and matplotlib's PDF raise their own on top of it
        causes = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        said = next((c for c in causes if isinstance(c, OSError) and c.errno in CANNOT_WRITE), None)
        if said is None:
            raise
        cure = "make room there" if said.errno in (errno.ENOSPC, errno.EDQUOT) else "see who may write there"
        raise UserError(f"{show_path(Path(path))} could not be written ({said.strerror}): {cure}, then give the same command again.") from error


@contextmanager
def atomic(path: str | Path):
    """Gives a temporary path to write to, renamed to `path` when all went well. UserError where the disk will not have it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def digest(value) -> str:
    """SHA-256 of what plain values, tensors and arrays, and lists and dictionaries of them, hold. It stands in the files that
    a run reads back, since their readers check little: torch's takes a flipped bit for another weight."""
    found = hashlib.sha256()

    def add(v) -> None:
        if isinstance(v, dict):
            v = [x for pair in v.items() for x in pair]
        if isinstance(v, Tensor):
            v = v.detach().cpu().contiguous()
            v = v.view(torch.int16).numpy() if v.dtype == torch.bfloat16 else v.numpy()  # numpy has no bfloat16
        if isinstance(v, np.ndarray):
            found.update(f"{v.dtype.str}{v.shape}".encode())
            found.update(np.ascontiguousarray(v).data)
        elif isinstance(v, (list, tuple)):
            found.update(f"[{len(v)}]".encode())
            for x in v:
                add(x)
        else:
            found.update(f"{v!r};".encode())

    add(value)
    return found.hexdigest()


_told = []  # of files without a digest: the first one


def check_digest(found: dict, path: Path) -> dict:
    """`found` without its digest. UserError where that is another one than of the rest. Files from before digests have none,
    which is told once, on stderr."""
    rest = {name: value for name, value in found.items() if name != "digest"}
    if "digest" not in found:
        if not _told:
            _told.append(path)
            print(f"{show_path(path)} was written before files had digests: whether it is as it was then is not known (told once).", file=sys.stderr)
    elif str(found["digest"]) != digest(rest):
        raise Damaged(f"{show_path(path)} is not as it was written, its digest is another: a bad disk or copy, or changed by hand.")
    return rest


def read_torch(path: Path) -> dict:
    """What a .pth of ours holds, plain types and tensors: code in it is never run. UserError where it is damaged or none of ours."""
    try:
        with zipfile.ZipFile(path) as archive:  # its sums, before anything is made of its bytes
            damaged = archive.testzip()
        if damaged is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # the reader of zip archives and that of pickles raise many kinds
        if "Unsupported global" in str(error):
            raise UserError(f"{show_path(path)} holds objects or code beside tensors, which are never run: it is none of this project's files.") from None
        damaged = str(error).partition("\n")[0][:150] or type(error).__name__
    if damaged is not None:
        raise Damaged(f"{show_path(path)} is damaged, or none of this project's files ({damaged}).")
    return found if isinstance(found, dict) else {}


def show_path(path: Path) -> str:
    """The path as a reader would type it: relative to the repository root where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def pick_device(name: str = "") -> str:
    """`name`, or the best device there is: CUDA, then MPS, then CPU."""
    found = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    best = next(kind for kind in found if found[kind])
    kind, colon, number = (name or best).partition(":")
    if kind not in found or not found[kind] or colon and number not in map(str, range(found[kind])):
        raise UserError(f"device {name} is not available here; leave it empty to use {best}.")
    if kind != "cuda" or not colon:
        return kind
    torch.cuda.set_device(name)  # a recorded graph belongs to the current device
    return name


# ---------------------------------------------------------------------------------------------
# Matrix products
# ---------------------------------------------------------------------------------------------


@cache
def through_onednn() -> bool:
    """Whether oneDNN multiplies float32 matrices faster here than MKL, which torch asks on a CPU: MKL does without
    AVX-512 on processors that are not Intel's, oneDNN does not (`make bench PART=products`)."""
    listed = Path("/proc/cpuinfo")
    maker = listed.read_text() if listed.exists() else platform.processor()
    return "AuthenticAMD" in maker and torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, (…, n), of x (…, d), weight (n, d) and bias (n); by oneDNN where that is the faster one,
    the product is no small one, and nothing is differentiated. `out`: memory that may be used; what is returned counts.
    `torch.backends.mkldnn.flags(enabled=False)` keeps to torch's choice."""
    given = [t for t in (x, weight, bias) if t is not None]
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in given) and x.numel() * len(weight) >= ONEDNN_FROM
    # What is called below has no derivatives, and says nothing: with forward-mode ones (torch.func.jvp) they would be zero.
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in given) or torch.autograd.forward_ad._current_level >= 0
    if plain and not differentiated and torch.backends.mkldnn.enabled and not torch.compiler.is_compiling() and through_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # what torch.compile calls
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


@cache
def by_linear(kind: type) -> type:
    """The class `kind`, nn.Linear or GPT-2's Conv1D, which holds the transpose, with its product by `linear`. Pickled or
    copied its layers are of `kind` again, so that a model saved as a whole needs nothing of this project."""
    forward = lambda self, x: linear(x, self.weight if kind is nn.Linear else self.weight.T, self.bias)
    return type(kind.__name__, (kind,), {"forward": forward, "__reduce__": lambda self: (kind.__new__, (kind,), self.__dict__)})


def with_linear(model):
    """The model, its linear layers changed in place to those of `by_linear`; any other class, such as quantised ones, stays."""
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D):
            module.__class__ = by_linear(type(module))
    return model


# ---------------------------------------------------------------------------------------------
# Model: where the hook is, loading
# ---------------------------------------------------------------------------------------------

# The module whose output is the MLP's, by the config's model_type; anything else: DEFAULT_HOOK.
# Of a mixture of experts it is the whole block, which adds up what the experts say.
DEFAULT_HOOK = "model.layers.{layer}.mlp.down_proj"
HOOKS = {
    "gpt2": "transformer.h.{layer}.mlp.c_proj", "gpt_neo": "transformer.h.{layer}.mlp.c_proj", "gpt_bigcode": "transformer.h.{layer}.mlp.c_proj",
    "gptj": "transformer.h.{layer}.mlp.fc_out", "codegen": "transformer.h.{layer}.mlp.fc_out",
    "bloom": "transformer.h.{layer}.mlp.dense_4h_to_h", "falcon": "transformer.h.{layer}.mlp.dense_4h_to_h", "mpt": "transformer.blocks.{layer}.ffn.down_proj",
    "gpt_neox": "gpt_neox.layers.{layer}.mlp.dense_4h_to_h", "gpt_neox_japanese": "gpt_neox_japanese.layers.{layer}.mlp.dense_4h_to_h",
    "persimmon": "model.layers.{layer}.mlp.dense_4h_to_h", "starcoder2": "model.layers.{layer}.mlp.c_proj",
    "opt": "model.decoder.layers.{layer}.fc2", "biogpt": "biogpt.layers.{layer}.fc2", "xglm": "model.layers.{layer}.fc2",
    "phi": "model.layers.{layer}.mlp.fc2", "nanochat": "model.layers.{layer}.mlp.fc2",
    "gemma3": "model.language_model.layers.{layer}.mlp.down_proj",
    "mixtral": "model.layers.{layer}.mlp", "qwen2_moe": "model.layers.{layer}.mlp", "qwen3_moe": "model.layers.{layer}.mlp", "olmoe": "model.layers.{layer}.mlp",
    "flex_olmo": "model.layers.{layer}.mlp", "gpt_oss": "model.layers.{layer}.mlp", "phimoe": "model.layers.{layer}.mlp", "jetmoe": "model.layers.{layer}.mlp",
    "deepseek_v2": "model.layers.{layer}.mlp", "deepseek_v3": "model.layers.{layer}.mlp", "glm4_moe": "model.layers.{layer}.mlp", "dots1": "model.layers.{layer}.mlp",
    "ernie4_5_moe": "model.layers.{layer}.mlp", "minimax": "model.layers.{layer}.mlp", "solar_open": "model.layers.{layer}.mlp", "afmoe": "model.layers.{layer}.mlp",
    "hunyuan_v1_moe": "model.layers.{layer}.mlp", "minimax_m2": "model.layers.{layer}.mlp", "exaone_moe": "model.layers.{layer}.mlp", "glm4_moe_lite": "model.layers.{layer}.mlp",
    "granitemoe": "model.layers.{layer}.block_sparse_moe", "llama4_text": "model.layers.{layer}.feed_forward",
}  # fmt: skip


def use_hf_token() -> None:
    """Honours notebooks/secret_tokens.py (HF_TOKEN = "…") where the environment has no token.

    HF_TOKEN and `hf auth login` need nothing: the Hugging Face libraries read them by themselves. The file is read and
    not run, and what is wrong with it, or with a token, is said without a word of it: it would end up in notebooks.
    """
    where, token = "HF_TOKEN in the environment", os.environ.get("HF_TOKEN", "").strip()
    if not token and (file := ROOT / "notebooks" / "secret_tokens.py").exists():
        where, token = "notebooks/secret_tokens.py", _token_in(file)
        if not token:
            raise UserError('notebooks/secret_tokens.py sets no token: it should say HF_TOKEN = "…", on one line and between quotes.')
    if not re.fullmatch(r"[!-~]*", token):
        raise UserError(f"{where} is no token: it holds blanks, or letters that no token has.")
    if token:
        os.environ["HF_TOKEN"] = token


def _token_in(file: Path) -> str:
    """The text that the file gives to HF_TOKEN; "" where it does not, or is no Python."""
    try:
        with warnings.catch_warnings(action="ignore"):  # which would quote the line
            tree = ast.parse(file.read_bytes()[:100_000])
    except Exception:  # whatever it is, it may hold the line
        return ""
    given = [node.value for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign)) and "HF_TOKEN" in map(ast.unparse, getattr(node, "targets", [getattr(node, "target", None)]))]
    return given[-1].value.strip() if given and isinstance(given[-1], ast.Constant) and isinstance(given[-1].value, str) else ""


# What reading a model or a text may raise: these, and whatever the libraries define themselves. Anything else
# (TypeError, KeyError, …) is a mistake in a program, and is shown as one.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, ImportError, EOFError)
LOADERS = "huggingface_hub transformers datasets tokenizers safetensors safetensors_rust pyarrow fsspec httpx requests aiohttp yaml zipfile pickle _pickle struct".split()


def of_loading(error: BaseException) -> bool:
    """Whether a library says with this that something cannot be loaded; tokenizers raises plain Exception."""
    return isinstance(error, LOADING_ERRORS) or type(error) is Exception or type(error).__module__.partition(".")[0] in LOADERS


@contextmanager
def hub_errors(kind: str, name: str):
    """Turns what the Hugging Face libraries raise when `name` cannot be loaded into one sentence that says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not of_loading(error):
            raise
        causes = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        kinds, text = {type(cause).__name__ for cause in causes}, " ".join(str(cause) for cause in causes)
        local = Path(name).is_absolute() or resolve(name).exists()
        if not local and ("GatedRepoError" in kinds or "gated repo" in text):
            what = f"is gated: accept its licence on huggingface.co/{name}, then set HF_TOKEN or run `hf auth login`"
        elif not local and ("RepositoryNotFoundError" in kinds or "Repository Not Found" in text or "DatasetNotFoundError" in kinds):
            what = "does not exist on the Hugging Face hub, or is private: check the name, or set HF_TOKEN"
        elif not local and re.search(r"[Oo]ffline ?[Mm]ode|couldn't (connect|reach|find)|resolve host|LocalEntryNotFound|Max retries", text, re.IGNORECASE):
            what = "is not on this disk and the Hugging Face hub cannot be reached: connect (and unset HF_HUB_OFFLINE), or name a local folder"
        elif "trust_remote_code" in text:  # given as False wherever something is loaded: else transformers asks [y/N]
            raise UserError(f"{kind} {name} comes with a program of its own (trust_remote_code), which is never run here: choose one that the libraries know by themselves.") from error
        elif "RevisionNotFoundError" in kinds:
            raise UserError(f"{kind} {name} has no such revision: leave it away, or name a commit or branch that there is.") from error
        else:
            said = next((str(cause).strip() for cause in reversed(causes) if of_loading(cause) and str(cause).strip()), type(error).__name__)
            raise UserError(f"{kind} {name} could not be loaded: {said.splitlines()[0][:300]}") from error
        raise UserError(f"{kind} {name} {what}; `make demo` needs no account and no network.") from error


def local_or_hub(name: str, kind: str) -> str:
    """An absolute path where `name` is a local file or folder, else the hub id. UserError if neither."""
    if resolve(name).exists():
        return str(resolve(name))
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) or name.startswith("runs/") or name.endswith((".jsonl", ".txt")):
        hint = " (`make tiny-model` builds it)" if name.startswith("runs/tiny") else ""
        raise UserError(f"{kind} {name}: there is no such file or folder{hint}, and it is no Hugging Face id.")
    return name


def positions_of(config) -> int | None:
    """How many positions a model has, where its config says."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    return next((value for name in names if isinstance(value := getattr(config.get_text_config(), name, None), int)), None)


def find_hook(model_name: str, layer: int, hook: str = "", revision: str = "", seq_len: int = 1) -> str:
    """The name of the hooked module, such as `model.layers.6.mlp.down_proj`.

    Looks at the config and an empty skeleton only, so that a wrong layer or hook is refused before
    any weight is read, and a `seq_len` beyond the model's positions with it. `hook` is a template
    with `{layer}`; empty: the family's MLP output.
    """
    import transformers

    source = local_or_hub(model_name, "model")
    use_hf_token()
    with hub_errors("model", model_name):
        config = transformers.AutoConfig.from_pretrained(source, revision=revision or None, trust_remote_code=False)
    text_config = config.get_text_config()
    n_layers, positions = text_config.num_hidden_layers, positions_of(config)
    if positions and seq_len > positions:
        raise UserError(f"seq_len {seq_len} is more than the {positions} positions of {model_name}.")
    if not 0 <= layer < n_layers:
        raise UserError(f"layer {layer} is outside {model_name}: valid layers are 0 to {n_layers - 1}.")
    name = (hook or HOOKS.get(config.model_type, DEFAULT_HOOK)).replace("{layer}", str(layer))
    with torch.device("meta"), hub_errors("model", model_name):
        skeleton = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    modules = [n for n, _ in skeleton.named_modules() if n]
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.3)
        raise UserError(f"hook {name} matches no module of {model_name}; near matches: {', '.join(near)}.")
    return name


def load_model(model_name: str, revision: str = "", device: str = "cpu", dtype: str = "auto"):
    """(model, tokenizer), frozen and in eval mode; `dtype` auto: bfloat16 on a GPU, float32 on a CPU.

    Raises UserError where the model cannot be had, or where the checkpoint lacks weights: they
    would be random, and transformers only prints a table.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    source = local_or_hub(model_name, "model")
    use_hf_token()
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    with hub_errors("model", model_name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision or None, trust_remote_code=False)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source, revision=revision or None, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=False
        )
    if info["missing_keys"]:
        raise UserError(
            f"the checkpoint of {model_name} lacks {len(info['missing_keys'])} weights of this architecture "
            f"(such as {min(info['missing_keys'])}): they would be random, so it is refused."
        )
    return with_linear(model.to(device).eval().requires_grad_(False)), tokenizer


def special_ids(tokenizer) -> list[int]:
    """Ids of BOS, EOS, padding, unknown, turn marks, …: tokens that are not text."""
    added = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    return sorted({*tokenizer.all_special_ids, *added})


def pad(sequences: list[list[int]], side: str = "right", device: str = "cpu") -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both (batch, longest) int64. Padding is id 0: only the mask counts."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        span = slice(longest - len(sequence), longest) if side == "left" else slice(0, len(sequence))
        ids[row, span] = torch.tensor(sequence)
        mask[row, span] = 1
    return ids.to(device), mask.to(device)


# ---------------------------------------------------------------------------------------------
# Tokens in, activations out: the forward pass that stops at the hook
# ---------------------------------------------------------------------------------------------


def encode_text(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text without special tokens around it."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def with_bos(tokenizer, ids: list[int]) -> list[int]:
    """The ids with BOS in front exactly once, where the tokenizer has one."""
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


class Reached(Exception):
    """Raised in the last hook: nothing after it is computed."""


def first_output(output) -> Tensor:
    """A module's output tensor, where some modules return it as the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@torch.inference_mode()
def run_to_hooks(model, hook_names: list[str], input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The hooked modules' outputs, each (batch, seq, d_in); nothing after the last of them runs, no
    later layer, final norm or head. `attention_mask` None: no position is padding."""
    caught: dict[str, Tensor] = {}

    def catch(module, args, output, name):
        caught[name] = first_output(output).detach()
        if len(caught) == len(hook_names):
            raise Reached
        caught[name] = caught[name].clone()  # what still runs may add to it in place, as Falcon's layers do

    handles = [model.get_submodule(name).register_forward_hook(partial(catch, name=name)) for name in hook_names]
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for name in hook_names:
        if name not in caught:
            raise UserError(f"hook {name} is never called in a forward pass: name a module that computes something.")
    return [caught[name].reshape(*input_ids.shape, -1) for name in hook_names]  # OPT flattens batch and sequence


def run_to_hook(model, hook_name: str, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """`run_to_hooks` for one hook."""
    return run_to_hooks(model, [hook_name], input_ids, attention_mask)[0]


# ---------------------------------------------------------------------------------------------
# Architectures
# ---------------------------------------------------------------------------------------------


class ReLU:
    """An architecture: what an SAE keeps of its pre-activations while it trains and afterwards, what is
    minimised, and which parameters it has beside the four that all have.

    To add one, subclass this and put an instance into ARCHITECTURES; nothing else needs to know. Tensors
    of pre_acts and acts are (…, d_sae), or (…, n) for the latents `columns` (n,) alone. `weights` are the
    coefficients of the loss by name: l1_coeff, l0_weight.
    """

    name = "relu"
    knob = "l1_coeff"  # the parameter that sets how sparse it is
    alone = True  # a latent's activation hangs on no other latent's
    beta2, eps, rates = 0.999, 1e-8, {}  # Adam's, and the learning rate of a parameter as a multiple of lr, by name
    jumps = False  # used afterwards with a threshold that is not learnt by gradients

    def tensors(self, d_sae: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Further parameters and further buffers, by name."""
        return {}, {}

    def kept(self, k: int, pre_acts: Tensor, near: float = 0.0) -> Tensor:
        """Boolean, as pre_acts (batch, d_sae): what is kept in training; nothing that is not above 0. `near`: a
        value that what is kept is thought to exceed, to look there first."""
        return pre_acts > 0

    def train(self, sae: SAE, pre_acts: Tensor) -> Tensor:
        """acts in training, by autograd."""
        return torch.where(self.kept(sae.k, pre_acts), pre_acts, 0.0)

    def acts(self, sae: SAE, pre_acts: Tensor, columns) -> Tensor:
        """acts afterwards."""
        return pre_acts.relu()

    def ends(self, d_sae: int) -> list[int]:
        """How many latents each reconstruction uses whose mse counts; the last is all."""
        return [d_sae]

    def loss(self, sae: SAE, x_unit: Tensor, pre_acts: Tensor, acts: Tensor, weights: dict[str, float]) -> Tensor:
        """What is minimised, but for AuxK: the mean mse of the reconstructions, and what makes it sparse."""
        errors = [(acts[:, :end] @ sae.W_dec[:end] + sae.b_dec - x_unit).square().mean() for end in self.ends(sae.d_sae)]
        return torch.stack(errors).mean() + self.penalty(sae, x_unit, pre_acts, acts, weights)

    def penalty(self, sae: SAE, x_unit: Tensor, pre_acts: Tensor, acts: Tensor, weights: dict[str, float]) -> Tensor | float:
        return weights["l1_coeff"] * acts.sum(-1).mean()


class TopK(ReLU):
    """The k largest of each token (Gao et al. 2024).

    Adam's settings are those that did best of some 30 tried on one layer of a real model (tests/README.md, "Recipes"): a decoder four
    times as fast as the encoder, slow biases. A latent that fires a few times a batch has gradients of about the usual eps.
    """

    name, knob, alone = "topk", "k", False
    beta2, eps, rates = 0.95, 1e-12, {"W_dec": 4.0, "b_enc": 0.2, "b_dec": 0.2}

    def kept(self, k, pre_acts, near=0.0):
        index = pre_acts.topk(k, sorted=False).indices
        return torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(-1, index, True) & (pre_acts > 0)

    def acts(self, sae, pre_acts, columns):
        return torch.where(self.kept(sae.k, pre_acts), pre_acts, 0.0)

    def penalty(self, *args):
        return 0.0


class BatchTopK(TopK):
    """The k * batch largest of the batch, ties included; afterwards what exceeds a threshold (Bussmann et al. 2024)."""

    name, alone, jumps = "batchtopk", True, True

    def tensors(self, d_sae):
        return {}, {"threshold": torch.zeros(d_sae)}

    def kept(self, k, pre_acts, near=0.0):
        candidates, wanted = pre_acts.flatten(), k * len(pre_acts)
        if pre_acts.device.type == "cpu":  # the largest of few are found much faster: of those above a value that enough exceed
            sample = candidates[:: -(-len(candidates) // 2**20)]
            guess = near or sample.topk(min(len(sample), -(-2 * wanted * len(sample) // len(candidates))), sorted=False).values.min()
            among = pre_acts > guess
            if guess > 0 and among.sum() >= wanted:
                candidates = candidates[nonzero_flat(among)]
        cutoff = candidates.topk(wanted, sorted=False).values.min()
        return (pre_acts >= cutoff) & (pre_acts > 0)

    def acts(self, sae, pre_acts, columns):
        return torch.where(pre_acts > sae.threshold[columns], pre_acts, 0.0)


class Matryoshka(BatchTopK):
    """BatchTopK of which the first sixteenth, eighth, quarter and half of the latents reconstruct on their own too
    (Bussmann et al. 2025)."""

    name = "matryoshka"

    def ends(self, d_sae):
        return sorted({max(1, round(share * d_sae)) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)})


class JumpReLU(ReLU):
    """What exceeds a threshold of its own, which is learnt (Rajamanoharan et al. 2024): the gradient passes through
    the step as if it were a ramp `bandwidth` wide around the threshold. The penalty is l0_weight / d_in times L0;
    with a k, times k (L0 / k - 1)², so that L0 settles near k (the form of Gemma Scope 2)."""

    name, knob = "jumprelu", "k"
    bandwidth = 0.03  # in units of x_unit's norm, which is about 1
    beta2, rates = TopK.beta2, TopK.rates  # at first L0 is far above k: a second moment that remembers this for 1,000 steps lets no threshold move

    def tensors(self, d_sae):
        return {"threshold": torch.full((d_sae,), 1e-3)}, {}

    def train(self, sae, pre_acts):
        return _Jump.apply(pre_acts, sae.threshold, self.bandwidth)

    def acts(self, sae, pre_acts, columns):
        return torch.where(pre_acts > sae.threshold[columns].clamp_min(0), pre_acts, 0.0)

    def penalty(self, sae, x_unit, pre_acts, acts, weights):
        l0 = _Step.apply(pre_acts, sae.threshold, self.bandwidth).sum(-1).mean()
        return weights["l0_weight"] / sae.d_in * (sae.k * (l0 / sae.k - 1).square() if sae.k else l0)


class _Step(torch.autograd.Function):
    """1 where pre_acts exceed the threshold (and 0); to the threshold its gradient is that of a ramp."""

    @staticmethod
    def forward(ctx, pre_acts, threshold, bandwidth):
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold.clamp_min(0)).to(pre_acts)

    @staticmethod
    def backward(ctx, gradient):
        pre_acts, threshold = ctx.saved_tensors
        inside = ((pre_acts - threshold).abs() < ctx.bandwidth / 2).to(gradient)
        return None, -(gradient * inside).sum(0) / ctx.bandwidth, None


class _Jump(torch.autograd.Function):
    """pre_acts where `_Step` is 1; to pre_acts the plain gradient, to the threshold that of `_Step` times its height."""

    @staticmethod
    def forward(ctx, pre_acts, threshold, bandwidth):
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre_acts > threshold.clamp_min(0), pre_acts, 0.0)

    @staticmethod
    def backward(ctx, gradient):
        pre_acts, threshold = ctx.saved_tensors
        inside = ((pre_acts - threshold).abs() < ctx.bandwidth / 2).to(gradient)
        kept = (pre_acts > threshold.clamp_min(0)).to(gradient)
        return gradient * kept, -(gradient * inside).sum(0) * threshold / ctx.bandwidth, None


class Gated(ReLU):
    """A latent's sign of life and its strength apart, so that the L1 penalty shrinks nothing (Rajamanoharan et al.
    2024): it fires where pre_acts > 0, as strongly as relu(exp(r_mag) * (pre_acts - b_enc) + b_mag). The
    penalty is on relu(pre_acts), which also have to reconstruct, through a decoder that is held fixed."""

    name = "gated"

    def tensors(self, d_sae):
        return {"r_mag": torch.zeros(d_sae), "b_mag": torch.zeros(d_sae)}, {}

    def train(self, sae, pre_acts):
        return self.acts(sae, pre_acts, slice(None))

    def acts(self, sae, pre_acts, columns):
        strength = sae.r_mag[columns].exp() * (pre_acts - sae.b_enc[columns]) + sae.b_mag[columns]
        return torch.where(pre_acts > 0, strength.relu(), 0.0)

    def penalty(self, sae, x_unit, pre_acts, acts, weights):
        gate = pre_acts.relu()
        held = gate @ sae.W_dec.detach() + sae.b_dec.detach()
        return weights["l1_coeff"] * gate.sum(-1).mean() + (held - x_unit).square().mean()


ARCHITECTURES = {rule.name: rule for rule in (ReLU(), TopK(), BatchTopK(), Matryoshka(), JumpReLU(), Gated())}


def nonzero_flat(mask: Tensor) -> Tensor:
    """Positions of the True entries in the flattened mask, ascending.

    Looks at eight entries at a time first: where few are True this is several times faster.
    """
    if mask.numel() % 8 or not mask.is_contiguous():
        return mask.flatten().nonzero().flatten()
    words = mask.view(-1).view(torch.int64).nonzero().flatten()
    inside = mask.view(-1, 8)[words].nonzero()
    return words[inside[:, 0]] * 8 + inside[:, 1]


# ---------------------------------------------------------------------------------------------
# SAE
# ---------------------------------------------------------------------------------------------


class SAE(nn.Module):
    """The autoencoder of this module's first lines.

    W_enc (d_in, d_sae), b_enc (d_sae), W_dec (d_sae, d_in), b_dec (d_in), and what the architecture
    has beside these; float32 throughout. Both biases start at zero, rows of W_dec as random unit vectors,
    W_enc as W_dec's transpose (`fit_scale` then makes it the length that fits). `architecture`, one of
    ARCHITECTURES, says what becomes of pre_acts.
    `mean` (d_in) and `norm_scale` (0: each token's own norm) are what activations are normalised by;
    `density` and `max_act` (d_sae) are measured after training. `config` holds plain types only.
    """

    def __init__(
        self, d_in: int, d_sae: int, *, seed: int = 0, architecture: str = "relu", k: int = 0, norm_scale: float = 0.0, apply_b_dec_to_input: bool = False
    ):
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise UserError(f"there is no architecture {architecture!r}; there are: {', '.join(ARCHITECTURES)}.")
        self.architecture, self.rule = architecture, ARCHITECTURES[architecture]
        rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.clone().T)  # in memory as W_dec, which training profits from
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        for name, size in (("mean", d_in), ("density", d_sae), ("max_act", d_sae)):
            self.register_buffer(name, torch.zeros(size), persistent=False)
        parameters, buffers = self.rule.tensors(d_sae)
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor))
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
        self.k = k if self.rule.knob == "k" else 0
        self.norm_scale, self.apply_b_dec_to_input, self.config = norm_scale, apply_b_dec_to_input, {}

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raw x (…, d_in) -> x_unit (…, d_in) and norm (…, 1), in float32."""
        centred = x.float() - self.mean
        norm = centred.norm(dim=-1, keepdim=True)
        if self.norm_scale:
            norm = torch.full_like(norm, self.norm_scale)
        return centred / norm.clamp_min(1e-8), norm

    def denormalise(self, x_unit: Tensor, norm: Tensor) -> Tensor:
        return x_unit * norm + self.mean

    def pre_acts(self, x_unit: Tensor, columns=slice(None)) -> Tensor:
        """What the encoder makes of normalised activations, before the architecture has its say."""
        return linear(x_unit - self.b_dec if self.apply_b_dec_to_input else x_unit, self.W_enc[:, columns].T, self.b_enc[columns])

    def encode_unit(self, x_unit: Tensor, columns: Tensor | None = None) -> Tensor:
        """acts (…, d_sae) of normalised activations; only those of the latents `columns` (n,), (…, n), where given."""
        if columns is not None and not self.rule.alone:
            return self.encode_unit(x_unit)[..., columns]
        of = slice(None) if columns is None else columns
        return self.rule.acts(self, self.pre_acts(x_unit, of), of)

    def decode_unit(self, acts: Tensor) -> Tensor:
        return linear(acts, self.W_dec.T, self.b_dec)

    def encode(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """acts (…, d_sae), in the SAE's normalised units, of raw activations x (…, d_in); `columns` as in `encode_unit`."""
        return self.encode_unit(self.normalise(x)[0], columns)

    def forward(self, x: Tensor) -> Tensor:
        """Raw activations (…, d_in) -> their reconstruction, in the same units."""
        x_unit, norm = self.normalise(x)
        return self.denormalise(self.decode_unit(self.encode_unit(x_unit)), norm)

    @torch.no_grad()
    def fit_scale(self, x_unit: Tensor, share: float = 0.5) -> float:
        """Multiplies W_enc, and a threshold, by `share` of the number that makes the first reconstruction of x_unit (n, d_in)
        fit best, and returns the factor. Before training only: of ReLU, the transpose as it is gives d_sae / (2 d_in) times
        too much. Half, since from there fewer latents die and more known directions are found (tests/README.md)."""
        acts = self.rule.train(self, self.pre_acts(x_unit))
        x_unit_hat = linear(acts, self.W_dec.T)
        scale = share * ((x_unit * x_unit_hat).sum() / x_unit_hat.square().sum().clamp_min(1e-12)).item()
        for tensor in (self.W_enc, *([self.threshold] if hasattr(self, "threshold") else [])):
            tensor.mul_(scale)
        return scale

    def save(self, path: str | Path) -> None:
        """Writes sae.pth: plain types and tensors only, so that `weights_only=True` loads it."""
        cpu = lambda t: t.detach().cpu().clone()
        content = {
            "state_dict": {name: cpu(t) for name, t in self.state_dict().items()},
            "activation_mean": cpu(self.mean), "norm_scale": self.norm_scale,
            "density": cpu(self.density), "max_act": cpu(self.max_act),
            "config": {**self.config, "architecture": self.architecture, "k": self.k, "apply_b_dec_to_input": self.apply_b_dec_to_input},
            "format_version": FORMAT_VERSION,
        }  # fmt: skip
        with atomic(path) as temporary, temporary.open("wb") as file:
            torch.save(content | {"digest": digest(content)}, file)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> SAE:
        """The SAE that `save` wrote; a relative path counts from the current folder, or else from the repository root. Raises
        UserError where the file is damaged, holds anything but plain types and tensors (code in it is never run), is of
        another format, or where a part is missing, is not finite, or is of the wrong shape or type."""
        file, here = find(path), Path.cwd() / Path(path).expanduser()
        path, again = show_path(file), "copy the file again, or `make remove` its run and train it again"
        try:
            saved = read_torch(file)
        except OSError:
            where = "" if here.resolve() == file else f", nor at {here}"
            raise UserError(f"there is no SAE at {path}{where}.") from None
        except UserError as error:
            raise UserError(f"{str(error).removesuffix('.')}: {again}.") from None
        if "format_version" not in saved:
            raise UserError(f"{path} is no SAE of this project: it has no format_version.")
        if type(saved["format_version"]) is not int or saved["format_version"] != FORMAT_VERSION:
            raise UserError(f"{path} has format {saved['format_version']!r}, this code reads {FORMAT_VERSION}: train it again.")
        if wrong := _wrong_parts(saved):
            raise UserError(f"{path} is no whole SAE: it {', '.join(wrong)}; {again}.")
        try:
            saved = check_digest(saved, file)
        except UserError as error:
            raise UserError(f"{str(error).removesuffix('.')}: {again}.") from None
        state, config = saved["state_dict"], saved["config"]
        shape = {name: config[name] for name in ("architecture", "k", "apply_b_dec_to_input")}
        sae = cls(*state["W_enc"].shape, norm_scale=float(saved["norm_scale"]), **shape)
        sae.load_state_dict(state)
        sae.mean, sae.density, sae.max_act, sae.config = saved["activation_mean"], saved["density"], saved["max_act"], config
        return sae.to(device).eval().requires_grad_(False)


def _wrong_parts(saved: dict) -> list[str]:
    """What is wrong with the parts of an sae.pth, each in a few words that follow "it"."""
    number = lambda value, kind: isinstance(value, kind) and not isinstance(value, bool)
    lacks = lambda there, names, where="": [f"lacks {', '.join(missing)}{where}"] if (missing := [name for name in names if name not in there]) else []
    found = lacks(saved, ("state_dict", "activation_mean", "norm_scale", "density", "max_act", "config"))
    if found or not all(isinstance(saved[name], dict) for name in ("state_dict", "config")):
        return found or ["holds a state_dict or config that is none"]
    state, config, scale = saved["state_dict"], saved["config"], saved["norm_scale"]
    if found := lacks(config, ("architecture", "k", "apply_b_dec_to_input"), " in its config"):
        return found
    found = [f"has norm_scale {scale!r}, which is no finite number from 0"] * (not number(scale, (int, float)) or not 0 <= scale <= torch.finfo(torch.float32).max)
    rule = ARCHITECTURES.get(config["architecture"]) if isinstance(config["architecture"], str) else None
    found += [f"has architecture {config['architecture']!r}, which is none of {', '.join(ARCHITECTURES)}"] * (rule is None)
    found += [f"has apply_b_dec_to_input {config['apply_b_dec_to_input']!r}, which is not true or false"] * (type(config["apply_b_dec_to_input"]) is not bool)
    found += [f"has a config of which the name {name!r} is no text" for name in config if not isinstance(name, str)]
    matrix = state.get("W_enc")
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or not matrix.numel():
        return [*found, "has no matrix W_enc"]
    d_in, d_sae = matrix.shape
    if rule is not None and not (number(config["k"], int) and (rule.name == "topk") <= config["k"] <= d_sae):
        found.append(f"has k {config['k']!r} for {d_sae} latents")
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= {name: tuple(tensor.shape) for kind in (rule.tensors(d_sae) if rule else ()) for name, tensor in kind.items()}
    found += [f"holds {name}, which it should not" for name in state if rule and name not in shapes]
    beside = {"activation_mean": (d_in,), "density": (d_sae,), "max_act": (d_sae,)}
    for name, wanted in (shapes | beside).items():
        there = saved if name in beside else state
        value = there.get(name)
        if name not in there:
            found.append(f"lacks {name}")
        elif not isinstance(value, Tensor) or tuple(value.shape) != wanted:
            found.append(f"has {name} of shape {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}, not {wanted}")
        elif value.dtype != torch.float32:
            found.append(f"has {name} in {str(value.dtype).removeprefix('torch.')}, not float32")
        elif value.layout != torch.strided or value.is_meta:
            found.append(f"has {name} as {'no numbers' if value.is_meta else 'a sparse tensor'}")
        elif not torch.isfinite(value).all():
            found.append(f"has NaN or infinite values in {name}")
        elif name in ("density", "max_act") and (value.min() < 0 or name == "density" and value.max() > 1):
            found.append(f"has {name} outside of what it can be")
    return found


def check_latent(latent, d_sae: int) -> int:
    """The latent's number. Raises UserError where it is no whole number from 0 to d_sae - 1."""
    try:
        number = -1 if isinstance(latent, bool) else operator.index(latent)
    except TypeError:
        number = -1
    if not 0 <= number < d_sae:
        raise UserError(f"latent {latent!r} is not one of this SAE: valid latents are 0 to {d_sae - 1}.")
    return number
