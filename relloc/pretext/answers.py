"""Answers that say more than which cell a patch is from: its turn, or how far away it is."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import l1_loss

from relloc import checks
from relloc.errors import UsageError
from relloc.geometry import PatchGrid
from relloc.patches.curriculum import TrainingPatches
from relloc.patches.pipeline import PatchPipeline
from relloc.patches.rotation import N_TURNS
from relloc.pretext.questions import Cells, Questions

ANSWERS = ("classes", "regression")


def with_answers(
    questions: Questions,
    patches: PatchPipeline,
    answers: str,
) -> Questions:
    """Returns questions about cells as they are asked of such patches.

    Args:
        questions: which cells are asked about.
        patches: makes the patches. Where it turns them, the turn is asked for as well.
        answers: "classes", or "regression" for how far patches are apart.

    Raises:
        UsageError: the questions have no such answers.
    """
    checks.one_of("pretext_answers", answers, ANSWERS)
    if answers == "classes":
        return questions if patches.rotation is None else WithTurns(questions=questions)
    if patches.rotation is not None:
        raise UsageError(
            "pretext_answers=regression asks for no turn of patches, and rotation= turns them: "
            "leave out one of the two"
        )
    if questions.n_patches != 2:
        raise UsageError(
            "pretext_answers=regression asks how far two patches are apart, and each question of "
            f"pairs= is about {questions.n_patches}: give other pairs, or pretext_answers=classes"
        )
    return OffsetRegression(questions=questions, grid=patches.grid)


def check_distances(questions: Questions, patches: TrainingPatches) -> None:
    """Checks that a training of `OffsetRegression` can be scored in cells of one grid.

    Raises:
        UsageError: the jitter moves a patch nearer to the place of another cell, or a curriculum
            changes the grid. Other questions are not concerned.
    """
    if not isinstance(questions, OffsetRegression):
        return
    grid = questions.grid
    furthest_px = 0 if grid.yoked_jitter else grid.jitter_width
    if 2 * furthest_px >= grid.pitch_px:
        raise UsageError(
            f"pretext_answers=regression: grid.jitter_px={grid.jitter_px} moves two patches up to "
            f"{furthest_px} px nearer or further apart, half of the {grid.pitch_px} px between "
            "cells or more, so that a right answer may be nearest to another cell: give a smaller "
            "grid.jitter_px or a larger grid.gap_px"
        )
    if patches.curriculum is None:
        return
    first = patches.curriculum.first_grid(grid)
    if (first.gap_px, first.jitter_range) != (grid.gap_px, grid.jitter_range):
        raise UsageError(
            f"pretext_answers=regression with curriculum.gap_px={patches.curriculum.gap_px} and "
            f"curriculum.jitter_px={patches.curriculum.jitter_px}: accuracy, and the loss of "
            "guessing, are those of one grid, and the curriculum changes it. Set both to null, or "
            "leave out one of the two settings"
        )


class _Same:
    # What questions share with those that they are made of

    questions: Questions

    @property
    def n_cells(self) -> int:
        return self.questions.n_cells

    @property
    def have_center(self) -> bool:
        return self.questions.have_center

    @property
    def n_patches(self) -> int:
        return self.questions.n_patches

    @property
    def n_questions(self) -> int:
        return self.questions.n_questions

    def select(self, cells: Cells) -> tuple[Tensor, ...]:
        return self.questions.select(cells)

    def combine(self, parts: Sequence[Tensor]) -> Float[Tensor, "b questions h"]:
        return self.questions.combine(parts)

    def columns_of_positions(self) -> None:
        """Returns None, as no output stands for a position alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithTurns(_Same):
    """Questions about turned patches: an answer names the cells and the quarter turns.

    The label is that of the cells plus the turns times the number of answers about cells, as
    Mundhenk et al. have it (protocols.md 1.5).
    """

    questions: Questions

    @property
    def n_outputs(self) -> int:
        return N_TURNS * self.questions.n_outputs

    @property
    def chance_percent(self) -> float:
        # All turns are equally likely.
        return self.questions.chance_percent / N_TURNS

    @property
    def chance_loss(self) -> float:
        return self.questions.chance_loss + math.log(N_TURNS)

    def truth(
        self, corners: Int[Tensor, "b cells 2"], *drawn: Tensor
    ) -> Int[Tensor, "b questions"]:
        # `PatchPipeline.draw` returns the turns last.
        turns = drawn[-1]
        labels = self.questions.truth(corners, *drawn)
        return labels + self.questions.n_outputs * turns.unsqueeze(1)

    def loss(
        self, outputs: Float[Tensor, "b questions answers"], truth: Int[Tensor, "b questions"]
    ) -> Float[Tensor, ""]:
        return self.questions.loss(outputs, truth)

    def hits(
        self, outputs: Float[Tensor, "b questions answers"], truth: Int[Tensor, "b questions"]
    ) -> Int[Tensor, "b"]:
        return self.questions.hits(outputs, truth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffsetRegression(_Same):
    """Questions how far the neighbor of a pair lies from its center, in sides of a patch.

    The outputs are an offset (down, right), which need be no whole number of cells; the loss is its
    absolute error, as in DRLoc (Liu et al., NeurIPS 2021). An answer counts as right where the
    offset of cells that it is nearest to is that of the pair.

    Args:
        questions: the pairs that are asked about.
        grid: where the patches lie.
    """

    questions: Questions
    grid: PatchGrid

    n_outputs = 2

    @property
    def chance_percent(self) -> float:
        return self.questions.chance_percent

    @property
    def chance_loss(self) -> float:
        # Who does not look does best with the median of all offsets, which is 0: for each pair of
        # cells there is one the other way round. Its error is the mean distance.
        distances = self._cell_offsets(torch.device("cpu")).abs().double()
        between_cells = distances * self.grid.pitch_px
        # In one row or column only the jitter moves patches apart: the mean distance of two of n
        # whole numbers, uniform and independent, is (n^2 - 1) / 3n.
        n = 1 if self.grid.yoked_jitter else self.grid.jitter_width + 1
        by_jitter = (n**2 - 1) / (3 * n)
        in_pixels = torch.where(distances > 0, between_cells, by_jitter)
        return in_pixels.mean().item() / self.grid.patch_px

    def truth(
        self, corners: Int[Tensor, "b cells 2"], *drawn: Tensor
    ) -> Float[Tensor, "b questions 2"]:
        return self._differences(corners) / self.grid.patch_px

    def loss(
        self, outputs: Float[Tensor, "b questions 2"], truth: Float[Tensor, "b questions 2"]
    ) -> Float[Tensor, ""]:
        # bfloat16 is too coarse for a loss. float64 stays, for tests that compare to more digits.
        exact = outputs if outputs.dtype == torch.float64 else outputs.float()
        return l1_loss(exact, truth.to(exact.dtype))

    def hits(
        self, outputs: Float[Tensor, "b questions 2"], truth: Float[Tensor, "b questions 2"]
    ) -> Int[Tensor, "b"]:
        in_cells = outputs.float() * (self.grid.patch_px / self.grid.pitch_px)
        is_right = in_cells.round() == self._cell_offsets(outputs.device)
        return is_right.all(dim=2).sum(dim=1)

    def _cell_offsets(self, device: torch.device) -> Float[Tensor, "1 questions 2"]:
        """Returns the offset of each pair in cells."""
        rows = math.isqrt(self.n_cells)
        cells = torch.arange(self.n_cells, device=device)
        rows_columns = torch.stack([cells // rows, cells % rows], dim=1)
        return self._differences(rows_columns.unsqueeze(0))

    def _differences(self, of_cells: Int[Tensor, "b cells 2"]) -> Float[Tensor, "b questions 2"]:
        """Returns the value of the neighbor minus that of the center, for each pair."""
        # Whole numbers below 2^24 are exact in float32.
        neighbors, centers = self.select(of_cells.float())
        return self.combine([neighbors, -centers])
