"""Sparsifying activations: pytrees that map pre-activations z to latents f.

Each has `__call__(z) -> f` (z, f: [..., F@dict]), `scale(c)`, the same
activation in units c times smaller, and `project()`, onto allowed parameters.
Training asks `in_training`, `observe` and `update`: BatchTopK has another rule.
"""

import jax
import jax.numpy as jnp
from flax import struct

from sae_jax.parallel import select
from sae_jax.parallel.mesh import sum_latents


def _window(z, theta, bandwidth):
  """Rectangle kernel K((z - theta) / bandwidth): 1 inside, 0 outside."""
  return (jnp.abs(z - theta) < bandwidth / 2).astype(z.dtype)


def _sum_rows(x, theta):
  """Sums the leading dimensions of x [..., F] down to theta's [F]."""
  return x.sum(range(x.ndim - theta.ndim))


@jax.custom_vjp
def step(z: jax.Array, theta: jax.Array, bandwidth: jax.Array) -> jax.Array:
  """Heaviside H(z - theta) with a straight-through gradient to theta alone.

  dH/dtheta := -K((z - theta) / bandwidth) / bandwidth, dH/dz := 0
  (Rajamanoharan et al. 2024, arXiv 2407.14435, eq. 12). z [..., F], theta [F].
  """
  return (z > theta).astype(z.dtype)


def _step_forward(z, theta, bandwidth):
  return step(z, theta, bandwidth), (z, theta, bandwidth)


def _step_backward(saved, g):
  z, theta, bandwidth = saved
  d_theta = -_sum_rows(g * _window(z, theta, bandwidth), theta) / bandwidth
  return jnp.zeros_like(z), d_theta, jnp.zeros_like(bandwidth)


step.defvjp(_step_forward, _step_backward)


@jax.custom_vjp
def jump(z: jax.Array, theta: jax.Array, bandwidth: jax.Array) -> jax.Array:
  """JumpReLU z * H(z - theta) with the paper's pseudo-derivatives.

  d/dz := H(z - theta), d/dtheta := -(theta / bandwidth) K((z - theta) /
  bandwidth) (arXiv 2407.14435, eq. 11). z [..., F], theta [F].
  """
  return z * (z > theta)


def _jump_forward(z, theta, bandwidth):
  return jump(z, theta, bandwidth), (z, theta, bandwidth)


def _jump_backward(saved, g):
  z, theta, bandwidth = saved
  inside = _sum_rows(g * _window(z, theta, bandwidth), theta)
  d_theta = -theta / bandwidth * inside
  return g * (z > theta), d_theta, jnp.zeros_like(bandwidth)


jump.defvjp(_jump_forward, _jump_backward)


class JumpReLU(struct.PyTreeNode):
  """z * H(z - theta), one learned threshold a latent (arXiv 2407.14435).

  `param` is theta itself, or log(theta) when `log`: under Adam log(theta)
  moves theta by about theta * lr a step, which freezes small thresholds in
  short runs; Gemma Scope trains log(theta) over billions of tokens.
  """

  param: jax.Array  # [F@dict]
  bandwidth: jax.Array  # [] width of the kernel, in units of z; not learned
  log: bool = struct.field(pytree_node=False)

  @property
  def theta(self) -> jax.Array:
    """Thresholds [F@dict], in units of z."""
    return jnp.exp(self.param) if self.log else self.param

  def __call__(self, z: jax.Array) -> jax.Array:
    return jump(z, self.theta, self.bandwidth)

  def l0(self, z: jax.Array) -> jax.Array:
    """Active latents of each row [...], differentiable in theta alone."""
    return sum_latents(step(z, self.theta, self.bandwidth).sum(-1))

  def at(self, index: jax.Array) -> 'JumpReLU':
    """The thresholds of latents `index`; one that is none never fires."""
    none = 69.0 if self.log else 1e30
    param = self.param.at[index].get(mode='fill', fill_value=none)
    return self.replace(param=param)

  def scale(self, c: jax.Array) -> 'JumpReLU':
    param = self.param + jnp.log(c) if self.log else self.param * c
    return self.replace(param=param, bandwidth=self.bandwidth * c)

  def project(self) -> 'JumpReLU':
    """Keeps theta >= 0: a negative threshold would pass negative latents."""
    return self if self.log else self.replace(param=jnp.maximum(self.param, 0))


class TopK(struct.PyTreeNode):
  """ReLU of the k largest pre-activations of a row (arXiv 2406.04093)."""

  k: int = struct.field(pytree_node=False)

  def __call__(self, z: jax.Array) -> jax.Array:
    return jnp.where(select.top_k_mask(z, self.k), jax.nn.relu(z), 0)

  def scale(self, c: jax.Array) -> 'TopK':
    del c  # homogeneous: the k largest are the k largest in any unit
    return self

  def project(self) -> 'TopK':
    return self


class BatchTopK(struct.PyTreeNode):
  """ReLU of the k B largest pre-activations of a batch of B rows in training,
  of those above theta afterwards (Bussmann et al. 2024, arXiv 2412.06410).

  A row alone has no batch: theta is the smallest positive latent of held-out
  rows selected together (`step.make_settle`), or a running mean of that of
  training's batches where there are none. No gradient touches it.
  """

  theta: jax.Array  # [] in units of z; 0 before the first update
  k: int = struct.field(pytree_node=False)  # mean active latents of a row

  def __call__(self, z: jax.Array) -> jax.Array:
    return z * (z > self.theta)

  def scale(self, c: jax.Array) -> 'BatchTopK':
    return self.replace(theta=self.theta * c)

  def project(self) -> 'BatchTopK':
    return self


Activation = JumpReLU | TopK | BatchTopK


def in_training(act: Activation, z: jax.Array) -> jax.Array:
  """Latents [B@data, F@dict] of a training batch: act(z), but BatchTopK
  selects among all rows."""
  if not isinstance(act, BatchTopK):
    return act(z)
  mask = select.batch_top_k_mask(z, act.k)
  return jnp.where(mask, jax.nn.relu(z), 0)


def of_candidates(act: Activation, z: jax.Array, index: jax.Array) -> jax.Array:
  """Latents of candidates with pre-activations z of latents `index`, of one
  shape; those of TopK and BatchTopK have been selected."""
  if not isinstance(act, JumpReLU):
    return jax.nn.relu(z)
  return act.at(index)(z)


def floor(act: JumpReLU) -> jax.Array:
  """[F]: neither loss nor gradient see pre-activations that are not above."""
  return act.theta - act.bandwidth / 2


def observe(act: Activation, f: jax.Array) -> jax.Array:
  """What `update` wants to know of a batch's latents f [B@data, F@dict]: []."""
  if not isinstance(act, BatchTopK):
    return jnp.zeros((), f.dtype)
  return select.smallest_positive(f)


def update(act: Activation, seen: jax.Array, decay: jax.Array) -> Activation:
  """The activation after a batch of which `observe` returned `seen`.

  theta <- decay theta + (1 - decay) seen, the first time seen itself; batches
  without a positive latent (seen is infinite then) leave it.
  """
  if not isinstance(act, BatchTopK):
    return act
  theta = decay * act.theta + (1 - decay) * seen
  theta = jnp.where(act.theta > 0, theta, seen)
  return act.replace(theta=jnp.where(jnp.isfinite(seen), theta, act.theta))


def jump_relu(
  theta: jax.Array, bandwidth: float, *, log: bool = False
) -> JumpReLU:
  """A JumpReLU with initial thresholds theta [F@dict]."""
  param = jnp.log(theta) if log else theta
  return JumpReLU(param, jnp.asarray(bandwidth, theta.dtype), log)
