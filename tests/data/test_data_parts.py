from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relloc.data.folder import FolderImages
from relloc.data.image_set import ROLES, Splits
from relloc.data.parts import about_part, as_json, names, records_of, save_part, spans
from relloc.errors import DataError


def listed(split: str, paths: list[str]) -> FolderImages:
    return FolderImages(name="mine", split=split, paths=paths)


def numbered(n_train: int, n_held_out: int) -> Splits:
    paths = [f"/x/{number}.jpg" for number in range(max(n_train, n_held_out))]
    return Splits(
        train=listed("train", paths[:n_train]), held_out=listed("val", paths[:n_held_out])
    )


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50))
def test_spans_hold_each_image_once_in_order(n_train: int, n_held_out: int, length: int) -> None:
    found = spans(numbered(n_train, n_held_out), length)
    for role, n in zip(ROLES, (n_train, n_held_out), strict=True):
        mine = [span for span in found if span.role == role]
        assert [index for span in mine for index in range(span.start, span.stop)] == list(range(n))
        assert all(span.start == span.number * length and len(span) <= length for span in mine)
        assert len({span.stem for span in found}) == len(found)


def test_splits_of_one_name_are_refused() -> None:
    with pytest.raises(DataError, match="both splits of mine are called train"):
        spans(
            Splits(train=listed("train", ["/x/1.jpg"]), held_out=listed("train", ["/x/2.jpg"])), 5
        )


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/a/b/c/1.jpg", "/a/b/d/2.jpg"], ["c/1.jpg", "d/2.jpg"]),
        (["/a/b/1.jpg", "/a/b/2.jpg"], ["1.jpg", "2.jpg"]),
        (["/one/1.jpg", "/two/1.jpg"], ["one/1.jpg", "two/1.jpg"]),
        (["/a/bc/1.jpg", "/a/bd/../b/1.jpg"], ["bc/1.jpg", "b/1.jpg"]),
    ],
)
def test_files_are_called_by_their_path_below_what_holds_them_all(
    paths: list[str], expected: list[str]
) -> None:
    assert names(listed("train", paths)) == expected


def test_parts_come_back_in_order_and_are_finished_once_said_so(tmp_path: Path) -> None:
    parts = spans(numbered(5, 1), 2)[:3]
    for span in reversed(parts):
        assert about_part(tmp_path, span) is None
        save_part(
            tmp_path, span, np.arange(span.start, span.stop), {"stem": span.stem, "unreadable": {}}
        )
    assert records_of(tmp_path, parts).tolist() == [0, 1, 2, 3, 4]
    assert about_part(tmp_path, parts[1]) == {"stem": "train-000001", "unreadable": {}}


def test_json_holds_any_file_name() -> None:
    assert as_json({"a\udce9\n写": 1}).isascii()
