"""Runs a sweep as an array of SLURM jobs, one per point."""

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
from relloc.runs.start_command import FULL_ERROR
from relloc.status import Status
from relloc.sweeps.point_status import StatesFunction, point_statuses_when_answered
from relloc.sweeps.points import POINT_FILE, Point, note_job, read_job
from relloc.sweeps.sweep import SWEEP_FILE
from relloc.sweeps.table import print_message
from relloc.terminal import quantity

NAME = "slurm"
_FIRST_POLL_S, _LONGEST_POLL_S = 1.0, 30.0
_DRY_RUN = "relloc-dry_run"  # stands for the token
_SCRIPT = "submission.sh"
# sbatch's message where it finds no configuration, neither in a file nor by DNS
_NO_SLURM = re.compile(r"configuration source|DNS SRV|failed to fetch config", re.IGNORECASE)

# With `cancel`, `log_of` and `states` this module is a `relloc.sweeps.point_status.Scheduler`.
__all__ = ["NAME", "SlurmLauncher", "cancel", "log_of", "states"]


class SlurmLauncher(PointsLauncher):
    """Submits points to SLURM, where submitit runs them, and watches the queue and run folders.

    A point is done when its run folder says so, and SLURM is not asked how a job ended. Hence
    accounting may be off, and a job that fails, is cancelled or vanishes hides no other's result.

    Before sbatch is called, each point's folder notes a token that the jobs carry in their comment
    or name. If this command is killed before it could note SLURM's numbers, the next one finds the
    jobs by the token and does not submit them again.
    """

    # How users choose this launcher, and what the names of its settings begin with
    asked_by = "launcher=slurm"
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
                f"{self.asked_by}, but there is no {missing[0]} here: "
                "start it on a login node of the cluster"
            )
        # Writing the batch script checks all settings.
        script = self._batch_script(_DRY_RUN, len(todo), 1)
        if self.settings["dry_run"]:
            print_message(script)
            command = shlex.join(self.command(todo[0]))
            print_message(
                f"nothing was submitted; each of {quantity(len(todo), 'job')} would "
                "run a command such as\n"
                f"  {command}"
            )
            sys.exit(0)
        # If SLURM refuses the jobs, `start` restores these files.
        notes = (self.sweep.folder / name for name in (SWEEP_FILE, CONFIG_FILE))
        self._notes_before = {note: _bytes_of(note) for note in notes}

    def start(self, todo: Sequence[Point]) -> None:
        if not todo:
            return
        sent: list[Job] = []
        # SLURM limits the size of an array: a large sweep is submitted as several.
        parts = _parts(todo, largest_array(self._cluster))
        for part in parts:
            try:
                sent += self._submit(part, len(parts))
            except NotTaken as error:
                # Jobs of earlier parts go on. Without any, the sweep is left as it was before.
                if sent:
                    self._print_sent(sent)
                else:
                    self._leave_nothing()
                raise UsageError(_why_not(str(error), len(part), len(sent))) from error
        self._print_sent(sent)

    def follow(self, todo: Sequence[Point]) -> None:
        # SIGTERM, as Ctrl-C, ends this command and not its jobs.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        shown: dict[str, Status] = {}
        # The pause between polls grows, to spare SLURM's controller, until a status changes.
        pause_s = _FIRST_POLL_S
        try:
            while todo:
                statuses = point_statuses_when_answered(todo, self.states_functions())
                for one in statuses:
                    if shown.get(one.point.identity) != one.status:
                        print_message(f"{one.status.word:7} {one.point.name}")
                        shown[one.point.identity] = one.status
                        pause_s = _FIRST_POLL_S
                if not any(one.in_flight for one in statuses):
                    return
                time.sleep(pause_s)
                pause_s = min(_LONGEST_POLL_S, 1.1 * pause_s)
        except KeyboardInterrupt:
            print_message("\nthis command is stopped, its jobs go on:")
            for action in ("status", "wait", "cancel"):
                print_message(f"  python -m relloc.sweep {action} {self.sweep.folder}")
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    def log_of(self, point: Point) -> Path | None:
        job = read_job(point.folder).get(NAME)
        return log_of(self.sweep.folder, str(job)) if job else None

    def states_functions(self) -> Mapping[str, StatesFunction]:
        # SLURM is asked by this launcher, which knows the lock of its sbatch.
        return {**super().states_functions(), NAME: self._states}

    def _states(self, jobs: Sequence[str]) -> dict[str, Status]:
        """Returns the states of jobs in SLURM's queue."""
        # A job that is known by its token only may still be on its way to the queue.
        if any(Job.parse(job).is_token for job in jobs):
            wait_for_sbatch(self._lock)
        return states(jobs)

    @property
    def _lock(self) -> Path:
        """The file that sbatch keeps locked while it runs."""
        return self.sweep.folder.parent / ".sbatch.lock"

    @property
    def _logs(self) -> Path:
        """The folder that has a subfolder with batch script and logs for each submission."""
        return self._log_folder or self.sweep.folder / NAME

    @property
    def _cluster(self) -> str | None:
        """The cluster that jobs are sent to, None for the one of this machine."""
        options = {}
        for key, value in self.settings["additional_parameters"].items():
            options[str(key).lstrip("-")] = value
        return cluster_of(options, os.environ)

    def _submit(self, points: Sequence[Point], n_parts: int) -> list[Job]:
        """Submits an array of jobs for these points, or a single job.

        Raises `NotTaken` if SLURM refuses it, and then leaves no files.
        """
        token = new_token()
        script = self._batch_script(token, len(points), n_parts)
        environment, removed = environment_for(script, os.environ)
        for variable in removed:
            print_message(
                f"        {variable} of the environment is left out: "
                "the launcher's settings decide that"
            )

        # Write what the jobs will read: a pickled command for each, and the batch script.
        folder = self._made_folder(token)
        for number, point in enumerate(points):
            self._delayed(point).dump(folder / f"{number}.pkl")
        write_whole(folder / _SCRIPT, script.encode())

        # Note the token with each point, submit, and replace it by SLURM's number.
        before = [_bytes_of(point.folder / POINT_FILE) for point in points]
        by_token = _tasks(Job(number=token, cluster=self._cluster), len(points))
        for point, job in zip(points, by_token, strict=True):
            note_job(point, {NAME: str(job)})
        try:
            taken, messages = submit(
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
        for line in messages.splitlines():
            print_message(f"        {line}")
        jobs = _tasks(taken, len(points))
        for point, job in zip(points, jobs, strict=True):
            note_job(point, {NAME: str(job)})
        return jobs

    def _delayed(self, point: Point) -> Any:
        """Returns what submitit runs in the job of a point."""
        from submitit.core.utils import DelayedSubmission

        names = (
            "PYTHONPATH",
            "RELLOC_SWEEP",
            "RELLOC_SWEEP_CHECKPOINTS",
            "RELLOC_CONF",
            FULL_ERROR,
        )
        variables = {FULL_ERROR: "0"}
        for name, value in self.environment().items():
            if name in names:
                variables[name] = value
        delayed = DelayedSubmission(PointJob(), self.command(point), variables)
        # A limit that the partition sets is not known here. With 0, submitit takes each signal for
        # the time limit.
        delayed.set_timeout(self.settings["timeout_min"] or 0, self.settings["max_num_timeout"])
        return delayed

    def _batch_script(self, token: str, n_points: int, n_parts: int) -> str:
        """Returns the text of the batch script.

        Raises `UsageError` for a setting that submitit does not take.
        """
        import submitit

        # submitit makes no script on a machine without srun, but a dry run is to print one. `plan`
        # has checked that srun exists where it is needed.
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
        # submitit has no public way to get the text without submitting it.
        inner: Any = executor._executor
        if self.settings["timeout_min"] is None:
            inner.parameters["time"] = None  # instead of submitit's default of five minutes
        if n_points > 1:
            inner.parameters["map_count"] = n_points
            # All parts together keep the limit.
            at_once = max(1, self.settings["array_parallelism"] // n_parts)
            inner.parameters["array_parallelism"] = at_once
        return inner._make_submission_file_text(inner._submitit_command_str, token)

    def _made_folder(self, token: str) -> Path:
        """Makes the folder of a submission."""
        folder = self._logs / token
        folder.mkdir(parents=True)
        # A user's own folder of logs is linked from the sweep's folder, where `log_of` looks.
        if self._log_folder is not None:
            (self.sweep.folder / NAME).mkdir(parents=True, exist_ok=True)
            (self.sweep.folder / NAME / token).symlink_to(folder.absolute())
        return folder

    def _remove_folder(self, token: str) -> None:
        """Removes the folder of a submission, and those around it that are empty then."""
        shutil.rmtree(self._logs / token, ignore_errors=True)
        # OSError: there is no link, or a folder has logs of others.
        with contextlib.suppress(OSError):
            (self.sweep.folder / NAME / token).unlink()
        for folder in (self._logs, self.sweep.folder / NAME):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _leave_nothing(self) -> None:
        """Restores the sweep to what it was before this command."""
        for note, content in self._notes_before.items():
            _restore(note, content)
        self._lock.unlink(missing_ok=True)
        self.sweep.leave_nothing()

    def _print_sent(self, jobs: Sequence[Job]) -> None:
        """Prints which jobs were submitted."""
        numbers = f"{jobs[0]} to {jobs[-1]}" if len(jobs) > 1 else f"{jobs[0]}"
        print_message(f"sent    {quantity(len(jobs), 'job')}, {numbers}; logs in {self._logs}")
        print_message(
            "        they need this command no more: "
            f"python -m relloc.sweep status {self.sweep.folder}"
        )


def log_of(sweep: Path, job: str) -> Path | None:
    """Returns the newest output file of a job that is not empty, or None."""
    named = Job.parse(job)
    if named.is_token:
        task = "" if named.task is None else f"_{named.task}"
        found = sweep.glob(f"{NAME}/{named.number}/[0-9]*{task}_[0-9]*_log.*")
    else:
        found = sweep.glob(f"{NAME}/*/{named.name}_*_log.*")
    written = sorted(found, key=lambda path: path.stat().st_mtime)
    not_empty = [path for path in written if path.stat().st_size]
    return not_empty[-1] if not_empty else None


def _placing(folder: Path) -> list[str]:
    """Returns lines of the batch script that put a job's pickle where submitit looks for it.

    submitit itself does so once SLURM has given a number, but the submitting command may be killed
    before. A file that is there already comes from an earlier start of the job; it counts the
    starts that are left, and is not replaced.
    """
    kept = f"{shlex.quote(str(folder))}/${{job}}_submitted.pkl"
    of_point = f"{shlex.quote(str(folder))}/${{SLURM_ARRAY_TASK_ID:-0}}.pkl"
    return [
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}",
        f"[ -e {kept} ] || cp {of_point} {kept}",
    ]


def _parts(points: Sequence[Point], largest: int | None) -> list[Sequence[Point]]:
    """Splits points into as few arrays as the size limit allows."""
    if largest is None or len(points) <= largest:
        return [points]
    return [points[first : first + largest] for first in range(0, len(points), largest)]


def _tasks(job: Job, n_points: int) -> list[Job]:
    """Returns the job of each point: a single job itself, or the tasks of an array."""
    if n_points == 1:
        return [job]
    return [Job(number=job.number, task=task, cluster=job.cluster) for task in range(n_points)]


def _why_not(answer: str, n_points: int, n_sent: int) -> str:
    """Returns a message with SLURM's answer to sbatch, and what to do about it."""
    if _NO_SLURM.search(answer):
        return (
            "no SLURM answers here: sbatch knows no cluster. "
            "launcher=local or launcher=here run on this machine"
        )
    limits = r"QOS|Assoc|MaxSubmit|job count|accounting|temporarily unable to accept"
    if "Invalid job array specification" in answer:
        advice = (
            f"the cluster allows no array of {quantity(n_points, 'job')} "
            "(MaxArraySize in `scontrol show "
            "config`): start the sweep in parts, with fewer points at a time and the same "
            "sweep=NAME"
        )
    elif re.search(limits, answer, re.IGNORECASE):
        advice = (
            "an account, QOS or user may have only so many jobs, minutes or nodes at a time, and "
            f"{quantity(n_points, 'job was', 'jobs were')} to be added: start the sweep in "
            "parts, with fewer points at a "
            "time and the same sweep=NAME, or when others have ended"
        )
    elif n_sent:
        advice = "the same command again sends the rest"
    else:
        advice = "correct the launcher's settings"
    before = quantity(n_sent, "job was sent, ", "jobs were sent, ") if n_sent else ""
    refused = "the others" if n_sent else "the jobs"
    return f"{before}SLURM does not take {refused} ({answer.strip()}): {advice}"


def _bytes_of(path: Path) -> bytes | None:
    """Returns the content of a file, or None if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _restore(path: Path, content: bytes | None) -> None:
    """Gives a file the content that it had.

    If there was no file, it is removed, and its folder too if that is empty then.
    """
    if content is not None:
        write_whole(path, content)
        return
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()
