"""What both training scripts promise (resume, ranks, signals, faults, errors), tested on both; then stage 1 alone."""

import ast
import inspect
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ARGS, ROOT, assert_same, read
from PIL import Image

import train_ldm
import train_vae
from data.dataset import Dataset, seed_of
from unet import Denoiser, TextEncoder, UNet
from vae import VAE, Posterior

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


@both_stages
def test_a_bad_loss_never_reaches_the_weights(stage, start):
    run = start(stage, "--lr=1e30", "--warmup_steps=0", "--save_every=1", keep=True)
    message = run.fail()
    found = re.match(
        r"(.*) not finite at step (\d+): no such step touches the weights, and out/latest.safetensors", message
    )
    assert found and found[1] in {"vae": ("recon", "kl", "recon and kl"), "ldm": ("loss", "loss and grad_norm")}[stage]
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
    pictures = {"vae": "recon", "ldm": "samples"}[stage]
    wanted = {f"{pictures}_{step:08d}.png" for step in (3, 6)} | {f"ema_{step:08d}.safetensors" for step in (3, 6)}
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
        script.update_ema(ema, model, n, decay)
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
