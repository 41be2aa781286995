"""What a packed folder holds by its manifest.json and index: read, and held against its files.

The folder may be a stranger's, cut short by a copy, or of another program: all that is believed of it is checked here.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from relloc.data.image_set import ROLES
from relloc.data.images import MOST_PIXELS
from relloc.data.processes import Progress, without_progress
from relloc.errors import DataError

FORMAT = "relloc shards"
VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"
_LONGEST_NAME = 1 << 16  # bytes of a line of names; a path of the system has 4096 characters
_MOST_STORED_BYTES = 3 * MOST_PIXELS  # of one JPEG: no more than its pixels take; a tar may be sparse and claim more
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
    version = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if version != (FORMAT, VERSION):
        raise DataError(f"{path} is not of {FORMAT} version {VERSION} but {version}: pack again with this relloc")
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
    """Where a JSON value has not the form: a type, a list of one form, or a mapping with a form for each key.

    pydantic, which reads other files, refuses names that are no Unicode, and files may have such names.
    """
    inner: Iterable[tuple[str, object, Any]] = ()
    if isinstance(form, dict) and isinstance(value, dict):
        inner = ((f"{where}.{key}".lstrip("."), value.get(key), part) for key, part in form.items())
    elif isinstance(form, list) and isinstance(value, list):
        inner = ((f"{where}[{number}]", each, form[0]) for number, each in enumerate(value))
    elif not isinstance(form, type) or not isinstance(value, form) or isinstance(value, bool):
        return where
    return next(filter(None, (_misfit(each, part, place) for place, each, part in inner)), "")


def _contradiction(manifest: dict[str, Any]) -> str:
    """What in a manifest can't be of a packed folder, though its form is right."""
    per_shard = manifest["packed"]["images_per_shard"]
    if not 1 <= per_shard < 1 << 63:
        return "packed.images_per_shard"
    for role in ROLES:
        split, images = manifest[role]["split"], manifest[role]["images"]
        if not split or "/" in split or "\0" in split or split.startswith("."):
            return f"{role}.split"
        if images < 1:
            return f"{role}.images"
        # Also their names, so that no manifest leads out of its folder.
        tars, n_tars = manifest[role]["shards"], -(-images // per_shard)
        if len(tars) != n_tars or any(tar["file"] != shard_name(split, n) for n, tar in enumerate(tars)):
            return f"{role}.shards"
    return ""


def check_sizes(folder: Path, tars: Sequence[dict[str, Any]]) -> None:
    """Raises `DataError` where a tar is missing or has another number of bytes than manifest.json says."""
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
    path, names_path = folder / index_name(about["split"]), folder / names_name(about["split"])
    _refuse_pipe(path)
    try:
        index = load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} can't be read ({error}): copy it again, or pack into a new folder") from error
    try:
        names_bytes = names_path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{names_path} is missing ({error.strerror}): copy it again, or pack into a new folder"
        ) from error
    wrong = _index_misfit(index, about, per_shard, names_bytes)
    if wrong:
        raise DataError(f"{path} does not fit {MANIFEST} ({wrong}): copy both again, or pack into a new folder")
    return index


def _index_misfit(index: dict[str, np.ndarray], about: dict[str, Any], per_shard: int, names_bytes: int) -> str:
    """What in an index can't be of this split, in a few words; empty where all fits."""
    n, classes = about["images"], len(about["classes"])
    shapes = {"offset": (n,), "size": (n,), "name_offset": (n + 1,), "label": (n,), "presence": (n, classes)}
    for name in {"offset", "size", "name_offset"} | (index.keys() & shapes.keys()):
        kind = np.int8 if name == "presence" else np.int64
        if name not in index or index[name].shape != shapes[name] or index[name].dtype != kind:
            return f"{name} is not of {n} images"
    offset, size, name_offset = index["offset"], index["size"], index["name_offset"]
    tar_bytes = np.array([tar["bytes"] for tar in about["shards"]], np.int64)[np.arange(n) // per_shard]
    # Sizes first: an offset and a size near 2^63 have a small sum.
    if not _within(size, 0, np.minimum(tar_bytes, _MOST_STORED_BYTES)) or not _within(offset, 0, tar_bytes - size):
        return "an image lies outside of its tar, or is larger than any JPEG"
    stored = np.flatnonzero(size)
    same_tar = stored[1:] // per_shard == stored[:-1] // per_shard
    if (same_tar & (offset[stored[1:]] < (offset + size)[stored[:-1]])).any():
        return "images overlap"
    if (name_offset[0], name_offset[-1]) != (0, names_bytes) or not _within(np.diff(name_offset), 0, _LONGEST_NAME):
        return f"{names_name(about['split'])} has other names"
    if "label" in index and not _within(index["label"], 0, classes - 1):
        return "a label is of no class"
    if "presence" in index and not _within(index["presence"], -1, 1):
        return "presence is not -1, 0 or 1"
    return ""


def _within(values: np.ndarray, least: int, most: int | np.ndarray) -> bool:
    return bool(((values >= least) & (values <= most)).all())
