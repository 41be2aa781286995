"""A data set as the settings name it, before any of its files are read."""

import copy
import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException

from relloc import checks, ranks
from relloc.data.annotations import ObjectImages, SegmentedImages
from relloc.data.folder import FolderImages
from relloc.data.image_set import Splits, warn_of_other_counts
from relloc.data.lists import COUNTED_YEAR, MultiLabeled
from relloc.data.processes import without_progress
from relloc.data.shards import shards
from relloc.data.unnamed import UNNAMED, called_after
from relloc.errors import DataError, MissingData, UsageError
from relloc.runs import console
from relloc.terminal import escaped, quantity

# Tells what to unpack where.
DATA_PAGE = "docs/evaluations.md, Data sets"
_LONGEST_NAME = 24  # characters, in the name of a run
# The environment variables that conf/data takes folders from, by the beginning of a data set's name
_VARIABLES = {
    "voc": "RELLOC_VOC",
    "in1k": "RELLOC_IN1K",
    "places205": "RELLOC_PLACES205",
    "inat18": "RELLOC_INAT18",
    "coco": "RELLOC_COCO",
    "cityscapes": "RELLOC_CITYSCAPES",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """The images that a member of conf/data names.

    `setting` is the name of the settings that choose them: `data`, or `eval.NAME.data` for a data
    set that an evaluation brings. `source` has the settings of the function that lists the images,
    and `list_images` calls it; if `shards` names a folder that relloc.prepare packed, that one is
    read instead. The share `unreadable_share` of the images may be broken.
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
        """A text that is equal for equal images, whichever setting names them."""
        return repr((self.shards, self.source))

    @property
    def short_name(self) -> str:
        """The name of the data set, of at most 24 characters.

        Since every `data=folder` has the same name, the name of the folder stands for it.
        """
        return self._called[:_LONGEST_NAME]

    @property
    def _called(self) -> str:
        """The name of the data set: `name`, or that of the folder if none was given."""
        root = self.shards or self.source.get("root")
        if self.name != UNNAMED or not root:
            return self.name
        return called_after(root)

    @property
    def missing_setting(self) -> str:
        """The setting that is missing if nothing says where the images are, else an empty text."""
        # A source without a root, such as the embedded photos, needs no folder.
        is_located = self.shards or self.source.get("root", "photos")
        return "" if is_located else self.how_to_give

    @property
    def holding(self) -> str:
        """What the folder of a data set is to hold that no setting says the place of.

        It is empty where the function that lists the images does not say it.
        """
        try:
            # Without a folder nothing is read: this is the first thing that a reader asks for.
            self.list_images()
        except MissingData as error:
            return error.holding
        except (UsageError, InstantiationException):
            # A reader of the user's own may answer in another way.
            return ""
        return ""

    @property
    def how_to_give(self) -> str:
        """The setting and the environment variable that say where the images are."""
        return f"{self.setting}.root=FOLDER or {self.variable}"

    @property
    def variable(self) -> str:
        """The environment variable that conf/data takes the folder from, where it is set."""
        for beginning, variable in _VARIABLES.items():
            if self.name.startswith(beginning):
                return variable
        return "RELLOC_DATA"

    @property
    def _location(self) -> str:
        """The folder as a setting, `data.root=FOLDER`; empty for images without a folder."""
        folder = self.shards or self.source.get("root")
        name = "shards" if self.shards else "root"
        return f"{self.setting}.{name}={folder}" if folder else ""

    def check_folders(self, made_by_jobs: Sequence[str]) -> None:
        """Raises `UsageError` where a folder does not exist and no batch script would make it.

        `made_by_jobs` are lines of the batch script: a job may copy its data to its node's own
        disk, so that a folder named there is taken to be made by the job.
        """
        if not self.shards and "root" not in self.source:
            return
        name = "shards" if self.shards else "root"
        folders = self.shards or self.source["root"]
        # A download makes the folder.
        downloads = bool(not self.shards and self.source.get("download"))
        for folder in folders if isinstance(folders, list) else [folders]:
            if not folder:
                raise UsageError(f"{self.setting}.root is not set: give {self.setting}.root=FOLDER")
            is_made = downloads or any(str(folder) in line for line in made_by_jobs)
            if not is_made and not Path(str(folder)).is_dir():
                raise UsageError(f"{self.setting}.{name}={folder} is not a folder here")

    def read(self, *, identified: bool = True) -> Splits:
        """Lists the images and prints what was found.

        Rank 0 does so before the others, so that one process downloads. Unless `identified` is
        false, the digest of the images is computed as well, with a progress bar.

        Raises:
            MissingData: nothing of the data set is there, as rank 0 sees it.
            DataError: the images can't be listed.
        """
        # The others wait here, and rank 0 lets them go below.
        is_first = ranks.rank() == 0
        missing = "" if is_first else ranks.from_first("")
        if missing:
            raise MissingData(missing)
        try:
            found = shards(root=self.shards) if self.shards else self.list_images()
        except DataError as error:
            # The readers know one data set only, and call its settings data.root and the like.
            message = self._with_own_setting(str(error))
            is_missing = isinstance(error, MissingData) or self.missing_setting
            # All ranks may go on without this data set, so that they have to agree.
            if is_missing and is_first:
                raise MissingData(ranks.from_first(message)) from error
            raise DataError(message) from error
        if found.train.name == UNNAMED:
            found = _renamed(found, self._called)
        if self.shards:
            found = dataclasses.replace(found, published_images=self._published_images())
            self._warn_of_other_images(found)
        if is_first:
            ranks.from_first("")
            _report(found)
            # An environment variable or an evaluation's settings may have named the folder.
            if self.shards or self.setting != "data":
                console.print_message(f"        {self._location}")
        if identified:
            _identify(found, shown=is_first)
        return found

    def _with_own_setting(self, message: str) -> str:
        """Returns a message about data.root and its like with this data set's own settings.

        If the folder came from an environment variable, the message names that too.
        """
        # Readers write data.root and its like; put this data set's own setting there.
        message = re.sub(r"\bdata\.(?=root|shards|proposals)", f"{self.setting}.", message)
        # Where the folder is not known, they name the variable that all data sets share.
        message = message.replace("variable RELLOC_DATA", f"variable {self.variable}")
        # The folder may have been set by a variable that the user has forgotten.
        variables = [name for name in (self.variable, "RELLOC_DATA") if os.environ.get(name)]
        variable = variables[0] if variables else ""
        folder = self.shards or self.source.get("root")
        if variable and os.environ[variable] == folder:
            message = message.replace(self._location, f"{self._location} (by {variable})")
        return message

    def _warn_of_other_images(self, found: Splits) -> None:
        """Warns where packed images are not the published ones.

        The readers of original files warn of that themselves.
        """
        if not found.published_images:
            return
        # Folders of shards know the name of the data set that was packed.
        if found.train.name != self.name:
            warnings.warn(
                f"{self._location} holds images called {found.train.name}, not {self.name}: "
                "results name them so",
                stacklevel=3,
            )
        warn_of_other_counts(found)

    def _published_images(self) -> Mapping[str, int]:
        """Returns the published numbers of images, by split, where they are of the chosen year."""
        is_counted_year = self.source.get("year", COUNTED_YEAR) == COUNTED_YEAR
        counts = self.source.get("published_images")
        return counts if counts and is_counted_year else {}


def _renamed(found: Splits, name: str) -> Splits:
    """Returns a data set that was given no name under that of its folder."""
    renamed = []
    for images in (found.train, found.held_out):
        # Whatever lists images may be of any class. Their digests, not yet computed, have no name.
        own: Any = copy.copy(images)
        object.__setattr__(own, "name", name)
        renamed.append(own)
    train, held_out = renamed
    return dataclasses.replace(found, train=train, held_out=held_out, is_unnamed=True)


def _report(found: Splits) -> None:
    """Prints the numbers of images and classes."""
    labels = (
        quantity(len(found.train.classes), "class", "classes") if found.labeled else "no labels"
    )
    if isinstance(found.train, MultiLabeled):
        # Such as PASCAL VOC, where an image shows objects of several classes
        labels = f"{quantity(len(found.train.classes), 'class', 'classes')}, several an image"
    elif isinstance(found.train, ObjectImages):
        labels = f"boxes of {len(found.train.classes)} classes"
    elif isinstance(found.train, SegmentedImages):
        labels = f"the class of each pixel, of {len(found.train.classes)}"
    counts = f"{quantity(len(found.train), 'image')} to train on, {len(found.held_out)} held out"
    console.print_message(f"data    {escaped(found.train.name)}: {counts}, {labels}")
    for remark in found.remarks:
        console.print_message(f"        {remark}")


def _identify(found: Splits, *, shown: bool) -> None:
    """Computes the digests of both splits now, with a progress bar if `shown`.

    On a slow file server that takes minutes, which must not look as if nothing happened.
    """
    for images in (found.train, found.held_out):
        # Only folders of files have a digest that takes long: each file is read for it.
        if isinstance(images, FolderImages):
            bar = functools.partial(console.progress_if_long, f"identify {images.split}")
            images.digest(bar if shown else without_progress)
