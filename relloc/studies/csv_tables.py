"""Writes tables of studies as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from relloc.files import write_whole
from relloc.reports.as_csv import as_text


def write_table(header: Sequence[str], lines: Iterable[Sequence[object]], path: Path) -> None:
    """Writes a CSV file, which replaces an earlier one as a whole."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for line in lines:
        # Names of images and classes may look like formulas to a spreadsheet.
        writer.writerow([as_text(value) for value in line])
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names of files may have bytes that are no UTF-8.
    write_whole(path, text.getvalue().encode("utf-8", "surrogateescape"))
