"""Runs a notebook headless: what `make train` and `make patch` call.

    python notebooks/launch.py NOTEBOOK [papermill flags]

papermill executes whatever it is given and writes over what is there. So parameters are checked
and the run's folder is looked at first, in a second and with one sentence for a mistake.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path

import click
import papermill
import papermill.cli

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sae_utils

# Where a notebook's executed copy goes, and whether what it makes is finished already.
FOLDERS = {
    "sae_training": sae_utils.run_folder,
    "patch_neurons": sae_utils.patch_folder,
    "tiny_model": lambda params: (sae_utils.resolve(params["world_dir"]), False),
}


def given_params(notebook: Path, flags: list[str]) -> dict:
    """The parameters as papermill itself reads them from its flags (-p, -f, -y, …)."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.ipynb"
        # papermill only logs a name it does not know; check_params refuses it, so the log adds nothing
        quiet = ["--prepare-only", "--no-progress-bar", "--log-level", "ERROR"]
        papermill.cli.papermill.main([*flags, *quiet, str(notebook), str(prepared)], standalone_mode=False)
        return json.loads(prepared.read_text())["metadata"]["papermill"]["parameters"]


def launch(name: str, flags: list[str]) -> Path:
    """Executes notebooks/<name>.ipynb into its folder, and returns that.

    What is finished with the same parameters is left as it is; with others it is refused. The
    executed notebook is <name>.running.ipynb until it is whole, <name>.failed.ipynb if it failed.
    """
    source = sae_utils.ROOT / "notebooks" / f"{name}.ipynb"
    params = sae_utils.check_params(name, given_params(source, flags))
    folder, finished = FOLDERS[name](params)
    if finished:
        print(f"{sae_utils.show_path(folder)} is finished: nothing to do.")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    executed = folder / source.name
    running, failed = executed.with_suffix(".running.ipynb"), executed.with_suffix(".failed.ipynb")
    try:
        papermill.execute_notebook(
            str(source), str(running), params, kernel_name="python3", cwd=str(sae_utils.ROOT), progress_bar=False, log_output=True
        )
    except BaseException:
        if running.exists():
            running.replace(failed)
        if not any(f for f in folder.iterdir() if f != failed):  # nothing was begun: leave no trace of it
            failed.unlink(missing_ok=True)
            folder.rmdir()
        raise
    running.replace(executed)
    failed.unlink(missing_ok=True)
    return folder


def main(args: list[str]) -> int:
    """0 when all went well; 2 for a mistake the user can mend, told in one sentence; else 1."""
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
    logging.getLogger("papermill").addFilter(lambda r: not r.getMessage().startswith(("Executing", "Ending", "Input", "Output")))
    try:
        launch(args[0], args[1:])
    except sae_utils.UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except click.ClickException as error:
        print(f"Error: papermill flags: {error.format_message()}", file=sys.stderr)
        return 2
    except papermill.PapermillExecutionError as error:
        mistake = error.ename == "UserError"
        print(f"Error: {error.evalue}" if mistake else "\n".join(error.traceback), file=sys.stderr)
        return 2 if mistake else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
