"""Pieces of sequences: boundaries kept, memory bounded, reasons given."""

import random
import tracemalloc

import numpy as np
import pytest
import tokenizers
from tiny_harvest import pack_all, tiny_subject

from sae_jax.errors import UserError
from sae_jax.harvest import packing
from sae_jax.harvest.files import Text
from sae_jax.harvest.packing import pack
from sae_jax.harvest.positions import all_of, first, without
from sae_jax.store.order import DOCUMENTS, permutation

TOKENIZER = tiny_subject().tokenizer
KEEP = all_of(first(1), without({0, 1, 2}))


def source(documents, read=None):
  """A corpus that lies nowhere; documents are strings, or a number of them."""
  if read is None:
    documents, read = len(documents), documents.__getitem__
  return Text('made', documents, 1, 0, '', False, read)


def pieces(text, **changes):
  values = {
    'bos': 0, 'separator': 1, 'length': 10, 'rows': 0, 'seed': 3, 'keep': KEEP,
  } | changes  # fmt: skip
  return pack(text, TOKENIZER, **values)


def cut_out(packed, length):
  """Tokens of each document by number, as a reader of a store finds them."""
  starts = packed.places[:, 1]
  step = length - 1
  flat = packed.sequences[:, 1:].ravel()
  at = (starts // length) * step + starts % length - 1
  ends = [*at[1:], len(flat)]
  return {
    int(number): flat[a : b - 1].tolist()
    for number, a, b in zip(packed.places[:, 0], at, ends, strict=True)
  }


@pytest.mark.parametrize('piece', [1, 3, 1024])
def test_documents_can_be_cut_out_again(monkeypatch, piece):
  monkeypatch.setattr(packing, '_PIECE', piece)
  # The text itself has the separator's string, and some documents are empty.
  documents = ['w1 </s> w2', '', '</s>', '</s> </s> w3', 'w4 ' * 30, '', 'w5']
  # Tokens in all are a multiple of 5: nothing is left out at the end.
  packed = pack_all(pieces(source([*documents, 'w6 ' * 24]), length=6))
  found = cut_out(packed, 6)
  wanted = [TOKENIZER.encode(document).ids for document in documents]
  assert sum(map(len, wanted)) + 24 + 8 == 5 * len(packed.sequences)
  assert found == dict(enumerate([*wanted, TOKENIZER.encode('w6 ' * 24).ids]))
  order = permutation(8, 3, DOCUMENTS)
  assert packed.places[:, 0].tolist() == order.tolist()
  # No document begins where the BOS stands.
  assert (packed.places[:, 1] % 6 > 0).all()


def test_pieces_count_and_end_with_the_last_row(monkeypatch):
  monkeypatch.setattr(packing, '_PIECE', 4)
  text = source([f'w{i} ' * 25 for i in range(20)])
  found = list(pieces(text, rows=200))
  assert [len(piece.sequences) for piece in found[:-1]] == [4] * 5
  rows = np.cumsum([piece.keep.sum() for piece in found])
  begun = np.cumsum([len(piece.documents) for piece in found])
  assert [piece.rows_so_far for piece in found[:-1]] == rows[:-1].tolist()
  assert found[-1].rows_so_far == 200 <= rows[-1]
  assert rows[-1] - found[-1].keep[-1].sum() < 200
  assert [piece.documents_so_far for piece in found] == begun.tolist()
  place = 0
  for piece in found:
    assert piece.sequences.dtype == np.int32 and piece.keep.dtype == bool
    assert piece.documents.dtype == np.int64
    inside = piece.documents[:, 1] - place
    assert ((inside >= 0) & (inside < piece.sequences.size)).all()
    place += piece.sequences.size


def test_what_is_read_goes_with_the_rows_asked_for(monkeypatch):
  monkeypatch.setattr(packing, '_CHUNK', 1)
  monkeypatch.setattr(packing, '_PIECE', 1)
  read = []
  text = source(1000, lambda i: read.append(i) or 'w1 ' * 30)
  list(pieces(text, rows=50))
  assert len(read) <= 3


@pytest.mark.parametrize('rows', [0, 10_000])
@pytest.mark.parametrize('piece', [1, 3, 1024])
def test_sequences_without_a_row_wait_for_one(monkeypatch, piece, rows):
  monkeypatch.setattr(packing, '_PIECE', piece)
  only = lambda tokens: tokens == 3 + 7
  documents = ['w7', 'w1 ' * 50, 'w7', 'w2 ' * 50]
  order = permutation(4, 3, DOCUMENTS)
  text = source([documents[i] for i in np.argsort(order)])
  packed = pack_all(pieces(text, keep=only, rows=rows))
  # Two tokens, 51 and the row: in the sixth sequence of nine tokens.
  assert packed.keep.sum() == packed.rows == 2
  assert len(packed.sequences) == 6
  assert packed.keep[0, 1] and packed.keep[5, 9]
  # The fourth document begins two tokens later, and is not there.
  assert packed.places.tolist() == [
    [order[0], 1], [order[1], 3], [order[2], 59]
  ]  # fmt: skip


def test_without_a_bos_the_separator_comes_first():
  packed = pack_all(pieces(source(['w1 ' * 40] * 3), bos=None))
  assert (packed.sequences[:, 0] == 1).all()
  assert (packed.sequences[0, 1:] == 4).all()


def peak(documents):
  """Most bytes of Python and numpy held while packing so many documents."""
  text = source(documents, lambda i: f'w{i % 37} ' * 500)
  tracemalloc.start()
  try:
    tokens = sum(p.sequences.size for p in pieces(text, length=64))
    return tracemalloc.get_traced_memory()[1], tokens
  finally:
    tracemalloc.stop()


def test_memory_does_not_grow_with_the_text(monkeypatch):
  monkeypatch.setattr(packing, '_CHUNK', 10_000)
  monkeypatch.setattr(packing, '_PIECE', 32)
  (small, few), (large, many) = peak(60), peak(600)
  assert many > 9 * few
  # All ids would be 1.2 MB more.
  assert large < small + 100_000


@pytest.mark.parametrize('literal', [False, True])
def test_a_tokenizer_that_cuts_and_pads_does_not_here(literal):
  tokenizer, cutting = tiny_subject().tokenizer, tiny_subject().tokenizer
  cutting.enable_truncation(5)
  cutting.enable_padding(length=8)
  for each in (tokenizer, cutting):
    each.add_special_tokens(['<sep>'])  # id 40
    each.encode_special_tokens = literal  # plain text may keep it so
  out = [
    pack_all(
      pack(
        source(['<sep> w1 ' * 40, 'w2']), each, bos=0, separator=1, length=10,
        rows=0, seed=3, keep=KEEP,
      )
    ).sequences
    for each in (tokenizer, cutting)
  ]  # fmt: skip
  np.testing.assert_array_equal(*out)
  assert (out[0] == 40).any() == (not literal)
  # The caller's is as it was.
  assert cutting.truncation and cutting.padding


@pytest.mark.parametrize(
  'documents, changes, message',
  [
    (['w1 w2'], {}, '1 documents give 3 tokens .* a sequence takes 9: more'),
    (['new ' * 50], {}, "none of 50 tokens .* 100% of them are '<unk>'"),
    (
      ['w1 ' * 50],
      {'keep': without(set(range(40)))},
      "none of 50 tokens .* 100% of them are 'w1'",
    ),
    (['w1 ' * 50], {'keep': lambda tokens: tokens}, 'must give bool'),
  ],
)
def test_no_row_says_why(documents, changes, message):
  with pytest.raises(UserError, match=message) as caught:
    list(pieces(source(documents), **changes))
  assert '\n' not in str(caught.value)


def test_a_long_way_without_a_row_ends(monkeypatch):
  monkeypatch.setattr(packing, '_ROWLESS', 1000)
  monkeypatch.setattr(packing, '_PIECE', 4)
  read = []
  text = source(10**5, lambda i: read.append(i) or 'new ' * 500)
  monkeypatch.setattr(packing, '_CHUNK', 1)
  with pytest.raises(UserError, match='gets a row'):
    list(pieces(text))
  assert len(read) < 10


@pytest.mark.parametrize('bos', [0, None])
def test_a_document_does_not_bring_a_bos_or_a_byte_order_mark(bos):
  first = '<s>' if bos == 0 else '</s>'
  bare = [f'w{i} w5 {first} w6' for i in range(10)]
  own = [f'\ufeff{first} {first} {text}' for text in bare[:5]]
  want, found = (
    pack_all(pieces(source(documents), bos=bos, length=6))
    for documents in (bare, [*own, *bare[5:]])
  )
  for a, b in zip(want, found, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  'template, kept',
  [
    ("{{'<s>' + m}}", True),
    ('<s>{{ m }}', False),
    ('{{ bos_token }} <s>', False),
  ],
)
def test_a_bos_that_begins_every_message_stays(template, kept):
  packed = pack_all(
    pieces(source(['<s> w1 w2'] * 5), chat_template=template, length=9)
  )
  assert packed.sequences[0, 1:4].tolist() == ([0, 4, 5] if kept else [4, 5, 1])


def byte_level(texts):
  t = tokenizers.Tokenizer(tokenizers.models.BPE())
  t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  t.train_from_iterator(
    texts,
    tokenizers.trainers.BpeTrainer(
      vocab_size=400,
      show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  return t


def sentence_piece(texts):
  """As of Llama: nothing is cut, and a blank is written before a text."""
  t = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='?'))
  t.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400, show_progress=False, special_tokens=['?']
  )
  t.train_from_iterator(texts, trainer)
  t.pre_tokenizer = None  # type: ignore
  steps = tokenizers.normalizers
  t.normalizer = steps.Sequence([steps.Prepend('▁'), steps.Replace(' ', '▁')])
  return t


@pytest.mark.parametrize('make', [byte_level, sentence_piece])
def test_a_long_document_is_cut_where_no_id_changes(monkeypatch, make):
  monkeypatch.setattr(packing, '_LONG', 1000)
  monkeypatch.setattr(packing, '_SPAN', 500)
  draw = random.Random(0)
  words = [''.join(draw.choices('abcdé😀', k=1 + i % 9)) for i in range(200)]
  text = ' '.join(draw.choices([*words, '\n\n ', '1234,'], k=1200))
  tokenizer = make([text])
  cut = [*packing._pieces(tokenizer, text)]
  assert len(cut) > 10 and max(map(len, cut)) < 600
  whole, short = (tokenizer.encode(t).ids for t in (text, text[:1000]))
  assert [*packing._encode(tokenizer, [text[:1000], text])] == [short, whole]
  # One word: cut all the same, and nothing is lost.
  word = ''.join(draw.choices('abcd', k=2000))
  pieces = [*packing._pieces(tokenizer, word)]
  assert ''.join(pieces) == word and max(map(len, pieces)) < 600
