"""Answers `--help SETTING`, such as `--help grid.gap_px`.

The answer is made from the comments in conf/ and from the docstring of the class or function that
gets the setting, so that whoever changes a setting finds its explanation beside it.
"""

import ast
import importlib.util
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from relloc.errors import UsageError
from relloc.runs import settings
from relloc.runs.command_line import as_value
from relloc.runs.explaining import no_member, no_setting
from relloc.runs.renamed import refuse_old_names
from relloc.runs.settings import Composed, Source

# Units, by the last word of a setting's name
_UNITS = {
    "px": "pixels",
    "px2": "square pixels",
    "s": "seconds",
    "min": "minutes",
    "gib": "GiB",
    "gb": "GB",
    "epochs": "epochs",
    "steps": "steps",
    "images": "images",
    "share": "parts of 1",
}
_INDENT = "  "


def _groups(*names: str) -> str:
    """Returns what `${members:…}` in the text of --help stands for: a line per group."""
    lines = []
    for name in names:
        members = ", ".join(settings.members(name))
        lines.append(f"{name}: {members}")
    return "\n".join(lines)


OmegaConf.register_new_resolver("members", _groups, replace=True)


def answer(words: Sequence[str], command: str) -> str:
    """Returns what is known of each word: a setting, a group, or a member, written group=member.

    Raises:
        UsageError: there is no setting, group or member of that name.
    """
    refuse_old_names(word.lstrip("+~").partition("=")[0] for word in words)
    chosen = settings.chosen_groups(words)
    answers = ["\n".join(_answer(word, chosen, command)) for word in words]
    return "\n\n".join(answers)


def _answer(word: str, chosen: Sequence[str], command: str) -> Iterator[str]:
    """Yields the lines about one word."""
    name, _, value = word.lstrip("+~").partition("=")
    # A name without a group is a setting; a/b is also taken for a.b.
    if not settings.is_group(name):
        yield from _setting(name.replace("/", "."), chosen, command)
    elif value:
        for member in value.strip("[]").split(","):
            yield from _member(name, member.strip())
    else:
        yield from _group(name, command)


def _member(group: str, member: str) -> Iterator[str]:
    """Yields the description of a member, and what its file sets."""
    # The whole file is shown: its opening comment, then its settings.
    file = settings.file_of(f"{group}/{member}")
    if file is None:
        raise UsageError(no_member(group, member))
    yield f"{group}={member}   ({_shown(file)})"
    for line in settings.about(f"{group}/{member}"):
        yield f"{_INDENT}{line}".rstrip()
    lines = file.read_text(encoding="utf-8").splitlines()
    body = list(itertools.dropwhile(lambda line: not line or line.startswith("#"), lines))
    if body:
        yield f"{_INDENT}It sets:"
    for line in body:
        yield f"{_INDENT * 2}{line}".rstrip()


def _group(group: str, command: str) -> Iterator[str]:
    """Yields the members of a group with the first lines of their descriptions."""
    yield f"{group}: chosen with {group}=MEMBER, and one of"
    known = settings.members(group)
    width = max(map(len, known), default=0)
    for member in known:
        # The first line of the comment that its file opens with
        first = next(iter(settings.about(f"{group}/{member}")), "")
        yield f"{_INDENT}{member:{width}}   {first}".rstrip()
    inside = _directly_inside(group, settings.compose(command))
    if inside:
        yield f"Its settings: {', '.join(inside)}"
    example = inside[0] if inside else "SETTING"
    yield f"--help {group}=MEMBER tells of one of them, --help {example} of one setting"


def _directly_inside(key: str, composed: Composed) -> list[str]:
    """Returns the settings one level below another."""
    return [name for name in composed.names() if name.rpartition(".")[0] == key]


def _setting(key: str, chosen: Sequence[str], command: str) -> Iterator[str]:
    """Yields the value of a setting, where it is set, its explanation, and what members set."""
    composed, choice = _composed_with(key, chosen, command)
    where = f" with {choice}" if choice else ""
    inside = _directly_inside(key, composed)
    if inside:
        yield f"{key}{where} holds {', '.join(inside)}"
    else:
        # "???" is how Hydra marks a setting that must be given.
        if composed.unresolved[key] == "???":
            value = "to be given, it has no default"
        else:
            value = f"{as_value(composed.default(key))} by default"
        last_word = re.split(r"[._]", key)[-1]
        unit = f", in {_UNITS[last_word]}" if last_word in _UNITS else ""
        yield f"{key}: {value}{where}{unit}"
    source = _source_of(key, composed)
    if source is not None:
        yield from _from_conf(key, source)
    yield from _from_docstring(key, composed)
    yield from _from_members(key)


def _composed_with(key: str, chosen: Sequence[str], command: str) -> tuple[Composed, str]:
    """Returns a config that has the setting, and the member that had to be chosen for it.

    The config is what the words choose or, if that lacks the setting, what comes with the first
    member of its group that has it.
    """
    composed = settings.compose(command, chosen, with_hydra=key.startswith("hydra."))
    if key in composed.unresolved:
        return composed, ""
    group, _, inner = key.partition(".")
    # The settings of an evaluation come below its name.
    named = [inner.partition(".")[0]] if group == "eval" else []
    for member in (*named, *settings.members_general_first(group)):
        choice = f"{group}={member}"
        if settings.file_of(f"{group}/{member}") is not None:
            composed = settings.compose(command, [*chosen, choice])
            if key in composed.unresolved:
                return composed, choice
    raise UsageError(no_setting(key, command, chosen))


def _source_of(key: str, composed: Composed) -> Source | None:
    """Returns the last file that sets a setting, which is the one that wins."""
    # Later files override earlier ones.
    for source in reversed(composed.sources):
        inner = _inside(key, source)
        if inner == "" or inner in settings.flat(settings.content_of(source.name)):
            return source
    return None


def _inside(key: str, source: Source) -> str | None:
    """Returns a setting's name within a file, or None if it does not belong to the file.

    The name is empty if the setting is the file's whole package, such as `grid` of grid/mmselfsup.
    """
    if not source.package:
        return key
    # The final dot keeps `grid` from matching `gridlike.px`.
    inside = f"{key}.".removeprefix(f"{source.package}.")
    return inside.removesuffix(".") if inside != f"{key}." else None


def _from_conf(key: str, source: Source) -> Iterator[str]:
    """Yields what a file sets a setting to, and the comment on it."""
    inner = _inside(key, source) or ""
    text = source.file.read_text(encoding="utf-8")
    values = {name: text[start:end] for name, start, end in _spans(yaml.compose(text))}
    # The value as it is written in the file, in one line
    value = ""
    if inner in values:
        one_line = " ".join(line.strip() for line in values[inner].splitlines())
        value = f": {one_line}"
    yield f"{_INDENT}set in {_shown(source.file)}{value}"
    # Without a comment of its own, a setting has that of the one that holds it.
    explained = comments(source.file)
    while inner and inner not in explained:
        inner = inner.rpartition(".")[0]
    # The comment that a file opens with is about the whole member.
    is_member = "/" in source.name or key == source.package
    opening = " ".join(settings.about(source.name)) if is_member else ""
    for comment in dict.fromkeys([explained.get(inner), opening]):
        if comment:
            yield f"{_INDENT}{comment}"


def comments(file: Path) -> dict[str, str]:
    """Returns the comment on each setting in a file of configs, by the setting's name.

    It stands behind the value, or above the setting and those that follow without an empty line.
    """
    text = file.read_text(encoding="utf-8")
    above = _above(text.splitlines())
    found = {}
    for key, start, end in _spans(yaml.compose(text)):
        # YAML drops comments while it parses: find them in the text, by the offsets of the values.
        behind = re.compile(r":?[ \t]*#[ \t]*(.*)").match(text, end)
        line_number = text.count("\n", 0, start)
        comment = behind[1].strip() if behind else above[line_number]
        if comment:
            found[key] = comment
    return found


def _spans(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Yields each setting of a file with two offsets in the text: where it begins and ends.

    The end is that of its value or, if it holds other settings, that of its name.
    """
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        is_flat = isinstance(value, yaml.ScalarNode) or value.flow_style
        last = value if is_flat else key
        yield name, key.start_mark.index, last.end_mark.index
        yield from _spans(value, f"{name}.")


def _above(lines: Sequence[str]) -> list[str]:
    """Returns for each line the nearest comment above it, "" for none.

    The comment has the same indentation, and no empty line is between. The comment that the file
    opens with does not count.
    """
    opening = len(list(itertools.takewhile(lambda line: line.startswith("#"), lines)))
    found = [""] * opening
    comment: list[str] = []
    depth_of_comment = 0
    was_comment = False
    for line in lines[opening:]:
        text = line.strip()
        depth = len(line) - len(line.lstrip())
        is_comment = text.startswith("#")
        # A comment counts until an empty line, another comment, or the end of its block.
        if not text or (is_comment and not was_comment) or depth < depth_of_comment:
            comment = []
            depth_of_comment = depth
        if is_comment:
            comment.append(text[1:].strip())
        found.append(" ".join(comment) if depth == depth_of_comment else "")
        was_comment = is_comment
    return found


def _from_docstring(key: str, composed: Composed) -> Iterator[str]:
    """Yields what the class or function that gets a setting says of it.

    That is its entry below `Args:`, or else the sentences that name it in backticks, or else the
    first sentence.
    """
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(composed.config, parent) if parent else None
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if not isinstance(target, str) or not target.startswith("relloc."):
        return
    text = _docstring(target)
    sentences = re.split(r"(?<=[.;])\s+", " ".join(text.split()))
    # A docstring may explain a setting in any sentence.
    naming = [sentence for sentence in sentences if f"`{name}`" in sentence]
    # An entry may go on in lines that are indented further.
    entry = re.search(rf"^    {re.escape(name)}: (.+(?:\n {{5,}}.+)*)", text, re.MULTILINE)
    if entry:
        naming = [" ".join(entry[1].split())]
    explanation = " ".join(naming or sentences[:1]).rstrip(" ;")
    if explanation:
        yield f"{_INDENT}{target}: {explanation}"


def _docstring(target: str) -> str:
    """Returns the docstring of a class or function of relloc, without importing its module."""
    module, _, name = target.rpartition(".")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    # Only classes and functions at the top of a module can be a `_target_`.
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node) or ""
    return ""


def _from_members(key: str) -> Iterator[str]:
    """Yields one line with the values that the members of the setting's group set it to."""
    group, _, inner = key.partition(".")
    # Members of `eval` are evaluations, each with settings of its own.
    if group == "eval":
        return
    values = []
    for member in settings.members(group):
        content = settings.content_of(f"{group}/{member}")
        of_member = settings.flat(content.get(group, content))
        if inner not in of_member:
            continue
        value = of_member[inner]
        is_interpolation = "${" in str(value)
        if not isinstance(value, dict) and not is_interpolation:
            values.append(f"{group}={member} {as_value(value)}")
    if len(values) > 1:
        yield f"{_INDENT}elsewhere: {', '.join(values)}"


def _shown(file: Path) -> str:
    """Returns a file's path relative to the folder of conf/, or in full if it is a user's."""
    root = settings.conf_dir()
    return str(file.relative_to(root.parent)) if file.is_relative_to(root) else str(file)
