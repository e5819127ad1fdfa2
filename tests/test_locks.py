"""Locks where the file system has no flock."""

import errno
import fcntl
import os
import socket
import subprocess

import numpy as np
import pytest

from sae_jax import locks
from sae_jax.errors import UserError
from sae_jax.store.create import new_folder, write_arrays
from sae_jax.store.folder import check_folder, claim, locked
from sae_jax.store.verify import verify
from sae_jax.sweep import study
from sae_jax.train.run import lock


def no_flock(monkeypatch, number=errno.ENOSYS):
  def refuse(descriptor, how):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, 'flock', refuse)


@pytest.fixture
def files(monkeypatch):
  no_flock(monkeypatch)
  monkeypatch.setenv('SAE_JAX_LOCK', 'file')


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.ENOLCK])
def test_no_flock_is_said_with_what_to_do(tmp_path, monkeypatch, number):
  no_flock(monkeypatch, number)
  rows = {'a': np.zeros((4, 2), np.float32)}
  for use in (
    lambda: write_arrays(tmp_path / 's', rows, rows_per_shard=2,
                         rows_per_block=1),
    lock(tmp_path).__enter__,
    study.claim(tmp_path).__enter__,
    lambda: study.is_taken(tmp_path),
  ):  # fmt: skip
    with pytest.raises(UserError, match='SAE_JAX_LOCK=file') as found:
      use()
    assert str(tmp_path) in str(found.value)
    assert os.strerror(number) in str(found.value)


def test_a_lock_file_keeps_others_out_until_it_is_released(tmp_path, files):
  path = tmp_path / 'x'
  held = claim(path)
  with pytest.raises(UserError, match=f'{path}.held: remove that if it has'):
    claim(path)
  assert (tmp_path / 'x.held').read_text().split()[:2] == [
    str(os.getpid()),
    socket.gethostname(),
  ]
  assert locks.taken(path)
  locks.release(held)
  assert not locks.taken(path) and os.listdir(tmp_path) == ['x']
  locks.release(claim(path))


def test_a_store_is_written_under_lock_files_and_none_is_left(tmp_path, files):
  rows = {'a': np.random.default_rng(0).normal(size=(8, 2))}
  write_arrays(
    tmp_path / 's', rows, rows_per_shard=4, rows_per_block=2, dtype='float32'
  )
  assert (tmp_path / 's/manifest.json').exists()
  assert not list(tmp_path.rglob('*.held'))
  with locked(tmp_path / 's'):  # its lock file is no stray
    assert (tmp_path / 's/lock.held').exists()
    assert not verify(tmp_path / 's')[0].warnings


def test_a_folder_without_a_plan_is_gone(tmp_path, files):
  with pytest.raises(KeyError), new_folder(tmp_path / 's') as folder:
    check_folder(folder)  # as another task does meanwhile
    raise KeyError
  assert not (tmp_path / 's').exists()


def test_what_killed_processes_have_left_is_taken_over(tmp_path, files):
  child = subprocess.Popen(['true'])
  child.wait()
  # The second as of another life of a container, whose processes are numbered
  # from 1 again.
  for left in (f'{child.pid}', f'{os.getpid()}'):
    text = f'{left}\n{socket.gethostname()}\n1\n'
    (tmp_path / 'lock.held').write_text(text)
    assert not locks.taken(tmp_path / 'lock')
    with lock(tmp_path):
      assert locks.taken(tmp_path / 'lock')
    assert os.listdir(tmp_path) == ['lock']


def test_locks_of_other_hosts_stay(tmp_path, files):
  (tmp_path / 'lock.held').write_text('1\nelsewhere\n1\n')
  words = f'in use .* {tmp_path}/lock.held: remove that if it has ended'
  with pytest.raises(UserError, match=words):
    lock(tmp_path).__enter__()
  assert locks.taken(tmp_path / 'lock')
  (tmp_path / 'lock.held').unlink()
  with lock(tmp_path):
    pass
