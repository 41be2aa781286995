"""Shows which classes are taken for which: a picture, and a table of all counts.

The picture has as many classes as can be read, the most confused ones where there are more. The
table, a CSV file, has all of them.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from relloc.files import write_whole, writing

PICTURE = "confusion.png"
TABLE = "confusion.csv"
NONE = "none"  # stands for no object
_OTHERS = "other classes"

# Numbers in the cells of more classes than these could not be read in a picture that fits a screen.
_MOST_CLASSES = 24
_INCHES_PER_CELL = 0.36
_LEAST_PERCENT_WRITTEN = 1
_WHITE_TEXT_FROM_PERCENT = 40  # on cells as dark as this, white is easier to read than black

Counts = Int[np.ndarray, "rows columns"]


def save_class_confusion(
    confusion: Int[Tensor, "rows columns"],
    class_names: Sequence[str],
    folder: Path,
    *,
    title: str,
) -> None:
    """Saves `confusion.png` and `confusion.csv`, which say which classes are taken for which.

    Args:
        confusion: counts by true class (row) and predicted class (column). A row and a column
            behind those of the classes stand for no object. The picture shows counts in percent
            of their row; the row of a class without counts is empty.
        class_names: names by class.
        folder: where both files are saved; earlier ones are replaced.
        title: what the picture is headed.

    Raises:
        ValueError: there are neither as many rows and columns as classes nor one more of each.
    """
    counts = confusion.cpu().numpy()
    n_classes = len(class_names)
    n_without_object = len(counts) - n_classes
    if counts.shape != (len(counts), len(counts)) or n_without_object not in (0, 1):
        raise ValueError(f"confusion of {n_classes} classes has the shape {counts.shape}")
    names = [*class_names, NONE][: len(counts)]
    _write_table(counts, names, folder / TABLE)

    if n_classes <= _MOST_CLASSES:
        _draw(counts, names, names, folder / PICTURE, title=title)
        return
    shown = most_confused(counts[:n_classes], _MOST_CLASSES)
    left_out = np.setdiff1d(np.arange(n_classes), shown)
    without_object = list(range(n_classes, len(counts)))
    rows = [*shown, *without_object]
    # Counts of columns that are not shown are joined, so that percentages are still of all counts.
    of_rows = counts[rows]
    of_others = of_rows[:, left_out].sum(axis=1, keepdims=True)
    drawn = np.concatenate([of_rows[:, shown], of_others, of_rows[:, without_object]], axis=1)
    row_names = [names[number] for number in rows]
    column_names = [*row_names[: len(shown)], _OTHERS, *row_names[len(shown) :]]
    title += f"\nthe {len(shown)} most confused of {n_classes} classes; all are in {TABLE}"
    _draw(drawn, row_names, column_names, folder / PICTURE, title=title)


def most_confused(counts: Int[np.ndarray, "classes columns"], n_shown: int) -> list[int]:
    """Returns the numbers of the classes that are confused most, in the order of classes.

    They are those of the pairs that are most often taken for one another. Where no more classes
    are confused, those with the most counts follow.

    Args:
        counts: by true class (row) and predicted class (column). A column behind those of the
            classes stands for no object.
        n_shown: how many classes are wanted; no more than there are.
    """
    # Either of two classes may be the true one. Each pair counts once, and no class with itself.
    of_classes = counts[:, : len(counts)]
    of_pairs = np.triu(of_classes + of_classes.T, k=1)
    pairs = np.argwhere(of_pairs > 0)
    by_count = np.argsort(-of_pairs[of_pairs > 0], kind="stable")
    candidates = pairs[by_count].flatten().tolist()
    frequent_first = np.argsort(-counts.sum(axis=1), kind="stable")
    candidates += frequent_first.tolist()
    # Each class once, at its first place.
    chosen = list(dict.fromkeys(candidates))[:n_shown]
    return sorted(chosen)


def _write_table(counts: Counts, names: Sequence[str], path: Path) -> None:
    """Writes all counts, a line for each true class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true class", *names])
    for name, of_row in zip(names, counts.tolist(), strict=True):
        writer.writerow([name, *of_row])
    write_whole(path, text.getvalue().encode())


def _draw(
    counts: Counts,
    row_names: Sequence[str],
    column_names: Sequence[str],
    path: Path,
    *,
    title: str,
) -> None:
    """Draws counts in percent of their row."""
    n_rows, n_columns = counts.shape
    percent = _percent_of_rows(counts)

    # A cell is as large as its number needs. Names stand to the left and below, the color bar to
    # the right.
    width = max(5.0, n_columns * _INCHES_PER_CELL) + 2.6
    height = max(5.0, n_rows * _INCHES_PER_CELL) + 2
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.add_subplot()
    # The square root keeps small confusions visible; fixed limits make pictures comparable.
    color_scale = PowerNorm(0.5, vmin=0, vmax=100)
    drawn = axis.imshow(percent, cmap="Blues", norm=color_scale)
    axis.set_title(title)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.set_xticks(range(n_columns), column_names, rotation=90, fontsize=9)
    axis.set_yticks(range(n_rows), row_names, fontsize=9)
    is_written = percent >= _LEAST_PERCENT_WRITTEN
    for row, column in np.argwhere(is_written).tolist():
        value = percent[row, column]
        color = "white" if value >= _WHITE_TEXT_FROM_PERCENT else "black"
        is_right = row_names[row] == column_names[column]
        axis.text(
            column,
            row,
            f"{value:.0f}",
            ha="center",
            va="center",
            color=color,
            fontsize=8,
            fontweight="bold" if is_right else "normal",
        )
    bar = figure.colorbar(drawn, ax=axis, shrink=0.6, ticks=[0, 1, 5, 25, 50, 75, 100])
    bar.set_label("% of the true class")
    with writing(path) as file:
        figure.savefig(file, dpi=110, format="png")


def _percent_of_rows(counts: Counts) -> Float[np.ndarray, "rows columns"]:
    """Returns counts in percent of their row; nan, which is drawn empty, for a row without any."""
    row_sums = counts.sum(axis=1, keepdims=True)
    denominators = np.where(row_sums == 0, np.nan, row_sums)
    return 100 * counts / denominators
