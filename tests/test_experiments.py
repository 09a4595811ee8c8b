"""Attribution against one ablation at a time and against autograd's limit, texts given, edits from files."""

import pytest
import torch
from conftest import HOOK, gemma, gpt2, word_tokenizer

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
    got = patching.logprobs_of(model, prompts, more)
    total = 0.0
    for i in range(2):
        for t in range(len(more[i])):
            expected = model(torch.tensor([prompts[i] + more[i][:t]])).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(got[i][t], expected, rtol=1e-4, atol=1e-4)
            total -= expected[more[i][t]].item()
    assert patching.surprise(model, prompts, more) == pytest.approx(total / 7, rel=1e-4)
    assert patching.surprise(model, prompts, [[], []]) == 0.0


def test_a_patch_knows_where_given_texts_begin(case, monkeypatch):
    """Scope "last" lands on the prompt's last token, whether the text is being written or given."""
    model, hook, tokenizer, sae, prompt, _ = case
    prompts, patch = [prompt, prompt[:4]], editing.set_value([6], 30.0)
    with editing.intervene(model, hook, sae, tokenizer, patch, scope="last"):
        texts = editing.generate(model, tokenizer, prompts, 5)
        first = editing.next_logprobs(model, prompts)
    if not all(texts):
        texts = [text or [5] for text in texts]
    monkeypatch.setattr(editing, "batches", lambda windows, model: ([window] for window in windows))  # each batch has its own lengths
    with editing.intervene(model, hook, sae, tokenizer, patch, scope="last"):
        given = patching.logprobs_of(model, prompts, texts)
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


def test_controls_are_live_alike_and_none_twice(sae, fresh_seed):
    sae.density = torch.rand(48)
    sae.density[:10] = 0
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
    ("edits: []", "one list"), ("- 1", "one list"), ("edits: {", "cannot be read"), ("edits: [{operation: ablate}]", "an edit has latents"),
    ("edits: [{latents: [1], operation: ablate, streng: 2}]", "an edit has latents"), ("edits: [{latents: [99], operation: ablate}]", "valid latents are 0 to 47"),
    ("edits: [{latents: [1], operation: boost}]", "operation is one of"), ("edits: [{latents: [1], operation: amplify, strength: .nan}]", "a finite number"),
    ("edits: [{latents: [1], operation: amplify, strength: 1e1}]", "1.0e-4"), ("edits: [{latents: [1], operation: ablate, scope: nowhere}]", "scope is all"),
    ("edits: [{latents: [1], operation: ablate, scope: {tokens: [a cat]}}]", "is 2 tokens"), ("edits: [{latents: 1, operation: ablate}]", "a list of numbers"),
])  # fmt: skip
def test_wrong_edits_are_told(tmp_path, sae, tokenizer, text, message):
    file = tmp_path / "edits.yaml"
    file.write_text(text)
    with pytest.raises(u.UserError, match=message):
        patching.patches(patching.read_edits(file), sae, tokenizer)
    with pytest.raises(u.UserError, match="no such file"):
        patching.read_edits(tmp_path / "none.yaml")


def test_prompts_from_a_file_and_wrong_ones(tmp_path, tokenizer, model):
    (tmp_path / "p.txt").write_text("the cat\n\na dog\n")
    (tmp_path / "p.jsonl").write_text('"the\\ncat"\n')
    assert patching.read_prompts(["red"], str(tmp_path / "p.txt")) == ["red", "the cat", "a dog"]
    assert patching.read_prompts([], str(tmp_path / "p.jsonl")) == ["the\ncat"]
    for name, content, message in (("empty.txt", "\n", "holds no prompt"), ("bad.jsonl", "the", "line 1: it is no JSON"), ("number.jsonl", "3", "a prompt is a text")):
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
