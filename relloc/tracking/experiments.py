"""The experiment of a store that a run belongs to: its name, finding it, making it, and saying that it was deleted."""

from typing import TYPE_CHECKING, NoReturn

from relloc.errors import UsageError
from relloc.tracking.addresses import SQLITE, sqlite_path
from relloc.tracking.relocation import artifact_folder
from relloc.tracking.store import StoreError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

LONGEST_NAME = 250  # of MLflow's tables in PostgreSQL, which have 256 characters


def experiment_name(asked: object, uri: str | None = None) -> str:
    """The name that `asked` is, if MLflow takes it as that of an experiment of the store at `uri`.

    Raises:
        UsageError: there is none, it is blank, too long or no text, or has characters that can't be shown.
    """
    name = str(asked) if isinstance(asked, int) and not isinstance(asked, bool) else asked
    if (
        not isinstance(name, str)
        or not name.strip()
        or not name.isprintable()
        or len(name) > LONGEST_NAME
    ):
        raise UsageError(
            f"an experiment can't be called {name!r}: give a name that is not blank, can be shown and has "
            f"{LONGEST_NAME} characters at most, such as relloc"
        )
    if uri and uri.partition(":")[0] == "databricks" and not name.startswith("/"):
        raise UsageError(
            f"Databricks wants a path as an experiment's name, such as /Users/YOU/{name}"
        )
    return name


def find_or_make_experiment(client: "MlflowClient", name: str, uri: str) -> "Experiment":
    """The experiment of that name in the store at `uri`.

    Raises:
        StoreError: it was deleted; the message says how to restore it.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.get_experiment(
                client.create_experiment(name, _artifact_location(uri, name))
            )
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process may have been faster
            if found is None:
                raise
    if is_deleted(found):
        raise_deleted(found, uri)
    return found


def is_deleted(experiment: "Experiment") -> bool:
    """Whether the experiment was deleted in MLflow, which keeps it, and its name, until `mlflow gc`."""
    return experiment.lifecycle_stage == "deleted"


def raise_deleted(experiment: "Experiment", uri: str) -> NoReturn:
    """Say that an experiment was deleted, and what can be done about it."""
    raise StoreError(
        f"experiment {experiment.name!r} was deleted in {uri}. Restore it with `MLFLOW_TRACKING_URI={uri} mlflow "
        f"experiments restore --experiment-id {experiment.experiment_id}`, or take another one: "
        "tracking.experiment=NAME for runs, relloc.sync --experiment NAME for what they left"
    )


def _artifact_location(uri: str, experiment: str) -> str | None:
    """Where an experiment's files go: beside a sqlite file; None leaves it to the server."""
    return (
        artifact_folder(sqlite_path(uri), experiment).as_uri() if uri.startswith(SQLITE) else None
    )
