"""A sweep as an array of SLURM jobs, one a point."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hydra_plugins.relloc_launchers.job import PointJob
from hydra_plugins.relloc_launchers.points import PointsLauncher

from relloc.errors import UsageError
from relloc.runs.launch import FULL_ERROR
from relloc.sweeps.points import Point, note_job, read_job
from relloc.sweeps.standing import Ask, standings_in_time
from relloc.sweeps.table import say

NAME = "slurm"
_ASKED_S = 60  # a client of a cluster in trouble may wait for ever
_FIRST_POLL_S, _LONGEST_POLL_S = 1.0, 30.0
_OURS = (
    "dry_run",
    "tasks_per_node",
    "setup",
    "srun_args",
    "additional_parameters",
    "submitit",
    "max_num_timeout",
)
# submitit's own names for what all its clusters have; others are SLURM's.
_COMMON = ("nodes", "gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min")


class SlurmLauncher(PointsLauncher):
    """Submits points through submitit and watches them in SLURM's queue and in their folders.

    What SLURM says of a job's end is not asked for: a point is done when its run folder says so.
    So accounting may be off, and a job that fails, is cancelled or vanishes hides no other's result.
    """

    def plan(self, todo: Sequence[Point]) -> None:
        if not todo:
            return
        self._submit = self._executor(len(todo))
        if self.settings["dry_run"]:
            say(_batch_script(self._submit, len(todo)))
            say(f"nothing was submitted; each of {len(todo)} jobs would run a command such as\n{self._shown(todo[0])}")
            sys.exit(0)

    def start(self, todo: Sequence[Point]) -> None:
        if not todo:
            return
        names = ("PYTHONPATH", "RELLOC_SWEEP", "RELLOC_BESIDE", "RELLOC_CONF", FULL_ERROR)
        told = {FULL_ERROR: "0"} | {name: value for name, value in self.environment().items() if name in names}
        with _outside_of_jobs():
            jobs = self._submit.map_array(PointJob(), [self.command(point) for point in todo], [told] * len(todo))
        for point, job in zip(todo, jobs, strict=True):
            note_job(point, {NAME: job.job_id})
        say(f"sent    {len(jobs)} jobs, {jobs[0].job_id} to {jobs[-1].job_id}; logs in {self._logs}")
        say(f"        they need this command no more: python -m relloc.sweep status {self.sweep.folder}")

    def follow(self, todo: Sequence[Point]) -> None:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        shown: dict[str, str] = {}
        pause_s = _FIRST_POLL_S
        try:
            while todo:
                found = standings_in_time(todo, self.schedulers())
                for point, now in zip(todo, found, strict=True):
                    if shown.get(point.identity) != now.state:
                        say(f"{now.state:7} {point.name}")
                        shown[point.identity], pause_s = now.state, _FIRST_POLL_S
                if not any(now.in_flight for now in found):
                    return
                time.sleep(pause_s)
                pause_s = min(_LONGEST_POLL_S, 1.1 * pause_s)
        except KeyboardInterrupt:
            say("\nthis command is stopped, its jobs go on:")
            for does in ("status", "wait", "cancel"):
                say(f"  python -m relloc.sweep {does} {self.sweep.folder}")
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    def log_of(self, point: Point) -> Path | None:
        job = (read_job(point.folder) or {}).get(NAME)
        return log_of(self.sweep.folder, str(job)) if job else None

    def schedulers(self) -> Mapping[str, Ask]:
        return {NAME: states}

    @property
    def _logs(self) -> Path:
        return self.sweep.folder / NAME

    def _shown(self, point: Point) -> str:
        return "  " + shlex.join(self.command(point))

    def _executor(self, n_points: int) -> Any:
        """submitit's executor with all settings. Raises `UsageError` for one that it does not know."""
        import submitit

        for name in ("setup", "srun_args"):
            if not isinstance(self.settings[name], list):
                raise UsageError(
                    f"launcher.{name}={self.settings[name]} is not a list, such as [{self.settings[name]}]"
                )
        if not isinstance(self.settings["dry_run"], bool):
            raise UsageError(f"launcher.dry_run={self.settings['dry_run']} is neither true nor false")
        if self.settings["dry_run"]:  # a script can be printed where there is no SLURM
            submitit.SlurmExecutor.affinity = classmethod(lambda _: 1)  # pyright: ignore[reportAttributeAccessIssue]
        elif not all(map(shutil.which, ("sbatch", "srun"))):
            raise UsageError("launcher=slurm, but there is no sbatch here: start it on a login node of the cluster")
        executor = submitit.AutoExecutor(
            folder=self._logs / "%j", cluster="slurm", slurm_max_num_timeout=self.settings["max_num_timeout"]
        )
        try:
            executor.update_parameters(**self._parameters())
        except (ValueError, TypeError, NameError, AssertionError) as error:
            raise UsageError(f"launcher settings that submitit does not take: {error}") from error
        return executor

    def _parameters(self) -> dict[str, Any]:
        """Settings by submitit's names; those that are null are left to the cluster."""
        settings = self.settings
        asked = {name: value for name, value in settings.items() if name not in _OURS and value is not None}
        gpus = int(settings["gpus_per_node"] or 0)
        tasks = max(1, gpus) if settings["tasks_per_node"] == "auto" else int(settings["tasks_per_node"])
        if not gpus:
            asked.pop("gpus_per_node", None)
        together = tasks * int(settings["nodes"]) > 1
        code = shlex.quote(str(self.code))
        slurm = {
            **{name: value for name, value in asked.items() if name not in _COMMON},
            "job_name": f"relloc_{self.sweep.name}",
            "setup": [f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"', *settings["setup"]],
            # A task that ends badly ends the others, which would wait for it.
            "srun_args": [*(["--kill-on-bad-exit=1"] if together else []), *settings["srun_args"]],
            "additional_parameters": {"requeue": True, **settings["additional_parameters"]},
            **settings["submitit"],
        }
        common = {name: asked[name] for name in _COMMON if name in asked} | {"tasks_per_node": tasks}
        return common | {f"slurm_{name}": value for name, value in slurm.items()}


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """A job that is submitted from inside of another inherits nothing of it. Raises `UsageError` as sbatch says."""
    from submitit.core.utils import FailedJobError
    from submitit.helpers import clean_env

    configured = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
    try:
        with clean_env():
            os.environ.update(configured)
            try:
                yield
            finally:
                for name in configured:
                    del os.environ[name]
    except FailedJobError as error:
        raise UsageError(f"SLURM does not take the jobs: {str(error).strip()}") from error


def states(numbers: Sequence[str]) -> dict[str, Literal["running", "waiting"]]:
    """Of these jobs, as "7" or "7_2", those in SLURM's queue. Raises `UsageError` where it does not answer."""
    asked = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%T"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=_ASKED_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or error
        raise UsageError(f"SLURM does not say how its jobs stand: {str(said).strip()}") from error
    found = dict(line.split("|") for line in told.splitlines())
    return {
        number: "running" if found[number] in ("RUNNING", "COMPLETING", "SUSPENDED") else "waiting"
        for number in numbers
        if number in found
    }


def cancel(numbers: Sequence[str]) -> None:
    """Have SLURM end these jobs. Raises `UsageError` where it does not."""
    if not numbers:
        return
    try:
        subprocess.run(["scancel", *numbers], timeout=_ASKED_S, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or error
        raise UsageError(f"SLURM does not say that it ended all jobs: {str(said).strip()}") from error


def log_of(sweep: Path, job: str) -> Path | None:
    """The newest output file of a job."""
    written = sorted(
        sweep.glob(f"{NAME}/{job.partition('_')[0]}*/{job}_*_log.*"), key=lambda path: path.stat().st_mtime
    )
    told = [path for path in written if path.stat().st_size]
    return told[-1] if told else None


def _batch_script(executor: Any, n_points: int) -> str:
    inner = executor._executor
    if n_points > 1:
        inner.parameters["map_count"] = n_points
    return inner._make_submission_file_text(inner._submitit_command_str, "dry_run")
