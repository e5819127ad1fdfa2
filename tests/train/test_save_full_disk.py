"""A disk that refuses a checkpoint in the middle of it: a real, small one."""

import os
import shlex
import subprocess

import jax
import numpy as np
import pytest
from train_runs import ROOT, command, overrides, run

import sae_jax
from sae_jax.train import checkpoints

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
  for _ in range(2):  # trying again without making room changes nothing
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


def refused(done, *words):
  """Exit code 2, one line at the end, no traceback."""
  last = done.stderr.strip().splitlines()[-1]
  assert done.returncode == 2 and last.startswith('error: '), done.stderr
  assert 'Traceback' not in done.stderr, done.stderr
  for word in (*words, 'run the same command again', 'checkpoints'):
    assert word in last, last
