"""Tasks and processes that write one store, meshes, int8: the same rows."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_harvest
from tiny_harvest import SITES, tiny_config, tiny_subject

from sae_jax.errors import UserError
from sae_jax.harvest.job import harvest
from sae_jax.store import reader
from sae_jax.store.budget import planned_bytes
from sae_jax.store.finish import finalize
from sae_jax.store.manifest import read_manifest, shard_bytes

PROGRAM = Path(tiny_harvest.__file__)
ROOT = PROGRAM.parents[2]


def start(text, store, *changes, death='never', devices=1):
  words = [str(PROGRAM), str(text), death, *changes, str(store)]
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_NUM_CPU_DEVICES': str(devices),
  }
  return subprocess.Popen(
    [sys.executable, *words], cwd=ROOT, env=env, stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip


def end(*processes):
  """Waits for processes that must all succeed."""
  for process in processes:
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error


def contents(root):
  return {
    path.relative_to(root).as_posix(): path.read_bytes()
    for path in root.rglob('*')
    if path.is_file()
  }


def rows_of(root, site):
  """Rows of a site by (sequence, position), and their number."""
  shards = range(len(read_manifest(root).shards))
  return {
    (int(i), int(p)): row
    for rows, tokens in reader.shard_blocks(root, site, shards)
    for row, (i, p, _) in zip(rows, tokens, strict=True)
  }


def free_address():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{s.getsockname()[1]}'


@pytest.mark.slow
def test_tasks_at_once_and_killed_give_the_bytes_of_one(tmp_path, text):
  end(start(text, tmp_path / 'one'))
  store = tmp_path / 'many'
  killed = start(text, store, 'task=2/3', death='write:3')
  others = [start(text, store, f'task={i}/3') for i in range(2)]
  end(*others)
  killed.communicate()
  assert killed.returncode == -signal.SIGKILL
  with pytest.raises(UserError, match='1 of 5 shards .* .the first is 2.'):
    finalize(store)
  end(start(text, store, 'task=2/3'))
  assert contents(store) == contents(tmp_path / 'one')
  # Once more: a complete store is left alone by every task.
  end(start(text, store, 'task=1/3'))
  assert contents(store) == contents(tmp_path / 'one')


@pytest.mark.slow
def test_processes_of_one_job_are_tasks(tmp_path, text):
  end(start(text, tmp_path / 'one'))
  job = f'processes={free_address()},2'
  end(*(start(text, tmp_path / 'two', f'{job},{i}') for i in range(2)))
  assert contents(tmp_path / 'two') == contents(tmp_path / 'one')


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'int8'])
def test_a_mesh_over_two_processes(tmp_path, text, dtype):
  """Both compute every batch together, each writes its own shards."""
  same = ['harvest.batch_sequences=4', f'store.dtype={dtype}']
  end(start(text, tmp_path / 'one', *same))
  mesh = [*same, 'mesh.data=2', 'mesh.dict=2']
  job = f'processes={free_address()},2'
  end(*(
    start(text, tmp_path / 'two', *mesh, f'{job},{i}', devices=2)
    for i in range(2)
  ))  # fmt: skip
  for site in SITES:
    one, two = (rows_of(tmp_path / name, site) for name in ('one', 'two'))
    assert one.keys() == two.keys() and len(one) == 300
    apart = np.abs(np.stack(list(one.values())) - [two[k] for k in one])
    # int8: half of a row may be rounded to the next step.
    assert apart.max() < (1e-5 if dtype == 'float32' else 0.1)


@pytest.mark.parametrize('data, dict_', [(2, 4), (1, 2)])
def test_a_mesh_gives_the_rows_of_one_device(tmp_path, text, data, dict_):
  for name in ('one', 'mesh'):
    config = tiny_config(text, tmp_path / name)
    config.harvest.batch_sequences = 4
    if name == 'mesh':
      config.mesh.data, config.mesh.dict = data, dict_
    assert jax.device_count() == 8
    harvest(config, tiny_subject())
  for site in SITES:
    one, two = (rows_of(tmp_path / name, site) for name in ('one', 'mesh'))
    for key, row in one.items():
      np.testing.assert_allclose(two[key], row, atol=1e-5)


def test_int8_rows_are_the_float32_rows_to_half_a_step(tmp_path, text):
  found = {}
  for dtype in ('float32', 'int8'):
    config = tiny_config(text, tmp_path / dtype)
    config.store.dtype = dtype
    manifest = harvest(config, tiny_subject())
    found[dtype] = {site: rows_of(tmp_path / dtype, site) for site in SITES}
  for site in SITES:
    exact = np.stack(list(found['float32'][site].values()))
    coded = np.stack([found['int8'][site][k] for k in found['float32'][site]])
    assert coded.dtype == np.float32
    codes = manifest.site(site)
    offset, scale = np.array(codes.offset), np.array(codes.scale)
    y = (exact - offset) / scale
    step = np.abs(y).max(1, keepdims=True) / 127
    assert (np.abs((coded - exact) / scale) <= 0.501 * step).all()
    centred = np.square(exact - exact.mean(0)).sum()
    assert np.square(coded - exact).sum() / centred < 1e-3
    # The statistics are those of the rows as they are read.
    everything = coded.astype(np.float64)
    np.testing.assert_allclose(
      manifest.site(site).all_mean, everything.mean(0), rtol=1e-6, atol=1e-7
    )


def test_a_second_harvest_of_a_shard_is_refused(tmp_path, text):
  store = tmp_path / 's'
  first = start(text, store)
  deadline = time.monotonic() + 60
  while not list((store / 'tokens').glob('*.tmp')):
    assert first.poll() is None and time.monotonic() < deadline
  first.send_signal(signal.SIGSTOP)
  try:
    with pytest.raises(UserError, match='another harvest is writing'):
      harvest(tiny_config(text, store), tiny_subject())
  finally:
    first.send_signal(signal.SIGCONT)
  end(first)


@pytest.mark.slow
def test_a_mistake_ends_all_processes_of_a_job_at_once(tmp_path, text):
  """Also those that wait for the one that plans."""
  job = f'processes={free_address()},2'
  words = ['harvest.batch_sequences=4', 'mesh.data=2', 'mesh.dict=2']
  words.append('harvest.rows=100000')
  began = time.monotonic()
  both = [
    start(text, tmp_path / 's', *words, f'{job},{i}', devices=2)
    for i in range(2)
  ]
  errors = [process.communicate(timeout=100)[1] for process in both]
  assert time.monotonic() - began < 90
  assert '100,000 are needed' in errors[0]
  assert 'process 0 of this job could not plan' in errors[1]
  assert not (tmp_path / 's').exists()


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_all(tmp_path, text):
  """launch/harvest.py: process 1 does not see the text, 0 waits for it."""
  address = free_address()
  values = {
    'store.path': tmp_path / 's', 'model.path': 'tiny', 'harvest.rows': 300,
    'harvest.sites': repr(SITES), 'harvest.sequence_length': 10,
    'harvest.batch_sequences': 4, 'store.rows_per_shard': 64,
    'store.rows_per_block': 16, 'mesh.data': 2, 'mesh.dict': 2,
    'distributed.heartbeat_seconds': 5,
  }  # fmt: skip
  both = [
    subprocess.Popen(
      [sys.executable, str(PROGRAM), f'--config={ROOT}/configs/harvest.py:tiny',
       *(f'--config.{key}={value}' for key, value in values.items()),
       f'--config.text.path={seen}', f'--coordinator={address}',
       '--processes=2', f'--process_id={i}'],
      env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': '2'},
      stderr=subprocess.PIPE, text=True,
    )
    for i, seen in enumerate([text, tmp_path / 'nowhere'])
  ]  # fmt: skip
  try:
    said = [process.communicate(timeout=100)[1] for process in both]
  finally:
    for process in both:
      process.kill()
  assert both[1].returncode == 2, said[1]
  assert 'error: process 1: ' in said[1] and '/nowhere' in said[1]
  assert both[0].returncode in (75, -signal.SIGABRT), said[0]


def test_a_full_budget_leaves_room_for_a_restart(tmp_path, text, monkeypatch):
  """What lies there already is not asked for a second time."""
  config = tiny_config(text, tmp_path / 's')
  manifest = harvest(config, tiny_subject())
  for name in ('tokens', f'sites/{SITES[0]}'):
    (tmp_path / 's' / name / 'shard-00004-of-00005.bin').unlink()
  size = [shard_bytes(manifest, s) for s in range(5)]
  planned = planned_bytes(manifest)
  config.store.keep_bytes, config.store.trainers = sum(size) + planned, 1
  usage = shutil.disk_usage('/')
  for free in (size[4] - 1, size[4]):
    monkeypatch.setattr(
      shutil, 'disk_usage', lambda _, free=free: usage._replace(free=free)
    )
    if free < size[4]:
      with pytest.raises(UserError, match='GB free'):
        harvest(config, tiny_subject())
  assert harvest(config, tiny_subject())


def test_a_task_asks_for_the_room_of_all(tmp_path, text, monkeypatch):
  config = tiny_config(text, tmp_path / 's')
  config.task = '0/2'
  assert harvest(config, tiny_subject()) is None
  manifest = read_manifest(tmp_path / 's', complete=False)
  sizes = [shard_bytes(manifest, s) for s in range(5)]
  (tmp_path / 's' / 'tokens' / 'shard-00000-of-00005.bin').unlink()
  needed = sizes[0] + sizes[1] + sizes[3]
  # Shard 1 is being written by its task: it has its room already.
  other = tmp_path / 's' / 'tokens' / 'shard-00001-of-00005.bin.tmp'
  other.write_bytes(b'0' * sizes[1])
  usage = shutil.disk_usage('/')._replace(free=needed - sizes[1] - 1)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(UserError, match='GB free'):
    harvest(config, tiny_subject())
  usage = usage._replace(free=needed - sizes[1])
  assert harvest(config, tiny_subject()) is None


@pytest.mark.parametrize('task', ['1', '2/2', 'a/b', '-1/2', '0/0'])
def test_tasks_that_are_none(tmp_path, text, task):
  config = tiny_config(text, tmp_path / 's')
  config.task = task
  with pytest.raises(UserError, match='write i/n'):
    harvest(config, tiny_subject())
