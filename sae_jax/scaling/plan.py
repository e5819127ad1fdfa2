"""What a training step takes on hardware that is not here, as one dict."""

import importlib.metadata
from typing import Any

import jax

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.parallel.collectives import Collective
from sae_jax.parallel.mesh import make_mesh
from sae_jax.scaling import arithmetic, gpu, topology
from sae_jax.scaling.chips import CHIPS, GIB, Chip
from sae_jax.scaling.compiled import Compiled, DoesNotFit, compile_step
from sae_jax.scaling.roofline import roofline, seconds, sent
from sae_jax.scaling.rows import ASSUMED, Rows
from sae_jax.train.config import validate

# Of its HBM a TPU's compiler keeps a part for itself: 15.75 of v5e's 16 GiB.
_KEPT_GIB = 0.25
ARITHMETIC = 'arithmetic, not compiled'
COMPILED = 'compiled ahead of time'


def plan(config: Config, name: str, rows: Rows = ASSUMED) -> dict[str, Any]:
  """The plan of config's step on topology `name`, such as 'v5p:2x2x4'.

  Numbers are of one device (a chip, but half of one of tpu7x) unless their
  key says otherwise. Raises UserError for a topology or mesh that cannot be.
  """
  chip, chips = topology.parse(name)
  check_mesh(config, name, chip, chips)
  validate(config)
  if chip.tpu:
    devices = topology.tpu_devices(name)
  elif gpu.installed():
    devices = gpu.gpu_devices(chip, chips)
  else:
    return _summary(config, name, chip, chips, rows, None) | {
      'to_compile': gpu.INSTALL
    }
  mesh = make_mesh(config.mesh.data, config.mesh.dict, devices)
  compiled = compile_step(config, mesh, rows.dtype)
  return _summary(config, name, chip, chips, rows, compiled)


def estimate(config: Config, name: str, rows: Rows = ASSUMED) -> dict[str, Any]:
  """The same plan by arithmetic alone, for any topology."""
  chip, chips = topology.parse(name)
  check_mesh(config, name, chip, chips)
  validate(config)
  return _summary(config, name, chip, chips, rows, None)


def check_mesh(config: Config, name: str, chip: Chip, chips: int) -> None:
  """UserError unless the mesh has one place for every device."""
  _one_run(config)
  data, dict_ = config.mesh.data, config.mesh.dict
  devices = chips * chip.devices
  if data * dict_ != devices:
    raise UserError(
      f'config.mesh: data={data} x dict={dict_} = {data * dict_} devices, but '
      f'--topology={name} has {devices}: set config.mesh, or try --search'
    )


def check_values(config: Config) -> None:
  """UserError for values that no mesh can work with."""
  _one_run(config)
  c = config.copy_and_resolve_references()
  c.mesh.data = c.mesh.dict = c.train.micro_batches = 1
  validate(c)


def _one_run(config: Config) -> None:
  if config.members:
    raise UserError('config.members: a plan is of one run: leave them out')


def available(chip: Chip) -> float:
  """GiB of HBM that a program may use on one device."""
  return chip.hbm_gib / chip.devices - _KEPT_GIB


def _summary(
  config: Config,
  name: str,
  chip: Chip,
  chips: int,
  rows: Rows,
  compiled: Compiled | DoesNotFit | None,
) -> dict[str, Any]:
  c, memory = config, arithmetic.memory(config, rows.dtype.itemsize)
  devices = c.mesh.data * c.mesh.dict
  BDF = c.train.batch_rows * c.sae.d_in * c.sae.latents
  out: dict[str, Any] = {
    'topology': name,
    'chips': chips,
    'devices': devices,
    'method': ARITHMETIC if compiled is None else COMPILED,
    'latents': c.sae.latents,
    'd_in': c.sae.d_in,
    'batch_rows': c.train.batch_rows,
    'rows': {
      'stored': rows.stored,
      'on_devices': rows.dtype.name,
      'source': rows.source,
    },
    'activation': c.act.name,
    'compute_dtype': c.train.compute_dtype,
    'data': c.mesh.data,
    'dict': c.mesh.dict,
    'micro_batches': c.train.micro_batches,
    'zero1': c.mesh.zero1,
    'versions': _versions(),
    'memory_gib': {k: v / GIB for k, v in memory._asdict().items()},
  }
  out['memory_gib'] |= {
    'arithmetic': memory.total / GIB,
    'hbm': chip.hbm_gib / chip.devices,
    'available': available(chip),
  }
  kernels, moved = arithmetic.work(c), arithmetic.traffic(c)
  if isinstance(compiled, Compiled):
    kernels, moved = compiled.kernels, compiled.collectives
    out['memory_gib'] |= {
      'arguments': compiled.arguments / GIB,
      'temporaries': compiled.temporaries / GIB,
      'peak': compiled.peak / GIB,
      'reserved': compiled.reserved / GIB,
    }
    out['peak_over_arithmetic'] = compiled.peak / memory.total
    out['compile_seconds'] = compiled.seconds
    out['cost_analysis'] = {
      'flops': compiled.cost_flops,
      'bytes_accessed': compiled.cost_bytes,
    }
    needed = compiled.reserved / GIB
  elif isinstance(compiled, DoesNotFit):
    out['refused'] = compiled.message
    out['method'] += ' and refused: work and traffic are arithmetic'
    needed = max(memory.total / GIB, available(chip) + 1e-3)
    out['memory_gib']['compiler_needs'] = compiled.needed
  else:
    needed = memory.total / GIB
  out['fits'] = needed <= available(chip)
  flops = sum(k.flops * n for k, n in kernels)
  published = 12 * BDF / devices
  executed = 2 * arithmetic.products(c) * BDF / devices
  out['flops'] = {
    'executed': flops,
    'products': executed,  # matrix products by arithmetic
    'published': published,  # 12 B D F, Gemma Scope's convention
  }
  out['hbm_bytes'] = sum(k.bytes * n for k, n in kernels)
  out['collectives'] = [_row(x, chip, chips) for x in merged(moved)]
  line = roofline(kernels, moved, chip, chips, c.train.compute_dtype)
  rate = c.train.batch_rows / line.step
  out['seconds'] = line._asdict() | {'bound': line.bound}
  out['rows_per_second'] = rate
  out['utilisation'] = {
    'published': published / line.step / chip.peak('bfloat16'),
    'executed': flops / line.step / chip.peak('bfloat16'),
  }
  out['input_bytes_per_second'] = {
    'store': rate * rows.on_disk(c.sae.d_in),
    # Every device along `dict` gets the same rows.
    'to_all_devices': rate * c.sae.d_in * rows.dtype.itemsize * c.mesh.dict,
  }
  out['chips_needed'] = chips_needed(c, chip, rows)
  return out


def merged(collectives: list[Collective]) -> list[Collective]:
  """One for each axis, kind and group, the largest sum first; `times` is the
  number of runs, elements and bytes are sums over them."""
  total: dict[Any, Collective] = {}
  for c in collectives:
    if c.times is None:
      raise ValueError(f'{c.source} is in a loop of unknown length')
    key = (c.axis, c.kind, c.group)
    old = total.get(key, c._replace(elements=0, bytes=0, times=0))
    total[key] = old._replace(
      elements=old.elements + c.times * c.elements,
      bytes=old.bytes + c.times * c.bytes,
      times=(old.times or 0) + c.times,
    )
  return sorted(total.values(), key=lambda c: -c.bytes)


def _row(c: Collective, chip: Chip, chips: int) -> dict[str, Any]:
  once = c._replace(times=1)  # sums over its runs already
  return {
    'axis': c.axis,
    'kind': c.kind,
    'devices': c.group,
    'runs': c.times,
    'elements': c.elements,
    'bytes': c.bytes,
    'sent_bytes': sent(once),
    'seconds': seconds(once, chip, chips),
  }


def chips_needed(
  config: Config, chip: Chip, rows: Rows = ASSUMED
) -> int | None:
  """Fewest chips, a power of two, whose memory holds the step by arithmetic:
  the dictionary over all of them, micro-batches as small as 128 rows."""
  chips = 1
  while chips <= chip.largest and config.sae.latents >= chips * chip.devices:
    c = config.copy_and_resolve_references()
    c.mesh.data, c.mesh.dict = 1, chips * chip.devices
    c.train.micro_batches = max(1, c.train.batch_rows // 128)
    memory = arithmetic.memory(c, rows.dtype.itemsize)
    if memory.total / GIB <= available(chip):
      return chips
    chips *= 2
  return None


def _versions() -> dict[str, str | None]:
  found: dict[str, str | None] = {'jax': jax.__version__}
  for name in ('jaxlib', 'libtpu', 'jax-cuda12-pjrt'):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found


def families(
  config: Config | None, rows: Rows = ASSUMED
) -> list[dict[str, Any]]:
  """The table of chips, with those that config's step needs at least."""
  if config:
    check_values(config)
  return [
    chip._asdict()
    | {
      'family': name,
      'chips_needed': chips_needed(config, chip, rows) if config else None,
    }
    for name, chip in CHIPS.items()
  ]
