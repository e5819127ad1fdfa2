"""The report of a study: its page, its tables, and what they leave out."""

import csv
import errno
import html
import json
import math
import os
import re
import sys

import numpy as np
import pytest

from sae_jax.errors import UserError
from sae_jax.sweep import charts, drawing, report
from sae_jax.sweep.tables import Mark, Point

pq = pytest.importorskip('pyarrow.parquet')

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
  curve = np.exp(np.polyval(np.polyfit(np.log(xs), np.log(ys), 1), np.log(far)))
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
    'exponent': {'value': 0.3123, 'low': 0.29, 'high': 0.33},
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
  c = np.geomspace(1e11, 4e12, 5).tolist()
  low = [min((loss(w, 32, x / 768 / w), w) for w in WIDTHS) for x in c]
  best = [w for _, w in low]
  rows = [x / 768 / w for x, w in zip(c, best, strict=True)]
  grid = [p for p in points if p.stage == 'grid' and p.fvu]
  curves = {
    str(k): {'x': n, 'y': [loss(w, k, 4_000_000) for w in n], 'low': None,
             'high': None} for k in (32, 64)
  }  # fmt: skip
  joint = fit(
    'L(N,K)', 'latents', 'fvu', n, y, law='joint',
    slice={'activation': 'topk', 'k': None}, curve=None,
    title='loss against latents and k',
    points=[{'x': p.latents, 'y': p.fvu, 'point': p.point} for p in grid],
    curves=curves,
  )  # fmt: skip
  held = {'x': 4096, 'measured': y[-1], 'predicted': y[-1] * 1.02,
          'low': y[-1] * 0.98, 'high': y[-1] * 1.06}  # fmt: skip
  why = 'alpha is anywhere from 0.1 to 0.9'
  return {
    'format': 'sae_jax.laws', 'version': 1, 'metric': 'fvu',
    'flops': 'published', 'level': 0.9, 'seed_noise': None,
    'left_out': '1 of 24 points is left out: 1 failed',
    'fits': [
      fit('L(N)|k=32', 'latents', 'fvu', n, y, held_out=held),
      fit('L(C)|k=32', 'flops', 'fvu', c, [y for y, _ in low]),
      joint,
      fit('N_opt(C)|k=32', 'flops', 'latents', c[1:4], best[1:4]),
      fit('rows_opt(C)|k=32', 'flops', 'rows', c[1:4], rows[1:4],
          verdict='undetermined', why=why),
      fit('lr_opt(N)|k=32', 'latents', 'lr', [512, 1024], [2.7e-4, 2.4e-4],
          verdict='too few points', why='2 widths', params=None, curve=None),
    ],
    'envelopes': [{
      'slice': part, 'flops': c, 'loss': [y for y, _ in low],
      'latents': best, 'rows': rows, 'edge': [True, False, False, False, True],
    }],
    'time_to_target': [
      {'slice': part, 'target': t, 'latents': w, 'flops': f, 'seconds': s}
      for w in WIDTHS
      for t, f, s in ((0.4, 1e11 * w, 0.9 * w), (0.3, 3e11 * w, 2.5 * w),
                      (0.2, None, None))
    ],
    'predictions': [{'slice': part, 'latents': 16384, 'predicted': 0.088,
                     'low': 0.08, 'high': 0.1, 'beyond': 4.0}],
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


def test_tables_keep_every_point_and_mark(study, written):
  points, marks, _ = study
  for name, kind, rows in (('study', Point, points), ('curves', Mark, marks)):
    read = pq.read_table(written / f'{name}.parquet')
    assert [kind(**row) for row in read.to_pylist()] == rows
  with open(written / 'points.csv', encoding='utf-8', newline='') as file:
    lines = list(csv.DictReader(file))
  assert [line['reason'] for line in lines] == [p.reason for p in points]
  assert lines[-1]['fvu'] == '' and float(lines[0]['fvu']) == points[0].fvu
  assert (written / 'curves.csv').read_text().count('\n') == len(marks) + 1


def test_each_chart_has_its_picture_and_the_numbers_in_it(study, written, page):
  names = {p.stem for p in (written / 'figures').iterdir()}
  assert {n.partition('-topk')[0] for n in names} == {
    'compute', 'latents', 'joint', 'best-width', 'best-rows', 'pareto-fvu',
    'pareto-delta-loss', 'lr', 'best-lr', 'dead', 'target-seconds',
    'target-flops',
  }  # fmt: skip
  assert (
    page.count('<svg')
    == page.count('aria-label="', page.index('<svg'), page.rindex('</svg>'))
    == len(names)
  )
  for name in names:
    figure = written / 'figures' / name
    png = figure.with_name(f'{name}.png').read_bytes()
    assert png.startswith(b'\x89PNG') and len(png) > 5000
  with open(written / 'figures' / 'latents-topk-k-32.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  shown = {r['series']: r for r in rows}
  assert set(shown) == {'measured', 'law', 'held out', 'predicted without it',
                        'predicted'}  # fmt: skip
  own = [p for p in study[0] if p.fvu == float(shown['held out']['y'])]
  assert [p.latents for p in own] == [4096]
  assert float(shown['predicted']['low']) == 0.08
  drawn = {p.stem: p.read_text() for p in written.glob('figures/*.csv')}
  assert not any('unmeasured' in text for text in drawn.values())
  assert str(loss(4096, 64, 4_000_000)) in drawn['pareto-fvu-topk']
  # Trials are only in the chart of learning rates.
  assert not any('-0.0001' in text for text in drawn.values())
  assert str(loss(512, 32, 1_000_000) + 0.02) in drawn['lr-topk-k-32']
  assert drawn['best-width-topk-k-32'].count('"best, at the edge"') == 2
  assert drawn['best-width-topk-k-32'].count('"best"') == 3


def test_the_page_asks_the_network_for_nothing(written, page):
  assert not re.search(r'https?:|//[a-z]|@import|<link|<script|<img', page)
  assert not re.search(r'url\(\s*["\']?[^"\'#\s]', page)
  for target in re.findall(r'\b(?:src|href)\s*=\s*["\']?([^"\'\s>]*)', page):
    if target.startswith('#'):
      assert f'id="{target[1:]}"' in page
    else:
      assert (written / target).is_file()
  ids = re.findall(r'\bid="([^"]+)"', page)
  assert len(ids) == len(set(ids))
  assert not re.search(r'(fill|stroke): #', page)  # colours are the theme's


def test_reasons_and_titles_cannot_become_markup(page):
  assert '<script' not in page and '<b>NaN' not in page
  assert html.escape(HOSTILE, quote=False) in page.replace('&#34;', '"')
  assert 'resid &lt;i&gt;9&lt;/i&gt;' in page and '<i>9' not in page


def test_what_the_page_says(page):
  text = re.sub(r'\s+', ' ', html.unescape(page))
  for shown in (
    '23 of 24', 'SAEs done; 1 failed', '512–16,384', 'alpha = 0.312',
    'exponent of loss over compute [0.29, 0.33], topk, k = 32',
    'rows_opt(C) is undetermined: alpha is anywhere from 0.1 to 0.9.',
    'too few points', '1 of 24 points is left out: 1 failed.', '1.23%',
    'predicted (+2.0%)', '4 times beyond the study', 'far outside', '10¹⁵',
    'No law L(N) was fitted here.', '4 of 12 pairs', 'noise is unknown',
    '6,200 [5,000, 8,000]', '2 of 16 SAEs are beaten by none',
  ):  # fmt: skip
    assert shown in text, shown
  assert '>1,024</text>' in page and '>2,048</text>' in page


def test_a_study_that_was_not_fitted(study, tmp_path):
  few = [study[0][0], study[0][-1], study[0][-2]]
  shown = {'metric': 'fvu', 'flops': 'published'}
  page = report.write(tmp_path, 'early', few, [], shown).read_text()
  assert 'No law was fitted' in page and 'not fitted' in page
  assert 'noise is unknown' not in page  # nobody looked
  assert page.count('<svg') == 5  # compute, latents, two fronts, dead
  assert 'Left out: no width was trained at several learning rates.' in page
  page = report.write(tmp_path / 'none', 'none', [], [], {}).read_text()
  assert 'The study has no points' in page and '<svg' not in page
  assert 'numbers in' not in page
  assert pq.read_table(tmp_path / 'none' / 'study.parquet').num_rows == 0


def test_the_front_is_what_no_other_beats():
  at = [(32.0, 0.2), (32.0, 0.3), (64.0, 0.1), (80.0, 0.1), (50.0, 0.25)]
  assert charts.front(at) == [(32.0, 0.2), (64.0, 0.1)]


@pytest.mark.parametrize(
  'value, shown',
  [(None, ''), (0.0, '0'), (0.12345, '0.123'), (1024, '1,024'),
   (999.7, '1,000'), (3e-4, '3\u00a0×\u00a010⁻⁴'), (1e15, '10¹⁵'),
   (9.999e8, '10⁹'), (-2048, '-2,048'), (math.nan, 'not finite')],
)  # fmt: skip
def test_numbers_for_people(value, shown):
  assert drawing.number(value) == shown


def test_without_pyarrow(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(UserError, match=r"'sae-jax\[study\]'") as error:
    report.write(tmp_path, 'x', [], [], {})
  assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['points.csv', 'study.html'])
def test_a_write_that_fails_leaves_the_old_page(name, tmp_path, monkeypatch):
  path = report.write(tmp_path, 'old', [], [], {})
  replace = os.replace

  def full(source, target):
    if str(target).endswith(name):
      raise OSError(errno.ENOSPC, 'No space left on device')
    replace(source, target)

  monkeypatch.setattr(os, 'replace', full)
  with pytest.raises(OSError, match='No space'):
    report.write(tmp_path, 'new', [], [], {})
  assert '<h1>old</h1>' in path.read_text()
  assert not list(tmp_path.glob('*.tmp'))
