"""Checkpoints in the original layouts, made by the rule that made the fixtures of the architectures."""
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ARCH = Path(__file__).parent / 'fixtures' / 'arch'
GAIN = 2.0


class ArchFixture:
    """One architecture case: the outputs of the original network with weights of rule "philox-u12/1"."""

    def __init__(self, case):
        self.facts = json.loads((ARCH / f'{case}.json').read_text())
        self.expected = load_file(ARCH / f'{case}.safetensors')
        assert self.facts['rule'] == 'philox-u12/1'

    def state_dict(self):
        """The original checkpoint's tensors under the original's keys."""
        gain = self.facts.get('conv_gain', GAIN)
        return {key: weight(self.facts['salt'] + key, key, shape, dtype, gain)
                for key, shape, dtype in self.facts['entries']}

    def images(self):
        n, c, h, w = shape = self.facts['input_shape']
        i, j, y, x = np.meshgrid(*map(np.arange, shape), indexing='ij')
        ramp = (y * (j + 1) + x * (i + 1)) / h
        values = (0.5 * uniform(self.facts['input_name'], shape) + 0.5 * (ramp % 1)) * (1 + (5 * i + 3 * j) % 7) / 7
        return torch.from_numpy(values.astype(np.float32))

    @property
    def bound(self):
        return max(1e-5, 10 * self.facts['float32_vs_float64_relative_l2'])

    def check_logits(self, logits):
        bound = self.bound
        assert list(logits.shape) == self.facts['logits_shape']
        want = self.expected['logits_first64']
        got = logits[:, :want.shape[1]]
        assert (got - want).norm() / want.norm() <= bound
        assert logits.argmax(1).tolist() == self.facts['argmax']
        torch.testing.assert_close(
            logits.double().norm(dim=1), self.expected['logits_l2'].double(), rtol=bound, atol=0)
        off = (logits.double().sum(dim=1) - self.expected['logits_sum'].double()).abs()
        assert (off <= bound * logits.double().norm(dim=1) * logits.shape[1] ** 0.5).all()

    def check_pooled(self, pooled):
        want = self.expected['pooled']
        assert pooled.shape == want.shape
        assert (pooled - want).norm() / want.norm() <= self.bound


def uniform(name, shape):
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    return generator.random(math.prod(shape)).reshape(shape)


def weight(name, key, shape, dtype, gain):
    last = key.rpartition('.')[2]
    if last == 'num_batches_tracked':
        return torch.zeros(shape, dtype=torch.int64)
    u = uniform(name, shape)
    z = math.sqrt(12) * (u - 0.5)
    if last == 'running_var':
        values = 0.5 + u
    elif last == 'running_mean' or last.endswith('bias'):
        values = 0.1 * z
    elif last.endswith('weight') and len(shape) == 1:
        values = 0.6 + 0.6 * u
        values[4::5] *= -1
    elif last.endswith('weight'):
        values = z * math.sqrt((gain if len(shape) == 4 else 1) / math.prod(shape[1:]))
    else:
        values = 0.5 * z
    assert dtype == 'float32'
    return torch.from_numpy(values.astype(np.float32))
