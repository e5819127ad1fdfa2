"""Harvests killed with SIGKILL end with the bytes of one never killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_harvest

PROGRAM = Path(tiny_harvest.__file__)
# Five shards. Renames: 20 for the sequences and what is kept of them, the
# documents, the manifest, then 7 a shard (rows and checksums of two sites,
# tokens and theirs, the record), the manifest again.
PLACES = ['rename:15', 'write:4', 'rename:24', 'rename:36', 'rename:58']


def start(text, death, *stores):
  root = PROGRAM.parents[2]
  return subprocess.Popen(
    [sys.executable, str(PROGRAM), str(text), death, *map(str, stores)],
    cwd=root,
    env=os.environ | {'PYTHONPATH': str(root)},
    stderr=subprocess.PIPE,
    text=True,
  )


def end(process):
  error = process.communicate()[1]
  return process.returncode, error


def contents(root):
  return {
    path.relative_to(root).as_posix(): path.read_bytes()
    for path in root.rglob('*')
    if path.is_file()
  }


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bytes(tmp_path):
  text, whole = tmp_path / 'text', tmp_path / 'whole'
  text.mkdir()
  tiny_harvest.write_text(text)
  killed = {place: tmp_path / place.replace(':', '-') for place in PLACES}
  processes = [start(text, place, store) for place, store in killed.items()]
  processes.append(start(text, 'never', whole))
  ends = [end(process) for process in processes]
  assert ends.pop()[0] == 0
  assert [code for code, _ in ends] == [-signal.SIGKILL] * len(PLACES), ends
  wanted = contents(whole)
  assert len(wanted) == 3 + 5 * (5 * 2 + 1)  # manifest, lock, documents
  for store in killed.values():
    assert contents(store) != wanted
  # Once more killed on the way, at another place.
  again = killed['write:4']
  assert end(start(text, 'write:3', again))[0] == -signal.SIGKILL
  code, error = end(start(text, 'never', *killed.values()))
  assert code == 0, error
  for place, store in killed.items():
    found = contents(store)
    assert found.keys() == wanted.keys(), place
    for name in wanted:
      assert found[name] == wanted[name], (place, name)
