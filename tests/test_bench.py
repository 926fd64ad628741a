"""bench.py: every row runs, ours and diffusers'; the training rows are the scripts' own steps; what is counted."""

import functools
import subprocess

import pytest
import torch

import bench
import train_ldm
import train_vae
from configurator import Config, configure
from unet import UNet

TINY = dict(channels=32, channel_mult=(1, 2), num_heads=0, head_dim=32, context_dim=16, linear_proj=True)
TINY_VAE = dict(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4)
HERE = bench.Bench(torch.device("cpu"), torch.float32, False, TINY, TINY_VAE)


@pytest.fixture
def run(monkeypatch, capsys):
    """run("--name=value", ...) -> ({row: its other cells}, what was printed), in shapes that take seconds."""
    monkeypatch.setattr(bench, "SMALL", TINY)
    monkeypatch.setattr(bench, "SMALL_VAE", TINY_VAE)
    monkeypatch.setattr(bench, "matmul_tflops", lambda bench: 0.1)

    def run(*args):
        scope = dict(vars(bench))
        lines = bench.main(configure(scope, ["--batch_size=1", "--seconds=0", "--device=cpu", *args]))
        return {name: cells for name, *cells in lines}, capsys.readouterr().out

    return run


def test_model_rows_beside_diffusers(run, diffusers, monkeypatch, tmp_path):
    """The training rows call the scripts' train_step with the scripts' settings; the first row's trace is written."""
    calls = set()
    for script in (train_ldm, train_vae):

        def spy(net, batch, noise, cfg, *more, script=script, real=script.train_step):
            calls.add((script.__name__, type(net).__name__))
            assert cfg.grad_clip == 1.0 and cfg.ema_decay == 0.9999
            return real(net, batch, noise, cfg, *more)

        monkeypatch.setattr(script, "train_step", spy)
    monkeypatch.setattr(bench, "random_lpips", functools.partial(bench.random_lpips, "squeeze"))  # sooner
    found, out = run("--rows=unet,forward,vae,autoencode", "--peer", f"--profile={tmp_path}/trace.json")
    assert {name for _, name in calls} == {"Denoiser", "PeerUNet", "VAE", "PeerVAE"} and len(calls) == 4
    assert len(found) == 6 and out.count("| small ") == 6
    for ms, images, tflops, share, _, ratio in found.values():
        assert float(ms) * float(images) == pytest.approx(1e3, rel=0.01)
        assert float(share.rstrip("%")) == pytest.approx(1e3 * float(tflops), rel=0.2, abs=0.1)
        assert float(ratio.rstrip("x")) > 0
    assert "backward" in (tmp_path / "trace.json").read_text().lower()


@pytest.mark.parametrize("size, longest", [("small", 1024), ("sd2", 4096)])
def test_attention_rows(run, monkeypatch, size, longest):
    """Each backend that runs here at each shape, forward and with backward; the others with the reason."""
    monkeypatch.setattr(bench, "measure", lambda row, *a: ([row.name, "-"], None))
    found, out = run("--rows=attention", f"--size={size}")
    backends = {name.split()[1] for name in found}
    assert len(found) == 2 * 11 * len(backends) and backends >= {"sdpa,", "sdpa_flash,", "sdpa_math,", "reference,"}
    assert f"attention sdpa, 1x{longest} to {longest} keys, 5 heads of 64, no backward" in found
    assert f"attention sdpa_flash, 1x{longest // 16} to 77 keys, 20 heads of 64, with backward" in found
    assert "attention sdpa_cudnn: no kernels for cpu; use sdpa" in out


def test_tflop():
    """By the formula for attention, whose two products are counted; for a model three times forward is training."""
    row = next(row for row in bench.attention_rows(HERE, True, 1) if "reference" in row.name)
    assert bench.count_tflop(row.make(peer=False)) == pytest.approx(row.tflop)
    assert len(bench.attention_call(HERE, "sdpa", (1, 4, 1, 8), (1, 5, 1, 8), True, False)()) == 3
    forward, training = (bench.count_tflop(f(HERE, 32, 1, False)) for f in (bench.unet_forward, bench.unet_training))
    assert training == pytest.approx(3 * forward, rel=0.1)


def test_a_backend_that_fails_is_a_line(monkeypatch):
    def fail(peer):
        raise RuntimeError("no kernel\nand more")

    cfg = Config(peer=False, seconds=0.0)
    cells, run = bench.measure(bench.Row("attention x", 1, fail, tflop=1.0), HERE, cfg, 1.0)
    assert cells == ["attention x", "cannot run: no kernel"] and run is None
    with pytest.raises(RuntimeError):  # but a model's is a bug
        bench.measure(bench.Row("U-Net", 1, fail), HERE, cfg, 1.0)


def test_sides_take_turns(monkeypatch):
    order = []
    monkeypatch.setattr(bench, "clock", lambda run, where, times=1: run() or (4.0 if times == 1 else 1.0))
    rounds = bench.take_turns([lambda: order.append("ours"), lambda: order.append("theirs")], HERE, 0.0)
    assert rounds == [[1.0] * 3] * 2 and order[-6:] == ["ours", "theirs"] * 3


@pytest.mark.parametrize(
    "kind, settings, count",
    [
        ("UNet", bench.SD2, 865_910_724),
        ("VAE", bench.KL_F8, 83_653_863),
        ("UNet", bench.SMALL, 25_386_692),
        ("VAE", bench.SMALL_VAE, 2_702_087),
    ],
)
def test_diffusers_has_as_many_parameters(diffusers, kind, settings, count):
    with torch.device("meta"):
        theirs, ours = getattr(bench, f"Peer{kind}")(settings), getattr(bench, kind)(**settings)
    assert [sum(p.numel() for p in net.parameters()) for net in (theirs, ours)] == [count, count]


def test_loop(run, monkeypatch, tmp_path):
    """train_ldm.py as a user runs it, beside the bare step, and ended; a script that fails is named."""
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    found, _ = run("--rows=loop")
    (bare, step), (name, loop) = found.items()
    assert bare == "small U-Net training step without text, 64 px, batch 1"
    more = float(name.removeprefix("train_ldm.py, the same step: ").rstrip("%"))
    assert more == pytest.approx(100 * (float(loop[0]) / float(step[0]) - 1), abs=0.2)
    assert started and started[0].poll() is not None
    (tmp_path / "train_ldm.py").write_text("print('step 0')\nraise ValueError('no data')")
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(RuntimeError, match="^ValueError: no data$"):
        bench.training_script(HERE, 64, 1, 2)


@pytest.mark.parametrize("unet, side", [(bench.SMALL, 64), (bench.SD2, 256)])
def test_loop_trains_the_network_of_the_bare_step(unet, side):
    where = bench.Bench(torch.device("cuda"), torch.bfloat16, True, unet | {"context_dim": 0}, bench.KL_F8)
    cfg = configure(dict(vars(train_ldm)), bench.loop_arguments(where, side, 64))
    with torch.device("meta"):
        wanted = UNet(**where.unet).settings
    names = [name for name in wanted if name in cfg]
    for name in names:  # the script has (2,) where UNet() has 2
        value = cfg[name][0] if name in ("num_res_blocks", "self_attention") else cfg[name]
        assert wanted[name] == value, name
    assert len(names) > 12 and (cfg.device, cfg.dtype, cfg.compile, cfg.batch_size) == ("cuda", "bfloat16", "true", 64)


def test_without_a_gpu(run):
    if not torch.cuda.is_available():
        with pytest.raises(bench.checkpoint.UserError, match="--device=cuda, but PyTorch finds no GPU"):
            run("--device=cuda")
