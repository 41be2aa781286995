import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from relloc.transfer.metrics.class_confusion import most_confused, save_class_confusion


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *to, **how: (figures.append(self), save(self, *to, **how))
    )
    return figures


def percent(figure: Figure) -> np.ndarray:
    """The numbers behind the colors of the cells; nan for those that are empty."""
    return np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)


def names_of(figure: Figure) -> tuple[list[str], list[str]]:
    matrix = figure.axes[0]
    rows = [label.get_text() for label in matrix.get_yticklabels()]
    columns = [label.get_text() for label in matrix.get_xticklabels()]
    return rows, columns


def table(folder: Path) -> list[list[str]]:
    with (folder / "confusion.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_confusion_is_in_percent_of_the_true_class(tmp_path: Path, drawn: list[Figure]) -> None:
    counts = torch.tensor([[30, 10, 0], [0, 0, 0], [1, 0, 999]])
    (tmp_path / "confusion.png").write_bytes(b"the picture of an earlier test")
    save_class_confusion(counts, ["a", "b", "c, d"], tmp_path, title="three classes")
    (figure,) = drawn
    expected = [[75, 25, 0], [np.nan] * 3, [0.1, 0, 99.9]]
    np.testing.assert_allclose(percent(figure), expected)
    assert [text.get_text() for text in figure.axes[0].texts] == ["75", "25", "100"]
    assert names_of(figure) == (["a", "b", "c, d"],) * 2
    with Image.open(tmp_path / "confusion.png") as image:
        assert image.format == "PNG"
    assert table(tmp_path) == [
        ["true class", "a", "b", "c, d"],
        ["a", "30", "10", "0"],
        ["b", "0", "0", "0"],
        ["c, d", "1", "0", "999"],
    ]


def test_of_many_classes_the_most_confused_are_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    names = [f"class {number}" for number in range(80)]
    # Of every third class ten objects are found, five are taken for the next class, one is missed.
    # The classes between them have many objects, all of them right. The last row and column are
    # those of no object.
    counts = torch.zeros(81, 81, dtype=torch.int64)
    confused = range(0, 36, 3)
    for number in range(80):
        counts[number, number] = 1000
    for number in confused:
        counts[number, number] = 10
        counts[number, number + 1] = 5
        counts[number, 80] = 1
    # A class that is left out takes objects as well.
    counts[0, 79] = 4
    counts[80, 3] = 8
    counts[80, 79] = 2
    save_class_confusion(counts, names, tmp_path, title="many")

    shown = [number for first in confused for number in (first, first + 1)]
    rows, columns = names_of(drawn[0])
    assert rows == [*(names[number] for number in shown), "none"]
    assert columns == [*rows[:-1], "other classes", "none"]
    cells = percent(drawn[0])
    assert cells.shape == (25, 26)
    # Percentages are of all objects of a class, also of those that another class takes.
    np.testing.assert_allclose(cells[0, [0, 1, -2, -1]], [50, 25, 20, 5])
    np.testing.assert_allclose(np.nansum(cells, axis=1), 100)
    np.testing.assert_allclose(cells[-1, [2, -2, -1]], [80, 20, 0])
    bold = {text.get_position() for text in drawn[0].axes[0].texts if text.get_weight() == "bold"}
    assert bold == {(number, number) for number in range(24)}
    # A screen shows it in full size.
    with Image.open(tmp_path / "confusion.png") as image:
        assert max(image.size) < 1500
    lines = table(tmp_path)
    assert [line[0] for line in lines[1:]] == [*names, "none"]
    assert [[int(cell) for cell in line[1:]] for line in lines[1:]] == counts.tolist()


def test_where_few_classes_are_confused_frequent_ones_follow() -> None:
    counts = np.diag([5, 0, 9, 7, 1, 2])
    counts[1, 4] = 1
    assert most_confused(counts, 4) == [1, 2, 3, 4]
    assert most_confused(counts, 1) == [1]
    assert most_confused(counts, 6) == list(range(6))
    # Objects that a detector misses count as well.
    missed = np.concatenate([np.zeros((4, 4), dtype=int), [[0], [3], [0], [1]]], axis=1)
    assert most_confused(missed, 2) == [1, 3]


@pytest.mark.parametrize("shape", [(4, 4), (1, 1), (2, 3)])
def test_another_number_of_classes_is_an_error(tmp_path: Path, shape: tuple[int, int]) -> None:
    counts = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match="2 classes"):
        save_class_confusion(counts, ["a", "b"], tmp_path, title="two")
    assert not list(tmp_path.iterdir())
