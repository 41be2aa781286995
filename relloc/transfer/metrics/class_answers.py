"""Shows how well a classifier knows each class: average precision, and its strongest answers."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from relloc.data.image_set import ImageSet
from relloc.errors import UnreadableImage
from relloc.figures.style import category_looks, save_png, style
from relloc.files import writing

Rgb = tuple[int, int, int]

_INCHES_PER_BAR = 0.2
# Of the sheet of examples, in pixels: the side of an image, the gap around it, and its frame.
_SIDE, _GAP, _FRAME = 132, 6, 4
_TEXT_SIZE = 13
_LINE = _TEXT_SIZE + 5
_NAME_WIDTH = 110
_BLOCKS = 2  # of classes, side by side, so that the sheet fits a screen
_HEADINGS = ("has it, highest", "lacks it, highest", "has it, lowest")
_WHITE: Rgb = (255, 255, 255)
_BLACK: Rgb = (0, 0, 0)
_GRAY: Rgb = (225, 225, 225)
# Frames of images whose answer is right and wrong: of colors that color-blind readers tell apart.
_RIGHT: Rgb = (0, 114, 178)
_WRONG: Rgb = (213, 94, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """An image, by its number, and how probable a classifier finds the class there, from 0 to 1."""

    image: int
    probability: float
    is_positive: bool  # the image shows the class

    @property
    def is_right(self) -> bool:
        """Whether the answer is right, if it is yes from a half on."""
        return (self.probability >= 0.5) == self.is_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassExamples:
    """The strongest answers about one class; None where there is no such image.

    Attributes:
        found: the image with the class that the classifier is surest of.
        false: the image without it that the classifier takes it to be in most.
        missed: the image with the class that it is least sure of.
    """

    found: Example | None
    false: Example | None
    missed: Example | None


def strongest_answers(
    probabilities: Float[np.ndarray, "n"],
    positive: Bool[np.ndarray, "n"],
    counted: Bool[np.ndarray, "n"],
    images: Sequence[int],
) -> ClassExamples:
    """Returns the strongest right and wrong answers about one class.

    Args:
        probabilities: of the class, in each image, from 0 to 1.
        positive: whether each image shows the class.
        counted: false for images that say nothing of the class, such as VOC's difficult ones.
        images: their numbers, which examples name.
    """
    with_it = np.flatnonzero(positive & counted)
    without_it = np.flatnonzero(~positive & counted)

    def example(candidates: np.ndarray, *, highest: bool) -> Example | None:
        if not len(candidates):
            return None
        of_candidates = probabilities[candidates]
        best = of_candidates.argmax() if highest else of_candidates.argmin()
        place = int(candidates[best])
        return Example(
            image=images[place],
            probability=float(probabilities[place]),
            is_positive=bool(positive[place]),
        )

    return ClassExamples(
        found=example(with_it, highest=True),
        false=example(without_it, highest=True),
        missed=example(with_it, highest=False),
    )


def draw_ap_by_class(
    precisions: Mapping[str, float],
    counts: Mapping[str, int],
    path: Path,
    *,
    title: str,
) -> None:
    """Saves a bar chart of the average precision of each class, the best class on top.

    Args:
        precisions: from 0 to 1, by the name of the class.
        counts: numbers of images that show the class, which stand behind its name.
        path: where the picture is saved; an earlier one is replaced.
        title: what the picture is headed.
    """
    best_first = sorted(precisions, key=lambda name: -precisions[name])
    percent = [100 * precisions[name] for name in best_first]
    labels = [f"{name} ({counts[name]:,})" for name in best_first]
    height = max(2.0, len(best_first) * _INCHES_PER_BAR + 1)
    with style():
        figure = Figure(figsize=(5.5, height), layout="constrained")
        axis = figure.add_subplot()
        places = range(len(best_first))
        axis.barh(places, percent, color=category_looks(1)[0]["color"])
        axis.set_yticks(places, labels)
        axis.set_ylim(len(best_first) - 0.4, -0.6)
        # Fixed limits make pictures comparable; beyond 100 there is room for numbers.
        axis.set_xlim(0, 108)
        axis.set_xticks(range(0, 101, 20))
        axis.set_xlabel(
            "average precision, %; dashed: the mean; in brackets: images with the class"
        )
        axis.set_title(title)
        axis.grid(visible=False)
        mean = float(np.mean(percent))
        axis.axvline(mean, color="black", linestyle="--", linewidth=0.8, zorder=0)
        # A white ground keeps the line out of numbers.
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        for place, value in zip(places, percent, strict=True):
            axis.text(value + 0.8, place, f"{value:.1f}", va="center", fontsize=7, bbox=ground)
        save_png(figure, path)


def draw_examples(
    examples: Mapping[str, ClassExamples],
    images: ImageSet,
    path: Path,
    *,
    title: str,
) -> None:
    """Saves a sheet of the strongest right and wrong answers about each class.

    Below an image stand the probability of the class and the name of the image's file. A frame is
    blue where the answer is right, and orange where it is wrong.

    Args:
        examples: by the name of the class.
        images: what the numbers of examples are of.
        path: where the picture is saved; an earlier one is replaced.
        title: what the picture is headed.
    """
    n_rows = -(-len(examples) // _BLOCKS)
    block_width = _NAME_WIDTH + len(_HEADINGS) * (_SIDE + _GAP) + 2 * _GAP
    row_height = _SIDE + _LINE + _GAP
    # The title, what frames mean, and the headings of the columns.
    top = 3 * _LINE + 2 * _GAP
    sheet = Image.new("RGB", (_BLOCKS * block_width, top + n_rows * row_height), _WHITE)
    pen = ImageDraw.Draw(sheet)
    _write(pen, (_GAP, _LINE // 2 + _GAP), title)
    _write_key(pen, top=_LINE + _GAP)

    for block in range(_BLOCKS):
        for column, heading in enumerate(_HEADINGS):
            left = block * block_width + _NAME_WIDTH + column * (_SIDE + _GAP)
            _write(pen, (left, top - _LINE // 2 - _GAP // 2), heading)
    for number, (name, of_class) in enumerate(examples.items()):
        block, row = divmod(number, n_rows)
        left = block * block_width
        upper = top + row * row_height
        _write(pen, (left + _GAP, upper + _SIDE // 2), name)
        for column, example in enumerate((of_class.found, of_class.false, of_class.missed)):
            cell_left = left + _NAME_WIDTH + column * (_SIDE + _GAP)
            _draw_example(sheet, pen, (cell_left, upper), example, images)
    with writing(path) as file:
        sheet.save(file, format="png")


def _draw_example(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    example: Example | None,
    images: ImageSet,
) -> None:
    """Draws an image into its cell, with its frame, and the probability and its name below."""
    left, top = corner
    cell = (left, top, left + _SIDE - 1, top + _SIDE - 1)
    if example is None:
        pen.rectangle(cell, outline=_GRAY)
        return
    pen.rectangle(cell, fill=_RIGHT if example.is_right else _WRONG)
    inner = _SIDE - 2 * _FRAME
    try:
        image = images.read(example.image)
    except UnreadableImage:
        # It was read before, so that its file has changed since. The training is not lost for it.
        image = Image.new("RGB", (inner, inner), _GRAY)
    # The whole image, since the object may be at its border.
    fitted = ImageOps.pad(image.convert("RGB"), (inner, inner), color=_GRAY)
    sheet.paste(fitted, (left + _FRAME, top + _FRAME))
    text = caption(example.probability, images.source(example.image))
    _write(pen, (left, top + _SIDE + _LINE // 2), text)


def caption(probability: float, source: str) -> str:
    """Returns the probability in percent and the name of a file, as wide as an image at most.

    Of a long name the end is kept, since names of a data set often begin alike.
    """
    start = f"{100 * probability:.0f} %  "
    name = os.path.basename(source)
    text = start + name
    font = ImageFont.load_default(_TEXT_SIZE)
    while name and font.getlength(text) > _SIDE:
        name = name[1:]
        text = f"{start}…{name}"
    return text


def _write_key(pen: ImageDraw.ImageDraw, *, top: int) -> None:
    """Writes what the colors of frames mean."""
    left = _GAP
    for color, text in ((_RIGHT, "right, if yes from 50 % on"), (_WRONG, "wrong")):
        swatch_top = top + (_LINE - _TEXT_SIZE) // 2
        pen.rectangle((left, swatch_top, left + _TEXT_SIZE, swatch_top + _TEXT_SIZE), fill=color)
        left += _TEXT_SIZE + _GAP
        _write(pen, (left, top + _LINE // 2), text)
        font = ImageFont.load_default(_TEXT_SIZE)
        left += round(font.getlength(text)) + 4 * _GAP


def _write(pen: ImageDraw.ImageDraw, middle_left: tuple[int, int], text: str) -> None:
    font = ImageFont.load_default(_TEXT_SIZE)
    pen.text(middle_left, text, fill=_BLACK, font=font, anchor="lm")
