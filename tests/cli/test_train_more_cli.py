"""`timm-miil train` on labels that form a tree, and with a teacher: what it prints and what the card says."""
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import torch

import timm_miil.train._scoring as scoring_module
from timm_miil.cli.main import main
from timm_miil.data import ClassTree, write_class_tree
from timm_miil.train import load_recipe

TINY = Path(__file__).parent.parent / 'train' / 'tiny.toml'
TREE = ['tree_scenes.num_colours=2', 'tree_scenes.num_train=100', 'tree_scenes.num_val=100',
        'tree_scenes.num_test=100', 'tree_scenes.image_size=32']


def run(*words):
    return main(['train', *map(str, words)])


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """A network in a folder; it has 33 classes without names."""
    folder = tmp_path_factory.mktemp('teacher')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model('test_resnet', num_classes=33)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder


def test_labels_that_form_a_tree(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(TINY, '--output', 'a', '--loss', 'semantic_softmax', '--epochs', 1, '--set', 'task=semantic', *TREE) == 0
    out = capsys.readouterr().out
    assert out.startswith('a/scenes: 100 pictures to train on, 100 to validate, 100 to test; 33 labels\n')
    assert re.search(r'^epoch 1/1: .*, val semantic top-1 \d+\.\d\d', out, re.MULTILINE)
    printed = re.search(r'^test semantic top-1 (\d+\.\d\d) ', out, re.MULTILINE)[1]
    config = json.loads(Path('a/model/config.json').read_text())
    assert config['problem_type'] == 'single_label_classification'
    card = Path('a/model/README.md').read_text(encoding='utf-8')
    for words in (
            f'| top-1 accuracy averaged over the levels of the label tree, percent | test | {printed} |',
            '| top-1 accuracy, percent | test |', 'arXiv:2104.10972', 'had a softmax of its own',
            'Tree scenes of handwritten digits', '33 labels'):
        assert words in card, words
    assert Path('a/report.html').is_file()
    commands = [shlex.split(line) for line in out.splitlines()[-2:]]
    assert [words[1] for words in commands] == ['predict', 'validate'], 'thresholds are for several labels'
    for _, *words in commands:
        assert main(['a/scenes/test' if word == 'PICTURES' else word for word in words]) == 0
    top1 = re.search(r'\| top-1 accuracy, percent \| test \| (\d+\.\d+) \|', card)[1]
    out = capsys.readouterr().out
    assert f'\ntop-1 {top1}\n' in out and f'\nsemantic top-1 {printed}\n' in out
    deepest = re.search(r'\nsemantic top-1 with the deepest level (\d+\.\d\d)\n', out)[1]
    words = ['validate', 'a/model', '--data-dir', 'a/scenes', '--split', 'test', '--workers', '0']
    assert main([*words, '--tree', 'a/scenes/tree.json', '--results-file', 'a.json']) == 0
    found = json.loads(Path('a.json').read_text())
    assert f'{100 * found["semantic_top1"]:.2f}' == printed
    assert f'{100 * found["semantic_top1_with_deepest_level"]:.2f}' == deepest
    # A tree over other labels: of the data it is passed over, a named one is wrong.
    capsys.readouterr()
    write_class_tree(ClassTree(('a', 'b'), (-1, -1)), 'other.json')
    assert main([*words, '--tree', 'other.json']) == 2
    assert 'names must be classes of the tree' in capsys.readouterr().err
    shutil.copy('other.json', 'a/scenes/tree.json')
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert 'semantic' not in out and 'no semantic accuracy, since a/scenes/tree.json is no tree over these' in err


def test_labels_with_their_ancestors_are_measured_as_they_were_learnt(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(TINY, '--output', 'made', '--loss', 'cross_entropy', '--epochs', 1, '--set', 'task=single_label',
               *TREE) == 0
    shutil.move('made/scenes/tree.json', 'own.json')
    capsys.readouterr()
    assert run(TINY, '--output', 'a', '--data-dir', 'made/scenes', '--epochs', 1, '--set', 'data.ancestors=true',
               'data.tree=own.json') == 0
    out = capsys.readouterr().out
    printed = re.search(r'^test mAP (\d+\.\d\d) ', out, re.MULTILINE)[1]
    _, validate, tune = (shlex.split(line)[1:] for line in out.splitlines()[-3:])
    assert main([*validate, '--workers', '0']) == 0
    assert re.search(rf'^mAP (.*: )?{printed}$', capsys.readouterr().out, re.MULTILINE)
    assert main([*tune, '--workers', '0']) == 0 and '--ancestors' in tune


def test_scores_that_are_counted_make_no_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scoring_module, 'MOST_SCORES', 0)
    assert run(TINY, '--output', tmp_path / 'a', '--loss', 'cross_entropy', '--epochs', 1, '--set',
               'task=single_label', *TREE) == 0
    out = capsys.readouterr().out
    assert 'no report.html: so many scores of so many pictures are counted and not kept' in out
    assert 'test top-1 ' in out and not (tmp_path / 'a' / 'report.html').exists()


def test_a_teacher_is_named(tmp_path, capsys, teacher):
    assert run(TINY, '--output', tmp_path / 'a', '--loss', 'cross_entropy', '--epochs', 1,
               '--kd-model-name', f'local-dir:{teacher}', '--distill-loss-weight', 2, '--set', 'task=single_label',
               'teacher.image_size=32', *TREE) == 0
    recipe = load_recipe(tmp_path / 'a' / 'recipe.toml')
    assert (recipe.teacher.name, recipe.teacher.distill_loss_weight) == (f'local-dir:{teacher}', 2)
    card = (tmp_path / 'a' / 'model' / 'README.md').read_text(encoding='utf-8')
    assert 'arXiv:2204.03475' in card and 'learnt from the labels and from the teacher' in card
    assert f'teacher `test_resnet` in `local-dir:{teacher}`, weighted 1 and 2' in card
    page = (tmp_path / 'a' / 'report.html').read_text(encoding='utf-8')
    assert 'teacher' in page
    capsys.readouterr()
    assert run(TINY, '--output', tmp_path / 'b', '--teacher', 'resnet5', '--set', *TREE) == 2
    assert "teacher.name must be a model of timm, got 'resnet5'; did you mean" in capsys.readouterr().err


def test_a_network_from_a_folder_keeps_its_name(tmp_path, teacher):
    assert run(TINY, '--output', tmp_path / 'a', '--model', f'local-dir:{teacher}', '--pretrained', '--epochs', 1,
               '--loss', 'cross_entropy', '--teacher', 'test_resnet', '--task-loss-weight', 0, '--set',
               'task=single_label', 'teacher.pretrained=false', 'augment.image_size=32', *TREE) == 0
    card = (tmp_path / 'a' / 'model' / 'README.md').read_text(encoding='utf-8')
    assert '# Model card for test_resnet\n' in card and '**Architecture:** `test_resnet`' in card
    assert f'It began with the weights of `test_resnet` in `local-dir:{teacher}`.' in card
    assert 'It learnt from the teacher `test_resnet` alone, without the labels.' in card


def test_the_arguments_of_a_teacher_are_not_for_another(tmp_path, capsys, teacher):
    file = tmp_path / 'own.toml'
    file.write_text(TINY.read_text() + '\n[teacher]\nname = "test_vit"\n[teacher.args]\nimg_size = 32\n')
    assert run(file, '--output', tmp_path / 'a', '--teacher', f'local-dir:{teacher}', '--set', 'epochs=1',
               'scenes.num_classes=33', 'scenes.num_train=48', 'scenes.num_val=33', 'scenes.num_test=33',
               'scenes.image_size=32') == 0
    assert 'teacher.args are left out, since they are for test_vit: img_size' in capsys.readouterr().err
