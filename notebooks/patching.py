"""Experiments with edits: prompts, edits from a file, controls, which latents matter, what an edit does to a text, and whether it stands out."""

import html
import json
import math
import reprlib
import statistics
from pathlib import Path

import jinja2
import torch
from torch import Tensor

import editing
import experiment
import sae_utils
import showing
import storing
import typed
from sae_utils import UserError

OPERATIONS = ("ablate", "amplify", "set_value", "add", "clamp")
SCOPES = ("all", "prompt", "generated", "last")
MOST_COST = 1.0  # nats per token by which a text with a topic may be more surprising than the one without
MOST_REPEATS = 0.2  # and by how much the share of its tokens that repeat themselves may be larger


# ---------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------


def check_text(text, what: str) -> str:
    """`text`. UserError where it is none, or holds half of a character, of which there is neither a token nor a file."""
    if not isinstance(text, str):
        raise UserError(f"{what} is a text, not {text!r} (in YAML, quotes make one of a number, and of yes and no).")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds half of a character ({text[error.start]!r}, a lone surrogate): write the whole character.") from None
    return text


def check_run(sae: sae_utils.SAE, run: Path) -> None:
    """UserError where the SAE's file in the folder `run` does not say what it was trained on."""
    wanted = "hook_name model_name model_revision model_fingerprint tokenizer_fingerprint dataset_name dataset_fingerprint dtype seq_len n_activations held_out_fraction".split()
    if missing := [name for name in wanted if name not in sae.config]:
        raise UserError(f"{sae_utils.show_path(run / 'sae.pth')} does not say its {', '.join(missing)}: it is no SAE of a run; look at it first, make features SAE={sae_utils.show_path(run / 'sae.pth')}.")


def cross_entropies(run: Path) -> tuple[float, float]:
    """(of the model as it is, with the reconstruction in place), as a finished run's metrics.json has them."""
    measured = storing.read_json(run / "metrics.json")
    found = [measured.get(name) for name in ("ce_clean", "ce_spliced")]
    if not all(isinstance(value, float) for value in found):
        raise UserError(f"{sae_utils.show_path(run / 'metrics.json')} has no numbers for ce_clean and ce_spliced: train the run again under another name.")
    return found[0], found[1]


def read_prompts(texts: list[str], file: str) -> list[str]:
    """The texts, and those of a file: one prompt a line, or a JSON string a line in a .jsonl."""
    texts = list(texts)
    if file:
        path = sae_utils.resolve(file)
        for number, line in enumerate(typed.read_file(path, "prompts_file").split("\n"), 1):
            line = line.removesuffix("\r")
            try:
                texts += [json.loads(line) if path.suffix == ".jsonl" else line] if line.strip() else []
            except (ValueError, RecursionError):
                raise UserError(f"prompts_file {file}, line {number}: it is no JSON string.") from None
        if not texts:
            raise UserError(f"prompts_file {file} holds no prompt.")
    return [check_text(text, f"prompt {number}") for number, text in enumerate(texts, 1)]


def check_pilot(pilot_prompts: list, prompts: list[str], topic_words: list) -> None:
    """UserError where prompts to choose a topic's edit on are no texts, serve no topic, or are among the `prompts` that try it."""
    for number, text in enumerate(pilot_prompts, 1):
        check_text(text, f"pilot prompt {number}")
    if pilot_prompts and not topic_words:
        raise UserError("pilot_prompts choose the edit for a topic: name topic_words, or leave them out.")
    if both := {" ".join(text.split()) for text in pilot_prompts} & {" ".join(text.split()) for text in prompts}:
        raise UserError(f"{min(both)!r} is among pilot_prompts and prompts: what chose the edit cannot try it.")


def check_sampling(temperature: float) -> None:
    """UserError for a temperature at which logits divided by it are no numbers any more."""
    if 0 < temperature < 1e-3:
        raise UserError(f"temperature {temperature:g} is too small to divide by: take 0, which is greedy, or at least 0.001.")


def encode_prompts(tokenizer, texts: list[str], chat: bool) -> list[list[int]]:
    """Token ids of prompts, BOS in front exactly once; with `chat` as the user's turn, the model's begun."""
    if chat and not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: use an instruct model, or chat false.")
    if chat:
        texts = [tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False) for text in texts]
    return [sae_utils.with_bos(tokenizer, ids) for ids in sae_utils.encode_text(tokenizer, texts)]


def check_prompts(model, tokenizer, prompts: list[list[int]], max_new_tokens: int, what: str = "prompt") -> None:
    """Raises UserError where a prompt holds no text, or does not fit into the model with what it shall write; without a
    prompt, where that alone does not."""
    special, positions = set(sae_utils.special_ids(tokenizer)), sae_utils.positions_of(model.config)
    if positions and max_new_tokens >= positions:
        raise UserError(f"max_new_tokens {max_new_tokens} leaves no place for a prompt in the model's {positions} positions: lower it.")
    for number, ids in enumerate(prompts, 1):
        if not set(ids) - special:
            cure = "this tokenizer has no token for anything in it: take other words" if any(ids.count(token) for token in special - {tokenizer.bos_token_id}) else "give it at least one token"
            raise UserError(f"{what} {number} holds no text: {cure}.")
        if positions and len(ids) + max_new_tokens > positions:
            raise UserError(f"{what} {number} has {len(ids)} tokens, and {max_new_tokens} are to be written, but the model has {positions} positions: shorten it, or lower max_new_tokens.")


def check_numbers(logprobs: Tensor, edited: bool) -> Tensor:
    """`logprobs` (prompts, d_vocab). UserError where some are NaN: nothing can be found by them."""
    if bad := int(logprobs.isnan().any(1).sum()):
        what, cure = ("with the edit", "lower strength") if edited else ("without any edit", "choose another dtype or model")
        raise UserError(f"there is no finding: {what} the model's log-probabilities are no finite numbers on {bad} of {len(logprobs)} prompts; {cure}.")
    return logprobs


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


def check_latents(latents: list, where: str) -> None:
    """UserError where one is named twice: each is edited once."""
    if twice := [latent for i, latent in enumerate(latents) if latent in latents[:i]]:
        raise UserError(f"{where}: latent {twice[0]} is named twice; name each once.")


def as_number(text):
    """The number that a text is, as for a parameter; anything else as it is."""
    whole = experiment.read_int(text) if isinstance(text, str) else text
    return experiment.read_float(text) if isinstance(whole, str) else whole


def read_edits(path: Path) -> list[dict]:
    """The edits that a YAML file names, checked as far as that goes without the model.

    edits: a list of {latents, operation, strength, unit, low, high, scope}; scope is all, prompt,
    generated, last, a list of positions, or {tokens: [words]}. Raises UserError for whatever is not that.
    """
    show, number_of = reprlib.repr, lambda value: isinstance(value, (int, float))
    given = typed.read_yaml(typed.read_file(path, "edits"), f"edits {sae_utils.show_path(path)}")  # scalars as text: a word may be no, or 007
    if not isinstance(given, dict) or list(given) != ["edits"] or not isinstance(given["edits"], list) or not given["edits"]:
        raise UserError(f"edits {sae_utils.show_path(path)}: it should hold one list, `edits:`.")
    known = {"latents", "operation", "strength", "unit", "low", "high", "scope"}
    for number, edit in enumerate(given["edits"], 1):
        where = f"edits {sae_utils.show_path(path)}, number {number}"
        if not isinstance(edit, dict) or set(edit) - known or not {"latents", "operation"} <= set(edit):
            raise UserError(f"{where}: an edit has latents, operation and, where needed, {', '.join(sorted(known - {'latents', 'operation'}))}, not {show(edit)}.")
        as_numbers = lambda value: [as_number(part) for part in value] if isinstance(value, list) else as_number(value)
        edit.update({name: as_numbers(edit[name]) for name in ("latents", "strength", "low", "high") if name in edit})
        edit.update({"scope": as_numbers(edit["scope"])} if isinstance(edit.get("scope"), list) else {})
        latents, scope = edit["latents"], edit.get("scope", "all")
        if not isinstance(latents, list) or not latents or not all(type(latent) is int for latent in latents):
            raise UserError(f"{where}: latents is a list of numbers, not {show(latents)}.")
        check_latents(latents, where)
        if edit["operation"] not in OPERATIONS or edit.get("unit", "max") not in ("max", "acts"):
            raise UserError(f"{where}: operation is one of {', '.join(OPERATIONS)}, and unit max or acts.")
        for name in ("strength", "low", "high"):
            value = edit.get(name, 0)
            if not number_of(value) or not abs(value) <= torch.finfo(torch.float32).max:
                raise UserError(f"{where}: {name} is a finite number of float32, not {show(value)}.")
        words = isinstance(scope, dict) and list(scope) == ["tokens"] and isinstance(scope["tokens"], list)
        places = isinstance(scope, list) and all(type(place) is int and abs(place) < 2**31 for place in scope)
        if not (words or places or isinstance(scope, str) and scope in SCOPES):
            raise UserError(f"{where}: scope is {', '.join(SCOPES)}, a list of positions or {{tokens: [words]}}, not {show(scope)}.")
        for word in scope["tokens"] if words else ():
            check_text(word, f"{where}: a word of scope")
    return given["edits"]


def patches(edits: list[dict], sae: sae_utils.SAE, tokenizer, instead: dict | None = None) -> list[tuple]:
    """The edits, as `read_edits` gives them, as (patch, scope) pairs for `intervene`, in their order.

    `instead` {latent: another, or several}: the same edits on other latents, each of which is pushed as hard
    as the one whose place it takes (its largest activation counts for theirs).
    """
    instead, max_act, pairs = instead or {}, sae.max_act.clone(), []
    for latent, other in instead.items():
        max_act[other] = sae.max_act[latent]
    for edit in edits:
        latents = latents_of({latent: instead.get(latent, latent) for latent in edit["latents"]})
        scope = edit.get("scope", "all")
        if isinstance(scope, dict):
            scope = token_scope(tokenizer, scope["tokens"])
        pairs.append((make_edit(latents, edit["operation"], max_act, **{name: edit[name] for name in ("strength", "unit", "low", "high") if name in edit}), scope))
    return pairs


def lowers(edits: list[dict]) -> bool:
    """Whether all of the edits take away, so that a word should become less probable."""
    return all(edit["operation"] == "ablate" or edit["operation"] == "amplify" and edit.get("strength", 1.0) < 1 for edit in edits)


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


# ---------------------------------------------------------------------------------------------
# Controls: the same edit on other latents
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def acts_where(model, tokenizer, hook_name: str, sae: sae_utils.SAE, prompts: list[list[int]], texts: list[list[int]], scopes: list) -> list[Tensor]:
    """For each of `scopes` the sum (d_sae) of acts over the positions that it reaches in the prompts and in the
    `texts` written after them. An edit changes what comes after the hook, so that these are the acts it meets."""
    sums = [torch.zeros(sae.d_sae, dtype=torch.float64) for _ in scopes]
    read, done = [prompt + text[:-1] for prompt, text in zip(prompts, texts, strict=True)], 0  # the last token written is never read
    with editing.intervene(model, hook_name, sae, tokenizer, keep_acts=True) as wrapper:
        for batch in editing.batches(read, model):
            ids, mask = sae_utils.pad(batch, device=model.device)
            with editing.stating(model, prompts[done : done + len(batch)]):
                model(input_ids=ids, attention_mask=mask, use_cache=False)
                acts = wrapper.acts.reshape(*ids.shape, -1)
                for i, scope in enumerate(scopes):
                    sums[i] += acts[wrapper.tracker.where(scope)].cpu().double().sum(0)
            done += len(batch)
    return sums


def needs_activity(edit: dict) -> bool:
    """Whether an edit, as `read_edits` gives it, does nothing where its latent is silent: ablate, amplify, and what comes to that."""
    options = {name: edit[name] for name in ("strength", "unit", "low", "high") if name in edit}
    return not make_edit([0], edit["operation"], torch.ones(1), **options)(torch.zeros(1, 1)).any()


def activity_at_edits(edits: list[dict], sums: list[Tensor]) -> dict[int, Tensor]:
    """{latent: (d_sae,) how active every latent is at the places where that one is edited}, of the latents whose
    edit does nothing where they are silent; `sums` as `acts_where` gives them, one for each edit."""
    found: dict[int, Tensor] = {}
    for edit, active in zip(edits, sums, strict=True):
        for latent in edit["latents"] if needs_activity(edit) else ():
            found.setdefault(latent, active)
    return found


def as_much(active: Tensor, size: float, free: list[int], generator: torch.Generator) -> list[int]:
    """Random latents of `free` that are active together as much as `size` or down to a third of it (how much is drawn
    too), by `active` (d_sae); all that fit where they come to less. Sorted."""
    aim, total, chosen = size * 3 ** -torch.rand((), generator=generator).item(), 0.0, []
    for place in torch.randperm(len(free), generator=generator).tolist():
        if total < aim and total + active[free[place]].item() <= 3 * size:
            total += active[free[place]].item()
            chosen.append(free[place])
    return sorted(chosen)


def matched(sae: sae_utils.SAE, edited: list[int], avoid: list[int], n: int, seed: int, activity: dict[int, Tensor] | None = None, among: Tensor | None = None) -> list[dict]:
    """`n` random replacements {edited latent: another, or a list of others}, no two alike; fewer where there are not so many.

    A latent is replaced by a live one of a third to three times its density, a dead one by any live one; by one of
    `among` (d_sae, boolean), such as those that the text at hand activates, where `n` of them fit. But to take
    away from a latent that is silent is no control: one in `activity` {latent: (d_sae,) summed activation at the
    edited places}, if it is active there, is replaced by a latent of a third to three times its sum there; where
    these are fewer than `n`, by several that together come to about as much (`as_much`).
    """
    generator, found, activity = torch.Generator().manual_seed(seed), [], activity or {}
    taken = torch.zeros(sae.d_sae, dtype=torch.bool)
    taken[[*edited, *avoid]] = True
    pools, groups = {}, set()
    for latent in edited:
        active = latent in activity and activity[latent][latent] > 0
        by = activity[latent] if active else sae.density.cpu()
        live = (by > 0) & ~taken
        alike = live & (by >= by[latent] / 3) & (by <= by[latent] * 3) if by[latent] > 0 else live
        if active and alike.sum() < n:
            groups.add(latent)
        elif among is not None and (alike & among).sum() >= n:
            alike = alike & among
        pools[latent] = (live if latent in groups else alike).nonzero().flatten().tolist()
    if not all(pools.values()):
        return []
    most = min(n, len(pools[edited[0]])) if len(edited) == 1 and not groups else n
    for _ in range(50 * n):
        drawn, used = {}, set()
        for latent, pool in pools.items():
            free = [i for i in pool if i not in used]
            if latent in groups:
                others = as_much(activity[latent], activity[latent][latent].item(), free, generator)
            else:
                others = [free[int(torch.randint(len(free), (), generator=generator))]] if free else []
            if others:
                drawn[latent] = others if latent in groups else others[0]
                used |= set(others)
        if len(drawn) == len(edited) and drawn not in found:
            found.append(drawn)
        if len(found) == most:
            break
    return found


def latents_of(control: dict) -> list[int]:
    """All latents that stand in for the edited ones in a replacement of `matched`."""
    return [i for others in control.values() for i in (others if isinstance(others, list) else [others])]


def matched_by(edited: list[int], activity: dict[int, Tensor]) -> str:
    """What `matched` went by: "activity", "density", or "both"."""
    by = {"activity" if latent in activity and activity[latent][latent] > 0 else "density" for latent in edited}
    return by.pop() if len(by) == 1 else "both"


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
            logits = editing.logits_at(model, ids, mask, torch.full_like(ids[:, :1], len(prompt) - 1))[:, 0]
        changes.append(logits.float().log_softmax(-1)[:, token].cpu() - clean)
    return torch.cat(changes) if changes else torch.zeros(0)


def gradient_effects(model, tokenizer, hook_name: str, sae: sae_utils.SAE, prompt: list[int], token: int) -> Tensor:
    """(d_sae,) `ablation_effects` of every latent to first order, by one backward pass: the sum over text
    tokens of -acts * norm * (gradient of the log-probability with respect to the activation) @ W_dec row
    (attribution patching: Nanda 2023, Syed et al. 2023)."""
    with editing.to_differentiate(model, hook_name) as caught:
        ids, mask = sae_utils.pad([prompt], device=model.device)
        logits = editing.logits_at(model, ids, mask, torch.full_like(ids[:, :1], len(prompt) - 1))[0, 0]
        (gradient,) = torch.autograd.grad(logits.float().log_softmax(-1)[token], caught["x"])
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


def agreement(exact: Tensor, gradient: Tensor, least: float = 1e-3) -> float | None:
    """Rank correlation of measured and estimated effects (n,), of those measured at `least` nats or more, below
    which ranks are those of rounding. None where fewer than three are left, or all are alike."""
    matter = exact.abs() >= least
    value = rank_correlation(exact[matter], gradient[matter]) if matter.sum() > 2 else math.nan
    return None if math.isnan(value) else value


def attribute(model, tokenizer, hook_name: str, sae: sae_utils.SAE, prompt: list[int], token: int, most: int, n_random: int = 50, seed: int = 0) -> dict:
    """Which of the latents active on a prompt the log-probability of `token` hangs on.

    `latents`, the at most `most` that the gradient puts first, with their `exact` and `gradient` effects and the
    `agreement` of the two. The choice is the gradient's own, so that it alone could flatter the agreement; hence
    `others`, at most `n_random` drawn from the active latents that were not chosen, with `others_exact`,
    `others_gradient` and `others_agreement` (None where nothing is left to draw from). `active`: how many there are.
    """
    active = (text_acts(model, tokenizer, hook_name, sae, prompt) > 0).any(0).nonzero().flatten().cpu()
    slope = gradient_effects(model, tokenizer, hook_name, sae, prompt, token)
    ranked = active[slope[active].abs().argsort(descending=True, stable=True)]
    left = ranked[most:]
    left = left[torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))[:n_random]]
    found = {"says": token, "active": len(active)}
    for name, latents in (("", ranked[:most]), ("others_", left)):
        exact = ablation_effects(model, tokenizer, hook_name, sae, prompt, token, latents.tolist())
        found |= {name + "exact": exact, name + "gradient": slope[latents], name + "agreement": agreement(exact, slope[latents])}
    return found | {"latents": ranked[:most], "others": left}


def agreements(attribution: list[dict]) -> dict:
    """Over prompts, of what `attribute` found, under the names of patching.json: mean rank correlations among the
    chosen and among the others (None where no prompt has one), prompts on which both put the same latent first, how
    many others were measured, and the largest effect among the chosen and the others (nats, absolute)."""

    def mean(name: str) -> float | None:
        values = [found[name] for found in attribution if found[name] is not None]
        return sum(values) / len(values) if values else None

    largest = lambda name: max((found[name].abs().max().item() for found in attribution if len(found[name])), default=0.0)
    return {
        "gradient_agreement": mean("agreement"), "gradient_agreement_others": mean("others_agreement"),
        "gradient_agrees_on_first": sum(int(found["exact"].argmin()) == int(found["gradient"].argmin()) for found in attribution if len(found["exact"])),
        "gradient_others": sum(len(found["others"]) for found in attribution), "gradient_largest": largest("exact"), "gradient_others_largest": largest("others_exact"),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------
# What an edit does to a text
# ---------------------------------------------------------------------------------------------


def hit(original: Tensor, arm: Tensor, token: int, lowers: bool = False) -> Tensor:
    """Which prompts an arm hits, (prompts,) boolean: the token is at least ten times as probable as in `original` and the
    first choice; with `lowers`, a tenth and no longer it. Both are log-probabilities (prompts, d_vocab)."""
    rise = (arm[:, token] - original[:, token]).double()
    first = arm.argmax(1) == token
    return ((-rise if lowers else rise) >= math.log(10) - 1e-6) & (~first if lowers else first)


def along(clean: list[Tensor], patched: list[Tensor], texts: list[list[int]]) -> tuple[list[list[float]], list[list[float]]]:
    """(kl, change), a list for each text with a number for each of its tokens: KL(clean ‖ patched) of what comes
    there, and the change of the log-probability of the token that stands there. Both arms as `logprobs_of` gives them."""
    kl = [(a.exp() * (a - b)).sum(1).tolist() for a, b in zip(clean, patched, strict=True)]
    change = [(b - a).gather(1, torch.tensor(ids, dtype=torch.long)[:, None])[:, 0].tolist() for a, b, ids in zip(clean, patched, texts, strict=True)]
    return kl, change


# ---------------------------------------------------------------------------------------------
# Does it stand out?
# ---------------------------------------------------------------------------------------------


def breaks(cost: float, repeats: float) -> list[str]:
    """What is wrong with a text that an edit brings a topic into, in words; empty where nothing is. `cost`: nats per token by
    which it is more surprising than without the edit, MOST_COST at most; `repeats`: by how much the share of tokens
    that it says again is larger, MOST_REPEATS at most (a text that says one word over and over surprises nobody)."""
    found = [f"at a cost of {cost:.2f} nats per token, which is more than {MOST_COST:g}"] * (cost > MOST_COST)
    return found + [f"in a text that repeats itself: the share of tokens said before is {100 * repeats:.0f} points larger, more than {100 * MOST_REPEATS:.0f}"] * (repeats > MOST_REPEATS)


def verdict(edit: float, controls: list[float], lowers: bool = False, broken: list[str] = ()) -> dict:
    """Whether what an edit did stands out from what its controls did, by the means over prompts: {p, as_good, stands_out, says}.

    p = (controls that did as much + 1) / (controls + 1), the permutation test with the edit counted as one of the
    arms (Phipson and Smyth 2010), one-sided: up, with `lowers` down. It stands out at p of 0.05 or less, unless the
    text is `broken` (`breaks`). Where a number is not finite nothing is found, and p is None.
    """
    if bad := sum(not math.isfinite(c) for c in controls) or not math.isfinite(edit):
        whose = f"{bad} of its {len(controls)} controls" if math.isfinite(edit) else "the edit"
        return {"p": None, "as_good": None, "stands_out": False, "says": f"There is no finding: what {whose} moved the log-odds by is no finite number; lower strength."}
    n, as_good = len(controls), sum(c <= edit if lowers else c >= edit for c in controls)
    p = (as_good + 1) / (n + 1)
    stands_out = p <= 0.05 and not broken
    why = "; ".join([f"p = {p:.3f}: {as_good or 'none'} of {n} moved the log-odds as far", *broken])
    says = f"It {'stands out' if stands_out else 'does not stand out'} from its controls ({why})."
    if n < 19:
        says += f" With {n} control{'s' if n != 1 else ''} no p below {1 / (n + 1):.3f} can be had; it takes 19 for 0.05."
    return {"p": p, "as_good": as_good, "stands_out": stands_out, "says": says}


def interval(values: Tensor, seed: int, n: int = 1000) -> list[float]:
    """[low, high]: 95 % of the means of `values` (prompts,) when as many prompts are drawn again (bootstrap)."""
    drawn = torch.randint(len(values), (n, len(values)), generator=torch.Generator().manual_seed(seed))
    return values.double()[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def compared(change: Tensor, control_change: list[Tensor], seed: int, lowers: bool = False, **more) -> dict:
    """The edit beside its controls, under the names of patching.json. `change` (prompts,) and those of the controls are
    what is compared, less what it is without an edit; the edit's interval is `interval`'s, the controls' holds 90 % of
    their means. `more`: what `verdict` may be told."""
    means = torch.stack([c.double().mean() for c in control_change])
    judged = verdict(change.double().mean().item(), means.tolist(), lowers, **more)
    return {
        "prompts": len(change), "change": change.double().mean().item(), "change_interval": interval(change, seed), "control_changes": means.tolist(),
        "control_mean": means.mean().item(), "control_interval": means.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist(),
        "control_extreme": (means.min() if lowers else means.max()).item(),
        "p": judged["p"], "controls_as_good": judged["as_good"], "stands_out": judged["stands_out"], "verdict": judged["says"],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------
# What a person reads
# ---------------------------------------------------------------------------------------------


def pieces(as_text, ids: list[int], reference: list[int]) -> list[dict]:
    """A continuation's tokens as {"text", "differs"}: `differs` at the first one that is not the reference's. Characters
    are whole (`showing.whole`)."""
    shorter = min(len(ids), len(reference))
    first = next((i for i in range(shorter) if ids[i] != reference[i]), shorter)
    texts = enumerate(showing.whole([as_text(t) for t in ids]))
    return [{"text": text or showing.CONTINUED if i == first else text, "differs": i == first} for i, text in texts]


def biggest_moves(as_text, before: Tensor, after: Tensor, n: int = 4) -> list[dict]:
    """{"token", "change"} of the `n` tokens whose log-probability rises and falls most between `before` and `after`
    (d_vocab), among those with at least one chance in a thousand in either."""
    move = torch.where((before.exp() > 1e-3) | (after.exp() > 1e-3), after - before, 0.0)
    n = min(n, len(move))
    rises, falls = move.topk(n).indices.tolist(), move.topk(n, largest=False).indices.tolist()
    return [{"token": as_text(t), "change": move[t].item()} for t in [t for t in rises if move[t] > 0] + [t for t in falls if move[t] < 0]]


def side_by_side(
    as_text, prompts: list[list[int]], original: tuple, reconstruction: tuple, patched: tuple, kl: list, change: list, before: Tensor, after: Tensor, positions: list[int]
) -> list[dict]:
    """For each prompt what the page shows: the three texts, the original's tokens with KL and change (`along`) and a
    `shade` relative to the largest KL of all, what is compared `before` and `after` the edit (prompts,), tokens that
    moved most after the prompt. Arms are (log-probabilities (prompts, d_vocab), texts)."""
    most = max([value for values in kl for value in values] + [1e-9])
    return [
        {
            "prompt": as_text(prompt), "positions": positions[i],
            "original": [p | {"kl": k, "change": c, "shade": k / most} for p, k, c in zip(pieces(as_text, original[1][i], original[1][i]), kl[i], change[i], strict=True)],
            "reconstruction": pieces(as_text, reconstruction[1][i], original[1][i]), "patched": pieces(as_text, patched[1][i], original[1][i]),
            "before": before[i].item(), "after": after[i].item(), "moves": biggest_moves(as_text, original[0][i], patched[0][i]),
        }
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip


def shaded(as_text, prompts: list[list[int]], texts: list[list[int]], values: list[list[float]], colour: str, most: int = 5) -> str:
    """HTML of the first `most` prompts' ends and texts, their tokens shaded by non-negative `values`, all by one scale."""
    top = max([v for line in values for v in line], default=0.0)
    end = lambda prompt: f"…{html.escape(as_text(prompt[-8:]))} <b>|</b> "
    lines = zip(prompts[:most], texts[:most], values[:most], strict=True)
    return "<br>".join(end(prompt) + showing.shade([as_text(t) for t in ids], line, color=colour, top=top) for prompt, ids, line in lines)


def findings(result: dict) -> list[str]:
    """The sentences that sum an experiment up, from what patching.json holds; the first one leads with what decides."""
    names, n, topic = result["names"], result["prompts"], result["topic_words"]
    said, (low, high), (control_low, control_high) = result["target"].strip(), result["change_interval"], result["control_interval"]
    named = ", ".join(f"{i} ({names[i]})" if i in names else str(i) for i in result["edited"])
    what = f"The edits of {result['edits_file']}" if result["edits_file"] else f"{result['operation'].capitalize()} of latent{'s' if len(result['edited']) > 1 else ''} {named} at scope {result['scope']}"
    alike = {"density": "of like density, pushed as hard", "activity": "active at the edited places about as much", "both": "of like density where one is set, active there about as much where one is taken away"}
    controls = f"{len(result['controls'])} controls, random latents {alike[result['controls_matched_by']]}"
    extreme, dose = "at least" if result["lowers"] else "at most", {row["dose"]: row["surprise"] for row in result["doses"]}
    nats = lambda value: f"{value:.2f}" if math.isfinite(value) else "no finite number of"
    cost = f"the text surprises the unpatched model by {nats(dose[1.0])} nats per token, its own by {nats(dose[0.0])}"
    moved = (
        f"{result['change']:+.1f} on average (95 % over prompts: {low:+.1f} to {high:+.1f}; {controls}: {result['control_mean']:+.1f} on average, "
        f"90 % of them {control_low:+.1f} to {control_high:+.1f}, {extreme} {result['control_extreme']:+.1f}). {result['verdict']}"
    )
    if topic:
        first = (
            f"{what}: words of the topic ({', '.join(topic[:4])}{', …' if len(topic) > 4 else ''}) {'fall' if result['lowers'] else 'rise'} in {result['topic_moved']} of {n} continuations; the log-odds that one "
            f"comes next changed by {moved} That is {result['topic_beyond']:+.1f} beyond words as frequent. One of the words stands in {result['topic_said']} continuations, {result['topic_count']} in all, against {result['topic_said_before']}, "
            f"{result['topic_count_before']} in all, without the edit; {cost}, and {result['repeats'][1]:.0%} of its tokens stand in it before, of its own {result['repeats'][0]:.0%}."
        )
    else:
        never = not result["lowers"] and not result["target_is_first_choice"]
        about = f"{said!r} is the first choice on none of {n} prompts; its log-odds" if never else f"the log-odds of {said!r}"
        first = (
            f"{what}: {about} changed by {moved} {said!r} is the first choice on {result['target_is_first_choice']} of {n} prompts, {result['target_was_first_choice']} without the "
            f"edit, and {'at most a tenth as probable and no longer it' if result['lowers'] else 'that and at least 10 times as probable'} on {result['prompts_hit']} (controls: {result['control_hits_median']:g} in the median); edited at {spread(result['positions_edited'])} of each text."
        )
    found = [first if result["p"] is not None else f"{what}: {result['verdict']}"]
    if result["candidates"] and not result["stands_out"]:
        tries = "; ".join(f"{c['what']}: {c['command']}" for c in result["candidates"][:5])
        found.append(f"Nothing stands out here. What did most on the half of the text on which latents are chosen: {tries}")
    found.append(
        f"The SAE by itself: with the reconstruction in place the cross-entropy is {result['ce_reconstruction']:.3f} against {result['ce_original']:.3f} nats, and the model's "
        f"first choice stays on {result['reconstruction_first_choice_stays']} of {n} prompts; the edit keeps the SAE's error: {'yes' if result['keep_error'] else 'no'}."
    )
    ranked = lambda value: "too few effects to rank" if value is None else f"{value:.2f}"
    others = "no active latent was left unmeasured"
    if result["gradient_others"]:
        others = f"among {result['gradient_others']} random active latents that the gradient did not choose, {ranked(result['gradient_agreement_others'])}"
        others += f" (their largest effect {result['gradient_others_largest']:.3f} nats)"
    if result["attribution"]:
        found.append(
            f"Which latents the model's next word hangs on: rank correlation of the gradient's estimates with ablations, {ranked(result['gradient_agreement'])}; the same latent "
            f"first on {result['gradient_agrees_on_first']} of {n} prompts; {others}; "
            f"the latent that announces the word comes first on {sum(p == 1 for p in result['announcing_latent_is_number'])} of {len(result['announcing_latent_is_number'])}."
        )
    found.append(f"At dose 1 {cost}; at dose {max(dose):g} by {nats(dose[max(dose)])}.")
    if result["ablation_log_odds_change"]:
        change, (own, *rest) = statistics.mean(result["ablation_log_odds_change"]), result["ablation_removed"]
        sizes = f"{own:.2f} in sum is taken away, by controls {min(rest):.2f} to {max(rest):.2f}" if rest else "nothing else is active there"
        found.append(f"Ablating {named} where {said!r} is due changes its log-odds by {change:+.2f} on average (activation: {sizes}). {result['ablation_verdict']}")
    return found


def write_page(path: Path, title: str, result: dict) -> str:
    """Writes the page of an experiment, patching.html; returns its middle, for the notebook to show."""
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
    page = templates.get_template("patching.html").render(title=title, **result)
    with sae_utils.atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return "<style>.patch-differs {background: #ffd9a8; color: black; outline: 1px solid}</style>" + page[page.index("<main>") : page.index("</main>")]
