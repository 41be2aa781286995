"""From photographs to a page of numbers: pretraining, evaluation and report in few seconds."""

from tiny import TINY

from relloc.results import read_results
from relloc.tracking import read_journal, search

# Seconds less: no evaluation of the pretraining's own, and a network of a few channels.
SMALL = (
    "model.backbone.widths=[8,8,8,8,8]",
    "model.head.hidden_dim=16",
    "monitor.every_epochs=null",
    "eval=[]",
)


def test_a_pretraining_is_evaluated_beside_a_random_network_tracked_and_reported(
    relloc, tmp_path
) -> None:
    trained = relloc("train", *TINY, *SMALL, "hydra.run.dir=runs/trained", "tracking=none")
    assert trained.code == 0, trained.text
    run_dir = tmp_path / "runs/trained"
    (pretext,) = read_results(run_dir)
    assert (pretext.eval, pretext.split) == ("pretext", "held_out")
    assert pretext.low <= pretext.value <= pretext.high
    assert [entry.step for entry in read_journal(run_dir) if "train/loss" in entry.metrics] == list(
        range(2, 17, 2)
    )

    # The network and its images are those of the run
    line = ("eval=[knn]", "checkpoint=[runs/trained,random]", "view.short_px=64", "view.crop_px=56")
    done = relloc("evaluate", *line, "batch_norm=as_trained", "hydra.run.dir=runs/evaluated")
    assert done.code == 0, done.text
    rows = read_results(tmp_path / "runs/evaluated")
    assert {row.checkpoint for row in rows} == {str(run_dir / "backbone.safetensors"), "random"}
    assert len({row.layer for row in rows}) == 6
    assert all(0 <= row.value <= 100 and row.n > 0 for row in rows)
    (tracked,) = search(f"sqlite:///{tmp_path}/runs/mlflow.db", "relloc")
    assert tracked["status"] == "FINISHED"
    assert {row.tracked_name for row in rows} <= set(tracked["metrics"])

    reported = relloc("report", "runs")
    assert reported.code == 0, reported.text
    pooled = [row for row in rows if (row.layer, row.metric) == ("avgpool", "top1_k20")]
    assert len(pooled) == 2
    assert all(f"{row.value:.2f}" in reported.text for row in pooled)
