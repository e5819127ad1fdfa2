"""Permutations that any language can recompute: rows sorted by Philox numbers.

The counter-based generator is used raw, because the streams of numpy's
`Generator` methods may change between numpy versions (NEP 19).
"""

import functools

import numpy as np

# What a permutation is for; the second word of the Philox key.
ROWS, DOCUMENTS, BLOCKS = 0, 1, 2


def permutation(
  n: int, seed: int, purpose: int, a: int = 0, b: int = 0
) -> np.ndarray:
  """The order [n] int64 of 0..n-1: place p is taken by element `order[p]`.

  Element i gets the i-th output of Philox4x64-10 with key (seed, purpose) and
  counter (1, a, b, 0), (2, a, b, 0), ..., four numbers to a counter; elements
  are sorted by their number, equal numbers by index. docs/store.md has a test
  vector.
  """
  # Arrays, because a list that mixes words above 2^63 with others is read as
  # float64. Numpy counts up before the first output.
  key = np.array([seed, purpose], np.uint64)
  counter = np.array([0, a, b, 0], np.uint64)
  generator = np.random.Philox(key=key, counter=counter)
  return np.argsort(generator.random_raw(n), kind='stable')


# Neighbouring batches share a window, and reader threads ask for it at once.
@functools.lru_cache(maxsize=16)
def block_order(n: int, seed: int, epoch: int, window: int) -> np.ndarray:
  """The order of the n blocks of one window in one epoch, read-only."""
  order = permutation(n, seed, BLOCKS, epoch, window)
  order.setflags(write=False)
  return order


def shard_order(n: int, seed: int, shard: int) -> np.ndarray:
  """The order of the n rows of a shard: place p holds row `order[p]`."""
  return permutation(n, seed, ROWS, shard)
