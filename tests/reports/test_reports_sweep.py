import csv
import dataclasses
import io
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from relloc.report import main
from relloc.reports.pictures import draw_sweep
from relloc.reports.render import as_markdown
from relloc.reports.sweep import as_report, mean_tables, read_sweep
from relloc.results import Result
from relloc.sweeps.points import Point, note_job
from relloc.sweeps.sweep import Sweep
from relloc.tracking.record import RunRecord, write_status

GAPS, JITTERS, SEEDS = (16, 0, 100), (7, 0), (0, 1)
FEATURE4 = "linear/feature4/top1"
NewPoint = Callable[..., Point]


@pytest.fixture
def new_point(new_run, tmp_path: Path) -> NewPoint:
    """A point of a sweep, which is done if it has results; `swept` are its settings."""

    def new(*rows: Result, kind: str = "train", **swept: object) -> Point:
        words = tuple(f"{key}={value}" for key, value in swept.items())
        name = " ".join(words)
        folder = tmp_path / "runs" / name
        if rows:
            new_run(name, *rows)
            write_status(folder, "FINISHED")
        words = tuple(f"grid.{word}" if "_px" in word else word for word in words)
        return Point(
            kind=kind, name=name, overrides=("model=small", *words), identity=name, folder=folder
        )

    return new


@pytest.fixture
def points(new_point: NewPoint, result) -> list[Point]:
    """Gap x jitter x seed: linear at feature4 is 10 + gap / 100 + jitter + seed.

    Gap 100 with jitter 0 is not done.
    """

    def rows(value: float, seed: int) -> Sequence[Result]:
        ours = {"checkpoint": f"{value}/backbone.safetensors", "dataset": "photos", "seed": seed}
        return (
            result("pretext", "avgpool", "top1", 12.5, **ours),
            result("linear", "feature4", "top1", 1.0, **ours),  # measured anew below
            result("linear", "feature4", "top1", value, **ours),
            result("linear", "feature5", "top1", 20 - value, **ours),
            result("linear", "feature4", "top1_tuned", 99.0, **ours),
            result(
                "linear",
                "feature4",
                "top1",
                9.0 + seed,
                dataset="photos",
                seed=seed,
                fingerprint=f"same {seed}",
            ),
            *(
                result("voc07_low_shot", "feature4", f"map_k{k}", float(k), **ours)
                for k in (1, 16, 96)
            ),
        )

    return [
        new_point(
            *(() if (gap, jitter) == (100, 0) else rows(10 + gap / 100 + jitter + seed, seed)),
            gap_px=gap,
            jitter_px=jitter,
            seed=seed,
        )
        for gap, jitter, seed in itertools.product(GAPS, JITTERS, SEEDS)
    ]


@pytest.fixture
def note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Sequence[Point]], Sweep]:
    """Notes a sweep in the folder of runs."""
    monkeypatch.setenv("RELLOC_RUNS", str(tmp_path / "runs"))

    def note(name: str, points: Sequence[Point]) -> Sweep:
        sweep = Sweep(tmp_path / "runs" / "sweeps" / name)
        with sweep.locked():
            sweep.add(points, ["train.py", "-m", "grid.gap_px=0,16", f"sweep={name}"])
        return sweep

    return note


def done(points: Sequence[Point]) -> list[str]:
    return ["done"] * len(points)


def tables(text: str, title: str) -> list[list[str]]:
    """Below a title, the lines of its tables without the spaces that align them."""
    below = text.partition(f"## {title}\n")[2].partition("\n#")[0]
    return [
        " ".join(line.split())
        for line in below.splitlines()
        if line.startswith("|") and "---" not in line
    ]


def test_a_sweep_is_printed_and_drawn(
    points: list[Point], note, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = note("s", points)
    note_job(
        points[-1], {"pid": 1, "host": "another", "born": ""}
    )  # which has ended without a word
    assert main(["sweep=s"]) == 0
    output = capsys.readouterr().out
    assert tables(output, "linear/top1 on photos val") == [
        "| | feature4 | feature5 |",
        "| gap_px=0, jitter_px=0, pretrained | 10.5 ± 0.7 (2) | **9.5** ± 0.7 (2) |",
        "| gap_px=0, jitter_px=7, pretrained | 17.5 ± 0.7 (2) | 2.5 ± 0.7 (2) |",
        "| gap_px=16, jitter_px=0, pretrained | 10.7 ± 0.7 (2) | 9.3 ± 0.7 (2) |",
        "| gap_px=16, jitter_px=7, pretrained | 17.7 ± 0.7 (2) | 2.3 ± 0.7 (2) |",
        "| gap_px=100, jitter_px=0, pretrained | missing, failed | missing, failed |",
        "| gap_px=100, jitter_px=7, pretrained | **18.5** ± 0.7 (2) | 1.5 ± 0.7 (2) |",
        "| random | 9.5 ± 0.7 (2) | — |",
    ]
    highest = (
        "linear/top1 on photos val at feature4, where the highest is: "
        "gap_px across and jitter_px down"
    )
    assert tables(output, highest) == [
        "| | 0 | 16 | 100 |",
        "| 0 | 10.5 ± 0.7 (2) | 10.7 ± 0.7 (2) | missing, failed |",
        "| 7 | 17.5 ± 0.7 (2) | 17.7 ± 0.7 (2) | **18.5** ± 0.7 (2) |",
    ]
    assert "## voc07_low_shot/map_k16 on photos val" in output
    assert "map_k1 " not in output
    assert (
        "failed (1): gap_px=100 jitter_px=0 seed=1; missing (1): gap_px=100 jitter_px=0 seed=0."
        in output
    )
    for point in points:
        words = "python -m relloc.train model=small {} {} {} ".format(*point.overrides[1:])
        assert (f"\n    {words}" in output) == ("gap_px=100" in words and "jitter_px=0" in words)
    picture = sweep.folder / "report.png"
    assert output.endswith(f"picture {picture}\n")
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 50


def test_a_scheduler_that_is_silent_hides_no_numbers(
    points: list[Point], note, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    note("s", points)
    monkeypatch.setenv("PATH", "")
    note_job(points[-1], {"slurm": "7"})
    assert main(["sweep=s", "--format", "markdown"]) == 0
    output = capsys.readouterr()
    assert "SLURM" in output.err
    assert "**18.5** ± 0.7 (2) |" in output.out


def test_html_and_latex_have_the_same_numbers_and_escape_names(
    points: list[Point], note, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note("s", points)
    assert main(["sweep=s", "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "<title>Sweep s</title>" in page
    assert ("gap_px=100, jitter_px=7" in page, "gap_px=100, jitter_px=0" in page) == (True, True)
    assert page.count("<b>18.5</b>") == 2  # in the table and in the grid
    assert page.count("python -m relloc.train model=small") == 2  # of the points that are not done
    assert main(["s", "--out", str(tmp_path / "r.tex")]) == 0  # the name alone
    text = (tmp_path / "r.tex").read_text()
    assert r"gap\_px=100, jitter\_px=7" in text
    assert r"\textbf{18.5} $\pm$ 0.7 (2)" in text
    capsys.readouterr()
    assert main([f"sweep={tmp_path / 'runs/sweeps/s'}", "--format", "markdown"]) == 0
    assert "**18.5** ± 0.7 (2) |" in capsys.readouterr().out


def drawn(points: list[Point], monkeypatch: pytest.MonkeyPatch) -> Figure:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    draw_sweep(read_sweep("s", points, done(points), FEATURE4), Path("p.png"))
    return figures[0]


def test_maps_have_the_first_setting_across_and_the_other_up(
    points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    axis = drawn(points, monkeypatch).axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("gap (px)", "jitter (px)")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "16", "100"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "7"]
    means = [text.get_text().partition("\n")[0] for text in axis.texts]
    assert means == ["10.5", "10.7", "—", "17.5", "17.7", "18.5"]
    assert axis.texts[0].get_text() == "10.5\n± 0.7"
    assert axis.get_title("left").split("\n") == [
        "linear/top1",
        "on photos val, n = 300",
        "feature4 (random 9.5)",
    ]


def test_tables_of_a_single_column_share_a_row(
    new_point: NewPoint, result, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        result("linear", layer, "top1", 50.0, checkpoint="x") for layer in ("feature3", "feature4")
    ]
    for metric in ("effect_lens", "effect_black_border", "effect_continuity"):
        rows.append(result("shortcuts", "", metric, 1.0, column="effect", checkpoint="x"))
    made = [
        new_point(*rows, gap_px=gap, jitter_px=jitter) for gap, jitter in ((0, 0), (0, 7), (8, 0))
    ]
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    draw_sweep(read_sweep("s", made, done(made), "*"), Path("p.png"))
    tops = {}
    for axis in figures[0].axes:
        title = axis.get_title("left")
        if title and axis.get_visible():
            tops[title.split("\n")[0]] = axis.get_subplotspec().rowspan.start
            # Bright is good, which of shortcuts is little
            is_reversed = axis.images[0].get_cmap().name.endswith("_r")
            assert is_reversed == title.startswith("shortcuts")
    assert len(tops) == 5
    of_linear = {row for name, row in tops.items() if name.startswith(("linear", "feature"))}
    of_shortcuts = {row for name, row in tops.items() if name.startswith("shortcuts")}
    assert (len(of_linear), len(of_shortcuts)) == (1, 1)
    assert of_linear != of_shortcuts


def test_of_one_setting_a_curve_is_drawn_with_its_spread(
    points: list[Point], monkeypatch: pytest.MonkeyPatch
) -> None:
    (axis,) = drawn(
        [point for point in points if "grid.jitter_px=7" in point.overrides], monkeypatch
    ).axes
    curve, random = axis.lines
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([0, 16, 100], [17.5, 17.66, 18.5])
    assert axis.get_xlabel() == "gap (px)"
    low, high = (limit(axis.collections[0].get_paths()[0].vertices[:, 1]) for limit in (min, max))
    assert (low, high) == (pytest.approx(17.5 - 0.5**0.5), pytest.approx(18.5 + 0.5**0.5))
    assert random.get_ydata() == [9.5, 9.5]


def test_of_three_settings_two_are_told_together(
    new_point: NewPoint, result, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = result("linear", "feature4", "top1", 50.0, checkpoint="x")
    made = [
        new_point(row, gap_px=gap, jitter_px=jitter, color=color)
        for gap, jitter, color in itertools.product((0, 8), (0, 7), ("project", "drop"))
    ]
    axis = drawn(made, monkeypatch).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "0, project",
        "0, drop",
        "7, project",
        "7, drop",
    ]
    text = as_markdown(as_report(read_sweep("s", made, done(made)), []))
    assert len(tables(text, "linear/top1 on in1k val")) == 1 + 8
    assert "not done" not in text


def test_pairs_of_settings_that_no_point_has_are_left_blank(new_point: NewPoint, result) -> None:
    row = result("linear", "feature4", "top1", 50.0, checkpoint="x")
    made = [
        new_point(row, gap_px=gap, jitter_px=jitter) for gap, jitter in ((0, 0), (0, 7), (8, 0))
    ]
    text = as_markdown(as_report(read_sweep("s", made, done(made)), []))
    highest = (
        "linear/top1 on in1k val at feature4, where the highest is: "
        "gap_px across and jitter_px down"
    )
    assert tables(text, highest) == [
        "| | 0 | 8 |",
        "| 0 | **50.0** | **50.0** |",
        "| 7 | **50.0** | |",
    ]


def test_seeds_are_what_is_swept_where_nothing_else_is(points: list[Point]) -> None:
    ((_, table),) = mean_tables(read_sweep("s", points[:2], done(points[:2]), FEATURE4))
    assert dict(table["mean"]["feature4"]) == {
        ("0", "pretrained"): 17.16,
        ("1", "pretrained"): 18.16,
        ("", "random"): 9.5,
    }


def test_evaluated_files_are_told_by_their_names_and_random_weights_by_setting_where_that_matters(
    new_point: NewPoint, result
) -> None:
    made = [
        new_point(
            *(
                result("knn", "feature4", "top1_k20", 10.0 + size, checkpoint=f"/x/{name}.pth")
                for name in "ab"
            ),
            result("knn", "feature4", "top1_k20", size / 10, fingerprint=f"{size}"),
            kind="evaluate",
            **{"view.short_px": size, "checkpoint": "[/x/a.pth,/x/b.pth,random]"},
        )
        for size in (64, 256)
    ]
    text = as_markdown(
        as_report(read_sweep("s", made, done(made)), [f"command {number}" for number in range(11)])
    )
    assert text.endswith("    command 8\n\nand 2 more\n")
    assert tables(text, "knn_in1k/top1_k20 on in1k val")[:7] == [
        "| | feature4 |",
        "| short_px=64, a.pth | 74.0 |",
        "| short_px=64, b.pth | 74.0 |",
        "| short_px=64, random | 6.4 |",
        "| short_px=256, a.pth | **266.0** |",
        "| short_px=256, b.pth | **266.0** |",
        "| short_px=256, random | 25.6 |",
    ]


def test_both_strides_of_a_network_have_tables_of_their_own(new_point: NewPoint, result) -> None:
    ours = {"checkpoint": "x/backbone.safetensors"}
    standard = result("knn", "feature5", "top1_k20", 54.6, **ours)
    own = result("knn", "feature5", "top1_k20", 59.8, **ours, strides="as_trained")
    made = [new_point(standard, own, **{"model.backbone.last_stride": 1})]
    text = as_markdown(as_report(read_sweep("s", made, done(made)), []))
    for name, value in (("knn_in1k", "54.6"), ("knn_in1k_strides_as_trained", "59.8")):
        [_, line] = tables(text, f"{name}/top1_k20 on in1k val")
        assert value in line


def test_both_decoders_of_a_point_have_tables_of_their_own(new_point: NewPoint, result) -> None:
    ours = {"checkpoint": "x/backbone.safetensors"}
    usual = result("knn", "feature5", "top1_k20", 54.6, **ours)
    of_gpu = result("knn", "feature5", "top1_k20", 59.8, **ours, decoder="nvJPEG")
    made = [new_point(usual, of_gpu, **{"grid.gap_px": 8})]
    text = as_markdown(as_report(read_sweep("s", made, done(made)), []))
    for name, value in (("knn_in1k", "54.6"), ("knn_in1k_nvJPEG", "59.8")):
        [_, line] = tables(text, f"{name}/top1_k20 on in1k val")
        assert value in line


def test_points_of_both_decoders_are_no_repeats_of_each_other(new_point: NewPoint, result) -> None:
    points = []
    for decode, decoder, value in (("cpu", "", 54.6), ("device", "nvJPEG", 59.8)):
        ours = result("knn", "feature5", "top1_k20", value, checkpoint="x", decoder=decoder)
        # Random weights were measured alike by all points of a decoder.
        random = result("knn", "feature5", "top1_k20", value / 10, decoder=decoder)
        random = dataclasses.replace(random, fingerprint=f"random {decoder}")
        points += [new_point(ours, random, decode=decode, seed=seed) for seed in (0, 1)]
    text = as_markdown(as_report(read_sweep("s", points, done(points)), []))
    usual = tables(text, "knn_in1k/top1_k20 on in1k val")
    of_gpu = tables(text, "knn_in1k_nvJPEG/top1_k20 on in1k val")
    assert [line.count("decode=cpu") for line in usual] == [0, 1, 0]
    assert [line.count("decode=device") for line in of_gpu] == [0, 1, 0]
    assert "5.5" in usual[2]
    assert "6.0" in of_gpu[2]


def test_of_random_weights_alone_there_is_a_table_and_no_picture(
    new_point: NewPoint, result, note, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [
        new_point(result("knn", "feature4", "top1_k20", 9.0, seed=seed), kind="evaluate", seed=seed)
        for seed in (0, 1)
    ]
    note("s", made)
    assert main(["sweep=s"]) == 0
    output = capsys.readouterr().out
    assert "9.0" in output
    assert re.search(r"nothing to draw .*\bsweep s\b", output)
    assert not list(tmp_path.rglob("*.png"))
    assert main(["sweep=s", "--format", "png"]) == 2
    assert re.search(r"nothing to draw .*\bsweep s\b", capsys.readouterr().err)


def test_a_setting_that_a_command_leaves_at_its_default_is_what_the_run_noted(
    new_point: NewPoint, result, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = result("linear", "feature4", "top1", 50.0, checkpoint="x")
    made = [new_point(row, gap_px=8), new_point(row, seed=0)]
    RunRecord(name="r", experiment="e", params={"grid.gap_px": 48, "seed": 0}).write(made[1].folder)
    axis = drawn(made, monkeypatch).axes[0]
    assert list(axis.lines[0].get_xdata()) == [8, 48]


def test_csv_has_each_result_in_full_and_each_point(
    points: list[Point], note, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note("s", points)
    assert main(["sweep=s", "--format", "csv", "--out", str(tmp_path / "table")]) == 0
    assert capsys.readouterr().out == f"report  {tmp_path / 'table'}\n"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table").read_text())))
    one = {
        "gap_px": "16",
        "jitter_px": "7",
        "seed": "1",
        "weights": "pretrained",
        "eval": "linear",
        "layer": "feature4",
    }
    (found,) = (row for row in rows if one.items() <= row.items())
    assert (float(found["value"]), found["state"], found["n"]) == (18.16, "done", "300")
    assert [
        (row["gap_px"], row["state"], row["value"]) for row in rows if row["state"] != "done"
    ] == [("100", "missing", "")] * 2


def test_a_picture_alone_is_written_where_it_is_named(
    points: list[Point], note, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note("s", points)
    out = tmp_path / "maps.svg"
    assert main(["sweep=s", "--metrics", FEATURE4, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"picture {out}\n"
    assert out.read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sweep=t"], ["runs/sweeps", "broken, empty, s\n"]),
        (["sweep=s", "--rows", "all"], ["--rows", "sweep=s"]),
        (["sweep=s", "sweep=empty"], ["sweep=s", "alone"]),
        (["runs", "sweep=s"], ["sweep=s", "alone"]),
        (
            ["sweep=s", "--metrics", "kn*"],
            ["--metrics kn*", "linear/*/top1, linear/*/top1_tuned, pretext/top1\n"],
        ),
        (["sweep=empty"], ["sweep empty", "no", "python -m relloc.sweep status"]),
        (["sweep=broken"], ["results.jsonl line 1"]),
        (
            ["sweep=s", "--format", "doc"],
            ["--format doc", "markdown, csv, html, latex, png, svg, pdf"],
        ),
        (
            ["sweep=s", "--out", "r.doc"],
            ["--out r.doc", ".md, .csv, .html, .tex, .png, .svg, .pdf"],
        ),
        (["sweep=s", "--out", "none/r.png"], ["none/r.png", "No such file or directory"]),
        (["sweep=s", "--out", "none/r.csv"], ["none/r.csv", "No such file or directory"]),
        (["--metrics", "kn*"], ["--metrics", "sweep=NAME"]),
    ],
)
def test_a_mistake_is_one_message(
    new_point: NewPoint,
    result,
    note,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        result("linear", "feature4", metric, 9.0, checkpoint="x")
        for metric in ("top1", "top1_tuned")
    ]
    rows.append(result("pretext", "", "top1", 9.0, checkpoint="x"))
    broken, none = new_point(*rows, gap_px=0), new_point(gap_px=8)
    note("s", [broken, none])
    note("empty", [none])
    if arguments == ["sweep=broken"]:
        (broken.folder / "results.jsonl").write_text("{}\n")
    note("broken", [broken])
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("relloc: ")
    assert [words for words in named if words not in err] == []
