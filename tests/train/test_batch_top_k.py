"""A BatchTopK in use has the L0 it was trained for, and is sparse from the
first step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import _config

from sae_jax.models.sae import Norm
from sae_jax.parallel.mesh import DATA, make_mesh, spec
from sae_jax.train import members, state, step

K, F, D, B, STEPS = 6, 256, 48, 256, 60


def _planted(rng, atoms, n):
  """Rows [n, D] of K of the unit atoms each."""
  at = np.argsort(rng.random((n, len(atoms))), 1)[:, :K]
  amount = rng.uniform(0.5, 1.5, (n, K, 1))
  return (amount * atoms[at]).sum(1).astype(np.float32)


def _planted_config(data=1, dict_=1, **keys):
  c = _config('batchtopk')
  c.sae.latents, c.sae.d_in, c.act.k = F, D, K
  c.act.theta_ema, c.loss.aux_coef = 0.999, 0.0
  c.train.batch_rows, c.train.codes = B, 'sparse'
  c.optim.lr, c.optim.clip_norm = 3e-3, 0.0
  c.mesh.data, c.mesh.dict = data, dict_
  c.train.rows = STEPS * B
  for key, value in keys.items():
    c[key.split('_', 1)[0]][key.split('_', 1)[1]] = value
  return c


def _trained(config):
  """(state, whether dense by step, L0 in use over k from a tenth on)."""
  rng = np.random.default_rng(0)
  atoms = rng.standard_normal((2 * D, D))
  atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
  put = lambda n: jax.device_put(_planted(rng, atoms, n), spec(DATA, None))
  held_out, other, dense, l0 = put(4096), put(4096), [], []
  norm = Norm(
    jnp.zeros(D), jnp.float32(np.sqrt(np.square(other).sum(1).mean()))
  )
  s = jax.jit(lambda norm: state.init_state(config, norm))(norm)
  take = step.make_step(config)
  settle = members.make_settle([config], stacked=False)
  for i in range(STEPS):
    s, metrics = take(s, put(B))
    dense.append(float(metrics['train/dense']))
    if i >= STEPS // 10 and i % 6 == 0:
      s = settle(s, held_out)
      l0.append(float(step.evaluate(s, other)['eval/l0']) / K)
  return jax.device_get(s), dense, l0


def test_l0_in_use_is_k_from_a_tenth_of_the_run_on():
  with jax.set_mesh(make_mesh(1, 1)):
    _, dense, l0 = _trained(_planted_config())
  np.testing.assert_allclose(l0, 1, atol=0.05)
  assert sum(dense) == 0


def test_so_it_is_on_a_mesh_and_of_a_running_mean_of_the_weights():
  expected = None
  for mesh in ((1, 1), (2, 4)):
    with jax.set_mesh(make_mesh(*mesh)):
      s, _, l0 = _trained(_planted_config(*mesh, optim_ema=0.9))
    np.testing.assert_allclose(l0, 1, atol=0.05)
    expected = expected or s.ema.act.theta
    np.testing.assert_allclose(s.ema.act.theta, expected, rtol=1e-4)


def test_settling_members_is_settling_each():
  configs = [_planted_config(), _planted_config()]
  configs[1].seed = 5
  x = jnp.asarray(
    np.random.default_rng(1).standard_normal((64, D)), jnp.float32
  )
  with jax.set_mesh(make_mesh(1, 1)):
    norm = Norm(jnp.zeros(D), jnp.float32(1))
    states = [
      jax.jit(lambda n, c=c: state.init_state(c, n))(norm) for c in configs
    ]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *states)
    found = members.make_settle(configs)(stack, x).sae.act.theta
    alone = members.make_settle(configs[:1], stacked=False)
    each = [float(alone(s, x).sae.act.theta) for s in states]
  assert each[0] != each[1]
  np.testing.assert_allclose(found, each, rtol=1e-6)


@pytest.mark.parametrize('name', ['topk', 'jumprelu'])
def test_others_have_nothing_to_settle(name):
  assert step.make_settle(_config(name)) is None
