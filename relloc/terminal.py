"""Prints safely: output survives a reader that leaves, and names can't control the terminal."""

import contextlib
import errno
import io
import os
import sys
import unicodedata
from collections.abc import Callable
from typing import Any, NoReturn

# The output goes to a file for which there is no room. Later there may be room again.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Unicode categories of characters that control a terminal: controls, bidirectional marks,
# surrogates (bytes of a name that are not UTF-8), and ends of lines and paragraphs.
_CONTROLLING = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Joiners that Persian, Hindi and emoji need. They reorder and hide nothing.
_JOINERS = "\u200c\u200d"
_EXIT_INTERRUPTED = 130  # as shells have it: 128 plus the number of SIGINT
_EXIT_UNWRITTEN = 1


def escaped(text: str, *, keep: str = "") -> str:
    r"""Return text with characters that control a terminal written out, such as `\x1b` or `\u202e`.

    Characters in `keep` stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(_shown(char) if char not in keep else char for char in text)


def quantity(count: int | float, noun: str, plural: str = "", *, commas: bool = False) -> str:
    """Return a number with its noun, such as `1 image`, `12 images` or, given both, `2 classes`.

    Args:
        count: the number, printed as it is.
        noun: the noun for one.
        plural: the noun for any other number; by default `noun` with an s.
        commas: whether thousands are separated by commas.
    """
    digits = f"{count:,}" if commas else f"{count}"
    return f"{digits} {noun if count == 1 else plural or noun + 's'}"


def _shown(char: str) -> str:
    if unicodedata.category(char) not in _CONTROLLING or char in _JOINERS:
        return char
    return char.encode("unicode_escape").decode("ascii")


def print_error(message: object) -> None:
    """Print a message on stderr, after everything that was printed on stdout.

    Its lines stay lines; other characters that control a terminal are escaped.
    """
    sys.stdout.flush()
    _print_on_stderr(message)


def _print_on_stderr(message: object) -> None:
    text = escaped(str(message), keep="\n")
    print(f"relloc: {text}", file=sys.stderr, flush=True)


def print_next(command: str, *, on_stderr: bool = False) -> None:
    """Print the command to continue with; on stderr if stdout carries the content of a file."""
    sys.stdout.flush()
    print(f"next: {escaped(command)}", file=sys.stderr if on_stderr else sys.stdout, flush=True)


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with the code that it returns.

    The code is 130 after Ctrl-C, and 1 if the command succeeded but its output could not be
    written.
    """
    survive_closed_output()
    try:
        code = main()
    except KeyboardInterrupt:
        code = _EXIT_INTERRUPTED
    unwritten = end_of_output()
    sys.exit(code or (_EXIT_UNWRITTEN if unwritten else 0))


def survive_closed_output() -> None:
    """Replace stdout and stderr by streams that drop what is written once their reader has gone.

    A command goes on if its output goes to `head`, to a `tee` that died or to a terminal that was
    closed, since its results are in files. The streams also print any name in any encoding.
    """
    # A stream that was closed before the start is opened to /dev/null. Otherwise the next file that
    # is opened would get the stream's number, and everything that is printed would be written into
    # it.
    with contextlib.suppress(OSError):
        while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(opened, True)
        os.close(opened)
    sys.stdout = _outliving(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _outliving(sys.stderr, sys.__stderr__, 2)


def print_when_reader_leaves(message: str) -> None:
    """Set the message that is printed on stderr if the reader of stdout goes away."""
    stream = _own_stdout()
    if stream is not None:
        stream.message_when_left = message


def end_of_output() -> bool:
    """Flush stdout, and return whether output was lost for lack of room.

    If so, a message is printed on stderr.
    """
    sys.stdout.flush()
    stream = _own_stdout()
    if stream is None or stream.lost is None:
        return False
    print_error(f"some of the output could not be written: {stream.lost.strerror}")
    return True


def _own_stdout() -> "_Outliving | None":
    """Return the stream below sys.stdout if `survive_closed_output` made it, or else None."""
    stream = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return stream if isinstance(stream, _Outliving) else None


class _Outliving(io.RawIOBase):
    """Writes to a file descriptor; once its reader has gone, to /dev/null.

    Attributes:
        message_when_left: is printed on stderr when the reader goes away.
        lost: the error by which output was lost for lack of room, or None.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.message_when_left = ""
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
        except BlockingIOError:
            # Another program that shares the terminal or pipe made it non-blocking.
            os.set_blocking(self._descriptor, True)
            return self.write(data)
        except OSError as error:
            if error.errno in _NO_ROOM:
                self.lost = error
            else:
                self._redirect_to_null()
            # Everything counts as written, so that the stream above neither fails nor tries again.
            return memoryview(data).nbytes

    def _redirect_to_null(self) -> None:
        # The descriptor itself is replaced, so that child processes do not fail either.
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._descriptor)
            os.close(nowhere)
        # Not by `print_error`, which flushes stdout, since stdout is being written at this moment.
        if self.message_when_left:
            _print_on_stderr(self.message_when_left)


def _outliving(stream: Any, original: object, descriptor: int) -> Any:
    """Return a stream that outlives its reader, or `stream` itself if a test or notebook set it."""
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
