"""Whether a model will do, before its weights are fetched and before anything long begins: `make check`.

Each check of CHECKS is one line, with ok or what to do. Of a model on the hub that is not on this disk only the
config and the tokenizer are fetched; whatever needs a pass of the model is then tried on random weights of its
shape, since none of it hangs on what the weights are.
"""

import itertools
import json
import shutil
import time
from functools import cached_property, partial
from pathlib import Path

import huggingface_hub
import jinja2
import torch
import transformers

import budget
import editing
import fidelity
import harvest
import patching
import sae_utils
import showing
from sae_utils import UserError, hub_errors
from showing import in_bytes

SENTENCES = [
    "The history of the town begins with a bridge. It was built of wood, burned twice, and was built again of stone by the people who lived on both banks of the river.",
    "In the spring of that year the two brothers left the house of their father, and neither of them wrote a letter for a long time.",
    "She counted the boats.",
]
LONGEST, NEW = 64, 4  # tokens of a window on which passes are compared, and tokens written where scopes are tried


class Found:
    """What the checks have found so far; each leaves here what later ones need."""

    def __init__(self, params: dict):
        self.params, self.documents, self.documents_are = params, SENTENCES, "built-in sentences"

    @cached_property
    def windows(self) -> list[list[int]]:
        """Three windows of the text, the shortest among them, so that a batch has padding."""
        of = min(LONGEST, self.params["seq_len"])
        windows = harvest.Windows(*(harvest.cut_windows(self.tokenizer, self.documents, of, 16 * of, self.params["chat"])[0][name] for name in ("flat", "starts")))
        return [*sorted(windows, key=len)[:1], *windows][:3]

    @cached_property
    def prompt(self) -> list[int]:
        """The text's first words; with `chat` as the user's turn."""
        document = self.documents[0] if isinstance(self.documents[0], str) else str(self.documents[0][0].get("content", ""))
        words = " ".join(document.split()[:8])
        return patching.encode_prompts(self.tokenizer, [words], self.params["chat"])[0]

    def shown(self, places: list[int], ids: list[int]) -> str:
        """Some of the tokens `ids` as text, a bar between any two."""
        text = showing.TokenText(self.tokenizer)
        return "|".join(showing.visible(piece) for piece in showing.whole([text(ids[place]) for place in places]))


# ---------------------------------------------------------------------------------------------
# Without weights
# ---------------------------------------------------------------------------------------------


def access(params: dict, found: Found) -> str:
    name, revision = params["model_name"], params["model_revision"] or None
    found.source = sae_utils.local_or_hub(name, "model")
    sae_utils.use_hf_token()
    with hub_errors("model", name):
        plain, _ = transformers.PreTrainedConfig.get_config_dict(found.source, revision=revision)
        if not plain:
            raise UserError(f"model {name} has no config.json: name a model in Hugging Face's format.")
        if "auto_map" in plain and plain.get("model_type") not in transformers.CONFIG_MAPPING:
            raise UserError(f"model {name} comes with a program of its own (trust_remote_code), which is never run here: choose a model that transformers knows by itself.")
        config = transformers.AutoConfig.from_pretrained(found.source, revision=revision, trust_remote_code=False)
    if config.is_encoder_decoder or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "an encoder and a decoder" if config.is_encoder_decoder else "no head that writes text"
        raise UserError(f"model {name} ({config.model_type}) has {kind}: a causal language model is needed.")
    found.config = config
    return f"{config.model_type}, {'a local folder' if Path(found.source).is_dir() else 'on the Hugging Face hub'}"


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """(files, missing ones) that transformers loads from a folder; of each file it would look for, in its order."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        names = [name] if (folder / name).is_file() else sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
        if names:
            return [folder / n for n in names if (folder / n).is_file()], [n for n in names if not (folder / n).is_file()]
    return [], ["model.safetensors"]


def weights(params: dict, found: Found) -> str:
    name, revision, found.here = params["model_name"], params["model_revision"] or None, False
    local = Path(found.source).is_dir()
    cached = None if local else huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    files, missing = weight_files(Path(found.source) if local else Path(cached).parent) if local or isinstance(cached, str) else ([], ["all"])
    if not missing:
        found.here = True
        return f"on this disk, {in_bytes(sum(file.stat().st_size for file in files))} in {len(files)} file{'s' * (len(files) > 1)}"
    if local:
        raise UserError(f"{name} lacks {', '.join(missing[:3])}{' and more' * (len(missing) > 3)}: copy the weights there; until then random ones stand for them below.")
    with hub_errors("model", name):
        listed = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True, timeout=20).siblings
    sizes = {file.rfilename: file.size or 0 for file in listed}
    chosen = next(filter(None, ([n for n in sizes if n.startswith(start) and n.endswith(end)] for start, end in (("model", ".safetensors"), ("pytorch_model", ".bin")))), [])
    if not chosen:
        raise UserError(f"{name} has no model*.safetensors or pytorch_model*.bin on the hub: choose a repository with weights for transformers.")
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    size, free = sum(sizes[n] for n in chosen), shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if size > free:
        raise UserError(f"{in_bytes(size)} would be fetched, and {cache} has {in_bytes(free)} free: make room, or set HF_HOME to another disk.")
    return f"not here yet: {in_bytes(size)} to fetch in {len(chosen)} file{'s' * (len(chosen) > 1)}, {in_bytes(free)} free; random weights of this shape stand for them below"


def tokenizer(params: dict, found: Found) -> str:
    with hub_errors("tokenizer of", params["model_name"]):
        found.tokenizer = own = transformers.AutoTokenizer.from_pretrained(found.source, revision=params["model_revision"] or None, trust_remote_code=False)
    rows, highest = found.config.get_text_config().vocab_size, max(own.get_vocab().values())
    if highest >= rows:
        raise UserError(f"the tokenizer's ids go up to {highest:,}, and the model has {rows:,}: they do not belong together; name a model with its own tokenizer.")
    said = [f"{len(own):,} tokens"]
    if own.bos_token_id is None:
        said.append("no BOS: the first token of each window is left out in its place")
    else:
        by_itself = own(SENTENCES[0])["input_ids"][:2].count(own.bos_token_id)
        ids = sae_utils.with_bos(own, sae_utils.encode_text(own, SENTENCES[:1])[0])
        if ids[:2].count(own.bos_token_id) != 1:
            raise UserError(f"a text begins with BOS {own.bos_token!r} twice: its own tokenizer.json adds it even where no special token is asked for; mend that.")
        said.append(f"BOS {own.bos_token!r} once in front" + ("" if by_itself else " (added here; by itself the tokenizer has none)"))
    said.append(f"padding {own.pad_token!r}" if own.pad_token else "no padding token, and none is needed: what is padding is masked")
    return ", ".join(said)


def template(params: dict, found: Found) -> str:
    own = found.tokenizer
    if not own.chat_template and not params["chat"]:
        return "none: text is read as it is"
    try:
        ids = patching.encode_prompts(own, [SENTENCES[2]], True)[0]
        wrong = f"a templated prompt begins with BOS {own.bos_token!r} twice" if own.bos_token and ids[:2].count(own.bos_token_id) != 1 else ""
    except jinja2.TemplateError as error:  # the model's own program
        wrong = f"the chat template refuses a single question of the user's ({error})"
    if wrong and params["chat"]:
        raise UserError(f"{wrong}: mend chat_template, or use another model.")
    if wrong:
        return f"{wrong}; it is not used unless chat is true"
    special, ends = set(sae_utils.special_ids(own)), ids[-4:]
    as_text = [repr(found.shown([place], ends)) for place, token in enumerate(ends) if token not in special]
    return f"a prompt ends in {found.shown(range(len(ends)), ends)}, of which {', '.join(as_text) or 'nothing'} counts as text"


def text(params: dict, found: Found) -> str:
    try:
        documents = harvest.open_text(params | {"n_activations": 0}, streamed_from=0)
        found.documents = list(itertools.islice(documents, 8))
    except UserError as error:
        raise UserError(f"{error} (Below {found.documents_are} stand for it.)") from None
    found.documents_are = params["dataset_name"]
    return f"begins {str(found.documents[0])[:60].strip()!r}"


def hook(params: dict, found: Found) -> str:
    layers = getattr(found.config.get_text_config(), "num_hidden_layers", None)
    if layers is None:
        raise UserError(f"the config of {params['model_name']} does not say how many layers it has: name the module with -p hook in a model whose config does.")
    found.hook = sae_utils.find_hook(params["model_name"], params["layer"], params["hook"], params["model_revision"], params["seq_len"])
    return f"{found.hook}, of layers 0 to {layers - 1}"


# ---------------------------------------------------------------------------------------------
# With a model in memory
# ---------------------------------------------------------------------------------------------


def model(params: dict, found: Found) -> str:
    device = sae_utils.pick_device(params["device"])
    dtype = getattr(torch, ("float32" if device == "cpu" else "bfloat16") if params["dtype"] == "auto" else params["dtype"])
    with torch.device("meta"):
        count = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(found.config).parameters())
    needed, free = count * dtype.itemsize, budget.free_memory(device)
    if needed > free:
        raise UserError(f"{count / 1e9:.1f}e9 parameters in {dtype} need {in_bytes(needed)}, and {in_bytes(free)} of memory are free on {device}: close other programs, or try -p dtype bfloat16.")
    begin = time.perf_counter()
    if found.here:
        found.model, _ = sae_utils.load_model(params["model_name"], params["model_revision"], device, params["dtype"])
    else:
        found.model = transformers.AutoModelForCausalLM.from_config(found.config, dtype=dtype).to(device).eval().requires_grad_(False)
    how = "loaded" if found.here else "made with random weights"
    return f"{count / 1e6:,.2f}M parameters, {how} in {time.perf_counter() - begin:.0f} s, {in_bytes(needed)} in {str(dtype).removeprefix('torch.')} on {device}"


def after(params: dict, found: Found) -> str:
    name = fidelity.post_norm_name(found.model, found.hook)
    if not name:
        return "nothing changes the hook's output before it is added to the residual stream"
    return f"{name} changes the hook's output before it is added to the residual stream: SAEs published for its output are not comparable (-p hook reads it there)"


def shape(params: dict, found: Found) -> str:
    config, rule = found.config.get_text_config(), sae_utils.ARCHITECTURES[params["architecture"]]
    width = sae_utils.run_to_hook(found.model, found.hook, torch.tensor([[0, 1]], device=found.model.device), None).shape[-1]
    latents = params["expansion"] * width
    if rule.knob == "k" and params["k"] > latents:
        raise UserError(f"k {params['k']} is more than the {latents} latents there are: lower k or raise expansion.")
    budget.refuse_what_does_not_fit(width, latents, params["batch_size"], found.model.device.type)
    found.sae = sae_utils.SAE(width, latents, architecture=params["architecture"], k=params["k"]).to(found.model.device).requires_grad_(False)
    return f"activations {width:,} wide, {config.num_hidden_layers} layers, vocabulary {config.vocab_size:,}; {latents:,} latents at expansion {params['expansion']}"


def apart(x: torch.Tensor, other: torch.Tensor) -> float:
    """The largest distance of two rows, as a share of the row's own length."""
    return ((x.float() - other.float()).norm(dim=-1) / x.float().norm(dim=-1).clamp_min(1e-30)).max().item()


def same_bits(x: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@torch.inference_mode()
def stop(params: dict, found: Found) -> str:
    own, caught = found.model, []
    ids, mask = sae_utils.pad(found.windows, device=own.device)
    stopped = sae_utils.run_to_hook(own, found.hook, ids, mask)
    handle = own.get_submodule(found.hook).register_forward_hook(lambda module, args, out: caught.append(sae_utils.first_output(out).clone()))
    try:
        own(input_ids=ids, attention_mask=mask, use_cache=False)
        for window in found.windows:
            own(input_ids=torch.tensor([window[:-1]], device=own.device), use_cache=False)
    finally:
        handle.remove()
    real, most = mask.bool(), 1e-3 if own.dtype == torch.float32 else 0.05
    whole, rows = caught[0].reshape(stopped.shape)[real], stopped[real]
    if not rows.isfinite().all() or not rows.any():
        raise UserError(f"what {found.hook} returns is {'zero everywhere' if rows.isfinite().all() else 'inf or NaN'}: choose another hook or dtype.")
    if (far := apart(whole, rows)) > most:
        raise UserError(f"{found.hook} returns another output when the pass stops there than in a whole pass ({far:.2g} of a row's length): this model does not repeat itself; choose another.")
    shorter = torch.cat([x[: len(window) - 1] for x, window in zip(stopped, found.windows, strict=True)])
    alone = apart(torch.cat([x.reshape(-1, rows.shape[1]) for x in caught[1:]]), shorter)
    if alone > most:
        raise UserError(f"rows of a padded batch differ from those of each window alone, without its last token, by {alone:.2g} of their length: padding or what comes later has a say; choose another model.")
    equal = "the same bits as" if same_bits(whole, rows) else f"within {far:.1g} of"
    return f"{equal} the whole pass on {len(rows)} tokens of {found.documents_are}; each window alone and cut shorter differs by {alone:.1g} of a row's length at most"


@torch.inference_mode()
def empty_patch(params: dict, found: Found) -> str:
    ids, mask = sae_utils.pad(found.windows, device=found.model.device)
    call = lambda: found.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    patched = partial(editing.intervene, found.model, found.hook, found.sae, found.tokenizer)
    before = call()
    for nothing in (lambda acts: acts, editing.amplify([0], 1.0)):
        with patched(nothing):
            if not same_bits(now := call(), before):
                raise UserError(f"logits change by up to {(now.float() - before.float()).abs().max():.2g} where nothing is edited: this model does not repeat itself, so no effect could be trusted; choose another.")
    with patched(editing.set_value([0], 10.0)):
        if same_bits(now := call(), before):
            raise UserError(f"an edit at {found.hook} changes no logit: what it returns is not used; choose another hook.")
    return f"logits the same to the bit with nothing edited; a latent set changes them by up to {(now.float() - before.float()).abs().max():.2g}"


def scope(where: str, params: dict, found: Found) -> str:
    prompt, runs = found.prompt, {}
    for cached in (True, False):
        with editing.intervene(found.model, found.hook, found.sae, found.tokenizer, editing.amplify([0], 1.0), scope=where) as wrapper:
            new = editing.generate(found.model, found.tokenizer, [prompt], NEW, min_new_tokens=NEW, use_cache=cached)[0]
            runs[cached] = wrapper.tracker.sequence.reached[0].nonzero().flatten().tolist()
    special, whole = set(sae_utils.special_ids(found.tokenizer)), prompt + new[:-1]  # the last token written is never read
    texts = [place for place, token in enumerate(whole) if token not in special and (place or found.tokenizer.bos_token_id is not None)]
    first = [place for place in texts if place < len(prompt)]
    expected = {"all": texts, "prompt": first, "generated": texts[len(first) :], "last": first[-1:]}[where]
    if runs != {True: expected, False: expected}:
        raise UserError(f"edits land at {runs[True]} with a KV cache, at {runs[False]} without, and should at {expected}: scope {where} cannot be used with this model.")
    return f"{len(expected)} of {len(whole)} tokens: {found.shown(expected, whole) or '(none)'}"


def cost(params: dict, found: Found) -> str:
    stages = budget.stages(found.model, found.hook, found.sae, params, stored=False)
    disk, needed = stages[0]["bytes"], max(stages[1:], key=lambda stage: stage["bytes"])
    room, free = shutil.disk_usage(sae_utils.ROOT).free, budget.free_memory(found.model.device.type)
    if disk > room:
        raise UserError(f"the activations need {in_bytes(disk)} on disk, where {in_bytes(room)} are free: lower n_activations, or make room.")
    if needed["bytes"] > free:
        raise UserError(f"{needed['stage']} needs {in_bytes(needed['bytes'])} of memory beside the model, and {in_bytes(free)} are free: lower expansion or batch_size, or close other programs.")
    seconds, tried = sum(stage["seconds"] for stage in stages), "trials measured just now, the rest worked out from them, nothing taken as stored"
    card = budget.card(stages, torch.get_num_threads())
    return f"{showing.duration(seconds)}, at most {in_bytes(needed['bytes'])} of memory beside the model, {in_bytes(disk)} on disk ({tried})\n{card}"


# name: (the checks without which it cannot be tried, what it does), in the order of the lines
CHECKS = {
    "access": ((), access),
    "weights": (("access",), weights),
    "tokenizer": (("access",), tokenizer),
    "chat template": (("tokenizer",), template),
    "text": ((), text),
    "hook": (("access",), hook),
    "model": (("access",), model),
    "after the hook": (("hook", "model"), after),
    "shape": (("hook", "model"), shape),
    "stop at the hook": (("shape", "chat template"), stop),
    "empty patch": (("shape", "chat template"), empty_patch),
    **{f"scope {where}": (("shape", "chat template"), partial(scope, where)) for where in ("all", "prompt", "generated", "last")},
    "time and memory": (("shape",), cost),
}


def check(params: dict) -> None:
    """Tries all of CHECKS with the parameters of a training run and prints a line for each. UserError, with the names
    of those that failed, where one did; what hangs on it was not tried."""
    found, status, begin = Found(params), {}, time.perf_counter()
    for name, (needs, work) in CHECKS.items():
        lacking = [need for need in needs if status[need] != "ok"]
        try:
            status[name], said = ("", f"not tried, as it needs: {', '.join(lacking)}") if lacking else ("ok", work(params, found))
        except UserError as error:
            status[name], said = "TO DO", str(error)
        print(f"{name:>16}  {status[name]:5}  " + said.replace("\n", "\n" + " " * 25), flush=True)
    failed = [name for name, result in status.items() if result == "TO DO"]
    print(f"{time.perf_counter() - begin:.0f} seconds")
    if failed:
        raise UserError(f"{params['model_name']}, layer {params['layer']}: to do, as the lines say: {', '.join(failed)}.")
