"""Flags of the commands that run a model: generate.py, evaluate.py and export.py."""
from __future__ import annotations

import argparse

import torch

from storage.pretrained import DTYPES


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that reads a tuned model; `base_of` and `load_adapter` take their values."""
    add = parser.add_argument_group("model").add_argument
    add("--model", default=None,
        help="folder in the published layout, a run's folder of full fine-tuning, or a name on the Hugging "
             "Face Hub, owner/name or owner/name@revision (default: what the adapter was trained on)")
    add("--adapter", default=None, metavar="RUN", help="a run's folder, or an adapter's in PEFT's layout")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that computes; `load_tuned` takes their values and the model's."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="what the model computes in (default: bf16, or fp32 on a device that has no instructions for "
             "bf16 products)")
