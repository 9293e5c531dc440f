"""The same greedy calls from llama.cpp as from us, on a merged model and its GGUF file.

    python tests/compare_llama_cpp.py MERGED_FOLDER MODEL.gguf rows.jsonl [ROWS]

Needs llama-cpp-python. Both sides get the same token ids and stop at ids 1, 50 and 106; ours computes in fp32. Where the
answers part, the script says how far apart our scores of the two tokens are: rounding can only turn what nearly ties.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.rows import read_sources
from dataset.sampler import query_hash
from inference.decoding import STOP_IDS, generate
from storage.pretrained import load_model
from tokenizer import Tokenizer, parse_calls


def main(folder: str, gguf: str, rows_file: str, count: int = 10) -> None:
    from llama_cpp import Llama
    rows = sorted(read_sources([rows_file]), key=lambda row: query_hash(row.query))[:count]
    tokenizer = Tokenizer.load(folder)
    prompts = [tokenizer.encode_segments(row.prompt())[0] for row in rows]
    model = load_model(folder, torch.float32)
    ours = generate(model, prompts, 96)
    theirs = Llama(model_path=gguf, n_ctx=4096, verbose=False, type_k=0, type_v=0)           # keys and values in fp32
    tokenized_alike = same = 0
    for row, prompt, answer in zip(rows, prompts, ours, strict=True):
        text = "".join(segment.text for segment in row.prompt())
        tokenized_alike += theirs.tokenize(text.encode(), add_bos=False, special=True) == prompt
        theirs.reset()
        theirs.eval(prompt)
        got: list[int] = []
        while len(got) < 96 and (not got or got[-1] not in STOP_IDS):
            got.append(int(np.argmax(theirs._ctx.get_logits_ith(-1)[:theirs.n_vocab()])))
            theirs.eval(got[-1:])
        if got == answer:
            same += 1
            continue
        at = next(i for i, (a, b) in enumerate(zip(got, answer, strict=False)) if a != b)
        with torch.no_grad():
            scores = model.logits(torch.tensor([prompt + answer[:at]]))[0, -1]
        print(f"{row.source}: the same for {at} tokens, then {tokenizer.decode(answer[at:at + 1])!r} here and {tokenizer.decode(got[at:at + 1])!r} "
              f"there; our scores of the two are {scores[answer[at]] - scores[got[at]]:.4f} apart\n  ours       {list(parse_calls(tokenizer.decode(answer)))}\n"
              f"  llama.cpp  {list(parse_calls(tokenizer.decode(got)))}")
    print(f"of {len(rows)} rows: {tokenized_alike} prompts tokenized alike, {same} answers with the same ids")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
