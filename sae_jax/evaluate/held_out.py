"""The held-out split as sequences: token ids, and which positions have rows."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from sae_jax.errors import UserError
from sae_jax.store.files import ShardFile
from sae_jax.store.manifest import TOKENS, Manifest, local_root
from sae_jax.store.reader import load_sequences


class HeldOut(NamedTuple):
  """Sequences 0, 1, ... of the store; its first shards are the held-out ones.

  `rows` counts the rows of the held-out shards. The last sequence may have
  rows in the training split too: `whole` is the number of those that do not.
  """

  rows: int
  whole: int
  tokens: np.ndarray  # [n, T] int32
  stored: np.ndarray  # [n, T] bool: a row of this position is held out


def read_held_out(root: str | Path, manifest: Manifest) -> HeldOut:
  """Reads tokens and sequences of the held-out shards, not their rows.

  The rows that are in the store say which positions were left out of
  training (position 0, special tokens, padding), whatever the policy was.
  Raises UserError when nothing is held out.
  """
  shards = range(manifest.held_out_shards)
  rows = sum(manifest.shards[shard].rows for shard in shards)
  if not rows:
    raise UserError(
      f'store.path: the store at {root} holds no rows out of training: '
      'harvest one with held-out shards'
    )
  tokens = np.concatenate([load_sequences(root, shard) for shard in shards])
  stored = np.zeros(tokens.shape, bool)
  for shard in shards:
    file = ShardFile(local_root(root), manifest, TOKENS, shard)
    for block in range(file.blocks):
      sequence, position, _ = file.read(block).T
      stored[sequence, position] = True
  whole = len(tokens) - (1 if manifest.training_shards else 0)
  return HeldOut(rows, whole, tokens, stored)


def spread(n: int, among: int) -> np.ndarray:
  """At most n numbers below `among`, evenly spaced: neighbouring sequences
  come from one document, distant ones do not."""
  n = min(n, among)
  return (np.arange(n) * among) // max(n, 1)
