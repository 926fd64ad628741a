"""The examples: what their functions compute, and that each runs from the command line."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fill, near
from PIL import Image
from test_diffusion import MEAN, mixture_denoiser, normal

import checkpoint
import sample
from attention import use_attention
from checkpoint import UserError
from configurator import configure
from data.dataset import Dataset
from diffusion import make_denoiser, make_schedule, randn, sample_times, samplers
from examples.dit import DiT
from examples.interpolate import interpolate, slerp
from examples.invert import ddim_invert, edit
from examples.meanflow import TwoTimes, error, guided_velocity, mean_velocity
from examples.reconstruct import reconstruct
from examples.trajectory import trajectory
from grid import to_pil
from metrics import psnr, ssim
from sample import decode, encode, generate, guided_denoiser, load_pipeline, network_inputs
from unet import Denoiser, UNet
from vae import VAE


@pytest.fixture(scope="module")
def pipelines(runs):
    return {name: load_pipeline(runs[name].path) for name in ("text", "class", "none")}


@pytest.fixture
def run(command):
    """run(name, *args) -> what the example prints."""

    def run(name, *args):
        status, out, err = command(f"examples/{name}.py", *args)
        assert (status, err) == (0, "")
        return out

    return run


def test_slerp():
    a, b, x, y = normal(3, 8, 8), normal(3, 8, 8, seed=1), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    path = slerp(a, b, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    near(path[[0, 2]], torch.stack([a, b]))
    assert path[1].norm().item() == pytest.approx(a.norm().item(), rel=0.1), "as long as a noise is"
    near(slerp(x, y, torch.tensor([1 / 3]))[0], torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    near(slerp(a, a, torch.full((1,), 0.3, dtype=torch.float64))[0], a)


def test_interpolation_has_the_ends_of_generate(pipelines, run, runs):
    text = pipelines["text"]
    frames = interpolate(text, ("a cat", "a red star"), (3, 9), 3, 3, "ddim", 2.0)
    near(frames[[0, 2]], generate(text, ["a cat", "a red star"], [3, 9], 3, 2.0))
    contexts = text.denoiser.text(["a cat", "a red star"])
    cond, null = {"context": contexts.mean(0, keepdim=True)}, {"context": text.denoiser.text([""])}
    a, b = randn((2, 3, 8, 8), [torch.Generator().manual_seed(seed) for seed in (3, 9)])
    denoise = make_denoiser(text.denoiser.unet, text.schedule, "v", cond, null, 2.0)
    x = samplers["ddim"](denoise, slerp(a, b, torch.tensor([0.5])), sample_times(3, text.schedule), text.schedule)
    near(frames[1:2], decode(text, x))
    for name, conditions in (("class", (1, 1)), ("none", (None, None))):
        frames = interpolate(pipelines[name], conditions, (0, 5), 2, 2, "ddim", 2.0)
        near(frames, generate(pipelines[name], list(conditions), [0, 5], 2, 2.0))
    out = run("interpolate", f"--ckpt={runs['text'].path}", "--prompt=a", "--prompt_to=b", "--frames=3", "--steps=2")
    assert out == "3 images in interpolation.gif\n"
    with Image.open("interpolation.gif") as gif:
        assert gif.n_frames == 3 and gif.size == (32, 32)


@pytest.mark.parametrize("name", ["cosine", "flow", "scaled_linear"])
def test_inversion_comes_back(name):
    """On exact data: nearer with more steps, nearer with more iterations, which tend to the exact inverse."""
    schedule, x0 = make_schedule(name), MEAN + 0.5 * normal(64, 2)

    def error(steps, iterations):
        times, denoise = sample_times(steps, schedule), mixture_denoiser(schedule)
        noise = ddim_invert(denoise, x0, times, schedule, iterations)
        return (samplers["ddim"](denoise, noise, times, schedule) - x0).abs().max().item()

    assert error(25, 1) > error(50, 1) > error(50, 3) > error(100, 3)
    assert error(50, 60) < 1e-6


def test_inversion_generates_the_image_again(pipelines, run, runs):
    text = pipelines["text"]
    image = generate(text, ["a cat"] * 2, [0, 1], 20)  # an image that the model can generate
    again, edited = edit(text, image, ["a cat"] * 2, ["a red star"] * 2, 20)
    known, fresh = decode(text, encode(text, image)), generate(text, ["a cat"] * 2, [7, 8], 20)
    assert (again - known).square().mean() < 0.1 * (fresh - known).square().mean()
    assert (edited - again).abs().max() > 1e-2
    Image.fromarray(np.full((21, 35, 3), 99, np.uint8)).save("photo.png")
    assert run("invert", f"--ckpt={runs['class'].path}", "--steps=2", "--cls=1") == "inverted.png\n"
    with Image.open("inverted.png") as grid:
        assert grid.size == (3 * (32 * 4 + 4), 16 * 4 + 4 + 24)


def test_trajectory(pipelines, run, runs):
    images, frames = trajectory(pipelines["none"], [None] * 3, range(3), 4, sampler="ddim")
    near(images, generate(pipelines["none"], [None] * 3, range(3), 4))
    assert len(frames) == 4 and frames[0].shape == (3, 3, 32, 32)
    near(frames[-1], images)
    assert run("trajectory", f"--ckpt={runs['class'].path}", "--steps=3", "--n=2").startswith("3 steps in")
    with Image.open("trajectory.gif") as gif:
        assert gif.n_frames == 3


def test_reconstruct(runs, run, command, tmp_path):
    """Images of several sizes and modes, one damaged and one too small; of either stage's checkpoint."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for name, (W, H) in {"a.png": (40, 24), "b.png": (37, 50), "small.png": (8, 40)}.items():
        pixels = np.kron(rng.integers(0, 256, (-(-H // 8), -(-W // 8), 3)), np.ones((8, 8, 1)))[:H, :W]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    Image.open(folder / "a.png").convert("L").save(folder / "grey.png")
    (folder / "c.png").write_bytes((folder / "b.png").read_bytes()[:100])
    lines = run("reconstruct", f"--ckpt={runs['vae'].path}", f"--images={folder}").splitlines()
    vae, expected = runs["vae"].vae, []
    for name, W, H in (("a.png", 40, 24), ("b.png", 36, 48), ("grey.png", 40, 24)):
        with Image.open(folder / name) as image:
            x = torch.from_numpy(np.array(image.convert("RGB"))[:H, :W].copy()).permute(2, 0, 1)[None] / 127.5 - 1
        y = vae.decode(vae.encode(x).mode())
        expected.append((psnr(y, x).item(), ssim(y, x).item()))
        assert f"{name} {W}x{H}: PSNR {expected[-1][0]:.2f} dB, SSIM {expected[-1][1]:.4f}" in lines
    gray = VAE(**vae.settings | dict(image_mode="L"))
    x = next(x for key, x, _ in reconstruct(gray, Dataset(folder, "all", image_mode="L")) if key == "grey.png")
    assert np.array_equal(np.array(to_pil(x[0])), np.array(Image.open(folder / "grey.png")))
    mean = np.mean(expected, axis=0)
    assert lines[-1] == f"3 images: PSNR {mean[0]:.2f} dB, SSIM {mean[1]:.4f}; reconstructions.png"
    assert "skipped small.png: 8x40 is too small" in lines and len(lines) == 6
    with Image.open("reconstructions.png") as sheet:
        assert sheet.size == (40 + 36 + 40 + 3 * 4, 2 * 48 + 4)
        assert np.array_equal(np.array(sheet)[:24, :40], np.array(Image.open(folder / "a.png"))), "originals above"
    for name in ("a.png", "b.png", "grey.png"):
        (folder / name).unlink()
    _, _, err = command("examples/reconstruct.py", f"--ckpt={runs['vae'].path}", f"--images={folder}")
    assert err == f"reconstruct.py: {folder}: no image that can be reconstructed; give a folder of images\n"


class Exact(torch.nn.Module):
    """The mean velocity from t to r of dx/dt = x, whose path is x exp(r - t)."""

    time_embed = SimpleNamespace(r=None)

    def forward(self, x, t):
        span = (t / 1000 - self.time_embed.r).view(-1, 1, 1, 1)
        return x * torch.where(span > 0, -torch.expm1(-span) / span.clamp(min=1e-9), 1.0)


def test_mean_flow_identity():
    """The exact mean velocity has no error; of a network du/dt is what finite differences along the path give."""
    x, v = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1)
    r, t = torch.tensor([[0.0, 0.3, 0.5, 0.1], [1.0, 0.8, 0.5, 0.2]], dtype=torch.float64)
    near(error(Exact(), x, r, t, x, {}), torch.zeros_like(x), 1e-12)
    assert error(Exact(), x, r, t, 1.1 * x, {}).abs().amax(dim=(1, 2, 3)).min() > 0.1
    unet = UNet(3, 3, channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_ds=(2,), num_heads=2, context_dim=6,
                norm_groups=4)  # fmt: skip
    unet.time_embed = TwoTimes(unet.time_embed)
    use_attention(fill(unet).double(), "reference")
    condition, h = {"context": normal(4, 5, 6)}, 2**-6 / 1000  # exact in the float32 of timestep_embedding
    u, after, before = (mean_velocity(unet, x + d * v, r, t + d, condition) for d in (0, h, -h))
    target = v - (t - r).view(-1, 1, 1, 1) * (after - before) / (2 * h)
    near(error(unet, x, r, t, v, condition), u - target, 1e-3 * (u - target).abs().max().item())
    assert (u - mean_velocity(unet, x, r + 0.1, t, condition)).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    u = mean_velocity(unet, x, torch.zeros_like(t), t, condition)
    unet.time_embed = unet.time_embed.at_zero()
    near(unet(x, 1000 * t, **condition), u, 1e-12)


@pytest.mark.parametrize("name", ["text", "class"])
def test_meanflow(run, command, runs, small_data, tmp_path, name):
    """Its checkpoint is of a flow model; one step of sample.py, without guidance, is x1 - u(x1, 0, 1)."""
    path = f"{tmp_path}/flow.safetensors"
    args = [f"--init_from={path}", f"--dataset={small_data}", "--max_steps=3", "--batch_size=8"]
    tensors, meta = checkpoint.read(runs[name].path)
    checkpoint.write(path, tensors, meta)
    assert "not a flow model" in command("examples/meanflow.py", *args)[2]
    meta["model"] |= dict(objective="flow", schedule="flow")
    checkpoint.write(path, tensors, meta)
    assert run("meanflow", *args).splitlines()[-1] == "out/meanflow/latest.safetensors"
    before, after = load_pipeline(path), load_pipeline("out/meanflow")
    assert after.sampling == {"sampler": "ddpm", "steps": 1, "guidance": 1.0}
    old, new = (pipeline.denoiser.state_dict() for pipeline in (before, after))
    changed = {part.partition(".")[0] for part in old if not torch.equal(old[part], new[part])}
    assert changed == {"unet"}
    condition = before.examples[1]
    x1 = randn((1, 3, 8, 8), [torch.Generator().manual_seed(5)])
    u = after.denoiser.unet(x1, torch.tensor([1000.0]), **network_inputs(after, [condition]))
    for sampler in samplers:
        near(generate(after, [condition], [5], 1, sampler=sampler), decode(after, x1 - u))
    inputs, null = (network_inputs(before, [c]) for c in (condition, "" if before.text else before.num_classes))
    v = guided_velocity(before.denoiser.unet, x1, torch.tensor([0.7]), inputs, null, 2.0)
    near(x1 - 0.7 * v, guided_denoiser(before, [condition], {}, 2.0)(x1, 0.7))
    status, out, err = command("sample.py", "--ckpt=out/meanflow", "--steps=1")
    assert (status, err) == (0, "") and "1 steps, guidance 1, 1 network evaluations each" in out


def test_classifier(run, command, tmp_path):
    """Red and blue images are told apart; a sample counts where its class is seen; the second call trains nothing."""
    colors = {"blue": (20, 20, 200), "red": (200, 20, 20)}
    for name, color in colors.items():
        for split, count in (("train", 8), ("val", 2)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (16, 16), tuple(c + 5 * i for c in color))
                image.save(tmp_path / "data" / split / name / f"{i}.png")
    args = (f"--dataset={tmp_path}/data", "--image_size=16", "--steps=20", "--batch_size=8")
    assert run("classifier", *args) == "accuracy on 4 held-out images: 100.0%\n"
    images = np.stack([np.full((16, 16, 3), color, np.uint8) for color in colors.values()] * 2)
    np.savez("samples.npz", arr_0=images, arr_1=[0, 1, 1, 1])
    assert run("classifier", *args, "--samples=samples.npz").endswith("class consistency of 4 samples: 75.0%\n")
    np.savez("unlabelled.npz", arr_0=images)
    status, _, err = command("examples/classifier.py", *args, "--samples=unlabelled.npz")
    assert status == 1 and "unlabelled.npz: has no classes (arr_1)" in err
    np.savez("large.npz", arr_0=images.repeat(2, 1).repeat(2, 2), arr_1=[0, 1, 1, 1])
    status, _, err = command("examples/classifier.py", *args, "--samples=large.npz")
    assert status == 1 and "classifier.py: large.npz: has images of (32, 32, 3), not (16, 16, 3); generate" in err


@pytest.mark.parametrize("name", ["class", "inpaint"])
def test_dit_from_a_checkpoint(runs, tmp_path, name):
    """A denoiser of one's own, named on the command line, uses t, condition and concat."""
    tensors, meta = checkpoint.read(runs[name].path)
    names = ("in_channels", "out_channels", "concat_channels", "context_dim", "num_classes")
    dit = DiT(**{key: meta["model"]["unet"][key] for key in names}, channels=16, transformer_depth=2, head_dim=8)
    model = Denoiser(fill(dit), runs[name].denoiser.text).eval()
    inputs = dict(tokens=model.text.tokenize(["a", "b"])) if model.text else dict(y=torch.tensor([1, 2]))
    if name == "inpaint":
        inputs["concat"] = torch.randn(2, 4, 8, 12)
    x, t = torch.randn(2, 3, 8, 12), torch.tensor([300.0, 300.0])
    out = model(x, t, **inputs)
    assert out.shape == x.shape
    for other in (model(x, t + 50, **inputs), *(model(x, t, **inputs | {k: v.flip(0)}) for k, v in inputs.items())):
        assert (other - out).abs().max() > 1e-4
    kept = {key: value for key, value in tensors.items() if not key.startswith(("ema.unet.", "model."))}
    meta["model"]["unet"] = dit.settings
    checkpoint.write(f"{tmp_path}/mine.safetensors", kept | checkpoint.with_prefix("ema.unet", dit.state_dict()), meta)
    for model_class in (Denoiser, UNet):
        with pytest.raises(UserError, match="a denoiser of another class needs --denoiser="):
            model_class.from_pretrained(f"{tmp_path}/mine.safetensors")
    args = [f"--ckpt={tmp_path}/mine.safetensors", "--denoiser=examples.dit:DiT"]
    cfg = configure(dict(vars(sample)), args)
    _, pipeline, _ = sample.load_from_settings(cfg, sample.setup(cfg.replace(deterministic=False, device="cpu")))
    near(pipeline.denoiser(x, t, **inputs), out)
    assert pipeline.multiple == 8
