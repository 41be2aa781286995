"""Tells which pretraining evaluated weights come from, so that repeats with other seeds are known.

Nothing here imports pandas or torch.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from relloc import neutral
from relloc.checkpoints.paths import BACKBONE_FILE
from relloc.tracking.record import RUN_FILE, RunRecord

_HASH_DIGITS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A pretraining without its seed, or the name of a file where that is all that is known.

    Attributes:
        name: The name of the run without its seed, and the checkpoint unless it is the last.
        settings: A hash of the settings that decide its weights, without the seed, as two
            pretrainings may have the same name; "" if they are not known.
        images: The digests of the images that it was trained on, "" if they are not known.
    """

    name: str
    settings: str = ""
    images: str = ""


def pretraining_of(record: RunRecord, checkpoint: str) -> Pretraining:
    """Returns the pretraining that a checkpoint is of.

    Args:
        record: The record of the run that has the result.
        checkpoint: The evaluated file.
    """
    training = training_record(record, checkpoint)
    file = Path(checkpoint)
    if training is None:
        # The file of another project, or of a run that is gone
        return Pretraining(name=file.parent.name if file.name == BACKBONE_FILE else file.stem)
    pretraining = _without_seed(training)
    if is_training(record) or (file.parent / RUN_FILE).exists():
        return pretraining
    return dataclasses.replace(pretraining, name=f"{pretraining.name} {file.stem}")


def training_record(record: RunRecord, checkpoint: str) -> RunRecord | None:
    """Returns the record of the run that trained a checkpoint; None if no such run is found.

    Args:
        record: The record of the run that has a result of the checkpoint.
        checkpoint: The evaluated file.
    """
    if is_training(record):
        return record
    # A run's backbone lies in its folder, and its checkpoints one folder below
    for folder in Path(checkpoint).parents[:2]:
        if (folder / RUN_FILE).exists():
            return RunRecord.read(folder)
    return None


def is_training(record: RunRecord) -> bool:
    """Returns whether a run is a pretraining, which evaluates its own weights."""
    return record.tags.get("relloc.kind") == "train"


def _without_seed(record: RunRecord) -> Pretraining:
    """Returns a pretraining given its record."""
    settings = neutral.settings_of_weights(record.params)
    # Names of runs have the seed as a word, such as s0
    seed_word = f"s{settings.pop('seed', 0)}"
    words = [word for word in record.name.split(" ") if word != seed_word]
    text = json.dumps(settings, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    images = {dataset.digest for dataset in record.datasets if dataset.context == "train"}
    return Pretraining(
        name=" ".join(words),
        settings=digest[:_HASH_DIGITS],
        images=" ".join(sorted(images)),
    )
