"""Loss and gradients of a batch through its sparse code.

Same values as differentiating `objectives.loss`; runs inside shard_map, or
without a mesh. The gradients of the weights come as the summands they are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from sae_jax.models import activations, candidates, codes, objectives
from sae_jax.models.activations import BatchTopK, JumpReLU, TopK
from sae_jax.models.codes import Codes, Entries, Rows
from sae_jax.models.objectives import AuxK, L0Penalty, Penalty, Terms, Variables
from sae_jax.models.sae import SAE
from sae_jax.parallel import select
from sae_jax.parallel.mesh import (
  DATA,
  DICT,
  manual,
  mean_rows,
  sum_latents,
  vary_like,
  varying,
  zeros,
)

# How the terms of a batch lie on the mesh.
TERMS: Any = Terms(*[P()] * 3, fired=P(DICT), seen=P(), dense=P())  # type: ignore


class Found(NamedTuple):
  """The code of a batch."""

  code: Codes
  aux: Rows | None  # AuxK's latents
  over: jax.Array  # [] bool: a device has more candidates than its list holds


class Sums(NamedTuple):
  """The gradients: those that are small, and the summands of the others."""

  small: SAE  # W_enc and W_dec are None
  entries: Entries
  g: jax.Array  # [B or 2 B, E] cotangents of what was decoded
  n: jax.Array  # [B, D] rows that W_enc saw


def find(
  s: SAE, n: jax.Array, penalties: tuple[Penalty, ...], dead, budget: int, dtype
) -> Found:
  """The code of normalised rows n [B, D]: the encoder's product and a search.

  budget: candidates a row that a device's list has room for, on the mean.
  """
  aux_k = sum(p.k for p in penalties if isinstance(p, AuxK))
  if isinstance(s.act, TopK):
    code, aux = candidates.top_k(s, n, s.act.k, dead, aux_k, dtype)
    return Found(code, aux, jnp.bool(False))
  if isinstance(s.act, JumpReLU):
    flat, over = candidates.above(s, n, activations.floor(s.act), budget, dtype)
    return Found(flat, None, anywhere(over))
  found = candidates.largest(s, n, budget, dead, aux_k, dtype)
  return _batch_top_k(s, s.act, len(n), *found)


def _batch_top_k(s: SAE, act: BatchTopK, B, flat, aux, floor, over) -> Found:
  """The k B largest of the chunks' largest.

  `over` too when one of them may be missing: rows of one chunk, or latents of
  one device, that have more than twice their share.
  """
  F = len(s.b_enc)
  rows, row = _places(B, flat.row, DATA)
  latents, latent = _places(F, flat.index, DICT)
  used = jnp.arange(len(flat.z)) < flat.count
  z, most = jnp.where(used, flat.z, -jnp.inf), act.k * rows
  mask = used & select.largest_of_list(z, row, latent, most, (rows, latents))
  axes = vary_like(flat.z)
  least = lax.pmin(jnp.where(mask, flat.z, jnp.inf).min(), axes)
  short = lax.psum(flat.count, axes) < most
  lost = (floor > 0) & (short | (least <= floor))
  flat = codes.part(flat, mask, min(most, len(mask)), (B, F))
  return Found(flat, aux, anywhere(over | lost))


def _places(n, index, axis):
  """Of n entries on each device of the axis: how many there are in all, and
  `index` of this device's among them."""
  if not manual(axis) or axis not in varying(index):
    return n, index.astype(jnp.uint32)
  first = jnp.uint32(n) * lax.axis_index(axis).astype(jnp.uint32)
  return n * lax.axis_size(axis), index.astype(jnp.uint32) + first


def anywhere(flag: jax.Array) -> jax.Array:
  """Whether it is true on any device."""
  return lax.psum(flag.astype(jnp.int32), vary_like(flag)) > 0


def gradients(
  s: SAE,
  n: jax.Array,
  penalties: tuple[Penalty, ...],
  dead: jax.Array,
  ramp: jax.Array,
  *,
  budget: int,
  dtype,
) -> tuple[jax.Array, Terms, SAE]:
  """(loss [], its terms, gradients as arrays) of normalised rows n [B, D]."""
  found = find(s, n, penalties, dead, budget, dtype)

  def few():
    loss, terms, sums = of_code(s, n, n, found, penalties, dead, ramp)
    return loss, terms, dense(sums, len(s.b_enc))

  if isinstance(s.act, TopK):
    return few()
  return lax.cond(
    found.over,
    lambda: exact(s, n, penalties, dead, ramp, dtype),
    few,
  )


def of_code(
  s: SAE,
  n: jax.Array,
  t: jax.Array,
  found: Found,
  penalties: tuple[Penalty, ...],
  dead: jax.Array,
  ramp: jax.Array,
) -> tuple[jax.Array, Terms, Sums]:
  """(loss [], its terms, gradients) of the batch with that code."""
  code, aux, F = found.code, found.aux, len(s.b_enc)
  v = Variables(s.act, code.z, _tap(t), None, None)
  if aux is not None:
    v = v._replace(z_aux=aux.z, made_aux=_tap(t))
  (loss, terms), d = jax.value_and_grad(objectives.loss_of_codes, has_aux=True)(
    v, s, code, aux, t, penalties, dead=dead, ramp=ramp
  )
  f = activations.of_candidates(s.act, code.z, code.index)
  e, g = codes.entries(code, f, d.z, F), d.made
  if aux is not None:
    rest = codes.entries(aux, jax.nn.relu(aux.z), d.z_aux, F)
    rest = rest._replace(row=rest.row + len(n))
    e = codes.sort(Entries(*map(_join, e, rest)), F)
    g = _join(g, d.made_aux)
  db = (
    jnp.zeros_like(s.b_enc)
    .at[e.latent]
    .add(e.dz, mode='drop', indices_are_sorted=True)
  )
  db_dec = d.made.sum(0)
  if s.pre_bias:
    through = jnp.einsum('f,fd->d', db, s.W_enc, precision='highest')
    db_dec, n = db_dec - sum_latents(through), n - s.b_dec
  small: Any = s.replace(
    W_enc=None, W_dec=None, b_enc=db, b_dec=db_dec, act=d.act
  )
  return loss, terms, Sums(small, e, g, n)


def exact(
  s: SAE,
  n: jax.Array,
  penalties: tuple[Penalty, ...],
  dead: jax.Array,
  ramp: jax.Array,
  dtype,
) -> tuple[jax.Array, Terms, SAE]:
  """(loss, its terms, gradients as arrays) with nothing left out.

  For a batch with more candidates than fit. Taken chunk by chunk of rows, so
  that no [B, F] exists: the penalty, a function of the mean L0, by the slope
  of that mean. A BatchTopK selects in all rows at once.
  """
  grad = jax.value_and_grad(objectives.loss, has_aux=True)
  kinds = dict(dead=dead, ramp=ramp, dtype=dtype)
  if isinstance(s.act, BatchTopK):
    (loss, terms), grads = grad(s, n, n, penalties, **kinds)
    return loss, terms, grads

  def part(n):
    (_, terms), grads = grad(s, n, n, (), **kinds)
    z = s.pre(n, dtype)  # compiled once with the loss's own
    return terms, grads, jax.grad(lambda act: mean_rows(act.l0(z)))(s.act)

  parts = candidates.chunks(len(n), len(s.b_enc))
  terms, grads, slopes = mean_of_parts(part, n, parts)
  of_l0 = [p for p in penalties if isinstance(p, L0Penalty)]
  penalty, slope = jax.value_and_grad(
    lambda l0: sum((p.of(l0, ramp) for p in of_l0), jnp.zeros_like(l0))
  )(mean_rows(terms.l0[None]))
  add = lambda a, b: a + slope * b
  grads = grads.replace(act=jax.tree.map(add, grads.act, slopes))
  return terms.mse + penalty, terms._replace(penalty=penalty), grads


def mean_of_parts(part, x: jax.Array, parts: int):
  """The mean of part(x_j) over `parts` parts of the rows; any of booleans."""
  if parts == 1:
    return part(x)
  x = x.reshape(-1, parts, x.shape[-1])
  take = lambda j: part(lax.dynamic_index_in_dim(x, j, 1, keepdims=False))
  zero = jax.tree.map(zeros, jax.eval_shape(take, 0))
  add = lambda total, j: (jax.tree.map(jnp.add, total, take(j)), None)
  total, _ = lax.scan(add, zero, jnp.arange(parts))
  return jax.tree.map(lambda a: a if a.dtype == bool else a / parts, total)


def dense(sums: Sums, latents: int) -> SAE:
  """All gradients as arrays."""
  e, B = sums.entries, len(sums.n)
  return sums.small.replace(
    W_enc=codes.gradient(e._replace(row=e.row % B), latents, sums.n, 'dz'),
    W_dec=codes.gradient(e, latents, sums.g, 'f'),
  )


def _tap(t):
  """Zeros added to what is decoded: their gradient is its cotangent."""
  return jnp.zeros_like(t)


def _join(a, b):
  return jnp.concatenate([a, b])
