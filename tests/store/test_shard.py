"""Shards finish in the background: the same bytes however they lie in memory,
and what goes wrong there is told."""

import errno
import os
import threading
import time

import numpy as np
import pytest
from test_writer import begin, contents, write_all

from sae_jax.errors import UserError
from sae_jax.store import shard, writer
from sae_jax.store.folder import allocate
from sae_jax.store.writer import open_writer

pytestmark = pytest.mark.smoke
# A shard of that store: 64 rows of 24 + 12 + 12 bytes, in three pages.
ONE, TWO = 3 * shard.PAGE, 6 * shard.PAGE


@pytest.mark.parametrize('bound', [0, ONE - 1, ONE, TWO - 1, TWO])
def test_the_bound_on_memory_changes_no_byte(tmp_path, monkeypatch, bound):
  write_all(tmp_path / 'as_it_is')
  made, mapped = [], []
  anonymous, write_rows = writer.anonymous, shard.write_rows
  monkeypatch.setattr(writer, 'IN_MEMORY', bound)
  monkeypatch.setattr(
    writer, 'anonymous', lambda size: made.append(size) or anonymous(size)
  )

  def counted(path, rows):
    mapped.append(isinstance(rows, np.memmap))
    write_rows(path, rows)

  monkeypatch.setattr(shard, 'write_rows', counted)
  write_all(tmp_path / 'bounded')
  assert contents(tmp_path / 'bounded') == contents(tmp_path / 'as_it_is')
  assert sum(made) <= bound
  assert mapped == [bound < ONE] * 9  # three parts of three shards


def rows_of(size):
  return np.random.default_rng(0).integers(0, 256, (size, 1)).astype(np.uint8)


@pytest.mark.parametrize('size', [1, 4096, 3 * 4096, 3 * 4096 + 100])
@pytest.mark.parametrize('direct', ['as it is', 'no flag', 'refused', 'half'])
def test_rows_are_written_whole(tmp_path, monkeypatch, size, direct):
  rows, path = rows_of(size + 8)[:size], tmp_path / 'x.bin'
  allocate(path, size)
  monkeypatch.setattr(shard, '_WRITE', 4096)
  if direct == 'no flag':
    monkeypatch.delattr(os, 'O_DIRECT', raising=False)
  elif direct != 'as it is':
    pwrite, calls = os.pwrite, []

    def refusing(descriptor, data, at):
      calls.append(at)
      if len(calls) == (1 if direct == 'refused' else 2):
        raise OSError(errno.EINVAL, 'Invalid argument')
      return pwrite(descriptor, data, at)

    if size > 4096 and hasattr(os, 'O_DIRECT'):
      monkeypatch.setattr(os, 'pwrite', refusing)
  # As the writer has them: on a page's border.
  memory = writer.anonymous(2 * shard.PAGE * 4)
  lying = shard.rows_in(memory, shard.PAGE, rows.shape, rows.dtype)
  lying[:] = rows
  shard.write_rows(path, lying)
  assert path.read_bytes() == rows.tobytes()


def failing(number, error=None):
  """As write_record, but for one shard, with the error of a full disk."""
  original = shard.write_record

  def write_record(root, manifest, s, record):
    if s == number:
      raise error or OSError(errno.ENOSPC, 'No space left on device')
    original(root, manifest, s, record)

  return write_record


@pytest.mark.parametrize('number', [0, 1, 2])
@pytest.mark.parametrize('chunk', [13, 150])
def test_what_fails_in_the_background_is_told(
  tmp_path, monkeypatch, number, chunk
):
  write_all(tmp_path / 'whole')
  monkeypatch.setattr(shard, 'write_record', failing(number))
  with pytest.raises(UserError, match='No space left on device'):
    write_all(tmp_path / 'store', chunk=chunk)
  assert not list((tmp_path / 'store').rglob('*.tmp'))
  records = [path.name for path in (tmp_path / 'store').glob('records/*')]
  assert f'shard-{number:05d}-of-00003.json' not in records
  monkeypatch.undo()
  write_all(tmp_path / 'store', chunk=chunk)
  assert contents(tmp_path / 'store') == contents(tmp_path / 'whole')


def test_a_failure_is_told_at_the_next_batch(tmp_path, monkeypatch):
  (root, values), told = begin(tmp_path), []
  monkeypatch.setattr(shard, 'write_record', failing(0))
  with pytest.raises(UserError, match='No space left'):
    with open_writer(root) as w:
      w.write(0, {site: v[:64] for site, v in values.items()})
      deadline = time.monotonic() + 10
      for first in range(64, 127):
        while first == 126 and not w._finishing.done():
          assert time.monotonic() < deadline
        w.write(first, {s: v[first : first + 1] for s, v in values.items()})
      told.append('nothing')  # `close` would raise all the same
  assert not told


def test_a_failure_ends_the_wait_for_room(tmp_path, monkeypatch):
  """Trainers that wait for the failed shard would never make any."""
  ended = []

  def never(root, manifest, s, sleep):
    deadline = time.monotonic() + 10
    while s == 1 and not ended:
      sleep(0.01)
      if time.monotonic() > deadline:
        ended.append('by the clock')

  monkeypatch.setattr(writer, 'await_room', never)
  monkeypatch.setattr(shard, 'write_record', failing(0))
  with pytest.raises(UserError, match='No space left'):
    write_all(tmp_path)
  assert not ended


def test_leaving_finishes_the_shard_that_was_full(tmp_path):
  root, values = begin(tmp_path)
  before = set(threading.enumerate())
  with pytest.raises(RuntimeError, match='the model broke'):
    with open_writer(root) as w:
      w.write(0, {site: v[:100] for site, v in values.items()})
      raise RuntimeError('the model broke')
  assert set(threading.enumerate()) <= before
  assert not list(root.rglob('*.tmp'))
  with open_writer(root) as w:
    assert w.missing == [1, 2]


def test_the_next_shard_fills_while_one_is_finished(tmp_path, monkeypatch):
  root, values = begin(tmp_path)
  go, original = threading.Event(), shard.write_record

  def slow(*args):
    assert go.wait(10)
    original(*args)

  monkeypatch.setattr(shard, 'write_record', slow)
  with open_writer(root) as w:
    w.write(0, {site: v[:127] for site, v in values.items()})
    assert w.next_row() == 127 and w.missing == [1, 2]
    assert not list(root.glob('records/*'))
    go.set()
  assert len(list(root.glob('records/*'))) == 1
