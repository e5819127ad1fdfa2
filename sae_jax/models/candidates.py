"""The search for a batch's candidates: the encoder's product and what it finds.

The product is the dense one, in chunks of rows whose z stays in cache, so that
no [B, F] ever exists. Runs inside shard_map, or without a mesh.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax.models.codes import Flat, Rows
from sae_jax.models.sae import SAE
from sae_jax.parallel import select
from sae_jax.parallel.mesh import DICT, manual, platform, vary, vary_like

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
    found = _best(z, k)
    if not aux_k:
      return found, None
    assert dead is not None
    return found, _best(jnp.where(dead, z, -jnp.inf), aux_k)

  main, aux = _in_chunks(of_chunk, n, len(s.b_enc))
  rows = _of_all_shards(main, k, s)
  if aux is None:
    return rows, None
  rest = _of_all_shards(aux, aux_k, s)
  alive = jnp.isneginf(rest.z)  # fewer than aux_k are dead
  index = jnp.where(alive, len(s.b_enc), rest.index)
  return rows, Rows(index, jnp.where(alive, 0, rest.z))


def _best(z, k):
  """(index, z) [C, min(k, F)] of a chunk's largest, in order of size."""
  index = select.top_k(z, min(k, z.shape[1]))
  return index, jnp.take_along_axis(z, index, 1)


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
  s: SAE,
  n: jax.Array,
  floor: jax.Array,
  theta: jax.Array,
  budget: int,
  dtype: Any = None,
) -> tuple[Flat, jax.Array, jax.Array]:
  """The candidates z > floor [F] of rows n [B, D], at most `budget` a row on
  the mean of a chunk of rows; NaN is one.

  Returns them, how many z > theta [F] there are in all, and whether a chunk has
  more candidates than fit: then the list is not whole, and not to be used.
  """
  F, B = len(s.b_enc), len(n)
  size = chunk_rows(B, F)
  if size * F >= 2**31:
    raise ValueError(f'{F} latents on a device: places in a chunk are int32')
  chunks, most = -(-B // size), size * min(budget, F)
  n = jnp.pad(n, ((0, chunks * size - B), (0, 0))).reshape(chunks, size, -1)

  def add(carry, chunk):
    (row, index, value, count, active, over), (j, n) = carry, chunk
    z = s.pre(n, dtype)
    z = jnp.where((j * size + jnp.arange(size) < B)[:, None], z, -jnp.inf)
    at, here = _find(~(z <= floor), most)
    found = at // F, at % F, z.reshape(-1).at[at].get(mode='fill', fill_value=0)
    found = (
      jnp.where(at < z.size, j * size + found[0], B),
      jnp.where(at < z.size, found[1], F),
      found[2],
    )
    put = lambda a, x: lax.dynamic_update_slice(a, x, (count,))
    row, index, value = map(put, (row, index, value), found)
    kept = jnp.minimum(here, most)
    # Of a batch there may be more than int32 counts.
    active = active + (z > theta).sum(1).astype(jnp.float32).sum()
    return (row, index, value, count + kept, active, over | (here > most)), None

  N = chunks * most
  like = vary_like(n, s.W_enc)
  start = (
    jnp.full(N + most, B), jnp.full(N + most, F), jnp.zeros(N + most),
    jnp.int32(0), jnp.float32(0), jnp.bool(False),
  )  # fmt: skip
  start = jax.tree.map(lambda a: vary(a, *like), start)
  (row, index, z, count, active, over), _ = lax.scan(
    add, start, (jnp.arange(chunks), n)
  )
  return Flat(row[:N], index[:N], z[:N], count), active, over


def _find(mask, most):
  """Flat indices [most] of the true entries of mask [C, F], in order, and how
  many there are; mask.size where there are no more.

  First the groups that hold some, then these groups' entries: one pass over
  the mask and a scatter of a sixteenth of it.
  """
  group = _GROUP if mask.shape[1] % _GROUP == 0 else 1
  mask = mask.reshape(-1, group)
  of_group = mask.sum(1, dtype=jnp.int32)
  groups = _positions(of_group > 0, most)  # `most` of them, in order
  at = groups[:, None] * group + jnp.arange(group)
  held = mask.at[groups].get(mode='fill', fill_value=False)
  places = _positions(held.reshape(-1), most)
  at = at.reshape(-1).at[places].get(mode='fill', fill_value=mask.size)
  return at, of_group.sum()


def _positions(mask, most):
  """The first `most` places [most] where mask [M] is true, then M."""
  width = 32
  lines = jnp.pad(mask, (0, -len(mask) % width)).reshape(-1, width)
  lines = lines.astype(jnp.float32)
  before = jnp.triu(jnp.ones((width, width), jnp.float32), 1)
  of_line = lines.sum(1).astype(jnp.int32)
  first = jnp.cumsum(of_line) - of_line
  # A product is the fastest short cumulative sum there is; counts below 32.
  place = (lines @ before).astype(jnp.int32) + first[:, None]
  place = jnp.where(lines > 0, place, most).reshape(-1)
  found = vary(jnp.full(most, len(mask)), *vary_like(mask))
  here = jnp.arange(len(place))
  return found.at[place].set(here, mode='drop')


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
