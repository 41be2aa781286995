"""Reports a training while it runs: curves, progress bar, alarms and periodic monitors."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping

import torch

from relloc.data.order import StepPlan
from relloc.errors import DataError
from relloc.pretext.alarm import Alarm
from relloc.pretext.feed import Feed
from relloc.pretext.loop import Progress, Task
from relloc.runs import console
from relloc.runs.folder import RunFolder
from relloc.runs.monitors import confusion_picture
from relloc.tracking import Journal


@contextlib.contextmanager
def reporting(
    task: Task,
    plan: StepPlan,
    feed: Feed,
    *,
    first_step: int,
    collapse_steps: int,
    folder: RunFolder | None,
    paused_s: Callable[[], float],
) -> Iterator[Callable[[Progress], None]]:
    """Gives the function to which the training loop passes each report.

    It writes the curves into the journal (`journal.jsonl` in the run folder), shows progress, and
    checks the loss: it raises `Diverged` if that is not finite, and warns if it stays at chance.
    Only rank 0 has a folder; other ranks give None and only check.

    Args:
        collapse_steps: steps at chance after which to warn that the network has collapsed.
        paused_s: gives the seconds so far in which training stood still for monitors and
            checkpoints. They count in the curves of speed, and not in the speed that is shown.
    """
    alarm = Alarm(
        chance_loss=task.model.questions.chance_loss,
        collapse_steps=collapse_steps,
        first_step=first_step,
        warn=console.print_message if folder else lambda _text: None,
    )
    if folder is None:
        yield alarm.check
        return
    journal = Journal(folder.path)
    shown_speed = _ShownSpeed(plan, feed, paused_s, first_step)
    # Speed and waiting are averages since the last report, of which these are kept.
    last_s = time.monotonic()
    last_waited_s = feed.waited_s
    last_step = first_step
    with console.progress_bar("pretrain", task.steps, first_step) as bar:

        def report(progress: Progress) -> None:
            nonlocal last_s, last_waited_s, last_step
            now_s = time.monotonic()
            elapsed_s = now_s - last_s
            total_waited_s = feed.waited_s
            waited_s = total_waited_s - last_waited_s
            steps = progress.step - last_step
            last_s = now_s
            last_waited_s = total_waited_s
            last_step = progress.step
            images_per_s = steps * plan.images_per_step / elapsed_s
            waiting_percent = 100 * waited_s / elapsed_s
            journal.log(
                {
                    "train/loss": progress.loss,
                    "train/top1": progress.top1,
                    "train/lr": progress.lr,
                    "train/epoch": progress.epoch,
                    "speed/images_per_s": images_per_s,
                    "speed/waiting_percent": waiting_percent,
                },
                progress.step,
            )
            # The curves are written first: they show what the alarm was raised for.
            alarm.check(progress)
            shown_speed.report(progress.step)

            def text() -> str:
                losses = f"loss {progress.loss:.3f}  top-1 {progress.top1:.1f} %"
                return f"{losses}  {shown_speed.show()}"

            bar(progress.step, text)

        yield report


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Moment:
    """The steps done at a report, and the seconds until then of training and of waiting for data.

    Training includes waiting for data, and no pauses for monitors and checkpoints.
    """

    step: int
    trained_s: float
    waited_s: float


class _ShownSpeed:
    """The speed of training since it was last shown, which is not at every report."""

    def __init__(
        self, plan: StepPlan, feed: Feed, paused_s: Callable[[], float], first_step: int
    ) -> None:
        self._plan = plan
        self._feed = feed
        self._paused_s = paused_s
        self._n_reports = 0
        self._shown_until = self._reported = self._moment(first_step)

    def _moment(self, step: int) -> _Moment:
        trained_s = time.monotonic() - self._paused_s()
        return _Moment(step=step, trained_s=trained_s, waited_s=self._feed.waited_s)

    def report(self, step: int) -> None:
        """Notes that `step` steps are done."""
        # Before the first report the network is compiled, workers start and graphs are recorded.
        if self._n_reports == 1:
            self._shown_until = self._reported
        self._reported = self._moment(step)
        self._n_reports += 1

    def show(self) -> str:
        """Returns the speed and the share of waiting since the last call, in words."""
        steps = self._reported.step - self._shown_until.step
        trained_s = self._reported.trained_s - self._shown_until.trained_s
        waited_s = self._reported.waited_s - self._shown_until.waited_s
        self._shown_until = self._reported
        images_per_s = steps * self._plan.images_per_step / trained_s
        start_up = " with start-up" if self._n_reports == 1 else ""
        waiting_percent = 100 * waited_s / trained_s
        return f"{images_per_s:.0f} images/s{start_up}  waiting for data {waiting_percent:.0f} %"


@dataclasses.dataclass
class Monitoring:
    """Runs `monitors` every `every_steps` steps, within a share `most_share` of the run's time.

    A turn is left out if it would exceed that share, taking as long as the last one; the first is
    never left out, and none is with a share of 1. Training is not affected: if monitors fail, it
    goes on without them.

    Args:
        monitors: returns numbers by name, given the number of steps done.
        most_share: share of the run's time, from 0 to 1.
        cost_s: seconds that the last turn took.
        asked_at_s: end of the last turn, by the monotonic clock.
        spent_s: seconds that all turns so far took.
    """

    monitors: Callable[[int], Mapping[str, float]]
    _: dataclasses.KW_ONLY
    every_steps: int
    most_share: float
    folder: RunFolder
    device: torch.device
    cost_s: float = 0.0
    asked_at_s: float = dataclasses.field(default_factory=lambda: time.monotonic())
    spent_s: float = 0.0

    @functools.cached_property
    def _journal(self) -> Journal:
        return Journal(self.folder.path)

    def after_step(self, done: int) -> None:
        """Runs the monitors if it is time, and writes their numbers into the journal."""
        if done % self.every_steps:
            return
        since_last_s = time.monotonic() - self.asked_at_s
        if self.cost_s > self.most_share * (since_last_s + self.cost_s):
            return
        if self.device.type == "cuda":
            # Steps of training may still be queued, which are no cost of monitors.
            torch.cuda.synchronize(self.device)
        started = time.monotonic()
        # With deterministic=true torch refuses operations that have no deterministic kernel. What
        # monitors compute changes no weight, so they may use these.
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        try:
            self._journal.log(self.monitors(done), done)
        except (DataError, OSError) as error:
            console.print_message(f"monitors stop: {error}. Training goes on")
            # No cost is below a negative share, so that monitors never run again.
            self.most_share = -1.0
            return
        finally:
            torch.use_deterministic_algorithms(deterministic)
            self.spent_s += time.monotonic() - started
        # A network whose answers are no positions has no picture.
        picture = confusion_picture(done)
        if (self.folder.path / picture).exists():
            self.folder.mirror_file(picture)
        self.asked_at_s = time.monotonic()
        self.cost_s = self.asked_at_s - started
