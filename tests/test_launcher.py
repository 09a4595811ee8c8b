"""The launcher: where runs may lie, when one is finished, what a mistake leaves, what is said of a machine's faults, and that no
token is left anywhere. What a notebook does is played by a function here, unless a kernel is the matter."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import ROOT, training_params

import experiment
import sae_utils as u
import sweep


class Killed(BaseException):
    """Where a process would be gone: nothing catches it."""


def as_flags(params: dict) -> list[str]:
    return ["-y", json.dumps(params)]


@pytest.fixture
def played(folder, monkeypatch):
    """(parameters of a run, its folder, notebook): in place of papermill, `notebook.whole` says how far it comes; its calls are counted."""
    params = training_params(folder)
    run = Path(params["run_dir"])

    class Notebook:
        calls, whole, before_end = 0, True, staticmethod(lambda: None)

        def __call__(self, source, running, given, **_):
            self.calls += 1
            copy = {"cells": [], "metadata": {"papermill": {"end_time": None, "exception": None}}}
            Path(running).write_text(json.dumps(copy))
            out_dir, claim, _ = experiment.start_run(given)
            for name in ("sae.pth", "metrics.json", "report.pdf", "checkpoint.pth"):
                (out_dir / name).write_text(f"{name} {self.calls}")
            experiment.finish(out_dir, "sae_training")
            claim.release()
            self.before_end()
            if self.whole:
                Path(running).write_text(json.dumps(copy | {"metadata": {"papermill": {"end_time": "now", "exception": False}}, "call": self.calls}))

    notebook = Notebook()
    monkeypatch.setattr(papermill, "execute_notebook", notebook)
    return params, run, notebook


def visible(run: Path) -> set[str]:
    return {file.name for file in run.iterdir()} - {".lock", ".claim"}


WHOLE = {"params.json", "sae.pth", "metrics.json", "report.pdf", "sae_training.ipynb", ".done"}


def test_done_is_written_last_and_names_what_there_is(played, capsys):
    params, run, notebook = played
    notebook.before_end = lambda: notebook.__setattr__("seen", visible(run))
    experiment.launch("sae_training", as_flags(params))
    assert ".done" not in notebook.seen and {".made", "checkpoint.pth", "sae_training.running.ipynb"} <= notebook.seen
    assert visible(run) == WHOLE and experiment.is_finished(run)
    assert set((run / ".done").read_text().splitlines()) == {"finished"} | WHOLE - {".done"}
    experiment.launch("sae_training", as_flags(params))
    assert notebook.calls == 1 and "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("lost", sorted(WHOLE - {".done", "params.json"}))
def test_a_run_that_lacks_something_is_finished_when_asked_again(played, lost):
    params, run, notebook = played
    experiment.launch("sae_training", as_flags(params))
    (run / lost).unlink()
    assert not experiment.is_finished(run)
    with pytest.raises(u.UserError, match="is not finished"):
        experiment.finished_run(str(run))
    plan = sweep.plan("seed=0", str(run.parent / "one"), as_flags(params))
    assert f".PHONY: {run.parent}/one-seed0/.done" in plan.splitlines()
    experiment.launch("sae_training", as_flags(params))
    assert notebook.calls == 2 and visible(run) == WHOLE and experiment.is_finished(run)


@pytest.mark.parametrize("content", [b"", b"fin", b"\xff\xfe", b"finished\nreport.pdf\noverview.png\n"])
def test_a_done_that_is_not_whole_says_nothing(played, content):
    params, run, notebook = played
    experiment.launch("sae_training", as_flags(params))
    (run / ".done").write_bytes(content)
    assert not experiment.is_finished(run)
    experiment.launch("sae_training", as_flags(params))
    assert notebook.calls == 2 and experiment.is_finished(run)


def test_a_run_of_before_and_one_of_jupyter_are_finished_without_an_executed_copy(played):
    params, run, _ = played
    out_dir, claim, _ = experiment.start_run(params)
    claim.release()
    (out_dir / "sae.pth").touch()
    (out_dir / "checkpoint.pth").touch()
    (out_dir / "sae_training.running.ipynb").touch()  # of a launcher that was killed before
    experiment.finish(out_dir, "sae_training")
    assert (out_dir / ".done").read_text() == "finished\nparams.json\nsae.pth\n" and not (out_dir / "checkpoint.pth").exists() and experiment.is_finished(run)
    (run / ".done").write_text("finished\n")
    assert experiment.is_finished(run)


@pytest.mark.parametrize("step", range(7))
def test_a_launcher_killed_between_the_notebooks_end_and_its_own_goes_on(played, monkeypatch, step):
    """Killed before each of its writes in turn; asked again, it ends without executing anything."""
    params, run, notebook = played
    left, real = [step], {name: getattr(Path, name) for name in ("replace", "unlink", "write_text")} | {"os.replace": os.replace}

    def counted(name):
        def call(*args, **kwargs):
            if ".made" in visible(run) and notebook.ended and not any(".tmp" in str(arg) for arg in args[:1]):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
            return real[name](*args, **kwargs)

        return call

    notebook.ended = False
    write = notebook.__class__.__call__

    def whole(self, *args, **kwargs):
        write(self, *args, **kwargs)
        self.ended = True

    monkeypatch.setattr(notebook.__class__, "__call__", whole)
    with monkeypatch.context() as patched:
        for name in ("replace", "unlink", "write_text"):
            patched.setattr(Path, name, counted(name))
        patched.setattr(os, "replace", counted("os.replace"))
        try:
            experiment.launch("sae_training", as_flags(params))
            assert left[0] > 0 or step > 3
        except Killed:
            assert not experiment.is_finished(run) or not (run / "checkpoint.pth").exists()
    experiment.launch("sae_training", as_flags(params))
    assert notebook.calls == 1 and experiment.is_finished(run) and visible(run) - {".made"} == WHOLE and json.loads((run / "sae_training.ipynb").read_text())["call"] == 1


def test_a_notebook_killed_after_its_last_word_is_executed_again(played, monkeypatch):
    """Its copy is not whole then; an older one beside it is not taken for it."""
    params, run, notebook = played
    experiment.launch("sae_training", as_flags(params))
    (run / "sae.pth").unlink()
    notebook.whole, replace = False, Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, other: (_ for _ in ()).throw(Killed) if "running" in self.name else replace(self, other))

    def gone():
        raise Killed

    notebook.before_end = gone
    with pytest.raises(Killed):
        experiment.launch("sae_training", as_flags(params))
    monkeypatch.setattr(Path, "replace", replace)
    assert {".made", "sae_training.ipynb", "sae_training.running.ipynb", "checkpoint.pth"} <= visible(run) and not experiment.is_finished(run)
    notebook.whole, notebook.before_end = True, lambda: None
    experiment.launch("sae_training", as_flags(params))
    assert notebook.calls == 3 and visible(run) == WHOLE and json.loads((run / "sae_training.ipynb").read_text())["call"] == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_the_last_file_is_one_sentence(played, monkeypatch, capsys, number):
    params, run, notebook = played
    atomic = u.atomic

    def full(path):
        if Path(path).name == ".done":
            raise OSError(number, os.strerror(number), str(path))
        return atomic(path)

    with monkeypatch.context() as patched:
        patched.setattr(u, "atomic", full)
        assert experiment.main(["sae_training", *as_flags(params)]) == 1
    said = capsys.readouterr().err.strip()
    assert os.strerror(number) in said and ".done" in said and len(said.splitlines()) == 1 and not (run / ".done").exists()
    assert experiment.main(["sae_training", *as_flags(params)]) == 0 and notebook.calls == 1 and experiment.is_finished(run)


def test_what_a_killed_process_left_is_swept_and_nothing_else(played):
    params, run, _ = played
    run.mkdir(parents=True)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = {f".sae.pth.{os.getpid()}.tmp", ".notes.tmp", f".x.{os.getppid()}.tmp", ".y.99999999999999999999.tmp", ".z.-1.tmp"}
    for name in mine | {f".sae.pth.{gone.pid}.tmp", f".report.pdf.{gone.pid}.tmp"}:
        (run / name).touch()
    (run / f".saelens.{gone.pid}.tmp" / "deep").mkdir(parents=True)
    experiment.launch("sae_training", as_flags(params))
    assert visible(run) == WHOLE | mine


# Where runs may lie, and what a mistake leaves


@pytest.mark.parametrize("path", [".", "notebooks", "tests/x", "runs", "runs/.", "runs/x/../../tests", "runs/activations", "runs/activations/x/y", "runs/tiny-model", "runs/compare/x", "sae_utils.py", ".git/x", "/", ".."])
def test_runs_do_not_lie_in_the_repository(path):
    before = sorted(ROOT.iterdir())
    for name, given in (("sae_training", {"run_dir": path}), ("tiny_model", {"world_dir": path})):
        if name == "sae_training" or not path.startswith("runs/"):
            assert experiment.main([name, *as_flags(given)]) == 2
    assert sorted(ROOT.iterdir()) == before


def test_runs_do_not_lie_in_each_other_or_among_other_files(folder, capsys):
    outer = folder / "runs" / "outer"
    experiment.record_params(outer / "params.json", training_params(folder))
    (folder / "file").touch()
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.tex").touch()
    for path, said in ((outer / "inner", "lies in another run"), (folder / "runs", "holds other runs, such as outer"), (folder / "file", "is a file, and no folder"), (folder / "file" / "x", "is a file, and no folder"),
                       (folder / "mine", "holds thesis.tex and no run"), (folder / ("x" * 256), "is no path")):  # fmt: skip
        assert experiment.main(["sae_training", "-p", "run_dir", str(path)]) == 2
        told = capsys.readouterr().err
        assert said in told and len(told.splitlines()) == 1
    assert experiment.run_folder(training_params(folder, run_dir=str(folder / "elsewhere")))[0] == folder / "elsewhere"


def test_names_of_experiments(folder):
    run = folder / "runs" / "one"
    experiment.record_params(run / "params.json", training_params(folder))
    (run / ".done").write_text("finished\n")
    ask = lambda name: experiment.patch_folder(experiment.check_params("patch_neurons", {"run_dir": str(run), "name": name}))[0]
    for name in (".", "..", "...", "x" * 300):
        with pytest.raises(u.UserError, match="is no name of an experiment|is no path"):
            ask(name)
    for name in ("", "a", "/", "a/../b", "../x", "it's", ".hidden", "007"):
        assert ask(name).parent == run / "patches" and not ask(name).name.startswith(".")


@pytest.mark.parametrize("there", [None, [], ["labels.csv"], [".lock", "sae_training.failed.ipynb"]])
def test_a_mistake_deletes_nothing_that_the_command_did_not_make(played, monkeypatch, there):
    params, run, notebook = played
    if there is not None:
        run.mkdir(parents=True)
        if "labels.csv" in there:
            experiment.record_params(run / "params.json", params)
        for name in there:
            (run / name).write_text("mine")
    before = visible(run) if there is not None else None

    class Wrong(Exception):
        ename, evalue = "UserError", "wrong"

    def mistaken():
        for name in ("sae.pth", "metrics.json", "report.pdf", "checkpoint.pth", ".made"):
            (run / name).unlink()
        raise Wrong

    notebook.before_end = mistaken
    with pytest.raises(Wrong):
        experiment.launch("sae_training", as_flags(params))
    if there is None:
        assert not run.exists()
    else:
        assert visible(run) - {"sae_training.failed.ipynb"} == before - {"sae_training.failed.ipynb"}
        assert all((run / name).read_text() == "mine" for name in there if name == "labels.csv")


# What is said of a machine's faults


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A project with one notebook, which does what its parameter says."""
    cells = ['how: str = "pass"  # what it does\nrun_dir: str = ""  # where', "exec(how)"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}})
    nb.cells[0].metadata["tags"] = ["parameters"]
    project = tmp_path / "project"
    (project / "notebooks").mkdir(parents=True)
    nbformat.write(nb, project / "notebooks" / "small.ipynb")
    monkeypatch.setattr(u, "ROOT", project)
    monkeypatch.setitem(experiment.FOLDERS, "small", lambda params: (experiment.place_for(params["run_dir"]), False))
    return lambda how, run="runs/x": experiment.main(["small", "-p", "how", how, "-p", "run_dir", run])


@pytest.mark.parametrize(("how", "code", "said"), [
    ("import os; os.kill(os.getpid(), 9)", 1, "the notebook's process was killed, most often for want of memory: give the same command again"),
    ("raise OSError(28, 'No space left on device', 'sae.pth')", 1, "No space left on device: 'sae.pth': make room; then give the same command again"),
    ("raise PermissionError(30, 'Read-only file system')", 1, "Read-only file system: write elsewhere, or make it writable; then"),
    ("raise OSError(2, 'No such file', 'ours')", 1, None),
    ("1 / 0", 1, None),
])  # fmt: skip
def test_faults_in_a_kernel(small, capsys, tmp_path, how, code, said):
    assert small(how) == code
    told = capsys.readouterr().err
    assert (said in told and len(told.splitlines()) == 1 and told.startswith("Error: ")) if said else "Traceback" in told
    run = tmp_path / "project" / "runs" / "x"
    assert (run / "small.failed.ipynb").exists() and not (run / "small.running.ipynb").exists()


def test_a_folder_with_braces_is_a_folder(small, tmp_path):
    assert small("pass", str(tmp_path / "elsewhere" / "{how} {x}")) == 0
    assert (tmp_path / "elsewhere" / "{how} {x}" / "small.ipynb").exists()


@pytest.mark.parametrize("where", ["mkdir", "lock", "copy"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_the_launcher(small, monkeypatch, capsys, where, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number), "there")

    target = {"mkdir": "pathlib.Path.mkdir", "lock": "filelock.FileLock.acquire", "copy": "papermill.iorw.LocalHandler.write"}[where]
    monkeypatch.setattr(target, refuse)
    assert small("pass") == 1
    said = capsys.readouterr().err
    assert os.strerror(number) in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("job", ["sae_training", "patch_neurons", "activations", "export", "runs"])
def test_what_comes_next_is_promised_where_it_is_so(job):
    """Only training leaves checkpoints, and a harvest what was harvested."""
    for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")):
        said = experiment.told(error, job)[0]
        assert ("checkpoint" in said) == (job == "sae_training") and ("what was harvested is kept" in said) == (job in ("sae_training", "activations")), said


def test_jobs_that_there_are_not(capsys):
    for words in ([], ["trian"], ["--help"]):
        assert experiment.main(words) == 2
        assert re.fullmatch(r"Error: '.*' is no job: there are sae_training, .*publish\.\n", capsys.readouterr().err)


def test_devices_that_there_are_not(monkeypatch):
    for name in ("cpu:99", "cpu:1", "cpu:", "cuda:9", "gpu", "CPU", "cpu:-1", "cuda:01", "mps:0:0"):
        with pytest.raises(u.UserError, match=f"device {name} is not available here"):
            u.pick_device(name)
    assert u.pick_device("cpu") == u.pick_device("cpu:0") == "cpu"
    chosen = []
    monkeypatch.setattr(u.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(u.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(u.torch.cuda, "set_device", chosen.append)
    assert [u.pick_device(name) for name in ("", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"] and chosen == ["cuda:1"]
    with pytest.raises(u.UserError, match="leave it empty to use cuda"):
        u.pick_device("cuda:2")


# Tokens

MARK = "hf_" + "".join(random.choices("abcdefghijkmnpqrstuvwxyz", k=32))
SPOILT = {  # what stands in notebooks/secret_tokens.py
    "a forgotten quote": 'HF_TOKEN = "{0}\n', "no quotes": "HF_TOKEN = {0}\n", "another quote": "HF_TOKEN = “{0}”\n", "a blank": 'HF_TOKEN = "{0} x"\n', "two lines": 'HF_TOKEN = """{0}\n{0}"""\n',
    "letters": 'HF_TOKEN = "{0}é"\n', "only the token": "{0}\n", "another name": 'TOKEN = "{0}"\n', "a list": 'HF_TOKEN = ["{0}"]\n', "code": 'HF_TOKEN = "{0}".nothing()\n', "raises": 'raise ValueError("{0}")\n',
    "prints": 'print("{0}")\n', "bytes": 'HF_TOKEN = b"{0}"\n', "a bad escape": 'HF_TOKEN = "{0}\\d \\N{{{0}}}"\n', "indented": '  HF_TOKEN = "{0}"\n', "deep": "(" * 500 + "{0}", "NUL": 'HF_TOKEN = "{0}"\0\n', "shell": "export HF_TOKEN={0}\n",
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_wrong_with_a_token_is_said_without_it(tmp_path, monkeypatch, capfd, what):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "secret_tokens.py").write_text(SPOILT[what].format(MARK))
    monkeypatch.setattr(u, "ROOT", tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with warnings.catch_warnings(record=True) as warned, pytest.raises(u.UserError, match="notebooks/secret_tokens.py (sets no token|is no token)") as told:
        warnings.simplefilter("always")
        u.use_hf_token()
    error = told.value
    while error:
        assert MARK not in repr(error) and MARK not in str(vars(error))
        error = error.__cause__ or error.__context__
    assert not warned and capfd.readouterr() == ("", "") and "HF_TOKEN" not in os.environ


@pytest.mark.parametrize("said", ['HF_TOKEN = "{0}"', "HF_TOKEN = '{0}'  # mine", 'import os\nHF_TOKEN: str = " {0} "\n', 'A = 1\nHF_TOKEN = "x"\nHF_TOKEN = "{0}"'])
def test_a_token_that_is_one(tmp_path, monkeypatch, said):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "secret_tokens.py").write_text(said.format(MARK))
    monkeypatch.setattr(u, "ROOT", tmp_path)
    monkeypatch.setenv("HF_TOKEN", "")
    u.use_hf_token()
    assert os.environ["HF_TOKEN"] == MARK
    monkeypatch.setenv("HF_TOKEN", f"{MARK}é")
    with pytest.raises(u.UserError, match="HF_TOKEN in the environment is no token") as told:
        u.use_hf_token()
    assert MARK not in str(told.value)


@pytest.mark.parametrize("where", ["a forgotten quote", "in the file", "in the environment"])
def test_no_token_is_left_by_a_run(folder, where):
    """A copy of the repository, its own program and kernel, and a mistake that is found late: all that there is afterwards is read."""
    there = folder / "copy"
    shutil.copytree(ROOT / "notebooks", there / "notebooks", ignore=shutil.ignore_patterns("__pycache__", "secret_tokens.py"))
    shutil.copy(ROOT / "sae_utils.py", there)
    (there / "runs" / "x").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | {"PYTHONPATH": f"{there}:{there}/notebooks"}
    if where == "in the environment":
        environment["HF_TOKEN"] = MARK
    else:
        (there / "notebooks" / "secret_tokens.py").write_text(SPOILT.get(where, 'HF_TOKEN = "{0}"\n').format(MARK))
    flags = ["-p", "model_name", f"{folder}/model", "-p", "dataset_name", f"{folder}/text.jsonl", "-p", "layer", "1", "-p", "run_dir", "runs/x", "-p", "architecture", "topk", "-p", "k", "1000"]
    done = subprocess.run([sys.executable, "notebooks/experiment.py", "sae_training", *flags], cwd=there, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and ("sets no token" if "quote" in where else "k 1000 is more than the 128 latents") in done.stderr, done.stderr
    assert MARK not in done.stdout + done.stderr and "Traceback" not in done.stderr
    left = [file for file in there.rglob("*") if file.is_file() and file.name != "secret_tokens.py" and MARK.encode() in file.read_bytes()]
    assert not left and len([*(there / "runs").rglob("*")]) > 1


# An SAE from elsewhere


def test_a_look_is_named_after_its_sae_and_patched_there(tmp_path, monkeypatch):
    import formats
    import typed

    config = {"model_name": "a/b", "layer": 2}
    monkeypatch.setattr(formats, "load", lambda source, hook, another_hook: type("SAE", (), {"config": config}))
    calls = []
    monkeypatch.setattr(experiment, "launch", lambda name, flags: calls.append((name, typed.parameters(flags))) or tmp_path / "done")
    monkeypatch.setattr(u, "ROOT", tmp_path / "project")
    (tmp_path / "project" / "runs" / "demo").mkdir(parents=True)
    for source, name in {"runs/demo": "look-demo", "./runs/demo/": "look-demo", "google/gemma/x y": "look-google-gemma-x_y", str(tmp_path / "it's.pth"): "look-it_s.pth"}.items():
        experiment.main(["features", source, "-p", "n_activations", "5", "--words", "-p seed 3"])
        job, params = calls.pop()
        assert job == "sae_training" and params.pop("run_dir") == f"runs/{name}" and params.pop("trained_sae") == ("runs/demo" if "demo" in source else source)
        assert params == {"n_activations": "5", "seed": "3", "model_name": "a/b", "layer": "2"}
    monkeypatch.undo()
    monkeypatch.setattr(formats, "load", lambda source, hook, another_hook: type("SAE", (), {"config": config}))
    monkeypatch.setattr(experiment, "launch", lambda name, flags: calls.append((name, typed.parameters(flags))) or tmp_path / "done")
    assert experiment.main(["patch", "x/y", "--run", "there", "-p", "layer", "1", "--", "-p", "latents", "17 23", "--words", "-p name 007"]) == 0
    assert calls == [("sae_training", {"trained_sae": "x/y", "run_dir": "runs/there", "model_name": "a/b", "layer": "1"}), ("patch_neurons", {"latents": "17 23", "name": "007", "run_dir": str(tmp_path / "done")})]
    assert experiment.main(["patch", "x/y", "--", "-p", "latents", "no"]) == 2 and len(calls) == 2  # told before anything is looked at


@pytest.mark.parametrize(("words", "message"), [
    (["labels"], "missing a required argument"), (["look", "runs/x"], "missing a required argument"), (["runs", "a", "b"], "too many"), (["patch", "x"], "parted by --"),
    (["labels", "runs/../../elsewhere"], "no name of a run"), (["export", "runs/../x", "saelens"], "no name of a run"), (["look", "runs/a b", "text"], "no name of a run"),
])  # fmt: skip
def test_words_that_a_job_does_not_have_are_one_sentence(words, message, capsys):
    assert experiment.main(words) == 2 and re.fullmatch(f"Error: .*{message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["world_dir", "model_dir"])
def test_the_tiny_model_goes_into_no_run(tmp_path, name):
    params = experiment.check_params("tiny_model", {"world_dir": str(tmp_path / "world"), "model_dir": str(tmp_path / "model")})
    assert experiment.world_folder(params) == (tmp_path / "world", False)
    assert experiment.world_folder(params | {name: "runs/tiny-world"})[0] in (u.ROOT / "runs" / "tiny-world", tmp_path / "world")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "params.json").touch()
    for other in (tmp_path / "run", "runs/activations", "notebooks"):
        with pytest.raises(u.UserError, match="is a run|is kept for other things|is part of this repository"):
            experiment.world_folder(params | {name: str(other)})


def test_a_finished_run_with_a_copy_that_is_still_at_work_is_not_finished(tmp_path):
    (tmp_path / ".done").write_text("finished\n")
    assert experiment.is_finished(tmp_path)
    (tmp_path / "sae_training.running.ipynb").touch()
    assert not experiment.is_finished(tmp_path)


def test_a_listed_name_with_a_flipped_bit_is_no_reason_to_train_again(tmp_path):
    for name in ("params.json", "sae.pth"):
        (tmp_path / name).touch()
    whole = b"finished\nparams.json\nsae.pth\n"
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / ".done").write_bytes(damaged)
        assert experiment.is_finished(tmp_path), bytes(damaged)
    (tmp_path / ".done").write_bytes(whole)
    (tmp_path / "sae.pth").unlink()
    assert not experiment.is_finished(tmp_path)
