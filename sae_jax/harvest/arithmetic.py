"""Float32 or bfloat16: what a harvest's model is faster in, here.

CPUs without AMX or AVX-512 BF16 emulate bfloat16: 0.6 of float32's speed on
AVX2 alone, 3 times it with AMX.
"""

import time
from collections.abc import Callable

import jax
import numpy as np
from absl import logging

from sae_jax.config import Config


def faster(speed: dict[str, float]) -> str:
  """'float32', unless bfloat16, which rounds, is faster by a tenth."""
  dtype = max(speed, key=lambda d: speed[d] / (1.1 if d == 'bfloat16' else 1))
  said = ', '.join(f'{d} {n:,.0f} tokens/s' for d, n in speed.items())
  logging.info('harvest.compute_dtype: %s is faster here (%s)', dtype, said)
  return dtype


def speeds(
  config: Config, make: Callable[[Config], Callable]
) -> dict[str, float]:
  """{compute_dtype: tokens a second} of one batch each, once it is compiled.

  make: config -> the forward pass, as harvest.job.make_forward.
  """
  h, found = config.harvest, {}
  tokens = np.zeros((h.batch_sequences, h.sequence_length), np.int32)
  for dtype in ('float32', 'bfloat16'):
    one = config.copy_and_resolve_references()
    one.harvest.compute_dtype = dtype
    run = make(one)
    jax.block_until_ready(run(tokens))
    began = time.perf_counter()
    jax.block_until_ready(run(tokens))
    found[dtype] = tokens.size / (time.perf_counter() - began)
  return found
