"""Our training step beside those of other libraries, on the same rows.

python scripts/bench_vs_peers.py --peers=peers --rounds=3
Makes an environment for each library under --peers where there is none, then
runs pairs ours, theirs, ours, theirs, ..., each in a process of its own
(bench_step.py, peer_step.py). Every second pair has MKL's fast path on, which
is off by itself on processors of AMD. All processes, ours and theirs, run under
GLIBC_TUNABLES=glibc.malloc.hugetlb=1: large arrays in huge pages, which makes
every library's step faster. A table, then a line of JSON for each process;
where one fails or runs out of memory, the reason.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import peer_step
import step_clock
from machine import cpu, fast_mkl, memory_gib
from peer_step import PEERS, TORCH

from sae_jax import cli
from sae_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TUNABLES = 'glibc.malloc.hugetlb=1'
SHARE = 0.9  # of the machine's memory that a process may have

WORKS = {
  'topk-16k': {'activation': 'topk', 'latents': 16384, 'k': 32},
  'topk-64k': {'activation': 'topk', 'latents': 65536, 'k': 64},
  'jumprelu-16k': {'activation': 'jumprelu', 'latents': 16384, 'k': 32},
  'jumprelu-64k': {'activation': 'jumprelu', 'latents': 65536, 'k': 64},
  'batchtopk-16k': {'activation': 'batchtopk', 'latents': 16384, 'k': 32},
  'topk-1m': {'activation': 'topk', 'latents': 2**20, 'k': 64},
}
USUAL = ('topk-16k', 'topk-64k', 'jumprelu-16k', 'jumprelu-64k')


def main() -> None:
  p = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  p.add_argument('--peers', default='peers', help='folder of environments')
  p.add_argument('--peer', action='append', choices=PEERS, help='default: all')
  p.add_argument('--work', action='append', choices=WORKS,
                 help=f'default: {", ".join(USUAL)}')  # fmt: skip
  p.add_argument('--rounds', type=int, default=2, help='pairs of each kind')
  p.add_argument('--steps', type=int, default=10, help='steps that are timed')
  p.add_argument('--skip', type=int, default=3, help='steps before those')
  p.add_argument('--batch', type=int, default=4096)
  p.add_argument('--d', type=int, default=768)
  p.add_argument('--latents', type=int, help="instead of the works' own")
  p.add_argument('--rows', help='.npy file [n, d]; planted rows without it')
  p.add_argument('--ours', default='', help='more options of bench_step.py')
  p.add_argument('--mkl', action=argparse.BooleanOptionalAction, default=True)
  p.add_argument(
    '--memory_limit_gib', type=float, default=SHARE * memory_gib(),
    help=f'of a process; default: {100 * SHARE:.0f} %% of the memory',
  )  # fmt: skip
  p.add_argument('--timeout', type=float, default=3600, help='s of a process')
  a = p.parse_args()
  try:
    bench(a)
  except UserError as error:
    cli.stop(error)


def bench(a: argparse.Namespace) -> None:
  if a.rows and not Path(a.rows).is_file():
    raise UserError(f'--rows={a.rows} is not there: give a .npy file [n, d]')
  peers, works = a.peer or list(PEERS), a.work or USUAL
  folder = Path(a.peers).resolve()
  for peer in peers:
    make_environment(folder, peer)
  library = fast_mkl(folder) if a.mkl and 'AMD' in cpu() else None
  print(
    f'{cpu()}, {memory_gib():.0f} GiB; all under GLIBC_TUNABLES={TUNABLES}; at '
    f"most {a.memory_limit_gib:.1f} GiB a process; MKL's fast path "
    f'{"too" if library else "not switched on"}', flush=True,
  )  # fmt: skip
  runs = []
  with tempfile.TemporaryDirectory() as temporary:
    rows = a.rows or planted(a, Path(temporary) / 'rows.npy')
    for work in works:
      for peer in peers:
        if WORKS[work]['activation'] in PEERS[peer].activations:
          runs += pairs(a, work, peer, folder, library, rows)
  print('\n'.join(table(runs)))
  for run in runs:
    print(json.dumps(run))


# --- Environments -------------------------------------------------------------


def make_environment(folder: Path, name: str) -> None:
  """A virtual environment with one library, unless it is there.

  torch is named with the library, so that no resolution replaces it. pip's own
  settings say where packages come from; CPU builds of torch are enough.
  """
  peer, python = PEERS[name], folder / name / 'bin' / 'python'
  wanted = [f'{peer.package}=={peer.version}', TORCH]
  found = installed(python, wanted)
  if all(found):
    different = [x for x in found if x.split('+')[0] not in wanted]
    if different:
      print(f'{name}: there is {", ".join(different)}, not {wanted}')
    return
  print(f'making the environment {folder / name}', flush=True)
  pip = [python, '-m', 'pip', 'install', '-q', '--disable-pip-version-check']
  for command in (
    [sys.executable, '-m', 'venv', folder / name], [*pip, *wanted]
  ):  # fmt: skip
    if subprocess.run(command).returncode:
      raise UserError(f'{folder / name}: could not be made, see above')


def installed(python: Path, wanted: list[str]) -> list[str]:
  """What an environment has of these packages, '' for what it has not."""
  if not python.exists():
    return [''] * len(wanted)
  ask = (
    'import importlib.metadata as m\n'
    'for d in m.distributions(): print(d.name + "==" + d.version)'
  )
  done = subprocess.run(
    [python, '-c', ask], stdout=subprocess.PIPE, text=True, check=True
  )
  lines = done.stdout.lower().replace('_', '-').splitlines()
  has = {line.split('==')[0]: line for line in lines}
  return [has.get(x.split('==')[0], '') for x in wanted]


# --- Runs ---------------------------------------------------------------------


def planted(a: argparse.Namespace, path: Path) -> str:
  """The rows that both sides would plant, made once."""
  n = min(a.steps + a.skip, step_clock.SPAN) * a.batch + step_clock.HELD_OUT
  np.save(path, step_clock.planted_rows(n, a.d))
  return str(path)


def pairs(
  a: argparse.Namespace, work: str, peer: str, folder: Path,
  library: Path | None, rows: str,
) -> list[dict]:  # fmt: skip
  """What each process of all rounds said; 'pair' numbers them."""
  settings = WORKS[work] | ({'latents': a.latents} if a.latents else {})
  settings |= {
    'd': a.d, 'batch': a.batch, 'steps': a.steps, 'skip': a.skip, 'rows': rows,
    'memory_limit_gib': a.memory_limit_gib,
  }  # fmt: skip
  flags = [f'--{name}={value}' for name, value in settings.items()]
  ours = [sys.executable, ROOT / 'scripts/bench_step.py', *flags]
  ours += ['--no-bounds', *a.ours.split()]
  theirs = [folder / peer / 'bin' / 'python', peer_step.__file__, *flags]
  theirs += [f'--peer={peer}']
  path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
  runs = []
  for number in range(a.rounds):
    for mkl in (False, True) if library else (False,):
      about = {'work': work, 'against': peer, 'pair': number, 'mkl': mkl}
      preload = {'LD_PRELOAD': str(library)} if mkl else {}
      for command, environment in (
        (ours, {'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'}),
        (theirs, {'PYTHONPATH': ''} | preload),
      ):
        run = about | result(command, environment, a.timeout)
        print(summary(run), file=sys.stderr, flush=True)
        runs.append(run)
  return runs


def result(command: list, environment: dict, timeout: float) -> dict:
  """The JSON line of a process; {'peer', 'failed': reason} without one."""
  peer = 'sae_jax'
  for word in command:
    peer = str(word).removeprefix('--peer=') if '--peer=' in str(word) else peer
  environment = os.environ | {'GLIBC_TUNABLES': TUNABLES} | environment
  try:
    done = subprocess.run(
      command, env=environment, capture_output=True, text=True, timeout=timeout
    )
  except subprocess.TimeoutExpired:
    return {'peer': peer, 'failed': f'not done after {timeout:.0f} s'}
  if done.returncode:
    return {'peer': peer, 'failed': reason(done.returncode, done.stderr)}
  return json.loads(done.stdout.splitlines()[-1])


def reason(code: int, stderr: str) -> str:
  """One line: what an exit code and the end of a traceback say."""
  if code == -9:
    return 'killed (signal 9: the machine had no memory left?)'
  lines = [line.strip() for line in stderr.splitlines() if line.strip()]
  errors = [x for x in lines if re.match(r'[\w.]*(Error|Exception|error)\b', x)]
  last = (errors or lines or ['nothing on stderr'])[-1]
  noted = [f' ({x})' for x in lines[-1:] if x.startswith('during ')]
  return f'exit code {code}: {last[:200]}{"".join(noted)}'


# --- Reporting ----------------------------------------------------------------


def summary(run: dict) -> str:
  what = run.get('failed') or f'{run["step_ms"]} ms, FVU {run["fvu"]}'
  fast = ' (fast MKL)' if run['mkl'] and run['peer'] != 'sae_jax' else ''
  return f'{run["work"]}: {run["peer"]}{fast}: {what}'


def table(runs: list[dict]) -> list[str]:
  """Markdown; ms are medians over the rounds, ratios theirs / ours in pairs."""
  head = (
    '| work | peer | torch | ours ms | peer ms | ratio | peer ms, fast MKL | '
    'ratio | FVU ours / peer | L0 ours / peer | peak GiB ours / peer |'
  )
  lines = [head, '|' + '---|' * (head.count('|') - 1)]
  for work, peer in dict.fromkeys((r['work'], r['against']) for r in runs):
    here = [r for r in runs if (r['work'], r['against']) == (work, peer)]
    sides = {
      (r['peer'] == 'sae_jax', r['mkl'], r['pair']): r for r in here
    }  # fmt: skip
    whole = [r for r in here if 'failed' not in r]
    ours = [r for r in whole if r['peer'] == 'sae_jax']
    theirs = [r for r in whole if r['peer'] == peer]
    versions = {r['version'] for r in theirs} or {PEERS[peer].version}
    cells = [
      work, f'{peer} {versions.pop()}', theirs[0]['torch'] if theirs else '-',
      middle(ours, 'step_ms'),
    ]  # fmt: skip
    for mkl in (False, True):
      cells.append(middle([r for r in theirs if r['mkl'] == mkl], 'step_ms'))
      ratios = [
        r['step_ms'] / own['step_ms']
        for r in theirs
        if r['mkl'] == mkl
        and 'failed' not in (own := sides[True, mkl, r['pair']])
      ]
      found = f'{step_clock.median(ratios):.2f}' if ratios else '-'
      cells.append(found)
    for key, scale in (('fvu', 1), ('l0', 1), ('peak_mib', 1024)):
      cells.append(f'{middle(ours, key, scale)} / {middle(theirs, key, scale)}')
    lines.append(f'| {" | ".join(cells)} |')
    failed = {f'{r["peer"]}: {r["failed"]}': 0 for r in here if 'failed' in r}
    lines += [f'| {work} | {line} |' for line in failed]
  return lines


def middle(runs: list[dict], key: str, scale: float = 1) -> str:
  if not runs:
    return '-'
  return f'{step_clock.median([r[key] / scale for r in runs]):.4g}'


if __name__ == '__main__':
  main()
