"""A picture of which positions are told apart: the confusion matrix, and where the network looks right."""

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
from relloc.pretext.held_out import POSITIONS

_ARROWS = dict(zip(POSITIONS, "↖↑↗←→↙↓↘", strict=True))
_BESIDE = [f"{position.replace('_', ' ')} {arrow}" for position, arrow in _ARROWS.items()]
_BELOW = ["\n".join((arrow, *position.split("_"))) for position, arrow in _ARROWS.items()]
_BOXES = ((0.135, 0.16, 0.375, 0.71), (0.59, 0.23, 0.3, 0.57), (0.91, 0.27, 0.012, 0.49))
_WHITE_FROM_PERCENT = 40


def draw_confusion(confusion: Int[Tensor, "8 8"], path: Path, *, step: int, top1: float) -> None:
    """Save counts (true position down, answer across) in percent of each row, and the accuracy of each position.

    `step` counts the optimizer steps done, `top1` is the accuracy over all pairs in percent.
    """
    percent = 100 * confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(11, 5.8))
    # Left, bottom, width, height as shares of the figure: finding a layout takes as long as drawing.
    matrix, around, scale = (figure.add_axes(box) for box in _BOXES)
    figure.suptitle(
        f"after step {step:,}: {top1:.1f} % of {int(confusion.sum()):,} held-out pairs right "
        f"(chance {CHANCE_PERCENT} %)",
        fontsize=13,
    )
    shown = _draw_matrix(matrix, percent)
    _draw_around(around, percent.diagonal())
    bar = figure.colorbar(shown, cax=scale, ticks=[0, 5, CHANCE_PERCENT, 25, 50, 75, 100])
    bar.set_ticklabels(["0", "5", "chance", "25", "50", "75", "100 %"])
    with writing(path) as file:  # a tracker may be reading the picture of an earlier step
        figure.savefig(file, dpi=110, format="png")


def _draw_matrix(axis: Axes, percent: Float[Tensor, "8 8"]) -> AxesImage:
    shown = _show(axis, percent)
    axis.set_title("answers of each position, % of its pairs", fontsize=11)
    axis.set_xlabel("answered")
    axis.set_ylabel("true position of the neighbor")
    axis.set_xticks(range(len(_BELOW)), _BELOW)
    axis.set_yticks(range(len(_BESIDE)), _BESIDE)
    for row, values in enumerate(percent.tolist()):
        for column, value in enumerate(values):
            _write(axis, row, column, value, f"{value:.0f}", bold=row == column)
    return shown


def _draw_around(axis: Axes, right: Float[Tensor, "8"]) -> None:
    """The accuracy of each position, where it lies around the center patch."""
    cells = torch.full((CELLS,), torch.nan)
    cells[list(NEIGHBORS)] = right
    _show(axis, cells.reshape(3, 3))
    axis.set_title("accuracy by position, %", fontsize=11)
    axis.set_xticks([])
    axis.set_yticks([])
    for cell, value in enumerate(cells.tolist()):
        text = "center" if cell == CENTER else f"{value:.1f}"
        _write(axis, cell // 3, cell % 3, value, text, bold=cell != CENTER, size=15)


def _show(axis: Axes, percent: Float[Tensor, "rows columns"]) -> AxesImage:
    # One scale for all steps, so that pictures compare; the root keeps differences near chance visible.
    return axis.imshow(percent.numpy(), cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))


def _write(axis: Axes, row: int, column: int, value: float, text: str, *, bold: bool, size: int = 10) -> None:
    color = "white" if value >= _WHITE_FROM_PERCENT else "black"
    weight = "bold" if bold else "normal"
    axis.text(column, row, text, ha="center", va="center", color=color, fontweight=weight, fontsize=size)
