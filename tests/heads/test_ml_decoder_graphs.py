"""Compilers, tracers and transforms take ML-Decoder whole, and see its weights, not what evaluation prepared."""
import pytest
import torch
from prepared_heads import FEATURES, assert_fresh, in_place, new_head, warm


@pytest.mark.filterwarnings('ignore:There is a performance drop')  # torch's own
def test_functional_calls_see_their_parameters():
    head = new_head()
    logits = warm(head)
    other = {key: tensor.detach() * 1.5 for key, tensor in head.named_parameters()}
    with torch.no_grad():
        moved = torch.func.functional_call(head, other, (FEATURES,))
        assert not torch.allclose(moved, logits)
        torch.testing.assert_close(torch.func.functional_call(head, other, (FEATURES,)), moved)
    torch.testing.assert_close(warm(head), logits)

    stacked = {key: torch.stack([head.get_parameter(key).detach(), other[key]]) for key in other}
    with torch.no_grad():
        both = torch.vmap(lambda weights: torch.func.functional_call(head, weights, (FEATURES,)))(stacked)
    torch.testing.assert_close(both, torch.stack([logits, moved]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(warm(head), logits)


@pytest.mark.filterwarnings('ignore:There is a performance drop')  # torch's own
def test_transforms_over_features():
    head = new_head(dtype=torch.float64).requires_grad_(False)
    features = FEATURES.double()
    logits = head(features)
    torch.testing.assert_close(torch.vmap(lambda x: head(x[None])[0])(features), logits)
    grad = torch.func.grad(lambda x: head(x).square().sum())(features)
    x = features.clone().requires_grad_()
    head(x).square().sum().backward()
    torch.testing.assert_close(grad, x.grad)
    torch.testing.assert_close(head(features), logits)


def test_tracing_holds_weights_not_what_was_prepared():
    head = new_head()
    logits = warm(head)
    weights = dict(head.named_parameters())
    with torch.no_grad():
        graph = torch.fx.experimental.proxy_tensor.make_fx(
            lambda weights, x: torch.func.functional_call(head, weights, (x,)))(weights, FEATURES)
        torch.testing.assert_close(graph(weights, FEATURES), logits)
        torch.testing.assert_close(
            graph({key: tensor * 1.5 for key, tensor in weights.items()}, FEATURES),
            torch.func.functional_call(head, {key: tensor * 1.5 for key, tensor in weights.items()}, (FEATURES,)))


def test_fake_tensors_leave_nothing_behind():
    head = new_head()
    logits = warm(head)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert head(FEATURES).shape == (3, 25)
    assert torch.equal(warm(head), logits)


@pytest.mark.parametrize('training', [False, True])
def test_compiled_graphs_are_whole_and_follow_the_weights(training):
    head = new_head(drop_rate=0.0)
    warm(head)
    compiled = torch.compile(head, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        torch.testing.assert_close(compiled(FEATURES), warm(head))
        in_place(head.query_embed)
        torch.testing.assert_close(compiled(FEATURES), assert_fresh(head))
    head.train(training)
    compiled(FEATURES).sum().backward()
    got = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    head.zero_grad()
    head(FEATURES).sum().backward()
    torch.testing.assert_close(got, {name: parameter.grad for name, parameter in head.named_parameters()})


def test_compiled_training_draws_masks():
    head = new_head(drop_rate=0.5).train()
    compiled = torch.compile(head, fullgraph=True, backend='aot_eager')
    assert not torch.equal(compiled(FEATURES), compiled(FEATURES))


def test_export_of_a_warm_head_keeps_its_weights():
    head = new_head()
    logits = warm(head)
    program = torch.export.export(head, (FEATURES,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    assert not program.constants
    assert set(program.state_dict) == set(head.state_dict())
    torch.testing.assert_close(program.module()(FEATURES.repeat(4, 1, 1, 1)), logits.repeat(4, 1))


@pytest.mark.filterwarnings('ignore:.torch.jit', 'ignore::torch.jit.TracerWarning')
def test_jit_traces_follow_the_weights():
    head = new_head()
    warm(head)
    with torch.no_grad():
        traced = torch.jit.trace(head, FEATURES)
        in_place(head.query_embed)
        torch.testing.assert_close(traced(FEATURES), assert_fresh(head))
