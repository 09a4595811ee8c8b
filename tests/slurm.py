"""A sweep carried by Slurm: `make test-slurm`.

Starts Slurm on this machine alone, as root, everything of it in a scratch folder: munged, slurmctld, and one slurmd that
offers two processors. Skipped, with the reason, where Debian's slurm-wlm and munge are not installed.
"""

import itertools
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from test_sweep import asked, names_of

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")
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


def test_a_sweep_through_srun(slurm, folder):
    """Two at once, each with one processor; one is torn from its node half-way, and asked again the sweep ends as it should."""
    runs, out = folder / "runs", {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    ask = asked(folder, "k=3,5 seed=0,1", "-j2", "-k", "LAUNCH=srun --ntasks=1 --cpus-per-task=1")
    ask["env"] |= {name: slurm[name] for name in ("SLURM_CONF", "PATH")}
    del ask["env"]["OMP_NUM_THREADS"]  # threads are then what Slurm binds a cell to
    torn, cells = runs / "s-k3-seed0", [runs / f"s-k{k}-seed{seed}" for k, seed in itertools.product((3, 5), (0, 1))]
    first = subprocess.Popen(**ask, **out)
    while not (torn / "checkpoint.pth").exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.02)
    for process in processes_of(slurm, torn):
        process.kill()
    lines = first.communicate()[0].splitlines()
    print("\n".join(line for line in lines if "Notice" not in line), file=(folder / "first.log").open("w"))
    assert first.returncode == 2 and not (torn / ".done").exists() and [(cell / ".done").exists() for cell in cells[1:]] == [True] * 3, "\n".join(lines)
    assert names_of(lines) == {"s-rows", *(cell.name for cell in cells)} and any(line.startswith(f"{torn.name}: srun: error") for line in lines)
    assert sum("tried just now with 1 thread on" in line for line in lines) == 4

    again = subprocess.run(**ask, **out)
    assert again.returncode == 0 and all((cell / ".done").exists() for cell in cells), again.stdout
    assert any(line.startswith(f"{torn.name}: going on from step") for line in again.stdout.splitlines())
    jobs = (Path(slurm["SLURM_CONF"]).parent / "jobs.txt").read_text()
    print(f"\n{jobs}\n{again.stdout[again.stdout.index('run  ') :]}")
    assert jobs.count("JobState=COMPLETED") == 6 and jobs.count("JobState=") == 7  # rows and four cells; of those asked again, rows and one

    whole = subprocess.run(**asked(folder, "k=3 seed=0", f"SWEEP={runs}/here"), **out)  # the same without Slurm, undisturbed
    assert whole.returncode == 0, whole.stdout
    one, other = (torch.load(run / "sae.pth", weights_only=True)["state_dict"] for run in (torn, runs / "here-k3-seed0"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def processes_of(slurm: dict, run) -> list:
    """The processes of Slurm's job that works on `run`: the launcher and, with it, the kernel and what else it started."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get("SLURM_CONF") == slurm["SLURM_CONF"] and "SLURM_JOB_ID" in environment:
                found.append((environment["SLURM_JOB_ID"], process, str(run) in process.cmdline()))
        except psutil.Error:
            pass
    jobs = {job for job, _, ours in found if ours}
    return [process for job, process, _ in found if job in jobs]
