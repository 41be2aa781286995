"""Reads the lists in a large JSON file entry by entry, without ever holding all entries as objects.

COCO's annotations of its training images are 449 MB of JSON, which `json.load` turns into several
gigabytes of Python objects.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from relloc.errors import DataError, reason
from relloc.files import read_text

# What JSON takes for space, which is less than what Python does.
_SPACE = re.compile(r"[ \t\n\r]*")
_UNPACK = "Unpack or download it again"
# How much of a file's beginning a message shows.
_SHOWN = 20


# Takes the place of an entry in its list (from 0), and its value.
_Handler = Callable[[int, Any], None]


def read_lists(path: Path, handlers: Mapping[str, _Handler], advice: str) -> None:
    """Calls a handler with the place (from 0) and the value of each entry of some lists.

    `handlers` has the names of lists in the JSON object of the file. Whatever else the object holds
    is passed over. `advice` is for a file that is missing.

    Raises:
        DataError: the file is missing, is cut off or no JSON object, or lacks one of the lists.
    """
    text = read_text(path, advice)
    reader = _Reader(path, text)
    reader.read(handlers)


class _Reader:
    """Walks through the text of a JSON file."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.text = text
        self.decoder = json.JSONDecoder()
        # Where the next token begins, and for messages what is being read.
        self.position = 0
        self.where = ""
        self._skip_space()

    def read(self, handlers: Mapping[str, _Handler]) -> None:
        """Reads the JSON object of the whole file."""
        # A dict, and not a set, so that messages name lists in their order.
        missing = dict.fromkeys(handlers)
        self._expect("{")
        while self._next() != "}":
            name = self._value()
            self._expect(":")
            if name in handlers:
                self._read_list(name, handlers[name])
                missing.pop(name, None)
            else:
                # Its value is passed over.
                self._value()
            self._end_of_entry("}")
        self._expect("}")
        # What follows may be a second copy, or the rest of an older, longer file.
        if self.position < len(self.text):
            self._fail("goes on after its end")
        if missing:
            named = ", ".join(missing)
            raise DataError(f"{self.path} is no annotation file: it has no list {named}. {_UNPACK}")

    def _read_list(self, name: str, handle: _Handler) -> None:
        """Reads one list, handing over each entry."""
        self._expect("[")
        count = 0
        self.where = f" in {name}"
        while self._next() != "]":
            # Each entry is freed as soon as it was handled.
            handle(count, self._value())
            count += 1
            self.where = f" in {name}, after {count} entries"
            self._end_of_entry("]")
        self._expect("]")
        self.where = ""

    def _value(self) -> Any:
        """Returns the value at the current position, and goes on behind it."""
        try:
            value, self.position = self.decoder.raw_decode(self.text, self.position)
        except json.JSONDecodeError as error:
            # A string without end goes on to the end of the file.
            is_unterminated = error.msg.startswith("Unterminated string")
            self.position = len(self.text) if is_unterminated else error.pos
            self._fail(error.msg.removesuffix(" starting at"))
        except (ValueError, RecursionError) as error:
            self._fail(reason(error))
        self._skip_space()
        return value

    def _next(self) -> str:
        """Returns the character at the current position; nothing at the end."""
        # A slice, as an index would raise at the end.
        end = self.position + 1
        return self.text[self.position : end]

    def _expect(self, token: str) -> None:
        """Goes on behind a token that has to be here."""
        if self._next() != token:
            self._fail(f"{token} is missing")
        self.position += 1
        self._skip_space()

    def _end_of_entry(self, closing: str) -> None:
        """Goes on behind the comma after an entry; the last entry has none."""
        if self._next() == closing:
            return
        self._expect(",")
        if self._next() == closing:
            self._fail("a value is missing")

    def _skip_space(self) -> None:
        matched = _SPACE.match(self.text, self.position)
        if matched:
            self.position = matched.end()

    def _fail(self, why: str) -> None:
        """Raises a `DataError` that says where and why the text is not JSON."""
        # Whatever is missing at the end, the file is too short: that is what the user can mend.
        end_of_content = len(self.text.rstrip())
        if self.position >= end_of_content:
            problem = f"is cut off after {len(self.text):,} characters{self.where}"
        else:
            # Lines and columns are counted from 1, as editors do.
            line = self.text.count("\n", 0, self.position) + 1
            line_start = self.text.rfind("\n", 0, self.position) + 1
            column = self.position - line_start + 1
            problem = f"is not JSON at line {line} column {column}{self.where}"
            # A page of HTML, or an archive, shows by its beginning.
            if self.position == 0:
                problem += f" (it begins with {self.text[:_SHOWN]!r})"
        raise DataError(f"{self.path} {problem}: {why}. {_UNPACK}")
