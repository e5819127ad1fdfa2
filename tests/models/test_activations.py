"""Straight-through gradients against the formulas and the true density."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.models import activations
from sae_jax.models.activations import TopK, jump, jump_relu, step

pytestmark = pytest.mark.smoke


def _case(seed=0, rows=64, latents=8):
  rng = np.random.default_rng(seed)
  z = rng.normal(0, 0.5, (rows, latents)).astype(np.float32)
  theta = rng.uniform(0.1, 0.4, latents).astype(np.float32)
  g = rng.normal(size=(rows, latents)).astype(np.float32)
  return z, theta, g


def test_jump_values_are_strictly_above_the_threshold():
  z = jnp.array([[-1.0, 0.2, 0.3, 0.4]])
  theta = jnp.full(4, 0.3)
  np.testing.assert_array_equal(jump(z, theta, jnp.float32(0.1)), z * (z > 0.3))
  np.testing.assert_array_equal(step(z, theta, jnp.float32(0.1)), z > 0.3)


def test_gradients_equal_the_paper_s_formulas():
  z, theta, g = _case()
  eps = 0.2
  inside = (np.abs((z - theta) / eps) < 0.5).astype(np.float32)
  assert 0 < inside.mean() < 0.5

  def pulled(function):
    _, pull = jax.vjp(lambda z, t: function(z, t, jnp.float32(eps)), z, theta)
    return pull(g)

  dz, dtheta = pulled(jump)
  np.testing.assert_allclose(dz, g * (z > theta), rtol=1e-6)
  expected = (g * -(theta / eps) * inside).sum(0)
  np.testing.assert_allclose(dtheta, expected, rtol=1e-5, atol=1e-6)
  dz, dtheta = pulled(step)
  np.testing.assert_array_equal(dz, 0 * z)
  expected = (g * -(1 / eps) * inside).sum(0)
  np.testing.assert_allclose(dtheta, expected, rtol=1e-5, atol=1e-6)


def test_kernel_has_two_sides():
  """Pre-activations just below the threshold move it as those just above."""
  for z in (0.28, 0.32):
    d = jax.grad(lambda t, z=z: step(z, t, jnp.float32(0.1)))(jnp.float32(0.3))
    assert d == pytest.approx(-10)
  d = jax.grad(lambda t: step(0.36, t, jnp.float32(0.1)))(jnp.float32(0.3))
  assert d == 0


def test_straight_through_gradient_estimates_the_density():
  """dE[H(z - theta)]/dtheta = -p(theta), z ~ N(0, 0.5^2) (see docs/math.md).

  Against a central difference of the exact expectation smoothed by the same
  kernel, within 3% (the statistical error of 4e6 draws is 0.3%).
  """
  from scipy.stats import norm

  theta, eps, n = 0.3, 0.1, 4_000_000
  z = np.random.default_rng(1).normal(0, 0.5, (n, 1)).astype(np.float32)
  found = jax.grad(lambda t: step(z, t, jnp.float32(eps)).mean())(
    jnp.full(1, theta)
  )[0]
  # E over z and over a uniform shift of the threshold, then its slope.
  shifts = np.linspace(-eps / 2, eps / 2, 2001)
  smoothed = lambda t: norm.sf((t + shifts) / 0.5).mean()
  slope = (smoothed(theta + 1e-4) - smoothed(theta - 1e-4)) / 2e-4
  assert found == pytest.approx(slope, rel=0.03)
  assert found == pytest.approx(-norm.pdf(theta / 0.5) / 0.5, rel=0.03)


@pytest.mark.parametrize('log', [False, True])
def test_theta_and_its_units(log):
  theta = jnp.array([0.1, 0.2])
  act = jump_relu(theta, 0.05, log=log)
  np.testing.assert_allclose(act.theta, theta, rtol=1e-6)
  z = jnp.array([[0.15, 0.15], [0.3, 0.3]])
  np.testing.assert_allclose(act.scale(4.0)(4 * z), 4 * act(z), rtol=1e-6)
  np.testing.assert_allclose(act.scale(4.0).bandwidth, 0.2, rtol=1e-6)


def test_projection_keeps_thresholds_from_going_negative():
  act = jump_relu(jnp.array([-0.1, 0.2]), 0.05).project()
  np.testing.assert_allclose(act.theta, [0, 0.2])


def test_topk_keeps_the_largest_and_only_positive_ones():
  z = jnp.array([[3.0, 1.0, 2.0, -1.0], [-1.0, -2.0, 0.5, -3.0]])
  np.testing.assert_array_equal(TopK(2)(z), [[3, 0, 2, 0], [0, 0, 0.5, 0]])


def test_topk_gradient_is_one_at_the_kept():
  z = jnp.array([[3.0, 1.0, 2.0, -1.0]])
  g = jax.grad(lambda z: (TopK(2)(z) * jnp.arange(1.0, 5.0)).sum())(z)
  np.testing.assert_array_equal(g, [[1, 0, 3, 0]])


def test_window_is_open():
  inside = activations._window(jnp.array([0.25, 0.3]), 0.3, jnp.float32(0.1))
  np.testing.assert_array_equal(inside, [0, 1])
