"""`eval=card_classification` from one command, on small data sets in the published layouts."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from rows import result

from relloc.data.lists import VOC_CLASSES
from relloc.errors import KnownAnswerMissed
from relloc.reports.published import RANDOM, SUPERVISED, published_numbers
from relloc.results import Result, append_results, read_results
from relloc.runs.evaluating import report_known_answers
from relloc.runs.known_answers import applicable

FROZEN = (
    "voc07_svm",
    "voc07_low_shot",
    "linear_in1k",
    "linear_avgpool",
    "linear_places205",
    "knn_in1k",
    "label_free_in1k",
)
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
                picture(
                    root / split / f"n0{label}" / f"{number}.JPEG",
                    label,
                    100 * n + 10 * label + number,
                )
    return root


def places(root: Path) -> Path:
    for split, n in (("train", 12), ("val", 3)):
        lines = []
        for number in range(2 * n):
            picture(root / "images" / f"{split}{number}.jpg", number % 2, 7 * n + number)
            lines.append(f"{split}{number}.jpg {number % 2}\n")
        (root / f"{split}.csv").write_text("".join(lines))
    return root


def voc(root: Path, n_test: int = 40, shown_as: int = 1) -> Path:
    """Half of a split's images show one class, half another; with `shown_as=0` all look alike."""
    base = root / "VOCdevkit" / "VOC2007"
    for split, n in (("trainval", 40), ("test", n_test)):
        names = [f"{split}{number:02d}" for number in range(n)]
        for number, name in enumerate(names):
            picture(
                base / "JPEGImages" / f"{name}.jpg",
                shown_as * (number % 2),
                100 * len(split) + number,
            )
        lists = base / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("\n".join(names))
        for place, shown in enumerate(VOC_CLASSES):
            marks = [1 if place < 2 and number % 2 == place else -1 for number in range(n)]
            (lists / f"{shown}_{split}.txt").write_text(
                "\n".join(map("{} {}".format, names, marks))
            )
    return root


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    """The published evaluations at the size of a test."""
    roots = {
        "in1k": imagenet(tmp_path / "in1k"),
        "places": places(tmp_path / "places"),
        "voc": voc(tmp_path / "voc"),
    }
    of = dict.fromkeys((*FROZEN, *TUNED), "in1k") | {"voc07_svm": "voc", "voc07_low_shot": "voc"}
    of["linear_places205"] = "places"
    words = [f"eval.{name}.data.root={roots[which]}" for name, which in of.items()]
    words += [f"eval.{name}.view.short_px=40" for name in of]
    words += [
        f"eval.{name}.view.{'side' if name.startswith('voc') else 'crop'}_px=32" for name in of
    ]
    words += [
        f"eval.{name}.augment.crop_px=32" for name in of if name.startswith(("linear", "semisup"))
    ]
    words += [f"eval.{name}.data.source.published_images=null" for name in of]
    words += [f"eval.{name}.epochs=1" for name in of if name.startswith(("linear", "semisup"))]
    words += [
        "eval.linear_places205.augment.short_px=40",
        "eval.voc07_svm.costs=[0.1,1]",
        "eval.voc07_low_shot.draws=2",
    ]
    words += [
        f"eval.{name}.{rates}"
        for name in TUNED
        for rates in ("learning_rates=[0.01]", "head_multipliers=[1]")
    ]
    words += ["eval.semisup_1.share=0.3", "eval.semisup_10.share=0.5"]
    source = "eval.linear_places205.data.source"
    words += [f"{source}.{split}_list={split}.csv" for split in ("train", "val")] + [
        f"{source}.images=images"
    ]
    return [
        "eval=card_classification",
        *words,
        "batch_norm=[as_trained,recalibrated]",
        "calibration_images=24",
    ]


def test_the_whole_card_from_one_command_and_from_what_is_there_already(
    relloc, tmp_path: Path, line: list[str]
) -> None:
    first = tmp_path / "runs" / "first"
    who = ("checkpoint=random", "model=small", "tracking=none", "workers=0")
    done = relloc("evaluate", *who, *line, f"hydra.run.dir={first}")
    assert done.code == 0, done.text
    rows = read_results(first)
    for batch_norm in ("as_trained", "recalibrated"):
        assert {row.eval for row in rows if row.batch_norm == batch_norm} >= set(FROZEN)
    assert {row.batch_norm for row in rows if row.eval in TUNED} == {
        "as_trained"
    }  # they train it themselves
    assert {(row.eval, row.metric) for row in rows} >= {
        *(("voc07_svm", metric) for metric in ("map", "map_cv", "map_best", "map_best_cv")),
        *(("voc07_low_shot", f"map_k1{suffix}") for suffix in ("", "_std", "_min", "_max", "_cv")),
        *(("linear_in1k", metric) for metric in ("top1", "top1_tuned")),
        *(("linear_avgpool", metric) for metric in ("top1", "top1_best")),
        *(
            ("label_free_in1k", "rankme"),
            ("knn_in1k", "top1_k10"),
            ("semisup_1", "top1"),
            ("semisup_10", "top1"),
        ),
    }
    assert not list(
        first.glob("evaluations/*.pt")
    )  # nothing that would be gone on from is left behind
    again = relloc("evaluate", "-m", *who, *line)
    assert again.code == 0, again.text
    assert "same weights" in again.text
    assert "features of" not in again.text  # no image was encoded
    (second,) = {path.parent for path in (tmp_path / "runs").rglob("results.jsonl")} - {
        first
    }  # where a sweep puts it
    copied = read_results(second)
    assert {row.measured_in for row in copied if row.metric not in ("map_best", "map_best_cv")} == {
        str(first)
    }
    as_measured = [dataclasses.replace(row, measured_in="") for row in copied]
    assert sorted(map(repr, as_measured)) == sorted(map(repr, rows))


@pytest.fixture
def few_known_answers(environment: dict[str, str], tmp_path: Path) -> tuple[str, ...]:
    """`experiment=known_answers` on few images of noise, with random weights for torchvision's."""
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    file = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.manual_seed(7)
    torch.save(torchvision.models.resnet50().state_dict(), cache / file)
    roots = {"in1k": tmp_path / "in1k", "voc": tmp_path / "voc"}
    environment |= {"TORCH_HOME": str(tmp_path / "torch")}
    environment |= {f"RELLOC_{name.upper()}": str(root) for name, root in roots.items()}
    for label in range(2):
        for number in range(8):
            picture(
                roots["in1k"] / "train" / f"n0{label}" / f"{number}.JPEG", 0, 10 * label + number
            )
        for number in range(
            2
        ):  # the same in both classes, so that half of all answers are right, whatever they are
            picture(roots["in1k"] / "val" / f"n0{label}" / f"{number}.JPEG", 0, 50 + number)
    voc(roots["voc"], n_test=10, shown_as=0)
    sets = ("linear_avgpool", "voc07_svm", "voc07_low_shot")
    return (
        *("experiment=known_answers", "tracking=none", "workers=0", "device=cpu"),
        *(f"eval.{name}.data.source.published_images=null" for name in sets),
        *("eval.linear_avgpool.epochs=1", "eval.linear_avgpool.milestone_epochs=[]"),
        *("eval.linear_avgpool.augment.crop_px=32", "eval.linear_avgpool.batch=8"),
        *(
            "eval.voc07_svm.costs=[0.1,1]",
            "eval.voc07_low_shot.costs=[0.1,1]",
            "eval.voc07_low_shot.shots=[1]",
        ),
        f"hydra.run.dir={tmp_path / 'run'}",
    )


def published_as(
    rows: Sequence[Result], file: Path, *, in1k_images: int, moved: float = 0
) -> tuple[str, ...]:
    """Arguments with which `rows` are what is published, torchvision's SVM higher by `moved`."""
    names = {"random": RANDOM, "torchvision": SUPERVISED}
    numbers = []
    for number in published_numbers():
        for row in rows:
            place = (number.table, number.column, number.metric)
            same = number.row == names[row.checkpoint] and place == (
                row.table,
                row.column,
                row.metric,
            )
            if same and (row.layer == number.layer or row.metric == "map_best"):
                value = row.value + moved * (
                    (row.checkpoint, row.eval) == ("torchvision", "voc07_svm")
                )
                fields = {
                    name: text
                    for name, text in vars(number).items()
                    if name not in ("printed", "tolerance")
                }
                numbers.append(fields | {"printed": f"{value:.2f}", "tolerance": 1.0})
    images = {"in1k val": in1k_images, "voc2007 test": 10}
    file.write_text(json.dumps({"images": images, "numbers": numbers}))
    return ("other_answers", str(file))


def test_known_answers_to_a_verdict(
    relloc, tmp_path: Path, few_known_answers: tuple[str, ...]
) -> None:
    unlike = relloc("evaluate", *few_known_answers)
    assert unlike.code == 1, unlike.text
    svm = "torchvision voc07_svm feature5 map_best on voc2007 test"
    assert re.search(rf"^not checked: {svm}: .*\b10 images.*\b4,952\b", unlike.text, re.MULTILINE)
    top1 = "torchvision linear_avgpool avgpool top1 on in1k val"
    assert re.search(rf"^not checked: {top1}: .*\b4 images.*\b50,000\b", unlike.text, re.MULTILINE)
    assert "not checked: random voc07_low_shot feature2 map_k2 on voc2007 test: " in unlike.text
    assert "linear_in1k" not in unlike.text  # which was not asked for
    assert re.search(r"^relloc: .*\b20 known answers .*\b20 ", unlike.text, re.MULTILINE)
    rows = read_results(tmp_path / "run")

    def again(**published: float):
        through = published_as(rows, tmp_path / "published.json", **published)
        done = relloc("evaluate", *few_known_answers, through=through)
        assert read_results(tmp_path / "run") == rows  # nothing is measured again
        return done

    passed = again(in1k_images=4)
    assert passed.code == 0, passed.text
    assert passed.text.count("pass  ") == 6
    assert "FAIL" not in passed.text
    assert "not checked" not in passed.text
    failed = again(in1k_images=5, moved=-1.1)
    assert failed.code == 1, failed.text
    assert f"FAIL  {svm}: " in failed.text
    assert re.search(rf"^not checked: {top1}: .*\b4 images.*\b5\b", failed.text, re.MULTILINE)
    assert (
        failed.text.count("pass  "),
        failed.text.count("FAIL  "),
        failed.text.count("not checked: "),
    ) == (3, 1, 2)
    assert re.search(r"\b6 known answers 1 .*tolerance .*\b2 .*checked: ", failed.text)


def test_what_has_no_known_answer_is_told_before_anything_is_measured(
    relloc, tmp_path: Path
) -> None:
    line = (
        "experiment=known_answers",
        "eval=[voc07_svm]",
        "checkpoint=[random]",
        "model=small",
        "tracking=none",
    )
    never = relloc(
        "evaluate",
        *line,
        f"eval.voc07_svm.data.root={tmp_path}",
        f"hydra.run.dir={tmp_path / 'never'}",
    )
    assert never.code == 2
    assert re.search(r"verdict=true.*published answer", never.text)
    assert not (tmp_path / "never").exists()
    wrong = relloc("train", "experiment=known_answers")
    assert wrong.code == 2
    assert "run it with python -m relloc.evaluate" in wrong.text


def test_the_verdict_is_on_the_rows_of_this_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = applicable([("random", "resnet50")], ["voc07_svm", "linear_avgpool"], ["as_trained"])
    svm = result("voc07_svm", "feature2", "map_best", 30.9, dataset="voc2007", fingerprint="now")
    linear = result("linear_avgpool", "avgpool", "top1_best", 4.0, fingerprint="now")
    append_results(tmp_path, [svm, linear])
    report_known_answers(tmp_path, answers, {"now"})
    assert capsys.readouterr().out.count("pass") == 2
    append_results(tmp_path, [dataclasses.replace(linear, value=40.0)])
    with pytest.raises(KnownAnswerMissed, match=r"\b2 known answers 1 .*tolerance: "):
        report_known_answers(tmp_path, answers, {"now"})
    assert "FAIL" in capsys.readouterr().out
    append_results(tmp_path, [dataclasses.replace(svm, n=4951, fingerprint="then")])
    with pytest.raises(KnownAnswerMissed, match=r"\b2 known answers 2 .*checked: "):
        report_known_answers(tmp_path, answers, {"then"})
    output = capsys.readouterr().out
    assert re.search(r"map_best on voc2007 test: .*\b4,951 images.*\b4,952\b", output)
    assert "top1_best on in1k val: " in output


def test_data_sets_that_nobody_named_are_told_at_once_and_all_together(relloc) -> None:
    done = relloc("evaluate", "experiment=known_answers")
    assert done.code == 2
    for variable, name in (("RELLOC_IN1K", "linear_avgpool"), ("RELLOC_VOC", "voc07_low_shot")):
        [line] = [line for line in done.text.splitlines() if line.lstrip().startswith(variable)]
        assert name in line
        assert ".data.root=FOLDER" in line
    assert "Downloading" not in done.text
    wrong = relloc(
        "evaluate",
        "checkpoint=random",
        "model=small",
        "eval=voc07_svm",
        "eval.voc07_svm.data.root=/nowhere",
    )
    assert wrong.code == 2
    assert "eval.voc07_svm.data.root=/nowhere is not a folder" in wrong.text
