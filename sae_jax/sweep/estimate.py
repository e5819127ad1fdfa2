"""What a study will take, before anything runs: --dry_run."""

from collections.abc import Sequence
from typing import Any

from sae_jax.scaling.chips import GIB
from sae_jax.sweep import grid, packing
from sae_jax.sweep.grid import Spec
from sae_jax.sweep.machine import Machine

# Of the rate of one large product: the 26 points of configs/scaling.py:demo
# executed 9.5e13 FLOPs in 1,961 s, 0.048 TFLOP/s, beside other work on two
# cores where a product ran at 0.11 to 0.15.
_REACHED = 0.4
_START_SECONDS = 10.0  # of a job: Python, the first compilation


def text(
  packs: Sequence[Sequence[Spec]], machine: Machine, later: int, done: int
) -> str:
  """A line for each point, by job, and the sums.

  later: points whose values are to be found first. done: points that are.
  """
  rate = machine.tflops * 1e12 * _REACHED
  lines, flops, seconds, disk = [], 0.0, 0.0, 0.0
  for i, pack in enumerate(packs):
    costs = [packing.cost(s.config, machine.platform) for s in pack]
    lines.append(f'job {i + 1}: {len(pack)} points')
    for spec, cost in zip(pack, costs, strict=True):
      what = f'{grid.in_words(spec.changes)} ({spec.stage})'
      lines.append(f'  {spec.id}  {cost.flops:9.2e} FLOPs  {what}')
      devices = _devices(spec.config, machine)
      seconds += cost.executed / rate / devices if rate else 0
      flops, disk = flops + cost.flops, disk + cost.disk
    seconds += _START_SECONDS
  points = sum(map(len, packs))
  lines.append(
    f'{points} points to train in {len(packs)} jobs'
    + (f', {done} more are done or have failed' if done else '')
    + (f', {later} more when their trials have ended' if later else '')
  )
  lines.append(
    f'{flops:.3g} FLOPs (12 B D F a step), {disk / GIB:.2f} GiB of checkpoints'
  )
  if rate:
    lines.append(
      f'about {_time(seconds)} one job after the other, at '
      f'{machine.tflops:.3g} TFLOP/s of a product here (a rough estimate: '
      'without evaluations and compilation)'
    )
  return '\n'.join(lines)


def _devices(config: Any, machine: Machine) -> int:
  if machine.platform == 'cpu':
    return 1  # virtual ones share the cores
  return config.mesh.member * config.mesh.data * config.mesh.dict


def _time(seconds: float) -> str:
  if seconds < 120:
    return f'{seconds:.0f} s'
  return (
    f'{seconds / 60:.0f} min' if seconds < 7200 else (f'{seconds / 3600:.1f} h')
  )
