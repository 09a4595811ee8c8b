"""Where a token stands, by every way of running a model: each beside the text run alone, without a cache, or refused."""

import types

import pytest
import torch
import transformers
from conftest import HOOK, gemma, gpt2, word_tokenizer
from test_patching import FAMILIES, SCOPES, tiny_family

import editing
import sae_utils as u

NEW = 5  # tokens that are generated
NO_TOKEN = 10**6  # the id of an end that never comes
PROMPTS = {True: [[3, 5, 6, 7, 8, 1], [3, 9, 20], [3, 6, 6, 21, 4, 12, 13]], False: [[5, 6, 7, 8, 1], [9, 20], [6, 6, 21, 4, 12, 13]]}
STATED = ("prompt", "generated", "last", "places")  # scopes that hang on where the prompt ends
WAYS = {
    "greedy": {}, "samples": {"do_sample": True, "num_return_sequences": 3}, "beams": {"num_beams": 3, "num_return_sequences": 2},
    "no cache": {"use_cache": False}, "chunks": {"prefill_chunk_size": 2}, "chunks of one": {"prefill_chunk_size": 1}, "lookup": {"prompt_lookup_num_tokens": 3},
}  # fmt: skip


@pytest.fixture(autouse=True)
def endless(model):
    """The model never ends by itself, so that the length of what it writes is known."""
    own, model.generation_config = model.generation_config, transformers.GenerationConfig()
    yield types.SimpleNamespace(bos_token_id=None, eos_token_id=NO_TOKEN)  # in a tokenizer's place
    model.generation_config = own


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no bos"])
def tokenizer(request):
    return word_tokenizer(request.param)


def edited_places(tokenizer, name, text, length):
    """The places of a text that the scope means, by its definition."""
    special, bos = u.special_ids(tokenizer), tokenizer.bos_token_id is not None
    is_text = [token not in special and (at > 0 or bos) for at, token in enumerate(text)]
    if name == "last":
        return [max(at for at in range(length) if is_text[at])]
    return [at for at, token in enumerate(text) if is_text[at] and SCOPES[name][1](at, length, token)]


@torch.no_grad()
def alone(model, sae, text, places):
    """Log-probabilities (len(text), d_vocab) of one text in one call, without a cache, latent 5 set to 9 at `places`."""

    def edit(module, args, x):
        acts = sae.encode(x)
        delta = (9.0 - acts[..., 5, None]) * sae.W_dec[5] * sae.normalise(x)[1]
        return torch.where(torch.tensor([at in places for at in range(len(text))])[:, None], x + delta, x)

    handle = model.get_submodule(HOOK).register_forward_hook(edit)
    try:
        return model(torch.tensor([text]), use_cache=False).logits[0].log_softmax(-1)
    finally:
        handle.remove()


def settings_of(way):
    return transformers.GenerationConfig(max_new_tokens=NEW, pad_token_id=0, eos_token_id=NO_TOKEN, return_dict_in_generate=True, output_logits=True, output_scores=True, length_penalty=0.0, **WAYS.get(way, {}))


def copies(way):
    return WAYS[way].get("num_beams", WAYS[way].get("num_return_sequences", 1))


def check(model, sae, tokenizer, name, way, prompts, ids, out, reached):
    """Each text that came out beside the same text alone: log-probabilities of every step, and where it was edited."""
    returned = len(out.sequences) // len(prompts)
    moved = 0.0
    for row, sequence in enumerate(out.sequences.tolist()):
        prompt = prompts[row // returned]
        text = prompt + sequence[ids.shape[1] :]
        assert len(text) == len(prompt) + NEW
        places = edited_places(tokenizer, name, text[:-1], len(prompt))  # the last token is never given to the model
        expected = alone(model, sae, text, places)[len(prompt) - 1 : -1]
        moved += (expected - alone(model, sae, text, [])[len(prompt) - 1 : -1]).abs().max().item()
        if way == "beams":
            total = expected.gather(1, torch.tensor(text[len(prompt) :])[:, None]).sum().item()
            assert total == pytest.approx(out.sequences_scores[row].item(), abs=1e-3), (name, way)
        else:
            got = torch.stack([step[row] for step in out.logits]).log_softmax(-1)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3, msg=lambda m, row=row: f"{name}, {way}, row {row}: {m}")
            if way != "lookup":  # which runs ahead, and may have been right
                assert reached[row] == len(places), (name, way)
    assert moved > 0 or not any(reached), "an edit that changes nothing shows nothing"


@pytest.mark.parametrize("way", WAYS)
def test_each_scope_lands_as_in_the_text_alone(model, tokenizer, sae, way):
    """Prompts padded on the left, and one alone; the prompts' lengths stated by hand."""
    all_prompts = PROMPTS[tokenizer.bos_token_id is not None]
    for name, (scope, _) in SCOPES.items():
        for prompts in ([all_prompts[0]], all_prompts):
            if way == "lookup" and len(prompts) > 1:
                continue
            ids, mask = u.pad(prompts, side="left")
            lengths = [len(prompt) for prompt in prompts for _ in range(copies(way))]
            with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([5], 9.0), scope=scope, prompt_lengths=lengths) as wrapper:
                if name == "last" and way.startswith("chunks"):  # its last token that is text may be in any of the parts
                    with pytest.raises(u.UserError, match="the call holds only a part of the prompt"):
                        model.generate(input_ids=ids, attention_mask=mask, generation_config=settings_of(way))
                    continue
                out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings_of(way))
            check(model, sae, tokenizer, name, way, prompts, ids, out, wrapper.tracker.reached())


@pytest.mark.parametrize("way", WAYS)
def test_our_generate_states_the_prompts(model, tokenizer, sae, way, endless):
    """By each way the same texts as one prompt alone by hand, a token at a time and without a cache."""
    prompts = PROMPTS[tokenizer.bos_token_id is not None][: 1 if way == "lookup" else 3]
    settings = {key: value for key, value in WAYS[way].items() if key != "do_sample"}
    for name, (scope, _) in SCOPES.items():
        with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([5], 9.0), scope=scope) as wrapper:
            texts = editing.generate(model, endless, prompts, NEW, float(way == "samples"), 3, **settings)
        reached = wrapper.tracker.reached()
        assert len(texts) == len(prompts) * WAYS[way].get("num_return_sequences", 1)
        if way in ("samples", "beams"):
            continue  # what comes by chance or by beams is judged above
        for prompt, got, count in zip(prompts, texts, reached, strict=True):
            text = list(prompt)
            for _ in range(NEW):
                text.append(int(alone(model, sae, text, edited_places(tokenizer, name, text, len(prompt)))[-1].argmax()))
            assert text == prompt + got, (name, way)
            assert way == "lookup" or count == len(edited_places(tokenizer, name, text[:-1], len(prompt))), (name, way)


@pytest.mark.parametrize("name", SCOPES)
def test_where_prompts_end_is_not_guessed(model, tokenizer, sae, name):
    """Nobody stated it: scopes that need it are refused, the others land where they should."""
    prompts = PROMPTS[tokenizer.bos_token_id is not None]
    ids, mask = u.pad(prompts, side="left")
    for way in ("greedy", "samples", "beams", "no cache", "chunks", "chunks of one"):
        with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([5], 9.0), scope=SCOPES[name][0]) as wrapper:
            generate = lambda: model.generate(input_ids=ids, attention_mask=mask, generation_config=settings_of(way))
            if name in STATED:
                with pytest.raises(u.UserError, match=r"hangs on where each prompt ends, .* \(transformers \d.*\); generate with editing.generate, or pass prompt_lengths"):
                    generate()
                continue
            out = generate()
        check(model, sae, tokenizer, name, way, prompts, ids, out, wrapper.tracker.reached())


def test_a_call_without_a_cache_is_a_prompt_as_a_whole(model, tokenizer, sae):
    prompts = PROMPTS[tokenizer.bos_token_id is not None]
    for name, (scope, _) in SCOPES.items():
        for prompt in prompts:
            with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([5], 9.0), scope=scope):
                found = [model(torch.tensor([prompt]), **mask).logits[0].log_softmax(-1) for mask in ({}, {"attention_mask": torch.ones(1, len(prompt))})]
            for got in found:
                torch.testing.assert_close(got, alone(model, sae, prompt, edited_places(tokenizer, name, prompt, len(prompt))), rtol=1e-3, atol=1e-3)


def test_arguments_by_position_and_padding_on_the_right(model, tokenizer, sae):
    prompts = PROMPTS[tokenizer.bos_token_id is not None]
    for side in ("left", "right"):
        ids, mask = u.pad(prompts, side=side)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        for name, (scope, _) in SCOPES.items():
            with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([5], 9.0), scope=scope):
                found = model(ids, mask, positions).logits, model(ids, mask, position_ids=positions, use_cache=False).logits
            for row, prompt in enumerate(prompts):
                expected = alone(model, sae, prompt, edited_places(tokenizer, name, prompt, len(prompt)))
                for got in found:
                    torch.testing.assert_close(got[row][mask[row].bool()].log_softmax(-1), expected, rtol=1e-3, atol=1e-3)


def cache_of(output):
    return next(value for value in output.values() if hasattr(value, "get_seq_length"))


def cache_name(model):
    """What this version calls the argument for the cache."""
    import inspect

    return next(name for name in ("cache", "past_key_values") if name in inspect.signature(model.forward).parameters)


@pytest.mark.parametrize("name", SCOPES)
def test_a_second_turn_on_a_kept_cache(model, tokenizer, sae, name):
    """The whole text is edited as if it had been run at once; where the second prompt ends is not guessed."""
    first, more = PROMPTS[tokenizer.bos_token_id is not None][0], [10, 6, 22]
    with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([5], 9.0), scope=SCOPES[name][0]) as wrapper:
        if name in STATED:
            with pytest.raises(u.UserError, match="hangs on where each prompt ends"):
                out = model(torch.tensor([first]))
                model(torch.tensor([more]), **{cache_name(model): cache_of(out)})
            return
        turn = model.generate(input_ids=torch.tensor([first]), generation_config=settings_of("greedy"))
        both = torch.cat([turn.sequences, torch.tensor([more])], 1)
        out = model.generate(input_ids=both, attention_mask=torch.ones_like(both), generation_config=settings_of("greedy"), **{cache_name(model): cache_of(turn)})  # generate would leave out a padding token that the model wrote
    prompt = both[0].tolist()
    check(model, sae, tokenizer, name, "greedy", [prompt], both, out, wrapper.tracker.reached())


@pytest.mark.parametrize("name", ["last", "prompt", "generated"])
def test_a_second_turn_may_state_its_own_prompt(model, tokenizer, sae, name):
    """Then the prompt is the whole conversation so far: nothing of the first turn's statement is left over."""
    first, more = PROMPTS[tokenizer.bos_token_id is not None][0], [10, 6, 22]
    with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([5], 9.0), scope=SCOPES[name][0]) as wrapper:
        with editing.stating(model, [first]):
            turn = model.generate(input_ids=torch.tensor([first]), generation_config=settings_of("greedy"))
        reached = wrapper.tracker.reached()
        prompt = turn.sequences[0].tolist() + more
        with editing.stating(model, [prompt]):
            ids = torch.tensor([prompt])
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings_of("greedy"), **{cache_name(model): cache_of(turn)})
        second = wrapper.tracker.reached()
    text, kept = out.sequences[0].tolist(), len(prompt) - len(more) - 1  # positions that the cache held
    early = edited_places(tokenizer, name, prompt[:kept], len(first))
    late = [at for at in edited_places(tokenizer, name, text[:-1], len(prompt)) if at >= kept]
    assert reached == [len(early)] and second == [len(early) + len(late)]
    expected = alone(model, sae, text, early + late)[len(prompt) - 1 : -1]
    torch.testing.assert_close(torch.stack([step[0] for step in out.logits]).log_softmax(-1), expected, rtol=1e-3, atol=1e-3)


def test_two_caches_in_turn(model, tokenizer, sae):
    """Conversations that take turns inside one context are told apart by their caches."""
    texts = [first + more for first, more in zip(PROMPTS[tokenizer.bos_token_id is not None], ([10, 6], [11, 12, 6], [21]), strict=True)]
    found = []
    with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([5], 9.0), scope=SCOPES["tokens"][0]):
        caches = [cache_of(model(torch.tensor([text[:2]]))) for text in texts]
        for at in (2, 3):
            for text, cache in zip(texts, caches, strict=True):
                found.append((text[: at + 1], model(torch.tensor([text[at : at + 1]]), **{cache_name(model): cache}).logits[0, -1].log_softmax(-1)))
    for text, got in found:
        torch.testing.assert_close(got, alone(model, sae, text, edited_places(tokenizer, "tokens", text, len(text)))[-1], rtol=1e-3, atol=1e-3)


REFUSED = {
    "a cache from before": (lambda m, ids, cache: m(ids, **{cache_name(m): cache}), "the cache holds 6 positions that were not computed in this context"),
    "inputs_embeds": (lambda m, ids, cache: m(inputs_embeds=m.get_input_embeddings()(ids)), "there are no input_ids"),
    "inputs_embeds written on": (lambda m, ids, cache: m.generate(inputs_embeds=m.get_input_embeddings()(ids), max_new_tokens=2), "there are no input_ids"),
    "the base model": (lambda m, ids, cache: m.model(ids), "outside a call of the model"),
    "the base model after a call": (lambda m, ids, cache: (m(ids), m.model(ids)), "outside a call of the model"),
    "a static cache": (lambda m, ids, cache: m.generate(input_ids=ids, max_new_tokens=3, cache_implementation="static"), "does not say for each of .* positions whether it is padding"),
    "a mask of four dimensions": (lambda m, ids, cache: m(ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool)), r"the attention mask \(shape \(1, 1, 6, 6\)\)"),
    "a mask of another length": (lambda m, ids, cache: m(ids, attention_mask=torch.ones(1, 9)), r"the attention mask \(shape \(1, 9\)\)"),
    "positions from elsewhere": (lambda m, ids, cache: m(ids, position_ids=torch.arange(7, 13)[None]), "position_ids say that tokens stand elsewhere"),
    "an object of another kind": (lambda m, ids, cache: m(ids, memory=object()), "the argument memory is a object, which may say where tokens stand"),
    "a mask that forgets padding": (lambda m, ids, cache: m(ids, attention_mask=None, **{cache_name(m): cache_of(m(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]])))}), "has padding elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_in_one_sentence(model, word_bos, sae, case):
    ids = torch.tensor([PROMPTS[True][0]])
    cache = cache_of(model(ids))
    run, message = REFUSED[case]
    with editing.intervene(model, HOOK, sae, word_bos, editing.set_value([5], 9.0)), pytest.raises(u.UserError, match=message) as refused:
        run(model, ids, cache)
    assert "\n" not in str(refused.value) and f"transformers {transformers.__version__}" in str(refused.value)
    assert torch.isfinite(model(ids).logits).all() and not model._forward_hooks  # and the model is as it was


@pytest.fixture(scope="module")
def word_bos():
    return word_tokenizer()


def test_a_prefix_cache_given_to_a_batch_is_refused(model, tokenizer, sae):
    prefix = PROMPTS[tokenizer.bos_token_id is not None][0][:4]
    for inside in (True, False):
        with editing.intervene(model, HOOK, sae, tokenizer, editing.set_value([5], 9.0)) as wrapper:
            if not inside:
                wrapper.tracker.sequences.clear()
            cache = cache_of(model(torch.tensor([prefix]), use_cache=True))
            if not inside:
                wrapper.tracker.sequences.clear()
            cache.batch_repeat_interleave(3)
            ids = torch.tensor([[*prefix, 9, 10], [*prefix, 11, 12], [*prefix, 6, 7]])
            with pytest.raises(u.UserError, match="the cache was filled with 1 texts, and the call has 3" if inside else "were not computed in this context"):
                model.generate(input_ids=ids, generation_config=settings_of("greedy"), **{cache_name(model): cache})


def test_stated_prompts_must_be_the_models(model, word_bos, sae):
    ids = torch.tensor([PROMPTS[True][0]])
    with editing.intervene(model, HOOK, sae, word_bos, editing.set_value([5], 9.0)):
        with editing.stating(model, [[3, 9, 9]]), pytest.raises(u.UserError, match="other prompts than were stated"):
            model(ids)
        with editing.stating(model, PROMPTS[True]), pytest.raises(u.UserError, match="3 prompts were stated, and the call has 1 texts"):
            model(ids)
    with editing.intervene(model, HOOK, sae, word_bos, editing.set_value([5], 9.0), prompt_lengths=[4, 4]), pytest.raises(u.UserError, match="2 prompt_lengths, and the call has 1"):
        model(ids)


def test_the_last_token_that_is_text(model, word_bos, sae):
    """A prompt that ends in special tokens, as a chat template may: the edit is at the last word before them."""
    prompt = [3, 5, 6, 7, 1, 1]
    for scope, places in (("last", [3]), ([-1], []), ([-3], [3]), ([3, -1], [3])):
        with editing.intervene(model, HOOK, sae, word_bos, editing.set_value([5], 9.0), scope=scope) as wrapper:
            got = editing.next_logprobs(model, [prompt])[0]
        torch.testing.assert_close(got, alone(model, sae, prompt, places)[-1], rtol=1e-3, atol=1e-3)
        assert wrapper.tracker.reached() == [len(places)]


@pytest.mark.parametrize("family", FAMILIES)
def test_scopes_in_every_family(family, word_bos, endless):
    """Written with a cache and padding as without a cache, edited at as many places as the scope has."""
    model, hook = tiny_family(family)
    model.generation_config = transformers.GenerationConfig()
    sae = u.SAE(16, 40, seed=1).requires_grad_(False)
    prompts, special = [[3, 5, 6, 7, 8], [3, 9, 20]], u.special_ids(word_bos)
    for scope in ("all", "generated", "last"):
        with editing.intervene(model, hook, sae, word_bos, editing.set_value([3], 5.0), scope=scope) as wrapper:
            texts = editing.generate(model, endless, prompts, NEW)
            reached = wrapper.tracker.reached()
            assert texts == editing.generate(model, endless, prompts, NEW, use_cache=False)
        for prompt, text, count in zip(prompts, texts, reached, strict=True):
            written = sum(token not in special for token in text[:-1])
            assert count == {"all": len(prompt) - 1 + written, "generated": written, "last": 1}[scope]


def test_absolute_positions_and_one_id_for_both_ends(sae):
    """GPT-2, whose tokenizer has one id for BOS and EOS: written a token at a time, as the whole text."""
    model, tokenizer = gpt2(), word_tokenizer()
    hook = "transformer.h.1.mlp.c_proj"
    with editing.intervene(model, hook, sae, tokenizer, editing.set_value([5], 9.0), scope="last"):
        together = editing.generate(model, tokenizer, PROMPTS[True][1:], 4)
        assert together == [editing.generate(model, tokenizer, [prompt], 4, use_cache=False)[0] for prompt in PROMPTS[True][1:]]


@pytest.mark.parametrize("scope", ["everywhere", 3, None, [1.5], ["last"], lambda ids: ids, lambda ids: ids[:, :1] > 0])
def test_scopes_that_are_none_are_refused(model, word_bos, sae, scope):
    with editing.intervene(model, HOOK, sae, word_bos, editing.set_value([5], 9.0), scope=scope), pytest.raises(u.UserError, match="scope"):
        model(torch.tensor([[3, 5]]))


def test_the_gemma_here_has_both_kinds_of_attention():
    assert set(gemma().config.layer_types) == {"sliding_attention", "full_attention"}
