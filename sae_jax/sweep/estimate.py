"""What a study will take, before anything runs: --dry_run."""

from collections.abc import Sequence

from sae_jax.config import Config
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
  packs: Sequence[Sequence[Spec]],
  machine: Machine,
  waiting: Sequence[Sequence[Config]],
  done: int,
) -> str:
  """A line for each point, by job, and the sums.

  waiting: of each point whose values are to be found first, what is trained for
  it at most, beside the trials in `packs`. done: points that are.
  """
  lines = []
  for i, pack in enumerate(packs):
    lines.append(f'job {i + 1}: {len(pack)} points')
    for spec in pack:
      flops = packing.cost(spec.config, machine.platform).flops
      what = f'{grid.in_words(spec.changes)} ({spec.stage})'
      lines.append(f'  {spec.id}  {flops:9.2e} FLOPs  {what}')
  points, most = sum(map(len, packs)), ''
  lines.append(
    f'{points} points to train in {len(packs)} jobs'
    + (f', {done} more are done or have failed' if done else '')
  )
  if waiting:
    most = 'at most '
    more = sum(map(len, waiting)) - len(waiting)
    lines.append(
      f'{len(waiting)} points more when their trials have ended, and for them '
      f'at most {more} trials more'
    )
  configs = [spec.config for pack in packs for spec in pack]
  configs += [config for one in waiting for config in one]
  costs = [packing.cost(c, machine.platform) for c in configs]
  flops, disk = sum(c.flops for c in costs), sum(c.disk for c in costs)
  lines.append(
    f'{most}{flops:.3g} FLOPs (12 B D F a step), '
    f'{most}{disk / GIB:.2f} GiB of checkpoints'
  )
  if not machine.tflops:
    lines.append('no estimate of the time: it is not known where jobs run')
    return '\n'.join(lines)
  seconds = _START_SECONDS * len(packs)
  for config, cost in zip(configs, costs, strict=True):
    rate = machine.tflops * 1e12 * _REACHED * _devices(config, machine)
    seconds += cost.executed / rate
  lines.append(
    f'{most}about {_time(seconds)} one job after the other, at '
    f'{machine.tflops:.3g} TFLOP/s of a product here (a rough estimate: '
    'without evaluations and compilation)'
  )
  return '\n'.join(lines)


def _devices(config: Config, machine: Machine) -> int:
  if machine.platform == 'cpu':
    return 1  # virtual ones share the cores
  return config.mesh.data * config.mesh.dict


def _time(seconds: float) -> str:
  if seconds < 120:
    return f'{seconds:.0f} s'
  return (
    f'{seconds / 60:.0f} min' if seconds < 7200 else (f'{seconds / 3600:.1f} h')
  )
