"""Eight real images of each data set, read from a split of their own by the package's readers."""

import json
import shutil
from pathlib import Path

from archives import unpack_real_images

from relloc.data.coco import coco
from relloc.data.image_set import Splits
from relloc.data.lists import voc
from relloc.data.voc_masks import voc_segmentation
from relloc.data.voc_objects import voc_detection

# Two of each are portraits, which are among the last four, as tests of small networks take these
# alone. Their objects are large enough for a small network on small images.
_VOC_IMAGES = (
    *("2007_000256", "2007_000876", "2007_001595", "2007_002611"),
    *("2007_004423", "2007_001397", "2007_006585", "2007_009709"),
)
# Without bicycles, whose masks are thinner than the cells of a small map.
_VOC_MASKS = (
    *("2007_000256", "2007_000876", "2007_001595", "2007_002611"),
    *("2007_004423", "2007_005264", "2007_006704", "2007_009709"),
)
_COCO_IMAGES = (24577, 144941, 173350, 213148, 30, 370, 436, 491)
_SPLIT = "eight"


def voc_objects(folder: Path, n: int = 8) -> Splits:
    """Returns the last `n` images with boxes. Both splits are the same, as in all these sets."""
    splits = voc_detection(
        root=str(_voc(folder, n)),
        years=[2012],
        train=_SPLIT,
        held_out="test",
        held_out_year=2012,
        reference="mmdet",
    )
    return _tested_on_what_is_trained(splits, n)


def voc_masks(folder: Path, n: int = 8) -> Splits:
    """Returns the last `n` images with class maps."""
    splits = voc_segmentation(
        name="voc2012", root=str(_voc(folder, n)), train=_SPLIT, held_out="val", aug=None
    )
    return _tested_on_what_is_trained(splits, n)


def voc_presence(folder: Path) -> Splits:
    """Returns the images with the classes that they show."""
    root = str(_voc(folder))
    splits = voc(name="voc2012", root=root, year=2012, train=_SPLIT, held_out="test")
    return _tested_on_what_is_trained(splits)


def coco_objects(folder: Path, n: int = 8) -> Splits:
    """Returns the last `n` images with boxes and masks."""
    root = unpack_real_images("coco_tiny", folder)
    annotations = root / "annotations"
    content = json.loads((annotations / "instances_train2017.json").read_text())
    chosen_ids = _COCO_IMAGES[-n:]
    images = [image for image in content["images"] if image["id"] in chosen_ids]
    objects = [each for each in content["annotations"] if each["image_id"] in chosen_ids]
    chosen = {**content, "images": images, "annotations": objects}
    (annotations / f"instances_{_SPLIT}.json").write_text(json.dumps(chosen))
    (root / _SPLIT).mkdir()
    for image in images:
        shutil.copy(root / "train2017" / image["file_name"], root / _SPLIT)
    splits = coco(name="coco2017", root=str(root), train=_SPLIT, held_out="val2017")
    return _tested_on_what_is_trained(splits, n)


def _tested_on_what_is_trained(splits: Splits, n: int = 8) -> Splits:
    assert len(splits.train) == n
    return Splits(train=splits.train, held_out=splits.train)


def _voc(folder: Path, n: int = 8) -> Path:
    """Unpacks VOC, and writes the list of the last `n` images for each kind of annotation."""
    root = unpack_real_images("voc_tiny", folder)
    for kind, names in (("Main", _VOC_IMAGES), ("Segmentation", _VOC_MASKS)):
        path = root / "VOCdevkit" / "VOC2012" / "ImageSets" / kind / f"{_SPLIT}.txt"
        path.write_text("\n".join(names[-n:]))
    return root
