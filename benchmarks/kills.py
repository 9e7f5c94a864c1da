"""Does a training run that is killed at any moment, and resumed, end with the same weights to the bit?

    python benchmarks/kills.py              # about 15 minutes on a CPU

Each run of `timm-miil train` is sent SIGKILL three times, at moments drawn over the time that an undisturbed run takes,
and started again with `--resume auto` after each. A row says when it was killed, how far the newest whole checkpoint
was, and whether weights, epochs and figures at the end are those of the undisturbed run.
"""
import argparse
import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run import save
from tqdm import tqdm

from timm_miil.data import SceneConfig, make_scenes
from timm_miil.train.checkpoint import newest_checkpoint

SCENES = SceneConfig(num_train=256, num_val=64, num_test=64)
KILLS = 3
# Checkpoints within epochs, averaged weights and dropout: much to be put back.
SETTINGS = ('epochs=3', 'checkpoint_steps=2', 'ema_decay=0.9', 'model.args.drop_rate=0.1', 'seed=3')
CLOCKED = ('seconds', 'images_per_second')    # of an epoch


def command(data: Path, output: Path) -> list[str]:
    return [
        sys.executable, '-m', 'timm_miil.cli.main', 'train', 'scenes_asl', '--data-dir', str(data), '--output',
        str(output), '--resume', 'auto', '--device', 'cpu', '--set', *SETTINGS]


def finish(data: Path, output: Path) -> float:
    """Run to the end; the seconds it took."""
    start = time.monotonic()
    subprocess.run(command(data, output), check=True, capture_output=True)
    return time.monotonic() - start


def kill(data: Path, output: Path, after: float) -> str:
    """Kill a run after so many seconds; the newest checkpoint that is whole then, '' if there is none."""
    process = subprocess.Popen(command(data, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = newest_checkpoint(output / 'checkpoints')
    return '' if found is None else f'{found[1]["epoch"]} epochs and {found[1]["step"]} steps'


def outcome(output: Path) -> dict[str, object]:
    """What a run leaves that must be the same."""
    with (output / 'results.csv').open(newline='') as file:
        epochs = [{key: text for key, text in row.items() if key not in CLOCKED} for row in csv.DictReader(file)]
    summary = json.loads((output / 'summary.json').read_text())
    weights = hashlib.sha256((output / 'model' / 'model.safetensors').read_bytes()).hexdigest()
    return {'weights': weights, 'epochs': epochs, 'figures': {key: summary[key] for key in ('best_epoch', 'test')}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--runs', type=int, default=12)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    ns = parser.parse_args()
    os.environ['OMP_NUM_THREADS'] = '1'
    draw, rows = random.Random(ns.seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_scenes(folder / 'scenes', SCENES)
        whole = finish(data, folder / 'undisturbed')
        want = outcome(folder / 'undisturbed')
        for number in tqdm(range(1, ns.runs + 1), unit='run'):
            output = folder / f'run-{number}'
            kills = [(after, kill(data, output, after)) for after in (draw.uniform(0, whole) for _ in range(KILLS))]
            finish(data, output)
            found = outcome(output)
            rows += [
                {'run': number, 'undisturbed_s': round(whole, 1), 'killed_after_s': round(after, 2),
                 'newest_checkpoint': newest, **{f'same_{key}': found[key] == want[key] for key in want}}
                for after, newest in kills]
    save('kills', rows)


if __name__ == '__main__':
    main()
