"""`data.shards=FOLDER`: images packed into WebDataset tars by `python -m relloc.prepare`, read by their number.

The folder holds, for each of the two splits, which keep their names (train and val, say):
SPLIT-000000.tar and so on, with members 000000012.jpg and, where labeled, 000000012.cls (the class
number in decimal digits); SPLIT-index.safetensors with `offset` and `size` in bytes of each JPEG in
its tar, `label` or, where images may show several classes, `presence` (images x classes: 1 there, 0
difficult, -1 not there), and `name_offset`; SPLIT-names.jsonl with the original name of each image. A tar
holds `images_per_shard` consecutive numbers. An image that could not be read keeps its number, has
size 0 and is in no tar. manifest.json says how all that came to be.
"""

import array
import contextlib
import functools
import hashlib
import io
import json
import os
import struct
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from relloc.data.contents import versioned
from relloc.data.image_set import ROLES, ImageSet, Role, Splits
from relloc.data.images import check_size
from relloc.data.manifest import file_hash, names_name, read_index, read_manifest, shard_name
from relloc.errors import DataError, UnreadableImage, data_errors

_MOST_OPEN = 512
_FRAMES = frozenset(range(0xC0, 0xD0)) - {
    0xC4,
    0xC8,
    0xCC,
}  # markers of a JPEG's frame header, with its size
_WITHOUT_LENGTH = {
    0x00,
    0x01,
    *range(0xD0, 0xD9),
    0xFF,
}  # markers without a segment, or a filling byte before one


def decoded(jpeg: bytearray) -> UInt8[np.ndarray, "h w 3"]:
    """The RGB pixels of a JPEG: the same as Pillow's to the bit, a sixth faster.

    Raises:
        UnreadableImage: it is damaged, or claims to be larger than any image that is read.
    """
    try:
        check_size(*_claimed_size(jpeg))  # the decoder would ask for the memory first
        pixels: Any = decode_jpeg(torch.frombuffer(jpeg, dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        raise UnreadableImage(f"can't be decoded: {error}") from error
    return pixels.permute(1, 2, 0).numpy()


def _claimed_size(jpeg: bytearray) -> tuple[int, int]:
    """Width and height that a JPEG's frame header gives; (0, 0) where there is none, which the decoder then tells."""
    position = 2  # behind the marker of the start
    while position + 9 <= len(jpeg):
        if jpeg[position] != 0xFF:  # libjpeg looks for the next marker, and so does this
            position += 1
            continue
        marker = jpeg[position + 1]
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", jpeg, position + 5)
            return width, height
        position += 1
        if marker not in _WITHOUT_LENGTH:
            position += 1 + int.from_bytes(jpeg[position + 1 : position + 3], "big")
    return 0, 0


class _Files:
    """Files opened when first read, by the process that reads, and kept open up to a number."""

    def __init__(self) -> None:
        self._open: dict[Path, io.FileIO] = {}
        self._until_gone = contextlib.ExitStack()
        weakref.finalize(self, self._until_gone.close)

    def read(self, path: Path, offset: int, size: int) -> bytearray:
        """`size` bytes at `offset`. Raises `OSError`, and `EOFError` where the file ends before."""
        content = bytearray(size)
        with contextlib.ExitStack() as until_read:
            file = self._open.get(path)
            if file is None:
                keeper = self._until_gone if len(self._open) < _MOST_OPEN else until_read
                file = keeper.enter_context(open(path, "rb", buffering=0))
                if keeper is not until_read:
                    self._open[path] = file
            got = os.preadv(file.fileno(), [content], offset)
        if got != size:
            raise EOFError(f"{path} ends before byte {offset + size}")
        return content


class ShardImages:
    """An `ImageSet` of one split of a packed folder.

    It holds 24 bytes an image, 32 with labels, shared by forked processes; pickled it is the
    folder's name, opened again where it arrives. `source(index)` is the name that the image had
    before, below the folder of the originals.

    Raises:
        DataError: the folder is missing, unfinished, of another version, or not whole.
    """

    def __init__(self, folder: Path, role: Role) -> None:
        self.folder = folder.absolute()
        self.role = role
        manifest = read_manifest(folder)
        self._about = manifest[role]
        self.name: str = manifest["name"]
        self.split: str = self._about["split"]
        self.classes: tuple[str, ...] = tuple(self._about["classes"])
        self._per_shard: int = manifest["packed"]["images_per_shard"]
        self._names = self.folder / names_name(self.split)
        self._index = read_index(self.folder, self._about, self._per_shard)
        labels = self._index.get("label")
        self.labels: Sequence[int] | None = (
            None if labels is None else array.array("q", labels.tobytes())
        )
        self._files = _Files()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.role)

    def __len__(self) -> int:
        return len(self._index["size"])

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.read_array(index))

    def read_array(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels of what `read` gives, for who only cuts them and needs no Pillow. Raises `UnreadableImage`."""
        size = int(self._index["size"][index])
        if size == 0:
            reasons = self._about["unreadable"]
            raise UnreadableImage(
                str(reasons.get(self.source(index), "was not readable when packed"))
            )
        tar = self.folder / shard_name(self.split, index // self._per_shard)
        try:
            content = self._files.read(tar, int(self._index["offset"][index]), size)
        except (OSError, EOFError) as error:
            raise UnreadableImage(f"{type(error).__name__}: {error}") from error
        return decoded(content)

    def source(self, index: int) -> str:
        start, stop = self._index["name_offset"][index : index + 2].tolist()
        with data_errors(
            f"{self._names} can't be read", OSError, EOFError, ValueError, advice="Pack again"
        ):
            return str(json.loads(self._files.read(self._names, start, stop - start)))

    def digest(self) -> str:
        """Hash of names, labels and the stored bytes of each image: however they are parted into tars.

        The bytes are those that the tars were packed with, which manifest.json has a hash of: `check_hashes`
        reads whether they still are. Labels, names and sizes are read from the files as they are.
        """
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        hasher = hashlib.sha256(
            f"{self._about['digest']} {json.dumps(self.classes)}\n".encode(errors="surrogatepass")
        )
        for name in ("size", "label", "presence"):
            values = self._index.get(name)
            hasher.update(
                name.encode() + (b"" if values is None else np.ascontiguousarray(values).tobytes())
            )
        hasher.update(file_hash(self._names))
        return versioned(hasher)


class MultiLabeledShards(ShardImages):
    """Packed images that may show several classes: `relloc.data.lists.MultiLabeled`."""

    def presence(self) -> list[list[int]]:
        """For each image and class: 1 there, 0 there but difficult to recognize, -1 not there."""
        return self._index["presence"].tolist()


def shards(*, root: str) -> Splits:
    """Both splits of the packed folder `root`. Raises `DataError` as `ShardImages`."""
    if not isinstance(root, str):  # the type of a setting is what the user gave
        raise DataError(
            f"data.shards={root} is not a folder: it names one that relloc.prepare packed"
        )
    manifest = read_manifest(Path(root))
    splits: dict[Role, ImageSet] = {}
    for role in ROLES:
        kind = MultiLabeledShards if manifest[role].get("multi_labeled") else ShardImages
        splits[role] = kind(Path(root), role)
    return Splits(**splits)
