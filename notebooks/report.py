"""What a run shows: its figures, its findings in sentences, and the pages, tables and files they end up in.

A figure is a function of a `fig` and the data it shows, so that the same drawing serves the notebook,
TensorBoard, a page of report.pdf and overview.png. `Report` is the pages: running text, tables and
contexts that flow from one to the next. Fonts are embedded; a character that matplotlib's own font lacks
is drawn in any installed one that has it, and as □ where none has: the last page says of which scripts.
"""

import csv
import html
import json
import textwrap
import time
import unicodedata
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

import features
import fidelity
import sae_utils
import showing
import training

A4 = (8.27, 11.69)  # inches
LEFT, RIGHT, TOP, BOTTOM = 0.8, 0.8, 0.8, 0.8  # margins, inches
MONO = 0.602  # width of a character of DejaVu Sans Mono, in units of its size

# What the words of the report mean; its last page.
DEFINITIONS = {
    "activation": "a row of numbers: the output of the hooked module at one token",
    "latent": "a unit of the SAE; it has a direction (its decoder row, of norm 1) and fires on a token when its activation is above 0",
    "FVU": "squared error of the reconstruction over the squared distance of the activations from their mean, sums over held-out rows",
    "L0": "latents active per token, on average",
    "dead": "latents silent on every held-out row",
    "density": "share of the held-out tokens on which a latent fires",
    "strength": "a latent's largest activation on held-out rows, where a token has norm 1 (normalize scale: on average)",
    "CE": "mean next-token cross-entropy in nats, over all tokens of the held-out windows; BOS keeps its activation in every arm",
    "CE recovered": "(CE silenced - CE of the arm) / (CE silenced - CE untouched), silenced meaning zero, or the mean",
    "k-means": "each activation replaced by the nearest of as many centres as there are latents: one active of all, always fully",
    "KL": "mean over tokens of KL(untouched || arm) of the next-token distribution, in nats",
    "cosine, norm ratio": "of reconstruction and activation, both from the training mean, averaged over rows",
    "promotes": "tokens whose logit the latent's direction raises most by the direct path, to first order",
    "ablated": "set to 0 wherever it fires, all else kept; changes are of the logarithm of the next token's mean probability over the places",
    "interval": "95 % of bootstrap draws over held-out documents",
}


# ---------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------


@cache
def drawable() -> set[int]:
    """The characters that both of matplotlib's own fonts can draw."""
    files = [font_manager.findfont(name) for name in ("DejaVu Sans", "DejaVu Sans Mono")]
    return set.intersection(*(set(FT2Font(file).get_charmap()) for file in files))


@cache
def installed() -> dict[int, str]:
    """{character: the first installed font that has it}. What is no outline (colour emoji) or draws a box for everything is left out."""
    fonts = {}
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: (entry.name, entry.fname)):
        if entry.style == "normal" and entry.weight in (400, "normal", "regular") and not any(word in entry.name for word in ("Last Resort", "Color", "Blank")):
            for character in FT2Font(entry.fname).get_charmap():
                fonts.setdefault(character, entry.name)
    return fonts


def plain(text: str) -> str:
    """Text as it can be drawn: one character for each, no formula, no control character."""
    has = lambda c: ord(c) in drawable() or ord(c) in installed()
    return "".join("·" if not c.isprintable() else c if has(c) else "□" for c in text)


def fonts_for(text: str, first: str = "DejaVu Sans") -> list[str]:
    """`first`, and the other fonts that `text` needs."""
    return [first, *dict.fromkeys(installed()[ord(c)] for c in text if ord(c) not in drawable() and ord(c) in installed())]


def columns(text: str) -> int:
    """How many characters' width a text takes in a font of fixed width; Chinese and its like take two each."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


class Report:
    """Collects pages; `line`, `paragraph`, `table` and `tokens` go on where the last one ended."""

    def __init__(self, pdf: PdfPages, running_title: str):
        self.pdf, self.running_title, self.number, self.fig = pdf, running_title, 0, None
        self.not_drawn = set()  # characters for which □ stands

    def page(self) -> None:
        """Ends this page and begins another."""
        self.end()
        self.fig, self.y = plt.figure(figsize=A4), A4[1] - TOP

    def end(self) -> None:
        if self.fig:
            self.number += 1
            self.fig.text(0.5, 0.4 / A4[1], f"{self.running_title}   ·   {self.number}", size=7, color="0.4", ha="center", parse_math=False, family=fonts_for(self.running_title))
            self.pdf.savefig(self.fig, dpi=150)
            plt.close(self.fig)
        self.fig = None

    def room(self, inches: float) -> None:
        """A new page, unless so much is left of this one."""
        if not self.fig or self.y - inches < BOTTOM:
            self.page()

    def put(self, x: float, text: str, family: str = "DejaVu Sans", **style) -> None:
        shown = plain(text)
        self.not_drawn |= {c for c, drawn in zip(text, shown, strict=True) if drawn == "□" != c}
        self.fig.text((LEFT + x) / A4[0], self.y / A4[1], shown, va="top", parse_math=False, family=fonts_for(shown, family), **style)

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
        for line in textwrap.wrap(text, width * len(text) // max(1, columns(text))) or [""]:
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

    def tokens(self, pieces: list[str], acts: list[float], highest: float, centre: int, size: float = 7, x: float = 0.0) -> None:
        """One context on one line: the activation at `centre`, then its tokens in boxes, shaded by activation over `highest`, the one
        at `centre` framed. Below a token stands its own activation, where it is active and wide enough; spaces are pale dots."""
        self.room(2.1 * size / 72)
        advance, value = MONO * size / 72, f"{acts[centre]:.2f}"
        most = int((A4[0] - LEFT - RIGHT - x) / advance) - 6
        pieces = [showing.visible(piece) for piece in pieces]
        while len(pieces) > 1 and sum(map(columns, pieces)) > most:  # shorten where more stands, the centre last
            if centre > 0 and sum(map(columns, pieces[:centre])) >= sum(map(columns, pieces[centre + 1 :])):
                pieces, acts, centre = pieces[1:], acts[1:], centre - 1
            else:
                pieces, acts = pieces[:-1], acts[:-1]
        if columns(pieces[0]) > most:
            pieces = [pieces[0][: most // 2]]
        self.put(x, value, size=size, family="DejaVu Sans Mono", color="0.4")
        at = x + 6 * advance
        for i, (piece, act) in enumerate(zip(pieces, acts, strict=True)):
            wide, small = columns(piece) * advance, 0.55 * size
            place = ((LEFT + at) / A4[0], (self.y - 1.3 * size / 72) / A4[1])
            box = {"width": wide / A4[0], "height": 1.4 * size / 72 / A4[1], "transform": self.fig.transFigure}
            if act > 0:
                self.fig.add_artist(Rectangle(place, **box, facecolor=(1, 0.55, 0), alpha=min(1.0, float(act) / highest), lw=0, zorder=0))
            framed = {"lw": 0.7, "zorder": 2} if i == centre else {"lw": 0.3, "edgecolor": "0.75", "zorder": 1}
            self.fig.add_artist(Rectangle(place, **box, fill=False, **framed))
            number = f"{act:.2f}".lstrip("0")
            if act > 0 and i != centre and len(number) * MONO * small / 72 <= wide:
                self.y -= 1.35 * size / 72
                self.put(at + wide / 2, number, size=small, family="DejaVu Sans Mono", color="0.4", ha="center")
                self.y += 1.35 * size / 72
            at += wide
        # in one piece, unless a font of another width would carry it off its boxes
        chunks, edge = (pieces, [0, *np.cumsum([columns(piece) for piece in pieces])]) if columns("".join(pieces)) > len("".join(pieces)) else (["".join(pieces)], [0])
        for text, start in zip(chunks, edge):
            self.put(x + (6 + start) * advance, "".join("·" if c == " " else " " for c in text), size=size, family="DejaVu Sans Mono", color="0.6")
            self.put(x + (6 + start) * advance, text, size=size, family="DejaVu Sans Mono")
        self.y -= 2.1 * size / 72

    def drawings(self, title: str, drawings: dict, **shares: float) -> None:
        """A page of figures from top to bottom: those of `drawings` (functions of a figure) that `shares` names, each with its share of the height.
        What was not drawn, such as the curves of a training that there was not, is left out."""
        shares = {name: share for name, share in shares.items() if name in drawings}
        self.end()
        self.fig = plt.figure(figsize=A4, layout="constrained")
        self.fig.get_layout_engine().set(rect=(0.07, 0.06, 0.86, 0.86), hspace=0.04)
        self.fig.text(LEFT / A4[0], 1 - TOP / A4[1], title, size=12, weight="bold", va="bottom")
        frames = self.fig.subfigures(len(shares), 1, height_ratios=list(shares.values()), squeeze=False)
        for name, frame in zip(shares, frames.flat, strict=True):
            drawings[name](frame)
        self.end()


@contextmanager
def open_report(path: Path, running_title: str):
    """A Report that is written to `path` when all went well; `running_title` is at the foot of each page, and the file's own title."""
    with sae_utils.atomic(path) as temporary, matplotlib.rc_context({"pdf.fonttype": 42}), PdfPages(temporary, metadata={"Title": running_title}) as pdf:
        report = Report(pdf, plain(running_title))
        try:
            yield report
            report.end()
        finally:
            if report.fig:  # the report failed
                plt.close(report.fig)


# ---------------------------------------------------------------------------------------------
# What a run found, in sentences and lines
# ---------------------------------------------------------------------------------------------


def findings(metrics: dict, n_duplicates: int, dense_share: float, on_one_token: int) -> list[str]:
    """What a run found, each sentence with the run's own numbers; the first one stands alone.

    `metrics` as in metrics.json (its "known" only where the text's variables are known); `n_duplicates`:
    pairs of latents with nearly the same direction; `dense_share`: part of L0 that the ultra-dense latents
    make (0 to 1); `on_one_token`: live latents that fire nine times in ten on a single token.
    """
    value = lambda arm, name: metrics["fidelity"][arm][name][0]
    _, low, high = metrics["fidelity"]["sae"]["ce_increase"]
    lists, live = metrics["latents"], metrics["d_sae"] - len(metrics["latents"]["dead"])
    recovered = "too small a gap to say" if metrics["ce_recovered"] is None else f"{metrics['ce_recovered']:.3f}"
    sentences = [
        f"On held-out text the SAE explains {1 - metrics['fvu']:.1%} of the variance "
        f"with {metrics['l0']:.1f} of {metrics['d_sae']:,} latents per token; "
        f"cross-entropy rises by {metrics['ce_spliced'] - metrics['ce_clean']:.3f}, from {metrics['ce_clean']:.3f} to {metrics['ce_spliced']:.3f} nats "
        f"(zeroed: {metrics['ce_zero']:.3f}; ce_recovered {recovered}); {metrics['dead']:.1%} of the latents are dead.",
        f"The rise of the cross-entropy lies between {low:.4f} and {high:.4f} nats (95 %, documents drawn again). "
        f"k-means with as many centres as there are latents, one of them active, costs {value('kmeans', 'ce_increase'):.3f} nats and leaves an FVU of "
        f"{value('kmeans', 'fvu'):.3f}. The same number of principal components "
        f"costs {value('pca', 'ce_increase'):.3f} nats and leaves an FVU of {value('pca', 'fvu'):.3f}; as many random directions cost "
        f"{value('untrained', 'ce_increase'):.3f} nats (FVU {value('untrained', 'fvu'):.3f}).",
        f"The most probable next token changes on {metrics['top1_changed']:.1%} of tokens; reconstructions are {metrics['norm_ratio']:.3f} times as long as the "
        f"activations (from the mean), at a cosine of {metrics['cosine']:.3f}.",
        f"{len(lists['dead']):,} latents are dead on held-out text, {len(lists['ultra_dense']):,} fire on more than a tenth of the tokens "
        f"(they make {dense_share:.0%} of L0), and {n_duplicates:,} pairs have nearly the same direction. "
        f"{on_one_token / max(1, live):.0%} of the live ones fire nine times in ten on a single token.",
    ]  # fmt: skip
    if "known" in metrics:
        hidden, found = metrics["known"], metrics["known"]["found"]
        sentences.append(
            f"Of {hidden['hidden']} values of {hidden['variables']} variables that the token at hand does not show, {found['trained']} are matched "
            f"by a latent with an F1 of 0.9 or more on rows that had no say in the choice (k-means: {found['kmeans']}, untrained SAE: {found['untrained']}, PCA: {found['pca']})."
        )
    return sentences


def data_lines(data_card: dict) -> list[tuple[str, str]]:
    """(name, number as text) of every number of a data card, the quantiles of the distance from the mean last."""
    numbers = {name.replace("_", " "): value for name, value in data_card.items() if isinstance(value, (int, float))}
    numbers |= {f"distance from the mean, {q}": value for q, value in data_card["distance_from_mean"].items()}
    return [(name, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}") for name, value in numbers.items()]


def html_table(lines: list[list[str]]) -> str:
    """Lines of cells as an HTML table; a newline in a cell is a line break, everything else is text."""
    cell = lambda text: html.escape(text).replace("\n", "<br>")
    return "<table>" + "".join("<tr>" + "".join(f"<td>{cell(text)}</td>" for text in line) + "</tr>" for line in lines) + "</table>"


def markdown_table(lines: list) -> str:
    """The same for TensorBoard, which reads Markdown; the first line is the headings. A cell has no line breaks and no bars of its own."""
    cell = lambda value: str(value).replace("\n", " ").replace("|", "\\|")
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def write_csv(path: Path, rows: list[dict]) -> None:
    """A line for each of `rows`, whose keys are the headings."""
    with sae_utils.atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


def norms_figure(fig, distance: Tensor, mean_norm: float) -> None:
    """Histogram of the rows' `distance` (rows) from the mean, whose own norm is marked; all in the model's units."""
    ax = fig.add_subplot()
    ax.hist(distance.log10().numpy(), bins=100, color="tab:blue")
    ax.axvline(np.log10(mean_norm), color="tab:red", label="norm of the mean")
    ax.set(xlabel="log10 of the distance from the mean", ylabel="rows")
    ax.set_title("How far tokens lie from the mean")
    ax.legend()


def learning_rate_figure(fig, schedule: tuple) -> None:
    """The learning rate over all steps; `schedule` is what `learning_rate` takes after the step."""
    ax, steps = fig.add_subplot(), np.linspace(0, schedule[0], 500)
    ax.plot(steps, [training.learning_rate(step, *schedule) for step in steps])
    ax.set(xlabel="step", ylabel="learning rate", title="Warm-up, cosine to a share of the peak, then held")


def curves_figure(fig, history: list[dict], architecture: str) -> None:
    """What a run's epochs recorded, in six panels.

    With a penalty on L1 ("relu") the loss stands beside its reconstruction part. With a `k` the training loss
    may hold further terms (nested parts, AuxK), so there the two reconstruction errors are compared.
    """
    panels = {
        "loss, and its reconstruction part": ["loss", "held_out_loss", "mse"] if architecture == "relu" else ["mse", "held_out_loss"],
        "variance unexplained on held-out rows": ["held_out_fvu"],
        "latents active per token": ["l0", "held_out_l0"],
        "share of latents silent": ["dead", "held_out_dead"],
        "how often latents fire (quantiles)": ["density_q10", "density_median", "density_q90"],
        "learning rate at the epoch's end": ["lr"],
    }
    axes = fig.subplots(3, 2, sharex=True)
    for ax, (title, names) in zip(axes.flat, panels.items(), strict=True):
        values = [h[name] for h in history for name in names]
        for name in names:
            ax.plot([h["epoch"] for h in history], [h[name] for h in history], ".-", label=name)
        ax.set(title=title, yscale="log" if max(values) > 3 * min(values) > 0 and names[0] not in ("dead", "lr") else "linear")
        ax.xaxis.get_major_locator().set_params(integer=True)
        if names[0] in ("dead", "lr"):
            ax.set_ylim(bottom=0)
        if len(names) > 1:
            ax.legend(fontsize="x-small", framealpha=0.4, labelspacing=0.2)
    fig.supxlabel("epoch")


def cross_entropies_figure(fig, figures: dict[str, dict]) -> None:
    """By how much (nats) every arm of `fidelity.table` raises the cross-entropy, with its interval: on a large model all
    of them are small beside the cross-entropy itself."""
    ax = fig.add_subplot()
    names = [name for name in fidelity.ARMS if name in figures and name != "clean"]
    value, low, high = zip(*(figures[name]["ce_increase"] for name in names), strict=True)
    reach = [[max(0.0, v - l) for v, l in zip(value, low, strict=True)], [max(0.0, h - v) for v, h in zip(value, high, strict=True)]]
    colours = ["tab:blue" if name == "sae" else "tab:gray" for name in names]
    ax.barh([fidelity.ARMS[name].replace("\n", " ") for name in names], value, color=colours, xerr=reach, ecolor="black", capsize=3)
    for place, (v, h) in enumerate(zip(value, high, strict=True)):
        ax.annotate(f"{v:+.3f}", (max(v, h), place), (5, 0), textcoords="offset points", va="center")
    ax.invert_yaxis()
    ax.margins(x=0.15)
    clean = figures["clean"]["ce"][0]
    ax.set(xlabel=f"rise of cross-entropy over the untouched model's {clean:.3f} nats", title="What the model loses with each in place of the activation")


def density_figure(fig, density: Tensor) -> None:
    """Histogram of `density` (d_sae): dead latents have no place on a log axis and are counted in the title."""
    ax, alive = fig.add_subplot(), density > 0
    ax.hist(density[alive].log10().numpy(), bins=60, color="tab:blue")
    ax.axvline(-1, color="tab:red", lw=0.8, label=f"ultra-dense: {int((density > 0.1).sum())}")
    title = f"{int(alive.sum()):,} live latents, {int((~alive).sum()):,} dead"
    ax.set(xlabel="log10 of density (share of held-out tokens)", ylabel="latents", title=title)
    ax.legend(fontsize="small")


def density_strength_figure(fig, density: Tensor, strength: Tensor, mean_act: Tensor) -> None:
    """How often against how strongly, for every live latent; all (d_sae)."""
    ax, alive = fig.add_subplot(), density > 0
    for values, name, colour in ((strength, "maximum", "tab:blue"), (mean_act, "mean when active", "tab:orange")):
        ax.scatter(density[alive], values[alive], s=6, alpha=0.5, color=colour, label=name, linewidths=0, rasterized=True)
    ax.set(xscale="log", yscale="log", xlabel="density (share of held-out tokens)", ylabel="activation")
    ax.set_title("How often and how strongly latents fire")
    ax.legend(fontsize="small")


def half_of(mass: Tensor) -> int:
    """How many latents it takes, those with most first, to make half of the whole `mass` (d_sae)."""
    total = mass.double().sort(descending=True).values.cumsum(0)
    return int((total < 0.5 * total[-1]).sum()) + 1


def strength_curve(fig, density: Tensor, strength: Tensor, mean_act: Tensor) -> None:
    """Live latents from the strongest to the weakest, and how many carry how much of all activation; all (d_sae)."""
    alive = (density > 0).nonzero().flatten()
    left, right = fig.subplots(1, 2)
    order = alive[strength[alive].argsort(descending=True)]
    left.plot(np.arange(1, len(order) + 1), mean_act[order], ".", ms=2, color="tab:orange", label="its mean when active", rasterized=True)
    left.plot(np.arange(1, len(order) + 1), strength[order], color="tab:blue", label="maximum")
    left.set(yscale="log", xlabel="live latents, the strongest first", ylabel="activation")
    left.set_title(f"half of the live ones exceed {strength[alive].median():.2g}", fontsize="medium")
    left.legend(fontsize="small")
    mass = density * mean_act
    shares = (mass[alive].double().sort(descending=True).values.cumsum(0) / mass.double().sum()).numpy()
    right.plot(np.arange(1, len(shares) + 1), shares, color="tab:blue")
    right.axhline(0.5, color="0.7", lw=0.8)
    right.set(xscale="log", ylim=(0, 1.02), xlabel="latents, most activation first", ylabel="share of all activation")
    right.set_title(f"{half_of(mass):,} latents have half of it", fontsize="medium")


def on_grid(values: Tensor) -> np.ndarray:
    """Values (d_sae) row by row on a grid about as wide as high, its width a power of two; NaN where the last row has none."""
    width = 2 ** int(np.ceil(np.log2(len(values)) / 2))
    grid = np.full((-(-len(values) // width), width), np.nan)
    grid.flat[: len(values)] = values.numpy()
    return grid


def strength_heatmap(fig, strength: Tensor, mean_act: Tensor) -> None:
    """Every latent's strength, in order of its number; both (d_sae)."""
    for ax, (values, name) in zip(fig.subplots(1, 2, sharey=True), ((strength, "maximum"), (mean_act, "mean when active")), strict=True):
        grid = on_grid(values)
        image = ax.imshow(grid, cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
        fig.colorbar(image, ax=ax, label="activation", location="bottom")
        ax.set(xlabel=f"latent number, modulo {grid.shape[1]}", title=f"Strength: {name}")
    fig.axes[0].set_ylabel(f"latent number // {grid.shape[1]}")


def bar_heights(values: Tensor, density: Tensor, most: int = 1024) -> tuple[np.ndarray, int]:
    """(heights, latents to a bar): means of `values` (d_sae) over neighbours in order of density, the most frequent first,
    in at most `most` bars."""
    group = -(-len(values) // most)
    return np.array([part.mean().item() for part in values[density.argsort(descending=True)].split(group)]), group


def strength_bars(fig, density: Tensor, strength: Tensor, mean_act: Tensor) -> None:
    """The same in order of density, as bars in rows of 32; all (d_sae)."""
    for place, (values, name) in enumerate(((strength, "maximum"), (mean_act, "mean when active")), 1):
        heights, group = bar_heights(values, density)
        rank = np.arange(len(heights))
        ax = fig.add_subplot(1, 2, place, projection="3d")
        colours = plt.cm.viridis(heights / max(heights.max(), 1e-9))
        ax.bar3d(rank % 32, rank // 32, 0, 0.9, 0.9, heights, color=colours, rasterized=True)
        ax.set(xlabel="place in the row", ylabel=f"row of {32 * group} latents", title=f"Strength: {name}")
        ax.locator_params(axis="y", nbins=4, integer=True)
        ax.set_box_aspect(None, zoom=0.85)
    each = "" if group == 1 else f"; each bar is the mean of {group} latents"
    fig.supxlabel(f"latents from the most frequent (row 0) to the rarest{each}", fontsize="small")


def known_figure(fig, facts: list[dict], hidden: Tensor, f1: dict[str, Tensor], found: dict[str, int], blind: Tensor) -> None:
    """Mean F1 over each variable's `hidden` (facts) values: of the best column of each of `f1` {name: (facts)}, of
    which `found` reach 0.9, and of a claim that is `blind` (facts)."""
    families = list(dict.fromkeys(fact["variable"] for fact, hard in zip(facts, hidden, strict=True) if hard))
    ax, where = fig.add_subplot(), np.arange(len(families))
    bars = {f"{name}: {found[name]} found": scores for name, scores in f1.items()} | {"the token alone, or 'always'": blind}
    of = {family: hidden & torch.tensor([fact["variable"] == family for fact in facts]) for family in families}
    height = 0.8 / len(bars)
    for i, (name, scores) in enumerate(bars.items()):
        means = [scores[of[family]].mean().item() for family in families]
        ax.barh(where + (i - (len(bars) - 1) / 2) * height, means, height, label=name, color="lightgray" if scores is blind else None)
    ax.set_yticks(where, families)
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="mean F1 of the best latent for each value", title="Hidden variables and the latents that match them best")
    ax.legend(fontsize="small", loc="lower right")


# ---------------------------------------------------------------------------------------------
# What the pages hold
# ---------------------------------------------------------------------------------------------


def title_of(params: dict) -> str:
    """Model and layer."""
    return f"{showing.model_name(params['model_name'])}, layer {params['layer']}"


def made(file: Path, device: str) -> str:
    """When and by what a run was made: `file` is its params.json, written when the run began."""
    recorded, begun, now = json.loads(file.read_text()), file.stat().st_mtime, time.time()
    utc = lambda seconds: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    versions = ", ".join(f"{name} {version}" for name, version in recorded["versions"].items())
    return f"Begun {utc(begun)}, this report {showing.duration(now - begun)} later, on {device}; commit {(recorded['git_commit'] or 'unknown')[:12]}; {versions}."


def first_page(pages: Report, params: dict, sae: sae_utils.SAE, metrics: dict, when: str = "") -> None:
    """What was found, what deserves a second look, the settings, and `when` and by what it was made."""
    pages.page()
    pages.paragraph(f"Sparse autoencoder: {title_of(params)}", size=16, weight="bold")
    pages.paragraph(f"{sae.config['hook_name']}, {sae.d_in} wide, {sae.d_sae:,} latents ({sae.architecture}); text: {params['dataset_name']}", color="0.3")
    if "source" in sae.config:
        pages.paragraph(f"trained before, read from {sae.config['source']} ({sae.config['format']})", color="0.3")
    pages.y -= 0.1
    for sentence in metrics["findings"]:
        pages.paragraph(sentence, size=10)
    pages.heading("What deserves a second look")
    for line in [*metrics["doctor"], *metrics["notices"]] or ["Neither the doctor nor a notice."]:
        pages.paragraph(line)
    pages.heading("Settings", needs=2)
    items = [f"{name}: {value}" if value != "" else f"{name}: -" for name, value in params.items()]
    short = [item for item in items if len(item) <= 58]
    half = -(-len(short) // 2)
    for i in range(half):
        pages.room(0.16)
        pages.put(0, short[i], size=7.5)
        pages.line(short[half + i] if half + i < len(short) else "", size=7.5, x=3.4)
    for item in items:
        if item not in short:
            pages.paragraph(item, size=7.5)
    if when:
        pages.y -= 0.1
        pages.paragraph(when, size=7.5, color="0.3")


def data_and_fidelity(pages: Report, metrics: dict) -> None:
    """The data card and the table of fidelity."""
    pages.page()
    pages.heading("The activations")
    pages.table(["", ""], [list(line) for line in data_lines(metrics["data"])], [2.2, 1.2], size=7.5)
    far = ", ".join(f"{place['token']!r} ({place['distance']:.3g}, position {place['position']})" for place in metrics["data"]["highest_norm_tokens"])
    pages.paragraph(f"Farthest from the mean: {far}.")
    pages.heading("Does the model still work?", needs=2.5)
    headings, *lines = fidelity.cells(metrics["fidelity"])
    pages.table(headings, lines, [1.15] + [5.5 / (len(headings) - 1)] * (len(headings) - 1))
    pages.paragraph("Small print: 95 % of bootstrap draws over documents. Definitions are on the last page.", size=8)


def latents(pages: Report, kept: dict, effects: dict[int, dict], as_text, labels: dict[int, str]) -> None:
    """An entry for each latent of `effects` ({latent: `features.measured_effect`}); `kept` is what features.npz holds. Then the most
    selective others."""
    pages.page()
    pages.heading(f"{len(effects)} latents, from the rarest to the most frequent")
    pages.paragraph(
        "Four places where each fires most, then one from the first, the sixth and the last tenth of its activations; in all text, so that they may "
        "exceed the strength, which is of held-out text. The framed token is the one, and the number its activation; the shade is how strongly "
        "the latent fires on a token, relative to its maximum, and small figures below say it where there is room. A dot is a space, ↵ a newline, "
        "‹ a token that only continues a character; bytes that are none by themselves stand as \\xe2."
    )
    for latent, effect in effects.items():
        latent_entry(pages, latent, kept, effect, as_text, labels.get(latent, ""))
    picked = most_selective(kept, without=list(effects))
    if not picked:
        return
    pages.page()
    pages.heading(f"The {len(picked)} most selective of the others")
    pages.paragraph(
        "Picked, not drawn: two places of one of these latents most often have the same token, there or next to it, rare tokens counting more. No two of "
        "them have the same most frequent token. They read more easily than latents do on the whole; what their ablation does was not measured here."
    )
    for latent in picked:
        latent_entry(pages, latent, kept, None, as_text, labels.get(latent, ""))


def most_selective(kept: dict, n: int = 12, without: list[int] = ()) -> list[int]:
    """The live latents of highest selectivity (`features.selectivity`), the more frequent first where that is equal; one for each most
    frequent token, and none of `without`."""
    text = kept["text"] if "text" in kept else kept["tokens"][kept["tokens"] >= 0]
    score, first = features.selectivity(kept["tokens"], text)[0], kept["fired_tokens"][:, 0]
    picked = {}
    for latent in np.lexsort((-kept["density"], -score)).tolist():
        if kept["density"][latent] > 0 and score[latent] > 0 and latent not in without:
            picked.setdefault(int(first[latent]), latent)
    return list(picked.values())[:n]


def latent_entry(pages: Report, latent: int, kept: dict, effect: dict | None, as_text, label: str = "") -> None:
    """One latent: contexts, what it promotes by the direct path, what is measured when it is ablated, where that was done."""
    pages.room(1.9)
    at = lambda name: kept[name][latent]
    name = f"latent {latent}" + (f": {label}" if label else "")
    pages.line(f"{name}   density {at('density'):.3%}, strength {at('max_act'):.2f}", size=8.5, weight="bold", gap=1.8)
    highest = max(at("max_act").item(), float(at("acts").max()))
    n_places, width = at("tokens").shape  # the last ten places are one of each tenth; the token itself stands in the middle
    for place in [0, 1, 2, 3, n_places - 10, n_places - 5, n_places - 1]:
        there = at("tokens")[place] >= 0
        if there[width // 2]:
            acts, pieces = at("acts")[place], showing.whole([as_text(int(token)) for token in at("tokens")[place][there]])
            pages.tokens(pieces, acts[there].tolist(), highest, int(there[: width // 2].sum()))
    words = lambda ids: " ".join(as_text(int(token)).strip() or "·" for token in ids[:8])
    pages.paragraph(f"promotes {words(at('promoted'))}   suppresses {words(at('suppressed'))}", size=7)
    if effect:
        moved = "; ".join(f"{as_text(token).strip()} {change:+.2f}" for token, change in effect["falls"][:4] + effect["rises"][:3])
        pages.paragraph(f"ablated: KL {effect['kl']:.4f}; {moved or 'nothing moves'}", size=7)
    pages.y -= 0.08


def definitions(pages: Report) -> None:
    """What the words mean."""
    pages.heading("Definitions", needs=3)
    for word, meaning in DEFINITIONS.items():
        pages.paragraph(f"{word}: {meaning}.", size=8)
    if pages.not_drawn:
        scripts = dict.fromkeys(unicodedata.name(c, "others").split()[0].lower() for c in sorted(pages.not_drawn))
        pages.paragraph(f"□ stands for {len(pages.not_drawn)} characters that no installed font has ({', '.join(scripts)}); features.html shows them.", size=8)


def write_overview(path: Path, title: str, four: list) -> None:
    """One picture of a run: `title` and four drawings (functions of a figure), row by row."""
    fig = plt.figure(figsize=(13, 9), layout="constrained")
    fig.suptitle("\n".join(showing.plot_text(plain(line)) for line in textwrap.wrap(title, 150)), size=11, family=fonts_for(plain(title)))
    for part, draw in zip(fig.subfigures(2, 2, height_ratios=[6, 5]).flat, four, strict=True):
        draw(part)
    with sae_utils.atomic(path) as temporary:
        fig.savefig(temporary, format="png", dpi=100)
    plt.close(fig)


def add_to_tensorboard(writer, params: dict, metrics: dict, drawings: dict) -> None:
    """Figures, settings, the table of fidelity and findings, and the parameters beside the results (HParams).

    HParams takes the columns of all runs from the first summary of an experiment that it meets, and torch's `add_hparams`
    writes one into each run. Without any it looks at the runs themselves, and what varies between them comes first. Every
    scalar is a result to it then, in the order of their names, five of them shown at once: "Final" stands before "epoch".
    """
    for name, draw in drawings.items():
        fig = plt.figure(figsize=(8, 5), layout="constrained")
        draw(fig)
        writer.add_figure(name, fig)
    writer.add_text("settings", markdown_table([["parameter", "value"], *params.items()]))
    writer.add_text("fidelity", markdown_table(fidelity.cells(metrics["fidelity"])))
    writer.add_text("findings", "\n\n".join(metrics["findings"]))
    final = {name: metrics[name] for name in ("fvu", "l0", "dead", "ce_recovered")} | {"ce_increase": metrics["ce_spliced"] - metrics["ce_clean"]}
    final = {f"Final/{name}": value for name, value in final.items() if value is not None}
    what = {name: str(value).lower() if isinstance(value, bool) else value for name, value in params.items() if name not in ("run_dir", "device", "checkpoint_minutes")}
    _, begin, end = hparams(what, final)
    for summary in (begin, end):
        writer.file_writer.add_summary(summary)
    for name, value in final.items():
        writer.add_scalar(name, value)
