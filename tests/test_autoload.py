"""The start hook in fresh interpreters: with torch, timm and our wheel really installed, then by itself."""
import shutil
import textwrap
from pathlib import Path

import pytest

BROKEN = 'timm-miil could not register its models with timm (SyntaxError'
GONE = "timm-miil could not register its models with timm (ModuleNotFoundError: No module named 'timm_miil')"


def python(environment, folder, code, *flags, **variables):
    return environment.run('python', *flags, '-c', textwrap.dedent(code), cwd=folder, **variables)


@pytest.fixture
def spoiled(installed, tmp_path):
    """A copy of the environment that a test may damage."""
    return type(installed)(shutil.copytree(installed.root, tmp_path / 'spoiled', symlinks=True))


# ---- really installed


@pytest.mark.parametrize('first', [
    'import timm',
    'import torch',
    *(pytest.param(first, marks=pytest.mark.slow) for first in (
        'from timm.models import create_model', 'import timm.layers', 'import timm_miil')),
])
def test_models_are_there_whatever_is_imported_first(installed, tmp_path, first):
    done = python(installed, tmp_path, f'''
        {first}
        import sys
        if '{first}' == 'import torch':
            assert not {{'timm', 'timm_miil'}} & sys.modules.keys(), 'torch alone imports neither'
        import inspect, importlib, timm, _timm_miil_boot
        assert timm.is_model('mldecoder_tresnet_l')
        model = timm.create_model('mldecoder', backbone='test_vit', num_classes=5, num_groups=5)
        assert model.num_classes == 5

        for module in timm, timm.models:
            assert type(module.__loader__).__module__ == '_frozen_importlib_external', module.__loader__
            assert module.__spec__.loader is module.__loader__
        assert 'create_model' in inspect.getsource(timm.models)
        assert not [finder for finder in sys.meta_path if type(finder).__module__ == '_timm_miil_boot']

        before = list(sys.meta_path)
        _timm_miil_boot.install()
        assert sys.meta_path == before, 'timm is there already: nothing to wait for'
        importlib.reload(timm.models)
        importlib.reload(timm)
        import timm_miil
        assert timm.is_model('mldecoder_tresnet_l')
        print(timm_miil.__file__)
    ''', '-W', 'error::UserWarning', '-W', 'error::RuntimeWarning')
    assert (done.stderr, done.returncode) == ('', 0)  # no 'Overwriting ... in registry'
    assert done.stdout.startswith(str(installed.site_packages))


@pytest.mark.parametrize('switch', [
    'TIMM_MIIL_AUTOLOAD', pytest.param('TORCH_DEVICE_BACKEND_AUTOLOAD', marks=pytest.mark.slow)])
def test_switched_off_the_explicit_import_still_registers(installed, tmp_path, switch):
    done = python(installed, tmp_path, '''
        import sys, timm
        assert 'timm_miil' not in sys.modules
        assert not [finder for finder in sys.meta_path if type(finder).__module__ == '_timm_miil_boot']
        try:
            timm.create_model('mldecoder_tresnet_l')
        except RuntimeError as error:
            print(error)
        import timm_miil
        assert timm.is_model('mldecoder_tresnet_l')
    ''', '-W', 'error::UserWarning', **{switch: '0'})
    assert (done.stderr, done.returncode) == ('', 0)
    assert done.stdout == 'Unknown model (mldecoder_tresnet_l)\n'


@pytest.mark.slow  # a small package that fails in other ways: test_every_failure_of_ours_becomes_one_line
def test_a_broken_package_costs_one_warning(spoiled, tmp_path):
    with (spoiled.site_packages / 'timm_miil' / '__init__.py').open('a') as file:
        file.write('\ndef broken(:\n')
    done = python(spoiled, tmp_path, 'import timm; print(timm.is_model("resnet18"))', '-W', 'error')
    assert (done.returncode, done.stdout) == (0, 'True\n')
    assert done.stderr.count(BROKEN) == 1
    assert 'TIMM_MIIL_AUTOLOAD=0 switches this start hook off' in done.stderr
    assert 'Traceback' not in done.stderr


def test_a_missing_package_costs_one_warning(spoiled, tmp_path):
    shutil.rmtree(spoiled.site_packages / 'timm_miil')
    done = python(spoiled, tmp_path, 'import torch, timm; print(timm.is_model("resnet18"))')
    assert (done.returncode, done.stdout) == (0, 'True\n')
    assert done.stderr.count(': RuntimeWarning: ') == done.stderr.count(GONE) == 1


def test_an_error_of_timm_itself_is_unchanged(spoiled, tmp_path):
    links = (spoiled.site_packages / 'links.pth').read_text().strip()
    timm = spoiled.site_packages / 'timm'
    (timm / 'models').mkdir(parents=True)
    for entry in Path(f'{links}/timm').iterdir():
        if entry.name != 'models':
            (timm / entry.name).symlink_to(entry)
    (timm / 'models' / '__init__.py').write_text('raise OSError(28, "planted")\n')
    done = python(spoiled, tmp_path, '''
        import sys
        try:
            import timm
        except OSError as error:
            frames = []
            while error.__traceback__:
                frames.append(error.__traceback__.tb_frame.f_code.co_filename)
                error.__traceback__ = error.__traceback__.tb_next
            print(error, error.__cause__, error.__context__, frames[-1])
        print('timm_miil' in sys.modules, 'timm.models' in sys.modules)
    ''')
    assert (done.stderr, done.returncode) == ('', 0)
    planted = timm / 'models' / '__init__.py'
    assert done.stdout == f'[Errno 28] planted None None {planted}\nFalse False\n'


def test_spawned_workers_of_an_isolated_interpreter_have_the_models(installed, tmp_path):
    (tmp_path / 'main.py').write_text(textwrap.dedent('''
        import concurrent.futures, multiprocessing, sys

        def work():
            import timm
            return sys.flags.isolated, timm.is_model('mldecoder_tresnet_l')

        if __name__ == '__main__':
            spawn = multiprocessing.get_context('spawn')
            with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
                print(pool.submit(work).result())
    '''))
    done = installed.run('python', '-I', 'main.py', cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, '(1, True)\n', '')


@pytest.mark.slow
def test_an_editable_install_works_until_its_checkout_moves(spoiled, source_tree, tmp_path):
    checkout = shutil.copytree(source_tree, tmp_path / 'checkout')
    spoiled.pip('uninstall', '--yes', 'timm-miil')
    spoiled.pip('install', '--no-deps', '--no-index', '--no-build-isolation', '--editable', checkout)
    done = python(spoiled, tmp_path, 'import timm; print(timm.is_model("mldecoder_tresnet_l"))')
    assert (done.returncode, done.stdout, done.stderr) == (0, 'True\n', '')

    checkout.rename(tmp_path / 'moved')
    done = python(spoiled, tmp_path, 'import torch')
    assert done.returncode == 1
    assert 'RuntimeError: Failed to load the backend extension: timm_miil.' in done.stderr
    done = python(spoiled, tmp_path, 'import torch', TORCH_DEVICE_BACKEND_AUTOLOAD='0')
    assert (done.returncode, done.stderr) == (0, '')
    spoiled.pip('uninstall', '--yes', 'timm-miil')
    done = python(spoiled, tmp_path, 'import torch')
    assert (done.returncode, done.stderr) == (0, '')


@pytest.mark.slow
def test_threads_that_import_timm_together_all_find_the_models(installed, tmp_path):
    done = python(installed, tmp_path, '''
        import threading
        import torch
        found, barrier = [], threading.Barrier(4)

        def work():
            barrier.wait()
            import timm
            found.append(timm.is_model('mldecoder_tresnet_l'))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(found)
    ''', '-W', 'error::RuntimeWarning')
    assert (done.returncode, done.stdout, done.stderr) == (0, '[True, True, True, True]\n', '')


# ---- the hook by itself, with small packages under the names it knows: every way to fail is cheap to try


def hook(installed, tmp_path, code, *flags, ours='', theirs='', **variables):
    """Run `code` after `install()`, with `ours` as the text of timm_miil and `theirs` of timm.models."""
    for name, text in ('timm_miil', ours), ('timm', 'from . import models'), ('timm/models', theirs):
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text(text)
    boot = installed.site_packages / '_timm_miil_boot.py'
    start = f'''
        import sys
        sys.path[:0] = [{str(tmp_path)!r}]
        import importlib.util
        spec = importlib.util.spec_from_file_location('_timm_miil_boot', {str(boot)!r})
        boot = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(boot)
    '''
    code = textwrap.dedent(start) + textwrap.dedent(code)
    return python(installed, tmp_path, code, '-S', *flags, **variables)


def test_timm_is_complete_when_we_are_imported(installed, tmp_path):
    done = hook(
        installed, tmp_path, 'boot.install(); import timm, timm_miil; print(timm_miil.found)',
        theirs='answer = 42', ours='from timm.models import answer as found')
    assert (done.stdout, done.stderr) == ('42\n', '')


def test_installed_late_it_registers_at_once(installed, tmp_path):
    done = hook(
        installed, tmp_path, 'import timm; boot.install(); print("timm_miil" in sys.modules)')
    assert (done.stdout, done.stderr) == ('True\n', '')


def test_installed_twice_it_waits_once(installed, tmp_path):
    done = hook(installed, tmp_path, '''
        before = len(sys.meta_path)
        boot.install(), boot.install()
        print(len(sys.meta_path) - before)
        import timm
        print(len(sys.meta_path) - before)
    ''')
    assert (done.stdout, done.stderr) == ('1\n0\n', '')


def test_threads_that_import_it_together_all_find_us(installed, tmp_path):
    done = hook(installed, tmp_path, '''
        import threading
        boot.install()
        found, barrier = [], threading.Barrier(4)

        def work():
            barrier.wait()
            import timm.models
            found.append('timm_miil' in sys.modules)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(found)
    ''', '-W', 'error', theirs='import time; time.sleep(0.2)', ours='import time; time.sleep(0.2)')
    assert (done.returncode, done.stdout, done.stderr) == (0, '[True, True, True, True]\n', '')


def test_other_names_go_on_to_the_other_finders(installed, tmp_path):
    done = hook(installed, tmp_path, '''
        boot.install()
        import wave
        print(type(sys.meta_path[0]).__name__, type(wave.__loader__).__name__)
    ''')
    assert (done.stdout, done.stderr) == ('_Finder SourceFileLoader\n', '')


def test_finders_of_other_libraries_are_asked_old_ones_passed_by(installed, tmp_path):
    done = hook(installed, tmp_path, '''
        boot.install()

        class Sees:
            def find_spec(self, name, path, target=None):
                print(name, target)

        class Old:
            def find_module(self, name, path=None):
                return None

        sys.meta_path[1:1] = [Old(), Sees()]
        import timm
        print('timm_miil' in sys.modules)
    ''')
    assert (done.stdout, done.stderr) == ('timm None\ntimm.models None\ntimm_miil None\nTrue\n', '')


def test_a_loader_may_make_the_module_itself(installed, tmp_path):
    done = hook(installed, tmp_path, '''
        import importlib.abc, types
        boot.install()

        class Module(types.ModuleType):
            pass

        class Both(importlib.abc.Loader):
            def find_spec(self, name, path, target=None):
                return importlib.util.spec_from_loader(name, self) if name == 'timm.models' else None

            def create_module(self, spec):
                return Module(spec.name)

            def exec_module(self, module):
                pass

        sys.meta_path.insert(1, Both())
        import timm
        print(type(timm.models).__name__, 'timm_miil' in sys.modules)
    ''')
    assert (done.stdout, done.stderr) == ('Module True\n', '')


def test_a_zipped_timm_is_found(installed, tmp_path):
    done = hook(installed, tmp_path, '''
        import shutil
        shutil.make_archive('zipped', 'zip', '.', 'timm')
        shutil.rmtree('timm')
        sys.path.insert(0, 'zipped.zip')
        boot.install()
        import timm
        print(type(timm.models.__loader__).__name__, 'timm_miil' in sys.modules)
    ''')
    assert (done.stdout, done.stderr) == ('zipimporter True\n', '')


def test_a_namespace_package_in_place_of_timm_models_is_left_alone(installed, tmp_path):
    done = hook(installed, tmp_path, '''
        import os
        os.remove('timm/models/__init__.py')
        boot.install()
        import timm
        print(timm.models.__file__, 'timm_miil' in sys.modules)
    ''')
    assert (done.stdout, done.stderr) == ('None False\n', '')


def test_without_timm_models_the_error_is_pythons(installed, tmp_path):
    done = hook(installed, tmp_path, '''
        import shutil
        shutil.rmtree('timm/models')
        boot.install()
        try:
            import timm.models
        except ImportError as error:
            print(error)
    ''')
    assert done.stdout.startswith("cannot import name 'models' from partially initialized module 'timm'")


@pytest.mark.parametrize('failure', [
    'raise ValueError("planted")',
    'raise BaseException("planted")',
    'raise GeneratorExit("planted")',
    'import missing_planted',
])
@pytest.mark.parametrize('flags', [(), ('-W', 'error')])
def test_every_failure_of_ours_becomes_one_line(installed, tmp_path, failure, flags):
    done = hook(installed, tmp_path, 'boot.install(); import timm; print("on")', *flags, ours=failure)
    assert (done.returncode, done.stdout) == (0, 'on\n')
    assert done.stderr.count('timm-miil could not register') == done.stderr.count('planted') == 1
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('error', ['KeyboardInterrupt', 'SystemExit'])
def test_a_wish_to_stop_is_obeyed(installed, tmp_path, error):
    done = hook(installed, tmp_path, f'''
        boot.install()
        try:
            import timm
        except {error}:
            print('stopped')
    ''', ours=f'raise {error}')
    assert (done.stdout, done.stderr) == ('stopped\n', '')


def test_a_hook_that_cannot_be_placed_costs_one_warning(installed, tmp_path):
    done = hook(installed, tmp_path, 'sys.meta_path = tuple(sys.meta_path); boot.install(); print("on")')
    assert (done.returncode, done.stdout) == (0, 'on\n')
    assert done.stderr.count("AttributeError: 'tuple' object has no attribute 'insert'") == 1


@pytest.mark.parametrize('value, waits', [('0', False), ('1', True), ('', True)])
def test_only_zero_switches_it_off(installed, tmp_path, value, waits):
    done = hook(
        installed, tmp_path, 'boot.install(); import timm; print("timm_miil" in sys.modules)',
        TIMM_MIIL_AUTOLOAD=value)
    assert (done.stdout, done.stderr) == (f'{waits}\n', '')


def test_it_imports_only_the_standard_library(installed, tmp_path):
    done = hook(installed, tmp_path, '''
        outside = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)
        print(sorted(outside - {'__main__', '_timm_miil_boot'}))
    ''')
    assert (done.stdout, done.stderr) == ('[]\n', '')
