"""What every kernel file needs of Triton: an import that may fail, where kernels can run, and tuning that is remembered.
Where they cannot, on a CPU, cpu_kernels.py is the next best, or `one_pass`: a function that torch.compile may make one loop of, or
`in_cache` a piece at a time.

Without a GPU the kernels run under Triton's interpreter (TRITON_INTERPRET=1, set before the first import), which is how
the tests check them anywhere, and are compiled for GPUs that are not there by `make check-kernels`.
"""
from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

try:
    import triton
    import triton.language as tl
except ImportError:                     # no Triton for this platform: the kernels stay unused
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TUNING_MS = 10, 30      # that the autotuner warms a configuration up and times it, in milliseconds
PIECE = 1 << 18         # numbers that a CPU passes over at a time: 1 MB in fp32


def jit(function: Callable) -> Callable:
    """`triton.jit`. Numbers of tokens change from call to call, and no value of theirs is compiled in."""
    changing = ["M", "T", "M_BUCKET", "rows_a_split", "splits_a", "splits_b", "rows_a_program", "offset"]
    return triton.jit(do_not_specialize=changing)(function) if triton else function


@jit
def load_tile(pointers, inside, EVEN: tl.constexpr):
    """A tile, zeros outside; without a mask where every tile is full."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0.0)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes 10 µs of the host's time, and a step of many launches waits for the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def precision(dtype: torch.dtype) -> str:
    """Of a kernel's products: fp32 in full, without tensor cores; 16-bit operands take no notice."""
    return "ieee" if dtype == torch.float32 else "tf32"


def tile_sizes(names: tuple[str, ...], *sizes: tuple[int, ...]) -> list[dict]:
    """What `tuned` chooses from: sizes of these names, num_warps, num_stages, and perhaps maxnreg.

    maxnreg: the most registers that a thread may have.
    """
    names = *names, "num_warps", "num_stages", "maxnreg"
    return [dict(zip(names[:len(size)], size, strict=True)) for size in sizes]


def tuned(tiles: Sequence[dict], key: Sequence[str], fits: Callable[..., bool]) -> Callable[[Callable], Callable]:
    """Run a kernel with whichever of at most seven configurations is fastest on this device.

    tiles: as of `tile_sizes`. key: arguments for which the choice is made anew. fits: of a configuration's
    sizes, the kernel's arguments and CAPABILITY (90 for Hopper), by name, whether it may be tried. Choices
    are kept on disk in Triton's own cache. Under the interpreter the first configuration is taken.
    """
    if triton is None:
        return lambda kernel: kernel
    configs = [triton.Config({name: size for name, size in sizes.items() if name.isupper()}, num_warps=sizes["num_warps"],
                             num_stages=sizes["num_stages"], maxnreg=sizes.get("maxnreg")) for sizes in tiles]

    def prune(configs: list, named: dict, **arguments) -> list:
        return fitting(configs, fits, named | arguments, torch.cuda.get_device_capability())

    def decorate(kernel: Callable) -> Callable:
        made = triton.autotune(configs[:1] if INTERPRETED else configs, key=list(key), cache_results=True, do_bench=_bench,
                               prune_configs_by={"early_config_prune": prune})(kernel)
        made.fits = fits
        return made
    return decorate


def fitting(configs: list, fits: Callable[..., bool], arguments: dict, capability: tuple[int, int]) -> list:
    """Those of a kernel's configurations that fit its arguments and the card; the last one, the smallest, where none does."""
    known = arguments | {"CAPABILITY": 10 * capability[0] + capability[1]}
    return [config for config in configs if fits(**{**known, **config.all_kwargs()})] or configs[-1:]


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU, its launches included."""
    return _bench(call, (0.5, 0.5))[0]


def _bench(call: Callable[[], None], quantiles: Sequence[float]) -> list[float]:
    warm_up, timed = TUNING_MS
    return triton.testing.do_bench(call, warmup=warm_up, rep=timed, quantiles=quantiles)


def can_run(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of `device`: they are launched on the current one (`torch.cuda.set_device`)."""
    return triton is not None and (INTERPRETED or (device.type == "cuda" and device.index in (None, torch.cuda.current_device())))


_compiling = False


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs on a CPU: $CXX, g++ or clang++."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def compile_passes() -> None:
    """From now on torch.compile makes one loop of each `one_pass`: on a CPU a few per cent of a step, for a C++ compiler's work."""
    global _compiling
    _compiling = True


def one_pass(function: Callable) -> Callable:
    """A chain of element-wise operations and sums by row that would rather be one loop, for where no kernel runs."""
    @functools.cache
    def compiled() -> Callable:
        return torch.compile(function, dynamic=True)

    def detached(operand):
        """It without its history: whether an operand requires gradients would make another variant of the same loop, of which
        torch.compile makes eight and no more."""
        if isinstance(operand, list):
            return [detached(one) for one in operand]
        return operand.detach() if isinstance(operand, torch.Tensor) else operand

    @functools.wraps(function)
    def run(*operands):
        return compiled()(*map(detached, operands)) if _compiling else function(*operands)
    return run


def in_cache(x: torch.Tensor) -> Iterator[slice]:
    """x's rows (its first dimension), a few at a time on a CPU, so that what passes over them writes stays in its cache.

    All at once where they need not: on a GPU, or where a pass is compiled.
    """
    rows = len(x) if _compiling or x.device.type != "cpu" else max(1, PIECE // max(1, x[:1].numel()))
    return (slice(first, first + rows) for first in range(0, len(x), max(1, rows)))


def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on the device; to a GPU it goes out of pinned memory, so that the host does not wait for what is queued there."""
    return (x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x).to(device, non_blocking=True)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products, or fast ones that serve for them.

    A GPU before Ampere has none. A CPU needs AVX-512 or ARM's bf16; on another, PyTorch multiplies bf16 number by number, tens to
    hundreds of times slower than fp32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_blocks(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """x (M, I) → x Wᵀ (M, O), W (O, I) laid out once in oneDNN's own blocks, a second copy: the same numbers, sooner.

    None where there is no such product: but for bf16 on a CPU that can multiply it.
    """
    ops = torch.ops.mkldnn
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not hasattr(ops, "_reorder_linear_weight") \
            or not multiplies_bf16(weight.device):
        return None
    packed = ops._reorder_linear_weight(weight.contiguous(), 8)
    return lambda x: ops._linear_pointwise(x, packed, None, "none", [], "")


def cache_folder() -> Path:
    return Path(os.environ.get("NANO_FUNCTIONGEMMA_CACHE") or Path.home() / ".cache/nano-functiongemma")


def remembered(name: str, device: torch.device, key: Sequence, make: Callable[[], dict]) -> dict:
    """A JSON object that depends on the device, the versions and `key`: from the disk, or else made and kept there.

    In `cache_folder`.
    """
    what = json.dumps([torch.cuda.get_device_name(device), torch.__version__, triton.__version__, *key])
    folder = cache_folder()
    file = folder / f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"
    try:
        kept = json.loads(file.read_text())
        if kept["for"] == what:
            return kept["value"]
    except (OSError, ValueError, KeyError, TypeError):
        pass                            # not there, or torn: made anew
    value = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"for": what, "value": value}, indent=1))
        temporary.rename(file)
    except OSError:
        pass                            # a folder that cannot be written costs time at the next start, no more
    return value
