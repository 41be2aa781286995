"""Packs a data set into WebDataset tars, reduced in size, so that reading keeps up with training.

Images are stored as JPEGs or, for small data sets, as pixels, which need no decoding. The files
have the same bytes whatever the number of processes, and however often packing was killed and
started again. Records of finished parts lie in the folder `unfinished/` until all parts are
finished; manifest.json is written last. `relloc.data.shards` describes the files and reads them.
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
from collections.abc import Callable, Mapping, Sequence
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
    JPEG,
    MANIFEST,
    PIXELS,
    SETTINGS_FILE,
    UNFINISHED,
    VERSIONS,
    index_name,
    names_name,
    read_json,
    read_manifest,
    shard_name,
)
from relloc.data.parts import (
    FACTS,
    Part,
    as_json,
    divide_into_parts,
    names,
    read_part,
    records_of,
    save_part,
    sha256,
)
from relloc.data.pixels import SUFFIX, estimated_bytes, packed_size, ppm_header, resized
from relloc.data.processes import Progress, Tick, work_through
from relloc.data.shards import decoded, shards
from relloc.data.unnamed import UNNAMED
from relloc.errors import DataError, UnreadableImage, UsageError, data_errors
from relloc.files import remove_all_unfinished, write_whole, writing

CHECK_FILE = "check.json"
_FORMATS = (JPEG, PIXELS)
_SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
_ANEW = "Remove the folder that is packed into, and pack again"
# JPEG_MAX_DIMENSION of libjpeg.
_LONGEST_JPEG_PX = 65_500
# What was done with an image, as a number in its record: it could not be read; its bytes, or its
# pixels, were kept; it was encoded as JPEG in its own size; it was reduced; it was enlarged.
_HOW = ("unreadable", "kept", "encoded", "reduced", "enlarged")
# The record of a packed image: what checking needs (FACTS), and where it lies in its tar.
_PACKED = np.dtype(
    [
        *FACTS.descr,
        ("how", "u1"),
        ("offset", "<i8"),
        ("size", "<i8"),
        ("stored_sha256", "u1", (32,)),
    ]
)
# The same of an image that is stored as pixels, with the number of their rows.
_PACKED_PIXELS = np.dtype([*_PACKED.descr, ("stored_height", "<i4")])
# The settings of packing that are not given, by the format.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    JPEG: {"enlarge": False, "images_per_shard": 5000, "quality": 90, "subsampling": "4:2:0"},
    # Fewer images, so that files are not much larger than those of JPEGs.
    PIXELS: {"enlarge": True, "images_per_shard": 500},
}
# What folders that an older relloc packed do not say of themselves.
_OF_OLDER_RELLOC = {"format": JPEG, "enlarge": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """The settings of packing: images are stored with a short side of at most `short_px`.

    With `enlarge` smaller images are enlarged to it, so that each has this short side. The
    published recipe takes its 255 px crop from images of 292 px (docs/protocols.md 1.1). `format`
    is "jpeg", with the `quality` (1 to 100) and the `subsampling` (such as "4:2:0") of the
    encoder, or "pixels", which are stored without loss and have neither.

    Raises:
        UsageError: a setting is out of its range, or does not belong to the format.
    """

    short_px: int
    images_per_shard: int
    format: str = JPEG
    enlarge: bool = False
    quality: int | None = None
    subsampling: str | None = None

    def __post_init__(self) -> None:
        checks.one_of("format", self.format, _FORMATS)
        for name in ("short_px", "images_per_shard"):
            checks.whole(name, getattr(self, name))
        checks.true_or_false("enlarge", self.enlarge)
        if self.format == JPEG:
            checks.whole("quality", self.quality)
            checks.number("quality", self.quality, at_most=100)
            checks.one_of("subsampling", self.subsampling, _SUBSAMPLINGS)
            return
        for name in ("quality", "subsampling"):
            value = getattr(self, name)
            if value is not None:
                raise UsageError(
                    f"{name} is {value}, but format={self.format} stores no JPEGs: "
                    f"leave {name} out, or give format={JPEG}"
                )

    @property
    def in_pixels(self) -> bool:
        """Whether images are stored as pixels."""
        return self.format == PIXELS


def packing_of(*, format: Any, short_px: Any, **settings: Any) -> Packing:
    """Returns the settings of packing, where others that are None have the default of the format.

    Example:
        >>> packing_of(format="pixels", short_px=292, enlarge=None, images_per_shard=None)

    Raises:
        UsageError: as `Packing`.
    """
    checks.one_of("format", format, _FORMATS)
    given = {name: value for name, value in settings.items() if value is not None}
    return Packing(format=format, short_px=short_px, **{**_DEFAULTS[format], **given})


def _without_message(_text: str) -> None:
    pass


def pack(
    data: Splits,
    out: Path,
    packing: Packing,
    *,
    workers: int,
    progress: Progress,
    print_message: Callable[[str], None] = _without_message,
) -> Check:
    """Checks every image and packs all into the folder `out`; returns the result of the check.

    A call that was interrupted is continued: tars that are finished are not packed again. Before
    pixels are stored, `print_message` is called with a sentence about the space that they need.

    Raises:
        DataError: `out` holds other files, or can't be written to, as on a full disk; or the disk
            has less space than pixels need. What is finished stays, and the same call continues.
    """
    wanted = _wanted(data, packing)
    advice = "The tars that are finished stay: repair this and start the same command again"
    with data_errors(f"packing into {out} stopped", OSError, advice=advice):
        # The manifest is written last: where it exists all is finished.
        if (out / MANIFEST).exists():
            return _finished_before(out, wanted)
        _check_folder(out, wanted)
        # One part is one tar. Parts that an earlier call finished are left out.
        parts = divide_into_parts(data, packing.images_per_shard)
        left = [part for part in parts if not _is_packed(out, part)]
        if packing.in_pixels and left:
            _check_space(data, out, packing, left, print_message)
        _begin(out, wanted)
        total = sum(map(len, parts))
        done = total - sum(map(len, left))
        work = functools.partial(_pack_part, data, out, packing)
        work_through(work, left, workers=workers, total=total, done=done, progress=progress)
        return _finish(data, out, wanted, parts)


def _wanted(data: Splits, packing: Packing) -> dict[str, Any]:
    """Returns everything that decides the bytes of the packed folder, for its manifest."""
    turbo = features.version("libjpeg_turbo")
    libjpeg = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
    # Pixels, too, depend on what decoded the originals.
    codec = "decoder" if packing.in_pixels else "encoder"
    return {
        **dataclasses.asdict(packing),
        "resampling": "bilinear, antialiased",
        codec: f"Pillow {PIL.__version__}, {libjpeg}",
        "originals": {role: _original_images(data.of(role)) for role in ROLES},
    }


def _original_images(images: ImageSet) -> dict[str, str | None]:
    """Returns hashes of the images, labels and presence of classes in one split."""
    labels = images.labels
    presence = _presence(images)
    hashes = {
        "digest": images.digest(),
        "labels": None if labels is None else hash_lines(map(str, labels)),
    }
    if presence is not None:
        hashes["presence"] = hash_lines(map(str, presence))
    return hashes


def _presence(images: ImageSet) -> list[list[int]] | None:
    """Returns which classes each image shows, or None if that is unknown.

    It is a warning if it should be known but can't be read: pretraining does not need it.
    """
    if not isinstance(images, MultiLabeled):
        return None
    try:
        return images.presence()
    except DataError as error:
        warnings.warn(
            f"packed without what images show, which SVMs of VOC need: {error}", stacklevel=2
        )
        return None


def _finished_before(out: Path, wanted: dict[str, Any]) -> Check:
    """Returns the check of a folder that an earlier call finished, if it is whole and the same."""
    # Opening it verifies its files.
    shards(root=str(out))
    _refuse_others(out, read_manifest(out)["packed"], wanted)
    # An earlier call may have been killed after it wrote the manifest, before it cleaned up.
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    with _damages(out / CHECK_FILE):
        return Check.from_json(read_json(out / CHECK_FILE, _ANEW))


def _check_folder(out: Path, wanted: dict[str, Any]) -> None:
    """Raises `DataError` unless `out` is new, empty, or begun with the same settings."""
    settings = out / UNFINISHED / SETTINGS_FILE
    if settings.exists():
        with _damages(settings):
            _refuse_others(out, read_json(settings, _ANEW), wanted)
        return
    if out.is_dir() and any(path.name != UNFINISHED for path in out.iterdir()):
        raise DataError(
            f"out={out} holds files that relloc.prepare did not write: "
            "give a new or an empty folder"
        )


def _check_space(
    data: Splits,
    out: Path,
    packing: Packing,
    parts: Sequence[Part],
    print_message: Callable[[str], None],
) -> None:
    """Tells how much space the pixels of these parts need. Raises `DataError` if there is less."""
    needed = estimated_bytes(data, parts, short_px=packing.short_px, enlarge=packing.enlarge)
    # The folder itself may not exist yet.
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    # What a killed call was writing is removed before packing goes on.
    unfinished = sum(path.stat().st_size for path in out.glob(".*.unfinished"))
    free = shutil.disk_usage(folder).free + unfinished
    space = f"about {_size_text(needed)} of pixels, and {_size_text(free)} are free in {folder}"
    if needed > free:
        raise DataError(
            f"out={out} would take {space}: free some, give a folder on another disk, a smaller "
            f"short_px than {packing.short_px}, or format={JPEG}"
        )
    print_message(f"pack    {space}")


def _size_text(n_bytes: int) -> str:
    """Returns a number of bytes in GB, or in MB where it is less than 1 GB."""
    if n_bytes < 1e9:
        return f"{n_bytes / 1e6:.1f} MB"
    return f"{n_bytes / 1e9:.2f} GB"


def _begin(out: Path, wanted: dict[str, Any]) -> None:
    """Prepares `out` for packing, or for continuing."""
    settings = out / UNFINISHED / SETTINGS_FILE
    if not settings.exists():
        write_whole(settings, as_json(wanted))
        return
    # Files that a killed call was writing.
    for folder in (out, out / UNFINISHED):
        remove_all_unfinished(folder)


def _damages(path: Path) -> AbstractContextManager[None]:
    """Turns the errors of a JSON file with unexpected content into a `DataError`."""
    return data_errors(f"{path} is damaged", KeyError, TypeError, AttributeError, advice=_ANEW)


def _refuse_others(out: Path, before: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises `DataError` if the folder was packed with other settings or from other images."""
    before = _OF_OLDER_RELLOC | before
    changed = [name for name in sorted(before | wanted) if before.get(name) != wanted.get(name)]
    # Most settings of another format are others as well: they say nothing more.
    if "format" in changed:
        changed = ["format"]
    differences = [
        f"{name} was {before.get(name)}, now {wanted.get(name)}"
        for name in changed
        if name != "originals"
    ]
    # Hashes say nothing to a reader. An older relloc gave the same images another digest.
    if "originals" in changed:
        differences.append("the images or their labels are others, or an older relloc packed them")
    if differences:
        raise DataError(
            f"out={out} was packed with other settings: {', '.join(differences)}. "
            "Give another folder, or the earlier settings"
        )


def _is_packed(out: Path, part: Part) -> bool:
    """Returns whether the tar of a part is finished."""
    about = read_part(out / UNFINISHED, part) or {}
    tar = out / shard_name(part.split, part.number)
    return tar.is_file() and tar.stat().st_size == about.get("bytes")


def _pack_part(data: Splits, out: Path, packing: Packing, part: Part, tick: Tick) -> None:
    """Packs one part into its tar, and saves the records of its images."""
    path = out / shard_name(part.split, part.number)
    images = data.of(part.role)
    suffix = SUFFIX if packing.in_pixels else "jpg"
    kind = _PACKED_PIXELS if packing.in_pixels else _PACKED
    with writing(path) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:

            def store(record: np.void, index: int, original: ImageFile) -> None:
                stored = _stored(original, packing)
                record["how"] = _HOW.index(stored.how)
                record["stored_sha256"] = sha256(stored.content)
                start = _add(tar, file, f"{index:09d}.{suffix}", stored.content)
                record["offset"] = start + stored.n_header
                record["size"] = len(stored.content) - stored.n_header
                if packing.in_pixels:
                    record["stored_height"] = stored.height
                if images.labels is not None:
                    label = str(images.labels[index])
                    _add(tar, file, f"{index:09d}.cls", label.encode())

            records, unreadable = examine(images, part, kind, tick, store)
        # The hash is computed from the file itself: closing the tar has added its end.
        size = file.tell()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    about = {"file": path.name, "bytes": size, "sha256": digest, "unreadable": unreadable}
    save_part(out / UNFINISHED, part, records, about)


def _add(tar: tarfile.TarFile, file: io.BufferedRandom, name: str, content: bytes) -> int:
    """Adds a member to a tar, and returns where its content begins.

    The bytes do not depend on user or time: a new `TarInfo` has owner 0 and time 0.
    """
    member = tarfile.TarInfo(name)
    member.size = len(content)
    # The content follows a header of one block.
    start = file.tell() + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(content))
    return start


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    """An image as it is stored, and how it was made (one of `_HOW`).

    `n_header` is the number of bytes before what the index points at: 0 of a JPEG, and of pixels
    the length of their PPM header. `height` is that of the stored image.
    """

    content: bytes
    how: str
    height: int
    n_header: int = 0


def _stored(original: ImageFile, packing: Packing) -> _Stored:
    """Returns an image as it is stored.

    Raises:
        UnreadableImage: the resized image would be too large.
    """
    rgb = original.rgb
    size = packed_size(rgb.height, rgb.width, packing.short_px, enlarge=packing.enlarge)
    height, width = size
    own_size = (rgb.height, rgb.width)
    how = "kept"
    if size != own_size:
        how = "reduced" if min(own_size) > packing.short_px else "enlarged"

    if packing.in_pixels:
        header = ppm_header(height, width)
        content = header + resized(rgb, size).tobytes()
        return _Stored(content=content, how=how, height=height, n_header=len(header))

    if size != own_size:
        content = _encoded(resized(rgb, size), packing)
        return _Stored(content=content, how=how, height=height)
    # A small JPEG is kept as it is, without loss, if the fast decoder reads the same pixels.
    if original.is_plain_jpeg:
        with contextlib.suppress(UnreadableImage):
            pixels = decoded(bytearray(original.content))
            if np.array_equal(pixels, np.asarray(rgb)):
                return _Stored(content=original.content, how=how, height=height)
    return _Stored(content=_encoded(rgb, packing), how="encoded", height=height)


def _encoded(rgb: Image.Image, packing: Packing) -> bytes:
    """Returns an image as JPEG. Raises `UnreadableImage` if it is too long for that format."""
    if max(rgb.size) > _LONGEST_JPEG_PX:
        raise UnreadableImage(
            f"would be {max(rgb.size)} px long, a JPEG is at most {_LONGEST_JPEG_PX}"
        )
    stream = io.BytesIO()
    # Pillow would write comments and resolution of the original, which are not pixels.
    rgb.info.clear()
    rgb.save(stream, "JPEG", quality=packing.quality, subsampling=packing.subsampling)
    return stream.getvalue()


def _finish(
    data: Splits,
    out: Path,
    wanted: dict[str, Any],
    parts: Sequence[Part],
) -> Check:
    """Writes the indices, the check and the manifest of a folder whose tars are all finished."""
    result = summary(data, out / UNFINISHED, parts)
    version = VERSIONS[wanted["format"]]
    manifest = {"format": FORMAT, "version": version, "name": data.train.name, "packed": wanted}
    if data.is_unnamed:
        manifest |= {"name": UNNAMED, "called": data.train.name}
    for role, split_check in zip(ROLES, (result.train, result.held_out), strict=True):
        role_parts = [part for part in parts if part.role == role]
        entry = _write_index(data.of(role), out, role_parts)
        manifest[role] = entry | {
            "unreadable": split_check.unreadable,
            "originals_sha256": split_check.sha256,
        }
    # The manifest comes last: where it exists everything else does.
    write_whole(out / CHECK_FILE, as_json(result.as_json()))
    write_whole(out / MANIFEST, as_json(manifest))
    shutil.rmtree(out / UNFINISHED)
    return result


def _write_index(images: ImageSet, out: Path, parts: list[Part]) -> dict[str, Any]:
    """Writes the index and the names of a split, and returns its entry in the manifest."""
    records = records_of(out / UNFINISHED, parts)
    presence = _presence(images)
    lines = [json.dumps(name).encode("ascii") + b"\n" for name in names(images)]
    names_content = b"".join(lines)

    # The digest of a split covers classes, names, labels, and the hash of each stored image, in
    # this order.
    hasher = hashlib.sha256(f"{FORMAT} {json.dumps(list(images.classes))}\n".encode())
    hasher.update(names_content)
    index = {name: np.ascontiguousarray(records[name]) for name in ("offset", "size")}
    if "stored_height" in (records.dtype.names or ()):
        index["height"] = records["stored_height"].astype(np.int64)
    # Where the name of each image begins in the file of names, and where the last one ends.
    index["name_offset"] = np.cumsum([0, *map(len, lines)], dtype=np.int64)
    if images.labels is not None:
        index["label"] = np.asarray(images.labels, dtype=np.int64)
        hasher.update(index["label"].tobytes())
    hasher.update(records["stored_sha256"].tobytes())
    if presence is not None:
        index["presence"] = np.asarray(presence, dtype=np.int8)

    index_files = {
        names_name(images.split): names_content,
        index_name(images.split): save(index),
    }
    index_hashes = {}
    for name, content in index_files.items():
        write_whole(out / name, content)
        index_hashes[name] = hashlib.sha256(content).hexdigest()

    tars = []
    for part in parts:
        about = read_part(out / UNFINISHED, part) or {}
        tars.append({name: about[name] for name in ("file", "bytes", "sha256")})
    counts = np.bincount(records["how"], minlength=len(_HOW)).tolist()
    entry = {
        "split": images.split,
        "images": len(images),
        "classes": list(images.classes),
        "stored": dict(zip(_HOW, counts, strict=True)),
        "shards": tars,
        "index_sha256": index_hashes,
        "digest": hasher.hexdigest()[:16],
    }
    if presence is not None:
        entry["multi_labeled"] = True
    return entry
