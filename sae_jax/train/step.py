"""One optimiser update, and the same numbers on held-out rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from sae_jax.config import Config
from sae_jax.models import activations, objectives
from sae_jax.train import optim
from sae_jax.train.state import (
  State,
  final_sae,
  learned,
  make_optimizer,
  make_penalties,
  make_schedule,
  with_norms,
)

Metrics = dict[str, jax.Array]
SATURATED = 2**30  # rows since a latent fired are counted up to here


def make_step(
  config: Config,
) -> Callable[[State, jax.Array], tuple[State, Metrics]]:
  """step(state, x [B@data, D] raw rows) -> (state, scalar metrics).

  Jitted; the state is donated. Collectives: over `dict` the reconstruction
  [B, E] and sums of O(B) + O(D); over `data` the gradients and O(F) counts.
  """
  optimizer, schedule = make_optimizer(config), make_schedule(config)
  ramp_steps = config.loss.l0_warmup_rows // config.train.batch_rows
  decay, penalties = config.optim.ema, make_penalties(config)
  act_decay = config.act.theta_ema

  def step(state: State, x: jax.Array) -> tuple[State, Metrics]:
    n, params = state.sae.norm_in(x), learned(state.sae)
    dead = state.rows_since_fired >= config.loss.dead_rows
    ramp = jnp.minimum(state.step / max(ramp_steps, 1), 1.0)
    grad = lambda penalties: jax.value_and_grad(objectives.loss, has_aux=True)(
      params,
      n,
      n,
      penalties,
      dead=dead,
      ramp=ramp if ramp_steps else jnp.float32(1),
    )
    if any(isinstance(p, objectives.AuxK) for p in penalties):
      # AuxK is zero while nothing is dead and costs 60% of the other products.
      # A branch outside differentiation runs one side only.
      (loss, terms), grads = jax.lax.cond(
        dead.any(), lambda: grad(penalties), lambda: grad(())
      )
    else:
      (loss, terms), grads = grad(penalties)
    params, opt = optim.update(optimizer, grads, state.opt, params)
    t = jnp.minimum(act_decay, state.step / (state.step + 1.0))  # no bias
    params = params.replace(act=activations.update(params.act, terms.seen, t))

    since = jnp.minimum(state.rows_since_fired + len(x), SATURATED)
    since = jnp.where(terms.fired, 0, since)
    ema = state.ema
    if ema is not None:  # first step: the weights themselves, so no bias
      t = jnp.minimum(decay, state.step / (state.step + 1.0))
      ema = jax.tree.map(lambda a, b: t * a + (1 - t) * b, ema, params)
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
      'train/lr': schedule(state.step),
      'train/grad_norm': optax.tree.norm(grads),
    }
    return state_after, metrics

  return jax.jit(step, donate_argnums=0)


@jax.jit
def evaluate(state: State, x: jax.Array) -> Metrics:
  """Scalar metrics of the SAE on held-out raw rows x [B@data, D]."""
  s = final_sae(state.sae, state.ema)
  n, none = s.norm_in(x), jnp.zeros((), bool)
  _, terms = objectives.loss(
    s, n, n, (), dead=none, ramp=jnp.float32(1), training=False
  )
  return {'eval/fvu': terms.fvu, 'eval/l0': terms.l0, 'eval/mse': terms.mse}
