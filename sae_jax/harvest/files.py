"""What every source of text shares: its files, their hash, and `Text`."""

import codecs
import difflib
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from sae_jax.errors import UserError
from sae_jax.harvest.chat import Messages

# text.kind -> how its files end; a saved data set is a folder, a hub data set
# a name.
SUFFIXES = {
  'txt': ('.txt',),
  'jsonl': ('.jsonl', '.jsonl.gz', '.jsonl.zst'),
  'parquet': ('.parquet',),
}
KINDS = (*SUFFIXES, 'datasets', 'hub')

_PIECE = 1 << 20  # bytes hashed at once


class Text(NamedTuple):
  """A corpus: its documents are numbered, and any of them can be read.

  bytes is the size of .txt files, for other sources that of the column in
  memory (its text and a few bytes a document). sha256 covers relative names
  and contents of the files, and what else decides the documents: column,
  split and chat; of a hub data set its name, revision and configuration.
  """

  name: str  # text.path, for messages
  documents: int
  files: int
  bytes: int
  sha256: str
  chat: bool  # documents are lists of messages, not strings
  read: Callable[[int], str | Messages]


def find_files(root: Path, kind: str) -> list[Path]:
  """The files of a kind in a folder, sorted; or the one file, however named."""
  if root.is_dir():
    files = sorted(
      path
      for path in root.rglob('*')
      if path.name.endswith(SUFFIXES[kind]) and path.is_file()
    )
  else:
    files = [root] if root.is_file() else []
  if not files:
    raise no_text(root)
  return files


def hash_files(
  root: Path, files: Iterable[Path], header: str = '', utf8: bool = False
) -> tuple[str, int]:
  """Hex digest of the header, names and contents, and the size in bytes.

  Raises UserError for a file that cannot be read or, with utf8, is no UTF-8.
  """
  digest, total = hashlib.sha256(header.encode()), 0
  for file in files:
    name = file.name if file == root else file.relative_to(root).as_posix()
    try:
      size = file.stat().st_size
      digest.update(f'{name}\0{size}\0'.encode())
      with open(file, 'rb') as opened:
        decoder = codecs.getincrementaldecoder('utf-8')()
        while piece := opened.read(_PIECE):
          digest.update(piece)
          if utf8:
            _check_utf8(decoder, piece, file, opened.tell() - len(piece))
      if utf8:
        _check_utf8(decoder, b'', file, size)
    except OSError as error:
      raise UserError(f'cannot read {file}: {error.strerror}') from error
    total += size
  return digest.hexdigest(), total


def _check_utf8(
  decoder: codecs.IncrementalDecoder, piece: bytes, file: Path, start: int
) -> None:
  """UserError with the byte that is not UTF-8; the piece begins at `start`."""
  before = len(decoder.getstate()[0])  # bytes of a character cut in two
  try:
    decoder.decode(piece, final=not piece)
  except UnicodeDecodeError as error:
    raise UserError(
      f'{file}: not UTF-8 at byte {start - before + error.start:,} '
      f'(0x{error.object[error.start]:02x}): convert it, for example with iconv'
    ) from error


def kind_of(file: Path) -> str:
  """The kind of source that a file's name says; '' for none."""
  for kind, suffixes in SUFFIXES.items():
    if file.name.endswith(suffixes):
      return kind
  return ''


def no_text(root: Path) -> UserError:
  beside = []
  if not root.exists() and root.parent.is_dir():
    beside = [path.name for path in root.parent.iterdir()]
  return UserError(
    f'text.path: no .txt file at {str(root)!r}{nearest(root.name, beside)}, '
    'and no .jsonl, .jsonl.gz, .jsonl.zst, .parquet or saved data set: give a '
    'file or a folder of them'
  )


def nearest(name: str, names: Iterable[str]) -> str:
  """', did you mean ...' when one of the names is near, else ''."""
  near = difflib.get_close_matches(name, names, 1)
  return f', did you mean {near[0]!r}' if near else ''


def no_column(where: str, column: str, columns: Iterable[str]) -> UserError:
  """The mistake of naming a column that a source has not."""
  columns = sorted(columns)
  return UserError(
    f'{where}: no column {column!r}{nearest(column, columns)}; it has '
    f'{", ".join(columns[:20]) or "none"}: give --config.text.column'
  )
