"""softmax(q k^T / sqrt(d)) v, by our own Triton kernels or by whichever other way is fastest.

    out = attention(q, k, v)                        # (B,L,heads,d) each; the fastest measured on this GPU
    out = attention(q, k, v, backend="triton")      # the kernels below (FlashAttention-2, Dao 2023, arXiv 2307.08691)
    out = attention(q, k, v, qk_norm=(wq, wk, eps)) # of RMS-normalised q and k
    use_attention(model, "sdpa_cudnn")         # from now on, in every attention of a model
    TRITON_INTERPRET=1 python ...                   # runs the kernels on the CPU, slowly: to look at what they do

The README's section "The attention kernel" explains them.
"""

import math
import os
from contextlib import nullcontext, suppress
from functools import cache
from operator import index  # an exact int; int() would leave it symbolic where torch.compile has dynamic shapes
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS: all but the kernels works
    triton, tl = None, SimpleNamespace(constexpr=bool)

SDPA = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
BACKENDS = ("auto", "triton", "xformers", "sdpa", *SDPA, "reference")
MAX_DIM = 160  # of the kernels: above it their tiles leave the registers
SHORT = 128  # so many keys fit one tile
INTERPRET = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET as Triton reads it: "true", too


def attention(q, k, v, causal=False, backend="auto", qk_norm=None):
    """softmax(q k^T / sqrt(d)) v on (B, L, heads, d); k and v may have another length than q.

    backend: one of BACKENDS.  "sdpa" is torch.nn.functional.scaled_dot_product_attention, "sdpa_flash" and the like
    one of its ways, "reference" the formula itself.  "auto" is "sdpa" off CUDA; on it, each new shape is measured
    once, on tensors of its own and also while torch.compile traces, and the fastest is kept: see choose_backend.
    causal: query i sees the keys 0 to i.  qk_norm: (wq, wk, eps) of F.rms_norm for q and k, weights (d,); "triton" does
    it in its kernels.  Tensors may be views with any strides; a last dimension that is not contiguous costs "triton"
    a copy.
    """
    if q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"attention: {shapes} do not fit together: give (B,L,heads,d), k and v of equal length")
    if not q.is_meta and torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"attention: dtypes {q.dtype}, {k.dtype}, {v.dtype}: give one floating-point type for all")
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    D, shape = index(q.shape[3]), ()
    if qk_norm is not None:
        *weights, eps = qk_norm
        for w in weights:
            if w.shape != (D,) or w.device != q.device:
                raise ValueError(f"attention: qk_norm's {tuple(w.shape)} on {w.device}: give ({D},) on {q.device}")
        if not eps > 0:
            raise ValueError(f"attention: qk_norm's eps is {eps}: give a positive number")
    if backend == "auto" and q.is_cuda:
        shape = index(q.shape[0]), index(q.shape[1]), index(k.shape[1]), index(q.shape[2])
    if q.numel() == 0 or k.numel() == 0:
        backend = "sdpa_math"  # which gives zeros where there are no keys; 2.11's flash on the CPU divides by zero
    backend = choose_backend(backend, q.device, q.dtype, D, causal, shape, grad, qk_norm is not None)
    return run_backend(backend, q, k, v, causal, qk_norm)


def run_backend(backend, q, k, v, causal, qk_norm=None):
    """attention() without its checks, on any backend but "auto"."""
    if qk_norm is not None:
        wq, wk, eps = qk_norm
        if backend == "triton":  # a score is a sum of q_c wq_c wk_c k_c: the product is all that matters
            return torch.ops.ldm.attention(q, k, v, causal, wq.float() * wk.float(), eps)[0]
        q, k = (F.rms_norm(x, w.shape, w, eps).to(x.dtype) for x, w in ((q, wq), (k, wk)))
    if backend == "triton":
        return torch.ops.ldm.attention(q, k, v, causal)[0]
    if backend == "xformers":
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask() if causal else None)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B,heads,L,d)
    if backend == "reference":
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)  # q first: the product could leave float16's range
        logits = logits.to(torch.promote_types(q.dtype, torch.float32))
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
        out = logits.softmax(dim=-1).to(v.dtype) @ v
    else:
        with nullcontext() if backend == "sdpa" else sdpa_kernel(SDPA[backend]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2)


def sdpa_runs(q, k, v, causal=False):
    """Which way "sdpa" takes for these tensors (B,L,heads,d): "sdpa_flash", "sdpa_cudnn", ...; it asks PyTorch."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, causal)  # what scaled_dot_product_attention itself calls
    return next((name for name, value in SDPA.items() if int(value) == choice), f"SDPBackend {choice}")


class Attention(nn.Module):
    """Multi-head attention from x (B,L,dim) to a context (B,M,context_dim), or to x itself.

    With `linear`, self-attention is softmax(q) (softmax(k)^T v), linear in L (Shen et al., arXiv 1812.01243).
    """

    def __init__(self, dim, context_dim, num_heads, head_dim, qk_norm=False, linear=False, bias=False, causal=False):
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads, self.linear, self.causal = num_heads, linear, causal
        self.backend = "auto"  # see use_attention
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(context_dim, inner, bias=bias)
        self.to_v = nn.Linear(context_dim, inner, bias=bias)
        self.to_out = nn.Linear(inner, dim)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (
            h.unflatten(-1, (self.num_heads, -1)) for h in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.linear:
            summary = torch.einsum("blhd,blhe->bhde", k.softmax(dim=1), v)
            h = torch.einsum("blhd,bhde->blhe", q.softmax(dim=-1), summary)
        else:
            h = attention(q, k, v, causal=self.causal, backend=self.backend)
        return self.to_out(h.flatten(2))


def use_attention(model, backend):
    """Set the backend, one of BACKENDS, of every `Attention` in a model; `linear` ones have none."""
    assert backend in BACKENDS, f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}"
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = backend


# --- which backend ---


def choose_backend(backend, device, dtype, D, causal=False, shape=(), grad=False, norm=False):
    """The backend that will run: the named one, or for "auto" the fastest for the shape (B, Lq, Lk, heads).

    torch.compile calls this while it traces and takes the answer as a constant, so what is measured and printed in here
    breaks no graph.  With deterministic algorithms nothing is measured, since the winner of a close race may change:
    "auto" is then "triton" where that runs.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if device.type == "meta":  # nothing is computed, only counted
        return "sdpa"
    if backend == "triton" and D > MAX_DIM:
        _say(f"attention: head dim {D} is above {MAX_DIM}, the kernels' largest: sdpa takes it")
        return "sdpa"
    if backend != "auto":
        problem = _cannot(backend, device, dtype)
        if problem:
            raise ValueError(f"attention backend {backend}: {problem}")
        return backend
    if device.type != "cuda":
        return "sdpa"
    if torch.are_deterministic_algorithms_enabled():
        return "sdpa" if D > MAX_DIM or _cannot("triton", device, dtype) else "triton"
    return _fastest(device, dtype, D, causal, shape, grad, norm)


# torch.compiler.assume_constant_result without the seconds that importing Dynamo takes
choose_backend._dynamo_marked_constant = True


def _cannot(backend, device, dtype):
    """Why a backend cannot run, or ""."""
    if backend == "triton":
        if triton is None:
            return "Triton is not installed: pip install triton (Linux), or take sdpa"
        if device.type != "cuda" and not INTERPRET:
            return f"no kernels for {device.type}: take sdpa, or set TRITON_INTERPRET=1 to run them slowly"
        if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than Ampere: take sdpa"
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{dtype} is not float32, float16 or bfloat16: take sdpa or reference"
    if backend == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError as e:
            return f"xformers does not import ({e}): pip install xformers"
    if backend in ("xformers", "sdpa_cudnn", "sdpa_efficient") and device.type != "cuda":
        return f"it has no kernels for {device.type}: take sdpa"
    return ""


@cache
def _fastest(device, dtype, D, causal, shape, grad, norm=False):
    """The fastest backend for a shape, measured on random tensors of its own; "sdpa" where none runs.

    norm: with QK-norm, by each in its own way; weights of the inputs' type let F.rms_norm be one kernel, as compiled.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention: auto cannot measure a new shape in a CUDA graph's capture: call it once before")
    B, Lq, Lk, H = shape
    B = min(B, max(1, 2**25 // (max(Lq, Lk) * H * D)))  # 64 MiB of bf16 in each tensor keep any GPU busy
    generator = torch.Generator(device).manual_seed(0)  # not the one that training draws from
    q, k, v, d_out = (torch.randn(B, L, H, D, device=device, generator=generator).to(dtype) for L in (Lq, Lk, Lk, Lq))
    weights = [torch.ones(D, device=device, dtype=dtype) for _ in range(2)] if norm else []
    inputs = [x.requires_grad_(grad) for x in (q, k, v, *weights)]
    qk_norm = (*weights, 1e-6) if norm else None
    times, failed = {}, {}
    # what a checkpointed block around us does with saved tensors is not done with these
    own = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda x: x)
    with own, torch.cuda.device_of(q), torch.autocast(device.type, enabled=False), torch.set_grad_enabled(grad):
        for backend in ("triton", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "xformers"):
            if _cannot(backend, device, dtype) or (backend == "triton" and D > MAX_DIM):
                continue

            def once(backend=backend):
                out = run_backend(backend, q, k, v, causal, qk_norm)
                return torch.autograd.grad(out, inputs, d_out) if grad else out

            try:
                times[backend] = _milliseconds(once)
            except Exception as e:  # it does not take this shape, type or GPU, or Triton finds no C compiler
                failed[backend] = str(e).strip().split("\n")[0]
    what = f"attention of {B}x{Lq}x{H}x{D} to {Lk} keys, {str(dtype)[6:]}, {'training' if grad else 'drawing'}"
    what += ", QK-norm" * norm
    if not times:
        _say(f"{what}: sdpa, as no other way runs here ({failed})")
        return "sdpa"
    if "triton" in failed:
        _say(f"{what}: the Triton kernels failed ({failed['triton']}) and are left out")
    ranking = sorted(times, key=times.get)
    _say(f"{what}: " + ", ".join(f"{name} {times[name]:.3f} ms" for name in ranking))
    return ranking[0]


def _milliseconds(call, warmup=3, repeats=10):
    for _ in range(warmup):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(2 * 10**7)  # 10 ms in which all calls are queued; else what is short is timed as the host's pace
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in zip(events, events[1:]))[repeats // 2]


@cache
def _say(line):
    """Prints a line once, on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


# --- the kernels ---
#
# A program is given one tile of queries (or keys) of one head and loops over the tiles of the others. tl.dot wants
# tiles of powers of two from 16 up, and head dims are 24 to 160, so a head is held in two tiles of D0 and D1 columns,
# 80 as 64 + 16, 160 as 128 + 32, 40 as 32 + 16 of which 8 are used; D1 = 0 where one will do.  Padding to one power
# of two would compute and hold 128 for 80 and 256 for 160.  Whatever is loaded beyond a length or D is zero.
#
# All is in float32 but what enters tl.dot, which is of the inputs' type.  exp2 with log2(e)/sqrt(d) folded into its
# argument is one multiply-add and one instruction; `lse` is therefore in units of log2.

jit = triton.jit if triton else lambda f: f
constexpr = tl.constexpr
# the interpreter multiplies bfloat16 as if it were integers: there such values are rounded, then held in float32
ROUND_ONLY = constexpr(INTERPRET)


@jit
def _operand(x, dtype):
    """x as tl.dot takes it."""
    x = x.to(dtype)
    if ROUND_ONLY and dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x


@jit
def _head(tensor, b, h, stride_b, stride_h, ALIGN):
    """Where a head of an example begins.

    ALIGN: what all strides are multiples of. Triton asks by itself for multiples of 16 only, and would read heads of
    40 channels two bytes at a time.
    """
    return tensor + tl.multiple_of(b * stride_b + h * stride_h, ALIGN)


@jit
def _load(head, rows, stride, length, FIRST, WIDTH, D, MASKED, ALIGN):
    """Columns FIRST to FIRST + WIDTH of some rows of (length, D); MASKED: rows may lie beyond the length."""
    cols = FIRST + tl.arange(0, WIDTH)
    at = head + tl.multiple_of(rows * stride, ALIGN)[:, None] + cols[None, :]
    if FIRST + WIDTH > D:
        known = (cols < D)[None, :]
        if MASKED:
            known = known & (rows < length)[:, None]
        x = tl.load(at, mask=known, other=0.0)
    elif MASKED:
        x = tl.load(at, mask=(rows < length)[:, None], other=0.0)
    else:
        x = tl.load(at)
    return _operand(x, head.dtype.element_ty)


@jit
def _load2(head, rows, stride, length, D, D0, D1, MASKED, ALIGN):
    """Both column tiles; without a second one the first twice."""
    x0 = _load(head, rows, stride, length, 0, D0, D, MASKED, ALIGN)
    x1 = _load(head, rows, stride, length, D0, D1, D, MASKED, ALIGN) if D1 else x0
    return x0, x1


@jit
def _store(head, rows, stride, length, x, FIRST, WIDTH, D):
    cols = FIRST + tl.arange(0, WIDTH)
    known = (rows < length)[:, None] & (cols < D)[None, :]
    tl.store(head + rows[:, None] * stride + cols[None, :], x.to(head.dtype.element_ty), mask=known)


@jit
def _dot(a0, a1, b0, b1, D1, PRECISION):
    """a b^T over both column tiles."""
    x = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if D1:
        x = tl.dot(a1, tl.trans(b1), x, input_precision=PRECISION)
    return x


# QK-norm, where there is an EPS: a score is the sum over channels of (q rq wq) (k rk wk), rq and rk the inverse root
# mean squares of a query and a key.  No tile need be normalised in a loop for that: w = wq wk and one of rq, rk go into
# the tile that a program holds, once, and the other is a factor of whole columns of scores.


@jit
def _weight(W, FIRST, WIDTH, D):
    cols = FIRST + tl.arange(0, WIDTH)
    return tl.load(W + cols, mask=cols < D, other=0.0)[None, :]


@jit
def _inverse_rms(x0, x1, EPS, D, D1):
    """1 / rms of rows."""
    x0, x1 = x0.to(tl.float32), x1.to(tl.float32)
    squares = tl.sum(x0 * x0, 1)
    if D1:
        squares += tl.sum(x1 * x1, 1)
    return tl.rsqrt(squares / D + EPS)


@jit
def _normed(x0, x1, W, EPS, D, D0, D1, dtype):
    """x w / rms(x) as tl.dot takes it, and 1 / rms(x)."""
    r = _inverse_rms(x0, x1, EPS, D, D1)
    x0 = _operand(x0.to(tl.float32) * r[:, None] * _weight(W, 0, D0, D), dtype)
    if D1:
        x1 = _operand(x1.to(tl.float32) * r[:, None] * _weight(W, D0, D1, D), dtype)
    return x0, x1, r


@jit
def _factor(R, rows, length, MASKED):
    """What a tile of scores is multiplied by: the 1 / rms of the rows that stream by, or without QK-norm 1."""
    r = 1.0
    if R is not None:
        r = tl.load(R + rows, mask=rows < length, other=0.0)[None, :] if MASKED else tl.load(R + rows)[None, :]
    return r


@jit
def _store_gradient(DX, X, dx0, dx1, rows, dl, xl, length, W, DW, EPS, D, D0, D1, ALIGN):
    """Stores the gradient of x.  With QK-norm it is given that of x_hat w, and also stores these rows' share of dw.

    dw = sum of dx x_hat over rows, and with g = dx w the gradient of x is (g - x_hat mean(g x_hat)) / rms(x).
    DW: None but for queries, as one side's is enough.
    """
    if EPS is not None:
        x0, x1 = _load2(X, rows, xl, length, D, D0, D1, True, ALIGN)
        r = _inverse_rms(x0, x1, EPS, D, D1)[:, None]
        x0, x1 = x0.to(tl.float32) * r, x1.to(tl.float32) * r
        if DW is not None:
            _store(DW, tl.arange(0, 1), D, 1, tl.sum(dx0 * x0, 0)[None, :], 0, D0, D)
            if D1:
                _store(DW, tl.arange(0, 1), D, 1, tl.sum(dx1 * x1, 0)[None, :], D0, D1, D)
        dx0 *= _weight(W, 0, D0, D)
        mean = tl.sum(dx0 * x0, 1)
        if D1:
            dx1 *= _weight(W, D0, D1, D)
            mean += tl.sum(dx1 * x1, 1)
        mean = mean[:, None] / D
        dx0 = (dx0 - x0 * mean) * r
        dx1 = (dx1 - x1 * mean) * r if D1 else dx0
    _store(DX, rows, dl, length, dx0, 0, D0, D)
    if D1:
        _store(DX, rows, dl, length, dx1, D0, D1, D)


@jit
def _forward_tile(
    m, l, acc0, acc1, q0, q1, K, V, RK, kl, vl, rows, j, Lk, scale, D, D0, D1, CAUSAL, ALIGN, PREC, BN, MASKED
):
    """Takes in a tile of keys: the maximum m so far, the sum l of exponentials and the output, both relative to m."""
    keys = j * BN + tl.arange(0, BN)
    k0, k1 = _load2(K, keys, kl, Lk, D, D0, D1, MASKED, ALIGN)
    s = _dot(q0, q1, k0, k1, D1, PREC) * _factor(RK, keys, Lk, MASKED)
    if MASKED:
        s = tl.where(keys[None, :] < Lk, s, float("-inf"))
    if MASKED and CAUSAL:
        s = tl.where(keys[None, :] <= rows[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    shrink = tl.exp2(m - m_new)
    p = tl.exp2(s * scale - m_new[:, None])
    l = l * shrink + tl.sum(p, 1)
    p = _operand(p, V.dtype.element_ty)
    v0 = _load(V, keys, vl, Lk, 0, D0, D, MASKED, ALIGN)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PREC)
    if D1:
        v1 = _load(V, keys, vl, Lk, D0, D1, D, MASKED, ALIGN)
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PREC)
    return m_new, l, acc0, acc1


@jit
def _forward(
    Q, K, V, O, LSE, RK, W,
    qb, ql, qh, kb, kl, kh, vb, vl, vh, H, Lq, Lk, scale,
    D: constexpr, D0: constexpr, D1: constexpr, CAUSAL: constexpr, ALIGN: constexpr, PREC: constexpr, EPS: constexpr,
    BM: constexpr, BN: constexpr,
):  # fmt: skip
    """A tile of BM queries over all keys: O (B,Lq,H,D) contiguous, LSE (B,H,Lq)."""
    tiles = tl.cdiv(Lq, BM)
    first, bh = tl.program_id(0) % tiles * BM, tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    Q, K, V = _head(Q, b, h, qb, qh, ALIGN), _head(K, b, h, kb, kh, ALIGN), _head(V, b, h, vb, vh, ALIGN)
    rows = first + tl.arange(0, BM)
    q0, q1 = _load2(Q, rows, ql, Lq, D, D0, D1, True, ALIGN)
    if EPS is not None:
        RK += bh.to(tl.int64) * Lk
        q0, q1, _ = _normed(q0, q1, W, EPS, D, D0, D1, Q.dtype.element_ty)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc0 = tl.zeros([BM, D0], tl.float32)
    acc1 = tl.zeros([BM, D1 if D1 else 16], tl.float32)  # without a second tile of columns never used
    seen = Lk  # keys that some query of the tile sees, and those that every one does
    whole = Lk
    if CAUSAL:
        seen = tl.minimum(Lk, first + BM)
        whole = tl.minimum(Lk, first + 1)
    for j in range(0, whole // BN):
        m, l, acc0, acc1 = _forward_tile(
            m, l, acc0, acc1, q0, q1, K, V, RK, kl, vl, rows, j, Lk, scale, D, D0, D1, CAUSAL, ALIGN, PREC, BN, False
        )
    for j in range(whole // BN, tl.cdiv(seen, BN)):
        m, l, acc0, acc1 = _forward_tile(
            m, l, acc0, acc1, q0, q1, K, V, RK, kl, vl, rows, j, Lk, scale, D, D0, D1, CAUSAL, ALIGN, PREC, BN, True
        )
    O += b * Lq * H * D + h * D
    _store(O, rows, H * D, Lq, acc0 / l[:, None], 0, D0, D)
    if D1:
        _store(O, rows, H * D, Lq, acc1 / l[:, None], D0, D1, D)
    tl.store(LSE + bh.to(tl.int64) * Lq + rows, m + tl.log2(l), mask=rows < Lq)


@jit
def _forward_short(
    Q, K, V, O, LSE, W,
    qb, ql, qh, kb, kl, kh, vb, vl, vh, H, Lq, Lk, scale,
    D: constexpr, D0: constexpr, D1: constexpr, CAUSAL: constexpr, ALIGN: constexpr, PREC: constexpr, EPS: constexpr,
    BM: constexpr, BN: constexpr, REPEAT: constexpr,
):  # fmt: skip
    """All keys in one tile, loaded once for REPEAT tiles of queries: the maximum is known at once."""
    parts = tl.cdiv(Lq, BM * REPEAT)
    first, bh = tl.program_id(0) % parts * (BM * REPEAT), tl.program_id(0) // parts
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    Q, K, V = _head(Q, b, h, qb, qh, ALIGN), _head(K, b, h, kb, kh, ALIGN), _head(V, b, h, vb, vh, ALIGN)
    O += b * Lq * H * D + h * D
    LSE += bh.to(tl.int64) * Lq
    keys = tl.arange(0, BN)
    k0, k1 = _load2(K, keys, kl, Lk, D, D0, D1, True, ALIGN)
    v0, v1 = _load2(V, keys, vl, Lk, D, D0, D1, True, ALIGN)
    rk = _inverse_rms(k0, k1, EPS, D, D1)[None, :] if EPS is not None else 1.0
    for start in range(first, tl.minimum(Lq, first + BM * REPEAT), BM):
        rows = start + tl.arange(0, BM)
        q0, q1 = _load2(Q, rows, ql, Lq, D, D0, D1, True, ALIGN)
        if EPS is not None:
            q0, q1, _ = _normed(q0, q1, W, EPS, D, D0, D1, Q.dtype.element_ty)
        s = _dot(q0, q1, k0, k1, D1, PREC) * rk
        s = tl.where(keys[None, :] < Lk, s, float("-inf"))
        if CAUSAL:
            s = tl.where(keys[None, :] <= rows[:, None], s, float("-inf"))
        m = tl.max(s, 1) * scale
        p = tl.exp2(s * scale - m[:, None])
        l = tl.sum(p, 1)
        p = _operand(p, V.dtype.element_ty)
        _store(O, rows, H * D, Lq, tl.dot(p, v0, input_precision=PREC) / l[:, None], 0, D0, D)
        if D1:
            _store(O, rows, H * D, Lq, tl.dot(p, v1, input_precision=PREC) / l[:, None], D0, D1, D)
        tl.store(LSE + rows, m + tl.log2(l), mask=rows < Lq)


# backward, with P = exp2(scale s - lse) computed again from what forward kept:
#     dv = P^T do    dS = P * (do v^T - delta), delta = rowsum(o * do)    dq = dS k / sqrt(d)    dk = dS^T q / sqrt(d)
# A program owns the rows of what it sums, so that nothing is added atomically and two runs give the same bits.


@jit
def _query_side(Q, O, DO, LSE, ql, ol, gl, rows, Lq, D, D0, D1, ALIGN):
    """What backward needs of a tile of queries: q and do in their column tiles, lse, delta."""
    q0, q1 = _load2(Q, rows, ql, Lq, D, D0, D1, True, ALIGN)
    g0, g1 = _load2(DO, rows, gl, Lq, D, D0, D1, True, ALIGN)
    o0, o1 = _load2(O, rows, ol, Lq, D, D0, D1, True, ALIGN)
    delta = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), 1)
    if D1:
        delta += tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
    return q0, q1, g0, g1, tl.load(LSE + rows, mask=rows < Lq, other=0.0), delta


@jit
def _backward_q_tile(
    dq0, dq1, q0, q1, g0, g1, lse, delta, K, V, RK, kl, vl, rows, j, Lk, scale,
    D, D0, D1, CAUSAL, ALIGN, PREC, BN, MASKED,
):  # fmt: skip
    keys = j * BN + tl.arange(0, BN)
    k0, k1 = _load2(K, keys, kl, Lk, D, D0, D1, MASKED, ALIGN)
    v0, v1 = _load2(V, keys, vl, Lk, D, D0, D1, MASKED, ALIGN)
    rk = _factor(RK, keys, Lk, MASKED)
    p = tl.exp2(_dot(q0, q1, k0, k1, D1, PREC) * (scale * rk) - lse[:, None])
    if MASKED and CAUSAL:
        p = tl.where(keys[None, :] <= rows[:, None], p, 0.0)
    ds = p * (_dot(g0, g1, v0, v1, D1, PREC) - delta[:, None]) * rk
    if MASKED:  # beyond the last key p need not be finite
        ds = tl.where(keys[None, :] < Lk, ds, 0.0)
    ds = _operand(ds, K.dtype.element_ty)
    dq0 = tl.dot(ds, k0, dq0, input_precision=PREC)
    if D1:
        dq1 = tl.dot(ds, k1, dq1, input_precision=PREC)
    return dq0, dq1


@jit
def _backward_q(
    Q, K, V, O, DO, LSE, DELTA, DQ, RQ, RK, W, DW,
    qb, ql, qh, kb, kl, kh, vb, vl, vh, gb, gl, gh, H, Lq, Lk, scale,
    D: constexpr, D0: constexpr, D1: constexpr, CAUSAL: constexpr, ALIGN: constexpr, PREC: constexpr, EPS: constexpr,
    BM: constexpr, BN: constexpr,
):  # fmt: skip
    """A tile of BM queries over all keys: DQ (B,Lq,H,D) contiguous, and for _backward_kv DELTA and RQ (B,H,Lq)."""
    tiles = tl.cdiv(Lq, BM)
    first, bh = tl.program_id(0) % tiles * BM, tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    Q, K, V = _head(Q, b, h, qb, qh, ALIGN), _head(K, b, h, kb, kh, ALIGN), _head(V, b, h, vb, vh, ALIGN)
    DO, O = _head(DO, b, h, gb, gh, ALIGN), O + b * Lq * H * D + h * D
    LSE, DELTA = LSE + bh.to(tl.int64) * Lq, DELTA + bh.to(tl.int64) * Lq
    rows = first + tl.arange(0, BM)
    q0, q1, g0, g1, lse, delta = _query_side(Q, O, DO, LSE, ql, H * D, gl, rows, Lq, D, D0, D1, ALIGN)
    tl.store(DELTA + rows, delta, mask=rows < Lq)
    if EPS is not None:
        RK, DW = RK + bh.to(tl.int64) * Lk, DW + tl.program_id(0) * D
        q0, q1, r = _normed(q0, q1, W, EPS, D, D0, D1, Q.dtype.element_ty)
        tl.store(RQ + bh.to(tl.int64) * Lq + rows, r, mask=rows < Lq)
    dq0 = tl.zeros([BM, D0], tl.float32)
    dq1 = tl.zeros([BM, D1 if D1 else 16], tl.float32)
    seen = Lk
    whole = Lk
    if CAUSAL:
        seen = tl.minimum(Lk, first + BM)
        whole = tl.minimum(Lk, first + 1)
    for j in range(0, whole // BN):
        dq0, dq1 = _backward_q_tile(
            dq0, dq1, q0, q1, g0, g1, lse, delta, K, V, RK, kl, vl, rows, j, Lk, scale,
            D, D0, D1, CAUSAL, ALIGN, PREC, BN, False,
        )  # fmt: skip
    for j in range(whole // BN, tl.cdiv(seen, BN)):
        dq0, dq1 = _backward_q_tile(
            dq0, dq1, q0, q1, g0, g1, lse, delta, K, V, RK, kl, vl, rows, j, Lk, scale,
            D, D0, D1, CAUSAL, ALIGN, PREC, BN, True,
        )  # fmt: skip
    scale *= 0.6931471805599453  # log2(e) is folded into it
    DQ += b * Lq * H * D + h * D
    _store_gradient(DQ, Q, dq0 * scale, dq1 * scale, rows, H * D, ql, Lq, W, DW, EPS, D, D0, D1, ALIGN)


@jit
def _backward_kv_tile(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, Q, DO, LSE, DELTA, RQ, ql, gl, keys, i, Lq, scale,
    D, D0, D1, CAUSAL, ALIGN, PREC, BM, MASKED,
):  # fmt: skip
    rows = i * BM + tl.arange(0, BM)
    q0, q1 = _load2(Q, rows, ql, Lq, D, D0, D1, MASKED, ALIGN)
    g0, g1 = _load2(DO, rows, gl, Lq, D, D0, D1, MASKED, ALIGN)
    if MASKED:  # beyond the last query q, do and delta are 0, and so is what they add
        lse = tl.load(LSE + rows, mask=rows < Lq, other=0.0)
        delta = tl.load(DELTA + rows, mask=rows < Lq, other=0.0)
    else:
        lse = tl.load(LSE + rows)
        delta = tl.load(DELTA + rows)
    rq = _factor(RQ, rows, Lq, MASKED)
    s = _dot(k0, k1, q0, q1, D1, PREC)  # (BN,BM): transposed, so that p and ds can be dot's first operand
    p = tl.exp2(s * (scale * rq) - lse[None, :])
    if CAUSAL:
        p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)
    ds = _operand(p * (_dot(v0, v1, g0, g1, D1, PREC) - delta[None, :]) * rq, Q.dtype.element_ty)
    p = _operand(p, Q.dtype.element_ty)
    dv0 = tl.dot(p, g0, dv0, input_precision=PREC)
    dk0 = tl.dot(ds, q0, dk0, input_precision=PREC)
    if D1:
        dv1 = tl.dot(p, g1, dv1, input_precision=PREC)
        dk1 = tl.dot(ds, q1, dk1, input_precision=PREC)
    return dk0, dk1, dv0, dv1


@jit
def _backward_kv(
    Q, K, V, DO, LSE, DELTA, DK, DV, RQ, W,
    qb, ql, qh, kb, kl, kh, vb, vl, vh, gb, gl, gh, H, Lq, Lk, scale,
    D: constexpr, D0: constexpr, D1: constexpr, CAUSAL: constexpr, ALIGN: constexpr, PREC: constexpr, EPS: constexpr,
    BM: constexpr, BN: constexpr,
):  # fmt: skip
    """A tile of BN keys over all queries: DK and DV (B,Lk,H,D) contiguous."""
    tiles = tl.cdiv(Lk, BN)
    first, bh = tl.program_id(0) % tiles * BN, tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    Q, K, V = _head(Q, b, h, qb, qh, ALIGN), _head(K, b, h, kb, kh, ALIGN), _head(V, b, h, vb, vh, ALIGN)
    DO = _head(DO, b, h, gb, gh, ALIGN)
    LSE, DELTA = LSE + bh.to(tl.int64) * Lq, DELTA + bh.to(tl.int64) * Lq
    keys = first + tl.arange(0, BN)
    k0, k1 = _load2(K, keys, kl, Lk, D, D0, D1, True, ALIGN)
    v0, v1 = _load2(V, keys, vl, Lk, D, D0, D1, True, ALIGN)
    if EPS is not None:
        RQ += bh.to(tl.int64) * Lq
        k0, k1, _ = _normed(k0, k1, W, EPS, D, D0, D1, K.dtype.element_ty)
    dk0 = tl.zeros([BN, D0], tl.float32)
    dv0 = tl.zeros([BN, D0], tl.float32)
    dk1 = tl.zeros([BN, D1 if D1 else 16], tl.float32)
    dv1 = tl.zeros([BN, D1 if D1 else 16], tl.float32)
    begin = 0
    if CAUSAL:  # tiles on the diagonal
        begin = tl.minimum(tl.cdiv(first + BN, BM), tl.cdiv(Lq, BM))
        for i in range(first // BM, begin):
            dk0, dk1, dv0, dv1 = _backward_kv_tile(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, Q, DO, LSE, DELTA, RQ, ql, gl, keys, i, Lq, scale,
                D, D0, D1, True, ALIGN, PREC, BM, True,
            )  # fmt: skip
    for i in range(begin, Lq // BM):
        dk0, dk1, dv0, dv1 = _backward_kv_tile(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, Q, DO, LSE, DELTA, RQ, ql, gl, keys, i, Lq, scale,
            D, D0, D1, False, ALIGN, PREC, BM, False,
        )  # fmt: skip
    for i in range(tl.maximum(begin, Lq // BM), tl.cdiv(Lq, BM)):
        dk0, dk1, dv0, dv1 = _backward_kv_tile(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, Q, DO, LSE, DELTA, RQ, ql, gl, keys, i, Lq, scale,
            D, D0, D1, False, ALIGN, PREC, BM, True,
        )  # fmt: skip
    scale *= 0.6931471805599453
    DK, DV = DK + b * Lk * H * D + h * D, DV + b * Lk * H * D + h * D
    _store(DV, keys, H * D, Lk, dv0, 0, D0, D)  # before dk, or the compiler keeps k in registers from its first reading
    if D1:
        _store(DV, keys, H * D, Lk, dv1, D0, D1, D)
    _store_gradient(DK, K, dk0 * scale, dk1 * scale, keys, H * D, kl, Lk, W, None, EPS, D, D0, D1, ALIGN)


@jit
def _backward_short(
    Q, K, V, O, DO, LSE, DQ, DK, DV,
    qb, ql, qh, kb, kl, kh, vb, vl, vh, gb, gl, gh, H, Lq, Lk, scale, ROWS,
    D: constexpr, D0: constexpr, D1: constexpr, CAUSAL: constexpr, ALIGN: constexpr, PREC: constexpr, EPS: constexpr,
    BM: constexpr, BN: constexpr,
):  # fmt: skip
    """All keys in one tile and ROWS queries: their DQ, and their share of DK and DV, float32 (B,parts,Lk,H,D)."""
    parts = tl.cdiv(Lq, ROWS)
    part, bh = tl.program_id(0) % parts, tl.program_id(0) // parts
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    Q, K, V = _head(Q, b, h, qb, qh, ALIGN), _head(K, b, h, kb, kh, ALIGN), _head(V, b, h, vb, vh, ALIGN)
    DO, O, DQ = _head(DO, b, h, gb, gh, ALIGN), O + b * Lq * H * D + h * D, DQ + b * Lq * H * D + h * D
    LSE += bh.to(tl.int64) * Lq
    keys = tl.arange(0, BN)
    k0, k1 = _load2(K, keys, kl, Lk, D, D0, D1, True, ALIGN)
    v0, v1 = _load2(V, keys, vl, Lk, D, D0, D1, True, ALIGN)
    dk0 = tl.zeros([BN, D0], tl.float32)
    dv0 = tl.zeros([BN, D0], tl.float32)
    dk1 = tl.zeros([BN, D1 if D1 else 16], tl.float32)
    dv1 = tl.zeros([BN, D1 if D1 else 16], tl.float32)
    for start in range(part * ROWS, tl.minimum(Lq, part * ROWS + ROWS), BM):
        rows = start + tl.arange(0, BM)
        q0, q1, g0, g1, lse, delta = _query_side(Q, O, DO, LSE, ql, H * D, gl, rows, Lq, D, D0, D1, ALIGN)
        p = tl.exp2(_dot(k0, k1, q0, q1, D1, PREC) * scale - lse[None, :])  # (BN,BM)
        p = tl.where(keys[:, None] < Lk, p, 0.0)  # else what is added to dq might not be finite
        if CAUSAL:
            p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)
        ds = _operand(p * (_dot(v0, v1, g0, g1, D1, PREC) - delta[None, :]), Q.dtype.element_ty)
        p = _operand(p, Q.dtype.element_ty)
        dv0 = tl.dot(p, g0, dv0, input_precision=PREC)
        dk0 = tl.dot(ds, q0, dk0, input_precision=PREC)
        dq = tl.dot(tl.trans(ds), k0, input_precision=PREC) * (scale * 0.6931471805599453)
        _store(DQ, rows, H * D, Lq, dq, 0, D0, D)
        if D1:
            dv1 = tl.dot(p, g1, dv1, input_precision=PREC)
            dk1 = tl.dot(ds, q1, dk1, input_precision=PREC)
            dq = tl.dot(tl.trans(ds), k1, input_precision=PREC) * (scale * 0.6931471805599453)
            _store(DQ, rows, H * D, Lq, dq, D0, D1, D)
    scale *= 0.6931471805599453
    share = (b * parts + part) * Lk * H * D + h * D
    _store(DK + share, keys, H * D, Lk, dk0 * scale, 0, D0, D)
    _store(DV + share, keys, H * D, Lk, dv0, 0, D0, D)
    if D1:
        _store(DK + share, keys, H * D, Lk, dk1 * scale, D0, D1, D)
        _store(DV + share, keys, H * D, Lk, dv1, D0, D1, D)


# --- their launch ---

KERNELS = {"_forward": _forward, "_forward_short": _forward_short, "_backward_short": _backward_short}
KERNELS |= {"_backward_q": _backward_q, "_backward_kv": _backward_kv}


def column_tiles(dim):
    """The powers of two D0 and D1 that hold a head dim; D1 is 0 where one does."""
    whole = max(16, 1 << (dim - 1).bit_length())
    rest = max(16, 1 << (dim - whole // 2 - 1).bit_length()) if dim > whole // 2 else 0
    return (whole // 2, rest) if whole > 16 and rest < whole // 2 else (whole, 0)


# Tilings to choose from, by kernel and bytes of an element, then by the head dim up to which they hold: (oldest GPU,
# queries BM, keys BN, warps, stages).  The first is taken where nothing is measured.  Those of two bytes spill no
# registers, and none needs more shared memory than the GPU has: tests/attention_aot.py.
TILINGS = {
    ("_forward", 2): {
        24: [(80, 128, 32, 4, 3), (90, 128, 64, 8, 3), (80, 64, 32, 4, 3)],
        64: [(80, 128, 64, 8, 3), (90, 128, 64, 4, 3), (90, 128, 128, 8, 2), (80, 128, 32, 4, 4), (80, 64, 32, 4, 3)],
        128: [(80, 128, 32, 8, 3), (90, 128, 64, 8, 3), (90, 128, 128, 8, 2), (80, 64, 64, 4, 3)],
        160: [(90, 128, 32, 8, 3), (90, 128, 64, 8, 3), (90, 64, 64, 4, 3), (80, 128, 16, 8, 3)],
    },
    ("_forward_short", 2): {160: [(80, 64, 128, 4, 2), (80, 128, 128, 8, 2), (80, 32, 128, 4, 2)]},
    ("_backward_q", 2): {
        64: [(80, 128, 32, 8, 2), (90, 128, 64, 8, 2), (90, 64, 64, 4, 2), (80, 64, 32, 4, 2)],
        128: [(80, 64, 32, 4, 2), (80, 128, 32, 8, 2), (90, 64, 64, 8, 2)],
        160: [(80, 64, 32, 4, 2), (90, 128, 32, 8, 2), (90, 64, 64, 8, 2)],
    },
    ("_backward_kv", 2): {
        64: [(80, 64, 128, 8, 2), (80, 32, 128, 8, 2), (80, 32, 64, 4, 2), (90, 64, 64, 4, 2)],
        80: [(80, 32, 128, 8, 2), (80, 32, 64, 4, 2), (90, 64, 128, 8, 2), (90, 64, 64, 4, 2)],
        96: [(80, 32, 64, 8, 2), (90, 64, 64, 8, 2), (90, 32, 128, 8, 2)],
        128: [(80, 32, 64, 8, 2), (80, 64, 64, 8, 2), (90, 32, 128, 8, 2)],
        160: [(90, 32, 64, 8, 2), (80, 16, 64, 8, 2)],
    },
    ("_backward_short", 2): {
        64: [(80, 32, 128, 8, 2), (90, 64, 128, 8, 2)],
        80: [(90, 32, 128, 8, 2), (90, 64, 128, 8, 2), (80, 16, 128, 8, 2)],
    },
    ("_forward", 4): {64: [(80, 32, 16, 4, 2)], 160: [(80, 16, 16, 4, 2)]},
    ("_forward_short", 4): {80: [(80, 16, 128, 8, 2)]},
    ("_backward_q", 4): {64: [(80, 32, 32, 4, 2)], 160: [(80, 16, 16, 8, 2)]},
    ("_backward_kv", 4): {160: [(80, 16, 16, 8, 2)]},
    ("_backward_short", 4): {},  # its four sums do not fit
}


def tilings(name, dim, itemsize, arch, keys=SHORT, norm=False):
    """Keyword arguments of a kernel, the default first; keys: how many the kernels of one tile are given."""
    ranges = TILINGS[name, itemsize]
    rows = [row[1:] for row in ranges[min(most for most in ranges if most >= dim)] if row[0] <= arch]
    found = [dict(BM=BM, BN=BN, num_warps=warps, num_stages=stages) for BM, BN, warps, stages in rows]
    if norm and name == "_backward_q" and dim > 128:  # its end needs registers
        found = [tiling | dict(num_warps=8) for tiling in found]
    if name.endswith("short"):
        one = max(16, 1 << (keys - 1).bit_length())
        found = [tiling | dict(BN=one) for tiling in found]
    if name == "_forward_short":
        found = [tiling | dict(REPEAT=repeat) for tiling in found for repeat in (4, 1)]
    return found


def _takes(name, Lk, D, itemsize):
    """Whether a kernel of one tile can be given such keys."""
    return Lk <= SHORT and D <= max(TILINGS[name, itemsize], default=0)


def _itemsize(x):
    return 2 if INTERPRET else x.dtype.itemsize  # the larger tiles of 16-bit types are interpreted sooner


_best = {}  # the fastest tiling of a kernel for a shape


def _launch(name, programs, pointers, strides, sizes, causal, align, eps, *more):
    """Starts a kernel with the best tiling, measured once for a shape; returns the number of programs.

    programs: their number as a function of the tiling.  sizes: B, H, Lq, Lk, D.  eps: None without QK-norm.
    more: numbers that the kernel takes after the usual ones.
    """
    B, H, Lq, Lk, D = sizes
    x, (D0, D1) = pointers[0], column_tiles(D)
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 raises where this was set and not that
    constants = dict(D=D, D0=D0, D1=D1, CAUSAL=causal, ALIGN=align, PREC="tf32" if tf32 else "ieee", EPS=eps)
    numbers = (*strides, H, Lq, Lk, D**-0.5 * math.log2(math.e), *more)

    def start(tiling):
        KERNELS[name][(programs(tiling),)](*pointers, *numbers, **constants | tiling)
        return programs(tiling)

    # a tiling decides in which order is summed, so it must not differ from run to run where bits count
    fixed = INTERPRET or torch.are_deterministic_algorithms_enabled()
    too_large = triton.runtime.errors.OutOfResources  # for the 99 KB of an RTX's shared memory
    with torch.cuda.device_of(x):
        key = (name, x.device, x.dtype, tf32, *((n - 1).bit_length() for n in (B * H, Lq, Lk)), D, causal, eps, fixed)
        if key in _best:
            with suppress(too_large):  # it can be: tensors that are not aligned need less, and may have come first
                return start(_best[key])
        arch = 10 * torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 90
        choices = tilings(name, D, _itemsize(x), arch, Lk, eps is not None)
        if not fixed and torch.cuda.is_current_stream_capturing():  # where nothing can be timed, nor even loaded
            raise RuntimeError(f"attention: a new shape for {name} in a CUDA graph's capture: call it once before")
        times = {}
        for i, tiling in enumerate(choices):
            with suppress(too_large):
                if fixed:
                    return start(tiling)  # the first that fits
                times[i] = _milliseconds(lambda tiling=tiling: start(tiling))
        if not times:
            raise RuntimeError(f"attention: no tiling of {name} for head dim {D} fits this GPU: take sdpa")
        _best[key] = choices[min(times, key=times.get)]
        return start(_best[key])


def _readable(x):
    """As the kernels need it: the last dimension contiguous (an expanded gradient's is not), rows counted in int32."""
    return x if x.stride(-1) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


def _strides(*tensors):
    """Those of (B, L, heads), one tensor after the other, and what all are multiples of, a contiguous output's too."""
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    return strides, 8 if all(n % 8 == 0 for n in (*strides, tensors[0].shape[3])) else 1


def _inverse_rms_of(x, eps):
    """(B,L,heads,d) -> (B,heads,L) float32."""
    norm = torch.linalg.vector_norm(x.transpose(1, 2), dim=-1, dtype=torch.float32)
    return (norm.square() / x.shape[-1] + eps).rsqrt().contiguous()


def attention_forward(q, k, v, causal, weight=None, eps=0.0):
    """(B,L,heads,d) -> the output (B,Lq,heads,d), and log2 of the sums of exponentials (B,heads,Lq) in float32.

    weight: (d,) float32, the product of those of q's and k's RMS norm; None: they are not normalised.
    """
    q, k, v = _readable(q), _readable(k), _readable(v)
    (B, Lq, H, D), Lk = q.shape, k.shape[1]
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), _lse_of(q)
    strides, align = _strides(q, k, v)
    given = strides, (B, H, Lq, Lk, D), causal, align, None if weight is None else eps
    tensors = q, k, v, out, lse
    if _takes("_forward_short", Lk, D, _itemsize(q)):
        _launch("_forward_short", lambda t: B * H * -(-Lq // (t["BM"] * t["REPEAT"])), (*tensors, weight), *given)
    else:
        rk = None if weight is None else _inverse_rms_of(k, eps)
        _launch("_forward", lambda t: B * H * -(-Lq // t["BM"]), (*tensors, rk, weight), *given)
    return out, lse


def attention_backward(grad, q, k, v, out, lse, causal, weight=None, eps=0.0):
    """The gradients of q, k, v and, where there is one, of weight."""
    grad, q, k, v, out = _readable(grad), _readable(q), _readable(k), _readable(v), out.contiguous()
    (B, Lq, H, D), Lk = q.shape, k.shape[1]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    strides, align = _strides(q, k, v, grad)
    given = strides, (B, H, Lq, Lk, D), causal, align, None if weight is None else eps
    if weight is None and _takes("_backward_short", Lk, D, _itemsize(q)):  # whose registers have no room for the norm
        # queries in so many parts that a GPU has work; a function of the shape alone, as the sums' order hangs on it
        parts = max(1, min(-(-Lq // 128), 512 // (B * H)))
        rows = -(-Lq // (128 * parts)) * 128
        parts = -(-Lq // rows)
        dk_parts, dv_parts = k.new_empty(2, B, parts, Lk, H, D, dtype=torch.float32)
        tensors = q, k, v, out, grad, lse, dq, dk_parts, dv_parts
        _launch("_backward_short", lambda t: B * H * parts, tensors, *given, rows)
        return [dq, dk_parts.sum(1).to(k.dtype), dv_parts.sum(1).to(v.dtype)]
    delta, rq, rk, dw = torch.empty_like(lse), None, None, None
    if weight is not None:
        rq, rk = torch.empty_like(lse), _inverse_rms_of(k, eps)
        dw = weight.new_empty(B * H * -(-Lq // 16), D)  # a row for each program, however small its tile
    tensors = q, k, v, out, grad, lse, delta, dq, rq, rk, weight, dw
    programs = _launch("_backward_q", lambda t: B * H * -(-Lq // t["BM"]), tensors, *given)
    tensors = q, k, v, grad, lse, delta, dk, dv, rq, weight
    _launch("_backward_kv", lambda t: B * H * -(-Lk // t["BN"]), tensors, *given)
    return [dq, dk, dv] if dw is None else [dq, dk, dv, dw[:programs].sum(0)]


def _lse_of(q):
    B, L, H, _ = q.shape
    return q.new_empty(B, H, L, dtype=torch.float32)


# as operators of PyTorch: torch.compile takes them whole, without looking inside

forward_op = torch.library.custom_op(
    "ldm::attention",
    attention_forward,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, bool causal, Tensor? weight=None, float eps=0.0) -> (Tensor, Tensor)",
)
backward_op = torch.library.custom_op(
    "ldm::attention_backward",
    attention_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal, Tensor? weight=None, "
    "float eps=0.0) -> Tensor[]",
)


@forward_op.register_fake
def _(q, k, v, causal, weight=None, eps=0.0):
    return torch.empty_like(q, memory_format=torch.contiguous_format), _lse_of(q)


@backward_op.register_fake
def _(grad, q, k, v, out, lse, causal, weight=None, eps=0.0):
    given = (q, k, v) if weight is None else (q, k, v, weight)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]


def _keep(ctx, inputs, output):
    q, k, v, ctx.causal, weight, ctx.eps = inputs
    ctx.save_for_backward(q, k, v, *output, weight)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    *tensors, weight = ctx.saved_tensors
    dq, dk, dv, *dw = torch.ops.ldm.attention_backward(grad, *tensors, ctx.causal, weight, ctx.eps)
    return dq, dk, dv, None, dw[0] if dw else None, None


def _cannot_differentiate(ctx, *grads):
    raise RuntimeError("attention: the Triton kernels have no second derivative: take sdpa_math or reference")


forward_op.register_autograd(_differentiate, setup_context=_keep)
backward_op.register_autograd(_cannot_differentiate)


@register_flop_formula(torch.ops.ldm.attention)
def _(q, k, v, causal, *args, **kwargs):
    B, L, H, D = q
    return sdpa_flop_count((B, H, L, D), (B, H, k[1], D), (B, H, k[1], D))


@register_flop_formula(torch.ops.ldm.attention_backward)
def _(grad, q, *args, **kwargs):
    B, L, H, D = q
    return 5 * B * H * L * args[0][1] * D * 2  # S again, dP, dV, dK, dQ
