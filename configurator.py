"""Settings of a script: its lower-case globals, changed by config files and by --name=value.

    batch_size = 12  # images per process and step     <- a setting, its default, and what --help says of it

    if __name__ == "__main__":
        config = configure(globals())                   # python train.py config/small.py --batch_size=32

Later arguments win. A config file holds literal assignments and is parsed, never executed.
"""

import ast
import contextlib
import difflib
import io
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple


class SettingError(ValueError):
    """What is wrong with the arguments or with a config file, in one line."""


class Config(dict):
    """Every setting and its final value; `changed` holds those that differ from the script's defaults.

    `given` holds those that the arguments name, whatever they set them to.
    """

    changed: dict
    given: dict


class Setting(NamedTuple):
    default: bool | int | float | str | tuple
    comment: str = ""  # what stands beside it
    heading: str = ""  # the comment lines right above it: the title of a group that begins here


def configure(scope, argv=None):
    """Apply `argv` (default: the command line) to the settings in `scope`, a script's globals(); return a `Config`.

    An argument that is wrong ends the program: one line on stderr, exit status 2. `--help` prints every setting.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = find_settings(scope)
    if "--help" in argv or "-h" in argv:
        print(help_text(scope.get("__doc__"), settings))
        sys.exit(0)
    try:
        overrides = parse(argv, {name: setting.default for name, setting in settings.items()})
    except SettingError as error:
        print(f"{Path(scope.get('__file__') or 'settings').name}: {error}", file=sys.stderr)
        sys.exit(2)
    scope.update(overrides)
    config = Config({name: scope[name] for name in settings})
    config.given = overrides
    config.changed = {name: value for name, value in config.items() if value != settings[name].default}
    return config


def find_settings(scope):
    """{name: Setting} of a script, in its order: lower-case top-level `name = value`, a bool, int, float, str or tuple.

    A scope without `__file__` (a plain dict) has no comments, and every name in it counts.
    """
    if "__file__" not in scope:
        return {name: Setting(value) for name, value in scope.items() if is_setting(name, value)}
    with tokenize.open(scope["__file__"]) as file:  # honours the file's encoding line
        source = file.read()
    lines = source.split("\n")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    settings = {}
    for node in ast.parse(source).body:
        name = assigned_name(node)
        if is_setting(name, scope.get(name)):
            first = node.lineno  # lines count from 1, so lines[first - 2] stands above
            while first > 1 and lines[first - 2].startswith("#"):
                first -= 1
            heading = " ".join(comments[line] for line in range(first, node.lineno))
            settings[name] = Setting(scope[name], comments.get(node.end_lineno, ""), heading)
    return settings


def is_setting(name, value):
    return type(value) in (bool, int, float, str, tuple) and name == name.lower() and not name.startswith("_")


def assigned_name(node):
    """The name in a plain `name = value`, else None."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


def parse(argv, defaults):
    """{name: value} that the arguments set; raises SettingError."""
    values = {}
    for argument in argv:
        if not argument.startswith("-"):
            values |= parse_file(argument, defaults)
            continue
        name, equals, text = argument.removeprefix("--").partition("=")
        default = default_of(name, defaults)
        if not equals and not isinstance(default, bool):
            raise SettingError(f"--{name} has no value: write --{name}=value (default {shown(default)})")
        values[name] = typed(name, literal(text, default) if equals else True, default)
    return values


def parse_file(path, defaults):
    """{name: value} that a config file sets; it may hold `name = literal`, comments and a docstring, nothing else."""
    if not path.endswith(".py"):
        raise SettingError(f"cannot read {path!r}: write --name=value, or the path of a config file (.py)")
    if not Path(path).is_file():
        raise SettingError(f"config file {path} does not exist")
    try:
        module = ast.parse(Path(path).read_bytes())
    except SyntaxError as error:
        raise SettingError(f"{path}:{error.lineno}: {error.msg}") from None
    except (ValueError, MemoryError, RecursionError) as error:
        raise SettingError(f"{path} is no Python ({error or 'too deep'})") from None
    values = {}
    for node in module.body[1:] if ast.get_docstring(module) is not None else module.body:
        try:
            name = assigned_name(node)
            if name is None:
                raise SettingError("not an assignment: a config file holds only name = literal")
            try:
                value = ast.literal_eval(node.value)
            except (ValueError, TypeError, MemoryError, RecursionError):
                raise SettingError(f"{name} is not a literal: a config file is parsed, not executed") from None
            values[name] = typed(name, value, default_of(name, defaults))
        except SettingError as error:
            raise SettingError(f"{path}:{node.lineno}: {error}") from None
    return values


def default_of(name, defaults):
    if name not in defaults:
        nearest = difflib.get_close_matches(name, defaults, n=1, cutoff=0)
        hint = f": did you mean {nearest[0]!r}?" if nearest else ""
        raise SettingError(f"unknown setting {name!r}{hint} (--help lists all)")
    return defaults[name]


def literal(text, default):
    """Command-line text as the Python value it spells, read with an eye to `default`; the text itself if it is none."""
    if isinstance(default, str):
        return text
    source = text.strip()
    if isinstance(default, bool):
        source = source.capitalize()  # true, TRUE -> True
    if isinstance(default, tuple):  # 1,2,4,4 or (1,2,4,4) or [1,2,4,4]
        source = source.strip("()[] ")
        if default and isinstance(default[0], bool):
            source = source.title()
        if default and isinstance(default[0], str):
            return [element.strip() for element in source.split(",") if element]
        source = f"[{source}]"
    try:
        return ast.literal_eval(source)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # the last two: too deep
        return text


def typed(name, value, default):
    """`value` in the type of `default` (int for float, 1e5 for int, list for tuple); raises SettingError."""
    wanted = type(default).__name__
    if isinstance(default, tuple):
        like = next((element for element in default if isinstance(element, float)), default[0] if default else None)
        wanted = f"tuple of {type(like).__name__ if default else 'numbers'}"
        if isinstance(value, (tuple, list)) and default:
            with contextlib.suppress(SettingError):  # raised below, for the tuple as a whole
                return tuple(typed(name, element, like) for element in value)
        elif isinstance(value, (tuple, list)) and all(type(element) in (int, float) for element in value):
            return tuple(value)
    elif type(value) is type(default):
        return value
    elif type(value) is int and type(default) is float and abs(value) < 2**1023:  # the largest there is
        return float(value)
    elif type(value) is float and type(default) is int and value.is_integer():
        return int(value)
    got = repr(value) if len(str(value)) < 200 else f"{str(value)[:200]}..."
    raise SettingError(f"{name} wants {wanted} (default {shown(default)}), got {got}")


def shown(value):
    """A value as one would write it on the command line."""
    return ",".join(str(element) for element in value) if isinstance(value, tuple) else str(value)


def help_text(doc, settings):
    """The script's docstring, then every setting with its default and comment, under the headings of their groups."""
    texts = {name: f"  --{name}={shown(setting.default)}" for name, setting in settings.items()}
    width = min(40, max(map(len, texts.values()), default=0))
    lines = [doc.strip()] if doc else []
    for name, setting in settings.items():
        if setting.heading:
            lines += ["", setting.heading]
        lines.append(f"{texts[name]:<{width}}  {setting.comment}".rstrip())
    return "\n".join(lines)
