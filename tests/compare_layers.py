"""Run ours and transformers side by side and say for each layer's every part OK or DIFF.

    python tests/compare_layers.py MODEL [TEXT]
"""
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import RMSNorm
from storage.pretrained import load_model
from tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and then it calls a function with 3 arguments. " * 40


def record(model: torch.nn.Module, wanted) -> dict[str, torch.Tensor]:
    """Hook every module whose name `wanted` accepts; its output lands in the returned dict."""
    outputs: dict[str, torch.Tensor] = {}

    def note(module, given, more, out, name) -> None:
        if isinstance(module, RMSNorm) and more:             # our norm adds the residual or rotates: note it without
            module(*given)
        else:
            outputs[name] = (out[0] if isinstance(out, tuple) else out).detach().float()

    for name, module in model.named_modules():
        if wanted(name):
            module.register_forward_hook(partial(note, name=name), with_kwargs=True)
    return outputs


def main() -> int:
    from transformers import AutoModelForCausalLM
    folder, text = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else TEXT
    ids = torch.tensor([[2, *Tokenizer.load(folder).encode(text)]])
    ours, theirs = load_model(folder, torch.float32), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = {name for name, _ in ours.named_modules()} & {name for name, _ in theirs.named_modules()}
    wanted = lambda name: name in names and (name.startswith("model.layers.") or name == "model.norm")  # noqa: E731
    mine, other = record(ours, wanted), record(theirs, wanted)
    with torch.no_grad():
        logits, their_logits = ours.logits(ids), theirs(ids).logits
    bad = 0
    print(f"{ids.shape[1]} tokens, fp32\n{'':4} {'part':48} {'largest difference':>18} {'largest value':>14}")
    for name, got in (*mine.items(), ("logits", logits)):
        want = their_logits if name == "logits" else other[name]
        if name.endswith(("q_norm", "k_norm")):          # theirs has heads before tokens
            want = want.transpose(1, 2)
        difference, largest = (got.flatten() - want.flatten()).abs().max().item(), want.abs().max().item()
        ok = difference <= 2e-3 + 1e-4 * largest
        bad += not ok
        print(f"{'OK' if ok else 'DIFF':4} {name:48} {difference:18.2e} {largest:14.2f}")
    print(f"{bad} of {len(mine) + 1} parts differ")
    return bad > 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main())
