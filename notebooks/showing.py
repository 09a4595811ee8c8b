"""What is shown: tokens as text and in boxes, times and sizes in words, and how far something is.

A token's text is what it adds to a text, its leading space included; of a token that is a part of a character it is that
part's bytes, and `whole` puts the characters of consecutive tokens together.
"""

import html
import itertools
import os
import re
import time
import unicodedata

from sae_utils import encode_text, resolve


class Every:
    """True at most once per `seconds`, which grow by a tenth each time up to `longest`: for progress lines
    that stay few in a log.

    >>> if due(): print(...)
    """

    def __init__(self, seconds: float = 10.0, longest: float = 0.0):
        self.seconds, self.longest, self.last = seconds, max(seconds, longest), time.monotonic()

    def __call__(self) -> bool:
        if time.monotonic() - self.last < self.seconds:
            return False
        self.seconds, self.last = min(1.1 * self.seconds, self.longest), time.monotonic()
        return True


class Line:
    """A line that says how far something is. In a log it is a new one now and then (`Every`); in Jupyter, where somebody looks,
    one that renews itself every second.

    >>> if line.due(): line.say(...)
    """

    def __init__(self, seconds: float = 10.0, longest: float = 60.0):
        self.live = "JPY_SESSION_NAME" in os.environ  # Jupyter's server gives it to the kernels of notebooks that are open
        self.pace, self.shown = (1.0, 0.0) if self.live else (seconds, longest), None
        self.begin()

    def begin(self) -> None:
        """From now on, as if it had just been made; the line that renews itself is the same."""
        self.due = Every(*self.pace)

    def say(self, text: str) -> None:
        if not self.live:
            print(text, flush=True)
        elif self.shown:
            self.shown.update({"text/plain": text}, raw=True)
        else:
            from IPython.display import display

            self.shown = display({"text/plain": text}, raw=True, display_id=True)


def model_name(name: str) -> str:
    """A model's name as a reader knows it: of a folder the last part alone."""
    return resolve(name).name if resolve(name).exists() else name


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size, most in (("seconds", 1, 120), ("minutes", 60, 7200), ("hours", 3600, 172_800)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def in_bytes(n: int) -> str:
    """A number of bytes in the unit that suits it."""
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


# GPT-2's letter for each byte: itself where it can be seen, else the next letter from U+0100 on.
_SEEN = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE_OF = {chr(byte): byte for byte in _SEEN} | {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_SEEN}))}


class Bytes(str):
    """The text of a token whose bytes (`raw`) are only a part of a character: \\xe2\\x80 in place of that part."""

    def __new__(cls, raw: bytes):
        text = super().__new__(cls, raw.decode("utf-8", "backslashreplace"))
        text.raw = raw
        return text

    def __repr__(self) -> str:  # no backslash is doubled: it is none of the text's own
        return f"'{self}'"


class TokenText:
    """Token ids as the text they add, leading space included: `text(id)`, `text(ids)`. Of a token that is a part of
    a character it is `Bytes`; `whole` puts those of consecutive tokens together."""

    def __init__(self, tokenizer):
        self.tokenizer, self.known = tokenizer, {}
        self.anchor = encode_text(tokenizer, ["a"])[0]
        self.prefix = tokenizer.decode(self.anchor)

    def __call__(self, tokens) -> str:
        if not isinstance(tokens, int):  # together: a character may be spread over several tokens
            text = self.decode(ids := [int(token) for token in tokens])
            return "".join(whole([self(token) for token in ids])) if "\ufffd" in text else text  # cut inside of one, say
        if tokens not in self.known:
            text = self.decode([tokens])
            raw = self.raw(tokens) if "\ufffd" in text else b""
            # the bytes read off the vocabulary are believed where the tokenizer makes the same text of them
            broken = raw.decode("utf-8", "replace") == text != raw.decode("utf-8", "ignore")
            self.known[tokens] = Bytes(raw) if broken else text
        return self.known[tokens]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode([*self.anchor, *tokens], clean_up_tokenization_spaces=False)[len(self.prefix) :]

    def raw(self, token: int) -> bytes:
        """The bytes that an entry of the vocabulary spells: <0xE2> (byte fallback), or a letter for each (byte-level BPE).
        Empty where it is neither."""
        entry = self.tokenizer.convert_ids_to_tokens(token)
        if re.fullmatch("<0x[0-9A-F]{2}>", entry):
            return bytes.fromhex(entry[3:5])
        return bytes(BYTE_OF[c] for c in entry) if all(c in BYTE_OF for c in entry) else b""


def whole(texts: list[str]) -> list[str]:
    """The texts of consecutive tokens, as `TokenText` gives them, with each character whole that is spread over several:
    it stands with the token in which it begins, and those that only continue it have "". Bytes that make no
    character, as where an excerpt is cut, stay as they are."""
    made = []
    for part, run in itertools.groupby(texts, lambda text: isinstance(text, Bytes)):
        run = list(run)
        if part:
            owner = [i for i, text in enumerate(run) for _ in text.raw]
            joined, run, at = b"".join(text.raw for text in run), [""] * len(run), 0
            for character in joined.decode("utf-8", "surrogateescape"):
                raw = character.encode("utf-8", "surrogateescape")
                run[owner[at]] += raw.decode("utf-8", "backslashreplace")
                at += len(raw)
        made += run
    return made


CONTINUED = "‹"  # stands for a token that only continues a character


def visible(text: str) -> str:
    """A token's text without what cannot be seen, spaces apart: ↵ for a newline, · for other control characters and spaces."""
    hidden = lambda c: c != " " and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp")
    return "".join("↵" if c == "\n" else "·" if hidden(c) else c for c in text) or CONTINUED


def plot_text(text: str) -> str:
    """Text that matplotlib shows as it is: `$` would start a formula, control characters a new line."""
    return "".join(c if c.isprintable() else "·" for c in text).replace("$", r"\$")


def shade(pieces: list[str], values, color: str = "255,140,0", top: float = 0.0, framed: int = -1) -> str:
    """HTML of consecutive tokens, each in a box of its own, shaded by non-negative values relative to `top` (0: the largest)
    and the one at `framed` outlined; every token escaped, characters whole, spaces marked by a dot that a copy leaves out."""
    top = top or max([float(v) for v in values] + [1e-9])
    space = '<span style="opacity:.5;background:radial-gradient(circle,currentColor 1px,#0000 1.5px)"> </span>'
    more = f'<span style="opacity:.6;user-select:none">{CONTINUED}</span>'
    boxes = (
        f'<span style="display:inline-block;margin:1px;padding:0 1px;border-radius:2px;white-space:pre;outline:1px solid {"currentColor" if i == framed else "#8884"};'
        f'background:rgba({color},{max(0.0, float(v)) / top:.2f})" title="{float(v):.3g}">{html.escape(visible(piece)).replace(" ", space) if piece else more}</span>'
        for i, (piece, v) in enumerate(zip(whole(pieces), values, strict=True))
    )
    return f'<span style="font-family:monospace;white-space:pre-wrap">{"".join(boxes)}</span>'
