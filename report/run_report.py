"""One page about a run: report.html in its folder, for a browser, a phone or paper, with nothing to fetch.

    python evaluate.py --report runs/mine
    python train.py --model MODEL --data rows.jsonl --survey --out DIR      # DIR/data.html: the rows alone

`write` reads what training and evaluation left there (config.json, log.jsonl, data.json, calls/step-NNNNNN.json): accuracy
before and after, curves, causes of misses, answers side by side, the data, flags; `write_data` takes a survey's figures.
There is no script, the charts are SVG drawn here, and what rows and flags say gets into the page by way of `text` alone.
"""
from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from checkpoint import read_json
from report.answers import answers
from report.charts import Line, bar, figure, smooth
from report.data_report import rows_of
from report.formatting import bounds, duration, interval, number, part, percent, short, text
from report.page import table, write_page

METRICS = (("exact_match", "Exact match", "rows"), ("ast_match", "AST match", "rows"), ("name_accuracy", "Function names", "rows"),
           ("argument_precision", "Argument precision", ""), ("argument_recall", "Argument recall", ""),
           ("parse_failures", "Unreadable answers", "rows"), ("correct_silence", "Correct silence", "no_call_rows"))


def write(run: Path) -> Path:
    """Write report.html into a run's folder; returns its path.

    Raises FileNotFoundError where there is no log.jsonl; ValueError where there is neither a step nor an evaluation, or
    where config.json or a file in calls/ is not JSON.
    """
    run = Path(run)
    headers, steps, held_out, evaluations = read_log(run / "log.jsonl")
    for path in (run / "calls").glob("step-*.json"):
        if (digits := path.stem.removeprefix("step-")).isdecimal() and isinstance(found := read_json(path), dict):
            evaluations[int(digits)] = found
    if not (steps or held_out or evaluations):
        raise ValueError(f"{run / 'log.jsonl'}: holds no step and no evaluation; train for a step, or evaluate, and then write the report")
    flags = read_json(run / "config.json") if (run / "config.json").exists() else next((header["flags"] for header in headers), None)
    flags = flags if isinstance(flags, dict) else {}
    ends = [(step, evaluations[step]) for step in sorted({min(evaluations), max(evaluations)})] if evaluations else []
    surveyed = read_json(run / "data.json") if (run / "data.json").exists() else {}
    sections = (("Accuracy", accuracy(ends)), ("By file", files(ends)), ("Training", curves(steps, held_out, evaluations)),
                ("Causes of misses", causes(ends)), ("Answers", answers(ends)), ("Data", rows_of(surveyed)),
                ("Flags and versions", settings(flags, headers)))
    return write_page(run / "report.html", run.resolve().name, result(flags, headers, steps, held_out, ends), sections)


def read_log(path: Path) -> tuple[list[dict], dict[int, dict], dict[int, Any], dict[int, dict]]:
    """The headers; and, by ascending step: the records, the held-out losses (nats a trained token), the evaluations."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give the folder of a run (--out of train.py)")
    headers, steps, held_out, evaluations = [], {}, {}, {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue                                      # the line that a kill tore
        step = number(record.get("step")) if isinstance(record, dict) else None
        if step is None:
            headers += [record] if isinstance(record, dict) and "flags" in record else []
        elif "loss" in record:
            steps[int(step)] = record
        elif "eval_loss" in record:
            held_out[int(step)] = record["eval_loss"]
        elif "exact_match" in record:
            evaluations[int(step)] = record
    return headers, dict(sorted(steps.items())), dict(sorted(held_out.items())), evaluations


def result(flags: dict, headers: list[dict], steps: dict, held_out: dict, ends: list) -> str:
    """The run in a sentence."""
    said = []
    losses = [[loss for loss in values if number(loss) is not None]
              for values in (held_out.values(), (record["loss"] for record in steps.values()))]
    after = ends[-1][1] if ends else {}
    if number(after.get("exact_match")) is not None:
        shares = [percent(evaluation["exact_match"]) for _, evaluation in ends if number(evaluation.get("exact_match")) is not None]
        ranged = f' (<span class="whole">95\u202f%</span> interval <span class="whole">{interval(after, "exact_match")}</span>)'
        said.append(f"Exact match {' → '.join(shares)}" + (ranged if interval(after, "exact_match") else "")
                    + (f" on {after['rows']:,.0f} held-out queries" if number(after.get("rows")) else ""))
    elif any(losses):
        name, found = ("Held-out", losses[0]) if losses[0] else ("Training", losses[1])
        said.append(f"{name} loss {short(found[0])} → {short(min(found) if losses[0] else found[-1])}")
    if steps:
        planned, seconds = number(flags.get("steps")) or 0, sum(number(record.get("seconds")) or 0 for record in steps.values())
        said.append(f"{max(steps):,}" + (f" of {planned:,.0f}" if planned > max(steps) else "") + " steps")
        said += [duration(seconds)] if seconds else []
    said += [text(header["device"], 80) for header in headers[-1:] if header.get("device")]
    return ", ".join(said)


def column_heads(ends: list) -> list[str]:
    return [f"{word}step {step:,}" for word, (step, _) in zip(("before<br>", "after<br>") if len(ends) == 2 else ("",), ends, strict=False)]


def accuracy(ends: list) -> str:
    """METRICS with intervals and counts, before and after."""
    rows = []
    for key, label, unit in METRICS:
        row, values = [label], [number(evaluation.get(key)) for _, evaluation in ends]
        for value, (_, evaluation) in zip(values, ends, strict=True):
            of = number(evaluation.get(unit))
            count = f"{value * of:,.0f} of {of:,.0f}" if of and value is not None else ""
            row.append((f"<b>{percent(value)}</b>" if evaluation is ends[-1][1] else percent(value)) + "".join(
                f"<small>{line}</small>" for line in (interval(evaluation, key), count) if line))
        if len(values) == 2:
            row.append("–" if None in values else f"{100 * (values[1] - values[0]):+.1f}".replace("-", "−"))
        rows += [row] if any(value is not None for value in values) else []
    note = ("Exact match is to the letter; AST match overlooks capitals, spaces and some punctuation. Precision: the right ones of the "
            "arguments given; recall: of the arguments wanted. Ranges are 95\u202f% intervals.")
    return table([*column_heads(ends), *["change,<br>points"] * (len(ends) == 2)], rows) + f'<p class="note">{note}</p>' if rows else ""


def files(ends: list) -> str:
    """The same for each file of held-out rows, where evaluation told them apart."""
    found = [part(evaluation, "files") for _, evaluation in ends]
    rows = []
    for name in sorted({name for entry in found for name in entry}):
        entries = [part(entry, name) for entry in found]
        count = number(entries[-1].get("rows"))
        row = [text(name, 160).replace("/", "/<wbr>") + ("" if count is None else f"<small>{count:,.0f} rows</small>")]
        for key, _, _ in METRICS[:3]:
            was = f"<small>was {percent(entries[0].get(key))}</small>" if len(entries) == 2 else ""
            row.append(f"<b>{percent(entries[-1].get(key))}</b>{was}")
        rows.append(row)
    return table([label.replace(" ", "<br>") for _, label, _ in METRICS[:3]], rows) if rows else ""


def curves(steps: dict[int, dict], held_out: dict, evaluations: dict[int, dict]) -> str:
    """Charts over the steps: accuracy, loss, learning rate, speed."""
    def series(key: str) -> list[tuple[int, float | None]]:
        return [(step, number(record.get(key))) for step, record in steps.items()]

    figures = []
    found = sorted(evaluations.items())
    lines = []
    for (key, _, _), name, tone in zip(METRICS, ("exact", "AST", "names"), ("first", "second", "third"), strict=False):
        points = [(step, 100 * value) for step, evaluation in found if (value := number(evaluation.get(key))) is not None]
        lines += [Line(name, tone, points, dots=True)] if len(points) > 1 else []
    if lines:
        band = [(step, *(100 * end for end in bounds(evaluation, "exact_match"))) for step, evaluation in found
                if bounds(evaluation, "exact_match")]
        note = "Shaded: the 95\u202f% interval of exact match." if len(band) > 1 else ""
        figures.append(figure("Accuracy", "% of held-out queries", lines, note, band=band))

    train, held = series("loss"), [(step, number(loss)) for step, loss in held_out.items()]
    best = min((point for point in held if point[1] is not None), key=lambda point: point[1], default=None)
    bad = [step for step, loss in train if loss is None]
    notes = [f"Held-out loss is lowest, {short(best[1])}, at step {best[0]:,}." if best else "",
             "Faint: every step." if len(train) > 1 else "",
             f"{len(bad):,} of {len(train):,} steps had no finite loss, the first of them step {bad[0]:,}." if bad else ""]
    figures.append(figure("Loss", "nats a trained token", [Line("", "first", train, faint=True), Line("train", "first", smooth(train)),
                                                           Line("held-out", "second", held, dots=True)],
                          " ".join(filter(None, notes)), log=True))

    figures.append(figure("Learning rate", "", [Line("", "first", series("lr"))]))
    speed = series("tokens_per_second")
    peak = max((number(record.get("peak_gib")) or 0 for record in steps.values()), default=0)
    middle = statistics.median([value for _, value in speed if value is not None] or [0])
    note = f"Median {short(middle)} tokens/s" + (f", at most {peak:.1f} GiB of memory." if peak else ".")
    figures.append(figure("Speed", "tokens/s", [Line("", "first", speed, faint=True), Line("", "first", smooth(speed))], note))
    return f'<div class="charts">{"".join(figures)}</div>' if any(figures) else ""


def causes(ends: list) -> str:
    """How many answers missed for which cause, before and after, as bars of one scale."""
    found = [{name: max(0, number(count) or 0) for name, count in part(evaluation, "causes").items()} for _, evaluation in ends]
    names = sorted({name for entry in found for name in entry},
                   key=lambda name: ([-entry.get(name, 0) for entry in reversed(found)], name))
    most = max((count for entry in found for count in entry.values()), default=0)
    if not most:
        return ""
    rows = []
    for name in names:
        rows.append([text(name, 80)])
        for entry, tone in zip(found, ("second", "first")[-len(found):], strict=True):
            count = entry.get(name, 0)
            rows[-1].append(bar(count, most, tone))
    return table(column_heads(ends), [*rows, ["all", *(f"{sum(entry.values()):,.0f}" for entry in found)]], "causes")


def settings(flags: dict, headers: list[dict]) -> str:
    """The flags, and what ran on what; folded."""
    tables = table([], [[text(key, 80), text(value, 300)] for key, value in flags.items()], "flags") if flags else ""
    for header in headers:
        resumed = number(header.get("resumed_at"))
        rows = [[key, text(header[key], 200)] for key in ("commit", "python", "torch", "device") if header.get(key)]
        tables += f"<h3>{f'Resumed at step {resumed:,.0f}' if resumed else 'Started'}</h3>{table([], rows, 'flags')}" if rows else ""
    return f"<details><summary>show</summary>{tables}</details>" if tables else ""
