"""What a sweeper that searches is told of a point."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hydra_plugins.relloc_launchers.objective import (
    check_names,
    check_sweeper,
    names_of,
    objective_of,
)
from omegaconf import OmegaConf

from relloc.errors import UsageError
from relloc.results import Result, append_results

GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def write(folder: Path, *rows: tuple[str, str, float, str]) -> None:
    made = [
        Result(
            eval=name,
            dataset="set",
            split="val",
            layer=layer,
            metric="top1",
            value=value,
            n=10,
            seed=0,
            protocol="",
            checkpoint=checkpoint,
            model="small",
        )
        for name, layer, value, checkpoint in rows
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in made))


def test_it_is_the_value_of_the_result_that_is_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        ("linear_fast", "feature4", 40.0, "/run"),
        ("linear_fast", "feature4", 41.0, "/run"),  # measured anew
        ("linear_fast", "feature4", 9.0, "random"),
        ("pretext", "avgpool", 20.0, "/run"),
    )
    assert objective_of(tmp_path, ("linear_fast/feature4/top1",)) == 41.0
    assert objective_of(tmp_path, ("linear_fast_random/feature4/top1", "pretext/top1")) == (
        9.0,
        20.0,
    )
    assert objective_of(tmp_path, ()) is None
    with pytest.raises(
        UsageError, match=r"objective=knn/feature4/top1.* linear_fast/feature4/top1, .*pretext/top1"
    ):
        objective_of(tmp_path, ("knn/feature4/top1",))


def test_of_several_checkpoints_none_is_guessed(tmp_path: Path) -> None:
    write(tmp_path, ("knn", "feature4", 40.0, "/a"), ("knn", "feature4", 41.0, "/b"))
    with pytest.raises(UsageError, match="objective=knn/feature4/top1 has 2 values"):
        objective_of(tmp_path, ("knn/feature4/top1",))
    with pytest.raises(UsageError, match=r"results\.jsonl.* none"):
        objective_of(tmp_path / "nowhere", ("knn/feature4/top1",))


def test_a_name_says_no_decoder_where_a_point_has_one_only(tmp_path: Path) -> None:
    def result(value: float, decoder: str) -> Result:
        return Result(
            eval="knn",
            dataset="set",
            split="val",
            layer="feature4",
            metric="top1",
            value=value,
            n=10,
            seed=0,
            checkpoint="/run",
            model="small",
            decoder=decoder,
        )

    append_results(tmp_path, [result(40.0, "nvJPEG")])
    assert objective_of(tmp_path, ("knn/feature4/top1",)) == 40.0
    append_results(tmp_path, [result(41.0, "")])
    names = ("knn/feature4/top1", "knn_nvJPEG/feature4/top1")
    assert objective_of(tmp_path, names) == (41.0, 40.0)


def test_only_hydras_own_sweeper_goes_without() -> None:
    def config(sweeper: str, objective: object) -> None:
        check_sweeper(
            OmegaConf.create({"hydra": {"sweeper": {"_target_": sweeper}}, "objective": objective})
        )

    config(GRID, None)
    config("hydra_plugins.optuna.Optuna", "knn/feature4/top1")
    with pytest.raises(UsageError, match="objective="):
        config("hydra_plugins.optuna.Optuna", None)
    for wrong in (3, [3], "", {"a": 1}):
        with pytest.raises(UsageError, match="objective="):
            names_of(OmegaConf.create({"objective": wrong}))


def test_a_name_of_no_evaluation_is_told_before_anything_runs() -> None:
    def check(name: str, kind: str = "train") -> None:
        call = {"_target_": "relloc.evals.knn.Knn"}
        of_a_preset = {"k": [20]}
        evaluations = {"knn": call, "linear_fast": call, "linear": of_a_preset}
        config = {"objective": name, "eval": evaluations, "study": {}}
        check_names(OmegaConf.create(config), kind)

    for name in (
        "knn/feature4/top1_k20",
        "linear_fast_random_recalibrated/feature4/top1",
        "pretext/top1",
    ):
        check(name)
    for name, kind in (
        ("linear/feature4/top1", "train"),
        ("pretext/top1", "evaluate"),
        ("kn", "train"),
    ):
        with pytest.raises(UsageError, match=r"objective=.*knn, linear_fast"):
            check(name, kind)
