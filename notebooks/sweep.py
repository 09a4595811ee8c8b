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
import sae_utils

# What the rows depend on, beside the layer.
OF_ROWS = """model_name model_revision hook dataset_name dataset_revision dataset_config dataset_split text_column n_activations chat seq_len
    activation_dtype dtype""".split()


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
    before them; and for each its flags, which come after `flags`.

    UserError, before anything runs, where the grid is none, an axis does nothing, or a name is taken.
    """
    if not re.fullmatch(r"[\w./-]*\w", sweep):
        raise sae_utils.UserError(f"SWEEP {sweep!r} names no folder: letters, digits, '.', '-' and '_' will do.")
    axes, given = read_grid(grid), experiment.given_params(sae_utils.ROOT / "notebooks" / "sae_training.ipynb", flags)
    as_flags = lambda part: "".join(f" -p {name} {shlex.quote(str(value))}" for name, value in part.items()).replace("$", "$$").replace("#", "\\#")
    of_cell, of_rows, missing = {}, {}, 0
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
        of_cell[target] = [f"SETTINGS :={as_flags(here | {'run_dir': params['run_dir']})}"]
        missing += not finished
        if not finished and not params["trained_sae"]:
            rows = {name: value for name, value in here.items() if name in OF_ROWS}
            name = experiment.safe_name(Path(sweep).name, *(part for part, axis in zip(short, here, strict=True) if axis in rows), "rows")
            layers, _ = of_rows.setdefault(name, ({}, as_flags(rows | {"run_dir": params["run_dir"]})))
            layers[params["layer"]] = True  # a set that keeps its order
            of_cell[target].append(f"| {name}")
    print(f"{sweep}: {len(of_cell) - missing} of {len(of_cell)} cells are finished", file=sys.stderr, flush=True)
    lines = [f"CELLS := {' '.join(of_cell)}", f"ROWS := {' '.join(of_rows)}"]
    lines += [f"{target}: {line}" for target, about in of_cell.items() for line in about]
    for name, (layers, settings) in of_rows.items():
        lines += [f"{name}: AT := {' '.join(map(str, layers))}", f"{name}: SETTINGS :={settings}"]
    return "\n".join(lines)


def minutes_of(folder: Path) -> float | None:
    """What papermill noted of a run's last start; None where the run was killed after its last cell, before its notebook had its name."""
    try:
        return json.loads((folder / "sae_training.ipynb").read_text())["metadata"]["papermill"]["duration"] / 60
    except (OSError, ValueError, KeyError, TypeError):
        return None


def figures_of(folder: Path) -> dict[str, str] | None:
    """Of a finished run, on held-out rows: fvu, L0, CE increase (nats), dead; and minutes, those of its last start where
    it was stopped in between. None where its files do not tell."""
    try:
        found = json.loads((folder / "metrics.json").read_text())
        figures = found["fvu"], found["l0"], found["ce_spliced"] - found["ce_clean"], found["dead"], minutes_of(folder)
        written = ("-" if value is None else format(value, form) for value, form in zip(figures, (".4f", ".1f", "+.4f", ".1%", ".1f"), strict=True))
        return dict(zip(("fvu", "L0", "CE increase", "dead", "minutes"), written, strict=True))
    except (OSError, ValueError, KeyError, TypeError):  # half-written, or of something else
        return None


def what_failed(folder: Path) -> str:
    """Why a run is not finished, as far as its folder tells."""
    try:
        cells = json.loads((folder / "sae_training.failed.ipynb").read_text())["cells"]
        error = next(out for cell in cells for out in cell.get("outputs", []) if out["output_type"] == "error")
        return f"failed: {error['ename']}: {error['evalue']}"[:200]
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return "not finished: where it began, the lines above that begin with its name tell why"


def table(file: str) -> None:
    """Prints what came of each cell of `plan`'s file: its figures on held-out rows, or why there are none."""
    cells = Path(file).read_text().splitlines()[0].split()[2:]
    folders = [sae_utils.resolve(cell).parent for cell in cells]
    finished = [folder for folder in folders if (folder / ".done").exists()]
    width, names = max(len(folder.name) for folder in folders), ("fvu", "L0", "CE increase", "dead", "minutes")
    print("", "  ".join(["run".ljust(width), *(name.rjust(8) for name in names)]), sep="\n")
    for folder in folders:
        found = figures_of(folder) if folder in finished else None
        said = "its figures cannot be read" if folder in finished else what_failed(folder)
        print("  ".join([folder.name.ljust(width), *(found[name].rjust(max(8, len(name))) for name in names)] if found else [folder.name.ljust(width), said]))
    print(f"{len(finished)} of {len(folders)} cells are finished" + ("." if finished == folders else "; asked again, only the others run."))
