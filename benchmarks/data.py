"""From a file of rows to packed batches: ours against `datasets` with transformers' chat template and
tokenizer.

    python benchmarks/data.py --model FOLDER --data a.jsonl,b.jsonl [--rows 20000] [--alone 60000,1000000] [--save]
    pip install datasets            # the peer's; it is in no list of requirements

The rows as they are come first, then repeated up to `--rows`, each time with another number in the query and
in every text among the arguments. Both sides use as many processes as there are cores. What is timed begins
with the file and the loaded tokenizer and ends with the last batch of an epoch in steps of 16,896 tokens,
tensors of whole rows side by side: "cold" with an empty cache, "warm" with what the cold run left. The peer
renders with a Jinja template that does the same as the published one on rows in xLAM's columns, written for
this benchmark as that one is not part of this project: before anything is timed both must give the same ids
on all rows. It works out no mask of trained tokens and no held-out split, which ours does. Ours alone then
goes through files of `--alone` rows.
"""
import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)                     # not this folder: `data` is the module, not this file

import data  # noqa: E402
from dataset import sampler, token_cache  # noqa: E402
from dataset.examples import tokenize  # noqa: E402
from dataset.rows import read_rows  # noqa: E402
from dataset.tools import parse_tools  # noqa: E402
from tokenizer import DEVELOPER_TEXT, Tokenizer  # noqa: E402

BATCH_TOKENS = 16_896
EVALUATED = 200
CORES = len(os.sched_getaffinity(0))
TEMPLATE = r"""
{%- macro text(value) -%} {{- '<escape>' ~ value ~ '<escape>' -}} {%- endmacro -%}
{%- macro entries(mapping, escaped) -%}
  {%- for key, value in mapping | dictsort -%}
    {{- ',' if not loop.first -}} {{- text(key) if escaped else key -}} {{- ':' ~ argument(value, escaped) -}}
  {%- endfor -%}
{%- endmacro -%}
{%- macro argument(value, escaped=true) -%}
  {%- if value is string -%} {{- text(value) -}}
  {%- elif value is boolean -%} {{- 'true' if value else 'false' -}}
  {%- elif value is mapping -%} {{- '{' ~ entries(value, escaped) ~ '}' -}}
  {%- elif value is sequence -%}
    {{- '[' -}} {%- for item in value -%} {{- ',' if not loop.first -}} {{- argument(item, escaped) -}} {%- endfor -%} {{- ']' -}}
  {%- else -%} {{- value -}} {%- endif -%}
{%- endmacro -%}
{%- macro required(names) -%}
  {{- 'required:[' -}} {%- for name in names -%} {{- ',' if not loop.first -}} {{- text(name) -}} {%- endfor -%} {{- ']' -}}
{%- endmacro -%}
{%- macro parameters(properties) -%}
  {%- set ns = namespace(comma='') -%}
  {%- for key, schema in properties | dictsort if key not in ['description', 'type', 'properties', 'required', 'nullable'] -%}
    {%- set kind = (schema['type'] or '') | upper -%}
    {{- ns.comma ~ key ~ ':{description:' ~ text(schema['description'] or '') -}}
    {%- if kind == 'STRING' and schema.get('enum') -%} {{- ',enum:' ~ argument(schema['enum']) -}}
    {%- elif kind == 'OBJECT' -%}
      {{- ',properties:{' ~ parameters(schema.get('properties') or schema) ~ '}' -}}
      {%- if schema.get('required') -%} {{- ',' ~ required(schema['required']) -}} {%- endif -%}
    {%- elif kind == 'ARRAY' and schema.get('items') -%}
      {{- ',items:{' -}}
      {%- for name, value in schema.get('items') | dictsort if value is not none -%}
        {{- ',' if not loop.first -}}
        {%- if name == 'properties' -%} {{- 'properties:{' ~ parameters(value) ~ '}' -}}
        {%- elif name == 'required' -%} {{- required(value) -}}
        {%- elif name == 'type' -%} {{- 'type:' ~ argument(value | upper) -}}
        {%- else -%} {{- name ~ ':' ~ argument(value) -}} {%- endif -%}
      {%- endfor -%}
      {{- '}' -}}
    {%- endif -%}
    {{- ',type:' ~ text(kind) ~ '}' -}}
    {%- set ns.comma = ',' -%}
  {%- endfor -%}
{%- endmacro -%}
{{- bos_token ~ '<start_of_turn>developer\n' ~ messages[0].content -}}
{%- for tool in tools -%}
  {%- set function = tool.function -%}
  {{- '<start_function_declaration>declaration:' ~ function.name ~ '{description:' ~ text(function.description) -}}
  {%- set schema = function.parameters -%}
  {%- if schema -%}
    {{- ',parameters:{' -}}
    {%- if schema.get('properties') -%} {{- 'properties:{' ~ parameters(schema['properties']) ~ '},' -}} {%- endif -%}
    {%- if schema.get('required') -%} {{- required(schema['required']) ~ ',' -}} {%- endif -%}
    {{- 'type:' ~ text(schema['type'] | upper) ~ '}' -}}
  {%- endif -%}
  {{- '}<end_function_declaration>' -}}
{%- endfor -%}
{{- '<end_of_turn>\n<start_of_turn>user\n' ~ (messages[1].content | trim) ~ '<end_of_turn>\n<start_of_turn>model\n' -}}
{%- for call in messages[2].tool_calls -%}
  {{- '<start_function_call>call:' ~ call.function.name ~ '{' ~ entries(call.function.arguments, false) ~ '}<end_function_call>' -}}
{%- endfor -%}
{{- '<start_function_response>' if messages[2].tool_calls else '<end_of_turn>\n' -}}
"""


def main(args: argparse.Namespace) -> None:
    result = {
        "data": [Path(name).name for name in args.data.split(",")],
        "batch_tokens": BATCH_TOKENS,
        "cores": CORES,
        "machine": f"{platform.machine()}, {CORES} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("datasets", "transformers", "tokenizers", "numpy")},
        "files": {},
    }
    plan = [("real", None, ("peer", "ours")), ("repeated", args.rows, ("peer", "ours"))]
    plan += [(f"alone {rows}", int(rows), ("ours",)) for rows in args.alone.split(",") if rows]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, rows, sides in plan:
            file = write_rows(args.data.split(","), rows, Path(folder) / f"{rows}.jsonl")
            made = result["files"][name] = {"megabytes": file.stat().st_size / 1e6}
            for side, run in itertools.product(sides, ("cold", "warm")):
                made[f"{side}, {run}"] = figures = in_a_process(args.model, file, side)
                made["rows"] = figures["rows"]
                print(f"{name:9} {side}, {run}: {json.dumps(figures)}", flush=True)
            for run in ("cold", "warm") if "peer" in sides else ():
                made[f"times_peer_{run}"] = made[f"peer, {run}"]["seconds"] / made[f"ours, {run}"]["seconds"]
                print(f"{name:9} {run}: {made[f'times_peer_{run}']:.1f} times as fast", flush=True)
            made["load"] = os.getloadavg()[1]  # programs that wanted a core, over five minutes
            if args.save:
                (ROOT / "benchmarks" / "results" / "data.json").write_text(json.dumps(result,
                                                                                      indent=2) + "\n",
                                                                                      encoding="utf-8")


def in_a_process(model: str, file: Path, side: str) -> dict:
    command = [sys.executable, __file__, "--model", model, "--data", str(file), "--folder", f"{file}-{side}",
               "--side", side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    return json.loads(done.stdout.splitlines()[-1])


def write_rows(files: list[str], rows: int | None, path: Path) -> Path:
    """The files' rows again and again, with other values each time; as they are with rows=None."""
    lines = [line for name in files for line in Path(name).read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        if rows is None:
            file.write("\n".join(lines) + "\n")
            return path
        written = 0
        for turn in itertools.count():
            for line in lines:
                if written == rows:
                    return path
                row = json.loads(line)
                answers = json.loads(row["answers"])
                for call in answers:
                    call["arguments"] = {key: f"{value} {turn}" if isinstance(value, str) else value
                                         for key, value in call["arguments"].items()}
                file.write(json.dumps(row | {"query": f"{row['query']} ({turn})",
                                             "answers": json.dumps(answers)}) + "\n")
                written += 1
    return path


class Memory(threading.Thread):
    """Watches the memory of this process and of its children that no file backs; peaks in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own, self.child = 0.0, 0.0

    def run(self) -> None:
        while True:
            self.own = max(self.own, anonymous_mib(os.getpid()))
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                self.child = max(self.child, anonymous_mib(int(child)))
            time.sleep(0.2)


def anonymous_mib(process: int) -> float:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:                                                     # it has just ended
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon")),
                0.0)


def ours(file: str, model: Path, cache: Path) -> dict:
    tokenizer = Tokenizer.load(model)
    memory = Memory()
    memory.start()
    began = time.perf_counter()
    tokens = token_cache.read_tokens([file], model, tokenizer, cache, EVALUATED, skip_invalid=False)
    train, held_out = tokens.split(0.05)
    conversations = [held_out.conversation(i) for i in range(min(EVALUATED, len(held_out)))]
    ready = time.perf_counter()
    assert len(train) + len(held_out) == len(tokens) and conversations
    plan = [rows for rows, _ in sampler.steps(tokens.lengths, 0, batch_tokens=BATCH_TOKENS, epochs=1)]
    planned = time.perf_counter()
    slots = len(plan) * BATCH_TOKENS
    real = sum(len(batch.tokens) for rows in plan for batch in data.pack([tokens[row] for row in rows],
                                                                         BATCH_TOKENS, share_prefixes=False))
    ended = time.perf_counter()
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return {"rows": len(tokens), "tokens": real, "seconds": ended - began, "ready_seconds": ready - began,
            "plan_seconds": planned - ready, "filled": real / slots, "peak_mib": memory.own,
            "worker_peak_mib": memory.child, "cache_megabytes": size / 1e6,
            "resident_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def peer(file: str, model: Path, cache: Path) -> dict:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE

    def tokenized(row: dict) -> dict:
        calls = [{"type": "function", "function": call} for call in json.loads(row["answers"])]
        messages = [{"role": "developer", "content": DEVELOPER_TEXT}, {"role": "user",
                                                                       "content": row["query"]},
                    {"role": "assistant", "content": None, "tool_calls": calls}]
        ids = tokenizer.apply_chat_template(messages, tools=parse_tools(row["tools"]), tokenize=True,
                                            return_dict=False)
        return {"ids": ids, "length": len(ids) - 1}

    memory = Memory()
    memory.start()
    began = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(cache))
    rows = rows.map(tokenized, num_proc=CORES, remove_columns=rows.column_names,
                    new_fingerprint=f"tokenized{Path(file).stat().st_size}")
    ready = time.perf_counter()
    rows.set_format("numpy")
    plan = [step for step, _ in sampler.steps(rows["length"][:], 0, batch_tokens=BATCH_TOKENS, epochs=1)]
    real = 0
    for step in plan:
        ids = rows[step]["ids"]
        tokens = torch.from_numpy(np.concatenate([row[:-1] for row in ids]))
        positions = torch.cat([torch.arange(len(row) - 1) for row in ids])
        real += min(len(tokens), len(positions))
    ended = time.perf_counter()
    return {"rows": len(rows), "tokens": real, "seconds": ended - began, "ready_seconds": ready - began,
            "peak_mib": memory.own, "worker_peak_mib": memory.child}


def check_same_ids(files: list[str], model: Path) -> None:
    from transformers import AutoTokenizer
    theirs, mine = AutoTokenizer.from_pretrained(model), Tokenizer.load(model)
    theirs.chat_template = TEMPLATE
    for row in read_rows(files):
        ids = theirs.apply_chat_template(row.messages, tools=row.tools, tokenize=True, return_dict=False)
        if ids != tokenize(row, mine).ids.tolist():
            sys.exit(f"{row.source}: the two sides give different ids")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True,
                        help="folder with tokenizer.model, tokenizer.json and tokenizer_config.json")
    parser.add_argument("--data", required=True,
                        help="JSONL files in xLAM's columns as texts, separated by commas")
    parser.add_argument("--rows", type=int, default=20_000, help="rows to repeat them to (default 20000)")
    parser.add_argument("--alone", default="60000",
                        help="rows of files that ours alone goes through (default 60000)")
    parser.add_argument(
        "--folder",
        help="where to put files and caches meanwhile (default: the system's folder for temporary files)",
    )
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/data.json")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.side:
        figures = (ours if flags.side == "ours" else peer)(flags.data, Path(flags.model), Path(flags.folder))
        # of all its processes, imports and the tokenizer's loading with them
        figures["cpu_seconds"] = sum(os.times()[:4])
        for unit in ("rows", "tokens"):
            figures[f"{unit}_per_second"] = figures[unit] / figures["seconds"]
        print(json.dumps(figures))
    else:
        check_same_ids(flags.data.split(","), Path(flags.model))
        main(flags)
