"""Tab completion of the `relloc` command: what may stand at the end of a line that is being typed.

`eval "$(relloc --completion bash)"` in ~/.bashrc has bash ask `relloc --complete LINE` at each Tab.
Nothing here imports torch, so that a Tab takes about a second.
"""

from collections.abc import Sequence

from relloc.runs import settings
from relloc.sweeps.sweep import runs_folder

_SWEEP_WORDS = ("status", "wait", "cancel")

# Bash splits words at = as well, so what stands before it in the word is cut off the answers. A group, a setting or
# part of a name is not the whole word yet: no space is added behind it.
BASH_SCRIPT = """\
_relloc() {
    local line=${COMP_LINE:0:COMP_POINT} word
    mapfile -t COMPREPLY < <(relloc --complete "$line" 2>/dev/null)
    word=${line##* }
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%=*}="}")
    fi
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.] ]]; then
        compopt -o nospace 2>/dev/null
    fi
}
complete -o default -F _relloc relloc
"""


def candidates(line: str, commands: Sequence[str]) -> list[str]:
    """The words that may stand in place of the last one of `line`, such as `relloc train grid.`; [] for files."""
    words = line.split()
    last = words.pop() if words and not line[-1:].isspace() else ""
    if len(words) < 2:
        return _beginning_with(last, commands)
    command = words[1].removeprefix("relloc.")
    if command in settings.COMMANDS:
        return _of_settings(command, words[2:], last)
    if command == "sweep" and len(words) == 2:
        return _beginning_with(last, _SWEEP_WORDS)
    if command == "sweep" or (command == "report" and last.startswith("sweep=")):
        prefix = "sweep=" if last.startswith("sweep=") else ""
        names = [
            folder.name for folder in (runs_folder() / "sweeps").glob("[!.]*") if folder.is_dir()
        ]
        return _beginning_with(last, [f"{prefix}{name}" for name in names])
    return []


def _of_settings(command: str, words: Sequence[str], last: str) -> list[str]:
    key, is_value, _ = last.partition("=")
    composed = settings.compose(command, settings.chosen_groups(words))
    if is_value:
        values = settings.members(key) if settings.is_group(key) else []
        if isinstance(composed.default(key) if key in composed.unresolved else None, bool):
            values = ["true", "false"]
        return _beginning_with(last, [f"{key}={value}" for value in values])
    # Of settings with a long name only the part up to the next dot, as of folders in a path
    depth = last.count(".") + 1
    names = set()
    for name, value in composed.unresolved.items():
        parts = name.split(".")
        if len(parts) > depth:
            names.add(".".join(parts[:depth]) + ".")
        elif not isinstance(value, dict) or not value:
            names.add(f"{name}=")
        if settings.is_group(name):
            names.add(f"{name}=")
    return _beginning_with(last, sorted(names))


def _beginning_with(start: str, words: Sequence[str]) -> list[str]:
    return sorted(word for word in words if word.startswith(start))
