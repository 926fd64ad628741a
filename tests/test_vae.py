"""The autoencoder against the published parameter counts, torch.distributions and plain numpy; every option once."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fill

from metrics import psnr, ssim
from vae import (
    VAE,
    Attention,
    Discriminator,
    Downsample,
    LinearAttention,
    Posterior,
    Quantizer,
    ResBlock,
    Upsample,
    turn_and_scale,
)

TINY = dict(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=3, norm_groups=4, resolution=32)


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def tiny():
    return fill(VAE(**TINY)).eval()


# --- the published models ---


@pytest.mark.parametrize(
    "settings, encoder, decoder, total",
    [
        (dict(ch_mult=(1, 2, 4), z_channels=3), 22_351_238, 32_960_771, 55_312_063),  # kl-f4
        (dict(), 34_163_592, 49_490_179, 83_653_863),  # kl-f8
        (dict(ch_mult=(1, 1, 2, 2, 4), z_channels=16, attn_resolutions=(16,)), 28_265_760, 41_343_875, 69_610_963),
        (
            dict(ch_mult=(1, 1, 2, 2, 4, 4), z_channels=64, attn_resolutions=(16, 8)),
            42_614_656,
            61_244_803,
            103_880_131,
        ),
    ],
    ids=["kl-f4", "kl-f8", "kl-f16", "kl-f32"],
)
def test_published_parameter_counts(settings, encoder, decoder, total):
    with torch.device("meta"):
        vae = VAE(**settings)
    assert (count(vae.encoder), count(vae.decoder), count(vae)) == (encoder, decoder, total)
    assert vae.factor == 2 ** (len(vae.settings["ch_mult"]) - 1)


def test_downsampling_pads_right_and_below_only():
    down = Downsample(1, "conv", 1, False)
    x = images(1, 1, 6, 8)
    with torch.no_grad():
        down.conv.weight.fill_(1.0)
        down.conv.bias.zero_()
        y = down(x)
    assert y.shape == (1, 1, 3, 4)
    torch.testing.assert_close(y[0, 0, 0, 0], x[0, 0, 0:3, 0:3].sum())  # a whole window in the upper left corner
    torch.testing.assert_close(y[0, 0, 1, 1], x[0, 0, 2:5, 2:5].sum())
    torch.testing.assert_close(y[0, 0, 2, 3], x[0, 0, 4:6, 6:8].sum())  # a cut one in the lower right


def test_resampling_without_weights():
    x = images(2, 4, 6, 8)
    windows = x.view(2, 4, 3, 2, 4, 2)
    torch.testing.assert_close(Downsample(4, "avg", 4, False)(x), windows.mean((3, 5)))
    assert torch.equal(Downsample(4, "max", 4, False)(x), windows.amax((3, 5)))
    up = Upsample(4, "nearest", 4, False)
    torch.testing.assert_close(up(x), up.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3)))


def test_attention_is_single_headed_over_all_pixels():
    attention, x = fill(Attention(8, 4)).double(), images(2, 8, 3, 5).double()
    h = attention.norm(x)
    q, k, v = (torch.einsum("oc,bchw->bohw", f.weight[:, :, 0, 0], h) for f in (attention.q, attention.k, attention.v))
    q, k, v = (a + f.bias[:, None, None] for a, f in ((q, attention.q), (k, attention.k), (v, attention.v)))
    weights = torch.einsum("bchw,bcij->bhwij", q, k) / math.sqrt(8)
    weights = weights.flatten(3).softmax(-1).view_as(weights)
    out = torch.einsum("bhwij,bcij->bchw", weights, v)
    torch.testing.assert_close(attention(x), x + attention.proj_out(out))


def test_linear_attention_formula():
    attention, x = LinearAttention(8, 4).double(), images(2, 8, 3, 5).double()
    assert torch.equal(attention(x), x), "starts as the identity"
    fill(attention)
    q, k, v = attention.qkv(attention.norm(x)).flatten(2).view(2, 3, 4, 2, 15).unbind(1)  # (B,heads,d,HW)
    q, k = q.exp() / q.exp().sum(2, keepdim=True), k.exp() / k.exp().sum(3, keepdim=True)
    out = torch.einsum("bhdp,bhdq,bheq->bhep", q, k, v).reshape(2, 8, 3, 5)
    torch.testing.assert_close(attention(x), x + attention.proj_out(out))


def test_gated_block_formula():
    block, x = fill(ResBlock(4, 8, 4, gated=True)).double(), images(2, 4, 5, 5).double()
    h = block.norm2(block.conv1(F.silu(block.norm1(x))))
    assert h.shape[1] == 16
    torch.testing.assert_close(block(x), block.skip(x) + block.conv2(F.silu(h[:, :8]) * h[:, 8:]))


# --- the posterior ---


def test_posterior_kl_is_that_of_torch_distributions():
    posterior = Posterior(torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), expected)
    assert posterior.kl().shape == (2, 3, 4, 4) and (posterior.kl() >= 0).all()


def test_posterior_clamps_logvar():
    moments = torch.tensor([1.0, -1e4, 1e4, 0.0]).view(1, 4, 1, 1)  # means 1, -1e4; logvars 1e4, 0
    posterior = Posterior(torch.cat([moments, -moments]))
    assert posterior.logvar.flatten().tolist() == [20.0, 0.0, -30.0, 0.0]
    assert posterior.kl().isfinite().all()
    torch.testing.assert_close(posterior.std.flatten(), torch.tensor([math.exp(10), 1, math.exp(-15), 1]))


def test_posterior_samples(tiny):
    posterior = tiny.encode(images(2, 3, 16, 16))
    assert torch.equal(posterior.mode(), posterior.mean)
    noise = torch.randn(posterior.mean.shape)
    assert torch.equal(posterior.sample(noise), posterior.mean + (posterior.logvar / 2).exp() * noise)
    assert torch.equal(posterior.sample(torch.zeros_like(noise)), posterior.mean)
    first, again, other = (posterior.sample(generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(1)
    assert not torch.equal(posterior.sample(), posterior.sample())
    wide = Posterior(torch.tensor([3.0, math.log(4)]).view(1, 2, 1, 1).expand(1, 2, 100, 100).double())
    drawn = wide.sample(generator=torch.Generator().manual_seed(0))
    assert abs(drawn.mean() - 3) < 0.1 and abs(drawn.std() - 2) < 0.1


# --- the whole ---


def test_encode_decode_and_forward(tiny):
    x, noise = images(2, 3, 16, 24), torch.randn(2, 3, 4, 6)
    posterior = tiny.encode(x)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 3, 4, 6)
    reconstruction, same = tiny(x, noise)
    assert torch.equal(same.mean, posterior.mean)
    assert torch.equal(reconstruction, tiny.decode(posterior.sample(noise)))
    assert not torch.equal(reconstruction, tiny(x, -noise)[0])


@pytest.mark.parametrize("H, W", [(4, 4), (24, 40), (44, 20)])
def test_any_size_that_divides(tiny, H, W):
    posterior = tiny.encode(images(1, 3, H, W))
    assert posterior.mean.shape == (1, 3, H // 4, W // 4)
    assert tiny.decode(posterior.mode()).shape == (1, 3, H, W)


@pytest.mark.parametrize("H, W, side, remedy", [(30, 32, 30, 28), (32, 33, 33, 32), (3, 8, 3, 4)])
def test_sides_that_do_not_divide(tiny, H, W, side, remedy):
    with pytest.raises(ValueError, match=f"image side {side} is not a multiple of 4: resize or crop to {remedy}"):
        tiny.encode(images(1, 3, H, W))


def test_latent_statistics():
    vae = VAE(**TINY)
    assert not vae.has_latent_statistics
    vae.latent_mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
    assert not vae.has_latent_statistics
    vae.latent_std.copy_(torch.tensor([0.5, 2.0, 1 / 0.18215]))
    assert vae.has_latent_statistics
    z = torch.randn(2, 3, 4, 4)
    x0 = vae.normalize(z)
    torch.testing.assert_close(x0[:, 0], (z[:, 0] - 1) / 0.5)
    torch.testing.assert_close(x0[:, 1], (z[:, 1] + 2) / 2)
    torch.testing.assert_close(x0[:, 2], z[:, 2] * 0.18215)
    torch.testing.assert_close(vae.denormalize(x0), z)
    twin = VAE(**TINY)
    twin.load_state_dict(vae.state_dict())
    assert twin.has_latent_statistics, "they are part of the weights"


OPTIONS = [
    dict(activation="swiglu"),
    dict(downsample="avg"),
    dict(downsample="max"),
    dict(upsample="bilinear"),
    dict(upsample="bicubic"),
    dict(linear_attention=True),
    dict(mid_attention=False),
    dict(latent_proj=False),
    dict(tanh_out=True),
    dict(patch_size=2),
    dict(attn_resolutions=(16,)),
    dict(num_res_blocks=2),
    dict(norm_groups=2),
    dict(z_channels=5),
    dict(attn_resolutions=(8, 32), patch_size=2, linear_attention=True, activation="swiglu", tanh_out=True),
]


@pytest.mark.parametrize("option", [{}, *OPTIONS], ids=str)
def test_options(tiny, option):
    settings = TINY | option
    vae = fill(VAE(**settings))
    f = 4 * settings.get("patch_size", 1)
    assert vae.factor == f and vae.settings == {**VAE(**TINY).settings, **option}
    x = images(2, 3, 32, 48)
    posterior = vae.encode(x)
    assert posterior.mean.shape == (2, settings["z_channels"], 32 // f, 48 // f)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    y = vae.decode(posterior.sample(noise))
    assert y.shape == x.shape and y.isfinite().all()
    ((y - x).square().mean() + 1e-2 * posterior.kl().mean()).backward()
    for name, p in vae.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if not name.endswith("k.bias"):  # which a softmax does not see
            assert p.grad.abs().sum() > 0, name
    if option and y.shape == x.shape:
        plain = tiny.decode(tiny.encode(x).mode())
        assert (vae.decode(posterior.mode()) - plain).abs().max() > 1e-3, "the option changes nothing"
    if settings.get("tanh_out"):
        assert y.abs().max() <= 1


def test_attention_resolutions_count_pixels_after_the_stem():
    def levels(**settings):
        vae = VAE(**TINY | settings)
        downs = [isinstance(level.attn[0], Attention) for level in vae.encoder.down]
        ups = [isinstance(level.attn[0], Attention) for level in vae.decoder.up]
        assert downs == ups
        return downs

    assert levels() == [False, False, False]
    assert levels(attn_resolutions=(32, 8)) == [True, False, True]
    assert levels(attn_resolutions=(16,)) == [False, True, False]
    assert levels(attn_resolutions=(16,), patch_size=2) == [True, False, False]


def test_dropout_is_for_training_only():
    vae, x = fill(VAE(**TINY, dropout=0.5)), images(1, 3, 16, 16)
    torch.manual_seed(0)
    assert not torch.equal(vae.encode(x).mean, vae.encode(x).mean)
    vae.eval()
    assert torch.equal(vae.encode(x).mean, vae.encode(x).mean)
    assert torch.equal(vae.encode(x).mean, fill(VAE(**TINY)).encode(x).mean)


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(activation="relu"), "activation='relu' is not one of silu, swiglu"),
        (dict(downsample="stride"), "downsample='stride' is not one of conv, avg, max"),
        (dict(upsample="linear"), "upsample='linear' is not one of nearest, bilinear, bicubic"),
        (dict(num_res_blocks=0), "num_res_blocks=0: each level of the encoder needs 1 or more"),
        (dict(norm_groups=32), r"8 channels \(ch \* ch_mult\) do not divide into norm_groups=32 groups"),
        (dict(ch=12, ch_mult=(2, 4), norm_groups=8), "12 channels .* norm_groups=8"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        VAE(**TINY | setting)


def test_channels_last_gives_the_same(tiny):
    x = images(2, 3, 16, 16)
    y = tiny.decode(tiny.encode(x).mode())
    twin = fill(VAE(**TINY)).to(memory_format=torch.channels_last)
    with torch.no_grad():
        got = twin.decode(twin.encode(x.contiguous(memory_format=torch.channels_last)).mode())
    torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-5)


def test_overfits_one_batch():
    """Four smooth pictures, from scratch, to a mean absolute error of 0.05 (they span [-1, 1])."""
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    pictures = [x, y, x * y, 1 - x**2 - y**2]
    batch = torch.stack([torch.stack([p, -p, pictures[i - 1]]) for i, p in enumerate(pictures)]).clamp(-1, 1)
    vae = VAE(ch=16, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, mid_attention=False, patch_size=2, norm_groups=4)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=5e-3, betas=(0.9, 0.99))
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 150)
        reconstruction, posterior = vae(batch)
        loss = (reconstruction - batch).abs().mean() + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        l1 = (vae.decode(vae.encode(batch).mode()) - batch).abs().mean().item()
    assert l1 < 0.05, l1


# --- psnr and ssim ---


def test_psnr_by_hand():
    x = torch.zeros(3, 3, 8, 8)
    y = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), -1.0), torch.zeros(3, 8, 8)])
    got = psnr(x, y)
    assert got.shape == (3,)
    assert got[0].item() == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-4)  # 20 dB: peak 2, error 0.2
    assert got[1].item() == pytest.approx(10 * math.log10(4), abs=1e-9)
    assert 100 < got[2].item() < math.inf
    assert torch.equal(got, psnr(y, x))


def test_metrics_clamp_to_the_range():
    x, y = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1)
    x[0, 0, 0], y[0, 1, 5] = 1.0, -1.0
    loud_x, loud_y = x.clone(), y.clone()
    loud_x[0, 0, 0], loud_y[0, 1, 5] = 7.0, -9.0
    assert torch.equal(psnr(loud_x, loud_y), psnr(x, y))
    assert torch.equal(ssim(loud_x, loud_y), ssim(x, y))


def slow_ssim(x, y):
    """Wang et al. 2004, equation 13, window by window; (C,H,W) in [-1,1]."""
    window = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    window /= window.sum()
    c1, c2, values = (0.01 * 2) ** 2, (0.03 * 2) ** 2, []
    C, H, W = x.shape
    for c in range(C):
        for i in range(H - 10):
            for j in range(W - 10):
                a, b = x[c, i : i + 11, j : j + 11], y[c, i : i + 11, j : j + 11]
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                cov = (window * (a - ma) * (b - mb)).sum()
                values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


def test_ssim_against_a_slow_loop():
    ramp = torch.linspace(-1, 1, 20).expand(3, 17, 20)
    x = torch.stack([images(3, 17, 20), ramp, torch.full((3, 17, 20), 0.9)])
    y = torch.stack([images(3, 17, 20, seed=1), ramp.flip(-1) * 0.8, torch.full((3, 17, 20), 0.899)])
    got = ssim(x, y)
    assert got.shape == (3,)
    for i in range(3):
        assert got[i].item() == pytest.approx(slow_ssim(x[i].double().numpy(), y[i].double().numpy()), abs=1e-6)
    assert ssim(x, x).tolist() == pytest.approx([1, 1, 1], abs=1e-9)
    assert ssim(x[:1, :, :11, :11], y[:1, :, :11, :11]).shape == (1,), "one window"


def test_ssim_is_exact_under_autocast():
    x = images(1, 3, 16, 16) * 0.01 + 0.9  # a small variance on a large mean is what half precision loses
    y = images(1, 3, 16, 16, seed=1) * 0.01 + 0.9
    with torch.autocast("cpu", torch.bfloat16):
        got = ssim(x, y)
    assert got.item() == pytest.approx(slow_ssim(x[0].double().numpy(), y[0].double().numpy()), abs=1e-6)


@pytest.mark.parametrize("metric", (psnr, ssim))
def test_metrics_refuse_what_they_would_judge_wrongly(metric):
    """Bytes, all but two of which are beyond [-1,1] and so alike, and one picture beside several."""
    x = images(2, 3, 16, 16)
    for a, b in (((127 * x + 128).byte(), (127 - 127 * x).byte()), (x, x[:1])):
        with pytest.raises(ValueError, match="equal shape as floats in .-1,1., got"):
            metric(a, b)


def test_ssim_wants_a_whole_window():
    with pytest.raises(ValueError, match=r"11x11 window; images of \(10, 32\) are smaller"):
        ssim(images(1, 3, 10, 32), images(1, 3, 10, 32))


# --- vector quantisation ---

VQ = TINY | dict(bottleneck="vq", codebook_size=11, embed_dim=4)


@pytest.mark.parametrize(
    "settings, total",
    [
        (dict(ch_mult=(1, 2, 4), z_channels=3, codebook_size=8192), 55_322_782),  # vq-f4
        (dict(ch_mult=(1, 2, 4), z_channels=3, codebook_size=8192, mid_attention=False), 53_219_486),  # vq-f4-noattn
        (dict(ch_mult=(1, 2, 2, 4), attn_resolutions=(32,), codebook_size=16384), 67_717_295),  # vq-f8
    ],
    ids=["vq-f4", "vq-f4-noattn", "vq-f8"],
)
def test_published_vq_parameter_counts(settings, total):
    with torch.device("meta"):
        assert count(VAE(bottleneck="vq", **settings)) == total


@pytest.mark.parametrize("legacy", (False, True))
def test_quantizer_against_brute_force(legacy):
    """Every latent in turn, every code in turn; the gradients as van den Oord et al. 2017 write them."""
    quantizer = Quantizer(7, 3, beta=0.25, legacy=legacy).double()
    torch.nn.init.normal_(quantizer.embedding.weight, generator=torch.Generator().manual_seed(1))
    z = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    quantised, loss, indices = quantizer(z)
    codes, wanted, total = quantizer.embedding.weight.detach(), torch.empty_like(z), 0.0
    codebook_gradient, latent_gradient = torch.zeros_like(codes), torch.zeros_like(z)
    on_codes, on_latents = (0.25, 1.0) if legacy else (1.0, 0.25)
    for b in range(2):
        for i in range(4):
            for j in range(5):
                v = z[b, :, i, j].detach()
                k = min(range(7), key=lambda k: (v - codes[k]).square().sum().item())
                assert indices[b, i, j] == k
                wanted[b, :, i, j] = codes[k]
                total += 1.25 * (v - codes[k]).square().sum() / z.numel()
                codebook_gradient[k] += on_codes * 2 * (codes[k] - v) / z.numel()
                latent_gradient[b, :, i, j] = on_latents * 2 * (v - codes[k]) / z.numel()
    torch.testing.assert_close(quantised, wanted)
    torch.testing.assert_close(loss, total)
    by_loss = torch.autograd.grad(loss, (z, quantizer.embedding.weight), retain_graph=True)
    torch.testing.assert_close(by_loss, (latent_gradient, codebook_gradient))
    upstream = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    straight, none = torch.autograd.grad(quantised, (z, quantizer.embedding.weight), upstream, allow_unused=True)
    assert torch.equal(straight, upstream) and none is None


def test_vq_autoencoder():
    vae, x = fill(VAE(**VQ)), images(2, 3, 16, 24)
    posterior = vae.encode(x)
    assert posterior.mean.shape == (2, 4, 4, 6) and vae.latent_channels == 4 and not posterior.std.any()
    codes = vae.quantize.lookup(vae.quantize.nearest(posterior.mean))
    assert (codes - posterior.mean).abs().max() > 0.01, "encode does not quantise"
    decoded = vae.decode(posterior.mode())
    assert torch.equal(decoded, vae.decoder(vae.post_quant_conv(codes))) and torch.equal(decoded, vae.decode(codes))
    reconstruction, trained = vae(x)
    torch.testing.assert_close(reconstruction, decoded)
    assert torch.equal(trained.indices, vae.quantize.nearest(posterior.mean)) and trained.indices.shape == (2, 4, 6)
    ((reconstruction - x).abs().mean() + trained.loss).backward()
    for name, p in vae.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    with torch.autocast("cpu", torch.bfloat16):  # the search is in float64
        assert torch.equal(vae.quantize.nearest(posterior.mean), trained.indices)


def test_nearest_code_whatever_the_module_is_in():
    """In bfloat16 too it is the nearest to what was given, and TF32 may be asked for in PyTorch's new way."""
    generator = torch.Generator().manual_seed(0)
    quantizer, z = Quantizer(1024, 4, 0.25, False).bfloat16(), torch.randn(2, 4, 16, 16, generator=generator).bfloat16()
    torch.nn.init.normal_(quantizer.embedding.weight, generator=generator)
    rows, codes = z.double().permute(0, 2, 3, 1).reshape(-1, 1, 4), quantizer.embedding.weight.detach().double()
    wanted, matmul = (rows - codes).square().sum(-1).argmin(1), torch.backends.cuda.matmul
    assert torch.equal(quantizer.nearest(z).flatten(), wanted)
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert torch.equal(quantizer.nearest(z).flatten(), wanted)
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("option", [{}, dict(VQ), dict(latent_proj=False)], ids=["kl", "vq", "bare"])
def test_a_module_in_bfloat16_decodes_what_it_encodes(option):
    """Latents are float32, statistics may be, and images come in the type of the weights."""
    vae, x = fill(VAE(**TINY | option)), images(2, 3, 16, 24)
    half = copy.deepcopy(vae).bfloat16()
    z = half.encode(x.bfloat16()).mode().float()
    for decoded in (half.decode(z), half(x.bfloat16(), torch.zeros_like(z))[0], half.decode_tiled(z, 64)):
        assert decoded.dtype == torch.bfloat16
        torch.testing.assert_close(decoded.float(), vae.decode(z), rtol=0.1, atol=0.1)


# --- what training asks of the autoencoder ---


def test_turn_and_scale():
    x = images(2, 3, 8, 8)
    assert turn_and_scale(x, 0, 0) is x
    turned = turn_and_scale(x, 1, 0)
    for i in range(8):
        for j in range(8):
            assert torch.equal(turned[:, :, 7 - j, i], x[:, :, i, j])
    assert torch.equal(turn_and_scale(turned, 3, 0), x)
    flat = turn_and_scale(torch.full((1, 3, 8, 8), 0.7), 2, 4)
    assert flat.shape == (1, 3, 4, 4)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.7))
    assert turn_and_scale(x, 0, 4).std() < 0.8 * x.std(), "no antialiasing"
    vae, noise = fill(VAE(**TINY)), torch.randn(2, 3, 4, 4)
    x = images(2, 3, 16, 16)
    z = vae.encode(x).sample(noise)
    assert torch.equal(vae(x, noise, 3, 2)[0], vae.decode(turn_and_scale(z, 3, 2)))


def test_checkpointing_changes_nothing_but_memory():
    x, noise, gradients = images(2, 3, 16, 16), torch.randn(2, 3, 4, 4), []
    for on in (False, True):
        vae = fill(VAE(**TINY))
        vae.encoder.checkpointing = vae.decoder.checkpointing = on
        vae(x, noise)[0].square().mean().backward()
        gradients.append([p.grad for p in vae.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients)) and len(gradients[0]) == len(gradients[1])


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
    assert disc(images(2, 3, side, side)).shape == (2, 1, 1, 1), "the least that it can look at"
    assert disc(images(1, 3, 64, 96)).shape == (1, 1, 64 // 2**n_layers - 2, 96 // 2**n_layers - 2)


@pytest.mark.parametrize("n_layers, patch", [(3, 70), (2, 34), (1, 16)])
def test_a_logit_sees_one_patch(n_layers, patch):
    disc, side = Discriminator(n_layers, "none"), 4 * patch // 2**n_layers * 2**n_layers
    x = images(1, 3, side, side).requires_grad_()
    y = disc(x)
    y[0, 0, y.shape[2] // 2, y.shape[3] // 2].backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == patch


def test_discriminator_options():
    x = images(2, 3, 32, 32)
    alone = Discriminator(2, "group")
    torch.testing.assert_close(alone(x)[:1], alone(x[:1]))  # an image's logits are its own
    assert not {"GroupNorm", "BatchNorm2d"} & {type(m).__name__ for m in Discriminator(2, "none").modules()}
    normed = Discriminator(2, "none", spectral_norm=True)
    for _ in range(50):
        normed(x)
    for m in normed.main:
        if isinstance(m, torch.nn.Conv2d):
            assert torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="disc_norm='instance' is not one of group, batch, none"):
        Discriminator(3, "instance")
