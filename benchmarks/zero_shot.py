"""How well are labels found that no training picture shows? Pairs of colour and digit, held out of scenes.

Trains the network of the recipe `scenes_zero_shot` and, as the baseline, `mldecoder_scenes`: the same body, pictures
and settings with a plain ML-Decoder head for the labels that are seen. What that head says of an unseen pair is guessed
from what it says of the pair's digit and of the seen pairs that share digit or colour.
"""
import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from run import save
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from timm_miil.data import MultiLabelRecords, SceneConfig, make_scenes
from timm_miil.metrics import multilabel_average_precision, zero_shot_retrieval
from timm_miil.train import Recipe, load_recipe, read_splits, train
from timm_miil.train.build import build_eval_loader, with_labels

RECIPE = 'scenes_zero_shot'
METHODS: dict[str, dict[str, str]] = {
    'zero-shot': {},
    'plain': {'task': 'multi_label', 'model.name': 'mldecoder_scenes', 'model.args': '{decoder_drop_rate = 0.0}'},
}
ABLATION = {  # of the first seed only
    'zero-shot, no query noise': {'model.args.query_noise': '0.0'},
    'zero-shot, query noise and random queries': {'model.args.num_random_queries': '10'},
    'zero-shot, decoder dropout': {'model.args.decoder_drop_rate': '0.1'},
}
K = 3


def config(seed: int) -> SceneConfig:
    """Four colours. Of 12000 training pictures about 6600 show no unseen pair."""
    return SceneConfig(num_classes=50, num_train=12000, num_val=600, num_test=2000, seed=seed)


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """Another seed has other pictures and weights, and holds out other pairs: the digits are shifted by it."""
    pairs = [label.split() for label in recipe.unseen_labels]
    shifted = [f'{colour} {(int(digit) + seed) % 10}' for colour, digit in pairs]
    return recipe.override({'seed': str(seed), 'unseen_labels': str(shifted)})


def guesses(prob: Tensor, seen: Sequence[str], unseen: Sequence[str]) -> dict[str, Tensor]:
    """Scores (N, unseen) made of a plain classifier's probabilities (N, seen), in several ways."""
    made: dict[str, list[Tensor]] = {}
    for label in unseen:
        colour, digit = label.split()
        of_digit = prob[:, seen.index(f'digit {digit}')]
        same_colour = prob[:, [name.startswith(f'{colour} ') for name in seen]]
        same_digit = prob[:, [name.endswith(f' {digit}') and not name.startswith('digit ') for name in seen]]
        any_of_colour, any_of_digit = (1 - (1 - pairs).prod(1) for pairs in (same_colour, same_digit))
        for name, scores in {
            'digit': of_digit,
            'digit x best of colour': of_digit * same_colour.amax(1),
            'digit x any of colour': of_digit * any_of_colour,
            'best of digit x best of colour': same_digit.amax(1) * same_colour.amax(1),
            'sum of all that share a word': of_digit + same_colour.sum(1) + same_digit.sum(1),
            'digit - best of digit': of_digit - same_digit.amax(1),
            'digit x none of digit': of_digit * (1 - any_of_digit),
            'digit x none of digit x best of colour': of_digit * (1 - any_of_digit) * same_colour.amax(1),
            'digit x none of digit x any of colour': of_digit * (1 - any_of_digit) * any_of_colour,
        }.items():
            made.setdefault(name, []).append(scores)
    return {name: torch.stack(columns, 1) for name, columns in made.items()}


@torch.no_grad()
def logits_of(model: nn.Module, records: MultiLabelRecords) -> Tensor:
    return torch.cat([model(images) for images, _ in build_eval_loader(records, model, batch_size=64)])


def figures(scores: Tensor, targets: Tensor, num_seen: int) -> dict[str, float]:
    """Percent; the first `num_seen` columns are the seen labels, the others the unseen ones.

    The first three are over all test pictures. The last two are the papers', see `timm_miil.metrics.ZeroShotRetrieval`:
    over the pictures with an unseen label, and the K best of all labels in a picture.
    """
    ap = multilabel_average_precision(scores, targets)
    seen, unseen = range(num_seen), range(num_seen, scores.shape[1])
    found = zero_shot_retrieval(scores, targets, seen=seen, unseen=unseen, k=[K])
    return {name: round(100 * float(value), 2) for name, value in {
        'unseen_map': ap[num_seen:].mean(),
        'seen_map': ap[:num_seen].mean(),
        'all_map': ap.mean(),
        'unseen_map_where_shown': found['unseen'].average_precision.mean,
        f'all_f1_at_{K}': found['all'].at_k[K].f1,
    }.items()}


def rows_of(seed: int, method: str, folder: Path, weights: Path | None = None) -> list[dict[str, object]]:
    """Train and measure; of the plain network there is a row for each guess."""
    recipe = with_seed(load_recipe(RECIPE), seed).override((METHODS | ABLATION)[method])
    scenes = make_scenes(folder / f'scenes-{seed}', config(seed))
    start = time.process_time()
    with tqdm(desc=f'{method}, seed {seed}', unit='step', leave=False) as bar:
        result = train(recipe, scenes, on_step=lambda *_: bar.update())
    seconds, seen, unseen = time.process_time() - start, result.label_names, recipe.unseen_labels
    tested = with_labels(read_splits(scenes).test, [*seen, *unseen])
    if recipe.task == 'zero_shot':
        if weights is not None:
            save_file(result.model.state_dict(), weights)
        result.model.set_labels(tested.label_names)
        scores = {method: logits_of(result.model, tested)}
    else:
        prob = logits_of(result.model, tested).double().sigmoid()
        scores = {f'{method}: {guess}': torch.cat([prob, guessed], 1)
                  for guess, guessed in guesses(prob, seen, unseen).items()}
    chance = tested.targets[:, len(seen):].float().mean()
    return [{
        'seed': seed, 'method': name, **figures(of_method, tested.targets, len(seen)),
        'chance': round(100 * float(chance), 2), 'seconds': round(seconds), 'best_epoch': result.best_epoch,
        'train_pictures': config(seed).num_train, 'epochs': recipe.epochs,
        'decoder_drop_rate': recipe.model.args['decoder_drop_rate'],
    } for name, of_method in scores.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--methods', nargs='+', choices=[*METHODS, *ABLATION], default=list(METHODS))
    parser.add_argument('--ablation', action='store_true', help='also the ablation, with the first seed')
    parser.add_argument('--out', type=Path, help='folder for the pictures, which are kept and used again')
    parser.add_argument('--weights', type=Path, metavar='FILE', help="where to save the last zero-shot network's")
    ns = parser.parse_args()
    torch.set_num_threads(1)  # one result on any number of cores
    runs = [(seed, method) for seed in ns.seeds for method in ns.methods]
    runs += [(ns.seeds[0], method) for method in ABLATION if ns.ablation]
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for run in runs for row in rows_of(*run, ns.out or Path(folder), ns.weights)]
    save('zero-shot-scenes', rows)
    for method in dict.fromkeys(row['method'] for row in rows):
        for column in ('unseen_map', 'seen_map', 'all_map', 'chance'):
            values = [row[column] for row in rows if row['method'] == method]
            print(f'{method}: {column} {sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})')


if __name__ == '__main__':
    main()
