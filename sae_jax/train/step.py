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
from sae_jax.train.gradients import gradients
from sae_jax.train.state import (
  State,
  final_sae,
  learned,
  make_optimizer,
  make_penalties,
  make_schedule,
  peak_rate,
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
  decay = config.optim.ema
  zero1 = config.mesh.zero1
  ramp_steps = config.loss.l0_warmup_rows // config.train.batch_rows
  act_decay = config.act.theta_ema

  def grad(state, x, params, dead, penalties):
    ramp = jnp.minimum(state.step / ramp_steps, 1) if ramp_steps else 1.0
    of = lambda penalties: gradients(
      params,
      state.sae.norm_in,
      x,
      penalties,
      dead,
      jnp.float32(ramp),
      micro_batches=config.train.micro_batches,
      dtype=jnp.dtype(config.train.compute_dtype),
      scatter=zero1,
    )
    if any(isinstance(p, objectives.AuxK) for p in penalties):
      # AuxK is zero while nothing is dead and costs 60% of the other products.
      # A branch outside differentiation runs one side only.
      return jax.lax.cond(dead.any(), lambda: of(penalties), lambda: of(()))
    return of(penalties)

  def update(state: State, x, knobs: Knobs) -> tuple[State, Metrics]:
    params: Any = learned(state.sae)
    dead = state.rows_since_fired >= config.loss.dead_rows
    loss, terms, grads = grad(state, x, params, dead, knobs.penalties)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    keep = lambda new, old: jax.tree.map(
      lambda a, b: jnp.where(good, a, b), new, old
    )

    before = split_latents(params, zero1)
    lr = knobs.lr * schedule(state.step)
    after, opt = optim.update(optimizer, grads, state.opt, before, lr)
    t = jnp.minimum(act_decay, state.step / (state.step + 1.0))  # no bias
    after = after.replace(act=activations.update(after.act, terms.seen, t))
    after, opt = keep(after, before), keep(opt, state.opt)
    ema = state.ema
    if ema is not None:  # first step: the weights themselves, so no bias
      t = jnp.minimum(decay, state.step / (state.step + 1.0))
      mean = jax.tree.map(lambda a, b: t * a + (1 - t) * b, ema, after)
      ema = keep(mean, ema)

    since = jnp.minimum(state.rows_since_fired + len(x), SATURATED)
    since = jnp.where(terms.fired & good, 0, since)
    params = split_latents(after, False)
    state_after = State(
      state.step + 1, with_norms(params, state.sae), opt, since, ema
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
