"""Experiment tracking: every result is written to the run folder first, and MLflow gets a copy.

A run folder can be sent to MLflow while the run goes on (`Mirror`) or at any time later (`sync`).
Importing this package does not import mlflow, which takes about 3 s.
"""

from relloc.tracking.addresses import absolute_uri
from relloc.tracking.artifacts import add_artifact, list_artifacts_to_send
from relloc.tracking.experiments import experiment_name
from relloc.tracking.imports import import_driver
from relloc.tracking.journal import Journal, read_journal
from relloc.tracking.mirror import Mirror
from relloc.tracking.mlflow import SyncCounts, forget, sync
from relloc.tracking.note import Note, read_note
from relloc.tracking.record import (
    DatasetRecord,
    RunRecord,
    environment_tags,
    flatten,
    read_status,
    write_status,
)
from relloc.tracking.store import StoreError, open_store, search, ui_command, ui_link

__all__ = [
    "DatasetRecord",
    "Journal",
    "Mirror",
    "Note",
    "RunRecord",
    "StoreError",
    "SyncCounts",
    "absolute_uri",
    "add_artifact",
    "environment_tags",
    "experiment_name",
    "flatten",
    "forget",
    "import_driver",
    "list_artifacts_to_send",
    "open_store",
    "read_journal",
    "read_note",
    "read_status",
    "search",
    "sync",
    "ui_command",
    "ui_link",
    "write_status",
]
