"""What does a model with its weights cost? timm's own loading and ours of one folder, each in a fresh process.

    python benchmarks/load.py                    # about 5 minutes on two cores
    python benchmarks/load.py --model resnet50 --rounds 11

The folder is made by timm, with fresh weights: where the numbers come from changes nothing. Imports are not counted.
Time is processor time, user and system, and time on the wall; memory is the highest resident size above the one after
the imports, measured by the system (VmHWM, reset before loading). Every process also answers one picture, and all
answers must be equal to the bit.
"""
import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import timm_miil.models  # noqa: F401 - registers our networks
import torch
from run import save

from timm_miil.bench import compare, itself

CONTESTANTS = {
    'timm': 'timm.create_model(f"local-dir:{folder}", pretrained=True)',
    'load_model': 'load_model(folder)',
    'load_model, private copy': 'load_model(folder, private_copy=True)',
    'building without storage': 'timm.create_model(f"local-dir:{folder}", pretrained=False, device="meta")',
}
CHILD = '''
import hashlib, json, sys, time
import timm, torch
from timm_miil.models import load_model

def peak():
    with open('/proc/self/status') as file:
        lines = dict(line.split(':', 1) for line in file)
    return int(lines['VmHWM'].split()[0]) / 1024

folder, image_px = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
with open('/proc/self/clear_refs', 'w') as file:
    file.write('5')
before, wall, cpu = peak(), time.perf_counter(), time.process_time()
model = CREATE
cpu, wall, after = time.process_time() - cpu, time.perf_counter() - wall, peak()
answer = None
if not next(model.parameters()).is_meta:
    with torch.inference_mode():
        logits = model.eval()(torch.linspace(-1, 1, 3 * image_px ** 2).reshape(1, 3, image_px, image_px))
    answer = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
print(json.dumps({'cpu': cpu, 'wall': wall, 'peak_mb': after - before, 'used_mb': peak() - before, 'answer': answer}))
'''


class Contestant:
    """One way to load; each call is a fresh process."""

    def __init__(self, create: str, folder: Path, image_px: int) -> None:
        self.words = [sys.executable, '-c', CHILD.replace('CREATE', create), str(folder), str(image_px)]
        self.measured: list[dict[str, float]] = []
        self.answers: set[str] = set()

    def __call__(self) -> float:
        """Load once: seconds of processor time."""
        done = subprocess.run(
            self.words, stdout=subprocess.PIPE, check=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
        found = json.loads(done.stdout)
        self.answers |= {answer} if (answer := found.pop('answer')) else set()
        self.measured.append(found)
        return float(found['cpu'])


def measure(model: str, rounds: int, image_px: int) -> list[dict[str, object]]:
    """Rows of one model: processor time as `compare` gives it, and the rest beside it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / 'model'
        torch.manual_seed(0)
        timm.models.save_for_hf(timm.create_model(model), folder, safe_serialization=True)
        contestants = {
            name: Contestant(create, folder, image_px) for name, create in CONTESTANTS.items()}
        size_mb = (folder / 'model.safetensors').stat().st_size / 2 ** 20
        rows = compare(contestants, repeats=rounds, clock=itself, model=model, file_mb=round(size_mb, 1))
    answers = set[str]().union(*(contestant.answers for contestant in contestants.values()))
    if len(answers) != 1:
        sys.exit(f'the ways to load {model} give {len(answers)} different answers')
    first = contestants[next(iter(contestants))]
    median = functools.partial(_median, rounds=rounds)
    for row in rows:
        own = contestants[str(row['contestant'])]
        row |= {
            'wall_ms': _short(1e3 * median(own, 'wall')),
            'wall_ratio': _short(statistics.median(
                mine['wall'] / other['wall'] for mine, other in zip(own.measured, first.measured))),
            'peak_mb': _short(median(own, 'peak_mb')),
            'peak_ratio': _short(median(own, 'peak_mb') / median(first, 'peak_mb')),
            'peak_with_a_picture_mb': _short(median(own, 'used_mb')),
            'answers_equal': True,
        }
    return rows


def _median(contestant: Contestant, column: str, rounds: int) -> float:
    return statistics.median(found[column] for found in contestant.measured[-rounds:])


def _short(value: float) -> float:
    return float(f'{value:.3g}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', action='append', help='names of models; default tresnet_l')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--image-px', type=int, default=224)
    words = parser.parse_args()
    rows = [row for model in words.model or ['tresnet_l'] for row in measure(model, words.rounds, words.image_px)]
    save('load-cpu', rows)


if __name__ == '__main__':
    main()
