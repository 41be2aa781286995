"""The work of a SLURM job: it runs one point as a command.

The job is queued again until the point is done.
"""

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
# Exit codes of a point that saved and ended at a signal of the cluster, and of one of whose
# processes that read images was killed
_STOPPED_CODES = tuple(128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))
_LOST_A_READER = 75
# File in the run folder with a line for each time that a job had itself queued again
_REQUEUES = "requeues"
_LEFT_TO_SLURM_S = 900.0  # how long the cluster may take to end a job after it sent a signal


class PointFailed(Exception):
    """The point's command ended with another exit code than 0; its log says why."""


class PointJob:
    """Runs a point's command; submitit calls it on each task of the job.

    The command is a process of its own. Signals of the cluster reach it directly, and it saves and
    ends. submitit's signal handlers are in this process, where no workers or threads could inherit
    them. submitit calls `checkpoint` before it queues the job again.
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
            if code in _STOPPED_CODES:
                # If this process ended now, the job would count as failed or done. Wait for SLURM
                # to end it, which may queue it again.
                print(f"the point saved and ended with exit code {code}; left to SLURM", flush=True)
                time.sleep(_LEFT_TO_SLURM_S)
            elif (code == _LOST_A_READER or code < 0) and restart < _MOST_RESTARTS:
                print(
                    f"a process of the point was killed (exit code {code}); "
                    "it goes on from what it saved",
                    flush=True,
                )
                # Other tasks wait for the killed one: only the whole job can start again.
                if _tasks() > 1:
                    _requeue(_folder_of(command))
                continue
            break
        raise PointFailed(f"exit code {code}: {' '.join(command)}")

    def checkpoint(self, command: Sequence[str], environment: Mapping[str, str]) -> Any:
        """Has the point save and end, and returns what the next start of the job runs."""
        from submitit.helpers import DelayedSubmission

        if self._pid is not None:
            os.kill(self._pid, signal.SIGUSR2)
            while not _has_ended(self._pid):
                time.sleep(_POLL_S)
        return DelayedSubmission(PointJob(), command, environment)

    def _run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Runs the command once and returns its exit code."""
        process = subprocess.Popen(command, env={**os.environ, **environment, **_rank(), **_tags()})
        self._pid = process.pid
        # Polled, since submitit calls `checkpoint` in a signal handler, which waits as well: it
        # could not do so if it interrupted Popen.wait.
        while not _has_ended(process.pid):
            time.sleep(_POLL_S)
        self._pid = None
        return process.wait()


def _has_ended(pid: int) -> bool:
    """Whether a child process has ended; its exit code can still be read."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _tasks() -> int:
    """Returns the number of tasks of this job."""
    return int(os.environ.get("SLURM_NTASKS", "1"))


def _rank() -> dict[str, str]:
    """Returns the variables that tell torch.distributed which process of a training this task is.

    For a job of one task there are none.
    """
    if _tasks() == 1:
        return {}
    from submitit.helpers import TorchDistributedEnvironment

    here = TorchDistributedEnvironment()
    return {
        "MASTER_ADDR": here.master_addr,
        "MASTER_PORT": str(here.master_port),
        "RANK": str(here.rank),
        "WORLD_SIZE": str(here.world_size),
        "LOCAL_RANK": str(here.local_rank),
        "LOCAL_WORLD_SIZE": str(here.local_world_size),
    }


def _tags() -> dict[str, str]:
    """Returns the variable with the tags by which the tracker records the job."""
    tags = {
        "slurm.job": _job_id(),
        "slurm.nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        "slurm.restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }
    words = [f"{name}={value}" for name, value in tags.items()]
    return {"RELLOC_TAGS": ";".join(words)}


def _job_id() -> str:
    """Returns the number of this job, such as 42, or of this task of an array, such as 42_3."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if not array:
        return os.environ.get("SLURM_JOB_ID", "")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def _folder_of(command: Sequence[str]) -> Path:
    """Returns the run folder, which the command's last word names, without Hydra's quotes."""
    folder = command[-1].removeprefix("hydra.run.dir=")
    if folder.startswith("'"):
        folder = re.sub(r"\\(.)", r"\1", folder[1:-1])
    return Path(folder)


def _requeue(folder: Path) -> None:
    """Has SLURM queue the whole job again, at most three times, and waits for the job's end.

    SLURM's own count of restarts includes preemptions and time limits. Hence a file in the run
    folder notes the starts of the job that ended here. If several tasks are killed in one start,
    all note the same line.
    """
    job = _job_id()
    folder.mkdir(parents=True, exist_ok=True)
    noted = folder / _REQUEUES
    lines = {line.decode() for line in read_lines(noted)}
    now = f"{job} {os.environ.get('SLURM_RESTART_COUNT', '0')}"
    earlier = [line for line in lines - {now} if line.startswith(f"{job} ")]
    scontrol = shutil.which("scontrol")
    if scontrol is None or len(earlier) >= _MOST_RESTARTS:
        raise PointFailed(
            "a process of the point was killed, and it was started again often enough"
        )
    append_lines(noted, [now])
    sys.stdout.flush()
    subprocess.run([scontrol, "requeue", job], check=True)
    time.sleep(_LEFT_TO_SLURM_S)
