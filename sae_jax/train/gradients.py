"""The gradients of a batch: each device's part, then one reduction.

Inside `shard_map` over the whole mesh every device differentiates the loss of
its rows by its latents, micro-batch after micro-batch, and only the sum of
all goes over `data`, once a step.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sae_jax.models import candidates, objectives
from sae_jax.models.objectives import Penalty, Terms
from sae_jax.models.sae import SAE, Norm
from sae_jax.parallel import select
from sae_jax.parallel.mesh import (
  DATA,
  DICT,
  latent_specs,
  on_each_device,
  vary,
  varying,
)
from sae_jax.train import sparse


def gradients(
  params: SAE,
  norm: Norm,
  x: jax.Array,
  penalties: tuple[Penalty, ...],
  dead: jax.Array,
  ramp: jax.Array,
  *,
  micro_batches: int,
  dtype: jax.typing.DTypeLike,
  scatter: bool,
  budget: int,
) -> tuple[jax.Array, Terms, SAE]:
  """(loss [], its terms, gradients like params) of raw rows x [B@data, D].

  Loss, terms and gradients are means over `micro_batches` parts of the batch;
  part j has the rows j, j + micro_batches, ... of every device, so that all
  meshes take the same parts. What is not linear in rows (AuxK's ratio, the
  quadratic L0 penalty, a batch's selection) is taken within a part.

  scatter: gradients with latents come split over `data` too, [F@(dict, data)].
  budget: above 0, through sparse codes with room for so many candidates a row.
  """

  def local(params, norm, x, penalties, dead, ramp):
    # A copy for each part of the data: gradients of copies are not summed.
    params = jax.tree.map(lambda a: vary(a, DATA), params)

    def part(x):
      n = norm(x)
      if budget:
        return sparse.gradients(
          params, n, penalties, dead, ramp, budget=budget, dtype=dtype
        )
      (loss, terms), grads = jax.value_and_grad(objectives.loss, has_aux=True)(
        params, n, n, penalties, dead=dead, ramp=ramp, dtype=dtype
      )
      return loss, terms, grads

    loss, terms, grads = sparse.mean_of_parts(part, x, micro_batches)
    if jax.sharding.get_abstract_mesh().empty:
      return loss, terms, grads
    terms = jax.tree.map(_over_rows, terms)
    return loss, terms, jax.tree.map(reduce, grads)

  def reduce(g):
    if scatter and DICT in varying(g):
      return jax.lax.psum_scatter(g, DATA, scatter_dimension=0, tiled=True)
    return jax.lax.psum(g, DATA)

  if jax.sharding.get_abstract_mesh().empty:
    return local(params, norm, x, penalties, dead, ramp)
  specs = P(), sparse.TERMS, latent_specs(params, scatter)
  return on_each_device(local, specs)(params, norm, x, penalties, dead, ramp)


def held_out_terms(s: SAE, x: jax.Array) -> Terms:
  """What an SAE in use makes of raw rows x [B@data, D]; means over all rows.

  In chunks of rows: no [B, F] exists.
  """

  def local(s, x):
    def part(x):
      n, none = s.norm_in(x), jnp.zeros((), bool)
      return objectives.loss(
        s, n, n, (), dead=none, ramp=jnp.float32(1), training=False
      )[1]

    parts = candidates.chunks(len(x), len(s.b_enc))
    return jax.tree.map(_over_rows, sparse.mean_of_parts(part, x, parts))

  if jax.sharding.get_abstract_mesh().empty:
    return local(s, x)
  return on_each_device(local, sparse.TERMS)(s, x)


def threshold(s: SAE, x: jax.Array, budget: int) -> jax.Array:
  """What a BatchTopK's selection among all raw rows x [B@data, D] ends at: [].

  Infinite where there is nothing to select, or `budget` candidates a row, on
  the mean of a chunk, are too few to say.
  """

  def local(s, x):
    found = sparse.find(s, s.norm_in(x), (), None, budget, None)
    least = select.smallest_positive(found.code.z)
    return jnp.where(found.over, jnp.inf, least)

  if jax.sharding.get_abstract_mesh().empty:
    return local(s, x)
  return on_each_device(local, P())(s, x)


def _over_rows(a: jax.Array) -> jax.Array:
  """A mean, or any, over this device's rows as one over those of all."""
  if DATA not in varying(a):
    return a
  if a.dtype == bool:
    return jax.lax.psum(a.astype(jnp.int32), DATA) > 0
  return jax.lax.pmean(a, DATA)
