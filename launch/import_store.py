"""Makes a store of activations that another program has computed.

python launch/import_store.py --from=saelens --source=DIR --store=DIR \
  --site=layer_9.resid_post
--from: saelens, llamascopium or npy; several sites at once:
--sites=blocks.9.hook_resid_post=layer_9.resid_post,OTHER=NAME. The same command
goes on where an interrupted import stopped. docs/import.md has the formats.
"""

import re
from pathlib import Path

from absl import flags, logging

from sae_jax import cli
from sae_jax.errors import UserError
from sae_jax.interop import llamascopium, npy, saelens
from sae_jax.interop.importing import Options, import_rows
from sae_jax.interop.source import Source, nearest

IMPORTERS = ('saelens', 'llamascopium', 'npy')

_FROM = flags.DEFINE_string('from', None, 'saelens, llamascopium or npy.')
_SOURCE = flags.DEFINE_string('source', None, 'Folder of the activations.')
_STORE = flags.DEFINE_string('store', None, 'Folder of the store.')
_SITE = flags.DEFINE_string('site', '', 'Name of the only site.')
_SITES = flags.DEFINE_list('sites', [], 'HOOK=NAME of several.')
_DTYPE = flags.DEFINE_string('dtype', 'float32', 'float32, bfloat16, int8.')
_ROWS_PER_SHARD = flags.DEFINE_integer('rows_per_shard', 1 << 20, 'Rows.')
_ROWS_PER_BLOCK = flags.DEFINE_integer(
  'rows_per_block', 256, 'Rows that are read in one piece.'
)
_HELD_OUT = flags.DEFINE_integer('held_out_shards', 1, 'Never trained on.')
_NORM = flags.DEFINE_integer('norm_shards', 1, 'Give mean and norms.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the order of rows in a shard.')
_SHUFFLE = flags.DEFINE_bool(
  'shuffle', False, 'Also the order of the sequences, for a sorted source.'
)
_SKIP_FIRST = flags.DEFINE_integer(
  'skip_first', 0, 'So many first tokens of a sequence get no row.'
)
_SKIP_TOKENS = flags.DEFINE_list(
  'skip_tokens', [], 'Token ids without a row: padding, BOS.'
)
_MODEL_NAME = flags.DEFINE_string(
  'model_name', '', 'For sources that do not say whose activations they are.'
)
_TOKENS = flags.DEFINE_string(
  'tokens', '', "npy: the file of tokens; 'none': unknown (saelens, npy)."
)
_SEQUENCE_LENGTH = flags.DEFINE_integer(
  'sequence_length', 0, 'npy: so many rows are a sequence.'
)
_SOURCE_DTYPE = flags.DEFINE_string(
  'source_dtype', '', 'npy: bfloat16 for numbers of two bytes without a name.'
)
flags.mark_flags_as_required(['from', 'source', 'store'])


def main() -> None:
  # `from` is a word of Python: no attribute of that name.
  importer = str(flags.FLAGS['from'].value)
  options = Options(
    dtype=_DTYPE.value,
    rows_per_shard=_ROWS_PER_SHARD.value,
    rows_per_block=_ROWS_PER_BLOCK.value,
    held_out_shards=_HELD_OUT.value,
    norm_shards=_NORM.value,
    seed=_SEED.value,
    skip_first=_SKIP_FIRST.value,
    skip_tokens=token_ids(_SKIP_TOKENS.value),
    shuffle=_SHUFFLE.value,
    model_name=_MODEL_NAME.value,
  )
  source = open_source(importer, Path(str(_SOURCE.value)).expanduser(), sites())
  manifest = import_rows(str(_STORE.value), importer, source, options)
  logging.info('store: %s is complete', _STORE.value)
  for site in manifest.sites:
    print(
      f'{_STORE.value}: {manifest.rows:,} rows of {site.name}, {site.width} '
      f'numbers in {site.dtype}'
    )


def open_source(importer: str, root: Path, names: dict[str, str]) -> Source:
  """The folder, by the importer of that name."""
  only_npy = {
    'sequence_length': _SEQUENCE_LENGTH.value,
    'source_dtype': _SOURCE_DTYPE.value,
    'tokens': _TOKENS.value if _TOKENS.value != 'none' else '',
  }
  if importer != 'npy' and (given := [k for k, v in only_npy.items() if v]):
    raise UserError(f'{given[0]}: only for --from=npy, leave it out')
  match importer:
    case 'saelens':
      return saelens.open_source(root, names, tokens=_TOKENS.value != 'none')
    case 'llamascopium':
      if _TOKENS.value:
        raise UserError('tokens: these chunks hold their tokens, leave it out')
      return llamascopium.open_source(root, names)
    case 'npy':
      if _SOURCE_DTYPE.value not in ('', 'bfloat16'):
        raise UserError(
          f'source_dtype: {_SOURCE_DTYPE.value!r}; only bfloat16 has to be said'
        )
      return npy.open_source(
        root,
        names,
        tokens=_TOKENS.value,
        sequence_length=_SEQUENCE_LENGTH.value,
        bfloat16=_SOURCE_DTYPE.value == 'bfloat16',
      )
  raise UserError(
    f'from: {importer!r}{nearest(importer, IMPORTERS)}; there are '
    f'{", ".join(IMPORTERS)}'
  )


def sites() -> dict[str, str]:
  """{hook: site}, '' for the only hook; UserError for a bad or missing name."""
  if bool(_SITE.value) == bool(_SITES.value):
    raise UserError(
      'site: give --site=NAME for the only hook of the source, for example '
      'layer_9.resid_post, or --sites=HOOK=NAME,HOOK=NAME'
    )
  pairs = [p.rpartition('=') for p in _SITES.value] or [('', '=', _SITE.value)]
  for hook, equals, name in pairs:
    if not equals or (_SITES.value and not hook):
      raise UserError(f'sites: {name!r}: write HOOK=NAME')
    if not re.fullmatch(r'\w[\w.-]*', name):
      raise UserError(
        f'site: {name!r}: a name is letters, digits, _ . and -, for example '
        'layer_9.resid_post'
      )
  names = [name for *_, name in pairs]
  if len(set(names)) < len(names) or len({h for h, *_ in pairs}) < len(names):
    raise UserError(f'sites: a hook or a name twice: {", ".join(_SITES.value)}')
  return {hook: name for hook, _, name in pairs}


def token_ids(words: list[str]) -> tuple[int, ...]:
  """The ids of --skip_tokens."""
  try:
    return tuple(sorted({int(word) for word in words}))
  except ValueError:
    raise UserError(
      f'skip_tokens: {",".join(words)!r}: give ids, for example 0,2'
    ) from None


if __name__ == '__main__':
  cli.run(main)
