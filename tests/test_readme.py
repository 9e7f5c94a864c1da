"""README.md says what is true: its table is the catalogue's, and its code runs as written.

`python tests/test_readme.py --write` writes the table.
"""
import argparse
import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import in21k_corpus
import pytest
import timm
from huggingface_hub import constants

from timm_miil import catalog, losses
from timm_miil.cli import quickstart
from timm_miil.cli.main import main
from timm_miil.data import SceneConfig, make_scenes
from timm_miil.models._pretrained_file import PublishedFile
from timm_miil.models.checkpoint_file import write_safetensors

README = Path(__file__).resolve().parent.parent / 'README.md'
TABLE = re.compile(r'(<!-- table of families: [^>]*-->\n)(.*?)(<!-- end of table -->)', re.DOTALL)


def family_table():
    """One row a family: what was published, and how much of it timm loads with this package."""
    rows = ['| family | files | loads | trained on | paper | licence |', '|---|---|---|---|---|---|']
    pretrained = set(timm.list_pretrained())
    for family in catalog.families():
        entries = list(catalog.weights_of(family).values())
        loads = sum(entry.timm_tag in pretrained or entry.name in pretrained for entry in entries)
        papers = dict.fromkeys(catalog.paper(entry.paper) for entry in entries)
        links = ', '.join(f'[{paper.title.partition(":")[0]}](https://arxiv.org/abs/{paper.arxiv})' for paper in papers)
        datasets = ', '.join(dict.fromkeys(entry.dataset for entry in entries))
        licences = ', '.join(dict.fromkeys(entry.licence or 'none stated' for entry in entries))
        rows.append(f'| {family} | {len(entries)} | {loads} | {datasets} | {links} | {licences} |')
    return '\n'.join(rows) + '\n'


def blocks(language):
    return re.findall(rf'^```{language}\n(.*?)^```', README.read_text(), re.DOTALL | re.MULTILINE)


# `.ci/run` runs these literally, in an environment of their own.
RUN_BY_CI = ('pip install', 'timm-miil quickstart', 'python -m')
TORCHRUN = re.compile(r'torchrun --nproc-per-node \d+ -m timm_miil.cli.main')
# What makes a training short and offline, behind the words of the text.
FEW_SCENES = ['--epochs', '1', '--set', 'scenes.num_train=64', 'scenes.num_val=64', 'scenes.num_test=64']
SHORTER = {
    'scenes_asl': FEW_SCENES,
    'scenes_comic': FEW_SCENES,
    'scenes_pu': FEW_SCENES,
    'finetune': [
        '--epochs', '1', '--workers', '0', '--img-size', '64', '--set', 'model.args.pretrained_backbone=false',
        'model.args.backbone=test_resnet'],
    # No synset of the made-up release is above another: all are of the deepest level.
    'in21k_semantic': [
        '--epochs', '1', '--workers', '0', '--model', 'test_resnet', '--img-size', '32', '--batch-size', '8', '--set',
        'precision=fp32', 'model.pretrained=false', 'loss.args.include_deepest=true'],
    'usi_imagenet': [
        '--epochs', '10', '--workers', '0', '--model', 'test_resnet', '--teacher', 'test_vit', '--img-size', '32',
        '--batch-size', '8', '--set', 'stop_epoch=1', 'precision=fp32', 'teacher.pretrained=false',
        'teacher.precision=bf16'],
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory, short_run):
    """Where a reader who followed the text so far stands: after a quickstart, here a short one."""
    folder = tmp_path_factory.mktemp('reader')
    parser = argparse.ArgumentParser()
    quickstart.add_arguments(parser)
    (folder / parser.parse_args([]).out).symlink_to(short_run[0] / 'my out')
    synsets = in21k_corpus.make_corpus(folder / 'winter21_whole', synsets=20)
    (folder / 'wordnet.is_a.txt').write_text(''.join(f'n99999999 {synset}\n' for synset in synsets))
    (folder / 'words.txt').write_text(''.join(f'{synset}\tthing\n' for synset in synsets))
    (folder / 'imagenet').symlink_to(folder / 'imagenet21k_p')
    make_scenes(folder / 'my_pictures', SceneConfig(num_train=72, num_val=32, num_test=32, image_size=32))
    return folder


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A cache with the weights that the text downloads: there is no network here."""
    monkeypatch.setattr(constants, 'HF_HOME', str(tmp_path))
    entry = catalog.weight('mldecoder_tresnet_l.miil_coco_448')
    file = PublishedFile(entry.name, url=entry.url)
    file.folder.mkdir()
    write_safetensors(file.kept, timm.create_model(entry.name).state_dict(), {'name': entry.name})


@pytest.mark.parametrize('code', blocks('python'))
def test_python_blocks_run_as_written(code, folder, request, monkeypatch):
    if 'pretrained=True' in code and 'mldecoder_tresnet_l' in code:
        request.getfixturevalue('published')
    monkeypatch.chdir(folder)
    exec(compile(code, README.name, 'exec'), {'__name__': '__readme__'})


def test_shell_blocks_run_as_written(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    ours = 0
    for line in ''.join(blocks('sh')).splitlines():
        if line.startswith(RUN_BY_CI):
            continue
        if line.startswith('printf'):
            subprocess.run(line, shell=True, check=True)
            continue
        # Several processes train in test_distributed.py: here their words are those of one.
        program, *words = shlex.split(TORCHRUN.sub('timm-miil', line), comments=True)
        assert program == 'timm-miil'
        if words[0] == 'train':
            words += SHORTER[words[1]]
        elif words[0] == 'in21k':
            words += [
                '--release', 'custom', '--min-images', str(in21k_corpus.LEAST), '--val-images', str(in21k_corpus.VAL),
                '--size', '8', '--workers', '0']
        assert main(words) == 0, capsys.readouterr().err
        assert capsys.readouterr().out
        ours += 1
    assert ours > 8


def test_the_example_gives_a_result(folder, monkeypatch):
    monkeypatch.chdir(folder)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(blocks('python')[0], {'__name__': '__readme__'})
    assert re.search(r"\('digit \d', [01]\.\d+\)", out.getvalue())


def test_table_is_the_catalogues():
    assert TABLE.search(README.read_text()).group(2) == family_table(), 'run: python tests/test_readme.py --write'


def test_every_loss_has_its_situation():
    [table] = re.findall(r'\n\| you have \|.*?\n\n', README.read_text(encoding='utf-8'), re.DOTALL)
    named = set(re.findall(r'`(\w+(?:Loss|LossSingleLabel))\b', table))
    assert named == {type_name for type_name in losses.__all__ if re.search('Loss(SingleLabel)?$', type_name)}


if __name__ == '__main__' and '--write' in sys.argv:
    README.write_text(TABLE.sub(lambda match: match.group(1) + family_table() + match.group(3), README.read_text()))
