"""Training of embeddings: identities of splits, what is measured, resuming, a teacher, the command and its model."""
import json
import shutil

import pytest
import timm
import torch
from torch.nn import functional as F

from timm_miil._errors import PredictionError, RecipeError
from timm_miil.cli.main import main
from timm_miil.data import IdentityConfig, make_identities, open_split
from timm_miil.inference import Tagger, validate, validate_pairs
from timm_miil.metrics import tar_at_far
from timm_miil.train import evaluate, load_recipe, read_splits, train
from timm_miil.train.recipe import VerificationSettings
from timm_miil.train.splits import prepare_splits

pytest.importorskip('pytorch_metric_learning')
TINY = IdentityConfig(num_train=6, num_val=4, num_test=5, num_pictures=8, image_size=24)
CHANGES = {
    'epochs': '2', 'batch_size': '16', 'schedule.warmup_epochs': '0.5', 'augment.image_size': '32',
    'model.args.channels': '[8, 8, 16, 16]', 'verification.embed_dim': '12', 'verification.fars': '[10.0, 0.1]',
    **{f'identities.{name}': str(value) for name, value in vars(TINY).items()}}


@pytest.fixture(scope='module')
def faces(tmp_path_factory):
    return make_identities(tmp_path_factory.mktemp('faces') / 'set', TINY)


@pytest.fixture(scope='module')
def recipe():
    return load_recipe('identities_arcface').override(CHANGES)


@pytest.fixture(scope='module')
def finished(recipe, faces, tmp_path_factory):
    """A whole run by the command: its folder and what it printed."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    words = [f'{key}={value}' for key, value in CHANGES.items()]
    assert main(['train', 'identities_arcface', '--output', str(folder), '--device', 'cpu', '--set', *words]) == 0
    return folder


def weights(result):
    return list(result.model.state_dict().values())


def rates(model, source, *fars):
    """TAR of all pairs in percent, picture by picture and pair by pair in float64."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        rows = torch.cat([model(transform(source.load_image(index))[None]) for index in range(len(source))])
    rows, names = F.normalize(rows.double(), dim=1), source.targets.argmax(1)
    pairs = torch.combinations(torch.arange(len(rows)), 2)
    scores = (rows[pairs[:, 0]] * rows[pairs[:, 1]]).sum(1)
    found = tar_at_far(scores, names[pairs[:, 0]] == names[pairs[:, 1]], [far / 100 for far in fars])
    return [100 * tar for tar in found.tars]


def test_what_is_measured_is_of_all_pairs_of_faces_never_seen(recipe, faces):
    result = train(recipe, faces, device='cpu')
    test = open_split(faces, 'test')
    assert set(result.label_names).isdisjoint(test.label_names) and len(result.label_names) == 6
    assert result.model.num_classes == 12 and not result.model.training
    tar, tenth, thousandth = rates(result.model, test, 1, 10, 0.1)
    assert result.test_metrics['tar'] == tar and result.test_metrics['tar_at_10'] == tenth and 0 < tar < tenth
    assert thousandth != thousandth and result.test_metrics['tar_at_0.1'] != result.test_metrics['tar_at_0.1']
    assert result.metric == 'tar' and result.val_metrics['tar'] == max(each.metrics['tar'] for each in result.epochs)
    again = evaluate(result.model, test, task='verification', verification=recipe.verification)
    assert again['tar'] == tar


def test_a_run_that_stops_between_epochs_ends_the_same(recipe, faces, tmp_path):
    recipe = recipe.override({'ema_decay': '0.5', 'epochs': '3'})
    whole = train(recipe, faces, device='cpu')
    train(recipe.override({'stop_epoch': '1'}), faces, device='cpu', output=tmp_path / 'run')
    resumed = train(recipe, faces, device='cpu', output=tmp_path / 'run', resume='auto')
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert [each.train_loss for each in whole.epochs] == [each.train_loss for each in resumed.epochs]


def test_a_teacher_is_a_saved_model_of_embeddings(recipe, faces, finished, caplog):
    teaching = {
        'teacher.name': f'local-dir:{finished / "model"}', 'teacher.precision': 'fp32', 'teacher.task_loss_weight': '0',
        'teacher.distill_loss_weight': '1', 'epochs': '1'}
    taught = train(recipe.override(teaching), faces, device='cpu')
    assert 0 < taught.epochs[0].train_loss < 4  # the distance of two directions
    assert 'classes' not in caplog.text
    with pytest.raises(ValueError, match='embeddings of 12 numbers of the teacher and 10 of the student'):
        train(recipe.override({**teaching, 'verification.embed_dim': '10'}), faces, device='cpu')


# ---- the command and the folder it leaves


def test_the_command_leaves_a_model_of_embeddings(finished, faces, recipe):
    assert (finished / 'scenes' / 'test' / 'id_00010').is_dir() and not (finished / 'report.html').exists()
    config = json.loads((finished / 'model' / 'config.json').read_text())
    assert config['problem_type'] == 'embedding' and config['num_classes'] == 12
    assert 'label_names' not in config['pretrained_cfg'] and 'label_names' not in config
    model = timm.create_model(f'local-dir:{finished / "model"}', pretrained=True).eval()
    summary = json.loads((finished / 'summary.json').read_text())
    assert summary['test']['tar'] == pytest.approx(rates(model, open_split(faces, 'test'), 1)[0], abs=1e-9)
    card = (finished / 'model' / 'README.md').read_text()
    assert 'pipeline_tag: "image-feature-extraction"' in card and '**Classes:**' not in card
    assert f'of test pictures of one identity {summary["test"]["tar"]:.2f} % are accepted where 1 % of' in card
    code = card.split('```python\n')[1].split('```')[0].replace('local-dir:model', f'local-dir:{finished}/model')
    printed = []
    picture = str(finished / 'scenes' / 'val' / 'id_00006' / '00000.png')
    exec(code.replace("'picture.png'", repr(picture)), {'print': printed.append})
    assert printed == [torch.Size([12])]


def test_training_says_where_there_are_too_few_pairs(finished, capsys):
    words = ['--device', 'cpu', '--resume', 'auto', '--set', *(f'{key}={value}' for key, value in CHANGES.items())]
    assert main(['train', 'identities_arcface', '--output', str(finished), *words]) == 0
    assert ' %, too few pairs at 0.1 %, with the weights of epoch ' in capsys.readouterr().out


def test_validate_prints_what_training_measured(finished, tmp_path, capsys):
    words = ['validate', str(finished / 'model'), '--data-dir', str(finished / 'scenes'), '--split', 'test',
             '--workers', '0', '--fars', '0.07', '1', '10']
    assert main([*words, '--results-file', str(tmp_path / 'a.json')]) == 0
    out, err = capsys.readouterr()
    tar = json.loads((finished / 'summary.json').read_text())['test']['tar']
    assert '40 pictures of 5 identities: 140 pairs of one, 640 of two\n' in out
    assert [line.split()[:3] for line in out.splitlines()[-3:]] == [
        ['0.07', '%', '-'], ['1', '%', f'{tar:.2f}'], ['10', '%', out.splitlines()[-1].split()[2]]]
    assert err == 'timm-miil validate: no rate at 0.07 %: it takes pairs of one identity, and 1429 of two.\n'
    found = json.loads((tmp_path / 'a.json').read_text())
    assert [rate['far'] for rate in found['rates']] == [0.0007, 0.01, 0.1] and found['rates'][0]['tar'] is None
    assert 100 * found['rates'][1]['tar'] == pytest.approx(tar) and found['identities'] == 5


@pytest.mark.parametrize('words, message', [
    (['--threshold', '0.5'], '--threshold is for a model of labels'),
    (['--report', 'a.html'], '--report is for a model of labels'),
    (['--results-file', 'a.csv'], "--results-file of a model of embeddings must end in .json, got 'a.csv'"),
    (['--fars', '1', '100'], '--fars must be in (0, 100), got 100.0'),
])
def test_words_for_labels_are_refused(finished, words, message, capsys):
    line = ['validate', str(finished / 'model'), '--data-dir', str(finished / 'scenes'), '--workers', '0', *words]
    assert main(line) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_embeddings_tags_nothing(finished):
    name = str(finished / 'model')
    for use in (Tagger.from_name, lambda name: validate(name, open_split(finished / 'scenes', 'val'))):
        with pytest.raises(PredictionError, match='gives embeddings, and no labels'):
            use(name)


def test_a_broken_picture_is_left_out_and_named(finished, faces, tmp_path):
    shutil.copytree(faces / 'val', tmp_path / 'set' / 'val')
    (tmp_path / 'set' / 'val' / 'id_00006' / '00000.png').write_bytes(b'no picture')
    result = validate_pairs(str(finished / 'model'), open_split(tmp_path / 'set', 'val'), fars=[0.1])
    assert len(result.broken) == 1 and '00000.png' in result.broken[0]
    assert result.embeddings.shape == (31, 12) and result.rates.num_same == 3 * 28 + 21


# ---- the splits


def test_where_nothing_validates_a_part_of_the_identities_does(faces, recipe, tmp_path):
    shutil.copytree(faces / 'train', tmp_path / 'train')
    splits = read_splits(tmp_path, recipe.override({'data.val_fraction': '0.34'}).data, own_labels=True)
    assert len(splits.val.label_names) == 2 and len(splits.train.label_names) == 4
    assert {*splits.val.label_names, *splits.train.label_names} == {f'id_{number:05d}' for number in range(6)}
    for source in (splits.train, splits.val):
        assert len(source) == 8 * len(source.label_names) and ((source.targets == 1).sum(1) == 1).all()
        names = {source.image_name(index).split('/')[-2] for index in range(len(source))}
        assert names == set(source.label_names)
    with pytest.raises(ValueError, match='data.val_fraction must leave labels .* got 0.05 of 6 labels'):
        read_splits(tmp_path, recipe.override({'data.val_fraction': '0.05'}).data, own_labels=True)


@pytest.mark.parametrize('num_identities, far, words', [
    (1, '1', 'at least 100 of two for verification.far = 1, got 28 and 0'),
    (4, '0.01', 'at least 10000 of two for verification.far = 0.01, got 112 and 384'),
])
def test_too_few_pairs_to_choose_by_are_said_before_the_training(faces, recipe, tmp_path, num_identities, far, words):
    shutil.copytree(faces / 'train', tmp_path / 'train')
    for number in range(6, 6 + num_identities):
        shutil.copytree(faces / 'val' / f'id_{number:05d}', tmp_path / 'val' / f'id_{number:05d}')
    with pytest.raises(ValueError, match=words):
        prepare_splits(recipe.override({'verification.far': far}), tmp_path)


# ---- the table


@pytest.mark.parametrize('changes, words', [
    ({'verification': 'none'}, "task 'verification' needs the table verification"),
    ({'task': 'single_label'}, "verification is for task 'verification', got 'single_label'"),
    ({'loss.name': 'bce'}, "loss must be 'cross_entropy' without args"),
    ({'loss.args.smoothing': '0.1'}, "loss must be 'cross_entropy' without args"),
    ({'fsdp': 'true'}, 'fsdp must be false'),
    ({'verification.margin': '120'}, r'verification.margin must be in \[0, 90\], got 120'),
    ({'verification.far': '0'}, r'verification.far must be in \(0, 100\), got 0'),
    ({'verification.fars': '[1.0, 100.0]'}, r'fars\[1\] must be in \(0, 100\), got 100'),
    ({'verification.embed_dim': '0'}, 'verification.embed_dim must be at least 1, got 0'),
    ({'teacher.name': 'test_resnet', 'teacher.cache': 'here'}, "teacher.cache must be '' for task 'verification'"),
    ({'teacher.name': 'test_resnet', 'teacher.pretrained': 'false'}, 'teacher.pretrained must be true'),
    ({'partial.scheme': 'random_per_sample', 'partial.drop_prob': '0.5'}, 'partial must be left out'),
    ({'scenes.num_train': '100'}, 'scenes and identities must not be given together'),
])
def test_tables_that_do_not_fit(recipe, changes, words):
    with pytest.raises(RecipeError, match=words):
        recipe.override(changes)


def test_a_recipe_of_embeddings_is_read_back(recipe, tmp_path):
    path = tmp_path / 'a.toml'
    path.write_text(recipe.to_toml())
    assert load_recipe(str(path)) == recipe and recipe.verification == VerificationSettings(
        embed_dim=12, scale=30.0, fars=(10.0, 0.1))
