"""A sentence of one's own: what fires on it, by hand and against the model; and the panel, driven as somebody at it would."""

import contextlib
import io
import re

import numpy as np
import pytest
import torch
from conftest import HOOK, WORDS

import editing
import features
import looking
import patching
import sae_utils as u
import showing


@pytest.fixture
def kept(tokenizer):
    """What features.npz holds of 48 latents, as far as it is asked here: latent i fires on token i (modulo the words) and promotes the next."""
    ids = (np.arange(48) % len(WORDS) + 4)[:, None]
    fired, promoted = np.concatenate([ids, np.full((48, 4), -1)], 1), np.concatenate([ids % 24, (ids + 1) % 24], 1)
    share = np.concatenate([np.linspace(0.5, 1, 48)[:, None], np.zeros((48, 4))], 1)
    return {"fired_tokens": fired, "fired_tokens_share": share, "promoted": promoted, "promoted_by": np.full((48, 2), 0.5), "density": np.full(48, 0.25)}


def test_what_fires_by_hand():
    acts = torch.tensor([[0.0, 2.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.25, 0.0]])
    lines = looking.fires(acts, torch.tensor([8.0, 1.0, 0.0, 1.0]), n=2)
    assert lines == [[{"latent": 1, "act": 2.0, "share": 2.0}, {"latent": 2, "act": 1.0, "share": None}], [], [{"latent": 0, "act": 4.0, "share": 0.5}, {"latent": 2, "act": 0.25, "share": None}]]


def test_a_sentence_is_that_of_the_model_and_the_sae(model, tokenizer, sae, kept):
    text = "the cat sees a red dog ."
    found = looking.look(model, tokenizer, HOOK, sae, text, kept, {}, n=48)
    ids = u.with_bos(tokenizer, tokenizer(text)["input_ids"])
    x = u.run_to_hook(model, HOOK, torch.tensor([ids]), None)[0].double()
    unit = (x - sae.mean.double()) / (x - sae.mean.double()).norm(dim=1, keepdim=True)
    acts = (unit @ sae.W_enc.double() + sae.b_enc.double()).relu()
    assert [line["token"].strip() for line in found] == text.split()
    for line, row in zip(found, acts[1:], strict=True):
        assert line["in_all"] == int((row > 0).sum()) == len(line["latents"])
        for latent in line["latents"]:
            assert latent["act"] == pytest.approx(row[latent["latent"]].item(), rel=1e-4, abs=1e-5)
        assert [latent["act"] for latent in line["latents"]] == sorted((latent["act"] for latent in line["latents"]), reverse=True)
    few = looking.look(model, tokenizer, HOOK, sae, text, kept, {}, n=3)
    assert [line["in_all"] for line in few] == [line["in_all"] for line in found] and [line["latents"] for line in few] == [line["latents"][:3] for line in found]
    first = found[0]["latents"][0]["latent"]
    assert found[0]["latents"][0]["about"] == looking.about(first, kept, {}, showing.TokenText(tokenizer)) != "mine"
    assert looking.look(model, tokenizer, HOOK, sae, text, kept, {first: "mine"})[0]["latents"][0]["about"] == "mine"


@pytest.mark.parametrize(("text", "message"), [("  ", "there is no text to look at"), ("cat " * 200, "sentence 1 .*the model has 128 positions"), ("猫 zebra", "sentence 1 holds no text: this tokenizer has no token for anything in it")])
def test_what_cannot_be_looked_at(model, tokenizer, sae, kept, text, message):
    with pytest.raises(u.UserError, match=message):
        looking.look(model, tokenizer, HOOK, sae, text, kept, {})


def test_the_table_links_into_the_page_and_hides_nothing_in_names(tmp_path):
    evil = '<script>alert("x")</script>'
    found = [{"token": evil, "in_all": 3, "latents": [{"latent": 17, "act": 1.5, "share": 0.5, "about": evil}]}, {"token": " b", "in_all": 0, "latents": []}]
    looking.write_page(tmp_path / "a.html", evil, evil, found, "../features.html")
    page = (tmp_path / "a.html").read_text()
    assert "<script" not in page and page.count('href="../features.html#17"') == 1 and "50% of its maximum" in page and "0 fire" in page
    assert page.count("255,140,0,1.00") == 1 and page.count("255,140,0,0.00") == 1  # by the strongest of the whole sentence
    unseen = [{"token": "a", "in_all": 1, "latents": [{"latent": 5, "act": 1.5, "share": None, "about": "b"}, {"latent": 6, "act": 0.5, "share": 0.0, "about": "b"}]}]
    table = looking.as_table(unseen, "p.html")
    assert "p.html#5" not in table and "p.html#6" in table and "0% of its maximum" in table  # the page has no latent that never fired
    lines = looking.as_lines(found).splitlines()
    assert lines[0].split()[-4:-1] != lines[1].split() and "17" in lines[0] and "1.50" in lines[0] and lines[1].endswith("nothing fires")


def test_latents_are_found_by_number_name_and_token(tokenizer, kept):
    as_text = showing.TokenText(tokenizer)
    find = lambda words, names=None: looking.find(words, 48, kept, names or {}, as_text)
    cats = [i for i in range(48) if as_text(int(kept["fired_tokens"][i, 0])).strip() == "cat"]
    before = [i for i in range(48) if as_text(int(kept["promoted"][i, 1])).strip() == "cat"]
    assert find("3, 17 3") == [3, 17] and find("cat") == [*reversed(cats), *before] and find("CAT", {40: "about Cats"})[0] == 40
    everything = looking.find("e", 48, kept, {}, as_text)
    assert len(everything) == 12 and len(looking.find("e", 48, kept, {}, as_text, most=3)) == 3
    assert looking.about(7, kept | {"density": np.zeros(48)}, {}, as_text).startswith("never fired on held-out text")
    assert [looking.numbers(words) for words in ("3, 17 3", "²", "1²", "-1", "", "3 a", "1" * 30)] == [[3, 17], [], [], [], [], [], []]
    kept["density"][cats[-1]] = 0  # dead
    assert find("cat") == [*reversed(cats[:-1]), *before]
    for words, message in (("48", "48"), ("zebra", "holds 'zebra'"), ("  ", "name latents")):
        with pytest.raises(u.UserError, match=message):
            find(words)


@pytest.mark.parametrize("operation", looking.OPERATIONS)
def test_an_edit_is_the_same_in_the_panel_in_python_and_in_a_file(tmp_path, model, tokenizer, sae, operation):
    sae.max_act[:] = torch.rand(48) + 1
    edit, prompt = looking.edit_of([5, 9], operation, 6.0, "all"), "the cat sees"
    found = looking.tried(model, tokenizer, HOOK, sae, prompt, edit, 8)
    (tmp_path / "edit.yaml").write_text(looking.as_yaml(edit))
    assert patching.read_edits(tmp_path / "edit.yaml") == [edit]
    said, names = io.StringIO(), {"patching": patching, "editing": editing, "tokenizer": tokenizer, "model": model, "sae": sae, "hook_name": HOOK, "as_text": showing.TokenText(tokenizer)}
    with contextlib.redirect_stdout(said):
        exec(looking.as_python(edit, prompt, 8), names)
    ids = [u.with_bos(tokenizer, tokenizer(prompt)["input_ids"])]
    with editing.intervene(model, HOOK, sae, tokenizer, patching.patches([edit], sae, tokenizer)):
        expected = editing.generate(model, tokenizer, ids, 8)
    assert said.getvalue().rstrip("\n") == showing.TokenText(tokenizer)(expected[0])
    assert [piece["text"] for piece in found["patched"]] == [showing.TokenText(tokenizer)(t) for t in expected[0]]
    original = editing.generate(model, tokenizer, ids, 8)
    before, after = editing.next_logprobs(model, ids)[0], None
    with editing.intervene(model, HOOK, sae, tokenizer, patching.patches([edit], sae, tokenizer)):
        after = editing.next_logprobs(model, ids)[0]
    of = {u_token: i for i in range(24) if (u_token := showing.TokenText(tokenizer)(i))}
    special = set(u.special_ids(tokenizer))  # what is written may hold BOS, where nothing is edited
    assert found["positions"] == 3 + sum(token not in special for token in expected[0][:7])  # the prompt, and what was written but for the last
    assert all(move["change"] == pytest.approx((after - before)[of[move["token"]]].item(), abs=1e-5) for move in found["moves"])
    assert found["surprise"][1] == (pytest.approx(editing.surprise(model, ids, expected)) if expected[0] else None)
    assert found["same"] == (original == expected) and found["surprise"][0] == (pytest.approx(editing.surprise(model, ids, original)) if original[0] else None)


def test_what_differs_is_marked_and_nothing_else():
    piece = lambda text, differs: {"text": text, "differs": differs}
    found = {"prompt": "<p>", "original": [piece("a", False), piece("b", False)], "patched": [piece("a", False), piece("<c>", True), piece("d", False)], "same": False}
    page = looking.side_by_side(found | {"moves": [{"token": "x", "change": -0.5}], "positions": 7, "surprise": [1.0, 2.5]})
    marked = re.findall(r"<span style=[^>]*>(.*?)</span>", page)
    assert marked == ["&lt;c&gt;"] and "The text is the same" not in page and "'x'" in page.replace("&#x27;", "'") and "-0.50" in page and "at 7 positions" in page
    assert page.index("1.00 nats") < page.index("patched") < page.index("2.50 nats") and "&lt;p&gt;" in page


def test_an_edit_of_nothing_changes_nothing(model, tokenizer, sae):
    found = looking.tried(model, tokenizer, HOOK, sae, "the cat sees", looking.edit_of([5], "amplify", 1.0, "all"), 8)
    assert found["same"] and not found["moves"] and "The text is the same" in looking.side_by_side(found)


def test_the_panel_renews_itself_and_says_what_is_wrong(model, tokenizer, sae, kept):
    sae.max_act[:] = 2.0
    box = looking.panel(model, tokenizer, HOOK, sae, kept, {7: "<b>mine</b>"}, "the cat sees", [3], max_new_tokens=6)
    (latents, operation), (dose, scope), prompt, told, shown, code, edits = box.children[0].children, box.children[1].children, *box.children[2:]
    assert told.value.startswith("3: on ") and "original" in shown.value and "<bos>" not in shown.value and "'latents': [3], 'operation': 'set_value', 'strength': 4.0, 'scope': 'all'" in code.value
    before = shown.value
    dose.value = 9.0
    assert "strength: 9.0" in edits.value and shown.value != before
    latents.value = "3 5"
    assert "latents: [3, 5]" in edits.value and "found by search" not in told.value
    latents.value = "mine"
    assert "&lt;b&gt;mine" in told.value and "latents: [7]" in edits.value and "found by search" in told.value
    operation.value = "ablate"
    assert "strength" not in edits.value
    scope.value = "generated"
    prompt.value = "a <i>dog"
    assert "scope: generated" in edits.value and "&lt;i&gt;" not in told.value and re.search(r"a (&lt;|<unk>|&)", shown.value)
    for field, value, message in ((latents, "999", "999"), (latents, "²", "²"), (prompt, "", "holds no text"), (prompt, "cat " * 200, "128 positions")):
        kept_value, field.value = field.value, value
        assert told.value.startswith("<b>") and message in told.value and shown.value == code.value == edits.value == ""
        field.value = kept_value
        assert "original" in shown.value


def test_the_stepper_shows_a_latent_and_keeps_its_name(tmp_path):
    path, labels = tmp_path / "labels.csv", {3: "three"}
    path.write_text("3,three\n")
    box = looking.stepper(lambda latent: f"card of {latent}, {labels.get(latent)}", labels, path, 3, 48)
    (number, name), view = box.children[0].children, box.children[1]
    assert (number.value, number.max, name.value, view.value) == (3, 47, "three", "card of 3, three")
    number.value = 7
    assert (name.value, view.value) == ("", "card of 7, None") and path.read_text() == "3,three\n"
    name.value = " seven "
    assert labels == {3: "three", 7: "seven"} == features.read_labels(path) and view.value == "card of 7, seven"
    number.value = 3
    assert name.value == "three"
    name.value = ""
    assert labels == {7: "seven"} == features.read_labels(path)
    path.write_text("7;seven\n")
    name.value = "x"
    assert "line 1" in view.value and path.read_text() == "7;seven\n" and labels == {7: "seven"}
