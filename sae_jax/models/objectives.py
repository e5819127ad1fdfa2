"""What training minimises: reconstruction error plus penalties.

A penalty is a pytree whose coefficients are array leaves, so that stacked
SAEs may differ in them. All in normalised units; formulas in docs/math.md.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from sae_jax.models import activations
from sae_jax.models.activations import JumpReLU
from sae_jax.models.sae import SAE
from sae_jax.parallel import select
from sae_jax.parallel.mesh import mean_rows, sum_latents


class Terms(NamedTuple):
  """What one batch says besides the loss.

  Inside shard_map the means are over this device's rows: only what the
  gradients need is summed in there.
  """

  mse: jax.Array  # mean over rows of |t - t_hat|^2
  power: jax.Array  # mean over rows of |t|^2
  mean: jax.Array  # [E] mean over rows of t
  l0: jax.Array  # mean active latents of a row
  penalty: jax.Array  # loss - mse
  fired: jax.Array  # [F@dict] bool: active in at least one row
  seen: jax.Array  # [] what the activation's `update` wants to know

  @property
  def fvu(self) -> jax.Array:
    """mse over the variance of the targets around their own mean."""
    return self.mse / (self.power - jnp.square(self.mean).sum())


class Batch(NamedTuple):
  """One batch's intermediate values, as the penalties see them."""

  z: jax.Array  # [B@data, F@dict] pre-activations
  error: jax.Array  # [B@data, E] t - t_hat
  e_hat: jax.Array | None  # [B@data, E] what AuxK's latents make of the error
  dead: jax.Array  # [F@dict] bool
  ramp: jax.Array  # [] warm-up factor in [0, 1] of the sparsity penalty


class L0Penalty(struct.PyTreeNode):
  """ramp * coef * mean_b |f_b|_0 (Gemma Scope, arXiv 2408.05147, eq. 3), or
  with `quadratic` ramp * coef / (2 T) * (mean_b |f_b|_0 - T)^2, T = target.

  The quadratic form has slope coef at |f|_0 = 2 T, where the two forms agree
  (Gemma Scope 2 prints 2 / T and claims that slope; see docs/math.md).
  """

  coef: jax.Array  # []
  target: jax.Array  # [] active latents; read by the quadratic form only
  quadratic: bool = struct.field(pytree_node=False)

  def __call__(self, sae: SAE, batch: Batch) -> jax.Array:
    if not isinstance(sae.act, JumpReLU):
      raise TypeError(f'{type(sae.act).__name__} has no gradient of its L0')
    l0 = mean_rows(sae.act.l0(batch.z))
    if self.quadratic:
      l0 = (l0 - self.target) ** 2 / (2 * self.target)
    return batch.ramp * self.coef * l0


class AuxK(struct.PyTreeNode):
  """coef * |e - e_hat|^2 / var(e): dead latents learn to explain the error.

  e = stop_gradient(t - t_hat), e_hat the reconstruction by the k largest
  pre-activations of dead latents (Gao et al. 2024, arXiv 2406.04093, A.2);
  zero when no latent is dead.
  """

  coef: jax.Array  # []
  k: int = struct.field(pytree_node=False)

  def latents(self, z: jax.Array, dead: jax.Array) -> jax.Array:
    """The dead latents [..., F] that are to explain the error."""
    best = jax.lax.stop_gradient(jnp.where(dead, z, -jnp.inf))
    # Fewer than k dead latents: the rest of the k fall on living ones.
    mask = select.top_k_mask(best, self.k) & dead
    return jnp.where(mask, jax.nn.relu(z), 0)

  def __call__(self, sae: SAE, batch: Batch) -> jax.Array:
    del sae
    assert batch.e_hat is not None
    e = jax.lax.stop_gradient(batch.error)
    ratio = _squared(e - batch.e_hat) / _squared(e - mean_rows(e))
    any_dead = sum_latents(batch.dead.sum()) > 0
    return self.coef * jnp.where(any_dead, ratio, 0)


Penalty = L0Penalty | AuxK


def loss(
  sae: SAE,
  n: jax.Array,
  t: jax.Array,
  penalties: tuple[Penalty, ...],
  *,
  dead: jax.Array,
  ramp: jax.Array,
  training: bool = True,
  dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, Terms]:
  """Loss [] and its terms for normalised inputs n [B@data, D], targets t.

  mean_b |t - t_hat|^2 (summed over E) + penalties; the large products have
  factors of `dtype`. Latents by the activation's rule of training, or of use.
  `sae` may lack its normalisers: nothing here reads them.
  """
  z = sae.pre(n, dtype)
  f = activations.in_training(sae.act, z) if training else sae.act(z)
  extra = [p.latents(z, dead) for p in penalties if isinstance(p, AuxK)]
  made, *e_hat = sae.contributions(f, *extra, dtype=dtype)
  error = t - (made + sae.b_dec)
  mse = _squared(error)
  batch = Batch(z, error, e_hat[0] if e_hat else None, dead, ramp)
  penalty = sum((p(sae, batch) for p in penalties), jnp.zeros_like(mse))
  active = jax.lax.stop_gradient(f) != 0
  terms = Terms(
    mse=mse,
    power=jnp.square(t).sum(-1).mean(),
    mean=t.mean(0),
    l0=sum_latents(active.sum(-1, dtype=mse.dtype).mean()),
    penalty=penalty,
    fired=active.any(0),
    seen=activations.observe(sae.act, f),
  )
  return mse + penalty, terms


def _squared(x: jax.Array) -> jax.Array:
  """mean_b |x_b|^2."""
  return mean_rows(jnp.square(x).sum(-1))
