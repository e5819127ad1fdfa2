"""What is wrong with a source is said in one line, and nothing is written."""

import shutil
import sys

import numpy as np
import pytest
from cached_sources import (
  HOOK,
  OTHER,
  SECOND,
  SITE,
  SIZES,
  D,
  T,
  activations,
  contents,
  write_llamascopium,
  write_npy,
  write_saelens,
)
from safetensors.numpy import load_file, save_file

from sae_jax.errors import UserError
from sae_jax.interop import llamascopium, npy, saelens
from sae_jax.interop.importing import Options, import_rows

ROWS, IDS = activations()
FLAT, FLAT_IDS = ROWS.reshape(-1, D), IDS.reshape(-1)
OPEN = {
  'saelens': saelens.open_source,
  'llamascopium': llamascopium.open_source,
  'npy': npy.open_source,
}


def refused(tmp_path, importer, *words, sites=None, options=None, **opened):
  """The import says all of the words in one line and leaves no store."""
  root, store = tmp_path / 'a', tmp_path / 's'
  with pytest.raises(UserError) as error:
    source = OPEN[importer](root, sites or {'': SITE}, **opened)
    import_rows(store, importer, source, Options(**(SIZES | (options or {}))))
  line = str(error.value)
  assert '\n' not in line
  for word in words:
    assert word in line, line
  assert not store.exists()


def cut_off(path, share=0.5):
  whole = path.read_bytes()
  path.write_bytes(whole[: int(len(whole) * share)])


def test_saelens_columns(tmp_path):
  write_saelens(tmp_path / 'a', {HOOK: ROWS, OTHER: ROWS}, None)
  near = {'blocks.1.hook_resid_pos': SITE}
  refused(tmp_path, 'saelens', f'did you mean {HOOK!r}', OTHER, sites=near)
  refused(tmp_path, 'saelens', '2 hooks', HOOK, OTHER, '--sites=')
  named = {HOOK: SITE}
  refused(tmp_path, 'saelens', "'token_ids'", '--tokens=none', sites=named)


def test_a_data_set_without_activations(tmp_path):
  write_saelens(tmp_path / 'a', {}, IDS)
  refused(tmp_path, 'saelens', 'no activations, only token_ids')


def test_saelens_tokens_of_another_length(tmp_path):
  write_saelens(tmp_path / 'a', {HOOK: ROWS}, IDS[:, :-1])
  refused(tmp_path, 'saelens', '7 token ids', '8')


def test_saelens_hooks_of_different_lengths(tmp_path):
  write_saelens(tmp_path / 'a', {HOOK: ROWS, OTHER: ROWS[:, 1:]}, IDS)
  both = {HOOK: SITE, OTHER: SECOND}
  refused(tmp_path, 'saelens', '[7, 8]', 'different stores', sites=both)


@pytest.mark.parametrize('share', [0.0, 0.5, 0.99])
def test_saelens_cut_off(tmp_path, share):
  write_saelens(tmp_path / 'a', {HOOK: ROWS}, IDS)
  cut_off(next((tmp_path / 'a').glob('data-00001*.arrow')), share)
  refused(tmp_path, 'saelens', str(tmp_path / 'a'), 'damaged')


def test_saelens_shards_of_different_widths(tmp_path):
  write_saelens(tmp_path / 'a/shard_0', {HOOK: ROWS}, IDS)
  write_saelens(tmp_path / 'a/shard_1', {HOOK: ROWS[..., 1:]}, IDS)
  refused(tmp_path, 'saelens', 'shard_1', '(8, 5)', 'shard_0', '(8, 6)')


def test_saelens_splits(tmp_path):
  write_saelens(tmp_path / 'a/train', {HOOK: ROWS}, IDS)
  refused(tmp_path, 'saelens', 'no state.json', 'splits: train')


def test_without_the_package_datasets(tmp_path, monkeypatch):
  write_saelens(tmp_path / 'a', {HOOK: ROWS}, IDS)
  monkeypatch.setitem(sys.modules, 'datasets', None)
  refused(tmp_path, 'saelens', "pip install 'sae-jax[data]'")


@pytest.mark.parametrize('importer', OPEN)
def test_folders_of_another_format(tmp_path, importer):
  refused(tmp_path, importer, str(tmp_path / 'a'))
  if importer != 'saelens':
    write_saelens(tmp_path / 'a', {HOOK: ROWS}, IDS)
    refused(tmp_path, importer, str(tmp_path / 'a'))
    shutil.rmtree(tmp_path / 'a')
  if importer != 'npy':
    write_npy(tmp_path / 'a', FLAT, FLAT_IDS)
    refused(tmp_path, importer, str(tmp_path / 'a'))
    shutil.rmtree(tmp_path / 'a')
  if importer != 'llamascopium':
    write_llamascopium(tmp_path / 'a', {HOOK: ROWS}, IDS)
    refused(tmp_path, importer, str(tmp_path / 'a'))


def chunk(tmp_path, n=1, hook=HOOK):
  return tmp_path / 'a' / hook / f'chunk-{n:08d}.safetensors'


def changed(path, **tensors):
  """The chunk with other tensors; None takes one away."""
  new = load_file(path) | tensors
  save_file({k: v for k, v in new.items() if v is not None}, path)


def test_llamascopium_hooks(tmp_path):
  write_llamascopium(tmp_path / 'a', {HOOK: ROWS, OTHER: ROWS}, IDS)
  near = {'blocks.0.hook_mlp_ou': SITE}
  refused(tmp_path, 'llamascopium', f'did you mean {OTHER!r}', sites=near)
  refused(tmp_path, 'llamascopium', '2 hooks')
  both = {HOOK: SITE, OTHER: SECOND}
  last = chunk(tmp_path, 4, OTHER)
  tokens = load_file(last)['tokens']
  changed(last, tokens=tokens + 1)
  refused(tmp_path, 'llamascopium', str(last), 'together', sites=both)
  last.unlink()
  refused(tmp_path, 'llamascopium', 'differ', last.name, sites=both)


def test_llamascopium_chunks(tmp_path):
  path = chunk(tmp_path)
  write = lambda: write_llamascopium(tmp_path / 'a', {HOOK: ROWS}, IDS)
  refuse = lambda *words: refused(tmp_path, 'llamascopium', str(path), *words)
  write()
  changed(path, tokens=None)
  refuse("no tensor 'tokens'", 'activation')
  changed(path, tokens=IDS[:7, 1:].copy())
  refuse('tokens of shape (7, 7)', '(7, 8, 6)')
  changed(path, tokens=IDS[:7], activation=ROWS[:7, :, 1:].copy())
  refuse('width 5', '6')
  changed(path, activation=ROWS[:7].astype(np.float16))
  refuse('dtype float16', 'float32')
  changed(path, activation=ROWS[:7].astype(np.int32))
  refuse('I32')
  write()
  cut_off(path)
  refuse('cut off')
  path.write_bytes(b'not a header')
  refuse('cut off')
  path.rename(path.with_suffix('.pt'))
  refused(tmp_path, 'llamascopium', '.pt', 'safetensors')


def test_npy_files(tmp_path):
  write = lambda rows=FLAT, ids=FLAT_IDS: write_npy(tmp_path / 'a', rows, ids)
  refuse = lambda *words, **kw: refused(tmp_path, 'npy', *words, **kw)
  path = tmp_path / 'a/part-5.npy'
  write()
  np.save(path, FLAT[50:60, 1:])
  refuse(str(path), 'width 5', 'part-0.npy 6')
  np.save(path, FLAT[50:60].astype(np.float64))
  refuse(str(path), 'dtype float64')
  np.save(path, FLAT[50:60].astype(int))
  refuse(str(path), 'int64')
  np.save(path, ROWS)
  refuse(str(path), '(30, 8, 6)')
  np.save(path, np.array([{}]), allow_pickle=True)
  refuse(str(path), 'cut off')
  write()
  cut_off(path)
  refuse(str(path), 'cut off')
  cut_off(path, 0.0)
  refuse(str(path), 'cut off')
  write(FLAT.view(np.uint16))
  refuse('uint16', '--source_dtype=bfloat16')


def test_npy_tokens(tmp_path):
  refuse = lambda *words, **kw: refused(tmp_path, 'npy', *words, **kw)
  write = lambda ids: write_npy(tmp_path / 'a', FLAT, ids)
  write(FLAT_IDS[:-1])
  refuse('239 tokens', '240 rows')
  write(FLAT_IDS.astype(np.float32))
  refuse('float32')
  write(IDS)
  refuse('(30, 8)')
  write(FLAT_IDS)
  refuse('sequence_length: 1', sequence_length=1)
  refuse('no file of tokens', tokens='/nowhere.npy')
  listed = np.stack([np.arange(240) // T, np.arange(240) % T, FLAT_IDS], 1)
  for change, words in (
    ((5, 0, -1), ['row 5', 'negative']),
    ((239, 1, 2), ['rows 234 and 239 are both of sequence 29, position 2']),
    ((239, 0, 10**6), ['1,000,000', 'number the sequences from 0']),
  ):
    bad = listed.copy()
    bad[change[:2]] = change[2]
    write(bad)
    refuse(*words)
  write(listed)
  refuse('leave it 0', sequence_length=T)
  (tmp_path / 'a/tokens.npy').unlink()
  refuse('no file of tokens', '--tokens=none')


def test_npy_sites_of_different_size(tmp_path):
  write_npy(tmp_path / 'a/x', FLAT, FLAT_IDS)
  write_npy(tmp_path / 'a/y', FLAT[:-1], FLAT_IDS)
  sites = {'x': SITE, 'y': SECOND}
  refused(
    tmp_path,
    'npy',
    '240',
    '239',
    sites=sites,
    tokens=tmp_path / 'a/x/tokens.npy',
  )
  refused(tmp_path, 'npy', "no 'z'", 'x, y', sites={'z': SITE})


def test_no_rows_too_few_rows_and_bad_options(tmp_path):
  nothing = np.zeros(IDS.shape, bool)
  write_llamascopium(tmp_path / 'a', {HOOK: ROWS}, IDS, nothing)
  refuse = lambda *words, **options: refused(
    tmp_path, 'llamascopium', *words, options=options
  )
  refuse('no row', 'masked')
  shutil.rmtree(tmp_path / 'a')
  ids = IDS.copy()
  ids[4, 4] = -100
  write_llamascopium(tmp_path / 'a', {HOOK: ROWS}, ids)
  refuse('chunk-00000000.safetensors: row 4, token 4: token id -100', 'skip_')
  refuse('239 rows', '1,024', skip_tokens=(-100,), rows_per_shard=1024)
  refuse('int7', 'int8', dtype='int7')
  refuse('rows_per_shard', 'multiple', rows_per_shard=60)
  refuse('skip_first: 8', skip_first=8)
  refuse("'gpt2'", "says 'pythia-70m'", model_name='gpt2')
  shutil.rmtree(tmp_path / 'a')
  write_npy(tmp_path / 'a', FLAT, FLAT_IDS)
  refused(tmp_path, 'npy', 'stand alone', options={'skip_first': 1})


WRITE = {
  'saelens': lambda root, rows: write_saelens(root, {HOOK: rows}, IDS),
  'llamascopium': lambda root, rows: write_llamascopium(
    root, {HOOK: rows}, IDS
  ),
  'npy': lambda root, rows: write_npy(root, rows.reshape(-1, D), FLAT_IDS),
}
WHERE = {  # row 100 of all: token 4 of sequence 12
  'saelens': f'a: {HOOK!r} of sequence 12, token 4',
  'llamascopium': 'chunk-00000001.safetensors: row 5, token 4',
  'npy': 'part-10.npy: row 40',
}


@pytest.mark.parametrize(
  'importer, options',
  [(name, {}) for name in WRITE]
  + [('npy', {'dtype': 'int8'}), ('npy', {'shuffle': True})],
)
def test_rows_that_are_not_finite(tmp_path, importer, options):
  rows = ROWS.copy()
  rows[12, 4, 3] = np.inf if importer == 'saelens' else np.nan
  WRITE[importer](tmp_path / 'a', rows)
  source = OPEN[importer](tmp_path / 'a', {'': SITE})
  with pytest.raises(UserError) as error:
    import_rows(tmp_path / 's', importer, source, Options(**SIZES | options))
  assert WHERE[importer] + ' holds NaN or infinity' in str(error.value)
  # Shuffled, by pieces of a MiB, they are one piece.
  assert 'shard 1 of the store' in str(error.value)


def test_another_import_in_the_folder(tmp_path):
  write_npy(tmp_path / 'a', FLAT, FLAT_IDS)
  run = lambda **options: import_rows(
    tmp_path / 's',
    'npy',
    npy.open_source(tmp_path / 'a', {'': SITE}),
    Options(**(SIZES | options)),
  )
  run()
  before = contents(tmp_path / 's')
  run()
  with pytest.raises(UserError, match=r'different: import\.seed'):
    run(seed=1)
  other = npy.open_source(tmp_path / 'a', {'': SECOND})
  with pytest.raises(UserError, match=r'different: model \(hooks'):
    import_rows(tmp_path / 's', 'npy', other, Options(**SIZES))
  rows = FLAT.copy()
  rows[7, 2] += 1
  write_npy(tmp_path / 'a', rows, FLAT_IDS)
  with pytest.raises(UserError, match='source_xxh3'):
    run()
  assert contents(tmp_path / 's') == before
