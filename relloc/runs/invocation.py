"""A command as it was started, and what is written down of it in the run's folder and in the tracker."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from relloc import ranks
from relloc.data.image_set import ImageSet, Splits
from relloc.runs.data_of_run import CONFIG_FILE
from relloc.runs.engine import Engine
from relloc.runs.refusing import HYDRA_FILES
from relloc.runs.settings import plain
from relloc.sweeps.points import identity
from relloc.tracking import DatasetRecord, RunRecord, environment_tags, flatten

_NOT_RECORDED = ("launcher", "sweep", "objective")  # they say how a run was sent, not what it is
_OF_DATA = (
    "name",
    "root",
    "shards",
    "source",
)  # what is recorded of the data that an evaluation brings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Invocation:
    """What Hydra made of the command line: all settings, resolved, and what was typed.

    `choices` has the member that was chosen of each group, `files` the texts to write into the run's folder.
    """

    command: str
    folder: Path
    names_folder: bool
    words: tuple[str, ...]
    choices: Mapping[str, Any]
    settings: Mapping[str, Any]
    files: Mapping[str, str]

    @classmethod
    def of(cls, config: DictConfig) -> "Invocation":
        """That of this process, whose composed config is given."""
        of_hydra = HydraConfig.get()
        # config.yaml, resolved, and .hydra/, as Hydra would have written it before the folder was this run's alone
        files = {CONFIG_FILE: OmegaConf.to_yaml(config, resolve=True)}
        if of_hydra.output_subdir is None:
            parts: Any = (config, HydraConfig.instance().cfg, of_hydra.overrides.task)
            files |= {
                name: OmegaConf.to_yaml(part) for name, part in zip(HYDRA_FILES, parts, strict=True)
            }
        return cls(
            command=str(of_hydra.job.name),
            folder=Path(os.path.abspath(of_hydra.runtime.output_dir)),
            names_folder=any(
                word.startswith("hydra.run.dir=") for word in of_hydra.overrides.hydra
            ),
            words=tuple(of_hydra.overrides.task),
            choices=dict(of_hydra.runtime.choices),
            settings=plain(config),
            files=files,
        )

    def record(self, name: str, data: Sequence[Splits], engine: Engine) -> RunRecord:
        """What a tracker is told of the run, which it calls `name`."""
        is_cuda = engine.device.type == "cuda"
        devices = (
            [torch.cuda.get_device_name(engine.device)] * ranks.world_size() if is_cuda else ["cpu"]
        )
        tags = {
            "relloc.kind": self.command,
            "relloc.run_dir": str(self.folder),
            "relloc.data": self.settings["data"]["name"],
            "relloc.engine": str(engine),
            "relloc.config": identity(self.settings),
        }
        if self.choices.get("experiment"):
            tags["relloc.preset"] = str(self.choices["experiment"])
        if os.environ.get("RELLOC_SWEEP"):  # a sweep's launcher says which, and a job's what it is
            tags["relloc.sweep"] = os.environ["RELLOC_SWEEP"]
        tags |= dict(
            told.split("=", 1)
            for told in os.environ.get("RELLOC_TAGS", "").split(";")
            if "=" in told
        )
        tracking = self.settings["tracking"]
        used = [
            _dataset(images, use)
            for one in data
            for images, use in ((one.train, "train"), (one.held_out, "eval"))
        ]
        return RunRecord(
            name=name,
            experiment=str(tracking["experiment"]),
            tracking_uri=tracking["uri"] or "",
            tags=tags | environment_tags(devices),
            params=self._params(),
            datasets=tuple(dict.fromkeys(used)),
        )

    def _params(self) -> dict[str, Any]:
        """All settings, flat; of the data that evaluations bring only which it is."""
        kept = {name: value for name, value in self.settings.items() if name not in _NOT_RECORDED}
        kept["eval"] = {
            name: node | {"data": {key: node["data"][key] for key in _OF_DATA}}
            if "data" in node
            else node
            for name, node in kept["eval"].items()
        }
        return flatten(kept)


def _dataset(images: ImageSet, use: str) -> DatasetRecord:
    return DatasetRecord(
        name=f"{images.name}-{images.split}",
        context=use,
        digest=images.digest(),
        source=os.path.dirname(images.source(0)) or "scikit-image, scikit-learn",
        n_images=len(images),
    )
