"""The order in which training sees images, and how a step's images are divided into batches.

The order is a function of the seed and the step, so that training can resume at any step.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from relloc.errors import DataError
from relloc.seeds import Use, seed_for
from relloc.terminal import quantity


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The division of an optimizer step's images into processes, forward passes and ghost batches.

    A ghost batch is the `images_per_batch_norm` images that share batch-norm statistics (and a
    stream of random numbers). A step is `images_per_step` images, a whole number of ghost batches.
    Each of `world` processes takes an equal, contiguous part of them, `images_per_forward` images
    in each forward pass, or all at once if that is None. Neither `world` nor `images_per_forward`
    changes what a step computes. An epoch drops its incomplete last step.

    Raises:
        DataError: the numbers do not divide each other, or the data set is smaller than a step.

    Example:
        >>> plan = StepPlan(n_images=1000, images_per_step=64, images_per_batch_norm=16, world=2)
        >>> plan.steps_per_epoch, plan.forward_images, plan.ghosts_per_forward
        (15, 32, 2)
    """

    n_images: int
    images_per_step: int
    images_per_batch_norm: int
    images_per_forward: int | None = None
    world: int = 1

    def __post_init__(self) -> None:
        counts = (
            self.images_per_step,
            self.images_per_batch_norm,
            self.forward_images,
            self.world,
        )
        if min(counts) < 1:
            raise DataError(
                f"recipe.images_per_step is {self.images_per_step}, recipe.images_per_batch_norm "
                f"{self.images_per_batch_norm}, on {self.world} processes: each must be 1 or more"
            )
        # Whole ghost batches fill a forward pass, whole forward passes a process's part of a step.
        divisions = (
            ("images_per_forward", self.forward_images, self.images_per_batch_norm),
            ("recipe.images_per_step", self.images_per_step, self.forward_images * self.world),
        )
        for name, images, divisor in divisions:
            if images % divisor:
                raise DataError(
                    f"{name} is {images}, not a multiple of {divisor}: with {self.world} "
                    f"processes, ghost batches of recipe.images_per_batch_norm="
                    f"{self.images_per_batch_norm} images must fill each forward, and forwards "
                    "each process's share of recipe.images_per_step"
                )
        if self.n_images < self.images_per_step:
            raise DataError(
                f"{self.n_images} training images are fewer than the {self.images_per_step} that "
                f"one step takes: {self._advice_for_few_images()}"
            )

    def _advice_for_few_images(self) -> str:
        """Returns the settings to give for a data set that is smaller than a step."""
        share_of_process = self.n_images // self.world
        if share_of_process == 0:
            return f"start {quantity(self.n_images, 'process', 'processes')} or fewer"
        # The largest step of whole ghost batches; these shrink only if not even one fits.
        ghost_images = min(self.images_per_batch_norm, share_of_process)
        process_images = share_of_process // ghost_images * ghost_images
        settings = f"recipe.images_per_step={process_images * self.world}"
        if ghost_images < self.images_per_batch_norm:
            settings += f" recipe.images_per_batch_norm={ghost_images}"
        # Images per forward that were given, or chosen for the larger step, need not divide this.
        is_not_one_ghost = self.forward_images != self.images_per_batch_norm
        if is_not_one_ghost and process_images % self.forward_images:
            settings += " images_per_forward=auto"
        return f"add {settings}"

    @property
    def forward_images(self) -> int:
        """Number of images in one forward pass of one process."""
        if self.images_per_forward:
            return self.images_per_forward
        return max(self.images_per_step // self.world, 1)

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole steps in one pass over the images."""
        return self.n_images // self.images_per_step

    @property
    def accumulation(self) -> int:
        """Number of forward passes of each process whose gradients add up in a step."""
        return self.images_per_step // (self.forward_images * self.world)

    @property
    def ghosts_per_forward(self) -> int:
        """Number of ghost batches in one forward pass."""
        return self.forward_images // self.images_per_batch_norm


@dataclasses.dataclass
class StepSampler(Sampler[list[tuple[int, int]]]):
    """An iterator over ghost batches of keys (index, epoch) for one process.

    It covers the optimizer steps from `first_step` to `steps` (not included). The images of an
    epoch are a random permutation by `seed` and epoch; each of the processes, numbered by `rank`,
    gets its part of every step.
    """

    plan: StepPlan
    _: dataclasses.KW_ONLY
    seed: int
    first_step: int
    steps: int
    rank: int = 0

    def __len__(self) -> int:
        n_steps = self.steps - self.first_step
        return n_steps * self.plan.accumulation * self.plan.ghosts_per_forward

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan = self.plan
        order = np.empty(0, np.int64)
        order_epoch = -1
        for step in range(self.first_step, self.steps):
            epoch, step_in_epoch = divmod(step, plan.steps_per_epoch)
            # A permutation that depends on seed and epoch alone: a resumed run draws the same.
            if epoch != order_epoch:
                rng = np.random.default_rng(seed_for(Use.IMAGE_ORDER, self.seed, epoch))
                order = rng.permutation(plan.n_images)
                order_epoch = epoch
            # The step's images as (process, ghost batch, image): which images share a ghost batch
            # does not depend on the number of processes.
            start = step_in_epoch * plan.images_per_step
            step_images = order[start : start + plan.images_per_step]
            ghosts = step_images.reshape(plan.world, -1, plan.images_per_batch_norm)
            for ghost in ghosts[self.rank]:
                yield [(index, epoch) for index in ghost.tolist()]


def joined(batches: Iterable[list[Any]], at_once: int) -> Iterator[list[Any]]:
    """Yields every `at_once` batches of keys as one, in their order."""
    batches = iter(batches)
    while group := list(itertools.islice(batches, at_once)):
        yield list(itertools.chain.from_iterable(group))
