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
  vary,
  vary_like,
  varying,
)

# How the terms of a batch lie on the mesh.
TERMS: Any = Terms(*[P()] * 3, fired=P(DICT), seen=P(), dense=P())  # type: ignore


class Found(NamedTuple):
  """The code of a batch."""

  code: Codes
  aux: Rows | None  # AuxK's latents
  l0: jax.Array  # [] mean active latents of a row, over all devices
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
  no = jnp.bool(False)
  if isinstance(s.act, TopK):
    code, aux = candidates.top_k(s, n, s.act.k, dead, aux_k, dtype)
    return Found(code, aux, jnp.float32(s.act.k), no)
  if isinstance(s.act, JumpReLU):
    floor, theta = activations.floor(s.act), s.act.theta
    flat, active, over = candidates.above(s, n, floor, theta, budget, dtype)
    l0 = mean_rows(sum_latents(active / len(n))[None])
    return Found(flat, None, l0, anywhere(over))
  return _batch_top_k(s, s.act, n, budget, dtype)


def _batch_top_k(s: SAE, act: BatchTopK, n, budget, dtype) -> Found:
  """The k B largest of what exceeds most of the last batches' threshold.

  `over` too when these candidates are fewer: the threshold fell by a third.
  """
  B, F = len(n), len(s.b_enc)
  floor = jnp.full_like(s.b_enc, act.theta * (2 / 3))
  flat, _, over = candidates.above(s, n, floor, floor, budget, dtype)
  rows, row = _places(B, flat.row, DATA)
  latents, latent = _places(F, flat.index, DICT)
  used = jnp.arange(len(flat.z)) < flat.count
  z, most = jnp.where(used, flat.z, -jnp.inf), act.k * rows
  mask = used & select.largest_of_list(z, row, latent, most, (rows, latents))
  short = lax.psum(flat.count, vary_like(flat.z)) < most
  flat = flat._replace(
    index=jnp.where(mask, flat.index, F), z=jnp.where(mask, flat.z, 0)
  )
  return Found(flat, None, jnp.float32(act.k), anywhere(over) | short)


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


def works(act: activations.Activation, penalties: tuple[Penalty, ...]) -> bool:
  """Whether there is a sparse rule: not for AuxK with BatchTopK."""
  aux = any(isinstance(p, AuxK) for p in penalties)
  return not (aux and isinstance(act, BatchTopK))


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
    lambda: exact(s, n, penalties, dead, ramp, dtype, found.l0),
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
  l0: jax.Array,
) -> tuple[jax.Array, Terms, SAE]:
  """(loss, its terms, gradients as arrays) with nothing left out.

  For a batch with more candidates than fit, whose mean L0 is `l0`. Taken chunk
  by chunk of rows, so that no [B, F] exists: each has the penalty's slope at
  l0, which makes the loss linear in rows. A BatchTopK selects in all at once.
  """
  grad = jax.value_and_grad(objectives.loss, has_aux=True)
  whole = isinstance(s.act, BatchTopK)
  of_l0 = [p for p in penalties if isinstance(p, L0Penalty)]
  lines = penalties if whole else tuple(p.tangent(l0) for p in of_l0)

  def part(n):
    (loss, terms), grads = grad(
      s, n, n, lines, dead=dead, ramp=ramp, dtype=dtype
    )
    return loss, terms, grads

  if whole:
    return part(n)
  _, terms, grads = mean_of_parts(
    part, n, candidates.chunks(len(n), len(s.b_enc))
  )
  penalty = sum((p.of(l0, ramp) for p in of_l0), jnp.zeros_like(terms.mse))
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


def zeros(like: Any) -> jax.Array:
  """Of that shape and type, on the same axes each device's own."""
  return vary(jnp.zeros(like.shape, like.dtype), *varying(like))


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
