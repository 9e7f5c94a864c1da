"""What a run must know to go on exactly where it was, in forms that `torch.load(weights_only=True)` reads."""
import contextlib
import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from timm_miil.data import ClassTree, ImageStream, LabelledImages, MultiLabelRecords, mix_seed, seeded
from timm_miil.train.recipe import Recipe
from timm_miil.train.splits import Splits

__all__ = [
    'READERS', 'differences', 'fingerprint', 'get_random_state', 'seed_process', 'seeded_run', 'set_random_state']

# Settings that leave the result as it is, but for rounding and for what sees one part of a step (batch norms, budgets
# of losses) or one worker's share of a stream, or that are said again by what the data hold.
FREE = frozenset({
    'checkpoint_steps', 'data', 'grad_accum_steps', 'identities', 'keep_checkpoints', 'paper', 'scenes', 'stop_epoch',
    'summary', 'torchcompile', 'tree_scenes', 'workers'})
FREE_OF_TABLES = frozenset({'teacher.cache', 'teacher.cache_gb', 'teacher.torchcompile'})

# In how many parts a stream is read, which decides its order; a run may go on with another number.
READERS = 'readers'
# Files of pictures, and how much of each, that tell whether they are the same ones.
SAMPLED, SAMPLED_BYTES = 64, 1 << 14


@contextlib.contextmanager
def seeded_run(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators, and the accelerator's, for a run, and put them back after it."""
    with seeded(seed):
        if device.type == 'cpu':
            yield
            return
        module = torch.get_device_module(device)
        state = module.get_rng_state()
        module.manual_seed(seed)
        try:
            yield
        finally:
            module.set_rng_state(state)


def seed_process(seed: int, process: int, device: torch.device) -> None:
    """Let a process other than the first draw numbers of its own, such as which features to drop."""
    seed = mix_seed(seed, process)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type != 'cpu':
        torch.get_device_module(device).manual_seed(seed)


def get_random_state(device: torch.device) -> dict[str, Any]:
    """State of the global generators and of the accelerator's."""
    version, words, gauss = random.getstate()
    kind, numbers, place, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        'python': [version, torch.tensor(words, dtype=torch.int64), gauss],
        'numpy': [kind, torch.from_numpy(np.asarray(numbers).astype(np.int64)), place, has_gauss, cached],
        'torch': torch.get_rng_state()}
    if device.type != 'cpu':
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators into a state of `get_random_state`; that of another kind of accelerator is left out."""
    version, words, gauss = state['python']
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, numbers, place, has_gauss, cached = state['numpy']
    np.random.set_state((kind, numbers.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state['torch'])
    if device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])


def fingerprint(recipe: Recipe, splits: Splits, num_processes: int) -> dict[str, str]:
    """What must be the same when a run goes on: the settings that matter, and what the pictures are."""
    settings = {
        field.name: value for field in dataclasses.fields(recipe) if field.name not in FREE
        for value in [getattr(recipe, field.name)]}
    pictures = {f'pictures of {split}': _describe(getattr(splits, split)) for split in ('train', 'val', 'test')}
    if recipe.task == 'semantic' and isinstance(splits.tree, ClassTree):
        pictures['tree'] = hashlib.sha256(json.dumps(splits.tree.parents).encode()).hexdigest()[:8]
    if isinstance(splits.train, ImageStream):
        pictures[READERS] = str(num_processes * max(recipe.workers, 1))
    flat = {key: value for key, value in _flat(settings).items() if key not in FREE_OF_TABLES}
    if recipe.teacher is not None:
        flat['teacher is cached'] = json.dumps(bool(recipe.teacher.cache))  # wherever that is
    return flat | pictures


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """In words, each key of two fingerprints whose values must agree and differ; keys of one alone are passed over."""
    return [
        f'{key} was {old[key]} and is {new[key]}' for key in new
        if key in old and old[key] != new[key] and key != READERS]


def _flat(settings: Mapping[str, Any], prefix: str = '') -> dict[str, str]:
    """Values by dotted key; a table of arguments is one value, so that one that is added is seen."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if dataclasses.is_dataclass(value):
            inner = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            flat |= _flat(inner, f'{prefix}{name}.') | {prefix + name: 'given'}  # or not: null
        else:
            flat[prefix + name] = json.dumps(value, sort_keys=True, default=_plain)
    return flat


def _plain(value: object) -> Any:
    return dict(value) if isinstance(value, Mapping) else repr(value)


def _describe(source: LabelledImages | ImageStream | None) -> str:
    if source is None:
        return 'none'
    digest = hashlib.sha256(json.dumps(source.label_names).encode())
    if isinstance(source, ImageStream):
        return f'a stream of {source.num_images} with {len(source.label_names)} labels ({digest.hexdigest()[:8]})'
    if isinstance(source, MultiLabelRecords):
        for row in np.linspace(0, len(source) - 1, min(len(source), SAMPLED)).astype(int):
            with contextlib.suppress(OSError), open(source.image_paths[row], 'rb') as file:  # who reads it tells better
                digest.update(file.read(SAMPLED_BYTES))
    for numbers in (source.labels.starts, source.labels.columns, source.labels.values):
        digest.update(np.ascontiguousarray(numbers).tobytes())
    return f'{len(source)} with {len(source.label_names)} labels ({digest.hexdigest()[:8]})'
