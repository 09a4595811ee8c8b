"""Make's words: they reach the program as they were typed, run nothing on the way, and none is taken from elsewhere."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import experiment
import sae_utils as u
import sweep
import typed

ECHO = "import json, sys; print('ARGV' + json.dumps(sys.argv[1:]), file=sys.stderr)"  # not on stdout, where a sweep's plan is read from


def make(folder, *words, cwd=ROOT, check=True, **environment):
    """What make says, and the words that its jobs hand to the program, which only repeats them."""
    (folder / "echo.py").write_text(ECHO)
    command = ["make", "-o", ".venv/.ready", f"RUNNER={sys.executable} '{folder}/echo.py'", *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert not check or done.returncode == 0, done.stderr
    return done, [json.loads(line[4:]) for line in done.stderr.splitlines() if line.startswith("ARGV")]


JOBS = {  # the words of a job, and what the program is to be called with
    "train": ("LAYER MODEL DATASET HOOK SEED RUN PARAMS P", "sae_training --run {RUN} -p model_name {MODEL} -p dataset_name {DATASET} -p layer {LAYER} -p hook {HOOK} -p seed {SEED} -f {PARAMS} --words {P}"),
    "check": ("LAYER MODEL DATASET HOOK PARAMS P", "check -p model_name {MODEL} -p dataset_name {DATASET} -p layer {LAYER} -p hook {HOOK} -f {PARAMS} --words {P}"),
    "features": ("SAE RUN MODEL P", "features {SAE} -p n_activations 200000 --run {RUN} -p model_name {MODEL} --words {P}"),
    "patch": ("RUN LATENTS PARAMS P", "patch_neurons --run {RUN} -p latents {LATENTS} -f {PARAMS} --words {P}"),
    "patch ": ("SAE MODEL LATENTS P", "patch {SAE} -p n_activations 200000 -p model_name {MODEL} -- -p latents {LATENTS} --words {P}"),
    "labels": ("RUN", "labels {runs/RUN}"),
    "export": ("RUN FORMAT OUT", "export {runs/RUN} {FORMAT} {OUT}"),
    "publish": ("RUN REPO FORMAT", "publish {runs/RUN} {REPO} {FORMAT}"),
    "activations": ("LAYERS DATASET P", "activations {LAYERS} -p dataset_name {DATASET} --words {P}"),
    "compare": ("RUNS SORT AXES FIGURE P", "compare_runs -p runs {RUNS} -p sort {SORT} -p axes {AXES} -p figure {FIGURE} --words {P}"),
    "runs": ("RUNS", "runs {RUNS}"),
    "remove": ("RUN", "remove {RUN}"),
}  # fmt: skip
HOSTILE = ["plain", "it's", 'a "b" c', "a b", "$HOME", "$$", "$(shell touch {0})", "$(touch {0})", "`touch {0}`", "; touch {0};", "'; touch {0}; '", '"; touch {0}; "', "&& touch {0}", "| tee {0}", "> {0}"]
HOSTILE += ["two\nlines", "tab\tin", "*", "?[a-z]", "~", "#", "\\", "a\\", "$", "%", "é猫", "-n", "--help", "$(error no)", "${{RUN}}", "@", "(", ")", ",", "$(eval RUN:=x)", "a=b", ":=", "!", "{{a,b}}"]


@pytest.mark.parametrize("job", JOBS)
def test_words_arrive_as_they_were_typed_and_run_nothing(tmp_path, job):
    names, expected = JOBS[job]
    for i in range(0, len(HOSTILE), len(names.split())):
        texts = (HOSTILE + HOSTILE)[i : i + len(names.split())]
        given = {name: text.format(tmp_path / "ran") for name, text in zip(names.split(), texts, strict=True)}
        _, calls = make(tmp_path, job.strip(), *(f"{name}={text}" for name, text in given.items()))
        wanted = [given[word[1:-1]] if word[0] == "{" and word[1:5] != "runs" else f"runs/{given['RUN']}" if word[0] == "{" else word for word in expected.split()]
        assert calls == [wanted], given
    assert not (tmp_path / "ran").exists()


def test_a_sweeps_words_arrive_or_are_refused_and_run_nothing(tmp_path, folder):
    for text in HOSTILE:
        text = text.format(tmp_path / "ran")
        given = {"GRID": f"k={text}", "SWEEP": text, "MODEL": text, "P": text}
        _, calls = make(tmp_path, "sweep", *(f"{name}={value}" for name, value in given.items()))
        assert calls[0] == ["cells", " ".join(given["GRID"].split()) if "\n" in text or "\t" in text else given["GRID"], text, "-p", "model_name", text, "--words", text] and calls[1][0] == "table"
        (plain,) = make(tmp_path, "sweep", f"LAYERS={text}", "-n")[1]
        assert plain[2:] == ["sweep"]
        for grid, sweep_name in ((f"k={text}", "try"), ("k=4", text)):
            try:
                plan = sweep.plan(grid, sweep_name, ["-p", "architecture", "topk"])
            except u.UserError as error:
                assert "SWEEP " in str(error) if grid == "k=4" else sweep_name == "try", (text, error)
            else:
                assert text == "plain" and sweep_name == text and "try-" not in plan, (text, plan)
    assert not (tmp_path / "ran").exists()


def test_what_the_environment_holds_is_not_meant(tmp_path):
    words = set(re.findall(r"\b([A-Z][A-Z0-9_]*)=", (ROOT / "Makefile").read_text())) - {"TORCH_INDEX", "PYTHON", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TQDM_DISABLE", "PY", "RUNNER"}
    assert {"RUN", "LAYER", "P", "PARAMS", "GRID", "LAUNCH", "SWEEP_PLAN", "YES"} <= words
    elsewhere = {word: "/from/the/environment" for word in words}
    for job, call in {"train": "sae_training", "check": "check", "activations": "activations 6", "compare": "compare_runs", "runs": "runs"}.items():
        assert make(tmp_path, job, **elsewhere)[1] == [call.split()]
    assert make(tmp_path, "train", "LAYER=3", **elsewhere)[1] == [["sae_training", "-p", "layer", "3"]]
    for job in ("patch", "labels", "remove", "features", "export", "publish"):
        done, calls = make(tmp_path, job, check=False, **elsewhere)
        assert done.returncode == 2 and "say which" in done.stderr and not calls


@pytest.mark.parametrize(("words", "told"), [
    ("train LAYERS=3", "make train has no word LAYERS; it has: LAYER PARAMS MODEL DATASET HOOK SEED RUN P"), ("clean RUN=x", "make clean has no word RUN; it has: none"),
    ("test P=x", "make test has no word P"), ("RUN=x", "make help has no word RUN"), ("train layer=3", "make train has no word layer"), ("sweep RUN=x GRID=k=1", "make sweep has no word RUN"),
    ("labels RUN=x YES=1", "make labels has no word YES"), ("patch RUN=x LAYER=3", "go with SAE="), ("train RUN=x a.b=c", "no word a.b"),
])  # fmt: skip
def test_a_word_that_a_job_does_not_have_is_told(tmp_path, words, told):
    done, calls = make(tmp_path, *words.split(), check=False)
    assert done.returncode == 2 and told in done.stderr and not calls and len(done.stderr.splitlines()) == 1


def test_several_jobs_share_their_words(tmp_path):
    _, calls = make(tmp_path, "check", "train", "LAYER=3", "RUN=x")
    assert calls == [["check", "--run", "x", "-p", "layer", "3"], ["sae_training", "--run", "x", "-p", "layer", "3"]]


@pytest.mark.parametrize("name", ["a", "a-b_c.d", "sweeps/a-k3", "été"])
def test_names_of_runs(tmp_path, name):
    for written in (name, f"runs/{name}", f"runs/{name}/", f"{name}/"):
        (call,) = make(tmp_path, "train", f"RUN={written}")[1]
        assert typed.parameters(call[1:]) == {"run_dir": f"runs/{name}"}


@pytest.mark.parametrize("name", ["..", ".", "~", "../notebooks", "runs/x/../../tests", "a/../b", "/tmp/x", "a b", "it's", "a\nb", "-p", ".hidden", "a//b", "$HOME", "a;b", "x" * 300])
def test_what_is_no_name_of_a_run(tmp_path, name):
    (call,) = make(tmp_path, "train", f"RUN={name}")[1]
    with pytest.raises(u.UserError, match="is no name of a run: |is no path"):
        experiment.run_folder(experiment.check_params("sae_training", typed.parameters(call[1:])))


def test_the_repository_may_lie_in_any_folder(tmp_path):
    """A copy with the environment linked: a short job whole, and a sweep's plan."""
    there = tmp_path / "it's a $(odd) one" / "co py"
    (there / "runs").mkdir(parents=True)
    for file in ("Makefile", "sae_utils.py"):
        shutil.copy(ROOT / file, there)
    shutil.copytree(ROOT / "notebooks", there / "notebooks", ignore=shutil.ignore_patterns("__pycache__", "secret_tokens.py"))
    shutil.copytree(ROOT / "params", there / "params")
    (there / ".venv").symlink_to(os.path.dirname(os.path.dirname(os.path.abspath(sys.executable))))
    paths = {"PYTHONPATH": os.pathsep.join([str(there), str(there / "notebooks")])}
    ask = lambda *words: subprocess.run(["make", "-o", ".venv/.ready", *words], cwd=there, env={**os.environ, **paths}, capture_output=True, text=True, check=False)
    experiment.record_params(there / "runs" / "one" / "params.json", experiment.check_params("sae_training", {}))
    listed = ask("runs", "RUNS=one")
    assert listed.returncode == 0 and "gemma-3-1b-it" in listed.stdout, listed.stderr
    planned = ask("-n", "sweep", "GRID=k=4,8", "PARAMS=params/tiny.yaml")
    assert planned.returncode == 0 and planned.stdout.count("sae_training -f params/tiny.yaml -p k ") == 2, planned.stderr
    assert "letters, digits" in ask("train", "RUN=../notebooks").stderr and [*(there / "runs").iterdir()] == [there / "runs" / "one"]
