"""`kill -9` within a step of a fine-tuning: the same command ends with the same results."""

import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from annotated_sets import voc_annotation, voc_object, write_text
from commands import Command, Hold, start
from test_segmentation import voc as write_squares

from relloc.checkpoints.states import load_state
from relloc.results import RESULTS_FILE, read_results
from relloc.tracking import read_journal

sys.path.insert(0, str(Path(__file__).parents[1] / "transfer" / "detection"))
from made_objects import Rectangles

ITERATIONS = 44
# The largest common divisor of 20 and `evaluate_every`: a loss is reported, and a state saved,
# after so many steps.
REPORT_EVERY = 4
DETECTOR, SEGMENTER = "voc0712_detection", "voc12aug_fcn"


def write_rectangles(root: Path) -> Path:
    """VOCdevkit/{VOC2007,VOC2012} with a bright rectangle in each image, as cows and dogs."""
    number = 0
    for year, split, n in ((2007, "trainval", 8), (2012, "trainval", 4), (2007, "test", 8)):
        devkit = root / "VOCdevkit" / f"VOC{year}"
        names = [f"{year}_{split}_{place}" for place in range(n)]
        write_text(devkit / f"ImageSets/Main/{split}.txt", "\n".join(names))
        (devkit / "JPEGImages").mkdir(exist_ok=True)
        for name in names:
            images = Rectangles(n=20, portraits=False)
            images.read(number).save(devkit / "JPEGImages" / f"{name}.jpg")
            drawn = images.objects(number)
            height, width = images.size(number)
            (box,), (class_,) = drawn.boxes.astype(int).tolist(), drawn.classes
            named = voc_object(("cow", "dog")[class_], box)
            annotation = voc_annotation(named, height=height, width=width)
            write_text(devkit / "Annotations" / f"{name}.xml", annotation)
            number += 1
    return root


def detector_words(folder: Path) -> list[str]:
    of = f"eval.{DETECTOR}"
    return [
        f"{of}.data.root={write_rectangles(folder)}",
        *(f"{of}.batch=4", f"{of}.learning_rate=0.05", f"{of}.milestones=[30]", f"{of}.warmup=4"),
        *(f"{of}.augment.short_px=[64,80]", f"{of}.augment.long_px=128", f"{of}.view.box=[128,64]"),
    ]


def segmenter_words(folder: Path) -> list[str]:
    of = f"eval.{SEGMENTER}"
    return [
        f"{of}.data.root={write_squares(folder)}",
        *(f"{of}.batch=4", f"{of}.learning_rate=0.1"),
        *(f"{of}.augment.box=[128,96]", f"{of}.augment.crop_px=96", f"{of}.view.box=[128,96]"),
    ]


def start_evaluation(
    name: str, folder: Path, words: list[str], hold: Hold | None = None
) -> Command:
    """The run folder is `folder / "run"`. States are saved at every report."""
    of = f"eval.{name}"
    return start(
        "relloc.evaluate",
        *("checkpoint=random", "model=small", "tracking=none", "device=cpu", "workers=2"),
        *("model.backbone.widths=[16,16,32,32,64]", "save_every_s=0"),
        *(f"eval={name}", f"{of}.data.source.published_images=null"),
        *(f"{of}.iterations={ITERATIONS}", f"{of}.evaluate_every={ITERATIONS}"),
        *words,
        f"hydra.run.dir={folder / 'run'}",
        folder=folder,
        hold=hold,
    )


def states(run: Path) -> list[Path]:
    return list((run / "evaluations").glob("*.pt"))


def reported(run: Path) -> int:
    """The last step whose loss the journal has."""
    entries = read_journal(run)
    return entries[-1].step if entries else 0


@pytest.mark.parametrize(
    ("name", "make_words"), [(DETECTOR, detector_words), (SEGMENTER, segmenter_words)]
)
def test_killed_within_a_step_it_ends_with_the_results_of_a_run_never_stopped(
    tmp_path: Path, name: str, make_words: Callable[[Path], list[str]]
) -> None:
    words = make_words(tmp_path / "data")
    folders = tmp_path / "straight", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    straight = start_evaluation(name, folders[0], words)
    assert straight.wait() == 0, straight.text

    run = folders[1] / "run"
    seed = random.randrange(1_000_000)
    print("seed of the moment:", seed)  # shown where the test fails
    # It waits for the kill before its last report.
    hold = Hold(function="relloc.tracking.journal:Journal.log", of="step", least=ITERATIONS)
    first = start_evaluation(name, folders[1], words, hold)
    assert first.wait_for(lambda: reported(run) >= REPORT_EVERY), first.text
    first_report = time.monotonic()
    assert first.wait_for(lambda: reported(run) >= 2 * REPORT_EVERY), first.text
    # Between two reports there is nothing but steps, and the second half of a span is well behind
    # the saving at its beginning.
    seconds_per_span = time.monotonic() - first_report
    time.sleep(seconds_per_span * random.Random(seed).uniform(0.3, 0.8))
    assert first.kill() == -signal.SIGKILL
    (state,) = states(run)
    saved_step = load_state(state)["step"]
    assert 2 * REPORT_EVERY <= saved_step < ITERATIONS
    assert not (run / RESULTS_FILE).exists()

    second = start_evaluation(name, folders[1], words)
    assert second.wait() == 0, second.text
    assert f"goes on from {state}" in second.text
    # Numbers of networks that have learned nothing would be equal, too.
    (headline,) = [row for row in read_results(run) if row.headline]
    assert headline.value > 0
    expected = (folders[0] / "run" / RESULTS_FILE).read_bytes()
    assert (run / RESULTS_FILE).read_bytes() == expected
    assert not states(run)
    # Steps that were done twice are told once, with the losses of the run never stopped.
    curves = []
    for folder in folders:
        entries = read_journal(folder / "run")
        curves.append([(entry.step, entry.metrics) for entry in entries])
    assert curves[0] == curves[1]
