"""Metrics: metrics.jsonl and TensorBoard files, exact across restarts."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_jax.errors import UserError
from sae_jax.paths import write_atomic

# Where torch is installed tensorboardX imports it, for tensors that we have
# not: 2 s of every start. None makes it not importable meanwhile.
_torch = sys.modules.setdefault('torch', None)  # type: ignore[arg-type]
from tensorboardX import SummaryWriter  # noqa: E402

if _torch is None:
  del sys.modules['torch']


class Writer:
  """Writes one line of scalars per logged step into a run folder.

  Opened at step n of a resumed run it first drops what an interrupted run
  logged beyond n, so that each step stands in the file once.
  """

  def __init__(self, run_dir: str | Path, step: int, rows: int):
    path = Path(run_dir) / 'metrics.jsonl'
    write_atomic(path, ''.join(_lines_up_to(path, step)))
    self._file = open(path, 'a')
    self._board = SummaryWriter(
      str(Path(run_dir) / 'tensorboard'),
      purge_step=rows + 1,  # TensorBoard's "step" is rows, as written below
      write_to_disk=True,
    )

  def write(self, step: int, rows: int, values: Mapping[str, float]) -> None:
    """Appends `values` (finite or not) for the state after `step` updates."""
    record = {'step': step, 'rows': rows} | {
      k: v if math.isfinite(v) else None for k, v in values.items()
    }
    self._file.write(json.dumps(record) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, global_step=rows)

  def close(self) -> None:
    self._file.close()
    self._board.close()


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
