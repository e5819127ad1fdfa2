"""A step's memory, work and traffic by arithmetic: no compiler, no device.

What must exist and must move; a compiler may need more, hardly less.
"""

from typing import NamedTuple

from sae_jax.config import Config
from sae_jax.models.candidates import chunk_rows
from sae_jax.parallel import select
from sae_jax.parallel.collectives import Collective
from sae_jax.parallel.mesh import DATA, DICT
from sae_jax.scaling.costs import Kernel
from sae_jax.train.state import ACTIVE, candidates, updates_in_place


class Memory(NamedTuple):
  """Bytes of one device."""

  parameters: int
  optimiser: int  # moments and the running mean of the weights
  gradients: int
  batch: int  # rows of all micro-batches, as they were stored
  activations: int  # of one micro-batch

  @property
  def total(self) -> int:
    return sum(self)


def memory(config: Config, number_bytes: int = 2) -> Memory:
  """Of one device of the mesh that the config names.

  number_bytes: of one number of the batch's rows on the devices.

  Parameters, moments and gradients are float32. Of a micro-batch's
  activations [b, F / dict] there must be pre-activations in float32 and, in
  the products' type, the latents (kept for the backward pass) and the
  gradient that reaches them; of its rows the reconstruction's error. With
  AuxK its latents and its error come on top.
  """
  D, F = config.sae.d_in, config.sae.latents
  data, dict_ = config.mesh.data, config.mesh.dict
  rows = config.train.batch_rows // data
  b, latents = rows // config.train.micro_batches, F // dict_
  vectors = 2 if config.act.name == 'jumprelu' else 1  # b_enc, theta
  parameters = 4 * (2 * latents * D + vectors * latents)
  copies = (2 if config.optim.b1 else 1) + (1 if config.optim.ema else 0)
  split = data if config.mesh.zero1 else 1
  aux, width = has_aux(config), _width(config)
  optimiser = copies * parameters // split
  room = candidates(config, 'accelerator')
  if room:  # sparse codes: z of a chunk, lists of candidates in four arrays
    lists = 4 * 4 * b * (room + aux * config.loss.aux_k)
    in_place = updates_in_place(config)
    return Memory(
      parameters=parameters,
      optimiser=optimiser + (0 if config.optim.b1 else 4 * latents),
      gradients=0 if in_place else parameters,
      batch=number_bytes * rows * D,
      activations=4 * chunk_rows(b, latents) * latents
      + lists
      + (2 + aux) * 4 * b * D,
    )
  return Memory(
    parameters=parameters,
    optimiser=optimiser,
    gradients=parameters,
    batch=number_bytes * rows * D,
    activations=b * latents * (4 + (2 + aux) * width) + (2 + aux) * 4 * b * D,
  )


def _width(config: Config) -> int:
  return 2 if config.train.compute_dtype == 'bfloat16' else 4


def products(config: Config) -> int:
  """Matrix products of a step, each 2 B D F FLOPs: encode, decode, and the
  gradients of W_dec, f and W_enc; three more with AuxK."""
  return 8 if has_aux(config) else 5


def has_aux(config: Config) -> bool:
  """Whether the loss has AuxK; it is counted as in a step with dead latents."""
  return config.act.name != 'jumprelu' and config.loss.aux_coef > 0


def work(config: Config) -> list[tuple[Kernel, int]]:
  """[(kernel, times a step)] of one device, as `costs.kernels` reads them."""
  D, data, dict_ = config.sae.d_in, config.mesh.data, config.mesh.dict
  m = config.train.micro_batches
  b, latents = config.train.batch_rows // data // m, config.sae.latents // dict_
  weights, width = 4 * latents * D, _width(config)
  if room := candidates(config, 'accelerator'):
    return _sparse_work(config, b, latents, min(active(config), room))
  flops, codes, rows = 2 * b * latents * D, b * latents, b * D * width
  read = Kernel(flops, weights + rows + codes * (4 + width))
  # A gradient is read and written again for every micro-batch but the first.
  write = Kernel(flops, weights * (2 if m > 1 else 1) + rows + codes * width)
  extra = products(config) - 5
  split = data if config.mesh.zero1 else 1
  # Parameter and moments read and written, gradient read.
  moments = 2 if config.optim.b1 else 1
  update = Kernel(0, 2 * weights * (3 + 2 * moments) // split)
  return [(read, m * (3 + extra * 2 // 3)), (write, m * (2 + extra // 3)),
          (update, 1)]  # fmt: skip


def _sparse_work(config: Config, b: int, latents: int, k: float):
  """The encoder's product; a row of D for each of k latents of b rows, read
  for decode and df, read and added for both gradients; the update."""
  D, m, width = config.sae.d_in, config.train.micro_batches, _width(config)
  weights, touched = 4 * latents * D, 4 * b * k * D
  encode = Kernel(2 * b * latents * D, weights + b * D * width)
  each = Kernel(2 * b * k * D, int(touched))
  rows = latents
  if updates_in_place(config):
    rows = min(latents, b * k)
  moments = 2 if config.optim.b1 else 1
  gradient = 0 if updates_in_place(config) else 1
  update = Kernel(0, int(2 * 4 * rows * D * (2 + 2 * moments + gradient)))
  return [(encode, m), (each, 6 * m), (update, 1)]


def active(config: Config) -> float:
  """Latents of a row that a device touches in a sparse step."""
  k = config.act.k
  if config.act.name == 'jumprelu':
    k = config.loss.target_l0 or ACTIVE
  aux = config.loss.aux_k if has_aux(config) else 0
  return (k + aux) / config.mesh.dict


def traffic(config: Config) -> list[Collective]:
  """The collectives of a step that grow with B, D or F."""
  D, B = config.sae.d_in, config.train.batch_rows
  data, dict_, m = (
    config.mesh.data,
    config.mesh.dict,
    config.train.micro_batches,
  )
  b, latents = B // data // m, config.sae.latents // dict_
  found = []

  def add(kind, axis, group, elements, times, source):
    if group > 1:
      found.append(
        Collective(kind, axis, group, elements, 4 * elements, times, source)
      )

  aux = has_aux(config)
  R = 2 if aux else 1
  add('all-reduce', DICT, dict_, R * b * D, m, 'reconstruction')
  selections = [config.act.k] if config.act.name == 'topk' else []
  for k in selections + ([config.loss.aux_k] if aux else []):
    k, source = min(k, latents), f'the {k} largest of a row'
    if b * k * dict_ <= select.MOST_CANDIDATES:
      add('all-gather', DICT, dict_, 2 * b * k * dict_, m, source)
    else:
      add('all-reduce', DICT, dict_, 32 * b, m, source)
  if config.mesh.zero1:
    size = 2 * latents * D
    add('reduce-scatter', DATA, data, size, 1, 'gradients')
    add('all-gather', DATA, data, size, 1, 'parameters')
  else:
    add('all-reduce', DATA, data, 2 * latents * D, 1, 'gradients')
  return found
