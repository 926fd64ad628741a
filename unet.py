"""The denoiser: a U-Net with attention, conditioned on text, classes or images; and the modules trained with it.

Settings cover the U-Nets of the reference systems (Ho et al. 2020; Dhariwal & Nichol 2021; Rombach et al. 2022). SD is
Stable Diffusion; those of LDM also have in_channels=3 and out_channels=3:

    SD 1           channels=320 channel_mult=(1,2,4,4) attention_ds=(1,2,4) num_heads=8 context_dim=768
    SD 2           the same with num_heads=0 head_dim=64 context_dim=1024 linear_proj=True
    LDM cin256-v2  channels=192 channel_mult=(1,2,3,5) attention_ds=(8,4,2) num_heads=1 context_dim=512
    LDM celebahq   channels=224 channel_mult=(1,2,3,4) attention_ds=(8,4,2) num_heads=0 head_dim=32 transformer_depth=0

    unet = UNet(channels=64, channel_mult=(1,2), context_dim=128)
    text = TextEncoder(text_width=128)
    prediction = unet(x_t, 1000 * t, context=text(["a red star"]))    # (B,4,H,W)

Another architecture can replace the U-Net: a class with `settings` (the constructor's arguments), `side_multiple`
and forward(x, t, context=None, y=None, concat=None).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

import checkpoint
import convert
from attention import Attention
from conv import Conv2d, upsample_conv
from text import TextEncoder

OTHER_CLASS = "a denoiser of another class needs --denoiser=MODULE:CLASS (unet_class= in Python)"  # a remedy

# --- blocks ---


def zeros(module):
    """Set all parameters to zero, so that a residual branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def timestep_embedding(t, dim, max_period=10000.0):
    """Sinusoids of t (B,) in [0, 1000] -> (B,dim) float32: cosines, then sines (Dhariwal & Nichol 2021).

    Frequencies are max_period^(-i / half), i from 0. Ho et al. 2020 have the sines first and half - 1 for half.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * freqs[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim - 2 * half))


class Downsample(nn.Module):
    def __init__(self, c, resample):
        super().__init__()
        pool = nn.MaxPool2d(2) if resample == "max" else nn.AvgPool2d(2)
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1) if resample == "conv" else pool

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, c, resample, mode):
        super().__init__()
        self.mode = mode
        self.conv = Conv2d(c, c, 3, padding=1) if resample == "conv" else nn.Identity()

    def forward(self, x):
        if self.mode == "nearest" and isinstance(self.conv, Conv2d):
            return upsample_conv(x, self.conv)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode=self.mode))


class ResBlock(nn.Module):
    """Residual block; the time embedding is added after the first convolution, or with `scale_shift` modulates (FiLM).

    resample: none | down | up. Down and up halve or double the sides inside the block (Dhariwal & Nichol 2021).
    """

    def __init__(self, c_in, c_out, emb_dim, scale_shift=False, dropout=0.0, resample="none", groups=32):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * c_out if scale_shift else c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeros(Conv2d(c_out, c_out, 3, padding=1))
        self.skip = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = F.silu(self.norm1(x))
        if self.resample == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        elif self.resample == "up":
            x, h = F.interpolate(x, scale_factor=2.0), F.interpolate(h, scale_factor=2.0)
        h = self.conv1(h)
        e = self.emb(F.silu(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Residual self-attention over all positions, for models without a context."""

    def __init__(self, c, num_heads, qk_norm=False, linear=False, groups=32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-5)
        self.attn = Attention(c, c, num_heads, c // num_heads, qk_norm, linear, bias=True)
        zeros(self.attn.to_out)

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)
        return x + self.attn(h).reshape(B, H, W, C).permute(0, 3, 1, 2)


class GEGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)  # the exact GELU, as the published weights require


class TransformerBlock(nn.Module):
    """Pre-norm: self-attention, cross-attention to the context, gated MLP (Rombach et al. 2022, appendix)."""

    def __init__(self, dim, context_dim, num_heads, head_dim, qk_norm, linear, self_attention):
        super().__init__()
        self.self_attention = self_attention
        first = dim if self_attention else context_dim  # False: both attend to the context (SD's x4 upscaler)
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, first, num_heads, head_dim, qk_norm, linear and self_attention)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim or dim, num_heads, head_dim, qk_norm, linear and not context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = nn.Sequential(GEGLU(dim, 4 * dim), nn.Linear(4 * dim, dim))

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x), None if self.self_attention else context)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the positions as a sequence, residual."""

    def __init__(self, c, context_dim, num_heads, depth, linear_proj, qk_norm, linear, self_attention, groups=32):
        super().__init__()
        self.linear_proj = linear_proj
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c) if linear_proj else Conv2d(c, c, 1)
        block = (c, context_dim, num_heads, c // num_heads, qk_norm, linear, self_attention)
        self.blocks = nn.ModuleList(TransformerBlock(*block) for _ in range(depth))
        self.proj_out = zeros(nn.Linear(c, c) if linear_proj else Conv2d(c, c, 1))

    def forward(self, x, context):
        B, C, H, W = x.shape
        h = self.norm(x)
        if not self.linear_proj:
            h = self.proj_in(h)
        h = h.permute(0, 2, 3, 1).reshape(B, H * W, C)  # a view in channels_last
        if self.linear_proj:
            h = self.proj_in(h)
        for block in self.blocks:
            h = block(h, context)
        if self.linear_proj:
            h = self.proj_out(h)
        h = h.reshape(B, H, W, C).permute(0, 3, 1, 2)
        return x + (h if self.linear_proj else self.proj_out(h))


class Stage(nn.ModuleList):
    """Layers in sequence, each with the inputs it takes. `skip` is concatenated to the first layer's input."""

    def forward(self, x, emb, context, skip=None):
        x = x if skip is None else torch.cat([x, skip], dim=1)
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


def run(stage, checkpointing, *inputs):
    """stage(*inputs); with `checkpointing` its activations are recomputed in the backward pass instead of stored."""
    if checkpointing and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(stage, *inputs, use_reentrant=False)
    return stage(*inputs)


# --- the U-Net ---


class UNet(nn.Module):
    """The U-Net. `unet.settings` holds the constructor's arguments."""

    checkpointing = False  # True recomputes each stage in the backward pass, which saves memory

    def __init__(
        self,
        in_channels=4,
        out_channels=4,
        concat_channels=0,
        channels=320,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        attention_ds=(1, 2, 4),
        num_heads=8,
        head_dim=0,
        transformer_depth=1,
        context_dim=0,
        context_pool=False,
        linear_proj=False,
        self_attention=True,
        middle_attention=True,
        linear_attention=False,
        qk_norm=False,
        num_classes=0,
        scale_shift=False,
        resblock_updown=False,
        resample="conv",
        upsample="nearest",
        unet_patch=1,
        norm_groups=32,
        unet_dropout=0.0,
    ):
        """in_channels, out_channels: of x and of the prediction.
        concat_channels: channels of `concat` (a mask, low-resolution latents), concatenated to x.
        channels, channel_mult: level i has channels * channel_mult[i] channels and half the side of level i - 1.
        num_res_blocks: residual blocks of each level on the way down, a number or one for each level; one more up.
        attention_ds: downsampling factors whose levels have attention (1: the input's side); () for none.
        num_heads, head_dim: heads of each attention, or channels of each head; the other must be 0.
        transformer_depth: blocks of each spatial transformer; 0: plain self-attention blocks.
        context_dim: channels of the context (B,L,context_dim) for cross-attention; 0: no context.
        context_pool: the projected mean of the context is added to the time embedding (GLIDE, Imagen).
        linear_proj: spatial transformers begin and end with linear layers instead of 1x1 convolutions (SD 2).
        self_attention: False, or one value for each level, makes the first attention of its transformers attend to the
            context too; the middle's remains self-attention, as in SD's x4 upscaler.
        middle_attention: attention at the lowest resolution.
        linear_attention: self-attention in linear time.  qk_norm: RMSNorm on queries and keys.
        num_classes: rows of the class embedding added to the time embedding, with the null class; 0: no classes.
        scale_shift: the time embedding scales and shifts instead of being added (FiLM).
        resblock_updown: residual blocks change the resolution, instead of `resample` and `upsample`.
        resample: conv | pool | max: halve the side by a strided convolution, a mean or a maximum; after the
            interpolation that doubles it, `upsample` nearest | bilinear | bicubic, conv has a convolution.
        unet_patch: p > 1 folds p x p latents or pixels into channels first.
        norm_groups: groups of each GroupNorm.  unet_dropout: dropout in the residual blocks.
        """
        settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.settings = settings
        levels, emb_dim = len(channel_mult), 4 * channels
        res_blocks, self_attn = convert.by_level(num_res_blocks, levels), convert.by_level(self_attention, levels)
        check_settings(settings, res_blocks, self_attn)
        self.side_multiple = unet_patch * 2 ** (levels - 1)  # sides of x must be multiples of it

        def res_block(c_in, c_out, resampling="none"):
            return ResBlock(c_in, c_out, emb_dim, scale_shift, unet_dropout, resampling, norm_groups)

        def attention_block(c, self_attention=True):
            heads = num_heads or c // head_dim
            if transformer_depth == 0:
                return AttentionBlock(c, heads, qk_norm, linear_attention, norm_groups)
            options = (linear_proj, qk_norm, linear_attention, self_attention, norm_groups)
            return SpatialTransformer(c, context_dim, heads, transformer_depth, *options)

        self.time_embed = nn.Sequential(nn.Linear(channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.class_embed = nn.Embedding(num_classes, emb_dim) if num_classes else None
        self.context_embed = nn.Linear(context_dim, emb_dim) if context_pool else None

        # down: the output of each stage is a skip connection
        conv_in = Conv2d((in_channels + concat_channels) * unet_patch**2, channels, 3, padding=1)
        self.input_blocks = nn.ModuleList([Stage([conv_in])])
        skips, c, ds = [channels], channels, 1
        for level, mult in enumerate(channel_mult):
            for _ in range(res_blocks[level]):
                stage = Stage([res_block(c, channels * mult)])
                c = channels * mult
                if ds in attention_ds:
                    stage.append(attention_block(c, self_attn[level]))
                self.input_blocks.append(stage)
                skips.append(c)
            if level != levels - 1:
                down = res_block(c, c, "down") if resblock_updown else Downsample(c, resample)
                self.input_blocks.append(Stage([down]))
                skips.append(c)
                ds *= 2

        middle = [res_block(c, c), attention_block(c), res_block(c, c)]
        self.middle_block = Stage(middle if middle_attention else middle[::2])

        # up: one residual block more in each level, each with one skip connection
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(res_blocks[level] + 1):
                stage = Stage([res_block(c + skips.pop(), channels * mult)])
                c = channels * mult
                if ds in attention_ds:
                    stage.append(attention_block(c, self_attn[level]))
                if level and i == res_blocks[level]:
                    stage.append(res_block(c, c, "up") if resblock_updown else Upsample(c, resample, upsample))
                    ds //= 2
                self.output_blocks.append(stage)

        self.norm_out = nn.GroupNorm(norm_groups, c, eps=1e-5)
        self.conv_out = zeros(Conv2d(c, out_channels * unet_patch**2, 3, padding=1))

    def forward(self, x, t, context=None, y=None, concat=None):
        """Noisy latents -> prediction (B,out_channels,H,W).

        x: (B,in_channels,H,W), sides multiples of side_multiple.
        t: (B,) in [0, 1000]: diffusion.unet_time of the times in [0, 1] of schedules and samplers.
        context: (B,L,context_dim).  y: (B,) class indices.  concat: (B,concat_channels,H,W).
        """
        s = self.settings
        emb = self.time_embed(timestep_embedding(t, s["channels"]).to(self.conv_out.weight.dtype))
        if y is not None:
            emb = emb + self.class_embed(y)
        if self.context_embed is not None:
            emb = emb + self.context_embed(context.mean(dim=1))
        h = x if concat is None else torch.cat([x, concat], dim=1)
        h = F.pixel_unshuffle(h, s["unet_patch"])
        skips = []
        for stage in self.input_blocks:
            h = run(stage, self.checkpointing, h, emb, context)
            skips.append(h)
        h = run(self.middle_block, self.checkpointing, h, emb, context)
        for stage in self.output_blocks:
            h = run(stage, self.checkpointing, h, emb, context, skips.pop())
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), s["unet_patch"])

    @classmethod
    def from_pretrained(cls, path, **known):
        """Load the EMA U-Net of a stage-2 checkpoint, or another project's; frozen and in eval mode.

        path: see checkpoint.find.  known: settings that another project's file does not hold, such as num_heads.
        """
        path = checkpoint.find(path)
        if not checkpoint.is_ours(path):
            return checkpoint.build(cls, *convert.load_unet(path, **known), path)
        if known:
            checkpoint.reject(path, "a checkpoint holds its settings", f"leave out {', '.join(known)}")
        with checkpoint.reading(path):
            tensors, meta = checkpoint.read(path, "ema.unet")
            if meta["stage"] != "ldm":
                checkpoint.reject(path, f"stage {meta['stage']}, without a U-Net", "give a checkpoint of train_ldm.py")
            return checkpoint.build(cls, meta["model"]["unet"], checkpoint.part(tensors, "ema.unet"), path, OTHER_CLASS)


def check_settings(s, res_blocks, self_attn):
    """Assert what involves several settings of a U-Net."""
    levels, context = len(s["channel_mult"]), s["context_dim"]
    for name, values in (("num_res_blocks", res_blocks), ("self_attention", self_attn)):
        assert len(values) == levels, f"{name}={s[name]}: must be one value, or one for each of the {levels} levels"
    heads = f"num_heads={s['num_heads']}, head_dim={s['head_dim']}"
    assert bool(s["num_heads"]) != bool(s["head_dim"]), f"{heads}: one of them must be 0"
    for name, choices in (("resample", ("conv", "pool", "max")), ("upsample", ("nearest", "bilinear", "bicubic"))):
        assert s[name] in choices, f"{name}={s[name]!r}: must be one of {', '.join(choices)}"
    assert not context or s["transformer_depth"], f"context_dim={context}: needs transformer_depth >= 1"
    assert context or not s["context_pool"], "context_pool=True: needs context_dim > 0"
    assert context or all(self_attn), f"self_attention={s['self_attention']}: needs context_dim > 0"
    attends = [2**level in s["attention_ds"] for level in range(levels)]
    needed = "attention_ds within the levels, or middle_attention=True"
    assert not context or any(attends) or s["middle_attention"], f"context_dim={context}: needs {needed}"
    attends[-1] = attends[-1] or s["middle_attention"]
    widths = [s["channels"] * mult for mult in s["channel_mult"]]
    for width in [s["channels"], *widths]:
        assert width % s["norm_groups"] == 0, f"norm_groups={s['norm_groups']}: must divide the {width} channels"
    for width, has_attention in zip(widths, attends):
        fits = width % (s["num_heads"] or s["head_dim"]) == 0
        assert fits or not has_attention, f"{heads}: must divide the {width} channels of a level with attention"


# --- the U-Net and the modules trained with it ---


class Rescaler(nn.Module):
    """Semantic maps, one-hot (B,K,H,W) -> (B,out_channels,H/factor,W/factor): the LDM paper's SpatialRescaler."""

    def __init__(self, map_classes, factor, out_channels=3):
        super().__init__()
        self.factor = factor
        self.conv = Conv2d(map_classes, out_channels, 1, bias=False)

    def forward(self, x):
        x = x.to(self.conv.weight.dtype)  # one_hot gives integers
        return self.conv(F.interpolate(x, scale_factor=1 / self.factor, mode="area") if self.factor > 1 else x)


class Denoiser(nn.Module):
    """A U-Net and the modules trained with it, as one module for DDP, EMA and the checkpoint.

    unet: a UNet, or another architecture with its interface (see the top of this file).
    text: a TextEncoder.  class_tokens: an nn.Embedding, which makes a class a context of one token (LDM's cin256).
    rescaler: for semantic maps.  uncertainty: learn a log-variance of the loss for each noise level (Karras et al.
    2024, EDM2, arXiv 2312.02696, equation 21).
    """

    def __init__(self, unet, text=None, class_tokens=None, rescaler=None, uncertainty=False):
        super().__init__()
        self.unet, self.text, self.class_tokens, self.rescaler = unet, text, class_tokens, rescaler
        self.log_variance = zeros(nn.Linear(64, 1)) if uncertainty else None

    def condition(self, tokens=None, y=None, concat=None, context=None):
        """The U-Net's inputs besides x and t, as a dict; those that are None are left out.

        tokens: (B,length) for the text encoder.  y: (B,) class indices.  concat: (B,C,H,W) for the U-Net, or one-hot
        maps (B,K,H,W) for the rescaler.  context: (B,L,D) of a frozen text encoder.
        """
        if tokens is not None:
            context = self.text(tokens)
        if self.class_tokens is not None and y is not None:
            context, y = self.class_tokens(y)[:, None], None
        if self.rescaler is not None and concat is not None:
            concat = self.rescaler(concat)
        inputs = {"context": context, "y": y, "concat": concat}
        return {name: value for name, value in inputs.items() if value is not None}

    def forward(self, x, t, tokens=None, y=None, concat=None, context=None):
        """Noisy latents -> prediction; in training with `uncertainty` -> (prediction, log-variances (B,))."""
        prediction = self.unet(x, t, **self.condition(tokens, y, concat, context))
        if self.log_variance is None or not self.training:
            return prediction
        head = self.log_variance  # not called: autocast would round a matrix product to bfloat16
        return prediction, (timestep_embedding(t, 64).to(head.weight.dtype) * head.weight[0]).sum(dim=1) + head.bias

    @classmethod
    def from_pretrained(cls, path, ema_std=0.0, unet_class=UNet):
        """Load the EMA denoiser of a stage-2 checkpoint, frozen and in eval mode.

        ema_std: > 0 combines an EMA of that relative length from the run's snapshots, see checkpoint.posthoc_ema.
        unet_class: the class that the checkpoint was trained with.
        """
        path = checkpoint.find(path)
        with checkpoint.reading(path):
            tensors, meta = checkpoint.read(path, "text", *(() if ema_std else ("ema",)))
            if meta["stage"] != "ldm":
                checkpoint.reject(
                    path, f"stage {meta['stage']}, without a denoiser", "give a checkpoint of train_ldm.py"
                )
            ema = checkpoint.part(checkpoint.posthoc_ema(path, ema_std) if ema_std else tensors, "ema")
            model, vae = meta["model"], meta["vae"]
            unet = checkpoint.build(unet_class, model["unet"], checkpoint.part(ema, "unet"), path, OTHER_CLASS)
            text = class_tokens = rescaler = None
            if model["text"]:
                bpe = bytes(tensors["text.bpe"].tolist())
                text = checkpoint.build(TextEncoder, model["text"], checkpoint.part(ema, "text"), path, tokenizer=bpe)
            if "class_tokens.weight" in ema:
                class_tokens = nn.Embedding(*ema["class_tokens.weight"].shape)
            if "rescaler.conv.weight" in ema:
                out_channels, map_classes = ema["rescaler.conv.weight"].shape[:2]
                factor = vae["patch_size"] * 2 ** (len(vae["ch_mult"]) - 1) if vae else 1  # pixels to a latent
                rescaler = Rescaler(map_classes, factor, out_channels)
            denoiser = cls(unet, text, class_tokens, rescaler, "log_variance.weight" in ema)
            return checkpoint.load(denoiser, ema, path)
