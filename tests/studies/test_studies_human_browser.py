"""The page of questions, as a person uses it in headless Chromium.

RELLOC_SCREENSHOTS=FOLDER keeps pictures of it.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from chromium import chromium
from made_questions import made_questions
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from relloc.studies.human.server import PageTexts, QuestionServer, serving
from relloc.studies.human.session import Session

pytestmark = pytest.mark.browser

T = TypeVar("T")
PATIENCE_S = 60
# A name that would be markup, if anything read it as such.
NAME = "<img src=x onerror=\"document.title='hacked'\">"


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    with chromium(1000, 900) as started:
        yield started


class Page:
    """What is on the page, and what a person does there."""

    def __init__(self, driver: webdriver.Chrome, server: QuestionServer) -> None:
        self.driver = driver
        driver.get(server.address)

    def until(self, true: Callable[[], T]) -> T:
        return WebDriverWait(self.driver, PATIENCE_S, 0.05).until(lambda _: true())

    def text(self, name: str) -> str:
        return self.driver.find_element(By.ID, name).text

    @property
    def places(self) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, "#board button")

    def asked(self, number: int) -> None:
        """Waits until a question can be answered."""
        self.until(
            lambda: (
                self.driver.execute_script("return document.body.dataset.question") == str(number)
                and self.places[0].is_enabled()
            )
        )

    def click_place(self, place: int) -> None:
        self.driver.find_element(By.CSS_SELECTOR, f"[data-place='{place}']").click()

    def press(self, key: str) -> None:
        self.driver.find_element(By.TAG_NAME, "body").send_keys(key)

    def keep(self, name: str) -> None:
        if folder := os.environ.get("RELLOC_SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(folder, f"{name}.png")))


def texts(feedback: bool = False) -> PageTexts:
    return PageTexts(person=NAME, images="photos & more", feedback=feedback)


def test_a_person_answers_by_clicks_and_keys_reloads_and_finishes(
    driver: webdriver.Chrome, tmp_path: Path
) -> None:
    session = Session(made_questions(6), tmp_path / "answers.jsonl", person=NAME, seed=0)
    with serving(session, texts(), 0, "port") as server:
        page = Page(driver, server)
        page.asked(0)
        page.keep("human_desktop")
        assert f"0 of 6 answered by {NAME}: photos & more" in page.text("count")
        assert driver.title != "hacked"
        # Eight places around the center, as the positions lie.
        boxes = [button.rect for button in page.places]
        middle = driver.find_element(By.ID, "center").rect
        signs = [
            (
                (box["y"] > middle["y"] + 1) - (box["y"] < middle["y"] - 1),
                (box["x"] > middle["x"] + 1) - (box["x"] < middle["x"] - 1),
            )
            for box in boxes
        ]
        assert signs == [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
        shown = "return document.getElementById(arguments[0]).naturalWidth"
        assert driver.execute_script(shown, "neighbor") == 16
        assert not driver.find_element(By.ID, "finish").is_enabled()

        page.click_place(4)
        page.asked(1)
        page.press("7")  # up left, on a number pad
        page.asked(2)
        page.press("c")  # down right, among the letters
        page.asked(3)
        assert [each.answer for each in session.answers] == [4, 0, 7]
        assert all(0 < each.seconds < PATIENCE_S for each in session.answers)

        driver.refresh()
        page.asked(3)
        assert page.text("count").startswith("3 of 6")
        page.press("s")  # no place
        page.click_place(6)
        page.asked(4)
        driver.find_element(By.ID, "finish").click()
        page.until(lambda: driver.find_element(By.ID, "no").is_displayed())
        driver.find_element(By.ID, "no").click()
        page.click_place(1)
        page.asked(5)
        driver.find_element(By.ID, "finish").click()
        page.until(lambda: "5 answers" in page.text("sure"))
        driver.find_element(By.ID, "yes").click()
        page.until(lambda: "Thank you" in page.text("message"))
        page.keep("human_finished")
        assert not driver.find_element(By.ID, "question").is_displayed()
        assert server.over.wait(PATIENCE_S)  # set once the page has its answer
    assert [each.answer for each in session.answers] == [4, 0, 7, 6, 1]
    assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_last_answer_ends_the_session(driver: webdriver.Chrome, tmp_path: Path) -> None:
    session = Session(made_questions(2), tmp_path / "answers.jsonl", person="a", seed=0)
    with serving(session, texts(), 0, "port") as server:
        page = Page(driver, server)
        page.asked(0)
        page.press("6")
        page.asked(1)
        assert not server.over.is_set()
        page.press("4")
        page.until(lambda: "Thank you" in page.text("message"))
        assert server.over.wait(PATIENCE_S)


def test_the_right_answer_is_told_only_where_that_is_asked_for(
    driver: webdriver.Chrome, tmp_path: Path
) -> None:
    questions = made_questions(2)
    session = Session(questions, tmp_path / "answers.jsonl", person="a", seed=0)
    label = questions[0].label
    with serving(session, texts(feedback=True), 0, "port") as server:
        page = Page(driver, server)
        page.asked(0)
        # The page says it for a second, and then goes on: here, when the test has seen it.
        driver.execute_script("window.setTimeout = (next) => { window.goOn = next; }")
        page.click_place((label + 1) % 8)
        page.until(lambda: page.text("message").startswith("it was"))
        page.keep("human_feedback")
        classes = [button.get_attribute("class") for button in page.places]
        assert (classes[label], classes[(label + 1) % 8]) == ("right", "wrong")
        driver.execute_script("window.goOn()")
        page.asked(1)
        page.click_place(questions[1].label)
        page.until(lambda: page.text("message") == "right")
        driver.execute_script("window.goOn()")
        page.until(lambda: "Thank you" in page.text("message"))


def test_a_page_whose_server_has_ended_says_so(driver: webdriver.Chrome, tmp_path: Path) -> None:
    session = Session(made_questions(2), tmp_path / "answers.jsonl", person="a", seed=0)
    with serving(session, texts(), 0, "port") as server:
        page = Page(driver, server)
        page.asked(0)
    page.press("6")
    page.until(lambda: "hydra.run.dir" in page.text("message"))
    assert session.answers == []


def test_the_page_fits_on_a_phone(driver: webdriver.Chrome, tmp_path: Path) -> None:
    session = Session(made_questions(1), tmp_path / "answers.jsonl", person="a", seed=0)
    metrics = {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        with serving(session, texts(), 0, "port") as server:
            page = Page(driver, server)
            page.asked(0)
            page.keep("human_phone")
            wide = driver.execute_script(
                "return [document.documentElement.scrollWidth, window.innerWidth]"
            )
            assert wide[0] <= wide[1] == 360
            lowest = max(button.rect["y"] + button.rect["height"] for button in page.places)
            assert lowest <= 640
            assert min(button.rect["width"] for button in page.places) >= 44
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
