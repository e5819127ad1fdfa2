"""How fast a step is against what the hardware can do."""

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.config import Config
from sae_jax.scaling.chips import chip_of


def peak_tflops() -> float:
  """Peak TFLOP/s of one device: from a table, or measured on a CPU.

  The CPU's figure is its best float32 matrix product [1024]^3 of several.
  All virtual CPU devices share the cores: there it is the machine's figure.
  """
  if chip := chip_of(jax.devices()[0].device_kind):
    return chip.tflops / chip.devices
  n, best = 1024, float('inf')
  x = jnp.ones((n, n), jnp.float32)
  product = jax.jit(lambda a, b: a @ b)
  product(x, x).block_until_ready()
  for _ in range(8):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * n**3 / best / 1e12


def step_flops(
  rows: int, d_in: int, latents: int, *, aux: bool, active: float = 0
) -> dict:
  """FLOPs of a step by two conventions.

  'published': 12 B D F, as Gemma Scope's 50.8% was counted (forward 4,
  backward 8). 'executed': the products our step does: encode, decode, dW_dec,
  df and dW_enc (the input gets no gradient), and three more with AuxK; with
  `active` above 0 latents a row, the sparse rule's, encode is the only whole
  one.
  """
  unit = 2 * rows * d_in * latents
  done = (8 if aux else 5) * unit
  if active:
    done = unit + 4 * 2 * rows * d_in * active
  return {'published': 6 * unit, 'executed': done}


def logged_flops(config: Config, values: Mapping[str, Any]) -> dict:
  """FLOPs of a step with these metrics: AuxK has no work while none is dead, a
  sparse step touches the active latents only."""
  c = config
  aux = c.act.name != 'jumprelu' and c.loss.aux_coef > 0
  aux = aux and (values['train/dead'] or 0) > 0
  # None: not finite.
  active = 0 if values['train/dense'] else values['train/l0'] or 0
  active += aux * c.loss.aux_k if active else 0
  return step_flops(
    c.train.batch_rows, c.sae.d_in, c.sae.latents, aux=aux, active=active
  )
