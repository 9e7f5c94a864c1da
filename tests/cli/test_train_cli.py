"""`timm-miil train` from end to end in seconds: what it prints and leaves, and every way to use it wrongly."""
import contextlib
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from timm_miil._errors import TrainingInterrupted
from timm_miil.cli._device import parse_device
from timm_miil.cli.main import main
from timm_miil.cli.train import SWITCHES, VALUE_FLAGS
from timm_miil.data import SceneConfig, make_scenes, open_split
from timm_miil.train import evaluate, list_recipes, load_recipe

TINY = Path(__file__).parent.parent / 'train' / 'tiny.toml'
SCENES = SceneConfig(num_classes=20, num_train=72, num_val=24, num_test=32, image_size=32)
MADE = [
    'scenes.num_classes=20', 'scenes.num_train=72', 'scenes.num_val=24', 'scenes.num_test=32', 'scenes.image_size=32']
ONE_DIGIT = [
    'scenes.num_classes=10', 'scenes.max_digits=1', 'scenes.num_train=64', 'scenes.num_val=40', 'scenes.num_test=40',
    'scenes.image_size=32']


def run(*words):
    return main(['train', *map(str, words)])


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp('data') / 'my pictures', SCENES)


@pytest.fixture(scope='module')
def trained(data_dir, tmp_path_factory):
    """A finished run's folder, and what it printed."""
    output = tmp_path_factory.mktemp('run') / 'my run'
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(TINY, '--data-dir', data_dir, '--output', output, '--lr', '0.02') == 0
    return output, out.getvalue()


@pytest.fixture
def caught(monkeypatch):
    """The recipe and options that training gets; it stops there."""
    seen = {}

    def stop(recipe, data, **options):
        seen.update(recipe=recipe, **options)
        raise RuntimeError('stop')

    monkeypatch.setattr('timm_miil.cli._training.train', stop)
    return seen


def test_it_prints_what_it_did(trained, data_dir):
    output, out = trained
    want = [
        rf'{data_dir}: 72 pictures to train on, 24 to validate, 32 to test; 20 labels',
        r'the weights of mldecoder start at random; --pretrained starts from those that it has',
        r'epoch 1/2: loss \d+\.\d{3}, val mAP \d+\.\d\d, \d+ pictures/s',
        r'epoch 2/2: loss \d+\.\d{3}, val mAP \d+\.\d\d, \d+ pictures/s',
        r'test mAP \d+\.\d\d with the weights of epoch [12]',
        rf'{output}/model: README\.md, config\.json, model\.safetensors',
        rf'{output}/report\.html: curves, labels, mistakes',
        r'now try',
        rf"  timm-miil predict PICTURES --model '{output}/model'",
        rf"  timm-miil validate '{output}/model' --data-dir '{data_dir}' --split test",
        rf"  timm-miil tune '{output}/model' --data-dir '{data_dir}' --split val",
    ]
    lines = out.splitlines()
    assert len(lines) == len(want)
    for line, pattern in zip(lines, want):
        assert re.fullmatch(pattern, line), line


def test_it_leaves_a_run_a_model_and_a_report(trained):
    output, _ = trained
    assert {path.name for path in output.iterdir()} == {
        '.lock', 'checkpoints', 'model', 'recipe.toml', 'report.html', 'results.csv', 'summary.json'}
    assert load_recipe(output / 'recipe.toml') == load_recipe(TINY).override({'optimizer.lr': '0.02'})
    page = (output / 'report.html').read_text(encoding='utf-8')
    assert 'tiny on my pictures' in page and '72 pictures to train on' in page


def test_the_saved_model_scores_what_was_printed(trained, data_dir):
    output, out = trained
    model = timm.create_model(f'local-dir:{output / "model"}', pretrained=True).eval()
    records = open_split(data_dir, 'test')
    assert tuple(model.pretrained_cfg['label_names']) == records.label_names
    printed = float(re.search(r'^test mAP (\d+\.\d+) ', out, re.MULTILINE)[1])
    assert evaluate(model, records)['map'] == pytest.approx(printed, abs=0.006)


def test_the_card_tells_of_the_run(trained):
    output, out = trained
    card = (output / 'model' / 'README.md').read_text(encoding='utf-8')
    summary = json.loads((output / 'summary.json').read_text())
    for words in (
            'license: "unknown"', 'type: "my-pictures"', 'name: "my pictures"', load_recipe(TINY).summary,
            '72 pictures to train on, 24 to choose the epoch by and 32 to test, of 20 labels',
            f'| test | {summary["test"]["map"]:.2f} |', f'| val | {summary["val"]["map"]:.2f} |',
            f'the weights are of epoch {summary["best_epoch"]} of 2',
            "`timm-miil train tiny.toml --data-dir 'my pictures' --set optimizer.lr=0.02`",
            'arXiv:2111.12933', 'arXiv:2009.14119'):
        assert words in card, words


def test_the_commands_it_names_run(trained, data_dir, capsys):
    _, out = trained
    for line in out.splitlines()[-3:]:
        words = shlex.split(line)
        assert words[0] == 'timm-miil'
        words = [str(data_dir / 'test') if word == 'PICTURES' else word for word in words[1:]]
        assert main([*words, '--output', str(data_dir.parent / 'tuned')] if words[0] == 'tune' else words) == 0
    assert 'mAP' in capsys.readouterr().out


def test_a_run_is_not_written_over_but_gone_on_with(trained, data_dir, capsys):
    output, out = trained
    words = TINY, '--data-dir', data_dir, '--output', output, '--lr', '0.02'
    weights = (output / 'model' / 'model.safetensors').read_bytes()
    assert run(*words) == 2
    assert f"output '{output}' has a run in it (results.csv); go on with it by resume='auto'" in capsys.readouterr().err
    assert run(*words, '--resume', 'auto') == 0
    assert capsys.readouterr().out.splitlines()[0] == out.splitlines()[4]  # no epoch was left to train
    assert (output / 'model' / 'model.safetensors').read_bytes() == weights


def test_what_was_tuned_stays_with_its_weights(trained, data_dir, tmp_path, capsys):
    output = shutil.copytree(trained[0], tmp_path / 'run')
    assert main(['tune', str(output / 'model'), '--data-dir', str(data_dir), '--split', 'val']) == 0
    config = json.loads((output / 'model' / 'config.json').read_text())
    words = TINY, '--data-dir', data_dir, '--output', output, '--lr', '0.02', '--resume', 'auto'
    capsys.readouterr()
    assert run(*words) == 0
    line = f'{output}/model/config.json: thresholds and temperatures of these very weights are kept'
    assert line in capsys.readouterr().out.splitlines()
    assert json.loads((output / 'model' / 'config.json').read_text()) == config and len(config['thresholds']) == 20


def test_recipes_are_listed_with_what_they_are(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_recipes()
    assert all(line.endswith(load_recipe(line.split()[0]).summary) for line in lines)
    assert run('--list') == 0
    assert capsys.readouterr().out.splitlines() == lines and list(tmp_path.iterdir()) == []


def test_pictures_are_made_where_there_are_none(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(TINY, '--epochs', 1, '--set', *MADE) == 0
    out = capsys.readouterr().out
    assert out.startswith('runs/tiny/scenes: 72 pictures to train on') and '--data-dir runs/tiny/scenes' in out
    card = (tmp_path / 'runs' / 'tiny' / 'model' / 'README.md').read_text(encoding='utf-8')
    assert 'license: "apache-2.0"' in card and 'Scenes of handwritten digits' in card
    assert f'`timm-miil train tiny.toml --set epochs=1 {" ".join(MADE)}`' in card


def test_one_label_a_picture(tmp_path, capsys):
    assert run(TINY, '--output', tmp_path / 'a', '--loss', 'cross_entropy', '--epochs', 1, '--licence', 'CC-BY-4.0',
               '--set', 'task=single_label', *ONE_DIGIT) == 0
    out, err = capsys.readouterr()
    assert re.search(r'val top-1 \d+\.\d\d', out) and re.search(r'^test top-1 ', out, re.MULTILINE)
    assert 'tune' not in out
    assert 'loss.args are left out, since they are for asymmetric: gamma_neg, gamma_pos, clip' in err
    config = json.loads((tmp_path / 'a' / 'model' / 'config.json').read_text())
    assert config['problem_type'] == 'single_label_classification'
    card = (tmp_path / 'a' / 'model' / 'README.md').read_text(encoding='utf-8')
    assert 'license: "cc-by-4.0"' in card and 'top-1 accuracy, percent | test' in card and 'arXiv:2009' not in card


def test_labels_that_were_held_out_are_measured_too(data_dir, tmp_path, capsys):
    assert run(TINY, '--data-dir', data_dir, '--output', tmp_path / 'a', '--epochs', 1, '--set', 'task=zero_shot',
               'model.name=mldecoder_zero_shot', 'unseen_labels=["red 2", "red 7"]') == 0
    line = r'^test mAP \d+\.\d\d, of labels never trained on (\d+\.\d\d), of both together \d+\.\d\d, with the'
    out = capsys.readouterr().out
    unseen = re.search(line, out, re.MULTILINE)[1]
    found = r'^seen and unseen labels, in pictures that show one: mAP \d+\.\d\d, F1 of the 3 best \d+\.\d\d, F1'
    assert re.search(found, out, re.MULTILINE)
    card = (tmp_path / 'a' / 'model' / 'README.md').read_text(encoding='utf-8')
    assert f'| mean over labels that were not trained on of average precision, percent | test | {unseen} |' in card
    assert 'of 18 labels' in card and 'arXiv:2111.12933' in card


# Values for the keys that do not take 2.
VALUES = {
    'augment.args.auto_augment': 'rand-m7', 'augment.args.interpolation': 'bilinear', 'augment.crop_pct': '0.9',
    'augment.hflip': '0.1', 'data.format': 'coco', 'data.labels': 'names.txt',
    'data.train': 'val', 'data.val': 'test', 'ema_decay': '0.1', 'loss.name': 'bce',
    'model.args.backbone': 'resnet18', 'model.name': 'resnet18', 'optimizer.args.momentum': '0.5',
    'optimizer.layer_decay': '0.5', 'optimizer.name': 'sgd', 'schedule.name': 'step', 'teacher.name': 'resnet18',
}
# What they need besides.
BESIDES = {
    'optimizer.args.momentum': {'optimizer.name': 'sgd'},
    **{f'teacher.{name}': {'teacher.name': 'resnet18'} for name in (
        'task_loss_weight', 'distill_loss_weight', 'temperature')}}


@pytest.mark.parametrize(('flag', 'key'), [(flag, key) for flags, key in VALUE_FLAGS for flag in flags.split()])
def test_a_flag_sets_its_key(flag, key, caught, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('names.txt').write_text('\n'.join(SCENES.label_names))
    besides = {'augment.name': 'timm'} if key.startswith('augment.args') else BESIDES.get(key, {})
    resets = {f'{key[:-5]}.args': '{}'} if key in ('model.name', 'loss.name') else {}
    words = ['--set', *(f'{name}={text}' for name, text in besides.items())] if besides else []
    value = VALUES.get(key, '2')
    assert run(TINY, '--data-dir', data_dir, '--output', tmp_path / 'a', flag, value, *words) == 2
    assert caught['recipe'] == load_recipe(TINY).override({**resets, **besides, key: value})


@pytest.mark.parametrize(('words', 'changes'), [
    *(([flag], {key: 'true'}) for flag, key in SWITCHES),
    (['--scale', '0.5', '1', '--ratio', '0.8', '1.25', '--opt-betas', '0.8', '0.9'],
     {'augment.scale': '[0.5, 1.0]', 'augment.ratio': '[0.8, 1.25]', 'optimizer.args.betas': '[0.8, 0.9]'}),
    (['--amp'], {'precision': 'fp16'}),
    (['--amp-dtype', 'bfloat16'], {'precision': 'bf16'}),
    (['--set', 'epochs=3', 'optimizer.lr=1e-3', '--set', 'summary=two words'],
     {'epochs': '3', 'optimizer.lr': '1e-3', 'summary': 'two words'}),
    (['--set', 'summary=a=b'], {'summary': 'a=b'}),
])
def test_other_words_set_theirs(words, changes, caught, data_dir, tmp_path):
    assert run(TINY, '--data-dir', data_dir, '--output', tmp_path / 'a', *words) == 2
    assert caught['recipe'] == load_recipe(TINY).override(changes)


def test_what_the_data_ask_of_the_loss_is_kept(caught, data_dir, tmp_path):
    words = ['finetune', '--data-dir', data_dir, '--output', tmp_path / 'a']
    assert run(*words, '--loss', 'bce') == 2
    assert dict(caught['recipe'].loss.args) == {'ignore_unknown': True}
    assert run(*words, '--loss', 'class_aware_selective', '--model', 'resnet10t') == 2
    assert not caught['recipe'].loss.args and caught['recipe'].summary == (
        'resnet10t, trained with the loss class_aware_selective.')


def test_options_reach_the_training(caught, data_dir, tmp_path):
    assert run(TINY, '--data-dir', data_dir, '--output', tmp_path / 'a', '--resume', 'auto', '--device', 'cpu') == 2
    assert caught['output'] == tmp_path / 'a' and caught['resume'] == 'auto' and caught['device'] == torch.device('cpu')
    assert run(TINY, '--data-dir', data_dir, '--output', tmp_path / 'a') == 2
    assert caught['resume'] is None and caught['device'] == parse_device('auto') and caught['log'] == []


@pytest.mark.parametrize(('words', 'message'), [
    (['asl_cocoo'], "unknown recipe 'asl_cocoo'; did you mean 'asl_coco'?"),
    (['none.toml'], "there is no recipe file 'none.toml'."),
    (['asl_coco'], 'recipe asl_coco needs a data set: give its folder by --data-dir, or try one of the recipes that'),
    (['scenes_asl', '--data-dir', 'nowhere'], "data_dir must be the folder of a data set, got 'nowhere', which is"),
    (['--epochs', '3'], 'name a recipe, such as finetune; `timm-miil train --list` shows all.'),
    (['--fsdp'], 'name a recipe, such as finetune; `timm-miil train --list` shows all.'),
    (['--data-dir', '.'], 'name a recipe, such as finetune; `timm-miil train --list` shows all.'),
    (['scenes_asl', '--set', 'epoch=3'], "override: unknown key 'epoch'; did you mean 'epochs'?"),
    (['scenes_asl', '--set', 'epochs'], "--set must be KEY=VALUE, got 'epochs'."),
    (['scenes_asl', '--set', '=3'], "--set must be KEY=VALUE, got '=3'."),
    (['scenes_asl', '--set', 'epochs=3', 'epochs=4'], "epochs is given twice: '3' and '4'."),
    (['scenes_asl', '--lr', '1', '--set', 'optimizer.lr=2'], "optimizer.lr is given twice: '1' and '2'."),
    (['scenes_asl', '--lr', 'fast'], "override: 'optimizer.lr' must be a number, got 'fast'."),
    (['scenes_asl', '-b', '0'], 'override: batch_size must be at least 1, got 0.'),
    (['scenes_asl', '--opt', 'adamm'], "override: optimizer.name must be an optimizer of timm, got 'adamm'; did you"),
    (['scenes_asl', '--mixup', '0.1'], "override: augment.args of 'crop' must be empty, got 'mixup'; name = "),
    (['scenes_asl', '--device', 'abacus'], "--device must be 'auto', 'cpu' or an accelerator here, got 'abacus'"),
    (['scenes_asl', '--licence', 'my own'], "--licence must be the Hub's word for one, such as apache-2.0 or"),
    (['scenes_asl', '--log', 'paper'], "argument --log: invalid choice: 'paper'"),
    (['scenes_asl', '--amp-dtype', 'half'], "argument --amp-dtype: invalid choice: 'half'"),
    (['scenes_asl', '--lr', '-1'], 'override: optimizer.lr must be in (0, inf), got -1.0.'),
    (['scenes_asl', '--model', 'resnet5'], "override: model.name must be a model of timm, got 'resnet5'; did you mean"),
    (['scenes_asl', '--opt', 'adahessian'], "override: optimizer.name must be an optimizer of timm, got 'adahessian'"),
    (['scenes_asl', '--sched', 'step', '--set', 'schedule.args.decay_rate=fast'],
     "override: schedule.args must be those of step, got {'decay_rate': 'fast'}: "),
    (['scenes_asl', '--output', __file__], f"--output must be a folder, got '{__file__}', where {__file__} is a file."),
    (['scenes_asl', '--speed', '2'], 'unrecognized arguments: --speed 2'),
    (['scenes_asl', '--set', 'scenes.num_classes=5'], 'override: scenes.num_classes must be in [10, 100], got 5.'),
])
def test_wrong_words_are_one_line_and_leave_nothing(words, message, tmp_path, monkeypatch, capsys, caught):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f'timm-miil train: {message}') and err.count('\n') == 1 and out == ''
    assert list(tmp_path.iterdir()) == []


def test_a_setting_that_the_loss_does_not_know_is_named(data_dir, tmp_path, capsys):
    assert run(TINY, '--data-dir', data_dir, '--output', tmp_path / 'a', '--smoothing', '0.1') == 2
    assert capsys.readouterr().err.startswith(
        "timm-miil train: AsymmetricLoss has no setting 'smoothing'; Known: clip, ")


def test_a_folder_that_is_no_model_folder_is_told_at_once(tmp_path, capsys, caught):
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'notes.txt').write_text('mine')
    assert run('scenes_asl', '--output', tmp_path) == 2
    assert 'model is no model folder: it holds notes.txt; choose another folder' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['model'] and caught == {}


def test_another_thing_takes_none_of_the_formers_arguments(caught, data_dir, tmp_path, capsys):
    assert run(TINY, '--data-dir', data_dir, '--output', tmp_path / 'a', '--model', 'resnet18') == 2
    assert caught['recipe'].model.name == 'resnet18' and not caught['recipe'].model.args
    assert 'model.args are left out, since they are for mldecoder: backbone, ' in capsys.readouterr().err
    assert run(TINY, '--data-dir', data_dir, '--output', tmp_path / 'a', '--model', 'mldecoder') == 2
    assert caught['recipe'] == load_recipe(TINY) and 'left out' not in capsys.readouterr().err


@pytest.mark.parametrize('package', ['accelerate', 'matplotlib'])
def test_without_a_package_it_names_the_pip_command(package, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    assert run('scenes_asl') == 2
    assert capsys.readouterr().err == (
        f'timm-miil train: {package} is needed here and is not installed; run: pip install "timm-miil[train]".\n')
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_has_a_status_of_its_own(data_dir, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise TrainingInterrupted('SIGTERM: saved.')

    monkeypatch.setattr('timm_miil.cli._training.train', stop)
    assert run(TINY, '--data-dir', data_dir, '--output', tmp_path / 'a') == 130
    assert capsys.readouterr().err == 'timm-miil train: SIGTERM: saved.\n'


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(data_dir, tmp_path, capsys):
    words = [str(word) for word in (TINY, '--data-dir', data_dir, '--output', tmp_path / 'a', '--epochs', 200)]
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_miil.cli.main', 'train', *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True)
    assert process.stdout.readline().startswith(str(data_dir))
    process.stdout.readline()  # the first epoch
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert 'timm-miil train: SIGTERM: stopped after ' in err and 'Traceback' not in err and 'model' not in out
    done = 1 + out.count('epoch')
    assert run(*words, '--resume', 'auto', '--set', f'stop_epoch={done + 1}') == 0
    assert re.findall(r'^epoch (\d+)/', capsys.readouterr().out, re.MULTILINE) == [str(done + 1)]


@pytest.mark.slow
@pytest.mark.parametrize('launcher', [
    ['torch.distributed.run', '--nproc-per-node', '2', '-m'],
    ['accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '-m'],  # CPUs too
])
def test_two_processes_make_one_run(launcher, tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', *launcher, 'timm_miil.cli.main', 'train', TINY, '--epochs', '1', '--output',
         tmp_path / 'a', '--set', *MADE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for words in ('a/scenes: 72 pictures', 'epoch 1/1: ', 'test mAP ', 'a/model: ', 'now try'):
        assert done.stdout.count(words) == 1, done.stdout
    assert {'model', 'report.html', 'scenes'} <= {path.name for path in (tmp_path / 'a').iterdir()}
