"""Which points are trained together: one batch stream, shared steps, memory."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.scaling import arithmetic
from sae_jax.scaling.chips import GIB
from sae_jax.sweep.grid import Spec, in_words
from sae_jax.sweep.machine import Machine
from sae_jax.train import perf
from sae_jax.train.config import (
  SHARED,
  member_configs,
  stacks,
  stream_seed,
  validate,
)
from sae_jax.train.keys import flatten
from sae_jax.train.run import trajectory
from sae_jax.train.state import candidates, steps_of

# Of the memory there is: allocators waste some, other programs use some.
_SHARE = 0.7


class Cost(NamedTuple):
  """What one point takes."""

  flops: float  # 12 B D F a step, as published
  executed: float  # of the products that are done, on this platform
  disk: float  # bytes of its checkpoints


def cost(config: Config, platform: str) -> Cost:
  """By arithmetic."""
  c, F = config.train, config.sae.latents
  steps = steps_of(c.rows, c.batch_rows)
  sparse = candidates(config, platform) > 0
  # AuxK is left out: it has no work while no latent is dead.
  of = perf.step_flops(
    c.batch_rows, config.sae.d_in, F, aux=False,
    active=arithmetic.active(config) if sparse else 0,
  )  # fmt: skip
  disk = c.keep * _state_bytes(config) * config.mesh.dict
  return Cost(steps * of['published'], steps * of['executed'], disk)


def pack(
  specs: Sequence[Spec], machine: Machine, most: int = 0
) -> list[list[Spec]]:
  """The points in jobs, those with little work first.

  Points of a job share every key that members must share (the store, the
  schedule in rows, the batches, the mesh); those of a stack lie together. As
  many as the devices' memory has room for, by arithmetic, and at most `most`,
  if above 0. Raises UserError for points that do not fit by themselves.
  """
  check_fit(specs, machine)
  groups: dict[str, list[Spec]] = {}
  for spec in specs:
    groups.setdefault(_stream(spec.config), []).append(spec)
  packs: list[list[Spec]] = []
  for group in groups.values():
    mine: list[list[Spec]] = []
    for stack in stacks([s.config for s in group]):
      for spec in (group[i] for i in stack):
        room = mine and (not most or len(mine[-1]) < most)
        if room and _fits(
          [s.config for s in mine[-1]] + [spec.config], machine
        ):
          mine[-1].append(spec)
        else:
          mine.append([spec])
    packs += mine
  work = lambda p: sum(cost(s.config, machine.platform).executed for s in p)
  for one in packs:
    validate(job_config(one))
  return sorted(packs, key=work)


def check_fit(specs: Sequence[Spec], machine: Machine) -> None:
  """UserError naming the points that this machine cannot train, and why."""
  wrong = [(s, why) for s in specs if (why := misfit(s.config, machine))]
  if wrong:
    (spec, why), others = wrong[0], len(wrong) - 1
    more = f' (and {others} points more)' if others else ''
    raise UserError(f'point ({in_words(spec.changes)}): {why}{more}')


def misfit(config: Config, machine: Machine) -> str:
  """Why this machine cannot train such a point; '' if it can."""
  c = config.mesh
  needed = c.data * c.dict
  if machine.devices and needed > machine.devices:
    return (
      f'config.mesh of {c.data} x {c.dict} = {needed} devices, there are '
      f'{machine.devices}: change config.mesh or the machine'
    )
  need = job_bytes([config], machine.platform)[0]
  if machine.device_bytes and need > _SHARE * machine.device_bytes:
    return (
      f'needs about {need / GIB:.1f} GiB a device, of '
      f'{machine.device_bytes / GIB:.1f} GiB: lower sae.latents or '
      'train.batch_rows, or raise config.mesh.dict'
    )
  return ''


def _fits(configs: Sequence[Config], machine: Machine) -> bool:
  there = machine.device_bytes, machine.host_bytes
  need = job_bytes(configs, machine.platform)
  return all(not b or a <= _SHARE * b for a, b in zip(need, there, strict=True))


def job_bytes(configs: Sequence[Config], platform: str) -> tuple[float, float]:
  """Memory that a job takes of a device, and of its host beside that.

  On devices lie all states, what one step needs beside them and, of several
  members, one more state: the one that is taken out of its stack to be saved.
  A copy of each is in the host's memory until it is written: members are saved
  at once. On a CPU, which is both, the first is all of it.
  """
  mesh = configs[0].mesh
  states = [_state_bytes(c) for c in configs]
  memory = map(arithmetic.memory, configs)
  beside = max(m.gradients + m.batch + m.activations for m in memory)
  taken = max(states) if len(states) > 1 else 0.0
  device, host = sum(states) + taken + beside, sum(states) * mesh.dict
  if platform != 'cpu':
    return device, host
  return device * mesh.data * mesh.dict + host, 0.0


def _state_bytes(config: Config) -> float:
  m = arithmetic.memory(config)
  return m.parameters + m.optimiser


def _stream(config: Config) -> str:
  """Equal for points that may see the same batches in one job."""
  flat = flatten(config.to_dict())
  shared = {k: v for k, v in flat.items() if k.startswith(SHARED)}
  return str((shared, stream_seed(config)))


def job_config(specs: Sequence[Spec]) -> Config:
  """The config of a training job with these points as its members."""
  job = copy.deepcopy(specs[0].config)
  flats = [flatten(s.config.to_dict()) for s in specs]
  job.members = tuple(
    {'name': s.id} | {k: v for k, v in flat.items() if v != flats[0][k]}
    for s, flat in zip(specs, flats, strict=True)
  )
  for spec, member in zip(specs, member_configs(job), strict=True):
    if trajectory(member.to_dict()) != trajectory(spec.config.to_dict()):
      raise AssertionError(f'{spec.id}: not the same run as a member')
  return job
