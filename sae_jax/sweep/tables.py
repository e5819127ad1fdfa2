"""A study as two tables: its points, and their evaluations while training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae_jax.config import Config
from sae_jax.errors import UserError
from sae_jax.sweep import grid, study
from sae_jax.sweep.grid import Spec
from sae_jax.sweep.study import Study
from sae_jax.train import perf
from sae_jax.train.state import peak_rate
from sae_jax.train.writer import read_metrics


class Point(NamedTuple):
  """One SAE of a study; a row of study.parquet. None: not known, or none.

  FVU, L0 and MSE are those of the last evaluation on held-out rows during
  training; delta loss, in nats, is launch/evaluate.py's.
  """

  point: str  # its id: a hash of its config
  state: str  # 'done', 'failed', 'running' or 'missing'
  reason: str  # why it failed, or is missing
  stage: str  # 'grid', or 'trial': run to find a value for one of the grid
  changes: str  # JSON of the dotted keys in which it differs from the base
  activation: str
  d_in: int  # D
  latents: int  # F, the N of the laws
  k: float | None  # active latents aimed at: act.k, or loss.target_l0
  l0_coef: float
  lr: float  # peak, scaled to the width
  seed: int
  batch_rows: int
  rows: int  # rows to train on
  rows_done: int
  fvu: float | None
  l0: float | None
  mse: float | None
  dead_share: float | None  # of the latents, in training
  delta_loss: float | None
  delta_loss_se: float | None
  loss_recovered: float | None
  flops: float  # 12 B D F a step, as published
  flops_executed: float  # of the products that were done
  seconds: float  # of training; in a stack its share, by executed FLOPs
  device_hours: float
  members: int  # of its job; 1 where it was trained by itself
  folder: str  # its run folder; '' while it has none


class Mark(NamedTuple):
  """One evaluation of a point while it trained; a row of curves.parquet."""

  point: str
  step: int
  rows: int
  flops: float
  flops_executed: float
  seconds: float
  fvu: float
  l0: float
  mse: float


def read(folder: Path) -> tuple[list[Point], list[Mark]]:
  """The tables of a study's folder, as far as it is: the points of its grid,
  those that wait for trials or that no search found a value for at the end, and
  the trials. Raises UserError where there is no study."""
  manifest = study.read_study(folder)
  base, ids = study.base_of(manifest), study.grid_ids(manifest)
  points, marks, planned = [], [], set()
  for job in study.jobs(Study(folder, base, [])):
    record = study.read_job(job.folder)
    running = study.is_taken(job.folder)
    runs = {spec.id: job.run(spec) for spec in job.specs}
    lines = {id: _metrics(run) for id, run in runs.items()}
    work = {spec.id: _work(spec.config, lines[spec.id]) for spec in job.specs}
    planned |= runs.keys()
    for spec in job.specs:
      if spec.stage == 'grid' and spec.id not in ids:  # it has left the grid
        continue
      run = runs[spec.id]
      mine = _marks(spec, lines[spec.id], work, record['alone'])
      marks += mine
      state = _state(record, spec, run, running)
      members = len(job.specs) if record['alone'].get(spec.id, 1) else 1
      points.append(_point(spec, run, members, state, lines[spec.id], mine))
  for point in manifest['waiting'].values():
    if point['id'] in ids - planned:
      spec = grid.read_spec(point, base)
      points.append(_point(spec, None, 0, point['state'], [], []))
  return points, marks


def _state(
  record: dict[str, Any], spec: Spec, run: Path, running: bool
) -> tuple[str, str]:
  """Of a point in a job, and the reason if it failed or its run is damaged."""
  if spec.id in record['failed']:
    return 'failed', record['failed'][spec.id]
  found = study.state(run, spec.config, spec.id in record['done'])
  if found == 'done':
    return 'done', ''
  why = '' if found == 'open' else found
  return ('running' if running else 'missing'), why


def _metrics(run: Path) -> list[dict[str, Any]]:
  try:
    found = read_metrics(run)
  except (UserError, ValueError):  # the next start of the sweep says so
    found = []
  return [m for m in found if isinstance(m, dict) and 'step' in m]


class _Work(NamedTuple):
  """Up to each logged step of a run, sums."""

  steps: list[int]
  executed: list[float]
  seconds: list[float]  # of the whole job


def _work(config: Config, lines: Sequence[dict[str, Any]]) -> _Work:
  """FLOPs by what each stretch between two logged steps did; seconds between
  them. A stretch without a time (the first one, which compiles) takes as long
  a step as the next that has one."""
  logged = [m for m in lines if 'train/l0' in m]
  pace = [m.get('perf/step_ms') for m in logged]
  steps, executed, seconds = [0], [0.0], [0.0]
  for i, m in enumerate(logged):
    n = m['step'] - steps[-1]
    flops = perf.logged_flops(config, m)
    ms = next((x for x in pace[i:] + pace[::-1] if x), 0.0)
    steps.append(m['step'])
    executed.append(executed[-1] + n * flops['executed'])
    seconds.append(seconds[-1] + n * ms / 1e3)
  return _Work(steps, executed, seconds)


def _marks(
  spec: Spec,
  lines: Sequence[dict[str, Any]],
  work: dict[str, _Work],
  alone: dict[str, int],
) -> list[Mark]:
  config, mine = spec.config, work[spec.id]
  batch = config.train.batch_rows
  step = perf.step_flops(batch, config.sae.d_in, config.sae.latents, aux=False)[
    'published'
  ]
  total = sum(w.executed[-1] for w in work.values()) or 1.0
  share = mine.executed[-1] / total
  time = lambda at: float(np.interp(at, mine.steps, mine.seconds))

  def seconds(at: int) -> float:
    began = min(alone.get(spec.id, at), at)  # to be trained by itself
    return share * time(began) + time(at) - time(began)

  return [
    Mark(
      point=spec.id,
      step=m['step'],
      rows=m['step'] * batch,
      flops=m['step'] * step,
      flops_executed=float(np.interp(m['step'], mine.steps, mine.executed)),
      seconds=seconds(m['step']),
      fvu=m['eval/fvu'],
      l0=m['eval/l0'],
      mse=m['eval/mse'],
    )
    for m in lines
    if m.get('eval/fvu') is not None
  ]


def _point(
  spec: Spec,
  run: Path | None,
  members: int,
  state: Sequence[str],
  lines: Sequence[dict[str, Any]],
  marks: Sequence[Mark],
) -> Point:
  c, last = spec.config, marks[-1] if marks else None
  # From the base config too: it tells a coefficient that is given from one that
  # was found for an L0.
  aimed = {'loss.target_l0': c.loss.target_l0} if c.loss.target_l0 else {}
  dead = [m['train/dead'] for m in lines if m.get('train/dead') is not None]
  figures = evaluation(run) if run else {}
  seconds = last.seconds if last else 0.0
  devices = c.mesh.data * c.mesh.dict
  return Point(
    point=spec.id,
    state=state[0],
    reason=state[1],
    stage=spec.stage,
    changes=json.dumps(spec.changes | aimed),
    activation=c.act.name,
    d_in=c.sae.d_in,
    latents=c.sae.latents,
    k=spec.k,
    l0_coef=c.loss.l0_coef,
    lr=float(peak_rate(c)),
    seed=c.seed,
    batch_rows=c.train.batch_rows,
    rows=c.train.rows,
    rows_done=last.rows if last else 0,
    fvu=last.fvu if last else None,
    l0=last.l0 if last else None,
    mse=last.mse if last else None,
    dead_share=dead[-1] if dead else None,
    delta_loss=figures.get('delta_loss'),
    delta_loss_se=figures.get('delta_loss_se'),
    loss_recovered=figures.get('loss_recovered'),
    flops=last.flops if last else 0.0,
    flops_executed=last.flops_executed if last else 0.0,
    seconds=seconds,
    device_hours=seconds * devices / 3600,
    members=members,
    folder=str(run or ''),
  )


def evaluation(run: Path) -> dict[str, Any]:
  """The figures of evaluation.json, if there is one."""
  return _evaluation(run)['figures']


def evaluated(run: Path, sequences: int) -> bool:
  """Whether it has a delta loss, on so many sequences or on all there are."""
  found = _evaluation(run)
  there = found.get('held_out_sequences', sequences)
  wanted = min(sequences, there)
  return 'delta_loss' in found['figures'] and found.get('sequences') == wanted


def _evaluation(run: Path) -> dict[str, Any]:
  try:
    found = json.loads((run / 'evaluation.json').read_text())
    return found | {'figures': dict(found['figures'])}
  except (OSError, ValueError, KeyError, TypeError):  # none, or damaged
    return {'figures': {}}
