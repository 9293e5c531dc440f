"""Hostile inputs, and what each of them gives.

    python tests/hostile_inputs.py            # writes docs/hostile.md
    python tests/hostile_inputs.py --json     # what tests/test_hostile.py compares with it, and the memory and time that it took

Each case is tried in one process, one after another, each within 20 seconds of processor time.
"""
import contextlib
import gzip
import json
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from dataset.errors import SkippedRows  # noqa: E402
from dataset.examples import tokenize  # noqa: E402
from dataset.rows import parse_row, read_rows  # noqa: E402
from examples import demo  # noqa: E402
from lora import LoRAConfig, wrap  # noqa: E402
from storage import adapters, pretrained  # noqa: E402
from tokenizer.model_file import BYTE, BYTE_PIECES, NORMAL, UNKNOWN, USER_DEFINED, control_names  # noqa: E402

SECONDS, MEBIBYTES = 20, 200            # processor time of a case; memory of all cases, beyond what the imports take
TOOL = {"name": "f", "description": "d", "parameters": {"a": {"type": "str", "description": "d"}}}
GOOD = {"query": "q", "tools": [TOOL], "answers": [{"name": "f", "arguments": {"a": "x"}}]}
CONTROL = "".join(control_names())


def row(**changes) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def call(value: str) -> bytes:
    """A row whose one argument is this JSON."""
    return row(answers="ARGUMENT").replace(b'"ARGUMENT"', b'[{"name": "f", "arguments": {"a": %s}}]' % value.encode())


def nested(opening: str, closing: str, depth: int) -> str:
    return opening * depth + "1" + closing * depth


# ---------------------------------------------------------------------------------------------------------------------
# Files of rows: content, as bytes or as (bytes, how often) for what is too large to hold

LINES = {
    "100,000 nested lists": nested("[", "]", 100_000).encode(),
    "an argument nested 10,000 deep": call(nested("[", "]", 10_000)),
    "an argument nested 300 deep": call(nested('{"a":', "}", 300)),
    "a parameter whose items are nested 300 deep": row(tools=[{"name": "f", "parameters": {"a": {"type": "list", "items": json.loads(
        nested('{"type": "array", "items": ', "}", 300).replace("1}", '{"type": "string"}}'))}}}]),
    "accepted values nested 400 deep": b'{"question": [[{"role": "user", "content": "q"}]], "function": [{"name": "f"}], "ground_truth": [{"f": {"a": [%s]}}]}'
                                       % nested("[", "]", 400).encode(),
    "the number 1e999999": call("1e999999"), "an integer of 100,000 digits": call("9" * 100_000), "an integer of 4,000 digits": call("9" * 4_000),
    "NaN": call("NaN"), "-Infinity": call("-Infinity"),
    "a line of 100 MB": (b'{"query": "', (b"x" * (1 << 20), 100), b'"}'),
    "100 MB of spaces before a row": ((b" " * (1 << 20), 100), row()),
    "a row of 300 KB of empty objects": call("[" + "{}," * 100_000 + "{}]"),
    "300 KB of one letter": row(query="a" * 300_000),
    "bytes that are not UTF-8": row().replace(b'"q"', b'"\xff\xfe"'), "half a surrogate pair": row(query="ARGUMENT").replace(b"ARGUMENT", b"\\ud83d"),
    "a NUL byte": row(query="ARGUMENT").replace(b"ARGUMENT", b"a\0b"), "an escaped NUL": row(query="a\0b"),
    "the same key twice: the last one counts": row()[:-1] + b', "query": "the last one"}',
    "the same tool twice": row(tools=[TOOL, TOOL]),
    "20,000 tools and as many calls": row(tools=[{"name": f"f{i}"} for i in range(20_000)], answers=[{"name": f"f{i}"} for i in range(20_000)]),
    "a type of 300,000 spaces": row(tools=[{"name": "f", "parameters": {"a": {"type": "int" + " " * 300_000 + "x"}}}]),
    'a type of 30,000 ", optional"': row(tools=[{"name": "f", "parameters": {"a": {"type": "int" + ", optional" * 30_000 + "]"}}}]),
    "a type of 300,000 brackets": row(tools=[{"name": "f", "parameters": {"a": {"type": "List[" * 60_000}}}]),
    "no tool name": row(tools=[{"name": ""}], answers=[]), "a tool name of 800 KB": row(answers=[{"name": "g" * 800_000, "arguments": {}}]),
    "an unknown tool whose name is a terminal's escape": row(answers=[{"name": "\x1b[2J", "arguments": {}}]),
    "tools named class and None": row(tools=[{**TOOL, "name": "class"}, {**TOOL, "name": "None"}], answers=[{"name": "class", "arguments": {}}]),
    "every control token's name in every text": row(query=CONTROL, tools=[{"name": CONTROL, "description": CONTROL, "parameters": {CONTROL: {
        "type": "str", "description": CONTROL, "enum": [CONTROL]}}}], answers=[{"name": CONTROL, "arguments": {CONTROL: {CONTROL: [CONTROL]}}}]),
    "the format's own syntax as a tool's name": row(tools=[{**TOOL, "name": "f{a:1}<end_function_call>"}], answers=[
        {"name": "f{a:1}<end_function_call>", "arguments": {}}]),
}
LIMIT = (b"x" * (1 << 20), 100)
WHOLE_FILES = {
    "an empty file": b"", "a file of 2 MB of newlines": (b"\n" * (2 << 20),), "100 MB of spaces, then a row": ((b" " * (1 << 20), 100), row()),
    "a byte order mark": b"\xef\xbb\xbf" + row(), "a byte order mark before an array": b"\xef\xbb\xbf\n [" + row() + b"]", "UTF-16": row().decode().encode("utf-16"),
    "an array that does not end": b"[" + row() + b",\n" + row()[:-5], "an array with a brace too many": b"[" + row() + b"}, " + row() + b"]",
    "an array with a brace too few": b"[" + row()[:-1] + b",\n" + row() + b"]", "an array and more after it": b"[" + row() + b"]\n[]",
    "an array with a broken item": b"[" + row() + b",\n{\"query\" 1},\n" + row() + b"]",
    "an array with an item of 100 MB": (b"[" + row() + b', {"query": "', LIMIT, b'"}, ' + row() + b"]"),
    "an array of 2 MB of opening brackets": (b"[" + row() + b", ", (b"[" * (1 << 20), 2)),
    "a gzip bomb: a line of 200 MB": ("gzip", row() + b"\n", (b"x" * (1 << 20), 200), b"\n" + row() + b"\n"),
    "a gzip bomb: 2 million empty lines": ("gzip", (b"\n" * (1 << 20), 2), row() + b"\n"),
    "a gzip file cut short": gzip.compress((row() + b"\n") * 1000)[:-20], "a gzip file with a changed byte": gzip.compress(row(), mtime=0)[:-6] + b"\0" * 6,
}


def write(path: Path, content) -> None:
    content = (content,) if isinstance(content, bytes) else content
    packed, parts = (True, content[1:]) if content[0] == "gzip" else (False, content)
    with gzip.open(path, "wb", compresslevel=1) if packed else path.open("wb") as file:
        for part in parts:
            block, times = (part, 1) if isinstance(part, bytes) else part
            for _ in range(times):
                file.write(block)


def read(path: Path) -> str:
    """What reading gives, without --skip-invalid and, where that stops, with it."""
    try:
        rows = list(read_rows([path]))
        for found in rows:
            tokenize(found, TOKENIZER)
        return f"{len(rows)} rows"
    except ValueError as error:
        said = str(error)
    try:
        return f"{said} → {len(list(read_rows([path], SkippedRows())))} rows"
    except ValueError as error:
        return said if str(error) == said else f"{said} → {error}"


def rows_case(content, alone: bool):
    def run(folder: Path) -> str:
        parts = (content,) if isinstance(content, bytes) else content
        write(folder / "rows", parts if alone else (row() + b"\n", *parts, b"\n" + row() + b"\n"))
        return read(folder / "rows")
    return run


# ---------------------------------------------------------------------------------------------------------------------
# Models, adapters, tokenizers: a sound folder with one file changed

CONFIGS = {
    "vocab_size 10¹²": {"vocab_size": 10**12}, "10⁹ layers": {"num_hidden_layers": 10**9, "layer_types": None}, "head_dim −4": {"head_dim": -4},
    "head_dim 7": {"head_dim": 7}, "no kv heads": {"num_key_value_heads": 0}, "a string for a number": {"hidden_size": "640"}, "1.5 heads": {"num_attention_heads": 1.5},
    "true for a number": {"num_attention_heads": True}, "rms_norm_eps NaN": {"rms_norm_eps": float("nan")}, "query_pre_attn_scalar 0": {"query_pre_attn_scalar": 0},
    "a window of −5": {"sliding_window": -5}, "rope_theta a string": {"rope_theta": "x"}, "layer_types a number": {"layer_types": 5}, "layer_types lists": {"layer_types": [[1]] * 4},
    "sliding_window_pattern a string": {"layer_types": None, "sliding_window_pattern": "x"}, "rope_parameters a list": {"rope_parameters": [1]},
    "rope_parameters without a layer's": {"rope_parameters": {"x": 1}}, "rope_scaling a string": {"rope_scaling": "x"}, "rope_scaling by 0": {"rope_scaling": {"rope_type": "linear", "factor": 0}},
    "text_config a list": {"text_config": [1]}, "100,000 opening brackets": "[" * 100_000, "a list": "[]", "nothing": "", "a number of 100,000 digits": '{"vocab_size": ' + "9" * 100_000 + "}",
}
ADAPTERS = {"r 10¹²": {"r": 10**12}, "r −1": {"r": -1}, "r true": {"r": True}, "lora_alpha infinite": {"lora_alpha": float("inf")}, "lora_dropout NaN": {"lora_dropout": float("nan")},
            "target_modules of all kinds": {"target_modules": ["q_proj", 7, None]}, "100,000 opening brackets": "[" * 100_000, "a list": "[]"}


def piece(text: bytes, kind: int = NORMAL) -> bytes:
    return field(1, field(1, text) + b"\x15" + struct.pack("<f", 0.0) + b"\x18" + bytes([kind]))


def field(number: int, content: bytes) -> bytes:
    size, length = len(content), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


SPECS = field(2, b"\x18\x02\x98\x02\x01\xc0\x02\x00") + field(3, b"\x18\x00\x20\x00")        # BPE with byte fallback, text left as it is
BYTES = b"".join(piece(name.encode(), BYTE) for name in BYTE_PIECES)
TOKENIZERS = {
    "no bytes": b"", "no pieces": SPECS, "a length beyond the file": b"\x0a\xff\xff\xff\xff\x0f", "a varint of 11 bytes": b"\x0a" + b"\xff" * 10 + b"\x01",
    "the same piece twice": piece(b"<unk>", UNKNOWN) + BYTES + piece(b"a") * 2 + SPECS, "a piece that is not UTF-8": piece(b"\xff") + SPECS,
    "no control pieces": piece(b"<unk>", UNKNOWN) + BYTES + piece(b"a") + SPECS, "a control piece without brackets": piece(b"<unk>", UNKNOWN) + BYTES + piece(b"a", 3) + SPECS,
    "a user-defined piece of 100,000 spaces": piece(b"<unk>", UNKNOWN) + BYTES + piece("▁".encode() * 100_000, USER_DEFINED) + SPECS,
    "more pieces than the model has rows": piece(b"<unk>", UNKNOWN) + BYTES + b"".join(piece(b"w%d" % i) for i in range(5000)) + SPECS,
}


def changed_json(name: str, change):
    """A file's new content: other JSON text, or its own with some keys changed."""
    def content(folder: Path) -> bytes:
        return change.encode() if isinstance(change, str) else json.dumps(json.loads((folder / name).read_text()) | change).encode()
    return content


def changed_header(change, size: int | None = None, cut: int = 0):
    """model.safetensors with its header changed by a function, its header's length lied about, or its end cut off."""
    def content(folder: Path) -> bytes:
        whole = (folder / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", whole[:8])[0]
        header = json.loads(whole[8:8 + length])
        names = sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
        change(header, *names[:2])
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text) if size is None else size) + text + whole[8 + length:len(whole) - cut]
    return content


WEIGHTS = {
    "no bytes": lambda folder: b"", "random bytes": lambda folder: bytes(range(256)) * 20, "a header longer than the file": changed_header(lambda *_: None, 10**15),
    "a header of 2⁶⁴−1 bytes": changed_header(lambda *_: None, 2**64 - 1), "the last 100 bytes missing": changed_header(lambda *_: None, cut=100),
    "two tensors in one place": changed_header(lambda h, a, b: h[a].update(data_offsets=h[b]["data_offsets"])),
    "offsets beyond the file": changed_header(lambda h, a, b: h[a].update(data_offsets=[10**12, 10**12 + 8])),
    "a shape of 2⁸⁰ numbers": changed_header(lambda h, a, b: h[a].update(shape=[2**40, 2**40])), "a negative shape": changed_header(lambda h, a, b: h[a].update(shape=[-1, 2])),
    "a shape that is not its bytes": changed_header(lambda h, a, b: h[a].update(shape=[3])), "an unknown dtype": changed_header(lambda h, a, b: h[a].update(dtype="F7")),
    "integers for weights": changed_header(lambda h, a, b: h[a].update(dtype="I16")), "a header of 50,000 brackets": lambda folder: struct.pack("<Q", 50_000) + b"[" * 50_000,
    "a tensor under another name": changed_header(lambda h, a, b: h.update(other=h.pop(a))),
}
INDEXES = {"a list": "[]", "without weight_map": "{}", "with a file outside": '{"weight_map": {"a": "../../etc/passwd"}}', "with a file that is not there": '{"weight_map": {"a": "model-2.safetensors"}}'}


def file_case(name: str, content, load):
    """Put content into a file of a sound model's folder, and load."""
    def run(folder: Path) -> str:
        shutil.copytree(MODEL, folder / "m")
        made = content(folder / "m") if callable(content) else content
        if name == pretrained.INDEX:
            (folder / "m" / pretrained.WEIGHTS).rename(folder / "m" / "model-1.safetensors")
        (folder / "m" / name).write_bytes(made)
        try:
            return load(folder / "m") or "loaded"
        except (ValueError, OSError) as error:
            return str(error)
    return run


def load_tokenizer(folder: Path) -> str:
    tokenizer = pretrained.load_tokenizer(folder)
    tokenizer.encode_segments(parse_row(GOOD, "x").segments())
    return "loaded"


def load_model(folder: Path) -> None:
    pretrained.load_model(folder)


def load_adapter(folder: Path) -> None:
    adapters.load_adapter(pretrained.load_model(MODEL), folder)


TABLES = {
    "A file of rows: line 2 of 3": {name: rows_case(content, alone=False) for name, content in LINES.items()},
    "A file of rows": {name: rows_case(content, alone=True) for name, content in WHOLE_FILES.items()},
    "config.json": {name: file_case("config.json", changed_json("config.json", change), load_model)
                    for name, change in CONFIGS.items()},
    "model.safetensors": {name: file_case("model.safetensors", content, load_model) for name, content in WEIGHTS.items()},
    "model.safetensors.index.json": {name: file_case(pretrained.INDEX, text.encode(), load_model) for name, text in INDEXES.items()},
    "adapter_config.json": {name: file_case("adapter_config.json", changed_json("adapter_config.json", change), load_adapter) for name, change in ADAPTERS.items()},
    "tokenizer.model": {name: file_case("tokenizer.model", content, load_tokenizer) for name, content in TOKENIZERS.items()},
    "tokenizer_config.json": {name: file_case("tokenizer_config.json", text.encode(), load_tokenizer) for name, text in {
        "100,000 opening brackets": "[" * 100_000, "a list": "[]", "<end_of_turn> at id 10¹²": '{"added_tokens_decoder": {"1000000000000": {"content": "<end_of_turn>"}}}',
        "<end_of_turn> twice": '{"added_tokens_decoder": {"300": {"content": "<end_of_turn>"}}}'}.items()},
}


def out_of_time(*_) -> None:
    raise TimeoutError(f"HANG: more than {SECONDS} seconds")


def outcomes() -> dict[str, dict[str, str]]:
    """What each case gives; what is a library's own wording, in parentheses, left out."""
    signal.signal(signal.SIGPROF, out_of_time)
    found: dict[str, dict[str, str]] = {}
    for heading, cases in TABLES.items():
        for name, run in cases.items():
            began = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                try:
                    said = run(Path(folder))
                except Exception as error:
                    said = f"CRASH {type(error).__name__}: {error}"
                signal.setitimer(signal.ITIMER_PROF, 0)
            if time.process_time() - began > 1:
                print(f"{time.process_time() - began:.1f} s: {name}", file=sys.stderr)
            said = said.replace(f"{folder}/m/", "").replace(f"{folder}/m", "the folder").partition("\n")[0]
            said = re.sub(r"(valid JSON|safetensors file) \(.*?\)(?=; (fix|mend|fetch))", r"\1 (…)", said)
            found.setdefault(heading, {})[name] = re.sub(r"(RecursionError|AttributeError): .*?(?=; expected)", r"\1 (…)", said)
    return found


def page(found: dict[str, dict[str, str]]) -> str:
    lines = [
        "# Hostile inputs", "",
        "What malformed and malicious files give: the error, word for word, or what is read. An arrow → stands before",
        "what `--skip-invalid` reads of the same file, and (…) replaces the message of a library.", "",
        "`python tests/hostile_inputs.py` writes this page. tests/test_hostile.py checks that it is up to date, that each",
        f"case ends within {SECONDS} seconds of processor time, and that all of them need at most {MEBIBYTES} MiB of memory. It also",
        "tries random rows, files and configs, and random text in every field of a row: such text never becomes a",
        "control token.", ""]
    for heading, cases in found.items():
        lines += [f"## {heading}", "", "| input | gives |", "|---|---|"]
        lines += [f"| {name} | {said.replace('|', chr(92) + '|')} |".replace("<", "&lt;") for name, said in cases.items()] + [""]
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        with contextlib.redirect_stdout(None):
            demo.write_demo(Path(made), rows=50)
        MODEL = Path(made, "model")
        TOKENIZER = pretrained.load_tokenizer(MODEL)
        adapted = pretrained.load_model(MODEL)
        wrap(adapted, LoRAConfig(rank=2), torch.Generator().manual_seed(0))
        adapters.save_adapter(adapted, str(MODEL), MODEL)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        text = page(outcomes())
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if "--json" in sys.argv:
        print(json.dumps({"page": text, "mebibytes": grown, "seconds": time.perf_counter() - began}))
    else:
        (ROOT / "docs" / "hostile.md").write_text(text, encoding="utf-8")
        print(f"{text.count(chr(10))} lines in docs/hostile.md; {grown:.0f} MiB, {time.perf_counter() - began:.0f} s")
