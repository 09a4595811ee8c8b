"""`make test-faults` in short: a few kills, a full disk, damaged files and inputs that are none."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.repeats
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked there")
def test_a_short_day_of_faults(fresh_seed):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "notebooks")])}
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "faults.py"), "--short", "--seed", str(fresh_seed)], env=env, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
