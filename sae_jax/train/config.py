"""The training config: every key with its unit, and the checks of values.

Recipes in configs/ start from `base_config()` and set what differs.
Counters are in rows (tokens); steps are derived.
"""

import math
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.parallel.select import MOST_SELECTED
from sae_jax.train.keys import flatten, known, overrides_of, set_keys
from sae_jax.train.step import SATURATED

ACTIVATIONS = ('jumprelu', 'topk', 'batchtopk')
BAD_BLOCKS = ('stop', 'skip')
COMPUTE_DTYPES = ('float32', 'bfloat16')
CODES = ('auto', 'sparse', 'dense')
_POSITIVE = (
  'store.window', 'sae.d_in', 'sae.latents', 'sae.encoder_norm', 'act.k',
  'act.bandwidth',
  'loss.dead_rows', 'optim.lr', 'optim.eps', 'train.rows', 'train.batch_rows',
  'train.micro_batches', 'train.log_rows', 'train.save_rows', 'train.keep',
  'train.eval_size', 'mesh.data', 'mesh.dict', 'mesh.member',
  'train.max_skipped',
  'distributed.heartbeat_seconds', 'distributed.start_seconds',
)  # fmt: skip
_NOT_NEGATIVE = (
  'loss.l0_coef', 'loss.target_l0', 'loss.l0_warmup_rows', 'loss.aux_coef',
  'loss.aux_k', 'optim.lr_width', 'optim.clip_norm', 'optim.warmup_rows',
  'optim.decay_rows', 'train.eval_rows', 'train.keep_rows', 'act.theta',
  'train.budget', 'store.max_norm',
)  # fmt: skip
# What all members of a job have in common: the batches and the job around them.
SHARED = (
  'store.', 'train.', 'mesh.', 'distributed.', 'sae.d_in', 'sae.center',
  'members',
)  # fmt: skip
# In what the members of one compiled step may differ: leaves of their states
# and `step.Knobs`. Of those with True, only whether they are zero is compiled.
_IN_A_STACK = {
  'seed': False, 'store.seed': False, 'optim.lr': False,
  'optim.lr_width': False, 'act.theta': False, 'act.bandwidth': False,
  'loss.l0_coef': False, 'loss.target_l0': True, 'loss.aux_coef': True,
}  # fmt: skip


def base_config() -> Config:
  """All keys a training run reads. Norms and coefficients are in normalised
  units: centred rows divided so that their mean squared norm is 1."""
  c = ConfigDict()
  c.seed = 0  # initial weights and order of the batches
  # SAEs to train at once on the same batches: for each a dict of dotted keys
  # in which it differs, {'optim.lr': 1e-3, 'seed': 1}, and its 'name', if any.
  c.members = ()

  c.store = ConfigDict()
  c.store.path = ''  # folder that launch/harvest.py wrote
  c.store.site = 'layer_9.resid_post'
  c.store.window = 8  # shards whose blocks are permuted together
  c.store.max_norm = 0.0  # rows beyond so many median norms are left out
  c.store.seed = -1  # order of the batches, if not by `seed`

  c.sae = ConfigDict()
  c.sae.d_in = 576  # D, the site's width
  c.sae.latents = 4096  # F
  c.sae.center = True  # subtract the store's mean vector
  c.sae.pre_bias = True  # encode n - b_dec
  c.sae.encoder_norm = 1.0  # of W_enc's first rows; those of W_dec have norm 1

  c.act = ConfigDict()
  c.act.name = 'jumprelu'  # or 'topk', 'batchtopk'
  c.act.theta = 0.001  # jumprelu: initial threshold
  c.act.bandwidth = 0.001  # jumprelu: width of the straight-through kernel
  c.act.log_theta = False  # jumprelu: learn log(theta)
  c.act.k = 32  # topk: active latents; batchtopk: their mean over a batch
  c.act.theta_ema = 0.999  # batchtopk: decay, a step, of the mean threshold,
  # which is used where there are no held-out rows

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
  c.train.budget = 0  # jumprelu, batchtopk: candidates a row that sparse codes
  # have room for, on the mean of a chunk of rows on a device; 0: four times the
  # L0 aimed at. A batch with a chunk that has more is done densely.
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
  c.mesh.member = 1  # groups of data x dict devices that share the members
  c.mesh.zero1 = False  # split the optimiser's state over `data` too

  c.distributed = ConfigDict()
  c.distributed.heartbeat_seconds = 60  # a process silent so long is dead
  c.distributed.start_seconds = 300  # for all processes to be there
  return c


def validate(config: Config) -> None:
  """Raises UserError for the first value that cannot work."""
  _validate_run(config)
  _check_names(config)
  members = member_configs(config)
  for i, member in enumerate(members):
    try:
      _validate_run(member)
    except UserError as error:
      raise UserError(f'config.members[{i}]: {error}') from None
  parts = config.mesh.member
  if parts > 1 and not members:
    raise UserError(f'config.mesh.member={parts}: there are no config.members')
  for stack in stacks(members):
    if len(stack) % parts:
      raise UserError(
        f'config.mesh.member={parts} does not divide the {len(stack)} members '
        f'{", ".join(map(str, stack))} of config.members, which share a step: '
        'change one of them'
      )
  if members and config.train.keep < 2:
    # A kill within a round of saves leaves members one checkpoint apart.
    raise UserError('config.train.keep=1: members need 2')


def member_configs(config: Config) -> list[Config]:
  """The config of each of config.members, as a run of its own; no members,
  none. Raises UserError for a key that is not there, or all must share."""
  return [_merged(config, i) for i in range(len(config.members))]


def plain_members(config: Config) -> Config:
  """The same config, its members as dicts of dotted keys: fit for JSON."""
  if not config.members:
    return config
  plain: Config = ConfigDict(config.to_dict() | {'members': ()})
  plain.members = tuple(map(overrides_of, config.members))
  return plain


def member_name(config: Config, i: int) -> str:
  """The i-th member's name, and that of its folder."""
  width = max(2, len(str(len(config.members) - 1)))
  return overrides_of(config.members[i]).get('name', f'{i:0{width}d}')


def stacks(members: Sequence[Config]) -> list[list[int]]:
  """The members (their indices) that may share a compiled step, together."""
  found: dict[str, list[int]] = {}
  for i, member in enumerate(members):
    flat = flatten(member.to_dict())
    for key, zero in _IN_A_STACK.items():
      flat[key] = flat[key] == 0 if zero else None
    found.setdefault(str(flat), []).append(i)
  return list(found.values())


def stream_seed(config: Config) -> int:
  """What the order of the batches is drawn from."""
  return config.seed if config.store.seed < 0 else config.store.seed


def _merged(config: Config, i: int) -> Config:
  what, changes = f'config.members[{i}]', overrides_of(config.members[i])
  changes = {k: v for k, v in changes.items() if k != 'name'}
  for key in changes:
    if key.startswith(SHARED):
      raise UserError(
        f'{what}.{key}: all members share it: set config.{key} instead'
      )
  merged: Config = ConfigDict(config.to_dict() | {'members': ()})
  merged.mesh.member = 1
  set_keys(merged, changes, what)
  if merged.seed != config.seed:  # alone it must see the same batches
    merged.store.seed = stream_seed(config)
  return merged


def _check_names(config: Config) -> None:
  names = [member_name(config, i) for i in range(len(config.members))]
  for i, name in enumerate(names):
    if not isinstance(name, str) or not re.fullmatch(r'\w[\w.=+-]*', name):
      raise UserError(
        f'config.members[{i}].name={name!r}: must be letters, digits, _ . = + -'
      )
    if names.index(name) < i:
      raise UserError(
        f'config.members[{i}].name={name!r}: also that of '
        f'config.members[{names.index(name)}]'
      )


def _validate_run(config: Config) -> None:
  """Of a plain run, or of one member."""
  flat = flatten(config.to_dict())
  for name, value in flat.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f'config.{name}={value}: must be a finite number')
  if config.store.seed >= 2**64:
    raise UserError(f'config.store.seed={config.store.seed}: must be < 2^64')
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
  parts, data = config.train.micro_batches, config.mesh.data
  if batch % (parts * data):
    raise UserError(
      f'config.train.batch_rows={batch} is not divisible by config.mesh.data='
      f'{data} x config.train.micro_batches={parts}: give a multiple of '
      f"{parts * data} and of the store's blocks, or another mesh"
    )
  unit, by = config.mesh.dict, f'config.mesh.dict={config.mesh.dict}'
  if config.mesh.zero1:
    unit, by = unit * data, f'{by} x config.mesh.data={data} (for zero1)'
  if F % unit:
    least = 1
    if config.act.name != 'jumprelu':  # k and aux_k are at most F
      least = max(config.act.k, config.loss.aux_coef and config.loss.aux_k)
    near = [v for v in (F // unit * unit, -(-F // unit) * unit) if v >= least]
    raise UserError(
      f'config.sae.latents={F} is not divisible by {by}: use '
      f'{" or ".join(map(str, near))}, or another mesh'
    )


def _at_most(name: str, value: int, latents: int) -> None:
  if value > latents:
    raise UserError(
      f'config.{name}={value} is more than config.sae.latents={latents}: '
      'lower the one or raise the other'
    )
