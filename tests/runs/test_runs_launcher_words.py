"""Commas in settings of the launcher."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString

from relloc.runs.launcher_words import with_one_value_each


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("launcher.partition=a,b", "a,b"),
        ("hydra.launcher.exclude=n1,n2", "n1,n2"),
        (
            "hydra.launcher.partition=[a,b]",
            "a,b",
        ),  # text, where launcher.partition takes a list as well
        ("hydra.launcher.exclude=[n1, n2]", "n1,n2"),
        ("launcher.partition=[a,b]", ["a", "b"]),
        ("+launcher.additional_parameters.clusters=a,b", "a,b"),
        ("launcher.exclude=n[1-3],n7", "n[1-3],n7"),
        ("launcher.constraint=[rack1|rack2]", "[rack1|rack2]"),
        ("launcher.constraint=a100&ib", "a100&ib"),
        ("launcher.constraint=it's|this", "it's|this"),
        ("launcher.constraint=a,b\\", "a,b\\"),
        (
            "launcher.setup=[module load cuda,ulimit -n 65536]",
            ["module load cuda", "ulimit -n 65536"],
        ),
        ("launcher.gres=gpu:a100:4", "gpu:a100:4"),
        ("launcher.partition='a,b'", "a,b"),
        ("launcher.nodes=2", 2),
        ("launcher.partition=null", None),
    ],
)
def test_each_is_one_value(word: str, value: object) -> None:
    (made,) = with_one_value_each([word])
    parsed = OverridesParser.create().parse_override(made)
    assert not parsed.is_sweep_override()
    given = parsed.value()
    assert (given.text if isinstance(given, QuotedString) else given) == value


@pytest.mark.parametrize(
    "word",
    [
        "grid.gap_px=0,16",
        "launcher=slurm,local",
        "launcher.partition=choice(a,b)",
        "-m",
        "--config-dir",
        "seed=1,2",
    ],
)
def test_other_words_stay(word: str) -> None:
    assert with_one_value_each([word]) == [word]
