"""Learning rate, optimiser and the unit-norm constraint of the decoder."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sae_jax.models.sae import SAE, unit_rows


def learning_rate(
  peak: float, *, steps: int, warmup_steps: int, decay_steps: int
) -> optax.Schedule:
  """Cosine from peak / 10 to peak (Gemma Scope), constant, linear to zero."""

  def schedule(step: Any) -> Any:
    up = jnp.clip(step / max(warmup_steps, 1), 0, 1)
    rise = 0.1 + 0.45 * (1 - jnp.cos(math.pi * up)) if warmup_steps else 1.0
    fall = jnp.clip((steps - step) / max(decay_steps, 1), 0, 1)
    return peak * rise * (fall if decay_steps else 1.0)

  return schedule


def width_scaled(lr: float, latents: int, reference: int) -> float:
  """lr * sqrt(reference / F) (arXiv 2406.04093, A.3); lr if reference = 0."""
  return lr * math.sqrt(reference / latents) if reference else lr


def make_optimizer(
  *, b1: float, b2: float, eps: float, clip: float
) -> optax.GradientTransformation:
  """Adam without its learning rate, which `update` takes.

  With b1 = 0 no first moment exists (a third of the state saved). `clip`
  bounds the global gradient norm, 0 for none.
  """
  if b1:
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
  else:  # the same update as scale_by_adam(b1=0), without its mu tree
    adam = optax.scale_by_rms(
      decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True
    )
  # identity keeps the state's structure the same whether clipping is on.
  clipping = optax.clip_by_global_norm(clip) if clip else optax.identity()
  return optax.chain(clipping, adam)


def update(
  optimizer: optax.GradientTransformation,
  grads: SAE,
  opt: Any,
  sae: SAE,
  lr: jax.typing.ArrayLike,
) -> tuple[SAE, Any]:
  """One step of the optimiser and back onto the constraints.

  Returns the SAE and the optimiser's state after it.
  """
  grads = remove_parallel(grads, sae)
  tree: Any = sae  # optax's annotations know no dataclasses
  updates, opt = optimizer.update(grads, opt, tree)  # type: ignore[arg-type]
  stepped = jax.tree.map(lambda a, u: a - lr * u, tree, updates)
  return constrain(stepped), opt


def remove_parallel(grads: SAE, sae: SAE) -> SAE:
  """Drops the part of each decoder row's gradient along the (unit) row.

  Otherwise Adam's statistics would count moves that `constrain` undoes
  (arXiv 2408.05147, section 3).
  """
  g, W = grads.W_dec, sae.W_dec
  along = jnp.einsum('fe,fe->f', g, W, precision='highest')
  return grads.replace(W_dec=g - along[:, None] * W)


def constrain(sae: SAE) -> SAE:
  """Decoder rows back to unit norm, activation parameters to their domain."""
  return sae.replace(W_dec=unit_rows(sae.W_dec), act=sae.act.project())
