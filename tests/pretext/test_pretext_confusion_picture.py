import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from relloc.pretext.confusion_picture import draw_confusion

# Row i: 10 pairs at position i, i of them answered right, the rest taken for the next position.
COUNTS = torch.diag(torch.arange(8)) + torch.diag(10 - torch.arange(8)).roll(1, dims=1)


@pytest.fixture
def figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    saved: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *to, **how: (saved.append(self), save(self, *to, **how))
    )
    draw_confusion(COUNTS, tmp_path / "confusion.png", heading="after step 1,200", top1=35.0)
    return saved[0]


def test_the_picture_is_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "confusion.png"
    path.write_bytes(b"the picture of an earlier step")
    draw_confusion(COUNTS, path, heading="after step 7", top1=35.0)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(np.unique(np.asarray(image.convert("L")))) > 50  # not an empty sheet
    assert list(tmp_path.iterdir()) == [path]


def test_the_matrix_shows_percent_of_each_row_with_its_number(figure: Figure) -> None:
    matrix = figure.axes[0]
    percent = 10 * COUNTS
    assert np.allclose(matrix.images[0].get_array(), percent)
    assert [text.get_text() for text in matrix.texts] == [
        f"{value}" for value in percent.flatten().tolist()
    ]


def test_rows_and_columns_name_the_positions_in_the_order_of_the_labels(figure: Figure) -> None:
    words = ["up left", "up", "up right", "left", "right", "down left", "down", "down right"]
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    columns = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert [row.rpartition(" ")[0] for row in rows] == words
    assert [column.partition("\n")[2].replace("\n", " ") for column in columns] == words
    assert [row[-1] for row in rows] == [column[0] for column in columns] == list("↖↑↗←→↙↓↘")


def test_the_map_shows_each_position_where_it_lies(figure: Figure) -> None:
    shown = [text.get_text() for text in figure.axes[1].texts]
    assert shown == ["0.0", "10.0", "20.0", "30.0", "center", "40.0", "50.0", "60.0", "70.0"]
    values = np.ma.filled(figure.axes[1].images[0].get_array(), np.nan).flatten()
    assert np.array_equal(values, [0, 10, 20, 30, np.nan, 40, 50, 60, 70], equal_nan=True)


def test_the_title_says_step_accuracy_and_chance(figure: Figure) -> None:
    assert re.search(r"\b1,200\b.*\b35\.0 %.*\b80 .*\bchance 12\.5 %", figure.get_suptitle())
