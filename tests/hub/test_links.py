"""Links are asked for over HTTP from a real server; the catalogue's own go to the world and are not."""
import importlib
import json
import re
import socket

import pytest

from timm_miil import catalog
from timm_miil._errors import CatalogError
from timm_miil.cli import links as cli_links
from timm_miil.cli.main import main
from timm_miil.hub.links import Link, check_links, links, sources

from file_server import Fault, run_file_server

hub_links = importlib.import_module('timm_miil.hub.links')    # the room gives the function under this name


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(hub_links, 'WAITS', (0.0, 0.0))
    for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def web():
    with run_file_server() as running:
        yield running


def only(web, url):
    [found] = check_links({'a.b': url})
    return found, [method for method, _, _ in web.requests]


def test_a_file_is_asked_for_and_not_fetched(web):
    url = web.put('/x.pth', b'12345')
    found, methods = only(web, url)
    assert found == Link('a.b', url, 200, 5) and not found.is_dead
    assert methods == ['HEAD']


@pytest.mark.parametrize('status', [403, 405, 501])
def test_a_server_without_head_is_asked_for_one_byte(web, status):
    url = web.put('/x.pth', b'12345')
    web.faults = [Fault(status=status)]
    found, methods = only(web, url)
    assert found == Link('a.b', url, 206, 5)
    assert methods == ['HEAD', 'GET'] and web.ranges == [None, 'bytes=0-0']


def test_a_server_without_head_and_parts_is_not_read_to_its_end(web):
    url = web.put('/x.pth', bytes(50_000_000))
    web.faults = [Fault(status=405), Fault(no_range=True)]
    assert only(web, url)[0] == Link('a.b', url, 200, 50_000_000)


@pytest.mark.parametrize('status', [404, 403, 410])
def test_a_dead_link(web, status):
    web.always = Fault(status=status)
    found, methods = only(web, web.put('/x.pth', b''))
    assert found.is_dead and (found.status, found.size) == (status, None)
    assert found.problem.startswith(f'the server answers {status}')
    assert methods == (['HEAD'] if status == 410 else ['HEAD', 'GET'])


def test_trouble_that_passes_is_no_death(web):
    url = web.put('/x.pth', b'12345')
    web.faults = [Fault(status=503), Fault(status=429, headers={'Retry-After': '0'})]
    assert only(web, url) == (Link('a.b', url, 200, 5), ['HEAD'] * 3)


def test_trouble_that_stays_is(web):
    web.always = Fault(status=500)
    found, methods = only(web, web.put('/x.pth', b'12345'))
    assert found.is_dead and found.status == 500 and len(methods) == 3


def test_nobody_there():
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    [found] = check_links({'a.b': f'http://127.0.0.1:{port}/x'})
    assert found.is_dead and found.status == 0 and 'refused' in found.problem


def test_a_redirect_is_followed_without_fetching(web):
    url = web.put('/real.pth', b'12345')
    web.faults = [Fault(status=302, headers={'Location': url})]
    found, methods = only(web, f'{web.address}/x.pth')
    assert (found.status, found.size, found.url) == (200, 5, f'{web.address}/x.pth')
    assert methods == ['HEAD', 'HEAD']


@pytest.mark.parametrize(('url', 'words'), [
    ('file:///etc/passwd', 'expected the URL of a file'), ('http://me:secret@h/x', 'user name or password')])
def test_other_addresses_are_dead(url, words):
    [found] = check_links({'a.b': url})
    assert found.is_dead and words in found.problem


def test_a_web_page_is_not_the_file(web):
    found, _ = only(web, web.put('/x.pth', b'<html>', kind='text/html'))
    assert found.is_dead and found.problem == 'a web page in place of the file'


def test_a_length_that_is_not_said(web):
    url = web.put('/x.pth', b'12345')
    web.faults = [Fault(headers={'Content-Length': None})]
    assert only(web, url)[0] == Link('a.b', url, 200, None)


def test_an_address_of_many_names_is_asked_for_once_and_the_order_is_kept(web):
    one, two = web.put('/1.pth', b'1'), web.put('/2.pth', b'12')
    found = check_links([('a', one), ('b', two), ('c', one), ('d', f'{web.address}/none')], threads=2)
    assert [(link.name, link.url, link.size) for link in found] == [
        ('a', one, 1), ('b', two, 2), ('c', one, 1), ('d', f'{web.address}/none', None)]
    assert sorted(path for _, path, _ in web.requests) == ['/1.pth', '/2.pth', '/none', '/none']
    assert check_links([]) == ()
    with pytest.raises(ValueError, match='threads must be at least 1'):
        check_links([], threads=0)


def test_every_address_of_the_catalogue_is_a_source():
    found = sources()
    assert {name for name, _ in found} == {
        entry.name for entry in catalog.weights().values() if entry.url or entry.hf_hub_id}
    urls = {url for _, url in found}
    assert urls >= {entry.url for entry in catalog.weights().values() if entry.url}
    hosted = {entry.hf_hub_id for entry in catalog.weights().values() if entry.hf_hub_id}
    assert hosted and all(any(f'/{repo}/resolve/main/model.safetensors' in url for url in urls) for repo in hosted)
    name = 'mldecoder_tresnet_l.miil_coco_448'
    assert [each for each, _ in sources([name])] == [name]


def test_unknown_names_are_refused():
    with pytest.raises(CatalogError, match='unknown weights .* did you mean'):
        links(['mldecoder_tresnet_l.miil_coco_44'])


@pytest.fixture
def catalogue_on(web, monkeypatch):
    """The sources of the catalogue, moved to the server."""
    def moved(names=None):
        return tuple((name, f'{web.address}/{name}') for name, _ in sources(names))
    monkeypatch.setattr(hub_links, 'sources', moved)
    for name, _ in sources():
        web.put(f'/{name}', name.encode())
    return web


def test_the_verb_prints_a_table(catalogue_on, capsys):
    assert main(['links', 'mldecoder_*coco*']) == 0
    header, *lines, last = capsys.readouterr().out.splitlines()
    assert header.split() == ['weights', 'status', 'bytes', 'url']
    assert lines and all(line.split() == [name, 'ok', str(len(name)), f'{catalogue_on.address}/{name}']
                         for line in lines for name in [line.split()[0]])
    assert last == f'{len(lines)} addresses, 0 dead'


def test_the_verb_fails_if_one_is_dead(catalogue_on, capsys):
    del catalogue_on.files['/mldecoder_tresnet_l.miil_coco_448']
    assert main(['links', 'mldecoder_*coco*']) == 1
    out = capsys.readouterr().out
    assert re.search(r'mldecoder_tresnet_l.miil_coco_448 +the server answers 404 Not Found', out)
    assert out.endswith(', 1 dead\n')


def test_the_verb_prints_json(catalogue_on, capsys):
    assert main(['links', 'mldecoder_tresnet_l.miil_coco_448', '--json']) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found == {'name': 'mldecoder_tresnet_l.miil_coco_448', 'status': 200, 'size': 33, 'problem': '',
                     'is_dead': False, 'url': f'{catalogue_on.address}/mldecoder_tresnet_l.miil_coco_448'}


def test_a_pattern_without_a_match_is_an_error(capsys):
    assert main(['links', 'nothing*']) == 2
    assert "no weights match 'nothing*'" in capsys.readouterr().err


def test_words_of_a_server_cannot_steer_the_terminal():
    assert '\x1b' not in cli_links.table((Link('a.b', 'http://h/x', 404, None, 'gone\x1b[31m'),))
