"""What convert.py writes for others: diffusers opens it and draws the same; CompVis' names are theirs."""

import json
import runpy
import sys
import types

import helpers
import numpy as np
import pytest
import torch
from conftest import ROOT, fill
from safetensors.torch import load_file, save_file

import convert
import diffusion
import sample
import train_ldm
import train_vae
from diffusion import Schedule
from text import CLIPTextEncoder, TextEncoder
from unet import Denoiser, Rescaler, UNet
from vae import VAE

TINY = b"#version: 0.2\nl o\nlo w</w>\n! !</w>\n"  # merges of a CLIP tokenizer of 517 tokens
TOWER = dict(layers=3, length=12, vocab=517)  # heads of 64 channels, as all towers have
TOWERS = {"clip_l": TOWER | dict(width=64, heads=1, activation="quick_gelu", layer="last", pad="end")}
TOWERS["openclip_h"] = TOWER | dict(width=128, heads=2, activation="gelu", layer="penultimate", pad="zero")

KL = dict(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=3, norm_groups=4)
VQ = KL | dict(bottleneck="vq", codebook_size=32)
PLAIN = dict(in_channels=3, out_channels=3, channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_ds=(2,))
PLAIN |= dict(norm_groups=4, num_heads=0, head_dim=8, transformer_depth=0)
LISTENS = PLAIN | dict(transformer_depth=1, context_dim=32)


@pytest.fixture(scope="session")
def diffusers():
    """It imports torchvision, which may have been built for another torch than this one."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pytest.skip("no torchvision: pip install -r requirements.txt")
    except RuntimeError:  # "operator torchvision::nms does not exist": nothing here needs its compiled part
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def make_vae(mean=(0.3, -0.2, 0.1), std=(0.5, 1.0, 1.7), **settings):
    vae = fill(VAE(**KL | settings)).requires_grad_(False).eval()
    C = vae.latent_channels
    vae.latent_mean.copy_(torch.tensor(mean).repeat(C)[:C])
    vae.latent_std.copy_(torch.tensor(std).repeat(C)[:C])
    return vae


def save_vae(folder, vae):
    """A checkpoint of stage 1; returns its path."""
    file = f"{folder}/vae.safetensors"
    meta = {"format": 1, "stage": "vae", "model": vae.settings, "config": {"image_size": 16}}
    train_vae.save_checkpoint(file, train_vae.with_prefix("ema", vae.state_dict()), meta)
    return file


def save_ldm(folder, vae, unet, cond="none", tower=None, denoiser=None, **model):
    """A checkpoint of stage 2; returns its path. model: settings of the checkpoint's own, as train_ldm.py has them."""
    denoiser = denoiser or Denoiser(unet)
    tensors = train_ldm.with_prefix("ema", denoiser.state_dict())
    tensors |= train_ldm.with_prefix("vae", vae.state_dict()) if vae else {}
    settings = {"unet": denoiser.unet.settings, "text": denoiser.text and denoiser.text.settings, "cond": cond}
    settings |= {"first_stage": "vae" if vae else "none", "num_classes": 3, "image_size": 16 if vae else 8}
    settings |= {"objective": "v", "schedule": "cosine", "beta_start": 0.00085, "beta_end": 0.012, "zero_snr": False}
    settings |= {"class_embed": "add", "text_encoder": "joint", "tower_hash": None, "task": "none"}
    config = {"tower_weights": "", "clip_vocab": ""}
    if tower is not None:
        config = {"tower_weights": f"{folder}/tower.safetensors", "clip_vocab": f"{folder}/merges.txt"}
        settings["tower_hash"] = convert.hash_weights(tower)
        save_file(tower.state_dict(), config["tower_weights"])
        (folder / "merges.txt").write_bytes(TINY)
    if denoiser.text is not None:
        tensors["text.bpe"] = torch.tensor(list(denoiser.text.bpe()), dtype=torch.uint8)
    meta = {"format": 1, "stage": "ldm", "model": settings | model, "vae": vae and vae.settings, "shown": [None]}
    meta |= {"classes": [], "config": config, "step": 1}
    train_ldm.save_checkpoint(f"{folder}/ldm.safetensors", tensors, meta)
    return f"{folder}/ldm.safetensors"


def make_unet(settings, **more):
    return fill(UNet(**settings | more)).requires_grad_(False).eval()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def in_unit_range(pictures):
    """As diffusers' pipelines give them: (N,H,W,3) in [0,1]."""
    return (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


# --- the autoencoder ---


@pytest.mark.parametrize(
    "settings",
    [{}, dict(latent_proj=False), dict(mid_attention=False, ch_mult=(1, 2, 2), num_res_blocks=2)],
    ids=["kl", "no projections", "no attention"],
)
def test_autoencoder_in_diffusers(settings, diffusers, tmp_path):
    vae, x = make_vae(**settings), noise(2, 3, 16, 24).clamp(-1, 1)
    words = convert.to_diffusers(save_vae(tmp_path, vae), f"{tmp_path}/out")
    assert words == "components, no pipeline: vae (AutoencoderKL); it is an autoencoder alone"
    theirs = diffusers.AutoencoderKL.from_pretrained(f"{tmp_path}/out", subfolder="vae")
    assert theirs.config.scaling_factor == 1 and theirs.config.sample_size == 16
    ours, std = vae.encode(x), vae.latent_std.view(1, -1, 1, 1)
    with torch.no_grad():
        got = theirs.encode(x).latent_dist
        near(got.mean, vae.normalize(ours.mean))
        near(got.std, ours.std / std)
        near(theirs.decode(got.mean).sample, vae.decode(ours.mean))
    assert vae.decode(ours.mean).std() > 0.1


@pytest.mark.parametrize("settings", [{}, dict(embed_dim=5), dict(latent_proj=False)])
def test_vq_in_diffusers(settings, diffusers, tmp_path):
    """One deviation and any means: the codes move along. Every code is used, so a wrong distance would show."""
    vae, x = make_vae(std=(0.7,), **VQ | settings), noise(2, 3, 64, 64)
    vae.quantize.embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    convert.to_diffusers(save_vae(tmp_path, vae), f"{tmp_path}/out")
    theirs = diffusers.VQModel.from_pretrained(f"{tmp_path}/out", subfolder="vae")
    z = vae.encode(x).mean
    with torch.no_grad():
        near(theirs.encode(x).latents, vae.normalize(z))
        drawn = noise(2, vae.latent_channels, 16, 16)
        near(theirs.decode(drawn).sample, vae.decode(vae.denormalize(drawn)))
    assert len(vae.quantize.nearest(vae.denormalize(drawn)).unique()) > 20


@pytest.mark.parametrize("settings", [KL, VQ], ids=["kl", "vq"])
def test_one_deviation_and_no_means_leave_the_weights_alone(settings, tmp_path):
    vae = make_vae(mean=(0.0,), std=(1 / 0.18215,), **settings)
    convert.to_diffusers(save_vae(tmp_path, vae), f"{tmp_path}/out")
    config = json.loads((tmp_path / "out/vae/config.json").read_text())
    assert config["scaling_factor"] == pytest.approx(0.18215, rel=1e-6)
    assert torch.equal(torch.tensor(1 / config["scaling_factor"]), vae.latent_std[0])
    back = convert.to_ours(
        load_file(tmp_path / "out/vae/diffusion_pytorch_model.safetensors"), convert.vae_keys(vae.settings, "diffusers")
    )
    ours = {name: t for name, t in vae.state_dict().items() if not name.startswith("latent_")}
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)


def test_logvar_is_folded_in_nats():
    """log N(mean / s, std / s): the log-variance falls by 2 ln s; by hand for a projection that is the identity."""
    tensors = convert.identity_projections(2, 2)
    got, scalar = convert.fold_statistics(tensors, torch.tensor([1.0, -2.0]), torch.tensor([2.0, 4.0]))
    assert scalar == 1
    near(got["quant_conv.weight"][:, :, 0, 0], torch.diag(torch.tensor([0.5, 0.25, 1.0, 1.0])))
    near(got["quant_conv.bias"], torch.tensor([-0.5, 0.5, -1.3862944, -2.7725887]))
    near(got["post_quant_conv.weight"][:, :, 0, 0], torch.diag(torch.tensor([2.0, 4.0])))
    near(got["post_quant_conv.bias"], torch.tensor([1.0, -2.0]))
    assert tensors["quant_conv.bias"].abs().max() == 0, "what is given stays as it is"


# --- the U-Net and the scheduler ---


@pytest.mark.parametrize(
    "settings",
    [
        LISTENS | dict(linear_proj=True, num_classes=4),
        LISTENS
        | dict(num_heads=2, head_dim=0, transformer_depth=2, num_res_blocks=(1, 2), self_attention=(True, False)),
        LISTENS | dict(context_dim=0, scale_shift=True),
        PLAIN | dict(num_classes=4, concat_channels=2),
        PLAIN | dict(num_heads=1, head_dim=0, attention_ds=(1, 2), resblock_updown=True, scale_shift=True),
        PLAIN | dict(num_heads=4, head_dim=0, middle_attention=False),
    ],
)
@pytest.mark.parametrize("schedule", ["cosine", "scaled_linear"])
def test_unet_in_diffusers(settings, schedule, diffusers, tmp_path):
    unet = make_unet(settings)
    cond, text = ("class" if settings.get("num_classes") else "none"), None
    convert.to_diffusers(save_ldm(tmp_path, make_vae(), unet, cond, text, schedule=schedule), f"{tmp_path}/out")
    kind = "UNet2DConditionModel" if settings["transformer_depth"] else "UNet2DModel"
    theirs = getattr(diffusers, kind).from_pretrained(f"{tmp_path}/out", subfolder="unet")
    s, x, index = unet.settings, noise(2, 3, 8, 8), torch.tensor([0, 733])
    ours, given, seen = {}, {}, x
    if s["num_classes"]:
        ours["y"] = given["class_labels"] = torch.tensor([1, 3])
    if s["context_dim"]:
        ours["context"] = given["encoder_hidden_states"] = noise(2, 5, 32)
    elif s["transformer_depth"]:
        given["encoder_hidden_states"] = None
    if s["concat_channels"]:
        ours["concat"] = noise(2, 2, 8, 8)
        seen = torch.cat([x, ours["concat"]], dim=1)
    with torch.no_grad():
        expected = unet(x, index.float() + (schedule == "cosine"), **ours)
        near(theirs(seen, index, **given).sample, expected)
    assert expected.std() > 0.1


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "schedule", ["linear", "scaled_linear", "quadratic", "sqrt", "sigmoid", "squared_cosine", "cosine"]
)
def test_the_schedulers_table_is_ours(schedule, zero_snr, diffusers):
    if schedule == "cosine" and zero_snr:
        return  # ends there by itself
    model = dict(schedule=schedule, beta_start=0.00085, beta_end=0.012, zero_snr=zero_snr, objective="v")
    config = json.loads(json.dumps(convert.scheduler_config(model)))
    theirs = diffusers.DDIMScheduler.from_config(config)
    process = sample.make_schedule(schedule, zero_snr=zero_snr)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    near(theirs.alphas_cumprod.double().sqrt(), process.alpha(t))
    near((1 - theirs.alphas_cumprod.double()).sqrt(), process.sigma(t), atol=5e-5)
    if not zero_snr:  # and it is known again
        name = {"quadratic": "scaled_linear"}.get(schedule, schedule)
        betas = convert.betas_of(convert.table_of(model)[0])
        for table in (betas, betas.float().double()):
            found = convert.schedule_of(table)
            assert found == {"schedule": name, "beta_start": 0.00085, "beta_end": 0.012}
        assert convert.schedule_of(betas.flip(0)) is None and convert.schedule_of(betas[:999]) is None
    assert (theirs.alphas_cumprod[-1] == 0) == (zero_snr or schedule == "cosine")


# --- whole pipelines ---


def draw(file, conditions, steps, cfg=1.0):
    """Our pictures in DDIM steps from the latents of seeds 7, 8, ..., as diffusers' pipelines give theirs.

    From those very latents: `generate` would make them as noisy as the schedule is at its end, diffusers does not.
    """
    pipeline = sample.load_pipeline(file)
    denoise = sample.guided(pipeline, conditions, {}, cfg)
    times = sample.sample_times(steps, pipeline.schedule, pipeline.objective, "trailing")
    x = torch.stack([noise(*pipeline.latent_shape, seed=7 + i) for i in range(len(conditions))])
    x = sample.samplers["ddim"](denoise, x, times, pipeline.schedule)
    return in_unit_range(sample.finish(pipeline, x))


@pytest.mark.parametrize(
    "process",
    [
        dict(),
        dict(objective="eps", schedule="scaled_linear"),
        dict(objective="v", schedule="scaled_linear", zero_snr=True),
        dict(objective="x0", schedule="squared_cosine"),
        dict(objective="v", schedule="sigmoid"),
    ],
    ids=str,
)
@pytest.mark.parametrize("bottleneck", ["kl", "vq"])
def test_unconditional_pipeline_draws_the_same(process, bottleneck, diffusers, tmp_path):
    if bottleneck == "vq" and process:
        return  # once is enough
    vae = make_vae() if bottleneck == "kl" else make_vae(std=(0.7,), **VQ)
    file = save_ldm(tmp_path, vae, make_unet(PLAIN), **process)
    words = convert.to_diffusers(file, f"{tmp_path}/out")
    assert words == f'LDMPipeline: DiffusionPipeline.from_pretrained("{tmp_path}/out") opens it'
    theirs = diffusers.DiffusionPipeline.from_pretrained(f"{tmp_path}/out")
    assert type(theirs).__name__ == "LDMPipeline"
    theirs.set_progress_bar_config(disable=True)
    for steps in (1, 10):
        expected = draw(file, [None], steps)
        got = theirs(1, torch.Generator().manual_seed(7), num_inference_steps=steps, output_type="np").images
        near(torch.from_numpy(got), expected, atol=1e-3)
    assert expected.std() > 0.05


def test_a_trained_model_draws_the_same(diffusers, start, tmp_path):
    """As train_ldm.py leaves it, with all its settings."""
    args = ("--cond=none", "--transformer_depth=0", "--objective=v", "--schedule=cosine")
    run = start("ldm", *args, "--max_steps=2", "--n_samples=1").finish()
    convert.to_diffusers(convert.find_checkpoint(str(run.out)), f"{tmp_path}/out")
    theirs = diffusers.DiffusionPipeline.from_pretrained(f"{tmp_path}/out")
    theirs.set_progress_bar_config(disable=True)
    given = dict(generator=torch.Generator().manual_seed(7), num_inference_steps=10, output_type="np")
    near(torch.from_numpy(theirs(1, **given).images), draw(str(run.out), [None], 10), atol=1e-3)


@pytest.mark.parametrize("name", ["clip_l", "openclip_h"])
def test_text_pipeline_draws_the_same(name, diffusers, tmp_path, monkeypatch):
    monkeypatch.setattr(CLIPTextEncoder, "towers", TOWERS)
    tower = fill(CLIPTextEncoder.named(name, TINY)).eval()
    process = dict(objective="eps", schedule="scaled_linear") if name == "clip_l" else {}
    file = save_ldm(
        tmp_path, make_vae(), make_unet(LISTENS, context_dim=tower.width), "text", tower, text_encoder=name, **process
    )
    words = convert.to_diffusers(file, f"{tmp_path}/out")
    assert words == f'StableDiffusionPipeline: DiffusionPipeline.from_pretrained("{tmp_path}/out") opens it'
    theirs = diffusers.DiffusionPipeline.from_pretrained(f"{tmp_path}/out", local_files_only=True)
    assert type(theirs).__name__ == "StableDiffusionPipeline" and theirs.safety_checker is None
    theirs.set_progress_bar_config(disable=True)
    prompts = ["low low!! Slow", "a lower owl " * 9, ""]
    tokens = theirs.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert tokens.tolist() == tower.tokenize(prompts).tolist() and theirs.tokenizer.model_max_length == 12
    with torch.no_grad():
        near(theirs.text_encoder(tokens)[0], tower(prompts))
        expected = draw(file, prompts, 10, cfg=3.0)
        latents = torch.stack([noise(3, 8, 8, seed=7 + i) for i in range(3)])
        given = dict(num_inference_steps=10, guidance_scale=3.0, height=16, width=16, output_type="np")
        got = theirs(prompts, latents=latents, **given).images
    near(torch.from_numpy(np.asarray(got)), expected, atol=1e-3)
    assert expected.std() > 0.05 and (expected[0] - expected[2]).abs().max() > 0.01, "the prompts matter"


@pytest.mark.parametrize(
    "cond, words",
    [
        ("class", "no pipeline takes classes so; class_labels=3 is the empty condition"),
        ("text", "the text encoder was trained here and stays here"),
        ("inpaint", "no pipeline knows task=inpaint as it was trained here"),
        ("transformers", "LDMPipeline takes plain attention, transformer_depth=0"),
        ("vq", "StableDiffusionPipeline takes no VQ"),
        ("pixels", "no pipeline of this kind draws pixels"),
    ],
)
def test_other_models_become_components(cond, words, diffusers, tmp_path, monkeypatch):
    monkeypatch.setattr(CLIPTextEncoder, "towers", TOWERS)
    vae = None if cond == "pixels" else make_vae(std=(0.7,), **VQ) if cond == "vq" else make_vae()
    plain, options = cond in ("class", "inpaint", "pixels"), {}
    more = dict(num_classes=4) if cond == "class" else dict(concat_channels=4) if cond == "inpaint" else {}
    more = {"transformers": dict(context_dim=0), "vq": dict(context_dim=64)}.get(cond, more)
    unet = make_unet(PLAIN if plain else LISTENS, **more)
    if cond == "text":
        options = dict(denoiser=Denoiser(unet, TextEncoder(32, 1, 2, 8)))
    elif cond == "vq":
        options = dict(tower=fill(CLIPTextEncoder.named("clip_l", TINY)), text_encoder="clip_l")
    told = {"vq": "text", "text": "text", "class": "class"}.get(cond, "none")
    options |= dict(task="inpaint") if cond == "inpaint" else {}
    got = convert.to_diffusers(save_ldm(tmp_path, vae, unet, told, **options), f"{tmp_path}/out")
    kinds = {"vae": "VQModel" if cond == "vq" else "AutoencoderKL", "scheduler": "DDIMScheduler"}
    kinds["unet"] = "UNet2DModel" if plain else "UNet2DConditionModel"
    parts = ["unet", "scheduler"] if cond == "pixels" else ["vae", "unet", "scheduler"]
    assert got == f"components, no pipeline: {', '.join(f'{p} ({kinds[p]})' for p in parts)}; {words}"
    assert not (tmp_path / "out/model_index.json").exists()
    for name in parts:
        getattr(diffusers, kinds[name]).from_pretrained(f"{tmp_path}/out", subfolder=name)


def test_classes_by_hand_from_components(diffusers, tmp_path):
    """What the README tells to write: guided DDIM steps from the three components."""
    file = save_ldm(tmp_path, make_vae(), make_unet(PLAIN, num_classes=4), "class")
    convert.to_diffusers(file, f"{tmp_path}/out")
    vae = diffusers.AutoencoderKL.from_pretrained(f"{tmp_path}/out", subfolder="vae")
    unet = diffusers.UNet2DModel.from_pretrained(f"{tmp_path}/out", subfolder="unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(f"{tmp_path}/out", subfolder="scheduler")
    x, empty = torch.stack([noise(3, 8, 8, seed=7 + i) for i in range(2)]), unet.config.num_class_embeds - 1
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            a, b = (unet(x, t, class_labels=torch.tensor(y)).sample for y in ([0, 2], [empty, empty]))
            x = scheduler.step(b + 2.0 * (a - b), t, x).prev_sample
        got = in_unit_range(vae.decode(x / vae.config.scaling_factor).sample)
    near(got, draw(file, [0, 2], 10, cfg=2.0), atol=1e-3)


# --- what is refused ---


@pytest.mark.parametrize(
    "vae, unet, model, to, words",
    [
        (dict(activation="swiglu"), {}, {}, "both", "activation=swiglu"),
        (dict(downsample="avg"), {}, {}, "both", "downsample=avg or max"),
        (dict(upsample="bilinear"), {}, {}, "both", "upsample=bilinear or bicubic"),
        (dict(linear_attention=True), {}, {}, "both", "the autoencoder's linear_attention"),
        (dict(patch_size=2, ch_mult=(1,)), {}, {}, "both", "patch stem"),
        (dict(attn_resolutions=(16,), resolution=32), {}, {}, "diffusers", "attention in the autoencoder's levels"),
        (dict(tanh_out=True), {}, {}, "diffusers", "tanh_out"),
        (dict(embed_dim=5), {}, {}, "diffusers", "embed_dim != z_channels"),
        ({}, dict(in_channels=3), {}, "compvis", "norm_groups, which are 32 there; the U-Net's norm_groups"),
        ({}, dict(unet_patch=2), {}, "both", "unet_patch"),
        ({}, LISTENS | dict(context_pool=True), {}, "both", "context_pool"),
        ({}, dict(qk_norm=True), {}, "both", "qk_norm"),
        ({}, dict(linear_attention=True), {}, "both", "the U-Net's linear_attention"),
        ({}, dict(resample="pool"), {}, "diffusers", "resample=pool"),
        ({}, LISTENS | dict(resblock_updown=True), {}, "diffusers", "resblock_updown with transformers"),
        ({}, LISTENS | dict(middle_attention=False), {}, "diffusers", "transformers, but none in the middle"),
        ({}, dict(num_res_blocks=(1, 2)), {}, "diffusers", "num_res_blocks by level"),
        ({}, dict(attention_ds=(1, 2), num_heads=2, head_dim=0), {}, "diffusers", "num_heads > 1 on several widths"),
        ({}, LISTENS | dict(context_dim=0), {}, "compvis", "transformers without a context"),
        ({}, dict(middle_attention=False), {}, "compvis", "middle_attention=False"),
        ({}, {}, dict(objective="flow", schedule="cosine"), "both", "objective=flow"),
        ({}, {}, dict(schedule="flow"), "both", "schedule=flow, where"),
        ({}, {}, dict(objective="eps"), "both", "objective=eps on schedule=cosine"),
        ({}, {}, dict(cond="class", class_embed="token"), "diffusers", "class_embed=token"),
        ({}, {}, dict(task="semantic"), "diffusers", "task=semantic"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(vae, unet, model, to, words):
    vae = VAE(**KL | vae).settings
    ends = dict(beta_start=0.00085, beta_end=0.012)
    model = dict(cond="none", objective="v", schedule="cosine", unet=UNet(**PLAIN | unet).settings) | ends | model
    for layout in ("diffusers", "compvis"):
        if to in ("both", layout):
            with pytest.raises(ValueError, match=f"run cannot become {layout}, which has no place for ") as error:
                convert.check_expressible("run", layout, vae, model)
            assert words in str(error.value)
        else:  # the other one can, but for its groups of 32
            try:
                convert.check_expressible("run", layout, vae, model)
            except ValueError as e:
                assert words not in str(e)


def test_schedules_and_objectives_of_ones_own(monkeypatch):
    """They are judged by what they are: others know tables where alpha^2 + sigma^2 is 1, and eps, v and x0."""
    own = {"bent": Schedule("bent", lambda t: 1 - t**2, lambda t: t, 0)}
    own |= {"root": Schedule("root", lambda t: (1 - t) ** 0.5, lambda t: t**0.5, 0)}
    monkeypatch.setattr(diffusion, "make_schedule", lambda name, *ends, **more: own[name])
    model = dict(cond="none", beta_start=0.00085, beta_end=0.012, unet=UNet(**PLAIN).settings)
    for schedule, objective, words in (
        ("bent", "v", "schedule=bent, where alpha"),
        ("root", "eps", "objective=eps on schedule=root, which starts at t = 0.995"),
        ("root", "lean", "objective=lean"),
    ):
        with pytest.raises(ValueError, match=f"has no place for {words}"):
            convert.check_expressible("run", "diffusers", None, model | dict(schedule=schedule, objective=objective))
    convert.check_expressible("run", "diffusers", None, model | dict(schedule="root", objective="v"))


def test_what_is_refused_leaves_nothing_behind(tmp_path):
    file = save_ldm(tmp_path, make_vae(), make_unet(PLAIN), objective="flow", schedule="flow")
    with pytest.raises(ValueError, match="which has no place for objective=flow; schedule=flow"):
        convert.to_diffusers(file, f"{tmp_path}/out")
    with pytest.raises(ValueError, match="VQ latents with a std for each channel: scaled by it, another code"):
        convert.to_diffusers(save_vae(tmp_path, make_vae(**VQ)), f"{tmp_path}/out")
    with pytest.raises(ValueError, match="no latent statistics: run train_vae.py with --measure_latents"):
        convert.to_diffusers(save_vae(tmp_path, make_vae(std=(float("nan"),))), f"{tmp_path}/out")
    with pytest.raises(ValueError, match="is an autoencoder: ema_std, tower_weights and clip_vocab are not for it"):
        convert.to_compvis(save_vae(tmp_path, make_vae()), f"{tmp_path}/out.safetensors", ema_std=0.1)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.safetensors").exists()


# --- there and back ---


def same_vae(got, vae):
    x = noise(1, 3, 16, 16).clamp(-1, 1)
    near(got.normalize(got.encode(x).mean), vae.normalize(vae.encode(x).mean))
    x0 = noise(1, vae.latent_channels, 8, 8)
    near(got.decode(got.denormalize(x0)), vae.decode(vae.denormalize(x0)))
    return True


@pytest.mark.parametrize("settings", [KL, KL | dict(latent_proj=False), VQ], ids=["kl", "no projections", "vq"])
@pytest.mark.parametrize("one", [False, True])
def test_autoencoder_there_and_back(settings, one, tmp_path):
    vae = make_vae(
        (0.0,) if one else (0.3, -0.2, 0.1), (1.7,) if one or "codebook_size" in settings else (0.5, 1, 1.7), **settings
    )
    convert.to_diffusers(save_vae(tmp_path, vae), f"{tmp_path}/out")
    back = VAE.from_pretrained(f"{tmp_path}/out/vae")
    assert same_vae(back, vae)
    if one:
        state = back.state_dict()
        assert all(torch.equal(state[name], t) for name, t in vae.state_dict().items())
        assert torch.equal(back.decode(noise(1, 3, 8, 8)), vae.decode(noise(1, 3, 8, 8)))


@pytest.mark.parametrize("kind", ["none", "clip_l", "openclip_h"])
def test_pipeline_there_and_back(kind, tmp_path, monkeypatch):
    """The whole denoiser draws the same: schedule, objective, tower, statistics."""
    monkeypatch.setattr(CLIPTextEncoder, "towers", TOWERS)
    tower = fill(CLIPTextEncoder.named(kind, TINY)).eval() if kind in TOWERS else None
    process = dict(objective="x0", schedule="sigmoid") if kind == "openclip_h" else {}
    vae, unet = make_vae(), make_unet(LISTENS | dict(context_dim=tower.width) if tower else PLAIN)
    file = save_ldm(
        tmp_path, vae, unet, "text" if tower else "none", tower, text_encoder=kind if tower else "joint", **process
    )
    convert.to_diffusers(file, f"{tmp_path}/out")
    denoiser, back, listener, meta = convert.load_foreign(f"{tmp_path}/out")
    ours = convert.read_checkpoint(file)[1]["model"]
    same = ("objective", "schedule", "beta_start", "beta_end", "zero_snr", "cond", "task", "image_size")
    assert {name: meta["model"][name] for name in same} == {name: ours[name] for name in same}
    assert same_vae(back, vae)
    context = {}
    if tower:
        prompts = ["low low! Slow", ""]
        assert listener.settings == tower.settings and torch.equal(listener(prompts), tower(prompts))
        context = {"context": tower(prompts)}
    args = noise(2, 3, 8, 8), torch.tensor([1000.0, 20.0])
    near(denoiser.unet(*args, **context), unet(*args, **context))
    prompts, cfg = (["low low! Slow", ""], 3.0) if tower else ([None], 1.0)
    near(draw(f"{tmp_path}/out", prompts, 5, cfg), draw(file, prompts, 5, cfg), atol=1e-3)


def test_levels_without_attention_do_not_count_for_the_heads(diffusers, tmp_path):
    """Heads of 16 beside a level of 24 channels without any: there it says 1, for 8 channels 0, which mean nothing."""
    for ch, mults in ((24, (1, 2)), (8, (1, 4))):
        unet = make_unet(LISTENS | dict(channels=ch, channel_mult=mults, attention_ds=(2,), head_dim=16))
        folder = tmp_path / str(ch)
        folder.mkdir()
        convert.to_diffusers(save_ldm(folder, make_vae(), unet), f"{folder}/out")
        back = UNet.from_pretrained(f"{folder}/out/unet")
        theirs = diffusers.UNet2DConditionModel.from_pretrained(f"{folder}/out/unet")
        x, t, context = noise(2, 3, 8, 8), torch.tensor([999.0, 20.0]), noise(2, 12, 32)
        near(back(x, t, context), theirs(x, t, context).sample)
        near(back(x, t, context), unet(x, t + 1, context))  # cosine: its clock is set back by one


def test_a_tower_that_training_named_by_its_hugging_face_id(tmp_path, monkeypatch):
    monkeypatch.setattr(CLIPTextEncoder, "towers", TOWERS)
    tower = fill(CLIPTextEncoder.named("clip_l", TINY)).eval()
    file = save_ldm(
        tmp_path, make_vae(), make_unet(LISTENS | dict(context_dim=64)), "text", tower, text_encoder="clip_l"
    )
    convert.to_diffusers(file, f"{tmp_path}/out")
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, **options: {"some/tower": f"{tmp_path}/out/text_encoder"}[name]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    found = convert.load_tower(file, "some/tower", f"{tmp_path}/merges.txt")
    assert convert.hash_weights(found) == convert.hash_weights(tower)
    with pytest.raises(ValueError, match="listens to clip_l, whose weights are not at nowhere: set tower_weights=FILE"):
        convert.load_tower(file, "nowhere")


@pytest.mark.parametrize("name", ["clip_l", "openclip_h"])
def test_a_towers_file_without_its_config(name, tmp_path, monkeypatch):
    """What its names and widths are of is a published tower, in transformers' names too."""
    monkeypatch.setattr(CLIPTextEncoder, "towers", TOWERS)
    tower = fill(CLIPTextEncoder.named(name, TINY)).eval()
    theirs = convert.to_theirs(tower.state_dict(), convert.text_keys(len(tower.blocks), "transformers"))
    save_file({f"text_model.{key}": t.contiguous() for key, t in theirs.items()}, tmp_path / "tower.safetensors")
    for told in ("", name):
        back = CLIPTextEncoder.from_pretrained(str(tmp_path / "tower.safetensors"), name=told, merges=TINY)
        assert back.settings == tower.settings and torch.equal(back(["low low! Slow"]), tower(["low low! Slow"]))


# --- CompVis' file ---

WIDE_VAE = dict(ch=32, norm_groups=32)
WIDE = dict(channels=32, norm_groups=32, head_dim=16)


def names_of(pattern):
    """Names from lines of PREFIX: NAME NAME ...; every NAME is a weight and a bias."""
    out = set()
    for line in pattern.split():
        prefix, _, names = line.partition(":")
        for name in names.split(","):
            out |= {f"{prefix}.{name}.{kind}".replace("..", ".").removeprefix(".") for kind in ("weight", "bias")}
    return out


def test_compvis_names(tmp_path):
    """Spelled out by hand: an autoencoder of two levels, a U-Net with attention below."""
    vae, unet = make_vae(**WIDE_VAE), make_unet(PLAIN, **WIDE)
    words = convert.to_compvis(save_ldm(tmp_path, vae, unet), f"{tmp_path}/out/model.safetensors")
    assert (
        words
        == f"{tmp_path}/out/model.safetensors: the autoencoder, scale_factor 1, the U-Net, its table of 1000 betas"
        "; not in the file: objective=v, head_dim=16"
    )
    block, res = "norm1,conv1,norm2,conv2", "in_layers.0,in_layers.2,emb_layers.1,out_layers.0,out_layers.3"
    first = f"""quant_conv: post_quant_conv: encoder:conv_in,norm_out,conv_out decoder:conv_in,norm_out,conv_out
        encoder.down.0.block.0:{block} encoder.down.0:downsample.conv encoder.down.1.block.0:{block},nin_shortcut
        decoder.up.1.block.0:{block} decoder.up.1.block.1:{block} decoder.up.1:upsample.conv
        decoder.up.0.block.0:{block},nin_shortcut decoder.up.0.block.1:{block}"""
    for half in ("encoder", "decoder"):
        first += f" {half}.mid.block_1:{block} {half}.mid.block_2:{block} {half}.mid.attn_1:norm,q,k,v,proj_out"
    plain = "norm,qkv,proj_out"
    second = f"""time_embed:0,2 input_blocks.0:0 input_blocks.1.0:{res} input_blocks.2.0:op
        input_blocks.3.0:{res},skip_connection input_blocks.3.1:{plain}
        middle_block.0:{res} middle_block.1:{plain} middle_block.2:{res}
        output_blocks.0.0:{res},skip_connection output_blocks.0.1:{plain}
        output_blocks.1.0:{res},skip_connection output_blocks.1.1:{plain} output_blocks.1.2:conv
        output_blocks.2.0:{res},skip_connection output_blocks.3.0:{res},skip_connection out:0,2"""
    expected = {f"first_stage_model.{name}" for name in names_of(first)}
    expected |= {f"model.diffusion_model.{name}" for name in names_of(second)}
    buffers = {"betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"}
    state = load_file(tmp_path / "out/model.safetensors")
    assert set(state) == expected | buffers | {"scale_factor"}
    assert state["model.diffusion_model.middle_block.1.qkv.weight"].shape == (192, 64, 1)
    assert state["scale_factor"] == 1 and state["betas"].shape == (1000,)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    near(state["alphas_cumprod"].double(), torch.cos(torch.pi / 2 * t) ** 2, atol=1e-7)
    near(torch.cumprod(1 - state["betas"].double(), 0), state["alphas_cumprod"].double(), atol=1e-5)
    assert state["alphas_cumprod_prev"][0] == 1 and torch.equal(
        state["alphas_cumprod_prev"][1:], state["alphas_cumprod"][:-1]
    )
    near(state["sqrt_alphas_cumprod"] ** 2 + state["sqrt_one_minus_alphas_cumprod"] ** 2, torch.ones(1000))


@pytest.mark.parametrize("kind", ["none", "clip_l", "openclip_h", "tokens", "joint"])
def test_compvis_there_and_back(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(CLIPTextEncoder, "towers", TOWERS)
    tower = fill(CLIPTextEncoder.named(kind, TINY)).eval() if kind in TOWERS else None
    wide = dict(context_dim=tower.width) if tower else {}
    vae, unet = make_vae((0.0,), (5.5,), **WIDE_VAE), make_unet(PLAIN if kind == "none" else LISTENS, **WIDE | wide)
    process = dict(schedule="scaled_linear") if tower else {}
    denoiser = Denoiser(unet, TextEncoder(32, 1, 2, 8) if kind == "joint" else None)
    if kind == "tokens":
        denoiser.class_tokens = fill(torch.nn.Embedding(11, 32))
        process = dict(class_embed="token", num_classes=10)
    cond = {"none": "none", "tokens": "class"}.get(kind, "text")
    file = save_ldm(tmp_path, vae, unet, cond, tower, denoiser, text_encoder=kind if tower else "joint", **process)
    words, out = convert.to_compvis(file, f"{tmp_path}/model.safetensors"), f"{tmp_path}/model.safetensors"
    assert ("; its own text encoder has no place there" in words) == (kind == "joint")
    state = load_file(out)
    texts = {name for name in state if name.startswith("cond_stage_model.")}
    assert bool(texts) == (kind in ("clip_l", "openclip_h", "tokens"))
    assert state["scale_factor"] == pytest.approx(1 / 5.5)
    assert same_vae(VAE.from_pretrained(out), vae)
    assert torch.equal(VAE.from_pretrained(out).quant_conv.weight, vae.quant_conv.weight)
    if kind == "joint":
        return
    merges = f"{tmp_path}/merges.txt" if tower else ""
    back, _, listener, meta = convert.load_foreign(out, merges, "v", head_dim=16)
    assert meta["model"]["schedule"] == process.get("schedule", "cosine") and meta["model"]["cond"] == cond
    args, context = (noise(2, 3, 8, 8), torch.tensor([999.0, 0.0])), {}
    if tower:
        assert torch.equal(listener(["low low! Slow"]), tower(["low low! Slow"]))
        assert ("cond_stage_model.model.ln_final.bias" in texts) == (kind == "openclip_h")
        context = {"context": tower(["low", ""])}
    elif kind == "tokens":
        assert texts == {"cond_stage_model.embedding.weight"}
        context = {"context": denoiser.class_tokens(torch.tensor([3, 10]))[:, None]}
        near(back.class_tokens(torch.tensor([3, 10]))[:, None], context["context"])
    near(back.unet(*args, **context), unet(*args, **context))


def test_compvis_autoencoder_alone_and_maps(tmp_path):
    vae = make_vae(**WIDE_VAE | dict(latent_proj=False, tanh_out=True, attn_resolutions=(128,)))
    words = convert.to_compvis(save_vae(tmp_path, vae), f"{tmp_path}/a.safetensors")
    state = load_file(tmp_path / "a.safetensors")
    assert "a.safetensors: the autoencoder, scale_factor 1; not in the file: tanh_out=True of" in words
    assert "decoder.up.1.attn.0.q.weight" in state
    assert state["quant_conv.weight"].shape == (6, 6, 1, 1) and "scale_factor" not in state
    unet = make_unet(PLAIN, **WIDE, concat_channels=3)
    denoiser = Denoiser(unet, rescaler=Rescaler(5, 2))
    file = save_ldm(tmp_path, make_vae(**WIDE_VAE), unet, denoiser=denoiser, task="semantic", map_classes=5)
    assert "the maps' rescaler" in convert.to_compvis(file, f"{tmp_path}/b.safetensors")
    weight = load_file(tmp_path / "b.safetensors")["cond_stage_model.channel_mapper.weight"]
    assert torch.equal(weight, denoiser.rescaler.conv.weight)


def test_training_goes_on_from_it(small_data, tmp_path, monkeypatch):
    """The file tells no heads: they are asked for, and taken where they are given."""
    monkeypatch.setitem(helpers.ARGS, "ldm", f"{helpers.RUN_ARGS} --out_dir=out")
    file = save_ldm(tmp_path, make_vae((0.0,), (5.5,), **WIDE_VAE), make_unet(PLAIN, **WIDE))
    convert.to_compvis(file, f"{tmp_path}/theirs.safetensors")
    args = [f"--dataset={small_data}", f"--init_from={tmp_path}/theirs.safetensors", "--image_size=16", "--lr=1e-9"]
    args += ["--objective=v", "--batch_size=1", "--val_images=1", "--n_samples=1", "--sample_steps=1"]
    args += ["--warmup_steps=0", "--cache_latents=false", "--max_steps=1"]
    message = helpers.Run("ldm", tmp_path / "untold", *args).fail()
    assert "does not tell its number of heads: give num_heads=N or head_dim=N" in message
    run = helpers.Run("ldm", tmp_path / "told", *args, "--head_dim=16").finish()
    assert UNet.from_pretrained(str(run.out)).settings["head_dim"] == 16


# --- the command ---


def test_the_command(tmp_path, monkeypatch, capsys):
    def command(*args):
        monkeypatch.setattr(sys, "argv", ["convert.py", *args])
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        runpy.run_path(f"{ROOT}/convert.py", run_name="__main__")

    file = save_ldm(tmp_path, make_vae(**WIDE_VAE), make_unet(PLAIN, **WIDE))
    command(f"--ckpt={file}", f"--out={tmp_path}/folder")
    assert capsys.readouterr().out.startswith("LDMPipeline: DiffusionPipeline.from_pretrained(")
    assert sorted(f.name for f in (tmp_path / "folder").iterdir()) == ["model_index.json", "scheduler", "unet", "vqvae"]
    command(f"--ckpt={file}", "--to=compvis", f"--out={tmp_path}/file.safetensors")
    assert "file.safetensors: the autoencoder" in capsys.readouterr().out
    for args, words in (
        (["--out=x"], "ckpt is not set: python convert.py --ckpt=out/ldm --to=diffusers --out=NEW"),
        ([f"--ckpt={file}", "--to=compvis"], "out is not set"),
        ([f"--ckpt={file}", "--to=onnx", "--out=x"], "to=onnx is not one of diffusers, compvis"),
        ([f"--ckpt={file}", f"--out={tmp_path}/folder"], "folder is there already: name a new folder"),
        (
            [f"--ckpt={file}", "--to=compvis", f"--out={file}"],
            "is there already, or no .safetensors file: name a new one",
        ),
        ([f"--ckpt={file}", "--to=compvis", "--out=model.ckpt"], "is there already, or no .safetensors file"),
        ([f"--ckpt={tmp_path}/none", "--out=x"], "none is not there: name a .safetensors file"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            command(*args)
    sys.excepthook(ValueError, ValueError("a: b"), None)
    assert capsys.readouterr().err == "convert.py: a: b\n"
