"""Attribution against one ablation at a time and against autograd's limit, texts given, edits from files, controls
and what is said of them against values worked out by hand."""

import math
import re

import pytest
import torch
from conftest import HOOK, gemma, gpt2, word_tokenizer

import choosing
import editing
import patching
import sae_utils as u


def by_hand(model, hook, sae, prompt, token, latent, amount=1.0):
    """Log-probability of the token with `amount` of the latent taken away at all but BOS, in float64 at the end."""

    def off(module, args, out):
        x = out[0, 1:]
        norm = (x - sae.mean).norm(dim=1, keepdim=True)
        return torch.cat([out[0, :1], x - amount * sae.encode(x)[:, latent, None].to(x) * sae.W_dec[latent].to(x) * norm.to(x)])[None]

    handle = model.get_submodule(hook).register_forward_hook(off)
    result = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)[token].item()
    handle.remove()
    return result


@pytest.fixture(params=["gemma", "gpt2"])
def case(request, sae):
    model, hook = (gemma(), HOOK) if request.param == "gemma" else (gpt2(), "transformer.h.1.mlp.c_proj")
    prompt = [3, *torch.randint(4, 24, (9,)).tolist()]
    return model, hook, word_tokenizer(), sae, prompt, int(torch.randint(4, 24, ()))


def test_ablation_effects_are_those_of_one_at_a_time(case):
    model, hook, tokenizer, sae, prompt, token = case
    latents = torch.randperm(48)[:40].tolist()  # more than one batch
    got = patching.ablation_effects(model, tokenizer, hook, sae, prompt, token, latents)
    clean = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)[token].item()
    expected = [by_hand(model, hook, sae, prompt, token, latent) - clean for latent in latents]
    assert got.tolist() == pytest.approx(expected, abs=2e-4) and got.abs().max() > 1e-3
    assert patching.ablation_effects(model, tokenizer, hook, sae, prompt, token, []).tolist() == []


def test_gradient_effects_are_the_slope_of_an_ablation(case):
    model, hook, tokenizer, sae, prompt, token = case
    got = patching.gradient_effects(model, tokenizer, hook, sae, prompt, token)
    model = model.double()
    for latent in range(0, 48, 3):
        slope = (by_hand(model, hook, sae, prompt, token, latent, 0.01) - by_hand(model, hook, sae, prompt, token, latent, -0.01)) / 0.02
        assert got[latent].item() == pytest.approx(slope, abs=2e-2 * got.abs().max().item())
    assert not any(p.requires_grad for p in model.parameters())


def test_text_acts_leave_bos_out(case):
    model, hook, tokenizer, sae, prompt, _ = case
    acts = patching.text_acts(model, tokenizer, hook, sae, prompt)
    x = u.run_to_hook(model, hook, torch.tensor([prompt]), None)[0]
    torch.testing.assert_close(acts[1:], sae.encode(x[1:]), rtol=1e-4, atol=1e-5)
    assert not acts[0].any()


def test_rank_correlation_by_hand():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert patching.rank_correlation(a, a.exp()) == pytest.approx(1) and patching.rank_correlation(a, -(a**3)) == pytest.approx(-1)
    assert patching.rank_correlation(a, torch.tensor([2.0, 1, 4, 3, 5])) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # ties share their mean rank: 1.5, 1.5, 3 against 1, 2, 3
    assert patching.rank_correlation(torch.tensor([0.0, 0, 7]), torch.tensor([1.0, 2, 3])) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)


def test_texts_given_are_scored_token_by_token(case):
    model, hook, tokenizer, sae, prompt, _ = case
    prompts, more = [prompt, prompt[:4]], [[5, 6, 7], [8, 9, 10, 11]]
    got = editing.logprobs_of(model, prompts, more)
    total = 0.0
    for i in range(2):
        for t in range(len(more[i])):
            expected = model(torch.tensor([prompts[i] + more[i][:t]])).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(got[i][t], expected, rtol=1e-4, atol=1e-4)
            total -= expected[more[i][t]].item()
    assert editing.surprise(model, prompts, more) == pytest.approx(total / 7, rel=1e-4)
    assert editing.surprise(model, prompts, [[], []]) == 0.0


def test_a_patch_knows_where_given_texts_begin(case, monkeypatch):
    """Scope "last" lands on the prompt's last token, whether the text is being written or given."""
    model, hook, tokenizer, sae, prompt, _ = case
    prompts, patch = [prompt, prompt[:4]], editing.set_value([6], 30.0)
    with editing.intervene(model, hook, sae, tokenizer, patch, scope="last"):
        texts = editing.generate(model, tokenizer, prompts, 5)
        first = editing.next_logprobs(model, prompts)
    if not all(texts):
        texts = [text or [5] for text in texts]
    monkeypatch.setattr(editing, "batches", lambda windows, model, **sizes: ([window] for window in windows))  # each batch has its own lengths
    with editing.intervene(model, hook, sae, tokenizer, patch, scope="last"):
        given = editing.logprobs_of(model, prompts, texts)
    torch.testing.assert_close(torch.stack([g[0] for g in given]), first, rtol=1e-3, atol=1e-3)


EDITS = """
edits:
  - {latents: [3, 5], operation: set_value, strength: 2.0, scope: last}
  - {latents: [7], operation: clamp, low: 0.0, high: 0.25, unit: acts}
  - {latents: [9], operation: ablate, scope: {tokens: [cat, dog]}}
"""


def test_edits_are_read_in_order(tmp_path, sae, tokenizer):
    file = tmp_path / "edits.yaml"
    file.write_text(EDITS)
    sae.max_act.uniform_(1, 2)
    edits = patching.read_edits(file)
    pairs = patching.patches(edits, sae, tokenizer)
    acts = torch.rand(2, 48) + 0.5
    assert [scope for _, scope in pairs[:2]] == ["last", "all"] and edits[2]["operation"] == "ablate"
    torch.testing.assert_close(pairs[0][0](acts)[:, [3, 5]], (2 * sae.max_act[[3, 5]]).expand(2, 2))
    assert (pairs[1][0](acts)[:, 7] == 0.25).all() and (pairs[2][0](acts)[:, 9] == 0).all()
    ids = torch.tensor([tokenizer.encode("cat the dog", add_special_tokens=False)])
    assert pairs[2][1](ids).tolist() == [[True, False, True]]
    assert torch.equal(patching.dosed(pairs, 0.0)[0][0](acts), acts) and torch.equal(patching.dosed(pairs, 1.0)[2][0](acts), pairs[2][0](acts))
    control = patching.patches(edits, sae, tokenizer, {5: 40, 9: 2})
    torch.testing.assert_close(control[0][0](acts)[:, [3, 40]], (2 * sae.max_act[[3, 5]]).expand(2, 2))  # pushed as hard as 5 was
    assert control[0][0].ids == [3, 40] and control[2][0].ids == [2] and control[1][0].ids == [7]


def test_words_of_a_scope_are_as_they_were_typed_and_numbers_are_numbers(tmp_path):
    file = tmp_path / "edits.yaml"
    file.write_text("edits:\n  - {latents: [3], operation: add, strength: 1e-4, scope: {tokens: [no, 007, 12:30, 1e3, ' on', null]}}\n  - {latents: [4], operation: ablate, scope: [-1, 3]}\n")
    first, second = patching.read_edits(file)
    assert first == {"latents": [3], "operation": "add", "strength": 1e-4, "scope": {"tokens": ["no", "007", "12:30", "1e3", " on", "null"]}} and second["scope"] == [-1, 3]


def test_controls_are_live_alike_and_none_twice(sae, fresh_seed):
    sae.density = torch.rand(48)
    sae.density[:10], sae.density[[20, 30]] = 0, torch.tensor([0.3, 0.5])  # of which there are others alike, whatever is drawn
    edited = [20, 30]
    found = patching.matched(sae, edited, [25], 12, fresh_seed)
    assert len(found) == 12 and len({str(control) for control in found}) == 12
    for control in found:
        assert set(control) == set(edited) and len(set(control.values())) == 2 and not set(control.values()) & {20, 30, 25}
        for latent, other in control.items():
            assert sae.density[other] > 0 and sae.density[latent] / 3 <= sae.density[other] <= 3 * sae.density[latent]
    sae.density = torch.zeros(48)
    sae.density[[4, 5]] = 0.5
    assert patching.matched(sae, [4], [], 5, 0) == [{4: 5}] and patching.matched(sae, [4], [5], 5, 0) == []


@pytest.mark.parametrize(("text", "message"), [
    ("edits: []", "one list"), ("- 1", "one list"), ("edits: {", "edits.yaml, line 1"), ("edits: []\nedits: []", "twice"), ("edits: [{operation: ablate}]", "an edit has latents"),
    ("edits: [{latents: [1], operation: ablate, streng: 2}]", "an edit has latents"), ("edits: [{latents: [99], operation: ablate}]", "valid latents are 0 to 47"),
    ("edits: [{latents: [1], operation: boost}]", "operation is one of"), ("edits: [{latents: [1], operation: amplify, strength: .nan}]", "a finite number"),
    ("edits: [{latents: [1], operation: amplify, strength: 4e38}]", "a finite number"), ("edits: [{latents: [010], operation: ablate}]", "a list of numbers"), ("edits: [{latents: [1], operation: ablate, scope: nowhere}]", "scope is all"),
    ("edits: [{latents: [1], operation: ablate, scope: {tokens: [a cat]}}]", "is 2 tokens"), ("edits: [{latents: 1, operation: ablate}]", "a list of numbers"),
])  # fmt: skip
def test_wrong_edits_are_told(tmp_path, sae, tokenizer, text, message):
    file = tmp_path / "edits.yaml"
    file.write_text(text)
    with pytest.raises(u.UserError, match=message):
        patching.patches(patching.read_edits(file), sae, tokenizer)
    with pytest.raises(u.UserError, match="no such file"):
        patching.read_edits(tmp_path / "none.yaml")


def test_prompts_that_choose_are_not_those_that_try():
    patching.check_pilot(["Say  something.", "Go on."], ["Say nothing."], ["war"])
    patching.check_pilot([], ["a"], [])
    for pilot, prompts, topic, message in (
        (["Go  on.\n"], ["x", "Go on."], ["war"], "'Go on.' is among pilot_prompts and prompts"), (["Go on."], [], [], "name topic_words"),
        (["a", 5], [], ["war"], "pilot prompt 2 is a text, not 5"), (["a \ud800"], [], ["war"], "pilot prompt 1 holds half of a character"),
    ):  # fmt: skip
        with pytest.raises(u.UserError, match=message):
            patching.check_pilot(pilot, prompts, topic)


def test_prompts_from_a_file_and_wrong_ones(tmp_path, tokenizer, model):
    (tmp_path / "p.txt").write_text("the cat\n\na dog\n")
    (tmp_path / "p.jsonl").write_text('"the\\ncat"\n')
    assert patching.read_prompts(["red"], str(tmp_path / "p.txt")) == ["red", "the cat", "a dog"]
    assert patching.read_prompts([], str(tmp_path / "p.jsonl")) == ["the\ncat"]
    for name, content, message in (("empty.txt", "\n", "holds no prompt"), ("bad.jsonl", "the", "line 1: it is no JSON"), ("number.jsonl", "3", "prompt 1 is a text, not 3")):
        (tmp_path / name).write_text(content)
        with pytest.raises(u.UserError, match=message):
            patching.read_prompts([], str(tmp_path / name))
    with pytest.raises(u.UserError, match="no such file"):
        patching.read_prompts([], "nowhere.txt")
    prompts = patching.encode_prompts(tokenizer, ["the cat", "<bos> the cat"], chat=False)
    assert prompts[0] == prompts[1] and prompts[0].count(3) == 1
    with pytest.raises(u.UserError, match="no chat template"):
        patching.encode_prompts(tokenizer, ["x"], chat=True)
    patching.check_prompts(model, tokenizer, prompts, 10)
    with pytest.raises(u.UserError, match="prompt 2 holds no text"):
        patching.check_prompts(model, tokenizer, [prompts[0], [3]], 10)
    with pytest.raises(u.UserError, match="the model has 128 positions"):
        patching.check_prompts(model, tokenizer, prompts, 126)


def test_chats_are_the_users_turn_with_one_bos():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "<bos>{% for m in messages %} there {{ m.content }} .{% endfor %}{% if add_generation_prompt %} here{% endif %}"
    assert tokenizer.decode(patching.encode_prompts(tokenizer, ["the cat"], chat=True)[0]) == "<bos> there the cat . here"


class Spaced:
    """As TokenText of a tokenizer whose token 2 i is " a", " b", …, and 2 i + 1 the same letter inside a word."""

    def __call__(self, tokens):
        if not isinstance(tokens, int):
            return "".join(map(self, tokens))
        return (" " if tokens % 2 == 0 else "") + chr(97 + tokens // 2)


# Controls


def test_activity_is_summed_over_the_places_that_are_edited(case):
    model, hook, tokenizer, sae, prompt, _ = case
    prompts, texts = [prompt, prompt[:5]], [[7, 8, 9], [6]]
    got = patching.acts_where(model, tokenizer, hook, sae, prompts, texts, ["last", "all", "generated", [2]])
    acts = [sae.encode(u.run_to_hook(model, hook, torch.tensor([p + t[:-1]]), None)[0]).double() for p, t in zip(prompts, texts, strict=True)]
    expected = [acts[0][9] + acts[1][4], acts[0][1:].sum(0) + acts[1][1:].sum(0), acts[0][10:].sum(0), acts[0][2] + acts[1][2]]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_which_edits_do_nothing_to_a_silent_latent():
    for edit, expected in (
        ({"operation": "ablate"}, True), ({"operation": "amplify", "strength": 3.0}, True), ({"operation": "set_value", "strength": 2.0}, False),
        ({"operation": "set_value", "strength": 0.0}, True), ({"operation": "add", "strength": 0.5}, False), ({"operation": "clamp", "low": 0.0, "high": 0.2}, True),
        ({"operation": "clamp", "low": 0.1, "high": 0.2, "unit": "acts"}, False),
    ):  # fmt: skip
        assert patching.needs_activity({"latents": [40], "scope": "last", **edit}) == expected, edit
    ablate, add, amplify = ({"latents": [1, 2], "operation": "ablate"}, {"latents": [3], "operation": "add"}, {"latents": [2, 4], "operation": "amplify", "strength": 0.5})
    found = patching.activity_at_edits([ablate, add, amplify], [10, 20, 30])
    assert found == {1: 10, 2: 10, 4: 30}
    assert patching.lowers([ablate, amplify]) and not patching.lowers([ablate, add]) and not patching.lowers([{**amplify, "strength": 2.0}])


def test_what_is_taken_away_is_compared_with_as_much_of_what_is_there(sae, fresh_seed):
    sae.density = torch.rand(48)
    active = torch.zeros(48, dtype=torch.float64)
    active[:30] = torch.rand(30) * 2 + 0.9  # all within a factor of three of each other
    found = patching.matched(sae, [5, 6], [7], 12, fresh_seed, {5: active, 6: active})
    assert len(found) == 12 and len({str(control) for control in found}) == 12
    for control in found:
        others = patching.latents_of(control)
        assert set(control) == {5, 6} and len(set(others)) == 2 and not set(others) & {5, 6, 7} and max(others) < 30
        assert all(active[i] / 3 <= active[other] <= active[i] * 3 for i, other in control.items())
    assert patching.matched_by([5, 6], {5: active, 6: active}) == "activity" and patching.matched_by([5, 40], {5: active, 40: active}) == "both" and patching.matched_by([5], {}) == "density"
    # nothing else is as active: several together
    active[5] = 20.0
    groups = patching.matched(sae, [5], [7], 12, fresh_seed, {5: active})
    assert len(groups) == 12 and len({str(group) for group in groups}) == 12
    for group in groups:
        others = patching.latents_of(group)
        assert len(others) > 2 and len(set(others)) == len(others) and not {5, 7} & set(others) and active[others].min() > 0
        assert 20 / 3 <= active[others].sum() <= 60
    active[:] = 0
    active[[5, 8, 9]] = torch.tensor([20.0, 0.5, 90.0], dtype=torch.float64)  # one is far too much
    assert patching.matched(sae, [5], [7], 12, fresh_seed, {5: active}) == [{5: [8]}]
    # silent where it is edited: by density, as where it is set
    assert patching.matched(sae, [6], [7], 5, fresh_seed, {6: active}) == patching.matched(sae, [6], [7], 5, fresh_seed)


def test_a_control_that_takes_away_does_something(model, tokenizer, sae, fresh_seed):
    """The reason for all this: among latents of like density most are silent at a given place."""
    with torch.no_grad():
        sae.b_enc.sub_(0.2)
    sae.density = torch.full((48,), 0.1)
    prompts = [[3, *torch.randint(4, 24, (6,)).tolist()] for _ in range(3)]
    (active,) = patching.acts_where(model, tokenizer, HOOK, sae, prompts, [[]] * 3, ["last"])
    edited = [int(active.argmax())]
    before = editing.next_logprobs(model, prompts)

    def moved(controls):
        found = []
        for control in controls:
            with editing.intervene(model, HOOK, sae, tokenizer, editing.ablate(patching.latents_of(control)), scope="last"):
                found.append((editing.next_logprobs(model, prompts) - before).abs().max().item())
        return found

    assert (active > 0).sum() < 40
    assert min(moved(patching.matched(sae, edited, [], 8, fresh_seed, {edited[0]: active}))) > 1e-4
    assert 0.0 in moved(patching.matched(sae, edited, [], 47, fresh_seed))


def test_several_latents_stand_in_for_one(sae, tokenizer):
    sae.max_act.uniform_(1, 2)
    edits = [{"latents": [3, 5], "operation": "amplify", "strength": 0.5}, {"latents": [5], "operation": "set_value", "strength": 2.0}]
    pairs = patching.patches(edits, sae, tokenizer, {5: [40, 41], 3: 9})
    assert [patch.ids for patch, _ in pairs] == [[9, 40, 41], [40, 41]]
    acts = torch.rand(2, 48) + 0.5
    torch.testing.assert_close(pairs[1][0](acts)[:, [40, 41]], (2 * sae.max_act[[5, 5]]).expand(2, 2))
    assert patching.latents_of({5: [40, 41], 3: 9}) == [40, 41, 9]


# What the model's word hangs on


def test_the_gradients_choice_is_judged_on_others_too(case, fresh_seed):
    model, hook, tokenizer, sae, prompt, token = case
    found = patching.attribute(model, tokenizer, hook, sae, prompt, token, 10, 7, fresh_seed)
    slope = patching.gradient_effects(model, tokenizer, hook, sae, prompt, token)
    active = (patching.text_acts(model, tokenizer, hook, sae, prompt) > 0).any(0).nonzero().flatten().tolist()
    chosen, others = found["latents"].tolist(), found["others"].tolist()
    assert chosen == sorted(active, key=lambda i: -abs(slope[i]))[:10] and found["active"] == len(active)
    assert len(others) == len(set(others)) == 7 and set(others) <= set(active) - set(chosen)
    for name, latents in (("", chosen), ("others_", others)):
        exact = patching.ablation_effects(model, tokenizer, hook, sae, prompt, token, latents)
        torch.testing.assert_close(found[name + "exact"], exact)
        torch.testing.assert_close(found[name + "gradient"], slope[latents])
        assert found[name + "agreement"] == patching.agreement(exact, slope[latents])
    assert any(patching.attribute(model, tokenizer, hook, sae, prompt, token, 10, 7, fresh_seed + i)["others"].tolist() != others for i in (1, 2, 3))
    everything = patching.attribute(model, tokenizer, hook, sae, prompt, token, 99, 7, fresh_seed)
    assert len(everything["latents"]) == len(active) and len(everything["others"]) == 0 and everything["others_agreement"] is None


def test_agreements_by_hand():
    exact, slope = torch.tensor([-3.0, -2.0, 1.0, 1e-5, -2e-5]), torch.tensor([-1.0, -2.0, 5.0, 9.0, 8.0])
    assert patching.agreement(exact, slope) == pytest.approx(0.5)  # of the first three: ranks 1, 2, 3 and 2, 1, 3
    assert patching.agreement(exact[1:], slope[1:]) is None and patching.agreement(exact[:3], torch.ones(3)) is None
    empty = torch.zeros(0)
    prompts = [
        {"exact": exact, "gradient": slope, "agreement": 0.5, "others": torch.tensor([1, 2]), "others_exact": torch.tensor([0.25, -0.5]), "others_agreement": None},
        {"exact": exact, "gradient": exact, "agreement": 1.0, "others": empty, "others_exact": empty, "others_agreement": None},
        {"exact": empty, "gradient": empty, "agreement": None, "others": empty, "others_exact": empty, "others_agreement": 0.25},
    ]
    assert patching.agreements(prompts) == {
        "gradient_agreement": 0.75, "gradient_agreement_others": 0.25, "gradient_agrees_on_first": 1, "gradient_others": 2,
        "gradient_largest": 3.0, "gradient_others_largest": 0.5,
    }  # fmt: skip
    assert patching.agreements([])["gradient_agreement"] is None


# What is said of an edit


def test_hits_by_hand():
    before = torch.tensor([[0.01, 0.99], [0.06, 0.94], [0.01, 0.99], [0.9, 0.1], [0.6, 0.4]]).log()
    after = torch.tensor([[0.7, 0.3], [0.7, 0.3], [0.3, 0.7], [0.08, 0.92], [0.1, 0.9]]).log()
    # the second rises too little, the third is not the first choice: "cake" in place of "Greece" is no hit for "Peru"
    assert patching.hit(before, after, 0).tolist() == [True, True, False, False, False]
    assert patching.hit(before[1:2], torch.tensor([[0.55, 0.45]]).log(), 0).tolist() == [False]
    assert patching.hit(before, after, 0, lowers=True).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize(("edit", "controls", "lowers", "p", "stands_out", "says"), [
    (5.0, [1.0] * 19, False, 0.05, True, "none of 19"), (5.0, [1.0] * 19 + [5.0], False, 2 / 21, False, "1 of 20"), (5.0, [1.0] * 20, False, 1 / 21, True, "none of 20"),
    (5.0, [1.0], False, 0.5, False, "With 1 control no p below 0.500 can be had"), (-5.0, [1.0] * 20, True, 1 / 21, True, "none of 20"), (-5.0, [1.0] * 20, False, 1.0, False, "20 of 20"),
    (9.3, [7.3, -1.0] * 10, False, 1 / 21, True, "none of 20"), (-5.0, [-6.0, -4.0] * 10, True, 11 / 21, False, "10 of 20"), (5.0, [], False, 1.0, False, "no p below 1.000"), (5.0, [1.0] * 18, False, 1 / 19, False, "no p below 0.053"),
])  # fmt: skip
def test_an_edit_stands_out_or_it_does_not(edit, controls, lowers, p, stands_out, says):
    judged = patching.verdict(edit, controls, lowers)
    assert judged["p"] == pytest.approx(p) and judged["stands_out"] == stands_out and says in judged["says"]
    assert ("It stands out" in judged["says"]) == stands_out and ("does not stand out" in judged["says"]) != stands_out
    assert ("can be had" in judged["says"]) == (len(controls) < 19)


def test_a_topic_in_a_broken_text_does_not_stand_out():
    told = lambda cost, repeats=0.0: patching.verdict(0.9, [0.1] * 20, broken=patching.breaks(cost, repeats))
    assert told(1.0, 0.2)["stands_out"] and told(-0.3)["stands_out"] and "none of 20 moved the log-odds as far)." in told(1.0)["says"]
    assert not told(1.01)["stands_out"] and told(1.01)["p"] == pytest.approx(1 / 21) and not told(0.0, 0.21)["stands_out"]
    assert "It does not stand out" in told(2.5)["says"] and "as far; at a cost of 2.50 nats per token, which is more than 1)." in told(2.5)["says"]
    assert "as far; in a text that repeats itself: the share of tokens said before is 67 points larger, more than 20)." in told(-0.5, 2 / 3)["says"]


def test_one_word_over_and_over_costs_no_surprise_and_is_caught():
    """A model that has learnt to repeat: *war war war* surprises it less than what it wrote, and holds one word again and again."""
    own, collapsed = [[11, 12, 13, 14, 15, 16]], [[9, 9, 9, 9, 9, 9]]
    broken = patching.breaks(-0.4, choosing.repeated(collapsed) - choosing.repeated(own))
    assert len(broken) == 1 and not patching.verdict(5.0, [0.1] * 20, broken=broken)["stands_out"]


def test_an_edit_that_is_one_of_its_controls_rarely_stands_out(fresh_seed):
    arms = torch.randn(2000, 21)
    share = sum(patching.verdict(a[0].item(), a[1:].tolist())["stands_out"] for a in arms) / 2000
    assert share == pytest.approx(1 / 21, abs=5 * math.sqrt(1 / 21 * 20 / 21 / 2000))


def test_the_edit_beside_its_controls(fresh_seed):
    change, controls = torch.randn(40) * 2 + 5, [torch.randn(40) for _ in range(19)]
    found = patching.compared(change, controls, fresh_seed)
    means = torch.tensor([c.double().mean() for c in controls], dtype=torch.float64)
    assert found["change"] == pytest.approx(change.double().mean().item()) and found["control_mean"] == pytest.approx(means.mean().item())
    assert found["control_interval"] == pytest.approx(means.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist())
    assert found["prompts"] == 40 and found["p"] == 0.05 and found["controls_as_good"] == 0 and found["stands_out"] and found["control_extreme"] == means.max()
    down = patching.compared(-change, controls, fresh_seed, lowers=True)
    assert down["control_extreme"] == means.min() and down["stands_out"] and not patching.compared(change, controls, fresh_seed, broken=["dear"])["stands_out"]
    half = 1.96 * change.std(correction=0).item() / math.sqrt(40)
    low, high = found["change_interval"]
    assert high - low == pytest.approx(2 * half, rel=0.15) and (low + high) / 2 == pytest.approx(change.mean().item(), abs=0.3 * half)


def test_pieces_and_moves_by_hand():
    differs = lambda ids, reference: [piece["differs"] for piece in patching.pieces(Spaced(), ids, reference)]
    assert differs([2, 4, 6], [2, 5, 7]) == [False, True, False] and differs([2, 4], [2, 4]) == [False, False]
    assert differs([2, 4, 6], [2]) == [False, True, False] and differs([2], [2, 4]) == [False] and differs([], [2]) == []
    before, after = torch.tensor([0.5, 0.3, 0.1, 1e-9, 0.1]).log(), torch.tensor([0.2, 0.6, 0.1, 1e-4, 0.1]).log()
    moves = patching.biggest_moves(Spaced(), before, after, 2)
    assert [m["token"] for m in moves] == ["a", " a"] and [m["change"] for m in moves] == pytest.approx([math.log(2), math.log(0.4)])  # not the one from 1e-9
    kl, change = patching.along([before[None]], [after[None]], [[1]])
    p, q = before.double().exp(), after.double().exp()
    assert kl[0] == pytest.approx([(p * (p / q).log()).sum().item()], abs=1e-5) and change[0] == pytest.approx([math.log(2)], abs=1e-5)


@pytest.fixture
def result():
    """What an experiment on two prompts found, as the notebook puts it together."""
    p = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.4, 0.2, 0.2, 0.2]])
    q = torch.tensor([[0.1, 0.7, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]])
    original, patched = (p.log(), [[2, 4], [2]]), (q.log(), [[2, 6], [2]])
    kl, change = [[0.5, 2.0], [1.0]], [[-0.1, 0.2], [-0.3]]
    odds = [choosing.log_odds(arm[0], 1) for arm in (original, patched)]
    rows = patching.side_by_side(Spaced(), [[0, 2], [0, 4]], original, original, patched, kl, change, *odds, [1, 3])
    beside = patching.compared(odds[1] - odds[0], [torch.zeros(2), torch.ones(2)] * 10, 0)
    return beside | patching.agreements([]) | {
        "comparison": rows, "target": " <b>", "sources": [" x"], "names": {7: "<i>own</i>"}, "edited": [7, 8], "silenced": [], "edits_file": "", "operation": "swap",
        "topic_words": [], "candidates": [{"what": "' of' by latent 3", "command": "make patch RUN=x"}], "attribution": [1],
        "scope": "last", "lowers": False, "positions_edited": [1, 3], "controls": [[1]] * 20, "controls_matched_by": "density", "target_is_first_choice": 2,
        "target_was_first_choice": 0, "prompts_hit": 1, "control_hits_median": 0.0,
        "ce_original": 1.0, "ce_reconstruction": 1.25, "reconstruction_first_choice_stays": 2, "keep_error": True, "announcing_latent_is_number": [1, None],
        "doses": [{"dose": d, "surprise": s} for d, s in ((0.0, 0.5), (1.0, 1.5), (4.0, 9.0))], "ablation_log_odds_change": [-1.0, -2.0], "ablation_removed": [7.5, 3.0, 8.0],
        "ablation_verdict": patching.verdict(-1.5, [0.0, -2.0], lowers=True)["says"], "notices": ["odd"],
    }  # fmt: skip


def test_side_by_side_by_hand(result):
    first, second = result["comparison"]
    assert [p["shade"] for p in first["original"] + second["original"]] == [0.25, 1.0, 0.5] and not any(p["differs"] for p in first["original"])
    assert [p["differs"] for p in first["patched"]] == [False, True] and first["prompt"] == " a b" and second["positions"] == 3
    assert first["before"] == pytest.approx(math.log(0.1 / 0.9), rel=1e-4) and first["after"] == pytest.approx(math.log(0.7 / 0.3), rel=1e-4)
    assert first["moves"][0]["token"] == "a" and first["moves"][0]["change"] == pytest.approx(math.log(7), rel=1e-4)
    shaded = patching.shaded(Spaced(), [[0, 2], [0, 4]], [[2, 4], [2]], [[0.5, 2.0], [1.0]], "1,2,3")
    assert [shaded.count(f"rgba(1,2,3,{v})") for v in ("0.25", "1.00", "0.50")] == [1, 1, 1] and shaded.count("<br>") == 1


def test_the_findings_say_what_was_found(result, tmp_path):
    said = patching.findings(result)
    assert said[0].startswith("Swap of latents 7 (<i>own</i>), 8 at scope last: the log-odds of '<b>' changed by +2.6 on average") and "edited at 1 to 3 positions of each" in said[0]
    assert "It stands out from its controls (p = 0.048: none of 20" in said[0] and "of like density, pushed as hard: +0.5 on average, 90 % of them +0.0 to +1.0, at most +1.0)" in said[0]
    decides, rest = said[0].split("'<b>' is the first choice on 2 of 2 prompts, 0 without the edit, and that and at least 10 times as probable on 1 (controls: 0 in the median)")
    assert "p = 0.048" in decides and "p =" not in rest
    assert "1.250 against 1.000" in said[1] and "ablations, too few effects to rank;" in said[2] and "no active latent was left unmeasured" in said[2] and "comes first on 1 of 2" in said[2]
    assert "by 1.50 nats per token, its own by 0.50; at dose 4 by 9.00" in said[3] and "by -1.50 on average (activation: 7.50 in sum is taken away, by controls 3.00 to 8.00). It does not stand out" in said[4]
    sampled = {"gradient_agreement": 0.66, "gradient_others": 12, "gradient_agreement_others": 0.5, "gradient_others_largest": 0.25}
    said = patching.findings(result | sampled)[2]
    assert "ablations, 0.66;" in said and "among 12 random active latents that the gradient did not choose, 0.50 (their largest effect 0.250 nats)" in said
    other = result | {"lowers": True, "controls_matched_by": "activity", "edits_file": "mine.yaml", "ablation_log_odds_change": [], "attribution": []}
    said = patching.findings(other)
    assert said[0].startswith("The edits of mine.yaml: the log-odds of '<b>' changed") and "active at the edited places about as much" in said[0] and len(said) == 3
    body = patching.write_page(tmp_path / "p.html", "A <title>", result | {"findings": patching.findings(result)})
    page = (tmp_path / "p.html").read_text()
    assert "A &lt;title&gt;" in page and "<i>own" not in page and "&lt;i&gt;own" in body and "http" not in page and body.split("<main>")[1] in page and "Notice: odd" in body


def test_where_nothing_stands_out_the_candidates_are_named(result):
    said = patching.findings(result | patching.compared(torch.zeros(2), [torch.ones(2)] * 20, 0))
    assert "does not stand out" in said[0] and said[1].startswith("Nothing stands out here.") and said[1].endswith("' of' by latent 3: make patch RUN=x")
    assert "Nothing stands out" not in patching.findings(result)[1]


def test_a_word_that_is_never_said_is_told_first(result):
    never = patching.findings(result | {"target_is_first_choice": 0})[0]
    assert never.startswith("Swap of latents 7 (<i>own</i>), 8 at scope last: '<b>' is the first choice on none of 2 prompts; its log-odds changed by +2.6 on average")
    assert "It stands out from its controls" in never and "none of" not in patching.findings(result)[0].split("changed by")[0]
    assert "the log-odds of '<b>' changed" in patching.findings(result | {"target_is_first_choice": 0, "lowers": True})[0]


def test_a_page_has_no_empty_column_and_cuts_only_what_is_long(result, tmp_path):
    full = result | {"findings": ["x"]}
    page = patching.write_page(tmp_path / "p.html", "T", full)
    assert "moved most after the prompt" in page and 'data-name="moved most"' in page and "…" not in page.partition("<tbody>")[2]
    rows = [row | {"moves": []} for row in full["comparison"]]
    long = rows[0] | {"prompt": "cut " + "b" * 160}
    page = patching.write_page(tmp_path / "p.html", "T", full | {"comparison": [long, rows[1]]})
    assert "moved most" not in page and page.count("…" + "b" * 160) == 1 and "cut" not in page
    heads, cells = (re.findall(rf"<{tag}[ >]", page) for tag in ("th", "td"))
    assert len(cells) == 2 * len(heads)


def test_the_findings_of_a_topic(result, tmp_path):
    beside = patching.compared(torch.tensor([1.0, 0.5]), [torch.tensor([0.2, 0.0])] * 20, 0)
    topic = result | beside | {"topic_words": ["war", "<army>", "a", "b", "c"], "topic_said": 2, "topic_said_before": 1, "topic_count": 7, "topic_count_before": 3, "attribution": [], "ablation_log_odds_change": []}
    topic |= {"topic_moved": 2, "repeats": [0.25, 0.3], "topic_beyond": 0.6}
    said = patching.findings(topic)
    assert "words of the topic (war, <army>, a, b, …) rise in 2 of 2 continuations; the log-odds that one comes next changed by +0.8 on average" in said[0]
    assert "+0.1 on average, 90 % of them +0.1 to +0.1, at most +0.1). It stands out from its controls (p = 0.048" in said[0]
    assert "as far). That is +0.6 beyond words as frequent." in said[0]
    assert "One of the words stands in 2 continuations, 7 in all, against 1, 3 in all, without the edit; the text surprises the unpatched model by 1.50 nats per token, its own by 0.50, and 30% of its tokens stand in it before, of its own 25%." in said[0]
    page = patching.write_page(tmp_path / "p.html", "T", topic | {"findings": said})
    assert "Words of the topic: <b>war, &lt;army&gt;" in page and "log-odds of the topic" in page and "-2.2 → +0.8" in page


def test_an_edit_that_reaches_no_position_is_told():
    edits = [{"latents": [1], "operation": "ablate", "scope": "generated"}, {"latents": [2], "operation": "ablate"}]
    patching.check_reached([1, 3], ["a b", "c"], edits)
    with pytest.raises(u.UserError, match=r"prompt 2 \(…'what is c'\) is edited at no position: scope generated, all reaches none of its text"):
        patching.check_reached([1, 0], ["a b", "what is c"], edits)
    assert [patching.spread(counts) for counts in ([1, 1], [4, 4], [3, 7])] == ["1 position", "4 positions", "3 to 7 positions"]
