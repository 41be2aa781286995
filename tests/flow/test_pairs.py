"""A training that asks about other pairs than those with the center, from start to end."""

from pathlib import Path

import torch
from tiny import TINY

from relloc.checkpoints.backbone_files import load_backbone
from relloc.models.small import SmallBackbone
from relloc.results import read_results
from relloc.runs.pretext_models import pretext_model
from relloc.tracking import read_journal


def test_all_pairs_of_a_larger_grid(relloc, tmp_path: Path) -> None:
    run_dir = tmp_path / "out"
    words = [
        "pairs=offsets",
        "grid.rows=4",
        "grid.gap_px=0",
        "grid.jitter_px=0",
        "eval=[]",
        f"hydra.run.dir={run_dir}",
    ]
    done = relloc("train", *TINY, *words)
    assert done.code == 0, done.text

    # Asked about the pairs with the center, as any network, and about what it was trained on
    rows = {row.metric: row for row in read_results(run_dir)}
    assert set(rows) == {"top1", "top1_trained"}
    assert rows["top1_trained"].n == rows["top1"].n // 8 * 240
    assert [row.headline for row in rows.values()] == [True, False]
    assert "chance is 12.5 %" in done.text
    assert "chance is 5.0 %" in done.text
    monitored = [entry.metrics for entry in read_journal(run_dir)]
    assert any(
        {"monitor/pretext/top1", "monitor/pretext/top1_trained"} <= set(m) for m in monitored
    )

    # Studies ask its network about 3x3 grids
    file = run_dir / "backbone.safetensors"
    weights, about = load_backbone(file)
    backbone = SmallBackbone(widths=about["model"]["backbone"]["widths"])
    backbone.load_state_dict(weights)
    asked = pretext_model(file, backbone)
    assert asked is not None
    assert asked.patches.grid.rows == 3
    patch_px = asked.patches.grid.patch_px
    assert asked.network(torch.zeros(2, 9, 3, patch_px, patch_px)).shape == (2, 8, 8)

    other = relloc("train", *TINY, "pairs=adjacent", *words[1:])
    assert other.code != 0
    assert "pairs._target_" in other.text
