"""Proposals of selective search for VOC2007, in the files that fast-rcnn gives."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotated_sets import (
    HEIGHT,
    VOC_PROPOSALS,
    WIDTH,
    annotation_file,
    checked,
    write_proposals,
    write_text,
    write_voc,
)
from scipy.io import savemat

from relloc.data.annotations import ProposedImages
from relloc.data.voc_proposals import voc_with_proposals
from relloc.errors import DataError, MissingData

SETTINGS: dict[str, Any] = {"year": 2007, "train": "trainval", "held_out": "test"}


def splits_of(root: Path, proposals: Path | None, **changes: Any):
    given = None if proposals is None else str(proposals)
    return voc_with_proposals(root=str(root), proposals=given, **{**SETTINGS, **changes})


def read_with(root: Path, **cells: Any):
    write_voc(root)
    return splits_of(root, write_proposals(root / "boxes", **cells))


@pytest.mark.parametrize("dtype", [np.uint16, np.float64])
def test_proposals_are_read_in_the_order_x_y_and_counted_from_0(tmp_path: Path, dtype: Any):
    both = [np.array(VOC_PROPOSALS, dtype), np.array([(2, 5, 4, 9)], dtype)]
    splits = read_with(tmp_path, trainval=both)
    train: Any = splits.train
    assert isinstance(train, ProposedImages)
    expected = [[10, 20, 30, 60], [0, 0, WIDTH - 1, HEIGHT - 1], [39, 29, 59, 49]]
    assert train.proposals(0).tolist() == expected
    assert train.proposals(1).tolist() == [[4, 1, 8, 3]]
    assert train.proposals(0).dtype == np.float32
    # The object has the same box as the first proposal: all coordinates are 1 less.
    assert train.objects(0).boxes.tolist() == expected[:1]
    assert (train.name, train.split, splits.held_out.split) == ("voc2007", "trainval", "test")
    assert checked(splits).train.objects == 2


def test_the_folder_above_the_unpacked_archive_will_do(tmp_path: Path):
    write_voc(tmp_path)
    write_proposals(tmp_path / "selective_search_data")
    assert len(splits_of(tmp_path, tmp_path).train) == 2


def test_an_image_may_have_no_proposals(tmp_path: Path):
    train: Any = read_with(tmp_path, trainval=[np.zeros((0, 0)), np.ones((1, 4))]).train
    assert train.proposals(0).shape == (0, 4)
    assert train.proposals(1).tolist() == [[0, 0, 0, 0]]


def test_proposals_are_a_part_of_what_identifies_the_set(tmp_path: Path):
    digests = set()
    for number, moved in enumerate((0, 0, 1)):
        boxes = np.array(VOC_PROPOSALS, np.uint16)
        boxes[2] += moved
        root = tmp_path / str(number)
        digests.add(read_with(root, trainval=[boxes, boxes]).train.digest())
    assert len(digests) == 2


def test_where_proposals_are_not_given_the_setting_and_the_variable_are_named(tmp_path: Path):
    write_voc(tmp_path)
    with pytest.raises(MissingData, match=r"data\.proposals.*RELLOC_VOC_PROPOSALS"):
        splits_of(tmp_path, None)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    write_voc(tmp_path)
    folder = write_proposals(tmp_path / "boxes")
    (folder / "voc_2007_test.mat").unlink()
    with pytest.raises(DataError, match=r"voc_2007_test\.mat is missing: data\.proposals="):
        splits_of(tmp_path, folder)


INSIDE = np.array(VOC_PROPOSALS, np.int16)


def with_row(*row: float) -> np.ndarray:
    return np.array([VOC_PROPOSALS[0], row], np.float64)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([INSIDE], "proposals for 1 images.* has 2 images"),
        ([INSIDE] * 3, "proposals for 3 images.* has 2 images"),
        ([INSIDE[:, :3], INSIDE], r"000005.jpg are int16 of the shape \(3, 3\)"),
        ([INSIDE, "boxes"], r"000007.jpg are <U5"),
        ([INSIDE, with_row(1, 1, HEIGHT + 1, 9)], rf"proposal 2 of .*000007.jpg.*{HEIGHT + 1}, 9"),
        ([INSIDE, with_row(1, 1, 9, WIDTH + 1)], rf"9, {WIDTH + 1}, .*{WIDTH} x {HEIGHT} px"),
        ([INSIDE, with_row(0, 1, 9, 9)], "proposal 2 of .* is y1, x1, y2, x2 = 0, 1, 9, 9"),
        ([INSIDE, with_row(9, 9, 8, 9)], "proposal 2 of .* is y1, x1, y2, x2 = 9, 9, 8, 9"),
        ([INSIDE, with_row(1, 1, np.nan, 9)], "proposal 2 of .* nan"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, cells: Any, words: str):
    with pytest.raises(DataError, match=rf"voc_2007_trainval\.mat.*{words}") as caught:
        read_with(tmp_path, trainval=cells)
    assert not isinstance(caught.value, MissingData)


SQUARE_OF_CELLS = np.full((2, 2), "", dtype=object)


def file_of(root: Path) -> Path:
    write_voc(root)
    return write_proposals(root / "boxes") / "voc_2007_trainval.mat"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"proposals": np.ones((1, 4))}, "no variable boxes, but proposals"),
        ({"boxes": np.ones((2, 4))}, r"float64 of the shape \(2, 4\)"),
        ({"boxes": SQUARE_OF_CELLS}, r"of the shape \(2, 2\)"),
    ],
)
def test_a_file_with_other_content_is_named(tmp_path: Path, content: Any, words: str):
    path = file_of(tmp_path)
    savemat(path, content)
    with pytest.raises(DataError, match=rf"voc_2007_trainval\.mat.*{words}"):
        splits_of(tmp_path, path.parent)


def test_a_file_of_version_7_3_is_told_from_a_damaged_one(tmp_path: Path):
    path = file_of(tmp_path)
    whole = path.read_bytes()
    # The header of MATLAB's version 7.3: the text, then the version 2.0, then HDF5.
    header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM"
    path.write_bytes(header.ljust(512, b"\0") + b"\x89HDF\r\n\x1a\n")
    with pytest.raises(DataError, match=r"7\.3.*-v7"):
        splits_of(tmp_path, path.parent)
    for damaged in (b"", b"PK\x03\x04", whole[:60], whole[:200], whole[:250], b"\0" * 4096):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"voc_2007_trainval\.mat"):
            splits_of(tmp_path, path.parent)


def test_boxes_of_an_image_with_a_wrong_annotation_are_not_compared_with_its_size(tmp_path: Path):
    write_voc(tmp_path)
    write_text(annotation_file(tmp_path), "")
    folder = write_proposals(tmp_path / "boxes", trainval=[with_row(1, 1, 999, 999), INSIDE])
    train: Any = splits_of(tmp_path, folder).train
    assert set(train.unusable()) == {0}


def test_other_counts_than_published_are_a_warning(tmp_path: Path):
    published = {"trainval": 5011, "test": 4952}
    write_voc(tmp_path)
    folder = write_proposals(tmp_path / "boxes")
    with pytest.warns(UserWarning, match="the published set"):
        splits_of(tmp_path, folder, published_images=published)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits_of(tmp_path, folder)
