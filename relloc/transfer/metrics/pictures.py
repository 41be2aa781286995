"""Draws what detectors and segmenters found: objects and class maps.

Pictures are PNG files. One that is there already is replaced as a whole, since a tracker may be
reading it.
"""

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from relloc.data.annotations import VOID, Objects, decode_mask
from relloc.files import writing
from relloc.transfer.detections import Detections

Rgb = tuple[int, int, int]
Pixels = UInt8[np.ndarray, "h w 3"]
ClassMap = UInt8[np.ndarray, "h w"]

# The share of a mask's color in the pixels that it covers.
_MASK_OPACITY = 0.5
# Images are enlarged by a whole number so that their longer side has at least so many pixels:
# names of objects would cover smaller ones.
_LEAST_SIDE = 480
_TEXT_SIZE = 14
_FIRST_CHANNEL_BIT = 7  # the highest bit of a color channel
_GAP = 8  # between panels, and around texts
_STRIP = _TEXT_SIZE + 2 * _GAP  # height of a line of titles or of the legend
_WHITE: Rgb = (255, 255, 255)
_BLACK: Rgb = (0, 0, 0)
# On colors that are brighter than this, of 255, black text is easier to read than white.
_BRIGHT = 140
# Steps of the hue that keep the colors of any number of classes apart: the golden ratio.
_HUE_STEP = (math.sqrt(5) - 1) / 2


def draw_detections(
    image: Pixels,
    detected: Detections,
    class_names: Sequence[str],
    path: Path,
    *,
    truth: Objects | None = None,
    least_score: float = 0.3,
) -> None:
    """Saves a picture of the objects that were found, with their classes, scores and masks.

    Args:
        image: RGB pixels of the original image.
        detected: the objects, in pixels of the image.
        class_names: names by class.
        path: where the picture is saved.
        truth: the annotated objects, drawn beside if they are given.
        least_score: objects with a lower score are left out.
    """
    scores = detected.scores.float().cpu().numpy()
    # The surest objects are drawn last, over the others.
    by_score = np.argsort(scores, kind="stable")
    is_shown = scores[by_score] >= least_score
    shown = by_score[is_shown]
    classes = detected.classes.cpu().numpy()[shown]
    boxes = detected.boxes.float().cpu().numpy()[shown]
    labels = []
    for number, score in zip(classes, scores[shown], strict=True):
        name = class_names[number]
        labels.append(f"{name} {score:.2f}")
    masks = None
    if detected.masks is not None:
        masks = detected.masks.bool().cpu().numpy()[shown]
    found = _with_objects(image, boxes, classes, labels, masks)
    panels = [(f"found, score {least_score:g} or more", found)]

    if truth is not None:
        true_labels = []
        for number, is_difficult in zip(truth.classes, truth.difficult, strict=True):
            name = class_names[number]
            if is_difficult:
                name = f"{name} (difficult)"
            true_labels.append(name)
        true_masks = _true_masks(truth, image)
        true = _with_objects(image, truth.boxes, truth.classes, true_labels, true_masks)
        panels.append(("annotated", true))
    picture = _side_by_side(panels)
    _save(picture, path)


def draw_class_maps(
    image: Pixels,
    predicted: ClassMap,
    truth: ClassMap,
    class_names: Sequence[str],
    path: Path,
) -> None:
    """Saves a picture of an image, its true class map and the predicted one, side by side.

    Classes have the colors of PASCAL VOC's masks, void its cream color.

    Args:
        image: RGB pixels of the original image.
        predicted: the predicted class of each pixel.
        truth: the true class of each pixel, or 255 for void.
        class_names: names by class.
        path: where the picture is saved.
    """
    palette = voc_palette()
    panels = [
        ("image", _enlarged(image)),
        ("true", _enlarged(palette[truth])),
        ("predicted", _enlarged(palette[predicted])),
    ]
    # The legend names only the classes that are in the picture.
    entries = []
    for number in np.union1d(predicted, truth).tolist():
        name = "void" if number == VOID else class_names[number]
        color = _rgb(palette[number])
        entries.append((name, color))
    maps = _side_by_side(panels)
    legend = _legend(entries, maps.width)
    picture = _above(maps, legend)
    _save(picture, path)


def voc_palette() -> UInt8[np.ndarray, "256 3"]:
    """Returns the colors of PASCAL VOC's class maps (VOClabelcolormap.m of its development kit).

    The three lowest bits of a number are the highest bits of red, green and blue, the next three
    the second highest, and so on.
    """
    numbers = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for digit in range(3):
        for channel in range(3):
            source_bit = 3 * digit + channel
            target_bit = _FIRST_CHANNEL_BIT - digit
            bit = (numbers >> source_bit) & 1
            palette[:, channel] |= (bit << target_bit).astype(np.uint8)
    return palette


def _true_masks(truth: Objects, image: Pixels) -> Bool[np.ndarray, "n h w"] | None:
    """Returns the masks of annotated objects, or None for a set without masks."""
    if not truth.masks:
        return None
    height, width = image.shape[:2]
    masks = [decode_mask(mask, height, width) for mask in truth.masks]
    return np.array(masks, dtype=bool)


def _with_objects(
    image: Pixels,
    boxes: Float[np.ndarray, "n 4"],
    classes: Int[np.ndarray, "n"],
    labels: Sequence[str],
    masks: Bool[np.ndarray, "n h w"] | None,
) -> Image.Image:
    """Returns an image with its objects drawn on it, the last one on top."""
    # Masks of objects of one class overlap, so each object has its own color; boxes do without.
    color_numbers = classes
    if masks is not None:
        color_numbers = np.arange(len(boxes))
    colors = [_object_color(number) for number in color_numbers.tolist()]
    pixels = image
    if masks is not None:
        # Where masks overlap, only the last one is seen: several colors would hide the image.
        painted = image.copy()
        for color, mask in zip(colors, masks, strict=True):
            painted[mask] = color
        blend = (1 - _MASK_OPACITY) * image + _MASK_OPACITY * painted
        pixels = blend.round().astype(np.uint8)
    # Lines and texts are drawn after the enlargement, so that they are not enlarged.
    picture = _enlarged(pixels)
    scale = picture.width / image.shape[1]
    corners = [_in_order(box) for box in boxes * scale]
    pen = ImageDraw.Draw(picture)
    for color, box in zip(colors, corners, strict=True):
        pen.rectangle(box, outline=color, width=2)
    # Labels after all boxes, so that no line crosses a text.
    for color, box, label in zip(colors, corners, labels, strict=True):
        _write_label(pen, picture, box, label, color)
    return picture


def _in_order(box: np.ndarray) -> tuple[float, float, float, float]:
    """Returns a box whose upper left corner comes first, which a network does not ensure."""
    x1, y1, x2, y2 = box.tolist()
    return x1, y1, max(x1, x2), max(y1, y2)


def _write_label(
    pen: ImageDraw.ImageDraw,
    picture: Image.Image,
    box: tuple[float, float, float, float],
    label: str,
    color: Rgb,
) -> None:
    """Writes a label above a box, or into it where there is no room above."""
    font = ImageFont.load_default(_TEXT_SIZE)
    # Room for the text and a margin around it.
    width = math.ceil(font.getlength(label)) + 6
    height = _TEXT_SIZE + 4
    box_left, box_top, _, _ = box
    last_left = picture.width - width
    left = min(max(box_left, 0), last_left)
    top = max(box_top, 0)
    if box_top >= height:
        top = box_top - height
    background = (left, top, left + width, top + height)
    pen.rectangle(background, fill=color)
    # The anchor is the text's left end, in the middle of its height.
    text_at = (left + 3, top + height / 2)
    pen.text(text_at, label, fill=_text_color(color), font=font, anchor="lm")


def _enlarged(pixels: Pixels) -> Image.Image:
    """Returns the pixels as an image that is large enough to write on."""
    longer_side = max(pixels.shape[:2])
    factor = max(1, math.ceil(_LEAST_SIDE / longer_side))
    # Pixels are repeated, not interpolated, which would give class maps colors of no class.
    higher = pixels.repeat(factor, axis=0)
    enlarged = higher.repeat(factor, axis=1)
    return Image.fromarray(enlarged)


def _side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Returns images of one size beside each other, each below its title."""
    _, first = panels[0]
    panel_width = first.width + _GAP
    width = _GAP + len(panels) * panel_width
    height = _STRIP + first.height + _GAP
    canvas = Image.new("RGB", (width, height), _WHITE)
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(_TEXT_SIZE)
    for number, (title, image) in enumerate(panels):
        left = _GAP + number * panel_width
        title_at = (left, _STRIP / 2)
        pen.text(title_at, title, fill=_BLACK, font=font, anchor="lm")
        canvas.paste(image, (left, _STRIP))
    return canvas


def _legend(entries: Sequence[tuple[str, Rgb]], width: int) -> Image.Image:
    """Returns names with their colors, in as many lines as the width asks for."""
    font = ImageFont.load_default(_TEXT_SIZE)
    # First where each entry stands, as the number of lines is the height of the image.
    positions = []
    left = _GAP
    top = 0
    for name, color in entries:
        text_width = math.ceil(font.getlength(name))
        # A square of the color, the name, and gaps.
        needed = _TEXT_SIZE + text_width + 3 * _GAP
        is_full = left + needed > width
        # A name that is wider than the image stands in a line of its own.
        if is_full and left > _GAP:
            left = _GAP
            top += _STRIP
        positions.append((left, top, name, color))
        left += needed
    canvas = Image.new("RGB", (width, top + _STRIP), _WHITE)
    pen = ImageDraw.Draw(canvas)
    for left, top, name, color in positions:
        swatch_top = top + _GAP
        swatch = (left, swatch_top, left + _TEXT_SIZE, swatch_top + _TEXT_SIZE)
        pen.rectangle(swatch, fill=color, outline=_BLACK)
        text_at = (left + _TEXT_SIZE + _GAP, top + _STRIP / 2)
        pen.text(text_at, name, fill=_BLACK, font=font, anchor="lm")
    return canvas


def _above(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Returns two images of one width, one above the other."""
    height = upper.height + lower.height
    canvas = Image.new("RGB", (upper.width, height), _WHITE)
    canvas.paste(upper, (0, 0))
    canvas.paste(lower, (0, upper.height))
    return canvas


def _save(picture: Image.Image, path: Path) -> None:
    with writing(path) as file:
        picture.save(file, format="png")


def _object_color(number: int) -> Rgb:
    """Returns the color with that number: bright, so that it is seen on dark images too."""
    hue = number * _HUE_STEP % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _text_color(background: Rgb) -> Rgb:
    """Returns black or white, whichever is easier to read on a background."""
    # Luma of ITU-R BT.601, in which green looks brightest.
    red, green, blue = background
    brightness = 0.299 * red + 0.587 * green + 0.114 * blue
    return _BLACK if brightness > _BRIGHT else _WHITE


def _rgb(color: UInt8[np.ndarray, "3"]) -> Rgb:
    red, green, blue = color.tolist()
    return red, green, blue
