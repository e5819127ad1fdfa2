"""Several SAEs on one stream of batches: members of a job, stacked.

A stack's state is a `State` with a leading axis of members on every leaf. Its
step is a loop over them, not a vmap: what a step does only at times (AuxK)
stays a branch, one compiled body serves any number, and the donated state is
updated in place. On a mesh with an axis `member` each part of it loops over
its own members and nothing goes from one to the other.

A plain run is the case of one member, whose state has no such axis.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sae_jax.config import Config
from sae_jax.models.sae import Norm
from sae_jax.parallel.mesh import MEMBER, manual
from sae_jax.train import step
from sae_jax.train.config import member_configs, member_name, stacks
from sae_jax.train.state import State, init_state

# A State of a plain run; of a job with members a list, a stack for each step.
States: TypeAlias = Any


class Member(NamedTuple):
  """One SAE of a job; a run, with a folder of its own."""

  name: str  # '' of a plain run
  folder: Path
  config: Config


class Job(NamedTuple):
  """What the loop does with a plain run or with members."""

  members: list[Member]
  join: Callable[[Iterator[State]], States]  # the members' states, in order
  part: Callable[[States, int], State]  # the i-th member's
  step: Callable[[States, jax.Array], tuple[States, Any]]
  split: Callable[[Any], list[dict[str, Any]]]  # a step's metrics by member
  # As the states are to be saved and evaluated, see `step.make_settle`.
  settle: Callable[[States, jax.Array], States]
  evaluate: Callable[[States, jax.Array], list[dict[str, Any]]]


def members_of(config: Config, folder: Path) -> list[Member]:
  """The members of a job in this folder; the run itself without any."""
  if not config.members:
    return [Member('', folder, config)]
  names = [member_name(config, i) for i in range(len(config.members))]
  configs = zip(names, member_configs(config), strict=True)
  return [Member(name, folder / 'members' / name, c) for name, c in configs]


def make_job(
  config: Config, folder: Path, plain_step: Callable[[Config], Any]
) -> Job:
  """What `config` asks for, under the current mesh.

  plain_step: makes the step of a plain run (`step.make_step`).
  """
  members = members_of(config, folder)
  if config.members:
    return _stacked(members)
  return Job(
    members,
    join=lambda states: next(states),
    part=lambda state, i: state,
    step=plain_step(config),
    split=lambda metrics: [metrics],
    settle=make_settle([config], stacked=False),
    evaluate=lambda state, x: [step.evaluate(state, x)],
  )


def initial(member: Member, mean: Any, scale: Any) -> State:
  """A member's state before its first step; for the normaliser see `Norm`."""
  make = lambda mean, scale: init_state(member.config, Norm(mean, scale))
  return jax.jit(make)(mean, scale)


def _stacked(members: list[Member]) -> Job:
  configs = [m.config for m in members]
  groups = stacks(configs)
  place = {m: (g, i) for g, ms in enumerate(groups) for i, m in enumerate(ms)}
  steps = [make_step([configs[m] for m in group]) for group in groups]
  # On the devices, once: every transfer of the loop is an explicit one.
  numbers = jax.jit(lambda: list(map(jnp.int32, range(len(members)))))()

  def join(states):
    stacked: list[Any] = [None] * len(groups)
    for m, state in enumerate(states):
      g, i = place[m]
      if stacked[g] is None:
        stacked[g] = room(state, len(groups[g]))
      stacked[g] = put(stacked[g], state, numbers[i])
    return stacked

  def part(stacked, m):
    g, i = place[m]
    return take(stacked[g], numbers[i])

  def all_steps(stacked, x):
    made = [f(s, x) for f, s in zip(steps, stacked, strict=True)]
    return [s for s, _ in made], [metrics for _, metrics in made]

  def split(metrics):
    metrics = jax.device_get(metrics)
    of = lambda g, i: {name: v[i] for name, v in metrics[g].items()}
    return [of(*place[m]) for m in range(len(members))]

  settles = [make_settle([configs[m] for m in group]) for group in groups]

  def settle(stacked, x):
    return [f(s, x) for f, s in zip(settles, stacked, strict=True)]

  def evaluate(stacked, x):
    of = lambda g, i: _evaluate_at(stacked[g], numbers[i], x)
    return [of(*place[m]) for m in range(len(members))]

  return Job(members, join, part, all_steps, split, settle, evaluate)


def make_step(
  configs: list[Config],
) -> Callable[[State, jax.Array], tuple[State, step.Metrics]]:
  """step(stack, x [B@data, D] raw rows) -> (stack, metrics [N] each).

  Jitted; the stack is donated. The N configs must be ones that share a step
  (`config.stacks`).
  """
  # Sparse codes have room for so many latents as the densest aims at.
  update = step.make_update(max(configs, key=lambda c: c.loss.target_l0))

  def loop(stack, x, knobs):
    def one(stack, turn):
      i, knobs = turn
      state, metrics = update(_at(stack, i), x, knobs)
      return _with(stack, state, i), metrics

    turns = jnp.arange(len(knobs.lr)), knobs
    return jax.lax.scan(one, stack, turns)

  def alone(stack, x):  # nothing is copied out of the stack and back
    state = jax.tree.map(lambda a: a[0], stack)
    made = update(state, x, step.make_knobs(configs[0]))
    return jax.tree.map(lambda a: a[None], made)

  def whole(stack, x):
    if len(configs) == 1 and not _spread():
      return alone(stack, x)
    knobs = [step.make_knobs(config) for config in configs]
    knobs = jax.tree.map(lambda *a: jnp.stack(a), *knobs)
    if not _spread():
      return loop(stack, x, knobs)
    each = P(MEMBER)
    spread = _over_members(loop, (each, P(), each), (each, each))
    stack, metrics = spread(stack, x, jax.reshard(knobs, each))
    return stack, jax.reshard(metrics, P())  # for all processes to read

  return jax.jit(whole, donate_argnums=0)


def make_settle(
  configs: list[Config], stacked: bool = True
) -> Callable[[State, jax.Array], State]:
  """settle(stack, x [B@data, D] held-out rows) -> stack, see
  `step.make_settle`; of configs that share a step, or of one plain run."""
  settle = step.make_settle(configs[0])
  if settle is None:
    return lambda stack, x: stack
  if not stacked:
    return jax.jit(settle, donate_argnums=0)

  def loop(stack, x):
    one = lambda stack, i: (_with(stack, settle(_at(stack, i), x), i), None)
    return jax.lax.scan(one, stack, jnp.arange(len(stack.step)))[0]

  each = P(MEMBER)
  return jax.jit(_over_members(loop, (each, P()), each), donate_argnums=0)


def room(state: State, n: int) -> State:
  """A stack for n states like this one; zeros."""
  axis = MEMBER if _spread() else None
  types = jax.tree.map(jax.typeof, state)

  def zeros(a):
    spec = P(axis, *a.sharding.spec) if _on_a_mesh() else None
    return jnp.zeros((n, *a.shape), a.dtype, out_sharding=spec)

  return jax.jit(lambda: jax.tree.map(zeros, types))()


@functools.partial(jax.jit, donate_argnums=0)
def put(stack: State, state: State, i: jax.Array) -> State:
  """The stack (donated) with `state` as its i-th."""

  def local(stack, state, i):
    mine, i = _here(stack, i)
    keep = lambda a, b: jnp.where(mine, a, b)
    return _with(stack, jax.tree.map(keep, state, _at(stack, i)), i)

  return _over_members(local, (P(MEMBER), P(), P()), P(MEMBER))(stack, state, i)


@jax.jit
def take(stack: State, i: jax.Array) -> State:
  """The i-th state of a stack, everywhere along `member`."""

  def local(stack, i):
    mine, i = _here(stack, i)
    state = _at(stack, i)
    if not manual(MEMBER):
      return state

    def share(a):  # as bits: -0 + 0 is 0
      bits = f'uint{8 * a.dtype.itemsize}'
      a = jnp.where(mine, jax.lax.bitcast_convert_type(a, bits), 0)
      return jax.lax.psum(a, MEMBER)

    back = lambda a, b: jax.lax.bitcast_convert_type(share(a), b.dtype)
    return jax.tree.map(back, state, state)

  return _over_members(local, (P(MEMBER), P()), P())(stack, i)


@jax.jit
def _evaluate_at(stack: State, i: jax.Array, x: jax.Array) -> step.Metrics:
  return step.evaluate(take(stack, i), x)


def _at(stack: Any, i: jax.Array) -> Any:
  at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
  return jax.tree.map(lambda a: at(a, i, 0), stack)


def _with(stack: Any, state: Any, i: jax.Array) -> Any:
  put_at = jax.lax.dynamic_update_index_in_dim
  return jax.tree.map(lambda a, b: put_at(a, b, i, 0), stack, state)


def _here(stack: State, i: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(whether the i-th member is in this part of the stack, its index there)."""
  n = len(stack.step)
  i = i - jax.lax.axis_index(MEMBER) * n if manual(MEMBER) else i
  return (i >= 0) & (i < n), jnp.clip(i, 0, n - 1)


def _over_members(f: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """f on each part of the members; all else as it was, in explicit mode."""
  if not _spread():
    return f
  return jax.shard_map(
    f,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names={MEMBER},
    # Nothing is differentiated through it, and the types of what lies within
    # would have to know of members.
    check_vma=False,
  )


def _on_a_mesh() -> bool:
  return not jax.sharding.get_abstract_mesh().empty


def _spread() -> bool:
  """Whether the mesh has parts for the members."""
  return MEMBER in jax.sharding.get_abstract_mesh().axis_names
