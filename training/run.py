"""What the parts of a run share: its flags and processes, where it writes, and how far it has come."""
from __future__ import annotations

import argparse
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

from training.run_log import write_record


@dataclass
class Run:
    args: argparse.Namespace
    rank: int
    world_size: int
    device: torch.device
    total_steps: int = 0
    step: int = 0                       # optimizer steps done
    position: int = 0                   # training rows consumed
    best_loss: float | None = None      # the lowest held-out loss, in nats per token
    log_file: FileIO | None = None      # rank 0's log.jsonl

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.args.out)

    @property
    def result(self) -> Path:
        """The folder of the best result: a model's, or an adapter's."""
        return self.out / ("model" if self.args.full else "adapter")

    @property
    def state(self) -> dict:
        """What a checkpoint stores beside the tensors."""
        return {"position": self.position, "best_loss": self.best_loss}

    @property
    def progress(self) -> str:
        """As "step    20/500"."""
        return f"step {self.step:5d}/{self.total_steps}"

    def say(self, text: str = "", **options) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True, **options)

    def log(self, record: dict) -> None:
        """Append a record to log.jsonl, on rank 0."""
        write_record(self.log_file, record)
