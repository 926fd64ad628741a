"""The autoencoder: images (B,C,H,W) in [-1,1] <-> latents (B,D,H/f,W/f); and its PatchGAN discriminator.

Images have a channel for each letter of `image_mode`: C is 1 (L), 3 (RGB) or 4 (RGBA).

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752). The defaults are
the published KL-f8 (83,653,863 parameters). Settings of the other published models:

    kl-f4   ch_mult=(1,2,4)        z_channels=3
    kl-f16  ch_mult=(1,1,2,2,4)    z_channels=16  attn_resolutions=(16,)
    kl-f32  ch_mult=(1,1,2,2,4,4)  z_channels=64  attn_resolutions=(16,8)
    vq-f4   ch_mult=(1,2,4)        z_channels=3   bottleneck="vq"  codebook_size=8192
    vq-f8   ch_mult=(1,2,2,4)      z_channels=4   attn_resolutions=(32,)  bottleneck="vq"  codebook_size=16384
    vq-f16  ch_mult=(1,1,2,2,4)    z_channels=8   attn_resolutions=(16,)  bottleneck="vq"  codebook_size=16384
    vq-f4-noattn is vq-f4 with mid_attention=False

    vae = VAE()
    posterior = vae.encode(images)            # mean, logvar: (B,4,H/8,W/8)
    x0 = vae.normalize(posterior.sample())    # unit variance: what the denoiser is trained on
    images = vae.decode(vae.denormalize(x0))
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

import checkpoint
import convert
from conv import Conv2d, upsample_conv
from metrics import off_mps

# --- blocks ---


class ResBlock(nn.Module):
    """Pre-activation residual block: (norm, SiLU, conv) twice. `gated`: the second SiLU is a SwiGLU."""

    def __init__(self, c_in, c_out, groups, gated=False, dropout=0.0):
        super().__init__()
        hidden = 2 * c_out if gated else c_out  # the gate halves the channels again
        self.gated = gated
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = Conv2d(c_in, hidden, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, hidden, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.skip = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if self.gated:
            gate, h = h.chunk(2, dim=1)
            h = F.silu(gate) * h
        else:
            h = F.silu(h)
        return self.skip(x) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Residual single-head self-attention over all positions, scale C^-0.5."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q = Conv2d(c, c, 1)
        self.k = Conv2d(c, c, 1)
        self.v = Conv2d(c, c, 1)
        self.proj_out = Conv2d(c, c, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))  # (B,1,HW,C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(B, C, H, W))


class LinearAttention(nn.Module):
    """Residual self-attention in linear time: softmax(q) (softmax(k)^T v) (Shen et al., arXiv 1812.01243)."""

    def __init__(self, c, groups, heads=4):
        super().__init__()
        self.heads = heads if c % heads == 0 else 1
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.qkv = Conv2d(c, 3 * c, 1, bias=False)
        self.proj_out = Conv2d(c, c, 1)
        nn.init.zeros_(self.proj_out.weight)  # the block starts as the identity
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W).unbind(1)  # (B,heads,d,HW)
        context = k.softmax(dim=-1) @ v.transpose(-1, -2)  # (B,heads,d,d)
        h = context.transpose(-1, -2) @ q.softmax(dim=-2)  # (B,heads,d,HW)
        return x + self.proj_out(h.reshape(B, C, H, W))


class Downsample(nn.Module):
    def __init__(self, c, mode):
        super().__init__()
        self.mode = mode
        self.conv = nn.Conv2d(c, c, 3, stride=2) if mode == "conv" else nn.Identity()

    def forward(self, x):
        if self.mode == "conv":
            return self.conv(F.pad(x, (0, 1, 0, 1)))  # pads right and below only, as the published weights require
        return F.avg_pool2d(x, 2) if self.mode == "avg" else F.max_pool2d(x, 2)


class Upsample(nn.Module):
    def __init__(self, c, mode):
        super().__init__()
        self.mode = mode
        self.conv = Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        if self.mode == "nearest":
            return upsample_conv(x, self.conv)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode=self.mode))


class Level(nn.Module):
    """One resolution: residual blocks, optionally attention after each, a resampler, optionally linear attention."""

    def __init__(self, channels, groups, gated, dropout, with_attention, resampler, linear_attention):
        super().__init__()
        pairs = list(zip(channels[:-1], channels[1:]))
        self.block = nn.ModuleList(ResBlock(a, b, groups, gated, dropout) for a, b in pairs)
        self.attn = nn.ModuleList(Attention(b, groups) if with_attention else nn.Identity() for _, b in pairs)
        self.resample = resampler
        self.linear_attn = LinearAttention(channels[-1], groups) if linear_attention else nn.Identity()

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return self.linear_attn(self.resample(x))


class Middle(nn.Module):
    def __init__(self, c, groups, gated, dropout, with_attention, linear_attention):
        super().__init__()
        attention = LinearAttention if linear_attention else Attention
        self.block_1 = ResBlock(c, c, groups, gated, dropout)
        self.attn_1 = attention(c, groups) if with_attention else nn.Identity()
        self.block_2 = ResBlock(c, c, groups, gated, dropout)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


def run(module, x, checkpointing):
    """module(x); with `checkpointing` its activations are recomputed in the backward pass instead of stored."""
    if checkpointing and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    return module(x)


# --- encoder and decoder; s is VAE.settings ---


class Encoder(nn.Module):
    """Images (B,C,H,W) -> moments (B,2 z_channels,H/f,W/f), or with VQ latents (B,z_channels,H/f,W/f)."""

    checkpointing = False  # True recomputes each level in the backward pass, which saves memory

    def __init__(self, s):
        super().__init__()
        widths, gated = [s["ch"] * m for m in s["ch_mult"]], s["activation"] == "swiglu"
        self.patch_size = s["patch_size"]
        self.conv_in = Conv2d(len(s["image_mode"]) * s["patch_size"] ** 2, s["ch"], 3, padding=1)
        self.down = nn.ModuleList()
        c = s["ch"]
        for i, width in enumerate(widths):
            channels = [c] + [width] * s["num_res_blocks"]
            resampler = Downsample(width, s["downsample"])  # also of the last level: initial weights depend on it
            resampler = resampler if i < len(widths) - 1 else nn.Identity()
            with_attention = s["resolution"] // s["patch_size"] // 2**i in s["attn_resolutions"]
            options = (s["norm_groups"], gated, s["dropout"], with_attention, resampler, s["linear_attention"])
            self.down.append(Level(channels, *options))
            c = width
        self.mid = Middle(c, s["norm_groups"], gated, s["dropout"], s["mid_attention"], s["linear_attention"])
        self.norm_out = nn.GroupNorm(s["norm_groups"], c, eps=1e-6)
        self.conv_out = Conv2d(c, s["z_channels"] * (2 if s["bottleneck"] == "kl" else 1), 3, padding=1)

    def forward(self, x):
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_size))
        for level in self.down:
            h = run(level, h, self.checkpointing)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents (B,z_channels,H/f,W/f) -> images (B,C,H,W). Each level has one residual block more than the encoder's."""

    checkpointing = False

    def __init__(self, s):
        super().__init__()
        widths, gated = [s["ch"] * m for m in s["ch_mult"]], s["activation"] == "swiglu"
        self.patch_size, self.tanh_out = s["patch_size"], s["tanh_out"]
        c = widths[-1]
        self.conv_in = Conv2d(s["z_channels"], c, 3, padding=1)
        self.mid = Middle(c, s["norm_groups"], gated, s["dropout"], s["mid_attention"], s["linear_attention"])
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            channels = [c] + [width] * (s["num_res_blocks"] + 1)
            resampler = Upsample(width, s["upsample"]) if i else nn.Identity()
            with_attention = s["resolution"] // s["patch_size"] // 2**i in s["attn_resolutions"]
            options = (s["norm_groups"], gated, s["dropout"], with_attention, resampler, s["linear_attention"])
            levels.append(Level(channels, *options))
            c = width
        self.up = nn.ModuleList(reversed(levels))  # up[0] is the full resolution, as in the published weights
        self.norm_out = nn.GroupNorm(s["norm_groups"], c, eps=1e-6)
        outputs = len(s["image_mode"])
        if s["pixel_channels"]:
            self.conv_out = Conv2d(c, s["pixel_channels"] * s["patch_size"] ** 2, 1)
            self.to_pixels = nn.Sequential(nn.SiLU(), Conv2d(s["pixel_channels"], outputs, 1))
        else:
            self.conv_out = Conv2d(c, outputs * s["patch_size"] ** 2, 3, padding=1)
            self.to_pixels = nn.Identity()

    def features(self, z):
        """All before conv_out; compiled separately, so that a gradient at the last layers does not need the rest."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = run(level, h, self.checkpointing)
        return F.silu(self.norm_out(h))

    def forward(self, z):
        x = self.to_pixels(F.pixel_shuffle(self.conv_out(self.features(z)), self.patch_size))
        return torch.tanh(x) if self.tanh_out else x


# --- the bottleneck: KL or VQ ---


class Posterior:
    """A diagonal Gaussian over latents: mean and logvar (B,D,h,w), logvar clamped to [-30, 20]."""

    def __init__(self, moments):
        moments = moments if moments.dtype == torch.float64 else moments.float()  # autocast gives bfloat16
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self):
        return torch.exp(0.5 * self.logvar)

    def mode(self):
        return self.mean

    def sample(self, noise=None, generator=None):
        """mean + std * noise; without `noise` it is sampled, from `generator` if not None (on the latents' device)."""
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def kl(self):
        """KL(q || N(0, I)) of each latent dimension in nats, (B,D,h,w)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar)


class Quantized(Posterior):
    """The output of a VQ encoder, with the interface of a Posterior of zero variance.

    mean: (B,D,h,w), the latents before quantization, which the denoiser models and `decode` quantizes.
    loss, indices: the codebook's loss and the codes' indices (B,h,w), set by VAE.forward.
    """

    def __init__(self, z):
        self.mean, self.loss, self.indices = z, None, None

    @property
    def std(self):
        return torch.zeros_like(self.mean)

    def sample(self, noise=None, generator=None):
        return self.mean

    def kl(self):
        return torch.zeros_like(self.mean)


class Quantizer(nn.Module):
    """Vector quantization (van den Oord et al. 2017, arXiv 1711.00937): each latent is replaced by its nearest code."""

    def __init__(self, codebook_size, dim, beta, legacy):
        super().__init__()
        self.beta, self.legacy = beta, legacy
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    @torch.no_grad()
    def nearest(self, z):
        """Index of the code at the smallest Euclidean distance, in float64: (B,D,h,w) -> (B,h,w)."""
        codes = off_mps(self.embedding.weight).double()  # not affected by autocast, TF32 or a module in bfloat16
        rows = off_mps(z).permute(0, 2, 3, 1).reshape(-1, z.shape[1]).double()
        # |z - e|^2 without |z|^2, which is the same for all codes; in parts, as (B h w, K) can be large
        parts = [(codes.square().sum(1) - 2 * part @ codes.T).argmin(1) for part in rows.split(8192)]
        return torch.cat(parts).reshape(z.shape[0], *z.shape[2:]).to(z.device)

    def lookup(self, indices):
        """(B,h,w) -> codes (B,D,h,w)."""
        return self.embedding(indices).permute(0, 3, 1, 2).contiguous()

    def forward(self, z):
        """(B,D,h,w) -> (codes with straight-through gradient to z, loss, indices (B,h,w)).

        loss = mean |sg(z) - e|^2 + beta mean |z - sg(e)|^2; `legacy` moves beta to the first term, as CompVis did.
        """
        indices = self.nearest(z)
        z, codes = z.to(self.embedding.weight.dtype), self.lookup(indices)
        codebook, commitment = (codes - z.detach()).square().mean(), (z - codes.detach()).square().mean()
        loss = self.beta * codebook + commitment if self.legacy else codebook + self.beta * commitment
        return z + (codes - z).detach(), loss, indices


# --- the autoencoder ---

CHOICES = {
    "bottleneck": ("kl", "vq"),
    "activation": ("silu", "swiglu"),
    "downsample": ("conv", "avg", "max"),
    "upsample": ("nearest", "bilinear", "bicubic"),
    "image_mode": ("L", "RGB", "RGBA"),
}


class VAE(nn.Module):
    """The autoencoder, with a KL or a VQ bottleneck. `vae.settings` holds the constructor's arguments."""

    def __init__(
        self,
        ch=128,
        ch_mult=(1, 2, 4, 4),
        num_res_blocks=2,
        z_channels=4,
        attn_resolutions=(),
        resolution=256,
        mid_attention=True,
        latent_proj=True,
        bottleneck="kl",
        codebook_size=8192,
        embed_dim=0,
        vq_beta=0.25,
        vq_legacy=False,
        activation="silu",
        downsample="conv",
        upsample="nearest",
        linear_attention=False,
        patch_size=1,
        pixel_channels=0,
        norm_groups=32,
        dropout=0.0,
        tanh_out=False,
        image_mode="RGB",
    ):
        """ch, ch_mult: level i has ch * ch_mult[i] channels and half the side of level i - 1. The downsampling factor
            is f = patch_size * 2^(levels - 1).
        num_res_blocks: residual blocks of each level of the encoder; the decoder has one more.
        z_channels: channels of the encoder's output (twice as many with KL: mean and logvar) and the decoder's input.
        attn_resolutions: the levels of these sides have attention after each block. Sides are those of a `resolution`
            x `resolution` image after the patch stem; images of any size can be encoded.
        mid_attention: attention at the lowest resolution.
        latent_proj: 1x1 convolutions quant_conv and post_quant_conv around the latents.
        bottleneck: kl | vq. VQ has codebook_size codes and the weight vq_beta on the commitment loss (vq_legacy: on the
            codebook loss).
        embed_dim: latent channels D, between the two 1x1 convolutions; 0: z_channels.
        activation: silu | swiglu.  downsample: conv | avg | max.  upsample: nearest | bilinear | bicubic.
        linear_attention: linear-time attention at the end of each level, and in the middle in place of the quadratic.
        patch_size: p > 1 folds p x p pixels into channels first, which makes small models fast.
        pixel_channels: n > 0 ends the decoder with n channels of each pixel, SiLU and a 1x1 convolution, so that its
            patches are not linear in its features: sharper edges.
        norm_groups: groups of each GroupNorm.  tanh_out: tanh on the decoder's output.
        image_mode: L | RGB | RGBA, of the images.
        """
        settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.settings = settings
        for name, choices in CHOICES.items():
            assert settings[name] in choices, f"{name}={settings[name]!r}: must be one of {', '.join(choices)}"
        assert num_res_blocks >= 1, f"num_res_blocks={num_res_blocks}: must be >= 1"
        for width in [ch] + [ch * m for m in ch_mult]:
            assert width % norm_groups == 0, f"norm_groups={norm_groups}: must divide ch * ch_mult, here {width}"
        self.factor = patch_size * 2 ** (len(ch_mult) - 1)
        self.latent_channels = c = embed_dim or z_channels
        assert c == z_channels or latent_proj, f"embed_dim={embed_dim}: needs latent_proj=True, or 0"
        moments = 2 if bottleneck == "kl" else 1
        self.encoder = Encoder(settings)
        self.decoder = Decoder(settings)
        self.quant_conv = Conv2d(moments * z_channels, moments * c, 1) if latent_proj else nn.Identity()
        self.post_quant_conv = Conv2d(c, z_channels, 1) if latent_proj else nn.Identity()
        self.quantize = Quantizer(codebook_size, c, vq_beta, vq_legacy) if bottleneck == "vq" else None
        # measured over the training set at the end of stage 1; NaN until then
        self.register_buffer("latent_mean", torch.full((c,), math.nan))
        self.register_buffer("latent_std", torch.full((c,), math.nan))

    @property
    def has_latent_statistics(self):
        return bool(torch.isfinite(self.latent_mean).all() and torch.isfinite(self.latent_std).all())

    def encode(self, x):
        """Images (B,C,H,W) in [-1,1], sides multiples of f -> Posterior (VQ: Quantized) over latents (B,D,H/f,W/f)."""
        for side in x.shape[-2:]:
            assert side % self.factor == 0, f"image side {side}: must be a multiple of {self.factor}; resize or crop"
        z = self.quant_conv(self.encoder(x))
        return Posterior(z) if self.quantize is None else Quantized(z)

    def decode(self, z):
        """Latents (B,D,h,w), not normalized, before quantization -> images (B,C,f h,f w), about [-1,1]."""
        if self.quantize is not None:
            z = self.quantize.lookup(self.quantize.nearest(z))
        z = z.to(self.decoder.conv_out.weight.dtype)  # `encode` returns float32 even in bfloat16
        return self.decoder(self.post_quant_conv(z))

    def decode_tiled(self, z, tile=64, overlap=16):
        """`decode` in tiles of tile x tile latents, blended linearly where they overlap, for large images.

        Group norms and attention see one tile only: choose a tile about as large as the training images' latents.
        """
        assert 0 <= overlap < tile, f"overlap={overlap}: must be in [0, {tile})"
        (h, w), f = z.shape[-2:], self.factor
        if max(h, w) <= tile:
            return self.decode(z)
        dtype = torch.promote_types(z.dtype, torch.float32)
        out = torch.zeros(len(z), len(self.settings["image_mode"]), h * f, w * f, device=z.device, dtype=dtype)
        total = torch.zeros(h * f, w * f, device=z.device, dtype=dtype)
        for top, bottom in tiles(h, tile, overlap):
            for left, right in tiles(w, tile, overlap):
                rows = tile_weights(top, bottom, h, overlap, f).to(total)
                columns = tile_weights(left, right, w, overlap, f).to(total)
                weight = rows[:, None] * columns
                target = slice(top * f, bottom * f), slice(left * f, right * f)
                out[:, :, *target] += weight * self.decode(z[:, :, top:bottom, left:right])
                total[target] += weight
        return out / total

    def normalize(self, z):
        """Latents -> mean 0 and variance 1, in each channel (KL) or with one scale for all channels (VQ)."""
        return (z - self.latent_mean.view(1, -1, 1, 1)) / self.latent_std.view(1, -1, 1, 1)

    def denormalize(self, x0):
        """The inverse of `normalize`."""
        return x0 * self.latent_std.view(1, -1, 1, 1) + self.latent_mean.view(1, -1, 1, 1)

    def forward(self, x, noise=None, turns=0, sides=(), jitter=None):
        """Images -> (reconstructions, posterior).

        noise: (B,D,h,w) for the posterior's sample; None samples it.  turns, sides: of turn_and_scale, applied to the
        latents before decoding.  jitter: (B,D,h,w), noise added to the latents before that, in units of each channel's
        standard deviation over the batch.
        """
        posterior = self.encode(x)
        z = posterior.sample(noise)
        if jitter is not None:
            # not detached: larger latents would escape the noise
            z = z + jitter * z.std(dim=(0, 2, 3), correction=0, keepdim=True)
        z = turn_and_scale(z, turns, sides)
        if self.quantize is not None:
            z, posterior.loss, posterior.indices = self.quantize(z)
        return self.decoder(self.post_quant_conv(z.to(self.decoder.conv_out.weight.dtype))), posterior

    @classmethod
    def from_pretrained(cls, path, **known):
        """Load an autoencoder, frozen and in eval mode, from a checkpoint or from another project's file or folder.

        path: see checkpoint.find. A checkpoint of stage 1 gives its EMA, one of stage 2 its first stage; the first
        stage of a snapshot is in the latest.safetensors of its run.  known: settings that another project's file does
        not hold, see convert.load_vae.
        """
        path = checkpoint.find(path)
        if not checkpoint.is_ours(path):
            return checkpoint.build(cls, *convert.load_vae(path, **known), path)
        if known:
            checkpoint.reject(path, "a checkpoint has all its settings", f"leave out {', '.join(known)}")
        with checkpoint.reading(path):
            return checkpoint.build(cls, *checkpoint.read_vae(path), path)


def tiles(side, tile, overlap):
    """(start, end) of each tile along a side; the last tile ends where the side does."""
    last = max(side - tile, 0)
    return [(start, min(start + tile, side)) for start in [*range(0, last, tile - overlap), last]]


def tile_weights(start, end, side, overlap, factor):
    """Weight of each pixel of a tile along one side: 1, falling linearly to 0 over an overlap with another tile."""
    distance = torch.arange((end - start) * factor) + 0.5  # from the tile's edge, in pixels
    ramp, weight = distance / max(overlap * factor, 1), torch.ones_like(distance)
    if start > 0:
        weight = torch.minimum(weight, ramp)
    if end < side:
        weight = torch.minimum(weight, ramp.flip(0))
    return weight


def turn_and_scale(x, turns, sides):
    """Images or latents (B,C,H,W), rotated by `turns` * 90 degrees, then resized to sides (h, w); (): not resized."""
    x = torch.rot90(x, turns, (2, 3)) if turns else x
    return F.interpolate(x, sides, mode="bicubic", antialias=True) if sides else x


# --- the discriminator ---


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv 1611.07004): images (B,C,H,W) -> logits (B,1,h,w), one for each patch.

    n_layers: 3 has patches of 70 x 70 pixels, 2 of 34 x 34; image sides must be at least 3 * 2^n_layers.
    norm: group | batch | none. Batch norm is the published one; its statistics are those of one process and one call.
    spectral_norm: divide each kernel by its largest singular value (Miyato et al. 2018).
    """

    def __init__(self, n_layers=3, norm="group", spectral_norm=False, channels=64, image_channels=3):
        super().__init__()
        self.settings = {"disc_layers": n_layers, "disc_norm": norm, "disc_spectral_norm": spectral_norm}
        self.settings["disc_channels"] = channels
        assert norm in ("group", "batch", "none"), f"disc_norm={norm!r}: must be one of group, batch, none"
        assert norm != "group" or channels % 16 == 0, f"disc_channels={channels}: must be a multiple of 16"  # 32 groups
        widths = [channels * min(2**i, 8) for i in range(n_layers + 1)]
        layers = [nn.Conv2d(image_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (a, b) in enumerate(zip(widths[:-1], widths[1:])):
            layers.append(nn.Conv2d(a, b, 4, 2 if i < n_layers - 1 else 1, 1, bias=norm != "batch"))
            if norm != "none":
                layers.append(nn.GroupNorm(32, b) if norm == "group" else nn.BatchNorm2d(b))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for layer in layers:
            if not isinstance(layer, nn.LeakyReLU):
                nn.init.normal_(layer.weight, 0.0 if isinstance(layer, nn.Conv2d) else 1.0, 0.02)
        self.main = nn.Sequential(*layers)
        if spectral_norm:
            for layer in layers:
                if isinstance(layer, nn.Conv2d):
                    nn.utils.parametrizations.spectral_norm(layer)  # in place
        # running means of the logits of real images and of reconstructions, for LeCam regularization
        self.register_buffer("mean_logits", torch.zeros(2))

    def forward(self, x):
        return self.main(x)
