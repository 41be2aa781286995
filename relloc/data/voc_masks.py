"""PASCAL VOC 2012 for segmentation, with the further masks of SBD where they are there.

The published protocol (docs/protocols.md 3.10) trains on 1,464 images with VOC's own masks and on
9,118 more with masks of SBD (Hariharan et al. 2011), which mmsegmentation's converter writes into
SegmentationClassAug.
"""

from collections.abc import Mapping
from pathlib import Path

from relloc.data.annotated_folders import ClassMapFolder, require_masks
from relloc.data.image_set import Splits
from relloc.data.lists import VOC_CLASSES, checked_splits, voc_devkit, voc_list
from relloc.errors import DataError

# VOC's masks number the background, too.
CLASSES = ("background", *VOC_CLASSES)
_HOLDING = (
    "the PASCAL VOC2012 development kit (the archive of trainval), from the PASCAL VOC site, and "
    "for the published training set also masks of SBD (docs/transfer.md)"
)
# The masks of VOC are palette files; those that converters make of SBD are gray.
_MODES = ("P", "L")
_YEAR = 2012


def voc_segmentation(
    *,
    name: str,
    root: str | None,
    train: str,
    held_out: str,
    aug: str | None,
    published_images: Mapping[str, int] | None = None,
) -> Splits:
    """Returns PASCAL VOC 2012 with the class of each pixel: 0 is background, 255 counts for none.

    `train` and `held_out` are the names of lists in ImageSets/Segmentation. If the folder
    SegmentationClassAug exists, the training split has the images of the list `aug` besides, with
    masks of that folder; without such a list all its images that no other list names. `aug=None`
    leaves them out.

    Raises:
        DataError: a folder, list or mask is missing, one is empty, or both splits have the same
            image.

    Example:
        >>> voc_segmentation(name="voc2012", root="/data", train="train", held_out="val", aug="aug")
    """
    devkit = voc_devkit(root, _YEAR, holding=_HOLDING)
    masks = devkit / "SegmentationClass"
    image_folder = devkit / "JPEGImages"
    if not masks.is_dir():
        raise DataError(
            f"{masks} is missing: it holds the masks of VOC{_YEAR} trainval. Unpack its archive "
            "again"
        )
    train_names = voc_list(devkit, "Segmentation", train)
    held_out_names = voc_list(devkit, "Segmentation", held_out)
    train_masks = [f"{masks}/{image}.png" for image in train_names]
    held_out_masks = [f"{masks}/{image}.png" for image in held_out_names]

    # The masks of SBD are trained on where they are; what was done is told to the user, as results
    # of either kind are published.
    more_masks = devkit / "SegmentationClassAug"
    if aug is None:
        remark = f"{train}: masks of VOC alone, as data.source.aug is null"
    elif not more_masks.is_dir():
        remark = (
            f"{train}: masks of VOC alone, as {more_masks} does not exist; the published protocol "
            "trains on those of SBD, too (mmsegmentation's tools/convert_datasets/voc_aug.py)"
        )
    else:
        own_names = train_names + held_out_names
        more_names, listed_by = _more_names(devkit, aug, more_masks, own_names)
        train_names = train_names + more_names
        train_masks += [f"{more_masks}/{image}.png" for image in more_names]
        remark = (
            f"{train}: {len(more_names)} of {len(train_names)} images have masks of "
            f"{more_masks.name}, listed by {listed_by}"
        )

    images = []
    lists = []
    for split, names, mask_paths in (
        (train, train_names, train_masks),
        (held_out, held_out_names, held_out_masks),
    ):
        of_split = ClassMapFolder(
            name=name,
            split=split,
            paths=[f"{image_folder}/{image}.jpg" for image in names],
            classes=CLASSES,
            mask_paths=mask_paths,
            modes=_MODES,
            palette=voc_colors(),
        )
        images.append(of_split)
        lists.append(devkit / "ImageSets" / "Segmentation" / f"{split}.txt")
    splits = checked_splits(images, lists, published_images, remarks=(remark,))
    # Wrong lists are told first: they may name images that have no masks.
    for of_split in images:
        require_masks(f"{name} {of_split.split}", of_split.mask_paths)
    return splits


def _more_names(devkit: Path, aug: str, masks: Path, others: list[str]) -> tuple[list[str], str]:
    """Returns the images that masks of SBD are added for, and what names them.

    The copy of SegmentationClassAug that is passed around since DeepLab comes without aug.txt, and
    has masks of VOC's own images, too.
    """
    # A list decides, if there is one.
    path = devkit / "ImageSets" / "Segmentation" / f"{aug}.txt"
    if path.exists():
        return voc_list(devkit, "Segmentation", aug), path.name
    # Masks of images that the other lists name are VOC's own, or those to test on.
    in_folder = {mask.stem for mask in masks.glob("*.png")}
    names = sorted(in_folder - set(others))
    if not names:
        raise DataError(
            f"{masks} holds no masks of further images: unpack it again, or leave it out by "
            "data.source.aug=null"
        )
    return names, f"the folder, as {path.name} is missing"


def voc_colors() -> dict[tuple[int, int, int], int]:
    """Returns the numbers of VOC's classes by their colors, of the colormap in VOC's toolkit.

    The bits of a number go to red, green and blue in turn, from the highest bit of each down.
    """
    number_of = {}
    # Void has a color of its own, too.
    for number in (*range(len(CLASSES)), 255):
        channels = [0, 0, 0]
        for position in range(24):
            bit = number >> position & 1
            # Bit 0 is the highest bit of red, bit 1 that of green, bit 2 that of blue.
            channel = position % 3
            target_position = 7 - position // 3
            channels[channel] |= bit << target_position
        red, green, blue = channels
        number_of[red, green, blue] = number
    return number_of
