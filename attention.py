"""Attention: softmax(q k^T / sqrt(d)) v by our Triton kernels, SDPA or xformers, and the multi-head module.

out = attention(q, k, v)                        # (B,L,heads,d) each, by torch's scaled_dot_product_attention
out = attention(q, k, v, backend="triton")      # by the kernels below (FlashAttention-2, Dao, arXiv 2307.08691)
use_attention(model, "sdpa_cudnn")              # sets the backend of every `Attention` in a model
python bench.py --rows=attention                # compares the backends on this machine
TRITON_INTERPRET=1 python ...                   # runs the kernels on the CPU, slowly, for debugging
"""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows: every backend but "triton"
    triton, tl = None, SimpleNamespace(constexpr=bool)

SDPA = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
BACKENDS = ("auto", "triton", "xformers", "sdpa", *SDPA, "reference")
# The kernels pad the head dim to a power of two. Beyond 128 that is 256 columns: in backward the tiles of q, k, v, do
# and their gradients then exceed a GPU's shared memory and registers, and for 160 columns 2.6 times the work is done.
MAX_HEAD_DIM = 128
INTERPRET = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1


def attention(q, k, v, causal=False, backend="auto"):
    """Return softmax(q k^T / sqrt(d)) v for q (B,L,heads,d), k and v (B,M,heads,d), as (B,L,heads,d).

    Args:
        causal: query i attends to keys 0 to i.
        backend: one of BACKENDS. "sdpa" is torch.nn.functional.scaled_dot_product_attention, which chooses among the
            "sdpa_*" itself; "reference" is the formula. "auto" is "sdpa": no GPU has measured the Triton kernels yet.
            "triton" runs "sdpa" for d > 128, and copies tensors whose last dimension is not contiguous.

    Under autocast the inputs are cast to its dtype, but for float64.
    """
    assert q.ndim == 4 and k.shape == v.shape, "attention expects q (B,L,heads,d), k and v (B,M,heads,d)"
    assert q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:], "q and k differ in batch, heads or head dim"
    assert backend in BACKENDS, f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}"
    if not q.is_meta and torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    assert q.dtype == k.dtype == v.dtype, "q, k and v differ in dtype"
    if q.numel() == 0 or k.numel() == 0:
        backend = "sdpa_math"  # zeros where there are no keys; the CPU's flash kernel divides by zero (torch 2.11)
    elif backend == "auto" or q.is_meta or (backend == "triton" and q.shape[3] > MAX_HEAD_DIM):
        backend = "sdpa"
    if backend == "triton":
        return torch.ops.ldm.attention(q, k, v, causal)[0]
    if backend == "xformers":
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask() if causal else None)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B,heads,L,d)
    if backend == "reference":
        out = reference(q, k, v, causal)
    else:
        with nullcontext() if backend == "sdpa" else sdpa_kernel(SDPA[backend]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2)


def reference(q, k, v, causal):
    """The formula on (B,heads,L,d), with the softmax in at least float32."""
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)  # q is scaled first: the product may overflow float16
    logits = logits.to(torch.promote_types(q.dtype, torch.float32))
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
    return logits.softmax(dim=-1).to(v.dtype) @ v


def unavailable(backend, device, dtype):
    """Return in one line why a backend cannot run, or an empty string."""
    if backend == "triton":
        if triton is None:
            return "Triton is not installed; pip install triton (Linux), or use sdpa"
        if device.type != "cuda" and not INTERPRET:
            return f"the kernels do not run on {device.type}; use sdpa, or TRITON_INTERPRET=1 for debugging"
        if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than Ampere (sm_80); use sdpa"
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{dtype} is not float32, float16 or bfloat16; use sdpa"
    if backend == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except ImportError as e:
            return f"xformers cannot be imported ({e}); pip install xformers, or use sdpa"
    if backend in ("xformers", "sdpa_cudnn", "sdpa_efficient") and device.type != "cuda":
        return f"no kernels for {device.type}; use sdpa"
    return ""


# --- the module ---


class Attention(nn.Module):
    """Multi-head attention from x (B,L,dim) to a context (B,M,context_dim), or to x itself.

    `qk_norm`: RMS norm of each head's queries and keys. `linear`: softmax(q) (softmax(k)^T v), which is linear in L
    (Shen et al., arXiv 1812.01243).
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
        q = self.q_norm(self.to_q(x).unflatten(-1, (self.num_heads, -1)))  # (B,L,heads,head_dim)
        k = self.k_norm(self.to_k(context).unflatten(-1, (self.num_heads, -1)))  # (B,M,heads,head_dim)
        v = self.to_v(context).unflatten(-1, (self.num_heads, -1))
        if self.linear:
            summary = torch.einsum("blhd,blhe->bhde", k.softmax(dim=1), v)
            h = torch.einsum("blhd,bhde->blhe", q.softmax(dim=-1), summary)
        else:
            h = attention(q, k, v, causal=self.causal, backend=self.backend)
        return self.to_out(h.flatten(2))


def use_attention(model, backend):
    """Set the backend, one of BACKENDS, of every `Attention` in a model; `linear` ones have none."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = backend


# --- the kernels ---
#
# Each program owns a tile of rows of its result (queries in `forward_kernel` and `backward_q_kernel`, keys in
# `backward_kv_kernel`) of one head of one example, and loops over tiles of the other side. Nothing is added atomically:
# the same inputs give the same bits.
#
# Everything is float32 but the operands of tl.dot, which have the inputs' dtype. The hardware computes exp2, so that
# `scale` is log2(e) / sqrt(d), and `lse` a logarithm to base 2.

jit = triton.jit if triton else lambda kernel: kernel
BF16_AS_FLOAT32 = tl.constexpr(INTERPRET)  # the interpreter multiplies bfloat16 as if it were integers
LN2 = tl.constexpr(math.log(2))


# (BM queries, BN keys, num_warps, num_stages) to choose from; the first is used where nothing is tuned, see `launch`.
# That one spills no registers on sm_80 and sm_90 up to a head dim of 128, says tests/attention_aot.py; no GPU has
# measured any of them.
FORWARD = [(128, 32, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 32, 4, 3)]
FORWARD_FLOAT32 = [(16, 16, 4, 2), (32, 16, 4, 2)]
BACKWARD_Q = [(64, 32, 4, 2), (128, 32, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2)]
BACKWARD_Q_FLOAT32 = [(16, 16, 8, 2), (32, 32, 4, 2)]
BACKWARD_KV = [(32, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2), (32, 64, 4, 2)]
BACKWARD_KV_FLOAT32 = [(16, 16, 8, 2)]


def tuned(half, full, length, tile):
    """Decorate a kernel: autotune it over `half` for 2-byte types, `full` for float32.

    length and tile: names of the arguments over which its loop runs. EVEN is true where the tile divides the length:
    then the loop needs no mask.
    """
    if triton is None:
        return lambda kernel: kernel
    configs = [triton.Config(dict(BM=BM, BN=BN), num_warps=w, num_stages=s) for BM, BN, w, s in half + full]

    def of_dtype(configs, args, **kwargs):
        return configs[: len(half)] if args["Q"].element_size() == 2 else configs[len(half) :]

    even = triton.heuristics({"EVEN": lambda args: args[length] % args[tile] == 0})
    key = ["H", "Lq", "Lk", "D", "CAUSAL", "PREC"]
    autotune = triton.autotune(configs, key=key, prune_configs_by={"early_config_prune": of_dtype})
    return lambda kernel: autotune(even(triton.jit(kernel)))


@jit
def dot(a, b, acc, PREC):
    """acc + a b; acc may be None."""
    if BF16_AS_FLOAT32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PREC)


@jit
def head(x, bh, H, stride_b, stride_h, ALIGN):
    """Pointer to head bh % H of example bh // H.

    ALIGN divides all strides: Triton by itself notices multiples of 16 only, and would load heads of 40 columns two
    bytes at a time.
    """
    return x + tl.multiple_of(bh // H * stride_b + bh % H * stride_h, ALIGN)


@jit
def load(x, rows, stride, length, D, DP, ALIGN, MASKED):
    """Rows of x (length,D) as (rows,DP), zeros outside; without MASKED no row may be beyond the length."""
    cols = tl.arange(0, DP)
    mask = (cols < D)[None, :]
    if MASKED:
        mask = mask & (rows < length)[:, None]
    return tl.load(x + tl.multiple_of(rows * stride, ALIGN)[:, None] + cols[None, :], mask=mask, other=0.0)


@jit
def store(x, rows, stride, length, values, D, DP):
    cols = tl.arange(0, DP)
    mask = (rows < length)[:, None] & (cols < D)[None, :]
    tl.store(x + rows[:, None] * stride + cols[None, :], values.to(x.dtype.element_ty), mask=mask)


@tuned(FORWARD, FORWARD_FLOAT32, "Lk", "BN")
def forward_kernel(
    Q, K, V, O, LSE,
    qb, ql, qh, kb, kl, kh, vb, vl, vh, ob, ol, oh, H, Lq, Lk, scale,
    D: tl.constexpr, DP: tl.constexpr, CAUSAL: tl.constexpr, ALIGN: tl.constexpr, PREC: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM queries over all keys: O (B,Lq,H,D), LSE (B,H,Lq)."""
    tiles = tl.cdiv(Lq, BM)
    first, bh = tl.program_id(0) % tiles * BM, (tl.program_id(0) // tiles).to(tl.int64)
    Q, K, V = head(Q, bh, H, qb, qh, ALIGN), head(K, bh, H, kb, kh, ALIGN), head(V, bh, H, vb, vh, ALIGN)
    rows = first + tl.arange(0, BM)
    q = load(Q, rows, ql, Lq, D, DP, ALIGN, True)
    m = tl.full([BM], float("-inf"), tl.float32)  # the largest score so far
    total = tl.zeros([BM], tl.float32)  # the sum of exponentials, and
    acc = tl.zeros([BM, DP], tl.float32)  # the output, both relative to m
    end = tl.minimum(Lk, first + BM) if CAUSAL else Lk
    for start in range(0, end, BN):
        keys = start + tl.arange(0, BN)
        k = load(K, keys, kl, Lk, D, DP, ALIGN, not EVEN)
        s = dot(q, tl.trans(k), None, PREC) * scale
        if not EVEN:
            s = tl.where(keys[None, :] < Lk, s, float("-inf"))
        if CAUSAL:
            s = tl.where(keys[None, :] <= rows[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        shrink = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = load(V, keys, vl, Lk, D, DP, ALIGN, not EVEN)
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None], PREC)
        m = m_new
    store(head(O, bh, H, ob, oh, ALIGN), rows, ol, Lq, acc / total[:, None], D, DP)
    tl.store(LSE + bh * Lq + rows, m + tl.log2(total), mask=rows < Lq)


# The backward pass computes P = exp2(scale s - lse) again, from what the forward pass has kept (section 3.1.2):
#     dv = P^T do    dS = P * (do v^T - delta), delta = rowsum(o * do)    dq = dS k / sqrt(d)    dk = dS^T q / sqrt(d)


@tuned(BACKWARD_Q, BACKWARD_Q_FLOAT32, "Lk", "BN")
def backward_q_kernel(
    Q, K, V, O, DO, LSE, DELTA, DQ,
    qb, ql, qh, kb, kl, kh, vb, vl, vh, ob, ol, oh, gb, gl, gh, H, Lq, Lk, scale,
    D: tl.constexpr, DP: tl.constexpr, CAUSAL: tl.constexpr, ALIGN: tl.constexpr, PREC: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM queries over all keys: DQ (B,Lq,H,D), and for `backward_kv_kernel` DELTA (B,H,Lq)."""
    tiles = tl.cdiv(Lq, BM)
    first, bh = tl.program_id(0) % tiles * BM, (tl.program_id(0) // tiles).to(tl.int64)
    Q, K, V = head(Q, bh, H, qb, qh, ALIGN), head(K, bh, H, kb, kh, ALIGN), head(V, bh, H, vb, vh, ALIGN)
    rows = first + tl.arange(0, BM)
    q = load(Q, rows, ql, Lq, D, DP, ALIGN, True)
    o = load(head(O, bh, H, ob, oh, ALIGN), rows, ol, Lq, D, DP, ALIGN, True)
    do = load(head(DO, bh, H, gb, gh, ALIGN), rows, gl, Lq, D, DP, ALIGN, True)
    lse = tl.load(LSE + bh * Lq + rows, mask=rows < Lq, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + bh * Lq + rows, delta, mask=rows < Lq)
    dq = tl.zeros([BM, DP], tl.float32)
    end = tl.minimum(Lk, first + BM) if CAUSAL else Lk
    for start in range(0, end, BN):
        keys = start + tl.arange(0, BN)
        k = load(K, keys, kl, Lk, D, DP, ALIGN, not EVEN)
        v = load(V, keys, vl, Lk, D, DP, ALIGN, not EVEN)
        p = tl.exp2(dot(q, tl.trans(k), None, PREC) * scale - lse[:, None])
        if not EVEN:  # where k is zero p need not be finite
            p = tl.where(keys[None, :] < Lk, p, 0.0)
        if CAUSAL:
            p = tl.where(keys[None, :] <= rows[:, None], p, 0.0)
        ds = p * (dot(do, tl.trans(v), None, PREC) - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq, PREC)
    store(head(DQ, bh, H, ob, oh, ALIGN), rows, ol, Lq, dq * (scale * LN2), D, DP)


@tuned(BACKWARD_KV, BACKWARD_KV_FLOAT32, "Lq", "BM")
def backward_kv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV,
    qb, ql, qh, kb, kl, kh, vb, vl, vh, gb, gl, gh, db, dl, dh, H, Lq, Lk, scale,
    D: tl.constexpr, DP: tl.constexpr, CAUSAL: tl.constexpr, ALIGN: tl.constexpr, PREC: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN keys over all queries: DK and DV (B,Lk,H,D). Scores are transposed, (BN,BM)."""
    tiles = tl.cdiv(Lk, BN)
    first, bh = tl.program_id(0) % tiles * BN, (tl.program_id(0) // tiles).to(tl.int64)
    Q, K, V = head(Q, bh, H, qb, qh, ALIGN), head(K, bh, H, kb, kh, ALIGN), head(V, bh, H, vb, vh, ALIGN)
    DO = head(DO, bh, H, gb, gh, ALIGN)
    keys = first + tl.arange(0, BN)
    k = load(K, keys, kl, Lk, D, DP, ALIGN, True)
    v = load(V, keys, vl, Lk, D, DP, ALIGN, True)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    begin = first // BM * BM if CAUSAL else 0
    for start in range(begin, Lq, BM):
        rows = start + tl.arange(0, BM)
        q = load(Q, rows, ql, Lq, D, DP, ALIGN, not EVEN)
        do = load(DO, rows, gl, Lq, D, DP, ALIGN, not EVEN)
        lse = tl.load(LSE + bh * Lq + rows, mask=rows < Lq, other=0.0)
        delta = tl.load(DELTA + bh * Lq + rows, mask=rows < Lq, other=0.0)
        p = tl.exp2(dot(k, tl.trans(q), None, PREC) * scale - lse[None, :])  # beyond Lq times do = 0 and ds = 0
        if CAUSAL:
            p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)
        dv = dot(p.to(do.dtype), do, dv, PREC)
        ds = p * (dot(v, tl.trans(do), None, PREC) - delta[None, :])
        dk = dot(ds.to(q.dtype), q, dk, PREC)
    store(head(DK, bh, H, db, dh, ALIGN), keys, dl, Lk, dk * (scale * LN2), D, DP)
    store(head(DV, bh, H, db, dh, ALIGN), keys, dl, Lk, dv, D, DP)


def launch(kernel, owned, pointers, strided, q, k, causal):
    """Run a kernel for all tiles of its rows, heads and examples.

    owned: which rows, (their number, their tile's name). strided: the tensors (B,L,H,D) whose strides the kernel takes.
    """
    (B, Lq, H, D), Lk, (length, tile) = q.shape, k.shape[1], owned
    strides = [stride for x in strided for stride in x.stride()[:3]]
    align = 8 if all(stride % 8 == 0 for stride in strides) else 1
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"  # as torch.matmul
    constants = dict(D=D, DP=max(16, triton.next_power_of_2(D)), CAUSAL=causal, ALIGN=align, PREC=precision)
    if INTERPRET or torch.are_deterministic_algorithms_enabled():  # a config decides the order of sums, and so the bits
        configs = kernel.configs if INTERPRET else kernel.early_config_prune(kernel.configs, {"Q": q})
        kernel, constants = kernel.fn, constants | configs[0].all_kwargs()
    with torch.cuda.device_of(q):
        programs = kernel[lambda tiles: (B * H * triton.cdiv(length, tiles[tile]),)]
        programs(*pointers, *strides, H, Lq, Lk, D**-0.5 / math.log(2), **constants)


def readable(x):
    """x as the kernels read it: the last dimension contiguous, offsets within an example in int32."""
    return x if x.stride(-1) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


def contiguous_like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# Operators of PyTorch: torch.compile calls them without tracing what is inside.


@torch.library.custom_op("ldm::attention", mutates_args=())
def attention_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the output (B,L,heads,d), contiguous, and log2 of the sums of exponentials (B,heads,L), float32."""
    problem = unavailable("triton", q.device, q.dtype)
    assert not problem, f"attention=triton: {problem}"
    q, k, v = readable(q), readable(k), readable(v)
    out, lse = empty_outputs(q, k, v, causal)
    launch(forward_kernel, (q.shape[1], "BM"), (q, k, v, out, lse), (q, k, v, out), q, k, causal)
    return out, lse


@attention_forward.register_fake
def empty_outputs(q, k, v, causal):
    B, L, H, _ = q.shape
    return contiguous_like(q), q.new_empty(B, H, L, dtype=torch.float32)


@torch.library.custom_op("ldm::attention_backward", mutates_args=())
def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, contiguous."""
    do, q, k, v, out = readable(do), readable(q), readable(k), readable(v), out.contiguous()
    delta, (dq, dk, dv) = torch.empty_like(lse), empty_gradients(do, q, k, v, out, lse, causal)
    pointers = q, k, v, out, do, lse, delta, dq
    launch(backward_q_kernel, (q.shape[1], "BM"), pointers, (q, k, v, out, do), q, k, causal)
    pointers = q, k, v, do, lse, delta, dk, dv
    launch(backward_kv_kernel, (k.shape[1], "BN"), pointers, (q, k, v, do, dk), q, k, causal)
    return dq, dk, dv


@attention_backward.register_fake
def empty_gradients(do, q, k, v, out, lse, causal):
    return contiguous_like(q), contiguous_like(k), contiguous_like(v)


def save_for_backward(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx, do, _):
    return *torch.ops.ldm.attention_backward(do, *ctx.saved_tensors, ctx.causal), None


attention_forward.register_autograd(differentiate, setup_context=save_for_backward)


@register_flop_formula(torch.ops.ldm.attention)
def forward_flops(q, k, v, causal, **kwargs):
    """Of shapes, as torch.utils.flop_counter calls it; causal or not, as for SDPA."""
    (B, L, H, D), M = q, k[1]
    return sdpa_flop_count((B, H, L, D), (B, H, M, D), (B, H, M, D))


@register_flop_formula(torch.ops.ldm.attention_backward)
def backward_flops(do, q, k, *args, **kwargs):
    (B, L, H, D), M = q, k[1]
    return 5 * 2 * B * H * L * M * D  # five products: S again, dP, dV, dK, dQ
