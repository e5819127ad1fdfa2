"""The straight-through gradient of the whole loss against the true one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.models import objectives
from sae_jax.models.activations import jump_relu
from sae_jax.models.objectives import L0Penalty
from sae_jax.models.sae import SAE

D, F, ROWS, EPS = 6, 4, 1_000_000, 0.02


def _case():
  """An SAE with correlated latents, and rows that excite them."""
  rng = np.random.default_rng(2)
  W = rng.normal(size=(F, D))
  W = (W / np.linalg.norm(W, axis=1, keepdims=True)).astype(np.float32)
  x = rng.exponential(0.4, (ROWS, F)).astype(np.float32) @ W
  x += rng.normal(0, 0.2, x.shape).astype(np.float32)
  theta = np.array([0.3, 0.4, 0.5, 0.6], np.float32)
  sae = SAE(
    W_enc=jnp.array(W),
    b_enc=jnp.zeros(F),
    W_dec=jnp.array(W),
    b_dec=jnp.zeros(D),
    act=jump_relu(jnp.array(theta), EPS),
    norm_in=None,
    norm_out=None,
    pre_bias=False,
  )
  return sae, x


def _expected_loss(z, x, W, theta, coef):
  """mean |x - f W|^2 + coef |f|_0 in float64, by the definition."""
  active = z > theta
  error = x - (z * active) @ W
  return (error**2).sum(1).mean() + coef * active.sum(1).mean()


def _slope_of_smoothed(z, x, W, theta, coef, i):
  """d/dtheta_i of the expected loss averaged over shifts of theta_i within
  the kernel: the difference of the loss at the kernel's two ends."""
  ends = []
  for sign in (1, -1):
    moved = theta.copy()
    moved[i] += sign * EPS / 2
    ends.append(_expected_loss(z, x, W, moved, coef))
  return (ends[0] - ends[1]) / EPS


@pytest.mark.parametrize('coef', [0.2, 0.5])
def test_gradient_of_the_thresholds_is_that_of_the_smoothed_loss(coef):
  """Within 3%: a central difference of the smoothed expected loss."""
  sae, x = _case()
  penalty = L0Penalty(jnp.float32(coef), jnp.float32(0), quadratic=False)

  def loss(s):
    dead = jnp.zeros(F, bool)
    return objectives.loss(s, x, x, (penalty,), dead=dead, ramp=jnp.float32(1))[
      0
    ]

  value, grads = jax.value_and_grad(loss)(sae)
  W, wide = np.asarray(sae.W_dec, np.float64), np.asarray(x, np.float64)
  z, theta = wide @ W.T, np.asarray(sae.act.theta, np.float64)
  assert value == pytest.approx(_expected_loss(z, wide, W, theta, coef), 1e-4)
  for i in range(F):
    slope = _slope_of_smoothed(z, wide, W, theta, coef, i)
    print(
      f'coef {coef} theta {theta[i]:.1f}: straight-through '
      f'{grads.act.param[i]:.5f}, finite difference {slope:.5f}'
    )
    assert abs(slope) > 0.1  # far from zero, so that 3% means something
    assert grads.act.param[i] == pytest.approx(slope, rel=0.03)
