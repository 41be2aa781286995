"""How a pretraining is kept from losing work: when it saves, and how it goes on."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from relloc import neutral, ranks
from relloc.checkpoints import states
from relloc.checkpoints.backbone_files import BACKBONE_FILE
from relloc.checkpoints.hashed_files import damaged
from relloc.errors import DamagedCheckpoint, UsageError
from relloc.files import read_json, write_json
from relloc.optimization import StepsDone
from relloc.pretext.alarm import Diverged, check_finite
from relloc.pretext.loop import Task
from relloc.pretext.stopping import StopRequest
from relloc.runs import console
from relloc.runs.renamed import new_name
from relloc.tracking.journal import JOURNAL_FILE

TRAINING_FILE = (
    "training.json"  # the identity of the folder's training, which its checkpoints hold as well
)
# What `Saver` saves, and a training goes on from
_OF_A_TRAINING = {
    "model": dict,
    "optimizer": dict,
    "tallies": torch.Tensor,
    "identity": dict,
    "step": int,
}
RANDOM_NUMBERS = "version of random numbers"  # a part of a run's identity


def resume(identity: Mapping[str, Any], task: Task, run_dir: Path) -> StepsDone:
    """Put the newest sound checkpoint of the run folder into `task`; where that training stands.

    Raises:
        UsageError: the folder holds a run of another `identity`, with what differs.
        CheckpointError: its checkpoint is damaged or of something else.
    """
    path, before = ranks.from_first(_begun(run_dir) if ranks.rank() == 0 else (None, None))
    if path is None:
        if before is not None:
            _refuse_another(run_dir, before, identity)
        return task.start()
    state = states.load_training(path)
    lacking = [
        name for name, kind in _OF_A_TRAINING.items() if not isinstance(state.get(name), kind)
    ]
    if lacking:
        raise DamagedCheckpoint(f"{damaged(path)}: {', '.join(lacking)} of a training are missing")
    _refuse_another(run_dir, state["identity"], identity)
    try:
        task.model.load_state_dict(state["model"])
        task.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{damaged(path)}, since it does not fit the run: {error}"
        ) from error
    if ranks.rank() == 0:
        console.say(f"resume  {path} after step {state['step']} of {task.steps}")
    return StepsDone(step=state["step"], sums=_own_tally(state["tallies"]).to(task.device))


def note_identity(run_dir: Path, identity: Mapping[str, Any]) -> None:
    """Note what the training is before it leaves anything that is to be told from another's. Raises `OSError`."""
    if _noted_identity(run_dir) != identity:
        write_json(run_dir / TRAINING_FILE, identity)


def _noted_identity(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / TRAINING_FILE
    advice = "Put back a copy, or remove it if the command is the one that began the run"
    try:
        return read_json(path, dict[str, Any], "the identity of a training", advice)
    except FileNotFoundError:
        return None


def _begun(run_dir: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The newest sound checkpoint of a folder. Where none is, but curves or weights are: of which training they are.

    A run may be killed before its first checkpoint, and people delete checkpoints of finished ones.
    """
    path = states.newest_sound(run_dir, console.say)
    if path or not any((run_dir / name).exists() for name in (JOURNAL_FILE, BACKBONE_FILE)):
        return path, None
    return None, _noted_identity(run_dir) or {}


def _refuse_another(run_dir: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `UsageError` with what tells the training of the folder from this one, if anything does."""
    if RANDOM_NUMBERS in now and RANDOM_NUMBERS not in before:
        raise UsageError(
            f"{run_dir} holds a run that an older relloc began: random numbers and the identity of images are now "
            "made in other ways. Finish it with that version, or give another hydra.run.dir"
        )
    if changed := difference(before, now):
        raise UsageError(
            f"{run_dir} holds a run with other settings: {changed}. Give another hydra.run.dir, or the run's own"
        )


def _as_of_now(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity that an earlier version may have noted, with the names and without the neutral settings of now.

    Rate and spans stood in it twice, as data.lr and as optimizer.lr: the latter are what was trained with.
    """
    renamed = {name: new_name(name) or name for name in identity}
    kept = {
        new: identity[old]
        for old, new in renamed.items()
        if new == old or new.startswith("recipe.")
    }
    return neutral.settings_of_weights(kept)


def _own_tally(tallies: torch.Tensor) -> torch.Tensor:
    """This rank's sums (3) of those of all (world 3); with another number of ranks the first takes them all."""
    if len(tallies) == ranks.world_size():
        return tallies[ranks.rank()]
    return tallies.sum(0) if ranks.rank() == 0 else torch.zeros(3, dtype=tallies.dtype)


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which settings of two identities differ, for a message; the first may be of an earlier version of relloc."""
    before = _as_of_now(before)
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)}, now {now.get(name)}" for name in names)


def milestone_steps(epochs: Sequence[float], task: Task) -> dict[int, str]:
    """After which step each milestone epoch is complete, with the milestone's name.

    Raises:
        UsageError: an epoch outside the run, or two in one step.
    """
    for epoch in epochs:
        if not 0 < epoch <= task.schedule.epochs:
            raise UsageError(
                f"milestones={list(epochs)}: the run has no epoch {epoch}, it has {task.schedule.epochs}"
            )
    steps = {round(epoch * task.steps_per_epoch): f"epoch_{epoch:g}" for epoch in epochs}
    if len(steps) < len(epochs) or 0 in steps:
        raise UsageError(
            f"milestones={list(epochs)}: an epoch has {task.steps_per_epoch} steps, and each needs its own"
        )
    return steps


@dataclasses.dataclass(kw_only=True)
class Saver:
    """Saves every `every_s` seconds, at milestones, at the end, and when asked to stop.

    Nothing is saved that is not finite. `about` is what a saved step tells of itself. `saved_at_s` is the clock at the
    last save, `saved_step` the steps that were done then.
    """

    task: Task
    identity: Mapping[str, Any]
    about: Mapping[str, Any]
    run_dir: Path
    stop: StopRequest
    every_s: float
    milestones: Mapping[int, str]
    saved_at_s: float = dataclasses.field(default_factory=lambda: time.monotonic())
    saved_step: int | None = None

    def after_step(self, done: StepsDone) -> bool:
        """Save if it is time; whether to stop. All ranks answer alike."""
        self.stop.listen(awaited=True)  # from here on there is work that a stop has to save
        # Rank 0's clock decides for all; a stop, whoever is asked.
        due = ranks.rank() == 0 and time.monotonic() - self.saved_at_s > self.every_s
        signal, due = ranks.largest(self.stop.signal or 0, due)
        self.stop.signal = self.stop.signal or signal or None
        if signal or due or done.step in self.milestones or done.step == self.task.steps:
            self.save(done)
        return bool(signal)

    def save(self, done: StepsDone) -> None:
        """Save a training that has done its `done.step` steps and nothing of the next. All ranks together.

        Raises:
            Diverged: it holds what is not finite.
        """
        if done.step == self.saved_step:
            return
        tallies = ranks.gathered(done.sums).cpu()
        if not tallies.isfinite().all():
            raise Diverged(f"the loss is no longer finite after step {done.step}")
        check_finite(self.task.model, done.step)
        if ranks.rank() == 0:
            state = {
                "model": self.task.model.state_dict(),
                "optimizer": self.task.optimizer.state_dict(),
                "tallies": tallies,
                "identity": self.identity,
                "about": {**self.about, "step": done.step},
            }
            states.save_training(self.run_dir, state, done.step, self.milestones.get(done.step))
        self.saved_step, self.saved_at_s = done.step, time.monotonic()
