"""Calls SLURM's commands (sbatch, squeue, scancel, scontrol) and reads their answers.

Sites wrap these commands, and print banners, warnings and notices beside the answer. Hence only
lines that look like an answer are read.
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

ASKED_S = 60  # limit for a command: with a cluster in trouble it may never end
_SUBMITTED_S = 300  # limit for sbatch: a busy controller is slow with large arrays

# States of jobs that have ended. `squeue --states=all` shows them for some minutes (MinJobAge).
_OVER = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
)
_CANCELLED = "CANCELLED"
_RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT")
# Jobs in an answer, such as 42, 42_3 or 42_[0-3,7], and lines of `squeue --format=%i|%T|%j|%k`
_TOKEN = re.compile(r"relloc-[0-9a-f]{12}")
_JOB = r"\s*(?P<job>\d+)(?:_(?P<tasks>\d+|\[[^\]]*\]))?"
_LINE = re.compile(_JOB + r"\|(?P<state>[A-Z_]+)\s*(?:\|(?P<rest>.*))?")
# A line in a format of the site's own, whose squeue ignores ours: a state is somewhere among the
# words, perhaps abbreviated
_OTHER_LINE = re.compile(_JOB + r"[\s|,;]+(?P<rest>.*)")
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
# Messages of sbatch when it can't tell whether the controller took the job
_UNSURE = re.compile(
    r"timed out|unable to contact|zero bytes|connection (refused|reset)|communication",
    re.IGNORECASE,
)
# Messages of squeue, beside no jobs, when it could not ask the controller
_TROUBLE = re.compile(
    r"^.*(\berror\b|unable to contact|timed out|connection refused).*$",
    re.IGNORECASE | re.MULTILINE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A job, or one task of an array of jobs.

    `number` is SLURM's number or, before that is known, the token of the submission. As a text, a
    job is written 42, 42_3, 42_3@cluster or relloc-0123456789ab_3.
    """

    number: str
    task: int | None = None
    cluster: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Job":
        """Returns the job that a text names."""
        name, _, cluster = text.partition("@")
        number, _, task = name.partition("_")
        task_number = int(task) if task.isdigit() else None
        return cls(number=number, task=task_number, cluster=cluster or None)

    def __str__(self) -> str:
        return self.name + (f"@{self.cluster}" if self.cluster else "")

    @property
    def name(self) -> str:
        """The job as SLURM's commands take it: its cluster is given by an option."""
        return self.number if self.task is None else f"{self.number}_{self.task}"

    @property
    def is_token(self) -> bool:
        """Whether the job is known by its token only, not by SLURM's number."""
        return _TOKEN.fullmatch(self.number) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Queued:
    """A job that SLURM knows, with its state there; `about` is its name and comment."""

    job: Job
    state: str
    about: str

    @property
    def is_over(self) -> bool:
        return self.state in _OVER

    @property
    def names(self) -> list[str]:
        """The names of the job: with SLURM's number and, if it carries a token, with that."""
        names = [self.job.name]
        token = _TOKEN.search(self.about)
        if token:
            names.append(dataclasses.replace(self.job, number=token[0]).name)
        return names


class NotTaken(UsageError):
    """SLURM refused a job, and none of its tasks was queued."""


def new_token() -> str:
    """Returns a random text by which a submission is found in SLURM's queue.

    It becomes part of the comment or name of the jobs, and identifies them until their number is
    known.
    """
    return f"relloc-{uuid.uuid4().hex[:12]}"


def submit(
    script: Path, *, token: str, environment: Mapping[str, str], cluster: str | None, lock: Path
) -> tuple[Job, str]:
    """Submits a batch script, and returns the job and the messages of sbatch.

    The job is named by its token if sbatch's answer has no number that is clearly the job's. sbatch
    itself holds the file `lock`, until it ends, even if this process is killed before: see
    `wait_for_sbatch`.

    Raises:
        NotTaken: sbatch refused the script.
        Interrupted: whether it was taken is not known; the queue may show the token later.
    """
    try:
        with open(lock, "ab") as held:
            _lock(held.fileno())
            # sbatch inherits the open file, and with it the lock.
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
            f"sbatch has not answered for {_SUBMITTED_S} s: "
            "the same command again finds out whether it took the jobs"
        ) from None
    except OSError as error:
        raise NotTaken(f"sbatch can't be started: {error}") from error
    messages = done.stderr.strip()
    if done.returncode == 0:
        # From what is certain to what is likely; without any number, the token names the job.
        job = read_sbatch(done.stdout, cluster)
        job = job or _by_token(token, cluster)
        job = job or _last_number(done.stdout, cluster)
        return job or Job(number=token, cluster=cluster), messages
    # The controller may have taken the job although sbatch failed: then the queue has the token.
    if _UNSURE.search(messages):
        if job := _by_token(token, cluster):
            return job, messages
        raise Interrupted(
            f"SLURM did not say whether it took the jobs ({messages}): "
            "the same command again finds out"
        )
    answer = messages or done.stdout.strip()
    raise NotTaken(answer or f"sbatch ended with exit code {done.returncode}")


def wait_for_sbatch(lock: Path) -> None:
    """Returns once no sbatch runs that another command started.

    If that command was killed, the queue may not show its job before sbatch ends.
    """
    # Not for ever: a site's sbatch may leave a process behind that keeps the lock.
    end = time.monotonic() + ASKED_S
    with open(lock, "ab") as file:
        while not _lock(file.fileno()) and time.monotonic() < end:
            time.sleep(0.1)


def _lock(file: int) -> bool:
    """Tries to lock an open file, until the last process that has it open ends.

    Returns false if another process holds the lock. A file system without locks counts as locked.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
    return True


def read_sbatch(answer: str, cluster: str | None = None) -> Job | None:
    """Returns the job that sbatch's answer names, or None; answers of --parsable are read too.

    `cluster` is where the job was sent, if the answer doesn't name a cluster.
    """
    for pattern in (
        r"Submitted batch job (\d+)(?: on cluster (\S+))?",
        r"^\s*(\d+)(?:;(\S+))?\s*$",
        r"\bjob (\d+)(?: on cluster (\S+))?",
    ):
        matches = re.findall(pattern, answer, re.MULTILINE | re.IGNORECASE)
        if matches:
            number, named = matches[-1]
            return Job(number=number, cluster=named.rstrip(".") or _if_one(cluster))
    return None


def _last_number(answer: str, cluster: str | None) -> Job | None:
    """Reads an answer in another language: the last line with exactly one number names the job."""
    numbers_of_lines = [re.findall(r"\b\d+\b", line) for line in answer.splitlines()]
    candidates = [numbers[0] for numbers in numbers_of_lines if len(numbers) == 1]
    if not candidates:
        return None
    return Job(number=candidates[-1], cluster=_if_one(cluster))


def _if_one(cluster: str | None) -> str | None:
    """Returns the cluster, or None if several were named, of which SLURM chose one."""
    return None if cluster is None or "," in cluster else cluster


def _by_token(token: str, cluster: str | None) -> Job | None:
    """Returns the job in the queue whose comment or name has the token, or None."""
    try:
        jobs = [
            queued.job for queued in _queue(cluster) if token in queued.about and not queued.is_over
        ]
    except UsageError:
        return None
    if not jobs:
        return None
    return Job(number=jobs[0].number, cluster=jobs[0].cluster or _if_one(cluster))


def states(jobs: Sequence[str]) -> dict[str, Status]:
    """Returns the states of those of the jobs that are in SLURM's queue.

    Each is looked up on its own cluster. A job that a person cancelled is CANCELLED for some
    minutes, as long as SLURM remembers it; others that have ended are left out.

    Raises:
        UsageError: SLURM does not answer.
    """
    asked = {text: Job.parse(text) for text in jobs}
    found: dict[str, Status] = {}
    for cluster in sorted({job.cluster for job in asked.values()}, key=str):
        # If a name is listed twice, the job that has not ended counts: it comes last here.
        queue: dict[str, str] = {}
        for queued in sorted(_queue(cluster), key=lambda queued: not queued.is_over):
            queue |= dict.fromkeys(queued.names, queued.state)
        for text, job in asked.items():
            if job.cluster != cluster:
                continue
            # An array that was cancelled before a task began is shown without tasks; some sites
            # show every array so.
            state = queue.get(job.name) or queue.get(job.number)
            if state == _CANCELLED:
                found[text] = Status.CANCELLED
            elif state is not None and state not in _OVER:
                found[text] = Status.RUNNING if state in _RUNNING else Status.WAITING
    return found


def cancel(jobs: Sequence[str]) -> None:
    """Has SLURM end these jobs. Raises `UsageError` if it does not."""
    asked = [Job.parse(text) for text in jobs]
    # One call of scancel for each cluster
    for cluster in sorted({job.cluster for job in asked}, key=str):
        on_cluster = [job for job in asked if job.cluster == cluster]
        names = [job.name for job in on_cluster if not job.is_token]
        # scancel takes numbers only: look up those of jobs that are known by their token.
        tokens = {job.name for job in on_cluster if job.is_token}
        if tokens:
            for queued in _queue(cluster):
                if not queued.is_over and not tokens.isdisjoint(queued.names):
                    names.append(queued.job.name)
        if names:
            _ask(
                ["scancel", *_option_for(cluster), *names],
                "SLURM does not say that it ended all jobs",
            )


def largest_array(cluster: str | None) -> int | None:
    """Returns how many tasks an array may have (MaxArraySize), or None if that is not known."""
    try:
        answer, _ = _ask(
            ["scontrol", *_option_for(_if_one(cluster)), "show", "config"],
            "SLURM does not say its limits",
        )
    except UsageError:
        return None
    limit = re.search(r"^\s*MaxArraySize\s*=\s*(\d+)", answer, re.MULTILINE)
    # 0 is for clusters without arrays.
    return int(limit[1]) if limit and int(limit[1]) > 0 else None


def _queue(cluster: str | None) -> Iterator[_Queued]:
    """Yields each job of this user that SLURM knows, for some minutes also those that ended."""
    command = ["squeue", *_option_for(cluster), "--noheader", "--array", "--states=all"]
    command += [f"--user={os.getuid()}", "--format=%i|%T|%j|%k"]
    problem = "SLURM does not say how its jobs stand"
    answer, complaint = _ask(command, problem)
    jobs = list(_jobs_in(answer, cluster))
    # A site's squeue may end with exit code 0 although it could not ask the controller.
    trouble = _TROUBLE.search(f"{complaint}\n{answer}")
    if not jobs and trouble:
        raise UsageError(f"{problem}: {trouble[0].strip()}")
    yield from jobs


def _jobs_in(answer: str, cluster: str | None) -> Iterator[_Queued]:
    """Yields the jobs in squeue's answer about a cluster, or several."""
    cluster_of_line = cluster
    for line in answer.splitlines():
        # Of several clusters, each is announced by a line.
        if named := re.fullmatch(r"CLUSTER: (\S+)\s*", line):
            cluster_of_line = named[1]
        if (found := _LINE.fullmatch(line)) is not None:
            state = found["state"]
            about = found["rest"] or ""
        elif (found := _OTHER_LINE.fullmatch(line)) is not None:
            state = _state_among(found["rest"])
            about = found["rest"]
        else:
            continue
        for task in _tasks(found["tasks"]):
            job = Job(number=found["job"], task=task, cluster=cluster_of_line)
            yield _Queued(job=job, state=state, about=about)


def _state_among(text: str) -> str:
    """Returns the first word that is a state; a job without any is taken to be waiting."""
    words = [_LETTERS.get(word, word) for word in re.split(r"[\s|,;]+", text)]
    return next((word for word in words if word in (*_RUNNING, *_OVER)), "PENDING")


def _tasks(text: str | None) -> Iterator[int | None]:
    """Yields the tasks of an array that a line is about: one, or ranges such as [0-3,7%2]."""
    if text is None:
        yield None
        return
    # What follows % limits how many tasks run at once.
    for part in text.strip("[]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            yield from range(int(first), int(last if last.isdigit() else first) + 1)


def _option_for(cluster: str | None) -> list[str]:
    """Returns the option by which SLURM's commands are told the cluster."""
    return [f"--clusters={cluster}"] if cluster else []


def _ask(command: Sequence[str], problem: str) -> tuple[str, str]:
    """Runs a command of SLURM and returns what it writes on stdout and stderr.

    Raises `UsageError`, which begins with the text `problem`, if it fails.
    """
    # The user's defaults for these commands may hide jobs, or have scancel ask back.
    defaults = ("SQUEUE_", "SCANCEL_")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(defaults)
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
        reason = getattr(error, "stderr", "") or error
        raise UsageError(f"{problem}: {str(reason).strip()}") from error
    return done.stdout, done.stderr
