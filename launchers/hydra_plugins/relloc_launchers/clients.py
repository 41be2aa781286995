"""SLURM's commands (sbatch, squeue, scancel, scontrol): how they are asked, and what counts of what they answer.

Sites wrap these commands, and print banners, warnings and notices beside the answer: only lines that look like an
answer are read.
"""

import dataclasses
import fcntl
import os
import re
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from relloc.errors import Interrupted, UsageError
from relloc.files import NO_LOCKS_HERE
from relloc.status import Status

ASKED_S = 60  # a client of a cluster in trouble may wait for ever
_SUBMITTED_S = 300  # a busy controller takes its time for a large array

# States of jobs that are over, which squeue shows for some minutes (MinJobAge) where it is asked for all
_OVER = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
)
_CANCELLED = "CANCELLED"
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT")
_TOKEN = re.compile(r"relloc-[0-9a-f]{12}")
_JOB = r"\s*(?P<job>\d+)(?:_(?P<tasks>\d+|\[[^\]]*\]))?"
_LINE = re.compile(_JOB + r"\|(?P<state>[A-Z_]+)\s*(?:\|(?P<told>.*))?")
# A job in a format of the site's own, which is not for us to choose then: a state somewhere, perhaps as its letters
_OTHER_LINE = re.compile(_JOB + r"[\s|,;]+(?P<told>.*)")
_LETTERS = {
    "R": "RUNNING",
    "CG": "COMPLETING",
    "S": "SUSPENDED",
    "CD": "COMPLETED",
    "CA": "CANCELLED",
    "F": "FAILED",
}
_LETTERS |= {
    "TO": "TIMEOUT",
    "NF": "NODE_FAIL",
    "OOM": "OUT_OF_MEMORY",
    "PR": "PREEMPTED",
    "BF": "BOOT_FAIL",
}
# What sbatch says when it can't tell whether the controller took the job
_UNSURE = re.compile(
    r"timed out|unable to contact|zero bytes|connection (refused|reset)|communication",
    re.IGNORECASE,
)
# What squeue says beside no job at all where it could not ask the controller
_TROUBLE = re.compile(
    r"^.*(\berror\b|unable to contact|timed out|connection refused).*$",
    re.IGNORECASE | re.MULTILINE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A job, or one task of an array: `number` is SLURM's or, before that is known, the token of the submission.

    Written as 42, 42_3, 42_3@cluster or relloc-0123456789ab_3.
    """

    number: str
    task: int | None = None
    cluster: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Job":
        """Read what `str` gives."""
        name, _, cluster = text.partition("@")
        number, _, task = name.partition("_")
        return cls(
            number=number, task=int(task) if task.isdigit() else None, cluster=cluster or None
        )

    def __str__(self) -> str:
        return self.name + (f"@{self.cluster}" if self.cluster else "")

    @property
    def name(self) -> str:
        """As SLURM's commands take it, which are told the cluster apart."""
        return self.number if self.task is None else f"{self.number}_{self.task}"

    @property
    def is_token(self) -> bool:
        """Whether SLURM's number is not known."""
        return _TOKEN.fullmatch(self.number) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Queued:
    """A job that SLURM knows, its state there, and `about` it: its name and comment."""

    job: Job
    state: str
    about: str

    @property
    def is_over(self) -> bool:
        return self.state in _OVER

    @property
    def names(self) -> list[str]:
        """SLURM's, and the one with the token, by which it was known before SLURM's number was."""
        found = _TOKEN.search(self.about)
        return [
            self.job.name,
            *([dataclasses.replace(self.job, number=found[0]).name] if found else []),
        ]


class NotTaken(UsageError):
    """SLURM did not take a job, and no job is left of it."""


def new_token() -> str:
    """What a submission is found by in SLURM's queue before its number is known: a part of its comment or name."""
    return f"relloc-{uuid.uuid4().hex[:12]}"


def submit(
    script: Path, *, token: str, environment: Mapping[str, str], cluster: str | None, lock: Path
) -> tuple[Job, str]:
    """Have sbatch take a batch script; the job, and what sbatch said beside that.

    The job is named by its token where sbatch's answer has no number that can be told from others. sbatch itself
    holds the `lock`, until its end also where this process is killed: see `wait_for_sbatch`.

    Raises:
        NotTaken: sbatch refused the script.
        Interrupted: whether it was taken is not known; the queue may show the token later.
    """
    try:
        with open(lock, "ab") as held:
            _lock(held.fileno())
            done = subprocess.run(
                ["sbatch", str(script)],
                env=dict(environment),
                pass_fds=(held.fileno(),),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SUBMITTED_S,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise Interrupted(
            f"sbatch has not answered for {_SUBMITTED_S} s: the same command again finds out whether it took the jobs"
        ) from None
    except OSError as error:
        raise NotTaken(f"sbatch can't be started: {error}") from error
    told = done.stderr.strip()
    if done.returncode == 0:
        # From what is sure to what is likely; at last the token stands for a number that nobody told.
        job = (
            read_sbatch(done.stdout, cluster)
            or _by_token(token, cluster)
            or _last_number(done.stdout, cluster)
        )
        return job or Job(number=token, cluster=cluster), told
    if _UNSURE.search(told):
        if job := _by_token(token, cluster):
            return job, told
        raise Interrupted(
            f"SLURM did not say whether it took the jobs ({told}): the same command again finds out"
        )
    raise NotTaken(told or done.stdout.strip() or f"sbatch ended with exit code {done.returncode}")


def wait_for_sbatch(lock: Path) -> None:
    """Return once no sbatch runs whose command was killed meanwhile: before, the queue may not show its job."""
    end = (
        time.monotonic() + ASKED_S
    )  # a site's sbatch may leave a process behind that keeps the lock
    with open(lock, "ab") as file:
        while not _lock(file.fileno()) and time.monotonic() < end:
            time.sleep(0.1)


def _lock(file: int) -> bool:
    """Lock an open file until the last process that has it open ends; whether it is, or can't be on this system."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
    return True


def read_sbatch(told: str, cluster: str | None = None) -> Job | None:
    """The job of sbatch's answer, also as --parsable gives it; `cluster` is where it was sent if that isn't said."""
    for pattern in (
        r"Submitted batch job (\d+)(?: on cluster (\S+))?",
        r"^\s*(\d+)(?:;(\S+))?\s*$",
        r"\bjob (\d+)(?: on cluster (\S+))?",
    ):
        if found := re.findall(pattern, told, re.MULTILINE | re.IGNORECASE):
            number, named = found[-1]
            return Job(number=number, cluster=named.rstrip(".") or _if_one(cluster))
    return None


def _last_number(told: str, cluster: str | None) -> Job | None:
    """Of an answer in another language: the number of the last line that has one, and only one."""
    lines = [re.findall(r"\b\d+\b", line) for line in told.splitlines()]
    alone = [numbers[0] for numbers in lines if len(numbers) == 1]
    return Job(number=alone[-1], cluster=_if_one(cluster)) if alone else None


def _if_one(cluster: str | None) -> str | None:
    """The cluster, unless several were named and SLURM chose."""
    return None if cluster is None or "," in cluster else cluster


def _by_token(token: str, cluster: str | None) -> Job | None:
    """The job in the queue whose comment or name has the token."""
    try:
        found = [
            queued.job for queued in _queue(cluster) if token in queued.about and not queued.is_over
        ]
    except UsageError:
        return None
    return (
        Job(number=found[0].number, cluster=found[0].cluster or _if_one(cluster)) if found else None
    )


def states(jobs: Sequence[str]) -> dict[str, Status]:
    """Of these jobs, those in SLURM's queue, each asked of the cluster that has it.

    A job that was ended by hand is CANCELLED for some minutes, as long as SLURM remembers it; others that are over
    are left out. Raises `UsageError` where SLURM does not answer.
    """
    asked = {text: Job.parse(text) for text in jobs}
    found: dict[str, Status] = {}
    for cluster in sorted({job.cluster for job in asked.values()}, key=str):
        queue: dict[str, str] = {}
        for queued in sorted(
            _queue(cluster), key=lambda queued: not queued.is_over
        ):  # what is alive wins
            queue |= dict.fromkeys(queued.names, queued.state)
        for text, job in asked.items():
            if job.cluster != cluster:
                continue
            # An array that was cancelled before a task began is shown without tasks, and by some sites any array.
            state = queue.get(job.name) or queue.get(job.number)
            if state == _CANCELLED:
                found[text] = Status.CANCELLED
            elif state is not None and state not in _OVER:
                found[text] = Status.RUNNING if state in _RUNNING else Status.WAITING
    return found


def cancel(jobs: Sequence[str]) -> None:
    """Have SLURM end these jobs. Raises `UsageError` where it does not."""
    asked = [Job.parse(text) for text in jobs]
    for cluster in sorted({job.cluster for job in asked}, key=str):
        there = [job for job in asked if job.cluster == cluster]
        names = [job.name for job in there if not job.is_token]
        tokens = {job.name for job in there if job.is_token}
        if tokens:
            names += [
                queued.job.name
                for queued in _queue(cluster)
                if not queued.is_over and tokens & {*queued.names}
            ]
        if names:
            _ask(
                ["scancel", *_option_for(cluster), *names],
                "SLURM does not say that it ended all jobs",
            )


def largest_array(cluster: str | None) -> int | None:
    """How many tasks an array may have (MaxArraySize); None where that can't be asked."""
    try:
        told, _ = _ask(
            ["scontrol", *_option_for(_if_one(cluster)), "show", "config"],
            "SLURM does not say its limits",
        )
    except UsageError:
        return None
    found = re.search(r"^\s*MaxArraySize\s*=\s*(\d+)", told, re.MULTILINE)
    return int(found[1]) if found and int(found[1]) > 0 else None


def _queue(cluster: str | None) -> Iterator[_Queued]:
    """Each job of this user that SLURM knows, also for some minutes after its end."""
    asked = [
        "squeue",
        *_option_for(cluster),
        "--noheader",
        "--array",
        "--states=all",
        f"--user={os.getuid()}",
    ]
    problem = "SLURM does not say how its jobs stand"
    told, complaint = _ask([*asked, "--format=%i|%T|%j|%k"], problem)
    found = list(_jobs_in(told, cluster))
    if not found and (
        why := _TROUBLE.search(f"{complaint}\n{told}")
    ):  # which a site's squeue may end well with
        raise UsageError(f"{problem}: {why[0].strip()}")
    yield from found


def _jobs_in(told: str, cluster: str | None) -> Iterator[_Queued]:
    of = cluster
    for line in told.splitlines():
        if named := re.fullmatch(r"CLUSTER: (\S+)\s*", line):
            of = named[1]
        if (found := _LINE.fullmatch(line)) is not None:
            state, about = found["state"], found["told"] or ""
        elif (found := _OTHER_LINE.fullmatch(line)) is not None:
            state, about = _state_among(found["told"]), found["told"]
        else:
            continue
        for task in _tasks(found["tasks"]):
            yield _Queued(
                job=Job(number=found["job"], task=task, cluster=of), state=state, about=about
            )


def _state_among(text: str) -> str:
    """The state that one of the words is; a job that is shown without one is taken for one that waits."""
    words = [_LETTERS.get(word, word) for word in re.split(r"[\s|,;]+", text)]
    return next((word for word in words if word in (*_RUNNING, *_OVER)), "PENDING")


def _tasks(text: str | None) -> Iterator[int | None]:
    """The tasks of an array that a line tells of: one, or ranges such as [0-3,7%2] that a site's squeue keeps."""
    if text is None:
        yield None
        return
    for part in text.strip("[]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            yield from range(int(first), int(last if last.isdigit() else first) + 1)


def _option_for(cluster: str | None) -> list[str]:
    return [f"--clusters={cluster}"] if cluster else []


def _ask(command: Sequence[str], problem: str) -> tuple[str, str]:
    """What a command writes on stdout and stderr; without the user's defaults for it, which hide jobs or ask back.

    Raises `UsageError`, which begins with the `problem`, where it fails.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SQUEUE_", "SCANCEL_"))
    }
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ASKED_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(
            f"{problem}: {str(getattr(error, 'stderr', '') or error).strip()}"
        ) from error
    return done.stdout, done.stderr
