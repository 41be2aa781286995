"""The pages: what they cite and link to exists, and each command in them is understood."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from relloc import __main__, export, report, sweep, sync
from relloc.runs import settings

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
CITING = ("relloc", "conf", "launchers", "analysis", "benchmarks", "tests", "docs")
PROGRAMS = ("python", "torchrun", "relloc")
# Bash calls these instead of the programs: they print the words that the program would have got.
STAND_INS = "\n".join(
    f'{name}() {{ printf "%s\\n" "<{name}>" "$@" "<end>"; }}' for name in PROGRAMS
)
PARSERS = {"report": report, "export": export, "sync": sync, "sweep": sweep}


def blocks(page: Path) -> list[str]:
    """The indented blocks of a page, without their indentation."""
    found = re.findall(
        r"(?:^ {4}.*\n|^\n(?= {4}))+", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in found]


def commands(page: Path) -> list[tuple[str, ...]]:
    """The words of each command of a page as bash expands them; the first is the program."""
    found = []
    for block in blocks(page):
        # Of other lines only variables and loops matter, which commands may use.
        lines = re.sub(r"\\\n", " ", block).splitlines()
        script = [
            line
            for line in lines
            if re.match(r"(\w+=|export |for |done|\s)", line) or _is_command(line)
        ]
        if not any(map(_is_command, script)):
            continue
        script = [line.rpartition("&& ")[2] for line in script]
        # A restricted shell without a path can call nothing but the stand-ins.
        done = subprocess.run(
            [shutil.which("bash") or "/bin/bash", "-r", "-c", "\n".join([STAND_INS, *script])],
            env={"PATH": "/nowhere"},
            capture_output=True,
            text=True,
            check=True,
        )
        found += [
            tuple(words.splitlines())
            for words in re.findall(r"(<\w+>\n.*?)<end>\n", done.stdout, re.DOTALL)
        ]
    return list(dict.fromkeys(found))


def _is_command(line: str) -> bool:
    last = line.rpartition("&& ")[2]
    return bool(re.match(rf"(\w+=(\S+|'.*') )*({'|'.join(PROGRAMS)}) ", last))


TOLD = [(page.name, words) for page in PAGES for words in commands(page)]


def test_commands_are_found_on_the_pages() -> None:
    assert len(TOLD) > 60
    assert {page for page, _ in TOLD} >= {
        "README.md",
        "index.md",
        "sweeps.md",
        "slurm.md",
        "card.md",
        "results.md",
    }


@pytest.mark.parametrize(
    # Commands of the results are those of bash scripts that were run.
    "page",
    [page for page in PAGES if page.name != "results.md"],
    ids=lambda page: page.name,
)
def test_brackets_of_commands_are_quoted(page: Path) -> None:
    """The shell of macOS, zsh, refuses a word with brackets that names no file."""
    unquoted = []
    for block in blocks(page):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            if _is_command(line):
                bare = re.sub(r"'[^']*'|\"[^\"]*\"|\s#.*", "", line)
                unquoted += [line] if re.search(r"[\[\]*?{}]", bare) else []
    assert unquoted == []


def _relloc_command(words: tuple[str, ...]) -> tuple[str, list[str]] | None:
    """The relloc command of a line and its words; None where it is another program."""
    program, *rest = words
    if program == "<relloc>":
        return rest[0], rest[1:]
    if "-m" in rest and rest[rest.index("-m") + 1].startswith("relloc."):
        at = rest.index("-m") + 1
        return rest[at].removeprefix("relloc."), rest[at + 1 :]
    return None


@pytest.mark.parametrize(
    ("page", "words"), TOLD, ids=[f"{page}: {' '.join(words)[:90]}" for page, words in TOLD]
)
def test_a_command_of_a_page_is_understood(page: str, words: tuple[str, ...]) -> None:
    asked = _relloc_command(words)
    if asked is None:
        # A benchmark or a tool of ours: the file is there, and has the options.
        script = ROOT / words[1]
        if words[1] != "-m":
            assert script.is_file()
            options = [word for word in words[2:] if word.startswith("--")]
            source = script.read_text(encoding="utf-8") + (ROOT / "benchmarks/report.py").read_text(
                encoding="utf-8"
            )
            assert [option for option in options if option not in source] == []
        return
    command, given = asked
    assert command in __main__.COMMANDS
    if command in PARSERS:
        PARSERS[command].parser().parse_args(given)
    elif "--help" not in given:
        OmegaConf.to_container(settings.compose(command, _typed(given)).config, resolve=False)


def _typed(words: list[str]) -> list[str]:
    """The words that Hydra composes; of a sweep those of its first point, without the sweeper."""
    sweeps = "-m" in words
    typed = []
    for word in words:
        key, _, value = word.partition("=")
        if word == "-m" or (key in ("hydra/sweeper", "launcher") and value in ("optuna", "site")):
            continue
        if value == "glob(*)":
            value = settings.members(key)[0]
        if sweeps and not value.startswith(("[", "'")):
            value = value.partition(",")[0]
        typed.append(f"{key}={value}")
    return typed


def _citations() -> dict[str, str]:
    """Paragraphs of docs/protocols.md that are cited, each with a file that does so."""
    found = {}
    for folder in CITING:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".md", ".csv") and path.name != "protocols.md":
                text = path.read_text(encoding="utf-8")
                for run in re.findall(r"protocols\.md,? ((?:\d\.\d+|\d|T\d+|to|and|,| )+)", text):
                    found |= dict.fromkeys(re.findall(r"T\d+|\d\.\d+|\b\d\b", run), str(path))
    return found


def test_every_paragraph_of_the_protocols_that_is_cited_exists() -> None:
    text = (ROOT / "docs/protocols.md").read_text(encoding="utf-8")
    there = set(re.findall(r"^#+ (\d(?:\.\d+)?)", text, re.MULTILINE)) | set(
        re.findall(r"^\| (T\d+) ", text, re.MULTILINE)
    )
    cited = _citations()
    assert len(cited) > 15
    assert {paragraph: path for paragraph, path in cited.items() if paragraph not in there} == {}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    missing = []
    for target, anchor in re.findall(
        r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")
    ):
        file = page if not target else page.parent / target
        if not file.exists():
            missing.append(target)
        elif anchor and anchor not in _anchors(file):
            missing.append(f"{target}#{anchor}")
    assert missing == []


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_reached_from_the_contents() -> None:
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in contents] == []
