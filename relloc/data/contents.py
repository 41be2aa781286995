"""Hashes the contents of image files, so that results name the images that they were measured on.

A set of up to `WHOLE_IMAGES` images and `WHOLE_BYTES` is identified by every byte of every file. Of
a larger set, all names and sizes count, and the bytes of a sample that is the same at every start.
File times and the folder of the set do not count: a copy on a node's own disk is the same set.

Not noticed is, in a larger set, an image outside the sample that was replaced by one with the same
number of bytes.
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
# Hashed within a second from memory, within a minute from a slow file server.
WHOLE_IMAGES = 10_000
WHOLE_BYTES = 2 << 30
SAMPLED_IMAGES = 1_000
SAMPLED_BYTES = 1 << 30
# More than cores: threads wait for a file server, and hashing releases Python's lock.
_THREADS = 16
_PER_TASK = 100
# A digest has 14 hexadecimal digits and the version of these rules.
_DIGITS = 14
_VERSION = "-2"


def versioned(hasher: "hashlib._Hash") -> str:
    """Returns a digest of 16 characters that ends with the version of the rules it was made by.

    Digests of older relloc have no version at the end.
    """
    return hasher.hexdigest()[:_DIGITS] + _VERSION


def hash_files(
    paths: Sequence[str], names: Iterable[str], other_content: Iterable[str], progress: Progress
) -> str:
    """Returns the digest of a set of files, by the rules at the head of this module.

    `names` are what the files are called in the digest; `other_content` is hashed besides, such as
    labels. A file that is missing, can't be read or is no regular file counts as such: the set has
    another digest once it is repaired.
    """
    sizes = _in_threads(_size, paths, progress, "file sizes")
    hasher = hashlib.sha256(b"images in files\0")
    sizes_and_names = (f"{size} {name}" for name, size in zip(names, sizes, strict=True))
    for text in itertools.chain(other_content, sizes_and_names):
        # The length stands before the text: names may hold any character, even line ends, and two
        # different sets may not have the same text.
        hasher.update(f"{len(text)}:{text}".encode("utf-8", "surrogateescape"))
    sampled = [paths[index] for index in _sampled(sizes)]
    for content_hash in _in_threads(_content_hash, sampled, progress, "files"):
        hasher.update(content_hash)
    return versioned(hasher)


def _in_threads(
    function: Callable[[str], T], paths: Sequence[str], progress: Progress, what: str
) -> list[T]:
    """Returns the value of a function for each path, in their order, computed in threads."""
    # A hundred paths are one task, since a task for each would cost more than the work.
    tasks = [paths[start : start + _PER_TASK] for start in range(0, len(paths), _PER_TASK)]
    values: list[T] = []
    with ThreadPoolExecutor(_THREADS) as threads, progress(len(paths), 0) as report:
        for task_values in threads.map(lambda task: list(map(function, task)), tasks):
            values += task_values
            report(len(values), what)
    return values


def _size(path: str) -> int | None:
    """Returns the bytes of a regular file, or None for anything else."""
    # ValueError: a list may name a file with a NUL character.
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _sampled(sizes: Sequence[int | None]) -> list[int]:
    """Returns the indices of the files whose bytes count.

    In a small set these are all, in a larger one a seeded sample of limited bytes.
    """
    known_sizes = np.array([size or 0 for size in sizes], np.int64)
    if len(sizes) <= WHOLE_IMAGES and known_sizes.sum() <= WHOLE_BYTES:
        indices = np.arange(len(sizes))
    else:
        count = min(len(sizes), SAMPLED_IMAGES)
        rng = np.random.default_rng(0)
        indices = rng.choice(len(sizes), count, replace=False)
        # Files are taken in random order until their bytes exceed the limit, then sorted.
        bytes_so_far = np.cumsum(known_sizes[indices])
        indices = np.sort(indices[bytes_so_far <= SAMPLED_BYTES])
    return [index for index in indices.tolist() if sizes[index] is not None]


def _content_hash(path: str) -> bytes:
    """Returns the SHA-256 of a file's bytes, or a fixed text if it can't be read."""
    # O_NONBLOCK: to open a pipe would otherwise wait for its writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with open(os.open(path, flags), "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return b"can't be read"
