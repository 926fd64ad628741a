"""bench.py: every row it names, the training scripts' own steps, diffusers of the same size, the trace."""

import contextlib
import functools
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench
import train_ldm
import train_vae
from configurator import parse
from unet import UNet

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(channels=32, channel_mult=(1, 2), num_heads=0, head_dim=32, context_dim=16, linear_proj=True)
TINY_VAE = dict(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(name=value, ...) -> {row's name: what was measured}, what was printed; in shapes of seconds."""
    monkeypatch.setattr(bench, "SMALL", TINY)
    monkeypatch.setattr(bench, "SMALL_VAE", TINY_VAE)
    monkeypatch.setattr(bench, "STEPS", 2)
    monkeypatch.setattr(bench, "matmul_peak", lambda place: 0.1)

    def run(**settings):
        config = {"batch_size": 1, "seconds": 0.0, "device": "cpu"} | settings
        found = bench.table(bench.defaults(bench) | config)
        return {row.name: values for row, values in found}, capsys.readouterr().out

    return run


def test_a_row_for_everything(run, monkeypatch):
    """Each back end at each shape, forward and with backward, and each kind of work; both sizes."""
    monkeypatch.setattr(bench, "measure", lambda *a: {"why": "not asked for"})
    for place, name in ((train_ldm, "count_tflop"), (train_vae, "count_tflop"), (bench, "forward_tflop")):
        monkeypatch.setattr(place, name, lambda *a: 1.0)  # counting takes seconds
    for size, lengths, unet in (("small", (1024, 256, 64, 16), "small"), ("sd2", (4096, 1024, 256, 64), "SD2-size")):
        found, out = run(size=size)
        names = " ".join(found)
        for backend in ("auto", "triton", "xformers", "sdpa", "sdpa_flash", "sdpa_cudnn", "sdpa_math", "reference"):
            ways = r" \((flash|math|efficient|cudnn)\)" * (backend == "sdpa")  # it says which it takes
            rows = [name for name in found if re.match(f"attention {backend}{ways},", name)]
            assert len(rows) == len(set(rows)) == 26 and sum("with backward" in row for row in rows) == 13, backend
            for L, heads in zip(lengths, (5, 10, 20, 20)):
                assert sum(f"x{L}, {heads} heads of 64, " in row and "QK" not in row for row in rows) == 2
                assert sum(f"x{L} to 77 keys, {heads} heads of 64, " in row and "QK" not in row for row in rows) == 2
            assert sum("QK-norm" in row for row in rows) == 4
            for L, d in zip(lengths, (40, 80, 160)):
                assert sum(f"x{L}, 8 heads of {d}" in row for row in rows) == 2
        assert names.count(f"{unet} U-Net training step") == 2 and f"{unet} U-Net forward" in names
        assert names.count(f"train_ldm.py itself, {unet} U-Net") == 1
        for words in ("training step with LPIPS", "guided DDIM steps", " decode, ", "encode and decode"):
            assert words in names, words
        assert out.count("not measured here: not asked for") == len(found)
    assert "77 keys" in names and "256 px" in names and "512 px" in names and "KL-f8" in names


def test_every_model_row_runs_beside_diffusers(run, diffusers, monkeypatch):
    """And the training rows run the scripts' own steps with their own settings, ours and theirs."""
    calls = []
    for script in (train_ldm, train_vae):

        def spy(models, batch, noise, cfg, *more, script=script, real=script.train_step):
            net = models.get("denoiser", models.get("vae"))
            calls.append((script.__name__, type(net).__name__))
            assert cfg["grad_clip"] == 1.0 and cfg["ema_decay"] == 0.9999
            return real(models, batch, noise, cfg, *more)

        monkeypatch.setattr(script, "train_step", spy)
    found, out = run(rows="unet,forward,vae,sample,decode,autoencode", peer=True)
    assert set(calls) == {("train_ldm", name) for name in ("Denoiser", "TheirUNet")} | {
        ("train_vae", name) for name in ("VAE", "TheirVAE")
    }
    assert len(found) == 7
    for name, values in found.items():
        assert values["ms"] >= values["least"] > 0 and values["speed"] > 0 and values["ratio"] > 0, name
        assert values["tflops"] == pytest.approx(values["share"] * 0.1) and values["memory"] > 0.05
    assert len(re.findall(r"\d\.\d\dx$", out, re.M)) == 7 and "theirs / ours" in out
    assert f"torch {torch.__version__}, diffusers {diffusers.__version__}" in out and "git " in out


@pytest.fixture
def short_path():
    """Data workers have sockets in it, whose addresses are 103 characters at most."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_the_loop_runs_as_its_users_run_it(run, short_path, monkeypatch):
    """In a process of its own, of which nothing is left, beside the bare step of as large a network."""
    monkeypatch.setenv("TMPDIR", str(short_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # asks the environment again
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text() if children.exists() else ""
    found, out = run(rows="loop", seconds=0.02, compile="false")
    ((name, values),) = found.items()
    assert name == "train_ldm.py itself, small U-Net, classes, cached latents, 64 px, batch 1"
    assert values["ms"] >= values["least"] > 0 and values["speed"] == pytest.approx(1e3 / values["ms"])
    assert values["tflops"] == pytest.approx(values["share"] * 0.1) and values["memory"] > 0.05
    assert values["host"] < 1 and values["busy"] > 0
    assert f"host {values['host']:.1%} (bare step {values['busy']:.2f} ms)" in out
    assert "host: share of an iteration that is not the step" in out.splitlines()[0]
    assert before == (children.read_text() if children.exists() else "")
    assert not [path for path in short_path.iterdir() if not path.name.startswith("torchinductor")]


def test_the_loop_ends_with_who_began_it(short_path):
    """Stopped by SIGTERM in the middle, as a batch system does, bench.py leaves no process and no folder."""
    command = [sys.executable, ROOT / "bench.py", "--rows=loop", "--size=small", "--batch_size=1", "--device=cpu"]
    process = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(short_path)}, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (found := list(short_path.glob("tmp*/out/log.jsonl"))):
        time.sleep(0.1)
    assert len(found) == 1  # train_ldm.py is under way
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not [path for path in short_path.iterdir() if not path.name.startswith("torchinductor")]
    for at in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # another's process, or one that ends meanwhile
            assert not os.readlink(at).startswith(str(short_path)), at


@pytest.mark.parametrize("unet, side", [(bench.SMALL, 64), (bench.SD2, 256)])
def test_the_loop_trains_the_network_of_the_bare_step(unet, side):
    """The arguments are the script's own, and give the U-Net that unet_training makes; nothing else differs."""
    place = bench.Place(torch.device("cuda"), torch.bfloat16, True)
    given = parse(bench.loop_arguments(place, unet, side, 64), bench.defaults(train_ldm))
    cfg = bench.defaults(train_ldm) | given
    train_ldm.check_settings(cfg)
    with torch.device("meta"):
        wanted = UNet(**unet).settings
    names = [name for name in wanted if name in cfg]
    for name in names:  # the script has (2,) where UNet() takes 2 too
        assert wanted[name] in (cfg[name], *(cfg[name] if name in ("num_res_blocks", "self_attention") else ())), name
    assert len(names) > 15
    assert cfg["text_width"] == wanted["context_dim"] and (cfg["cond"], cfg["class_embed"]) == ("class", "token")
    assert (cfg["device"], cfg["dtype"], cfg["compile"], cfg["batch_size"]) == ("cuda", "bfloat16", "True", 64)
    what_a_step_hangs_on = (
        "objective",
        "schedule",
        "timesteps",
        "loss_type",
        "loss_weight",
        "grad_clip",
        "skip_spikes",
    )
    assert not {*what_a_step_hangs_on, "ema_stds", "grad_accum", "checkpointing", "attention"} & {*given}


def test_the_share_of_the_host(monkeypatch):
    """On a CPU the median over pairs of neighbours, on a GPU beside the time in which it was busy, else as on a CPU."""
    monkeypatch.setattr(bench, "warm_up", lambda run, place: 9.0)
    monkeypatch.setattr(bench, "free_memory", lambda place: 8.0)
    monkeypatch.setattr(bench, "beside_script", lambda *a: ([104.0, 100.0, 200.0], [99.0, 101.0, 188.0], 3.5))
    monkeypatch.setattr(bench, "gpu_busy", lambda run: 91.0)
    row = bench.Row("loop", "images", 8, 0.5, lambda theirs: None, 8.0, has_peer=False, script=lambda n: None)
    for device, host, what in (("cpu", 5 / 104, "bare step 101.00 ms"), ("cuda", 13 / 104, "GPU busy 91.00 ms")):
        place = bench.Place(torch.device(device), torch.float32, False)
        found = bench.measure(row, place, 10.0, {"seconds": 1.0, "patience": 60.0, "peer": True})
        assert found["host"] == pytest.approx(host) and (found["ms"], found["least"]) == (104.0, 100.0)
        assert found["memory"] == 3.5 and found["speed"] == pytest.approx(8 / 0.104)
        assert bench.line(row, found).endswith(f"  host {100 * host:.1f}% ({what})")
    monkeypatch.setattr(bench, "gpu_busy", lambda run: 0.0)  # the profiler may see nothing
    found = bench.measure(row, place, 10.0, {"seconds": 1.0, "patience": 60.0, "peer": False})
    assert found["busy"] == 101.0 and found["host"] == pytest.approx(5 / 104)
    assert "needs 8 GiB" in bench.measure(row._replace(memory=8.1), place, 10.0, {"patience": 9, "peer": False})["why"]


def test_how_long_a_gpu_is_busy():
    """Kernels and copies, what overlaps once; not the host's calls, nor the ranges that a name was given to."""
    event = functools.partial(FunctionEvent, 0, "", 0, device_type=DeviceType.CUDA)
    events = [event(2000, 2500), event(1000, 1300), event(1200, 1250), event(1250, 1400), event(2500, 2600)]
    events += [event(0, 9000, is_user_annotation=True), event(0, 9000, device_type=DeviceType.CPU)]
    assert bench.busy_ms(events) == pytest.approx(1.0) and bench.busy_ms(events[-2:]) == 0


def test_a_script_that_fails_is_told(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # and no word of where the two meet
    found, out = run(rows="loop,decode", seconds=0.02)
    loop, decode = found.values()
    assert loop["why"].startswith("train_ldm.py: ") and "rendezvous" in loop["why"], loop
    assert f"not measured here: {loop['why']}" in out and decode["ms"] > 0


def test_attention_rows(run, monkeypatch):
    """What runs here is measured, what does not says why."""
    monkeypatch.setattr(bench, "BACKENDS", ("reference", "none_such"))
    found, out = run(rows="attention")
    for name, values in found.items():
        if "none_such" in name:
            assert "none_such" in values["why"] and f"not measured here: {values['why']}" in out
        else:
            assert values["ms"] > 0 and "ratio" not in values, name


def test_formula_of_attention():
    """4 L M d multiplications and additions for each head; the reference's own count, which has two products."""
    place = bench.Place(torch.device("cpu"), torch.float32, False)
    row = next(r for r in bench.attention_rows(True, place, 2) if "reference" in r.name and "no backward" in r.name)
    normed = [r for r in bench.attention_rows(True, place, 2) if "reference" in r.name and "QK-norm, with" in r.name]
    assert [len(r.make(False)()) for r in normed] == [5, 5], "the gradients of the norm's weights are in the time"
    with bench.FlopCounterMode(display=False) as counter:
        row.make(False)()
    assert counter.get_total_flops() == pytest.approx(row.tflop * 1e12)


def test_formula_of_models(run, monkeypatch):
    """The count for a training step is that of its operators, but for what conv.py saves and the optimizer adds."""
    rows = {}
    monkeypatch.setattr(bench, "measure", lambda row, *a: rows.update({row.name: row}) or {"why": ""})
    run(rows="forward,autoencode,unet", batch_size=2)
    for name, row in rows.items():
        # attention as two products, which are counted
        with sdpa_kernel(SDPBackend.MATH), bench.FlopCounterMode(display=False) as counter:
            row.make(False)()
        assert counter.get_total_flops() / 1e12 == pytest.approx(row.tflop, rel=0.25), name


@pytest.mark.parametrize("kind, settings", [("UNet", bench.SD2), ("VAE", bench.KL_F8), ("UNet", TINY)])
def test_diffusers_has_as_many_parameters(diffusers, kind, settings):
    with torch.device("meta"):
        theirs = getattr(bench, f"Their{kind}")(settings)
    counts = {"UNet": {1024: 865_910_724}, "VAE": {None: 83_653_863}}[kind]
    wanted = counts.get(settings.get("context_dim"))
    assert wanted in (None, sum(p.numel() for p in theirs.parameters()))


def test_other_numbers_of_parameters_are_noticed(diffusers, monkeypatch):
    monkeypatch.setattr(bench, "UNet", lambda **s: torch.nn.Linear(2, 2))
    with pytest.raises(AssertionError, match="parameters, ours 6"), torch.device("meta"):
        bench.TheirUNet(TINY)


def test_what_would_take_too_much_is_left_out(run, monkeypatch):
    found, out = run(rows="decode", patience=1e-6, profile="trace.json")
    assert "no trace in trace.json: no row ran" in out
    assert all("see patience" in values["why"] for values in found.values()) and out.count("not measured here") == 1
    monkeypatch.setattr(bench, "free_memory", lambda place: 0.0)
    found, _ = run(rows="unet,loop")
    assert all("GiB" in values["why"] for values in found.values())


def test_trace(run, tmp_path):
    run(rows="forward", profile=f"{tmp_path}/trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("conv" in event.get("name", "") for event in events)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rows": "unet,nets"}, "rows=nets is not one of attention, unet,"),
        ({"size": "big"}, "size=big is not one of auto, small, sd2"),
        ({"dtype": "float16"}, "dtype=float16 is not one of"),
        ({"compile": "yes"}, "compile=yes is not one of auto, true, false"),
        ({"batch_size": -1}, "batch_size=-1 is not 0 or more"),
        ({"seconds": -0.5}, "seconds=-0.5 is not 0 or more"),
        ({"patience": float("nan")}, "patience=nan is not 0 or more"),
        ({"profile": "no/such/trace.json"}, "profile=no/such/trace.json: there is no such folder, make it first"),
    ],
)
def test_bad_settings(run, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(**settings)


def test_without_diffusers(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="pip install -r tests/requirements.txt"):
        run(peer=True)


def test_the_command(monkeypatch, capsys, tmp_path):
    """One line of error and nothing overwritten."""
    (tmp_path / "there.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["bench.py", f"--profile={tmp_path}/there.json"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(ValueError, match="is there already"):
        runpy.run_path(f"{ROOT}/bench.py", run_name="__main__")
