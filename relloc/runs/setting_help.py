"""Answers `--help SETTING`, such as `--help grid.gap_px`.

The answer is made from the comments in conf/ and from the docstring of the class or function that
gets the setting, so that whoever changes a setting finds its explanation beside it.
"""

import ast
import importlib.util
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
    # What a setting is called now is the whole answer about an old name.
    names = []
    for word in words:
        name, _ = _split(word)
        names.append(name)
    refuse_old_names(names)
    # The words choose members of groups, such as data=voc before data.root.
    chosen = settings.chosen_groups(words)
    answers = []
    for word in words:
        lines = _answer(word, chosen, command)
        answers.append("\n".join(lines))
    return "\n\n".join(answers)


def _split(word: str) -> tuple[str, str]:
    """Returns the name and the value in a word, without Hydra's signs of adding and removing."""
    without_sign = word.lstrip("+~")
    name, _, value = without_sign.partition("=")
    return name, value


def _answer(
    word: str,
    chosen: Sequence[str],
    command: str,
) -> Iterator[str]:
    """Yields the lines about one word."""
    name, value = _split(word)
    # A name without a group is a setting; a/b is also taken for a.b.
    if not settings.is_group(name):
        key = name.replace("/", ".")
        yield from _setting(key, chosen, command)
    elif value:
        # Several members may be given as in eval=[linear,knn], or none as in eval=[].
        listed = value.strip("[] ")
        if not listed:
            yield f"{name}=[] chooses no {name}"
            yield from _group(name, command)
            return
        for member in listed.split(","):
            yield from _member(name, member.strip())
    else:
        yield from _group(name, command)


def _member(group: str, member: str) -> Iterator[str]:
    """Yields the description of a member, and what its file sets."""
    # The whole file is shown: its opening comment, then its settings.
    file = settings.file_of(f"{group}/{member}")
    if file is None:
        raise UsageError(no_member(group, member))
    shown = _shown(file)
    yield f"{group}={member}   ({shown})"
    for line in settings.about(f"{group}/{member}"):
        yield f"{_INDENT}{line}".rstrip()
    lines = file.read_text(encoding="utf-8").splitlines()
    while lines and _is_comment_or_empty(lines[0]):
        lines.pop(0)
    body = lines
    if body:
        yield f"{_INDENT}It sets:"
    for line in body:
        yield f"{_INDENT * 2}{line}".rstrip()


def _is_comment_or_empty(line: str) -> bool:
    return not line or line.startswith("#")


def _group(group: str, command: str) -> Iterator[str]:
    """Yields the members of a group with the first lines of their descriptions."""
    yield f"{group}: chosen with {group}=MEMBER, and one of"
    known = settings.members(group)
    width = max(map(len, known), default=0)
    for member in known:
        # The first line of the comment that its file opens with
        about = settings.about(f"{group}/{member}")
        first = next(iter(about), "")
        line = f"{_INDENT}{member:{width}}   {first}"
        yield line.rstrip()
    composed = settings.compose(command)
    inside = _directly_inside(group, composed)
    if inside:
        yield f"Its settings: {', '.join(inside)}"
    example = inside[0] if inside else "SETTING"
    yield f"--help {group}=MEMBER tells of one of them, --help {example} of one setting"


def _directly_inside(key: str, composed: Composed) -> list[str]:
    """Returns the settings one level below another."""
    inside = []
    for name in composed.names():
        parent, _, _ = name.rpartition(".")
        if parent == key:
            inside.append(name)
    return inside


def _setting(
    key: str,
    chosen: Sequence[str],
    command: str,
) -> Iterator[str]:
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
            default = composed.default(key)
            value = f"{as_value(default)} by default"
        unit = _unit(key)
        yield f"{key}: {value}{where}{unit}"
    # What conf/ says, then the code that gets the setting, then the other members of its group
    source = _source_of(key, composed)
    if source is not None:
        yield from _from_conf(key, source)
    yield from _from_docstring(key, composed)
    yield from _from_members(key)


def _unit(key: str) -> str:
    """Returns the end of a line that tells a setting's unit; "" if its name has none."""
    words = re.split(r"[._]", key)
    unit = _UNITS.get(words[-1])
    if unit is None:
        return ""
    return f", in {unit}"


def _composed_with(
    key: str,
    chosen: Sequence[str],
    command: str,
) -> tuple[Composed, str]:
    """Returns a config that has the setting, and the member that had to be chosen for it.

    The config is what the words choose or, if that lacks the setting, what comes with the first
    member of its group that has it.
    """
    is_hydras = key.startswith("hydra.")
    composed = settings.compose(command, chosen, with_hydra=is_hydras)
    if key in composed.unresolved:
        return composed, ""
    group, _, inner = key.partition(".")
    members = settings.members_general_first(group)
    # The settings of an evaluation come below its name.
    if group in settings.EVALUATION_GROUPS:
        evaluation, _, _ = inner.partition(".")
        members = [evaluation, *members]
    for member in members:
        # The name of an evaluation may be misspelt.
        file = settings.file_of(f"{group}/{member}")
        if file is None:
            continue
        choice = f"{group}={member}"
        composed = settings.compose(command, [*chosen, choice])
        if key in composed.unresolved:
            return composed, choice
    raise UsageError(no_setting(key, command, chosen))


def _source_of(key: str, composed: Composed) -> Source | None:
    """Returns the last file that sets a setting, which is the one that wins."""
    # Later files override earlier ones.
    for source in reversed(composed.sources):
        inner = _inside(key, source)
        # The file's whole package is set by the file, even if no line of it has that name.
        if inner == "":
            return source
        content = settings.content_of(source.name)
        if inner in settings.flat(content):
            return source
    return None


def _inside(key: str, source: Source) -> str | None:
    """Returns a setting's name within a file, or None if it does not belong to the file.

    The name is empty if the setting is the file's whole package, such as `grid` of grid/mmselfsup.
    """
    if not source.package:
        return key
    # The final dot keeps `grid` from matching `gridlike.px`.
    package = f"{source.package}."
    with_dot = f"{key}."
    if not with_dot.startswith(package):
        return None
    inside = with_dot.removeprefix(package)
    return inside.removesuffix(".")


def _from_conf(key: str, source: Source) -> Iterator[str]:
    """Yields what a file sets a setting to, and the comment on it."""
    inner = _inside(key, source) or ""
    text = source.file.read_text(encoding="utf-8")
    # The value as it is written in the file, in one line
    value = ""
    tree = yaml.compose(text)
    for name, start, end in _spans(tree):
        if name == inner:
            lines = text[start:end].splitlines()
            one_line = " ".join(map(str.strip, lines))
            value = f": {one_line}"
    shown = _shown(source.file)
    yield f"{_INDENT}set in {shown}{value}"
    # Without a comment of its own, a setting has that of the one that holds it.
    explained = comments(source.file)
    while inner and inner not in explained:
        inner = inner.rpartition(".")[0]
    # The comment that a file opens with is about the whole member.
    is_member = "/" in source.name or key == source.package
    opening = ""
    if is_member:
        opening = " ".join(settings.about(source.name))
    own = explained.get(inner)
    # Both may be the same comment, which is then shown once.
    distinct = dict.fromkeys([own, opening])
    for comment in filter(None, distinct):
        yield f"{_INDENT}{comment}"


def comments(file: Path) -> dict[str, str]:
    """Returns the comment on each setting in a file of configs, by the setting's name.

    It stands behind the value, or above the setting and those that follow without an empty line.
    """
    text = file.read_text(encoding="utf-8")
    above = _above(text.splitlines())
    comment_behind = re.compile(r":?[ \t]*#[ \t]*(.*)")
    comment_of = {}
    for key, start, end in _spans(yaml.compose(text)):
        # YAML drops comments while it parses: find them in the text, by the offsets of the values.
        behind = comment_behind.match(text, end)
        if behind:
            comment = behind[1].strip()
        else:
            line_number = text.count("\n", 0, start)
            comment = above[line_number]
        if comment:
            comment_of[key] = comment
    return comment_of


def _spans(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Yields each setting of a file with two offsets in the text: where it begins and ends.

    The end is that of its value or, if it holds other settings, that of its name.
    """
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        # A flow style is [a, b] or {a: b}, whose value ends in one line with its name.
        is_flat = isinstance(value, yaml.ScalarNode) or value.flow_style
        last = value if is_flat else key
        start = key.start_mark
        end = last.end_mark
        yield name, start.index, end.index
        yield from _spans(value, f"{name}.")


def _above(lines: Sequence[str]) -> list[str]:
    """Returns for each line the nearest comment above it, "" for none.

    The comment has the same indentation, and no empty line is between. The comment that the file
    opens with does not count.
    """
    above: list[str] = []
    comment: list[str] = []
    depth_of_comment = 0
    was_comment = False
    is_opening = True
    for line in lines:
        # The opening ends with the first line that is no comment.
        is_opening = is_opening and line.startswith("#")
        if is_opening:
            above.append("")
            continue
        text = line.strip()
        without_indent = line.lstrip()
        depth = len(line) - len(without_indent)
        is_comment = text.startswith("#")
        # A comment counts until an empty line, another comment, or the end of its block.
        begins_another = is_comment and not was_comment
        if not text or begins_another or depth < depth_of_comment:
            comment = []
            depth_of_comment = depth
        if is_comment:
            comment.append(text[1:].strip())
        is_of_block = depth == depth_of_comment
        above.append(" ".join(comment) if is_of_block else "")
        was_comment = is_comment
    return above


def _from_docstring(key: str, composed: Composed) -> Iterator[str]:
    """Yields what the class or function that gets a setting says of it.

    That is its entry below `Args:`, or else the sentences that name it in backticks, or else the
    first sentence.
    """
    parent, _, name = key.rpartition(".")
    # A setting at the top is an argument of no call.
    if not parent:
        return
    node = OmegaConf.select(composed.config, parent)
    if not isinstance(node, DictConfig):
        return
    target = node.get("_target_")
    # Docstrings of other projects explain other things than what is set here.
    if not isinstance(target, str) or not target.startswith("relloc."):
        return
    text = _docstring(target)
    in_one_line = " ".join(text.split())
    sentences = re.split(r"(?<=[.;])\s+", in_one_line)
    # An entry may go on in lines that are indented further.
    entry = re.search(
        rf"^    {re.escape(name)}: (.+(?:\n {{5,}}.+)*)",
        text,
        re.MULTILINE,
    )
    if entry:
        explaining = entry[1].split()
    else:
        # A docstring may explain a setting in any sentence.
        named = f"`{name}`"
        explaining = [sentence for sentence in sentences if named in sentence]
    explanation = " ".join(explaining or sentences[:1])
    explanation = explanation.rstrip(" ;")
    if explanation:
        yield f"{_INDENT}{target}: {explanation}"


def _docstring(target: str) -> str:
    """Returns the docstring of a class or function of relloc, without importing its module."""
    module, _, name = target.rpartition(".")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    source = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(source)
    # Only classes and functions at the top of a module can be a `_target_`.
    for node in tree.body:
        is_definition = isinstance(node, ast.ClassDef | ast.FunctionDef)
        if is_definition and node.name == name:
            return ast.get_docstring(node) or ""
    return ""


def _from_members(key: str) -> Iterator[str]:
    """Yields one line with the values that the members of the setting's group set it to."""
    group, _, inner = key.partition(".")
    # Evaluations and studies have settings of their own.
    if group in settings.EVALUATION_GROUPS:
        return
    values = []
    for member in settings.members(group):
        content = settings.content_of(f"{group}/{member}")
        # A file with another package names its group itself.
        in_group = content.get(group, content)
        of_member = settings.flat(in_group)
        if inner not in of_member:
            continue
        value = of_member[inner]
        is_interpolation = "${" in str(value)
        if not isinstance(value, dict) and not is_interpolation:
            values.append(f"{group}={member} {as_value(value)}")
    # A single value has been shown above already.
    if len(values) > 1:
        yield f"{_INDENT}elsewhere: {', '.join(values)}"


def _shown(file: Path) -> str:
    """Returns a file's path relative to the folder of conf/, or in full if it is a user's."""
    root = settings.conf_dir()
    if not file.is_relative_to(root):
        return str(file)
    return str(file.relative_to(root.parent))
