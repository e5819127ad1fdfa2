"""Data sets of the hub, which a server on this machine plays."""

import contextlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_harvest import text_config

pytest.importorskip('datasets')
pa = pytest.importorskip('pyarrow')
pq = pytest.importorskip('pyarrow.parquet')

COMMIT = 'a' * 40
FILE = {'type': 'file', 'path': 'data/train.parquet', 'oid': 'b' * 40}


def parquet():
  out = io.BytesIO()
  pq.write_table(pa.table({'text': ['one', 'two', 'three']}), out)
  return out.getvalue()


class Hub(http.server.BaseHTTPRequestHandler):
  """Knows org/name, of one file at one commit, and that org/gated is gated."""

  data = parquet()

  def answer(self, body=b'', code=200, **headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(code)
    for key, value in headers.items():
      self.send_header(key.replace('_', '-'), value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  def do_GET(self):
    self.rfile.read(int(self.headers.get('Content-Length') or 0))
    path = self.path.partition('?')[0]
    file = FILE | {'size': len(self.data)}
    if '/org/gated' in path:
      self.answer(code=403, X_Error_Code='GatedRepo')
    elif '/org/name' not in path:
      self.answer(code=404, X_Error_Code='RepoNotFound')
    elif path.endswith(f'/tree/{COMMIT}'):
      self.answer([{'type': 'directory', 'path': 'data', 'oid': 'c' * 40}])
    elif '/tree/' in path or '/paths-info/' in path:
      self.answer([file])
    elif path.startswith('/api/'):
      files = [{'rfilename': FILE['path']}]
      self.answer({'id': 'org/name', 'sha': COMMIT, 'siblings': files})
    elif path.endswith('.parquet'):
      self.answer(self.data, ETag='"x"', X_Repo_Commit=COMMIT)
    else:
      self.answer(code=404, X_Error_Code='EntryNotFound', X_Repo_Commit=COMMIT)

  do_HEAD = do_POST = do_GET

  def log_message(self, format, *args):
    pass


@contextlib.contextmanager
def hub():
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield f'http://127.0.0.1:{server.server_port}'
  finally:
    server.shutdown()
    server.server_close()


PROGRAM = """
import json, sys, ml_collections
from sae_jax.errors import UserError
from sae_jax.harvest.documents import scan
for block in json.loads(sys.argv[1]):
  try:
    text = scan(ml_collections.ConfigDict(block))
    print(text.sha256, *map(text.read, range(text.documents)))
  except UserError as error:
    print(error)
"""


def ask(folder, endpoint, *blocks, **env):
  """What `scan` says to these blocks, a line each, in its own process."""
  env |= {'HF_ENDPOINT': endpoint, 'HF_HOME': str(folder)}
  env |= {'PYTHONPATH': str(Path(__file__).parents[2])}
  blocks = [text_config('').to_dict() | block for block in blocks]
  return subprocess.run(
    [sys.executable, '-c', PROGRAM, json.dumps(blocks)],
    env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True,
  ).stdout.splitlines()  # fmt: skip


def test_a_data_set_of_the_hub_and_its_mistakes(tmp_path):
  good = {'path': 'org/name'}
  with hub() as endpoint:
    whole, part, split, cut, name, column, missing, gated = ask(
      tmp_path, endpoint, good,
      good | {'split': 'train[1:]'},
      good | {'split': 'tarin'},
      good | {'split': 'train[1'},
      good | {'name': 'none'},
      good | {'column': 'tex'},
      {'path': 'org/missing'},
      {'path': 'org/gated'},
    )  # fmt: skip
  assert whole.split()[1:] == ['one', 'two', 'three']
  assert part.split()[1:] == ['two', 'three']
  assert whole.split()[0] != part.split()[0]
  where = "hub data set 'org/name'"
  assert split == (
    f"text.split: {where} has no split 'tarin', did you mean 'train'; it has "
    'train'
  )
  assert cut.startswith(f'text.split: {where}: ') and 'train[1' in cut
  assert name.startswith(f"text.path: {where}: BuilderConfig 'none' not found.")
  assert "no column 'tex', did you mean 'text'" in column
  start = "text.path: hub data set 'org/"
  assert missing.startswith(f"{start}missing': there is no such file, folder")
  assert gated.startswith(f"{start}gated' is gated: ask for access")
  # Without a network: what is there already, as the same text.
  offline = ask(
    tmp_path, 'http://127.0.0.1:9', good, {'path': 'org/other'},
    HF_HUB_OFFLINE='1',
  )  # fmt: skip
  assert offline[0] == whole
  assert offline[1].startswith(f"{start}other': no such file or folder here")
  assert len(offline) == 2
