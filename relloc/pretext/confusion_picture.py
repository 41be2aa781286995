"""Draws which positions the network confuses: the confusion matrix, and a map of the accuracies."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from relloc.files import writing
from relloc.geometry import CELLS, CENTER, CHANCE_PERCENT, NEIGHBORS
from relloc.pretext.questions import POSITIONS

_ARROWS = dict(zip(POSITIONS, "↖↑↗←→↙↓↘", strict=True))
_ROW_LABELS = [f"{position} {arrow}".replace("_", " ") for position, arrow in _ARROWS.items()]
_COLUMN_LABELS = [f"{arrow}_{position}".replace("_", "\n") for position, arrow in _ARROWS.items()]

# Left, bottom, width and height as shares of the figure. Fixed, since letting matplotlib find a
# layout takes as long as drawing, and training waits for it.
_MATRIX_BOX = (0.135, 0.16, 0.375, 0.71)
_MAP_BOX = (0.59, 0.23, 0.3, 0.57)
_SCALE_BOX = (0.91, 0.27, 0.012, 0.49)
_WHITE_TEXT_FROM_PERCENT = 40  # on cells as dark as this, white is easier to read than black


def draw_confusion(
    confusion: Int[Tensor, "8 8"],
    path: Path,
    *,
    heading: str,
    top1: float,
    pairs: str = "held-out pairs",
) -> None:
    """Saves a PNG of the confusion matrix and of the accuracy at each position.

    Args:
        confusion: counts by true position (row) and answered position (column). They are shown in
            percent of their row.
        path: where the picture is saved; an earlier one is replaced.
        heading: whose answers they are, for the title.
        top1: accuracy over all pairs in percent, for the title.
        pairs: which pairs were asked about, for the title.
    """
    # A position without pairs would divide by zero.
    pairs_of_row = confusion.sum(dim=1, keepdim=True).clamp(min=1)
    percent = 100 * confusion / pairs_of_row

    figure = Figure(figsize=(11, 5.8))
    n_pairs = int(confusion.sum())
    share = f"{top1:.1f} % of {n_pairs:,} {pairs} right"
    title = f"{heading}: {share} (chance {CHANCE_PERCENT} %)"
    # Names of data sets and people may hold what looks like a formula.
    figure.suptitle(title, fontsize=13, parse_math=False)
    matrix = figure.add_axes(_MATRIX_BOX)
    image = _draw_matrix(matrix, percent)
    position_map = figure.add_axes(_MAP_BOX)
    _draw_position_map(position_map, percent.diagonal())
    scale = figure.add_axes(_SCALE_BOX)
    ticks = [0, 5, CHANCE_PERCENT, 25, 50, 75, 100]
    bar = figure.colorbar(image, cax=scale, ticks=ticks)
    bar.set_ticklabels(["0", "5", "chance", "25", "50", "75", "100 %"])
    # Replaced as a whole, since a tracker may be reading the picture of an earlier step.
    with writing(path) as file:
        figure.savefig(file, dpi=110, format="png")


def _draw_matrix(axis: Axes, percent: Float[Tensor, "8 8"]) -> AxesImage:
    image = _draw_cells(axis, percent)
    axis.set_title("answers of each position, % of its pairs", fontsize=11)
    axis.set_xlabel("answered")
    axis.set_ylabel("true position of the neighbor")
    axis.set_xticks(range(len(_COLUMN_LABELS)), _COLUMN_LABELS)
    axis.set_yticks(range(len(_ROW_LABELS)), _ROW_LABELS)
    for row, values in enumerate(percent.tolist()):
        for column, value in enumerate(values):
            text = f"{value:.0f}"
            is_right = row == column
            _write_in_cell(axis, row, column, value, text, bold=is_right)
    return image


def _draw_position_map(axis: Axes, accuracies: Float[Tensor, "8"]) -> None:
    """Draws the accuracy of each position where it lies around the center patch."""
    # The center has no accuracy: its cell stays empty.
    cells = torch.full((CELLS,), torch.nan)
    cells[list(NEIGHBORS)] = accuracies
    _draw_cells(axis, cells.reshape(3, 3))
    axis.set_title("accuracy by position, %", fontsize=11)
    axis.set_xticks([])
    axis.set_yticks([])
    for cell, value in enumerate(cells.tolist()):
        row, column = divmod(cell, 3)
        is_center = cell == CENTER
        text = "center" if is_center else f"{value:.1f}"
        bold = not is_center
        _write_in_cell(axis, row, column, value, text, bold=bold, size=15)


def _draw_cells(axis: Axes, percent: Float[Tensor, "rows columns"]) -> AxesImage:
    # The same color scale at all steps, so that pictures can be compared. The square root keeps
    # differences near chance visible.
    color_scale = PowerNorm(0.5, vmin=0, vmax=100)
    return axis.imshow(percent.numpy(), cmap="Blues", norm=color_scale)


def _write_in_cell(
    axis: Axes,
    row: int,
    column: int,
    value: float,
    text: str,
    *,
    bold: bool,
    size: int = 10,
) -> None:
    color = "white" if value >= _WHITE_TEXT_FROM_PERCENT else "black"
    weight = "bold" if bold else "normal"
    axis.text(
        column,
        row,
        text,
        ha="center",
        va="center",
        color=color,
        fontweight=weight,
        fontsize=size,
    )
