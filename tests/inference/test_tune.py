"""A model folder's thresholds and temperatures: found, written into config.json, and nothing else touched."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled_pictures import LABELS, save_model
from PIL import Image

from timm_miil._errors import ImageError, PredictionError
from timm_miil.data import MultiLabelRecords
from timm_miil.inference import Tagger, calibrate, tune_folder, validate
from timm_miil.inference.tune import _with_members
from timm_miil.metrics import calibration_error, fit_temperatures

NUM = 40


@pytest.fixture(scope='module')
def original(tmp_path_factory) -> Path:
    folder = save_model(tmp_path_factory.mktemp('saved') / 'model')
    (folder / 'README.md').write_text('about it')
    return folder


@pytest.fixture(scope='module')
def source(original, tmp_path_factory) -> MultiLabelRecords:
    """Pictures with labels that have something to do with the model's scores; some are unknown."""
    folder, draws = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    paths = [folder / f'{index:02}.png' for index in range(NUM)]
    for path in paths:
        Image.fromarray(draws.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((40, 36)).save(path)
    drawn = torch.from_numpy(draws.random((NUM, len(LABELS))))
    logits = validate(str(original), MultiLabelRecords(paths, torch.zeros(NUM, 3, dtype=torch.int8), LABELS)).logits
    likely = (logits - logits.mean(dim=0)) / logits.std(dim=0)
    labels = torch.where(drawn < 0.2, -1, (likely + 3 * (drawn - 0.6) > 0).int())
    return MultiLabelRecords(paths, labels.to(torch.int8), LABELS)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / 'model'))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_calibrate_finds_is_written_and_used(folder, source):
    before = content(folder)
    found = tune_folder(folder, source, objective='recall', target=0.7, num_folds=3, seed=5)
    measured = validate(str(original_of(before, folder)), source)
    want = calibrate(measured.logits, source.targets, objective='recall', target=0.7, num_folds=3, seed=5)
    config = json.loads((folder / 'config.json').read_text())
    assert config['thresholds'] == list(want.thresholds) == list(found.calibration.thresholds)
    assert config['temperatures'] == list(want.temperatures)
    assert found.folder == folder
    tagger = Tagger.from_name(str(folder))
    assert (tagger.thresholds, tagger.temperatures) == (want.thresholds, want.temperatures)


def original_of(content: dict[str, bytes], beside: Path) -> Path:
    folder = beside.with_name('original')
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def test_every_other_byte_stays(folder, source):
    before = content(folder)
    tune_folder(folder, source)
    after = content(folder)
    assert before.keys() == after.keys() and [name for name in after if after[name] != before[name]] == ['config.json']
    old, new = before['config.json'].decode(), after['config.json'].decode()
    assert new.startswith(old.removesuffix('\n}')) and new.endswith('\n}')
    assert set(json.loads(new)) - set(json.loads(old)) == {'thresholds', 'temperatures'}


def test_a_copy_leaves_the_folder_as_it_is(folder, source, tmp_path):
    before = content(folder)
    found = tune_folder(folder, source, output=tmp_path / 'deep' / 'copy')
    assert content(folder) == before and found.folder == tmp_path / 'deep' / 'copy'
    tune_folder(folder, source)
    assert content(found.folder) == content(folder)


def test_the_comparison_is_of_what_was_there_with_held_out_pictures(folder, source):
    first = tune_folder(folder, source)
    plain = first.before
    assert first.compare()['mean F1'] == (plain.f1.class_f1, float(first.calibration.found.f1.mean()))
    assert first.compare()['calibration error'][0] == plain.calibration_error
    order = torch.randperm(NUM, generator=torch.Generator().manual_seed(0))
    probs = torch.empty(NUM, 3, dtype=torch.float64)
    for fitted, held in ((order[:20], order[20:]), (order[20:], order[:20])):
        temperatures = fit_temperatures(plain.logits[fitted], plain.targets[fitted])
        probs[held] = (plain.logits[held].double() / temperatures).sigmoid()
    assert first.calibration_error == pytest.approx(float(calibration_error(probs, plain.targets)))
    again = tune_folder(folder, source)
    assert again.before.thresholds == first.calibration.thresholds
    assert again.calibration.thresholds == first.calibration.thresholds


def test_a_class_that_the_data_lack_gets_what_all_share(folder, source):
    with pytest.raises(ValueError, match=r"the data lack 1 of the 3 of the model \('bee <b>'\)"):
        tune_folder(folder, source.with_labels(['ant', 'cat']))
    found = tune_folder(folder, source.with_labels(['cat', 'ant']), common=True)
    logits, targets = torch.zeros(NUM, 3), source.targets
    logits[:, [0, 2]], targets[:, 1] = found.before.logits, -1
    want = calibrate(logits, targets)
    assert found.calibration.thresholds == want.thresholds and want.found.is_shared[1]
    assert found.calibration.temperatures == want.temperatures and max(want.temperatures) < 19
    assert want.thresholds[1] == pytest.approx(want.found.shared)
    shared = fit_temperatures(found.before.logits.reshape(-1, 1), found.before.targets.reshape(-1, 1))
    assert found.calibration.temperatures[1] == pytest.approx(float(shared))
    assert found.compare()['mean F1'][1] == pytest.approx(float(found.calibration.found.f1[[0, 2]].mean()))


SCALARS = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=3)


@settings(max_examples=60)
@given(
    st.dictionaries(st.text(max_size=5) | st.sampled_from(['thresholds', 'x"}{,:\\']), VALUES, min_size=1, max_size=4),
    st.sampled_from([None, 0, 2, '\t']), st.booleans(), st.booleans())
def test_setting_members_changes_no_other_byte(config, indent, is_ascii, is_dos):
    text = json.dumps(config, indent=indent, ensure_ascii=is_ascii) + '\n'
    if is_dos:
        text = text.replace('\n', '\r\n')
    values = [0.5, 1e-12]
    new = _with_members(text, {'thresholds': values})
    assert json.loads(new) == {**config, 'thresholds': values} and list(json.loads(new))[:len(config)] == list(config)
    if 'thresholds' not in config:
        length = len(new) - len(text)
        assert any(new[:start] + new[start + length:] == text for start in range(len(text)))
        assert ('\n' in new.strip()) == ('\n' in text.strip())
    if indent == 2 and not is_dos:
        assert new == json.dumps({**config, 'thresholds': values}, indent=2, ensure_ascii=is_ascii) + '\n'


def test_of_a_name_that_is_there_twice_the_last_counts():
    assert _with_members('{"a": 1, "a": {"a": 2} , "b":3}', {'a': [1]}) == '{"a": 1, "a": [1] , "b":3}'


# -- what cannot be tuned --------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['mldecoder_scenes', 'hf-hub:owner/name', 'empty', 'file'])
def test_what_is_no_model_folder_is_refused(name, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('empty').mkdir()
    Path('file').touch()
    with pytest.raises(FileNotFoundError, match=(
            r'^a model folder on this machine is needed, with config\.json and weights, such as training writes; got '
            rf"'{name}', which is none\.$")):
        tune_folder(name, source)


def test_classes_that_exclude_one_another_are_refused(source, tmp_path):
    folder = save_model(tmp_path / 'model', problem_type='single_label_classification')
    with pytest.raises(PredictionError, match=(
            r'^thresholds and temperatures are for independent classes; those of .* exclude one another\.$')):
        tune_folder(folder, source)


@pytest.mark.parametrize(('options', 'error', 'words'), [
    (dict(objective='recall'), ValueError, r"^objective 'recall' needs a target in \(0, 1\], got None\.$"),
    (dict(target=0.5), ValueError, r"^target must be None with objective 'f1', got 0\.5\.$"),
    (dict(objective='mAP'), ValueError, r"^objective must be one of 'f1', 'precision', 'recall', got 'mAP'\.$"),
    (dict(num_folds=1), ValueError, r'^num_folds must be at least 2, got 1; '),
    (dict(seed=0.5), TypeError, r'^seed must be an int, got float 0\.5\.$'),
    (dict(batch_size=0), ValueError, r'^batch_size must be at least 1, got 0\.$'),
])
def test_wrong_settings_are_told_before_anything_is_run(options, error, words, folder, source):
    called = []
    with pytest.raises(error, match=words):
        tune_folder(folder, source, on_batch=called.append, **options)
    assert not called


def test_a_failure_leaves_the_folder_as_it_was(folder, source, tmp_path):
    before = content(folder)
    (tmp_path / 'gone.png').touch()
    damaged = MultiLabelRecords([tmp_path / 'gone.png'] * NUM, source.targets, LABELS)
    with pytest.raises(ImageError, match=r'gone\.png'):
        tune_folder(folder, damaged, strict=True)
    none = MultiLabelRecords(source.image_paths, source.targets.clamp(max=0), LABELS)
    with pytest.raises(ValueError, match=r'^targets hold no positive among 120 labels; a threshold needs some\.$'):
        tune_folder(folder, none, output=tmp_path / 'copy')
    only = MultiLabelRecords(source.image_paths, torch.where(source.targets == 1, 1, -1).to(torch.int8), LABELS)
    with pytest.raises(ValueError, match='no label is known to be present in some of the pictures and absent in other'):
        tune_folder(folder, only, output=tmp_path / 'copy')
    assert content(folder) == before and not (tmp_path / 'copy').exists()


def test_an_output_that_is_there_is_refused(folder, source, tmp_path):
    for output in (folder, folder / 'README.md'):
        with pytest.raises(FileExistsError, match=r'^output must be a new folder, got .*, which is there already\.$'):
            tune_folder(folder, source, output=output)


def test_a_link_is_not_written_through(folder, source, tmp_path):
    (folder / 'config.json').rename(folder / 'real.json')
    (folder / 'config.json').symlink_to('real.json')
    with pytest.raises(PredictionError, match=r'is a link, as of a download; give another folder as output\.$'):
        tune_folder(folder, source)
    found = tune_folder(folder, source, output=tmp_path / 'copy')
    assert not (found.folder / 'config.json').is_symlink() and (folder / 'config.json').is_symlink()
    assert 'thresholds' in json.loads((found.folder / 'config.json').read_text())
    assert 'thresholds' not in json.loads((folder / 'config.json').read_text())
