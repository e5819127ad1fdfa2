"""Imported rows are the source's, bit for bit, at their sequence and position;
several sites stay aligned; what the source masks out has no row."""

import ml_dtypes
import numpy as np
import pytest
from cached_sources import (
  HOOK,
  OTHER,
  SECOND,
  SITE,
  SIZES,
  D,
  Q,
  T,
  activations,
  store_rows,
  write_llamascopium,
  write_npy,
  write_saelens,
)

from sae_jax.interop import llamascopium, npy, saelens, source
from sae_jax.interop.importing import Options, import_rows
from sae_jax.store.manifest import DOCUMENTS
from sae_jax.store.reader import sequence
from sae_jax.store.verify import problems


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
  """A few sequences to a piece, not a whole file."""
  monkeypatch.setattr(source, 'PIECE_BYTES', 4 * T * D * 4)


def run(root, importer, opened, **options):
  """Imports; checks every byte of the store on the way."""
  assert len(opened.pieces) > 3
  made = import_rows(root, importer, opened, Options(**(SIZES | options)))
  assert not list(problems(root))
  return made


def check(root, manifest, rows, tokens, keep, site=SITE):
  """Every kept token has its row, once, and no other token has one."""
  found, values = store_rows(root, manifest, site)
  sequences, positions, ids = found.T
  np.testing.assert_array_equal(
    np.argwhere(keep), found[np.lexsort((positions, sequences))][:, :2]
  )
  np.testing.assert_array_equal(ids, tokens[sequences, positions])
  wanted = np.ascontiguousarray(rows[sequences, positions])
  np.testing.assert_array_equal(values.view(np.uint8), wanted.view(np.uint8))


def test_saelens_rows_and_contexts_are_the_sources(tmp_path):
  rows, tokens = activations()
  write_saelens(tmp_path / 'a', {HOOK: rows}, tokens)
  opened = saelens.open_source(tmp_path / 'a', {'': SITE})
  manifest = run(tmp_path / 's', 'saelens', opened)
  check(tmp_path / 's', manifest, rows, tokens, np.ones((Q, T), bool))
  for i in range(Q):
    np.testing.assert_array_equal(sequence(tmp_path / 's', i), tokens[i])
  assert manifest.model == {'name': 'unknown', 'hooks': {SITE: HOOK}}
  assert manifest.config['import']['from'] == 'saelens'


def test_saelens_two_hooks_at_once_without_bos_and_first_positions(tmp_path):
  rows, tokens = activations(np.float16)
  tokens[::3, 5] = 0
  tokens[-2:] = 0  # sequences at the end without a row
  hooks = {HOOK: rows, OTHER: 2 * rows[..., :3]}
  write_saelens(tmp_path / 'a', hooks, tokens)
  opened = saelens.open_source(tmp_path / 'a', {OTHER: SECOND, HOOK: SITE})
  made = run(
    tmp_path / 's', 'saelens', opened, skip_first=2, skip_tokens=(0,)
  )  # fmt: skip
  keep = (tokens != 0) & (np.arange(T) >= 2)
  assert made.sequences == Q - 2
  as_stored = rows.astype(np.float32)
  check(tmp_path / 's', made, as_stored, tokens, keep)
  check(tmp_path / 's', made, 2 * as_stored[..., :3], tokens, keep, SECOND)
  assert made.policy['source_dtypes'] == {SITE: 'float16', SECOND: 'float16'}


def test_saelens_folders_of_old_versions_have_no_token_ids(tmp_path):
  rows, _ = activations(q=36)
  for i in range(12):  # shard_10 comes after shard_2
    write_saelens(tmp_path / f'a/shard_{i}', {HOOK: rows[3 * i :][:3]}, None, 1)
  opened = saelens.open_source(tmp_path / 'a', {'': SITE}, tokens=False)
  made = run(tmp_path / 's', 'saelens', opened)
  zeros = np.zeros((36, T), np.int32)
  check(tmp_path / 's', made, rows, zeros, np.ones((36, T), bool))
  assert made.policy['token_ids'] == 'unknown, all 0'


def test_llamascopium_masked_tokens_have_no_row(tmp_path):
  rows, tokens = activations(ml_dtypes.bfloat16)
  mask = np.random.default_rng(1).random((Q, T)) < 0.8
  mask[11] = False
  hooks = {HOOK: rows, OTHER: -rows}
  write_llamascopium(tmp_path / 'a', hooks, tokens, mask)
  opened = llamascopium.open_source(tmp_path / 'a', {HOOK: SITE, OTHER: SECOND})
  made = run(tmp_path / 's', 'llamascopium', opened, dtype='bfloat16')
  check(tmp_path / 's', made, rows, tokens, mask)
  check(tmp_path / 's', made, -rows, tokens, mask, SECOND)
  np.testing.assert_array_equal(sequence(tmp_path / 's', 12), tokens[12])
  assert made.model['name'] == 'pythia-70m'
  assert made.policy['masked_by_source'] == 'by `mask`'


def test_llamascopium_chunks_of_many_ranks_and_lengths(tmp_path):
  """Sorted by rank, then number; short contexts are filled up without rows."""
  rows, tokens = activations()
  for rank, part in ((10, slice(20, Q)), (2, slice(0, 20))):
    length = T if rank == 2 else T - 3
    write_llamascopium(
      tmp_path / 'a', {HOOK: rows[part, :length]}, tokens[part, :length],
      shard=rank,
    )  # fmt: skip
  opened = llamascopium.open_source(tmp_path / 'a', {'': SITE})
  made = run(tmp_path / 's', 'llamascopium', opened)
  keep = np.ones((Q, T), bool)
  keep[20:, T - 3 :] = False
  check(tmp_path / 's', made, rows, tokens, keep)
  assert made.policy['masked_by_source'] == 'nothing'


def test_llamascopium_batches_of_batches(tmp_path):
  rows, tokens = activations()
  shape = (10, 3, T)
  write_llamascopium(
    tmp_path / 'a', {HOOK: rows.reshape(*shape, D)}, tokens.reshape(shape)
  )
  opened = llamascopium.open_source(tmp_path / 'a', {'': SITE})
  made = run(tmp_path / 's', 'llamascopium', opened)
  check(tmp_path / 's', made, rows, tokens, np.ones((Q, T), bool))


def test_llamascopium_shuffled_rows_stand_alone(tmp_path):
  rows, tokens = activations()
  rows, tokens = rows.reshape(-1, D), tokens.reshape(-1)
  write_llamascopium(tmp_path / 'a', {HOOK: rows}, tokens, chunk=100)
  opened = llamascopium.open_source(tmp_path / 'a', {'': SITE})
  made = run(tmp_path / 's', 'llamascopium', opened)
  pairs = np.stack([0 * tokens, tokens], 1)
  keep = np.tile([False, True], (len(rows), 1))
  check(tmp_path / 's', made, rows[:, None].repeat(2, 1), pairs, keep)
  assert made.policy['context'].startswith('none: a row is a sequence')


def test_npy_rows_that_stand_alone(tmp_path):
  rows, tokens = activations()
  rows, tokens = rows.reshape(-1, D), tokens.reshape(-1)
  write_npy(tmp_path / 'a', rows, tokens)
  made = run(tmp_path / 's', 'npy', npy.open_source(tmp_path / 'a', {'': SITE}))
  pairs = np.stack([0 * tokens, tokens], 1)
  keep = np.tile([False, True], (len(rows), 1))
  check(tmp_path / 's', made, rows[:, None].repeat(2, 1), pairs, keep)


def test_npy_sequences_of_one_length_over_borders_of_files(tmp_path):
  rows, tokens = activations()
  flat = rows.reshape(-1, D)[:-3]  # the last sequence is short
  write_npy(tmp_path / 'a', flat, tokens.reshape(-1)[:-3])
  opened = npy.open_source(tmp_path / 'a', {'': SITE}, sequence_length=T)
  made = run(tmp_path / 's', 'npy', opened)
  keep = np.ones((Q, T), bool)
  keep[-1, -3:] = False
  check(tmp_path / 's', made, rows, tokens, keep)


@pytest.mark.parametrize('shuffled', [False, True])
def test_npy_rows_with_sequence_and_position_in_any_order(tmp_path, shuffled):
  rows, tokens = activations()
  keep = np.random.default_rng(2).random((Q, T)) < 0.7
  keep[3] = False
  where = np.argwhere(keep)
  if shuffled:
    where = np.random.default_rng(3).permutation(where)
  sequences, positions = where.T
  listed = np.stack([*where.T, tokens[sequences, positions]], 1)
  for name, factor in (('x', 1), ('y', -2)):
    write_npy(
      tmp_path / 'a' / name, factor * rows[sequences, positions], listed
    )
  opened = npy.open_source(
    tmp_path / 'a', {'x': SITE, 'y': SECOND}, tokens=tmp_path / 'a/x/tokens.npy'
  )
  made = run(tmp_path / 's', 'npy', opened)
  check(tmp_path / 's', made, rows, tokens, keep)
  check(tmp_path / 's', made, -2 * rows, tokens, keep, SECOND)


@pytest.mark.parametrize('importer', ['saelens', 'llamascopium'])
def test_shuffled_sequences_say_where_they_come_from(
  tmp_path, monkeypatch, importer
):
  monkeypatch.setattr(source, 'SHUFFLE_BYTES', 2 * T * D * 4)
  rows, tokens = activations()
  tokens[20:22] = 0  # a piece without a row, wherever it comes to lie
  write = {'saelens': write_saelens, 'llamascopium': write_llamascopium}
  read = {'saelens': saelens, 'llamascopium': llamascopium}
  write[importer](tmp_path / 'a', {HOOK: rows}, tokens)
  opened = read[importer].open_source(tmp_path / 'a', {'': SITE})
  made = run(
    tmp_path / 's', importer, opened, shuffle=True, skip_tokens=(0,)
  )  # fmt: skip
  documents = np.fromfile(tmp_path / 's' / DOCUMENTS, '<i8').reshape(-1, 2)
  starts = [*(documents[:, 1] // T), made.sequences]
  origin = np.concatenate(
    [
      np.arange(n, n + b - a)
      for n, a, b in zip(documents[:, 0], starts, starts[1:], strict=False)
    ]
  )
  assert set(range(Q)) - {20, 21} <= set(origin) <= set(range(Q))
  assert (np.abs(np.diff(documents[:, 0])) > 2).mean() > 0.5
  ids = tokens[origin]
  check(tmp_path / 's', made, rows[origin], ids, ids > 0)


@pytest.mark.parametrize('view', [np.uint16, 'V2'])
def test_npy_bfloat16_when_said(tmp_path, view):
  rows, tokens = activations(ml_dtypes.bfloat16)
  flat = rows.reshape(-1, D)
  write_npy(tmp_path / 'a', flat.view(view), tokens.reshape(-1))
  opened = npy.open_source(
    tmp_path / 'a', {'': SITE}, sequence_length=T, bfloat16=True
  )
  made = run(tmp_path / 's', 'npy', opened, dtype='bfloat16')
  check(tmp_path / 's', made, rows, tokens, np.ones((Q, T), bool))


def test_int8_columns_are_measured_on_rows_from_all_over(tmp_path):
  """Rows come back within half a step of columns with their own spread."""
  rows, tokens = activations(q=60)
  rows[30:] += 5  # not the same at the end
  rows[..., 0] *= 100
  write_saelens(tmp_path / 'a', {HOOK: rows}, tokens)
  opened = saelens.open_source(tmp_path / 'a', {'': SITE})
  made = run(tmp_path / 's', 'saelens', opened, dtype='int8')
  (site,) = made.sites
  flat = rows[:, 1:].reshape(-1, D).astype(np.float64)
  assert site.scale == pytest.approx(flat.std(0).tolist(), rel=1e-6)
  assert site.offset == pytest.approx(flat.mean(0).tolist(), rel=1e-6)
  (sequences, positions, _), values = (
    lambda t, v: (t.T, v)
  )(*store_rows(tmp_path / 's', made))  # fmt: skip
  wanted = rows[sequences, positions]
  y = np.abs((wanted - site.offset) / site.scale).max(1, keepdims=True)
  error = np.abs(values - wanted) / site.scale
  assert (error <= 0.5001 * y / 127 + 1e-6).all()
