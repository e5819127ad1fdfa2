"""A whole evaluation of a tiny run, and what it refuses."""

import dataclasses
import errno
import json
import shutil

import eval_fakes as fakes
import numpy as np
import pytest

import sae_jax
from sae_jax.errors import UserError
from sae_jax.evaluate import job
from sae_jax.evaluate.held_out import read_held_out
from sae_jax.evaluate.splice import splice_loss
from sae_jax.store import reader
from sae_jax.store.create import write_arrays
from sae_jax.store.manifest import read_manifest

ALL = {'fvu', 'l0', 'dead_share', 'delta_loss', 'delta_loss_se', 'ce_zero',
       'loss_recovered', 'ce_clean', 'ce_splice', 'mse', 'cosine'}  # fmt: skip


@pytest.fixture(autouse=True)
def known_model(monkeypatch, subject):
  """The empty model file is read as the random model."""
  monkeypatch.setattr(job, 'load_subject', lambda _: subject)


def written(run_dir):
  return {p.name for p in run_dir.iterdir()} - {
    'config.json', 'checkpoints', 'metrics.jsonl',
  }  # fmt: skip


def test_a_folder_that_cannot_be_written_is_said_before_the_work(
  run_dir, tmp_path, monkeypatch
):
  def refuse(path, data):
    raise OSError(errno.EROFS, 'Read-only file system')

  monkeypatch.setattr(job, 'write_atomic', refuse)
  monkeypatch.setattr(job, 'open_run', None)
  with pytest.raises(UserError, match='Read-only .*: give --out=DIR'):
    job.evaluate(run_dir)
  monkeypatch.undo()
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='Not a directory'):
    job.evaluate(run_dir, out=str(tmp_path / 'file/x'), language_model=False)
  assert written(run_dir) == set()


def test_the_files_of_another_folder(run_dir, tmp_path):
  out = tmp_path / 'new' / 'out'
  job.evaluate(run_dir, language_model=False, contexts=0, out=str(out))
  assert written(run_dir) == set()
  assert written(out) == {'evaluation.json', 'report.html'}


def test_figures_are_those_of_the_held_out_split(run_dir, store, subject):
  result = job.evaluate(run_dir)
  assert json.loads((run_dir / 'evaluation.json').read_text()) == result
  assert written(run_dir) == {'evaluation.json', 'report.html'}
  figures = result['figures']
  assert ALL <= figures.keys() == result['units'].keys()
  sae = sae_jax.load(run_dir)
  x, _ = zip(*reader.held_out(store, fakes.SITE), strict=True)
  x = np.concatenate(x).astype(np.float32)
  assert len(x) == result['rows'] == 160
  error = np.square(x - sae.decode(sae.encode(x))).sum()
  variance = np.square(x - x.mean(0)).sum()
  np.testing.assert_allclose(figures['fvu'], error / variance, 1e-5)
  dead = np.mean(~np.any(sae.encode(x), axis=0))
  assert figures['dead_share'] == dead
  assert result['firing_frequency']['dead'] == round(dead * 48)
  alive = sum(result['firing_frequency']['latents'])
  assert alive == 48 - result['firing_frequency']['dead'] > 0
  held_out = read_held_out(store, read_manifest(store))
  whole = slice(held_out.whole)
  spliced = splice_loss(
    subject.params, subject.cfg, sae, fakes.SITE, held_out.tokens[whole],
    held_out.stored[whole], latents=48,
  )  # fmt: skip
  assert result['sequences'] == held_out.whole
  assert result['held_out_sequences'] == held_out.whole
  assert figures['delta_loss'] == pytest.approx(spliced.delta_loss, rel=1e-4)
  assert result['training_rows'] == 3 * 32
  assert result['versions']['jax'] and result['seconds']['total'] > 0


def test_counts_bound_the_work(run_dir):
  result = job.evaluate(run_dir, rows=50, sequences=4, contexts=3)
  assert result['rows'] == 50 and result['sequences'] == 4
  assert (run_dir / 'report.html').read_text().count('class="feature"') == 3


def test_without_the_language_model(run_dir, store, tmp_path):
  result = job.evaluate(run_dir, language_model=False)
  assert not ALL <= result['figures'].keys() and result['sequences'] == 0
  page = (run_dir / 'report.html').read_text()
  assert 'w20' in page and '--lm=false' in page
  # Not even the tokenizer is there: token ids take its place.
  result = job.evaluate(
    run_dir, language_model=False, model_path=str(tmp_path / 'gone')
  )
  assert 'w20' not in (run_dir / 'report.html').read_text()


def test_a_store_and_a_model_that_moved(run_dir, store, tmp_path):
  shutil.copytree(store, tmp_path / 'moved')
  config = json.loads((run_dir / 'config.json').read_text())
  config['store']['path'] = '/nowhere'
  (run_dir / 'config.json').write_text(json.dumps(config))
  (tmp_path / 'model').write_bytes(b'')
  result = job.evaluate(
    run_dir,
    store_path=str(tmp_path / 'moved'),
    model_path=str(tmp_path / 'model'),
  )
  assert result['store'] == str(tmp_path / 'moved')


def test_rows_of_huge_norm_are_told_or_left_out(run_dir, tmp_path, caplog):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(128, 16)).astype(np.float32)
  x[[5, 70]] *= 100  # one is held out
  write_arrays(
    tmp_path / 's', {fakes.SITE: x}, rows_per_shard=64, rows_per_block=16
  )
  evaluate = lambda: job.evaluate(
    run_dir, language_model=False, store_path=str(tmp_path / 's')
  )
  result = evaluate()
  (line,) = [s for s in caplog.messages if 'max_norm' in s]
  assert '1 of 64 rows' in line and result['outliers']['said'] in line
  assert result['rows'] == 64 and result['figures']['variance'] > 1000
  config = json.loads((run_dir / 'config.json').read_text())
  config['store']['max_norm'] = 10.0
  (run_dir / 'config.json').write_text(json.dumps(config))
  caplog.clear()
  found = evaluate()
  assert not [s for s in caplog.messages if 'max_norm' in s]
  assert found['rows'] == 63
  assert found['outliers'] == result['outliers']
  assert found['outliers']['count'] == 1
  variance = np.delete(x[:64], 5, 0).astype(np.float64).var(0).sum()
  np.testing.assert_allclose(found['figures']['variance'], variance, 1e-6)


def test_the_model_keeps_the_rows_that_were_left_out(run_dir):
  before = job.evaluate(run_dir, contexts=0)['figures']
  config = json.loads((run_dir / 'config.json').read_text())
  config['store']['max_norm'] = 1.0  # half of them
  (run_dir / 'config.json').write_text(json.dumps(config))
  after = job.evaluate(run_dir, contexts=0)['figures']
  assert after['ce_clean'] == before['ce_clean']
  assert after['ce_zero'] != before['ce_zero']


def refuses(run_dir, match, **arguments):
  with pytest.raises(UserError, match=match):
    job.evaluate(run_dir, **arguments)
  assert written(run_dir) == set()


def test_refusals(run_dir, store, tmp_path, monkeypatch, subject):
  refuses(run_dir, '--rows=0', rows=0)
  refuses(run_dir, '--sequences=0', sequences=0)
  refuses(run_dir, '--contexts=-1', contexts=-1)
  refuses(run_dir, 'no activation store at /nowhere', store_path='/nowhere')
  refuses(run_dir, "no file '/nowhere'.*--model_path", model_path='/nowhere')
  other = dataclasses.replace(subject, weights_sha256='f' * 64)
  monkeypatch.setattr(job, 'load_subject', lambda _: other)
  refuses(run_dir, 'not the model that was harvested.*weights_sha256 fff')
  cfg = dataclasses.replace(subject.cfg, head=False)
  other = dataclasses.replace(subject, cfg=cfg)
  refuses(run_dir, 'without its head .*--lm=false')
  monkeypatch.undo()
  config = json.loads((run_dir / 'config.json').read_text())
  rows = {fakes.SITE: np.ones((64, 16), np.float32)}
  write_arrays(tmp_path / 'other', rows, rows_per_shard=16, rows_per_block=16)
  config['store']['path'] = str(tmp_path / 'other')
  (run_dir / 'config.json').write_text(json.dumps(config))
  refuses(run_dir, 'is not the one .* --store_path')
  config['store']['path'] = str(store)
  config['sae']['d_in'] = 24
  (run_dir / 'config.json').write_text(json.dumps(config))
  refuses(run_dir, 'is 16 wide .* takes 24')
  config['store']['site'] = 'layer_1.resid_post'
  (run_dir / 'config.json').write_text(json.dumps(config))
  refuses(run_dir, "no 'layer_1.resid_post'.*layer_0.resid_post")


def test_a_folder_below_home(run_dir, monkeypatch):
  """A shell leaves the ~ of --workdir=~/run as it is."""
  monkeypatch.setenv('HOME', str(run_dir.parent))
  job.evaluate(f'~/{run_dir.name}', language_model=False)
  assert (run_dir / 'report.html').exists()
  with pytest.raises(UserError, match='is a URL'):
    job.evaluate('gs://bucket/run', language_model=False)


def test_the_smallest_of_stores(run_dir, tmp_path, subject):
  """Eight held-out rows, all alike, the beginning of one sequence."""
  (tmp_path / 'model').write_bytes(b'')
  tokens, keep = fakes.random_tokens(4)
  rows = np.ones((keep.sum(), 16), np.float32)
  origin = fakes.origin(subject, tmp_path / 'model')
  fakes.write_store(
    tmp_path / 'small', tokens, keep, rows, shard=8, block=8, **origin
  )
  store = str(tmp_path / 'small')
  refuses(run_dir, 'no whole held-out sequence', store_path=store)
  result = job.evaluate(run_dir, store_path=store, language_model=False)
  assert result['figures']['fvu'] is None  # no variance
  assert 'undefined' in (run_dir / 'report.html').read_text()


def test_a_store_without_a_language_model(run_dir, tmp_path):
  rows = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
  write_arrays(
    tmp_path / 'arrays', {fakes.SITE: rows}, rows_per_shard=16,
    rows_per_block=16, held_out_shards=2,
  )  # fmt: skip
  store = str(tmp_path / 'arrays')
  refuses(run_dir, "no file ''", store_path=store)
  result = job.evaluate(run_dir, store_path=store, language_model=False)
  assert result['rows'] == 32
