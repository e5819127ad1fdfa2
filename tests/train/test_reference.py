"""Whole training steps against a float64 reference in plain numpy.

The gradients are written by hand from docs/math.md and call nothing of ours.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.models.sae import Norm
from sae_jax.train import state, step
from sae_jax.train.config import base_config

pytestmark = pytest.mark.smoke

D, F, B, STEPS = 6, 24, 16, 3
LR, B2, EPS = 0.03, 0.9, 1e-4  # an eps that is seen in the update
CLIP = {'jumprelu': 10.0, 'topk': 2.0}  # binds in some steps, not in all
THETA, BANDWIDTH, L0_COEF = 0.2, 0.2, 0.5
WARMUP, RAMP, DECAY, DEAD = 4, 5, 3, 2  # steps
K, ALPHA = 2, 0.25


def _config(name):
  c = base_config()
  c.sae.d_in, c.sae.latents, c.sae.pre_bias = D, F, True
  c.act.name, c.train.batch_rows = name, B
  c.optim.lr, c.optim.b2, c.optim.eps = LR, B2, EPS
  c.optim.clip_norm, c.train.rows = CLIP[name], (STEPS + 1) * B
  if name == 'jumprelu':
    c.act.bandwidth, c.loss.l0_coef, c.optim.b1 = BANDWIDTH, L0_COEF, 0.0
    c.optim.warmup_rows, c.loss.l0_warmup_rows = WARMUP * B, RAMP * B
  else:
    c.act.k, c.loss.aux_coef, c.optim.b1 = K, ALPHA, 0.9
    c.optim.decay_rows, c.loss.dead_rows = DECAY * B, DEAD * B
  return c


def _case(config):
  """(state with no array zero, its arrays in float64, batches, the norm)."""
  rng = np.random.default_rng(2)
  mean = rng.normal(size=D).astype(np.float32)
  norm = Norm(jnp.array(mean), jnp.float32(2.0))
  s = jax.jit(lambda norm: state.init_state(config, norm))(norm)
  W = rng.normal(size=(2, F, D))
  W /= np.linalg.norm(W, axis=-1, keepdims=True)
  p = {
    'W_enc': W[0] + 0.5 * W[1],
    'b_enc': rng.normal(0, 0.2, F),
    'W_dec': W[0],
    'b_dec': rng.normal(0, 0.2, D),
  }
  act = s.sae.act
  if config.act.name == 'jumprelu':
    theta = THETA * rng.random(F) ** 2  # some so small that they reach 0
    p['theta'] = np.log(theta) if config.act.log_theta else theta
    act = act.replace(param=jnp.array(p['theta'], jnp.float32))
  since = np.where(np.arange(F) % 3, B, 0)  # none dead before the first step
  arrays = {k: jnp.array(p[k], jnp.float32) for k in p if k != 'theta'}
  s = s.replace(
    sae=s.sae.replace(**arrays, act=act),
    rows_since_fired=jnp.array(since, jnp.int32),
  )
  # Batches of different size, so that some gradients are clipped.
  x = rng.normal(size=(STEPS, B, D)) * np.array([2.0, 0.5, 1.0])[:, None, None]
  return s, p, since, x.astype(np.float32) + mean, (mean, 2.0)


def _pre(p, n):
  return n @ p['W_enc'].T + p['b_enc'] - p['W_enc'] @ p['b_dec']


def _chain(p, n, dz, dW_dec, db_dec):
  """All gradients from those of z, W_dec and what b_dec adds at the end.

  z = W_enc n + b_enc - W_enc b_dec: b_dec and W_enc appear twice.
  """
  db = dz.sum(0)
  return {
    'W_enc': dz.T @ n - np.outer(db, p['b_dec']),
    'b_enc': db,
    'W_dec': dW_dec,
    'b_dec': db_dec - p['W_enc'].T @ db,
  }


def _clear(*distances):
  """No decision of the case is so close that float32 may take it otherwise."""
  assert min(np.abs(d).min() for d in distances) > 1e-5


def _jumprelu_grads(p, n, ramp, log):
  z, theta = _pre(p, n), np.exp(p['theta']) if log else p['theta']
  over = z - theta
  _clear(over, np.abs(over) - BANDWIDTH / 2)
  on, window = over > 0, np.abs(over) < BANDWIDTH / 2
  assert (window & on).any() and (window & ~on).any()
  f = z * on
  d_hat = -2 / B * (n - f @ p['W_dec'] - p['b_dec'])  # dL / d n_hat
  df = d_hat @ p['W_dec'].T
  grads = _chain(p, n, df * on, f.T @ d_hat, d_hat.sum(0))
  both = theta * df + ramp * L0_COEF / B  # through f, through the L0
  d_theta = -(window * both).sum(0) / BANDWIDTH
  return grads | {'theta': theta * d_theta if log else d_theta}


def _best(z, k):
  """ReLU'(z) of each row's k largest entries."""
  order = np.sort(z, axis=1)[:, ::-1]
  _clear(order[:, k - 1] - order[:, k])
  return (z >= order[:, k - 1 : k]) & (z > 0)


def _topk_grads(p, n, dead, aux_k):
  """(gradients, latents that fired)."""
  z = _pre(p, n)
  _clear(z)
  on = _best(z, K)
  f = z * on
  e = n - f @ p['W_dec'] - p['b_dec']
  d_hat = -2 / B * e
  dz, dW_dec = d_hat @ p['W_dec'].T * on, f.T @ d_hat
  if dead.any():
    aux = np.zeros_like(on)
    at = np.flatnonzero(dead)
    aux[:, at] = _best(z[:, at], aux_k) if aux_k < len(at) else z[:, at] > 0
    a = z * aux
    variance = ((e - e.mean(0)) ** 2).sum(1).mean()
    d_aux = -2 / B * ALPHA * (e - a @ p['W_dec']) / variance  # e is a constant
    dz, dW_dec = dz + d_aux @ p['W_dec'].T * aux, dW_dec + a.T @ d_aux
  return _chain(p, n, dz, dW_dec, d_hat.sum(0)), on.any(0)


def _update(p, grads, moments, i, *, lr, b1, clip):
  """(arrays, moments, was it clipped) after step i = 0, 1, ..."""
  g, W = dict(grads), p['W_dec']
  g['W_dec'] = g['W_dec'] - (g['W_dec'] * W).sum(1, keepdims=True) * W
  norm = np.sqrt(sum((x**2).sum() for x in g.values()))
  new, after = {}, {}
  for k in p:
    x = g[k] * min(1, clip / norm)
    m, v = moments.get(k, (0, 0))
    m, v = b1 * m + (1 - b1) * x, B2 * v + (1 - B2) * x**2
    after[k] = m, v
    m_hat, v_hat = m / (1 - b1 ** (i + 1)), v / (1 - B2 ** (i + 1))
    new[k] = p[k] - lr * m_hat / (np.sqrt(v_hat) + EPS)
  new['W_dec'] /= np.linalg.norm(new['W_dec'], axis=1, keepdims=True)
  return new, after, norm > clip


def _compare(s, p):
  for k, expected in p.items():
    found = s.sae.act.param if k == 'theta' else getattr(s.sae, k)
    np.testing.assert_allclose(found, expected, 1e-4, 1e-5, err_msg=k)


@pytest.mark.parametrize('log', [False, True], ids=['theta', 'log_theta'])
def test_jumprelu_steps_are_those_of_the_formulas(log):
  config = _config('jumprelu')
  config.act.log_theta = log
  s, p, _, x, (mean, scale) = _case(config)
  step_fn, moments, clipped, at_zero = step.make_step(config), {}, [], False
  for i in range(STEPS):
    s, _ = step_fn(s, jnp.array(x[i]))
    n = (x[i].astype(np.float64) - mean) / scale
    grads = _jumprelu_grads(p, n, min(i / RAMP, 1), log)
    lr = LR * (0.1 + 0.45 * (1 - np.cos(np.pi * min(i / WARMUP, 1))))
    p, moments, over = _update(
      p, grads, moments, i, lr=lr, b1=0, clip=CLIP['jumprelu']
    )
    if not log:
      at_zero |= (p['theta'] < 0).any()
      p['theta'] = np.maximum(p['theta'], 0)
    clipped.append(over)
    _compare(s, p)
  # The case shows what it is for.
  assert any(clipped) and not all(clipped)
  assert log or at_zero


@pytest.mark.parametrize('aux_k', [4, 20])
def test_topk_steps_with_dead_latents_are_those_of_the_formulas(aux_k):
  """AuxK has more dead latents than it selects, and fewer."""
  config = _config('topk')
  config.loss.aux_k = aux_k
  s, p, since, x, (mean, scale) = _case(config)
  step_fn, moments, clipped, counts = step.make_step(config), {}, [], []
  for i in range(STEPS):
    s, _ = step_fn(s, jnp.array(x[i]))
    n = (x[i].astype(np.float64) - mean) / scale
    dead = since >= DEAD * B
    grads, fired = _topk_grads(p, n, dead, aux_k)
    lr = LR * min((STEPS + 1 - i) / DECAY, 1)
    p, moments, over = _update(
      p, grads, moments, i, lr=lr, b1=0.9, clip=CLIP['topk']
    )
    since = np.where(fired, 0, since + B)
    clipped.append(over)
    counts.append(dead.sum())
    _compare(s, p)
    np.testing.assert_array_equal(s.rows_since_fired, since)
  assert any(clipped) and not all(clipped)
  assert counts[0] == 0 < counts[1] and counts[2]
  assert (max(counts) > aux_k) == (aux_k == 4)
