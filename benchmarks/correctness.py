"""Every kernel at the model's own shapes against float64: is it as accurate as PyTorch in the same dtype?

    python benchmarks/correctness.py --save                                   # on a CUDA device, in bf16
    TRITON_INTERPRET=1 python benchmarks/correctness.py --device cpu --tiny   # anywhere, in fp16

A case is an operation by our kernels and its definition by PyTorch. Outputs and gradients of both are
compared with the definition in float64: error = ‖got − exact‖ / ‖exact‖. The ratio of a case is the largest
of error(kernel) / error(definition); it may be 2 at most. Inputs are random and new in every call, and
memory that nobody wrote is NaN.

An error that ends the GPU's context, as an illegal address does, would fail every case after it: the
program then starts itself again with the cases that are left.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from clock import conditions  # noqa: E402
from kernel_cases import TINY, Case, Draw, Sizes, cases  # noqa: E402
from tables import add_result_flags, keep_result, result_file  # noqa: E402

MOST = 2.0              # of error(kernel) / error(definition)


def results(function: Callable, tensors: dict[str, Tensor], trained: Sequence[str],
            douts: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients by name.  douts: gradients of the outputs, drawn into an empty list."""
    leaves = {name: x.detach().clone().requires_grad_(name in trained) for name, x in tensors.items()}
    outs = function(*leaves.values())
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    if not douts:
        douts += [torch.randn_like(out) if out.dim() else torch.ones_like(out) for out in outs]
    given = [dout.to(out.dtype) for dout, out in zip(douts, outs, strict=True)]
    gradients = torch.autograd.grad(outs, [leaves[name] for name in trained], given)

    named = {f"output {i}": out.detach() for i, out in enumerate(outs)}
    return named | {f"d {name}": gradient for name, gradient in zip(trained, gradients, strict=True)}


def compare(case: Case) -> dict:
    """The ratio and errors {name: [kernel's, definition's]}; "wrong" where a ratio is above `MOST` or NaN."""
    douts: list[Tensor] = []
    torch.use_deterministic_algorithms(True, warn_only=True)            # memory that nobody wrote is NaN
    try:
        got = results(case.kernel, case.tensors, case.trained, douts)
    finally:
        torch.use_deterministic_algorithms(False)
    plain = results(case.definition, case.tensors, case.trained, douts)
    doubled = {name: x.double() for name, x in case.tensors.items()}
    exact = results(case.definition_in_64 or case.definition, doubled, case.trained, douts)

    errors, ratios, bad = {}, {}, []
    for name, right in exact.items():
        mine, theirs = (((x[name].double() - right).norm() / right.norm()).item() for x in (got, plain))
        # A definition may make no error at all: allowed is one rounding, in fp32 another order of a long sum.
        allowed = 1e-5 if got[name].dtype == torch.float32 else torch.finfo(got[name].dtype).eps / 4
        errors[name], ratios[name] = [mine, theirs], mine / max(theirs, allowed)
        if not ratios[name] <= MOST or not got[name].norm() > 0:
            bad.append(f"{name} {mine:.1e} for {theirs:.1e}")
    largest = max(ratios.values(), key=lambda ratio: (ratio != ratio, ratio))           # NaN is the largest
    return {"ratio": largest, "errors": errors} | ({"wrong": ", ".join(bad)} if bad else {})


def check(name: str, make: Callable[[Draw, Sizes], Case], draw: Draw, sizes: Sizes) -> dict:
    """What `compare` says of a case; {"failed": …} where it ends in an error."""
    began = time.perf_counter()
    try:
        made = compare(make(draw, sizes))
        verdict = f"WRONG: {made['wrong']}" if "wrong" in made else f"ok, ratio {made['ratio']:.2f}"
    except Exception as error:                                  # what fails is recorded, and the others go on
        made = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        verdict = f"FAILED: {made['failed']}"
    made["seconds"] = time.perf_counter() - began
    print(f"{name:32} {made['seconds']:5.1f} s  {verdict}", flush=True)
    return made


def context_is_lost(device: torch.device) -> bool:
    """Whether the GPU does nothing any more in this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def main(args: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
    device = torch.device(args.device)
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    sizes = TINY if args.tiny else Sizes()
    file = result_file("correctness", device, args)
    done = json.loads(file.read_text(encoding="utf-8"))["cases"] if args.go_on else {}
    result = conditions(device) | {"dtype": str(dtype).removeprefix("torch."), "tiny": args.tiny,
                                   "seed": torch.seed(), "cases": done}

    for name, make in cases():
        if name in done or not any(word in name for word in args.only.split("|")):
            continue
        result["cases"][name] = check(name, make, Draw(device, dtype), sizes)
        keep_result(result, "correctness", device, args)
        if context_is_lost(device):
            if file is None:
                break
            os.execv(sys.executable, [sys.executable, *sys.argv, *([] if args.go_on else ["--go-on"])])
        if device.type == "cuda":
            torch.cuda.empty_cache()

    bad = [name for name, made in result["cases"].items() if "failed" in made or "wrong" in made]
    print(f"{len(result['cases'])} cases, {len(bad)} not right{': ' if bad else ''}{'; '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--only", default="", help="cases whose names have one of these words, split by |")
    parser.add_argument("--go-on", action="store_true", help=argparse.SUPPRESS)     # with what is left
    add_result_flags(parser)
    sys.exit(main(parser.parse_args()))
