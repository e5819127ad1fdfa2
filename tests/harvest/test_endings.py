"""What files of text are taken for, and what a source must have."""

import bz2
import gzip
import lzma
import os

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

datasets = pytest.importorskip('datasets')
pa = pytest.importorskip('pyarrow')
pq = pytest.importorskip('pyarrow.parquet')
zstandard = pytest.importorskip('zstandard')


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  folder = tmp_path_factory.mktemp('cache')
  monkeypatch.setenv('SAE_JAX_CACHE', str(folder))
  datasets.disable_progress_bars()
  return folder


def test_a_parquet_file_in_the_place_of_another_of_the_same_time(tmp_path):
  for words in (['first'], ['other']):
    write_table(tmp_path, text=words)
    os.utime(tmp_path / 'a.parquet', (10**9, 10**9))
    assert everything(scan(tmp_path / 'a.parquet')) == words


ARROW = {
  'large_string': pa.large_string(), 'view': pa.string_view(),
  'binary': pa.binary(), 'large_binary': pa.large_binary(),
  'dictionary': pa.dictionary(pa.int32(), pa.string()),
}  # fmt: skip


def test_every_type_of_text_and_nested_columns(tmp_path):
  columns = {n: pa.array(['é', '']).cast(t) for n, t in ARROW.items()}
  nested = [{'n': 1, 'b': {'c': w}} for w in ('é', '')]
  write_table(tmp_path, **columns, meta=nested)
  data = datasets.Dataset(pq.read_table(tmp_path / 'a.parquet'))
  data.save_to_disk(tmp_path / 's')
  (tmp_path / 'j.jsonl').write_bytes(lines({'meta': m} for m in nested))
  for column in [*ARROW, 'meta.b.c']:
    for name in ('a.parquet', 's'):
      assert everything(scan(tmp_path / name, column=column)) == ['é', '']
  assert everything(scan(tmp_path / 'j.jsonl', column='meta.b.c')) == ['é', '']
  with pytest.raises(UserError, match="no column 'meta.b.d', .*=meta.b.c$"):
    scan(tmp_path / 'j.jsonl', column='meta.b.d')
  write_table(tmp_path, text=[b'a', b'caf\xe9'])
  with pytest.raises(UserError, match=r'row 1: not UTF-8 at byte 3 \(0xe9\)'):
    scan(tmp_path / 'a.parquet')


PACK = {
  '': bytes, '.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress,
  '.zst': zstandard.compress,
}  # fmt: skip


def test_endings_say_the_kind_in_any_case_and_compressed(tmp_path):
  write_table(tmp_path, text=WORDS)
  write_jsonl(tmp_path)
  kinds = {
    'a.jsonl': 'JSONL ndjson jl JsonLines', 'a.parquet': 'PARQUET parq pq'
  }  # fmt: skip
  for i, pack in enumerate(PACK):
    for name, endings in kinds.items():
      raw = PACK[pack]((tmp_path / name).read_bytes())
      ends = endings.split()
      file = tmp_path / f'b.{ends[i % len(ends)]}{pack}'
      file.write_bytes(raw)
      assert everything(scan(file)) == WORDS
    file = tmp_path / f'a.TXT{pack.upper()}'
    file.write_bytes(PACK[pack]('one é'.encode()))
    text = scan(file)
    assert everything(text) == ['one é'] and text.bytes == 6


@pytest.mark.parametrize(
  'raw, message',
  [
    *[(pack(b'text'), 'compressed data') for e, pack in PACK.items() if e],
    (b'PAR1\x15', 'Parquet'),
    ('utf'.encode('utf-16'), 'UTF-16'),
    ('utf'.encode('utf-16-le'), 'binary'),
    (b'%PDF-1.7', 'binary'),
    (b'{"text": "a"}\n{"text": "b"}\n', 'JSON: give --config.text.kind=jsonl'),
  ],
  ids=lambda value: value if isinstance(value, str) else '',
)
def test_text_that_is_something_else(tmp_path, raw, message):
  (tmp_path / 'a.txt').write_text('text')
  (tmp_path / 'b.txt').write_bytes(raw)
  with pytest.raises(UserError, match=f'b.txt: holds {message}'):
    scan(tmp_path)
  if message[0] == 'J':
    assert scan(tmp_path, kind='txt').read(1) == raw.decode()


def test_hidden_files_and_folders_are_no_documents(tmp_path):
  (tmp_path / '.x').mkdir()
  (tmp_path / '.x' / '.y').mkdir()
  root = tmp_path / '.x' / 'text'
  (root / '.ipynb_checkpoints').mkdir(parents=True)
  names = ('a.txt', '.h.txt', '._a.jsonl', '.ipynb_checkpoints/a.txt')
  for name in names:
    (root / name).write_text(name)
  assert everything(scan(root)) == ['a.txt']
  assert everything(scan(root / '.h.txt')) == ['.h.txt']  # asked for


def test_a_window_of_two_gigabytes(tmp_path):
  options = zstandard.ZstdCompressionParameters(window_log=31)
  z = zstandard.ZstdCompressor(compression_params=options).compressobj()
  raw = z.compress(lines([{'text': 'far'}])) + z.flush()
  assert zstandard.get_frame_parameters(raw).window_size == 1 << 31
  (tmp_path / 'a.jsonl.zst').write_bytes(raw)
  assert everything(scan(tmp_path)) == ['far']


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_a_name_that_is_not_utf8(tmp_path, kind):
  write_jsonl(tmp_path)
  write_table(tmp_path, text=WORDS)
  file = os.fsencode(tmp_path / f'a.{kind}')
  os.rename(file, file.replace(b'a.', b'caf\xe9.'))
  assert everything(scan(tmp_path, kind=kind)) == WORDS
  (tmp_path / os.fsdecode(b'\xe9.txt')).write_text('plain')
  assert everything(scan(tmp_path, kind='txt')) == ['plain']


@pytest.mark.parametrize(
  'name, key, value',
  [
    ('a.txt', 'column', 'words'),
    ('a.txt', 'split', 'test'),
    ('a.jsonl', 'split', 'train[:10%]'),
    ('a.parquet', 'name', 'sample'),
    ('s', 'name', 'sample'),
    ('s', 'split', 'test'),
  ],
)
def test_what_a_source_does_not_have_is_refused(tmp_path, name, key, value):
  (tmp_path / 'a.txt').write_text('text')
  write_jsonl(tmp_path)
  write_table(tmp_path, text=['a'])
  data = datasets.Dataset.from_dict({'text': ['a']})
  data.save_to_disk(tmp_path / 's')
  with pytest.raises(UserError, match=rf'text.{key}: .*{name}'):
    scan(tmp_path / name, **{key: value})


def test_a_folder_is_not_taken_for_a_data_set_of_the_hub(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'org' / 'name').mkdir(parents=True)
  write_table(tmp_path / 'org' / 'name', text=['a'])
  with pytest.raises(UserError, match='a file or folder of that name'):
    scan('org/name', kind='hub')
