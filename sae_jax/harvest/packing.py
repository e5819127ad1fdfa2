"""Documents to sequences of token ids, in pieces that fit in memory.

Documents are shuffled by seed, tokenised, laid end to end and cut into
sequences of one length, each with the BOS token first.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tqdm import tqdm

from sae_jax.errors import UserError
from sae_jax.harvest.chat import make_render
from sae_jax.harvest.files import Text
from sae_jax.harvest.positions import Filter, apply
from sae_jax.store.order import DOCUMENTS, permutation

# Characters handed to the tokeniser at once: enough for all its threads.
_CHUNK = 1 << 20
# A document of more is cut: one without a blank is a single word, which only
# one thread works on (12 MB: 2.5 GB of memory, cut 0.9).
_LONG = 1 << 20
_SPAN = 1 << 16
# Sequences cut at once.
_PIECE = 1024
# Tokens without a row that are held back until the next row: 256 MB.
_ROWLESS = 1 << 26


class Piece(NamedTuple):
  """Some sequences in order, and how far they have come.

  sequences: token ids [n, T] int32; keep: bool [n, T], tokens with a row.
  documents: [m, 2] int64, the documents that begin in these sequences: number
    in the source, and place of the first token (of the separator for an empty
    document), sequence * T + position, counted from the first piece.
  rows_so_far: rows of this and all pieces before, at most those asked for.
  documents_so_far: documents that begin in them.
  """

  sequences: np.ndarray
  keep: np.ndarray
  documents: np.ndarray
  rows_so_far: int
  documents_so_far: int


def pack(
  text: Text,
  tokenizer: tokenizers.Tokenizer,
  *,
  bos: int | None,
  separator: int,
  length: int,
  rows: int,
  seed: int,
  keep: Filter,
  chat_template: str | None = None,
) -> Iterator[Piece]:
  """The first sequences of the shuffled corpus that hold `rows` rows.

  Args:
    bos: first token of every sequence; None: the separator stands there.
    separator: written after every document.
    length: tokens in a sequence, T.
    rows: rows to pack, 0 for all there are.
    keep: which tokens get a row (harvest/positions.py).
    chat_template: writes a chat's messages as text; needed for chats.

  The last sequence holds the last row. The sequences for fewer rows are the
  beginning of those for more. What is left at the end, less than a sequence,
  is dropped. About 1,024 sequences come at a time; memory holds those, a chunk
  of documents, and 16 bytes a document for their order.

  Raises UserError when there is no row at all, saying why, and for a document
  that cannot be read or rendered.
  """
  render = (
    make_render(tokenizer, chat_template, bos, separator) if text.chat else None
  )
  first = separator if bos is None else bos
  own = None if _marks_messages(tokenizer, first, chat_template) else first
  ids = _token_ids(
    text, _plain(tokenizer, text.chat), render, own, separator, seed, rows == 0
  )
  return _budget(_cut(ids, length, first), rows, keep, tokenizer)


def _budget(
  pieces: Iterator[tuple[np.ndarray, np.ndarray]],
  rows: int,
  keep: Filter,
  tokenizer: tokenizers.Tokenizer,
) -> Iterator[Piece]:
  """Pieces with their rows, ending at the sequence of the last row.

  Sequences without a row are held back until one with a row follows.
  """
  done = found = begun = 0  # sequences, rows and documents yielded
  held, starts = [], []  # sequences and documents not yet yielded
  for sequences, documents in pieces:
    starts.append(documents)
    kept = apply(keep, sequences)
    ends = found + np.cumsum(np.count_nonzero(kept, axis=1))
    if ends[-1] == found:
      held.append(sequences)
      if sum(map(np.size, held)) > _ROWLESS:
        raise _no_row(held, tokenizer)
      continue
    found = min(rows, int(ends[-1])) if rows else int(ends[-1])
    count = int(np.searchsorted(ends, found)) + 1
    out = np.concatenate([*held, sequences[:count]])
    keeps = np.zeros(out.shape, bool)
    keeps[-count:] = kept[:count]
    done += len(out)
    there = np.concatenate(starts)
    cut = np.searchsorted(there[:, 1], done * out.shape[1])
    begun += int(cut)
    yield Piece(out, keeps, there[:cut], found, begun)
    if rows and found == rows:
      return
    held, starts = [sequences[count:]], [there[cut:]]
  if not found:
    raise _no_row(held, tokenizer)


def _no_row(
  sequences: list[np.ndarray], tokenizer: tokenizers.Tokenizer
) -> UserError:
  """Why there is no row: the token that most of the text is made of."""
  ids = np.concatenate([s[:, 1:].ravel() for s in sequences[:8]])
  counts = np.bincount(ids)
  word, share = tokenizer.id_to_token(int(counts.argmax())), counts.max()
  return UserError(
    f'text.path: none of {sum(map(np.size, sequences)):,} tokens gets a row; '
    f'{100 * share / len(ids):.0f}% of them are {word!r}: check that text and '
    'tokenizer belong together, and harvest.skip_first, skip_special and '
    'skip_tokens'
  )


def _cut(
  stream: Iterator[tuple[int, np.ndarray]], length: int, first: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Sequences [n, T] and the documents [m, 2] that begin in them.

  stream: numbers of documents and their ids, separator included.
  """
  step = length - 1
  parts, size = [], 0  # tokens that are in no sequence yet
  starts, place = [], 0  # documents that are in none, tokens of the stream
  emitted = count = 0
  for document, ids in itertools.chain(stream, [(0, None)]):
    if ids is not None:
      starts.append((document, place // step * length + place % step + 1))
      parts.append(ids)
      count += 1
      size += len(ids)
      place += len(ids)
    if size < _PIECE * step and ids is not None:
      continue
    flat = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    # Whole pieces; at the end, what there is.
    whole = size // step if ids is None else size // (step * _PIECE) * _PIECE
    begun = np.array(starts, np.int64).reshape(-1, 2)
    for a in range(0, whole, _PIECE):
      n = min(_PIECE, whole - a)
      out = np.full((n, length), first, np.int32)
      out[:, 1:] = flat[a * step : (a + n) * step].reshape(n, step)
      emitted += n
      cut = np.searchsorted(begun[:, 1], emitted * length)
      yield out, begun[:cut]
      begun = begun[cut:]
    starts = [tuple(row) for row in begun]
    # A copy: a view would keep the whole document alive.
    parts = [flat[whole * step :].copy()]
    size -= whole * step
  if not emitted:
    raise UserError(
      f'text.path: {count:,} documents give {size:,} tokens (one after each '
      f'is counted), a sequence takes {step:,}: more text, or a lower '
      'harvest.sequence_length'
    )


def _token_ids(
  text: Text,
  tokenizer: tokenizers.Tokenizer,
  render: Callable[..., str] | None,
  own: int | None,
  separator: int,
  seed: int,
  everything: bool,
) -> Iterator[tuple[int, np.ndarray]]:
  """Documents in shuffled order, tokenised by the chunk, with separators.

  They lose a byte order mark, and `own`, a BOS that they begin with: sequences
  bring one.
  """
  order = permutation(text.documents, seed, DOCUMENTS)
  # Only a whole corpus has a known end to show progress towards.
  bar = tqdm(
    total=text.documents, desc='tokenise', unit=' documents', unit_scale=True,
    disable=None if everything else True,
  )  # fmt: skip
  chunk, begin, size = [], 0, 0
  with bar:
    for n, i in enumerate(order):
      document: Any = text.read(int(i))
      if render:
        document = render(document, f'{text.name}, document {i:,}')
      chunk.append(document.lstrip('\ufeff'))
      size += len(document) + 64  # a thousand empty ones are something, too
      if size < _CHUNK and n < len(order) - 1:
        continue
      encoded = _encode(tokenizer, chunk)
      for k, ids in zip(order[begin : n + 1], encoded, strict=True):
        bare = itertools.dropwhile(lambda i: i == own, ids)
        yield int(k), np.array([*bare, separator], np.int32)
      bar.update(len(chunk))
      chunk, begin, size = [], n + 1, 0


def _encode(
  tokenizer: tokenizers.Tokenizer, documents: list[str]
) -> Iterator[list[int]]:
  """The ids of each document; a long one is cut for the tokeniser."""
  cut = [[*_pieces(tokenizer, text)] for text in documents]
  flat = [piece for pieces in cut for piece in pieces]
  found = iter(tokenizer.encode_batch_fast(flat, add_special_tokens=False))
  for pieces in cut:
    yield [i for _ in pieces for i in next(found).ids]


def _pieces(tokenizer: tokenizers.Tokenizer, text: str) -> Iterator[str]:
  """A text, cut if it is long, where that changes no id for 200 characters
  around: of words none at all. (Some tokenizers write a blank before a text:
  there the one at the cut is left out.) Without such a place, anywhere.
  """
  ids = lambda a, b: tokenizer.encode(text[a:b], add_special_tokens=False).ids
  same = lambda cut: (
    ids(cut[0] - 200, cut[0]) + ids(cut[1], cut[1] + 200)
    == ids(cut[0] - 200, cut[1] + 200)
  )
  begin = 0
  for at in range(_SPAN, len(text) if len(text) > _LONG else 0, _SPAN):
    near = range(at, min(at + 64, len(text)))
    blanks = [(i, i + 1) for i in near if text[i] == ' ']
    places = [*((i, i) for i in near), *blanks]
    end, start = next(filter(same, places), (at, at))
    yield text[begin:end]
    begin = start
  yield text[begin:]


def _marks_messages(
  tokenizer: tokenizers.Tokenizer, token: int, template: str | None
) -> bool:
  """Whether a chat template begins messages with the token, as SmolLM2's does
  with its BOS, <|im_start|>: in a text it is none then."""
  word, template = str(tokenizer.id_to_token(token)), template or ''
  return template.find(word) > 0 and 'bos_token' not in template


def _plain(tokenizer: tokenizers.Tokenizer, chat: bool) -> tokenizers.Tokenizer:
  """The tokenizer without the cutting and padding that some files switch on.

  For chats it must read special tokens, which the template writes as text.
  """
  literal = tokenizer.encode_special_tokens and not chat  # a copy forgets it
  tokenizer = copy.deepcopy(tokenizer)
  tokenizer.no_truncation()
  tokenizer.no_padding()
  tokenizer.encode_special_tokens = literal
  return tokenizer
