"""What both sides of bench_vs_peers.py share: options, rows and their order,
clock, memory and the held-out figures. Needs numpy alone, so that it runs in
the environment of any library.
"""

import argparse
import contextlib
import ctypes
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HELD_OUT = 8192  # the last rows
SPAN = 64  # batches of planted rows at most; then they come again
MIB = 2**20


class Rows(NamedTuple):
  """Rows [n, d] float32: in memory, or the path of a .npy file."""

  source: np.ndarray | Path
  train: int  # rows before the held-out ones

  def __getitem__(self, part: slice) -> np.ndarray:
    """A copy: a mapped file would count as this process's memory."""
    source = self.source
    if isinstance(source, Path):
      source = np.load(source, mmap_mode='r')
    return np.array(source[part], np.float32)

  @property
  def held_out(self) -> np.ndarray:
    return self[self.train : self.train + HELD_OUT]


class Side(NamedTuple):
  """A library with its state made."""

  put: Callable[[np.ndarray], Any]  # rows [n, d] to where the library has them
  step: Callable[[int, Any], None]  # step i on a batch; returns when it is done
  codes: Callable[[Any], tuple[np.ndarray, np.ndarray]]  # (f, x_hat) of rows


def options(description: str | None) -> argparse.ArgumentParser:
  p = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  p.add_argument(
    '--activation', choices=['topk', 'batchtopk', 'jumprelu'], default='topk'
  )
  p.add_argument('--d', type=int, default=768, help='width of the rows')
  p.add_argument('--latents', type=int, default=16384)
  p.add_argument('--k', type=int, default=32, help='jumprelu: its L0 to aim at')
  p.add_argument('--batch', type=int, default=4096)
  p.add_argument('--steps', type=int, default=10, help='steps that are timed')
  p.add_argument('--skip', type=int, default=3, help='steps before those')
  p.add_argument('--lr', type=float, default=3e-4)
  p.add_argument('--auxk', type=float, default=0.0, help='coefficient of AuxK')
  p.add_argument(
    '--l0_coefficient', type=float, default=1.0,
    help='jumprelu: of the L0 penalty beside the squared error of raw rows',
  )  # fmt: skip
  p.add_argument('--threads', type=int, default=len(os.sched_getaffinity(0)))
  p.add_argument('--rows', help='.npy file [n, d]; planted rows without it')
  p.add_argument(
    '--memory_limit_gib', type=float, default=0.0,
    help='private writable memory of this process at most, 0 for any',
  )  # fmt: skip
  return p


def begin(p: argparse.ArgumentParser) -> tuple[argparse.Namespace, Rows]:
  """The options and the rows; limits this process to its threads and memory."""
  a = p.parse_args()
  cores = sorted(os.sched_getaffinity(0))
  if not 1 <= a.threads <= len(cores):
    p.error(f'--threads={a.threads}: this process may use 1 to {len(cores)}')
  for name in ('d', 'latents', 'k', 'batch', 'steps'):
    if getattr(a, name) < 1:
      p.error(f'--{name}={getattr(a, name)}: must be at least 1')
  os.sched_setaffinity(0, cores[: a.threads])
  if a.memory_limit_gib:
    # RLIMIT_DATA, not RLIMIT_AS: address space that is reserved and never
    # written, and libraries mapped from files, take no memory.
    limit = int(a.memory_limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
  return a, open_rows(p, a)


def open_rows(p: argparse.ArgumentParser, a: argparse.Namespace) -> Rows:
  if not a.rows:
    n = min(a.steps + a.skip, SPAN) * a.batch
    return Rows(planted_rows(n + HELD_OUT, a.d), n)
  if not Path(a.rows).exists():
    p.error(f'--rows={a.rows}: there is no such file')
  shape = np.load(a.rows, mmap_mode='r').shape
  if len(shape) != 2 or shape[1] != a.d:
    p.error(f'--rows={a.rows}: its shape is {shape}, not [n, --d={a.d}]')
  if shape[0] < a.batch + HELD_OUT:
    p.error(
      f'--rows={a.rows}: {shape[0]} rows, a batch and the {HELD_OUT} held out '
      f'are {a.batch + HELD_OUT}'
    )
  return Rows(Path(a.rows), shape[0] - HELD_OUT)


def planted_rows(count: int, width: int, seed: int = 0) -> np.ndarray:
  """Rows [count, width] float32 with a known dictionary of 8 width atoms.

  24 atoms each, drawn with probabilities that fall as rank^-0.7, in amounts
  0.5 + Exp(1), around a mean and with noise 0.05. Atoms and mean do not depend
  on the seed.
  """
  world = np.random.default_rng(1234)
  atoms = world.standard_normal((8 * width, width)).astype(np.float32)
  atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
  mean = 0.3 * world.standard_normal(width).astype(np.float32)
  chance = 1 / np.arange(1, len(atoms) + 1) ** 0.7
  below = np.cumsum(chance / chance.sum())
  rng = np.random.default_rng(seed)
  rows = np.zeros((count, width), np.float32)
  for first in range(0, count, 4096):
    x = rows[first : first + 4096]
    drawn = np.searchsorted(below, rng.random((len(x), 24)))
    drawn = np.minimum(drawn, len(atoms) - 1)
    amount = rng.exponential(size=drawn.shape).astype(np.float32) + 0.5
    for atom, much in zip(drawn.T, amount.T, strict=True):
      x += much[:, None] * atoms[atom]
    x += mean
    x += 0.05 * rng.standard_normal(x.shape).astype(np.float32)
  return rows


def batch(a: argparse.Namespace, rows: Rows, i: int) -> np.ndarray:
  """The rows [B, d] of step i."""
  first = i * a.batch % (rows.train - a.batch + 1)
  return rows[first : first + a.batch]


def run(
  a: argparse.Namespace,
  rows: Rows,
  start: Callable[[], Side],
  after: Callable[[int, Any], None] = lambda i, x: None,
) -> dict:
  """Times the steps of the side that `start` makes; figures of the JSON line.

  after(i, x) is called after step i on its batch, neither timed nor metered.
  """
  with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
    ctypes.CDLL(None).malloc_trim(0)
  before = memory('VmRSS')
  reset_peak()
  with during('making the state'):
    side = start()
  made, peak, times = memory('VmHWM'), 0, []
  for i in range(a.skip + a.steps):
    x = side.put(batch(a, rows, i))
    reset_peak()
    began = time.perf_counter()
    with during(f'step {i}'):
      side.step(i, x)
    times.append(time.perf_counter() - began)
    peak = max(peak, memory('VmHWM'))
    after(i, x)
    del x
  timed = times[a.skip :]
  with during('evaluating'):
    fvu, l0 = held_out(rows, side, a.latents)
  return {
    'activation': a.activation, 'd': a.d, 'latents': a.latents, 'k': a.k,
    'batch': a.batch, 'threads': a.threads, 'steps': a.skip + a.steps,
    'step_ms': round(1e3 * median(timed), 1),
    'step_ms_min': round(1e3 * min(timed), 1),
    'rows_per_s': round(a.batch / median(timed)),
    'fvu': round(fvu, 4), 'l0': round(l0, 1),
    'peak_mib': round((peak - before) / MIB),
    'init_peak_mib': round((made - before) / MIB),
    'malloc': os.environ.get('GLIBC_TUNABLES', ''),
  }  # fmt: skip


@contextlib.contextmanager
def during(what: str) -> Iterator[None]:
  """An error in here says last what was going on."""
  try:
    yield
  except Exception as error:
    most = memory('VmHWM') / 2**30
    error.add_note(f'during {what}, at most {most:.1f} GiB resident')
    raise


def median(values: list[float]) -> float:
  """The upper one of two in the middle."""
  return sorted(values)[len(values) // 2]


def held_out(rows: Rows, side: Side, latents: int) -> tuple[float, float]:
  """(FVU, L0) of the held-out rows: |x - x_hat|^2 over |x - their mean|^2, both
  summed in float64, and latents that are not zero, a row."""
  x = rows.held_out
  error = active = 0.0
  size = min(max(2**26 // latents, 1), 1024)  # codes of 256 MiB at most
  for first in range(0, len(x), size):
    part = x[first : first + size]
    f, x_hat = side.codes(side.put(part))
    difference = part - x_hat.reshape(part.shape)
    error += float(np.square(difference, dtype=np.float64).sum())
    active += np.count_nonzero(f)
  spread = np.square(x - x.mean(0), dtype=np.float64).sum()
  return error / float(spread), active / len(x)


def memory(name: str) -> int:
  """Bytes that Linux has under this name in the process's status."""
  status = Path('/proc/self/status').read_text()
  return int(status.split(f'{name}:')[1].split()[0]) * 1024


def reset_peak() -> None:
  """VmHWM begins again at what is resident now."""
  Path('/proc/self/clear_refs').write_text('5')
