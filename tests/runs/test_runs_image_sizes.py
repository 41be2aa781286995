"""Grids that images can't hold are refused before a training, with what to set."""

import contextlib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from relloc.errors import DataError, UsageError
from relloc.runs import build
from relloc.runs.image_sizes import check_sizes
from relloc.runs.settings import conf_dir

NOT_RESIZED = [
    *("model=small", "eval=[]", "tracking=none", "grid.resize=null", "pairs=adjacent"),
    *("grid.patch_px=16", "grid.gap_px=4", "grid.jitter_px=2"),
]


def folder_of_images(folder: Path, *, train_px: int, held_out_px: int) -> Path:
    """Writes four images a split, of which one is higher than it is wide."""
    for split, side in (("train", train_px), ("val", held_out_px)):
        (folder / split / "a").mkdir(parents=True)
        for number in range(4):
            size = (side, 2 * side if number else side)
            Image.new("RGB", size).save(folder / split / "a" / f"{number}.png")
    return folder


# Two rows of 16 px patches with 4 px gaps and 2 px of jitter on each side span 40 px, three 60 px,
# four 80 px.
@pytest.mark.parametrize(
    ("rows", "train_px", "held_out_px", "split", "needed_px"),
    [
        (2, 40, 60, None, 0),
        (2, 39, 60, "train", 40),
        # The questions about held-out images have three rows.
        (2, 40, 59, "val", 60),
        (4, 80, 80, None, 0),
        (4, 79, 80, "train", 80),
        (4, 80, 79, "val", 80),
    ],
)
def test_images_that_are_not_resized_are_looked_at_before_the_training(
    tmp_path: Path, rows: int, train_px: int, held_out_px: int, split: str | None, needed_px: int
) -> None:
    root = folder_of_images(tmp_path, train_px=train_px, held_out_px=held_out_px)
    words = [*NOT_RESIZED, f"grid.rows={rows}", "data=folder", f"data.root={root}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        settings = build.pretraining(compose("train", words))
    data = settings.data.read()
    if split is None:
        check_sizes(settings, data)
        return
    message = rf"4 of 4 images of \S+ {split} are smaller than the {needed_px} px .*grid\.resize="
    with pytest.raises(DataError, match=message):
        check_sizes(settings, data)


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("grid", ["mmselfsup", "google2019", "doersch2015"])
def test_grids_of_other_rows_are_refused_with_what_to_set_or_fit_any_image(
    grid: str, rows: int
) -> None:
    words = [f"grid={grid}", f"grid.rows={rows}", "pairs=adjacent", "eval=[]", "model=small"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", words)
    if rows == 4 and grid != "doersch2015":
        with pytest.raises(UsageError, match=r"grid.resize.px to 340 or more"):
            build.pretraining(config)
        return
    settings = build.pretraining(config)
    # Images of any size become large enough for the trained grid and for that of held-out ones.
    for each in (settings.training_patches.grid, settings.patches.about_center.grid):
        assert min(each.resized(20, 30, 0.5)) >= each.span_px


def test_few_images_may_be_too_small(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path, train_px=40, held_out_px=60)
    Image.new("RGB", (40, 30)).save(root / "train" / "a" / "0.png")
    words = [*NOT_RESIZED, "grid.rows=2", "data=folder", f"data.root={root}"]
    for share, is_refused in ((0.2, True), (0.25, False)):
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose("train", [*words, f"data.unreadable_share={share}"])
        settings = build.pretraining(config)
        expected: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if is_refused:
            expected = pytest.raises(DataError, match=r"1 of 4 images .*0\.png: 40x30 px")
        with expected:
            check_sizes(settings, settings.data.read())
