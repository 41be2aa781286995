"""What a packed folder holds by its manifest.json and index: read, and held against its files.

The folder may be a stranger's, cut short by a copy, or of another program: all that is believed of it is checked here.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from relloc.data.image_set import ROLES
from relloc.data.images import MOST_PIXELS
from relloc.data.processes import Progress, without_progress
from relloc.errors import DataError, data_errors
from relloc.files import read_text

FORMAT = "relloc shards"
VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"
SETTINGS_FILE = "settings.json"  # of a packing that is unfinished
_AGAIN = "Copy it again from where it was packed, or pack into a new folder"
_LONGEST_NAME = 1 << 16  # bytes of a line of names; a path of the system has 4096 characters
_MOST_STORED_BYTES = (
    3 * MOST_PIXELS
)  # of one JPEG: no more than its pixels take; a tar may be sparse and claim more
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
    return f"{split}-{number:06d}.tar"


def index_name(split: str) -> str:
    return f"{split}-index.safetensors"


def names_name(split: str) -> str:
    return f"{split}-names.jsonl"


def is_packed(folder: Path) -> bool:
    """Whether relloc.prepare packed this folder, or began to; other data sets have a manifest.json as well."""
    path = folder / MANIFEST
    if not path.is_file():
        return (folder / UNFINISHED / SETTINGS_FILE).is_file()
    with open(path, "rb") as file:
        return FORMAT.encode() in file.read(200)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What manifest.json of a packed folder says, all of it in the form that `relloc.prepare` writes.

    Raises:
        DataError: it is missing, damaged, of another version, or not whole.
    """
    if not folder.is_dir():
        raise DataError(
            f"data.shards={folder} is not a folder: python -m relloc.prepare data=… out={folder} makes it"
        )
    path = folder / MANIFEST
    if (folder / UNFINISHED).is_dir() and not path.exists():
        raise DataError(f"{folder}: packing was not finished: start the same prepare command again")
    if not path.exists():
        raise DataError(
            f"{folder} has no {MANIFEST}: give the folder that relloc.prepare wrote as out=…. Tars of others can't be "
            "read: unpack them, and pack the images with relloc.prepare"
        )
    manifest = read_json(path, _AGAIN)
    version = (
        (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    )
    if version != (FORMAT, VERSION):
        raise DataError(
            f"{path} is not of {FORMAT} version {VERSION} but {version}: pack again with this relloc"
        )
    wrong = _misfit(manifest, _FORM, "manifest") or _contradiction(manifest)
    if wrong:
        raise DataError(f"{path} is not as relloc.prepare writes it, see {wrong}. {_AGAIN}")
    return manifest


def read_json(path: Path, advice: str) -> Any:
    """The value of a JSON file of a packed folder. Raises `DataError`, with the advice, where there is none."""
    text = read_text(path, advice)
    with data_errors(f"{path} can't be read", ValueError, RecursionError, advice=advice):
        return json.loads(text)


def _misfit(value: Any, form: Any, where: str) -> str:
    """Where a JSON value has not the form: a type, a list of one form, or a mapping with a form for each key.

    pydantic, which reads other files, refuses names that are no Unicode, and files may have such names.
    """
    kind = form if isinstance(form, type) else type(form)
    if type(value) is not kind:
        return where
    if isinstance(form, dict):
        parts = [_misfit(value.get(key), inner, f"{where}.{key}") for key, inner in form.items()]
    elif isinstance(form, list):
        parts = [_misfit(each, form[0], f"{where}[{number}]") for number, each in enumerate(value)]
    else:
        parts = []
    return next(filter(None, parts), "")


def _contradiction(manifest: dict[str, Any]) -> str:
    """What in a manifest can't be of a packed folder, though its form is right."""
    per_shard = manifest["packed"]["images_per_shard"]
    if not 1 <= per_shard < 1 << 63:
        return "packed.images_per_shard"
    for role in ROLES:
        split, images = manifest[role]["split"], manifest[role]["images"]
        if not re.fullmatch(r"[^./\0][^/\0]*", split):
            return f"{role}.split"
        if images < 1:
            return f"{role}.images"
        # Also their names, so that no manifest leads out of its folder.
        tars, n_tars = manifest[role]["shards"], -(-images // per_shard)
        if len(tars) != n_tars or any(
            tar["file"] != shard_name(split, n) for n, tar in enumerate(tars)
        ):
            return f"{role}.shards"
    return ""


def check_hashes(folder: Path, progress: Progress = without_progress) -> None:
    """Read every tar and index and hold it against the hash that it was packed with.

    Raises:
        DataError: one holds other bytes.
    """
    manifest = read_manifest(folder)
    files: list[tuple[str, str]] = []
    for role in ROLES:
        files += [(tar["file"], tar["sha256"]) for tar in manifest[role]["shards"]]
        recorded = manifest[role].get(
            "index_sha256"
        )  # of the index, only folders packed since it has a hash
        files += recorded.items() if isinstance(recorded, dict) else ()
    with progress(len(files), 0) as tell:
        for done, (name, recorded) in enumerate(files, start=1):
            path = folder / os.path.basename(name)
            if file_hash(path).hex() != recorded:
                raise DataError(f"{path} has other bytes than it was packed with. {_AGAIN}")
            tell(done, "files")


def file_hash(path: Path) -> bytes:
    """The SHA-256 of a file of packed images. Raises `DataError` where it can't be read."""
    with data_errors(f"{path} can't be read", OSError, advice=_AGAIN), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def read_index(folder: Path, about: dict[str, Any], per_shard: int) -> dict[str, np.ndarray]:
    """The index of a split, which fits its tars and its list of names.

    Raises:
        DataError: it can't be read, or does not fit; a file is missing, or a tar has another size than when packed.
    """
    path, names_path = folder / index_name(about["split"]), folder / names_name(about["split"])
    packed_bytes = {folder / tar["file"]: tar["bytes"] for tar in about["shards"]}
    for each in (*packed_bytes, path, names_path):
        if not each.is_file():  # nor a pipe, which to open would wait for ever
            raise DataError(
                f"{each} is missing: copy it again from where it was packed, or pack into a new folder"
            )
    for tar, n_bytes in packed_bytes.items():
        if tar.stat().st_size != n_bytes:
            raise DataError(
                f"{tar} has {tar.stat().st_size} bytes, not the {n_bytes} it was packed with: copy it again from where "
                "it was packed, or pack into a new folder"
            )
    damages = (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError)
    with data_errors(f"{path} can't be read", *damages, advice=_AGAIN):
        index = load_file(path)
    wrong = _index_misfit(index, about, per_shard, names_path.stat().st_size)
    if wrong:
        raise DataError(
            f"{path} does not fit {MANIFEST} ({wrong}): copy both again, or pack into a new folder"
        )
    return index


def _index_misfit(
    index: dict[str, np.ndarray], about: dict[str, Any], per_shard: int, names_bytes: int
) -> str:
    """What in an index can't be of this split, in a few words; empty where all fits."""
    n, classes = about["images"], len(about["classes"])
    shapes = {
        "offset": (n,),
        "size": (n,),
        "name_offset": (n + 1,),
        "label": (n,),
        "presence": (n, classes),
    }
    needed = {"offset", "size", "name_offset"} | (
        {"presence"} if about.get("multi_labeled") else set()
    )
    for name in needed | (index.keys() & shapes.keys()):
        kind = np.int8 if name == "presence" else np.int64
        if name not in index or index[name].shape != shapes[name] or index[name].dtype != kind:
            return f"{name} is not of {n} images"
    offset, size, name_offset = index["offset"], index["size"], index["name_offset"]
    tar_bytes = np.array([tar["bytes"] for tar in about["shards"]], np.int64)[
        np.arange(n) // per_shard
    ]
    # Sizes first: an offset and a size near 2^63 have a small sum.
    if not _within(size, 0, np.minimum(tar_bytes, _MOST_STORED_BYTES)) or not _within(
        offset, 0, tar_bytes - size
    ):
        return "an image lies outside of its tar, or is larger than any JPEG"
    stored = np.flatnonzero(size)
    same_tar = stored[1:] // per_shard == stored[:-1] // per_shard
    if (same_tar & (offset[stored[1:]] < (offset + size)[stored[:-1]])).any():
        return "images overlap"
    if (name_offset[0], name_offset[-1]) != (0, names_bytes) or not _within(
        np.diff(name_offset), 0, _LONGEST_NAME
    ):
        return f"{names_name(about['split'])} has other names"
    if "label" in index and not _within(index["label"], 0, classes - 1):
        return "a label is of no class"
    if "presence" in index and not _within(index["presence"], -1, 1):
        return "presence is not -1, 0 or 1"
    return ""


def _within(values: np.ndarray, least: int, most: int | np.ndarray) -> bool:
    return bool(((values >= least) & (values <= most)).all())
