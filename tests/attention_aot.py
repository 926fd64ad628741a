"""Compile the attention kernels ahead of time, without a GPU, and print what each needs of one.

    python tests/attention_aot.py --dims=40,64 --archs=90

A line is JSON: registers of a thread, bytes spilled, bytes of shared memory, and how often the PTX has Hopper's matrix
instruction (wgmma), Ampere's (mma) and asynchronous copies of 16 bytes (wide). Not with TRITON_INTERPRET=1.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import attention

KERNELS = (attention.forward_kernel, attention.backward_q_kernel, attention.backward_kv_kernel)


def compile_kernel(kernel, config, dim, dtype, arch, causal):
    """triton.compile's result for aligned rows of any length."""
    kernel = kernel.fn.fn
    constants = dict(D=dim, DP=max(16, triton.next_power_of_2(dim)), CAUSAL=causal, ALIGN=8, PREC="ieee", EVEN=False)
    constants |= config.kwargs
    signature, attributes = dict.fromkeys(constants, "constexpr"), {}
    for i, name in enumerate(kernel.arg_names):
        if name in ("LSE", "DELTA"):
            signature[name] = "*fp32"
        elif name.isupper() and name not in constants and name != "H":
            signature[name] = f"*{dtype}"
        elif name not in constants:
            signature[name] = "fp32" if name == "scale" else "i32"
        if signature[name].startswith("*") or name[0] in "qkvogd" and name[1:] in ("b", "l"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    signature = {name: signature[name] for name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), GPUTarget("cuda", arch, 32), options)


def measure(kernel, config, dim, dtype, arch, causal):
    compiled = compile_kernel(kernel, config, dim, dtype, arch, causal)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.ptx").write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"]
        command += ["kernel.ptx", "-o", "kernel.cubin"]
        report = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    found = dict(kernel=kernel.fn.fn.__name__, dim=dim, dtype=dtype, arch=arch, config=str(config))
    found |= dict(registers=int(re.search(r"Used (\d+) registers", report)[1]), spilled=spilled)
    found |= dict(shared=compiled.metadata.shared, wgmma=ptx.count("wgmma.mma_async"), mma=ptx.count("mma.sync"))
    return found | dict(wide=ptx.count("cp.async.cg"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dims", default="32,40,64,80,128")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--archs", default="80,90")
    parser.add_argument("--first", action="store_true", help="only the config used without tuning")
    parser.add_argument("--causal", action="store_true")
    args = parser.parse_args()
    lists = (text.split(",") for text in (args.archs, args.dims, args.dtypes))
    for arch, dim, dtype, kernel in itertools.product(*lists, KERNELS):
        example = torch.empty(0, dtype=torch.float32 if dtype == "fp32" else torch.half)
        configs = kernel.early_config_prune(kernel.configs, {"Q": example})
        for config in configs[: 1 if args.first else None]:
            print(json.dumps(measure(kernel, config, int(dim), dtype, int(arch), args.causal)), flush=True)
