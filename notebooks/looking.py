"""Sentences of one's own: which latents fire on them, a box to step through latents, and a panel that edits latents while the
model goes on with a prompt.

`make look` and the notebooks show the first; the others need a notebook with somebody at it, and computes nothing else
headless than what it shows at first.
"""

import html
import re
from pathlib import Path

import jinja2
import yaml
from torch import Tensor

import editing
import features
import patching
import sae_utils
import showing
from sae_utils import UserError

OPERATIONS = ("set_value", "add", "amplify", "ablate")  # those with one dose, or none


# ---------------------------------------------------------------------------------------------
# What fires on a sentence
# ---------------------------------------------------------------------------------------------


def about(latent: int, kept: dict, names: dict[int, str], as_text) -> str:
    """A latent in a few words: the name that a person gave it, or the tokens it fires on most and those it promotes."""
    if latent in names:
        return names[latent]
    if not kept["density"][latent] > 0:
        return "never fired on held-out text, so that multiples of its maximum are nothing"
    words = lambda ids, n: ", ".join(repr(as_text(int(token))) for token in ids[:n] if token >= 0)
    return f"on {words(kept['fired_tokens'][latent], 3) or 'nothing'}; promotes {words(kept['promoted'][latent], 2)}"


def fires(acts: Tensor, max_act: Tensor, n: int = 5) -> list[list[dict]]:
    """For each token the `n` latents that fire most strongly on it: {"latent", "act", "share"}, share being the activation over the
    latent's largest on held-out text (None where it never fired there). acts: (tokens, d_sae); max_act: (d_sae)."""
    values, latents = acts.topk(min(n, acts.shape[-1]))
    share = lambda latent, act: act / max_act[latent].item() if max_act[latent] > 0 else None
    lines = zip(values.tolist(), latents.tolist(), strict=True)
    return [[{"latent": i, "act": a, "share": share(i, a)} for a, i in zip(*line, strict=True) if a > 0] for line in lines]


def look(model, tokenizer, hook_name: str, sae: sae_utils.SAE, text: str, kept: dict, names: dict[int, str], n: int = 5) -> list[dict]:
    """What fires on each token of `text`: {"token", "latents"}, the latter of `fires` with what each is `about` and how many
    fire `in_all`. BOS is left out; on other special tokens nothing is read. UserError where there is no text, or more than the model has positions for."""
    if not text.strip():
        raise UserError('there is no text to look at: give a sentence, TEXT="…".')
    (prompt,) = patching.encode_prompts(tokenizer, [text], chat=False)
    patching.check_prompts(model, tokenizer, [prompt], 0, "sentence")
    as_text, acts = showing.TokenText(tokenizer), patching.text_acts(model, tokenizer, hook_name, sae, prompt).cpu()
    tokens = showing.whole([as_text(token) for token in prompt])
    told = lambda found: found | {"about": about(found["latent"], kept, names, as_text)}
    special, top = set(sae_utils.special_ids(tokenizer)), fires(acts, sae.max_act.cpu(), n)
    return [
        {"token": piece, "latents": [told(found) for found in line], "in_all": int((row > 0).sum())}
        for i, (token, piece, line, row) in enumerate(zip(prompt, tokens, top, acts, strict=True))
        if i > 0 or token not in special
    ]


def as_lines(found: list[dict]) -> str:
    """The same as lines of text, for a terminal."""
    width = max(len(showing.visible(line["token"])) for line in found)
    return "\n".join(
        f"{showing.visible(line['token']) if i == 0 else '':>{width}}  {latent['latent']:6} {latent['act']:6.2f}  {latent['about']}".rstrip()
        for line in found
        for i, latent in enumerate(line["latents"] or [{"latent": "-", "act": 0.0, "about": "nothing fires"}])
    )


def as_table(found: list[dict], page: str = "") -> str:
    """The same as an HTML table; with `page`, the address of a features.html, each latent is a link into it but for those that
    never fired on held-out text, which it does not have."""
    top = max([latent["act"] for line in found for latent in line["latents"]] + [1e-9])

    def cell(latent: dict) -> str:
        number = f'<a href="{html.escape(page)}#{latent["latent"]}">{latent["latent"]}</a>' if page and latent["share"] is not None else str(latent["latent"])
        share = "" if latent["share"] is None else f", {latent['share']:.0%} of its maximum"
        return f'<td title="{html.escape(latent["about"])}">{number} <small>{latent["act"]:.2f}{share}<br>{html.escape(latent["about"])}</small></td>'

    strongest = lambda line: line["latents"][0]["act"] if line["latents"] else 0.0
    rows = (
        f'<tr><th style="text-align:right;white-space:nowrap">{showing.shade([line["token"]], [strongest(line)], top=top)}<br><small>{line["in_all"]} fire</small></th>'
        + "".join(map(cell, line["latents"])) + "</tr>"
        for line in found
    )  # fmt: skip
    return f"<table>{''.join(rows)}</table>"


def write_page(path: Path, title: str, text: str, found: list[dict], page: str) -> None:
    """`as_table` as a page of its own."""
    template = jinja2.Environment(autoescape=True).from_string((Path(__file__).parent / "templates" / "look.html").read_text())
    with sae_utils.atomic(path) as temporary:
        temporary.write_text(template.render(title=title, text=text, page=page, table=as_table(found, page)), encoding="utf-8", errors="replace")


# ---------------------------------------------------------------------------------------------
# The panel
# ---------------------------------------------------------------------------------------------


def stepper(card, labels: dict[int, str], path: Path, latent: int, d_sae: int):
    """An ipywidgets box to step through latents, `card(latent)` being the HTML of one; a name that is typed goes into labels.csv at
    `path`, and into `labels`, when its field is left."""
    import ipywidgets as w

    number = w.BoundedIntText(value=latent, min=0, max=d_sae - 1, description="latent")
    name, view = w.Text(value=labels.get(latent, ""), description="name", continuous_update=False), w.HTML(card(latent))

    def step(_):
        name.value, view.value = labels.get(number.value, ""), card(number.value)

    def call(_):
        if name.value.strip() != labels.get(number.value, ""):
            try:
                named = features.name_latent(path, number.value, name.value)
            except UserError as error:
                view.value = f"<b>{html.escape(str(error))}</b>"
                return
            labels.clear()
            labels.update(named)
            view.value = card(number.value)

    number.observe(step, "value")
    name.observe(call, "value")
    return w.VBox([w.HBox([number, name]), view])  # no Output widget: headless, those can hang for ever (nbclient issue 312)


def numbers(words: str) -> list[int]:
    """The whole numbers of "17, 23", each once; none where anything else stands there."""
    found = words.replace(",", " ").split()
    return list(dict.fromkeys(map(int, found))) if all(re.fullmatch("[0-9]{1,18}", word) for word in found) else []


def find(words: str, d_sae: int, kept: dict, names: dict[int, str], as_text, most: int = 12) -> list[int]:
    """Latents by their numbers ("17 23"), or by a word: those whose name holds it, then those that fire on a token that does, most
    often first, then those that promote one. UserError for a number there is not, or a word that finds none."""
    if numbers(words):
        return [sae_utils.check_latent(number, d_sae) for number in numbers(words)]
    wanted = words.strip().lower()
    if not wanted:
        raise UserError("name latents, by their numbers or by a word.")
    named = [latent for latent, name in names.items() if wanted in name.lower()]
    tokens = {int(token): as_text(int(token)).lower() for ids in (kept["fired_tokens"], kept["promoted"]) for token in set(ids.flatten().tolist()) if token >= 0}
    holds = {token for token, text in tokens.items() if wanted in text}
    of_row = lambda ids, weights: {i: sum(w for token, w in zip(row, ws, strict=True) if token in holds) for i, (row, ws) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True))}
    firing, promoting = (of_row(kept[a], kept[b]) for a, b in (("fired_tokens", "fired_tokens_share"), ("promoted", "promoted_by")))
    ranked = [i for scores in (firing, promoting) for i in sorted(scores, key=scores.get, reverse=True) if scores[i] > 0 and kept["density"][i] > 0]
    if not (found := list(dict.fromkeys([*named, *ranked]))[:most]):
        raise UserError(f"no latent's name, and no token that one fires on or promotes, holds {words.strip()!r}.")
    return found


def edit_of(latents: list[int], operation: str, dose: float, scope: str) -> dict:
    """One edit as files in params/patches/ hold it: `dose` is amplify's factor, and else a multiple of the largest activation."""
    return {"latents": latents, "operation": operation} | ({} if operation == "ablate" else {"strength": dose}) | {"scope": scope}


def as_yaml(*edits: dict) -> str:
    """A file for params/patches/ with these edits."""
    return yaml.safe_dump({"edits": list(edits)}, sort_keys=False, default_flow_style=None, allow_unicode=True)


def as_python(edit: dict, prompt: str, max_new_tokens: int) -> str:
    """The lines that do the same as the panel in patch_neurons.ipynb."""
    return (
        f"prompt = patching.encode_prompts(tokenizer, [{prompt!r}], chat=False)\n"
        f"pairs = patching.patches([{edit!r}], sae, tokenizer)\n"
        f"with editing.intervene(model, hook_name, sae, tokenizer, pairs):\n"
        f"    print(as_text(editing.generate(model, tokenizer, prompt, {max_new_tokens})[0]))"
    )


def tried(model, tokenizer, hook_name: str, sae: sae_utils.SAE, prompt: str, edit: dict, max_new_tokens: int = 20) -> dict:
    """What the model writes after `prompt` by itself and with the edit: `original` and `patched` (`patching.pieces`), the tokens whose
    probability right after the prompt `moves` most, the positions edited, and how much the patched text surprises the unpatched
    model, in nats per token, beside its own."""
    (ids,) = prompts = patching.encode_prompts(tokenizer, [prompt], chat=False)
    patching.check_prompts(model, tokenizer, prompts, max_new_tokens)
    as_text, pairs = showing.TokenText(tokenizer), patching.patches([edit], sae, tokenizer)
    run = lambda: (editing.next_logprobs(model, prompts)[0], editing.generate(model, tokenizer, prompts, max_new_tokens))
    before, original = run()
    with editing.intervene(model, hook_name, sae, tokenizer, pairs) as wrapper:
        after, patched = run()
    return {
        "prompt": as_text([token for token in ids if token != tokenizer.bos_token_id]), "original": patching.pieces(as_text, original[0], original[0]), "patched": patching.pieces(as_text, patched[0], original[0]),
        "same": original == patched, "moves": patching.biggest_moves(as_text, before, after), "positions": wrapper.tracker.reached()[0],
        "surprise": [editing.surprise(model, prompts, texts) if texts[0] else None for texts in (original, patched)],
    }  # fmt: skip


def side_by_side(found: dict) -> str:
    """What `tried` returns, as HTML."""
    mark = '<span style="background:#ffd9a8;color:black;outline:1px solid">'
    text = lambda pieces: "".join(f"{mark}{html.escape(p['text'])}</span>" if p["differs"] else html.escape(p["text"]) for p in pieces) or "<i>nothing</i>"
    nats = lambda value: "" if value is None else f"<br><small>{value:.2f} nats per token for the model as it is</small>"
    column = lambda name, arm, value: f'<td style="width:50%;vertical-align:top;text-align:left;white-space:pre-wrap"><b>{name}</b>\n{text(found[arm])}{nats(value)}</td>'
    moves = ", ".join(f"{html.escape(repr(move['token']))} {move['change']:+.2f}" for move in found["moves"]) or "none"
    told = "The text is the same. " if found["same"] else ""
    return (
        f'<div style="white-space:pre-wrap;opacity:.75">{html.escape(found["prompt"])}</div><table style="width:100%"><tr>'
        f"{column('original', 'original', found['surprise'][0])}{column('patched', 'patched', found['surprise'][1])}</tr></table>"
        f"{told}Edited at {found['positions']} positions. Log-probabilities that moved most right after the prompt: {moves}"
    )


def panel(model, tokenizer, hook_name: str, sae: sae_utils.SAE, kept: dict, names: dict[int, str], prompt: str, latents: list[int], max_new_tokens: int = 20):
    """An ipywidgets panel: latents (numbers, or a word to search for), operation, dose, scope and a prompt; original and patched
    text side by side, renewed when a field is left or the slider let go; below, the same in Python and as a file of edits."""
    import ipywidgets as w

    as_text, wide = showing.TokenText(tokenizer), w.Layout(width="100%")
    fields = {
        "latents": w.Text(value=" ".join(map(str, latents)), description="latents", continuous_update=False, placeholder="numbers, or a word to search for"),
        "operation": w.Dropdown(options=OPERATIONS, description="operation"),
        "dose": w.FloatSlider(value=4.0, min=-4.0, max=16.0, step=0.25, description="dose", continuous_update=False),
        "scope": w.Dropdown(options=("all", "generated", "last", "prompt"), description="scope"),
        "prompt": w.Textarea(value=prompt, description="prompt", continuous_update=False, layout=wide, rows=2),
    }
    told, shown, code, edits = w.HTML(), w.HTML(), w.Textarea(description="Python", layout=wide, rows=4), w.Textarea(description="edit", layout=wide, rows=5)

    def renew(*_):
        try:
            value = {name: field.value for name, field in fields.items()}
            found = find(value["latents"], sae.d_sae, kept, names, as_text)
            searched = not numbers(value["latents"])
            told.value = "<br>".join(f"{latent}: {html.escape(about(latent, kept, names, as_text))}" for latent in found)
            used = found[:1] if searched else found
            told.value += "<br>found by search; the first is edited: write numbers to choose others" * searched
            edit = edit_of(used, value["operation"], value["dose"], value["scope"])
            shown.value = side_by_side(tried(model, tokenizer, hook_name, sae, value["prompt"], edit, max_new_tokens))
            code.value, edits.value = as_python(edit, value["prompt"], max_new_tokens), as_yaml(edit)
        except UserError as error:
            told.value, shown.value, code.value, edits.value = f"<b>{html.escape(str(error))}</b>", "", "", ""

    for field in fields.values():
        field.observe(renew, "value")
    renew()
    return w.VBox([w.HBox([fields["latents"], fields["operation"]]), w.HBox([fields["dose"], fields["scope"]]), fields["prompt"], told, shown, code, edits])
