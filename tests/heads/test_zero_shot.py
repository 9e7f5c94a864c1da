"""The zero-shot ML-Decoder: golden fixtures, label sets, augmentations, chunks and errors."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from timm_miil.heads import ZeroShotMLDecoder, convert_original_state_dict

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'mldecoder'
CASES = {
    name: case for name, case in json.loads((FIXTURES / 'manifest.json').read_text())['cases'].items()
    if case['config']['zsl']}
DTYPES = {'float32': torch.float32, 'float64': torch.float64}


def section(tensors, start):
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}


@pytest.mark.parametrize('dtype_name', DTYPES)
@pytest.mark.parametrize('name', CASES)
def test_fixture_is_reproduced_for_each_label_set(name, dtype_name):
    tensors, config, close = load_file(FIXTURES / CASES[name]['file']), CASES[name]['config'], CASES[name]['tolerance']
    dtype, close = DTYPES[dtype_name], close[dtype_name]
    head = ZeroShotMLDecoder(config['initial_num_features'], config['decoder_embedding'], dtype=dtype).eval()
    head.load_state_dict(convert_original_state_dict(section(tensors, 'state.')))
    expected = section(tensors, f'expected.{dtype_name}.')
    label_sets = section(tensors, 'wordvecs')
    assert label_sets
    for suffix, word_vectors in label_sets.items():
        head.set_queries(word_vectors.T)
        head.zero_grad()
        x = tensors['x'].to(dtype, copy=True).requires_grad_()
        logits = head(x)
        torch.testing.assert_close(logits, expected[f'logits{suffix}'], **close)
        (logits * tensors[f'cotangent{suffix}'].to(dtype)).sum().backward()
        gradients = section(expected, f'grad{suffix}.')
        torch.testing.assert_close(x.grad, gradients.pop('x'), **close)
        assert bool(gradients) == (dtype_name == 'float64')  # the reference recorded them in float64 only
        parameters = dict(head.named_parameters())
        for key, gradient in convert_original_state_dict(gradients).items():
            torch.testing.assert_close(parameters[key].grad, gradient, **close, msg=f'{suffix} {key} differs')


def test_zero_shot_head_says_what_is_missing():
    head = ZeroShotMLDecoder(6, embed_dim=8, text_dim=10)
    with pytest.raises(RuntimeError, match='no label set yet; call set_queries'):
        head(torch.zeros(1, 9, 6))
    with pytest.raises(ValueError, match=r'embeddings must have shape \(K, 10\), got \(10, 7\); pass embeddings.T'):
        head.set_queries(torch.zeros(10, 7))
    with pytest.raises(ValueError, match=r'got \(0, 10\)\.'):
        head.set_queries(torch.zeros(0, 10))
