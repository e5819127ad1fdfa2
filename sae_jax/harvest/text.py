"""Text files to sequences of token ids, and which tokens become rows.

A .txt file is a document. Documents are shuffled by seed, tokenised, laid end
to end and cut into sequences of one length, each with the BOS token first.
"""

import hashlib
from collections.abc import Iterator, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tqdm import tqdm

from sae_jax.errors import UserError
from sae_jax.store.order import DOCUMENTS, permutation

# Characters handed to the tokeniser at once: enough for all its threads.
_CHUNK = 1 << 20


class Text(NamedTuple):
  """The .txt files of a corpus in the order of their names, checked.

  sha256 covers relative names and contents; bytes is their total size.
  """

  files: tuple[Path, ...]
  sha256: str
  bytes: int


class Packed(NamedTuple):
  """sequences: token ids [Q, T] int32; keep: bool [Q, T], tokens with a row.

  rows: rows there are, or that were asked for; documents: documents read.
  """

  sequences: np.ndarray
  keep: np.ndarray
  rows: int
  documents: int


def scan(path: str) -> Text:
  """Finds, hashes and checks the text: a .txt file or a folder of them.

  Raises UserError when there is none, or a file is not UTF-8 (naming the file
  and the byte).
  """
  root = Path(path).expanduser()
  files = sorted(root.rglob('*.txt')) if root.is_dir() else [root]
  if not files or not files[0].is_file():
    raise UserError(
      f'text.path: no .txt file at {path!r}: give a text file or a folder of '
      'them'
    )
  digest, size = hashlib.sha256(), 0
  for file in files:
    raw = file.read_bytes()
    try:
      raw.decode('utf-8')
    except UnicodeDecodeError as error:
      raise UserError(
        f'{file}: not UTF-8 at byte {error.start:,} '
        f'(0x{raw[error.start]:02x}): convert it, for example with iconv'
      ) from error
    name = file.name if file == root else file.relative_to(root).as_posix()
    digest.update(f'{name}\0{len(raw)}\0'.encode() + raw)
    size += len(raw)
  return Text(tuple(files), digest.hexdigest(), size)


def pack(
  text: Text,
  tokenizer: tokenizers.Tokenizer,
  *,
  length: int,
  bos: int,
  separator: int,
  special: Set[int],
  rows: int,
  seed: int,
) -> Packed:
  """The first sequences of the shuffled corpus that hold `rows` rows.

  Args:
    length: tokens in a sequence, T; the first is `bos`.
    separator: written after every document.
    special: ids that never become rows; position 0 never does either.
    rows: rows to pack, 0 for all there are.

  The sequences for fewer rows are the beginning of those for more. What is
  left at the end, less than a sequence, is dropped.
  """
  stream: list[np.ndarray] = []
  specials = np.fromiter(special, np.int32)
  found = documents = 0
  for ids in _token_ids(text, tokenizer, seed, rows == 0):
    stream.append(np.array([*ids, separator], np.int32))
    found += np.count_nonzero(~np.isin(stream[-1], specials))
    documents += 1
    # The tail that is dropped may take length - 2 tokens with it.
    if rows and found - (length - 2) >= rows:
      break
  flat = np.concatenate(stream)
  count = len(flat) // (length - 1)
  sequences = np.full((count, length), bos, np.int32)
  sequences[:, 1:] = flat[: count * (length - 1)].reshape(count, length - 1)
  keep = ~np.isin(sequences, specials)
  keep[:, 0] = False
  ends = np.cumsum(np.count_nonzero(keep, axis=1))
  there = int(ends[-1]) if count else 0
  rows = min(rows, there) if rows else there
  needed = int(np.searchsorted(ends, rows)) + 1 if rows else 0
  return Packed(sequences[:needed], keep[:needed], rows, documents)


def _token_ids(
  text: Text, tokenizer: tokenizers.Tokenizer, seed: int, everything: bool
) -> Iterator[list[int]]:
  """Token ids of the documents in shuffled order, tokenised by the chunk."""
  order = permutation(len(text.files), seed, DOCUMENTS)
  # Only a whole corpus has a known end to show progress towards.
  bar = tqdm(
    total=text.bytes, desc='tokenise', unit='B', unit_scale=True,
    disable=None if everything else True,
  )  # fmt: skip
  chunk, size = [], 0
  with bar:
    for n, i in enumerate(order):
      chunk.append(text.files[i].read_bytes().decode('utf-8'))
      size += len(chunk[-1])
      bar.update(text.files[i].stat().st_size)
      if size >= _CHUNK or n == len(order) - 1:
        encodings = tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
        yield from (encoding.ids for encoding in encodings)
        chunk, size = [], 0
