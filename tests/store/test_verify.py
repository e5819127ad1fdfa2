"""Every kind of damage is found by its own check, and nothing in a sound
store."""

import json

import damage
import ml_dtypes
import numpy as np
import pytest

from sae_jax.errors import UserError
from sae_jax.store.create import create, new_folder, write_arrays
from sae_jax.store.manifest import Site
from sae_jax.store.order import shard_order
from sae_jax.store.plan import pack_keep, plan
from sae_jax.store.quantise import columns
from sae_jax.store.statistics import moments
from sae_jax.store.verify import problems, verify
from sae_jax.store.writer import open_writer

pytestmark = pytest.mark.smoke
ROWS, WIDTH = 300, 6  # shards of 64 rows, the fifth of 44; blocks of 8
PARTS = (
  'sequences', 'keep', 'tokens', 'sites/a', 'sites/b', 'sites/c', 'scales/c',
)  # fmt: skip


def write(root, stop=ROWS):
  """A store of float32, bfloat16 and int8 rows, heavy tails among them; of
  its first rows only, if told to stop."""
  rng = np.random.default_rng(0)
  sequences = rng.integers(0, 50, (80, 8)).astype(np.int32)
  keep = rng.random((80, 8)) < 0.7
  keep[:, 0] = False
  needed = int(np.searchsorted(np.cumsum(keep.sum(1)), ROWS)) + 1
  sequences, keep = sequences[:needed], pack_keep(keep[:needed])
  x = rng.normal(3, 1, (ROWS, WIDTH)).astype(np.float32)
  x[:, 0] += 5 * rng.standard_t(2, ROWS)  # an outlier column
  x[::40] *= 50  # and outlier tokens
  offset, scale = columns(moments(x))
  rows = {'a': x, 'b': x.astype(ml_dtypes.bfloat16), 'c': x}
  sites = [
    Site('a', WIDTH, 'float32'),
    Site('b', WIDTH, 'bfloat16'),
    Site('c', WIDTH, 'int8', offset, scale),
  ]
  manifest = plan(
    sequences, keep, sites, rows=ROWS, rows_per_shard=64, rows_per_block=8,
    held_out_shards=1, norm_shards=2, seed=5, model={'name': 'arrays'},
    text={}, policy={}, config={}, made_by={},
  )  # fmt: skip
  with new_folder(root) as folder:
    create(folder, manifest, sequences, keep, np.arange(8).reshape(4, 2))
  with open_writer(root) as writer:
    writer.write(0, {site: values[:stop] for site, values in rows.items()})
    if stop == ROWS:
      writer.finish()
  return root


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  return write(tmp_path_factory.mktemp('verify') / 'store')


@pytest.fixture
def store(whole, tmp_path):
  return damage.copied(whole, tmp_path / 'store')


def found_by(root, **kwargs):
  """{check: its problems' lines} of those that have any."""
  checks = verify(root, **kwargs)
  names = ['files', 'checksums', 'alignment', 'statistics', 'norms']
  assert [check.name for check in checks] == names
  return {
    check.name: [problem.text for problem in check.problems]
    for check in checks
    if check.problems
  }


def record(root, shard):
  return root / f'records/shard-{shard:05d}-of-00005.json'


def test_a_sound_store_has_no_problem(store):
  before = damage.contents(store)
  assert found_by(store) == {} and found_by(store, exact=True) == {}
  checks = verify(store)
  assert [check.state for check in checks] == ['ok'] * 5
  assert not any(check.warnings for check in checks[:4])
  assert len(checks[4].warnings) == 3  # of the outlier tokens of each site
  assert '71 files of 5 shards' in checks[0].looked_at
  assert '300 tokens' in checks[2].looked_at
  assert '1 shards in full' in checks[3].looked_at
  assert 'against 5 records' in checks[3].looked_at
  assert damage.contents(store) == before


def test_damaged_files_are_listed(tmp_path):
  x = np.ones((150, 3), np.float32)
  write_arrays(tmp_path, {'a': x}, rows_per_shard=64, rows_per_block=16)
  assert list(problems(tmp_path)) == []
  flipped = tmp_path / 'sites/a/shard-00002-of-00003.bin'
  flipped.write_bytes(flipped.read_bytes()[:-1] + b'\7')
  cut = tmp_path / 'sequences/shard-00001-of-00003.bin'
  cut.write_bytes(cut.read_bytes()[:-1])
  (tmp_path / 'tokens/shard-00000-of-00003.bin').unlink()
  found = list(problems(tmp_path))
  assert len(found) == 3
  assert 'tokens/shard-00000' in found[0] and 'missing' in found[0]
  assert str(cut) in found[1] and '511 bytes, expected 512' in found[1]
  assert f'{flipped}: block 1' in found[2]


@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('suffix', ['.bin', '.blocks'])
def test_a_flipped_byte_in_every_part(store, part, suffix):
  path = damage.path_of(store, part, 3)
  damage.flip(path.with_suffix(suffix))
  found = found_by(store)
  assert list(found) == ['checksums'] and len(found['checksums']) == 1
  assert str(path.with_suffix('')) in found['checksums'][0]
  assert 'checksum' in found['checksums'][0]


def test_a_flipped_byte_in_the_documents(store):
  damage.flip(store / 'sequences/documents.bin')
  (line,) = found_by(store)['checksums']
  assert 'documents.bin: checksum differs' in line


def test_several_bad_blocks_are_one_line(store):
  path = damage.path_of(store, 'sites/a', 4)
  for block in (0, 2, 5):
    damage.flip(path, block * 8 * WIDTH * 4)
  (line,) = found_by(store)['checksums']
  assert f'{path}: block 0' in line and '(and 2 more blocks)' in line


@pytest.mark.parametrize('part', PARTS)
def test_a_missing_file_of_every_part(store, part):
  path = damage.path_of(store, part, 1)
  path.unlink()
  found = found_by(store)
  assert list(found) == ['files'] and f'{path}: missing' in found['files'][0]


def test_a_stray_file_is_a_warning(store):
  (store / 'sites/a/notes.txt').write_text('mine')
  (store / 'sites/a/shard-00001-of-00005.bin.tmp').write_text('half')
  (store / 'trainers').mkdir()
  (store / 'trainers/run.json').write_text('{}')
  assert found_by(store) == {}
  first, second = verify(store)[0].warnings
  assert 'notes.txt: does not belong' in first
  assert '.bin.tmp: half-written' in second


def test_a_removed_shard_must_have_no_rows(store):
  def remove(data):
    data['shards'][4]['removed'] = True

  damage.edit(store / 'manifest.json', remove)
  found = found_by(store)['files']
  assert len(found) == 10 and all('shard was removed' in x for x in found)
  for part in PARTS[2:]:
    for suffix in ('.bin', '.blocks'):
      damage.path_of(store, part, 4).with_suffix(suffix).unlink()
  assert found_by(store) == {}
  assert '4 shards, 1 removed' in verify(store)[0].looked_at
  record(store, 4).unlink()
  assert 'missing' in found_by(store)['files'][0]


@pytest.mark.parametrize('text', ['', '{}', '{"files": 3, "moments": {}}'])
def test_a_record_that_is_none(store, text):
  record(store, 2).write_text(text)
  assert 'not a record' in found_by(store)['files'][0]
  damage.edit(
    store / 'manifest.json', lambda data: data.update(state='writing')
  )
  assert 'not a record' in found_by(store)['files'][0]


def test_a_record_of_other_checksums(store):
  def change(data):
    data['files']['tokens/shard-00002-of-00005.bin']['checksum'] = '0' * 16

  damage.edit(record(store, 2), change)
  assert 'differ from the manifest' in found_by(store)['files'][0]


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda d: d['shards'][1].update(rows=63), 'shard 1 has 63 rows'),
    (
      lambda d: d['shards'][1].update(first_sequence=2),
      'begins with sequence 2, not',
    ),
    (lambda d: d.update(rows=400), '5 shards for 400 rows'),
    (lambda d: d.update(sequences=7), 'sequences in the shards, not 7'),
    (
      lambda d: d['shards'][0]['files'].pop('keep/shard-00000-of-00005.bin'),
      'keep/shard-00000-of-00005.bin must have',
    ),
  ],
)
def test_a_manifest_that_contradicts_itself(store, change, message):
  damage.edit(store / 'manifest.json', change)
  assert any(message in line for line in found_by(store)['files'])


def swap(rows):
  rows[[3, 40]] = rows[[40, 3]]


def test_swapped_tokens_with_the_right_checksums(store):
  damage.alter_rows(store, 'tokens', 2, swap)
  found = found_by(store)
  assert list(found) == ['alignment']
  assert '2 rows have another token' in found['alignment'][0]
  assert 'row 3 has' in found['alignment'][0]


def test_a_place_that_occurs_twice(store):
  def repeat(rows):
    rows[5] = rows[6]

  def from_before(rows):
    rows[:] = first

  damage.alter_rows(store, 'tokens', 1, repeat)
  lines = found_by(store)['alignment']
  assert '1 rows have another token' in lines[0]
  assert '1 rows of a (sequence, position) that has a row' in lines[1]
  path = damage.path_of(store, 'tokens', 0)
  first = np.fromfile(path, '<i4').reshape(-1, 3)
  damage.alter_rows(store, 'tokens', 2, from_before)
  assert '64 rows of a (sequence' in found_by(store)['alignment'][3]


@pytest.mark.parametrize(
  'key', ['mean', 'mean_squared_norm_raw', 'all_mean_squared_norm_centred']
)
def test_a_statistic_of_the_manifest(store, key):
  def change(data):
    value = data['sites'][1][key]
    if isinstance(value, list):
      value[2] *= 1 + 1e-15
    else:
      data['sites'][1][key] = value * (1 + 1e-15)

  damage.edit(store / 'manifest.json', change)
  found = found_by(store)
  assert list(found) == ['statistics']
  assert f'b: {key} are not those of the records' in found['statistics'][0]


def scale_record(root, shard, name, factor):
  def change(data):
    values = data['moments']['c'][name]
    values[3] *= factor

  damage.edit(record(root, shard), change)


@pytest.mark.parametrize('name', ['mean', 'm2'])
def test_a_statistic_of_the_normaliser_shard_to_eight_digits(store, name):
  damage.edit(
    store / 'manifest.json', lambda data: data.update(state='writing')
  )
  scale_record(store, 1, name, 1 + 1e-8)
  (line,) = found_by(store)['statistics']
  assert 'sites/c/shard-00001' in line and f'{name} of its record' in line


def test_statistics_of_other_shards_by_a_sample_or_exactly(store):
  damage.edit(
    store / 'manifest.json', lambda data: data.update(state='writing')
  )
  scale_record(store, 4, 'mean', 1 + 1e-6)
  assert found_by(store) == {}  # within the error of the sample
  (line,) = found_by(store, exact=True)['statistics']
  assert 'sites/c/shard-00004' in line
  scale_record(store, 4, 'mean', -100)
  (line,) = found_by(store)['statistics']
  assert 'sites/c/shard-00004' in line and 'column 3' in line


@pytest.mark.parametrize('shard, factor', [(1, 1 + 1e-8), (4, 0.2)])
def test_the_largest_number_of_a_shard(store, shard, factor):
  """Of the normaliser shard in full, of others when a sample is beyond it."""

  def change(data):
    data['moments']['c']['max_abs'] *= factor

  damage.edit(
    store / 'manifest.json', lambda data: data.update(state='writing')
  )
  damage.edit(record(store, shard), change)
  (line,) = found_by(store)['statistics']
  assert f'sites/c/shard-{shard:05d}' in line and 'its record' in line


def test_rows_far_larger_than_recorded(tmp_path):
  def shrink(data):
    data['moments']['a']['m2'] = [x / 25 for x in data['moments']['a']['m2']]

  x = np.random.default_rng(1).normal(size=(4096, 4)).astype(np.float32)
  write_arrays(tmp_path, {'a': x}, rows_per_shard=512, rows_per_block=64)
  manifest = tmp_path / 'manifest.json'
  damage.edit(manifest, lambda data: data.update(state='writing'))
  damage.edit(tmp_path / 'records/shard-00003-of-00008.json', shrink)
  (line,) = found_by(tmp_path)['statistics']
  assert 'sites/a/shard-00003' in line and 'times the squared norm' in line


def test_a_sample_of_a_sound_store_raises_no_alarm(tmp_path):
  """Rows that are hard on a rule: few nonzero, and few very large."""
  rng = np.random.default_rng(1)
  x = rng.normal(size=(4096, 12)).astype(np.float32)
  x[:, :8] *= rng.random((4096, 8)) < 0.003
  x[rng.random(4096) < 0.002] *= 1000
  x[:, 11] = 0.1
  write_arrays(tmp_path, {'a': x}, rows_per_shard=512, rows_per_block=16)
  assert found_by(tmp_path) == {}


def test_a_rare_large_row_in_a_sample_raises_no_alarm(tmp_path):
  x = np.random.default_rng(1).normal(size=(49152, 2)).astype(np.float32)
  x[2 * 16384 + shard_order(16384, 0, 2)[0]] = 1e4  # its place is sampled
  write_arrays(tmp_path, {'a': x}, rows_per_shard=16384, rows_per_block=16)
  assert found_by(tmp_path) == {}


def test_a_store_that_is_being_written(tmp_path):
  write(tmp_path, stop=200)
  checks = verify(tmp_path)
  assert found_by(tmp_path) == {}
  assert '3 shards, 2 not written yet' in checks[0].looked_at
  damage.flip(damage.path_of(tmp_path, 'sites/a', 2))
  damage.flip(damage.path_of(tmp_path, 'keep', 4))
  found = found_by(tmp_path)
  assert list(found) == ['checksums'] and len(found['checksums']) == 2
  assert verify(tmp_path)[2].state == 'skipped'


def test_no_store(tmp_path):
  with pytest.raises(UserError, match='no activation store'):
    verify(tmp_path)
  (tmp_path / 'manifest.json').write_text(json.dumps({'format': 'other'}))
  with pytest.raises(UserError, match='not the manifest'):
    list(problems(tmp_path))
