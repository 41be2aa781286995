"""Settings of hydra/launcher=submitit_slurm, as that plugin has them."""

from typing import Any

import pytest
from hydra_plugins.relloc_launchers.submitit_settings import (
    SubmititSlurmLauncher,
    SubmititSlurmSettings,
)
from omegaconf import OmegaConf


def launcher(**given: object) -> SubmititSlurmLauncher:
    settings = OmegaConf.structured(SubmititSlurmSettings(submitit_folder="logs/%j", name="n"))
    OmegaConf.set_struct(settings, False)
    merged = OmegaConf.merge(settings, given)
    named: dict[str, Any] = {str(name): merged[name] for name in merged if name != "_target_"}  # type: ignore[index]
    return SubmititSlurmLauncher(**named)


@pytest.mark.parametrize(
    ("name", "value"), [("use_srun", False), ("exclusive", True), ("mem_per_gpu", "8G")]
)
def test_submitits_own_settings_reach_it(name: str, value: object) -> None:
    assert launcher(**{name: value}).settings["submitit"][name] == value


def test_an_option_that_is_not_wanted_is_not_asked_for() -> None:
    assert "exclusive" not in launcher(exclusive=False).settings["submitit"]


def test_the_limit_of_time_is_the_plugins_and_may_be_the_partitions() -> None:
    assert launcher().settings["timeout_min"] == 60
    assert launcher(timeout_min=None).settings["timeout_min"] is None
