"""The autoencoder against published parameter counts, formulas written out and golden values; every option once."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import fill, normal

import checkpoint
import convert
import vae as vae_module
from vae import VAE, Attention, Discriminator, LinearAttention, Posterior, Quantizer, turn_and_scale

TINY = dict(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=3, norm_groups=4, resolution=32)
VQ = dict(bottleneck="vq", codebook_size=16)


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def count(module):
    return sum(p.numel() for p in module.parameters())


def fingerprint(model):
    """One number of the values and the order of all weights."""
    return sum((i + 1) * p.double().flatten()[::7].sum().item() for i, p in enumerate(model.parameters()) if p.ndim > 1)


@pytest.fixture(scope="module")
def tiny():
    return fill(VAE(**TINY)).eval()


# --- the published models ---

F16, F32 = dict(ch_mult=(1, 1, 2, 2, 4), z_channels=16), dict(ch_mult=(1, 1, 2, 2, 4, 4), z_channels=64)
F4 = dict(ch_mult=(1, 2, 4), z_channels=3)
VQ_F8 = dict(ch_mult=(1, 2, 2, 4), attn_resolutions=(32,), bottleneck="vq", codebook_size=16384)
PUBLISHED = {  # settings, then parameters of encoder, decoder, all
    "kl-f4": (F4, 22_351_238, 32_960_771, 55_312_063),
    "kl-f8": (dict(), 34_163_592, 49_490_179, 83_653_863),
    "kl-f16": (dict(**F16, attn_resolutions=(16,)), 28_265_760, 41_343_875, 69_610_963),
    "kl-f32": (dict(**F32, attn_resolutions=(16, 8)), 42_614_656, 61_244_803, 103_880_131),
    "vq-f4": (dict(**F4, bottleneck="vq"), None, None, 55_322_782),
    "vq-f4-noattn": (dict(**F4, bottleneck="vq", mid_attention=False), None, None, 53_219_486),
    "vq-f8": (VQ_F8, None, None, 67_717_295),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    settings, encoder, decoder, total = PUBLISHED[name]
    with torch.device("meta"):
        vae = VAE(**settings)
    assert count(vae) == total and vae.factor == 2 ** (len(vae.settings["ch_mult"]) - 1)
    assert encoder is None or (count(vae.encoder), count(vae.decoder)) == (encoder, decoder)


def test_defaults_are_those_of_convert():
    """convert.py imports no model: it completes the settings of other projects' files from a copy."""
    assert {name: p.default for name, p in inspect.signature(VAE).parameters.items()} == convert.VAE


# --- blocks ---


def test_resampling():
    x = images(2, 4, 6, 8)
    down, up = vae_module.Downsample(4, "conv"), vae_module.Upsample(4, "nearest")
    padded = F.pad(x, (0, 1, 0, 1))  # right and below only
    torch.testing.assert_close(down(x), F.conv2d(padded, down.conv.weight, down.conv.bias, stride=2))
    windows = x.view(2, 4, 3, 2, 4, 2)
    torch.testing.assert_close(vae_module.Downsample(4, "avg")(x), windows.mean((3, 5)))
    assert torch.equal(vae_module.Downsample(4, "max")(x), windows.amax((3, 5)))
    torch.testing.assert_close(up(x), up.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3)))


def test_attention_is_single_headed_over_all_positions():
    attention, x = fill(Attention(8, 4)).double(), images(2, 8, 3, 5).double()
    h = attention.norm(x)
    q, k, v = (f(h).flatten(2) for f in (attention.q, attention.k, attention.v))  # (B,C,HW)
    weights = (torch.einsum("bcp,bcq->bpq", q, k) / math.sqrt(8)).softmax(-1)
    out = torch.einsum("bpq,bcq->bcp", weights, v).view_as(x)
    torch.testing.assert_close(attention(x), x + attention.proj_out(out))


def test_linear_attention_formula():
    attention, x = LinearAttention(8, 4).double(), images(2, 8, 3, 5).double()
    assert torch.equal(attention(x), x), "starts as the identity"
    fill(attention)
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).view(2, 3, 4, 2, 15).unbind(1)  # (B,heads,d,HW)
    q, k = q.exp() / q.exp().sum(2, keepdim=True), k.exp() / k.exp().sum(3, keepdim=True)
    out = torch.einsum("bhdp,bhdq,bheq->bhep", q, k, v).reshape(2, 8, 3, 5)
    torch.testing.assert_close(attention(x), x + attention.proj_out(out))


# --- the posterior ---


def test_posterior_kl_and_clamped_logvar():
    posterior, Normal = Posterior(normal(2, 6, 4, 4).double()), torch.distributions.Normal
    expected = torch.distributions.kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), expected)
    moments = torch.tensor([0.0, 0.0, 1e4, -1e4]).view(1, 4, 1, 1)
    torch.testing.assert_close(Posterior(moments).std.flatten(), torch.tensor([math.exp(10), math.exp(-15)]))
    assert Posterior(moments.bfloat16()).mean.dtype == torch.float32


def test_posterior_samples(tiny):
    posterior = tiny.encode(images(2, 3, 16, 16))
    noise = normal(*posterior.mean.shape)
    assert torch.equal(posterior.mode(), posterior.mean)
    assert torch.equal(posterior.sample(noise), posterior.mean + (posterior.logvar / 2).exp() * noise)
    first, again, other = (posterior.sample(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- the autoencoder ---

GOLDEN = [  # option, fingerprint of the initial weights (seed 0), std of a float64 reconstruction by `fill`
    ({}, -222.72604, 0.54437304),
    (dict(activation="swiglu"), 338.30516, 0.61110492),
    (dict(downsample="avg"), -24.466495, 0.52737861),
    (dict(downsample="max"), -24.466495, 0.56516748),
    (dict(upsample="bilinear"), -222.72604, 0.53890742),
    (dict(upsample="bicubic"), -222.72604, 0.53120666),
    (dict(linear_attention=True), -318.91170, 0.45912809),
    (dict(mid_attention=False), -202.98212, 0.55459739),
    (dict(latent_proj=False), -48.410588, 0.5840591),
    (dict(tanh_out=True), -222.72604, 0.39427334),
    (dict(patch_size=2), -889.74242, 0.68367673),
    (dict(patch_size=2, pixel_channels=5), -820.70852, 0.40739609),
    (dict(attn_resolutions=(16,)), 479.79828, 0.55420811),
    (dict(num_res_blocks=2), 786.43181, 0.5569832),
    (dict(norm_groups=2), -222.72604, 0.54581618),
    (dict(z_channels=5), 448.5912, 0.56246885),
    (dict(embed_dim=2), -285.08004, 0.55903771),
    (dict(attn_resolutions=(8, 32), patch_size=2, linear_attention=True, activation="swiglu"), -159.59317, 0.69907977),
    (dict(image_mode="L"), 500.07647, 0.61129803),
    (dict(image_mode="RGBA", patch_size=2), -410.70577, 0.63965035),
    (dict(VQ), -226.94436, 0.55793069),
    (dict(**VQ, embed_dim=4), -136.94111, 0.53564339),
]


@pytest.mark.parametrize("option, initial, std", GOLDEN, ids=[str(option) for option, *_ in GOLDEN])
def test_options(option, initial, std):
    """Initial weights and outputs are those of golden values, and gradients reach every parameter."""
    settings = TINY | option
    torch.manual_seed(0)
    vae = VAE(**settings)
    assert fingerprint(vae) == pytest.approx(initial, rel=1e-5)
    assert vae.settings == inspect.signature(VAE).bind(**settings).arguments | vae.settings
    vae, f = fill(vae).double(), 4 * settings.get("patch_size", 1)
    x = images(2, len(vae.settings["image_mode"]), 32, 48).double()
    posterior = vae.encode(x)
    assert posterior.mean.shape == (2, settings.get("embed_dim") or settings["z_channels"], 32 // f, 48 // f)
    y, same = vae(x, normal(*posterior.mean.shape).double())
    assert y.std().item() == pytest.approx(std, rel=1e-5)
    loss = (y - x).square().mean() + 1e-2 * same.kl().mean() + (same.loss if vae.quantize else 0)
    loss.backward()
    assert y.shape == vae.decode_tiled(posterior.mean, 4, 1).shape == x.shape
    for name, p in vae.named_parameters():
        assert p.grad.isfinite().all() and (name.endswith("k.bias") or p.grad.abs().sum() > 0), name


def test_encode_decode_and_forward(tiny):
    for H, W in ((4, 4), (24, 40), (44, 20)):
        x, noise = images(2, 3, H, W), normal(2, 3, H // 4, W // 4)
        reconstruction, posterior = tiny(x, noise)
        assert torch.equal(posterior.mean, tiny.encode(x).mean) and reconstruction.shape == x.shape
        assert torch.equal(reconstruction, tiny.decode(posterior.sample(noise)))
        assert not torch.equal(reconstruction, tiny(x, -noise)[0])
    for H, W, side in ((30, 32, 30), (32, 33, 33)):
        with pytest.raises(AssertionError, match=f"image side {side}: must be a multiple of 4"):
            tiny.encode(images(1, 3, H, W))


def test_latent_statistics():
    vae = VAE(**TINY)
    assert not vae.has_latent_statistics
    vae.latent_mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
    assert not vae.has_latent_statistics
    vae.latent_std.copy_(torch.tensor([0.5, 2.0, 1 / 0.18215]))
    z = normal(2, 3, 4, 4)
    x0 = vae.normalize(z)
    torch.testing.assert_close(x0[:, 0], (z[:, 0] - 1) / 0.5)
    torch.testing.assert_close(x0[:, 2], z[:, 2] * 0.18215)
    torch.testing.assert_close(vae.denormalize(x0), z)
    twin = VAE(**TINY)
    twin.load_state_dict(vae.state_dict())
    assert twin.has_latent_statistics, "they are part of the weights"


def test_dropout_is_for_training_only(tiny):
    vae, x = fill(VAE(**TINY, dropout=0.5)), images(1, 3, 16, 16)
    assert not torch.equal(vae.encode(x).mean, vae.encode(x).mean)
    assert torch.equal(vae.eval().encode(x).mean, tiny.encode(x).mean)


BAD = [
    (dict(bottleneck="fsq"), "bottleneck='fsq': must be one of kl, vq"),
    (dict(downsample="stride"), "downsample='stride': must be one of conv, avg, max"),
    (dict(num_res_blocks=0), "num_res_blocks=0: must be >= 1"),
    (dict(norm_groups=32), r"norm_groups=32: must divide ch \* ch_mult, here 8"),
    (dict(embed_dim=2, latent_proj=False), "embed_dim=2: needs latent_proj=True"),
]


def test_bad_settings():
    for setting, message in BAD:
        with pytest.raises(AssertionError, match=message):
            VAE(**TINY | setting)
    with pytest.raises(AssertionError, match="disc_norm='instance': must be one of group, batch, none"):
        Discriminator(norm="instance")
    with pytest.raises(AssertionError, match="disc_channels=24: must be a multiple of 16"):
        Discriminator(channels=24)


def test_channels_last_gives_the_same(tiny):
    x = images(2, 3, 16, 16)
    twin = copy.deepcopy(tiny).to(memory_format=torch.channels_last)
    with torch.no_grad():
        got = twin.decode(twin.encode(x.contiguous(memory_format=torch.channels_last)).mode())
        torch.testing.assert_close(got, tiny.decode(tiny.encode(x).mode()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", [{}, VQ, dict(latent_proj=False)], ids=["kl", "vq", "bare"])
def test_a_module_in_bfloat16_decodes_what_it_encodes(option):
    """Latents may be float32; images have the dtype of the weights."""
    vae, x = fill(VAE(**TINY | option)), images(2, 3, 16, 24)
    half = copy.deepcopy(vae).bfloat16()
    z = half.encode(x.bfloat16()).mode().float()
    for decoded in (half.decode(z), half(x.bfloat16(), torch.zeros_like(z))[0], half.decode_tiled(z, 64)):
        assert decoded.dtype == torch.bfloat16
        torch.testing.assert_close(decoded.float(), vae.decode(z), rtol=0.1, atol=0.1)


def test_checkpointing_changes_nothing():
    x, noise, gradients = images(2, 3, 16, 16), normal(2, 3, 4, 4), []
    for on in (False, True):
        vae, calls = fill(VAE(**TINY)), []
        vae.encoder.checkpointing = vae.decoder.checkpointing = on
        vae.decoder.up[0].block[0].register_forward_hook(lambda *args, calls=calls: calls.append(1))
        vae(x, noise)[0].square().mean().backward()
        gradients.append([p.grad for p in vae.parameters()])
        assert len(calls) == 1 + on, "computed again in the backward pass"
    assert all(map(torch.equal, *gradients))


# --- tiles ---


@pytest.mark.parametrize("h, w, tile, overlap", [(12, 17, 8, 4), (20, 6, 8, 0), (9, 9, 8, 7)])
def test_tiles(tiny, monkeypatch, h, w, tile, overlap):
    """A decoder without neighborhoods gives the same in tiles; one that depends on it is blended between them."""
    z, sizes, number = normal(1, 3, h, w), [], 0

    def decode(z):
        sizes.append(tuple(z.shape[-2:]))
        enlarged = F.interpolate(z, scale_factor=4.0)
        return torch.full_like(enlarged, len(sizes)) if number else enlarged

    with torch.no_grad():
        assert torch.equal(tiny.decode_tiled(z, 20, 2), tiny.decode(z)), "one tile"
    monkeypatch.setattr(tiny, "decode", decode)
    torch.testing.assert_close(tiny.decode_tiled(z, tile, overlap), F.interpolate(z, scale_factor=4.0))
    assert all(size == (min(h, tile), min(w, tile)) for size in sizes) and len(sizes) > 1
    sizes.clear()
    number = 1
    row = tiny.decode_tiled(z, tile, overlap)[0, 0, 0]
    assert row[0] == 1 and (row.diff() >= 0).all(), "each tile's number, rising linearly to the next one's"
    assert vae_module.tile_weights(0, 8, 12, 4, 1).tolist() == [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125]
    assert vae_module.tile_weights(4, 12, 12, 4, 1).tolist() == [0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1]
    with pytest.raises(AssertionError, match=r"overlap=8: must be in \[0, 8\)"):
        tiny.decode_tiled(z, tile, 8)


# --- vector quantization ---


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_nearest_code(dtype):
    """By brute force, in float64, whatever the dtype of the module, autocast and TF32."""
    generator = torch.Generator().manual_seed(0)
    quantizer, z = Quantizer(1024, 4, 0.25, False).to(dtype), normal(2, 4, 16, 16).to(dtype)
    torch.nn.init.normal_(quantizer.embedding.weight, generator=generator)
    rows, codes = z.double().permute(0, 2, 3, 1).reshape(-1, 1, 4), quantizer.embedding.weight.detach().double()
    wanted = (rows - codes).square().sum(-1).argmin(1).view(2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.nearest(z), wanted)
    torch.testing.assert_close(quantizer.lookup(wanted), codes[wanted].permute(0, 3, 1, 2).to(dtype))


@pytest.mark.parametrize("legacy", (False, True))
def test_quantizer_loss_and_gradients(legacy):
    quantizer, z = Quantizer(8, 3, 0.4, legacy).double(), normal(2, 3, 4, 4).double().requires_grad_()
    assert quantizer.embedding.weight.abs().max() <= 1 / 8
    codes, loss, indices = quantizer(z)
    e = quantizer.embedding.weight[indices].permute(0, 3, 1, 2)
    torch.testing.assert_close(codes, e)
    distance = (z - e).square().mean()
    torch.testing.assert_close(loss, 1.4 * distance)
    straight = torch.autograd.grad((codes * normal(2, 3, 4, 4, seed=1)).sum(), z, retain_graph=True)[0]
    torch.testing.assert_close(straight, normal(2, 3, 4, 4, seed=1).double(), msg="straight through")
    of_z, of_codes = torch.autograd.grad(loss, (z, quantizer.embedding.weight))
    on_z, on_codes = (1.0, 0.4) if legacy else (0.4, 1.0)
    plain = torch.autograd.grad(distance, (z, quantizer.embedding.weight))
    torch.testing.assert_close(of_z, on_z * plain[0])
    torch.testing.assert_close(of_codes, on_codes * plain[1])


def test_a_vq_autoencoder():
    vae, x = fill(VAE(**TINY | VQ)), images(2, 3, 16, 24)
    posterior = vae.encode(x)
    assert isinstance(posterior, vae_module.Quantized) and not posterior.std.any() and not posterior.kl().any()
    assert torch.equal(posterior.sample(), posterior.mode()) and posterior.indices is None
    reconstruction, trained = vae(x)
    torch.testing.assert_close(reconstruction, vae.decode(posterior.mean))
    assert torch.equal(trained.indices, vae.quantize.nearest(posterior.mean)) and trained.indices.shape == (2, 4, 6)


# --- turns and scales ---


def test_turn_and_scale():
    x = images(2, 3, 8, 8)
    assert turn_and_scale(x, 0, ()) is x
    turned = turn_and_scale(x, 1, ())
    assert torch.equal(turned, x.transpose(2, 3).flip(2)), "counterclockwise"
    assert turn_and_scale(x, 0, (4, 4)).std() < 0.8 * x.std(), "no antialiasing"
    vae, noise, x = fill(VAE(**TINY)), normal(2, 3, 4, 4), images(2, 3, 16, 16)
    z = vae.encode(x).sample(noise)
    assert torch.equal(vae(x, noise, 3, (4, 2))[0], vae.decode(turn_and_scale(z, 3, (4, 2))))


# --- the discriminator ---


@pytest.mark.parametrize("n_layers, total", [(3, 2_765_633), (2, 663_361)])
def test_published_discriminators(n_layers, total):
    torch.manual_seed(0)
    disc = Discriminator(n_layers, "batch")
    assert count(disc) == total
    for m in disc.main:
        if isinstance(m, torch.nn.Conv2d):
            assert abs(m.weight.std() - 0.02) < 0.001 and m.kernel_size == (4, 4)
        elif isinstance(m, torch.nn.BatchNorm2d):
            assert abs(m.weight.mean() - 1) < 0.01 and 0.01 < m.weight.std() < 0.03 and not m.bias.any()
        else:
            assert m.negative_slope == 0.2
    side = 3 * 2**n_layers
    assert disc(images(2, 3, side, side)).shape == (2, 1, 1, 1), "the smallest image"


@pytest.mark.parametrize("n_layers, patch", [(3, 70), (2, 34), (1, 16)])
def test_a_logit_sees_one_patch(n_layers, patch):
    disc, side = Discriminator(n_layers, "none"), 4 * patch // 2**n_layers * 2**n_layers
    x = images(1, 3, side, side).requires_grad_()
    y = disc(x)
    y[0, 0, y.shape[2] // 2, y.shape[3] // 2].backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == patch


def test_discriminator_options():
    x, alone = images(2, 3, 32, 32), Discriminator(2, "group")
    torch.testing.assert_close(alone(x)[:1], alone(x[:1]))  # an image's logits do not depend on the batch
    assert not {"GroupNorm", "BatchNorm2d"} & {type(m).__name__ for m in Discriminator(2, "none").modules()}
    normed = Discriminator(2, "none", spectral_norm=True)
    for _ in range(50):
        normed(x)
    for m in normed.main:
        if isinstance(m, torch.nn.Conv2d):
            assert torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


# --- checkpoints ---


def write_run(folder, vae, stage="vae", run=1, **more):
    """latest.safetensors of a run whose autoencoder is `vae`."""
    folder.mkdir(exist_ok=True)
    meta = {"stage": stage, "run": run, "step": 1, "config": {}} | more
    meta |= {"model": vae.settings} if stage == "vae" else {"model": {}, "vae": vae and vae.settings}
    tensors = checkpoint.with_prefix("ema" if stage == "vae" else "vae", vae.state_dict() if vae else {})
    checkpoint.write(f"{folder}/latest.safetensors", tensors | {"other.w": torch.ones(1)}, meta)
    return folder


def test_from_pretrained(tiny, tmp_path):
    """Both stages by folder or file, a snapshot by the file beside it; settings travel through JSON."""
    for stage in ("vae", "ldm"):
        folder = write_run(tmp_path / stage, tiny, stage)
        for path in (folder, f"{folder}/latest.safetensors"):
            vae = VAE.from_pretrained(path)
            assert vae.settings == tiny.settings and not vae.training
            assert not any(p.requires_grad for p in vae.parameters())
            assert checkpoint.hash_weights(vae) == checkpoint.hash_weights(tiny)
    snapshot = f"{tmp_path}/ldm/ema_0000001.safetensors"
    meta = {"stage": "ldm", "snapshot": True, "run": 1, "vae": tiny.settings}
    checkpoint.write(snapshot, {"ema.w": torch.ones(1)}, meta)
    assert checkpoint.hash_weights(VAE.from_pretrained(snapshot)) == checkpoint.hash_weights(tiny)
    with pytest.raises(checkpoint.UserError, match="all its settings; leave out scaling_factor"):
        VAE.from_pretrained(snapshot, scaling_factor=1.0)
    write_run(tmp_path / "ldm", tiny, "ldm", run=2)
    with pytest.raises(checkpoint.UserError, match="ema_0000001.safetensors: a snapshot, without the autoencoder"):
        VAE.from_pretrained(snapshot)
    with pytest.raises(checkpoint.UserError, match="trained on pixels, without an autoencoder"):
        VAE.from_pretrained(write_run(tmp_path / "pixels", None, "ldm"))
