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
import functools
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

from relloc.data.contents import versioned
from relloc.data.image_set import Splits
from relloc.data.images import check_size
from relloc.data.parts import ROLES, Role
from relloc.data.processes import Progress, without_progress
from relloc.errors import DataError, UnreadableImage

FORMAT = "relloc shards"
VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"
_MOST_OPEN = 512
_SPLIT_FORM = {
    "split": str,
    "images": int,
    "classes": [str],
    "digest": str,
    "unreadable": dict,
    "shards": [{"file": str, "bytes": int, "sha256": str}],
    "stored": {"kept": int, "reduced": int, "encoded": int},
}
_FORM = {
    "name": str,
    "packed": {"images_per_shard": int, "short_px": int},
    "train": _SPLIT_FORM,
    "held_out": _SPLIT_FORM,
}
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of a JPEG's frame header, with its size


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def index_name(split: str) -> str:
    return f"{split}-index.safetensors"


def names_name(split: str) -> str:
    return f"{split}-names.jsonl"


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
    place = 2  # behind the marker of the start
    while place + 9 <= len(jpeg):
        if jpeg[place] != 0xFF:  # libjpeg looks for the next marker, and so does this
            place += 1
            continue
        marker = jpeg[place + 1]
        if marker in _FRAMES:
            return int.from_bytes(jpeg[place + 7 : place + 9], "big"), int.from_bytes(
                jpeg[place + 5 : place + 7], "big"
            )
        # A filling byte before a marker, or a marker that has no segment; else a segment with its length
        has_no_length = marker == 0xFF or marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8
        place += 1 if has_no_length else 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return 0, 0


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
        self._index = read_index(self.folder, self._about, self._per_shard)
        self._offset, self._size = self._index["offset"], self._index["size"]
        self._name_offset = self._index["name_offset"]
        labels = self._index.get("label")
        self.labels: Sequence[int] | None = None if labels is None else array.array("q", labels.tobytes())
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
            raise UnreadableImage(
                str(self._about["unreadable"].get(self.source(index), "was not readable when packed"))
            )
        tar = self.folder / shard_name(self.split, index // self._per_shard)
        try:
            content = self._files.read(tar, int(self._offset[index]), size)
        except (OSError, EOFError) as error:
            raise UnreadableImage(f"{type(error).__name__}: {error}") from error
        return decoded(content)

    def source(self, index: int) -> str:
        start, stop = int(self._name_offset[index]), int(self._name_offset[index + 1])
        path = self.folder / names_name(self.split)
        try:
            name = json.loads(self._files.read(path, start, stop - start))
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{path} can't be read ({error}): copy it again, or pack into a new folder") from error
        return str(name)

    def digest(self) -> str:
        """Hash of names, labels and the stored bytes of each image: however they are parted into tars.

        The bytes are those that the tars were packed with, which manifest.json has a hash of: `check_hashes`
        reads whether they still are. Labels, names and sizes are read from the files as they are.
        """
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        hasher = hashlib.sha256(f"{self.former_digest()} {json.dumps(self.classes)}\n".encode(errors="surrogatepass"))
        for name in ("size", "label", "presence"):
            values = self._index.get(name)
            hasher.update(name.encode() + (b"" if values is None else np.ascontiguousarray(values).tobytes()))
        try:
            with open(self.folder / names_name(self.split), "rb") as file:
                hasher.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{self.folder / names_name(self.split)} can't be read: {error.strerror}") from error
        return versioned(hasher)

    def former_digest(self) -> str:
        """The hash that manifest.json has, whatever became of the index beside it."""
        return self._about["digest"]


class MultiLabeledShards(ShardImages):
    """Packed images that may show several classes: `relloc.data.lists.MultiLabeled`."""

    def __init__(self, folder: Path, role: Role) -> None:
        super().__init__(folder, role)
        if "presence" not in self._index:
            raise DataError(f"{folder / index_name(self.split)} does not fit {MANIFEST}: copy both again, or pack anew")

    def presence(self) -> list[list[int]]:
        """For each image and class: 1 there, 0 there but difficult to recognize, -1 not there."""
        return self._index["presence"].tolist()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What manifest.json of a packed folder says, all of it in the form that `relloc.prepare` writes.

    Raises:
        DataError: it is missing, damaged, of another version, or not whole.
    """
    if not folder.is_dir():
        raise DataError(f"data.shards={folder} is not a folder: python -m relloc.prepare data=… out={folder} makes it")
    path = folder / MANIFEST
    _refuse_pipe(path)
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(_without_manifest(folder)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if found != (FORMAT, VERSION):
        raise DataError(f"{path} is not of {FORMAT} version {VERSION} but {found}: pack again with this relloc")
    wrong = _misfit(manifest, _FORM) or _contradiction(manifest)
    if wrong:
        raise DataError(f"{path} is not as relloc.prepare writes it, see {wrong}: copy it again, or pack anew")
    return manifest


def _refuse_pipe(path: Path) -> None:
    """Raises `DataError` where a path is there and no file: to open a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file: copy it again, or pack into a new folder")


def _without_manifest(folder: Path) -> str:
    if (folder / UNFINISHED).is_dir():
        return f"{folder}: packing was not finished: start the same prepare command again"
    other = ""
    if any(folder.glob("*.tar")):
        other = ". Tars of others can't be read: unpack them, and pack the images with relloc.prepare"
    return f"{folder} has no {MANIFEST}: give the folder that relloc.prepare wrote as out=…{other}"


def _misfit(value: object, form: Any, where: str = "") -> str:
    """Where a JSON value has not the form: a type, a list of one form, or a mapping with a form for each key."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return where or "its top"
        told = (_misfit(value.get(key), part, f"{where}.{key}".lstrip(".")) for key, part in form.items())
    elif isinstance(form, list):
        if not isinstance(value, list):
            return where
        told = (_misfit(each, form[0], f"{where}[{place}]") for place, each in enumerate(value))
    else:
        return "" if isinstance(value, form) and not isinstance(value, bool) else where
    return next(filter(None, told), "")


def _contradiction(manifest: dict[str, Any]) -> str:
    """What in a manifest can't be of a packed folder, though its form is right."""
    per_shard = manifest["packed"]["images_per_shard"]
    if not 1 <= per_shard < 1 << 63:
        return "packed.images_per_shard"
    for role in ROLES:
        about = manifest[role]
        split, images = about["split"], about["images"]
        if not split or "/" in split or "\0" in split or split.startswith("."):
            return f"{role}.split"
        if images < 1:
            return f"{role}.images"
        # Also their names, so that no manifest leads out of its folder.
        called = [tar["file"] for tar in about["shards"]]
        if len(called) != -(-images // per_shard) or called != [shard_name(split, n) for n in range(len(called))]:
            return f"{role}.shards"
    return ""


def _check_sizes(folder: Path, tars: Sequence[dict[str, Any]]) -> None:
    for tar in tars:
        path = folder / tar["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != tar["bytes"]:
            what = "is missing" if size is None else f"has {size} bytes, not the {tar['bytes']} it was packed with"
            raise DataError(f"{path} {what}: copy it again from where it was packed, or pack into a new folder")


def check_hashes(folder: Path, progress: Progress = without_progress) -> None:
    """Read every tar and index and hold it against the hash that it was packed with.

    Raises:
        DataError: one holds other bytes.
    """
    manifest = read_manifest(folder)
    files = [(each["file"], each["sha256"]) for role in ROLES for each in manifest[role]["shards"]]
    for role in ROLES:  # of the index, only folders packed since it has a hash
        recorded = manifest[role].get("index_sha256")
        files += list(recorded.items()) if isinstance(recorded, dict) else []
    with progress(len(files), 0) as tell:
        for done, (name, recorded) in enumerate(files, start=1):
            path = folder / os.path.basename(name)
            try:
                with open(path, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise DataError(f"{path} can't be read: {error.strerror}") from error
            if found != recorded:
                raise DataError(
                    f"{path} has other bytes than it was packed with: copy it again from where it was packed, or pack "
                    "into a new folder"
                )
            tell(done, "files")


def read_index(folder: Path, about: dict[str, Any], per_shard: int) -> dict[str, np.ndarray]:
    """The index of a split, which fits its tars and its list of names.

    Raises:
        DataError: it can't be read, or does not fit.
    """
    path = folder / index_name(about["split"])
    _refuse_pipe(path)
    try:
        index = load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} can't be read ({error}): copy it again, or pack into a new folder") from error
    wrong = _index_misfit(index, about, per_shard, _bytes_of(folder / names_name(about["split"])))
    if wrong:
        raise DataError(f"{path} does not fit {MANIFEST} ({wrong}): copy both again, or pack into a new folder")
    return index


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} is missing ({error.strerror}): copy it again, or pack into a new folder") from error


def _index_misfit(index: dict[str, np.ndarray], about: dict[str, Any], per_shard: int, names_bytes: int) -> str:
    """What in an index can't be of this split, in a few words; empty where all fits."""
    n, classes = about["images"], len(about["classes"])
    forms = {"offset": (n,), "size": (n,), "name_offset": (n + 1,), "label": (n,), "presence": (n, classes)}
    for name, shape in forms.items():
        values = index.get(name)
        if values is None and name in ("label", "presence"):
            continue
        if values is None or values.shape != shape or values.dtype != (np.int8 if name == "presence" else np.int64):
            return f"{name} is not of {n} images"
    offset, size, name_offset = index["offset"], index["size"], index["name_offset"]
    tar_bytes = np.array([tar["bytes"] for tar in about["shards"]], np.int64)[np.arange(n) // per_shard]
    # Sizes first: an offset and a size near 2^63 have a small sum.
    if ((size < 0) | (size > tar_bytes)).any() or ((offset < 0) | (offset > tar_bytes - size)).any():
        return "an image lies outside of its tar"
    stored = np.flatnonzero(size)
    same_tar = stored[1:] // per_shard == stored[:-1] // per_shard
    if (same_tar & (offset[stored[1:]] < (offset + size)[stored[:-1]])).any():
        return "images overlap"
    if name_offset[0] != 0 or name_offset[-1] != names_bytes or (np.diff(name_offset) < 0).any():
        return f"{names_name(about['split'])} has other names"
    labels = index.get("label")
    if labels is not None and ((labels < 0) | (labels >= classes)).any():
        return "a label is of no class"
    presence = index.get("presence")
    return "" if presence is None or (np.abs(presence) <= 1).all() else "a mark of presence is not -1, 0 or 1"


def shards(*, root: str) -> Splits:
    """Both splits of the packed folder `root`. Raises `DataError` as `ShardImages`."""
    if not isinstance(root, str):  # the type of a setting is what the user gave
        raise DataError(f"data.shards={root} is not a folder: it names one that relloc.prepare packed")
    folder = Path(root)
    manifest = read_manifest(folder)
    train, held_out = (
        (MultiLabeledShards if manifest[role].get("multi_labeled") else ShardImages)(folder, role) for role in ROLES
    )
    return Splits(train=train, held_out=held_out)
