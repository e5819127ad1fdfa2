"""Small files of text of every kind, and what a harvest reads of them."""

import json

import pytest
from tiny_harvest import text_config

from sae_jax.harvest.documents import scan as scan_block

pa = pytest.importorskip('pyarrow')
pq = pytest.importorskip('pyarrow.parquet')

# Dates, which readers that guess types make dates of; line ends; no ASCII.
WORDS = ['2020-01-01', '2020-01-02', 'two\nlines\r\n', '', 'é∀𝄞 \0 "']


def scan(path, **values):
  return scan_block(text_config(path, **values))


def everything(text):
  return [text.read(i) for i in range(text.documents)]


def lines(rows):
  return b''.join(json.dumps(row).encode() + b'\n' for row in rows)


def write_jsonl(folder, words=WORDS, name='a.jsonl'):
  # Other columns may differ from line to line.
  rows = [{'n': i if i % 2 else str(i), 'text': w} for i, w in enumerate(words)]
  (folder / name).write_bytes(lines(rows))


def write_table(folder, name='a.parquet', **columns):
  pq.write_table(pa.table(columns), folder / name)
