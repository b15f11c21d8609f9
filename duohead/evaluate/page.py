"""The HTML pieces of the report page: the document around everything, cards, tables.

Text from outside is escaped where it enters, since a model may have written it. `document(title, body)` gives a file
that needs nothing else: the style is inside, and there is no script and no link, not even to an icon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from duohead.evaluate.style import CSS


def document(title: str, body: str) -> str:
    """A whole HTML file; no line breaks between a number and its per cent sign."""
    body = body.replace(" %", "&nbsp;%")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def card(title: str, caption: str, body: str, *, wide: bool = False, level: int = 2) -> str:
    """A figure with a heading and a caption (text) over its body (HTML); `wide` takes both columns.

    `level` is that of the heading: 3 inside a `section`.
    """
    kind = "card wide" if wide else "card"
    head = f"<h{level}>{escape(title)}</h{level}>\n<figcaption>{escape(caption)}</figcaption>"
    return f'<figure class="{kind}">\n{head}\n{body}\n</figure>'


def section(name: str, title: str, text: str, cards: Sequence[str]) -> str:
    """Cards (HTML) under a heading with an introduction (text); `name` is what a link to it points at."""
    grid = "\n".join(cards)
    return (
        f'<section id="{escape(name)}">\n<h2>{escape(title)}</h2>\n<p>{escape(text)}</p>\n'
        f'<div class="grid">\n{grid}\n</div>\n</section>'
    )


def facts(pairs: Mapping[str, str]) -> str:
    """Names and texts in two columns."""
    lines = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs.items())
    return f'<dl class="facts">{lines}</dl>'


def details_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that opens on demand: what a chart shows, for those who cannot see it or want the digits."""
    return f"<details><summary>The numbers as a table</summary>{html_table(caption, head, rows)}</details>"


def html_table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, kinds: Sequence[str] = ()
) -> str:
    """A table with row headers; `kinds` are CSS classes of its rows."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = []
    for i, row in enumerate(rows):
        kind = f' class="{kinds[i]}"' if kinds and kinds[i] else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        lines.append(f'<tr{kind}><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
