"""Everything training needs to go on, as one pytree, and its construction.

`init_state` is pure and runs under jit, so that no full dictionary ever lies
on one device.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from sae_jax.config import Config
from sae_jax.models import activations, objectives, sae
from sae_jax.models.sae import SAE, Norm
from sae_jax.parallel.mesh import DICT, platform, spec, split_latents
from sae_jax.parallel.select import MOST_SELECTED
from sae_jax.train import optim

ACTIVE = 64  # latents a row that a JumpReLU without a target is taken to have
# The sparse rule is faster from so many latents for an active one. Measured
# on CPUs; nobody has measured ours on an accelerator: dense there unless asked
# (docs/performance.md has the bytes and FLOPs).
SPARSE_FROM = {'cpu': 24}


class State(struct.PyTreeNode):
  """What a checkpoint holds besides the data position."""

  step: jax.Array  # [] int32, updates made
  sae: SAE
  opt: optax.OptState
  rows_since_fired: jax.Array  # [F@dict] int32, saturates at 2^30
  ema: SAE | None  # running mean of the learned arrays (its normalisers None)
  # Update up to which the rows' second moments have decayed, see touched.py;
  # None where a first moment moves all rows.
  touched: jax.Array | None  # [F@dict] int32


def learned(s: SAE) -> SAE:
  """The SAE without the leaves that no gradient touches."""
  return s.replace(norm_in=None, norm_out=None)


def with_norms(params: SAE, s: SAE) -> SAE:
  """The learned arrays of `params` with the normalisers of `s`."""
  return params.replace(norm_in=s.norm_in, norm_out=s.norm_out)


def final_sae(s: SAE, ema: SAE | None) -> SAE:
  """The SAE to use: the running mean of the weights where there is one."""
  if ema is None:
    return s
  return optim.constrain(with_norms(split_latents(ema, False), s))


def make_activation(act: Config, latents: int) -> activations.Activation:
  """The activation that config.act names; initial parameters."""
  match act.name:
    case 'jumprelu':
      theta = jnp.full(latents, act.theta, jnp.float32, out_sharding=spec(DICT))
      return activations.jump_relu(theta, act.bandwidth, log=act.log_theta)
    case 'topk':
      return activations.TopK(act.k)
    case 'batchtopk':
      return activations.BatchTopK(jnp.zeros(()), act.k)
  raise ValueError(f'unknown activation {act.name!r}')


def make_penalties(config: Config) -> tuple[objectives.Penalty, ...]:
  """The penalties that config.loss asks for with config.act."""
  c = config.loss
  match config.act.name:
    case 'jumprelu':
      coef, target = jnp.float32(c.l0_coef), jnp.float32(c.target_l0)
      return (objectives.L0Penalty(coef, target, quadratic=c.target_l0 > 0),)
    case 'topk' | 'batchtopk' if c.aux_coef:
      return (objectives.AuxK(jnp.float32(c.aux_coef), c.aux_k),)
  return ()


def peak_rate(config: Config) -> float:
  """config.optim's highest learning rate."""
  c = config.optim
  return optim.width_scaled(c.lr, config.sae.latents, c.lr_width)


def make_schedule(config: Config, peak: float | None = None) -> optax.Schedule:
  """config.optim's learning rate, or one with this peak, by step."""
  c, batch = config.optim, config.train.batch_rows
  return optim.learning_rate(
    peak_rate(config) if peak is None else peak,
    steps=steps_of(config.train.rows, batch),
    warmup_steps=c.warmup_rows // batch,
    decay_steps=c.decay_rows // batch,
  )


def make_optimizer(config: Config) -> optax.GradientTransformation:
  """config.optim's optimiser."""
  c = config.optim
  return optim.make_optimizer(b1=c.b1, b2=c.b2, eps=c.eps, clip=c.clip_norm)


def candidates(config: Config, on: str | None = None) -> int:
  """Candidates a row that sparse codes have room for, on one device; 0 where
  the dense rule is chosen. on: the platform, that of the mesh by default.

  train.codes='auto' compares what both move or compute: docs/performance.md.
  """
  c, F = config.train, config.sae.latents
  k = config.act.k
  if config.act.name == 'jumprelu':
    k = config.loss.target_l0 or ACTIVE
  most = c.budget or (k if config.act.name == 'topk' else 4 * k)
  most = min(max(math.ceil(most / config.mesh.dict), 1), F)
  in_lists = most * config.mesh.dict * c.batch_rows
  if config.act.name == 'batchtopk' and in_lists > MOST_SELECTED:
    return 0  # more than can be counted
  least = SPARSE_FROM.get(on or platform(), math.inf)
  if c.codes == 'dense' or (c.codes == 'auto' and k * least > F):
    return 0
  return most


def updates_in_place(config: Config) -> bool:
  """Whether an update may touch the rows of a batch only, one by one."""
  c = config.optim
  whole = c.b1 or c.ema or c.clip_norm or config.train.micro_batches > 1
  return not (whole or config.mesh.zero1) and config.mesh.data == 1


def steps_of(rows: int, batch_rows: int) -> int:
  """Steps that cover `rows`; the last batch is whole."""
  return -(-rows // batch_rows)


def init_state(config: Config, norm: Norm) -> State:
  """The state before the first step, sharded under the current mesh."""
  F = config.sae.latents
  s = sae.init(
    jax.random.key(config.seed),
    latents=F,
    act=make_activation(config.act, F),
    norm_in=norm,
    pre_bias=config.sae.pre_bias,
    encoder_norm=config.sae.encoder_norm,
  )
  params: Any = learned(s)  # optax's annotations know no dataclasses
  updated = split_latents(params, config.mesh.zero1)
  return State(
    step=jnp.zeros((), jnp.int32),
    sae=s,
    opt=make_optimizer(config).init(updated),
    rows_since_fired=jnp.zeros(F, jnp.int32, out_sharding=spec(DICT)),
    # Adding zero makes copies: a donated buffer may appear once only.
    ema=jax.tree.map(lambda x: x + 0, updated) if config.optim.ema else None,
    touched=None
    if config.optim.b1
    else jnp.zeros(F, jnp.int32, out_sharding=spec(DICT)),
  )


def abstract_state(config: Config) -> State:
  """The state's shapes, types and concrete shardings, without its arrays.

  Under a mesh the state's own sharding; without one, the first device.
  """
  d = config.sae.d_in
  norm = Norm(jnp.zeros(d), jnp.ones(()))
  shapes = jax.eval_shape(lambda: init_state(config, norm))
  mesh = jax.sharding.get_mesh()

  def concrete(a):
    if mesh.empty:
      sharding = SingleDeviceSharding(jax.devices()[0])
    else:
      sharding = NamedSharding(mesh, a.sharding.spec if a.sharding else P())
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

  return jax.tree.map(concrete, shapes)
