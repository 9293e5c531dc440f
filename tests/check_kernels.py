"""Compile every kernel in every configuration in use, for cards that need not be there, and look at what came out.

    python tests/check_kernels.py            # a line a kernel and card; exits 1 where something is wrong
    python tests/check_kernels.py --all      # a line a configuration
    python tests/check_kernels.py lora       # the kernels of lora_kernels.py alone

Wrong is: a register spilled to memory, more shared memory than a program may have, 16-bit products without tensor cores,
and a tile that a thread reads in many pieces of less than 4 bytes (whatever hides from the compiler that its addresses
follow each other costs the asynchronous copies, and with them most of the speed). "In use" is what the operations launch for Gemma 3 270M,
seen by standing in for the launch.

Tiles are chosen for the triton that requirements.txt pins: with it no configuration may spill. Another
version spends registers otherwise; a spill is then wrong only where every configuration of a launch has one, for the
autotuner takes the fastest, and KNOWN_SPILLS has not as many bytes.
"""
from __future__ import annotations

import hashlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

if __name__ == "__main__":              # a test that loads this file goes on with the interpreter
    os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import lora_kernels
from ops import attention, attention_tables, triton_utils
from ops import cross_entropy as cross_entropy_module
from ops import geglu as geglu_module
from ops import rms_norm as rms_norm_module
from ops.disk_cache import cache_folder
from ops.triton_utils import fitting, triton

SHARED_KIB = {80: 163, 90: 227}     # what one program may have on an A100 and an H100; an SM has 1 KiB more
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
SCALARS = {"scale": "fp32", "threshold": "i32", "M": "i32", "M_BUCKET": "i32", "rows_a_split": "i32", "eps": "fp32",
           "splits_a": "i32", "splits_b": "i32",
           "stride_t": "i32", "gate_row": "i32", "up_row": "i32", "rows_a_program": "i32", "factor": "fp32", "offset": "i32", "T": "i32"}


# Bytes that a kernel spills by a triton that is not pinned, with no other configuration to choose.
KNOWN_SPILLS = {
    ("3.6.0", "attention_forward", "sm_80"): 32,
    ("3.6.0", "attention_forward", "sm_90"): 8,             # 8 query heads on 4 kv heads: Gemma 3 4B, not 270M
    ("3.6.0", "attention_key_gradient", "sm_80"): 8,
    ("3.6.0", "cross_entropy_weight_gradient", "sm_80"): 8,
}


def launches() -> list[tuple[str, object, dict]]:
    """(what for, kernel, arguments by name) of every launch of a step."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction
    seen, usual, interpreted = [], (Autotuner.run, JITFunction.run), triton_utils.INTERPRETED

    def note(kernel: Autotuner | JITFunction, *args, grid, warmup, **kwargs) -> None:
        seen.append((what, kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))

    Autotuner.run = JITFunction.run = note
    triton_utils.INTERPRETED = True             # or the operations would refuse a CPU's tensors
    try:
        for dtype in (torch.bfloat16, torch.float32):
            tables = torch.empty(256, 1, 256, dtype=dtype), torch.empty(256, 1, 256, dtype=dtype)
            for name, shape, residual, rope, returned, weight in (
                    ("norm", (256, 640), False, None, False, dtype), ("norm + residual", (256, 640), True, None, False, dtype),
                    ("norm, x", (256, 640), False, None, True, dtype), ("q", (256, 4, 256), False, tables, False, dtype),
                    ("norm, dw", (256, 640), False, None, False, None), ("norm, x, dw", (256, 640), False, None, True, None)):
                what = f"{name} {str(dtype).removeprefix('torch.')}"
                x = torch.empty(shape, dtype=dtype, requires_grad=True)
                w = torch.empty(shape[-1], dtype=weight or torch.float32, requires_grad=weight is None)
                made = rms_norm_module.rms_norm(x, w, 1e-6, torch.empty_like(x) if residual else None, rope, returned, "triton")
                sum(part.sum() for part in (made if returned else [made])).backward()
        for dtype in (torch.bfloat16, torch.float32):
            what = f"geglu {str(dtype).removeprefix('torch.')}"
            gate, up = torch.empty(256, 4096, dtype=dtype, requires_grad=True).chunk(2, dim=1)
            geglu_module.geglu(gate, up, "triton").sum().backward()
        for (window, N, K), card in itertools.product(((512, 4, 1), (None, 4, 1), (512, 4, 4), (512, 8, 4)), SHARED_KIB):
            what = f"{'local' if window else 'global'} {N}/{K} bfloat16 sm_{card}"          # 8/4: Gemma 3 4B
            q, k, v = (torch.empty(256, heads, 256, dtype=torch.bfloat16, requires_grad=True) for heads in (N, K, K))
            rows, keys = (attention_tables.ROWS, attention_tables.KEYS) if card >= 90 else (
                attention_tables.OLDER_ROWS, attention_tables.OLDER_KEYS)
            table = attention_tables.tables([100, 156], window, torch.device("cpu"), None, 0, rows * K // N, keys)
            attention.attention(q, k, v, 0.0625, table, "triton").sum().backward()
        for dtype, rank, dropout in ((torch.bfloat16, 16, 0.0), (torch.bfloat16, 128, 0.0), (torch.bfloat16, 16, 0.1), (torch.float32, 16, 0.0)):
            for name, I, outputs, ends in (("qkv", 640, (1024, 256, 256), ""), ("o", 1024, (640,), ""),
                                           ("gate_up", 640, (2048, 2048), "gated"), ("down", 2048, (640,), "gate")):
                what = f"{name} {str(dtype).removeprefix('torch.')} R={rank}{' dropout' if dropout else ''}"
                for run in lora_kernels.operations(256, I, outputs, rank, dtype, torch.device("cpu"), ends, dropout).values():
                    run(True)
        for dtype, trained in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)):
            what = f"head{' trained' if trained else ''} {str(dtype).removeprefix('torch.')}"          # a multiple of the spans, as 262,144 is
            hidden, weight = torch.empty(256, 640, dtype=dtype, requires_grad=True), torch.empty(4096, 640, dtype=dtype, requires_grad=trained)
            cross_entropy_module.linear_cross_entropy(hidden, weight, torch.zeros(256, dtype=torch.int64), backend="triton")
    finally:
        Autotuner.run, JITFunction.run = usual
        triton_utils.INTERPRETED = interpreted
    return seen


def jobs() -> list[tuple]:
    """Every configuration of every different launch, for both generations of cards."""
    made = {}
    for what, kernel, arguments in launches():
        types = {key: TYPES[value.dtype] if isinstance(value, torch.Tensor) else SCALARS.get(key, value) for key, value in arguments.items()}
        types |= {key: "i32:16" for key in ("stride_t", "gate_row", "up_row") if arguments.get(key, 1) % 16 == 0}          # as a launch finds out
        for capability in SHARED_KIB:
            if "sm_" in what and f"sm_{capability}" not in what:
                continue
            tuned = hasattr(kernel, "configs")
            for config in fitting(kernel.configs, kernel.fits, arguments, divmod(capability, 10)) if tuned else [None]:
                sizes = {key: value for key, value in config.all_kwargs().items() if value is not None and key != "num_ctas"} if tuned else {}
                function = kernel.base_fn if tuned else kernel.fn
                job = function.__module__, function.__name__, types, sizes, capability
                made.setdefault(str(job), (what, *job))
    return list(made.values())


def compile_one(job: tuple[str, str, str, dict, dict, int]) -> dict:
    """Compile one configuration; what the compiler and the assembler say of it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    what, module, name, arguments, config, capability = job
    kernel = getattr(sys.modules[module], name)
    kernel = kernel.fn if config else kernel
    constants = {key for key, parameter in zip(kernel.arg_names, kernel.params, strict=True) if parameter.is_constexpr}
    values = arguments | {key: value for key, value in config.items() if key in kernel.arg_names}
    signature = {key: "constexpr" if key in constants or values[key] is None else values[key] for key in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names) if str(signature[key]).startswith("*")
               or signature[key] == "i32:16"}
    signature = {key: "i32" if kind == "i32:16" else kind for key, kind in signature.items()}
    source = ASTSource(kernel, signature, {key: values[key] for key in kernel.arg_names if signature[key] == "constexpr"}, aligned)
    options = {key: config[key] for key in ("num_warps", "num_stages", "maxnreg") if key in config}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, warps = int(re.search(r"REG:(\d+)", usage)[1]), made.metadata.num_warps
    ptx = made.asm["ptx"]
    reads = [int(width) // 8 * int(vector or 1) for vector, width in re.findall(r"ld\.global[\w:.]*?(?:\.v(\d))?\.[bufs](\d+)", ptx)]
    reads += [int(width, 0) for width in re.findall(r"cp\.async\.c[ag]\.shared\.global[\w:.]* \[[^]]*\], \[[^]]*\], (\w+)", ptx)]
    module = module.removeprefix("ops.").removesuffix("_kernels")
    return {"launch": (name, str(arguments), capability),
            "what": what, "kernel": f"{module}{name.removesuffix('_kernel')}",
            "card": f"sm_{capability}", "config": " ".join(map(str, config.values())),
            "registers": registers,
            "programs": programs(registers, warps, made.metadata.shared / 1024, capability),
            "spilled": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
            "shared_kib": made.metadata.shared / 1024, "too_large": made.metadata.shared / 1024 > SHARED_KIB[capability],
            "tensor_cores": "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "", "narrowest_read": min(reads),
            "narrow_reads": sum(size < 4 for size in reads)}


def programs(registers: int, warps: int, shared_kib: float, capability: int) -> int:
    """How many programs an SM runs at a time: of 65,536 registers, 256 at a time for a warp, and 64 warps."""
    by_registers = 65_536 // (-(-32 * registers // 256) * 256 * warps)
    return min(by_registers, 64 // warps, 32, int((SHARED_KIB[capability] + 1) / (shared_kib + 1)))


def wrong(made: dict) -> str:
    return ", ".join(name for name, bad in (
        (f"{made['spilled']} bytes spilled", made["spilled"] and not made.get("excused")),
        ("too much shared memory", made["too_large"]),
        ("no tensor cores", not made["tensor_cores"] and "float32" not in made["what"]
         and not made["kernel"].startswith(("rms_norm", "geglu", "lora_add_splits"))),
        (f"{made['narrow_reads']} reads of {made['narrowest_read']} bytes", made["narrow_reads"] > 4)) if bad)


def pinned_triton() -> str:
    requirements = Path(__file__).resolve().parent.parent / "requirements.txt"
    return re.search(r"^triton==([\w.]+)", requirements.read_text(encoding="utf-8"), re.MULTILINE)[1]


def excuse_spills(compiled: list[dict]) -> list[dict]:
    """Mark and return those that spill where another configuration of the launch does not, or as is known."""
    without = {made["launch"] for made in compiled if not made["spilled"]}
    excused = []
    for made in compiled:
        known = KNOWN_SPILLS.get((triton.__version__, made["kernel"], made["card"]), 0)
        if made["spilled"] and (made["launch"] in without or made["spilled"] <= known):
            made["excused"] = True
            excused.append(made)
    return excused


def main(everything: bool, files: list[str]) -> int:
    if triton is None:
        print("no Triton for this platform: the kernels were not compiled")
        return 0
    passed = stamp()
    if passed.exists() and not everything and not files:
        print(f"triton {triton.__version__}: {passed.read_text(encoding='utf-8')}; the kernels are unchanged since then")
        return 0
    line = ("{kernel:24} {what:26} {card:6} {configs:>24} {registers:>9} {spilled:>8} {shared:>11} "
            "{programs:>11} {cores:>12} {reads:>14}  {wrong}")
    print(line.format(kernel="kernel", what="for", card="card", configs="tiles warps stages" if everything else "configurations", registers="registers",
                      spilled="spilled", shared="shared KiB", programs="programs/SM", cores="tensor cores",
                      reads="reads of bytes", wrong=""))
    groups: dict[tuple, list[dict]] = {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        wanted = [job for job in jobs() if not files or job[1].removeprefix("ops.").removesuffix("_kernels") in files]
        compiled = list(pool.map(compile_one, wanted))
        excused = excuse_spills(compiled) if triton.__version__ != pinned_triton() else []
        for made in compiled:
            groups.setdefault((made["kernel"], made["what"], made["card"], made["config"] if everything or wrong(made) else ""), []).append(made)
    for (kernel, what, card, config), made in sorted(groups.items()):
        fewest, most = min(m["programs"] for m in made), max(m["programs"] for m in made)
        print(line.format(kernel=kernel, what=what, card=card, configs=config or len(made), registers=max(m["registers"] for m in made),
                          spilled=max(m["spilled"] for m in made), shared=f"{max(m['shared_kib'] for m in made):.0f}",
                          programs=fewest if fewest == most else f"{fewest} to {most}",
                          cores=" ".join(sorted({m["tensor_cores"] or "-" for m in made})),
                          reads=min(m["narrowest_read"] for m in made), wrong=wrong(made[0])))
    failed = [made for group in groups.values() for made in group if wrong(made)]
    print(f"triton {triton.__version__}: {len(compiled)} configurations compiled, {len(failed)} wrong"
          + (f"; {len(excused)} spill up to {max(made['spilled'] for made in excused)} bytes, "
             f"which is excused: tiles are chosen for triton {pinned_triton()}" if excused else ""))
    if not failed and not files:
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.write_text(f"{len(compiled)} configurations compiled, 0 wrong", encoding="utf-8")
    return 1 if failed else 0


def stamp() -> Path:
    """The file that exists once these kernels have passed, with this version of Triton."""
    root = Path(__file__).resolve().parent.parent
    sources = [root / "lora_kernels.py", *sorted((root / "ops").glob("*.py")), Path(__file__)]
    content = hashlib.sha256(triton.__version__.encode())
    for source in sources:
        content.update(source.read_bytes())
    return cache_folder() / "compile-gate" / content.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main("--all" in sys.argv, [argument for argument in sys.argv[1:] if argument != "--all"]))
