"""How figures look: one style for all pictures with axes, and for all notebooks.

Sizes suit a column of a paper. Colors can be told apart by color-blind readers; beside its color a
line always has a marker and a dash pattern of its own, so that figures can be read in gray.
Ordered things (layers, gaps, lengths of training) have colors from dark to light.
"""

from pathlib import Path
from typing import IO, Any

import matplotlib
import matplotlib.style
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relloc.files import writing

# Widths in inches of a figure in one column, and across two, as journals and conferences have them
ONE_COLUMN, TWO_COLUMNS = 3.3, 6.9
STYLE_FILE = Path(__file__).with_name("relloc.mplstyle")
FORMATS = ("png", "svg", "pdf")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")
# Okabe and Ito's colors (https://jfly.uni-koeln.de/color/), without the yellow, which is too light
# for lines on white, and without black and gray, which are those of references
_CATEGORIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)))
MOST_CATEGORIES = len(_CATEGORIES)
MOST_ORDERED = len(MARKERS)
# The part of the color map that lines take: its lightest yellow could not be seen on white
_DARKEST, _LIGHTEST = 0.0, 0.85
# Above this brightness of a cell, its number is black
_BRIGHT = 0.5
_CONTROLS: dict[str, dict[str, Any]] = {
    "random": {"color": "0.45", "marker": "X", "linestyle": ":"},
    "torchvision": {"color": "black", "marker": "P", "linestyle": ":"},
}

Look = dict[str, Any]  # keyword arguments of `Axes.plot`


def style() -> Any:
    """Returns a context manager, inside of which figures have the style.

    Example:
        >>> with style():
        ...     figure = Figure(figsize=(ONE_COLUMN, 2.5))
    """
    return matplotlib.style.context(STYLE_FILE)


def use_style() -> None:
    """Gives all later figures of this process the style, as notebooks want it."""
    matplotlib.style.use(STYLE_FILE)


def ordered_looks(n: int) -> list[Look]:
    """Returns the looks of `n` ordered things: colors from dark to light, each with a marker."""
    colors = matplotlib.colormaps["viridis"]
    looks = []
    for number in range(n):
        share = number / max(1, n - 1)
        color = colors(_DARKEST + share * (_LIGHTEST - _DARKEST))
        looks.append({"color": color, "marker": MARKERS[number % len(MARKERS)]})
    return looks


def category_looks(n: int) -> list[Look]:
    """Returns the looks of `n` things without an order: a color, a marker and dashes for each.

    Raises:
        ValueError: there are more than `MOST_CATEGORIES`, which nobody can tell apart.
    """
    if n > MOST_CATEGORIES:
        raise ValueError(f"{n} lines can't be told apart: draw {MOST_CATEGORIES} at most")
    looks = []
    for color, marker, dashes in zip(_CATEGORIES[:n], MARKERS, _DASHES, strict=False):
        looks.append({"color": color, "marker": marker, "linestyle": dashes})
    return looks


def control_look(weights: str) -> Look:
    """Returns the look of random or supervised weights, the same in all figures."""
    return dict(_CONTROLS[weights])


def ink_on(color: Float[np.ndarray, "channels"]) -> str:
    """Returns the color, black or white, of a number on a background of this color (RGB)."""
    red, green, blue = color[:3]
    # Brightness as ITU-R BT.601 weighs it
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > _BRIGHT else "white"


def axis_label(setting: str) -> str:
    """Returns the label of an axis over a setting, with its unit.

    Example:
        >>> axis_label("grid.gap_px")
        'gap (px)'
    """
    _, _, name = setting.rpartition(".")
    for ending, unit in (("_px", "px"), ("_epochs", "epochs"), ("_s", "s")):
        if name.endswith(ending):
            return f"{name.removesuffix(ending)} ({unit})"
    return name


def mark_chance(axis: Axes, chance: float, name: str = "chance", *, upright: bool = False) -> None:
    """Draws a line at the value that guessing would have; `upright` where values lie across."""
    draw = axis.axvline if upright else axis.axhline
    draw(chance, color="0.6", linewidth=0.8, linestyle=(0, (1, 2)), label=name)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Saves a figure as PNG, SVG and PDF; returns the files.

    The files have no date in them: the same figure has the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for form in FORMATS:
        file = folder / f"{name}.{form}"
        save_as(figure, file, form)
        files.append(file)
    return files


def save_png(figure: Figure, path: Path) -> None:
    """Saves a figure as a PNG, which replaces an earlier one as a whole."""
    with writing(path) as file:
        save_as(figure, file, "png")


def save_as(figure: Figure, file: Path | IO[bytes], form: str) -> None:
    """Saves a figure in one of `FORMATS`."""
    undated: dict[str, dict[str, Any]] = {
        "svg": {"Date": None},
        "pdf": {"CreationDate": None},
    }
    # Settings of saving, such as the fonts of vector files, are looked up when a file is written
    with style():
        figure.savefig(file, format=form, metadata=undated.get(form))
