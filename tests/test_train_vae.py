"""What both training scripts promise (resume, ranks, signals, faults, errors), tested on both; then stage 1 alone."""

import ast
import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fill
from helpers import ARGS, ROOT, assert_same, read
from PIL import Image

import train_ldm
import train_vae
from configurator import configure
from data.dataset import Dataset, Stream, seed_of
from lpips_train import LPIPS, make_trunk
from text import TextEncoder
from unet import Denoiser, UNet
from vae import VAE, Discriminator, Posterior, turn_and_scale

SCRIPTS = {"vae": train_vae, "ldm": train_ldm}
both_stages = pytest.mark.parametrize("stage", ("vae", "ldm"))
SIX_STEPS = ("--eval_every=3", "--save_every=3", "--snapshot_every=3")


def continued(run, folder):
    """A copy of what a run left, for another one to go on from."""
    shutil.copytree(run.out, folder / "out")
    return folder


def numbers(log):
    """A log without what depends on the clock."""
    return [{k: v for k, v in record.items() if k != "images_per_s"} for record in log]


# -- resume --


@both_stages
@pytest.mark.parametrize("ranks", (1, 2))
def test_a_killed_run_resumes_bit_for_bit(stage, ranks, start, finished, killed, tmp_path):
    assert killed(stage, ranks).checkpoint[1]["step"] == 3 and killed(stage, ranks).log[-1]["step"] == 4
    with open(continued(killed(stage, ranks), tmp_path) / "out/log.jsonl", "a") as f:
        f.write('{"step": 5, "los')  # killed while it wrote
    resumed = start(stage, *SIX_STEPS, f"--batch_size={4 // ranks}", ranks=ranks, folder=tmp_path).finish()
    tensors, meta = finished(stage, ranks).checkpoint
    assert_same(resumed.checkpoint[0], tensors)
    assert resumed.checkpoint[1]["step"] == meta["step"] == 6 and meta["images_seen"] == 24
    assert numbers(resumed.log) == numbers(finished(stage, ranks).log)
    assert "other settings than before: none" in resumed.stdout


@both_stages
def test_images_per_step_stay_on_resume_and_it_says_so(stage, start, finished, tmp_path):
    changed = "--grad_accum=3", "--max_steps=7", "--seed=4"
    run = start(stage, *changed, folder=continued(finished(stage), tmp_path)).finish()
    assert run.checkpoint[1]["images_per_step"] == 4
    assert "grad_accum=3 is not taken: the run keeps 4 images per step" in run.stdout
    settings = re.search("other settings than before: (.*)", run.stdout)[1]
    assert {"grad_accum=3 was 1", "max_steps=7 was 6", "seed=4 was 0"} <= set(settings.split(", "))
    assert not re.search("is not taken|other settings", finished(stage).stdout)


@both_stages
def test_sigterm_to_one_rank_saves_and_stops_both(stage, start, finished, tmp_path):
    args = ("--eval_every=3", "--snapshot_every=3", "--batch_size=2")
    stopped = start(stage, *args, "--max_steps=50", ranks=2, trap=("step 1,", signal.SIGTERM), folder=tmp_path)
    assert stopped.wait() == [128 + signal.SIGTERM] * 2, stopped.stderr
    step = stopped.checkpoint[1]["step"]
    assert 1 < step < 5 and f"stopped at step {step} " in stopped.stdout and stopped.log[-1]["step"] == step
    start(stage, *args, ranks=2, folder=tmp_path).finish()
    assert_same(stopped.checkpoint[0], finished(stage, 2).checkpoint[0])


def test_sigterm_to_torchrun(small_data, tmp_path):
    """The real thing: torchrun, its two processes, a signal to it alone."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        f"{ROOT}/train_vae.py",
    ]
    command += [*ARGS["vae"].split(), f"--dataset={small_data}", "--max_steps=100000"]
    log = tmp_path / "out/log.jsonl"
    with open(tmp_path / "output", "w") as f:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=f, stderr=f, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        end = time.time() + 60
        while not (log.exists() and log.read_text().count("\n") > 2) and time.time() < end and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) != 0
    finally:
        process.kill()
    output = (tmp_path / "output").read_text()
    meta = read(tmp_path / "out/latest.safetensors")[1]
    assert f"stopped at step {meta['step']} " in output and meta["images_per_step"] == 8, output
    assert "train_vae.py: " not in output and "ProcessGroup" not in output, output  # neither rank waited in vain


@both_stages
def test_noise_is_new_at_every_step_and_in_every_place(stage, start, small_data, tmp_path):
    """One image, and weights that stand still: only noise is left to change the loss."""
    (tmp_path / "one").mkdir()
    np.save(tmp_path / "one/images.npy", np.load(small_data / "train/images.npy")[:1])
    args = (f"--dataset={tmp_path}/one", "--lr=1e-30", "--flip=false", "--max_steps=5", "--batch_size=1")
    args += (*{"vae": ["--crop=center"], "ldm": ["--cond=none"]}[stage],)
    one = start(stage, *args).finish()
    four = start(stage, *args, "--batch_size=2", "--grad_accum=2", folder=tmp_path).finish()
    losses = [[r["loss"] for r in run.log if r["loss"] is not None] for run in (one, four)]
    assert len(set(losses[0])) == 5 and not set(losses[0]) & set(losses[1])


# -- ranks --


@both_stages
def test_two_ranks_are_one_in_float32(stage, finished):
    one, two = finished(stage), finished(stage, 2)
    for a, b in zip(one.log, two.log, strict=True):
        assert a["step"] == b["step"] and a["images_seen"] == b["images_seen"]
        for name in ("loss", "grad_norm", "val_psnr", "val_kl", "val_loss"):
            if a.get(name) is not None:
                assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)
    of_rank = [read(two.folder / f"rank{rank}.safetensors")[0] for rank in range(2)]
    assert_same(of_rank[0], of_rank[1])
    assert_same(of_rank[0], train_vae.without_prefix("model", two.checkpoint[0]))


@both_stages
def test_ranks_and_accumulation_are_one_in_float64(stage, start, tmp_path):
    one = start(stage, "--dtype=float64", "--snapshot_every=3", "--batch_size=4")
    two = start(stage, "--dtype=float64", "--batch_size=1", "--grad_accum=2", "--max_steps=3", ranks=2)
    one.finish(), two.finish()
    halfway, reached = read(one.out / "ema_00000003.safetensors")[0], two.checkpoint[0]
    parameters = [name for name in halfway if name.startswith("ema.") and "latent_" not in name]
    assert_same({name: halfway[name] for name in parameters}, {name: reached[name] for name in parameters}, 1e-9)
    # the rest on one process, which takes four micro-steps to the same images
    resumed = start(stage, "--dtype=float64", "--batch_size=1", folder=continued(two, tmp_path)).finish()
    assert "4 images per step: 1 processes x 1 x 4 accumulated" in resumed.stdout
    assert_same(resumed.checkpoint[0], one.checkpoint[0], 1e-9)
    message = start(stage, "--dtype=float64", "--batch_size=3", folder=tmp_path).fail()
    assert "4 images per step" in message and "batch_size=3 on 1 processes" in message


# -- faults --


@both_stages
@pytest.mark.parametrize("fault", ("cut", "altered", "other stage", "other settings"))
def test_a_faulty_checkpoint_is_one_line_and_left_alone(stage, fault, start, finished, tmp_path):
    path, args = continued(finished(stage), tmp_path) / "out/latest.safetensors", ()
    good = path.read_bytes()
    if fault == "cut":
        path.write_bytes(good[: len(good) // 2])
        wanted = "latest.safetensors is cut short or damaged .*: delete it"
    elif fault == "altered":
        path.write_bytes(good.replace(rb"\"step\": 6", rb"\"step\": 7"))
        wanted = "latest.safetensors is not a checkpoint of this repository, or its settings were altered"
    elif fault == "other stage":
        other = {"vae": "ldm", "ldm": "vae"}[stage]
        shutil.copy(finished(other).out / "latest.safetensors", path)
        wanted = f"latest.safetensors is a checkpoint of stage '{other}', not '{stage}'"
    else:
        name, args = {"vae": ("ch", ["--ch=16"]), "ldm": ("channels", ["--channels=16"])}[stage]
        wanted = rf"latest.safetensors holds another model \({name}: 8 in the checkpoint, 16 now\)"
    before = path.read_bytes()
    assert (before == good) == (fault == "other settings")
    message = start(stage, "--max_steps=12", *args, folder=tmp_path).fail()
    assert re.search(wanted, message), message
    assert path.read_bytes() == before


@both_stages
def test_a_disk_that_is_full_costs_nothing(stage, start, killed, tmp_path):
    path = continued(killed(stage), tmp_path) / "out/latest.safetensors"
    before = path.read_bytes()
    message = start(stage, "--save_every=5", "--val_images=2", limit=len(before) // 2, folder=tmp_path).fail()
    assert re.search("could not save out/latest.safetensors .*: make room and run again", message)
    assert path.read_bytes() == before and read(path)[1]["step"] == 3
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.parametrize("script", ("train_vae", "train_ldm", "lpips_train"))
def test_what_a_killed_save_left_goes_with_the_next(script, tmp_path):
    """Killed in the middle of writing, safetensors leaves a file of a name of its own, a new one each time."""
    save, out = importlib.import_module(script).save_checkpoint, tmp_path / "out [1]"
    out.mkdir()
    (out / ".tmp-notes").write_text("mine")
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the signal for a file over the limit kills
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        save(f"{out}/latest.safetensors", {"x": torch.zeros(100_000)}, {})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGXFSZ
    assert len(os.listdir(out)) == 2, "the notes and what was left"
    save(f"{out}/latest.safetensors", {"x": torch.zeros(100_000)}, {})
    assert sorted(os.listdir(out)) == [".tmp-notes", "latest.safetensors"]


@both_stages
def test_a_bad_loss_never_reaches_the_weights(stage, start):
    run = start(stage, "--lr=1e30", "--warmup_steps=0", "--save_every=1", keep=True)
    message = run.fail()
    found = re.match(
        r"(.*) not finite at step (\d+): no such step touches the weights, and out/latest.safetensors", message
    )
    assert (
        found and found[1] in {"vae": ("recon", "kl", "recon and kl"), "ldm": ("error", "error and grad_norm")}[stage]
    )
    tensors, meta = run.checkpoint
    assert meta["step"] == int(found[2]) - 1 > 0
    assert all(t.isfinite().all() for name, t in tensors.items() if "latent_" not in name)
    # what the process held when it stopped, a step after the bad one
    assert_same(read(run.folder / "rank0.safetensors")[0], train_vae.without_prefix("model", tensors))


def test_found_inf_holds_adamw_still():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.1, fused=True)
    for gradient, finite in ((1.0, True), (math.nan, False), (1.0, True)):
        before = [p.detach().clone(), *(t.clone() for t in optimizer.state[p].values())]
        p.grad = torch.full((3,), gradient)
        optimizer.found_inf = (~torch.tensor(finite)).float()
        optimizer.step()
        after = [p.detach(), *optimizer.state[p].values()]
        assert (len(before) == len(after) and all(map(torch.equal, before, after))) == (not finite)
    assert optimizer.state[p]["step"] == 2


# -- what a run leaves --


@both_stages
def test_a_run_leaves_log_and_pictures(stage, finished):
    run = finished(stage)
    fields = list(run.log[0])
    assert all(list(record) == fields for record in run.log)
    trained, evaluated = ([r["step"] for r in run.log if r[name] is not None] for name in ("loss", fields[-1]))
    assert trained == [1, 2, 3, 4, 5, 6] and evaluated == [3, 6]
    assert all(r["images_seen"] == 4 * r["step"] for r in run.log)
    assert run.log[0]["lr"] == pytest.approx(1e-3 / 3) and run.log[-2]["lr"] == 1e-3
    pictures = {"vae": ("recon",), "ldm": ("samples", "predictions")}[stage]
    wanted = {f"{name}_{step:08d}.png" for name in pictures for step in (3, 6)}
    wanted |= {f"ema_{step:08d}.safetensors" for step in (3, 6)}
    assert {p.name for p in run.out.iterdir()} == wanted | {"latest.safetensors", "log.jsonl", "loss.png"}
    for path in run.out.glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 1, path
    for text in ("command: ", "git ", "torch ", "settings not default", "parameters", "TFLOP per trained"):
        assert text in run.stdout
    assert run.checkpoint[1]["config"]["max_steps"] == 6


@both_stages
def test_ema_is_neither_the_model_nor_where_it_began(stage, finished):
    tensors, meta = finished(stage).checkpoint
    torch.manual_seed(seed_of(0, "init"))
    if stage == "vae":
        init = VAE(**meta["model"])
    else:
        text = TextEncoder(**meta["model"]["text"])
        init = Denoiser(UNet(**meta["model"]["unet"]), text)
    far = {"model": 0, "ema": 0, "between": 0}
    for name, p in init.named_parameters():
        model, ema = tensors[f"model.{name}"], tensors[f"ema.{name}"]
        far["model"] += (model - p).norm()
        far["ema"] += (ema - p).norm()
        far["between"] += (model - ema).norm()
    assert far["model"] > far["ema"] > 0.2 * far["model"]  # the warm-up lets it follow
    assert far["between"] > 0.1 * far["model"]


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_ema_has_a_closed_form(script):
    model, ema, decay = torch.nn.Linear(1, 1).double(), torch.nn.Linear(1, 1).double(), 0.5
    weights = [ema.weight.item()]
    for n in range(1, 21):
        torch.nn.init.constant_(model.weight, float(n * n))
        weights.append(model.weight.item())
        script.update_ema([ema.weight], [model.weight], n, decay)
    d = [min(decay, (1 + n) / (10 + n)) for n in range(1, 21)]
    assert d[0] == 2 / 11 and d[6] < decay and d[-1] == decay
    shares = [math.prod(d)] + [(1 - d[n]) * math.prod(d[n + 1 :]) for n in range(20)]
    assert sum(shares) == pytest.approx(1)
    assert ema.weight.item() == pytest.approx(sum(s * w for s, w in zip(shares, weights)), rel=1e-12)


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_learning_rate_at_its_corners(script):
    def lr(step, schedule, **others):
        cfg = dict(lr=2.0, lr_end=0.1, lr_milestones=(0.5, 0.8), lr_decay=0.1, warmup_steps=10, max_steps=110)
        return script.learning_rate(step, cfg | {"lr_schedule": schedule} | others)

    for schedule in ("constant", "cosine", "multistep"):
        assert lr(0, schedule) == pytest.approx(2 / 11) and lr(9, schedule) == pytest.approx(20 / 11)
        assert lr(10, schedule) == lr(0, schedule, warmup_steps=0) == 2
    assert lr(109, "constant") == 2
    assert lr(60, "cosine") == pytest.approx(2 * 0.55) and lr(110, "cosine") == lr(200, "cosine") == pytest.approx(0.2)
    assert 0.2 < lr(109, "cosine") < 0.201
    assert lr(0, "onecycle") == pytest.approx(2 / 25) and lr(5, "onecycle") == pytest.approx((2 + 2 / 25) / 2)
    assert lr(10, "onecycle") == 2 > lr(11, "onecycle") and lr(9, "onecycle") < 2
    assert lr(110, "onecycle") == pytest.approx(0.2) and lr(0, "onecycle", warmup_steps=0) == 2
    assert [lr(s, "multistep") for s in (54, 55, 87, 88)] == pytest.approx([2, 0.2, 0.2, 0.02])
    assert lr(50, "constant", warmup_steps=200) == pytest.approx(2 * 51 / 201)


def test_the_two_scripts_say_the_same_in_the_same_words():
    """A reader of one knows the other: functions of one name are one text, but for those that tell the stages apart."""
    own = {"train_step", "evaluate", "plot_log", "count_tflop", "check_settings", "checkpoint"}
    texts = []
    for script in SCRIPTS.values():
        source = inspect.getsource(script)
        functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        texts.append({f.name: ast.get_source_segment(source, f) for f in functions if f.name not in own})
    shared = [name for name in texts[0] if name in texts[1] and not name.startswith("__")]
    assert {"learning_rate", "update_ema", "save_checkpoint", "load_checkpoint", "check_same_model"} < set(shared)
    assert {"settle", "log", "autocast"} < set(shared)
    for name in shared:
        assert texts[0][name] == texts[1][name], name
    assert shared == [name for name in texts[1] if name in texts[0]], "in another order"


# -- bad input --


def make_images(folder, good, bad):
    """JPEG files of 20 x 16 px, the bad ones cut short."""
    folder.mkdir(parents=True)
    for i in range(good + bad):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 20, 3), dtype=np.uint8)
        path = folder / f"{'bad' if i < bad else 'good'}{i}.jpg"
        Image.fromarray(pixels).save(path)
        if i < bad:
            path.write_bytes(path.read_bytes()[:300])


@both_stages
@pytest.mark.parametrize(
    "args, wanted",
    [
        (["--batchsize=2"], "unknown setting 'batchsize': did you mean 'batch_size'?"),
        (["--lr=fast"], "lr wants float (default 0.0001), got 'fast'"),
        (["--lr_schedule=Cosine"], "lr_schedule=Cosine is not one of constant, cosine, onecycle, multistep"),
        (["--val_images=0"], "val_images=0 must be at least 1"),
        (["--dataset=nowhere"], "dataset nowhere is not there: pass --dataset=DIR"),
        (["--dataset=."], "dataset . (folder) holds no images"),
        (["--image_size=17"], "image_size=17 is not a multiple of"),
        (["--norm_groups=3"], "8 channels"),
    ],
)
def test_bad_input_is_one_line(stage, args, wanted, start):
    assert wanted in start(stage, *args).fail()


@both_stages
@pytest.mark.parametrize("workers", (0, 1))
def test_images_that_are_all_bad_stop_the_run(stage, workers, start, tmp_path):
    make_images(tmp_path / "images/train", 0, 3)
    make_images(tmp_path / "images/val", 1, 0)
    args = (f"--dataset={tmp_path}/images", f"--workers={workers}")
    message = start(stage, *args, *["--cond=none"][: stage == "ldm"]).fail()
    assert re.search(r"all 100 images tried in .*/images are bad \(train/bad\d.jpg: .*\): look at the data", message)


@both_stages
def test_bad_images_among_good_ones_are_named_and_replaced(stage, start, tmp_path):
    make_images(tmp_path / "images/train", 7, 1)
    make_images(tmp_path / "images/val", 2, 1)
    run = start(stage, f"--dataset={tmp_path}/images", *["--cond=none"][: stage == "ldm"]).finish()
    skipped = re.findall(r"skipped a bad image \((\d) so far on rank 0\): train/bad0.jpg: ", run.stdout)
    assert skipped == ["1", "2", "3"], run.stdout  # three epochs of eight
    assert run.log[-1]["step"] == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(start):
    assert "device=cuda, but PyTorch sees no GPU here" in start("vae", "--device=cuda").fail()


# -- stage 1 --


@torch.no_grad()
def posterior_of(vae, folder):
    images = Dataset(folder, "train", 16)
    return vae.encode(torch.stack([images.pixels(i) for i in range(len(images))]))


def test_latents_are_normal_over_the_training_set(finished, small_data):
    vae = VAE.from_pretrained(finished("vae").out)
    posterior = posterior_of(vae, small_data)
    draws = [posterior.sample(generator=torch.Generator().manual_seed(i)) for i in range(50)]
    x0 = vae.normalize(torch.cat(draws))
    assert x0.mean(dim=(0, 2, 3)).abs().max() < 0.01 and (x0.std(dim=(0, 2, 3)) - 1).abs().max() < 0.01
    assert_same(dict(a=vae.denormalize(x0)), dict(a=torch.cat(draws)), 1e-5)


def test_a_stopped_run_can_be_measured(start, killed, small_data, tmp_path):
    folder = continued(killed("vae"), tmp_path)
    before, meta = read(folder / "out/latest.safetensors")
    assert before["ema.latent_std"].isnan().all()
    refusal = start("ldm", f"--first_stage={folder}/out").fail()
    assert re.search(r"out has no latent statistics: finish its training, or run .* --measure_latents", refusal)
    run = start("vae", "--measure_latents", folder=folder).finish()
    after, meta_after = run.checkpoint
    assert meta_after["step"] == meta["step"] == 3
    assert_same(
        {k: v for k, v in before.items() if "latent_" not in k}, {k: v for k, v in after.items() if "latent_" not in k}
    )
    posterior = posterior_of(VAE.from_pretrained(run.out), small_data)
    second_moment = (posterior.mean**2 + posterior.std**2).mean(dim=(0, 2, 3))
    mean = posterior.mean.mean(dim=(0, 2, 3))
    for prefix in ("model", "ema"):
        torch.testing.assert_close(after[f"{prefix}.latent_mean"], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after[f"{prefix}.latent_std"], (second_moment - mean**2).sqrt(), rtol=1e-4, atol=0)
    start("ldm", f"--first_stage={folder}/out", "--max_steps=1").finish()
    assert "needs a checkpoint" in start("vae", "--measure_latents").fail()
    # statistics do not outlive the weights that they were measured on
    further = start("vae", "--save_every=4", trap=("step 5,", signal.SIGKILL), folder=folder)
    further.wait()
    assert further.checkpoint[1]["step"] == 4 and further.checkpoint[0]["ema.latent_std"].isnan().all()


class Wrong(torch.nn.Module):
    """An autoencoder whose reconstruction is the image plus a constant, and whose posterior is N(mean, std^2)."""

    def __init__(self, error, mean=0.5, std=0.3):
        super().__init__()
        self.error, self.mean, self.logvar = error, mean, 2 * math.log(std)

    def forward(self, x, noise):
        moments = torch.cat([torch.full_like(noise, self.mean), torch.full_like(noise, self.logvar)], dim=1)
        return x + self.error, Posterior(moments)


@pytest.mark.parametrize("recon_loss, recon", [("l1", 0.25), ("l2", 0.0625)])
def test_loss_does_not_depend_on_resolution(recon_loss, recon):
    for size, batch in ((16, 1), (16, 4), (64, 2)):
        x, noise = torch.rand(batch, 3, size, size) - 0.5, torch.randn(batch, 4, size // 8, size // 8)
        cfg = dict(recon_loss=recon_loss, kl_weight=2.0)
        terms = train_vae.train_step({"vae": Wrong(0.25)}, {"image": x}, {"posterior": noise}, cfg)
        kl = 0.5 * (0.5**2 + 0.3**2 - 1 - math.log(0.3**2)) * 4 / (3 * 64)  # 4 latents for 8 x 8 pixels
        assert terms["recon"].item() == pytest.approx(recon, rel=1e-5)
        assert terms["kl"].item() == pytest.approx(kl, rel=1e-5)
        assert terms["loss"].item() == pytest.approx(recon + 2 * kl, rel=1e-5)


def test_loss_is_that_of_compvis_per_value():
    """CompVis sums over an image: (sum |x - x_hat| + 1e-6 sum KL) / B (LPIPSWithDiscriminator with logvar 0)."""
    torch.manual_seed(0)
    vae = VAE(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4, mid_attention=False)
    x, noise = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 4, 8, 8)
    loss = train_vae.train_step({"vae": vae}, {"image": x}, {"posterior": noise}, dict(recon_loss="l1", kl_weight=1e-6))
    posterior = vae.encode(x)
    reconstruction = vae.decode(posterior.mean + posterior.std * noise)
    kl = 0.5 * (posterior.mean.pow(2) + posterior.logvar.exp() - 1.0 - posterior.logvar).sum(dim=[1, 2, 3])
    theirs = (x - reconstruction).abs().sum() / 3 + 1e-6 * kl.sum() / 3
    torch.testing.assert_close(loss["loss"] * 3 * 16 * 16, theirs, rtol=1e-5, atol=0)


# -- stage 1: perceptual and adversarial training, VQ, fine-tuning --

ALL_ON = "--image_size=24 --perceptual_weight=1 --lpips_net=squeeze --disc_weight=0.5 --disc_layers=1 --disc_start=3"
ALL_ON = (ALL_ON + " --disc_warmup=1 --disc_ramp=1 --adaptive_max=0.5 --lecam_weight=0.01 --r1_weight=0.1").split()
VQ_ON = "--bottleneck=vq --codebook_size=40 --embed_dim=3 --restart_every=2 --equivariance_prob=0.7"
VQ_ON = (VQ_ON + " --disc_weight=0.5 --disc_layers=1 --disc_start=2").split()
LOSS = dict(recon_loss="l1", kl_weight=1e-6, perceptual_weight=1.0, codebook_weight=1.0, disc_loss="hinge")
LOSS |= dict(r1_weight=0.0, lecam_weight=0.0, adaptive_min=0.0, adaptive_max=1e9)


@pytest.fixture(scope="session")
def trunk(tmp_path_factory):
    """A file with a SqueezeNet of random weights."""
    if importlib.util.find_spec("lpips") is None:
        pytest.skip("no package lpips: pip install -r requirements.txt")
    torch.manual_seed(0)
    with torch.no_grad():
        state = make_trunk("squeeze").state_dict()
        for name, t in state.items():
            t.normal_(0, (2 / t[0].numel()) ** 0.5) if name.endswith("weight") else t.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("trunk") / "squeeze.pth"
    torch.save(state, path)
    return str(path)


def tiny_vae(**settings):
    torch.manual_seed(0)
    settings = dict(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4, mid_attention=False) | settings
    return fill(VAE(**settings))


@pytest.fixture
def game(trunk):
    """A batch with everything that takes part in the loss, in float64."""
    torch.manual_seed(1)
    models = {"vae": tiny_vae(), "lpips": LPIPS("squeeze", trunk), "disc": Discriminator(1)}
    x = torch.rand(3, 3, 24, 24, dtype=torch.float64) * 2 - 1
    noise = {"posterior": torch.randn(3, 4, 12, 12, dtype=torch.float64)}
    return {name: m.double() for name, m in models.items()}, {"image": x}, noise


@pytest.mark.parametrize("kind", ("hinge", "vanilla", "least_squares"))
def test_the_gradient_of_neither_player_reaches_the_other(kind, game):
    models, batch, noise = game
    vae, disc = models["vae"], models["disc"]
    cfg = LOSS | dict(disc_loss=kind, r1_weight=1.0, lecam_weight=0.1)
    terms = train_vae.train_step(models, batch, noise, cfg, 0.5)
    assert all(p.requires_grad for p in disc.parameters())
    terms["loss"].backward(retain_graph=True)
    assert all(p.grad is None for p in disc.parameters()) and all(p.grad is not None for p in vae.parameters())
    before = [p.grad.clone() for p in vae.parameters()]
    terms["disc_loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in disc.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(vae.parameters(), before))
    # the GAN term does reach the autoencoder, with its weight
    vae.zero_grad()
    train_vae.train_step(models, batch, noise, cfg, 0.0)["loss"].backward()
    alone = [p.grad.clone() for p in vae.parameters()]
    vae.zero_grad()
    gan = train_vae.generator_loss(disc(vae(batch["image"], noise["posterior"])[0]), kind)
    for g, a, b in zip(torch.autograd.grad(gan, vae.parameters()), alone, before):
        torch.testing.assert_close(a + 0.5 * g, b, rtol=1e-8, atol=1e-12)
    assert "gan" not in train_vae.train_step(models, batch, noise, cfg), "warm-up: the autoencoder does not see it"


def test_losses_of_the_game_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    wanted = {"hinge": 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)}
    wanted["vanilla"] = sum(math.log1p(math.exp(v)) for v in (-2.0, -0.5, 1.0, -3.0, 0.0, 1.0)) / 6
    wanted["least_squares"] = (1 + 0.25 + 4 + 9 + 0 + 1) / 6
    for kind, value in wanted.items():
        assert train_vae.discriminator_loss(real, fake, kind).item() == pytest.approx(value, rel=1e-6)
    assert train_vae.generator_loss(fake, "hinge").item() == pytest.approx(2 / 3)
    softplus = sum(math.log1p(math.exp(-v)) for v in fake.tolist()) / 3
    assert train_vae.generator_loss(fake, "vanilla").item() == pytest.approx(softplus)
    assert train_vae.generator_loss(fake, "least_squares").item() == pytest.approx((16 + 1 + 0) / 6)
    for kind, blind in (("hinge", 1.0), ("vanilla", math.log(2)), ("least_squares", 0.25)):
        half = torch.full((4,), 0.5 if kind == "least_squares" else 0.0)
        assert train_vae.discriminator_loss(half, half, kind).item() == pytest.approx(blind)
        assert "tells nothing apart" in train_vae.verdict(blind, 0.01, 0.0, kind)
        assert "has won" in train_vae.verdict(0.001, 1.5, -1.5, kind)
        assert train_vae.verdict(0.6 * blind, 0.6, -0.2, kind) == ""
    assert train_vae.verdict(1.0, 0.9, -0.1, "hinge") == ""


class Slope(torch.nn.Module):
    """A discriminator whose logit at a pixel is w times the sum of its channels."""

    def __init__(self, w, usual=(0.0, 0.0)):
        super().__init__()
        self.w, self.mean_logits = torch.nn.Parameter(torch.tensor(w)), torch.tensor(usual)

    def forward(self, x):
        return self.w * x.sum(dim=1, keepdim=True)


def test_regularisation_of_the_discriminator_by_hand():
    for size in (8, 32):  # a mean per pixel: the resolution is nothing to it
        x, noise = torch.rand(2, 3, size, size), {"posterior": torch.randn(2, 4, size // 8, size // 8)}
        values = {}
        for name, weights in {"none": {}, "r1": dict(r1_weight=4.0), "lecam": dict(lecam_weight=0.5)}.items():
            models = {"vae": Wrong(-0.25), "disc": Slope(0.3, (0.7, -0.4))}
            values[name] = train_vae.train_step(models, {"image": x}, noise, LOSS | weights)["disc_loss"]
        assert (values["r1"] - values["none"]).item() == pytest.approx(2 * 0.3**2, rel=1e-4)
        real, fake = 0.3 * x.sum(1), 0.3 * (x - 0.25).sum(1)
        apart = (real + 0.4).square().mean() + (fake - 0.7).square().mean()
        assert (values["lecam"] - values["none"]).item() == pytest.approx(0.5 * apart.item(), rel=1e-4)
    values["r1"].backward()
    assert models["disc"].w.grad is None or models["disc"].w.grad.isfinite()


def test_adaptive_weight_is_its_definition(game):
    models, batch, noise = game
    last = models["vae"].decoder.conv_out.weight
    terms = train_vae.train_step(models, batch, noise, LOSS, 0.0)
    gradients = torch.stack([torch.autograd.grad(terms[k], last, retain_graph=True)[0] for k in ("nll", "gan")])
    # a fresh pass, all by hand; KL is no part of it
    x = batch["image"]
    fake = models["vae"](x, noise["posterior"])[0]
    nll = (fake - x).abs().mean() + models["lpips"](fake, x, check=False).mean()
    by_nll, by_gan = (torch.autograd.grad(v, last, retain_graph=True)[0] for v in (nll, -models["disc"](fake).mean()))
    ratio = by_nll.norm() / (by_gan.norm() + 1e-4)
    torch.testing.assert_close(train_vae.adaptive_ratio(gradients, LOSS), ratio)
    for low, high, wanted in ((0.0, 1e-3, 1e-3), (1e3, 1e4, 1e3)):
        clamped = train_vae.adaptive_ratio(gradients, LOSS | dict(adaptive_min=low, adaptive_max=high))
        assert clamped.item() == pytest.approx(wanted)
    assert train_vae.adaptive_ratio(0 * gradients, LOSS) == 0


def test_the_whole_loss_is_that_of_compvis_per_value(game):
    """Theirs: (sum(|x - x_hat| + LPIPS at every value) + 1e-6 sum KL) / B - 0.5 d mean D(x_hat), d clamped at 1e4."""
    models, batch, noise = game
    vae, x, values = models["vae"], batch["image"], 3 * 24 * 24
    last = vae.decoder.conv_out.weight
    cfg = LOSS | dict(adaptive_max=1e4 / values)
    terms = train_vae.train_step(models, batch, noise, cfg, 0.0)
    gradients = torch.stack([torch.autograd.grad(terms[k], last, retain_graph=True)[0] for k in ("nll", "gan")])
    ours = train_vae.train_step(models, batch, noise, cfg, 0.5 * train_vae.adaptive_ratio(gradients, cfg))["loss"]
    posterior = vae.encode(x)
    fake = vae.decode(posterior.mean + posterior.std * noise["posterior"])
    each = (x - fake).abs() + models["lpips"](fake, x, check=False)[:, None, None, None]
    nll, g = each.sum() / 3, -models["disc"](fake).mean()
    norms = [torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (nll, g)]
    d = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
    assert d > 1
    theirs = nll + 1e-6 * posterior.kl().sum() / 3 + 0.5 * d * g
    torch.testing.assert_close(ours * values, theirs, rtol=1e-9, atol=0)


@pytest.mark.parametrize("norm", ("group", "none", "batch"))
def test_identical_images_and_a_batch_of_one_give_no_nan(norm, trunk):
    class Perfect(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, noise):
            return self.weight * x, Posterior(torch.zeros(1, 8, 12, 12))

    models = {"vae": Perfect(), "lpips": LPIPS("squeeze", trunk), "disc": Discriminator(2, norm)}
    for x in (torch.rand(1, 3, 24, 24) * 2 - 1, torch.full((1, 3, 24, 24), -1.0), torch.zeros(1, 3, 24, 24)):
        terms = train_vae.train_step(models, {"image": x}, {"posterior": torch.zeros(1, 4, 12, 12)}, LOSS, 0.1)
        w = models["vae"].weight
        gradients = torch.stack([torch.autograd.grad(terms[k], w, retain_graph=True)[0] for k in ("nll", "gan")])
        assert train_vae.adaptive_ratio(gradients, LOSS).isfinite()
        (terms["loss"] + terms["disc_loss"]).backward()
        for p in (w, *models["disc"].parameters()):
            assert p.grad.isfinite().all()


def test_when_the_discriminator_enters():
    cfg = dict(disc_start=5, disc_ramp=3)
    assert [train_vae.gan_share(n, cfg) for n in (1, 4, 5, 6, 7, 8, 99)] == [None, None, 0.25, 0.5, 0.75, 1, 1]
    assert (
        train_vae.gan_share(5, dict(disc_start=5, disc_ramp=0))
        == 1
        == train_vae.gan_share(1, dict(cfg, disc_start=0, disc_ramp=0))
    )


@pytest.fixture(scope="session")
def adversarial(start, trunk):
    """adversarial(ranks): six steps with LPIPS and GAN, made once."""

    @functools.cache
    def adversarial(ranks=1):
        args = (*ALL_ON, f"--lpips_trunk={trunk}", "--eval_every=3", "--save_every=3", f"--batch_size={4 // ranks}")
        return start("vae", *args, ranks=ranks, plots=ranks == 1).finish()

    return adversarial


def test_a_run_with_everything_on(adversarial):
    run = adversarial()
    steps = [r for r in run.log if r["loss"] is not None]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    # step 1 without, step 2 the discriminator alone, from step 3 on both; the ratio is known from step 4 on
    assert [r["disc_grad_norm"] > 0 for r in steps] == [False, True, True, True, True, True]
    assert [r["gan"] != 0 for r in steps] == [False, False, True, True, True, True]
    assert [r["gan_weight"] > 0 for r in steps] == [False, False, False, True, True, True]
    assert all(0 < r["gan_weight"] <= 0.5 * 0.5 for r in steps[3:])
    for r in steps:
        nll = r["recon"] + r["perceptual"] + 1e-6 * r["kl"]
        assert r["loss"] == pytest.approx(nll + r["gan_weight"] * r["gan"], rel=1e-5) and r["perceptual"] > 0
    assert any(r["logits_real"] != r["logits_fake"] for r in steps[1:])
    evaluated = run.log[-1]
    assert evaluated["val_lpips"] > 0 and evaluated["val_largest_activation"] > 0
    kl = sum(evaluated["val_kl_per_channel"]) / (3 * 24 * 24)
    assert len(evaluated["val_kl_per_channel"]) == 4 and kl == pytest.approx(evaluated["val_kl"], rel=1e-3)
    tensors, meta = run.checkpoint
    names = {"disc.main.0.weight", "disc_optim.main.0.weight.exp_avg", "state.adaptive", "disc.mean_logits"}
    assert names < tensors.keys() and meta["disc"]["disc_layers"] == 1
    assert tensors["disc.mean_logits"].any()
    # kept from just before the autoencoder saw it
    before, meta = read(run.out / "before_gan.safetensors")
    assert meta["step"] == 2 and before["state.adaptive"] == 0 < tensors["state.adaptive"]
    assert "trains from step 2, the autoencoder sees it from step 3" in run.stdout


def test_going_back_to_before_the_gan(adversarial, start, trunk, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(adversarial().out / "before_gan.safetensors", tmp_path / "out/latest.safetensors")
    again = start("vae", *ALL_ON, f"--lpips_trunk={trunk}", "--eval_every=3", folder=tmp_path).finish()
    assert_same(again.checkpoint[0], adversarial().checkpoint[0])


@pytest.mark.parametrize("ranks", (1, 2))
def test_a_killed_game_resumes_bit_for_bit(ranks, start, adversarial, trunk, tmp_path):
    args = (*ALL_ON, f"--lpips_trunk={trunk}", "--eval_every=3", "--save_every=4", f"--batch_size={4 // ranks}")
    killed = start("vae", *args, ranks=ranks, trap=("step 5,", signal.SIGKILL), folder=tmp_path)
    assert killed.wait()[0] == -signal.SIGKILL and killed.checkpoint[1]["step"] == 4
    assert killed.checkpoint[0]["state.adaptive"] > 0
    resumed = start("vae", *args, ranks=ranks, folder=tmp_path).finish()
    assert_same(resumed.checkpoint[0], adversarial(ranks).checkpoint[0])
    assert numbers(resumed.log) == numbers(adversarial(ranks).log)


def test_two_ranks_of_a_game_are_one_in_float64(start, trunk):
    args = (*ALL_ON, f"--lpips_trunk={trunk}", "--dtype=float64")
    one = start("vae", *args, "--batch_size=4")
    two = start("vae", *args, "--batch_size=1", "--grad_accum=2", ranks=2)
    one.finish(), two.finish()
    assert_same(one.checkpoint[0], two.checkpoint[0], 1e-9)
    for a, b in zip(one.log, two.log, strict=True):
        for name in ("gan_weight", "disc_grad_norm", "logits_real", "logits_fake", "val_lpips", "perceptual"):
            assert a[name] is b[name] is None or a[name] == pytest.approx(b[name], rel=1e-9, abs=1e-12), name


# VQ


@pytest.fixture(scope="session")
def vq(start):
    return start("vae", *VQ_ON, "--batch_size=4", "--dtype=float64", "--eval_every=3").finish()


def test_two_ranks_of_vq_are_one_in_float64(vq, start):
    """With restarts after steps 2, 4 and 6, equivariance and GAN."""
    two = start("vae", *VQ_ON, "--batch_size=1", "--grad_accum=2", "--dtype=float64", ranks=2).finish()
    assert_same(vq.checkpoint[0], two.checkpoint[0], 1e-9)
    for a, b in zip(vq.log[-1:] + vq.log[:2], two.log[-1:] + two.log[:2]):
        for name in ("codes_used", "perplexity", "codebook", "val_codes_used", "val_perplexity"):
            assert a[name] is b[name] is None or a[name] == pytest.approx(b[name], rel=1e-9), name
    steps = [r for r in vq.log if r["loss"] is not None]
    assert all(1 <= r["perplexity"] <= 40 * r["codes_used"] + 1e-9 and r["kl"] is None for r in steps)
    assert steps[-1]["codes_used"] > steps[0]["codes_used"], "restarts help"
    assert not vq.checkpoint[0]["state.code_counts"].any()


def test_a_killed_vq_run_resumes_bit_for_bit(vq, start, tmp_path):
    """Killed between two restarts, so that the counts since the last one matter."""
    args = (*VQ_ON, "--batch_size=4", "--dtype=float64", "--eval_every=3", "--save_every=3")
    killed = start("vae", *args, trap=("step 4,", signal.SIGKILL), folder=tmp_path)
    killed.wait()
    assert killed.checkpoint[1]["step"] == 3 and killed.checkpoint[0]["state.code_counts"].sum() == 4 * 8 * 8
    assert_same(start("vae", *args, folder=tmp_path).finish().checkpoint[0], vq.checkpoint[0])


def test_dead_codes_become_candidates_and_forget():
    model = tiny_vae(bottleneck="vq", codebook_size=5)
    ema, codes = copy.deepcopy(model), model.quantize.embedding.weight
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before, dead, candidates = codes.detach().clone(), torch.tensor([0, 1, 0, 0, 1]).bool(), torch.randn(5, 4)
    train_vae.restart_codes(model, ema, optimizer, dead, candidates)
    assert torch.equal(codes[dead], candidates[dead]) and torch.equal(codes[~dead], before[~dead])
    assert torch.equal(ema.quantize.embedding.weight[dead], candidates[dead])
    for moment in ("exp_avg", "exp_avg_sq"):
        assert (optimizer.state[codes][moment] == 0).all(dim=1).tolist() == dead.tolist()
    positions = train_vae.restart_positions(7, 1000, 500, dict(seed=0))
    assert torch.equal(positions, train_vae.restart_positions(7, 1000, 500, dict(seed=0)))
    assert not torch.equal(positions, train_vae.restart_positions(8, 1000, 500, dict(seed=0)))
    assert positions.min() < 50 and positions.max() >= 950 and len(positions) == 500
    used, perplexity = train_vae.code_use(torch.tensor([4.0, 4.0, 0.0, 0.0]))
    assert used == 0.5 and perplexity.item() == pytest.approx(2)


def test_stage_2_diffuses_what_comes_before_quantisation(vq, small_data, start):
    vae = VAE.from_pretrained(vq.out)
    means = posterior_of(vae, small_data).mean
    assert len(set(vae.latent_std.tolist())) == 1, "one unit for all channels: the nearest code stays the nearest"
    assert abs(vae.normalize(means).var(dim=(0, 2, 3)).mean() - 1) < 0.01
    run = start("ldm", f"--first_stage={vq.out}", "--cond=none", "--max_steps=2").finish()
    tensors = run.checkpoint[0]
    assert any(name.startswith("vae.quantize") for name in tensors) and run.log[-1]["val_loss"] > 0
    assert list(run.out.glob("samples_*.png"))


# fine-tuning


def test_the_decoder_alone(start, finished, small_data, tmp_path):
    base = finished("vae")
    args = (f"--init_from={base.out}", "--train=decoder", "--tanh_out=true", "--recon_loss=l2", "--eval_every=3")
    args += ("--save_every=2", "--disc_weight=0.5", "--disc_layers=1", "--disc_start=1")
    whole = start("vae", *args).finish()
    tensors, ema = whole.checkpoint[0], train_vae.without_prefix("ema", base.checkpoint[0])
    for prefix in ("model", "ema"):
        now = train_vae.without_prefix(prefix, tensors)
        kept = {name for name in now if torch.equal(now[name], ema[name])}
        frozen = {name for name in now if name.split(".")[0] not in ("decoder", "post_quant_conv")}
        assert kept == frozen and "latent_mean" in kept and "encoder.conv_in.weight" in kept
    assert not any(name.startswith("optim.encoder") for name in tensors)
    vae, tuned = VAE.from_pretrained(base.out), VAE.from_pretrained(whole.out)
    assert torch.equal(posterior_of(vae, small_data).mean, posterior_of(tuned, small_data).mean)
    assert tuned.settings["tanh_out"] and "the discriminator is a new one" in whole.stdout
    killed = start("vae", *args, trap=("step 3,", signal.SIGKILL), folder=tmp_path)
    killed.wait()
    assert_same(start("vae", *args, folder=tmp_path).finish().checkpoint[0], tensors)
    message = start("vae", *args, "--train=all", "--max_steps=9", folder=tmp_path).fail()
    assert re.search("is of a run with train='?decoder'?", message)


def test_the_decoder_alone_leaves_a_codebook_alone(vq, start):
    args = (*VQ_ON, f"--init_from={vq.out}", "--train=decoder", "--max_steps=2")
    tensors = start("vae", *args).finish().checkpoint[0]
    was = {name: t.float() for name, t in train_vae.without_prefix("ema", vq.checkpoint[0]).items()}
    for name in ("quantize.embedding.weight", "quant_conv.weight", "encoder.conv_out.weight", "latent_std"):
        assert torch.equal(tensors[f"model.{name}"], was[name]) and torch.equal(tensors[f"ema.{name}"], was[name]), name


def test_going_on_at_a_higher_resolution(adversarial, start, trunk):
    args = (*ALL_ON, f"--lpips_trunk={trunk}", f"--init_from={adversarial().out}", "--image_size=32", "--resolution=32")
    run = start("vae", *args, "--lr=1e-30", "--disc_lr=1e-30", "--max_steps=1", "--checkpointing=true").finish()
    then, now = adversarial().checkpoint[0], run.checkpoint[0]
    assert torch.equal(now["model.decoder.conv_in.weight"], then["ema.decoder.conv_in.weight"])
    assert torch.equal(now["disc.main.0.weight"], then["disc.main.0.weight"]), "its opponent comes along"
    assert "from the weights of" in run.stdout and now["ema.latent_std"].isfinite().all()
    assert not torch.equal(now["ema.latent_std"], then["ema.latent_std"]), "measured anew"


# equivariance


def test_equivariance_compares_with_images_treated_alike():
    class Equivariant(torch.nn.Module):
        def forward(self, x, noise, turns=0, side=0):
            return turn_and_scale(x, turns, 2 * side), Posterior(torch.zeros(len(x), 8, 8, 8))

    x, seen = torch.rand(2, 3, 16, 16) * 2 - 1, []

    class Looks(Slope):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    for transform in ((1, 0), (0, 4), (3, 6)):
        noise = {"posterior": torch.zeros(2, 4, 8, 8), "transform": transform}
        models = {"vae": Equivariant(), "disc": Looks(1.0)}
        terms = train_vae.train_step(models, {"image": x}, noise, LOSS, 0.5)
        assert terms["recon"] == 0 and len(seen) == 3 and torch.equal(seen[1], seen[2])
        wanted = turn_and_scale(x, transform[0], 2 * transform[1])
        assert torch.equal(seen[1], wanted) and wanted.shape[-1] == (2 * transform[1] or 16)
        seen.clear()


def test_which_equivariance():
    cfg = dict(seed=0, equivariance_prob=0.5, image_size=64, perceptual_weight=1.0, lpips_net="vgg")
    cfg |= dict(disc_weight=0.5, disc_layers=2)
    drawn = [train_vae.latent_transform(step, cfg, 4) for step in range(2000)]
    assert drawn == [train_vae.latent_transform(step, cfg, 4) for step in range(2000)]
    assert 900 < sum(map(bool, drawn)) < 1100
    kinds = {(turns, side) for turns in range(4) for side in (0, 4, 8, 12)} - {(0, 0)}
    assert set(drawn) == kinds | {()}
    cfg |= dict(lpips_net="alex", equivariance_prob=1.0)  # which needs 31 pixels, 8 latents
    assert {kind[1] for kind in map(lambda step: train_vae.latent_transform(step, cfg, 4), range(500))} == {0, 8, 12}
    assert not any(train_vae.latent_transform(step, cfg | dict(equivariance_prob=0.0), 4) for step in range(99))


# evaluation


def test_eval_only(adversarial, start, small_data, trunk, tmp_path):
    ckpt = shutil.copytree(adversarial().out, tmp_path / "copy")
    (ckpt / "loss.png").unlink()
    args = ("--eval_only=true", f"--ckpt={ckpt}", "--image_size=24", "--eval_split=val", "--lpips_net=squeeze")
    run = start("vae", *args, f"--lpips_trunk={trunk}", folder=tmp_path).finish()
    logged = adversarial().log[-1]
    printed = dict(re.findall(r"^  (\w+) +(.*)$", run.stdout, re.M))
    for name in ("psnr", "ssim", "lpips", "kl", "largest_activation"):
        assert float(printed[name]) == pytest.approx(logged[f"val_{name}"], abs=2e-4), name
    assert eval(printed["latent_std"]) == logged["val_latent_std"] and "on 16 images" in run.stdout
    assert np.asarray(Image.open(ckpt / "eval.png")).shape == (3 * 24, 4 * 24, 3)  # batch_size 4 of them
    assert not (tmp_path / "out").exists()
    images = Dataset(small_data, "val", 24)
    x = torch.stack([images.pixels(i) for i in range(len(images))])
    mean = VAE.from_pretrained(ckpt).encode(x).mean
    far = (mean - mean.mean(dim=(0, 2, 3), keepdim=True)).abs().amax(dim=(0, 2, 3))
    std = torch.tensor(logged["val_latent_std"])
    torch.testing.assert_close(torch.tensor(eval(printed["latent_farthest"])), far / std, rtol=1e-3, atol=1e-3)
    line = start("vae", *args, "--val_images=1", "--inception_weights=FILE", folder=tmp_path).fail()
    assert re.search("rFID needs 2 images or more, .* gives 1: leave inception_weights out", line)
    run = start("vae", *args, "--eval_split=all", f"--lpips_trunk={trunk}", folder=tmp_path).finish()
    assert "on 40 images" in run.stdout
    without = start("vae", *args, folder=tmp_path).finish()
    assert "lpips  " not in without.stdout
    if importlib.util.find_spec("torch_fidelity") is None:
        message = start("vae", *args, "--inception_weights=inception.pth", folder=tmp_path).fail()
        assert message.startswith("inception_weights needs torch-fidelity")


def test_rfid_is_the_distance_of_two_gaussians(small_data, monkeypatch):
    """With a stand-in for Inception whose features are 2048 numbers of an image, most of them always 0."""
    linalg = pytest.importorskip("scipy.linalg", reason="no scipy to compare with")

    def inception(x):
        assert x.dtype == torch.uint8 and x.shape[1:] == (3, 16, 16)
        parts = x.float().unfold(2, 16, 16)[..., ::2].flatten(1)[:, :: len(x[0].flatten()) // 12][:, :6] / 255
        return F.pad(parts, (0, 2048 - 6))

    vae, stream = tiny_vae().eval(), Stream(Dataset(small_data, "val", 16), 0, train=False)
    cfg = dict(val_images=16, batch_size=5)
    scores, _ = train_vae.evaluate(vae, stream, cfg, 0, 1, torch.device("cpu"), contextlib.nullcontext, None, inception)
    x = torch.stack([stream[i]["image"] for i in range(16)])
    y = vae.decode(vae.encode(x).mode()).clamp(-1, 1).detach()
    f, g = (inception(((a + 1) * 127.5).round().byte())[:, :6].double().numpy() for a in (x, y))
    c, d = (np.cov(features, rowvar=False) for features in (f, g))
    wanted = ((f.mean(0) - g.mean(0)) ** 2).sum() + np.trace(c + d - 2 * linalg.sqrtm(c @ d).real)
    assert scores["val_rfid"] == pytest.approx(wanted, rel=1e-6) and scores["val_rfid"] > 0


# bad input


@pytest.mark.parametrize(
    "args, wanted",
    [
        ("--disc_weight=1", "LPIPS (vgg) and the discriminator need: lower disc_layers"),
        ("--lpips_trunk=squeeze.pth --lpips_net=squeeze", "image_size=16 is less than the 17 that SSIM, LPIPS"),
        ("--disc_loss=wgan", "disc_loss=wgan is not one of hinge, vanilla, least_squares"),
        ("--disc_norm=instance", "disc_norm=instance is not one of group, batch, none"),
        ("--bottleneck=vae", "bottleneck='vae' is not one of kl, vq"),
        ("--train=encoder", "train=encoder is not one of all, decoder"),
        ("--train=decoder", "train=decoder goes on from a trained autoencoder: set init_from to its checkpoint"),
        ("--init_from=nowhere", "checkpoint nowhere is not there"),
        ("--adaptive_min=2", "adaptive_min=2.0 is above adaptive_max=0.0509"),
        ("--equivariance_prob=1.5", "equivariance_prob=1.5 "),
        ("--disc_warmup=-1", "disc_warmup=-1 must not be negative"),
        ("--ckpt=out", "ckpt=out is for eval_only alone: set eval_only=True, or leave it out"),
        ("--eval_split=val", "eval_split=val is for eval_only alone"),
        ("--eval_only=true --ckpt=nowhere", "checkpoint nowhere is not there"),
        ("--image_size=32 --perceptual_weight=1 --lpips_trunk=none.pth", "none.pth does not load (it is not there)"),
    ],
)
def test_bad_input_of_stage_1_is_one_line(args, wanted, start):
    assert wanted in start("vae", *args.split()).fail()


def test_bad_input_that_names_the_right_remedy(start, finished, trunk, tmp_path):
    message = start("vae", f"--init_from={finished('vae').out}", "--ch=16", "--codebook_size=4").fail()
    assert re.search(r"out holds another model \(ch: 8 in the checkpoint, 16 now; codebook_size: 8192", message)
    message = start("vae", f"--init_from={finished('vae').out}", "--ch=128").fail()
    assert "ch: 8 in the checkpoint, 128 now" in message, "though it is the default"
    on = ("--image_size=32", "--perceptual_weight=1", "--lpips_net=alex")
    message = start("vae", *on, f"--lpips_trunk={trunk}").fail()
    assert "alex wants (64, 3, 11, 11): give alex's weights, or set net" in message
    heads = f"{importlib.util.find_spec('lpips').submodule_search_locations[0]}/weights/v0.1/vgg.pth"
    message = start("vae", *on, "--lpips_net=squeeze", f"--lpips_trunk={trunk}", f"--lpips_heads={heads}").fail()
    assert "has heads for [64, 128, 256, 512, 512] channels" in message and "perceptual_weight=0" in message
    late = start("vae", "--disc_weight=1", "--disc_layers=1", "--disc_start=7", "--max_steps=2").finish()
    assert "warning: disc_start=7 is beyond max_steps=2: no step of this run has a GAN loss" in late.stdout


def test_a_trunk_that_cannot_be_fetched_is_one_line(small_data, tmp_path):
    """Without a network, as one that has no route: torch.hub's own word of what it tries is all that comes before."""
    env = os.environ | {"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"{ROOT}/train_vae.py", "--device=cpu", "--lpips_net=squeeze", f"--out_dir={tmp_path}/o"]
    command += [f"--dataset={small_data}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Downloading")]
    assert done.returncode == 1 and len(lines) == 1
    assert "could not fetch" in lines[0] and "set lpips_trunk to it, or do without LPIPS" in lines[0]


PUBLISHED = dict(kl_f4=55_312_063, kl_f8=83_653_863, kl_f16=69_610_963, kl_f32=103_880_131, vq_f4=55_322_782)
PUBLISHED |= dict(vq_f8=67_717_295, ft_mse=83_653_863, four_phase_4=83_653_863)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_are_the_published_models(name):
    config = configure(vars(train_vae).copy(), [f"{ROOT}/config/{name}.py"])
    train_vae.check_settings(config)
    with torch.device("meta"):
        vae = VAE(**{key: config[key] for key in inspect.signature(VAE).parameters})
    assert sum(p.numel() for p in vae.parameters()) == PUBLISHED[name]


def test_a_discriminator_that_rests_is_kept(start, tmp_path):
    """disc_weight=0 on resume trains without it, and what it was is still there; so is the place the run began."""
    game = ("--disc_weight=0.5", "--disc_layers=1", "--disc_start=1")
    start("vae", *game, "--max_steps=2", folder=tmp_path).finish()
    before, meta = read(tmp_path / "out/latest.safetensors")
    after, now = start("vae", "--max_steps=4", folder=tmp_path).finish().checkpoint
    kept = {name for name in before if name.startswith(("disc.", "disc_optim."))}
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    assert now["disc"] == meta["disc"] and not torch.equal(
        before["model.decoder.conv_in.weight"], after["model.decoder.conv_in.weight"]
    )
    line = start("vae", *game, "--init_from=out/other", folder=tmp_path).fail()
    assert "is of a run with init_from='', not 'out/other'" in line
    measured, same = start("vae", "--measure_latents", folder=tmp_path).finish().checkpoint
    assert same == now and all(torch.equal(after[name], measured[name]) for name in kept)


def test_going_on_from_a_snapshot_takes_a_new_discriminator(start):
    """It holds averaged weights alone, though its settings tell of a discriminator."""
    game = ("--disc_weight=0.5", "--disc_layers=1", "--disc_start=1", "--max_steps=2", "--snapshot_every=2")
    kept = start("vae", *game).finish().out / "ema_00000002.safetensors"
    run = start("vae", *game, f"--init_from={kept}").finish()
    assert "the discriminator is a new one: the checkpoint has none" in run.stdout


@pytest.mark.parametrize("stage", ("vae", "ldm"))
def test_wandb_gets_the_records_of_the_log(stage, small_data, first_stage, tmp_path):
    (tmp_path / "wandb.py").write_text(
        "import json\n\n\ndef init(**about):\n    print('init', about['name'], about['config']['seed'])\n\n\n"
        "def log(record, step):\n    print('record', step, json.dumps(record))\n"
    )
    args = [*ARGS[stage].split(), f"--dataset={small_data}", "--wandb=True", "--max_steps=2"]
    args += [f"--first_stage={first_stage}"] * (stage == "ldm")
    env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"{ROOT}/train_{stage}.py", *args]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "init out 0" in done.stdout, done.stderr
    told = [line.split(" ", 2)[1:] for line in done.stdout.splitlines() if line.startswith("record ")]
    with open(tmp_path / "out/log.jsonl") as f:
        logged = [{k: v for k, v in json.loads(line).items() if v is not None} for line in f]
    assert len(told) == 3 and [json.loads(record) for _, record in told] == logged
