"""The notebooks' first cell, tagged `colab`: nothing at home; on Colab and Kaggle it fetches modules and packages."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import colab

NOTEBOOKS = [json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text()) for name in ("sae_training", "patch_neurons")]
FIRST = [[cell for cell in notebook["cells"] if cell["cell_type"] == "code"][0] for notebook in NOTEBOOKS]
CELLS = ["".join(cell["source"]) for cell in FIRST if "colab" in cell["metadata"].get("tags", [])]
WHERE = {"colab": "sys.modules['google.colab'] = 0", "kaggle": "os.environ['KAGGLE_KERNEL_RUN_TYPE'] = 'Interactive'", "home": ""}


def test_both_notebooks_have_the_same_short_cell():
    assert len(CELLS) == 2 and CELLS[0] == CELLS[1] and CELLS[0].count("\n") < 8 and CELLS[0].count("REPOSITORY = ") == 1


@pytest.fixture
def away(tmp_path):
    """A function that runs the cell `times` in an empty folder `here`, somewhere, and then `more`; pip only writes down what it
    was asked for. Returns (what it printed last, what pip was asked for at each call, standard error)."""
    repository, here, fake = tmp_path / "repository", tmp_path / "here", tmp_path / "fake" / "pip"
    shutil.copytree(ROOT / "notebooks", repository / "notebooks", ignore=shutil.ignore_patterns("__pycache__", "secret_tokens.py"))
    for name in ("sae_utils.py", "requirements.txt"):
        shutil.copy(ROOT / name, repository)
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@y"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    here.mkdir()
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "__main__.py").write_text(f"import json, sys; print(json.dumps(sys.argv[1:]), file=open({str(tmp_path / 'asked')!r}, 'a'))")

    def run(where, address=f"file://{repository}", times=1, more=""):
        cell = CELLS[0].replace('REPOSITORY = ""', f"REPOSITORY = {address!r}")
        assert repr(address) in cell
        script = f"import os, sys\n{WHERE[where]}\ncell, before = {cell!r}, set(sys.modules)\n"
        script += f"for _ in range({times}): exec(cell, globals())\n{more}\nfrom importlib.util import find_spec\n"
        script += "import json; print(json.dumps([os.getcwd(), *(getattr(find_spec(name), 'origin', None) for name in ('sae_utils', 'harvest'))]))"
        environment = {name: value for name, value in os.environ.items() if name != "KAGGLE_KERNEL_RUN_TYPE"} | {"PYTHONPATH": str(tmp_path / "fake")}
        done = subprocess.run([sys.executable, "-c", script], cwd=here, env=environment, capture_output=True, text=True, check=False)
        asked = (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []
        return done.stdout, [json.loads(line) for line in asked], done.stderr

    run.here = here
    return run


@pytest.mark.parametrize("where", ["colab", "kaggle"])
def test_away_from_home_it_fetches_modules_and_packages(where, away):
    """Run twice in a session, it does it once; run in another session, it keeps what was fetched."""
    out, asked, errors = away(where, times=2)
    fetched = away.here / "sae"
    assert json.loads(out.splitlines()[-1]) == [str(fetched / "notebooks"), str(fetched / "sae_utils.py"), str(fetched / "notebooks" / "harvest.py")], errors
    assert (fetched / ".git" / "shallow").exists() and len(asked) == 1
    assert asked[0][:2] == ["install", "--quiet"] and f"torch=={importlib.metadata.version('torch')}" in asked[0]
    assert f"torch {importlib.metadata.version('torch')} is kept as it is here" in out
    names = {word.partition(">")[0].partition("=")[0] for word in asked[0][2:]}
    assert {"transformers", "datasets", "papermill", "numpy"} <= names and not names & {"pytest", "jupyter"}
    (fetched / "runs").mkdir()
    out, asked, _ = away(where)
    assert (fetched / "runs").exists() and len(asked) == 2 and json.loads(out.splitlines()[-1])[0] == str(fetched / "notebooks")


def test_at_home_it_does_nothing(away):
    """Neither in an empty folder nor in the notebooks' own; it imports nothing."""
    out, asked, errors = away("home", more="assert set(sys.modules) == before, set(sys.modules) - before")
    assert json.loads(out.splitlines()[-1])[0] == str(away.here) and not asked and not errors and not list(away.here.iterdir())


def test_without_an_address_it_says_what_to_do(away):
    out, asked, errors = away("colab", address="")
    assert not out and not asked and "AssertionError: set REPOSITORY" in errors and not list(away.here.iterdir())


def test_a_repository_that_is_not_there_stops_it(away):
    out, asked, errors = away("colab", address=f"file://{away.here}/nowhere")
    assert not out and not asked and "AssertionError: it could not be fetched" in errors


def test_without_torch_the_tested_one_is_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
    monkeypatch.setattr(colab, "installed", lambda name: "")
    colab.install()
    assert "torch==2.13.0" in asked[0] and not capsys.readouterr().out


def test_a_package_that_changed_under_the_session_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    versions = {"papermill": iter("12"), "numpy": iter("12"), "torch": iter("11")}
    monkeypatch.setattr(subprocess, "run", lambda command, check: None)
    monkeypatch.setattr(colab, "installed", lambda name: next(versions.get(name, iter("1"))))
    monkeypatch.setitem(sys.modules, "numpy", sys.modules["numpy"])
    monkeypatch.delitem(sys.modules, "papermill", raising=False)
    colab.install()
    assert capsys.readouterr().out.splitlines()[1] == "numpy had been imported before another version came: restart the session, and run this cell again."
