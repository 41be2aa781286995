"""What a SLURM job does: runs one point as a command, and is queued again until the point is done."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relloc.files import append_lines, read_lines

_POLL_S = 0.5
_MOST_RESTARTS = 3  # of a point whose processes were killed: for memory, or by a person
# Exit codes of a point that saved and ended because the cluster asked for it, and of one that lost a reading process
_ASKED = tuple(128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))
_LOST_A_READER = 75
_REQUEUES = (
    "requeues"  # in the run folder: a line for each time that a job was queued again from here
)
_LEFT_TO_SLURM_S = 900.0  # how long the cluster may take, after it asked a job to stop, to end it


class PointFailed(Exception):
    """The point's command ended with another exit code than 0; its log says why."""


class PointJob:
    """A point's command, as submitit calls it on each task of the job.

    The command is a process of its own: signals of the cluster reach it directly, and it saves and
    ends; submitit's handlers, which live here, have no workers or threads beside them that would
    inherit them. `checkpoint` is what submitit calls before it queues the job again.
    """

    def __init__(self) -> None:
        self._pid: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_pid": None}

    def __call__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        for restart in range(_MOST_RESTARTS + 1):
            code = self._run(command, environment)
            if code == 0:
                return
            if code in _ASKED:
                # To end now would count as failed, or as done: SLURM ends this job, and may queue it again.
                print(f"the point saved and ended with exit code {code}; left to SLURM", flush=True)
                time.sleep(_LEFT_TO_SLURM_S)
            elif (code == _LOST_A_READER or code < 0) and restart < _MOST_RESTARTS:
                print(
                    f"a process of the point was killed (exit code {code}); it goes on from what it saved",
                    flush=True,
                )
                if _tasks() > 1:
                    _requeue(_folder_of(command))
                continue
            break
        raise PointFailed(f"exit code {code}: {' '.join(command)}")

    def checkpoint(self, command: Sequence[str], environment: Mapping[str, str]) -> Any:
        """Have the point save and end, and name what is to be run in the next start."""
        from submitit.helpers import DelayedSubmission

        if self._pid is not None:
            os.kill(self._pid, signal.SIGUSR2)
            while not _has_ended(self._pid):
                time.sleep(_POLL_S)
        return DelayedSubmission(PointJob(), command, environment)

    def _run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        process = subprocess.Popen(command, env={**os.environ, **environment, **_rank(), **_tags()})
        self._pid = process.pid
        # Asked now and then: a handler that runs inside of Popen.wait could not ask for itself.
        while not _has_ended(process.pid):
            time.sleep(_POLL_S)
        self._pid = None
        return process.wait()


def _has_ended(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _tasks() -> int:
    return int(os.environ.get("SLURM_NTASKS", "1"))


def _rank() -> dict[str, str]:
    """Which process of a training this task is, as torch.distributed reads it; nothing where it is alone."""
    if _tasks() == 1:
        return {}
    from submitit.helpers import TorchDistributedEnvironment

    here = TorchDistributedEnvironment()
    numbers = {"RANK": here.rank, "WORLD_SIZE": here.world_size, "LOCAL_RANK": here.local_rank}
    numbers |= {"LOCAL_WORLD_SIZE": here.local_world_size, "MASTER_PORT": here.master_port}
    return {
        "MASTER_ADDR": here.master_addr,
        **{name: str(number) for name, number in numbers.items()},
    }


def _tags() -> dict[str, str]:
    """What the run tells of its job."""
    told = {
        "slurm.job": _job_id(),
        "slurm.nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        "slurm.restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }
    return {"RELLOC_TAGS": ";".join(f"{name}={value}" for name, value in told.items())}


def _job_id() -> str:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return (
        f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        if array
        else os.environ.get("SLURM_JOB_ID", "")
    )


def _folder_of(command: Sequence[str]) -> Path:
    """The run folder, which the command's last word names, quoted for Hydra where it has to be."""
    folder = command[-1].removeprefix("hydra.run.dir=")
    return Path(re.sub(r"\\(.)", r"\1", folder[1:-1]) if folder.startswith("'") else folder)


def _requeue(folder: Path) -> None:
    """Start the whole job again, as tasks that wait for a dead one can't go on; not endlessly.

    SLURM's own count has preemptions and time limits too, so the folder notes at which of its starts a job was queued
    again from here; of several tasks that are killed in one start, all note the same.
    """
    job = _job_id()
    folder.mkdir(parents=True, exist_ok=True)
    noted = folder / _REQUEUES
    told = {line.decode() for line in read_lines(noted)}
    now = f"{job} {os.environ.get('SLURM_RESTART_COUNT', '0')}"
    scontrol = shutil.which("scontrol")
    if (
        scontrol is None
        or len([line for line in told - {now} if line.startswith(f"{job} ")]) >= _MOST_RESTARTS
    ):
        raise PointFailed(
            "a process of the point was killed, and it was started again often enough"
        )
    append_lines(noted, [now])
    sys.stdout.flush()
    subprocess.run([scontrol, "requeue", job], check=True)
    time.sleep(_LEFT_TO_SLURM_S)
