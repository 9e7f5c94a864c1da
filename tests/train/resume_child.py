"""Trains as asked on standard input, each time in a fork of this process, which may be killed; prints what came of it.

The input is a list of {'scenes', 'output', 'changes', 'kill'}: folders, settings over those of tiny.toml, and what
happens to the process: {} for nothing, {'after': seconds}, {'event': n} to be killed at the n-th time that it opens,
renames or removes a file of the output, {'signal': name, 'step': n} to be sent a signal after a step, or {'limit': n}
for files of at most n bytes. The output is a list of {'status', 'error', 'digest', 'epochs', 'test', 'steps'}.
"""
import hashlib
import json
import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from timm_miil.train import load_recipe, train

EVENTS = ('open', 'os.rename', 'os.remove', 'os.mkdir')


def digest(model):
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def killed_at(number, output):
    count = 0

    def hook(event, args):
        nonlocal count
        if event in EVENTS and str(args[0]).startswith(output):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def run(job, report):
    kill, steps = job.get('kill', {}), []

    def on_step(record):
        steps.append((record.epoch, record.step))
        if 'signal' in kill and len(steps) == kill['step']:
            os.kill(os.getpid(), getattr(signal, kill['signal']))

    if 'event' in kill:
        killed_at(kill['event'], job['output'])
    if 'limit' in kill:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kill['limit'], resource.RLIM_INFINITY))
    recipe = load_recipe(Path(__file__).with_name('tiny.toml')).override(job['changes'])
    found = {}
    try:
        result = train(
            recipe, job['scenes'], output=job['output'], resume=job.get('resume', 'auto'), device='cpu',
            on_step=on_step)
        found = {
            'digest': digest(result.model), 'epochs': [[*e.as_row().values()][:-2] for e in result.epochs],
            'test': dict(result.test_metrics), 'best': result.best_epoch, 'logits': result.val_logits.sum().item()}
    except Exception as error:
        found = {'error': f'{type(error).__name__}: {error}'}
    report.write(json.dumps({**found, 'steps': steps}).encode())


def fork(job):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with os.fdopen(writing, 'wb') as report:
            run(job, report)
        os._exit(0)
    os.close(writing)
    if 'after' in job.get('kill', {}):
        time.sleep(job['kill']['after'])
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, 'rb') as report:
        text = report.read()
    _, status = os.waitpid(child, 0)
    return {'status': os.waitstatus_to_exitcode(status), **json.loads(text or '{}')}


if __name__ == '__main__':
    warnings.simplefilter('error')
    torch.set_num_threads(1)
    print(json.dumps([fork(job) for job in json.load(sys.stdin)]))
