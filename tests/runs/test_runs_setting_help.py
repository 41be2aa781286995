"""--help of a setting, a group and a member, from conf/ and docstrings; and misspelt names."""

import textwrap
from pathlib import Path

import pytest

from relloc.errors import UsageError
from relloc.runs import build, explaining, renamed, setting_help, settings
from relloc.runs.command_line import check


def answered(*words: str, command: str = "train") -> str:
    return setting_help.answer(words, command)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        (
            "grid.gap_px",
            [
                "21",
                "pixels",
                "conf/grid/mmselfsup.yaml",
                "a gap of 21 px",
                ": distance between two neighbor",
                "48",
            ],
        ),
        ("grid.jitter_px", [": range of the displacement", "of mmselfsup.\n"]),
        ("bank_gib", ["12", "GiB", "conf/_settings.yaml", "features kept in memory"]),
        ("monitor.most_share", ["0.05", "conf/train.yaml", "cost"]),
        ("data.root", ["null", "with data=", "conf/data/"]),
        ("eval.linear.lr", ["0.01", "conf/eval/linear.yaml", "Linear"]),
        ("grid.gap_px=32", ["21"]),
        ("launcher.timeout_min", ["1440", "launcher=slurm", "of each start"]),
        (
            "experiment=card2022",
            ["Reproduces:", "Command:", "Cost:", "Expect:", "override /model: resnet50"],
        ),
        ("eval=[knn,linear]", ["nearest neighbors", "linear classifier"]),
        ("eval=[]", ["chooses no", "linear_fast", "knn"]),
        ("color", ["drop", "gray", "projection", "No treatment: the control"]),
        ("monitor", ["monitor.images", "monitor.k"]),
        ("hydra.run.dir", ["conf/train.yaml"]),
        ("checkpoint", ["no default", "conf/evaluate.yaml", "A run folder"]),
    ],
)
def test_a_word_is_answered_from_conf_and_docstrings(word: str, parts: list[str]) -> None:
    text = answered(word, command="evaluate" if word == "checkpoint" else "train")
    assert [part for part in parts if part not in text] == []


def test_the_help_of_a_training_lists_every_group() -> None:
    template = (settings.conf_dir() / "hydra/help/train.yaml").read_text()
    _, _, listed = template.partition("${members:")
    groups = {path.name for path in settings.conf_dir().iterdir() if path.is_dir()}
    assert set(listed.partition("}")[0].split(",")) == groups - {"hydra"}


@pytest.mark.slow
@pytest.mark.parametrize("command", settings.COMMANDS)
def test_each_setting_answers_its_default_and_its_file(command: str) -> None:
    composed = settings.compose(command)
    for key in composed.names():
        assert setting_help._source_of(key, composed) is not None, key
    for key in [name for name in composed.names() if not settings.is_group(name)][::12]:
        assert "set in conf/" in answered(key, command=command), key


def test_a_file_that_two_evaluations_share_is_named_for_both() -> None:
    both = "eval=[voc07_svm,voc07_low_shot]"
    for name in ("voc07_svm", "voc07_low_shot"):
        assert "set in conf/data/voc2007.yaml" in answered(f"eval.{name}.data.name", both)
        assert "set in conf/eval/_voc07.yaml" in answered(f"eval.{name}.costs", both)


@pytest.mark.parametrize(
    "word", ["grid.gab_px", "gap_px", "nothing.at.all", "data=imagenet", "eval=knnn"]
)
def test_what_there_is_not_is_a_mistake(word: str) -> None:
    with pytest.raises(UsageError, match="there is no"):
        answered(word)


def test_comments_stand_behind_or_above_what_they_are_of(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        textwrap.dedent(
            """\
            # of the file
            a: 1
            b: "x # y"   # of b

            # of c and d,
            # in two lines
            c: [1,
              2]         # behind c
            d: 2
            e:
              f: 3       # of f

            g: 4
            """
        )
    )
    assert setting_help.comments(file) == {
        "b": "of b",
        "c": "behind c",
        "d": "of c and d, in two lines",
        "e": "of c and d, in two lines",
        "e.f": "of f",
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("gap_px", "Did you mean grid.gap_px"),
        ("grid.gab_px", "Did you mean grid.gap_px"),
        ("lr", "optimizer.lr or recipe.lr"),
        ("optimizer.learning_rate", "Did you mean optimizer.lr"),
        ("data.root", " data=folder,"),
    ],
)
def test_a_misspelt_setting_is_told_with_the_one_meant(word: str, message: str) -> None:
    assert message in explaining.no_setting(word, "train", [])


OLD_NAMES = {
    "data.lr": "optimizer.lr",
    "data.epochs": "schedule.epochs",
    "data.warmup_epochs": "schedule.warmup_epochs",
    "data.milestone_epochs": "schedule.milestone_epochs",
    "data.images_per_step": "recipe.images_per_step",
    "data.images_per_batch_norm": "recipe.images_per_batch_norm",
    "data.linear.epochs": "probe.linear.epochs",
    "data.knn.layers": "probe.knn.layers",
}


@pytest.mark.parametrize("old", OLD_NAMES)
def test_an_old_name_is_told_with_the_new_one(old: str) -> None:
    told = f"{old} is now {OLD_NAMES[old]}"
    assert explaining.no_setting(old, "train", []) == told
    with pytest.raises(UsageError, match=told):
        answered(old)
    with pytest.raises(UsageError, match=told):
        renamed.refuse_old_names([old])
    composed = settings.compose(
        "train", [f"+{old}=1"]
    ).config  # as a preset of the user's own may have it
    with pytest.raises(UsageError, match=f"is now {OLD_NAMES[old].partition('.')[0]}"):
        build.pretraining(composed)


@pytest.mark.parametrize("word", ["recipe=in1kk", "probe=small", "recipe=in1k,nothing"])
def test_a_misspelt_recipe_is_told_although_hydra_would_go_on_without(word: str) -> None:
    with pytest.raises(UsageError, match="there is no (recipe|probe)="):
        explaining.check_members(check([word], sweeps=True))
    explaining.check_members(
        check(["recipe=in1k", "probe=photos", "~probe", "data=nothing"], sweeps=False)
    )


@pytest.mark.parametrize(
    ("word", "instead"),
    [
        ("aperture=null", "'~aperture'"),
        ("curriculum=null,linear", "'~curriculum'"),
        ("color=null", "color=none"),
        ("color@curriculum.otherwise=null", "color=none"),
        ("grid=null", "mmselfsup"),
        ("eval=null", r"eval=\[\]"),
    ],
)
def test_a_group_set_to_null_is_told_with_what_to_write(word: str, instead: str) -> None:
    with pytest.raises(UsageError, match=instead):
        explaining.check_members(check([word], sweeps=True))


def test_a_setting_of_another_command_is_told_as_that() -> None:
    assert "relloc.train" in explaining.no_setting("grid.gap_px", "evaluate", [])
    for wrong in ("study", "study.shortcuts.n_images"):
        assert "python -m relloc.study" in explaining.no_setting(wrong, "evaluate", [])
    assert "python -m relloc.evaluate" in explaining.no_setting("eval", "study", [])


@pytest.mark.parametrize(
    ("wrong", "near"), [("imagenet", "imagenette or in1k"), ("place205", "places205")]
)
def test_a_misspelt_member_is_told_with_those_meant(wrong: str, near: str) -> None:
    assert f"Did you mean {near}?" in explaining.no_member("data", wrong)


@pytest.mark.parametrize(
    ("word", "sweeps"),
    [
        ("grid.gap_px=ten", False),
        ("grid.gap_px=0,ten", True),
        ("schedule.epochs=abc", False),
        ("deterministic=maybe", False),
        ("optimizer.momentum='0.9'", False),
        ("eval.knn.temperature=hot", False),
    ],
)
def test_a_word_for_a_number_is_told_before_anything_is_composed(word: str, sweeps: bool) -> None:
    with pytest.raises(UsageError, match=word.partition("=")[0]):
        explaining.check_kinds(check([word], sweeps=sweeps), "train")


@pytest.mark.parametrize(
    "words",
    [
        ("data.root=/x", "data=folder"),
        ("workers=2", "precision=fp32", "images_per_forward=8", "save_every_s=.5"),
        ("launcher=local", "launcher.processes=2"),
        ("launcher.processes=auto",),
        ("seed=${oc.env:SEED,3}",),
        ("eval=[knn]", "sweep=name", "runs=elsewhere", "monitor.every_epochs=null"),
        ("data=nothing", "optimizer.lr=abc"),
    ],
)
def test_other_words_are_left_to_what_takes_them(words: tuple[str, ...]) -> None:
    explaining.check_kinds(check(words, sweeps=False), "train")


def test_a_member_that_a_plugin_would_bring_is_said_to_be_not_installed() -> None:
    message = explaining.no_member("hydra/sweeper", "optuna")
    assert "hydra/sweeper=optuna" in message
    assert "not installed" in message


@pytest.mark.parametrize("name", ["voc12aug_fcn", "cityscapes_fcn"])
def test_a_setting_that_is_gone_is_told(name):
    setting = f"eval.{name}.images_per_gpu"
    told = f"{setting} is gone.*leave it out"
    with pytest.raises(UsageError, match=told):
        renamed.refuse_old_names([setting])
    # Those of detectors decide how losses are divided.
    renamed.refuse_old_names(["eval.voc07_fast_rcnn.images_per_gpu"])
