"""attention.py: every backend and its gradients against the formula in float64, the operators, the module."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import fill
from conftest import normal as noise
from torch.utils.flop_counter import FlopCounterMode

import attention as room
from attention import BACKENDS, Attention, attention, unavailable, use_attention

ROOT = Path(room.__file__).parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(room.triton is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
# |x - float64's| / |float64's|: float32 sums to its last digits, the others round p and dS to 11 and 8 bits
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
ON_THIS_DEVICE = ["sdpa", "sdpa_math", "reference", "auto", "sdpa_flash" if DEVICE.type == "cpu" else "sdpa_efficient"]
ON_THIS_DEVICE += ["triton"] * bool(room.triton)


def normal(*shape, seed=0, dtype=torch.float32):
    return noise(*shape, seed=seed).to(DEVICE, dtype)


def tensors(B, Lq, Lk, H, D, dtype=torch.float32):
    """q, k, v and the gradient of the output."""
    return [normal(B, L, H, D, seed=i, dtype=dtype) for i, L in enumerate((Lq, Lk, Lk, Lq))]


def gradients(q, k, v, grad, causal=False, backend="triton"):
    """The output and the gradients of q, k, v."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, causal, backend)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def formula(q, k, v, grad, causal=False):
    """The same in float64, by autograd, with nothing of attention.py."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    logits = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5
    if causal:
        rows, keys = (torch.arange(n, device=q.device) for n in logits.shape[-2:])
        logits = logits.masked_fill(keys[None] > rows[:, None], -torch.inf)
    out = torch.einsum("bhlm,bmhd->blhd", logits.softmax(-1), v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())


def check(q, k, v, grad, causal=False, backend="triton"):
    found = gradients(q, k, v, grad, causal, backend)
    for name, x, expected in zip(("out", "dq", "dk", "dv"), found, formula(q, k, v, grad, causal)):
        assert x.shape == expected.shape and x.dtype == q.dtype
        assert x.isfinite().all(), name
        error = (x.double() - expected).norm() / expected.norm().clamp(min=expected.numel() ** 0.5 / 10)
        assert error < TOLERANCE[q.dtype], f"{name}: {error:.2e}"


# --- the kernels, in the interpreter where there is no GPU ---


# Several tiles of queries and keys, the last of both ragged; lengths around a tile's; whole tiles without masks; tiles
# before, on and behind the diagonal. (examples, queries, keys, heads, head dim), causal, dtype
KERNELS = [((1, 140, 70, 1, dim), False, torch.float32) for dim in (8, 24, 32, 40, 64, 80, 128)]
KERNELS += [((1, 66, 77, 1, dim), True, torch.float32) for dim in (8, 24, 32, 40, 64, 80, 128)]
for lengths in ((1, 1), (7, 1), (1, 70), (130, 7), (77, 77), (128, 129), (129, 128), (256, 128)):
    KERNELS += [((1, *lengths, 1, 40), causal, torch.float32) for causal in (False, True)]
for dtype in (torch.float16, torch.bfloat16):
    KERNELS += [((1, 66, 140, 1, 40), False, dtype), ((2, 64, 64, 3, 64), True, dtype)]


@needs_triton
@pytest.mark.parametrize("sizes, causal, dtype", KERNELS)
def test_kernels(sizes, causal, dtype):
    check(*tensors(*sizes, dtype), causal)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of what is masked or not stored
@pytest.mark.parametrize("size", [50, -50])
def test_large_logits(size):
    """The exponentials do not overflow, nor do those of the keys beyond the length, where lse is far below 0."""
    q, k, v, grad = tensors(1, 40, 77, 1, 32)
    k = k.abs()
    q = size * q.abs()
    for x, expected in zip(gradients(q, k, v, grad), formula(q, k, v, grad)):
        torch.testing.assert_close(x.double(), expected, rtol=1e-3, atol=1e-3)


@needs_triton
def test_views_are_read_through_their_strides():
    q, k, v = packed = normal(2, 20, 3, 2, 24, seed=5).unbind(2)
    assert room.readable(q) is q
    check(q, k, v, normal(2, 2, 20, 24, seed=6).transpose(1, 2))
    heads_first = [normal(2, 2, 20, 24, seed=i).transpose(1, 2) for i in range(3)]
    check(*heads_first, normal(1, 1, 1, 1).expand(2, 20, 2, 24))
    check(*[x[:, ::2] for x in packed], normal(2, 10, 2, 25)[..., :24])  # every other row; rows of 25
    check(*[normal(2, 24, 2, 20, seed=i).transpose(1, 3) for i in range(4)])  # copied: the last stride is not 1
    assert attention(q, k, v, backend="triton").is_contiguous()
    far = torch.empty(1, device="meta").as_strided((1, 4096, 1, 8), (8, 2**20, 8, 1))  # its offsets exceed int32
    assert room.readable(far).stride(1) == 8


@pytest.fixture
def launched(monkeypatch):
    """launched(q) -> the constants with which room.launch starts a kernel that is none."""

    class Kernel:
        configs, early_config_prune = room.forward_kernel.configs, staticmethod(room.forward_kernel.early_config_prune)
        fn = property(lambda self: self)

        def __getitem__(self, grid):
            return lambda *args, **constants: self.__dict__.update(constants, programs=grid(constants))

    def launched(q):
        kernel = Kernel()
        room.launch(kernel, (q.shape[1], "BM"), (), (q,), q, q, False)
        return kernel

    monkeypatch.setattr(room, "INTERPRET", True)
    return launched


@needs_triton
def test_launch(launched, monkeypatch):
    """Alignment is never more than holds; no autotuning in the interpreter and with deterministic algorithms."""
    x = torch.zeros(2, 300, 3, 40)
    # never more than holds: on a GPU a load of 16 bytes at another address is a fault
    for q, align in ((x, 8), (x[..., :36], 8), (torch.zeros(2, 16, 3, 41)[..., :40], 1)):
        assert launched(q).ALIGN == align
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for interpret, q, first in ((True, x, "FORWARD"), (False, x.half(), "FORWARD"), (False, x, "FORWARD_FLOAT32")):
        monkeypatch.setattr(room, "INTERPRET", interpret)
        found, expected = launched(q[..., :36]), getattr(room, first)[0]
        assert (found.BM, found.BN, found.num_warps, found.num_stages) == expected
        assert found.programs == (2 * 3 * -(-300 // expected[0]),) and (found.D, found.DP) == (36, 64)


@needs_triton
def test_float32_products_are_as_matmuls(launched):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for name, value, expected in (("fp32_precision", "tf32", "tf32"), ("allow_tf32", False, "ieee")):
            setattr(matmul, name, value)
            assert launched(torch.zeros(1, 20, 1, 16)).PREC == expected
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before


@needs_triton
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU tunes in every other test")
@pytest.mark.parametrize("dtype, ending", [(torch.float32, "_FLOAT32"), (torch.bfloat16, "")])
def test_tuning(monkeypatch, dtype, ending):
    """The autotuner runs every config of the dtype, all of which are right: with a timer that ranks the last first."""
    kernels = dict(FORWARD=room.forward_kernel, BACKWARD_Q=room.backward_q_kernel, BACKWARD_KV=room.backward_kv_kernel)
    times = iter(range(1000, 0, -1))
    for kernel in kernels.values():
        monkeypatch.setitem(vars(kernel), "do_bench", lambda call, quantiles: (call(), [next(times)] * 3)[1])
        monkeypatch.setattr(kernel, "cache", {})
    monkeypatch.setattr(room, "unavailable", lambda *a: "")
    monkeypatch.setattr(room, "INTERPRET", False)
    check(*tensors(1, 40, 50, 2, 40, dtype), causal=True)
    for name, kernel in kernels.items():
        configs, best = getattr(room, name + ending), kernel.best_config
        assert len(kernel.configs_timings) == len(configs)
        assert (*best.kwargs.values(), best.num_warps, best.num_stages) == configs[-1]


@needs_triton
def test_kernels_compile_for_gpus(tmp_path):
    """Without a GPU: Hopper's and Ampere's matrix instructions, 16-byte copies, shared memory, no register spilled."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tests" / "attention_aot.py", "--first", "--dims=40", "--dtypes=bf16"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 6
    for line in lines:
        assert line["spilled"] == 0 or room.triton.__version__ != "3.7.1", line
        assert line["shared"] <= 99 * 1024, line  # an RTX 4090's; data-center GPUs have more
        assert line["wgmma" if line["arch"] == 90 else "mma"] > 0 and line["wide"] > 0, line


# --- the operators ---


@needs_triton
def test_operators_follow_pytorchs_rules():
    q, k, v, grad = (x.requires_grad_() for x in tensors(1, 9, 20, 2, 24))
    torch.library.opcheck(torch.ops.ldm.attention, (q, k, v, False))
    out, lse = torch.ops.ldm.attention(q, k, v, False)
    assert out.requires_grad and not lse.requires_grad, "backward has no gradient of lse"
    inputs = [x.detach() for x in (grad, q, k, v, out, lse)]
    torch.library.opcheck(torch.ops.ldm.attention_backward, (*inputs, False))


@needs_triton
def test_same_bits_again_and_no_second_derivative():
    q, k, v, grad = tensors(1, 140, 77, 2, 32)
    for x, y in zip(*(gradients(q, k, v, grad) for _ in range(2))):
        assert torch.equal(x, y)
    q = q.requires_grad_()
    (slope,) = torch.autograd.grad(attention(q, k, v, backend="triton").square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="backward through ldm.attention_backward"):
        slope.sum().backward()


@needs_triton
def test_flops():
    """Forward and backward, and of a model on the meta device whichever backend."""
    counts = {}
    for backend in ("triton", "sdpa_math", "reference"):
        q, k, v, grad = (x.requires_grad_() for x in tensors(2, 9, 20, 3, 24))
        with FlopCounterMode(display=False) as counter:
            out = attention(q, k, v, backend=backend)
            counts[backend] = [counter.get_total_flops()]
            torch.autograd.grad(out, (q, k, v), grad.detach())
        counts[backend].append(counter.get_total_flops() - counts[backend][0])
    forward = 2 * 2 * 2 * 3 * 9 * 20 * 24
    assert [counts[name][0] for name in counts] == [forward] * 3
    assert (counts["sdpa_math"][1], counts["triton"][1]) == (2 * forward, 2.5 * forward)  # Triton computes S again
    x = torch.zeros(1, 4, 2, 16, device="meta")
    for backend in BACKENDS:
        with FlopCounterMode(display=False) as counter:
            attention(x, x, x, backend=backend)
        assert counter.get_total_flops() == 2 * 2 * 2 * 4 * 4 * 16, backend


# --- backends ---


@pytest.mark.parametrize("backend", ON_THIS_DEVICE)
def test_backends_agree(backend):
    check(*tensors(2, 9, 12, 3, 24), backend=backend)
    check(*tensors(2, 12, 12, 3, 24), causal=True, backend=backend)


@needs_gpu
@pytest.mark.parametrize("backend", ["xformers", "sdpa_flash", "sdpa_cudnn", "triton"])
def test_backends_of_gpus(backend):
    if backend == "xformers":
        pytest.importorskip("xformers")
    for causal in (False, True):
        check(*tensors(2, 128, 128, 3, 64, torch.bfloat16), causal, backend)
    for L, M, H, D in ((4096, 4096, 5, 64), (4096, 77, 8, 40), (1024, 1024, 8, 80), (256, 77, 20, 128)):
        if backend == "triton":  # tuned, at real shapes
            check(*tensors(1, L, M, H, D, torch.bfloat16))


@pytest.mark.parametrize("backend", sorted({"triton", "sdpa", "reference"} & set(ON_THIS_DEVICE)))
def test_products_beyond_float16(backend):
    """q k^T exceeds 65504, the logits do not."""
    q, k, v, grad = tensors(1, 5, 7, 1, 64, torch.float16)
    for x in gradients(100 * q, 100 * k, v, grad, False, backend):
        assert x.isfinite().all()


@pytest.mark.parametrize("backend", ON_THIS_DEVICE)
def test_empty(backend):
    """No examples, queries, keys or heads: empty or zeros, with gradients."""
    for sizes in ((0, 5, 7, 2, 16), (2, 0, 7, 2, 16), (2, 5, 0, 2, 16), (2, 5, 7, 0, 16)):
        q, k, v, grad = tensors(*sizes)
        for x, like in zip(gradients(q, k, v, grad, False, backend), (q, q, k, v)):
            assert x.shape == like.shape and not x.any()


@pytest.mark.parametrize("backend", ON_THIS_DEVICE)
def test_autocast(backend):
    """As for SDPA the inputs take autocast's dtype; float64 stays."""
    q, k, v, grad = tensors(1, 9, 12, 2, 24)
    expected = formula(*(x.bfloat16() for x in (q, k, v)), grad)[0]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = attention(q, k.bfloat16(), v, backend=backend)
        assert out.dtype == torch.bfloat16 and (out.double() - expected).norm() / expected.norm() < 1e-2
        assert attention(*(x.double() for x in (q, k, v)), backend="reference").dtype == torch.float64


@needs_triton
def test_large_heads_use_sdpa(monkeypatch):
    monkeypatch.setattr(room, "launch", lambda *a: pytest.fail("128 columns are the kernels' largest"))
    check(*tensors(1, 5, 6, 1, 136))


@pytest.mark.parametrize("causal", [False, True])
def test_xformers_arguments(monkeypatch, causal):
    """A stand-in for the package: (B,L,heads,d) as it is, and its mask."""
    seen = {}

    def memory_efficient_attention(q, k, v, attn_bias=None):
        seen.update(shapes=(q.shape, k.shape), bias=attn_bias)
        return attention(q, k, v, attn_bias is not None, "reference")

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention, ops.LowerTriangularMask = memory_efficient_attention, lambda: "lower"
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v, _ = tensors(1, 5, 7, 2, 8)
    torch.testing.assert_close(attention(q, k, v, causal, "xformers"), attention(q, k, v, causal, "reference"))
    assert seen == {"shapes": ((1, 5, 2, 8), (1, 7, 2, 8)), "bias": "lower" if causal else None}


@pytest.mark.parametrize(
    "backend, device, dtype, reason",
    [
        ("xformers", "cuda", torch.float32, "xformers cannot be imported .*; pip install xformers, or use sdpa"),
        ("sdpa_cudnn", "cpu", torch.float32, "no kernels for cpu; use sdpa"),
        ("sdpa_efficient", "cpu", torch.float32, "no kernels for cpu; use sdpa"),
        ("triton", "cpu", torch.float32, "do not run on cpu; use sdpa, or TRITON_INTERPRET=1"),
        ("triton", "cuda:0", torch.bfloat16, r"Tesla T4 is older than Ampere \(sm_80\); use sdpa"),
        ("triton", "mps", torch.float32, "do not run on mps"),
    ],
)
def test_unavailable(monkeypatch, backend, device, dtype, reason):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.delitem(sys.modules, "xformers.ops", raising=False)
    monkeypatch.setattr(room, "INTERPRET", False)
    monkeypatch.setattr(room, "triton", room.triton or object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert re.search(reason, unavailable(backend, torch.device(device), dtype))
    assert not unavailable("auto", torch.device(device), dtype)


Q, K = torch.zeros(2, 5, 3, 8), torch.zeros(2, 7, 3, 8)
WRONG = [((Q, K, Q), "attention expects"), ((Q[0], K, K), "attention expects"), ((Q, K[:1], K[:1]), "q and k differ")]
WRONG += [((Q, K[:, :, :2], K[:, :, :2]), "q and k differ"), ((Q, K[..., :4], K[..., :4]), "q and k differ")]
WRONG += [((Q, K.bfloat16(), K), "q, k and v differ in dtype")]
WRONG += [((Q, Q, Q, False, "flash"), "attention backend 'flash' is not one of auto, triton")]
if room.triton:
    WRONG += [((*[Q.double()] * 3, False, "triton"), "torch.float64 is not float32, float16 or bfloat16")]


@pytest.mark.parametrize("arguments, message", WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments(arguments, message):
    with pytest.raises(AssertionError, match=message):
        attention(*arguments)


def test_without_triton():
    """On macOS, say: everything but the kernels, which are refused."""
    code = "import sys; sys.modules['triton'] = None\nimport torch, unet\nfrom attention import attention\n"
    code += "x = torch.ones(1, 3, 1, 8)\n"
    code += "for name in ('auto', 'sdpa', 'triton'): print(attention(x, x, x, backend=name).sum(), flush=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["tensor(24.)"] * 2, done.stderr
    assert "attention=triton: Triton is not installed; pip install triton" in done.stderr


# --- the module and the models ---


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_module(qk_norm, linear):
    """Against the formulas, head by head, from x to a context and to itself; names and order of the parameters."""
    net = Attention(12, 10, 3, 4, qk_norm=qk_norm, linear=linear).double()
    names = ["to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight", "to_out.bias"]
    assert list(net.state_dict()) == names + ["q_norm.weight", "k_norm.weight"] * qk_norm
    x, context = normal(2, 5, 12).double().cpu(), normal(2, 7, 10, seed=1).double().cpu()
    net, heads = fill(net), []
    for i in range(3):
        layers = ((x, net.to_q), (context, net.to_k), (context, net.to_v))
        q, k, v = (y @ layer.weight[4 * i : 4 * i + 4].T for y, layer in layers)
        if qk_norm:
            q, k = (F.rms_norm(y, (4,), norm.weight, 1e-6) for y, norm in ((q, net.q_norm), (k, net.k_norm)))
        if linear:
            heads.append(q.softmax(-1) @ (k.softmax(1).transpose(1, 2) @ v))
        else:
            heads.append((q @ k.transpose(1, 2) / 2).softmax(-1) @ v)
    torch.testing.assert_close(net(x, context), F.linear(torch.cat(heads, -1), net.to_out.weight, net.to_out.bias))
    causal = fill(Attention(12, 12, 3, 4, qk_norm=qk_norm, causal=True).double())
    torch.testing.assert_close(causal(x), causal(x, x))
    torch.testing.assert_close(causal(x)[:, :3], causal(x[:, :3]))  # what follows does not matter


@needs_triton
def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    net = fill(Attention(12, 10, 2, 24, qk_norm=True)).to(DEVICE)
    use_attention(net, "triton")
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for L, M in ((9, 7), (20, 30)):
        x, context = normal(2, L, 12), normal(2, M, 10, seed=1)
        found = [torch.autograd.grad(f(x, context).square().sum(), list(net.parameters())) for f in (compiled, net)]
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
