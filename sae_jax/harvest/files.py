"""What every source of text shares: its files, their hash, and `Text`."""

import bz2
import codecs
import contextlib
import difflib
import gzip
import hashlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sae_jax.errors import UserError
from sae_jax.harvest.chat import Messages

FILES = ('txt', 'jsonl', 'parquet')
KINDS = (*FILES, 'datasets', 'hub')  # a folder, and a name
# How a file ends, in small letters -> text.kind; 'other' is not taken for plain
# text without being asked.
_ENDINGS = {
  'txt': 'txt', 'jsonl': 'jsonl', 'ndjson': 'jsonl', 'jsonlines': 'jsonl',
  'jl': 'jsonl', 'parquet': 'parquet', 'parq': 'parquet', 'pq': 'parquet',
  **dict.fromkeys('json csv tsv arrow zip tar tgz'.split(), 'other'),
}  # fmt: skip
COMPRESSED = ('.gz', '.bz2', '.xz', '.zst')  # on top of any ending

# How files begin that are no text, whatever their names say.
_NO_TEXT = {
  rb'\x1f\x8b\x08|BZh\d1AY&SY|\xfd7zXZ\0|\x28\xb5\x2f\xfd': 'compressed data',
  rb'PAR1\x15': 'Parquet', rb'\xff\xfe|\xfe\xff': 'UTF-16',
  rb'%PDF-|PK\x03\x04|.*\0': 'binary data',
}  # fmt: skip
_JSON = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*"[^"\n]*"\s*:')

_PIECE = 1 << 20  # bytes hashed at once


class Text(NamedTuple):
  """A corpus: its documents are numbered, and any of them can be read.

  bytes is the size of .txt files (uncompressed), for other sources that of the
  column in memory (its text and a few bytes a document). sha256 covers relative
  names and contents of the files, and what else decides the documents: column,
  split and chat; of a hub data set its name, revision and configuration.
  """

  name: str  # text.path, for messages
  documents: int
  files: int
  bytes: int
  sha256: str
  chat: bool  # documents are lists of messages, not strings
  read: Callable[[int], str | Messages]


def find_files(root: Path, kind: str, asked: bool) -> list[Path]:
  """The files of a kind in a folder, sorted; or the one file, however named.

  asked: the config names the kind. Raises UserError where there is none, and
  for one that begins like a file of another kind.
  """
  if root.is_dir():
    files = [file for file in seen(root) if kind_of(file) == kind]
  else:
    files = [root] if root.is_file() else []
  if not files:
    raise no_text(root)
  for file in files:
    with reading(file), opened(file) as raw:
      head = raw.read(4096)
    for magic, what in _NO_TEXT.items():
      if kind != 'parquet' and re.match(magic, head, re.DOTALL):
        raise UserError(
          f'{file}: holds {what}, not {kind}: rename it, or convert it'
        )
    if kind == 'txt' and not asked and _JSON.match(head):
      raise UserError(
        f'{file}: holds JSON: give --config.text.kind=jsonl for a document a '
        'line, or txt to harvest it as it is'
      )
  return files


def seen(root: Path) -> list[Path]:
  """The files below a folder, sorted, less those that are or lie hidden."""
  hidden = lambda f: any(x[0] == '.' for x in f.relative_to(root).parts)
  return sorted(f for f in root.rglob('*') if f.is_file() and not hidden(f))


def hash_files(
  root: Path, files: Iterable[Path], header: str = '', text: bool = False
) -> tuple[str, int]:
  """Hex digest of the header, names and contents, and the size in bytes.

  text: of what is in compressed files. Raises UserError for a file that cannot
  be read or, with text, is no UTF-8.
  """
  digest, total = hashlib.sha256(header.encode()), 0
  for file in files:
    name = file.name if file == root else file.relative_to(root).as_posix()
    with reading(file), opened(file) if text else open(file, 'rb') as raw:
      digest.update(os.fsencode(name) + f'\0{file.stat().st_size}\0'.encode())
      decoder, piece, size = codecs.getincrementaldecoder('utf-8')(), b'-', 0
      while piece:
        piece = raw.read(_PIECE)
        digest.update(piece)
        start = size - len(decoder.getstate()[0])
        size += len(piece)
        try:
          decoder.decode(piece if text else b'', final=not piece)
        except UnicodeDecodeError as error:
          raise UserError(
            f'{file}: not UTF-8 at byte {start + error.start:,} (0x'
            f'{error.object[error.start]:02x}): convert it, for example with '
            'iconv'
          ) from error
      total += size
  return digest.hexdigest(), total


def opened(file: Path) -> io.BufferedIOBase:
  """A file's bytes, decompressed where its ending says so."""
  if (ending := file.suffix.lower()) == '.zst':
    return io.BufferedReader(_Zstandard(file), _PIECE)
  openers = {'.gz': gzip.open, '.bz2': bz2.open, '.xz': lzma.open}
  return openers.get(ending, open)(file, 'rb')


class _Zstandard(io.RawIOBase):
  """What is in a .zst file, of any window: that takes as much memory, at most
  2 GB. (pyarrow stops at 128 MB.)"""

  def __init__(self, file: Path):
    self._pieces, self._rest = _frames(file), b''

  def readable(self) -> bool:
    return True

  def readinto(self, into: Any) -> int:
    while not self._rest and (piece := next(self._pieces, None)) is not None:
      self._rest = piece
    count = min(len(into), len(self._rest))
    into[:count], self._rest = self._rest[:count], self._rest[count:]
    return count


def _frames(file: Path) -> Iterator[bytes]:
  """zstandard's own reader takes a file that was cut off for a whole one."""
  import zstandard

  every, frame = zstandard.ZstdDecompressor(max_window_size=1 << 31), None
  with open(file, 'rb') as raw:
    # Small pieces: a byte of them may become thousands.
    while piece := (frame and frame.unused_data) or raw.read(1 << 14):
      frame = every.decompressobj() if not frame or frame.eof else frame
      try:
        yield frame.decompress(piece)
      except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
  if frame and not frame.eof:
    raise EOFError('cut off within a Zstandard frame')


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
  """Turns what stops the reading of a file into the user's mistake."""
  try:
    yield
  except (
    OSError, EOFError, zlib.error, lzma.LZMAError, ImportError
  ) as error:  # fmt: skip
    said = ' '.join(str(getattr(error, 'strerror', 0) or error).split())
    raise UserError(f'cannot read {file}: {said}') from error


def kind_of(file: Path) -> str:
  """The kind of source that a file's name says, 'other' for one that we do not
  read; '' for none."""
  name = Path(file.name.lower())
  name = Path(name.stem) if name.suffix in COMPRESSED else name
  return _ENDINGS.get(name.suffix[1:], '')


def no_text(root: Path) -> UserError:
  beside = []
  if not root.exists() and root.parent.is_dir():
    beside = [path.name for path in root.parent.iterdir()]
  return UserError(
    f'text.path: no .txt file at {str(root)!r}{nearest(root.name, beside)}, '
    f'and no .jsonl or .parquet, {", ".join(COMPRESSED)} of them, or saved '
    'data set: give a file or a folder of them (hidden ones do not count)'
  )


def no_document(name: str) -> UserError:
  return UserError(f'text.path: {name} holds no document')


def nearest(name: str, names: Iterable[str]) -> str:
  """', did you mean ...' when one of the names is near, else ''."""
  near = difflib.get_close_matches(name, names, 1)
  return f', did you mean {near[0]!r}' if near else ''
