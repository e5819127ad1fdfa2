"""One optimiser update, and the same numbers on held-out rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sae_jax.config import Config
from sae_jax.models import activations, objectives
from sae_jax.parallel.mesh import split_latents
from sae_jax.train import optim
from sae_jax.train import touched as touch
from sae_jax.train.gradients import gradients
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
  optimizer, schedule = make_optimizer(config), make_schedule(config, 1.0)
  decay, zero1, c = config.optim.ema, config.mesh.zero1, config.optim
  ramp_steps = config.loss.l0_warmup_rows // config.train.batch_rows
  act_decay = config.act.theta_ema
  budget = candidates(config)
  dtype = jnp.dtype(config.train.compute_dtype)
  in_place = budget and updates_in_place(config)

  def with_arrays(state: State, x, knobs: Knobs, dead, ramp, lr):
    """The update by gradients that exist as arrays."""
    params: Any = learned(state.sae)
    of = lambda penalties: gradients(
      params, state.sae.norm_in, x, penalties, dead, ramp,
      micro_batches=config.train.micro_batches,
      dtype=dtype, scatter=zero1, budget=budget,
    )  # fmt: skip
    if any(isinstance(p, objectives.AuxK) for p in knobs.penalties):
      # AuxK is zero while nothing is dead and costs 60% of the other products.
      # A branch outside differentiation runs one side only.
      loss, terms, grads = jax.lax.cond(
        dead.any(), lambda: of(knobs.penalties), lambda: of(())
      )
    else:
      loss, terms, grads = of(knobs.penalties)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    before, touched = split_latents(params, zero1), state.touched
    opt = state.opt
    if touched is not None:
      opt = touch.caught_up(opt, split_latents(touched, zero1), c.b2)
    after, opt = optim.update(optimizer, grads, opt, before, lr)
    if touched is not None:
      count = optax.tree.get(opt, 'count')
      touched = jnp.where(good, count, touched)
    return loss, terms, norm, good, before, after, opt, touched

  def in_rows(state: State, x, knobs: Knobs, dead, ramp, lr):
    """The update of the rows that the batch touches, in place."""
    before: Any = learned(state.sae)
    nu, count = (optax.tree.get(state.opt, k) for k in ('nu', 'count'))
    assert state.touched is not None
    rows = touch.Rows(
      before.W_enc, before.W_dec, nu.W_enc, nu.W_dec, state.touched
    )
    out = touch.step(
      before, state.sae.norm_in, x, knobs.penalties, dead, ramp, rows,
      touch.Adam(lr, jnp.float32(c.b2), jnp.float32(c.eps), count + 1),
      budget=budget, dtype=dtype,
    )  # fmt: skip
    bare = lambda s: s.replace(W_enc=None, W_dec=None)
    opt = optax.tree.set(state.opt, nu=bare(nu))
    small: Any = out.small  # optax's annotations know no dataclasses
    updates, opt = optimizer.update(small, opt, bare(before))
    after = jax.tree.map(lambda a, u: a - lr * u, bare(before), updates)
    new, full = out.rows, lambda s, a, b: s.replace(W_enc=a, W_dec=b)
    after = full(after, new.W_enc, new.W_dec)
    after = after.replace(act=after.act.project())
    nu = full(optax.tree.get(opt, 'nu'), new.nu_enc, new.nu_dec)
    opt = optax.tree.set(opt, nu=nu)
    # The rows are as they were already where the update is not good.
    before = full(before, new.W_enc, new.W_dec)
    return (
      out.loss, out.terms, out.norm, out.good, before, after, opt, new.touched,
    )  # fmt: skip

  def update(state: State, x, knobs: Knobs) -> tuple[State, Metrics]:
    dead = state.rows_since_fired >= config.loss.dead_rows
    ramp = jnp.minimum(state.step / ramp_steps, 1) if ramp_steps else 1.0
    lr = knobs.lr * schedule(state.step)
    rule = in_rows if in_place else with_arrays
    loss, terms, norm, good, before, after, opt, touched = rule(
      state, x, knobs, dead, jnp.float32(ramp), lr
    )
    keep = lambda new, old: jax.tree.map(
      lambda a, b: a if a is b else jnp.where(good, a, b), new, old
    )
    t = jnp.minimum(act_decay, state.step / (state.step + 1.0))  # no bias
    after = after.replace(act=activations.update(after.act, terms.seen, t))
    after = keep(after, before)
    if in_place:  # of the moments of the rows: as the rows
      nu = optax.tree.get(opt, 'nu')
      old = optax.tree.get(state.opt, 'nu')
      old = old.replace(W_enc=nu.W_enc, W_dec=nu.W_dec)
      opt = keep(opt, optax.tree.set(state.opt, nu=old))
    else:
      opt = keep(opt, state.opt)
    ema = state.ema
    if ema is not None:  # first step: the weights themselves, so no bias
      t = jnp.minimum(decay, state.step / (state.step + 1.0))
      mean = jax.tree.map(lambda a, b: t * a + (1 - t) * b, ema, after)
      ema = keep(mean, ema)

    since = jnp.minimum(state.rows_since_fired + len(x), SATURATED)
    since = jnp.where(terms.fired & good, 0, since)
    params = split_latents(after, False)
    state_after = State(
      state.step + 1, with_norms(params, state.sae), opt, since, ema, touched
    )
    metrics = {
      'train/loss': loss,
      'train/mse': terms.mse,
      'train/fvu': terms.fvu,
      'train/l0': terms.l0,
      'train/penalty': terms.penalty,
      'train/dead': (since >= config.loss.dead_rows).mean(),
      'train/lr': lr,
      'train/grad_norm': norm,
      'train/skipped': 1.0 - good,
      'train/dense': terms.dense,
    }
    return state_after, metrics

  return update


@jax.jit
def evaluate(state: State, x: jax.Array) -> Metrics:
  """Scalar metrics of the SAE on held-out raw rows x [B@data, D]."""
  s = final_sae(state.sae, state.ema)
  n, none = s.norm_in(x), jnp.zeros((), bool)
  _, terms = objectives.loss(
    s, n, n, (), dead=none, ramp=jnp.float32(1), training=False
  )
  return {'eval/fvu': terms.fvu, 'eval/l0': terms.l0, 'eval/mse': terms.mse}
