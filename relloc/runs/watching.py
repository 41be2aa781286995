"""What is seen of a training while it runs: journal, progress, alarms, and monitors at their period."""

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
) -> Iterator[Callable[[Progress], None]]:
    """Gives what takes each report of `train`; only rank 0, which has a folder, tells of it."""
    alarm = Alarm(
        collapse_steps=collapse_steps,
        first_step=first_step,
        warn=console.say if folder else lambda _text: None,
    )
    if folder is None:
        yield alarm.check
        return
    journal = Journal(folder.path)
    last = (time.monotonic(), feed.waited_s, first_step)
    with console.progress_bar("pretrain", task.steps, first_step) as bar:

        def report(progress: Progress) -> None:
            nonlocal last
            now = (time.monotonic(), feed.waited_s, progress.step)
            elapsed, waited, steps = (new - old for new, old in zip(now, last, strict=True))
            last = now
            rate, waiting = steps * plan.images_per_step / elapsed, 100 * waited / elapsed
            journal.log(
                {
                    "train/loss": progress.loss,
                    "train/top1": progress.top1,
                    "train/lr": progress.lr,
                    "train/epoch": progress.epoch,
                    "speed/images_per_s": rate,
                    "speed/waiting_percent": waiting,
                },
                progress.step,
            )
            alarm.check(progress)
            bar(
                progress.step,
                f"loss {progress.loss:.3f}  top-1 {progress.top1:.1f} %  {rate:.0f} images/s  "
                f"waiting for data {waiting:.0f} %",
            )

        yield report


@dataclasses.dataclass
class Monitoring:
    """Asks `monitors` every `every_steps` steps, as long as that takes `most_share` of the time or less.

    A turn that would cost more, going by the last one, is left out; the first always comes. Nothing of
    it is seen by training, which goes on without monitors where these fail.
    """

    monitors: Callable[[int], Mapping[str, float]]
    _: dataclasses.KW_ONLY
    every_steps: int
    most_share: float
    folder: RunFolder
    device: torch.device
    cost_s: float = 0.0
    asked_at_s: float = dataclasses.field(default_factory=lambda: time.monotonic())

    @functools.cached_property
    def _journal(self) -> Journal:
        return Journal(self.folder.path)

    def after_step(self, done: int) -> None:
        """Ask, if it is time."""
        if done % self.every_steps or self.cost_s > self.most_share * (
            time.monotonic() - self.asked_at_s
        ):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # steps still queued are no cost of this
        started = time.monotonic()
        # What monitors compute may have no deterministic kernel, and changes no weight.
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        try:
            self._journal.log(self.monitors(done), done)
        except (DataError, OSError) as error:
            console.say(f"monitors stop: {error}. Training goes on")
            self.most_share = -1.0
            return
        finally:
            torch.use_deterministic_algorithms(deterministic)
        self.folder.keep(confusion_picture(done))
        self.asked_at_s = time.monotonic()
        self.cost_s = self.asked_at_s - started
