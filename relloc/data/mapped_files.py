"""Files that are read as memory: their bytes are pages of the system's cache, and no copies.

Processes that map the same file share its pages, so that many of them read a file that is in
memory once.
"""

import mmap
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

# Files that stay mapped, each of which keeps a descriptor open. The limit of those is often 1024.
_MOST_MAPPED = 512


class MappedFiles:
    """A cache of mapped files: each process maps a file at the first read, and keeps some mapped.

    A file is unmapped when neither this object nor an array of its bytes is left.
    """

    def __init__(self) -> None:
        self._mapped: dict[Path, mmap.mmap] = {}

    def view(self, path: Path, offset: int, size: int) -> UInt8[np.ndarray, "size"]:
        """Returns `size` bytes at `offset` as an array that can't be written to.

        The file has to stay as it is while the array is in use: the system kills a process (by
        SIGBUS) that reads bytes which were cut off after this call, or which the disk has lost.

        Raises:
            OSError: the file can't be mapped.
            EOFError: the file ends before.
        """
        mapped = self._mapped.get(path)
        if mapped is None:
            mapped = _map(path)
            # Files beyond the limit are mapped for this array only.
            if len(self._mapped) < _MOST_MAPPED:
                self._mapped[path] = mapped
        # `size()` asks the system: the file may have been cut since it was mapped.
        n_bytes = min(len(mapped), mapped.size())
        if offset + size > n_bytes:
            raise EOFError(f"{path} ends before byte {offset + size}")
        return np.frombuffer(mapped, dtype=np.uint8, count=size, offset=offset)


def _map(path: Path) -> mmap.mmap:
    """Maps a whole file for reading. Raises `EOFError` if it is empty."""
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            # Python's words for a file without any byte
            raise EOFError(f"{path} is empty") from error
