"""Runs side by side: fronts, heatmaps, and how much of one SAE another finds again. compare_runs.ipynb shows them."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import sae_utils
import showing
import storing
from listing import Run
from sae_utils import UserError

def grouped(runs: list[Run], key) -> list[list[Run]]:
    """The runs in groups of equal `key(run)`, a dict of plain values; the largest first."""
    groups = {}
    for run in runs:
        groups.setdefault(json.dumps(key(run), sort_keys=True), []).append(run)
    return sorted(groups.values(), key=len, reverse=True)


def varying(tables: list[dict], lacking: bool = True) -> list[str]:
    """The names whose value is not the same in all of `tables`; that a table lacks a name counts as a value of its own
    unless `lacking` is False."""
    names = dict.fromkeys(name for table in tables for name in table)
    values = lambda name: {json.dumps(table.get(name, "there is none")) for table in tables if lacking or name in table}
    return [name for name in names if len(values(name)) > 1]


def unlike(one: dict, other: dict) -> list[list[str]]:
    """[name, value in one, value in other] of all that differs; "-" where one has it not."""
    return [[name, *(str(table[name]) if name in table else "-" for table in (one, other))] for name in varying([one, other])]


def titles(groups: list[list[Run]]) -> list[str]:
    """A title for each group of comparable runs: model, hook, text and rows, and where that says too little what differs."""
    first = [group[0] for group in groups]
    plain = [f"{Path(r.params['model_name']).name}, {r.key['hook_name']}, {Path(r.params['dataset_name']).name}, {r.key['rows']:,} rows" for r in first]
    alike = lambda title: [r.key for r, other in zip(first, plain, strict=True) if other == title]
    more = [", ".join(f"{name} {run.key[name]}" for name in varying(alike(title))) for run, title in zip(first, plain, strict=True)]
    return [f"{title} ({words})" if words else title for title, words in zip(plain, more, strict=True)]


def ranked(runs: list[Run], sort: str) -> list[Run]:
    """The runs in order of a figure or parameter, smallest first, or largest with "-" in front; runs that lack it last."""
    name = sort.removeprefix("-")
    if not any(name in run.values | run.figures for run in runs):
        known = [*varying([run.values for run in runs]), *dict.fromkeys(name for run in runs for name in run.figures)]
        raise UserError(f"there is nothing called {name!r} to sort by; there are: {', '.join(known)}.")
    value = lambda run: (run.values | run.figures)[name]
    having = sorted((run for run in runs if name in run.values | run.figures), key=lambda run: (isinstance(value(run), str), value(run)), reverse=sort[0] == "-")
    return having + [run for run in runs if run not in having]


def cells(runs: list[Run]) -> list[list[str]]:
    """A table of `runs`, the headings first: what varies, then the figures, CE increase with its interval below."""
    names = varying([run.values for run in runs], lacking=False)
    lines = [["run", *names, "L0", "fvu", "CE increase", "CE recovered", "KL", "dead"]]
    for run in runs:
        figure, (_, low, high) = run.figures, run.metrics["fidelity"]["sae"]["ce_increase"]
        optional = [f"{figure[name]:{form}}" if name in figure else "-" for name, form in (("ce_recovered", ".3f"), ("kl", ".2g"))]
        rise = f"{figure['ce_increase']:+.4f}\n{low:+.4f} to {high:+.4f}"
        doubted = "*" * any(remark.startswith("doctor") for remark in run.remarks)
        lines.append([run.name + doubted, *(str(run.values.get(name, "-")) for name in names), f"{figure['l0']:.1f}", f"{figure['fvu']:.4f}", rise, *optional, f"{figure['dead']:.1%}"])
    return lines


def joined(runs: list[Run], *figures: str) -> list[dict]:
    """An entry for each of the settings: its `runs` (seeds) and of each figure (mean, lowest, highest)."""
    spread = lambda values: (float(np.mean(values)), min(values), max(values))
    groups = grouped(runs, lambda run: run.settings)
    return [{"runs": seeds} | {name: spread([run.figures[name] for run in seeds]) for name in figures} for seeds in groups]


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """The points (x, y) that no other beats, smaller being better in both: the numbers of those than which none is at
    least as good in both and better in one; by x."""
    beaten = lambda a: any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in points)
    return sorted((i for i, point in enumerate(points) if not beaten(point)), key=lambda i: points[i])


def widest(runs: list[Run], n: int = 2) -> list[str]:
    """`n` parameters to lay runs out by, as far as there are so many that vary among runs that have them all: those with
    most values, the layer before all others, the seed last."""
    rank = lambda name: (name != "layer", name == "seed", -len({run.values.get(name) for run in runs}))
    first = sorted(varying([run.values for run in runs], lacking=False), key=rank)[:1]
    having = [{**run.values, name: None} for name in first for run in runs if name in run.values]
    return first + sorted(varying(having, lacking=False), key=rank)[: n - 1]


def heat(runs: list[Run], x: str, y: str, figure: str) -> tuple[list, list, np.ndarray, np.ndarray, list[str]]:
    """(values of x, values of y, means (y, x) of the figure, NaN where there is no run, counts (y, x), what else varies
    within a cell and so is averaged over). Runs without one of the three are left out."""
    for name in (x, y):
        if not any(name in run.values for run in runs):
            raise UserError(f"there is no parameter {name} to lay runs out by; those that vary: {', '.join(varying([run.values for run in runs])) or 'none'}.")
    if not (runs := [run for run in runs if {x, y} <= set(run.values) and figure in run.figures]):
        raise UserError(f"no run has {figure} and both {x} and {y}.")
    cells = {}
    for run in runs:
        cells.setdefault((run.values[y], run.values[x]), []).append(run)
    xs, ys = ({v for _, v in cells}, {v for v, _ in cells})
    xs, ys = (sorted(values, key=lambda v: (isinstance(v, str), v)) for values in (xs, ys))
    means = np.array([[np.mean([run.figures[figure] for run in cells[b, a]]) if (b, a) in cells else np.nan for a in xs] for b in ys])
    counts = np.array([[len(cells.get((b, a), [])) for a in xs] for b in ys])
    return xs, ys, means, counts, list(dict.fromkeys(name for cell in cells.values() for name in varying([run.values for run in cell])))


# ---------------------------------------------------------------------------------------------
# Stability
# ---------------------------------------------------------------------------------------------


def best_match(rows: Tensor, others: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """(cosine (n), which (n)): for each of `rows` (n, d_in) the one of `others` (m, d_in) whose direction is most like it."""
    unit = lambda t: t.float() / t.float().norm(dim=1, keepdim=True).clamp_min(1e-12)
    best = [(part @ unit(others).T).max(1) for part in unit(rows).split(chunk)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def live(run: Run) -> tuple[Tensor, Tensor]:
    """(the latents that fire on held-out rows (n), their directions (n, d_in)) of a run's SAE."""
    sae = sae_utils.SAE.load(run.folder / "sae.pth")
    which = (sae.density > 0).nonzero().flatten()
    return which, sae.W_dec.detach()[which]


def stability(run: Run, group: list[Run], above: float = 0.9, most: int = 3) -> dict:
    """How much of a run's dictionary others of its `group` find again: of its live latents, the share whose best cosine
    among another run's live ones is larger than `above`.

    `same`: mean share over the runs of the same settings with another seed; `other`: over those of other settings, at
    most `most`, the nearest in L0; `random`: among as many random directions as the run has latents. None where there
    is no run to compare with: equal seeds begin with the same directions and see the same batches, so they do not count;
    nor do SAEs from elsewhere (`trained_sae`), whose seed is not known.
    Where `same` is a number, stability.npz is written into the run's folder: runs (n) by name, cosine (n, d_sae) and
    match (n, d_sae), the best cosine and the latent it is of in each of these, and stability (d_sae), the mean of these
    cosines; NaN and -1 for dead latents.
    """
    apart = [r for r in group if r.params["seed"] != run.params["seed"] and not r.params["trained_sae"] and not run.params["trained_sae"]]
    seeds = [r for r in apart if r.settings == run.settings]
    others = sorted([r for r in apart if r.settings != run.settings], key=lambda r: (abs(r.figures["l0"] - run.figures["l0"]), r.name))[:most]
    which, rows = live(run)
    share = lambda cosine: (cosine > above).double().mean().item()
    cosine, match = np.full((len(seeds), run.metrics["d_sae"]), np.nan, np.float32), np.full((len(seeds), run.metrics["d_sae"]), -1, np.int32)
    for i, seed in enumerate(seeds):
        theirs, directions = live(seed)
        best, at = best_match(rows, directions)
        cosine[i, which], match[i, which] = best.numpy(), theirs[at].numpy()
    if seeds:
        found = {"runs": [seed.name for seed in seeds], "cosine": cosine, "match": match, "stability": cosine.mean(0)}
        storing.save_arrays(run.folder / "stability.npz", found, compressed=True)
    # numpy's numbers: torch's of the same seed are the very directions that an SAE begins with
    noise = torch.from_numpy(np.random.default_rng(run.params["seed"]).standard_normal((run.metrics["d_sae"], rows.shape[1])))
    return {
        "run": run.name, "live": len(which), "same": float(np.mean(cosine[:, which] > above)) if seeds else None, "seeds": len(seeds),
        "other": float(np.mean([share(best_match(rows, live(other)[1])[0]) for other in others])) if others else None, "others": [other.name for other in others],
        "random": share(best_match(rows, noise)[0]), "each": cosine.mean(0)[which] if seeds else np.array([]),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


COLOURS = {name: f"C{i}" for i, name in enumerate(sae_utils.ARCHITECTURES)}
MARKS = {"pca": ("s", "principal components"), "kmeans": ("^", "k-means"), "untrained": ("x", "random directions")}  # of YARDSTICKS


def in_digits(*log_axes) -> None:
    """Plain numbers along logarithmic axes: powers of ten, twice and five times these."""
    for axis in log_axes:
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axis.set_tick_params(which="both", labelsize="small")


def front(ax, group: list[Run], figure: str) -> None:
    """L0 against a figure, yardsticks in grey, and for each architecture its settings and the line of its front."""
    for arm, (mark, label) in MARKS.items():
        of = [run.metrics["fidelity"][arm] for run in group]
        ax.plot([a["l0"][0] for a in of], [a[figure][0] for a in of], mark, color="0.6", ms=4, label=label)
    for alike in grouped(group, lambda run: {"": run.settings["architecture"]}):
        points, architecture = joined(alike, "l0", figure), alike[0].settings["architecture"]
        x, y = (np.array([point[name] for point in points]) for name in ("l0", figure))
        reach, style = (lambda v: np.abs(v[:, 1:] - v[:, :1]).T), {"color": COLOURS.get(architecture, "black")}
        ax.errorbar(x[:, 0], y[:, 0], xerr=reach(x), yerr=reach(y), fmt="o", ms=4, capsize=2, lw=1, label=architecture, **style)
        best = pareto(list(zip(x[:, 0].tolist(), y[:, 0].tolist(), strict=True)))
        ax.plot(x[best, 0], y[best, 0], lw=1.2, **style)
        for i in best:
            words = str(points[i]["runs"][0].settings.get(sae_utils.ARCHITECTURES[architecture].knob, ""))
            ax.annotate(words, (x[i, 0], y[i, 0]), (4, 4), textcoords="offset points", fontsize=7, **style)


def fronts_figure(fig, group: list[Run]) -> None:
    """The rise of cross-entropy and fvu against L0. A rise may be below zero: its axis is linear near it then."""
    for ax, figure, label in zip(fig.subplots(1, 2), ("ce_increase", "fvu"), ("rise of cross-entropy (nats)", "fvu"), strict=True):
        front(ax, group, figure)
        linear = min(run.metrics["fidelity"][arm][figure][0] for run in group for arm in ("sae", *MARKS)) <= 0
        ax.set_yscale("symlog", linthresh=1e-3) if linear else ax.set_yscale("log")
        ax.margins(x=0.12)
        ax.set(xscale="log", xlabel="L0 (latents active per token)", ylabel=label + ", linear within 0.001 of 0" * linear)
        in_digits(ax.xaxis, ax.yaxis)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")


def heat_figure(fig, xs: list, ys: list, means: np.ndarray, counts: np.ndarray, x: str, y: str, figure: str) -> None:
    """What `heat` returns, each cell with its value and the number of runs."""
    ax = fig.add_subplot()
    image = ax.imshow(means, cmap="viridis", aspect="auto", origin="lower")
    fig.colorbar(image, ax=ax, label=figure)
    ax.set(xticks=range(len(xs)), xticklabels=map(str, xs), yticks=range(len(ys)), yticklabels=map(str, ys), xlabel=x, ylabel=y)
    for (b, a), mean in np.ndenumerate(means):
        style = {"ha": "center", "va": "center", "fontsize": 8 if len(xs) <= 12 else 5, "color": "white" if image.norm(mean) < 0.6 else "black"}
        ax.text(a, b, f"{mean:.3g}\nn {counts[b, a]}" if counts[b, a] else "", **style)


def curves_figure(fig, group: list[Run]) -> None:
    """fvu, L0 and the share of silent latents on watched rows, epoch by epoch; a legend where there is room for one."""
    panels = {"held_out_fvu": "fvu", "held_out_l0": "L0", "held_out_dead": "share of latents silent"}
    for ax, (column, title) in zip(fig.subplots(1, 3), panels.items(), strict=True):
        for i, run in enumerate(group):
            style = {"color": plt.cm.tab20(i % 20), "ls": ("-", "--", ":", "-.")[i // 20 % 4], "label": showing.plot_text(run.name)}
            ax.plot([h["step"] for h in run.history], [h.get(column, np.nan) for h in run.history], ".", ms=3, lw=1, **style)
        values = [h[column] for run in group for h in run.history if column in h]
        wide = column != "held_out_dead" and max(values, default=0) > 3 * min(values, default=0) > 0
        ax.set(xlabel="step", title=title, yscale="log" if wide else "linear")
        in_digits(*[ax.yaxis] * wide)
    if len(group) <= 40:
        fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="x-small")


def stability_figure(fig, stable: list[dict], above: float) -> None:
    """What `stability` returns of some runs: the three shares, and every latent's own stability from the highest down."""
    bars, curves = fig.subplots(1, 2, width_ratios=[1, 1.2])
    where, names = np.arange(len(stable)), [showing.plot_text(s["run"]) for s in stable]
    for i, (arm, label, colour) in enumerate((("same", "same settings", "tab:blue"), ("other", "other settings", "tab:orange"), ("random", "random", "0.6"))):
        drawn = bars.barh(where + 0.27 * (i - 1), [s[arm] or 0 for s in stable], 0.25, label=label, color=colour)
        bars.bar_label(drawn, ["" if s[arm] is None else f"{s[arm]:.1%}" for s in stable], fontsize=5, padding=2)
    bars.set_yticks(where, names, fontsize="x-small")
    bars.set(xlim=(0, 1.1), xlabel=f"share of live latents with a match above {above:g}")
    bars.invert_yaxis()
    bars.legend(fontsize="x-small")
    for i, (s, name) in enumerate(zip(stable, names, strict=True)):
        curves.plot(np.linspace(0, 1, len(s["each"])), np.sort(s["each"])[::-1], lw=1, color=plt.cm.tab20(i % 20), label=name)
    curves.axhline(above, color="black", lw=0.7, ls=":")
    curves.set(xlabel="share of live latents", ylabel="mean best cosine in the other seeds", ylim=(0, 1.02), title="Each latent's own stability")
    curves.legend(fontsize="xx-small") if len(stable) <= 20 else None
