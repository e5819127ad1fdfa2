"""Batches are a function of (seed, position); bad files are found and named."""

import errno
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sae_jax.errors import UserError
from sae_jax.store import reader
from sae_jax.store.batches import BatchSource, train_batches
from sae_jax.store.create import write_arrays
from sae_jax.store.manifest import read_manifest
from sae_jax.store.order import BLOCKS, permutation

pytestmark = pytest.mark.smoke
ROWS, WIDTH = 410, 4
# Shards of 64 rows, blocks of 8: the seventh has 26 rows, 3 blocks and a tail.
TRAINING = ROWS - 64 - 2


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  root = tmp_path_factory.mktemp('reader') / 'store'
  x = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
  rows = {'a': x, 'b': (x % 251).astype(ml_dtypes.bfloat16)}
  write_arrays(root, rows, rows_per_shard=64, rows_per_block=8, seed=3)
  return root


@pytest.fixture
def damaged(store, tmp_path):
  """A copy of the store that a test may break."""
  root = tmp_path / 'store'
  root.mkdir()
  for path in store.rglob('*'):
    target = root / path.relative_to(store)
    target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
  return root


def source(store, batch_rows=16, **kwargs):
  kwargs = {'seed': 1, 'window': 2} | kwargs
  return BatchSource(store, kwargs.pop('site', 'a'), batch_rows, **kwargs)


def test_batches_are_the_documented_blocks(store):
  # Windows of 2 of the 6 training shards: blocks of both, permuted.
  batches = source(store, 16)
  stream = []
  for epoch in range(2):
    for window, blocks in enumerate([16, 16, 8 + 3]):
      order = permutation(blocks, 1, BLOCKS, epoch, window)
      stream += [16 * window + block for block in order]
  bins = sorted((store / 'sites/a').glob('*.bin'))
  rows = np.concatenate(
    [np.fromfile(p, '<f4').reshape(-1, WIDTH)[:64] for p in bins[1:]]
  )
  for i in range(len(stream) // 2):
    wanted = [rows[8 * b : 8 * b + 8] for b in stream[2 * i : 2 * i + 2]]
    np.testing.assert_array_equal(batches[i], np.concatenate(wanted))


def test_an_epoch_has_every_full_training_block_once(store):
  batches = source(store, 8)
  count = batches.rows_per_epoch // 8
  assert batches.rows_per_epoch == TRAINING == count * 8
  blocks = {b[1].tobytes() for b in reader.held_out(store, 'a')}
  epochs = []
  for epoch in range(3):
    read = [batches[epoch * count + i].tobytes() for i in range(count)]
    assert len(set(read)) == count
    epochs.append(read)
    assert not blocks & set(read)
  assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_held_out_rows_are_never_trained_on(store):
  held_out = np.concatenate([rows for rows, _ in reader.held_out(store, 'a')])
  assert len(held_out) == 64
  batches = source(store, 8)
  trained = np.concatenate([batches[i] for i in range(TRAINING // 8)])
  assert not set(held_out[:, 0]) & set(trained[:, 0])
  # The two rows of the last, incomplete block are in neither.
  assert len(set(held_out[:, 0]) | set(trained[:, 0])) == ROWS - 2


def test_a_batch_depends_on_seed_and_index_alone(store):
  one, other = source(store), source(store)
  backwards = [other[i] for i in reversed(range(20))][::-1]
  for i in range(20):
    np.testing.assert_array_equal(one[i], backwards[i])
  assert not np.array_equal(source(store, seed=2)[0], one[0])
  # The stream of blocks does not depend on the batch size.
  np.testing.assert_array_equal(
    source(store, 48)[3], np.concatenate([one[i] for i in range(9, 12)])
  )


@pytest.mark.parametrize('processes', [2, 3])
def test_processes_share_the_one_process_batch(store, processes):
  whole = source(store, 48)
  parts = [source(store, 48, parts=[p], of=processes) for p in range(processes)]
  for i in range(10):
    read = [part[i] for part in parts]
    assert {len(part) for part in read} == {48 // processes}
    np.testing.assert_array_equal(np.concatenate(read), whole[i])
    ends = source(store, 48, parts=[processes - 1, 0], of=processes)[i]
    np.testing.assert_array_equal(ends, np.concatenate([read[0], read[-1]]))


def test_bfloat16_comes_as_it_is_stored(store):
  batch = source(store, site='b')[0]
  assert batch.dtype == ml_dtypes.bfloat16 and batch.shape == (16, WIDTH)
  wanted = source(store, site='a')[0] % 251
  np.testing.assert_array_equal(batch, wanted.astype(ml_dtypes.bfloat16))


def test_the_iterator_goes_on_exactly_where_it_was(store):
  batches = source(store)
  iterator = train_batches(batches, threads=3, prefetch=5)
  for i in range(30):  # past the first epoch's end
    np.testing.assert_array_equal(next(iterator), batches[i])
  assert iterator.get_state() == {'next_index': 30}
  iterator.close()
  iterator = train_batches(batches, position_rows=30 * 16)
  np.testing.assert_array_equal(next(iterator), batches[30])
  iterator.close()
  with pytest.raises(UserError, match='490 rows is not a multiple'):
    train_batches(batches, position_rows=490)


def test_closing_ends_the_reading_threads(store):
  before = set(threading.enumerate())
  iterator = train_batches(source(store))
  next(iterator)
  started = set(threading.enumerate()) - before
  assert started
  iterator.close()
  for thread in started:
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_flipped_bit_is_found_and_named(damaged):
  path = damaged / 'sites/a/shard-00003-of-00007.bin'
  raw = bytearray(path.read_bytes())
  raw[5 * 8 * 16 + 3] ^= 1
  path.write_bytes(raw)
  batches = source(damaged)
  iterator = train_batches(batches)
  with pytest.raises(UserError) as caught:
    for _ in range(22):  # an epoch
      next(iterator)
  iterator.close()
  message = str(caught.value)
  assert f'{path}: block 5 (bytes 640 to 768)' in message
  assert '\n' not in message


def test_a_cut_off_shard_is_found_before_training(damaged):
  path = damaged / 'sites/a/shard-00003-of-00007.bin'
  path.write_bytes(path.read_bytes()[:-16])
  with pytest.raises(UserError) as caught:
    source(damaged)
  message = str(caught.value)
  assert message.startswith(f'{path}: 1,008 bytes, expected 1,024: launch')
  source(damaged, site='b')  # another site's files are sound


def test_a_shard_cut_off_while_it_is_read(damaged):
  batches = source(damaged)
  for i in range(22):  # files are open, sizes are not looked at again
    batches[i]
  path = damaged / 'sites/a/shard-00003-of-00007.bin'
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(UserError, match='cut off at 1,000 bytes, block 7'):
    for i in range(22):
      batches[i]


@pytest.mark.parametrize('suffix', ['.bin', '.blocks'])
def test_a_missing_file_is_found(damaged, suffix):
  (damaged / f'sites/a/shard-00003-of-00007{suffix}').unlink()
  with pytest.raises(UserError, match='missing: launch/verify.py'):
    source(damaged)


def test_wrong_checksums_are_found(damaged):
  path = damaged / 'sites/a/shard-00003-of-00007.blocks'
  path.write_bytes(path.read_bytes()[::-1])
  with pytest.raises(UserError, match='differs from the manifest'):
    for i in range(22):
      source(damaged)[i]


def test_damaged_tokens_and_held_out_rows_are_found(damaged):
  path = damaged / 'tokens/shard-00000-of-00007.bin'
  path.write_bytes(b'\1' + path.read_bytes()[1:])
  with pytest.raises(UserError, match=f'{path}: block 0'):
    list(reader.held_out(damaged, 'a'))


@pytest.mark.parametrize('cached', [0, 100])
@pytest.mark.parametrize('dtype', [None, 'int8'])
def test_what_is_not_in_the_page_cache_is_read(
  tmp_path, monkeypatch, dtype, cached
):
  x = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
  sizes = dict(rows_per_shard=64, rows_per_block=8)
  write_arrays(tmp_path, {'a': x}, dtype=dtype, **sizes)
  wanted = [source(tmp_path)[i].copy() for i in range(22)]
  preadv, asked = os.preadv, []

  def cold(descriptor, buffers, offset, flags=0):
    if not flags:
      return preadv(descriptor, buffers, offset)
    asked.append(offset)
    if not cached:
      raise BlockingIOError(errno.EAGAIN, 'Resource temporarily unavailable')
    buffers[0][:] = bytes(len(buffers[0]))  # a part of it was there
    return min(cached, len(buffers[0]) - 1)

  monkeypatch.setattr(os, 'preadv', cold)
  batches = source(tmp_path)
  for i in range(22):
    np.testing.assert_array_equal(batches[i], wanted[i])
  assert asked or not hasattr(os, 'RWF_NOWAIT')


@pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='not Linux')
@pytest.mark.parametrize('dtype', [None, 'int8'])
def test_only_batches_keep_files_open_and_not_for_ever(tmp_path, dtype):
  x = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
  sizes = dict(rows_per_shard=64, rows_per_block=8)
  write_arrays(tmp_path, {'a': x}, dtype=dtype, **sizes)

  def count():
    paths = Path('/proc/self/fd').iterdir()
    links = [os.readlink(path) for path in paths if path.is_symlink()]
    return sum(link.startswith(str(tmp_path)) for link in links)

  blocks = reader.shard_blocks(tmp_path, 'a', range(7))
  for _ in range(20):
    next(blocks)
  assert count() == 0
  batches = source(tmp_path)
  for i in range(44):
    batches[i]
  assert count() == 6 * (2 if dtype else 1)
  del batches
  gc.collect()
  assert count() == 0


@pytest.mark.parametrize(
  'batch_rows, processes, message',
  [
    (20, 1, 'use 16 or 24'),
    (4, 1, 'use 8$'),
    (0, 1, 'use 8$'),
    (24, 2, 'x 2 data processes: use 16 or 32'),
  ],
)
def test_batches_of_whole_blocks(store, batch_rows, processes, message):
  with pytest.raises(UserError, match=message):
    source(store, batch_rows, of=processes)


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(site='c'), "no 'c' in this store; it has: a, b"),
    (dict(window=0), 'window'),
    (dict(seed=-1), 'seed'),
    (dict(parts=[1]), r'parts: \[1\] of 1; use some of 0 to 0'),
    (dict(parts=[]), 'parts'),
  ],
)
def test_bad_arguments(store, change, message):
  with pytest.raises(UserError, match=message):
    source(store, **change)


def test_missing_stores(tmp_path):
  with pytest.raises(UserError, match='no activation store at'):
    source(tmp_path / 'nowhere')


def test_no_full_block_to_train_on(tmp_path):
  x = np.zeros((40, 2), np.float32)
  sizes = dict(rows_per_shard=16, rows_per_block=8, held_out_shards=2)
  write_arrays(tmp_path, {'a': x}, **sizes)
  path = tmp_path / 'manifest.json'
  text = path.read_text().replace(
    '"held_out_shards": 2', '"held_out_shards": 3'
  )
  path.write_text(text)
  with pytest.raises(UserError, match='no full block of training rows'):
    source(tmp_path, 8)


def test_held_out_blocks_carry_their_tokens(store):
  x = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
  for rows, tokens in reader.held_out(store, 'a'):
    assert rows.shape == (8, WIDTH) and tokens.dtype == np.int32
    np.testing.assert_array_equal(rows, x[tokens[:, 0]])
    np.testing.assert_array_equal(tokens[:, 1], 1)
  tail = list(reader.shard_blocks(store, 'a', range(6, 7)))
  assert [len(rows) for rows, _ in tail] == [8, 8, 8, 2]


def test_sequences_by_number_and_by_shard(store):
  manifest = read_manifest(store)
  for shard, entry in enumerate(manifest.shards):
    mine = reader.load_sequences(store, shard)
    assert mine.shape == (entry.sequences, 2)
    i = entry.first_sequence + entry.sequences - 1
    np.testing.assert_array_equal(reader.sequence(store, i), mine[-1])
  for read in (reader.load_sequences, reader.sequence):
    with pytest.raises(UserError, match='of'):
      read(store, ROWS)


def test_normalizer(store):
  rows = [rows for rows, _ in reader.shard_blocks(store, 'a', range(1, 2))]
  x = np.concatenate(rows).astype(np.float64)
  mean, centred, raw = reader.normalizer(store, 'a')
  assert mean.dtype == np.float32
  np.testing.assert_allclose(mean, x.mean(0), rtol=1e-7)
  assert centred == pytest.approx(np.square(x - x.mean(0)).sum(1).mean())
  assert raw == pytest.approx(np.square(x).sum(1).mean())


def test_the_reader_needs_no_jax(store):
  program = f"""
import sys
sys.modules['jax'] = None
from sae_jax.store import batches, reader
source = batches.BatchSource({str(store)!r}, 'a', 16, seed=1, window=2)
iterator = batches.train_batches(source)
print(next(iterator).shape, len(list(reader.held_out({str(store)!r}, 'a'))))
iterator.close()
"""
  root = Path(__file__).parents[2]
  result = subprocess.run(
    [sys.executable, '-c', program], cwd=root, capture_output=True, text=True
  )
  assert result.stdout == '(16, 4) 8\n', result.stderr
