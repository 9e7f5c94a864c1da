"""The recipe's tables data and partial: which pictures serve what, by which labels, and what of them is known."""
import pytest
import torch
from PIL import Image

from timm_miil.data import read_shards, write_shards
from timm_miil.train import Splits, evaluate, read_splits, train
from timm_miil.train.recipe import DataSettings, PartialSettings
from timm_miil.train.splits import forget_labels, prepare_splits

COUNT = 40


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """A data set of one split, train: picture i shows ant, bee or cat by turns, and every fourth a dog."""
    folder = tmp_path_factory.mktemp('alone')
    rows = ['image,labels']
    for number in range(COUNT):
        Image.new('RGB', (8, 8), (number, 0, 0)).save(folder / f'{number:02}.png')
        labels = [('ant', 'bee', 'cat')[number % 3]] + ['dog'] * (number % 4 == 0)
        rows.append(f'{number:02}.png,{";".join(labels)}')
    (folder / 'train.csv').write_text('\n'.join(rows) + '\n')
    return folder


@pytest.fixture
def trio(tmp_path):
    """Three splits as folders of labels; val has other labels first, test lacks one."""
    for name in ('train/ant', 'train/bee', 'train/cat', 'val/cat', 'val/ant', 'test/bee'):
        (tmp_path / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / name / 'a.png')
    return tmp_path


def names(images):
    return [path.name for path in images.image_paths]


def rows(images):
    return dict(zip(names(images), images.targets.tolist(), strict=True))


# ---- where nothing validates


@pytest.mark.parametrize(('fraction', 'count'), [(0.25, 10), (0.1, 4), (0.51, 20), (0.97, 39)])
def test_a_part_of_the_training_pictures_validates(alone, fraction, count):
    splits = read_splits(alone, DataSettings(val_fraction=fraction), seed=3)
    train, val = names(splits.train), names(splits.val)
    assert len(val) == count and splits.test is None
    assert sorted(train + val) == [f'{number:02}.png' for number in range(COUNT)], 'none twice and none lost'
    assert train == sorted(train) and val == sorted(val), 'in the order they had'
    for images in (splits.train, splits.val):
        assert images.label_names == ('ant', 'bee', 'cat', 'dog')
        for name, row in rows(images).items():
            number = int(name[:2])
            assert row == [number % 3 == 0, number % 3 == 1, number % 3 == 2, number % 4 == 0]


def test_which_pictures_validate_follows_from_the_seed(alone):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    drawn = [tuple(names(read_splits(alone, seed=seed).val)) for seed in (3, 3, 4, 5)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_a_recipes_seed_draws_them(alone, tiny_recipe):
    for seed in (3, 4):
        splits = prepare_splits(tiny_recipe.override({'seed': str(seed)}), alone)
        assert names(splits.val) == names(read_splits(alone, seed=seed).val)


@pytest.mark.parametrize('fraction', [0.01, 0.99])
def test_something_must_be_left_on_either_side(alone, fraction):
    with pytest.raises(ValueError, match=(
            f'data.val_fraction must leave pictures to learn from and to validate, got {fraction} of 40 pictures')):
        read_splits(alone, DataSettings(val_fraction=fraction))


def test_a_split_that_validates_is_taken_whatever_the_fraction(trio):
    splits = read_splits(trio, DataSettings(val_fraction=0.5))
    assert [len(images) for images in (splits.train, splits.val, splits.test)] == [3, 2, 1]


def test_a_split_to_validate_that_is_named_must_be_there(alone):
    with pytest.raises(FileNotFoundError, match='vall'):
        read_splits(alone, DataSettings(val='vall'))


def test_a_stream_is_not_parted(alone, tmp_path):
    write_shards(read_splits(alone).train, tmp_path, split='train', images_per_shard=9, workers=0)
    with pytest.raises(ValueError, match="data.val = 'val' is no split, and ShardStream is a stream, whose pict"):
        read_splits(tmp_path)


def test_a_data_set_of_one_split_trains(alone, tiny_recipe, tmp_path):
    recipe = tiny_recipe.override({'epochs': '1', 'data.val_fraction': '0.25'})
    result = train(recipe, alone)
    assert len(result.val_targets) == 10 and result.test_metrics == {} and result.test_map is None
    assert torch.equal(result.val_targets, read_splits(alone, recipe.data, seed=3).val.targets)
    assert result.val_map == pytest.approx(evaluate(result.model, result.splits.val)['map'], abs=1e-6)


# ---- by name


def test_splits_are_found_by_the_names_given_and_have_the_training_pictures_labels(trio):
    splits = read_splits(trio, DataSettings(val='test', test='val'))
    assert splits.label_names == splits.val.label_names == splits.test.label_names == ('ant', 'bee', 'cat')
    assert splits.val.targets.tolist() == [[0, 1, 0]] and splits.test.targets.tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize('is_inside', [True, False], ids=['in the data', 'elsewhere'])
def test_a_label_file_gives_the_labels_and_their_order(trio, tiny_recipe, tmp_path_factory, is_inside):
    file = (trio if is_inside else tmp_path_factory.mktemp('labels')) / 'labels.txt'
    file.write_text('cat\nowl\nant\nbee\n')
    recipe = tiny_recipe.override({'data.labels': 'labels.txt' if is_inside else str(file)})
    splits = prepare_splits(recipe, trio)
    for images in (splits.train, splits.val, splits.test):
        assert images.label_names == ('cat', 'owl', 'ant', 'bee')
    assert splits.train.targets.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
    assert splits.val.targets.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


def test_labels_of_the_data_that_the_file_lacks(alone):
    (alone / 'few.txt').write_text('dog\nant\n')
    with pytest.raises(ValueError, match='has labels that are not among the 2 given ones'):
        read_splits(alone, DataSettings(labels='few.txt'))
    splits = read_splits(alone, DataSettings(labels='few.txt', args={'ignore_unknown_labels': True}))
    for images in (splits.train, splits.val):
        assert images.label_names == ('dog', 'ant')
        assert all(row == [int(name[:2]) % 4 == 0, int(name[:2]) % 3 == 0] for name, row in rows(images).items())


def test_a_set_of_the_catalogue_gives_the_labels(alone):
    settings = DataSettings(labels='coco_80', args={'ignore_unknown_labels': True})
    splits = read_splits(alone, settings)
    assert len(splits.label_names) == 80
    assert splits.train.labels.counts()[0].nonzero().squeeze(1).tolist() == [
        splits.label_names.index('cat'), splits.label_names.index('dog')]


def test_labels_that_are_nowhere(alone):
    with pytest.raises(FileNotFoundError, match="labels must be a label set of the catalogue, .* got 'coco_8'"):
        read_splits(alone, DataSettings(labels='coco_8'))


def test_arguments_reach_the_reader(alone):
    settings = DataSettings(format='csv', args={'unlisted': -1})
    assert set(read_splits(alone, settings).train.targets.unique().tolist()) == {-1, 1}
    with pytest.raises(ValueError, match="unknown option 'unlistd' of format csv; did you mean 'unlisted'"):
        read_splits(alone, DataSettings(format='csv', args={'unlistd': -1}))


def test_a_split_that_validates_and_tests_is_read_once(trio, caplog):
    splits = read_splits(trio, DataSettings(val='test', test='test'))
    assert splits.test is None and len(splits.val) == 1, 'what the epoch is chosen by tests nothing'
    assert caplog.text.count('of 3 labels are never present') == 1
    assert read_splits(trio, DataSettings(val='test')).test is None


def test_pictures_that_are_learnt_from_and_measured_on_are_told(alone, trio, caplog, tmp_path_factory):
    read_splits(trio)
    assert 'learnt from too' not in caplog.text
    folder = tmp_path_factory.mktemp('twice')
    for name in ('a.png', 'b.png', 'c.png'):
        Image.new('RGB', (8, 8)).save(folder / name)
    (folder / 'train.csv').write_text('image,labels\na.png,cat\nb.png,dog\n')
    (folder / 'val.csv').write_text('image,labels\nb.png,dog\nc.png,cat\n')
    read_splits(folder)
    assert f"1 of the 2 pictures of val are learnt from too, such as '{folder / 'b.png'}'" in caplog.text


def test_labels_of_train_and_val_must_be_equal(trio, tiny_recipe):
    splits = read_splits(trio)
    swapped = splits.val.with_labels(['bee', 'ant', 'cat'])
    with pytest.raises(ValueError, match='must be equal, in the same order, got 3 and 3, in another order'):
        prepare_splits(tiny_recipe, Splits(splits.train, swapped))
    with pytest.raises(ValueError, match="got 3 and 2, such as 'bee', which only one has"):
        prepare_splits(tiny_recipe, Splits(splits.train, splits.val.with_labels(['ant', 'cat'])))


# ---- partial labels


RPS = '{scheme = "random_per_sample", drop_prob = 0.3}'
FPC = '{scheme = "fixed_per_class", num_per_class = 3}'
POSITIVES = '{scheme = "positives_only", drop_prob = 0.5}'


@pytest.fixture(scope='module')
def known(tiny_scenes):
    return read_splits(tiny_scenes)


def partial(recipe, known, table, seed=3):
    return prepare_splits(recipe.override({'partial': table, 'seed': str(seed)}), known)


@pytest.mark.parametrize('table', [RPS, FPC, POSITIVES], ids=['rps', 'fpc', 'positives'])
def test_what_is_forgotten_follows_from_the_seed_and_is_of_training_pictures(tiny_recipe, known, table):
    splits, again, other = (partial(tiny_recipe, known, table, seed) for seed in (3, 3, 4))
    assert torch.equal(again.train.targets, splits.train.targets)
    assert not torch.equal(other.train.targets, splits.train.targets)
    kept = splits.train.targets != -1
    assert torch.equal(splits.train.targets[kept], known.train.targets[kept]), 'what is known is as it was'
    assert splits.val is known.val and splits.test is known.test
    assert (known.train.targets != -1).all() and splits.train.image_paths == known.train.image_paths


def test_rps_forgets_its_share(tiny_recipe, known):
    targets = partial(tiny_recipe, known, RPS).train.targets
    # 1,440 labels: four standard deviations of the binomial are 0.048.
    assert float((targets == -1).double().mean()) == pytest.approx(0.3, abs=0.048)
    present = known.train.targets == 1
    # 200 or so present ones: 0.13.
    assert float((targets[present] == -1).double().mean()) == pytest.approx(0.3, abs=0.13)


def test_fpc_keeps_as_many_present_and_absent_labels_of_each_class(tiny_recipe, known):
    targets = partial(tiny_recipe, known, FPC).train.targets
    want = (known.train.targets == 1).sum(0).clamp(max=3)
    assert want.min() < 3 or (want == 3).all()
    assert torch.equal((targets == 1).sum(0), want) and torch.equal((targets == 0).sum(0), want)
    many = partial(tiny_recipe, known, '{scheme = "fixed_per_class", num_per_class = 1000}').train.targets
    present = (known.train.targets == 1).sum(0)
    assert torch.equal((many == 1).sum(0), present)
    assert torch.equal((many == 0).sum(0), torch.minimum(present, len(many) - present))


def test_of_positives_only_nothing_absent_is_left(tiny_recipe, known):
    targets = partial(tiny_recipe, known, POSITIVES).train.targets
    present = known.train.targets == 1
    assert targets.unique().tolist() == [-1, 1] and 0.3 < float((targets[present] == 1).double().mean()) < 0.7


def test_nothing_or_all_can_be_forgotten(known):
    for share, count in ((0.0, 0), (1.0, known.train.targets.numel())):
        found = forget_labels(known.train, PartialSettings('random_per_sample', drop_prob=share), seed=0)
        assert int((found.targets == -1).sum()) == count


def test_pictures_that_were_parted_off_stay_fully_labelled(alone, tiny_recipe):
    recipe = tiny_recipe.override({'partial': RPS, 'data.val_fraction': '0.25'})
    splits = prepare_splits(recipe, alone)
    assert (splits.train.targets == -1).any()
    plain = read_splits(alone, recipe.data, seed=3)
    assert names(splits.val) == names(plain.val) and torch.equal(splits.val.targets, plain.val.targets)


def test_what_is_learnt_from_is_what_is_left(tiny_recipe, known):
    changes = {'partial': RPS, 'epochs': '1', 'loss.name': 'class_aware_selective', 'loss.args': '{mode = "ignore"}'}
    result = train(tiny_recipe.override(changes), known)
    assert torch.equal(result.splits.train.targets, partial(tiny_recipe, known, RPS).train.targets)
    assert torch.equal(result.val_targets, known.val.targets)
    other = train(tiny_recipe.override({**changes, 'partial': FPC}), known)
    assert other.epochs[0].train_loss != result.epochs[0].train_loss


def test_a_stream_forgets_nothing(alone, tiny_recipe, tmp_path):
    splits = read_splits(alone)
    for split in ('train', 'val'):
        write_shards(getattr(splits, split), tmp_path, split=split, images_per_shard=9, workers=0)
    streams = Splits(read_shards(tmp_path, 'train'), read_shards(tmp_path, 'val'))
    with pytest.raises(ValueError, match='partial is given, and ShardStream is a stream, whose pictures cannot'):
        prepare_splits(tiny_recipe.override({'partial': RPS}), streams)
