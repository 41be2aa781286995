"""`--help grid.gap_px`: what a setting is, from the comments of conf/ and the docstrings of what it is given to.

Nothing is said here that does not stand there: who changes a setting finds its explanation beside it.
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

# The unit that a name ends in
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
    """What `${members:…}` in the text of --help is: a line for each group, with its members."""
    return "\n".join(f"{name}: {', '.join(settings.members(name))}" for name in names)


OmegaConf.register_new_resolver("members", _groups, replace=True)


def answer(words: Sequence[str], command: str) -> str:
    """What is known of each word: a setting, a group, or one of its members, group=member.

    Raises:
        UsageError: there is nothing of that name.
    """
    refuse_old_names(word.lstrip("+~").partition("=")[0] for word in words)
    chosen = settings.chosen_groups(words)
    return "\n\n".join("\n".join(_answer(word, chosen, command)) for word in words)


def _answer(word: str, chosen: Sequence[str], command: str) -> Iterator[str]:
    name, _, value = word.lstrip("+~").partition("=")
    if not settings.is_group(name):
        yield from _setting(name.replace("/", "."), chosen, command)
    elif value:
        for member in value.strip("[]").split(","):
            yield from _member(name, member.strip())
    else:
        yield from _group(name, command)


def _member(group: str, member: str) -> Iterator[str]:
    file = settings.file_of(f"{group}/{member}")
    if file is None:
        raise UsageError(no_member(group, member))
    yield f"{group}={member}   ({_shown(file)})"
    yield from (f"{_INDENT}{line}".rstrip() for line in settings.about(f"{group}/{member}"))
    lines = file.read_text(encoding="utf-8").splitlines()
    body = list(itertools.dropwhile(lambda line: not line or line.startswith("#"), lines))
    if body:
        yield f"{_INDENT}It sets:"
    yield from (f"{_INDENT * 2}{line}".rstrip() for line in body)


def _group(group: str, command: str) -> Iterator[str]:
    yield f"{group}: chosen with {group}=MEMBER, and one of"
    known = settings.members(group)
    width = max(map(len, known), default=0)
    for member in known:
        first = next(iter(settings.about(f"{group}/{member}")), "")
        yield f"{_INDENT}{member:{width}}   {first}".rstrip()
    held = _held(group, settings.compose(command))
    if held:
        yield f"Its settings: {', '.join(held)}"
    yield f"--help {group}=MEMBER tells of one of them, --help {held[0] if held else 'SETTING'} of one setting"


def _held(key: str, composed: Composed) -> list[str]:
    """The settings right below one."""
    return [one for one in composed.names() if one.rpartition(".")[0] == key]


def _setting(key: str, chosen: Sequence[str], command: str) -> Iterator[str]:
    composed, choice = _having(key, chosen, command)
    where = f" with {choice}" if choice else ""
    if held := _held(key, composed):
        yield f"{key}{where} holds {', '.join(held)}"
    else:
        unit = _UNITS.get(re.split(r"[._]", key)[-1])
        is_needed = composed.unresolved[key] == "???"
        value = (
            "to be given, it has no default"
            if is_needed
            else f"{as_value(composed.default(key))} by default"
        )
        yield f"{key}: {value}{where}" + (f", in {unit}" if unit else "")
    source = _source_of(key, composed)
    if source is not None:
        yield from _from_conf(key, source)
    yield from _from_docstring(key, composed)
    yield from _from_members(key)


def _having(key: str, chosen: Sequence[str], command: str) -> tuple[Composed, str]:
    """What has the setting: what the words choose, or else the first member of a group with which there is one."""
    composed = settings.compose(command, chosen, with_hydra=key.startswith("hydra."))
    if key in composed.unresolved:
        return composed, ""
    group, _, inner = key.partition(".")
    # The settings of an evaluation stand below its name.
    named = [inner.partition(".")[0]] if group == "eval" else []
    for member in (*named, *settings.members(group)):
        choice = f"{group}={member}"
        if settings.file_of(f"{group}/{member}") is not None:
            composed = settings.compose(command, [*chosen, choice])
            if key in composed.unresolved:
                return composed, choice
    raise UsageError(no_setting(key, command, chosen))


def _source_of(key: str, composed: Composed) -> Source | None:
    """The last file that sets it, or is all of it."""
    for source in reversed(composed.sources):
        inner = _inside(key, source)
        if inner == "" or inner in settings.flat(settings.content_of(source.name)):
            return source
    return None


def _inside(key: str, source: Source) -> str | None:
    """The setting's name within a file, "" for all that the file holds; None where it stands elsewhere."""
    if not source.package:
        return key
    inside = f"{key}.".removeprefix(f"{source.package}.")
    return inside.removesuffix(".") if inside != f"{key}." else None


def _from_conf(key: str, source: Source) -> Iterator[str]:
    inner = _inside(key, source) or ""
    text = source.file.read_text(encoding="utf-8")
    values = {name: text[start:end] for name, start, end in _places(yaml.compose(text))}
    # What stands there, in one line
    value = (
        f": {' '.join(line.strip() for line in values[inner].splitlines())}"
        if inner in values
        else ""
    )
    yield f"{_INDENT}set in {_shown(source.file)}{value}"
    said = comments(source.file)
    while inner and inner not in said:
        inner = inner.rpartition(".")[0]
    opening = (
        " ".join(settings.about(source.name)) if "/" in source.name or key == source.package else ""
    )
    for words in dict.fromkeys(filter(None, (said.get(inner), opening))):
        yield f"{_INDENT}{words}"


def comments(file: Path) -> dict[str, str]:
    """What is said of each setting in a file: behind it, or above it and those that follow without an empty line."""
    text = file.read_text(encoding="utf-8")
    above = _above(text.splitlines())
    found = {}
    for key, start, end in _places(yaml.compose(text)):
        behind = re.compile(r":?[ \t]*#[ \t]*(.*)").match(text, end)
        found[key] = behind[1].strip() if behind else above[text.count("\n", 0, start)]
    return {key: said for key, said in found.items() if said}


def _places(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Each setting of a file, where it begins, and where its value ends, or its name if it holds others."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        is_flat = isinstance(value, yaml.ScalarNode) or value.flow_style
        yield (
            f"{prefix}{key.value}",
            key.start_mark.index,
            (value if is_flat else key).end_mark.index,
        )
        yield from _places(value, f"{prefix}{key.value}.")


def _above(lines: Sequence[str]) -> list[str]:
    """For each line the nearest comment above, at the same depth, with no empty line between.

    The comment that the file opens with is none of it.
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
        # It ends at an empty line, at another comment, and with what it stands in.
        if not text or (is_comment and not was_comment) or depth < depth_of_comment:
            comment, depth_of_comment = [], depth
        if is_comment:
            comment.append(text[1:].strip())
        found.append(" ".join(comment) if depth == depth_of_comment else "")
        was_comment = is_comment
    return found


def _from_docstring(key: str, composed: Composed) -> Iterator[str]:
    """What the class or function that is given the setting says of it: what names it, or else its first sentence."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(composed.config, parent) if parent else None
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if not isinstance(target, str) or not target.startswith("relloc."):
        return
    text = _docstring(target)
    said = re.split(r"(?<=[.;])\s+", " ".join(text.split()))
    naming = [sentence for sentence in said if f"`{name}`" in sentence]
    # Its entry below Args, which may go on in lines that stand further in
    if entry := re.search(rf"^    {re.escape(name)}: (.+(?:\n {{5,}}.+)*)", text, re.MULTILINE):
        naming = [" ".join(entry[1].split())]
    told = " ".join(naming or said[:1]).rstrip(" ;")
    if told:
        yield f"{_INDENT}{target}: {told}"


def _docstring(target: str) -> str:
    """The docstring of a class or function of relloc, read and not imported."""
    module, _, name = target.rpartition(".")
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        return ""
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node) or ""
    return ""


def _from_members(key: str) -> Iterator[str]:
    """What the members of the setting's group set it to."""
    group, _, inner = key.partition(".")
    values = []
    for member in settings.members(group) if group != "eval" else ():
        content = settings.content_of(f"{group}/{member}")
        found = settings.flat(content.get(group, content))
        if inner in found and not isinstance(found[inner], dict) and "${" not in str(found[inner]):
            values.append(f"{group}={member} {as_value(found[inner])}")
    if len(values) > 1:
        yield f"{_INDENT}elsewhere: {', '.join(values)}"


def _shown(file: Path) -> str:
    """A file's name from the folder that holds conf/, or in full where it is a user's."""
    root = settings.conf_dir()
    return str(file.relative_to(root.parent)) if file.is_relative_to(root) else str(file)
