"""Names that can't act on a terminal, and streams that outlive their readers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from relloc.terminal import escaped, quantity

PRINTS = """
import sys
from relloc import terminal
def main():
    for number in range(20000):
        print(number, "a line of some length so that a pipe is full soon")
    print("caf\\u00e9 \\udc80", file=sys.stderr)
    return 3
terminal.run_command(main)
"""


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name-1.jpg", "plain name-1.jpg"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\rb\nc\td", "a\\rb\\nc\\td"),
        ("a\u202eb\u2066", "a\\u202eb\\u2066"),
        ("a\x9bb", "a\\x9bb"),
        ("a\u2028b", "a\\u2028b"),
        (os.fsdecode(b"a\xffb"), "a\\udcffb"),
        ("日本 é [red]", "日本 é [red]"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # a joiner that Persian is written with
    ],
)
def test_what_acts_on_a_terminal_is_shown_as_its_code(name: str, shown: str) -> None:
    assert escaped(name) == shown


def test_line_ends_stay_where_they_are_to_stay() -> None:
    assert escaped("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def started(tmp_path: Path, **more: object) -> subprocess.Popen[bytes]:
    program = tmp_path / "program.py"
    program.write_text(PRINTS)
    return subprocess.Popen([sys.executable, str(program)], **more)  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_a_command_whose_reader_leaves_goes_on_to_its_own_exit_code(tmp_path: Path) -> None:
    with started(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"0 ")
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(60) == 3
    assert b"Error" not in said
    assert b"\\udc80" in said


def test_a_command_whose_readers_both_leave_goes_on(tmp_path: Path) -> None:
    with started(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()
        assert process.wait(60) == 3


def test_streams_that_were_closed_before_the_start_lead_nowhere(tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    program = (
        "import os, sys\n"
        "from relloc import terminal\n"
        "terminal.survive_closed_output()\n"
        f"file = open({str(opened)!r}, 'w')\n"
        "print('lost')\n"
        "print('lost', file=sys.stderr)\n"
        "os.write(1, b'lost')\n"
        "file.write(str(file.fileno()))\n"
    )
    closing = f'exec {sys.executable} -c "$0" >&- 2>&-'
    assert subprocess.run(["sh", "-c", closing, program], check=False).returncode == 0
    assert int(opened.read_text()) > 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_finds_no_room_is_told(tmp_path: Path) -> None:
    program = "from relloc import terminal\nterminal.run_command(lambda: print('x' * 10))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=-1, text=True, check=False
        )
    assert done.returncode == 1
    assert "No space left" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_are_printed_in_any_encoding(encoding: str) -> None:
    program = "from relloc import terminal\nterminal.run_command(lambda: print('\\u65e5\\udc80'))"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0
    assert done.stderr == b""
    assert (b"\\u65e5" in done.stdout) == (encoding != "utf-8")


def test_a_message_stands_behind_what_was_printed_before() -> None:
    does = "from relloc import terminal; print('first'); terminal.print_error('second')"
    done = subprocess.run(
        [sys.executable, "-c", does],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    assert done.stdout == "first\nrelloc: second\n"


@pytest.mark.parametrize(
    ("count", "words", "text"),
    [
        (0, ("image",), "0 images"),
        (1, ("image",), "1 image"),
        (2, ("class", "classes"), "2 classes"),
        (1, ("class", "classes"), "1 class"),
        (0.5, ("epoch",), "0.5 epochs"),
    ],
)
def test_a_quantity_has_its_noun_in_the_right_number(count, words, text) -> None:
    assert quantity(count, *words) == text


def test_thousands_of_a_quantity_have_commas_where_they_are_asked_for() -> None:
    assert quantity(1, "pair", commas=True) == "1 pair"
    assert quantity(1234, "pair", commas=True) == "1,234 pairs"
