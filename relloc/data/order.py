"""In which order images are seen: a function of seed and step, so that any step can be resumed."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from relloc.errors import DataError
from relloc.seeds import Use, seed_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """How the images of an optimizer step are spread over processes and forwards.

    A step takes `images_per_step` images, in ghost batches of `images_per_batch_norm` whose
    batch-norm statistics and random numbers belong together. Each of `world` processes takes an equal run
    of them, `images_per_forward` images at a time, or all at once where that is None. Neither of
    these two numbers changes what a step computes. An epoch drops its incomplete last step.

    Raises:
        DataError: numbers that do not divide, or a data set smaller than a step.
    """

    n_images: int
    images_per_step: int
    images_per_batch_norm: int
    images_per_forward: int | None = None
    world: int = 1

    def __post_init__(self) -> None:
        if (
            min(self.images_per_step, self.images_per_batch_norm, self.forward_images, self.world)
            < 1
        ):
            raise DataError(
                f"recipe.images_per_step is {self.images_per_step}, recipe.images_per_batch_norm "
                f"{self.images_per_batch_norm}, on {self.world} processes: each must be 1 or more"
            )
        for name, images, part in (
            ("images_per_forward", self.forward_images, self.images_per_batch_norm),
            ("recipe.images_per_step", self.images_per_step, self.forward_images * self.world),
        ):
            if images % part:
                raise DataError(
                    f"{name} is {images}, not a multiple of {part}: with {self.world} processes, ghost batches of "
                    f"recipe.images_per_batch_norm={self.images_per_batch_norm} images must fill each forward, and "
                    "forwards each process's share of recipe.images_per_step"
                )
        if self.n_images < self.images_per_step:
            raise DataError(
                f"{self.n_images} training images are fewer than one step takes, which are {self.images_per_step}: "
                f"{self._fitting()}"
            )

    def _fitting(self) -> str:
        """What to write for a data set that is smaller than a step."""
        share = self.n_images // self.world  # of a process
        if share == 0:
            return f"start {self.n_images} processes or fewer"
        ghost = min(self.images_per_batch_norm, share)
        words = f"recipe.images_per_step={share // ghost * ghost * self.world}"
        if ghost < self.images_per_batch_norm:
            words += f" recipe.images_per_batch_norm={ghost}"
        # One that was given, or that was chosen for the larger step
        if (
            self.forward_images != self.images_per_batch_norm
            and share // ghost * ghost % self.forward_images
        ):
            words += " images_per_forward=auto"
        return f"add {words}"

    @property
    def forward_images(self) -> int:
        """Images of one forward of one process."""
        return self.images_per_forward or max(self.images_per_step // self.world, 1)

    @property
    def steps_per_epoch(self) -> int:
        return self.n_images // self.images_per_step

    @property
    def accumulation(self) -> int:
        """Forwards of each process in a step."""
        return self.images_per_step // (self.forward_images * self.world)

    @property
    def ghosts_per_forward(self) -> int:
        return self.forward_images // self.images_per_batch_norm


@dataclasses.dataclass
class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, epoch) for one process, one ghost batch each, from `first_step` to `steps`."""

    plan: StepPlan
    _: dataclasses.KW_ONLY
    seed: int
    first_step: int
    steps: int
    rank: int = 0

    def __len__(self) -> int:
        return (
            (self.steps - self.first_step) * self.plan.accumulation * self.plan.ghosts_per_forward
        )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_epoch = np.empty(0, np.int64), -1
        for step in range(self.first_step, self.steps):
            epoch, place = divmod(step, self.plan.steps_per_epoch)
            if epoch != order_epoch:
                rng = np.random.default_rng(seed_for(Use.IMAGE_ORDER, self.seed, epoch))
                order, order_epoch = rng.permutation(self.plan.n_images), epoch
            start = place * self.plan.images_per_step
            images = order[start : start + self.plan.images_per_step].reshape(
                self.plan.world, -1, self.plan.images_per_batch_norm
            )
            for ghost in images[self.rank]:
                yield [(index, epoch) for index in ghost.tolist()]
