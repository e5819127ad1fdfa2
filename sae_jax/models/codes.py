"""Sparse codes of a batch, and the products on them.

A code names the few latents of each row that the loss or a gradient can see,
its candidates, with their pre-activations z: `Rows`, at most K a row, or
`Flat`, one list of all rows. Indices are those of this device's part of the
dictionary, as wherever a product runs inside shard_map; F stands for none.

Each product touches one row of W_dec or W_enc a candidate. `candidates.py` has
the search for them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax.parallel.mesh import vary, vary_like

PIECE = 256  # list entries taken at once: 0.8 MB of rows at D = 768


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
  slots, K = 8, index.shape[1]
  padded = jnp.pad(index, ((0, 0), (0, -K % slots)), constant_values=len(W))
  product = functools.partial(jnp.einsum, 'ke,e->k', precision='highest')

  def dot(j, df):
    at = lax.dynamic_slice_in_dim(padded, j * slots, slots, 1)
    # 256 rows at once: [B, E] gathered slot by slot takes twice as long.
    here = lax.map(
      lambda x: product(_row(W, x[0]), x[1]), (at, g), batch_size=256
    )
    return lax.dynamic_update_slice_in_dim(df, here, j * slots, 1)

  used = (index < len(W)).any(0).sum()
  zero = vary(jnp.zeros(padded.shape, W.dtype), *vary_like(f, W, g))
  df = lax.fori_loop(0, _ceil(used, slots), dot, zero)[:, :K]
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


def part(code: Flat, mask: jax.Array, most: int, none: tuple[int, int]) -> Flat:
  """The first `most` of the candidates where mask [N]; none: (rows, F)."""
  at = positions(mask, most)
  take = lambda a, fill: a.at[at].get(mode='fill', fill_value=fill)
  row, index = take(code.row, none[0]), take(code.index, none[1])
  return Flat(row, index, take(code.z, 0), mask.sum(dtype=jnp.int32))


def positions(mask: jax.Array, most: int) -> jax.Array:
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
