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
    sizes = in_threads(_size, paths, progress, "file sizes")
    hasher = hashlib.sha256(b"images in files\0")
    # Names and sizes of all files count, however many there are.
    named_sizes = zip(names, sizes, strict=True)
    sizes_and_names = (f"{size} {name}" for name, size in named_sizes)
    for text in itertools.chain(other_content, sizes_and_names):
        # The length stands before the text: names may hold any character, even line ends, and two
        # different sets may not have the same text.
        counted_text = f"{len(text)}:{text}"
        hasher.update(counted_text.encode("utf-8", "surrogateescape"))
    # Of the bytes, those of all files or of a sample count.
    sampled = [paths[index] for index in _sampled(sizes)]
    content_hashes = in_threads(_content_hash, sampled, progress, "files")
    for content_hash in content_hashes:
        hasher.update(content_hash)
    return versioned(hasher)


def in_threads(
    function: Callable[[str], T],
    paths: Sequence[str],
    progress: Progress,
    what: str,
) -> list[T]:
    """Returns the value of a function for each path, in their order, computed in threads."""

    def work_on(task: Sequence[str]) -> list[T]:
        return list(map(function, task))

    # A hundred paths are one task, since a task for each would cost more than the work.
    tasks = []
    for start in range(0, len(paths), _PER_TASK):
        stop = start + _PER_TASK
        tasks.append(paths[start:stop])
    values: list[T] = []
    with ThreadPoolExecutor(_THREADS) as threads, progress(len(paths), 0) as report:
        # map returns results in the order of the tasks.
        for task_values in threads.map(work_on, tasks):
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
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_size


def _sampled(sizes: Sequence[int | None]) -> list[int]:
    """Returns the indices of the files whose bytes count.

    In a small set these are all, in a larger one a seeded sample of limited bytes.
    """
    n_files = len(sizes)
    known_sizes = np.array([size or 0 for size in sizes], np.int64)
    is_small = n_files <= WHOLE_IMAGES and known_sizes.sum() <= WHOLE_BYTES
    if is_small:
        indices = np.arange(n_files)
    else:
        count = min(n_files, SAMPLED_IMAGES)
        # The same seed at every start: the digest has to be the same.
        rng = np.random.default_rng(0)
        drawn = rng.choice(n_files, count, replace=False)
        # Files are taken in random order until their bytes exceed the limit, then sorted.
        bytes_so_far = np.cumsum(known_sizes[drawn])
        within_limit = drawn[bytes_so_far <= SAMPLED_BYTES]
        indices = np.sort(within_limit)
    sampled = []
    for index in indices.tolist():
        if sizes[index] is not None:
            sampled.append(index)
    return sampled


def _content_hash(path: str) -> bytes:
    """Returns the SHA-256 of a file's bytes, or a fixed text if it can't be read."""
    # O_NONBLOCK: to open a pipe would otherwise wait for its writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
        with open(descriptor, "rb") as file:
            hasher = hashlib.file_digest(file, "sha256")
            return hasher.digest()
    except OSError:
        return b"can't be read"
