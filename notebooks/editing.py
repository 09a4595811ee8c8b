"""Editing latents while the model runs: edits, where they apply, and running the model with them.

An edit is a function of acts. *Where* it applies, its scope, is a question of facts: which positions of
a call are text, where in the sequence they stand, and where the prompt ended. `TokenTracker` knows
these for each call of the model or refuses; a guess would edit the wrong token without a word.
"""

from __future__ import annotations

import inspect
import weakref
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sae_utils import SAE, UserError, check_latent, first_output, linear, pad, special_ids

# ---------------------------------------------------------------------------------------------
# Edits: acts -> acts
# ---------------------------------------------------------------------------------------------


class Edit:
    """A patch, acts (…, d_sae) -> acts, that changes the latents `ids` alone: `change` sees acts[..., ids]
    and returns as many. Such a patch can be worked out without encoding the other latents.
    """

    def __init__(self, ids, change):
        ids = [ids] if isinstance(ids, int) else [int(i) if isinstance(i, Tensor) and i.dim() == 0 and not i.is_floating_point() else i for i in ids]
        if len(set(map(repr, ids))) < len(ids):
            raise UserError(f"a latent is named twice among {ids}: name each once.")
        self.ids, self.change, self.places = ids, change, {}

    def index(self, acts_width: int, device) -> Tensor:
        """The latents as a tensor. UserError where one is not of an SAE of this width."""
        return self.kept(("of", acts_width, device), lambda: [check_latent(i, acts_width) for i in self.ids], device)

    def change_among(self, few: list[int], acts: Tensor) -> Tensor:
        """What the edit makes of acts (…, len(few)) of the latents `few`, its own among them."""
        place = self.kept((*few, acts.device), lambda: [few.index(i) for i in self.ids], acts.device)
        return acts.index_copy(-1, place, self.change(acts[..., place]))

    def kept(self, key: tuple, numbers, device) -> Tensor:
        """The numbers as a tensor, made once: a copy to the GPU at each forward pass would cost more than the edit."""
        if key not in self.places:
            with torch.inference_mode(False):  # so that a backward pass may use it later
                self.places[key] = torch.tensor(numbers(), dtype=torch.long, device=device)
        return self.places[key]

    def __call__(self, acts: Tensor) -> Tensor:
        index = self.index(acts.shape[-1], acts.device)
        return acts.index_copy(-1, index, self.change(acts[..., index]))


def strength(value, what: str = "value"):
    """`value`, a number or one for each latent. UserError where one is NaN or infinite, or beyond float32."""
    try:
        finite = (torch.as_tensor(value, dtype=torch.float64).abs() <= torch.finfo(torch.float32).max).all()
    except OverflowError:  # a whole number beyond float64
        finite = False
    if not finite:
        raise UserError(f"{what} {value} is not a finite number of float32: an edit needs one.")
    return value


def ablate(ids) -> Edit:
    """A patch that silences the latents `ids`."""
    return Edit(ids, torch.zeros_like)


def amplify(ids, factor: float) -> Edit:
    """A patch that multiplies the latents `ids` by `factor` where they fire."""
    strength(factor, "factor")
    return Edit(ids, lambda acts: acts * factor)


def _level(ids, value, of: Tensor | None):
    """acts -> a tensor to set or add: `value`, one number or one for each latent, in activations or
    in units of `of` (d_sae), such as sae.max_act."""
    strength(value)
    edit = Edit(ids, None)  # reads ids in any of their forms

    def level(acts: Tensor) -> Tensor:
        values = torch.as_tensor(value, dtype=acts.dtype, device=acts.device)
        unit = 1.0 if of is None else of.to(acts)[edit.index(len(of), acts.device)]
        return (values * unit).expand_as(acts)

    return edit.ids, level


def set_value(ids, value, of: Tensor | None = None) -> Edit:
    """A patch that sets the latents `ids` to `value`: one number, or one for each of them; in
    activations, or with `of=sae.max_act` in multiples of each latent's largest activation."""
    ids, level = _level(ids, value, of)
    return Edit(ids, lambda acts: level(acts).contiguous())


def add(ids, value, of: Tensor | None = None) -> Edit:
    """A patch that adds `value`, as in `set_value`, to the latents `ids` wherever it is applied."""
    ids, level = _level(ids, value, of)
    return Edit(ids, lambda acts: acts + level(acts))


def clamp(ids, low, high, of: Tensor | None = None) -> Edit:
    """A patch that brings the latents `ids` between `low` and `high`, both as in `set_value`."""
    ids, lowest = _level(ids, low, of)
    _, highest = _level(ids, high, of)
    if (torch.as_tensor(low) > torch.as_tensor(high)).any():
        raise UserError(f"clamp from {low} to {high} leaves nothing between: give the smaller one first.")
    return Edit(ids, lambda acts: acts.maximum(lowest(acts)).minimum(highest(acts)))


def compose(*patches):
    """One patch that applies the patches from left to right."""

    def patch(acts: Tensor) -> Tensor:
        for part in patches:
            acts = part(acts)
        return acts

    if not all(isinstance(part, Edit) for part in patches):
        return patch
    ids = list(dict.fromkeys(i for part in patches for i in part.ids))

    def change(acts: Tensor) -> Tensor:
        for part in patches:
            acts = part.change_among(ids, acts)
        return acts

    return Edit(ids, change)


def dose(patch, amount: float):
    """`amount` of a patch: acts + amount * (patch(acts) - acts). 0 is no edit, 1 the patch, 2 twice its change;
    what a patch takes away ends at nothing, so more of an ablation is an ablation."""
    strength(amount, "dose")

    def part(change):
        def changed(acts: Tensor) -> Tensor:
            new = change(acts)
            dosed = acts + amount * (new - acts)
            return torch.where((new >= 0) & (new < acts), dosed.clamp_min(0), dosed)

        return changed

    return Edit(patch.ids, part(patch.change)) if isinstance(patch, Edit) else part(patch)


def together(arms: list[list[tuple]]) -> list[tuple]:
    """One list of (patch, scope) pairs that runs several arms of an experiment in one batch, whose rows are the prompts
    once for each arm, arm by arm. The arms are lists of pairs with the same scopes."""

    def each(patches):
        return lambda acts: torch.cat([patch(part) for patch, part in zip(patches, acts.chunk(len(patches)), strict=True)])

    return [(each([patch for patch, _ in pairs]), pairs[0][1]) for pairs in zip(*arms, strict=True)]


# ---------------------------------------------------------------------------------------------
# Where a token stands
# ---------------------------------------------------------------------------------------------


@contextmanager
def stating(model, prompts: list[list[int]]):
    """States the prompts (token ids, BOS included; one for each row of the batch) of all calls of `model`
    inside the context, so that edits need not tell prompt from continuation by themselves."""
    before, model.__dict__["stated_prompts"] = model.__dict__.get("stated_prompts"), prompts
    try:
        yield
    finally:
        model.__dict__["stated_prompts"] = before


class Sequence:
    """What is known of the texts in one KV cache: `seen` and `reached` (batch, columns), columns that are no
    padding and those an edit reached; `length` and `last` (batch, 1), the prompts' lengths and the place of
    their last token that is text, None where unknown; `stated`: the prompts or lengths that say so and hold for
    what follows as well, or None."""

    def __init__(self, seen: Tensor, length: Tensor | None, last: Tensor | None, stated: list | None):
        self.seen, self.reached, self.length, self.last, self.stated = seen, torch.zeros_like(seen), length, last, stated


class TokenTracker:
    """Knows, at each call of the model, which positions are text, where in the sequence they stand and which
    belong to the prompt; raises UserError where it cannot know.

    Runs before (`__call__`) and after (`after`) each call of the model. Arguments are bound to the
    forward's own signature. A position is taken from what the tracker has seen go into the KV cache
    and the attention mask; the cache's own length, position_ids and cache_position, as far as they are
    there, have to agree. Where prompts end is stated: by `generate` and `next_logprobs`, or by
    `prompt_lengths` (one for each row, BOS included; whatever stands later counts as generated); a call that neither goes on from a cache nor fills
    one that it was given, nor repeats the call before and adds to it, is a prompt as a whole.
    """

    def __init__(self, tokenizer, prompt_lengths: list[int] | None = None):
        self.tokenizer, self.special, self.bos, self.prompt_lengths = tokenizer, torch.tensor(special_ids(tokenizer)), tokenizer.bos_token_id, prompt_lengths
        self.sequences: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # KV cache -> Sequence
        self.sequence = self.ids = self.text = self.index = self.earlier = self.names = None
        self.past, self.in_call, self.unknown = 0, False, ""

    def __call__(self, model, args, kwargs) -> None:
        given = self.arguments(model, args, kwargs)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise refusal("there are no input_ids (batch, tokens), and inputs_embeds do not say what is text", "pass input_ids")
        cache = self.cache_among(given)
        self.past = past = cached_length(cache) if cache is not None else 0
        before = self.before(cache, past, len(ids))
        if mask is None:
            new = torch.ones_like(ids, dtype=torch.bool)
        elif isinstance(mask, Tensor) and mask.shape == (len(ids), past + ids.shape[1]):
            new = mask[:, past:].bool()
        else:
            got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise refusal(
                f"the attention mask ({got}) does not say for each of {past} + {ids.shape[1]} positions whether it is padding",
                "pass a mask (batch, tokens so far), and no static cache",
            )
        if past and not torch.equal(before.seen, torch.ones_like(before.seen) if mask is None else mask[:, :past].bool()):
            raise refusal("the attention mask has padding elsewhere than it was when the cache was filled", "give each call the mask of the whole text so far")
        seen = torch.cat([before.seen, new], 1) if past else new
        self.index = (seen.long().cumsum(1) - 1)[:, past:]  # place in the sequence, padding not counted
        self.check_positions(given, new)
        if self.special.device != ids.device:
            self.special = self.special.to(ids.device)
        self.ids, self.text = ids, new & ~torch.isin(ids, self.special)
        if self.bos is None:
            self.text &= self.index > 0
        stated = model.__dict__.get("stated_prompts")
        if past and (stated is None or stated is before.stated):
            self.sequence = Sequence(seen, before.length, before.last, before.stated)
        else:  # a text begins, or a kept cache gets another turn, with prompts of its own
            self.sequence = Sequence(seen, *self.prompt_ends(stated, new, cache))
        if past:
            self.sequence.reached[:, :past] = before.reached
        if cache is not None:
            self.sequences[cache] = self.sequence
        self.in_call = True

    def after(self, model, args, output) -> None:
        """Remembers the cache that the call made, whatever its name. Called also when the call fails."""
        self.in_call = False
        for value in output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ():
            if hasattr(value, "get_seq_length"):
                self.sequences[value] = self.sequence

    def arguments(self, model, args, kwargs) -> dict:
        """The call's arguments by name."""
        if self.names is None:
            kinds = inspect.signature(model.forward).parameters.values()
            self.names = [p.name for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(args) > len(self.names):
            raise refusal(f"the model was given {len(args)} arguments by position, and its forward names {len(self.names)}", "pass them by name")
        return dict(zip(self.names, args, strict=False)) | kwargs

    def cache_among(self, given: dict):
        """The KV cache among the arguments, whatever its name, or None. An object of unknown kind may be one."""
        plain = (Tensor, bool, int, float, str, type(None))
        nothing = lambda value: isinstance(value, plain) or (isinstance(value, dict) and not value)  # {}: no image
        objects = {name: value for name, value in given.items() if name != "attention_mask" and not nothing(value)}
        for name, value in objects.items():
            if not hasattr(value, "get_seq_length"):
                raise refusal(f"the argument {name} is a {type(value).__name__}, which may say where tokens stand", "leave it out, or pass a Cache")
        if len(objects) > 1:
            raise refusal(f"there are several caches ({', '.join(objects)})", "pass one")
        return next(iter(objects.values()), None)

    def before(self, cache, past: int, batch: int) -> Sequence | None:
        """What is known of the `past` positions in the cache, cut to these; None where it is empty."""
        if past == 0:
            return None
        known = self.sequences.get(cache)
        if known is None or known.seen.shape[1] < past:
            raise refusal(f"the cache holds {past} positions that were not computed in this context, so no edit could reach them", "start without a cache")
        if len(known.seen) != batch:
            raise refusal(f"the cache was filled with {len(known.seen)} texts, and the call has {batch}", "start without a cache")
        told = known.stated is not None
        cut = Sequence(known.seen[:, :past], known.length if told else None, known.last if told else None, known.stated)
        cut.reached = known.reached[:, :past]  # shorter than it was where a decoder dropped what it had tried
        return cut

    def check_positions(self, given: dict, new: Tensor) -> None:
        """UserError unless what the call says of positions is what the tracker knows."""
        positions, columns = given.get("position_ids"), given.get("cache_position")
        if positions is not None:
            if positions.dim() == 3:  # one set for each axis of an image; of text they are alike
                agree = (positions == positions[:1]).all()
                positions = positions[0]
            else:
                agree = True
            if positions.dim() == 1:
                positions = positions[None]
            if positions.shape[1] != new.shape[1] or not (agree & ((positions == self.index) | ~new)).all():
                raise refusal("position_ids say that tokens stand elsewhere than the attention mask and the cache do", "leave position_ids out")
        if columns is not None and columns.tolist() != list(range(self.past, self.past + new.shape[1])):
            raise refusal("cache_position is not what follows the cache", "leave it out")

    def prompt_ends(self, stated, new: Tensor, cache) -> tuple[Tensor | None, Tensor | None, list | None]:
        """`length`, `last` and `stated` of the Sequence of this call; `unknown` says why one is None."""
        ids, index = self.ids, self.index
        column = lambda values: torch.tensor(values, device=ids.device)[:, None]
        earlier, self.earlier, self.unknown = self.earlier, None, ""
        if stated is not None:
            if len(stated) != len(ids):
                raise refusal(f"{len(stated)} prompts were stated, and the call has {len(ids)} texts", "generate with editing.generate")
            length = column([len(prompt) for prompt in stated])
            whole, _ = pad(stated, device=ids.device)
            there = new & (index < length)
            if not ((ids == whole.gather(1, index.clamp(0, whole.shape[1] - 1))) | ~there).all():
                raise refusal("the model was given other prompts than were stated", "generate with editing.generate")
            return length, column([last_text(prompt, self.tokenizer) for prompt in stated]), stated
        if self.prompt_lengths is not None:
            if len(self.prompt_lengths) != len(ids):
                raise refusal(f"there are {len(self.prompt_lengths)} prompt_lengths, and the call has {len(ids)} texts", "give one for each row of the batch")
            length = column(self.prompt_lengths)
        elif cache is not None:
            self.unknown = "a cache is filled, with the whole prompt or with a part of it"
            return None, None, None
        elif earlier is not None and len(earlier) == len(ids) and 0 < earlier.shape[1] < ids.shape[1] and torch.equal(earlier, ids[:, : earlier.shape[1]]):
            self.earlier, self.unknown = ids, "the call repeats the one before and goes on, with generated tokens or with given ones"
            return None, None, None
        else:
            self.earlier, length = ids, new.long().sum(1, keepdim=True)
        if not (new.long().sum(1, keepdim=True) >= length).all():
            self.unknown = "the call holds only a part of the prompt"
            return length, None, self.prompt_lengths
        return length, torch.where(self.text & (index < length), index, -1).amax(1, keepdim=True), self.prompt_lengths

    def where(self, scope) -> Tensor:
        """(batch, seq) boolean: the text positions in `scope`.

        "all", "prompt", "generated", "last" (the prompt's last token that is text); a list of places in the
        sequence, BOS being 0 and negative ones counted from the prompt's end; or a function of the
        token ids (batch, seq) that tells where. UserError where that hangs on something unknown.
        """
        if callable(scope):
            chosen = scope(self.ids)
            if not isinstance(chosen, Tensor) or chosen.shape != self.ids.shape or chosen.dtype != torch.bool:
                raise UserError(f"a scope that is a function returns a boolean for each of the token ids {tuple(self.ids.shape)} it is given, not {chosen!r}.")
            return self.text & chosen
        if isinstance(scope, str) and scope == "all":
            return self.text
        places = scope if isinstance(scope, (list, tuple, range)) else []
        if not (isinstance(scope, str) and scope in ("prompt", "generated", "last") or places is scope and all(type(place) is int for place in places)):
            raise UserError(f"scope must be all, prompt, generated, last, a list of positions or a function of token ids, not {scope!r}.")
        length, last = (self.sequence.length, self.sequence.last) if isinstance(scope, str) or any(place < 0 for place in places) else (0, 0)
        if length is None or (last is None and scope == "last"):
            why = self.unknown or "it goes on from a cache, with generated tokens or with given ones"
            raise refusal(f"scope {scope!r} hangs on where each prompt ends, and that was not stated: {why}", "generate with editing.generate, or pass prompt_lengths to intervene")
        if scope in ("prompt", "generated"):
            return self.text & ((self.index < length) == (scope == "prompt"))
        if scope == "last":
            return self.text & (self.index == last)
        chosen = torch.zeros_like(self.text)
        for place in places:
            chosen |= self.index == (place if place >= 0 else length + place)
        return self.text & chosen

    def reach(self, positions: Tensor) -> None:
        """Notes that an edit reached these positions (batch, seq) of the call."""
        self.sequence.reached[:, self.past :] |= positions

    def reached(self) -> list[int]:
        """At how many positions the edits reached each text of the sequence that was run last."""
        return self.sequence.reached.sum(1).tolist() if self.sequence else []


def last_text(prompt: list[int], tokenizer) -> int:
    """The place of a prompt's last token that is text; -1 where there is none."""
    special = set(special_ids(tokenizer))
    return max((i for i, token in enumerate(prompt) if token not in special and (i > 0 or tokenizer.bos_token_id is not None)), default=-1)


def refusal(what: str, instead: str) -> UserError:
    """Where a token stands is not known: what was missing, in which version, and what to do."""
    import transformers

    return UserError(f"where the edit should go cannot be told: {what} (transformers {transformers.__version__}); {instead}.")


def cached_length(cache) -> int:
    """Positions in a KV cache. UserError where it does not say."""
    try:
        return int(cache.get_seq_length())
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise refusal(f"the cache, a {type(cache).__name__}, does not say how long it is ({error})", "start without a cache") from error


def at(positions: Tensor, x: Tensor) -> Tensor:
    """A mask over (batch, seq) that broadcasts over x, also where a model flattens the two (OPT)."""
    if positions.numel() * x.shape[-1] != x.numel():
        raise UserError(f"the hooked module gives {tuple(x.shape)}, which is not one activation for each of the tokens {tuple(positions.shape)}: choose another hook.")
    return positions.reshape(*x.shape[:-1], 1)


# ---------------------------------------------------------------------------------------------
# The layer with its latents edited
# ---------------------------------------------------------------------------------------------


class SAEIntervenableMLP(nn.Module):
    """Stands where the MLP (or another module with one output) stood: the original runs, then the SAE.

    patch: any function acts -> acts, or a list of (patch, scope), applied in that order; None: nothing is
    edited. With `keep_error` the output is the module's own plus ((patched - acts) @ W_dec) * norm at the
    tokens where something changed, so an empty patch is the identity bit for bit; without it the output
    is the plain reconstruction. A bare wrapper edits every position; `intervene` gives it a tracker, so
    that BOS, padding and what is outside `scope` are left alone. `mlp` is the original. With
    `keep_acts`, `acts` and `patched` (batch, seq, d_sae) are those of the last forward pass.

    Where only `Edit`s are applied, only the edited latents are encoded, as far as the architecture allows.
    """

    def __init__(self, mlp: nn.Module, sae: SAE, patch=None, *, keep_error: bool = True, scope="all", tracker: TokenTracker | None = None, keep_acts: bool = False):
        super().__init__()
        self.mlp, self.training = mlp, mlp.training
        object.__setattr__(self, "sae", sae)  # not a submodule: model.to(bfloat16) must not touch its float32
        self.patches = patch if isinstance(patch, list) else [] if patch is None else [(patch, scope)]
        self.keep_error, self.tracker, self.keep_acts, self.acts, self.patched = keep_error, tracker, keep_acts, None, None
        self.few, self.columns = None, None  # the edited latents, as numbers and as a tensor
        if keep_error and not keep_acts and all(isinstance(part, Edit) for part, _ in self.patches):
            self.few = list(dict.fromkeys(check_latent(i, sae.d_sae) for part, _ in self.patches for i in part.ids))
            self.columns = torch.tensor(self.few, dtype=torch.long)

    def forward(self, *args, **kwargs):
        return self.edited(self.mlp(*args, **kwargs))

    def edited(self, output):
        """What becomes of the module's output, a tensor or a tuple that begins with it."""
        edited = self.edit(first_output(output))
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def apply_patches(self, acts: Tensor, x: Tensor) -> Tensor:
        """acts after all patches, each within its scope. UserError where one returns something else than acts."""
        for patch, scope in self.patches:
            new = patch.change_among(self.few, acts) if self.few is not None else patch(acts)
            if not isinstance(new, Tensor) or (new.shape, new.dtype, new.device) != (acts.shape, acts.dtype, acts.device):
                got = f"{tuple(new.shape)}, {new.dtype}, {new.device}" if isinstance(new, Tensor) else type(new).__name__
                raise UserError(f"a patch must return acts of the shape {tuple(acts.shape)}, {acts.dtype}, {acts.device}, as it was given them, not {got}.")
            if self.tracker:
                where = self.tracker.where(scope)
                self.tracker.reach(where)
                new = torch.where(at(where, x), new, acts)
            acts = new
        return acts

    def edit(self, x: Tensor) -> Tensor:
        """The module's output x (batch, seq, d_in) with the SAE's edit, in x's dtype."""
        if x.shape[-1] != self.sae.d_in:
            raise UserError(f"the SAE is for activations {self.sae.d_in} wide, this module's are {x.shape[-1]} wide: it was trained at another place.")
        if self.tracker and not self.tracker.in_call:
            raise refusal("the hooked module runs outside a call of the model that `intervene` was given", "call that model, not its base model or a layer")
        if not self.patches and self.keep_error and not self.keep_acts:
            return x
        sae = self.sae.to(x.device)
        x_unit, norm = sae.normalise(x)
        if self.columns is not None and self.columns.device != x.device:
            with torch.inference_mode(False):
                self.columns = self.columns.to(x.device)
        acts = sae.encode_unit(x_unit, self.columns)
        patched = self.apply_patches(acts, x)
        if self.keep_acts:
            self.acts, self.patched = acts, patched
        if not self.keep_error:
            reconstruction = sae.denormalise(sae.decode_unit(patched), norm).to(x.dtype)
            return torch.where(at(self.tracker.text, x), reconstruction, x) if self.tracker else reconstruction
        changed = (patched != acts) & ~(patched.isnan() & acts.isnan())
        delta = linear(patched - acts, (sae.W_dec if self.columns is None else sae.W_dec[self.columns]).T) * norm
        return torch.where(changed.any(-1, keepdim=True), x + delta.to(x.dtype), x)


@contextmanager
def tracked(model, module_name: str, tracker: TokenTracker, edited):
    """While the context lasts, the module's output is `edited(output)` and `tracker` knows the model's calls.

    By hooks alone: the model's modules and their state_dict are its own all the time, and contexts may
    end in any order.
    """
    handles = [
        model.register_forward_pre_hook(tracker, with_kwargs=True),
        model.register_forward_hook(tracker.after, always_call=True),
        model.get_submodule(module_name).register_forward_hook(lambda module, args, output: edited(output)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def intervene(model, hook_name: str, sae: SAE, tokenizer, patch=None, *, scope="all", keep_error: bool = True, keep_acts: bool = False, prompt_lengths=None):
    """Edits latents at the hooked module as `SAEIntervenableMLP` does, while the context lasts.

    Yields the wrapper; `wrapper.tracker.reached()` says at how many positions each text was edited.
    `prompt_lengths` (one for each row, BOS included): where prompts end, for scopes that hang on it when
    the model is called otherwise than by `generate`, `next_logprobs` or with whole prompts. UserError
    where it is not known where a token stands (`TokenTracker`).
    """
    trained_at = sae.config.get("hook_name", hook_name)
    if trained_at != hook_name:
        raise UserError(f"the SAE was trained at {trained_at}, not at {hook_name}: name that hook, or train one there.")
    tracker = TokenTracker(tokenizer, prompt_lengths)
    wrapper = SAEIntervenableMLP(model.get_submodule(hook_name), sae, patch, keep_error=keep_error, scope=scope, tracker=tracker, keep_acts=keep_acts)
    with tracked(model, hook_name, tracker, wrapper.edited):
        yield wrapper


@contextmanager
def edit_output(model, module_name: str, edit, tokenizer):
    """Replaces a module's output x by `edit(x)` at text tokens while the context lasts."""
    tracker = TokenTracker(tokenizer)

    def edited(output):
        x = first_output(output)
        x = torch.where(at(tracker.text, x), edit(x), x)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    with tracked(model, module_name, tracker, edited):
        yield


# ---------------------------------------------------------------------------------------------
# Running the model
# ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(model, tokenizer, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0, seed: int = 0, **more) -> list[list[int]]:
    """New token ids for each prompt (token ids, BOS included), batched with left padding.

    Greedy at temperature 0; else sampled, the same for the same seed. Ends before EOS. `more`: other settings of
    transformers.GenerationConfig; with num_return_sequences the texts of one prompt stand together.
    """
    import transformers

    ids, mask = pad(prompts, side="left", device=model.device)
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    settings = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature or None,
        pad_token_id=min(ends, default=0), eos_token_id=sorted(ends) or None, bos_token_id=tokenizer.bos_token_id, **more,
    )  # fmt: skip
    copies = max(more.get("num_beams", 1), more.get("num_return_sequences", 1))  # rows that each prompt becomes
    own, model.generation_config = model.generation_config, settings  # its own fills whatever is unset: penalties, top-k
    try:
        with torch.random.fork_rng(), stating(model, [prompt for prompt in prompts for _ in range(copies)]):
            torch.manual_seed(seed)
            out = model.generate(input_ids=ids, attention_mask=mask)
    finally:
        model.generation_config = own
    new = out[:, ids.shape[1] :].tolist()
    return [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in new]


def batch_size(formed: int, d_vocab: int, most: int = 32) -> int:
    """How many windows go together where logits are formed at `formed` places of each: 128M numbers at most, 0.5 GB in float32."""
    return max(1, min(most, 2**27 // (formed * d_vocab)))


def batches(windows: list[list[int]], model, most: int = 32, formed: int = 0):
    """Lists of windows small enough for their logits (`batch_size`). `formed`: at how many places of each window logits
    are formed; 0 is at all of them."""
    formed = formed or max(map(len, windows), default=1)
    size = batch_size(formed, model.config.get_text_config().vocab_size, most)
    for start in range(0, len(windows), size):
        yield windows[start : start + size]


@contextmanager
def to_differentiate(model, module_name: str):
    """While the context lasts gradients are on, and a module's output is where they end: yields {"x": that output},
    filled by a pass, for torch.autograd.grad."""
    caught = {}

    def hook(module, args, output):
        caught["x"] = x = first_output(output).detach().requires_grad_()
        x = x.clone()  # some models go on in place (Falcon)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = model.get_submodule(module_name).register_forward_hook(hook)
    try:
        with torch.enable_grad():
            yield caught
    finally:
        handle.remove()


def logits_at(model, ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    """Logits (batch, n, d_vocab) at `places` (batch, n) of each row, or (1, n, d_vocab) where `places` (batch, seq),
    boolean, is true. The head sees these alone: with a vocabulary of 262,144 tokens it costs more than all layers."""
    head, seen = model.get_output_embeddings(), []

    def take(x: Tensor) -> Tensor:
        return x[places][None] if places.dtype == torch.bool else x.gather(1, places[:, :, None].expand(-1, -1, x.shape[-1]))

    def few(module, args):
        if args and isinstance(args[0], Tensor) and args[0].shape[:2] == ids.shape:
            seen.append(True)
            return (take(args[0]), *args[1:])

    handle = head.register_forward_pre_hook(few) if isinstance(head, nn.Module) else None
    try:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        if handle:
            handle.remove()
    return logits if seen else take(logits)


def logprobs_at(model, texts: list[list[int]], places: list, prompts: list[list[int]]):
    """Yields for each text (token ids) the log-probabilities (n, d_vocab), float32 on the CPU, of what comes after
    each of its `places`, n indices. Inside `intervene` edits know that the texts begin with `prompts`."""
    most, done = max(map(len, places), default=1), 0
    for batch in batches(texts, model, formed=max(1, most)):
        here = places[done : done + len(batch)]
        ids, mask = pad(batch, device=model.device)  # on the right: absolute positions then need no help
        index = torch.tensor([[*place, *[0] * (most - len(place))] for place in here], dtype=torch.long, device=ids.device)
        with torch.inference_mode(), stating(model, prompts[done : done + len(batch)]):
            logits = logits_at(model, ids, mask, index)
        for row, place in zip(logits, here, strict=True):
            yield row[: len(place)].float().log_softmax(-1).cpu()
        done += len(batch)


def next_logprobs(model, prompts: list[list[int]]) -> Tensor:
    """Log-probabilities (prompts, d_vocab) of the token after each prompt, float32 on the CPU."""
    return torch.cat([*logprobs_at(model, prompts, [[len(prompt) - 1] for prompt in prompts], prompts)])


def logprobs_of(model, prompts: list[list[int]], continuations: list[list[int]]) -> list[Tensor]:
    """For each prompt, log-probabilities (tokens of its continuation, d_vocab) before each of those tokens,
    the continuation being given; float32 on the CPU. Inside `intervene` edits know where the prompts end."""
    texts = [prompt + more for prompt, more in zip(prompts, continuations, strict=True)]
    places = [range(len(prompt) - 1, len(text) - 1) for prompt, text in zip(prompts, texts, strict=True)]
    return list(logprobs_at(model, texts, places, prompts))


def surprise(model, prompts: list[list[int]], continuations: list[list[int]]) -> float:
    """Mean over all their tokens of -log p of the continuations, in nats; exp of it is their perplexity."""
    total, count = 0.0, 0
    for logprobs, more in zip(logprobs_of(model, prompts, continuations), continuations, strict=True):
        total -= logprobs.gather(1, torch.tensor(more, dtype=torch.long)[:, None]).double().sum().item()
        count += len(more)
    return total / max(1, count)
