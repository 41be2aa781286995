"""Runs that a cluster ended before they could say so: their records are put right, also in MLflow."""

from collections.abc import Sequence

from relloc.sweeps.points import Point, note_ending
from relloc.sweeps.standing import Standing, status_of
from relloc.tracking.mlflow import sync
from relloc.tracking.record import RunRecord, write_status
from relloc.tracking.store import StoreError


def mend(points: Sequence[Point], found: Sequence[Standing]) -> list[str]:
    """Note as KILLED what is noted as RUNNING and has no job any more, and tell MLflow; what was mended, in words.

    A store that does not answer is told, and hears of it when the point runs again or by relloc.sync.
    """
    note_cancelled(points, found)
    told = []
    for point, now in zip(points, found, strict=True):
        if now.in_flight or now.state == "unknown" or status_of(point.folder) != "RUNNING":
            continue
        write_status(point.folder, "KILLED")
        words = f"{point.name} was ended before it could say so: noted as stopped"
        try:
            if uri := RunRecord.read(point.folder).tracking_uri:
                sync(point.folder, uri)
        except (StoreError, OSError, ValueError) as error:
            words += f", but not in MLflow ({error})"
        told.append(words)
    return told


def note_cancelled(points: Sequence[Point], found: Sequence[Standing]) -> None:
    """Note which jobs were cancelled, as the cluster remembers it for some minutes only."""
    for point, now in zip(points, found, strict=True):
        if now.state == "cancelled":
            note_ending(point.folder, "cancelled")
