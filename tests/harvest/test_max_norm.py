"""Tokens with a hundred times the others' norm, left out of a harvest."""

import dataclasses

import damage
import numpy as np
import pytest
from tiny_harvest import SITES, tiny_config, tiny_subject

from sae_jax.errors import UserError
from sae_jax.harvest.job import harvest
from sae_jax.harvest.repair import repair
from sae_jax.harvest.verify import verify_store
from sae_jax.store import reader
from sae_jax.store.manifest import read_manifest
from sae_jax.store.statistics import norms

SINK = 7


@pytest.fixture(scope='module')
def subject():
  """The tiny model, with a token whose residual stream is huge."""
  plain = tiny_subject()
  embed = plain.params['embed'].at[SINK].multiply(100)
  return dataclasses.replace(plain, params=plain.params | {'embed': embed})


def made(text, root, subject, task='0/1', **store):
  config = tiny_config(text, root)
  config.harvest.max_norm, config.task = 10.0, task
  config.store.update(store)
  return harvest(config, subject)


@pytest.mark.parametrize('dtype', ['float32', 'int8'])
def test_they_are_counted_and_read_by_nobody(text, tmp_path, subject, dtype):
  m = made(text, tmp_path / 's', subject, dtype=dtype)
  resid, inner = m.sites  # the second is normalised: no outliers
  shards = range(len(m.shards))
  blocks = reader.shard_blocks(tmp_path / 's', resid.name, shards)
  rows, tokens = map(np.concatenate, zip(*blocks, strict=True))
  sinks = tokens[:, 2] == SINK
  assert m.rows - sinks.sum() == resid.all_rows < inner.all_rows == m.rows
  assert (
    norms(rows[sinks]).min() > resid.max_norm > 3 * norms(rows[~sinks]).max()
  )
  for _, held_out in reader.held_out(tmp_path / 's', resid.name):
    assert len(held_out) and (held_out[:, 2] != SINK).all()
  rows = rows[~sinks]
  np.testing.assert_allclose(resid.all_mean, rows.astype(float).mean(0), 1e-9)
  if resid.scale:  # columns are those of ordinary rows
    np.testing.assert_allclose(resid.scale, rows.std(0), 0.2)
  checks = verify_store(tmp_path / 's', rows=None, subject=subject)
  assert not any(c.problems or c.warnings or c.skipped for c in checks)


def test_tasks_and_repairs_give_the_same_bytes(text, tmp_path, subject):
  made(text, tmp_path / 'one', subject)
  whole = damage.contents(tmp_path / 'one')
  made(text, tmp_path / 'two', subject, task='1/2')
  made(text, tmp_path / 'two', subject, task='0/2')
  assert damage.contents(tmp_path / 'two') == whole
  damage.flip(damage.path_of(tmp_path / 'two', f'sites/{SITES[0]}', 2))
  checks = verify_store(tmp_path / 'two', rows=0, subject=subject)
  repair(tmp_path / 'two', checks, subject=subject)
  assert damage.contents(tmp_path / 'two') == whole


def test_a_store_without_the_key_is_that_of_before(text, tmp_path, subject):
  harvest(tiny_config(text, tmp_path / 's'), subject)
  m = read_manifest(tmp_path / 's')
  assert 'max_norm' not in m.config['harvest']
  assert [s.max_norm for s in m.sites] == [0, 0]
  with pytest.raises(UserError, match='harvest.max_norm'):
    made(text, tmp_path / 's', subject)


def test_a_bound_below_zero_is_refused(text, tmp_path, subject):
  config = tiny_config(text, tmp_path / 's')
  config.harvest.max_norm = -1.0
  with pytest.raises(UserError, match='harvest.max_norm: -1'):
    harvest(config, subject)
