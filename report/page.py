"""The HTML page of a report, with its style sheet inlined, and its tables."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from report.formatting import html_text
from storage.atomic import atomic_file

STYLE = Path(__file__).with_name("style.css")


def write_page(path: Path, name: str, headline: str, sections: Sequence[tuple[str, str]]) -> Path:
    """Write a page whole or not at all; returns its path.

    name: plain text, the page's title. headline: HTML, the result in one sentence. sections: (heading, HTML);
    those without content are left out.
    """
    title = html_text(name)
    style = STYLE.read_text(encoding="utf-8")
    lines = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<h1>{title}</h1>",
        f'<p class="result">{headline}</p>',
    ]
    for heading, content in sections:
        if content:
            lines.append(f"<section><h2>{heading}</h2>\n{content}\n</section>")
    lines.append("</body>\n</html>\n")
    with atomic_file(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
    return path


def table(head: Sequence[str], rows: Sequence[Sequence[str]], css_class: str = "") -> str:
    """A table of HTML cells. The first cell of a row is its heading; `head` names the other columns."""
    header = ""
    if head:
        cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
        header = f"<thead><tr><td></td>{cells}</tr></thead>\n"
    body = "\n".join(table_row(row) for row in rows)
    return f'<div class="wide"><table class="{css_class}">{header}<tbody>{body}</tbody></table></div>'


def table_row(row: Sequence[str]) -> str:
    heading, *cells = row
    return f'<tr><th scope="row">{heading}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
