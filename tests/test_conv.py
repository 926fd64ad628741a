"""The CPU's ways to convolve compute what torch.nn.functional does, and are taken where they should be."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

import conv
from unet import UNet
from vae import VAE


def made(c_in, c_out, kernel=3, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return conv.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options).to(dtype, memory_format=torch.channels_last)


def picture(*shape, dtype=torch.float64):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 5, 4, 4), (3, 2, 8, 12), (2, 7, 20, 4)])
def test_values_and_layout(shape, bias):
    net, x = made(shape[1], 6, bias=bias), picture(*shape)
    for function, expected in (
        (conv.conv_as_matmul, F.conv2d(x, net.weight, net.bias, padding=1)),
        (conv.winograd, F.conv2d(x, net.weight, net.bias, padding=1)),
    ):
        with torch.no_grad():
            got = function(x, net.weight, net.bias)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        assert got.is_contiguous(memory_format=torch.channels_last), function


def test_rounding_of_winograd():
    """float32: about 1e-5 of the largest value, as its docstring says."""
    net, x = made(256, 64, dtype=torch.float32), picture(1, 256, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        exact = F.conv2d(x.double(), net.weight.double(), net.bias.double(), padding=1)
        assert (conv.winograd(x, net.weight, net.bias) - exact).abs().max() < 3e-5 * exact.abs().max()


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (2, 4, 32, 48)])
def test_upsample_conv_and_its_gradients(shape):
    net, x = made(4, 6), picture(*shape).requires_grad_()
    slope, found = picture(shape[0], 6, 2 * shape[2], 2 * shape[3]), []
    for y in (conv.upsample_conv(x, net), F.conv2d(F.interpolate(x, scale_factor=2.0), *net.parameters(), padding=1)):
        found.append((y, *torch.autograd.grad(y, (x, *net.parameters()), slope)))
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_gradients_of_conv_as_matmul():
    net, x, found = made(3, 5), picture(2, 3, 8, 4).requires_grad_(), []
    for y in (conv.conv_as_matmul(x, net.weight, net.bias), F.conv2d(x, net.weight, net.bias, padding=1)):
        found.append(torch.autograd.grad(y.square().sum(), (x, *net.parameters())))
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_gradients_of_conv_as_matmul():
    """In a process of its own: with Tensor.unfold in it Inductor of torch 2.13 writes beyond its memory, and dies."""
    code = """if True:
        import conv, torch
        net = conv.Conv2d(512, 128, 3, padding=1).to(memory_format=torch.channels_last)
        x = torch.randn(1, 512, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
        inputs = x, *net.parameters()
        got = torch.autograd.grad(torch.compile(net)(x).square().sum(), inputs)
        y = torch.nn.functional.conv2d(*inputs, padding=1)
        for a, b in zip(got, torch.autograd.grad(y.square().sum(), inputs)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "channels, side, grad, way",
    [
        (512, 8, True, "conv_as_matmul"),
        (512, 8, False, "conv_as_matmul"),
        (512, 16, False, None),
        (64, 8, False, None),
        (256, 64, False, "winograd"),
        (256, 64, True, None),
        (256, 62, False, None),
        (128, 64, False, None),
    ],
)
def test_which_way(monkeypatch, channels, side, grad, way):
    taken = []
    for name in ("conv_as_matmul", "winograd"):
        real = getattr(conv, name)
        monkeypatch.setattr(conv, name, lambda *a, name=name, real=real: taken.append(name) or real(*a))
    net, x = made(channels, 128, dtype=torch.float32), picture(1, channels, side, side, dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        got = net(x)
    assert taken == [way] * (way is not None)
    torch.testing.assert_close(got, nn.Conv2d.forward(net, x), rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        net(x)
    assert "winograd" not in taken[1:], "bfloat16 has no digits to lose"


@pytest.mark.parametrize(
    "options",
    [{"dilation": 2}, {"groups": 2}, {"padding_mode": "reflect"}, {"stride": 2}, {"c_out": 8}, {"kernel": 5}],
)
@pytest.mark.parametrize("channels, side", [(512, 8), (256, 64)])
def test_others_are_plain(options, channels, side):
    """Whatever is no 3x3 convolution of many channels is nn.Conv2d's own, to the bit."""
    net = made(channels, **dict(c_out=128, dtype=torch.float32) | options)
    x = picture(1, channels, side, side, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(net(x), nn.Conv2d.forward(net, x))
        assert torch.equal(net(x[0]), nn.Conv2d.forward(net, x[0]))  # a picture without a batch


def test_what_takes_the_place_of_a_convolution_is_called():
    """upsample_conv reads the weight alone: not of a module that does more with it."""

    class Twice(conv.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    x, net = picture(1, 4, 32, 32), made(4, 6)
    twin = Twice(4, 6, 3, padding=1).to(torch.float64, memory_format=torch.channels_last)
    twin.load_state_dict(net.state_dict())
    torch.testing.assert_close(conv.upsample_conv(x, twin), 2 * conv.upsample_conv(x, net), rtol=0, atol=1e-12)
    wide = conv.Conv2d(4, 6, 3, padding=2, dilation=2).to(torch.float64, memory_format=torch.channels_last)
    assert torch.equal(conv.upsample_conv(x, wide), wide(F.interpolate(x, scale_factor=2.0)))


def test_recorded_for_all_sizes():
    """A traced or exported graph does not have the way of the size that it was recorded with."""
    net = nn.Sequential(made(512, 128, dtype=torch.float32)).eval()
    small, large = (picture(n, 512, 8, 8, dtype=torch.float32) for n in (1, 3))
    with torch.no_grad():
        traced = torch.jit.trace(net, small, check_trace=False)
        exported = torch.export.export(net, (large,), dynamic_shapes=[{0: torch.export.Dim("batch", max=9)}]).module()
        for x in (small, large):
            for got in (traced(x), exported(x)):
                torch.testing.assert_close(got, net(x), rtol=0, atol=1e-4)


def test_the_models_convolve_so(monkeypatch):
    """At full width both ways occur, and the models' outputs are those of plain convolutions."""
    torch.manual_seed(0)
    vae = VAE(ch=128, ch_mult=(1, 2), num_res_blocks=1, mid_attention=False).eval()
    unet = UNet(channels=128, channel_mult=(1, 4), num_res_blocks=1, attention_ds=(), head_dim=64, num_heads=0).eval()
    nn.init.normal_(unet.conv_out.weight, std=0.02)
    z, x, t = picture(1, 4, 64, 64, dtype=torch.float32), picture(2, 4, 8, 8, dtype=torch.float32), torch.ones(2)
    for net in (vae, unet):
        net.to(memory_format=torch.channels_last)
    taken, found = set(), []
    for name in ("conv_as_matmul", "winograd"):
        real = getattr(conv, name)
        monkeypatch.setattr(conv, name, lambda *a, name=name, real=real: taken.add(name) or real(*a))
    with torch.no_grad():
        found = [vae.decode(z), unet(x, t)]
        monkeypatch.setattr(conv.Conv2d, "forward", nn.Conv2d.forward)
        plain = [vae.decode(z), unet(x, t)]
    assert taken == {"conv_as_matmul", "winograd"}
    for got, expected in zip(found, plain):
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
