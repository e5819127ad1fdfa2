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
import test_skipping
from train_runs import D, command, overrides, planted_rows

from sae_jax.errors import UserError
from sae_jax.store import budget
from sae_jax.store.batches import BatchSource
from sae_jax.store.create import create, new_folder, write_arrays
from sae_jax.store.manifest import Site, read_manifest, shard_bytes
from sae_jax.store.plan import pack_keep, plan
from sae_jax.store.writer import open_writer
from sae_jax.train import growing, loop, skipping
from sae_jax.train.config import base_config

pytestmark = pytest.mark.smoke
ROOT = Path(__file__).parents[2]
SITE, ROWS, SHARD, BATCH = 'layer_0.resid_post', 64 * 128, 128, 64
HARVESTED = {1: 'layer_1.resid_post', 2: 'layer_0.attn_z'}  # by trainer
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


def spawn_harvest(text, root, keep_bytes):
  """A real harvest of 64 shards from a tiny model, for two trainers."""
  changes = {
    'harvest.rows': ROWS, 'store.rows_per_shard': SHARD,
    'store.keep_bytes': keep_bytes, 'store.trainers': 2,
  }  # fmt: skip
  words = [f'{key}={value}' for key, value in changes.items()]
  program = ROOT / 'tests' / 'harvest' / 'tiny_harvest.py'
  return subprocess.Popen(
    [sys.executable, str(program), str(text), 'never', *words, str(root)],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    stderr=subprocess.PIPE,
    text=True,
  )


def spawn_trainer(run, store, seed, site=SITE):
  more = {
    'seed': seed, 'store.window': 2, 'store.site': site,
    'train.rows': (64 - 1) * SHARD,
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


def words(text):
  """12,000 words of the tiny model's."""
  text.mkdir()
  rng = np.random.default_rng(0)
  for i in range(12):
    numbers = rng.integers(0, 37, 1000)
    (text / f'{i:03d}.txt').write_text(' '.join(f'w{n}' for n in numbers))
  return text


@pytest.mark.slow
def test_killed_at_random_the_batches_are_those_of_a_whole_store(tmp_path):
  text = words(tmp_path / 'text')
  whole, store = tmp_path / 'whole', tmp_path / 'store'
  harvest = spawn_harvest(text, whole, 0)
  assert harvest.wait(timeout=120) == 0, harvest.stderr.read()
  alone = [
    spawn_trainer(tmp_path / f'whole{i}', whole, i, site)
    for i, site in HARVESTED.items()
  ]
  for trainer in alone:
    assert trainer.wait(timeout=120) == 0, trainer.stderr.read()
  manifest = read_manifest(whole)
  # Held-out and normaliser shard, two windows of 2, 2 checkpoints of 4 batches.
  shards = sum(shard_bytes(manifest, s) for s in range(2 + 4 + 4))
  least = budget.planned_bytes(manifest) + shards
  jobs = {
    'harvest': lambda: spawn_harvest(text, store, least),
    1: lambda: spawn_trainer(tmp_path / 'run1', store, 1, HARVESTED[1]),
    2: lambda: spawn_trainer(tmp_path / 'run2', store, 2, HARVESTED[2]),
  }
  running, errors = {'harvest': jobs['harvest']()}, dict.fromkeys(jobs, '')
  while not (store / 'manifest.json').exists():
    assert running['harvest'].poll() is None, running['harvest'].stderr.read()
    time.sleep(0.05)
  running |= {i: jobs[i]() for i in (1, 2)}
  most, kills, rng = 0, 0, random.Random(0)
  began, due = time.monotonic(), time.monotonic() + 4
  while running:
    assert time.monotonic() - began < 240, errors
    time.sleep(0.05)
    most = max(most, disk_bytes(store))
    for name, process in list(running.items()):
      if process.poll() is not None:
        errors[name] += process.stderr.read()
        assert process.returncode in (0, -signal.SIGKILL), errors[name]
        del running[name]
        if process.returncode:
          running[name] = jobs[name]()
    if running and kills < 3 and time.monotonic() > due:
      rng.choice(list(running.values())).kill()
      kills, due = kills + 1, time.monotonic() + rng.uniform(1, 4)
  assert kills == 3
  manifest = read_manifest(store)
  removed = [s for s, entry in enumerate(manifest.shards) if entry.removed]
  assert removed == [*range(2, removed[-1] + 1)]
  # The bound holds: all shards never lay on the disk together.
  assert most <= shards < 64 * shard_bytes(manifest, 0)
  for i in (1, 2):
    assert metrics(tmp_path / f'run{i}') == metrics(tmp_path / f'whole{i}')
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
    step = run / 'checkpoints' / '8'  # of windows of 2 shards, two are whole
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


@pytest.mark.parametrize(
  'key, value, message',
  [
    ('train.keep_rows', 64, 'train.keep_rows=64: .* set it to 0'),
    ('train.rows', 63 * SHARD + 1, 'is read once, .* give 8064 at most'),
    ('train.batch_rows', 112 * 16, 'is read once, .* give 7168 at most'),
    ('train.save_rows', 1, None),  # every batch then
    ('store.window', 3, 'two windows of 3'),
    ('train.keep', 3, 'and 6 shards between'),
  ],
)
def test_runs_that_a_budget_cannot_feed(tmp_path, key, value, message):
  begin(tmp_path / 'store')
  source = BatchSource(tmp_path / 'store', SITE, BATCH, seed=0, window=2)
  config = base_config()
  config.store.window, config.train.rows = 2, 63 * SHARD
  config.train.batch_rows = BATCH
  config.train.keep, config.train.save_rows = 2, 4 * BATCH
  growing.check(config, source, source.manifest)
  block, _, name = key.partition('.')
  config[block][name] = value
  if message is None:
    growing.check(config, source, source.manifest)
    config.train.batch_rows, config.train.keep = 7 * SHARD, 1
    message = 'and 7 shards between'
  with pytest.raises(UserError, match=message):
    growing.check(config, source, source.manifest)


def test_a_jump_past_what_is_read_once_stops(tmp_path, monkeypatch):
  begin(tmp_path / 'store', keep_bytes=10 * LEAST, trainers=1)
  with open_writer(tmp_path / 'store') as writer:
    writer.write(0, {SITE: planted_rows(ROWS)[0]})
  config = base_config()
  config.store.path, config.store.site = str(tmp_path / 'store'), SITE
  config.store.window, config.sae.d_in, config.sae.latents = 2, D, 64
  config.train.rows, config.train.batch_rows = 63 * SHARD, BATCH
  config.train.save_rows = 100 * BATCH
  config.train.eval_rows, config.train.max_skipped = 0, 4
  bad = test_skipping.nan_at(3, 4, 5, 6)
  test_skipping.changed_batches(monkeypatch, bad)
  message = (
    f'and {7 * BATCH} rows were gone around: give {63 * SHARD - 7 * BATCH} at'
  )
  with pytest.raises(UserError, match=message):
    loop.train(config, str(tmp_path / 'run'))


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
  # One that lost its checkpoints cannot claim them either.
  with pytest.raises(UserError, match='which /runs/a needs'):
    budget.register(root, budget.Trainer('/runs/a', 1))
  assert budget.read_trainers(root) == [budget.Trainer('/runs/a', 5)]
  source = BatchSource(root, SITE, BATCH, seed=0, window=2)
  with pytest.raises(UserError, match='was removed after its trainers'):
    skipping.readable(source, 'skip')[2]
  assert [source.first_shard(i * SHARD) for i in (0, 2, 3, 6, 7)] == [
    1, 3, 3, 7, 8,
  ]  # fmt: skip
