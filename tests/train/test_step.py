"""The step on eight devices equals the step on one; its parts are right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sae_jax.models import activations, candidates, objectives
from sae_jax.models.sae import Norm
from sae_jax.parallel.mesh import DATA, DICT, make_mesh, spec
from sae_jax.train import optim, state, step
from sae_jax.train.config import base_config

pytestmark = pytest.mark.smoke

D, F, B = 16, 64, 32


def _config(name):
  c = base_config()
  c.sae.d_in, c.sae.latents = D, F
  c.train.batch_rows, c.train.rows = B, 20 * B
  c.optim.lr, c.optim.warmup_rows, c.optim.decay_rows = 1e-2, 4 * B, 4 * B
  if name.startswith('jumprelu'):
    c.act.name, c.act.theta, c.act.bandwidth = 'jumprelu', 0.2, 0.3
    c.loss.l0_warmup_rows = 3 * B
    c.loss.target_l0 = 4.0 if name == 'jumprelu_quadratic' else 0.0
    c.act.log_theta = name == 'jumprelu_log'
    c.loss.l0_coef = 1e-2
  else:
    c.act.name, c.act.k = name.removesuffix('_adam'), 4
    c.loss.aux_k, c.loss.dead_rows = 8, B
    c.optim.clip_norm = 0.5
    if name.startswith('batchtopk'):
      # A gradient near zero is all rounding, and Adam divides it by itself.
      c.optim.eps = 1e-4
    if name.endswith('_adam'):
      c.optim.b1, c.optim.ema = 0.9, 0.9
  return c


NAMES = [
  'jumprelu', 'jumprelu_quadratic', 'jumprelu_log', 'topk', 'topk_adam',
  'batchtopk', 'batchtopk_adam',
]  # fmt: skip


def _rows(n=B, seed=0):
  x = np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)
  return x + np.arange(D, dtype=np.float32) / D


def _norm():
  x = _rows(1000, 9)
  mean = x.mean(0)
  return Norm(mean, np.float32(np.sqrt(((x - mean) ** 2).sum(1).mean())))


def _run(config, steps=6):
  """(final state, metrics of every step, first gradients) on the mesh."""
  s = jax.jit(lambda norm: state.init_state(config, norm))(_norm())
  n = s.sae.norm_in(jax.device_put(_rows(), spec(DATA, None)))
  dead = jnp.zeros(F, bool, out_sharding=spec(DICT))
  grads = jax.jit(
    jax.grad(
      lambda p: objectives.loss(
        p, n, n, state.make_penalties(config), dead=dead, ramp=jnp.float32(1)
      )[0]
    )
  )(state.learned(s.sae))
  step_fn, history = step.make_step(config), []
  for i in range(steps):
    s, metrics = step_fn(s, jax.device_put(_rows(seed=i), spec(DATA, None)))
    history.append(jax.device_get(metrics))
  return jax.device_get((s, history, grads))


_one = {}


@pytest.mark.parametrize('name', NAMES)
def test_every_mesh_takes_the_same_steps(mesh, name):
  config = _config(name)
  if name not in _one:
    with jax.set_mesh(make_mesh(1, 1)):
      _one[name] = _run(config)
  found = _run(config)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(_one[name]), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
  # Something happened: every array moved, latents died and fired.
  moved = jax.device_get(_one[name][0])
  assert moved.step == 6 and np.any(moved.sae.b_dec != 0)
  if name in ('topk', 'batchtopk'):
    assert _one[name][1][-1]['train/dead'] > 0
    assert _one[name][1][-1]['train/penalty'] > 0


@pytest.mark.parametrize('name', ['jumprelu', 'topk', 'batchtopk'])
def test_selected_latents_are_the_same_exactly(mesh, name):
  """Integer weights and rows: z is exact, ties are everywhere."""
  config = _config(name)
  s = jax.jit(lambda norm: state.init_state(config, norm))(_norm()).sae
  rng = np.random.default_rng(5)
  W = rng.integers(-2, 3, (F, D)).astype(np.float32)
  x = rng.integers(-2, 3, (B, D)).astype(np.float32)
  s = s.replace(W_enc=jax.device_put(W, spec(DICT, None)))
  z = s.pre(jax.device_put(x, spec(DATA, None)))
  np.testing.assert_array_equal(z, x @ W.T)
  f = np.asarray(activations.in_training(s.act, z))
  z = np.asarray(z)
  if name == 'jumprelu':
    np.testing.assert_array_equal(f, z * (z > 0.2))
  elif name == 'batchtopk':
    best = np.argsort(-z, axis=None, kind='stable')[: config.act.k * B]
    expected = np.zeros(z.size)
    expected[best] = np.maximum(z.reshape(-1)[best], 0)
    np.testing.assert_array_equal(f, expected.reshape(z.shape))
  else:
    expected = np.zeros_like(z)
    best = np.argsort(-z, axis=1, kind='stable')[:, : config.act.k]
    np.put_along_axis(expected, best, np.take_along_axis(z, best, 1), 1)
    np.testing.assert_array_equal(f, np.maximum(expected, 0))


def test_every_array_is_sharded_from_the_start():
  config = _config('topk_adam')
  with jax.set_mesh(make_mesh(1, 8)):
    s = jax.jit(lambda norm: state.init_state(config, norm))(_norm())
    abstract = state.abstract_state(config)
  big = [x for x in jax.tree.leaves(s) if x.ndim and x.shape[0] == F]
  assert len(big) >= 3 * 4  # weights and both moments and their mean
  for x in big:
    assert {len(shard.data) for shard in x.addressable_shards} == {F // 8}
  for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(s), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_no_first_moment_is_stored_and_the_update_is_adam_s():
  g = {'w': jnp.array([[0.3, -2.0], [1e-4, 0.0]])}
  ours = optim.make_optimizer(b1=0.0, b2=0.999, eps=1e-8, clip=0)
  adam = optax.adam(0.1, b1=0.0, b2=0.999, eps=1e-8)
  a, b = ours.init(g), adam.init(g)
  assert sum(x.size for x in jax.tree.leaves(a)) < 2 * 4
  for i in range(5):
    scaled = jax.tree.map(lambda x, i=i: x * (i + 1.0), g)
    u, a = ours.update(scaled, a, g)
    v, b = adam.update(scaled, b, g)
    np.testing.assert_allclose(-0.1 * u['w'], v['w'], rtol=1e-5)


def test_parallel_gradient_is_removed_and_rows_keep_unit_norm():
  config = _config('jumprelu')
  final, _, grads = _run(config)
  norms = np.linalg.norm(final.sae.W_dec, axis=1)
  np.testing.assert_allclose(norms, 1, rtol=1e-6)
  s = jax.jit(lambda norm: state.init_state(config, norm))(_norm())
  params = state.learned(s.sae)
  left = optim.remove_parallel(jax.tree.map(jnp.asarray, grads), params).W_dec
  along = (np.asarray(left) * np.asarray(params.W_dec)).sum(1)
  assert np.abs(along).max() < 1e-6 < np.abs(grads.W_dec).max()


def test_learning_rate_and_its_units():
  schedule = optim.learning_rate(
    1.0, steps=100, warmup_steps=10, decay_steps=20
  )
  values = np.array([float(schedule(i)) for i in range(101)])
  assert values[0] == pytest.approx(0.1) and values[5] == pytest.approx(0.55)
  assert values[10] == values[80] == 1.0 and values[90] == pytest.approx(0.5)
  assert values[100] == 0 and np.all(np.diff(values[:11]) > 0)
  flat = optim.learning_rate(1.0, steps=100, warmup_steps=0, decay_steps=0)
  assert float(flat(0)) == float(flat(100)) == 1.0
  assert optim.width_scaled(2e-4, 2**16, 2**14) == pytest.approx(1e-4)
  assert optim.width_scaled(2e-4, 2**16, 0) == 2e-4


def test_the_threshold_is_a_running_mean_of_the_smallest_latents():
  """From the state alone: by numpy over the pre-activations of every step."""
  config = _config('batchtopk_adam')
  config.act.theta_ema = 0.6
  s = jax.jit(lambda norm: state.init_state(config, norm))(_norm())
  assert s.sae.act.theta == 0
  step_fn, theta, mean = step.make_step(config), 0.0, 0.0
  for i, at in enumerate([20, 98, 99, 300]):
    decay = [0, 49 / 99, 1 / 2, 0.6][i]  # of the last fiftieth, or theta_ema
    s = s.replace(step=jnp.int32(at))
    x = jnp.asarray(_rows(seed=i))
    z = np.asarray(s.sae.pre(s.sae.norm_in(x)))
    best = np.sort(z, axis=None)[-4 * B :]
    theta = decay * theta + (1 - decay) * best[best > 0].min()
    t = min(config.optim.ema, i / (i + 1))
    mean = t * mean + (1 - t) * theta
    s, metrics = step_fn(s, x)
    assert s.sae.act.theta == pytest.approx(theta, rel=1e-5)
    assert s.ema.act.theta == pytest.approx(mean, rel=1e-5)
    assert metrics['train/l0'] == 4
  # Held-out rows are read by the threshold, one by one.
  held = jnp.asarray(_rows(seed=9))
  final = state.final_sae(s.sae, s.ema)
  expected = np.asarray(final.pre(final.norm_in(held))) > mean
  found = step.evaluate(s, held)
  assert found['eval/l0'] == pytest.approx(expected.sum(1).mean())
  assert (np.asarray(final.encode(held)) != 0).sum(1).mean() == found['eval/l0']


def _penalty_case(**kw):
  config = _config('jumprelu')
  s = state.init_state(config, _norm()).sae
  n = s.norm_in(jnp.asarray(_rows(256)))
  terms = objectives.loss(
    s, n, n, (), dead=jnp.zeros(F, bool), ramp=jnp.float32(1)
  )[1]
  penalty = objectives.L0Penalty(**kw)
  args = dict(dead=jnp.zeros(F, bool), ramp=jnp.float32(0.5))
  total = objectives.loss(s, n, n, (penalty,), **args)
  slope = jax.grad(
    lambda p: objectives.loss(p, n, n, (penalty,), **args)[1].penalty
  )
  return terms.l0, total[1].penalty, slope(s).act.param


def test_both_forms_of_the_l0_penalty_agree_at_twice_the_target():
  l0, value, slope = _penalty_case(
    coef=jnp.float32(0.1), target=jnp.float32(0), quadratic=False
  )
  assert value == pytest.approx(0.5 * 0.1 * float(l0), rel=1e-5)
  assert np.all(np.asarray(slope) <= 0) and np.any(np.asarray(slope) < 0)
  _, value2, slope2 = _penalty_case(
    coef=jnp.float32(0.1), target=l0 / 2, quadratic=True
  )
  assert value2 == pytest.approx(0.5 * 0.1 * float(l0) / 4, rel=1e-4)
  np.testing.assert_allclose(slope2, slope, rtol=1e-4)


def test_auxk_is_the_written_formula_and_trains_dead_latents_alone():
  config = _config('topk')
  s = state.init_state(config, _norm()).sae
  n = np.asarray(s.norm_in(jnp.asarray(_rows(64))))
  dead = np.zeros(F, bool)
  dead[::3] = True
  aux = objectives.AuxK(jnp.float32(0.25), k=5)

  def penalty(s):
    return objectives.loss(
      s, n, n, (aux,), dead=jnp.array(dead), ramp=jnp.float32(1)
    )[1].penalty

  z = np.asarray(s.pre(n))
  error = n - np.asarray(s.reconstruct(s.act(jnp.array(z))))
  z_dead = np.where(dead, z, -np.inf)
  kept = z_dead >= np.sort(z_dead, 1)[:, -5][:, None]
  e_hat = np.where(kept, np.maximum(z, 0), 0) @ np.asarray(s.W_dec)
  variance = ((error - error.mean(0)) ** 2).sum(1).mean()
  expected = 0.25 * ((error - e_hat) ** 2).sum(1).mean() / variance
  assert penalty(s) == pytest.approx(expected, rel=1e-5)
  g = jax.grad(penalty)(s)
  assert np.all(np.asarray(g.W_dec)[~dead] == 0)
  assert np.any(np.asarray(g.W_dec)[dead] != 0)
  none = objectives.loss(
    s, n, n, (aux,), dead=jnp.zeros(F, bool), ramp=jnp.float32(1)
  )[1]
  assert none.penalty == 0


def test_running_mean_of_the_weights_has_no_bias():
  config = _config('topk_adam')
  s = jax.jit(lambda norm: state.init_state(config, norm))(_norm())
  step_fn = step.make_step(config)
  s, _ = step_fn(s, jnp.asarray(_rows()))
  np.testing.assert_array_equal(s.ema.W_enc, s.sae.W_enc)
  before = np.asarray(s.sae.W_enc)
  s, _ = step_fn(s, jnp.asarray(_rows(seed=1)))
  mean = (before + np.asarray(s.sae.W_enc)) / 2
  np.testing.assert_allclose(s.ema.W_enc, mean, atol=1e-6)


def test_the_running_mean_starts_at_the_first_update_that_is_made():
  config = _config('topk_adam')
  s = jax.jit(lambda norm: state.init_state(config, norm))(_norm())
  step_fn, bad = step.make_step(config), _rows()
  bad[0] = np.nan
  for x in (bad, _rows()):
    s, _ = step_fn(s, jnp.asarray(x))
  np.testing.assert_array_equal(s.ema.W_enc, s.sae.W_enc)


@pytest.mark.parametrize('name', ['topk', 'jumprelu', 'batchtopk'])
def test_evaluation_in_chunks_is_that_of_all_rows(mesh, name, monkeypatch):
  config = _config(name)
  s = jax.jit(lambda norm: state.init_state(config, norm))(_norm())
  x = jax.device_put(_rows(512, seed=5), spec(DATA, None))
  evaluate = step.evaluate.__wrapped__
  whole = jax.jit(evaluate)(s, x)
  monkeypatch.setattr(candidates, '_CHUNK_BYTES', {'default': 64 * 4 * F})
  compiled = jax.jit(lambda s, x: evaluate(s, x)).lower(s, x).compile()
  assert mesh.size > 1 or f'f32[512,{F}]' not in compiled.as_text()
  found = compiled(s, x)
  for key, value in whole.items():
    assert found[key] == pytest.approx(float(value), rel=1e-5), key


def test_fvu_of_rows_far_from_zero_that_are_not_centred():
  """1e4 deviations away, against float64 (was negative)."""
  x = 0.1 * _rows() + np.float32(1e3)
  scale = np.sqrt(np.square(x, dtype=np.float64).sum(1).mean())
  norm = Norm(np.zeros(D, np.float32), np.float32(scale))
  with jax.set_mesh(make_mesh(2, 4)):
    config = _config('topk')
    s = jax.jit(lambda norm: state.init_state(config, norm))(norm)
    x_on = jax.device_put(x, spec(DATA, None))
    found = jax.device_get(step.evaluate(s, x_on))
    found |= jax.device_get(step.make_step(config)(s, x_on)[1])
  variance = x.astype(np.float64).var(0).sum() / scale**2
  for part in ('train', 'eval'):
    expected = found[f'{part}/mse'] / variance
    assert found[f'{part}/fvu'] == pytest.approx(expected, rel=1e-3)
