"""Matching latents to known variables: against a search by brute force, and on variables planted by hand."""

import json

import numpy as np
import pytest
import torch
from conftest import HOOK, loaded_params, sentences

import fidelity
import harvest
import known
import sae_utils as u
import showing


def plain_f1(claims, true):
    both = int((claims & true).sum())
    return 0.0 if both == 0 else 2 * both / (int(claims.sum()) + int(true.sum()))


def test_best_f1_by_brute_force():
    scores, truth = torch.randn(400, 30).relu() * (torch.rand(400, 30) < 0.6), torch.rand(400, 5) < 0.3
    truth[:, 3] = scores[:, 11] > 0.5  # one that can be found
    got = known.best_f1(scores, truth, n_thresholds=200, block=7)
    for fact in range(5):
        column, threshold = int(got["column"][fact]), got["threshold"][fact].item()
        best = 0.0
        for c in range(30):
            for level in scores[:200, c][scores[:200, c] > 0].unique().tolist():
                best = max(best, plain_f1(scores[:200, c] >= level, truth[:200, fact]))
        assert got["fit"][fact].item() == pytest.approx(best, abs=1e-6)
        assert got["f1"][fact].item() == pytest.approx(plain_f1(scores[200:, column] >= threshold, truth[200:, fact]), abs=1e-6)
    assert got["column"][3] == 11 and got["f1"][3] > 0.8


def test_clusters_are_matched_by_who_belongs_to_them():
    centres, own = torch.randn(8, 5) * 100, torch.randint(0, 8, (600,))
    x = centres[own] + torch.randn(600, 5)
    truth = torch.stack([own == 3, (own == 1) | (own == 2), torch.rand(600) < 0.02], 1)
    got = known.best_f1(fidelity.membership(centres, x), truth)
    assert got["column"][0] == 3 and got["f1"][0] == 1 and got["column"][1] in (1, 2) and got["f1"][2] < 0.3
    chosen = own[300:] == got["column"][1]
    assert got["f1"][1].item() == pytest.approx(plain_f1(chosen, truth[300:, 1])) and 0.4 < got["f1"][1] < 0.9


def test_a_silent_column_claims_nothing():
    scores, truth = torch.zeros(100, 2), torch.rand(100, 1) < 0.5
    got = known.best_f1(scores, truth)
    assert got["f1"].tolist() == [0.0]


def test_chance_does_not_look_like_a_match():
    """The half on which column and threshold are chosen flatters; the other one does not."""
    scores, truth = torch.rand(600, 400), torch.rand(600, 20) < 0.05
    got = known.best_f1(scores, truth)
    assert got["fit"].mean() > got["f1"].mean() + 0.05 and got["f1"].mean() < 0.2


def test_rules_over_the_token_by_brute_force():
    token_ids = torch.randint(0, 6, (800,))
    truth = torch.stack([torch.isin(token_ids, torch.tensor([1, 4])) & (torch.rand(800) < 0.8), torch.rand(800) < 0.3], 1)
    got = known.by_token(token_ids, truth)
    for fact in range(2):
        fit = {}
        for mask in range(1, 64):
            chosen = torch.tensor([t for t in range(6) if mask >> t & 1])
            fit[mask] = plain_f1(torch.isin(token_ids[:400], chosen), truth[:400, fact])
        mask = max(fit, key=fit.get)  # no set of tokens does better than those by share, a first so many of them
        chosen = torch.tensor([t for t in range(6) if mask >> t & 1])
        assert got[fact].item() == pytest.approx(plain_f1(torch.isin(token_ids[400:], chosen), truth[400:, fact]), abs=1e-6)
    always = truth[400:].float().mean(0)
    torch.testing.assert_close(known.blind(truth, token_ids), torch.maximum(got, 2 * always / (1 + always)))
    facts = [{"visible": False}, {"visible": False}]
    assert known.hidden(facts, truth, token_ids).tolist() == [bool(got[0] < 0.7), bool(got[1] < 0.7)]
    assert known.hidden(facts, truth, token_ids, fewest=10**6).tolist() == [False, False]


@pytest.fixture
def world(folder):
    """A world beside the folder's text: one variable that is the word's length, one that counts words of a document."""
    texts = sentences(200)
    words = [text.split() for text in texts]
    (folder / "variables.json").write_text(json.dumps({
        "length": {"description": "", "visible": True, "values": ["none", "one", "two", "more"]},
        "place": {"description": "", "visible": False, "values": ["none", "0", "1", "2", "3"]},
    }))  # fmt: skip
    length = [min(len(word), 3) for text in words for word in text]
    place = [(i % 5) for text in words for i in range(len(text))]
    offsets = np.cumsum([0, *map(len, words)])
    np.savez(folder / "variables.npz", offsets=offsets, length=np.array(length, np.uint8), place=np.array(place, np.uint8))
    return folder, words


def test_variables_are_read_for_each_rows_own_word(world, model, tokenizer):
    folder, words = world
    rows = harvest.get_rows(model, tokenizer, HOOK, loaded_params(folder, model, tokenizer), folder / "activations")
    assert (np.bincount(rows.window_place) > 1).any()  # documents of several windows are among them
    index, as_text = torch.randperm(len(rows))[:700], showing.TokenText(tokenizer)
    facts, truth = known.read(folder, rows, index, as_text)
    place_of = {(f["variable"], f["value"]): i for i, f in enumerate(facts)}
    within = {}
    for window in range(len(rows.windows)):
        document = int(rows.window_place[window])
        before = within.get(document, 0)
        within[document] = before + len(rows.windows[window]) - 1
        for at in (rows.window[index] == window).nonzero().flatten().tolist():
            i = before + int(rows.position[index[at]]) - 1
            word = words[document][i]
            assert truth[at, place_of["length", ["one", "two", "more"][min(len(word), 3) - 1]]] and truth[at, place_of["token", word]]
            assert truth[at, place_of["place", "any"]] == (i % 5 > 0) and (i % 5 == 0 or truth[at, place_of["place", str(i % 5 - 1)]])
    assert ("length", "any") not in place_of  # it always has a value
    assert truth.sum(1).min() >= 2


def test_variables_of_another_text_are_refused(world, model, tokenizer):
    folder, _ = world
    columns = dict(np.load(folder / "variables.npz"))
    np.savez(folder / "variables.npz", **{name: column[:40] for name, column in columns.items()})
    rows = harvest.get_rows(model, tokenizer, HOOK, loaded_params(folder, model, tokenizer), folder / "activations")
    with pytest.raises(u.UserError, match="its variables are not those of the text"):
        known.read(folder, rows, torch.arange(len(rows)))
