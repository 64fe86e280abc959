"""One HTML page that holds a whole analysis: it loads nothing and runs nothing."""

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path

from clara_hf.evaluation.latents import GOLD, QUESTION, LensRow


STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #111; background: #fff; }
h1, h2, h3 { line-height: 1.2; margin-top: 1.6em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
th, td { padding: .25em .6em; border-bottom: 1px solid #ccc; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #111; }
td.text { white-space: normal; text-align: left; }
figure { margin: 1.5em 0; break-inside: avoid; }
figcaption { max-width: 50em; font-size: 13px; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
u { text-decoration-thickness: 2px; }
"""


@dataclass(frozen=True)
class Figure:
    """A picture: the SVG file beside the page, what it shows in one sentence, and what is to be known of it."""

    file: str
    shows: str
    caption: str


def page(title: str, parts: list[str]) -> str:
    """A whole HTML document."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def table(rows: list[list[str]]) -> str:
    """A table of texts, the heading first."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in rows[0]) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]]
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def figure(shown: Figure, folder: Path) -> str:
    """A picture, held by the page itself."""
    data = base64.b64encode((folder / shown.file).read_bytes()).decode()
    image = f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(shown.shows)}">'
    return f"<figure>{image}<figcaption>{escape(shown.shows)} {escape(shown.caption)}</figcaption></figure>"


def lens_table(rows: list[LensRow]) -> str:
    """Questions with the strongest tokens of their query vectors: underlined, bold or plain."""
    lines = ["<tr><th>question</th><th>strongest tokens</th></tr>"]
    for row in rows:
        tokens = " · ".join(_token(*token) for token in row.tokens)
        lines.append(f'<tr><td class="text">{escape(row.question)}</td><td class="text">{tokens}</td></tr>')
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _token(word: str, kind: str) -> str:
    return {QUESTION: "<u>{}</u>", GOLD: "<b>{}</b>"}.get(kind, "{}").format(escape(word))
