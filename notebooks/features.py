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
from pathlib import Path

import jinja2
import numpy as np
import torch
from torch import Tensor

import editing
import sae_utils
from sae_utils import nonzero_flat

TOP, PER_DECILE, AROUND = 10, 5, 8  # contexts shown, contexts of each tenth, tokens to either side
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
def contexts(sae: sae_utils.SAE, activations: Tensor, index: Tensor, document: Tensor, seed: int = 0, block: int = 10_000_000) -> dict[str, Tensor]:
    """Rows at which each latent fires, of the rows `index`; `document` (N,) is each row's document.

    top_rows, top_values (d_sae, TOP): where it fires most, one for each document; drawn_rows,
    drawn_values (d_sae, SAMPLE): an even sample of the places where it fires, weakest first;
    decile_rows, decile_values (d_sae, 10, PER_DECILE): some of those from each tenth of the sample.
    Row -1: there are no more. Holds `block` entries and 320 for each latent. A share estimated from
    the sample is off by 3 points or less (one standard error), and exact where a latent fires SAMPLE
    times at most.
    """
    strongest, drawn = Keeper(sae.d_sae, 64), Keeper(sae.d_sae, SAMPLE)
    generator, held, n_held = torch.Generator().manual_seed(seed), [], 0

    def flush():
        nonlocal held, n_held
        rows, latents, values = (torch.cat(parts) for parts in zip(*held, strict=True))
        strongest.offer(rows, latents, values, 2**31 - 1 - values.view(torch.int32))  # bits of positive floats sort as they do
        drawn.offer(rows, latents, values, torch.randint(2**31 - 1, (len(rows),), generator=generator, dtype=torch.int32))
        held, n_held = [], 0

    for entries in active_entries(sae, activations, index):
        held.append(entries)
        n_held += len(entries[0])
        if n_held >= block:
            flush()
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
    of a character (`sae_utils.Bytes`) is in none."""
    pieces = ["" if isinstance(piece, sae_utils.Bytes) else piece for piece in pieces]
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
    vocabulary, token_of_row = rows.token_ids.unique(return_inverse=True)
    classes = token_classes([as_text(int(token)) for token in vocabulary]).float()
    group = torch.bucketize(rows.position, torch.tensor(POSITIONS), right=True).sub_(1).clamp_min_(0)

    def spread(of_row: Tensor, n: int) -> Tensor:
        """Share of each of n kinds among the places of each latent; of_row (N,) is the kind of every row."""
        kinds = torch.where(there, of_row[drawn.clamp_min(0)].long(), n)
        return torch.zeros(len(drawn), n + 1).scatter_add_(1, kinds, torch.ones(drawn.shape))[:, :n] / count[:, None]

    fired_tokens, fired_share = torch.full((len(drawn), n_tokens), -1), torch.zeros(len(drawn), n_tokens)
    fired_classes = torch.zeros(len(drawn), len(CLASSES))
    for latent in there.any(1).nonzero().flatten().tolist():
        tokens, n = token_of_row[drawn[latent, there[latent]]].unique(return_counts=True)
        order = n.argsort(descending=True, stable=True)[:n_tokens]
        fired_tokens[latent, : len(order)] = vocabulary[tokens[order]].long()
        fired_share[latent, : len(order)] = n[order] / count[latent]
        fired_classes[latent] = n.float() @ classes[tokens] / count[latent]
    bins = torch.where(there, (values / highest.clamp_min(1e-9)[:, None] * BINS).long().clamp(0, BINS - 1), BINS)
    histogram = torch.zeros(len(drawn), BINS + 1).scatter_add_(1, bins, torch.ones(drawn.shape))[:, :BINS] / count[:, None]
    base = torch.bincount(token_of_row, minlength=len(vocabulary)).float() / len(rows)
    return {
        "fired_tokens": fired_tokens, "fired_tokens_share": fired_share, "fired_classes": fired_classes,
        "fired_positions": spread(group, len(POSITIONS)), "histogram": histogram,
        "base_positions": torch.bincount(group, minlength=len(POSITIONS)).float() / len(rows), "base_classes": base @ classes,
    }  # fmt: skip


def mostly_on(found: dict[str, Tensor], more_than: float = 0.9) -> dict[str, Tensor]:
    """{kind: (d_sae) boolean}, of what `shares` returns: latents of whose places more than such a share are one token,
    the first two positions, or one class. Classes that hold nearly half of all tokens are left out: it says little."""
    kinds = {"one token": found["fired_tokens_share"][:, 0], "the first two positions": found["fired_positions"][:, :2].sum(1)}
    kinds |= {f"class: {name}": found["fired_classes"][:, i] for i, name in enumerate(CLASSES) if found["base_classes"][i] < 0.45}
    return {kind: share > more_than for kind, share in kinds.items()}


@torch.no_grad()
def similar_directions(W_dec: Tensor, above: float = 0.9, chunk: int = 1024, most: int = 1000) -> tuple[Tensor, Tensor, list[tuple[int, int, float]]]:
    """(nearest (d_sae), cosine (d_sae), pairs): for each decoder row the other one most like it, and pairs
    (i, j, cosine), i < j, whose cosine is larger than `above`, the most alike first.

    Of each `chunk` of rows i the `most` pairs most alike are listed: where latents have collapsed nearly
    all pairs are alike, and a list of them all takes minutes and gigabytes.
    """
    rows = W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    nearest, cosine, pairs = [], [], []
    for first in range(0, len(rows), chunk):
        cosines = rows[first : first + chunk] @ rows.T
        here = torch.arange(len(cosines), device=rows.device)
        cosines[here, first + here] = -2  # not itself
        best = cosines.max(1)
        nearest.append(best.indices.cpu())
        cosine.append(best.values.cpu())
        alike = (cosines > above) & (torch.arange(len(rows), device=rows.device) > first + here[:, None])  # each pair once
        found = min(int(alike.sum()), most)
        if found:
            best = cosines.masked_fill_(~alike, -2).flatten().topk(found)
            i, j = best.indices // len(rows) + first, best.indices % len(rows)
            pairs += zip(i.tolist(), j.tolist(), best.values.tolist(), strict=True)
    return torch.cat(nearest), torch.cat(cosine), sorted(pairs, key=lambda pair: -pair[2])


def shown_contexts(sae: sae_utils.SAE, rows, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The places of `contexts` that a page shows, with what stands around them: tokens (d_sae, TOP + 10, 2 * AROUND + 1)
    int32 and acts likewise in float16; the top ones, then the first of each decile. Token -1: there is none."""
    shown = torch.cat([found["top_rows"], found["decile_rows"][:, :, 0]], dim=1)  # (d_sae, TOP + 10)
    latent, place = (shown >= 0).nonzero(as_tuple=True)
    tokens = torch.full((*shown.shape, 2 * AROUND + 1), -1, dtype=torch.int32)
    acts = torch.zeros(tokens.shape, dtype=torch.float16)
    tokens[latent, place], acts[latent, place] = surroundings(sae, rows, latent, shown[latent, place])
    return {"tokens": tokens, "acts": acts}


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

    Returns promoted, suppressed (d_sae, k) token ids and promoted_by, suppressed_by: change of the logit.
    """
    after, head = sae_utils.post_norm_name(model, hook_name), model.get_output_embeddings()
    at_post: list[Tensor] = []  # what the norm after the hook takes
    path: list[tuple[torch.nn.Module, Tensor, Tensor]] = []  # the last norm and what follows it up to the head: module, what it takes and returns

    def call(module, args, kwargs, output):
        taken = next(iter((*args, *kwargs.values())), None)
        if after and module is model.get_submodule(after):
            at_post.append(taken)
        if "Norm" in type(module).__name__:
            path[:] = [(module, taken, output)]
        elif path and module is not head and taken is path[-1][2] and output is not taken:
            path.append((module, taken, output))

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
    weight = head.weight.float().T  # once: with 262,144 tokens it is a gigabyte
    results = {name: [] for name in ("promoted", "promoted_by", "suppressed", "suppressed_by")}
    for part in moved.split(256):
        logits = part @ weight
        for name, sign in (("promoted", 1), ("suppressed", -1)):
            best = (sign * logits).topk(min(k, logits.shape[1]), dim=1)
            results[name].append(best.indices.int().cpu())
            results[name + "_by"].append(sign * best.values.cpu())
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


def save(path: Path, found: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """features.npz: all of `found` but the places drawn, of which the figures are there already. Returns what it holds."""
    kept = {name: value.numpy() for name, value in found.items() if not name.startswith("drawn")}
    with sae_utils.atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **kept)
    return kept


def card(saved: dict, latent: int, as_text, label: str = "", n: int = 5) -> str:
    """HTML of one latent, of what features.npz holds: where it fires most (n places), a place from every
    other tenth of its activations from the weakest up, how strongly and on what it fires, what it promotes."""
    at = lambda name: np.asarray(saved[name][latent])
    words = lambda tokens: " ".join(sae_utils.shade([as_text(int(t))], [0]) for t in tokens if t >= 0)
    percent = lambda share: f"{100 * share:.3g} %"
    density, highest = float(at("density")), max(float(at("max_act")), float(at("acts").max()))

    def place(i: int) -> str:
        kept, acts = at("tokens")[i] >= 0, at("acts")[i]
        pieces, middle = [as_text(int(t)) for t in at("tokens")[i][kept]], int(kept[:AROUND].sum())
        return f"{acts[AROUND]:.2f} {sae_utils.shade(pieces, acts[kept], top=highest, framed=middle)}"

    there = at("tokens")[:, AROUND] >= 0
    bars = "".join(f'<span style="display:inline-block;width:7px;margin-right:1px;background:rgb(255,140,0);height:{36 * h:.0f}px"></span>' for h in at("histogram") / max(at("histogram").max(), 1e-9))
    tokens = ", ".join(f"{words([t])} {percent(s)}" for t, s in zip(at("fired_tokens"), at("fired_tokens_share"), strict=True) if t >= 0)
    classes = ", ".join(f"{name} {percent(s)} ({percent(b)})" for name, s, b in zip(CLASSES, at("fired_classes"), np.asarray(saved["base_classes"]), strict=True))
    lines = [
        f"<b>latent {latent}{': ' + html.escape(label) if label else ''}</b>, fires on {percent(density)} of tokens, at most {highest:.3g}; "
        f"most like it: {int(at('nearest'))} (cosine {float(at('nearest_cosine')):.2f})",
        *(place(i) for i in range(min(n, TOP)) if there[i]), "<i>from each tenth of its activations, the weakest first:</i>",
        *(place(i) for i in range(TOP, TOP + 10, 2) if there[i]),
        f"how strongly, from 0 to its maximum: {bars}", f"fires on {tokens}; of all its places (in brackets: of all text): {classes}",
        f"promotes {words(at('promoted'))}", f"suppresses {words(at('suppressed'))}",
    ]  # fmt: skip
    return "<br>".join(lines)


def title_of(sae: sae_utils.SAE) -> str:
    """What stands above the page of a run's latents."""
    return f"{sae.config['model_name']}, {sae.config['hook_name']}: {int((sae.density > 0).sum()):,} live latents"


def packed(array) -> str:
    """An array's bytes, compressed, as text that a page can hold."""
    return base64.b64encode(gzip.compress(np.ascontiguousarray(array).tobytes(), 6, mtime=0)).decode()


def make_whole(contexts: np.ndarray, words: list[str], none: int) -> None:
    """Characters that are spread over several tokens of a context are put together, in place. `contexts` (n, width) are
    indices into `words`, to which is added what `sae_utils.whole` makes of them; `none`: the index of no token."""
    part = np.array([isinstance(word, sae_utils.Bytes) for word in words])
    place = {word: i for i, word in enumerate(words) if i != none}
    for i in part[contexts].any(1).nonzero()[0]:
        there = contexts[i] != none
        pieces = sae_utils.whole([words[word] for word in contexts[i, there]])
        new = [piece for piece in dict.fromkeys(pieces) if piece not in place]
        place |= {piece: len(words) + n for n, piece in enumerate(new)}
        words += new
        contexts[i, there] = [place[piece] for piece in pieces]


def write_page(path: Path, title: str, features: dict, density, strength, as_text, labels: dict[int, str]) -> None:
    """features.html: a table of all live latents and, for each, its contexts; one file, nothing fetched.

    `features`: what `contexts`, `surroundings` (as tokens and acts, (d_sae, TOP + 10, …): the top ones,
    then the first of each decile), `shares`, `similar_directions` (nearest, nearest_cosine) and
    `token_effects` return. `as_text(id)`: a token's text.
    """
    live = np.flatnonzero(np.asarray(density) > 0)
    of_live = lambda name: np.asarray(features[name])[live]
    listed = {name: of_live(name) for name in ("tokens", "promoted", "suppressed", "fired_tokens")}
    used, index = np.unique(np.concatenate([ids.ravel() for ids in listed.values()]), return_inverse=True)
    words, none = ["" if token < 0 else as_text(int(token)) for token in used], 0 if used[0] == -1 else -1
    parts = np.split(index, np.cumsum([ids.size for ids in listed.values()])[:-1])
    make_whole(parts[0].reshape(-1, listed["tokens"].shape[-1]), words, none)
    kind = np.uint16 if len(words) < 2**16 else np.uint32
    acts = of_live("acts").astype(np.float32)
    highest = np.maximum(np.asarray(strength, np.float32)[live], acts.reshape(len(live), -1).max(1))
    eighth = lambda share: np.round(255 * share).astype(np.uint8)  # a share in a byte
    bins = of_live("histogram")
    arrays = {
        **{name: part.astype(kind) for name, part in zip(listed, parts, strict=True)},
        "latents": live.astype(np.uint32), "density": np.asarray(density, np.float32)[live], "highest": highest,
        "shades": eighth(acts / np.maximum(highest, 1e-9).reshape(-1, *[1] * (acts.ndim - 1))),
        "histogram": eighth(bins / np.maximum(bins.max(1, keepdims=True), 1e-9)),
        "nearest": of_live("nearest").astype(np.uint32), "nearest_cosine": of_live("nearest_cosine").astype(np.float32),
        **{name: eighth(of_live(name)) for name in ("fired_tokens_share", "fired_positions", "fired_classes")},
    }  # fmt: skip
    data = {
        "title": title, "words": words, "wide": kind is np.uint32, "n": len(live), "contexts": acts.shape[1], "width": acts.shape[2],
        "none": none, "top": TOP, "labels": {str(k): v for k, v in labels.items()},
        "classes": CLASSES, "positions": [f"{first}{'+' if first == POSITIONS[-1] else ''}" if first == last - 1 or first == POSITIONS[-1] else f"{first}-{last - 1}"
                                          for first, last in zip(POSITIONS, [*POSITIONS[1:], 0], strict=True)],
        "base_classes": np.asarray(features["base_classes"]).tolist(), "base_positions": np.asarray(features["base_positions"]).tolist(),
        "arrays": {name: packed(values) for name, values in arrays.items()},
    }  # fmt: skip
    template = (Path(__file__).parent / "templates" / "features.html").read_text()
    # within a script element only "</" and "<!--" end or change what is read, so no "<" is left in the JSON
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = jinja2.Environment(autoescape=True).from_string(template).render(title=title, data=text)
    with sae_utils.atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
