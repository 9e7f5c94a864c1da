"""`timm-miil train` without labels, and `timm-miil transfer`: what is written, the table, and what is refused."""
import csv
import json

import pytest
import timm

from timm_miil.cli.main import main
from timm_miil.data import SceneConfig, TreeSceneConfig, make_scenes, make_tree_scenes
from timm_miil.metrics import filter_diversity, mean_log_odds
from timm_miil.train import load_recipe

TINY = [
    '--epochs', '1', '-b', '20', '--set', 'tree_scenes.num_train=40', 'tree_scenes.num_val=40',
    'tree_scenes.num_test=40', 'tree_scenes.num_colours=2']


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    config = TreeSceneConfig(
        num_colours=2, num_train=60, num_val=20, num_test=40, image_size=32, shares=(0.0, 1.0, 0.0))
    return make_tree_scenes(tmp_path_factory.mktemp('data') / 'digits', config)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A model folder without classes, and what training said."""
    output = tmp_path_factory.mktemp('run') / 'simsiam'
    assert main(['train', 'scenes_simsiam', *TINY, '--output', str(output)]) == 0
    return output


def test_what_training_without_labels_leaves(trained):
    config = json.loads((trained / 'model' / 'config.json').read_text())
    assert config['num_classes'] == 0 and config['problem_type'] == 'embedding' and 'label_names' not in config
    assert 'It learnt without labels (SimSiam, arXiv:2011.10566).' in (trained / 'model' / 'README.md').read_text()
    summary = json.loads((trained / 'summary.json').read_text())
    assert summary['metric'] == 'output_std' and 0 < summary['test']['output_std'] < 1
    assert not (trained / 'report.html').exists()


def test_labels_are_injected_by_one_command(tmp_path, capsys):
    words = [*TINY, 'injection.start_epochs=1', 'injection.head_epochs=1', 'batch_size=64']
    words[words.index('tree_scenes.num_train=40')] = 'tree_scenes.num_train=130'
    words = [word for word in words if word not in ('-b', '20')]
    assert main(['train', 'scenes_injection', *words, '--output', str(tmp_path / 'run')]) == 0
    shown = capsys.readouterr().out
    assert 'labels injected: ' in shown and 'timm-miil transfer ' in shown
    assert {'start', 'head', 'model'} <= {path.name for path in (tmp_path / 'run').iterdir()}
    card = (tmp_path / 'run' / 'model' / 'README.md').read_text()
    assert 'Labels were injected into what it had learnt without them by the recipe `scenes_rotation`' in card
    assert '2204.09134' in card


def test_a_table_of_networks_and_data(trained, digits, tmp_path, capsys):
    scenes = make_scenes(tmp_path / 'scenes', SceneConfig(
        num_classes=20, num_train=72, num_val=24, num_test=24, image_size=32))
    models = [str(trained / 'model'), str(trained / 'other')]
    timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=7), models[1], safe_serialization=True)
    assert main(['transfer', *models, '--data', str(digits), str(scenes), '-j', '0', '--csv',
                 str(tmp_path / 'table.csv')]) == 0
    rows = list(csv.DictReader((tmp_path / 'table.csv').read_text().splitlines()))
    assert [(row['model'], row['data'], row['metric']) for row in rows] == [
        (model, data, metric) for model in models for data, metric in ((str(digits), 'top1'), (str(scenes), 'map'))]
    for row in rows:
        assert 0 < float(row['value']) < 100 and 1 <= float(row['effective_rank']) <= 128
        assert 1 <= float(row['participation_ratio']) and 0 <= float(row['cka_redundancy']) <= 1
        assert (row['nc1'] == 'nan') == (row['metric'] == 'map')
        network = timm.create_model(f'local-dir:{row["model"]}', pretrained=True)
        assert float(row['filter_diversity']) == pytest.approx(filter_diversity(network))
        own = [(float(other['value']) / 100, int(other['num_pictures'])) for other in rows
               if other['model'] == row['model']]
        values, counts = zip(*own)
        assert float(row['mean_log_odds']) == pytest.approx(mean_log_odds(values, num_pictures=counts))
    shown = capsys.readouterr().out
    assert all(f'{float(row["value"]):.2f}' in shown for row in rows)
    assert 'mean log-odds' in shown and f'{float(rows[0]["mean_log_odds"]):.3f}' in shown


def test_fine_tuning_by_a_recipe(trained, digits, tmp_path, capsys):
    recipe = load_recipe('scenes_injection_supervised').override({
        'epochs': '1', 'batch_size': '20', 'tree_scenes': 'none'})
    (tmp_path / 'tune.toml').write_text(recipe.to_toml())
    assert main(['transfer', str(trained / 'model'), '--data', str(digits), '--recipe', str(tmp_path / 'tune.toml'),
                 '-j', '0', '--csv', str(tmp_path / 'table.csv')]) == 0
    [row] = csv.DictReader((tmp_path / 'table.csv').read_text().splitlines())
    assert row['metric'] == 'top1' and 0 <= float(row['value']) <= 100 and row['num_pictures'] == '40'


def test_few_pictures_a_class(trained, digits, capsys):
    words = ['transfer', str(trained / 'model'), '--data', str(digits), '-j', '0', '--shots', '2', '--draws', '2']
    shown = []
    for seed in ('0', '0', '1'):
        assert main([*words, '--seed', seed]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]


@pytest.mark.parametrize(('words', 'message'), [
    (['--csv', 'table.txt'], '--csv must be a file .csv'),
    (['--csv', 'nowhere/table.csv'], '--csv must be a file .csv in a folder that exists'),
    (['--shots', '90'], 'shots must be at most the training pictures of each class'),
    (['--draws', '2'], 'draws must be 1 where all pictures are learnt from'),
    (['--recipe', 'scenes_injection_supervised', '--format', 'coco'], "has no split 'train'"),
    (['--recipe', 'scenes_injection_supervised', '--shots', '1'], 'shots and draws are for a linear classifier'),
])
def test_words_that_are_refused(trained, digits, capsys, words, message):
    assert main(['transfer', str(trained / 'model'), '--data', str(digits), '-j', '0', *words]) == 2
    assert message in capsys.readouterr().err


def test_folders_and_models_that_are_refused(trained, digits, capsys):
    folder, model = str(digits), str(trained / 'model')
    for words, message in (
            ([model, '--data', folder, folder], '--data must name each folder once'),
            ([model, model, '--data', folder], 'models must be named once each'),
            ([model + '-none', '--data', folder], "model-none', which is neither"),
            ([model, '--data', folder + '-none'], 'must be the folder of a data set')):
        assert main(['transfer', *words]) == 2
        assert message in capsys.readouterr().err
