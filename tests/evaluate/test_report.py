"""The page: escaped, self-contained, and readable by a real browser."""

import html
import re
import shutil
import subprocess

import eval_fakes as fakes
import numpy as np
import pytest

from sae_jax.errors import UserError
from sae_jax.evaluate import figures, plots, report
from sae_jax.evaluate.contexts import Context, LatentContexts
from sae_jax.train.writer import read_metrics

VALUES = {
  'fvu': 0.12345, 'l0': 31.26, 'dead_share': 0.0417, 'mse': 2.5,
  'variance': 20.25, 'cosine': 0.9, 'relative_reconstruction_bias': 0.98765,
  'delta_loss': 0.4321, 'delta_loss_se': 0.0123, 'loss_recovered': 0.8765,
  'loss_recovered_se': None, 'ce_clean': 3.5, 'ce_splice': 3.9321,
  'ce_zero': 7.0,
}  # fmt: skip
METRICS = [
  {'step': i, 'rows': 100 * i, 'train/loss': 1 / i, 'train/l0': 40.0 + i}
  for i in range(1, 20)
]
BROWSER = shutil.which('chromium') or shutil.which('google-chrome')


def result(**changes):
  edges = np.linspace(-2, 0, 9)
  values = {
    'created': '2026-11-23T04:00:00+00:00',
    'run': '/runs/<i>a</i>',
    'config': '/runs/a/config.json',
    'checkpoint_step': 7,
    'training_rows': 123456,
    'store': '/stores/a&b',
    'site': 'layer_9.resid_post',
    'subject': {'name': 'model "<b>'},
    'text': {'name': 'texts', 'documents': 4, 'documents_read': 3},
    'dictionary': {'activation': 'topk', 'width': 16, 'latents': 48},
    'rows': 160,
    'sequences': 20,
    'predictions': 190,
    'figures': VALUES,
    'units': figures.units(VALUES),
    'firing_frequency': {
      'log10_edges': edges.tolist(),
      'latents': [0, 0, 1, 2, 20, 20, 2, 1],
      'dead': 2,
      'median_of_living': 0.1,
    },
    'seconds': {'total': 9.9},
    'versions': {'jax': '0.10.2'},
  }
  return values | changes


def context(ids, activations, peak, start=1):
  return Context(
    3, start, start + peak, np.array(ids), np.array(activations, np.float32)
  )


def feature(*contexts):
  return LatentContexts(11, 16, 0.1, list(contexts))


def page(features=(), metrics=METRICS, **changes):
  return report.render(
    result(**changes), metrics, features, fakes.nasty_tokenizer()
  )


@pytest.fixture(scope='module')
def nasty():
  """One feature over every token of the vocabulary."""
  ids = list(range(fakes.CFG.vocab))
  f = np.linspace(0, 8, len(ids))
  f[1] = np.nan
  return feature(context(ids, f, len(ids) - 1), context([3, 3], [2, 1], 0))


def test_texts_cannot_become_markup(nasty):
  text = page([nasty])
  for bad in ('<script', '<b>', '<bos>', '<i>', 'a&b', '&amp;amp;quot'):
    assert bad not in text.replace('<b>sae_jax</b>', '').replace(
      '<li><b>', '<li>'
    )
  assert '&lt;script&gt;alert(1)&lt;/script&gt;' in text
  assert '&amp;amp;' in text  # the token '&amp;' as such
  assert 'model &#34;&lt;b&gt;' in text and '/stores/a&amp;b' in text


def test_spans_show_tokens_activations_and_the_peak():
  c = context([5, 11, 9, 10, 8, 1], [0, 2, 1, 4, 0, np.nan], 3)
  spans = report.spans(c, 8.0, fakes.nasty_tokenizer())
  assert [s.text for s in spans] == ["'", ' the', 'é', '⏎', '<bos>']
  assert [s.shade for s in spans] == [0, 0.25, 0.5, 0, 0]
  assert [s.peak for s in spans] == [False, False, True, False, False]
  assert [s.known for s in spans] == [True] * 4 + [False]
  assert spans[2].title == 'activation 4'
  assert spans[4].title == 'not in the store'
  # Half a character at the end, and no tokenizer at all.
  spans = report.spans(context([9], [1], 0), 1.0, fakes.nasty_tokenizer())
  assert [s.text for s in spans] == ['\ufffd']
  assert report.spans(context([7], [1], 0), 1.0, None)[0].text == '7 '


def test_shades_and_titles_reach_the_page(nasty):
  text = page([nasty])
  assert text.count('class="peak"') == 2
  assert 'style="--a:1.0" title="activation 8"' in text
  assert 'class="off" title="not in the store">&lt;bos&gt;' in text
  assert 'Feature 11' in text and 'one in 10' in text


def test_every_figure_and_its_meaning_is_there(nasty):
  text = html.unescape(page([nasty]))
  for figure in figures.FIGURES:
    assert figure.label in text and figure.meaning in text
  for shown in ('0.1235', '31.3', '4.17%', '0.4321 ± 0.0123', '87.65%',
                '87.7%', '123,456 rows', '190'):  # fmt: skip
    assert shown in text
  assert text.count('<svg') == 3  # loss, L0, histogram


def test_the_page_asks_the_network_for_nothing(nasty):
  text = page([nasty])
  assert not re.search(r'https?:|//[a-z]|@import|<link|<script|<img', text)
  assert not re.search(r'\b(src|href)\s*=\s*["\']?[^"\'#\s]', text)
  assert not re.search(r'url\(\s*["\']?[^"\'#\s]', text)
  for name in re.findall(r'(?:href="#|url\(#)([^")]+)', text):
    assert f'id="{name}"' in text
  ids = re.findall(r'\bid="([^"]+)"', text)
  assert len(ids) == len(set(ids))


def test_absent_metrics_leave_gaps():
  assert '<svg' in page(metrics=[])  # the histogram
  assert 'no training curves' in page(metrics=[])
  lone = [{'step': 1, 'rows': 10, 'train/dead': 0.5}, {'rows': 20, 'step': 2}]
  text = page(metrics=lone)
  assert 'Dead latents over training rows' in text
  assert 'Training loss over' not in text
  dead = {'log10_edges': [-1, 0], 'latents': [0], 'dead': 48,
          'median_of_living': None}  # fmt: skip
  assert '<svg' not in page(metrics=[], firing_frequency=dead)


def test_colours_follow_the_theme():
  line = plots.Line('a', [0, 1, 2], [1.0, 2.0, 30.0])
  svg = plots.curves('x', [line, line], alt='a "quoted" <alt>')
  assert not re.search(r'#[0-9a-fA-F]{6}', svg)
  assert 'var(--plot)' in svg and 'var(--plot-2)' in svg
  assert 'aria-label="a &quot;quoted&quot; &lt;alt&gt;"' in svg


def test_small_shares_have_readable_ticks():
  line = plots.Line('a', [0, 1, 2], [0, 0.0002, 0.0005])
  svg = plots.curves('x', [line], alt='', percent=True)
  assert '>0.02%<' in svg and '>0.05%<' in svg


def test_metrics_of_a_run_that_goes_on(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  assert read_metrics(tmp_path) == []
  path.write_text('{"step": 1}\n{"step": 2}\n{"st')
  assert read_metrics(tmp_path) == [{'step': 1}, {'step': 2}]
  path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(UserError, match='metrics.jsonl'):
    read_metrics(tmp_path)


def test_sites_in_words():
  words = report.site_in_words
  assert words('layer_9.resid_post') == 'residual stream after layer 9'
  assert words('layer_0.mlp_out') == 'MLP output of layer 0'
  assert words('elsewhere') == 'elsewhere'


def test_the_table_for_the_terminal():
  lines = figures.text_table(VALUES | {'mse': None}).splitlines()
  assert lines[0].split() == ['Fraction', 'of', 'variance', 'unexplained',
                              '0.1235', 'share']  # fmt: skip
  assert any('undefined' in line for line in lines)
  assert len(lines) == len(figures.FIGURES)


@pytest.mark.skipif(not BROWSER, reason='needs chromium')
def test_a_browser_opens_it_without_a_network(tmp_path, nasty):
  path = tmp_path / 'report.html'
  path.write_text(page([nasty]))
  done = subprocess.run(
    [
      BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom',
      '--disable-background-networking', '--no-first-run',
      '--host-resolver-rules=MAP * ~NOTFOUND',
      f'--user-data-dir={tmp_path}/profile', '--enable-logging=stderr',
      f'file://{path}',
    ],
    capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'CONSOLE' not in done.stderr, done.stderr
  dom = html.unescape(done.stdout)
  assert '0.4321 ± 0.0123' in dom and 'Feature 11' in dom
  # The browser found no element that a token or a path smuggled in.
  assert '<script' not in done.stdout and '<i>a</i>' not in done.stdout
