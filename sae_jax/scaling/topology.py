"""Accelerators that are not here: a TPU topology's devices, from libtpu.

libtpu compiles for any TPU on any machine (the extra `plan`); nothing runs.
"""

import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from sae_jax.errors import UserError
from sae_jax.scaling.chips import CHIPS, Chip

# What libtpu asks the machine for when it is loaded; none of it is there.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',  # no metadata server
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_WORKER_ID': '0',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # else two plans at once abort
}


def set_environment() -> None:
  """Keeps libtpu and JAX from looking for a TPU or GPU, before JAX is used."""
  # JAX has read the variable by now; programs started from here will.
  platforms = os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  if not jax.config.jax_platforms:  # type: ignore
    jax.config.update('jax_platforms', platforms)
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)


def parse(topology: str) -> tuple[Chip, int]:
  """(chip, chips) of a name such as 'v5p:2x2x4', 'v5e:4x4' or 'h100:8'.

  Raises UserError that lists the families for a name that is none.
  """
  found = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', topology)
  chip = CHIPS.get(found[1]) if found else None
  sizes = [int(n) for n in found[2].split('x')] if found else []
  if chip is None or len(sizes) != chip.dimensions or 0 in sizes:
    raise UserError(
      f'--topology={topology} is not known: use one of '
      + ', '.join(f'{name}:{c.example}' for name, c in CHIPS.items())
      + ' (chips along each side of the torus, or GPUs)'
    )
  chips = math.prod(sizes)
  if chips > chip.largest:
    raise UserError(
      f'--topology={topology} has {chips} chips: one slice of {found[1]} has '  # type: ignore[index]
      f'at most {chip.largest}'
    )
  return chip, chips


def tpu_devices(topology: str) -> list[Any]:
  """The devices of a TPU topology, to compile for.

  Raises UserError when libtpu is not installed or does not know the name.
  """
  chip, chips = parse(topology)
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      f'--topology={topology}: compiling for a TPU needs libtpu: '
      "pip install 'sae_jax[plan]'"
    )
  set_environment()
  options: dict[str, Any] = dict(chip.options)
  if chips == 1:
    options['chips_per_host_bounds'] = [1] * 3
  try:
    devices = topologies.get_topology_desc(
      topology, platform='tpu', **options
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f'--topology={topology} is refused by libtpu ('
      f'{str(error).splitlines()[0]}): use sides such as {chip.example}'
    ) from error
  return list(devices)
