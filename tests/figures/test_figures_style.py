"""Figures of one style: told apart in gray, and the same bytes each time."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from relloc.figures.style import (
    MOST_CATEGORIES,
    MOST_ORDERED,
    axis_label,
    category_looks,
    control_look,
    ink_on,
    ordered_looks,
    save,
    style,
)


def brightness(color: object) -> float:
    return float(np.dot(to_rgb(color), (0.299, 0.587, 0.114)))  # type: ignore[arg-type]


def test_ordered_things_grow_lighter_and_have_markers_of_their_own() -> None:
    looks = ordered_looks(5)
    shades = [brightness(look["color"]) for look in looks]
    assert min(np.diff(shades)) > 0.08
    assert len({look["marker"] for look in ordered_looks(MOST_ORDERED)}) == MOST_ORDERED
    assert len(ordered_looks(1)) == 1


def test_categories_and_controls_differ_without_their_colors() -> None:
    looks = [*category_looks(MOST_CATEGORIES), control_look("random"), control_look("torchvision")]
    assert len({(look["marker"], str(look["linestyle"])) for look in looks}) == len(looks)
    with pytest.raises(ValueError, match=str(MOST_CATEGORIES + 1)):
        category_looks(MOST_CATEGORIES + 1)


def test_numbers_can_be_read_on_their_background() -> None:
    assert ink_on(np.array([0.0, 0.13, 0.3])) == "white"
    assert ink_on(np.array([0.99, 0.9, 0.2, 1.0])) == "black"


@pytest.mark.parametrize(
    ("setting", "label"),
    [
        ("grid.gap_px", "gap (px)"),
        ("warmup_epochs", "warmup (epochs)"),
        ("optimizer.lr", "lr"),
    ],
)
def test_axes_have_units(setting: str, label: str) -> None:
    assert axis_label(setting) == label


def test_the_same_figure_has_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        with style():
            figure = Figure()
            figure.subplots().plot([0, 1], [1, 0], label="$x$ and $y$")
        files = save(figure, tmp_path / name, "figure")
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]
    assert b"%PDF" in contents[0][2]
    assert b"<svg" in contents[0][1]
