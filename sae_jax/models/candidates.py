"""The search for a batch's candidates: the encoder's product and what it finds.

The product is the dense one, in chunks of rows whose z stays in cache, so that
no [B, F] ever exists. Runs inside shard_map, or without a mesh.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax.models.codes import Flat, Rows, positions
from sae_jax.models.sae import SAE
from sae_jax.parallel import select
from sae_jax.parallel.mesh import (
  DICT,
  manual,
  platform,
  vary,
  vary_like,
  zeros,
)

_GROUP = 16  # latents searched as one for candidates
# z of a chunk of rows. On a CPU it should stay in the last cache; elsewhere
# it bounds memory only, and larger products run better.
_CHUNK_BYTES = {'cpu': 2**24, 'default': 2**29}


def top_k(
  s: SAE,
  n: jax.Array,
  k: int,
  dead: jax.Array | None = None,
  aux_k: int = 0,
  dtype: Any = None,
) -> tuple[Rows, Rows | None]:
  """The k largest pre-activations of each row n [B, D], and with aux_k > 0
  those of the dead latents (dead [F] bool): the same as `select.top_k_mask`.
  """

  def of_chunk(n):
    z = s.pre(n, dtype)
    return _best(z, k), _best_dead(z, dead, aux_k)

  main, aux = _in_chunks(of_chunk, n, len(s.b_enc))
  return _of_all_shards(main, k, s), _dead_of_all_shards(aux, aux_k, s)


def _best(z, k):
  """(index, z) [C, min(k, F)] of a chunk's largest, in order of size."""
  index = select.top_k(z, min(k, z.shape[1]))
  return index, jnp.take_along_axis(z, index, 1)


def _best_dead(z, dead, aux_k):
  return _best(jnp.where(dead, z, -jnp.inf), aux_k) if aux_k else None


def _dead_of_all_shards(found, aux_k, s: SAE) -> Rows | None:
  if found is None:
    return None
  rest = _of_all_shards(found, aux_k, s)
  alive = jnp.isneginf(rest.z)  # fewer than aux_k are dead
  index = jnp.where(alive, len(s.b_enc), rest.index)
  return Rows(index, jnp.where(alive, 0, rest.z))


def _of_all_shards(found, k, s: SAE) -> Rows:
  """Of the shards' candidates those that are the rows' k largest; the others
  are none. They come first: each shard's are in order."""
  index, z = found
  if manual(DICT):
    kept = select.best_of_shards(z, index, k, len(s.b_enc))
    index = jnp.where(kept, index, len(s.b_enc))
    z = jnp.where(kept, z, 0)
  return Rows(index, z)


def above(
  s: SAE, n: jax.Array, floor: jax.Array, budget: int, dtype: Any = None
) -> tuple[Flat, jax.Array]:
  """The candidates z > floor [F] of rows n [B, D], at most `budget` a row on
  the mean of a chunk of rows; NaN is one.

  Returns them, and whether a chunk has more than fit: then the search ends
  there, and the list is not to be used.
  """
  pick = lambda z, most, none: (~(z <= floor), none, none)
  flat, _, _, over = _listed(s, n, pick, (), budget, dtype)
  return flat, over


def largest(
  s: SAE,
  n: jax.Array,
  budget: int,
  dead: jax.Array | None = None,
  aux_k: int = 0,
  dtype: Any = None,
) -> tuple[Flat, Rows | None, jax.Array, jax.Array]:
  """The largest positive candidates of rows n [B, D], by chunks of rows.

  Of each chunk those above a floor of its own that leaves half to all of
  `budget` a row; the first one tried is that of the chunk before.
  Returns them, AuxK's as `top_k` has them, the highest of the floors, 0 where
  all positive ones are there, and whether some did not fit (equal ones).
  """

  def pick(z, most, floors):
    floor = _floor(z, floors[0], most)
    floors = floor, jnp.maximum(floors[1], floor)
    return ~(z <= floor), floors, _best_dead(z, dead, aux_k)

  start = jnp.zeros(()), jnp.zeros(())
  flat, (_, highest), aux, over = _listed(s, n, pick, start, budget, dtype)
  return flat, _dead_of_all_shards(aux, aux_k, s), highest, over


def _listed(s: SAE, n, pick: Callable, state, budget: int, dtype):
  """What pick(z, most, state) -> (mask, state, found) takes of each chunk's z,
  as one list with room for `most` a chunk; (list, state, what was found of each
  row, whether a chunk had more)."""
  F, B = len(s.b_enc), len(n)
  size = chunk_rows(B, F)
  if size * F >= 2**31:
    raise ValueError(f'{F} latents on a device: places in a chunk are int32')
  chunks, most = -(-B // size), size * min(budget, F)
  n = jnp.pad(n, ((0, chunks * size - B), (0, 0))).reshape(chunks, size, -1)

  def add(carry, j, n):
    row, index, value, count, state, _ = carry
    z = s.pre(n, dtype)
    z = jnp.where((j * size + jnp.arange(size) < B)[:, None], z, -jnp.inf)
    mask, state, rest = pick(z, most, state)
    at, here = _find(mask, most)
    found = (
      jnp.where(at < z.size, j * size + at // F, B),
      jnp.where(at < z.size, at % F, F),
      z.reshape(-1).at[at].get(mode='fill', fill_value=0),
    )
    put = lambda a, x: lax.dynamic_update_slice(a, x, (count,))
    row, index, value = map(put, (row, index, value), found)
    count += jnp.minimum(here, most)
    return (row, index, value, count, state, here > most), rest

  def next_(carry, chunk):
    # The rest of a list that is not whole is not worth a product.
    rest = jax.eval_shape(add, carry, *chunk)[1]
    none = lambda carry, *_: (carry, jax.tree.map(zeros, rest))
    return lax.cond(carry[-1], none, add, carry, *chunk)

  N = chunks * most
  like = vary_like(n, s.W_enc)
  start = (
    jnp.full(N + most, B), jnp.full(N + most, F), jnp.zeros(N + most),
    jnp.int32(0), state, jnp.bool(False),
  )  # fmt: skip
  start = jax.tree.map(lambda a: vary(a, *like), start)
  end, rest = lax.scan(next_, start, (jnp.arange(chunks), n))
  row, index, z, count, state, over = end
  rest = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:B], rest)
  return Flat(row[:N], index[:N], z[:N], count), state, rest, over


def _floor(z: jax.Array, guess: jax.Array, most: int) -> jax.Array:
  """A floor [] >= 0 that most / 2 to `most` entries of z are above, or all
  positive ones: `guess` if it is one, else by bisection of its bits."""
  value = lambda bits: lax.bitcast_convert_type(bits, jnp.float32)
  above = lambda bits: (~(z <= value(bits))).sum(dtype=jnp.int32)

  def wrong(carry):
    low, high, at, n = carry
    few = (n < most // 2) & (at > 0)
    return ((n > most) | few) & (high - low > 1)

  def halve(carry):
    low, high, at, n = carry
    low, high = jnp.where(n > most, at, low), jnp.where(n > most, high, at)
    at = low + (high - low) // 2
    return low, high, at, above(at)

  # Floats from 0 up are in the order of their bits.
  at = lax.bitcast_convert_type(guess, jnp.int32)
  zero, top = jnp.zeros_like(at), jnp.full_like(at, 0x7F800000)
  _, high, at, n = lax.while_loop(wrong, halve, (zero, top, at, above(at)))
  return value(jnp.where(n > most, high, at))


def _find(mask, most):
  """Flat indices [most] of the true entries of mask [C, F], in order, and how
  many there are; mask.size where there are no more.

  First the groups that hold some, then these groups' entries: one pass over
  the mask and a scatter of a sixteenth of it.
  """
  group = _GROUP if mask.shape[1] % _GROUP == 0 else 1
  mask = mask.reshape(-1, group)
  of_group = mask.sum(1, dtype=jnp.int32)
  groups = positions(of_group > 0, most)  # `most` of them, in order
  at = groups[:, None] * group + jnp.arange(group)
  held = mask.at[groups].get(mode='fill', fill_value=False)
  places = positions(held.reshape(-1), most)
  at = at.reshape(-1).at[places].get(mode='fill', fill_value=mask.size)
  return at, of_group.sum()


def _in_chunks(f: Callable, n: jax.Array, latents: int) -> Any:
  """f of chunks of rows of n, joined again."""
  B, size = len(n), chunk_rows(len(n), latents)
  chunks = -(-B // size)
  n = jnp.pad(n, ((0, chunks * size - B), (0, 0)))
  out = lax.map(f, n.reshape(chunks, size, -1))
  return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:B], out)


def chunks(rows: int, latents: int) -> int:
  """A divisor of `rows`: parts that are about as small as a chunk."""
  least = -(-rows // chunk_rows(rows, latents))
  return next(p for p in range(least, rows + 1) if rows % p == 0)


def chunk_rows(rows: int, latents: int) -> int:
  """Rows of a chunk: of equal ones of at most _CHUNK_BYTES, at least 64."""
  size = _CHUNK_BYTES.get(platform(), _CHUNK_BYTES['default'])
  most = max(size // (4 * latents), 64)
  return -(-rows // -(-rows // most))
