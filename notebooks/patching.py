"""Experiments with edits: prompts, edits from a file, which latents matter, what an edit does to a text."""

import json
import math
from pathlib import Path

import torch
import yaml  # papermill's own
from torch import Tensor

import editing
import sae_utils
from sae_utils import UserError

OPERATIONS = ("ablate", "amplify", "set_value", "add", "clamp")
SCOPES = ("all", "prompt", "generated", "last")


# ---------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------


def read_prompts(texts: list[str], file: str) -> list[str]:
    """The texts, and those of a file: one prompt a line, or a JSON string a line in a .jsonl."""
    texts = list(texts)
    if file:
        path = sae_utils.resolve(file)
        if not path.is_file():
            raise UserError(f"prompts_file {file}: there is no such file.")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                texts += [json.loads(line) if path.suffix == ".jsonl" else line] if line.strip() else []
            except ValueError:
                raise UserError(f"prompts_file {file}, line {number}: it is no JSON string.") from None
        if not texts:
            raise UserError(f"prompts_file {file} holds no prompt.")
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"a prompt is a text, not {text!r}.")
    return texts


def encode_prompts(tokenizer, texts: list[str], chat: bool) -> list[list[int]]:
    """Token ids of prompts, BOS in front exactly once; with `chat` as the user's turn, the model's begun."""
    if chat and not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: use an instruct model, or chat false.")
    if chat:
        texts = [tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False) for text in texts]
    return [sae_utils.with_bos(tokenizer, ids) for ids in sae_utils.encode_text(tokenizer, texts)]


def check_prompts(model, tokenizer, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raises UserError where a prompt holds no text, or does not fit into the model with what it shall write."""
    special = set(sae_utils.special_ids(tokenizer))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, ids in enumerate(prompts, 1):
        if not set(ids) - special:
            raise UserError(f"prompt {number} holds no text: give it at least one token.")
        if positions and len(ids) + max_new_tokens > positions:
            raise UserError(f"prompt {number} has {len(ids)} tokens, and {max_new_tokens} are to be written, but the model has {positions} positions: shorten it.")


# ---------------------------------------------------------------------------------------------
# Edits
# ---------------------------------------------------------------------------------------------


def make_edit(latents: list[int], operation: str, max_act: Tensor, strength: float = 1.0, unit: str = "max", low: float = 0.0, high: float = 1.0):
    """One operation as a patch. `strength` is amplify's factor; else, like low and high, a multiple of each
    latent's largest activation `max_act` (d_sae) (unit "max") or an activation (unit "acts")."""
    latents = [sae_utils.check_latent(i, len(max_act)) for i in latents]
    of = max_act if unit == "max" else None
    return {
        "ablate": lambda: editing.ablate(latents),
        "amplify": lambda: editing.amplify(latents, strength),
        "set_value": lambda: editing.set_value(latents, strength, of),
        "add": lambda: editing.add(latents, strength, of),
        "clamp": lambda: editing.clamp(latents, low, high, of),
    }[operation]()


def token_scope(tokenizer, words: list[str]):
    """A scope for the given tokens: a function of token ids. UserError where a word is not one token."""
    ids = []
    for word in words:
        pieces = sae_utils.encode_text(tokenizer, [word])[0]
        if len(pieces) != 1:
            raise UserError(f"scope: {word!r} is {len(pieces)} tokens for this model, not one.")
        ids += pieces
    return lambda tokens: torch.isin(tokens, torch.tensor(ids, device=tokens.device))


def read_edits(path: Path) -> list[dict]:
    """The edits that a YAML file names, checked as far as that goes without the model.

    edits: a list of {latents, operation, strength, unit, low, high, scope}; scope is all, prompt,
    generated, last, a list of positions, or {tokens: [words]}. Raises UserError for whatever is not that.
    """
    if not path.is_file():
        raise UserError(f"edits {sae_utils.show_path(path)}: there is no such file.")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"edits {sae_utils.show_path(path)} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(given, dict) or list(given) != ["edits"] or not isinstance(given["edits"], list) or not given["edits"]:
        raise UserError(f"edits {sae_utils.show_path(path)}: it should hold one list, `edits:`.")
    known = {"latents", "operation", "strength", "unit", "low", "high", "scope"}
    for number, edit in enumerate(given["edits"], 1):
        where = f"edits {sae_utils.show_path(path)}, number {number}"
        if not isinstance(edit, dict) or set(edit) - known or not {"latents", "operation"} <= set(edit):
            raise UserError(f"{where}: an edit has latents, operation and, where needed, {', '.join(sorted(known - {'latents', 'operation'}))}, not {edit!r}.")
        latents, scope = edit["latents"], edit.get("scope", "all")
        if not isinstance(latents, list) or not latents:
            raise UserError(f"{where}: latents is a list of numbers, not {latents!r}.")
        if edit["operation"] not in OPERATIONS or edit.get("unit", "max") not in ("max", "acts"):
            raise UserError(f"{where}: operation is one of {', '.join(OPERATIONS)}, and unit max or acts.")
        for name in ("strength", "low", "high"):
            value = edit.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(f"{where}: {name} is a finite number, not {value!r} (write 1.0e-4 for 1e-4).")
        words = isinstance(scope, dict) and list(scope) == ["tokens"] and isinstance(scope["tokens"], list)
        places = isinstance(scope, list) and all(type(place) is int for place in scope)
        if not (words or places or isinstance(scope, str) and scope in SCOPES):
            raise UserError(f"{where}: scope is {', '.join(SCOPES)}, a list of positions or {{tokens: [words]}}, not {scope!r}.")
    return given["edits"]


def patches(edits: list[dict], sae: sae_utils.SAE, tokenizer, instead: dict[int, int] | None = None) -> list[tuple]:
    """The edits, as `read_edits` gives them, as (patch, scope) pairs for `intervene`, in their order.

    `instead` {latent: another}: the same edits on other latents, each of which is pushed as hard as the
    one whose place it takes (its largest activation counts for theirs).
    """
    instead, max_act, pairs = instead or {}, sae.max_act.clone(), []
    for latent, other in instead.items():
        max_act[other] = sae.max_act[latent]
    for edit in edits:
        latents = [instead.get(latent, latent) for latent in edit["latents"]]
        scope = edit.get("scope", "all")
        if isinstance(scope, dict):
            scope = token_scope(tokenizer, scope["tokens"])
        pairs.append((make_edit(latents, edit["operation"], max_act, **{name: edit[name] for name in ("strength", "unit", "low", "high") if name in edit}), scope))
    return pairs


def check_reached(positions: list[int], prompts: list[str], edits: list[dict]) -> None:
    """UserError where the edits reached no position of a prompt's text, which is then no experiment."""
    scopes = ", ".join(dict.fromkeys(str(edit.get("scope", "all")) for edit in edits))
    for number, (count, prompt) in enumerate(zip(positions, prompts, strict=True), 1):
        if count == 0:
            raise UserError(f"prompt {number} (…{prompt[-40:]!r}) is edited at no position: scope {scopes} reaches none of its text; choose another scope, or another prompt.")


def spread(counts: list[int]) -> str:
    """'1 position', '4 positions', '3 to 7 positions'."""
    low, high = min(counts), max(counts)
    return f"{low if low == high else f'{low} to {high}'} position{'s' if high > 1 else ''}"


def dosed(pairs: list[tuple], amount: float) -> list[tuple]:
    """The (patch, scope) pairs at `amount` of their strength (`editing.dose`)."""
    return [(editing.dose(patch, amount), scope) for patch, scope in pairs]


def matched(sae: sae_utils.SAE, edited: list[int], avoid: list[int], n: int, seed: int) -> list[dict[int, int]]:
    """`n` random replacements {edited latent: live latent of a third to three times its density}, no two alike
    (for a dead one any live latent); fewer where there are not so many."""
    generator, found, pools = torch.Generator().manual_seed(seed), [], {}
    for latent in edited:
        density = sae.density[latent]
        alike = (sae.density >= density / 3) & (sae.density <= density * 3) if density > 0 else torch.ones_like(sae.density, dtype=torch.bool)
        pool = ((sae.density > 0) & alike).nonzero().flatten().tolist()
        pools[latent] = [i for i in pool if i not in edited and i not in avoid]
    if not all(pools.values()):
        return []
    most = min(n, max(map(len, pools.values()))) if len(edited) == 1 else n
    for _ in range(50 * n):
        drawn: dict[int, int] = {}
        for latent, pool in pools.items():
            free = [i for i in pool if i not in drawn.values()]
            if free:
                drawn[latent] = free[int(torch.randint(len(free), (), generator=generator))]
        if len(drawn) == len(edited) and drawn not in found:
            found.append(drawn)
        if len(found) == most:
            break
    return found


# ---------------------------------------------------------------------------------------------
# Which latents matter here
# ---------------------------------------------------------------------------------------------


def text_acts(model, tokenizer, hook_name: str, sae: sae_utils.SAE, prompt: list[int]) -> Tensor:
    """acts (seq, d_sae) on a prompt, zero at BOS and special tokens."""
    with editing.intervene(model, hook_name, sae, tokenizer, keep_acts=True) as wrapper:
        editing.next_logprobs(model, [prompt])
        return torch.where(wrapper.tracker.text[0, :, None], wrapper.acts.reshape(len(prompt), -1), 0.0)


@torch.no_grad()
def ablation_effects(model, tokenizer, hook_name: str, sae: sae_utils.SAE, prompt: list[int], token: int, latents: list[int]) -> Tensor:
    """(len(latents),) change of the log-probability of `token` after the prompt when each latent alone is
    ablated at all of its text tokens. Many in one batch, a latent for each row."""
    clean, changes = editing.next_logprobs(model, [prompt])[0, token], []
    for part in torch.tensor(latents, dtype=torch.long).split(32) if latents else ():

        def ablate_each(acts: Tensor, part=part) -> Tensor:
            rows = acts.reshape(len(part), len(prompt), -1).clone()
            rows[torch.arange(len(part)), :, part.to(acts.device)] = 0
            return rows.reshape(acts.shape)

        with editing.intervene(model, hook_name, sae, tokenizer, ablate_each):
            ids, mask = sae_utils.pad([prompt] * len(part), device=model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1]
        changes.append(logits.float().log_softmax(-1)[:, token].cpu() - clean)
    return torch.cat(changes) if changes else torch.zeros(0)


def gradient_effects(model, tokenizer, hook_name: str, sae: sae_utils.SAE, prompt: list[int], token: int) -> Tensor:
    """(d_sae,) `ablation_effects` of every latent to first order, by one backward pass: the sum over text
    tokens of -acts * norm * (gradient of the log-probability with respect to the activation) @ W_dec row
    (attribution patching: Nanda 2023, Syed et al. 2023)."""
    caught = {}

    def hook(module, args, output):
        x = sae_utils.first_output(output).detach().requires_grad_()
        caught["x"] = x
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = model.get_submodule(hook_name).register_forward_hook(hook)
    try:
        with torch.enable_grad():
            ids, mask = sae_utils.pad([prompt], device=model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, -1]
            (gradient,) = torch.autograd.grad(logits.float().log_softmax(-1)[token], caught["x"])
    finally:
        handle.remove()
    with torch.no_grad():
        x = caught["x"].detach().reshape(len(prompt), -1)
        acts, (_, norm) = sae.encode(x), sae.normalise(x)
        tracker = editing.TokenTracker(tokenizer)
        tracker(model, (), {"input_ids": ids, "attention_mask": mask})
        acts = torch.where(tracker.text[0, :, None], acts, 0.0)
        pushed = (gradient.reshape(len(prompt), -1).float() * norm) @ sae.W_dec.T  # (seq, d_sae)
        return -(acts * pushed).sum(0).cpu()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two (n,) tensors; ties share their mean rank."""

    def ranks(values: Tensor) -> Tensor:
        _, place, counts = values.unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts + 1) / 2).double()[place]

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


# ---------------------------------------------------------------------------------------------
# What an edit does to a text
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def logprobs_of(model, prompts: list[list[int]], continuations: list[list[int]]) -> list[Tensor]:
    """For each prompt, log-probabilities (tokens of its continuation, d_vocab) before each of those tokens,
    the continuation being given; float32 on the CPU. Inside `intervene` edits know where the prompts end."""
    texts, found = [prompt + more for prompt, more in zip(prompts, continuations, strict=True)], []
    for batch in editing.batches(texts, model):
        begun = prompts[len(found) : len(found) + len(batch)]
        ids, mask = sae_utils.pad(batch, device=model.device)
        with editing.stating(model, begun):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found += [row[len(prompt) - 1 : len(text) - 1].float().log_softmax(-1).cpu() for row, prompt, text in zip(logits, begun, batch, strict=True)]
    return found


def surprise(model, prompts: list[list[int]], continuations: list[list[int]]) -> float:
    """Mean over all their tokens of -log p of the continuations, in nats; exp of it is their perplexity."""
    total, count = 0.0, 0
    for logprobs, more in zip(logprobs_of(model, prompts, continuations), continuations, strict=True):
        total -= logprobs.gather(1, torch.tensor(more, dtype=torch.long)[:, None]).double().sum().item()
        count += len(more)
    return total / max(1, count)
