"""Measuring a model: real pictures, labels by name, unknown labels, broken files, every kind of model."""
import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from timm_miil._errors import ImageError, PredictionError
from timm_miil.data import ImageStream, MultiLabelRecords, decode_image
from timm_miil.inference import Tagger, Validation, validate
from timm_miil.metrics import calibration_error, multilabel_average_precision, multilabel_f1

LABELS = ('ant', 'bee', 'cat', 'dog', 'elk', 'fox')
NUM = 24


def build_model(**cfg) -> nn.Module:
    """A small network with names whose scores differ from picture to picture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model('test_resnet', num_classes=len(LABELS), pretrained_cfg_overlay={
            'input_size': (3, 32, 32), 'fixed_input_size': False, 'label_names': list(LABELS), **cfg})
        nn.init.normal_(model.fc.weight, std=0.5)
    return model


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('pictures')
    pixels = np.random.default_rng(0)
    for index in range(NUM):
        Image.fromarray(pixels.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((40, 36)).save(
            folder / f'{index:02}.png')
    return folder


@pytest.fixture(scope='module')
def model() -> nn.Module:
    return build_model()


def targets() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.rand(NUM, len(LABELS), generator=generator)
    return torch.where(drawn < 0.4, 1, torch.where(drawn < 0.85, 0, -1)).to(torch.int8)


def records(folder: Path, labels=LABELS, *, columns=None, also=()) -> MultiLabelRecords:
    columns = list(range(len(labels))) if columns is None else columns
    paths = [*(folder / f'{index:02}.png' for index in range(NUM)), *also]
    extra = torch.zeros(len(also), len(columns), dtype=torch.int8)
    return MultiLabelRecords(paths, torch.cat([targets()[:, columns], extra]), labels)


class Shard(ImageStream):
    """Files in a row; a broken one is an error after which it goes on, or stops."""

    def __init__(self, records: MultiLabelRecords, goes_on: bool = True) -> None:
        super().__init__(records.label_names, len(records))
        self.records, self.goes_on = records, goes_on

    def iterate(self, *, seed, epoch, process, num_processes):
        assert (seed, epoch) == (None, 0)
        rows = iter(range(process, len(self.records), num_processes))
        return _GoesOn(self.records, rows) if self.goes_on else (read(self.records, row) for row in rows)


class _GoesOn:
    def __init__(self, records, rows):
        self.records, self.rows = records, rows

    def __next__(self):
        return read(self.records, next(self.rows))


def read(records, row):
    name = records.image_name(row)
    return decode_image(Path(name).read_bytes(), name), records.labels.row(row), name


def same(found: Validation, want: Validation) -> bool:
    return found.to_csv() == want.to_csv() and torch.equal(found.targets, want.targets)


# -- what is measured ------------------------------------------------------------------------------------------


def test_every_number_is_what_the_metrics_say_of_the_models_scores(folder, model):
    found = validate(model, records(folder), activation='sigmoid', threshold=0.6)
    tagger = Tagger(model)
    with torch.no_grad():
        want = torch.stack([
            tagger.model(tagger.transform(Image.open(folder / f'{index:02}.png'))[None])[0] for index in range(NUM)])
    torch.testing.assert_close(found.logits, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.targets, targets()) and found.rows.tolist() == list(range(NUM))
    probs = found.logits.double().sigmoid()
    precision, f1 = multilabel_average_precision(probs, targets()), multilabel_f1(probs, targets(), threshold=0.6)
    for column, result in enumerate(found.class_results()):
        counts = [int((targets()[:, column] == label).sum()) for label in (1, 0, -1)]
        assert (result.label, result.present, result.absent, result.unknown) == (LABELS[column], *counts)
        assert result.average_precision == pytest.approx(float(precision[column]))
        assert (result.precision, result.recall, result.f1, result.threshold) == (
            float(f1.precision[column]), float(f1.recall[column]), float(f1.f1[column]), 0.6)
    summary = found.summary()
    assert summary['mAP'] == pytest.approx(float(precision.nanmean()))
    assert (summary['OF1'], summary['CF1'], summary['OP'], summary['CR']) == (
        f1.overall_f1, f1.class_f1, f1.overall_precision, f1.class_recall)
    assert found.calibration_error == pytest.approx(float(calibration_error(probs, targets())))
    assert summary['top1'] is summary['top5'] is None
    assert (summary['images'], summary['labels'], summary['broken']) == (NUM, 6, 0)
    assert 0 < summary['images_per_second'] <= summary['model_images_per_second'] * 1.5


@pytest.mark.parametrize(('batch_size', 'workers'), [(5, 0), (NUM, 0), (7, 2)])
def test_neither_batches_nor_workers_nor_streaming_change_what_is_measured(batch_size, workers, folder, model):
    want = validate(model, records(folder), batch_size=batch_size)
    done = []
    found = validate(model, records(folder), batch_size=batch_size, workers=workers, on_batch=done.append)
    assert same(found, want) and sum(done) == NUM and max(done) == min(batch_size, NUM)
    streamed = validate(model, Shard(records(folder)), batch_size=batch_size, workers=workers)
    assert streamed.rows is None
    for result, wanted in zip(streamed.class_results(), want.class_results()):
        assert result.average_precision == pytest.approx(wanted.average_precision)


def test_the_model_the_random_numbers_and_the_source_are_left_as_they_were(folder):
    model, source = build_model().train(), records(folder)
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    validate(model, source)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not validate(model.eval(), source).logits.requires_grad and not model.training


class Colours(nn.Module):
    """A network without parameters: its scores are the mean colours of a picture."""

    num_classes = len(LABELS)
    pretrained_cfg = {'input_size': (3, 32, 32), 'label_names': list(LABELS)}

    def forward(self, x):
        return x.mean((2, 3))[:, [index % 3 for index in range(len(LABELS))]]


def test_models_without_parameters_and_compiled_ones_are_measured(folder, model):
    found = validate(Colours(), records(folder), activation='sigmoid')
    assert found.logits.dtype == torch.float32 and found.logits.unique().numel() > NUM
    want = validate(model, records(folder), activation='sigmoid')
    assert same(validate(torch.compile(model, backend='eager'), records(folder), activation='sigmoid'), want)


def test_mixed_precision_is_close_and_not_equal(folder, model):
    whole, half = (validate(model, records(folder), amp_dtype=dtype).logits for dtype in (None, torch.bfloat16))
    assert half.dtype == torch.float32 and not torch.equal(whole, half)
    torch.testing.assert_close(half, whole, rtol=0.1, atol=0.2)


# -- labels by name --------------------------------------------------------------------------------------------


def test_labels_are_matched_by_name_whatever_their_order(folder, model):
    want = validate(model, records(folder))
    turned = records(folder, LABELS[::-1], columns=[5, 4, 3, 2, 1, 0])
    assert same(validate(model, turned), want)
    assert [row.average_precision for row in validate(model, Shard(turned)).class_results()] == pytest.approx(
        [row.average_precision for row in want.class_results()])


def test_the_labels_that_both_have_are_measured_when_asked_for(folder, model):
    source = records(folder, ('gnu', 'dog', 'bee'), columns=[0, 3, 1])
    found = validate(model, source, common=True)
    assert found.label_names == ('bee', 'dog') and found.columns == (1, 3)
    assert found.only_model == ('ant', 'cat', 'elk', 'fox') and found.only_data == ('gnu',)
    whole = validate(model, records(folder))
    assert torch.equal(found.logits, whole.logits[:, [1, 3]]) and torch.equal(found.targets, whole.targets[:, [1, 3]])


@pytest.mark.parametrize(('labels', 'words'), [
    (('ant', 'bee', 'cat', 'dog', 'elks', 'fox'),
     r"^the labels of model and data differ: the data lack 1 of the 6 of the model \('elk'\); the model lacks 1 of the "
     r"6 of the data \('elks'\); for 'elks', did you mean 'elk'\? Known: ant, bee, cat, dog, elk, fox\. Name them "
     r"alike, or measure the 5 that both have: common=True, --common\.$"),
    (('ant', 'bee'), r"the data lack 4 of the 6 of the model \('cat', 'dog', 'elk' and 1 more\)\. Name them alike"),
    (('x', 'y'), r"^the model and the data have no label in common: the model has 'ant', 'bee', 'cat' and 3 more, the "
                 r"data 'x', 'y'; name the labels of the data as the model does\.$"),
])
def test_labels_that_do_not_match_are_an_error(labels, words, folder, model):
    with pytest.raises(ValueError, match=words):
        validate(model, records(folder, labels))


def test_classes_are_also_found_by_their_identifiers(folder):
    ids = [f'n0000000{index}' for index in range(6)]
    model = build_model(label_names=ids, label_descriptions=dict(zip(ids, LABELS)))
    assert validate(model, records(folder)).label_names == LABELS
    assert validate(model, records(folder, ids)).label_names == tuple(ids)


def test_imagenet_weights_know_synsets_and_words(folder):
    model = timm.create_model('test_resnet', pretrained_cfg_overlay={'input_size': (3, 32, 32)})
    by_id = validate(model, records(folder, ('n01440764', 'n01443537'), columns=[0, 1]), common=True)
    assert by_id.columns == (0, 1) and by_id.activation == 'softmax'
    by_words = validate(
        model, records(folder, ('goldfish, Carassius auratus', 'tench, Tinca tinca'), columns=[1, 0]), common=True)
    assert same(by_words, by_id) is False and torch.equal(by_words.logits, by_id.logits)


def test_a_common_name_of_two_classes_is_an_error(folder):
    names = ['bee', 'bee', *LABELS[2:]]
    with pytest.raises(ValueError, match=r"^the model has 2 classes of the name 'bee', which the data have once\.$"):
        validate(build_model(label_names=names), records(folder, ('bee',), columns=[1]), common=True)


def test_a_model_without_names_is_told_them(folder):
    model = build_model(label_names=None)
    with pytest.raises(PredictionError, match=r'^the model does not name its classes; give label_names, one a class'):
        validate(model, records(folder))
    found = validate(model, records(folder), label_names=LABELS[::-1])
    assert found.label_names == LABELS[::-1]
    assert torch.equal(found.logits, validate(build_model(), records(folder)).logits)
    with pytest.raises(ValueError, match=r'^label_names must have one name a class, got 2 names for 6 classes\.$'):
        validate(model, records(folder), label_names=LABELS[:2])
    assert validate(build_model(), records(folder), label_names=LABELS[:2]).label_names == LABELS


def test_a_zero_shot_model_is_told_the_labels_of_the_data(folder):
    model = timm.create_model('mldecoder_zero_shot_scenes', pretrained=True)
    source = records(folder, ('red 1', 'a horse'), columns=[0, 1])
    found = validate(model, source)
    assert found.label_names == model.labels == ('red 1', 'a horse') and found.activation == 'sigmoid'
    again = validate(model, records(folder, ('a horse', 'red 1'), columns=[1, 0]))
    assert again.label_names == ('red 1', 'a horse') and torch.equal(again.logits, found.logits)
    vectors = torch.eye(2, model.text_dim)
    with torch.no_grad():
        assert not torch.equal(validate(model, source, embeddings=vectors).logits, found.logits)


# -- kinds of models -------------------------------------------------------------------------------------------


def test_exclusive_classes_have_top_accuracy(folder, model):
    shown = torch.nn.functional.one_hot(torch.arange(NUM) % 6, 6).to(torch.uint8)
    source = MultiLabelRecords([folder / f'{index:02}.png' for index in range(NUM)], shown, LABELS)
    found = validate(model, source)
    assert found.activation == 'softmax' and found.thresholds == (0.5,) * 6
    assert found.top1 == pytest.approx(float((found.logits.argmax(1) == torch.arange(NUM) % 6).double().mean()))
    assert found.top1 < found.top5 <= 1
    assert found.calibration_error == pytest.approx(float(calibration_error(found.logits.double().softmax(1), shown)))


def test_a_folders_own_thresholds_and_temperatures_go_by_name(folder, tmp_path):
    model = build_model()
    thresholds, temperatures = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True, model_config=dict(
        label_names=list(LABELS), thresholds=thresholds, temperatures=temperatures))
    found = validate(str(tmp_path), records(folder, ('fox', 'bee'), columns=[5, 1]), common=True)
    assert (found.thresholds, found.temperatures) == ((0.2, 0.6), (1.0, 3.0))
    probs = (found.logits.double() / torch.tensor([1.0, 3.0])).sigmoid()
    assert torch.equal(found.f1.f1, multilabel_f1(probs, found.targets, threshold=[0.2, 0.6]).f1)
    given = validate(str(tmp_path), records(folder), threshold=0.7)
    assert given.thresholds == (0.7,) * 6 and given.temperatures == tuple(temperatures)
    exclusive = validate(str(tmp_path), records(folder), activation='softmax')
    assert exclusive.temperatures is None and exclusive.thresholds == (0.5,) * 6


@pytest.mark.parametrize(('options', 'error', 'words'), [
    (dict(batch_size=0), ValueError, r'^batch_size must be at least 1, got 0\.$'),
    (dict(workers=-1), ValueError, r'^workers must be at least 0, got -1\.$'),
    (dict(threshold=2.0), ValueError, r'^threshold must be in \[0, 1\], got 2\.0\.$'),
    (dict(threshold=[0.5]), ValueError, r'^thresholds must have one number a class, got 1 for 6 classes\.$'),
    (dict(activation='relu'), ValueError, r"^activation must be one of 'sigmoid', 'softmax', got 'relu'\.$"),
    (dict(amp_dtype=torch.float32), ValueError,
     r'^amp_dtype must be torch.bfloat16, torch.float16 or None, got torch.float32\.$'),
    (dict(embeddings=torch.zeros(6, 3)), ValueError,
     r'^embeddings are those of labels, got no labels; give their names too\.$'),
])
def test_wrong_settings(options, error, words, folder, model):
    with pytest.raises(error, match=words):
        validate(model, records(folder), **options)


def test_what_is_no_model_of_timm_is_refused(folder):
    with pytest.raises(TypeError, match=r'^model must be a timm model, got Linear without a pretrained_cfg\.$'):
        validate(nn.Linear(1, 1), records(folder))
    with pytest.raises(PredictionError, match=r"^unknown model 'test_resnett'; did you mean"):
        validate('test_resnett', records(folder))


class Wrong(nn.Module):
    """A model's skin over other scores."""

    def __init__(self, scores) -> None:
        super().__init__()
        inner = build_model()
        self.scores, self.weight = scores, nn.Parameter(torch.zeros(1))
        self.pretrained_cfg, self.num_classes, self.num_features = inner.pretrained_cfg, 6, 1

    def forward(self, images):
        return self.scores(images)


@pytest.mark.parametrize(('scores', 'got'), [
    (lambda images: torch.zeros(len(images), 5), r'\(16, 5\)'), (lambda images: [1], 'list')])
def test_other_scores_than_one_a_class_are_an_error(scores, got, folder):
    words = rf'^the model must give scores of shape \(16, 6\), got {got}; it cannot be measured\.$'
    with pytest.raises(PredictionError, match=words):
        validate(Wrong(scores), records(folder), batch_size=16)


# -- broken pictures -------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path) -> list[Path]:
    (tmp_path / 'empty.png').touch()
    (tmp_path / 'text.jpg').write_text('no picture')
    Image.new('RGB', (1, 500)).save(tmp_path / 'strip.png')
    return [tmp_path / 'empty.png', tmp_path / 'gone.png', tmp_path / 'strip.png', tmp_path / 'text.jpg']


@pytest.mark.parametrize('workers', [0, 2])
def test_broken_pictures_are_named_and_left_out(workers, folder, model, broken):
    source = records(folder, also=broken).select([24, *range(12), 25, 26, *range(12, 24), 27])
    found = validate(model, source, batch_size=5, workers=workers)
    want = validate(model, records(folder), batch_size=5)
    for result, wanted in zip(found.class_results(), want.class_results()):
        assert result.average_precision == pytest.approx(wanted.average_precision)
    assert found.rows.tolist() == [*range(1, 13), *range(15, 27)] and torch.equal(found.targets, targets())
    folder = broken[0].parent
    assert [line.replace(f'{folder}/', '') for line in found.broken] == [
        "cannot read 'empty.png': the file is empty.", "cannot read 'gone.png': no such file or directory.",
        "cannot use 'strip.png': one side of 1 x 500 pixels is more than 200 times the other.",
        "cannot read 'text.jpg': it is not a JPEG, PNG, WebP, GIF, BMP or TIFF picture."]
    assert found.summary()['broken'] == 4 and json.loads(found.to_json())['broken_images'] == list(found.broken)


def test_broken_pictures_of_a_stream_are_left_out(folder, model, broken):
    found = validate(model, Shard(records(folder, also=[broken[0], broken[2], broken[3]])), batch_size=26)
    assert len(found.broken) == 3 and torch.equal(found.targets, targets())


def test_with_strict_the_first_broken_picture_is_an_error(folder, model, broken):
    with pytest.raises(ImageError, match=r"empty\.png': the file is empty\.$"):
        validate(model, records(folder, also=broken), strict=True)


def test_a_stream_that_ends_early_is_an_error(folder, model, broken):
    source = records(folder, also=broken[:1]).select([0, 24, *range(1, 24)])
    words = r'^the data say that they hold 25 pictures and gave 2; it may not go on after a broken picture: cannot read'
    with pytest.raises(ValueError, match=words):
        validate(model, Shard(source, goes_on=False))
    short = Shard(records(folder))
    short.num_images = 20
    with pytest.raises(ValueError, match=r'^the data say that they hold 20 pictures and gave 24\.$'):
        validate(model, short)


class Unplugged(MultiLabelRecords):
    def load_image(self, index: int) -> Image.Image:
        raise OSError('the disk went away')


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('wrap', [lambda records: records, lambda records: Loads(records)], ids=['pictures', 'stream'])
def test_what_no_picture_is_to_blame_for_ends_the_run_in_its_own_words(wrap, workers, folder, model):
    source = Unplugged([folder / '00.png'] * NUM, targets(), LABELS)
    with pytest.raises(OSError, match=r'^the disk went away$'):
        validate(model, wrap(source), workers=workers)


class Loads(Shard):
    def iterate(self, **share):
        return ((self.records.load_image(row), self.records.labels.row(row), '') for row in range(NUM))


def test_pictures_with_scores_that_are_not_finite_are_left_out(folder):
    def scores(images):
        found = images.mean(dim=(1, 2, 3))[:, None].repeat(1, 6)
        found[0, 3] = math.inf
        return found

    found = validate(Wrong(scores), records(folder), batch_size=12)
    assert found.rows.tolist() == [*range(1, 12), *range(13, 24)]
    assert found.broken[0] == f"cannot use '{folder / '00.png'}': the model gives scores that are not finite."
    with pytest.raises(PredictionError, match=r"^no picture could be used: cannot use '.*00\.png': the model gives"):
        validate(Wrong(lambda images: torch.full((len(images), 6), math.nan)), records(folder))


def test_no_pictures_are_an_error(folder, model):
    with pytest.raises(PredictionError, match=r'^no picture could be used; the data hold none\.$'):
        validate(model, records(folder).select([]))


# -- as files --------------------------------------------------------------------------------------------------


def test_results_as_json_and_csv_say_the_same(folder, model):
    never = MultiLabelRecords(
        [folder / f'{index:02}.png' for index in range(NUM)],
        torch.cat([targets()[:, :5], torch.zeros(NUM, 1, dtype=torch.int8)], dim=1), LABELS)
    found = validate(model, never, activation='sigmoid')
    content = json.loads(found.to_json({'model': 'a "name"'}))
    assert content['model'] == 'a "name"' and content['mAP'] == found.average_precision.mean
    assert content['classes'][5]['average_precision'] is None
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row['label'] for row in rows] == list(LABELS) and rows[5]['average_precision'] == ''
    for row, wanted in zip(rows, content['classes']):
        assert {name: '' if value is None else str(value) for name, value in wanted.items()} == row
