"""The harvest config: every key with its unit, and the checks of values."""

import re
from typing import Any

from ml_collections import ConfigDict

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.store.plan import check_dtype, check_rows, check_sizes

COMPUTE = ('auto', 'float32', 'bfloat16')


def base_config() -> Config:
  """All keys a harvest reads."""
  c = ConfigDict()
  c.model = ConfigDict()
  c.model.kind = ''  # 'hf', 'hub', 'gguf'; '': what the path looks like
  c.model.path = ''  # a folder, a .gguf file, or org/name
  c.model.weights = ''  # of a folder: the file or index to read, of several
  c.model.tokenizer = ''  # a folder or tokenizer.json; '': the model's own

  c.text = ConfigDict()
  c.text.path = ''  # a file, a folder, or org/name: docs/text.md
  c.text.kind = ''  # 'txt', 'jsonl', 'parquet', 'datasets', 'hub'
  c.text.column = 'text'
  c.text.chat = False  # the column holds lists of messages
  c.text.split = 'train'
  c.text.name = ''  # configuration of a data set of the hub

  c.harvest = ConfigDict()
  c.harvest.sites = ('layer_9.resid_post',)  # all from one forward pass
  c.harvest.rows = 0  # rows to write, 0 for all the text gives
  c.harvest.sequence_length = 128  # T, BOS included
  c.harvest.beyond_context = False  # allow more than the model was made for
  c.harvest.batch_sequences = 16  # sequences in one forward pass
  # The model's arithmetic, or 'bfloat16', or 'auto': what is faster here,
  # measured on one batch when the store is planned, and recorded in the plan.
  c.harvest.compute_dtype = 'float32'
  c.harvest.seed = 0  # order of the documents, and of the rows in a shard
  c.harvest.skip_first = 1  # first positions of a sequence without rows
  c.harvest.skip_special = True  # no rows for control tokens, BOS, EOS
  c.harvest.skip_tokens = ()  # nor for these ids
  c.harvest.max_norm = 0.0  # readers leave out rows beyond so many median norms

  c.store = ConfigDict()
  c.store.path = ''  # folder to write
  c.store.dtype = 'float32'  # or 'bfloat16', 'int8': the rows on disk
  c.store.rows_per_shard = 2**20  # rows shuffled together
  c.store.rows_per_block = 256  # rows read in one piece
  c.store.held_out_shards = 1  # the first shards, never trained on
  c.store.norm_shards = 1  # training shards that give mean and scale
  c.store.keep_bytes = 0  # bound of the store on disk, shards that all trainers
  # have read are removed; 0 for none
  c.store.trainers = 1  # with keep_bytes: runs that will read the store

  c.mesh = ConfigDict()
  c.mesh.data = 1  # devices that share the sequences of a batch
  c.mesh.dict = 1  # devices that share the model

  c.distributed = ConfigDict()
  c.distributed.heartbeat_seconds = 60  # a process silent so long is dead
  c.distributed.start_seconds = 300  # for all processes to be there

  c.task = '0/1'  # this one of so many that write the store together
  return c


def check_config(config: Config) -> None:
  """Raises UserError for values that cannot work, before anything is read."""
  h, s = config.harvest, config.store
  if isinstance(h.sites, str):
    raise UserError(
      f'harvest.sites: write a tuple: --config.harvest.sites="({h.sites!r},)"'
    )
  sites = list(h.sites)
  words = {site for site in sites if isinstance(site, str)}
  if not sites or len(words) < len(sites):
    raise UserError(f'harvest.sites: {sites}; name one or more, each once')
  for key in ('model', 'text', 'store'):
    if not config[key].path:
      raise UserError(f'{key}.path: empty; give --config.{key}.path')
  if h.sequence_length < 2:
    raise UserError(
      f'harvest.sequence_length: {h.sequence_length}; use 2 or more, the '
      'first position is not stored'
    )
  if h.batch_sequences < 1 or h.batch_sequences % config.mesh.data:
    raise UserError(
      f'harvest.batch_sequences: {h.batch_sequences}; use 1 or more, a '
      f'multiple of mesh.data={config.mesh.data}'
    )
  if bad := [i for i in h.skip_tokens if not hasattr(i, '__index__')]:
    raise UserError(
      f'harvest.skip_tokens: {bad[0]!r} is no token id; write numbers: '
      '--config.harvest.skip_tokens="(198, 216)"'
    )
  if h.rows < 0:
    raise UserError(f'harvest.rows: {h.rows}; use 0 for all rows, or more')
  if not 0 <= h.max_norm < 1e9:
    raise UserError(f'harvest.max_norm: {h.max_norm}; use 0 for none, or 10')
  if not 0 <= h.seed < 2**63:
    raise UserError(f'harvest.seed: {h.seed}; use 0 to 2^63 - 1')
  check_dtype('harvest.compute_dtype', h.compute_dtype, COMPUTE)
  check_dtype('store.dtype', s.dtype)
  check_sizes(**sizes(config))
  if h.rows:
    check_rows(h.rows, **sizes(config))
  if s.keep_bytes < 0:
    raise UserError(f'store.keep_bytes: {s.keep_bytes}; use 0 for no bound')
  for key, value in config.distributed.items():
    if value < 1:
      raise UserError(f'distributed.{key}: {value}; use 1 second or more')
  if s.trainers < 1:
    raise UserError(f'store.trainers: {s.trainers}; use 1 or more')
  task_of(config)


def task_of(config: Config) -> tuple[int, int]:
  """(i, n) of config.task; UserError unless it is i/n with 0 <= i < n."""
  found = re.fullmatch(r'(\d+)/(\d+)', str(config.task))
  i, n = (int(v) for v in found.groups()) if found else (0, 0)
  if not i < n:
    raise UserError(
      f'task: {config.task!r}; write i/n, the first of four is 0/4'
    )
  return i, n


def sizes(config: Config) -> dict[str, int]:
  """The four numbers that cut rows into shards, as arguments of `plan`."""
  s = config.store
  return {
    'rows_per_shard': s.rows_per_shard,
    'rows_per_block': s.rows_per_block,
    'held_out_shards': s.held_out_shards,
    'norm_shards': s.norm_shards,
  }


def recorded(config: Config) -> dict[str, Any]:
  """The config as the manifest keeps it: JSON, without what alters no row."""
  data = config.to_dict()
  for key in ('sites', 'skip_tokens'):
    data['harvest'][key] = list(data['harvest'][key])
  if not config.harvest.max_norm:  # as stores from before the key
    del data['harvest']['max_norm']
  for key in ('path', 'keep_bytes', 'trainers'):
    del data['store'][key]
  del data['task'], data['distributed'], data['harvest']['beyond_context']
  return data
