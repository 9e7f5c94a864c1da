"""Do two claims about pretraining and distillation show on painted digits?

(1) A network that was pretrained with semantic softmax goes on better than one that was pretrained with a flat softmax:
recipes tree_semantic and tree_flat, then tree_transfer from the weights of each. (2) Any network learns better with a
teacher beside the labels (USI): recipes scenes_usi and scenes_no_teacher for four kinds of network, which differ in the
network alone, and the same for several labels. A seed decides pictures, weights and order. A claim appears if the mean
gap over the seeds, less two standard errors, is above zero.

Runs of one thread stand side by side in `--jobs` processes; a finished run is a line of `--runs`, where it is found
again. With `--limit-seconds` the script ends by then and saves what it has.
"""
import argparse
import dataclasses
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from run import RESULTS, save
from timm.models import build_model_with_cfg, register_model, save_for_hf
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from timm_miil.data import TREE_FILE, make_scenes, make_tree_scenes
from timm_miil.losses import SemanticHierarchy
from timm_miil.metrics import semantic_accuracy
from timm_miil.train import Recipe, load_recipe, train
from timm_miil.train.build import build_eval_loader
from timm_miil.train.evaluate import score_batches

TREE_SEEDS, TEACHER_SEEDS = 5, 3
# What another kind of network changes in the recipes scenes_usi and scenes_no_teacher: nothing but the network.
FAMILIES: Mapping[str, Mapping[str, str]] = {
    'CNN': {'model.name': 'test_resnet'},
    'ViT': {
        'model.name': 'levit_128s', 'model.args.img_size': '32', 'model.args.stem_type': 's8',
        'model.args.embed_dim': '[48, 64, 96]', 'model.args.num_heads': '[3, 4, 6]', 'model.args.depth': '[2, 2, 2]'},
    'mobile': {'model.name': 'test_efficientnet'},
    'MLP': {'model.name': 'mixer_scenes', 'model.args.img_size': '32'},
}
# Only to see whether the script runs.
TINY = {
    'epochs': '1', 'scenes.num_train': '128', 'scenes.num_val': '64', 'scenes.num_test': '64',
    'tree_scenes.num_train': '256', 'tree_scenes.num_val': '256', 'tree_scenes.num_test': '256'}
POLL_SECONDS = 0.2


class SmallMixer(MlpMixer):
    """timm's MLP-Mixer, whose tokens are made by three convolutions of stride 2 as LeViT's are: from plain patches it
    learns next to nothing of 3,000 pictures."""

    def __init__(self, embed_dim: int, in_chans: int = 3, **kwargs: object) -> None:
        super().__init__(embed_dim=embed_dim, in_chans=in_chans, patch_size=8, **kwargs)
        widths = (in_chans, embed_dim // 4, embed_dim // 2, embed_dim)
        self.stem = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in zip(widths, widths[1:])), nn.Flatten(2), Transpose())


class Transpose(nn.Module):
    """Channels (B, D, N) to tokens (B, N, D)."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.transpose(1, 2)


@register_model
def mixer_scenes(pretrained: bool = False, **kwargs: object) -> SmallMixer:
    """A mixer small enough for pictures of 32 pixels; timm's entry points fix the sizes of theirs."""
    return build_model_with_cfg(
        SmallMixer, 'mixer_s16_224', pretrained, **{'num_blocks': 6, 'embed_dim': 96, **kwargs})


@dataclass(frozen=True)
class Arm:
    """A recipe with changes; the words {arm name} in a change stand for the folder of another arm's weights."""
    recipe: str
    changes: Mapping[str, str] = field(default_factory=dict)
    needs: str = ''
    seeds: int = TEACHER_SEEDS


def arms() -> dict[str, Arm]:
    start = {'model.name': 'local-dir:{}', 'model.pretrained': 'true'}
    table = {
        'tree, semantic': Arm('tree_semantic', seeds=TREE_SEEDS),
        'tree, flat': Arm('tree_flat', seeds=TREE_SEEDS),
        'transfer, semantic': Arm('tree_transfer', start, 'tree, semantic', TREE_SEEDS),
        'transfer, flat': Arm('tree_transfer', start, 'tree, flat', TREE_SEEDS),
        'transfer, none': Arm('tree_transfer', seeds=TREE_SEEDS),
        'teacher': Arm('scenes_usi_teacher'),
        'teacher of several labels': Arm('scenes_asl'),
        'several labels, taught': Arm(
            'scenes_usi_multi_label', {'teacher.name': 'local-dir:{}'}, 'teacher of several labels'),
        'several labels, alone': Arm('scenes_no_teacher_multi_label'),
    }
    for family, changes in FAMILIES.items():
        table[f'{family}, taught'] = Arm('scenes_usi', {**changes, 'teacher.name': 'local-dir:{}'}, 'teacher')
        table[f'{family}, alone'] = Arm('scenes_no_teacher', changes)
    return table


ARMS = arms()


@dataclass(frozen=True)
class Claim:
    """The arm `ours` has more of `metric` than `other`."""
    words: str
    ours: str
    other: str
    metric: str


CLAIMS = (
    Claim('semantic softmax over flat softmax, in transfer', 'transfer, semantic', 'transfer, flat', 'map'),
    *(Claim(f'with a teacher over alone, {family}', f'{family}, taught', f'{family}, alone', 'top1')
      for family in FAMILIES),
    Claim('with a teacher over alone, several labels', 'several labels, taught', 'several labels, alone', 'map'),
)
# No claim of the papers' tables: what helps to read them.
BESIDE = (
    Claim('semantic over flat, accuracy over the tree itself', 'tree, semantic', 'tree, flat', 'semantic'),
    Claim('semantic softmax over no pretraining, in transfer', 'transfer, semantic', 'transfer, none', 'map'),
    Claim('flat softmax over no pretraining, in transfer', 'transfer, flat', 'transfer, none', 'map'),
    *(Claim(f'teacher over the {family} it teaches', 'teacher', f'{family}, taught', 'top1') for family in FAMILIES),
)


@dataclass(frozen=True)
class Job:
    arm: str
    seed: int
    scratch: Path
    device: str
    tiny: bool

    @property
    def recipe(self) -> Recipe:
        arm = ARMS[self.arm]
        folder = str(weights_folder(arm.needs, self.seed, self.scratch))
        changes = {key: value.replace('{}', folder) for key, value in arm.changes.items()}
        recipe = load_recipe(arm.recipe)
        if self.tiny:
            made = 'tree_scenes.' if recipe.scenes is None else 'scenes.'
            changes |= {key: value for key, value in TINY.items() if '.' not in key or key.startswith(made)}
        return recipe.override({'seed': str(self.seed), **changes})


def weights_folder(arm: str, seed: int, scratch: Path) -> Path:
    return scratch / 'weights' / f'{arm.replace(", ", "-").replace(" ", "-")}-{seed}'


def has_weights(job: Job) -> bool:
    return (weights_folder(job.arm, job.seed, job.scratch) / 'config.json').exists()  # it is written last


def pictures(job: Job) -> Path:
    """The arm's pictures of the seed; arms with equal settings share a folder."""
    recipe = job.recipe
    config = dataclasses.replace(recipe.scenes or recipe.tree_scenes, seed=job.seed)
    kind = 'tree' if recipe.scenes is None else 'scenes'
    folder = job.scratch / 'pictures' / f'{kind}-{config.num_train}-{config.image_size}-{job.seed}'
    return (make_tree_scenes if recipe.scenes is None else make_scenes)(folder, config)


def run_one(job: Job) -> dict[str, object]:
    """Train and test one arm with one seed, and keep its weights if other arms need them."""
    torch.set_num_threads(1)
    start, start_wall = time.process_time(), time.perf_counter()
    data = pictures(job)
    result = train(job.recipe, data, device=job.device)
    row: dict[str, object] = {
        'arm': job.arm, 'seed': job.seed, 'recipe': ARMS[job.arm].recipe,
        **{name: value for name, value in result.test_metrics.items() if name in ('map', 'top1', 'top5', 'loss')}}
    if job.arm.startswith('tree'):
        row['semantic'] = accuracy_over_tree(result.model, result.splits.test, data)
    row |= {'best_epoch': result.best_epoch, 'parameters': sum(p.numel() for p in result.model.parameters())}
    if any(arm.needs == job.arm for arm in ARMS.values()):
        fresh = weights_folder(job.arm, job.seed, job.scratch)
        save_for_hf(
            result.model.cpu(), fresh, model_config={'label_names': list(result.label_names)}, safe_serialization=True)
    return row | {
        'device': job.device, 'processor_seconds': round(time.process_time() - start),
        'seconds': round(time.perf_counter() - start_wall)}


def accuracy_over_tree(model: nn.Module, source: object, data: Path) -> float:
    """Semantic accuracy in percent, all three depths being levels, of a network trained with whatever loss."""
    hierarchy = SemanticHierarchy.from_tree_file(data / TREE_FILE, include_deepest=True)
    device = next(model.parameters()).device
    batches = list(score_batches(model, build_eval_loader(source, model, batch_size=64, device=device)))
    logits, targets = (torch.cat(parts).cpu() for parts in zip(*batches))
    return 100 * float(semantic_accuracy(logits, targets.argmax(1), hierarchy))


def verdict(claim: Claim, rows: Sequence[Mapping[str, object]]) -> dict[str, object] | None:
    """Whether the claim appears, over the seeds that both arms have; None below two of them."""
    def figures(arm: str) -> dict[int, float]:
        return {row['seed']: row[claim.metric] for row in rows if row['arm'] == arm}

    ours, other = figures(claim.ours), figures(claim.other)
    seeds = sorted(ours.keys() & other.keys())
    if len(seeds) < 2:
        return None
    gaps = [ours[seed] - other[seed] for seed in seeds]
    mean, error = statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    return {
        'claim': claim.words, 'is_claim': claim in CLAIMS, 'metric': claim.metric, 'seeds': len(seeds),
        **{name: round(value, 2) for name, value in {
            'ours': statistics.mean(ours[seed] for seed in seeds),
            'other': statistics.mean(other[seed] for seed in seeds), 'gap': mean, 'standard_error': error,
            'least_gap': min(gaps), 'greatest_gap': max(gaps), 'gap_less_two_errors': mean - 2 * error}.items()},
        'appears': mean - 2 * error > 0,
    }


def run_all(jobs: Sequence[Job], done: list[dict[str, object]], runs: Path, processes: int, until: float) -> None:
    """Run what is not done, weights that others need first, until the time is over."""
    finished = {(row['arm'], row['seed']) for row in done}
    missing = [job for job in jobs if (job.arm, job.seed) not in finished]
    needed = {(ARMS[job.arm].needs, job.seed) for job in missing if ARMS[job.arm].needs}
    waiting = [
        job for job in jobs if job in missing
        or (job.arm, job.seed) in needed and not has_weights(job)]
    again = {(job.arm, job.seed) for job in waiting} & finished
    with multiprocessing.get_context('spawn').Pool(processes) as pool:  # leaving ends what still runs
        # Before two processes want the same ones.
        made = pool.map_async(pictures, list({_picture_key(job): job for job in waiting}.values()), chunksize=1)
        made.wait(max(until - time.monotonic(), 0))
        if not made.ready():
            return
        made.get()
        running: dict[Job, object] = {}
        is_trained = {(job.arm, job.seed) for job in jobs} - {(job.arm, job.seed) for job in waiting}
        while (waiting or running) and time.monotonic() < until:
            for job in sorted(waiting, key=_turn):
                if len(running) < processes and (
                        not ARMS[job.arm].needs or (ARMS[job.arm].needs, job.seed) in is_trained):
                    waiting.remove(job)
                    running[job] = pool.apply_async(run_one, (job,))
            for job in [job for job, task in running.items() if task.ready()]:
                try:
                    row = running.pop(job).get()
                except Exception as error:  # the others go on; those that wait for its weights never start
                    print(f'{job.arm}, seed {job.seed}: {type(error).__name__}: {error}', flush=True)
                    waiting = [other for other in waiting if (ARMS[other.arm].needs, other.seed) != (job.arm, job.seed)]
                    continue
                is_trained.add((job.arm, job.seed))
                if (job.arm, job.seed) not in again:
                    done.append(row)
                    with runs.open('a', encoding='utf-8') as file:
                        file.write(json.dumps(row) + '\n')
                words = (f'{name}={value}' for name, value in row.items())
                print(f'{len(done)} of {len(jobs)} runs:', *words, flush=True)
            time.sleep(POLL_SECONDS)


def _turn(job: Job) -> tuple[bool, bool, int]:
    """What others wait for comes first, then the claim that has the most seeds."""
    is_needed = any(arm.needs == job.arm for arm in ARMS.values())
    return not is_needed, ARMS[job.arm].seeds < TREE_SEEDS, job.seed


def _picture_key(job: Job) -> tuple[object, ...]:
    recipe = job.recipe
    return recipe.scenes, recipe.tree_scenes, job.seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--runs', type=Path, help='file of finished runs, to go on with; none keeps them nowhere')
    parser.add_argument('--scratch', type=Path, help='folder for pictures and weights; a temporary one otherwise')
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder for the tables')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, of one thread each')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--limit-seconds', type=float, default=86_400.0)
    parser.add_argument('--seeds', type=int, help='only so many seeds of each arm')
    parser.add_argument('--only', default='', help='only arms whose name has this word')
    parser.add_argument('--tiny', action='store_true', help='to try the script: the figures mean nothing')
    ns = parser.parse_args()
    until = time.monotonic() + ns.limit_seconds
    with tempfile.TemporaryDirectory() as temporary:
        scratch, runs = ns.scratch or Path(temporary), ns.runs or Path(temporary) / 'runs.jsonl'
        runs.parent.mkdir(parents=True, exist_ok=True)
        done = [json.loads(line) for line in runs.read_text(encoding='utf-8').splitlines()] if runs.exists() else []
        jobs = [
            Job(name, seed, scratch.resolve(), ns.device, ns.tiny) for name, arm in ARMS.items()
            for seed in range(min(arm.seeds, ns.seeds or arm.seeds))]
        wanted = {job for job in jobs if ns.only in job.arm}
        jobs = [
            job for job in jobs
            if job in wanted or any(ARMS[other.arm].needs == job.arm and other.seed == job.seed for other in wanted)]
        try:
            run_all(jobs, done, runs, ns.jobs, until)
        finally:
            ns.results.mkdir(parents=True, exist_ok=True)
            done.sort(key=lambda row: (list(ARMS).index(row['arm']), row['seed']))
            verdicts = [verdict(claim, done) for claim in CLAIMS + BESIDE]
            if done:
                save('pretraining-runs', done, ns.results, quiet=True)
                save('pretraining', [row for row in verdicts if row is not None], ns.results)
            if len(done) < len(jobs):
                print(f'incomplete: {len(done)} of {len(jobs)} runs; start again with the same --runs to go on.')


if __name__ == '__main__':
    main()
