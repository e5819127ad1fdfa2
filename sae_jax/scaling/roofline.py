"""An estimate of a step's time from its work and its chip's figures.

Every kernel takes the longer of its arithmetic and its HBM traffic; kernels
follow one another; collectives follow too, since a reconstruction is needed
before the backward pass and gradients before the update. docs/plan.md.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from sae_jax.parallel.collectives import Collective
from sae_jax.scaling.chips import Chip
from sae_jax.scaling.costs import Kernel


class Roofline(NamedTuple):
  """Seconds of one step."""

  compute: float  # all FLOPs at the peak
  hbm: float  # all bytes at full bandwidth
  kernels: float  # sum over kernels of the longer of their two
  links: float  # collectives, none of it hidden
  step: float  # kernels + links
  at_best: float  # the longest of compute, hbm and links: all overlaps

  @property
  def bound(self) -> str:
    """What a step waits for most."""
    if self.links > self.kernels:
      return 'links'
    return 'compute' if self.compute > self.hbm else 'HBM'


def roofline(
  kernels: Sequence[tuple[Kernel, int]],
  collectives: Sequence[Collective],
  chip: Chip,
  chips: int,
  compute_dtype: str,
) -> Roofline:
  """Of one device's kernels and collectives on `chips` chips."""
  peak = chip.peak(compute_dtype)
  bandwidth = chip.hbm_gb_s * 1e9 / chip.devices
  compute = sum(k.flops * n for k, n in kernels) / peak
  hbm = sum(k.bytes * n for k, n in kernels) / bandwidth
  longer = sum(n * max(k.flops / peak, k.bytes / bandwidth) for k, n in kernels)
  links = sum(seconds(c, chip, chips) for c in collectives)
  return Roofline(
    compute, hbm, longer, links, longer + links, max(compute, hbm, links)
  )


def sent(c: Collective) -> float:
  """Bytes that one device sends for all runs of a collective, by rings."""
  share = (c.group - 1) / c.group
  if c.kind == 'collective-permute':
    share = 1.0
  elif c.kind == 'all-reduce':
    share *= 2
  return share * c.bytes * (c.times or 0)


def seconds(c: Collective, chip: Chip, chips: int) -> float:
  """Time of all runs of a collective.

  A mesh axis of n of N chips is taken to lie along log(n) / log(N) of the
  torus' dimensions and to use their links one way each; latency is not
  counted.
  """
  one_way = chip.ici_gb_s * 1e9 / 2 / chip.devices
  devices = chips * chip.devices
  share = 1.0 if not chip.tpu else math.log(c.group) / math.log(max(devices, 2))
  return sent(c) / (one_way * min(max(share, 1 / chip.dimensions), 1.0))
