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
import difflib
import operator
import re
import sys
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

    @property
    def contract(self):
        return self.comment.partition(":")[0].strip()


def configure(scope, argv=None, more=None):
    """Apply `argv` (default: the command line) to the settings in `scope`, a script's globals(); return a `Config`.

    more: {name: Setting} of another script, see `find_settings`, which follow the script's own.
    A wrong argument ends the program: one line on stderr, exit status 2. `--help` prints every setting.
    """
    argv = sys.argv[1:] if argv is None else argv
    own = find_settings(scope)
    settings = own | (more or {}) | own  # in this order; of one name the script's own
    if "--help" in argv or "-h" in argv:
        print(help_text(scope.get("__doc__"), settings))
        sys.exit(0)
    try:
        values = parse(argv, settings)
    except SettingError as error:
        print(f"{Path(scope.get('__file__', 'settings')).name}: {error}", file=sys.stderr)
        sys.exit(2)
    scope.update(values)
    return make_config(settings, values)


def make_config(settings, values):
    """The Config of {name: Setting} with {name: value} of those that are given."""
    config = Config({name: setting.default for name, setting in settings.items()} | values)
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
    source = Path(scope["__file__"]).read_text(encoding="utf-8-sig")
    lines, settings = source.split("\n"), {}
    for node in ast.parse(source).body:
        name = assigned_name(node)
        if is_setting(name, scope.get(name)):
            comment = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()  # offsets count bytes
            comment = re.sub(r"^one of (\w+)", lambda match: " | ".join(scope[match[1]]), comment.lstrip("# "))
            first = node.lineno - 1
            while first > 0 and lines[first - 1].startswith("#"):
                first -= 1
            heading = " ".join(line.lstrip("# ") for line in lines[first : node.lineno - 1])
            settings[name] = Setting(scope[name], comment, heading)
    return settings


def is_setting(name, value):
    return type(value) in (bool, int, float, str, tuple) and name == name.lower() and not name.startswith("_")


def assigned_name(node):
    """The name in a plain `name = value`, else None."""
    plain = isinstance(node, ast.Assign) and len(node.targets) == 1
    return getattr(node.targets[0], "id", None) if plain else None


def help_text(doc, settings):
    """The script's docstring, then every setting with its default and comment, under the headings of their groups."""
    lines = [doc.strip()] if doc else []
    for name, setting in settings.items():
        if setting.heading:
            lines += ["", setting.heading]
        lines.append(f"{f'  --{name}={as_text(setting.default)}':<40}  {setting.comment}".rstrip())
    return "\n".join(lines)


def as_text(value):
    """A value as one would write it on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


# --- values ---

# what ast raises at text that is no literal, the last two if it is nested too deeply; and float() at 400 digits
NO_LITERAL = (SyntaxError, ValueError, TypeError, OverflowError, MemoryError, RecursionError)
COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
NUMBER = r"(-?[\d.]+(?:e-?\d+)?)"


def keeps(value, contract):
    """Whether a contract, a comment up to its colon, allows a value; None where it is prose."""
    if contract.startswith("each "):
        found = [keeps(element, contract.removeprefix("each ")) for element in value]
        return None if None in found else all(found)
    if " | " in contract:
        words = [word.strip() for word in contract.split("|")]
        if all(re.fullmatch(r'""|[\w.+-]+', word) for word in words):
            return "..." in words or (str(value) or '""') in words
    elif " or " in contract:
        found = [keeps(value, part) for part in contract.split(" or ")]
        return None if None in found else any(found)
    elif match := re.fullmatch(rf"(>=?|<=?) {NUMBER}", contract):
        return COMPARE[match[1]](value, float(match[2]))
    elif match := re.fullmatch(rf"in ([\[(]){NUMBER}, {NUMBER}([\])])", contract):
        low, high = COMPARE[">=" if match[1] == "[" else ">"], COMPARE["<=" if match[4] == "]" else "<"]
        return low(value, float(match[2])) and high(value, float(match[3]))
    elif re.fullmatch(NUMBER, contract):
        return value == float(contract)
    return None


def checked(name, value, setting):
    """A value, or the text of one, in the type of a setting's default and within its contract; raises SettingError."""
    default, contract = setting.default, setting.contract
    try:
        found = typed(value, default)
        if isinstance(found, str) and not keeps(found, contract) and keeps(found.lower(), contract):
            found = found.lower()  # True for true
        if keeps(found, contract) is not False:
            return found
        allowed = re.sub("^(each )?", r"\1one of ", contract) if "|" in contract else contract
    except NO_LITERAL:
        allowed = type(default).__name__
        if isinstance(default, tuple):
            allowed += f" of {type(element_of(default)).__name__ if default else 'numbers'}"
    shown = " ".join(as_text(value)[:200].split())
    raise SettingError(f"--{name}={shown} must be {allowed} (default {as_text(default)})")


def typed(value, default):
    """A value, or the text of one, in the type of `default`: 1 is a float too, 1e5 an int; raises one of NO_LITERAL."""
    if isinstance(default, tuple):
        if isinstance(value, str):  # 1,2,4,4 or (1,2,4,4) or [1,2,4,4]
            value = [element.strip() for element in value.strip("()[] ").split(",") if element.strip()]
        value = value if isinstance(value, (tuple, list)) else [value]  # one number is a tuple of one, as in its text
        return tuple(typed(element, element_of(default)) for element in value)
    if isinstance(value, str) and not isinstance(default, str):
        value = ast.literal_eval(value.strip().capitalize() if isinstance(default, bool) else value.strip())
    if type(default) is float and type(value) is int:
        return float(value)
    if type(default) is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) not in ((int, float) if default is None else (type(default),)):
        raise TypeError
    return value


def element_of(default):
    """An element of a tuple whose type stands for all: a float, if there is one; () is of any numbers: None."""
    return next((element for element in default if isinstance(element, float)), default[0] if default else None)


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
        values[name] = checked(name, text if equals else True, setting)
    return values


def parse_file(path, settings):
    """{name: value} that a config file sets; it may hold `name = literal`, comments and a docstring, nothing else."""
    try:
        module = ast.parse(Path(path).read_bytes(), path)
    except (OSError, *NO_LITERAL) as error:
        raise SettingError(f"{path} is no config file ({error}): write --name=value, or the path of one") from None
    values = {}
    for node in module.body[1:] if ast.get_docstring(module) is not None else module.body:
        try:
            name = assigned_name(node)
            if name is None:
                raise SettingError("not an assignment: a config file holds only name = literal")
            setting = find(name, settings)
            values[name] = checked(name, ast.literal_eval(node.value), setting)
        except SettingError as error:
            raise SettingError(f"{path}:{node.lineno}: {error}") from None
        except NO_LITERAL:
            raise SettingError(f"{path}:{node.lineno}: {name} is not a literal: config files are not run") from None
    return values


def find(name, settings):
    if name not in settings:
        nearest = difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
        hint = f": did you mean {nearest[0]!r}?" if nearest else ""
        raise SettingError(f"unknown setting {name!r}{hint} (--help lists all)")
    return settings[name]
