"""The template of every HTML page of the project: one self-contained file that suits
light and dark screens, fetches nothing and contains no script.
"""

from __future__ import annotations

from html import escape

__all__ = ["html_page"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --line: #e3e7ee; --soft: #eef1f6;
  --dim: #667; --bad: #b00020; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ef; --paper: #14181f; --line: #313846; --soft: #232936; --dim: #9aa4b4;
  --bad: #ff8a80; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
"""


def html_page(title: str, body: str, style: str = "") -> str:
    """Builds a page. `title` is plain text, `body` is markup, and `style` is extra CSS.
    The CSS may use the colours --ink, --paper, --line, --soft, --dim and --bad.
    """
    head = (
        f'<meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{escape(title)}</title><style>{_STYLE}{style}</style>'
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'
