import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contexts import context
from PIL import Image

from relloc.data import device_decoding
from relloc.data.folder import FolderImages
from relloc.data.image_set import Splits
from relloc.data.views import Center, RandomResized, View
from relloc.errors import DataError, UsageError
from relloc.evals.knn import Knn
from relloc.evals.linear import LinearFast
from relloc.evaluation.contract import (
    Context,
    EvalSettings,
    EvaluatedModel,
    Evaluation,
    EvaluationState,
    NamedEvaluation,
    NullState,
    PretextModel,
    log_nothing,
)
from relloc.evaluation.run import EvalPart, evaluate, fingerprint, group_parts, split_evaluation
from relloc.features.bank import fill_bank
from relloc.features.batch_norm import recalibrate
from relloc.features.source import EncodeConfig, LiveFeatures
from relloc.geometry import PatchGrid, ShortSide
from relloc.models.small import SmallBackbone
from relloc.patches.color import Keep
from relloc.patches.normalize import ByDataset
from relloc.patches.pipeline import PatchPipeline
from relloc.results import Result, Score, decoder_name

CPU = torch.device("cpu")
PX = 96  # the last map of the small network is 2x2
CLASSES = ("blue", "green", "red")
LAYERS = ("feature1", "feature5")
VIEW = Center(short_px=PX, crop_px=PX)


def write_split(folder: Path, split: str, n: int, broken: tuple[int, ...] = ()) -> FolderImages:
    """Noise around the color of the class, so that most images show which class is theirs."""
    rng = np.random.default_rng(len(split))
    paths = []
    for index in range(n):
        pixels = rng.normal(100, 40, size=(PX, PX, 3)) + rng.normal(0, 8, size=3)
        pixels[..., 2 - index % 3] += 12
        paths.append(str(folder / f"{split}{index}.png"))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1])
        if index in broken:
            Path(paths[-1]).write_bytes(b"no image")
    labels = [index % 3 for index in range(n)]
    return FolderImages(name="colors", split=split, paths=paths, labels=labels, classes=CLASSES)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    folder = tmp_path_factory.mktemp("colors")
    return Splits(train=write_split(folder, "train", 30), held_out=write_split(folder, "val", 18))


@pytest.fixture
def model() -> EvaluatedModel:
    torch.manual_seed(0)
    backbone = SmallBackbone(widths=(8, 8, 8, 10, 8)).eval()
    return EvaluatedModel(
        backbone=backbone, checkpoint="/runs/one/backbone.safetensors", model="small", weights="one"
    )


EVALUATIONS: dict[str, Evaluation] = {
    "linear": LinearFast(
        layers=LAYERS,
        view=VIEW,
        epochs=5,
        milestone_epochs=(3,),
        gamma=0.1,
        learning_rates=(0.01, 0.1),
        momentum=0.9,
        weight_decay=1e-4,
        batch=8,
    ),
    "knn": Knn(k=(1, 5), temperature=0.07, layers=("avgpool",), view=VIEW, batch=8, bank_gib=1),
}


def settings(**changes: object) -> EvalSettings:
    encode_config = {"batch": 8, "workers": 0, "device": CPU, "precision": "fp32"}
    encode_config |= {"unreadable_share": 0.5} | {
        name: changes.pop(name)
        for name in ("batch", "progress", "precision", "note_unreadable", "decode", "device")
        if name in changes
    }
    settings = {"batch_norms": ["as_trained"], "calibration_images": 20, "bank_gib": 1.0, "seed": 3}
    return EvalSettings(encode_config=EncodeConfig(**encode_config), **{**settings, **changes})  # type: ignore[arg-type]


def rows_of(
    model: EvaluatedModel,
    splits: Splits,
    given: EvalSettings,
    evaluations: Mapping[str, Evaluation] = EVALUATIONS,
    is_wanted: Callable[[EvalPart], bool] = lambda _part: True,
    open_state: Callable[[str], EvaluationState] = lambda _fingerprint: NullState(),
    run_dir: Path = Path("nowhere"),
) -> list[Result]:
    named = [
        NamedEvaluation(name=name, evaluation=one, splits=splits)
        for name, one in evaluations.items()
    ]
    for one in named:
        one.check_images()
    parts = [
        part
        for way in given.batch_norms
        for one in named
        for part in split_evaluation(one, way, model, given)
    ]
    wanted = [part for part in parts if is_wanted(part)]
    return [
        row
        for group in group_parts(wanted)
        for _, rows in evaluate(
            model,
            group,
            given,
            run_dir=run_dir,
            open_state=open_state,
            log_of=lambda _part: log_nothing,
        )
        for row in rows
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peek(Evaluation):
    """An evaluation that looks at what it is given, and has a row a layer to show for it."""

    kind = "frozen"
    labels = "class"
    version = 1
    independent_layers = True

    look: Callable[[Context], None]
    layers: Sequence[str] = LAYERS
    view: View = VIEW

    def run(self, context: Context) -> Iterator[Score]:
        self.look(context)
        for layer in self.layers:
            yield Score(layer=layer, metric="top1", value=1.0, n=1, protocol="a look")


def names(rows: Iterable[Result]) -> list[tuple[str, str, str, str]]:
    return [(row.eval, row.layer, row.metric, row.batch_norm) for row in rows]


def test_rows_carry_all_names(model: EvaluatedModel, splits: Splits) -> None:
    rows = rows_of(model, splits, settings())
    assert names(rows) == [
        ("linear", "feature1", "top1", "as_trained"),
        ("linear", "feature5", "top1", "as_trained"),
        ("knn", "avgpool", "top1_k1", "as_trained"),
        ("knn", "avgpool", "top1_k5", "as_trained"),
    ]
    for row in rows:
        assert (row.dataset, row.split, row.n, row.seed) == ("colors", "val", 18, 3)
        assert (row.checkpoint, row.model) == ("/runs/one/backbone.safetensors", "small")
        assert row.protocol == ("3.3" if row.eval == "linear" else "3.7")
        assert (row.kind, row.view, row.precision) == ("frozen", "center view 96/96 px", "float32")
    assert 100 / 3 < max(row.value for row in rows) <= 100


class AsksNetwork(Peek):
    """Asks a network of the pretext task about noise, under the batch norm of its training."""

    wants_pretext = True
    independent_layers = False

    def run(self, context: Context) -> Iterator[Score]:
        self.look(context)
        yield Score(metric="features", value=1.0, n=1)
        if context.asks_pretext:
            yield Score(
                metric="noise",
                value=1.0,
                n=1,
                dataset="noise",
                split="generated",
                view="grids",
                batch_norm="as_trained",
            )


def test_a_network_with_a_batch_norm_of_its_own_is_asked_once_and_its_rows_say_so(
    model: EvaluatedModel, splits: Splits
) -> None:
    evaluation = AsksNetwork(look=lambda _context: None)
    both = settings(batch_norms=["recalibrated", "as_trained"])
    rows = rows_of(model, splits, both, {"asks": evaluation})
    assert sorted(names(rows)) == [
        ("asks", "", "features", "as_trained"),
        ("asks", "", "features", "recalibrated"),
        ("asks", "", "noise", "as_trained"),
    ]
    [of_noise] = [row for row in rows if row.metric == "noise"]
    assert (of_noise.dataset, of_noise.split, of_noise.view) == ("noise", "generated", "grids")
    # Nothing about the batch norm that the features were recalibrated with
    assert of_noise.details == ()
    [recalibrated] = [row for row in rows if row.batch_norm == "recalibrated"]
    assert recalibrated.details
    assert recalibrated.dataset == "colors"


class AsksPerson(Peek):
    """Has a number of a person and one of the network that was asked the same."""

    independent_layers = False

    def run(self, context: Context) -> Iterator[Score]:
        self.look(context)
        yield Score(metric="accuracy", value=1.0, n=1, of_person=True)
        yield Score(metric="network_accuracy", value=1.0, n=1)


def test_what_a_person_answered_is_no_number_of_the_network(
    model: EvaluatedModel, splits: Splits
) -> None:
    evaluation = AsksPerson(look=lambda _context: None, layers=())
    told = dataclasses.replace(model, strides="as_trained", details=("of the file",))
    rows = rows_of(told, splits, settings(), {"human": evaluation})
    who = {row.metric: (row.checkpoint, row.model, row.strides, row.details) for row in rows}
    assert who == {
        "accuracy": ("person", "", "", ()),
        "network_accuracy": (told.checkpoint, told.model, "as_trained", ("of the file",)),
    }
    assert len({row.fingerprint for row in rows}) == 1


def test_results_that_lack_answers_of_the_network_are_not_taken_for_those_that_have_them(
    model: EvaluatedModel, splits: Splits
) -> None:
    evaluation = AsksNetwork(look=lambda _context: None)
    patches = PatchPipeline(
        grid=PatchGrid(patch_px=8, gap_px=0, jitter_px=0, resize=ShortSide(px=32)),
        color=Keep(),
        normalize=ByDataset(),
    )
    pretext = PretextModel(network=torch.nn.Identity(), patches=patches, digest="one")
    trained = dataclasses.replace(model, pretext=pretext)

    def fingerprint_under(*batch_norms: str) -> str:
        given = settings(batch_norms=batch_norms)
        return fingerprint(evaluation, trained, splits, given, "recalibrated")

    asked = fingerprint_under("recalibrated")
    assert asked == fingerprint_under("recalibrated", "as_trained")
    assert asked != fingerprint_under("as_trained", "recalibrated")


def test_the_numbers_are_those_of_the_evaluation_on_the_features(
    model: EvaluatedModel, splits: Splits
) -> None:
    ours = settings()
    train, held_out = (
        fill_bank(
            LiveFeatures(model.backbone, images, ours.encode_config, VIEW),
            (*LAYERS, "avgpool"),
            8,
            CPU,
        )
        for images in (splits.train, splits.held_out)
    )
    expected = [
        score.value
        for evaluation in EVALUATIONS.values()
        for score in evaluation.run(context(train, held_out, seed=ours.seed))
    ]
    assert [row.value for row in rows_of(model, splits, ours)] == expected


def test_recalibrated_rows_say_so_and_the_subject_stays_as_it_was(
    model: EvaluatedModel, splits: Splits
) -> None:
    before = copy.deepcopy(model.backbone.state_dict())
    rows = rows_of(model, splits, settings(batch_norms=["as_trained", "recalibrated"]))
    assert [row.batch_norm for row in rows] == ["as_trained"] * 4 + ["recalibrated"] * 4
    # 20 images hold two batches of 8
    reported = "batch-norm statistics re-estimated on 16 training images without labels"
    assert all(row.details[-1] == reported for row in rows[4:])
    assert not any("batch-norm statistics" in " ".join(row.details) for row in rows[:4])
    assert all(
        torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items()
    )
    assert not model.backbone.training


def test_recalibrated_numbers_come_from_recalibrated_features(
    model: EvaluatedModel, splits: Splits
) -> None:
    for norm in model.backbone.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean += 50  # statistics as trained that put every activation to sleep
    rows = rows_of(
        model, splits, settings(batch_norms=["as_trained", "recalibrated"], calibration_images=1000)
    )
    asleep, awake = rows[:4], rows[4:]
    assert [row.value for row in asleep] == pytest.approx(
        [100 / 3] * 4
    )  # every image looks the same
    assert max(row.value for row in awake) > 50
    assert (
        awake[0].details[-1].endswith("re-estimated on 24 training images without labels")
    )  # of 30, three batches
    assert [row.metric for row in awake] == [row.metric for row in asleep]


def test_few_images_recalibrate_in_one_batch(model: EvaluatedModel, splits: Splits) -> None:
    rows = rows_of(model, splits, settings(batch_norms=["recalibrated"], batch=100))
    assert rows[0].details[-1].endswith("re-estimated on 30 training images without labels")


def test_what_is_done_is_left_out_and_nothing_is_read_for_it(
    model: EvaluatedModel, splits: Splits
) -> None:
    read: list[str] = []

    def progress(batches: Iterable, what: str, _total: int) -> Iterable:
        read.append(what)
        return batches

    both = settings(batch_norms=["as_trained", "recalibrated"], progress=progress)
    done = {("linear", "as_trained"), ("knn", "as_trained"), ("knn", "recalibrated")}
    rows = rows_of(
        model, splits, both, is_wanted=lambda part: (part.named.name, part.batch_norm) not in done
    )
    assert names(rows) == [(("linear"), layer, "top1", "recalibrated") for layer in LAYERS]
    assert len(read) == 2  # training and held-out images, once each
    read.clear()
    assert rows_of(model, splits, both, is_wanted=lambda _part: False) == []
    assert read == []


def test_rows_there_already_are_recognized_and_those_of_other_terms_are_not(
    model: EvaluatedModel, splits: Splits
) -> None:
    there = rows_of(model, splits, settings())
    fingerprints = {row.fingerprint for row in there}
    assert len(fingerprints) == 2

    def again(
        splits: Splits, given: EvalSettings, evaluations: Mapping[str, Evaluation] = EVALUATIONS
    ) -> set[str]:
        found = rows_of(
            model,
            splits,
            given,
            evaluations,
            is_wanted=lambda part: part.fingerprint not in fingerprints,
        )
        return {row.eval for row in found}

    fewer = Splits(
        train=dataclasses.replace(splits.train, paths=splits.train.paths[:-1]),
        held_out=splits.held_out,
    )
    longer = {**EVALUATIONS, "linear": dataclasses.replace(EVALUATIONS["linear"], epochs=6)}
    assert again(splits, settings()) == set()
    assert again(splits, settings(bank_gib=2.0)) == set()  # a matter of memory alone
    assert again(splits, settings(seed=4)) == {"linear", "knn"}
    assert again(fewer, settings()) == {"linear", "knn"}
    assert again(splits, settings(), longer) == {"linear"}


def test_features_of_all_evaluations_are_computed_once(
    model: EvaluatedModel, splits: Splits
) -> None:
    read: list[str] = []

    def progress(batches: Iterable, what: str, _total: int) -> Iterable:
        read.append(what)
        return batches

    rows_of(model, splits, settings(progress=progress))
    assert read == ["features of colors train", "features of colors val"]


def test_without_room_for_features_linear_gives_the_same_rows(
    model: EvaluatedModel, splits: Splits
) -> None:
    linear = {"linear": EVALUATIONS["linear"]}
    kept, live = (rows_of(model, splits, settings(bank_gib=gib), linear) for gib in (1.0, 0.0))
    assert live == kept
    assert len(live) == 2


def test_features_that_memory_has_no_room_for_are_computed_again_and_that_is_told(
    model: EvaluatedModel, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = {"linear": EVALUATIONS["linear"]}
    kept = rows_of(model, splits, settings(), linear)
    monkeypatch.setattr("relloc.evaluation.run.free_gib", lambda device: 1e-6)
    with pytest.warns(UserWarning, match=r"GiB.* 1e-06 GiB .*computed again"):
        live = rows_of(model, splits, settings(), linear)
    assert live == kept


def test_rows_do_not_depend_on_which_other_evaluations_run(
    model: EvaluatedModel, splits: Splits
) -> None:
    together = rows_of(model, splits, settings())
    alone = [rows_of(model, splits, settings(), {name: run}) for name, run in EVALUATIONS.items()]
    assert alone[0] + alone[1] == together
    backwards = rows_of(model, splits, settings(), dict(reversed(EVALUATIONS.items())))
    assert backwards == alone[1] + alone[0]


def test_unlabeled_data_is_an_error_that_says_how_to_evaluate(
    model: EvaluatedModel, splits: Splits
) -> None:
    unlabeled = FolderImages(name="mine", split="train", paths=splits.train.source(0).split())
    for broken in (
        Splits(train=unlabeled, held_out=splits.held_out),
        Splits(train=splits.train, held_out=unlabeled),
    ):
        with pytest.raises(UsageError, match=r"no labels.* relloc\.evaluate checkpoint="):
            rows_of(model, broken, settings())


def test_an_unknown_batch_norm_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"batch_norm .*fresh.* as_trained, recalibrated"):
        settings(batch_norms=["as_trained", "fresh"])


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("bank_gib", [1.0, 0.0])
def test_images_that_can_not_be_read_are_told_and_the_rest_is_evaluated(
    model: EvaluatedModel, tmp_path: Path, batch: int, bank_gib: float
) -> None:
    splits = Splits(
        train=write_split(tmp_path, "train", 16, broken=(3, 4, 5)),
        held_out=write_split(tmp_path, "val", 9, broken=(7,)),
    )
    reported: dict[str, str] = {}
    both = settings(
        batch_norms=["as_trained", "recalibrated"],
        batch=batch,
        bank_gib=bank_gib,
        note_unreadable=reported.update,
    )
    rows = rows_of(model, splits, both, {"linear": EVALUATIONS["linear"]})
    assert len(rows) == 4
    assert {row.n for row in rows} == {8}
    assert {Path(name).name for name in reported} == {
        "train3.png",
        "train4.png",
        "train5.png",
        "val7.png",
    }


@pytest.mark.parametrize(("share", "setting"), [(0.2, "eval.linear.data"), (None, "data")])
@pytest.mark.parametrize("batch_norm", ["as_trained", "recalibrated"])
def test_too_many_unreadable_images_are_told_with_the_setting_that_counts(
    model: EvaluatedModel, tmp_path: Path, batch_norm: str, share: float | None, setting: str
) -> None:
    train, val = (
        write_split(tmp_path, "train", 16, broken=tuple(range(9))),
        write_split(tmp_path, "val", 9),
    )
    splits = Splits(train=train, held_out=val)
    named = NamedEvaluation(
        name="linear", evaluation=EVALUATIONS["linear"], splits=splits, unreadable_share=share
    )
    given = settings(batch_norms=[batch_norm], calibration_images=16)
    parts = split_evaluation(named, batch_norm, model, given)
    rows = evaluate(
        model,
        parts,
        given,
        run_dir=Path("nowhere"),
        open_state=lambda _fingerprint: NullState(),
        log_of=lambda _part: log_nothing,
    )
    with pytest.raises(
        DataError, match=rf"more than {setting}\.unreadable_share={share or 0.5} allows"
    ):
        list(rows)


def test_calibration_sees_the_views_of_training_images_as_the_evaluation_does(
    model: EvaluatedModel, splits: Splits
) -> None:
    """All training images in one batch: statistics do not depend on the order they are drawn in."""
    seen: dict[str, torch.Tensor] = {}

    def peek(given: Context) -> None:
        for features, _ in given.train.batches(torch.arange(given.train.n), given.train.n, LAYERS):
            seen.update(features)

    rows_of(
        model, splits, settings(batch_norms=["recalibrated"], batch=30), {"peek": Peek(look=peek)}
    )
    twin = copy.deepcopy(model.backbone)
    encode_config = settings(batch=30).encode_config
    loaded = encode_config.views(splits.train, VIEW, [(index, 0) for index in range(30)], 30)
    views = [encode_config.to_device(batch.pixels) for batch in loaded]
    recalibrate(twin, views)
    features, _ = next(
        LiveFeatures(twin, splits.train, encode_config, VIEW).batches(torch.arange(30), 30, LAYERS)
    )
    for layer in LAYERS:
        torch.testing.assert_close(seen[layer], features[layer], rtol=1e-3, atol=1e-4)


def test_a_fingerprint_changes_with_all_that_decides_the_numbers_and_with_nothing_else(
    model: EvaluatedModel, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation, other = EVALUATIONS.values()
    usual = fingerprint(evaluation, model, splits, settings(), "as_trained")
    assert usual == fingerprint(evaluation, model, splits, settings(bank_gib=0), "as_trained")
    swapped = Splits(train=splits.held_out, held_out=splits.train)
    renamed = Splits(
        train=splits.train, held_out=dataclasses.replace(splits.held_out, name="others")
    )
    newer_kind = type(
        type(evaluation).__name__, (type(evaluation),), {"version": evaluation.version + 1}
    )
    newer = newer_kind(**vars(evaluation))
    different = [
        fingerprint(other, model, splits, settings(), "as_trained"),
        fingerprint(
            evaluation,
            dataclasses.replace(model, model="resnet18"),
            splits,
            settings(),
            "as_trained",
        ),
        fingerprint(
            evaluation,
            dataclasses.replace(model, weights="others"),
            splits,
            settings(),
            "as_trained",
        ),
        fingerprint(evaluation, model, swapped, settings(), "as_trained"),
        fingerprint(evaluation, model, splits, settings(seed=77), "as_trained"),
        fingerprint(evaluation, model, splits, settings(precision="tf32"), "as_trained"),
        fingerprint(evaluation, model, splits, settings(), "recalibrated"),
        fingerprint(evaluation, model, splits, settings(calibration_images=2), "recalibrated"),
        fingerprint(evaluation, model, splits, settings(batch=4), "recalibrated"),
        fingerprint(evaluation, model, renamed, settings(), "as_trained"),
        fingerprint(newer, model, splits, settings(), "as_trained"),
    ]
    assert len({usual, *different}) == 1 + len(different)
    same = fingerprint(
        evaluation, model, splits, settings(calibration_images=2, batch=4), "as_trained"
    )
    assert usual == same  # they decide recalibrated statistics alone
    before = fingerprint(evaluation, model, splits, settings(), "recalibrated")
    monkeypatch.setattr(type(evaluation), "calibration_version", 1)
    assert fingerprint(evaluation, model, splits, settings(), "recalibrated") != before
    assert fingerprint(evaluation, model, splits, settings(), "as_trained") == usual
    # A training that recalibrates in batches of its own does not know that of the run.
    monkeypatch.setattr(type(evaluation), "calibrates_in_shared_batches", False)
    of_batches = [
        fingerprint(evaluation, model, splits, settings(batch=batch), "recalibrated")
        for batch in (4, 8)
    ]
    assert of_batches[0] == of_batches[1] != before
    moved = dataclasses.replace(model, checkpoint="/elsewhere/backbone.safetensors")
    assert usual == fingerprint(evaluation, moved, splits, settings(), "as_trained")


def test_only_another_decoder_is_another_fingerprint(
    model: EvaluatedModel, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(decode: str, device: str) -> str:
        given = settings(decode=decode, device=torch.device(device))
        return fingerprint(EVALUATIONS["knn"], model, splits, given, "as_trained")

    usual = fingerprint(EVALUATIONS["knn"], model, splits, settings(), "as_trained")
    assert usual == of("cpu", "cuda") == of("device", "cpu")
    assert usual != of("device", "cuda")
    # An evaluation that decodes on the CPU in any case
    monkeypatch.setattr(Knn, "may_decode_on_device", False)
    assert usual == of("device", "cuda")


def test_rows_name_another_decoder_and_are_equal_with_the_same_one(
    model: EvaluatedModel, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = rows_of(model, splits, settings())
    given = settings(decode="device")
    assert rows_of(model, splits, given) == usual
    seen = []
    peek = {"peek": Peek(look=lambda context: seen.append(context.encode_config.decode))}
    rows_of(model, splits, given, peek)
    assert seen == ["cpu", "cpu"]  # as it does not say that it may decode elsewhere
    assert {row.decoder for row in usual} == {""}

    def of_gpu(config: EncodeConfig) -> str:
        return decoder_name(config.decode, on_gpu=True)

    monkeypatch.setattr(EncodeConfig, "decoder", property(of_gpu))
    assert {row.decoder for row in rows_of(model, splits, given, peek)} == {""}
    assert rows_of(model, splits, settings()) == usual
    for row, before in zip(rows_of(model, splits, given), usual, strict=True):
        assert row.decoder == "nvJPEG"
        assert any("nvJPEG" in detail for detail in row.details)
        assert row.tracked_name != before.tracked_name
        assert row.fingerprint != before.fingerprint
        assert row.value == before.value


def test_rows_say_how_many_jpegs_were_left_to_the_cpu(
    model: EvaluatedModel, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_splits: list[FolderImages] = []
    for images in (splits.train, splits.held_out):
        assert isinstance(images, FolderImages)
        paths = []
        for path in images.paths:
            paths.append(str(tmp_path / f"{Path(path).stem}.jpg"))
            Image.open(path).save(paths[-1])
        of_splits.append(dataclasses.replace(images, paths=paths))
    in_jpegs = Splits(train=of_splits[0], held_out=of_splits[1])
    refused = {
        Path(images.paths[index]).read_bytes()
        for images, index in zip(of_splits * 2, (1, 2, 8, 9), strict=True)
    }

    def decode_most(jpegs: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        if any(each.numpy().tobytes() in refused for each in jpegs):
            raise RuntimeError("nvjpegDecode failed")
        return decode(jpegs, **options)

    decode: Any = device_decoding.decode_jpeg
    monkeypatch.setattr(device_decoding, "decode_jpeg", decode_most)
    monkeypatch.setattr(EncodeConfig, "decoder", "nvJPEG")
    # Without room for features images are read again and again, and counted once.
    given = settings(decode="device", bank_gib=0.0)
    with pytest.warns(UserWarning, match="CPU"):
        rows = rows_of(model, in_jpegs, given)
    assert len(rows) > 2
    for row in rows:
        assert row.details[-2:] == (
            "JPEGs decoded by nvJPEG",
            "decoded by the CPU in its place: 4 JPEGs",
        )


def test_layers_that_know_nothing_of_each_other_are_finished_and_found_one_by_one(
    model: EvaluatedModel, splits: Splits
) -> None:
    looks: list[int] = []
    peek = {"peek": Peek(look=lambda _context: looks.append(1))}
    rows = rows_of(model, splits, settings(), peek)
    assert len(looks) == len({row.fingerprint for row in rows}) == 2
    done = rows[0].fingerprint
    left = rows_of(model, splits, settings(), peek, is_wanted=lambda part: part.fingerprint != done)
    assert [row.layer for row in left] == ["feature5"]


def test_augmented_views_are_new_each_epoch_and_the_same_each_time(
    model: EvaluatedModel, splits: Splits
) -> None:
    found: dict[int, torch.Tensor] = {}

    def look(given: Context) -> None:
        augmented = given.augmented(RandomResized(crop_px=PX), None)
        for epoch in (0, 1):
            (batch,) = augmented.batches(torch.arange(30), 30, LAYERS, epoch)
            (again,) = augmented.batches(torch.arange(29, -1, -1), 30, LAYERS, epoch)
            found[epoch] = batch[0]["feature1"]
            torch.testing.assert_close(
                again[0]["feature1"].flip(0), found[epoch], rtol=1e-4, atol=1e-5
            )

    rows_of(model, splits, settings(), {"peek": Peek(look=look, layers=("feature1",))})
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_each_work_keeps_a_state_of_its_own(model: EvaluatedModel, splits: Splits) -> None:
    asked: list[str] = []

    def open_state(fingerprint: str) -> EvaluationState:
        asked.append(fingerprint)
        return NullState()

    rows = rows_of(
        model, splits, settings(batch_norms=["as_trained", "recalibrated"]), open_state=open_state
    )
    assert set(asked) == {row.fingerprint for row in rows}
    assert len(asked) == 4


def test_images_without_presence_are_refused_by_name(model: EvaluatedModel, splits: Splits) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Presence(Peek):
        labels = "presence"

    with pytest.raises(UsageError, match=r"eval\.svm .*PASCAL VOC.*\bcolors\b"):
        rows_of(model, splits, settings(), {"svm": Presence(look=lambda _context: None)})


def test_results_are_recognized_whatever_the_folder_of_unnamed_images_is_called(
    model: EvaluatedModel, splits: Splits
) -> None:
    def of(name: str, *, is_unnamed: bool) -> str:
        renamed = Splits(
            train=dataclasses.replace(splits.train, name=name),  # type: ignore[type-var]
            held_out=dataclasses.replace(splits.held_out, name=name),  # type: ignore[type-var]
            is_unnamed=is_unnamed,
        )
        return fingerprint(EVALUATIONS["knn"], model, renamed, settings(), "as_trained")

    # Earlier versions hashed the name in the settings of every such data set
    earlier = of("folder", is_unnamed=False)
    assert of("birds", is_unnamed=True) == of("cars", is_unnamed=True) == earlier
    assert of("birds", is_unnamed=False) != earlier


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("/runs/first/backbone.safetensors", "first"),
        ("/downloads/r50.pth", "r50.pth"),
        ("random", "random"),
        ("", ""),
    ],
)
def test_titles_of_pictures_name_the_weights(checkpoint: str, name: str) -> None:
    assert context(checkpoint=checkpoint).weights == name
