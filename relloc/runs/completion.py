"""Tab completion of the `relloc` command.

`eval "$(relloc --completion bash)"` in ~/.bashrc has bash ask `relloc --complete LINE` at each Tab.
Nothing here imports torch, so that a Tab takes about a second.
"""

from collections.abc import Sequence

from relloc.runs import settings
from relloc.sweeps.sweep import runs_folder

_SWEEP_WORDS = ("status", "wait", "cancel")

# Bash splits words at `=` as well, so that the part before it is cut off the answers. A group, a
# setting or the beginning of a name is not a whole word yet: no space is added behind it.
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
    """Returns the words that may stand in place of the last one of `line`.

    For example, `relloc train grid.` is completed to `relloc train grid.gap_px=` and others. An
    empty list leaves it to bash to complete the names of files. `commands` are those of relloc.
    """
    words = line.split()
    # Behind a space, a new word begins.
    last = words.pop() if words and not line[-1:].isspace() else ""
    if len(words) < 2:
        return _beginning_with(last, commands)
    command = words[1].removeprefix("relloc.")
    if command in settings.COMMANDS:
        return _of_settings(command, words[2:], last)
    if command == "sweep" and len(words) == 2:
        return _beginning_with(last, _SWEEP_WORDS)
    # Names of sweeps
    if command == "sweep" or (command == "report" and last.startswith("sweep=")):
        prefix = "sweep=" if last.startswith("sweep=") else ""
        folders = (runs_folder() / "sweeps").glob("[!.]*")
        names = [folder.name for folder in folders if folder.is_dir()]
        return _beginning_with(last, [f"{prefix}{name}" for name in names])
    return []


def _of_settings(command: str, words: Sequence[str], last: str) -> list[str]:
    """Returns completions of a setting's name or value; `words` may choose members of groups."""
    key, is_value, _ = last.partition("=")
    composed = settings.compose(command, settings.chosen_groups(words))
    if is_value:
        values = settings.members(key) if settings.is_group(key) else []
        default = composed.default(key) if key in composed.unresolved else None
        if isinstance(default, bool):
            values = ["true", "false"]
        return _beginning_with(last, [f"{key}={value}" for value in values])
    # Of longer names only the part up to the next dot, as shells complete paths by folders
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
