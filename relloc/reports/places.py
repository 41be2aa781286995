"""Where a number stands: in which section, column and kind of line of the tables."""

import dataclasses
import functools
import re
from collections.abc import Iterator

from relloc.results import LAYERS

FEATURES: tuple[str, ...] = LAYERS[:5]
AVGPOOL = LAYERS[5]
CHOSEN = "chosen without the test set"
BEST_LAYER = "best layer"
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
NEIGHBORS = (10, 20, 100, 200)
_BOXES = tuple(f"{what} {metric}" for what in ("box", "mask") for metric in ("AP", "AP50", "AP75"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A table of the card: on which images (data set, split), its evaluations, and the columns that each fills.

    `elsewhere` is the title on other images, `built` says whether relloc has these evaluations.
    """

    title: str
    elsewhere: str
    images: tuple[str, str]
    columns: dict[str, tuple[str, ...]]
    built: bool = True

    @property
    def all_columns(self) -> tuple[str, ...]:
        return tuple(column for columns in self.columns.values() for column in columns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """`setting` names a line of its own: what is not as published, or the layer of nearest neighbors.

    So does `images`, on the card, where several sets of images have the name of the published ones.
    """

    section: str
    column: str
    setting: str = ""
    images: str = ""

    @property
    def words(self) -> str:
        """What a line's label says of both."""
        return ", ".join(filter(None, (self.setting, self.images)))

    @property
    def as_published(self) -> bool:
        """Whether it is a cell of the card, on its images."""
        return self.setting in ("", AVGPOOL)


_VOC, _IN1K, _COCO = ("voc2007", "test"), ("in1k", "val"), ("coco2017", "val")
SECTIONS = (
    Section(
        title="VOC07 linear SVM, mAP",
        elsewhere="Linear SVM by the VOC07 protocol, mAP",
        images=_VOC,
        columns={"voc07_svm": (BEST_LAYER, *FEATURES)},
    ),
    Section(
        title="VOC07 low-shot SVM, mAP",
        elsewhere="Low-shot SVM by the VOC07 protocol, mAP",
        images=_VOC,
        columns={"voc07_low_shot": tuple(f"k={k}" for k in SHOTS)},
    ),
    Section(
        title="ImageNet linear, top-1",
        elsewhere="Linear by the ImageNet protocol, top-1",
        images=_IN1K,
        columns={"linear_in1k": FEATURES, "linear_avgpool": ("avgpool",)},
    ),
    Section(
        title="Places205 linear, top-1",
        elsewhere="Linear by the Places205 protocol, top-1",
        images=("places205", "val"),
        columns={"linear_places205": FEATURES},
    ),
    Section(
        title="iNaturalist 2018 linear, top-1",
        elsewhere="Linear by the iNaturalist 2018 protocol, top-1",
        images=("inat18", "val"),
        columns={"linear_inat18": FEATURES},
    ),
    Section(
        title="Nearest neighbors, top-1",
        elsewhere="Nearest neighbors, top-1",
        images=_IN1K,
        columns={"knn": tuple(f"k={k}" for k in NEIGHBORS)},
    ),
    Section(
        title="ImageNet, fine-tuned on 1 % and 10 % of its labels",
        elsewhere="Fine-tuned on 1 % and 10 % of the labels by the ImageNet protocol",
        images=_IN1K,
        columns={f"semisup_{part}": (f"{part} % top-1", f"{part} % top-5") for part in (1, 10)},
    ),
    Section(
        title="VOC07+12 detection",
        elsewhere="Detection by the VOC07+12 protocol",
        images=_VOC,
        columns={"voc0712_detection": ("AP50", "AP", "AP75")},
        built=False,
    ),
    Section(
        title="COCO, Mask R-CNN FPN 1x",
        elsewhere="Mask R-CNN FPN 1x by the COCO protocol",
        images=_COCO,
        columns={"coco_mask_rcnn_fpn_1x": _BOXES},
        built=False,
    ),
    Section(
        title="COCO, Mask R-CNN C4 2x",
        elsewhere="Mask R-CNN C4 2x by the COCO protocol",
        images=_COCO,
        columns={"coco_mask_rcnn_c4_2x": _BOXES},
        built=False,
    ),
    Section(
        title="VOC12aug segmentation, FCN",
        elsewhere="Segmentation, FCN by the VOC12aug protocol",
        images=("voc2012", "val"),
        columns={"voc12aug_fcn": ("mIoU",)},
        built=False,
    ),
)
SECTION_OF = {evaluation: section.title for section in SECTIONS for evaluation in section.columns}
IMAGES_OF = {evaluation: section.images for section in SECTIONS for evaluation in section.columns}

# evaluation, metric -> column, setting; the first that fits. A column "" means: in no table, a detail of others
_RULES = (
    ("voc07_svm", "map", "{layer}", ""),
    ("voc07_svm", "map_best", BEST_LAYER, ""),
    ("voc07_svm", "map_best_cv", BEST_LAYER, CHOSEN),
    ("voc07_svm", "map_cv", "", ""),
    ("voc07_low_shot", r"map_k(?P<k>\d+)", "k={k}", ""),
    ("voc07_low_shot", r"map_k(?P<k>\d+)_cv", "k={k}", CHOSEN),
    ("voc07_low_shot", ".*", "", ""),
    ("linear_avgpool", "top1_best", "avgpool", ""),
    ("linear_avgpool", "top1", "avgpool", "last epoch"),
    ("linear_.*", "top1", "{layer}", ""),
    ("linear_.*", "top1_tuned", "{layer}", CHOSEN),
    ("knn", r"top1_k(?P<k>\d+)", "k={k}", "{layer}"),
    (r"semisup_(?P<part>\d+)", r"top(?P<top>\d)", "{part} % top-{top}", ""),
    (r"semisup_(?P<part>\d+)", r"top(?P<top>\d)_tuned", "{part} % top-{top}", CHOSEN),
    ("voc0712_detection", r"ap(?P<at>\d*)", "AP{at}", ""),
    ("coco_.*", r"(?P<what>box|mask)_ap(?P<at>\d*)", "{what} AP{at}", ""),
    ("voc12aug_fcn", "miou", "mIoU", ""),
    ("label_free", "rankme", "{layer}", "RankMe"),
    ("label_free", "alpha_req", "{layer}", "alpha-ReQ"),
    ("pretext", "top1", "held out", ""),
    (".*", "top1", "{layer}", ""),
    (".*", "(?P<metric>.*)", "{layer}", "{metric}"),
)
_TITLES = {"label_free": "Label-free measures", "pretext": "Pretext accuracy, top-1"}


@functools.cache
def place(evaluation: str, layer: str, metric: str) -> Place | None:
    """Where a number stands; None if it only is a detail of others."""
    column, setting, words = next(_fitting(evaluation, metric))
    if not column:
        return None
    column, setting = column.format(layer=layer, **words), setting.format(layer=layer, **words)
    return Place(section=section_title(evaluation), column=column, setting=setting)


def _fitting(evaluation: str, metric: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    for of_evaluation, of_metric, column, setting in _RULES:
        named, measured = re.fullmatch(of_evaluation, evaluation), re.fullmatch(of_metric, metric)
        if named and measured:
            yield column, setting, named.groupdict() | measured.groupdict()


def section_title(evaluation: str) -> str:
    """The title of the table that has an evaluation; its own name if the card has none."""
    return SECTION_OF.get(evaluation) or _TITLES.get(evaluation, evaluation)


def column_order(columns: set[str], section: str) -> list[str]:
    """Columns as the card has them, then others: layers in their order, `k=…` by size."""
    of_card = next((each.all_columns for each in SECTIONS if each.title == section), ())
    return sorted(columns, key=lambda name: _rank(name, (*of_card, *LAYERS)))


def _rank(name: str, known: tuple[str, ...]) -> tuple[int, str]:
    if name.startswith("k="):
        return int(name[2:]), name
    return known.index(name) if name in known else len(known), name
