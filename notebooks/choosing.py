"""What an experiment with edits is about: which word or topic, which latents, which places. What is chosen is chosen
without the half of the held-out text that tries it."""

import math
import re
import unicodedata
from contextlib import contextmanager

import torch
from torch import Tensor

import editing
import sae_utils
from sae_utils import UserError

# Letters of scripts that put no space between words: Thai to Tibetan, Burmese, Khmer, kana, Chinese characters.
UNSPACED = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
LONGEST = 64  # tokens of a place's text: what is measured there is paid for by the token
LEAST_CERTAIN = 0.1  # the probability of the model's first choice at a place where an edit is tried
ENOUGH = 4  # places on which a candidate is tried; those tried on fewer come last
LEAST_F1 = 0.2  # below which a latent does not announce its word
ROUNDING = 1e-3  # of log-odds, between batches of other sizes


# ---------------------------------------------------------------------------------------------
# Halves of the held-out text, and what follows each row
# ---------------------------------------------------------------------------------------------


def second_half(held_out: Tensor, owner, seed: int = 0) -> Tensor:
    """(windows,) boolean: the half of the held-out windows on which is tried what was chosen on the other. `held_out`
    (windows,), boolean; `owner` (windows,) each one's document.

    Documents are taken in a random order, since the first ones may be from another source than the last, and the cut
    runs where one ends, as near to the middle as may be; of one long document the second half is tried. UserError where there is a single window.
    """
    windows, owner = held_out.nonzero().flatten(), torch.as_tensor(owner)
    documents, number = owner[windows].unique(return_inverse=True)
    place = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))[number]
    windows, place = windows[place.argsort(stable=True)], place.sort().values
    borders = (place[1:] != place[:-1]).nonzero().flatten() + 1  # where another document begins
    half = len(windows) // 2
    half = int(borders[(borders - half).abs().argmin()]) if len(borders) else half
    if half == 0:
        raise UserError("the held-out text is a single window: there is nothing to choose and to try on.")
    return torch.zeros_like(held_out).index_fill_(0, windows[half:], True)


def followers(rows) -> Tensor:
    """(N,): the token that follows each row, -1 where its window ends."""
    flat = torch.tensor([t for window in rows.windows for t in [*window, -1]])
    begins = torch.tensor([0, *[len(window) + 1 for window in rows.windows]]).cumsum(0)
    return flat[begins[rows.window] + rows.position + 1]


# ---------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------


def letters(text: str) -> bool:
    """Whether a text is letters alone, with the marks that belong to them."""
    return bool(text) and all(unicodedata.category(c)[0] in "LM" for c in text) and unicodedata.category(text[0])[0] == "L"


def begins_word(text: str) -> bool:
    """Whether a token's text may be a word from its beginning: letters after a space, or of a script without spaces."""
    return letters(text.removeprefix(" ")) and (text[0] == " " or bool(UNSPACED.match(text)))


def whole_words(token: Tensor, next_token: Tensor, as_text, most_continued: float = 0.1) -> set[int]:
    """The tokens that are words by themselves in a text: they begin one, and letters that go on with it follow at most
    in a share `most_continued` of the places. `token` (n,), `next_token` (n,): the text's pairs of neighbours."""
    pairs, counts = torch.stack([token, next_token], 1)[next_token >= 0].unique(dim=0, return_counts=True)
    total, continued = {}, {}
    for (a, b), n in zip(pairs.tolist(), counts.tolist(), strict=True):
        total[a] = total.get(a, 0) + n
        continued[a] = continued.get(a, 0) + n * letters(as_text(b)[:1])
    spaced = lambda a: not UNSPACED.search(as_text(a))
    return {a for a, n in total.items() if begins_word(as_text(a)) and not (spaced(a) and continued[a] > most_continued * n)}


def frequent_words(token: Tensor, next_token: Tensor, as_text, most: int = 200) -> list[int]:
    """Of the text's `whole_words` the `most` that most often come next, the most frequent first."""
    words = whole_words(token, next_token, as_text)
    follow, counts = next_token.unique(return_counts=True)
    return [t for t in follow[counts.argsort(descending=True, stable=True)].tolist() if t in words][:most]


def token_of(tokenizer, word: str, seen: Tensor) -> int:
    """The token of a word: of those it may have, with a space in front or without, the one `seen` (n,) most often.
    UserError where it is not one token, or not seen."""
    forms = dict.fromkeys([word, " " + word.strip(), word.strip()])
    ids = [ids[0] for ids in sae_utils.encode_text(tokenizer, list(forms)) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id]
    if not ids:
        (whole,) = sae_utils.encode_text(tokenizer, [word])
        raise UserError(f"{word!r} is {len(whole)} tokens for this model, not one: {[tokenizer.decode([i]) for i in whole]}.")
    best = max(ids, key=lambda i: int((seen == i).sum()))
    if not (seen == best).any():
        raise UserError(f"{word!r} never comes up in the held-out text: choose a word that does.")
    return best


def count_words(text: str, words: list[str]) -> int:
    """How often one of the words stands in a text: whole words, in capitals or not; in scripts that put no space between
    words, wherever its letters stand."""
    bounded = lambda word: re.escape(word) if UNSPACED.search(word) else rf"(?<!\w){re.escape(word)}(?!\w)"
    return len(re.findall("|".join(bounded(word) for word in sorted(words, key=len, reverse=True)), text, re.IGNORECASE))


# ---------------------------------------------------------------------------------------------
# Latents: where they fire, and what they do
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def announce_f1(sae: sae_utils.SAE, activations: Tensor, index: Tensor, next_token: Tensor, words: list[int], chunk: int = 4096) -> Tensor:
    """F1 (len(words), d_sae) of each latent, over the rows `index`, for 'this word comes next', at the best of three
    thresholds: a tenth, a quarter and half of its maximum. `next_token` (N,) of every row.

    Products of 0/1 matrices count how often a latent is on and the word follows; nothing larger than a chunk is held.
    """
    device = sae.W_enc.device
    is_word, shares, said = torch.tensor(words)[:, None], (0.1, 0.25, 0.5), 0
    both, fired = [0] * len(shares), [0] * len(shares)
    for part in index.split(chunk):
        acts = sae.encode(activations[part].to(device))
        follows = (next_token[part] == is_word).float().to(device)
        said = said + follows.sum(1, keepdim=True)
        for i, share in enumerate(shares):
            on = (acts > share * sae.max_act).float()
            both[i], fired[i] = both[i] + follows @ on, fired[i] + on.sum(0)
    return torch.stack([2 * b / (f + said).clamp_min(1) for b, f in zip(both, fired, strict=True)]).amax(0).cpu()


def log_odds(logprobs: Tensor, tokens: int | list[int]) -> Tensor:
    """ln(p / (1 - p)) of a token, or of any of several, (…,), from log-probabilities (…, d_vocab); in float64, since a
    sure model leaves 1 - p only a few digits."""
    tokens = [tokens] if isinstance(tokens, int) else tokens
    logp = logprobs[..., tokens].double().logsumexp(-1)
    return logp - torch.log1p(-logp.exp().clamp_max(1 - 1e-12))


# ---------------------------------------------------------------------------------------------
# Places: what the model says there by itself
# ---------------------------------------------------------------------------------------------


def survey(model, rows, index: Tensor, next_token: Tensor, words: list[int], seed: int = 0, tokens: int = 6000) -> dict:
    """What the model says at places where one of `words` comes, among the rows `index`: {prompts, window (n,), says (n,),
    value (n,), odds (n, len(words)), words}: the text up to each place as token ids and the window it is from, the first
    choice there, its probability, and the log-odds of each of the words. Of windows in random order as many are run as come to `tokens`, none beyond
    LONGEST tokens; at most eight places each. `next_token` (N,) as `followers` gives it. UserError where there is no word."""
    if not words:
        raise UserError("no token of this model is a word by itself in this text, as where each is a part of a character: there is no word to bring; choose a model whose tokens are words of it.")
    fits = index[torch.isin(next_token[index], torch.tensor(words)) & (rows.position[index] < LONGEST)]
    by_window: dict[int, list[int]] = {}
    for window, position in zip(rows.window[fits].tolist(), rows.position[fits].tolist(), strict=True):
        by_window.setdefault(window, []).append(position)
    windows, drawn, texts, places = list(by_window), [], [], []
    for i in torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist():
        if tokens > 0:
            drawn.append(windows[i])
            places.append(sorted(by_window[windows[i]])[-8:])
            texts.append(rows.windows[windows[i]][: places[-1][-1] + 1])
            tokens -= len(texts[-1])
    prompts, window, says, value, odds = {}, [], [], [], [torch.zeros(0, len(words))]
    for number, text, place, logprobs in zip(drawn, texts, places, editing.logprobs_at(model, texts, places, texts), strict=True):
        new = [i for i, position in enumerate(place) if tuple(text[: position + 1]) not in prompts]  # a text that comes twice counts once
        prompts |= dict.fromkeys(tuple(text[: place[i] + 1]) for i in new)
        window += [number] * len(new)
        says += logprobs[new].argmax(1).tolist()
        value += logprobs[new].amax(1).exp().tolist()
        odds.append(log_odds(logprobs[new][:, words, None], 0).float())
    return {"prompts": [list(text) for text in prompts], "window": window, "says": torch.tensor(says, dtype=torch.long), "value": torch.tensor(value), "odds": torch.cat(odds), "words": words}


def certain(seen: dict, words, at_most: int) -> tuple[list[int], float]:
    """(places, least): the at most `at_most` places in `seen` (`survey`), one a window, where one of `words` is the
    model's first choice with the largest probability, none below LEAST_CERTAIN; and the smallest of these."""
    says_one, found = torch.isin(seen["says"], torch.tensor(sorted(words), dtype=torch.long)), {}
    for place in seen["value"].argsort(descending=True, stable=True).tolist():
        if says_one[place] and seen["value"][place] >= LEAST_CERTAIN:
            found.setdefault(seen["window"][place], place)
    places = list(found.values())[:at_most]
    return places, min(seen["value"][places].tolist(), default=0.0)


def rivals(word: int, seen: dict, most: int = 10, places: int = 30) -> list[int]:
    """Words that the model says where `word` is its next best guess: of the `places` at which it says another one of
    the words in `seen` (`survey`) and `word` has the highest log-odds, what it says there, the most frequent first."""
    says = seen["says"]
    other = torch.isin(says, torch.tensor(seen["words"])) & (says != word)
    odds = torch.where(other, seen["odds"][:, seen["words"].index(word)], -math.inf)
    best = odds.argsort(descending=True, stable=True)[: min(places, int(other.sum()))]
    found, counts = says[best].unique(return_counts=True)
    return found[counts.argsort(descending=True, stable=True)][:most].tolist()


def own_latents(words: list[int], f1: Tensor, taken: list[int] = (), least: float = LEAST_F1) -> dict[int, int]:
    """{word: the latent that announces it best}, no latent for two words: each word in turn takes the best one that is
    left, and words for which none reaches an F1 of `least` are left out. `f1` (len(words), d_sae)."""
    found, taken = {}, set(taken)
    for word, scores in zip(words, f1, strict=True):
        scores = scores.clone()
        scores[list(taken)] = 0
        if scores.max() >= least:
            found[word] = int(scores.argmax())
            taken.add(found[word])
    return found


def slopes(model, tokenizer, hook_name: str, sae: sae_utils.SAE, texts: list[list[int]], places: list, prompts: list[list[int]], target: list[int], scope, like: list[int] = ()) -> Tensor:
    """(d_sae,): to first order, the mean change over all `places` of `texts` (as for `editing.logprobs_at`) of the
    log-odds that one of the tokens `target` comes next, less the change for `like` where these are given, where a
    latent is raised by its largest activation at the positions in `scope`."""
    ids, mask = sae_utils.pad(texts, device=model.device)
    tracker, most = editing.TokenTracker(tokenizer), max(map(len, places))
    with editing.stating(model, prompts):
        tracker(model, (), {"input_ids": ids, "attention_mask": mask})
    index = torch.tensor([[*place, *[0] * (most - len(place))] for place in places], device=ids.device)
    there = torch.tensor([[True] * len(place) + [False] * (most - len(place)) for place in places], device=ids.device)
    with editing.to_differentiate(model, hook_name) as caught:
        logits = editing.logits_at(model, ids, mask, index)
        logprobs = logits[there].float().log_softmax(-1)
        odds = log_odds(logprobs, target) - (log_odds(logprobs, like) if like else 0.0)
        (gradient,) = torch.autograd.grad(odds.mean(), caught["x"])
    with torch.no_grad():
        _, norm = sae.normalise(caught["x"].detach())
        pushed = torch.where(tracker.where(scope)[:, :, None], (gradient.float() * norm).reshape(*ids.shape, -1), 0.0).sum((0, 1))
        return (sae_utils.linear(pushed, sae.W_dec) * sae.max_act).cpu()


# ---------------------------------------------------------------------------------------------
# A word, and the latents that bring it
# ---------------------------------------------------------------------------------------------


def tried(model, tokenizer, hook_name: str, sae: sae_utils.SAE, pairs: list[tuple], seen: dict, places: list[int], word: int) -> dict:
    """What an edit, (patch, scope) `pairs`, does at `places` of `seen` (`survey`): {change, beyond, first, of}, the mean
    change of the log-odds of `word`, by how much that exceeds the median change of all the words (a blow moves every
    rare word up), and at how many of the places the word is then the first choice."""
    with editing.intervene(model, hook_name, sae, tokenizer, pairs):
        after = editing.next_logprobs(model, [seen["prompts"][place] for place in places])
    moved = log_odds(after[:, seen["words"], None], 0) - seen["odds"][places]
    change = moved[:, seen["words"].index(word)]
    return {"change": change.mean().item(), "beyond": (change - moved.median(1).values).mean().item(), "first": int((after.argmax(1) == word).sum()), "of": len(places)}


def candidates(model, tokenizer, hook_name: str, sae: sae_utils.SAE, seen: dict, f1: Tensor, pairs_of, scope, *, target=None, sources=(), latents=(), lowers=False, most: int = 10) -> list[dict]:
    """Words with latents and what an edit of these does at places of `seen` (`survey`), the best first: {word, sources,
    own, latents, f1, change, beyond, first, of}; the best are those that bring their word most often, then those that move
    it farthest beyond others (down, with `lowers`); those tried on fewer than ENOUGH places come last.

    Words are `target` alone, or the `most` that a latent announces best of those that the model says itself. `f1`
    (len(seen["words"]), d_sae) is of all the words in `seen`; `pairs_of(latents)` gives the edit's (patch, scope)
    pairs; `scope` is where it lands. Latents tried for a word are `latents` together, or the two that announce it best
    and the two that the gradient puts first, one by one. A word's `sources` are given or its `rivals`; `own` {source:
    latent} are those with a latent of their own, and without sources given only they are kept.
    """
    words, often = seen["words"], seen["says"].bincount(minlength=max(seen["words"]) + 1)
    live = (sae.density > 0).cpu()
    ranked = [words[i] for i in f1[:, latents or slice(None)].amax(1).argsort(descending=True, stable=True).tolist()]
    names = [target] if target is not None else [word for word in ranked if often[word] >= 2][:most]
    found = []
    for word in names:
        scores = f1[words.index(word)]
        between = list(sources) or rivals(word, seen)
        own = own_latents(between, f1[[words.index(s) for s in between]], [*latents, int(scores.argmax())])
        between = list(sources) or list(own) or (between if target is not None else [])
        places, _ = certain(seen, [word] if lowers else between, 6)
        if not places:
            continue
        pool = [list(latents)] if latents else [[i] for i in scores.topk(2).indices.tolist() if scores[i] > 0]
        if not latents:
            prompts = [seen["prompts"][place] for place in places]
            slope = slopes(model, tokenizer, hook_name, sae, prompts, [[len(prompt) - 1] for prompt in prompts], prompts, [word], scope)
            pool += [[i] for i in torch.where(live, -slope if lowers else slope, -math.inf).topk(2).indices.tolist() if [i] not in pool]
        for group in pool:
            facts = {"word": word, "sources": between, "own": {s: i for s, i in own.items() if i not in group}, "latents": group, "f1": scores[group].max().item()}
            found.append(facts | tried(model, tokenizer, hook_name, sae, pairs_of(group), seen, places, word))
    sign = -1 if lowers else 1
    return sorted(found, key=lambda c: (c["of"] < ENOUGH, not math.isfinite(c["beyond"]), -sign * c["first"] / c["of"], -sign * c["beyond"]))


# ---------------------------------------------------------------------------------------------
# A topic, and the latents that bring it
# ---------------------------------------------------------------------------------------------


def check_words(topic_words: list, target_word: str, source_words: list) -> None:
    """UserError where the words of a topic or those to replace are not words, or where they contradict the target."""
    for name, words in (("topic_words", topic_words), ("source_words", source_words)):
        for word in words:
            if not isinstance(word, str) or not word.strip():
                raise UserError(f"{name}: a word is a text, not {word!r} (in YAML, quotes make one of a number, and of yes and no).")
    if topic_words and target_word:
        raise UserError("topic_words and target_word are two experiments: name one of them.")
    if target_word and target_word.strip() in [word.strip() for word in source_words]:
        raise UserError(f"target_word {target_word.strip()!r} is among source_words: a word does not replace itself.")


def topic_tokens(tokenizer, words: list[str]) -> list[int]:
    """The tokens that are one of the words: with a space in front, capitalised, or both; without either only in scripts
    that put no space between words, since elsewhere such a token is mostly a piece of another word. UserError where no
    word is a single token."""
    forms = dict.fromkeys(form for word in words for form in (f" {word}", f" {word.capitalize()}", word.capitalize(), *[word] * bool(UNSPACED.search(word))))
    ids = {ids[0] for ids in sae_utils.encode_text(tokenizer, list(forms)) if len(ids) == 1} - {tokenizer.unk_token_id}
    if not ids:
        raise UserError(f"topic_words: none of {', '.join(words)} is a single token for this model: name other words, or latents.")
    return sorted(ids)


def as_frequent(token: Tensor, next_token: Tensor, as_text, tokens: list[int], times: int = 10, seed: int = 0) -> list[int]:
    """`times` as many words as `tokens`, or as many as there are: `whole_words` of a text (its pairs of neighbours,
    as there), none of `tokens`, drawn for each of these from words a third to three times as frequent."""
    words = torch.tensor(sorted(whole_words(token, next_token, as_text) - set(tokens)), dtype=torch.long)
    counts, generator, found = token.bincount(minlength=max(tokens) + 1), torch.Generator().manual_seed(seed), set()
    for own in counts[tokens].clamp_min(1).tolist():
        alike = words[(3 * counts[words] >= own) & (counts[words] <= 3 * own)].tolist()
        alike = [word for word in alike if word not in found]
        found |= {alike[i] for i in torch.randperm(len(alike), generator=generator)[:times].tolist()}
    return sorted(found)


def odds_of_mean(probabilities: Tensor) -> Tensor:
    """ln(m / (1 - m)), (…,) in float64, of the mean m over the first dimension of probabilities (n, …)."""
    return probabilities.double().mean(0).logit(1e-12)


@contextmanager
def listening(model, sets: list[list[int]]):
    """While the context lasts, each call of `model` adds to the list that it yields, (batch, len(sets)) in float64, the
    probability that one of the tokens in each of `sets` follows the last column. Inside `editing.generate` that is
    once for each token that it chooses."""
    heard = []

    def note(module, args, output):
        logits = output.logits[:, -1].float()
        total = logits.logsumexp(-1).double()
        heard.append(torch.stack([(logits[:, tokens].logsumexp(-1).double() - total).exp().cpu() for tokens in sets], 1))

    handle = model.register_forward_hook(note)
    try:
        yield heard
    finally:
        handle.remove()


def write(model, tokenizer, prompts: list[list[int]], sets: list[list[int]], max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> tuple[list[list[int]], Tensor]:
    """(texts, odds): what `editing.generate` writes after each of the prompts, and how much of it is about some words,
    (prompts, len(sets)) in float64: the log-odds of the mean probability, over the places where a token of the text or its
    end was chosen, that one of the tokens in each of `sets` comes there. Probabilities are those of the model as it
    is, edits included."""
    if not sets:
        return editing.generate(model, tokenizer, prompts, max_new_tokens, temperature, seed), torch.zeros(len(prompts), 0)
    with listening(model, sets) as heard:
        texts = editing.generate(model, tokenizer, prompts, max_new_tokens, temperature, seed)
    said = torch.stack(heard, 1)  # (prompts, steps, sets); a text that has ended is led on by padding
    return texts, torch.stack([odds_of_mean(row[: len(text) + 1]) for row, text in zip(said, texts, strict=True)])


def repeated(texts: list[list[int]]) -> float:
    """Share of the texts' tokens that stand in their own text before."""
    return 1 - sum(len(set(ids)) for ids in texts) / max(1, sum(map(len, texts)))


def openings(rows, index: Tensor, n: int, length: int = 12) -> list[list[int]]:
    """The first `length` text tokens, with BOS where there is one, of `n` windows at equal steps among the rows `index`."""
    windows = rows.window[index].unique()
    chosen = windows[torch.linspace(0, len(windows) - 1, min(n, len(windows))).long()].tolist()
    return [rows.windows[window][: length + 1] for window in chosen]


def some_rows(rows, without: Tensor, seed: int = 0, most: int = 20_000) -> Tensor:
    """Rows of windows in random order until they are `most`, none of those in `without` (N,), nor any that is not finite."""
    fits = rows.finite & ~without
    windows = rows.window[fits].unique()
    order = torch.empty(len(rows.windows), dtype=torch.long)
    order[windows] = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    index = fits.nonzero().flatten()
    last = order[rows.window[index]].bincount().cumsum(0).le(most).sum()  # windows that fit
    return index[order[rows.window[index]] < max(1, int(last))]


@torch.no_grad()
def share_in_topic(sae: sae_utils.SAE, rows, index: Tensor, tokens: list[int], least: int = 2, chunk: int = 4096) -> Tensor:
    """(d_sae,): which share of a latent's activation, over the rows `index`, lies in windows that hold at least `least` of
    the topic's `tokens`; 0 for latents that fire on fewer than 15 of the rows."""
    said = torch.isin(rows.token_ids[index], torch.tensor(tokens)).long()
    topical = torch.zeros(len(rows.windows), dtype=torch.long).index_add_(0, rows.window[index], said) >= least
    inside, total, fired = 0, 0, 0
    for part in index.split(chunk):
        acts = sae.encode(rows.activations[part].to(sae.W_enc.device)).cpu()
        inside, total, fired = inside + acts[topical[rows.window[part]]].sum(0), total + acts.sum(0), fired + (acts > 0).sum(0)
    return torch.where(fired >= 15, inside / total.clamp_min(1e-9), 0.0)


def topic_pool(model, tokenizer, hook_name: str, sae: sae_utils.SAE, rows, index: Tensor, next_token: Tensor, tokens: list[int], like: list[int], prompts: list[list[int]], written: list[list[int]], scope, most: int = 3, lowers: bool = False) -> dict[int, str]:
    """{latent: why} that may bring a topic of which `tokens` are the words, `most` of two kinds and four times as many of the
    third, where those that do most stand anywhere among the first dozen: "text", the largest
    shares of their activation lie in text about it (`share_in_topic`, rows `index`); "words", they fire best on its words
    or before them (`announce_f1`); "gradient", they would raise the log-odds of its words most, beyond those of `like`,
    words as frequent, in what the model has `written` after `prompts` (`slopes`). `next_token` (N,) as `followers` gives it."""
    either = (torch.isin(rows.token_ids, torch.tensor(tokens)) | torch.isin(next_token, torch.tensor(tokens))).long()
    texts = [prompt + more for prompt, more in zip(prompts, written, strict=True)]
    places = [range(len(prompt) - 1, len(text)) for prompt, text in zip(prompts, texts, strict=True)]
    ranked = {
        "text": share_in_topic(sae, rows, index, tokens), "words": announce_f1(sae, rows.activations, index, either, [1])[0],
        "gradient": (-1 if lowers else 1) * slopes(model, tokenizer, hook_name, sae, texts, places, prompts, tokens, scope, like),
    }  # fmt: skip
    live, found = (sae.density > 0).cpu(), {}
    for why, scores in ranked.items():
        taken = min(4 * most if why == "gradient" else most, int(live.sum()))
        for latent in torch.where(live, scores, -math.inf).topk(taken).indices.tolist():
            found.setdefault(latent, why)
    return found


def topic_candidates(model, tokenizer, hook_name: str, sae: sae_utils.SAE, prompts: list[list[int]], written: list[list[int]], pool: dict, sets: list[list[int]], pairs_of, lowers: bool = False) -> list[dict]:
    """Latents of `pool` {latent: why} and what an edit of each, (patch, scope) `pairs_of([latent])`, does to a topic in
    what the model has `written` after `prompts`, the best first: {latents, why, change, beyond}. change: of the log-odds
    of the mean probability that a token of the topic comes next, the mean over the texts; beyond: by how much that
    exceeds the change for words as frequent. `sets`: the tokens of both. With `lowers` the best are those that lower it most."""
    texts = [prompt + more for prompt, more in zip(prompts, written, strict=True)]
    places = [range(len(prompt) - 1, len(text)) for prompt, text in zip(prompts, texts, strict=True)]

    def odds() -> Tensor:
        heard = (torch.stack([row[:, tokens].double().exp().sum(1) for tokens in sets], 1) for row in editing.logprobs_at(model, texts, places, prompts))
        return torch.stack([odds_of_mean(said) for said in heard]).mean(0)

    before, found = odds(), []
    for latent, why in pool.items():
        with editing.intervene(model, hook_name, sae, tokenizer, pairs_of([latent])):
            change, like = (odds() - before).tolist()
        found.append({"latents": [latent], "why": why, "change": change, "beyond": change - like})
    return sorted(found, key=lambda c: (not math.isfinite(c["beyond"]), c["beyond"] if lowers else -c["beyond"]))


def topic_trials(model, tokenizer, hook_name: str, sae: sae_utils.SAE, prompts: list[list[int]], own: tuple, arms: list[tuple], sets: list[list[int]], pairs_of, at_once: int = 96) -> list[dict]:
    """What edits make the model write after `prompts`, as many tokens as by itself, `own` as `write` gives it: {latents,
    strength, change, beyond, rise, of, cost, repeats} for each of `arms` (latents, strength), whose (patch, scope)
    pairs are `pairs_of(latents, strength)`.

    change: of the log-odds of the topic in the texts (`write`), their mean; beyond: by how much that exceeds the change
    for words as frequent (`sets`: the tokens of both); rise: texts whose log-odds rise; cost: nats per token by which the
    text surprises the unpatched model more than its own does; repeats: by how much the share of tokens that a text
    `repeated` grows.
    """
    written, before = own
    if not any(written):
        raise UserError("the model writes nothing after the openings of this text: no topic can be brought into it.")
    new, unedited, found = max(map(len, written)), editing.surprise(model, prompts, written), []
    size = max(1, at_once // len(prompts))
    for group in (arms[i : i + size] for i in range(0, len(arms), size)):
        with editing.intervene(model, hook_name, sae, tokenizer, editing.together([pairs_of(*arm) for arm in group])):
            texts, odds = write(model, tokenizer, prompts * len(group), sets, new)
        for i, (latents, strength) in enumerate(group):
            part = slice(i * len(prompts), (i + 1) * len(prompts))
            change, like = (odds[part] - before).T
            found.append({"latents": latents, "strength": strength, "change": change.mean().item(), "beyond": (change - like).mean().item(), "rise": int((change > ROUNDING).sum()), "of": len(prompts)})
            found[-1] |= {"cost": editing.surprise(model, prompts, texts[part]) - unedited, "repeats": repeated(texts[part]) - repeated(written)}
    return found


def topic_search(model, tokenizer, hook_name: str, sae: sae_utils.SAE, prompts: list[list[int]], own: tuple, groups: list[list[int]], strength: float, sets: list[list[int]], pairs_of, broken, rounds: int = 3, lowers: bool = False) -> list[dict]:
    """`topic_trials` of each of `groups` of latents at half of `strength`, then, in `rounds` that halve the step, at more
    where the text was not `broken(cost, repeats)` and at less where it was. First those that raise the topic farthest
    beyond words as frequent (with `lowers`, lower it), broken ones last."""
    at, found = [strength / 2] * len(groups), []
    for step in (strength / 2 ** (n + 2) for n in range(rounds)):
        tries = topic_trials(model, tokenizer, hook_name, sae, prompts, own, list(zip(groups, at, strict=True)), sets, pairs_of)
        at = [strength - step if broken(t["cost"], t["repeats"]) else strength + step for strength, t in zip(at, tries, strict=True)]
        found += tries
    return sorted(found, key=lambda c: (not math.isfinite(c["cost"] + c["beyond"]), bool(broken(c["cost"], c["repeats"])), c["beyond"] if lowers else -c["beyond"]))
