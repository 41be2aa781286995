"""Real photographs from disk through both commands, small enough for a CPU."""

import re

import pytest

from relloc.geometry import CHANCE_PERCENT
from relloc.results import read_results
from relloc.tracking import read_journal


def most_changed(rows):
    """By how many points recalibration changes a number, where it changes one most."""
    return max(
        abs(row.value - rows[(*question, "as_trained")].value)
        for (*question, batch_norm), row in rows.items()
        if batch_norm == "recalibrated"
    )


@pytest.mark.data
def test_pretraining_on_a_mixed_folder_then_evaluating_on_labels(relloc, tmp_path, real_images):
    imagenette = real_images / "imagenette_small"
    run_dir, evaluated, random = (tmp_path / name for name in ("run", "evaluated", "random"))
    pretrained = relloc(
        "train",
        *(
            "model=small",
            "data=folder",
            f"data.root=[{imagenette / 'train'},{real_images / 'demo_photos'}]",
        ),
        *(
            "schedule.epochs=6",
            "schedule.warmup_epochs=0.5",
            "schedule.milestone_epochs=[5]",
            "optimizer.lr=0.8",
        ),
        *(
            "recipe.images_per_step=64",
            "recipe.images_per_batch_norm=64",
            "tracking=none",
            f"hydra.run.dir={run_dir}",
        ),
    )
    assert pretrained.code == 0, pretrained.text
    assert re.search(r"skipped: .*no labels", pretrained.text)
    curve = [entry.metrics for entry in read_journal(run_dir) if "train/loss" in entry.metrics]
    assert curve[-1]["train/loss"] < 2.06 < curve[0]["train/loss"]
    assert sum(point["train/top1"] for point in curve[-3:]) / 3 > CHANCE_PERCENT + 2

    looks = (
        "data=folder",
        "data.name=imagenette_small",
        f"data.root={imagenette}",
        "tracking=none",
        # Half of the published sides, in a quarter of the time
        "view.short_px=128",
        "view.crop_px=112",
    )
    ways = (
        "batch_norm=[as_trained,recalibrated]",
        "calibration_images=512",
        "probe.linear.epochs=6",
    )
    for who, out in ((f"checkpoint={run_dir}", evaluated), ("checkpoint=random", random)):
        more = ("model=small",) if out == random else ()
        done = relloc(
            "evaluate",
            who,
            *more,
            *looks,
            *ways,
            "probe.linear.milestone_epochs=[4]",
            f"hydra.run.dir={out}",
        )
        assert done.code == 0, done.text

    by_name = [
        {(row.eval, row.layer, row.metric, row.batch_norm): row for row in read_results(out)}
        for out in (evaluated, random)
    ]
    assert by_name[0].keys() == by_name[1].keys()
    assert len(by_name[0]) == 2 * (
        5 + 6 * 4
    )  # two batch norms; linear at five layers, four k at six
    assert all(row.n == 300 for rows in by_name for row in rows.values())
    # The statistics of patches are not those of images. At which layer that tells, after so short a
    # training, depends on the processor's rounding; at random initialization, whose statistics are
    # nobody's, it tells everywhere.
    assert most_changed(by_name[0]) > 1
    assert most_changed(by_name[1]) > 4
    assert all(
        row.value > 15 for row in by_name[0].values() if row.eval == "linear_fast"
    )  # ten classes
