"""Settings that pretraining and evaluating share, as frozen dataclasses that check themselves."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from relloc import checks, ranks
from relloc.data.image_set import Splits
from relloc.data.views import Center
from relloc.errors import MissingData, UsageError
from relloc.evaluation.contract import BATCH_NORMS, EvalSettings, Evaluation, NamedEvaluation
from relloc.evaluation.strides import STRIDES
from relloc.features.source import EncodeConfig, encode
from relloc.runs import console
from relloc.runs.data_sets import DATA_PAGE, DataSet
from relloc.runs.engine import Engine, EngineSettings
from relloc.terminal import quantity

# Where images are decoded: by the processes that read them, or on the device that computes
DECODES = ("cpu", "device")
# What may become of an evaluation whose data set is not there
MISSING_DATA = ("error", "skip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenEvaluation:
    """An evaluation, the name of its results, and its data set, or None for that of the run.

    `group` is the config group that it was chosen from: "eval" or "study". `shared_view` has the
    names of the settings of the run's `view` that it takes its own from.
    """

    name: str
    group: str
    evaluation: Evaluation
    data: DataSet | None
    shared_view: frozenset[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings that pretraining and evaluating share.

    `view` crops and resizes whole images, of which `view_batch` are encoded at once. Results of
    other runs in the folder `reused_runs` are used again. `decode` says where images are decoded:
    by the processes that read them ("cpu"), or on the device that computes. `missing_data` says
    what becomes of an evaluation whose data set is not there: "error" ends the run, "skip" leaves
    the evaluation out. With `report` the run ends in the report of its results beside the
    published ones. `batch_norms` and `strides` say in which statistics and which strides a network
    is evaluated.
    """

    seed: int
    engine: EngineSettings
    data: DataSet
    evaluations: Sequence[ChosenEvaluation]
    view: Center
    view_batch: int
    decode: str
    batch_norms: Sequence[str]
    strides: Sequence[str]
    calibration_images: int
    bank_gib: float
    save_every_s: float
    reused_runs: Path | None
    missing_data: str
    report: bool

    def __post_init__(self) -> None:
        checks.whole("seed", self.seed, at_least=0)
        checks.one_of("missing_data", self.missing_data, MISSING_DATA)
        checks.whole("view.batch", self.view_batch)
        checks.one_of("decode", self.decode, DECODES)
        if self.decode == "device":
            for chosen in self.evaluations:
                chosen.evaluation.check_cut_views(f"{chosen.group}.{chosen.name}")
        checks.some_of("batch_norm", self.batch_norms, BATCH_NORMS)
        checks.some_of("strides", self.strides, STRIDES)
        checks.whole("calibration_images", self.calibration_images)
        checks.number("bank_gib", self.bank_gib, at_least=0, at_most=math.inf)
        checks.number("save_every_s", self.save_every_s, at_least=0, at_most=math.inf)
        missing = [one for one in self.evaluations if one.data and one.data.missing_setting]
        # Evaluations may be left out, but not all of them.
        is_error = self.missing_data == "error" or len(missing) == len(self.evaluations)
        if missing and is_error:
            lost = quantity(
                len(missing),
                "evaluation doesn't know where its data set lies",
                "evaluations don't know where their data set lies",
            )
            listed = "\n  ".join(_missing_data_sets(missing))
            raise UsageError(
                f"{lost}. Unpack each data set into a folder, and name the folder by its variable "
                f"or setting ({DATA_PAGE}):\n  {listed}"
            )

    @property
    def needs_own_data(self) -> bool:
        """Whether the run's own data set is read, which is not so if each evaluation brings one."""
        return any(one.data is None for one in self.evaluations)

    def used_view_settings(self, batch_norms: Sequence[str]) -> set[str]:
        """Returns which settings of `view`, such as "crop_px", the evaluations make use of.

        Many have a view of their own. `batch` is the number of images that are encoded at once
        where batch norm is recalibrated, and where features are kept; `batch_norms` says whether
        it is recalibrated.
        """
        used: set[str] = set()
        for chosen in self.evaluations:
            evaluation = chosen.evaluation
            used |= chosen.shared_view
            is_recalibrated = evaluation.kind != "fine-tuned" and "recalibrated" in batch_norms
            keeps_features = evaluation.keeps_features or evaluation.tests_in_shared_batches
            if is_recalibrated or keeps_features:
                used.add("batch")
        return used

    def check_paths(self, made_by_jobs: Sequence[str]) -> None:
        """Raises `UsageError` if a file or folder that is to be read does not exist.

        `made_by_jobs` is passed to `DataSet.check_folders`.
        """
        if self.needs_own_data:
            self.data.check_folders(made_by_jobs)
        for chosen in self.evaluations:
            # A data set that no setting names is an error before this, or left out.
            if chosen.data and not chosen.data.missing_setting:
                chosen.data.check_folders(made_by_jobs)

    def encode_config(self, engine: Engine, *, shown: bool = True) -> EncodeConfig:
        """Returns how whole images are read and encoded, with a progress bar if `shown`."""
        config = EncodeConfig(
            batch=self.view_batch,
            workers=engine.workers,
            device=engine.device,
            precision=engine.precision,
            unreadable_share=self.data.unreadable_share,
            decode=self.decode,
            encode=engine.compile(encode),
            fuses=engine.fuses,
            compile=engine.compile_training,
        )
        # Several processes would draw their bars over each other.
        if shown and ranks.rank() == 0:
            return dataclasses.replace(config, progress=console.counted)
        return config

    def eval_settings(self, engine: Engine) -> EvalSettings:
        """Returns the settings that all evaluations of the run share."""
        return EvalSettings(
            encode_config=self.encode_config(engine),
            batch_norms=self.batch_norms,
            calibration_images=self.calibration_images,
            bank_gib=self.bank_gib,
            seed=self.seed,
        )

    def named_evaluations(self, own: Splits | None) -> tuple[list[NamedEvaluation], dict[str, str]]:
        """Returns the evaluations with their images: the run's `own`, or those they bring.

        A data set that several evaluations bring is listed once. The dictionary has the reason for
        each evaluation that is left out because its data set is not there, by its name.

        Raises:
            MissingData: the data set of an evaluation is not there, and it is not to be left out;
                or none is there.
            DataError: images can't be listed.
        """
        # Data sets that were listed already, by a text that is equal for equal images
        listed = {self.data.images: own} if own else {}
        evaluations = []
        left_out: dict[str, str] = {}
        for chosen in self.evaluations:
            data = chosen.data or self.data
            if data.images not in listed:
                try:
                    listed[data.images] = data.read()
                except MissingData as error:
                    if self.missing_data == "error":
                        raise
                    left_out[chosen.name] = str(error)
                    continue
            named = NamedEvaluation(
                name=chosen.name,
                group=chosen.group,
                evaluation=chosen.evaluation,
                splits=listed[data.images],
                # None for the run's own data, whose share `encode_config` passes on
                unreadable_share=chosen.data.unreadable_share if chosen.data else None,
                how_to_give=chosen.data.how_to_give if chosen.data else "",
            )
            evaluations.append(named)
        if left_out and not evaluations:
            listed = "\n  ".join(dict.fromkeys(left_out.values()))
            raise MissingData(
                f"none of {quantity(len(left_out), 'evaluation')} has its data set "
                f"({DATA_PAGE} tells what to unpack where):\n  {listed}"
            )
        return evaluations, left_out


def _missing_data_sets(evaluations: Sequence[ChosenEvaluation]) -> Iterator[str]:
    """Yields a line for each data set that no setting says the place of.

    It has the variable and the setting that would say it, and what the folder is to hold.
    """
    names_of: dict[str, list[str]] = {}
    data_of: dict[str, DataSet] = {}
    for one in evaluations:
        if one.data:
            # Evaluations of equal images share a line.
            names_of.setdefault(one.data.images, []).append(one.name)
            data_of.setdefault(one.data.images, one.data)
    for images, data in data_of.items():
        names = ",".join(names_of[images])
        # As shells expand it, where there are several.
        listed = f"{{{names}}}" if "," in names else names
        line = f"{data.variable} or eval.{listed}.data.root=FOLDER"
        yield f"{line}: {data.holding}" if data.holding else line
