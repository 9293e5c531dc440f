"""Write a tuned model for other tools: a merged model's folder, or an adapter's.

    python export.py --adapter runs/mine --out DIR --format merged     # for transformers, llama.cpp, Ollama
    python export.py --adapter runs/mine --out DIR --format peft       # for PEFT, or what loads its adapters

`merged` adds the adapter to the weights in fp32 and rounds each once, to bf16. The folder has the base's
layout: config, safetensors under the published names with the head tied to the embedding, the tokenizer's
files and the chat template. docs/export.md continues from there, to llama.cpp and Ollama.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from inference.flags import add_model_flags
from lora import merge
from storage.adapters import base_of, load_adapter, save_adapter, system_prompt_of
from storage.atomic import atomic_folder
from storage.pretrained import fetch_model, load_model, save_model, save_system_prompt


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a tuned model for other tools.")
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="the folder to write; it must not exist yet, or be empty")
    add("--format", choices=("merged", "peft"), default="merged",
        help="a whole model, or the adapter alone (default: %(default)s)")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    if args.format == "peft" and args.adapter is None:
        parser.error("--format peft writes an adapter: name one with --adapter")
    return args


def main(args: argparse.Namespace) -> int:
    out = Path(args.out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists; remove it, or choose another --out")
    base = base_of(args.model, args.adapter)
    folder = fetch_model(base)
    model = load_model(folder, torch.float32)
    if args.adapter:
        load_adapter(model, args.adapter)
    with atomic_folder(out) as temporary:
        if args.format == "peft":
            save_adapter(model, base, temporary)
        else:
            merge(model)
            save_model(model, folder, temporary)
        save_system_prompt(temporary, system_prompt_of(args.model, args.adapter))
    files = (f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)" for path in sorted(out.iterdir()))
    print(f"{args.format} {'adapter' if args.format == 'peft' else 'model'} in {out}: {', '.join(files)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"export.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
