"""The report on rows."""
from __future__ import annotations

import itertools
from pathlib import Path

from report.charts import bar
from report.formatting import text
from report.page import table, write_page
from survey import described


def write_data(folder: Path, name: str, found: dict) -> Path:
    """Write data.html, about a survey's figures (`Survey.figures`), into a folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    said = f"{found['kept']:,} of {found['rows']:,} rows can be trained on" if found["kept"] else "No row can be trained on"
    sections = (("In figures", figures_of(found)), ("Rows by their tokens", lengths_of(found)), ("Samples", samples_of(found)))
    return write_page(folder / "data.html", name, said, sections)


def rows_of(found: dict) -> str:
    """The survey of a run's training rows, folded but for its figures."""
    if not found:
        return ""
    folded = (("Rows by their tokens", lengths_of(found)), ("Samples", samples_of(found)))
    return figures_of(found) + "".join(f"<details><summary>{title}</summary>{content}</details>" for title, content in folded)


def figures_of(found: dict) -> str:
    return table([], [[text(what, 120), text(value, 1_000)] for what, value in described(found)], "facts")


def lengths_of(found: dict) -> str:
    """How many rows have how many tokens, as bars."""
    if not found["kept"]:
        return ""
    start, width, counts = (found["histogram"][key] for key in ("from", "width", "rows"))
    borders = [start + i * width for i in range(len(counts) + 1)]
    return table([], [[f"{low:,} – {high - 1:,}", bar(count, max(counts), "first")]
                      for (low, high), count in zip(itertools.pairwise(borders), counts, strict=True)], "causes")


def samples_of(found: dict) -> str:
    """A few rows as the model sees them, what is trained marked."""
    if not found["kept"]:
        return ""
    out = ['<p class="note">Marked: what the model is trained to say.</p>']
    for sample in found["samples"]:
        runs = "".join(f'<mark class="wanted">{text(said, 9_000)}</mark>' if trained else text(said, 9_000)
                       for said, trained in sample["runs"])
        out.append(f"<article><small>{text(sample['source'], 200)} · {sample['tokens']:,} tokens</small><pre>{runs}</pre></article>")
    return "".join(out)
