"""Selection over any mesh equals a stable sort on one host, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.parallel.mesh import spec
from sae_jax.parallel.select import top_k_mask

pytestmark = pytest.mark.smoke


def _reference(z, k):
  """The k largest of each row; equal values by lower index."""
  order = np.argsort(-z, axis=-1, kind='stable')[..., :k]
  mask = np.zeros(z.shape, bool)
  np.put_along_axis(mask, order, True, axis=-1)
  return mask


@pytest.mark.parametrize('k', [1, 3, 8, 64])
def test_equals_a_stable_sort_with_many_ties(mesh, k):
  z = np.random.default_rng(k).integers(-3, 4, (16, 64)).astype(np.float32)
  placed = jax.device_put(z, spec('data', 'dict'))
  mask = jax.jit(top_k_mask, static_argnums=1)(placed, k)
  assert jax.typeof(mask).sharding.spec == jax.typeof(placed).sharding.spec
  np.testing.assert_array_equal(mask, _reference(z, k))


def test_minus_infinity_fills_up_what_is_missing(mesh):
  z = np.full((8, 64), -np.inf, np.float32)
  z[:, 40] = 1
  mask = top_k_mask(jax.device_put(z, spec('data', 'dict')), 2)
  np.testing.assert_array_equal(mask, _reference(z, 2))


def test_without_a_mesh_and_with_more_dimensions():
  z = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
  np.testing.assert_array_equal(top_k_mask(jnp.array(z), 4), _reference(z, 4))


def test_under_vmap():
  z = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
  mask = jax.vmap(lambda z: top_k_mask(z, 4))(jnp.array(z))
  np.testing.assert_array_equal(mask, _reference(z, 4))
