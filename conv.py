"""Convolutions that are faster than PyTorch's on a CPU, with the same weights and, up to rounding, the same results.

oneDNN, which PyTorch calls there, is slow on small images with many channels, as in the middle of a U-Net, and does
more multiplications than necessary on large ones. On a GPU, and wherever nothing was gained, this is nn.Conv2d.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Conv2d(nn.Conv2d):
    """nn.Conv2d that chooses the fastest method for its input; LOG.md has the measurements behind the limits."""

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
    """Whether x's size may decide: on a CPU, but not in a traced or exported graph, which is used for all sizes."""
    return x.device.type == "cpu" and not torch.jit.is_tracing() and not torch.compiler.is_exporting()


def is_3x3(conv):
    """Whether it is a plain 3x3 convolution that keeps the size."""
    plain = conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    return plain and conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.stride == (1, 1)


def channels_last(t):
    return t.is_contiguous(memory_format=torch.channels_last)


def conv_as_matmul(x, weight, bias):
    """F.conv2d with padding that keeps the size, as one product of (B H W, k k C_in) and (k k C_in, C_out)."""
    k, (_, _, H, W) = weight.shape[-1], x.shape
    x = F.pad(x, [k // 2] * 4).permute(0, 2, 3, 1)  # (B,H+k-1,W+k-1,C)
    # not Tensor.unfold: Inductor of torch 2.13 compiles its gradient to writes out of bounds
    rows = torch.cat([x[:, i : i + H, j : j + W] for i in range(k) for j in range(k)], dim=-1)
    return F.linear(rows, weight.permute(0, 2, 3, 1).reshape(len(weight), -1), bias).permute(0, 3, 1, 2)


def upsample_conv(x, conv):
    """conv(nearest upsampling of x to twice the side), for a 3x3 conv.

    Each output pixel depends on 2x2 input pixels only, so this equals a transposed convolution of kernel 4 and stride
    2, with 4/9 of the multiplications. Hooks of conv do not run.
    """
    B, C, H, W = x.shape
    own = type(conv) is Conv2d and is_3x3(conv)  # what replaced it, a LoRA layer say, must be called
    if not may_choose(x) or not own or not channels_last(conv.weight) or B * H * W < 1024:
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    w = conv.weight.flip(2, 3).transpose(0, 1)  # (C_in,C_out,3,3)
    w = F.pad(w, (0, 1, 0, 1)) + F.pad(w, (1, 0, 0, 1)) + F.pad(w, (0, 1, 1, 0)) + F.pad(w, (1, 0, 1, 0))
    return F.conv_transpose2d(x, w.contiguous(memory_format=torch.channels_last), conv.bias, stride=2, padding=1)


def winograd_matrices():
    """The matrices of F(4x4, 3x3) for flattened tiles, weights and results: (36,36), (36,9), (16,36)."""
    tile = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
    tile += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
    weight = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
    weight += [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
    result = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
    matrices = (torch.tensor(m, dtype=torch.float64, device="cpu") for m in (tile, weight, result))
    return [torch.kron(m, m) for m in matrices]


def winograd(x, weight, bias):
    """F.conv2d of 3x3 kernels with padding 1 at 1/4 of the multiplications; sides are multiples of 4, no gradient.

    Tiles of 6x6 pixels overlap by 2 and give 4x4 results (Lavin & Gray 2016, arXiv 1509.09308, section 4.3). In float32
    the rounding error is 1e-5 of the largest value: four times that of F.conv2d on channels_last tensors.
    """
    (B, C, H, W), K = x.shape, len(weight)
    from_tile, from_weight, to_result = (m.to(x.dtype) for m in winograd_matrices())
    tiles = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).unfold(1, 6, 4).unfold(2, 6, 4).permute(0, 4, 5, 1, 2, 3)
    u = (from_weight @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(36, K, C).transpose(1, 2)
    y = x.new_empty(B, H // 4, 4, W // 4, 4, K)
    rows = max(1, 4 * 128 // W)  # rows of tiles at a time: about 128 tiles fit the cache
    for b in range(B):
        for row in range(0, H // 4, rows):
            v = from_tile @ tiles[b, :, :, row : row + rows].reshape(36, -1)
            v = to_result @ (v.view(36, -1, C) @ u).view(36, -1)
            y[b, row : row + rows] = v.view(4, 4, -1, W // 4, K).permute(2, 0, 3, 1, 4)
    y = y.view(B, H, W, K)
    return (y if bias is None else y.add_(bias)).permute(0, 3, 1, 2)
