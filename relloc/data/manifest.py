"""Reads and verifies manifest.json and the index of a folder that `relloc.prepare` packed.

The folder may come from a stranger, be incompletely copied, or have been written by another
program, so that everything that reading images relies on is checked here.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from relloc.data.image_set import ROLES
from relloc.data.images import MOST_PIXELS
from relloc.data.processes import Progress, without_progress
from relloc.errors import DataError, data_errors
from relloc.files import read_text
from relloc.terminal import quantity

FORMAT = "relloc shards"
# How images are stored, and the version of such a folder. They differ, so that a relloc that knows
# JPEGs only refuses pixels, and does not report each image as a damaged JPEG.
JPEG = "jpeg"
PIXELS = "pixels"
VERSIONS = {JPEG: 1, PIXELS: 2}
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"
# Settings of a packing that is not finished.
SETTINGS_FILE = "settings.json"
_AGAIN = "Copy it again from where it was packed, or pack into a new folder"
# Bytes of a line of names: paths on Linux have up to 4096 characters.
_LONGEST_NAME = 1 << 16
# Bytes of one image: no more than its pixels take. A sparse tar may claim more.
_MOST_STORED_BYTES = 3 * MOST_PIXELS
# The types of the manifest's values, as `_misfit` checks them.
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


def shard_name(split: str, number: int) -> str:
    """Returns the file name of the tar of this number."""
    return f"{split}-{number:06d}.tar"


def index_name(split: str) -> str:
    """Returns the file name of a split's index: where each image lies in the tars."""
    return f"{split}-index.safetensors"


def names_name(split: str) -> str:
    """Returns the file name of a split's list of original image names."""
    return f"{split}-names.jsonl"


def is_packed(folder: Path) -> bool:
    """Returns whether relloc.prepare packed this folder, or began to."""
    path = folder / MANIFEST
    if not path.is_file():
        return (folder / UNFINISHED / SETTINGS_FILE).is_file()
    # Other data sets have a manifest.json as well; ours names its format at the start.
    with open(path, "rb") as file:
        return FORMAT.encode() in file.read(200)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the content of manifest.json in a packed folder, with all types checked.

    Raises:
        DataError: the manifest is missing, damaged, of another version, or incomplete.
    """
    if not folder.is_dir():
        raise DataError(
            f"data.shards={folder} is not a folder: "
            f"python -m relloc.prepare data=… out={folder} makes it"
        )
    path = folder / MANIFEST
    if (folder / UNFINISHED).is_dir() and not path.exists():
        raise DataError(f"{folder}: packing was not finished: start the same prepare command again")
    if not path.exists():
        raise DataError(
            f"{folder} has no {MANIFEST}: give the folder that relloc.prepare wrote as out=…. "
            "Tars of others can't be read: unpack them, and pack the images with relloc.prepare"
        )
    manifest = read_json(path, _AGAIN)
    # The version first: the checks of another version would not apply.
    version = None
    if isinstance(manifest, dict):
        version = (manifest.get("format"), manifest.get("version"))
    if version not in [(FORMAT, known) for known in VERSIONS.values()]:
        known = " or ".join(map(str, VERSIONS.values()))
        raise DataError(
            f"{path} is not of {FORMAT} version {known} but {version}: pack again with this relloc"
        )
    wrong = _misfit(manifest, _FORM, "manifest") or _contradiction(manifest)
    if wrong:
        raise DataError(f"{path} is not as relloc.prepare writes it, see {wrong}. {_AGAIN}")
    return manifest


def holds_pixels(manifest: Mapping[str, Any]) -> bool:
    """Returns whether the images of a packed folder are stored as pixels, and not as JPEGs."""
    return manifest["version"] == VERSIONS[PIXELS]


def packing_in_words(manifest: Mapping[str, Any]) -> str:
    """Returns how the images of a packed folder are stored, such as "pixels, short side 292 px"."""
    packed = manifest["packed"]
    at_most = "" if packed.get("enlarge") else "of at most "
    size = f"short side {at_most}{packed['short_px']} px"
    if holds_pixels(manifest):
        return f"pixels, {size}"
    # Other programs may have written other values, or none.
    quality = packed.get("quality")
    subsampling = packed.get("subsampling")
    return f"JPEG of quality {quality} {subsampling}, {size}"


def read_json(path: Path, advice: str) -> Any:
    """Returns the value of a JSON file. Raises `DataError` with the advice if it can't be read."""
    text = read_text(path, advice)
    with data_errors(f"{path} can't be read", ValueError, RecursionError, advice=advice):
        return json.loads(text)


def _misfit(value: Any, form: Any, where: str) -> str:
    """Returns where a JSON value has another type than `form`, or "" if it fits everywhere.

    A form is a type, a list of one form for all elements, or a mapping with a form for each key.
    """
    # pydantic, which checks other files, refuses names that are not valid Unicode, as files may
    # have.
    expected = form if isinstance(form, type) else type(form)
    if type(value) is not expected:
        return where
    misfits: list[str] = []
    if isinstance(form, dict):
        for key, inner in form.items():
            misfits.append(_misfit(value.get(key), inner, f"{where}.{key}"))
    elif isinstance(form, list):
        for number, element in enumerate(value):
            misfits.append(_misfit(element, form[0], f"{where}[{number}]"))
    return next(filter(None, misfits), "")


def _contradiction(manifest: dict[str, Any]) -> str:
    """Returns which value of a manifest is impossible though its type is right, or ""."""
    packed = manifest["packed"]
    # Older relloc knew JPEGs only, and did not say so.
    if packed.get("format", JPEG) != (PIXELS if holds_pixels(manifest) else JPEG):
        return "packed.format"
    per_shard = packed["images_per_shard"]
    if not 1 <= per_shard < 1 << 63:
        return "packed.images_per_shard"
    for role in ROLES:
        split = manifest[role]["split"]
        n_images = manifest[role]["images"]
        tars = manifest[role]["shards"]
        # The name of a split is part of file names, which may not lead out of the folder.
        if not re.fullmatch(r"[^./\0][^/\0]*", split):
            return f"{role}.split"
        if n_images < 1:
            return f"{role}.images"
        n_tars = -(-n_images // per_shard)
        if len(tars) != n_tars:
            return f"{role}.shards"
        # Names of tars, too, may not lead out of the folder.
        for number, tar in enumerate(tars):
            if tar["file"] != shard_name(split, number):
                return f"{role}.shards"
    return ""


def check_hashes(folder: Path, progress: Progress = without_progress) -> None:
    """Reads every tar and index, and compares its hash with that recorded at packing.

    Raises:
        DataError: the bytes of a file have changed.
    """
    manifest = read_manifest(folder)
    recorded_hashes: list[tuple[str, str]] = []
    for role in ROLES:
        for tar in manifest[role]["shards"]:
            recorded_hashes.append((tar["file"], tar["sha256"]))
        # Older relloc recorded no hashes of the index.
        of_index = manifest[role].get("index_sha256")
        if isinstance(of_index, dict):
            recorded_hashes += of_index.items()
    with progress(len(recorded_hashes), 0) as report:
        for done, (name, recorded) in enumerate(recorded_hashes, start=1):
            # Only the base name, so that a manifest can't lead out of its folder.
            path = folder / os.path.basename(name)
            if file_hash(path).hex() != recorded:
                raise DataError(f"{path} has other bytes than it was packed with. {_AGAIN}")
            report(done, "files")


def file_hash(path: Path) -> bytes:
    """Returns the SHA-256 of a packed file. Raises `DataError` if it can't be read."""
    with data_errors(f"{path} can't be read", OSError, advice=_AGAIN), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def read_index(
    folder: Path, about: dict[str, Any], per_shard: int, *, is_of_pixels: bool
) -> dict[str, np.ndarray]:
    """Returns the index of a split, which is known to fit its tars and its list of names.

    `about` is the split's entry in the manifest, `per_shard` the number of images in a tar. With
    `is_of_pixels` the index has the height of each image, too.

    Raises:
        DataError: the index can't be read or does not fit, a file is missing, or a tar has another
            size than when it was packed.
    """
    path = folder / index_name(about["split"])
    names_path = folder / names_name(about["split"])
    packed_bytes = {folder / tar["file"]: tar["bytes"] for tar in about["shards"]}
    for needed in (*packed_bytes, path, names_path):
        # A pipe is no file either: to open it would wait forever.
        if not needed.is_file():
            raise DataError(
                f"{needed} is missing: copy it again from where it was packed, "
                "or pack into a new folder"
            )
    # Sizes are quick to compare, and find most copies that were cut short.
    for tar, n_bytes in packed_bytes.items():
        found_bytes = tar.stat().st_size
        if found_bytes != n_bytes:
            raise DataError(
                f"{tar} has {found_bytes} bytes, not the {n_bytes} it was packed with: copy it "
                "again from where it was packed, or pack into a new folder"
            )
    errors = (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError)
    with data_errors(f"{path} can't be read", *errors, advice=_AGAIN):
        # As bytes, since the library takes only paths that are UTF-8.
        index = load(path.read_bytes())
    wrong = _index_misfit(index, about, per_shard, names_path.stat().st_size)
    if is_of_pixels:
        wrong = wrong or _heights_misfit(index)
    if wrong:
        raise DataError(
            f"{path} does not fit {MANIFEST} ({wrong}): copy both again, or pack into a new folder"
        )
    return index


def _index_misfit(
    index: dict[str, np.ndarray], about: dict[str, Any], per_shard: int, names_bytes: int
) -> str:
    """Returns in a few words what in an index can't belong to this split, or ""."""
    return (
        _shapes_misfit(index, about)
        or _positions_misfit(index, about, per_shard)
        or _values_misfit(index, about, names_bytes)
    )


def _shapes_misfit(index: dict[str, np.ndarray], about: dict[str, Any]) -> str:
    """Returns which array of an index is missing, or has another shape or type, or ""."""
    n_images = about["images"]
    n_classes = len(about["classes"])
    shapes = {
        "offset": (n_images,),
        "size": (n_images,),
        "height": (n_images,),
        "name_offset": (n_images + 1,),
        "label": (n_images,),
        "presence": (n_images, n_classes),
    }
    needed = {"offset", "size", "name_offset"}
    if about.get("multi_labeled"):
        needed.add("presence")
    for name in needed | (index.keys() & shapes.keys()):
        dtype = np.int8 if name == "presence" else np.int64
        values = index.get(name)
        if values is None or values.shape != shapes[name] or values.dtype != dtype:
            return f"{name} is not of {quantity(n_images, 'image')}"
    return ""


def _positions_misfit(index: dict[str, np.ndarray], about: dict[str, Any], per_shard: int) -> str:
    """Returns what is wrong with the positions of images in the tars, or ""."""
    offset = index["offset"]
    size = index["size"]
    bytes_by_tar = np.array([tar["bytes"] for tar in about["shards"]], np.int64)
    tar_of_image = np.arange(about["images"]) // per_shard
    tar_bytes = bytes_by_tar[tar_of_image]

    # Sizes are checked first: the sum of an offset and a size near 2^63 overflows.
    sizes_fit = _within(size, 0, np.minimum(tar_bytes, _MOST_STORED_BYTES))
    if not sizes_fit or not _within(offset, 0, tar_bytes - size):
        return "an image lies outside of its tar, or is larger than any image"

    # In one tar, each image starts behind the end of the one before. Size 0 is no image.
    stored = np.flatnonzero(size)
    earlier = stored[:-1]
    later = stored[1:]
    same_tar = later // per_shard == earlier // per_shard
    overlaps = offset[later] < offset[earlier] + size[earlier]
    if (same_tar & overlaps).any():
        return "images overlap"
    return ""


def _heights_misfit(index: dict[str, np.ndarray]) -> str:
    """Returns what is wrong with the heights of images that are stored as pixels, or ""."""
    height = index.get("height")
    if height is None:
        return "it has no height of each image"
    size = index["size"]
    # Size 0 is no image, and has no height.
    stored = size > 0
    heights_fit = _within(height[stored], 1, size[stored] // 3)
    # Only heights of 1 and more are divided by.
    if not heights_fit or (size[stored] % (3 * height[stored])).any():
        return "the pixels of an image are no rectangle"
    return ""


def _values_misfit(index: dict[str, np.ndarray], about: dict[str, Any], names_bytes: int) -> str:
    """Returns what is wrong with the names, labels or presence in an index, or ""."""
    name_offset = index["name_offset"]
    # The lines of names fill their file, and each has a plausible length.
    fills_file = (name_offset[0], name_offset[-1]) == (0, names_bytes)
    if not fills_file or not _within(np.diff(name_offset), 0, _LONGEST_NAME):
        return f"{names_name(about['split'])} has other names"
    n_classes = len(about["classes"])
    if "label" in index and not _within(index["label"], 0, n_classes - 1):
        return "a label is of no class"
    if "presence" in index and not _within(index["presence"], -1, 1):
        return "presence is not -1, 0 or 1"
    return ""


def _within(values: np.ndarray, lowest: int, highest: int | np.ndarray) -> bool:
    """Returns whether all values lie in the range, both ends included."""
    in_range = (values >= lowest) & (values <= highest)
    return bool(in_range.all())
