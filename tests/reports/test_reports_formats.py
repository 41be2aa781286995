import csv
import dataclasses
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from relloc.reports.as_csv import as_csv
from relloc.reports.load import Measured, Run
from relloc.reports.parts import Report
from relloc.reports.render import as_html, as_latex, as_markdown, escape_latex, escape_markdown
from relloc.reports.table import make_report
from relloc.results import Result

OURS = "/data/runs/card_2022/backbone.safetensors"


@pytest.fixture
def rows(result: Callable[..., Result]) -> list[Result]:
    shot = {"dataset": "voc2007", "protocol": "3.2", "details": ("<five> draws & 100 % of test",)}
    return [
        result("linear_in1k", "feature4", "top1", 51.0, checkpoint=OURS),
        result("linear_in1k", "feature4", "top1", 9.0),
        result("voc07_low_shot", "feature4", "map_k1", 9.0, **shot),
        result("voc07_low_shot", "feature4", "map_k1_std", 0.5, **shot),
        result("linear", "feature1", "top1", 66.25, dataset="imagenette", model="small"),
    ]


@pytest.fixture
def report(rows: list[Result]) -> Report:
    run = Run(
        folder=Path("/data/runs/a"),
        name='a "b" <c> x_y',
        commit="6a6cf28a1b2c3d4e5f60-dirty",
        started_ms=1,
    )
    return make_report(Measured(result=row, run=run) for row in rows)


def test_csv_gives_all_results_back(report: Report, rows: list[Result]) -> None:
    lines = [
        line for line in csv.DictReader(io.StringIO(as_csv(report))) if line["origin"] == "ours"
    ]

    def texts(row: Result) -> dict[str, str]:
        listed = {name: "; ".join(getattr(row, name)) for name in ("deviations", "details")}
        fields = dataclasses.asdict(row) | listed
        return {name: "" if value is None else str(value) for name, value in fields.items()}

    names = texts(rows[0])
    found = [{name: line[name] for name in names} for line in lines]
    assert sorted(found, key=str) == sorted(map(texts, rows), key=str)
    assert {(line["run"], line["folder"], line["commit"]) for line in lines} == {
        ('a "b" <c> x_y', "/data/runs/a", "6a6cf28a1b2c3d4e5f60-dirty")
    }
    ours = next(line for line in lines if line["checkpoint"] == OURS)
    beside = [
        ours[name]
        for name in ("beside", "published", "tolerance", "mark", "best", "group", "table", "column")
    ]
    card = ["The published card", "Linear, ImageNet protocol, top-1", "feature4"]
    assert beside == ["mmselfsup Relative-Loc", "51.20", "1.5", "inside", "yes", *card]
    hidden = next(line for line in lines if line["metric"] == "map_k1_std")
    assert hidden["table"] == ""


def test_csv_gives_all_published_numbers(report: Report) -> None:
    lines = [
        line
        for line in csv.DictReader(io.StringIO(as_csv(report)))
        if line["origin"] == "published"
    ]
    assert [(line["row"], line["value"]) for line in lines] == [
        (each.row, each.printed) for each in report.published
    ]
    assert {line["edition"] for line in lines if line["value"] == "40.4"} == {
        "1.x README and metafile"
    }


GOLDEN = """
### Linear, ImageNet protocol, top-1

| | feature1 | feature2 | feature3 | feature4 | feature5 | avgpool |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| mmselfsup Relative-Loc | 15.11 [1] | 30.47 [1] | 42.83 [1] | 51.20 [1] | 40.96 [1] \
| 39.65 / 38.78 / 40.4 [2] |
| OpenSelfSup Relative-Loc | 14.76 [3] | 31.29 [3] | 45.77 [3] | 49.31 [3] | 40.20 [3] | 38.83 [3] |
| OpenSelfSup Random | 11.37 [3] | 16.21 [3] | 13.47 [3] | 9.07 [3] | 6.54 [3] | 4.35 [3] |
| OpenSelfSup Supervised | 15.18 [3] | 33.96 [3] | 47.86 [3] | 67.56 [3] | 76.17 [3] | 74.12 [3] |
| random, seed 0 | — | — | — | 9.00 ≈ [4] | — | — |
| card_2022, seed 0 | — | — | — | **51.00** ≈ [4] | — | — |

Tolerance: ± 1.5 points. Not measured: \
python -m relloc.evaluate checkpoint=RUN eval=linear_avgpool, \
5.34 h on one NVIDIA H200, 16 cores (2026-11-30).

1. published: mmselfsup 0.x and 1.x, configs/selfsup/relative_loc/README.md (protocols.md 4.1)
2. published: 39.65 in 0.x README \
(mmselfsup 0.x, configs/selfsup/relative_loc/README.md (protocols.md 4.1)); \
38.78 in 0.x model_zoo.md and metafile \
(mmselfsup 0.x, docs/en/model_zoo.md and metafile (protocols.md 4.1)); \
40.4 in 1.x README and metafile \
(mmselfsup 1.x, configs/selfsup/relative_loc/README.md and metafile, \
another training (protocols.md 4.1))
3. published: OpenSelfSup, docs/MODEL_ZOO.md (protocols.md 4.2)
4. run a "b" \\<c\\> x_y; seed 0; commit 6a6cf28a1b-dirty; protocol 3.9; as published

### Linear, Places205"""


def unaligned(text: str) -> str:
    """Markdown without the spaces and dashes that align the columns of its tables."""
    lines = [" ".join(line.split()) if line.startswith("|") else line for line in text.splitlines()]
    return "\n".join(
        re.sub(r"-+", "---", line) if line.startswith("| --") else line for line in lines
    )


def test_columns_of_markdown_are_aligned(report: Report) -> None:
    text = as_markdown(report)
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(line) for line in table.splitlines()}) == 1


def test_markdown_is_as_it_was(report: Report) -> None:
    assert GOLDEN in unaligned(as_markdown(report))


def test_markdown_has_other_data_sets_apart_and_commands_below(report: Report) -> None:
    text = as_markdown(report)
    card, rest = unaligned(text).split("\n## imagenette val, 300 images\n")
    assert "66.25" not in card
    assert "| random, small, seed 0 [1] | 66.25 |" in rest
    assert (
        f"\n    python -m relloc.evaluate checkpoint={OURS} eval=voc07_svm  "
        "# 7.4 s on one NVIDIA H200, 16 cores (2026-11-30)\n" in rest
    )


def test_markdown_shows_texts_as_they_are() -> None:
    assert (
        escape_markdown("a|b *c* <d>\n_e_ f_g `h` [i]") == r"a\|b \*c\* \<d\> \_e\_ f_g \`h\` \[i\]"
    )


class Page(HTMLParser):
    """Which elements are open, the titles and texts of all cells, and what points where."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.targets += [given["href"] or ""] if "href" in given else []
        if tag == "td":
            self.cells.append((given.get("title") or "", ""))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            title, text = self.cells.pop()
            self.cells.append((title, text + data))


def test_html_is_one_whole_page_whose_cells_say_where_they_come_from(report: Report) -> None:
    page = Page()
    page.feed(as_html(report))
    page.close()
    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe"}
    shown = [
        cell
        for group in report.shown_groups
        for table in group.tables
        for row in table.rows
        for cell in row.cells
    ]
    titles = [title for title, text in page.cells if text and not title.startswith("missing")]
    assert titles == [cell.details for cell in shown if cell]
    ours = next((title, text) for title, text in page.cells if text.startswith("51.00"))
    assert (
        'run a "b" <c> x_y (/data/runs/a)\nseed 0, commit 6a6cf28a1b2c3d4e5f60-dirty\n' in ours[0]
    )
    assert "inside: mmselfsup Relative-Loc 51.20, tolerance 1.5" in ours[0]
    assert ours[1] == "51.00≈[4]"
    assert len(page.ids) == len(set(page.ids))
    assert {target[1:] for target in page.targets} == set(page.ids)


def test_html_is_for_the_dark_and_for_phones(report: Report) -> None:
    text = as_html(report)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "<b>51.00</b>" in text
    assert not re.search(r"https?://|url\(|@import", text)


def test_latex_has_nothing_that_latex_would_read_otherwise(report: Report) -> None:
    text = as_latex(report)
    assert (
        r"card\_2022, seed 0 & --- & --- & --- "
        r"& \textbf{51.00}$\approx$\textsuperscript{4} & --- & --- \\" in text
    )
    assert r"3.2; \textless{}five\textgreater{} draws \& 100 \% of test" in text
    assert r"9.00 $\pm$ 0.50$\approx$\textsuperscript" in text
    assert (
        text.count(r"\begin{table}")
        == text.count(r"\end{table}")
        == sum(len(g.tables) for g in report.shown_groups)
    )
    for table in re.findall(
        r"\\begin{tabular}{(l r*|lr*)}(.*?)\\end{tabular}", text, flags=re.DOTALL
    ):
        lines = [line for line in table[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(table[0]) - 1}
    assert text.isascii()


def test_latex_escapes_each_special_sign() -> None:
    assert escape_latex("a_b 5% $1 {x} #2 ~^\\ & <|> ±") == (
        r"a\_b 5\% \$1 \{x\} \#2 \textasciitilde{}\textasciicircum{}\textbackslash{} \& "
        r"\textless{}\textbar{}\textgreater{} $\pm$"
    )


HOSTILE = [
    "=cmd|' /C calc'!A0",
    "@SUM(A1)",
    "+1+2",
    "-1+x",
    "a\x1b[31m",
    "a\u202eb",
    "x | y\n| z |",
    "<script>",
    "$x$",
    "[/]",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("render", [as_csv, as_html, as_latex, as_markdown])
def test_a_name_is_text_in_every_format(
    result: Callable[..., Result], render: Callable[[Report], str], name: str
) -> None:
    def written(name: str) -> str:
        run = Run(folder=Path("/data/runs/a"), name=name, commit=name, started_ms=1)
        row = result(
            "linear",
            "feature1",
            "top1",
            66.25,
            dataset=name,
            model="small",
            checkpoint=f"/data/{name}/b.pt",
        )
        return render(make_report([Measured(result=row, run=run)]))

    text, plain = written(name), written("plain")
    assert not set("\x1b\u202e") & set(text)
    if render is as_html:
        assert "<script>" not in text
    if render is as_markdown:
        assert len(text.splitlines()) == len(plain.splitlines())
        assert "$x$" not in text
    if render is as_csv:
        cells = [cell for line in csv.reader(io.StringIO(text)) for cell in line]
        assert not [
            cell for cell in cells if cell.startswith(("=", "@", "+", "-")) and not is_number(cell)
        ]


def is_number(cell: str) -> bool:
    return re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", cell) is not None
