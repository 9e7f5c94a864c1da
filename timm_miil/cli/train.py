"""`timm-miil train`: train a model by a recipe, from one processor to many machines."""
import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

from timm_miil._checks import check_folder, shown
from timm_miil._errors import TrainingInterrupted
from timm_miil._extras import require
from timm_miil.cli._device import parse_device
from timm_miil.cli._text import columns, printable
from timm_miil.cli._training import (
    DEFAULT_LICENCE, METRIC_WORDS, SCENES_LICENCE, check_licence, counts_line, describe_made, make_pictures,
    num_pictures, problem_type, render_run_card, train_with_progress)
from timm_miil.data import LabelledImages, has_split
from timm_miil._locks import locked
from timm_miil.hub import check_model_folder, save_model_folder
from timm_miil.hub.folder import tuned_settings
from timm_miil.inference import write_report
from timm_miil.train import Recipe, TrainResult, list_recipes, load_recipe, read_splits
from timm_miil.train.engine import TRACKERS
from timm_miil.train.injection import injected_amount

__all__ = ['HELP', 'add_arguments', 'run']

HELP = 'train a model by a recipe, on your own pictures or on made ones'

RUNS = Path('runs')
INTERRUPTED = 128 + 2  # as the command reports Ctrl-C
# Flags and the recipe's keys, in timm's spelling where timm's script has the flag.
VALUE_FLAGS = (
    ('--epochs', 'epochs'),
    ('-b --batch-size', 'batch_size'),
    ('--grad-accum-steps', 'grad_accum_steps'),
    ('--seed', 'seed'),
    ('-j --workers', 'workers'),
    ('--model', 'model.name'),
    ('--backbone', 'model.args.backbone'),
    ('--drop', 'model.args.drop_rate'),
    ('--drop-path', 'model.args.drop_path_rate'),
    ('--drop-block', 'model.args.drop_block_rate'),
    ('--gp', 'model.args.global_pool'),
    ('--initial-checkpoint', 'model.args.checkpoint_path'),
    ('--img-size', 'augment.image_size'),
    ('--crop-pct', 'augment.crop_pct'),
    ('--loss', 'loss.name'),
    ('--smoothing', 'loss.args.smoothing'),
    ('--teacher --kd-model-name', 'teacher.name'),
    ('--task-loss-weight', 'teacher.task_loss_weight'),
    ('--distill-loss-weight', 'teacher.distill_loss_weight'),
    ('--kd-temperature', 'teacher.temperature'),
    ('--opt', 'optimizer.name'),
    ('--lr', 'optimizer.lr'),
    ('--weight-decay', 'optimizer.weight_decay'),
    ('--momentum', 'optimizer.args.momentum'),
    ('--opt-eps', 'optimizer.args.eps'),
    ('--layer-decay', 'optimizer.layer_decay'),
    ('--clip-grad', 'clip_grad'),
    ('--sched', 'schedule.name'),
    ('--warmup-epochs', 'schedule.warmup_epochs'),
    ('--warmup-lr', 'schedule.args.warmup_lr'),
    ('--min-lr', 'schedule.min_lr'),
    ('--decay-epochs', 'schedule.args.decay_epochs'),
    ('--decay-rate', 'schedule.args.decay_rate'),
    ('--cooldown-epochs', 'schedule.args.cooldown_epochs'),
    ('--lr-cycle-mul', 'schedule.args.cycle_mul'),
    ('--lr-cycle-decay', 'schedule.args.cycle_decay'),
    ('--lr-cycle-limit', 'schedule.args.cycle_limit'),
    ('--lr-k-decay', 'schedule.args.k_decay'),
    ('--hflip', 'augment.hflip'),
    ('--vflip', 'augment.args.vflip'),
    ('--aa', 'augment.args.auto_augment'),
    ('--train-interpolation', 'augment.args.interpolation'),
    ('--reprob', 'augment.args.re_prob'),
    ('--remode', 'augment.args.re_mode'),
    ('--recount', 'augment.args.re_count'),
    ('--color-jitter', 'augment.args.color_jitter'),
    ('--aug-repeats', 'augment.args.aug_repeats'),
    ('--mixup', 'augment.args.mixup.mixup_alpha'),
    ('--cutmix', 'augment.args.mixup.cutmix_alpha'),
    ('--mixup-prob', 'augment.args.mixup.prob'),
    ('--mixup-switch-prob', 'augment.args.mixup.switch_prob'),
    ('--mixup-mode', 'augment.args.mixup.mode'),
    ('--model-ema-decay', 'ema_decay'),
    ('--checkpoint-hist', 'keep_checkpoints'),
    ('--data-format', 'data.format'),
    ('--train-split', 'data.train'),
    ('--val-split', 'data.val'),
    ('--labels', 'data.labels'),
)
PAIR_FLAGS = (
    ('--scale', 'augment.scale'),
    ('--ratio', 'augment.ratio'),
    ('--opt-betas', 'optimizer.args.betas'),
)
SWITCHES = (
    ('--pretrained', 'model.pretrained'),
    ('--channels-last', 'channels_last'),
    ('--torchcompile', 'torchcompile'),
    ('--sync-bn', 'sync_bn'),
    ('--model-ema-warmup', 'ema_warmup'),
    ('--fsdp', 'fsdp'),
)
AMP_PRECISIONS = {'float16': 'fp16', 'bfloat16': 'bf16'}
# Flags that name a thing: the arguments of the thing that the recipe names are not for another one.
NAMES_A_THING = ('model.name', 'loss.name', 'optimizer.name', 'schedule.name', 'teacher.name')
# Losses that take from the one before them what the data ask for.
KEPT_ARGS = MappingProxyType(dict.fromkeys(('asymmetric', 'bce', 'focal'), ('ignore_unknown',)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads."""
    parser.add_argument(
        'recipe', nargs='?', metavar='RECIPE', help='name of a recipe, or a .toml file; without one they are listed')
    parser.add_argument('--list', action='store_true', help='list the recipes')
    parser.add_argument(
        '--data-dir', type=Path, metavar='DIR',
        help='folder of the data set; without one, recipes of scenes make their pictures')
    parser.add_argument(
        '--output', type=Path, metavar='DIR', help=f'where to write (default: {RUNS}/RECIPE)')
    parser.add_argument(
        '--resume', metavar='auto|FILE',
        help='go on from the newest checkpoint in --output, if there is one, or from a file')
    parser.add_argument(
        '--set', nargs='+', action='extend', default=[], metavar='KEY=VALUE',
        help='any setting of the recipe, such as optimizer.lr=1e-4')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ... (default: %(default)s)')
    parser.add_argument('--log', action='append', default=[], choices=TRACKERS, help='also log there (pip extra `log`)')
    parser.add_argument(
        '--licence', '--license', metavar='ID',
        help=f"of the model, for its card, in the Hub's words (default: {DEFAULT_LICENCE}; {SCENES_LICENCE} for made "
             f'pictures)')
    group = parser.add_argument_group('settings', "of the recipe, by timm's names for them")
    for flags, key in VALUE_FLAGS:
        group.add_argument(*flags.split(), dest=key, metavar='X', help=key)
    for flag, key in PAIR_FLAGS:
        group.add_argument(flag, dest=key, nargs=2, type=float, metavar='X', help=key)
    for flag, key in SWITCHES:
        group.add_argument(flag, dest=key, action='store_const', const='true', help=f'{key} = true')
    group.add_argument('--amp', action='store_true', help='precision in half: fp16, or as --amp-dtype says')
    group.add_argument('--amp-dtype', choices=AMP_PRECISIONS, help='half precision, which includes --amp')


def run(ns: argparse.Namespace) -> int:
    """Train, and write the best model's folder and a report."""
    if ns.list or ns.recipe is None:
        _check_list_is_meant(ns)
        print(columns((name, load_recipe(name).summary) for name in list_recipes()), end='')
        return 0
    recipe = load_recipe(ns.recipe)
    changes = dict(_changes(ns, recipe))
    recipe = recipe.override(changes)
    name = Path(ns.recipe).stem
    output = ns.output or RUNS / name
    # What would fail at the end fails at once.
    licence = check_licence(ns.licence or (DEFAULT_LICENCE if ns.data_dir else SCENES_LICENCE))
    device = parse_device(ns.device)
    check_folder(**{'--output': output})
    check_model_folder(output / 'model')
    require('accelerate')
    require('matplotlib')

    data = ns.data_dir or _make_scenes(recipe, name, output)
    splits = read_splits(data, recipe.data, seed=recipe.seed, own_labels=recipe.verification is not None)
    head = f'{printable(data)}: {counts_line(splits)}'
    if ns.data_dir and not recipe.model.pretrained and not recipe.model.args.get('pretrained_backbone'):
        head += f'\nthe weights of {recipe.model.name} start at random; --pretrained starts from those that it has'
    try:
        result = train_with_progress(
            recipe, splits, head=head, output=output, resume=ns.resume, device=device, log=ns.log)
    except TrainingInterrupted as stop:
        _note(str(stop))
        return INTERRUPTED
    if not result.is_main_process:
        return 0
    print(_score(result))
    for line in _retrieval(result):
        print(line)
    if recipe.injection is not None:
        amount = injected_amount(recipe, num_pictures(result.splits.train))
        print(f'labels injected: {amount:.4g}, the sum of the learning rates of all steps')
    _save(result, output, data, licence, Path(ns.recipe).name, changes)
    commands = _next_commands(recipe, output / 'model', data)
    print(''.join(f'{line}\n' for line in ('now try', *(f'  {command}' for command in commands)) if commands), end='')
    return 0


def _check_list_is_meant(ns: argparse.Namespace) -> None:
    """A recipe that was forgotten is no wish to see the list."""
    flags = [getattr(ns, key) for _, key in (*VALUE_FLAGS, *PAIR_FLAGS, *SWITCHES)]
    if not ns.list and any((ns.data_dir, ns.output, ns.resume, ns.set, ns.log, ns.licence, ns.amp, *flags)):
        raise ValueError('name a recipe, such as finetune; `timm-miil train --list` shows all.')


def _changes(ns: argparse.Namespace, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What the flags change in the recipe; a key that is given twice is refused."""
    given = {key: getattr(ns, key) for _, key in (*VALUE_FLAGS, *SWITCHES) if getattr(ns, key) is not None}
    given |= {key: json.dumps(getattr(ns, key)) for _, key in PAIR_FLAGS if getattr(ns, key) is not None}
    if ns.amp or ns.amp_dtype:
        given['precision'] = AMP_PRECISIONS[ns.amp_dtype or 'float16']
    for key in NAMES_A_THING:
        table = key.partition('.')[0]
        settings = getattr(recipe, table)
        if settings is not None and given.get(key, settings.name) != settings.name and settings.args:
            kept = {name: settings.args[name] for name in KEPT_ARGS.get(given[key], ()) if name in settings.args}
            left = ', '.join(name for name in settings.args if name not in kept)
            if left:
                _note(f'{table}.args are left out, since they are for {settings.name}: {left}')
            yield f'{table}.args', '{}'
            yield from ((f'{table}.args.{name}', json.dumps(value)) for name, value in kept.items())
    yield from given.items()
    for word in ns.set:
        key, sign, value = word.partition('=')
        if not sign or not key:
            raise ValueError(f'--set must be KEY=VALUE, got {shown(word)}.')
        if key in given:
            raise ValueError(f'{key} is given twice: {shown(given[key])} and {shown(value)}.')
        given[key] = value
        yield key, value


def _make_scenes(recipe: Recipe, name: str, output: Path) -> Path:
    config = recipe.made_pictures
    if config is None:
        own = [other for other in list_recipes() if load_recipe(other).scenes is not None]
        raise ValueError(
            f'recipe {name} needs a data set: give its folder by --data-dir, or try one of the recipes that make their '
            f'pictures, such as {own[0]}.')
    output.mkdir(parents=True, exist_ok=True)
    with locked(output / '.scenes.lock', seconds=None):  # torchrun starts several of us
        return make_pictures(output / 'scenes', config)


def _score(result: TrainResult) -> str:
    figures, split = (result.test_metrics, 'test') if result.test_metrics else (result.val_metrics, 'val')
    words = f'{split} {METRIC_WORDS[result.metric]} {figures[result.metric]:.2f}'
    if (settings := result.recipe.verification) is not None:
        words = f'{words} at FAR {settings.far:g} %,'
        for far in settings.fars:
            tar = figures[f'tar_at_{far:g}']
            words += f' too few pairs at {far:g} %,' if math.isnan(tar) else f' {tar:.2f} at {far:g} %,'
    if result.unseen_metrics:
        words += (
            f', of labels never trained on {result.unseen_metrics["map"]:.2f}, of both together '
            f'{result.generalised_metrics["map"]:.2f},')
    return f'{words} with the weights of epoch {result.best_epoch}'


def _retrieval(result: TrainResult) -> Iterator[str]:
    """How well labels are found in the pictures that show one, a line for each set of labels."""
    if result.unseen_metrics:
        for name, figures in (
                ('seen', result.test_metrics), ('unseen', result.unseen_metrics),
                ('seen and unseen', result.generalised_metrics)):
            words = [f'F1 of the {k} best {figures[f"f1_at_{k}"]:.2f}' for k in (3, 5) if f'f1_at_{k}' in figures]
            yield ', '.join([f'{name} labels, in pictures that show one: mAP {figures["retrieval_map"]:.2f}', *words])


def _save(
        result: TrainResult, output: Path, data: Path, licence: str, given: str, changes: dict[str, str]) -> None:
    """Write the model's folder and the report of a recipe, given by its name or its file's, and tell."""
    recipe, splits, name = result.recipe, result.splits, Path(given).stem
    is_made = data == output / 'scenes'
    made, made_id = describe_made(recipe.made_pictures)
    dataset = made if is_made else printable(data.resolve().name)
    counts = (
        f'{num_pictures(splits.train)} pictures to train on, {num_pictures(splits.val)} to choose the epoch by and '
        f'{num_pictures(splits.test)} to test, of {len(result.label_names)} labels')
    command = shlex.join([
        'timm-miil', 'train', given, *([] if is_made else ['--data-dir', dataset]),
        *(['--set', *(f'{key}={value}' for key, value in changes.items())] if changes else [])])
    kind, model = problem_type(recipe), result.model.cpu()
    tuned = tuned_settings(output / 'model', model) if kind == 'multi_label_classification' else {}
    folder = save_model_folder(
        model, output / 'model', label_names=() if recipe.embeds else result.label_names, **tuned, problem_type=kind,
        card=render_run_card(
            result, licence=licence, dataset=dataset,
            dataset_id=made_id if is_made else re.sub(r'[^a-z0-9]+', '-', dataset.lower()).strip('-') or 'data',
            summary=f'{recipe.summary} Trained on {dataset}: {counts}.',
            training=f'Recipe `{name}`; the weights are of epoch {result.best_epoch} of {len(result.epochs)}. '
                     f'The command `{command}` trains it again.'))
    print(f'{printable(folder)}: {", ".join(sorted(path.name for path in folder.iterdir()))}')
    if tuned:
        print(f'{printable(folder / "config.json")}: {" and ".join(tuned)} of these very weights are kept')
    if recipe.embeds:
        print('no report.html: it is of labels, and this model gives embeddings')
        return
    if result.val_logits is None or result.val_targets is None:
        print('no report.html: so many scores of so many pictures are counted and not kept')
        return
    write_report(
        output / 'report.html', logits=result.val_logits, targets=result.val_targets, label_names=result.label_names,
        epochs=[record.as_row() for record in result.epochs],
        source=splits.val if isinstance(splits.val, LabelledImages) else None, title=f'{name} on {dataset}',
        facts={
            'recipe': name, 'model': recipe.model.name,
            **({} if recipe.teacher is None else {'teacher': recipe.teacher.name}), 'data': dataset,
            'pictures': counts, 'score': _score(result), 'command': command,
            'shown here': f'the {len(result.val_targets)} pictures to choose the epoch by'},
        activation='softmax' if recipe.is_exclusive else 'sigmoid')
    print(f'{printable(output / "report.html")}: curves, labels, mistakes')


def _next_commands(recipe: Recipe, folder: Path, data: Path) -> list[str]:
    """What one does with a trained model, as far as the data set has the splits for it."""
    words = ['--data-dir', str(data), *(['--format', recipe.data.format] if recipe.data.format != 'auto' else [])]
    options = {key: value for key, value in recipe.data.args.items() if key != 'ignore_unknown_labels'}
    if recipe.data.labels:
        words += ['--labels', recipe.data.labels]
    if recipe.data.ancestors:
        words += ['--ancestors']
    if recipe.data.tree and (recipe.data.ancestors or recipe.task == 'semantic'):
        words += ['--tree', recipe.data.tree]
    if recipe.data.args:
        words += ['--set', *(f'{key}={json.dumps(value)}' for key, value in recipe.data.args.items())]

    def has(split: str) -> bool:
        return has_split(data, split, recipe.data.format, **options)

    predict = ['predict', 'PICTURES', '--model', str(folder)]
    if recipe.zero_shot is not None and recipe.zero_shot.word_vectors:  # the folder has no words
        predict += ['--labels', 'LABELS.txt', '--embeddings', recipe.zero_shot.word_vectors]
        words += ['--embeddings', recipe.zero_shot.word_vectors]
    commands = [] if recipe.embeds else [predict]
    for verb, split in (('validate', recipe.data.test or 'test'), ('tune', recipe.data.val)):
        if has(split) and recipe.task != 'self_supervised' and (verb != 'tune' or recipe.task == 'multi_label'):
            commands.append([verb, str(folder), *words, '--split', split])
    if recipe.task == 'self_supervised' or recipe.injection is not None:
        commands.append(['transfer', str(folder), '--data', 'FOLDER'])
    return [shlex.join(['timm-miil', *command]) for command in commands]


def _note(text: str) -> None:
    print(f'timm-miil train: {printable(text)}', file=sys.stderr)
