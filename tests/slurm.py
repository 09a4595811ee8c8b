"""A sweep carried by Slurm: `make test-slurm`.

Starts Slurm on this machine alone, as root, everything of it in a scratch folder: munged, slurmctld, and one slurmd that
offers two processors. Skipped, with the reason, where Debian's slurm-wlm and munge are not installed.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_sweep import GIVEN, make_sweep

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo", "sacct")
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin")]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not found: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons are started as root, and this is another user"),
]

CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    sockets = [socket.socket() for _ in range(n)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which srun finds a Slurm of one node."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "slurm.conf").write_text(CONF.format(host=socket.gethostname().split(".")[0], folder=folder, ports=free_ports(2)))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.environ["PATH"] + ":/usr/sbin"}
    munge = {name: folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
    daemons = []
    for command in (
        ["munged", "--foreground", "--force", "--key-file", folder / "munge.key", *(f"--{option}={path}" for option, path in
            (("socket", munge["socket"]), ("pid-file", munge["pid"]), ("log-file", munge["log"]), ("seed-file", munge["seed"])))],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ):  # fmt: skip
        log = (folder / f"{command[0]}.out").open("w")
        daemons.append(subprocess.Popen([str(word) for word in command], env=environment, stdout=log, stderr=log))
        time.sleep(1)
    try:
        for _ in range(60):
            state = subprocess.run(["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True)
            if "idle" in state.stdout:
                break
            time.sleep(0.5)
        else:
            logs = "\n".join(f"{file.name}: {file.read_text()[-600:]}" for file in sorted(folder.glob("*.*")) if file.suffix in (".out", ".log"))
            pytest.fail(f"Slurm did not come up: {state.stdout} {state.stderr}\n{logs}")
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
