"""Documents in tables: JSON lines, Parquet, saved data sets, the hub.

All become Arrow files that the package `datasets` maps into memory, so that
any document can be read without reading the others. Only this file calls it.
"""

import codecs
import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.harvest.chat import check_messages
from sae_jax.harvest.files import Text, hash_files, nearest, no_column
from sae_jax.paths import cache_dir

# Part of the cache's key: another number with every change to what is read.
_READER = 1


def jsonl(text: Config, root: Path, files: list[Path]) -> Text:
  """A corpus of JSON lines, an object with the column in each.

  The column is copied into the cache as an Arrow file, once for the same
  contents. `datasets` has a reader of JSON lines; it guesses types (text that
  looks like dates becomes dates), wants the same keys in every line, and does
  not say which line is bad.
  """
  datasets = _datasets()
  sha256, _ = hash_files(root, files, _header(text))
  words = datasets.Value('large_string')  # no limit of 2 GB to a batch
  feature = (
    datasets.List({'role': words, 'content': words}) if text.chat else words
  )
  with _conversion(text):
    data = datasets.Dataset.from_generator(
      _json_rows,
      features=datasets.Features({text.column: feature}),
      cache_dir=cache_dir('datasets'),
      gen_kwargs={'files': tuple(files), 'column': text.column,
                  'chat': bool(text.chat)},
      fingerprint=f'{_READER}-{sha256}',
    )  # fmt: skip
  return _table(text, data, sha256, len(files))


def parquet(text: Config, root: Path, files: list[Path]) -> Text:
  """A corpus of Parquet files; the column is copied into the cache."""
  datasets = _datasets()
  import pyarrow.parquet

  for file in files:
    try:
      names = pyarrow.parquet.read_schema(file).names
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
      raise UserError(
        f'{file}: no Parquet file, or a damaged one: {_line(error)}'
      ) from error
    if text.column not in names:
      raise no_column(str(file), text.column, names)
  if not any(pyarrow.parquet.read_metadata(file).num_rows for file in files):
    raise _empty(text.path)
  sha256, _ = hash_files(root, files, _header(text))
  try:
    with _conversion(text):
      data = datasets.Dataset.from_parquet(
        [str(file) for file in files],
        columns=[text.column],
        cache_dir=cache_dir('datasets'),
      )
  except UserError:
    _find_damage(files, text.column)  # `datasets` does not name the file
    raise
  return _table(text, data, sha256, len(files))


def _find_damage(files: list[Path], column: str) -> None:
  """Reads everything; UserError with the file that cannot be read."""
  import pyarrow.parquet

  for file in files:
    try:
      for _ in pyarrow.parquet.ParquetFile(file).iter_batches(columns=[column]):
        pass
    except (OSError, ValueError) as error:
      raise UserError(f'{file}: damaged: {_line(error)}') from error


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
      f'text.path: {root}: no saved data set, or a damaged one: {_line(error)}'
    ) from error
  if isinstance(data, datasets.DatasetDict):
    if text.split not in data:
      raise _no_split(str(root), text.split, data)
    data = data[text.split]
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
      f'({_line(error)}): check the path, or the network'
    ) from error
  except ValueError as error:  # a configuration that is missing or not there
    raise problem(f': {_line(error)}: give --config.text.name') from error
  except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
    raise problem(f': {_line(error)}') from error
  splits = list(builder.info.splits or ())
  if text.split.partition('[')[0] not in splits:
    raise _no_split(where, text.split, splits)
  try:
    data = builder.as_dataset(split=text.split)
  except (ValueError, AssertionError) as error:  # a bad slice, or an empty one
    raise UserError(f'text.split: {where}: {_line(error)}') from error
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
    raise _empty(name)
  if column not in data.features:
    raise no_column(f'text.path: {name}', column, data.features)
  _check_type(name, column, data.features[column], chat)
  data = data.with_format(None).select_columns([column])
  values = data.data.column(column)
  if values.null_count:
    import pyarrow.compute

    at = pyarrow.compute.index(values.is_null(), True).as_py()
    raise UserError(
      f'text.path: {name}: document {at:,} has no {column!r} (null), as '
      f'{values.null_count:,} in all: leave them out'
    )

  def read(i: int) -> Any:
    value = data[int(i)][column]
    return check_messages(value, f'{name}, document {i:,}') if chat else value

  return Text(name, len(data), files, values.nbytes, sha256, chat, read)


def _check_type(name: str, column: str, feature: Any, chat: bool) -> None:
  """UserError for a column that is not text, or not messages."""
  is_words = lambda f: getattr(f, 'dtype', '') in ('string', 'large_string')
  inner = getattr(feature, 'feature', None)
  if not chat and not is_words(feature):
    hint = (
      'is it chat data? give --config.text.chat=true'
      if isinstance(inner, dict)
      else 'give --config.text.column'
    )
    raise UserError(
      f'text.column: {column!r} of {name} is {_line(feature)}, not text: {hint}'
    )
  if chat and not (
    isinstance(inner, dict)
    and all(is_words(inner.get(key)) for key in ('role', 'content'))
  ):
    raise UserError(
      f'text.column: {column!r} of {name} is {_line(feature)}, no list of '
      'messages with role and content: give --config.text.column, or '
      '--config.text.chat=false for plain text'
    )


def _json_rows(
  files: Sequence[Path], column: str, chat: bool
) -> Iterator[dict[str, Any]]:
  """The documents of files of JSON lines; UserError with the line."""
  empty = True
  for file in files:
    for number, line in enumerate(_lines(file), 1):
      if line.strip():
        where = f'{file}, line {number:,}'
        yield {column: _json_value(line, column, chat, where)}
        empty = False
  if empty:
    raise _empty(', '.join(map(str, files[:3])))


def _lines(file: Path) -> Iterator[bytes]:
  import pyarrow

  try:
    # It decompresses by the file's ending, and says when an end is missing.
    with io.BufferedReader(pyarrow.input_stream(str(file)), 1 << 20) as lines:
      for n, line in enumerate(lines):
        yield line.removeprefix(codecs.BOM_UTF8) if n == 0 else line
  except OSError as error:
    raise UserError(f'cannot read {file}: {_line(error)}') from error


def _json_value(line: bytes, column: str, chat: bool, where: str) -> Any:
  try:
    row = json.loads(line.decode('utf-8'))
  except UnicodeDecodeError as error:
    raise UserError(
      f'{where}: not UTF-8 at byte {error.start:,} of the line '
      f'(0x{line[error.start]:02x})'
    ) from error
  except json.JSONDecodeError as error:
    raise UserError(
      f'{where}: not JSON: {error.msg} at character {error.pos:,}'
    ) from error
  if not isinstance(row, dict):
    raise UserError(
      f'{where}: {_json(row)} is no object like {{"{column}": ...}}'
    )
  if column not in row:
    raise no_column(where, column, row)
  value = row[column]
  if chat:
    value = messages = check_messages(value, where)
    words = ''.join(m['role'] + m['content'] for m in messages)
  elif not isinstance(value, str):
    hint = ''
    if isinstance(value, list) and value and isinstance(value[0], dict):
      hint = ': is it chat data? give --config.text.chat=true'
    raise UserError(f'{where}: {column!r} is {_json(value)}, not text{hint}')
  else:
    words = value
  try:
    words.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'{where}: {column!r} has half a character, a lone surrogate, which is '
      'no text'
    ) from error
  return value


@contextlib.contextmanager
def _conversion(text: Config) -> Iterator[None]:
  """Turns what stops a copy into the cache into the user's mistake."""
  errors = _datasets().exceptions
  try:
    yield
  except errors.DatasetGenerationError as error:
    cause = error.__cause__ or error
    if isinstance(cause, UserError):
      raise cause from None
    raise UserError(
      f'text.path: cannot copy {text.path} into {cache_dir("datasets")}: '
      f'{_line(cause)}'
    ) from error
  except OSError as error:
    raise UserError(
      f'text.path: cannot write in {cache_dir("datasets")}: {_line(error)}'
    ) from error


def _empty(name: str) -> UserError:
  return UserError(f'text.path: {name} holds no document')


def _no_split(where: str, split: str, splits: Iterable[str]) -> UserError:
  return UserError(
    f'text.split: {where} has no split {split!r}{nearest(split, splits)}; it '
    f'has {", ".join(splits)}'
  )


def _json(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 40 else f'{text[:37]}...'


def _parent(root: Path, files: list[Path]) -> Path:
  """The folder that the names of a data set's files are relative to."""
  return root if all(f.is_relative_to(root) for f in files) else Path('/')


def _line(error: Any) -> str:
  """The beginning of the message of another library, in one line."""
  return ' '.join(str(error).split())[:200]
