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
import hashlib
import json
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torchvision.io import ImageReadMode, decode_jpeg

from relloc.data.image_set import Splits
from relloc.data.parts import ROLES, Role
from relloc.errors import DataError, UnreadableImage

FORMAT = "relloc shards"
VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"
_MOST_OPEN = 512


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def index_name(split: str) -> str:
    return f"{split}-index.safetensors"


def names_name(split: str) -> str:
    return f"{split}-names.jsonl"


def decoded(jpeg: bytearray) -> UInt8[np.ndarray, "h w 3"]:
    """The RGB pixels of a JPEG: the same as Pillow's to the bit, a sixth faster.

    Raises:
        UnreadableImage: it is damaged.
    """
    try:
        pixels: Any = decode_jpeg(torch.frombuffer(jpeg, dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise UnreadableImage(f"can't be decoded: {error}") from error
    return pixels.permute(1, 2, 0).numpy()


class _Files:
    """Files opened when first read, by the process that reads, and kept open up to a number."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        weakref.finalize(self, _close, self._open)

    def read(self, path: Path, offset: int, size: int) -> bytearray:
        """`size` bytes at `offset`. Raises `OSError`, and `EOFError` where the file ends before."""
        content = bytearray(size)
        if path not in self._open and len(self._open) >= _MOST_OPEN:
            with open(path, "rb") as file:
                got = os.preadv(file.fileno(), [content], offset)
        else:
            got = os.preadv(self._descriptor(path), [content], offset)
        if got != size:
            raise EOFError(f"{path} ends before byte {offset + size}")
        return content

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            mine = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if self._open.setdefault(path, mine) != mine:  # another thread was first
                os.close(mine)
        return self._open[path]


def _close(descriptors: dict[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
    descriptors.clear()


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
        self.role: Role = role
        manifest = read_manifest(folder)
        self._about = manifest[role]
        self.name: str = manifest["name"]
        self.split: str = self._about["split"]
        self.classes: tuple[str, ...] = tuple(self._about["classes"])
        self._per_shard: int = manifest["packed"]["images_per_shard"]
        _check_sizes(self.folder, self._about["shards"])
        index = _read_index(self.folder / index_name(self.split), self._about["images"])
        self._index = index
        self._offset, self._size, self._name_offset = index["offset"], index["size"], index["name_offset"]
        self.labels: Sequence[int] | None = array.array("q", index["label"].tobytes()) if "label" in index else None
        self._files = _Files()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.role)

    def __len__(self) -> int:
        return len(self._size)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.read_array(index))

    def read_array(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        size = int(self._size[index])
        if size == 0:
            raise UnreadableImage(self._about["unreadable"].get(self.source(index), "was not readable when packed"))
        tar = self.folder / shard_name(self.split, index // self._per_shard)
        try:
            content = self._files.read(tar, int(self._offset[index]), size)
        except (OSError, EOFError) as error:
            raise UnreadableImage(f"{type(error).__name__}: {error}") from error
        return decoded(content)

    def source(self, index: int) -> str:
        start, stop = int(self._name_offset[index]), int(self._name_offset[index + 1])
        return json.loads(self._files.read(self.folder / names_name(self.split), start, stop - start))

    def digest(self) -> str:
        """Hash of names, labels and the stored bytes of each image: however they are parted into tars."""
        return self._about["digest"]


class MultiLabeledShards(ShardImages):
    """Packed images that may show several classes: `relloc.data.lists.MultiLabeled`."""

    def __init__(self, folder: Path, role: Role) -> None:
        super().__init__(folder, role)
        if self._index.get("presence", np.empty(0)).shape != (len(self), len(self.classes)):
            raise DataError(f"{folder / index_name(self.split)} does not fit {MANIFEST}: copy both again, or pack anew")

    def presence(self) -> list[list[int]]:
        """For each image and class: 1 there, 0 there but difficult to recognize, -1 not there."""
        return self._index["presence"].tolist()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What manifest.json of a packed folder says. Raises `DataError`."""
    if not folder.is_dir():
        raise DataError(f"data.shards={folder} is not a folder: python -m relloc.prepare data=… out={folder} makes it")
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        if (folder / UNFINISHED).is_dir():
            raise DataError(f"{folder}: packing was not finished: start the same prepare command again") from None
        raise DataError(f"{folder} has no {MANIFEST}: give the folder that relloc.prepare wrote as out=…") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST} can't be read: {error}") from error
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if found != (FORMAT, VERSION):
        raise DataError(
            f"{folder / MANIFEST} is not of {FORMAT} version {VERSION} but {found}: pack again with this relloc"
        )
    return manifest


def _check_sizes(folder: Path, tars: Sequence[dict[str, Any]]) -> None:
    for tar in tars:
        path = folder / tar["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != tar["bytes"]:
            what = "is missing" if size is None else f"has {size} bytes, not the {tar['bytes']} it was packed with"
            raise DataError(f"{path} {what}: copy it again from where it was packed, or pack into a new folder")


def check_hashes(folder: Path) -> None:
    """Read every tar and hold it against the hash that it was packed with.

    Raises:
        DataError: a tar holds other bytes.
    """
    manifest = read_manifest(folder)
    for role in ("train", "held_out"):
        for tar in manifest[role]["shards"]:
            with open(folder / tar["file"], "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != tar["sha256"]:
                    raise DataError(
                        f"{folder / tar['file']} has other bytes than it was packed with: copy it again from where it "
                        "was packed, or pack into a new folder"
                    )


def _read_index(path: Path, n_images: int) -> dict[str, np.ndarray]:
    try:
        index = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} can't be read ({error}): copy it again, or pack into a new folder") from error
    lengths = {name: len(values) - (name == "name_offset") for name, values in index.items()}
    if not {"offset", "size", "name_offset"} <= set(index) or set(lengths.values()) != {n_images}:
        raise DataError(f"{path} does not fit {MANIFEST}: copy both again, or pack into a new folder")
    return index


def shards(*, root: str) -> Splits:
    """Both splits of the packed folder `root`. Raises `DataError` as `ShardImages`."""
    folder = Path(root)
    manifest = read_manifest(folder)
    train, held_out = (
        (MultiLabeledShards if manifest[role].get("multi_labeled") else ShardImages)(folder, role) for role in ROLES
    )
    return Splits(train=train, held_out=held_out)
