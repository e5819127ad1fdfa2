"""The permutations against Philox4x64-10 written out, and a fixed vector."""

import pytest

from sae_jax.store.order import BLOCKS, ROWS, block_order, permutation

pytestmark = pytest.mark.smoke
_64 = 2**64 - 1


def philox(counter, key):
  """Philox4x64-10 (Salmon et al. 2011): four uint64 from a counter."""
  a, b, c, d = counter
  k, l = key
  for _ in range(10):
    x, y = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
    a, b, c, d = (y >> 64) ^ b ^ k, y & _64, (x >> 64) ^ d ^ l, x & _64
    k, l = (k + 0x9E3779B97F4A7C15) & _64, (l + 0xBB67AE8584CAA73B) & _64
  return [a, b, c, d]


def test_philox_matches_the_authors_known_answer():
  # Random123, kat_vectors: philox4x64 10, all zero.
  assert philox([0] * 4, [0] * 2) == [
    0x16554D9ECA36314C, 0xDB20FE9D672D0FDC,
    0xD7E772CEE186176B, 0x7E68B68AEC7BA23B,
  ]  # fmt: skip


@pytest.mark.parametrize('n', [1, 4, 7, 100])
def test_permutation_is_the_documented_one(n):
  seed, purpose, a, b = 2**63 + 5, BLOCKS, 3, 9
  numbers = [
    number
    for i in range(1, n // 4 + 2)
    for number in philox([i, a, b, 0], [seed, purpose])
  ][:n]
  expected = sorted(range(n), key=lambda i: (numbers[i], i))
  assert permutation(n, seed, purpose, a, b).tolist() == expected


def test_the_vector_of_the_documentation():
  assert permutation(10, 7, ROWS, 3).tolist() == VECTOR


def test_every_argument_matters():
  base = dict(seed=1, purpose=0, a=2, b=3)
  seen = {tuple(permutation(50, **base))}
  for key in base:
    seen.add(tuple(permutation(50, **(base | {key: 10}))))
  assert len(seen) == 5
  assert sorted(next(iter(seen))) == list(range(50))


def test_block_order_cannot_be_changed_by_a_reader():
  with pytest.raises(ValueError):
    block_order(5, 0, 0, 0)[0] = 1


VECTOR = [6, 5, 1, 4, 0, 3, 7, 9, 8, 2]
