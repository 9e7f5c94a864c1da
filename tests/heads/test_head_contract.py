"""What every head of `list_heads` keeps, found by listing: shapes, dtypes, errors, copies, graphs, timm bodies."""
import copy
import pickle

import pytest
import timm
import torch

from timm_miil.heads import attach_head, create_head, list_heads

D, K = 24, 5
SMALL = {'ml_decoder': dict(embed_dim=16, num_heads=2, feedforward_dim=24)}
ATTENDING = ['csra', 'ml_decoder', 'query2label']
# Weights by which two models of other classes may differ.
OF_CLASSES = ('fc.', 'group_fc.', 'query_embed')
BODIES = {
    'NCHW': ('test_resnet', {}),
    'NHWC': ('swin_tiny_patch4_window7_224', dict(img_size=64, window_size=2, depths=(1, 1), embed_dim=12, num_heads=(
        2, 2))),
    'NLC': ('test_vit', dict(img_size=32)),
}


def build(name, **kwargs):
    torch.manual_seed(0)
    return create_head(name, **{'in_features': D, 'num_classes': K, **SMALL.get(name, {}), **kwargs}).eval()


def maps(batch=2, **kwargs):
    return torch.randn(batch, D, 3, 4, generator=torch.Generator().manual_seed(1)).to(**kwargs)


def attending(name):
    return hasattr(build(name, device='meta'), 'attention_maps')


@pytest.fixture(params=list_heads())
def name(request):
    return request.param


def test_the_heads_that_attend_are_these():
    assert [name for name in list_heads() if attending(name)] == ATTENDING


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(name, dtype):
    head = build(name, dtype=dtype)
    logits = head(maps(dtype=dtype))
    assert logits.shape == (2, K) and logits.dtype == dtype
    exact = build(name).double()
    exact.load_state_dict(head.state_dict())
    close = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=0.1, atol=0.05)
    torch.testing.assert_close(logits.double(), exact(maps(dtype=dtype).double()), **close)


def test_images_do_not_touch_each_other_and_none_is_fine(name):
    head = build(name, dtype=torch.float64)
    logits = head(maps(3, dtype=torch.float64))
    torch.testing.assert_close(head(maps(3, dtype=torch.float64)[1:]), logits[1:], rtol=1e-12, atol=1e-12)
    empty = head.train()(maps(0, dtype=torch.float64))
    assert empty.shape == (0, K)
    empty.sum().backward()


def test_strides_do_not_matter(name):
    head = build(name, dtype=torch.float64)
    x = maps(dtype=torch.float64)
    torch.testing.assert_close(head(x.contiguous(memory_format=torch.channels_last)), head(x), rtol=1e-12, atol=1e-12)
    tokens = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(head(tokens.contiguous()), head(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('shape, message', [
    ((2, D), 'must be a map'), ((2, D - 1, 3, 4), f'must have {D} channels, got {D - 1}'),
    ((2, 0, D), 'must have at least one position')])
def test_wrong_features(name, shape, message):
    head = build(name)
    with pytest.raises(ValueError, match=message):
        head(torch.zeros(shape))
    if name in ATTENDING:
        with pytest.raises(ValueError, match=message):
            head.attention_maps(torch.zeros(shape))


@pytest.mark.parametrize('size', ['in_features', 'num_classes'])
@pytest.mark.parametrize('value, error', [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_wrong_sizes(name, size, value, error):
    with pytest.raises(error, match=f'{size} must be'):
        build(name, **{size: value})


def test_every_parameter_gets_a_gradient(name):
    head = build(name).train()
    x = maps().requires_grad_()
    head(x).square().sum().backward()
    assert [key for key, parameter in head.named_parameters() if parameter.grad is None] == []
    assert x.grad.abs().sum() > 0


def test_built_without_storage_and_filled_afterwards(name):
    head = build(name, device='meta', dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in (*head.parameters(), *head.buffers()))
    assert head(maps(device='meta', dtype=torch.bfloat16)).shape == (2, K)
    filled = head.to_empty(device='cpu')
    for tensor in (*filled.parameters(), *filled.buffers()):
        torch.nn.init.constant_(tensor, torch.nan)
    torch.manual_seed(0)
    getattr(filled, 'reset_parameters')()
    assert filled(maps(dtype=torch.bfloat16)).isfinite().all()


def test_copies_give_the_same_logits(name):
    head = build(name)
    again = build(name, num_classes=K)
    again.load_state_dict(head.state_dict())
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), again):
        assert torch.equal(other(maps()), head(maps()))


def test_other_classes_leave_the_rest_as_it_was(name):
    head = build(name)
    before = {key: tensor.clone() for key, tensor in head.state_dict().items() if not key.startswith(OF_CLASSES)}
    if not hasattr(head, 'reset_classes'):
        pytest.skip('nothing to keep')
    head.reset_classes(K + 2)
    assert head(maps()).shape == (2, K + 2) and head.num_classes == K + 2
    assert all(torch.equal(head.state_dict()[key], tensor) for key, tensor in before.items())
    with pytest.raises(ValueError, match='num_classes must be at least 1, got 0'):
        head.reset_classes(0)


def test_it_compiles_without_a_graph_break(name):
    torch.compiler.reset()
    head = build(name)
    compiled = torch.compile(head, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(maps()), head(maps()))


def test_it_exports_with_a_dynamic_batch(name):
    head = build(name)
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.export.export(head, (maps(),), dynamic_shapes=({0: batch},), strict=False)
    torch.testing.assert_close(program.module()(maps(5)), head(maps(5)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ATTENDING)
def test_maps_are_probabilities_of_the_classes_asked(name):
    head = build(name).train()
    everything = head.attention_maps(maps())
    assert everything.shape == (2, K, 12) and everything.dtype == torch.float32
    assert (everything >= 0).all()
    torch.testing.assert_close(everything.sum(-1), torch.ones(2, K))
    torch.testing.assert_close(head.attention_maps(maps(), [3, 0, 3]), everything[:, [3, 0, 3]])
    assert head.attention_maps(maps(), []).shape == (2, 0, 12)
    with pytest.raises(ValueError, match=rf'classes must be in \[0, {K}\), got {K}'):
        head.attention_maps(maps(), [K])
    with pytest.raises(TypeError, match='classes must be indices'):
        head.attention_maps(maps(), [1.0])


@pytest.mark.parametrize('layout', BODIES)
def test_it_goes_on_timm_bodies(name, layout):
    body, settings = BODIES[layout]
    torch.manual_seed(0)
    backbone = timm.create_model(body, **settings)
    model = attach_head(
        backbone, K, lambda **sizes: create_head(name, **sizes, **SMALL.get(name, {}))).eval()
    assert model.layout == layout
    images = torch.rand(2, *(3, settings.get('img_size', 64), settings.get('img_size', 64)))
    features = model.forward_features(images)
    assert model(images).shape == (2, K)
    read = features.permute(0, 3, 1, 2).contiguous() if layout == 'NHWC' else features
    torch.testing.assert_close(model.head(read), model(images))
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
