"""Tests the table of results at any width, and names with markup or control characters."""

import dataclasses
import io
import time

import pytest
from rich.console import Console

from relloc.results import LAYERS, Result
from relloc.runs import console


def row(
    evaluation: str, layer: str, weights: str, batch_norm: str = "as_trained", value: float = 61.7
) -> Result:
    metric = "top1_k20" if evaluation == "knn" else "top1"
    return Result(
        eval=evaluation,
        dataset="photos",
        split="val",
        layer=layer,
        metric=metric,
        headline=True,
        value=value,
        n=10,
        seed=0,
        protocol="3.7",
        checkpoint=weights,
        model="small",
        batch_norm=batch_norm,
    )


def rows(*weights: str) -> list[Result]:
    return [
        row(evaluation, layer, one, batch_norm, 10.5 + 10 * number)
        for evaluation in ("linear_places205", "knn")
        for one in weights
        for batch_norm in ("as_trained", "recalibrated")
        for number, layer in enumerate(LAYERS)
    ]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch):
    def at(width: int, results: list[Result], encoding: str = "utf-8") -> str:
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
        made = Console(
            soft_wrap=True, highlight=False, markup=False, emoji=False, width=width, file=file
        )
        monkeypatch.setattr(console, "console", made)
        console.show_results(results)
        file.flush()
        return file.buffer.getvalue().decode(encoding)

    return at


def test_only_heads_that_are_there_are_explained(shown) -> None:
    assert shown(80, rows("random")).endswith("from the image on; pool: avgpool\n")
    pool = [row("knn", "avgpool", "random", "as_trained", 1.0)]
    assert shown(80, pool).endswith("\npool: avgpool\n")
    of_no_layer = [row("neighbors", "", "random", "as_trained", 1.0)]
    assert "avgpool" not in shown(80, of_no_layer)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize(
    "run", ["run", "a_run_of_a_name_that_is_longer_than_any_column_can_be_on_a_small_terminal"]
)
def test_no_number_or_name_is_cut(shown, width: int, run: str) -> None:
    text = shown(
        width,
        rows(f"/runs/{run}/backbone.safetensors", "/runs/other/backbone.safetensors", "random"),
    )
    assert "…" not in text
    for number in range(len(LAYERS)):
        assert text.count(f"{10.5 + 10 * number:.1f}") == 12
    heads = next(line for line in text.splitlines() if "f1" in line)
    assert heads.split()[-6:] == ["f1", "f2", "f3", "f4", "f5", "pool"]
    assert max(map(len, text.splitlines())) <= max(width, 75)
    letters = "".join(char for char in text if char.isalnum() or char == "_")
    if run == "run" or width == 200:
        assert run in letters


def test_a_usual_table_fits_80_columns_with_whole_names(shown) -> None:
    text = shown(80, rows("/runs/run/backbone.safetensors", "random"))
    for name in ("linear_places", "pretrained", "recalibrated", "as trained", "knn top1_k20"):
        assert name in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_terminal_without_unicode_gets_the_table(shown) -> None:
    text = shown(80, rows("/runs/run/backbone.safetensors", "random"), encoding="ascii")
    assert "10.5" in text
    assert "\\u" not in text


@pytest.mark.parametrize(
    "name", ["[red]x", "[/]", "x\x1b[31m", "x\r", ":smile:", "a\u202eb", "[link=file:///]x[/link]"]
)
def test_names_are_shown_and_mean_nothing(shown, name: str) -> None:
    text = shown(
        120,
        rows(f"/runs/{name.replace('/', '')}/backbone.safetensors", "/runs/b/backbone.safetensors"),
    )
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\r" not in text
    assert console.escaped(name.replace("/", "")) in text


@pytest.mark.parametrize("name", ["[/]", "x\x1b[31m", "a\nrelloc: finished", "[bold]b"])
def test_a_line_and_a_bar_take_any_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    made = Console(
        soft_wrap=True,
        markup=False,
        emoji=False,
        highlight=False,
        width=100,
        file=file,
        force_terminal=True,
    )
    monkeypatch.setattr(console, "console", made)
    console.print_message(f"data    {name}")
    with console.progress_bar(f"features of {name}", 2) as update:
        update(1, name)
        update(2, name)
    assert f"data    {console.escaped(name)}\n" in file.getvalue()
    assert "x\x1b[31m" not in file.getvalue()


@pytest.mark.parametrize(("columns", "width"), [("100", 100), ("0", 120), ("many", 120), ("", 120)])
def test_a_pipe_has_the_width_of_columns_or_enough_for_a_table(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert console._width() == width


def test_a_command_below_a_message_is_a_line_and_a_line_end_in_a_name_is_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.print_message("send it later with\n  python -m relloc.sync a\nb")
    assert capsys.readouterr().out == "send it later with\n  python -m relloc.sync a\\nb\n"


def test_the_next_command_is_typed_as_it_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.delenv("RELLOC_SWEEP", raising=False)
    console.print_next("evaluate", checkpoint=["a b=c", "random"])
    assert (
        capsys.readouterr().out
        == "next: python -m relloc.evaluate 'checkpoint=[\"a b=c\",random]'\n"
    )
    monkeypatch.setenv("RELLOC_SWEEP", "s")
    console.print_next("evaluate", checkpoint="a")
    assert capsys.readouterr().out == ""


def test_the_title_names_what_was_measured_on_training_images(shown) -> None:
    held_out = row("knn", "avgpool", "random")
    of_training = dataclasses.replace(held_out, eval="neighbors", split="train")
    assert "training images" not in shown(200, [held_out])
    mixed = shown(200, [held_out, of_training, of_training])
    assert mixed.count("neighbors on training images") == 1
    alone = shown(200, [of_training])
    assert "on training images" in alone
    assert "held out" not in alone


def test_an_embedding_has_a_column_and_small_numbers_have_their_digits(shown) -> None:
    layer = dataclasses.replace(
        row("neighbors", "feature3", "random", value=0.2468), unit="correlation", column="feature3"
    )
    embedding = dataclasses.replace(layer, layer="", column="embedding", value=0.5864)
    rank = dataclasses.replace(layer, metric="rankme", unit="directions", value=64.18)
    share = dataclasses.replace(layer, metric="accuracy", unit="%", value=5.04)
    text = shown(200, [layer, embedding, rank, share])
    [head] = [line for line in text.splitlines() if "batch norm" in line]
    assert head.split()[-2:] == ["f3", "embedding"]
    assert "value" not in head
    [line] = [line for line in text.splitlines() if "correlation" in line]
    assert line.split()[-2:] == ["0.247", "0.586"]
    assert "64.2" in text
    assert "5.0 " in text


def test_numbers_of_two_batch_norms_stand_in_lines_of_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    of_network = row("knn", "", "random", "as_trained", 1.5)
    of_features = row("knn", "", "random", "recalibrated", 2.5)
    console.print_measured([of_network, of_features])
    [first, second] = capsys.readouterr().out.splitlines()
    assert "as trained" in first
    assert "1.5" in first
    assert "recalibrated" in second
    assert "2.5" in second


def test_numbers_of_two_decoders_stand_in_lines_of_their_own(
    shown, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = row("knn", "feature4", "/runs/a/backbone.safetensors", value=1.5)
    of_gpu = dataclasses.replace(usual, decoder="nvJPEG", value=2.5)
    console.print_measured([usual, of_gpu])
    for lines in (capsys.readouterr().out, shown(200, [usual, of_gpu])):
        [first] = [line for line in lines.splitlines() if "1.5" in line]
        [second] = [line for line in lines.splitlines() if "2.5" in line]
        assert "nvJPEG" not in first
        assert "nvJPEG" in second


def test_time_left_is_counted_from_the_first_call_and_a_text_made_where_it_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console, "_last_line", {})
    made = []

    def text() -> str:
        made.append(now[0])
        return "images"

    with console.progress_bar("encode", 1100, 1000) as update:
        # Workers start and kernels are compiled until the first is done.
        now[0] = 90.0
        update(1001, text)
        for done in range(1002, 1101):
            now[0] += 2.0
            update(done, text)
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert "1001/1100" in first
    assert "left" not in first
    # 84 more at 2 s
    assert "1016/1100" in second
    assert " 168 s left" in second
    assert "1100/1100" in last
    assert " 0 s left" in last
    assert made[:3] == [90.0, 120.0, 150.0]
