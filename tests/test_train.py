"""train.py from outside and inside: what it logs, that it learns, and that a run broken anywhere goes on to the same losses."""
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import INTERPRETED, NEEDS_COMPILER, ROOT, torchrun

import train
from data import pack
from dataset import sampler
from dataset.examples import tokenize
from dataset.rows import read_rows
from dataset.sampler import query_hash
from lora import LoRAConfig, choose_kernels, wrap
from ops.backend import Backends
from ops.cross_entropy import linear_cross_entropy
from storage import pretrained
from storage.adapters import load_adapter, load_tuned
from storage.atomic import read_json
from storage.pretrained import load_model
from storage.tensors import read_tensors
from tokenizer import DEVELOPER_TEXT, Tokenizer
from training import loss as loss_module
from training.load_data import load_datasets
from training.run import Run
from training.run_folder import find_checkpoints

RECORD = {"step", "loss", "grad_norm", "lr", "tokens", "computed_tokens", "trained_tokens", "seconds", "tokens_per_second", "trained_tokens_per_second",
          "data_wait", "tflops", "mfu", "peak_gib"}


def flags(demo, out, *more):
    return ["--model", str(demo / "model"), "--data", str(demo / "rows.jsonl"), "--out", str(out), "--device", "cpu", "--dtype", "fp32",
            "--batch-rows", "4", "--eval-rows", "6", "--eval-every", "0", "--eval-calls", "0", "--save-every", "2",
            "--lr", "3e-3", "--data-cache", str(demo / "tokens"), *map(str, more)]


def run(demo, out, *more):
    return train.main(train.parse_args(flags(demo, out, *more)))


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [record["loss"] for record in log(out) if "loss" in record]


def start(demo, out, *more):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags(demo, out, *more)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})


def wait_for_step(process, step):
    for line in process.stdout:
        if re.match(rf"step +{step}/", line):
            return
    raise AssertionError(process.stderr.read())


FULL = ("--full",)
LORA = ("--lora-rank", 4, "--lora-dropout", 0.3)


# What a run writes


def test_the_log_holds_flags_and_versions_then_one_record_a_step_and_the_held_out_losses(demo, tmp_path, capsys):
    assert run(demo, tmp_path / "run", *FULL, "--steps", 3) == 0
    header, *records = log(tmp_path / "run")
    assert header["flags"]["lr"] == 3e-3 and header["torch"] == torch.__version__ and "CPU" in header["device"]
    assert [record["step"] for record in records] == [0, 1, 2, 3, 3]
    assert all(set(record) == RECORD for record in records[1:4])
    assert set(records[0]) == set(records[-1]) == {"step", "eval_loss"}
    assert re.search(r"step +2/3 \| loss \d\.\d{4} \| grad \d+\.\d\d \| lr \d\.\de-\d\d \| [\d.]+k? tok/s \| \d+\.\d GiB \| .*s left", capsys.readouterr().out)


def test_training_learns_and_the_result_is_a_model_folder(demo, tmp_path):
    run(demo, tmp_path / "run", *FULL, "--steps", 30, "--batch-rows", 8)
    held_out = [record["eval_loss"] for record in log(tmp_path / "run") if "eval_loss" in record]
    assert held_out[-1] < 0.6 * held_out[0]
    model = load_model(tmp_path / "run" / "model")
    assert model.logits(torch.tensor([[2, 105]])).shape == (1, 2, model.config.vocab_size)
    assert (tmp_path / "run" / "model" / "tokenizer.model").exists()


def test_lora_trains_adapters_alone_and_peft_loads_them_with_the_same_logits(demo, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    run(demo, tmp_path / "run", "--steps", 5, "--lora-rank", 4, "--lora-alpha", 8, "--rslora")
    ours = load_model(demo / "model", torch.float32)
    ids = torch.randint(110, 1000, (1, 200), generator=torch.Generator().manual_seed(0))
    base = ours.logits(ids)
    load_adapter(ours, tmp_path / "run")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(demo / "model", dtype=torch.float32), str(tmp_path / "run" / "adapter"))
    got = ours.logits(ids)
    assert (got - base).abs().max() > 0.05
    torch.testing.assert_close(got, theirs(ids).logits, rtol=1e-3, atol=1e-3)


def test_the_result_is_the_best_held_out_loss(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 3e-3 if step < 8 else 3.0)        # learns, then ruins itself
    run(demo, tmp_path / "run", *FULL, "--steps", 12, "--eval-every", 2)
    held_out = {record["step"]: record["eval_loss"] for record in log(tmp_path / "run") if "eval_loss" in record and record["step"]}
    assert min(held_out, key=held_out.get) != 12, "the last step was the best: this run shows nothing"
    model = load_model(tmp_path / "run" / "model", torch.float32)
    tokenizer = Tokenizer.load(demo / "model")
    rows = [row for row in read_rows([demo / "rows.jsonl"]) if query_hash(row.query) < 0.05]
    rows = sorted(rows, key=lambda row: query_hash(row.query))[:6]
    batch = pack([tokenize(row, tokenizer) for row in rows], 10_000)[0]
    loss = linear_cross_entropy(model(batch.tokens, batch.positions, batch.documents)[batch.loss_rows], model.head, batch.targets).item() / batch.loss_tokens
    assert loss == pytest.approx(min(held_out.values()), rel=0.05)       # the folder holds bf16


def test_steps_0_checks_everything_and_writes_nothing(demo, tmp_path, capsys):
    assert run(demo, tmp_path / "run", "--steps", 0) == 0
    assert "the first row's loss is" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_preview_shows_the_tokens_that_carry_loss_in_green(demo, tmp_path, capsys):
    assert run(demo, tmp_path / "run", "--preview", 3) == 0
    green = re.findall("\033\\[32m(.*?)\033\\[0m", capsys.readouterr().out, flags=re.DOTALL)
    assert len(green) == 3
    assert all(text.startswith("<start_function_call>") and text.endswith("<start_function_response>") for text in green)


# The gradient is the global batch's


@pytest.mark.parametrize("mode", [FULL, LORA], ids=["full", "lora"])
def test_losses_do_not_depend_on_how_a_step_is_cut_into_forward_passes(demo, tmp_path, mode):
    run(demo, tmp_path / "whole", *mode, "--steps", 6, "--micro-tokens", 100_000)
    run(demo, tmp_path / "cut", *mode, "--steps", 6, "--micro-tokens", 200)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4 if mode == FULL else 1e-5)


def test_a_step_can_be_sized_in_tokens(demo, tmp_path):
    arguments = flags(demo, tmp_path / "run", *FULL, "--steps", 4, "--batch-tokens", 1000)
    at = arguments.index("--batch-rows")
    train.main(train.parse_args(arguments[:at] + arguments[at + 2:]))
    assert all(600 < record["tokens"] <= 1000 for record in log(tmp_path / "run") if "loss" in record)


def test_dropout_is_drawn_anew_each_step_and_makes_a_difference_to_the_losses(demo, tmp_path, monkeypatch):
    seeds, usual = [], loss_module.set_dropout_masks
    def set_dropout_masks(model, keys, seed, rows):
        if model.training:
            seeds.append(seed)
        usual(model, keys, seed, rows)

    monkeypatch.setattr(loss_module, "set_dropout_masks", set_dropout_masks)
    for name, more in (("with", ()), ("without", ("--lora-dropout", 0)), ("other", ("--seed", 1))):
        run(demo, tmp_path / name, *LORA, "--steps", 3, "--micro-tokens", 300, *more)
    assert len(seeds) > 9 and len(set(seeds)) == 6                      # the passes of a step have one; the second run has the first one's
    once, never = losses(tmp_path / "with"), losses(tmp_path / "without")
    assert once[0] == pytest.approx(never[0], rel=1e-6)                 # B starts at zero: the first loss sees no adapter
    assert once[1:] != pytest.approx(never[1:], rel=1e-4)               # far more than the losses above may differ


@pytest.mark.parametrize("mode, processes", [(LORA, 2), (FULL, 2), ((*FULL, "--shard"), 2), (FULL, 3)],
                         ids=["lora", "full", "shard", "three-with-nothing-for-one"])
def test_several_processes_give_the_losses_answers_and_model_of_one(demo, tmp_path, mode, processes):
    rows = ("--batch-rows", 2) if processes == 3 else ()
    more = (*rows, "--steps", 5, "--micro-tokens", 200, "--eval-calls", 3, "--eval-every", 3)
    run(demo, tmp_path / "one", *(flag for flag in mode if flag != "--shard"), *more)
    done = torchrun(processes, "train.py", *flags(demo, tmp_path / "some", *mode, *more))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step     5/5 | loss") == 1                         # rank 0 alone prints
    one, some = log(tmp_path / "one"), log(tmp_path / "some")
    assert some[0]["processes"] == processes and [list(record) for record in some[1:]] == [list(record) for record in one[1:]]
    assert losses(tmp_path / "some") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    for a, b in zip(one[1:], some[1:], strict=True):
        assert a.get("eval_loss", 0.0) == pytest.approx(b.get("eval_loss", 0.0), rel=1e-5) and a.get("exact_match") == b.get("exact_match")
    answers = [json.loads((tmp_path / name / "calls" / "step-000000.json").read_text())["answers"] for name in ("one", "some")]
    assert [a["text"] for a in answers[0]] == [a["text"] for a in answers[1]] and len(answers[0]) == 3
    file = "adapter/adapter_model.safetensors" if "--lora-rank" in mode else "model/model.safetensors"
    mine, theirs = (read_tensors(tmp_path / name / file) for name in ("one", "some"))
    assert all((mine[name].float() - theirs[name].float()).abs().max() < 2e-2 for name in mine) and set(mine) == set(theirs)


def test_a_fault_that_all_processes_meet_is_told_once_and_one_of_a_rank_names_it(demo, tmp_path):
    done = torchrun(2, "train.py", *flags(demo, tmp_path / "run"), "--data", "nowhere.jsonl")
    assert done.returncode != 0 and done.stderr.count("nowhere.jsonl: no such file") == 1 and "train.py: rank 0: nowhere" in done.stderr


def test_activations_that_are_computed_again_change_no_loss(demo, tmp_path):
    run(demo, tmp_path / "kept", *LORA, "--steps", 3)
    run(demo, tmp_path / "again", *LORA, "--steps", 3, "--checkpoint-activations")
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")


# Broken and resumed


@pytest.mark.parametrize("mode", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("killed_after", [1, 5])
def test_a_run_killed_at_any_step_resumes_to_the_same_losses_bit_for_bit(demo, tmp_path, mode, killed_after):
    run(demo, tmp_path / "whole", *mode, "--steps", 7, "--eval-every", 3)
    process = start(demo, tmp_path / "killed", *mode, "--steps", 7, "--eval-every", 3)
    wait_for_step(process, killed_after)
    process.kill()
    process.communicate()
    assert run(demo, tmp_path / "killed", *mode, "--steps", 7, "--eval-every", 3, "--resume") == 0
    resumed = [record["resumed_at"] for record in log(tmp_path / "killed") if "resumed_at" in record][-1]
    assert killed_after == 1 or resumed >= 2
    without_times = [[{key: record.get(key) for key in ("step", "loss", "grad_norm", "lr", "eval_loss")} for record in log(tmp_path / name)
                      if "step" in record] for name in ("whole", "killed")]
    assert without_times[0] == without_times[1]
    final = [find_checkpoints(tmp_path / name)[-1] / "trained.safetensors" for name in ("whole", "killed")]
    assert final[0].read_bytes() == final[1].read_bytes()


def test_a_run_goes_on_in_other_processes_and_cut_otherwise_to_the_same_losses(demo, tmp_path):
    more = *LORA, "--steps", 4, "--save-every", 2
    run(demo, tmp_path / "run", *more)
    whole = losses(tmp_path / "run")
    shutil.rmtree(find_checkpoints(tmp_path / "run")[-1])
    done = torchrun(2, "train.py", *flags(demo, tmp_path / "run", *more, "--resume", "--micro-tokens", 100, "--no-share-prefixes"))
    assert done.returncode == 0 and "at step 2" in done.stdout, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_cleanly(demo, tmp_path, number):
    process = start(demo, tmp_path / "run", *FULL, "--steps", 5000, "--save-every", 0)
    wait_for_step(process, 3)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors and "--resume" in out
    saved = find_checkpoints(tmp_path / "run")
    assert read_json(saved[-1] / "state.json")["step"] == len(losses(tmp_path / "run")) >= 3


def test_resuming_with_other_flags_is_refused(demo, tmp_path):
    run(demo, tmp_path / "run", *FULL, "--steps", 2)
    with pytest.raises(ValueError, match=r"--lr 0.003 → 0.1"):
        run(demo, tmp_path / "run", *FULL, "--steps", 2, "--resume", "--lr", "0.1")
    more = tmp_path / "more.jsonl"
    more.write_text((demo / "rows.jsonl").read_text() + json.dumps({"query": "zzz", "tools": [], "answers": []}) + "\n")
    rows = demo / "rows.jsonl"
    original = rows.read_text()
    try:
        rows.write_text(more.read_text())
        with pytest.raises(ValueError, match=r"was made with other training rows \(\d+ of .* than --data holds now .*provide the same files"):
            run(demo, tmp_path / "run", *FULL, "--steps", 2, "--resume")
        first, second, *others = original.splitlines()
        rows.write_text("\n".join([second, first, *others]))                       # as many rows and tokens
        with pytest.raises(ValueError, match="was made with other training rows"):
            run(demo, tmp_path / "run", *FULL, "--steps", 2, "--resume")
    finally:
        rows.write_text(original)


def test_epochs_end_a_run_that_is_given_more_steps(demo, tmp_path):
    run(demo, tmp_path / "run", *FULL, "--steps", 500, "--epochs", 0.03)
    records = log(tmp_path / "run")
    last = max(record["step"] for record in records if "loss" in record)
    assert last < 10 and records[-1] == {"step": last, "eval_loss": records[-1]["eval_loss"]}
    assert find_checkpoints(tmp_path / "run")[-1].name == f"step-{last:06d}"


def test_calls_are_counted_before_and_after_on_the_written_result(demo, tmp_path, capsys):
    run(demo, tmp_path / "run", *FULL, "--steps", 2, "--eval-calls", 5)
    assert [record["exact_match"] for record in log(tmp_path / "run") if "exact_match" in record] == [0.0, 0.0]
    said = capsys.readouterr().out
    assert said.count("exact match 0.0% | AST match 0.0% of 5 held-out queries") == 2 and said.count("  after   ") == 3
    assert sorted(path.name for path in (tmp_path / "run" / "calls").iterdir()) == ["step-000000.json", "step-000002.json"]
    assert (tmp_path / "run" / "report.html").exists()
    run(demo, tmp_path / "none", "--steps", 1, "--eval-calls", 5, "--eval-fraction", 0)         # nothing held out: nothing to count


def test_sources_with_weights_are_resumed_to_the_same_losses(demo, tmp_path, capsys, monkeypatch):
    lines = (demo / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:6]))
    (tmp_path / "b.jsonl").write_text("".join(lines[6:22]))
    weighted = ("--data", f"{tmp_path / 'a.jsonl'}*2,{tmp_path / 'b.jsonl'}*0.25", "--eval-fraction", 0, "--lora-rank", 4)
    run(demo, tmp_path / "whole", *weighted, "--steps", 7, "--save-every", 0)
    assert "16 rows per epoch, by the weights of --data" in capsys.readouterr().out
    learning_rate = train.learning_rate
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(train, "learning_rate", lambda step, *rest: learning_rate(step, *rest) / (step != 5))         # breaks in the second epoch
        run(demo, tmp_path / "broken", *weighted, "--steps", 7)
    run(demo, tmp_path / "broken", *weighted, "--steps", 7, "--resume")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


@pytest.mark.parametrize("mode", [FULL, ("--lora-rank", 4)], ids=["full", "lora"])
def test_what_a_run_told_its_model_is_what_answers_are_asked_with(demo, tmp_path, mode, monkeypatch):
    """By generate.py and evaluate.py, by the run's name alone and after an export, unless they are told otherwise."""
    import evaluate
    import export
    import generate
    (tmp_path / "text").write_text("You call functions of a boat.\n")
    run(demo, tmp_path / "run", *mode, "--steps", 1, "--system", f"@{tmp_path / 'text'}")
    tuned = ["--model" if mode == FULL else "--adapter", str(tmp_path / "run")]
    export.main(export.parse_args([*tuned, "--out", str(tmp_path / "exported")]))
    (tmp_path / "tools.json").write_text('[{"name": "sail"}]')
    tokenizer, heard = Tokenizer.load(demo / "model"), []

    def stream(_model, prompts, *_, **__):
        heard.extend(tokenizer.decode(prompt).split("<start_function_declaration>")[0] for prompt in prompts)
        return ((i, [106]) for i in range(len(prompts)))
    monkeypatch.setattr("inference.decoding.stream", stream)
    monkeypatch.setattr(evaluate, "stream", stream)
    for model in (tuned, ["--model", str(tmp_path / "exported")], [*tuned, "--system", "Another."], ["--model", str(demo / "model")]):
        evaluate.main(evaluate.parse_args([*model, "--data", str(demo / "rows.jsonl"), "--limit", "1"]))
        generate.main(generate.parse_args([*model, "--tools", str(tmp_path / "tools.json"), "sail"]))
    told = [text.removeprefix("<bos><start_of_turn>developer\n") for text in heard]
    assert told == ["You call functions of a boat."] * 4 + ["Another."] * 2 + [DEVELOPER_TEXT] * 2
    with pytest.raises(ValueError, match=r"--system .* → Another"):
        run(demo, tmp_path / "run", *mode, "--steps", 2, "--resume", "--system", "Another.")


def test_an_earlier_run_is_not_overwritten_unasked(demo, tmp_path):
    run(demo, tmp_path / "run", *FULL, "--steps", 2)
    with pytest.raises(ValueError, match="--resume to continue it"):
        run(demo, tmp_path / "run", *FULL, "--steps", 3)
    assert run(demo, tmp_path / "run", *FULL, "--steps", 3, "--overwrite") == 0
    assert len(losses(tmp_path / "run")) == 3


# Failures


def test_a_nan_stops_the_run_names_the_row_and_ruins_no_checkpoint(demo, tmp_path, monkeypatch):
    """The loss is made NaN where "Vienna" is to be said."""
    tokenizer = Tokenizer.load(demo / "model")
    piece = tokenizer.encode("Vienna")[0]
    examples = [tokenize(row, tokenizer) for row in read_rows([demo / "rows.jsonl"])]
    bad = {example.source for example in examples if piece in example.ids[example.loss_mask]}
    assert 0 < len(bad) < 60

    def poisoned(hidden, weight, targets, **more):
        return linear_cross_entropy(hidden, weight, targets, **more) * (math.nan if (targets == piece).any() else 1.0)

    monkeypatch.setattr("model.linear_cross_entropy", poisoned)
    with pytest.raises(FloatingPointError, match=r"loss nan") as error:
        run(demo, tmp_path / "run", "--lora-rank", 4, "--steps", 200, "--save-every", 1, "--eval-fraction", 0)
    named = re.search(r"Its worst rows: (rows\.jsonl:\d+) \(loss nan\)", str(error.value)).group(1)
    assert named in bad
    saved = find_checkpoints(tmp_path / "run")
    assert 1 <= len(saved) <= 2
    for path in saved:
        assert all(tensor.isfinite().all() for tensor in read_tensors(path / "trained.safetensors").values())


def test_an_exploding_gradient_stops_the_run_and_leaves_the_model_as_it_was(demo, tmp_path, monkeypatch):
    models, describe = [], train.describe_failure
    monkeypatch.setattr(train, "describe_failure", lambda model, *more: models.append(model.state_dict()) or describe(model, *more))
    with pytest.raises(FloatingPointError, match=r"gradient norm .*worst rows: rows\.jsonl:\d+"):
        run(demo, tmp_path / "run", *FULL, "--steps", 3, "--max-grad-norm", 1e-3)
    assert find_checkpoints(tmp_path / "run") == [] and losses(tmp_path / "run") == []
    before = load_model(demo / "model", torch.float32).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in models[0].items())


def test_errors_are_one_line_with_the_place_and_no_traceback(demo, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((demo / "rows.jsonl").read_text() + '{"query": "x"}\n')
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags(demo, tmp_path / "run"), "--data", str(bad)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == ("train.py: bad.jsonl:601: no column 'tools', 'answers'; a row has \"query\", \"tools\" and \"answers\", "
                                   "or \"messages\" and \"tools\"; fix the row or pass --skip-invalid")


def test_skipped_and_dropped_rows_are_counted(demo, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text((demo / "rows.jsonl").read_text() + '{"query": "x"}\n[]\n')
    run(demo, tmp_path / "run", "--steps", 0, "--data", bad, "--skip-invalid", "--max-tokens", 200)
    said = capsys.readouterr().out
    assert "1 rows skipped: missing column" in said and "1 rows skipped: not an object" in said
    assert re.search(r"\d+ training rows dropped: longer than 200 tokens", said)


def test_a_query_that_is_held_out_is_never_trained_on(demo, tmp_path, capsys):
    some = [json.loads(line) for line in (demo / "rows.jsonl").read_text().splitlines()[:20]]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({**row, "query": row["query"].upper()}) + "\n" for row in some))
    args = train.parse_args(flags(demo, tmp_path / "run", "--eval-data", tmp_path / "eval.jsonl"))
    run = Run(args, 0, 1, torch.device("cpu"))
    trained, held_out, _ = load_datasets(run, demo / "model", Tokenizer.load(demo / "model"))
    queries = [json.loads(line)["query"].casefold() for line in (demo / "rows.jsonl").read_text().splitlines()]
    assert not {queries[int(example.source.partition(":")[2]) - 1] for example in trained} & {
        held_out.conversation(i).query.casefold() for i in range(len(held_out))}
    assert len(held_out) == 6 and len(trained) == 580 and "20 training rows left out" in capsys.readouterr().out


# Flags


def test_the_learning_rate_warms_up_and_decays():
    args = train.parse_args(["--model", "m", "--data", "d", "--lr", "1.0", "--min-lr", "0.1"])
    rates = [train.learning_rate(step, 100, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55) and rates[99] == pytest.approx(0.1, abs=1e-3)
    args.schedule = "linear"
    assert train.learning_rate(55, 100, args) == pytest.approx(0.55) and train.learning_rate(99, 100, args) == pytest.approx(0.11)
    args.schedule = "constant"
    assert train.learning_rate(99, 100, args) == 1.0


@pytest.mark.parametrize("bad", [["--batch-rows", "0"], ["--batch-rows", "2", "--batch-tokens", "9"], ["--steps", "-1"], ["--lr", "x"]])
def test_impossible_flags_are_refused(bad):
    with pytest.raises(SystemExit) as left:
        train.parse_args(["--model", "m", "--data", "d", *bad])
    assert left.value.code == 2


@pytest.mark.parametrize("can", [True, False])
def test_a_device_that_cannot_multiply_bf16_computes_in_fp32(demo, tmp_path, monkeypatch, capsys, can):
    for file in (pretrained, train):
        monkeypatch.setattr(file, "multiplies_bf16", lambda device: can)
    unasked = train.parse_args(flags(demo, tmp_path, "--dtype", "auto", "--steps", 0))
    assert unasked.dtype == ("bf16" if can else "fp32")
    assert load_tuned(str(demo / "model"), None)[0].compute_dtype == (torch.bfloat16 if can else torch.float32)
    for dtype, warned in (("fp32", False), ("bf16", not can)):
        run(demo, tmp_path, "--dtype", dtype, "--steps", 0)
        said = capsys.readouterr().out
        assert f"{dtype} on CPU" in said and ("use --dtype fp32" in said) == warned


@NEEDS_COMPILER
def test_compiled_norms_give_the_same_losses(demo, tmp_path, monkeypatch):
    chosen, load = [], train.load_model
    monkeypatch.setattr(train, "load_model", lambda *of, **more: chosen.append(load(*of, **more)) or chosen[-1])
    for way in ((), ("--compile",)):
        run(demo, tmp_path / f"run{len(way)}", *LORA, "--steps", 3, *way)
    assert [model.backends for model in chosen] == [Backends(), Backends(rms_norm="compiled", geglu="compiled")]
    assert losses(tmp_path / "run1") == pytest.approx(losses(tmp_path / "run0"), rel=1e-5)


def test_compiling_without_a_compiler_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        train.parse_args(["--model", "m", "--data", "d", "--compile"])
    assert "install g++ or clang++, or name yours in CXX" in capsys.readouterr().err


def test_every_flag_has_a_help_text():
    text = subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True, check=True).stdout
    assert "None" not in text
    for flag in ("--model", "--data", "--out", "--steps", "--epochs", "--batch-rows", "--batch-tokens", "--max-tokens", "--lr", "--lora-rank",
                 "--lora-alpha", "--full", "--dtype", "--device", "--seed", "--save-every", "--eval-every", "--resume", "--preview"):
        assert re.search(rf"^  {flag}\b.*\S", text, flags=re.MULTILINE), flag


# Prefixes that rows share


@pytest.mark.parametrize(("given", "shares"), [([], True), (["--share-prefixes"], True), (["--no-share-prefixes"], False), (["--share-beginnings"], True),
                                               (["--no-share-beginnings"], False), (["--no-share-beginnings", "--share-prefixes"], True)])
def test_share_prefixes_is_still_called_by_its_old_name(given, shares, capsys):
    args = train.parse_args(["--model", "m", "--data", "d", *given])
    assert args.share_prefixes is shares and not hasattr(args, "share_beginnings")
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = capsys.readouterr().out
    assert "--no-share-prefixes" in text and "beginnings" not in text


@pytest.mark.parametrize("mode", [FULL, LORA], ids=["full", "lora"])
def test_a_shared_prefix_is_computed_once_to_the_same_losses_and_gradients(demo, tmp_path, mode):
    """Rows with one set of tools, some of them longer than the window; several forward passes a step."""
    rows = [json.loads(line) for line in (demo / "rows.jsonl").read_text().splitlines()][:40]
    every = {tool["name"]: tool for row in rows for tool in json.loads(row["tools"])}
    (tmp_path / "one_set.jsonl").write_text("".join(json.dumps(row | {"tools": list(every.values())}) + "\n" for row in rows))
    for name, flag in (("once", "--share-prefixes"), ("each", "--no-share-prefixes")):
        run(demo, tmp_path / name, *mode, "--steps", 6, "--data", tmp_path / "one_set.jsonl", "--micro-tokens", 1200, "--batch-rows", 6, flag)
    once, each = log(tmp_path / "once"), log(tmp_path / "each")
    for a, b in zip(once, each, strict=True):
        for key in ("loss", "grad_norm", "eval_loss"):
            assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), rel=1e-5 if mode == LORA and key == "loss" else 1e-4)
        if "loss" in a:
            assert a["tokens"] == b["tokens"] == b["computed_tokens"] > 2 * a["computed_tokens"]


# Kernels


@pytest.mark.slow
@INTERPRETED
@pytest.mark.parametrize("flags", [LORA, ("--lora-targets", "q_proj,up_proj", "--lora-rank", 3)], ids=["all", "some"])
def test_training_by_kernels_gives_the_losses_of_training_by_pytorch(demo, tmp_path, flags):
    for kernels in ("torch", "triton"):
        run(demo, tmp_path / kernels, *flags, "--steps", 4, "--batch-rows", 2, "--kernels", kernels)
    assert losses(tmp_path / "triton") == pytest.approx(losses(tmp_path / "torch"), rel=1e-5)


BY_KERNELS = Backends(attention="triton", rms_norm="triton", geglu="triton", cross_entropy="triton")     # interpreted on a CPU


def losses_of(demo, steps, full, choice, backends):
    """Of plain steps in fp16 (the interpreter's bf16 products are wrong); choice: how adapters are computed."""
    tuned = load_model(demo / "model", torch.float16, master_dtype=torch.float32 if full else torch.float16)
    tuned.set_backends(backends)
    if not full:
        wrap(tuned, LoRAConfig(rank=4), torch.Generator().manual_seed(0))
        choose_kernels(tuned, choice, 64)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-3, fused=True)
    tokenizer = Tokenizer.load(demo / "model")
    examples = [tokenize(row, tokenizer) for row in itertools.islice(read_rows([demo / "rows.jsonl"]), 100)]
    lengths, seen = [len(example) for example in examples], []
    for rows, _ in itertools.islice(sampler.steps(lengths, 0, batch_rows=1), steps):
        [batch] = pack([examples[row] for row in rows], 4096)
        loss = train.loss_sum(tuned, batch) / batch.loss_tokens
        (64 * loss).backward()                                                  # small gradients would be 0 in fp16
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad /= 64
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


@pytest.mark.slow
@INTERPRETED
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_all_kernels_together_give_the_losses_of_pytorch(demo, full):
    plain = losses_of(demo, 3, full, "torch", Backends())
    together = losses_of(demo, 3, full, "triton", BY_KERNELS)
    assert together != plain and together == pytest.approx(plain, rel=3e-3)


def test_kernels_that_cannot_run_here_are_refused_with_the_remedy(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("ops.triton_utils.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"--kernels triton: .* need a CUDA device .* this is cpu; use --kernels auto"):
        run(demo, tmp_path / "run", "--kernels", "triton")


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", [FULL, ("--lora-rank", 4)], ids=["full", "lora"])
def test_a_gpu_trains_to_the_losses_of_a_cpu(demo, tmp_path, mode):
    torch.backends.cuda.matmul.allow_tf32 = False
    run(demo, tmp_path / "cpu", *mode, "--steps", 10)
    run(demo, tmp_path / "cuda", *mode, "--steps", 10, "--device", "cuda")
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
    run(demo, tmp_path / "bf16", *mode, "--steps", 10, "--device", "cuda", "--dtype", "bf16")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "cpu"), rel=3e-2)
    run(demo, tmp_path / "graph", *mode, "--steps", 10, "--device", "cuda", "--dtype", "bf16", "--cuda-graph")
    assert losses(tmp_path / "graph") == pytest.approx(losses(tmp_path / "bf16"), rel=1e-2)
