"""Tests what `relloc.prepare` prints about checking and packing."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from annotated_sets import (
    annotation_file,
    coco_annotation,
    write_cityscapes,
    write_coco,
    write_voc,
    write_voc_masks,
)
from hydra import compose, initialize_config_dir
from mixed_folder import BROKEN, write_mixed

from relloc.data.manifest import MANIFEST
from relloc.errors import DataError, TooManyUnreadable
from relloc.runs import build
from relloc.runs.invocation import Invocation
from relloc.runs.preparing import prepare
from relloc.runs.settings import conf_dir


def run(
    *words: str, chosen: str = "folder", data: Sequence[str] = ("data=folder", "data.name=mine")
) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        settings = build.preparing(compose("prepare", [*data, "workers=1", *words]))
    invocation = Invocation(
        command="prepare",
        folder=Path(),
        names_folder=False,
        words=("data=folder", *words),
        choices={"data": chosen},
        settings={},
        files={},
    )
    prepare(settings, invocation)


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    return write_mixed(tmp_path / "originals")


def test_a_check_names_findings_and_the_command_that_packs(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # All is printed before the command ends as one that failed.
    with pytest.raises(TooManyUnreadable, match=rf"{len(BROKEN)} of .*unreadable_share=0\.05"):
        run(f"data.root={originals}")
    output = capsys.readouterr().out
    assert "mine, as checked" in output
    assert re.search(rf"train: {len(BROKEN)} images .*read", output)
    assert (
        f"next: python -m relloc.prepare data=folder data.root={originals} out=SHARDS"
        in output.replace("\n", " ")
    )
    assert not list(tmp_path.rglob(MANIFEST))
    run(f"data.root={originals}", "data.unreadable_share=1")


def test_packing_tells_what_became_of_images_and_how_to_train_on_them(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    with pytest.raises(TooManyUnreadable):
        run(f"data.root={originals}", f"out={out}", "short_px=96")
    output = capsys.readouterr().out.replace("\n", " ")
    assert "packed  train: " in output
    assert re.search(r"2 JPEGs kept.*3 reduced to 96 px.*3 encoded", output)
    next_command = f"next: python -m relloc.train data=folder data.shards={out}"
    assert next_command in output
    assert (out / MANIFEST).is_file()
    # What is packed is checked by its hashes, and has no command that packs it again.
    run(f"data.shards={out}", "data.unreadable_share=1")
    output = capsys.readouterr().out.replace("\n", " ")
    assert "checked " in output
    assert "out=SHARDS" not in output
    assert next_command in output
    run(
        f"data.shards={out}", "data.unreadable_share=1", chosen="photos"
    )  # as where no data= was typed
    assert next_command in capsys.readouterr().out.replace("\n", " ")


def test_packing_pixels_tells_the_space_and_what_was_enlarged(
    originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    words = (f"data.root={originals}", f"out={out}", "short_px=96", "data.unreadable_share=1")
    run(*words, "format=pixels")
    output = capsys.readouterr().out.replace("\n", " ")
    assert re.search(r"pack +about [\d.]+ MB.* GB", output)
    assert re.search(r"train: .* 1 image kept.*3 reduced to 96 px.*4 enlarged", output)
    assert "JPEG" not in output
    run(f"data.shards={out}", "data.unreadable_share=1")
    output = capsys.readouterr().out.replace("\n", " ")
    assert "pixels, short side 96 px" in output
    assert "checked " in output
    with pytest.raises(DataError, match="format was pixels, now jpeg"):
        run(*words)


def prepared(
    capsys: pytest.CaptureFixture[str], member: str, root: Path, *words: str
) -> tuple[str, dict[str, list[str]]]:
    """What is printed about an annotated set, and the cells of its table."""
    refused = ""
    try:
        run(
            f"data.root={root}",
            "data.source.published_images=null",
            *words,
            chosen=member,
            data=[f"data={member}"],
        )
    except TooManyUnreadable as error:
        refused = str(error)
    told = f"{capsys.readouterr().out} {refused}"
    rows = {}
    for line in told.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells:
            rows[cells[0]] = cells[1:]
    return " ".join(told.split()), rows


def test_one_year_of_voc_is_not_compared_with_the_published_counts_of_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_voc(tmp_path)
    published = "data.source.published_images={trainval: 2, test: 1}"
    told, rows = prepared(capsys, "voc0712", tmp_path, published, "data.source.years=[2007]")
    assert rows["published"] == ["", ""]
    assert "nothing wrong was found" in told
    with pytest.warns(UserWarning, match="the published set 2"):
        told, rows = prepared(capsys, "voc0712", tmp_path, published)
    assert rows["published"] == ["2", "1"]
    assert "nothing wrong was found" not in told


def test_boxes_of_voc_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told, rows = prepared(capsys, "voc0712", write_voc(tmp_path))
    assert "boxes of 20 classes" in told
    assert "nothing wrong was found" in told
    assert (rows["all"], rows["objects"]) == (["3", "1"], ["3", "1"])
    annotation_file(tmp_path).write_text("<annotation><size>")
    told, rows = prepared(capsys, "voc0712", tmp_path)
    assert rows["unreadable"] == ["1", "0"]
    # A long path may be broken anywhere.
    assert re.search(r"trainval:1image.*000005\.xmlisnotXML.*line1", told.replace(" ", ""))
    assert "runs on these images stop" in told
    told, _ = prepared(capsys, "voc0712", tmp_path, "data.unreadable_share=0.5")
    assert "runs on these images stop" not in told


def test_masks_of_voc_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told, rows = prepared(capsys, "voc2012_segmentation", write_voc_masks(tmp_path, aug=True))
    assert "the class of each pixel, of 21" in told
    assert "2 of 4 images have masks of SegmentationClassAug" in told
    assert "objects" not in rows
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClassAug/2008_000007.png").write_bytes(b"")
    told, rows = prepared(capsys, "voc2012_segmentation", tmp_path)
    assert rows["unreadable"] == ["1", "0"]
    assert "2008_000007.pngisanemptyfile" in told.replace(" ", "")


def test_coco_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = [
        coco_annotation(1, 9, category_id=91),
        coco_annotation(918, 25, bbox=[5, 5, 1.03, 0]),
    ]
    told, rows = prepared(capsys, "coco2017", write_coco(tmp_path, annotations))
    assert "boxes of 3 classes" in told
    assert (rows["unreadable"], rows["objects"]) == (["1", "0"], ["2", "1"])
    assert "annotation1in" in told.replace(" ", "")
    assert "nocategory91" in told.replace(" ", "")
    assert "object 918" in told
    path = tmp_path / "annotations/instances_val2017.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(DataError, match=r"instances_val2017\.json is cut off"):
        prepared(capsys, "coco2017", tmp_path)


def test_cityscapes_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told, rows = prepared(capsys, "cityscapes", write_cityscapes(tmp_path, "labelIds"))
    assert "3 of 3 class maps are computed from labelIds" in told
    assert (rows["all"], rows["unreadable"]) == (["2", "1"], ["0", "0"])


def test_packing_says_that_boxes_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_coco(tmp_path / "coco")
    told, _ = prepared(capsys, "coco2017", tmp_path / "coco", f"out={tmp_path / 'packed'}")
    assert "without boxes and masks" in told
    assert (tmp_path / "packed" / MANIFEST).exists()
