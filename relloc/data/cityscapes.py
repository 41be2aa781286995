"""Cityscapes for segmentation: 19 classes of the finely annotated images of 50 cities."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from relloc.data.annotated_folders import ClassMapFolder, require_masks
from relloc.data.annotations import VOID
from relloc.data.folder import require_root, require_some_of
from relloc.data.image_set import Splits, warn_of_other_counts
from relloc.errors import DataError, UnreadableImage

_HOLDING = (
    "Cityscapes (leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, unpacked into one "
    "folder), from the Cityscapes site"
)
_IMAGE = "_leftImg8bit.png"
_TRAIN_IDS = "_gtFine_labelTrainIds.png"
_LABEL_IDS = "_gtFine_labelIds.png"
# The labels that are evaluated, in the order of their classes: the columns id and trainId of
# cityscapesScripts' helpers/labels.py.
_LABELS = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
CLASSES = tuple(_LABELS.values())
_LARGEST_LABEL = 33


def _class_of_label() -> UInt8[np.ndarray, "256"]:
    """Returns the class of each label; `VOID` for those that are not evaluated."""
    # A table of all values of a byte turns a whole mask at once.
    class_of = np.full(256, VOID, np.uint8)
    class_of[list(_LABELS)] = np.arange(len(_LABELS))
    return class_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class CityscapesImages(ClassMapFolder):
    """Images of Cityscapes, with class maps made of labelIds where labelTrainIds are missing."""

    def class_map(self, index: int) -> UInt8[np.ndarray, "h w"]:
        path = self.mask_paths[index]
        # Files labelTrainIds hold the numbers of classes already.
        if not path.endswith(_LABEL_IDS):
            return super().class_map(index)
        labels = self.mask_values(index)
        # License plates have the label -1, which some tools write as 255.
        is_wrong = (labels > _LARGEST_LABEL) & (labels != VOID)
        wrong = labels[is_wrong]
        if wrong.size:
            raise UnreadableImage(
                f"its mask {path} has the label {wrong[0]}; labels of Cityscapes are 0 to "
                f"{_LARGEST_LABEL}"
            )
        return _class_of_label()[labels]


def cityscapes(
    *,
    name: str,
    root: str | None,
    train: str,
    held_out: str,
    published_images: Mapping[str, int] | None = None,
) -> Splits:
    """Returns Cityscapes with the class of each pixel; 255 counts for none.

    `train` and `held_out` are folders of leftImg8bit and gtFine below `root`. The masks are the
    files labelTrainIds that cityscapesScripts makes. Where one is missing its class map is computed
    from labelIds, which the download has, by the same table. An image of which there is only a mask
    is listed too, and can't be read.

    Raises:
        DataError: a folder or mask is missing, or a folder holds no images.

    Example:
        >>> cityscapes(name="cityscapes", root="/data/cityscapes", train="train", held_out="val")
    """
    base = require_root(root, _HOLDING)
    require_some_of(base, ["leftImg8bit", "gtFine"], _HOLDING)
    train_images, n_train_converted = _split(name, base, train)
    held_out_images, n_held_out_converted = _split(name, base, held_out)
    n_converted = n_train_converted + n_held_out_converted
    # The user is told, as files that scripts make should be there.
    remarks = ()
    if n_converted:
        n_images = len(train_images) + len(held_out_images)
        remarks = (
            f"{n_converted} of {n_images} class maps are computed from labelIds, since their "
            "labelTrainIds are missing",
        )
    splits = Splits(
        train=train_images,
        held_out=held_out_images,
        remarks=remarks,
        published_images=published_images or {},
    )
    warn_of_other_counts(splits)
    return splits


def _split(name: str, base: Path, split: str) -> tuple[CityscapesImages, int]:
    """Returns the images of a split, and how many class maps are computed from labelIds."""
    folder = base / "leftImg8bit" / split
    masks = base / "gtFine" / split
    for needed in (folder, masks):
        if not needed.is_dir():
            raise DataError(f"{needed} is missing: data.root is to hold {_HOLDING}")
    found = set(folder.glob(f"*/*{_IMAGE}"))
    if not found:
        raise DataError(f"{folder} holds no images CITY/*{_IMAGE}: unpack the archive again")
    # Listing folders is faster than asking for each file, above all on a file server.
    mask_files = list(masks.glob("*/*.png"))
    existing = {path.name for path in mask_files}
    # An image whose mask is there was lost when its archive was unpacked: it counts as unreadable.
    for mask in mask_files:
        for suffix in (_TRAIN_IDS, _LABEL_IDS):
            if mask.name.endswith(suffix):
                stem = mask.name.removesuffix(suffix)
                found.add(folder / mask.parent.name / f"{stem}{_IMAGE}")
    # Sorted, as file systems list files in any order, which training and results would depend on.
    images = sorted(found)
    mask_paths = []
    n_converted = 0
    for image in images:
        stem = image.name.removesuffix(_IMAGE)
        suffix = _TRAIN_IDS
        # Where neither is there, labelTrainIds is what messages name as missing.
        has_train_ids = stem + _TRAIN_IDS in existing
        has_label_ids = stem + _LABEL_IDS in existing
        if has_label_ids and not has_train_ids:
            suffix = _LABEL_IDS
            n_converted += 1
        city_folder = masks / image.parent.name
        mask_paths.append(f"{city_folder}/{stem}{suffix}")
    require_masks(f"{name} {split}", mask_paths)
    of_split = CityscapesImages(
        name=name,
        split=split,
        paths=[str(image) for image in images],
        classes=CLASSES,
        mask_paths=mask_paths,
        modes=("L",),
    )
    return of_split, n_converted
