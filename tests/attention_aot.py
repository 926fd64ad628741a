"""Compiles the attention kernels for GPUs that need not be there, and prints what each takes of the chip.

    python tests/attention_aot.py                                   # every kernel, head dim and tiling: most of an hour
    python tests/attention_aot.py --dims=64 --dtypes=bf16 --archs=90
    python tests/attention_aot.py --dims=64 --archs=90 --first --ptx=out/ptx   # writes the PTX, to read
    python tests/attention_aot.py --dims=64 --archs=90 --norm                  # with QK-norm in them

A line is JSON: registers a thread, bytes spilled, bytes of shared memory, and how many wgmma (Hopper's) or mma
(Ampere's) instructions are in the PTX. Not under TRITON_INTERPRET=1.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import attention

DIMS = (24, 32, 40, 48, 64, 80, 96, 128, 160)
TYPES = {"bf16": ("bf16", 2, "ieee"), "fp16": ("fp16", 2, "ieee"), "fp32": ("fp32", 4, "ieee")}
TYPES["tf32"] = ("fp32", 4, "tf32")
NORM = {"RQ", "RK", "W", "DW"}  # pointers that only QK-norm needs
FLOAT32 = {"LSE", "DELTA"} | NORM  # pointers to float32 whatever the inputs are


def compile_kernel(name, dim, dtype, arch, tiling, causal=False, norm=False):
    """triton.compile's result, for tensors as a U-Net has them: rows and data aligned, any lengths."""
    kernel = attention.KERNELS[name]
    element, _, precision = TYPES[dtype]
    D0, D1 = attention.column_tiles(dim)
    constants = dict(D=dim, D0=D0, D1=D1, CAUSAL=causal, ALIGN=8, PREC=precision, EPS=1e-6) | tiling
    if not norm:
        constants |= dict.fromkeys(NORM | {"EPS"})
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    floats = FLOAT32 | ({"DK", "DV"} if name == "_backward_short" else set())
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        pointer = argument.isupper() and argument not in ("H", "ROWS")
        signature[argument] = "*fp32" if argument in floats else f"*{element}" if pointer else "i32"
        if argument == "scale":
            signature[argument] = "fp32"
        if pointer or argument in ("qb", "ql", "kb", "kl", "vb", "vl", "gb", "gl"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def measure(name, dim, dtype, arch, tiling, causal=False, norm=False, ptx_folder=None):
    compiled = compile_kernel(name, dim, dtype, arch, tiling, causal, norm)
    ptx = compiled.asm["ptx"]
    about = dict(kernel=name, d=dim, dtype=dtype, sm=arch, causal=causal, norm=norm) | tiling
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/kernel.ptx", "w") as f:
            f.write(ptx)
        tools = triton.knobs.nvidia
        ptxas = (tools.ptxas_blackwell if arch >= 100 else tools.ptxas).path
        command = [ptxas, "-v", f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}", "kernel.ptx", "-o", "kernel.cubin"]
        told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    if ptx_folder:
        os.makedirs(ptx_folder, exist_ok=True)
        with open(f"{ptx_folder}/{name}_{dim}_{dtype}_sm{arch}.ptx", "w") as f:
            f.write(ptx)
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", told))
    about |= dict(registers=int(re.search(r"Used (\d+) registers", told)[1]), spilled=spilled)
    about["wide"] = ptx.count("cp.async.cg")  # 16 bytes at a time, into shared memory, while something else is computed
    about |= dict(shared=compiled.metadata.shared, wgmma=ptx.count("wgmma.mma_async"), mma=ptx.count("mma.sync"))
    return about


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kernels", default=",".join(attention.KERNELS))
    parser.add_argument("--dims", default=",".join(map(str, DIMS)))
    parser.add_argument("--dtypes", default="bf16,fp32,tf32")
    parser.add_argument("--archs", default="80,90")
    parser.add_argument("--first", action="store_true", help="only the tiling taken where nothing is measured")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--norm", action="store_true", help="with QK-norm")
    parser.add_argument("--ptx", help="folder to write the PTX into; of several tilings the last stays")
    parser.add_argument("--tilings", help="JSON list of keyword arguments to try instead of those that ship")
    args = parser.parse_args()
    lists = args.archs, args.kernels, args.dims, args.dtypes
    for arch, name, dim, dtype in itertools.product(*(text.split(",") for text in lists)):
        if int(dim) > max(attention.TILINGS[name, TYPES[dtype][1]], default=0):
            continue  # a kernel of one tile, which is not used there
        if args.norm and name == "_backward_short":
            continue  # without QK-norm only
        shipped = attention.tilings(name, int(dim), TYPES[dtype][1], int(arch), norm=args.norm)
        tried = json.loads(args.tilings) if args.tilings else shipped[: 1 if args.first else None]
        for tiling in tried:
            measured = measure(name, int(dim), dtype, int(arch), tiling, args.causal, args.norm, args.ptx)
            print(json.dumps(measured), flush=True)
