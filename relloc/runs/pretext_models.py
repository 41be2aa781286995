"""Loads the network of the pretext task from a run folder, for studies that ask it questions.

A file of weights holds the backbone alone. The head that answers is in the training's checkpoints,
and how patches are made stands in the run's config.yaml.

A run folder may come from somebody else. Hence only classes that a member of conf/ names are built,
with plain values.
"""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relloc import neutral
from relloc.checkpoints import backbone_files, states
from relloc.checkpoints.paths import TRAINING_FOLDER, saved_trainings
from relloc.errors import CheckpointError
from relloc.evaluation.contract import PretextModel
from relloc.models.backbone import Backbone
from relloc.patches.pipeline import PatchPipeline
from relloc.pretext.answers import with_answers
from relloc.pretext.questions import CENTER_PAIRS, head_sizes
from relloc.pretext.relative_location import RelativeLocation, about_center
from relloc.runs import settings
from relloc.runs.data_of_run import CONFIG_FILE, load_config
from relloc.runs.instantiation import call
from relloc.tracking import flatten

# What makes patches: groups of conf/, and fields of `PatchPipeline`. Some may not be chosen.
_PATCHES = tuple(field.name for field in dataclasses.fields(PatchPipeline))
_OPTIONAL = ("chroma_blur", "aperture", "rotation")


def pretext_model(checkpoint: Path, backbone: Backbone) -> PretextModel | None:
    """Returns the network of the pretext task that `checkpoint` belongs to.

    None where there is none: the file is not of a run folder of relloc, or the training's
    checkpoints were deleted. `backbone` has the weights of `checkpoint`; it stays as it is.

    Raises:
        CheckpointError: the training's checkpoint is damaged, has other weights than `checkpoint`,
            or does not fit its own description.
        UsageError: the run's config.yaml can't be read.
    """
    training = _training_of(checkpoint)
    if training is None:
        return None
    run_dir = training.parent.parent
    config = load_config(run_dir / CONFIG_FILE)
    state = states.load_training(training)
    weights, about = state.get("model"), state.get("about")
    if not isinstance(weights, dict) or not isinstance(about, dict):
        raise CheckpointError(f"{training} holds no network of the pretext task")
    _check_same_training(config, about, training)

    parts = {}
    for name in _PATCHES:
        node = config.get(name)
        # A part that was taken out of a preset may have left settings, without a `_target_`.
        if name not in _OPTIONAL or (isinstance(node, dict) and "_target_" in node):
            parts[name] = call(name, _checked(name, node, run_dir))
    patches = PatchPipeline(**parts)
    head_node = _checked("model.head", about["model"].get("head"), training)
    # Runs of earlier versions have no such settings: they ask about the center.
    pairs = CENTER_PAIRS
    if config.get("pairs"):
        pairs_node = _checked("pairs", config["pairs"], run_dir)
        pairs = call("pairs", pairs_node, rows=patches.grid.rows)
    questions = with_answers(pairs, patches, config.get("pretext_answers", "classes"))
    network = RelativeLocation(
        copy.deepcopy(backbone),
        call(
            "model.head",
            head_node,
            embedding_dim=backbone.embedding_dim,
            **head_sizes(questions),
        ),
        questions=questions,
        batch_norm=config["pretext_batch_norm"],
        images_per_batch_norm=config["recipe"]["images_per_batch_norm"],
    )
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{training} does not fit the network of its run: {error}") from error
    same = backbone_files.digest(network.backbone.state_dict())
    if same != backbone_files.digest(backbone.state_dict()):
        raise CheckpointError(
            f"{training} has other weights than {checkpoint}: give the checkpoint itself, "
            f"checkpoint={training}"
        )
    curriculum = config.get("curriculum")
    has_curriculum = isinstance(curriculum, dict) and "_target_" in curriculum
    return make_pretext_model(network, patches, has_curriculum=has_curriculum)


def make_pretext_model(
    network: RelativeLocation, patches: PatchPipeline, *, has_curriculum: bool
) -> PretextModel | None:
    """Returns a network as studies take it, in eval mode, with its digest.

    Studies ask about pairs with the center of a 3x3 grid, whatever the network was trained on. None
    where it can't answer these. `patches` are those of the end of a training with a curriculum.
    """
    center = about_center(network)
    if center is None:
        return None
    center.eval()
    patches = patches.about_center
    weights = backbone_files.digest(network.state_dict())
    return PretextModel(
        network=center,
        patches=patches,
        digest=f"{weights} {patches!r}",
        changed=has_curriculum,
    )


def _training_of(checkpoint: Path) -> Path | None:
    """Returns the training checkpoint that belongs to a run folder or file, if there is one."""
    file = backbone_files.backbone_file(checkpoint)
    if file.parent.name == TRAINING_FOLDER and backbone_files.is_ours(file):
        return file
    # The newest is of the same step as backbone.safetensors, which is written after it.
    saved = saved_trainings(file.parent)
    is_finished = file.name == backbone_files.BACKBONE_FILE
    return saved[-1] if saved and is_finished else None


def _check_same_training(
    config: Mapping[str, Any], about: Mapping[str, Any], training: Path
) -> None:
    """Raises `CheckpointError` if config.yaml has other patches than the checkpoint was made of."""
    computed = about.get("computed")
    if not isinstance(computed, Mapping) or not isinstance(about.get("model"), Mapping):
        raise CheckpointError(f"{training} does not say how it was trained")
    names = (*_PATCHES, "pairs", "pretext_answers", "pretext_batch_norm")
    settings_now = flatten({name: config.get(name) for name in names})
    # Without those that `computed` leaves out
    now = neutral.settings_of_weights(settings_now)
    differing = [name for name, value in now.items() if computed.get(name) != value]
    if differing:
        raise CheckpointError(
            f"{CONFIG_FILE} beside {training} is of another training: {', '.join(differing)} "
            "differ. Put back the files of one run"
        )


def _checked(setting: str, node: object, origin: Path) -> dict[str, Any]:
    """Returns a node whose targets are all named by a member of conf/.

    Raises:
        CheckpointError: the node is none, or names something else to call.
    """
    group, _, _ = setting.partition(".")
    known = set()
    for member in settings.members(group):
        known |= _targets(settings.content_of(f"{group}/{member}"))
    # A normalization or treatment without a class of its own is a mistake as well.
    if not isinstance(node, dict) or not _targets(node) or not _targets(node) <= known:
        raise CheckpointError(
            f"{origin} does not name one of relloc's own classes for {setting}, and nothing else "
            f"is built from a run folder. Members of conf/{group} name "
            f"{', '.join(sorted(known))}"
        )
    return node


def _targets(node: object) -> set[str]:
    """Returns what a node and the nodes in it want to be called, including Hydra's other keys."""
    targets = set()
    if isinstance(node, Mapping):
        for name, value in node.items():
            # Beside _target_ Hydra knows other keys that begin with an underscore.
            if str(name).startswith("_"):
                targets.add(str(value))
            targets |= _targets(value)
    elif isinstance(node, list):
        for value in node:
            targets |= _targets(value)
    return targets
