"""What jobs ask the cluster for."""

from pathlib import Path
from typing import Any

import pytest
from hydra_plugins.relloc_launchers.resources import gpus_asked, gpus_of_gres, parameters_of
from omegaconf import OmegaConf

from relloc.errors import UsageError
from relloc.runs.settings import conf_dir


def parameters(**changed: Any) -> dict[str, Any]:
    settings = OmegaConf.to_container(OmegaConf.load(conf_dir() / "launcher/slurm.yaml").launcher)
    return parameters_of(
        settings | changed,  # type: ignore[operator, arg-type]
        prefix="launcher.",
        name="relloc_gaps",
        token="relloc-0123456789ab",
        code=Path("/code"),
        setup=["placing"],
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [(4, 4), ("4", 4), ("a100:4", 4), ("a100", 1), ("a100:2,v100:1", 3), (0, 0), (None, 0)],
)
def test_gpus_with_and_without_a_type(text: str | int | None, number: int) -> None:
    assert gpus_asked(text) == number


@pytest.mark.parametrize(
    ("gres", "number"),
    [
        *(
            ("gpu:4", 4),
            ("gpu", 1),
            ("gpu:a100", 1),
            ("gpu:a100:4", 4),
            ("gpu:a100:4(S:0-1)", 4),
            ("gres/gpu:2", 2),
        ),
        *(
            ("gpu:a100:2,gpu:v100:1", 3),
            ("tmpdisk:100,gpu:2", 2),
            ("tmpdisk:100", None),
            ("gpu:0", 0),
        ),
    ],
)
def test_gpus_of_a_gres(gres: str, number: int | None) -> None:
    assert gpus_of_gres(gres) == number


@pytest.mark.parametrize(
    ("changed", "tasks", "asked"),
    [
        ({}, 1, 1),
        ({"gpus_per_node": 8}, 8, 8),
        ({"gpus_per_node": "a100:4"}, 4, "a100:4"),
        ({"gpus_per_node": 0}, 1, None),
        ({"gpus_per_node": None}, 1, None),
        ({"gres": "gpu:a100:4"}, 4, None),
        ({"gres": "gpu:a100:4", "gpus_per_node": None}, 4, None),
        ({"gres": "gpu:a100:4", "gpus_per_node": 4}, 4, None),
        ({"gres": "tmpdisk:100"}, 1, 1),
        ({"gpus_per_node": 4, "tasks_per_node": 2}, 2, 4),
        ({"additional_parameters": {"gpus": 4}, "nodes": 2}, 2, None),
        ({"additional_parameters": {"gres": "gpu:2"}}, 2, None),
        ({"submitit": {"gpus_per_task": 1}, "tasks_per_node": 4}, 4, None),
    ],
)
def test_a_process_for_each_gpu_and_gpus_asked_for_once(
    changed: dict[str, Any], tasks: int, asked: object
) -> None:
    made = parameters(**changed)
    assert made["tasks_per_node"] == tasks
    assert made.get("slurm_gpus_per_node") == asked


@pytest.mark.parametrize(
    "changed",
    [
        {"gres": "gpu:4", "gpus_per_node": 2},
        {"gres": "gpu:4", "gpus_per_node": 0},
        {"gres": ["gpu:4"]},
        {"gpus_per_node": 1.5},
        {"gpus_per_node": "a100:-1"},
        {"tasks_per_node": 0},
        {"nodes": 0},
        {"array_parallelism": 0},
        {"timeout_min": 0},
        {"max_num_timeout": None},
        {"signal_delay_s": "soon"},
        {"setup": "module load cuda"},
        {"srun_args": None},
        {"additional_parameters": "reservation=x"},
        {"additional_parameters": {"array": "0-3"}},
        {"additional_parameters": {"open-mode": "truncate"}},
        {"additional_parameters": {"time": "2-00:00:00"}},
        {"additional_parameters": {"nodes": 2}},
        {"additional_parameters": {"partition": "a"}, "partition": "b"},
        {"submitit": {"mem_per_gp": "3G"}},
        {"submitit": {"ntasks_per_node": 3}},
    ],
)
def test_settings_that_mean_nothing_or_contradict_are_named(changed: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"launcher\.|mem_per_gp"):
        parameters(**changed)


def test_the_token_is_the_comment_or_part_of_the_name() -> None:
    made = parameters()
    assert (made["slurm_comment"], made["slurm_job_name"]) == ("relloc-0123456789ab", "relloc_gaps")
    for changed in (
        {"additional_parameters": {"comment": "bill"}},
        {"submitit": {"comment": "bill"}},
    ):
        made = parameters(**changed)
        assert made["slurm_job_name"] == "relloc_gaps_relloc-0123456789ab"
        assert "relloc" not in str(made.get("slurm_comment"))


def test_no_limit_of_time_is_the_partitions_and_a_clean_environment_is_told_to_srun() -> None:
    assert "timeout_min" not in parameters(timeout_min=None)
    assert parameters()["timeout_min"] == 1440
    assert (
        "unset SLURM_EXPORT_ENV"
        in parameters(additional_parameters={"export": "NONE"})["slurm_setup"]
    )


def test_a_list_of_partitions_or_nodes_is_what_slurm_writes_with_commas() -> None:
    made = parameters(partition=["a", "b"], exclude=["n1", "n2"])
    assert (made["slurm_partition"], made["slurm_exclude"]) == ("a,b", "n1,n2")


@pytest.mark.parametrize("name", ["cpus_per_task", "mem_gb"])
@pytest.mark.parametrize("value", [0, -1])
def test_less_than_nothing_is_asked_of_no_cluster(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=name):
        parameters(**{name: value})


def test_an_option_of_sbatch_that_is_null_is_left_out_and_a_mapping_is_none() -> None:
    assert (
        "reservation"
        not in parameters(additional_parameters={"reservation": None})[
            "slurm_additional_parameters"
        ]
    )
    with pytest.raises(UsageError, match="additional_parameters.reservation"):
        parameters(additional_parameters={"reservation": {"a": 1}})
