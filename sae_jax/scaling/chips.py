"""What accelerators can do, from their vendors' pages.

TPU: docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x}, tables of key
specifications; v3's links are jax-ml.github.io/scaling-book's 100 GB/s one
way, v4's the 2400 Gbit/s one way of the older page.
GPU: nvidia.com/en-us/data-center/{a100,h100,h200}, SXM, dense bf16, NVLink.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
  """One chip; JAX sees `devices` of them in it, each with its part."""

  kind: str  # part of jax.Device.device_kind in lower case
  tflops: float  # dense bf16, peak
  hbm_gib: float
  hbm_gb_s: float
  ici_gb_s: float  # both directions, all links
  dimensions: int  # of the torus that links connect; 1: any to any
  largest: int  # chips that links connect
  example: str  # sides of a topology
  devices: int = 1
  options: tuple[tuple[str, str], ...] = ()  # to get_topology_desc
  float32: float = 0.0  # TFLOP/s of GPUs' float32, none on tensor cores

  @property
  def tpu(self) -> bool:
    return not self.float32

  def peak(self, dtype: str) -> float:
    """FLOP/s of one device; a TPU makes a full float32 product of six."""
    float32 = self.float32 or self.tflops / 6
    tflops = float32 if dtype == 'float32' else self.tflops
    return tflops * 1e12 / self.devices


# HBM is the vendor's figure; the compiler keeps up to 0.3 GiB for itself.
CHIPS = {
  'v3': Chip('v3', 123, 32, 900, 800, 2, 1024, '2x2', devices=2),
  'v4': Chip(
    'v4', 275, 32, 1200, 600, 3, 4096, '2x2x4',
    options=(('chip_config_name', 'megacore'),),
  ),
  'v5e': Chip('v5 lite', 197, 16, 819, 400, 2, 256, '4x4'),
  'v5p': Chip('v5', 459, 95, 2765, 1200, 3, 8960, '2x2x4'),
  'v6e': Chip('v6 lite', 918, 32, 1638, 800, 2, 256, '4x4'),
  'tpu7x': Chip('tpu7x', 2307, 192, 7380, 1200, 3, 9216, '2x2x4', devices=2),
  'a100': Chip('a100', 312, 80, 2039, 600, 1, 8, '8', float32=19.5),
  'h100': Chip('h100', 989, 80, 3350, 900, 1, 8, '8', float32=67),
  'h200': Chip('h200', 989, 141, 4800, 900, 1, 8, '8', float32=67),
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
  """The chip of a jax.Device.device_kind, None for one that is not here."""
  kind = device_kind.lower()
  found = [c for c in CHIPS.values() if c.kind in kind]
  return max(found, key=lambda c: len(c.kind), default=None)
