"""Decoding beside transformers, in turn in one run: one prompt at a time, and sixteen at once.

    python benchmarks/decode.py --model MODEL --adapter RUN --data rows.jsonl --save
    python benchmarks/decode.py --save              # random weights of full size and the demo's rows

Both sides answer the same real queries greedily with the same merged weights in bf16. Reading the prompt is
timed apart (an answer of one token), so that "decoding" counts the tokens after it. On a GPU each call is
made once before it is timed, as the first of its size records a CUDA graph. Random weights answer nonsense as
fast, and in bf16 the two sides soon write different nonsense.
"""
from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from tables import add_result_flags, keep_result  # noqa: E402

from dataset.rows import read_sources  # noqa: E402
from dataset.sampler import query_hash  # noqa: E402
from examples import demo  # noqa: E402
from inference.decoding import STOP_IDS, RecordedSteps, call_phrases, generate  # noqa: E402
from storage.adapters import load_tuned  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from training.host import device_name  # noqa: E402


def timed(call):
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def main(args: argparse.Namespace) -> None:
    if args.model or args.adapter:
        return measure(args)
    with tempfile.TemporaryDirectory() as folder:
        demo.write_demo(Path(folder), rows=100, config=demo.SMALL if args.tiny else demo.FULL_SIZE)
        args.model, args.data = f"{folder}/model", f"{folder}/rows.jsonl"
        measure(args, "random")


@torch.no_grad()
def measure(args: argparse.Namespace, weights: str = "trained") -> None:
    import transformers
    transformers.utils.logging.set_verbosity_error()
    model, folder = load_tuned(args.model, args.adapter, "bf16", args.device)
    tokenizer = Tokenizer.load(folder)
    rows = sorted(read_sources([args.data]), key=lambda row: query_hash(row.query))[:16]
    prompts = [tokenizer.encode_segments(row.prompt())[0] for row in rows]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(args.device)
    missing, unknown = theirs.load_state_dict(model.state_dict(), strict=False)
    assert missing == ["lm_head.weight"] and not unknown                            # tied to the embedding
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = list(STOP_IDS), 0
    phrases = call_phrases(tokenizer)
    recorded = RecordedSteps() if args.device == "cuda" else None

    def peer(prompt: list[int], tokens: int) -> list[int]:
        ids = torch.tensor([prompt], device=args.device)
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                               do_sample=False)[0, len(prompt):].tolist()

    def ours(which: list[list[int]], tokens: int, **options) -> list[list[int]]:
        return generate(model, which, tokens, phrases=phrases, recorded=recorded, **options)

    def warm_up(*calls) -> None:
        for call in calls if recorded else ():
            call()

    peer(prompts[0], 2), ours(prompts[:1], 2)                                     # warm up
    rates = {"transformers": [], "ours": [], "ours, no look-ahead": []}
    whole = {side: [] for side in rates}
    equal = 0
    for prompt in prompts[:args.prompts]:
        sides = {"transformers": partial(peer, prompt), "ours": lambda n, p=prompt: ours([p], n)[0],
                 "ours, no look-ahead": lambda n, p=prompt: ours([p], n, look_ahead=0)[0]}
        answers = {}
        for side, answer in sides.items():
            warm_up(partial(answer, 1), partial(answer, args.tokens))
            _, reading = timed(partial(answer, 1))
            answers[side], taken = timed(partial(answer, args.tokens))
            if len(answers[side]) > 1 and taken > reading:
                rates[side].append((len(answers[side]) - 1) / (taken - reading))
                whole[side].append(len(answers[side]) / taken)
        equal += answers["transformers"] == answers["ours"]
    singles, batches = [], []
    short = [prompt[-40:] for prompt in prompts]  # little to read, much to write: what batching is for
    warm_up(lambda: ours(short[:1], args.tokens), lambda: ours(short, args.tokens))
    for _ in range(args.repeats):
        one, seconds_one = timed(lambda: [ours([prompt], args.tokens)[0] for prompt in short])
        many, seconds_many = timed(lambda: ours(short, args.tokens))
        singles.append(sum(map(len, one)) / seconds_one)
        batches.append(sum(map(len, many)) / seconds_many)
    result = {
        "weights": weights, "prompts": args.prompts,
        "prompt_tokens": round(statistics.mean(map(len, prompts[:args.prompts]))),
        "max_new_tokens": args.tokens,
        "decoding_tokens_per_second": {side: statistics.median(of) for side, of in rates.items()},
        "with_reading_tokens_per_second": {side: statistics.median(of) for side, of in whole.items()},
        "times_transformers": statistics.median(rates["ours"]) / statistics.median(rates["transformers"]),
        "same_answers": equal, "single_tokens_per_second": singles, "batch_of_16_tokens_per_second": batches,
        "times_single": statistics.median(b / a for a, b in zip(singles, batches, strict=True)),
        "data": Path(args.data).name, "device": device_name(torch.device(args.device)),
        "machine": platform.machine(), "versions": {"torch": torch.__version__,
                                                    "transformers": transformers.__version__}}
    print(json.dumps(result, indent=2))
    keep_result(result, "decode", torch.device(args.device), args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--adapter", default=None)
    parser.add_argument("--data", help="rows whose queries are answered; needed with --model or --adapter")
    parser.add_argument("--tiny", action="store_true", help="a small model, where none is named")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=6, help="real prompts that each side answers, in turn")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--repeats", type=int, default=2, help="of sixteen prompts one by one and at once")
    add_result_flags(parser)
    args = parser.parse_args()
    if (args.model or args.adapter) and not args.data:
        parser.error("--model and --adapter need --data")
    main(args)
