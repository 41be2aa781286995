"""Mistakes that a user can make: each message says what to do, and is shown without a traceback."""


class UsageError(ValueError):
    """A request that can't be met as it is."""


class DataError(UsageError):
    """A data set that can't be used as it is."""


class CheckpointError(UsageError):
    """A checkpoint that can't be written, read or used."""


class UnreadableImage(Exception):
    """One image that can't be used; the message says why, without its name."""
