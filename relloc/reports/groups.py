"""Which numbers share tables: those of the same images, seen in the same way."""

from relloc.reports.places import IMAGES_OF
from relloc.reports.published import PUBLISHED_IMAGES
from relloc.results import Result

CARD_GROUP = "The published card"
_CARD_VIEW = "center view 256/224 px"  # protocols.md 3.3 to 3.7
_VOC_VIEW = "whole image at short side 256 px squashed to 224 x 224 px"  # protocols.md 3.1, 3.2


def is_card(result: Result) -> bool:
    """Whether a number is of an evaluation of the card and of as many images as the published ones, named so."""
    images = (result.dataset, result.split)
    return IMAGES_OF.get(result.eval) == images and PUBLISHED_IMAGES[images] == result.n


def group_of(result: Result, images: str = "") -> str:
    """`CARD_GROUP`, or the data set, split, number of images, `images` if that is not enough, and view."""
    if is_card(result):
        return CARD_GROUP
    counted = "pairs" if result.eval == "pretext" else "images"
    words = (f"{result.dataset} {result.split}", f"{result.n:,} {counted}", images, view_of(result))
    return ", ".join(filter(None, words))


def view_of(result: Result) -> str:
    """How the images were seen, as the protocol has it (with the precision) before the batch norm; "" if it has not."""
    return result.view


def foreign_view(result: Result) -> str:
    """The view of a number of the card if it is not the published one, else ""."""
    view = view_of(result) if is_card(result) else ""
    published = _VOC_VIEW if result.eval.startswith("voc07") else _CARD_VIEW
    return "" if view == published else view
