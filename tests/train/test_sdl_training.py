"""Training SDL: words by characters and from a file, figures of seen, unseen and all labels, NUS-WIDE's protocol."""
import json

import pytest
import torch

from timm_miil import catalog
from timm_miil._errors import RecipeError
from timm_miil.data import save_word_vectors
from timm_miil.metrics import zero_shot_retrieval
from timm_miil.tasks import SemanticDiversityTask
from timm_miil.train import evaluate, hold_out, load_recipe, measure, read_splits, train
from timm_miil.train.build import build_loss, build_model, build_task
from timm_miil.train.splits import prepare_splits

UNSEEN = ('red 2', 'red 7')
SDL = {
    'task': 'zero_shot', 'model.name': 'miil_sdl', 'model.args': '{backbone = "test_resnet", num_rows = 2}',
    'loss.name': 'semantic_diversity', 'loss.args': '{}', 'epochs': '1'}


@pytest.fixture(scope='module')
def splits(tiny_scenes):
    return read_splits(tiny_scenes)


@pytest.fixture
def sdl(tiny_recipe):
    return tiny_recipe.override(SDL)


@pytest.fixture
def words(tmp_path, splits):
    labels = splits.label_names
    rows = torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(0))
    save_word_vectors(tmp_path / 'words.safetensors', labels, rows)
    return tmp_path / 'words.safetensors', dict(zip(labels, rows))


def test_seen_unseen_and_all_labels_are_measured(splits, sdl):
    result = train(sdl.override({'unseen_labels': '["red 2", "red 7"]'}), splits)
    seen = result.label_names
    assert seen == hold_out(splits, UNSEEN).label_names == result.model.labels
    for labels, found in (
            (seen, result.test_metrics), (UNSEEN, result.unseen_metrics),
            ((*seen, *UNSEEN), result.generalised_metrics)):
        result.model.set_labels(labels)
        again = evaluate(result.model, splits.test.with_labels(labels), batch_size=16, task='zero_shot')
        assert found == pytest.approx(again, abs=1e-6) and found['map'] >= 0
    assert 'f1_at_5' in result.generalised_metrics and 'f1_at_3' not in result.unseen_metrics
    assert json.loads(result.to_json())['generalised'] == result.generalised_metrics


def test_words_of_a_file_are_learnt_and_exchanged(splits, sdl, words):
    path, rows = words
    recipe = sdl.override({
        'zero_shot.word_vectors': str(path), 'model.args.text_dim': '6', 'unseen_labels': '["red 2", "red 7"]'})
    result = train(recipe, splits)
    model = result.model
    assert model.labels is None and model.num_classes == 18 == len(result.label_names)
    assert torch.equal(model.head.text_embeddings, torch.stack([rows[label] for label in result.label_names]))
    model.set_queries(torch.stack([rows[label] for label in UNSEEN]))
    again = evaluate(model, splits.test.with_labels(UNSEEN), batch_size=16)
    assert result.unseen_map == pytest.approx(again['map'], abs=1e-6)
    published = build_model(recipe.override({
        'model.name': 'miil_sdl_tresnet_m', 'model.args': '{layers = [1, 1, 1, 1], text_dim = 6, num_rows = 2}'}),
        result.label_names)
    assert published.num_classes == 18 and published.embedding.num_rows == 2


def test_the_loss_names_the_task(sdl):
    labels = ['red 1', 'red 2']
    task = build_task(sdl, build_model(sdl, labels), torch.device('cpu'))
    assert type(task) is SemanticDiversityTask
    with pytest.raises(ValueError, match="loss.name must be a loss of logits and targets for task 'multi_label'"):
        build_loss(sdl.loss, 'multi_label')
    with pytest.raises(TypeError, match=r"must have embed\(images\), got ZeroShotClassifier"):
        other = sdl.override({'model.name': 'mldecoder_zero_shot', 'model.args': '{backbone = "test_resnet"}'})
        build_task(other, build_model(other, labels), torch.device('cpu'))


def test_any_loss_of_logits_trains_the_network_too(sdl):
    recipe = sdl.override({'loss.name': 'bce'})
    model = build_model(recipe, ['red 1', 'red 2'])
    images, targets = torch.rand(2, 3, 32, 32), torch.eye(2)
    result = build_task(recipe, model, torch.device('cpu')).eval()(images, targets)
    want = torch.nn.functional.binary_cross_entropy_with_logits(model(images), targets, reduction='sum')
    torch.testing.assert_close(result['loss'], want)


def test_figures_of_retrieval_are_those_of_the_metric():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 9, generator=generator)
    targets = (torch.rand(40, 9, generator=generator) < 0.15).to(torch.int8)
    assert (targets.sum(1) == 0).any()
    found, want = measure(scores, targets, 'zero_shot'), zero_shot_retrieval(
        scores, targets, seen=range(4), unseen=range(4, 9), k=[3])['all']
    assert found['f1_at_3'] == pytest.approx(100 * want.at_k[3].f1)
    assert found['retrieval_map'] == pytest.approx(100 * want.average_precision.mean_with_zeros)
    assert found['retrieval_map'] != pytest.approx(found['map'])
    assert {'f1_at_3', 'f1_at_5'} & measure(scores, targets).keys() == set()


def test_pictures_of_unseen_labels_may_stay_without_them(splits, tiny_recipe, tmp_path):
    (tmp_path / 'unseen.txt').write_text('\n'.join(UNSEEN))
    recipe = tiny_recipe.override({**SDL, 'zero_shot.unseen': str(tmp_path / 'unseen.txt')})
    dropped, kept = (prepare_splits(recipe.override({'zero_shot.keep_pictures': word}), splits) for word in (
        'false', 'true'))
    assert dropped.unseen_labels == kept.unseen_labels == UNSEEN and dropped.label_names == kept.label_names
    assert len(kept.train) == len(splits.train) > len(dropped.train)
    assert torch.equal(kept.train.targets, splits.train.with_labels(kept.label_names).targets)


@pytest.mark.parametrize(('changes', 'words'), [
    ({'task': 'multi_label', 'loss.name': 'bce', 'zero_shot.unseen': 'coco_unseen_17'},
     "zero_shot is for task 'zero_shot', got 'multi_label'; leave the table out"),
    ({'unseen_labels': '["a"]', 'zero_shot.unseen': 'coco_unseen_17'},
     "zero_shot.unseen and unseen_labels must not both be given, got 'coco_unseen_17' and 1 labels"),
])
def test_contradictions(changes, words, tiny_recipe):
    with pytest.raises(RecipeError, match=words):
        tiny_recipe.override(SDL | changes)


def test_the_label_sets_of_the_papers():
    both, unseen = (catalog.label_set(name).labels for name in ('coco_zero_shot_65', 'coco_unseen_17'))
    coco = catalog.label_set('coco_80').labels
    assert both[48:] == unseen and len(set(both)) == 65 and set(both) < set(coco)
    assert list(both) == [*(x for x in coco if x in both[:48]), *(x for x in coco if x in unseen)]
    assert len(set(catalog.label_set('nuswide_81').labels)) == 81


def test_the_protocol_of_nuswide(tmp_path):
    """925 tags are learnt from all pictures, and the test has the 81 concepts too."""
    concepts = catalog.label_set('nuswide_81').labels
    tags = [*concepts[:75], *(f'tag{number}' for number in range(925))]
    pictures = {'Train': 20, 'Test': 3}
    (tmp_path / 'Concepts81.txt').write_text('\n'.join(concepts))
    (tmp_path / 'TagList1k.txt').write_text('\n'.join(tags))
    (tmp_path / 'images').mkdir()
    for part, count in pictures.items():
        names = [f'{part}{number}.jpg' for number in range(count)]
        for name in names:
            (tmp_path / 'images' / name).touch()
        (tmp_path / f'{part}Imagelist.txt').write_text('\n'.join(names))
        for concept in concepts:
            (tmp_path / f'Labels_{concept}_{part}.txt').write_text('1\n' * count)
        (tmp_path / f'{part}_Tags1k.dat').write_text('\n'.join(
            ' '.join('01'[number % count == row] for number in range(1000)) for row in range(count)))
    recipe = load_recipe('sdl_nuswide')
    splits = prepare_splits(recipe, tmp_path)
    assert splits.label_names == tuple(tags[75:]) and splits.unseen_labels == concepts
    assert (len(splits.train), len(splits.val), len(splits.test)) == (18, 2, 3)
    assert splits.test.label_names == (*tags[75:], *concepts)
    assert bool(splits.test.with_labels(concepts).targets.all()) and int(splits.train.targets.sum(1).min()) >= 46
