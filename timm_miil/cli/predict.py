"""`timm-miil predict`: label pictures."""
import argparse
import contextlib
import csv
import io
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from timm_miil._cores import count_cores
from timm_miil._errors import PredictionError
from timm_miil.cli._device import parse_device
from timm_miil.cli._labels import add_model_arguments
from timm_miil.cli._text import printable
from timm_miil.data import read_labels
from timm_miil.inference import (
    ACTIVATIONS, BATCH_SIZE, IMAGE_SUFFIXES, PART_SIZE, RESULT_FORMATS, Prediction, Tagger, find_images, find_share,
    optimize_for_inference, save_tagged, tag_to_folder)

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'label pictures, or folders of pictures'

CSV_COLUMNS = ('path', 'label', 'confidence', 'index', 'error')
CONFIDENCE_DIGITS = 6
PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument('paths', nargs='+', type=Path, metavar='IMAGE_OR_FOLDER')
    add_model_arguments(parser)
    parser.add_argument('--topk', type=int, help='most labels of a picture, of those that reach their threshold')
    parser.add_argument(
        '--threshold', type=float,
        help="least confidence of a label; default: the model's own thresholds, else none with --topk, else 0.5 for "
             'independent labels and the best 5 of exclusive ones')
    parser.add_argument('--activation', choices=ACTIVATIONS, help="default: the model's own")
    parser.add_argument(
        '--format', choices=[*FORMATS, 'parquet'],
        help='table for people; json: one object a line; csv: one label a line (default: table); with --output-dir '
             'json or parquet (default: json)')
    parser.add_argument('--batch-size', type=int, default=BATCH_SIZE, help='default: %(default)s')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ... (default: %(default)s)')
    parser.add_argument(
        '--precision', choices=PRECISIONS, default='fp32', help='of the weights (default: %(default)s)')
    parser.add_argument(
        '--optimize', action='store_true', help='fold norms into convolutions; 16-bit precisions do so anyway')
    parser.add_argument('--save-pictures', type=Path, metavar='DIR', help='also save pictures with their labels')
    parser.add_argument('--output', type=Path, metavar='FILE', help='write the results to a file')
    many = parser.add_argument_group('a million pictures')
    many.add_argument(
        '--output-dir', type=Path, metavar='DIR',
        help='write the results to files of a folder, part by part; the same command again goes on where it was; also '
             'takes .tar files, and several processes started by torchrun or accelerate launch; pictures that cannot '
             'be read are rows with an error, and the exit code stays 0')
    many.add_argument('--part-size', type=int, default=PART_SIZE, help='pictures of a part (default: %(default)s)')
    many.add_argument(
        '--workers', type=int, default=count_cores(), help='processes that read pictures (default: one a core)')


def run(ns: argparse.Namespace) -> int:
    """Label the pictures; 1 if some could not be read or saved."""
    start = time.monotonic()
    _check_targets(ns)
    if ns.output_dir:
        return _run_to_folder(ns)
    exclude = [ns.save_pictures] if ns.save_pictures else []
    files = find_images(ns.paths, exclude=exclude)  # before the model: a wrong path is told at once
    first = next(files, None)
    if first is None:
        raise FileNotFoundError(f'no pictures found; folders are searched for {" ".join(sorted(IMAGE_SUFFIXES))}.')
    tagger = _load(ns, parse_device(ns.device))
    predictions = tagger(itertools.chain([first], files), batch_size=ns.batch_size)
    as_text = FORMATS[ns.format or 'table']
    total = sum(1 for _ in find_images(ns.paths, exclude=exclude)) if sys.stderr.isatty() else None
    done = broken = unsaved = 0
    with _open(ns.output) as out, tqdm(total=total, disable=None, unit='pictures', leave=False) as bar:
        if ns.format == 'csv':
            _write(out, _csv_line(CSV_COLUMNS))
        for prediction in predictions:
            _write(out, as_text(prediction))
            if prediction.error is not None:
                broken += 1
                _note(prediction.error)
            else:
                done += 1
                if ns.save_pictures and not _save(prediction, ns.save_pictures, ns.paths):
                    unsaved += 1
            bar.update()
    _note(f'{done} labelled, {broken} not read, {f"{unsaved} not saved, " if unsaved else ""}'
          f'{time.monotonic() - start:.1f} s.')
    return 1 if broken or unsaved else 0


def _run_to_folder(ns: argparse.Namespace) -> int:
    share = find_share(cpu=ns.device == 'cpu')
    if share.count > 1 and ns.device not in ('auto', 'cpu'):
        raise ValueError(f'--device must be auto or cpu where several processes share the devices, got {ns.device!r}.')
    tagger = _load(ns, share.device or parse_device(ns.device))
    with tqdm(disable=None, unit='parts', leave=False) as bar:
        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
        summary = tag_to_folder(
            tagger, ns.paths, ns.output_dir, model=ns.model or '', format=ns.format or 'json', part_size=ns.part_size,
            batch_size=ns.batch_size, num_workers=ns.workers, share=share, on_part=show)
    if summary is not None:
        _note(f'{summary.tagged} labelled, {summary.errors} not read, in {summary.parts} parts.')
    return 0


def _load(ns: argparse.Namespace, device: torch.device) -> Tagger:
    tagger = Tagger.from_name(
        ns.model, labels=read_labels(ns.labels) if ns.labels else None, embeddings=ns.embeddings,
        activation=ns.activation, device=device, threshold=ns.threshold, topk=ns.topk)
    if not tagger.has_label_names:
        _note('the model does not name its classes; they are shown by number.')
    if tagger.unused_settings:
        _note(f"the model's own {' and '.join(tagger.unused_settings)} are for its own labels and not used.")
    if ns.optimize or ns.precision != 'fp32':
        tagger.model = optimize_for_inference(tagger.model, dtype=PRECISIONS[ns.precision])
    return tagger


def _save(prediction: Prediction, folder: Path, roots: Sequence[Path]) -> bool:
    try:
        save_tagged(prediction, folder, roots=roots)
    except (OSError, PredictionError) as error:  # one picture's; the labels of the others are still wanted
        _note(f'cannot save {str(prediction.path)!r} with its labels: {error}')
        return False
    return True


def _check_targets(ns: argparse.Namespace) -> None:
    if ns.output_dir and (ns.output or ns.save_pictures):
        raise ValueError('--output-dir is a place of its own; leave out --output and --save-pictures.')
    if ns.output_dir and ns.format not in (None, *RESULT_FORMATS):
        raise ValueError(f'--format must be {" or ".join(RESULT_FORMATS)} with --output-dir, got {ns.format!r}.')
    if not ns.output_dir and ns.format == 'parquet':
        raise ValueError('--format parquet is for --output-dir; give the folder to write to.')
    if ns.output and ns.output.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f'--output is for text, got the name of a picture: {str(ns.output)!r}.')
    if ns.save_pictures:
        ns.save_pictures.mkdir(parents=True, exist_ok=True)
        if any(path.is_dir() and path.samefile(ns.save_pictures) for path in ns.paths):
            raise ValueError(f'--save-pictures must not be a folder to label: {str(ns.save_pictures)!r}.')


def _as_table(prediction: Prediction) -> str:
    lines = [printable(prediction.path)]
    lines += [f'  {tag.confidence:.3f}  {printable(tag.label)}' for tag in prediction.tags]
    if not prediction.tags:
        lines.append('  no label' if prediction.error is None else '  not read')
    return '\n'.join(lines) + '\n'


def _as_json(prediction: Prediction) -> str:
    tags = [
        {'label': tag.label, 'confidence': round(tag.confidence, CONFIDENCE_DIGITS), 'index': tag.index}
        for tag in prediction.tags]
    return json.dumps({'path': str(prediction.path), 'tags': tags, 'error': prediction.error}) + '\n'


def _as_csv(prediction: Prediction) -> str:
    """One line a tag; one line without label for a picture that has none."""
    rows: list[tuple[object, ...]] = [
        (tag.label, round(tag.confidence, CONFIDENCE_DIGITS), tag.index) for tag in prediction.tags]
    return ''.join(_csv_line((prediction.path, *row, prediction.error)) for row in rows or [('', '', '')])


FORMATS = {'table': _as_table, 'json': _as_json, 'csv': _as_csv}


def _csv_line(cells: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator='\n').writerow(cells)
    return line.getvalue()


@contextlib.contextmanager
def _open(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
    else:
        with open(path, 'w', encoding='utf-8', errors='surrogateescape', newline='') as file:
            yield file


def _write(file: TextIO, text: str) -> None:
    with tqdm.external_write_mode(file=file):  # not across the progress bar
        file.write(text)
        file.flush()


def _note(text: str) -> None:
    _write(sys.stderr, f'timm-miil predict: {printable(text)}\n')
