"""The console's streams: they outlive who reads them, and names that are printed can't act on a terminal."""

import contextlib
import errno
import io
import os
import sys
import unicodedata
from collections.abc import Callable
from typing import Any, NoReturn

_FULL = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
)  # a file that output goes to; there may be room again
# Controls, bidirectional marks, halves of characters (bytes of a name that are no UTF-8), line and paragraph ends
_ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # of Persian, Hindi and emoji: they reorder and hide nothing
_EXIT_INTERRUPTED = 130
_EXIT_UNWRITTEN = 1


def escaped(text: str, *, keep: str = "") -> str:
    r"""Text with the characters that act on a terminal written as `\x1b`, `\n`, `\u202e`; those in `keep` stay."""
    if text.isprintable():
        return text
    return "".join(_shown(char) if char not in keep else char for char in text)


def _shown(char: str) -> str:
    if unicodedata.category(char) not in _ACTING or char in _JOINERS:
        return char
    return char.encode("unicode_escape").decode("ascii")


def complain(message: object) -> None:
    """One message on stderr, after all that was printed; lines stay lines, and nothing in it acts on the terminal."""
    sys.stdout.flush()
    _print_on_stderr(message)


def _print_on_stderr(message: object) -> None:
    print(f"relloc: {escaped(str(message), keep=chr(10))}", file=sys.stderr, flush=True)


def tell_next(command: str, *, on_stderr: bool = False) -> None:
    """The command that one goes on with; on stderr where stdout is a file's content."""
    sys.stdout.flush()
    print(f"next: {escaped(command)}", file=sys.stderr if on_stderr else sys.stdout, flush=True)


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its code: 130 after Ctrl-C, 1 where its output found no room."""
    outlive_readers()
    try:
        code = main()
    except KeyboardInterrupt:
        code = _EXIT_INTERRUPTED
    unwritten = end_of_output()
    sys.exit(code or (_EXIT_UNWRITTEN if unwritten else 0))


def outlive_readers() -> None:
    """Have stdout and stderr swallow what is written once their reader is gone, and print any name in any encoding.

    A command whose output goes to `head`, to a tee that died or to a terminal that was closed goes on: what it
    computes is not for the console. Streams that were closed before the start lead nowhere, since a file that is
    opened later would get their number, and what is printed with it.
    """
    with contextlib.suppress(OSError):
        while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(opened, True)
        os.close(opened)
    sys.stdout = _outliving(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _outliving(sys.stderr, sys.__stderr__, 2)


def tell_when_left(message: str) -> None:
    """What is said on stderr when whoever read stdout leaves."""
    if stream := _own_stdout():
        stream.told_when_left = message


def end_of_output() -> bool:
    """Whether printed words were lost for lack of room; that is said on stderr."""
    sys.stdout.flush()
    stream = _own_stdout()
    if stream is None or stream.lost is None:
        return False
    complain(f"not all that was printed could be written: {stream.lost.strerror}")
    return True


def _own_stdout() -> "_Outliving | None":
    stream = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return stream if isinstance(stream, _Outliving) else None


class _Outliving(io.RawIOBase):
    """Writes to a file descriptor; when its reader is gone, to nowhere."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.told_when_left = ""
        self.lost: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any, /) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # another program made the terminal or pipe non-blocking
            os.set_blocking(self._descriptor, True)
            return self.write(data)
        except OSError as error:
            if error.errno in _FULL:
                self.lost = error
            else:
                self._lead_nowhere()
            return memoryview(data).nbytes

    def _lead_nowhere(self) -> None:
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._descriptor)
            os.close(nowhere)
        if self.told_when_left:
            _print_on_stderr(self.told_when_left)  # not now to be flushed: stdout is being written


def _outliving(stream: Any, original: object, descriptor: int) -> Any:
    """The stream itself where it is a test's or a notebook's."""
    if stream is not original:
        return stream
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
        if stream.fileno() != descriptor:
            return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Outliving(descriptor)),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", True),
        write_through=getattr(stream, "write_through", False),
    )
