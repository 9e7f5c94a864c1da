"""Original TResNet checkpoints become timm's: fixtures of the original networks, timm's own converter, errors."""
import hashlib
import json

import pytest
import timm
import torch

from timm_miil._errors import CheckpointError
from timm_miil.models.miil_tresnet import convert_original_tresnet

CASES = {
    'tresnet_m_v1_in1k_224': 'tresnet_m',
    'tresnet_l_v1_in1k_224': 'tresnet_l',
    'tresnet_l_v2_in21k_196c_224': 'tresnet_v2_l',
}


def test_weight_rule_gives_the_recorded_numbers(arch_fixture, fixtures_dir):
    recorded = json.loads((fixtures_dir / 'arch' / '_rule_check.json').read_text())['tensors']
    weights = arch_fixture('tresnet_m_v1_in1k_224').state_dict()
    checked = [tensor for tensor in recorded if tensor['key'] in weights and not tensor['salt']]
    assert checked
    for tensor in checked:
        made = weights[tensor['key']].numpy().astype('<f4').tobytes()
        if list(weights[tensor['key']].shape) == tensor['shape']:
            assert hashlib.sha256(made).hexdigest() == tensor['sha256_le_f32'], tensor['key']


@pytest.mark.parametrize('case', CASES)
def test_original_weights_give_the_original_outputs(case, arch_fixture):
    fixture = arch_fixture(case)
    model = timm.create_model(CASES[case], num_classes=fixture.facts['num_classes']).eval()
    state_dict = fixture.state_dict()
    converted = convert_original_tresnet(state_dict, model)
    assert converted.keys() == model.state_dict().keys()
    model.load_state_dict(converted)
    with torch.inference_mode():
        fixture.check_logits(model(fixture.images()))
    by_timm = timm.models.tresnet.checkpoint_filter_fn({'model': state_dict}, model)
    for key, tensor in by_timm.items():
        assert torch.equal(tensor, converted[key]), key


@pytest.fixture(scope='module')
def original(arch_fixture):
    return arch_fixture('tresnet_m_v1_in1k_224').state_dict()


def test_blur_filters_are_dropped_and_missing_counters_filled(original):
    model = timm.create_model('tresnet_m')
    blur = {'body.layer2.0.conv1.1.op.filt': torch.ones(128, 1, 3, 3)}
    without = {key: tensor for key, tensor in original.items() if 'num_batches_tracked' not in key}
    assert convert_original_tresnet(without | blur, model).keys() == model.state_dict().keys()


@pytest.mark.parametrize('key', [
    'body.layer2.0.conv1.0.weight',          # a strided convolution sits one level deeper
    'body.layer1.0.conv1.conv.weight',       # timm's own name: converting twice would spoil the norms
    'body.layer1.0.conv1.1.op.filt',         # no blur there
    'body.layer9.0.conv1.0.weight',
])
def test_unknown_keys_are_refused(original, key):
    with pytest.raises(CheckpointError, match=f'1 keys are not of an original TResNet.*first is {key!r}'):
        convert_original_tresnet(original | {key: torch.zeros(1)}, timm.create_model('tresnet_m', device='meta'))
