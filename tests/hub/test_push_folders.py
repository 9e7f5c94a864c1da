"""Folders that come from anywhere: the card of a converted one follows its repository, and nothing leads elsewhere."""
import json
import os
import shutil

import pytest
import timm
import torch

from small_models import check_there, digests, make, make_converted, push, titles
from timm_miil._errors import CheckpointError, HubError
from timm_miil.cli.main import main
from timm_miil.hub.convert import convert
from timm_miil.hub.publish import publish

# The client's own ways with its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SCENES, ZERO_SHOT, STUDENT = (
    'mldecoder_scenes.miil_scenes', 'mldecoder_zero_shot_scenes.miil_scenes', 'miil_resnet8x4.miil_student_cifar100')


@pytest.fixture(scope='module')
def student(tmp_path_factory):
    """A converted folder of the catalogue, for no repository."""
    folder = tmp_path_factory.mktemp('student')
    torch.save(timm.create_model('miil_resnet8x4').state_dict(), folder / 'student.pth')
    convert(folder / 'student.pth', folder / 'model', name=STUDENT)
    return folder / 'model'


# ---- the card


def test_the_card_of_a_converted_folder_names_its_repository(hub, student, tmp_path):
    folder = shutil.copytree(student, tmp_path / 'model')
    before = digests(folder)
    assert b'hf-hub:' not in (folder / 'README.md').read_bytes()
    assert push(hub, folder, 'lab/student', dry_run=True).is_new and digests(folder) == before
    push(hub, folder, 'lab/student')
    card = hub.read('lab/student', 'README.md').decode()
    assert "timm.create_model('hf-hub:lab/student', pretrained=True)" in card and 'onvert the file first' not in card
    check_there(hub, folder, 'lab/student')
    assert push(hub, folder, 'lab/student').changed == ()
    shutil.copy(student / 'README.md', folder / 'README.md')
    assert push(hub, folder, 'lab/student', dry_run=True).changed == (), 'a dry run looks at the card that would go'
    push(hub, folder, 'me/other')
    assert 'hf-hub:me/other' in hub.read('me/other', 'README.md').decode()


def test_a_card_that_is_edited_here_goes_as_it_is(hub, student, tmp_path):
    folder = shutil.copytree(student, tmp_path / 'model')
    edited = (folder / 'README.md').read_bytes().replace(b'# Model card', b'# My card', 1)
    (folder / 'README.md').write_bytes(edited)
    push(hub, folder, 'lab/student')
    assert hub.read('lab/student', 'README.md') == edited


@pytest.mark.parametrize('name', [SCENES, pytest.param(ZERO_SHOT, marks=pytest.mark.slow), STUDENT])
def test_the_card_is_the_one_that_converting_for_the_repository_writes(hub, student, tmp_path, name):
    folder = tmp_path / 'model'
    source = student.parent / 'student.pth' if name == STUDENT else name
    convert(source, folder, name=name)
    convert(source, tmp_path / 'for', name=name, repo_id='lab/model')
    push(hub, folder, 'lab/model', verify=False)
    assert hub.read('lab/model', 'README.md') == (tmp_path / 'for' / 'README.md').read_bytes()


def test_weights_under_another_entrys_name_are_refused(hub, tmp_path):
    folder = make_converted(tmp_path / 'model', name=SCENES)
    with pytest.raises(CheckpointError, match=f'mldecoder cannot be {SCENES}, which is of mldecoder_scenes'):
        push(hub, folder)
    assert not hub.seen


# ---- what leads elsewhere, or nowhere


def inside(name, **changes):
    def changed(folder):
        config = json.loads((folder / 'config.json').read_text())
        config[name] |= changes
        (folder / 'config.json').write_text(json.dumps(config))
    return changed


def link(name):
    def changed(folder):
        shutil.move(folder / name, folder.parent / 'elsewhere')
        (folder / name).symlink_to(folder.parent / 'elsewhere')
    return changed


def circle(folder):
    (folder / 'README.md').unlink()
    (folder / 'README.md').symlink_to(folder / 'README.md')


def pipe(folder):
    (folder / 'config.json').unlink()
    os.mkfifo(folder / 'config.json')


@pytest.mark.parametrize(('spoil', 'error', 'message'), [
    (link('README.md'), ValueError, 'README.md is a link out of the folder'),
    (link('model.safetensors'), ValueError, 'model.safetensors is a link out of the folder'),
    (circle, ValueError, 'README.md of .* is no file'), (pipe, ValueError, 'config.json of .* is no file'),
    (inside('model_args', checkpoint_path='PLACE'), CheckpointError, "model_args has 'checkpoint_path'"),
    (inside('model_args', backbone_args={'checkpoint_path': 'PLACE'}), CheckpointError, "has 'checkpoint_path'"),
    (inside('pretrained_cfg', file='PLACE'), CheckpointError, 'another place for the weights'),
    (inside('pretrained_cfg', input_size=[3, 100000, 100000]), CheckpointError, 'input_size must be'),
    (inside('pretrained_cfg', input_size=[3, 0, 48]), CheckpointError, 'input_size must be'),
    (inside('pretrained_cfg', test_input_size=[3, 48]), CheckpointError, 'test_input_size must be'),
    (inside('pretrained_cfg', std=[0, 0, 0]), CheckpointError, r'std must be .*, got \[0, 0, 0\]'),
    (inside('pretrained_cfg', std=[1, 1]), CheckpointError, 'std must be one number a channel'),
    (inside('pretrained_cfg', mean=[float('nan'), 0, 0]), CheckpointError, 'mean must be one number a channel'),
    (inside('pretrained_cfg', mean='0'), CheckpointError, 'mean must be one number a channel'),
    (inside('pretrained_cfg', crop_pct=0), CheckpointError, 'crop_pct must be a number'),
    (inside('pretrained_cfg', crop_pct=10 ** 400), CheckpointError, 'crop_pct must be a number'),
])
def test_what_leads_elsewhere_is_not_given_to_timm(hub, folder, monkeypatch, spoil, error, message):
    def opened(*args, **kwargs):
        raise AssertionError('timm was asked')

    spoil(folder)
    monkeypatch.setattr('timm_miil.hub._outgoing.create_model', opened)
    with pytest.raises(error, match=message):
        push(hub, folder)
    assert not hub.seen


def test_a_snapshot_of_the_hubs_cache_may_be_pushed(hub, folder, tmp_path):
    blobs, snapshot = tmp_path / 'models--me--x' / 'blobs', tmp_path / 'models--me--x' / 'snapshots' / 'abc'
    shutil.copytree(folder, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f'../../blobs/{path.name}')
    push(hub, snapshot)
    check_there(hub, folder)


# ---- what others did on the Hub


@pytest.mark.parametrize('name', [pytest.param('config.json', marks=pytest.mark.slow), 'model.safetensors'])
def test_a_file_that_somebody_changed_stays_unless_forced(hub, folder, tmp_path, name, capsys):
    push(hub, folder)
    other = make(tmp_path / 'other', seed=2)
    theirs = ((other / name).read_bytes() if name == 'model.safetensors'
              else hub.read('me/model', name).replace(b'"cat"', b'"dog"'))
    hub.write('me/model', {name: theirs}, title=f'Update {name}')
    hub.write('me/model', {'notes.txt': b'more'})
    head = hub.repos['me/model'].refs['main']
    for dry_run in (True, False):
        with pytest.raises(HubError, match=rf"{name} of me/model was last changed by 'Update {name}'.*\(--force\)"):
            push(hub, folder, dry_run=dry_run)
    assert main(['push', str(folder), '--repo', 'me/model']) == 2 and '--force' in capsys.readouterr().err
    assert hub.repos['me/model'].refs['main'] == head and hub.read('me/model', name) == theirs
    assert push(hub, folder, force=True).changed == (name,)
    check_there(hub, folder)
    assert push(hub, make(tmp_path / 'third', seed=3)).changed == ('model.safetensors',), 'now it is ours again'


def test_a_file_that_changes_in_the_meantime_stays(hub, folder, tmp_path):
    push(hub, folder)
    other = make(tmp_path / 'other', seed=2)
    theirs = hub.read('me/model', 'model.safetensors')[:-1] + b'x'
    hub.fail('POST .*/commit/', before=lambda hub: hub.write('me/model', {'model.safetensors': theirs}))
    with pytest.raises(HubError, match="model.safetensors of me/model was last changed by 'by hand'"):
        push(hub, other)
    assert hub.read('me/model', 'model.safetensors') == theirs and titles(hub)[0] == 'by hand'


def test_what_the_hub_merged_of_a_pull_request_of_ours_is_ours(hub, folder, tmp_path):
    hub.write('me/model', {path.name: path.read_bytes() for path in folder.iterdir()},
              title='Upload mldecoder with timm-miil (#3)')
    assert push(hub, make(tmp_path / 'other', seed=2)).changed == ('model.safetensors',)
    hub.write('me/model', {'model.safetensors': b'x'}, title='Upload mldecoder with timm-miil and my own change')
    with pytest.raises(HubError, match='my own change'):
        push(hub, folder)


def test_a_hub_that_does_not_say_who_changed_a_file_is_not_believed(hub, folder, tmp_path, monkeypatch):
    push(hub, folder)
    monkeypatch.setattr(type(hub), '_last_commit', lambda *args: None)
    with pytest.raises(HubError, match='last changed by a commit that the Hub does not name'):
        push(hub, make(tmp_path / 'other', seed=2))


def test_a_dry_run_refuses_an_edited_card_too(hub, folder):
    push(hub, folder)
    hub.write('me/model', {'README.md': hub.read('me/model', 'README.md').replace(b'A test.', b'My words.')})
    with pytest.raises(HubError, match='was written or edited by somebody'):
        push(hub, folder, dry_run=True)
    assert push(hub, folder, dry_run=True, force=True).changed == ('README.md',)


# ---- what conversion has to say


def test_what_a_conversion_notes_is_told_with_every_push(hub, student, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HOME', str(tmp_path / 'hf'))
    source = tmp_path / 'resnet8x4_student_deadbeef.pth'
    torch.save(timm.create_model('miil_resnet8x4').state_dict(), source)
    words = ['push', STUDENT, '--repo', 'lab/student', '--source', str(source)]
    for _ in range(2):
        assert main(words) == 0
        assert any(line.startswith('note: its SHA-256 starts with ') and 'deadbeef' in line
                   for line in capsys.readouterr().err.splitlines())
    assert publish(STUDENT, 'lab/student', source=source).notes
