"""Where the rows of a benchmark go. A question is one file beside this one:

    rows = compare({'plain': plain, 'fused': fused}, repeats=50, batch_size=64)
    save('losses', rows)
"""
import csv
import functools
from pathlib import Path

import torch

from timm_miil.bench import environment

__all__ = ['RESULTS', 'save']

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / 'benchmarks' / 'results'


def save(
        question: str, rows: list[dict[str, object]], folder: Path = RESULTS, *,
        device: torch.device = torch.device('cpu'), quiet: bool = False) -> Path:
    """Write `results/<question>.csv`, each row with the environment of `device`, and print the rows unless `quiet`."""
    stamp = environment(device, CHECKOUT) | {'commit': _commit()}
    columns = list(dict.fromkeys(column for row in rows for column in row))
    path = folder / f'{question}.csv'
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, [*columns, *stamp], lineterminator='\n')
        writer.writeheader()
        writer.writerows(row | stamp for row in rows)
    for row in () if quiet else rows:
        print(*(f'{column}={value}' for column, value in row.items()))
    return path


@functools.cache
def _commit() -> object:
    """As the checkout was at the first call: what is saved later changes it."""
    return environment(checkout=CHECKOUT)['commit']
