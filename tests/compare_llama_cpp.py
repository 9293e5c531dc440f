"""The same greedy calls from llama.cpp as from us, on a merged model and its GGUF file.

    python tests/compare_llama_cpp.py MERGED_FOLDER MODEL.gguf rows.jsonl [ROWS]

Needs llama-cpp-python. Both sides get the same token ids, compute in what the files hold, and stop at ids 1, 50 and 106;
prints each row's answer where they differ, and how many are equal.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from checkpoint import load_model
from generate import STOP_IDS, generate
from tokenizer import Tokenizer, parse_calls, render


def main(folder: str, gguf: str, rows_file: str, count: int = 10) -> int:
    from llama_cpp import Llama
    rows = sorted(data.read_sources([rows_file]), key=lambda row: data.query_hash(row.query))[:count]
    tokenizer = Tokenizer.load(folder)
    prompts = [tokenizer.encode_segments(row.prompt())[0] for row in rows]
    model = load_model(folder, torch.float32)
    ours = generate(model, prompts, 96)
    theirs = Llama(model_path=gguf, n_ctx=4096, verbose=False, logits_all=False)
    same_ids = same_calls = same_tokens = 0
    for row, prompt, answer in zip(rows, prompts, ours, strict=True):
        before = next(i for i, m in enumerate(row.messages) if m["role"] == "assistant")
        text = render(row.messages[:before], row.tools, add_generation_prompt=True)
        same_tokens += theirs.tokenize(text.encode(), add_bos=False, special=True) == prompt
        theirs.reset()
        theirs.eval(prompt)
        got: list[int] = []
        while len(got) < 96 and (not got or got[-1] not in STOP_IDS):
            got.append(int(np.argmax(theirs._ctx.get_logits_ith(-1)[:theirs.n_vocab()])))
            theirs.eval(got[-1:])
        same_ids += got == answer
        equal = list(parse_calls(tokenizer.decode(got))) == list(parse_calls(tokenizer.decode(answer)))
        same_calls += equal
        if not equal:
            print(f"{row.source}\n  ours      {tokenizer.decode(answer)!r}\n  llama.cpp {tokenizer.decode(got)!r}")
    print(f"of {len(rows)} rows: {same_tokens} prompts tokenized alike, {same_ids} answers with the same ids, {same_calls} with the same calls")
    return 0 if same_calls == len(rows) else 1


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:4], *map(int, sys.argv[4:])))
