"""Names runs for MLflow.

MLflow's tables show about the first twenty characters, so the settings that a study varies most
(grid, length) come first.
"""

from collections.abc import Sequence
from pathlib import Path

from relloc.checkpoints.paths import BACKBONE_FILE
from relloc.evaluation.contract import EvaluatedModel
from relloc.patches.normalize import PerPatch
from relloc.pretext.answers import OffsetRegression
from relloc.pretext.questions import CENTER_PAIRS
from relloc.results import NO_FILES
from relloc.runs.command_settings import Pretraining
from relloc.tracking import RunRecord
from relloc.tracking.record import RUN_FILE

# Names of files that say nothing about the weights in them: their folder is named as well.
_GENERIC_FILE_NAMES = (
    "checkpoint",
    "checkpoint_best",
    "last",
    "latest",
    "model",
    "model_best",
    "best",
    "final",
    "backbone",
    "weights",
)

# Settings of a network, by their group, with the usual value
_NETWORK = (
    ("backbone", "last_stride", 2),
    ("backbone", "stem", "imagenet"),
    ("backbone", "width", 1),
    ("head", "embed_dim", None),
)


def pretraining_name(settings: Pretraining, color: str) -> str:
    """Returns the name of a pretraining run, such as `gap21 jit0..21 70ep in1k r50 s0 gray`.

    That is a gap of 21 px, a jitter from 0 to 21 px, 70 epochs on ImageNet-1k, a ResNet-50, seed 0
    and gray patches. `color` is the member of conf/color. What else is done to patches, and what is
    unusual about the network, follows.
    """
    grid = settings.patches.grid
    jitter = str(grid.jitter_px)
    if not isinstance(grid.jitter_px, int):
        jitter = "..".join(map(str, grid.jitter_px))
    words = (
        f"gap{grid.gap_px}",
        f"jit{jitter}",
        f"{settings.schedule.epochs:g}ep",
        settings.data.short_name,
        _short_model(settings.model.name),
        f"s{settings.seed}",
        color,
    )
    return " ".join([*words, *_more_of_patches(settings), *_more_of_network(settings)])


def _more_of_patches(settings: Pretraining) -> list[str]:
    """Returns words for what is asked of patches, or done to them, only by a setting."""
    grid = settings.patches.grid
    words = []
    if settings.questions.n_questions != CENTER_PAIRS.n_questions:
        kind = "pairs" if settings.questions.n_patches == 2 else "triplets"
        words.append(f"{settings.questions.n_questions}{kind}")
    if grid.yoked_jitter:
        words.append("yoked_jitter")
    if grid.scale is not None:
        words.append("scaled")
    if settings.flip:
        words.append("flip")
    for name in ("chroma_blur", "aperture", "rotation"):
        if getattr(settings.patches, name) is not None:
            words.append(name)
    if isinstance(settings.patches.normalize, PerPatch):
        words.append("patch_normalized")
    if settings.training_patches.curriculum is not None:
        words.append("curriculum")
    if isinstance(settings.questions, OffsetRegression):
        words.append("regression")
    return words


def _more_of_network(settings: Pretraining) -> list[str]:
    """Returns words for what sets a network apart from others of its name."""
    network = settings.model.settings
    words = []
    for group, name, usual in _NETWORK:
        value = network.get(group, {}).get(name, usual)
        if value != usual:
            words.append(f"{name}={value}")
    if settings.batch_norm == "joint" and settings.questions.have_center:
        words.append("joint_batch_norm")
    if settings.batch_norm == "cell":
        words.append("cell_batch_norm")
    return words


def evaluation_name(
    models: Sequence[EvaluatedModel], data: Sequence[str], studies: Sequence[str] = ()
) -> str:
    """Returns the name of an evaluation, such as `gap21 jit0..21 70ep in1k r50 s0 gray on voc2007`.

    A backbone of relloc is called as its pretraining run, "random" and "torchvision" by these names
    and the model, and other weights by their file and the model; where a person answers without a
    network, that is "person". The names of `studies` follow, as
    in `random r50 on photos: discovery`: several are made of the same weights and images.
    """
    # Dictionaries keep the order and drop repetitions.
    weights = dict.fromkeys(_weights_name(model) for model in models)
    data_sets = dict.fromkeys(data)
    name = f"{', '.join(weights)} on {', '.join(data_sets)}"
    return f"{name}: {', '.join(studies)}" if studies else name


def _weights_name(evaluated: EvaluatedModel) -> str:
    """Returns the name of a backbone's weights, with the model where that is not part of it."""
    model = _short_model(evaluated.model)
    if evaluated.checkpoint in NO_FILES:
        return f"{evaluated.checkpoint} {model}".strip()
    file = Path(evaluated.checkpoint)
    # A run's backbone lies in the run folder, its checkpoints one folder below.
    for folder in file.parents[:2]:
        if (folder / RUN_FILE).is_file():
            name = _run_name(folder)
            return name if file == folder / BACKBONE_FILE else f"{name} {file.stem}"
    name = file.stem
    if file.stem in _GENERIC_FILE_NAMES and file.parent.name:
        name = f"{file.parent.name}/{file.stem}"
    return f"{name} {model}"


def _run_name(folder: Path) -> str:
    """Returns the name that the run in a folder has in MLflow."""
    try:
        return RunRecord.read(folder).name
    except (OSError, ValueError):
        # The damaged record of another run is no reason not to evaluate its weights.
        return folder.name


def _short_model(name: str) -> str:
    """Returns a short name of a model: `r50` of `resnet50`."""
    return name.replace("resnet", "r")
