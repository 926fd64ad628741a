"""Settings of a script: its lower-case globals, changed by config files and by --name=value.

    batch_size = 12  # >= 1: images per process and step          <- default, what is allowed, what it means
    loss_type = "mse"  # mse | l1 | huber: of the prediction

    if __name__ == "__main__":
        cfg = configure(globals())                                # python train.py config/small.py --batch_size=32

Later arguments win. A config file holds literal assignments and is parsed, never executed.

The text before the first colon of a comment is checked if all of it is one of these; else it only describes:

    a | b | c     one of these words; `a | b | ...` also allows any other text; "" is the empty text
    > 0           also >=, <, <=
    in [0, 1)     an interval; a round bracket excludes its end
    each >= 1     for a tuple, each of its elements
    0 or >= 2     either
    one of NAME   one of the keys or entries of NAME, a global of the script
"""

import ast
import contextlib
import difflib
import io
import operator
import re
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple


class SettingError(ValueError):
    """A wrong argument or config file; the message is one line."""


class Config(dict):
    """{name: value} of every setting, also as attributes: cfg.lr is cfg["lr"].

    given: the settings named by the arguments.  changed: those that differ from their defaults.
    """

    given: dict
    changed: dict

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(f"no setting {name!r}")

    def replace(self, **values):
        """A copy with other values."""
        config = Config(self | values)
        config.given, config.changed = self.given, self.changed
        return config


class Setting(NamedTuple):
    default: bool | int | float | str | tuple
    comment: str = ""  # on the same line
    heading: str = ""  # the comment lines right above: the title of a group that begins here


def configure(scope, argv=None):
    """Apply `argv` (default: the command line) to the settings in `scope`, a script's globals(); return a `Config`.

    A wrong argument ends the program: one line on stderr, exit status 2. `--help` prints every setting.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = find_settings(scope)
    if "--help" in argv or "-h" in argv:
        print(help_text(scope.get("__doc__"), settings))
        sys.exit(0)
    try:
        values = parse(argv, settings)
    except SettingError as error:
        print(f"{Path(scope.get('__file__') or 'settings').name}: {error}", file=sys.stderr)
        sys.exit(2)
    scope.update(values)
    config = Config({name: scope[name] for name in settings})
    config.given = values
    config.changed = {name: value for name, value in config.items() if value != settings[name].default}
    return config


# --- reading a script ---


def find_settings(scope):
    """{name: Setting} of a script, in its order: lower-case top-level `name = value`, a bool, int, float, str or tuple.

    A scope without `__file__` (a plain dict) has no comments, and every name in it counts.
    """
    if "__file__" not in scope:
        return {name: Setting(value) for name, value in scope.items() if is_setting(name, value)}
    with tokenize.open(scope["__file__"]) as file:  # honors the file's encoding line
        source = file.read()
    lines = source.split("\n")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    settings = {}
    for node in ast.parse(source).body:
        name = assigned_name(node)
        if is_setting(name, scope.get(name)):
            first = node.lineno  # lines count from 1, so lines[first - 2] is the line above
            while first > 1 and lines[first - 2].startswith("#"):
                first -= 1
            heading = " ".join(comments[line] for line in range(first, node.lineno))
            settings[name] = Setting(scope[name], expanded(comments.get(node.end_lineno, ""), scope), heading)
    return settings


def expanded(comment, scope):
    """A comment `one of NAME: ...` with the entries of the script's global NAME, as `a | b | c: ...`."""
    match = re.match(r"one of (\w+)(.*)", comment)
    return " | ".join(scope[match[1]]) + match[2] if match else comment


def is_setting(name, value):
    return type(value) in (bool, int, float, str, tuple) and name == name.lower() and not name.startswith("_")


def assigned_name(node):
    """The name in a plain `name = value`, else None."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


# --- contracts ---

COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
NUMBER = r"(-?(?:[\d.]+(?:e[+-]?\d+)?|inf))"


def contract(comment):
    """(text, check) of what a comment promises before its first colon; None where that is prose.

    check(value) is whether a value is allowed.
    """
    text = comment.partition(":")[0].strip()
    check = parse_contract(text)
    return None if check is None else (text, check)


def parse_contract(text):
    if text.startswith("each "):
        check = parse_contract(text.removeprefix("each "))
        return check and (lambda values: all(map(check, values)))
    if " | " in text:
        words = [word.strip() for word in text.split("|")]
        if not all(re.fullmatch(r'""|[\w.+-]+', word) for word in words):
            return None
        return lambda value: "..." in words or (str(value) or '""') in words
    if " or " in text:
        checks = [parse_contract(part) for part in text.split(" or ")]
        return None if None in checks else lambda value: any(check(value) for check in checks)
    if match := re.fullmatch(rf"(>=?|<=?) {NUMBER}", text):
        compare, bound = COMPARE[match[1]], float(match[2])
        return lambda value: compare(value, bound)
    if match := re.fullmatch(rf"in ([\[(]){NUMBER}, {NUMBER}([\])])", text):
        above = operator.ge if match[1] == "[" else operator.gt
        below = operator.le if match[4] == "]" else operator.lt
        return lambda value: above(value, float(match[2])) and below(value, float(match[3]))
    if re.fullmatch(NUMBER, text):
        return lambda value: value == float(text)
    return None


def checked(name, value, setting):
    """`value` in the type of the default and within the contract; raises SettingError."""
    value = typed(name, value, setting.default)
    if (rule := contract(setting.comment)) is None:
        return value
    text, check = rule
    if isinstance(value, str) and not check(value) and check(value.lower()):
        value = value.lower()  # True for true
    if not check(value):
        allowed = f"one of {text}" if "|" in text else text
        raise SettingError(f"--{name}={as_text(value)} must be {allowed} (default {as_text(setting.default)})")
    return value


# --- reading arguments ---


def parse(argv, settings):
    """{name: value} that the arguments set; raises SettingError."""
    values = {}
    for argument in argv:
        if not argument.startswith("-"):
            values |= parse_file(argument, settings)
            continue
        name, equals, text = argument.removeprefix("--").partition("=")
        setting = find(name, settings)
        if not equals and not isinstance(setting.default, bool):
            raise SettingError(f"--{name} has no value: write --{name}=value (default {as_text(setting.default)})")
        values[name] = checked(name, literal(text, setting.default) if equals else True, setting)
    return values


def parse_file(path, settings):
    """{name: value} that a config file sets; it may hold `name = literal`, comments and a docstring, nothing else."""
    if not path.endswith(".py"):
        raise SettingError(f"cannot read {path!r}: write --name=value, or the path of a config file (.py)")
    if not Path(path).is_file():
        raise SettingError(f"config file {path} does not exist")
    try:
        module = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        at = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        raise SettingError(f"{path}{at} is not Python ({getattr(error, 'msg', error) or 'too deep'})") from None
    values = {}
    for node in module.body[1:] if ast.get_docstring(module) is not None else module.body:
        try:
            name = assigned_name(node)
            if name is None:
                raise SettingError("not an assignment: a config file holds only name = literal")
            setting = find(name, settings)
            try:
                value = ast.literal_eval(node.value)
            except (ValueError, TypeError, MemoryError, RecursionError):
                raise SettingError(f"{name} is not a literal: a config file is parsed, not executed") from None
            values[name] = checked(name, value, setting)
        except SettingError as error:
            raise SettingError(f"{path}:{node.lineno}: {error}") from None
    return values


def find(name, settings):
    if name not in settings:
        nearest = difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
        hint = f": did you mean {nearest[0]!r}?" if nearest else ""
        raise SettingError(f"unknown setting {name!r}{hint} (--help lists all)")
    return settings[name]


def literal(text, default):
    """Command-line text as the Python value that it spells in the type of `default`; the text itself if none."""
    text = text.strip() if not isinstance(default, str) else text
    if isinstance(default, tuple):  # 1,2,4,4 or (1,2,4,4) or [1,2,4,4]
        elements = text.strip("()[] ").split(",")
        return tuple(literal(element.strip(), element_of(default)) for element in elements if element.strip())
    if isinstance(default, bool):
        text = text.capitalize()  # true, TRUE -> True
    try:
        return text if isinstance(default, str) else ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # the last two: nested too deep
        return text


def element_of(default):
    """An element of a tuple whose type stands for all: a float, if there is one."""
    return next((element for element in default if isinstance(element, float)), default[0] if default else 0.0)


def typed(name, value, default):
    """`value` in the type of `default` (int for float, 1e5 for int, list for tuple); raises SettingError."""
    wanted = type(default).__name__
    if isinstance(default, tuple):
        wanted = f"tuple of {type(element_of(default)).__name__ if default else 'numbers'}"
        if isinstance(value, (tuple, list)):
            if not default and all(type(element) in (int, float) for element in value):
                return tuple(value)
            with contextlib.suppress(SettingError):  # named below, for the tuple
                return tuple(typed(name, element, element_of(default)) for element in value)
    elif type(value) is type(default):
        return value
    elif type(value) is int and type(default) is float and abs(value) < 2**1023:  # the largest float
        return float(value)
    elif type(value) is float and type(default) is int and value.is_integer():
        return int(value)
    raise SettingError(f"--{name} must be {wanted} (default {as_text(default)}), got {repr(value)[:200]}")


# --- writing ---


def as_text(value):
    """A value as one would write it on the command line."""
    return ",".join(str(element) for element in value) if isinstance(value, tuple) else str(value)


def help_text(doc, settings):
    """The script's docstring, then every setting with its default and comment, under the headings of their groups."""
    texts = {name: f"  --{name}={as_text(setting.default)}" for name, setting in settings.items()}
    width = min(40, max(map(len, texts.values()), default=0))
    lines = [doc.strip()] if doc else []
    for name, setting in settings.items():
        if setting.heading:
            lines += ["", setting.heading]
        lines.append(f"{texts[name]:<{width}}  {setting.comment}".rstrip())
    return "\n".join(lines)
