"""How fast a store is written and read, beside the disk and the page cache.

python scripts/bench_store.py --part=all --width=576 --width=2304 --rounds=5
Ours and plain reads and writes (readinto, dd with fsync) take turns, each in a
process of its own, on the disk of --dir; ratios are medians over the rounds.
GB are those of float32 rows, also for int8. A table, then a line of JSON each.
"""

import contextlib
import dataclasses
import functools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from absl import flags
from machine import cpu

from sae_jax import cli
from sae_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SITE, BLOCK, BATCH = 'layer_0.resid_post', 256, 4096
SHARDS = 1000  # of the store that is only opened
EPOCHS = {'cold': 1, 'warm': 4}  # read in a row by one process

_PART = flags.DEFINE_enum(
  'part', 'all', ['write', 'read', 'start', 'all'], 'What is measured.'
)
_WIDTH = flags.DEFINE_multi_integer('width', [576, 2304], 'Numbers in a row.')
_GB = flags.DEFINE_float('gb', 1.0, 'GB of float32 rows, about.', 0.1)
_SHARD = flags.DEFINE_integer('rows_per_shard', 1 << 16, 'Rows.', BLOCK)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Times each side is asked.', 1)
_DIR = flags.DEFINE_string('dir', '.', 'On the disk to be measured.')
_INT8 = flags.DEFINE_bool('int8', True, 'Also a store of int8, first width.')
_ROLE = flags.DEFINE_string('role', None, 'Internal: what a child process does')
_ARGS = flags.DEFINE_string('args', '{}', 'Internal: its arguments.')


def main() -> None:
  if _ROLE.value:
    print(json.dumps(ROLES[_ROLE.value](**json.loads(_ARGS.value))))
    return
  part = _PART.value
  with tempfile.TemporaryDirectory(dir=_DIR.value, prefix='bench_') as folder:
    check_room(Path(folder))
    print(f'{cpu()}; {_DIR.value}; GB/s, medians of {_ROUNDS.value} rounds\n'
          f'{"":26}   ours  plain  ratio  cpu s/GB  peak MB')  # fmt: skip
    figures = []
    stores = [(width, 'float32') for width in _WIDTH.value]
    if _INT8.value:
      stores.append((_WIDTH.value[0], 'int8'))
    for store in stores:
      if part in ('write', 'all'):
        figures.append(bench_write(Path(folder), *store))
      if part in ('read', 'all'):
        figures += bench_read(Path(folder), *store)
    if part in ('start', 'all'):
      figures.append(bench_start(Path(folder)))
  for figure in figures:
    print(json.dumps(figure | {'cpu': cpu(), 'rounds': _ROUNDS.value}))


def check_room(folder: Path) -> None:
  """UserError when the disk has not the room for a store and dd's file."""
  needed, free = 2.2e9 * _GB.value + 1e8, shutil.disk_usage(folder).free
  if needed > free:
    raise UserError(
      f'--dir={_DIR.value}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB '
      'free: give another folder or a smaller --gb'
    )


def ask(role: str, **args) -> dict:
  """What a process of its own, playing a role, finds out."""
  path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
  done = subprocess.run(
    [sys.executable, __file__, f'--role={role}', f'--args={json.dumps(args)}'],
    env=os.environ | {'PYTHONPATH': path}, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  if done.returncode:
    raise UserError(f'{role}: this side failed, see above')
  return json.loads(done.stdout.splitlines()[-1])


def rows_of(width: int) -> int:
  return max(round(_GB.value * 1e9 / (4 * width * BATCH)), 1) * BATCH


# --- Writing ------------------------------------------------------------------


def bench_write(folder: Path, width: int, dtype: str) -> dict:
  rounds = []
  for _ in range(_ROUNDS.value):
    plain = timed_dd(folder / 'dd.tmp', rows_of(width) * width * 4)
    with removed(folder / 'store') as root:
      ours = write(root, width, dtype)
    rounds.append((ours, plain))
  return report(f'write {width} {dtype}', rounds)


def timed_dd(path: Path, size: int) -> float:
  """GB/s of dd writing that many bytes of zeros, fsync included."""
  os.sync()
  began = time.perf_counter()
  subprocess.run(
    ['dd', 'if=/dev/zero', f'of={path}', 'bs=4M', f'count={size >> 22}',
     'conv=fsync'], check=True, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  seconds = time.perf_counter() - began
  path.unlink()
  return (size >> 22 << 22) / seconds / 1e9


@contextlib.contextmanager
def removed(root: Path) -> Iterator[Path]:
  try:
    yield root
  finally:
    shutil.rmtree(root, ignore_errors=True)


def write(root: Path, width: int, dtype: str) -> dict:
  os.sync()
  return ask(
    'write', root=str(root), width=width, rows=rows_of(width),
    rows_per_shard=_SHARD.value, dtype=dtype,
  )  # fmt: skip


def write_role(root, width, rows, rows_per_shard, dtype) -> dict:
  """A planned store filled with rows that come 4,096 at a time."""
  from sae_jax.store import create, writer

  rng = np.random.default_rng(0)
  x = rng.standard_normal((BATCH, width), np.float32)
  site = create.array_site(SITE, x, dtype)
  manifest, sequences, keep = planned([SITE], rows, width, rows_per_shard, site)
  with create.new_folder(root) as folder:
    create.create(folder, manifest, np.array(sequences), np.array(keep))
  meter = metered()
  with writer.open_writer(folder) as w:
    for first in range(0, rows, BATCH):
      w.write(first, {SITE: x})
    w.finish()
  return meter(rows * width * 4)


def planned(names, rows: int, width: int, rows_per_shard: int, site=None):
  """(manifest, sequences, keep) of sequences of 1,024 tokens, a row each."""
  from sae_jax.store.manifest import Site
  from sae_jax.store.plan import pack_keep, plan

  count = -(-rows // 1024)
  sequences = np.broadcast_to(np.arange(1024, dtype=np.int32), (count, 1024))
  keep = pack_keep(np.ones((1, 1024), bool))
  keep = np.broadcast_to(keep, (count, keep.shape[1]))
  site = site or Site('', width, 'float32')
  manifest = plan(
    sequences, keep, [dataclasses.replace(site, name=name) for name in names],
    rows=rows, rows_per_shard=rows_per_shard, rows_per_block=BLOCK,
    held_out_shards=0, norm_shards=1, seed=0, model={}, text={}, policy={},
    config={}, made_by={},
  )  # fmt: skip
  return manifest, sequences, keep


def metered() -> Callable[[int], dict]:
  """Starts the clocks; the function gives rates for bytes done since."""
  began, spent = time.perf_counter(), time.process_time()

  def read(size: int) -> dict:
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
      'gb_per_s': size / seconds / 1e9,
      'cpu_s_per_gb': (time.process_time() - spent) / size * 1e9,
      'peak_mb': peak * (1 if sys.platform == 'darwin' else 1024) / 1e6,
    }

  return read


# --- Reading ------------------------------------------------------------------


def bench_read(folder: Path, width: int, dtype: str) -> list[dict]:
  """Cold and warm; the plain side reads the files, whatever is in them."""
  rounds = {state: [] for state in EPOCHS}
  with removed(folder / 'store') as root:
    write(root, width, dtype)
    for _ in range(_ROUNDS.value):
      for state, found in rounds.items():
        sides = {}
        for role in ('plain', 'read'):
          if state == 'cold':
            drop_caches(root)
          else:
            read_files(root)
          sides[role] = ask(role, root=str(root), epochs=EPOCHS[state])
        found.append((sides['read'], sides['plain']['gb_per_s']))
  return [report(f'read {width} {dtype} {s}', r) for s, r in rounds.items()]


def drop_caches(root: Path) -> None:
  """Has the system forget the store's pages."""
  os.sync()
  try:
    Path('/proc/sys/vm/drop_caches').write_text('3')
  except OSError:  # not root, not Linux
    for path in bins(root):
      with open(path, 'rb') as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bins(root: Path) -> list[Path]:
  return sorted((root / 'sites').rglob('*.bin'))


def read_files(root: Path) -> int:
  """Reads all rows' files from first to last; the number of bytes."""
  buffer, total = memoryview(bytearray(4 << 20)), 0
  for path in bins(root):
    with open(path, 'rb', buffering=0) as file:
      while n := file.readinto(buffer):
        total += n
  return total


def plain_role(root: str, epochs: int) -> dict:
  meter = metered()
  return meter(sum(read_files(Path(root)) for _ in range(epochs)))


def read_role(root: str, epochs: int) -> dict:
  """Epochs of training batches; decoded bytes count."""
  import grain  # noqa: F401  # its import is not part of reading

  from sae_jax.store.batches import BatchSource, train_batches

  meter, total = metered(), 0
  source = BatchSource(root, SITE, BATCH, seed=0, window=8)
  batches = train_batches(source)
  for _ in range(epochs * (source.rows_per_epoch // BATCH)):
    total += next(batches).nbytes
  result = meter(total)
  batches.close()
  return result


# --- The first batch ----------------------------------------------------------


def bench_start(folder: Path) -> dict:
  with removed(folder / 'sparse') as root:
    ask('sparse', root=str(root), width=_WIDTH.value[0])
    found = [ask('start', root=str(root), began=time.monotonic())
             for _ in range(_ROUNDS.value)]  # fmt: skip
  medians = {k: round(statistics.median(f[k] for f in found), 3)
             for k in found[0]}  # fmt: skip
  print(f'start, {SHARDS:,} shards: {medians}')
  return {'figure': f'start {SHARDS} shards'} | medians


def sparse_role(root: str, width: int) -> dict:
  """A complete store of zeros whose files are holes."""
  import xxhash

  from sae_jax.store import manifest as m
  from sae_jax.store.plan import block_checksums
  from sae_jax.store.records import Record, merge_records
  from sae_jax.store.statistics import Moments

  rows = 1 << 16
  names = [SITE, 'layer_1.resid_post']
  plan, *_ = planned(names, SHARDS * rows, width, rows)

  @functools.cache
  def sums(part: str) -> bytes:
    dtype, wide = m.layout(plan, part)
    n = m.part_rows(plan, part, 0)
    return block_checksums(np.broadcast_to(dtype.type(0), (n, wide)), BLOCK)

  moments = Moments(rows, np.zeros(width), np.zeros(width))
  records = []
  for entry in plan.shards:
    files = {}
    for name, file in entry.files.items():
      path = Path(root) / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.touch()
      os.truncate(path, file.bytes)
      raw = sums(name.rpartition('/')[0])
      (Path(root) / m.blocks_path(name)).write_bytes(raw)
      checksum = xxhash.xxh3_64_hexdigest(raw)
      files[name] = m.FileEntry(file.bytes, checksum)
    records.append(Record(files, dict.fromkeys(names, moments)))
  m.write_manifest(root, merge_records(plan, records))
  return {}


def start_role(root: str, began: float) -> dict:
  """Seconds to the first batch of a process that starts now."""
  from sae_jax.store.batches import BatchSource, train_batches

  ready = time.monotonic()
  import grain  # noqa: F401

  imported = time.monotonic()
  source = BatchSource(root, SITE, BATCH, seed=0, window=8)
  opened = time.monotonic()
  batches = train_batches(source)
  next(batches)
  done = time.monotonic()
  batches.close()
  return {
    'python_and_store_s': ready - began, 'import_grain_s': imported - ready,
    'open_s': opened - imported, 'first_batch_s': done - opened,
    'without_imports_s': done - imported, 'all_s': done - began,
  }  # fmt: skip


# --- Reporting ----------------------------------------------------------------


def report(name: str, rounds: list[tuple[dict, float]]) -> dict:
  """One line of the table; medians of (ours, plain GB/s) of all rounds."""
  middle = lambda values: round(statistics.median(values), 3)
  figure = {
    'figure': name, 'load': round(os.getloadavg()[0], 1),
    'gb': _GB.value, 'rows_per_shard': _SHARD.value,
    'ratio': middle(ours['gb_per_s'] / plain for ours, plain in rounds),
    'plain_gb_per_s': middle(plain for _, plain in rounds),
  }  # fmt: skip
  for key in rounds[0][0]:
    figure[key] = middle(ours[key] for ours, _ in rounds)
  print(
    f'{name:26}{figure["gb_per_s"]:7.2f}{figure["plain_gb_per_s"]:7.2f}'
    f'{figure["ratio"]:7.2f}{figure["cpu_s_per_gb"]:10.2f}'
    f'{figure["peak_mb"]:9.0f}', flush=True,
  )  # fmt: skip
  return figure


ROLES = {
  'write': write_role, 'plain': plain_role, 'read': read_role,
  'sparse': sparse_role, 'start': start_role,
}  # fmt: skip

if __name__ == '__main__':
  cli.run(main)
