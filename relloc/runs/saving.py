"""Saves checkpoints of pretraining, and resumes from them.

A run is resumed only with the settings that decide its weights unchanged; together they are its
`identity`, a mapping from names of settings to values. It stands in each checkpoint and in
`training.json` in the run folder.
"""

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

TRAINING_FILE = "training.json"
# What resuming needs of a checkpoint, by type.
_STATE_FIELDS = {
    "model": dict,
    "optimizer": dict,
    "tallies": torch.Tensor,
    "identity": dict,
    "step": int,
}
# The part of an identity that says how random numbers are made. Runs of the first versions of
# relloc lack it.
RANDOM_NUMBERS = "version of random numbers"


def resume(identity: Mapping[str, Any], task: Task, run_dir: Path) -> StepsDone:
    """Loads the newest sound checkpoint of the run folder into `task`, if there is any.

    Returns:
        The number of steps done, and the sums of losses that the next report goes on from.

    Raises:
        UsageError: the folder holds a run of another `identity`; the message names what differs.
        CheckpointError: the checkpoint is damaged, or not one of pretraining.
    """
    # Rank 0 looks for the checkpoint, so that all ranks load the same one.
    begun: tuple[Path | None, dict[str, Any] | None] = (None, None)
    if ranks.rank() == 0:
        begun = _find_begun(run_dir)
    path, previous_identity = ranks.from_first(begun)
    if path is None:
        if previous_identity is not None:
            _refuse_other_identity(run_dir, previous_identity, identity)
        return task.start()

    # Check what the file holds before any of it is put into the model.
    state = states.load_training(path)
    missing = [
        name for name, kind in _STATE_FIELDS.items() if not isinstance(state.get(name), kind)
    ]
    if missing:
        raise DamagedCheckpoint(
            f"{damaged(path)}: it lacks {', '.join(missing)}, which training resumes from"
        )
    _refuse_other_identity(run_dir, state["identity"], identity)
    # Types and shapes were not compared above: torch raises many types of errors over them.
    try:
        task.model.load_state_dict(state["model"])
        task.optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(
            f"{damaged(path)}, since it does not fit the run: {error}"
        ) from error
    if ranks.rank() == 0:
        console.print_message(f"resume  {path} after step {state['step']} of {task.steps}")
    sums = _sums_of_rank(state["tallies"])
    return StepsDone(step=state["step"], sums=sums.to(task.device))


def note_identity(run_dir: Path, identity: Mapping[str, Any]) -> None:
    """Writes the identity of the training into the run folder.

    It is written before anything else of the training, so that curves without a checkpoint can be
    recognized as those of another run.

    Raises:
        OSError: the file can't be written.
    """
    if _noted_identity(run_dir) != identity:
        write_json(run_dir / TRAINING_FILE, identity)


def _noted_identity(run_dir: Path) -> dict[str, Any] | None:
    """Returns the identity in the run folder's file, or None if there is no such file."""
    path = run_dir / TRAINING_FILE
    advice = "Put back a copy, or remove it if the command is the one that began the run"
    try:
        return read_json(path, dict[str, Any], "the identity of a training", advice)
    except FileNotFoundError:
        return None


def _find_begun(run_dir: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """Returns the newest sound checkpoint of a folder, or else the identity of the run begun there.

    Without a checkpoint the folder may still hold curves or weights of a run, which another one
    must not continue: a run may be killed before its first checkpoint, and people delete
    checkpoints of finished runs. If its identity is not known, it is empty, which equals no other.
    """
    path = states.newest_sound(run_dir, console.print_message)
    if path:
        return path, None
    has_curves = (run_dir / JOURNAL_FILE).exists()
    has_weights = (run_dir / BACKBONE_FILE).exists()
    if has_curves or has_weights:
        return None, _noted_identity(run_dir) or {}
    return None, None


def _refuse_other_identity(
    run_dir: Path, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raises `UsageError` if the training in the folder has another identity, with what differs."""
    if RANDOM_NUMBERS in now and RANDOM_NUMBERS not in before:
        raise UsageError(
            f"{run_dir} holds a run that an older relloc began: random numbers and the identity "
            "of images are now made in other ways. Finish it with that version, or give another "
            "hydra.run.dir"
        )
    changed = difference(before, now)
    if changed:
        raise UsageError(
            f"{run_dir} holds a run with other settings: {changed}. Give another hydra.run.dir, "
            "or the run's own settings"
        )


def _with_present_names(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an identity, maybe of an earlier version of relloc, as this version would note it."""
    present = {}
    for old_name, value in identity.items():
        name = new_name(old_name) or old_name
        # Rate and spans stood there twice, as data.lr and as optimizer.lr. The latter, whose names
        # are as they were, are what the run was trained with.
        if name == old_name or name.startswith("recipe."):
            present[name] = value
    # Settings that are neutral now may have counted then.
    return neutral.settings_of_weights(present)


def _sums_of_rank(tallies: torch.Tensor) -> torch.Tensor:
    """Returns this rank's sums (3) from those of all ranks (world 3) at the time of saving.

    If the number of ranks has changed, rank 0 takes the total: only the total is ever reported.
    """
    if len(tallies) == ranks.world_size():
        return tallies[ranks.rank()]
    if ranks.rank() == 0:
        return tallies.sum(0)
    return torch.zeros(3, dtype=tallies.dtype)


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns, for a message, which settings differ between two identities, or "" if none does.

    `before` may have been noted by an earlier version of relloc.
    """
    before = _with_present_names(before)
    differences = []
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            differences.append(f"{name} was {before.get(name)}, now {now.get(name)}")
    return ", ".join(differences)


def milestone_steps(epochs: Sequence[float], task: Task) -> dict[int, str]:
    """Returns the step after which each milestone epoch is complete, with the milestone's name.

    With 100 steps an epoch, milestones 1 and 2.5 give `{100: "epoch_1", 250: "epoch_2.5"}`.

    Raises:
        UsageError: an epoch is outside the run, or two fall on one step.
    """
    for epoch in epochs:
        if not 0 < epoch <= task.schedule.epochs:
            raise UsageError(
                f"milestones={list(epochs)}: the run has no epoch {epoch}, it has "
                f"{task.schedule.epochs}"
            )
    # Two epochs that round to one step would leave one key, and so fewer names than epochs.
    names = {round(epoch * task.steps_per_epoch): f"epoch_{epoch:g}" for epoch in epochs}
    if len(names) < len(epochs) or 0 in names:
        raise UsageError(
            f"milestones={list(epochs)}: an epoch has {task.steps_per_epoch} steps, and each "
            "milestone needs a step of its own"
        )
    return names


@dataclasses.dataclass(kw_only=True)
class Saver:
    """Saves checkpoints every `every_s` seconds, at milestones, at the end, and after a signal.

    Nothing is saved that is not finite.

    Args:
        about: what the checkpoint says of its model and data, beside the step.
        saved_at_s: time of the last save, by the monotonic clock.
        saved_step: number of steps done at the last save.
        spent_s: seconds that all saves so far took.
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
    spent_s: float = 0.0

    def after_step(self, done: StepsDone) -> bool:
        """Saves if it is time. Returns whether to stop, which is the same on all ranks."""
        # From here on there is work that would be lost: a signal waits for the next step's end.
        self.stop.listen(awaited=True)
        # Saving takes all ranks, so they have to decide alike. Clocks differ a little: rank 0's
        # counts. A signal may reach one rank only: then all of them stop.
        elapsed_s = time.monotonic() - self.saved_at_s
        due = ranks.rank() == 0 and elapsed_s > self.every_s
        signal, due = ranks.largest(self.stop.signal or 0, due)
        self.stop.signal = self.stop.signal or signal or None
        is_milestone = done.step in self.milestones
        is_last = done.step == self.task.steps
        if signal or due or is_milestone or is_last:
            self.save(done)
        return bool(signal)

    def save(self, done: StepsDone) -> None:
        """Saves a checkpoint after `done.step` whole steps. All ranks call it together.

        Raises:
            Diverged: a loss, a weight or a statistic is not finite.
        """
        # A milestone may also be the last step, or a signal arrive right after a save.
        if done.step == self.saved_step:
            return
        # A checkpoint that is not finite would spoil the run for good: check before writing.
        tallies = ranks.gathered(done.sums).cpu()
        # Only now, since the copy waits for steps that are still queued on a GPU.
        started_s = time.monotonic()
        if not tallies.isfinite().all():
            raise Diverged(f"the loss is no longer finite after step {done.step}")
        check_finite(self.task.model, done.step)
        if ranks.rank() == 0:
            # Weights are the same on all ranks.
            state = {
                "model": self.task.model.state_dict(),
                "optimizer": self.task.optimizer.state_dict(),
                "tallies": tallies,
                "identity": self.identity,
                "about": {**self.about, "step": done.step},
            }
            states.save_training(self.run_dir, state, done.step, self.milestones.get(done.step))
        self.saved_step, self.saved_at_s = done.step, time.monotonic()
        self.spent_s += self.saved_at_s - started_s
