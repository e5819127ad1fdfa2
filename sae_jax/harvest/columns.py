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
from sae_jax.harvest.chat import check_messages
from sae_jax.harvest.files import (
  COMPRESSED,
  nearest,
  no_document,
  opened,
  reading,
)


def rows(
  files: Sequence[Path], kind: str, column: str, chat: bool
) -> Iterator[dict[str, Any]]:
  """The documents of files; UserError with the line or row of a bad one."""
  values, empty = _json_values if kind == 'jsonl' else _parquet_values, True
  for file in files:
    for where, value in values(file, column, chat):
      yield {column: _checked(value, column, chat, where)}
      empty = False
  if empty:
    raise no_document(', '.join(map(str, files[:3])))


def _checked(value: Any, column: str, chat: bool, where: str) -> Any:
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


def value_of(row: Any, column: str) -> Any:
  """row[column], or row['a']['b'] for 'a.b'; KeyError where there is none.

  Bytes must be UTF-8.
  """
  for key in [column] if column in row else column.split('.'):
    if row is not None:
      if not isinstance(row, dict):
        raise KeyError(key)
      row = row[key]
  return row.decode('utf-8') if isinstance(row, bytes) else row


def columns_of(value: Any, name: str = '') -> dict[str, Any]:
  """What stands in nested dicts, by dotted names."""
  if not isinstance(value, dict):
    return {name: value}
  found = {}
  for key, inner in value.items():
    found |= columns_of(inner, f'{name}.{key}' if name else key)
  return found


@contextlib.contextmanager
def opened_parquet(file: Path) -> Iterator[Any]:
  """A Parquet file, opened; it may be compressed as a whole."""
  import pyarrow.parquet

  with reading(file), contextlib.ExitStack() as stack:
    raw = stack.enter_context(opened(file))
    if file.suffix.lower() in COMPRESSED:  # it must be read from its end
      whole = stack.enter_context(tempfile.TemporaryFile())
      shutil.copyfileobj(raw, whole)
      raw = whole
    try:
      yield pyarrow.parquet.ParquetFile(raw)
    except ValueError as error:  # pyarrow's errors are such
      raise UserError(
        f'{file}: no Parquet file, or a damaged one: {line(error)}'
      ) from error


def _parquet_values(
  file: Path, column: str, _: bool
) -> Iterator[tuple[str, Any]]:
  """(place, value) of the rows of a Parquet file."""
  number = 0
  with opened_parquet(file) as table:
    for batch in table.iter_batches(256, columns=[column]):
      for row in batch.to_pylist():
        where = f'{file}, row {number:,}'
        try:
          yield where, value_of(row, column)
        except UnicodeDecodeError as error:
          raise no_utf8(where, error) from error
        number += 1


def _json_values(
  file: Path, column: str, chat: bool
) -> Iterator[tuple[str, Any]]:
  """(place, value) of the lines of a file of JSON lines."""
  with reading(file), opened(file) as lines:
    for number, line in enumerate(lines, 1):
      if line.strip():
        where = f'{file}, line {number:,}'
        yield where, _json_value(line, column, chat, where)


def _json_value(line: bytes, column: str, chat: bool, where: str) -> Any:
  try:
    row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode('utf-8'))
  except UnicodeDecodeError as error:
    raise no_utf8(where, error) from error
  except json.JSONDecodeError as error:
    raise UserError(
      f'{where}: not JSON: {error.msg} at character {error.pos:,}'
    ) from error
  if not isinstance(row, dict):
    raise UserError(
      f'{where}: {_json(row)} is no object like {{"{column}": ...}}'
    )
  try:
    return value_of(row, column)
  except KeyError as error:
    fits = lambda value: isinstance(value, list if chat else str)
    fit = [c for c, value in columns_of(row).items() if fits(value)]
    raise no_column(where, column, fit) from error


def no_utf8(where: str, error: UnicodeDecodeError) -> UserError:
  return UserError(
    f'{where}: not UTF-8 at byte {error.start:,} '
    f'(0x{error.object[error.start]:02x})'
  )


def no_column(where: str, column: str, fit: list[str]) -> UserError:
  """The mistake of naming a column that a source has not; fit: what it has."""
  return UserError(
    f'{where}: no column {column!r}{nearest(column, fit)}: {propose(fit)}'
  )


def propose(fit: list[str]) -> str:
  if not fit:
    return 'no other column fits'
  return f'give --config.text.column={" or ".join(sorted(fit)[:20])}'


def _json(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 40 else f'{text[:37]}...'


def line(error: Any) -> str:
  """The beginning of the message of another library, in one line."""
  return ' '.join(str(error).split())[:200]
