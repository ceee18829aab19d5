"""The report's HTML: one file that needs no network, runs no script, and takes no text for markup.

Every text from a run's files passes `escape`; beside it, the page's own policy (Content-Security-Policy) forbids
scripts and everything that is not in the file.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from ast_dist.report_style import STYLE

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, parts: Iterable[str]) -> str:
    """The whole file. title: text; parts: HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{''.join(parts)}</body>\n</html>\n"
    )


def section(title: str, body: str, level: int, anchor: str) -> str:
    """A part under its heading. title: text. level: of the heading, 2 to 6."""
    heading = f'<h{level} id="{anchor}-title">{escape(title)}</h{level}>'
    return f'<section id="{anchor}" aria-labelledby="{anchor}-title">\n{heading}\n{body}</section>\n'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of text."""
    return f"<p{_class(kind)}>{escape(text)}</p>\n"


def bullets(texts: Iterable[str], kind: str = "") -> str:
    """A list of texts; nothing where there are none."""
    items = "".join(f"<li>{escape(text)}</li>\n" for text in texts)
    return f"<ul{_class(kind)}>\n{items}</ul>\n" if items else ""


def facts(pairs: Mapping[str, str]) -> str:
    """Names and values, side by side as the width allows."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n" for name, value in pairs.items())
    return f'<dl class="facts">\n{items}</dl>\n'


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table that scrolls by itself where it is wider than the screen; each row's first cell names the row.

    numbers: columns that are aligned to the right.
    """
    right = set(numbers)

    def cell(position: int, text: str, tag: str, scope: str = "") -> str:
        return f"<{tag}{scope}{_class('number' if position in right else '')}>{escape(text)}</{tag}>"

    head = "".join(cell(i, text, "th", ' scope="col"') for i, text in enumerate(headings))
    body = "".join(
        "<tr>"
        + cell(0, row[0], "th", ' scope="row"')
        + "".join(cell(i, text, "td") for i, text in enumerate(row) if i)
        + "</tr>\n"
        for row in rows
    )
    # Reached by the keyboard, too, or nobody could scroll it without a mouse.
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def details(summary: str, body: str) -> str:
    """What is folded up until somebody asks. summary: text; body: HTML."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>\n"


def verbatim(text: str) -> str:
    """Text as it stands in a file."""
    return f"<pre>{escape(text)}</pre>\n"


def links(targets: Mapping[str, str]) -> str:
    """The way to the page's parts. targets: anchor → text."""
    items = "".join(f'<li><a href="#{anchor}">{escape(text)}</a></li>' for anchor, text in targets.items())
    return f'<nav aria-label="Parts of this report"><ul>{items}</ul></nav>\n'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
