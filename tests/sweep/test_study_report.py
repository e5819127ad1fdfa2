"""The report of a study: its page, its tables, and what they leave out."""

import csv
import html
import json
import re
import sys

import numpy as np
import pytest

from sae_jax.errors import UserError
from sae_jax.sweep import charts, drawing, report
from sae_jax.sweep.tables import Mark, Point

HOSTILE = '<script>alert("1")</script> & <b>NaN</b> after 3 steps'
WIDTHS = (512, 1024, 2048, 4096)


def loss(latents, k, rows):
  return 0.04 + 1.9 * latents**-0.3 * k**-0.25 + 40 * rows**-0.55


def point(latents, k, rows, **changes):
  flops = 12.0 * 64 * latents * rows
  name = f'{latents}-{k}-{rows}-{changes.get("lr", 3e-4):g}'
  values = Point(
    point=name, state='done', reason='', stage='grid',
    changes=json.dumps({'act.k': k}), activation='topk', d_in=64,
    latents=latents, k=k, l0_coef=0.0, lr=3e-4, seed=0, batch_rows=1024,
    rows=rows, rows_done=rows, fvu=loss(latents, k, rows), l0=float(k),
    mse=0.5, dead_share=0.02 * latents / 4096, delta_loss=loss(latents, k, rows)
    * 2, delta_loss_se=0.01, loss_recovered=0.9, flops=flops,
    flops_executed=flops * 0.7, seconds=flops / 1e11,
    device_hours=flops / 1e11 / 3600, members=1, folder=f'runs/{name}',
  )  # fmt: skip
  return values._replace(**changes)


def marks_of(p):
  shares = np.geomspace(0.02, 1, 12)
  return [
    Mark(p.point, i, int(p.rows * s), p.flops * s, p.flops_executed * s,
         p.seconds * s, loss(p.latents, p.k, p.rows * s), p.k, 0.5)
    for i, s in enumerate(shares)
  ]  # fmt: skip


def fit(name, x, y, xs, ys, **changes):
  far = np.geomspace(min(xs), 4 * max(xs), 20)
  curve = np.exp(np.interp(np.log(far), np.log(xs), np.log(ys)))
  return {
    'name': name, 'law': 'irreducible', 'title': f'{name} in words',
    'formula': 'E + A N^-alpha', 'x': x, 'y': y,
    'slice': {'activation': 'topk', 'k': 32},
    'points': [
      {'x': a, 'y': b, 'point': None} for a, b in zip(xs, ys, strict=True)
    ],
    'params': {
      'E': {'value': 0.04, 'low': 0.03, 'high': 0.05},
      'alpha': {'value': 0.3123, 'low': 0.29, 'high': 0.33},
    },
    'rms_log_error': 0.0123,
    'curve': {
      'x': far.tolist(), 'y': curve.tolist(), 'low': (curve * 0.95).tolist(),
      'high': (curve * 1.05).tolist(),
    },
    'held_out': None, 'verdict': 'ok', 'why': '', 'warnings': [],
  } | changes  # fmt: skip


def laws_of(points):
  part = {'activation': 'topk', 'k': 32}
  own = [p for p in points if p.k == 32 and p.rows == 4_000_000 and p.fvu]
  own = [p for p in own if p.stage == 'grid' and p.state == 'done']
  n, y = [p.latents for p in own], [p.fvu for p in own]
  c = [1e11, 1e12, 1e13]
  grid = [p for p in points if p.stage == 'grid' and p.fvu]
  curve = {'x': n, 'y': y, 'low': y, 'high': y}
  joint = fit(
    'L(N,K)', 'latents', 'fvu', n, y, law='joint', slice={'activation': 'topk'},
    title='loss against latents and k', curve=None,
    points=[{'x': p.latents, 'y': p.fvu, 'point': p.point} for p in grid],
    curves={'32': curve, '64': curve},
  )  # fmt: skip
  held = {'x': 4096, 'measured': y[-1], 'predicted': y[-1] * 1.02,
          'low': y[-1] * 0.98, 'high': y[-1] * 1.06}  # fmt: skip
  why = 'alpha is anywhere from 0.1 to 0.9'
  return {
    'format': 'sae_jax.laws', 'version': 1, 'metric': 'fvu',
    'flops': 'published', 'level': 0.9, 'left_out': 'one failed point',
    'seed_noise': None,
    'fits': [
      fit('L(N)|k=32', 'latents', 'fvu', n, y, held_out=held),
      fit('L(C)|k=32', 'flops', 'fvu', c, [0.5, 0.35, 0.3]),
      joint,
      fit('N_opt(C)|k=32', 'flops', 'latents', c, [600, 1100, 2100]),
      fit('rows_opt(C)|k=32', 'flops', 'rows', c, [1e5, 8e5, 5e6],
          verdict='undetermined', why=why),
      fit('lr_opt(N)|k=32', 'latents', 'lr', [512, 1024], [4e-4, 3e-4],
          verdict='too few points', why='2 widths', params=None, curve=None),
    ],
    'envelopes': [{
      'slice': part, 'flops': [*c, 1e14], 'loss': [0.5, 0.35, 0.3, 0.26],
      'latents': [600, 1100, 2100, 4096], 'rows': [1e5, 8e5, 5e6, 3e7],
      'edge': [False, False, False, True],
    }],
    'time_to_target': [
      {'slice': part, 'target': t, 'latents': w, 'flops': f, 'seconds': s}
      for w in WIDTHS
      for t, f, s in ((0.4, 1e11 * w, 0.9 * w), (0.3, 3e11 * w, 2.5 * w),
                      (0.2, None, None))
    ],
    'predictions': [{'slice': part, 'latents': 16384, 'predicted': 0.17,
                     'low': 0.16, 'high': 0.18, 'beyond': 4.0}],
    'recommendation': [{
      'slice': part, 'flops': 1e15, 'latents': 6200, 'latents_low': 5000,
      'latents_high': 8000, 'rows': 2e8, 'lr': None, 'predicted': 0.21,
      'low': 0.19, 'high': 0.23, 'beyond': 10.0, 'warnings': ['far outside'],
    }],
  }  # fmt: skip


@pytest.fixture(scope='module')
def study():
  points = [
    point(latents, k, rows)
    for k in (32, 64) for latents in WIDTHS for rows in (1_000_000, 4_000_000)
  ]  # fmt: skip
  points += [
    point(latents, 32, 1_000_000, lr=lr, stage='trial', delta_loss=None,
          fvu=loss(latents, 32, 1e6) + bump)
    for latents in (512, 1024)
    for lr, bump in ((1e-4, 0.02), (2e-4, 0.005), (1e-3, 0.03))
  ]  # fmt: skip
  nothing = dict(fvu=None, l0=None, mse=None, dead_share=None, delta_loss=None,
                 delta_loss_se=None, loss_recovered=None)  # fmt: skip
  points += [
    point(8192, 32, 1_000_000, state='failed', reason=HOSTILE, **nothing),
    point(16384, 64, 1_000_000, point='unmeasured', **nothing),
  ]
  marks = [m for p in points if p.fvu for m in marks_of(p)]
  return points, marks, laws_of(points)


@pytest.fixture(scope='module')
def written(study, tmp_path_factory):
  folder = tmp_path_factory.mktemp('study')
  assert report.write(folder, 'resid <i>9</i>', *study) == folder / 'study.html'
  return folder


@pytest.fixture(scope='module')
def page(written):
  return (written / 'study.html').read_text(encoding='utf-8')
