"""Contexts against a brute-force search, token effects against finite differences, the page against hostile tokens."""

import base64
import gzip
import json
import math
import random
import re
import shlex

import numpy as np
import pytest
import tokenizers
import torch
import transformers
import yaml
from conftest import HOOK, gemma, gpt2, loaded_params, word_tokenizer

import browser
import experiment
import features
import harvest
import patching
import report
import sae_utils as u
import showing
import storing


@pytest.fixture
def rows(folder, model, tokenizer):
    return harvest.get_rows(model, tokenizer, HOOK, loaded_params(folder, model, tokenizer), folder / "activations")


@pytest.fixture
def sparse_sae(rows):
    sae = u.SAE(16, 48, seed=2).requires_grad_(False)
    sae.mean.copy_(rows.activations.mean(0))
    sae.b_enc -= 0.25 * torch.rand(48)
    sae.b_enc[5] = -2  # never fires
    return sae


@pytest.mark.parametrize("block", [10**7, 500])
def test_contexts_are_those_of_a_full_search(rows, sparse_sae, block):
    index = torch.randperm(len(rows))[:1200].sort().values
    document = rows.window_document[rows.window]
    found = features.contexts(sparse_sae, rows.activations, index, document, block=block)
    acts = sparse_sae.encode(rows.activations)
    for latent in range(48):
        firing = index[acts[index, latent] > 0]
        ranked = firing[acts[firing, latent].argsort(descending=True)][:64].tolist()
        expected, seen = [], set()
        for row in ranked:
            if document[row].item() not in seen:
                seen.add(document[row].item())
                expected.append(row)
        expected = expected[:10]
        top = [row for row in found["top_rows"][latent].tolist() if row >= 0]
        assert len(top) == len(expected) and len({document[row].item() for row in top}) == len(top)
        for values in (acts[top, latent], found["top_values"][latent, : len(top)]):  # rows with nearly equal values may change places
            torch.testing.assert_close(values, acts[expected, latent], rtol=1e-4, atol=1e-6)
        if len(firing) <= 256:  # then the entries drawn are all there are
            ordered = firing[acts[firing, latent].argsort()].tolist()
            for decile in range(10):
                tenth = ordered[len(ordered) * decile // 10 : len(ordered) * (decile + 1) // 10]
                drawn = [row for row in found["decile_rows"][latent, decile].tolist() if row >= 0]
                assert len(set(drawn)) == min(5, len(tenth))
                if tenth:
                    inside = acts[drawn, latent]
                    assert inside.min() >= acts[tenth, latent].min() - 1e-5 and inside.max() <= acts[tenth, latent].max() + 1e-5
            assert sorted(row for row in found["drawn_rows"][latent].tolist() if row >= 0) == sorted(firing.tolist())
        drawn = found["drawn_rows"][latent]
        torch.testing.assert_close(found["drawn_values"][latent][drawn >= 0], acts[drawn[drawn >= 0], latent], rtol=1e-4, atol=1e-6)
    assert all((found[name][5] == -1).all() for name in ("top_rows", "decile_rows", "drawn_rows"))


def test_entries_drawn_are_an_even_sample(fresh_seed):
    keeper, generator = features.Keeper(1, 256), torch.Generator().manual_seed(fresh_seed)
    for first in range(0, 20_000, 5_000):
        n = torch.arange(first, first + 5_000)
        keys = torch.randint(2**31 - 1, (5_000,), generator=generator, dtype=torch.int32)
        keeper.offer(n, torch.zeros(5_000, dtype=torch.long), n.float() + 1, keys)
    assert len(keeper.row.unique()) == 256 and abs(keeper.row.float().mean() - 10_000) < 5 * 5_774 / 16


def test_surroundings_are_the_tokens_and_activations_around(rows, sparse_sae):
    centres = torch.randint(len(rows), (60,))
    latents = torch.randint(48, (60,))
    tokens, acts = features.surroundings(sparse_sae, rows, latents, centres)
    whole = sparse_sae.encode(rows.activations)
    for i, (row, latent) in enumerate(zip(centres.tolist(), latents.tolist(), strict=True)):
        window, position = rows.windows[rows.window[row]], int(rows.position[row])
        for offset in range(-8, 9):
            inside = 0 <= position + offset < len(window)
            assert tokens[i, offset + 8] == (window[position + offset] if inside else -1)
            there = inside and position + offset > 0 and row + offset < len(rows)  # BOS has no row, nor what n_activations cut off
            expected = whole[row + offset, latent].item() if there else 0
            assert acts[i, offset + 8].item() == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_token_effects_against_finite_differences(family, fresh_seed, monkeypatch):
    """In the last layer the direct path is all there is: logits move as told when the hook's output is pushed."""
    model, tokenizer = (gemma(), word_tokenizer()) if family == "gemma" else (gpt2(), word_tokenizer())
    model = model.double()
    hook = "model.layers.2.mlp.down_proj" if family == "gemma" else "transformer.h.2.mlp.c_proj"
    sae = u.SAE(16, 20, seed=fresh_seed % 1000).requires_grad_(False)
    window = [3, *torch.randint(4, 24, (6,)).tolist()]
    found = features.token_effects(model, hook, sae, [window], u.special_ids(tokenizer), k=24, most=1)
    ids = torch.tensor([window])

    def logits(push):
        handle = model.get_submodule(hook).register_forward_hook(lambda m, args, out: out.index_add(1, torch.tensor([1]), push[None, None]))
        result = model(input_ids=ids).logits[0, 1]
        handle.remove()
        return result

    off = 0
    for latent in range(20):
        step = 1e-2 * sae.W_dec[latent].double()
        slope = (logits(step) - logits(-step)) / 2e-2  # Gemma's norms compute in float32, so the step is not too small
        mine = torch.zeros(24, dtype=torch.double)
        mine[found["promoted"][latent].long()] = found["promoted_by"][latent].double()
        torch.testing.assert_close(mine, slope, rtol=0, atol=3e-3 * slope.abs().max().item())
        assert found["promoted"][latent].tolist() == found["suppressed"][latent].flip(0).tolist()
        bins, _ = np.histogram(slope, features.LOGIT_BINS)
        off += np.abs(found["logit_histogram"][latent].numpy() - bins).sum() // 2  # one near an edge may be in the next bin
        assert found["logit_histogram"][latent].sum() == 24 and found["logit_histogram"][latent, [0, -1]].min() >= 1
    assert off <= 5
    monkeypatch.setattr(features, "LOGITS", 10)
    assert (features.token_effects(model, hook, sae, [window], u.special_ids(tokenizer), k=24, most=1)["logit_histogram"].sum(1) == 8).all()  # every third


HOSTILE = ["<script>alert(1)</script>", "</script><b>", "<!--", '"quoted"', "'", "$x$", "\\", "日本", "🙂", "\x00\x1b", "\n", "\u2028", "&lt;", "plain"]


MANY = [" “", "”", "’s", "中", "文", "龘", " 🙂", "🫨", "é", " ½", "☃", " the", " ty", "phoon", "a", "\n"]


def byte_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """Characters of MANY are tokens of one byte each ("bytes"), of some bytes ("merged", as GPT-2's and SmolLM2's),
    or fall back to <0xE9> where they are rare ("fallback", as Gemma's)."""
    if kind == "fallback":
        pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁aéthypon“中Ω", "\n"]
        merges = [("▁", "t"), ("▁t", "y"), ("p", "h"), ("o", "o"), ("oo", "n"), ("ph", "oon")]
        vocabulary = {piece: i for i, piece in enumerate(pieces + ["".join(pair) for pair in merges])}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        parts = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
        made.decoder = tokenizers.decoders.Sequence(parts)
    else:
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), vocab_size=256 if kind == "bytes" else 267)
        made.train_from_iterator(["½ ☃ “”’ 🫨🙂 typhoon ½ ☃ “” 🙂🫨 typhoon"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("kind", ["bytes", "merged", "fallback"])
def test_a_character_stands_whole_with_the_token_in_which_it_begins(kind):
    tokenizer = byte_tokenizer(kind)
    as_text = showing.TokenText(tokenizer)
    for _ in range(20):
        text = "".join(MANY[i] for i in torch.randint(len(MANY), (12,)).tolist())
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        owner = [next(k for k, (start, end) in enumerate(spans) if start <= i < end) for i in range(len(text))]
        expected = ["".join(c for c, k in zip(text, owner, strict=True) if k == token) for token in range(len(ids))]
        single = [as_text(i) for i in ids]
        assert showing.whole(single) == expected and "".join(expected) == text
        assert not any("\ufffd" in piece for piece in single)
        if kind == "bytes":  # cut anywhere, what is left is the bytes there
            first, last = sorted(torch.randint(len(ids) + 1, (2,)).tolist())
            left = text.encode()[first:last].decode("utf-8", "backslashreplace")
            assert "".join(showing.whole(single[first:last])) == left == as_text(ids[first:last])
    assert repr(showing.Bytes(" ½".encode()[:2])) == "' \\xc2'" and showing.whole([" a", "b"]) == [" a", "b"]


def test_a_text_that_only_looks_broken_is_left_alone():
    """A real U+FFFD is a character like any other, and a word-level token is not made of bytes."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "\ufffd": 2, "â": 3}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    as_text = showing.TokenText(transformers.PreTrainedTokenizerFast(tokenizer_object=made))
    assert [as_text(2), as_text(3)] == [" \ufffd", " â"] and not isinstance(as_text(2), showing.Bytes)
    merged = byte_tokenizer("bytes")
    ids = merged("\ufffd", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3 and showing.whole([showing.TokenText(merged)(i) for i in ids]) == ["\ufffd", "", ""]


def test_what_a_reader_sees_of_a_token():
    assert [showing.visible(text) for text in (" a", "\n\n", "\x00\t", "\u202e", "", "猫")] == [" a", "↵↵", "··", "·", "‹", "猫"]
    half, rest = showing.Bytes("é".encode()[:1]), showing.Bytes("é".encode()[1:])
    page = showing.shade([" a", half, rest, "<"], [0, 0.5, 1.0, 0.25], framed=2)
    boxes = re.findall(r'<span style="display:inline-block[^>]*outline:1px solid (\S+?);[^>]*title="([^"]*)">(.*?)</span>(?=<span style="display|</span>)', page)
    assert [(edge, value, re.sub(r"<.*?>", "", text)) for edge, value, text in boxes] == [
        ("#8884", "0", " a"), ("#8884", "0.5", "é"), ("currentColor", "1", "‹"), ("#8884", "0.25", "&lt;"),
    ]  # fmt: skip
    assert page.count("radial-gradient") == 1 and ">" + " " + "<" in page  # the space is there to be copied, a background marks it


def test_a_patched_text_that_parts_within_a_character():
    as_text, ids = showing.TokenText(byte_tokenizer("bytes")), list(byte_tokenizer("bytes")("☃a", add_special_tokens=False)["input_ids"])
    found = patching.pieces(as_text, ids, [*ids[:2], 0, ids[3]])
    assert [piece["text"] for piece in found] == ["☃", "", "‹", "a"] and [piece["differs"] for piece in found] == [False, False, True, False]


def test_part_of_a_character_is_in_no_class():
    assert not features.token_classes([showing.Bytes(b"\xe2\x80"), showing.Bytes(b" \xc2"), showing.Bytes(b"A\xe2")]).any()


def spread_page(tmp_path, kind):
    """A page of three latents on text of `byte_tokenizer`: (path, its contexts as [(latent, place, ids)], what features.npz
    would hold, TokenText). Latents 0 and 2 fire on the third token of the first text, all of them elsewhere too."""
    tokenizer, width = byte_tokenizer(kind), 2 * features.AROUND + 1
    as_text = showing.TokenText(tokenizer)
    tokens = torch.full((3, features.TOP + 10, width), -1, dtype=torch.int32)
    acts, placed = torch.zeros(tokens.shape, dtype=torch.float16), []
    for latent, text in enumerate(["a typhoon “中文” 龘 🙂🫨 a ☃ the", "龘龘 ½ é’s 🫨 ☃ 龘龘龘龘 a the a", "a typhoon a ☃☃龘 a"]):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for place, centre in ((0, 2), (1, len(ids) // 2), (features.TOP, len(ids) - 3)):
            first, last = max(0, centre - features.AROUND), min(len(ids), centre + features.AROUND + 1)
            at = slice(features.AROUND - centre + first, features.AROUND - centre + last)
            tokens[latent, place, at] = torch.tensor(ids[first:last], dtype=torch.int32)
            acts[latent, place, features.AROUND] = 0.5 + 0.1 * latent
            placed.append((latent, place, ids[first:last]))
    found = {"tokens": tokens, "acts": acts}
    part = next(i for i in range(len(tokenizer)) if isinstance(as_text(i), showing.Bytes))
    for name, n in (("promoted", 10), ("suppressed", 10), ("fired_tokens", 5)):
        found[name] = torch.full((3, n), part, dtype=torch.int32)
    for name, n in (("fired_tokens_share", 5), ("fired_classes", 5), ("fired_positions", 8), ("histogram", 20)):
        found[name] = torch.rand(3, n)
    found |= {"base_classes": torch.rand(5), "base_positions": torch.rand(8), "nearest": torch.tensor([1, 2, 0]), "nearest_cosine": torch.rand(3)}
    found["promoted"][1, 4] = tokenizer("phoon", add_special_tokens=False)["input_ids"][0]
    found["promoted"][1, 5] = tokenizer("Ω", add_special_tokens=False)["input_ids"][0]
    density, path = torch.tensor([0.1, 0.2, 0.3]), tmp_path / "features.html"
    stable = {"runs": np.array(["seed <1>"]), "stability": np.array([0.5, 0.75, 1]), "cosine": np.array([[0.5, 0.75, 1]]), "match": np.array([[7, 8, 9]])}
    effects = {"0": {"kl": 0.25, "places": 16, "falls": [["<b>", -0.5]], "rises": []}}
    about = {"run": "my run", "figures": [["fvu", "0.1234", "what it is"]], "rows": 1000, "effects": effects, "known": {"2": [["next", "<i>", True, 0.875, 0.5]]}, "stability": stable}
    features.write_page(path, "spread", found, density, torch.ones(3), as_text, {1: "Snow"}, about)
    return path, placed, found | {"density": density, "max_act": torch.ones(3)}, as_text


@pytest.mark.parametrize("kind", ["bytes", "merged", "fallback"])
def test_characters_spread_over_tokens_are_whole_wherever_contexts_are_shown(tmp_path, kind, monkeypatch):
    path, placed, found, as_text = spread_page(tmp_path, kind)
    saved = {name: value.numpy() for name, value in found.items()}
    data, arrays = page_data(path)
    promoted = data["words"][arrays["promoted"][0, 0]]
    assert promoted == as_text(int(found["promoted"][0, 0])) and promoted.startswith("\\x")
    if kind == "fallback":  # cut at the edge, and not
        assert ["".join(shown_text(data, arrays, 2, place)) for place in (0, 1)] == ["a typhoon a ☃\\xe2\\x98", "a typhoon a ☃☃龘 a"]
    lines = []
    monkeypatch.setattr(report.Report, "tokens", lambda self, texts, *rest: lines.append("".join(texts)))
    with report.open_report(tmp_path / "a.pdf", "x") as pages:
        report.latents(pages, saved, dict.fromkeys(range(3), {"kl": 0.0, "falls": [], "rises": []}), as_text, {})
    cards = [features.card(saved, latent, as_text) for latent in range(3)]
    assert "\ufffd" not in path.read_text(encoding="utf-8") + "".join(cards + lines)
    for (latent, place, ids), line in zip(placed, lines, strict=True):
        right = as_text.tokenizer.decode(ids).strip("\ufffd")  # a character that is cut at the edge is not to be seen there
        pieces = shown_text(data, arrays, latent, place)
        assert len(pieces) == len(ids) and right in "".join(pieces) and right in line
        assert right in re.sub("<.*?>|‹", "", cards[latent])


@pytest.mark.skipif(not browser.browser(), reason="no chromium is installed here")
def test_a_word_of_two_tokens_is_found_in_a_browser(tmp_path):
    path, placed, _, as_text = spread_page(tmp_path, "fallback")
    assert [as_text(i) for i in placed[0][2]][1:3] == [" ty", "phoon"]
    seen = browser.look(path, "Typhoon")
    assert seen["found"] == ["0", "2"] and seen["groups"] == ["fires most on it: 2"] and not browser.mistakes(seen)
    seen = browser.look(path, "PHOON", screens=False)
    assert seen["found"] == ["0", "2", "1"] and seen["groups"] == ["fires most on it: 2", "promotes it: 1"]
    seen = browser.look(path, "龘", screens=False)  # latent 2 fires on it in a place from the tenths
    assert seen["found"] == ["1", "2", "0"] and seen["groups"] == ["fires most on it: 1", "fires on it: 1", "has it near where it fires: 1"]
    assert browser.look(path, "ω", screens=False)["groups"] == ["promotes it: 1"]
    seen = browser.look(path, "next = <i>", screens=False)
    assert seen["found"] == ["2"] and seen["groups"] == ["has it as label, number or known variable: 1"]
    seen = browser.look(path, "snow", screens=False)
    assert seen["found"] == ["1"] and seen["groups"] == ["has it as label, number or known variable: 1"]
    file = tmp_path / "labels.csv"
    file.write_text(seen["csv"], encoding="utf-8")
    name = 'says "next", <img src=x onerror=seen.errors.push(1)>'
    assert features.read_labels(file) == {1: "Snow"} | {int(seen["named_latent"]): name}  # the label that there was, and the new one
    command, edit = seen["texts"]
    assert command == features.patch_command("my run").replace("{latent}", seen["named_latent"])
    file.write_text(edit)
    assert patching.read_edits(file) == [{"latents": [int(seen["named_latent"])], "operation": "amplify", "strength": 4.0, "scope": "all"}]
    seen = browser.look(path, "“中")
    assert seen["found"] == ["0"] and seen["groups"] == ["has it near where it fires: 1"] and not browser.mistakes(seen)


HOW = ("has it as label, number or known variable", "fires most on it", "promotes it", "fires on it", "has it near where it fires")


def how_by_hand(data: dict, arrays: dict[str, np.ndarray], latent: int, wanted: str) -> int | None:
    """Which of HOW a search should say of a latent: every piece of text is looked through letter by letter."""
    number, words, starts = str(arrays["latents"][latent, 0]), [word.lower() for word in data["words"]], arrays["text_starts"]
    if number == wanted.strip() or wanted in data["labels"].get(number, "").lower():
        return 0
    ways = {2} if any(wanted in words[i] for i in arrays["promoted"][latent]) else set()
    for place, at in enumerate(arrays["places"][latent]):
        if at >= 0:
            first, end = (starts[np.searchsorted(starts, at, side="right") - 1 + i] for i in (0, 1))
            owner = [t for t in range(first, end) for _ in words[arrays["text"][t]]]
            piece = "".join(words[i] for i in arrays["text"][first:end])
            found = {owner[i] for begin in range(len(piece)) if piece.startswith(wanted, begin) for i in range(begin, begin + len(wanted))}
            for t in range(first + 1, end):  # what goes on with a character
                found |= {t} if not words[arrays["text"][t]] and t - 1 in found else set()
            near = [t for t in found if abs(t - at) <= features.AROUND]
            shades = arrays["shades"].reshape(data["n"], -1, 2 * features.AROUND + 1)[latent, place]
            ways |= {4} if near else set()
            ways |= {1 if t == at and place < features.TOP else 3 for t in near if shades[t - at + features.AROUND]}
    return min(ways, default=None)


def test_a_name_goes_into_the_labels_and_out_again(tmp_path):
    path = tmp_path / "labels.csv"
    assert features.name_latent(path, 3, " a, \"b\"\nc ") == {3: 'a, "b" c'} == features.read_labels(path)
    path.write_text("latent,name\n7,seven\n3,three\n")
    assert features.name_latent(path, 12, "ünï 猫") == {7: "seven", 3: "three", 12: "ünï 猫"} == features.read_labels(path)
    assert features.name_latent(path, 7, "  ") == {3: "three", 12: "ünï 猫"} == features.read_labels(path)
    path.write_text("7;seven\n")
    with pytest.raises(u.UserError, match="line 1"):
        features.name_latent(path, 3, "x")
    assert path.read_text() == "7;seven\n"


@pytest.mark.skipif(not browser.browser(), reason="no chromium is installed here")
def test_a_search_finds_what_a_look_through_every_letter_finds(tmp_path, fresh_seed):
    rng = np.random.default_rng(fresh_seed)
    for path in (spread_page(tmp_path, "bytes")[0], hostile_page(tmp_path)[0]):
        data, arrays = page_data(path)
        text = "".join(data["words"][i] for i in arrays["text"]).lower()
        begins = [(int(rng.integers(len(text) - 9)), int(rng.integers(1, 9))) for _ in range(40)]
        wanted = [*(text[begin : begin + n] for begin, n in begins), "aa", "7", "<i>", "t t", "\\x"]
        asked = [text for text in wanted if "\n" not in text and "\r" not in text and len(text.encode("utf-16-le")) == 2 * len(text)]  # a field has one line
        with browser.Tab() as tab:
            tab.open(path)
            for text in asked:
                tab.run(browser.TYPED.replace("WORD", json.dumps(text)))
                groups = tab.run("[...document.querySelectorAll('#rows tr.group')].map(e => e.textContent)")
                ways = [how_by_hand(data, arrays, latent, text) for latent in range(data["n"])]
                assert groups == [f"{HOW[how]}: {ways.count(how)}" for how in range(5) if how in ways], text


@pytest.mark.skipif(not browser.browser(), reason="no chromium is installed here")
def test_hostile_tokens_stay_text_in_a_browser(tmp_path):
    path, _, _ = hostile_page(tmp_path)
    seen = browser.look(path, "</script><b>")
    assert seen["errors"] == [] and seen["injected"] == 0 and seen["fetched"] == [] and seen["found"]
    assert "<script>alert(1)</script>" in seen["text"] and not [m for m in browser.mistakes(seen) if m.split()[0] not in ("copied", "window_text")]


def page_data(path) -> tuple[dict, dict[str, np.ndarray]]:
    """The JSON of a page, and its arrays, one row for each live latent where there are so many values."""
    text, arrays = path.read_text(encoding="utf-8"), {}
    held = lambda name: re.search(f'<script type="[a-z/]+" id="{name}">(.*?)</script>', text, re.DOTALL).group(1)
    data = json.loads(held("data"))
    for part in ("table", "rest"):
        raw, at = gzip.decompress(base64.b64decode(held(part))), 0
        for name, kind, size in data[part]:
            array = np.frombuffer(raw, kind, size, at)
            at += array.nbytes
            arrays[name] = array if name.startswith("text") else array.reshape(data["n"], -1)
        assert at == len(raw)
    return data, arrays


def shown_text(data: dict, arrays: dict[str, np.ndarray], latent: int, place: int, around: bool = True) -> list[str]:
    """The words around a place of a latent on the page, or all of its piece of text."""
    at, starts = arrays["places"][latent, place], arrays["text_starts"]
    piece = np.searchsorted(starts, at, side="right") - 1
    before, after = (arrays["before"][latent, place], arrays["after"][latent, place]) if around else (at - starts[piece], starts[piece + 1] - 1 - at)
    return [data["words"][i] for i in arrays["text"][at - before : at + after + 1]]


def hostile_page(tmp_path, d_sae=30):
    generator = torch.Generator().manual_seed(0)
    shape = (d_sae, features.TOP + 10, 2 * features.AROUND + 1)
    tokens = torch.randint(len(HOSTILE), shape, generator=generator, dtype=torch.int32)
    tokens[:, :, 0] = -1
    found = {"tokens": tokens, "acts": torch.rand(shape, generator=generator).half()}
    for name, n in (("promoted", 10), ("suppressed", 10), ("fired_tokens", 5)):
        found[name] = torch.randint(len(HOSTILE), (d_sae, n), generator=generator, dtype=torch.int32)
    for name, n in (("fired_tokens_share", 5), ("fired_classes", 5), ("fired_positions", 8), ("histogram", 20)):
        found[name] = torch.rand(d_sae, n, generator=generator)
    found |= {"base_classes": torch.rand(5, generator=generator), "base_positions": torch.rand(8, generator=generator)}
    found |= {"nearest": torch.randint(d_sae, (d_sae,), generator=generator), "nearest_cosine": torch.rand(d_sae, generator=generator)}
    density = torch.rand(d_sae, generator=generator)
    density[3] = 0
    path = tmp_path / "features.html"
    features.write_page(path, "A page & <its> title", found, density, torch.ones(d_sae), HOSTILE.__getitem__, {7: "<i>label</i>"})
    return path, found, density


def test_tokens_cannot_break_out_of_the_page(tmp_path):
    path, found, density = hostile_page(tmp_path)
    text = path.read_text(encoding="utf-8")
    for bad in ("<script>alert", "<!--", "<i>label", "<b>", "\u2028"):
        assert bad not in text
    assert text.count("<script") == 4 and "A page &amp; &lt;its&gt; title" in text
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", text) and "fetch(" not in text  # nothing is fetched
    data, arrays = page_data(path)
    assert set(data["words"]) == {"", *HOSTILE} and data["labels"] == {"7": "<i>label</i>"} and data["n"] == 29 and data["d_sae"] == 30
    live = [i for i in range(30) if i != 3]
    assert arrays["latents"].flatten().tolist() == live
    for latent, place in ((4, 5), (0, 0), (28, 19)):
        expected = [HOSTILE[i] for i in found["tokens"][live[latent], place] if i >= 0]
        assert shown_text(data, arrays, latent, place) == shown_text(data, arrays, latent, place, around=False) == expected and len(expected) == 16
    acts, shades = found["acts"][live].numpy().astype(float), arrays["shades"].reshape(29, 20, 17)
    np.testing.assert_allclose((shades / 255) ** 2, acts, atol=0.005, rtol=0.02)
    assert ((shades > 0) == (acts > 0)).all()
    assert data["words"][arrays["fired_tokens"][11, 2]] == HOSTILE[found["fired_tokens"][live[11], 2]]
    np.testing.assert_allclose(arrays["fired_classes"][6] / 255, found["fired_classes"][live[6]], atol=0.0025)
    assert arrays["nearest"].flatten().tolist() == found["nearest"][live].tolist()


def test_tokens_cannot_break_out_of_a_cell(tmp_path):
    _, found, density = hostile_page(tmp_path)
    saved = {name: np.asarray(value) for name, value in found.items()} | {"density": np.asarray(density), "max_act": np.ones(30)}
    for latent in (0, 9, 20):
        text = features.card(saved, latent, HOSTILE.__getitem__, "<i>label</i>")
        assert "<script" not in text and "<i>label" not in text and "&lt;i&gt;label" in text
        assert set(re.findall(r"</?([a-z]+)", text)) <= {"b", "br", "span", "i"}


def test_labels_are_read_and_a_wrong_line_is_named(tmp_path):
    file = tmp_path / "labels.csv"
    assert features.read_labels(file) == {}
    file.write_text('latent,name\n3,colours\n\n17,"says, next: red"\n')
    assert features.read_labels(file) == {3: "colours", 17: "says, next: red"}
    for wrong, line in (("seven,x", 2), ("3;x", 1), ("-3,x", 1), ("3", 2), ("3,", 1), (",x", 2), ("²,x", 1), ("3 4,x", 2), ("x,latent", 1), ('4,"open', 1), ('4,"a" b', 2), ("9" * 400 + ",x", 1), ("a\0,x", 1)):
        file.write_text("5,colours\n" * (line - 1) + wrong + "\n6,moods\n")
        with pytest.raises(u.UserError, match=f"labels.csv, line {line}: ") as told:
            features.read_labels(file)
        assert "\n" not in str(told.value) and len(str(told.value)) < 300
    file.write_text("3,a\r\n\r\n4,b\r\n3,c\r\n")
    with pytest.raises(u.UserError, match="line 4: latent 3 has a name already, in line 1"):
        features.read_labels(file)
    file.write_bytes("3,caf\xe9".encode("latin-1"))
    with pytest.raises(u.UserError, match="labels.csv is not UTF-8"):
        features.read_labels(file)


def test_every_line_of_labels_is_used(tmp_path, fresh_seed):
    chance, file = random.Random(fresh_seed), tmp_path / "labels.csv"
    pieces = ["a", " b", '"', ",", "é", "\u2028", "\x0b", "'", "#", ";", "007", "\t"]
    names = {chance.randrange(10**6): "x" + "".join(chance.choices(pieces, k=5)) + "y" for _ in range(50)}
    for end in ("\n", "\r\n"):
        quoted = "".join(f'{latent},"{name.replace(chr(34), chr(34) * 2)}"{end}' for latent, name in names.items())
        file.write_bytes(("\ufeff" * (end == "\n") + quoted).encode())
        assert features.read_labels(file) == names


def test_shares_by_brute_force(rows, sparse_sae, tokenizer):
    pieces = [" Ab", "x1", " ,", "ing", " word", "…", " 7", " É"]
    as_text = lambda token: pieces[token % len(pieces)]
    document = rows.window_document[rows.window]
    found = features.contexts(sparse_sae, rows.activations, torch.arange(len(rows)), document)
    got = features.shares(found, rows, as_text, found["top_values"][:, 0])
    acts = sparse_sae.encode(rows.activations)
    digit, capital, punctuation = {"x1", " 7"}, {" Ab", " É"}, {" ,", "…"}
    word_start, in_word = {" Ab", " word", " É"}, {"x1", "ing"}
    for latent in range(48):
        firing = (acts[:, latent] > 0).nonzero().flatten()
        if 0 < len(firing) <= 256:  # then the sample is all of them
            tokens = [as_text(t) for t in rows.token_ids[firing].tolist()]
            expected = [sum(t in group for t in tokens) / len(tokens) for group in (digit, capital, punctuation, word_start, in_word)]
            assert got["fired_classes"][latent].tolist() == pytest.approx(expected)
            ids, n = rows.token_ids[firing].unique(return_counts=True)
            assert got["fired_tokens_share"][latent, 0].item() == pytest.approx((n.max() / len(firing)).item())
            mine = got["fired_tokens"][latent, 0]
            assert n[(ids == mine).nonzero()].item() == n.max()
            edges = [*features.POSITIONS, 10**9]
            positions = rows.position[firing]
            groups = [((positions >= a) & (positions < b)).float().mean().item() for a, b in zip(edges[:-1], edges[1:], strict=True)]
            assert got["fired_positions"][latent].tolist() == pytest.approx(groups, abs=1e-6)
            bins, _ = np.histogram(acts[firing, latent].double(), bins=20, range=(0, found["top_values"][latent, 0].item()))
            np.testing.assert_allclose(got["histogram"][latent].numpy() * len(firing), bins, atol=1.01)  # a value on a bin's edge
            assert got["histogram"][latent].sum().item() == pytest.approx(1)
    everything = [as_text(t) for t in rows.token_ids.tolist()]
    assert got["base_classes"][0].item() == pytest.approx(sum(t in digit for t in everything) / len(rows), abs=1e-5)
    assert got["base_positions"].sum().item() == pytest.approx(1, abs=1e-5) and got["fired_tokens"][5].tolist() == [-1] * 5


def test_nearly_equal_directions_are_listed():
    W_dec = torch.nn.functional.normalize(torch.randn(60, 24), dim=1)
    W_dec[40] = torch.nn.functional.normalize(W_dec[7] + 0.03 * torch.randn(24), dim=0) * 2.5  # a foreign SAE's rows need not be of norm 1
    nearest, cosine, pairs = features.similar_directions(W_dec, chunk=17)
    unit = torch.nn.functional.normalize(W_dec.double(), dim=1)
    full = (unit @ unit.T).fill_diagonal_(-2)
    best = full.sort(1, descending=True)
    torch.testing.assert_close(cosine.double(), best.values[:, :5], rtol=0, atol=1e-5)
    assert torch.equal(nearest, best.indices[:, :5]) and nearest[7, 0] == 40 and features.similar_directions(W_dec[:3])[0].shape == (3, 2)
    expected = [(i, j) for i in range(60) for j in range(i + 1, 60) if full[i, j] > 0.9]
    assert [(i, j) for i, j, _ in pairs] == sorted(expected, key=lambda p: -full[p]) and (7, 40) in expected


def test_of_collapsed_latents_the_most_alike_are_listed():
    """Nearly all of 300 * 299 / 2 pairs are alike: the best of each chunk, and no list of them all."""
    W_dec = torch.randn(1, 24) + 0.1 * torch.randn(300, 24)
    nearest, cosine, pairs = features.similar_directions(W_dec, chunk=100, most=50)
    unit = torch.nn.functional.normalize(W_dec.double(), dim=1)
    full = unit @ unit.T
    assert (full > 0.9).sum() > 80_000 and len(pairs) == 150 and len({(i, j) for i, j, _ in pairs}) == 150 and all(i < j for i, j, _ in pairs)
    for first in (0, 100, 200):
        best = full[first : first + 100].triu(first + 1).flatten().sort(descending=True).values[:50]
        mine = sorted((value for i, _, value in pairs if first <= i < first + 100), reverse=True)
        torch.testing.assert_close(torch.tensor(mine).double(), best, rtol=0, atol=1e-6)
    for i, j, value in pairs:
        assert value == pytest.approx(full[i, j].item(), abs=1e-6)
    torch.testing.assert_close(cosine.double(), full.fill_diagonal_(-2).topk(5).values, rtol=0, atol=1e-6)


def test_measured_effect_against_an_ablation_by_hand(rows, sparse_sae, model, tokenizer):
    acts = sparse_sae.encode(rows.activations)
    latent = int((acts > 0).sum(0).argmax())
    places = (acts[:, latent] > 0).nonzero().flatten()[:7]
    got = features.measured_effect(model, tokenizer, HOOK, sparse_sae, latent, rows, places, k=24)
    changes, clean_p, ablated_p, kls = [], [], [], []
    for row in places.tolist():
        ids = torch.tensor([rows.windows[rows.window[row]][: rows.position[row] + 1]])
        clean = model(ids).logits[0, -1].double().log_softmax(-1)

        def off(module, args, out):
            x = out[0, 1:]  # all but BOS
            norm = (x - sparse_sae.mean).norm(dim=1, keepdim=True)
            return torch.cat([out[0, :1], x - sparse_sae.encode(x)[:, latent, None] * sparse_sae.W_dec[latent] * norm])[None]

        handle = model.get_submodule(HOOK).register_forward_hook(off)
        ablated = model(ids).logits[0, -1].double().log_softmax(-1)
        handle.remove()
        changes.append(ablated - clean)
        clean_p.append(clean.exp())
        ablated_p.append(ablated.exp())
        kls.append((clean.exp() * (clean - ablated)).sum())
    before, after = torch.stack(clean_p).mean(0), torch.stack(ablated_p).mean(0)
    assert got["places"] == 7 and got["kl"] == pytest.approx(torch.stack(kls).mean().item(), rel=1e-3)
    order = (after - before).argsort().tolist()
    assert [t for t, _ in got["falls"]][:3] == order[:3] and [t for t, _ in got["rises"]][:3] == order[::-1][:3]
    for token, value in got["falls"] + got["rises"]:
        assert value == pytest.approx((after[token] / before[token]).log().item(), abs=1e-3)
    assert got["falls"][0][1] < 0 < got["rises"][0][1] and len(changes) == 7


def test_places_shown_are_the_top_ones_then_one_of_each_tenth(rows, sparse_sae):
    found = features.contexts(sparse_sae, rows.activations, torch.arange(len(rows)), rows.window_document[rows.window])
    shown = features.shown_contexts(sparse_sae, rows, found)
    assert shown["tokens"].shape == shown["acts"].shape == (48, features.TOP + 10, 2 * features.AROUND + 1)
    assert (shown["tokens"][5] == -1).all() and (shown["acts"][5] == 0).all()  # it never fires
    for latent in range(48):
        for place, row in enumerate([*found["top_rows"][latent], *found["decile_rows"][latent, :, 0]]):
            assert shown["tokens"][latent, place, features.AROUND] == (rows.token_ids[row] if row >= 0 else -1)
    torch.testing.assert_close(shown["acts"][:, : features.TOP, features.AROUND].float(), found["top_values"], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("most", [10**6, 1500, 0])
def test_the_pages_text_is_that_around_its_places(rows, sparse_sae, most):
    found = features.contexts(sparse_sae, rows.activations, torch.arange(len(rows)), rows.window_document[rows.window])
    shown = features.shown_contexts(sparse_sae, rows, found, most)
    n = (shown["places"].shape[1] - 10) // 10
    assert n == {10**6: 3, 0: 1}.get(most, n)
    rows_shown = torch.cat([found["top_rows"], found["decile_rows"][:, :, : 2 * n : 2].reshape(48, -1)], 1)
    text, starts, places = shown["text"].tolist(), shown["text_starts"].tolist(), shown["places"]
    assert places.shape == (48, 10 + 10 * n) and torch.equal(places < 0, rows_shown < 0) and (len(text) <= most or n == 1)
    assert starts[0] == 0 and starts[-1] == len(text) and all(a < b for a, b in zip(starts, starts[1:], strict=False))
    for latent, place in (places >= 0).nonzero()[::7].tolist():
        row, at = rows_shown[latent, place], places[latent, place].item()
        piece = np.searchsorted(starts, at, side="right") - 1
        window, position = rows.windows[rows.window[row]], rows.position[row].item()
        begin = at - position if most == 10**6 else max(starts[piece], at - features.AROUND)
        first = position - (at - begin)
        assert first >= 0 and text[begin : at + 1] == window[first : position + 1] and first == max(0, first)
        if most == 10**6:  # whole windows
            assert starts[piece] == begin and starts[piece + 1] - begin == len(window)
        else:
            assert first <= max(0, position - features.AROUND) and starts[piece + 1] - at > min(features.AROUND, len(window) - 1 - position)
    torch.testing.assert_close(shown["place_acts"][:, :10], shown["acts"][:, :10])
    torch.testing.assert_close(shown["place_acts"][:, 10::n], shown["acts"][:, 10:])


def test_text_by_hand():
    flat, starts = np.arange(100, 120), np.array([0, 6, 13, 20])
    around = lambda reach: [part.tolist() for part in features.text_around(flat, starts, torch.tensor([2, 0, 0]), torch.tensor([3, 1, 4]), reach)]
    assert around(0) == [[101, 104, 116], [0, 1, 2, 3], [2, 0, 1]]
    assert around(1) == [[100, 101, 102, 103, 104, 105, 115, 116, 117], [0, 6, 9], [7, 1, 4]]
    assert around(None) == [[*range(100, 106), *range(113, 120)], [0, 6, 13], [9, 1, 4]]


@pytest.mark.parametrize("chunk", [0, 7])
def test_latents_that_fire_together_by_brute_force(rows, sparse_sae, chunk):
    index = torch.randperm(len(rows))[:900].sort().values
    got = features.firing_together(sparse_sae, rows.activations, index, chunk=chunk)
    fires = (sparse_sae.encode(rows.activations[index]) > 0).double()
    both, n, a = fires.T @ fires, len(index), fires.sum(0)
    phi = torch.corrcoef(fires.T)  # of zeros and ones: phi
    known = (n * both - a[:, None] * a) / (a[:, None] * a * (n - a[:, None]) * (n - a)).sqrt()
    torch.testing.assert_close(phi, known, equal_nan=True)
    phi = phi.nan_to_num(0).masked_fill(both < 5, 0).fill_diagonal_(0).clamp_min(0)
    best = phi.topk(5, dim=1)
    torch.testing.assert_close(got["together_phi"].double(), best.values, rtol=0, atol=1e-6)
    there = got["together"] >= 0
    assert torch.equal(there, best.values > 0) and (got["together"][5] == -1).all() and there.any()
    latent, column = there.nonzero(as_tuple=True)
    torch.testing.assert_close(phi[latent, got["together"][latent, column]], got["together_phi"][latent, column].double(), rtol=0, atol=1e-6)
    often = int(both[latent[0], got["together"][latent[0], column[0]]]) + 1  # more than the first pair has
    fewer = features.firing_together(sparse_sae, rows.activations, index, least=often)
    torch.testing.assert_close(fewer["together_phi"].double(), phi.masked_fill(both < often, 0).topk(5, dim=1).values, rtol=0, atol=1e-6)
    few = features.firing_together(sparse_sae, rows.activations, index, most=100)
    assert torch.isfinite(few["together_phi"]).all() and (few["together"] >= -1).all()


def test_selectivity_by_hand():
    tokens = np.arange(3 * 20 * 17).reshape(3, 20, 17)  # all different
    middle = features.AROUND
    tokens[0, :4, middle + 1] = 9999  # 4 of 10 strongest places are before the same token: 6 of 45 pairs
    tokens[0, 10:15, middle + 1] = 9999  # and 5 of 10 of the tenths: 10 of 45
    tokens[1, :, middle - 2] = -1
    tokens[1, :10, middle] = 7  # all strongest places, no other two
    tokens[2, :, [middle - 3, middle + 2]] = 5  # too far away
    text = np.concatenate([np.arange(10_000), np.full(10_000, 7)])  # 7 is every second one, the others are rare
    value, offset = features.selectivity(tokens, text)
    weight = math.log(10_001 / 20_000) / math.log(0.001)
    assert value.tolist() == pytest.approx([(6 / 45 + 10 / 45) / 2, weight / 2, 0]) and offset[:2].tolist() == [1, 0]
    lacking = tokens[:1].copy()
    lacking[:, 2:10] = -1  # two strongest places are left, alike: one pair of 45
    assert features.selectivity(lacking, text)[0].item() == pytest.approx((1 / 45 + 10 / 45) / 2)


def test_what_a_runs_folder_says(tmp_path):
    as_text = lambda token: f"<{token}>"
    assert features.about_run(tmp_path, as_text)["run"].endswith(tmp_path.name) and len(features.about_run(tmp_path, as_text)) == 1
    assert features.about_run(u.ROOT / "runs" / "demo one", as_text)["run"] == "demo one"
    effect = {"places": 16, "kl": 0.5, "falls": [[3, -0.25]], "rises": []}
    storing.write_json(tmp_path / "metrics.json", {"fvu": 0.01234, "l0": 7.0, "rows": 1234, "ce_recovered": None, "fidelity": {"sae": {"ce_increase": [0.1, -0.02, 0.3]}}, "effects": {"7": effect, "8": effect | {"kl": None}}})
    lines = ["variable,value,hidden,latent,threshold,f1_trained,f1_pca", "colour,red,True,7,0.25,0.5,0.9", "colour,blue,False,7,0.5,0.75,0.9", "food,any,True,2,0.1,0.4,0.1"]
    (tmp_path / "known.csv").write_text("\n".join(lines) + "\n")
    about = features.about_run(tmp_path, as_text)
    assert [figure[:2] for figure in about["figures"]] == [["fvu", "0.0123"], ["l0", "7.0"], ["rows", "1,234"], ["CE increase", "+0.1000 (-0.0200 to +0.3000)"]]
    assert about["rows"] == 1234 and about["effects"] == {"7": effect | {"falls": [["<3>", -0.25]]}}
    assert about["known"] == {"7": [["colour", "blue", False, 0.75, 0.5], ["colour", "red", True, 0.5, 0.25]], "2": [["food", "any", True, 0.4, 0.1]]}


@pytest.mark.parametrize("run", ["demo", "my run", "it's"])
def test_the_command_of_a_latent_is_what_make_patch_takes(run):
    """What a shell makes of it: RUN, and P, which a shell takes apart again, as papermill's flags."""
    make, patch, name, flags = shlex.split(features.patch_command(run).replace("{latent}", "12"))
    assert (make, patch, name) == ("make", "patch", f"RUN={run}") and flags.startswith("P=")
    flag, text = shlex.split(flags[2:])
    params = experiment.check_params("patch_neurons", yaml.safe_load(text))
    assert flag == "-y" and params["latents"] == [12] and params["name"] == "latent-12"


def test_the_words_a_latent_fires_on_by_hand():
    """A token that goes on with a character stands as that one and ‹; what began before the piece does not."""
    words = ["", " a", "☃", "b"]  # 0: no token, and what goes on with a character
    text, starts = np.array([1, 2, 0, 0, 3, 0, 3, 1]), np.array([0, 5, 8])
    places = np.array([[2, 3, 1, 4], [6, 7, 4, 6], [5, -1, -1, -1], [-1, -1, -1, -1]])
    found = features.firing(text, starts, places, words, none=99, n=3)
    assert words[4:] == ["☃‹"] and found.tolist() == [[4, 2, 3], [3, 1, 99], [0, 99, 99], [99, 99, 99]]


def test_kinds_that_a_latent_mostly_fires_on():
    found = {
        "fired_tokens_share": torch.tensor([[0.95, 0.05], [0.5, 0.4]]), "fired_positions": torch.tensor([[0.1, 0.1, 0.8], [0.5, 0.45, 0.05]]),
        "fired_classes": torch.tensor([[0.0, 0.95, 0.0, 1.0, 0.0], [0.91, 0.1, 0.2, 0.3, 0.9]]), "base_classes": torch.tensor([0.1, 0.2, 0.1, 0.6, 0.44]),
    }  # fmt: skip
    mostly = {kind: which.tolist() for kind, which in features.mostly_on(found).items()}
    neither = dict.fromkeys(("class: punctuation", "class: in a word"), [False, False])
    of_second = dict.fromkeys(("the first two positions", "class: digit"), [False, True])
    assert mostly == dict.fromkeys(("one token", "class: capital"), [True, False]) | of_second | neither


def test_places_at_equal_steps():
    drawn = torch.full((3, 256), -1)
    drawn[0], drawn[1, :3] = torch.arange(256), torch.tensor([7, 9, 8])
    places = lambda latent, n: features.evenly_drawn({"drawn_rows": drawn}, latent, n).tolist()
    assert places(0, 4) == [0, 85, 170, 255] and places(1, 16) == [7, 9, 8] and places(1, 2) == [7, 8] and places(2, 16) == []


def test_what_is_kept_is_read_back(tmp_path):
    found = {"density": torch.rand(4), "tokens": torch.zeros(4, 2, dtype=torch.int32), "drawn_rows": torch.zeros(4, 256)}
    kept, back = features.save(tmp_path / "features.npz", found), np.load(tmp_path / "features.npz")
    assert set(kept) == set(back) - {"digest"} == {"density", "tokens"} and all(np.array_equal(kept[name], back[name]) and back[name].dtype == kept[name].dtype for name in kept)


def test_classes_beside_their_members():
    facts = [{"variable": v, "value": value} for v in ("colour", "food", "day", "pair") for value in ("any", "x", "y", "z", "w")][:-2]  # "pair" has two members
    f1 = torch.tensor([0.3, 0.9, 0.8, 0.7, 0.1] + [0.9, 0.1, 0.2, 0.1, 0.2] + [0.9, 1.0, 1.0, 1.0, 1.0] + [0.9, 1.0, 1.0])
    best = {"f1": f1, "column": torch.tensor([9, 1, 2, 2, 4] + list(range(13))), "threshold": torch.rand(18)}
    hidden = torch.ones(18, dtype=torch.bool)
    hidden[4] = hidden[10] = False  # colour's last member shows; so does the class of days
    (split,) = features.splits(facts, hidden, best)
    assert split["variable"] == "colour" and split["class_f1"] == pytest.approx(0.3) and split["members_f1"] == pytest.approx(0.8) and (split["members"], split["latents"]) == (3, 2)
    lines = features.matches(facts, hidden, {"trained": best, "kmeans": best})
    assert len(lines) == 18 and lines[0] | {"threshold": 0} == {"variable": "colour", "value": "any", "hidden": True, "latent": 9, "threshold": 0, "f1_trained": 0.3, "f1_kmeans": 0.3}
    assert not lines[4]["hidden"] and [line["latent"] for line in lines[:3]] == [9, 1, 2]
