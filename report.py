"""One page about a run: report.html in its folder, for a browser, a phone or paper, with nothing to fetch.

    python evaluate.py --report runs/mine
    python train.py --model MODEL --data rows.jsonl --survey --out DIR      # DIR/data.html: the rows alone

`write` reads what training and evaluation left there (config.json, log.jsonl, data.json, calls/step-NNNNNN.json): accuracy
before and after, curves, causes of misses, answers side by side, the data, flags; `write_data` takes the statistics of rows.
There is no script, the charts are SVG drawn here, and what rows and flags say gets into the page by way of `text` alone.
"""
from __future__ import annotations

import html
import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint import read_json, whole_file
from dataset.stats import describe

POINTS = 400                      # at most so many in a line
MISSES, HITS = 24, 6              # answers shown
METRICS = (("exact_match", "Exact match", "rows"), ("ast_match", "AST match", "rows"), ("name_accuracy", "Function names", "rows"),
           ("argument_precision", "Argument precision", ""), ("argument_recall", "Argument recall", ""),
           ("parse_failures", "Unreadable answers", "rows"), ("correct_silence", "Correct silence", "no_call_rows"))
# What has no face, or turns the line around.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")

STYLE = """
:root { color-scheme: light; --paper: #fff; --ink: #1b1f24; --muted: #5b6571; --rule: #d9dee4; --panel: #f4f6f8; --first: #1d63b0;
  --second: #b4530a; --third: #6b4fa8; --good: #17693f; --good-wash: #dff3e6; --bad: #ad1f1f; --bad-wash: #fce4e2; }
@media screen and (prefers-color-scheme: dark) { :root { color-scheme: dark; --paper: #14171b; --ink: #e4e7eb; --muted: #9aa5b1;
  --rule: #343b44; --panel: #1d2228; --first: #6cb0f5; --second: #f0a35e; --third: #b9a2f0; --good: #7fd6a3; --good-wash: #173826;
  --bad: #ff9d94; --bad-wash: #4a2020; } }
* { box-sizing: border-box; margin: 0; padding: 0; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 68rem; padding: clamp(1.25rem, 4vw, 3rem) clamp(1rem, 4vw, 2.5rem) 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { color: var(--muted); font-size: 1.1rem; font-weight: 600; }
h2 { margin: 2.75rem 0 .9rem; padding-top: .9rem; border-top: 1px solid var(--rule); font-size: 1.25rem; line-height: 1.3; }
h3 { margin: 1.75rem 0 .75rem; font-size: 1rem; }
h4, small, .note, thead, summary { color: var(--muted); font-size: .8rem; font-weight: 400; }
.result { margin-top: .35rem; max-width: 46rem; font-size: clamp(1.2rem, 1rem + 1vw, 1.5rem); font-weight: 600; line-height: 1.4; }
.note { margin-top: .6rem; max-width: 34rem; }

table { min-width: min(100%, 34rem); border-collapse: collapse; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem 0 .45rem clamp(.6rem, 2.5vw, 2.25rem); border-bottom: 1px solid var(--rule); font-weight: 400; text-align: right;
  vertical-align: baseline; }
th:first-child { min-width: 6.5rem; padding-left: 0; text-align: left; overflow-wrap: anywhere; }
td, thead, .whole { white-space: nowrap; }
td small, th small { display: block; }
.wide { overflow-x: auto; overflow-wrap: normal; }
.causes { width: 100%; max-width: 46rem; table-layout: fixed; }
.causes th, .causes td, .flags td, .facts td { text-align: left; }
.causes svg { display: block; width: 100%; height: .5rem; margin-top: .3rem; }
.flags td, .facts td { white-space: normal; overflow-wrap: anywhere; }

.charts { display: grid; gap: 2rem clamp(1.5rem, 4vw, 3rem); grid-template-columns: minmax(0, 1fr); max-width: 34rem; }
.charts h3 { margin: 0 0 .35rem; }
.chart { display: block; width: 100%; height: auto; overflow: visible; font-size: 12px; fill: var(--muted); }
.first { --tone: var(--first); } .second { --tone: var(--second); } .third { --tone: var(--third); }
.grid { stroke: var(--rule); } .mark, .label, .band { fill: var(--tone); } .label { font-weight: 600; } .band { opacity: .14; }
.line { fill: none; stroke: var(--tone); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke-width: 1; opacity: .35; }

article { padding: 1rem 0 .9rem; border-top: 1px solid var(--rule); }
.query { max-width: 46rem; font-size: 1.05rem; unicode-bidi: plaintext; }
.sides { display: grid; gap: .75rem; margin-top: .6rem; grid-auto-columns: minmax(0, 1fr); }
.side { padding: .6rem .8rem .7rem; border: 1px solid var(--panel); border-radius: 6px; background: var(--panel); }
.side:nth-child(3) { background: none; border-color: var(--rule); }
.side h4 { font-weight: 600; }
.call, pre, .flags td { font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
.call, .none { margin-top: .25rem; }
.none { color: var(--muted); font-size: .9rem; }
.call li { list-style: none; padding-left: 1.6em; text-indent: -1.6em; }
.call i { display: inline-block; width: 1.6em; text-align: center; text-indent: 0; font-style: normal; font-weight: 700; }
mark { padding: 0 .2em; border-radius: 3px; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
mark.wanted { background: var(--good-wash); } mark.wanted, .wanted i { color: var(--good); }
mark.given { background: var(--bad-wash); } mark.given, .given i { color: var(--bad); }
summary { padding: .35rem 0; cursor: pointer; }
pre { margin-bottom: .5rem; white-space: pre-wrap; }

@media (min-width: 44rem) { .sides { grid-auto-flow: column; } }
@media (min-width: 52rem), print { .charts { grid-template-columns: repeat(2, minmax(0, 1fr)); max-width: none; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } mark, .side { print-color-adjust: exact; }
  h2, h3 { break-after: avoid; } article, figure, tr { break-inside: avoid; } }
"""


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


def write_data(folder: Path, name: str, found: dict) -> Path:
    """Write data.html, about the statistics of rows (`dataset.stats.statistics`), into a folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    said = f"{found['kept']:,} of {found['rows']:,} rows can be trained on" if found["kept"] else "No row can be trained on"
    sections = (("In figures", figures_of(found)), ("Rows by their tokens", lengths_of(found)), ("Samples", samples_of(found)))
    return write_page(folder / "data.html", name, said, sections)


def write_page(path: Path, name: str, said: str, sections: Sequence[tuple[str, str]]) -> Path:
    """A whole page: its name, the sentence that says it all, and (heading, HTML) of each section that is not empty."""
    name = text(name)
    with whole_file(path) as temporary:
        temporary.write_text("\n".join([
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>",
            f'<p class="result">{said}</p>',
            *(f"<section><h2>{title}</h2>\n{content}\n</section>" for title, content in sections if content),
            "</body>\n</html>\n"]), encoding="utf-8")
    return path


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


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and text


def number(value: Any) -> float | None:
    """`value` as a float; None for what is no number, NaN and infinity among it."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100 else None


def part(evaluation: dict, key: str, kind: type = dict) -> Any:
    """What an evaluation has under `key`, empty where it is absent or of another kind."""
    return evaluation[key] if isinstance(evaluation.get(key), kind) else kind()


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def text(value: Any, limit: int = 400) -> str:
    """`value` for HTML: JSON unless it is a string, cut at `limit` characters, escaped; what is UNSAFE by its number."""
    whole = value if isinstance(value, str) else dump(value)
    cut = whole if len(whole) <= limit else f"{whole[:limit]} … ({len(whole):,} characters)"
    return html.escape(UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", cut))


def percent(value: Any) -> str:
    return "–" if number(value) is None else f"{100 * value:.1f}\u202f%"


def bounds(evaluation: dict, key: str) -> list[float]:
    """Both ends of the metric's 95 % interval; empty where there is none."""
    ends = [number(end) for end in part(part(evaluation, "intervals"), key, list)]
    return ends if len(ends) == 2 and None not in ends else []


def interval(evaluation: dict, key: str) -> str:
    """The same as "93.0–98.5 %"."""
    return "–".join(f"{100 * end:.1f}" for end in bounds(evaluation, key)) + "\u202f%" * bool(bounds(evaluation, key))


def short(value: float) -> str:
    """12.5k, 950, 0.011, 3e-4."""
    size = abs(value)
    if size >= 1e4:
        return f"{value / 1e3:.3g}k" if size < 1e6 else f"{value / 1e6:.3g}M"
    if size >= 1e-3 or not value:
        return f"{value:.0f}" if size >= 1e3 else f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of HTML cells; the first cell of each row is its heading."""
    heading = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    return (f'<div class="wide"><table class="{kind}">' + (f"<thead><tr><td></td>{heading}</tr></thead>\n" if head else "")
            + f"<tbody>{body}</tbody></table></div>")


# ---------------------------------------------------------------------------------------------------------------------
# The sections, each empty where its data is absent. ends: the first and the last evaluation, [(step, evaluation)]


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


def bar(count: float, most: float, tone: str) -> str:
    """A number over a bar, as long as it is of the most."""
    return (f'{count:,.0f}<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="mark {tone}" width="{100 * count / most:.2f}" height="8"/></svg>')


def answers(ends: list) -> str:
    """Answers of the last evaluation beside the expected ones: misses by cause, each cause in its turn, then hits."""
    found = [[answer for answer in part(evaluation, "answers", list) if isinstance(answer, dict)] for _, evaluation in ends] or [[]]
    before = {dump(answer["source"]): answer for answer in found[0] if answer.get("source") is not None} if len(found) == 2 else {}
    groups: dict[str, list[dict]] = {}
    for answer in found[-1]:
        groups.setdefault(str(answer.get("cause") or ("not to the letter" if answer.get("exact") is False else "")), []).append(answer)
    hits = groups.pop("", [])
    ordered = sorted(groups, key=lambda cause: -len(groups[cause]))
    turns = [cause for i in range(MISSES) for cause in ordered if i < len(groups[cause])]
    quota = Counter(turns[:MISSES])
    out = []
    for title, members, count in (*((f"Missed: {text(cause, 80)}", groups[cause], quota[cause]) for cause in quota), ("Right", hits, HITS)):
        if members:
            shown = f"{count} of {len(members):,}" if count < len(members) else f"{len(members):,}"
            out.append(f"<h3>{title} <small>{shown}</small></h3>")
            out += (sample(answer, before.get(dump(answer.get("source"))), ends) for answer in members[:count])
    return "\n".join(out)


def sample(answer: dict, before: dict | None, ends: list) -> str:
    """One query: the calls expected, given, and given before."""
    wanted, given = compare(answer.get("expected"), answer)
    sides = [("expected", wanted, None), (f"given, step {ends[-1][0]:,}", given, answer.get("text"))]
    if before:
        sides.append((f"before, step {ends[0][0]:,}", compare(answer.get("expected"), before)[1], before.get("text")))
    about = " · ".join(text(answer[key], 200) for key in ("source", "detail") if answer.get(key))
    raw = "".join(f"<h4>{name}</h4><pre>{text(said, 4_000)}</pre>" for name, _, said in sides if said)
    return (f'<article><p class="query">{text(answer.get("query") or "", 800)}</p><small>{about}</small>\n<div class="sides">'
            + "".join(f'<div class="side"><h4>{name}</h4>{calls}</div>' for name, calls, _ in sides) + "</div>"
            + (f"<details><summary>raw text</summary>{raw}</details>" if raw else "") + "</article>")


def compare(expected: Any, answer: dict) -> tuple[str, str]:
    """The expected and the given calls in HTML; every name and argument that differs, is missing or is too much is marked."""
    expected, given = ([call for call in calls if isinstance(call, dict)][:12] if isinstance(calls, list) else []
                       for calls in (expected, answer.get("given")))
    wanted, found, left = "", "", list(given)
    for call in expected:                                 # beside it the call most like it
        like = max(left, key=lambda other: (other.get("name") == call.get("name"), len(facts(other) & facts(call))), default=None)
        left = [other for other in left if other is not like]
        wanted += call_lines(call, like, "wanted")
        found += call_lines(like, call, "given") if like else f'<p class="none">no call of {text(call.get("name"), 120)}</p>'
    if not given:
        said = answer.get("text")
        found = '<p class="none">no call' + (f": {text(said, 120)}" if said else "") + "</p>"
    return wanted or '<p class="none">no call</p>', found + "".join(call_lines(call, None, "given") for call in left)


def arguments(call: dict) -> dict[str, Any]:
    given = call.get("arguments")
    return given if isinstance(given, dict) else {"arguments": given} if given else {}


def facts(call: dict) -> set[tuple[str, str]]:
    return {(key, dump(value)) for key, value in arguments(call).items()}


def call_lines(own: dict, other: dict | None, tone: str) -> str:
    """A call, one argument a line, marked where it is not as in the call of the other side."""
    mine, theirs = arguments(own), arguments(other or own)
    name = f"<b>{text(own.get('name'), 120)}</b>"
    if other is None or own.get("name") != other.get("name"):
        name = f'<mark class="{tone}">{"≠" if other else "+"} {name}</mark>'
    lines = []
    for key in [*mine, *(key for key in theirs if key not in mine and tone == "given")]:
        face = "−" if key not in mine else "+" if key not in theirs else "" if dump(mine[key]) == dump(theirs[key]) else "≠"
        shown = text(dump(mine[key]), 300) if key in mine else "absent"
        lines.append(f"<li><i>{face}</i>{text(key, 80)}: " + (f'<mark class="{tone}">{shown}</mark></li>' if face else f"{shown}</li>"))
    return f'<div class="call {tone}">{name}<ul>{"".join(lines)}</ul></div>'


def rows_of(found: dict) -> str:
    """The statistics of a run's training rows; the histogram and the samples are folded."""
    if not found:
        return ""
    folded = (("Rows by their tokens", lengths_of(found)), ("Samples", samples_of(found)))
    return figures_of(found) + "".join(f"<details><summary>{title}</summary>{content}</details>" for title, content in folded)


def figures_of(found: dict) -> str:
    return table([], [[text(what, 120), text(value, 1_000)] for what, value in describe(found)], "facts")


def lengths_of(found: dict) -> str:
    """How many rows have how many tokens, as bars."""
    if not found["kept"]:
        return ""
    start, width, counts = (found["histogram"][key] for key in ("from", "width", "rows"))
    borders = [start + i * width for i in range(len(counts) + 1)]
    return table([], [[f"{low:,} – {high - 1:,}", bar(count, max(counts), "first")]
                      for (low, high), count in zip(itertools.pairwise(borders), counts, strict=True)], "causes")


def samples_of(found: dict) -> str:
    """A few rows as the model sees them, what carries loss marked."""
    if not found["kept"]:
        return ""
    out = ['<p class="note">Marked: what the model is trained to say.</p>']
    for sample in found["samples"]:
        runs = "".join(f'<mark class="wanted">{text(piece, 9_000)}</mark>' if carries_loss else text(piece, 9_000)
                       for piece, carries_loss in sample["runs"])
        out.append(f"<article><small>{text(sample['source'], 200)} · {sample['tokens']:,} tokens</small><pre>{runs}</pre></article>")
    return "".join(out)


def settings(flags: dict, headers: list[dict]) -> str:
    """The flags, and what ran on what; folded."""
    tables = table([], [[text(key, 80), text(value, 300)] for key, value in flags.items()], "flags") if flags else ""
    for header in headers:
        resumed = number(header.get("resumed_at"))
        rows = [[key, text(header[key], 200)] for key in ("commit", "python", "torch", "device") if header.get(key)]
        tables += f"<h3>{f'Resumed at step {resumed:,.0f}' if resumed else 'Started'}</h3>{table([], rows, 'flags')}" if rows else ""
    return f"<details><summary>show</summary>{tables}</details>" if tables else ""


# ---------------------------------------------------------------------------------------------------------------------
# Charts


class Line(NamedTuple):
    """Points (step, value), None where there is no value; the name is written at the line's end."""

    name: str
    tone: str
    points: list[tuple[float, float | None]]
    faint: bool = False
    dots: bool = False


def smooth(points: list) -> list:
    """The running mean over a thirtieth of the points, 100 at most; narrower at the start, where losses fall fast."""
    ys = [y for _, y in points if y is not None]
    half = min(50, len(ys) // 60 + 1)
    means = iter([statistics.fmean(ys[i - min(i, half):i + min(i, half) + 1]) for i in range(len(ys))])
    return [(x, None if y is None else next(means)) for x, y in points]


def thin(points: list) -> list:
    """At most POINTS points, of each stretch the lowest and the highest, so that spikes stay."""
    stretch = 2 * math.ceil(len(points) / POINTS)
    if len(points) <= POINTS:
        return points
    kept = []
    for start in range(0, len(points), stretch):
        finite = sorted((y, x) for x, y in points[start:start + stretch] if y is not None)
        kept += sorted({(x, y) for y, x in (finite[0], finite[-1])}) if finite else [(points[start][0], None)]
    return kept


def ticks(low: float, high: float, count: int, least: float = 0.0) -> list[float]:
    """About `count` round numbers of one distance, from at or below `low` to at or above `high`."""
    size = 10 ** math.floor(math.log10((high - low) / count))
    size = max(least, next(size * factor for factor in (1, 2, 5, 10, 20) if high - low <= count * size * factor))
    return [i * size for i in range(math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within low … high; where there are fewer than three, twice and five times these too."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [(factor, factor * 10.0**i) for i in exponents for factor in (1, 2, 5) if low <= factor * 10.0**i <= high]
    whole = [value for factor, value in fine if factor == 1]
    return whole if len(whole) > 2 else [value for _, value in fine]


def figure(title: str, unit: str, lines: list[Line], note: str = "", band: Sequence[tuple] = (), log: bool = False) -> str:
    """A chart over the steps, empty where no line has a value. band: (step, low, high) to shade behind the lines.

    log: for a logarithmic scale where the values span more than a factor of 8; otherwise the axis starts at 0.
    """
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    if not lines:
        return ""
    names = [line.name for line in lines if line.name] if len(lines) > 1 else []
    left, right, top, bottom = 44, 404 - max((7 * len(name) for name in names), default=0), 26, 214
    xs, ys = zip(*((x, y) for line in lines for x, y in line.points if y is not None), strict=True)
    first = 0 if 0 <= min(xs) < max(xs) / 2 else min(xs)
    last = max(*xs, first + 1)
    lines = [line._replace(points=thin(line.points)) for line in lines]
    positive = min((y for y in ys if y > 0), default=0)
    log = log and min(ys) >= 0 and max(ys) > 8 * positive > 0
    low, high = max(positive, max(ys) * 1e-6) if log else min(0, *ys), max(0, *ys)
    rows = log_ticks(low, high) if log else ticks(low, high if high - low > 1e-12 else low + 1, 5)
    low, high = (low, high) if log else (rows[0], rows[-1])

    def across(x: float) -> float:
        return left + (x - first) / (last - first) * (right - left)

    def up(y: float) -> float:
        share = math.log(max(y, low) / low) / math.log(high / low) if log else (y - low) / (high - low)
        return bottom - share * (bottom - top)

    def path(points: Sequence[tuple]) -> str:
        runs = [list(run) for drawn, run in itertools.groupby(points, key=lambda point: point[1] is not None) if drawn]
        return "".join("M" + "L".join(f"{across(x):.1f},{up(y):.1f}" for x, y in run) + "h0" * (len(run) == 1) for run in runs)

    unit += " (log scale)" if log else ""
    spoken = f"{title} against step" + (f", {unit}" if unit else "") + (f": {', '.join(names)}" if names else "")
    out = [f'<svg class="chart" viewBox="0 0 420 252" role="img" aria-label="{spoken}"><title>{spoken}</title><text y="11">{unit}</text>',
           f'<text x="{(left + right) / 2}" y="248" text-anchor="middle">step</text>']
    out += (f'<path class="grid" d="M{left},{up(y):.1f}H{right}"/>'
            f'<text x="{left - 7}" y="{up(y) + 4:.1f}" text-anchor="end">{short(y)}</text>' for y in rows)
    out += (f'<text x="{across(x):.1f}" y="{bottom + 17}" text-anchor="middle">{x:,.0f}</text>'
            for x in ticks(first, last, 5, least=1) if first <= x <= last)
    if len(band) > 1:
        out.append(f'<path class="band first" d="{path([(x, y) for x, y, _ in band] + [(x, y) for x, _, y in reversed(band)])}Z"/>')
    for line in lines:
        out.append(f'<path class="line {line.tone}{" faint" if line.faint else ""}" d="{path(line.points)}"/>')
        out += (f'<circle class="mark {line.tone}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5"><title>step {x:,}: {short(y)}</title>'
                "</circle>" for x, y in line.points if line.dots and y is not None)
    below = bottom + 13.0
    ends = ((up([y for _, y in line.points if y is not None][-1]), line) for line in lines if line.name in names)
    for y, line in sorted(ends, key=lambda end: -end[0]):
        below = min(y + 4, below - 13)                    # never over the one below
        out.append(f'<text class="label {line.tone}" x="{right + 8}" y="{below:.1f}">{line.name}</text>')
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<figure><figcaption><h3>{title}</h3></figcaption>{''.join(out)}</svg>{note}</figure>"
