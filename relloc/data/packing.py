"""Packing a data set into WebDataset tars once, so that reading it keeps up with training.

Everything is the same bytes whatever the number of processes, and however often packing was killed
and started again. What is finished lies in the folder's `unfinished/` until all is; manifest.json
is written last.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import shutil
import tarfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, features
from safetensors.numpy import save

from relloc import checks
from relloc.data.check import Check, examine, summary
from relloc.data.image_set import ROLES, ImageSet, Splits, hash_lines
from relloc.data.images import ImageFile
from relloc.data.lists import MultiLabeled
from relloc.data.manifest import (
    FORMAT,
    MANIFEST,
    SETTINGS_FILE,
    UNFINISHED,
    VERSION,
    index_name,
    names_name,
    read_json,
    read_manifest,
    shard_name,
)
from relloc.data.parts import (
    FACTS,
    Span,
    about_part,
    as_json,
    names,
    records_of,
    save_part,
    sha256,
    spans,
)
from relloc.data.processes import Progress, Tick, work_through
from relloc.data.shards import decoded, shards
from relloc.errors import DataError, UnreadableImage, data_errors
from relloc.files import remove_all_unfinished, write_whole, writing
from relloc.geometry import ShortSide

CHECK_FILE = "check.json"
_SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
_ANEW = "Remove the folder that is packed into, and pack again"
_LONGEST_JPEG_PX = 65_500  # libjpeg's JPEG_MAX_DIMENSION
_HOW = ("unreadable", "kept", "encoded", "reduced")
_PACKED = np.dtype(
    [
        *FACTS.descr,
        ("how", "u1"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("stored_sha256", "u1", (32,)),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """How images are stored: none larger than `short_px` on the short side, as JPEG.

    292 px is what a 255 px crop of the published recipe is taken from (protocols.md 1.1).

    Raises:
        UsageError: a setting out of its range.
    """

    short_px: int
    quality: int
    subsampling: str
    images_per_shard: int

    def __post_init__(self) -> None:
        for name in ("short_px", "quality", "images_per_shard"):
            checks.whole(name, getattr(self, name))
        checks.number("quality", self.quality, at_most=100)  # 90 where small loss matters
        checks.one_of("subsampling", self.subsampling, _SUBSAMPLINGS)


def pack(
    data: Splits,
    out: Path,
    packing: Packing,
    *,
    published: Mapping[str, int] | None,
    workers: int,
    progress: Progress,
) -> Check:
    """Check every image and pack all into `out`, or go on with what is finished there.

    Raises:
        DataError: `out` holds something else, or could not be written, as on a full disk: what is
            finished stays, and the same call goes on.
    """
    wanted = _wanted(data, packing)
    advice = "The tars that are finished stay: mend this and start the same command again"
    with data_errors(f"packing into {out} stopped", OSError, advice=advice):
        if (out / MANIFEST).exists():
            return _finished_before(out, wanted)
        _begin(out, wanted)
        jobs = spans(data, packing.images_per_shard)
        left = [span for span in jobs if not _is_packed(out, span)]
        total = sum(map(len, jobs))
        done = total - sum(map(len, left))
        work = functools.partial(_pack_span, data, out, packing)
        work_through(work, left, workers=workers, total=total, done=done, progress=progress)
        return _finish(data, out, wanted, jobs, published)


def _wanted(data: Splits, packing: Packing) -> dict[str, Any]:
    """What decides every byte of the packed folder."""
    turbo = features.version("libjpeg_turbo")
    libjpeg = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
    return {
        **dataclasses.asdict(packing),
        "resampling": "bilinear, antialiased",
        "encoder": f"Pillow {PIL.__version__}, {libjpeg}",
        "originals": {role: _original_images(data.of(role)) for role in ROLES},
    }


def _original_images(images: ImageSet) -> dict[str, str | None]:
    """Hashes of what is packed."""
    labels, presence = images.labels, _presence(images)
    hashes = {
        "digest": images.digest(),
        "labels": None if labels is None else hash_lines(map(str, labels)),
    }
    return hashes if presence is None else {**hashes, "presence": hash_lines(map(str, presence))}


def _presence(images: ImageSet) -> list[list[int]] | None:
    """Which classes each image shows, if that is known; a warning where it should be and can't be read."""
    if not isinstance(images, MultiLabeled):
        return None
    try:
        return images.presence()
    except DataError as error:  # to pretrain on them is possible all the same
        warnings.warn(
            f"packed without what images show, which SVMs of VOC need: {error}", stacklevel=2
        )
        return None


def _finished_before(out: Path, wanted: dict[str, Any]) -> Check:
    shards(root=str(out))
    _refuse_others(out, read_manifest(out)["packed"], wanted)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    with _damages(out / CHECK_FILE):
        return Check.from_json(read_json(out / CHECK_FILE, _ANEW))


def _begin(out: Path, wanted: dict[str, Any]) -> None:
    settings = out / UNFINISHED / SETTINGS_FILE
    if settings.exists():
        with _damages(settings):
            _refuse_others(out, read_json(settings, _ANEW), wanted)
        for folder in (out, out / UNFINISHED):
            remove_all_unfinished(folder)
        return
    if out.is_dir() and any(path.name != UNFINISHED for path in out.iterdir()):
        raise DataError(
            f"out={out} holds files that relloc.prepare did not write: give a new or an empty folder"
        )
    write_whole(settings, as_json(wanted))


def _damages(path: Path) -> AbstractContextManager[None]:
    return data_errors(f"{path} is damaged", KeyError, TypeError, AttributeError, advice=_ANEW)


def _refuse_others(out: Path, before: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = [name for name in sorted(before | wanted) if before.get(name) != wanted.get(name)]
    differences = [
        f"{name} was {before.get(name)}, now {wanted.get(name)}"
        for name in changed
        if name != "originals"
    ]
    if "originals" in changed:  # an older relloc gave the same images another digest
        differences.append("the images or their labels are others, or an older relloc packed them")
    if differences:
        raise DataError(
            f"out={out} was packed with other settings: {', '.join(differences)}. Give another folder, or these"
        )


def _is_packed(out: Path, span: Span) -> bool:
    about = about_part(out / UNFINISHED, span) or {}
    tar = out / shard_name(span.split, span.number)
    return tar.is_file() and tar.stat().st_size == about.get("bytes")


def _pack_span(data: Splits, out: Path, packing: Packing, span: Span, tick: Tick) -> None:
    path = out / shard_name(span.split, span.number)
    images = data.of(span.role)
    with writing(path) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:

            def store(record: np.void, index: int, found: ImageFile) -> None:
                content, how = _stored(found, packing)
                record["how"], record["stored_sha256"] = _HOW.index(how), sha256(content)
                record["offset"], record["size"] = (
                    _add(tar, file, f"{index:09d}.jpg", content),
                    len(content),
                )
                if images.labels is not None:
                    _add(tar, file, f"{index:09d}.cls", str(images.labels[index]).encode())

            records, unreadable = examine(images, span, _PACKED, tick, store)
        size = file.tell()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    about = {"file": path.name, "bytes": size, "sha256": digest, "unreadable": unreadable}
    save_part(out / UNFINISHED, span, records, about)


def _add(tar: tarfile.TarFile, file: io.BufferedRandom, name: str, content: bytes) -> int:
    """Add a member that is the same bytes whoever writes it and when; where its content begins."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    start = file.tell() + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(content))
    return start


def _stored(found: ImageFile, packing: Packing) -> tuple[bytes, str]:
    if min(found.rgb.size) > packing.short_px:
        height, width = ShortSide(px=packing.short_px).size(found.rgb.height, found.rgb.width, 0)
        return _encoded(
            found.rgb.resize((width, height), Image.Resampling.BILINEAR), packing
        ), "reduced"
    if found.is_plain_jpeg:
        with contextlib.suppress(UnreadableImage):
            if np.array_equal(decoded(bytearray(found.content)), np.asarray(found.rgb)):
                return found.content, "kept"
    return _encoded(found.rgb, packing), "encoded"


def _encoded(rgb: Image.Image, packing: Packing) -> bytes:
    if max(rgb.size) > _LONGEST_JPEG_PX:
        raise UnreadableImage(
            f"would be {max(rgb.size)} px long, a JPEG is at most {_LONGEST_JPEG_PX}"
        )
    stream = io.BytesIO()
    rgb.info.clear()  # no comment of the original
    rgb.save(stream, "JPEG", quality=packing.quality, subsampling=packing.subsampling)
    return stream.getvalue()


def _finish(
    data: Splits,
    out: Path,
    wanted: dict[str, Any],
    parts: Sequence[Span],
    published: Mapping[str, int] | None,
) -> Check:
    found = summary(data, out / UNFINISHED, parts, published)
    manifest = {"format": FORMAT, "version": VERSION, "name": data.train.name, "packed": wanted}
    for role, checked in zip(ROLES, (found.train, found.held_out), strict=True):
        about = _write_index(data.of(role), out, [span for span in parts if span.role == role])
        manifest[role] = about | {
            "unreadable": checked.unreadable,
            "originals_sha256": checked.sha256,
        }
    write_whole(out / CHECK_FILE, as_json(found.as_json()))
    write_whole(out / MANIFEST, as_json(manifest))
    shutil.rmtree(out / UNFINISHED)
    return found


def _write_index(images: ImageSet, out: Path, parts: list[Span]) -> dict[str, Any]:
    """Write index and names of a split; its entry in the manifest, but for what checking found."""
    records, presence = records_of(out / UNFINISHED, parts), _presence(images)
    lines = [json.dumps(name).encode("ascii") + b"\n" for name in names(images)]
    named = b"".join(lines)
    # The digest of a split: classes, names, labels, and the hash of each stored image
    hasher = hashlib.sha256(f"{FORMAT} {json.dumps(list(images.classes))}\n".encode())
    hasher.update(named)
    index = {name: np.ascontiguousarray(records[name]) for name in ("offset", "size")}
    index["name_offset"] = np.cumsum([0, *map(len, lines)], dtype=np.int64)
    if images.labels is not None:
        index["label"] = np.asarray(images.labels, dtype=np.int64)
        hasher.update(index["label"].tobytes())
    hasher.update(records["stored_sha256"].tobytes())
    if presence is not None:
        index["presence"] = np.asarray(presence, dtype=np.int8)
    index_files = {names_name(images.split): named, index_name(images.split): save(index)}
    for name, content in index_files.items():
        write_whole(out / name, content)
    counts = np.bincount(records["how"], minlength=len(_HOW)).tolist()
    tars = [about_part(out / UNFINISHED, span) or {} for span in parts]
    entry = {
        "split": images.split,
        "images": len(images),
        "classes": list(images.classes),
        "stored": dict(zip(_HOW, counts, strict=True)),
        "shards": [{name: tar[name] for name in ("file", "bytes", "sha256")} for tar in tars],
        "index_sha256": {
            name: hashlib.sha256(content).hexdigest() for name, content in index_files.items()
        },
        "digest": hasher.hexdigest()[:16],
    }
    return entry if presence is None else {**entry, "multi_labeled": True}
