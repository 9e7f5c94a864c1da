"""The semantic embedding head: fixtures, layout, label sets, precision, graphs and errors."""
import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from timm_miil.heads import SemanticEmbeddingHead
from timm_miil.losses import semantic_scores

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'sdl'
RETRIEVAL = 'score_retrieval_float64'


def build(num_labels=4, num_rows=3, **kwargs):
    torch.manual_seed(0)
    head = SemanticEmbeddingHead(6, text_dim=5, num_rows=num_rows, dtype=torch.float64, **kwargs)
    if num_labels:
        head.set_queries(torch.randn(num_labels, 5, dtype=torch.float64))
    return head


def maps(batch=2):
    return torch.randn(batch, 6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_fixture_of_the_original_is_reproduced():
    case = json.loads((FIXTURES / 'manifest.json').read_text())['cases'][RETRIEVAL]
    tensors = load_file(FIXTURES / case['file'])
    num_rows = case['config']['num_rows']
    head = SemanticEmbeddingHead(1, num_rows=num_rows, dtype=torch.float64)
    head.set_queries(tensors['wordvecs_rows'])
    torch.testing.assert_close(head.score(tensors['x']), tensors['scores'], **case['tolerance'])


def test_scores_are_the_best_dot_products_of_the_columns():
    head, features = build(), maps()
    pooled = features.mean((2, 3))
    scores = head(features).detach()
    assert scores.shape == (2, 4)
    for picture in range(2):
        matrix = (head.weight.detach() @ pooled[picture]).reshape(5, 3)  # dimension by row
        for label, word in enumerate(head.text_embeddings):
            want = max(float(word @ matrix[:, row]) for row in range(3))
            assert float(scores[picture, label]) == pytest.approx(want, rel=1e-12)
    tokens = features.flatten(2).transpose(1, 2)
    for other in (tokens, pooled):
        torch.testing.assert_close(head(other), scores, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        scores, semantic_scores(head.embed(features), head.text_embeddings, num_rows=3), rtol=1e-12, atol=1e-12)


def test_without_labels_it_gives_the_vectors_and_the_set_is_exchanged():
    head = build(num_labels=0)
    assert head.num_classes == 0 and torch.equal(head(maps()), head.embed(maps())) and head(maps()).shape == (2, 15)
    first, second = torch.randn(3, 5), torch.randn(7, 5)
    head.set_queries(first)
    before = head(maps())
    head.set_queries(torch.cat([second, first]))
    assert head.num_classes == 10
    torch.testing.assert_close(head(maps())[:, 7:], before, rtol=1e-12, atol=1e-12)
    assert list(head.state_dict()) == ['weight']


def test_one_weight_gets_the_gradient_of_the_best_row():
    head, features = build(num_labels=2), maps()
    torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(head, {'weight': w}, (x,)), (
        features.requires_grad_(), head.weight))
    assert not head.text_embeddings.requires_grad


def test_it_follows_devices_dtypes_and_copies():
    head = build()
    words = head.text_embeddings.clone()
    half = copy.deepcopy(head).to(torch.bfloat16)
    assert half.text_embeddings.dtype == torch.float32 and half(maps().bfloat16()).dtype == torch.bfloat16
    assert torch.equal(head.text_embeddings, words)
    close = dict(rtol=0.1, atol=0.1)  # of eight bits
    torch.testing.assert_close(half(maps().bfloat16()).double(), head(maps()), **close)
    assert copy.deepcopy(head).to('meta')(maps().to('meta')).shape == (2, 4)


def test_fresh_weights_are_those_of_a_linear_layer():
    torch.manual_seed(3)
    head = SemanticEmbeddingHead(64, text_dim=50, num_rows=4)
    torch.manual_seed(3)
    assert torch.equal(head.weight, torch.nn.Linear(64, 200, bias=False).weight)


@pytest.mark.filterwarnings('ignore:.torch.jit')
@pytest.mark.parametrize('num_labels', [0, 4])
def test_graphs(num_labels):
    head = build(num_labels=num_labels).eval()
    want = head(maps())
    torch.testing.assert_close(torch.jit.script(head)(maps()), want)
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend='eager')(maps()), want)
    assert head(maps(0)).shape == (0, want.shape[1])


@pytest.mark.parametrize(('args', 'error', 'words'), [
    (dict(in_features=0), ValueError, 'in_features must be at least 1, got 0'),
    (dict(in_features=6, num_rows=0), ValueError, 'num_rows must be at least 1, got 0'),
    (dict(in_features=6, text_dim=2.0), TypeError, 'text_dim must be an int'),
])
def test_bad_sizes(args, error, words):
    with pytest.raises(error, match=words):
        SemanticEmbeddingHead(**args)


@pytest.mark.parametrize(('embeddings', 'error', 'words'), [
    (torch.zeros(5, 4), ValueError, r'embeddings must have shape \(K, 5\), got \(5, 4\); pass embeddings.T'),
    (torch.zeros(2, 6), ValueError, r'reads embeddings of length 5: .* text_dim=6'),
    (torch.full((2, 5), torch.nan), ValueError, 'must be finite, and row 0 is not'),
    (torch.zeros(2, 5, dtype=torch.int64), TypeError, 'must be floating-point, got torch.int64'),
    ([[0.0] * 5], TypeError, 'must be a tensor, got list'),
])
def test_bad_label_sets_change_nothing(embeddings, error, words):
    head = build()
    before = head(maps())
    with pytest.raises(error, match=words):
        head.set_queries(embeddings)
    assert torch.equal(head(maps()), before)


def test_bad_features():
    with pytest.raises(ValueError, match='features must have'):
        build()(torch.zeros(2, 7, 3, 4, dtype=torch.float64))
