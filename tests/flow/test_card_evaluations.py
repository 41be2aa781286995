"""`eval=card_classification` from one command, on small data sets in the layouts of the published ones."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relloc.data.lists import VOC_CLASSES
from relloc.errors import KnownAnswerMissed, UsageError
from relloc.results import Result, append_results, read_results
from relloc.runs.evaluating import tell_verdict

FROZEN = ("voc07_svm", "voc07_low_shot", "linear_in1k", "linear_avgpool", "linear_places205", "knn", "label_free")
TUNED = ("semisup_1", "semisup_10")


def picture(path: Path, class_number: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).normal(110, 30, (40, 40, 3))
    pixels[..., class_number % 3] += 60
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def imagenet(root: Path) -> Path:
    for split, n in (("train", 12), ("val", 3)):
        for label in range(2):
            for number in range(n):
                picture(root / split / f"n0{label}" / f"{number}.JPEG", label, 100 * n + 10 * label + number)
    return root


def places(root: Path) -> Path:
    for split, n in (("train", 12), ("val", 3)):
        lines = []
        for number in range(2 * n):
            picture(root / "images" / f"{split}{number}.jpg", number % 2, 7 * n + number)
            lines.append(f"{split}{number}.jpg {number % 2}\n")
        (root / f"{split}.csv").write_text("".join(lines))
    return root


def voc(root: Path) -> Path:
    """Twenty images of each split show a cat, and twenty more none; two of the twenty classes are shown at all."""
    base = root / "VOCdevkit" / "VOC2007"
    for split in ("trainval", "test"):
        names = [f"{split}{number:02d}" for number in range(40)]
        for number, name in enumerate(names):
            picture(base / "JPEGImages" / f"{name}.jpg", number % 2, number)
        lists = base / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("\n".join(names))
        for place, shown in enumerate(VOC_CLASSES):
            marks = [1 if place < 2 and number % 2 == place else -1 for number in range(40)]
            (lists / f"{shown}_{split}.txt").write_text("\n".join(map("{} {}".format, names, marks)))
    return root


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    """The published evaluations at the size of a test."""
    roots = {"in1k": imagenet(tmp_path / "in1k"), "places": places(tmp_path / "places"), "voc": voc(tmp_path / "voc")}
    of = dict.fromkeys((*FROZEN, *TUNED), "in1k") | {"voc07_svm": "voc", "voc07_low_shot": "voc"}
    of["linear_places205"] = "places"
    words = [f"eval.{name}.data.root={roots[which]}" for name, which in of.items()]
    words += [f"eval.{name}.view.short_px=40" for name in of]
    words += [f"eval.{name}.view.{'side' if name.startswith('voc') else 'crop'}_px=32" for name in of]
    words += [f"eval.{name}.augment.crop_px=32" for name in of if name.startswith(("linear", "semisup"))]
    words += [f"eval.{name}.data.source.published_images=null" for name in of]
    words += [f"eval.{name}.epochs=1" for name in of if name.startswith(("linear", "semisup"))]
    words += [
        "eval.linear_places205.augment.short_px=40",
        "eval.voc07_svm.costs=[0.1,1]",
        "eval.voc07_low_shot.draws=2",
    ]
    words += [f"eval.{name}.{rates}" for name in TUNED for rates in ("learning_rates=[0.01]", "head_multipliers=[1]")]
    words += ["eval.semisup_1.share=0.3", "eval.semisup_10.share=0.5"]
    source = "eval.linear_places205.data.source"
    words += [f"{source}.{split}_list={split}.csv" for split in ("train", "val")] + [f"{source}.images=images"]
    return ["eval=card_classification", *words, "batch_norm=[as_trained,recalibrated]", "calibration_images=24"]


def test_the_whole_card_from_one_command_and_from_what_is_there_already(
    relloc, tmp_path: Path, line: list[str]
) -> None:
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "sweep" / "0"
    who = ("checkpoint=random", "model=small", "tracking=none", "workers=0")
    done = relloc("evaluate", *who, *line, f"hydra.run.dir={first}")
    assert done.code == 0, done.text
    rows = read_results(first)
    for batch_norm in ("as_trained", "recalibrated"):
        assert {row.eval for row in rows if row.batch_norm == batch_norm} >= set(FROZEN)
    assert {row.batch_norm for row in rows if row.eval in TUNED} == {"as_trained"}  # they train it themselves
    assert {(row.eval, row.metric) for row in rows} >= {
        *(("voc07_svm", metric) for metric in ("map", "map_cv", "map_best", "map_best_cv")),
        *(("voc07_low_shot", f"map_k1{suffix}") for suffix in ("", "_std", "_min", "_max", "_cv")),
        *(("linear_in1k", metric) for metric in ("top1", "top1_tuned")),
        *(("linear_avgpool", metric) for metric in ("top1", "top1_best")),
        *(("label_free", "rankme"), ("knn", "top1_k10"), ("semisup_1", "top1"), ("semisup_10", "top1")),
    }
    assert not list(first.glob("evaluations/*.pt"))  # nothing that would be gone on from is left behind
    again = relloc("evaluate", "-m", *who, *line, f"hydra.sweep.dir={second.parent}")
    assert again.code == 0, again.text
    assert "of the same weights in" in again.text
    assert "features of" not in again.text  # no image was encoded
    copied = read_results(second)
    assert {row.measured_in for row in copied if row.metric not in ("map_best", "map_best_cv")} == {str(first)}
    as_measured = [dataclasses.replace(row, measured_in="") for row in copied]
    assert sorted(map(repr, as_measured)) == sorted(map(repr, rows))


def test_known_answers_on_other_images_are_no_answers(relloc, tmp_path: Path, line: list[str]) -> None:
    small = [word for word in line if "voc07_svm" in word]
    who = ("experiment=known_answers", "eval=[voc07_svm]", "checkpoint=[random]", "tracking=none")
    run = tmp_path / "run"
    done = relloc("evaluate", *who, *small, "workers=0", f"hydra.run.dir={run}")  # a ResNet-50 on 80 images of VOC
    assert done.code == 2
    assert "verdict=true, but nothing measured here has a published answer" in done.text
    assert read_results(run)
    never = relloc("evaluate", *who, *small, "model=small", f"hydra.run.dir={tmp_path / 'never'}")
    assert never.code == 2
    assert "nothing measured here has a published answer" in never.text
    assert not read_results(tmp_path / "never")  # told before anything was measured
    wrong = relloc("train", "experiment=known_answers")
    assert wrong.code == 2
    assert "run it with python -m relloc.evaluate" in wrong.text


def test_known_answers_pass_or_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = Result(
        eval="voc07_svm",
        dataset="voc2007",
        split="test",
        layer="feature2",
        metric="map_best",
        value=30.9,
        n=4952,
        seed=0,
        protocol="3.1",
        checkpoint="random",
        model="resnet50",
    )
    append_results(tmp_path, [best])
    tell_verdict(tmp_path)
    assert "pass" in capsys.readouterr().out
    append_results(
        tmp_path,
        [
            dataclasses.replace(
                best,
                eval="linear_avgpool",
                dataset="in1k",
                split="val",
                n=50_000,
                layer="avgpool",
                metric="top1_best",
                value=40.0,
            )
        ],
    )
    with pytest.raises(KnownAnswerMissed, match="1 of 2 known answers are outside their tolerance"):
        tell_verdict(tmp_path)
    assert "FAIL" in capsys.readouterr().out
    (tmp_path / "results.jsonl").unlink()
    with pytest.raises(UsageError, match="nothing measured here has a published answer"):
        tell_verdict(tmp_path)


def test_data_sets_that_nobody_named_are_told_at_once_and_all_together(relloc) -> None:
    done = relloc("evaluate", "experiment=known_answers")
    assert done.code == 2
    for told in (
        "eval.linear_avgpool.data.root=FOLDER or RELLOC_IN1K",
        "eval.voc07_low_shot.data.root=FOLDER or RELLOC_VOC",
    ):
        assert told in done.text
    assert "Downloading" not in done.text
    wrong = relloc(
        "evaluate", "checkpoint=random", "model=small", "eval=voc07_svm", "eval.voc07_svm.data.root=/nowhere"
    )
    assert wrong.code == 2
    assert "eval.voc07_svm.data.root=/nowhere is not a folder" in wrong.text
