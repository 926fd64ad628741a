import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import SettingError, configure, find_settings, help_text, parse

ROOT = Path(__file__).resolve().parent.parent

DEFAULTS = {
    "batch_size": 12,
    "lr": 1e-4,
    "compile": False,
    "flip": True,
    "out_dir": "out",
    "ch_mult": (1, 2),
    "betas": (0.9, 0.95),
    "extra": (),
    "kinds": ("a", "b"),
}

SCRIPT = '''"""Train a thing.

    python train.py --batch_size=4
"""

import math
from pathlib import Path

# data
data = "a # b"  # folder of images
batch_size = 12  # images per process and step

# optimizer
# (absolute)
lr = 1e-4  # learning rate
ch_mult = (
    1,
    2,
)  # widths
MAX = 3
_private = 4
table = {"not": "a setting"}

from configurator import configure


def train():
    local = 1


if __name__ == "__main__":
    config = configure(globals())
    print(sorted(config), batch_size, config.changed)
'''


@pytest.fixture
def write(tmp_path):
    def write(text, name="config.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def error(*argv, **defaults):
    with pytest.raises(SettingError) as caught:
        parse(argv, defaults or DEFAULTS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("--batch_size=8", 8),
        ("--batch_size=1_000", 1000),
        ("--batch_size=1e5", 100_000),
        ("--batch_size=-1", -1),
        ("--lr=3", 3.0),
        ("--lr=1e-4", 1e-4),
        ("--lr=-.5", -0.5),
        ("--flip=FALSE", False),
        ("--compile=True", True),
        ("--compile", True),
        ("--out_dir=a=b, c", "a=b, c"),
        ("--out_dir=1", "1"),
        ("--out_dir=", ""),
        ("--ch_mult=1,2,4,4", (1, 2, 4, 4)),
        ("--ch_mult=(1, 2,)", (1, 2)),
        ("--ch_mult=[3]", (3,)),
        ("--ch_mult=", ()),
        ("--ch_mult=()", ()),
        ("--betas=0,.99", (0.0, 0.99)),
        ("--extra=1,2.5", (1, 2.5)),
        ("--kinds=c,d", ("c", "d")),
    ],
)
def test_arguments(argument, value):
    ((name, got),) = parse([argument], DEFAULTS).items()
    assert argument.startswith(f"--{name}")
    assert got == value and type(got) is type(value)
    if isinstance(value, tuple):
        assert [type(element) for element in got] == [type(element) for element in value]


@pytest.mark.parametrize(
    "argument, wanted, got",
    [
        ("--batch_size=8.5", "int", 8.5),
        ("--batch_size=nan", "int", "nan"),
        ("--batch_size=many", "int", "many"),
        ("--batch_size=", "int", ""),
        ("--batch_size=True", "int", True),
        ("--lr=fast", "float", "fast"),
        ("--flip=1", "bool", 1),
        ("--flip=yes", "bool", "yes"),
        ("--ch_mult=1,,2", "tuple of int", "1,,2"),
        ("--ch_mult=1,2.5", "tuple of int", [1, 2.5]),
        ("--betas=a", "tuple of float", "a"),
        ("--extra=a", "tuple of numbers", "a"),
        ("--extra=None", "tuple of numbers", [None]),
    ],
)
def test_wrong_types_name_setting_type_default_and_value(argument, wanted, got):
    name = argument.removeprefix("--").partition("=")[0]
    default = str(DEFAULTS[name]).strip("()").replace(", ", ",")
    assert error(argument) == f"{name} wants {wanted} (default {default}), got {got!r}"


def test_other_wrong_arguments():
    assert "unknown setting 'bach_size': did you mean 'batch_size'?" in error("--bach_size=3")
    assert "did you mean" in error("--bach_size")
    assert "write --lr=value" in error("--lr")
    assert "unknown setting '-lr': did you mean 'lr'?" in error("-lr=3")
    assert "write --name=value" in error("3")
    assert error("config/none.py") == "config file config/none.py does not exist"


def test_config_file(write):
    path = write(
        '"""A run."""\n# why\nlr = 1  # an int\nch_mult = [1, 2]\nbatch_size = 1e3\nout_dir = "x"\nflip = False\n'
    )
    values = {"lr": 1.0, "ch_mult": (1, 2), "batch_size": 1000, "out_dir": "x", "flip": False}
    assert parse([path], DEFAULTS) == values
    assert type(parse([path], DEFAULTS)["lr"]) is float
    assert parse([path, "--lr=2"], DEFAULTS)["lr"] == 2.0
    assert parse(["--lr=2", path], DEFAULTS)["lr"] == 1.0, "later arguments win"


@pytest.mark.parametrize(
    "line, message",
    [
        ("import os", "not an assignment"),
        ("a = b = 1", "not an assignment"),
        ("lr += 1", "not an assignment"),
        ("'text'", "not an assignment"),
        ("lr = 2 * 3", "lr is not a literal"),
        ("lr = print('executed')", "lr is not a literal"),
        ("rl = 1", "unknown setting 'rl': did you mean 'lr'?"),
        ("lr = '1'", "lr wants float (default 0.0001), got '1'"),
        ("batch_size = True", "batch_size wants int"),
        ("flip = 1", "flip wants bool"),
        ("out_dir = 1", "out_dir wants str"),
        ("ch_mult = 1", "ch_mult wants tuple of int"),
        ("ch_mult = (1, '2')", "ch_mult wants tuple of int"),
        ("lr = = 1", "invalid syntax"),
    ],
)
def test_config_file_errors_name_file_and_line(write, line, message, capsys):
    path = write(f'"""A run."""\n\n{line}\n')
    assert error(path).startswith(f"{path}:3: {message}")
    assert capsys.readouterr().out == ""


def test_configure_sets_the_scope_and_tells_what_changed():
    scope = dict(DEFAULTS, UPPER=1, _hidden=2, table={}, nothing=None)
    config = configure(scope, ["--lr=1", "--batch_size=12"])
    assert config == DEFAULTS | {"lr": 1.0} and scope["lr"] == 1.0 and scope["UPPER"] == 1
    assert config.changed == {"lr": 1.0} and config.given == {"lr": 1.0, "batch_size": 12}
    assert configure(dict(DEFAULTS), []).changed == {}


def test_configure_ends_the_program_with_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        configure(dict(DEFAULTS), ["--lr=fast"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "settings: lr wants float (default 0.0001), got 'fast'\n"


def test_settings_comments_and_headings_come_from_the_source(write):
    scope = runpy.run_path(write(SCRIPT, "train.py"), run_name="train")
    scope["late"] = 1  # not in the source: no setting
    settings = find_settings(scope)
    assert list(settings) == ["data", "batch_size", "lr", "ch_mult"]
    assert settings["data"] == ("a # b", "folder of images", "data")
    assert settings["batch_size"] == (12, "images per process and step", "")
    assert settings["lr"] == (1e-4, "learning rate", "optimizer (absolute)")
    assert settings["ch_mult"].comment == "widths"
    text = help_text(scope["__doc__"], settings)
    assert text.startswith("Train a thing.")
    assert "\noptimizer (absolute)\n  --lr=0.0001  " in text and "  --ch_mult=1,2  " in text and "widths" in text


def test_a_script(write):
    path = write(SCRIPT, "train.py")
    root = str(Path(__file__).parent.parent)

    def run(*command):
        return subprocess.run(
            [sys.executable, *command],
            capture_output=True,
            check=False,
            text=True,
            env={"PYTHONPATH": f"{root}:{Path(path).parent}"},
        )

    done = run(path, "--batch_size=4")
    assert done.stdout == "['batch_size', 'ch_mult', 'data', 'lr'] 4 {'batch_size': 4}\n"
    done = run(path, "--batch_siz=4")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "train.py: unknown setting 'batch_siz': did you mean 'batch_size'? (--help lists all)\n"
    done = run(path, "--help")
    assert done.returncode == 0 and "images per process and step" in done.stdout
    done = run("-c", "import train; print(train.batch_size)", "--batch_size=4")
    assert done.stdout == "12\n" and done.stderr == "", "importing parses nothing"


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda path: path.stem)
def test_shipped_configs_fit_their_script(path):
    names = set(re.findall(r"^([a-z]\w*) =", path.read_text(), re.M))
    scripts = ("train_vae", "train_ldm")  # its own is the one that knows every name in it
    script = next(s for s in scripts if names <= vars(importlib.import_module(s)).keys())
    config = configure(vars(importlib.import_module(script)).copy(), [str(path)])
    assert config.changed["out_dir"] == f"out/{path.stem}", "every named run leaves its files in its own folder"
