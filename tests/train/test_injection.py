"""Labels injected in stages: what each stage starts from and changes, how much is injected, resuming, and refusals."""
import pytest
import timm
import torch
from timm.models import save_for_hf

from timm_miil._errors import RecipeError
from timm_miil.train import Splits, _stages, load_recipe, read_splits, train
from timm_miil.train.build import build_model
from timm_miil.train.injection import head_recipe, injected_amount, start_recipe

SETTINGS = {
    'task': 'single_label', 'model.name': 'test_resnet', 'model.args': '{}', 'loss.name': 'cross_entropy',
    'loss.args': '{}', 'augment.image_size': '32', 'epochs': '2', 'batch_size': '20', 'optimizer.lr': '0.001',
    'injection': '{start = "FILE", start_epochs = 1, head_epochs = 2, head_lr = 0.01}'}


@pytest.fixture(scope='module')
def start_file(tmp_path_factory):
    """`scenes_simsiam` for a few pictures."""
    path = tmp_path_factory.mktemp('recipe') / 'start.toml'
    path.write_text(load_recipe('scenes_simsiam').override({'batch_size': '20'}).to_toml())
    return path


@pytest.fixture
def recipe(tiny_recipe, start_file):
    return tiny_recipe.override({key: value.replace('FILE', str(start_file)) for key, value in SETTINGS.items()})


@pytest.fixture(scope='module')
def splits(tiny_tree):
    found = read_splits(tiny_tree)
    return Splits(found.train.select(range(80)), found.val.select(range(20)))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A network that has learnt nothing, but whose batch norms have statistics."""
    path = tmp_path_factory.mktemp('start') / 'model'
    model = timm.create_model('test_resnet', num_classes=0).train()
    model(torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    save_for_hf(model, path, safe_serialization=True)
    return path


def backbone(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith('fc.')}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def watch(monkeypatch):
    """The networks that the stages end with, by name."""
    found, run = {}, _stages.Stages.train
    monkeypatch.setattr(_stages.Stages, 'train', lambda self, recipe, name, **settings: found.setdefault(
        name, run(self, recipe, name, **settings)))
    return found


def test_each_stage_starts_from_the_one_before(recipe, splits, monkeypatch, tmp_path):
    stages = watch(monkeypatch)
    frozen = recipe.override({'injection.frozen': 'backbone'})
    result = train(frozen, splits, output=tmp_path / 'run')
    assert list(stages) == ['start', 'head'] and stages['start'].num_classes == 0
    start = backbone(stages['start'])
    assert equal(backbone(stages['head']), start) and equal(backbone(result.model), start)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        assert not equal(start, backbone(build_model(recipe, splits.label_names)))
    # The classifier has learnt in both.
    weights = [model.fc.weight for model in (stages['head'], result.model)]
    assert not torch.equal(*weights)
    assert {path.name for path in (tmp_path / 'run').iterdir()} >= {'start', 'head', 'checkpoints', 'summary.json'}


@pytest.mark.parametrize('frozen', ['statistics', 'nothing'])
def test_labels_change_all_but_what_is_frozen(recipe, splits, folder, frozen):
    own = recipe.override({
        'model.name': f'local-dir:{folder}', 'model.pretrained': 'true', 'epochs': '1',
        'injection': f'{{head_epochs = 1, frozen = "{frozen}"}}'})
    result = train(own, splits)
    start = timm.create_model(f'local-dir:{folder}', pretrained=True)
    statistics = {name for name, _ in start.named_buffers()}
    before = start.state_dict()
    changed = {name for name, tensor in backbone(result.model).items() if not torch.equal(tensor, before[name])}
    assert changed & statistics == (set() if frozen == 'statistics' else statistics)
    assert changed >= {name for name, _ in start.named_parameters()}


def test_it_goes_on_where_it_was_stopped(recipe, splits, monkeypatch, tmp_path):
    whole = train(recipe, splits, output=tmp_path / 'whole')
    train(recipe.override({'stop_epoch': '1'}), splits, output=tmp_path / 'parts')
    stages = watch(monkeypatch)
    resumed = train(recipe, splits, output=tmp_path / 'parts', resume='auto')
    assert whole.epochs == resumed.epochs and equal(backbone(whole.model), backbone(resumed.model))
    assert list(stages) == ['start', 'head']
    # What was finished is not trained again: its files are older than the first checkpoint of the main run.
    first = min(path.stat().st_mtime_ns for path in (tmp_path / 'parts' / 'checkpoints').glob('*'))
    for stage in ('start', 'head'):
        files = list((tmp_path / 'parts' / stage / 'checkpoints').glob('*'))
        assert files and max(path.stat().st_mtime_ns for path in files) < first


def test_the_stages_have_recipes_of_their_own(recipe):
    start, head = start_recipe(recipe.override({'injection.start': 'scenes_simsiam'})), head_recipe(recipe)
    own = load_recipe('scenes_simsiam')
    assert (start.epochs, start.model, start.seed, start.task) == (1, recipe.model, 3, 'self_supervised')
    assert (start.optimizer, start.loss, start.augment.scale) == (own.optimizer, own.loss, own.augment.scale)
    assert start.augment.image_size == 32 and start.batch_size == own.batch_size
    assert start_recipe(recipe).batch_size == 20
    assert start_recipe(recipe.override({'injection.start_epochs': '0'})).epochs == own.epochs
    assert (head.epochs, head.optimizer.lr, head.optimizer.name) == (2, 0.01, 'adamw')
    assert head.injection.frozen == 'backbone' and head.augment == recipe.augment
    assert start_recipe(recipe.override({'injection': '{}', 'model.pretrained': 'true'})) is None


def test_how_much_is_injected(recipe):
    own = recipe.override({'schedule.name': 'constant', 'schedule.warmup_epochs': '0'})
    assert injected_amount(own, 100) == pytest.approx(2 * 5 * 0.001)
    assert injected_amount(own.override({'stop_epoch': '1'}), 119) == pytest.approx(5 * 0.001)
    assert injected_amount(own.override({'injection.frozen': 'backbone'}), 100) == 0
    cosine = recipe.override({'schedule.warmup_epochs': '0'})
    assert injected_amount(cosine, 2000) == pytest.approx(2 * 100 * 0.001 / 2, rel=0.01)
    assert injected_amount(cosine.override({'schedule.name': 'onecycle'}), 2000) > 0
    with pytest.raises(RecipeError, match='the recipe has no table injection'):
        injected_amount(recipe.override({'injection': 'none'}), 100)


@pytest.mark.parametrize(('changes', 'words'), [
    ({'task': 'multi_label', 'loss.name': 'asymmetric'}, "injection is for task 'single_label', got 'multi_label'"),
    ({'teacher': '{name = "test_vit"}'}, 'injection is without a teacher'),
    ({'injection': '{}'}, 'injection needs weights to start from, got random ones'),
    ({'injection.start': ''}, 'start_epochs must be 0 without a start, got 1'),
    ({'injection.frozen': 'head'}, "frozen must be one of 'backbone', 'statistics', 'nothing'"),
    ({'injection.head_epochs': '0'}, 'head_epochs must be at least 1'),
    ({'injection.head_lr': '0'}, r'head_lr must be in \(0, inf\)'),
])
def test_settings_that_are_refused(recipe, changes, words):
    with pytest.raises(RecipeError, match=words):
        recipe.override(changes)


def test_a_start_that_is_none(recipe, splits):
    with pytest.raises(RecipeError, match="of task 'self_supervised', got 'scenes_single_label' of task"):
        train(recipe.override({'injection.start': 'scenes_single_label'}), splits)
    with pytest.raises(RecipeError, match="unknown recipe 'scenes_simsia'; did you mean 'scenes_simsiam'"):
        train(recipe.override({'injection.start': 'scenes_simsia'}), splits)
