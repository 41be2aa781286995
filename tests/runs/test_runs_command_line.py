"""The words of a command line: flags anywhere, and how to write a word that can't be read."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from relloc.errors import UsageError
from relloc.runs import command_line


def refused(*words: str, sweeps: bool = False) -> str:
    with pytest.raises(UsageError) as error:
        command_line.check(words, sweeps=sweeps)
    return str(error.value)


def proposed(message: str) -> str:
    """What the message says is to be written, as the shell gives it to a command."""
    found = re.search(r"[Ww]rite (.*)", message)
    assert found
    return shlex.split(found[1])[0]


@pytest.mark.parametrize(
    ("arguments", "flags", "words"),
    [
        (["seed=0", "-m", "optimizer.lr=1,2"], ["-m"], ["seed=0", "optimizer.lr=1,2"]),
        (["seed=0", "--cfg", "job"], ["--cfg", "job"], ["seed=0"]),
        (["seed=0", "-c", "job", "-m"], ["-c", "job", "-m"], ["seed=0"]),
        (["--info", "seed=0"], ["--info=all"], ["seed=0"]),
        (["-i", "defaults", "seed=0"], ["--info=defaults"], ["seed=0"]),
        (["seed=0", "--multi"], ["--multirun"], ["seed=0"]),
        (["seed=0", "--config-dir=x"], ["--config-dir=x"], ["seed=0"]),
        (["grid.gap_px", "--help"], ["--help"], ["grid.gap_px"]),
        (["~data", "+x=1", "--", "-m"], [], ["~data", "+x=1", "-m"]),
    ],
)
def test_flags_stand_before_settings_wherever_they_were(
    arguments: list[str], flags: list[str], words: list[str]
) -> None:
    read = command_line.read(arguments)
    assert (list(read.flags), list(read.words)) == (flags, words)


@pytest.mark.parametrize("arguments", [["--seed", "0"], ["--seed=0"], ["x=1", "--seed", "0"]])
def test_a_setting_with_dashes_is_shown_without(arguments: list[str]) -> None:
    with pytest.raises(UsageError, match="seed=0"):
        command_line.read(arguments)


@pytest.mark.parametrize(
    "value",
    [
        *(
            "epoch=9-step=100.ckpt",
            "a#b.ckpt",
            "日本.ckpt",
            "a[1].ckpt",
            "model(1).ckpt",
            "it's.ckpt",
            'a"b',
            "a;b&c!",
        ),
        *(
            "{a}.ckpt",
            "a{b",
            "x<y>",
            "a'b\"c",
            "ends\\'",
            "^caret",
            "50€",
            "a b=c d",
            "[a=b]c",
            "(x)",
        ),
    ],
)
def test_a_value_that_is_taken_only_quoted_is_shown_quoted(value: str) -> None:
    (word,) = OverridesParser.create().parse_overrides([proposed(refused(f"checkpoint={value}"))])
    assert word.value() == value


@given(
    st.text(
        st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=200)
def test_any_value_can_be_written_as_a_word(value: str) -> None:
    for plain in (value, [value, "random"]):
        (typed,) = shlex.split(command_line.as_word("key", plain))
        (word,) = OverridesParser.create().parse_overrides([typed])
        assert word.value() == plain


@given(st.text("ab=#~[]{}(),:'\"\\\\ .é$-1/", min_size=1, max_size=8))
@settings(max_examples=300)
def test_any_word_is_read_as_hydra_does_or_refused_with_one_that_it_reads(value: str) -> None:
    try:
        (word,) = command_line.check([f"checkpoint={value}"], sweeps=False)
    except UsageError as error:
        if "Write" in str(error) and not value.startswith("~"):
            OverridesParser.create().parse_overrides([proposed(str(error))])
    else:
        assert word.input_line == f"checkpoint={value}"


def test_elements_of_a_list_and_of_a_sweep_are_quoted_one_by_one() -> None:
    assert proposed(refused("checkpoint=[a=b.ckpt,random]")) == 'checkpoint=["a=b.ckpt",random]'
    assert proposed(refused("checkpoint=a=b,random", sweeps=True)) == 'checkpoint="a=b",random'


@pytest.mark.parametrize(
    ("value", "closed"),
    [
        ("[knn", "[knn]"),
        ("knn]", "[knn]"),
        ("[[knn", "[[knn]]"),
        ("[a,[b,c", "[a,[b,c]]"),
        ("[{a:1", "[{a:1}]"),
    ],
)
def test_every_open_bracket_is_closed(value: str, closed: str) -> None:
    assert proposed(refused(f"eval={value}")) == f"eval={closed}"


def test_several_values_without_a_sweep_are_a_list_or_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert proposed(refused("checkpoint=a,b")) == "checkpoint=[a,b]"
    monkeypatch.chdir(tmp_path)
    Path("a,b").touch()
    assert proposed(refused("checkpoint=a,b")) == 'checkpoint="a,b"'


@pytest.mark.parametrize(
    "word", ["launcher.partition=a,b", "hydra.launcher.partition=a,b", "seed=0,1"]
)
def test_a_launcher_may_take_several_values(word: str) -> None:
    command_line.check(["launcher=slurm", word], sweeps=False)


def test_members_that_match_a_pattern_are_left_to_hydra() -> None:
    [word] = command_line.check(["color=glob(*)"], sweeps=True)
    assert command_line.values(word) == []
    assert "several values" in refused("color=glob(*)")


def test_names_that_stay_the_same_may_look_like_numbers() -> None:
    command_line.check(["sweep=3", "hydra.run.dir=2024", "runs=7"], sweeps=False)
    assert "'sweep=" in refused("sweep=2024_10")


def test_a_home_folder_is_shown_as_the_shell_expands_it() -> None:
    assert '"checkpoint=$HOME/x.ckpt"' in refused("checkpoint=~/x.ckpt")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("seed", "0"), "seed=0"),
        (("seed:0",), "seed=0"),
        (("grid.gap_px",), "grid.gap_px=VALUE"),
        (("eval=[knn",), "eval=[knn]"),
        (("eval=knn]",), "eval=[knn]"),
        (("",), "empty"),
        (("=3",), "name of a setting"),
        (("–m",), "KEY=VALUE"),
    ],
)
def test_a_word_that_sets_nothing_is_told_with_what_does(words: tuple[str, ...], hint: str) -> None:
    assert hint in refused(*words)


@pytest.mark.parametrize("value", ["2024_10_01", "1e3", "true", "[7,random]"])
def test_a_name_that_would_be_read_as_a_number_is_asked_for_in_quotes(value: str) -> None:
    (word,) = OverridesParser.create().parse_overrides([proposed(refused(f"checkpoint={value}"))])
    assert str(word.value()).replace("'", "").replace(" ", "") == value


@pytest.mark.parametrize(
    "value", ["/a b/c", "a", "x=1", "null", "1", "it's", "", "a,b", "é", "$HOME", "-5", "a\\b", "~"]
)
def test_a_value_is_written_so_that_it_is_read_again(value: str) -> None:
    for plain in (value, [value, value], {"key": value}):
        (typed,) = shlex.split(command_line.as_word("key", plain))
        (word,) = command_line.check([typed], sweeps=False)
        assert word.value() == plain


@pytest.mark.parametrize(
    ("name", "hint"), [("Random", "random"), ("torchvison", "torchvision"), ("runs/on", "runs/one")]
)
def test_a_misspelt_checkpoint_is_told_with_what_there_is(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/one").mkdir(parents=True)
    with pytest.raises(UsageError, match=f"did you mean checkpoint={hint}"):
        command_line.check_checkpoints(command_line.check([f"checkpoint={name}"], sweeps=False))
    command_line.check_checkpoints(
        command_line.check([f"checkpoint=[{hint},random]"], sweeps=False)
    )


def test_checkpoints_are_listed_for_each_point() -> None:
    words = command_line.check(["seed=0,1", "checkpoint=[a,b],'c=d',random"], sweeps=True)
    assert command_line.checkpoints(words) == [["a", "b"], ["c=d"], ["random"]]
