"""A data set as settings name it: where its images come from, before anything is looked for."""

import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relloc import checks, ranks
from relloc.data.folder import FolderImages
from relloc.data.image_set import Splits, warn_of_other_counts
from relloc.data.lists import COUNTED_YEAR, MultiLabeled
from relloc.data.processes import without_progress
from relloc.data.shards import shards
from relloc.errors import DataError, UsageError
from relloc.runs import console

_LONGEST_NAME = 24  # characters, in the name of a run
# The environment variables that conf/data takes folders from, by the beginning of a data set's name
_VARIABLES = {
    "voc": "RELLOC_VOC",
    "in1k": "RELLOC_IN1K",
    "places205": "RELLOC_PLACES205",
    "inat18": "RELLOC_INAT18",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """The images that a member of conf/data names.

    `setting` is where users set them: data, or eval.NAME.data of what an evaluation brings. `source` is the call that
    lists the images, as settings have it, and `list_images` makes it; with `shards`, a folder that relloc.prepare
    packed, that is read instead. `unreadable_share` of the images may be broken.
    """

    setting: str
    name: str
    shards: str | None
    unreadable_share: float
    source: Mapping[str, Any]
    list_images: Callable[[], Splits] = dataclasses.field(compare=False)

    def __post_init__(self) -> None:
        checks.number(
            f"{self.setting}.unreadable_share", self.unreadable_share, at_least=0, at_most=1
        )

    @property
    def images(self) -> str:
        """The same text for the same images, whichever setting names them."""
        return repr((self.shards, self.source))

    @property
    def short_name(self) -> str:
        """What the data set is called; of `data=folder`, which is called alike everywhere, the folder's name."""
        place = self.shards or self.source.get("root")
        if self.name != "folder" or not place:
            return self.name[:_LONGEST_NAME]
        folders = [place] if isinstance(place, str) else place
        return "+".join(Path(str(folder)).resolve().name or "folder" for folder in folders)[
            :_LONGEST_NAME
        ]

    @property
    def what_is_missing(self) -> str:
        """What to give where nobody has said yet where the images are; "" where somebody has."""
        return "" if self.shards or self.source.get("root", "photos") else self.how_to_give

    @property
    def how_to_give(self) -> str:
        """What says where the images are."""
        return f"{self.setting}.root=FOLDER or {self._variable}"

    @property
    def _variable(self) -> str:
        """The environment variable that conf/data takes the folder from, where it is set."""
        return next(
            (_VARIABLES[name] for name in _VARIABLES if self.name.startswith(name)), "RELLOC_DATA"
        )

    @property
    def _place(self) -> str:
        """The folder as a setting, `data.shards=SHARDS`; "" for images that lie in none."""
        folder = self.shards or self.source.get("root")
        return f"{self.setting}.{'shards' if self.shards else 'root'}={folder}" if folder else ""

    def check_folders(self, made_by_jobs: Sequence[str]) -> None:
        """Raises `UsageError` where a folder is not there, and stands in none of the lines of a batch script either.

        A job may copy its data to its node's own disk.
        """
        if not self.shards and "root" not in self.source:
            return
        name = "shards" if self.shards else "root"
        folders = self.shards or self.source["root"]
        downloads = bool(not self.shards and self.source.get("download"))  # which makes the folder
        for folder in folders if isinstance(folders, list) else [folders]:
            if not folder:
                raise UsageError(f"{self.setting}.root is not set: give {self.setting}.root=FOLDER")
            is_made = downloads or any(str(folder) in line for line in made_by_jobs)
            if not is_made and not Path(str(folder)).is_dir():
                raise UsageError(f"{self.setting}.{name}={folder} is not a folder here")

    def read(self, *, identified: bool = True) -> Splits:
        """List the images, and say what was found. Rank 0 is first, so that one process downloads.

        They are `identified`, with progress shown, unless nobody will ask for their digest.
        """
        is_first = ranks.rank() == 0
        if not is_first:
            ranks.from_first("")
        try:
            found = shards(root=self.shards) if self.shards else self.list_images()
        except DataError as error:  # it knows of one data set a run only
            raise DataError(self._in_own_words(str(error))) from error
        if self.shards:
            self._warn_of_other_images(found)
        if is_first:
            ranks.from_first("")
            _say_found(found)
            if self.shards or self.setting != "data":  # what the command line need not say
                console.say(f"        {self._place}")
        if identified:
            _identify(found, shown=is_first)
        return found

    def _in_own_words(self, message: str) -> str:
        """A message about data.root or data.shards, with the setting of this data set, or the variable behind it."""
        message = re.sub(r"\bdata\.(?=root|shards)", f"{self.setting}.", message)
        variable = next(
            (name for name in (self._variable, "RELLOC_DATA") if os.environ.get(name)), ""
        )
        folder = self.shards or self.source.get("root")
        if variable and os.environ[variable] == folder:
            message = message.replace(self._place, f"{self._place} (by {variable})")
        return message

    def _warn_of_other_images(self, found: Splits) -> None:
        """Warn where packed images are not the published ones: whoever reads originals warns of that himself."""
        if (
            "published_images" not in self.source
            or self.source.get("year", COUNTED_YEAR) != COUNTED_YEAR
        ):
            return
        if found.train.name != self.name:
            warnings.warn(
                f"{self._place} holds images called {found.train.name}, not {self.name}: results name them so",
                stacklevel=3,
            )
        warn_of_other_counts(found, self.source["published_images"])


def _say_found(found: Splits) -> None:
    labels = f"{len(found.train.classes)} classes" if found.labeled else "no labels"
    if isinstance(found.train, MultiLabeled):
        labels = f"{len(found.train.classes)} classes, several an image"
    counts = f"{len(found.train)} images to train on, {len(found.held_out)} held out"
    console.say(f"data    {found.train.name}: {counts}, {labels}")
    for remark in found.remarks:
        console.say(f"        {remark}")


def _identify(found: Splits, *, shown: bool) -> None:
    """Make the digests now: a minute of reading files on a slow file server is not to look as if nothing happened."""
    for images in (found.train, found.held_out):
        if isinstance(images, FolderImages):
            bar = functools.partial(console.progress_if_long, f"identify {images.split}")
            images.digest(bar if shown else without_progress)
