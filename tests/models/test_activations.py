"""Straight-through gradients against the formulas and the true density."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.models import activations
from sae_jax.models.activations import (
  BatchTopK,
  TopK,
  in_training,
  jump,
  jump_relu,
  observe,
  step,
  update,
)

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


def test_batchtopk_selects_among_all_rows_in_training_and_by_theta_after():
  z = jnp.array([[3.0, 1.0, 2.0, -1.0], [-1.0, 0.2, 0.5, -3.0]])
  act = BatchTopK(jnp.float32(0.5), k=2)
  f = in_training(act, z)
  np.testing.assert_array_equal(f, [[3, 1, 2, 0], [0, 0, 0.5, 0]])
  np.testing.assert_array_equal(act(z), [[3, 1, 2, 0], [0, 0, 0, 0]])
  few = in_training(act.replace(k=4), z)  # the quota reaches below zero
  np.testing.assert_array_equal(few, np.maximum(z, 0))
  np.testing.assert_array_equal(act(z[1]), [0, 0, 0, 0])  # a row alone


def test_batchtopk_gradient_is_one_at_the_kept_and_none_at_theta():
  z = jnp.array([[3.0, 1.0, 2.0, -1.0], [-1.0, 0.2, 0.5, -3.0]])
  act, c = BatchTopK(jnp.float32(0.5), k=1), jnp.arange(1.0, 9.0).reshape(2, 4)
  loss = lambda act, z: (in_training(act, z) * c).sum()
  d_act, dz = jax.grad(loss, (0, 1))(act, z)
  np.testing.assert_array_equal(dz, [[1, 0, 3, 0], [0, 0, 0, 0]])
  assert d_act.theta == 0
  d_act = jax.grad(lambda act: (act(z) * c).sum())(act)
  assert d_act.theta == 0


def test_batchtopk_s_threshold_follows_the_smallest_positive_latent():
  act = BatchTopK(jnp.float32(1.0), k=2)
  seen = observe(act, jnp.array([[0.0, 3.0], [0.5, 0.0]]))
  assert seen == 0.5
  assert update(act, seen, jnp.float32(0.8)).theta == pytest.approx(0.9)
  assert update(act, seen, jnp.float32(0)).theta == 0.5
  none = observe(act, jnp.zeros((2, 2)))
  for decay in (0.8, 0.0):
    assert update(act, none, jnp.float32(decay)).theta == 1
  z = jnp.array([[0.9, 1.1, 2.0, -3.0]])
  np.testing.assert_array_equal(act.scale(4.0)(4 * z), 4 * act(z))
  assert act.project() is act


def test_other_activations_have_one_rule():
  z = jnp.array([[3.0, 1.0, 2.0, -1.0], [-1.0, 0.2, 0.5, -3.0]])
  for act in (TopK(2), jump_relu(jnp.full(4, 0.3), 0.1)):
    np.testing.assert_array_equal(in_training(act, z), act(z))
    assert update(act, observe(act, z), jnp.float32(0.5)) is act


def test_window_is_open():
  inside = activations._window(jnp.array([0.25, 0.3]), 0.3, jnp.float32(0.1))
  np.testing.assert_array_equal(inside, [0, 1])


def test_a_batch_without_latents_leaves_no_trace_in_the_threshold():
  act = activations.BatchTopK(jnp.float32(0), 4)
  nothing, decay = jnp.float32(jnp.inf), jnp.float32(0.5)
  act = activations.update(act, nothing, decay)
  assert act.theta == 0
  act = activations.update(act, jnp.float32(0.3), decay)
  assert act.theta == jnp.float32(0.3)
  act = activations.update(act, jnp.float32(0.5), decay)
  assert act.theta == jnp.float32(0.4)
  assert activations.update(act, nothing, decay).theta == act.theta
