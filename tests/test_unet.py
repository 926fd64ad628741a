"""The U-Net against published parameter counts, formulas written out and golden values; every option once."""

import ast
import copy
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import fill, normal

import checkpoint
import convert
import unet
from attention import Attention, use_attention
from checkpoint import UserError
from text import TextEncoder
from unet import AttentionBlock, Denoiser, ResBlock, Rescaler, SpatialTransformer, TransformerBlock, UNet

TINY = dict(in_channels=3, out_channels=3, channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_ds=(1, 2))
TINY |= dict(num_heads=2, norm_groups=4)


def inputs_of(settings, batch=2):
    """Inputs of a U-Net with these settings."""
    inputs = {"x": normal(batch, 3, 8, 12), "t": torch.linspace(3.5, 900, batch)}
    if settings.get("context_dim"):
        inputs["context"] = normal(batch, 5, settings["context_dim"], seed=1)
    if settings.get("num_classes"):
        inputs["y"] = torch.arange(batch) % settings["num_classes"]
    if settings.get("concat_channels"):
        inputs["concat"] = normal(batch, settings["concat_channels"], 8, 12, seed=2)
    return inputs


# --- the published models ---

LDM = dict(in_channels=3, out_channels=3, attention_ds=(8, 4, 2))
CIN = dict(**LDM, channels=192, channel_mult=(1, 2, 3, 5))
SD2 = dict(context_dim=1024, num_heads=0, head_dim=64, linear_proj=True)
LSUN = dict(channels=192, channel_mult=(1, 2, 2, 4, 4), attention_ds=(1, 2, 4, 8), scale_shift=True)
INPAINT = dict(**LDM, channels=256, channel_mult=(1, 2, 3, 4), concat_channels=4, resblock_updown=True)
BSR_SR = LDM | dict(channels=160, channel_mult=(1, 2, 2, 4), attention_ds=(16, 8), concat_channels=3)
SEMANTIC = LDM | dict(channels=128, channel_mult=(1, 4, 8), attention_ds=(32, 16, 8), concat_channels=3)
LAYOUT = dict(**LDM, channels=128, channel_mult=(1, 2, 3, 4), context_dim=512, transformer_depth=3)
OF_32, PLAIN = dict(num_heads=0, head_dim=32), dict(transformer_depth=0)
PUBLISHED = {
    "SD1": (859_520_964, dict(context_dim=768)),
    "SD2": (865_910_724, SD2),
    "SD2-inpaint": (865_925_124, dict(**SD2, concat_channels=5)),
    "txt2img-1p4B": (872_300_484, dict(context_dim=1280)),
    "cin256-v2": (400_920_579, dict(**CIN, num_heads=1, context_dim=512)),
    "cin256": (394_984_196, dict(**OF_32, channels=256, channel_mult=(1, 2, 4), context_dim=512)),
    "text2img256": (403_623_939, dict(**CIN, **OF_32, context_dim=640)),
    "celebahq": (274_056_163, dict(**LDM, **OF_32, **PLAIN, channels=224, channel_mult=(1, 2, 3, 4))),
    "churches": (294_966_916, dict(**LSUN, **PLAIN, resblock_updown=True)),
    "inpainting_big": (387_245_827, INPAINT | PLAIN),
    "bsr_sr": (113_622_563, BSR_SR | OF_32 | PLAIN),
    "semantic": (215_229_315, SEMANTIC | PLAIN),
    "layout": (246_277_379, LAYOUT | OF_32),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    expected, settings = PUBLISHED[name]
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(**settings).parameters()) == expected


def test_models_of_the_docstring():
    found, last = {}, {}
    for name, text in re.findall(r"^    (\S.*?)  +(.*num_heads=.*)$", unet.__doc__, re.M):
        settings = {key: ast.literal_eval(value) for key, value in re.findall(r"(\w+)=(\S+)", text)}
        last = last | settings if text.startswith("the same with") else settings
        latents = dict(in_channels=3, out_channels=3) if name.startswith("LDM") else {}
        with torch.device("meta"):
            found[name] = sum(p.numel() for p in UNet(**latents, **last).parameters())
    wanted = {"SD 1": "SD1", "SD 2": "SD2", "LDM cin256-v2": "cin256-v2", "LDM celebahq": "celebahq"}
    assert found == {name: PUBLISHED[ours][0] for name, ours in wanted.items()}


def test_defaults_are_those_of_convert():
    """convert.py imports no model: it completes the settings of other projects' files from a copy."""
    assert {name: p.default for name, p in inspect.signature(UNet).parameters.items()} == convert.UNET


# --- blocks ---


def test_timestep_embedding():
    t = torch.tensor([0.0, 1.0, 37.25, 999.0])
    embedding = unet.timestep_embedding(t, 10)
    angles = t[:, None].double() * torch.tensor([10000 ** (-i / 5) for i in range(5)]).double()
    torch.testing.assert_close(embedding.double(), torch.cat([angles.cos(), angles.sin()], 1), rtol=0, atol=2e-4)
    assert embedding.dtype == torch.float32 and (unet.timestep_embedding(t, 11)[:, 10] == 0).all()
    assert torch.equal(unet.timestep_embedding(t.long(), 10)[[0, 1, 3]], embedding[[0, 1, 3]]), "integers, too"


def test_blocks_start_as_the_identity():
    x, emb, context = normal(2, 8, 4, 6), normal(2, 32, seed=1), normal(2, 5, 12, seed=2)
    for scale_shift in (False, True):
        assert torch.equal(ResBlock(8, 8, 32, scale_shift, groups=4)(x, emb), x)
        wider = ResBlock(8, 12, 32, scale_shift, groups=4)
        assert torch.equal(wider(x, emb), wider.skip(x))
    down, up = (ResBlock(8, 8, 32, resample=resample, groups=4) for resample in ("down", "up"))
    torch.testing.assert_close(down(x, emb), x.view(2, 8, 2, 2, 3, 2).mean((3, 5)))
    assert torch.equal(up(x, emb), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    for linear in (False, True):
        assert torch.equal(AttentionBlock(8, 2, linear=linear, groups=4)(x), x)
        for linear_proj in (False, True):
            block = SpatialTransformer(8, 12, 2, 2, linear_proj, False, linear, True, groups=4)
            assert torch.equal(block(x, context), x)


def test_residual_block_formula():
    x, emb = normal(2, 8, 4, 6).double(), normal(2, 32, seed=1).double()
    for scale_shift in (False, True):
        block = fill(ResBlock(8, 12, 32, scale_shift, groups=4)).double()
        h, e = block.conv1(F.silu(block.norm1(x))), block.emb(F.silu(emb)).view(2, -1, 1, 1)
        h = block.norm2(h) * (1 + e[:, :12]) + e[:, 12:] if scale_shift else block.norm2(h + e)
        torch.testing.assert_close(block(x, emb), block.skip(x) + block.conv2(F.silu(h)))


def test_transformer_block_formula():
    x, context = normal(2, 6, 8).double(), normal(2, 5, 12, seed=1).double()
    block = fill(TransformerBlock(8, 12, 2, 4, False, False, True)).double()
    h = x + block.attn1(block.norm1(x))
    h = h + block.attn2(block.norm2(h), context)
    value, gate = block.ff[0].proj(block.norm3(h)).chunk(2, dim=-1)
    gelu = gate * (1 + torch.erf(gate / 2**0.5)) / 2
    assert value.shape == (2, 6, 32)
    torch.testing.assert_close(block(x, context), h + block.ff[1](value * gelu))


def test_resampling():
    x, down, up = normal(1, 2, 4, 6), unet.Downsample(2, "conv"), unet.Upsample(2, "conv", "nearest")
    torch.testing.assert_close(unet.Downsample(2, "pool")(x), x.view(1, 2, 2, 2, 3, 2).mean((3, 5)))
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(unet.Upsample(2, "pool", "nearest")(x), doubled)
    padded = F.pad(x, (1, 1, 1, 1))  # on all sides, unlike the autoencoder's
    torch.testing.assert_close(down(x), F.conv2d(padded, down.conv.weight, down.conv.bias, stride=2))
    torch.testing.assert_close(up(x), up.conv(doubled))
    assert torch.equal(unet.Downsample(2, "max")(x), x.view(1, 2, 2, 2, 3, 2).amax((3, 5)))
    smooth, up = F.interpolate(x, (8, 12), mode="bilinear"), unet.Upsample(2, "conv", "bilinear")
    assert torch.equal(unet.Upsample(2, "max", "bilinear")(x), smooth) and torch.equal(up(x), up.conv(smooth))


# --- the U-Net ---

EVERYTHING = dict(context_dim=12, num_classes=3, concat_channels=2)
DEEP = dict(channel_mult=(1, 2, 2), attention_ds=(4,))
GOLDEN = [  # option, fingerprint of the initial weights (seed 0), std of a float64 prediction by `fill`
    ({}, 754.92542, 0.6104884),
    (dict(scale_shift=True), -729.86239, 0.5913452),
    (dict(unet_patch=2), -445.20518, 0.5007),
    (dict(context_dim=12, context_pool=True), -1485.6688, 0.47385739),
    (dict(resblock_updown=True), 328.23427, 0.59951645),
    (dict(resample="pool"), 805.90494, 0.53260841),
    (dict(resample="max"), 805.90494, 0.55618116),
    (dict(upsample="bilinear"), 754.92542, 0.62760698),
    (dict(resample="pool", upsample="bicubic"), 805.90494, 0.5324255),
    (dict(qk_norm=True), 754.92542, 0.60931824),
    (dict(linear_attention=True), 754.92542, 0.63525117),
    (dict(attention_ds=()), -80.800386, 0.57942612),
    (dict(attention_ds=(2,)), 235.2284, 0.59628375),
    (dict(middle_attention=False), 690.59984, 0.5968626),
    (dict(num_res_blocks=2), -921.43531, 0.53857203),
    (dict(num_res_blocks=(2, 1)), 1500.3362, 0.54459853),
    (dict(num_heads=0, head_dim=4), 754.92542, 0.59952973),
    (dict(linear_proj=True), 754.92542, 0.6104884),
    (dict(transformer_depth=0), 238.22683, 0.62362549),
    (dict(transformer_depth=2), 2110.6686, 0.53270669),
    (dict(concat_channels=2), 345.83859, 0.64730186),
    (dict(num_classes=3), -644.49226, 0.60262395),
    (dict(context_dim=12), -160.15775, 0.46349049),
    (dict(context_dim=12, self_attention=False), -478.5089, 0.54915058),
    (dict(context_dim=12, self_attention=(False, True)), 949.21296, 0.55797902),
    (dict(**EVERYTHING, transformer_depth=2, linear_proj=True), -776.07531, 0.57325221),
    (dict(attention_ds=(), middle_attention=False, transformer_depth=0), 171.48903, 0.61147543),
    (dict(**PLAIN, linear_attention=True, qk_norm=True, resblock_updown=True, num_classes=3), -248.85223, 0.62623957),
    (dict(**DEEP, context_dim=12, self_attention=(False, True, True)), -564.23745, 0.48783297),
    (dict(out_channels=6), 754.92542, 0.56629934),
    (dict(norm_groups=2), 754.92542, 0.670795),
]


@pytest.mark.parametrize("option, initial, std", GOLDEN, ids=[str(option) for option, *_ in GOLDEN])
def test_options(option, initial, std):
    """Initial weights and outputs are golden values, a fresh U-Net predicts 0, gradients reach every parameter."""
    settings = TINY | option
    torch.manual_seed(0)
    net, inputs = UNet(**settings), inputs_of(settings)
    weights = [p.double().flatten()[::7].sum().item() for p in net.parameters() if p.ndim > 1]
    assert sum((i + 1) * w for i, w in enumerate(weights)) == pytest.approx(initial, rel=1e-5)
    assert not net(**inputs).any() and net.settings.items() >= settings.items()
    net, inputs = fill(net).double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    out = net(**inputs)
    assert out.shape == (2, settings["out_channels"], 8, 12)
    assert out.std().item() == pytest.approx(std, rel=1e-5)
    (out * normal(*out.shape, seed=5)).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all() and (name.endswith("to_k.bias") or p.grad.abs().sum() > 0), name


def test_every_input_matters_and_no_other_example():
    settings = TINY | EVERYTHING
    net, inputs = fill(UNet(**settings)), inputs_of(settings)
    with torch.no_grad():
        out = net(**inputs)
        for name, value in inputs.items():
            other = 2 - value if name == "y" else value + 1
            assert (net(**inputs | {name: other}) - out).abs().max() > 1e-3, name
        torch.testing.assert_close(net(**{name: value[1:] for name, value in inputs.items()}), out[1:])


def test_use_attention_and_channels_last_give_the_same():
    denoiser = fill(Denoiser(UNet(**TINY, context_dim=16), TextEncoder(16, 1, 2, 12)))
    x, t, tokens = normal(2, 3, 8, 8), torch.tensor([1.0, 9.0]), denoiser.text.tokenize(["a", "b"])
    with torch.no_grad():
        out = denoiser(x, t, tokens)
        use_attention(denoiser, "reference")
        backends = [m.backend for m in denoiser.modules() if isinstance(m, Attention)]
        assert backends == ["reference"] * 15, "of the U-Net and of the text encoder"
        denoiser.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(denoiser(x, t, tokens), out, rtol=1e-4, atol=1e-5)


def stored_for_backward(net, inputs):
    """(output, bytes that autograd stores of the forward pass, without weights and inputs)."""
    stored, others = {}, {t.untyped_storage().data_ptr() for t in (*net.parameters(), *inputs.values())}

    def pack(t):
        stored[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(**inputs)
    return out, sum(size for pointer, size in stored.items() if pointer not in others)


CHECKPOINTED = dict(context_dim=8, num_classes=3, unet_dropout=0.3), dict(transformer_depth=0, resblock_updown=True)


@pytest.mark.parametrize("settings", CHECKPOINTED, ids=["text", "no text"])
def test_checkpointing_changes_nothing_but_memory(settings):
    inputs, results, stored = inputs_of(settings), [], []
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    for on in (False, True):
        net, inputs["x"] = fill(UNet(**TINY | settings)).double(), inputs["x"].detach().requires_grad_()
        net.checkpointing = on
        torch.manual_seed(0)
        out, size = stored_for_backward(net, inputs)
        stored.append(size)
        torch.manual_seed(1)  # dropout is the same when recomputed
        out.square().mean().backward()
        results.append([out, inputs["x"].grad, *(p.grad for p in net.parameters())])
    assert all(map(torch.equal, *results))
    assert stored[1] < stored[0] / 4, stored


@pytest.mark.parametrize("checkpointing", (False, True))
def test_compiles_without_graph_breaks(checkpointing):
    settings = dict(channel_mult=(1,), attention_ds=(), context_dim=8)
    net, inputs = fill(UNet(**TINY | settings)), inputs_of(settings)
    net.checkpointing = checkpointing
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(**inputs), net(**inputs))


BAD = [
    (dict(num_heads=3), "num_heads=3, head_dim=0: must divide the 16 channels"),
    (dict(attention_ds=(), channels=12, num_heads=0, head_dim=5), "must divide the 24 channels"),  # in the middle
    (dict(num_heads=2, head_dim=8), "num_heads=2, head_dim=8: one of them must be 0"),
    (dict(num_heads=0), "num_heads=0, head_dim=0: one of them must be 0"),
    (dict(channels=12, channel_mult=(2, 4), norm_groups=8), "norm_groups=8: must divide the 12 channels"),
    (dict(resample="nearest"), "resample='nearest': must be one of conv, pool, max"),
    (dict(context_dim=8, transformer_depth=0), "context_dim=8: needs transformer_depth >= 1"),
    (dict(context_dim=8, attention_ds=(4,), middle_attention=False), "context_dim=8: needs attention_ds"),
    (dict(context_pool=True), "context_pool=True: needs context_dim > 0"),
    (dict(self_attention=False), "self_attention=False: needs context_dim > 0"),
    (dict(num_res_blocks=(1, 1, 1)), r"num_res_blocks=\(1, 1, 1\): .* one for each of the 2 levels"),
]


@pytest.mark.parametrize("settings, message", BAD, ids=str)
def test_bad_settings(settings, message):
    with pytest.raises(AssertionError, match=message):
        UNet(**TINY | settings)


# --- the denoiser ---


def test_denoiser_with_every_condition():
    """The U-Net's inputs for each condition, written out; gradients reach the modules trained with it."""
    x, t, y = normal(2, 3, 8, 8), torch.tensor([10.0, 500.0]), torch.tensor([0, 2])
    text, tokens = fill(TextEncoder(16, 1, 2, 12)), torch.nn.Embedding(3, 16)
    ids, context = text.tokenize(["a red star", "circle"]), normal(2, 4, 16, seed=2)
    maps = F.one_hot(torch.arange(128).view(2, 8, 8) % 5, 5).permute(0, 3, 1, 2)
    rescaler, plain, with_concat = Rescaler(5, 1), dict(TINY, context_dim=16), dict(TINY, concat_channels=3)
    for parts, condition, inputs in (
        ([UNet(**plain), text], dict(tokens=ids), lambda: dict(context=text(ids))),
        ([UNet(**plain)], dict(context=context), lambda: dict(context=context)),
        ([UNet(**plain), None, tokens], dict(y=y), lambda: dict(context=tokens(y)[:, None])),
        ([UNet(**TINY, num_classes=3)], dict(y=y), lambda: dict(y=y)),
        ([UNet(**with_concat)], dict(concat=x), lambda: dict(concat=x)),
        ([UNet(**with_concat), None, None, rescaler], dict(concat=maps), lambda: dict(concat=rescaler(maps))),
        ([UNet(**TINY)], {}, dict),
    ):
        denoiser = Denoiser(fill(parts[0]), *parts[1:])
        out, wanted = denoiser(x, t, **condition), inputs()
        assert torch.equal(out, denoiser.unet(x, t, **wanted))
        assert denoiser.condition(**condition).keys() == wanted.keys(), "what is None is left out"
        out.square().sum().backward()
        for part in filter(None, parts[1:]):
            assert all(p.grad.isfinite().all() for p in part.parameters())
    assert (text.token_embedding.weight.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == ids.unique().tolist()
    assert (tokens.weight.grad.abs().sum(1) > 0).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", (torch.int64, torch.uint8, torch.bool, torch.float32))
def test_rescaler_averages_maps_of_any_dtype(dtype):
    maps = F.one_hot(torch.arange(64).view(1, 8, 8) % 5, 5).permute(0, 3, 1, 2)
    rescaler = Rescaler(5, 4)
    means = maps.double().unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5))  # of 4 x 4 pixels
    wanted = torch.einsum("bkhw,ck->bchw", means, rescaler.conv.weight[:, :, 0, 0].double())
    torch.testing.assert_close(rescaler(maps.to(dtype)).double(), wanted, rtol=0, atol=1e-6)


def test_uncertainty_is_a_log_variance_for_each_noise_level():
    denoiser, x, t = Denoiser(UNet(**TINY), uncertainty=True), normal(2, 3, 8, 8), torch.tensor([10.0, 500.0])
    assert not denoiser(x, t)[1].any(), "starts at 0"
    fill(denoiser)
    with torch.autocast("cpu", torch.bfloat16):
        prediction, log_variance = denoiser(x, t)
    wanted = denoiser.log_variance(unet.timestep_embedding(t, 64))[:, 0]
    torch.testing.assert_close(log_variance, wanted, rtol=1e-5, atol=1e-6, msg="in float32 under autocast")
    assert prediction.shape == x.shape and torch.is_tensor(denoiser.eval()(x, t)), "in training only"


# --- checkpoints, and an architecture of one's own ---


class Own(torch.nn.Module):
    """The smallest denoiser with the interface of a U-Net."""

    side_multiple = 1

    def __init__(self, width=3):
        super().__init__()
        self.settings, self.conv = {"width": width}, torch.nn.Conv2d(3, width, 1)

    def forward(self, x, t, context=None, y=None, concat=None):
        return self.conv(x) + t.view(-1, 1, 1, 1) / 1000


def write_run(path, denoiser, vae=None, **changes):
    """A stage-2 checkpoint whose EMA is `denoiser`."""
    text = denoiser.text
    meta = {"stage": "ldm", "run": 1, "step": 1, "config": {}, "vae": vae}
    meta["model"] = {"unet": denoiser.unet.settings, "text": text and text.settings}
    tensors = checkpoint.with_prefix("ema", denoiser.state_dict())
    if text:
        tensors["text.bpe"] = torch.tensor(list(text.bpe()), dtype=torch.uint8)
    checkpoint.write(str(path), tensors, meta | changes)
    return str(path)


VAE_F4, MAPS = dict(patch_size=2, ch_mult=(1, 2)), normal(2, 5, 32, 32)
TEXT = dict(tokens=["a", "b"])
DENOISERS = {
    "text": (lambda: Denoiser(UNet(**TINY, context_dim=16), TextEncoder(16, 1, 2, 12)), TEXT),
    "token": (lambda: Denoiser(UNet(**TINY, context_dim=8), None, torch.nn.Embedding(3, 8)), dict(y=torch.arange(2))),
    "maps": (lambda: Denoiser(UNet(**TINY, concat_channels=3), None, None, Rescaler(5, 4)), dict(concat=MAPS)),
    "uncertainty": (lambda: Denoiser(UNet(**TINY | dict(num_res_blocks=(1, 2))), uncertainty=True), {}),
    "own": (lambda: Denoiser(Own()), {}),
}


@pytest.mark.parametrize("name", DENOISERS)
@torch.no_grad()
def test_from_pretrained(name, tmp_path):
    make, condition = DENOISERS[name]
    denoiser, x, t = fill(make()).eval(), normal(2, 3, 8, 8), torch.tensor([10.0, 500.0])
    path, unet_class = write_run(tmp_path / "latest.safetensors", denoiser, VAE_F4), type(denoiser.unet)
    loaded = Denoiser.from_pretrained(tmp_path, unet_class=unet_class)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert checkpoint.hash_weights(loaded) == checkpoint.hash_weights(denoiser)
    assert loaded.unet.settings == denoiser.unet.settings, "tuples are tuples again"
    if "tokens" in condition:
        condition = {"tokens": denoiser.text.tokenize(condition["tokens"])}
        assert torch.equal(loaded.text.tokenize(["a"]), denoiser.text.tokenize(["a"]))
    assert torch.equal(loaded(x, t, **condition), denoiser(x, t, **condition))
    if unet_class is UNet:
        assert checkpoint.hash_weights(UNet.from_pretrained(path)) == checkpoint.hash_weights(denoiser.unet)


def test_checkpoints_that_do_not_fit(tmp_path):
    denoiser, path = fill(Denoiser(UNet(**TINY, context_dim=16), TextEncoder(16, 1, 2, 12))), tmp_path / "a.safetensors"
    settings = denoiser.unet.settings
    for changes, message in (
        ({"stage": "vae"}, "stage vae, without a denoiser"),
        ({"model": {"unet": settings | {"channels": 32}, "text": None}}, "its settings need"),
        ({"model": {"unet": settings | {"num_heads": 3}, "text": None}}, "do not build a UNet .*must divide"),
        ({"model": {"unet": settings | {"num_res_blocks": 10**9}, "text": None}}, "num_res_blocks=1000000000"),
        ({"model": {"unet": settings, "text": None}}, "tensor text"),
    ):
        with pytest.raises(UserError, match=f"a.safetensors: .*{message}"):
            Denoiser.from_pretrained(write_run(path, denoiser, **changes))
    with pytest.raises(UserError, match="holds its settings; leave out num_heads"):
        UNet.from_pretrained(write_run(path, denoiser), num_heads=2)


def test_from_pretrained_with_a_posthoc_ema(tmp_path):
    """From snapshots with averages of two lengths."""
    denoiser = Denoiser(UNet(**TINY))
    for step in (1, 2, 3):
        averages = [fill(copy.deepcopy(denoiser), 2 * step + i).state_dict() for i in (0, 1)]
        tensors = [checkpoint.with_prefix(f"ema_power_{i}", average) for i, average in enumerate(averages)]
        meta = {"stage": "ldm", "snapshot": True, "run": 1, "step": step, "config": {}, "vae": None}
        meta["model"] = {"unet": denoiser.unet.settings, "text": None, "ema_stds": [0.05, 0.1]}
        checkpoint.write(f"{tmp_path}/ema_{step:07d}.safetensors", tensors[0] | tensors[1], meta)
    path = f"{tmp_path}/ema_0000003.safetensors"
    loaded = Denoiser.from_pretrained(path, ema_std=0.05)
    wanted = checkpoint.part(checkpoint.read(path, "ema_power_0")[0], "ema_power_0")
    for name, t in loaded.state_dict().items():
        torch.testing.assert_close(t, wanted[name], rtol=1e-4, atol=1e-5)
