"""Files of a tagging run's results: JSON lines or Parquet, one a part, whole or not there."""
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from timm_miil._atomic import whole_file
from timm_miil._extras import require

if TYPE_CHECKING:
    from timm_miil.inference.predict import Prediction

__all__ = ['FORMATS', 'count_rows', 'part_path', 'write_part']

FORMATS = {'json': '.jsonl', 'parquet': '.parquet'}
CONFIDENCE_DIGITS = 6


def part_path(folder: Path, part: int, format: str) -> Path:
    """Where the results of a part lie."""
    return folder / f'part-{part:06}{FORMATS[format]}'


def write_part(path: Path, predictions: Sequence['Prediction'], format: str) -> None:
    """Write the rows of a part; the file has its name when it is whole and on the disk."""
    with whole_file(path, durable=True) as file:
        if format == 'json':
            file.writelines(_as_json(prediction) for prediction in predictions)
        else:
            arrow, parquet = require('pyarrow'), require('pyarrow.parquet')
            schema = arrow.schema([
                ('path', arrow.string()), ('labels', arrow.list_(arrow.string())),
                ('confidences', arrow.list_(arrow.float32())), ('indices', arrow.list_(arrow.int32())),
                ('error', arrow.string())])
            parquet.write_table(arrow.table([
                [_text(str(prediction.path)) for prediction in predictions],
                [[tag.label for tag in prediction.tags] for prediction in predictions],
                [[tag.confidence for tag in prediction.tags] for prediction in predictions],
                [[tag.index for tag in prediction.tags] for prediction in predictions],
                [prediction.error and _text(prediction.error) for prediction in predictions]], schema=schema), file)


def count_rows(path: Path, format: str) -> tuple[int, int]:
    """How many pictures a part's file has, and how many of them are errors."""
    if format == 'json':
        lines = path.read_bytes().splitlines()
        return len(lines), sum(not line.endswith(b'"error": null}') for line in lines)
    column = require('pyarrow.parquet').read_table(path, columns=['error']).column('error')
    return len(column), len(column) - column.null_count


def _as_json(prediction: 'Prediction') -> bytes:
    tags = [
        {'label': tag.label, 'confidence': round(tag.confidence, CONFIDENCE_DIGITS), 'index': tag.index}
        for tag in prediction.tags]
    return json.dumps({'path': str(prediction.path), 'tags': tags, 'error': prediction.error}).encode() + b'\n'


def _text(words: str) -> str:
    """Without what no UTF-8 can hold: a file's name may be any bytes."""
    return words.encode('utf-8', 'backslashreplace').decode()
