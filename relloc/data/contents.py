"""The identity of images in files: a hash of what they hold, so that replaced images are another data set.

A set of up to `WHOLE_IMAGES` images and `WHOLE_BYTES` is identified by every byte of every file. Of a larger one all
names and all sizes count, and the bytes of a sample, the same at every start. Times and the folder that the set lies
in do not count: a copy on a node's own disk is the same set.

What can't be seen: in a larger set, an image outside the sample that was replaced by one of the same size in bytes.
"""

import hashlib
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from relloc.data.processes import Progress

T = TypeVar("T")
WHOLE_IMAGES = 10_000  # hashed within a second from this machine's memory, within a minute from a slow file server
WHOLE_BYTES = 2 << 30
SAMPLED_IMAGES = 1_000
SAMPLED_BYTES = 1 << 30
_THREADS = 16  # they wait for a file server, not for a core
_PER_TASK = 100
_DIGITS = 14
_VERSION = "-2"


def versioned(hasher: "hashlib._Hash") -> str:
    """A digest of 16 characters. Its end says by which rules it was made: older ones have none."""
    return hasher.hexdigest()[:_DIGITS] + _VERSION


def hash_files(
    paths: Sequence[str], names: Iterable[str], told_besides: Iterable[str], progress: Progress
) -> str:
    """The digest of a set of files: their `names`, sizes and bytes as the head of this module says, and `told_besides`.

    A file that is missing, can't be read or is no regular file counts as such: mended, the set is another one.
    """
    sizes = _in_threads(_size, paths, progress, "file sizes")
    hasher = hashlib.sha256(b"images in files\0")
    for text in itertools.chain(
        told_besides, (f"{size} {name}" for name, size in zip(names, sizes, strict=True))
    ):
        # The length before the text: names may hold any character, line ends too.
        hasher.update(f"{len(text)}:{text}".encode("utf-8", "surrogateescape"))
    for content in _in_threads(
        _content, [paths[place] for place in _sampled(sizes)], progress, "files"
    ):
        hasher.update(content)
    return versioned(hasher)


def _in_threads(
    ask: Callable[[str], T], paths: Sequence[str], progress: Progress, what: str
) -> list[T]:
    """What `ask` gives of each path, in their order."""
    parts = [paths[start : start + _PER_TASK] for start in range(0, len(paths), _PER_TASK)]
    found: list[T] = []
    with ThreadPoolExecutor(_THREADS) as threads, progress(len(paths), 0) as tell:
        for of_part in threads.map(lambda part: list(map(ask, part)), parts):
            found += of_part
            tell(len(found), what)
    return found


def _size(path: str) -> int | None:
    """Bytes of a regular file; None of anything else."""
    try:
        about = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in a name that a list gave
        return None
    return about.st_size if stat.S_ISREG(about.st_mode) else None


def _sampled(sizes: Sequence[int | None]) -> list[int]:
    """Which files are read: all in a small set, a seeded sample of limited bytes in a larger one."""
    known = np.array([size or 0 for size in sizes], np.int64)
    if len(sizes) <= WHOLE_IMAGES and known.sum() <= WHOLE_BYTES:
        places = np.arange(len(sizes))
    else:
        count = min(len(sizes), SAMPLED_IMAGES)
        places = np.random.default_rng(0).choice(len(sizes), count, replace=False)
        places = np.sort(places[np.cumsum(known[places]) <= SAMPLED_BYTES])
    return [place for place in places.tolist() if sizes[place] is not None]


def _content(path: str) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return b"can't be read"
