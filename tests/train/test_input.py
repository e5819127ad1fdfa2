"""Batches on the devices before their step: which, how many, to which end."""

import json
import logging
import threading
import time
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_growing import BATCH, SHARD, begin
from test_growing import SITE as GROWING
from train_runs import ROOT, SITE, D, planted_rows

from sae_jax.errors import UserError
from sae_jax.parallel.mesh import make_mesh
from sae_jax.store import reader
from sae_jax.store.batches import BatchSource, train_batches
from sae_jax.store.create import write_arrays
from sae_jax.store.manifest import COMPLETE, read_manifest
from sae_jax.store.writer import open_writer
from sae_jax.train import loop, rows
from sae_jax.train.step import make_step


class Host:
  """Batches 0, 1, ... of a source, as train_batches gives them; counts them.

  Batch `bad` raises.
  """

  def __init__(self, source, bad=-1):
    self.source, self.bad = source, bad
    self.asked, self.closed = 0, False

  def __next__(self):
    i, self.asked = self.asked, self.asked + 1
    if i == self.bad:
      raise UserError(f'batch {i} is bad')
    return self.source[i]

  def close(self):
    self.closed = True


def source_of(store, batch=64):
  return BatchSource(store, SITE, batch, seed=0, window=8)


def threads():
  return [t for t in threading.enumerate() if t.name.startswith('input')]


def settled(host, asked):
  """Whether the host is asked for so many batches and then for no more."""
  limit = time.monotonic() + 20
  while host.asked < asked and time.monotonic() < limit:
    time.sleep(0.001)
  time.sleep(0.05)
  return host.asked == asked


def test_batches_in_order_and_two_ahead(store, mesh):
  source = source_of(store)
  host = Host(source)
  ahead = rows.Ahead(host, source)
  assert settled(host, 0)  # nothing before the first is asked for
  for i in range(6):
    x = ahead.next()
    np.testing.assert_array_equal(x, source[i])
    assert x.sharding == NamedSharding(mesh, P('data', None))
    assert settled(host, i + 1 + rows.AHEAD)
  del x
  before = sum(a.nbytes for a in jax.live_arrays())
  ahead.close()
  held = before - sum(a.nbytes for a in jax.live_arrays())
  assert held == rows.AHEAD * 64 * D * 4
  assert host.closed and not threads()


def test_an_error_comes_at_its_batch(store):
  source = source_of(store)
  with jax.set_mesh(make_mesh(1, 1)):
    host = Host(source, bad=3)
    ahead = rows.Ahead(host, source)
    for i in range(3):
      np.testing.assert_array_equal(ahead.next(), source[i])
      assert settled(host, i + 1 + rows.AHEAD)  # read and kept from batch 1 on
    with pytest.raises(UserError, match='batch 3 is bad'):
      ahead.next()
    ahead.close()
  assert host.closed and not threads()


def test_it_closes_while_it_waits_for_a_harvest(tmp_path):
  """Three shards are written; batches beyond wait, and end with the source."""
  m = begin(tmp_path / 'store', keep_bytes=0)
  x = planted_rows(3 * SHARD)[0]
  with open_writer(tmp_path / 'store') as writer:
    writer.write(0, {GROWING: x})
  assert m.shards[0].rows == SHARD
  source = BatchSource(tmp_path / 'store', GROWING, BATCH, seed=0, window=1)
  there = next(i for i in range(99) if source.missing(i) is not None)
  assert there == 4
  with jax.set_mesh(make_mesh(1, 1)):
    ahead = rows.Ahead(train_batches(source), source)
    for i in range(there):  # the reading beyond stops none of them
      np.testing.assert_array_equal(ahead.next(), source[i])
    began = time.monotonic()
    source.close()
    ahead.close()
    assert time.monotonic() - began < 10 and not threads()


def test_reading_beyond_what_is_written_goes_on(tmp_path):
  m = begin(tmp_path / 'store', keep_bytes=0)
  x = planted_rows(4 * SHARD)[0]
  with open_writer(tmp_path / 'store') as writer:
    writer.write(0, {GROWING: x[: 3 * SHARD]})
    source = BatchSource(tmp_path / 'store', GROWING, BATCH, seed=0, window=1)
    with jax.set_mesh(make_mesh(1, 1)):
      ahead = rows.Ahead(train_batches(source), source)
      for _ in range(4):
        ahead.next()
      assert source.missing(4) == 3
      writer.write(3 * SHARD, {GROWING: x[3 * SHARD :]})
      found = [ahead.next(), ahead.next()]
      source.close()
      ahead.close()
  assert m.shards[3].rows == SHARD
  lines = lambda parts: {row.tobytes() for part in parts for row in part}
  assert lines(map(np.asarray, found)) == lines([x[3 * SHARD :]])


@pytest.fixture
def config():
  import sys

  sys.path.insert(0, str(ROOT / 'configs'))
  import topk  # type: ignore[import]

  c = topk.get_config('demo')
  c.store.site, c.sae.d_in, c.sae.latents = SITE, D, 64
  c.act.k, c.loss.aux_k, c.loss.dead_rows = 4, 8, 512
  c.train.batch_rows = c.train.log_rows = 64
  c.train.rows, c.train.save_rows, c.train.eval_rows = 8 * 64, 640, 0
  return c


def stored(root, x, **more):
  write_arrays(root, {SITE: x}, rows_per_shard=256, rows_per_block=16, **more)
  return root


def test_bfloat16_rows_stay_so_up_to_the_step(tmp_path, config, monkeypatch):
  """No float32 copy on the host, and none made by putting."""
  x = planted_rows(1024)[0].astype(ml_dtypes.bfloat16)
  config.store.path = str(stored(tmp_path / 'small', x))
  seen = []

  def make(config):
    step = make_step(config)
    return lambda state, x: (seen.append(x.dtype), step(state, x))[1]

  monkeypatch.setattr(loop, 'make_step', make)
  loop.train(config, str(tmp_path / 'run'))
  assert set(seen) == {jnp.dtype('bfloat16')} and len(seen) == 8

  wide = np.zeros((1024, 2048), ml_dtypes.bfloat16)
  wide[:] = np.arange(2048) % 7
  root = tmp_path / 'wide'
  write_arrays(root, {SITE: wide}, rows_per_shard=512, rows_per_block=64)
  source = source_of(root, batch=512)
  with jax.set_mesh(make_mesh(2, 1)):
    ahead = rows.Ahead(train_batches(source), source)
    ahead.next()  # imports and first uses
    # numpy's memory is traced; batches themselves lie in mapped memory.
    tracemalloc.start()
    for _ in range(8):
      assert ahead.next().dtype == jnp.bfloat16
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    source.close()
    ahead.close()
  assert peak < 512 * 2048 * 4 / 4


def warnings_of(config, workdir, caplog):
  caplog.clear()
  with caplog.at_level(logging.WARNING, 'absl'):
    loop.train(config, str(workdir))
  return [r.getMessage() for r in caplog.records if 'bfloat16' in r.message]


def test_large_rows_in_bfloat16_are_told_once(tmp_path, config, caplog):
  x = planted_rows(1024)[0]
  x[:, 3] += 200  # a mean that is far from the largest
  x[900, 5] = -2.5e4
  config.store.path = str(stored(tmp_path / 'store', x))
  config.train.compute_dtype = 'float32'
  assert not warnings_of(config, tmp_path / 'float32', caplog)
  config.train.compute_dtype = 'bfloat16'
  (line,) = warnings_of(config, tmp_path / 'bfloat16', caplog)
  assert 'reach 2.5e+04' in line and 'mean of a column 200' in line
  x[900, 5] = -9.9e3
  config.store.path = str(stored(tmp_path / 'less', x))
  assert not warnings_of(config, tmp_path / 'run', caplog)


def old(root):
  """A store as it was before `max_abs`."""
  for path in [root / 'manifest.json', *(root / 'records').iterdir()]:
    data = json.loads(path.read_text())
    for site in data.get('sites', []):
      del site['all_max_abs']
    for moments in data.get('moments', {}).values():
      del moments['max_abs']
    path.write_text(json.dumps(data))


def test_an_older_store_says_at_least(tmp_path, config, caplog):
  from sae_jax.store.verify import problems

  x = planted_rows(1024)[0]
  x[:, 3] -= 3e4
  config.store.path = str(stored(tmp_path / 'store', x))
  largest = float(np.abs(x).max())
  whole = reader.sizes(tmp_path / 'store', SITE)
  assert whole.largest == largest and whole.exact
  old(tmp_path / 'store')
  found = reader.sizes(tmp_path / 'store', SITE)
  assert found.largest == found.mean and not found.exact
  np.testing.assert_allclose(found.mean, 3e4, rtol=1e-3)
  np.testing.assert_allclose(found.rms, np.sqrt(np.square(x).mean()), rtol=1e-4)
  assert list(problems(tmp_path / 'store')) == []
  config.train.compute_dtype = 'bfloat16'
  (line,) = warnings_of(config, tmp_path / 'run', caplog)
  assert 'reach at least 3e+04' in line


def test_sizes_of_a_store_that_grows(tmp_path):
  begin(tmp_path / 'store', keep_bytes=0)
  x = planted_rows(3 * SHARD)[0]
  with open_writer(tmp_path / 'store') as writer:
    writer.write(0, {GROWING: x})
  assert read_manifest(tmp_path / 'store', complete=False).state != COMPLETE
  norm = x[SHARD : 2 * SHARD]  # shard 0 is held out
  found = reader.sizes(tmp_path / 'store', GROWING)
  assert found.exact and found.largest == float(np.abs(norm).max())


def test_rows_of_huge_norm_are_told_and_left_out(tmp_path, config, caplog):
  x = planted_rows(1024)[0]
  large = np.arange(1024) % 256 == 5  # in every shard, held out too
  x[large] *= 100
  config.store.path = str(stored(tmp_path / 'store', x))
  with caplog.at_level(logging.INFO, 'absl'):
    rows.warn_of_norms(rows.open_source(config))
    (line,) = caplog.messages
    assert '1 of 256 rows' in line and '--config.store.max_norm=10' in line
    config.store.max_norm = 10.0
    state = loop.train(config, str(tmp_path / 'run'))
  assert [s for s in caplog.messages if s.endswith('are left out')]
  assert len([s for s in caplog.messages if 'max_norm=10' in s]) == 1
  norm = state.sae.norm_in  # of the rows 256 to 511 without row 261
  kept = np.delete(x[256:512], 5, 0)
  np.testing.assert_allclose(norm.mean, kept.mean(0), 1e-5)
  np.testing.assert_allclose(norm.scale, np.sqrt(kept.var(0).sum()), 1e-5)
  config.train.eval_rows = 64
  with jax.set_mesh(make_mesh(1, 1)):
    found = rows.held_out_rows(config, rows.open_source(config))
  assert found is not None and len(found) == 255
  assert np.linalg.norm(found, axis=1).max() < 10


def test_one_huge_number_beyond_the_sample_is_told(tmp_path, config, caplog):
  x = planted_rows(1024)[0]
  x[900, 5] = 2e3
  config.store.path = str(stored(tmp_path / 'store', x))
  source = rows.open_source(config)
  with caplog.at_level(logging.WARNING, 'absl'):
    rows.warn_of_norms(source)
  (line,) = caplog.messages
  assert 'reach 2e+03' in line and '0 of 256 rows' in line
