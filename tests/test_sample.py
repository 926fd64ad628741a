"""Generating images: for every task and condition, from images, guided; what the command makes of its settings."""

import copy
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill, near
from PIL import Image

import checkpoint
import sample
from checkpoint import UserError
from configurator import configure
from data.tasks import augment_low, image_condition
from diffusion import make_denoiser, make_schedule, randn, sample_times, samplers, start_std
from grid import make_grid, save_png, to_pil
from sample import compile_unet, decode, encode, generate, load_pipeline, read_prompts, round_weights

NAMES = ("text", "class", "none", "pixels", "tokens", "inpaint", "sr", "semantic")
CONDITIONS = {
    "text": ["a red star", "", "🌟 twice 🌟", "x" * 2000, "a red star"],
    "class": [0, 3, 1, 3, 2],
    "none": [None] * 5,
    "pixels": [None] * 5,
}
SEEDS = [7, 8, 9, 10, 7]


@pytest.fixture(scope="module")
def pipelines(runs):
    return {name: load_pipeline(runs[name].path) for name in NAMES}


@pytest.fixture
def calls(monkeypatch):
    """calls(pipeline) -> the list of inputs that its network is called with from now on."""

    def spy_on(pipeline):
        seen, forward = [], pipeline.denoiser.unet.forward

        def spy(x, t, **inputs):
            seen.append({"x": x, "t": t, **inputs})
            return forward(x, t, **inputs)

        monkeypatch.setattr(pipeline.denoiser.unet, "forward", spy)
        return seen

    return spy_on


def seeded(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def blobs(count=2, side=32, seed=0):
    """Random blobs in 256 levels, as images come from files."""
    x = torch.rand(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.interpolate(x, scale_factor=8, mode="bilinear")
    return (x * 255).round() / 127.5 - 1


def left_half(count=2, side=32):
    mask = torch.zeros(count, 1, side, side)
    mask[..., : side // 2] = 1
    return mask


def by_hand(pipeline, cond, null, seeds, steps, guidance=1.0, sampler="ddim", spacing="trailing", options=(), **guided):
    """Images of generate from its parts."""
    schedule, objective = pipeline.schedule, pipeline.objective
    denoise = make_denoiser(pipeline.denoiser.unet, schedule, objective, cond, null, guidance, **guided)
    times, generators = sample_times(steps, schedule, objective, spacing), seeded(seeds)
    x = start_std(times, schedule) * randn((len(seeds), *pipeline.latent_shape), generators)
    return decode(pipeline, samplers[sampler](denoise, x, times, schedule, generators, **dict(options)))


# --- loading ---


def test_all_of_a_pipeline_is_loaded(runs, pipelines):
    same = checkpoint.hash_weights
    for name, pipeline in pipelines.items():
        assert same(pipeline.denoiser) == same(runs[name].denoiser) and not pipeline.denoiser.training
        assert pipeline.vae is None if name == "pixels" else same(pipeline.vae) == same(runs["vae"].vae)
        assert pipeline.task["task"] == (name if name in ("inpaint", "sr", "semantic") else "none")
    assert pipelines["sr"].task["sr_noise"] == 10 and pipelines["semantic"].task["map_classes"] == 5


def test_zero_terminal_snr_is_loaded(runs, tmp_path):
    file, (tensors, meta) = str(tmp_path / "a.safetensors"), checkpoint.read(runs["none"].path)
    meta["model"] |= {"schedule": "scaled_linear", "zero_snr": True}
    checkpoint.write(file, tensors, meta)
    assert load_pipeline(file).schedule.alpha(torch.ones(1)) == 0


def test_another_decoder(runs, pipelines, tmp_path):
    """first_stage: its decoder with the checkpoint's latent statistics; another encoder is refused."""
    vae, x, path = copy.deepcopy(runs["vae"].vae), torch.randn(2, 3, 8, 8), str(tmp_path / "tuned.safetensors")
    meta = checkpoint.read_meta(runs["vae"].path)

    def load(name="text"):
        checkpoint.write(path, checkpoint.with_prefix("ema", vae.state_dict()), meta)
        return load_pipeline(runs[name].path, first_stage=path)

    fill(vae.decoder, 9)
    expected = decode(pipelines["text"]._replace(vae=copy.deepcopy(vae)), x)
    assert (expected - decode(pipelines["text"], x)).abs().max() > 0.1
    vae.latent_mean.fill_(7)
    for factor in (1, 1.005):  # more than rounding to half precision changes
        torch._foreach_mul_(list(vae.encoder.parameters()), factor)
        near(decode(load(), x), expected)
    vae.quant_conv.weight.mul_(1.5)
    for name, message in (("text", "has other latents than the checkpoint's"), ("pixels", "generates pixels")):
        with pytest.raises(UserError, match=message):
            load(name)


def test_checkpoints_that_do_not_generate(runs):
    for name, known, message in (
        ("vae", {}, "stage vae, without a denoiser; give a checkpoint of train_ldm.py"),
        ("text", dict(objective="v", num_heads=2), "has all its settings; leave out --objective, --num_heads"),
    ):
        with pytest.raises(UserError, match=message):
            load_pipeline(runs[name].path, **known)


# --- generate ---


@pytest.mark.parametrize("sampler, options", [("ddim", {"eta": 0.6}), ("heun", {})])
@pytest.mark.parametrize("name", CONDITIONS)
def test_an_image_depends_on_its_condition_and_seed_alone(pipelines, name, sampler, options):
    def run(rows, **more):
        conditions, seeds = [CONDITIONS[name][i] for i in rows], [SEEDS[i] for i in rows]
        return generate(pipelines[name], conditions, seeds, 3, 2.0, sampler, **options, **more)

    together = run(range(5))
    side = 8 if name == "pixels" else 32
    assert together.shape == (5, 3, side, side) and together.dtype == torch.float32
    assert together.abs().max() <= 1 and (together.abs() < 1).float().mean() > 0.2, "not all is clamped"
    for batch_size in (1, 2):
        near(run(range(5), batch_size=batch_size), together)
    near(run([3, 1]), together[[3, 1]])
    for i, j in itertools.combinations(range(5), 2):
        same = (CONDITIONS[name][i], i % 4) == (CONDITIONS[name][j], j % 4)  # the last has the first one's seed
        assert torch.allclose(together[i], together[j], rtol=0, atol=1e-5) == same, (i, j)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("name", ["text", "class", "none", "pixels", "tokens"])
def test_generate_is_its_parts(runs, pipelines, name, guidance):
    """Without guidance the condition alone; else guided from the empty prompt, or from the class after the last."""
    denoiser, cond, null = runs[name].denoiser, {}, {}
    if name == "text":
        cond, null = ({"context": denoiser.text(prompts)} for prompts in (["a", "blue star"], ["", ""]))
    elif name == "class":
        cond, null = {"y": torch.tensor([1, 2])}, {"y": torch.tensor([4, 4])}
    elif name == "tokens":
        cond, null = ({"context": denoiser.class_tokens.weight[rows, None]} for rows in ([1, 0], [2, 2]))
    conditions = {"text": ["a", "blue star"], "class": [1, 2], "tokens": [1, 0]}.get(name, [None] * 2)
    got = generate(pipelines[name], conditions, [3, 4], 3, guidance)
    assert generate.evaluations == (6 if cond and guidance != 1 else 3)
    near(got, by_hand(pipelines[name], cond, null, [3, 4], 3, guidance if cond else 1.0))
    if cond:
        assert (generate(pipelines[name], conditions, [3, 4], 3, guidance + 1) - got).abs().max() > 1e-2


def test_guidance_and_sampler_options_are_passed_on(pipelines):
    text, none = pipelines["text"], pipelines["none"]
    cond, null, dark = ({"context": text.denoiser.text([prompt])} for prompt in ("a star", "", "dark"))
    plain = generate(text, ["a star"], [1], 4, 3.0)
    for options in (dict(guidance_interval=(0.3, 0.8)), dict(guidance_rescale=0.7), dict(spacing="quadratic")):
        got = generate(text, ["a star"], [1], 4, 3.0, **options)
        near(got, by_hand(text, cond, null, [1], 4, 3.0, **options))
        assert (got - plain).abs().max() > 1e-2, options
    near(generate(text, ["a star"], [1], 4, 3.0, negative="dark"), by_hand(text, cond, dark, [1], 4, 3.0))
    for sampler, options in (("euler_a", {"eta": 0.5}), ("ddpm", {"noise_scale": 0.3}), ("unipc", {"order": 3})):
        got = generate(none, [None], [1], 8, sampler=sampler, **options)
        near(got, by_hand(none, {}, None, [1], 8, sampler=sampler, options=options))
        assert (got - generate(none, [None], [1], 8, sampler=sampler)).abs().max() > 1e-3


@pytest.mark.parametrize("name, conditions", [("none", [None, None]), ("text", ["a", "b"]), ("tokens", [0, 1])])
def test_autoguidance(pipelines, name, conditions):
    """The weaker model gets the same condition; it works without any."""
    pipeline = pipelines[name]
    weak = pipeline._replace(denoiser=fill(copy.deepcopy(pipeline.denoiser), 5))
    cond, weaker = (sample.network_inputs(p, conditions) for p in (pipeline, weak))
    guide = make_denoiser(weak.denoiser.unet, pipeline.schedule, "v", weaker)
    got = generate(pipeline, conditions, [0, 1], 3, 2.0, guide=weak)
    assert generate.evaluations == 6
    near(got, by_hand(pipeline, cond, None, [0, 1], 3, 2.0, guide=guide))
    assert (got - generate(pipeline, conditions, [0, 1], 3, 2.0)).abs().max() > 1e-2


def test_compiled_and_rounded_networks_are_the_same(runs, pipelines):
    """Full batches by the compiled network, compiled once; the last, smaller one without it."""
    pipeline, args = load_pipeline(runs["pixels"].path), ([None] * 5, SEEDS, 3)
    compile_unet(pipeline, backend="eager")
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    near(generate(pipeline, *args, batch_size=2), generate(pipelines["pixels"], *args))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters
    rounded, args = load_pipeline(runs["text"].path), (CONDITIONS["text"], SEEDS, 3, 2.0)
    round_weights(rounded)
    with torch.autocast("cpu", torch.bfloat16):  # rounds weights in the same way, at every step
        assert torch.equal(generate(rounded, *args), generate(pipelines["text"], *args))


def test_decoding_in_slices_tiles_and_little_memory(pipelines, monkeypatch):
    pipeline, vae = pipelines["text"], pipelines["text"].vae
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, plain, sizes, most = decode(pipeline, x), vae.decode, [], 2
    near(expected, plain(vae.denormalize(x)).clamp(-1, 1), 0)
    for batch, tile in itertools.product((1, 2, 9), (0, 8)):
        near(decode(pipeline, x, tile, batch), expected)
    wide = torch.cat([x, x], 3)
    assert (decode(pipeline, wide, tile=8) - decode(pipeline, wide)).abs().max() > 1e-3

    def little(z):
        sizes.append(len(z))
        if len(z) > most:
            raise torch.OutOfMemoryError
        return plain(z)

    monkeypatch.setattr(vae, "decode", little)
    near(decode(pipeline, x), expected)
    assert sizes == [5, 3, 2, 2, 1]
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        decode(pipeline, x)


def test_size_and_callback(pipelines):
    text, frames = pipelines["text"], []
    assert generate(text, ["a"], [0], 1, size=(48,)).shape == (1, 3, 48, 48)
    assert generate(text, ["a"], [0], 1, size=(48, 16)).shape == (1, 3, 48, 16)
    assert generate(pipelines["pixels"], [None], [0], 1, size=(9,)).shape == (1, 3, 9, 9)
    for size in ((30,), (-8,), (16, 20), (16.5, 16), (8, 8, 8)):
        with pytest.raises(UserError, match=f"size={','.join(map(str, size))} must be one or two multiples of 8"):
            generate(text, ["a"], [0], 1, size=size)
    got = generate(pipelines["none"], [None] * 5, range(5), 4, batch_size=3, callback=frames.append)
    assert len(frames) == 4 and all(frame.shape == (3, 3, 32, 32) for frame in frames), "of the first batch"
    near(frames[-1], got[:3])
    assert (frames[0] - got[:3]).abs().max() > 1e-2


# --- from images ---


def test_image_to_image(pipelines):
    """The last of the steps, from the noised image; strength=1 is all of them, from noise alone."""
    text, image = pipelines["text"], blobs()
    conditions, seeds, inputs = ["a", "b"], [3, 4], {"image": image}
    near(generate(text, conditions, seeds, 10, 2.0, inputs=inputs), generate(text, conditions, seeds, 10, 2.0), 0)
    known, errors = decode(text, encode(text, image)), []
    for strength, steps in ((0.01, 1), (0.34, 3), (0.96, 10)):
        got = generate(text, conditions, seeds, 10, 2.0, inputs=inputs, strength=strength)
        assert generate.evaluations == 2 * steps
        errors.append((got - known).square().mean())
    assert errors == sorted(errors)
    times, schedule = sample_times(10, text.schedule)[-4:], text.schedule
    x = schedule.alpha(times[:1]) * encode(text, image) + schedule.sigma(times[:1]) * randn((2, 3, 8, 8), seeded(seeds))
    cond, null = ({"context": text.denoiser.text(p)} for p in (conditions, ["", ""]))
    x = samplers["ddim"](make_denoiser(text.denoiser.unet, schedule, "v", cond, null, 2.0), x.float(), times, schedule)
    near(generate(text, conditions, seeds, 10, 2.0, inputs=inputs, strength=0.3), decode(text, x))


@pytest.mark.parametrize("sampler", samplers)
def test_masks_with_any_sampler(pipelines, sampler):
    none, args = pipelines["none"], ([None] * 2, [0, 1], 4, 1.0, sampler)
    image, mask = blobs(), left_half()
    got = generate(none, *args, inputs={"image": image, "mask": mask})
    assert torch.equal(got[..., 16:], image[..., 16:]), "exactly"
    assert (got - image)[..., :16].abs().mean() > 0.05
    assert (got - generate(none, *args))[..., :16].abs().max() > 1e-2, "what is known is seen"


def test_one_masked_pixel_frees_its_latent(pipelines):
    none, image, mask, frames = pipelines["none"], blobs(1), torch.zeros(1, 1, 32, 32), []
    mask[..., 5, 6] = 1
    got = generate(none, [None], [0], 2, inputs={"image": image, "mask": mask}, callback=frames.append)
    assert (got != image).any(1).sum() == 1
    change = (frames[-1] - decode(none, encode(none, image))).abs()
    assert change[..., 4:8, 4:8].mean() > max(1e-3, change[..., 28:, 28:].mean())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_inpainting_task(pipelines, calls, guidance):
    pipeline, image, mask = pipelines["inpaint"], blobs(), left_half()
    seen = calls(pipeline)

    def run(image, **more):
        return generate(pipeline, ["a", "b"], [0, 1], 3, guidance, inputs={"image": image, "mask": mask}, **more)

    got = run(image)
    assert torch.equal(got[..., 16:], image[..., 16:])
    concat = torch.cat([mask[..., ::4, ::4], encode(pipeline, torch.where(mask > 0, 0, image))], 1)  # the known pixels
    assert len(seen) == 3
    for call in seen:
        near(call["concat"], torch.cat([concat] * int(guidance)), 1e-6)
    other = blobs(seed=5)
    other[..., 16:] = image[..., 16:]  # what the mask hides is not used
    near(run(other), got)
    assert (run(other, strength=0.5) - got).abs().max() > 0.1


def test_super_resolution(pipelines, calls):
    pipeline, low = pipelines["sr"], blobs(3, 16)
    seen = calls(pipeline)
    got = generate(pipeline, [None] * 3, [5, 6, 7], 2, inputs={"low": low})
    assert got.shape == (3, 3, 32, 32)
    generators = seeded([5, 6, 7])
    randn((3, 3, 8, 8), generators)  # the noise of the latents comes first
    noisy = augment_low(low, torch.zeros(3, dtype=torch.long), randn(low.shape, generators))
    near(seen[0]["concat"], image_condition("sr", pipeline.vae, {"low": noisy}, (8, 8)), 1e-6)
    assert seen[0]["y"].tolist() == [0, 0, 0]
    near(generate(pipeline, [None] * 2, [6, 7], 2, inputs={"low": low[1:]}), got[1:])
    inputs = {"low": low, "level": torch.tensor([0, 9, 9])}
    noisier = generate(pipeline, [None] * 3, [5, 6, 7], 2, batch_size=2, inputs=inputs)
    assert seen[-1]["y"].tolist() == [9]
    near(noisier[0], got[0])
    assert (noisier[1] - got[1]).abs().max() > 1e-3
    assert generate(pipeline, [None], [0], 1, inputs={"low": blobs(1, 32)[..., :24, :]}).shape == (1, 3, 48, 64)


def test_semantic_maps(pipelines, calls):
    pipeline, generator = pipelines["semantic"], torch.Generator().manual_seed(0)
    maps = torch.randint(-1, 5, (2, 32, 32), generator=generator)
    seen = calls(pipeline)
    got = generate(pipeline, [None] * 2, [0, 0], 2, inputs={"map": maps})
    one_hot = torch.stack([(maps == k).float() for k in range(5)], dim=1)
    near(seen[0]["concat"], pipeline.denoiser.rescaler(one_hot), 1e-6)
    assert (got[0] - got[1]).abs().max() > 1e-2, "the map matters"


IMAGE, MASK = {"image": blobs(1)}, {"mask": left_half(1)}
WRONG_INPUTS = [
    ("inpaint", {}, "task=inpaint needs inputs"),
    ("inpaint", IMAGE, "task=inpaint needs inputs"),
    ("none", {"low": blobs(1)}, "task=none needs inputs {} and can use"),
    ("none", MASK, "task=none needs inputs {} and can use"),
    ("sr", IMAGE | {"low": blobs(1)}, "task=sr needs"),
    ("none", IMAGE | {"mask": left_half(1, 16)}, "inputs have several sizes"),
    ("none", {"image": blobs(2)}, "2 image for 1 images"),
]


def test_mistakes_of_callers(pipelines):
    mistakes = [(name, {"inputs": inputs}, message) for name, inputs, message in WRONG_INPUTS]
    mistakes += [("none", {"strength": 0.5}, r"strength=0.5 needs inputs\['image'\]")]
    mistakes += [("none", {"inputs": IMAGE, "strength": math.nan}, "strength=nan")]
    mistakes += [("none", {"sampler": "euler_b"}, "sampler must be one of .*ddim.* got 'euler_b'")]
    guides = pipelines["pixels"], pipelines["sr"], pipelines["none"]._replace(schedule=make_schedule("flow"))
    mistakes += [("none", {"guide": guide}, "the guide has other latents") for guide in guides]
    for name, options, message in mistakes:
        with pytest.raises(AssertionError, match=message):
            generate(pipelines[name], [None], [0], 1, **options)


# --- output ---


def test_images_and_grids(tmp_path):
    image = torch.tensor([-1.0, -9.0, 0.0, 1.0, 3.0, 0.5]).view(1, 2, 3).expand(3, 2, 3)
    assert np.array(to_pil(image))[..., 1].tolist() == [[0, 0, 128], [255, 255, 191]]
    noise = torch.rand(4, 24, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    gray, rgba = to_pil(noise[:1]), to_pil(noise)
    assert (gray.mode, rgba.mode, rgba.size) == ("L", "RGBA", (32, 24))
    on_white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    for image, shown in ((noise[:1], gray), (noise, on_white)):
        seen = make_grid(image[None]).crop((2, 2, 130, 98)).resize((32, 24), Image.Resampling.NEAREST)
        assert seen.mode == "RGB" and abs(np.array(seen).astype(int) - np.array(shown.convert("RGB"))).max() <= 1
    colors = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 24, 32)
    captions = ["a red star", "🌟 漢字 naïve", "", "long " * 40, "two\nlines"]
    settings = {"prompt": "🌟 naïve", "nested": {"ch_mult": [1, 2]}}
    save_png(tmp_path / "grid.png", make_grid(colors, captions), settings)
    with Image.open(tmp_path / "grid.png") as grid:
        assert json.loads(grid.text["settings"]) == settings
        pixels = np.array(grid)
    cell_w, cell_h = 4 * 32 + 4, 4 * 24 + 4 + 24  # enlarged four times, with two lines of caption
    assert pixels.shape == (2 * cell_h, 3 * cell_w, 3)
    for i, value in enumerate([0, 64, 128, 191, 255]):
        row, column = divmod(i, 3)
        cell = pixels[row * cell_h : (row + 1) * cell_h, column * cell_w : (column + 1) * cell_w]
        assert (cell[2:98, 2:130] == value).all() and (cell[:2] == 255).all() and (cell[:, :2] == 255).all()
        assert (cell[98:] < 128).any() == bool(captions[i]), "the caption is below"


# --- settings ---


def settings(*args):
    return configure(dict(vars(sample)), list(args))


def test_choose_classes(pipelines):
    def choose(cls):
        return sample.choose_conditions(pipelines["class"], settings(f"--cls={cls}"))

    assert [choose(cls) for cls in ("", "0", "3, cat ,2")] == [[0, 1, 2, 3], [0], [3, 0, 2]]
    assert choose("7") == [2] and choose("tench, Tinca") == [3], "a name goes before a number, and can have a comma"
    for cls in ("4", "0,-1", "bird", "²", "1.5", "1,"):
        with pytest.raises(UserError, match="is not a class of this checkpoint: cat, dog, 7, tench, Tinca"):
            choose(cls)


@pytest.mark.parametrize(
    "classes, numbers, cls, chosen, refused, known",
    [
        (["1", "3", "7", "10"], [1, 3, 7, 10], "7,10", [2, 3], "2", "1, 3, 7, 10"),
        (["007", "12", "3", "4"], [7, 12, 3, 4], "007,7", [0, 0], "0", "007, 12, 3, 4"),
        (["cat", "3", "7", "10"], [0, 1, 2, 3], "cat,3,0", [0, 1, 0], "4", "cat, 3, 7, 10"),
        ([], [0, 1, 2, 3], "3,0", [3, 0], "4", "0 to 3"),
        ([*"abcdefghijkl"], [*range(12)], "l", [11], "x", r"a, .*, j, ... \(12 in all\)"),
    ],
)
def test_a_number_is_one_class(pipelines, classes, numbers, cls, chosen, refused, known):
    """Where all classes are named by whole numbers, a number is that name; else it is a position."""
    pipeline = pipelines["class"]._replace(classes=classes, num_classes=len(numbers))
    assert pipeline.numbers == numbers
    assert sample.choose_conditions(pipeline, settings(f"--cls={cls}")) == chosen
    with pytest.raises(UserError, match=f"--cls={refused} is not a class of this checkpoint: {known}$"):
        sample.choose_conditions(pipeline, settings(f"--cls={refused}"))


def test_choose_prompts(pipelines, tmp_path, capsys):
    file, text = tmp_path / "prompts.txt", pipelines["text"]
    file.write_bytes("\ufeffa red star\r\n\n  \n  naïve 🌟  \r\na red star".encode())
    assert read_prompts(file) == ["a red star", "naïve 🌟", "a red star"]
    assert sample.choose_conditions(text, settings(f"--prompts={file}")) == read_prompts(file)
    assert sample.choose_conditions(text, settings()) == ["a red star", "a blue circle"]
    assert sample.choose_conditions(pipelines["none"], settings()) == [None] * 3
    assert capsys.readouterr().out == ""
    assert sample.choose_conditions(text, settings("--prompt=🌟 and far too long")) == ["🌟 and far too long"]
    assert capsys.readouterr().out == "prompt of 22 tokens cut to 16: 🌟 and far too long...\n"
    sample.choose_conditions(text, settings("--prompt=a", "--negative=dark, blurred and far too long"))
    assert capsys.readouterr().out == "prompt of 31 tokens cut to 16: dark, blurred and far too long...\n"
    for content in (b"\n \n\t\n", "naïve".encode("latin-1"), "a star".encode("utf-16")):
        file.write_bytes(content)
        with pytest.raises(UserError, match="prompts.txt: .*; give a file with one prompt per line"):
            read_prompts(file)
    with pytest.raises(UserError, match="nowhere.txt"):
        read_prompts(tmp_path / "nowhere.txt")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Images to start from, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)

    def save(name, pixels):
        Image.fromarray(pixels.astype(np.uint8)).save(name)

    for name, (W, H) in {"photo.png": (40, 32), "small.png": (16, 24), "odd.png": (45, 37)}.items():
        save(name, np.kron(rng.integers(0, 256, (-(-H // 8), -(-W // 8), 3)), np.ones((8, 8, 1)))[:H, :W])
    mask = np.pad(np.full((12, 26), 255), ((8, 12), (4, 10)))
    save("mask.png", mask)
    save("black.png", 0 * mask)
    save("seven.png", np.full((32, 32), 7))
    classes = Image.fromarray(rng.integers(0, 5, (32, 32)).astype(np.uint8), mode="P")
    classes.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tobytes())
    classes.save("map.png")
    for folder, sources in {
        "folder": ("photo.png", "photo.png"),
        "mixed": ("photo.png", "odd.png"),
        "empty": (),
    }.items():
        Path(folder).mkdir()
        for name, source in zip("ab", sources):
            Image.open(source).rotate(180 * (name == "a")).save(f"{folder}/{name}.png")
    Path("folder/notes.txt").write_text("no image")
    Path("bad.png").write_bytes(Path("photo.png").read_bytes()[:80])
    return tmp_path


PHOTO, FOLDER = "--init_image=photo.png", "--init_image=folder"


DO_NOT_FIT = [
    ("none", ["--prompt=a cat"], "--prompt=a cat has no effect here; it needs a checkpoint with text"),
    ("text", ["--cls=3"], "--cls=3 has no effect here; it needs a checkpoint with classes"),
    ("none", ["--guidance=2"], "--guidance=2.0 has no effect here"),
    ("text", ["--guidance_from=0.2", "--guidance=1"], "--guidance_from=0.2 has no effect here; it needs guidance"),
    ("text", ["--negative=x", "--guide_ckpt=y"], "--negative=x has no effect here; .* without --guide_ckpt"),
    ("text", ["--eta=1", "--sampler=heun"], "--eta=1.0 has no effect here; it needs another sampler: ddim, "),
    ("none", ["--tower_weights=x"], "it needs a checkpoint with a frozen text encoder"),
    ("none", ["--mask=mask.png"], "--mask=mask.png has no effect here; it needs --init_image"),
    ("sr", ["--init_image=small.png", "--strength=0.5"], "--strength=0.5 has no effect"),
    ("sr", ["--init_image=small.png", "--size=64"], "--size=.* has no effect"),
    ("sr", ["--init_image=small.png", "--noise_level=11"], "--noise_level=11 .* a level up to its sr_noise, 10"),
    ("none", ["--semantic_map=map.png"], "it needs a checkpoint with task=semantic"),
    ("semantic", [PHOTO], "--init_image=photo.png has no effect here"),
    ("semantic", [], r"this checkpoint \(task=semantic\) needs --semantic_map"),
    ("semantic", ["--semantic_map=photo.png"], "photo.png: mode RGB; give a PNG of one channel"),
    ("semantic", ["--semantic_map=seven.png"], "seven.png: has class 7; this checkpoint has 0 to 4"),
    ("inpaint", [PHOTO], r"this checkpoint \(task=inpaint\) needs --mask"),
    ("class", [PHOTO], "this checkpoint needs --cls"),
    ("none", [PHOTO, "--size=20"], "size=20 must be one or two multiples of 8"),
    ("none", ["--init_image=bad.png"], "bad.png: does not open as an image"),
    ("none", ["--init_image=empty"], "empty: no images in it"),
    ("pixels", ["--init_image=mixed"], "mixed: several sizes"),
    ("none", [PHOTO, "--mask=small.png"], r"small.png: is \(16, 24\), photo.png is \(40, 32\)"),
    ("none", [PHOTO, "--mask=black.png"], "black.png: is all black"),
]


@pytest.mark.parametrize("name", ["nomod:DiT", "examples.dit", "examples.dit:Foo", ":DiT", "examples.dit:torch"])
def test_denoiser_that_is_no_class(name):
    with pytest.raises(UserError, match=f"--denoiser={name}: (No module named 'nomod'|names no class); write MODULE"):
        sample.load_class(name)


@pytest.mark.parametrize("name, args, message", DO_NOT_FIT)
def test_settings_that_do_not_fit(pipelines, files, name, args, message):
    cfg = settings(*args)
    with pytest.raises(UserError, match=message) as caught:
        sample.check_settings(cfg, pipelines[name])
        sample.choose_inputs(pipelines[name], cfg)
    assert "\n" not in str(caught.value)


CHOSEN = [
    ("text", [PHOTO, "--prompt=a"], (32, 40), [("photo.png", "a")] * 4),
    ("text", ["--init_image=odd.png", "--n=1"], (32, 40), [("odd.png", "")]),
    ("text", ["--init_image=odd.png", "--n=1", "--size=16,24"], (16, 24), [("odd.png", "")]),
    ("class", [FOLDER, "--cls=0,2"], (32, 40), [(i, c) for i in ("a.png", "b.png") for c in (0, 2)]),
    ("none", ["--init_image=mixed", "--size=32"], (32, 32), [("a.png", None), ("b.png", None)]),
    ("inpaint", [PHOTO, "--mask=mask.png", "--prompt=x", "--n=1"], (32, 40), [("photo.png", "x")]),
    ("sr", ["--init_image=small.png", "--noise_level=9", "--n=1"], (24, 16), [("small.png", None)]),
    ("semantic", ["--semantic_map=map.png", "--n=1"], (32, 32), [("map.png", None)]),
    ("none", [], None, [(None, None)] * 3),
    ("none", ["--n=5"], None, [(None, None)] * 5),
    ("text", ["--prompt=a cat"], None, [(None, "a cat")] * 4),
    ("class", ["--cls=dog", "--n=3"], None, [(None, 1)] * 3),
]


@pytest.mark.parametrize("name, args, shape, rows", CHOSEN)
def test_conditions_seeds_and_inputs_of_the_settings(pipelines, files, name, args, shape, rows):
    cfg = settings("--seed=3", *args)
    conditions, seeds, names, inputs = sample.choose_inputs(pipelines[name], cfg)
    assert list(zip(names, conditions)) == rows and seeds == list(range(3, 3 + len(rows)))
    assert all(len(t) == len(rows) for t in inputs.values())
    assert {tuple(t.shape[-2:]) for key, t in inputs.items() if key != "level"} == ({shape} if shape else set())
    if name == "inpaint":
        assert inputs["mask"][0, 0, 8:20, 4:30].all() and inputs["mask"].sum() == 12 * 26
    if name == "sr":
        assert inputs["level"].tolist() == [9]
    if name == "semantic":
        assert torch.equal(inputs["map"][0], torch.from_numpy(np.array(Image.open("map.png")).astype(np.int64)))
    if rows == [("odd.png", "")] and shape == (32, 40):  # cropped in the middle would shift it
        assert np.array_equal(np.array(to_pil(inputs["image"][0])), np.array(Image.open("odd.png"))[:32, :40])


# --- the command ---


def records(folder):
    """samples.jsonl, the images, and the settings in each."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    images, configs = [], []
    for line in lines:
        with Image.open(folder / line["file"]) as image:
            stored = json.loads(image.text["settings"])
            assert stored.items() >= line.items()
            images.append(np.array(image).astype(int))
            configs.append(stored["config"])
    assert len(list(folder.glob("0*.png"))) == len(lines)
    return lines, images, configs


COMMAND = ("sample.py", "--device=cpu", "--steps=2")


def test_command_without_prompts_generates_the_examples(runs, pipelines, command):
    status, out, err = command(*COMMAND, f"--ckpt={runs['text'].path}")
    folder = Path(runs["text"].path) / "samples"
    assert (status, err) == (0, "")
    how = r"unipc, 2 steps, guidance 3, 4 network evaluations each"
    assert re.fullmatch(rf"2 images in [\d.]+ s \({how}\): {folder}/grid.png\n", out)
    lines, images, configs = records(folder)
    prompts = ("a red star", "a blue circle")
    assert lines == [{"file": f"0000{i}.png", "prompt": prompt, "seed": i} for i, prompt in enumerate(prompts)]
    expected = generate(pipelines["text"], prompts, [0, 1], 2, 3.0, "unipc")
    for got, image in zip(images, expected):
        assert abs(got - np.array(to_pil(image))).max() <= 1
    assert configs[0]["steps"] == 2 and configs[0]["guidance"] == 3.0 and configs[0]["sampler"] == "unipc"
    with Image.open(folder / "grid.png") as grid:
        assert json.loads(grid.text["settings"])["config"] == configs[0]


COMMANDS = [
    ("text", ["--prompt=b", "--n=1", "--dtype=bfloat16"], [("b", 0)]),
    ("class", ["--cls=dog", "--n=2", "--seed=5", "--sampler=ddim", "--eta=0.5"], [("dog", 5), ("dog", 6)]),
    ("none", ["--n=1", "--guide_ckpt=CKPT", "--guidance=2", "--decode_tile=8", "--size=32,64"], [("", 0)]),
    ("text", [PHOTO, "--n=1", "--prompt=b", "--mask=mask.png"], [("b", 0, "photo.png", 1.0)]),
    ("text", [PHOTO, "--n=1", "--prompt=b"], [("b", 0, "photo.png", 0.75)]),
    ("sr", ["--init_image=small.png", "--n=1"], [("", 0, "small.png", 1.0)]),
]


@pytest.mark.parametrize("name, args, expected", COMMANDS)
def test_command(runs, files, command, name, args, expected):
    args = [arg.replace("CKPT", runs[name].path) for arg in args]
    status, _, err = command(*COMMAND, f"--ckpt={runs[name].path}", "--out_dir=new/out", *args)
    assert (status, err) == (0, "")
    lines, images, _ = records(files / "new/out")
    keys = ("prompt", "seed", "from", "strength")
    assert [tuple(line[key] for key in keys if key in line) for line in lines] == expected
    if "mask" in args[-1]:
        known = np.array(Image.open("mask.png")) == 0
        assert np.array_equal(images[0][known], np.array(Image.open("photo.png"))[known])


def test_sampler_steps_and_guidance_are_the_checkpoints(runs, pipelines, command, tmp_path):
    """Those of training's sample grids, unless they are given."""
    tensors, meta = checkpoint.read(runs["text"].path)
    own = {"sampler": "ddim", "sample_steps": 3, "guidance": 1.5}
    checkpoint.write(f"{tmp_path}/a.safetensors", tensors, meta | {"config": meta["config"] | own})
    for args, sampler, steps, guidance in (([], "ddim", 3, 1.5), (["--steps=2", "--guidance=3"], "ddim", 2, 3.0)):
        status, out, err = command("sample.py", "--device=cpu", "--ckpt=a.safetensors", "--prompt=a", "--n=1", *args)
        assert (status, err) == (0, "") and f"({sampler}, {steps} steps, guidance {guidance:g}, " in out
        _, images, (config,) = records(tmp_path / "samples")
        assert (config["sampler"], config["steps"], config["guidance"]) == (sampler, steps, guidance)
        expected = generate(pipelines["text"], ["a"], [0], steps, guidance, sampler)
        assert abs(images[0] - np.array(to_pil(expected[0]))).max() <= 1
    assert load_pipeline("a.safetensors").sampling == {"sampler": "ddim", "steps": 3, "guidance": 1.5}


def test_a_second_call_into_the_same_folder(runs, command, tmp_path):
    """Replaces the first one's images and leaves what others put there, and refuses to overwrite that."""
    args = (*COMMAND, f"--ckpt={runs['none'].path}", "--out_dir=out")
    assert command(*args, "--n=3")[0] == 0
    for name in ("00002.png", "00007.png", "notes.txt"):
        (tmp_path / "out" / name).rename(tmp_path / "kept") if name == "00002.png" else None
        (tmp_path / "out" / name).write_text("mine")
    assert command(*args, "--n=2")[0] == 0
    assert sorted(os.listdir("out")) == [
        "00000.png",
        "00001.png",
        "00007.png",
        "grid.png",
        "notes.txt",
        "samples.jsonl",
    ]
    status, _, err = command(*args, "--n=8")
    assert (
        status == 1
        and err
        == "sample.py: out: its 00007.png is not from an earlier call and would be overwritten; set another --out_dir\n"
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other/grid.png").write_text("mine")
    assert "other: its grid.png is not from an earlier call" in command(*args, "--out_dir=other")[2]
    assert len(os.listdir("out")) == 6 and (tmp_path / "out/00007.png").read_text() == "mine"


def test_a_checkpoint_of_another_denoiser(runs, command, tmp_path):
    """Is not called damaged: neither where its settings do not fit UNet nor where its tensors do not."""
    tensors, meta = checkpoint.read(runs["none"].path)
    unet = {name: meta["model"]["unet"][name] for name in ("in_channels", "out_channels", "channels")}
    for settings, message in (
        (dict(width=64, depth=2), "its settings do not build a UNet"),
        (unet | {"norm_groups": 4}, "tensor .* is"),
        (unet | {"num_res_blocks": 900}, "num_res_blocks=900, but only"),
    ):
        model = meta["model"] | {"unet": settings}
        checkpoint.write(f"{tmp_path}/a.safetensors", tensors, meta | {"model": model})
        _, _, err = command(*COMMAND, "--ckpt=a.safetensors")
        need = r"; a denoiser of another class needs --denoiser=MODULE:CLASS \(unet_class= in Python\)\n"
        assert re.fullmatch(f"sample.py: a.safetensors: {message}.*{need}", err), err


def test_command_errors_are_one_line(runs, command, monkeypatch):
    ckpt, other = f"--ckpt={runs['class'].path}", runs["pixels"].path
    for args, status, message in (
        (["--ckpt=nowhere"], 1, "nowhere: no such checkpoint; .*"),
        ([ckpt, "--promt=a"], 2, "unknown setting 'promt': did you mean 'prompt'.*"),
        ([ckpt, f"--guide_ckpt={other}"], 1, ".*: has other latents, noise or conditions; .*"),
    ):
        got = command(*COMMAND, *args)
        assert got[:2] == (status, "") and re.fullmatch(f"sample.py: {message}\n", got[2]), got
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(*COMMAND, ckpt)[2] == "sample.py: sample.py runs in one process; for torchrun see fid.py\n"
