"""Metrics: metrics.jsonl and TensorBoard files, exact across restarts."""

import json
import math
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from sae_jax.errors import UserError
from sae_jax.paths import write_atomic

# Where torch is installed tensorboardX imports it, for tensors that we have
# not: 2 s of every start. None makes it not importable meanwhile.
_torch = sys.modules.setdefault('torch', None)  # type: ignore[arg-type]
# Not its writers: those wait for a thread that a full disk has ended.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore # noqa: E402
from tensorboardX.proto.summary_pb2 import Summary  # type: ignore # noqa: E402
from tensorboardX.record_writer import masked_crc32c  # noqa: E402

if _torch is None:
  del sys.modules['torch']


class Writer:
  """Writes one line of scalars per logged step into a run folder.

  Opened at step n of a resumed run it first drops what an interrupted run
  logged beyond n, so that each step stands in the file once. Training goes on
  where a disk refuses lines; they wait in memory for the next one's try.
  """

  def __init__(self, run_dir: str | Path, step: int, rows: int):
    path = Path(run_dir) / 'metrics.jsonl'
    write_atomic(path, ''.join(_lines_up_to(path, step)))
    self._lines = _Appended(path)
    board = Path(run_dir) / 'tensorboard'
    board.mkdir(exist_ok=True)
    name = f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}'
    self._board = _Appended(board / name)
    # TensorBoard's "step" is rows; it drops what it has from there on.
    begin = SessionLog(status=SessionLog.START)
    self._event(Event(step=rows + 1, file_version='brain.Event:2'))
    self._event(Event(step=rows + 1, session_log=begin))

  def write(self, step: int, rows: int, values: Mapping[str, float]) -> None:
    """Appends `values` (finite or not) for the state after `step` updates."""
    record = {'step': step, 'rows': rows} | {
      k: v if math.isfinite(v) else None for k, v in values.items()
    }
    self._lines.write((json.dumps(record) + '\n').encode())
    scalars = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
    self._event(Event(step=rows, summary=Summary(value=scalars)))

  def _event(self, event: Event) -> None:
    event.wall_time = time.time()
    data = event.SerializeToString()
    size = struct.pack('<Q', len(data))
    crc = lambda of: struct.pack('<I', masked_crc32c(of))
    self._board.write(size + crc(size) + data + crc(data))

  def close(self) -> None:
    self._lines.close()
    self._board.close()


class _Appended:
  """A file that grows; what a disk refuses is kept for the next try."""

  def __init__(self, path: Path):
    self._file, self._path = open(path, 'ab', buffering=0), path
    self._due, self._failing = b'', False

  def write(self, data: bytes) -> None:
    self._due += data
    try:
      while self._due:  # a part may be written before the disk is full
        self._due = self._due[self._file.write(self._due) :]
      self._failing = False
    except OSError as error:
      if not self._failing:
        logging.warning(
          '%s cannot be written (%s): training goes on, its lines wait',
          self._path, error.strerror,
        )  # fmt: skip
      self._failing = True

  def close(self) -> None:
    self.write(b'')
    if self._due:
      logging.warning('%s lacks its last lines', self._path)
    self._file.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
  """The lines of a run's metrics.jsonl; none where there is no such file.

  A last line that is cut off (a run still going on) is left out. Raises
  UserError for any other line that is not JSON.
  """
  path = Path(run_dir) / 'metrics.jsonl'
  if not path.exists():
    return []
  lines = path.read_text(encoding='utf-8').split('\n')[:-1]
  try:
    return [json.loads(line) for line in lines]
  except json.JSONDecodeError as error:
    raise UserError(f'{path}: a line is not JSON ({error})') from None


def _lines_up_to(path: Path, step: int) -> list[str]:
  """The whole lines of the file that belong to steps <= step; none for a
  run that starts anew."""
  if not step or not path.exists():
    return []
  with open(path) as file:
    whole = [line for line in file if line.endswith('\n')]
  return [line for line in whole if json.loads(line)['step'] <= step]
