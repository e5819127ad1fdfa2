"""Times a study whose points share jobs against the same points one by one.

python scripts/bench_sweep.py --config=configs/scaling.py:demo \
    --most_latents=4096 --config.train.rows=400000
Two whole studies by launch/sweep.py in a temporary folder: with starts of
processes, compilation, input, evaluations while training and checkpoints; with
--sequences also the evaluations with the language model. Prints both times and
their ratio.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from sae_jax import cli
from sae_jax.paths import write_atomic
from sae_jax.sweep import tables

ROOT = Path(__file__).resolve().parents[1]
_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config of a study.')
_LATENTS = flags.DEFINE_integer(
  'most_latents', 2**30, 'Leaves out points with more.'
)
_SEQUENCES = flags.DEFINE_integer('sequences', 0, 'As in launch/sweep.py.')
_PAIRS = flags.DEFINE_integer('pairs', 1, 'Both ways so many times.')
flags.mark_flag_as_required('config')

# A config file that leaves out the wide points of another, and those of lengths
# of their own: --config.train.rows is for all.
_PART = """
import importlib.util
spec = importlib.util.spec_from_file_location('whole', {file!r})
whole = importlib.util.module_from_spec(spec)
spec.loader.exec_module(whole)
get_config = whole.get_config

def sweep(*arg):
  for changes in whole.sweep(*arg):
    narrow = changes.get('sae.latents', 0) <= {most}
    if narrow and 'train.rows' not in changes:
      yield changes
"""


def main() -> None:
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  file, colon, arg = name.partition(':')
  given = [a for a in sys.argv[1:] if a.startswith('--config.')]
  with tempfile.TemporaryDirectory() as folder:
    part = Path(folder) / 'part.py'
    write_atomic(
      part,
      _PART.format(file=str(Path(file).resolve()), most=_LATENTS.value),
    )
    for i in range(_PAIRS.value):
      times = {}
      for most in (0, 1)[:: 1 - 2 * (i % 2)]:  # each way first in turn
        to = Path(folder) / f'{i}-{most}'
        times[most] = study(f'{part}{colon}{arg}', to, given, most)
      together, apart = times[0], times[1]
      print(
        f'together {together:.1f} s, one by one {apart:.1f} s: '
        f'{apart / together:.2f}', flush=True,
      )  # fmt: skip


def study(config: str, folder: Path, given: list[str], most: int) -> float:
  """Seconds of a whole study with at most so many points a job, 0 for all."""
  began = time.perf_counter()
  subprocess.run(
    [sys.executable, str(ROOT / 'launch' / 'sweep.py'), f'--config={config}',
     *given, f'--workdir={folder}', f'--points_per_job={most}',
     f'--sequences={_SEQUENCES.value}'],
    check=True,
  )  # fmt: skip
  seconds = time.perf_counter() - began
  points, _ = tables.read(folder)
  assert all(p.state == 'done' for p in points)
  logging.info('%d points, %.1f s', len(points), seconds)
  return seconds


if __name__ == '__main__':
  cli.run(main)
