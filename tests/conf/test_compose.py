"""Every member of every group composes, and its objects can be made."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from relloc.errors import UsageError
from relloc.runs import build
from relloc.runs.settings import conf_dir, resolved

EVALS = [
    *(
        "card",
        "card_classification",
        "cityscapes_fcn",
        "coco_mask_rcnn_fpn_1x",
        "knn",
        "knn_in1k",
        "label_free",
        "label_free_in1k",
        "linear",
        "linear_avgpool",
    ),
    *("linear_fast", "linear_in1k", "linear_inat18", "linear_places205", "semisup_1", "semisup_10"),
    *("voc0712_detection", "voc07_fast_rcnn"),
    *("voc07_finetune", "voc07_finetune_fc", "voc07_low_shot", "voc07_svm", "voc12aug_fcn"),
]
CARD = {
    "voc07_svm",
    "voc07_low_shot",
    "linear_in1k",
    "linear_avgpool",
    "linear_places205",
    "knn_in1k",
    "semisup_1",
}
CARD |= {"semisup_10", "label_free_in1k"}
TRANSFER = {"voc0712_detection", "voc12aug_fcn", "coco_mask_rcnn_fpn_1x", "cityscapes_fcn"}
TRANSFER |= {"voc07_finetune_fc", "voc07_finetune", "voc07_fast_rcnn"}
GROUPS = (
    "model",
    "recipe",
    "probe",
    "grid",
    "color",
    "normalize",
    "chroma_blur",
    "aperture",
    "rotation",
    "curriculum",
    "pairs",
    "optimizer",
    "schedule",
    "tracking",
    "experiment",
)


def members(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("[!_]*.yaml"))


def test_the_groups_and_members_are_those_of_the_study():
    assert members("model") == ["alexnet", "resnet18", "resnet50", "small"]
    annotated = ["cityscapes", "coco2017", "voc0712", "voc2007_proposals", "voc2012_segmentation"]
    pretraining = ["folder", "imagenette", "in1k", "inat18", "photos", "places205", "voc2007"]
    assert members("data") == sorted([*annotated, *pretraining])
    # Sets for detection and segmentation are pretrained on as any folder is.
    assert members("recipe") == pretraining
    assert members("probe") == ["folder", "in1k", "inat18", "photos", "places205"]
    assert members("grid") == ["doersch2015", "google2019", "mmselfsup"]
    assert members("color") == ["drop", "gray", "none", "projection"]
    assert members("curriculum") == ["linear"]
    assert members("pairs") == ["adjacent", "center", "offsets", "triplets"]
    assert members("rotation") == ["quarter_turns"]
    assert members("chroma_blur") == members("aperture") == ["mundhenk2018"]
    assert members("eval") == EVALS
    assert members("tracking") == ["none", "server", "sqlite"]
    published = ["card2022", "doersch2015", "google2019", "known_answers"]
    others = ["ablation", "allpairs", "best", "curriculum", "mundhenk2018", "offgrid"]
    assert members("experiment") == sorted([*published, *others, "gap_jitter", "gap_jitter_small"])


@pytest.mark.parametrize(
    "choice",
    [
        f"{group}={member}"
        for group in GROUPS
        for member in members(group)
        if member != "known_answers"
    ],
)
def test_a_member_composes_and_makes_its_objects(compose, choice, monkeypatch):
    monkeypatch.setenv("RELLOC_DATA", "/nowhere")
    monkeypatch.setenv("RELLOC_VOC", "/nowhere")
    config = compose("train", [choice])
    OmegaConf.resolve(copy.deepcopy(config))  # as --cfg job --resolve does
    settings = build.pretraining(config)
    assert settings.patches.grid.span_px > 0
    assert settings.make_optimizer(model=settings.network()).param_groups
    assert settings.schedule.factor(0) >= 0
    named = {"linear_fast", "knn"}
    if choice in ("experiment=card2022", "experiment=allpairs"):
        named = {"linear_in1k", "knn_in1k"}
    if choice.startswith("experiment=gap_jitter"):
        named |= {"voc07_svm", "voc07_low_shot", "shortcuts", "label_free"}
    assert {one.name for one in settings.evaluations} == named


def test_the_patches_of_mundhenk_are_110_px_shown_at_96(compose):
    settings = build.pretraining(
        compose("train", ["experiment=mundhenk2018", "data.root=/nowhere"])
    )
    grid = settings.patches.grid
    assert (grid.cell_px, grid.pitch_px, grid.patch_px) == (110, 144, 96)
    assert settings.questions.n_outputs == 4 * 20
    assert settings.flip == 0.5


def test_settings_of_runs_that_are_older_than_some_are_those_of_the_default(compose):
    config = compose("train", [])
    older = OmegaConf.to_container(config)
    for name in ("pairs", "pretext_answers", "pretext_flip"):
        del older[name]
    for name in ("yoked_jitter", "scale", "yoked_scale", "rows"):
        del older["grid"][name]
    now, then = build.pretraining(config), build.pretraining(OmegaConf.create(older))
    assert (then.patches, then.questions, then.flip) == (now.patches, now.questions, now.flip)
    assert then.identity == now.identity


@pytest.mark.parametrize("preset", ["mundhenk2018", "offgrid"])
def test_pairs_do_not_take_a_preset_its_batch_norm(compose, preset):
    config = compose("train", [f"experiment={preset}", "pairs=center"])
    assert config.pretext_batch_norm == "joint"


def test_a_curriculum_can_be_taken_out_of_a_preset(compose):
    words = ["experiment=curriculum", "data=photos"]
    with_it = build.pretraining(compose("train", words)).training_patches
    without = build.pretraining(compose("train", [*words, "~curriculum"])).training_patches
    assert with_it.curriculum is not None
    assert without == dataclasses.replace(with_it, curriculum=None)


@pytest.mark.parametrize("root", ["train", "evaluate"])
@pytest.mark.parametrize("data", members("data"))
def test_a_data_set_composes_for_both_commands(compose, root, data):
    config = compose(
        root, [f"data={data}", "checkpoint=random"] if root == "evaluate" else [f"data={data}"]
    )
    found = OmegaConf.to_container(config, resolve=True)
    assert isinstance(found, dict)
    assert {"name", "shards", "source", "unreadable_share"} == set(found["data"]) - {
        "root",
        "proposals",
    }
    assert {"epochs", "milestone_epochs", "learning_rates"} == set(found["probe"]["linear"])
    assert {"layers"} == set(found["probe"]["knn"])
    if root == "train":
        assert set(found["recipe"]) == RECIPE


RECIPE = {
    "epochs",
    "warmup_epochs",
    "milestone_epochs",
    "lr",
    "images_per_step",
    "images_per_batch_norm",
}


def test_a_data_set_chooses_its_recipe_and_any_other_can_be_named(compose):
    assert compose("train", ["data=in1k"]).schedule.epochs == 70
    assert compose("train", ["experiment=card2022", "data=imagenette"]).schedule.epochs == 200
    mixed = compose("train", ["data=folder", "recipe=in1k", "probe=photos"])
    assert (mixed.data.name, mixed.schedule.epochs, mixed.recipe.images_per_step) == (
        "folder",
        70,
        512,
    )
    assert mixed.eval.linear_fast.epochs == 30


def test_a_data_set_of_ones_own_needs_no_recipe(compose, tmp_path):
    own = tmp_path / "data" / "mine.yaml"
    own.parent.mkdir()
    own.write_text(
        (conf_dir() / "data" / "folder.yaml").read_text().replace("name: folder", "name: mine")
    )
    words = [f"hydra.searchpath=[{tmp_path.as_uri()}]", "data=mine"]
    assert compose("train", words).schedule.epochs == 100
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("epochs: 7\n")
    config = compose("train", words)
    assert (config.data.name, config.schedule.epochs, config.recipe.images_per_step) == (
        "mine",
        7,
        256,
    )


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("[linear,knn]", {"linear", "knn"}),
        ("[knn]", {"knn"}),
        (
            "[knn,knn_in1k,label_free_in1k,label_free]",
            {"knn", "knn_in1k", "label_free", "label_free_in1k"},
        ),
        ("linear", {"linear"}),
        ("[]", set()),
        ("card_classification", CARD),
        ("card", {*CARD, *TRANSFER}),
        ("[card,linear_inat18]", {*CARD, *TRANSFER, "linear_inat18"}),
        ("[card_classification,linear_inat18]", {*CARD, "linear_inat18"}),
    ],
)
def test_eval_names_several_one_or_none(compose, asked, names, monkeypatch):
    monkeypatch.setenv("RELLOC_DATA", "/nowhere")
    assert {
        one.name for one in build.pretraining(compose("train", [f"eval={asked}"])).evaluations
    } == names


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["eval=[]"], {"shortcuts", "label_free"}),
        (["eval=[]", "study=[]"], set()),
        (["eval=[linear_fast]", "study=[]"], {"linear_fast"}),
        # Its folder is that of linear_fast, an evaluation which is not chosen here.
        (["eval=[knn]", "study=[]"], {"knn"}),
        (["eval=[label_free]", "study=label_free"], {"label_free"}),
        (["eval=[voc07_low_shot]", "study=[]"], {"voc07_low_shot"}),
    ],
)
def test_evaluations_that_a_preset_has_settings_of_can_be_left_out(
    compose, words, names, monkeypatch
):
    monkeypatch.setenv("RELLOC_VOC", "/nowhere")
    folder = "eval.linear_fast.data.root=/labeled"
    config = compose("train", ["experiment=gap_jitter_small", "data.root=/x", folder, *words])
    evaluations = build.pretraining(config).evaluations
    assert {one.name for one in evaluations} == names
    # Nothing of the others is recorded either.
    settings = resolved(config)
    assert {*settings["eval"], *settings["study"]} == names
    for one in evaluations:
        if one.name in ("knn", "linear_fast"):
            assert one.data is not None
            assert "/labeled" in one.data.images


@pytest.mark.parametrize("preset", members("experiment"))
def test_every_preset_can_do_without_its_evaluations(compose, preset):
    command = "evaluate" if preset == "known_answers" else "train"
    # relloc.evaluate needs one, so that it gets another than those of the preset.
    words = ["study=[]", "eval=[]"] if command == "train" else ["eval=[knn]"]
    config = compose(command, [f"experiment={preset}", *words])
    settings = resolved(config)
    assert list(settings["eval"]) == ([] if command == "train" else ["knn"])
    assert settings["study"] == {}


def test_what_is_left_out_need_not_have_values(compose):
    config = compose("train", ["eval=[knn]", "+eval.mine.root=${nowhere}"])
    assert list(resolved(config)["eval"]) == ["knn"]
    everything = compose("train", [])
    assert resolved(everything) == OmegaConf.to_container(everything, resolve=True)


def test_no_training_ends_by_waiting_for_a_person(compose):
    with pytest.raises(UsageError, match=r"relloc\.study"):
        build.pretraining(compose("train", ["study=human", "eval=[]"]))
    settings = build.evaluating(compose("study", ["study=human"]))
    assert settings.checkpoints == ["person"]
    settings = build.evaluating(compose("study", ["study=human", "checkpoint=run"]))
    assert settings.checkpoints == ["run"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["study=[human,neighbors]"], ["checkpoint=person", "neighbors"]),
        (["study=neighbors", "checkpoint=[random,person]"], ["checkpoint=person", "neighbors"]),
        (["study=human", "model=small"], ["model=small", "checkpoint=person"]),
    ],
)
def test_a_person_is_not_asked_for_what_only_a_network_has(compose, words, named):
    with pytest.raises(UsageError) as caught:
        build.evaluating(compose("study", words))
    assert [word for word in named if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("command", "member"),
    [
        (command, member)
        for command in ("train", "study")
        for member in members("study")
        if (command, member) != ("train", "human")
    ],
)
def test_a_study_composes_for_both_commands_and_can_be_made(compose, command, member):
    words = [f"study={member}", *(["checkpoint=random"] if command == "study" else ["eval=[]"])]
    build_settings = build.evaluating if command == "study" else build.pretraining
    (chosen,) = build_settings(compose(command, words)).evaluations
    assert (chosen.group, chosen.name) == ("study", member)


@pytest.mark.parametrize(
    ("words", "missing_data", "report"),
    [
        (["eval=card"], "skip", True),
        (["eval=[card,linear_inat18]"], "skip", True),
        (["eval=card", "missing_data=error", "report=false"], "error", False),
        (["eval=card_classification"], "error", False),
        (["eval=voc0712_detection"], "error", False),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_whole_card_leaves_out_what_has_no_data_and_ends_in_the_report(
    compose, command, words, missing_data, report
):
    config = compose(command, words)
    assert (config.missing_data, config.report) == (missing_data, report)


def test_a_preset_wins_over_the_root_and_the_command_line_over_both(compose):
    assert compose("train", ["experiment=doersch2015"]).grid.patch_px == 96
    assert compose("train", ["experiment=doersch2015", "grid.patch_px=80"]).grid.patch_px == 80


@pytest.mark.parametrize("preset", members("experiment"))
def test_a_preset_opens_with_what_it_reproduces_the_command_the_cost_and_what_to_expect(preset):
    opening = (Path(conf_dir()) / "experiment" / f"{preset}.yaml").read_text().split("defaults:")[0]
    for word in ("Reproduces:", "Command:", "Cost:", "Expect:", f"experiment={preset}"):
        assert word in opening


@pytest.mark.parametrize("preset", members("experiment"))
def test_a_preset_only_overrides(compose, preset):
    def keys(node: object, prefix: str = "") -> set[str]:
        if not isinstance(node, dict):
            return {prefix}
        return {key for name, child in node.items() for key in keys(child, f"{prefix}.{name}")}

    alone = OmegaConf.to_container(OmegaConf.load(conf_dir() / "experiment" / f"{preset}.yaml"))
    assert isinstance(alone, dict)
    # A sweeper's settings are no part of the config of a run.
    alone.pop("hydra", None)
    choices = []
    for line in alone.pop("defaults"):
        if isinstance(line, str):  # a preset that builds on another
            choices.append(f"experiment={line}")
            continue
        [(group, member)] = line.items()
        # Other lines add a data set to an evaluation.
        prefix = "" if group.startswith("override ") else "+"
        choices.append(f"{prefix}{group.split('/')[1]}={member}")
    root = ["evaluate", "checkpoint=random"] if preset == "known_answers" else ["train"]
    without = OmegaConf.to_container(compose(root[0], [*root[1:], *choices]))
    added = {key for key in keys(alone) if key not in keys(without)}
    assert added == set()


def test_settings_that_must_not_change_results_are_left_out_of_what_is_computed(compose):
    def identity(words: list[str]) -> Mapping[str, Any]:
        return build.pretraining(compose("train", words)).identity

    neutral = [
        "device=cpu",
        "workers=2",
        "tracking=none",
        "bank_gib=1",
        "report_every_steps=3",
        "eval=[]",
    ]
    neutral += [
        "compile=false",
        "cuda_graphs=false",
        "memory_format=contiguous",
        "deterministic=true",
    ]
    neutral += ["images_per_forward=64", "milestones=[1]", "collapse_steps=9"]
    neutral += ["monitor.every_epochs=null", "save_every_s=1"]
    assert identity(neutral) == identity([])
    assert identity(["grid.gap_px=8"]) != identity([])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("monitor.images=0", "monitor.images is 0: .* 1 or more"),
        ("monitor.k=0", "monitor.k is 0: "),
        ("monitor.every_epochs=-1", "monitor.every_epochs is -1: .* 0 or more"),
        ("monitor.most_share=2", "monitor.most_share is 2: .* 0 to 1"),
        ("save_every_s=-1", "save_every_s is -1: "),
        ("milestones=[-1]", r"milestones is \[-1\]: .* 0 or more"),
        ("data.unreadable_share=2", "data.unreadable_share is 2: .* 0 to 1"),
        ("optimizer.lr=-1", "optimizer.lr is -1: .* 0 or more"),
        ("view.crop_px=0", "view.crop_px is 0: .* 1 or more"),
        ("bank_gib=-1", "bank_gib is -1: .* 0 or more"),
        ("probe.linear.epochs=0", "eval.linear_fast.epochs is 0: "),
    ],
)
def test_a_wrong_number_is_told_before_anything_is_done(compose, wrong, message):
    with pytest.raises(UsageError, match=message):
        build.pretraining(compose("train", [wrong]))


@pytest.mark.parametrize("root", ["train", "evaluate"])
def test_the_numbers_of_all_data_sets_are_right(compose, root):
    for data in members("data"):
        config = compose(
            root, [f"data={data}", *(["checkpoint=random"] if root == "evaluate" else [])]
        )
        settings = build.pretraining(config) if root == "train" else build.evaluating(config)
        assert settings.data.setting == "data"


@pytest.mark.parametrize(
    ("member", "wrong", "message"),
    [
        ("semisup_1", "batch=1", "eval.semisup_1.batch"),
        ("linear_places205", "epochs=0", "eval.linear_places205"),
        ("voc07_svm", "folds=1", "eval.voc07_svm.folds is 1"),
    ],
)
def test_a_wrong_constant_is_told_by_the_name_of_the_member(
    compose, member, wrong, message, monkeypatch
):
    monkeypatch.setenv("RELLOC_DATA", "/nowhere")
    with pytest.raises(UsageError, match=message):
        build.evaluating(
            compose("evaluate", ["checkpoint=random", f"eval=[{member}]", f"eval.{member}.{wrong}"])
        )


def test_sides_of_patches_are_told_by_the_name_of_the_study(compose):
    words = ["checkpoint=random", "study=neighbors", "study.neighbors.sides_px=[0]"]
    with pytest.raises(UsageError, match=r"study\.neighbors\.sides_px is \[0\]"):
        build.evaluating(compose("study", words))
