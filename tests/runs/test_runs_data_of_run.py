"""An evaluation takes the data set of the run that it names, and nothing else from its folder."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig

from relloc.errors import UsageError
from relloc.runs import command_line, data_of_run, settings
from relloc.runs.data_of_run import RunData
from relloc.runs.settings import plain
from relloc.sweeps.points import Point
from relloc.sweeps.sweep import Sweep
from relloc.tracking import RunRecord


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RELLOC_DATA", "RELLOC_IN1K", "RELLOC_CONF", "RELLOC_SWEEP_CHECKPOINTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def data_settings(*words: str, section: str = "data") -> dict[str, Any]:
    """The data section of a training's config.yaml, as these words make it."""
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(settings.compose("train", words).config[section], resolve=True)
    assert isinstance(found, dict)
    return {str(name): value for name, value in found.items()}


def run(folder: str, data: Any, cwd: Path | None = None, **more: Any) -> Path:
    path = Path(folder)
    (path / ".hydra").mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "data": data, **more}))
    if cwd is not None:
        hydra = {"hydra": {"runtime": {"cwd": str(cwd)}}}
        (path / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))
    return path


def found(*words: str) -> RunData | None:
    return data_of_run.find(command_line.check(words, sweeps=False))


def composed(*words: str) -> DictConfig:
    data = found(*words)
    return settings.compose("evaluate", [*(data.words if data else ()), *words]).config


@pytest.mark.parametrize(
    "words",
    [
        ("data=photos", "data.source.stride=0.4"),
        (
            "data=folder",
            "data.root=[/a b,'/c=d']",
            "data.source.held_out_share=0.1",
            'data.name="it\'s"',
        ),
        (
            "data=in1k",
            "data.root=/in1k",
            "data.source.published_images=null",
            "data.unreadable_share=0.5",
        ),
        ("data=voc2007", "data.root=/voc", "data.source.year=2012"),
        (
            "data=imagenette",
            "data.root=/x",
            "probe.linear.epochs=3",
            "probe.linear.milestone_epochs=[1]",
        ),
        ("data=folder", "data.shards=/shards", "probe.knn.layers=[feature4]"),
    ],
    ids=" ".join,
)
def test_all_data_settings_are_those_of_the_run(words: tuple[str, ...]) -> None:
    from omegaconf import OmegaConf

    told, probe = data_settings(*words), data_settings(*words, section="probe")
    run("run", told, probe=probe)
    run("before", told | probe)  # as earlier versions wrote it
    weights = ("run/backbone.safetensors", "run/checkpoints/epoch_3.pt")
    for checkpoint in ("run", "[random,run]", "before", *weights):
        config = composed(f"checkpoint={checkpoint}")
        assert OmegaConf.to_container(config.data, resolve=True) == told
        assert OmegaConf.to_container(config.probe, resolve=True) == probe


def test_a_probe_that_is_named_is_taken() -> None:
    run(
        "run",
        data_settings("data=folder", "data.root=/a"),
        probe=data_settings("probe=in1k", section="probe"),
    )
    assert composed("checkpoint=run").probe.linear.epochs == 90
    assert composed("checkpoint=run", "probe=photos").probe.linear.epochs == 30


def test_a_setting_that_is_typed_stands_over_the_runs() -> None:
    run("run", data_settings("data=folder", "data.root=/a"))
    config = composed("checkpoint=run", "data.root=/b")
    assert config.data.root == config.data.source.root == "/b"


@pytest.mark.parametrize("words", [("data=photos",), ("experiment=known_answers",)])
def test_data_that_is_named_is_taken(words: tuple[str, ...]) -> None:
    run("run", data_settings("data=folder", "data.root=/a"))
    assert found("checkpoint=run", *words) is None


@pytest.mark.parametrize("checkpoint", ["random", "file.pt", "[random,torchvision]", "empty"])
def test_what_is_no_run_has_no_data(checkpoint: str) -> None:
    Path("file.pt").touch()
    Path("empty").mkdir()
    assert found(f"checkpoint={checkpoint}") is None


def test_a_relative_folder_counts_from_where_the_training_was_started(
    here: Path, monkeypatch
) -> None:
    (here / "set").mkdir()
    run("run", data_settings("data=folder", "data.root=set"), cwd=here)
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    config = composed("checkpoint=../run")
    assert config.data.root == config.data.source.root == str(here / "set")


def test_images_that_are_gone_are_told_where_they_are_needed(here: Path) -> None:
    run("run", data_settings("data=folder", f"data.root={here / 'gone'}"))
    data = found("checkpoint=run")
    assert data is not None
    config = settings.compose("evaluate", [*data.words, "checkpoint=run"]).config
    with pytest.raises(UsageError, match=r"data.root=FOLDER"):
        data.describe(plain(config))
    (here / "moved").mkdir()
    moved = settings.compose(
        "evaluate", [*data.words, "checkpoint=run", f"data.root={here / 'moved'}"]
    ).config
    assert "moved" in data.describe(plain(moved))
    own = settings.compose("evaluate", [*data.words, "checkpoint=run", "eval=voc07_svm"]).config
    assert data.describe(plain(own)) == ""


def test_a_function_that_no_member_has_is_never_called() -> None:
    run("run", {"name": "x", "source": {"_target_": "os.system", "command": "touch hacked"}})
    with pytest.raises(UsageError, match="os.system"):
        found("checkpoint=run")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "${oc.env:HOME}"},
        {"knn": {"layers": ["${oc.env:HOME}"]}},
        {"linear": {"epochs": {"_target_": "os.system"}}},
        {"more": {"_target_": "os.system"}},
        {"root": {"_target_": "os.system"}},
    ],
)
def test_only_plain_values_are_taken(change: dict[str, Any]) -> None:
    told = data_settings("data=folder", "data.root=/a")
    run("run", told | change, **({"probe": copy.deepcopy(change)} if "linear" in change else {}))
    data = found("checkpoint=run")
    assert data is not None
    assert not any("_target_" in word or "${" in word for word in data.words)


CYCLE = "data: {root: &a [*a], source: {_target_: relloc.data.folder.folder}}"
DOUBLED = "".join(f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]\n" for n in range(1, 12))
BOMB = (
    f"a0: &a0 [x]\n{DOUBLED}data: {{root: *a11, source: {{_target_: relloc.data.folder.folder}}}}"
)


@pytest.mark.parametrize(
    "content", ["{", "a: !!python/object/apply:os.system [ls]", "\x00", "[" * 3000, CYCLE, BOMB]
)
def test_a_config_that_can_not_be_read_is_one_message(content: str) -> None:
    run("run", {})
    Path("run", "config.yaml").write_text(content)
    with pytest.raises(UsageError, match="config.yaml") as caught:
        found("checkpoint=run")
    assert "\n" not in str(caught.value)


def test_a_name_that_no_run_can_have_names_none() -> None:
    assert found(f"checkpoint={'x' * 5000}") is None


def training(folder: str, *words: str) -> Path:
    path = run(folder, data_settings(*words))
    RunRecord(name="t", experiment="relloc", tags={"relloc.kind": "train"}).write(path)
    return path


def test_watched_trainings_share_their_data_set() -> None:
    training("a", "data=folder", "data.root=/x")
    training("b", "data=folder", "data.root=/x")
    training("c", "data=voc2007", "data.root=/voc")
    for words in (["watch=a"], ["watch=[a,b]"]):
        data = found(*words)
        assert data is not None
        assert (data.member, data.folders["data.root"]) == ("folder", "/x")
    with pytest.raises(UsageError, match="2 data sets"):
        found("watch=[a,c]")
    assert found("watch=[a,c]", "data=photos") is None
    # Each point of a sweep has its own.
    sweep = ["watch=a,c"]
    assert data_of_run.find_shared(command_line.check(sweep, sweeps=True)) is None
    words_of_point = data_of_run.with_data(["watch=c"], ["-m", *sweep])
    assert words_of_point[0] == "data=voc2007"


def test_a_sweep_of_which_no_training_has_begun_has_no_data_set_yet(here: Path) -> None:
    sweep = Sweep(here / "runs" / "sweeps" / "s")
    point = Point(kind="train", name="", overrides=(), identity="", folder=here / "runs" / "p")
    with sweep.locked():
        sweep.add([point], [])
    with pytest.raises(UsageError, match="no training has begun"):
        found("watch=s")
    assert found("watch=s", "data=photos") is None
    training("runs/p", "data=voc2007", "data.root=/voc")
    data = found("watch=s")
    assert data is not None
    assert data.member == "voc2007"


def test_points_of_a_sweep_have_the_data_of_their_own_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    run("a", data_settings("data=folder", "data.root=/a"))
    run("b", data_settings("data=folder", "data.root=/b"))
    swept = ["-m", "checkpoint=random,b,a", "seed=0,1"]
    assert data_of_run.find_shared(command_line.check(swept[1:], sweeps=True)) is None
    for name, root in (("a", "/a"), ("b", "/b"), ("random", "/b")):
        assert f"data.root={root}" in data_of_run.with_data([f"checkpoint={name}", "seed=0"], swept)
        monkeypatch.setenv("RELLOC_SWEEP_CHECKPOINTS", json.dumps(["random", "b", "a"]))
        alone = data_of_run.find_of_point(command_line.check([f"checkpoint={name}"], sweeps=False))
        assert alone is not None
        assert f"data.root={root}" in alone.words


def test_a_sweep_over_runs_of_one_data_set_shares_it() -> None:
    for name in ("a", "b"):
        run(name, data_settings("data=folder", "data.root=/same"))
    shared = data_of_run.find_shared(command_line.check(["checkpoint=a,b,random"], sweeps=True))
    assert shared is not None
    assert shared.words == ("data=folder", "data.root=/same")
