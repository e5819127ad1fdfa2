"""The training config: every key with its unit, and the checks of values.

Recipes in configs/ start from `base_config()` and set what differs.
Counters are in rows (tokens); steps are derived.
"""

import difflib
import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.parallel.mesh import DATA, DICT, check_divides
from sae_jax.parallel.select import MOST_SELECTED
from sae_jax.train.step import SATURATED

ACTIVATIONS = ('jumprelu', 'topk', 'batchtopk')
BAD_BLOCKS = ('stop', 'skip')
COMPUTE_DTYPES = ('float32', 'bfloat16')
CODES = ('auto', 'sparse', 'dense')
_POSITIVE = (
  'store.window', 'sae.d_in', 'sae.latents', 'act.k', 'act.bandwidth',
  'loss.dead_rows', 'optim.lr', 'optim.eps', 'train.rows', 'train.batch_rows',
  'train.micro_batches', 'train.log_rows', 'train.save_rows', 'train.keep',
  'train.eval_size', 'mesh.data', 'mesh.dict', 'train.max_skipped',
  'distributed.heartbeat_seconds', 'distributed.start_seconds',
)  # fmt: skip
_NOT_NEGATIVE = (
  'loss.l0_coef', 'loss.target_l0', 'loss.l0_warmup_rows', 'loss.aux_coef',
  'loss.aux_k', 'optim.lr_width', 'optim.clip_norm', 'optim.warmup_rows',
  'optim.decay_rows', 'train.eval_rows', 'train.keep_rows', 'act.theta',
  'train.budget',
)  # fmt: skip


def base_config() -> Config:
  """All keys a training run reads. Norms and coefficients are in normalised
  units: centred rows divided so that their mean squared norm is 1."""
  c = ConfigDict()
  c.seed = 0  # initial weights and order of the batches

  c.store = ConfigDict()
  c.store.path = ''  # folder that launch/harvest.py wrote
  c.store.site = 'layer_9.resid_post'
  c.store.window = 8  # shards whose blocks are permuted together

  c.sae = ConfigDict()
  c.sae.d_in = 576  # D, the site's width
  c.sae.latents = 4096  # F
  c.sae.center = True  # subtract the store's mean vector
  c.sae.pre_bias = True  # encode n - b_dec

  c.act = ConfigDict()
  c.act.name = 'jumprelu'  # or 'topk', 'batchtopk'
  c.act.theta = 0.001  # jumprelu: initial threshold
  c.act.bandwidth = 0.001  # jumprelu: width of the straight-through kernel
  c.act.log_theta = False  # jumprelu: learn log(theta)
  c.act.k = 32  # topk: active latents; batchtopk: their mean over a batch
  c.act.theta_ema = 0.999  # batchtopk: decay, a step, of the mean threshold

  c.loss = ConfigDict()
  c.loss.l0_coef = 1e-3  # jumprelu: lambda of the L0 penalty
  c.loss.target_l0 = 0.0  # jumprelu: above 0, the quadratic penalty around it
  c.loss.l0_warmup_rows = 0  # lambda rises linearly from 0 over these
  c.loss.aux_coef = 1 / 32  # (batch)topk: alpha of AuxK, 0 for none
  c.loss.aux_k = 256  # (batch)topk: dead latents that AuxK selects
  c.loss.dead_rows = 10_000_000  # silent for so long means dead

  c.optim = ConfigDict()
  c.optim.lr = 7e-5  # peak
  c.optim.lr_width = 0  # above 0, lr * sqrt(lr_width / latents)
  c.optim.b1 = 0.0  # Adam; 0 stores no first moment
  c.optim.b2 = 0.999
  c.optim.eps = 1e-8
  c.optim.clip_norm = 0.0  # bound of the gradient's global norm, 0 for none
  c.optim.warmup_rows = 0  # cosine from lr / 10
  c.optim.decay_rows = 0  # linear to 0 at the end
  c.optim.ema = 0.0  # decay of a running mean of the weights, 0 for none

  c.train = ConfigDict()
  c.train.rows = 1_000_000
  c.train.batch_rows = 4096  # B, over all devices
  c.train.micro_batches = 1  # parts of a batch, one after the other
  c.train.compute_dtype = 'float32'  # or 'bfloat16': factors of the products
  c.train.codes = 'auto'  # or 'sparse', 'dense': which rule a step follows
  c.train.budget = 0  # candidates a row that sparse codes have room for, on the
  # mean; 0: four times the L0 aimed at. A batch with more is done densely.
  c.train.log_rows = 50_000  # between metrics
  c.train.eval_rows = 0  # between evaluations on held-out rows, 0 for none
  c.train.eval_size = 8192  # held-out rows of such an evaluation
  c.train.save_rows = 10_000_000  # between checkpoints; one more at the end
  c.train.keep = 2  # newest checkpoints kept
  c.train.keep_rows = 0  # also keep one every so many rows for good
  c.train.max_skipped = 10  # updates in a row that are not finite: then back to
  # the last checkpoint, and around these rows
  c.train.on_bad_block = 'stop'  # or 'skip' batches that cannot be read
  c.train.resume = False  # go on in the folder although these keys changed

  c.mesh = ConfigDict()
  c.mesh.data = 1  # devices that share the rows of a batch
  c.mesh.dict = 1  # devices that share the dictionary
  c.mesh.zero1 = False  # split the optimiser's state over `data` too

  c.distributed = ConfigDict()
  c.distributed.heartbeat_seconds = 60  # a process silent so long is dead
  c.distributed.start_seconds = 300  # for all processes to be there
  return c


def validate(config: Config) -> None:
  """Raises UserError for the first value that cannot work."""
  flat = flatten(config.to_dict())
  for name, value in flat.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f'config.{name}={value}: must be a finite number')
  if not 0 <= config.seed < 2**32:  # jax.random.key takes 32 bits
    raise UserError(f'config.seed={config.seed}: must be in [0, 2^32)')
  for name in _POSITIVE:
    if not flat[name] > 0:
      raise UserError(f'config.{name}={flat[name]}: must be above 0')
  for name in _NOT_NEGATIVE:
    if flat[name] < 0:
      raise UserError(f'config.{name}={flat[name]}: must not be negative')
  for name in ('optim.b1', 'optim.b2', 'optim.ema', 'act.theta_ema'):
    if not 0 <= flat[name] < 1:
      raise UserError(f'config.{name}={flat[name]}: must be in [0, 1)')
  known('config.act.name', config.act.name, ACTIVATIONS)
  known('config.train.codes', config.train.codes, CODES)
  known('config.train.on_bad_block', config.train.on_bad_block, BAD_BLOCKS)
  known(
    'config.train.compute_dtype', config.train.compute_dtype, COMPUTE_DTYPES
  )
  F, batch = config.sae.latents, config.train.batch_rows
  match config.act.name:
    case 'jumprelu':
      if config.act.log_theta and not config.act.theta:
        raise UserError('config.act.theta=0: must be above 0 with log_theta')
    case 'topk' | 'batchtopk' as name:
      _at_most('act.k', config.act.k, F)
      if config.loss.aux_coef:
        if not config.loss.aux_k:
          raise UserError(
            'config.loss.aux_k=0: set config.loss.aux_coef=0 for no AuxK'
          )
        _at_most('loss.aux_k', config.loss.aux_k, F)
      if config.loss.target_l0:
        raise UserError(
          f'config.loss.target_l0={config.loss.target_l0}: only jumprelu has a '
          f'target, the L0 of {name} is act.k'
        )
      if name == 'batchtopk' and config.act.k * batch > MOST_SELECTED:
        raise UserError(
          f'config.act.k={config.act.k} x config.train.batch_rows={batch}: '
          f'batchtopk selects at most {MOST_SELECTED} entries of a batch: '
          'lower one of them'
        )
  aimed = config.act.k
  if config.act.name == 'jumprelu':
    aimed = config.loss.target_l0
  if config.train.budget and config.train.budget < aimed:
    raise UserError(
      f'config.train.budget={config.train.budget} candidates a row are fewer '
      f'than the {aimed:g} active latents aimed at: give more, or 0'
    )
  if config.loss.dead_rows > SATURATED:
    raise UserError(
      f'config.loss.dead_rows={config.loss.dead_rows}: rows since a latent '
      f'fired are counted up to {SATURATED}'
    )
  check_divides('config.sae.latents', F, DICT, config.mesh.dict)
  check_divides('config.train.batch_rows', batch, DATA, config.mesh.data)
  parts, data = config.train.micro_batches, config.mesh.data
  if batch % (parts * data):
    raise UserError(
      f'config.train.batch_rows={batch} is not divisible by config.mesh.data='
      f'{data} x config.train.micro_batches={parts}: change one of them'
    )
  if config.mesh.zero1 and F % (data * config.mesh.dict):
    raise UserError(
      f'config.sae.latents={F} is not divisible by config.mesh.data={data} x '
      f'config.mesh.dict={config.mesh.dict}, as config.mesh.zero1 asks: use '
      'another mesh, or zero1=False'
    )


def known(what: str, name: str, names: Sequence[str]) -> None:
  """Raises UserError, with the nearest right name, unless name is known."""
  if name not in names:
    near = difflib.get_close_matches(name, names, 1, 0.3) or list(names)[:1]
    raise UserError(
      f'{what}={name!r} is not one of {", ".join(names)}: did you mean '
      f'{near[0]!r}?'
    )


def flatten(tree: dict, prefix: str = '') -> dict:
  """Nested dicts as one dict with dotted keys."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def _at_most(name: str, value: int, latents: int) -> None:
  if value > latents:
    raise UserError(
      f'config.{name}={value} is more than config.sae.latents={latents}: '
      'lower the one or raise the other'
    )
