"""NVIDIA GPUs that are not here: devices to compile for, from XLA's plugin.

The plugin compiles for a GPU that a text describes (the extra `plan-gpu`);
neither a GPU nor a driver has to be there.
"""

import importlib.util
from typing import Any, NamedTuple

from jax.experimental import topologies

from sae_jax.errors import UserError
from sae_jax.scaling.chips import GIB, Chip

INSTALL = "pip install 'sae_jax[plan-gpu]'"
KIB = 1024


class Architecture(NamedTuple):
  """One kind of die as it is sold; per multiprocessor unless it says so."""

  capability: str  # fields of a message: compute capability
  multiprocessors: int  # of a GPU
  float32: int  # fused multiply-adds a cycle
  l2_mib: int  # of a GPU
  shared_kib: int  # what a block may ask for at most is 1 KiB less


# Multiprocessors, their units and caches: NVIDIA's white papers on the A100 and
# the H100 (SXM; an H200 is an H100 with other memory). Shared memory: table of
# compute capabilities, CUDA C++ Programming Guide.
_AMPERE = Architecture('major: 8', 108, 64, 40, 164)
# sm_90a: its own matrix instructions are of no other architecture.
_HOPPER = Architecture(
  'major: 9 feature_extension: ACCELERATED_FEATURES', 132, 128, 50, 228
)
_OF = {'a100': _AMPERE, 'h100': _HOPPER, 'h200': _HOPPER}  # by Chip.kind
# Of both, from the same table.
_LIMITS = {
  'threads_per_warp': 32,
  'threads_per_block_limit': 1024,
  'threads_per_core_limit': 2048,
  'thread_dim_limit_x': 1024,
  'thread_dim_limit_y': 1024,
  'thread_dim_limit_z': 64,
  'block_dim_limit_x': 2**31 - 1,
  'block_dim_limit_y': 2**16 - 1,
  'block_dim_limit_z': 2**16 - 1,
  'registers_per_core_limit': 2**16,
  'registers_per_block_limit': 2**16,
  'shared_memory_per_block': 48 * KIB,  # more has to be asked for
}


def installed() -> bool:
  """Whether XLA's plugin for CUDA is."""
  plugins = ('jax_cuda12_plugin', 'jax_cuda13_plugin')
  return any(importlib.util.find_spec(name) for name in plugins)


def target(chip: Chip) -> str:
  """The GPU as a text of XLA's GpuTargetConfigProto, what it needs of it."""
  a = _OF[chip.kind]
  # The clock at which its units make the float32 FLOP/s that it is sold with.
  clock = chip.float32 * 1e3 / (2 * a.float32 * a.multiprocessors)
  fields = _LIMITS | {
    'core_count': a.multiprocessors,
    'fpus_per_core': a.float32,
    'clock_rate_ghz': round(clock, 3),
    'l2_cache_size': a.l2_mib * KIB**2,
    'memory_bandwidth': int(chip.hbm_gb_s * 1e9),
    'device_memory_size': int(chip.hbm_gib * GIB),
    'shared_memory_per_core': a.shared_kib * KIB,
    'shared_memory_per_block_optin': (a.shared_kib - 1) * KIB,
  }
  return '\n'.join(
    [
      'platform_name: "CUDA"',
      'gpu_device_info {',
      f'  name: "NVIDIA {chip.kind.upper()}"',
      f'  cuda_compute_capability {{ {a.capability} }}',
      *(f'  {name}: {value}' for name, value in fields.items()),
      '}',
    ]
  )


def gpu_devices(chip: Chip, count: int) -> list[Any]:
  """`count` GPUs of one host, to compile for.

  Raises UserError when JAX could not load the plugin.
  """
  try:
    found = topologies.get_topology_desc(
      chip.kind,
      platform='cuda',
      target_config=target(chip),
      topology=f'1x1x{count}',  # slices, hosts of each, GPUs of each
    )
  except NotImplementedError as error:
    raise UserError(
      'JAX has not loaded its plugin for CUDA, which to compile for a GPU '
      'needs: set JAX_PLATFORMS=cpu, with which it does not ask for a driver'
    ) from error
  return list(found.devices)
