"""A disk that refuses a checkpoint in the middle of it: a real, small one."""

import os
import shlex
import subprocess

import jax
import numpy as np
import pytest
from test_metrics import no_file_beyond
from test_state_memory import small_config, start
from train_runs import ROOT, command, overrides, run, start_children

import sae_jax
from sae_jax.errors import UserError
from sae_jax.train import checkpoints, integrity

# 0.14 MB a save; at a constant rate, half a run is the first half of it.
CONFIG = 'topk.py:demo'
MORE = {'sae.latents': 512, 'optim.decay_rows': 0, 'optim.warmup_rows': 0}


@pytest.fixture
def small_disk(tmp_path):
  """A run folder whose checkpoints lie on a file system of 1 MiB."""
  folder = tmp_path / 'run' / 'checkpoints'
  folder.mkdir(parents=True)
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(folder)]
  done = subprocess.run(mount, capture_output=True, text=True)
  if done.returncode:
    pytest.skip(f'cannot mount a small disk: {done.stderr.strip()}')
  yield tmp_path / 'run'
  subprocess.run(['umount', str(folder)], check=True)


def contents(folder):
  return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def equal(a, b):
  trees = jax.tree.leaves(sae_jax.load(a)), jax.tree.leaves(sae_jax.load(b))
  return all(np.array_equal(x, y) for x, y in zip(*trees, strict=True))


@pytest.mark.slow
def test_no_room_for_a_checkpoint(small_disk, tmp_path, store):
  flags = overrides(store, **MORE)
  whole = tmp_path / 'whole'
  assert run(whole, CONFIG, *flags).returncode == 0
  half = overrides(store, **MORE | {'train.rows': 20 * 64})
  assert run(small_disk, CONFIG, *half).returncode == 0
  folder = small_disk / 'checkpoints'
  free = int(
    subprocess.run(
      ['df', '--output=avail', '-B1', str(folder)],
      capture_output=True, text=True, check=True,
    ).stdout.split()[-1]
  )  # fmt: skip
  (folder / 'ballast').write_bytes(b'0' * (free - 64 * 1024))
  before = contents(folder)
  flags.append('--config.train.resume')
  done = run(small_disk, CONFIG, *flags)
  refused(done, 'the checkpoint of step 30', 'No space left on device')
  assert 'goes on from step 20' in done.stderr.splitlines()[-1]
  assert checkpoints.kept_steps(small_disk) == [10, 20]
  assert contents(folder) == before
  (folder / 'ballast').unlink()
  done = run(small_disk, CONFIG, *flags)
  assert done.returncode == 0 and 'going on from step 20' in done.stderr
  assert equal(small_disk, whole)


def test_files_that_may_not_be_so_large(tmp_path, store):
  flags = overrides(store, **MORE)
  limited = (
    f'ulimit -f 48; exec {shlex.join(command(tmp_path, CONFIG, *flags))}'
  )
  done = subprocess.run(
    ['bash', '-c', limited],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  refused(done, 'the checkpoint of step 10', 'File too large', 'starts anew')
  assert checkpoints.kept_steps(tmp_path) == []
  assert not contents(tmp_path / 'checkpoints')
  done = run(tmp_path, CONFIG, *flags)
  assert done.returncode == 0, done.stderr


CHILD = """
import os, sys, jax
coordinator, process, folder, who = sys.argv[1:]
jax.distributed.initialize(coordinator, 2, int(process))
from sae_jax.errors import UserError
from sae_jax.train import orbax_io
from sae_jax.train.checkpoints import Checkpoints
from test_state_memory import small_config, start
from sae_jax.parallel.mesh import make_mesh
async def refuse(*_): raise OSError(28, 'No space left on device')
try:
  with jax.set_mesh(make_mesh(1, 2)), Checkpoints(folder, 9, 0) as manager:
    state = start(small_config())
    manager.save(1, state, {'position': 1})
    manager.wait()
    if process == who:
      orbax_io._RecordHandler._write = refuse
    manager.save(2, state, {'position': 2})
    manager.wait()
except UserError as error:  # at Python's own end JAX waits for the others
  print(error, file=sys.stderr)
  os._exit(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize('who', [0, 1])
def test_a_disk_that_refuses_one_process_of_a_job(tmp_path, who):
  """It says so at once: the barriers on its way out are not waited for."""
  children = start_children(CHILD, tmp_path, who, devices=1)
  try:
    stderr = children[who].communicate(timeout=60)[1]
    assert children[who].returncode == 2, stderr
    assert 'step 2 could not be written' in stderr
    assert checkpoints.kept_steps(tmp_path) == [1]
  finally:
    for child in children:
      child.kill()


def test_a_disk_that_refuses_the_last_save(tmp_path):
  """Found on leaving, by two calls of Orbax's: one line says of which step."""
  state = start(small_config())
  with pytest.raises(UserError, match='step 1 could not be written'):
    with no_file_beyond(16), checkpoints.Checkpoints(tmp_path, 2, 0) as manager:
      manager.save(1, state, {'position': 1})


def test_sums_that_cannot_be_made_keep_nobody_waiting(tmp_path, monkeypatch):
  def fail(leaves):
    raise RuntimeError('RESOURCE_EXHAUSTED: no memory for them')

  state = start(small_config())
  with pytest.raises(RuntimeError, match='no memory for them'):
    with checkpoints.Checkpoints(tmp_path, 2, 0) as manager:
      manager.save(1, state, {'position': 1})
      manager.wait()
      monkeypatch.setattr(integrity, 'sums', fail)
      manager.save(2, state, {'position': 2})
  assert checkpoints.kept_steps(tmp_path) == [1]


def refused(done, *words):
  """Exit code 2, one line at the end, no traceback."""
  last = done.stderr.strip().splitlines()[-1]
  assert done.returncode == 2 and last.startswith('error: '), done.stderr
  assert 'Traceback' not in done.stderr, done.stderr
  for word in (*words, 'run the same command again', 'checkpoints'):
    assert word in last, last
