from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relloc.data.folder import FolderImages
from relloc.data.image_set import ROLES, Splits
from relloc.data.parts import as_json, divide_into_parts, names, read_part, records_of, save_part
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
    found = divide_into_parts(numbered(n_train, n_held_out), length)
    for role, n in zip(ROLES, (n_train, n_held_out), strict=True):
        mine = [part for part in found if part.role == role]
        assert [index for part in mine for index in range(part.start, part.stop)] == list(range(n))
        assert all(part.start == part.number * length and len(part) <= length for part in mine)
        assert len({part.stem for part in found}) == len(found)


def test_splits_of_one_name_are_refused() -> None:
    with pytest.raises(DataError, match=r"\bmine\b.*\btrain\b"):
        divide_into_parts(
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
    parts = divide_into_parts(numbered(5, 1), 2)[:3]
    for part in reversed(parts):
        assert read_part(tmp_path, part) is None
        save_part(
            tmp_path, part, np.arange(part.start, part.stop), {"stem": part.stem, "unreadable": {}}
        )
    assert records_of(tmp_path, parts).tolist() == [0, 1, 2, 3, 4]
    assert read_part(tmp_path, parts[1]) == {"stem": "train-000001", "unreadable": {}}


def test_json_holds_any_file_name() -> None:
    assert as_json({"a\udce9\n写": 1}).isascii()
