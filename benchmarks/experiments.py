"""The harness of experiments: arms of several seeds side by side, and which claims show.

A study has arms, each a recipe with changes, and claims, each of one arm over another. A seed decides pictures, weights
and order, for all arms alike. A claim appears if the mean gap over the seeds, less two standard errors, is above zero.

Runs of one thread stand side by side in `--jobs` processes; a finished run is a line of `--runs`, where it is found
again. With `--limit-seconds` the script ends by then and saves what it has.

    if __name__ == '__main__':
        run_study(Study('question', ARMS, CLAIMS), __doc__)
"""
import argparse
import dataclasses
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from run import RESULTS, save
from timm.models import save_for_hf

from timm_miil.data import make_scenes, make_tree_scenes
from timm_miil.train import Recipe, TrainResult, load_recipe, train

__all__ = ['Arm', 'Claim', 'Job', 'Study', 'run_study']

POLL_SECONDS = 0.2
PRINTED = ('map', 'top1', 'top5', 'loss')


@dataclass(frozen=True)
class Arm:
    """A recipe with changes.

    Args:
        recipe: Its name.
        changes: As of `Recipe.override`; the braces {} stand for the folder of the weights of the arm `needs`.
        needs: An arm that is run before.
        seeds: How many.
    """
    recipe: str
    changes: Mapping[str, str] = field(default_factory=dict)
    needs: str = ''
    seeds: int = 5


@dataclass(frozen=True)
class Claim:
    """The arm `ours` has more of `metric` than `other`.

    Args:
        words: For people.
        ours: An arm.
        other: Another.
        metric: A column of the runs.
        is_claim: Whether a paper claims it, or it helps to read the table.
    """
    words: str
    ours: str
    other: str
    metric: str
    is_claim: bool = True


Measure = Callable[['Job', TrainResult, Path], dict[str, object]]


@dataclass(frozen=True)
class Study:
    """Arms and claims.

    Args:
        name: Of the result files: `<name>.csv` and `<name>-runs.csv`.
        arms: By name.
        claims: Of them.
        measure: What else is told of a run, from its result and the folder of its pictures.
        tiny: Changes of all recipes that let a run end at once, to see whether the script runs.
    """
    name: str
    arms: Mapping[str, Arm]
    claims: Sequence[Claim]
    measure: Measure | None = None
    tiny: Mapping[str, str] = field(default_factory=dict)

    def is_needed(self, name: str) -> bool:
        """Whether another arm needs the weights of this one."""
        return any(arm.needs == name for arm in self.arms.values())


@dataclass(frozen=True, eq=False)
class Job:
    """One arm with one seed."""
    arm: str
    seed: int
    settings: Arm
    scratch: Path
    device: str
    tiny: Mapping[str, str]
    measure: Measure | None
    keeps: bool

    @property
    def key(self) -> tuple[str, int]:
        return self.arm, self.seed

    @property
    def recipe(self) -> Recipe:
        folder = str(weights_folder(self.settings.needs, self.seed, self.scratch))
        changes = {key: value.replace('{}', folder) for key, value in self.settings.changes.items()}
        recipe = load_recipe(self.settings.recipe)
        if self.tiny:
            made = 'tree_scenes.' if recipe.scenes is None else 'scenes.'
            changes |= {key: value for key, value in self.tiny.items() if '.' not in key or key.startswith(made)}
        return recipe.override({'seed': str(self.seed), **changes})


def weights_folder(arm: str, seed: int, scratch: Path) -> Path:
    """Where an arm's weights are kept for those that need them."""
    return scratch / 'weights' / f'{arm.replace(", ", "-").replace(" ", "-")}-{seed}'


def pictures(job: Job) -> Path:
    """The arm's pictures of the seed; arms with equal settings share a folder."""
    recipe = job.recipe
    config = dataclasses.replace(recipe.made_pictures, seed=job.seed)
    settings = [f'{value:g}' if isinstance(value, float) else str(value) for value in vars(config).values()]
    kind, make = ('tree', make_tree_scenes) if recipe.scenes is None else ('scenes', make_scenes)
    name = '-'.join([kind, *settings]).replace(' ', '').replace('(', '').replace(')', '').replace(',', '_')
    return make(job.scratch / 'pictures' / name, config)


def run_one(job: Job) -> dict[str, object]:
    """Train and test one arm with one seed, and keep its weights if other arms need them."""
    torch.set_num_threads(1)
    start, start_wall = time.process_time(), time.perf_counter()
    data = pictures(job)
    result = train(job.recipe, data, device=job.device)
    row: dict[str, object] = {
        'arm': job.arm, 'seed': job.seed, 'recipe': job.settings.recipe,
        **{name: value for name, value in result.test_metrics.items() if name in PRINTED},
        **(job.measure(job, result, data) if job.measure is not None else {}),
        'best_epoch': result.best_epoch, 'parameters': sum(p.numel() for p in result.model.parameters())}
    if job.keeps:
        save_for_hf(
            result.model.cpu(), weights_folder(job.arm, job.seed, job.scratch),
            model_config={'label_names': list(result.label_names)}, safe_serialization=True)
    return row | {
        'device': job.device, 'processor_seconds': round(time.process_time() - start),
        'seconds': round(time.perf_counter() - start_wall)}


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
        'claim': claim.words, 'is_claim': claim.is_claim, 'metric': claim.metric, 'seeds': len(seeds),
        **{name: round(value, 2) for name, value in {
            'ours': statistics.mean(ours[seed] for seed in seeds),
            'other': statistics.mean(other[seed] for seed in seeds), 'gap': mean, 'standard_error': error,
            'least_gap': min(gaps), 'greatest_gap': max(gaps), 'gap_less_two_errors': mean - 2 * error}.items()},
        'appears': mean - 2 * error > 0,
    }


class _Queue:
    """Runs that wait, those that go on, and what is done."""

    def __init__(self, study: Study, jobs: Sequence[Job], done: list[dict[str, object]], runs: Path) -> None:
        self.study, self.done, self.runs, self.total = study, done, runs, len(jobs)
        self.finished = {(row['arm'], row['seed']) for row in done}
        missing = [job for job in jobs if job.key not in self.finished]
        needed = {(job.settings.needs, job.seed) for job in missing if job.settings.needs}
        self.waiting = [job for job in jobs if job in missing or job.key in needed and not self._has_weights(job)]
        self.trained = {job.key for job in jobs} - {job.key for job in self.waiting}
        self.running: dict[Job, object] = {}

    def work(self, processes: int, until: float) -> None:
        """Run what waits, weights that others need first, until the time is over."""
        with multiprocessing.get_context('spawn').Pool(processes) as pool:  # leaving ends what still runs
            # Before two processes want the same ones.
            made = pool.map_async(pictures, list({_made(job): job for job in self.waiting}.values()), chunksize=1)
            made.wait(max(until - time.monotonic(), 0))
            if not made.ready():
                return
            made.get()
            while (self.waiting or self.running) and time.monotonic() < until:
                for job in sorted(self.waiting, key=lambda job: (not self.study.is_needed(job.arm), job.seed)):
                    needs = job.settings.needs
                    if len(self.running) < processes and (not needs or (needs, job.seed) in self.trained):
                        self.waiting.remove(job)
                        self.running[job] = pool.apply_async(run_one, (job,))
                for job in [job for job, task in self.running.items() if task.ready()]:
                    self._take(job)
                time.sleep(POLL_SECONDS)

    def _take(self, job: Job) -> None:
        try:
            row = self.running.pop(job).get()
        except Exception as error:  # the others go on; those that wait for its weights never start
            print(f'{job.arm}, seed {job.seed}: {type(error).__name__}: {error}', flush=True)
            self.waiting = [other for other in self.waiting if (other.settings.needs, other.seed) != job.key]
            return
        self.trained.add(job.key)
        if job.key not in self.finished:
            self.done.append(row)
            with self.runs.open('a', encoding='utf-8') as file:
                file.write(json.dumps(row) + '\n')
        words = (f'{name}={value}' for name, value in row.items())
        print(f'{len(self.done)} of {self.total} runs:', *words, flush=True)

    @staticmethod
    def _has_weights(job: Job) -> bool:
        return (weights_folder(*job.key, job.scratch) / 'config.json').exists()  # it is written last


def _made(job: Job) -> tuple[object, int]:
    return job.recipe.made_pictures, job.seed


def run_study(study: Study, description: str | None) -> None:
    """Read the words of the command line, run what is missing and save the tables."""
    parser = argparse.ArgumentParser(description=description)
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
            Job(name, seed, arm, scratch.resolve(), ns.device, study.tiny if ns.tiny else {}, study.measure,
                study.is_needed(name))
            for name, arm in study.arms.items() for seed in range(min(arm.seeds, ns.seeds or arm.seeds))]
        wanted = {job.key for job in jobs if ns.only in job.arm}
        wanted |= {(job.settings.needs, job.seed) for job in jobs if job.key in wanted}
        jobs = [job for job in jobs if job.key in wanted]
        try:
            _Queue(study, jobs, done, runs).work(ns.jobs, until)
        finally:
            ns.results.mkdir(parents=True, exist_ok=True)
            done.sort(key=lambda row: (list(study.arms).index(row['arm']), row['seed']))
            verdicts = [verdict(claim, done) for claim in study.claims]
            if done:
                save(f'{study.name}-runs', done, ns.results, quiet=True)
                save(study.name, [row for row in verdicts if row is not None], ns.results)
            if len(done) < len(jobs):
                print(f'incomplete: {len(done)} of {len(jobs)} runs; start again with the same --runs to go on.')
