"""Do the papers' claims show on scenes? One thing changed at a time, five seeds, the same pictures for both arms.

A seed decides the pictures, the weights and which annotations are hidden. A claim appears if the mean gap over the
seeds, less two standard errors, is above zero. Nothing was tuned for a gap: all arms have the settings of `scenes_asl`
but for what their recipe says. Finished runs are kept in `--out`, so that an interrupted benchmark goes on.
"""
import argparse
import json
import math
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from run import save
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from timm_miil._atomic import write_file
from timm_miil.data import SceneConfig, make_scenes
from timm_miil.inference import collect_logits
from timm_miil.losses import load_label_prior
from timm_miil.metrics import multilabel_average_precision
from timm_miil.train import load_recipe, read_splits, train
from timm_miil.train.build import build_eval_loader

SCENES = {'default': {}, 'long tail': {'imbalance': 100.0}}
TAIL = 10    # the rarest labels of the training pictures, of 30


@dataclass(frozen=True)
class Claim:
    """The recipe `ours` has more of `metric` than `other`, both trained and tested on scenes of these settings."""
    words: str
    ours: str
    other: str
    scenes: str = 'default'
    metric: str = 'test_map'


CLAIMS = (
    Claim('ASL over BCE', 'scenes_asl', 'scenes_bce', 'long tail'),
    Claim('ASL over BCE, the ten rarest labels', 'scenes_asl', 'scenes_bce', 'long tail', 'tail_map'),
    Claim('ASL over focal loss', 'scenes_asl', 'scenes_focal', 'long tail'),
    Claim('ML-Decoder over global average pooling', 'scenes_asl', 'scenes_gap'),
    Claim('CSL over ignoring, half annotated', 'scenes_csl', 'scenes_ignore'),
    Claim('CSL over negatives, half annotated', 'scenes_csl', 'scenes_negative'),
    Claim('CSL over ignoring, a fixed number a class', 'scenes_csl_fpc', 'scenes_ignore_fpc'),
    Claim('CSL over negatives, a fixed number a class', 'scenes_csl_fpc', 'scenes_negative_fpc'),
)
# Rank correlation of a prior with the true frequencies of the training pictures, in the runs that estimate one.
PRIOR_CLAIMS = (
    Claim('estimated prior over counting, half annotated', 'scenes_csl', 'scenes_csl', metric='prior_rank'),
    Claim(
        'estimated prior over counting, a fixed number a class', 'scenes_csl_fpc', 'scenes_csl_fpc',
        metric='prior_rank'),
)


def run_one(arm: str, scenes: str, seed: int, folder: Path) -> dict[str, object]:
    """Train and measure one arm with one seed; a finished run is read again."""
    name = f'{arm}-{scenes.replace(" ", "-")}-{seed}'
    done = folder / f'{name}.json'
    if done.exists():
        return json.loads(done.read_text(encoding='utf-8'))
    torch.set_num_threads(1)
    start = time.process_time()
    data = pictures(scenes, seed, folder)
    result = train(
        load_recipe(arm).override({'seed': str(seed)}), data, output=folder / name, resume='auto', device='cpu')
    splits = read_splits(data)
    logits, targets = collect_logits(result.model, build_eval_loader(splits.test, result.model, batch_size=64))
    ap = 100 * multilabel_average_precision(logits, targets)
    frequency = (splits.train.targets == 1).double().mean(0)
    row = {
        'arm': arm, 'scenes': scenes, 'seed': seed, 'test_map': float(ap.mean()),
        'tail_map': float(ap[frequency.argsort()[:TAIL]].mean()), 'best_epoch': result.best_epoch,
    }
    if (folder / name / 'prior.csv').exists():
        estimated = load_label_prior(folder / name / 'prior.csv', result.label_names)
        counted = (result.splits.train.targets == 1).double().mean(0)    # of the annotations that are left
        row |= {'prior_rank': rank(estimated, frequency), 'counted_prior_rank': rank(counted, frequency)}
    write_file(done, json.dumps(row | {'seconds': round(time.process_time() - start)}))
    shutil.rmtree(folder / name)
    return json.loads(done.read_text(encoding='utf-8'))


def pictures(scenes: str, seed: int, folder: Path) -> Path:
    return make_scenes(folder / f'scenes-{scenes.replace(" ", "-")}-{seed}', SceneConfig(seed=seed, **SCENES[scenes]))


def rank(prior: Tensor, truth: Tensor) -> float:
    """Spearman's rank correlation; 0 for a prior that says the same of every label."""
    return float(spearmanr(prior, truth).statistic) if len(prior.unique()) > 1 else 0.0


def verdict(claim: Claim, rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Whether the claim appears, from the rows of both arms."""
    def figures(arm: str, metric: str) -> list[float]:
        found = {row['seed']: row[metric] for row in rows if (row['arm'], row['scenes']) == (arm, claim.scenes)}
        return [found[seed] for seed in sorted(found)]

    of_prior = claim.metric == 'prior_rank'
    ours = figures(claim.ours, claim.metric)
    other = figures(claim.other, 'counted_prior_rank' if of_prior else claim.metric)
    gaps = [mine - theirs for mine, theirs in zip(ours, other, strict=True)]
    mean, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    digits = 3 if of_prior else 2
    return {
        'claim': claim.words, 'scenes': claim.scenes, 'metric': claim.metric, 'seeds': len(gaps),
        **{name: round(value, digits) for name, value in {
            'ours': statistics.mean(ours), 'other': statistics.mean(other), 'gap': mean, 'standard_error': error,
            'gap_less_two_errors': mean - 2 * error}.items()},
        'appears': mean - 2 * error > 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4])
    parser.add_argument('--out', type=Path, help='folder for pictures and finished runs, which are used again')
    parser.add_argument('--processes', type=int, default=2, help='runs at a time, of one thread each')
    ns = parser.parse_args()
    claims = CLAIMS + PRIOR_CLAIMS
    runs = dict.fromkeys((arm, claim.scenes) for claim in claims for arm in (claim.ours, claim.other))
    with tempfile.TemporaryDirectory() as temporary:
        folder = ns.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with multiprocessing.get_context('spawn').Pool(ns.processes, maxtasksperchild=1) as pool:
            # Before two processes want the same ones.
            pool.starmap(pictures, [(scenes, seed, folder) for seed in ns.seeds for scenes in SCENES], chunksize=1)
            jobs = [(*run, seed, folder) for seed in ns.seeds for run in runs]
            rows = list(tqdm(pool.imap_unordered(_run_job, jobs), total=len(jobs), unit='run'))
    rows.sort(key=lambda row: (row['arm'], row['scenes'], row['seed']))
    save('claims-runs', rows)
    save('claims', [verdict(claim, rows) for claim in claims])


def _run_job(job: tuple[str, str, int, Path]) -> dict[str, object]:
    return run_one(*job)


if __name__ == '__main__':
    main()
