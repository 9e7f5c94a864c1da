"""README.md says what is true: its table is the catalogue's, and its code runs as written.

`python tests/test_readme.py --write` writes the table.
"""
import re
import subprocess
import sys
from pathlib import Path

import timm

from timm_miil import catalog

README = Path(__file__).resolve().parent.parent / 'README.md'
TABLE = re.compile(r'(<!-- table of families: [^>]*-->\n)(.*?)(<!-- end of table -->)', re.DOTALL)


def family_table():
    """One row a family: what was published, and how much of it timm loads with this package."""
    rows = ['| family | files | loads | trained on | paper | licence |', '|---|---|---|---|---|---|']
    pretrained = set(timm.list_pretrained())
    for family in catalog.families():
        entries = list(catalog.weights_of(family).values())
        loads = sum(entry.timm_tag in pretrained or entry.name in pretrained for entry in entries)
        papers = dict.fromkeys(catalog.paper(entry.paper) for entry in entries)
        links = ', '.join(f'[{paper.title.partition(":")[0]}](https://arxiv.org/abs/{paper.arxiv})' for paper in papers)
        datasets = ', '.join(dict.fromkeys(entry.dataset for entry in entries))
        licences = ', '.join(dict.fromkeys(entry.licence or 'none stated' for entry in entries))
        rows.append(f'| {family} | {len(entries)} | {loads} | {datasets} | {links} | {licences} |')
    return '\n'.join(rows) + '\n'


def blocks(language):
    return re.findall(rf'^```{language}\n(.*?)^```', README.read_text(), re.DOTALL | re.MULTILINE)


def test_table_is_the_catalogues():
    assert TABLE.search(README.read_text()).group(2) == family_table(), 'run: python tests/test_readme.py --write'


if __name__ == '__main__' and '--write' in sys.argv:
    README.write_text(TABLE.sub(lambda match: match.group(1) + family_table() + match.group(3), README.read_text()))
