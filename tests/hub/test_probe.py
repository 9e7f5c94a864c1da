"""The fixed input and what is recorded of a network's answer: the same anywhere, and different for other weights."""
import copy
import json

import pytest
import timm
import torch

import timm_miil  # noqa: F401 - registers the models
from timm_miil._errors import HubError
from timm_miil.hub._probe import check_probe, probe_pictures, record_probe


@pytest.fixture(scope='module')
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model('miil_tresnet_v2_xl', layers=(1, 1, 1, 1), width_factor=0.25, num_classes=40)


@pytest.fixture
def record(model):
    return json.loads(json.dumps(record_probe(model)))


def test_the_pictures_are_these_numbers():
    pictures = probe_pictures((2, 3, 64, 48))
    # By plain integers, without torch.
    for batch, channel, y, x in [(0, 0, 0, 0), (0, 2, 63, 47), (1, 0, 9, 30), (1, 2, 40, 1)]:
        plane = batch * 3 + channel
        scattered = [
            (number * number % 2147483647 * 48271 + number * 69621 + 11) % 2147483647 % 256
            for number in ((plane * 1024 + y // 8) * 1024 + x // 8, (plane * 64 + y) * 48 + x)]
        assert pictures[batch, channel, y, x].item() == (3 * scattered[0] + scattered[1]) // 4 / 64 - 2
    assert pictures.dtype == torch.float32 and 0.7 < pictures.std() < 1.2 and abs(pictures.mean()) < 0.2
    assert torch.equal(pictures.bfloat16().float(), pictures) and torch.equal(pictures.half().float(), pictures)
    assert len({tuple(row) for row in pictures.flatten(0, 2).tolist()}) == 2 * 3 * 64, 'no row is another one'


def test_neither_generator_nor_default_dtype_nor_threads_matter(model, record):
    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    try:
        check_probe(model, record)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.autocast('cpu', torch.bfloat16):
        check_probe(model, record)


def test_equal_weights_give_equal_records(model, record):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for other in (model, copy.deepcopy(model).to(memory_format=torch.channels_last), copy.deepcopy(model).double()):
            assert record_probe(other) == record
    finally:
        torch.set_num_threads(threads)


def test_modes_and_gradients_stay(model, record):
    model.train()
    model.body.conv1.eval()
    check_probe(model, record)
    assert model.training and not model.body.conv1.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    model.eval()


def test_half_is_asked_as_it_loads(model):
    half = timm.create_model('miil_tresnet_v2_xl', layers=(1, 1, 1, 1), width_factor=0.25, num_classes=40).half()
    record = record_probe(half)
    assert next(half.parameters()).dtype == torch.float16, 'the model itself is as it was'
    check_probe(half, record)
    check_probe(half.float(), record)


def test_sizes_follow_the_configuration(record):
    assert record['shape'] == [2, 3, 224, 224] and record['num_logits'] == 40
    assert [len(row) for row in record['logits']] == [16, 16]
    fixed = timm.create_model('vit_tiny_patch16_384', embed_dim=12, depth=1, num_heads=2, num_classes=5)
    assert record_probe(fixed)['shape'] == [2, 3, 384, 384]
    assert [len(row) for row in record_probe(fixed)['logits']] == [5, 5]


@pytest.mark.parametrize('change', [0.1, 1.0])
def test_other_weights_are_told(model, record, change):
    weight = next(tensor for name, tensor in model.state_dict().items() if 'layer2' in name and tensor.ndim == 4)
    before = weight.clone()
    weight[0] += change * weight.std()
    with pytest.raises(HubError, match='answers otherwise than at its conversion: logits of fixed picture 1 are off'):
        check_probe(model, record)
    weight.copy_(before)
    check_probe(model, record)


def test_weights_that_are_no_numbers_are_told(model):
    weight = model.state_dict()['head.fc.bias']
    before = weight.clone()
    weight[0] = float('nan')
    with pytest.raises(HubError, match='not finite numbers'):
        record_probe(model)
    weight.copy_(before)


@pytest.mark.parametrize(('change', 'message'), [
    ({'recipe': 'noise'}, "pictures made by 'noise', this release knows"),
    ({'shape': [2, 3, 10 ** 9, 10 ** 9]}, 'a shape up to'), ({'shape': [2, 3, True, 4]}, 'a shape up to'),
    ({'shape': [3, 3, 64, 64]}, 'a shape up to'), ({'shape': 'large'}, 'a shape up to'),
    ({'logits': [[1.0] * 16]}, 'the first 16 logits'), ({'logits': [[1.0] * 16, ['1'] * 16]}, 'the first 16 logits'),
    ({'norms': [1.0, float('nan')]}, 'the first 16 logits'), ({'norms': [-1.0, 1.0]}, 'the first 16 logits'),
    ({'norms': [1e308, 1.0]}, 'the first 16 logits'), ({'num_logits': 0}, 'the first 16 logits'),
    ({'num_logits': 41}, 'gives 40 logits where 41 were recorded'),
    ({'shape': [2, 1, 64, 64]}, r'fails on pictures of shape \(2, 1, 64, 64\)'),
])
def test_a_damaged_record_is_told(model, record, change, message):
    with pytest.raises(HubError, match=message):
        check_probe(model, record | change)


@pytest.mark.parametrize('record', [None, [], 'x', {}])
def test_what_is_no_record_is_told(model, record):
    with pytest.raises(HubError, match='recorded logits'):
        check_probe(model, record)
