"""What each latent responds to, and what it writes: contexts, tokens promoted, one page for all of them.

Contexts come from one pass over the stored rows, in which only active entries are kept. For every
latent there are the places where it fires most, in distinct documents, and places drawn from each
tenth of its activations, since the strongest ones alone flatter a latent.
"""

import base64
import copy
import csv
import gzip
import html
import json
import os
import shlex
from collections import Counter
from pathlib import Path

import jinja2
import numpy as np
import torch
from torch import Tensor

import editing
import fidelity
import sae_utils
import showing
import storing
from sae_utils import nonzero_flat

TOP, PER_DECILE, AROUND = 10, 5, 8  # contexts shown, contexts of each tenth, tokens to either side
TEXT = 3_200_000  # tokens of text that a page holds, at most
ALIKE, LOGIT_BINS, LOGITS = 5, 40, 32_768  # latents named as like another; bins of the histogram of a latent's logit weights, and tokens in it
SAMPLE, BINS = 256, 20  # activations drawn of each latent, bins of its histogram
CLASSES = ("digit", "capital", "punctuation", "word start", "in a word")
POSITIONS = (1, 2, 3, 5, 9, 17, 33, 65)  # first position of each group; the last one is open


def active_entries(sae: sae_utils.SAE, activations: Tensor, index: Tensor, chunk: int = 4096):
    """Yields (rows, latents, values) of the active entries of activations[index], a chunk of rows at a time."""
    for part in index.split(chunk):
        acts = sae.encode(activations[part].to(sae.W_enc.device)).cpu()
        flat = nonzero_flat(acts > 0)
        yield part[flat // sae.d_sae], flat % sae.d_sae, acts.view(-1)[flat]


def first_of_each(latents: Tensor, order_by: Tensor, n: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of each latent with the `n` smallest of `order_by` (int32, not negative): (which entries,
    their latent, their place among the latent's own)."""
    key, which = ((latents << 32) | order_by.long()).sort()
    latent = key >> 32
    starts = torch.searchsorted(latent, torch.arange(d_sae))
    place = torch.arange(len(latent)) - starts[latent]
    kept = place < n
    return which[kept], latent[kept], place[kept]


class Keeper:
    """For each latent the `n` entries with the smallest key, of all that were offered, block by block."""

    def __init__(self, d_sae: int, n: int):
        self.key = torch.full((d_sae, n), 2**31 - 1, dtype=torch.int32)
        self.row, self.value = torch.full((d_sae, n), -1), torch.zeros(d_sae, n)

    def offer(self, rows: Tensor, latents: Tensor, values: Tensor, keys: Tensor) -> None:
        d_sae, n = self.key.shape
        which, latent, place = first_of_each(latents, keys, n, d_sae)
        new = Keeper(d_sae, n)
        for mine, theirs in ((new.key, keys), (new.row, rows), (new.value, values)):
            mine[latent, place] = theirs[which]
        key, order = torch.cat([self.key, new.key], 1).sort(dim=1, stable=True)
        self.key = key[:, :n]
        self.row, self.value = (torch.cat(pair, 1).gather(1, order[:, :n]) for pair in ((self.row, new.row), (self.value, new.value)))


@torch.no_grad()
def contexts(sae: sae_utils.SAE, activations: Tensor, index: Tensor, document: Tensor, seed: int = 0, block: int = 0) -> dict[str, Tensor]:
    """Rows at which each latent fires, of the rows `index`; `document` (N,) is each row's document.

    top_rows, top_values (d_sae, TOP): where it fires most, one for each document; drawn_rows,
    drawn_values (d_sae, SAMPLE): an even sample of the places where it fires, weakest first;
    decile_rows, decile_values (d_sae, 10, PER_DECILE): some of those from each tenth of the sample.
    Row -1: there are no more. Holds `block` entries (0: 2 million, or twice what is kept) and 320 for each latent. A share estimated from
    the sample is off by 3 points or less (one standard error), and exact where a latent fires SAMPLE
    times at most.
    """
    strongest, drawn = Keeper(sae.d_sae, 64), Keeper(sae.d_sae, SAMPLE)
    generator, block, n_held = torch.Generator().manual_seed(seed), block or max(2_000_000, 640 * sae.d_sae), 0
    held = torch.empty(block, dtype=torch.long), torch.empty(block, dtype=torch.long), torch.empty(block)  # one piece each: between many small ones memory is lost

    def flush():
        rows, latents, values = (column[:n_held] for column in held)
        strongest.offer(rows, latents, values, 2**31 - 1 - values.view(torch.int32))  # bits of positive floats sort as they do
        drawn.offer(rows, latents, values, torch.randint(2**31 - 1, (n_held,), generator=generator, dtype=torch.int32))

    for entries in active_entries(sae, activations, index):
        while len(entries[0]):
            n = min(block - n_held, len(entries[0]))
            for column, new in zip(held, entries, strict=True):
                column[n_held : n_held + n] = new[:n]
            entries, n_held = [new[n:] for new in entries], n_held + n
            if n_held == block:
                flush()
                n_held = 0
    if n_held:
        flush()

    top_rows, top_values = torch.full((sae.d_sae, TOP), -1), torch.zeros(sae.d_sae, TOP)
    owner = torch.where(strongest.row >= 0, document[strongest.row.clamp_min(0)], -1)
    new = (owner[:, :, None] == owner[:, None, :]).tril(-1).any(-1).logical_not_() & (owner >= 0)  # first of its document
    place = new.cumsum(1) - 1
    latent, column = (new & (place < TOP)).nonzero(as_tuple=True)
    top_rows[latent, place[latent, column]], top_values[latent, place[latent, column]] = strongest.row[latent, column], strongest.value[latent, column]

    n = (drawn.row >= 0).sum(1)
    drawn_values, order = torch.where(drawn.row >= 0, drawn.value, torch.inf).sort(dim=1)
    drawn_rows, drawn_values = drawn.row.gather(1, order), drawn_values.nan_to_num(posinf=0.0)
    decile_rows, decile_values = torch.full((sae.d_sae, 10, PER_DECILE), -1), torch.zeros(sae.d_sae, 10, PER_DECILE)
    for decile in range(10):
        first, last = n * decile // 10, n * (decile + 1) // 10
        for i in range(PER_DECILE):
            at = first + (last - first) * i // PER_DECILE
            there = (last - first > i).nonzero().flatten()
            decile_rows[there, decile, i], decile_values[there, decile, i] = drawn_rows[there, at[there]], drawn_values[there, at[there]]
    found = {"top_rows": top_rows, "top_values": top_values, "drawn_rows": drawn_rows, "drawn_values": drawn_values}
    return found | {"decile_rows": decile_rows, "decile_values": decile_values}


# ---------------------------------------------------------------------------------------------
# What it fires on, in numbers
# ---------------------------------------------------------------------------------------------


def token_classes(pieces: list[str]) -> Tensor:
    """(len(pieces), CLASSES) boolean: simple classes of tokens by their text. They overlap: " Paris" is
    a capital and the start of a word. "in a word" goes on with one: letters without a space before. A part
    of a character (`showing.Bytes`) is in none."""
    pieces = ["" if isinstance(piece, showing.Bytes) else piece for piece in pieces]
    word = [piece.strip() for piece in pieces]
    return torch.tensor([
        [any(map(str.isdigit, w)), w[:1].isupper(), bool(w) and not any(map(str.isalnum, w)), p[:1].isspace() and w[:1].isalpha(), p[:1].isalpha()]
        for p, w in zip(pieces, word, strict=True)
    ])  # fmt: skip


def shares(found: dict[str, Tensor], rows, as_text, highest: Tensor, n_tokens: int = 5) -> dict[str, Tensor]:
    """Of the places drawn by `contexts`: how each latent's firing spreads over tokens, positions and classes.

    fired_tokens, fired_tokens_share (d_sae, n_tokens): the most frequent tokens (-1: no more);
    fired_positions (d_sae, POSITIONS), fired_classes (d_sae, CLASSES): shares; histogram (d_sae, BINS):
    of activations from 0 to `highest` (d_sae). base_positions, base_classes: the shares among all rows.
    """
    drawn, values = found["drawn_rows"], found["drawn_values"]
    there = drawn >= 0
    count = there.sum(1).clamp_min(1)
    frequency, at_position = torch.bincount(rows.token_ids), torch.bincount(rows.position)
    vocabulary = frequency.nonzero().flatten()
    classes = token_classes([as_text(int(token)) for token in vocabulary]).float()
    group = torch.bucketize(torch.arange(len(at_position)), torch.tensor(POSITIONS), right=True).sub_(1).clamp_min_(0)  # of each position

    def spread(kinds: Tensor, n: int) -> Tensor:
        """Share of each of n kinds among the places of each latent; kinds (d_sae, SAMPLE)."""
        return torch.zeros(len(drawn), n + 1).scatter_add_(1, torch.where(there, kinds, n), torch.ones(drawn.shape))[:, :n] / count[:, None]

    fired_tokens, fired_share = torch.full((len(drawn), n_tokens), -1), torch.zeros(len(drawn), n_tokens)
    fired_classes = torch.zeros(len(drawn), len(CLASSES))
    for latent in there.any(1).nonzero().flatten().tolist():
        tokens, n = rows.token_ids[drawn[latent, there[latent]]].unique(return_counts=True)
        order = n.argsort(descending=True, stable=True)[:n_tokens]
        fired_tokens[latent, : len(order)] = tokens[order].long()
        fired_share[latent, : len(order)] = n[order] / count[latent]
        fired_classes[latent] = n.float() @ classes[torch.searchsorted(vocabulary, tokens)] / count[latent]
    bins = (values / highest.clamp_min(1e-9)[:, None] * BINS).long().clamp(0, BINS - 1)
    return {
        "fired_tokens": fired_tokens, "fired_tokens_share": fired_share, "fired_classes": fired_classes,
        "fired_positions": spread(group[rows.position[drawn.clamp_min(0)]], len(POSITIONS)), "histogram": spread(bins, BINS),
        "base_positions": torch.bincount(group, weights=at_position, minlength=len(POSITIONS)).float() / len(rows),
        "base_classes": frequency[vocabulary].float() / len(rows) @ classes,
    }  # fmt: skip


def mostly_on(found: dict[str, Tensor], more_than: float = 0.9) -> dict[str, Tensor]:
    """{kind: (d_sae) boolean}, of what `shares` returns: latents of whose places more than such a share are one token,
    the first two positions, or one class. Classes that hold nearly half of all tokens are left out: it says little."""
    kinds = {"one token": found["fired_tokens_share"][:, 0], "the first two positions": found["fired_positions"][:, :2].sum(1)}
    kinds |= {f"class: {name}": found["fired_classes"][:, i] for i, name in enumerate(CLASSES) if found["base_classes"][i] < 0.45}
    return {kind: share > more_than for kind, share in kinds.items()}


@torch.no_grad()
def similar_directions(W_dec: Tensor, above: float = 0.9, chunk: int = 1024, most: int = 1000) -> tuple[Tensor, Tensor, list[tuple[int, int, float]]]:
    """(nearest (d_sae, ALIKE), cosine likewise, pairs): for each decoder row the others most like it, the nearest first
    (where there are fewer, all), and pairs (i, j, cosine), i < j, whose cosine is larger than `above`, the most alike first.

    Of each `chunk` of rows i the `most` pairs most alike are listed: where latents have collapsed nearly
    all pairs are alike, and a list of them all takes minutes and gigabytes.
    """
    rows = W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    nearest, cosine, pairs = [], [], []
    for first in range(0, len(rows), chunk):
        cosines = rows[first : first + chunk] @ rows.T
        here = torch.arange(len(cosines), device=rows.device)
        cosines[here, first + here] = -2  # not itself
        best = cosines.topk(min(ALIKE, len(rows) - 1), dim=1)
        nearest.append(best.indices.cpu())
        cosine.append(best.values.cpu())
        alike = (cosines > above) & (torch.arange(len(rows), device=rows.device) > first + here[:, None])  # each pair once
        found = min(int(alike.sum()), most)
        if found:
            best = cosines.masked_fill_(~alike, -2).flatten().topk(found)
            i, j = best.indices // len(rows) + first, best.indices % len(rows)
            pairs += zip(i.tolist(), j.tolist(), best.values.tolist(), strict=True)
    return torch.cat(nearest), torch.cat(cosine), sorted(pairs, key=lambda pair: -pair[2])


@torch.no_grad()
def firing_together(sae: sae_utils.SAE, activations: Tensor, index: Tensor, most: int = 30_000, pairs: int = 200_000_000, least: int = 5, chunk: int = 0) -> dict[str, Tensor]:
    """For each latent those that fire on the same tokens, by phi: the correlation over rows of "fires", 0 or 1, of two latents,
    (n both - a b) / sqrt(a b (n - a) (n - b)), where of n rows one fires on a, the other on b. Frequent latents meet by
    chance, for which phi, unlike the share of rows that they have in common, allows.

    together (d_sae, ALIKE): latents, the highest phi first, -1: no more; together_phi likewise. Left out are pairs that meet
    on fewer than `least` rows, which may be luck, and those of phi 0 and below. Measured on `most` of the rows `index`, at
    equal steps; on fewer where so many latents fire at once that the rows would hold more than `pairs` pairs of them.
    """
    chunk = chunk or max(1, 2**21 // sae.d_sae)  # latents at a time
    index = index[torch.linspace(0, len(index) - 1, min(most, len(index)), dtype=torch.double).round().long()]
    rows, latents, n, left = [], [], 0, pairs
    for part in index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))].split(4096):
        found = [torch.cat(parts) for parts in zip(*active_entries(sae, activations, part), strict=True)]
        rows.append(found[0])
        latents.append(found[1])
        n, left = n + len(part), left - int(found[0].unique(return_counts=True)[1].square().sum())
        if left < 0:
            break
    _, row, active = torch.cat(rows).unique(return_inverse=True, return_counts=True)
    order = row.argsort(stable=True)
    row, latent = row[order], torch.cat(latents)[order]  # the entries of a row follow one another
    start, fires = active.cumsum(0) - active, torch.bincount(latent, minlength=sae.d_sae).double()
    by_latent = latent.argsort(stable=True)
    ends = torch.searchsorted(latent[by_latent], torch.arange(sae.d_sae + chunk), right=False)
    most_active = max(1, int(active.max())) if len(active) else 1
    together, together_phi = torch.full((sae.d_sae, ALIKE), -1), torch.zeros(sae.d_sae, ALIKE)
    for first in range(0, sae.d_sae, chunk):
        both = torch.zeros(min(chunk, sae.d_sae - first) * sae.d_sae, dtype=torch.long)
        for part in by_latent[ends[first] : ends[first + chunk]].split(max(1, 4_000_000 // most_active)):
            with_it = active[row[part]]  # each entry of these latents meets all those of its row
            step = torch.arange(int(with_it.sum())) - (with_it.cumsum(0) - with_it).repeat_interleave(with_it)
            other = latent[start[row[part]].repeat_interleave(with_it) + step]
            both += torch.bincount(((latent[part] - first) * sae.d_sae).repeat_interleave(with_it) + other, minlength=len(both))
        both = both.view(-1, sae.d_sae)
        a, b = fires[first : first + chunk, None], fires[None]
        phi = (n * both - a * b) / (a * b * (n - a) * (n - b)).clamp_min(1e-9).sqrt()
        phi.masked_fill_(both < least, 0)
        here = torch.arange(len(phi))
        phi[here, first + here] = 0
        best = phi.topk(min(ALIKE, sae.d_sae), dim=1)
        there = best.values > 0
        together[first : first + chunk, : there.shape[1]] = torch.where(there, best.indices, -1)
        together_phi[first : first + chunk, : there.shape[1]] = torch.where(there, best.values, 0).float()
    return {"together": together, "together_phi": together_phi}


def selectivity(tokens, text) -> tuple[np.ndarray, np.ndarray]:
    """(selectivity (n), offset (n)) of latents by the tokens at their places, (n, TOP + 10, 2 * AROUND + 1) as
    `shown_contexts` returns them: how probably two of its places have the same token, at the offset from -2 to +1 (the
    token after) where that is highest, each token weighed by how much it tells: log(its share of `text`) / log(0.001), 1 at
    most. The mean of that of the strongest places, which are of different documents, and of those of the tenths; places
    that are lacking are like no other. 1: always the same token, one in a thousand or rarer; 0: never the same twice.
    """
    near = np.asarray(tokens)[:, :, AROUND - 2 : AROUND + 2]
    ids, times = np.unique(text, return_counts=True)
    weight = np.minimum(np.log(times / times.sum()) / np.log(0.001), 1)[np.searchsorted(ids, near).clip(max=len(ids) - 1)] * (near >= 0)

    def agreeing(near: np.ndarray, weight: np.ndarray) -> np.ndarray:
        same = (near[:, :, None] == near[:, None, :]) * weight[:, :, None]
        return (same.sum((1, 2)) - weight.sum(1)) / (near.shape[1] * (near.shape[1] - 1))

    each = (agreeing(near[:, :TOP], weight[:, :TOP]) + agreeing(near[:, TOP:], weight[:, TOP:])) / 2
    return each.max(1), each.argmax(1) - 2


def text_around(flat: np.ndarray, starts: np.ndarray, window: Tensor, position: Tensor, reach: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(text, text_starts, at): the tokens of windows (`flat`, `starts` as in `harvest.Windows`) that lie `reach` or less from one
    of the places (window, position), once each; None: the whole windows. Pieces of text_starts[i] to text_starts[i + 1] are
    without a gap and of one window; `at`: where in the text each place stands."""
    starts, window = np.asarray(starts), window.numpy()
    begin, end, near = starts[window], starts[window + 1], np.zeros(len(flat), bool)
    centre = begin + position.numpy()
    if reach is None:
        near[:] = np.isin(np.arange(len(starts) - 1), window).repeat(np.diff(starts))
    for offset in range(-(reach or 0), (reach or 0) + 1):
        place = centre + offset
        near[place[(place >= begin) & (place < end)]] = True
    kept = near.nonzero()[0]
    cut = np.ones(len(kept), bool)
    cut[1:] = (np.diff(kept) > 1) | np.isin(kept[1:], starts)
    return flat[kept], np.append(cut.nonzero()[0], len(kept)), np.searchsorted(kept, centre)


def shown_contexts(sae: sae_utils.SAE, rows, found: dict[str, Tensor], most: int = TEXT) -> dict[str, Tensor]:
    """The places of `contexts` that are shown, with what stands around them.

    tokens (d_sae, TOP + 10, 2 * AROUND + 1) int32 and acts likewise in float16: the top ones, then the first of each tenth;
    token -1: there is none. For the page, places (d_sae, TOP + 10 * n): the top ones, then n of each tenth, by where they
    stand in text, -1: there is none; place_acts (…, 2 * AROUND + 1) float16 around them; text, text_starts: see `text_around`.
    n is 3, and the text that of whole windows, unless that is more than `most` tokens.
    """
    windows = rows.windows
    for n, reach in ((3, None), (3, 64), (3, 32), (3, 16), (3, AROUND), (1, AROUND)):
        shown = torch.cat([found["top_rows"], found["decile_rows"][:, :, : 2 * n : 2].flatten(1)], dim=1)  # (d_sae, TOP + 10 * n)
        latent, place = (shown >= 0).nonzero(as_tuple=True)
        at = shown[latent, place]
        text, text_starts, there = text_around(windows.flat, windows.starts, rows.window[at].long(), rows.position[at].long(), reach)
        if len(text) <= most:
            break
    tokens = torch.full((*shown.shape, 2 * AROUND + 1), -1, dtype=torch.int32)
    acts, places = torch.zeros(tokens.shape, dtype=torch.float16), torch.full(shown.shape, -1)
    tokens[latent, place], acts[latent, place] = surroundings(sae, rows, latent, at)
    places[latent, place] = torch.from_numpy(there)
    few = [*range(TOP), *range(TOP, shown.shape[1], n)]
    saved = {"tokens": tokens[:, few], "acts": acts[:, few], "places": places, "place_acts": acts}
    return saved | {"text": torch.from_numpy(text.astype(np.int32)), "text_starts": torch.from_numpy(text_starts)}


@torch.no_grad()
def surroundings(sae: sae_utils.SAE, rows, latents: Tensor, centres: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """(token_ids (n, 2 * AROUND + 1) int32, acts likewise in float16): the tokens around the rows `centres`
    and how strongly each one's latent fires on them; id -1 past the window's ends. Quick where the places of
    a latent follow one another.
    """
    flat, starts = torch.from_numpy(rows.windows.flat), torch.from_numpy(rows.windows.starts)
    tokens, acts = torch.full((len(centres), 2 * AROUND + 1), -1, dtype=torch.int32), torch.zeros(len(centres), 2 * AROUND + 1, dtype=torch.float16)
    window, position = rows.window[centres], rows.position[centres]
    device = sae.W_enc.device
    for offset in range(-AROUND, AROUND + 1):
        place = starts[window] + position + offset
        inside = (place >= starts[window]) & (place < starts[window + 1])
        tokens[inside, offset + AROUND] = flat[place[inside]].int()
        near = centres + offset  # special tokens have no row, so a row `offset` away may lie further off
        same = (near >= 0) & (near < len(rows))
        near = near.clamp(0, len(rows) - 1)
        away = rows.position[near] - position
        same &= (rows.window[near] == window) & (away.abs() <= AROUND)
        for part in same.nonzero().flatten().split(chunk):
            which = latents[part]
            columns, own = which.unique(return_inverse=True)
            found = sae.encode(rows.activations[near[part]].to(device), columns.to(device)).cpu()
            acts[part, away[part] + AROUND] = found.gather(1, own[:, None])[:, 0].half()
    return tokens, acts


# ---------------------------------------------------------------------------------------------
# What a latent writes
# ---------------------------------------------------------------------------------------------


def mean_jacobian(norm: torch.nn.Module, x: Tensor) -> Tensor:
    """Mean over the rows x (n, d) of the norm's Jacobian, (d of the output, d of the input)."""
    with torch.enable_grad():
        return sum(torch.autograd.functional.jacobian(norm, row, vectorize=True) for row in x.float()) / len(x)


@torch.no_grad()
def token_effects(model, hook_name: str, sae: sae_utils.SAE, windows: list[list[int]], special: list[int], k: int = 10, most: int = 64) -> dict[str, Tensor]:
    """The tokens that each latent promotes and suppresses by the direct path, to first order.

    Its decoder row passes the norm that follows the hook, where there is one, the final norm and what stands
    between that and the head (OPT's project_out), each as its mean Jacobian over `most` text tokens of the
    windows, and the LM head; a softcap and what later layers make of it are left out. Per unit of the
    model's activation along the row.

    Returns promoted, suppressed (d_sae, k) token ids and promoted_by, suppressed_by: change of the logit; and
    logit_histogram (d_sae, LOGIT_BINS) int32: how many tokens of the vocabulary, or of every second, third, … where that is
    more than LOGITS, have theirs in each of equal bins from the lowest (suppressed_by[:, 0]) to the highest (promoted_by[:, 0]).
    """
    after, head = fidelity.post_norm_name(model, hook_name), model.get_output_embeddings()
    at_post: list[Tensor] = []  # what the norm after the hook takes
    path: list[tuple[torch.nn.Module, Tensor, Tensor]] = []  # the last norm and what follows it up to the head: module, what it takes and returns

    def call(module, args, kwargs, output):
        taken = next(iter((*args, *kwargs.values())), None)
        if after and module is model.get_submodule(after):
            at_post.append(taken.clone())  # some models go on in place (Falcon)
        if "Norm" in type(module).__name__:
            path[:] = [(module, taken.clone(), output)]
        elif path and module is not head and taken is path[-1][2] and output is not taken:
            path.append((module, taken.clone(), output))

    handles = [module.register_forward_hook(call, with_kwargs=True) for module in model.modules()]
    batch = sae_utils.pad(windows[:8], device=str(model.device))
    try:
        model(input_ids=batch[0], attention_mask=batch[1], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    text = batch[1].bool() & ~torch.isin(batch[0], torch.tensor(special, device=model.device))
    pick = lambda x: x.reshape(*text.shape, -1)[text][:: max(1, int(text.sum()) // most)][:most].float()
    moved = sae.W_dec.float()
    if after:
        moved = moved @ mean_jacobian(copy.deepcopy(model.get_submodule(after)).float(), pick(at_post[0])).T
    for module, taken, _ in path:
        moved = moved @ mean_jacobian(copy.deepcopy(module).float(), pick(taken)).T
    weight = head.weight.float()  # once: with 262,144 tokens it is a gigabyte
    results = {name: [] for name in ("promoted", "promoted_by", "suppressed", "suppressed_by", "logit_histogram")}
    for part in moved.split(max(1, min(256, 2**25 // len(weight)))):  # 128 MB of logits
        logits = sae_utils.linear(part, weight)
        for name, largest in (("promoted", True), ("suppressed", False)):
            best = logits.topk(min(k, logits.shape[1]), dim=1, largest=largest)
            results[name].append(best.indices.int().cpu())
            results[name + "_by"].append(best.values.cpu())
        ends = zip(results["suppressed_by"][-1][:, 0].tolist(), results["promoted_by"][-1][:, 0].tolist(), strict=True)
        some = logits[:, :: -(-logits.shape[1] // LOGITS)].contiguous()
        bins = [torch.histc(row, LOGIT_BINS, low, high) for row, (low, high) in zip(some, ends, strict=True)]
        results["logit_histogram"].append(torch.stack(bins).int().cpu())
    return {name: torch.cat(parts) for name, parts in results.items()}


def evenly_drawn(found: dict[str, Tensor], latent: int, n: int) -> Tensor:
    """Rows (at most n) at which the latent fires, at equal steps through those that `contexts` drew, weakest first."""
    drawn = found["drawn_rows"][latent]
    drawn = drawn[drawn >= 0]
    return drawn[torch.linspace(0, len(drawn) - 1, min(n, len(drawn))).long()]


@torch.no_grad()
def measured_effect(model, tokenizer, hook_name: str, sae: sae_utils.SAE, latent: int, rows, places: Tensor, k: int = 5) -> dict:
    """What the model says otherwise when the latent is ablated, at rows `places` where it fires.

    The latent is ablated wherever it fires in the window up to that token, everything else is kept
    (the SAE's error too), and the next token's log-probabilities are compared there. Returns the means
    over the places: kl (clean ‖ ablated), and the k tokens whose mean probability falls and rises most, as
    [(token id, change of the log of that mean)]; of tokens that hardly ever come the log-probability moves
    a lot too, which says nothing.
    """
    prompts = [list(rows.windows[rows.window[row]][: rows.position[row] + 1]) for row in places.tolist()]
    clean = editing.next_logprobs(model, prompts)
    with editing.intervene(model, hook_name, sae, tokenizer, editing.ablate([latent])):
        ablated = editing.next_logprobs(model, prompts)
    before, after = clean.exp().double().mean(0), ablated.exp().double().mean(0)
    order = (after - before).argsort()
    listed = lambda index: [(i, (after[i] / before[i].clamp_min(1e-30)).log().item()) for i in index.tolist()]
    falls, rises = listed(order[:k]), listed(order.flip(0)[:k])
    return {
        "places": len(prompts), "kl": (clean.exp() * (clean - ablated)).sum(1).mean().item(),
        "falls": [pair for pair in falls if pair[1] < 0], "rises": [pair for pair in rises if pair[1] > 0],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------
# What it matches, where the text's variables are known
# ---------------------------------------------------------------------------------------------


def matches(facts: list[dict], hidden: Tensor, best: dict[str, dict[str, Tensor]]) -> list[dict]:
    """known.csv: a line for each fact (of `known.read`) with the trained SAE's best latent and threshold, and the F1 of
    the best column of each of `best` {name: `known.best_f1`}."""
    return [
        {"variable": fact["variable"], "value": fact["value"], "hidden": bool(hidden[i]), "latent": int(best["trained"]["column"][i])}
        | {"threshold": round(best["trained"]["threshold"][i].item(), 4)}
        | {f"f1_{name}": round(b["f1"][i].item(), 6) for name, b in best.items()}
        for i, fact in enumerate(facts)
    ]


def splits(facts: list[dict], hidden: Tensor, best: dict[str, Tensor]) -> list[dict]:
    """Classes beside their members: F1 of the best latent for a hidden variable as a whole (value "any"), the mean over its
    hidden values, how many those are and by how many latents they are matched. Only variables of more than two such
    values, whose mean F1 is above one half: elsewhere there is nothing to compare."""
    f1, found = best["f1"], []
    for whole, fact in enumerate(facts):
        members = [i for i, other in enumerate(facts) if other["variable"] == fact["variable"] and i != whole and hidden[i]]
        if fact["value"] == "any" and hidden[whole] and len(members) > 2 and f1[members].mean() > 0.5:
            line = {"variable": fact["variable"], "class_f1": f1[whole].item(), "members_f1": f1[members].mean().item()}
            found.append(line | {"members": len(members), "latents": len(best["column"][members].unique())})
    return found


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


HEADINGS = {"latent", "number", "feature", "index", "id"}  # what a first line of labels.csv may begin with


def read_labels(path: Path) -> dict[int, str]:
    """The names that a person gave to latents: lines of number, comma, name. No file: no names. UserError, with its number,
    for a line that is none: nothing is passed over but empty lines and a heading."""
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise sae_utils.UserError(f"{sae_utils.show_path(path)} is not UTF-8: save it as UTF-8.") from None
    except OSError as error:
        raise sae_utils.UserError(f"{sae_utils.show_path(path)}: {error.strerror}.") from None
    labels, given = {}, {}
    for number, line in enumerate(lines, 1):
        where = f"{sae_utils.show_path(path)}, line {number}"
        if not line.strip() or number == 1 and line.partition(",")[0].strip().lower() in HEADINGS:
            continue
        try:
            (row,) = csv.reader([line.rstrip("\r")], strict=True)
        except csv.Error as error:
            raise sae_utils.UserError(f"{where}: {str(error)}, in {line[:80]!r}.") from None
        latent, name = row[0].strip(), ",".join(row[1:]).strip()
        if not latent.isascii() or not latent.isdecimal() or len(latent) > 18 or not name:
            raise sae_utils.UserError(f"{where}: a line is a latent's number, a comma and its name, not {line[:80]!r}.")
        if given.setdefault(int(latent), number) != number:
            raise sae_utils.UserError(f"{where}: latent {latent} has a name already, in line {given[int(latent)]}.")
        labels[int(latent)] = name
    return labels


def name_latent(path: Path, latent: int, name: str) -> dict[int, str]:
    """Gives a latent a name in labels.csv, or takes it away where that is empty; returns the names there are then. Those of other
    latents stay; the lines are sorted by number, without a heading."""
    labels = read_labels(path)
    labels = {key: value for key, value in labels.items() if key != latent} | ({latent: " ".join(name.split())} if name.strip() else {})
    with sae_utils.atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(sorted(labels.items()))
    return labels


def save(path: Path, found: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """features.npz: all of `found` but the places drawn, of which the figures are there already. Returns what it holds."""
    kept = {name: value.numpy() for name, value in found.items() if not name.startswith("drawn")}
    storing.save_arrays(path, kept, compressed=True)
    return kept


def read(run: Path) -> dict[str, np.ndarray]:
    """What `save` wrote of a finished run. UserError where the file is damaged, or of an earlier version."""
    path = run / "features.npz"
    try:
        kept = storing.load_arrays(path)
    except sae_utils.UserError as error:
        raise sae_utils.UserError(f"{str(error).removesuffix('.')}: copy it again, or train the run again under another name.") from None
    if missing := [name for name in ("tokens", "acts", "fired_tokens", "histogram", "density", "max_act", "base_classes") if name not in kept]:
        raise sae_utils.UserError(f"{sae_utils.show_path(path)} lacks {', '.join(missing)}, being of an earlier version of sae_training.ipynb: train the run again under another name.")
    return kept


def card(saved: dict, latent: int, as_text, label: str = "", n: int = 5) -> str:
    """HTML of one latent, of what features.npz holds: where it fires most (n places), a place from every
    other tenth of its activations from the weakest up, how strongly and on what it fires, what it promotes."""
    at = lambda name: np.atleast_1d(saved[name][latent])
    words = lambda tokens: " ".join(showing.shade([as_text(int(t))], [0]) for t in tokens if t >= 0)
    percent = lambda share: f"{100 * share:.3g} %"
    density, highest = at("density").item(), max(at("max_act").item(), float(at("acts").max()))

    def place(i: int) -> str:
        kept, acts = at("tokens")[i] >= 0, at("acts")[i]
        pieces, middle = [as_text(int(t)) for t in at("tokens")[i][kept]], int(kept[:AROUND].sum())
        return f"{acts[AROUND]:.2f} {showing.shade(pieces, acts[kept], top=highest, framed=middle)}"

    def others(name: str, value: str) -> str:
        return ", ".join(f"{other} ({v:.2f})" for other, v in zip(at(name), at(value), strict=True) if other >= 0) or "none"

    there = at("tokens")[:, AROUND] >= 0
    bars = "".join(f'<span style="display:inline-block;width:7px;margin-right:1px;background:rgb(255,140,0);height:{36 * h:.0f}px"></span>' for h in at("histogram") / max(at("histogram").max(), 1e-9))
    tokens = ", ".join(f"{words([t])} {percent(s)}" for t, s in zip(at("fired_tokens"), at("fired_tokens_share"), strict=True) if t >= 0)
    classes = ", ".join(f"{name} {percent(s)} ({percent(b)})" for name, s, b in zip(CLASSES, at("fired_classes"), np.asarray(saved["base_classes"]), strict=True))
    weighed = lambda name: " ".join(f"{words([t])}{f' {w:+.2g}' if w else ''}" for t, w in zip(at(name), at(name + "_by") if name + "_by" in saved else [0] * 99, strict=False))
    together = f"; fires with (phi): {others('together', 'together_phi')}" if "together" in saved else ""
    lines = [
        f"<b>latent {latent}{': ' + html.escape(label) if label else ''}</b>, fires on {percent(density)} of tokens, at most {highest:.3g}; "
        f"most like it (cosine): {others('nearest', 'nearest_cosine')}{together}",
        *(place(i) for i in range(min(n, TOP)) if there[i]), "<i>from each tenth of its activations, the weakest first:</i>",
        *(place(i) for i in range(TOP, TOP + 10, 2) if there[i]),
        f"how strongly, from 0 to its maximum: {bars}", f"fires on {tokens}; of all its places (in brackets: of all text): {classes}",
        f"promotes (change of the logit) {weighed('promoted')}", f"suppresses {weighed('suppressed')}",
    ]  # fmt: skip
    return "<br>".join(lines)


def title_of(sae: sae_utils.SAE) -> str:
    """What stands above the page of a run's latents."""
    return f"{showing.model_name(sae.config['model_name'])}, {sae.config['hook_name']}: {int((sae.density > 0).sum()):,} live latents"


def packed(arrays: dict[str, np.ndarray]) -> tuple[str, list]:
    """(text, layout) of arrays for a page: their bytes, compressed together, in base64, and [[name, numpy's letter of its
    type, number of values]] in the order of the bytes, wide types first, so that each begins at a multiple of its width."""
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))
    joined = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    layout = [[name, array.dtype.char, array.size] for name, array in arrays.items()]
    return base64.b64encode(gzip.compress(joined, 6, mtime=0)).decode(), layout


def make_whole(text: np.ndarray, starts: np.ndarray, words: list[str]) -> None:
    """Characters that are spread over several tokens are put together, in place. `text` (tokens) are indices into `words`, to
    which is added what `showing.whole` makes of them, of each piece of starts[i] to starts[i + 1] by itself."""
    part = np.array([isinstance(word, showing.Bytes) for word in words])
    place = {word: i for i, word in enumerate(words)}
    for i in np.unique(np.searchsorted(starts, part[text].nonzero()[0], side="right") - 1):
        here = slice(starts[i], starts[i + 1])
        pieces = showing.whole([words[word] for word in text[here]])
        new = [piece for piece in dict.fromkeys(pieces) if piece not in place]
        place |= {piece: len(words) + n for n, piece in enumerate(new)}
        words += new
        text[here] = [place[piece] for piece in pieces]


def firing(text: np.ndarray, starts: np.ndarray, places: np.ndarray, words: list[str], none: int, n: int = 5) -> np.ndarray:
    """(latents, n) the words at `places` (latents, any number), the most frequent first, as indices into `words`, then `none`. A token
    that goes on with a character stands as that one and "‹", which is added to `words`."""
    found, place = np.full((len(places), n), none), {}
    first = starts[np.searchsorted(starts, places, side="right") - 1]
    for i, (at, begin) in enumerate(zip(places.tolist(), first.tolist(), strict=True)):
        seen: Counter = Counter()
        for there, least in zip(at, begin, strict=True):
            if there >= 0:
                whole = next((t for t in range(there, least, -1) if words[text[t]]), least)
                word = text[whole].item()
                if whole < there and (word := place.setdefault(words[word] + showing.CONTINUED, len(words))) == len(words):
                    words.append(words[text[whole]] + showing.CONTINUED)
                seen[word] += 1
        most = [word for word, _ in seen.most_common(n)]
        found[i, : len(most)] = most
    return found


def text_of(features: dict, live: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(text, text_starts, places, acts) of `shown_contexts`, the last two of the latents `live`. Of a run from before there was
    a text, every context is a piece by itself."""
    if "text" in features:
        return tuple(np.asarray(features[name]) for name in ("text", "text_starts")) + tuple(np.asarray(features[name])[live] for name in ("places", "place_acts"))
    tokens, acts = (np.asarray(features[name])[live] for name in ("tokens", "acts"))
    there = tokens >= 0
    ends = there.sum(2).cumsum().reshape(there.shape[:2])
    places = np.where(there[:, :, AROUND], ends - there[:, :, AROUND:].sum(2), -1)
    return tokens[there], np.unique(np.append(0, ends)), places, acts


def about_run(folder: Path, as_text) -> dict:
    """What a finished run's folder says of its latents beside features.npz, for `write_page`; what is not there is left out.

    run: its name, as RUN= takes it; figures: [[name, value, what it is]], of metrics.json; rows; effects {latent: as
    `measured_effect`, the tokens as text}; known {latent: [[variable, value, hidden, F1, threshold]]}, the facts of
    known.csv of which it is the best latent, best first; stability {runs, stability (d_sae), cosine and match (runs, d_sae)}.
    """
    about: dict = {"run": Path(os.path.relpath(folder, sae_utils.ROOT / "runs")).as_posix()}
    if (folder / "metrics.json").exists():
        metrics = storing.read_json(folder / "metrics.json")
        interval = metrics.get("fidelity", {}).get("sae", {}).get("ce_increase")
        rise = "{:+.4f} ({:+.4f} to {:+.4f})".format(*interval) if interval else ""
        said = [
            ("fvu", ".4f", "share of the variance that is not explained, held-out"), ("l0", ".1f", "latents active per token, held-out"),
            ("ce_recovered", ".4f", "of what silencing the layer costs, the share that the SAE keeps"), ("kl", ".2g", "of the predictions, with the SAE in place, in nats"),
            ("rows", ",", "tokens, training and held-out"),
        ]  # fmt: skip
        about["figures"] = [[name, format(metrics[name], form), what] for name, form, what in said if metrics.get(name) is not None]
        about["figures"] += [["CE increase", rise, "next-token cross-entropy with the SAE in place, in nats, with its interval"]] * bool(rise)
        about["rows"] = metrics.get("rows", 0)
        moved = lambda pairs: [[as_text(int(token)), change] for token, change in pairs]
        about["effects"] = {latent: effect | {name: moved(effect[name]) for name in ("falls", "rises")} for latent, effect in metrics.get("effects", {}).items() if effect["kl"] is not None}
    if (folder / "known.csv").exists():
        about["known"] = {}
        try:
            with (folder / "known.csv").open(encoding="utf-8", newline="") as file:
                for fact in sorted(csv.DictReader(file), key=lambda fact: -float(fact["f1_trained"])):
                    line = [fact["variable"], fact["value"], fact["hidden"] == "True", float(fact["f1_trained"]), float(fact["threshold"])]
                    about["known"].setdefault(fact["latent"], []).append(line)
        except (ValueError, LookupError, TypeError, csv.Error):
            raise sae_utils.UserError(f"{sae_utils.show_path(folder / 'known.csv')} is damaged, or cut off: copy it again, or take it away to do without.") from None
    if (folder / "stability.npz").exists():
        about["stability"] = storing.load_arrays(folder / "stability.npz")
    return about


def write_page(path: Path, title: str, features: dict, density, strength, as_text, labels: dict[int, str], about: dict | None = None) -> None:
    """features.html: a table of all live latents and, for each, its contexts; one file, nothing fetched.

    `features`: what `contexts`, `shown_contexts`, `shares`, `similar_directions` (nearest, nearest_cosine),
    `firing_together` and `token_effects` return; older files lack some of it, and the page then does too. `as_text(id)`:
    a token's text. `about`: what `about_run` returns.
    """
    about, density = about or {}, np.asarray(density, np.float32)
    live = np.flatnonzero(density > 0)
    of_live = lambda name: np.asarray(features[name])[live].reshape(len(live), -1)
    text, text_starts, places, acts = text_of(features, live)
    listed = {name: of_live(name) for name in ("promoted", "suppressed", "fired_tokens")} | {"text": text}
    used, index, times = np.unique(np.concatenate([ids.ravel() for ids in listed.values()] + [[-1]]), return_inverse=True, return_counts=True)
    common = np.argsort(-times, kind="stable")  # frequent ones get small numbers, which compress better
    words = ["" if token < 0 else as_text(int(token)) for token in used[common]]
    none = int(np.argmin(common))  # where there is no token
    index = np.argsort(common)[index]
    parts = dict(zip(listed, np.split(index, np.cumsum([ids.size for ids in listed.values()])), strict=False))
    make_whole(parts["text"], text_starts, words)
    parts["firing"] = firing(parts["text"], text_starts, places[:, :TOP], words, none)
    kind = np.uint16 if len(words) < 2**16 else np.uint32
    highest = np.maximum(np.asarray(strength, np.float32)[live], acts.reshape(len(live), -1).max(1).astype(np.float32))
    byte = lambda share: np.round(255 * np.clip(share, 0, 1)).astype(np.uint8)  # a share in a byte
    root = lambda share: np.maximum(byte(np.sqrt(np.maximum(share, 0))), share > 0)  # its root, for small ones: what is not 0 stays so
    piece = np.searchsorted(text_starts, places, side="right") - 1
    selective, offset = selectivity(of_live("tokens").reshape(len(live), -1, 2 * AROUND + 1), text)
    arrays = {
        **{name: part.astype(kind) for name, part in parts.items()}, "text_starts": text_starts.astype(np.uint32),
        "latents": live.astype(np.uint32), "density": density[live], "highest": highest,
        "places": places.astype(np.int32), "before": np.minimum(places - text_starts[piece], AROUND).astype(np.uint8),
        "after": np.minimum(text_starts[np.minimum(piece + 1, len(text_starts) - 1)] - 1 - places, AROUND).astype(np.uint8),
        "shades": root(acts.astype(np.float32) / np.maximum(highest, 1e-9)[:, None, None]), "histogram": byte(of_live("histogram")),
        "selective": byte(selective), "offset": offset.astype(np.int8),
        "nearest": of_live("nearest").astype(np.int32), "nearest_cosine": byte(of_live("nearest_cosine")),
        **{name: byte(of_live(name)) for name in ("fired_tokens_share", "fired_positions", "fired_classes")},
    }  # fmt: skip
    if "together" in features:
        arrays |= {"together": of_live("together").astype(np.int32), "together_phi": byte(of_live("together_phi"))}
    if "promoted_by" in features:
        high, low = of_live("promoted_by"), of_live("suppressed_by")
        top, bottom = high[:, :1], low[:, :1]
        between = lambda values: np.round(65535 * (values - bottom) / np.maximum(top - bottom, 1e-12)).astype(np.uint16)
        arrays |= {"logit_high": top.astype(np.float32), "logit_low": bottom.astype(np.float32), "promoted_by": between(high), "suppressed_by": between(low)}
    if "logit_histogram" in features:
        counts = of_live("logit_histogram")
        arrays["logit_histogram"] = root(counts / np.maximum(counts.max(1, keepdims=True), 1))
    if "stability" in about:
        stable = about["stability"]
        arrays |= {"stability": byte(stable["stability"][live]), "stability_cosine": byte(stable["cosine"][:, live].T), "stability_match": stable["match"][:, live].T.astype(np.int32)}
    data = {
        "title": title, "words": words, "n": len(live), "d_sae": len(density), "places_each": places.shape[1], "width": 2 * AROUND + 1,
        "none": none, "top": TOP, "labels": {str(k): v for k, v in labels.items()}, "rows": about.get("rows", 0), "figures": about.get("figures", []),
        "classes": CLASSES, "positions": [f"{first}{'+' if first == POSITIONS[-1] else ''}" if first == last - 1 or first == POSITIONS[-1] else f"{first}-{last - 1}"
                                          for first, last in zip(POSITIONS, [*POSITIONS[1:], 0], strict=True)],
        "base_classes": np.asarray(features["base_classes"]).tolist(), "base_positions": np.asarray(features["base_positions"]).tolist(),
        "effects": about.get("effects", {}), "known": about.get("known", {}), "seeds": [str(name) for name in about["stability"]["runs"]] if "stability" in about else [],
        "command": patch_command(about["run"]) if "run" in about else "",
    }  # fmt: skip
    first = {name: arrays.pop(name) for name in ("latents", "density", "highest", "selective", "promoted", "firing")}  # all that the table shows
    (table, data["table"]), (rest, data["rest"]) = packed(first), packed(arrays)
    template = (Path(__file__).parent / "templates" / "features.html").read_text(encoding="utf-8")
    # within a script element only "</" and "<!--" end or change what is read, so no "<" is left in the JSON
    json_text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = jinja2.Environment(autoescape=True).from_string(template).render(title=title, data=json_text, table=table, rest=rest)
    with sae_utils.atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")


def patch_command(run: str) -> str:
    """A command for a shell that edits latent number {latent} of a run."""
    return f"make patch {shlex.quote('RUN=' + run)} P=\"-y '{{latents: [{{latent}}], name: latent-{{latent}}}}'\""
