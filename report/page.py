"""A whole page in one file, and its tables."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from checkpoint import whole_file
from report.formatting import text

STYLE = Path(__file__).with_name("style.css")


def write_page(path: Path, name: str, said: str, sections: Sequence[tuple[str, str]]) -> Path:
    """A whole page: its name, the sentence that says it all, and (heading, HTML) of each section that is not empty."""
    name = text(name)
    style = STYLE.read_text(encoding="utf-8")
    with whole_file(path) as temporary:
        temporary.write_text("\n".join([
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<h1>{name}</h1>",
            f'<p class="result">{said}</p>',
            *(f"<section><h2>{title}</h2>\n{content}\n</section>" for title, content in sections if content),
            "</body>\n</html>\n"]), encoding="utf-8")
    return path


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of HTML cells; the first cell of each row is its heading."""
    heading = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    return (f'<div class="wide"><table class="{kind}">' + (f"<thead><tr><td></td>{heading}</tr></thead>\n" if head else "")
            + f"<tbody>{body}</tbody></table></div>")
