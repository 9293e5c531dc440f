"""Our tokenizer against sentencepiece: the same texts, one at a time, in one thread, turn and turn about.

    python benchmarks/tokenizer.py --model FOLDER --data a.jsonl,b.jsonl [--rows 500] [--repeats 5] [--json OUT]

Each column of each row is one text. Before anything is timed both must give the same ids. "Cold" is a tokenizer that
remembers no word yet, "warm" one that has just seen all the texts; sentencepiece remembers nothing. MB are 10^6 bytes
of UTF-8; figures are medians over the repeats, with the slowest and the fastest in brackets. "Rendered" is what
training does: `encode_segments` on these rows as whole conversations, control tokens included, cold.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import sentencepiece

sys.path[0] = str(Path(__file__).resolve().parents[1])      # not this folder: `tokenizer` is the package, not this file

from dataset.rows import read_rows  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with tokenizer.model and tokenizer_config.json")
    parser.add_argument("--data", required=True, help="JSONL files, separated by commas")
    parser.add_argument("--rows", type=int, default=500, help="rows of each file (default 500)")
    parser.add_argument("--repeats", type=int, default=5, help="how often each side runs (default 5)")
    parser.add_argument("--json", help="write the figures here too")
    flags = parser.parse_args()

    load_seconds = seconds(lambda: Tokenizer.load(flags.model))
    ours = Tokenizer.load(flags.model)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(Path(flags.model) / "tokenizer.model"))
    texts, conversations = [], []
    for name in flags.data.split(","):
        with Path(name).open(encoding="utf-8") as lines:
            for line in islice(lines, flags.rows):
                texts += [text if isinstance(text, str) else json.dumps(text) for text in json.loads(line).values()]
        conversations += [row.segments() for row in islice(read_rows([name]), flags.rows)]
    for text in texts:
        if ours.encode(text) != theirs.encode(text):
            sys.exit(f"different ids for {text!r}")

    def forget() -> None:
        for cache in (ours.starts, ours.words, ours.chunks, ours.runs):
            cache.clear()

    sides: dict[str, list[float]] = {"sentencepiece": [], "ours, cold": [], "ours, warm": [], "rendered": []}
    for _ in range(flags.repeats):
        sides["sentencepiece"].append(seconds(lambda: [theirs.encode(text) for text in texts]))
        forget()
        sides["ours, cold"].append(seconds(lambda: [ours.encode(text) for text in texts]))
        sides["ours, warm"].append(seconds(lambda: [ours.encode(text) for text in texts]))
        forget()
        sides["rendered"].append(seconds(lambda: [ours.encode_segments(segments) for segments in conversations]))

    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokens = sum(len(ours.encode(text)) for text in texts)
    rendered = (sum(len(segment.text.encode()) for segments in conversations for segment in segments) / 1e6,
                sum(len(ours.encode_segments(segments)[0]) for segments in conversations))
    result = {"texts": len(texts), "megabytes": megabytes, "tokens": tokens, "repeats": flags.repeats,
              "load_seconds": load_seconds, "machine": f"{platform.machine()}, {os.cpu_count()} cores",
              "python": platform.python_version(), "sentencepiece": sentencepiece.__version__, "sides": {}}
    print(f"{len(texts)} texts, {megabytes:.1f} MB, {tokens} tokens; {result['machine']}, Python {result['python']}, "
          f"sentencepiece {sentencepiece.__version__}; loading takes {load_seconds:.2f} s")
    for side, times in sides.items():
        side_megabytes, side_tokens = rendered if side == "rendered" else (megabytes, tokens)
        speeds = sorted(side_megabytes / s for s in times)
        speed, tokens_a_second = statistics.median(speeds), side_tokens / statistics.median(times)
        result["sides"][side] = {"mb_a_second": speed, "slowest": speeds[0], "fastest": speeds[-1],
                                 "tokens_a_second": tokens_a_second}
        line = f"{side:14} {speed:6.1f} MB/s [{speeds[0]:.1f}, {speeds[-1]:.1f}]   {tokens_a_second / 1e6:.2f} M tok/s"
        if side.startswith("ours"):
            turns = zip(sides["sentencepiece"], times, strict=True)
            ratio = statistics.median(theirs / mine for theirs, mine in turns)
            result["sides"][side]["times_sentencepiece"] = ratio
            line += f"   {ratio:.1f} times sentencepiece"
        print(line)
    if flags.json:
        Path(flags.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
