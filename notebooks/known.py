"""Does the chain find what is there to find? Latents against variables that are known for every token.

The generated world (tiny_model.ipynb) writes its hidden variables beside its text, variables.npz and
variables.json. A variable's value, such as next_colour = blue, is either true of a token or not; a
latent with a threshold is a claim about the same tokens. F1 says how well the two agree.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import sae_utils


def read(folder: Path, rows, index: Tensor, as_text=None) -> tuple[list[dict], Tensor]:
    """(facts, truth (n, facts) boolean): what is known of the token of each of the rows `index`, of the
    world in `folder`.

    A fact is {"variable", "value", "visible"}; value "any" stands for every value but none, where a
    variable has several. With `as_text`, the token itself is a variable too ("token").
    Raises UserError where the rows are not of this world's text.
    """
    described = json.loads((folder / "variables.json").read_text())
    columns = np.load(folder / "variables.npz")
    owners = np.asarray(rows.window_place)
    lengths = np.diff(rows.windows.starts) - 1  # without BOS
    begun = lengths.cumsum() - lengths
    before = begun - begun[np.searchsorted(owners, owners)]  # words in earlier windows of the same document
    window, token_ids, offsets = rows.window[index].numpy(), rows.token_ids[index], columns["offsets"]
    fits = owners.max() < len(offsets) - 1
    word = offsets[owners[window]] + before[window] + rows.position[index].numpy() - 1 if fits else 0
    if not fits or np.any(word >= offsets[owners[window] + 1]):
        raise sae_utils.UserError(f"{sae_utils.show_path(folder)}: its variables are not those of the text, one for each token of this tokenizer.")
    facts, columns_of = [], []
    for variable, about in described.items():
        codes = torch.from_numpy(columns[variable][word])
        values = list(enumerate(about["values"]))[1:]
        if len(values) > 1 and (codes == 0).any():
            facts.append({"variable": variable, "value": "any", "visible": about["visible"]})
            columns_of.append(codes > 0)
        for code, value in values:
            facts.append({"variable": variable, "value": value, "visible": about["visible"]})
            columns_of.append(codes == code)
    if as_text:
        for token in token_ids.unique().tolist():
            facts.append({"variable": "token", "value": as_text(token).strip(), "visible": True})
            columns_of.append(token_ids == token)
    return facts, torch.stack(columns_of, 1)


def f1(true_positives: Tensor, claimed: Tensor, true: Tensor) -> Tensor:
    """2 TP / (claimed + true), 0 where both are none."""
    return 2 * true_positives / (claimed + true).clamp_min(1)


@torch.no_grad()
def best_f1(scores: Tensor, truth: Tensor, n_thresholds: int = 24, block: int = 64) -> dict[str, Tensor]:
    """For each fact, the column of `scores` (n, L) whose values above some threshold agree with it best.

    The column and its threshold (of `n_thresholds` of the column's own positive values, evenly spread
    in rank) are chosen on the first half of the rows; `f1` (facts) is measured on the other half.
    Also column and threshold, each (facts). Documents should not be cut by the half: give rows in
    document order.
    """
    half, n_facts = len(scores) // 2, truth.shape[1]
    fit, true = truth[:half].float(), truth[:half].sum(0).float()
    best = {"fit": torch.full((n_facts,), -1.0), "column": torch.zeros(n_facts, dtype=torch.long), "threshold": torch.zeros(n_facts)}
    shares = torch.linspace(0, 1, n_thresholds + 1)[:-1]
    for start in range(0, scores.shape[1], block):
        part = scores[:half, start : start + block].float()
        ordered = part.sort(0).values  # ascending
        silent = (ordered <= 0).sum(0)
        place = silent + (shares[:, None] * (half - silent)).long()  # (thresholds, columns)
        level = torch.where(place < half, ordered.gather(0, place.clamp_max(half - 1)), torch.inf).T  # (columns, thresholds)
        # An active entry is claimed at every threshold up to its value: counted once, at the highest of them, then summed up.
        row, column = (part > 0).nonzero(as_tuple=True)
        highest = torch.searchsorted(level[column], part[row, column][:, None], right=True)[:, 0] - 1
        group = column * n_thresholds + highest
        entries = torch.sparse_coo_tensor(torch.stack([group, row]), torch.ones(len(group)), (part.shape[1] * n_thresholds, half), check_invariants=False)
        summed = lambda counts: counts.unflatten(0, (part.shape[1], n_thresholds)).flip(1).cumsum(1).flip(1).flatten(0, 1)
        claimed = summed(torch.bincount(group, minlength=len(entries)).float())
        scored = f1(summed(torch.sparse.mm(entries, fit)), claimed[:, None], true)  # (columns * thresholds, facts)
        value, index = scored.max(0)
        better = value > best["fit"]
        best["fit"][better] = value[better]
        best["column"][better] = start + index[better] // n_thresholds
        best["threshold"][better] = level.flatten()[index[better]]
    claims = scores[half:, best["column"]].float() >= best["threshold"]
    test = truth[half:]
    best["f1"] = f1((claims & test).sum(0), claims.sum(0), test.sum(0))
    return best


def hidden(facts: list[dict], truth: Tensor, token_ids: Tensor, fewest: int = 10) -> Tensor:
    """(facts,) boolean: those that cannot be read off the token. None of its rules reaches an F1 of 0.7
    (`by_token`), and there are at least `fewest` true rows in each half to judge by."""
    half = len(truth) // 2
    enough = torch.minimum(truth[:half].sum(0), truth[half:].sum(0)) >= fewest
    return torch.tensor([not fact["visible"] for fact in facts]) & enough & (by_token(token_ids, truth) < 0.7)


def blind(facts_truth: Tensor, token_ids: Tensor) -> Tensor:
    """(facts,) F1 of the better of two claims that know nothing else: the best rule over the current token,
    and 'always'. On the second half of the rows."""
    share = facts_truth[len(facts_truth) // 2 :].float().mean(0)
    return torch.maximum(by_token(token_ids, facts_truth), 2 * share / (1 + share))


def by_token(token_ids: Tensor, truth: Tensor) -> Tensor:
    """For each fact, the F1 (facts) of the best rule that sees the current token alone: claim it after
    the tokens for which it is mostly true. Rules from the first half of the rows, F1 on the other."""
    half = len(truth) // 2
    n_tokens = int(token_ids.max()) + 1
    counts = torch.zeros(n_tokens, truth.shape[1]).index_add_(0, token_ids[:half].long(), truth[:half].float())
    total = torch.bincount(token_ids[:half], minlength=n_tokens)[:, None]
    order = (counts / total.clamp_min(1)).sort(0, descending=True).indices
    hits, claimed = counts.gather(0, order).cumsum(0), total.expand_as(counts).gather(0, order).cumsum(0)
    best = f1(hits, claimed, counts.sum(0)).max(0).indices  # tokens by share, the first so many claimed
    rank = torch.zeros_like(order).scatter_(0, order, torch.arange(n_tokens)[:, None].expand_as(order))
    claims = (rank <= best)[token_ids[half:].long()]
    return f1((claims & truth[half:]).sum(0), claims.sum(0), truth[half:].sum(0))
