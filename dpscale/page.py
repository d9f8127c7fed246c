"""One self-contained HTML page: everything inline, nothing fetched, readable on a phone and in print."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape

NO_PLOTS = (
    "The plots need matplotlib, which was not installed when this page was written: pip install 'dpscale[plots]'."
)
# Nothing may be loaded from anywhere, and nothing runs: also not what a run's name or a log line might smuggle in.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light; --text: #262626; --soft: #595959; --line: #d9d9d9; --blue: #0072b2; --warn: #fff4e5; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.2rem; color: var(--text); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
p { margin: .4rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.lead { color: var(--soft); }
.note { background: var(--warn); border-left: 4px solid #e69f00; padding: .5rem .8rem; max-width: none; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.fact { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .7rem; }
.fact b { display: block; font-size: 1.3rem; line-height: 1.3; overflow-wrap: anywhere; }
.fact span { color: var(--soft); font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 40rem; }
/* A shadow at the side where a table goes on; the covers scroll along with it and hide the shadow at its ends. */
.scroll { overflow-x: auto; background:
  linear-gradient(90deg, #fff 1rem, #fff0 2rem) left / 2rem 100% no-repeat local,
  linear-gradient(270deg, #fff 1rem, #fff0 2rem) right / 2rem 100% no-repeat local,
  linear-gradient(90deg, #0003, #0000) left / .7rem 100% no-repeat,
  linear-gradient(270deg, #0003, #0000) right / .7rem 100% no-repeat; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .42rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
table.pairs { width: 100%; max-width: 46rem; }
.pairs td { white-space: normal; text-align: left; overflow-wrap: anywhere; vertical-align: top; }
.pairs td:first-child { color: var(--soft); width: 38%; }
ul { padding-left: 1.2rem; } li { overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
@media (max-width: 30rem) { body { padding: .8rem; } table { font-size: .8rem; } th, td { padding: .25rem .4rem; } }
@media print { @page { margin: 15mm 14mm; } body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; margin-top: 1.2rem; } figure, .fact, .note, tr, li, table.pairs { break-inside: avoid; }
  .facts { grid-template-columns: repeat(4, 1fr); } .figures { grid-template-columns: 1fr 1fr; gap: .5rem; }
  figure:only-child { grid-column: 1 / -1; } figure:only-child svg { max-width: 12cm; }
  .scroll { overflow: visible; background: none; } table { font-size: 7pt; } th, td { padding: 2pt; }
  .note { print-color-adjust: exact; -webkit-print-color-adjust: exact; } a { color: inherit; } }
"""


class Page:
    """Built top to bottom; every text is escaped here, so that no caller has to think of it."""

    def __init__(self, title: str, lead: str = "") -> None:
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{escape(lead)}</p>' if lead else ""]

    def section(self, heading: str) -> None:
        """A heading."""
        self._parts.append(f"<h2>{escape(heading)}</h2>")

    def text(self, paragraph: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(paragraph)}</p>")

    def note(self, paragraph: str) -> None:
        """A paragraph that must not be overlooked."""
        self._parts.append(f'<p class="note">{escape(paragraph)}</p>')

    def facts(self, facts: Mapping[str, str]) -> None:
        """The few figures that matter: meaning -> figure."""
        boxes = [f'<div class="fact"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in facts.items()]
        self._parts.append(f'<div class="facts">{"".join(boxes)}</div>')

    def figures(self, drawn: Mapping[str, str]) -> None:
        """Drawings side by side: what it shows (for those who do not see it) -> an <svg> element of our own."""
        shown = [f"<figure>{_described(svg, what)}</figure>" for what, svg in drawn.items()]
        self._parts.append(f'<div class="figures">{"".join(shown)}</div>')

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; it scrolls sideways where it is too wide."""
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
        table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
        self._parts.append(f'<div class="scroll" tabindex="0">{table}</div>')

    def pairs(self, pairs: Mapping[str, object]) -> None:
        """Names and values, one a line."""
        rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in pairs.items())
        self._parts.append(f'<table class="pairs"><tbody>{rows}</tbody></table>')

    def items(self, lines: Sequence[str]) -> None:
        """A list."""
        self._parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>")

    def preformatted(self, text: str) -> None:
        """Text as it is, lines kept."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def html(self) -> str:
        """The page."""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self._title)}</title><style>{STYLE}</style></head>\n"
            f"<body>\n{chr(10).join(part for part in self._parts if part)}\n</body></html>\n"
        )


def inline_svg(text: str) -> str:
    """The <svg> element of an SVG file, without prologue and metadata, to be put into a page."""
    start, end = text.index("<svg"), text.rindex("</svg>") + len("</svg>")
    return re.sub(r"<metadata>.*?</metadata>", "", text[start:end], flags=re.DOTALL)


def _described(svg: str, what: str) -> str:
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(what)}" ', 1)


def written_at() -> str:
    """Now, for the foot of a title."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
