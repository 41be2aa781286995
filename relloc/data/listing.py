"""Finding the images below a folder: what counts as one, and an account of what was passed over."""

import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from relloc.data.images import SUFFIXES, begins_as_image
from relloc.errors import DataError, data_errors
from relloc.terminal import escaped

# Folders that programs keep beside a user's: thumbnails of a network storage, trash, what macOS packs into archives,
# what a repaired file system found. Names that begin with a dot are passed over besides. In lower case.
_NO_FOLDERS_OF_IMAGES = {
    *(
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "__macosx",
        "__pycache__",
    ),
    *("lost+found", "system volume information"),
}
# Of these, the ones that unpacking or repairing an archive or a disk leaves: images of a class may lie in them.
LEFTOVERS = {"__macosx", "lost+found"}
_NO_FILES_OF_A_USER = {"thumbs.db", "desktop.ini", "ehthumbs.db"}
# Images that Pillow does not read, or not alone
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
_LONGEST_SUFFIX = 12
_KINDS_TOLD = 8

PassedOver = collections.Counter[str]
"""How many files or folders were not taken, by what a person calls them: `.heic`, `folders @eaDir`."""


def images_below(folder: Path, passed_over: PassedOver) -> Iterator[str]:
    """The images in and below a folder: first its own in sorted order, then those of its folders, in sorted order.

    Links are followed, but not to a folder above, and to none twice: no image is taken twice.
    `passed_over` is added to.

    Raises:
        DataError: a folder can't be listed.
    """
    entered: set[str] = set()
    waiting = [(str(folder), os.path.realpath(folder))]
    while waiting:
        here, real = waiting.pop()
        if real in entered:
            continue
        entered.add(real)
        images, folders = _found_in(here, passed_over)
        yield from images
        for entry in reversed(folders):  # the last is entered next
            there = (
                os.path.realpath(entry.path)
                if entry.is_symlink()
                else os.path.join(real, entry.name)
            )
            if f"{real}/".startswith(f"{there.rstrip('/')}/"):
                passed_over["links to a folder above"] += 1
            else:
                waiting.append((entry.path, there))


def outside_of_classes(folder: Path, passed_over: PassedOver) -> None:
    """Count what lies in a folder of class folders beside these."""
    images, _ = _found_in(str(folder), passed_over)
    passed_over["images in no class folder"] += len(images)


def _found_in(folder: str, passed_over: PassedOver) -> tuple[list[str], list[os.DirEntry[str]]]:
    """The images in a folder, and its folders that may hold some, sorted."""
    images, folders = [], []
    for entry in _entries(folder):
        if not _is_folder(entry):
            if _is_image(entry, passed_over):
                images.append(entry.path)
        elif entry.name.lower() in _NO_FOLDERS_OF_IMAGES:
            passed_over[f"folders {escaped(entry.name)}"] += 1
        else:
            folders.append(entry)
    return images, folders


def class_folders_of(folder: Path) -> tuple[str, ...]:
    """The names of the folders in a folder that may be classes, sorted; none where it is no folder.

    Raises:
        DataError: it can't be listed, or holds what unpacking left, in which images of a class may be.
    """
    names = (
        [entry.name for entry in _entries(str(folder)) if _is_folder(entry)]
        if folder.is_dir()
        else []
    )
    classes = tuple(name for name in names if name.lower() not in _NO_FOLDERS_OF_IMAGES)
    left = [name for name in names if name.lower() in LEFTOVERS]
    if left and classes:
        raise DataError(
            f"{folder / left[0]} is no class, but what unpacking an archive or repairing a disk left: look whether it "
            "holds images of a class, then remove it"
        )
    return classes


def told_passed_over(passed_over: PassedOver) -> str:
    """One sentence on what was passed over; empty where nothing was."""
    most = passed_over.most_common(_KINDS_TOLD)
    kinds = [f"{count} {kind}" for kind, count in most if count]
    if not kinds:
        return ""
    others = passed_over.total() - sum(count for _, count in most)
    rest = f" and {others} others" if others else ""
    advice = (
        "; what relloc is to take of them, convert to JPEG or PNG"
        if _OTHER_IMAGES & set(passed_over)
        else ""
    )
    return f"passed over: {', '.join(kinds)}{rest}{advice}"


def first_names(names: Sequence[str], most: int = 8) -> str:
    """The first of many names, as they may stand in a message."""
    return ", ".join(map(escaped, names[:most])) + (", …" if len(names) > most else "")


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted; names that begin with a dot are passed over."""
    advice = "Its images would be missing: make it readable, or move it out of the data set"
    with (
        data_errors(f"{escaped(folder)} can't be listed", OSError, advice=advice),
        os.scandir(folder) as entries,
    ):
        return sorted(
            (each for each in entries if not each.name.startswith(".")),
            key=lambda entry: entry.name,
        )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _is_image(entry: os.DirEntry[str], passed_over: PassedOver) -> bool:
    name = entry.name.lower()
    suffix = os.path.splitext(name)[1]
    if name.endswith(SUFFIXES):
        # A link to nothing is an image that can't be read: it is told as such, as it once was one.
        if (
            entry.is_file(follow_symlinks=False)
            or os.path.isfile(entry.path)
            or not os.path.exists(entry.path)
        ):
            return True
        passed_over["pipes, sockets or devices"] += 1
    elif not suffix and begins_as_image(entry.path):
        return True
    elif name not in _NO_FILES_OF_A_USER:
        kind = escaped(suffix) or "without a suffix"
        passed_over[kind if len(suffix) <= _LONGEST_SUFFIX else "with longer suffixes"] += 1
    return False
