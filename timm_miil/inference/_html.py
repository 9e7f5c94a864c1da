"""The page of a report: one file, without anything from elsewhere, readable without its script.

Whatever comes from outside (names of labels and files) is escaped where it enters, and a policy in the page's head
allows no request, no frame and no script but the page's own.
"""
import base64
import hashlib
import html
import io
from collections.abc import Iterable, Mapping, Sequence

from PIL import Image

__all__ = ['card', 'definitions', 'escape', 'figure', 'page', 'picture', 'section', 'table', 'tiles']

PICTURE_PX = 200
JPEG_QUALITY = 80

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --muted: #5f6a7d; --line: #d9dde5; --page: #f5f6f8; --card: #ffffff;
  --s1: #2563c9; --s2: #c2500a; --s3: #12805c; --s4: #8250c4; --s5: #b83280; --good: #12805c; --bad: #c22f2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --muted: #98a3b8; --line: #333c4d; --page: #10141b;
  --card: #191f29; --s1: #6ea8ff; --s2: #ff9d5c; --s3: #4fd1a1; --s4: #bd93f9; --s5: #ff86c3; --good: #4fd1a1;
  --bad: #ff8080; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 14px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 38px 0 2px; }
h3 { font-size: 14px; margin: 0 0 6px; }
p { margin: 0 0 12px; max-width: 76ch; color: var(--muted); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 0 0 20px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.grid { display: grid; gap: 14px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 350px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; min-width: 0;
  overflow-x: auto; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); }
.tiles .card { padding: 10px 14px; }
.tiles b { display: block; font-size: 25px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--muted); font-size: 13px; }
svg { display: block; width: 100%; height: auto; margin: 0 auto; font-family: inherit; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 8px 0 0; padding: 0; list-style: none; font-size: 13px;
  overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 18px; border-top: 3px solid; margin: 0 6px 4px 0; }
.legend i.dashed { border-top-style: dashed; }
.scroll { overflow: auto; max-height: 560px; border: 1px solid var(--line); border-radius: 10px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 5px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; box-shadow: 0 1px 0 var(--line); }
th.words, td.words { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9em; }
th[role=button] { cursor: pointer; } th[aria-sort=ascending]::after { content: ' \\2191'; }
th[aria-sort=descending]::after { content: ' \\2193'; }
input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 6px 12px; width: min(100%, 320px); margin-bottom: 10px; }
.card th, .card td { padding: 4px 8px; } .card td.words { min-width: 5em; }
.pictures { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 168px), 1fr)); }
.pictures .card { padding: 0; overflow: hidden; font-size: 13px; }
.pictures img, .pictures .none { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  background: var(--page); }
.pictures .none { display: grid; place-items: center; color: var(--muted); }
.pictures div div { padding: 2px 10px; overflow-wrap: anywhere; }
.pictures .name { color: var(--muted); font-size: 12px; padding: 6px 10px 8px; }
.missed { color: var(--bad); } .false { color: var(--s2); }
footer { margin-top: 40px; color: var(--muted); font-size: 13px; }
@media print { .scroll { max-height: none; } .card { break-inside: avoid; } }
"""

# Sorting and filtering of the tables; the page is complete without it.
_SCRIPT = """
for (const box of document.querySelectorAll('.scroll')) {
  const body = box.querySelector('tbody'), rows = [...body.rows];
  const texts = rows.map(row => row.cells[0].textContent.toLowerCase());
  const input = document.createElement('input');
  input.type = 'search';
  input.placeholder = 'Find among ' + rows.length + ' labels';
  input.setAttribute('aria-label', input.placeholder);
  input.addEventListener('input', () => {
    const words = input.value.toLowerCase();
    rows.forEach((row, number) => { row.hidden = !texts[number].includes(words); });
  });
  box.before(input);
  const heads = [...box.querySelectorAll('th')];
  heads.forEach((head, column) => {
    head.setAttribute('role', 'button');
    head.tabIndex = 0;
    const sort = () => {
      const isRising = head.getAttribute('aria-sort') !== 'ascending', sign = isRising ? 1 : -1;
      const keys = new Map(rows.map(row => {
        const text = row.cells[column].textContent, number = parseFloat(text.replaceAll(',', ''));
        return [row, column && !isNaN(number) ? number : column ? -1 : text];
      }));
      heads.forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', isRising ? 'ascending' : 'descending');
      body.append(...[...rows].sort((a, b) => {
        const x = keys.get(a), y = keys.get(b);
        return sign * (column ? x - y : x.localeCompare(y));
      }));
    };
    head.addEventListener('click', sort);
    head.addEventListener('keydown', event => { if (event.key === 'Enter') sort(); });
  });
}
"""


def escape(text: object) -> str:
    """Text as it may stand in the page, also within quotes; without control characters."""
    return html.escape(''.join(char if char.isprintable() or char == ' ' else '\ufffd' for char in str(text)))


def page(title: str, content: str) -> str:
    """The whole page around its content."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n'
        f'{content}\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n')


def definitions(facts: Mapping[str, object]) -> str:
    """Facts by name."""
    rows = ''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n' for name, value in facts.items())
    return f'<dl>\n{rows}</dl>' if rows else ''


def tiles(numbers: Iterable[tuple[str, str]]) -> str:
    """Large numbers, each with what it is."""
    cards = ''.join(
        f'<div class="card"><b>{escape(number)}</b><span>{escape(name)}</span></div>\n' for name, number in numbers)
    return f'<div class="tiles">\n{cards}</div>'


def section(title: str, words: str, content: str) -> str:
    """A part of the page with a sentence or two that say how to read it."""
    return f'<section>\n<h2>{escape(title)}</h2>\n<p>{escape(words)}</p>\n{content}\n</section>'


def card(title: str, content: str) -> str:
    """A panel."""
    return f'<div class="card"><h3>{escape(title)}</h3>\n{content}</div>'


def figure(title: str, svg: str, legend: Sequence[tuple[str, int, bool]] = ()) -> str:
    """A panel with a plot, and a legend of (name, number of the colour from 1, whether the line is broken)."""
    entries = ''.join(
        f'<li><i{" class=dashed" if is_dashed else ""} style="border-color:var(--s{colour})"></i>{escape(name)}</li>'
        for name, colour, is_dashed in legend)
    return card(title, svg + (f'<ul class="legend">{entries}</ul>' if entries else ''))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], num_words: int = 1) -> str:
    """A table of which the first columns are words and the others numbers."""
    kinds = [' class="words"' if column < num_words else '' for column in range(len(head))]
    heads = ''.join(f'<th{kind} scope="col">{escape(name)}</th>' for kind, name in zip(kinds, head))
    body = ''.join(
        f'<tr>{"".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row))}</tr>\n' for row in rows)
    return f'<table><thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody></table>'


def picture(image: Image.Image, name: str) -> str:
    """A small copy of a picture, within the page."""
    small = image.copy()
    small.thumbnail((PICTURE_PX, PICTURE_PX))
    file = io.BytesIO()
    small.save(file, 'JPEG', quality=JPEG_QUALITY)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(name)}" loading="lazy">'
