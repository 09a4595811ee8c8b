"""Pages of a PDF report: running text, tables and contexts that flow from page to page, and drawings.

Fonts are embedded; a character that matplotlib's font lacks is shown as a box.
"""

import textwrap
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

import sae_utils

A4 = (8.27, 11.69)  # inches
LEFT, RIGHT, TOP, BOTTOM = 0.8, 0.8, 0.8, 0.8  # margins, inches
MONO = 0.602  # width of a character of DejaVu Sans Mono, in units of its size


@cache
def drawable() -> set[int]:
    """The characters that both of matplotlib's own fonts can draw."""
    files = [font_manager.findfont(name) for name in ("DejaVu Sans", "DejaVu Sans Mono")]
    return set.intersection(*(set(FT2Font(file).get_charmap()) for file in files))


def plain(text: str) -> str:
    """Text as it can be drawn: one character for each, no formula, no control character."""
    return "".join("·" if not c.isprintable() else c if ord(c) in drawable() else "□" for c in text)


class Report:
    """Collects pages; `line`, `paragraph`, `table` and `tokens` go on where the last one ended."""

    def __init__(self, pdf: PdfPages, running_title: str):
        self.pdf, self.running_title, self.number, self.fig = pdf, running_title, 0, None

    def page(self) -> None:
        """Ends this page and begins another."""
        self.end()
        self.fig, self.y = plt.figure(figsize=A4), A4[1] - TOP

    def end(self) -> None:
        if self.fig:
            self.number += 1
            self.fig.text(0.5, 0.4 / A4[1], f"{self.running_title}   ·   {self.number}", size=7, color="0.4", ha="center", parse_math=False)
            self.pdf.savefig(self.fig, dpi=150)
            plt.close(self.fig)
        self.fig = None

    def room(self, inches: float) -> None:
        """A new page, unless so much is left of this one."""
        if not self.fig or self.y - inches < BOTTOM:
            self.page()

    def put(self, x: float, text: str, **style) -> None:
        self.fig.text((LEFT + x) / A4[0], self.y / A4[1], plain(text), va="top", parse_math=False, **style)

    def line(self, text: str, size: float = 9, x: float = 0.0, gap: float = 1.5, **style) -> None:
        self.room(gap * size / 72)
        self.put(x, text, size=size, **style)
        self.y -= gap * size / 72

    def heading(self, text: str, size: float = 12, needs: float = 1.0) -> None:
        """A heading, on a page that has room for `needs` inches below it."""
        self.room(needs + 2.6 * size / 72)
        self.y -= size / 72 if self.y < A4[1] - TOP else 0
        self.line(text, size=size, gap=1.9, weight="bold")

    def paragraph(self, text: str, size: float = 9, x: float = 0.0, **style) -> None:
        width = int((A4[0] - LEFT - RIGHT - x) * 72 / (0.53 * size))  # of the average character of DejaVu Sans, and a little more
        for line in textwrap.wrap(text, width) or [""]:
            self.line(line, size=size, x=x, **style)
        self.y -= 0.3 * size / 72

    def table(self, headings: list[str], rows: list[list[str]], widths: list[float], size: float = 7) -> None:
        """Columns of `widths` inches, the first to the left and the others to the right; a cell's second line is smaller."""
        step = size / 72

        def draw(cells, **style):
            lines = max(cell.count("\n") for cell in cells) + 1
            self.room((1.25 * lines + 0.7) * step)
            edge = 0.0
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
                edge += width
                y = self.y
                for n, part in enumerate(cell.split("\n")):
                    small = 0.85 if n and not style else 1
                    self.put(edge if i else 0, part, size=small * size, ha="right" if i else "left", **style)
                    self.y -= 1.25 * step
                self.y = y
            self.y -= (1.25 * lines + 0.7) * step

        for cells in ([headings] if any(headings) else []) + rows:
            draw(cells, **({"weight": "bold"} if cells is headings else {}))
        self.y -= step

    def tokens(self, value: str, pieces: list[str], shades: list[float], centre: int, size: float = 7, x: float = 0.0) -> None:
        """One context on one line: its tokens with a background of `shades` (0 to 1), the one at `centre` framed."""
        self.room(1.6 * size / 72)
        advance = MONO * size / 72
        most = int((A4[0] - LEFT - RIGHT - x) / advance) - 6
        pieces = [plain(piece) for piece in pieces]
        while len(pieces) > 1 and sum(map(len, pieces)) > most:  # shorten where more stands, the centre last
            if centre > 0 and sum(map(len, pieces[:centre])) >= sum(map(len, pieces[centre + 1 :])):
                pieces, shades, centre = pieces[1:], shades[1:], centre - 1
            else:
                pieces, shades = pieces[:-1], shades[:-1]
        self.put(x, value, size=size, family="monospace", color="0.4")
        at = x + 6 * advance
        for i, (piece, shade) in enumerate(zip(pieces, shades, strict=True)):
            place = ((LEFT + at) / A4[0], (self.y - 1.3 * size / 72) / A4[1])
            box = {"width": len(piece) * advance / A4[0], "height": 1.4 * size / 72 / A4[1], "transform": self.fig.transFigure}
            if shade > 0:
                self.fig.add_artist(Rectangle(place, **box, facecolor=(1, 0.55, 0), alpha=min(1.0, float(shade)), lw=0, zorder=0))
            if i == centre:
                self.fig.add_artist(Rectangle(place, **box, fill=False, lw=0.5, zorder=0))
            at += len(piece) * advance
        self.put(x + 6 * advance, "".join(pieces)[:most], size=size, family="monospace")
        self.y -= 1.6 * size / 72

    def drawings(self, title: str, parts: list) -> None:
        """A page of figures from top to bottom: pairs of a function that draws onto a figure and its share of the height."""
        self.end()
        self.fig = plt.figure(figsize=A4, layout="constrained")
        self.fig.get_layout_engine().set(rect=(0.07, 0.06, 0.86, 0.86), hspace=0.04)
        self.fig.text(LEFT / A4[0], 1 - TOP / A4[1], title, size=12, weight="bold", va="bottom")
        frames = self.fig.subfigures(len(parts), 1, height_ratios=[share for _, share in parts], squeeze=False)
        for (draw, _), frame in zip(parts, frames.flat, strict=True):
            draw(frame)
        self.end()


@contextmanager
def open_report(path: Path, running_title: str):
    """A Report that is written to `path` when all went well."""
    with sae_utils.atomic(path) as temporary, matplotlib.rc_context({"pdf.fonttype": 42}), PdfPages(temporary) as pdf:
        report = Report(pdf, plain(running_title))
        yield report
        report.end()
