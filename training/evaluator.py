"""What a run evaluates: the loss of held-out rows and the calls for held-out queries; the best result is
saved.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from data import Batch
from dataset.rows import Conversation
from model import Gemma3
from storage.adapters import load_tuned, save_adapter
from storage.atomic import write_json
from storage.pretrained import save_model, save_system_prompt
from tokenizer import Tokenizer
from training.distributed import decoding_copy
from training.loss import loss_sum
from training.run import Run

LOGGED = ("rows", "exact_match", "ast_match", "name_accuracy", "parse_failures")


class Evaluator:
    """Evaluates a run's model and saves its best result."""

    def __init__(self, run: Run, model: Gemma3, model_folder: Path, tokenizer: Tokenizer, *,
                 batches: Sequence[Batch], loss_tokens: int, conversations: Sequence[Conversation],
                 evaluate: Callable[..., dict]) -> None:
        """batches: this rank's held-out rows; under FSDP every rank has equally many. loss_tokens: of the
        held-out rows of all ranks. conversations: whose queries the model answers. evaluate:
        `evaluate.evaluate`, a command, which this package cannot import.
        """
        self.run, self.model, self.model_folder, self.tokenizer = run, model, model_folder, tokenizer
        self.batches, self.loss_tokens = batches, loss_tokens
        self.conversations, self.evaluate = conversations, evaluate

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The mean loss of the held-out rows, in nats per token, over all ranks."""
        self.model.eval()
        total = torch.zeros((), device=self.run.device)
        for batch in self.batches:
            total += loss_sum(self.model, batch)
        if self.run.world_size > 1:
            dist.all_reduce(total)
        return total.item() / self.loss_tokens

    def measure_loss(self) -> None:
        """Log the held-out loss, and save the result if it is the best so far."""
        if not self.loss_tokens:
            return
        run, loss = self.run, self.held_out_loss()
        run.say(f"{run.progress} | held-out loss {loss:.4f}")
        run.log({"step": run.step, "eval_loss": loss})
        is_best = math.isfinite(loss) and (run.best_loss is None or loss < run.best_loss)
        if run.step and is_best:
            run.best_loss = loss
            self.save_result()

    def answer_queries(self, model: Gemma3 | None = None) -> None:
        """Let the model answer held-out queries; log the accuracy, and keep every answer in out/calls.

        model: by default the one in training.
        """
        if not self.conversations:
            return
        run = self.run
        if model is None:
            model = decoding_copy(self.model) if run.args.full else self.model.eval()
        result = self.evaluate(
            model,
            self.tokenizer,
            self.conversations,
            processes=(run.rank, run.world_size),
            say=lambda text: run.say(f"{run.progress} | {text}"),
        )
        run.say(f"{run.progress} | exact match {result['exact_match']:.1%} | AST match "
                f"{result['ast_match']:.1%} "
                f"of {result['rows']} held-out queries")
        run.log({"step": run.step, **{key: result[key] for key in LOGGED}})
        if run.rank == 0:
            (run.out / "calls").mkdir(exist_ok=True)
            write_json(run.out / "calls" / f"step-{run.step:06d}.json", {"step": run.step, **result})

    def save_result(self) -> None:
        """Write the result for other tools: out/adapter in PEFT's layout, or out/model in the published one.

        Under FSDP all ranks must call it.
        """
        args = self.run.args
        model = decoding_copy(self.model) if args.shard else self.model
        if self.run.rank != 0:
            return
        if args.full:
            save_model(model, self.model_folder, self.run.result)
        else:
            save_adapter(model, args.model, self.run.result)
        save_system_prompt(self.run.result, args.system)

    def answer_queries_with_result(self) -> None:
        """As `answer_queries`, by the saved result: what the user gets, not the model in memory."""
        run = self.run
        if not self.conversations:
            return
        if run.world_size > 1:
            dist.barrier()                                      # until rank 0 has written the result
        base, adapter = (str(run.out), None) if run.args.full else (str(self.model_folder), str(run.out))
        self.answer_queries(load_tuned(base, adapter, run.args.dtype, run.args.device)[0])
