"""The step through sparse codes equals the dense step, on every mesh."""

import jax
import numpy as np
import optax
import pytest
from test_step import _config, _norm, _rows

from sae_jax.models import candidates
from sae_jax.parallel.mesh import DATA, make_mesh, spec
from sae_jax.train import state, step

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


def _by_the_dense_rule(name, steps):
  if (name, steps) not in _dense:
    with jax.set_mesh(make_mesh(1, 1)):
      _dense[name, steps] = _run(_case(name, 'dense'), steps)
  return _dense[name, steps]


def _check(found, expected, tol=2e-3):
  (s, history), (t, past) = found, expected
  for key in ('train/loss', 'train/l0', 'train/grad_norm', 'train/dead'):
    a, b = ([m[key] for m in h] for h in (history, past))
    np.testing.assert_allclose(a, b, rtol=tol, atol=1e-4, err_msg=key)
  for a, b in zip(jax.tree.leaves(s.sae), jax.tree.leaves(t.sae), strict=True):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize('name', CASES)
def test_200_steps_are_those_of_the_dense_rule(mesh, name):
  if mesh.size > 1 and name in ('jumprelu_log', 'topk', 'batchtopk_aux'):
    pytest.skip('the others have all of its collectives')
  steps = 200 if mesh.size == 1 else 40
  expected = _by_the_dense_rule(name, steps)
  found = _run(_case(name, 'sparse', mesh.axis_sizes), steps)
  _check(found, expected)
  assert all(m['train/dense'] == 1 for m in expected[1])
  share = np.mean([m['train/dense'] for m in found[1]])
  if name.startswith('batchtopk'):  # dense at first, with AuxK at work always
    assert share == 1 if name.endswith('_aux') else share < 0.5
  else:
    assert share == 0


def test_more_candidates_than_fit_take_the_dense_rule(mesh, monkeypatch):
  """Some batches overflow the list: same trajectory, and the share is told.

  The dense rule comes in parts, and the penalty is not linear in rows.
  """
  monkeypatch.setattr(candidates, 'chunks', lambda rows, latents: 4)
  name = 'jumprelu_quadratic'
  found = _run(_case(name, 'sparse', mesh.axis_sizes, train_budget=24), 40)
  _check(found, _by_the_dense_rule(name, 40))
  share = np.mean([m['train/dense'] for m in found[1]])
  assert 0 < share < 1


@pytest.mark.parametrize(
  'name, value',
  # 1e12: the loss and each gradient are numbers, the gradients' squares not.
  [
    ('topk_aux', np.nan), ('jumprelu', np.inf), ('batchtopk', np.nan),
    ('topk', 1e12), ('jumprelu', 1e12),
  ],
)  # fmt: skip
def test_nothing_changes_where_a_row_is_not_finite(mesh, name, value):
  config = _case(name, 'sparse', mesh.axis_sizes)
  s = jax.jit(lambda norm: state.init_state(config, norm))(_norm())
  step_fn = step.make_step(config)
  put = lambda x: jax.device_put(x, spec(DATA, None))
  for i in range(3):
    s, _ = step_fn(s, put(_rows(seed=i)))
  before, x = jax.device_get(s), _rows(seed=3)
  x[5, 2] = value
  s, metrics = step_fn(s, put(x))
  assert metrics['train/skipped'] == 1
  changed = ('step', 'rows_since_fired')
  for a, b in zip(
    jax.tree.leaves(jax.device_get(s).replace(**dict.fromkeys(changed))),
    jax.tree.leaves(before.replace(**dict.fromkeys(changed))),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  # What fires in a batch that is left out has not fired.
  since = before.rows_since_fired + len(x)
  np.testing.assert_array_equal(s.rows_since_fired, since)
  s, metrics = step_fn(s, put(_rows(seed=4)))
  assert metrics['train/skipped'] == 0


def test_moments_of_untouched_rows_are_decayed_when_a_mesh_updates_all():
  """Sparse in place, then arrays (as on a mesh with `data`), then in place."""
  runs = {'sparse': 'sparse', 'dense': 'dense'}
  states = {}
  for rule in runs:
    with jax.set_mesh(make_mesh(1, 1)):
      config = _case('topk', rule, optim_b2=0.9)
      s = jax.jit(lambda n, c=config: state.init_state(c, n))(_norm())
      step_fn = step.make_step(config)
      for i in range(30):
        s, _ = step_fn(s, jax.device_put(_rows(seed=i), spec(DATA, None)))
    if rule == 'sparse':
      assert np.any(jax.device_get(s.touched) < 30)  # some rows lag behind
    s = jax.device_get(s)
    with jax.set_mesh(make_mesh(2, 1)):
      config = _case('topk', rule, (2, 1), optim_b2=0.9)
      like = state.abstract_state(config)
      s = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), s, like)
      step_fn = step.make_step(config)
      for i in range(30, 40):
        s, _ = step_fn(s, jax.device_put(_rows(seed=i), spec(DATA, None)))
      states[rule] = jax.device_get(s)
  assert np.all(states['sparse'].touched == 40)
  for a, b in zip(*map(jax.tree.leaves, states.values()), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  # Moments are squares, far below that tolerance.
  nu = [optax.tree.get(s.opt, 'nu').W_enc.sum(1) for s in states.values()]
  np.testing.assert_allclose(*nu, rtol=1e-2)


def test_a_batch_that_is_not_made_of_whole_chunks(monkeypatch):
  monkeypatch.setattr(candidates, 'chunk_rows', lambda rows, latents: 5)
  for name in ('jumprelu', 'topk_aux', 'batchtopk'):
    with jax.set_mesh(make_mesh(1, 1)):
      expected = _run(_case(name, 'dense'), 20)
      _check(_run(_case(name, 'sparse'), 20), expected)


def test_zero1_with_one_device_along_data():
  """Its arrays are typed otherwise: the update goes by arrays."""
  with jax.set_mesh(make_mesh(1, 8)):
    expected = _run(_case('topk_aux', 'dense', (1, 8)), 12)
    found = _run(_case('topk_aux', 'sparse', (1, 8), mesh_zero1=True), 12)
  _check(found, expected)
