"""The rules of the house for `import timm_miil`, checked in fresh interpreters, and over planted violations."""
import configparser
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from test_house import CHECKOUT, FILES, MAX_MODULES_AT_IMPORT, modules, plant
from timm_miil._extras import EXTRA_OF_IMPORT

PROBE = '''
import json, logging, os, random, sys, threading, warnings

offline, secrets = [], []
sys.addaudithook(lambda event, args: offline.append(event) if event in {
    'socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.bind', 'urllib.Request'} else None)
import numpy, timm, torch

def state():
    return {
        'threads': threading.active_count(),
        'random seed': random.getstate(),
        'numpy seed': str(numpy.random.get_state()),
        'torch seed': torch.get_rng_state().tolist(),
        'grad mode': torch.is_grad_enabled(),
        'default dtype': str(torch.get_default_dtype()),
        'torch threads': torch.get_num_threads(),
        'warnings': [repr(row) for row in warnings.filters] + [repr(warnings.showwarning)],
        'root logger': [repr(logging.root.handlers), logging.root.level, logging.root.manager.disable],
        'our logger': [repr(logging.getLogger('timm_miil').handlers), logging.getLogger('timm_miil').level],
        'timm logger': [repr(logging.getLogger('timm').handlers), logging.getLogger('timm').level],
        'environment': dict(os.environ),
    }

def lazy_init():
    found.append('CUDA is initialised')

def read(self, name, original=type(os.environ).__getitem__):
    if any(word in name.upper() for word in ('TOKEN', 'SECRET', 'PASSWORD', 'API_KEY')):
        secrets.append(name)
    return original(self, name)

found, modules, before = [], set(sys.modules), state()
torch.cuda._lazy_init = lazy_init
type(os.environ).__getitem__ = read
import timm_miil
type(os.environ).__getitem__ = read.__defaults__[0]

after, added = state(), set(sys.modules) - modules
found += ['the network is used: ' + event for event in sorted(set(offline))]
found += ['a secret is read: ' + name for name in secrets]
found += [key + ' changed' for key in before if before[key] != after[key]]
packages = {name.partition('.')[0] for name in added} - {'timm_miil', *sys.stdlib_module_names}
found += ['a package beyond timm is loaded: ' + name for name in sorted(packages)]
if len(added) > MAX_MODULES:
    found.append('too many modules are loaded')
print(json.dumps([timm_miil.__file__, found]))
'''


def import_effects(root: Path) -> list[str]:
    """What `import timm_miil` does besides registering models; run once timm is imported, so ours alone."""
    done = subprocess.run(
        [sys.executable, '-c', PROBE.replace('MAX_MODULES', str(MAX_MODULES_AT_IMPORT))], cwd=root, text=True,
        env=os.environ | {'PYTHONPATH': str(root), 'TIMM_MIIL_AUTOLOAD': '0'}, stdout=subprocess.PIPE, check=True)
    file, found = json.loads(done.stdout)
    return [f'{Path(file).relative_to(root)}:1: {words}' for words in found]


def test_import_is_cheap_offline_and_without_side_effects():
    assert import_effects(CHECKOUT) == []


def test_import_effects_are_found(tmp_path):
    plant(tmp_path, '__init__.py', '''
        import logging, os, random, socket, threading, time, urllib.request, warnings
        import numpy, torch, planted_package

        for call in (
                lambda: socket.create_connection(('127.0.0.1', 9)),
                lambda: urllib.request.urlopen('http://127.0.0.1:9'),
                lambda: torch.cuda.synchronize(),
        ):
            try:
                call()
            except Exception:
                pass
        os.environ.get('HF_TOKEN')
        os.environ['PLANTED'] = '1'
        threading.Thread(target=time.sleep, args=(1,)).start()
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(torch.get_num_threads() + 1)
        warnings.simplefilter('ignore')
        logging.basicConfig()
        logging.getLogger('timm').setLevel(50)
        logging.getLogger('timm_miil').addHandler(logging.StreamHandler())
    ''')
    (tmp_path / 'planted_package').mkdir()
    for number in range(MAX_MODULES_AT_IMPORT):
        (tmp_path / 'planted_package' / f'm{number}.py').touch()
    (tmp_path / 'planted_package' / '__init__.py').write_text(
        '\n'.join(f'from . import m{number}' for number in range(MAX_MODULES_AT_IMPORT)))
    assert import_effects(tmp_path) == [f'timm_miil/__init__.py:1: {words}' for words in [
        'CUDA is initialised',
        'the network is used: socket.connect',
        'the network is used: socket.getaddrinfo',
        'the network is used: urllib.Request',
        'a secret is read: HF_TOKEN',
        'threads changed',
        'random seed changed',
        'numpy seed changed',
        'torch seed changed',
        'grad mode changed',
        'default dtype changed',
        'torch threads changed',
        'warnings changed',
        'root logger changed',
        'our logger changed',
        'timm logger changed',
        'environment changed',
        'a package beyond timm is loaded: planted_package',
        'too many modules are loaded',
    ]]


# The files of the first floor that are there for the sake of a package.
BRINGS_ALONG = ('_class_tree', '_locks', '_tf32', '_timm')


def without_torch(root: Path) -> list[str]:
    """Third-party packages that floor 1 loads when it is imported by itself, without timm_miil/__init__.py."""
    names = ['timm_miil.catalog', *(f'timm_miil.{file}' for file in FILES if file not in BRINGS_ALONG)]
    code = f'''
        import importlib, json, sys, types
        root = sys.modules['timm_miil'] = types.ModuleType('timm_miil')
        root.__path__ = [{str(root / 'timm_miil')!r}]
        before = set(sys.modules)
        for name in {names!r}:
            importlib.import_module(name)
        loaded = {{name.partition('.')[0] for name in set(sys.modules) - before}}
        print(json.dumps(sorted(loaded - set(sys.stdlib_module_names) - {{'timm_miil'}})))
    '''
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, check=True, cwd=root)
    return [f'timm_miil:1: floor 1 loads {package}' for package in json.loads(done.stdout)]


def test_facts_and_the_words_of_errors_need_no_torch():
    assert without_torch(CHECKOUT) == []


def test_a_torch_in_floor_1_is_found(tmp_path):
    for file in FILES:
        plant(tmp_path, f'{file}.py', '')
    plant(tmp_path, 'catalog/__init__.py', 'import numpy')
    assert without_torch(tmp_path) == ['timm_miil:1: floor 1 loads numpy']


def test_every_public_name_is_there():
    for module in modules(CHECKOUT):
        if module.is_public:
            name = '.'.join(module.parts).removesuffix('.__init__')
            imported = importlib.import_module(name)
            absent = [public for public in getattr(imported, '__all__', ()) if not hasattr(imported, public)]
            assert (name, absent) == (name, [])


def test_optional_packages_are_the_ones_the_extras_install():
    settings = configparser.ConfigParser()
    settings.read(CHECKOUT / 'setup.cfg')
    installs = {
        (extra, re.match(r'[\w-]+', requirement)[0])
        for extra, requirements in settings['options.extras_require'].items() if extra not in ('test', 'dev')
        for requirement in requirements.split()}
    distribution = {
        'sklearn': 'scikit-learn', 'pytorch_grad_cam': 'grad-cam', 'pytorch_metric_learning': 'pytorch-metric-learning',
        'sentence_transformers': 'sentence-transformers'}
    assert {(extra, distribution.get(name, name)) for name, extra in EXTRA_OF_IMPORT.items()} == installs
