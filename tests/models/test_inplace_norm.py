"""Norms that keep their outputs: timm's norms in value and gradient, whatever their weights, for fewer kept bytes."""
import copy
from functools import partial

import pytest
import timm
import torch
from benchmark_scripts import load_script
from timm.layers import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_miil.inference import optimize_for_inference
from timm_miil.models import InplaceNormAct2d, convert_to_inplace_norm

LEAKY = {'act_layer': partial(nn.LeakyReLU, negative_slope=1e-3)}
PLAIN = {'apply_act': False}
SMALL = {'layers': [1, 1, 1, 1], 'width_factor': 0.25}  # a TResNet of 14 norms
# Inverted but for those near 0 or small beside their biases; the second list has enough of these that all is kept.
WEIGHTS = [0.7, -0.4, 0.0, 1e-3, -2.0, 1.3], [0.0, 0.0, 0.7, -1e-9, 1e-3, 0.0]
BIASES = [0.1, -0.3, 0.2, 0.5, 3.0, -15.0]


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norms(act, weights=WEIGHTS[0], dtype=torch.float64, **kwargs):
    """timm's norm, and ours of the same weights."""
    plain = BatchNormAct2d(6, **act, dtype=dtype, **kwargs)
    ours = InplaceNormAct2d(6, **act, dtype=dtype, **kwargs)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor(weights))
        plain.bias.copy_(torch.tensor(BIASES))
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def gradients(module, x, grad):
    """Output, and gradients of the input and all parameters."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(grad)
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize('weights', WEIGHTS)
@pytest.mark.parametrize('act', [LEAKY, {'act_layer': partial(nn.LeakyReLU, negative_slope=1.7)}, PLAIN])
@pytest.mark.parametrize('mode', ['train', 'eval', 'untracked'])
def test_gradients_are_those_of_the_formula(act, weights, mode):
    _, ours = norms(act, weights, track_running_stats=mode != 'untracked')
    if mode != 'untracked':
        ours.running_mean.copy_(drawn(6, seed=3))
        ours.running_var.copy_(drawn(6, seed=4).exp())
    ours.train(mode == 'train')
    names = [name for name, _ in ours.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(ours, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(run, [drawn(2, 6, 3, 2).requires_grad_(), *ours.parameters()], fast_mode=False)


@pytest.mark.parametrize('momentum', [0.1, None, 0.0])
@pytest.mark.parametrize('weights', WEIGHTS)
@pytest.mark.parametrize('act', [LEAKY, PLAIN])
def test_steps_are_those_of_timms_layer(act, weights, momentum):
    plain, ours = norms(act, weights, momentum=momentum)
    for module in (plain, ours):
        module.optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for step in range(6):
        for module in (plain, ours):  # the last two with statistics that are frozen inside training, and after it
            module.train(step < 4)
        x, grad = drawn(4, 6, 5, 5, seed=step) * 3 + 1, drawn(4, 6, 5, 5, seed=step + 50)
        expected, found = gradients(plain, x, grad), gradients(ours, x, grad)
        assert step > 0 or torch.equal(found[0], expected[0])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
        assert ours.state_dict().keys() == plain.state_dict().keys()
        torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-10, atol=1e-11)
        for module in (plain, ours):
            module.optimizer.step()
    with torch.no_grad():
        ours.load_state_dict(plain.state_dict())
        for mode in (True, False):
            assert torch.equal(ours.train(mode)(x), plain.train(mode)(x))
        assert all(map(torch.equal, ours.buffers(), plain.buffers()))


@pytest.mark.parametrize('act', [LEAKY, PLAIN])
@pytest.mark.parametrize(('dtype', 'usual', 'at_the_limit'), [
    (torch.float32, 1e-6, 1e-6), (torch.bfloat16, 0.01, 0.05), (torch.float16, 1e-3, 1e-2)])
def test_gradients_are_as_exact_as_the_docstring_says(act, dtype, usual, at_the_limit):
    for ratio, limit in ((1, usual), (15.9, at_the_limit)):
        exact, ours = norms(act, dtype=torch.float64)[0], norms(act, dtype=torch.float32)[1]
        with torch.no_grad():
            exact.weight.copy_(torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, -0.5]))
            exact.bias.copy_(exact.weight * torch.tensor([ratio, -ratio] * 3))
        ours.load_state_dict(exact.state_dict())
        x, grad = drawn(8, 6, 28, 28, dtype=dtype) * 2 + 1, drawn(8, 6, 28, 28, seed=1, dtype=dtype)
        expected, found = gradients(exact, x.double(), grad.double()), gradients(ours, x, grad)
        rounding = torch.finfo(dtype).eps
        for got, want, most in zip(found, expected, (rounding, rounding, limit, 1e-5), strict=True):
            assert (got - want).norm() <= most * want.norm()


def test_what_a_slope_takes_from_float16_is_not_inverted():
    plain, ours = norms(LEAKY, [0.01, -0.02, 1e-3, 0.03, 0.05, 0.005], dtype=torch.float32)
    for module in (plain, ours):
        nn.init.zeros_(module.bias)
    x, grad = drawn(8, 6, 9, 9, dtype=torch.float16), drawn(8, 6, 9, 9, seed=1, dtype=torch.float16)
    torch.testing.assert_close(gradients(ours, x, grad), gradients(plain, x, grad), rtol=1e-4, atol=1e-4)


def test_no_picture_has_no_gradient_and_ends_nothing():
    plain, ours = norms(LEAKY)
    x, grad = drawn(0, 6, 3, 3), drawn(0, 6, 3, 3)
    torch.testing.assert_close(gradients(ours.eval(), x, grad), gradients(plain.eval(), x, grad))


def test_what_is_converted_stays_so():
    model = nn.Sequential(BatchNormAct2d(6, **LEAKY))
    assert [convert_to_inplace_norm(model) for _ in range(2)] == [1, 0]


def test_statistics_that_are_switched_off_stay():
    for module in norms(LEAKY):
        module.track_running_stats = False
        before = copy.deepcopy(list(module.buffers()))
        module(drawn(2, 6, 3, 3))
        assert all(map(torch.equal, module.buffers(), before))


@pytest.mark.parametrize('act', [LEAKY, PLAIN])
def test_under_autocast_and_channels_last_outputs_and_statistics_are_timms(act):
    pairs = [nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm) for norm in norms(act, dtype=torch.float32)]
    for model in pairs:
        model[0].weight = nn.Parameter(drawn(6, 3, 3, 3, seed=2, dtype=torch.float32))
    x = drawn(4, 3, 9, 9, dtype=torch.float32).to(memory_format=torch.channels_last)
    outputs, inputs = [], []
    for model in pairs:
        model.to(memory_format=torch.channels_last)
        model[1].register_full_backward_hook(lambda module, grad_in, grad_out: inputs.append(grad_in[0]))
        with torch.autocast('cpu', torch.bfloat16):
            outputs.append(model(x))
        outputs[-1].backward(drawn(4, 6, 7, 7, seed=1, dtype=torch.bfloat16))
    assert torch.equal(*outputs) and outputs[1].dtype == torch.bfloat16
    assert outputs[1].is_contiguous(memory_format=torch.channels_last)
    assert inputs[1].is_contiguous(memory_format=torch.channels_last)
    assert all(map(torch.equal, pairs[0].buffers(), pairs[1].buffers()))
    for ours, plain in zip(pairs[1].parameters(), pairs[0].parameters(), strict=True):
        assert (ours.grad - plain.grad).norm() <= 0.05 * plain.grad.norm()


@pytest.fixture(scope='module')
def measured():
    return load_script('training_memory')


@pytest.fixture(scope='module')
def network(measured):
    """tresnet_m as timm makes it, but for weights of norms that have learnt."""
    torch.manual_seed(0)
    return measured.settled(timm.create_model('tresnet_m', num_classes=5).train())


def test_tresnet_keeps_three_quarters_and_four_fifths_when_fresh(measured, network):
    fresh = timm.create_model('tresnet_m', num_classes=5).train()
    for model, most in ((network, 0.76), (fresh, 0.82)):
        converted = copy.deepcopy(model)
        assert convert_to_inplace_norm(converted) == 60
        assert converted.state_dict().keys() == model.state_dict().keys()
        x = drawn(2, 3, 128, 128, dtype=torch.float32)
        found, plain = (measured.kept_bytes(each, x) for each in (converted, model))
        assert 0 < found <= most * plain


@pytest.mark.parametrize(('act', 'weights', 'maps'), [
    (LEAKY, [1.0] * 6, 6), (LEAKY, [1.0] * 5 + [0.0], 7), (LEAKY, [0.0] * 6, 12),
    (PLAIN, [1.0] * 6, 6), (PLAIN, [1.0] * 3 + [0.0] * 3, 9), (PLAIN, [1.0] * 2 + [0.0] * 4, 6)])
def test_a_norm_keeps_what_cannot_be_inverted(measured, act, weights, maps):
    ours = norms(act, weights, dtype=torch.float32)[1]
    nn.init.zeros_(ours.bias)
    # A shift of its input, which keeps nothing.
    model = nn.Sequential(nn.ConstantPad2d(1, 0.0), ours)
    assert measured.kept_bytes(model, drawn(2, 6, 30, 30, dtype=torch.float32)) // (2 * 32 * 32 * 4) == maps


def test_a_network_has_timms_gradients_layer_by_layer(network):
    plain = copy.deepcopy(network).double()
    with torch.no_grad():
        for position, module in enumerate(module for module in plain.modules() if isinstance(module, BatchNormAct2d)):
            module.weight[position % 3::7] *= -1
            module.weight[position % 5] = 0
    ours = copy.deepcopy(plain)
    convert_to_inplace_norm(ours)
    x = drawn(2, 3, 64, 64)
    outputs = [model(x) for model in (plain, ours)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, got), want in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (got.grad - want.grad).norm() <= 1e-9 * want.grad.norm(), name
    assert all(map(torch.equal, ours.buffers(), plain.buffers()))


@pytest.mark.parametrize('reentrant', [False, True])
def test_it_may_be_computed_again(reentrant):
    _, ours = norms(LEAKY)
    x, grad = drawn(2, 6, 3, 3), drawn(2, 6, 3, 3, seed=1)
    found = x.clone().requires_grad_()
    checkpoint(copy.deepcopy(ours), found, use_reentrant=reentrant).backward(grad)
    assert torch.equal(found.grad, gradients(ours, x, grad)[1])


def test_compiled_it_is_timms_layer():
    plain, ours = norms(LEAKY, dtype=torch.float32)
    x, grad = drawn(2, 6, 3, 3, dtype=torch.float32), drawn(2, 6, 3, 3, seed=1, dtype=torch.float32)
    compiled = torch.compile(ours, backend='aot_eager', fullgraph=True)
    assert all(map(torch.equal, gradients(compiled, x, grad), gradients(plain, x, grad)))


def test_second_derivatives_and_changed_outputs_are_refused():
    _, ours = norms(LEAKY)
    x = drawn(2, 6, 3, 3).requires_grad_()
    first, = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='differentiate twice a function that was marked with @once_differentiable'):
        first.sum().backward()
    y = ours(x)
    y += 1
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()


def test_synchronized_norms_take_its_place():
    ours = norms(LEAKY)[1]
    model = convert_sync_batchnorm(nn.Sequential(ours))
    assert type(model[0]) is SyncBatchNormAct and model[0].act is ours.act and model[0].weight is ours.weight
    with pytest.raises(ValueError, match='Sequential has no norm that could be converted; .* before its norms'):
        convert_to_inplace_norm(model)


def test_inference_folds_it(measured):
    model = measured.settled(timm.create_model('tresnet_m', **SMALL)).eval().double()
    convert_to_inplace_norm(model)
    x = drawn(1, 3, 64, 64)
    fast = optimize_for_inference(model, example_input=x)
    assert not any(isinstance(module, BatchNormAct2d) for module in fast.modules())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-9, atol=1e-9)


def test_a_saved_network_keeps_the_choice_and_the_weights(tmp_path):
    args = {'backbone': 'tresnet_m', 'head': 'gap', 'num_classes': 4, 'backbone_args': SMALL}
    model = timm.create_model('multilabel_classifier', inplace_norm=True, **args)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    for network in (model, again):
        assert sum(isinstance(module, InplaceNormAct2d) for module in network.modules()) == 14
    plain = timm.create_model('multilabel_classifier', **args)
    plain.load_state_dict(again.state_dict())
    assert not any(isinstance(module, InplaceNormAct2d) for module in plain.modules())
    x = drawn(1, 3, 64, 64, dtype=torch.float32)
    assert torch.equal(plain.eval()(x), model.eval()(x))


@pytest.mark.parametrize('kwargs', [
    {'act_layer': nn.ReLU}, {'act_layer': partial(nn.LeakyReLU, negative_slope=0.0)}, {'affine': False},
    {'drop_layer': nn.Dropout}])
def test_what_cannot_be_inverted_is_refused_and_left_alone(kwargs):
    with pytest.raises(ValueError, match=r'the norm must have a weight, no dropout, and a LeakyReLU of a slope above'):
        InplaceNormAct2d(6, **kwargs)
    with pytest.raises(ValueError, match='Sequential has no norm that could be converted'):
        convert_to_inplace_norm(nn.Sequential(BatchNormAct2d(6, **{'act_layer': nn.LeakyReLU} | kwargs)))


@pytest.mark.parametrize('shape', [(1, 6, 1, 1), (4, 6), (2, 5, 3, 3)])
def test_bad_input_is_refused_in_the_words_of_timms_layer(shape):
    errors = []
    for module in norms(LEAKY, dtype=torch.float32):
        with pytest.raises((ValueError, AssertionError, RuntimeError)) as raised:
            module(torch.ones(shape))
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
