"""Rows of a hundred times the others' norm: found, left out, counted."""

import ml_dtypes
import numpy as np
import pytest

from sae_jax.store import quantise, reader
from sae_jax.store.batches import BatchSource
from sae_jax.store.create import create, new_folder, write_arrays
from sae_jax.store.finish import reopen
from sae_jax.store.manifest import Site, read_manifest
from sae_jax.store.plan import pack_keep, plan
from sae_jax.store.statistics import beyond, moments, norms, stand_in
from sae_jax.store.verify import verify
from sae_jax.store.writer import open_writer

WIDTH, ROWS, BLOCK = 12, 300, 16


def planted(large=(5, 70, 71, 200)):
  """Rows of norm 3 to 6; those named have a hundred times as much."""
  x = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
  x += 0.7
  x[list(large)] *= 100 * 4 / norms(x[list(large)])[:, None]
  return x


def bounded(root, x, dtype, max_norm):
  """A store of one site whose rows beyond `max_norm` are left out."""
  site = Site('a', WIDTH, dtype, max_norm=max_norm)
  if dtype == 'int8':
    columns = quantise.columns(moments(x))
    site = Site('a', WIDTH, dtype, *columns, max_norm)
  sequences = np.zeros((ROWS, 2), np.int32)
  keep = pack_keep(np.tile([False, True], (ROWS, 1)))
  manifest = plan(
    sequences, keep, [site], rows=ROWS, rows_per_shard=64,
    rows_per_block=BLOCK, held_out_shards=1, norm_shards=1, seed=0, model={},
    text={}, policy={}, config={}, made_by={},
  )  # fmt: skip
  with new_folder(root) as folder:
    create(folder, manifest, sequences, keep)
  with open_writer(folder) as writer:
    dtype = ml_dtypes.bfloat16 if dtype == 'bfloat16' else np.float32
    writer.write(0, {'a': x.astype(dtype)})
    return writer.finish()


@pytest.fixture
def store(tmp_path):
  write_arrays(
    tmp_path / 's', {'a': planted()}, rows_per_shard=64, rows_per_block=BLOCK
  )
  return tmp_path / 's'


def test_rows_that_are_not_finite_are_not_beyond_a_bound():
  x = np.full((4, 3), 2e18, np.float32)  # whose squares overflow
  x[0], x[1, 1], x[2, 2] = 1, np.nan, np.inf
  np.testing.assert_array_equal(beyond(x, 10), [False, False, False, True])
  assert beyond(x.astype(ml_dtypes.bfloat16), 10).sum() == 1


def test_others_of_the_block_stand_in():
  x = planted()[:80]
  y = x.copy()
  stand_in(y, 40)
  np.testing.assert_array_equal(y[[5, 70, 71]], x[[0, 1, 2]])
  y[[5, 70, 71]] = x[[5, 70, 71]]
  np.testing.assert_array_equal(y, x)
  y = x[70:72].copy()  # none is left: all are scaled
  stand_in(y, 40)
  np.testing.assert_allclose(y, x[70:72] * 40 / norms(x[70:72])[:, None], 1e-6)


def test_what_share_of_the_variance_they_carry(store):
  x, large = planted(), [5, 70, 71, 200]
  found = reader.outliers(store, 'a', [x[:64], x[64:]])
  mean = reader.normalizer(store, 'a').mean.astype(np.float64)
  squares = np.square(x - mean).sum(1)
  assert found['count'] == 4 and '4 of 300 rows' in found['said']
  share = squares[large].sum() / squares.sum()
  np.testing.assert_allclose(found['share'], share, 1e-6)


def test_batches_without_them_whoever_reads_which_part(store):
  whole = BatchSource(store, 'a', 64, seed=0, window=2)
  few = BatchSource(store, 'a', 64, seed=0, window=2, max_norm=10)
  thirds = [
    BatchSource(store, 'a', 64, seed=0, window=2, max_norm=10, parts=[i], of=2)
    for i in range(2)
  ]
  replaced = 0
  for i in range(3):  # an epoch
    x, y = whole[i], few[i]
    assert norms(y).max() < 10 < 20 * norms(x).min()
    np.testing.assert_array_equal(np.concatenate([s[i] for s in thirds]), y)
    for at in range(0, 64, BLOCK):
      assert {r.tobytes() for r in y[at : at + BLOCK]} <= {
        r.tobytes() for r in x[at : at + BLOCK]
      }
    replaced += int((x != y).any(1).sum())
  assert replaced == 3  # one is held out


def test_held_out_rows_and_the_normaliser_without_them(store):
  bound = reader.bound_of(store, 'a', 10)
  rows, tokens = zip(*reader.held_out(store, 'a', bound), strict=True)
  at = np.concatenate(tokens)[:, 0]  # the row's number
  assert sorted(at) == [i for i in range(64) if i != 5]
  np.testing.assert_array_equal(np.concatenate(rows), planted()[at])
  x = np.delete(planted()[64:128], [6, 7], 0).astype(np.float64)
  mean, centred, _ = reader.normalizer(store, 'a', bound)
  np.testing.assert_allclose(mean, x.mean(0), 1e-6)
  np.testing.assert_allclose(centred, x.var(0).sum(), 1e-6)
  assert reader.normalizer(store, 'a').mean_squared_norm_centred > 100 * centred


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_a_store_with_a_bound_of_its_own(tmp_path, dtype):
  # All rows of the last shard are beyond it: there is nothing to average.
  x = planted([5, 70, 71, 200, *range(256, 300)])
  m = bounded(tmp_path, x, dtype, 40.0)
  (site,) = m.sites
  assert site.all_rows == ROWS - 48 and site.all_max_abs < 40
  shards = range(len(m.shards))
  blocks = [r for r, _ in reader.shard_blocks(tmp_path, 'a', shards)]
  rows = np.concatenate(blocks)
  rows = rows[norms(rows) <= 40]
  assert len(rows) == ROWS - 48
  rows = rows.astype(np.float64)
  np.testing.assert_allclose(site.all_mean, rows.mean(0), 1e-9)
  batches = BatchSource(tmp_path, 'a', 64, seed=0, window=2)
  assert norms(np.concatenate([batches[i] for i in range(2)])).max() < 41
  checks = verify(tmp_path) + verify(tmp_path, exact=True)
  assert not any(check.problems or check.warnings for check in checks)
  assert '48 are left out' in checks[-1].looked_at
  assert reopen(tmp_path, m).sites[0].max_norm == 40  # written again: the same


def test_a_count_that_contradicts_the_records_is_found(tmp_path):
  bounded(tmp_path, planted(), 'float32', 40.0)
  path = tmp_path / 'manifest.json'
  path.write_text(
    path.read_text().replace('"all_rows": 296', '"all_rows": 297')
  )
  (line,) = [p.text for check in verify(tmp_path) for p in check.problems]
  assert 'all_rows are not those of the records' in line


def test_verification_warns_of_them(store, tmp_path):
  (*_, check) = verify(store)
  (line,) = check.warnings
  assert '2 of 64 rows' in line and '97.5% of the variance' in line
  assert 'store.max_norm=10' in line and not check.problems
  assert '4 of 300 rows' in verify(store, exact=True)[-1].looked_at
  write_arrays(
    tmp_path / 'ordinary', {'a': planted([])}, rows_per_shard=64,
    rows_per_block=BLOCK,
  )  # fmt: skip
  (*_, check) = verify(tmp_path / 'ordinary')
  assert not check.warnings and ' 0 of 64 rows' in check.looked_at


def test_a_store_from_before_the_bound(store):
  m = read_manifest(store)
  assert not m.sites[0].max_norm and m.sites[0].all_rows is None
  path = store / 'manifest.json'
  lines = path.read_text().splitlines(keepends=True)
  kept = [s for s in lines if '"max_norm"' not in s and '"all_rows"' not in s]
  text = ''.join(kept).replace(',\n  }', '\n  }')
  assert len(kept) == len(lines) - 2
  path.write_text(text)
  assert read_manifest(store) == m
