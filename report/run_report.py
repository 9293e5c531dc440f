"""The report on a run: report.html in its folder, one file that opens in any browser and fetches nothing.

    python evaluate.py --report runs/mine

It shows what training and evaluation left in the folder (config.json, log.jsonl, data.json and
calls/step-NNNNNN.json): accuracy before and after, curves, causes of misses, answers side by side, the data
and the flags. Records may be torn, lack keys or come from an older version. Text from rows and flags enters
the page only through `html_text`.
"""
from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from report.answers import answers_section
from report.charts import Line, Points, bar, line_chart, running_mean
from report.data_report import data_section
from report.formatting import as_number, compact_number, duration, get_typed, html_text, percent
from report.page import table, write_page
from storage.atomic import read_json


class Metric(NamedTuple):
    key: str
    label: str
    total: str          # the key of the count that the metric is a fraction of; "" if it is not one of rows


METRICS = (
    Metric("exact_match", "Exact match", "rows"),
    Metric("ast_match", "AST match", "rows"),
    Metric("name_accuracy", "Function names", "rows"),
    Metric("argument_precision", "Argument precision", ""),
    Metric("argument_recall", "Argument recall", ""),
    Metric("parse_failures", "Unreadable answers", "rows"),
    Metric("correct_silence", "Correct silence", "no_call_rows"),
)
MAIN_METRICS = METRICS[:3]
METRICS_NOTE = (
    "Exact match is to the letter; AST match overlooks capitals, spaces and some punctuation. "
    "Precision: the right ones of the arguments given; recall: of the arguments wanted. "
    "Ranges are 95\u202f% intervals."
)


class RunLog(NamedTuple):
    """The records of log.jsonl, by ascending step."""

    headers: list[dict]                   # one for each start of the run: flags and versions
    steps: dict[int, dict]                # the record of each step
    held_out_losses: dict[int, Any]       # nats a trained token
    evaluations: dict[int, dict]


# The first and the last evaluation, each with its step; shorter if there are fewer than two.
BeforeAfter = list[tuple[int, dict]]


def write_run_report(run: Path) -> Path:
    """Write report.html into a run's folder; returns its path.

    Raises FileNotFoundError if there is no log.jsonl; ValueError if there is neither a step nor an evaluation
    or if config.json, data.json or a file in calls/ is not JSON.
    """
    run = Path(run)
    log = read_log(run / "log.jsonl")
    log.evaluations.update(read_evaluations(run / "calls"))
    if not (log.steps or log.held_out_losses or log.evaluations):
        raise ValueError(f"{run / 'log.jsonl'}: holds no step and no evaluation; "
                         "train for a step, or evaluate, and then write the report")
    flags = read_flags(run / "config.json", log.headers)
    row_stats = read_json(run / "data.json") if (run / "data.json").exists() else {}
    before_after = []
    if log.evaluations:
        first_and_last = sorted({min(log.evaluations), max(log.evaluations)})
        before_after = [(step, log.evaluations[step]) for step in first_and_last]
    sections = (
        ("Accuracy", accuracy_section(before_after)),
        ("By file", files_section(before_after)),
        ("Training", training_section(log)),
        ("Causes of misses", causes_section(before_after)),
        ("Answers", answers_section(before_after)),
        ("Data", data_section(row_stats)),
        ("Flags and versions", flags_section(flags, log.headers)),
    )
    return write_page(run / "report.html", run.resolve().name, headline(flags, log, before_after), sections)


# ------------------------------------------------------------------------------------------------------------
# Reading a run's folder


def read_log(path: Path) -> RunLog:
    """Read log.jsonl. Lines that are no JSON are skipped: a killed process may leave its last line torn."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give the folder of a run (--out of train.py)")
    log = RunLog([], {}, {}, {})
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict):
            continue
        step = as_number(record.get("step"))
        if step is None:
            if "flags" in record:
                log.headers.append(record)
        elif "loss" in record:
            log.steps[int(step)] = record
        elif "eval_loss" in record:
            log.held_out_losses[int(step)] = record["eval_loss"]
        elif "exact_match" in record:
            log.evaluations[int(step)] = record
    steps, held_out_losses = sorted(log.steps.items()), sorted(log.held_out_losses.items())
    return log._replace(steps=dict(steps), held_out_losses=dict(held_out_losses))


def read_evaluations(folder: Path) -> dict[int, dict]:
    """The evaluation of each step with a file step-NNNNNN.json in `folder`."""
    evaluations = {}
    for path in folder.glob("step-*.json"):
        digits = path.stem.removeprefix("step-")
        if digits.isdecimal() and isinstance(evaluation := read_json(path), dict):
            evaluations[int(digits)] = evaluation
    return evaluations


def read_flags(config: Path, headers: list[dict]) -> dict:
    """The run's flags: from config.json, or from the log if that is absent."""
    flags = read_json(config) if config.exists() else next((header["flags"] for header in headers), None)
    return flags if isinstance(flags, dict) else {}


# ------------------------------------------------------------------------------------------------------------
# The result in a sentence


def headline(flags: dict, log: RunLog, before_after: BeforeAfter) -> str:
    """The run in one sentence of HTML: its accuracy or loss, steps, time and device."""
    phrases = [accuracy_phrase(before_after) or loss_phrase(log)]
    if log.steps:
        last_step = max(log.steps)
        planned_steps = as_number(flags.get("steps")) or 0
        planned = f" of {planned_steps:,.0f}" if planned_steps > last_step else ""
        phrases.append(f"{last_step:,}{planned} steps")
        seconds = sum(as_number(record.get("seconds")) or 0 for record in log.steps.values())
        phrases.append(duration(seconds) if seconds else "")
    if log.headers and log.headers[-1].get("device"):
        phrases.append(html_text(log.headers[-1]["device"], 80))
    return ", ".join(phrase for phrase in phrases if phrase)


def accuracy_phrase(before_after: BeforeAfter) -> str:
    """Exact match before and after with its interval; "" if the last evaluation has none."""
    after = before_after[-1][1] if before_after else {}
    if as_number(after.get("exact_match")) is None:
        return ""
    values = [evaluation.get("exact_match") for _, evaluation in before_after]
    phrase = "Exact match " + " → ".join(percent(value) for value in values if as_number(value) is not None)
    interval = interval_text(after, "exact_match")
    if interval:
        phrase += f' (<span class="whole">95\u202f%</span> interval <span class="whole">{interval}</span>)'
    if as_number(after.get("rows")):
        phrase += f" on {after['rows']:,.0f} held-out queries"
    return phrase


def loss_phrase(log: RunLog) -> str:
    """The held-out loss, first and lowest, or the training loss, first and last; "" if there is neither."""
    held_out = [loss for loss in log.held_out_losses.values() if as_number(loss) is not None]
    training = [record["loss"] for record in log.steps.values() if as_number(record["loss"]) is not None]
    if held_out:
        return f"Held-out loss {compact_number(held_out[0])} → {compact_number(min(held_out))}"
    if training:
        return f"Training loss {compact_number(training[0])} → {compact_number(training[-1])}"
    return ""


# ------------------------------------------------------------------------------------------------------------
# Accuracy, in all and by file


def interval_bounds(evaluation: dict, key: str) -> list[float]:
    """Both ends of a metric's 95 % interval; empty if it has none."""
    bounds = [as_number(bound) for bound in get_typed(get_typed(evaluation, "intervals"), key, list)]
    return bounds if len(bounds) == 2 and None not in bounds else []


def interval_text(evaluation: dict, key: str) -> str:
    """The interval as "93.0–98.5 %"; "" if there is none."""
    bounds = interval_bounds(evaluation, key)
    return "–".join(f"{100 * bound:.1f}" for bound in bounds) + "\u202f%" if bounds else ""


def column_heads(before_after: BeforeAfter) -> list[str]:
    words = ("before<br>", "after<br>") if len(before_after) == 2 else ("",)
    return [f"{word}step {step:,}" for word, (step, _) in zip(words, before_after, strict=False)]


def accuracy_section(before_after: BeforeAfter) -> str:
    """Every metric with its interval and count, before and after, and the change."""
    rows = []
    for metric in METRICS:
        values = [as_number(evaluation.get(metric.key)) for _, evaluation in before_after]
        if all(value is None for value in values):
            continue
        *before, (_, after) = before_after
        cells = [metric_cell(evaluation, metric) for _, evaluation in before]
        cells.append(metric_cell(after, metric, bold=True))
        if before:
            cells.append("–" if None in values else f"{100 * (values[1] - values[0]):+.1f}".replace("-", "−"))
        rows.append([metric.label, *cells])
    if not rows:
        return ""
    head = column_heads(before_after)
    if len(before_after) == 2:
        head.append("change,<br>points")
    return table(head, rows) + f'<p class="note">{METRICS_NOTE}</p>'


def metric_cell(evaluation: dict, metric: Metric, bold: bool = False) -> str:
    """A metric as a percentage, with its interval and "193 of 200" in small print."""
    value, total = as_number(evaluation.get(metric.key)), as_number(evaluation.get(metric.total))
    small = [interval_text(evaluation, metric.key)]
    if total and value is not None:
        small.append(f"{value * total:,.0f} of {total:,.0f}")
    number = f"<b>{percent(value)}</b>" if bold else percent(value)
    return number + "".join(f"<small>{line}</small>" for line in small if line)


def files_section(before_after: BeforeAfter) -> str:
    """The main metrics for each file of held-out rows, if the evaluation has several."""
    by_file = [get_typed(evaluation, "files") for _, evaluation in before_after]
    rows = []
    for name in sorted({name for files in by_file for name in files}):
        evaluations = [get_typed(files, name) for files in by_file]
        heading = html_text(name, 160).replace("/", "/<wbr>")
        count = as_number(evaluations[-1].get("rows"))
        if count is not None:
            heading += f"<small>{count:,.0f} rows</small>"
        cells = []
        for metric in MAIN_METRICS:
            cell = f"<b>{percent(evaluations[-1].get(metric.key))}</b>"
            if len(evaluations) == 2:
                cell += f"<small>was {percent(evaluations[0].get(metric.key))}</small>"
            cells.append(cell)
        rows.append([heading, *cells])
    return table([metric.label.replace(" ", "<br>") for metric in MAIN_METRICS], rows) if rows else ""


# ------------------------------------------------------------------------------------------------------------
# Charts over the steps


def training_section(log: RunLog) -> str:
    """Charts over the steps: accuracy, loss, learning rate, speed."""
    learning_rate = Line("", "first", series(log, "lr"))
    charts = [
        accuracy_chart(sorted(log.evaluations.items())),
        loss_chart(log),
        line_chart("Learning rate", "", [learning_rate]),
        speed_chart(log),
    ]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def series(log: RunLog, key: str) -> Points:
    return [(step, as_number(record.get(key))) for step, record in log.steps.items()]


def accuracy_chart(evaluations: list[tuple[int, dict]]) -> str:
    lines = []
    styles = (("exact", "first"), ("AST", "second"), ("names", "third"))
    for metric, (name, tone) in zip(MAIN_METRICS, styles, strict=True):
        values = [(step, as_number(evaluation.get(metric.key))) for step, evaluation in evaluations]
        points = [(step, 100 * value) for step, value in values if value is not None]
        if len(points) > 1:
            lines.append(Line(name, tone, points, dots=True))
    intervals = [(step, interval_bounds(evaluation, "exact_match")) for step, evaluation in evaluations]
    band = [(step, 100 * bounds[0], 100 * bounds[1]) for step, bounds in intervals if bounds]
    note = "Shaded: the 95\u202f% interval of exact match." if len(band) > 1 else ""
    return line_chart("Accuracy", "% of held-out queries", lines, note, band=band)


def loss_chart(log: RunLog) -> str:
    training = series(log, "loss")
    held_out = [(step, as_number(loss)) for step, loss in log.held_out_losses.items()]
    finite = [(step, loss) for step, loss in held_out if loss is not None]
    lowest = min(finite, key=lambda point: point[1], default=None)
    not_finite = [step for step, loss in training if loss is None]
    notes = []
    if lowest:
        notes.append(f"Held-out loss is lowest, {compact_number(lowest[1])}, at step {lowest[0]:,}.")
    if len(training) > 1:
        notes.append("Faint: every step.")
    if not_finite:
        notes.append(f"{len(not_finite):,} of {len(training):,} steps had no finite loss, the first of them "
                     f"step {not_finite[0]:,}.")
    lines = [
        Line("", "first", training, faint=True),
        Line("train", "first", running_mean(training)),
        Line("held-out", "second", held_out, dots=True),
    ]
    return line_chart("Loss", "nats a trained token", lines, " ".join(notes), log=True)


def speed_chart(log: RunLog) -> str:
    speed = series(log, "tokens_per_second")
    median = statistics.median([value for _, value in speed if value is not None] or [0])
    peak_gib = max((as_number(record.get("peak_gib")) or 0 for record in log.steps.values()), default=0)
    note = f"Median {compact_number(median)} tokens/s"
    note += f", at most {peak_gib:.1f} GiB of memory." if peak_gib else "."
    lines = [Line("", "first", speed, faint=True), Line("", "first", running_mean(speed))]
    return line_chart("Speed", "tokens/s", lines, note)


# ------------------------------------------------------------------------------------------------------------
# Causes of misses; flags


def causes_section(before_after: BeforeAfter) -> str:
    """How many answers missed for which cause, before and after, as bars of one scale, commonest first."""
    by_evaluation = []
    for _, evaluation in before_after:
        causes = get_typed(evaluation, "causes")
        by_evaluation.append({name: max(0, as_number(count) or 0) for name, count in causes.items()})
    longest = max((count for counts in by_evaluation for count in counts.values()), default=0)
    if not longest:
        return ""

    def order(name: str) -> tuple:
        return [-counts.get(name, 0) for counts in reversed(by_evaluation)], name

    tones = ("second", "first")[-len(by_evaluation):]
    rows = []
    for name in sorted({name for counts in by_evaluation for name in counts}, key=order):
        cells = [html_text(name, 80)]
        for counts, tone in zip(by_evaluation, tones, strict=True):
            cells.append(bar(counts.get(name, 0), longest, tone))
        rows.append(cells)
    rows.append(["all", *(f"{sum(counts.values()):,.0f}" for counts in by_evaluation)])
    return table(column_heads(before_after), rows, "causes")


def flags_section(flags: dict, headers: list[dict]) -> str:
    """The flags, and the versions and device of each start; folded."""
    tables = ""
    if flags:
        rows = [[html_text(key, 80), html_text(value, 300)] for key, value in flags.items()]
        tables = table([], rows, "flags")
    for header in headers:
        resumed_at = as_number(header.get("resumed_at"))
        title = f"Resumed at step {resumed_at:,.0f}" if resumed_at else "Started"
        rows = []
        for key in ("commit", "python", "torch", "device"):
            if header.get(key):
                rows.append([key, html_text(header[key], 200)])
        if rows:
            tables += f"<h3>{title}</h3>{table([], rows, 'flags')}"
    return f"<details><summary>show</summary>{tables}</details>" if tables else ""
