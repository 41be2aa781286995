"""A sweep as an array of SLURM jobs, one a point."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_plugins.relloc_launchers.clients import (
    Job,
    NotTaken,
    cancel,
    largest_array,
    new_token,
    states,
    submit,
    wait_for_sbatch,
)
from hydra_plugins.relloc_launchers.environment import cluster_of, environment_for
from hydra_plugins.relloc_launchers.job import PointJob
from hydra_plugins.relloc_launchers.points import CONFIG_FILE, PointsLauncher
from hydra_plugins.relloc_launchers.resources import parameters_of
from omegaconf import DictConfig

from relloc.errors import UsageError
from relloc.files import write_whole
from relloc.runs.launch import FULL_ERROR
from relloc.status import Status
from relloc.sweeps.points import POINT_FILE, Point, note_job, read_job
from relloc.sweeps.standing import Ask, standings_in_time
from relloc.sweeps.sweep import SWEEP_FILE
from relloc.sweeps.table import say

NAME = "slurm"
_FIRST_POLL_S, _LONGEST_POLL_S = 1.0, 30.0
_DRY_RUN = "relloc-dry_run"
_SCRIPT = "submission.sh"
# What sbatch says where it finds no configuration, neither in a file nor by DNS
_NO_SLURM = re.compile(r"configuration source|DNS SRV|failed to fetch config", re.IGNORECASE)

__all__ = [
    "NAME",
    "SlurmLauncher",
    "cancel",
    "log_of",
    "states",
]  # the middle three are what `relloc.sweeps` asks


class SlurmLauncher(PointsLauncher):
    """Submits points to SLURM, run by submitit there, and watches them in SLURM's queue and in their folders.

    What SLURM says of a job's end is not asked for: a point is done when its run folder says so.
    So accounting may be off, and a job that fails, is cancelled or vanishes hides no other's result.

    Before sbatch is called, each point's folder notes a token that the jobs carry: where this command is killed
    before it could note SLURM's numbers, the jobs are found by the token and not submitted again.
    """

    asked_by = (
        "launcher=slurm"  # how the user asks for this launcher, and what its settings begin with
    )
    prefix = "launcher."

    def __init__(self, settings: DictConfig) -> None:
        super().__init__(settings)
        self._log_folder: Path | None = None
        self._job_name: str | None = None

    def plan(self, todo: Sequence[Point]) -> None:
        if not todo:
            return
        if not isinstance(self.settings["dry_run"], bool):
            raise UsageError(
                f"{self.prefix}dry_run={self.settings['dry_run']} is neither true nor false"
            )
        missing = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]
        if missing and not self.settings["dry_run"]:
            raise UsageError(
                f"{self.asked_by}, but there is no {missing[0]} here: start it on a login node of the cluster"
            )
        whole = self._batch_script(_DRY_RUN, len(todo), 1)  # and so all settings are looked at
        if self.settings["dry_run"]:
            say(whole)
            command = shlex.join(self.command(todo[0]))
            say(
                f"nothing was submitted; each of {len(todo)} jobs would run a command such as\n  {command}"
            )
            sys.exit(0)
        notes = (self.sweep.folder / name for name in (SWEEP_FILE, CONFIG_FILE))
        self._notes_before = {note: _bytes_of(note) for note in notes}

    def start(self, todo: Sequence[Point]) -> None:
        if not todo:
            return
        sent: list[Job] = []
        parts = _parts(todo, largest_array(self._cluster))
        for part in parts:
            try:
                sent += self._submit(part, len(parts))
            except NotTaken as error:
                if sent:
                    self._say_sent(sent)
                else:
                    self._leave_nothing()
                raise UsageError(_why_not(str(error), len(part), len(sent))) from error
        self._say_sent(sent)

    def follow(self, todo: Sequence[Point]) -> None:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        shown: dict[str, Status] = {}
        pause_s = _FIRST_POLL_S
        try:
            while todo:
                found = standings_in_time(todo, self.schedulers())
                for now in found:
                    if shown.get(now.point.identity) != now.status:
                        say(f"{now.status.word:7} {now.point.name}")
                        shown[now.point.identity], pause_s = now.status, _FIRST_POLL_S
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
        job = read_job(point.folder).get(NAME)
        return log_of(self.sweep.folder, str(job)) if job else None

    def schedulers(self) -> Mapping[str, Ask]:
        return {NAME: self._states}

    def _states(self, jobs: Sequence[str]) -> dict[str, Status]:
        if any(Job.parse(job).is_token for job in jobs):
            wait_for_sbatch(self._lock)
        return states(jobs)

    @property
    def _lock(self) -> Path:
        return self.sweep.folder.parent / ".sbatch.lock"

    @property
    def _logs(self) -> Path:
        """Where submissions have folders of their own, with batch scripts, logs and what submitit keeps."""
        return self._log_folder or self.sweep.folder / NAME

    @property
    def _cluster(self) -> str | None:
        more = {
            str(key).lstrip("-"): value
            for key, value in self.settings["additional_parameters"].items()
        }
        return cluster_of(more, os.environ)

    def _submit(self, points: Sequence[Point], n_parts: int) -> list[Job]:
        """Submit an array of these points, or a single job. Raises `NotTaken` and leaves nothing if SLURM refuses."""
        token = new_token()
        script = self._batch_script(token, len(points), n_parts)
        environment, gave_way = environment_for(script, os.environ)
        for variable in gave_way:
            say(
                f"        {variable} of the environment is left out: the launcher's settings decide that"
            )
        folder = self._made_folder(token)
        for number, point in enumerate(points):
            self._delayed(point).dump(folder / f"{number}.pkl")
        write_whole(folder / _SCRIPT, script.encode())
        before = [_bytes_of(point.folder / POINT_FILE) for point in points]
        for point, job in zip(
            points, _tasks(Job(number=token, cluster=self._cluster), len(points)), strict=True
        ):
            note_job(point, {NAME: str(job)})
        try:
            taken, told = submit(
                folder / _SCRIPT,
                token=token,
                environment=environment,
                cluster=self._cluster,
                lock=self._lock,
            )
        except NotTaken:
            for point, note in zip(points, before, strict=True):
                _restore(point.folder / POINT_FILE, note)
            self._remove_folder(token)
            raise
        for line in told.splitlines():
            say(f"        {line}")
        jobs = _tasks(taken, len(points))
        for point, job in zip(points, jobs, strict=True):
            note_job(point, {NAME: str(job)})
        return jobs

    def _delayed(self, point: Point) -> Any:
        """What submitit runs in a job of this point."""
        from submitit.core.utils import DelayedSubmission

        names = ("PYTHONPATH", "RELLOC_SWEEP", "RELLOC_BESIDE", "RELLOC_CONF", FULL_ERROR)
        told = {FULL_ERROR: "0"} | {
            name: value for name, value in self.environment().items() if name in names
        }
        delayed = DelayedSubmission(PointJob(), self.command(point), told)
        # Where the partition sets the limit it isn't known here, and each signal counts as the limit.
        delayed.set_timeout(self.settings["timeout_min"] or 0, self.settings["max_num_timeout"])
        return delayed

    def _batch_script(self, token: str, n_points: int, n_parts: int) -> str:
        """The text for sbatch. Raises `UsageError` for a setting that submitit does not take."""
        import submitit

        # A script can be printed where there is no SLURM; that srun is here has been looked at otherwise.
        submitit.SlurmExecutor.affinity = classmethod(lambda _: 1)  # pyright: ignore[reportAttributeAccessIssue]
        folder = self._logs / token
        parameters = parameters_of(
            self.settings,
            prefix=self.prefix,
            name=self._job_name or f"relloc_{self.sweep.name}",
            token=token,
            code=Path(str(self.code)),
            setup=_placing(folder),
        )
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
        try:
            executor.update_parameters(**parameters)
        except (ValueError, TypeError, NameError, AssertionError) as error:
            raise UsageError(f"launcher settings that submitit does not take: {error}") from error
        inner: Any = executor._executor
        if self.settings["timeout_min"] is None:
            inner.parameters["time"] = None  # else submitit's own default: five minutes
        if n_points > 1:
            inner.parameters["map_count"] = n_points
            inner.parameters["array_parallelism"] = max(
                1, self.settings["array_parallelism"] // n_parts
            )
        return inner._make_submission_file_text(inner._submitit_command_str, token)

    def _made_folder(self, token: str) -> Path:
        folder = self._logs / token
        folder.mkdir(parents=True)
        if self._log_folder is not None:  # `log_of` looks for it in the sweep's folder
            (self.sweep.folder / NAME).mkdir(parents=True, exist_ok=True)
            (self.sweep.folder / NAME / token).symlink_to(folder.absolute())
        return folder

    def _remove_folder(self, token: str) -> None:
        shutil.rmtree(self._logs / token, ignore_errors=True)
        with contextlib.suppress(OSError):  # it is no link, or others' logs are there
            (self.sweep.folder / NAME / token).unlink()
        for folder in (self._logs, self.sweep.folder / NAME):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _leave_nothing(self) -> None:
        """Make the sweep what it was before this command."""
        for note, content in self._notes_before.items():
            _restore(note, content)
        self._lock.unlink(missing_ok=True)
        self.sweep.leave_nothing()

    def _say_sent(self, jobs: Sequence[Job]) -> None:
        say(f"sent    {len(jobs)} jobs, {jobs[0]} to {jobs[-1]}; logs in {self._logs}")
        say(
            f"        they need this command no more: python -m relloc.sweep status {self.sweep.folder}"
        )


def log_of(sweep: Path, job: str) -> Path | None:
    """The newest output file of a job."""
    named = Job.parse(job)
    if named.is_token:
        task = "" if named.task is None else f"_{named.task}"
        found = sweep.glob(f"{NAME}/{named.number}/[0-9]*{task}_[0-9]*_log.*")
    else:
        found = sweep.glob(f"{NAME}/*/{named.name}_*_log.*")
    written = sorted(found, key=lambda path: path.stat().st_mtime)
    told = [path for path in written if path.stat().st_size]
    return told[-1] if told else None


def _placing(folder: Path) -> list[str]:
    """Lines of the batch script that put what a job runs where submitit looks for it.

    The submitting command could do it once SLURM has told a number, but may be killed before. What is there
    already is of a start before this one, and counts the starts that are left.
    """
    kept = f"{shlex.quote(str(folder))}/${{job}}_submitted.pkl"
    of_point = f"{shlex.quote(str(folder))}/${{SLURM_ARRAY_TASK_ID:-0}}.pkl"
    return [
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}",
        f"[ -e {kept} ] || cp {of_point} {kept}",
    ]


def _parts(points: Sequence[Point], largest: int | None) -> list[Sequence[Point]]:
    """Points for each array: as few arrays as their size allows."""
    if largest is None or len(points) <= largest:
        return [points]
    return [points[first : first + largest] for first in range(0, len(points), largest)]


def _tasks(job: Job, n_points: int) -> list[Job]:
    if n_points == 1:
        return [job]
    return [Job(number=job.number, task=task, cluster=job.cluster) for task in range(n_points)]


def _why_not(told: str, n_points: int, n_sent: int) -> str:
    """What SLURM said, and what to do about it."""
    if _NO_SLURM.search(told):
        return "no SLURM answers here: sbatch knows no cluster. launcher=local or launcher=here run on this machine"
    before = f"{n_sent} jobs were sent, " if n_sent else ""
    if "Invalid job array specification" in told:
        does = (
            f"the cluster allows no array of {n_points} jobs (MaxArraySize in `scontrol show config`): "
            "start the sweep in parts, with fewer points at a time and the same sweep=NAME"
        )
    elif re.search(
        r"QOS|Assoc|MaxSubmit|job count|accounting|temporarily unable to accept",
        told,
        re.IGNORECASE,
    ):
        does = (
            f"an account, QOS or user may have only so many jobs, minutes or nodes at a time, and {n_points} jobs were "
            "to be added: start the sweep in parts, with fewer points at a time and the same sweep=NAME, or when "
            "others have ended"
        )
    else:
        does = (
            "mend the launcher's settings"
            if not n_sent
            else "the same command again sends the rest"
        )
    return f"{before}SLURM does not take {'the others' if n_sent else 'the jobs'} ({told.strip()}): {does}"


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _restore(path: Path, content: bytes | None) -> None:
    """Give a file the content it had; where there was none, remove it, and its folder if it is empty then."""
    if content is not None:
        write_whole(path, content)
        return
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()
