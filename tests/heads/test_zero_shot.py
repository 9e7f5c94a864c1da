"""The zero-shot ML-Decoder: golden fixtures, label sets, augmentations, chunks and errors."""
import copy
import datetime
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from timm_miil.heads import ZeroShotMLDecoder, convert_original_state_dict

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'mldecoder'
CASES = {
    name: case for name, case in json.loads((FIXTURES / 'manifest.json').read_text())['cases'].items()
    if case['config']['zsl']}
TIMEOUT = datetime.timedelta(seconds=90)
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


def build(num_labels=7, **options):
    """A small head in float64 with its label set, and features for it."""
    torch.manual_seed(0)
    options = dict(embed_dim=8, text_dim=10, num_heads=2, feedforward_dim=5, dtype=torch.float64) | options
    head = ZeroShotMLDecoder(6, **options).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    head.set_queries(torch.randn(num_labels, 10, dtype=torch.float64))
    return head, torch.randn(2, 9, 6, dtype=head.embed.weight.dtype)


class CountLinear(TorchFunctionMode):
    """Counts the products with one weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.calls = weight, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.nn.functional.linear and args[1] is self.weight
        return func(*args, **(kwargs or {}))


def by_attention(head, features, embeddings):
    """Logits and attention by torch's own multi-head attention and layer norms."""
    decoder = head.decoder
    memory = head.embed(features).relu()
    query = (2 * head.word_embed(embeddings).relu()).expand(len(features), -1, -1)
    query = decoder.norm1(query)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    attention.load_state_dict(decoder.attn.state_dict())
    attended, weights = attention(query, memory, memory)
    query = decoder.norm2(query + attended)
    query = decoder.norm3(query + decoder.linear2(decoder.linear1(query).relu()))
    return (query * head.group_fc.weight.T).sum(-1) + head.group_fc.bias, weights


@settings(max_examples=25, deadline=None)
@given(num_labels=st.integers(1, 20), chunk_size=st.integers(1, 20), random=st.randoms(use_true_random=False))
def test_logits_and_maps_are_those_of_each_label_whatever_the_chunks(num_labels, chunk_size, random):
    head, features = build(num_labels, chunk_size=chunk_size)
    logits, maps = by_attention(head, features, head.text_embeddings)
    torch.testing.assert_close(head(features), logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(head.attention_maps(features), maps, rtol=1e-10, atol=1e-10)
    order = random.sample(range(num_labels), random.randint(1, num_labels))
    torch.testing.assert_close(head.attention_maps(features, order), maps[:, order], rtol=1e-10, atol=1e-10)
    head.set_queries(head.text_embeddings[order])
    assert head.num_classes == len(order)
    torch.testing.assert_close(head(features), logits[:, order], rtol=1e-10, atol=1e-10)


def test_maps_are_distributions_without_dropout_for_any_features():
    head, _ = build(drop_rate=0.9, dtype=torch.bfloat16, num_random_queries=3, query_noise=1.0)
    features = torch.randn(3, 6, 2, 5, dtype=torch.bfloat16)
    maps = head.train().attention_maps(features, classes=[6, 0])
    assert maps.shape == (3, 2, 10) and maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2))
    assert torch.equal(maps, head.eval().attention_maps(features, classes=[6, 0]))


def test_gradcheck_in_chunks():
    head, features = build(chunk_size=3)
    assert torch.autograd.gradcheck(head, features[:1, :3].requires_grad_())
    head(features).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_the_label_set_is_a_copy_outside_checkpoint_and_gradients():
    head, features = build()
    embeddings = torch.randn(4, 10, requires_grad=True)
    head.set_queries(embeddings)
    want = head(features)
    with torch.no_grad():
        embeddings.zero_()
    assert torch.equal(head(features), want)
    assert not head.text_embeddings.requires_grad
    assert head.state_dict().keys() == dict(head.named_parameters()).keys()
    other, _ = build(2)
    other.load_state_dict(head.state_dict())
    assert other.num_classes == 2


def test_labels_set_in_inference_mode_serve_training_too():
    head, x = build()
    embeddings = head.text_embeddings
    with torch.inference_mode():
        head.set_queries(embeddings.clone())
    assert not head.text_embeddings.is_inference() and torch.equal(head.text_embeddings, embeddings)
    head.train()(x).sum().backward()
    assert head.word_embed.weight.grad.any()


def test_half_precision_and_back_is_exact_for_the_embeddings():
    head, features = build(dtype=torch.float32)
    given = torch.randn(7, 10)
    head.set_queries(given)
    features = features.bfloat16()
    rounded = head.bfloat16()(features)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(head.text_embeddings, given)
    assert torch.equal(head.half().float().text_embeddings, given)
    assert torch.equal(head.double().text_embeddings, given.double())
    head.bfloat16().set_queries(given.bfloat16())
    assert torch.equal(head(features), rounded)


def test_the_label_set_follows_the_device_and_is_gone_where_its_values_are():
    head, features = build()
    assert head.to('meta')(features.to('meta')).shape == (2, 7)
    head.set_queries(torch.zeros(3, 10))
    assert head.text_embeddings.is_meta and head.num_classes == 3
    head = head.to_empty(device='cpu')
    head.reset_parameters()
    with pytest.raises(RuntimeError, match='no label set'):
        head(features)
    given = torch.randn(3, 10)
    head.set_queries(given)
    assert torch.equal(head.to_empty(device='cpu').text_embeddings, given.double())


def test_an_averaged_copy_has_a_label_set_of_its_own():
    head, features = build()
    average = ModelEmaV3(head, decay=0.5)
    assert torch.equal(average.module(features), head(features))
    seen, unseen = torch.randn(5, 10), torch.randn(2, 10)
    head.set_queries(seen)
    average.module.set_queries(unseen)
    average.update(head)
    assert head(features).shape == (2, 5) and average.module(features).shape == (2, 2)
    head.set_queries(unseen)
    assert torch.equal(average.module(features), head(features))


def test_augmentations_are_for_training_and_by_the_generator():
    head, features = build(num_random_queries=3, query_noise=0.5, drop_rate=0.0, chunk_size=4)
    given = head.text_embeddings
    plain = head(features)
    assert plain.shape == (2, 7)
    torch.manual_seed(1)
    got = head.train()(features)
    torch.manual_seed(1)
    noise, random = torch.randn(7, 10, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64)
    noisy = given + 0.5 * noise * given.norm(dim=1, keepdim=True) / 10 ** 0.5
    want, _ = by_attention(head, features, torch.cat([noisy, random * given.norm() / 70 ** 0.5]))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(head(features), got)  # drawn anew
    assert torch.equal(head.text_embeddings, given)
    assert torch.equal(head.eval()(features), plain)


def test_each_augmentation_alone():
    state = torch.get_rng_state()
    head, features = build(drop_rate=0.0)
    assert torch.equal(head.train()(features), head.eval()(features))
    head, features = build(drop_rate=0.0, num_random_queries=2)
    torch.testing.assert_close(head.train()(features)[:, :7], head.eval()(features))
    head, features = build(drop_rate=0.0, query_noise=0.1)
    assert not torch.allclose(head.train()(features), head.eval()(features))
    torch.set_rng_state(state)


@pytest.mark.filterwarnings('ignore:.torch.jit.script:FutureWarning', 'ignore:.torch.jit.script:DeprecationWarning')
def test_script_agrees_with_eager():
    head, features = build(chunk_size=4)
    torch.testing.assert_close(torch.jit.script(head)(features), head(features))


def test_compile_and_export_agree_with_eager_and_follow_the_label_set():
    head, features = build(chunk_size=4)
    compiled = torch.compile(head, fullgraph=True, backend='aot_eager')
    for num_labels in (7, 3, 12):
        head.set_queries(torch.randn(num_labels, 10))
        torch.testing.assert_close(compiled(features), head(features))
    batch = {0: torch.export.Dim('batch')}
    exported = torch.export.export(head, (features,), dynamic_shapes=(batch,), strict=False).module()
    features = torch.randn(5, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(exported(features), head(features))


@pytest.mark.parametrize('change', ['labels', 'weights', 'data', 'load', 'move', 'queries of one size', 'hook', 'none'])
def test_evaluation_projects_the_queries_once_until_something_changes(change):
    head, features = build()
    with torch.no_grad():
        with CountLinear(head.word_embed.weight) as first:
            before = head(features)
        with CountLinear(head.word_embed.weight) as second:
            assert torch.equal(head(features), before)
        assert (first.calls, second.calls) == (1, 0)
        if change == 'labels':
            head.set_queries(torch.randn(7, 10))
        elif change == 'weights':
            head.word_embed.weight.mul_(2)
        elif change == 'data':
            head.decoder.norm1.weight.data.mul_(2)
        elif change == 'load':
            head.load_state_dict({key: 2 * value for key, value in head.state_dict().items()})
        elif change == 'move':
            head, features = head.float(), features.float()
        elif change == 'queries of one size':
            head.text_embeddings.mul_(2)
        elif change == 'hook':
            head.word_embed.register_forward_hook(lambda module, inputs, output: output.flip(-1))
        fresh = copy.deepcopy(head)
        fresh.forget()
        after = head(features)
        torch.testing.assert_close(after, fresh(features), rtol=0, atol=0)
        assert torch.allclose(after.double(), before, atol=1e-4) == (change in ('move', 'none'))
    head(features).sum().backward()  # gradients flow past what is remembered
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='the peak is reset through /proc')
# The queries alone are 73 and 293 MB. Embeddings and logits are 1 and 4 MB; the allocator keeps some.
@pytest.mark.parametrize(('most', 'bound'), [(25_000, 40), pytest.param(100_000, 60, marks=pytest.mark.slow)])
def test_many_labels_in_bounded_memory(most, bound):
    code = f'''
        import re, torch
        from timm_miil.heads import ZeroShotMLDecoder
        torch.set_num_threads(1)
        head = ZeroShotMLDecoder(64, embed_dim=768, text_dim=8, feedforward_dim=256).eval()
        features = torch.randn(1, 49, 64)
        peaks = []
        for num_labels in (1_000, {most}):
            head.set_queries(torch.randn(num_labels, 8))
            with open('/proc/self/clear_refs', 'w') as file:
                file.write('5')  # the peak is now what is resident
            with torch.no_grad():
                assert head(features).shape == (1, num_labels)
            peaks.append(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024)
        print(peaks[1] - peaks[0])
    '''
    done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < bound


def train_as(rank, store):
    """Losses of three steps of DDP, with another label set in the second."""
    distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2, timeout=TIMEOUT)
    try:
        head, features = build(num_random_queries=2, query_noise=0.1)
        model = DistributedDataParallel(head.train(), broadcast_buffers=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        generator, losses = torch.Generator().manual_seed(5), []
        for num_labels in (7, 4, 7):
            head.set_queries(torch.randn(num_labels, 10, generator=generator))
            optimizer.zero_grad()
            loss = model(features + rank).square().mean()
            loss.backward()
            optimizer.step()
            losses.append([loss.item(), sum(parameter.sum().item() for parameter in head.parameters())])
        return losses
    finally:
        distributed.destroy_process_group()


def test_two_processes_train_with_broadcast_buffers(tmp_path):
    store = str(tmp_path / 'store')
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), store], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)]
    found = []
    for run in runs:
        out, words = run.communicate(timeout=2 * TIMEOUT.total_seconds())
        assert run.returncode == 0, words
        found.append(json.loads(out))
    (first, first_sums), (second, second_sums) = (zip(*losses) for losses in found)
    assert first_sums == second_sums and len(set(first_sums)) == 3
    assert all(one != other for one, other in zip(first, second))  # each rank has features of its own


def test_the_head_says_what_is_missing():
    head = ZeroShotMLDecoder(6, embed_dim=8, text_dim=10)
    assert head.num_classes == 0
    for use in (head, head.attention_maps):
        with pytest.raises(RuntimeError, match=r'no label set yet; call set_queries\(\(K, E\) tensor\) first'):
            use(torch.zeros(1, 9, 6))


@pytest.mark.parametrize('embeddings, kind, words', [
    (torch.zeros(10, 7), ValueError, r'must have shape \(K, 10\), got \(10, 7\); pass embeddings.T'),
    (torch.zeros(7, 12), ValueError, r'got \(7, 12\); this head reads embeddings of length 10.*text_dim=12'),
    (torch.zeros(0, 10), ValueError, r'got \(0, 10\)\.'),
    (torch.zeros(10), ValueError, r'got \(10,\)\.'),
    (torch.zeros(7, 10, dtype=torch.int64), TypeError, r'must be floating-point, got torch.int64; call .float'),
    (torch.tensor([[0.0] * 10, [float('nan')] * 10]), ValueError, 'must be finite, and row 1 is not'),
    (torch.full((2, 10), float('inf')), ValueError, 'must be finite, and row 0 is not'),
    ([[0.0] * 10], TypeError, 'embeddings must be a tensor, got list; names become embeddings by embed_characters'),
])
def test_wrong_embeddings_are_refused_and_the_set_stays(embeddings, kind, words):
    head, _ = build()
    with pytest.raises(kind, match=words):
        head.set_queries(embeddings)
    assert head.num_classes == 7


@pytest.mark.parametrize('arguments, kind, words', [
    (dict(text_dim=0), ValueError, 'text_dim must be at least 1, got 0'),
    (dict(text_dim=2.0), TypeError, 'text_dim must be an int'),
    (dict(chunk_size=0), ValueError, 'chunk_size must be at least 1, got 0'),
    (dict(num_random_queries=-1), ValueError, 'num_random_queries must be at least 0, got -1'),
    (dict(num_random_queries=0.5), TypeError, 'num_random_queries must be an int'),
    (dict(query_noise=-0.1), ValueError, r'query_noise must be in \[0, inf\), got -0.1'),
    (dict(query_noise=float('nan')), ValueError, 'query_noise must be in'),
    (dict(embed_dim=12), ValueError, 'embed_dim must be a multiple of 8'),
    (dict(drop_rate=1.0), ValueError, 'drop_rate must be in'),
])
def test_wrong_settings_are_refused(arguments, kind, words):
    with pytest.raises(kind, match=words):
        ZeroShotMLDecoder(6, **arguments)


@pytest.mark.parametrize('classes, kind, words', [
    ([7], ValueError, r'classes must be in \[0, 7\), got 7'),
    ([0.0], TypeError, 'classes must be indices'),
])
def test_wrong_classes_are_refused(classes, kind, words):
    head, features = build()
    with pytest.raises(kind, match=words):
        head.attention_maps(features, classes)
    assert head.attention_maps(features, []).shape == (2, 0, 9)


if __name__ == '__main__':
    print(json.dumps(train_as(int(sys.argv[1]), sys.argv[2])))
