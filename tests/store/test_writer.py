"""Rows reach their place, statistics are numpy's, interruptions leave no
trace in the bytes, and a folder that is not ours stays as it was."""

import dataclasses
import errno
import json

import ml_dtypes
import numpy as np
import pytest
import xxhash

from sae_jax.errors import UserError
from sae_jax.store import folder, writer
from sae_jax.store.create import create, new_folder, write_arrays
from sae_jax.store.finish import finalize
from sae_jax.store.manifest import Site, blocks_path, read_manifest
from sae_jax.store.order import shard_order
from sae_jax.store.plan import pack_keep, plan
from sae_jax.store.writer import open_writer

pytestmark = pytest.mark.smoke
ROWS, WIDTH = 150, 6  # shards of 64, 64 and 22 rows, blocks of 16


def world(rows=ROWS, seed=5, config=None, sites=('a', 'b')):
  """(manifest, sequences, keep, {site: rows in global order})."""
  rng = np.random.default_rng(0)
  sequences = rng.integers(0, 50, (40, 8)).astype(np.int32)
  keep = rng.random((40, 8)) < 0.7
  keep[:, 0] = False
  keep[7] = False  # a sequence without any row
  needed = int(np.searchsorted(np.cumsum(keep.sum(1)), rows)) + 1
  sequences, keep = sequences[:needed], keep[:needed]
  x = rng.normal(3, 1, (rows, WIDTH)).astype(np.float32)
  values = {'a': x, 'b': (2 * x).astype(ml_dtypes.bfloat16)}
  dtypes = {'a': 'float32', 'b': 'bfloat16'}
  manifest = plan(
    sequences, pack_keep(keep), [Site(s, WIDTH, dtypes[s]) for s in sites],
    rows=rows, rows_per_shard=64, rows_per_block=16, held_out_shards=1,
    norm_shards=2, seed=seed, model={'weights_sha256': 'm'},
    text={'sha256': 't'}, policy={}, config=config or {'store': {'n': 1}},
    made_by={'git_revision': 'unknown'},
  )  # fmt: skip
  return manifest, sequences, keep, {site: values[site] for site in sites}


def begin(root, **kwargs):
  """The folder with the world's plan in it, and the world's rows."""
  manifest, sequences, keep, values = world(**kwargs)
  with new_folder(root) as path:
    create(path, manifest, sequences, pack_keep(keep))
  return path, values


def write_all(root, chunk=13, stop=None, shards=None, **kwargs):
  """Writes the world in chunks; leaves after `stop` rows, if given."""
  root, values = begin(root, **kwargs)
  with open_writer(root, shards) as w:
    manifest = w.manifest
    while w.missing:
      first = w.next_row()
      if stop is not None and first >= stop:
        return None
      part = slice(first, min(first + chunk, manifest.rows))
      w.write(first, {site: v[part] for site, v in values.items()})
    return w.finish() if shards is None else None


def contents(root):
  return {
    path.relative_to(root).as_posix(): path.read_bytes()
    for path in root.rglob('*')
    if path.is_file()
  }


def test_every_row_lies_at_its_permuted_place(tmp_path):
  manifest, (_, sequences, keep, values) = write_all(tmp_path), world()
  where = np.argwhere(keep)[:ROWS]
  for shard, rows in enumerate([64, 64, 22]):
    ids = 64 * shard + shard_order(rows, 5, shard)
    assert sorted(ids) == list(range(64 * shard, 64 * shard + rows))
    name = f'shard-{shard:05d}-of-00003.bin'
    for site, dtype in [('a', '<f4'), ('b', ml_dtypes.bfloat16)]:
      raw = (tmp_path / 'sites' / site / name).read_bytes()
      stored = np.frombuffer(raw, dtype).reshape(rows, WIDTH)
      np.testing.assert_array_equal(stored, values[site][ids])
    raw = (tmp_path / 'tokens' / name).read_bytes()
    tokens = np.frombuffer(raw, '<i4').reshape(rows, 3)
    np.testing.assert_array_equal(tokens[:, :2], where[ids])
    np.testing.assert_array_equal(tokens[:, 2], sequences[tuple(where[ids].T)])
  assert manifest.state == 'complete'
  assert read_manifest(tmp_path) == manifest


def test_sequences_lie_with_the_shard_of_their_first_row(tmp_path):
  manifest, (_, sequences, keep, _) = write_all(tmp_path), world()
  first_rows = np.concatenate([[0], np.cumsum(keep.sum(1))])[:-1]
  found = []
  for shard, entry in enumerate(manifest.shards):
    name = f'sequences/shard-{shard:05d}-of-00003.bin'
    mine = np.frombuffer((tmp_path / name).read_bytes(), '<i4').reshape(-1, 8)
    assert entry.first_sequence == len(found)
    found += mine.tolist()
    part = first_rows[entry.first_sequence :][: len(mine)]
    assert set(part // 64) == {shard}
  assert found == sequences.tolist()


def test_checksums_cover_every_file(tmp_path):
  manifest = write_all(tmp_path)
  row_bytes = {
    'sites/a': 24, 'sites/b': 12, 'tokens': 12, 'sequences': 32, 'keep': 1,
  }  # fmt: skip
  for entry in manifest.shards:
    assert len(entry.files) == 5
    for name, file in entry.files.items():
      raw = (tmp_path / name).read_bytes()
      step = 16 * row_bytes[name.rpartition('/')[0]]
      sums = b''.join(
        xxhash.xxh3_64_intdigest(raw[at : at + step]).to_bytes(8, 'little')
        for at in range(0, len(raw), step)
      )
      assert (tmp_path / blocks_path(name)).read_bytes() == sums
      assert file.checksum == xxhash.xxh3_64_hexdigest(sums)
      assert file.bytes == len(raw)


def test_statistics_are_numpys_over_the_training_shards(tmp_path):
  manifest, (*_, values) = write_all(tmp_path), world()
  for site in manifest.sites:
    x = values[site.name][64:].astype(np.float64)
    np.testing.assert_allclose(site.mean, x.mean(0), rtol=1e-14)
    centred = np.square(x - x.mean(0)).sum(1).mean()
    assert site.mean_squared_norm_centred == pytest.approx(centred, rel=1e-13)
    raw = np.square(x).sum(1).mean()
    assert site.mean_squared_norm_raw == pytest.approx(raw, rel=1e-13)
    x = values[site.name].astype(np.float64)  # and of all shards
    np.testing.assert_allclose(site.all_mean, x.mean(0), rtol=1e-14)
    centred = np.square(x - x.mean(0)).sum(1).mean()
    found = site.all_mean_squared_norm_centred
    assert found == pytest.approx(centred, rel=1e-13)
    raw = np.square(x).sum(1).mean()
    assert site.all_mean_squared_norm_raw == pytest.approx(raw, rel=1e-13)


def test_statistics_keep_a_small_spread_on_a_large_mean(tmp_path):
  rng = np.random.default_rng(0)
  x = (1e6 + rng.normal(size=(104, 2))).astype(np.float32)
  sizes = dict(rows_per_shard=26, rows_per_block=13, norm_shards=3)
  manifest = write_arrays(tmp_path, {'a': x}, **sizes)
  exact = x[26:].astype(np.longdouble)
  exact = np.square(exact - exact.mean(0)).sum(1).mean()
  found = manifest.sites[0].mean_squared_norm_centred
  assert found == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.parametrize('stop', [0, 13, 65, 128, 140])
def test_an_interrupted_store_ends_with_the_same_bytes(tmp_path, stop):
  write_all(tmp_path / 'whole')
  write_all(tmp_path / 'cut', stop=stop)
  (tmp_path / 'cut' / 'sites').mkdir(exist_ok=True)
  (tmp_path / 'cut' / 'sites' / 'left-over.tmp').write_text('half')
  assert read_manifest(tmp_path / 'cut', complete=False).state == 'writing'
  with pytest.raises(UserError, match='not complete'):
    read_manifest(tmp_path / 'cut')
  write_all(tmp_path / 'cut', chunk=7)
  assert contents(tmp_path / 'cut') == contents(tmp_path / 'whole')


@pytest.mark.parametrize('damage', ['cut off', 'gone', 'no record', 'blocks'])
def test_a_damaged_shard_is_written_again(tmp_path, damage):
  write_all(tmp_path)
  before = contents(tmp_path)
  path = tmp_path / 'sites/a/shard-00001-of-00003.bin'
  if damage == 'cut off':
    path.write_bytes(path.read_bytes()[:-1])
  elif damage == 'gone':
    path.unlink()
  elif damage == 'no record':
    (tmp_path / 'records/shard-00001-of-00003.json').unlink()
  else:
    path.with_suffix('.blocks').write_bytes(b'8' * 32)
  written = []
  root, values = begin(tmp_path)
  with open_writer(root) as w:
    assert w.missing == [1] and w.next_row() == 64
    assert read_manifest(tmp_path, complete=False).state == 'writing'
    for first in range(60, 150, 10):  # from before the shard to after it
      part = slice(first, first + 10)
      rows = {site: v[part] for site, v in values.items()}
      written.append(w.write(first, rows))
    w.finish()
  assert sum(written) == 64
  assert contents(tmp_path) == before


def test_a_run_on_a_complete_store_changes_nothing(tmp_path):
  write_all(tmp_path)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.bin')}
  write_all(tmp_path)
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.bin')} == before


def test_another_harvest_is_refused_and_named(tmp_path):
  write_all(tmp_path)
  before = contents(tmp_path)
  for kwargs, named in [
    (dict(config={'store': {'n': 2, 'path': 'x'}}), r'different: store\.n:'),
    (dict(rows=145), 'different: rows, tokens:'),
    (dict(seed=6), 'different: seed:'),
    (dict(sites=('a',)), 'different: sites:'),
  ]:
    with pytest.raises(UserError, match=named):
      write_all(tmp_path, **kwargs)
  manifest, sequences, keep, _ = world()
  other = dataclasses.replace(manifest, model={'weights_sha256': 'other'})
  with pytest.raises(UserError, match=r'model \(weights_sha256\)'):
    with new_folder(tmp_path) as root:
      create(root, other, sequences, pack_keep(keep))
  assert contents(tmp_path) == before


def test_where_files_lie_is_no_difference(tmp_path):
  write_all(tmp_path, config={'store': {'n': 1}, 'text': {'path': 'here'}})
  config = {'store': {'n': 1}, 'text': {'path': 'there'}}
  assert write_all(tmp_path, config=config).config['text']['path'] == 'here'


def test_a_folder_with_other_things_is_refused(tmp_path):
  (tmp_path / 'thesis.tmp').write_text('mine')
  (tmp_path / 'photos').mkdir()
  with pytest.raises(UserError, match='not an empty folder'):
    write_all(tmp_path)
  assert set(contents(tmp_path)) == {'thesis.tmp'}
  with pytest.raises(UserError, match='not an empty folder'):
    write_all(tmp_path / 'thesis.tmp')
  with pytest.raises(UserError, match='mount the bucket'):
    write_all('gs://bucket/store')


def test_a_second_writer_of_a_shard_is_refused(tmp_path):
  root, values = begin(tmp_path)
  rows = {site: v[:10] for site, v in values.items()}
  with open_writer(root) as w:
    w.write(0, rows)
    with pytest.raises(UserError, match='another harvest is writing'):
      with open_writer(root) as second:
        second.write(0, rows)
  write_all(tmp_path)


@pytest.mark.parametrize('tasks', [2, 3])
def test_tasks_write_the_bytes_of_one(tmp_path, tasks):
  write_all(tmp_path / 'one')
  for i in reversed(range(tasks)):
    write_all(tmp_path / 'many', shards=range(i, 3, tasks))
    if i:
      with pytest.raises(UserError, match='not written yet .the first is 0.'):
        finalize(tmp_path / 'many')
  finalize(tmp_path / 'many')
  assert contents(tmp_path / 'many') == contents(tmp_path / 'one')


def test_rows_out_of_order_are_a_mistake_of_the_program(tmp_path):
  root, values = begin(tmp_path)
  with open_writer(root) as w:
    rows = {site: v[:10] for site, v in values.items()}
    w.write(0, rows)
    with pytest.raises(ValueError, match='row 0, expected 10'):
      w.write(0, rows)
    with pytest.raises(ValueError, match='beyond the last, 150'):
      w.write(145, rows)
    with pytest.raises(UserError, match='not written yet'):
      w.finish()


def test_a_row_that_is_not_finite_stops_the_harvest(tmp_path):
  x = np.ones((64, 3), np.float32)
  x[50, 1] = np.nan
  sizes = dict(rows_per_shard=32, rows_per_block=8)
  with pytest.raises(UserError, match=r'a: .* 50 \(shard 1\) holds NaN'):
    write_arrays(tmp_path, {'a': x}, **sizes)
  assert not list(tmp_path.rglob('*.tmp'))


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(
  tmp_path, monkeypatch
):
  def full(path, size):
    path.write_bytes(b'0')
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(writer, 'allocate', full)
  with pytest.raises(UserError, match='No space left on device'):
    write_all(tmp_path)
  monkeypatch.undo()
  write_all(tmp_path)

  usage = folder.shutil.disk_usage('/')
  monkeypatch.setattr(
    folder.shutil, 'disk_usage', lambda _: usage._replace(free=100)
  )
  with pytest.raises(UserError, match='GB free'):
    write_all(tmp_path / 'other')


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(rows_per_shard=65), 'use 64'),
    (dict(rows_per_block=0), 'rows_per_block'),
    (dict(held_out_shards=-1), 'held_out_shards'),
    (dict(norm_shards=0), 'norm_shards'),
    (dict(held_out_shards=3), 'at least 208'),
    (dict(norm_shards=3), 'at least 208'),
  ],
)
def test_sizes_that_do_not_fit(tmp_path, change, message):
  sizes = dict(
    rows_per_shard=64, rows_per_block=16, held_out_shards=1, norm_shards=1
  )
  x = np.zeros((150, 2), np.float32)
  with pytest.raises(UserError, match=message):
    write_arrays(tmp_path / 's', {'a': x}, **(sizes | change))
  assert not (tmp_path / 's').exists()


def test_dtype_names_the_nearest(tmp_path):
  x = np.zeros((150, 2), np.float16)
  with pytest.raises(UserError, match="did you mean 'bfloat16'"):
    write_arrays(tmp_path, {'a': x}, rows_per_shard=64, rows_per_block=16)


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(version=3), 'store version 3.*update sae_jax'),
    (dict(version=1), 'store version 1.*harvest again'),
    (dict(format='tar'), 'not the manifest'),
    (dict(shards=[{}]), 'damaged manifest'),
    (dict(sites=None), 'damaged manifest'),
  ],
)
def test_a_manifest_that_is_not_ours(tmp_path, change, message):
  write_all(tmp_path)
  path = tmp_path / 'manifest.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(UserError, match=message):
    read_manifest(tmp_path)


def test_no_manifest(tmp_path):
  with pytest.raises(UserError, match='no activation store'):
    read_manifest(tmp_path / 'nowhere')
  (tmp_path / 'manifest.json').write_text('{')
  with pytest.raises(UserError, match='not a JSON file'):
    read_manifest(tmp_path)
