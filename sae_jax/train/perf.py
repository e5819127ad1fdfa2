"""How fast a step is against what the hardware can do."""

import time

import jax
import jax.numpy as jnp

# Dense bf16 peak, TFLOP/s a chip, from the vendors' data sheets; the keys
# are parts of jax.Device.device_kind in lower case, most specific first.
_PEAK_TFLOPS = {
  'v6 lite': 918, 'v5 lite': 197, 'v5p': 459, 'v5': 459, 'v4': 275, 'v3': 123,
  'h200': 989, 'h100': 989, 'a100': 312,
}  # fmt: skip


def peak_tflops() -> float:
  """Peak TFLOP/s of one device: from a table, or measured on a CPU.

  The CPU's figure is its best float32 matrix product [1024]^3 of several.
  All virtual CPU devices share the cores: there it is the machine's figure.
  """
  kind = jax.devices()[0].device_kind.lower()
  for name, peak in _PEAK_TFLOPS.items():
    if name in kind:
      return peak
  n, best = 1024, float('inf')
  x = jnp.ones((n, n), jnp.float32)
  product = jax.jit(lambda a, b: a @ b)
  product(x, x).block_until_ready()
  for _ in range(8):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * n**3 / best / 1e12


def step_flops(rows: int, d_in: int, latents: int, *, aux: bool) -> dict:
  """FLOPs of a step by two conventions.

  'published': 12 B D F, as Gemma Scope's 50.8% was counted (forward 4,
  backward 8). 'executed': the products our step does: encode, decode, dW_dec,
  df and dW_enc (the input gets no gradient), and three more with AuxK.
  """
  unit = 2 * rows * d_in * latents
  return {'published': 6 * unit, 'executed': (8 if aux else 5) * unit}
