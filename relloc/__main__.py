"""relloc, or python -m relloc: lists the commands; relloc COMMAND ... is python -m relloc.COMMAND ..."""

import ast
import difflib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from relloc import terminal

COMMANDS = ("prepare", "train", "evaluate", "report", "export", "sync", "sweep")
_HELP = ("-h", "--help", "help")
_COMPLETION = ("--completion", "--complete")  # what a shell asks for
_EXIT_MISTAKE = 2


def command() -> NoReturn:
    """The `relloc` console script."""
    terminal.run_command(lambda: main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """List the commands, or run one; 0, 2 where there is none of that name, or the command's own exit code."""
    if not arguments or arguments[0] in _HELP:
        print(_list())
        return 0
    name, *words = arguments
    if name in _COMPLETION and len(words) == 1:
        return _complete(name, words[0])
    if name not in COMMANDS:
        terminal.complain(_unknown(name))
        return _EXIT_MISTAKE
    sys.argv = [f"relloc.{name}", *words]
    runpy.run_module(f"relloc.{name}", run_name="__main__", alter_sys=True)
    return 0


def _complete(asked: str, word: str) -> int:
    """Print the script for a shell, or what may stand at the end of a line that is typed in it."""
    from relloc.runs import completion  # Hydra takes half a second to import

    if asked == "--complete":
        print("\n".join(completion.candidates(word, COMMANDS)))
    elif word == "bash":
        print(completion.BASH_SCRIPT, end="")
    else:
        terminal.complain(
            f"there is no completion for {word}: bash is the only shell that it is written for"
        )
        return _EXIT_MISTAKE
    return 0


def _list() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  python -m relloc.{name:{width}}   {_purpose(name)}" for name in COMMANDS)
    return (
        f"relloc pretrains networks by relative location and measures what their features are worth.\n\n{lines}\n\n"
        "Each tells more with --help, and of a setting with --help SETTING. The first to try, which needs no data:\n"
        "  python -m relloc.train"
    )


def _purpose(name: str) -> str:
    """What the command's module says of itself behind the command, read and not imported: that takes seconds."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    first = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
    return first.partition(": ")[2].rstrip(".")


def _unknown(name: str) -> str:
    if "=" in name:
        return (
            f"{name} is a setting: name a command before it, such as python -m relloc.train {name}"
        )
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"there is no command {name}.{hint} There are {', '.join(COMMANDS)}"


if __name__ == "__main__":
    command()
