"""The report on rows: data.html, and the section "Data" of a run's report.

    python train.py --model MODEL --data rows.jsonl --survey --out DIR      # DIR/data.html
"""
from __future__ import annotations

import itertools
from pathlib import Path

from dataset.stats import describe
from report.charts import bar
from report.formatting import html_text
from report.page import table, write_page


def write_data_report(folder: Path, name: str, stats: dict) -> Path:
    """Write data.html into `folder`; returns its path.  stats: a survey's figures (`Tokens.figures`)."""
    folder.mkdir(parents=True, exist_ok=True)
    headline = "No row can be trained on"
    if stats["kept"]:
        headline = f"{stats['kept']:,} of {stats['rows']:,} rows can be trained on"
    sections = (
        ("In figures", stats_table(stats)),
        ("Rows by their tokens", length_histogram(stats)),
        ("Samples", sample_rows(stats)),
    )
    return write_page(folder / "data.html", name, headline, sections)


def data_section(stats: dict) -> str:
    """A survey of the training rows within a run's report: the figures, and the rest folded."""
    if not stats:
        return ""
    folded = (("Rows by their tokens", length_histogram(stats)), ("Samples", sample_rows(stats)))
    details = [f"<details><summary>{title}</summary>{content}</details>" for title, content in folded]
    return stats_table(stats) + "".join(details)


def stats_table(stats: dict) -> str:
    rows = [[html_text(label, 120), html_text(value, 1_000)] for label, value in describe(stats)]
    return table([], rows, "facts")


def length_histogram(stats: dict) -> str:
    """How many rows have how many tokens, as bars."""
    if not stats["kept"]:
        return ""
    start, width, counts = (stats["histogram"][key] for key in ("from", "width", "rows"))
    borders = [start + i * width for i in range(len(counts) + 1)]
    rows = []
    for (low, high), count in zip(itertools.pairwise(borders), counts, strict=True):
        rows.append([f"{low:,} – {high - 1:,}", bar(count, max(counts), "first")])
    return table([], rows, "causes")


def sample_rows(stats: dict) -> str:
    """A few rows as the model sees them. Text that carries loss is marked."""
    if not stats["kept"]:
        return ""
    out = ['<p class="note">Marked: what the model is trained to say.</p>']
    for sample in stats["samples"]:
        text = ""
        for piece, carries_loss in sample["runs"]:
            escaped = html_text(piece, 9_000)
            text += f'<mark class="wanted">{escaped}</mark>' if carries_loss else escaped
        caption = f"{html_text(sample['source'], 200)} · {sample['tokens']:,} tokens"
        out.append(f"<article><small>{caption}</small><pre>{text}</pre></article>")
    return "".join(out)
