"""A sweep: from a grid of parameters to a makefile whose targets are runs, and the table of what came of them.

`make sweep` has make carry it out. Each cell is an ordinary training run.
"""

import itertools
import json
import re
import shlex
import sys
from pathlib import Path

import experiment
import listing
import sae_utils
import typed

OF_ROWS = listing.ROWS - {"layer", "held_out_fraction", "non_finite"}  # what the rows depend on, beside the layer


def read_grid(grid: str) -> dict[str, list]:
    """{name: values} of "layer=2,6 k=16,32", checked and in their types. UserError for whatever is not such a grid."""
    axes = {}
    for word in grid.split():
        name, equals, values = word.partition("=")
        if not equals or not all(values.split(",")):
            raise sae_utils.UserError(f"the axis {word} lacks a value: write {name}=1,2, without spaces.")
        axis = [experiment.check_params("sae_training", {name: value})[name] for value in values.split(",")]
        if name in {"run_dir", *experiment.FREE}:
            raise sae_utils.UserError(f"{name} is no axis: it does not change what a run is.")
        if name in axes or len(set(axis)) < len(axis):
            raise sae_utils.UserError(f"the grid names {name if name in axes else word} twice.")
        axes[name] = axis
    if not axes:
        raise sae_utils.UserError('the grid is empty: make sweep GRID="layer=2,6 k=16,32".')
    return axes


def plan(grid: str, sweep: str, flags: list[str]) -> str:
    """The cells of a sweep as a makefile: CELLS, the files that say that a cell is finished; ROWS, what is harvested
    before them; and for each its flags, `flags` among them, as a shell reads them.

    UserError, before anything runs, where the grid is none, an axis does nothing, or a name is taken.
    """
    if not re.fullmatch(f"/?{typed.NAME}", sweep, re.ASCII):
        raise sae_utils.UserError(f"SWEEP {sweep!r} names no sweep: letters from a to z, digits, '.', '-' and '_' will do.")
    axes, given = read_grid(grid), typed.parameters(flags)
    for_make = lambda words: shlex.join(words).replace("$", "$$").replace("#", "$H")
    as_flags = lambda part: for_make([*flags, *(word for name, value in part.items() for word in ("-p", name, str(value)))])
    if "\n" in "".join(flags):
        raise sae_utils.UserError("what a sweep is given stands on one line each: leave line breaks out.")
    of_cell, of_rows, missing = {}, {}, []
    for values in itertools.product(*axes.values()):
        here = dict(zip(axes, values, strict=True))
        params = experiment.check_params("sae_training", given | here)
        if in_vain := [why for name, why in experiment.idle(params).items() if name in here]:
            raise sae_utils.UserError(f"{in_vain[0]}: it is no axis there.")
        short = [name.replace("_", "") + (f"{value:g}" if isinstance(value, float) else Path(str(value)).name) for name, value in here.items()]
        params["run_dir"] = str(Path("runs") / Path(sweep).parent / experiment.safe_name(Path(sweep).name, *short))
        folder, finished = experiment.run_folder(params)
        target = f"{sae_utils.show_path(folder)}/.done"
        if target in of_cell:
            raise sae_utils.UserError(f"two cells would be called {folder.name}: sweep {' '.join(axes)} apart, under two names (SWEEP=).")
        of_cell[target] = [f"SETTINGS := {as_flags(here | {'run_dir': params['run_dir']})}"]
        missing += [] if finished else [target]
        if not finished and not params["trained_sae"]:
            rows = {name: value for name, value in here.items() if name in OF_ROWS}
            name = experiment.safe_name(Path(sweep).name, *(part for part, axis in zip(short, here, strict=True) if axis in rows), "rows")
            layers, _ = of_rows.setdefault(name, ({}, as_flags(rows | {"run_dir": params["run_dir"]})))
            layers[params["layer"]] = True  # a set that keeps its order
            of_cell[target].append(f"| {name}")
    print(f"{sweep}: {len(of_cell) - len(missing)} of {len(of_cell)} cells are finished", file=sys.stderr, flush=True)
    # A .done that is not whole, or whose run lacks a file, is no finished cell, whatever make thinks of it.
    lines = [f"CELLS := {' '.join(of_cell)}", f"ROWS := {' '.join(of_rows)}", "H := \\#", f".PHONY: {' '.join(missing)}"]
    lines += [f"{target}: {line}" for target, about in of_cell.items() for line in about]
    for name, (layers, settings) in of_rows.items():
        lines += [f"{name}: AT := {' '.join(map(str, layers))}", f"{name}: SETTINGS := {settings}"]
    return "\n".join(lines)


def minutes_of(folder: Path) -> float | None:
    """What papermill noted of a run's last start; None of a run in Jupyter."""
    try:
        return json.loads((folder / "sae_training.ipynb").read_text())["metadata"]["papermill"]["duration"] / 60
    except (OSError, ValueError, KeyError, TypeError):
        return None


def table(file: str) -> None:
    """Prints what came of each cell of `plan`'s file: its figures on held-out rows, or why there are none; minutes are those
    of its last start, where it was stopped in between."""
    cells = Path(file).read_text().splitlines()[0].split()[2:]
    runs = [listing.read_run(sae_utils.resolve(cell).parent, whole=False) for cell in cells]
    names = {"fvu": ".4f", "l0": ".1f", "ce_increase": "+.4f", "dead": ".1%", "minutes": ".1f"}
    width = max(len(run.name) for run in runs)
    print("", "  ".join(["run".ljust(width), *(name.rjust(8) for name in ("fvu", "L0", "CE increase", "dead", "minutes"))]), sep="\n")
    for run in runs:
        found = run.figures | {"minutes": minutes_of(run.folder)}
        figures = "  ".join(("-" if found[name] is None else format(found[name], form)).rjust(11 if name == "ce_increase" else 8) for name, form in names.items()) if run.figures else ""
        begun = run.reason if run.folder.exists() else "not begun: the lines above that begin with its name tell why"
        print(f"{run.name.ljust(width)}  {figures or begun}")
    finished = sum(run.state == "finished" for run in runs)
    print(f"{finished} of {len(runs)} cells are finished" + ("." if finished == len(runs) else "; asked again, only the others run."))
