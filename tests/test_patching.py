"""Edits land where they should, do what they say, and nothing else."""

import json
import math
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import HOOK, gemma, gpt2

import editing
import patching
import sae_utils as u
import storing


# A tiny model of each family with random weights, and where its MLP's output is.
FAMILIES = {
    "Gemma3Text": {"num_key_value_heads": 1, "head_dim": 8}, "Llama": {}, "Qwen2": {"num_key_value_heads": 2}, "Mistral": {"num_key_value_heads": 1}, "Olmo2": {},
    "Phi": {}, "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16}, "GPTNeoX": {}, "GPT2": {"n_embd": 16, "n_layer": 3, "n_head": 2},
    "GPTJ": {"n_embd": 16, "n_layer": 3, "n_head": 2, "rotary_dim": 4},
}  # fmt: skip


def tiny_family(family: str):
    shape = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64}
    kinds = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}
    config = getattr(transformers, f"{family}Config")(**({} if "n_embd" in FAMILIES[family] else shape) | {"vocab_size": 24} | kinds | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model.eval().requires_grad_(False), u.HOOKS.get(config.model_type, u.DEFAULT_HOOK).format(layer=1)


def integers(x):
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


class Same(torch.nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch", [None, lambda acts: acts, lambda acts: acts.clone(), editing.ablate([]), editing.compose()])
def test_empty_patch_is_the_identity_bit_for_bit(sae, patch, dtype):
    x = torch.randn(3, 5, 16).to(dtype)
    x[0, 0], x[0, 1], x[1, 2, 3], x[1, 3, 4], x[2, 0] = -0.0, float("inf"), float("nan"), -float("inf"), 0.0
    out = editing.SAEIntervenableMLP(Same(), sae, patch)(x)
    assert out.dtype == dtype and torch.equal(integers(out), integers(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_patch_leaves_the_model_as_it_is(tokenizer, sae, dtype):
    model = gemma().to(dtype)
    ids, mask = u.pad([[3, 5, 6, 7], [3, 9]], side="left")
    before = model(input_ids=ids, attention_mask=mask).logits
    with editing.intervene(model, HOOK, sae, tokenizer, lambda acts: acts.clone()):
        after = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(integers(before), integers(after))


def test_ablation_removes_direction_times_activation_times_norm(sae):
    x = torch.randn(4, 6, 16) * 3
    acts, (_, norm) = sae.encode(x), sae.normalise(x)
    latent = int((acts > 0).float().mean((0, 1)).sub(0.5).abs().argmin())  # fires on about half of the tokens
    out = editing.SAEIntervenableMLP(Same(), sae, editing.ablate([latent]))(x)
    removed = (acts[..., latent, None].double() * sae.W_dec[latent].double()) * norm.double()
    torch.testing.assert_close(x.double() - out.double(), removed, rtol=1e-4, atol=1e-5)
    silent = acts[..., latent] == 0
    assert silent.any() and (~silent).any() and torch.equal(out[silent], x[silent])


def test_operations_by_hand():
    acts = torch.tensor([[1.0, 0.0, 2.0, 3.0]])
    assert editing.ablate([0, 3])(acts).tolist() == [[0, 0, 2, 0]]
    assert editing.amplify(2, 2.5)(acts).tolist() == [[1, 0, 5, 3]]
    assert editing.set_value([0, 1], 7)(acts).tolist() == [[7, 7, 2, 3]]
    assert editing.set_value([1, 0], torch.tensor([5.0, 6.0]))(acts).tolist() == [[6, 5, 2, 3]]
    assert editing.compose(editing.set_value([1], 1), editing.amplify([1], 4))(acts).tolist() == [[1, 4, 2, 3]]
    assert editing.compose(editing.amplify([1], 4), editing.set_value([1], 1))(acts).tolist() == [[1, 1, 2, 3]]
    assert editing.add([1, 3], [0.5, -1])(acts).tolist() == [[1, 0.5, 2, 2]]
    assert editing.clamp([0, 1, 3], 0.5, 2)(acts).tolist() == [[1, 0.5, 2, 2]]
    most = torch.tensor([10.0, 20.0, 30.0, 40.0])
    assert editing.set_value([3, 1], 0.5, most)(acts).tolist() == [[1, 10, 2, 20]]
    assert editing.add([3, 1], torch.tensor([1.0, 0.1]), most)(acts).tolist() == [[1, 2, 2, 43]]
    assert editing.clamp([2, 3], 0.1, 0.2, most)(acts).tolist() == [[1, 0, 3, 4]]
    assert editing.dose(editing.amplify([2], 3), 0.5)(acts).tolist() == [[1, 0, 4, 3]]
    assert editing.dose(editing.ablate([2]), 4)(acts).tolist() == [[1, 0, 0, 3]] and editing.dose(editing.ablate([2]), 0.25)(acts).tolist() == [[1, 0, 1.5, 3]]
    assert editing.dose(editing.amplify([2], 0.5), 4)(acts).tolist() == [[1, 0, 0, 3]] and editing.dose(editing.add([2], -3.0), 2)(acts).tolist() == [[1, 0, -4, 3]]
    assert editing.dose(lambda a: a + 1, 0.25)(acts).tolist() == [[1.25, 0.25, 2.25, 3.25]]
    assert editing.compose(editing.ablate([0]), lambda a: a * 2)(acts).tolist() == [[0, 0, 4, 6]]
    assert acts.tolist() == [[1, 0, 2, 3]]  # never in place


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, -float("inf")], 1e39])
def test_strengths_that_are_no_numbers_are_refused(value):
    for make in (editing.set_value, editing.add, editing.amplify, lambda ids, v: editing.clamp(ids, v, v), lambda ids, v: editing.dose(editing.ablate(ids), v)):
        with pytest.raises(u.UserError, match="not a finite number"):
            make([0, 1], value)
    with pytest.raises(u.UserError, match="leaves nothing between"):
        editing.clamp([0], 2.0, 1.0)
    with pytest.raises(u.UserError, match="named twice"):
        editing.set_value([3, 1, 3], 1.0)


@pytest.mark.parametrize("architecture", ["relu", "topk", "batchtopk"])
@pytest.mark.parametrize("apply_b_dec", [False, True])
def test_encoding_the_edited_latents_alone_is_the_same(architecture, apply_b_dec):
    sae = u.SAE(16, 48, seed=3, architecture=architecture, k=8, apply_b_dec_to_input=apply_b_dec).requires_grad_(False)
    for tensor in (sae.b_enc, sae.b_dec, sae.mean):
        tensor.normal_(std=0.2)
    if architecture == "batchtopk":
        sae.threshold.uniform_(0, 0.3)
    x, most = torch.randn(5, 7, 16) * 2, torch.rand(48)
    whole = editing.compose(editing.amplify([3, 40], 3.0), editing.ablate([11]), editing.add([40, 2], 0.7), editing.clamp([5], 0.1, 0.2), editing.set_value([47, 1], 2.0, most), editing.dose(editing.ablate([9]), 0.5))
    few = editing.SAEIntervenableMLP(Same(), sae, whole)
    everything = editing.SAEIntervenableMLP(Same(), sae, lambda acts: whole(acts))
    assert few.few is not None and everything.few is None
    torch.testing.assert_close(few(x), everything(x), rtol=1e-4, atol=1e-5)
    pairs = editing.SAEIntervenableMLP(Same(), sae, [(editing.amplify([3, 40], 3.0), "all"), (editing.set_value([40], 1.0), "all")])
    torch.testing.assert_close(pairs(x), editing.SAEIntervenableMLP(Same(), sae, editing.compose(editing.amplify([3], 3.0), editing.set_value([40], 1.0)))(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [lambda a: a[..., :3], lambda a: a.double(), lambda a: a.sum(), lambda a: None, lambda a: a.to("meta")])
def test_patches_that_return_something_else_are_refused(sae, wrong):
    with pytest.raises(u.UserError, match="a patch must return acts of the shape"):
        editing.SAEIntervenableMLP(Same(), sae, wrong)(torch.randn(2, 3, 16))


def test_an_sae_of_another_place_is_refused(model, tokenizer, sae):
    sae.config = {"hook_name": HOOK}
    with pytest.raises(u.UserError, match="was trained at model.layers.1.mlp.down_proj, not at model.layers.2"), editing.intervene(model, HOOK.replace("1", "2"), sae, tokenizer):
        pass
    narrow = u.SAE(12, 24).requires_grad_(False)
    with pytest.raises(u.UserError, match="for activations 12 wide, this module's are 16 wide"), editing.intervene(model, HOOK, narrow, tokenizer, editing.ablate([0])):
        model(torch.tensor([[3, 5]]))


def test_acts_of_the_last_forward_when_asked(model, tokenizer, sae):
    ids = torch.tensor([[3, 5, 6, 7]])
    x = u.run_to_hook(model, HOOK, ids, torch.ones_like(ids))
    with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([4], 5.0), keep_acts=True) as wrapper:
        model(ids)
        torch.testing.assert_close(wrapper.acts, sae.encode(x))
        assert (wrapper.patched[0, 1:, 4] == 5).all() and wrapper.patched[0, 0, 4] == wrapper.acts[0, 0, 4]
    with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([4], 5.0)) as wrapper:
        model(ids)
        assert wrapper.acts is None and wrapper.mlp is not None


def test_two_layers_at_once(model, tokenizer, sae):
    other, ids = HOOK.replace("1", "2"), torch.tensor([[3, 5, 6, 7]])
    before = [model.get_submodule(name) for name in (HOOK, other)]
    alone = []
    for name in (HOOK, other):
        with editing.intervene(model, name, sae, tokenizer, editing.set_value([4], 30.0)):
            alone.append(model(ids).logits)
    with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([4], 30.0)) as first, editing.intervene(model, other, sae, tokenizer, editing.set_value([4], 30.0)) as second:
        both = model(ids).logits
        assert first.mlp is before[0] and second.mlp is before[1]
        with editing.intervene(model, HOOK, sae, tokenizer):  # and one upon the other
            assert torch.equal(model(ids).logits, both)
    assert not torch.allclose(both, alone[0]) and not torch.allclose(both, alone[1])
    assert [model.get_submodule(name) for name in (HOOK, other)] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_patch_leaves_every_family_as_it_is(family, dtype, tokenizer):
    model, hook = tiny_family(family)
    model = model.to(dtype)
    sae = u.SAE(16, 40, seed=1).requires_grad_(False)
    ids, mask = u.pad([[3, 5, 6, 7], [3, 9]], side="left")
    before = model(input_ids=ids, attention_mask=mask).logits
    for patch in (lambda acts: acts.clone(), editing.ablate([]), [(editing.amplify([3, 7], 1.0), "all")]):
        with editing.intervene(model, hook, sae, tokenizer, patch) as wrapper:
            assert torch.equal(integers(model(input_ids=ids, attention_mask=mask).logits), integers(before)) and not wrapper.training
    with editing.intervene(model, hook, sae, tokenizer, editing.set_value([3], 50.0)):
        after = model(input_ids=ids, attention_mask=mask).logits
    assert after.dtype == dtype and not torch.equal(after, before)


def test_latents_may_be_any_whole_numbers():
    acts = torch.ones(1, 4)
    for ids in (2, [2], torch.tensor([2]), np.array([2]), range(2, 3), {2}):
        assert editing.ablate(ids)(acts).tolist() == [[1, 1, 0, 1]]


@pytest.mark.parametrize("latent", [-1, 4, 2.5, True, "2"])
def test_latents_outside_the_sae_are_refused(latent):
    with pytest.raises(u.UserError, match="valid latents are 0 to 3"):
        editing.ablate([latent])(torch.zeros(1, 4))


def test_plain_reconstruction(sae):
    x = torch.randn(4, 6, 16)
    torch.testing.assert_close(editing.SAEIntervenableMLP(Same(), sae, keep_error=False)(x), sae(x))
    out = editing.SAEIntervenableMLP(Same(), sae, editing.ablate([1]), keep_error=False)(x)
    x_unit, norm = sae.normalise(x)
    torch.testing.assert_close(out, sae.denormalise(sae.decode_unit(editing.ablate([1])(sae.encode_unit(x_unit))), norm))


def edited_positions(model, tokenizer, sae, scope, prompts, new=4):
    """For each forward pass, the (row, place in the sequence, token) that an edit changed."""
    seen = []
    with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([5], 9.0), scope=scope) as wrapper:
        original = wrapper.edit

        def spy(x):
            out = original(x)
            rows, columns = (out != x).any(-1).nonzero(as_tuple=True)
            seen.append(sorted(zip(rows.tolist(), wrapper.tracker.index[rows, columns].tolist(), wrapper.tracker.ids[rows, columns].tolist(), strict=True)))
            return out

        wrapper.edit = spy
        own, model.generation_config = model.generation_config, transformers.GenerationConfig()
        endless = types.SimpleNamespace(bos_token_id=tokenizer.bos_token_id, eos_token_id=None)  # so that the length is known
        texts = [prompt + more for prompt, more in zip(prompts, editing.generate(model, endless, prompts, new), strict=True)]
        model.generation_config = own
    return seen, texts


# For each scope: whether the place `at` of a text, whose prompt is `n` long, belongs to it.
SCOPES = {
    "all": ("all", lambda at, n, token: True), "prompt": ("prompt", lambda at, n, token: at < n), "generated": ("generated", lambda at, n, token: at >= n),
    "last": ("last", lambda at, n, token: at == n - 1), "places": ([0, 1, -1], lambda at, n, token: at in (0, 1, n - 1)), "ahead": ([6], lambda at, n, token: at == 6),
    "tokens": (lambda ids: (ids == 6) | (ids > 14), lambda at, n, token: token == 6 or token > 14),
}  # fmt: skip


@pytest.mark.parametrize("name", SCOPES)
def test_where_each_scope_lands(model, tokenizer, sae, name):
    """Exactly there, in the prompt and at every step after it; together (padded on the left) and alone."""
    scope, belongs = SCOPES[name]
    prompts, special = [[3, 5, 6, 7, 8], [3, 9, 20], [3, 6, 6, 21, 4, 12, 13]], u.special_ids(tokenizer)
    for batch in (prompts, prompts[:1], prompts[1:2], prompts[2:]):
        seen, texts = edited_positions(model, tokenizer, sae, scope, batch)
        assert len(seen) == 4
        for step, got in enumerate(seen):
            expected = []
            for row, (prompt, text) in enumerate(zip(batch, texts, strict=True)):
                places = range(len(prompt)) if step == 0 else [len(prompt) + step - 1]
                expected += [(row, at, text[at]) for at in places if text[at] not in special and belongs(at, len(prompt), text[at])]
            assert got == sorted(expected), (name, step)
    assert any(seen), "the scope lands somewhere"


@pytest.mark.parametrize("name", SCOPES)
def test_batched_results_equal_single_ones_in_each_scope(model, tokenizer, sae, name):
    prompts = [[3, 5, 6, 7, 8, 9, 10], [3, 9, 20], [3, 12, 13, 6]]
    with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([7], 40.0), scope=SCOPES[name][0]):
        together = editing.generate(model, tokenizer, prompts, 6)
        assert together == [editing.generate(model, tokenizer, [prompt], 6)[0] for prompt in prompts]


def test_each_patch_has_its_own_scope(model, tokenizer, sae):
    ids = torch.tensor([[3, 5, 6, 7, 8]])
    pairs = [(editing.set_value([4], 5.0), "last"), (editing.set_value([9], 3.0), [1, 2]), (lambda acts: acts * 2, lambda tokens: tokens == 6)]
    with editing.intervene(model, HOOK, sae, tokenizer, pairs, keep_acts=True) as wrapper:
        model(ids)
        acts, patched = wrapper.acts[0], wrapper.patched[0]
    expected = acts.clone()
    expected[4, 4] = 5
    expected[[1, 2], 9] = 3
    expected[2] *= 2
    assert torch.equal(patched, expected)


def test_batched_patched_generation_equals_single(model, tokenizer, sae):
    prompts = [[3, 5, 6, 7, 8, 9, 10], [3, 9, 10], [3, 12, 13, 14]]
    untouched, texts = editing.generate(model, tokenizer, prompts, 8), []
    for latent in range(48):
        with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([latent], 40.0)):
            texts.append(editing.generate(model, tokenizer, prompts, 8))
            assert texts[-1] == [editing.generate(model, tokenizer, [p], 8)[0] for p in prompts]
            alone = torch.cat([editing.next_logprobs(model, [p]) for p in prompts])
            torch.testing.assert_close(editing.next_logprobs(model, prompts), alone, rtol=1e-4, atol=1e-4)
    assert any(text != untouched for text in texts)


def test_a_batch_of_prompts_equals_one_at_a_time_with_absolute_positions(tokenizer):
    model, prompts = gpt2(), [[3, 5, 6, 7, 8, 9, 10], [3, 9, 10], [3, 12, 13, 14]]
    alone = torch.cat([editing.next_logprobs(model, [p]) for p in prompts])
    torch.testing.assert_close(editing.next_logprobs(model, prompts), alone, rtol=1e-4, atol=1e-4)
    by_hand = torch.stack([model(torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in prompts])
    torch.testing.assert_close(alone, by_hand, rtol=1e-4, atol=1e-4)
    assert editing.generate(model, tokenizer, prompts, 6) == [editing.generate(model, tokenizer, [p], 6)[0] for p in prompts]


def test_generation_ignores_the_models_own_habits(model, tokenizer):
    prompts = [[3, 5, 6, 7]]
    plain, own = editing.generate(model, tokenizer, prompts, 8), model.generation_config
    draws = [editing.generate(model, tokenizer, prompts, 8, temperature=2.0, seed=s) for s in range(4)]
    try:
        model.generation_config = transformers.GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, top_k=1)
        assert editing.generate(model, tokenizer, prompts, 8) == plain
        assert [editing.generate(model, tokenizer, prompts, 8, temperature=2.0, seed=s) for s in range(4)] == draws
    finally:
        model.generation_config = own


def test_temperature_spreads_the_choice(model, tokenizer):
    draw = lambda t: {str(editing.generate(model, tokenizer, [[3, 5, 6, 7]], 3, temperature=t, seed=s)) for s in range(12)}
    assert draw(1e-4) == {str(editing.generate(model, tokenizer, [[3, 5, 6, 7]], 3))} and len(draw(50.0)) > 6


def test_sampling_repeats_with_its_seed(model, tokenizer):
    prompts = [[3, 5, 6, 7]]
    draw = lambda seed: editing.generate(model, tokenizer, prompts, 12, temperature=1.5, seed=seed)
    state = torch.random.get_rng_state()
    assert draw(1) == draw(1) and len({str(draw(s)) for s in range(6)}) > 1
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_module_comes_back_even_after_an_exception(model, tokenizer, sae):
    original, ids = model.get_submodule(HOOK), torch.tensor([[3, 5, 6]])
    before = model(ids).logits
    with pytest.raises(KeyError), editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([0], 50.0)):
        assert not torch.equal(model(ids).logits, before)
        raise KeyError
    assert model.get_submodule(HOOK) is original and not any((model._forward_pre_hooks, model._forward_hooks, original._forward_hooks))
    assert torch.equal(model(ids).logits, before)


def test_contexts_may_end_in_any_order(model, tokenizer, sae):
    ids, other = torch.tensor([[3, 5, 6, 7]]), HOOK.replace("1", "2")
    enter = lambda hook, latent: editing.intervene(model, hook, sae, tokenizer, editing.set_value([latent], 50.0))
    before, alone = model(ids).logits, []
    for latent in (3, 4):
        with enter(HOOK, latent):
            alone.append(model(ids).logits)
    first, second, third = enter(HOOK, 3), enter(HOOK, 4), enter(other, 4)
    for context in (first, second, third):
        context.__enter__()
    first.__exit__(None, None, None)
    third.__exit__(None, None, None)
    assert torch.equal(model(ids).logits, alone[1])
    second.__exit__(None, None, None)
    assert torch.equal(model(ids).logits, before)


def test_inside_the_context_the_models_weights_are_its_own(model, tokenizer, sae, tmp_path):
    names, weight = list(model.state_dict()), model.get_submodule(HOOK).weight
    with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([0], 50.0)):
        assert list(model.state_dict()) == names and model.get_submodule(HOOK).weight is weight
        model.save_pretrained(tmp_path / "inside")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "inside")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_gradients_after_writing_in_the_same_context(model, tokenizer, sae):
    prompt = [3, 5, 6, 7]
    with editing.intervene(model, HOOK, sae, tokenizer, editing.compose(editing.amplify([3, 7], 2.0), editing.set_value([4], 1.0))):
        editing.generate(model, tokenizer, [prompt], 3)
        embedded = []
        handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: embedded.append(out.requires_grad_()) or out)
        model(torch.tensor([prompt])).logits.sum().backward()
        handle.remove()
    assert embedded[0].grad.abs().sum() > 0


@pytest.mark.parametrize("patch", [lambda: editing.amplify([3, 7, 9], 2.0), lambda: (lambda acts: acts * 1.5)])
def test_gradients_pass_through_an_edit_twice(sae, patch):
    """With respect to the activation, the encoder and the decoder, in float64 beside autograd of the formula written out."""
    sae = sae.requires_grad_(True)
    x = (torch.randn(2, 5, 16) * 2).requires_grad_()
    layer = editing.SAEIntervenableMLP(Same(), sae, patch())
    leaves = [x, sae.W_enc, sae.W_dec, sae.b_enc]
    once = torch.autograd.grad(layer(x).square().sum(), leaves, create_graph=True)
    again = torch.autograd.grad(layer(x).square().sum(), leaves)
    x64, W_enc, W_dec, b_enc = (leaf.detach().double().requires_grad_() for leaf in leaves)
    centred = x64 - sae.mean.double()
    norm = centred.norm(dim=-1, keepdim=True)
    acts = (centred / norm @ W_enc + b_enc).relu()
    out = x64 + (patch()(acts) - acts) @ W_dec * norm
    for mine, repeated, theirs in zip(once, again, torch.autograd.grad(out.square().sum(), [x64, W_enc, W_dec, b_enc]), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mine, repeated)
    assert torch.autograd.grad(once[0].square().sum(), x)[0].abs().sum() > 0  # and once more through the gradient


def test_sae_stays_float32_when_the_model_is_cast(tokenizer, sae):
    model = gemma()
    with editing.intervene(model, HOOK, sae, tokenizer, editing.ablate([0])) as wrapper:
        model.to(torch.bfloat16)
        assert wrapper.sae.W_enc.dtype == torch.float32
        assert model(torch.tensor([[3, 5, 6]])).logits.dtype == torch.bfloat16
        assert not any("W_enc" in name for name in model.state_dict())


def test_a_module_that_returns_a_tuple(tokenizer, sae):
    class Pair(torch.nn.Module):
        def forward(self, x):
            return x, "more"

    x = torch.randn(1, 4, 16)
    out, more = editing.SAEIntervenableMLP(Pair(), sae, editing.set_value([0], 2.0))(x)
    assert more == "more" and not torch.equal(out, x)


def test_the_norm_after_the_mlp_can_be_edited_as_well(model, tokenizer, sae):
    norm, ids = "model.layers.1.post_feedforward_layernorm", torch.tensor([[3, 5, 6, 7]])
    before, original = model(ids).logits, model.get_submodule(norm)
    x = u.run_to_hook(model, norm, ids, None)
    with editing.intervene(model, norm, sae, tokenizer, editing.set_value([4], 3.0)) as wrapper:
        after = u.run_to_hook(model, norm, ids, None)
        assert wrapper.mlp is original and not torch.equal(model(ids).logits, before)
    expected = (3 - sae.encode(x)[..., 4, None]) * sae.W_dec[4] * sae.normalise(x)[1]
    torch.testing.assert_close((after - x)[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(after[:, 0], x[:, 0]) and torch.equal(model(ids).logits, before)


# ---------------------------------------------------------------------------------------------
# What is given that cannot be
# ---------------------------------------------------------------------------------------------


def test_where_a_number_is_not_finite_there_is_no_finding():
    for edit, controls, whose in ((math.nan, [0.1] * 20, "the edit"), (9.0, [0.1] * 18 + [math.nan, -math.inf], "2 of its 20 controls"), (math.inf, [math.nan], "the edit")):
        found = patching.verdict(edit, controls)
        assert (found["p"], found["as_good"], found["stands_out"]) == (None, None, False) and f"There is no finding: what {whose} moved" in found["says"]
    beside = patching.compared(torch.tensor([1.0, math.nan]), [torch.ones(2)] * 20, 0)
    assert beside["p"] is None and not beside["stands_out"] and "no finding" in beside["verdict"]
    assert patching.verdict(9.0, [0.1] * 20)["stands_out"]
    logprobs = torch.randn(5, 24).log_softmax(-1)
    logprobs[2, 3] = -math.inf  # a token that cannot come is none the less a number
    assert patching.check_numbers(logprobs, edited=True) is logprobs
    logprobs[[1, 4], 7] = math.nan
    with pytest.raises(u.UserError, match="no finding: with the edit .* no finite numbers on 2 of 5 prompts; lower strength"):
        patching.check_numbers(logprobs, edited=True)


def test_an_edit_beyond_all_numbers_is_noticed(model, tokenizer, sae):
    """Within float32 by itself, beyond it in the model."""
    with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([0], 3e38)):
        logprobs = editing.next_logprobs(model, [[3, 5, 6]])
    with pytest.raises(u.UserError, match="no finite numbers on 1 of 1 prompts"):
        patching.check_numbers(logprobs, edited=True)


def test_files_and_texts_that_are_none(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes(b"the cat\ncaf\xe9\n")
    with pytest.raises(u.UserError, match="p.txt: byte 12 is not UTF-8: save it as UTF-8"):
        patching.read_prompts([], str(file))
    with pytest.raises(u.UserError, match="p.txt: byte 12 is not UTF-8"):
        patching.read_edits(file)
    file.write_bytes(b"\xef\xbb\xbfthe cat\r\na dog")
    assert patching.read_prompts([], str(file)) == ["the cat", "a dog"]
    file.write_text("a\u2028b\nc\x0cd\x85e\n", encoding="utf-8")  # lines end in one character alone
    assert patching.read_prompts([], str(file)) == ["a\u2028b", "c\x0cd\x85e"]
    (tmp_path / "p.jsonl").write_text(json.dumps("a\u2028b", ensure_ascii=False) + "\n", encoding="utf-8")
    assert patching.read_prompts([], str(tmp_path / "p.jsonl")) == ["a\u2028b"]
    for path in (tmp_path, tmp_path / "none", tmp_path / ("x" * 300), "/dev/zero"):
        with pytest.raises(u.UserError, match="there is no such file|that is no file|is no path"):
            patching.read_prompts([], str(path))
    (tmp_path / "p.jsonl").write_text('"a"\n"b \\ud800"\n')
    with pytest.raises(u.UserError, match="prompt 2 holds half of a character .*ud800"):
        patching.read_prompts([], str(tmp_path / "p.jsonl"))
    (tmp_path / "p.jsonl").write_text("[" * 100_000)
    with pytest.raises(u.UserError, match="line 1: it is no JSON string"):
        patching.read_prompts([], str(tmp_path / "p.jsonl"))
    for prompts in ([5], [None], [["a"]], [False], ["a", "\udfff"]):
        with pytest.raises(u.UserError, match=r"prompt \d (is a text, not|holds half)"):
            patching.read_prompts(prompts, "")


@pytest.mark.parametrize(("edit", "message"), [
    ({"latents": [3, 3]}, "latent 3 is named twice"), ({"latents": [[3]]}, "list of numbers"), ({"latents": [True]}, "list of numbers"), ({"latents": [1.5]}, "list of numbers"), ({"latents": "3"}, "list of numbers"),
    ({"strength": 1e39}, "finite number of float32"), ({"strength": 10**400}, "finite number of float32"), ({"low": "x"}, "finite number"), ({"high": None}, "finite number"),
    ({"scope": [10**30]}, "scope is"), ({"scope": {"tokens": ["\ud800"]}}, "half of a character"), ({"scope": [True]}, "scope is"),
    ({"unit": [1]}, "unit max or acts"), ({"operation": {}}, "operation is one of"), ({"operaton": "ablate"}, "an edit has"),
])  # fmt: skip
def test_edits_that_are_none(edit, message, tmp_path):
    path, good = tmp_path / "e.yaml", {"latents": [3], "operation": "ablate"}
    path.write_text(json.dumps({"edits": [good, good | edit]}))
    with pytest.raises(u.UserError, match=f"(number 2|line 1): .*{message}"):
        patching.read_edits(path)
    path.write_text(json.dumps({"edits": [good]}))
    assert patching.read_edits(path) == [good]


@pytest.mark.parametrize("text", ["", "a: [", "edits: 2001-99-99", "edits: " + "[" * 5000, "a: &a [x, x]\nb: &b [*a, *a]\nedits: [*b]", "\x00", "edits: !!python/object:os.system {}", "- 1"])
def test_edit_files_that_are_none(text, tmp_path):
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(u.UserError, match="e.yaml"):
        patching.read_edits(tmp_path / "e.yaml")


def test_what_does_not_fit_into_the_positions(tokenizer):
    model = gpt2()  # 64 positions
    for prompts, new, message in (([], 10**9, "max_new_tokens 1000000000 leaves no place"), ([], 64, "leaves no place"), ([[3, 5] * 10], 45, "has 20 tokens, and 45 .* lower max_new_tokens")):
        with pytest.raises(u.UserError, match=message):
            patching.check_prompts(model, tokenizer, prompts, new)
    patching.check_prompts(model, tokenizer, [[3, 5] * 10], 44)
    model.config = transformers.MptConfig(max_seq_len=32)
    assert u.positions_of(model.config) == 32
    model.config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace())
    assert u.positions_of(model.config) is None
    for temperature in (1e-320, 1e-4):
        with pytest.raises(u.UserError, match="too small to divide by"):
            patching.check_sampling(temperature)
    patching.check_sampling(0.0), patching.check_sampling(0.7)


def test_what_a_run_has_to_say(tmp_path, sae):
    with pytest.raises(u.UserError, match="sae.pth does not say its hook_name, .*: it is no SAE of a run"):
        patching.check_run(sae, tmp_path)
    for metrics in ({}, {"ce_clean": 2.0, "ce_spliced": None}, {"ce_clean": 2.0, "ce_spliced": math.nan}):
        storing.write_json(tmp_path / "metrics.json", metrics, sealed=True)
        with pytest.raises(u.UserError, match="metrics.json has no numbers for ce_clean and ce_spliced"):
            patching.cross_entropies(tmp_path)
    storing.write_json(tmp_path / "metrics.json", {"ce_clean": 2.0, "ce_spliced": 2.5}, sealed=True)
    assert patching.cross_entropies(tmp_path) == (2.0, 2.5)
    (tmp_path / "metrics.json").write_text((tmp_path / "metrics.json").read_text().replace("2.5", "2.4"))
    with pytest.raises(u.UserError, match="metrics.json is not as it was written"):
        patching.cross_entropies(tmp_path)
