"""The step through sparse codes equals the dense step, on every mesh."""

import jax
import numpy as np
import pytest
from test_step import _config, _norm, _rows

from sae_jax.parallel.mesh import DATA, make_mesh, spec
from sae_jax.train import state, step

pytestmark = pytest.mark.smoke

CASES = [
  'jumprelu', 'jumprelu_quadratic', 'jumprelu_log', 'topk', 'topk_aux',
  'batchtopk', 'batchtopk_aux',
]  # fmt: skip
_dense = {}


def _case(name, codes, mesh=(1, 1), **other):
  c = _config(name.removesuffix('_aux'))
  c.mesh.data, c.mesh.dict = mesh
  c.train.codes, c.optim.clip_norm = codes, 0.0
  c.optim.eps = 1e-4  # a gradient near zero is all rounding
  if not name.endswith('_aux'):
    c.loss.aux_coef = 0.0
  if name.startswith('jumprelu'):
    c.train.budget = 48
  if name.startswith('batchtopk'):
    c.act.theta_ema = 0.5
  for key, value in other.items():
    c[key.split('_', 1)[0]][key.split('_', 1)[1]] = value
  return c


def _run(config, steps=200):
  s = jax.jit(lambda norm: state.init_state(config, norm))(_norm())
  step_fn, history = step.make_step(config), []
  for i in range(steps):
    x = _rows(seed=i) * (1 + (i % 7) / 7)
    s, metrics = step_fn(s, jax.device_put(x, spec(DATA, None)))
    history.append(jax.device_get(metrics))
  return jax.device_get(s), history


def _check(found, expected, tol=2e-3):
  (s, history), (t, past) = found, expected
  for key in ('train/loss', 'train/l0', 'train/grad_norm', 'train/dead'):
    a, b = ([m[key] for m in h] for h in (history, past))
    np.testing.assert_allclose(a, b, rtol=tol, atol=1e-4, err_msg=key)
  for a, b in zip(jax.tree.leaves(s.sae), jax.tree.leaves(t.sae), strict=True):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize('name', CASES)
def test_200_steps_are_those_of_the_dense_rule(mesh, name):
  if name not in _dense:
    with jax.set_mesh(make_mesh(1, 1)):
      _dense[name] = _run(_case(name, 'dense'))
  found = _run(_case(name, 'sparse', mesh.axis_sizes))
  _check(found, _dense[name])
  assert all(m['train/dense'] == 1 for m in _dense[name][1])
  share = np.mean([m['train/dense'] for m in found[1]])
  if name.startswith('batchtopk'):  # dense at first, with AuxK at work always
    assert share == 1 if name.endswith('_aux') else share < 0.5
  else:
    assert share == 0
