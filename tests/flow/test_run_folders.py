"""A run folder belongs to one command at a time, and one that is refused leaves it as it was."""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from commands import Command, descendants, start
from noise_folder import write_noise
from tiny import TINY

from relloc.checkpoints.backbone_files import BACKBONE_FILE
from relloc.results import read_results
from relloc.tracking import read_journal, search
from relloc.tracking.run_lock import LOCK_FILE, is_held


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def on_noise(images: Path) -> tuple[str, ...]:
    return ("device=cpu", "workers=0", "data=folder", f"data.root={images}")


@pytest.fixture(scope="module")
def training(on_noise: tuple[str, ...]) -> tuple[str, ...]:
    tiny = tuple(word for word in TINY if not word.startswith("data.source"))
    small = (
        "model.backbone.widths=[8,8,8,8,8]",
        "model.head.hidden_dim=16",
        "monitor.every_epochs=null",
    )
    return (
        *tiny,
        *on_noise,
        *small,
        "tracking=none",
        "eval=[]",
        "recipe.images_per_batch_norm=8",
        "save_every_s=0",
    )


@pytest.fixture(scope="module")
def evaluation(on_noise: tuple[str, ...]) -> tuple[str, ...]:
    view = ("view.short_px=64", "view.crop_px=56", "batch_norm=as_trained")
    return (*on_noise, *view, "checkpoint=random", "model=small", "eval=[knn]", "eval.knn.k=[10]")


def ended(module: str, *words: str, folder: Path, processes: int = 1) -> tuple[int, str]:
    command = start(module, *words, folder=folder, processes=processes)
    return command.wait(), command.text


def content(folder: Path) -> dict[str, bytes]:
    """All files of a run folder but those that a living run adds to."""
    growing = ("journal.jsonl", "checkpoints")
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in files
        if file.name != LOCK_FILE and not set(growing) & set(file.relative_to(folder).parts)
    }


def long_training(tmp_path: Path, training: tuple[str, ...], *more: str) -> Command:
    """One that trains in `run`, and would for long."""
    line = (*training, "schedule.epochs=100000", f"hydra.run.dir={tmp_path / 'run'}", *more)
    command = start("relloc.train", *line, folder=tmp_path)
    assert command.wait_for(lambda: read_journal(tmp_path / "run")), command.text
    return command


def test_a_second_command_is_refused_and_changes_nothing(
    tmp_path: Path, training: tuple[str, ...], evaluation: tuple[str, ...]
) -> None:
    run_dir = tmp_path / "run"
    command = long_training(tmp_path, training)
    before = content(run_dir)
    words = (f"hydra.run.dir={run_dir}", "tracking=none")
    for module, line in (
        ("relloc.train", (*training, "schedule.epochs=3")),
        ("relloc.evaluate", evaluation),
    ):
        code, text = ended(module, *line, *words, folder=tmp_path)
        assert code == 2, text
        assert f"process {command.pid} on " in text
        assert str(run_dir) in text
        assert "Traceback" not in text
    assert content(run_dir) == before
    assert is_held(run_dir)
    synced = ended(
        "relloc.sync", str(run_dir), "--uri", f"sqlite:///{tmp_path}/later.db", folder=tmp_path
    )
    assert synced[0] == 0, synced[1]
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait() == 143, command.text
    assert "with hydra.run.dir" not in command.text  # it was typed
    assert "to resume" in command.text
    assert not (run_dir / LOCK_FILE).exists()


def test_of_several_processes_one_says_that_the_folder_is_taken(
    tmp_path: Path, training: tuple[str, ...]
) -> None:
    command = long_training(tmp_path, training)
    code, text = ended(
        "relloc.train", *training, f"hydra.run.dir={tmp_path / 'run'}", folder=tmp_path, processes=2
    )
    command.kill()
    assert code == 2, text
    assert text.count(f"process {command.pid} on ") == 1


def test_after_kill_9_the_next_goes_on_at_once_although_reading_processes_live(
    tmp_path: Path, training: tuple[str, ...]
) -> None:
    command = long_training(tmp_path, training, "workers=2")
    readers = descendants(command.pid)
    for pid in readers:
        os.kill(pid, signal.SIGSTOP)  # so that they do not end with it
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    try:
        assert (tmp_path / "run" / LOCK_FILE).exists()
        again = start(
            "relloc.train",
            *training,
            "schedule.epochs=100000",
            f"hydra.run.dir={tmp_path / 'run'}",
            folder=tmp_path,
        )
        assert again.wait_for(lambda: "resume" in again.text), again.text
        again.kill()
    finally:
        for pid in readers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_the_config_of_a_run_trains_it_again(tmp_path: Path, training: tuple[str, ...]) -> None:
    short = ("schedule.epochs=1", "schedule.milestone_epochs=[]")
    first = ("relloc.train", *training, *short, "hydra.run.dir=first")
    code, text = ended(*first, folder=tmp_path)
    assert code == 0, text
    again = ("-cp", str(tmp_path / "first"), "-cn", "config", "hydra.run.dir=again")
    code, text = ended("relloc.train", *again, folder=tmp_path)
    assert code == 0, text
    first_weights, weights = (
        (tmp_path / name / BACKBONE_FILE).read_bytes() for name in ("first", "again")
    )
    assert weights == first_weights


def test_commands_of_one_second_have_folders_of_their_own(
    tmp_path: Path, training: tuple[str, ...]
) -> None:
    commands = [
        start(
            "relloc.train",
            *training,
            "schedule.epochs=1",
            "schedule.milestone_epochs=[]",
            folder=tmp_path,
        )
        for _ in range(3)
    ]
    assert [command.wait() for command in commands] == [0, 0, 0], commands[0].text
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 3
    assert all(len(read_results(folder)) == 1 for folder in folders)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eval.knn.k=[1000]",), "eval.knn.k"),
        (("eval=[knn,voc07_svm]", "eval.voc07_svm.data=null"), "eval.voc07_svm"),
        (
            (
                "eval=[knn,semisup_1]",
                "eval.semisup_1.data=null",
                "eval.semisup_1.list_file=nowhere",
            ),
            "nowhere",
        ),
        (("eval.knn.layers=[feature9]",), "eval.knn.layers"),
        (
            ("eval.knn.bank_gib=0",),
            "bank_gib",
        ),  # only known when the features are about to be computed
        (("data.root=UNLABELED",), "no labels"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_refused_evaluation_leaves_no_folder_and_no_run_in_mlflow(
    tmp_path: Path, images: Path, evaluation: tuple[str, ...], words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "flat").symlink_to(images / "train" / "a")
    line = [word.replace("UNLABELED", str(tmp_path / "flat")) for word in words]
    code, text = ended("relloc.evaluate", *evaluation, *line, "tracking=sqlite", folder=tmp_path)
    assert code == 2, text
    assert message in text
    assert "Traceback" not in text
    assert "to resume" not in text
    runs = tmp_path / "runs"
    assert [file for file in runs.iterdir() if file.is_dir() and file.name != "mlartifacts"] == []
    if (runs / "mlflow.db").exists():
        with contextlib.suppress(ValueError):  # it has no experiment
            assert search(f"sqlite:///{runs}/mlflow.db", "relloc") == []


def test_images_that_can_not_be_read_are_named_where_no_folder_is_left(
    tmp_path: Path, images: Path, evaluation: tuple[str, ...]
) -> None:
    broken = shutil.copytree(images, tmp_path / "broken")
    files = sorted((broken / "train").rglob("*.png"))[:20]
    for file in files:
        file.write_bytes(file.read_bytes()[:40])
    code, text = ended(
        "relloc.evaluate", *evaluation, f"data.root={broken}", "tracking=none", folder=tmp_path
    )
    assert code == 2, text
    assert "unreadable_share" in text
    assert files[0].name in text
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_refused_evaluation_leaves_the_folder_of_an_earlier_one_as_it_was(
    tmp_path: Path, evaluation: tuple[str, ...]
) -> None:
    run_dir = tmp_path / "run"
    words = (*evaluation, "tracking=none", f"hydra.run.dir={run_dir}")
    assert ended("relloc.evaluate", *words, folder=tmp_path)[0] == 0
    before = content(run_dir)
    for refused in ("eval.knn.k=[1000]", "eval.knn.bank_gib=0"):
        more = ("eval.knn.temperature=0.5",)  # so that it is not measured already
        code, text = ended("relloc.evaluate", *words, refused, *more, folder=tmp_path)
        assert code == 2, text
        assert content(run_dir) == before
    assert json.loads((run_dir / "status.json").read_text())["status"] == "FINISHED"


@pytest.mark.parametrize("name", ["run.json", "journal.jsonl", "artifacts.json", "results.jsonl"])
def test_a_damaged_file_is_named_before_anything_is_changed(
    tmp_path: Path, evaluation: tuple[str, ...], name: str
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / name).write_bytes(b"[3]\n[\xff\n")
    before = content(run_dir)
    code, text = ended(
        "relloc.evaluate", *evaluation, "tracking=none", f"hydra.run.dir={run_dir}", folder=tmp_path
    )
    assert code == 2, text
    assert f"relloc: {run_dir / name} " in text
    assert content(run_dir) == before


def test_a_folder_whose_checkpoints_were_removed_takes_no_other_training(
    tmp_path: Path, training: tuple[str, ...]
) -> None:
    run_dir = tmp_path / "run"
    line = (*training, f"hydra.run.dir={run_dir}")
    code, text = ended("relloc.train", *line, folder=tmp_path)
    assert code == 0, text
    shutil.rmtree(run_dir / "checkpoints")
    before, rows = content(run_dir), read_results(run_dir)
    code, text = ended("relloc.train", *line, "seed=1", folder=tmp_path)
    assert code == 2, text
    assert "seed was 0, now 1" in text
    assert content(run_dir) == before
    code, text = ended("relloc.train", *line, folder=tmp_path)
    assert code == 0, text
    assert read_results(run_dir) == rows


def test_a_damaged_status_is_written_anew(tmp_path: Path, evaluation: tuple[str, ...]) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "status.json").write_bytes(b"\xff")
    for name in ("status.json", BACKBONE_FILE, "patches.png"):
        (run_dir / f".{name}.1.unfinished").write_bytes(
            b"{"
        )  # of one that was killed while it wrote
    code, text = ended(
        "relloc.evaluate", *evaluation, "tracking=none", f"hydra.run.dir={run_dir}", folder=tmp_path
    )
    assert code == 0, text
    assert json.loads((run_dir / "status.json").read_text())["status"] == "FINISHED"
    assert not list(run_dir.glob(".*unfinished"))


def test_half_of_an_evaluations_rows_is_measured_again(
    tmp_path: Path, evaluation: tuple[str, ...]
) -> None:
    run_dir = tmp_path / "run"
    words = (*evaluation, "eval.knn.k=[5,10]", "tracking=none", f"hydra.run.dir={run_dir}")
    assert ended("relloc.evaluate", *words, folder=tmp_path)[0] == 0
    rows = read_results(run_dir)
    lines = (run_dir / "results.jsonl").read_bytes().splitlines(keepends=True)
    (run_dir / "results.jsonl").write_bytes(b"".join(lines[:-1]))
    assert len(read_results(run_dir)) == len(rows) - 2
    assert ended("relloc.evaluate", *words, folder=tmp_path)[0] == 0
    assert read_results(run_dir) == rows
