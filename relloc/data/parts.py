"""Records about the images of a data set, saved part by part while it is checked or packed.

A part is a range of images that one process works on. It has a file of records (one for each
image) and a JSON file that is written after it: where the JSON file exists the part is finished,
so that work which was interrupted continues with the other parts.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from relloc.data.folder import FolderImages
from relloc.data.image_set import ROLES, ImageSet, Role, Splits
from relloc.data.images import ImageFile, read_file, read_size
from relloc.errors import DataError, data_errors
from relloc.files import write_whole, writing
from relloc.geometry import Pair

# The record of an image: size in pixels, hash of its file, and whether it has a single color. The
# height is 0 if the image can't be read.
FACTS = np.dtype(
    [("height", "<i4"), ("width", "<i4"), ("sha256", "u1", (32,)), ("single_color", "?")]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a split: images `start` up to but not including `stop`; `number` counts parts."""

    role: Role
    split: str
    number: int
    start: int
    stop: int

    @property
    def stem(self) -> str:
        """Name of the part's files, without suffix."""
        return f"{self.split}-{self.number:06d}"

    def __len__(self) -> int:
        return self.stop - self.start


def divide_into_parts(data: Splits, length: int) -> list[Part]:
    """Returns both splits divided into parts of `length` images; the last part is shorter.

    Raises:
        DataError: both splits have the same name, which names their files.
    """
    if data.train.split == data.held_out.split:
        raise DataError(
            f"both splits of {data.train.name} are called {data.train.split}: give them two names"
        )
    # No part has images of both splits, so that each file of records belongs to one of them.
    parts = []
    for role in ROLES:
        images = data.of(role)
        n_images = len(images)
        starts = range(0, n_images, length)
        for number, start in enumerate(starts):
            part = Part(
                role=role,
                split=images.split,
                number=number,
                start=start,
                stop=min(start + length, n_images),
            )
            parts.append(part)
    return parts


def original(images: ImageSet, index: int) -> ImageFile:
    """Returns the file of an image; size and pixels stand for the bytes if it is in memory only.

    Raises:
        UnreadableImage: as `read_rgb`.
    """
    if isinstance(images, FolderImages):
        return read_file(Path(images.paths[index]))
    rgb = images.read(index)
    # With the size, as images of other sizes may have the same pixels in one row after another.
    size = b"%dx%d " % rgb.size
    return ImageFile(
        content=size + rgb.tobytes(),
        rgb=rgb,
        is_plain_jpeg=False,
    )


def original_size(images: ImageSet, index: int) -> Pair:
    """Returns the height and width of an image; of a file, only the beginning is read.

    Of a file that is to be turned upright, the two are exchanged.

    Raises:
        UnreadableImage: the file can't be opened, or is no image.
    """
    if isinstance(images, FolderImages):
        return read_size(Path(images.paths[index]))
    image = images.read(index)
    return image.height, image.width


def names(images: ImageSet) -> list[str]:
    """Returns the names of all images: of files, the path below the folder that holds them all."""
    if isinstance(images, FolderImages):
        return list(images.names())
    return [images.source(index) for index in range(len(images))]


def fill_facts(record: np.void, file: ImageFile) -> None:
    """Fills the fields of `FACTS` in the record of an image."""
    rgb = file.rgb
    record["height"] = rgb.height
    record["width"] = rgb.width
    record["sha256"] = sha256(file.content)
    # For RGB, getextrema returns the lowest and the highest value of each channel.
    extrema: Any = rgb.getextrema()
    record["single_color"] = all(low == high for low, high in extrema)


def sha256(content: bytes) -> np.ndarray:
    """Returns the SHA-256 of bytes as 32 numbers."""
    hasher = hashlib.sha256(content)
    return np.frombuffer(hasher.digest(), dtype=np.uint8)


def as_json(content: Any) -> bytes:
    """Returns JSON that has the same bytes for the same content, and can hold any file name."""
    # json escapes all that is not ASCII, such as the bytes of names that are no UTF-8.
    text = json.dumps(content, indent=1)
    return f"{text}\n".encode("ascii")


def save_part(folder: Path, part: Part, records: np.ndarray, about: dict[str, Any]) -> None:
    """Saves the records of a part, and then the JSON value `about`, which marks it as finished."""
    with writing(folder / f"{part.stem}.npy") as file:
        np.save(file, records, allow_pickle=False)
    # Last, so that a part with a JSON file has its records, too.
    json_file = folder / f"{part.stem}.json"
    write_whole(json_file, as_json(about))


def read_part(folder: Path, part: Part) -> dict[str, Any] | None:
    """Returns the JSON value of a part; None if the part is not finished or damaged."""
    json_file = folder / f"{part.stem}.json"
    try:
        about = json.loads(json_file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(about, dict):
        return None
    return about


def records_of(folder: Path, parts: list[Part]) -> np.ndarray:
    """Returns the records of finished parts in one array. Raises `DataError` if one is damaged."""
    records = []
    # What numpy raises for a file that is missing, empty or cut off
    errors = (FileNotFoundError, EOFError, ValueError)
    for part in parts:
        path = folder / f"{part.stem}.npy"
        # Without its JSON file a part counts as not finished, and is worked on again.
        advice = f"Remove {path.with_suffix('.json')}, and start the command again"
        problem = f"{path} is missing or damaged"
        with data_errors(problem, *errors, advice=advice):
            of_part = np.load(path, allow_pickle=False)
            records.append(of_part)
    return np.concatenate(records)
