"""How runs and the points of sweeps stand."""

import enum


class Status(enum.StrEnum):
    """How a run or a point of a sweep stands: the values are MLflow's words where it has one, and status.json's."""

    WAITING = "SCHEDULED"
    RUNNING = "RUNNING"
    DONE = "FINISHED"
    STOPPED = "KILLED"  # it saved, or was killed, and can go on
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"  # on the user's demand, before it was done
    MISSING = "MISSING"  # nobody began it
    UNKNOWN = "UNKNOWN"  # a cluster that may have it does not answer

    @property
    def word(self) -> str:
        """As it is shown: done, running, ..."""
        return self.name.lower()
