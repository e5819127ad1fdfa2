"""Training while harvesting through a bounded disk: two trainers, and kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from train_runs import D, command, overrides, planted_rows

from sae_jax.errors import UserError
from sae_jax.store import budget
from sae_jax.store.create import create, new_folder, write_arrays
from sae_jax.store.manifest import Site, read_manifest
from sae_jax.store.plan import pack_keep, plan
from sae_jax.store.writer import open_writer

ROOT = Path(__file__).parents[2]
SITE, ROWS, SHARD, BATCH = 'layer_0.resid_post', 64 * 128, 128, 64
SHARD_BYTES = SHARD * (4 * D + 12)
SEQUENCES = ROWS * 9  # two tokens and a byte of mask for every row
# Held-out and normaliser shard, two windows of 2, 2 checkpoints of 4 batches.
LEAST = SEQUENCES + (2 + 4 + 4) * SHARD_BYTES


def begin(root, keep_bytes=LEAST, trainers=2):
  """The plan of 64 shards, as a harvest with a budget would leave it."""
  sequences = np.zeros((ROWS, 2), np.int32)
  keep = pack_keep(np.tile([False, True], (ROWS, 1)))
  manifest = plan(
    sequences, keep, [Site(SITE, D, 'float32')], rows=ROWS,
    rows_per_shard=SHARD, rows_per_block=16, held_out_shards=1, norm_shards=1,
    seed=0, model={}, text={'rows': 'planted'}, policy={}, config={},
    made_by={}, keep_bytes=keep_bytes, trainers=trainers,
  )  # fmt: skip
  with new_folder(root) as folder:
    return create(folder, manifest, sequences, keep)


def write(root, pause=0.0):
  """What a harvest process does: rows in order, slowly."""
  rows, _ = planted_rows(ROWS)
  with open_writer(root) as writer:
    while writer.missing:
      first = writer.next_row()
      writer.write(first, {SITE: rows[first : first + 32]})
      time.sleep(pause)
    writer.finish()


def spawn_harvest(root):
  program = (
    f'import sys; sys.path[:0] = {[str(ROOT), str(Path(__file__).parent)]}\n'
    'import test_growing; from pathlib import Path; from absl import logging\n'
    'logging.set_verbosity(logging.INFO)\n'
    f'test_growing.write(Path({str(root)!r}), 0.005)'
  )
  return subprocess.Popen(
    [sys.executable, '-c', program], stderr=subprocess.PIPE, text=True
  )


def spawn_trainer(run, store, seed):
  more = {
    'seed': seed, 'store.window': 2, 'train.rows': (64 - 1) * SHARD,
    'train.save_rows': 4 * BATCH, 'train.keep': 2, 'train.eval_rows': 0,
    'train.log_rows': BATCH,
  }  # fmt: skip
  return subprocess.Popen(
    command(run, 'topk.py:demo', *overrides(store, **more)),
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    stderr=subprocess.PIPE,
    text=True,
  )


def metrics(run):
  """What training computed in every step, without times."""
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  kept = [json.loads(line) for line in lines]
  return [
    {k: v for k, v in line.items() if not k.startswith('perf/')}
    for line in kept
  ]


def disk_bytes(root):
  """Bytes of rows and tokens on the disk now, half-written ones too."""
  total = 0
  for part in ('sites', 'tokens'):
    for path in (root / part).rglob('*.bin*'):
      try:
        total += path.stat().st_size
      except FileNotFoundError:
        pass
  return total


def alive(root, jobs, most):
  """Waits a moment; the most bytes seen on the disk."""
  time.sleep(0.05)
  return max(most, disk_bytes(root))


@pytest.mark.slow
def test_killed_at_random_the_batches_are_those_of_a_whole_store(tmp_path):
  whole, store = tmp_path / 'whole', tmp_path / 'store'
  begin(whole, keep_bytes=0)
  write(whole)
  for seed in (1, 2):
    trainer = spawn_trainer(tmp_path / f'whole{seed}', whole, seed)
    assert trainer.wait(timeout=120) == 0, trainer.stderr.read()
  begin(store)
  jobs = {
    'harvest': lambda: spawn_harvest(store),
    1: lambda: spawn_trainer(tmp_path / 'run1', store, 1),
    2: lambda: spawn_trainer(tmp_path / 'run2', store, 2),
  }
  running = {name: start() for name, start in jobs.items()}
  errors = {name: '' for name in jobs}
  most, kills, rng = 0, 0, random.Random(0)
  began, due = time.monotonic(), time.monotonic() + 4
  while running:
    assert time.monotonic() - began < 240, errors
    most = alive(store, jobs, most)
    for name, process in list(running.items()):
      if process.poll() is not None:
        errors[name] += process.stderr.read()
        assert process.returncode in (0, -signal.SIGKILL), errors[name]
        del running[name]
        if process.returncode:
          running[name] = jobs[name]()
    if running and kills < 5 and time.monotonic() > due:
      rng.choice(list(running.values())).kill()
      kills, due = kills + 1, time.monotonic() + rng.uniform(1, 4)
  assert kills >= 3
  manifest = read_manifest(store)
  removed = [s for s, entry in enumerate(manifest.shards) if entry.removed]
  assert removed and removed[0] == 2 and removed == [*range(2, removed[-1] + 1)]
  # The bound holds: all shards never lay on the disk together.
  assert most <= LEAST - SEQUENCES < 64 * SHARD_BYTES
  assert 'is full at shard' in errors['harvest']
  for seed in (1, 2):
    assert metrics(tmp_path / f'run{seed}') == metrics(
      tmp_path / f'whole{seed}'
    )
  # The statistics are those of all rows, and of the whole store.
  assert manifest.sites == read_manifest(whole).sites


@pytest.mark.slow
def test_a_trainer_waits_saves_and_stops_when_asked(tmp_path):
  store, run = tmp_path / 'store', tmp_path / 'run'
  begin(store, keep_bytes=0)
  rows, _ = planted_rows(ROWS)
  with open_writer(store) as writer:
    writer.write(0, {SITE: rows[: 6 * SHARD]})
    trainer = spawn_trainer(run, store, 1)
    lines = []
    for line in trainer.stderr:
      lines.append(line)
      if 'waiting for the harvest: shard' in line:
        break
    step = run / 'checkpoints' / '8'  # 4 shards of 2 batches: all there is
    deadline = time.monotonic() + 60
    while not step.exists() and time.monotonic() < deadline:
      time.sleep(0.05)
    trainer.send_signal(signal.SIGTERM)
    lines += trainer.stderr.readlines()
    assert trainer.wait(timeout=60) == 143, ''.join(lines)
    assert step.exists()
    assert 'Traceback' not in ''.join(lines)


def test_a_budget_that_is_too_small_is_refused(tmp_path):
  begin(tmp_path / 'store', keep_bytes=LEAST - 1)
  manifest = read_manifest(tmp_path / 'store', complete=False)
  with pytest.raises(UserError, match=f'are {LEAST:,} bytes'):
    budget.check_budget(manifest, window=2, checkpoint_rows=4 * SHARD)
  budget.check_budget(manifest, window=1, checkpoint_rows=4 * SHARD)


def test_what_may_be_written_depends_on_numbers_alone(tmp_path):
  manifest = begin(tmp_path / 'store')
  assert budget.reach(manifest, 0) == budget.reach(manifest, 2) == 10
  assert budget.reach(manifest, 3) == 11
  assert budget.reach(manifest, 64) == 64
  root = tmp_path / 'store'
  assert budget.first_needed(root, manifest) == 0
  budget.register(root, budget.Trainer('/runs/a', 9))
  assert budget.first_needed(root, manifest) == 0  # two are to come
  budget.register(root, budget.Trainer('/runs/b', 5))
  assert budget.first_needed(root, manifest) == 5


def test_a_trainer_that_comes_too_late_is_refused(tmp_path):
  root = tmp_path / 'store'
  rows, _ = planted_rows(8 * SHARD)
  write_arrays(root, {SITE: rows}, rows_per_shard=SHARD, rows_per_block=16)
  budget.register(root, budget.Trainer('/runs/a', 5))
  assert budget.remove_read_shards(root) == 5
  manifest = read_manifest(root)
  assert [e.removed for e in manifest.shards] == [0, 0, 1, 1, 1, 0, 0, 0]
  for shard in range(8):
    there = (root / f'sites/{SITE}/shard-{shard:05d}-of-00008.bin').exists()
    assert there == (not manifest.shards[shard].removed)
  with pytest.raises(UserError, match='shards 2 to 4 of .* were removed'):
    budget.register(root, budget.Trainer('/runs/late', 1))
  assert [t.run for t in budget.read_trainers(root)] == ['/runs/a']
