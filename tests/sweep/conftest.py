"""A small store of planted rows, and studies on it."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / 'train'))
from train_runs import SITE, planted_rows  # noqa: E402

from sae_jax.store.create import write_arrays  # noqa: E402


@pytest.fixture(scope='session')
def store(tmp_path_factory):
  """Path of a store: 16 wide, 2 held-out and 6 training shards of 256."""
  root = tmp_path_factory.mktemp('store')
  write_arrays(
    root,
    {SITE: planted_rows(8 * 256)[0]},
    rows_per_shard=256,
    rows_per_block=16,
    held_out_shards=2,
  )
  return root
