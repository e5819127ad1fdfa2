"""Imports killed with SIGKILL end with the bytes of one never killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import cached_sources
import pytest
from cached_sources import (
  HOOK,
  SIZES,
  D,
  T,
  activations,
  contents,
  write_llamascopium,
  write_npy,
  write_saelens,
)

from sae_jax.interop import source
from sae_jax.interop.importing import Options, import_rows
from sae_jax.interop.npy import open_source

PROGRAM = Path(cached_sources.__file__)


def run(place, importer, folder, store):
  root = PROGRAM.parents[2]
  return subprocess.run(
    [sys.executable, PROGRAM, place, importer, folder, store],
    cwd=root,
    env=os.environ | {'PYTHONPATH': str(root)},
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
@pytest.mark.parametrize('importer', ['saelens', 'llamascopium', 'npy'])
def test_killed_and_started_again_gives_the_same_bytes(tmp_path, importer):
  """Four shards; a kill while planning, in the first and in a later one."""
  rows, tokens = activations()
  folder, store, whole = (tmp_path / name for name in 'asw')
  if importer == 'saelens':
    write_saelens(folder, {HOOK: rows}, tokens)
  elif importer == 'llamascopium':
    write_llamascopium(folder, {HOOK: rows}, tokens)
  else:
    write_npy(folder, rows.reshape(-1, D), tokens.reshape(-1))
  assert run('never', importer, folder, whole).returncode == 0
  wanted = contents(whole)
  for place in ('rename:5', 'write:1', 'rename:13', 'write:3'):
    done = run(place, importer, folder, store)
    assert done.returncode == -signal.SIGKILL, (place, done.stderr)
    assert contents(store) != wanted
  done = run('never', importer, folder, store)
  assert done.returncode == 0, done.stderr
  assert contents(store) == wanted


def test_only_what_is_missing_is_read_again(tmp_path, monkeypatch):
  monkeypatch.setattr(source, 'PIECE_BYTES', 4 * T * D * 4)
  rows, tokens = activations()
  write_npy(tmp_path / 'a', rows.reshape(-1, D), tokens.reshape(-1))
  opened = open_source(tmp_path / 'a', {'': 'x'}, sequence_length=T)
  read = []

  def counted(site, piece, keep):
    read.append((piece.begin, piece.end))
    return opened.rows(site, piece, keep)

  run = lambda: import_rows(
    tmp_path / 's', 'npy', opened._replace(rows=counted), Options(**SIZES)
  )
  run()
  before = contents(tmp_path / 's')
  assert read == [(p.begin, p.end) for p in opened.pieces]
  read.clear()
  run()
  assert not read
  (tmp_path / 's/sites/x/shard-00001-of-00004.bin').unlink()
  run()
  # Rows 64 to 127 are sequences 8 to 15.
  assert read == [(8, 12), (12, 16)]
  assert contents(tmp_path / 's') == before
