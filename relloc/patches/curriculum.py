"""A curriculum: gap, jitter and color treatment change in the course of a training.

All is a function of the step, so that a training that is resumed equals one that was not stopped.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from relloc import checks
from relloc.errors import UsageError
from relloc.geometry import Pair, PatchGrid, check_jitter
from relloc.patches.color import Drawn, Keep, Patches
from relloc.patches.pipeline import Color, PatchPipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Leads from the questions of the beginning, given here, to those of the grid and the color.

    Values change linearly over a part of the training, pixels rounded to whole ones. Before it they
    are those given here, after it those of the grid and the color, with which networks are also
    evaluated.

    Args:
        begin: share of the training's steps after which values begin to change.
        end: share of the steps after which they are those of the grid and the color.
        gap_px: gap at the beginning; None for that of the grid throughout.
        jitter_px: jitter at the beginning, given as that of the grid; None as with the gap.
        treated: share of the images whose colors are treated at the beginning; None treats all
            images throughout.
        otherwise: what is done to the colors of the other images.

    Raises:
        UsageError: a value is not valid, or nothing changes.
    """

    begin: float
    end: float
    gap_px: int | None
    jitter_px: int | Pair | list[int] | None
    treated: float | None
    otherwise: Color

    def __post_init__(self) -> None:
        checks.number("curriculum.begin", self.begin, at_least=0, at_most=1)
        checks.number("curriculum.end", self.end, at_least=0, at_most=1)
        if self.begin >= self.end:
            raise UsageError(
                f"curriculum.begin is {self.begin} and curriculum.end {self.end}: "
                "give an end after the begin"
            )
        if self.gap_px is not None:
            checks.whole("curriculum.gap_px", self.gap_px, at_least=0)
        if self.jitter_px is not None:
            check_jitter("curriculum.jitter_px", self.jitter_px)
        if self.treated is not None:
            checks.number("curriculum.treated", self.treated, at_least=0, at_most=1)
        if self.gap_px is None and self.jitter_px is None and self.treated is None:
            raise UsageError(
                "curriculum.gap_px, curriculum.jitter_px and curriculum.treated are all null, so "
                "that nothing changes: give one of them, or leave the curriculum out"
            )

    def first_grid(self, grid: PatchGrid) -> PatchGrid:
        """Returns the grid of the beginning, given that of the end."""
        gap_px = grid.gap_px if self.gap_px is None else self.gap_px
        jitter_px = grid.jitter_px if self.jitter_px is None else self.jitter_px
        return dataclasses.replace(grid, gap_px=gap_px, jitter_px=jitter_px)

    def grid_at(self, grid: PatchGrid, share: float) -> PatchGrid:
        """Returns the grid after a share of the training's steps, given that of the end."""
        first = self.first_grid(grid)
        low = self._whole(first.jitter_range[0], grid.jitter_range[0], share)
        high = self._whole(first.jitter_range[1], grid.jitter_range[1], share)
        return dataclasses.replace(
            grid,
            gap_px=self._whole(first.gap_px, grid.gap_px, share),
            jitter_px=(low, high),
        )

    def treated_at(self, share: float) -> float:
        """Returns the share of images whose colors are treated, after a share of the steps."""
        treated = 1.0 if self.treated is None else self.treated
        return self._value(treated, 1.0, share)

    def _whole(self, first: int, last: int, share: float) -> int:
        value = self._value(first, last, share)
        return math.floor(value + 0.5)

    def _value(self, first: float, last: float, share: float) -> float:
        progress = (share - self.begin) / (self.end - self.begin)
        progress = min(max(progress, 0.0), 1.0)
        return first + progress * (last - first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed:
    """Treats the colors of a random share of the images in one way, and of the others in another.

    Args:
        treatment: the one way.
        other: the other.
        share: how probable it is that an image gets the `treatment`.
    """

    treatment: Color
    other: Color
    share: float
    _n_drawn: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # How many tensors the treatment draws: counted here, since compiled code can draw none.
        drawn = self.treatment.draw(1, 1, 1, torch.Generator())
        object.__setattr__(self, "_n_drawn", len(drawn))

    def draw(self, b: int, n: int, p: int, generator: torch.Generator) -> Drawn:
        """Returns which images get the `treatment` (b), and what both treatments draw.

        Both draw for all images, so that the shapes are the same whatever the share is.
        """
        u = torch.rand(b, generator=generator, device=generator.device)
        is_treated = u < self.share
        of_treatment = self.treatment.draw(b, n, p, generator)
        of_other = self.other.draw(b, n, p, generator)
        return is_treated, *of_treatment, *of_other

    def __call__(self, patches: Patches, is_treated: Tensor, *drawn: Tensor) -> Patches:
        n_first = self._n_drawn
        treated = self.treatment(patches, *drawn[:n_first])
        others = self.other(patches, *drawn[n_first:])
        return torch.where(is_treated.view(-1, 1, 1, 1, 1), treated, others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPatches:
    """Makes the patches of a training, which may follow a curriculum.

    Images have the same size throughout, that of the largest grid, in whose middle smaller ones
    lie. So nothing is compiled again, and all random numbers keep their shapes.

    Args:
        patches: makes the patches of the end.
        curriculum: what leads there; None where patches are made alike throughout.
    """

    patches: PatchPipeline
    curriculum: Curriculum | None = None

    def __post_init__(self) -> None:
        # That no resized image could hold it is found now, and not while images are read.
        _ = self.grid

    @property
    def grid(self) -> PatchGrid:
        """The grid that images are cropped for: that of the end, or one that holds all others."""
        last = self.patches.grid
        if self.curriculum is None:
            return last
        first = self.curriculum.first_grid(last)
        low = min(first.jitter_range[0], last.jitter_range[0])
        high = max(first.jitter_range[1], last.jitter_range[1])
        gap_px = max(first.gap_px, last.gap_px)
        return dataclasses.replace(last, gap_px=gap_px, jitter_px=(low, high))

    def draw(self, n_images: int, generator: torch.Generator, share: float) -> Drawn:
        """Returns the random numbers for `n_images` images after a share of the training's steps.

        They are what `PatchPipeline.draw` returns, with corners in the crop of `grid`.
        """
        if self.curriculum is None:
            return self.patches.draw(n_images, generator)
        grid = self.curriculum.grid_at(self.patches.grid, share)
        color = self._color(self.curriculum.treated_at(share))
        present = dataclasses.replace(self.patches, grid=grid, color=color)
        corners, *others = present.draw(n_images, generator)
        # The present grid lies in the middle of the crop.
        margin_px = (self.grid.span_px - grid.span_px) // 2
        return corners + margin_px, *others

    def maker(self, compile: Callable[[Any], Any] | None) -> Callable[..., Tensor]:
        """Returns the function that makes patches of images and what `draw` returned.

        It is compiled by `compile`, such as `torch.compile`, unless that is None.
        """
        # Which share of the images is treated stands in what is drawn.
        any_step = dataclasses.replace(self.patches, grid=self.grid, color=self._color(1.0))
        return any_step.make if compile is None else any_step.compiled(compile)

    def _color(self, treated: float) -> Color:
        if self.curriculum is None or self.curriculum.treated is None:
            return self.patches.color
        return Mixed(treatment=self.patches.color, other=self.curriculum.otherwise, share=treated)


def check_effects(training: TrainingPatches) -> None:
    """Checks that no setting of the patches of a training is without effect.

    Raises:
        UsageError: a part changes no patch, or a curriculum leads nowhere.
    """
    patches = training.patches
    if patches.chroma_blur is not None and patches.chroma_blur.side_px == 1:
        raise UsageError(
            "chroma_blur.side_px is 1, which blurs nothing: give 3 or more, or leave chroma_blur= "
            "out"
        )
    if patches.aperture is not None and patches.aperture.whole >= patches.grid.cells:
        raise UsageError(
            f"aperture.whole is {patches.aperture.whole}, so that none of the "
            f"{patches.grid.cells} patches of an image is covered: give fewer, or leave aperture= "
            "out"
        )
    curriculum = training.curriculum
    if curriculum is None:
        return
    first, last = curriculum.first_grid(patches.grid), patches.grid
    grid_changes = (first.gap_px, first.jitter_range) != (last.gap_px, last.jitter_range)
    if not grid_changes and curriculum.treated in (None, 1):
        raise UsageError(
            f"curriculum.gap_px={curriculum.gap_px}, curriculum.jitter_px={curriculum.jitter_px} "
            f"and curriculum.treated={curriculum.treated} are the values of the end, so that "
            "nothing changes: give others, or leave the curriculum out"
        )
    if curriculum.treated is None:
        # The default of `otherwise`, which is there whether it is used or not
        if not isinstance(curriculum.otherwise, Keep):
            raise UsageError(
                "curriculum.otherwise is for the images that curriculum.treated leaves out, and "
                "that is null: give a share such as curriculum.treated=0.5, or leave out "
                "color@curriculum.otherwise="
            )
    elif patches.color == curriculum.otherwise:
        raise UsageError(
            f"curriculum.treated={curriculum.treated} changes nothing, as color= and "
            "curriculum.otherwise are the same: give another color=, or curriculum.treated=null"
        )
