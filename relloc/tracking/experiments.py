"""Finds or makes the MLflow experiment that a run belongs to, and checks its name."""

from typing import TYPE_CHECKING, NoReturn

from relloc.errors import UsageError
from relloc.tracking.addresses import SQLITE, sqlite_path
from relloc.tracking.relocation import artifact_folder
from relloc.tracking.store import StoreError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

# Characters of a name; MLflow's tables in PostgreSQL have room for 256.
LONGEST_NAME = 250


def experiment_name(asked: object, uri: str | None = None) -> str:
    """Check the name of an experiment and return it as text.

    Args:
        asked: what the user gave; a whole number is taken as text.
        uri: the address of the store, if it is known; Databricks has a rule of its own.

    Raises:
        UsageError: the name is no text, blank, too long, or has characters that can't be shown.
    """
    name = str(asked) if isinstance(asked, int) and not isinstance(asked, bool) else asked
    if (
        not isinstance(name, str)
        or not name.strip()
        or not name.isprintable()
        or len(name) > LONGEST_NAME
    ):
        raise UsageError(
            f"an experiment can't be called {name!r}: give a name that is not blank, has printable "
            f"characters only, and has {LONGEST_NAME} characters at most, such as relloc"
        )
    # Databricks keeps experiments in folders of its workspace.
    if uri and uri.partition(":")[0] == "databricks" and not name.startswith("/"):
        raise UsageError(
            f"Databricks needs a path as the name of an experiment, such as /Users/YOU/{name}"
        )
    return name


def find_or_make_experiment(client: "MlflowClient", name: str, uri: str) -> "Experiment":
    """Return the experiment of that name in the store at `uri`; it is made if it is missing.

    Raises:
        StoreError: it was deleted; the message says how to restore it.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            new_id = client.create_experiment(name, _artifact_location(uri, name))
            return client.get_experiment(new_id)
        except MlflowException:
            # Another run of a sweep may have made it in the meantime.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if is_deleted(experiment):
        raise_deleted(experiment, uri)
    return experiment


def is_deleted(experiment: "Experiment") -> bool:
    """Return whether an experiment was deleted; MLflow keeps it and its name until `mlflow gc`."""
    return experiment.lifecycle_stage == "deleted"


def raise_deleted(experiment: "Experiment", uri: str) -> NoReturn:
    """Raise the `StoreError` for an experiment that was deleted, which says how to restore it."""
    raise StoreError(
        f"experiment {experiment.name!r} was deleted in {uri}. Restore it with "
        f"`MLFLOW_TRACKING_URI={uri} mlflow experiments restore "
        f"--experiment-id {experiment.experiment_id}`, or use another one: "
        "tracking.experiment=NAME for a run, "
        "relloc.sync --experiment NAME for a finished run folder"
    )


def _artifact_location(uri: str, experiment: str) -> str | None:
    """Return where an experiment's files go: beside a SQLite file; None leaves it to the server."""
    if not uri.startswith(SQLITE):
        return None
    return artifact_folder(sqlite_path(uri), experiment).as_uri()
