"""Write the tables of README.md and docs/faults.md from benchmarks/results/*.json, so that no figure is typed
by hand.

    python benchmarks/tables.py                     # rewrite what stands between their table marks
    python benchmarks/tables.py --run NAME=FOLDER   # first store a run's summary in benchmarks/results/NAME.json
"""
from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("usage", "benchmarks", "faults",
                                                                         "scaling"))]
RESULTS = ROOT / "benchmarks" / "results"
GPU_RESULTS = RESULTS / "gpu"                   # where `make gpu` writes


def add_result_flags(parser: argparse.ArgumentParser) -> None:
    """--save and --out of a benchmark, for `keep_result`."""
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results: cpu_… or gpu/…")
    parser.add_argument("--out", help="write them to this folder instead")


def result_file(name: str, device: torch.device, args: argparse.Namespace) -> Path | None:
    """Where --save and --out want a benchmark's figures; None where they want none."""
    on_gpu = device.type == "cuda"
    folder = args.out or (args.save and (GPU_RESULTS if on_gpu else RESULTS))
    return Path(folder) / f"{'' if on_gpu else 'cpu_'}{name}.json" if folder else None


def keep_result(result: dict, name: str, device: torch.device, args: argparse.Namespace) -> None:
    """Write a benchmark's figures, or those it has so far, to its `result_file`, whole at every moment."""
    if file := result_file(name, device, args):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        part.replace(file)


def summarise(run: Path) -> dict:
    """What a run's log.jsonl says: accuracy and held-out loss before and after, time, memory, machine, flags.
    """
    header, *records = [json.loads(line)
                        for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    taken = [record for record in records if "loss" in record]
    calls = []
    for path in sorted((run / "calls").glob("step-*.json")):
        evaluation = json.loads(path.read_text(encoding="utf-8")) | {
            "step": int(path.stem.removeprefix("step-"))
        }
        calls.append({key: value for key, value in evaluation.items() if key not in ("answers", "model",
                                                                                     "adapter", "data")})
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
    return {
        "steps": taken[-1]["step"],
        "tokens": sum(r["tokens"] for r in taken),
        "minutes": sum(r["seconds"] for r in taken) / 60,
        "tokens_per_second": sum(r["tokens"] for r in taken) / sum(r["seconds"] for r in taken),
        "peak_gib": max(r["peak_gib"] for r in taken),
        "held_out_loss": [held_out[0], held_out[-1]],
        "calls": calls,
        "data": [Path(source).name for source in header["flags"]["data"].split(",")],
        "device": header["device"],
        "commit": header["commit"],
        "torch": header["torch"],
        "flags": {k: v for k, v in header["flags"].items() if k not in ("model", "data", "eval_data")},
    }


def tables() -> dict[str, str]:
    """{mark: Markdown} for every table whose results are there."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    gpu, made = gpu_results(), {}
    if "demo" in found:
        made["demo"] = demo_table(found["demo"])
    if "an_hour" in found:
        made["calls"] = calls_table([found["an_hour"]])
    if decode := found.get("cpu_decode"):
        on_gpu = gpu.get("decode", {})
        made["decode"] = decode_table(on_gpu if on_gpu.get("weights") == "trained" else decode)
    if "cpu_vs_peft" in found and "cpu_parity" in found:
        made["peft"] = peft_table(
            found["cpu_vs_peft"], found.get("cpu_full"), found.get("cpu_vs_peft_fp32"), found["cpu_parity"]
        )
    if "cpu_one_set" in found:
        made["one_set"] = one_set_table(found["cpu_one_set"])
    made["gpu"] = gpu_table(gpu)
    made["files"], made["modules"] = files_table(), modules_table()
    if all(name in found for name in ("cpu_vs_peft", "cpu_full", "cpu_one_set", "data")):
        made["summary"] = summary_table(found)
    if "data" in found:
        made["data"] = data_table(found["data"])
    if scaling := gpu.get("scaling", found.get("cpu_scaling")):
        made["scaling"], made["dealt"] = scaling_table(scaling), dealt_table(scaling)
    if "tokenizer" in found:
        made["tokenizer"] = tokenizer_table(found["tokenizer"])
    if "faults" in found:
        made["faults"] = faults_table(found["faults"])
    return made


# The files that make up the algorithm, in the order to read them.
READING_ORDER = {
    "train.py": "flags and the training loop",
    "data.py": "batches without padding, shared prefixes, the loader of steps",
    "model.py": "Gemma 3",
    "lora.py": "adapters: add, list, merge",
    "lora_kernels.py": "the fused LoRA linears, forward and backward, in Triton and in PyTorch",
    "ops": "attention, cross-entropy, norms, GeGLU: Triton, C++ and PyTorch",
    "tokenizer": "the function-call template and its inverse, BPE",
    "dataset": "rows of every shape become token ids with a loss mask",
    "training": "processes, gradients, checkpoints, evaluation during a run",
    "inference": "decoding and scoring; generate.py, evaluate.py and export.py are the commands",
}


def files_table() -> str:
    """The files and folders in reading order, with their lines."""
    lines = ["| read in this order | lines | |", "|---|---|---|"]
    for name, what in READING_ORDER.items():
        path = ROOT / name
        if path.exists():
            lines.append(f"| [{name}{'/' if path.is_dir() else ''}]({name}) | {count_lines(path):,} | "
                         f"{what} |")
    return "\n".join(lines)


def modules_table() -> str:
    """Every module, with the first sentence of its docstring."""
    packages = ["", "ops", "tokenizer", "storage", "dataset", "training", "inference", "report", "examples"]
    lines = ["| file | what it is |", "|---|---|"]
    for package in packages:
        for path in sorted((ROOT / package).glob("*.py")):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            if path.name != "__init__.py":
                name, first = path.relative_to(ROOT).as_posix(), " ".join(text.partition("\n\n")[0].split())
                lines.append(f"| [{name}](../{name}) | {first.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def count_lines(path: Path) -> int:
    """Lines of a source file, or of all in a folder, rounded to tens."""
    files = (
        [path]
        if path.is_file()
        else [file for file in path.rglob("*") if file.suffix in (".py", ".cpp", ".css")]
    )
    return round(sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files), -1)


def summary_table(found: dict[str, dict]) -> str:
    """The README's first table: the figures that matter, on a CPU."""
    def row(what: str, peer: float, ours: float, unit: str, digits: int = 0) -> str:
        times = f"{ours / peer:.0f} ×" if ours / peer >= 10 else f"{ours / peer:.1f} ×"
        return f"| {what} | {peer:,.{digits}f} | **{ours:,.{digits}f}** {unit} | {times} |"

    def speed(result: dict, side: str) -> float:
        return statistics.median(result[side]["tokens_per_second"])

    lora, full, one_set, data = (found[name] for name in ("cpu_vs_peft", "cpu_full", "cpu_one_set", "data"))
    rows_per_second = {side: statistics.median(one_set[side]["rows_per_second"]) for side in ("peft", "ours")}
    file = next(iter(data["files"].values()))
    memory = f"{lora['peft']['peak_gib']:.1f} | **{lora['ours']['peak_gib']:.1f}** GiB | {lora['memory_ratio']:.0%} of it"
    return "\n".join(
        [
            "| Gemma 3 270M, two CPU cores | transformers + PEFT | this project | ratio |",
            "|---|---|---|---|",
            row("LoRA, rank 16", speed(lora, "peft"), speed(lora, "ours"), "tokens/s"),
            f"| … peak memory | {memory} |",
            row("full fine-tuning", speed(full, "peft"), speed(full, "ours"), "tokens/s"),
            row(
                "LoRA, rows that share their tools",
                rows_per_second["peft"],
                rows_per_second["ours"],
                "rows/s",
                2,
            ),
            row(
                "rows tokenized and packed (peer: Hugging Face datasets)",
                file["peer, cold"]["rows_per_second"],
                file["ours, cold"]["rows_per_second"],
                "rows/s",
            ),
            "",
            f"{lora['machine']}, bf16; conditions and all other figures: "
            f"[docs/benchmarks.md](docs/benchmarks.md). " + NO_GPU,
        ]
    )


def demo_table(r: dict) -> str:
    before, after = r["calls"][0], r["calls"][-1]
    return "\n".join([
        "| `make finetune` | before | after |", "|---|---|---|",
        f"| exact match of {after['rows']} held-out queries | {before['exact_match']:.1%} | "
        f"**{after['exact_match']:.1%}** |",
        f"| held-out loss, nats per token | {r['held_out_loss'][0]:.2f} | {r['held_out_loss'][1]:.3f} |", "",
        f"{r['steps']} steps in {r['minutes']:.1f} minutes, {r['tokens_per_second'] / 1e3:.1f}k tokens/s, "
        f"{r['peak_gib']:.1f} GiB; "
        f"{r['device']}, torch {r['torch']}, commit {r['commit']}"])


def calls_table(runs: list[dict]) -> str:
    """Accuracy before and after of each run, and by file."""
    lines = [
        "| Gemma 3 270M, real weights | held-out rows | exact match | AST match | right functions |",
        "|---|---|---|---|---|",
    ]
    notes = []

    def cells(before: dict, after: dict) -> str:
        return " | ".join([str(after["rows"]), *(f"{before[key]:.1%} → **{after[key]:.1%}**" for key in
                                                 ("exact_match", "ast_match", "name_accuracy"))])

    for r in runs:
        before, after, flags = r["calls"][0], r["calls"][-1], r["flags"]
        files = after.get("files", {})
        name = " + ".join(Path(file).stem for file in r["data"])
        lines.append(f"| {name}, {r['steps']} steps, {r['minutes']:.0f} minutes | {cells(before, after)} |")
        lines += [
            f"| … {Path(file).stem} | {cells(before['files'][file], of_file)} |"
            for file, of_file in files.items()
            if of_file["rows"] >= 10
        ]
        between = [c for c in r["calls"] if c["step"] > 0]
        if len(between) > 1:
            notes.append(
                "Exact match after "
                + ", ".join(f"{c['step'] * flags['batch_rows']}" for c in between)
                + " rows: "
                + ", ".join(f"{c['exact_match']:.1%}" for c in between)
            )
        way = "every parameter" if flags["full"] else f"LoRA rank {flags['lora_rank']}"
        notes.append(f"{r['steps']} steps of {flags['batch_rows']} rows, {way}, lr {flags['lr']:g}: "
                     f"{r['tokens'] / 1e3:.0f}k tokens at "
                     f"{r['tokens_per_second']:.0f} tokens/s, {r['peak_gib']:.1f} GiB, held-out loss "
                     f"{r['held_out_loss'][0]:.2f} → "
                     f"{r['held_out_loss'][1]:.3f}; {r['device']}, torch {r['torch']}, commit {r['commit']}")
    return "\n".join([*lines, "", "  \n".join(notes)])


def decode_table(r: dict) -> str:
    rate, whole = r["decoding_tokens_per_second"], r["with_reading_tokens_per_second"]
    lines = [
        f"| {side} | {rate[side]:.1f} | {rate[side] / rate['transformers']:.1f} × | {whole[side]:.1f} |"
        for side in rate
    ]
    one, many = (
        statistics.median(r[key]) for key in ("single_tokens_per_second", "batch_of_16_tokens_per_second")
    )
    return "\n".join(
        [
            f"| answering one prompt of {r['prompt_tokens']} tokens | tokens/s | | with reading the prompt |",
            "|---|---|---|---|",
            *lines,
            "",
            f"Sixteen prompts of 40 tokens at once: {many:.0f} tokens/s, {r['times_single']:.1f} × one by "
            f"one "
            f"({one:.0f}). "
            f"{r['same_answers']} of {r['prompts']} answers are the same; {r['device']}, bf16, torch "
            f"{r['versions']['torch']}, transformers "
            f"{r['versions']['transformers']}; `python benchmarks/decode.py`",
        ]
    )


def peft_table(s: dict, full: dict | None, fp32: dict | None, p: dict) -> str:
    def rows(s: dict, what: str, padded: str = "fours") -> list[str]:
        peft = f"{statistics.median(s['peft']['tokens_per_second']):.0f}"
        made, names = (
            [],
            {
                "ours": f"{what}: real tokens/s (theirs: padded {padded}, all logits)",
                "ours, --compile": "… with `--compile`",
                "ours, a process a core": "… a process a core",
                "ours, a process a core, --compile": "… both",
            },
        )
        for side, name in names.items():
            if side in s:
                times = f"{statistics.median(s[side]['times_peft']):.1f} × |"
                made.append(f"| {name} | {peft} | **{statistics.median(s[side]['tokens_per_second']):.0f}** "
                            f"| {times}")
        made.append(f"| peak memory, GiB | {s['peft']['peak_gib']:.1f} | **{s['ours']['peak_gib']:.1f}** | "
                    f"{s['memory_ratio']:.0%} |")
        if many := s.get("ours, a process a core"):
            made.append(f"| … of all processes | {s['peft']['peak_gib']:.1f} | {many['peak_gib']:.1f} | "
                        f"{many['peak_gib'] / s['peft']['peak_gib']:.0%} |")
        return made

    loss = f"held-out loss after {p['steps']} steps on the same rows (before: {p['ours']['held_out_before']:.2f})"
    return "\n".join(
        [
            "| Gemma 3 270M, bf16, 8 rows a step | transformers + PEFT | ours | |",
            "|---|---|---|---|",
            *rows(s, "LoRA rank 16"),
            *(rows(full, "every parameter (theirs in bf16 alone)") if full else []),
            *(
                rows(
                    fp32,
                    "LoRA rank 16 in fp32, on a CPU that cannot multiply bf16",
                    "twos, as fours do not fit into 24 GiB",
                )
                if fp32
                else []
            ),
            f"| LoRA, {loss} | {p['peft']['held_out']:.4f} | {p['ours']['held_out']:.4f} | "
            f"{p['held_out_ratio'] - 1:+.1%} |",
            "",
            f"{' + '.join(s['data'])}; {s['machine']}; torch {s['versions']['torch']}, transformers "
            f"{s['versions']['transformers']}, "
            f"peft {s['versions']['peft']}; `python benchmarks/cpu_vs_peft.py`, with `--parity {p['steps']}` "
            f"for the loss",
        ]
    )


def one_set_table(r: dict) -> str:
    names = {
        "peft": "transformers + PEFT, one by one",
        "ours, each alone": "ours, each row alone",
        "ours": "ours, their shared prefix once",
    }
    slowest = statistics.median(r["peft"]["rows_per_second"])
    lines = []
    for side, name in names.items():
        rows = statistics.median(r[side]["rows_per_second"])
        lines.append(f"| {name} | {rows:.2f} | {rows / slowest:.1f} × | {r[side]['peak_gib']:.1f} |")
    return "\n".join([
        "| rows that all have the same tools | rows/s | | GiB |", "|---|---|---|---|", *lines, "",
        f"LoRA rank 16, bf16, Gemma 3 270M; {' + '.join(r['data'])} with all of its tools in every row; "
        f"{r['machine']}, torch "
        f"{r['versions']['torch']}; `python benchmarks/cpu_vs_peft.py --one-set`"])


NO_GPU = "There are no GPU results yet; `make gpu` measures them (time limit: nine minutes)."


def gpu_results() -> dict[str, dict]:
    """What `make gpu` wrote, by file; nothing of a dry run or a CPU."""
    files = sorted(GPU_RESULTS.glob("*.json"))
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    if any(result.get("tiny") for result in found.values()):
        return {}
    return {name: result for name, result in found.items() if not result["device"].startswith("CPU")}


def gpu_table(found: dict[str, dict]) -> str:
    """Steps, sizes, LoRA's linears, attention and each kernel, as far as they were measured."""
    made = []
    if "step" in found:
        step = found["step"]
        if step["ladder"] or step["peers"]:
            made.append(step_table(step, found.get("floors", {}).get("step_floor_ms")))
        if step["sizes"]:
            made.append(sizes_table(step))
    for name, table in (("lora", lora_table), ("attention", attention_table), ("floors", floors_table)):
        if name in found:
            made.append(table(found[name]))
    return "\n\n".join(made) or NO_GPU


def under(r: dict, command: str) -> str:
    """The line below a table: on what its figures were measured, and how."""
    versions = ", ".join(f"{name} {version}" for name, version in r["versions"].items()
                         if version and name != "numpy")
    return f"{r['device']}, {versions}, commit {r['commit']}; `{command}`"


def best(rows: dict[str, dict], full: bool) -> float | None:
    """Tokens a second of our fastest way to train LoRA, or every parameter."""
    speeds = [row["tokens_per_second"] for name, row in rows.items()
              if is_right(row) and name.startswith("every parameter") == full]
    return max(speeds, default=None)


def is_right(row: dict) -> bool:
    return "failed" not in row and "wrong" not in row


def step_cells(row: dict) -> str:
    mfu = "" if row["mfu"] is None else f"{row['mfu']:.0%}"
    speed = f"{row['tokens_per_second'] / 1e3:.1f}k | {row['seconds'] * 1e3:.1f}"
    return f"{speed} | {mfu} | {row['peak_gib']:.1f}"


def step_table(r: dict, floor_ms: float | None) -> str:
    """Each rung and peer: speed, memory, share of the floor; and our fastest way's speed over a peer's."""
    lines = []
    for part in ("ladder", "peers"):
        for name, row in r[part].items():
            full = name.startswith("every parameter")
            if not is_right(row):
                lines.append(f"| {name} | {'failed' if 'failed' in row else 'wrong'} | | | | | |")
                continue
            has_floor = floor_ms and part == "ladder" and not full
            floor = f"{floor_ms / row['seconds'] / 1e3:.0%}" if has_floor else ""
            ours = best(r["ladder"], full)
            ratio = f"{ours / row['tokens_per_second']:.1f} ×" if ours and part == "peers" else ""
            lines.append(f"| {name} | {step_cells(row)} | {floor} | {ratio} |")
    return "\n".join([
        f"| a step of {r['tokens']} tokens | tokens/s | ms | MFU | GiB | of the floor | ours is |",
        "|---|---|---|---|---|---|---|", *lines, "",
        f"LoRA rank 16 but where every parameter is trained; {under(r, 'python benchmarks/step.py --save')}"])


def sizes_table(r: dict) -> str:
    rows = {int(tokens): row for tokens, row in r["sizes"].items() if is_right(row)}
    lines = [f"| {tokens:,} | {step_cells(row)} |" for tokens, row in rows.items()]
    return "\n".join([
        "| LoRA, tokens a step | tokens/s | ms | MFU | GiB |", "|---|---|---|---|---|", *lines, "",
        under(r, "python benchmarks/step.py --save --parts sizes")])


def floors_table(r: dict) -> str:
    """Each kernel of a LoRA step, those first that take most of it."""
    rows = {name: row for name, row in r["kernels"].items() if "ms" in row}
    lines = [f"| {name} | {row['count']:.0f} | {row['ms'] * 1e3:.0f} | {row['floor_ms'] * 1e3:.0f} | "
             f"{row['floor_ms'] / row['ms']:.0%} |"
             for name, row in sorted(rows.items(), key=lambda item: -item[1]["count"] * item[1]["ms"])]
    return "\n".join([
        "| kernel | a step | µs | floor, µs | of the floor |", "|---|---|---|---|---|", *lines, "",
        f"All of a step: {r['step_kernels_ms']:.1f} ms, floor {r['step_floor_ms']:.1f} ms, by "
        f"{r['peak_tflops']:.0f} TFLOP/s and {r['peak_gb_a_second']:.0f} GB/s measured; "
        + under(r, "python benchmarks/floors.py --save")])


def lora_table(r: dict) -> str:
    """Forward and backward of each group by each way, and how often that of the linears without adapters."""
    M = 16896 if "16896" in r["rows"] else next(iter(r["rows"]))
    groups = r["rows"][str(M)]

    def cell(group: str, way: str) -> str:
        made, floor = groups[group].get(way, {}), groups[group].get("frozen", {})
        if "both" not in made:
            return next(iter(made), "–")                                       # wrong, or failed
        times = f"{made['both']['ms']:.3f}"
        return f"{times} ({made['both']['ms'] / floor['both']['ms']:.2f} ×)" if "both" in floor else times

    ways = list(dict.fromkeys(way for of in groups.values() for way in of))
    lines = [
        f"| {f'**{way}**' if way == 'ours' else way} | "
        + " | ".join(cell(group, way) for group in groups)
        + " |"
        for way in ways
    ]
    return "\n".join(
        [
            f"| forward + backward of {M} tokens, ms (× frozen) | " + " | ".join(groups) + " |",
            "|---|" + "---|" * len(groups),
            *lines,
            "",
            f"Rank {r['rank']}, {r['dtype']}; {r['device']}: {r['peak_tflops']:.0f} TFLOP/s and "
            f"{r['peak_gb_a_second']:.0f} GB/s measured; "
            f"torch {r['versions']['torch']}, triton {r['versions']['triton']}; `python benchmarks/lora.py "
            f"--save`",
        ]
    )


def attention_table(r: dict) -> str:
    """Milliseconds forward and backward of each way, with each window."""
    def cell(made: dict) -> str:
        # wrong, or failed
        return (
            f"{made['forward']['ms']:.3f} + {made['backward']['ms']:.3f}"
            if "both" in made
            else next(iter(made))
        )

    windows = list(r["windows"].values())
    head = " | ".join(["| forward + backward, ms", *(f"window {window}" for window in r["windows"])]) + " |"
    names = {way: f"**{way}**" if way == "ours" else way for way in windows[0]}
    lines = [
        " | ".join([f"| {name}", *(cell(made[way]) for made in windows)]) + " |"
        for way, name in names.items()
    ]
    return "\n".join([
        head, "|---|" + "---|" * len(windows), *lines, "",
        f"{r['tokens']} tokens in {r['documents']} documents, {r['dtype']}; {r['device']}, torch "
        f"{r['versions']['torch']}, "
        f"triton {r['versions']['triton']}; `python benchmarks/attention.py --save`"])


def data_table(r: dict) -> str:
    """Rows a second from a file to the last packed batch, and what a second start takes."""
    lines = []
    for made in r["files"].values():
        cold, warm, peer = made["ours, cold"], made["ours, warm"], made.get("peer, cold")
        theirs, times = (
            (f"{peer['rows_per_second']:,.0f}", f" ({made['times_peer_cold']:.1f} ×)") if peer else ("–", "")
        )
        lines.append(f"| {made['rows']:,} rows, {made['megabytes']:,.0f} MB | {theirs} | "
                     f"{cold['rows_per_second']:,.0f}{times} | "
                     f"{warm['ready_seconds']:.1f} s | {warm['rows_per_second']:,.0f} | "
                     f"{cold['peak_mib']:.0f} + {r['cores']} × {cold['worker_peak_mib']:.0f} | "
                     f"{cold['cache_megabytes']:,.0f} MB |")
    filled = min(made["ours, cold"]["filled"] for made in r["files"].values())
    return "\n".join([
        "| JSONL to packed batches | datasets + template, rows/s | ours, rows/s | second start | then, "
        "rows/s | memory, MiB | on disk |",
        "|---|---|---|---|---|---|---|", *lines, "",
        f"Real rows, and the same repeated with other values; steps of {r['batch_tokens']:,} tokens are "
        f"{filled:.1%} full; memory: of the "
        f"program and of each process that tokenizes, no file behind it; {r['machine']} (load up to "
        f"{max(made['load'] for made in r['files'].values()):.0f}), Python {r['python']}, datasets "
        f"{r['versions']['datasets']}, "
        f"transformers {r['versions']['transformers']}; `python benchmarks/data.py`"])


def scaling_table(r: dict) -> str:
    """Each way's speed by processes, against one process; and what sending during the backward pass hides."""
    lines, hidden = [], []
    by = {(one["model"], one["way"], one["processes"], one["scaling"]): one for one in r["measured"]}
    for (model, way, processes, scaling), one in by.items():
        alone = by[model, way.partition(" ")[0].strip(","), 1, "strong"]
        speed, alone_speed = one["tokens"] / one["busy_seconds"], alone["tokens"] / alone["busy_seconds"]
        waiting = (
            ""
            if one["communication_seconds"] is None
            else f"{one['communication_seconds'] / one['seconds']:.0%}"
        )
        lines.append(f"| {model}, {way} | {processes} | {'' if processes == 1 else scaling} | "
                     f"{one['tokens']} | {speed:.0f} | "
                     f"{speed / alone_speed / processes:.0%} | {waiting if processes > 1 else ''} | "
                     f"{one['bytes'] / 1e6:.0f} | "
                     f"{one['largest_over_mean']:.2f} |")
        if way == "full" and processes > 1:
            late = by[model, "full, sent at the end", processes, scaling]["communication_seconds"]
            hidden.append(f"{1 - one['communication_seconds'] / late:.0%} of {late * 1e3:.0f} ms ({model}, "
                          f"{processes}, {scaling})")
    return "\n".join([
        "| model, way | processes | scaling | tokens a step | tokens/s of CPU | efficiency | communication "
        "| MB sent | "
        "most loaded rank / mean |",
        "|---|---|---|---|---|---|---|---|---|", *lines, "",
        "small: 33 M parameters. So few rows cannot be divided evenly, and efficiency is at most mean / "
        "most loaded rank.  \n"
        f"Communication that overlaps with the backward pass: {'; '.join(hidden)}.  \n"
        f"Speed and efficiency are by seconds of CPU, because {r['load_average']:.0f} other programs ran at "
        f"the same time; "
        "communication is a fraction of the step by the clock. "
        f"{r['device']}, torch {r['versions']['torch']}, median of {r['steps']} steps; "
        "`python benchmarks/scaling.py`"])


def dealt_table(r: dict) -> str:
    lines = [
        f"| {one['processes']} | {one['rows']} | {one['largest_over_mean']:.3f} | {one['computed']:.0%} | "
        f"{one['without_teams']['computed']:.0%} | {one['seconds'] * 1e3:.0f} | "
        f"{one['without_teams']['seconds'] * 1e3:.0f} |"
        for one in r["dealt"]
    ]
    return "\n".join([
        "| ranks | rows a step | most loaded rank / mean | tokens computed | … without groups | packing, ms "
        "| … without groups |",
        "|---|---|---|---|---|---|---|", *lines, "",
        f"{' + '.join(r['data'])}, 16,896 tokens a rank, or all rows where that is less; tokens computed "
        f"are a "
        "fraction of the rows' tokens; milliseconds are of CPU; `python benchmarks/scaling.py`"])


def tokenizer_table(r: dict) -> str:
    sides = {"sentencepiece": "sentencepiece, text by text", "ours, cold": "ours, nothing remembered yet",
             "ours, warm": "ours, words remembered"}
    lines = [
        f"| {label} | {r['sides'][side]['mb_a_second']:.1f} | "
        f"{r['sides'][side].get('times_sentencepiece', 1):.1f} × |"
        for side, label in sides.items()
    ]
    return "\n".join(["| tokenizer | MB/s | |", "|---|---|---|", *lines, "",
                      f"{r['texts']} texts, {r['megabytes']:.1f} MB; {r['machine']}, Python {r['python']}, "
                      f"sentencepiece "
                      f"{r['sentencepiece']}; `python benchmarks/tokenizer.py`"])


def faults_table(r: dict) -> str:
    """A line for each fault tried; the random kills are one."""
    def text(value: str) -> str:
        return value.replace("|", "\\|").replace("<", "&lt;")

    def cells(result: dict) -> str:
        if "failed" in result:
            return f"**failed**: {text(result['failed'])[:200]} | | | | | |"
        off, seconds = result.get("losses"), result.get("seconds")
        loss = "" if off is None else "the same" if off == 0 else f"{off:.0e}"
        said = result.get("message") or ""
        stop = "" if seconds is None else f"{seconds:.1f}"
        said = text(said if len(said) < 240 else said[:240] + " …")
        return (
            " | ".join(
                [
                    text(result.get("how", "")),
                    loss,
                    str(result.get("recomputed", "")),
                    stop,
                    str(result["exit"]),
                    said,
                ]
            )
            + " |"
        )

    at_random = [
        result
        for result in r["results"]
        if result["fault"].startswith("killed by -9 at random") and "failed" not in result
    ]
    kills, ends = (
        [result for result in at_random if result["exit"] == -9],
        [result for result in at_random if "losses" in result],
    )
    lines, last = [], None
    if kills:
        torn = sum(result["how"].endswith("torn") for result in kills)
        lines.append(
            "| killed by -9 at random | "
            + cells(
                {
                    "how": f"{len(kills)} times in {len(ends)} runs (LoRA, dropout, full), {torn} times during a save",
                    "exit": -9,
                    "losses": max(result["losses"] for result in ends),
                    "recomputed": f"{max(result['recomputed'] for result in kills)} at most",
                }
            )
        )
    for result in r["results"]:
        if result not in at_random:
            lines.append(f"| {'…' if result['fault'] == last else result['fault']} | {cells(result)}")
            last = result["fault"]
    commits = sorted({result["commit"] for result in r["results"]})
    return "\n".join(
        [
            "| fault | how | losses | steps repeated | s to stop | exit | message |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
            f"{r['machine']}, load average {r['load']:.0f}, torch {r['torch']}, commit {', '.join(commits)}; "
            f"`make faults`",
        ]
    )


def rewrite(readme: str, made: dict[str, str]) -> str:
    """`readme` with the text between <!-- table NAME --> and <!-- end --> replaced."""
    for name, table in made.items():
        marks = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        readme = re.sub(
            marks, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", readme, flags=re.DOTALL
        )
    return readme


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--run":
        name, _, folder = sys.argv[2].partition("=")
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(
            json.dumps(summarise(Path(folder)), indent=2) + "\n", encoding="utf-8"
        )
    elif len(sys.argv) > 1:
        sys.exit(__doc__)
    for path in PAGES:
        path.write_text(rewrite(path.read_text(encoding="utf-8"), tables()), encoding="utf-8")
