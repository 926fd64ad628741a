"""A denoiser of your own: a small DiT (Peebles & Xie 2023, arXiv 2212.09748) with cross-attention to a context.

Train it with a copy of train_ldm.py in which `DiT` replaces `UNet` where the model is built, and sample with

    python sample.py --ckpt=out/mine --denoiser=examples.dit:DiT
"""

import torch
import torch.nn as nn

from attention import Attention
from unet import timestep_embedding


class Block(nn.Module):
    """Self-attention, cross-attention and MLP; each shifted, scaled and gated by the time embedding (adaLN-Zero)."""

    def __init__(self, width, heads, context_dim):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.self_attention = Attention(width, width, heads, width // heads)
        self.cross_attention = Attention(width, context_dim or width, heads, width // heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 9 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x, emb, context):
        shift, scale, gate = self.modulation(emb).unflatten(1, (3, 3, 1, -1)).unbind(1)  # (B,3,1,D) each
        layers = (self.self_attention, lambda h: self.cross_attention(h, context), self.mlp)
        for i, layer in enumerate(layers):
            x = x + gate[:, i] * layer(self.norms[i](x) * (1 + scale[:, i]) + shift[:, i])
        return x


class DiT(nn.Module):
    """forward(x (B,C,h,w), t (B,) in [0, 1000]) -> (B,C,h,w), like unet.UNet; DiT(**settings) builds it again."""

    def __init__(self, in_channels=4, out_channels=4, concat_channels=0, context_dim=0, num_classes=0, width=256,
                 depth=6, heads=4, patch=2):  # fmt: skip
        settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.settings, self.side_multiple = settings, patch
        self.patchify = nn.Conv2d(in_channels + concat_channels, width, patch, stride=patch)
        self.time_embed = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.class_embed = nn.Embedding(num_classes, width) if num_classes else None
        self.blocks = nn.ModuleList(Block(width, heads, context_dim) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)
        self.out = nn.Sequential(nn.Conv2d(width, out_channels * patch**2, 1), nn.PixelShuffle(patch))

    def forward(self, x, t, context=None, y=None, concat=None):
        x = self.patchify(x if concat is None else torch.cat([x, concat], dim=1))  # (B,D,h/p,w/p)
        width, (h, w) = x.shape[1], x.shape[2:]
        rows, columns = (timestep_embedding(torch.arange(n, device=x.device), width // 2) for n in (h, w))
        position = torch.cat([rows[:, None].expand(h, w, -1), columns.expand(h, w, -1)], dim=-1)  # (h,w,D)
        x = x.flatten(2).transpose(1, 2) + position.reshape(1, h * w, width).to(x.dtype)
        emb = self.time_embed(timestep_embedding(t, width).to(x.dtype))
        emb = nn.functional.silu(emb if y is None else emb + self.class_embed(y))
        for block in self.blocks:
            x = block(x, emb, context)
        return self.out(self.norm_out(x).transpose(1, 2).unflatten(2, (h, w)))
