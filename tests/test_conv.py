"""conv.py: the CPU's methods compute what F.conv2d does, and are used for the sizes that LOG.md names."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import fill, near, normal

import conv
from unet import UNet
from vae import VAE


def layer(c_in, c_out, kernel=3, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return conv.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options).to(dtype, memory_format=torch.channels_last)


def image(*shape, dtype=torch.float64):
    return normal(*shape, seed=1, dtype=torch.float64).to(dtype, memory_format=torch.channels_last)


@pytest.fixture
def used(monkeypatch):
    """Names of the methods that have run."""
    names = []
    for name in ("conv_as_matmul", "winograd"):
        real = getattr(conv, name)
        monkeypatch.setattr(conv, name, lambda *a, name=name, real=real: names.append(name) or real(*a))
    return names


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 5, 4, 4), (3, 2, 8, 12), (2, 7, 20, 4)])
def test_values_and_layout(shape, bias):
    net, x = layer(shape[1], 6, bias=bias), image(*shape)
    for method in (conv.conv_as_matmul, conv.winograd):
        with torch.no_grad():
            y = method(x, net.weight, net.bias)
        near(y, nn.Conv2d.forward(net, x), 1e-12)
        assert y.is_contiguous(memory_format=torch.channels_last), method


def test_rounding_of_winograd():
    net, x = layer(256, 64, dtype=torch.float32), image(1, 256, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        exact = F.conv2d(x.double(), net.weight.double(), net.bias.double(), padding=1)
        assert (conv.winograd(x, net.weight, net.bias) - exact).abs().max() < 3e-5 * exact.abs().max()


@pytest.mark.parametrize("function", ["conv_as_matmul", "upsample_conv"])
def test_gradients(function):
    net, x = layer(4, 6), image(2, 4, 32, 48).requires_grad_()
    if function == "conv_as_matmul":
        y, large = conv.conv_as_matmul(x, net.weight, net.bias), x
    else:
        y, large = conv.upsample_conv(x, net), F.interpolate(x, scale_factor=2.0)
    slope, expected = image(*y.shape), nn.Conv2d.forward(net, large)
    found = [(out, *torch.autograd.grad(out, (x, *net.parameters()), slope)) for out in (y, expected)]
    near(*found, 1e-9)


METHODS = [(512, 8, True, "conv_as_matmul"), (512, 8, False, "conv_as_matmul"), (512, 16, False, None)]
METHODS += [(256, 64, False, "winograd"), (256, 64, True, None), (256, 66, False, None), (128, 64, False, None)]


@pytest.mark.parametrize("channels, side, grad, method", METHODS)
def test_method_by_size(used, channels, side, grad, method):
    net, x = layer(channels, 128, dtype=torch.float32), image(1, channels, side, side, dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        y = net(x)
    assert used == [method] * (method is not None)
    near(y, nn.Conv2d.forward(net, x), 1e-4)
    used.clear()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        net(x)
    assert "winograd" not in used, "its rounding error is too large in bfloat16"


OTHERS = [{"dilation": 2}, {"groups": 2}, {"padding_mode": "reflect"}, {"stride": 2}, {"c_out": 8}, {"kernel": 5}]


@pytest.mark.parametrize("options", OTHERS)
@pytest.mark.parametrize("channels, side", [(512, 8), (256, 64)])
def test_other_convolutions_are_pytorchs(used, options, channels, side):
    net = layer(channels, **dict(c_out=128, dtype=torch.float32) | options)
    with torch.no_grad():
        net(image(1, channels, side, side, dtype=torch.float32))
        net(image(1, channels, side, side, dtype=torch.float32)[0])  # without a batch dimension
    assert not used


def test_upsample_conv_calls_what_replaced_the_convolution():
    class Twice(conv.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    x, net = image(1, 4, 32, 32), layer(4, 6)
    twin = Twice(4, 6, 3, padding=1).to(torch.float64, memory_format=torch.channels_last)
    twin.load_state_dict(net.state_dict())
    near(conv.upsample_conv(x, twin), 2 * conv.upsample_conv(x, net), 1e-12)
    wide = conv.Conv2d(4, 6, 3, padding=2, dilation=2).to(torch.float64, memory_format=torch.channels_last)
    assert torch.equal(conv.upsample_conv(x, wide), wide(F.interpolate(x, scale_factor=2.0)))


def test_traced_and_exported_graphs_hold_for_all_sizes(used):
    net = nn.Sequential(layer(512, 128, dtype=torch.float32)).eval()
    small, large = (image(n, 512, 8, 8, dtype=torch.float32) for n in (1, 3))
    with torch.no_grad():
        traced = torch.jit.trace(net, small, check_trace=False)
        exported = torch.export.export(net, (large,), dynamic_shapes=[{0: torch.export.Dim("batch", max=9)}]).module()
        assert not used
        for x in (small, large):
            for graph in (traced, exported):
                near(graph(x), net(x), 1e-4)


SETTINGS = [{}, {"linear_proj": True}, {"resblock_updown": True}, {"resample": "pool", "unet_patch": 2}, "vae"]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_channels_last_reaches_every_convolution(settings):
    """And every norm, forward and backward: another layout anywhere copies, and costs the methods above."""
    small = dict(channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_ds=(1, 2), num_heads=2, norm_groups=4)
    if settings == "vae":
        net, x = VAE(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4), image(2, 3, 16, 16)
    else:
        net, x = UNet(**small | dict(context_dim=12) | settings), image(2, 4, 8, 8)
    net, seen = fill(net).double().to(memory_format=torch.channels_last), []

    def look(name, tensors):
        seen.extend((name, x.stride(1) == 1 and x.stride(3) >= x.shape[1]) for x in tensors)

    plain = [module for module in net.modules() if isinstance(module, nn.Conv2d) and module.stride == (1, 1)]
    assert all(isinstance(module, conv.Conv2d) for module in plain)
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            module.register_forward_pre_hook(lambda m, x, name=name: look(name, x))
            module.register_full_backward_hook(lambda m, _, g, name=name: look(f"{name} gradient", g))
    x.requires_grad_()
    other = () if settings == "vae" else (torch.tensor([3.0, 700.0]), torch.randn(2, 5, 12).double())
    out = net.decode(net.encode(x).mode()) if settings == "vae" else net(x, *other)
    out.square().sum().backward()
    assert out.is_contiguous(memory_format=torch.channels_last)
    lost = {name for name, ok in seen if not ok} - {"quant_conv gradient"}  # the moments' 2z channels
    assert len(seen) > 60 and not lost
