"""Words, places, latents and topics that an experiment is about: against values worked out by hand, by brute force, or by finite differences."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import HOOK, gemma, gpt2, word_tokenizer

import choosing
import editing
import sae_utils as u
import showing


class Spaced:
    """As TokenText of a tokenizer whose token 2 i is " a", " b", …, and 2 i + 1 the same letter inside a word."""

    def __call__(self, tokens):
        if not isinstance(tokens, int):
            return "".join(map(self, tokens))
        return (" " if tokens % 2 == 0 else "") + chr(97 + tokens // 2)


def fake_rows(windows, owners=None):
    """Rows of all tokens but the first of each window."""
    window, position = zip(*[(w, p) for w, ids in enumerate(windows) for p in range(1, len(ids))], strict=True)
    return SimpleNamespace(windows=windows, window=torch.tensor(window), position=torch.tensor(position), window_document=owners if owners is not None else list(range(len(windows))))


@pytest.fixture(params=["gemma", "gpt2"])
def place(request, sae):
    """(model, tokenizer, hook, sae) and the model in float64 beside it."""
    model, hook = (gemma(), HOOK) if request.param == "gemma" else (gpt2(), "transformer.h.1.mlp.c_proj")
    sae.max_act.copy_(torch.rand(48) + 0.5)
    sae.density = torch.full((48,), 0.1)
    return model, word_tokenizer(), hook, sae


# Words


def test_what_follows_each_row():
    windows = [torch.randint(0, 9, (n,)).tolist() for n in (5, 2, 8, 3)]
    rows = fake_rows(windows)
    next_token = choosing.followers(rows)
    for i, (w, p) in enumerate(zip(rows.window.tolist(), rows.position.tolist(), strict=True)):
        assert next_token[i] == (windows[w][p + 1] if p + 1 < len(windows[w]) else -1)


@pytest.mark.parametrize("sizes", [[3] * 20, [1, 1, 1, 40], [40, 1, 1, 1], [7, 5]])
def test_the_halves_part_between_documents(sizes, fresh_seed):
    """Whole documents on either side, as even as their sizes allow in the order drawn, from all over the text."""
    numbers = torch.randperm(100)[: 2 * len(sizes)]  # of every other document is held out; copies may stand anywhere
    owners = torch.cat([torch.full((size,), int(n)) for n, size in zip(numbers, [s for s in sizes for _ in (0, 1)], strict=True)])
    owners = owners[torch.randperm(len(owners))]
    held_out = torch.isin(owners, numbers[::2])
    tried = choosing.second_half(held_out, owners, fresh_seed)
    assert tried.dtype == torch.bool and not (tried & ~held_out).any()
    assert not set(owners[tried].tolist()) & set(owners[held_out & ~tried].tolist())
    assert 0 < tried.sum() < sum(sizes) and abs(int(tried.sum()) - sum(sizes) / 2) <= max(sizes) / 2 + 1
    assert torch.equal(tried, choosing.second_half(held_out, owners, fresh_seed))
    if len(sizes) > 10:
        others = [choosing.second_half(held_out, owners, fresh_seed + i) for i in range(1, 4)]
        assert not any(torch.equal(tried, other) for other in others)


def test_halves_of_a_single_document_and_of_a_single_window():
    assert choosing.second_half(torch.tensor([False, *[True] * 5]), [0] * 6).tolist() == [False] * 3 + [True] * 3
    with pytest.raises(u.UserError, match="a single window"):
        choosing.second_half(torch.tensor([False, True]), [0, 1])


@pytest.mark.parametrize(("text", "expected"), [
    (" he", True), ("he", False), (" ", False), ("", False), (" 1", False), ("  a", False), (" don't", False), (" caf\u00e9", True), (" e\u0301", True), ("\u0301", False),
    ("公园", True), ("去", True), (" 公", True), ("。", False), ("\ufffd", False), ("ひと", True), ("カメラ", True), ("ไทย", True), ("ភាសា", True), (" हिन्दी", True), ("दी", False),
    (" привет", True), ("вет", False), ("서울", False), (" 서울", True), ("\n", False),
])  # fmt: skip
def test_tokens_that_may_be_words(text, expected):
    assert choosing.begins_word(text) == expected


def test_pieces_of_words_are_no_words():
    """" b" goes on as "bd" in two of ten places, " c" in one of ten, " d" at none; what stands inside a word begins none."""
    b, c, d, inside = 2, 4, 6, 7
    pairs = [(b, inside)] * 2 + [(b, d)] * 8 + [(c, inside)] + [(c, d)] * 9 + [(d, c)] * 3 + [(inside, c)] * 5 + [(d, -1)]
    token, next_token = torch.tensor(pairs)[torch.randperm(len(pairs))].T
    assert choosing.whole_words(token, next_token, Spaced()) == {c, d}
    assert choosing.whole_words(token, next_token, Spaced(), 0.2) == {b, c, d}
    assert choosing.frequent_words(token, next_token, Spaced()) == [d, c] and choosing.frequent_words(token, next_token, Spaced(), 1) == [d]


def test_chinese_has_words_although_letters_follow_everywhere():
    as_text = lambda token: ["去", "公园", "。", "\ufffd", " he"][token]
    token, next_token = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1], [1, 0], [3, 0], [4, 2]]).T
    assert choosing.whole_words(token, next_token, as_text) == {0, 1, 4}


def test_a_word_is_one_token_that_comes_up(tokenizer):
    cat = tokenizer.convert_tokens_to_ids("cat")
    assert choosing.token_of(tokenizer, "cat", torch.tensor([1, cat])) == choosing.token_of(tokenizer, " cat", torch.tensor([cat])) == cat
    for word, message in (("cat dog", "is 2 tokens"), ("zebra", "is 1 tokens|never comes up"), ("dog", "never comes up")):
        with pytest.raises(u.UserError, match=message):
            choosing.token_of(tokenizer, word, torch.tensor([1, cat]))


def test_of_a_words_forms_the_one_that_the_text_uses(monkeypatch):
    forms = {"he": [5], " he": [8], "the he": [1, 2]}
    monkeypatch.setattr(u, "encode_text", lambda tokenizer, texts: [forms[text] for text in texts])
    tokenizer = SimpleNamespace(unk_token_id=None, decode=str)
    assert choosing.token_of(tokenizer, "he", torch.tensor([8, 8, 5])) == 8 and choosing.token_of(tokenizer, " he", torch.tensor([8, 5, 5])) == 5


# Places


def fake_seen(says, value, odds, window=None, words=(4, 6, 8, 10)):
    return {"prompts": [[3, i] for i in range(len(says))], "window": window or list(range(len(says))), "says": torch.tensor(says), "value": torch.tensor(value), "odds": torch.tensor(odds), "words": list(words)}


def test_a_survey_of_what_the_model_says(place):
    model, tokenizer, hook, sae = place
    windows = [[3, *torch.randint(4, 12, (n,)).tolist()] for n in (9, 6, 12)] + [[3, *[4, 5] * 6]] + [[3, 5, 6, 7]] * 2
    rows, words = fake_rows(windows), [4, 5, 6, 7]
    next_token = choosing.followers(rows)
    index = torch.arange(len(rows.window))
    seen = choosing.survey(model, rows, index, next_token, words)
    of_window = [[p for p in range(1, len(w) - 1) if w[p + 1] in words][-8:] for w in windows]  # at most the last eight
    expected = {tuple(window[: p + 1]) for window, places in zip(windows, of_window, strict=True) for p in places}
    assert {tuple(prompt) for prompt in seen["prompts"]} == expected and len(seen["prompts"]) == len(expected)  # the window that comes twice counts once
    alone = torch.cat([editing.next_logprobs(model, [prompt]) for prompt in seen["prompts"]])
    assert seen["says"].tolist() == alone.argmax(1).tolist() and seen["value"].tolist() == pytest.approx(alone.amax(1).exp().tolist(), abs=1e-4)
    by_hand = torch.stack([(alone[:, w].double().exp() / (1 - alone[:, w].double().exp())).log() for w in words], 1)
    torch.testing.assert_close(seen["odds"].double(), by_hand, rtol=1e-3, atol=1e-3)
    assert all(prompt == windows[w][: len(prompt)] for w, prompt in zip(seen["window"], seen["prompts"], strict=True))
    some = choosing.survey(model, rows, index, next_token, words, tokens=1)
    assert len(set(some["window"])) == 1 and choosing.survey(model, rows, index, next_token, [99])["odds"].shape == (0, 1)


def test_a_text_whose_tokens_are_parts_of_characters_has_no_words():
    tokens = torch.tensor([*range(6)] * 3)
    as_text = lambda i: showing.Bytes("他".encode()[i % 3 : i % 3 + 1])
    words = choosing.frequent_words(tokens[:-1], tokens[1:], as_text)
    assert words == []
    with pytest.raises(u.UserError, match="no token of this model is a word by itself in this text"):
        choosing.survey(None, None, torch.arange(3), tokens, words)


def test_the_most_certain_places_one_a_window():
    seen = fake_seen([4, 6, 4, 9, 6, 6], [0.5, 0.9, 0.7, 0.99, 0.3, 0.05], [[0.0] * 4] * 6, [0, 1, 0, 2, 3, 4])
    assert choosing.certain(seen, [4, 6], 9) == ([1, 2, 4], pytest.approx(0.3)) and choosing.certain(seen, {4}, 9)[0] == [2]
    assert choosing.certain(seen, [4, 6], 2) == ([1, 2], pytest.approx(0.7)) and choosing.certain(seen, [8], 9) == ([], 0.0)


def test_rivals_are_said_where_the_word_is_the_next_guess():
    # 6 is said three times where 4 is near, 8 twice, 10 where 4 is far, 9 is no word of the list, and 4 is no rival of its own
    says = [6, 6, 8, 6, 8, 10, 10, 10, 9, 4]
    odds = [[o, 0.0, 0.0, 0.0] for o in (-1.0, -1.5, -2.0, -2.5, -3.0, -9.0, -9.0, -9.0, 5.0, 5.0)]
    seen = fake_seen(says, [0.9] * 10, odds)
    assert choosing.rivals(4, seen, places=5) == [6, 8] and choosing.rivals(4, seen, most=1, places=5) == [6]
    assert set(choosing.rivals(4, seen)) == {6, 8, 10} and choosing.rivals(4, fake_seen([4, 9], [0.9] * 2, [[0.0] * 4] * 2)) == []


def test_no_two_words_share_a_latent():
    f1 = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.7, 0.3, 0.1, 0.0], [0.8, 0.1, 0.1, 0.0], [0.1, 0.1, 0.1, 0.5]])
    assert choosing.own_latents([4, 6, 8, 10], f1) == {4: 0, 6: 1, 10: 3}  # for 8 nothing of 0.2 is left
    assert choosing.own_latents([4, 6, 8, 10], f1, [0, 3]) == {4: 1} and choosing.own_latents([], f1[:0]) == {}


# Latents


def test_how_well_latents_announce_words_by_brute_force(sae):
    x, next_token = torch.randn(400, 16) + sae.mean, torch.randint(0, 5, (400,))
    sae.max_act.copy_(sae.encode(x).amax(0))
    index, words = torch.randperm(400)[:300], [3, 0, 77]
    got = choosing.announce_f1(sae, x, index, next_token, words, chunk=70)
    acts = sae.encode(x[index]).double()
    for w, word in enumerate(words):
        says = next_token[index] == word
        for latent in range(0, 48, 5):
            best = 0.0
            for share in (0.1, 0.25, 0.5):
                on = acts[:, latent] > share * sae.max_act[latent].double()
                both = int((on & says).sum())
                best = max(best, 2 * both / max(1, int(on.sum()) + int(says.sum())))
            assert got[w, latent].item() == pytest.approx(best, abs=2e-3)  # one row may lie on a threshold
    assert got[:2].max() > 0.1 and not got[2].any()
    for latent, share in ((4, 0.1), (11, 0.25), (30, 0.5)):  # each threshold is the right one for some latent
        column = sae.encode(x)[:, latent]
        follows = torch.where(column > share * sae.max_act[latent], 9, 0)
        assert choosing.announce_f1(sae, x, torch.arange(400), follows, [9])[0, latent] > 0.995


def test_log_odds_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.999999, 5e-7, 5e-7], [1e-6, 0.5, 0.499999]], dtype=torch.float64)
    assert choosing.log_odds(p.log(), 0).tolist() == pytest.approx([0.0, math.log(0.999999 / 1e-6), math.log(1e-6 / 0.999999)], rel=1e-6)
    assert choosing.log_odds(p.log(), [1, 2]).tolist() == pytest.approx([0.0, math.log(1e-6 / 0.999999), math.log(0.999999 / 1e-6)], rel=1e-5)
    assert choosing.log_odds(torch.zeros(1, 2), 0).isfinite().all()  # the model is wholly sure


@pytest.mark.parametrize("scope", ["last", "generated", "all"])
def test_slopes_are_the_limit_of_small_pushes(place, scope):
    """In float64, beside the mean log-odds with a latent raised by a thousandth of its maximum, and lowered (Gemma's norms reckon in float32 all the same, so not by less)."""
    model, tokenizer, hook, sae = place
    prompts = [[3, *torch.randint(4, 24, (n,)).tolist()] for n in (4, 6)]
    texts = [prompt + torch.randint(4, 24, (3,)).tolist() for prompt in prompts]
    places = [range(len(prompt) - 1, len(text)) for prompt, text in zip(prompts, texts, strict=True)]
    target = torch.randperm(20)[:2].add(4).tolist()
    got = choosing.slopes(model, tokenizer, hook, sae, texts, places, prompts, target, scope)
    model = model.double()

    def raised(latent, amount):
        odds = []
        for prompt, text, at in zip(prompts, texts, places, strict=True):
            where = {"last": [len(prompt) - 1], "generated": range(len(prompt), len(text)), "all": range(1, len(text))}[scope]

            def push(module, args, out, where=where):
                norm = (out[0] - sae.mean).norm(dim=1, keepdim=True)
                out = out.clone()
                for i in where:
                    out[0, i] += amount * sae.max_act[latent] * sae.W_dec[latent].double() * norm[i]
                return out

            handle = model.get_submodule(hook).register_forward_hook(push)
            logits = model(torch.tensor([text])).logits[0, list(at)].log_softmax(-1)
            handle.remove()
            p = logits[:, target].exp().sum(1)
            odds += (p / (1 - p)).log().tolist()
        return sum(odds) / len(odds)

    for latent in range(0, 48, 5):
        slope = (raised(latent, 1e-3) - raised(latent, -1e-3)) / 2e-3
        assert got[latent].item() == pytest.approx(slope, abs=1e-2 * got.abs().max().item() + 1e-3)
    assert not any(p.requires_grad for p in model.parameters())


def test_what_an_edit_does_is_measured_beside_other_words(place):
    model, tokenizer, hook, sae = place
    prompts = [[3, *torch.randint(4, 24, (n,)).tolist()] for n in (4, 6, 5)]
    before, words, pairs = editing.next_logprobs(model, prompts), list(range(4, 20)), [(editing.set_value([7], 30.0), "last")]
    seen = {"prompts": prompts, "odds": torch.stack([choosing.log_odds(before, w) for w in words], 1), "words": words}
    with editing.intervene(model, hook, sae, tokenizer, pairs):
        after = editing.next_logprobs(model, prompts)
    got = choosing.tried(model, tokenizer, hook, sae, pairs, seen, [0, 2], 9)
    moved = torch.stack([choosing.log_odds(after, w) - choosing.log_odds(before, w) for w in words], 1)[[0, 2]]
    assert got["change"] == pytest.approx(moved[:, 5].mean().item(), abs=1e-4) and got["of"] == 2 and abs(got["change"]) > 1e-3
    assert got["beyond"] == pytest.approx(sum((row[5] - sorted(row)[7]).item() for row in moved) / 2, abs=1e-4)
    assert got["first"] == int((after[[0, 2]].argmax(1) == 9).sum())


def test_candidates_are_ranked_by_what_they_do(monkeypatch, sae):
    """Word 4 is announced best, by latent 0, which does nothing; latent 9, which announces nothing, brings it."""
    sae.density = torch.ones(48)
    says = [6] * 4 + [8] * 4 + [4] * 3 + [10]
    seen = fake_seen(says, [0.9] * 12, [[-1.0, -2.0, -3.0, -4.0]] * 12)
    f1 = torch.zeros(4, 48)
    f1[0, 0], f1[1, 1], f1[2, 2], f1[2, 1], f1[3, 3] = 0.9, 0.5, 0.4, 0.6, 0.9
    slope = torch.zeros(48)
    slope[9], slope[2] = 5.0, 4.0
    asked = []

    def fake(model, tokenizer, hook, sae, pairs, seen, places, word):
        asked.append((word, pairs, places))
        return {"change": 1.0, "beyond": {0: 0.1, 9: 3.0}.get(pairs[0], 0.5) * (1 if word == 4 else 0.1), "first": len(places) * (pairs[0] in (9, 2)), "of": len(places)}

    monkeypatch.setattr(choosing, "tried", fake)
    monkeypatch.setattr(choosing, "slopes", lambda *args: slope)
    find = lambda **more: choosing.candidates(None, None, "", sae, seen, f1, lambda latents: latents, "last", **more)
    found = find()
    assert {c["word"] for c in found} == {4, 6, 8}  # 10 is said once only
    best = found[0]
    assert (best["word"], best["latents"]) == (4, [9]) and best["own"] == {6: 1, 8: 2, 10: 3} and best["sources"] == [6, 8, 10] and best["f1"] == 0
    assert [c["latents"] for c in found if c["word"] == 4] == [[9], [2], [0]]  # the latent that announces it best comes last
    assert all(says[p] in (6, 8, 10) for word, _, places in asked for p in places if word == 4)
    assert all(i not in c["own"].values() for c in found for i in c["latents"])  # no latent is set and silenced at once
    asked.clear()
    assert {tuple(c["latents"]) for c in find(latents=[5, 6], target=4)} == {(5, 6)} and asked[0][2] == [0, 1, 2, 3, 4, 5]
    assert find(target=4, lowers=True)[0]["latents"] == [0] and {says[p] for p in asked[-1][2]} == {4}
    assert [c["sources"] for c in find(target=4, sources=[10])] == [[10]] * 3 and find(target=4, sources=[10])[0]["own"] == {10: 3}


# Topics


def test_tokens_of_a_topic(tokenizer):
    cat, dog = (tokenizer.convert_tokens_to_ids(w) for w in ("cat", "dog"))  # this tokenizer knows no spaces: " cat" and "cat" are one token
    assert choosing.topic_tokens(tokenizer, ["cat", "dog", "zebra", "cat dog"]) == sorted([cat, dog])
    with pytest.raises(u.UserError, match="none of zebra, cat dog is a single token"):
        choosing.topic_tokens(tokenizer, ["zebra", "cat dog"])


def test_openings_are_at_equal_steps():
    rows = fake_rows([[3, *range(10 * w, 10 * w + 9)] for w in range(1, 10)])
    index = (rows.window >= 2).nonzero().flatten()
    assert choosing.openings(rows, index, 3, 4) == [[3, *range(10 * w, 10 * w + 4)] for w in (3, 6, 9)]
    assert len(choosing.openings(rows, index, 99, 4)) == 7


def test_words_of_a_topic_are_counted_by_hand():
    words = ["war", "Battle", "war ship", "海", "海军"]
    assert choosing.count_words("War, wars; a warship, the BATTLE and war-like battle of 1812", words) == 4
    assert choosing.count_words("the war ship", words) == 1 and choosing.count_words("", words) == 0  # the longest counts, once
    assert choosing.count_words("他去了海边,海军来了", words) == 2 and choosing.count_words("a.b acb", ["a.b"]) == 1


def topic_rows(n_windows=30):
    """Rows with activations, in windows of eight tokens."""
    rows = fake_rows([[3, *torch.randint(4, 12, (7,)).tolist()] for _ in range(n_windows)])
    rows.token_ids = torch.tensor([rows.windows[w][p] for w, p in zip(rows.window.tolist(), rows.position.tolist(), strict=True)])
    rows.activations, rows.finite = torch.randn(len(rows.window), 16), torch.ones(len(rows.window), dtype=torch.bool)
    return rows


def test_the_share_of_activation_in_text_about_a_topic(sae):
    rows = topic_rows()
    index = torch.randperm(len(rows.window))[:150]
    got, acts = choosing.share_in_topic(sae, rows, index, [5, 9], chunk=40), sae.encode(rows.activations)
    topical = {w for w in range(30) if sum(rows.token_ids[i] in (5, 9) for i in index.tolist() if rows.window[i] == w) >= 2}
    assert 0 < len(topical) < 30
    for latent in range(0, 48, 5):
        fired = [i for i in index.tolist() if acts[i, latent] > 0]
        inside = sum(acts[i, latent].item() for i in fired if int(rows.window[i]) in topical)
        expected = inside / sum(acts[i, latent].item() for i in fired) if len(fired) >= 15 else 0.0
        assert got[latent].item() == pytest.approx(expected, abs=1e-4)


def test_some_rows_are_whole_windows():
    rows = topic_rows()
    rows.finite[5] = False
    without = rows.window < 10
    index = choosing.some_rows(rows, without, seed=1, most=40)
    windows = rows.window[index].unique()
    assert len(windows) == 5 and len(index) == 35 and windows.min() >= 10 and (rows.finite[index]).all()
    assert len(choosing.some_rows(rows, without)) == 140 and 5 not in choosing.some_rows(rows, ~without).tolist() and len(choosing.some_rows(rows, without, most=1)) == 7
    assert not torch.equal(choosing.some_rows(rows, without, seed=2, most=40), index)


def test_three_ways_to_a_topic(place):
    model, tokenizer, hook, sae = place
    rows, prompts, written = topic_rows(), [[3, 5, 6], [3, 7, 8, 9]], [[10, 11, 12], [13]]
    next_token, index = choosing.followers(rows), torch.arange(210)
    sae.density[:4] = 0
    pool = choosing.topic_pool(model, tokenizer, hook, sae, rows, index, next_token, [5, 9], [6, 7, 11], prompts, written, "generated", most=3)
    assert set(pool.values()) == {"text", "words", "gradient"} and 12 <= len(pool) <= 18 and min(pool) >= 4
    share = choosing.share_in_topic(sae, rows, index, [5, 9])
    share[:4] = -1
    assert [latent for latent, why in pool.items() if why == "text"] == share.topk(3).indices.tolist()
    at = [[3, 5, 6, 10, 11, 12], [3, 7, 8, 9, 13]], [range(2, 6), range(3, 5)], prompts
    topic, like = (choosing.slopes(model, tokenizer, hook, sae, *at, words, "generated") for words in ([5, 9], [6, 7, 11]))
    slope = choosing.slopes(model, tokenizer, hook, sae, *at, [5, 9], "generated", [6, 7, 11])
    torch.testing.assert_close(slope, topic - like, rtol=1e-3, atol=1e-4)
    slope[:4] = -99
    assert set(slope.topk(12).indices.tolist()) <= set(pool)  # four times as many by this as by the others
    slope[:4] = 99
    assert set((-slope).topk(12).indices.tolist()) <= set(choosing.topic_pool(model, tokenizer, hook, sae, rows, index, next_token, [5, 9], [6, 7, 11], prompts, written, "generated", most=3, lowers=True))


def odds64(p):
    """ln(m / (1 - m)) of the mean m."""
    m = sum(p) / len(p)
    return math.log(m / (1 - m))


def heard_by_hand(model, tokenizer, hook, sae, prompt, more, tokens, pairs, ends=False):
    """The probabilities of `tokens` before each token of `more`, and after its last where the text `ends`, one pass of the
    whole text for each, in float64."""
    values = []
    with editing.intervene(model, hook, sae, tokenizer, pairs):
        for i in range(len(more) + ends):
            with editing.stating(model, [prompt]):
                values.append(model(torch.tensor([prompt + more[:i]])).logits[0, -1].double().softmax(-1)[tokens].sum().item())
    return values


def test_odds_of_a_mean_by_hand():
    p = torch.rand(7, dtype=torch.float64) ** 6
    assert choosing.odds_of_mean(torch.stack([p, p / 2], 1)).tolist() == pytest.approx([odds64(p.tolist()), odds64((p / 2).tolist())], rel=1e-9)
    assert choosing.odds_of_mean(torch.tensor([0.0, 0.0, 0.5, 0.5])).item() == pytest.approx(math.log(1 / 3)) and choosing.odds_of_mean(torch.zeros(3)).isfinite()
    blow = torch.cat([torch.full((29,), 1e-7), torch.tensor([0.1])])  # what lifts every rare word says next to nothing
    assert choosing.odds_of_mean(blow.clamp_min(1e-4)) - choosing.odds_of_mean(blow) < 0.05


@pytest.mark.parametrize("ends", [False, True])
def test_how_much_a_text_is_about_a_topic(place, ends, monkeypatch):
    """Beside passes of the whole text without a cache, several prompts and several arms in one batch; where texts end, the
    place of their end counts and nothing after it."""
    model, tokenizer, hook, sae = place
    prompts, sets = [[3, *torch.randint(4, 24, (n,)).tolist()] for n in (4, 6, 5)], torch.randperm(20).add(4).split([3, 1, 16])
    sets = [tokens.tolist() for tokens in sets]
    arms = [[(editing.set_value([int(i)], 4.0, sae.max_act), "generated")] for i in torch.randperm(48)[:2]]
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    if ends:  # a token that some text says ends it
        with editing.intervene(model, hook, sae, tokenizer, editing.together(arms)):
            model.generation_config.eos_token_id = editing.generate(model, tokenizer, prompts * 2, 6)[1][2]
    with editing.intervene(model, hook, sae, tokenizer, editing.together(arms)):
        texts, odds = choosing.write(model, tokenizer, prompts * 2, sets, 6)
        assert texts == editing.generate(model, tokenizer, prompts * 2, 6) and odds.dtype == torch.float64
    assert ends == any(len(text) < 6 for text in texts)
    for i, (prompt, text) in enumerate(zip(prompts * 2, texts, strict=True)):
        for tokens, got in zip(sets, odds[i].tolist(), strict=True):
            assert got == pytest.approx(odds64(heard_by_hand(model, tokenizer, hook, sae, prompt, text, tokens, arms[i // 3], len(text) < 6)), abs=1e-3)
    assert not model._forward_hooks and choosing.write(model, tokenizer, prompts, [], 6)[1].shape == (3, 0)


def test_a_text_that_repeats_itself_by_hand():
    assert choosing.repeated([[5, 5, 5, 5], [1, 2, 3, 1]]) == pytest.approx(4 / 8) and choosing.repeated([[1, 2], [2, 1]]) == 0 and choosing.repeated([[], []]) == 1


def test_latents_for_a_topic_by_what_they_do(place):
    model, tokenizer, hook, sae = place
    prompts, written = [[3, *torch.randint(4, 24, (n,)).tolist()] for n in (4, 6, 5)], [torch.randint(4, 24, (n,)).tolist() for n in (3, 0, 5)]
    sets, pool = [[9, 14], [5, 6, 20]], dict.fromkeys(torch.randperm(48)[:5].tolist(), "text")
    pairs_of = lambda latents: [(editing.set_value(latents, 4.0, sae.max_act), "generated")]
    found = choosing.topic_candidates(model, tokenizer, hook, sae, prompts, written, pool, sets, pairs_of)
    assert {c["latents"][0] for c in found} == set(pool) and [c["beyond"] for c in found] == sorted((c["beyond"] for c in found), reverse=True)
    falling = choosing.topic_candidates(model, tokenizer, hook, sae, prompts, written, pool, sets, pairs_of, lowers=True)
    assert [c["latents"] for c in falling] == [c["latents"] for c in found][::-1]
    said = lambda pairs, tokens: sum(odds64(heard_by_hand(model, tokenizer, hook, sae, prompt, more, tokens, pairs, True)) for prompt, more in zip(prompts, written, strict=True)) / 3
    for c in found:
        change, like = (said(pairs_of(c["latents"]), tokens) - said([], tokens) for tokens in sets)
        assert c["change"] == pytest.approx(change, abs=1e-3) and c["beyond"] == pytest.approx(change - like, abs=2e-3) and c["why"] == "text"


def test_edits_for_a_topic_by_what_the_model_writes(place):
    model, tokenizer, hook, sae = place
    model.generation_config.eos_token_id = tokenizer.eos_token = None  # texts of a known length
    prompts, sets = [[3, *torch.randint(4, 24, (n,)).tolist()] for n in (4, 6, 5)], [[5, 9, 14], [6, 7, 20, 21]]
    own = choosing.write(model, tokenizer, prompts, sets, 6)
    pairs_of = lambda latents, strength: [(editing.set_value(latents, strength), "generated")]
    arms = [([int(i)], 40.0) for i in torch.randperm(48)[:5]] + [([3, 7], 20.0), ([3, 7], 10.0)]
    found = choosing.topic_trials(model, tokenizer, hook, sae, prompts, own, arms, sets, pairs_of, at_once=9)
    assert [(c["latents"], c["strength"]) for c in found] == arms
    for c in found:
        with editing.intervene(model, hook, sae, tokenizer, pairs_of(c["latents"], c["strength"])):
            alone = [choosing.write(model, tokenizer, [prompt], sets, 6) for prompt in prompts]
        texts, (change, like) = [text for (text,), _ in alone], (torch.cat([odds for _, odds in alone]) - own[1]).T
        assert c["change"] == pytest.approx(change.mean().item(), abs=1e-3) and c["beyond"] == pytest.approx((change - like).mean().item(), abs=1e-3)
        assert c["rise"] in {int((change > r * choosing.ROUNDING).sum()) for r in (0.9, 1.1)} and c["of"] == 3
        assert c["cost"] == pytest.approx(editing.surprise(model, prompts, texts) - editing.surprise(model, prompts, own[0]), abs=1e-3)
        assert c["repeats"] == pytest.approx(choosing.repeated(texts) - choosing.repeated(own[0]))
    with pytest.raises(u.UserError, match="writes nothing"):
        choosing.topic_trials(model, tokenizer, hook, sae, prompts, ([[], [], []], own[1]), arms, sets, pairs_of)


def test_strengths_are_sought_by_halving(monkeypatch):
    """A text of latent 1 can bear 5 and of latents 2, 3 together 2.2; what is raised grows with the strength."""
    rounds = []

    def fake(model, tokenizer, hook, sae, prompts, own, arms, *rest):
        rounds.append(arms)
        return [{"latents": g, "strength": s, "beyond": s * len(g), "cost": s - (5 if g == [1] else 2.2), "repeats": 0.3 * (len(arms) == 1)} for g, s in arms]

    monkeypatch.setattr(choosing, "topic_trials", fake)
    found = choosing.topic_search(None, None, "", None, [], None, [[1], [2, 3]], 8.0, [], None, lambda cost, repeats: ["dear"] * (cost > 0))
    assert rounds == [[([1], 4.0), ([2, 3], 4.0)], [([1], 6.0), ([2, 3], 2.0)], [([1], 5.0), ([2, 3], 3.0)]]
    assert (found[0]["latents"], found[0]["strength"]) == ([1], 5.0) and len(found) == 6
    assert [c["beyond"] for c in found[:3]] == [5.0, 4.0, 4.0] and all(c["cost"] > 0 for c in found[3:])
    found = choosing.topic_search(None, None, "", None, [], None, [[1], [2, 3]], 8.0, [], None, lambda cost, repeats: ["dear"] * (cost > 0), lowers=True)
    assert [c["beyond"] for c in found[:3]] == [4.0, 4.0, 5.0] and all(c["cost"] > 0 for c in found[3:])  # those that raise it least
    worn = choosing.topic_search(None, None, "", None, [], None, [[1]], 8.0, [], None, lambda cost, repeats: ["worn"] * (repeats > 0.1))
    assert [c["strength"] for c in worn] == [4.0, 2.0, 1.0]


@pytest.mark.parametrize("lowers", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_comes_last(monkeypatch, sae, bad, lowers):
    """Latent 1 of three breaks the model's numbers: in each of the three rankings it is no candidate to go on with."""
    beyond = {0: 0.5, 1: bad, 2: 0.25}
    monkeypatch.setattr(choosing, "topic_trials", lambda *args: [{"latents": g, "strength": s, "beyond": beyond[g[0]], "cost": 0.0, "repeats": 0.0} for g, s in args[6]])
    trials = choosing.topic_search(None, None, "", None, [], None, [[1], [0], [2]], 8.0, [], None, lambda cost, repeats: [], lowers=lowers)
    assert [c["latents"] for c in trials[-3:]] == [[1]] * 3 and trials[0]["latents"] == ([2] if lowers else [0])
    monkeypatch.setattr(choosing, "topic_trials", lambda *args: [{"latents": g, "strength": s, "beyond": 1.0, "cost": bad if g == [1] else 0.0, "repeats": 0.0} for g, s in args[6]])
    trials = choosing.topic_search(None, None, "", None, [], None, [[1], [0]], 8.0, [], None, lambda cost, repeats: ["dear"] * (cost > 1), lowers=lowers)
    assert [c["latents"] for c in trials[-3:]] == [[1]] * 3

    sae.density = torch.ones(48)
    seen, f1 = fake_seen([6] * 4 + [8] * 4 + [4] * 3, [0.9] * 11, [[-1.0, -2.0, -3.0]] * 11), torch.zeros(3, 48)
    f1[0, 0], f1[0, 1], f1[1, 4], f1[2, 5] = 0.9, 0.8, 0.5, 0.6
    monkeypatch.setattr(choosing, "tried", lambda model, tokenizer, hook, sae, pairs, seen, places, word: {"change": 1.0, "beyond": beyond.get(pairs[0], 0.0), "first": len(places), "of": len(places)})
    monkeypatch.setattr(choosing, "slopes", lambda *args: torch.zeros(48))
    found = choosing.candidates(None, None, "", sae, seen, f1, lambda latents: latents, "last", target=4, lowers=lowers)
    assert found[-1]["latents"] == [1] and len(found) > 1

    odds = [torch.zeros(2), *(torch.tensor([b, 0.0]) for b in beyond.values())]
    monkeypatch.setattr(choosing.editing, "logprobs_at", lambda *args: [torch.zeros(1, 3)])
    monkeypatch.setattr(choosing, "odds_of_mean", lambda said, calls=iter(range(9)): odds[next(calls)])
    monkeypatch.setattr(choosing.editing, "intervene", lambda *args: contextlib.nullcontext())
    ranked = choosing.topic_candidates(None, None, "", sae, [[3]], [[5]], dict.fromkeys(beyond, "text"), [[0], [1]], lambda latents: [], lowers)
    assert [c["latents"] for c in ranked] == ([[2], [0], [1]] if lowers else [[0], [2], [1]])


def test_words_as_frequent_as_a_topics():
    """Tokens 2 i are words of their own; how often each stands in the text is known."""
    counts = {2: 9, 4: 30, 6: 3, 8: 28, 10: 2, 12: 27, 14: 100, 16: 1}
    token = torch.tensor([t for t, n in counts.items() for _ in range(n)])
    token = token[torch.randperm(len(token))]
    next_token = torch.zeros_like(token)
    find = lambda tokens, times=10: choosing.as_frequent(token, next_token, Spaced(), tokens, times)
    assert find([2]) == [6, 12] and find([12]) == [2, 4, 8] and find([2, 12]) == [4, 6, 8] and find([40]) == [6, 10, 16]  # 40 stands nowhere: as if once
    drawn = {tuple(choosing.as_frequent(token, next_token, Spaced(), [12], 1, seed)) for seed in range(30)}
    assert drawn == {(2,), (4,), (8,)}


@pytest.mark.parametrize(("words", "target", "sources", "message"), [
    ([3], "", [], "topic_words: .*not 3"), ([" "], "", [], "topic_words: .*not ' '"), (["war"], "red", [], "two experiments"),
    ([], "", [5], "source_words: .*not 5"), ([], "red", [False, True], "source_words: .*not False .in YAML, quotes"), ([], " red", ["blue", "red"], "'red' is among source_words"),
])  # fmt: skip
def test_words_that_are_none(words, target, sources, message):
    with pytest.raises(u.UserError, match=message):
        choosing.check_words(words, target, sources)
    choosing.check_words(["war"], "", [])
    choosing.check_words([], "red", ["blue", "redder"])
