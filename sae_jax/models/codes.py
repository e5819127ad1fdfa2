"""Sparse codes of a batch, and the products on them.

A code names the few latents of each row that the loss or a gradient can see,
its candidates, with their pre-activations z: `Rows`, at most K a row, or
`Flat`, one list of all rows. Indices are those of this device's part of the
dictionary, as wherever a product runs inside shard_map; F stands for none.

Costs: the encoder's product is the dense one, in chunks of rows whose z stays
in cache; everything after it touches one row of W_dec or W_enc a candidate.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax.models.sae import SAE
from sae_jax.parallel import select
from sae_jax.parallel.mesh import DICT, manual, platform, vary, vary_like

PIECE = 256  # list entries taken at once: 0.8 MB of rows at D = 768
_GROUP = 16  # latents searched as one for candidates
# z of a chunk of rows. On a CPU it should stay in the last cache; elsewhere
# it bounds memory only, and larger products run better.
_CHUNK_BYTES = {'cpu': 2**24, 'default': 2**29}


class Rows(NamedTuple):
  """At most K candidates of each row, those that count first."""

  index: jax.Array  # [B, K] int32
  z: jax.Array  # [B, K]; 0 where there is no candidate


class Flat(NamedTuple):
  """The candidates of all rows, in order of rows; `count` are in use."""

  row: jax.Array  # [N] int32
  index: jax.Array  # [N] int32
  z: jax.Array  # [N]
  count: jax.Array  # [] int32


Codes = Rows | Flat


def decode(codes: Codes, f: jax.Array, W: jax.Array, rows: int) -> jax.Array:
  """sum_j f_j W[index_j] by row, [rows, E], without a sum over `dict`.

  f: latents, shaped like codes.z; W [F, E]. The gradients: to f the products
  g_row W[index], to W dense [F, E], in float32; compiled only where used.
  """
  W = vary(W, *vary_like(f))
  if isinstance(codes, Rows):
    return _decode_rows(codes.index, f, W)
  return _decode_flat(rows, codes.row, codes.index, codes.count, f, W)


@jax.custom_vjp
def _decode_rows(index, f, W):
  slots = 8  # at once: a loop over single slots takes twice as long on CPUs
  K = index.shape[1]
  fill = -K % slots
  index = jnp.pad(index, ((0, 0), (0, fill)), constant_values=len(W))
  f = jnp.pad(f, ((0, 0), (0, fill)))
  used = (index < len(W)).any(0).sum()  # slots in use come first

  def add(j, total):
    for k in range(slots):
      value, i = (_slot(a, j * slots + k) for a in (f, index))
      total = total + value[:, None] * _row(W, i)
    return total

  zero = vary(jnp.zeros((len(f), W.shape[1]), W.dtype), *vary_like(f, W))
  return lax.fori_loop(0, _ceil(used, slots), add, zero)


def _decode_rows_forward(index, f, W):
  return _decode_rows(index, f, W), (index, f, W)


def _decode_rows_backward(saved, g):
  index, f, W = saved

  def dot(k, df):
    rows = _row(W, _slot(index, k))
    here = jnp.einsum('be,be->b', g, rows, precision='highest')
    return lax.dynamic_update_index_in_dim(df, here, k, 0)

  used = (index < len(W)).any(0).sum()
  zero = vary(jnp.zeros(f.T.shape, W.dtype), *vary_like(f, W, g))
  df = lax.fori_loop(0, used, dot, zero).T
  e = entries(Rows(index, f), f, f, len(W))
  return None, df.astype(f.dtype), gradient(e, len(W), g, 'f')


_decode_rows.defvjp(_decode_rows_forward, _decode_rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode_flat(rows, row, index, count, f, W):
  row, index, f = (_whole_pieces(a) for a in (row, index, f))

  def add(j, total):
    r, i, v = (_piece(a, j) for a in (row, index, f))
    part = v[:, None] * _row(W, i)
    return total.at[r].add(part, mode='drop', indices_are_sorted=True)

  zero = vary(jnp.zeros((rows, W.shape[1]), W.dtype), *vary_like(f, W))
  return lax.fori_loop(0, _ceil(count, PIECE), add, zero)


def _decode_flat_forward(rows, row, index, count, f, W):
  saved = row, index, count, f, W
  return _decode_flat(rows, *saved), saved


def _decode_flat_backward(rows, saved, g):
  del rows
  row, index, count, f, W = saved
  r, i = _whole_pieces(row), _whole_pieces(index)

  def dot(j, df):
    a, b = _row(g, _piece(r, j)), _row(W, _piece(i, j))
    here = jnp.einsum('pe,pe->p', a, b, precision='highest')
    return lax.dynamic_update_slice(df, here, (j * PIECE,))

  zero = vary(jnp.zeros(r.shape, W.dtype), *vary_like(f, W, g))
  df = lax.fori_loop(0, _ceil(count, PIECE), dot, zero)[: len(f)]
  e = entries(Flat(row, index, f, count), f, f, len(W))
  dW = gradient(e, len(W), g, 'f')
  return None, None, None, df.astype(f.dtype), dW


_decode_flat.defvjp(_decode_flat_forward, _decode_flat_backward)


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
    active = active + (z > theta).sum()
    return (row, index, value, count + kept, active, over | (here > most)), None

  N = chunks * most
  like = vary_like(n, s.W_enc)
  start = (
    jnp.full(N + most, B), jnp.full(N + most, F), jnp.zeros(N + most),
    jnp.int32(0), jnp.int32(0), jnp.bool(False),
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
  return found.at[place].set(here, mode='drop', unique_indices=True)


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


class Entries(NamedTuple):
  """Summands of the gradients of W_dec and W_enc: f_j g[row_j] for row
  latent_j of the one, dz_j n[row_j] of the other. Sorted by latent."""

  latent: jax.Array  # [M] int32; F, at the end, where there is none
  row: jax.Array  # [M] int32
  f: jax.Array  # [M]
  dz: jax.Array  # [M]


def entries(codes: Codes, f: jax.Array, dz: jax.Array, latents: int) -> Entries:
  """The candidates sorted by latent, equal ones in order of rows."""
  if isinstance(codes, Rows):
    B, K = codes.index.shape
    row = jnp.repeat(jnp.arange(B, dtype=jnp.int32), K)
  else:
    row = codes.row
  e = Entries(codes.index.reshape(-1), row, f.reshape(-1), dz.reshape(-1))
  return sort(e, latents)


def sort(e: Entries, latents: int) -> Entries:
  """The same summands in order of latents."""
  order = _order(e.latent, latents)
  return Entries(*(a[order] for a in e))


def gradient(e: Entries, latents: int, rows: jax.Array, of: str) -> jax.Array:
  """sum_j e.f_j (of='f') or e.dz_j ('dz') rows[e.row_j] by latent: [F, .]."""
  weight, used = getattr(e, of), (e.latent < latents).sum()
  latent, row, weight = (_whole_pieces(a) for a in (e.latent, e.row, weight))

  def add(j, total):
    i, r, v = (_piece(a, j) for a in (latent, row, weight))
    part = v[:, None] * rows[r]
    return total.at[i].add(part, mode='drop', indices_are_sorted=True)

  shape = (latents, rows.shape[1])
  zero = vary(jnp.zeros(shape, rows.dtype), *vary_like(weight, rows))
  return lax.fori_loop(0, _ceil(used, PIECE), add, zero)


def _order(latent: jax.Array, top: int) -> jax.Array:
  """Stable argsort of indices [M] in [0, top].

  Sorts by digits, each packed with its place into 32 bits: XLA's sort of one
  array is five times faster on CPUs than that of keys with values.
  """
  M = len(latent)
  bits = max((M - 1).bit_length(), 1)
  digit, key = 32 - bits, latent.astype(jnp.uint32)
  place = order = jnp.arange(M, dtype=jnp.uint32)
  for shift in range(0, top.bit_length(), digit):
    part = (key[order] >> shift) << bits
    order = order[jnp.sort(part | place) & (2**bits - 1)]
  return order


def _slot(a, k):
  return lax.dynamic_index_in_dim(a, k, 1, keepdims=False)


def _row(W, index):
  """W[index], zeros where the index is none."""
  return W.at[index].get(mode='fill', fill_value=0)


def _whole_pieces(a):
  """a [N] with pieces up to its end; none behind it."""
  fill = jnp.iinfo(jnp.int32).max if a.dtype == jnp.int32 else 0
  return jnp.pad(a, (0, -len(a) % PIECE), constant_values=fill)


def _piece(a, j):
  return lax.dynamic_slice(a, (j * PIECE,), (PIECE,))


def _ceil(a, b):
  return (a + b - 1) // b
