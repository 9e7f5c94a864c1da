"""timm's model contract, for every network that this package registers, found by listing."""
import copy
import pickle
import pkgutil
import warnings

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, group_parameters
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3

import timm_miil.models

MODULES = [module.name for module in pkgutil.iter_modules(timm_miil.models.__path__)]
NAMES = sorted(name for module in MODULES for name in timm.list_models(module=module))
SMALL_PX = 64
FULL_PX_LIMIT = 640
NUM_CLASSES = 42
LEVELS = {'miil_levit_768': 3} | {name: 5 for name in NAMES if 'binas' in name or 'ofa' in name}  # of features_only
ZERO_SHOT = [name for module in ('miil_sdl', 'mldecoder_zero_shot') for name in timm.list_models(module=module)]
# One of each module, or of each kind of network in it; the others are of the same parts and take minutes: slow.
FAST = (
    'mldecoder', 'mldecoder_scenes', 'mldecoder_zero_shot_scenes', 'multilabel_classifier', 'miil_levit_768',
    'miil_sdl_scenes', 'miil_binas_a', 'miil_resnet8x4', 'miil_tresnet_m_bottleneck')
DEEP = ('miil_binas_a', 'miil_levit_768', 'miil_tresnet_m_bottleneck')  # tracing these takes long: slow
SMALL = {  # arguments of those that are large by default
    'miil_levit_768': dict(embed_dim=[48, 64, 80], key_dim=8, depth=[2, 1, 1], num_heads=[3, 4, 6]),
    'mldecoder': dict(backbone='test_vit', embed_dim=32, feedforward_dim=32),
    'miil_tresnet_m_bottleneck': dict(layers=[1, 1, 2, 1], width_factor=0.5),
    'multilabel_classifier': dict(backbone='test_mambaout'),
}


def slow_unless(names):
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


traced = pytest.mark.parametrize(
    'name', slow_unless([name for name in FAST if name not in DEEP]), indirect=True, scope='module')


def image_size(cfg, limit=SMALL_PX):
    """(C, H, W): the configured size, or a smaller one where the network takes any."""
    size = cfg['input_size']
    return tuple(size) if cfg.get('fixed_input_size') else (size[0], min(size[1], limit), min(size[2], limit))


def classes(name, number=NUM_CLASSES):
    """Arguments for so many classes; zero-shot networks take their names."""
    if name in ZERO_SHOT:
        return dict(labels=[f'label {i}' for i in range(number)])
    return dict(num_classes=number, **sizes(name))


def sizes(name):
    return SMALL.get(name, {})


def meta_images(cfg, batch=2):
    return torch.empty(batch, *image_size(cfg, FULL_PX_LIMIT), device='meta')


@pytest.fixture(scope='module', params=slow_unless(FAST))
def name(request):
    return request.param


@pytest.fixture(scope='module')
def shared(name):
    """One network of a name, for tests that do not change it."""
    torch.manual_seed(0)
    return timm.create_model(name, **classes(name)).eval()


@pytest.fixture(scope='module')
def images(shared):
    return torch.rand(2, *image_size(shared.default_cfg), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def features(shared, images):
    with torch.no_grad():
        return shared.forward_features(images)


@pytest.fixture(scope='module')
def logits(shared, images):
    with torch.no_grad():
        return shared(images)


@pytest.fixture(scope='module')
def on_meta(name):
    """One network of a name at its default size, without storage: shapes at full resolution cost nothing."""
    return timm.create_model(name, device='meta', **(classes(name) if name in ZERO_SHOT else sizes(name))).eval()


def train_step(model, images):
    """The logits of a step in training mode, and the gradient of each parameter."""
    torch.manual_seed(0)
    logits = model.train()(images)
    logits.square().mean().backward()
    return logits, {key: parameter.grad for key, parameter in model.named_parameters()}


@pytest.fixture(scope='module')
def step(shared, images):
    return train_step(copy.deepcopy(shared), images)


def test_names_are_ours_alone():
    assert len(NAMES) > 9
    assert {'mldecoder', 'mldecoder_tresnet_m', 'mldecoder_tresnet_l', 'mldecoder_tresnet_xl'} <= set(NAMES)
    assert {'mldecoder_zero_shot', 'mldecoder_zero_shot_scenes', 'multilabel_classifier'} <= set(NAMES)
    from_timm = {module.name for module in pkgutil.iter_modules(timm.models.__path__)}
    assert not from_timm & set(MODULES)


def test_forward_gives_finite_logits_and_repeats_them(shared, images, logits):
    with torch.no_grad():
        assert logits.shape == (2, NUM_CLASSES) == (2, shared.num_classes)
        assert logits.isfinite().all()
        assert torch.equal(logits, shared(images))
        torch.testing.assert_close(shared(images[1:]), logits[1:], rtol=1e-4, atol=1e-4)


def test_forward_is_head_of_features(shared, logits, features):
    with torch.no_grad():
        assert torch.equal(shared.forward_head(features), logits)
        pooled = shared.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, shared.head_hidden_size)


def test_backward_reaches_every_parameter(step):
    logits, gradients = step
    assert logits.isfinite().all()
    assert [key for key, gradient in gradients.items() if gradient is None] == []


def test_configuration_names_real_modules_and_real_sizes(on_meta):
    cfg = on_meta.default_cfg
    keys = on_meta.state_dict().keys()
    for names in (cfg['classifier'], cfg['first_conv']):
        for module in [names] if isinstance(names, str) else names:
            assert f'{module}.weight' in keys
    features = on_meta.forward_features(meta_images(cfg))
    layout = 'NLC' if features.ndim == 3 else getattr(on_meta, 'layout', 'NCHW')
    assert features.shape[1 if layout == 'NCHW' else -1] == on_meta.num_features
    if cfg['pool_size'] is not None:
        assert tuple(features.shape[2:] if layout == 'NCHW' else features.shape[1:3]) == tuple(cfg['pool_size'])
    assert on_meta.num_classes == cfg['num_classes']
    assert on_meta(meta_images(cfg)).shape == (2, cfg['num_classes'])


def test_classifier_can_be_taken_away_and_put_back(name, shared, features):
    model = copy.deepcopy(shared)
    pooled = shared.forward_head(features, pre_logits=True)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model.forward_head(features), pooled)
    model.reset_classifier(0, '')
    unpooled = model.forward_head(features)
    assert unpooled.ndim == features.ndim
    if shared.head_hidden_size == shared.num_features:  # else a layer before the classifier may stay
        assert torch.equal(unpooled, features)
    model.reset_classifier(0 if name in ZERO_SHOT else 7, 'avg')
    if name in ZERO_SHOT:
        model.set_labels([f'other {i}' for i in range(7)])
    assert model.num_classes == 7
    assert model.forward_head(features).shape == (2, 7)
    assert isinstance(model.get_classifier(), torch.nn.Module)
    assert not any(module.training for module in model.modules())
    bare = timm.create_model(name, num_classes=0, global_pool='', device='meta', **sizes(name))
    assert bare(meta_images(bare.default_cfg)).ndim == features.ndim


def test_features_only_gives_the_promised_channels_and_strides(name):
    model = timm.create_model(name, features_only=True, device='meta', **sizes(name)).eval()
    size = image_size(model.default_cfg, FULL_PX_LIMIT)
    outputs = model(torch.empty(1, *size, device='meta'))
    assert len(outputs) == len(model.feature_info.channels()) == LEVELS.get(name, 4)
    for output, channels, stride in zip(outputs, model.feature_info.channels(), model.feature_info.reduction()):
        assert output.shape == (1, channels, -(-size[1] // stride), -(-size[2] // stride))
    chosen = timm.create_model(name, features_only=True, out_indices=(1, 2), device='meta', **sizes(name))
    assert len(chosen(torch.empty(1, *size, device='meta'))) == 2


def test_intermediates_end_in_the_features(shared, images, features):
    with torch.no_grad():
        final, levels = shared.forward_intermediates(images)
        only = shared.forward_intermediates(images, indices=2, intermediates_only=True)
    torch.testing.assert_close(final, features)
    assert len(only) == 2
    assert all(torch.equal(a, b) for a, b in zip(only, levels[-2:]))
    assert all(level.ndim == 4 for level in levels)


@pytest.mark.parametrize('coarse', [False, True])
def test_every_parameter_has_a_group_and_the_head_is_last(on_meta, coarse):
    groups = group_parameters(on_meta, on_meta.group_matcher(coarse=coarse), reverse=True)
    names = {key for key, _ in on_meta.named_parameters()}
    assert set(groups) == names
    [stem] = {f'{conv}.weight' for conv in [on_meta.default_cfg['first_conv']] if isinstance(conv, str)} or {
        f'{on_meta.default_cfg["first_conv"][0]}.weight'}
    assert groups[stem] == 0
    classifier = on_meta.default_cfg['classifier']
    last = max(groups.values())
    assert {groups[key] for key in names if key.startswith(f'{classifier}.')} == {last}
    inner = {groups[key] for key in names if key != stem and not key.startswith('head.')}
    assert len(inner) > 2 and max(inner) <= last


def test_layer_decay_and_weight_decay_groups(on_meta):
    skip = on_meta.no_weight_decay() if hasattr(on_meta, 'no_weight_decay') else set()
    wanted = getattr(getattr(on_meta, 'backbone', None), 'no_weight_decay', set)()
    assert skip == {f'backbone.{key}' for key in wanted} or not hasattr(on_meta, 'backbone')
    groups = param_groups_layer_decay(on_meta, weight_decay=0.05, no_weight_decay_list=skip, layer_decay=0.5)
    assert sum(len(group['params']) for group in groups) == len(list(on_meta.parameters()))
    scales = {group['lr_scale'] for group in groups}
    assert max(scales) == 1.0 and len(scales) > 3


@traced
def test_gradient_checkpointing_changes_nothing(shared, images, step):
    frugal = copy.deepcopy(shared)
    frugal.set_grad_checkpointing(True)
    assert any(getattr(module, 'grad_checkpointing', False) for module in frugal.modules())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's advice on its own arguments
        logits, gradients = train_step(frugal, images)
    torch.testing.assert_close(logits, step[0])
    for key, gradient in step[1].items():
        close = dict(rtol=1e-3, atol=1e-3 * gradient.abs().max().item())
        torch.testing.assert_close(gradients[key], gradient, **close, msg=key)


def test_other_input_channels(name):
    model = timm.create_model(name, in_chans=4, device='meta', **classes(name))
    size = image_size(model.default_cfg)[1:]
    assert model(torch.empty(2, 4, *size, device='meta')).shape == (2, model.num_classes)


def test_device_and_dtype_are_passed_down(name):
    model = timm.create_model(name, device='meta', dtype=torch.bfloat16, **classes(name, 3)).eval()
    assert {tensor.device.type for tensor in model.state_dict().values()} == {'meta'}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(meta_images(model.default_cfg).bfloat16()).dtype == torch.bfloat16


def scripts(model):
    try:
        return torch.jit.script(model)
    except Exception as error:
        return error


@traced
@pytest.mark.filterwarnings('ignore:.torch.jit')
def test_it_scripts_where_timm_does(shared, images, logits):
    scripted = scripts(shared)
    if isinstance(scripted, Exception):
        assert hasattr(shared, 'backbone'), scripted  # what is all ours does
        backbone = shared.backbone
        assert isinstance(scripts(timm.create_model(backbone.pretrained_cfg['architecture'])), Exception), scripted
        pytest.skip(f'timm does not script {type(backbone).__name__}')
    with torch.no_grad():
        torch.testing.assert_close(scripted(images), logits, rtol=1e-4, atol=1e-4)


@traced
def test_it_compiles_without_a_graph_break(on_meta):
    torch.compiler.reset()
    on_meta.train()  # LeViT forgets the biases that it kept with their history
    on_meta.eval()
    compiled = torch.compile(on_meta, fullgraph=True, backend='eager')
    assert compiled(meta_images(on_meta.default_cfg)).shape == (2, on_meta.num_classes)


@traced
def test_it_exports_with_a_dynamic_batch(shared, images):
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.export.export(shared, (images,), dynamic_shapes=({0: batch},), strict=False)
    more = torch.cat([images, images[:1]])
    with torch.no_grad():
        torch.testing.assert_close(program.module()(more), shared(more), rtol=1e-4, atol=1e-4)


def test_it_survives_a_saved_folder(shared, images, logits, tmp_path):
    timm.models.save_for_hf(shared, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert type(again) is type(shared)
    with torch.no_grad():
        assert torch.equal(again(images), logits)


def test_it_survives_pickle_and_averaging(shared, images, logits):
    again = pickle.loads(pickle.dumps(shared))
    averaged = ModelEmaV3(shared, decay=0.5)
    averaged.update(again)
    with torch.no_grad():
        assert torch.equal(again(images), logits)
        torch.testing.assert_close(averaged.module.eval()(images), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('change', ['classes', 'size', 'no head'])
def test_a_change_after_creation_survives_a_saved_folder(change, tmp_path):
    model = timm.create_model(
        'mldecoder', backbone='vit_tiny_patch16_224', img_size=64, num_classes=5, embed_dim=16, feedforward_dim=16)
    if change == 'size':
        model.set_input_size((96, 96))
    else:
        model.reset_classifier(33 if change == 'classes' else 0)
    timm.models.save_for_hf(model.eval(), tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.rand(1, 3, *([96, 96] if change == 'size' else [64, 64]))
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_arguments_of_the_backbone_that_are_also_ours():
    model = timm.create_model(
        'mldecoder', backbone='vit_tiny_patch16_224', num_classes=5, device='meta',
        backbone_args=dict(class_token=False, global_pool='avg'))
    assert model.num_prefix_tokens == 0
    assert model(torch.empty(1, 3, 224, 224, device='meta')).shape == (1, 5)


def test_tags_are_listed_with_their_architecture(name):
    for tagged in timm.list_pretrained(f'{name}.*'):
        cfg = get_pretrained_cfg(tagged)
        assert cfg.architecture == name and cfg.has_weights
