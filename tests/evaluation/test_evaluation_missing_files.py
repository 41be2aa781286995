"""Files that are missing or cut off, and annotations of no use, are counted before a training."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from annotated_sets import (
    annotation_file,
    write_cityscapes,
    write_coco,
    write_proposals,
    write_text,
    write_voc,
    write_voc_masks,
)
from PIL import Image

from relloc.data.annotated_folders import ClassMapFolder
from relloc.data.cityscapes import cityscapes
from relloc.data.coco import coco
from relloc.data.image_set import Splits
from relloc.data.images import ends_whole
from relloc.data.unusable import unusable_images
from relloc.data.voc_masks import voc_segmentation
from relloc.data.voc_objects import voc_detection
from relloc.data.voc_proposals import voc_with_proposals
from relloc.errors import DataError
from relloc.evaluation.contract import Context, Evaluation, Kind, NamedEvaluation
from relloc.features.source import EncodeConfig


class Unmeasured(Evaluation):
    labels = "own"
    layers = ()
    version = 1

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def run(self, context: Context):
        del context
        return iter(())


def of_voc(root: Path) -> Splits:
    return voc_detection(
        root=str(write_voc(root)),
        years=[2007, 2012],
        train="trainval",
        held_out="test",
        held_out_year=2007,
        reference="mmdet",
    )


def of_proposals(root: Path) -> Splits:
    return voc_with_proposals(
        root=str(write_voc(root)),
        proposals=str(write_proposals(root / "proposals")),
        year=2007,
        train="trainval",
        held_out="test",
    )


def of_voc_masks(root: Path) -> Splits:
    write_voc_masks(root, aug=True)
    return voc_segmentation(name="v", root=str(root), train="train", held_out="val", aug="aug")


def of_coco(root: Path) -> Splits:
    write_coco(root)
    return coco(name="coco", root=str(root), train="train2017", held_out="val2017")


def listed_cityscapes(root: Path) -> Splits:
    return cityscapes(name="cityscapes", root=str(root), train="train", held_out="val")


def of_cityscapes(root: Path) -> Splits:
    return listed_cityscapes(write_cityscapes(root))


def check(splits: Splits, *, share: float = 0, kind: Kind = "fine-tuned", workers: int = 0) -> None:
    config = EncodeConfig(
        batch=2,
        workers=workers,
        device=torch.device("cpu"),
        precision="fp32",
        unreadable_share=share,
    )
    NamedEvaluation(name="some", evaluation=Unmeasured(kind), splits=splits).check_files(config)


DATA_SETS = [of_voc, of_proposals, of_voc_masks, of_coco, of_cityscapes]


@pytest.mark.parametrize("data_set", DATA_SETS)
@pytest.mark.parametrize("role", ["train", "held_out"])
def test_missing_images_are_counted(
    tmp_path: Path, data_set: Callable[[Path], Splits], role: str
) -> None:
    splits = data_set(tmp_path)
    check(splits)
    images = splits.train if role == "train" else splits.held_out
    n = len(images)
    # All but the last, and the only one where there is no other.
    lost = [images.source(index) for index in range(max(n - 1, 1))]
    for path in lost:
        Path(path).unlink()
    told = f"{len(lost)} of {n} images .*unreadable_share=0 .*{re.escape(lost[0])}"
    with pytest.raises(DataError, match=told):
        check(splits)
    # As many as the user allows are no error, and frozen evaluations notice soon enough.
    check(splits, share=len(lost) / n)
    check(splits, kind="frozen")


def test_images_of_cityscapes_are_missed_where_only_their_masks_are(tmp_path: Path) -> None:
    splits = of_cityscapes(tmp_path)
    Path(splits.train.source(0)).unlink()
    again = listed_cityscapes(tmp_path)
    assert len(again.train) == len(splits.train) == 2
    assert again.train.source(0) == splits.train.source(0)
    with pytest.raises(DataError, match=r"1 of 2 images"):
        check(again)


def test_annotations_of_no_use_count_with_them(tmp_path: Path) -> None:
    write_voc(tmp_path)
    write_text(annotation_file(tmp_path), "<annotation>")
    splits = voc_detection(
        root=str(tmp_path),
        years=[2007, 2012],
        train="trainval",
        held_out="test",
        held_out_year=2007,
        reference="mmdet",
    )
    with pytest.raises(DataError, match="1 of 3 images .*is not XML"):
        check(splits)
    Path(splits.train.source(1)).unlink()
    with pytest.raises(DataError, match="2 of 3 images"):
        check(splits, share=0.34)


def test_the_share_is_that_of_the_data_set_of_the_evaluation(tmp_path: Path) -> None:
    splits = of_coco(tmp_path)
    Path(splits.train.source(0)).unlink()
    named = NamedEvaluation(
        name="some", evaluation=Unmeasured("fine-tuned"), splits=splits, unreadable_share=0.2
    )
    run = EncodeConfig(
        batch=2, workers=0, device=torch.device("cpu"), precision="fp32", unreadable_share=1
    )
    with pytest.raises(DataError, match=r"eval\.some\.data\.unreadable_share=0\.2"):
        named.check_files(run)


@pytest.mark.parametrize("data_set", DATA_SETS)
@pytest.mark.parametrize("role", ["train", "held_out"])
def test_truncated_images_are_counted(
    tmp_path: Path, data_set: Callable[[Path], Splits], role: str
) -> None:
    splits = data_set(tmp_path)
    images = splits.train if role == "train" else splits.held_out
    path = Path(images.source(0))
    # Images of Cityscapes are PNG, the others JPEG.
    cut_off(path)
    told = f"1 of {len(images)} images .*unreadable_share=0 .*{re.escape(str(path))}"
    with pytest.raises(DataError, match=told):
        check(splits)
    with pytest.raises(DataError, match=told):
        check(splits, workers=1)
    check(splits, share=1 / len(images))


@pytest.mark.parametrize("data_set", [of_voc_masks, of_cityscapes])
def test_truncated_masks_count_with_their_images(
    tmp_path: Path, data_set: Callable[[Path], Splits]
) -> None:
    images = data_set(tmp_path).held_out
    assert isinstance(images, ClassMapFolder)
    cut_off(Path(images.mask_paths[0]))
    told = f"{re.escape(images.source(0))}: its mask {re.escape(images.mask_paths[0])}"
    with pytest.raises(DataError, match=told):
        check(Splits(train=images, held_out=images))


@pytest.mark.parametrize("data_set", [of_voc, of_cityscapes])
def test_bytes_behind_an_image_are_no_damage(
    tmp_path: Path, data_set: Callable[[Path], Splits]
) -> None:
    splits = data_set(tmp_path)
    path = Path(splits.held_out.source(0))
    whole = path.read_bytes()
    assert ends_whole(str(path))
    path.write_bytes(whole + b"appended by a camera")
    assert not ends_whole(str(path))
    check(splits)
    # An image of another format has another end.
    Image.open(path).save(path.with_suffix(".bmp"))
    path.with_suffix(".bmp").rename(path)
    assert not ends_whole(str(path))
    check(splits)


def test_only_files_with_an_unusual_end_are_decoded(tmp_path: Path) -> None:
    splits = of_voc(tmp_path)
    shown = []

    @contextlib.contextmanager
    def progress(what: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        shown.append((what.split()[0], total, done))
        yield lambda _done, _text: None

    with Path(splits.train.source(1)).open("ab") as file:
        file.write(b"\0")
    assert unusable_images(splits.train, workers=0, progress=progress) == {}
    assert shown == [("check", 3, 0), ("decode", 1, 0)]


def cut_off(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
