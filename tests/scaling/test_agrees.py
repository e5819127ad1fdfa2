"""The planner counts what training does: its AuxK, its rows, its refusals."""

import jax
import numpy as np
import pytest

from sae_jax.errors import UserError
from sae_jax.models import objectives
from sae_jax.parallel import select
from sae_jax.parallel.mesh import make_mesh
from sae_jax.scaling import arithmetic, plan, search, topology
from sae_jax.scaling.compiled import (
  Compiled,
  abstract_arguments,
  compile_step,
)
from sae_jax.scaling.rows import ASSUMED, Rows, rows_of
from sae_jax.store.create import write_arrays
from sae_jax.train.config import base_config
from sae_jax.train.rows import open_source, put_rows
from sae_jax.train.state import make_penalties

B, D, F = 1024, 256, 4096


def _config(data=1, dict_=4, micro=1, **kw):
  c = base_config()
  c.sae.d_in, c.sae.latents, c.train.batch_rows = D, F, B
  c.train.micro_batches, c.train.compute_dtype = micro, 'bfloat16'
  c.mesh.data, c.mesh.dict = data, dict_
  for key, value in kw.items():
    c.update_from_flattened_dict({key.replace('__', '.'): value})
  return c


@pytest.mark.parametrize(
  'act,coef,products',
  [
    ('jumprelu', 1.0, 5), ('topk', 1.0, 8), ('topk', 0.0, 5),
    ('batchtopk', 1.0, 8), ('batchtopk', 0.0, 5),
  ],
)  # fmt: skip
def test_aux_k_counts_for_every_activation_that_has_it(act, coef, products):
  c = _config(2, 4, 2, act__name=act, loss__aux_coef=coef)
  has = any(isinstance(p, objectives.AuxK) for p in make_penalties(c))
  assert has == arithmetic.has_aux(c) == (products == 8)
  flops = sum(k.flops * n for k, n in arithmetic.work(c))
  assert flops * 8 == products * 2 * B * D * F
  sums, gathers = (
    sum((x.times or 0) * x.elements for x in arithmetic.traffic(c)
        if (x.axis, x.kind) == ('dict', kind))
    for kind in ('all-reduce', 'all-gather')
  )  # fmt: skip
  assert sums == B // 2 * D * (2 if has else 1)  # over both micro-batches
  # Values and indices of 4 shards: k = 32 of TopK, 256 of AuxK.
  selected = (32 if act == 'topk' else 0) + (256 if has else 0)
  assert gathers == 2 * B // 2 * selected * 4


def test_too_many_candidates_go_as_counts(monkeypatch):
  c = _config(1, 4, 2, act__name='batchtopk', loss__aux_k=2000)
  most = B // 2 * 1024 * 4  # no shard has more than its 1024 latents
  kinds = lambda: [
    (x.kind, x.elements) for x in arithmetic.traffic(c) if 'largest' in x.source
  ]
  monkeypatch.setattr(select, 'MOST_CANDIDATES', most)
  assert kinds() == [('all-gather', 2 * most)]
  monkeypatch.setattr(select, 'MOST_CANDIDATES', most - 1)
  assert kinds() == [('all-reduce', 32 * B // 2)]


@pytest.mark.parametrize('act', ['topk', 'batchtopk'])
def test_the_real_step_gathers_the_candidates_that_arithmetic_counts(act):
  small = dict(sae__latents=1024, sae__d_in=16, train__codes='dense')
  c = _config(2, 4, 2, act__name=act, **small)
  compiled = compile_step(c, make_mesh(2, 4), np.float32)
  assert isinstance(compiled, Compiled)
  gathered = lambda found: sum(
    (x.times or 0) * x.elements for x in found
    if (x.axis, x.kind) == ('dict', 'all-gather')
  )  # fmt: skip
  assert gathered(compiled.collectives) == gathered(arithmetic.traffic(c)) > 0


def test_the_rows_type_is_given_or_the_store_s_or_assumed(tmp_path):
  c = _config(store__path=str(tmp_path / 'store'), store__site='a')
  assert rows_of(c, None) == ASSUMED and 'assumed' in ASSUMED.source
  rows = np.zeros((256, 8), np.float32)
  write_arrays(
    tmp_path / 'store', {'a': rows}, rows_per_shard=64, rows_per_block=16
  )
  assert rows_of(c, None).stored == 'float32'
  assert str(tmp_path) in rows_of(c, None).source
  assert rows_of(c, 'int8') == Rows('int8', 'by --store_dtype')
  with pytest.raises(UserError, match="--store_dtype: 'bf16'.*'bfloat16'"):
    rows_of(c, 'bf16')


@pytest.mark.parametrize('stored', ['float32', 'bfloat16', 'int8'])
def test_the_planned_batch_is_the_one_that_training_sends(tmp_path, stored):
  c = _config(store__path=str(tmp_path / 's'), store__site='a', mesh__dict=1)
  c.sae.d_in, c.train.batch_rows = 8, 256
  made = np.random.default_rng(0).normal(size=(1024, 8)).astype(np.float32)
  write_arrays(
    tmp_path / 's', {'a': made}, rows_per_shard=128, rows_per_block=32,
    dtype=stored,
  )  # fmt: skip
  mesh = make_mesh(1, 1)
  with jax.set_mesh(mesh):
    sent = put_rows(open_source(c)[0], [0], 256)
  _, x = abstract_arguments(c, mesh, rows_of(c, None).dtype)
  assert (sent.shape, sent.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize('name', ['h100:8', 'v5e:2x2'])
@pytest.mark.parametrize(
  'wrong,words',
  [
    ({'act__name': 'topk', 'act__k': 10**6}, r'act\.k=1000000 is more than'),
    ({'sae__latents': -1}, 'latents=-1: must be above 0'),
    ({'act__name': 'relu'}, 'is not one of'),
  ],
)
def test_a_search_refuses_what_training_refuses(name, wrong, words):
  for look in (lambda c: search.search(c, name, 1), plan.families):
    with pytest.raises(UserError, match=words):
      look(_config(**wrong))
  one = _config(1, topology.parse(name)[1], **wrong)
  with pytest.raises(UserError, match=words):
    plan.estimate(one, name)
