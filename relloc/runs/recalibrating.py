"""Weights whose batch norm fits whole images, for use elsewhere.

Pretraining sees patches, and its batch norm has their statistics. They spoil what a network answers
about whole images until a training has replaced them, and tasks on frozen features never do.
`save_recalibrated=true` writes a second file of weights at the end of a pretraining, and
`relloc.export --recalibrate` writes such weights for other libraries.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from relloc.checkpoints.backbone_files import digest, load_backbone
from relloc.data.image_set import ImageSet
from relloc.errors import CheckpointError, DataError, UsageError
from relloc.evaluation.calibration import CALIBRATION_VERSION, calibration_batches
from relloc.evaluation.strides import in_strides
from relloc.features.batch_norm import has_batch_norm, recalibrate
from relloc.models.backbone import Backbone
from relloc.runs import build, explaining
from relloc.runs.command_line import as_value
from relloc.runs.engine import Engine
from relloc.runs.run_settings import RunSettings
from relloc.runs.settings import compose, members

# The entry of a file's description that says how its batch norm was recalibrated
ENTRY = "recalibrated"
# The settings of relloc.evaluate that decide which images are seen, and how they are computed
_OF_CALIBRATION = ("data", "view", "calibration_images", "seed", "device", "workers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recalibration:
    """How to recalibrate the batch norm of a backbone on images, without their labels.

    It is what evaluations with `batch_norm=recalibrated` do on the images that they train on. The
    strides are the standard ones, with which others load the weights.
    """

    backbone: Backbone
    images: ImageSet
    settings: RunSettings

    @property
    def about(self) -> dict[str, Any]:
        """Everything that decides the statistics, as values that JSON can hold."""
        return {
            "weights": digest(self.backbone.state_dict()),
            "dataset": self.images.name,
            "split": self.images.split,
            "digest": self.images.digest(),
            "view": str(self.settings.view),
            "calibration_images": self.settings.calibration_images,
            "batch": self.settings.view_batch,
            "seed": self.settings.seed,
            "decode": self.settings.decode,
            "version": CALIBRATION_VERSION,
            "strides": "standard",
        }

    def run(self, engine: Engine) -> tuple[Backbone, dict[str, Any]]:
        """Returns the recalibrated backbone, on the CPU, and what to write about it.

        That is `about`, and the number of `images` that could be read.

        Raises:
            UsageError: the network has no batch norm, or a batch is too small.
            DataError: no image, or not enough of them, can be read.
        """
        recalibrated = copy.deepcopy(in_strides(self.backbone, "standard")).cpu()
        if not has_batch_norm(recalibrated):
            raise UsageError("the network has no batch norm: there is nothing to recalibrate")
        placed = copy.deepcopy(recalibrated)
        engine.place(placed)
        batches = calibration_batches(
            self.images,
            self.settings.view,
            n_images=self.settings.calibration_images,
            seed=self.settings.seed,
            config=self.settings.encode_config(engine),
        )
        n_images = recalibrate(placed, batches)
        if not n_images:
            raise DataError(
                f"none of the images of {self.images.name} {self.images.split} that batch norm "
                "was to be recalibrated on can be read: repair them, or give others"
            )
        # Files hold tensors in the common order of memory, whatever that of the engine is.
        recalibrated.load_state_dict(placed.state_dict())
        return recalibrated, {**self.about, "images": n_images}

    def is_in(self, file: Path) -> bool:
        """Returns whether a file has the weights of this recalibration, from an earlier start."""
        if not file.exists():
            return False
        try:
            _, about = load_backbone(file)
        except CheckpointError:
            return False
        saved = about.get(ENTRY)
        if not isinstance(saved, Mapping):
            return False
        return {**saved, "images": None} == {**self.about, "images": None}


def settings_of_words(words: Sequence[str]) -> RunSettings:
    """Returns the settings of a recalibration from the words of a command line.

    Args:
        words: first a data set of conf/data or a folder of images, then settings of
            relloc.evaluate, such as "data.shards=SHARDS" or "calibration_images=1000".

    Raises:
        UsageError: the images are not there, or a setting is wrong or of something else.
    """
    images, *more = words
    for word in more:
        name, equals, _ = word.partition("=")
        if not equals or name.lstrip("+").partition(".")[0] not in _OF_CALIBRATION:
            raise UsageError(
                f"--recalibrate {word}: behind the images it takes settings of relloc.evaluate "
                f"that choose and show them ({', '.join(_OF_CALIBRATION)}), such as "
                "calibration_images=1000"
            )
    chosen = [f"data={images}"]
    if images not in members("data"):
        chosen = ["data=folder", f"data.root={as_value(images)}"]
    try:
        composed = compose("evaluate", [*chosen, *more, "checkpoint=random", "tracking=none"])
        settings = build.evaluating(composed.config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"--recalibrate: {explaining.explain(error, 'evaluate')}") from error
    settings.data.check_folders([])
    return settings
