"""Answers on disk: the very same for the very same pixels, within their bytes, whoever writes and whatever breaks."""
import json
import logging
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from timm_miil.losses import distillation_loss, multilabel_distillation_loss
from timm_miil.tasks import Teacher, TeacherCache
from timm_miil.tasks._answer_files import AnswerFiles
from timm_miil.tasks._key_index import KeyIndex
from timm_miil.tasks._picture_keys import PictureKeys
from timm_miil.tasks.teacher_cache import VAIN_BATCHES

CLASSES = 12


def pictures(size=4, seed=0):
    return torch.randn(size, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


class Asked:
    """A teacher that counts; its logits are of the pixels."""

    def __init__(self):
        self.count = 0
        self.weight = 5 * torch.randn(48, CLASSES, generator=torch.Generator().manual_seed(9))

    def __call__(self, images):
        self.count += len(images)
        return images.flatten(1) @ self.weight / 7


def build(folder, **settings):
    return TeacherCache(
        folder, **{'num_classes': CLASSES, 'topk': 3, 'max_bytes': 10**6, 'teacher': 'of the tests', **settings})


def parts(folder):
    return sorted(Path(folder).glob('part-*.safetensors'))


# ---- what is found


def test_answers_are_found_again(tmp_path):
    ask, cache = Asked(), build(tmp_path)
    first = cache.answer(pictures(), ask)
    assert torch.equal(cache.answer(pictures(), ask), first)  # from memory
    cache.flush()
    assert torch.equal(cache.answer(pictures(), ask), first)
    other = build(tmp_path)
    assert torch.equal(other.answer(pictures().flip(0), ask), first.flip(0)) and first.dtype == torch.float32
    assert ask.count == 4 and len(other) == 4
    assert (cache.num_asked, cache.num_found, other.num_found) == (4, 8, 4)


def test_one_new_picture_asks_for_the_batch_and_is_kept(tmp_path):
    ask, cache = Asked(), build(tmp_path)
    cache.answer(pictures(), ask)
    mixed = torch.cat([pictures(3), pictures(1, seed=1)])
    cache.answer(mixed, ask)
    assert ask.count == 8 and len(cache) == 5
    cache.answer(pictures(1, seed=1), ask)
    assert ask.count == 8


def test_a_picture_twice_in_a_batch_is_kept_once(tmp_path):
    cache = build(tmp_path)
    cache.answer(pictures(2).repeat(3, 1, 1, 1), Asked())
    assert len(cache) == 2


def test_what_another_wrote_meanwhile_is_kept_once(tmp_path):
    ask, caches = Asked(), [build(tmp_path), build(tmp_path)]
    for cache in caches:
        cache.answer(pictures(), ask)
    for cache in caches:
        cache.flush()
    assert len(parts(tmp_path)) == 1 and ask.count == 8
    for cache in [*caches, build(tmp_path)]:
        cache.answer(pictures(), ask)
        assert len(cache) == 4 and ask.count == 8


@pytest.mark.parametrize('is_same', [True, False])
def test_a_folder_that_helps_nothing_is_told_of_once(tmp_path, caplog, is_same):
    first = build(tmp_path)
    first.answer(pictures(), Asked())
    first.flush()
    with caplog.at_level(logging.WARNING):
        cache = build(tmp_path)
        if is_same:
            cache.answer(pictures(), Asked())
        for count in range(2 * VAIN_BATCHES):
            cache.answer(pictures() + count + 1, Asked())
    assert caplog.text.count('has 4 answers, and none is of the pictures that came') == (not is_same)


def test_an_empty_batch_is_one(tmp_path):
    assert build(tmp_path).answer(pictures(0), Asked()).shape == (0, CLASSES)


def test_the_largest_keep_their_probabilities(tmp_path):
    logits = Asked()(pictures())
    best, places = logits.topk(3)
    half = best.half().float()
    for tail, probability in (('softmax', lambda x: x.softmax(1)), ('sigmoid', torch.sigmoid)):
        restored = build(tmp_path, tail=tail).answer(pictures(), Asked())
        assert torch.equal(restored.gather(1, places), half)
        others = torch.ones_like(logits, dtype=torch.bool).scatter(1, places, False)
        assert torch.equal(restored.argsort(1, descending=True)[:, :3], places)
        want, got = probability(logits), probability(restored)
        # float16 has 11 bits: logits of up to 16 are off by 0.004.
        torch.testing.assert_close(got.gather(1, places), want.gather(1, places), rtol=0.01, atol=1e-6)
        torch.testing.assert_close((got * others).sum(1), (want * others).sum(1), rtol=0.01, atol=1e-6)
        assert all(row[mask].unique().numel() == 1 for row, mask in zip(restored, others))


def test_all_logits_restore_the_loss(tmp_path):
    logits, student = Asked()(pictures()), Asked()(pictures(seed=1))
    restored = build(tmp_path, topk=CLASSES).answer(pictures(), Asked())
    torch.testing.assert_close(restored, logits, rtol=2**-11, atol=1e-6)
    for loss in (distillation_loss, multilabel_distillation_loss):
        torch.testing.assert_close(loss(student, restored), loss(student, logits), rtol=0.01, atol=1e-4)


def test_many_classes_have_places_too(tmp_path):
    logits = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(0))
    logits[:, 39_999] = 9.0
    cache = build(tmp_path, num_classes=40_000)
    restored = cache.answer(pictures(2), lambda images: logits)
    assert torch.equal(restored.argmax(1), torch.tensor([39_999, 39_999]))
    torch.testing.assert_close(restored.logsumexp(1), logits.logsumexp(1), rtol=1e-4, atol=1e-4)


def test_numbers_that_float16_or_a_disk_should_not_have(tmp_path):
    cache, logits = build(tmp_path), torch.zeros(2, CLASSES)
    logits[0, 0], logits[1, 1] = 1e6, torch.nan
    restored = cache.answer(pictures(2), lambda images: logits)
    assert restored[0].isfinite().all() and restored[0, 0] == 65504
    assert restored[1].isnan().any() and len(cache) == 1


def test_a_teacher_asks_it_before_it_computes(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES))
    calls = []
    settings = {'mean': (0.5,) * 3, 'std': (0.5,) * 3}
    teacher = Teacher(model, **settings)
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    want = teacher(pictures())
    teacher.cache = build(tmp_path, topk=CLASSES, teacher=teacher.fingerprint())
    torch.testing.assert_close(teacher(pictures()), want, rtol=2**-11, atol=1e-6)
    assert torch.equal(teacher(pictures()), teacher(pictures()))
    assert len(calls) == 2


# ---- keys


def by_equation(picture):
    """The two hashes in whole numbers of any length, word by word."""
    mask, state = 2**64 - 1, 0

    def draw():
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) & mask
        word = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        return word ^ (word >> 31)

    values = np.asarray(picture, dtype=np.float32)
    words = [*values.shape, *struct.unpack(f'<{values.size}i', values.astype('<f4').tobytes())]
    sums = [0, 0]
    for word in words:
        sums = [total + draw() * word for total in sums]
    return [(total & mask) - ((total & mask) >> 63 << 64) for total in sums]


def test_keys_are_the_documented_hashes():
    batch = torch.cat([pictures(3), torch.zeros(1, 3, 4, 4), -pictures(1)])
    assert PictureKeys()(batch).tolist() == [by_equation(picture) for picture in batch]


def test_one_bit_is_another_picture():
    picture, keys = pictures(1), PictureKeys()
    bits = picture.view(torch.int32).repeat(48 * 32, 1, 1, 1).flatten(1)
    place = torch.arange(48 * 32)
    bits[place, place // 32] ^= (1 << (place % 32)).to(torch.int32)
    others = keys(bits.view(torch.float32).view(-1, 3, 4, 4))
    both = torch.cat([others, keys(picture)])
    for column in both.unbind(1):
        assert len(column.unique()) == 48 * 32 + 1


def test_keys_are_of_shape_and_values_and_not_of_memory():
    picture, keys = pictures(2), PictureKeys()
    want = keys(picture)
    assert torch.equal(keys(picture.to(memory_format=torch.channels_last)), want)
    assert torch.equal(keys(picture.repeat(2, 1, 1, 1)[::2].roll(1, 0)), want[[0, 0]])
    assert not torch.isin(keys(picture.view(2, 3, 2, 8)), want).any()
    assert torch.equal(keys(picture.half()), keys(picture.half().float()))
    assert not torch.isin(keys(picture.double()), want).any()


def test_the_index_finds_what_a_table_would():
    random = np.random.default_rng(0)
    index, table = KeyIndex(), {}
    for part in range(40):
        keys = random.integers(-2**63, 2**63 - 1, size=random.integers(0, 30))
        index.add(keys, part, first_row=part)
        table |= {key: (part, part + row) for row, key in enumerate(keys.tolist())}
    index.drop(7)
    table = {key: place for key, place in table.items() if place[0] != 7}
    asked = np.array([*table, *range(50)])
    found = zip(*(column.tolist() for column in index.find(asked)))
    assert [place if place[0] >= 0 else None for place in found] == [table.get(key) for key in asked.tolist()]
    assert len(index) == len(table)


# ---- bytes


def test_the_parts_keep_within_their_bytes(tmp_path, caplog):
    ask, cache = Asked(), build(tmp_path, max_bytes=20_000)
    with caplog.at_level('INFO'):
        for seed in range(12):
            cache.answer(pictures(100, seed), ask)
    size = sum(part.stat().st_size for part in parts(tmp_path))
    assert 15_000 < size <= 20_000
    assert [record.message for record in caplog.records] == [
        f'{tmp_path} is full, with {len(cache)} answers in {size} of 20000 bytes: no more are added.']
    count = len(cache)
    assert 400 < count < 1200  # of 36 bytes each
    again = build(tmp_path, max_bytes=20_000)
    assert len(again) == count
    ask.count = 0
    again.answer(pictures(100, 0), ask)
    again.answer(pictures(100, 11), ask)
    assert ask.count == 100  # the last was not kept, and is not now
    again.flush()
    assert sum(part.stat().st_size for part in parts(tmp_path)) == size


def test_a_bound_below_one_answer_keeps_none(tmp_path):
    ask, cache = Asked(), build(tmp_path, max_bytes=1)
    cache.answer(pictures(), ask)
    cache.answer(pictures(), ask)
    cache.flush()
    assert ask.count == 8 and not parts(tmp_path) and len(cache) == 0


def test_full_parts_are_written_while_it_runs(tmp_path):
    settings, layout = {'teacher': 'x'}, {'value': ((), torch.float32)}
    files = AnswerFiles(tmp_path, settings, layout, max_bytes=10**6)
    files.part_rows = 10
    keys = torch.arange(50).view(25, 2)
    files.add({'keys': keys, 'value': torch.arange(25.0)})
    assert len(parts(tmp_path)) == 2 and len(files.index) == 25
    assert files.read(keys.flip(0))['value'].tolist() == list(range(24, -1, -1))
    files.close()
    again = AnswerFiles(tmp_path, settings, layout, max_bytes=10**6)
    assert len(parts(tmp_path)) == 3 and torch.equal(again.read(keys)['value'], torch.arange(25.0))


# ---- what breaks


def test_a_part_that_was_cut_is_left_out(tmp_path, caplog):
    ask, cache = Asked(), build(tmp_path)
    for seed in (0, 1):
        cache.answer(pictures(seed=seed), ask)
        cache.flush()
    broken = parts(tmp_path)[0]
    os.truncate(broken, broken.stat().st_size - 5)
    cache = build(tmp_path)
    assert [record.levelname for record in caplog.records] == ['WARNING']
    assert f'{broken} is damaged and left out, it can be deleted: ' in caplog.text
    assert len(cache) == 4


@pytest.mark.parametrize('content', [b'', b'{}', b'\xff' * 100])
def test_a_file_that_is_no_part_is_left_out(content, tmp_path, caplog):
    (tmp_path / 'part-0.safetensors').write_bytes(content)
    cache = build(tmp_path)
    assert 'part-0.safetensors is damaged and left out' in caplog.text
    cache.answer(pictures(), Asked())
    assert len(cache) == 4


def test_bytes_that_changed_are_found_when_they_are_read(tmp_path, caplog):
    ask, cache = Asked(), build(tmp_path)
    first = cache.answer(pictures(), ask)
    cache.flush()
    [part] = parts(tmp_path)
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content)
    cache = build(tmp_path)
    assert torch.equal(cache.answer(pictures(), ask), first) and ask.count == 8
    assert f'{part} is damaged and left out, it can be deleted: its bytes are others.' in caplog.text
    assert torch.equal(cache.answer(pictures(), ask), first) and ask.count == 8  # it was kept anew


def test_a_part_of_another_teacher_is_left_out(tmp_path, caplog):
    other = build(tmp_path / 'other', teacher='another')
    other.answer(pictures(), Asked())
    other.flush()
    [part] = parts(tmp_path / 'other')
    (tmp_path / 'own').mkdir()
    part.rename(tmp_path / 'own' / part.name)
    assert len(build(tmp_path / 'own')) == 0
    assert 'it is of another teacher or setting.' in caplog.text


@pytest.mark.parametrize('settings, message', [
    ({'teacher': 'another'}, "teacher 'of the tests' there and 'another' here"),
    ({'topk': 4}, 'topk 3 there and 4 here'),
    ({'num_classes': 13}, 'num_classes 12 there and 13 here')])
def test_a_folder_of_other_answers_is_refused(settings, message, tmp_path):
    build(tmp_path)
    with pytest.raises(ValueError) as caught:
        build(tmp_path, **settings)
    assert str(caught.value) == (
        f'{tmp_path} has answers of another teacher or of other settings: {message}; take another folder, or delete '
        f'this one.')


@pytest.mark.parametrize('content', ['', '[]', '{"teacher"'])
def test_a_folder_of_something_else_is_refused(content, tmp_path):
    (tmp_path / 'teacher.json').write_text(content)
    with pytest.raises(ValueError, match='teacher.json cannot be read; take another folder'):
        build(tmp_path)


def test_what_a_killed_process_left_is_removed(tmp_path):
    leftover = tmp_path / '.part-1.safetensors-abc'
    leftover.write_bytes(b'half')
    build(tmp_path)
    assert not leftover.exists()


def test_a_folder_that_is_gone_holds_up_nobody(tmp_path, caplog):
    files = AnswerFiles(tmp_path / 'own', {}, {'value': ((), torch.float32)}, max_bytes=10**6)
    files.add({'keys': torch.zeros(1, 2, dtype=torch.int64), 'value': torch.zeros(1)})
    for name in ('teacher.json', 'lock'):
        (tmp_path / 'own' / name).unlink()
    (tmp_path / 'own').rmdir()
    (tmp_path / 'own').write_text('a file')
    files.close()
    assert 'the last answers could not be written' in caplog.text


@pytest.mark.parametrize('settings, error, message', [
    ({'topk': 13}, ValueError, r'topk must be at most num_classes, got 13 of 12'),
    ({'topk': 0}, ValueError, r'topk must be at least 1, got 0'),
    ({'max_bytes': 1.5}, TypeError, r'max_bytes must be an int, got float 1.5'),
    ({'teacher': None}, TypeError, r'teacher must be a string, got NoneType'),
    ({'tail': 'none'}, ValueError, r"tail must be one of 'softmax', 'sigmoid', got 'none'")])
def test_wrong_settings_are_refused(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        build(tmp_path, **settings)


def test_logits_of_another_number_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'must give 12 logits a picture, got shape \(4, 3\) for 4; open the cache'):
        build(tmp_path).answer(pictures(), lambda images: torch.zeros(4, 3))


# ---- several processes


def in_process(rank, folder):
    """Answers to own and common pictures, in small parts; what waits is written at the end of the program."""
    cache, ask = build(folder, max_bytes=30_000), Asked()
    cache._files.part_rows = 50
    for seed in (rank, 7, rank + 100, 8):
        cache.answer(pictures(60, seed), ask)
    return ask.count


def test_several_processes_write_to_one_folder(tmp_path):
    with subprocess.Popen(
            [sys.executable, __file__, '1', str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True) as process:
        assert process.stdout.readline() == 'ready\n'
        process.stdin.write('go\n')
        process.stdin.flush()
        counts = [in_process(0, tmp_path)]
        counts.append(json.loads(process.communicate(timeout=120)[0]))
    assert process.returncode == 0
    assert all(120 <= count <= 240 for count in counts)
    assert sum(part.stat().st_size for part in parts(tmp_path)) <= 30_000
    cache, ask = build(tmp_path, max_bytes=30_000), Asked()
    assert len(cache) == 360  # common ones were kept once
    for seed in (0, 1, 7, 8, 100, 101):
        answer, fresh = cache.answer(pictures(60, seed), ask), Asked()(pictures(60, seed))
        assert torch.equal(answer.argmax(1), fresh.argmax(1))
    assert ask.count == 0


@pytest.mark.gpu
def test_keys_and_answers_of_an_accelerator_are_the_same(tmp_path):
    images, ask, cache = pictures(64), Asked(), build(tmp_path)
    ask.weight = ask.weight.cuda()
    assert torch.equal(PictureKeys()(images.cuda()).cpu(), PictureKeys()(images))
    first = cache.answer(images.cuda(), ask)
    assert first.is_cuda and torch.equal(cache.answer(images.cuda(), ask), first)
    assert torch.equal(cache.answer(images, ask), first.cpu()) and ask.count == 64


if __name__ == '__main__':
    warnings.simplefilter('error')
    print('ready', flush=True)
    sys.stdin.readline()
    print(json.dumps(in_process(int(sys.argv[1]), sys.argv[2])))
