"""`--help grid.gap_px`: what a setting is, from the comments of conf/ and the docstrings of what it is given to.

Nothing is said here that does not stand there: who changes a setting finds its explanation beside it.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    name, equals, value = word.lstrip("+~").partition("=")
    name = name.replace("/", ".") if not settings.is_group(name) else name
    if settings.is_group(name) and equals and value:
        for member in value.strip("[]").split(","):
            yield from _member(name, member.strip(), command)
    elif settings.is_group(name):
        yield from _group(name, command)
    else:
        yield from _setting(name, chosen, command)


def _member(group: str, member: str, command: str) -> Iterator[str]:
    file = settings.file_of(f"{group}/{member}")
    if file is None:
        raise UsageError(no_member(group, member))
    yield f"{group}={member}   ({_shown(file)})"
    yield from (f"{_INDENT}{line}".rstrip() for line in settings.about(file))
    body = file.read_text(encoding="utf-8").splitlines()
    body = body[next((place for place, line in enumerate(body) if line and not line.startswith("#")), len(body)) :]
    if body:
        yield f"{_INDENT}It sets:"
    yield from (f"{_INDENT * 2}{line}".rstrip() for line in body)


def _group(group: str, command: str) -> Iterator[str]:
    yield f"{group}: chosen with {group}=MEMBER, and one of"
    known = settings.members(group)
    width = max(map(len, known), default=0)
    for member in known:
        file = settings.file_of(f"{group}/{member}")
        first = next(iter(settings.about(file)), "") if file else ""
        yield f"{_INDENT}{member:{width}}   {first}".rstrip()
    held = [key for key in settings.compose(command).names() if key.startswith(f"{group}.") and key.count(".") == 1]
    if held:
        yield f"Its settings: {', '.join(held)}"
    yield f"--help {group}=MEMBER tells of one of them, --help {held[0] if held else 'SETTING'} of one setting"


def _setting(key: str, chosen: Sequence[str], command: str) -> Iterator[str]:
    composed, choice = _having(key, chosen, command)
    default = composed.default(key)
    held = [one for one in composed.names() if one.startswith(f"{key}.") and one.count(".") == key.count(".") + 1]
    where = f" with {choice}" if choice else ""
    if held:
        yield f"{key}{where} holds {', '.join(held)}"
    else:
        unit = _UNITS.get(re.split(r"[._]", key)[-1], "")
        value = "to be given, it has no default" if composed.is_needed(key) else f"{as_value(default)} by default"
        yield f"{key}: {value}{where}" + (f", in {unit}" if unit else "")
    source = _source_of(key, composed)
    if source is not None:
        yield from _from_conf(key, source)
    yield from _from_docstring(key, composed)
    yield from _from_members(key)


def _having(key: str, chosen: Sequence[str], command: str) -> tuple[Composed, str]:
    """What has the setting: what the words choose, or else the first member of a group with which there is one."""
    composed = settings.compose(command, chosen, with_hydra=key.startswith("hydra."))
    if key in composed.names():
        return composed, ""
    parts = key.split(".")
    if settings.is_group(parts[0]):
        named = [parts[1]] if parts[0] == "eval" and len(parts) > 1 else []
        for member in (*named, *settings.members(parts[0])):
            if settings.file_of(f"{parts[0]}/{member}") is None:
                continue
            choice = f"{parts[0]}={member}"
            having = settings.compose(command, [*chosen, choice])
            if key in having.names():
                return having, choice
    raise UsageError(no_setting(key, command, chosen))


def _source_of(key: str, composed: Composed) -> Source | None:
    """The last file that sets it, or is all of it."""
    for source in reversed(composed.sources):
        inner = _inside(key, source)
        if inner is None or source.file is None:
            continue
        if not inner or _holds(OmegaConf.to_container(OmegaConf.load(source.file)), inner):
            return source
    return None


def _inside(key: str, source: Source) -> str | None:
    """The setting's name within a file, "" for all that the file holds; None where it stands elsewhere."""
    if key == source.package:
        return ""
    if not source.package:
        return key
    return key.removeprefix(f"{source.package}.") if key.startswith(f"{source.package}.") else None


def _holds(content: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(content, Mapping) or name not in content:
            return False
        content = content[name]
    return True


def _from_conf(key: str, source: Source) -> Iterator[str]:
    file, inner = source.file, _inside(key, source)
    if file is None or inner is None:
        return
    text = file.read_text(encoding="utf-8")
    said, places = comments(file), {name: (start, end) for name, start, end in _places(yaml.compose(text), "")}
    line = f": {_between(text.splitlines(), *places[inner])}" if inner in places else ""
    yield f"{_INDENT}set in {_shown(file)}{line}"
    own = next((said[name] for name in _with_parents(inner) if name in said), "")
    opening = " ".join(settings.about(file)) if "/" in source.name or not inner else ""
    for words in dict.fromkeys(filter(None, (own, opening))):
        yield f"{_INDENT}{words}"


def _with_parents(key: str) -> Iterator[str]:
    parts = key.split(".")
    yield from (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def _between(lines: Sequence[str], start: yaml.Mark, end: yaml.Mark) -> str:
    """What stands there, in one line."""
    told = (
        [*lines[start.line : end.line], lines[end.line][: end.column]] if end.line < len(lines) else lines[start.line :]
    )
    return " ".join(line.strip() for line in told)


def comments(file: Path) -> dict[str, str]:
    """What is said of each setting in a file: behind it, or above it and those that follow without an empty line."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    return {
        key: said
        for key, start, end in _places(yaml.compose(text), "")
        if (said := _behind(lines, end) or _above(lines, start.line))
    }


def _places(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, yaml.Mark, yaml.Mark]]:
    """Each setting of a file, where it begins, and where its value ends, or its name if it holds others."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        is_flat = isinstance(value, yaml.ScalarNode) or value.flow_style
        yield f"{prefix}{key.value}", key.start_mark, value.end_mark if is_flat else key.end_mark
        yield from _places(value, f"{prefix}{key.value}.")


def _behind(lines: Sequence[str], end: yaml.Mark) -> str:
    found = re.match(r":?\s*#\s*(.*)", lines[end.line][end.column :]) if end.line < len(lines) else None
    return found[1].strip() if found else ""


def _above(lines: Sequence[str], line: int) -> str:
    """The nearest comment above, at the same depth, with no empty line between; the file's opening is none of it."""
    depth = len(lines[line]) - len(lines[line].lstrip())
    said: list[str] = []
    for above in reversed(lines[:line]):
        text = above.strip()
        is_comment = text.startswith("#")
        if not text or (said and not is_comment) or (is_comment and len(above) - len(above.lstrip()) != depth):
            break
        if is_comment:
            said.insert(0, text[1:].strip())
        elif len(above) - len(above.lstrip()) < depth:
            break
    is_opening = bool(said) and lines[: len(said)] == [f"# {text}" for text in said]
    return "" if is_opening else " ".join(said)


def _from_docstring(key: str, composed: Composed) -> Iterator[str]:
    """What the class or function that is given the setting says of it."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(composed.config, parent) if parent else None
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if isinstance(target, str) and target.startswith("relloc."):
        said = _sentences(_docstring(target), name)
        if said:
            yield f"{_INDENT}{target}: {said}"


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


def _sentences(docstring: str, name: str) -> str:
    """The sentences that name the setting; where none does, the first of all."""
    said = [part.strip() for part in re.split(r"(?<=[.;])\s+", " ".join(docstring.split()))]
    naming = [part for part in said if f"`{name}`" in part]
    return " ".join(naming or said[:1]).rstrip(" ;")


def _from_members(key: str) -> Iterator[str]:
    """What the members of the setting's group set it to."""
    group, _, inner = key.partition(".")
    if not settings.is_group(group) or group == "eval":
        return
    values = []
    for member in settings.members(group):
        file = settings.file_of(f"{group}/{member}")
        content = OmegaConf.to_container(OmegaConf.load(file)) if file else {}
        nested = content.get(group, content) if isinstance(content, Mapping) else {}
        if not _holds(nested, inner):
            continue
        value = _at(nested, inner)
        if isinstance(value, int | float | list | None) or (isinstance(value, str) and "${" not in value):
            values.append(f"{group}={member} {as_value(value)}")
    if len(values) > 1:
        yield f"{_INDENT}elsewhere: {', '.join(values)}"


def _at(content: Any, key: str) -> Any:
    for name in key.split("."):
        content = content[name]
    return content


def _shown(file: Path) -> str:
    """A file's name from the folder that holds conf/, or in full where it is a user's."""
    root = settings.conf_dir()
    return str(file.relative_to(root.parent)) if file.is_relative_to(root) else str(file)
