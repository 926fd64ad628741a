"""The denoiser: a U-Net with attention on noisy latents, and the text encoder that it listens to.

By settings it is every U-Net of the reference systems (Ho et al. 2020; Dhariwal & Nichol 2021; Rombach et al. 2022),
SD being Stable Diffusion, and LDM's below with in_channels=3 and out_channels=3 besides:

    SD 1           channels=320 channel_mult=(1,2,4,4) attention_ds=(1,2,4) num_heads=8 context_dim=768
    SD 2           the same with num_heads=0 head_dim=64 context_dim=1024 linear_proj=True
    LDM cin256-v2  channels=192 channel_mult=(1,2,3,5) attention_ds=(8,4,2) num_heads=1 context_dim=512
    LDM celebahq   channels=224 channel_mult=(1,2,3,4) attention_ds=(8,4,2) num_heads=0 head_dim=32 transformer_depth=0

    unet = UNet(channels=64, channel_mult=(1,2), context_dim=128)
    text = TextEncoder(text_width=128)
    prediction = unet(x_t, 1000 * t, context=text(["a red star"]))
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from attention import Attention
from conv import Conv2d, upsample_conv

# --- the U-Net's blocks ---


def zeros(module):
    """Zero-initialised, so that a residual branch starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def timestep_embedding(t, dim, max_period=10000.0):
    """Sinusoids of t (B,) in [0, 1000] -> (B, dim) float32: cosines, then sines, as Dhariwal & Nichol 2021 have them.

    Of the frequencies max_period^(-i / half), i = 0 to half - 1; Ho et al. 2020 have sines first and half - 1 for half.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * freqs[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim - 2 * half))


class Downsample(nn.Module):
    def __init__(self, c, resample):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2, padding=1) if resample == "conv" else nn.AvgPool2d(2)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, c, resample):
        super().__init__()
        self.conv = Conv2d(c, c, 3, padding=1) if resample == "conv" else None

    def forward(self, x):
        return F.interpolate(x, scale_factor=2.0) if self.conv is None else upsample_conv(x, self.conv)


class ResBlock(nn.Module):
    """Residual block told the time: its embedding is added after the first convolution, or scales and shifts (FiLM).

    `resample`: "down" and "up" halve or double the sides inside the block (Dhariwal & Nichol 2021).
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
            x, h = (F.interpolate(a, scale_factor=2.0, mode="nearest") for a in (x, h))
        h = self.conv1(h)
        e = self.emb(F.silu(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, residual; what models without a context use."""

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
        return x * F.gelu(gate)  # the exact GELU: published weights were trained with it


class TransformerBlock(nn.Module):
    """Pre-norm: self-attention, cross-attention to the context, gated feed-forward (Rombach et al. 2022, appendix)."""

    def __init__(self, dim, context_dim, num_heads, head_dim, qk_norm, linear, self_attention):
        super().__init__()
        self.self_attention = self_attention
        # where self-attention is switched off the first attention, too, looks at the context (SD's x4 upscaler)
        first = dim if self_attention else context_dim
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
    """`depth` transformer blocks over the pixels as a sequence, residual."""

    def __init__(self, c, context_dim, num_heads, depth, linear_proj, qk_norm, linear, self_attention, groups=32):
        super().__init__()
        self.linear_proj = linear_proj
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c) if linear_proj else Conv2d(c, c, 1)
        blocks = (
            TransformerBlock(c, context_dim, num_heads, c // num_heads, qk_norm, linear, self_attention)
            for _ in range(depth)
        )
        self.blocks = nn.ModuleList(blocks)
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
    """Layers called one after the other, each given what it listens to; the first is shown `kept` too."""

    def forward(self, x, emb, context, kept=None):
        x = x if kept is None else torch.cat([x, kept], dim=1)
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


def run(stage, checkpointing, *inputs):
    """stage(*inputs), whose inner activations are computed again in the backward pass instead of kept, if asked."""
    if checkpointing and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(stage, *inputs, use_reentrant=False)
    return stage(*inputs)


class UNet(nn.Module):
    """The denoiser; `unet.settings` holds the arguments it was built with."""

    checkpointing = False  # set to True it saves memory for time: the stages' inner activations are computed twice

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
        unet_patch=1,
        norm_groups=32,
        unet_dropout=0.0,
    ):
        """channels * channel_mult are the widths of the levels, each half the side of the one before.

        concat_channels: channels of image conditioning (masks, low-resolution latents) joined to the input.
        num_res_blocks: a number, or one for each level.
        attention_ds: down-sampling factors (1 is the input's own side) whose levels have attention; () is none.
        num_heads or head_dim: one of them, the other 0.
        transformer_depth: blocks of each spatial transformer; 0 uses plain self-attention blocks instead.
        context_dim: width of the context for cross-attention; 0 is no context.
        context_pool: the context's mean, projected, joins the time embedding too (GLIDE, Imagen).
        self_attention: False, or one value for each level, lets the transformer's first attention look at the context;
            the middle's looks at the pixels in any case, as in Stable Diffusion's x4 upscaler.
        num_classes: size of the class embedding that is added to the time's (count the null class too); 0 is none.
        resample: conv | pool, how levels change size unless resblock_updown does it.
        unet_patch: p > 1 folds p x p latents (or pixels) into channels first: all work is then at a p-th of the side.
        """
        settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.settings = settings
        levels, emb_dim = len(channel_mult), 4 * channels
        res_blocks, self_attn = (
            value * levels if len(value) == 1 else value
            for value in (tuple(v) if isinstance(v, (tuple, list)) else (v,) for v in (num_res_blocks, self_attention))
        )
        _check_settings(settings, res_blocks, self_attn)
        self.side_multiple = unet_patch * 2 ** (levels - 1)

        def res_block(c_in, c_out, resampling="none"):
            return ResBlock(c_in, c_out, emb_dim, scale_shift, unet_dropout, resampling, norm_groups)

        def attention_block(c, with_self_attention=True):
            heads = num_heads or c // head_dim
            if transformer_depth == 0:
                return AttentionBlock(c, heads, qk_norm, linear_attention, norm_groups)
            return SpatialTransformer(
                c,
                context_dim,
                heads,
                transformer_depth,
                linear_proj,
                qk_norm,
                linear_attention,
                with_self_attention,
                norm_groups,
            )

        self.time_embed = nn.Sequential(nn.Linear(channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.class_embed = nn.Embedding(num_classes, emb_dim) if num_classes else None

        self.context_embed = nn.Linear(context_dim, emb_dim) if context_pool else None

        # the way down: every stage's output is kept for the way up
        conv_in = Conv2d((in_channels + concat_channels) * unet_patch**2, channels, 3, padding=1)
        self.input_blocks = nn.ModuleList([Stage([conv_in])])
        kept, c, ds = [channels], channels, 1
        for level, mult in enumerate(channel_mult):
            for _ in range(res_blocks[level]):
                stage = Stage([res_block(c, channels * mult)])
                c = channels * mult
                if ds in attention_ds:
                    stage.append(attention_block(c, self_attn[level]))
                self.input_blocks.append(stage)
                kept.append(c)
            if level != levels - 1:
                self.input_blocks.append(
                    Stage([res_block(c, c, "down") if resblock_updown else Downsample(c, resample)])
                )
                kept.append(c)
                ds *= 2

        middle = [res_block(c, c), attention_block(c), res_block(c, c)]
        self.middle_block = Stage(middle if middle_attention else middle[::2])

        # the way up: one residual block a level more, each fed with one kept output
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(res_blocks[level] + 1):
                stage = Stage([res_block(c + kept.pop(), channels * mult)])
                c = channels * mult
                if ds in attention_ds:
                    stage.append(attention_block(c, self_attn[level]))
                if level and i == res_blocks[level]:
                    stage.append(res_block(c, c, "up") if resblock_updown else Upsample(c, resample))
                    ds //= 2
                self.output_blocks.append(stage)

        self.norm_out = nn.GroupNorm(norm_groups, c, eps=1e-5)
        self.conv_out = zeros(Conv2d(c, out_channels * unet_patch**2, 3, padding=1))

    def forward(self, x, t, context=None, y=None, concat=None):
        """Noisy latents -> prediction (B,out_channels,H,W).

        x: (B,in_channels,H,W), sides multiples of unet_patch * 2^(levels-1).  t: (B,) floats in [0, 1000].
        context: (B,L,context_dim).  y: (B,) class indices.  concat: (B,concat_channels,H,W).
        """
        s = self.settings
        for name, given, wanted in (
            ("context", context, s["context_dim"]),
            ("y", y, s["num_classes"]),
            ("concat", concat, s["concat_channels"]),
        ):
            if (given is not None) != bool(wanted):
                raise ValueError(
                    f"this U-Net takes {'a' if wanted else 'no'} {name} and was given {'none' if wanted else 'one'}"
                )
        for name, given in (("t", t), ("y", y)):
            if given is not None and given.ndim != 1:
                raise ValueError(f"{name} has shape {tuple(given.shape)}: give one number for each image, (B,)")
        for side in x.shape[-2:]:
            if side % self.side_multiple:
                raise ValueError(
                    f"latent side {side} is not a multiple of {self.side_multiple}: choose another image size"
                )
        emb = self.time_embed(timestep_embedding(t, s["channels"]).to(self.conv_out.weight.dtype))
        if y is not None:
            emb = emb + self.class_embed(y)
        if self.context_embed is not None:
            emb = emb + self.context_embed(context.mean(dim=1))
        h = x if concat is None else torch.cat([x, concat], dim=1)
        h = F.pixel_unshuffle(h, s["unet_patch"])
        kept = []
        for stage in self.input_blocks:
            h = run(stage, self.checkpointing, h, emb, context)
            kept.append(h)
        h = run(self.middle_block, self.checkpointing, h, emb, context)
        for stage in self.output_blocks:
            h = run(stage, self.checkpointing, h, emb, context, kept.pop())
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), s["unet_patch"])

    @classmethod
    def from_pretrained(cls, path, **settings):
        """The denoiser (its EMA) in a stage-2 checkpoint of ours, or in another's file or folder, in eval mode.

        settings: what the file does not tell, such as num_heads or head_dim; see convert.load_foreign_unet.
        """
        import convert

        return convert.load_unet(cls, path, **settings)


def _check_settings(s, res_blocks, self_attn):
    levels = len(s["channel_mult"])
    if len(res_blocks) != levels or len(self_attn) != levels:
        raise ValueError(f"num_res_blocks and self_attention need one value, or one for each of the {levels} levels")
    if bool(s["num_heads"]) == bool(s["head_dim"]):
        raise ValueError(f"num_heads={s['num_heads']} and head_dim={s['head_dim']}: set one of them and the other to 0")
    if s["resample"] not in ("conv", "pool"):
        raise ValueError(f"resample={s['resample']!r} is not one of conv, pool")
    if s["context_dim"] and s["transformer_depth"] == 0:
        raise ValueError("a context needs transformer blocks: set transformer_depth to 1 or more")
    if s["context_pool"] and not s["context_dim"]:
        raise ValueError("context_pool=True needs a context: set context_dim")
    if not all(self_attn) and not s["context_dim"]:
        raise ValueError("self_attention=False leaves nothing to attend to without a context: set context_dim")
    reached = [2**level for level in range(levels) if 2**level in s["attention_ds"]]
    if s["context_dim"] and not reached and not s["middle_attention"]:
        raise ValueError("a context needs attention that looks at it: set attention_ds or middle_attention")
    for width in [s["channels"]] + [s["channels"] * mult for mult in s["channel_mult"]]:
        if width % s["norm_groups"]:
            raise ValueError(f"{width} channels do not divide into norm_groups={s['norm_groups']} groups")
    for level, mult in enumerate(s["channel_mult"]):
        width = s["channels"] * mult
        has_attention = 2**level in s["attention_ds"] or (level == levels - 1 and s["middle_attention"])
        if has_attention and width % (s["num_heads"] or s["head_dim"]):
            raise ValueError(
                f"{width} channels do not divide into heads: num_heads={s['num_heads']}, head_dim={s['head_dim']}"
            )


class Rescaler(nn.Module):
    """Semantic maps, one-hot (B,K,H,W), to the latents' side in `out_channels` (the LDM paper's SpatialRescaler)."""

    def __init__(self, map_classes, factor, out_channels=3):
        """factor: pixels to a latent."""
        super().__init__()
        self.factor = factor
        self.conv = Conv2d(map_classes, out_channels, 1, bias=False)

    def forward(self, x):
        x = x.to(self.conv.weight.dtype)  # one_hot gives integers
        return self.conv(F.interpolate(x, scale_factor=1 / self.factor, mode="area") if self.factor > 1 else x)


class Denoiser(nn.Module):
    """A U-Net with what is trained beside it, as one module for DDP, EMA and the checkpoint.

    text: a TextEncoder.  class_tokens: an nn.Embedding, whose row of a class is a context of one token (LDM's cin256).
    rescaler: for semantic maps.  uncertainty: a log-variance for each noise level (EDM2, arXiv 2312.02696, eq. 21).
    """

    def __init__(self, unet, text=None, class_tokens=None, rescaler=None, uncertainty=False):
        super().__init__()
        self.unet, self.text, self.class_tokens, self.rescaler = unet, text, class_tokens, rescaler
        self.log_variance = zeros(nn.Linear(64, 1)) if uncertainty else None

    def condition(self, tokens=None, y=None, concat=None, context=None):
        """What UNet.forward takes besides x and t; see there.

        tokens: (B,length) for the text encoder.  y: (B,) classes.  concat: what is joined to the input, or (B,K,H,W)
        one-hot maps for the rescaler.  context: (B,L,D) of a tower that is not part of this module.
        """
        if tokens is not None:
            if self.text is None:
                raise ValueError("this denoiser has no text encoder of its own for tokens: give it a context")
            context = self.text(tokens)
        if self.class_tokens is not None and y is not None:
            context, y = self.class_tokens(y)[:, None], None
        if self.rescaler is not None and concat is not None:  # what is missing, the U-Net names
            concat = self.rescaler(concat)
        given = {"context": context, "y": y, "concat": concat}
        return {name: value for name, value in given.items() if value is not None}

    def forward(self, x, t, tokens=None, y=None, concat=None, context=None):
        """Noisy latents -> prediction, and with `uncertainty` the log-variances (B,) too, while training."""
        prediction = self.unet(x, t, **self.condition(tokens, y, concat, context))
        if self.log_variance is None or not self.training:
            return prediction
        head = self.log_variance  # not as a matrix product, which autocast would round to bf16's two digits
        return prediction, (timestep_embedding(t, 64).to(head.weight.dtype) * head.weight[0]).sum(dim=1) + head.bias
