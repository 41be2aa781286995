"""`eval=card` from the command line: what has data is measured, and the rest is told."""

import re
import shutil
import signal
from pathlib import Path

import pytest
from annotated_sets import write_voc, write_voc_masks
from commands import start
from test_card_evaluations import voc

from relloc.results import read_results

MEASURED = ("voc07_svm", "voc0712_detection", "voc12aug_fcn")
WITHOUT_DATA = ("linear_places205", "coco_mask_rcnn_fpn_1x")
# What is not asked for here, since test_card_evaluations.py measures it.
LEFT_OUT = (
    *("voc07_low_shot", "linear_in1k", "linear_avgpool", "knn_in1k"),
    *("semisup_1", "semisup_10", "label_free_in1k"),
)


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, Path]:
    """VOC as three evaluations want it, in one folder each."""
    return {
        "voc07_svm": voc(tmp_path / "svm", n_test=10),
        "voc0712_detection": write_voc(tmp_path / "boxes"),
        "voc12aug_fcn": write_voc_masks(tmp_path / "masks", aug=False),
    }


@pytest.fixture
def line(roots: dict[str, Path], tmp_path: Path) -> list[str]:
    """The card at the size of a test."""
    boxes, masks = "eval.voc0712_detection", "eval.voc12aug_fcn"
    return [
        *(
            "checkpoint=random",
            "model=small",
            "tracking=none",
            "workers=0",
            "batch_norm=as_trained",
        ),
        *("eval=card", *(f"~eval.{name}" for name in LEFT_OUT)),
        *(f"eval.{name}.data.root={root}" for name, root in roots.items()),
        *(f"eval.{name}.data.source.published_images=null" for name in roots),
        *("eval.voc07_svm.view.short_px=40", "eval.voc07_svm.view.side_px=32"),
        "eval.voc07_svm.costs=[0.1,1]",
        *(f"{boxes}.iterations=2", f"{boxes}.batch=2", f"{boxes}.warmup=0"),
        *(f"{boxes}.augment.short_px=[64]", f"{boxes}.augment.long_px=128"),
        *(f"{boxes}.view.box=[128,64]", f"{boxes}.milestones=[1]"),
        *(f"{masks}.iterations=2", f"{masks}.batch=4", f"{masks}.augment.box=[64,48]"),
        *(f"{masks}.augment.crop_px=48", f"{masks}.view.box=[64,48]"),
        f"hydra.run.dir={tmp_path / 'run'}",
    ]


def test_what_has_data_is_measured_and_the_rest_is_told_before_the_report(
    relloc, tmp_path: Path, line: list[str], environment: dict[str, str]
) -> None:
    done = relloc("evaluate", *line)
    assert done.code == 0, done.text
    assert {row.eval for row in read_results(tmp_path / "run")} == set(MEASURED)
    start_of_report = done.text.index("# Our numbers beside the published ones")
    said = {
        "linear_places205": ("RELLOC_PLACES205", "Places site"),
        "coco_mask_rcnn_fpn_1x": ("RELLOC_COCO", "COCO site"),
    }
    for name, (variable, where) in said.items():
        told = re.compile(
            rf"^skipped {name}: .*eval\.{name}\.data\.root=FOLDER.*\b{variable}\b.*{where}",
            re.MULTILINE,
        )
        # At the start, and again at the end, hours later
        places = [found.start() for found in told.finditer(done.text)]
        assert [place < start_of_report for place in places] == [True, False]
    report = relloc("report", str(tmp_path / "run"))
    assert report.text.partition("\nnext: ")[0] in done.text
    assert done.text.rstrip().splitlines()[-1] == (
        "next: python -m relloc.report run --out report.html"
    )

    # Named by itself, an evaluation without data is an error, and so is all of it if asked for.
    (tmp_path / "other").mkdir()
    for asked in (["eval=coco_mask_rcnn_fpn_1x"], [*line, "missing_data=error"]):
        refused = relloc("evaluate", "checkpoint=random", "model=small", *asked)
        assert refused.code == 2
        assert "RELLOC_COCO or eval.coco_mask_rcnn_fpn_1x.data.root=FOLDER: COCO" in refused.text
    assert {row.eval for row in read_results(tmp_path / "run")} == set(MEASURED)


def test_a_data_set_that_is_there_but_damaged_is_an_error(
    relloc, tmp_path: Path, line: list[str], roots: dict[str, Path]
) -> None:
    shutil.rmtree(roots["voc0712_detection"] / "VOCdevkit" / "VOC2012" / "Annotations")
    damaged = relloc("evaluate", *line)
    assert damaged.code == 2
    assert "VOC2012/Annotations is missing" in damaged.text
    assert not (tmp_path / "run").exists()
    # Without its folder the year is missing, not damaged
    shutil.rmtree(roots["voc0712_detection"] / "VOCdevkit" / "VOC2012")
    done = relloc("evaluate", *line, "~eval.voc12aug_fcn")
    assert done.code == 0, done.text
    assert re.search(r"^skipped voc0712_detection: .*PASCAL VOC2012", done.text, re.MULTILINE)
    assert {row.eval for row in read_results(tmp_path / "run")} == {"voc07_svm"}


def test_two_processes_leave_out_the_same(
    relloc, tmp_path: Path, line: list[str], roots: dict[str, Path]
) -> None:
    # One data set is found missing by its setting, and one when it is read
    shutil.rmtree(roots["voc0712_detection"] / "VOCdevkit" / "VOC2012")
    in_one_process = [f"~eval.{name}" for name in ("voc07_svm", "linear_places205")]
    kept = [word for word in line if "eval.voc07_svm" not in word]
    done = relloc("evaluate", *kept, *in_one_process, "device=cpu", processes=2)
    assert done.code == 0, done.text
    for name in ("voc0712_detection", "coco_mask_rcnn_fpn_1x"):
        # One process says it, at the start and at the end
        assert done.text.count(f"skipped {name}: ") == 2
    assert {row.eval for row in read_results(tmp_path / "run")} == {"voc12aug_fcn"}


def test_killed_between_two_evaluations_it_goes_on_with_the_second(
    tmp_path: Path, line: list[str], environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    # The second one is long enough for the kill to come before its end
    slow = [*line, "eval.voc12aug_fcn.iterations=5000"]
    first = start("relloc.evaluate", *slow, folder=tmp_path, environment=environment)
    assert first.wait_for(lambda: read_results(run))
    assert first.kill() == -signal.SIGKILL
    before = read_results(run)
    assert {row.eval for row in before} == {"voc0712_detection"}

    second = start("relloc.evaluate", *line, folder=tmp_path, environment=environment)
    assert second.wait() == 0, second.text
    rows = read_results(run)
    assert list(rows[: len(before)]) == list(before)
    assert sorted({row.eval for row in rows}) == sorted(MEASURED)
    assert len({(row.eval, row.layer, row.metric) for row in rows}) == len(rows)
    assert "# Our numbers beside the published ones" in second.text
