from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from relloc.data.folder import FolderImages
from relloc.errors import UnreadableImage
from relloc.transfer.metrics.class_answers import (
    ClassExamples,
    Example,
    caption,
    draw_ap_by_class,
    draw_examples,
    strongest_answers,
)

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def test_the_strongest_answers_leave_out_images_that_do_not_count() -> None:
    probabilities = np.array([0.99, 0.2, 0.7, 0.9, 0.6, 0.05])
    positive = np.array([False, True, True, False, False, True])
    counted = np.array([False, True, True, True, True, True])
    examples = strongest_answers(probabilities, positive, counted, [10, 11, 12, 13, 14, 15])
    assert examples == ClassExamples(
        found=Example(image=12, probability=0.7, is_positive=True),
        false=Example(image=13, probability=0.9, is_positive=False),
        missed=Example(image=15, probability=0.05, is_positive=True),
    )
    assert examples.found is not None
    assert examples.found.is_right
    assert examples.false is not None
    assert not examples.false.is_right
    all_positive = np.ones(6, dtype=bool)
    assert strongest_answers(probabilities, all_positive, counted, range(6)).false is None
    none = strongest_answers(probabilities, ~all_positive, counted, range(6))
    assert (none.found, none.missed) == (None, None)


def test_bars_are_average_precisions_with_the_best_class_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *to, **how: (figures.append(self), save(self, *to, **how))
    )
    precisions = {"cat": 0.25, "dog": 0.755, "sofa": 0.5}
    counts = {"cat": 1200, "dog": 3, "sofa": 1}
    draw_ap_by_class(precisions, counts, tmp_path / "ap.png", title="three classes")
    axis = figures[0].axes[0]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([75.5, 50, 25])
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["dog (3)", "sofa (1)", "cat (1,200)"]
    assert [text.get_text() for text in axis.texts] == ["75.5", "50.0", "25.0"]
    assert axis.yaxis_inverted()
    with Image.open(tmp_path / "ap.png") as image:
        assert image.format == "PNG"


class OfOneColor(FolderImages):
    """Images of a green that has the number of the image in it; the file of image 9 is gone."""

    def read(self, index: int) -> Image.Image:
        if index == 9:
            raise UnreadableImage("it was removed")
        return Image.new("RGB", (40, 30), (0, 255, index))


def test_examples_are_drawn_with_frames_of_right_and_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = ImageDraw.ImageDraw.text

    def keep(pen: ImageDraw.ImageDraw, where: Any, text: str, **how: Any) -> None:
        written.append(text)
        write(pen, where, text, **how)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", keep)
    paths = [f"/voc/JPEGImages/00{number}.jpg" for number in range(10)]
    images = OfOneColor(name="voc", split="test", paths=paths)

    def example(image: int, probability: float, *, is_positive: bool) -> Example:
        return Example(image=image, probability=probability, is_positive=is_positive)

    found = example(1, 0.9, is_positive=True)
    false = example(2, 0.8, is_positive=False)
    missed = example(3, 0.1, is_positive=True)
    examples = {
        "cat": ClassExamples(found=found, false=false, missed=missed),
        "dog": ClassExamples(
            found=found,
            false=example(4, 0.4, is_positive=False),
            missed=example(9, 0.3, is_positive=True),
        ),
        "sofa": ClassExamples(found=None, false=None, missed=None),
    }
    draw_examples(examples, images, tmp_path / "examples.png", title="three classes")
    with Image.open(tmp_path / "examples.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    # Each image is drawn, with its own color: that of cat and dog twice, that of the removed not.
    shown = pixels[(pixels[:, :, 0] == 0) & (pixels[:, :, 1] == 255)]
    blues, areas = np.unique(shown[:, 2], return_counts=True)
    assert blues.tolist() == [1, 2, 3, 4]
    assert areas[0] == 2 * areas[1] == 2 * areas[2] == 2 * areas[3]
    # Frames: found twice and a low probability without the class are right, three others wrong.
    n_blue = (pixels == BLUE).all(axis=2).sum()
    n_orange = (pixels == ORANGE).all(axis=2).sum()
    assert n_blue == n_orange > 1000
    # An image is found by the name of its file.
    assert {"80 %  002.jpg", "10 %  003.jpg", "30 %  009.jpg"} <= set(written)


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ("/data/000012.jpg", "000012.jpg"),
        ("shard-000.tar/2008_000012.jpg", "_000012.jpg"),
        ("/data/" + 30 * "w" + "12.jpg", "w12.jpg"),
        ("a b", "a b"),
    ],
)
def test_the_end_of_a_name_is_written_where_all_of_it_is_too_wide(source: str, kept: str) -> None:
    text = caption(1.0, source)
    assert text.startswith("100 %  ")
    assert text.endswith(kept)
    assert ImageFont.load_default(13).getlength(text) <= 132
