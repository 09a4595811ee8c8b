"""Contexts against a brute-force search, token effects against finite differences, the page against hostile tokens."""

import base64
import gzip
import json
import re

import numpy as np
import pytest
import torch
from conftest import HOOK, gemma, gpt2, loaded_params, word_tokenizer

import features
import harvest
import sae_utils as u


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
    assert (found["top_rows"][5] == -1).all() and (found["decile_rows"][5] == -1).all()


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
def test_token_effects_against_finite_differences(family, fresh_seed):
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

    for latent in range(20):
        step = 1e-2 * sae.W_dec[latent].double()
        slope = (logits(step) - logits(-step)) / 2e-2  # Gemma's norms compute in float32, so the step is not too small
        mine = torch.zeros(24, dtype=torch.double)
        mine[found["promoted"][latent].long()] = found["promoted_by"][latent].double()
        torch.testing.assert_close(mine, slope, rtol=0, atol=3e-3 * slope.abs().max().item())
        assert found["promoted"][latent].tolist() == found["suppressed"][latent].flip(0).tolist()


HOSTILE = ["<script>alert(1)</script>", "</script><b>", "<!--", '"quoted"', "'", "$x$", "\\", "日本", "🙂", "\x00\x1b", "\n", "\u2028", "&lt;", "plain"]


def page_data(path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL).group(1))


def hostile_page(tmp_path, d_sae=30):
    generator = torch.Generator().manual_seed(0)
    shape = (d_sae, features.TOP + 10, 2 * features.AROUND + 1)
    tokens = torch.randint(len(HOSTILE), shape, generator=generator, dtype=torch.int32)
    tokens[:, :, 0] = -1
    found = {"tokens": tokens, "acts": torch.rand(shape, generator=generator).half()}
    for name in ("promoted", "suppressed"):
        found[name] = torch.randint(len(HOSTILE), (d_sae, 10), generator=generator, dtype=torch.int32)
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
    assert text.count("<script") == 2 and "A page &amp; &lt;its&gt; title" in text
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", text)  # nothing is fetched
    data = page_data(path)
    assert set(data["words"]) == {"", *HOSTILE} and data["labels"] == {"7": "<i>label</i>"} and data["n"] == 29
    unpack = lambda name, kind: np.frombuffer(gzip.decompress(base64.b64decode(data[name])), kind)
    live = [i for i in range(30) if i != 3]
    assert unpack("latents", np.uint32).tolist() == live
    words = np.array(data["words"], dtype=object)[unpack("tokens", np.uint16)].reshape(29, 20, 17)
    assert words[4, 5, 6] == HOSTILE[found["tokens"][live[4], 5, 6]] and words[0, 0, 0] == ""
    shades = unpack("shades", np.uint8).reshape(29, 20, 17)
    np.testing.assert_allclose(shades[8, 2, 3], 255 * found["acts"][live[8], 2, 3].item(), atol=0.51)


def test_labels_are_read_and_a_wrong_line_is_named(tmp_path):
    file = tmp_path / "labels.csv"
    assert features.read_labels(file) == {}
    file.write_text('latent,name\n3,colours\n\n17,"says, next: red"\n')
    assert features.read_labels(file) == {3: "colours", 17: "says, next: red"}
    file.write_text("3,colours\nseven,x\n")
    with pytest.raises(u.UserError, match="labels.csv, line 2: a line is a latent's number"):
        features.read_labels(file)
