"""On Colab and Kaggle: what the notebooks' first cell calls once it has fetched the repository."""

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_THERE = {"jupyter", "nbstripout", "pytest", "pytest-xdist"}  # the notebook runs in a Jupyter already, and no tests are run


def installed(name: str) -> str:
    """The version of a package, or "" where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def install() -> None:
    """Installs what requirements.txt names and a notebook needs, and goes to the folder of the notebooks. A torch that is
    there is kept, since it was built for that machine's GPU; it says so."""
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    wanted = {re.match(r"[\w-]+", line)[0]: line for line in lines if line and not line.startswith("#")}
    wanted = {name: line for name, line in wanted.items() if name not in NOT_THERE}
    before = {name: installed(name) for name in wanted}
    if before["torch"]:
        print(f"torch {before['torch']} is kept as it is here; tested was {wanted['torch']}.")
        wanted["torch"] = f"torch=={before['torch']}"  # no other package may ask for another
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted.values()], check=True)
    importlib.invalidate_caches()
    changed = [name for name in wanted if name in sys.modules and installed(name) != before[name]]
    if changed:
        print(f"{', '.join(changed)} had been imported before another version came: restart the session, and run this cell again.")
    os.chdir(ROOT / "notebooks")
