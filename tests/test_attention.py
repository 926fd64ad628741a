"""attention.py: every backend against the formula in float64; the kernels, interpreted where there is no GPU."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import fill
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attention as room
from attention import BACKENDS, Attention, attention, choose_backend, sdpa_runs, use_attention
from text import TextBlock
from unet import UNet
from vae import VAE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(room.triton is None, reason="Triton is not installed")
DIMS = (24, 32, 40, 48, 64, 80, 96, 128, 160)
# |x - float64's| / |float64's|: float32 sums to its last digits, the others round p and dS to 11 and 8 bits
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tensors(B, Lq, Lk, H, D, dtype=torch.float32):
    """q, k, v and the gradient of the output."""
    return [normal(B, L, H, D, seed=i, dtype=dtype) for i, L in enumerate((Lq, Lk, Lk, Lq))]


def gradients(q, k, v, grad, causal, backend):
    """The output and the gradients of q, k, v."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, causal, backend)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def formula(q, k, v, grad, causal):
    """The same in float64, written out with its derivatives (no autograd, nothing of attention.py)."""
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    s = torch.einsum("blhd,bmhd->bhlm", q, k) * scale
    if causal:
        rows, keys = (torch.arange(n, device=q.device) for n in s.shape[-2:])
        s = s.masked_fill(keys[None] > rows[:, None], -torch.inf)
    p = (s - s.amax(-1, keepdim=True)).exp()
    p = p / p.sum(-1, keepdim=True)
    dp = torch.einsum("blhd,bmhd->bhlm", grad, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dv = torch.einsum("bhlm,blhd->bmhd", p, grad)
    dq, dk = torch.einsum("bhlm,bmhd->blhd", ds, k), torch.einsum("bhlm,blhd->bmhd", ds, q)
    return torch.einsum("bhlm,bmhd->blhd", p, v), dq, dk, dv


def check(q, k, v, grad, causal=False, backend="triton"):
    got = gradients(q, k, v, grad, causal, backend)
    for name, x, expected in zip(("out", "dq", "dk", "dv"), got, formula(q, k, v, grad, causal)):
        assert x.shape == expected.shape and x.dtype == q.dtype
        assert x.isfinite().all(), name
        error = (x.double() - expected).norm() / expected.norm().clamp(min=1)
        assert error < TOLERANCE[q.dtype], f"{name}: {error:.2e}"
    return got


# --- the kernels ---


@needs_triton
@pytest.mark.parametrize("dim", DIMS)
def test_every_head_dim(dim):
    """Over several tiles of keys, the last one ragged, and over the one that holds a prompt."""
    check(*tensors(1, 70, 150, 1, dim))
    check(*tensors(1, 66, 77, 1, dim), causal=dim % 16 == 8)


@needs_triton
@pytest.mark.parametrize("lengths", [(1, 1), (7, 1), (1, 130), (130, 7), (16, 16), (77, 77), (128, 129), (129, 128)])
@pytest.mark.parametrize("general", [True, False])
def test_lengths(lengths, general, monkeypatch):
    """From one to a tile more; the looping kernels see the short ones too."""
    if general:
        monkeypatch.setattr(room, "SHORT", 0)
    for causal in (False, True):
        check(*tensors(1, *lengths, 1, 40), causal)


@needs_triton
def test_many_tiles():
    """Causal, with tiles before, on and behind the diagonal; the second example's and head's are found."""
    check(*tensors(1, 256, 256, 1, 64), causal=True)
    check(*tensors(1, 200, 300, 1, 64), causal=True)
    check(*tensors(1, 300, 200, 1, 64), causal=True)
    check(*tensors(2, 64, 130, 3, 16))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [40, 64, 160])
def test_half_precision(dim, dtype):
    check(*tensors(1, 66, 140, 1, dim, dtype), causal=True)
    check(*tensors(1, 66, 77, 1, dim, dtype))


@needs_triton
def test_large_logits():
    """A softmax that is all but a maximum: exponentials of differences never overflow."""
    for Lk in (77, 150):
        q, k, v, grad = tensors(1, 40, Lk, 1, 32)
        out, *slopes = gradients(50 * q, 50 * k, v, grad, False, "triton")
        torch.testing.assert_close(out, formula(50 * q, 50 * k, v, grad, False)[0].float(), rtol=1e-3, atol=1e-3)
        assert all(x.isfinite().all() for x in slopes)


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
def test_logits_beyond_float16(backend):
    """Products above 65504 whose logits are below it."""
    if backend == "triton" and room.triton is None:
        pytest.skip("Triton is not installed")
    q, k, v, grad = tensors(1, 5, 7, 1, 64, torch.float16)
    for x in gradients(100 * q, 100 * k, v, grad, False, backend):
        assert x.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference", "auto"])
@pytest.mark.parametrize("sizes", [(0, 5, 7, 2, 16), (2, 0, 7, 2, 16), (2, 5, 0, 2, 16), (2, 5, 7, 0, 16)])
def test_nothing(backend, sizes):
    """No examples, queries, keys or heads: empty, or zeros, with gradients."""
    q, k, v, grad = tensors(*sizes)
    for x, given in zip(gradients(q, k, v, grad, False, backend), (q, q, k, v)):
        assert x.shape == given.shape and not x.any()
    w = normal(16)
    for x, given in zip(norm_gradients(q, k, v, grad, w, w, False, backend), (q, q, k, v, w, w)):
        assert x.shape == given.shape and not x.any()


@needs_triton
@pytest.mark.parametrize("general", [True, False])
def test_views_are_read_where_they_lie(general, monkeypatch):
    """q, k, v from one packed tensor, from (B,heads,L,d), and gradients that are expanded or permuted."""
    if general:
        monkeypatch.setattr(room, "SHORT", 0)
    Lk = 20
    packed = normal(2, Lk, 3, 2, 24, seed=5)
    q, k, v = packed.unbind(2)
    assert room._readable(q) is q and q.data_ptr() == packed.data_ptr()
    check(q, k, v, normal(2, 2, Lk, 24, seed=6).transpose(1, 2))
    heads_first = [normal(2, 2, Lk, 24, seed=i).transpose(1, 2) for i in range(3)]
    check(*heads_first, normal(1, 1, 1, 24).expand(2, Lk, 2, 24))
    check(*heads_first, normal(1, 1, 1, 1).expand(2, Lk, 2, 24))
    check(*[x[:, ::2] for x in (q, k, v)], normal(2, Lk // 2, 2, 25)[..., :24])  # rows left out; rows of 25
    check(*[normal(2, 24, 2, Lk, seed=i).transpose(1, 3) for i in range(4)])  # the last dimension is the one copied
    assert attention(q, k, v, backend="triton").is_contiguous()
    far = torch.empty(1, device="meta").as_strided((1, 4096, 1, 8), (8, 2**20, 8, 1))  # its rows outgrow int32
    assert room._readable(far).stride(1) == 8


def test_what_is_said_of_alignment():
    """Never more than holds: on a GPU a load of 16 bytes that lies otherwise is a fault."""
    rows = torch.zeros(2, 16, 1, 40)
    for D, align in ((40, 8), (32, 8), (36, 1), (33, 1)):  # the output's rows of 36 are not aligned, though q's are
        assert room._strides(rows[..., :D], rows[..., :D]) == ([640, 40, 40] * 2, align)
    assert room._strides(torch.zeros(2, 16, 3, 41)[..., :40]) == ([1968, 123, 41], 1)


def check_bits(call):
    for x, y in zip(call(), call()):
        assert x.cpu().numpy().tobytes() == y.cpu().numpy().tobytes()


@needs_triton
def test_same_bits_again():
    for lengths in ((40, 140), (300, 77)):
        check_bits(lambda lengths=lengths: gradients(*tensors(1, *lengths, 1, 32), False, "triton"))


@needs_triton
@pytest.mark.parametrize("Lk", [20, 140])
def test_finite_differences(Lk):
    q, k, v, grad = tensors(1, 12, Lk, 1, 24)
    slopes = gradients(q, k, v, grad, False, "triton")[1:]
    steps = tensors(1, 12, Lk, 1, 24)[::-1][1:]
    for i, (slope, step) in enumerate(zip(slopes, (steps[2], steps[1], steps[0]))):
        step = step.flip(1)
        ends = []
        for sign in (1, -1):
            moved = [q, k, v]
            moved[i] = moved[i] + sign * 1e-2 * step
            ends.append((attention(*moved, backend="triton").double() * grad).sum())
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-2, (slope * step).sum().double(), rtol=2e-3, atol=2e-3)


@needs_triton
def test_operators_keep_pytorchs_rules():
    q, k, v, grad = (x.requires_grad_() for x in tensors(1, 9, 20, 2, 24))
    torch.library.opcheck(torch.ops.ldm.attention, (q, k, v, False))
    out, lse = torch.ops.ldm.attention(q, k, v, False)
    given = [x.detach() for x in (grad, q, k, v, out, lse)]
    torch.library.opcheck(torch.ops.ldm.attention_backward, (*given, False))


@needs_triton
def test_second_derivatives_are_refused():
    q, k, v, _ = (x.requires_grad_() for x in tensors(1, 4, 5, 1, 16))
    (slope,) = torch.autograd.grad(attention(q, k, v, backend="triton").square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative: take sdpa_math or reference"):
        slope.sum().backward()


# --- QK-norm in the kernels ---


def uneven(B, Lq, Lk, H, D, dtype=torch.float32):
    """q, k, v, the gradient of the output, with rows of q and k of all sizes; and norm weights far from 1, some < 0."""
    q, k, v, grad = tensors(B, Lq, Lk, H, D)
    q, k = (x * 2 ** normal(*x.shape[:3], 1, seed=8 + i) for i, x in enumerate((q, k)))
    q, k, v, grad = (x.to(dtype) for x in (q, k, v, grad))
    return q, k, v, grad, 1.5 * normal(D, seed=6), normal(D, seed=7)


def norm_gradients(q, k, v, grad, wq, wk, causal, backend, eps=1e-6):
    """The output and the gradients of q, k, v and of both weights."""
    q, k, v, wq, wk = given = [x.detach().requires_grad_() for x in (q, k, v, wq, wk)]
    out = attention(q, k, v, causal, backend, (wq, wk, eps))
    return out.detach(), *torch.autograd.grad(out, given, grad)


def norm_formula(q, k, v, grad, wq, wk, causal, eps=1e-6):
    """The same in float64, by autograd, with nothing of attention.py."""
    q, k, v, wq, wk = given = [x.detach().double().requires_grad_() for x in (q, k, v, wq, wk)]
    q, k = (torch.nn.functional.rms_norm(x, w.shape, w, eps) for x, w in ((q, wq), (k, wk)))
    s = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf)
    out = torch.einsum("bhlm,bmhd->blhd", s.softmax(-1), v)
    return out.detach(), *torch.autograd.grad(out, given, grad.double())


def check_norm(q, k, v, grad, wq, wk, causal=False, backend="triton"):
    got, expected = norm_gradients(q, k, v, grad, wq, wk, causal, backend), norm_formula(q, k, v, grad, wq, wk, causal)
    for name, x, truth in zip(("out", "dq", "dk", "dv", "dwq", "dwk"), got, expected):
        assert x.shape == truth.shape and x.dtype == (wq.dtype if "w" in name else q.dtype)
        assert x.isfinite().all(), name
        error = (x.double() - truth).norm() / truth.norm().clamp(min=1)
        assert error < 2 * TOLERANCE[q.dtype], f"{name}: {error:.2e}"  # twice: q and k are rounded once more


@needs_triton
@pytest.mark.parametrize("dim", [24, 40, 64, 80, 160])
def test_norm_at_head_dims(dim):
    """Over several tiles of keys, and over the one that holds a prompt."""
    check_norm(*uneven(1, 70, 150, 1, dim), causal=dim % 16 == 8)
    check_norm(*uneven(1, 66, 77, 1, dim), causal=dim % 16 == 0)


@needs_triton
@pytest.mark.parametrize("lengths", [(1, 1), (7, 1), (1, 130), (130, 7), (129, 128)])
@pytest.mark.parametrize("general", [True, False])
def test_norm_at_lengths(lengths, general, monkeypatch):
    if general:
        monkeypatch.setattr(room, "SHORT", 0)
    for causal in (False, True):
        check_norm(*uneven(1, *lengths, 1, 40), causal)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_in_half_precision(dtype):
    for dim, Lk in ((40, 140), (160, 140), (64, 77)):
        check_norm(*uneven(1, 66, Lk, 1, dim, dtype), causal=dim == 40)


@needs_triton
def test_norm_of_views_and_several_heads():
    """Each head's and example's own root mean squares are found; the inputs may lie in one tensor."""
    for Lk in (20, 140):
        _, _, _, grad, wq, wk = uneven(2, Lk, Lk, 3, 24)
        q, k, v = (normal(2, Lk, 3, 3, 24, seed=5) * 2 ** normal(2, Lk, 3, 3, 1, seed=4)).unbind(2)
        check_norm(q, k, v, grad, wq, wk)
        q, k = (normal(2, 3, Lk, 24, seed=i).transpose(1, 2) for i in (1, 2))
        check_norm(q, k[:, ::2], v[:, ::2], grad, wq, wk)


@needs_triton
def test_norm_of_rows_of_zeros():
    """Their root mean square is that of eps; and a weight may be zero."""
    for Lk in (20, 140):
        q, k, v, grad, wq, wk = uneven(1, 30, Lk, 1, 40)
        q, k = (x.masked_fill(torch.arange(x.shape[1], device=DEVICE)[None, :, None, None] == 3, 0) for x in (q, k))
        wq = wq.masked_fill(torch.arange(40, device=DEVICE) == 5, 0)
        given = q, k, v, grad, wq, wk
        for x, truth in zip(norm_gradients(*given, True, "triton", 1e-2), norm_formula(*given, True, 1e-2)):
            torch.testing.assert_close(x.double(), truth, rtol=1e-4, atol=1e-4)


@needs_triton
def test_norm_gives_the_same_bits_again():
    for lengths in ((40, 140), (150, 77)):
        check_bits(lambda lengths=lengths: norm_gradients(*uneven(1, *lengths, 2, 24), False, "triton"))


@needs_triton
@pytest.mark.parametrize("Lk", [20, 140])
def test_norm_operators_keep_pytorchs_rules(Lk):
    q, k, v, grad, wq, wk = (x.requires_grad_() for x in uneven(1, 9, Lk, 2, 24))
    weight = (wq * wk).detach().requires_grad_()
    torch.library.opcheck(torch.ops.ldm.attention, (q, k, v, False, weight, 1e-6))
    out, lse = torch.ops.ldm.attention(q, k, v, False, weight, 1e-6)
    given = [x.detach() for x in (grad, q, k, v, out, lse)]
    torch.library.opcheck(torch.ops.ldm.attention_backward, (*given, False, weight.detach(), 1e-6))


@needs_triton
@pytest.mark.parametrize("fits, best", [({16, 32, 64}, 32), ({16}, 16), (set(), None)])
def test_which_tiling_runs(fits, best, monkeypatch):
    """The fastest that fits the GPU; the first that fits where bits count; a graph's capture wants one known before."""
    started, state = [], {"deterministic": False, "capturing": False}

    class Kernel:
        def __getitem__(self, grid):
            def run(*args, BM, **constants):
                if BM not in fits:
                    raise room.triton.runtime.errors.OutOfResources(110592, 101376, "shared memory")
                started.append(BM)

            return run

    def milliseconds(call):
        call()
        return abs(started[-1] - 32)

    monkeypatch.setitem(room.KERNELS, "_forward", Kernel())
    monkeypatch.setattr(room, "tilings", lambda *a: [dict(BM=BM, BN=16) for BM in (128, 64, 32, 16)])
    monkeypatch.setattr(room, "_milliseconds", milliseconds)
    monkeypatch.setattr(room, "_best", {})
    monkeypatch.setattr(room, "INTERPRET", False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: state["deterministic"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])

    def launched(weight=None, **now):
        state.update(now)
        started.clear()
        x = torch.zeros(1, 200, 1, 16)
        room.attention_forward(x, x, x, False, weight, 1e-6)
        return list(started)

    if not fits:
        with pytest.raises(RuntimeError, match="no tiling of _forward for head dim 16 fits this GPU: take sdpa"):
            launched()
        return
    first = max(fits)
    with pytest.raises(RuntimeError, match="a new shape for _forward in a CUDA graph's capture: call it once before"):
        launched(capturing=True)
    assert sorted(launched(capturing=False)) == sorted([*fits, best])  # each once, then the best
    assert launched() == launched(capturing=True) == [best]  # a captured graph has it too
    assert sorted(launched(torch.ones(16), capturing=False)) == sorted([*fits, best])  # QK-norm is another kernel
    assert launched(deterministic=True) == [first]
    fits = fits - {best}  # as where tensors that are not aligned, and need less shared memory, came first
    if fits:
        second = min(fits, key=lambda BM: abs(BM - 32))
        assert sorted(launched(deterministic=False)) == sorted([*fits, second])
        assert launched() == [second]


@needs_triton
def test_precision_of_products(monkeypatch):
    """TF32 in float32's products where PyTorch's own have it, by the old setting or the new."""
    told, matmul, x = [], torch.backends.cuda.matmul, torch.zeros(1, 200, 1, 16)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, PREC, **constants: told.append(PREC)

    monkeypatch.setitem(room.KERNELS, "_forward", Kernel())
    before = matmul.fp32_precision
    try:
        for name, value in (("fp32_precision", "tf32"), ("fp32_precision", "ieee"), ("allow_tf32", True)):
            setattr(matmul, name, value)
            room.attention_forward(x, x, x, False)
            matmul.fp32_precision = before
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before
    assert told == ["tf32", "ieee", "tf32"]


def test_column_tiles():
    """A head dim in at most two powers of two, never more than the next one."""
    told = {
        24: (32, 0),
        32: (32, 0),
        40: (32, 16),
        48: (32, 16),
        64: (64, 0),
        80: (64, 16),
        96: (64, 32),
        128: (128, 0),
    }
    told |= {160: (128, 32), 8: (16, 0), 1: (16, 0), 112: (128, 0)}
    assert {dim: room.column_tiles(dim) for dim in told} == told
    for dim in range(1, 161):
        first, second = room.column_tiles(dim)
        assert (
            dim <= first + second <= max(16, 1 << (dim - 1).bit_length()) and first >= 16 and second in (0, 16, 32, 64)
        )


@needs_triton
def test_kernels_compile_for_gpus(tmp_path):
    """Without a GPU: Hopper's and Ampere's matrix instructions, their shared memory, and no register spilled.

    LDM_ALL_KERNELS=1 tries all that ship, as in LOG.md, in most of an hour.
    """
    tool = Path(__file__).parent / "attention_aot.py"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    runs = [["--first", "--dims=64", "--dtypes=bf16"], ["--first", "--dims=40,160", "--dtypes=bf16", "--archs=90"]]
    runs += [["--norm", "--first", "--dims=64", "--dtypes=bf16", "--archs=90"]]
    lines = []
    for run in [["--archs=80,89,90"], runs[-1]] if os.environ.get("LDM_ALL_KERNELS") else runs:
        done = subprocess.run([sys.executable, tool, *run], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines += [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in lines} == set(room.KERNELS)
    for line in lines:
        if line["sm"] == 89:  # an RTX 4090 takes those of Ampere that fit
            same = [x for x in lines if all(x[key] == line[key] for key in ("kernel", "d", "dtype", "sm"))]
            assert min(x["shared"] for x in same) <= 99 * 1024, line
            continue
        assert line["spilled"] == 0 or room.triton.__version__ != "3.7.1", line  # the one that TILINGS were chosen with
        assert line["shared"] <= {80: 163, 90: 227}[line["sm"]] * 1024, line
        if line["dtype"] in ("bf16", "fp16"):
            assert line["wgmma" if line["sm"] == 90 else "mma"] > 0, line
            assert line["wide"] > 0 or line["kernel"] != "_forward", line  # tiles are fetched 16 bytes at a time


# --- backends ---


def runnable():
    """Those that run on this device."""
    names = ["triton"] if room.triton else []
    if DEVICE.type == "cuda":
        return [*names, "sdpa", "sdpa_efficient", "sdpa_math", "reference", "auto"]
    return [*names, "sdpa", "sdpa_flash", "sdpa_math", "reference", "auto"]


@pytest.mark.parametrize("backend", runnable())
def test_backends_agree(backend):
    check(*tensors(2, 9, 12, 3, 24), backend=backend)
    check(*tensors(2, 12, 12, 3, 24), causal=True, backend=backend)


@pytest.mark.parametrize("backend", runnable())
def test_backends_agree_on_the_norm(backend):
    check_norm(*uneven(2, 9, 12, 3, 24), causal=True, backend=backend)
    *halves, wq, wk = uneven(2, 9, 12, 3, 24, torch.bfloat16)
    check_norm(*halves, wq.bfloat16(), wk.bfloat16(), backend=backend)
    # to the bit what a norm outside gives; under autocast as the layers' outputs come, in halves
    if backend not in ("triton", "auto"):  # which on a GPU may be "triton"
        q, k, v, _ = halves
        norms = [nn.RMSNorm(24, eps=1e-6, device=DEVICE) for _ in range(2)]
        norms[0].weight.data, norms[1].weight.data = wq, wk
        with torch.autocast(DEVICE.type, torch.bfloat16):
            expected = attention(norms[0](q), norms[1](k), v, backend=backend)
            assert torch.equal(attention(q, k, v, backend=backend, qk_norm=(wq, wk, 1e-6)), expected)


@pytest.mark.parametrize("backend", runnable())
def test_autocast(backend):
    """Like SDPA: whatever the inputs' types, autocast's comes out; float64 stays."""
    q, k, v, grad = tensors(1, 9, 12, 2, 24)
    half = [x.bfloat16() for x in (q, k, v)]
    expected = formula(*half, grad, False)[0]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = attention(q, half[1], v, backend=backend)
        assert out.dtype == torch.bfloat16
        assert (out.double() - expected).norm() / expected.norm() < 1e-2
        if backend not in ("triton", "sdpa_flash", "sdpa_efficient"):
            assert attention(q.double(), k.double(), v.double(), backend=backend).dtype == torch.float64


@pytest.mark.skipif(DEVICE.type != "cuda", reason="xformers and cuDNN have kernels for GPUs only")
@pytest.mark.parametrize("backend", ["xformers", "sdpa_flash", "sdpa_cudnn"])
def test_backends_of_gpus(backend):
    if backend == "xformers":
        pytest.importorskip("xformers")
    for causal in (False, True):
        check(*tensors(2, 128, 128, 3, 64, torch.bfloat16), causal, backend)


def test_which_sdpa_runs():
    q, k, v, _ = tensors(2, 16, 16, 2, 24)
    assert sdpa_runs(q, k, v) in room.SDPA
    if DEVICE.type == "cpu":
        assert sdpa_runs(q, k, v, causal=True) == "sdpa_flash"
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            assert sdpa_runs(q, k, v) == "sdpa_math"


def test_times_are_the_gpus(monkeypatch):
    """What is timed is not how fast the host can start it: a model of both clocks, in milliseconds."""
    host, gpu = [0.0], [0.0]

    def work(milliseconds, to_start=0.2):
        host[0] += to_start
        gpu[0] = max(gpu[0], host[0]) + milliseconds

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = max(gpu[0], host[0])

        def elapsed_time(self, other):
            return other.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: work(cycles / 2e6))  # 2 GHz
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert room._milliseconds(lambda: work(0.02)) == pytest.approx(0.02)
    assert room._milliseconds(lambda: work(3.0)) == pytest.approx(3.0)


def test_auto_takes_the_fastest(monkeypatch, capsys):
    """Each shape is measured once, what cannot run is left out, and training's random numbers stay what they were."""
    speed, calls = {"triton": 3.0, "sdpa_flash": 1.0, "sdpa_efficient": 2.0}, []

    def milliseconds(call):
        call()
        (name,) = call.__defaults__
        calls.append(name)
        return speed[name]

    cannot = room._cannot
    monkeypatch.setattr(room, "_cannot", lambda name, *a: cannot(name, *a) if name in speed else "without a speed here")
    monkeypatch.setattr(room, "_milliseconds", milliseconds)
    room._fastest.cache_clear()
    before = torch.get_rng_state()
    arguments = DEVICE, torch.bfloat16, 24, False, (2, 9, 20, 2)  # float32 has no flash on a GPU
    for grad in (True, False, True):
        assert room._fastest(*arguments, grad) == "sdpa_flash"
    assert torch.equal(torch.get_rng_state(), before)
    assert calls.count("sdpa_flash") == 2
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "2x9x2x24 to 20 keys, bfloat16, training: sdpa_flash 1.000 ms" in told[0]
    # with QK-norm they are measured again, each with the norm
    normed, run = [], room.run_backend
    monkeypatch.setattr(room, "run_backend", lambda *a: [normed.append((a[0], a[-1] is not None)), run(*a)][1])
    assert room._fastest(*arguments, True, True) == room._fastest(*arguments, True, True) == "sdpa_flash"
    assert sorted(normed) == sorted({(name, True) for name in calls})
    assert "bfloat16, training, QK-norm: sdpa_flash 1.000 ms" in capsys.readouterr().out
    monkeypatch.setattr(room, "run_backend", run)
    speed["triton"] = 0.5
    assert room._fastest(*arguments[:2], 32, *arguments[3:], True) == ("triton" if room.triton else "sdpa_flash")
    # what cannot run at all falls back
    monkeypatch.setattr(room, "run_backend", lambda *a: (_ for _ in ()).throw(RuntimeError("no kernel\nand more")))
    assert room._fastest(*arguments[:2], 40, *arguments[3:], True) == "sdpa"
    assert "sdpa, as no other way runs here" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="in a CUDA graph's capture: call it once before"):
        room._fastest(torch.device("cuda"), *arguments[1:], True)
    room._fastest.cache_clear()


def test_auto_is_measured_under_checkpointing(monkeypatch, capsys):
    """On a GPU the first call may lie in a block that is computed again: what is measured is no part of it."""
    x, grad, shape = normal(2, 9, 2, 24), normal(2, 9, 2, 24, seed=1), (2, 9, 9, 2)
    monkeypatch.setattr(room, "choose_backend", lambda *a: room._fastest(DEVICE, x.dtype, 24, False, shape, True))
    monkeypatch.setattr(room, "_milliseconds", lambda call: [call(), 1.0][1])
    room._fastest.cache_clear()
    x.requires_grad_()

    def block(x):
        return attention(x, 2 * x, x.sin())

    out = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    (slope,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(slope, torch.autograd.grad(block(x), x, grad)[0])
    assert "float32, training: " in capsys.readouterr().out
    room._fastest.cache_clear()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="plays a GPU")
def test_what_auto_is_on_a_gpu(monkeypatch):
    """Measured, but with deterministic algorithms the kernels, whose bits do not change."""
    gpu, half = torch.device("cuda", 0), torch.bfloat16
    monkeypatch.setattr(room, "_fastest", lambda *a: "measured with the norm" if a[-1] else "measured")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_backend("auto", gpu, half, 64) == "measured"
    assert choose_backend("auto", gpu, half, 64, norm=True) == "measured with the norm"
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_backend("auto", gpu, half, 64) == ("triton" if room.triton else "sdpa")
        assert choose_backend("auto", gpu, half, 512) == choose_backend("auto", gpu, torch.float64, 64) == "sdpa"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    if room.triton:
        with pytest.raises(ValueError, match="backend triton: Tesla T4 is older than Ampere: take sdpa"):
            choose_backend("triton", gpu, half, 64)


@needs_triton
def test_large_heads_go_to_sdpa(capsys):
    room._say.cache_clear()
    for _ in range(2):
        check(*tensors(1, 5, 6, 1, 168))
    assert capsys.readouterr().out == "attention: head dim 168 is above 160, the kernels' largest: sdpa takes it\n"


def test_bad_input():
    q, k = torch.zeros(2, 5, 3, 8), torch.zeros(2, 7, 3, 8)
    uneven = (
        (q, k, q),
        (q, k[:1], k[:1]),
        (q, k[:, :, :2], k[:, :, :2]),
        (q, k[..., :4], k[..., :4]),
        (q[0], k[0], k[0]),
    )
    for bad in uneven:
        with pytest.raises(
            ValueError, match=r"q \(.*5, 3, 8\), k .* do not fit together: give \(B,L,heads,d\), k and v"
        ):
            attention(*bad)
    for types_ in ((torch.int64,) * 3, (torch.float32, torch.bfloat16, torch.float32)):
        with pytest.raises(ValueError, match="attention: dtypes .*: give one floating-point type for all"):
            attention(*(x.to(dtype) for x, dtype in zip((q, k, k), types_)))
    with pytest.raises(ValueError, match=f"backend 'flash' is not one of {', '.join(BACKENDS)}"):
        attention(q, q, q, backend="flash")
    w = torch.ones(8)
    for norm, match in (
        ((w, torch.ones(4), 1e-6), r"qk_norm's \(4,\) on cpu: give \(8,\) on cpu"),
        ((w.to("meta"), w, 1e-6), r"qk_norm's \(8,\) on meta: give \(8,\) on cpu"),
        ((w, w, 0.0), "qk_norm's eps is 0.0: give a positive number"),
    ):
        with pytest.raises(ValueError, match=match):
            attention(q, q, q, qk_norm=norm)
    with pytest.raises(ValueError, match="backend 'flash' is not one of auto, triton, xformers"):
        use_attention(nn.Identity(), "flash")


@needs_triton
def test_triton_cannot(monkeypatch):
    x = torch.zeros(1, 4, 1, 16, device=DEVICE)
    with pytest.raises(
        ValueError, match="backend triton: torch.float64 is not float32, float16 or bfloat16: take sdpa"
    ):
        attention(x.double(), x.double(), x.double(), backend="triton")
    monkeypatch.setattr(room, "INTERPRET", False)
    x = x.cpu()
    with pytest.raises(ValueError, match="backend triton: no kernels for cpu: take sdpa, or set TRITON_INTERPRET=1"):
        attention(x, x, x, backend="triton")
    monkeypatch.setattr(room, "triton", None)
    with pytest.raises(ValueError, match="backend triton: Triton is not installed: pip install triton"):
        attention(x, x, x, backend="triton")


def test_what_needs_cuda(monkeypatch):
    x = torch.zeros(1, 4, 1, 16)
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.delitem(sys.modules, "xformers.ops", raising=False)
    with pytest.raises(ValueError, match="backend xformers: xformers does not import .*: pip install xformers"):
        attention(x, x, x, backend="xformers")
    package = types.ModuleType("xformers")
    package.ops = types.ModuleType("xformers.ops")
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", package.ops)
    for name in ("xformers", "sdpa_cudnn", "sdpa_efficient"):
        with pytest.raises(ValueError, match=f"backend {name}: it has no kernels for cpu: take sdpa"):
            attention(x, x, x, backend=name)


@pytest.mark.parametrize("causal", [False, True])
def test_what_xformers_is_given(monkeypatch, causal):
    """Its own layout is ours, so nothing is transposed; a stand-in for the package looks."""
    seen = {}

    def memory_efficient_attention(q, k, v, attn_bias=None):
        seen.update(shapes=(q.shape, k.shape), bias=attn_bias)
        return room.run_backend("reference", q, k, v, attn_bias is not None)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention, ops.LowerTriangularMask = memory_efficient_attention, lambda: "lower"
    package = types.ModuleType("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v, _ = tensors(1, 5, 7, 2, 8)
    out = room.run_backend("xformers", q, k, v, causal)
    torch.testing.assert_close(out, attention(q, k, v, causal, "reference"))
    assert seen == {"shapes": ((1, 5, 2, 8), (1, 7, 2, 8)), "bias": "lower" if causal else None}


@needs_triton
@pytest.mark.parametrize("said", ["true", "0"])
def test_interpreter_is_on_when_triton_says_so(said):
    code = "import attention; print(attention.INTERPRET, type(attention._forward).__name__)"
    env = os.environ | {"TRITON_INTERPRET": said}
    told = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=Path(room.__file__).parent
    )
    assert told.stdout.split() == (["True", "InterpretedFunction"] if said == "true" else ["False", "JITFunction"])


def test_without_triton():
    """On macOS: all but the kernels."""
    code = "import sys; sys.modules['triton'] = None\nimport torch, unet\nfrom attention import attention\n"
    code += "x = torch.ones(1, 3, 1, 8)\n"
    code += "for name in ('auto', 'sdpa', 'reference'): print(attention(x, x, x, backend=name).sum())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(room.__file__).parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["tensor(24.)"] * 3


@needs_triton
def test_work_is_counted_alike():
    """Forward and backward, and a model's TFLOP per image, whichever backend."""
    counts = {}
    for backend in ("triton", "sdpa_math", "reference"):
        q, k, v, grad = (x.requires_grad_() for x in tensors(2, 9, 20, 3, 24))
        with FlopCounterMode(display=False) as counter:
            out = attention(q, k, v, backend=backend)
            counts[backend] = [counter.get_total_flops()]
            torch.autograd.grad(out, (q, k, v), grad.detach())
        counts[backend].append(counter.get_total_flops() - counts[backend][0])
        with FlopCounterMode(display=False) as counter:  # the norm's work is not counted, as no norm's is
            norm_gradients(*uneven(2, 9, 20, 3, 24), False, backend)
        assert counter.get_total_flops() == sum(counts[backend])
    forward = 2 * 2 * 2 * 3 * 9 * 20 * 24
    assert [counts[name][0] for name in counts] == [forward] * 3
    assert counts["sdpa_math"][1] == 2 * forward  # S is not computed again
    assert counts["triton"][1] == 2.5 * forward


def test_counted_tflop_of_a_model():
    import train_ldm
    from unet import Denoiser

    model = Denoiser(tiny())
    counts = set()
    for backend in BACKENDS:
        use_attention(model, backend)
        counts.add(train_ldm.count_tflop(model, (4, 8, 8)))
    assert len(counts) == 1 and counts.pop() > 0


# --- in the models ---


def tiny(**settings):
    defaults = dict(channels=16, channel_mult=(1,), num_res_blocks=1, attention_ds=(), num_heads=2, norm_groups=4)
    return fill(UNet(**defaults | dict(context_dim=12, qk_norm=True) | settings)).to(DEVICE)


def step(net, run):
    """A loss and its gradients, of `run`, which may be the compiled net."""
    x, context, t = normal(2, 4, 8, 8), normal(2, 5, 12, seed=1), torch.tensor([3.0, 700.0], device=DEVICE)
    loss = run(x, t, context).square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]


def test_every_attention_of_a_model():
    net = tiny(channel_mult=(1, 2), attention_ds=(1, 2))
    expected = step(net, net)
    for backend in runnable():
        use_attention(net, backend)
        assert {m.backend for m in net.modules() if isinstance(m, Attention)} == {backend}
        for a, b in zip(step(net, net), expected):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert "backend" not in net.settings


@pytest.mark.parametrize("backend", runnable())
def test_plain_blocks_and_text_towers(backend):
    block = fill(TextBlock(32, 2, causal=True)).to(DEVICE)
    net, x = tiny(transformer_depth=0, context_dim=0), normal(2, 9, 32)
    image, t = normal(2, 4, 8, 8), torch.tensor([3.0, 700.0], device=DEVICE)
    expected = block(x), net(image, t)
    use_attention(block, backend)
    use_attention(net, backend)
    torch.testing.assert_close((block(x), net(image, t)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [name for name in runnable() if name in ("triton", "sdpa", "reference")])
def test_compiles_whole(backend):
    """No graph break, and the same step."""
    torch._dynamo.reset()
    net = tiny()
    use_attention(net, backend)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    seen = [
        m.register_forward_hook(lambda *a: pytest.fail("q or k is normalised outside of attention()"))
        for m in net.modules()
        if isinstance(m, nn.RMSNorm)
    ]
    assert len(seen) == 4  # q's and k's of self- and of cross-attention
    eager = step(net, net)
    for hook in seen:
        hook.remove()  # Dynamo would trace them
    for a, b in zip(step(net, compiled), eager):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_auto_is_measured_while_compiling(monkeypatch, capsys):
    """On a GPU "auto" measures at the first call: also where that is torch.compile's tracing, and under autocast."""

    def choose(backend, device, dtype, D, causal, shape, grad, norm):
        return room._fastest(device, dtype, D, causal, (2, 9, 12, 2), grad, norm)

    choose._dynamo_marked_constant = room.choose_backend._dynamo_marked_constant
    monkeypatch.setattr(room, "choose_backend", choose)
    monkeypatch.setattr(room, "_milliseconds", lambda call: [call(), 1.0][1])
    room._fastest.cache_clear()
    torch._dynamo.reset()
    q, k, v, grad = (x.requires_grad_() for x in tensors(2, 9, 12, 2, 24))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    w = torch.ones(24, device=DEVICE)
    for norm, told in ((None, "training: "), ((w, w, 1e-6), "training, QK-norm: ")):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = compiled(q, k, v, qk_norm=norm)
        assert out.dtype == torch.bfloat16
        torch.autograd.grad(out, (q, k, v), grad.detach().to(out.dtype))
        assert f"bfloat16, {told}" in capsys.readouterr().out
    room._fastest.cache_clear()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="eager GroupNorm leaves channels_last on CUDA (LOG.md)")
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(linear_proj=True),
        dict(transformer_depth=0, context_dim=0),
        dict(resblock_updown=True, scale_shift=True),
        dict(resample="pool", unet_patch=2),
        dict(concat_channels=2),
    ],
)
def test_channels_last_survives_the_unet(settings):
    """Every convolution and norm is given it, and its gradient (which may be a slice of what was concatenated)."""
    net = tiny(channel_mult=(1, 2), attention_ds=(1, 2), **settings).to(memory_format=torch.channels_last)
    seen = watch(net)
    x = normal(2, 4, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    given = {"context": normal(2, 5, 12)} if net.settings["context_dim"] else {}
    if net.settings["concat_channels"]:
        given["concat"] = normal(2, 2, 8, 8).to(memory_format=torch.channels_last)
    out = net(x, torch.tensor([3.0, 700.0]), **given)
    out.square().sum().backward()
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert len(seen) > 60 and all(ok for _, ok in seen), [name for name, ok in seen if not ok]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="eager GroupNorm leaves channels_last on CUDA (LOG.md)")
def test_channels_last_survives_the_vae():
    vae = VAE(ch=8, ch_mult=(1, 2), num_res_blocks=1, norm_groups=4).to(memory_format=torch.channels_last)
    seen = watch(vae)
    x = normal(2, 3, 16, 16).to(memory_format=torch.channels_last)
    out = vae.decode(vae.encode(x).mode())
    out.square().sum().backward()
    assert out.is_contiguous(memory_format=torch.channels_last)
    lost = {name for name, ok in seen if not ok}
    assert len(seen) > 60 and lost <= {"quant_conv gradient"}, lost  # the moments' 2z channels alone


def watch(net):
    """[(name, whether a tensor of a convolution or norm lies channel by channel)], filled as the net runs."""
    seen = []

    def last(x):
        return x.stride(1) == 1 and x.stride(3) >= x.shape[1]

    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            module.register_forward_pre_hook(lambda m, given, name=name: seen.append((name, last(given[0]))))
            module.register_full_backward_hook(
                lambda m, _, given, name=name: seen.extend((f"{name} gradient", last(g)) for g in given)
            )
    return seen


# --- in the scripts ---


@needs_triton
@pytest.mark.parametrize("norm", [False, True])
def test_training_with_the_kernels(start, norm):
    """--attention=triton: the losses of a run with SDPA, in training and on validation images."""
    small = "--cond=none --max_steps=1 --n_samples=1 --sample_steps=1 --val_images=1 --batch_size=2".split()
    small += [f"--device={DEVICE.type}", "--dtype=float32", "--compile=False", "--deterministic=True"]  # no TF32
    runs = [start("ldm", *small, f"--qk_norm={norm}", f"--attention={backend}") for backend in ("triton", "sdpa")]
    ours, theirs = ({k: v for record in run.finish().log for k, v in record.items() if v is not None} for run in runs)
    for name in ("loss", "grad_norm", "val_loss"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_settings(start):
    """A wrong name, and a backend that cannot run here, stop before any work."""
    assert "attention=flash is not one of auto, triton, xformers, sdpa" in start("ldm", "--attention=flash").fail()
    if DEVICE.type == "cpu":
        assert start("ldm", "--attention=xformers").fail().startswith("attention backend xformers: xformers ")
