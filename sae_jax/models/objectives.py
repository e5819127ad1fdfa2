"""What training minimises: reconstruction error plus penalties.

A penalty is a pytree whose coefficients are array leaves, so that stacked
SAEs may differ in them. All in normalised units; formulas in docs/math.md.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from sae_jax.models import activations, codes
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
  l0: jax.Array  # mean active latents of a row
  penalty: jax.Array  # loss - mse
  fired: jax.Array  # [F@dict] bool: active in at least one row
  seen: jax.Array  # [] what the activation's `update` wants to know
  dense: jax.Array  # 0 where only the candidates were looked at, else 1


class Batch(NamedTuple):
  """One batch's intermediate values, as the penalties see them."""

  l0: jax.Array | None  # [] JumpReLU's, differentiable in theta
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

  def __call__(self, batch: Batch) -> jax.Array:
    if batch.l0 is None:
      raise TypeError('this activation has no gradient of its L0')
    return self.of(batch.l0, batch.ramp)

  def of(self, l0: jax.Array, ramp: jax.Array) -> jax.Array:
    """The penalty of a batch with that mean L0."""
    if self.quadratic:
      l0 = (l0 - self.target) ** 2 / (2 * self.target)
    return ramp * self.coef * l0


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

  def __call__(self, batch: Batch) -> jax.Array:
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
  l0 = mean_rows(sae.act.l0(z)) if isinstance(sae.act, JumpReLU) else None
  batch = Batch(
    l0, t - (made + sae.b_dec), e_hat[0] if e_hat else None, dead, ramp
  )
  active = jax.lax.stop_gradient(f) != 0
  count = sum_latents(active.sum(-1, dtype=t.dtype).mean())
  seen = activations.observe(sae.act, f)
  return _loss(batch, penalties, count, active.any(0), seen, 1.0)


class Variables(NamedTuple):
  """What the loss of a sparse code is differentiated by: the gradients of the
  weights are sums of products of these (`codes.Entries`)."""

  act: activations.Activation
  z: jax.Array  # of the candidates
  made: jax.Array  # [B@data, E] zeros: the cotangent of the reconstruction
  z_aux: jax.Array | None  # the same of AuxK's latents
  made_aux: jax.Array | None


def loss_of_codes(
  v: Variables,
  sae: SAE,
  code: codes.Codes,
  aux: codes.Rows | None,
  t: jax.Array,
  penalties: tuple[Penalty, ...],
  *,
  dead: jax.Array,
  ramp: jax.Array,
) -> tuple[jax.Array, Terms]:
  """The same as `loss` where nothing outside the candidates counts.

  Inside shard_map or without a mesh. `code`: selected candidates, `aux`:
  AuxK's; their z are those of `v`. The weights get no gradient here.
  """
  B, W = len(t), jax.lax.stop_gradient(sae.W_dec)
  f = activations.of_candidates(v.act, v.z, code.index)
  parts = [codes.decode(code, f, W, B)]
  if aux is not None:
    assert v.z_aux is not None
    parts.append(codes.decode(aux, jax.nn.relu(v.z_aux), W, B))
  made, *e_hat = sum_latents(jnp.stack(parts))
  l0 = None
  if isinstance(v.act, JumpReLU):
    act = v.act.at(code.index)
    l0 = activations.step(v.z, act.theta, act.bandwidth).sum() / B
    l0 = sum_latents(mean_rows(l0[None]))
  error = t - (made + v.made + sae.b_dec)
  batch = Batch(l0, error, e_hat[0] + v.made_aux if e_hat else None, dead, ramp)
  active = jax.lax.stop_gradient(f) != 0
  count = sum_latents(active.sum(dtype=t.dtype) / B)
  fired = jnp.zeros_like(sae.b_enc, bool)
  fired = fired.at[code.index].max(active, mode='drop')
  seen = activations.observe(sae.act, f)
  return _loss(batch, penalties, count, fired, seen, 0.0)


def _loss(batch: Batch, penalties, l0, fired, seen, dense):
  mse = _squared(batch.error)
  penalty = sum((p(batch) for p in penalties), jnp.zeros_like(mse))
  terms = Terms(
    mse=mse,
    l0=l0,
    penalty=penalty,
    fired=fired,
    seen=seen,
    dense=jnp.full_like(mse, dense),
  )
  return mse + penalty, terms


def _squared(x: jax.Array) -> jax.Array:
  """mean_b |x_b|^2."""
  return mean_rows(jnp.square(x).sum(-1))
