"""A command as it was started, and its record in the run folder and in the tracker."""

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
from relloc.data.shards import ShardImages
from relloc.data.unnamed import UNNAMED
from relloc.runs.data_of_run import CONFIG_FILE
from relloc.runs.engine import Engine
from relloc.runs.refusing import HYDRA_FILES
from relloc.runs.settings import EVALUATION_GROUPS, resolved
from relloc.sweeps.points import identity_of
from relloc.tracking import DatasetRecord, RunRecord, environment_tags, flatten

# Settings that say how a run was started, not what it computes
_NOT_RECORDED = ("launcher", "sweep", "objective")
# The settings that are recorded of a data set that an evaluation brings
_RECORDED_OF_DATA = ("name", "root", "shards", "source")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Invocation:
    """A command with all its settings, resolved, and the `words` that were typed.

    `choices` maps each group to the member that was chosen, `files` the names of files in the run
    folder to their texts. `names_folder` is true if the user named the run folder.
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
        """Returns the invocation of this process, whose composed config is given."""
        hydra_config = HydraConfig.get()
        settings = resolved(config)
        files = {CONFIG_FILE: OmegaConf.to_yaml(OmegaConf.create(settings))}
        # conf/ keeps Hydra from writing its files, since the folder may turn out to be another
        # run's. They are written later, as Hydra would have done.
        if hydra_config.output_subdir is None:
            parts: Any = (config, HydraConfig.instance().cfg, hydra_config.overrides.task)
            for name, part in zip(HYDRA_FILES, parts, strict=True):
                files[name] = OmegaConf.to_yaml(part)
        names_folder = any(
            word.startswith("hydra.run.dir=") for word in hydra_config.overrides.hydra
        )
        return cls(
            command=str(hydra_config.job.name),
            folder=Path(os.path.abspath(hydra_config.runtime.output_dir)),
            names_folder=names_folder,
            words=tuple(hydra_config.overrides.task),
            choices=dict(hydra_config.runtime.choices),
            settings=settings,
            files=files,
        )

    def record(self, name: str, data: Sequence[Splits], engine: Engine) -> RunRecord:
        """Returns the record of the run for a tracker, under the name `name`.

        `data` are the data sets that the run reads.
        """
        # The GPUs of a run are taken to be of one kind.
        devices = ["cpu"]
        if engine.device.type == "cuda":
            devices = [torch.cuda.get_device_name(engine.device)] * ranks.world_size()
        data_name = self.settings["data"]["name"]
        if data_name == UNNAMED:
            # As in rows and data sets of the record, the name of the folder
            unnamed = [splits.train.name for splits in data if splits.is_unnamed]
            data_name = next(iter(unnamed), data_name)
        tags = {
            "relloc.kind": self.command,
            "relloc.run_dir": str(self.folder),
            "relloc.data": data_name,
            "relloc.engine": str(engine),
            "relloc.config": identity_of(self.settings),
        }
        # Packing changes pixels, so that results are to say how it was done.
        packings = [
            splits.train.packing for splits in data if isinstance(splits.train, ShardImages)
        ]
        if packings:
            tags["relloc.packed"] = "; ".join(dict.fromkeys(packings))
        if self.choices.get("experiment"):
            tags["relloc.preset"] = str(self.choices["experiment"])
        if self.choices.get("ablation"):
            tags["relloc.preset"] = f"ablation/{self.choices['ablation']}"
        # The launcher of a sweep sets the first variable, a SLURM job the second: NAME=VALUE;...
        if os.environ.get("RELLOC_SWEEP"):
            tags["relloc.sweep"] = os.environ["RELLOC_SWEEP"]
        for tag in os.environ.get("RELLOC_TAGS", "").split(";"):
            if "=" in tag:
                tag_name, value = tag.split("=", 1)
                tags[tag_name] = value
        tracking = self.settings["tracking"]
        # MLflow records each split as an input of the run.
        datasets = []
        for splits in data:
            datasets.append(_dataset(splits.train, "train"))
            datasets.append(_dataset(splits.held_out, "eval"))
        return RunRecord(
            name=name,
            experiment=str(tracking["experiment"]),
            tracking_uri=tracking["uri"] or "",
            tags=tags | environment_tags(devices),
            params=self._params(),
            datasets=tuple(dict.fromkeys(datasets)),
        )

    def _params(self) -> dict[str, Any]:
        """Returns all settings by their full names, without those that say how a run is started.

        Of data sets that evaluations bring, only what identifies them is recorded.
        """
        recorded = {
            name: value for name, value in self.settings.items() if name not in _NOT_RECORDED
        }
        for group in EVALUATION_GROUPS:
            evaluations = {}
            for name, node in recorded[group].items():
                if "data" in node:
                    data = {key: node["data"][key] for key in _RECORDED_OF_DATA}
                    evaluations[name] = node | {"data": data}
                else:
                    evaluations[name] = node
            recorded[group] = evaluations
        return flatten(recorded)


def _dataset(images: ImageSet, use: str) -> DatasetRecord:
    return DatasetRecord(
        name=f"{images.name}-{images.split}",
        context=use,
        digest=images.digest(),
        source=os.path.dirname(images.source(0)) or "scikit-image, scikit-learn",
        n_images=len(images),
    )
