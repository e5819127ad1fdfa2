"""Packing: documents in shuffled order, end to end, nothing lost but a tail."""

import numpy as np
import pytest
from tiny_harvest import pack_all, text_config, tiny_subject, write_text

from sae_jax.errors import UserError
from sae_jax.harvest import packing
from sae_jax.harvest.documents import scan as scan_block
from sae_jax.harvest.packing import pack
from sae_jax.harvest.positions import all_of, first, without
from sae_jax.store.order import DOCUMENTS, permutation

TOKENIZER = tiny_subject().tokenizer


def packed(text, rows=0, seed=1, length=10, special=frozenset([0, 1, 2])):
  pieces = pack(
    text, TOKENIZER, length=length, bos=0, separator=1,
    keep=all_of(first(1), without(special)), rows=rows, seed=seed,
  )  # fmt: skip
  return pack_all(pieces)


def scan(path, **values):
  return scan_block(text_config(path, **values))


def test_sequences_are_the_shuffled_documents_end_to_end(tmp_path):
  write_text(tmp_path)
  text = scan(str(tmp_path))
  out = packed(text)
  order = permutation(12, 1, DOCUMENTS)
  assert order.tolist() != list(range(12))
  stream = [
    id_ for i in order for id_ in [*TOKENIZER.encode(text.read(i)).ids, 1]
  ]
  assert (out.sequences[:, 0] == 0).all()
  flat = out.sequences[:, 1:].ravel().tolist()
  assert flat == stream[: len(flat)] and 0 <= len(stream) - len(flat) < 9
  assert not out.keep[:, 0].any()
  np.testing.assert_array_equal(out.keep[:, 1:], out.sequences[:, 1:] > 2)
  assert out.rows == out.keep.sum() and out.documents == 12


@pytest.mark.parametrize('rows', range(1, 120, 7))
def test_a_budget_takes_a_beginning(tmp_path, monkeypatch, rows):
  monkeypatch.setattr(packing, '_CHUNK', 1)  # every document by itself
  write_text(tmp_path)
  text = scan(str(tmp_path))
  whole, part = packed(text), packed(text, rows)
  count = len(part.sequences)
  np.testing.assert_array_equal(part.sequences, whole.sequences[:count])
  assert part.rows == rows
  assert part.keep.sum() >= rows > part.keep[:-1].sum()
  assert part.documents <= 4 < whole.documents


def test_position_0_has_no_row_even_where_bos_is_no_special_token(tmp_path):
  write_text(tmp_path)
  keep = packed(scan(str(tmp_path)), special=frozenset()).keep
  assert not keep[:, 0].any() and keep[:, 1:].all()


def test_more_rows_than_there_are(tmp_path):
  write_text(tmp_path, documents=1)
  text = scan(str(tmp_path))
  assert packed(text, 10_000).rows == packed(text).rows
  with pytest.raises(
    UserError, match=r'give 51 tokens \(.*, a sequence takes 999'
  ):
    packed(text, length=1000)


def test_chunks_make_no_difference(tmp_path, monkeypatch):
  write_text(tmp_path)
  text = scan(str(tmp_path))
  once = packed(text)
  monkeypatch.setattr(packing, '_CHUNK', 300)
  np.testing.assert_array_equal(packed(text).sequences, once.sequences)


def test_a_file_that_is_not_utf8_is_named_with_its_byte(tmp_path):
  write_text(tmp_path, documents=2)
  (tmp_path / 'sub').mkdir()
  path = tmp_path / 'sub' / 'latin.txt'
  path.write_bytes('w1 w2 café'.encode('latin-1'))
  with pytest.raises(UserError) as caught:
    scan(str(tmp_path))
  message = str(caught.value)
  assert message.startswith(f'{path}: not UTF-8 at byte 9 (0xe9)')
  with pytest.raises(UserError, match='not UTF-8'):
    scan(str(path))


def test_no_text(tmp_path):
  (tmp_path / 'a.md').write_text('x')
  for path in (tmp_path, tmp_path / 'b.txt'):
    with pytest.raises(UserError, match='no .txt file at'):
      scan(str(path))


def test_the_hash_covers_names_and_contents(tmp_path):
  write_text(tmp_path, documents=2)
  hashes = {scan(str(tmp_path)).sha256}
  (tmp_path / '000.txt').write_text('w1')
  hashes.add(scan(str(tmp_path)).sha256)
  (tmp_path / '001.txt').rename(tmp_path / '002.txt')  # same order
  hashes.add(scan(str(tmp_path)).sha256)
  assert len(hashes) == 3
