import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relloc.data.json_lists import read_lists
from relloc.errors import DataError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def lists_of(path: Path, *names: str) -> dict[str, list[Any]]:
    """The entries of some lists; their places have to be 0, 1, 2 …"""
    found: dict[str, list[Any]] = {name: [] for name in names}

    def take(name: str, place: int, value: Any) -> None:
        assert place == len(found[name])
        found[name].append(value)

    handlers = {name: lambda place, value, name=name: take(name, place, value) for name in names}
    read_lists(path, handlers, "Get it")
    return found


@given(
    st.lists(values, max_size=5), st.lists(values, max_size=5), values, st.sampled_from([None, 1])
)
def test_entries_are_those_of_json_load(
    tmp_path_factory: pytest.TempPathFactory,
    first: list[Any],
    second: list[Any],
    other: Any,
    indent: int | None,
):
    path = tmp_path_factory.mktemp("json") / "a.json"
    content = {"info": other, "first": first, "more": {"first": [1]}, "second": second}
    path.write_text(f" \n{json.dumps(content, indent=indent)}\n")
    assert lists_of(path, "first", "second") == {"first": first, "second": second}


def test_a_cut_off_file_says_where_wherever_it_is_cut(tmp_path: Path):
    text = json.dumps({"info": "x", "images": [{"id": 1}, {"id": 23}], "annotations": []})
    path = tmp_path / "a.json"
    for end in range(len(text)):
        path.write_text(text[:end])
        with pytest.raises(DataError, match=r"a\.json is (cut off|not JSON)"):
            lists_of(path, "images")
    path.write_text(text[: text.index("23")])
    with pytest.raises(DataError, match="cut off after .* characters in images, after 1 entries"):
        lists_of(path, "images")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<!DOCTYPE html>\n<html>", "line 1 column 1.*'<!DOCTYPE html>"),
        ('{"images": [1,\n 2 3]}', "line 2 column 4 in images, after 2 entries"),
        ('{"images": [1,]}', "line 1 column 15 in images"),
        ('{"images": {}}', "is missing"),
        ('{"images": []} {}', "goes on after its end"),
        ('{"images" []}', ": is missing"),
        ("[1]", "{ is missing"),
        ('{"images": [' + "[" * 200_000 + "]}", "not JSON"),
        ('{"categories": []}', "has no list images"),
        ("", "cut off after 0 characters"),
    ],
)
def test_other_content_is_told(tmp_path: Path, text: str, problem: str):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        lists_of(path, "images")


def test_a_missing_file_and_a_zip_are_told(tmp_path: Path):
    with pytest.raises(DataError, match="is missing.*Get it"):
        lists_of(tmp_path / "a.json", "images")
    (tmp_path / "a.json").write_bytes(b"PK\x03\x04\x14\x00\xff\xfe")
    with pytest.raises(DataError, match="not JSON at line 1 column 1"):
        lists_of(tmp_path / "a.json", "images")
