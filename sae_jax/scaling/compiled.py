"""Compiles the real train step for devices that are not here, and measures.

Nothing runs and no array is made: shapes go in, the compiler's numbers out.
"""

import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.models.sae import Norm
from sae_jax.parallel.collectives import Collective, collectives
from sae_jax.parallel.mesh import DATA
from sae_jax.scaling.costs import Kernel, kernels
from sae_jax.scaling.gpu import INSTALL
from sae_jax.train.state import candidates, init_state
from sae_jax.train.step import make_step


class Compiled(NamedTuple):
  """What the compiler says of one step on one device; sizes in bytes."""

  arguments: int  # state and batch
  temporaries: int  # reserved for everything that lives within a step
  peak: int  # most that is alive at once, arguments included
  reserved: int  # arguments, temporaries, results that reuse no argument
  cost_flops: float | None  # cost_analysis: bodies of loops counted once
  cost_bytes: float | None  # None for GPUs that are not here
  kernels: list[tuple[Kernel, int]]
  collectives: list[Collective]
  seconds: float  # of compilation
  text: str


class DoesNotFit(NamedTuple):
  """The compiler ran out of memory; GiB, None where it does not say."""

  needed: float | None
  available: float | None
  message: str


def abstract_arguments(
  config: Config, mesh: Mesh, dtype: jax.typing.DTypeLike
) -> tuple[Any, Any]:
  """(state, x [B@data, D] of `dtype`): shapes with shardings on `mesh`."""
  D = config.sae.d_in

  def concrete(a):
    spec = a.sharding.spec if a.sharding else P()
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    norm = lambda: Norm(jnp.zeros(D), jnp.ones(()))
    state = jax.eval_shape(lambda: init_state(config, norm()))
  x = jax.ShapeDtypeStruct(
    (config.train.batch_rows, D),
    dtype,
    sharding=NamedSharding(mesh, P(DATA, None)),
  )
  return jax.tree.map(concrete, state), x


def compile_step(
  config: Config, mesh: Mesh, dtype: jax.typing.DTypeLike
) -> Compiled | DoesNotFit:
  """Compiles make_step(config) for the mesh's devices, here or not; the rows
  of its batch are of `dtype`.

  Raises UserError where CUDA's assembler is missing, and for sparse codes.
  """
  arguments = abstract_arguments(config, mesh, dtype)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    if candidates(config):
      raise UserError(
        f'config.train.codes={config.train.codes} is sparse here: how often '
        'its loops run depends on the rows, so its work cannot be counted: '
        'plan with config.train.codes=dense'
      )
    step = make_step(config)  # it asks the mesh what it is for
  gpu = mesh.devices.flat[0].platform == 'gpu'
  # JAX looks for a GPU to learn whose 'gpu' is; tuning would run kernels on it.
  platforms = ('cuda',) if gpu else None
  options: dict[str, Any] = {'xla_gpu_autotune_level': 0} if gpu else {}
  start = time.perf_counter()
  # Its cache cannot read back what was compiled for devices that are absent.
  cached = jax.config.jax_enable_compilation_cache  # type: ignore
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      traced = step.trace(*arguments)  # type: ignore
      compiled = traced.lower(lowering_platforms=platforms).compile(options)
  except jax.errors.JaxRuntimeError as error:
    if 'ptxas' in str(error):
      raise UserError(
        f'compiling for a GPU needs ptxas, which is not here: {INSTALL}'
      ) from error
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return _too_large(str(error))
  finally:
    jax.config.update('jax_enable_compilation_cache', cached)
  seconds = time.perf_counter() - start
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  text = str(compiled.as_text())
  extra = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Compiled(
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    peak=memory.peak_memory_in_bytes,
    reserved=memory.argument_size_in_bytes + memory.temp_size_in_bytes + extra,
    cost_flops=cost.get('flops'),
    cost_bytes=cost.get('bytes accessed'),
    kernels=kernels(text),
    collectives=collectives(text, mesh),
    seconds=seconds,
    text=text,
  )


def _too_large(message: str) -> DoesNotFit:
  """Reads '... (39.38G) exceeds available HBM (15.75G)' and the like."""
  sizes = {'K': 2**-20, 'M': 2**-10, 'G': 1.0, 'T': 2.0**10}
  found = re.findall(r'(\d+(?:\.\d+)?)([KMGT])(?:i?B)?\b', message)
  gib = [float(n) * sizes[unit] for n, unit in found]
  line = ' '.join(message.split())[:300]
  if len(gib) < 2:
    return DoesNotFit(None, None, line)
  return DoesNotFit(gib[0], gib[1], line)
