"""Looks for the mesh and micro-batches that make a step fit and fast."""

from collections.abc import Iterator
from typing import Any

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.scaling import gpu, topology
from sae_jax.scaling.plan import available, check_values, estimate, plan
from sae_jax.scaling.rows import ASSUMED, Rows

# Rows of one micro-batch on one device: fewer leave matrix units idle.
_FEWEST_ROWS = 128


def candidates(config: Config, devices: int) -> Iterator[Config]:
  """Configs with every mesh and number of micro-batches, powers of two."""
  data = 1
  while data <= devices:
    rows = config.train.batch_rows // data
    micro = 1
    while rows // micro >= _FEWEST_ROWS or micro == 1:
      c = config.copy_and_resolve_references()
      c.mesh.data, c.mesh.dict = data, devices // data
      c.train.micro_batches, c.mesh.zero1 = micro, data > 1
      if _divides(c, devices):
        yield c
      micro *= 2
    data *= 2


def _divides(c: Config, devices: int) -> bool:
  data, dict_ = c.mesh.data, c.mesh.dict
  latents = dict_ * (data if c.mesh.zero1 else 1)
  return (
    data * dict_ == devices
    and c.train.batch_rows % (data * c.train.micro_batches) == 0
    and c.sae.latents % latents == 0
  )


def search(
  config: Config, name: str, compile_: int, rows: Rows = ASSUMED
) -> list[dict[str, Any]]:
  """Plans of the best candidates, the recommended one first.

  Candidates are ordered by the arithmetic estimate, those that cannot fit
  left out; up to `compile_` are compiled (none for GPUs), and of those that
  fit the fastest by the roofline comes first.

  Raises UserError when the config cannot work, or no candidate divides it or
  can fit.
  """
  chip, chips = topology.parse(name)
  check_values(config)
  found = [
    (estimate(c, name, rows), c)
    for c in candidates(config, chips * chip.devices)
  ]
  if not found:
    raise UserError(
      f'--search: no mesh of {chips * chip.devices} devices divides '
      f'config.train.batch_rows={config.train.batch_rows} and config.sae.'
      f'latents={config.sae.latents}: use multiples of powers of two'
    )
  fitting = [(e, c) for e, c in found if e['fits']]
  if not fitting:
    least = min(e['memory_gib']['arithmetic'] for e, _ in found)
    raise UserError(
      f'--search: no mesh on {name} fits, the smallest needs {least:.1f} of '
      f'{available(chip):.2f} GiB a device: take more chips (at least '
      f'{found[0][0]["chips_needed"]} of them)'
    )
  fitting.sort(key=lambda pair: pair[0]['seconds']['step'])
  if not chip.tpu and not gpu.installed():
    return [e | {'to_compile': gpu.INSTALL} for e, _ in fitting[:compile_]]
  plans = [plan(c, name, rows) for _, c in _spread(fitting, compile_)]
  return sorted(plans, key=lambda p: (not p['fits'], p['seconds']['step']))


def _spread(ordered: list, count: int) -> list:
  """The first of each mesh in turn, then their seconds, and so on: estimates
  tell meshes apart better than numbers of micro-batches."""
  seen: dict[int, int] = {}
  ranked = []
  for place, (e, c) in enumerate(ordered):
    turn = seen.get(c.mesh.data, 0)
    seen[c.mesh.data] = turn + 1
    ranked.append((turn // 2, place, (e, c)))
  ranked.sort(key=lambda item: item[:2])
  return [pair for _, _, pair in ranked[:count]]
