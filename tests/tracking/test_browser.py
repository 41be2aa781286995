"""MLflow's pages of a finished sweep, as a user of headless Chromium sees them.

RELLOC_SCREENSHOTS=FOLDER keeps a picture of each page.
"""

import itertools
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from chromium import chromium
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import TimeoutException, WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from waiting import wait_until_served

from relloc.results import Result, append_results
from relloc.results_before import add_series
from relloc.tracking import (
    Journal,
    RunRecord,
    add_artifact,
    flatten,
    read_note,
    sync,
    ui_command,
    ui_link,
    write_status,
)

pytestmark = pytest.mark.browser

T = TypeVar("T")
PATIENCE_S = 120
GAPS, JITTERS = (0, 24, 48), (0, 7, 14)
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
LAYERS = tuple(f"feature{stage}" for stage in range(1, 6))
SORTED_BY = "linear/feature4/top1"
CURVE = "voc07_low_shot/feature4/map_by_k"


def name_of(gap_px: int, jitter_px: int) -> str:
    return f"gap{gap_px} jit{jitter_px} r50 s0 gray"


def linear(gap_px: int, jitter_px: int, stage: int) -> float:
    """The best are neither the first nor the last runs; no two are equal."""
    return 50 - abs(gap_px - 20) / 4 - abs(jitter_px - 6) / 8 - abs(stage - 4)


def low_shot(gap_px: int, stage: int, shots: int) -> float:
    return 10 + gap_px / 4 + stage + 5 * math.log2(shots)


BEST_FIRST = sorted(itertools.product(GAPS, JITTERS), key=lambda point: -linear(*point, stage=4))


def finished_run(run_dir: Path, uri: str, gap_px: int, jitter_px: int) -> None:
    """A run of the sweep, as training leaves it and the mirror sends it."""
    run_dir.mkdir()
    grid = {"patch_px": 96, "gap_px": gap_px, "jitter_px": jitter_px}
    config = {"seed": 0, "color": "gray", "data": {"name": "voc07", "epochs": 10}, "grid": grid}
    tags = {"relloc.kind": "train", "relloc.sweep": "gaps"}
    RunRecord(
        name=name_of(gap_px, jitter_px),
        experiment="relloc",
        tracking_uri=uri,
        tags=tags,
        params=flatten(config),
    ).write(run_dir)
    journal = Journal(run_dir)
    for step in range(0, 100, 10):
        journal.log(
            {"train/loss": 2.08 - step / 200 - gap_px / 1000, "train/epoch": step / 10}, step
        )
    values = {}
    for stage, layer in enumerate(LAYERS, start=1):
        values["linear", layer, "top1"] = linear(gap_px, jitter_px, stage)
        for shots in SHOTS if stage >= 4 else ():
            values["voc07_low_shot", layer, f"map_k{shots}"] = low_shot(gap_px, stage, shots)
            values["voc07_low_shot", layer, f"map_k{shots}_std"] = 4 / shots
    told = {
        "dataset": "voc07",
        "split": "test",
        "n": 4952,
        "seed": 0,
        "protocol": "3.2",
        "model": "resnet50",
    }
    told["checkpoint"] = "backbone.safetensors"
    append_results(
        run_dir,
        [
            Result(
                **add_series(
                    {**told, "eval": name, "layer": layer, "metric": metric, "value": value}
                )
            )
            for (name, layer, metric), value in values.items()
        ],
    )
    Image.new("RGB", (300 + gap_px, 200), (gap_px, jitter_px, 99)).save(run_dir / "patches.png")
    add_artifact(run_dir, "patches.png")
    write_status(run_dir, "FINISHED")
    sync(run_dir, uri)


@pytest.fixture(scope="module")
def link(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The link that relloc prints, to a server started by the command that it prints."""
    folder = tmp_path_factory.mktemp("sweep")
    shutil.copy(empty_database, folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    for gap_px, jitter_px in itertools.product(GAPS, JITTERS):
        finished_run(folder / f"gap{gap_px}_jitter{jitter_px}", uri, gap_px, jitter_px)
    note = read_note(folder / "gap0_jitter0")
    assert note is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with open(folder / "log", "ab") as log:
        server = subprocess.Popen(
            f"exec env {ui_command(uri, port)}",
            shell=True,
            cwd=folder,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )

    try:
        wait_until_served(f"http://127.0.0.1:{port}", server, folder / "log")
        yield ui_link(uri, note.experiment_id, port)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


class Page:
    """What is on the screen, and what a user does there. All wait until it can be done."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def until(self, true: Callable[[], T]) -> T:
        """Its first value that is true; pages are drawn anew, so elements may vanish meanwhile."""
        waiting = WebDriverWait(
            self.driver, PATIENCE_S, 0.1, ignored_exceptions=[WebDriverException]
        )
        try:
            return waiting.until(lambda _: true())
        except TimeoutException:
            self.keep("failed")
            pytest.fail(
                f"not to be seen on {self.driver.current_url}:\n{self.shown('body')[0].text[:2000]}"
            )

    def shown(self, css: str, text: str | None = None) -> list[WebElement]:
        found = [
            element
            for element in self.driver.find_elements(By.CSS_SELECTOR, css)
            if element.is_displayed()
        ]
        return [element for element in found if text is None or element.text.strip() == text]

    def click(self, css: str, text: str | None = None, part: str | None = None) -> None:
        def clicked() -> bool:
            found = self.shown(css, text)[:1]
            for element in found:
                (element.find_element(By.CSS_SELECTOR, part) if part else element).click()
            return bool(found)

        self.until(clicked)

    def type(self, css: str, text: str) -> None:
        self.until(lambda: self.shown(css))[-1].send_keys(text)

    def runs(self, column: str | None = None) -> list[str]:
        """The names of the table's runs from top to bottom, or their values in a column."""
        rows = self.driver.execute_script(
            "const rows = [];"
            "for (const row of document.querySelectorAll('.ag-row')) {"
            "  const told = rows[row.getAttribute('row-index')] ??= {};"
            "  for (const run of row.querySelectorAll('a[href*=\"/runs/\"]'))"
            "    told.name = run.innerText;"
            "  for (const cell of row.querySelectorAll('.ag-cell'))"
            "    told[cell.getAttribute('col-id')] = cell.innerText;"
            "} return rows"
        )
        return [row.get(column or "name", "") for row in rows if "name" in row]  # others are groups

    def plots(self) -> list[list[dict[str, Any]]]:
        """The traces of each plot that is drawn."""
        return self.driver.execute_script(
            "const plots = [...document.querySelectorAll('.js-plotly-plot')];"
            "return plots.filter(plot => plot.checkVisibility()).map("
            "  plot => plot.data.map(({type, name, mode, x, y, z, dimensions}) =>"
            "    ({type, name, mode, x, y, z,"
            "      dimensions: dimensions?.map(({label, values}) => [label, values])})))"
        )

    def plot(self, right: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """The traces of the only plot, once they are as expected."""
        return self.until(
            lambda: [plots[0] for plots in [self.plots()] if len(plots) == 1 and right(plots[0])]
        )[0]

    def keep(self, name: str) -> None:
        if folder := os.environ.get("RELLOC_SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(folder, f"{name}.png")))


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with chromium(1800, 1000) as driver:
        yield Page(driver)


def opened(page: Page, link: str) -> None:
    """The page behind relloc's link, without the assistant that MLflow shows to who comes first."""
    page.driver.get(link)
    page.until(lambda: len(page.runs()) == len(BEST_FIRST))
    for close in page.shown("[data-component-id='mlflow.assistant.chat_panel.close']"):
        close.click()


def test_runs_are_grouped_sorted_and_compared(page: Page, link: str) -> None:
    opened(page, link)
    assert set(page.runs()) == {name_of(*point) for point in BEST_FIRST}
    page.type("input[placeholder='Search metric charts']", "linear/top1_by_layer")
    by_layer = {
        name_of(*point): ([1, 2, 3, 4, 5], [linear(*point, stage) for stage in range(1, 6)])
        for point in BEST_FIRST
    }

    def are_drawn(traces: list[dict[str, Any]]) -> bool:
        curves = {trace["name"].partition(" (")[0]: (trace["x"], trace["y"]) for trace in traces}
        return all(curves.get(name) == curve for name, curve in by_layer.items())

    page.plot(are_drawn)
    page.keep("charts")

    page.click("label:has(input[value=TABLE])")
    page.click(
        "button[data-testid=sort-select-dropdown], [data-testid=sort-select-dropdown] button"
    )
    page.type("[role=menu] input", SORTED_BY)
    page.click("[role=menuitemcheckbox]", SORTED_BY)
    metric = f"metrics.`{SORTED_BY}`"
    by_metric = [linear(*point, stage=4) for point in BEST_FIRST]
    page.until(lambda: [float(value or "nan") for value in page.runs(metric)] == by_metric)
    page.click("[data-testid=column-selection-dropdown]")
    page.type("input[placeholder='Search columns']", "grid.")
    for name in ("grid.gap_px", "grid.jitter_px"):
        page.click("[class*=tree-treenode]", name, part="[class*=tree-checkbox]")
    page.type("input[placeholder='Search columns']", Keys.ESCAPE)
    for column, swept in zip(
        ("grid.gap_px", "grid.jitter_px"), zip(*BEST_FIRST, strict=True), strict=True
    ):
        page.until(
            lambda column=column, swept=swept: (
                page.runs(f"params.`{column}`") == [str(value) for value in swept]
            )
        )
    assert page.runs() == [name_of(*point) for point in BEST_FIRST]

    page.click("button", "Group by")
    page.type("[role=menu] input", "gap")
    page.click("[role=menuitemcheckbox]", "grid.gap_px")
    by_group = [
        name_of(*point) for point in sorted(BEST_FIRST, key=lambda point: abs(point[0] - 20))
    ]
    page.until(lambda: page.runs() == by_group)
    page.keep("runs")

    page.click(
        "div:has(> input[aria-label='Select all runs']), "
        "label:has(input[aria-label='Select all runs'])"
    )
    page.click("button", "Compare")
    drawn = page.plot(lambda traces: traces[0]["type"] == "parcoords")
    assert [label for label, _ in drawn[0]["dimensions"][:2]] == [
        "grid.gap_px",
        "grid.jitter_px",
    ]  # what differs
    assert "Comparing 9 Runs from 1 Experiment" in page.shown("body")[0].text
    page.until(
        lambda: page.driver.find_elements(By.CSS_SELECTOR, "[class*=select-selector] input")
    )[1].send_keys(SORTED_BY)
    page.click("[class*=select-item-option-content]", SORTED_BY)
    drawn = page.plot(lambda traces: traces[0]["dimensions"][-1][0] == SORTED_BY)
    found = dict(drawn[0]["dimensions"])
    points = zip(found["grid.gap_px"], found["grid.jitter_px"], strict=True)
    assert found[SORTED_BY] == [linear(gap, jitter, stage=4) for gap, jitter in points]
    assert len(found[SORTED_BY]) == len(BEST_FIRST)
    page.keep("parallel_coordinates")

    page.click("[role=tab]", "Contour Plot")
    for axis, name in (("x", "grid.gap_px"), ("y", "grid.jitter_px"), ("z", SORTED_BY)):
        page.click(f"#{axis}axis-selector")
        page.click("[role=option]", name)
        page.until(lambda axis=axis, name=name: page.shown(f"#{axis}axis-selector", name))
    drawn = page.plot(
        lambda traces: (
            traces[0]["type"] == "contour" and len(set(traces[0]["z"])) == len(BEST_FIRST)
        )
    )
    points = zip(drawn[0]["x"], drawn[0]["y"], strict=True)
    assert drawn[0]["z"] == [linear(gap, jitter, stage=4) for gap, jitter in points]
    page.keep("contour")


def test_a_run_shows_its_low_shot_curve_and_its_patches(page: Page, link: str) -> None:
    opened(page, link)
    gap_px, jitter_px = BEST_FIRST[0]
    page.click("a", name_of(gap_px, jitter_px))
    page.click("[role=tab]", "Model metrics")
    page.type("input[placeholder='Search metric charts']", CURVE)
    drawn = page.plot(lambda traces: len(traces[0]["x"]) == len(SHOTS))
    assert (drawn[0]["x"], drawn[0]["y"]) == (
        list(SHOTS),
        [low_shot(gap_px, 4, shots) for shots in SHOTS],
    )
    assert page.shown(
        "[data-testid=experiment-view-compare-runs-section-header]", "voc07_low_shot/feature4\n(1)"
    )
    page.keep("low_shot")

    page.click("[role=tab]", "Artifacts")
    page.click("[artifact-name='patches.png']")
    picture = page.until(lambda: page.shown("img[alt='patches.png']"))[0]
    page.until(lambda: picture.get_property("complete"))
    assert picture.get_property("naturalWidth") == 300 + gap_px
    page.keep("patches")
