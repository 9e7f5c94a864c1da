"""Trains as a file asks, in as many processes as it was launched with; each writes what came of it.

The arguments are a folder of pictures, a JSON file {name: {'changes', 'output', ...}} and a folder to
write to. A job has settings over `RECIPE`, may write an output, may be stopped by a SIGTERM to the second process, in
its second step or its first validation, and then resumed, may read a stream, may have one label a picture, and may be
told how many scores are kept rather than counted. The test imports `run`, for the same in one process.
"""
import copy
import faulthandler
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from timm_miil._errors import TrainingError, TrainingInterrupted
from timm_miil.data import ImageStream, SparseTargets
from timm_miil.train import Splits, _scoring, load_recipe, read_splits, train

# Without batch norm, which would see the pictures of one process only. Momentum without adaptive steps, which would
# turn rounding into steps where a gradient is 0.
RECIPE = {
    'model.name': 'vit_tiny_patch16_224',
    'model.args': '{img_size = 32, patch_size = 8, embed_dim = 16, depth = 2, num_heads = 2, '
                  'pretrained_cfg_overlay = {input_size = [3, 32, 32]}}',
    'optimizer.name': 'momentum', 'optimizer.lr': '0.003'}
WIDE = 304    # channels of which a block has more parameters than the engine shards at least


class InMemory(ImageStream):
    """A stream of a few pictures."""

    def __init__(self, source):
        super().__init__(source.label_names, len(source))
        self.source = source

    def iterate(self, *, seed, epoch, process, num_processes):
        order = torch.arange(len(self.source))
        if seed is not None:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed + epoch))
        for row in order[process::num_processes].tolist():
            yield self.source.load_image(row), self.source.labels.row(row), self.source.image_name(row)


def with_one_label(images):
    """The pictures, of whose labels the first stays."""
    other = copy.copy(images)
    other.labels = SparseTargets.from_dense(F.one_hot(images.targets.argmax(1), images.targets.shape[1]).to(torch.int8))
    return other


def splits_of(scenes, is_stream=False, few=23, one_label=False):
    """Numbers of pictures that two processes cannot share evenly."""
    splits = read_splits(scenes)
    parts = splits.train, splits.val.select(range(few)), splits.test.select(range(31))
    if one_label:
        parts = tuple(map(with_one_label, parts))
    return Splits(*map(InMemory, parts)) if is_stream else Splits(*parts)


def run(scenes, job, output, interrupting=None):
    recipe = load_recipe(Path(__file__).with_name('tiny.toml')).override({**RECIPE, **job['changes']})
    if job.get('wide'):
        recipe = recipe.override({'model.args.embed_dim': str(WIDE)})
    steps, words, most = [], [], _scoring.MOST_SCORES
    _scoring.MOST_SCORES = job.get('most_scores', most)

    def on_epoch(record):
        steps.append(record.epoch)

    def attempt(**settings):
        return train(
            recipe, splits_of(scenes, job.get('stream', False), job.get('few', 23), job.get('one_label', False)),
            device='cpu', on_epoch=on_epoch, output=output if job.get('output') else None, **settings)

    try:
        if interrupting is None:
            result = attempt()
        else:
            try:
                # No callback runs in other processes than the main one.
                interrupting()
                attempt()
            except TrainingInterrupted as error:
                words.append(str(error))
            result = attempt(resume='auto')
    except (TrainingError, ValueError) as error:
        return {'error': f'{type(error).__name__}: {error}'}
    finally:
        _scoring.MOST_SCORES = most
    assert (result.is_main_process and job.get('most_scores') != 0) == (result.val_logits is not None)
    return {
        'weights': result.model.state_dict(), 'epochs': [record.as_row() for record in result.epochs],
        'test': dict(result.test_metrics), 'logits': result.val_logits, 'targets': result.val_targets,
        'interrupted': words, 'called': steps, 'is_main': result.is_main_process}


def interrupt_at(number):
    """Send this process SIGTERM in its `number`-th backward pass."""
    count, real = 0, torch.Tensor.backward

    def backward(*args, **kwargs):
        nonlocal count
        count += 1
        if count == number:
            torch.Tensor.backward = real
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    torch.Tensor.backward = backward


def interrupt_validation():
    """Send this process SIGTERM when it has scored its first pictures."""
    real = _scoring.score_batches

    def score_batches(*args, **kwargs):
        _scoring.score_batches = real
        for number, batch in enumerate(real(*args, **kwargs)):
            if number == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    _scoring.score_batches = score_batches


INTERRUPTIONS = {'step': lambda: interrupt_at(2), 'validation': interrupt_validation}

if __name__ == '__main__':
    faulthandler.dump_traceback_later(240, exit=True)  # processes that wait for each other say where
    warnings.simplefilter('error')
    torch.set_num_threads(1)
    # Joined here and not by each run: processes that leave a group find the next one's address too early.
    torch.distributed.init_process_group('gloo')
    scenes, jobs, folder = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    rank = int(os.environ['RANK'])
    for name, job in jobs.items():
        interrupting = (INTERRUPTIONS[job['signal']] if rank else lambda: None) if job.get('signal') else None
        torch.save(run(scenes, job, folder / name, interrupting), folder / f'{name}-{rank}.pt')
    torch.distributed.destroy_process_group()
