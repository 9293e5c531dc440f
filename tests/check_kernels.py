"""Compile every kernel in every configuration in use, for GPUs that need not be there, and look at what came out.

    python tests/check_kernels.py            # a line a kernel; exits 1 for a spill or a missing tensor-core instruction

"In use" is what the operations launch for Gemma 3 270M, seen by standing in for the launch.
"""
from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

import lora_kernels
from triton_support import fitting

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_KIB = {80: 163, 90: 227}          # what one program may have
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}


def launches() -> list[tuple[str, Autotuner, dict]]:
    """(what for, kernel, arguments by name) of every launch of a step."""
    seen = []
    usual = Autotuner.run
    Autotuner.run = lambda kernel, *args, grid, warmup, **kwargs: seen.append((label, kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))
    try:
        for rank, dropout in ((16, 0.0), (128, 0.0), (16, 0.1)):
            for name, I, outputs, ends in (("qkv", 640, (1024, 256, 256), ""), ("o", 1024, (640,), ""),  # noqa: E741
                                           ("gate_up", 640, (2048, 2048), "gated"), ("down", 2048, (640,), "gate")):
                label = f"{name} r={rank}" + (" dropout" if dropout else "")
                for run in lora_kernels.operations(256, I, outputs, rank, torch.bfloat16, torch.device("cpu"), ends, dropout).values():
                    run(True)
    finally:
        Autotuner.run = usual
    return seen


def compile_one(job: tuple[str, str, str, dict, dict, int]) -> dict:
    """Compile one configuration; what the assembler says of it."""
    what, module, name, arguments, config, capability = job
    kernel = getattr(sys.modules[module], name).fn
    constants = {key for key, parameter in zip(kernel.arg_names, kernel.params, strict=True) if parameter.is_constexpr}
    values = arguments | {key: value for key, value in config.items() if key in kernel.arg_names}
    signature = {key: "constexpr" if key in constants or values[key] is None else values[key] for key in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names) if str(signature[key]).startswith("*")}
    source = ASTSource(kernel, signature, {key: values[key] for key in kernel.arg_names if signature[key] == "constexpr"}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                          options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    ptx = made.asm["ptx"]
    return {"what": what, "kernel": name, "sm": capability, "config": config, "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "stack": int(re.search(r"STACK:(\d+)", usage)[1]), "local": int(re.search(r"LOCAL:(\d+)", usage)[1]),
            "shared_kib": made.metadata.shared / 1024,
            "tensor_cores": "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""}


def jobs() -> list[tuple]:
    """Every configuration of every different launch, for both generations of cards."""
    made = {}
    for what, kernel, arguments in launches():
        types = {key: TYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) and key in ("scale", "dropout")
                 else "i32" if key in ("seed", "M", "M_BUCKET", "rows_a_split") else value for key, value in arguments.items()}
        for capability in SHARED_KIB:
            for config in fitting(kernel.configs, kernel.fits, arguments, divmod(capability, 10)):
                sizes = {key: value for key, value in config.all_kwargs().items() if value is not None and key != "num_ctas"}
                made.setdefault(str((kernel.base_fn.__name__, types, sizes, capability)),
                                (what, kernel.base_fn.__module__, kernel.base_fn.__name__, types, sizes, capability))
    return list(made.values())


if __name__ == "__main__":
    import time
    t = time.time()
    todo = jobs()
    print(len(todo))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for r in pool.map(compile_one, todo):
            print(f"{r['what']:22s} {r['kernel']:24s} sm_{r['sm']} {' '.join(map(str, r['config'].values())):20s} regs {r['registers']:3d} stack {r['stack']:4d} shared {r['shared_kib']:6.1f} {r['tensor_cores']}"
              , "SPILL" if r["stack"] or r["local"] else "", "TOO BIG" if r["shared_kib"]>SHARED_KIB[r["sm"]] else "", flush=True)
    print(time.time() - t)
