"""Published files: which network each is of, and its tensors under the names of that network."""
import functools
import json
import math
from random import Random

import original_layouts
import pytest
import timm
import torch

from timm_miil import catalog
from timm_miil._errors import CheckpointError
from timm_miil.models.published import Network, convert_published, identify

NOT_FOR_TIMM = ('stam', 'peta', 'mobilenasnet')
ENTRIES = {name: entry for name, entry in catalog.weights().items() if not any(word in name for word in NOT_FOR_TIMM)}
NUM_CLASSES = 21
DEEP = ('mldecoder_tresnet_l', 'mldecoder_tresnet_xl')  # of the same blocks as others, and minutes to build
FIRST = {entry.architecture: name for name, entry in reversed(ENTRIES.items()) if entry.architecture not in DEEP}


def meta_model(network, **kwargs):
    return network.build(device='meta', **kwargs)


def assert_loads(network, tensors):
    """Into what timm builds from the facts of the network, as they come out of a config.json."""
    args = json.loads(json.dumps(network.model_args))
    model = timm.create_model(network.architecture, num_classes=network.num_classes, device='meta', **args)
    model.load_state_dict(tensors, strict=True, assign=True)


# The first of each architecture by default.
@pytest.mark.parametrize(
    'name', [name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.slow) for name in ENTRIES])
def test_every_file_of_the_catalogue_is_known_and_loads(name):
    entry = ENTRIES[name]
    check_published(entry.architecture, entry.num_classes or 11221)


@functools.cache
def check_published(architecture, num_classes):
    tensors = original_layouts.published(architecture, num_classes)
    network = identify(tensors, architecture)
    assert network.architecture == architecture
    assert network.num_classes == num_classes
    converted = convert_published(tensors, network)
    assert_loads(network, converted)
    assert identify(converted, architecture) == network


# What tensors tell by themselves, whatever the file is called.
ALONE = [
    'tresnet_m', 'tresnet_l', 'tresnet_xl', 'tresnet_v2_l', 'miil_tresnet_s', 'miil_tresnet_v2_xl',
    'miil_tresnet_m_bottleneck', 'miil_tresnet_l_bottleneck', 'miil_sdl_tresnet_m', 'mldecoder_tresnet_m',
    'mldecoder_tresnet_l', 'mldecoder_tresnet_xl', 'levit_384', 'miil_levit_768', 'miil_ofa_595m', 'hardcorenas_c',
    'miil_binas_d', 'mobilenetv3_large_100', 'resnet50', 'vit_base_patch16_224_miil', 'vit_base_patch16_224',
    'mixer_b16_224', 'edgenext_small', 'miil_resnet8x4', 'miil_resnet32x4']


LARGE = ('tresnet_l', 'tresnet_xl', 'v2_l', 'v2_xl', 'l_bottleneck')  # of the same blocks as others


@pytest.mark.parametrize('architecture', [
    pytest.param(name, marks=pytest.mark.slow) if name.endswith(LARGE) else name for name in ALONE])
def test_the_tensors_decide(architecture):
    tensors = original_layouts.published(architecture, NUM_CLASSES)
    for told in (None, 'tresnet_l', 'vit_tiny_patch16_224'):
        network = identify(tensors, told)
        assert (network.architecture, network.num_classes) == (architecture, NUM_CLASSES)


OWN_LAYOUTS = [
    'tresnet_v2_l', 'miil_tresnet_m_bottleneck', 'miil_sdl_tresnet_m', 'mldecoder_tresnet_m', 'levit_384',
    'miil_levit_768', 'miil_ofa_595m', 'miil_binas_d', 'edgenext_small', 'mldecoder_scenes']


@pytest.mark.parametrize('architecture', OWN_LAYOUTS)
def test_tensors_under_the_networks_own_names_stay_as_they_are(architecture):
    told = architecture if architecture == 'mldecoder_scenes' else None
    tensors = original_layouts.published(architecture, NUM_CLASSES)
    converted = convert_published(tensors, identify(tensors, told))
    assert set(tensors) != set(converted) or architecture in ('miil_binas_d', 'mldecoder_scenes')
    again = identify(converted, told)
    assert again == identify(tensors, told)
    assert list(convert_published(converted, again)) == list(converted)


@pytest.mark.parametrize('architecture, told, expected', [
    ('tresnet_v2_l', 'miil_tresnet_v2_l_slope1e6', 'miil_tresnet_v2_l_slope1e6'),
    ('tresnet_v2_l', 'tresnet_l', 'tresnet_v2_l'),
    ('tresnet_l', 'miil_tresnet_v2_l_slope1e6', 'tresnet_l'),
    ('miil_tresnet_l_bottleneck', 'tresnet_l', 'miil_tresnet_l_bottleneck'),
    ('mldecoder_tresnet_l', 'miil_tresnet_v2_l_slope1e6', 'mldecoder_tresnet_l'),
    ('levit_384', 'miil_levit_768', 'levit_384'),
    ('hardcorenas_b', 'hardcorenas_a', 'hardcorenas_b'),
])
def test_the_architecture_is_asked_where_tensors_are_silent(architecture, told, expected):
    assert identify(original_layouts.published(architecture, NUM_CLASSES), told).architecture == expected


@pytest.mark.parametrize('layers, width, v2', [([4, 5, 24, 3], 1.3, False), ([3, 4, 23, 3], 1.0, True)])
def test_a_two_layer_head_may_be_on_any_body(layers, width, v2):
    network = Network(
        'miil_tresnet_l_bottleneck', dict(layers=layers, width_factor=width) | ({'v2': True} if v2 else {}), 5)
    tensors = original_layouts.bottleneck(original_layouts.tresnet(meta_model(network).state_dict(), v2))
    found = identify(tensors)
    assert found.model_args.get('v2', False) == v2
    assert_loads(found, convert_published(tensors, found))


@pytest.mark.parametrize('groups, num_classes, expected', [
    (100, 9605, {}), (200, 9605, {'num_groups': 200}), (80, 80, {}), (196, 196, {'num_groups': 196})])
def test_queries_of_an_ml_decoder_are_counted(groups, num_classes, expected):
    tensors = original_layouts.published('mldecoder_tresnet_m', NUM_CLASSES)
    tensors['head.decoder.query_embed.weight'] = torch.empty(groups, 768, device='meta')
    tensors['head.decoder.duplicate_pooling'] = torch.empty(groups, 768, -(-num_classes // groups), device='meta')
    tensors['head.decoder.duplicate_pooling_bias'] = torch.empty(num_classes, device='meta')
    network = identify(tensors)
    assert network == Network('mldecoder_tresnet_m', expected, num_classes)
    if groups == 200:
        assert_loads(network, convert_published(tensors, network))


def test_an_ml_decoder_of_other_sizes_and_on_the_first_layout_is_built_by_name():
    args = dict(backbone='tresnet_l', embed_dim=64, feedforward_dim=96)
    tensors = original_layouts.tresnet(original_layouts.ml_decoder(
        meta_model(Network('mldecoder', args, 7)).state_dict()))
    network = identify(tensors, 'mldecoder_tresnet_l')
    assert (network.architecture, network.model_args) == ('mldecoder', args)
    assert_loads(network, convert_published(tensors, network))


def test_a_second_head_of_a_levit_is_seen():
    model = timm.create_model('levit_384', num_classes=9, device='meta')
    tensors = original_layouts.levit(model.state_dict(), [4, 4, 4])
    assert 'head_dist.l.weight' in tensors
    network = identify(tensors, 'levit_384')
    assert network == Network('levit_384', {'distilled': True}, 9)
    assert_loads(network, convert_published(tensors, network))


# Of networks that timm has no place for, in words that say what to do.
SUPERNET = {'blocks.1.0.conv_dw.0.weight': (48, 1, 3, 3), 'blocks.1.0.conv_dw.1.weight': (48, 1, 5, 5),
            'blocks.1.0.bn3.2.weight': (24,), 'conv_stem.weight': (32, 3, 3, 3)}
STAM = {'aggregate.cls_token': (1, 1, 768), 'patch_embed.proj.weight': (768, 3, 16, 16), 'head.weight': (400, 768)}
PETA = {'aggregate.cls_token': (1, 1, 2048), 'body.conv1.0.weight': (64, 48, 3, 3), 'head.fc.weight': (23, 2048)}
EAT = {'tf.pos_embed': (1, 113, 128), 'down.0.down.1.weight': (32, 16, 5), 'start.1.weight': (16, 1, 7)}


@pytest.mark.parametrize('shapes, words', [
    (SUPERNET, 'search supernet, 3 of its 4 tensors.*hardcorenas_a.miil_red_in1k'),
    (STAM, 'STAM, a network for video'),
    (PETA, 'PETA, a network for albums'),
    (EAT, 'EAT, a network for sound'),
    ({'encoder.weight': (3, 3)}, "no network that is known here: 1 tensors, 'encoder.weight'.*name the architecture"),
    ({'backbone.conv1.weight': (3, 3), 'head.fc.weight': (3, 3)}, 'config.json'),
])
def test_other_files_are_refused_in_words(shapes, words):
    with pytest.raises(CheckpointError, match=words):
        identify({key: torch.empty(shape, device='meta') for key, shape in shapes.items()})


def test_an_unknown_tresnet_is_described():
    model = timm.create_model('tresnet_m', layers=[3, 5, 6, 3], device='meta')
    words = 'first layout with 3-5-6-3 blocks and a stem of 64; known are miil_tresnet_s .*, tresnet_m '
    with pytest.raises(CheckpointError, match=words):
        identify(original_layouts.tresnet(model.state_dict()))


def test_the_nearest_network_is_named():
    tensors = original_layouts.published('miil_binas_c', 10)
    tensors['blocks.3.2.conv_dw.weight'] = torch.empty(320, 1, 3, 3, device='meta')
    with pytest.raises(CheckpointError, match='not of miil_binas_c, the nearest.*blocks.3.2.conv_dw.weight'):
        identify(tensors)


@pytest.fixture(scope='module')
def small():
    """A real file of the original layout, small."""
    torch.manual_seed(0)
    model = timm.create_model('tresnet_m', num_classes=3)
    return original_layouts.tresnet(model.state_dict())


NETWORK = Network('tresnet_m', {}, 3)


@pytest.mark.parametrize('wrap', [
    lambda tensors: {'model': tensors, 'num_classes': 3, 'idx_to_class': {0: 'a'}},
    lambda tensors: {'state_dict': tensors, 'epoch': 3},
    lambda tensors: {f'module.{key}': tensor for key, tensor in tensors.items()},
    lambda tensors: {'state_dict': {f'module.{key}': tensor for key, tensor in tensors.items()}},
])
def test_wrappers_and_prefixes_come_off(small, wrap):
    wrapped = wrap(small)
    assert identify(wrapped) == NETWORK
    plain = convert_published(small, NETWORK)
    for key, tensor in convert_published(wrapped, NETWORK).items():
        assert torch.equal(tensor, plain[key]), key


def test_filters_are_dropped_and_counters_are_zeros(small):
    blurred = small | {'body.layer2.0.conv1.1.op.filt': torch.ones(128, 1, 3, 3)}
    converted = convert_published(blurred, identify(blurred))
    counters = [tensor for key, tensor in converted.items() if key.endswith('num_batches_tracked')]
    assert counters and not any('num_batches' in key for key in small)
    assert all(counter.dtype == torch.int64 and counter.device.type == 'cpu' and counter == 0 for counter in counters)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_the_dtype_is_kept(small, dtype):
    halved = {key: tensor.to(dtype) for key, tensor in small.items()}
    floats = {tensor.dtype for tensor in convert_published(halved, NETWORK).values() if tensor.is_floating_point()}
    assert floats == {dtype}


def test_tensors_are_in_one_piece_and_alone_in_their_memory(small):
    tensors = dict(small)
    tensors['body.conv1.0.weight'] = tensors['body.conv1.0.weight'].to(memory_format=torch.channels_last)
    tensors['body.conv1.1.bias'] = tensors['body.conv1.1.weight']          # the same memory
    tensors['head.fc.bias'] = torch.arange(300.0)[7:10]                    # a part of more memory
    converted = convert_published(tensors, NETWORK)
    assert all(tensor.is_contiguous() for tensor in converted.values())
    storages = [tensor.untyped_storage() for tensor in converted.values()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert all(len(storage) == tensor.nbytes for storage, tensor in zip(storages, converted.values()))
    assert converted['head.fc.bias'].tolist() == [7.0, 8.0, 9.0]


def test_norms_change_exactly_once(small):
    negative = small | {'body.conv1.1.weight': torch.full((64,), -0.5)}
    converted = convert_published(negative, NETWORK)
    assert torch.equal(converted['body.conv1.bn.weight'], torch.full((64,), -0.5).abs() + 1e-5)
    again = convert_published(converted, identify(converted))
    assert list(again) == list(timm.create_model('tresnet_m', device='meta').state_dict())
    assert all(torch.equal(tensor, converted[key]) for key, tensor in again.items())


@pytest.mark.parametrize('change, words', [
    (lambda tensors: tensors.pop('body.layer3.5.conv2.0.weight'), '1 missing: body.layer3.5.conv2.conv.weight'),
    (lambda tensors: tensors.update({'extra.weight': torch.zeros(1)}), "first is 'extra.weight'"),
    (lambda tensors: tensors.update({'head.fc.weight': torch.zeros(3, 7)}), r'head.fc.weight is \(3, 7\) instead of'),
])
def test_what_does_not_fit_is_named(small, change, words):
    tensors = dict(small)
    change(tensors)
    with pytest.raises(CheckpointError, match=words):
        convert_published(tensors, NETWORK)


FUZZED = ['tresnet_m', 'miil_sdl_tresnet_m', 'miil_tresnet_m_bottleneck', 'miil_levit_768', 'miil_ofa_595m',
          'miil_binas_a', 'miil_resnet8x4', 'edgenext_small']
SHAPES = [(), (0,), (1,), (3, 3), (2, 3, 4), (1, 1, 1, 1), (5, 5, 5, 5, 5)]


@pytest.mark.parametrize('architecture', FUZZED)
def test_damaged_files_are_refused_by_one_error(architecture):
    random = Random(architecture)
    whole = original_layouts.published(architecture, NUM_CLASSES)
    telling = [key for key in whole if key.count('.') < 4 or '.0.' in key]
    for _ in range(6):
        tensors = dict(whole)
        for key in random.sample(telling, 2) + random.sample(sorted(whole), 1):
            damage = random.choice(['drop', 'rename', 'reshape'])
            tensor = tensors.pop(key, None)
            if damage == 'reshape' and tensor is not None:
                shape = random.choice([shape for shape in SHAPES if shape != tuple(tensor.shape)])
                tensors[key] = torch.empty(shape, device='meta')
            elif damage == 'rename':
                name = random.choice(['', 'layer1.0.conv3.x', 'head.embed.weight', 'stages.77.blocks.0.x', key + '.'])
                tensors[name] = torch.empty(3, device='meta')
        with pytest.raises(CheckpointError):
            convert_published(tensors, identify(tensors, random.choice([None, architecture, 'tresnet_l'])))


# Every original network that the reference was run with: key names, outputs, and the round trip through a file.
CASES = {
    'tresnet_m_v1_in1k_224': Network('tresnet_m', {}, 1000),
    'tresnet_l_v1_in1k_224': Network('tresnet_l', {}, 1000),
    'tresnet_l_v2_in21k_196c_224': Network('tresnet_v2_l', {}, 196),
    'tresnet_l_v2_tresnetrepo_196c_224': Network('miil_tresnet_v2_l_slope1e6', {}, 196),
    'mldecoder_tresnet_m_coco80_224': Network('mldecoder_tresnet_m', {}, 80),
    'hardcorenas_a_in1k_224': Network('hardcorenas_a', {}, 1000),
    'binas_a_in1k_224': Network('miil_binas_a', {}, 1000),
    'ofa_595m_s_in1k_224': Network('miil_ofa_595m', {}, 1000),
    'levit_384_in1k_224': Network('levit_384', {'distilled': False}, 1000),
}


@pytest.mark.parametrize('case', CASES)
def test_the_inverse_used_here_is_the_originals(case, arch_fixture):
    facts = arch_fixture(case).facts
    wanted = {key: tuple(shape) for key, shape, _ in facts['entries'] if not key.endswith('num_batches_tracked')}
    made = original_layouts.published(CASES[case].architecture, facts['num_classes'])
    assert {key: tuple(tensor.shape) for key, tensor in made.items() if not key.endswith('tracked')} == wanted


@pytest.mark.parametrize('case', [  # the largest are slow; test_pretrained.py loads the ML-Decoder by default
    pytest.param(case, marks=pytest.mark.slow) if case.startswith(('tresnet_l', 'mldecoder')) else case
    for case in CASES])
def test_conversion_gives_the_original_outputs_and_survives_a_file(case, arch_fixture, tmp_path):
    fixture, expected = arch_fixture(case), CASES[case]
    original = fixture.state_dict()
    network = identify(original, expected.architecture)
    assert network == expected
    converted = convert_published(original, network)
    model = network.build().eval()
    model.load_state_dict(converted)
    buffers = math.prod(converted['head.query_embed'].shape) if 'head.query_embed' in converted else 0
    assert sum(parameter.numel() for parameter in model.parameters()) + buffers == fixture.facts['num_params']
    with torch.inference_mode():
        features = model.forward_features(fixture.images())
        logits = model.forward_head(features)
        pooled = features.mean((2, 3)) if 'tresnet' in case else model.forward_head(features, pre_logits=True)
    fixture.check_logits(logits)
    fixture.check_pooled(pooled)

    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert type(again) is type(model)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, converted[key]) and tensor.dtype == converted[key].dtype, key
    with torch.inference_mode():
        assert torch.equal(again(fixture.images()), logits)
