from collections.abc import Callable
from pathlib import Path

import pytest

from relloc.errors import UsageError
from relloc.tracking import StoreError, experiment_name, open_store, search, sync

NewRun = Callable[..., Path]


@pytest.mark.parametrize("name", [None, "", "  ", "x" * 251, "a\nb", "a\0b", True, 1.5, ["a"]])
def test_names_that_mlflow_or_its_databases_refuse_are_refused(name: object) -> None:
    with pytest.raises(UsageError):
        experiment_name(name)


def test_other_names_are_taken_as_they_are() -> None:
    for name in ("relloc", "it's a/b", "größe = 3, 5 %", "..", "x" * 250):
        assert experiment_name(name) == name
    assert experiment_name(2026) == "2026"


def test_databricks_wants_a_path() -> None:
    with pytest.raises(UsageError, match="/Users/YOU/relloc"):
        experiment_name("relloc", "databricks")
    assert experiment_name("/Users/me/relloc", "databricks://profile") == "/Users/me/relloc"


@pytest.mark.parametrize("name", ["..", ".", "a/../b", "n" * 250, "ö" * 250])
def test_files_of_any_experiment_lie_in_a_folder_of_their_own_beside_the_store(
    uri: str, new_run: NewRun, name: str
) -> None:
    experiment = open_store(uri).get_experiment(sync(new_run(experiment=name), uri).experiment_id)
    folder = Path(experiment.artifact_location.removeprefix("file://"))
    assert experiment.name == name
    assert folder.parent.name == "mlartifacts"
    assert folder.name not in (".", "..")


def test_a_deleted_experiment_is_named_with_what_can_be_done(uri: str, new_run: NewRun) -> None:
    first, second = new_run("first"), new_run("second")
    experiment_id = sync(first, uri).experiment_id
    open_store(uri).delete_experiment(experiment_id)
    for run_dir in (first, second):  # one that was sent before, and one that was not
        with pytest.raises(StoreError) as caught:
            sync(run_dir, uri)
        for told in (
            "'relloc'",
            f"restore --experiment-id {experiment_id}",
            "tracking.experiment=",
        ):
            assert told in str(caught.value)
    assert sync(second, uri, "another").points == 6
    assert sync(first, uri, "another").points == 6
    open_store(uri).restore_experiment(experiment_id)
    assert [run["name"] for run in search(uri, "relloc")] == ["first"]
