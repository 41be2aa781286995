"""The status of a run, or of a point of a sweep."""

import enum


class Status(enum.StrEnum):
    """The status of a run, or of a point of a sweep.

    Values are written to status.json and MLflow; they are MLflow's own words where it has one.
    """

    WAITING = "SCHEDULED"  # queued by a cluster, not started
    RUNNING = "RUNNING"
    DONE = "FINISHED"
    STOPPED = "KILLED"  # stopped before its end, and can be resumed
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"  # by the user, before its end
    MISSING = "MISSING"  # never started
    UNKNOWN = "UNKNOWN"  # the cluster that may run it does not answer

    @property
    def word(self) -> str:
        """The status as it is shown, such as "done" or "running"."""
        return self.name.lower()
