"""A harvest's rows are the model's, and its mistakes are one line."""

import dataclasses
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from tiny_harvest import CFG, SITES, tiny_config, tiny_subject, write_text

from sae_jax.errors import UserError
from sae_jax.harvest import job, planning
from sae_jax.harvest.job import batch, harvest
from sae_jax.lm.model import forward
from sae_jax.store import reader
from sae_jax.store.manifest import Site, read_manifest
from sae_jax.store.plan import differing_keys

SUBJECT = tiny_subject()
SUBJECT = dataclasses.replace(SUBJECT, cfg=dataclasses.replace(CFG, context=20))


@pytest.fixture(scope='module')
def store(text, tmp_path_factory):
  root = tmp_path_factory.mktemp('harvest') / 'store'
  harvest(tiny_config(text, root), SUBJECT)
  return root


def direct(root, site, tokens):
  """The model's own rows at (sequence, position)."""
  numbers = np.unique(tokens[:, 0])
  sequences = np.stack([reader.sequence(root, int(i)) for i in numbers])
  run = jax.jit(lambda p, x: forward(p, CFG, x, sites=(site,), logits=False))
  # Of one shape, so that one program serves all blocks.
  padded = np.resize(sequences, (64, sequences.shape[1]))
  out = run(SUBJECT.params, padded)
  at = np.searchsorted(numbers, tokens[:, 0])
  return np.asarray(out.activations[site])[at, tokens[:, 1]]


@pytest.mark.parametrize('site', SITES)
def test_rows_are_a_direct_forward_pass(store, site):
  manifest = read_manifest(store)
  shards = range(len(manifest.shards))
  for rows, tokens in reader.shard_blocks(store, site, shards):
    np.testing.assert_allclose(
      rows, direct(store, site, tokens), rtol=1e-5, atol=1e-5
    )
    for i, position, token in tokens:
      assert reader.sequence(store, int(i))[position] == token


def test_every_ordinary_token_has_one_row_in_order(store):
  manifest = read_manifest(store)
  shards = range(len(manifest.shards))
  blocks = reader.shard_blocks(store, SITES[0], shards)
  found = np.concatenate([tokens for _, tokens in blocks])
  sequences = np.concatenate([reader.load_sequences(store, s) for s in shards])
  assert (sequences[:, 0] == SUBJECT.bos).all()
  wanted = [
    (i, p, t)
    for i, row in enumerate(sequences)
    for p, t in enumerate(row)
    if p > 0 and t not in SUBJECT.special
  ][: manifest.rows]
  assert sorted(map(tuple, found)) == wanted
  assert len(wanted) == manifest.rows == 300
  assert (sequences[:, 1:] == SUBJECT.eos).any()
  # Shard s holds the rows [64 s, 64 s + 64) of that order, permuted.
  for shard in shards:
    mine = found[64 * shard : 64 * shard + 64]
    assert sorted(map(tuple, mine)) == wanted[64 * shard : 64 * shard + 64]
    assert sorted(map(tuple, mine)) != list(map(tuple, mine))


def test_the_manifest_says_where_rows_come_from(store, text):
  manifest = read_manifest(store)
  assert manifest.model['weights_sha256'] == 'weights'
  assert len(manifest.text['sha256']) == 64
  assert manifest.policy['positions_without_rows'] == [0]
  assert manifest.policy['tokens_without_rows'] == [0, 1, 2]
  assert manifest.config['harvest']['sites'] == list(SITES)
  assert manifest.config['text']['path'] == str(text)
  assert 'path' not in manifest.config['store']
  revision = manifest.made_by['git_revision']
  assert revision == 'unknown' or len(revision.removesuffix('-dirty')) == 40
  assert [site.width for site in manifest.sites] == [16, 16]


def test_bfloat16_rows_are_the_float32_rows_rounded(store, text, tmp_path):
  config = tiny_config(text, tmp_path / 's')
  config.store.dtype = 'bfloat16'
  harvest(config, SUBJECT)
  for (a, _), (b, _) in zip(
    reader.held_out(store, SITES[0]),
    reader.held_out(tmp_path / 's', SITES[0]),
    strict=True,
  ):
    assert b.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(a.astype(b.dtype), b)


def test_fewer_rows_are_the_beginning_of_more(store, text, tmp_path):
  config = tiny_config(text, tmp_path / 's')
  config.harvest.rows = 128
  harvest(config, SUBJECT)
  for shard in range(2):
    name = f'sites/{SITES[0]}/shard-{shard:05d}-of-0000{{}}.bin'
    few = (tmp_path / 's' / name.format(2)).read_bytes()
    assert few == (store / name.format(5)).read_bytes()


def test_all_rows(text, tmp_path):
  config = tiny_config(text, tmp_path / 's')
  config.harvest.rows = 0
  manifest = harvest(config, SUBJECT)
  # 12 documents of 50 words and an EOS make 612 tokens, 68 sequences of 9.
  assert manifest.sequences == 68
  words = [w for f in text.iterdir() for w in f.read_text().split()]
  assert manifest.rows == sum(word != 'new' for word in words)


def test_a_complete_store_is_reused_without_the_model(store, text, monkeypatch):
  monkeypatch.setattr(job, 'make_forward', None)
  before = {p: p.stat().st_mtime_ns for p in store.rglob('*')}
  config = tiny_config(text, store)
  assert harvest(config, SUBJECT) == read_manifest(store)
  assert {p: p.stat().st_mtime_ns for p in store.rglob('*')} == before


def test_auto_arithmetic_is_what_was_faster_when_it_was_planned(
  text, tmp_path, monkeypatch
):
  def config(dtype, name):
    c = tiny_config(text, tmp_path / name)
    c.harvest.compute_dtype = dtype
    return c

  def stop(*_):
    raise KeyboardInterrupt

  real = planning.speeds
  fast = lambda dtype: lambda *a: real(*a) | {dtype: 1e15}
  monkeypatch.setattr(planning, 'speeds', fast('bfloat16'))
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(job, 'fill_share', stop)
    harvest(config('auto', 'auto'), SUBJECT)
  monkeypatch.setattr(planning, 'speeds', fast('float32'))
  auto = harvest(config('auto', 'auto'), SUBJECT)
  assert auto.config == harvest(config('bfloat16', 'own'), SUBJECT).config
  for path in (tmp_path / 'own' / 'sites').rglob('*.bin'):
    other = tmp_path / 'auto' / path.relative_to(tmp_path / 'own')
    assert path.read_bytes() == other.read_bytes()


def test_another_config_text_or_model_is_refused(store, text, tmp_path):
  config = tiny_config(text, store)
  config.harvest.seed = 1
  config.store.dtype = 'bfloat16'
  with pytest.raises(UserError, match=r'different: harvest.seed, store.dtype:'):
    harvest(config, SUBJECT)
  write_text(tmp_path, documents=11)
  with pytest.raises(UserError, match=r'different: text \(sha256\):'):
    harvest(tiny_config(tmp_path, store), SUBJECT)
  other = dataclasses.replace(SUBJECT, weights_sha256='others')
  with pytest.raises(UserError, match=r'different: model \(weights_sha256\)'):
    harvest(tiny_config(text, store), other)


def test_a_store_may_be_older_than_a_key():
  old = {'model': {'kind': 'hf'}}
  assert not differing_keys(old, {'model': {'kind': 'hf', 'weights': ''}})
  new = {'model': {'kind': 'hf', 'weights': 'x'}}
  assert differing_keys(old, new) == ['model.weights']


def bad(c, key, value):
  group, _, name = key.partition('.')
  c[group][name] = value


@pytest.mark.parametrize(
  'key, value, message',
  [
    ('harvest.sites', ('layer_1.resid_pst',), 'nearest is layer_1.resid_post'),
    ('harvest.sites', ('layer_9.mlp_out',), 'nearest is layer_2.mlp_out'),
    ('harvest.sites', (), 'name one or more'),
    ('harvest.sites', SITES[:1] * 2, 'each once'),
    ('harvest.sites', (5,), 'name one or more'),
    ('harvest.rows', 5000, '5,000 are needed: about .* bytes of text'),
    ('harvest.rows', 70, 'need at least 80'),
    ('harvest.rows', -1, 'use 0 for all'),
    ('harvest.sequence_length', 1, 'use 2 or more'),
    ('harvest.batch_sequences', 0, 'use 1 or more'),
    ('harvest.seed', -1, 'seed'),
    ('harvest.skip_tokens', (3, 'the'), "'the' is no token id; write numbers"),
    ('harvest.sequence_length', 21, 'made for 20: .*beyond_context=true'),
    ('harvest.compute_dtype', 'float23', "did you mean 'float32'"),
    ('store.dtype', 'bfloat', "did you mean 'bfloat16'"),
    ('store.rows_per_shard', 100, 'use 96'),
    ('store.norm_shards', 9, 'harvest.rows: 300 rows'),
    ('store.path', '', 'give --config.store.path'),
    ('text.path', '/nowhere', 'no .txt file'),
  ],
)
def test_bad_values_leave_nothing_behind(text, tmp_path, key, value, message):
  config = tiny_config(text, tmp_path / 's')
  bad(config, key, value)
  with pytest.raises(UserError, match=message) as caught:
    harvest(config, SUBJECT)
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 's').exists()


def test_too_little_text_says_how_much_is_needed(tmp_path):
  (tmp_path / 'a.txt').write_text(' '.join(['w1'] * 60))
  config = tiny_config(tmp_path / 'a.txt', tmp_path / 's')
  config.harvest.rows = 0
  message = '179 bytes of text give 54 rows, 80 are needed: about 265 bytes'
  with pytest.raises(UserError, match=message):
    harvest(config, SUBJECT)


def test_sequences_beyond_the_context_where_asked(text, tmp_path):
  config = tiny_config(text, tmp_path / 's')
  config.harvest.sequence_length = 21
  config.harvest.beyond_context = True
  manifest = harvest(config, SUBJECT)
  assert manifest.sequence_length == 21
  assert 'beyond_context' not in manifest.config['harvest']


def test_int8_columns_are_measured_without_position_0(text, tmp_path):
  config = tiny_config(text, tmp_path / 's')
  config.harvest.skip_first, config.store.dtype = 0, 'int8'
  rows = np.random.default_rng(0).normal(size=(3, 10, 2)).astype(np.float32)
  rows[:, 0] = 1e4  # an attention sink
  site = Site('x', 2, 'int8')
  (found,) = planning.measured(
    [site], config, lambda tokens: {'x': rows.reshape(-1, 2)}, None, True
  )
  wanted = rows[:, 1:].reshape(-1, 2).mean(axis=0)
  np.testing.assert_allclose(found.offset, wanted, rtol=1e-4)


def test_the_last_batch_is_filled_with_sequences_of_its_own():
  tokens = np.arange(14).reshape(7, 2)
  sequences = SimpleNamespace(
    starts=np.arange(8), tokens=lambda a, b: tokens[a:b]
  )
  assert batch(sequences, 1, 5)[:2].tolist() == [[10, 11], [12, 13]]
  assert {tuple(row) for row in batch(sequences, 1, 5)} == {(10, 11), (12, 13)}
