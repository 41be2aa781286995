"""Finds the image files in and below a folder, and counts what is passed over."""

import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from relloc.data.images import SUFFIXES, begins_as_image
from relloc.errors import DataError, data_errors
from relloc.terminal import escaped, quantity

# Folders that programs make beside a user's, in lower case: thumbnails of a network storage, trash,
# what macOS packs into archives, what a repaired file system found. Names that begin with a dot are
# passed over as well.
_SYSTEM_FOLDERS = {
    "@eadir",
    "@recycle",
    "@recently-snapshot",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "__macosx",
    "__pycache__",
    "lost+found",
    "system volume information",
}
# Of these, the ones that unpacking an archive or repairing a disk leaves. Images of a class may lie
# in them.
LEFTOVERS = {"__macosx", "lost+found"}
_SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db"}
# Formats that Pillow does not read, or not without further packages.
_OTHER_IMAGES = {
    *(
        ".heic",
        ".heif",
        ".jxl",
        ".raw",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".dng",
        ".orf",
        ".rw2",
        ".raf",
        ".pef",
        ".srw",
    ),
    *(".psd", ".svg", ".eps", ".exr", ".hdr", ".tga", ".jxr", ".j2k", ".ico", ".pfm", ".xcf"),
}
# Longer suffixes are counted together, as they are hardly those of a file format.
_LONGEST_SUFFIX = 12
# How many kinds of files a message names.
_MOST_KINDS_NAMED = 8

PassedOver = collections.Counter[str]
"""Number of files or folders that were passed over, by kind: `.heic`, `folders @eaDir`."""


def images_below(folder: Path, passed_over: PassedOver) -> Iterator[str]:
    """Yields the paths of the images in and below a folder, and counts in `passed_over`.

    First come the images of the folder itself in sorted order, then those of its folders, in
    sorted order. Links are followed, but not to a folder above, and to no folder twice: no image
    comes twice.

    Raises:
        DataError: a folder can't be listed.
    """
    # Folders to enter, as (path, path without links), the next one last.
    entered: set[str] = set()
    waiting = [(str(folder), os.path.realpath(folder))]
    while waiting:
        path, real_path = waiting.pop()
        if real_path in entered:
            continue
        entered.add(real_path)
        images, folders = _listed(path, passed_over)
        yield from images
        for entry in reversed(folders):
            # realpath asks the file system for every part of a path: only links need it.
            inner_path = os.path.join(real_path, entry.name)
            if entry.is_symlink():
                inner_path = os.path.realpath(entry.path)
            is_above = f"{real_path}/".startswith(f"{inner_path.rstrip('/')}/")
            if is_above:
                passed_over["links to a folder above"] += 1
            else:
                waiting.append((entry.path, inner_path))


def outside_of_classes(folder: Path, passed_over: PassedOver) -> None:
    """Counts in `passed_over` what lies beside class folders and therefore has no label."""
    images, _ = _listed(str(folder), passed_over)
    passed_over["images in no class folder"] += len(images)


def _listed(folder: str, passed_over: PassedOver) -> tuple[list[str], list[os.DirEntry[str]]]:
    """Returns the images in a folder, and its folders that may hold images, both sorted."""
    images = []
    folders = []
    for entry in _entries(folder):
        if not _is_folder(entry):
            if _is_image(entry, passed_over):
                images.append(entry.path)
        elif entry.name.lower() in _SYSTEM_FOLDERS:
            passed_over[f"folders {escaped(entry.name)}"] += 1
        else:
            folders.append(entry)
    return images, folders


def class_folders_of(folder: Path) -> tuple[str, ...]:
    """Returns the sorted names of the folders that may be classes; none if `folder` is missing.

    Raises:
        DataError: the folder can't be listed, or an archive or a repaired disk left a folder in it
            that may hold images of a class.
    """
    if not folder.is_dir():
        return ()
    names = [entry.name for entry in _entries(str(folder)) if _is_folder(entry)]
    classes = tuple(name for name in names if name.lower() not in _SYSTEM_FOLDERS)
    leftovers = [name for name in names if name.lower() in LEFTOVERS]
    if leftovers and classes:
        raise DataError(
            f"{folder / leftovers[0]} is no class, but what unpacking an archive or repairing a "
            "disk left: look whether it holds images of a class, then remove it"
        )
    return classes


def describe_passed_over(passed_over: PassedOver) -> str:
    """Returns a sentence on what was passed over, or "" if nothing was."""
    most_common = passed_over.most_common(_MOST_KINDS_NAMED)
    kinds = [f"{count} {kind}" for kind, count in most_common if count]
    if not kinds:
        return ""
    sentence = f"passed over: {', '.join(kinds)}"
    n_others = passed_over.total() - sum(count for _, count in most_common)
    if n_others:
        sentence += f" and {quantity(n_others, 'other')}"
    if _OTHER_IMAGES & set(passed_over):
        sentence += "; to use them, convert them to JPEG or PNG"
    return sentence


def first_names(names: Sequence[str], most: int = 8) -> str:
    """Returns the first of many names for a message, separated by commas."""
    text = ", ".join(map(escaped, names[:most]))
    if len(names) > most:
        text += ", …"
    return text


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Returns the files and folders in a folder, sorted, without those that begin with a dot."""
    advice = "Its images would be missing: make it readable, or move it out of the data set"
    problem = f"{escaped(folder)} can't be listed"
    with data_errors(problem, OSError, advice=advice), os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        return sorted(visible, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is a folder, or a link to one."""
    # A directory listing says the type of an entry; only links have to be looked up.
    if entry.is_dir(follow_symlinks=False):
        return True
    return entry.is_symlink() and os.path.isdir(entry.path)


def _is_image(entry: os.DirEntry[str], passed_over: PassedOver) -> bool:
    """Returns whether a file is an image by its name or, without a suffix, by its content."""
    name = entry.name.lower()
    suffix = os.path.splitext(name)[1]
    if name.endswith(SUFFIXES):
        is_file = entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)
        # A link to nothing counts as an image, and is reported as unreadable when it is read.
        if is_file or not os.path.exists(entry.path):
            return True
        passed_over["pipes, sockets or devices"] += 1
    elif not suffix and begins_as_image(entry.path):
        return True
    elif name not in _SYSTEM_FILES:
        kind = escaped(suffix) or "without a suffix"
        if len(suffix) > _LONGEST_SUFFIX:
            kind = "with longer suffixes"
        passed_over[kind] += 1
    return False
