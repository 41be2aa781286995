"""Reads images that `relloc.prepare` packed into WebDataset tars (`data.shards=FOLDER`).

A packed folder holds manifest.json, which says how it was made, and for each split (such as train):

- SPLIT-000000.tar and so on: members 000000012.jpg and, if labeled, 000000012.cls (the class number
  in decimal digits). A tar holds `images_per_shard` consecutive image numbers. Where images are
  stored as pixels (version 2 of the folder) members are 000000012.ppm.
- SPLIT-index.safetensors: `offset` and `size` in bytes of each JPEG in its tar, so that images can
  be read in any order; `label` or, if images may show several classes, `presence` (images x
  classes: 1 there, 0 difficult, -1 not there); and `name_offset`, bytes in the next file. Of
  images that are stored as pixels, `offset` and `size` are those of the pixels, without the header
  of the PPM file, and `height` is the number of their rows.
- SPLIT-names.jsonl: the original name of each image.

An image that could not be read when packed keeps its number, has size 0 and is in no tar.
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
from relloc.data.images import Undecoded, as_jpeg, check_size
from relloc.data.manifest import (
    file_hash,
    holds_pixels,
    names_name,
    packing_in_words,
    read_index,
    read_manifest,
    shard_name,
)
from relloc.data.mapped_files import MappedFiles
from relloc.data.pixels import as_image
from relloc.data.unnamed import UNNAMED
from relloc.errors import DataError, UnreadableImage, data_errors

# Tars that are kept open. The limit of open files is often 1024.
_MOST_OPEN = 512
# Markers of a JPEG's frame header, which holds the image size (ITU-T T.81, table B.1: SOF0 to
# SOF15 without DHT, JPG and DAC).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Markers that no segment with a length follows, and the byte that may fill the space before one.
_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xD9), 0xFF}


def decoded(jpeg: bytearray) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the RGB pixels of a JPEG, bit for bit those of Pillow but a sixth faster.

    Raises:
        UnreadableImage: the JPEG is damaged, or claims to be larger than any image that is read.
    """
    try:
        # Before decoding, as the decoder would allocate memory for a size that is only claimed.
        check_size(*_claimed_size(jpeg))
        encoded = torch.frombuffer(jpeg, dtype=torch.uint8)
        pixels: Any = decode_jpeg(encoded, mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        raise UnreadableImage(f"can't be decoded: {error}") from error
    # From (channel, row, column) to Pillow's order, without copying
    rgb = pixels.permute(1, 2, 0)
    return rgb.numpy()


def _claimed_size(jpeg: bytearray) -> tuple[int, int]:
    """Returns the width and height in a JPEG's frame header.

    Returns (0, 0) if there is no such header, an error that the decoder then reports.
    """
    # The first two bytes are the marker of the start.
    position = 2
    while position + 9 <= len(jpeg):
        # Between segments, libjpeg skips bytes until the next marker, and so does this.
        if jpeg[position] != 0xFF:
            position += 1
            continue
        marker = jpeg[position + 1]
        if marker in _FRAMES:
            # Marker (2 bytes), length (2), bits a sample (1), then height and width (2 each).
            height, width = struct.unpack_from(">HH", jpeg, position + 5)
            return width, height
        position += 1
        if marker not in _WITHOUT_LENGTH:
            # The length counts its own two bytes, but not the marker.
            length_bytes = jpeg[position + 1 : position + 3]
            length = int.from_bytes(length_bytes, "big")
            position += 1 + length
    return 0, 0


class _Files:
    """A cache of open files: each process opens a file at the first read, and keeps some open."""

    def __init__(self) -> None:
        self._open: dict[Path, io.FileIO] = {}
        self._until_gone = contextlib.ExitStack()
        # Closes the files when this object is garbage-collected.
        weakref.finalize(self, self._until_gone.close)

    def read(self, path: Path, offset: int, size: int) -> bytearray:
        """Returns `size` bytes at `offset`.

        Raises:
            OSError: the file can't be read.
            EOFError: the file ends before.
        """
        content = bytearray(size)
        with contextlib.ExitStack() as until_read:
            file = self._open.get(path)
            if file is None:
                # Files beyond the limit are closed after this read.
                is_kept = len(self._open) < _MOST_OPEN
                closing = self._until_gone if is_kept else until_read
                # Without a buffer: each read is of exactly one image.
                file = closing.enter_context(open(path, "rb", buffering=0))
                if is_kept:
                    self._open[path] = file
            # preadv takes the offset itself: processes that share the file do not move it.
            n_read = os.preadv(file.fileno(), [content], offset)
        if n_read != size:
            raise EOFError(f"{path} ends before byte {offset + size}")
        return content


class ShardImages:
    """The images of one split of a packed folder: an `ImageSet` that reads single images from tars.

    It needs 24 bytes of memory an image (32 with labels, and 8 more where pixels are stored), which
    forked processes share. Pickled it is only the folder's name, and is opened again where it is
    unpickled. `source(index)` is the original name of the image, below the folder of the originals.
    `packing` says in words how the images were packed.

    Raises:
        DataError: the folder is missing, unfinished, of another version, or incomplete.

    Example:
        >>> images = ShardImages(Path("/data/packed"), "train")
        >>> images.read_array(0).shape
    """

    def __init__(self, folder: Path, role: Role) -> None:
        self.folder = folder.absolute()
        self.role = role
        manifest = read_manifest(folder)
        about = manifest[role]
        packed = manifest["packed"]
        self._about = about
        # Images that had no name when packed are called after the folder that they lay in.
        self.name: str = manifest.get("called", manifest["name"])
        self.split: str = about["split"]
        self.classes: tuple[str, ...] = tuple(about["classes"])
        self._per_shard: int = packed["images_per_shard"]
        self._names = self.folder / names_name(self.split)
        self.packing: str = packing_in_words(manifest)
        self._index = read_index(
            self.folder, about, self._per_shard, is_of_pixels=holds_pixels(manifest)
        )
        # Heights of images that are stored as pixels; None if they are JPEGs.
        self._heights = self._index["height"] if holds_pixels(manifest) else None
        labels = self._index.get("label")
        self.labels: Sequence[int] | None = None
        if labels is not None:
            # 8 bytes a label, where a list would need several times as much.
            self.labels = array.array("q", labels.tobytes())
        self._files = _Files()
        self._mapped_files = MappedFiles()

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.folder, self.role)
        return type(self), arguments

    def __len__(self) -> int:
        return len(self._index["size"])

    def read(self, index: int) -> Image.Image:
        pixels = self.read_array(index)
        return Image.fromarray(pixels)

    def read_array(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the pixels of an image; faster than `read` for callers that only cut them.

        Images that are stored as pixels are views of their mapped file, which can't be written to:
        a caller that cuts them reads no more than it cuts.

        Raises:
            UnreadableImage: the image could not be read when packed, or its tar is damaged.
        """
        content = self._stored(index)
        if isinstance(content, np.ndarray):
            return content
        return decoded(content)

    def read_undecoded(self, index: int) -> Undecoded:
        """Returns an image as it is stored: a JPEG undecoded if that may be, or pixels.

        Raises:
            UnreadableImage: as `read_array`, but a JPEG may still turn out to be damaged.
        """
        content = self._stored(index)
        if isinstance(content, np.ndarray):
            return content
        return as_jpeg(content) or decoded(content)

    def _stored(self, index: int) -> bytearray | UInt8[np.ndarray, "h w 3"]:
        """Returns the bytes of a JPEG, or pixels. Raises what `read_array` raises."""
        sizes = self._index["size"]
        size = int(sizes[index])
        # Size 0 marks an image that could not be read when the folder was packed.
        if size == 0:
            reasons = self._about["unreadable"]
            name = self.source(index)
            reason = reasons.get(name, "was not readable when packed")
            raise UnreadableImage(str(reason))
        shard = index // self._per_shard
        tar = self.folder / shard_name(self.split, shard)
        offsets = self._index["offset"]
        offset = int(offsets[index])
        try:
            if self._heights is not None:
                pixels = self._mapped_files.view(tar, offset, size)
                return as_image(pixels, int(self._heights[index]))
            return self._files.read(tar, offset, size)
        except (OSError, EOFError) as error:
            kind = type(error).__name__
            raise UnreadableImage(f"{kind}: {error}") from error

    def source(self, index: int) -> str:
        """Returns the original name of an image. Raises `DataError` if it can't be read."""
        # A name ends where the next one begins; the offsets have one entry more than the images.
        offsets = self._index["name_offset"]
        start, stop = offsets[index : index + 2].tolist()
        errors = (OSError, EOFError, ValueError)
        problem = f"{self._names} can't be read"
        with data_errors(problem, *errors, advice="Pack again"):
            line = self._files.read(self._names, start, stop - start)
            return str(json.loads(line))

    def digest(self) -> str:
        """Returns a hash of names, labels and the stored bytes of all images.

        It does not depend on how the images are divided into tars. Image bytes count by the hash
        that manifest.json recorded when they were packed (`relloc.data.manifest.check_hashes`
        verifies it); labels, names and sizes are read from the files.
        """
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        digest_when_packed = self._about["digest"]
        class_names = json.dumps(self.classes)
        heading = f"{digest_when_packed} {class_names}\n"
        hasher = hashlib.sha256(heading.encode(errors="surrogatepass"))
        for name in ("size", "label", "presence"):
            # The name also counts where there are no values: labels are not taken for presence.
            hasher.update(name.encode())
            values = self._index.get(name)
            if values is not None:
                contiguous = np.ascontiguousarray(values)
                hasher.update(contiguous.tobytes())
        # Only of images that have it, so that the digests of others stay what they were.
        if self._heights is not None:
            hasher.update(b"height")
            hasher.update(np.ascontiguousarray(self._heights).tobytes())
        hasher.update(file_hash(self._names))
        return versioned(hasher)


class MultiLabeledShards(ShardImages):
    """Packed images each of which may show several classes (`relloc.data.lists.MultiLabeled`)."""

    def presence(self) -> list[list[int]]:
        """Returns 1 (there), 0 (difficult to recognize) or -1 (not there) by image and class."""
        presence = self._index["presence"]
        return presence.tolist()


def shards(*, root: str) -> Splits:
    """Returns both splits of the packed folder `root`.

    Raises:
        DataError: as `ShardImages`.
    """
    # The setting may have any type: it is what the user gave.
    if not isinstance(root, str):
        raise DataError(
            f"data.shards={root} is not a folder: give a folder that relloc.prepare packed"
        )
    folder = Path(root)
    manifest = read_manifest(folder)
    splits: dict[Role, ImageSet] = {}
    for role in ROLES:
        about = manifest[role]
        # Only images that may show several classes have `presence`.
        kind = MultiLabeledShards if about.get("multi_labeled") else ShardImages
        splits[role] = kind(folder, role)
    return Splits(
        **splits,
        remarks=(f"packed as {packing_in_words(manifest)}",),
        is_unnamed=manifest["name"] == UNNAMED,
    )
