"""Metrics on a disk that is full for a while, or for good."""

import contextlib
import os
import resource

import pytest
from test_loop import _records

from sae_jax.train.writer import Event, Writer, read_metrics


@contextlib.contextmanager
def no_file_beyond(size):
  """So many bytes are the most a file takes, the last ones of a write not."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write(writer, *steps):
  for step in steps:
    values = {f'train/{i}': float('nan') if i else 0.5 for i in range(12)}
    writer.write(step, 64 * step, values)


@pytest.mark.parametrize('for_good', [False, True])
def test_a_full_disk_keeps_nothing_waiting(tmp_path, caplog, for_good):
  """Lines wait in memory, and no thread with them; one warning a file, none of
  what is not a number."""
  writer = Writer(tmp_path, 0, 0)
  write(writer, 1)
  (events,) = (tmp_path / 'tensorboard').iterdir()
  largest = max(events, tmp_path / 'metrics.jsonl', key=os.path.getsize)
  with no_file_beyond(largest.stat().st_size + 30):
    write(writer, *range(2, 40))
    assert [m['step'] for m in read_metrics(tmp_path)] == [1]
    if for_good:
      writer.close()
  if not for_good:
    write(writer, 40)
    writer.close()
    assert [m['step'] for m in read_metrics(tmp_path)] == list(range(1, 41))
    found = map(Event.FromString, _records(events.read_bytes()))
    steps = [e.step // 64 for e in found if e.summary.value]
    assert steps == list(range(1, 41))
  said = [r.getMessage() for r in caplog.records]
  assert sum('training goes on' in line for line in said) == 2
  assert sum('lacks its last lines' in line for line in said) == 2 * for_good
  assert len(said) == 2 + 2 * for_good
