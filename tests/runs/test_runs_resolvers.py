"""Spans that scale with the epochs, and where the images of evaluations lie."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from relloc.data.manifest import FORMAT, MANIFEST
from relloc.errors import UsageError
from relloc.runs import build, resolvers, settings
from relloc.runs.instantiation import call

SPANS = st.lists(st.floats(0.01, 0.99), max_size=4, unique=True).map(sorted)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RELLOC_DATA", "RELLOC_IN1K", "RELLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


def test_whoever_composes_settings_can_have_default_names() -> None:
    """Scripts that start no command compose them too."""
    asked = (
        "import sys, relloc.runs.settings; from omegaconf import OmegaConf; "
        "assert 'relloc.runs.start_command' not in sys.modules; "
        "print(OmegaConf.create({'name': '${unique:}'}).name)"
    )
    name = subprocess.check_output([sys.executable, "-c", asked], text=True).strip()
    assert len(name) == 6
    int(name, base=16)


def composed(*words: str, command: str = "train") -> DictConfig:
    return settings.compose(command, words).config


@given(shares=SPANS, made_for=st.integers(1, 500), epochs=st.integers(1, 500))
def test_spans_keep_their_share_of_the_training(
    shares: list[float], made_for: int, epochs: int
) -> None:
    spans = [share * made_for for share in shares]
    found = resolvers.scaled(spans, made_for, epochs)
    assert found == pytest.approx([share * epochs for share in shares], rel=1e-5)
    assert resolvers.scaled(spans, made_for, made_for) == spans


@given(shares=SPANS, made_for=st.integers(1, 200), epochs=st.integers(1, 200))
def test_whole_milestones_rise_and_are_reached(
    shares: list[float], made_for: int, epochs: int
) -> None:
    if made_for == epochs:
        return
    found = resolvers.scaled_whole([share * made_for for share in shares], made_for, epochs)
    assert found == sorted(set(found))
    assert all(isinstance(one, int) and 1 <= one < epochs for one in found)


def test_only_epochs_need_be_set() -> None:
    shorter = composed("data=in1k", "schedule.epochs=7").schedule
    assert (shorter.warmup_epochs, shorter.milestone_epochs) == (0.5, [3, 5])
    assert call("schedule", settings.plain(shorter)).factor(6) == pytest.approx(0.01)
    assert composed("schedule.epochs=3", "schedule=cosine").schedule.warmup_epochs == 0.1
    given = composed(
        "data=in1k",
        "schedule.epochs=7",
        "schedule.warmup_epochs=1",
        "schedule.milestone_epochs=[6]",
    )
    assert (given.schedule.warmup_epochs, given.schedule.milestone_epochs) == (1, [6])
    recipe = composed("experiment=google2019", "schedule.epochs=7").schedule
    assert (recipe.warmup_epochs, recipe.milestone_epochs) == (1, [3, 5])


@pytest.mark.parametrize(
    ("name", "epochs", "milestones"),
    [
        ("linear", 3, [1, 2]),
        ("linear_fast", 1, []),
        ("linear_in1k", 3, [1, 2]),
        ("linear_avgpool", 10, [6, 8]),
        ("linear_inat18", 7, [2, 4, 6]),
        ("semisup_10", 2, [1]),
    ],
)
def test_milestones_of_evaluations_scale_in_whole_epochs(
    name: str, epochs: int, milestones: list[int]
) -> None:
    node = composed(f"eval=[{name}]", f"eval.{name}.epochs={epochs}").eval[name]
    assert node.milestone_epochs == milestones
    own = composed(
        f"eval=[{name}]", f"eval.{name}.epochs={epochs}", f"eval.{name}.milestone_epochs=[1]"
    ).eval[name]
    assert own.milestone_epochs == [1]


def test_a_word_for_epochs_is_told_by_the_setting() -> None:
    config = composed("schedule.epochs=abc")
    assert config.schedule.warmup_epochs == 0.2
    (refusal,) = build.refusals("train", [config])
    assert "epochs" in (refusal or "")


def places(config: DictConfig, name: str) -> tuple[str | None, str | None]:
    node = config.eval[name].data
    return node.root, node.shards


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_an_evaluation_of_the_same_data_set_reads_it_where_it_lies(command: str) -> None:
    more = ["checkpoint=random"] if command == "evaluate" else []
    words = ["data=in1k", "eval=[linear_in1k,voc07_svm]", *more]
    images = composed(*words, "data.root=/in1k", command=command)
    assert places(images, "linear_in1k") == ("/in1k", None)
    assert images.eval.linear_in1k.data.source.root == "/in1k"
    assert places(images, "voc07_svm") == (None, None)
    assert places(composed(*words, "data.shards=/packed", command=command), "linear_in1k") == (
        None,
        "/packed",
    )


def test_a_place_of_its_own_stands_over_the_one_trained_on() -> None:
    words = ("data=in1k", "data.root=/in1k", "data.shards=/packed", "eval=[linear_in1k]")
    assert places(composed(*words), "linear_in1k") == ("/in1k", "/packed")
    own = composed(*words, "eval.linear_in1k.data.root=/other")
    assert places(own, "linear_in1k") == ("/other", None)
    packed = composed(*words, "eval.linear_in1k.data.shards=/others")
    assert places(packed, "linear_in1k") == ("/in1k", "/others")


def test_the_commands_of_a_preset_need_no_second_root(tmp_path: Path) -> None:
    build.pretraining(composed("experiment=card2022", f"data.root={tmp_path}", "tracking=none"))
    with pytest.raises(UsageError, match="RELLOC_IN1K or eval.{linear_in1k,knn_in1k}.data.root"):
        build.pretraining(composed("experiment=card2022", "data=photos", "tracking=none"))


@pytest.mark.parametrize("variable", ["RELLOC_IN1K", "RELLOC_DATA"])
def test_a_variable_may_name_packed_shards(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(tmp_path))
    images = composed("data=in1k", "eval=[knn_in1k]")
    assert (
        (images.data.root, images.data.shards)
        == places(images, "knn_in1k")
        == (str(tmp_path), None)
    )
    (tmp_path / MANIFEST).write_text('{"images": 3}')  # of others
    assert composed("data=in1k").data.shards is None
    (tmp_path / MANIFEST).write_text(f'{{"format": "{FORMAT}"}}')
    packed = composed("data=in1k", "eval=[knn_in1k]")
    assert (
        (packed.data.root, packed.data.shards)
        == places(packed, "knn_in1k")
        == (None, str(tmp_path))
    )
    brought = composed("data=photos", "eval=[knn_in1k]")
    assert places(brought, "knn_in1k") == (None, str(tmp_path))
    given = composed("data=in1k", "data.root=/in1k", "eval=[knn_in1k]")
    assert (given.data.root, given.data.shards) == places(given, "knn_in1k") == ("/in1k", None)


def test_several_folders_are_inherited_as_well() -> None:
    config = composed("data=folder", "data.root=[/a,/b]")
    assert OmegaConf.to_container(config.data.source.root) == ["/a", "/b"]
