"""Write docs/walkthrough.md: one row, from a line of a file to a call, with the numbers of each step.

    python docs/walkthrough.py [FILE]

Everything is computed here, in fp32 on the CPU, from the rows and the random model of examples/demo.py.
Numbers are printed with so few digits that all CPUs agree. tests/test_walkthrough.py checks that the page is
up to date.
"""
from __future__ import annotations

import inspect
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import Batch, pack  # noqa: E402
from dataset.examples import Example, tokenize  # noqa: E402
from dataset.files import raw_rows  # noqa: E402
from dataset.rows import Conversation, parse_row  # noqa: E402
from evaluate import evaluate  # noqa: E402
from examples.demo import VOCABULARY_ROWS, write_demo  # noqa: E402
from generate import generate  # noqa: E402
from lora import LoRAConfig, adapters, wrap  # noqa: E402
from lora_kernels import lora_linear_reference, lora_linears  # noqa: E402
from model import Block, Gemma3, GemmaConfig, attention, linear_cross_entropy  # noqa: E402
from storage.adapters import save_adapter  # noqa: E402
from storage.pretrained import load_model  # noqa: E402
from tokenizer import Control, Tokenizer, parse_calls, render_segments  # noqa: E402
from training.distributed import AllReduceGradients  # noqa: E402

LINES = (23, 54)        # two rows of the demo that declare the same tools, by their lines in rows.jsonl
STEPS = 25              # of training on these two rows
LR = 1e-2               # learning rate
CLIP = 1.0              # the largest norm of the gradient
NEWLINE, NEXT_COLUMN = "\n", ",\n "
LINEAR = "model.layers.0.self_attn.q_proj"      # whose adapter steps 7 and 9 show


def where(thing: object) -> str:
    """Where a function or class stands, as the page cites it: its file and its name."""
    file = Path(inspect.getsourcefile(thing)).relative_to(ROOT).as_posix()
    return f"`{file}`" if isinstance(thing, ModuleType) else f"`{thing.__qualname__}` ({file})"


def table(header: str, rows: Iterable[Sequence]) -> str:
    """A Markdown table; `header` is its first line without the outer bars."""
    columns = header.count("|") + 1
    lines = [f"| {header} |", "|---" * columns + "|"]
    for row in rows:
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def introduction(model: Gemma3) -> str:
    small, full = model.config, GemmaConfig()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = [("D", "width", "hidden_size"), ("N", "query heads", "num_attention_heads"),
             ("K", "key/value heads", "num_key_value_heads"), ("H", "head dim", "head_dim"),
             ("F", "MLP width", "intermediate_size"), ("V", "vocabulary", "vocab_size")]
    letters = [(letter, meaning, f"{getattr(small, name):,}", f"{getattr(full, name):,}")
               for letter, meaning, name in sizes]
    return f"""# From a row to a call

This page follows one row from a line of a file to an updated adapter that answers it, in ten steps. Each step
names the function where it happens: read the page beside the code. `python docs/walkthrough.py` computes
everything below and writes this page.

The rows and the model are the built-in demo's: the same lines, vocabulary and random weights that
`python examples/demo.py build/demo` writes. The model is a Gemma 3 with every part of the real one, but only
{parameters / 1e6:.2f} M parameters.

{table("symbol | meaning | here | Gemma 3 270M", [
    ("T", "tokens computed in a micro-batch", "see step 5", "at most 16,896 on a GPU, 4,096 on a CPU"),
    *letters, ("R", "LoRA rank", LoRAConfig().rank, LoRAConfig().rank)])}
"""


def from_line_to_segments(line: str, row: Conversation) -> str:
    columns = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in json.loads(line).items()]
    [name] = {call["name"] for call in row.calls}
    function = next(tool["function"] for tool in row.tools if tool["function"]["name"] == name)
    segments = render_segments(row.messages, row.tools)
    marked = ""
    for carries_loss, run in groupby(segments, key=lambda segment: segment[1]):
        text = "".join(text for text, _ in run)
        marked += f"«{text}»" if carries_loss else text
    controls = sum(isinstance(text, Control) for text, _ in segments)
    return f"""## 1. A line of a file

{where(raw_rows)} reads the lines of a file. Line {LINES[0]} of `rows.jsonl` is an xLAM row, in which
`tools` and `answers` are JSON inside a string. The file has it on one line; here each column has its own.

```json
{{{NEXT_COLUMN.join(columns)}}}
```

## 2. Row → Conversation

{where(parse_row)} turns a row of any shape into tools, as in OpenAI's API, and messages. It adds
the developer message. A row that cannot be right, such as a call to a function that is not declared, is an
error here.

```python
{NEWLINE.join(map(str, row.messages))}
```

The types of the tools become JSON Schema's. `str, optional` makes `label` a string that is not required:

```python
{function["parameters"]}
```

## 3. Conversation → segments

{where(render_segments)} writes the text that the model reads, in {len(segments)} segments, of
which {controls} are control tokens. Each segment says whether it carries loss. What the model has to produce
carries loss, here between « and »; the prompt does not. This is decided here and nowhere else.

```text
{marked}
```
"""


def ids_and_batch(rows: list[Conversation], examples: list[Example], batch: Batch,
                  tokenizer: Tokenizer) -> str:
    def piece(token: int) -> str:
        return "`" + tokenizer.pieces[token].replace("\n", "\\n") + "`"

    example = examples[0]
    start = len(tokenizer.encode_segments(rows[0].prompt())[0]) - 3             # "<start_of_turn>model\n"
    ids = [(i, piece(example.ids[i]), example.ids[i], int(example.loss_mask[i]))
           for i in range(start, len(example.ids))]
    documents, first = [], 0
    for number, (_, begin, end) in enumerate(batch.spans):
        what = f"the rest of line {LINES[number - 1]}" if number else "the shared prefix"
        last = first + end - begin - 1
        carry = ((batch.loss_rows >= first) & (batch.loss_rows <= last)).sum().item()
        documents.append((number, what, f"{first} … {last}", f"{begin} … {end - 1}", carry))
        first = last + 1
    predictions = []
    for row, target in zip(batch.loss_rows[:4].tolist(), batch.targets[:4], strict=True):
        position, document = batch.positions[row].item(), batch.documents[row].item()
        predictions.append((row, piece(batch.tokens[row]), position, document, piece(target)))
    T, M, prefix = len(batch.tokens), len(batch.targets), batch.spans[0].stop
    unshared = sum(map(len, examples))
    return f"""## 4. Segments → ids and loss mask

{where(tokenize)} makes an `Example`: {len(example.ids)} ids, and a loss mask of the same length, with
{example.loss_tokens} entries set. A control token is one id. {where(Tokenizer.encode)} cuts other
text into pieces by BPE, in which `▁` stands for a space. The last {len(ids)} ids:

{table("position | piece | id | loss mask", ids)}

## 5. Examples → Batch

{where(pack)} puts rows side by side, as documents, without padding. Line {LINES[1]}, "{rows[1].query}",
declares the same tools, so the two rows begin with the same {prefix} tokens. This shared prefix becomes a
document of its own, and each row continues it.

{table("document | what | indices in the batch | positions | tokens that carry loss", documents)}

The last id of a row is only ever a target. So there are T = {T} tokens to compute; without sharing there
would be {unshared}. The batch has five tensors: `tokens`, `positions` and `documents` of T numbers, and
`loss_rows` and `targets` of M = {M}. The token at index `loss_rows[i]` has to predict `targets[i]`:

{table("loss_rows | token | position | document | targets", predictions)}
"""


@torch.no_grad()
def forward_shapes(model: Gemma3, batch: Batch) -> str:
    shapes: dict[str, tuple] = {}

    def note_shape(name: str):
        def hook(module, inputs, output) -> None:
            shapes[name] = tuple((output[0] if isinstance(output, tuple) else output).shape)
        return hook

    hooks = [module.register_forward_hook(note_shape(name)) for name, module in model.named_modules()]
    model(batch.tokens, batch.positions, batch.documents, batch.loss_rows)
    for hook in hooks:
        hook.remove()
    window = model.config.sliding_window
    layers, last = model.config.num_hidden_layers, f"model.layers.{model.config.num_hidden_layers - 1}"
    outputs = {"input_layernorm": "T, D", "self_attn.q_proj": "T, N·H", "self_attn.k_proj": "T, K·H",
               "self_attn.v_proj": "T, K·H", "self_attn.q_norm": "T, N, H", "self_attn.k_norm": "T, K, H",
               "self_attn.o_proj": "T, D", "mlp.gate_proj": "T, F", "mlp.up_proj": "T, F",
               "mlp.down_proj": "T, D"}
    rows = []
    for name, letters in outputs.items():
        rows.append((f"`{name}` of the first layer", f"({letters})", shapes[f"model.layers.0.{name}"]))
    rows.append(("the last layer", "(M, D)", shapes[last]))
    rows.append(("the last norm: the hidden states", "(M, D)", shapes["model.norm"]))
    return f"""## 6. Batch → hidden states

{where(Gemma3.forward)} looks up the tokens' embeddings, multiplies them by √D, and runs {layers} layers. Each
{where(Block)} adds attention and the MLP to the residual stream, which is (T, D). In
{where(attention)} a token sees itself and what comes before it in its own document and in the
prefix that this continues; in a local layer, only the last {window} of these tokens.

{table("output of | symbols | shape", rows)}

After the last attention tokens no longer interact, so only the M tokens with a target are computed further.
"""


@torch.no_grad()
def linear_with_adapter(model: Gemma3, batch: Batch) -> str:
    adapter = dict(adapters(model))[LINEAR]
    W, A, B = adapter.adapted
    x = torch.randn(len(batch.tokens), W.shape[1], generator=torch.Generator().manual_seed(0))
    y = lora_linear_reference(x, W, A, B, adapter.config.scale)
    assert torch.allclose(adapter(x), y, atol=1e-5) and torch.equal(y, x @ W.T)
    rows = [("x", "(T, D)", tuple(x.shape), ""),
            ("W", "(N·H, D)", tuple(W.shape), f"frozen: {W.numel():,} numbers"),
            ("A", "(R, D)", tuple(A.shape), f"trained: {A.numel():,} numbers, random at the start"),
            ("B", "(N·H, R)", tuple(B.shape), f"trained: {B.numel():,} numbers, zero at the start"),
            ("x Aᵀ", "(T, R)", tuple((x @ A.T).shape), ""), ("y", "(T, N·H)", tuple(y.shape), "")]
    return f"""## 7. A linear with its adapter

{where(wrap)} freezes the model and gives each linear an adapter. Each adapted layer computes
y = x Wᵀ + s (x Aᵀ) Bᵀ with s = alpha / R = {adapter.config.scale:g}. {where(lora_linear_reference)}
is the definition, and
{where(lora_linears)} computes the same faster, q, k and v together. The shapes of
`{LINEAR}`:

{table("matrix | letters | shape | note", rows)}

As B is zero, y is x Wᵀ: training starts at the base model. The brackets matter: x Aᵀ has R columns only, so
the adapter costs few operations, while B A would be as large as W. [derivations.md](derivations.md) derives
the gradients.
"""


def loss_and_steps(model: Gemma3, batch: Batch) -> str:
    M, V, adapter = len(batch.targets), model.config.vocab_size, dict(adapters(model))[LINEAR]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    losses, norms, numbers_a, numbers_b = [], [], [], []
    for step in range(STEPS + 1):
        numbers_a.append(", ".join(f"{number:.3f}" for number in adapter.lora_a[0, :3].tolist()))
        numbers_b.append(", ".join(f"{number:.3f}" for number in adapter.lora_b[:3, 0].tolist()))
        loss_sum = model(batch.tokens, batch.positions, batch.documents, batch.loss_rows, batch.targets)
        losses.append(loss_sum.item() / M)
        if step < STEPS:
            (loss_sum / M).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, CLIP).item())
            assert step or (adapter.lora_b.grad.all() and not adapter.lora_a.grad.any())
            optimizer.step()
            optimizer.zero_grad()
    rows = [(step, f"{losses[step]:.2f}", numbers_a[step], numbers_b[step]) for step in (0, 1, 2)]
    rows += [(step, f"{losses[step]:.2f}", "", "") for step in (5, 10, STEPS)]
    total, mean, uniform = f"{losses[0] * M:.0f}", f"{losses[0]:.2f}", f"{math.log(V):.2f}"
    norm, divisor = f"{norms[0]:.1f}", f"{norms[0] / CLIP:.1f}"
    return f"""## 8. Cross-entropy

{where(linear_cross_entropy)} multiplies the hidden states by the embedding, which is also
the head. That gives logits (M, V) = ({M}, {V:,}). They are computed in chunks of tokens, so that not all of
them exist at once. The loss of a token is log Σ exp(logits) − its target's logit.

The losses of the {M} tokens add up to {total} nats, {mean} on average. Equal probabilities for all {V:,}
pieces would give ln V = {uniform}. Random weights do worse: they prefer some pieces, mostly wrong ones.

## 9. Gradients, clipping, AdamW

The loop is in {where(train)}. The backward pass gives the gradient of the *sum* of the losses;
{where(AllReduceGradients)} adds it up over micro-batches and ranks. Only then is it
divided by the number of tokens that carry loss in the whole step, here {M}. So it does not matter how the
rows are divided among micro-batches and ranks.

- The norm of the gradient is {norm}. It is clipped to {CLIP:g}: each number is divided by {divisor}.
- In {where(train)} both divisions happen inside the fused AdamW, so that the CPU need not wait for the norm.
- While B is zero, so is the gradient of A: the first step changes B alone.
- AdamW's first step moves each number of B by the learning rate, here {LR:g}, up or down, however large its
  gradient.

{table("steps | loss | A: three numbers of its first row | B: three numbers of its first column", rows)}
"""


def answer(model: Gemma3, row: Conversation, tokenizer: Tokenizer) -> str:
    prompt, _ = tokenizer.encode_segments(row.prompt())
    [ids] = generate(model.eval(), [prompt], max_new_tokens=40)
    text = tokenizer.decode(ids)
    calls = parse_calls(text)
    assert calls == row.calls, text
    return f"""## 10. After {STEPS} steps: a call

{where(save_adapter)} writes A and B as PEFT does. {where(generate)} reads the {len(prompt)} ids of
the prompt, which is the text of step 3 up to «. It then appends the likeliest id, again and again, until
that is a stop token. The {len(ids)} appended ids are this text:

```text
{text}
```

{where(parse_calls)} reads the calls out of it, the inverse of step 3:

```json
{json.dumps(calls)}
```

These are the row's `answers`. Two rows that were memorized prove nothing yet:
{where(evaluate)} asks rows that were held out.
"""


def page() -> str:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_demo(folder, rows=VOCABULARY_ROWS)            # the rows that decide the vocabulary
        lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        tokenizer, model = Tokenizer.load(folder / "model"), load_model(folder / "model", torch.float32)
    rows = [parse_row(lines[line - 1], f"rows.jsonl:{line}") for line in LINES]
    examples = [tokenize(row, tokenizer) for row in rows]
    [batch] = pack(examples, max_tokens=4096)
    sections = [introduction(model), from_line_to_segments(lines[LINES[0] - 1], rows[0]),
                ids_and_batch(rows, examples, batch, tokenizer), forward_shapes(model, batch)]
    wrap(model, LoRAConfig(), torch.Generator().manual_seed(0))
    sections += [linear_with_adapter(model, batch), loss_and_steps(model, batch),
                 answer(model, rows[0], tokenizer)]
    return "\n".join(sections)


if __name__ == "__main__":
    torch.set_num_threads(1)
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "walkthrough.md"
    file.write_text(page(), encoding="utf-8")
