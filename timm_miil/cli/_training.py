"""What the verbs that train share: progress for people, and the card of what was trained."""
import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from timm_miil.data import (
    IdentityConfig, ImageStream, LabelledImages, SceneConfig, TreeSceneConfig, make_identities, make_scenes,
    make_tree_scenes)
from timm_miil.heads import MLDecoder, ZeroShotMLDecoder
from timm_miil.hub import CardFacts, CardMetric, render_card
from timm_miil.hub.card import ProblemType
from timm_miil.train import EpochRecord, Recipe, Splits, StepRecord, TrainResult, train
from timm_miil.train.evaluate import METRIC_OF_TASK

__all__ = [
    'DEFAULT_LICENCE', 'METRIC_WORDS', 'SCENES', 'SCENES_LICENCE', 'check_licence', 'counts_line', 'describe_made',
    'make_pictures', 'num_pictures', 'problem_type', 'render_run_card', 'train_with_progress',
]

METRIC_WORDS: Mapping[str, str] = MappingProxyType({
    'map': 'mAP', 'output_std': 'output deviation', 'top1': 'top-1', 'semantic_top1': 'semantic top-1', 'tar': 'TAR'})
# The word of the Hub for a licence that nobody stated.
DEFAULT_LICENCE = 'unknown'
SCENES_LICENCE = 'apache-2.0'
SCENES = 'Scenes of handwritten digits (timm_miil.data.scenes)'
TREE_SCENES = 'Tree scenes of handwritten digits (timm_miil.data.tree_scenes)'
IDENTITIES = 'Made-up faces (timm_miil.data.identities)'

_LICENCE = re.compile(r'[a-z0-9][a-z0-9.+-]*')
# The catalogue's names of figures.
_CARD_METRICS: Mapping[str, str] = MappingProxyType({
    'map': 'mAP', 'top1': 'top1', 'semantic_top1': 'semantic_top1'})
_PAPER_OF_LOSS: Mapping[str, str] = MappingProxyType({
    'asymmetric': 'asl', 'class_aware_selective': 'csl', 'semantic_softmax': 'imagenet21k'})


def check_licence(licence: str) -> str:
    """The licence, in the Hub's spelling.

    Raises:
        ValueError: If it cannot be an identifier of the Hub.
    """
    if not _LICENCE.fullmatch(licence.lower()):
        raise ValueError(f"--licence must be the Hub's word for one, such as apache-2.0 or cc-by-4.0, got {licence!r}.")
    return licence.lower()


def describe_made(config: SceneConfig | TreeSceneConfig | IdentityConfig | None) -> tuple[str, str]:
    """What such pictures are called, for people and by one word."""
    if isinstance(config, IdentityConfig):
        return IDENTITIES, 'identities'
    return TREE_SCENES if isinstance(config, TreeSceneConfig) else SCENES, 'scenes'


def make_pictures(directory: Path, config: SceneConfig | TreeSceneConfig | IdentityConfig) -> Path:
    """`make_scenes`, `make_tree_scenes` or `make_identities` with a progress bar."""
    with tqdm(desc='making pictures', unit='', disable=None, leave=False) as bar:
        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
        if isinstance(config, TreeSceneConfig):
            return make_tree_scenes(directory, config, on_progress=show)
        if isinstance(config, IdentityConfig):
            return make_identities(directory, config, on_progress=show)
        return make_scenes(directory, config, on_progress=show)


def train_with_progress(recipe: Recipe, data: Path | Splits, *, head: str = '', **options: Any) -> TrainResult:
    """`train` with a bar of the pictures, their rate and the time that is left, and with a line for each epoch.

    The main process shows it; the bar is for a terminal.

    Args:
        recipe: All settings.
        data: As for `train`.
        head: A line to print when the training has begun.
        **options: As for `train`.
    """
    epochs = recipe.num_epochs
    before = recipe.schedule.num_epochs(recipe.prior.epochs) if recipe.prior else 0  # of a temporary network
    metric = METRIC_OF_TASK[recipe.task]
    # With a delay, however short, nothing is drawn before the first step: other processes than the main one have none.
    with tqdm(desc='training', unit=' pictures', disable=None, leave=False, delay=math.ulp(0.0)) as bar:
        def say(line: str) -> None:
            with tqdm.external_write_mode(sys.stdout):
                print(line, flush=True)

        def show_step(record: StepRecord) -> None:
            if bar.total is None:  # the first one; of a resumed run it is in the middle
                done = record.epoch - 1 + (0 if record.is_prior else before)
                bar.total = (before + epochs) * record.steps * record.images
                bar.initial = bar.n = (done * record.steps + record.step - 1) * record.images
                if head:
                    say(head)
                if record.is_prior:
                    say(f'first a temporary network, for the prior: {before} of its epochs')
            phase = 'prior, ' if record.is_prior else ''
            bar.set_postfix_str(f'{phase}epoch {record.epoch}, loss {record.loss:.3f}', refresh=False)
            bar.update(record.images)

        def show_epoch(record: EpochRecord) -> None:
            value = record.metrics.get(metric, math.nan)
            say(f'epoch {record.epoch}/{epochs}: loss {record.train_loss:.3f}, val {METRIC_WORDS[metric]} {value:.2f}, '
                f'{record.images_per_second:.0f} pictures/s')

        return train(recipe, data, on_step=show_step, on_epoch=show_epoch, **options)


def counts_line(splits: Splits) -> str:
    """How many pictures and labels there are, in words."""
    return (
        f'{num_pictures(splits.train)} pictures to train on, {num_pictures(splits.val)} to validate, '
        f'{num_pictures(splits.test)} to test; {len(splits.label_names)} labels')


def num_pictures(source: LabelledImages | ImageStream | None) -> int:
    """Pictures of a split; 0 for none."""
    return 0 if source is None else source.num_images if isinstance(source, ImageStream) else len(source)


def render_run_card(
        result: TrainResult, *, summary: str, dataset: str, dataset_id: str, licence: str, training: str) -> str:
    """The card of a trained model.

    Args:
        result: The run.
        summary: One paragraph.
        dataset: Name of the data set.
        dataset_id: A short one.
        licence: Of the weights.
        training: One paragraph: the recipe, and the command that trains it again.
    """
    model: Any = result.model
    name = result.recipe.model.name
    if ':' in name:  # a place, of which the network need not know
        name = str(model.pretrained_cfg.get('architecture') or name)
    names = [result.metric, *(['top1'] if result.metric == 'semantic_top1' else [])]
    metrics = [
        CardMetric(_CARD_METRICS[name], round(figures[name], 2), split)
        for split, figures in (('test', result.test_metrics), ('val', result.val_metrics)) for name in names
        if name in _CARD_METRICS and math.isfinite(figures.get(name, math.nan))]
    if math.isfinite(result.unseen_metrics.get('map', math.nan)):
        metrics.append(CardMetric('unseen_mAP', round(result.unseen_metrics['map'], 2), 'test'))
    return render_card(CardFacts(
        name=name,
        summary=summary,
        source='local-dir:model',
        licence=licence,
        architecture=name,
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        input_size=tuple(model.pretrained_cfg['input_size']),
        dataset=dataset,
        dataset_id=dataset_id,
        label_names=() if result.recipe.embeds else result.label_names,
        metrics=metrics,
        training=' '.join([training, *_lessons(result.recipe), *_rates(result)]),
        papers=_papers(result),
        problem_type=problem_type(result.recipe),
    ))


def problem_type(recipe: Recipe) -> ProblemType:
    """What its networks are for."""
    if recipe.embeds:
        return 'embedding'
    return 'single_label_classification' if recipe.is_exclusive else 'multi_label_classification'


def _rates(result: TrainResult) -> Iterator[str]:
    """What was measured of pairs, a sentence each."""
    settings = result.recipe.verification
    for split, figures in (('test', result.test_metrics), ('val', result.val_metrics)):
        if settings is not None and math.isfinite(figures.get('tar', math.nan)):
            yield (
                f'Of the pairs of {split} pictures of one identity {figures["tar"]:.2f} % are accepted where '
                f'{settings.far:g} % of the pairs of two are.')


def _lessons(recipe: Recipe) -> Iterator[str]:
    """What a network learnt from besides the pictures of this training, a sentence each."""
    if recipe.model.pretrained:
        yield f'It began with the weights of {_with_architecture(recipe.model.name)}.'
    if recipe.task == 'semantic':
        yield ('Each level of the tree over the labels had a softmax of its own: scores of labels of two levels were '
               'never compared.')
    if recipe.task == 'self_supervised':
        how = 'RotNet, arXiv:1803.07728' if recipe.loss.name == 'rotation' else 'SimSiam, arXiv:2011.10566'
        yield f'It learnt without labels ({how}).'
    if recipe.injection is not None:
        start = '' if not recipe.injection.start else f' by the recipe `{recipe.injection.start}`'
        yield (f'Labels were injected into what it had learnt without them{start}: first its classifier learnt them, '
               f'then all of it.')
    teacher = recipe.teacher
    if teacher is not None:
        name = _with_architecture(teacher.name)
        yield (
            f'It learnt from the labels and from the teacher {name}, weighted {teacher.task_loss_weight:g} and '
            f'{teacher.distill_loss_weight:g}.' if teacher.task_loss_weight else
            f'It learnt from the teacher {name} alone, without the labels.')


def _with_architecture(name: str) -> str:
    """A network's name, with its architecture where the name is a folder."""
    scheme, _, place = name.partition(':')
    if scheme == 'local-dir':
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            architecture = json.loads((Path(place) / 'config.json').read_text(encoding='utf-8'))['architecture']
            return f'`{architecture}` in `{name}`'
    return f'`{name}`'


def _papers(result: TrainResult) -> list[str]:
    """What to cite: the paper of the head, of the loss, of the teaching and of the recipe, each once."""
    recipe = result.recipe
    head = getattr(result.model, 'head', None)
    found = ['mldecoder'] if isinstance(head, MLDecoder | ZeroShotMLDecoder) else []
    found += [_PAPER_OF_LOSS[recipe.loss.name]] if recipe.loss.name in _PAPER_OF_LOSS else []
    found += ['usi'] if recipe.teacher is not None and recipe.task == 'single_label' else []
    found += ['diverse'] if recipe.injection is not None else []
    found += [recipe.paper.id] if recipe.paper else []
    return list(dict.fromkeys(found))
