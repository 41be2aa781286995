"""Mistakes that a user can make: each message says what to do, and is shown without a traceback."""

import contextlib
from collections.abc import Iterator


class UsageError(ValueError):
    """A request that can't be met as it is."""

    exit_code = 2


class Interrupted(UsageError):
    """Something outside ended the run; the same command may well succeed. Its exit code is EX_TEMPFAIL's."""

    exit_code = 75


class KnownAnswerMissed(UsageError):
    """What was measured is not what is known of it."""

    exit_code = 1


class DataError(UsageError):
    """A data set that can't be used as it is."""


class DamagedFile(UsageError):
    """A file of a run folder that is not as relloc writes it."""


class CheckpointError(UsageError):
    """A checkpoint that can't be written, read or used."""


class DamagedCheckpoint(CheckpointError):
    """A file that is there and can be read, but is no checkpoint, or not as it was saved."""


class UnreadableImage(Exception):
    """One image that can't be used; the message says why, without its name."""


def reason(error: Exception) -> str:
    """Why something could not be read, in some words: Python's own messages may repeat all of it, or only a name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return f"it is not text in {error.encoding}"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return " ".join(str(error).split())[:200]


@contextlib.contextmanager
def data_errors(problem: str, *kinds: type[Exception], advice: str) -> Iterator[None]:
    """Errors of these kinds become a `DataError` that says the problem, its reason, and what to do."""
    try:
        yield
    except kinds as error:
        file = str(error.filename or "") if isinstance(error, OSError) else ""
        where = "" if file in problem else f" ({file})"
        raise DataError(f"{problem}: {reason(error)}{where}. {advice}") from error
