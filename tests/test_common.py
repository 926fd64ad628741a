import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same, read, resume_folder
from PIL import Image

import checkpoint
import common
import train_ldm
import train_vae
from checkpoint import UserError
from configurator import configure

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = dict(lr=1.0, lr_schedule="constant", lr_end=0.1, lr_milestones=(0.5, 0.8), lr_decay=0.1, warmup_steps=4)
SETTINGS |= dict(max_steps=20, log_every=2, batch_size=4, wandb=False)
CPU = common.Machine(0, 1, torch.device("cpu"), "float32", torch.float32, False)


def config(**values):
    return configure(SETTINGS | values, [])


@pytest.mark.parametrize(
    "schedule, values",
    [
        ("constant", {0: 0.2, 3: 0.8, 4: 1.0, 20: 1.0}),
        ("cosine", {0: 0.2, 4: 1.0, 12: 0.55, 20: 0.1}),
        ("multistep", {0: 0.2, 9: 1.0, 10: 0.1, 16: 0.01}),
        ("onecycle", {0: 0.04, 2: 0.52, 4: 1.0, 12: 0.55, 20: 0.1}),
        ("linear", {0: 0.2, 5: 1.0, 10: 1.0, 15: 0.55, 20: 0.1}),
    ],
)
def test_learning_rate(schedule, values):
    for step, lr in values.items():
        assert common.learning_rate(step, config(lr_schedule=schedule)) == pytest.approx(lr)


def test_all_finite():
    assert common.all_finite(torch.ones(3), torch.zeros(()))
    for bad in (math.nan, math.inf):
        assert not common.all_finite(torch.ones(3), torch.tensor([1.0, bad]))


def test_muon():
    """A kernel against the formula in float64, with a gradient of NaN at step 2; a U-Net's last layer against AdamW."""
    torch.manual_seed(0)
    conv_out, conv = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 12, 1)
    model = torch.nn.ModuleDict({"unet": torch.nn.ModuleDict({"conv_out": conv_out}), "conv": conv}).double()
    model.to(memory_format=torch.channels_last)
    cfg = config(optimizer="muon", muon_lr=0.02, weight_decay=0.1, beta1=0.9, beta2=0.99, shard_optimizer=False)
    optimizer = common.make_optimizer(model, cfg, CPU)
    expected, momentum = conv.weight.detach().clone().flatten(1), torch.zeros(12, 4).double()
    like = torch.nn.Parameter(conv_out.weight.detach().clone())
    adamw = torch.optim.AdamW([like], lr=0.5, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan) if step == 2 else torch.randn_like(p)
        common.set_lr(optimizer, 0.5)  # half of cfg.lr
        optimizer.found_inf = torch.tensor(float(step == 2))
        gradient, like.grad = conv.weight.grad.flatten(1), conv_out.weight.grad
        optimizer.step()
        if step != 2:
            adamw.step()
            momentum = 0.95 * momentum + 0.05 * gradient
            x = 0.05 * gradient + 0.95 * momentum
            x = x / torch.linalg.matrix_norm(x)
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            assert 0.6 < torch.linalg.svdvals(x).min() and torch.linalg.svdvals(x).max() < 1.3
            expected = (1 - 0.01 * 0.1) * expected - 0.01 * 3**0.5 * x
        torch.testing.assert_close(conv.weight.flatten(1), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(conv_out.weight, like)


def run_steps(log, losses, start=1):
    for step, loss in enumerate(losses, start):
        loss = torch.tensor(loss)
        log.saw({"key": [f"image {step}"]})
        by_t = torch.stack([loss * torch.tensor([2.0, 0, 3]), torch.tensor([1.0, 0, 1])])  # sums and counts
        log.step(step, {"loss": loss, "by_t": by_t, "grad_norm": 2 * loss}, loss.isfinite(), lr=0.5)


def test_log_writes_means_since_the_last_line(tmp_path, capsys):
    log = common.Log(config(out_dir=str(tmp_path)), CPU, 8, "data", {})
    run_steps(log, [1.0, 2.0, 3.0, 6.0, 5.0])
    log.evaluation(4, {"val_loss": 0.25, "val_loss_by_t": [1.0, None]})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["step"], r["images_seen"], r.get("loss"), r.get("grad_norm")) for r in lines] == [
        (2, 16, 1.5, 3.0),
        (4, 32, 4.5, 9.0),
        (4, 32, None, None),
    ]
    assert lines[0]["lr"] == 0.5 and lines[0]["images_per_s"] > 0 and lines[0]["by_t"] == [3.0, None, 4.5]
    printed = capsys.readouterr().out
    assert "a new run in" in printed and "step 4, 32 images: loss 4.5, grad_norm 9, lr 5.00e-01" in printed
    assert "evaluation at step 4: loss 0.2500, loss_by_t 1.0000 -" in printed
    about = json.loads((tmp_path / "settings.json").read_text())
    assert about["config"]["out_dir"] == str(tmp_path) and about["changed"].items() <= about["config"].items()


def test_a_resumed_log_counts_the_last_record_of_a_step(tmp_path, capsys):
    cfg = config(out_dir=str(tmp_path))
    run_steps(common.Log(cfg, CPU, 8, "data", {}), [1.0, 1.0, 1.0, 1.0])
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed
    assert [r["loss"] for r in common.read_log(tmp_path)] == [1.0, 1.0]
    log = common.Log(cfg, CPU, 8, "data", dict(step=2, config={"lr": 2.0}, data="other"))
    run_steps(log, [3.0, 3.0, 3.0, 3.0], start=3)
    assert [(r["step"], r["loss"]) for r in common.read_log(tmp_path)] == [(2, 1.0), (4, 3.0), (6, 3.0)]
    printed = capsys.readouterr().out
    assert "settings changed since: lr=1.0 was 2.0" in printed and "warning: the dataset has changed" in printed
    common.Log(cfg, CPU, 8, "data", {})
    assert common.read_log(tmp_path) == [], "a new run begins a new log"


def test_a_step_that_is_not_finite_ends_the_run(tmp_path, capsys):
    log = common.Log(config(out_dir=str(tmp_path), log_every=10), CPU, 8, "data", {})
    run_steps(log, [1.0, math.nan, math.inf])
    with pytest.raises(UserError) as caught:
        log.check()
    expected = "loss, by_t, grad_norm not finite at step 2; the weights were not updated; no checkpoint yet"
    assert expected in str(caught.value)
    assert str(caught.value).endswith("images of the step: image 2")
    (tmp_path / "latest.safetensors").touch()
    with pytest.raises(UserError, match=f"last checkpoint: {tmp_path}/latest.safetensors; try a lower lr"):
        run_steps(log, [1.0] * 7, start=4)  # noticed at the next line
    assert common.read_log(tmp_path) == []


def test_plot(tmp_path):
    log = common.Log(config(out_dir=str(tmp_path)), CPU, 8, "data", {})
    run_steps(log, [1.0, 2.0, 3.0, 4.0])
    for step in (2, 4):
        log.evaluation(step, {"val_loss": 1.0, "val_by_t": [1.0, None, 3.0]})
    common.plot_log(tmp_path, {"loss": ("loss", "val_loss"), "by t": ("val_by_t",), "absent": ("kl",)})
    image = np.asarray(Image.open(tmp_path / "loss.png").convert("L"))
    assert image.shape[1] / image.shape[0] > 2 and (image < 128).any(), "two panels side by side"


def test_settings_of_a_checkpoint_and_of_now(tmp_path):
    common.check_same_settings("file", {"unet": {"channels": [1, 2]}, "cond": "text"}, {"unet": {"channels": (1, 2)}})
    with pytest.raises(
        UserError, match="file: has other settings: cond=text in the checkpoint, none now; use those, or"
    ):
        common.check_same_settings("file", {"unet": {}, "cond": "text"}, {"cond": "none"})
    common.check_same_settings("file", {"a": 1, "b": 2}, {"a": 0, "b": 2}, free=("a",))


def test_a_run_starts_with_the_images_per_step_of_its_checkpoint():
    cfg = config(grad_accum=2)
    assert common.start(cfg, 2, {}, "") == (0, 16, 2)
    assert common.start(cfg, 2, {"step": 5, "images_per_step": 24}, "file") == (5, 24, 3)
    with pytest.raises(UserError, match="25 images per step, not a multiple of batch_size=4 x 2 processes; change"):
        common.start(cfg, 2, {"step": 5, "images_per_step": 25}, "file")
    assert common.spread(10, 4) == [0, 2, 5, 7] and common.spread(3, 9) == [0, 1, 2]


def test_only_user_errors_are_one_line(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import common, checkpoint, sys\ncommon.install_excepthook()\nraise eval(sys.argv[1])('no; file')\n"
    )

    def stderr(kind):
        command = [sys.executable, str(script), kind]
        return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}).stderr

    assert stderr("checkpoint.UserError") == "train.py: no; file\n"
    assert stderr("ValueError").startswith("Traceback")


PROCESSES = """
import os, signal, sys
import torch, torch.distributed as dist
import common
from configurator import configure

cfg = dict(device="cpu", dtype="float64", compile="auto", deterministic=False, dist_timeout=1.0)
machine = common.setup(configure(cfg, []))
rank = machine.rank
assert machine.world == 2 and machine.param_dtype == torch.float64
if rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)  # torchrun starts both again

assert common.all_finite(torch.ones(1)) and not common.all_finite(torch.tensor([1.0, float("nan") if rank else 1.0]))
common.assert_same_on_all_ranks(step=3)
try:
    common.assert_same_on_all_ranks(step=rank)
    raise SystemExit("ranks that differ were not noticed")
except AssertionError as error:
    assert "ranks differ" in str(error)
stop = common.Stop()
assert not stop.agreed()
if rank == 1:
    os.kill(os.getpid(), signal.SIGTERM)
assert stop.agreed() and stop.signal == signal.SIGTERM, "one signal stops both"

def train(kind, machine, sharded, steps, saved=None):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)]
    model = torch.nn.Sequential(*layers).double()
    cfg = dict(optimizer=kind, lr=0.1, muon_lr=0.2, beta1=0.9, beta2=0.99, weight_decay=0.1, shard_optimizer=sharded)
    optimizer = common.make_optimizer(model, configure(cfg, []), machine)
    if saved:
        model.load_state_dict(saved[0])
        common.load_optimizer_state(optimizer, model, "optim", saved[1])
    for step in steps:
        common.set_lr(optimizer, 0.1 / (step + 1))
        model(torch.full((5, 3), step - 1.5).double()).square().mean().backward()
        common.inner(optimizer).found_inf = torch.tensor(float(step == 1))  # this step changes nothing
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), common.optimizer_state(optimizer, model, "optim")

def equal(tensors, others, atol):
    assert tensors.keys() == others.keys()
    return all(torch.allclose(others[name], t, rtol=0, atol=atol) for name, t in tensors.items())

for kind, sharded, tensors, atol in (("adamw", True, 24, 0), ("muon", True, 16, 1e-12), ("muon", False, 16, 1e-12)):
    whole, state = train(kind, machine._replace(rank=0, world=1), False, range(5))
    half, saved = train(kind, machine, sharded, range(3))
    box = [saved]
    dist.broadcast_object_list(box, 0)
    assert rank == 0 or not sharded or saved == {}
    resumed, resumed_state = train(kind, machine, sharded, range(3, 5), (half, box[0]))
    box = [resumed]
    dist.broadcast_object_list(box, 0)
    assert equal(whole, resumed, atol) and equal(box[0], resumed, 0)
    assert rank == 1 or equal(state, resumed_state, atol) and len(state) == tensors
print(f"rank {rank} is done", flush=True)
dist.destroy_process_group()
"""


def test_two_processes_under_torchrun(tmp_path):
    """A killed rank is restarted; ranks agree; two with sharded AdamW or with Muon equal one, also resumed."""
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"rank {rank} is done" in done.stdout for rank in (0, 1))


# --- runs of both stages ---

both = pytest.mark.parametrize("stage", ("vae", "ldm"))


@pytest.mark.parametrize("script", (train_vae, train_ldm))
def test_ema(script):
    averaged, current = [torch.zeros(2).double()], [torch.ones(2).double()]
    for decay, ok, expected in ((0.75, True, 0.25), (0.5, True, 0.625), (0.5, False, 0.625)):
        script.update_ema(averaged, current, decay, torch.tensor(ok))
        assert averaged[0].tolist() == [expected] * 2


@both
def test_decays_of_the_averages(stage, start):
    """From step 1 to 2 by (1 + n) / (10 + n), and of power averages by (1 - 1/n)^(gamma + 1), with n = 2."""
    more = ("--ema_stds=0.1",) if stage == "ldm" else ()
    run = start(stage, "--max_steps=2", "--snapshot_every=1", "--dtype=float64", "--val_images=2", *more).finish()
    before, after = read(run.out / "ema_00000001.safetensors")[0], run.checkpoint[0]
    name = "unet.conv_out.weight" if stage == "ldm" else "decoder.conv_in.weight"
    for average, decay in (("ema", 3 / 12), ("ema_power_0", 0.5 ** (checkpoint.power_exponent(0.1) + 1)))[
        : 1 + len(more)
    ]:
        expected = decay * before[f"{average}.{name}"] + (1 - decay) * after[f"model.{name}"]
        torch.testing.assert_close(after[f"{average}.{name}"], expected, rtol=1e-9, atol=1e-12)


@both
def test_ranks_and_accumulation_are_equal_in_float64(stage, start, tmp_path):
    """One process; two with two micro-steps each; and resumed by one with four."""
    one = start(stage, "--dtype=float64", "--snapshot_every=3")
    two = start(stage, "--dtype=float64", "--batch_size=1", "--grad_accum=2", "--max_steps=3", ranks=2, keep=True)
    one.finish(), two.finish()
    halfway, reached = read(one.out / "ema_00000003.safetensors")[0], two.checkpoint[0]
    names = [name for name in halfway if name.startswith("ema.") and "latent_" not in name]
    assert_same({name: halfway[name] for name in names}, {name: reached[name] for name in names}, 1e-9)
    assert_same(*(read(two.folder / f"rank{rank}.safetensors")[0] for rank in range(2)))
    resumed = start(stage, "--dtype=float64", "--batch_size=1", folder=resume_folder(two, tmp_path)).finish()
    assert "4 images per step: processes 1 x batch_size 1 x grad_accum 4" in resumed.stdout
    assert "max_steps=6 was 3" in resumed.stdout
    assert_same(resumed.checkpoint[0], one.checkpoint[0], 1e-9)
    for a, b in zip(one.log, resumed.log, strict=True):
        same = a.keys() & b.keys() - {"images_per_s", "error_by_t", "val_loss_by_t"}
        assert "loss" in same and all(a[name] == pytest.approx(b[name], rel=1e-6) for name in same)
    message = start(stage, "--dtype=float64", "--batch_size=3", folder=tmp_path).fail()
    assert "4 images per step, not a multiple of batch_size=3 x 1 processes" in message


@both
def test_sigterm_to_one_rank_saves_and_stops_both(stage, start, finished, tmp_path):
    args = ("--eval_every=3", "--snapshot_every=3", "--batch_size=2")
    stopped = start(stage, *args, "--max_steps=50", ranks=2, trap=("step 1,", signal.SIGTERM), folder=tmp_path)
    assert stopped.wait() == [128 + signal.SIGTERM] * 2, stopped.stderr
    step = stopped.checkpoint[1]["step"]
    assert 1 <= step < 5 and f"stopped at step {step} " in stopped.stdout and stopped.log[-1]["step"] == step
    start(stage, *args, ranks=2, folder=tmp_path).finish()
    assert_same(stopped.checkpoint[0], finished(stage, 2).checkpoint[0])
