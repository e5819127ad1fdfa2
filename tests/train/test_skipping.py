"""Updates and rows that are left out: masked, counted, gone around."""

import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_runs import ROOT, SITE, D

from sae_jax.errors import UserError
from sae_jax.store.batches import BatchSource
from sae_jax.train import checkpoints, loop, skipping
from sae_jax.train.step import make_step


@pytest.fixture
def config(store):
  sys.path.insert(0, str(ROOT / 'configs'))
  import topk  # type: ignore[import]

  c = topk.get_config('demo')
  c.store.path, c.store.site, c.sae.d_in = str(store), SITE, D
  c.sae.latents, c.act.k, c.loss.aux_k, c.loss.dead_rows = 64, 4, 8, 512
  c.train.batch_rows = c.train.log_rows = 64
  c.train.rows, c.train.save_rows, c.train.eval_rows = 40 * 64, 640, 0
  return c


def changed_batches(monkeypatch, change):
  """Lets the loop read change(source, i) as batch i."""

  class Changed:
    def __init__(self, source):
      self.source, self.batch_rows = source, source.batch_rows

    def __len__(self):
      return len(self.source)

    def __getitem__(self, i):
      return change(self.source, i)

  monkeypatch.setattr(skipping, 'readable', lambda source, _: Changed(source))


def nan_at(*bad):
  return lambda source, i: source[i] * (np.nan if i in bad else 1)


def end_of(workdir):
  step = checkpoints.find_step(workdir)
  return step, checkpoints.read_meta(workdir, step)


def same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def test_a_batch_with_a_bad_block_is_skipped_on_any_mesh(
  tmp_path, store, config, monkeypatch
):
  bad = tmp_path / 'store'
  shutil.copytree(store, bad)
  source = BatchSource(bad, SITE, 64, seed=0, window=8)
  shard, block = source._locate(12 * 4 + 2)
  file = next((bad / 'sites').rglob(f'shard-{shard:05d}-of-*.bin'))
  data = bytearray(file.read_bytes())
  data[block * 16 * D * 4] ^= 1
  file.write_bytes(data)
  config.store.path = str(bad)
  with pytest.raises(UserError, match=f'{file.name}: block {block}'):
    loop.train(config, str(tmp_path / 'stop'))
  config.train.on_bad_block = 'skip'
  ends = {}
  for mesh in ((1, 1), (2, 4)):
    config.mesh.data, config.mesh.dict = mesh
    ends[mesh] = loop.train(config, str(tmp_path / f'skip{mesh[0]}'))
    step, meta = end_of(tmp_path / f'skip{mesh[0]}')
    assert (step, meta['skipped'], meta['jumps']) == (40, 1, [])
    text = (tmp_path / f'skip{mesh[0]}' / 'metrics.jsonl').read_text()
    assert '"train/skipped": 1.0' in text.splitlines()[-1]
  a, b = (jax.device_get(jax.tree.leaves(s)) for s in ends.values())
  for x, y in zip(a, b, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-3)
  # Cut off before the start: each of its 16 blocks costs a batch, if read.
  file.write_bytes(bytes(data[: len(data) // 2]))
  with pytest.raises(UserError, match=file.name):
    config.train.on_bad_block = 'stop'
    loop.train(config, str(tmp_path / 'cut'))
  config.train.on_bad_block = 'skip'
  loop.train(config, str(tmp_path / 'cut'))
  skipped = end_of(tmp_path / 'cut')[1]['skipped']
  assert 5 < skipped <= 16
  file.unlink()
  loop.train(config, str(tmp_path / 'gone'))
  assert end_of(tmp_path / 'gone')[1]['skipped'] >= skipped
  # Exactly as if that batch had not been finite.
  config.store.path = str(store)
  config.mesh.data, config.mesh.dict = 1, 1
  changed_batches(monkeypatch, nan_at(12))
  same(ends[1, 1], loop.train(config, str(tmp_path / 'nan')))


def test_too_many_in_a_row_are_gone_around(
  tmp_path, config, monkeypatch, caplog
):
  """22 to 25 are bad: back to step 20, on with batch 26."""
  config.train.max_skipped = 4
  held, restore_or_init = [], loop.restore_or_init

  def noting(*args):
    held.append(sum(a.nbytes for a in jax.live_arrays()))
    return restore_or_init(*args)

  with monkeypatch.context() as patch:
    patch.setattr(loop, 'restore_or_init', noting)
    changed_batches(patch, nan_at(5, 22, 23, 24, 25))
    state = loop.train(config, str(tmp_path / 'run'))
  assert len(held) == 2 and held[1] <= held[0]  # the first state is gone
  step, meta = end_of(tmp_path / 'run')
  assert step == 40 and meta['position'] == 46 * 64
  assert meta['jumps'] == [[20 * 64, 26 * 64]]
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) == 40  # what was before going back is not there twice
  skip = lambda source, i: nan_at(5)(source, i if i < 20 else i + 6)
  changed_batches(monkeypatch, skip)
  same(state, loop.train(config, str(tmp_path / 'without')))


def test_the_same_place_again_stops(tmp_path, config, monkeypatch):
  config.train.max_skipped = 4
  changed_batches(monkeypatch, nan_at(*range(22, 99)))
  with pytest.raises(UserError, match='again, after going back to step 20'):
    loop.train(config, str(tmp_path))
  assert end_of(tmp_path)[0] == 20


def test_skips_in_a_row_outlive_a_restart(tmp_path, config, monkeypatch):
  """Stopped in the middle of the row at step 20, saved there: it goes back to
  step 10 all the same."""
  config.train.max_skipped = 4
  changed_batches(monkeypatch, nan_at(18, 19, 20, 21))
  state = loop.train(config, str(tmp_path / 'whole'))
  whole, halves = end_of(tmp_path / 'whole')[1], tmp_path / 'halves'
  with monkeypatch.context() as patch:
    patch.setattr(loop, 'stop_signals', stop_at(20))
    with pytest.raises(SystemExit):
      loop.train(config, str(halves))
  assert end_of(halves)[1]['skipped_in_a_row'] == 2
  same(state, loop.train(config, str(halves)))
  assert end_of(halves)[1]['jumps'] == whole['jumps'] == [[10 * 64, 22 * 64]]


def test_going_back_leaves_older_checkpoints_alone(
  tmp_path, config, monkeypatch, caplog
):
  """Step 10 was saved in a row of skips that ended, 20 is damaged."""
  config.train.max_skipped, config.train.keep = 4, 9
  with monkeypatch.context() as patch:
    changed_batches(patch, nan_at(8, 9))
    patch.setattr(loop, 'stop_signals', stop_at(10))
    with pytest.raises(SystemExit):
      loop.train(config, str(tmp_path))
  changed_batches(monkeypatch, nan_at(8, 9, *range(33, 37)))
  forget = skipping.forget

  def damaging(run_dir, began):
    path = checkpoints.folder(tmp_path) / '20' / 'meta' / 'record.json'
    path.write_text('damaged')
    forget(run_dir, began)

  monkeypatch.setattr(skipping, 'forget', damaging)
  with monkeypatch.context() as patch:
    patch.setattr(loop, 'stop_signals', stop_at(34 - 10))
    with pytest.raises(SystemExit):
      loop.train(config, str(tmp_path))
  assert checkpoints.kept_steps(tmp_path) == [10, 20, 30, 34]
  loop.train(config, str(tmp_path))
  # 34 lay within the stretch.
  assert checkpoints.kept_steps(tmp_path) == [10, 20, 30, 40]
  assert end_of(tmp_path)[1]['jumps'] == [[30 * 64, 37 * 64]]


def stop_at(step):
  import contextlib
  import itertools

  calls = itertools.count()
  return lambda: contextlib.nullcontext(
    lambda: 15 if next(calls) >= step else 0
  )


def test_the_only_reads_are_late_metrics(tmp_path, config, monkeypatch):
  """Between two steps the loop waits for the step before, for nothing else."""
  events = []
  array = type(jnp.zeros(1))
  value = array._value.fget  # type: ignore[attr-defined]

  def noted(self):
    events.append(id(self))
    return value(self)

  def make(config):
    step, kept = make_step(config), []

    def noting(state, x):
      state, m = step(state, x)
      kept.append(m)  # or an id may be used again
      events.append({id(v) for v in m.values()})
      return state, m

    return noting

  monkeypatch.setattr(loop, 'make_step', make)
  monkeypatch.setattr(array, '_value', property(noted))
  config.train.save_rows = config.train.rows
  loop.train(config, str(tmp_path))
  steps = [i for i, event in enumerate(events) if isinstance(event, set)]
  assert len(steps) == 40
  assert steps[1] == steps[0] + 1  # the first two follow each other
  for before, now, after in zip(steps, steps[1:], steps[2:], strict=False):
    assert set(events[now + 1 : after]) == events[before]
