"""The `relloc` console script: `relloc COMMAND ...` runs `python -m relloc.COMMAND ...`.

Without a command it lists the commands.
"""

import ast
import difflib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from relloc import terminal

COMMANDS = ("prepare", "train", "evaluate", "study", "report", "export", "sync", "sweep")
_HELP = ("-h", "--help", "help")
_COMPLETION = ("--completion", "--complete")  # what a shell asks for
_EXIT_MISTAKE = 2


def command() -> NoReturn:
    """The `relloc` console script."""
    terminal.run_command(lambda: main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Lists the commands, or runs the one that `arguments` begin with.

    Returns 0, or 2 where there is no such command. A command that fails exits with its own code.
    """
    if not arguments or arguments[0] in _HELP:
        print(_list())
        return 0
    name, *words = arguments
    if name in _COMPLETION and len(words) == 1:
        return _complete(name, words[0])
    if name not in COMMANDS:
        terminal.print_error(_unknown(name))
        return _EXIT_MISTAKE
    # The module runs as if it had been started by `python -m`, so that Hydra sees its name.
    sys.argv = [f"relloc.{name}", *words]
    runpy.run_module(f"relloc.{name}", run_name="__main__", alter_sys=True)
    return 0


def _complete(asked: str, word: str) -> int:
    """Prints the completion script of a shell, or the completions of the line `word`."""
    from relloc.runs import completion  # Hydra takes half a second to import

    if asked == "--complete":
        print("\n".join(completion.candidates(word, COMMANDS)))
    elif word == "bash":
        print(completion.BASH_SCRIPT, end="")
    else:
        terminal.print_error(
            f"there is no completion for {word}: bash is the only shell that it is written for"
        )
        return _EXIT_MISTAKE
    return 0


def _list() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  python -m relloc.{name:{width}}   {_purpose(name)}" for name in COMMANDS]
    table = "\n".join(lines)
    return (
        "relloc pretrains networks by relative location and measures what their features are "
        f"worth.\n\n{table}\n\n"
        "Each tells more with --help, and of a setting with --help SETTING. "
        "The first to try, which needs no data:\n"
        "  python -m relloc.train"
    )


def _purpose(name: str) -> str:
    """Returns what the docstring of a command's module says after the command's name.

    The file is parsed and not imported, since importing takes seconds.
    """
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    first_line = docstring.splitlines()[0]
    return first_line.partition(": ")[2].rstrip(".")


def _unknown(name: str) -> str:
    # A setting without a command is the likeliest mistake.
    if "=" in name:
        return (
            f"{name} is a setting: name a command before it, such as python -m relloc.train {name}"
        )
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"there is no command {name}.{hint} There are {', '.join(COMMANDS)}"


if __name__ == "__main__":
    command()
