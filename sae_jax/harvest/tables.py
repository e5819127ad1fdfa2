"""Documents in tables: JSON lines, Parquet, saved data sets, the hub.

All become Arrow files that the package `datasets` maps into memory, so that
any document can be read without reading the others. Only this file calls it.
"""

import importlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.harvest import columns
from sae_jax.harvest.chat import check_messages
from sae_jax.harvest.columns import line
from sae_jax.harvest.files import Text, hash_files, nearest, no_document
from sae_jax.paths import cache_dir

# Part of the cache's key: another number with every change to what is read.
_READER = 2


def copied(text: Config, root: Path, files: list[Path], kind: str) -> Text:
  """A corpus of JSON lines or Parquet files, whose column is copied into the
  cache as an Arrow file, once for the same contents.

  `datasets` has readers: that of JSON guesses types (text may become dates),
  wants the same keys in every line, and does not say which one is bad; that of
  Parquet takes a file of the same name and time for the same.
  """
  datasets = _datasets()
  chat = bool(text.chat)
  for file in files if kind == 'parquet' else ():  # before all is hashed
    with columns.parquet(file) as table:
      features = datasets.Features.from_arrow_schema(table.schema_arrow)
    _check_type(str(file), text.column, features, chat)
  sha256, _ = hash_files(root, files, _header(text))
  words = datasets.Value('large_string')  # no limit of 2 GB to a batch
  feature = datasets.List({'role': words, 'content': words}) if chat else words
  try:
    data = datasets.Dataset.from_generator(
      columns.rows,
      features=datasets.Features({text.column: feature}),
      cache_dir=cache_dir('datasets'),
      gen_kwargs={'paths': tuple(files), 'kind': kind, 'column': text.column,
                  'chat': chat},
      fingerprint=f'{_READER}-{sha256}',
    )  # fmt: skip
  except (OSError, datasets.exceptions.DatasetGenerationError) as error:
    cause = error.__cause__ or error
    if isinstance(cause, UserError):
      raise cause from None
    raise UserError(
      f'text.path: cannot copy {text.path} into {cache_dir("datasets")}: '
      f'{line(cause)}'
    ) from error
  return _table(text, data, sha256, len(files))


def saved(text: Config, root: Path) -> Text:
  """A folder that `save_to_disk` wrote, read in place."""
  datasets = _datasets()
  if not root.is_dir():
    raise UserError(
      f'text.path: no folder {str(root)!r}: text.kind=datasets wants what '
      '`save_to_disk` wrote'
    )
  try:
    data = datasets.load_from_disk(str(root), keep_in_memory=False)
  except (OSError, ValueError, KeyError) as error:
    raise UserError(
      f'text.path: {root}: no saved data set, or a damaged one: {line(error)}'
    ) from error
  if isinstance(data, datasets.DatasetDict):
    if text.split not in data:
      raise _no_split(str(root), text.split, data)
    data = data[text.split]
  elif text.split not in ('train', data.split):  # as the default is
    raise _no_split(str(root), text.split, [str(data.split or 'train')])
  # Paths as given: a folder that is a link must not change names.
  files = sorted({Path(file['filename']) for file in data.cache_files})
  header = f'{_header(text)}{text.split}\0'
  sha256, _ = hash_files(_parent(root, files), files, header)
  return _table(text, data, sha256, len(files))


def hub(text: Config) -> Text:
  """A data set of the Hugging Face hub, in its own cache, at its newest
  revision or, without a network, the one that is there already."""
  datasets = _datasets()
  where = f'hub data set {text.path!r}'
  problem = lambda said: UserError(f'text.path: {where}{said}')
  if Path(text.path).exists():  # `datasets` would take it, by name and time
    raise problem(': there is a file or folder of that name: move it')
  try:
    builder = datasets.load_dataset_builder(text.path, text.name or None)
    builder.download_and_prepare()
  except datasets.exceptions.DatasetNotFoundError as error:
    if 'gated' in str(error):
      raise problem(
        ' is gated: ask for access on its page, then `hf auth login`'
      ) from error
    raise problem(
      ': there is no such file, folder or public data set (a private one needs '
      '`hf auth login`)'
    ) from error
  except ConnectionError as error:
    raise problem(
      ': no such file or folder here, and the hub cannot be reached '
      f'({line(error)}): check the path, or the network'
    ) from error
  except ValueError as error:  # a configuration that is missing or not there
    raise problem(f': {line(error)}: give --config.text.name') from error
  except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
    raise problem(f': {line(error)}') from error
  splits = list(builder.info.splits or ())
  if text.split.partition('[')[0] not in splits:
    raise _no_split(where, text.split, splits)
  try:
    data = builder.as_dataset(split=text.split)
  except (ValueError, AssertionError) as error:  # a bad slice, or an empty one
    raise UserError(f'text.split: {where}: {line(error)}') from error
  # builder.hash is the commit of the revision.
  header = f'{_header(text)}{text.split}\0{text.path}\0{text.name}\0'
  files = len(data.cache_files)
  return _table(text, data, hash_files(Path(), [], header + builder.hash)[0],
                files)  # fmt: skip


def _datasets() -> Any:
  """The package; UserError where it is not installed."""
  try:
    import datasets
  except ImportError as error:
    raise UserError(
      'text.path: all but .txt files needs the package datasets: '
      "pip install 'sae-jax[data]'"
    ) from error
  return datasets


def _header(text: Config) -> str:
  """What decides the documents of a file besides its contents."""
  return f'{text.column}\0{"chat" if text.chat else "text"}\0'


def _table(text: Config, data: Any, sha256: str, files: int) -> Text:
  """The corpus of a data set's column, checked as far as its type says."""
  name, column, chat = str(text.path), text.column, bool(text.chat)
  if not len(data):
    raise no_document(name)
  _check_type(name, column, data.features, chat)
  top, *inner = [column] if column in data.features else column.split('.')
  data = data.with_format(None).select_columns([top])
  values = data.data.column(top)
  compute: Any = importlib.import_module('pyarrow.compute')
  for key in inner:
    values = compute.struct_field(values, key)
  if values.null_count:
    at = compute.index(values.is_null(), True).as_py()
    raise UserError(
      f'text.path: {name}: document {at:,} has no {column!r} (null), as '
      f'{values.null_count:,} in all: leave them out'
    )

  def read(i: int) -> Any:
    where = f'{name}, document {i:,}'
    try:
      value = columns.value_of(data[int(i)], column)
    except UnicodeDecodeError as error:
      raise columns.no_utf8(where, error) from error
    return check_messages(value, where) if chat else value

  return Text(name, len(data), files, values.nbytes, sha256, chat, read)


def _check_type(
  name: str, column: str, features: Mapping[str, Any], chat: bool
) -> None:
  """UserError for a column that is not there, not text, or not messages."""
  dtype = lambda f: str(getattr(f, 'dtype', ''))
  inner: Any = lambda f: getattr(f, 'feature', None)
  is_words = lambda f: re.fullmatch(r'(large_)?string(_view)?', dtype(f))
  is_chat = lambda f: (
    isinstance(inner(f), dict)
    and all(is_words(inner(f).get(key)) for key in ('role', 'content'))
  )
  leaves = columns.columns_of(features)
  fit = [c for c, f in leaves.items() if (is_chat if chat else is_words)(f)]
  feature = leaves.get(column, features.get(column))
  if feature is None:
    raise columns.no_column(name, column, fit)
  is_bytes = re.fullmatch(r'(large_)?binary(_view)?', dtype(feature))
  if column in fit or (is_bytes and not chat):
    return
  hint = columns.propose(fit)
  if not chat and isinstance(inner(feature), dict):
    hint = 'is it chat data? give --config.text.chat=true'
  wanted = 'no list of messages with role and content' if chat else 'not text'
  raise UserError(
    f'text.column: {column!r} of {name} is {line(feature)}, {wanted}: {hint}'
  )


def _no_split(where: str, split: str, splits: Iterable[str]) -> UserError:
  return UserError(
    f'text.split: {where} has no split {split!r}{nearest(split, splits)}; it '
    f'has {", ".join(splits)}'
  )


def _parent(root: Path, files: list[Path]) -> Path:
  """The folder that the names of a data set's files are relative to."""
  return root if all(f.is_relative_to(root) for f in files) else Path('/')
