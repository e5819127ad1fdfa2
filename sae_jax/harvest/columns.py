"""A column of JSON lines and Parquet files, value after value.

`a.b` is the key b of the object, or the field b of the struct, in column a.
"""

import codecs
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sae_jax.errors import UserError
from sae_jax.harvest import files
from sae_jax.harvest.chat import check_messages


def rows(
  paths: Sequence[Path], kind: str, column: str, chat: bool
) -> Iterator[dict[str, Any]]:
  """The documents of files; UserError with the line or row of a bad one."""
  empty = True
  for file in paths:
    found = _lines(file) if kind == 'jsonl' else _parquet_rows(file, column)
    for where, row in found:
      yield {column: _value(row, column, chat, where)}
      empty = False
  if empty:
    raise files.no_document(', '.join(map(str, paths[:3])))


def _value(row: Any, column: str, chat: bool, where: str) -> Any:
  """The document of a line, as bytes, or of a row."""
  try:
    if isinstance(row, bytes):
      row = json.loads(row.removeprefix(codecs.BOM_UTF8).decode('utf-8'))
    if not isinstance(row, dict):
      raise UserError(
        f'{where}: {_short(row)} is no object like {{"{column}": ...}}'
      )
    value = value_of(row, column)
    words = value = check_messages(value, where) if chat else value
    if chat:
      words = ''.join(m['role'] + m['content'] for m in value)
    if not isinstance(words, str):
      hint = ''
      if isinstance(value, list) and value and isinstance(value[0], dict):
        hint = ': is it chat data? give --config.text.chat=true'
      raise UserError(f'{where}: {column!r} is {_short(value)}, not text{hint}')
    words.encode()
  except KeyError as error:
    fits = lambda value: isinstance(value, list if chat else str)
    fit = [c for c, value in columns_of(row).items() if fits(value)]
    raise no_column(where, column, fit) from error
  except UnicodeDecodeError as error:
    raise no_utf8(where, error) from error
  except UnicodeEncodeError as error:
    raise UserError(
      f'{where}: {column!r} has half a character, a lone surrogate, which is '
      'no text'
    ) from error
  except json.JSONDecodeError as error:
    raise UserError(
      f'{where}: not JSON: {error.msg} at character {error.pos:,}'
    ) from error
  return value


def value_of(row: dict[str, Any], column: str) -> Any:
  """row[column], or row['a']['b'] for 'a.b'; KeyError where there is none.

  Bytes must be UTF-8.
  """
  value: Any = row
  for key in [column] if column in row else column.split('.'):
    if not isinstance(value, dict | None):
      raise KeyError(key)
    value = value and value[key]
  return value.decode('utf-8') if isinstance(value, bytes) else value


def columns_of(value: Any, name: str = '') -> dict[str, Any]:
  """What stands in nested dicts, by dotted names."""
  if not isinstance(value, dict):
    return {name: value}
  found = {}
  for key, inner in value.items():
    found |= columns_of(inner, f'{name}.{key}' if name else key)
  return found


@contextlib.contextmanager
def parquet(file: Path) -> Iterator[Any]:
  """A Parquet file, opened; it may be compressed as a whole."""
  import pyarrow.parquet

  packed = file.suffix.lower() in files.COMPRESSED
  with (
    files.reading(file),
    files.opened(file) as raw,
    tempfile.TemporaryFile() as whole,
  ):
    if packed:  # it is read from its end
      shutil.copyfileobj(raw, whole)
    try:
      yield pyarrow.parquet.ParquetFile(whole if packed else raw)
    except ValueError as error:  # pyarrow's errors are such
      raise UserError(
        f'{file}: no Parquet file, or a damaged one: {line(error)}'
      ) from error


def _parquet_rows(file: Path, column: str) -> Iterator[tuple[str, Any]]:
  number = 0
  with parquet(file) as table:
    for batch in table.iter_batches(256, columns=[column]):
      for row in batch.to_pylist():
        yield f'{file}, row {number:,}', row
        number += 1


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
  with files.reading(file), files.opened(file) as raw:
    for number, text in enumerate(raw, 1):
      if text.strip():
        yield f'{file}, line {number:,}', text


def no_utf8(where: str, error: UnicodeDecodeError) -> UserError:
  at, byte = error.start, error.object[error.start]
  return UserError(f'{where}: not UTF-8 at byte {at:,} (0x{byte:02x})')


def no_column(where: str, column: str, fit: list[str]) -> UserError:
  """The mistake of naming a column that a source has not; fit: what it has."""
  near = files.nearest(column, fit)
  return UserError(f'{where}: no column {column!r}{near}: {propose(fit)}')


def propose(fit: list[str]) -> str:
  if not fit:
    return 'no other column fits'
  return f'give --config.text.column={" or ".join(sorted(fit)[:20])}'


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 40 else f'{text[:37]}...'


def line(error: Any) -> str:
  """The beginning of the message of another library, in one line."""
  return ' '.join(str(error).split())[:200]
