"""The optimiser's update of a sparse code: only the rows that it touches.

With b1 = 0 a latent without gradient does not move, and its second moment can
be decayed when it is touched next: `touched` [F] says up to which update it
was. One walk over the touched latents in order sums their gradients, a block
at a time, and updates their rows in place: no gradient [F, D] ever exists.
Equal to `optim.update` but for rounding.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from sae_jax.models.activations import TopK
from sae_jax.models.codes import PIECE
from sae_jax.models.objectives import AuxK, Penalty, Terms
from sae_jax.models.sae import SAE, Norm, unit_rows
from sae_jax.parallel.mesh import (
  DATA,
  DICT,
  latent_specs,
  manual,
  on_each_device,
  sum_latents,
  vary,
  vary_like,
  varying,
  zeros,
)
from sae_jax.train import sparse
from sae_jax.train.sparse import Sums

_BLOCK = 256  # latents at once: at D = 768 six arrays of 0.8 MB, in cache


class Rows(NamedTuple):
  """What an update changes row by row."""

  W_enc: jax.Array  # [F, D]
  W_dec: jax.Array  # [F, E]
  nu_enc: jax.Array  # second moments
  nu_dec: jax.Array
  touched: jax.Array  # [F] int32


class Adam(NamedTuple):
  """The constants of one update, the count'th."""

  lr: jax.Array
  b2: jax.Array
  eps: jax.Array
  count: jax.Array  # [] int32, from 1


class After(NamedTuple):
  """What a batch says and does."""

  loss: jax.Array
  terms: Terms
  small: SAE  # gradients; W_enc and W_dec are None
  rows: Rows
  norm: jax.Array  # [] of all gradients
  good: jax.Array  # [] bool: loss and gradients are finite


def step(
  params: SAE,
  norm: Norm,
  x: jax.Array,
  penalties: tuple[Penalty, ...],
  dead: jax.Array,
  ramp: jax.Array,
  rows: Rows,
  adam: Adam,
  *,
  budget: int,
  dtype: Any,
) -> After:
  """Gradients of raw rows x [B, D], and the update of what they touch.

  On a mesh with one device along `data`. Nothing changes unless all is finite.
  """

  def local(params, norm, x, penalties, dead, ramp, rows, adam):
    if DATA in varying(x):
      x = lax.pmean(x, DATA)  # one device: a statement, not a sum
    n = norm(x)
    params = params.replace(W_enc=rows.W_enc, W_dec=rows.W_dec)

    def find(penalties):
      return sparse.find(params, n, penalties, dead, budget, dtype)

    def by_code(penalties, found):
      return sparse.of_code(params, n, n, found, penalties, dead, ramp)

    def few(rows):
      whole = lambda: by_code(penalties, found)
      if not aux:
        return _after_sums(whole(), rows, adam)
      like = jax.eval_shape(whole)
      rest = lambda: by_code((), found._replace(aux=None))
      padded = lambda: jax.tree.map(_pad_to, rest(), like)
      return _after_sums(lax.cond(any_dead, whole, padded), rows, adam)

    def everything(rows):
      out = sparse.exact(params, n, penalties, dead, ramp, dtype)
      return _after_arrays(*out, rows, adam)

    aux = any(isinstance(p, AuxK) for p in penalties)
    any_dead = sum_latents(dead.sum()) > 0
    whole = lambda: find(penalties)
    if aux:
      none = jax.tree.map(zeros, jax.eval_shape(whole).aux)
      found = lax.cond(any_dead, whole, lambda: find(())._replace(aux=none))
    else:
      found = whole()
    if isinstance(params.act, TopK):
      return few(rows)
    return lax.cond(found.over, everything, few, rows)

  params = params.replace(W_enc=None, W_dec=None)
  arguments = params, norm, x, penalties, dead, ramp, rows, adam
  if jax.sharding.get_abstract_mesh().empty:
    return local(*arguments)
  split = lambda tree: latent_specs(tree, False)
  specs: Any = After(P(), sparse.TERMS, split(params), split(rows), P(), P())  # type: ignore
  return on_each_device(local, specs)(*arguments)


def _pad_to(a, like):
  """a with nothing added along its first axis, of the type of `like`."""
  if a.shape != like.shape:
    none = jnp.iinfo(jnp.int32).max if a.dtype == jnp.int32 else 0
    fill = [(0, like.shape[0] - len(a))] + [(0, 0)] * (a.ndim - 1)
    a = jnp.pad(a, fill, constant_values=none)
  return vary(a, *varying(like))


def _after_sums(out, rows: Rows, adam: Adam) -> After:
  loss, terms, sums = out
  e, largest = sums.entries, lambda a: jnp.abs(a).max()
  # No norm of summed gradients exceeds this: known before the first row
  # changes. Its square must be a number too: it goes into the moments.
  bound = jnp.abs(e.f).sum() * largest(sums.g) * sums.g.shape[1] ** 0.5
  bound += jnp.abs(e.dz).sum() * largest(sums.n) * sums.n.shape[1] ** 0.5
  good = _finite(loss, _squares([bound, sums.small]))
  return _after(loss, terms, sums.small, *update(rows, sums, adam, good), good)


def _after_arrays(loss, terms, grads: SAE, rows: Rows, adam: Adam) -> After:
  """The same with all gradients as arrays."""
  small: Any = grads.replace(W_enc=None, W_dec=None)
  good = _finite(loss, _squares(grads))
  after = update_all(rows, grads.W_enc, grads.W_dec, adam, good)
  return _after(loss, terms, small, *after, good)


def _after(loss, terms, small, rows: Rows, squares, good) -> After:
  for a in jax.tree.leaves(small):
    square = jnp.square(a).sum()
    own = DICT in varying(a) or not manual(DICT)
    squares += square if own else square / lax.axis_size(DICT)
  norm = jnp.sqrt(sum_latents(vary(squares, DICT)))
  norm = jnp.where(good, norm, jnp.nan)
  return After(loss, terms, small, rows, norm, good)


def _squares(tree) -> list[jax.Array]:
  return [jnp.square(a).sum() for a in jax.tree.leaves(tree)]


def _finite(*tree) -> jax.Array:
  bad = [~jnp.isfinite(a).all() for a in jax.tree.leaves(tree)]
  return ~sparse.anywhere(functools.reduce(jnp.logical_or, bad))


def caught_up(opt: Any, touched: jax.Array, b2: float) -> Any:
  """The optimiser's state with the moments of all rows up to date."""
  nu, count = (optax.tree.get(opt, k) for k in ('nu', 'count'))
  of = lambda a: lagging(a, touched, count, b2)
  return optax.tree.set(
    opt, nu=nu.replace(W_enc=of(nu.W_enc), W_dec=of(nu.W_dec))
  )


def lagging(nu: jax.Array, touched: jax.Array, done: jax.Array, b2):
  """Second moments nu [F, .] of rows decayed up to `touched`, up to `done`."""
  factor = jnp.where(touched < done, b2 ** (done - touched), 1.0)
  return nu * factor[:, None].astype(nu.dtype)


def update(
  rows: Rows, sums: Sums, adam: Adam, good: jax.Array
) -> tuple[Rows, jax.Array]:
  """The rows after an update by the summed gradients, none unless `good`.

  Returns them and this device's sum of squares of the gradients.
  """
  e, F, B = sums.entries, len(rows.touched), len(sums.n)
  first = jnp.concatenate([jnp.ones(1, bool), e.latent[1:] != e.latent[:-1]])
  here = e.latent < F
  rank = jnp.cumsum((first & here).astype(jnp.int32)) - 1
  rank = jnp.where(here, rank, len(rank))
  touched = (first & here).sum()
  size = min(F, len(rank))
  latents = jnp.full(size + _BLOCK, F, jnp.int32)
  latents = latents.at[rank].set(e.latent, mode='drop')
  edges = jnp.searchsorted(rank, jnp.arange(0, size + 2 * _BLOCK, _BLOCK))
  pad = lambda a, fill=0: jnp.pad(a, (0, PIECE), constant_values=fill)
  rank, row, f, dz = pad(rank, len(rank)), pad(e.row), pad(e.f), pad(e.dz)

  like = vary_like(f, dz, sums.g, sums.n, rows.W_enc)
  zero = lambda W: vary(jnp.zeros((_BLOCK, W.shape[1]), W.dtype), *like)

  def of_block(b):
    start, end = edges[b], edges[b + 1]

    def piece(j, total):
      take = lambda a: lax.dynamic_slice(a, (start + j * PIECE,), (PIECE,))
      at, r = take(rank) - b * _BLOCK, take(row)
      of_dec = take(f)[:, None] * sums.g[r]
      of_enc = take(dz)[:, None] * sums.n[r % B]
      add = lambda a, x: a.at[at].add(x, mode='drop', indices_are_sorted=True)
      return add(total[0], of_enc), add(total[1], of_dec)

    pieces = (end - start + PIECE - 1) // PIECE
    g = lax.fori_loop(0, pieces, piece, (zero(rows.W_enc), zero(rows.W_dec)))
    return lax.dynamic_slice(latents, (b * _BLOCK,), (_BLOCK,)), *g

  return _walk(rows, of_block, jnp.where(good, touched, 0), adam)


def update_all(
  rows: Rows, g_enc: jax.Array, g_dec: jax.Array, adam: Adam, good: jax.Array
) -> tuple[Rows, jax.Array]:
  """The same with the gradients of all rows, [F, D] and [F, E]."""

  def of_block(b):
    at = b * _BLOCK + jnp.arange(_BLOCK)
    take = lambda g: g.at[at].get(mode='fill', fill_value=0)
    return at, take(g_enc), take(g_dec)

  return _walk(rows, of_block, jnp.where(good, len(g_enc), 0), adam)


def _walk(rows: Rows, of_block: Callable, count, adam: Adam):
  """Updates the first `count` latents that blocks name, in place.

  of_block(b) -> (latents [_BLOCK], F for none, and their gradients).
  """

  def block(b, carry):
    rows, squares = carry
    at, *g = of_block(b)
    old = Rows(*(a.at[at].get(mode='fill', fill_value=0) for a in rows))
    new, here = _update_rows(old, g[0], g[1], adam)
    put = lambda a, x: a.at[at].set(x, mode='drop', indices_are_sorted=True)
    return Rows(*map(put, rows, new)), squares + here

  blocks = (count + _BLOCK - 1) // _BLOCK
  zero = vary(jnp.zeros((), rows.W_enc.dtype), *vary_like(rows.W_enc))
  return lax.fori_loop(0, blocks, block, (rows, zero))


def _update_rows(rows: Rows, g_enc, g_dec, adam: Adam):
  squares = jnp.square(g_enc).sum() + jnp.square(g_dec).sum()
  along = jnp.einsum('fe,fe->f', g_dec, rows.W_dec, precision='highest')
  g_dec = g_dec - along[:, None] * rows.W_dec
  unbiased = 1 - adam.b2**adam.count

  def step(W, nu, g):
    nu = lagging(nu, rows.touched, adam.count - 1, adam.b2)
    nu = (1 - adam.b2) * jnp.square(g) + adam.b2 * nu
    return W - adam.lr * g / (jnp.sqrt(nu / unbiased) + adam.eps), nu

  W_enc, nu_enc = step(rows.W_enc, rows.nu_enc, g_enc)
  W_dec, nu_dec = step(rows.W_dec, rows.nu_dec, g_dec)
  touched = jnp.full_like(rows.touched, 0) + adam.count
  return Rows(W_enc, unit_rows(W_dec), nu_enc, nu_dec, touched), squares
