"""The names of runs in MLflow, whose tables show about twenty characters: what is studied comes first."""

from collections.abc import Sequence
from pathlib import Path

from relloc.evaluation.contract import EvaluatedModel
from relloc.results import NOT_OURS
from relloc.runs.build import Pretraining
from relloc.tracking import RunRecord
from relloc.tracking.record import RUN_FILE

# Names of files that say nothing of the weights in them, so that the folder's is told as well.
_OF_ANY = (
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


def pretraining_name(settings: Pretraining, color: str) -> str:
    """A pretraining by its grid, length, data and the rest, `gap21 jit0..21 70ep in1k r50 s0 gray`.

    `color` is the member of that group that was chosen.
    """
    grid = settings.patches.grid
    jitter = grid.jitter_px
    moved = jitter if isinstance(jitter, int) else "..".join(map(str, jitter))
    length = f"{settings.schedule.epochs:g}ep"
    what = (
        f"{settings.data.short_name} {_short_model(settings.model.name)} s{settings.seed} {color}"
    )
    return f"gap{grid.gap_px} jit{moved} {length} {what}"


def evaluation_name(models: Sequence[EvaluatedModel], data: Sequence[str]) -> str:
    """An evaluation by whose weights it asks, on which data sets: `gap21 jit0..21 70ep in1k r50 s0 gray on voc2007`.

    A backbone of ours is called as its pretraining; others by the file's name, or as `checkpoint=` does, and the model.
    """
    who = dict.fromkeys(_weights_name(one) for one in models)
    return f"{', '.join(who)} on {', '.join(dict.fromkeys(data))}"


def _weights_name(subject: EvaluatedModel) -> str:
    model = _short_model(subject.model)
    if subject.checkpoint in NOT_OURS:
        return f"{subject.checkpoint} {model}"
    file = Path(subject.checkpoint)
    for folder in file.parents[:2]:  # a run's backbone, or one of its checkpoints
        if (folder / RUN_FILE).is_file():
            return _run_name(folder) + ("" if folder == file.parent else f" {file.stem}")
    told = (
        f"{file.parent.name}/{file.stem}"
        if file.stem in _OF_ANY and file.parent.name
        else file.stem
    )
    return f"{told} {model}"


def _run_name(folder: Path) -> str:
    try:
        return RunRecord.read(folder).name
    except (
        OSError,
        ValueError,
    ):  # a damaged record of another run is no reason not to evaluate its weights
        return folder.name


def _short_model(name: str) -> str:
    return name.replace("resnet", "r")
