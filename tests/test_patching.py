"""Edits land where they should, do what they say, and nothing else."""

import types

import numpy as np
import pytest
import torch
import transformers
from conftest import HOOK, gemma, gpt2

import sae_utils as u


def integers(x):
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


class Same(torch.nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch", [None, lambda acts: acts, lambda acts: acts.clone(), u.ablate([]), u.compose()])
def test_empty_patch_is_the_identity_bit_for_bit(sae, patch, dtype):
    x = torch.randn(3, 5, 16).to(dtype)
    x[0, 0], x[0, 1], x[1, 2, 3], x[1, 3, 4], x[2, 0] = -0.0, float("inf"), float("nan"), -float("inf"), 0.0
    out = u.SAEIntervenableMLP(Same(), sae, patch)(x)
    assert out.dtype == dtype and torch.equal(integers(out), integers(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_patch_leaves_the_model_as_it_is(tokenizer, sae, dtype):
    model = gemma().to(dtype)
    ids, mask = u.pad([[3, 5, 6, 7], [3, 9]], side="left")
    before = model(input_ids=ids, attention_mask=mask).logits
    with u.intervene(model, HOOK, sae, tokenizer, lambda acts: acts.clone()):
        after = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(integers(before), integers(after))


def test_ablation_removes_direction_times_activation_times_norm(sae):
    x = torch.randn(4, 6, 16) * 3
    acts, (_, norm) = sae.encode(x), sae.normalise(x)
    latent = int((acts > 0).float().mean((0, 1)).sub(0.5).abs().argmin())  # fires on about half of the tokens
    out = u.SAEIntervenableMLP(Same(), sae, u.ablate([latent]))(x)
    removed = (acts[..., latent, None].double() * sae.W_dec[latent].double()) * norm.double()
    torch.testing.assert_close(x.double() - out.double(), removed, rtol=1e-4, atol=1e-5)
    silent = acts[..., latent] == 0
    assert silent.any() and (~silent).any() and torch.equal(out[silent], x[silent])


def test_operations_by_hand():
    acts = torch.tensor([[1.0, 0.0, 2.0, 3.0]])
    assert u.ablate([0, 3])(acts).tolist() == [[0, 0, 2, 0]]
    assert u.amplify(2, 2.5)(acts).tolist() == [[1, 0, 5, 3]]
    assert u.set_value([0, 1], 7)(acts).tolist() == [[7, 7, 2, 3]]
    assert u.set_value([1, 0], torch.tensor([5.0, 6.0]))(acts).tolist() == [[6, 5, 2, 3]]
    assert u.compose(u.set_value([1], 1), u.amplify([1], 4))(acts).tolist() == [[1, 4, 2, 3]]
    assert u.compose(u.amplify([1], 4), u.set_value([1], 1))(acts).tolist() == [[1, 1, 2, 3]]
    assert acts.tolist() == [[1, 0, 2, 3]]  # never in place


def test_latents_may_be_any_whole_numbers():
    acts = torch.ones(1, 4)
    for ids in (2, [2], torch.tensor([2]), np.array([2]), range(2, 3), {2}):
        assert u.ablate(ids)(acts).tolist() == [[1, 1, 0, 1]]


@pytest.mark.parametrize("latent", [-1, 4, 2.5, True, "2"])
def test_latents_outside_the_sae_are_refused(latent):
    with pytest.raises(u.UserError, match="valid latents are 0 to 3"):
        u.ablate([latent])(torch.zeros(1, 4))


def test_plain_reconstruction(sae):
    x = torch.randn(4, 6, 16)
    torch.testing.assert_close(u.SAEIntervenableMLP(Same(), sae, keep_error=False)(x), sae(x))
    out = u.SAEIntervenableMLP(Same(), sae, u.ablate([1]), keep_error=False)(x)
    x_unit, norm = sae.normalise(x)
    torch.testing.assert_close(out, sae.denormalise(sae.decode_unit(u.ablate([1])(sae.encode_unit(x_unit))), norm))


def edited_positions(model, tokenizer, sae, scope, prompts, new=4):
    """For each forward pass, the (row, place in the sequence) that an edit changed."""
    seen = []
    with u.intervene(model, HOOK, sae, tokenizer, u.set_value([5], 9.0), scope=scope) as wrapper:
        original = wrapper.edit

        def spy(x):
            out = original(x)
            rows, columns = (out != x).any(-1).nonzero(as_tuple=True)
            seen.append(sorted(zip(rows.tolist(), wrapper.tracker.index[rows, columns].tolist(), strict=True)))
            return out

        wrapper.edit = spy
        own, model.generation_config = model.generation_config, transformers.GenerationConfig()
        endless = types.SimpleNamespace(bos_token_id=tokenizer.bos_token_id, eos_token_id=None)  # so that the length is known
        u.generate(model, endless, prompts, new)
        model.generation_config = own
    return seen


def test_where_each_scope_lands(model, tokenizer, sae):
    prompts = [[3, 5, 6, 7, 8], [3, 9, 10]]  # BOS is 3; the second is padded on the left by two
    all_prompt = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]
    generated = lambda step: [(0, 5 + step), (1, 3 + step)]
    everywhere = edited_positions(model, tokenizer, sae, "all", prompts)
    assert everywhere[0] == all_prompt and len(everywhere) == 4
    for step, places in enumerate(everywhere[1:]):
        assert set(places) <= set(generated(step))  # a generated special token is not edited
    assert edited_positions(model, tokenizer, sae, "prompt", prompts) == [all_prompt, [], [], []]
    only_generated = edited_positions(model, tokenizer, sae, "generated", prompts)
    assert only_generated[0] == [] and only_generated[1:] != [[], [], []]
    assert edited_positions(model, tokenizer, sae, "last", prompts) == [[(0, 4), (1, 2)], [], [], []]
    assert edited_positions(model, tokenizer, sae, [0, 1, -1], prompts)[0] == [(0, 1), (0, 4), (1, 1), (1, 2)]


def test_batched_patched_generation_equals_single(model, tokenizer, sae):
    prompts = [[3, 5, 6, 7, 8, 9, 10], [3, 9, 10], [3, 12, 13, 14]]
    untouched, texts = u.generate(model, tokenizer, prompts, 8), []
    for latent in range(48):
        with u.intervene(model, HOOK, sae, tokenizer, u.set_value([latent], 40.0)):
            texts.append(u.generate(model, tokenizer, prompts, 8))
            assert texts[-1] == [u.generate(model, tokenizer, [p], 8)[0] for p in prompts]
            alone = torch.cat([u.next_logprobs(model, [p]) for p in prompts])
            torch.testing.assert_close(u.next_logprobs(model, prompts), alone, rtol=1e-4, atol=1e-4)
    assert any(text != untouched for text in texts)


def test_a_batch_of_prompts_equals_one_at_a_time_with_absolute_positions(tokenizer):
    model, prompts = gpt2(), [[3, 5, 6, 7, 8, 9, 10], [3, 9, 10], [3, 12, 13, 14]]
    alone = torch.cat([u.next_logprobs(model, [p]) for p in prompts])
    torch.testing.assert_close(u.next_logprobs(model, prompts), alone, rtol=1e-4, atol=1e-4)
    by_hand = torch.stack([model(torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in prompts])
    torch.testing.assert_close(alone, by_hand, rtol=1e-4, atol=1e-4)
    assert u.generate(model, tokenizer, prompts, 6) == [u.generate(model, tokenizer, [p], 6)[0] for p in prompts]


def test_generation_ignores_the_models_own_habits(model, tokenizer):
    prompts = [[3, 5, 6, 7]]
    plain, own = u.generate(model, tokenizer, prompts, 8), model.generation_config
    draws = [u.generate(model, tokenizer, prompts, 8, temperature=2.0, seed=s) for s in range(4)]
    try:
        model.generation_config = transformers.GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, top_k=1)
        assert u.generate(model, tokenizer, prompts, 8) == plain
        assert [u.generate(model, tokenizer, prompts, 8, temperature=2.0, seed=s) for s in range(4)] == draws
    finally:
        model.generation_config = own


def test_temperature_spreads_the_choice(model, tokenizer):
    draw = lambda t: {str(u.generate(model, tokenizer, [[3, 5, 6, 7]], 3, temperature=t, seed=s)) for s in range(12)}
    assert draw(1e-4) == {str(u.generate(model, tokenizer, [[3, 5, 6, 7]], 3))} and len(draw(50.0)) > 6


def test_sampling_repeats_with_its_seed(model, tokenizer):
    prompts = [[3, 5, 6, 7]]
    draw = lambda seed: u.generate(model, tokenizer, prompts, 12, temperature=1.5, seed=seed)
    state = torch.random.get_rng_state()
    assert draw(1) == draw(1) and len({str(draw(s)) for s in range(6)}) > 1
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_module_comes_back_even_after_an_exception(model, tokenizer, sae):
    original, ids = model.get_submodule(HOOK), torch.tensor([[3, 5, 6]])
    before = model(ids).logits
    with pytest.raises(KeyError), u.intervene(model, HOOK, sae, tokenizer, u.ablate([0])):
        assert isinstance(model.get_submodule(HOOK), u.SAEIntervenableMLP)
        raise KeyError
    assert model.get_submodule(HOOK) is original and not model._forward_pre_hooks
    assert torch.equal(model(ids).logits, before)


def test_sae_stays_float32_when_the_model_is_cast(tokenizer, sae):
    model = gemma()
    with u.intervene(model, HOOK, sae, tokenizer, u.ablate([0])) as wrapper:
        model.to(torch.bfloat16)
        assert wrapper.sae.W_enc.dtype == torch.float32
        assert model(torch.tensor([[3, 5, 6]])).logits.dtype == torch.bfloat16
        assert not any("W_enc" in name for name in model.state_dict())


def test_a_module_that_returns_a_tuple(tokenizer, sae):
    class Pair(torch.nn.Module):
        def forward(self, x):
            return x, "more"

    x = torch.randn(1, 4, 16)
    out, more = u.SAEIntervenableMLP(Pair(), sae, u.set_value([0], 2.0))(x)
    assert more == "more" and not torch.equal(out, x)
