import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from relloc.errors import DataError, UsageError
from relloc.runs.data_of_run import CONFIG_FILE
from relloc.runs.invocation import Invocation
from relloc.runs.start_command import start_command

Launched = Callable[..., int]
Task = Callable[[DictConfig], None]


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Launch a task with command-line words in an empty folder, runs below runs/: the exit code."""
    for name, value in {"HYDRA_FULL_ERROR": "0", "RANK": "0", "RELLOC_RUNS": "runs"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.chdir(tmp_path)

    def code(task: Task, config_name: str, *words: str) -> int:
        monkeypatch.setattr(sys, "argv", [config_name, *words])
        os.environ["HYDRA_FULL_ERROR"] = "0"  # the launch before has set it
        with pytest.raises(SystemExit) as ended:
            start_command(task, config_name)
        return int(str(ended.value.code))

    return code


def refuse(config: DictConfig) -> None:
    raise DataError(f"nothing like seed {config.seed}")


def miss(config: DictConfig) -> None:
    print(config.checkpoint)


def write(_config: DictConfig) -> None:
    (Path(HydraConfig.get().runtime.output_dir) / "run.json").touch()


def write_then_fail(config: DictConfig) -> None:
    write(config)
    raise UsageError("diverged")


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("task", [refuse, miss])
@pytest.mark.parametrize("words", [(), ("hydra.run.dir=runs/named",)], ids=" ".join)
def test_a_refused_command_leaves_no_folder(
    launched: Launched,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    task: Task,
    words: tuple[str, ...],
) -> None:
    assert launched(task, "evaluate", *words) == 2
    assert below(tmp_path) == ["runs"]
    assert (
        "nothing like seed 0" if task is refuse else "checkpoint is not set"
    ) in capsys.readouterr().err


def test_a_setting_that_only_a_swept_member_has_is_told_as_that(
    launched: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launched(refuse, "prepare", "-m", "data=folder,in1k", "data.root=x") == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"relloc: data\.root .*\bdata=folder,in1k: .*each data\n", message)


def test_what_a_folder_held_before_stays_in_it(launched: Launched, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes").touch()
    assert launched(refuse, "evaluate", "hydra.run.dir=old") == 2
    assert below(tmp_path) == ["old", "old/notes"]  # Hydra writes nothing there either


def test_a_folder_of_hydras_that_the_user_asks_for_is_removed_where_it_holds_nothing_else(
    launched: Launched, tmp_path: Path
) -> None:
    words = ("hydra.run.dir=old", "hydra.output_subdir=of_hydra")
    assert launched(refuse, "evaluate", *words) == 2
    assert below(tmp_path) == []
    (tmp_path / "old" / "of_hydra").mkdir(parents=True)
    (tmp_path / "old" / "of_hydra" / "mine").touch()
    assert launched(refuse, "evaluate", *words) == 2
    assert (tmp_path / "old" / "of_hydra" / "mine").exists()


def test_two_commands_of_one_second_have_names_of_their_own(launched: Launched) -> None:
    folders, sweeps = set(), set()

    def note(config: DictConfig) -> None:
        folders.add(HydraConfig.get().runtime.output_dir)
        sweeps.add(config.sweep)

    for _ in range(3):
        for name in ("train", "evaluate"):
            assert (
                launched(note, name, *(("checkpoint=random",) if name == "evaluate" else ())) == 0
            )
    assert len(folders) == len(sweeps) == 6


def test_a_command_has_one_name_wherever_it_is_asked_for(launched: Launched) -> None:
    def note(config: DictConfig) -> None:
        assert OmegaConf.to_container(config, resolve=True)["sweep"] == config.sweep  # type: ignore[call-overload,index]
        run_dir = HydraConfig.get().run.dir
        assert Path(run_dir).name == Path(HydraConfig.get().runtime.output_dir).name

    assert launched(note, "train") == 0


def test_the_folder_we_stand_in_is_not_removed(launched: Launched, tmp_path: Path) -> None:
    assert launched(refuse, "evaluate", "hydra.run.dir=.") == 2
    assert tmp_path.is_dir()
    assert below(tmp_path) == []


def test_a_run_that_failed_after_it_had_begun_keeps_its_folder(
    launched: Launched, tmp_path: Path
) -> None:
    assert launched(write_then_fail, "evaluate", "hydra.run.dir=run") == 2
    assert below(tmp_path) == ["run", "run/run.json"]


def test_other_errors_keep_what_shows_where_they_come_from(
    launched: Launched, tmp_path: Path
) -> None:
    def break_down(_config: DictConfig) -> None:
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError):
        launched(break_down, "evaluate", "hydra.run.dir=run")
    assert below(tmp_path) == ["run"]


@pytest.mark.parametrize("words", [(), ("-m", "quality=80,90")], ids=" ".join)
def test_prepare_leaves_nothing_of_hydra(
    launched: Launched, tmp_path: Path, words: tuple[str, ...]
) -> None:
    scratch: set[str] = set()
    asked = []

    def note(config: DictConfig) -> None:
        scratch.add(HydraConfig.get().sweep.dir)
        asked.append(config.quality)

    assert launched(note, "prepare", *words) == 0
    assert asked == ([80, 90] if words else ["auto"])
    assert below(tmp_path) == []
    assert len(scratch) == 1
    assert not Path(scratch.pop()).exists()


def test_other_ranks_write_in_a_folder_that_goes(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    folders = []

    def note(config: DictConfig) -> None:
        write(config)
        folders.append(Path(HydraConfig.get().runtime.output_dir))

    assert launched(note, "evaluate", "hydra.run.dir=run") == 0
    assert below(tmp_path) == []
    assert not folders[0].exists()


def test_a_flag_may_stand_behind_settings(
    launched: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launched(refuse, "train", "grid.gap_px=33", "--cfg", "job") == 0
    assert "gap_px: 33" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("grid.gap_px=ten", "grid.gap_px=ten is not a number"),
        ("gap_px=10", "Did you mean grid.gap_px"),
        ("data.epoch=3", "Did you mean schedule.epochs"),
        ("data=imagenet", "imagenette or in1k"),
        ("seed", "seed=VALUE"),
        ("--seed", "no flag --seed"),
        ("color=a#b", """'color="a#b"'"""),
        ("--epochs=2", "schedule.epochs=2"),
        ("data.batch_size=2", "Did you mean recipe.images_per_step?"),
        ("data.batch=64", "Did you mean recipe.images_per_step?"),
        ("eval=none", "eval=[]"),
        ("eval=null", "eval=[]"),
        ("eval.linear.epochs=2", "belongs to eval=linear\n"),
        ("data.source.year=2012", "belongs to data=voc2007, data=voc2007_proposals\n"),
        ("sweep=gaps", "-m"),
        ("+recipe.epoch=2", "Did you mean recipe.epochs?"),
        ("+foo=1", "no setting foo"),
        ("+bank_gib.x=1", "no setting bank_gib.x"),
        ("++data.root=x", " data=folder,"),
    ],
)
def test_a_typing_mistake_is_one_line(
    launched: Launched, capsys: pytest.CaptureFixture[str], word: str, expected: str
) -> None:
    assert launched(refuse, "train", word) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("experiment=card2022", " python -m relloc.train experiment=card2022\n"),
        ("runs", " checkpoint=runs\n"),
        ("random", " checkpoint=random\n"),
    ],
)
def test_a_mistake_of_an_evaluation_is_told_with_what_to_write(
    launched: Launched, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    (tmp_path / "runs").mkdir()
    assert launched(refuse, "evaluate", word) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("+optimizer.dampening=0.1", "++seed=3", "+hydra.job.env_set.A=b"),
        ("launcher=slurm", "hydra.mode=RUN", "+launcher.submitit.mem_per_gpu=64G"),
        ("+eval.mine._target_=a.b", "+eval.mine.k=3", "+eval.other={_target_:a.b}"),
        ("-m", "sweep=gaps", "hydra/launcher=basic"),
    ],
    ids=" ".join,
)
def test_what_something_reads_may_be_added(launched: Launched, words: tuple[str, ...]) -> None:
    assert launched(lambda _config: None, "train", *words) == 0


def test_help_on_a_setting_is_printed(
    launched: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launched(refuse, "train", "--help", "grid.gap_px") == 0
    assert capsys.readouterr().out.startswith("grid.gap_px: 21 by default")


def test_an_evaluation_says_whose_data_it_takes(
    launched: Launched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = []
    (tmp_path / "run").mkdir()
    source = "{_target_: relloc.data.folder.folder, name: mine}"
    data = f"{{name: mine, root: null, shards: null, source: {source}}}"
    (tmp_path / "run" / "config.yaml").write_text(f"data: {data}\n")

    def note(config: DictConfig) -> None:
        names.append(config.data.name)

    assert launched(note, "evaluate", "checkpoint=run") == 0
    assert launched(note, "evaluate", "checkpoint=run", "data=photos") == 0
    assert names == ["mine", "photos"]
    assert "data=folder" in capsys.readouterr().out


def test_messages_do_not_act_on_the_terminal(
    launched: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_config: DictConfig) -> None:
        raise UsageError("no \x1b[31mimages\r")

    assert launched(fail, "evaluate") == 2
    assert capsys.readouterr().err == "relloc: no \\x1b[31mimages\\r\n"


OF_A_PRESET = ("experiment=gap_jitter_small", "data.root=/x")


@pytest.mark.parametrize(
    "words",
    [
        ("eval=[]", "eval.voc07_low_shot.shots=[1]"),
        ("eval=[]", "eval.linear_fast.data.root=/y"),
        ("eval=[knn]", "eval.linear_fast.data.name=y"),
        ("eval=[linear_fast]", "eval.knn.data.root=/y"),
        ("eval=[linear_fast]", "data@eval.knn.data=photos"),
        ("eval=[linear_fast]", "+eval.mine={k: 3}"),
    ],
    ids=" ".join,
)
def test_a_typed_setting_of_an_evaluation_that_is_left_out_is_refused(
    launched: Launched, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert launched(refuse, "train", *OF_A_PRESET, *words) == 2
    message = capsys.readouterr().err
    name = re.split("[.=]", words[1].removeprefix("data@"))[1]
    assert f"eval.{name}" in message
    # Which evaluation would use it, if it is one
    assert f"eval={name}" in message or name == "mine"


@pytest.mark.parametrize(
    "words",
    [
        ("eval=[]",),
        ("eval=[]", "study=[]"),
        # The folder of linear_fast is that of knn too.
        ("eval=[knn]", "eval.linear_fast.data.root=/y"),
        ("eval=[knn]", "~eval.voc07_low_shot.shots"),
        ("eval=[linear_fast]", "eval.linear_fast.data.root=/y"),
    ],
    ids=" ".join,
)
def test_an_evaluation_of_a_preset_may_be_left_out(
    launched: Launched, words: tuple[str, ...]
) -> None:
    recorded = []

    def note(config: DictConfig) -> None:
        recorded.append(Invocation.of(config))

    assert launched(note, "train", *OF_A_PRESET, *words) == 0
    [invocation] = recorded
    chosen = {name for name in ("knn", "linear_fast") if name in words[0]}
    assert set(invocation.settings["eval"]) == chosen
    written = OmegaConf.create(invocation.files[CONFIG_FILE])
    assert written == invocation.settings
