"""The denoiser against published parameter counts and written-out formulas, every option once; tokenizers and text."""

import ast
import base64
import copy
import math
import re

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from conftest import fill

import train_ldm
import unet
from attention import Attention, attention
from text import TextEncoder, make_tokenizer
from unet import (
    AttentionBlock,
    Denoiser,
    Downsample,
    ResBlock,
    Rescaler,
    SpatialTransformer,
    TransformerBlock,
    UNet,
    Upsample,
    timestep_embedding,
)

TINY = dict(in_channels=3, out_channels=3, channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_ds=(1, 2))
TINY |= dict(num_heads=2, norm_groups=4)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs_of(settings, batch=2):
    """What a U-Net of these settings is called with."""
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
HEADS_OF_32 = dict(num_heads=0, head_dim=32)
SD2 = dict(context_dim=1024, num_heads=0, head_dim=64, linear_proj=True)
PUBLISHED = {
    "SD1": (859_520_964, dict(context_dim=768)),
    "SD2": (865_910_724, SD2),
    "SD2-inpaint": (865_925_124, dict(**SD2, concat_channels=5)),
    "txt2img-1p4B": (872_300_484, dict(context_dim=1280)),
    "cin256-v2": (400_920_579, dict(**LDM, channels=192, channel_mult=(1, 2, 3, 5), num_heads=1, context_dim=512)),
    "cin256": (394_984_196, dict(**HEADS_OF_32, channels=256, channel_mult=(1, 2, 4), context_dim=512)),
    "text2img256": (
        403_623_939,
        dict(**LDM, **HEADS_OF_32, channels=192, channel_mult=(1, 2, 3, 5), context_dim=640),
    ),
    "celebahq": (
        274_056_163,
        dict(**LDM, **HEADS_OF_32, channels=224, channel_mult=(1, 2, 3, 4), transformer_depth=0),
    ),
    "churches": (
        294_966_916,
        dict(
            channels=192,
            channel_mult=(1, 2, 2, 4, 4),
            attention_ds=(1, 2, 4, 8),
            transformer_depth=0,
            scale_shift=True,
            resblock_updown=True,
        ),
    ),
    "inpainting_big": (
        387_245_827,
        dict(
            **LDM,
            channels=256,
            channel_mult=(1, 2, 3, 4),
            transformer_depth=0,
            concat_channels=4,
            resblock_updown=True,
        ),
    ),
    "bsr_sr": (
        113_622_563,
        dict(
            **LDM | dict(attention_ds=(16, 8)),
            **HEADS_OF_32,
            channels=160,
            channel_mult=(1, 2, 2, 4),
            transformer_depth=0,
            concat_channels=3,
        ),
    ),
    "semantic": (
        215_229_315,
        dict(
            **LDM | dict(attention_ds=(32, 16, 8)),
            channels=128,
            channel_mult=(1, 4, 8),
            transformer_depth=0,
            concat_channels=3,
        ),
    ),
    "layout": (
        246_277_379,
        dict(**LDM, **HEADS_OF_32, channels=128, channel_mult=(1, 2, 3, 4), context_dim=512, transformer_depth=3),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    expected, settings = PUBLISHED[name]
    with torch.device("meta"):
        unet = UNet(**settings)
    assert sum(p.numel() for p in unet.parameters()) == expected


def test_models_of_the_docstring():
    """The settings that stand there, taken as they stand, make the published models."""
    found, last = {}, {}
    for name, text in re.findall(r"^    (\S.*?)  +(.*num_heads=.*)$", unet.__doc__, re.M):
        given = {key: ast.literal_eval(value) for key, value in re.findall(r"(\w+)=(\S+)", text)}
        last = last | given if text.startswith("the same with") else given
        latents = dict(in_channels=3, out_channels=3) if name.startswith("LDM") else {}  # as the line above them says
        with torch.device("meta"):
            found[name] = sum(p.numel() for p in UNet(**latents, **last).parameters())
    wanted = {"SD 1": "SD1", "SD 2": "SD2", "LDM cin256-v2": "cin256-v2", "LDM celebahq": "celebahq"}
    assert found == {name: PUBLISHED[ours][0] for name, ours in wanted.items()}


# --- attention ---


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("L, M, d", [(7, 7, 8), (6, 11, 5), (11, 6, 1), (1, 1, 40)])
def test_attention_is_its_formula(L, M, d, causal):
    """The fast path, the reference and the formula written out: values and gradients, in float64."""
    tensors = [normal(2, n, 3, d, seed=i, dtype=torch.float64) for i, n in enumerate((L, M, M))]
    logits = torch.einsum("blhd,bmhd->bhlm", *tensors[:2]) / d**0.5
    if causal:  # query l sees keys 0..l
        logits = logits.masked_fill(torch.arange(M)[None] > torch.arange(L)[:, None], -math.inf)
    expected = torch.einsum("bhlm,bmhd->blhd", logits.exp() / logits.exp().sum(-1, keepdim=True), tensors[2])
    gradients, weight = [], normal(2, L, 3, d, seed=9, dtype=torch.float64)
    for backend in ("auto", "sdpa", "reference"):
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        out = attention(q, k, v, causal=causal, backend=backend)
        assert out.shape == (2, L, 3, d) and out.dtype == torch.float64
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        gradients.append(torch.autograd.grad((out * weight).sum(), (q, k, v)))
    for fast in gradients[:2]:
        torch.testing.assert_close(fast, gradients[2], rtol=1e-10, atol=1e-10)


def test_attention_in_bfloat16():
    q, k, v = (normal(2, 9, 2, 16, seed=i) for i in range(3))
    halves = [x.bfloat16() for x in (q, k, v)]
    for backend in ("sdpa", "reference"):
        out = attention(*halves, backend=backend)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), attention(q, k, v), rtol=0, atol=0.03)


def test_attention_errors():
    q, k = torch.zeros(2, 5, 3, 8), torch.zeros(2, 7, 3, 8)
    for bad in ((q, k, q), (q, k[:1], k[:1]), (q, k[:, :, :2], k[:, :, :2]), (q, k[..., :4], k[..., :4])):
        with pytest.raises(ValueError, match=r"q \(2, 5, 3, 8\), k .* do not fit together"):
            attention(*bad)
    with pytest.raises(ValueError, match="backend 'flash' is not one of auto, triton, "):
        attention(q, q, q, backend="flash")


def test_attention_module_and_its_linear_kind():
    x, context = normal(2, 6, 8).double(), normal(2, 4, 10, seed=1).double()
    cross = fill(Attention(8, 10, 3, 5, qk_norm=True)).double()
    q, k, v = cross.to_q(x).view(2, 6, 3, 5), cross.to_k(context).view(2, 4, 3, 5), cross.to_v(context).view(2, 4, 3, 5)
    q, k = (a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt() for a in (q, k))
    q, k = q * cross.q_norm.weight, k * cross.k_norm.weight
    weights = (torch.einsum("blhd,bmhd->bhlm", q, k) / 5**0.5).softmax(-1)
    expected = cross.to_out(torch.einsum("bhlm,bmhd->blhd", weights, v).reshape(2, 6, 15))
    torch.testing.assert_close(cross(x, context), expected)

    linear = fill(Attention(8, 8, 2, 4, linear=True)).double()
    q, k, v = (f(x).view(2, 6, 2, 4) for f in (linear.to_q, linear.to_k, linear.to_v))
    weights = torch.einsum("blhd,bmhd->bhlm", q.softmax(3), k.exp() / k.exp().sum(1, keepdim=True))
    expected = linear.to_out(torch.einsum("bhlm,bmhd->blhd", weights, v).reshape(2, 6, 8))
    torch.testing.assert_close(linear(x), expected)

    causal = fill(Attention(8, 8, 2, 4, causal=True)).double()
    later = x.clone()
    later[:, 3:] += 1
    torch.testing.assert_close(causal(later)[:, :3], causal(x)[:, :3])
    assert not torch.allclose(causal(later)[:, 3:], causal(x)[:, 3:])


# --- blocks ---


def test_timestep_embedding():
    t = torch.tensor([0.0, 1.0, 37.25, 999.0])
    embedding = timestep_embedding(t, 10)
    assert embedding.shape == (4, 10) and embedding.dtype == torch.float32
    for b, time in enumerate(t.tolist()):
        for i in range(5):
            angle = time * 10000 ** (-i / 5)
            assert embedding[b, i].item() == pytest.approx(math.cos(angle), abs=2e-4)
            assert embedding[b, 5 + i].item() == pytest.approx(math.sin(angle), abs=2e-4)
    assert timestep_embedding(t, 11).shape == (4, 11) and (timestep_embedding(t, 11)[:, 10] == 0).all()
    assert torch.equal(timestep_embedding(t.long(), 10)[[0, 1, 3]], embedding[[0, 1, 3]]), "indices do as well"


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


@pytest.mark.parametrize("settings", [dict(context_dim=8), dict(transformer_depth=0, num_classes=3)])
def test_a_fresh_unet_predicts_exactly_nothing(settings):
    assert (UNet(**TINY, **settings)(**inputs_of(settings)) == 0).all()


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
    x = normal(1, 2, 4, 6)
    torch.testing.assert_close(Downsample(2, "pool")(x), x.view(1, 2, 2, 2, 3, 2).mean((3, 5)))
    assert torch.equal(Upsample(2, "pool")(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    down, up = Downsample(2, "conv"), Upsample(2, "conv")
    padded = F.pad(x, (1, 1, 1, 1))  # on all sides, unlike the autoencoder's
    torch.testing.assert_close(down(x), F.conv2d(padded, down.conv.weight, down.conv.bias, stride=2))
    assert up(x).shape == (1, 2, 8, 12) and down(x).shape == (1, 2, 2, 3)


# --- the whole ---

OPTIONS = [
    dict(scale_shift=True),
    dict(unet_patch=2),
    dict(context_dim=12, context_pool=True),
    dict(resblock_updown=True),
    dict(resample="pool"),
    dict(qk_norm=True),
    dict(linear_attention=True),
    dict(attention_ds=()),
    dict(attention_ds=(2,)),
    dict(middle_attention=False),
    dict(num_res_blocks=2),
    dict(num_res_blocks=(2, 1)),
    dict(num_heads=0, head_dim=4),
    dict(num_heads=4),
    dict(linear_proj=True),
    dict(transformer_depth=0),
    dict(transformer_depth=2),
    dict(concat_channels=2),
    dict(num_classes=3),
    dict(context_dim=12),
    dict(context_dim=12, self_attention=False),
    dict(context_dim=12, self_attention=(False, True)),
    dict(context_dim=12, num_classes=3, concat_channels=2, transformer_depth=2, linear_proj=True, scale_shift=True),
    dict(attention_ds=(), middle_attention=False, transformer_depth=0, qk_norm=True),
    dict(transformer_depth=0, linear_attention=True, qk_norm=True, resblock_updown=True, num_classes=3),
    dict(channel_mult=(1, 2, 2), attention_ds=(4,), context_dim=12, self_attention=(False, True, True)),
    dict(out_channels=6),
    dict(norm_groups=2),
]


@pytest.fixture(scope="module")
def plain():
    """What a U-Net of no option predicts."""
    with torch.no_grad():
        return fill(UNet(**TINY))(**inputs_of({}))


@pytest.mark.parametrize("option", [{}, *OPTIONS], ids=str)
def test_options(plain, option):
    """Every option builds, changes the function, and lets gradients reach every parameter."""
    settings = TINY | option
    unet, inputs = fill(UNet(**settings)), inputs_of(settings)
    assert unet.settings.items() >= settings.items()
    out = unet(**inputs)
    assert out.shape == (2, settings["out_channels"], 8, 12) and out.isfinite().all()
    (out * normal(*out.shape, seed=5)).sum().backward()
    for name, p in unet.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if not name.endswith("to_k.bias"):  # which a softmax does not see
            assert p.grad.abs().sum() > 0, name
    if option and option != dict(linear_proj=True):  # which is the same function, see below
        assert out.shape != plain.shape or (out - plain).abs().max() > 1e-3, "the option changes nothing"


def test_every_input_is_listened_to():
    settings = dict(**TINY, context_dim=12, num_classes=3, concat_channels=2)
    unet, inputs = fill(UNet(**settings)), inputs_of(settings)
    with torch.no_grad():
        out = unet(**inputs)
        for name, value in inputs.items():
            other = 2 - value if name == "y" else value + 1
            assert (unet(**inputs | {name: other}) - out).abs().max() > 1e-3, name
        alone = unet(**{name: value[1:] for name, value in inputs.items()})
        torch.testing.assert_close(alone, out[1:], msg="an example does not depend on its batch")


def test_num_heads_and_head_dim_say_the_same():
    same = TINY | dict(channel_mult=(1, 1))  # 16 channels: two heads of eight
    with torch.no_grad():
        by_number = fill(UNet(**same))(**inputs_of({}))
        assert torch.equal(fill(UNet(**same | dict(num_heads=0, head_dim=8)))(**inputs_of({})), by_number)
        other = fill(UNet(**same | dict(num_heads=0, head_dim=4)))(**inputs_of({}))
    assert not torch.allclose(other, by_number, atol=1e-4)

    def heads(**settings):  # 16 channels at the first level, 32 at the second and in the middle
        unet = UNet(**TINY | settings)
        return [m.num_heads for m in unet.modules() if isinstance(m, Attention)][::2]

    assert heads(num_heads=2) == [2] * 7
    assert heads(num_heads=0, head_dim=8) == [2, 4, 4, 4, 4, 2, 2]


@pytest.mark.parametrize("depth", [1, 2])
def test_linear_and_convolutional_projections_are_one_function(depth):
    settings = dict(**TINY, context_dim=12, transformer_depth=depth)
    conv, linear = fill(UNet(**settings)), UNet(**settings, linear_proj=True)
    weights = conv.state_dict()
    projections = [name for name in weights if name.endswith(("proj_in.weight", "proj_out.weight"))]
    assert len(projections) == 2 * 7  # 2 stages down, the middle and 4 up
    linear.load_state_dict({name: w[:, :, 0, 0] if name in projections else w for name, w in weights.items()})
    with torch.no_grad():
        torch.testing.assert_close(linear(**inputs_of(settings)), conv(**inputs_of(settings)), rtol=1e-4, atol=1e-5)


def test_self_attention_is_a_matter_of_levels():
    settings = dict(**TINY, context_dim=12)
    unet = UNet(**settings, self_attention=(False, True))
    transformers = [m for m in unet.modules() if isinstance(m, SpatialTransformer)]
    looks_at = [block.blocks[0].attn1.to_k.in_features for block in transformers]
    assert looks_at == [12, 32, 32, 32, 32, 12, 12]  # down 1, 2; middle; up 2, 2, 1, 1
    assert (
        len(
            [
                m
                for m in UNet(**TINY | dict(attention_ds=(), middle_attention=False)).modules()
                if isinstance(m, Attention)
            ]
        )
        == 0
    )


def test_channels_last_gives_the_same():
    settings = dict(**TINY, context_dim=12)
    unet, inputs = fill(UNet(**settings)), inputs_of(settings)
    with torch.no_grad():
        out = unet(**inputs)
        unet.to(memory_format=torch.channels_last)
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(unet(**inputs), out, rtol=1e-4, atol=1e-5)


def kept_for_backward(unet, inputs):
    """(output, bytes that autograd keeps of the forward pass, weights and inputs left out)."""
    kept, given = {}, {t.untyped_storage().data_ptr() for t in (*unet.parameters(), *inputs.values())}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = unet(**inputs)
    return out, sum(size for place, size in kept.items() if place not in given)


CHECKPOINTED = {
    "text": dict(context_dim=8, linear_proj=True, num_classes=3),
    "no text": dict(transformer_depth=0, resblock_updown=True, scale_shift=True, concat_channels=2),
    "dropout": dict(context_dim=8, unet_dropout=0.3),
}


@pytest.mark.parametrize("settings", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_checkpointing_changes_nothing_but_memory(settings):
    inputs, results, kept = inputs_of(settings), [], []
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    for on in (False, True):
        unet, inputs["x"] = fill(UNet(**TINY | settings)).double(), inputs["x"].detach().requires_grad_()
        unet.checkpointing = on
        torch.manual_seed(0)
        out, size = kept_for_backward(unet, inputs)
        kept.append(size)
        torch.manual_seed(1)  # dropout computed again is not drawn again
        out.square().mean().backward()
        results.append([out, inputs["x"].grad, *(p.grad for p in unet.parameters())])
    assert all(map(torch.equal, *results))
    assert kept[1] < kept[0] / 4, kept
    with torch.no_grad():
        assert not unet(**inputs).requires_grad


def test_checkpointing_compiles():
    inputs, results = inputs_of(dict(context_dim=8)), []
    for on in (False, True):
        unet = fill(UNet(**TINY | dict(channel_mult=(1,)), context_dim=8))
        unet.checkpointing = on
        net = torch.compile(unet, backend="aot_eager", fullgraph=True) if on else unet
        out = net(**inputs)
        out.square().mean().backward()
        results.append([out, *(p.grad for p in unet.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["context", "y", "concat"])
def test_conditions_missing_or_superfluous(name):
    settings = {"context": dict(context_dim=12), "y": dict(num_classes=3), "concat": dict(concat_channels=2)}[name]
    extra = inputs_of(settings)
    with pytest.raises(ValueError, match=f"takes a {name} and was given none"):
        UNet(**TINY, **settings)(**inputs_of({}))
    with pytest.raises(ValueError, match=f"takes no {name} and was given one"):
        UNet(**TINY)(**extra)


def test_what_a_denoiser_needs_is_named():
    x, t = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    with pytest.raises(ValueError, match="takes a context and was given none"):
        Denoiser(UNet(**TINY, context_dim=12), class_tokens=torch.nn.Embedding(3, 12))(x, t)
    with pytest.raises(ValueError, match="takes a concat and was given none"):
        Denoiser(UNet(**TINY, concat_channels=3), rescaler=Rescaler(5, 4))(x, t)
    with pytest.raises(ValueError, match="no text encoder of its own for tokens: give it a context"):
        Denoiser(UNet(**TINY, context_dim=12))(x, t, tokens=torch.zeros(2, 4, dtype=torch.long))


def test_one_time_and_one_class_for_each_image():
    x, t, y = torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    unet = UNet(**TINY, num_classes=3)
    for name, inputs, shape in (
        ("t", (t[0], y), "()"),
        ("t", (t[:, None], y), "(2, 1)"),
        ("y", (t, y[:, None]), "(2, 1)"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{name} has shape {shape}: give one number for each image")):
            unet(x, inputs[0], y=inputs[1])


@pytest.mark.parametrize("dtype", (torch.int64, torch.uint8, torch.bool, torch.float32))
def test_maps_of_any_type_are_rescaled(dtype):
    maps = torch.nn.functional.one_hot(torch.arange(64).view(1, 8, 8) % 5, 5).permute(0, 3, 1, 2)
    rescaler = Rescaler(5, 4)
    means = maps.double().unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5))  # of 4 x 4 pixels
    wanted = torch.einsum("bkhw,ck->bchw", means, rescaler.conv.weight[:, :, 0, 0].double())
    torch.testing.assert_close(rescaler(maps.to(dtype)).double(), wanted, rtol=0, atol=1e-6)


def test_sides_that_do_not_divide():
    unet = UNet(**TINY | dict(channel_mult=(1, 2, 2)))
    assert unet.side_multiple == 4
    for shape, side in (((2, 3, 8, 10), 10), ((2, 3, 7, 8), 7)):
        with pytest.raises(ValueError, match=f"latent side {side} is not a multiple of 4: choose another image size"):
            unet(torch.zeros(shape), torch.zeros(2))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_heads=3), "16 channels do not divide into heads: num_heads=3, head_dim=0"),
        (dict(num_heads=0, head_dim=32), "16 channels do not divide into heads: num_heads=0, head_dim=32"),
        (dict(attention_ds=(), channels=12, num_heads=5), "24 channels do not divide into heads"),  # in the middle
        (dict(num_heads=2, head_dim=8), "num_heads=2 and head_dim=8: set one of them and the other to 0"),
        (dict(num_heads=0), "num_heads=0 and head_dim=0: set one"),
        (dict(norm_groups=32), "16 channels do not divide into norm_groups=32"),
        (dict(channels=12, channel_mult=(2, 4), norm_groups=8), "12 channels do not divide into norm_groups=8"),
        (dict(resample="nearest"), "resample='nearest' is not one of conv, pool"),
        (dict(context_dim=8, transformer_depth=0), "context needs transformer blocks: set transformer_depth"),
        (dict(context_dim=8, attention_ds=(4,), middle_attention=False), "context needs attention that looks at it"),
        (dict(self_attention=False), "nothing to attend to without a context: set context_dim"),
        (dict(num_res_blocks=(1, 1, 1)), "one for each of the 2 levels"),
        (dict(self_attention=(True, True, False)), "one for each of the 2 levels"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        UNet(**TINY | settings)


def test_overfits_one_batch():
    """Four latents with their noise, by the very step that training takes: the v loss falls from 1 to under 0.01."""
    torch.manual_seed(0)
    cfg = dict(objective="v", schedule="cosine", beta_start=0.0, beta_end=0.0, zero_snr=False, timesteps="uniform")
    cfg |= dict(cond_drop=0.0, loss_type="mse", loss_weight="none")
    unet = UNet(3, 3, channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_ds=(2,), norm_groups=8)
    models, batch = {"denoiser": Denoiser(unet)}, {"x0": normal(4, 3, 8, 8)}
    noise = {"eps": normal(4, 3, 8, 8, seed=1), "t": torch.tensor([0.1, 0.4, 0.7, 0.95]), "drop": torch.ones(4)}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=4e-3)
    losses = []
    for _ in range(50):
        losses.append(train_ldm.train_step(models, batch, noise, cfg)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    first, last = losses[0].item(), losses[-1].item()
    assert 0.8 < first < 1.2, "an untrained U-Net predicts 0, and v has unit variance"
    assert last < 0.01, last


# --- text ---

PROMPTS = ["a red star", "", "naïve 漢字", "🌟👩‍🚀 two\n\tlines  ", "x" * 2000]
MERGES = [b"re", b"red", b" red", b" s", b" st"]


def tiktoken_file(merges=MERGES):
    tokens = [bytes([i]) for i in range(256)] + merges
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    return TextEncoder(text_width=16, text_layers=2, text_heads=2, text_length=12, tokenizer=tiktoken_file()).eval()


def test_bytes_are_their_own_tokens():
    tokenizer = make_tokenizer("bytes")
    assert tokenizer.n_vocab == 256
    for prompt in PROMPTS:
        assert tokenizer.encode_ordinary(prompt) == list(prompt.encode())
        assert tokenizer.decode(tokenizer.encode_ordinary(prompt)) == prompt


def test_tokenizer_from_a_file_by_path_and_by_content(tmp_path):
    file = tmp_path / "bpe.tiktoken"
    file.write_bytes(tiktoken_file() + b"\n")
    by_path, by_content = make_tokenizer(str(file)), make_tokenizer(tiktoken_file())
    assert by_path.n_vocab == by_content.n_vocab == 261
    assert by_path.encode_ordinary("a red st") == [ord("a"), 258, 260]
    for prompt in PROMPTS:
        ids = by_path.encode_ordinary(prompt)
        assert by_content.encode_ordinary(prompt) == ids and by_path.decode(ids) == prompt


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no base64 here", "not a .tiktoken file"),
        (b"YQ== zero\n", "not a .tiktoken file of 'base64 rank' lines: invalid literal"),
        (tiktoken_file()[:-3], "ranks 0, 1, 2, ... once each"),  # cut short: the last rank is 2
        (tiktoken_file().replace(b" 260\n", b" 259\n"), "ranks 0, 1, 2, ... once each"),
        (b"".join(tiktoken_file().splitlines(True)[1:]), "all 256 single bytes"),
        (b"YQ== 0\nYg== 1\n", "all 256 single bytes"),
    ],
)
def test_bad_tokenizer_files(tmp_path, content, message):
    file = tmp_path / "bad.tiktoken"
    file.write_bytes(content)
    for source in (content, str(file)):
        with pytest.raises(ValueError, match=message):
            make_tokenizer(source)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="all 256 single bytes"):
        make_tokenizer(str(file))


def test_unknown_tokenizer_names(monkeypatch):
    with pytest.raises(ValueError, match="'gpt7' is no file, not 'bytes', and no name that tiktoken knows"):
        make_tokenizer("gpt7")

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match=r"'gpt2' could not be fetched \(ConnectionError\): use bytes or a file"):
        make_tokenizer("gpt2")


def test_bpe_makes_the_same_tokenizer_again(text, monkeypatch):
    assert text.bpe() == tiktoken_file()
    for source in ("bytes", tiktoken_file()):
        first = TextEncoder(8, 1, 1, 30, source)
        again = TextEncoder(8, 1, 1, 30, first.bpe())
        assert again.bpe() == first.bpe() and (again.end, again.pad) == (first.end, first.pad)
        assert torch.equal(again.tokenize(PROMPTS), first.tokenize(PROMPTS))
    # a tokenizer of tiktoken's own is stored by its name
    ranks = {bytes([255 - i]): i for i in range(256)}
    own = tiktoken.Encoding("own", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", {"own": own}.__getitem__)
    first = TextEncoder(8, 1, 1, 30, "own")
    assert first.bpe() == b"own" and first.end == 257
    assert torch.equal(TextEncoder(8, 1, 1, 30, first.bpe()).tokenize(PROMPTS), first.tokenize(PROMPTS))


def test_tokenize_pads_and_cuts(text):
    end, pad = 261, 262
    assert (text.end, text.pad) == (end, pad) and text.token_embedding.num_embeddings == 263
    rows = text.tokenize(["a red star", "", "abcdefghijk", "abcdefghijkl"])
    assert rows.shape == (4, 12) and rows.dtype == torch.long
    assert rows[0].tolist() == [ord("a"), 258, 260, ord("a"), ord("r"), end] + [pad] * 6
    assert rows[1].tolist() == [end] + [pad] * 11
    assert rows[2].tolist() == [*b"abcdefghijk", end]
    assert rows[3].tolist() == [*b"abcdefghijk", end], "cut, and ended all the same"
    assert text.tokenize([]).shape == (0, 12)


def test_one_string_is_no_list_of_prompts(text):
    with pytest.raises(ValueError, match="one string, 'a red star', where a list of them is wanted"):
        text("a red star")


def test_count_tokens(text):
    counts = [text.count_tokens(prompt) for prompt in PROMPTS]
    assert counts == [6, 1, len("naïve 漢字".encode()) + 1, len(PROMPTS[3].encode()) + 1, 2001]


def test_text_encoder(text):
    with torch.no_grad():
        out = text(PROMPTS)
        assert out.shape == (5, 12, 16) and out.isfinite().all()
        assert torch.equal(text(text.tokenize(PROMPTS)), out), "strings and tokens"
        torch.testing.assert_close(text(PROMPTS[::-1]).flip(0), out, msg="padding does not depend on the batch")
        assert torch.equal(text(PROMPTS), out)
        assert (out[0] - out[1]).abs().max() > 1e-3, "the prompt matters"
        swapped = text(["star red a"])
        assert (swapped - out[:1]).abs().max() > 1e-3, "and so does its order"
        assert torch.equal(copy.deepcopy(text)(PROMPTS), out)
    assert text.settings == dict(text_width=16, text_layers=2, text_heads=2, text_length=12)
    with pytest.raises(ValueError, match="text_width=16 does not divide into text_heads=3"):
        TextEncoder(text_width=16, text_heads=3)


def test_gradients_reach_the_text_encoder(text):
    text = fill(copy.deepcopy(text))
    denoiser = Denoiser(fill(UNet(**TINY, context_dim=16)), text)
    tokens = text.tokenize(["a red star", "circle"])
    out = denoiser(normal(2, 3, 8, 8), torch.tensor([10.0, 500.0]), tokens)
    assert torch.equal(out, denoiser.unet(normal(2, 3, 8, 8), torch.tensor([10.0, 500.0]), text(tokens)))
    (out * normal(2, 3, 8, 8, seed=3)).sum().backward()
    for name, p in text.named_parameters():
        assert p.grad.isfinite().all() and (name.endswith("to_k.bias") or p.grad.abs().sum() > 0), name
    seen = text.token_embedding.weight.grad.abs().sum(1) > 0
    assert seen.nonzero().flatten().tolist() == sorted(set(tokens.flatten().tolist()))
