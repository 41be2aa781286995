"""Tests tables of studies: names that look like formulas, names without UTF-8, and replacing."""

import csv
from pathlib import Path

from relloc.studies.csv_tables import write_table


def test_a_table_is_written_as_text_and_replaces_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    write_table(["class", "percent"], [("=1+1", -2.5), ("a,b", 3)], path)
    with open(path, encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["class", "percent"], ["'=1+1", "-2.5"], ["a,b", "3"]]
    write_table(["image"], [("x\udcff.jpg",)], path)
    first, second = path.read_bytes().splitlines()
    assert first == b"image"
    assert second.startswith(b"x")
    assert second.endswith(b".jpg")
