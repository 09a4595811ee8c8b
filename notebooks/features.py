"""What each latent responds to, and what it writes: contexts, tokens promoted, one page for all of them.

Contexts come from one pass over the stored rows, in which only active entries are kept. For every
latent there are the places where it fires most, in distinct documents, and places drawn from each
tenth of its activations, since the strongest ones alone flatter a latent.
"""

import base64
import copy
import csv
import gzip
import json
from pathlib import Path

import jinja2
import numpy as np
import torch
from torch import Tensor

import sae_utils
from training import nonzero_flat

TOP, PER_DECILE, AROUND = 10, 5, 8  # contexts shown, contexts of each tenth, tokens to either side


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

    top_rows, top_values (d_sae, TOP): where it fires most, one for each document; decile_rows,
    decile_values (d_sae, 10, PER_DECILE): drawn from each tenth of its activations, weakest first.
    Row -1: there are no more. Holds `block` entries and 320 for each latent; deciles are those of
    256 entries drawn evenly from all of the latent's.
    """
    strongest, drawn = Keeper(sae.d_sae, 64), Keeper(sae.d_sae, 256)
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

    decile_rows, decile_values = torch.full((sae.d_sae, 10, PER_DECILE), -1), torch.zeros(sae.d_sae, 10, PER_DECILE)
    n = (drawn.row >= 0).sum(1)
    order = torch.where(drawn.row >= 0, drawn.value, torch.inf).sort(dim=1).indices
    for decile in range(10):
        first, last = n * decile // 10, n * (decile + 1) // 10
        for i in range(PER_DECILE):
            at = first + (last - first) * i // PER_DECILE
            there = (last - first > i).nonzero().flatten()
            chosen = order[there, at[there]]
            decile_rows[there, decile, i], decile_values[there, decile, i] = drawn.row[there, chosen], drawn.value[there, chosen]
    return {"top_rows": top_rows, "top_values": top_values, "decile_rows": decile_rows, "decile_values": decile_values}


@torch.no_grad()
def surroundings(sae: sae_utils.SAE, rows, latents: Tensor, centres: Tensor, chunk: int = 32768) -> tuple[Tensor, Tensor]:
    """(token_ids (n, 2 * AROUND + 1) int32, acts likewise in float16): the tokens around the rows `centres`
    and how strongly each one's latent fires on them; id -1 past the window's ends.

    Each latent is worked out alone; for "topk" the competition of the others is left out, so weak
    activations may show that the SAE would drop.
    """
    flat, starts = torch.from_numpy(rows.windows.flat), torch.from_numpy(rows.windows.starts)
    tokens, acts = torch.full((len(centres), 2 * AROUND + 1), -1, dtype=torch.int32), torch.zeros(len(centres), 2 * AROUND + 1, dtype=torch.float16)
    window, position = rows.window[centres], rows.position[centres]
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
            device, which = sae.W_enc.device, latents[part]
            x_unit, _ = sae.normalise(rows.activations[near[part]].to(device))
            if sae.apply_b_dec_to_input:
                x_unit = x_unit - sae.b_dec
            pre_acts = (x_unit * sae.W_enc.T[which.to(device)]).sum(1).cpu() + sae.b_enc.cpu()[which]
            level = sae.threshold.cpu()[which] if sae.jumps else 0.0
            acts[part, away[part] + AROUND] = torch.where(pre_acts > level, pre_acts, 0.0).half()
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

    Its decoder row passes the norm that follows the hook, where there is one, the final norm, each as
    its mean Jacobian over `most` text tokens of the windows, and the LM head; a softcap and what
    later layers make of it are left out. Per unit of the model's activation along the row.

    Returns promoted, suppressed (d_sae, k) token ids and promoted_by, suppressed_by: change of the logit.
    """
    after = sae_utils.post_norm_name(model, hook_name)
    called: list[tuple[torch.nn.Module, Tensor]] = []
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    at_post: list[Tensor] = []
    handles = [m.register_forward_hook(lambda m, args, out: called.append((m, args[0]))) for m in norms]
    if after:
        handles.append(model.get_submodule(after).register_forward_hook(lambda m, args, out: at_post.append(args[0])))
    at_final, batch = [], sae_utils.pad(windows[:8], device=str(model.device))
    try:
        model(input_ids=batch[0], attention_mask=batch[1], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    final, at_final = called[-1]
    text = batch[1].bool() & ~torch.isin(batch[0], torch.tensor(special, device=model.device))
    pick = lambda x: x.reshape(*text.shape, -1)[text][:: max(1, int(text.sum()) // most)][:most].float()
    moved = sae.W_dec.float()
    if after:
        moved = moved @ mean_jacobian(copy.deepcopy(model.get_submodule(after)).float(), pick(at_post[0])).T
    moved = moved @ mean_jacobian(copy.deepcopy(final).float(), pick(at_final)).T
    head = model.get_output_embeddings().weight
    results = {name: [] for name in ("promoted", "promoted_by", "suppressed", "suppressed_by")}
    for part in moved.split(256):
        logits = part @ head.float().T
        for name, sign in (("promoted", 1), ("suppressed", -1)):
            best = (sign * logits).topk(min(k, logits.shape[1]), dim=1)
            results[name].append(best.indices.int().cpu())
            results[name + "_by"].append(sign * best.values.cpu())
    return {name: torch.cat(parts) for name, parts in results.items()}


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


def read_labels(path: Path) -> dict[int, str]:
    """The names that a person gave to latents: lines of number, comma, name. No file: no names."""
    if not path.exists():
        return {}
    labels = {}
    for number, row in enumerate(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()), 1):
        if not row or number == 1 and not row[0].strip().isdigit():  # a heading
            continue
        if len(row) < 2 or not row[0].strip().isdigit():
            raise sae_utils.UserError(f"{sae_utils.show_path(path)}, line {number}: a line is a latent's number, a comma and its name, not {','.join(row)!r}.")
        labels[int(row[0])] = ",".join(row[1:]).strip()
    return labels


def packed(array) -> str:
    """An array's bytes, compressed, as text that a page can hold."""
    return base64.b64encode(gzip.compress(np.ascontiguousarray(array).tobytes(), 6, mtime=0)).decode()


def write_page(path: Path, title: str, features: dict, density, strength, as_text, labels: dict[int, str]) -> None:
    """features.html: a table of all live latents and, for each, its contexts; one file, nothing fetched.

    `features`: what `contexts`, `surroundings` (as tokens and acts, (d_sae, TOP + 10, …): the top ones,
    then the first of each decile) and `token_effects` return. `as_text(id)`: a token's text.
    """
    live = np.flatnonzero(np.asarray(density) > 0)
    tokens = np.asarray(features["tokens"])[live]
    effects = {name: np.asarray(features[name])[live] for name in ("promoted", "suppressed")}
    used, index = np.unique(np.concatenate([tokens.ravel(), *(ids.ravel() for ids in effects.values())]), return_inverse=True)
    words = ["" if token < 0 else as_text(int(token)) for token in used]
    kind = np.uint16 if len(used) < 2**16 else np.uint32
    parts = np.split(index.astype(kind), np.cumsum([tokens.size, effects["promoted"].size]))
    acts = np.asarray(features["acts"], np.float32)[live]
    highest = np.maximum(np.asarray(strength, np.float32)[live], acts.reshape(len(live), -1).max(1))
    shades = np.round(255 * acts / np.maximum(highest, 1e-9).reshape(-1, *[1] * (acts.ndim - 1))).astype(np.uint8)
    data = {
        "title": title, "words": words, "wide": kind is np.uint32, "n": len(live), "contexts": tokens.shape[1], "width": tokens.shape[2],
        "none": 0 if used[0] == -1 else -1, "top": TOP, "effects": effects["promoted"].shape[1], "labels": {str(k): v for k, v in labels.items()},
        "latents": packed(live.astype(np.uint32)), "density": packed(np.asarray(density, np.float32)[live]), "highest": packed(highest),
        "tokens": packed(parts[0]), "shades": packed(shades), "promoted": packed(parts[1]), "suppressed": packed(parts[2]),
    }  # fmt: skip
    template = (Path(__file__).parent / "templates" / "features.html").read_text()
    # within a script element only "</" and "<!--" end or change what is read, so no "<" is left in the JSON
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = jinja2.Environment(autoescape=True).from_string(template).render(title=title, data=text)
    with sae_utils.atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
