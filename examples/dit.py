"""A denoiser of your own: a small DiT (Peebles & Xie 2023, arXiv 2212.09748) with cross-attention to a context.

Train it with a copy of train_ldm.py in which `DiT` replaces `UNet` (docs/hacking.md); it takes settings by their names:

    python mine.py config/shapes_ldm.py --channels=96 --transformer_depth=4 --unet_patch=2 --optimizer=adamw \\
        --lr=4e-3 --out_dir=out/mine
    python sample.py --ckpt=out/mine --denoiser=examples.dit:DiT
"""

import torch
import torch.nn as nn

from attention import Attention
from unet import timestep_embedding


class Block(nn.Module):
    """Self-attention, cross-attention and MLP; each shifted, scaled and gated by the time embedding (adaLN-Zero)."""

    def __init__(self, width, context_dim, head_dim, qk_norm):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.self_attention = Attention(width, width, width // head_dim, head_dim, qk_norm)
        self.cross_attention = Attention(width, context_dim or width, width // head_dim, head_dim, qk_norm)
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

    def __init__(self, in_channels=4, out_channels=4, concat_channels=0, context_dim=0, num_classes=0, channels=256,
                 transformer_depth=6, head_dim=64, unet_patch=2, qk_norm=False, context_pool=False):  # fmt: skip
        settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.settings, self.side_multiple, patch = settings, unet_patch, unet_patch
        self.patchify = nn.Conv2d(in_channels + concat_channels, channels, patch, stride=patch)
        self.time_embed = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.class_embed = nn.Embedding(num_classes, channels) if num_classes else None
        self.context_embed = nn.Linear(context_dim, channels) if context_pool else None
        self.blocks = nn.ModuleList(Block(channels, context_dim, head_dim, qk_norm) for _ in range(transformer_depth))
        self.norm_out = nn.LayerNorm(channels)
        self.out = nn.Sequential(nn.Conv2d(channels, out_channels * patch**2, 1), nn.PixelShuffle(patch))

    def forward(self, x, t, context=None, y=None, concat=None):
        x = self.patchify(x if concat is None else torch.cat([x, concat], dim=1))  # (B,D,h/p,w/p)
        width, (h, w) = x.shape[1], x.shape[2:]
        rows, columns = (timestep_embedding(torch.arange(n, device=x.device), width // 2) for n in (h, w))
        position = torch.cat([rows[:, None].expand(h, w, -1), columns.expand(h, w, -1)], dim=-1)  # (h,w,D)
        x = x.flatten(2).transpose(1, 2) + position.reshape(1, h * w, width).to(x.dtype)
        emb = self.time_embed(timestep_embedding(t, width).to(x.dtype))
        emb = emb if y is None else emb + self.class_embed(y)
        emb = emb if self.context_embed is None else emb + self.context_embed(context.mean(dim=1))
        emb = nn.functional.silu(emb)
        for block in self.blocks:
            x = block(x, emb, context)
        return self.out(self.norm_out(x).transpose(1, 2).unflatten(2, (h, w)))
