"""What a network is asked about the patches of an image, which answer is right, and the loss.

A question is about a pair of cells of the patch grid: where does the first patch, the neighbor, lie
as seen from the second, the center of the pair? Or it is about three cells. Several sets can be
asked about; all come from the same patches, each encoded once:

* `CenterPairs`: each outer cell of the 3x3 grid with the cell in its middle (the published recipe).
* `AdjacentPairs`: all pairs of cells that touch, at a side or a corner, in both orders.
* `AllPairs`: all pairs of two cells, in both orders.
* `Triplets`: the center with two outer cells.

`Questions` is what the network, the training loop and the measurements need of such a set. A task
that asks something else implements it too.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn.functional import cross_entropy

from relloc.errors import UsageError
from relloc.geometry import CELLS, CENTER, NEIGHBORS, OFFSETS

Cells = Num[Tensor, "b cells *values"]  # something of each cell of each image, in the grid's order
Outputs = Float[Tensor, "b questions outputs"]  # image, question, output of the head
Offset = tuple[int, int]  # (rows, columns) from the center of a pair to the neighbor, in cells
# Where the neighbor of each label of `CenterPairs` lies, seen from the center
POSITIONS = ("up_left", "up", "up_right", "left", "right", "down_left", "down", "down_right")


@runtime_checkable
class Questions(Protocol):
    """A set of questions that an image gives, and how answers to them are judged.

    Which answer is right may depend on the random numbers of the patches, as for patches that are
    turned or that lie anywhere. So `truth` is computed from what `PatchPipeline.draw` returned. Its
    result may have any type and any shape that begins with the images: only `loss` and `hits` read
    it.
    """

    @property
    def n_cells(self) -> int:
        """The number of patches of an image."""
        ...

    @property
    def have_center(self) -> bool:
        """Whether one cell, the center of the grid, is the second of all pairs and never first."""
        ...

    @property
    def n_patches(self) -> int:
        """The number of patches that a question is about: two of a pair."""
        ...

    @property
    def n_questions(self) -> int:
        """The number of questions that an image gives."""
        ...

    @property
    def n_outputs(self) -> int:
        """The number of outputs of the head for a question: of logits, one for each answer."""
        ...

    @property
    def chance_percent(self) -> float:
        """The best accuracy that is possible without looking at the patches, in percent."""
        ...

    @property
    def chance_loss(self) -> float:
        """The smallest loss that is possible without looking at the patches."""
        ...

    def select(self, cells: Cells) -> tuple[Tensor, ...]:
        """Returns the cells that have each of the `n_patches` parts in questions.

        A cell is in a result once, in however many questions it has that part: what depends on one
        patch alone is computed once, and `combine` makes questions of it.
        """
        ...

    def combine(self, parts: Sequence[Tensor]) -> Float[Tensor, "b questions h"]:
        """Returns for each question the sum over its patches, given values of what was selected."""
        ...

    def truth(self, corners: Int[Tensor, "b cells 2"], *drawn: Tensor) -> Tensor:
        """Returns what is right for patches that were made with these random numbers.

        The arguments are what `PatchPipeline.draw` returned. Nothing is copied between host and
        device, so that the call can be part of a CUDA graph once it was made outside of one.
        """
        ...

    def loss(self, outputs: Outputs, truth: Tensor) -> Float[Tensor, ""]:
        """Returns the mean loss over all questions."""
        ...

    def hits(self, outputs: Outputs, truth: Tensor) -> Int[Tensor, "b"]:
        """Returns the number of right answers for each image."""
        ...

    def columns_of_positions(self) -> tuple[int, ...] | None:
        """Returns which outputs stand for the eight `POSITIONS`, in their order.

        They let a network be asked about `CenterPairs`, whatever it was trained on, and so be
        compared with others. None where the outputs do not name a position.
        """
        ...


class _LabeledQuestions:
    # What all sets share: each question has a label, the same in all images.

    n_patches = 2

    @property
    def labels(self) -> tuple[int, ...]:
        """The right answer to each question."""
        raise NotImplementedError

    @property
    def n_questions(self) -> int:
        return len(self.labels)

    @property
    def n_outputs(self) -> int:
        return max(self.labels) + 1

    @property
    def chance_percent(self) -> float:
        # Who does not look gives the most frequent answer. With pairs of adjacent cells that is one
        # of the straight directions, since a grid has more of them than of each diagonal.
        counts = Counter(self.labels)
        return 100 * max(counts.values()) / self.n_questions

    @property
    def chance_loss(self) -> float:
        # The cross entropy is smallest where the network gives each answer the probability that is
        # its share of the questions, p = c / n. It is then the entropy: log n - sum of c log c / n.
        n = self.n_questions
        counts = Counter(self.labels).values()
        return math.log(n) - sum(count * math.log(count) for count in counts) / n

    def truth(
        self, corners: Int[Tensor, "b cells 2"], *drawn: Tensor
    ) -> Int[Tensor, "b questions"]:
        labels = _labels_on(self.labels, corners.device)
        return labels.expand(len(corners), -1)

    def loss(self, outputs: Outputs, truth: Int[Tensor, "b questions"]) -> Float[Tensor, ""]:
        # bfloat16 is too coarse for a loss. float64 stays, for tests that compare to more digits.
        exact = outputs if outputs.dtype == torch.float64 else outputs.float()
        return cross_entropy(exact.flatten(0, 1), truth.flatten())

    def hits(self, outputs: Outputs, truth: Int[Tensor, "b questions"]) -> Int[Tensor, "b"]:
        answers = outputs.argmax(dim=2)
        return (answers == truth).sum(dim=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CenterPairs(_LabeledQuestions):
    """The eight pairs of an outer cell of the 3x3 grid and the center; question i has label i.

    Raises:
        UsageError: the grid has another number of `rows`, and so no center.
    """

    rows: int = 3

    n_cells = CELLS
    have_center = True

    def __post_init__(self) -> None:
        if self.rows != 3:
            raise UsageError(
                f"grid.rows={self.rows} has no patch in the middle that has eight neighbors: give "
                "grid.rows=3, or pairs=adjacent or pairs=offsets"
            )

    @property
    def labels(self) -> tuple[int, ...]:
        return tuple(range(len(NEIGHBORS)))

    def select(self, cells: Cells) -> tuple[Tensor, Tensor]:
        """Returns the neighbors (b 8 ...) and the center (b ...) of each image."""
        return without_center(cells, dim=1), cells[:, CENTER]

    def combine(self, parts: Sequence[Tensor]) -> Float[Tensor, "b 8 h"]:
        neighbors, centers = parts
        return neighbors + centers.unsqueeze(1)

    def columns_of_positions(self) -> tuple[int, ...]:
        return self.labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class _GridPairs(_LabeledQuestions):
    # All ordered pairs of cells of a grid whose offset has at most `_reach` rows and columns. They
    # are ordered by offset, which is the answer: row by row from the upper left.
    #
    # The pairs of one offset are a rectangle of cells of the grid, beside the same rectangle moved
    # by the offset. So they are taken by slices: lists of indices would have gradients that are
    # added up in no fixed order on a GPU.

    have_center = False

    rows: int = 3

    @property
    def _reach(self) -> int:
        raise NotImplementedError

    @property
    def n_cells(self) -> int:
        return self.rows**2

    @property
    def offsets(self) -> tuple[Offset, ...]:
        """The offset from the center of the pair to the neighbor that each answer stands for."""
        steps = range(-self._reach, self._reach + 1)
        offsets = []
        for down in steps:
            for right in steps:
                if (down, right) != (0, 0):
                    offsets.append((down, right))
        return tuple(offsets)

    @property
    def labels(self) -> tuple[int, ...]:
        labels: list[int] = []
        for label, (down, right) in enumerate(self.offsets):
            n_pairs = (self.rows - abs(down)) * (self.rows - abs(right))
            labels += [label] * n_pairs
        return tuple(labels)

    def select(self, cells: Cells) -> tuple[Tensor, Tensor]:
        """Returns all cells twice: each is the neighbor of some pairs, and the center of others."""
        return cells, cells

    def combine(self, parts: Sequence[Tensor]) -> Float[Tensor, "b questions h"]:
        side = self.rows
        of_neighbors, of_centers = [part.unflatten(1, (side, side)) for part in parts]
        sums = []
        for down, right in self.offsets:
            neighbor_rows, center_rows = _moved(down, side)
            neighbor_columns, center_columns = _moved(right, side)
            moved = of_neighbors[:, neighbor_rows, neighbor_columns]
            of_offset = moved + of_centers[:, center_rows, center_columns]
            sums.append(of_offset.flatten(1, 2))
        return torch.cat(sums, 1)

    def columns_of_positions(self) -> tuple[int, ...]:
        return tuple(self.offsets.index(offset) for offset in OFFSETS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdjacentPairs(_GridPairs):
    """All ordered pairs of cells that touch, with the eight answers of `CenterPairs`.

    There are 40 in a grid of 3 `rows`, 84 in one of 4. So the author's code asks (protocols.md 1.1,
    deepcontext), of larger grids.
    """

    @property
    def _reach(self) -> int:
        return 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllPairs(_GridPairs):
    """All ordered pairs of two cells; the answers are their offsets.

    There are 72 with 24 answers in a grid of 3 `rows`, 240 with 48 in one of 4.
    """

    @property
    def _reach(self) -> int:
        return self.rows - 1


def _outer_cells_apart() -> tuple[tuple[int, int], ...]:
    # Labels of two outer cells that share no side, the first before the second row by row
    pairs = []
    for first, (first_row, first_column) in enumerate(OFFSETS):
        for second in range(first + 1, len(OFFSETS)):
            second_row, second_column = OFFSETS[second]
            steps = abs(second_row - first_row) + abs(second_column - first_column)
            if steps > 1:
                pairs.append((first, second))
    return tuple(pairs)


ARRANGEMENTS = _outer_cells_apart()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Triplets(_LabeledQuestions):
    """The center with two outer cells that share no side: 20 arrangements, each with its answer.

    Mundhenk et al. (protocols.md 1.5) ask for 20 arrangements of three patches too. Which these are
    stands in their stored patches alone; these here are our choice.

    Raises:
        UsageError: the grid has another number of `rows`, and so no center.
    """

    rows: int = 3

    n_cells = CELLS
    have_center = False
    n_patches = 3

    def __post_init__(self) -> None:
        if self.rows != 3:
            raise UsageError(
                f"grid.rows={self.rows} has no patch in the middle: give grid.rows=3, or "
                "pairs=adjacent or pairs=offsets"
            )

    @property
    def labels(self) -> tuple[int, ...]:
        return tuple(range(len(ARRANGEMENTS)))

    def select(self, cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the outer cells (b 8 ...), the center (b ...), and the outer cells again."""
        outer = without_center(cells, dim=1)
        return outer, cells[:, CENTER], outer

    def combine(self, parts: Sequence[Tensor]) -> Float[Tensor, "b 20 h"]:
        of_firsts, of_centers, of_seconds = parts
        # Taken apart once: as with `_GridPairs`, lists of indices would be no good.
        firsts = of_firsts.unbind(1)
        seconds = of_seconds.unbind(1)
        outer = [firsts[first] + seconds[second] for first, second in ARRANGEMENTS]
        return torch.stack(outer, 1) + of_centers.unsqueeze(1)

    def columns_of_positions(self) -> None:
        """Returns None, as an answer names two positions."""


CENTER_PAIRS = CenterPairs()


def head_sizes(questions: Questions) -> dict[str, int]:
    """Returns the arguments by which a head is made for these questions."""
    return {
        "n_patches": questions.n_patches,
        "n_questions": questions.n_questions,
        "n_outputs": questions.n_outputs,
    }


def without_center(cells: Tensor, dim: int) -> Tensor:
    """Returns the eight outer cells, without the center, along dimension `dim`."""
    # By slices, since a list of indices would be copied to the GPU, and the host would wait for it.
    n_after = CELLS - CENTER - 1
    before, _, after = cells.split([CENTER, 1, n_after], dim)
    return torch.cat([before, after], dim)


@functools.cache
def _labels_on(labels: Sequence[int], device: torch.device) -> Int[Tensor, "questions"]:
    # Kept on the device: copying a constant to a GPU in every call would make the host wait.
    return torch.tensor(labels, device=device)


def _moved(step: int, rows: int) -> tuple[slice, slice]:
    """Returns the rows of neighbors that lie `step` rows below their centers, and these."""
    neighbors = slice(max(0, step), rows + min(0, step))
    centers = slice(max(0, -step), rows + min(0, -step))
    return neighbors, centers
