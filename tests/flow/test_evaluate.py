"""Any backbone through any evaluations."""

import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torchvision
from commands import Hold, start
from PIL import Image
from tiny import TINY

from relloc.checkpoints.states import load_state
from relloc.results import Result, read_results

LOOK = tuple(word for word in TINY if word.startswith(("view.", "data.source", "probe.linear")))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    line = (*TINY, "eval=[]", "tracking=none", f"hydra.run.dir={folder / 'run'}")
    command = start("relloc.train", *line, folder=folder)
    assert command.wait() == 0, command.text
    return folder / "run"


def test_our_checkpoint_as_folder_file_and_training_state(relloc, tmp_path, pretrained):
    found = []
    state = next((pretrained / "checkpoints").glob("*.pt"))
    for name, checkpoint in enumerate((pretrained, pretrained / "backbone.safetensors", state)):
        out = tmp_path / f"e{name}"
        done = relloc(
            "evaluate",
            f"checkpoint={checkpoint}",
            "eval=[knn]",
            *LOOK,
            "tracking=none",
            f"hydra.run.dir={out}",
        )
        assert done.code == 0, done.text
        found.append({(row.layer, row.metric): row.value for row in read_results(out)})
    assert found[0] == found[1] == found[2]
    assert found[0]


def test_both_batch_norms_are_named_rows(relloc, tmp_path, pretrained):
    out = tmp_path / "e"
    line = (
        f"checkpoint={pretrained}",
        "eval=[linear_fast]",
        "batch_norm=[as_trained,recalibrated]",
        f"hydra.run.dir={out}",
    )
    done = relloc("evaluate", *line, *LOOK, "tracking=none", "calibration_images=64")
    assert done.code == 0, done.text
    rows = read_results(out)
    assert {row.batch_norm for row in rows} == {"as_trained", "recalibrated"}
    for row in rows:
        told = any("re-estimated on 64 training images" in one for one in row.details)
        assert told == (row.batch_norm == "recalibrated")


def test_the_second_file_of_weights_is_measured_as_the_run_recalibrated(relloc, tmp_path):
    training = (*TINY, "eval=[]", "calibration_images=64", "save_recalibrated=true")
    training = (*training, "tracking=none", f"hydra.run.dir={tmp_path / 'run'}")
    done = relloc("train", *training)
    assert done.code == 0, done.text
    file = tmp_path / "run/backbone_recalibrated.safetensors"
    written = file.stat().st_mtime_ns
    # The same command again writes nothing anew.
    assert relloc("train", *training).code == 0
    assert file.stat().st_mtime_ns == written
    done = relloc(
        "evaluate",
        f"checkpoint=[{tmp_path / 'run'},{file}]",
        "eval=[knn]",
        "calibration_images=64",
        *LOOK,
        "tracking=none",
        f"hydra.run.dir={tmp_path / 'e'}",
    )
    assert done.code == 0, done.text
    values: dict[tuple[bool, str], list[float]] = {}
    for row in read_results(tmp_path / "e"):
        is_second = row.checkpoint == str(file)
        values.setdefault((is_second, row.batch_norm), []).append(row.value)
        assert any("64 images of photos" in fact for fact in row.details) == is_second
    assert values[True, "as_trained"] == values[False, "recalibrated"]
    assert values[True, "as_trained"] != values[False, "as_trained"]


def test_another_backbone_is_refused_with_what_does_not_fit(relloc, pretrained):
    done = relloc("evaluate", f"checkpoint={pretrained}", "model=resnet18", *LOOK, "tracking=none")
    assert done.code == 2
    assert re.search(r"\(a small\) .*not fit", done.text)


def test_torchvisions_supervised_weights_from_its_cache(relloc, environment, tmp_path):
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    environment["TORCH_HOME"] = str(tmp_path / "torch")
    file = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.manual_seed(7)
    torch.save(torchvision.models.resnet18().state_dict(), cache / file)
    line = ("checkpoint=torchvision", "model=resnet18", "eval=[knn]", *LOOK, "tracking=none")
    supervised = relloc("evaluate", *line, f"hydra.run.dir={tmp_path / 'e'}")
    assert supervised.code == 0, supervised.text
    assert {row.checkpoint for row in read_results(tmp_path / "e")} == {"torchvision"}

    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, cache / file)
    damaged = relloc("evaluate", *line)
    assert damaged.code == 2
    assert "missing" in damaged.text


def test_mistakes_end_in_one_message(relloc, tmp_path):
    not_ours = tmp_path / "x.safetensors"
    not_ours.write_bytes(b"nothing of the kind")
    for arguments, message in [
        (["checkpoint=[]"], "checkpoint=[] names no backbone"),
        (["checkpoint=null"], "names no backbone"),
        (
            ["checkpoint=random", "model=small", "batch_norm=[]"],
            "batch_norm is []: give a list of some of",
        ),
        (
            ["checkpoint=torchvision", "model=alexnet"],
            "torchvision has no supervised weights for model=alexnet",
        ),
        (["checkpoint=/nowhere"], "does not exist"),
        ([f"checkpoint={not_ours}"], "damaged"),
        (["checkpoint=random", "model=small", "eval=[]"], "leaves nothing to do"),
        ([], "checkpoint is not set: give checkpoint="),
    ]:
        done = relloc("evaluate", *arguments, "tracking=none")
        assert done.code == 2, (arguments, done.text)
        assert message in done.text
        assert "Traceback" not in done.text


def images(folder: Path, count: int, size: tuple[int, int] = (80, 70)) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(
            0, 255, (size[1], size[0], 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(folder / f"{number}.jpg")


def test_unreadable_images_are_skipped_counted_and_named_until_they_are_too_many(relloc, tmp_path):
    images(tmp_path / "photos", 60)
    for name in ("3.jpg", "7.jpg"):
        broken = tmp_path / "photos" / name
        broken.write_bytes(broken.read_bytes()[:300])
    line = (
        "data=folder",
        f"data.root={tmp_path / 'photos'}",
        "eval=[]",
        "tracking=none",
        "data.source.held_out_share=0.2",
    )
    tiny = tuple(word for word in TINY if not word.startswith("data.source"))
    done = relloc("train", *line, *tiny, f"hydra.run.dir={tmp_path / 'out'}")
    assert done.code == 0, done.text
    assert re.search(r"\b2 images .*unreadable\.txt", done.text, re.DOTALL)
    named = (tmp_path / "out" / "unreadable.txt").read_text()
    assert "3.jpg" in named
    assert "7.jpg" in named

    strict = relloc("train", *line, *tiny, "data.unreadable_share=0.01")
    assert strict.code == 2
    assert "can't be used" in strict.text
    assert "unreadable_share=0.01" in strict.text


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small labeled data set on disk."""
    root = tmp_path_factory.mktemp("labeled")
    for split, count in (("train", 24), ("val", 8)):
        for name in "ab":
            images(root / split / name, count)
    return root


def on(root: Path) -> tuple[str, ...]:
    return (
        "data=folder",
        f"data.root={root}",
        "data.unreadable_share=0.1",
        "view.short_px=64",
        "view.crop_px=56",
    )


def with_a_broken_image(labeled: Path, folder: Path) -> Path:
    """A copy whose last training image can't be read."""
    copy = shutil.copytree(labeled, folder / "broken")
    broken = copy / "train" / "b" / "9.jpg"  # the last by name
    broken.write_bytes(broken.read_bytes()[:300])
    return copy


def test_two_processes_divide_the_neighbors_and_give_the_same_rows(relloc, tmp_path, labeled):
    line = ("checkpoint=random", "model=small", *on(with_a_broken_image(labeled, tmp_path)))
    line = (*line, "tracking=none", "workers=0", "reuse=false")
    alone = relloc("evaluate", *line, "eval=[knn]", f"hydra.run.dir={tmp_path / 'one'}")
    both = relloc("evaluate", *line, "eval=[knn]", f"hydra.run.dir={tmp_path / 'two'}", processes=2)
    assert (alone.code, both.code) == (0, 0), both.text
    assert read_results(tmp_path / "one") == read_results(tmp_path / "two")
    assert both.text.count("held out of the evaluation") == 1  # one process tells
    # The broken image is in the second process's share
    unreadable = [(tmp_path / run / "unreadable.txt").read_text() for run in ("one", "two")]
    assert unreadable[0] == unreadable[1]
    assert "train/b/9.jpg: " in unreadable[1]
    other = relloc("evaluate", *line, "eval=[linear_fast]", processes=2)
    assert other.code != 0
    assert "linear_fast runs in one process" in other.text


EPOCHS = 60


@pytest.fixture(scope="module")
def long_linear(labeled: Path) -> tuple[str, ...]:
    """A linear evaluation of some seconds, written each second."""
    return (
        *(
            "checkpoint=random",
            "model=small",
            *on(labeled),
            "eval=[linear]",
            "batch_norm=as_trained",
            "tracking=none",
        ),
        *(
            f"probe.linear.epochs={EPOCHS}",
            "probe.linear.milestone_epochs=[40]",
            "workers=0",
            "device=cpu",
        ),
        "save_every_s=1",
    )


@pytest.fixture(scope="module")
def undisturbed(
    long_linear: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> list[Result]:
    folder = tmp_path_factory.mktemp("undisturbed")
    command = start(
        "relloc.evaluate", *long_linear, f"hydra.run.dir={folder / 'run'}", folder=folder
    )
    assert command.wait() == 0, command.text
    return list(read_results(folder / "run"))


@pytest.mark.parametrize(
    ("name", "goes_on_in"),
    [("SIGTERM", "first"), ("SIGINT", "first"), ("SIGUSR1", "second")],
    ids=str,
)
def test_a_signal_keeps_the_last_epoch_and_the_evaluation_goes_on_from_it(
    tmp_path: Path,
    long_linear: tuple[str, ...],
    undisturbed: list[Result],
    name: str,
    goes_on_in: str,
) -> None:
    first, then = tmp_path / "runs" / "first", tmp_path / "runs" / goes_on_in
    # Before it would save the last epochs, it waits for the signal.
    hold = Hold(function="relloc.runs.reusing:ResumableState.save", least=EPOCHS - 2)
    words = (*long_linear, f"hydra.run.dir={first}")
    command = start("relloc.evaluate", *words, folder=tmp_path, hold=hold)
    assert command.wait_for(lambda: list(first.glob("evaluations/*.pt"))), command.text
    (file,) = first.glob("evaluations/*.pt")
    written = load_state(file)["epoch"]
    # For some epochs that nobody writes yet: by its processor's time, as a busy machine gives it
    # little of that.
    process = psutil.Process(command.pid)
    worked_s = process.cpu_times().user
    assert command.wait_for(lambda: command.is_held or process.cpu_times().user > worked_s + 0.5), (
        command.text
    )
    os.kill(command.pid, signal.Signals[name])
    command.go_on()
    assert command.wait() == 128 + signal.Signals[name], command.text
    assert written < load_state(file)["epoch"] < EPOCHS
    assert "interrupted" in command.text
    assert not read_results(first)
    again = start("relloc.evaluate", *long_linear, f"hydra.run.dir={then}", folder=tmp_path)
    assert again.wait() == 0, again.text
    assert f"eval    goes on from {file}" in again.text
    assert read_results(then) == undisturbed
    assert not list(then.glob("evaluations/*.pt"))
    if then != first:  # which finds the rows there, and has nothing to go on from any more
        found = start("relloc.evaluate", *long_linear, f"hydra.run.dir={first}", folder=tmp_path)
        assert found.wait() == 0, found.text
        assert {row.measured_in for row in read_results(first)} == {str(then)}
        assert not list(first.glob("evaluations/*.pt"))


def test_a_stopped_evaluation_names_the_images_that_it_could_not_use(
    tmp_path: Path, labeled: Path, long_linear: tuple[str, ...]
) -> None:
    run_dir = tmp_path / "run"
    line = (*long_linear, *on(with_a_broken_image(labeled, tmp_path)), f"hydra.run.dir={run_dir}")
    line = (
        *line,
        "probe.linear.epochs=10000",
    )  # so many that the signal comes before the end on any machine
    command = start("relloc.evaluate", *line, folder=tmp_path)
    assert command.wait_for(lambda: list(run_dir.glob("evaluations/*.pt"))), command.text
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait() == 143, command.text
    assert "train/b/9.jpg: " in (run_dir / "unreadable.txt").read_text()
