"""configurator.py: what arguments and config files may say, what a script's comments promise, --help."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import Setting, SettingError, configure, find_settings, help_text, keeps, parse

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = '''"""Train a thing."""

# data
data = "äöüßåé # b"  # folder of images
batch_size = 12  # >= 1: images per process and step

# optimizer
# (absolute)
lr = 1e-4  # > 0: learning rate
flip = True  # mirror half of the images
compile = "auto"  # auto | true | false: torch.compile
tokenizer = "bytes"  # bytes | gpt2 | ...: or a file
objective = ""  # "" | eps | v: of the prediction
drop = 0.1  # in [0, 1): share without condition
schedule = "flow"  # one of SCHEDULES: of the noise
eta = -1.0  # -1 or in (0, 1]: noise
ch_mult = (
    1,
    2,
)  # each >= 1: widths
betas = (0.9, 0.95)
extra = ()
names = ("a", "b")  # each a | b: both
masks = (True,)
SCHEDULES = {"flow": 1, "cosine": 2}
MAX = 3
_private = 4
table = {"not": "a setting"}

from configurator import configure

if __name__ == "__main__":
    cfg = configure(globals())
    print(sorted(cfg.changed), batch_size, cfg.batch_size)
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


@pytest.fixture
def settings(script):
    scope = {"__file__": str(script), "__name__": "train"}
    exec(compile(SCRIPT, str(script), "exec"), scope)
    return find_settings(scope | {"late": 1})  # not in the source


ARGUMENTS = [("batch_size=1_000", 1000), ("batch_size=1e5", 100_000), ("lr=3", 3.0), ("flip=FALSE", False)]
ARGUMENTS += [("flip", True), ("data=a=b, c", "a=b, c"), ("data=1", "1"), ("data=", ""), ("ch_mult=[3]", (3,))]
ARGUMENTS += [("ch_mult=1,2,4,4", (1, 2, 4, 4)), ("ch_mult=(1, 2,)", (1, 2)), ("ch_mult=()", ()), ("ch_mult=3", (3,))]
ARGUMENTS += [("betas=0,.99", (0.0, 0.99)), ("extra=1,2.5", (1, 2.5)), ("names=b,b", ("b", "b"))]
ARGUMENTS += [("masks=true,False", (True, False)), ("compile=True", "true"), ("tokenizer=my/File", "my/File")]
ARGUMENTS += [("objective=", ""), ("objective=v", "v"), ("eta=-1", -1.0), ("eta=1", 1.0), ("drop=0", 0.0)]


@pytest.mark.parametrize("argument, value", ARGUMENTS)
def test_arguments(settings, argument, value):
    (found,) = parse([f"--{argument}"], settings).values()
    assert repr(found) == repr(value)  # 3.0 is not 3


ERRORS = {
    "--batch_size=8.5": "--batch_size=8.5 must be int (default 12)",
    "--batch_size=many": "--batch_size=many must be int (default 12)",
    "--lr=fast": "--lr=fast must be float (default 0.0001)",
    "--lr=1" + "0" * 400: "--lr=1" + "0" * 199 + " must be float (default 0.0001)",
    "--flip=1": "--flip=1 must be bool (default True)",
    "--compile=a\nb": "--compile=a b must be one of auto | true | false (default auto)",
    "--ch_mult=1,2.5": "--ch_mult=1,2.5 must be tuple of int (default 1,2)",
    "--extra=a": "--extra=a must be tuple of numbers (default )",
    "--batch_size=0": "--batch_size=0 must be >= 1 (default 12)",
    "--lr=0": "--lr=0 must be > 0 (default 0.0001)",
    "--drop=1": "--drop=1 must be in [0, 1) (default 0.1)",
    "--drop=-1": "--drop=-1 must be in [0, 1) (default 0.1)",
    "--eta=0": "--eta=0 must be -1 or in (0, 1] (default -1.0)",
    "--compile=yes": "--compile=yes must be one of auto | true | false (default auto)",
    "--schedule=x": "--schedule=x must be one of flow | cosine (default flow)",
    "--objective=x": '--objective=x must be one of "" | eps | v (default )',
    "--ch_mult=1,0": "--ch_mult=1,0 must be each >= 1 (default 1,2)",
    "--names=a,c": "--names=a,c must be each one of a | b (default a,b)",
    "--bach_size=3": "unknown setting 'bach_size': did you mean 'batch_size'? (--help lists all)",
    "--lr": "--lr has no value: write --lr=value (default 0.0001)",
    "3": "3 is no config file ([Errno 2] No such file or directory: '3'): write --name=value, or the path of one",
}


@pytest.mark.parametrize("argument", ERRORS)
def test_errors_name_setting_value_and_what_is_allowed(settings, argument):
    with pytest.raises(SettingError) as caught:
        parse([argument], settings)
    assert str(caught.value) == ERRORS[argument]


# (values that keep it, values that do not)
CONTRACTS = {"> 0": ([1e-9], [0, -1]), ">= 0": ([0], [-1]), "<= 1": ([1], [1.5]), "< 1": ([0.5], [1])}
CONTRACTS |= {"in [0, 1]": ([0, 1], [-0.1, 1.1]), "in (0, 1)": ([0.5], [0, 1]), "in [-4e18, 4e18]": ([4e18], [5e18])}
CONTRACTS |= {"1 or > 2": ([1, 3], [2, 0]), "each > 0 or 1e-2": ([(1, 0.01)], [(1, 0)])}


@pytest.mark.parametrize("contract", CONTRACTS)
def test_contracts(contract):
    kept, broken = CONTRACTS[contract]
    nan = float("nan")
    assert all(keeps(value, contract) is True for value in kept)
    assert all(keeps(value, contract) is False for value in [*broken, (nan,) if "each" in contract else nan])


@pytest.mark.parametrize("comment", ["side in pixels: of crops", "a file, or a name: either", "model: what", "> x: y"])
def test_prose_is_no_contract(comment):
    assert keeps(0, Setting(0, comment).contract) is None


def test_config_file(settings, tmp_path):
    path = tmp_path / "config.py"
    path.write_text('"""A run."""\n# why\nlr = 1  # an int\nch_mult = [1, 2]\nbatch_size = 1e3\nflip = "False"\n')
    assert parse([str(path)], settings) == {"lr": 1.0, "ch_mult": (1, 2), "batch_size": 1000, "flip": False}
    assert parse([str(path), "--lr=2"], settings)["lr"] == 2.0
    assert parse(["--lr=2", str(path)], settings)["lr"] == 1.0, "later arguments win"


LINES = {
    "import os": ":3: not an assignment",
    "lr += 1": ":3: not an assignment",
    "lr = 2 * 3": ":3: lr is not a literal",
    "lr = print('executed')": ":3: lr is not a literal",
    "rl = 1": ":3: unknown setting 'rl': did you mean 'lr'?",
    "lr = True": ":3: --lr=True must be float",
    "ch_mult = 1.5": ":3: --ch_mult=1.5 must be tuple of int",
    "data = None": ":3: --data=None must be str",
    "lr = -1": ":3: --lr=-1 must be > 0",
    "lr = = 1": " is no config file (invalid syntax (config.py, line 3)): write",
}


@pytest.mark.parametrize("line", LINES)
def test_config_file_errors_name_file_and_line(settings, tmp_path, line, capsys):
    path = tmp_path / "config.py"
    path.write_text(f'"""A run."""\n\n{line}\n')
    with pytest.raises(SettingError) as caught:
        parse([str(path)], settings)
    assert str(caught.value).startswith(f"{path}{LINES[line]}") and "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_settings_comments_and_headings_come_from_the_source(settings):
    assert list(settings)[:4] == ["data", "batch_size", "lr", "flip"] and list(settings)[-1] == "masks"
    assert settings["data"] == ("äöüßåé # b", "folder of images", "data")
    assert settings["lr"] == (1e-4, "> 0: learning rate", "optimizer (absolute)")
    assert settings["ch_mult"].comment == "each >= 1: widths"
    text = help_text("Train a thing.", settings)
    assert text.startswith("Train a thing.") and "\n\noptimizer (absolute)\n  --lr=0.0001  " in text


def test_a_script(script):
    def run(*command):
        environment = {"PYTHONPATH": f"{ROOT}:{script.parent}"}
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout, done.stderr

    assert run(script, "--batch_size=4") == (0, "['batch_size'] 4 4\n", "")
    assert run(script, "--batch_size=0") == (2, "", "train.py: --batch_size=0 must be >= 1 (default 12)\n")
    status, out, _ = run(script, "--help")
    assert status == 0 and "--batch_size=12" in out and ">= 1: images per process and step" in out
    assert run("-c", "import train; print(train.batch_size)", "--batch_size=4")[1] == "12\n", "imports parse nothing"


def test_config_is_a_dict_with_attributes():
    cfg = configure({"lr": 1.0, "steps": 3, "seed": 0}, ["--lr=2", "--steps=3"])
    assert cfg == {"lr": 2.0, "steps": 3, "seed": 0} and cfg.lr == 2.0
    assert cfg.given == {"lr": 2.0, "steps": 3} and cfg.changed == {"lr": 2.0}
    other = cfg.replace(lr=3.0)
    assert other.lr == 3.0 and cfg.lr == 2.0 and other.given == cfg.given
    with pytest.raises(AttributeError, match="no setting 'rl'"):
        cfg.rl  # noqa: B018


SCRIPTS = ("train_vae", "train_ldm", "lpips_train", "sample", "fid", "bench", "convert", "app")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_default_keeps_its_contract_and_no_number_is_without_one(name):
    """Printed with -s: the contract of every setting."""
    for key, setting in find_settings(vars(importlib.import_module(name))).items():
        default, contract = setting.default, setting.contract
        kept = keeps(default, contract)
        print(f"{name}.{key}: {'-' if kept is None else contract}")
        assert setting.comment, f"{key} has no comment"
        assert kept is not False, f"{key}={default} breaks {contract}"
        is_number = type(default) in (int, float)
        assert kept or not is_number or key in ("seed", "t_mean"), f"{key} is a number without a range"
        looks_like_one = contract.startswith((">", "<", "in [", "in (", "each ")) or " | " in contract
        prose = keeps((0.5,) if default == () else default, contract) is None  # an empty tuple keeps any `each`
        assert not (looks_like_one and prose), f"{key}: {setting.comment!r} is prose by accident"


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda path: path.stem)
def test_shipped_configs_fit_their_script(path):
    names = set(re.findall(r"^([a-z]\w*) =", path.read_text(), re.M))
    script = next(s for s in SCRIPTS if names <= vars(importlib.import_module(s)).keys())
    cfg = configure(vars(importlib.import_module(script)).copy(), [str(path)])
    assert cfg.out_dir == f"out/{path.stem}", "every run leaves its files in its own folder"
