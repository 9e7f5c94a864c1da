"""`timm-miil predict` on real files: a folder of good, odd and broken pictures, and every way to use it wrongly."""
import csv
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_miil
from timm_miil.cli.main import main

LABELS = ('ant', 'bee, "queen"', 'cat', 'dog', 'elk')
COMMAND = [sys.executable, '-m', 'timm_miil.cli.main', 'predict']
ENVIRONMENT = os.environ | {
    'PYTHONPATH': str(Path(timm_miil.__file__).parents[1]), 'OMP_NUM_THREADS': '1', 'PYTHONUTF8': '1',
    'PYTHONUNBUFFERED': ''}
ORIENTATION = 0x0112
NO_PICTURE = 'it is not a JPEG, PNG, WebP, GIF, BMP or TIFF picture'


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('model')
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=len(LABELS))
    nn.init.normal_(model.fc.weight)
    timm.models.save_for_hf(
        model, folder, safe_serialization=True,
        model_config=dict(label_names=list(LABELS), problem_type='multi_label_classification'))
    return folder


@pytest.fixture
def picture(tmp_path) -> Path:
    save_scene(tmp_path / 'in' / 'a.png', 0)
    return tmp_path / 'in' / 'a.png'


@pytest.fixture
def many(picture) -> Path:
    for index in range(300):
        (picture.parent / f'{index}.png').symlink_to(picture)
    return picture.parent


def scene(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((48, 36))


def save_scene(path: Path, seed: int, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scene(seed).save(path, **options)


# -- a pictures pictures ---------------------------------------------------------------------------------------


def save_twins(folder: Path) -> None:
    """One grey picture in every odd encoding; all must be tagged as 'plain.png' is."""
    folder.mkdir()
    grey = scene(7).convert('L')
    rgb = grey.convert('RGB')
    rgb.save(folder / 'plain.png')
    grey.save(folder / 'grey.png')
    grey.convert('LA').save(folder / 'grey alpha.png')
    grey.convert('P').save(folder / 'palette.png')
    grey.convert('P').save(folder / 'palette.gif')
    rgb.convert('RGBA').save(folder / 'opaque.png')
    rgb.convert('RGBA').save(folder / 'opaque.webp', lossless=True)
    rgb.save(folder / 'plain.bmp')
    rgb.save(folder / 'really.png.JPG', format='PNG')
    wide = np.asarray(grey).astype(np.uint16) * 257
    Image.fromarray(wide).save(folder / '16 bit.png')
    Image.fromarray(wide).save(folder / '16 bit.tif')
    Image.fromarray(wide.astype(np.int32)).save(folder / '32 bit.tif')
    Image.fromarray((wide / 65535).astype(np.float32)).save(folder / 'float.tiff')
    for orientation, turn in ((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90),
                              (8, Image.Transpose.ROTATE_270), (2, Image.Transpose.FLIP_LEFT_RIGHT)):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        rgb.transpose(turn).save(folder / f'turned {orientation}.png', exif=exif)
    frames = [rgb, Image.new('RGB', rgb.size, 'red')]
    frames[0].save(folder / 'moving.webp', save_all=True, append_images=frames[1:], lossless=True)
    rgb.convert('CMYK').save(folder / 'cmyk.jpg', quality=100)
    rgb.save(folder / 'camera.JPEG', quality=100)


def save_broken(folder: Path) -> dict[str, str]:
    """Files that are no pictures, in a folder of their own: name -> words of the reason."""
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    reasons = {}
    for suffix, words in (('.jpg', 'truncated'), ('.png', 'truncated'), ('.webp', 'damaged'), ('.bmp', 'truncated'),
                          ('.gif', 'truncated'), ('.tif', 'truncated')):
        path = folder / f'cut{suffix}'
        noise.save(path)
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
        reasons[path.name] = words
    for name, content, words in (
            ('empty.jpg', b'', 'the file is empty'), ('text.jpg', b'hello\n', NO_PICTURE),
            ('page.jpg', b'%!PS-Adobe-3.0 EPSF-3.0\n', NO_PICTURE), ('head.png', b'\x89PNG\r\n\x1a\n', NO_PICTURE)):
        (folder / name).write_bytes(content)
        reasons[name] = words
    bomb = Image.new('1', (20_000, 20_000))  # 400 million pixels in 50 kB
    bomb.save(folder / 'bomb.png')
    reasons['bomb.png'] = 'decompression bomb'
    Image.new('1', (10_000, 10_000)).save(folder / 'large.png')  # Pillow only warns of it
    reasons['large.png'] = 'it has 10000 x 10000 pixels'
    Image.new('L', (9_000, 10)).save(folder / 'strip.png')
    reasons['strip.png'] = 'one side of 9000 x 10 pixels'
    (folder / 'lost.png').symlink_to('nowhere.png')
    reasons['lost.png'] = 'no such file or directory'
    os.mkfifo(folder / 'pipe.png')
    reasons['pipe.png'] = 'it is not a regular file'
    if os.geteuid() != 0:  # root reads everything
        (folder / 'closed.png').touch(mode=0)
        reasons['closed.png'] = 'permission denied'
    return reasons


NUM_FILES = 240


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder of NUM_FILES files, and the reasons of the broken ones by relative path."""
    root = tmp_path_factory.mktemp('pictures') / 'pictures'
    root.mkdir()
    save_twins(root / 'twins')
    reasons = {f'broken/{name}': words for name, words in save_broken(root / 'broken').items()}
    places = ['', 'deep/er/still', 'with space', 'ünïcødé 图片', 'twins']
    suffixes = ['.png', '.jpg', '.JPG', '.webp', '.Gif', '.bmp', '.tiff']
    for index in range(NUM_FILES - len(list((root / 'twins').iterdir())) - len(reasons)):
        save_scene(root / places[index % 5] / f'{index:03} x{suffixes[index % 7]}', index)
    (root / 'notes.txt').write_text('not a picture, and not called one')
    (root / 'deep' / 'back').symlink_to(root)
    return root, reasons


def expected_order(root: Path) -> list[str]:
    found = []
    for folder, folders, files in os.walk(root):  # os.walk goes down after the files, in the order left in `folders`
        folders.sort()
        found += [os.path.join(folder, name) for name in sorted(files) if name != 'notes.txt']
    return found


@pytest.fixture(scope='module')
def as_json(pictures, model_dir) -> subprocess.CompletedProcess[str]:
    root, _ = pictures
    return subprocess.run(
        [*COMMAND, root, '--model', model_dir, '--threshold', '0', '--format', 'json'], env=ENVIRONMENT,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)


def test_all_pictures_are_accounted_for(pictures, as_json):
    root, reasons = pictures
    records = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert len(records) == NUM_FILES
    assert [record['path'] for record in records] == expected_order(root)
    broken = {os.path.relpath(record['path'], root): record['error'] for record in records if record['error']}
    assert broken.keys() == reasons.keys()
    for name, words in reasons.items():
        assert words in broken[name] and repr(str(root / name)) in broken[name], broken[name]
    for record in records:
        assert len(record['tags']) == (0 if record['error'] else len(LABELS))
        values = [tag['confidence'] for tag in record['tags']]
        assert values == sorted(values, reverse=True) and all(0 <= value <= 1 for value in values)
        assert all(LABELS[tag['index']] == tag['label'] for tag in record['tags'])


def test_the_exit_code_and_stderr_name_the_broken_ones(pictures, as_json):
    _, reasons = pictures
    assert as_json.returncode == 1
    *errors, summary = as_json.stderr.splitlines()
    assert len(errors) == len(reasons)
    assert all(line.startswith('timm-miil predict: cannot ') for line in errors)
    assert re.fullmatch(
        rf'timm-miil predict: {NUM_FILES - len(reasons)} labelled, {len(reasons)} not read, [\d.]+ s\.', summary)


def test_odd_encodings_are_tagged_as_the_plain_picture(pictures, as_json):
    root, _ = pictures
    twins = {}
    for record in map(json.loads, as_json.stdout.splitlines()):
        name = os.path.relpath(record['path'], root / 'twins')
        if not name.startswith('..') and ' x.' not in name:
            twins[name] = {tag['label']: tag['confidence'] for tag in record['tags']}
    assert len(twins) == 20
    other = {tag['label']: tag['confidence'] for tag in json.loads(as_json.stdout.splitlines()[0])['tags']}
    assert other != pytest.approx(twins['plain.png'], abs=0.05)  # the model does tell pictures apart
    for name, tags in twins.items():
        lossy = name in ('cmyk.jpg', 'camera.JPEG')
        assert tags == pytest.approx(twins['plain.png'], abs=0.02 if lossy else 1e-5), name


@pytest.mark.parametrize('format', ['csv', 'table'])
def test_the_other_formats_say_the_same(format, pictures, as_json, model_dir, tmp_path, capsys):
    root, reasons = pictures
    folders = [str(root / name) for name in ('broken', 'twins')]
    argv = ['predict', *folders, '--model', str(model_dir), '--threshold', '0', '--format', format]
    assert main([*argv, '--batch-size', '7', '--output', str(tmp_path / 'out.txt')]) == 1
    assert capsys.readouterr().out == ''
    text = (tmp_path / 'out.txt').read_text(encoding='utf-8')
    records = [json.loads(line) for line in as_json.stdout.splitlines()]
    records = [record for record in records if record['path'].startswith(tuple(folders))]
    assert len(records) > 50
    want = [(record['path'], tag['label'], tag['confidence']) for record in records for tag in record['tags']]
    if format == 'csv':
        rows = list(csv.DictReader(io.StringIO(text)))
        got = [(row['path'], row['label'], float(row['confidence'])) for row in rows if not row['error']]
        assert [row['path'] for row in rows if row['error']] == [
            record['path'] for record in records if record['error']]
        digits = 1e-5
    else:
        got, path = [], ''
        for line in text.splitlines():
            if match := re.fullmatch(r'  (\d\.\d{3})  (.*)', line):
                got.append((path, match[2], float(match[1])))
            elif line != '  not read':
                path = line
        assert text.count('\n  not read\n') == len(reasons)
        digits = 0.0006
    assert [row[:2] for row in got] == [row[:2] for row in want]
    np.testing.assert_allclose([row[2] for row in got], [row[2] for row in want], atol=digits)


# -- output ----------------------------------------------------------------------------------------------------


def run(*words: object) -> int:
    return main(['predict', *map(str, words)])


def test_all_well_is_zero_and_stdout_holds_results_only(picture, model_dir, capsys):
    assert run(picture, '--model', model_dir, '--topk', 2) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(rf'{re.escape(str(picture))}\n  \d\.\d{{3}}  .+\n  \d\.\d{{3}}  .+\n', out)
    assert re.fullmatch(r'timm-miil predict: 1 labelled, 0 not read, [\d.]+ s\.\n', err)


def test_results_come_as_they_are_ready(many, model_dir, monkeypatch):
    class Reader(io.StringIO):
        """What a reader of stdout has received."""
        received: list[int] = []

        def flush(self) -> None:
            self.received.append(self.getvalue().count('"path"'))

    monkeypatch.setattr(sys, 'stdout', Reader())
    assert run(many, '--model', model_dir, '--format', 'json') == 0
    assert Reader.received[:301] == list(range(1, 302))


def test_a_model_that_does_not_take_its_own_input_is_one_line(picture, tmp_path, capsys):
    model = timm.create_model('vit_tiny_patch16_224', depth=1, num_classes=3)
    timm.models.save_for_hf(model, tmp_path / 'm', safe_serialization=True)
    config = json.loads((tmp_path / 'm' / 'config.json').read_text())
    config['pretrained_cfg'].update(input_size=[3, 96, 96], fixed_input_size=False)
    config['model_args'].pop('img_size', None)
    (tmp_path / 'm' / 'config.json').write_text(json.dumps(config))
    assert run(picture, '--model', tmp_path / 'm') == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1] == "timm-miil predict: Input height (96) doesn't match model (224)."


def test_a_picture_without_labels_has_its_place_in_every_format(picture, model_dir, capsys):
    want = {
        'table': f'{picture}\n  no label\n',
        'json': json.dumps({'path': str(picture), 'tags': [], 'error': None}) + '\n',
        'csv': f'path,label,confidence,index,error\n{picture},,,,\n'}
    for format, text in want.items():
        assert run(picture, '--model', model_dir, '--threshold', 1, '--format', format) == 0
        assert capsys.readouterr().out == text


def test_the_activation_can_be_chosen(picture, model_dir, capsys):
    for activation, total in (('softmax', 1.0), ('sigmoid', None)):
        assert run(picture, '--model', model_dir, '--activation', activation, '--threshold', 0, '--format', 'json') == 0
        values = [tag['confidence'] for tag in json.loads(capsys.readouterr().out)['tags']]
        assert (sum(values) == pytest.approx(1.0, abs=1e-5)) == (total == 1.0)


def test_a_model_without_label_names_says_so(picture, tmp_path, capsys):
    timm.models.save_for_hf(timm.create_model('test_resnet', num_classes=3), tmp_path / 'm', safe_serialization=True)
    assert run(picture, '--model', tmp_path / 'm') == 0
    out, err = capsys.readouterr()
    assert 'class_2' in out
    assert err.startswith('timm-miil predict: the model does not name its classes; they are shown by number.\n')


STRANGE = ['line\nbreak.png', 'esc\x1b[31m.png', os.fsdecode(b'latin-\xe9.png')]


def written(monkeypatch, encoding: str, *words: object) -> bytes:
    """What a successful run writes to a standard output of this encoding, strict about what it cannot show."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(out, encoding=encoding))
    assert run(*words) == 0
    return out.getvalue()


@pytest.mark.parametrize('name', STRANGE)
def test_strange_names_are_harmless_on_a_terminal_and_exact_in_data(name, model_dir, tmp_path, monkeypatch):
    save_scene(tmp_path / name, 0)
    words = [tmp_path / name, '--model', model_dir, '--format']
    table = written(monkeypatch, 'utf-8', *words, 'table')
    assert len(table.splitlines()[0].split(b'/')[-1]) > len(name)
    assert b'\x1b' not in table and b'\xe9' not in table
    as_json = written(monkeypatch, 'utf-8', *words, 'json')
    assert json.loads(as_json)['path'] == str(tmp_path / name)
    assert written(monkeypatch, 'ascii', *words, 'csv')
    out = tmp_path / 'out.csv'
    assert run(*words, 'csv', '--output', out) == 0
    with open(out, encoding='utf-8', errors='surrogateescape', newline='') as file:
        assert next(csv.DictReader(file))['path'] == str(tmp_path / name)


@pytest.mark.slow
def test_strange_names_end_no_process_that_writes_ascii(model_dir, tmp_path):
    for name in STRANGE:
        save_scene(tmp_path / name, 0)
    done = subprocess.run(
        [*COMMAND, tmp_path, '--model', model_dir, '--format', 'csv'], capture_output=True, timeout=120,
        env=ENVIRONMENT | {'PYTHONUTF8': '0', 'PYTHONIOENCODING': 'ascii:strict'})
    assert done.returncode == 0 and b' 3 labelled, 0 not read' in done.stderr
    assert max(done.stdout) < 128 and b'\\udce9.png' in done.stdout


def test_pictures_are_saved_beside_the_results_and_not_tagged_again(picture, model_dir, tmp_path, capsys):
    folder = picture.parent
    save_scene(folder / 'sub' / 'b.JPG', 1)
    (folder / 'c.png').write_text('hello')
    for again in (1, 2):
        assert run(folder, '--model', model_dir, '--save-pictures', folder / 'out', '--format', 'csv') == 1
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert {os.path.relpath(row['path'], folder) for row in rows} == {'a.png', 'c.png', 'sub/b.JPG'}
    saved = sorted(str(path.relative_to(folder / 'out')) for path in (folder / 'out').rglob('*.*'))
    assert saved == ['a.jpg', 'a_2.jpg', 'sub/b.jpg', 'sub/b_2.jpg']
    with Image.open(folder / 'out' / 'a.jpg') as drawn:
        assert drawn.width >= 320


def test_saving_among_the_inputs_replaces_none(picture, model_dir):
    before = picture.read_bytes()
    copy = shutil.copy(picture, picture.with_suffix('.jpg'))
    assert run(picture, copy, '--model', model_dir, '--save-pictures', picture.parent) == 0
    assert picture.read_bytes() == Path(copy).read_bytes() == before
    assert sorted(path.name for path in picture.parent.iterdir()) == ['a.jpg', 'a.png', 'a_2.jpg', 'a_3.jpg']


def test_the_progress_bar_is_for_terminals(picture, model_dir):
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 100))
    done = subprocess.run(
        [*COMMAND, picture.parent, '--model', model_dir], env=ENVIRONMENT, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=stderr, timeout=120)
    os.close(stderr)
    seen = b''
    try:
        while chunk := os.read(terminal, 4096):
            seen += chunk
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    assert done.returncode == 0 and b'| 0/1 [' in seen and b'pictures/s' in seen
    assert b'0/1' not in done.stdout


# -- going wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('words, message', [
    (['{nope}.jpg'], r"no such file or folder: '{nope}\.jpg'\."),
    (['{empty}'], r'no pictures found; folders are searched for \.bmp .*\.webp\.'),
    (['{picture}', '--model', 'resnet17'], r"unknown model 'resnet17'; did you mean 'resnet18'\? Known: \d+ names\."),
    (['{picture}', '--model', './nope'], r"no such model folder: '\./nope'\."),
    (['{picture}', '--device', 'warp'], r"--device must be 'auto', 'cpu' or an accelerator here, got 'warp': .*"),
    (['{picture}', '--device', 'meta'], r"--device must be 'auto', 'cpu' or an accelerator here, got 'meta': .*"),
    (['{picture}', '--topk', '0'], r'topk must be at least 1, got 0\.'),
    (['{picture}', '--topk', 'x'], r"argument --topk: invalid int value: 'x' \(see timm-miil predict --help\)"),
    (['{picture}', '--threshold', '2'], r'threshold must be in \[0, 1\], got 2\.0\.'),
    (['{picture}', '--batch-size', '-3'], r'batch_size must be at least 1, got -3\.'),
    (['{picture}', '--format', 'xml'], r"argument --format: invalid choice: 'xml' .*"),
    (['{picture}', '--output', '{picture}'], r"--output is for text, got the name of a picture: '{picture}'\."),
    (['{picture}', '--output', '{nope}/out.txt'], r"\[Errno 2\] No such file or directory: '{nope}/out\.txt'"),
    (['{folder}', '--save-pictures', '{folder}'], r"--save-pictures must not be a folder to label: '{folder}'\."),
    ([], r'the following arguments are required: IMAGE_OR_FOLDER \(see timm-miil predict --help\)'),
])
def test_wrong_use_is_one_line_and_two(words, message, picture, model_dir, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    places = dict(picture=picture, folder=picture.parent, nope=tmp_path / 'nope', empty=tmp_path / 'empty')
    argv = [word.format(**places) for word in words]
    model = [] if '--model' in argv else ['--model', str(model_dir)]
    assert main(['predict', *model, *argv]) == 2
    out, err = capsys.readouterr()
    for name, place in places.items():
        message = message.replace(f'{{{name}}}', re.escape(str(place)))
    assert re.fullmatch(rf'timm-miil predict: {message}\n', err), err
    assert out == ''


def test_debug_shows_where_it_happened(tmp_path, capsys):
    assert run(tmp_path / 'nope.jpg', '--debug') == 2
    err = capsys.readouterr().err
    assert err.startswith('Traceback') and 'find_images' in err


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *words, '--batch-size', '1'], env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_closed_pipe_ends_it_quietly(many, model_dir):
    with start(many, '--model', model_dir) as process:
        assert process.stdout.readline().startswith(str(many))
        process.stdout.close()
        assert process.stderr.read() == ''
    assert process.returncode == 141


def test_ctrl_c_ends_it_quietly(many, model_dir):
    with start(many, '--model', model_dir) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ''
    assert process.returncode == 130


def test_a_hub_repository_in_the_cache_is_used_offline(picture, model_dir, tmp_path, capsys):
    repository = tmp_path / 'cache' / 'models--someone--net'
    revision = '0123456789abcdef0123456789abcdef01234567'
    shutil.copytree(model_dir, repository / 'snapshots' / revision)
    (repository / 'refs').mkdir()
    (repository / 'refs' / 'main').write_text(revision)
    words = ['--threshold', '0', '--format', 'json']
    code = """
import sys
from timm_miil.cli.main import main
for model in ('hf-hub:someone/net', 'hf-hub:someone/other'):
    print('status', main(['predict', *sys.argv[1:], '--model', model]))
"""
    done = subprocess.run(
        [sys.executable, '-c', code, picture, *words], capture_output=True, text=True, timeout=120,
        env=ENVIRONMENT | {'HF_HUB_OFFLINE': '1', 'HF_HUB_CACHE': str(tmp_path / 'cache')})
    assert run(picture, *words, '--model', model_dir) == 0
    assert done.stdout == f'{capsys.readouterr().out}status 0\nstatus 2\n', done.stderr  # sigmoid, and labels
    assert re.fullmatch(
        r"timm-miil predict: cannot load model 'hf-hub:someone/other': .+", done.stderr.splitlines()[-1])


def test_a_picture_that_cannot_be_saved_does_not_end_the_run(picture, model_dir, tmp_path, capsys):
    save_scene(picture.parent / 'sub' / 'b.png', 1)
    save_scene(picture.parent / 'tub.png', 2)
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'sub').write_text('a file where a folder is needed')
    assert run(picture.parent, '--model', model_dir, '--save-pictures', out, '--format', 'json') == 1
    results, notes = capsys.readouterr()
    assert len(results.splitlines()) == 3 and 'error": null' in results.splitlines()[-1]
    assert re.search(r"cannot save '.*b\.png' with its labels: ", notes)
    assert '3 labelled, 0 not read, 1 not saved, ' in notes
    assert sorted(path.name for path in out.iterdir()) == ['a.jpg', 'sub', 'tub.jpg']


@pytest.mark.parametrize(('words', 'tolerance'), [
    (['--optimize'], 1e-5), (['--precision', 'bf16'], 0.05), (['--precision', 'fp16'], 0.01)])
def test_other_weights_say_nearly_the_same(words, tolerance, picture, model_dir, capsys):
    plain, other = (
        tagged(capsys, [str(picture), '--model', str(model_dir), '--threshold', '0', '--format', 'json', *more])
        for more in ([], words))
    assert other.keys() == plain.keys() == set(LABELS)
    assert other == pytest.approx(plain, abs=tolerance)
    assert other != plain or words == ['--optimize']


def test_a_run_goes_on_with_its_own_precision_only(picture, model_dir, tmp_path, capsys):
    words = ['predict', str(picture.parent), '--model', str(model_dir), '--output-dir', str(tmp_path / 'out')]
    assert main([*words, '--workers', '0', '--precision', 'bf16']) == 0
    assert main([*words, '--workers', '0']) == 2
    assert 'weights' in capsys.readouterr().err


def tagged(capsys, words: list[str]) -> dict[str, float]:
    assert main(['predict', *words]) == 0
    [line] = capsys.readouterr().out.splitlines()
    return {tag['label']: tag['confidence'] for tag in json.loads(line)['tags']}
