"""Convolutions that are faster on a CPU than PyTorch's own: the same weights and, but for rounding, the same results.

oneDNN, which PyTorch calls there, is slow on small pictures with many channels, as in the middle of a U-Net, and
multiplies more than it must on large ones. On a GPU, and wherever nothing was gained, these are nn.Conv2d.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Conv2d(nn.Conv2d):
    """nn.Conv2d that picks the fastest way for its input, by what LOG.md has measured."""

    def forward(self, x):
        if not may_choose(x) or x.ndim != 4 or not is_3x3(self) or self.out_channels < 128:
            return super().forward(x)
        B, C, H, W = x.shape
        if C >= 512 and B * H * W <= 128 and channels_last(self.weight):
            return conv_as_matmul(x, self.weight, self.bias)
        plain = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        if plain or x.dtype != torch.float32 or C < 256 or B * H * W < 4096 or H % 4 or W % 4:
            return super().forward(x)
        return winograd(x, self.weight, self.bias)


def may_choose(x):
    """Whether x's size may decide: on a CPU, but not in what is recorded there for all sizes."""
    return x.device.type == "cpu" and not torch.jit.is_tracing() and not torch.compiler.is_exporting()


def is_3x3(conv):
    """With padding that keeps the size, and nothing special."""
    plain = conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    return plain and conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.stride == (1, 1)


def channels_last(t):
    return t.is_contiguous(memory_format=torch.channels_last)


def conv_as_matmul(x, weight, bias):
    """F.conv2d with padding that keeps the size, as one matrix product: k * k values of each channel by weight."""
    k, (_, _, H, W) = weight.shape[-1], x.shape
    x = F.pad(x, [k // 2] * 4).permute(0, 2, 3, 1)  # (B,H,W,C), the padding beside it
    rows = torch.cat([x[:, i : i + H, j : j + W] for i in range(k) for j in range(k)], dim=-1)
    return F.linear(rows, weight.permute(0, 2, 3, 1).reshape(len(weight), -1), bias).permute(0, 3, 1, 2)


def upsample_conv(x, conv):
    """conv(x after nearest upsampling to twice the side), 3x3.

    Each output pixel sees only 2x2 input pixels: as a whole that is a transposed convolution of kernel 4 and stride 2,
    with 4/9 of the multiplications. It reads the weight of a Conv2d alone, whose hooks do not run.
    """
    B, C, H, W = x.shape
    own = type(conv) is Conv2d and is_3x3(conv)  # what has taken its place, with LoRA say, is to be called
    if not may_choose(x) or not own or not channels_last(conv.weight) or B * H * W < 1024:
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    w = conv.weight.flip(2, 3).transpose(0, 1)  # (C_in,C_out,3,3)
    w = F.pad(w, (0, 1, 0, 1)) + F.pad(w, (1, 0, 0, 1)) + F.pad(w, (0, 1, 1, 0)) + F.pad(w, (1, 0, 1, 0))
    return F.conv_transpose2d(x, w.contiguous(memory_format=torch.channels_last), conv.bias, stride=2, padding=1)


def winograd_matrices():
    """Of F(4x4, 3x3) in two dimensions, for tiles, weights and results flattened: (36,36), (36,9), (16,36)."""
    tile = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
    tile += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
    weight = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
    weight += [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
    result = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
    found = (torch.tensor(m, dtype=torch.float64, device="cpu") for m in (tile, weight, result))
    return [torch.kron(m, m) for m in found]


def winograd(x, weight, bias):
    """F.conv2d of 3x3 kernels with padding 1, sides multiples of 4, at 1/4 of the multiplications, without gradient.

    Tiles of 6x6 pixels overlap by 2 and give 4x4 results (Lavin & Gray 2016, arXiv 1509.09308, section 4.3). Rounding
    in float32 is 1e-5 of the largest value: some four times F.conv2d's of channels_last tensors, twenty of contiguous.
    """
    (B, C, H, W), K = x.shape, len(weight)
    from_tile, from_weight, to_result = (m.to(x.dtype) for m in winograd_matrices())
    tiles = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).unfold(1, 6, 4).unfold(2, 6, 4).permute(0, 4, 5, 1, 2, 3)
    u = (from_weight @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(36, K, C).transpose(1, 2)
    y = x.new_empty(B, H // 4, 4, W // 4, 4, K)
    some = max(1, 4 * 128 // W)  # rows of tiles at a time: about 128 tiles, which fit the cache
    for b in range(B):
        for row in range(0, H // 4, some):
            v = from_tile @ tiles[b, :, :, row : row + some].reshape(36, -1)
            v = to_result @ (v.view(36, -1, C) @ u).view(36, -1)
            y[b, row : row + some] = v.view(4, 4, -1, W // 4, K).permute(2, 0, 3, 1, 4)
    y = y.view(B, H, W, K)
    return (y if bias is None else y.add_(bias)).permute(0, 3, 1, 2)
