"""Errors that a user can repair: the message says what to do and is shown without a traceback."""

import contextlib
from collections.abc import Iterator


class UsageError(ValueError):
    """A request that can't be fulfilled as it was made."""

    exit_code = 2


class Interrupted(UsageError):
    """A run that something outside ended; the same command may succeed when it is repeated.

    The exit code is EX_TEMPFAIL of sysexits.h.
    """

    exit_code = 75


class TrainingUnfinished(UsageError):
    """A training that is watched did not come to its end, and is no longer running.

    Not a mistake in the command, which may be repeated.
    """

    exit_code = 1


class DamagedTraining(UsageError):
    """A training that is watched has damaged files, and all else of the watch is done.

    Not a mistake in the command, which may be repeated.
    """

    exit_code = 1


class KnownAnswerMissed(UsageError):
    """A measured value that differs from the one that is known for the checkpoint."""

    exit_code = 1


class DataError(UsageError):
    """A data set that can't be used as it is."""


class TooManyUnreadable(DataError):
    """A data set that was checked, of which more images can't be read than a run may skip."""

    exit_code = 1


class MissingData(DataError):
    """A data set of which nothing is there, or of which no setting says where it is.

    What is there in part, or damaged, is a plain `DataError`.

    Attributes:
        holding: what its folder is to hold and where that comes from, as an object of "to hold";
            empty where nobody said it.
    """

    def __init__(self, message: str, *, holding: str = "") -> None:
        super().__init__(message)
        self.holding = holding


class DamagedFile(UsageError):
    """A file of a run folder that is not as relloc writes it."""


class CheckpointError(UsageError):
    """A checkpoint that can't be written, read or used."""


class DamagedCheckpoint(CheckpointError):
    """A file that can be read, but is not a checkpoint or not as it was saved."""


class UnreadableImage(Exception):
    """A single image that can't be used; the message says why, without the image's name."""


def reason(error: Exception) -> str:
    """Returns in some words why something could not be read.

    Python's own messages do not always do: they may repeat the whole content, or only a name.
    """
    # Without the error's number and the path, which the caller's message has anyway.
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # Python's message names a byte and its position, which says little.
    if isinstance(error, UnicodeDecodeError):
        return f"it is not text in {error.encoding}"
    # Python's message is the key alone.
    if isinstance(error, KeyError):
        return f"{error} is missing"
    one_line = " ".join(str(error).split())
    return one_line[:200]


@contextlib.contextmanager
def data_errors(problem: str, *kinds: type[Exception], advice: str) -> Iterator[None]:
    """Turns errors of the given kinds into a `DataError` while the block runs.

    The message says the problem, the reason of the original error, and the advice.

    Example:
        >>> with data_errors(f"{path} can't be read", OSError, advice="Pack again"):
        ...     path.read_bytes()
    """
    try:
        yield
    except kinds as error:
        # The operating system names the file that failed, which may be another than the problem
        # names.
        file = ""
        if isinstance(error, OSError) and error.filename:
            file = str(error.filename)
        where = "" if file in problem else f" ({file})"
        why = reason(error)
        raise DataError(f"{problem}: {why}{where}. {advice}") from error
