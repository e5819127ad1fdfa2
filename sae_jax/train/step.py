"""One optimiser update, and the same numbers on held-out rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sae_jax.config import Config
from sae_jax.models import activations, objectives
from sae_jax.parallel.mesh import mean_rows, split_latents
from sae_jax.train import optim
from sae_jax.train import touched as touch
from sae_jax.train.gradients import gradients, held_out_terms, threshold
from sae_jax.train.state import (
  State,
  candidates,
  final_sae,
  learned,
  make_optimizer,
  make_penalties,
  make_schedule,
  peak_rate,
  updates_in_place,
  with_norms,
)

Metrics = dict[str, jax.Array]
SATURATED = 2**30  # rows since a latent fired are counted up to here


class Knobs(NamedTuple):
  """What SAEs that share a compiled step may differ in, as arrays."""

  lr: jax.Array  # [] peak learning rate
  penalties: tuple[objectives.Penalty, ...]  # their coefficients


def make_knobs(config: Config) -> Knobs:
  """The knobs of a step with this config."""
  return Knobs(jnp.float32(peak_rate(config)), make_penalties(config))


def make_step(
  config: Config,
) -> Callable[[State, jax.Array], tuple[State, Metrics]]:
  """step(state, x [B@data, D] raw rows) -> (state, scalar metrics).

  Jitted; the state is donated. See `make_update`.
  """
  update = make_update(config)

  def step(state, x):
    return update(state, x, make_knobs(config))

  return jax.jit(step, donate_argnums=0)


def make_update(
  config: Config,
) -> Callable[[State, jax.Array, Knobs], tuple[State, Metrics]]:
  """update(state, x [B@data, D] raw rows, knobs) -> (state, scalar metrics).

  Collectives: over `dict` one all-reduce of the
  reconstructions [B, E] and sums of O(B) + O(D); over `data` the gradients
  once and O(F) counts, with config.mesh.zero1 as reduce-scatter of gradients
  and all-gather of parameters. Nothing learned changes where the loss or a
  gradient is not finite, the optimiser's state neither; steps and rows go on,
  `train/skipped` is 1.
  """
  schedule, decay = make_schedule(config, 1.0), config.optim.ema
  ramp_steps = config.loss.l0_warmup_rows // config.train.batch_rows
  budget = candidates(config)
  rule = _in_rows if budget and updates_in_place(config) else _with_arrays

  def update(state: State, x, knobs: Knobs) -> tuple[State, Metrics]:
    dead = state.rows_since_fired >= config.loss.dead_rows
    ramp = jnp.minimum(state.step / ramp_steps, 1) if ramp_steps else 1.0
    lr = knobs.lr * schedule(state.step)
    batch = Batch(x, knobs.penalties, dead, jnp.float32(ramp), lr)
    out = rule(config, budget, state, batch)
    terms, good, after = out.terms, out.good, out.params
    # Early, of the last fiftieth of the run: thresholds move with the weights.
    t = jnp.clip(1 - 50 / (state.step + 1.0), 0, config.act.theta_ema)
    act = activations.update(after.act, terms.seen, t)
    after = after.replace(act=_keep(good, act, after.act))
    ema = state.ema
    if ema is not None:  # first update: the weights themselves, so no bias
      made = optax.tree.get(state.opt, 'count')
      t = jnp.minimum(decay, made / (made + 1.0))
      mean = jax.tree.map(lambda a, b: t * a + (1 - t) * b, ema, after)
      ema = _keep(good, mean, ema)

    since = jnp.minimum(state.rows_since_fired + len(x), SATURATED)
    since = jnp.where(terms.fired & good, 0, since)
    s = with_norms(split_latents(after, False), state.sae)
    metrics = {
      'train/loss': out.loss,
      'train/mse': terms.mse,
      'train/fvu': _fvu(terms, state, x),
      'train/l0': terms.l0,
      'train/penalty': terms.penalty,
      'train/dead': (since >= config.loss.dead_rows).mean(),
      'train/lr': lr,
      'train/grad_norm': out.norm,
      'train/skipped': 1.0 - good,
      'train/dense': terms.dense,
    }
    return State(state.step + 1, s, out.opt, since, ema, out.touched), metrics

  return update


class Batch(NamedTuple):
  """What an update is made of besides the state."""

  x: jax.Array  # [B@data, D] raw rows
  penalties: tuple[objectives.Penalty, ...]
  dead: jax.Array  # [F@dict] bool
  ramp: jax.Array  # []
  lr: jax.Array  # []


class Updated(NamedTuple):
  """What an update says and leaves; all as it was unless `good`."""

  loss: jax.Array
  terms: objectives.Terms
  norm: jax.Array  # [] of the gradients
  good: jax.Array  # [] bool: all is finite
  params: Any  # the SAE without its normalisers
  opt: optax.OptState
  touched: jax.Array | None


def _keep(good: jax.Array, new: Any, old: Any) -> Any:
  return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def _with_arrays(
  config: Config, budget: int, state: State, batch: Batch
) -> Updated:
  """The update by gradients that exist as arrays."""
  params: Any = learned(state.sae)
  zero1, touched, opt = config.mesh.zero1, state.touched, state.opt
  of = lambda penalties: gradients(
    params, state.sae.norm_in, batch.x, penalties, batch.dead, batch.ramp,
    micro_batches=config.train.micro_batches,
    dtype=jnp.dtype(config.train.compute_dtype), scatter=zero1, budget=budget,
  )  # fmt: skip
  if any(isinstance(p, objectives.AuxK) for p in batch.penalties):
    # AuxK is zero while nothing is dead and costs 60% of the other products.
    # A branch outside differentiation runs one side only.
    loss, terms, grads = jax.lax.cond(
      batch.dead.any(), lambda: of(batch.penalties), lambda: of(())
    )
  else:
    loss, terms, grads = of(batch.penalties)
  norm = optax.tree.norm(grads)
  good = jnp.isfinite(loss) & jnp.isfinite(norm)
  before = split_latents(params, zero1)
  if touched is not None:
    lag = split_latents(touched, zero1)
    opt = touch.caught_up(opt, lag, config.optim.b2)
  after, opt = optim.update(
    make_optimizer(config), grads, opt, before, batch.lr
  )
  if touched is not None:
    touched = jnp.where(good, optax.tree.get(opt, 'count'), touched)
  after, opt = _keep(good, after, before), _keep(good, opt, state.opt)
  return Updated(loss, terms, norm, good, after, opt, touched)


def _in_rows(
  config: Config, budget: int, state: State, batch: Batch
) -> Updated:
  """The update of the rows that the batch touches, in place; of the arrays [F]
  and [D] by the optimiser as ever."""
  params: Any = learned(state.sae)
  nu, count = (optax.tree.get(state.opt, k) for k in ('nu', 'count'))
  c, touched = config.optim, state.touched
  assert touched is not None
  out = touch.step(
    params, state.sae.norm_in, batch.x, batch.penalties, batch.dead, batch.ramp,
    touch.Rows(params.W_enc, params.W_dec, nu.W_enc, nu.W_dec, touched),
    touch.Adam(batch.lr, jnp.float32(c.b2), jnp.float32(c.eps), count + 1),
    budget=budget, dtype=jnp.dtype(config.train.compute_dtype),
  )  # fmt: skip
  bare = lambda s: s.replace(W_enc=None, W_dec=None)
  before, opt = bare(params), optax.tree.set(state.opt, nu=bare(nu))
  small: Any = out.small  # optax's annotations know no dataclasses
  updates, new = make_optimizer(config).update(small, opt, before)
  after = jax.tree.map(lambda a, u: a - batch.lr * u, before, updates)
  after = after.replace(act=after.act.project())
  after, opt = _keep(out.good, after, before), _keep(out.good, new, opt)
  rows = out.rows
  nu = optax.tree.get(opt, 'nu')
  nu = nu.replace(W_enc=rows.nu_enc, W_dec=rows.nu_dec)
  after = after.replace(W_enc=rows.W_enc, W_dec=rows.W_dec)
  opt = optax.tree.set(opt, nu=nu)
  return Updated(
    out.loss, out.terms, out.norm, out.good, after, opt, rows.touched
  )


def make_settle(config: Config) -> Callable[[State, jax.Array], State] | None:
  """settle(state, x [B@data, D] held-out rows) -> the state to save or look at.

  Of BatchTopK alone, None of others: theta as those rows have it, with the
  weights of now. The mean that training keeps lags behind them, and rows just
  trained on have other latents than new ones. Training does not depend on it.
  """
  if config.act.name != 'batchtopk':
    return None
  budget = candidates(config) or min(4 * config.act.k, config.sae.latents)

  def settle(state: State, x):
    theta = threshold(final_sae(state.sae, state.ema), x, budget)

    def put(s):
      if s is None:
        return None
      new = jnp.where(jnp.isfinite(theta), theta, s.act.theta)
      return s.replace(act=s.act.replace(theta=new))

    return state.replace(sae=put(state.sae), ema=put(state.ema))

  return settle


@jax.jit
def evaluate(state: State, x: jax.Array) -> Metrics:
  """Scalar metrics of the SAE on held-out raw rows x [B@data, D]."""
  terms = held_out_terms(final_sae(state.sae, state.ema), x)
  fvu = _fvu(terms, state, x)
  return {'eval/fvu': fvu, 'eval/l0': terms.l0, 'eval/mse': terms.mse}


def _fvu(terms: objectives.Terms, state: State, x: jax.Array) -> jax.Array:
  """mse over the mean square of what rows x differ by from their own mean.

  Not over E|x|^2 - |E x|^2: in float32 nothing is left of that where the rows
  lie 1,000 deviations from zero. From raw rows: no second [B, D] is made.
  """
  x = x.astype(jnp.float32)
  t = (x - mean_rows(x)) / state.sae.norm_in.scale
  return terms.mse / mean_rows(jnp.square(t).sum(-1))
