"""A published checkpoint becomes a folder that timm loads: every layout, real files, real processes."""
import hashlib
import json
import os

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from original_checkpoints import ArchFixture
from timm_miil import catalog
from timm_miil._errors import CatalogError, CheckpointError
from timm_miil.cli.main import main
from timm_miil.hub import convert
from timm_miil.hub._probe import check_probe

FILES = ['README.md', 'config.json', 'model.safetensors']
# Fixture -> the catalogue's name that its file is given, and the network that its tensors are of.
CASES = {
    'hardcorenas_a_in1k_224': ('hardcorenas_a.miil_kd_in1k', 'hardcorenas_a'),
    'binas_a_in1k_224': ('miil_binas_a.miil_in1k', 'miil_binas_a'),
    'ofa_595m_s_in1k_224': ('miil_ofa_595m.miil_in21k', 'miil_ofa_595m'),
    'levit_384_in1k_224': ('levit_384.miil_single_label_in21k', 'levit_384'),
    'mldecoder_tresnet_m_coco80_224': ('mldecoder_tresnet_m.miil_coco_224', 'mldecoder_tresnet_m'),
    'tresnet_m_v1_in1k_224': ('tresnet_m.miil_in1k', 'tresnet_m'),
    'tresnet_l_v2_in21k_196c_224': ('tresnet_v2_l.miil_zoo_in21k', 'tresnet_v2_l'),
    'tresnet_l_v2_tresnetrepo_196c_224': (
        'miil_tresnet_v2_l_slope1e6.miil_stanford_cars_368', 'miil_tresnet_v2_l_slope1e6'),
}
WRAPPED = {'hardcorenas_a_in1k_224': 'state_dict', 'mldecoder_tresnet_m_coco80_224': 'model'}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_original(case, path):
    """The file that the authors would have published."""
    tensors = ArchFixture(case).state_dict()
    wrapper = WRAPPED.get(case)
    torch.save({wrapper: tensors, 'epoch': 3} if wrapper else tensors, path)
    return path


@pytest.mark.parametrize(
    'case', [pytest.param(case, marks=pytest.mark.slow) if 'tresnet' in case else case for case in CASES])
def test_a_published_file_becomes_a_folder_of_equal_logits(case, tmp_path):
    name, architecture = CASES[case]
    fixture, entry = ArchFixture(case), catalog.weight(name)
    done = convert(save_original(case, tmp_path / 'weights.pth'), tmp_path / 'model', name=name)
    assert sorted(path.name for path in done.folder.iterdir()) == FILES
    assert (done.name, done.network.architecture) == (name, architecture)
    assert done.network.num_classes == fixture.facts['num_classes']

    model = timm.create_model(f'local-dir:{done.folder}', pretrained=True).eval()
    with torch.inference_mode():
        fixture.check_logits(model(fixture.images()))

    config = json.loads((done.folder / 'config.json').read_text())
    record = config['conversion']
    assert (config['architecture'], config['num_classes']) == (architecture, fixture.facts['num_classes'])
    assert (record['source_url'], record['source_file']) == (entry.url, 'weights.pth')
    assert record['source_sha256'] == digest(tmp_path / 'weights.pth')
    assert record['source_size'] == (tmp_path / 'weights.pth').stat().st_size
    assert record['weights_sha256'] == done.weights_sha256 == digest(done.folder / 'model.safetensors')
    check_probe(model, record['probe'])
    cfg = config['pretrained_cfg']
    assert not {'url', 'file', 'hf_hub_id'} & cfg.keys() and cfg['tag'] == entry.tag
    if entry.mean is not None:
        assert (cfg['mean'], cfg['std'], cfg['input_size']) == (
            list(entry.mean), list(entry.std), list(entry.input_size))
        assert (cfg['crop_pct'], cfg['crop_mode'], cfg['interpolation']) == (
            entry.crop_pct, entry.crop_mode, entry.interpolation)
    with safe_open(done.folder / 'model.safetensors', 'pt') as file:
        assert file.metadata() == {
            'format': 'pt', 'name': name, 'source_url': entry.url, 'source_file': 'weights.pth',
            'source_sha256': record['source_sha256'], 'converter': record['converter'], 'licence': entry.licence}
    card = ModelCard((done.folder / 'README.md').read_text()).data
    assert card.license == entry.licence.lower() and card.library_name == 'timm'
    if entry.labels:
        assert config['label_names'] == list(catalog.label_set(entry.labels).labels)
    if entry.dataset == 'imagenet-1k':
        assert config['label_names'][:2] == ['n01440764', 'n01443537']
        assert config['label_descriptions']['n01440764'].startswith('tench')


# ---- smaller files: the two CIFAR networks have no fixture and are quick


def small(num_classes=100, seed=0):
    """Tensors in the layout of the authors' CIFAR networks, which is ours."""
    torch.manual_seed(seed)
    model = timm.create_model('miil_resnet8x4', num_classes=num_classes)
    for key, tensor in model.state_dict().items():
        if key.endswith(('running_mean', 'bias')):
            tensor.uniform_(-0.1, 0.1)
    return model.state_dict()


SMALL = 'miil_resnet8x4.miil_student_cifar100'


@pytest.fixture(scope='module')
def tensors():
    return small()


@pytest.fixture
def source(tensors, tmp_path):
    torch.save({'model': tensors, 'epoch': 240}, tmp_path / 'resnet8x4_student.pth')
    return tmp_path / 'resnet8x4_student.pth'


def test_the_file_name_says_which_weights_and_equal_files_give_equal_folders(source, tensors, tmp_path):
    one, two = (convert(source, tmp_path / name) for name in ('one', 'two'))
    assert one.name == SMALL and one.notes == ('neither the file nor the catalogue names its classes.',)
    assert all((one.folder / name).read_bytes() == (two.folder / name).read_bytes() for name in FILES)
    saved = load_file(one.folder / 'model.safetensors')
    assert saved.keys() == tensors.keys() and all(torch.equal(saved[key], tensors[key]) for key in saved)
    assert len({(one.folder / name).stat().st_mode for name in FILES}) == 1


def test_dtype_is_kept_and_shared_or_strided_tensors_become_whole(tensors, tmp_path):
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    half['conv1.weight'] = half['conv1.weight'].to(memory_format=torch.channels_last)
    half['layer1.0.bn1.weight'] = half['layer1.0.bn2.weight'] = torch.full((64,), 0.5, dtype=torch.half)
    torch.save(half, tmp_path / 'weights.pth')
    done = convert(tmp_path / 'weights.pth', tmp_path / 'model', name=SMALL)
    saved = load_file(done.folder / 'model.safetensors')
    assert {tensor.dtype for tensor in saved.values()} == {torch.half, torch.int64}
    assert all(torch.equal(saved[key], half[key]) for key in half)
    model = timm.create_model(f'local-dir:{done.folder}', pretrained=True)
    assert torch.equal(model.conv1.weight, half['conv1.weight'].float())


def test_labels_of_the_file_come_before_those_of_the_catalogue(tmp_path):
    names = [f'thing {index}' for index in range(80)]
    model = timm.create_model('tresnet_m', num_classes=80)
    torch.save({'model': model.state_dict(), 'num_classes': 80, 'idx_to_class': dict(enumerate(names))},
               tmp_path / 'weights.pth')
    done = convert(tmp_path / 'weights.pth', tmp_path / 'model', name='tresnet_m.miil_coco_224')
    config = json.loads((done.folder / 'config.json').read_text())
    assert config['label_names'] == names and config['problem_type'] == 'multi_label_classification'
    assert '`thing 0`' in (done.folder / 'README.md').read_text()


def test_the_tensors_decide_where_a_name_misleads(tmp_path):
    model = timm.create_model('miil_tresnet_m_bottleneck', num_classes=7)
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    done = convert(tmp_path / 'weights.safetensors', tmp_path / 'model', name='tresnet_m.miil_csl_openimages_224')
    assert done.network.architecture == 'miil_tresnet_m_bottleneck'
    assert done.notes[:2] == (
        'by its tensors the file is of miil_tresnet_m_bottleneck, which its name does not say.',
        'it has 7 classes, where the catalogue has 9605.')
    again = timm.create_model(f'local-dir:{done.folder}', pretrained=True)
    assert again.num_classes == 7 and torch.equal(again.head.fc.weight, model.head.fc.weight)
    assert 'import timm_miil' in (done.folder / 'README.md').read_text()


@pytest.mark.parametrize('name', ['mldecoder_scenes.miil_scenes', 'mldecoder_zero_shot_scenes.miil_scenes'])
def test_packaged_weights_convert_by_name(name, tmp_path):
    done = convert(name, tmp_path / 'model')
    ours = timm.create_model(name, pretrained=True).state_dict()
    again = timm.create_model(f'local-dir:{done.folder}', pretrained=True)
    assert all(torch.equal(tensor, ours[key]) for key, tensor in again.state_dict().items())
    assert list(again.pretrained_cfg['label_names']) == list(catalog.label_set(catalog.weight(name).labels).labels)


@pytest.mark.parametrize('case, name, words', [
    ('hardcorenas_a_in1k_224', 'miil_binas_a.miil_in1k',
     r'the file is of hardcorenas_a with 1000 classes, and miil_binas_a.miil_in1k is of miil_binas_a with 1000; get'),
    ('binas_a_in1k_224', 'miil_binas_b.miil_in1k', 'the file is of miil_binas_a with'),
    ('levit_384_in1k_224', 'miil_levit_768.miil_usi_in1k', 'the file is of levit_384 with'),
    ('hardcorenas_a_in1k_224', 'peta_album.miil_ml_cufed', 'the file is of hardcorenas_a with'),
    ('hardcorenas_a_in1k_224', 'tresnet_m.miil_coco_224', 'the file is of hardcorenas_a with 1000 .* with 80; get'),
])
def test_a_file_of_another_network_is_not_given_the_name(case, name, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        convert(save_original(case, tmp_path / 'weights.pth'), tmp_path / 'model', name=name)
    assert not (tmp_path / 'model').exists()


# ---- what is refused leaves everything as it was


def test_what_does_not_fit_leaves_no_folder_and_an_old_one_as_it_was(source, tensors, tmp_path):
    done = convert(source, tmp_path / 'model')
    before = {name: digest(done.folder / name) for name in FILES}
    torch.save({key: tensor for key, tensor in tensors.items() if key != 'fc.bias'}, source)
    for folder in ('model', 'other'):
        with pytest.raises(CheckpointError, match='fc.bias'):
            convert(source, tmp_path / folder)
    assert before == {name: digest(done.folder / name) for name in FILES}
    assert sorted(path.name for path in tmp_path.iterdir()) == ['model', 'resnet8x4_student.pth']


def test_a_folder_of_something_else_is_not_replaced(source, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='it holds thesis.txt'):
        convert(source, tmp_path / 'mine')


class Bomb:
    def __reduce__(self):
        return os.system, ('echo bang > bang.txt',)


def test_a_pickle_that_would_run_something_is_refused(tensors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': tensors, 'opt': Bomb()}, tmp_path / 'weights.pth')
    with pytest.raises(CheckpointError, match='system'):
        convert(tmp_path / 'weights.pth', tmp_path / 'model', name=SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['weights.pth']


@pytest.mark.parametrize('source, words', [
    ('single_label_ls.pth', r"'single_label_ls.pth' may be of 6 entries; say which by name \(--as\): tresnet_v2_l\."),
    ('mine.pth', r"the catalogue has no file 'mine.pth'; say which weights it has by name \(--as\)"),
    ('tresnet_m.miil_coco_225', "no file, URL or weights of the catalogue; did you mean 'tresnet_m.miil_coco_224'"),
    ('http://127.0.0.1:1/mine.pth', "the catalogue has no file 'mine.pth'"),
])
def test_what_is_not_clear_is_asked_for(source, words, tensors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source.endswith('.pth') and ':' not in source:
        torch.save(tensors, source)
    with pytest.raises(CatalogError, match=words):
        convert(source, tmp_path / 'model')


def test_an_unknown_name_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(CatalogError, match="unknown weights 'resnet8x4'"):
        convert(tmp_path / 'no.pth', tmp_path / 'model', name='resnet8x4')
    with pytest.raises(CheckpointError, match='must be a file, a URL or weights of the catalogue, got .*no.pth'):
        convert(tmp_path / 'no.pth', tmp_path / 'model', name=SMALL)


@pytest.mark.parametrize('name', ['ecaresnetlight.miil_in1k'])
def test_what_has_no_original_file_is_on_the_hub(name, tmp_path):
    with pytest.raises(CheckpointError, match=f"is on the Hub and has no original file.*'timm/{name}'"):
        convert(name, tmp_path / 'model')


# ---- the command


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the program's words in the folder of the test; its code, and what it wrote."""
    def run(*words):
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()
    return run


def test_the_command_converts_and_says_what_comes_next(command, source, tmp_path):
    code, out, err = command('convert', source, '-o', 'model')
    assert (code, err) == (0, '')
    lines = out.splitlines()
    assert lines[0].split() == ['weights', SMALL] and f'sha256     {digest(source)}' in lines
    assert 'note: neither the file nor the catalogue names its classes.' in lines
    assert lines[-1].startswith("now timm.create_model('local-dir:model', pretrained=True) loads it")
    assert sorted(path.name for path in (tmp_path / 'model').iterdir()) == FILES


def test_what_a_file_says_does_nothing_to_the_terminal(command, tensors, tmp_path):
    torch.save({**tensors, 'evil\x1b]0;pwn\x07': torch.zeros(1)}, tmp_path / 'weights.pth')
    code, _, err = command('convert', 'weights.pth', '--as', SMALL, '-o', 'model')
    assert code == 2 and err.rstrip('\n').isprintable() and r'evil\x1b]0;pwn\x07' in err


def test_the_command_refuses_in_one_line(command, tmp_path):
    (tmp_path / 'page.pth').write_text('<html>gone</html>')
    code, out, err = command('convert', 'page.pth', '--as', SMALL, '-o', 'model')
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert err.startswith('timm-miil convert: ') and 'page.pth' in err
    assert not (tmp_path / 'model').exists()
