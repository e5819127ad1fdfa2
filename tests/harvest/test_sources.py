"""Every source of text: what it reads, what its hash covers, what it refuses.

Real files and the real `datasets`; test_hub.py has the hub.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
from text_sources import (
  WORDS,
  everything,
  lines,
  scan,
  write_jsonl,
  write_table,
)

from sae_jax.errors import UserError
from sae_jax.paths import cache_dir

datasets = pytest.importorskip('datasets')
pa = pytest.importorskip('pyarrow')
zstandard = pytest.importorskip('zstandard')

CHATS = [
  [{'role': 'user', 'content': f'question {i}'},
   {'role': 'assistant', 'content': 'é'}]
  for i in range(3)
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  folder = tmp_path_factory.mktemp('cache')
  monkeypatch.setenv('SAE_JAX_CACHE', str(folder))
  datasets.disable_progress_bars()
  return folder


def test_jsonl_plain_and_compressed(tmp_path):
  write_jsonl(tmp_path)
  raw = (tmp_path / 'a.jsonl').read_bytes()
  # Two members, as parallel compressors write them; blank lines; a BOM.
  (tmp_path / 'b.jsonl.gz').write_bytes(
    gzip.compress(raw[:40]) + gzip.compress(raw[40:])
  )
  z = zstandard.ZstdCompressor()
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'sub' / 'c.jsonl.zst').write_bytes(
    z.compress(raw[:40]) + z.compress(raw[40:] + b'\n\n')
  )
  (tmp_path / 'd.jsonl').write_bytes(b'\xef\xbb\xbf{"text": "BOM"}')
  text = scan(tmp_path)
  assert everything(text) == [*WORDS, *WORDS, 'BOM', *WORDS]
  assert text.files == 4 and text.documents == 16 and not text.chat
  assert everything(scan(tmp_path / 'b.jsonl.gz')) == WORDS
  size = sum(len(word.encode()) for word in everything(text))
  assert size <= text.bytes <= size + 16 * 17


def test_a_json_corpus_is_converted_once(tmp_path):
  write_jsonl(tmp_path)
  first = scan(tmp_path)
  files = {p: p.stat().st_mtime_ns for p in Path(cache_dir()).rglob('*.arrow')}
  assert len(files) == 1
  (tmp_path / 'a.jsonl').touch()
  assert scan(tmp_path).sha256 == first.sha256
  again = {p: p.stat().st_mtime_ns for p in Path(cache_dir()).rglob('*.arrow')}
  assert again == files
  # Other contents are another copy.
  write_jsonl(tmp_path, ['new'])
  assert everything(scan(tmp_path)) == ['new']


def test_parquet(tmp_path):
  write_table(tmp_path, text=WORDS, n=[1] * 5)
  write_table(tmp_path, 'b.parquet', text=['last'], n=[2])
  text = scan(tmp_path)
  assert everything(text) == [*WORDS, 'last'] and text.files == 2
  assert everything(scan(tmp_path / 'b.parquet')) == ['last']
  large = pa.array(['a'], pa.large_string())
  write_table(tmp_path, 'c.parquet', words=large)
  assert everything(scan(tmp_path / 'c.parquet', column='words')) == ['a']


def test_saved_data_sets(tmp_path):
  data = datasets.Dataset.from_dict({'text': WORDS, 'n': [1] * 5})
  data.with_format('numpy').save_to_disk(tmp_path / 'one', num_shards=2)
  text = scan(tmp_path / 'one')
  assert everything(text) == WORDS and text.files == 2
  assert all(type(word) is str for word in everything(text))
  splits = {'train': data, 'test': data.select([4, 0])}
  datasets.DatasetDict(splits).save_to_disk(tmp_path / 'two')
  assert everything(scan(tmp_path / 'two')) == WORDS
  test = scan(tmp_path / 'two', split='test')
  assert everything(test) == [WORDS[4], WORDS[0]]
  with pytest.raises(UserError, match="no split 'tset', did you mean 'test'"):
    scan(tmp_path / 'two', split='tset')
  # The cache has no copy of them.
  assert not list(Path(cache_dir()).rglob('*.arrow'))


def test_chats_from_every_source(tmp_path):
  extra = [[m | {'weight': 1} for m in chat] for chat in CHATS]
  for name in 'jps':
    (tmp_path / name).mkdir()
  (tmp_path / 'j/a.jsonl').write_bytes(lines({'messages': c} for c in extra))
  write_table(tmp_path / 'p', messages=extra)
  datasets.Dataset.from_dict({'messages': extra}).save_to_disk(tmp_path / 's')
  for name in 'jps':
    text = scan(tmp_path / name, column='messages', chat=True)
    assert text.chat and everything(text) == CHATS


def test_the_hash_covers_contents_names_and_column(tmp_path):
  write_table(tmp_path, text=WORDS, other=WORDS)
  found = [scan(tmp_path).sha256, scan(tmp_path, column='other').sha256]
  write_table(tmp_path, text=[*WORDS[1:], 'x'], other=WORDS)
  found.append(scan(tmp_path).sha256)
  (tmp_path / 'a.parquet').rename(tmp_path / 'b.parquet')
  found.append(scan(tmp_path).sha256)
  data = datasets.Dataset.from_dict({'text': WORDS, 'other': WORDS})
  both = datasets.DatasetDict({'train': data, 'test': data})
  both.save_to_disk(tmp_path / 'd')
  for values in ({}, {'split': 'test'}, {'column': 'other'}):
    found.append(scan(tmp_path / 'd', **values).sha256)
  assert len(set(found)) == 7
  # Where the data set lies is no part of it.
  (tmp_path / 'd').rename(tmp_path / 'e')
  assert scan(tmp_path / 'e').sha256 == found[4]


@pytest.mark.parametrize(
  'line, message',
  [
    (b'{"text": "a"', "line 3: not JSON: Expecting ',' delimiter at char"),
    (b'{"text": "\xe9"}', r'line 3: not UTF-8 at byte 10 \(0xe9'),
    (b'{"txet": ""}', "line 3: no column 'text', did you mean 'txet'"),
    (b'{"text": null}', "line 3: 'text' is null, not text"),
    (b'{"text": [{"role": "user"}]}', 'is it chat data'),
    (b'{"text": "\\ud800"}', 'line 3: .* lone surrogate'),
    (b'[1]', r'line 3: \[1\] is no object'),
  ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
  file = tmp_path / 'a.jsonl'
  file.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
  with pytest.raises(UserError, match=message) as caught:
    scan(tmp_path)
  assert str(caught.value).startswith(f'{file}, line 3: ')
  assert '\n' not in str(caught.value)
  # What was begun is not taken for a copy of it.
  with pytest.raises(UserError, match=message):
    scan(tmp_path)


@pytest.mark.parametrize(
  'chat, message',
  [
    ('hello', 'a chat is a list of .* not str'),
    ([], 'not an empty list'),
    (['hello'], 'message 0 is str'),
    ([{'from': 'user', 'value': ''}], "no 'role', its keys are from, value"),
    ([*CHATS[0], {'role': 'tool', 'content': None}], 'content of message 2 is'),
  ],
)
def test_a_chat_that_is_none(tmp_path, chat, message):
  (tmp_path / 'a.jsonl').write_bytes(
    lines([{'text': CHATS[0]}, {'text': chat}])
  )
  with pytest.raises(UserError, match=rf'a.jsonl, line 2: .*{message}'):
    scan(tmp_path, chat=True)


def test_a_table_with_a_chat_that_is_none(tmp_path):
  chats = [*CHATS, [{'role': 'user', 'content': None}]]
  write_table(tmp_path, text=chats)
  with pytest.raises(UserError, match='row 3: content of message 0 is'):
    scan(tmp_path, chat=True)
  datasets.Dataset.from_dict({'text': chats}).save_to_disk(tmp_path / 's')
  text = scan(tmp_path / 's', chat=True)
  assert text.read(0) == CHATS[0]
  with pytest.raises(UserError, match='document 3: content of message 0 is'):
    text.read(3)


@pytest.mark.parametrize(
  'values, message',
  [
    (
      {'column': 'wrods'},
      "no column 'wrods', did you mean 'words': .*=holes or meta.a or words$",
    ),
    ({'column': 'n'}, "'n' of .* is Value.*int64.*, not text"),
    ({'column': 'chats'}, 'not text: is it chat data'),
    ({'column': 'words', 'chat': True}, 'no list of messages with role'),
    ({'column': 'meta'}, 'not text: give .*=holes or meta.a or words$'),
    (
      {'column': 'holes'},
      "document 1 has no 'holes' .null., as 1 in all|row 1: 'holes' is null",
    ),
  ],
)
@pytest.mark.parametrize('kind', ['parquet', 'datasets'])
def test_a_column_that_does_not_fit(tmp_path, kind, values, message):
  columns = {
    'words': ['a', 'b'], 'holes': ['a', None], 'n': [1, 2], 'chats': CHATS[:2],
    'meta': [{'a': 'b', 'n': 1}] * 2,
  }  # fmt: skip
  if kind == 'parquet':
    write_table(tmp_path, **columns)
  else:
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path)
  with pytest.raises(UserError, match=message) as caught:
    scan(tmp_path, **values)
  assert '\n' not in str(caught.value)


def cut_jsonl(folder):
  (folder / 'a.jsonl.gz').write_bytes(
    gzip.compress(lines([{'text': 'a'}]))[:-9]
  )


def cut_zstandard(folder):
  whole = zstandard.compress(lines([{'text': 'a'}]) * 9)
  (folder / 'a.jsonl.zst').write_bytes(whole + whole[:-9])


def no_parquet(folder):
  write_table(folder, text=['a'])
  (folder / 'b.parquet').write_bytes(b'PAR1 and no more')


def flipped_parquet(folder):
  write_table(folder, text=['a'])
  write_table(folder, 'b.parquet', text=['b' * 9])
  raw = bytearray((folder / 'b.parquet').read_bytes())
  raw[4:24] = b'x' * 20
  (folder / 'b.parquet').write_bytes(raw)


def cut_saved(folder):
  datasets.Dataset.from_dict({'text': WORDS}).save_to_disk(folder)
  file = next(folder.glob('*.arrow'))
  file.write_bytes(file.read_bytes()[:100])


def mixed(folder):
  write_jsonl(folder)
  write_table(folder, text=['a'])


@pytest.mark.parametrize(
  'make, message',
  [
    (cut_jsonl, 'cannot read .*a.jsonl.gz: .* ended before'),
    (no_parquet, 'b.parquet: no Parquet file, or a damaged one'),
    (flipped_parquet, 'cannot read .*b.parquet: '),
    (cut_zstandard, 'cannot read .*a.jsonl.zst: cut off'),
    (cut_saved, 'no saved data set, or a damaged one'),
    (mixed, 'several kinds: choose with --config.text.kind=jsonl or parquet'),
    (lambda f: (f / 'a.jsonl').touch(), 'a.jsonl holds no document'),
    (lambda f: write_table(f, text=pa.array([], 'string')), 'no document'),
    (lambda f: None, 'no .txt file at .* and no .jsonl'),
  ],
)
def test_damaged_mixed_or_empty(tmp_path, make, message):
  make(tmp_path)
  with pytest.raises(UserError, match=message) as caught:
    scan(tmp_path)
  assert '\n' not in str(caught.value)


def test_a_kind_can_be_chosen(tmp_path):
  mixed(tmp_path)
  assert everything(scan(tmp_path, kind='parquet')) == ['a']
  (tmp_path / 'x.json').write_bytes(lines([{'text': 'line'}]))
  with pytest.raises(UserError, match='is of no kind we read'):
    scan(tmp_path / 'x.json')
  assert everything(scan(tmp_path / 'x.json', kind='jsonl')) == ['line']
  (tmp_path / 'README').write_text('plain')
  assert everything(scan(tmp_path / 'README')) == ['plain']
  with pytest.raises(UserError, match="'json' .* did you mean 'jsonl'"):
    scan(tmp_path, kind='json')
  with pytest.raises(UserError, match="did you mean 'a.jsonl'"):
    scan(tmp_path / 'a.json1')
  with pytest.raises(UserError, match=r'text.chat: True, which .*README \(txt'):
    scan(tmp_path / 'README', chat=True)


def test_utf8_is_checked_across_pieces(tmp_path, monkeypatch):
  from sae_jax.harvest import files

  monkeypatch.setattr(files, '_PIECE', 3)
  file = tmp_path / 'a.txt'
  file.write_bytes('aé∀𝄞'.encode() * 5)
  assert scan(tmp_path).read(0) == 'aé∀𝄞' * 5
  # A character that begins in one piece and is none in the next; a cut one.
  for raw in (b'ab\xe2\x88c', b'abcde\xe2\x88'):
    file.write_bytes(raw)
    at = raw.index(0xE2)
    with pytest.raises(UserError, match=rf'UTF-8 at byte {at} \(0xe2\)'):
      scan(tmp_path)


def test_reading_is_random_access_into_a_mapped_file(tmp_path):
  write_jsonl(tmp_path, [f'{i} ' * 50 for i in range(3000)])
  text = scan(tmp_path)
  for i in np.random.default_rng(0).integers(0, 3000, 50):
    assert text.read(int(i)) == f'{i} ' * 50
  with pytest.raises(IndexError):
    text.read(3000)


def test_without_the_package(tmp_path, monkeypatch):
  write_jsonl(tmp_path)
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(UserError, match=r"pip install 'sae-jax\[data\]'"):
    scan(tmp_path)
  (tmp_path / 'a.txt').write_text('plain needs none')
  assert scan(tmp_path / 'a.txt').documents == 1
