"""What every kernel file needs of Triton: an import that may fail, where kernels can run, and tuning that is
remembered.

Without a GPU the kernels run under Triton's interpreter (TRITON_INTERPRET=1, set before the first import),
which is how the tests check them anywhere, and are compiled for GPUs that are not there by `make
check-kernels`.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

try:
    import triton
    import triton.language as tl
except ImportError:                     # no Triton for this platform: the kernels stay unused
    triton = tl = None

TUNING_MS = 10, 30      # that the autotuner warms a configuration up and times it, in milliseconds
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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
    """a / b, rounded up. Triton's own takes 10 µs of the host's time, and a step of many launches waits for
    the host."""
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


def tuned(tiles: Sequence[dict], key: Sequence[str],
          fits: Callable[..., bool]) -> Callable[[Callable], Callable]:
    """Run a kernel with whichever of at most seven configurations is fastest on this device.

    tiles: as of `tile_sizes`. key: arguments for which the choice is made anew. fits: of a configuration's
    sizes, the kernel's arguments and CAPABILITY (90 for Hopper), by name, whether it may be tried. Choices
    are kept on disk in Triton's own cache. Under the interpreter the first configuration is taken.
    """
    if triton is None:
        return lambda kernel: kernel
    configs = [triton.Config({name: size for name, size in sizes.items() if name.isupper()},
                             num_warps=sizes["num_warps"], num_stages=sizes["num_stages"],
                             maxnreg=sizes.get("maxnreg")) for sizes in tiles]

    def prune(configs: list, named: dict, **arguments) -> list:
        return fitting(configs, fits, named | arguments, torch.cuda.get_device_capability())

    def decorate(kernel: Callable) -> Callable:
        autotune = triton.autotune(configs[:1] if INTERPRETED else configs, key=list(key), cache_results=True,
                                   do_bench=_bench, prune_configs_by={"early_config_prune": prune})
        autotuned = autotune(kernel)
        autotuned.fits = fits
        return autotuned
    return decorate


def fitting(configs: list, fits: Callable[..., bool], arguments: dict, capability: tuple[int, int]) -> list:
    """Those of a kernel's configurations that fit its arguments and the card; the last one, the smallest,
    where none does."""
    known = arguments | {"CAPABILITY": 10 * capability[0] + capability[1]}
    return [config for config in configs if fits(**{**known, **config.all_kwargs()})] or configs[-1:]


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU, its launches included."""
    return _bench(call, (0.5, 0.5))[0]


def _bench(call: Callable[[], None], quantiles: Sequence[float]) -> list[float]:
    warmup, rep = TUNING_MS
    return triton.testing.do_bench(call, warmup=warmup, rep=rep, quantiles=quantiles)


def can_run(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of `device`: they are launched on the current one
    (`torch.cuda.set_device`)."""
    if triton is None or INTERPRETED:
        return triton is not None
    return device.type == "cuda" and device.index in (None, torch.cuda.current_device())
