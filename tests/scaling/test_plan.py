"""The planner: arithmetic, the compiler's numbers, and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.errors import UserError
from sae_jax.parallel.collectives import Collective
from sae_jax.parallel.mesh import make_mesh
from sae_jax.scaling import (
  arithmetic,
  costs,
  gpu,
  plan,
  report,
  roofline,
  search,
  topology,
)
from sae_jax.scaling.chips import CHIPS, GIB, chip_of
from sae_jax.scaling.compiled import _too_large, compile_step
from sae_jax.scaling.costs import Kernel
from sae_jax.scaling.rows import Rows
from sae_jax.train import perf
from sae_jax.train.config import base_config

ROOT = Path(__file__).parents[2]
B, D, F = 1024, 256, 4096
has_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='no libtpu'
)
has_cuda = pytest.mark.skipif(
  not gpu.installed(), reason='no plugin for CUDA: sae_jax[plan-gpu]'
)


def _config(data=1, dict_=4, micro=1, **kw):
  c = base_config()
  c.sae.d_in, c.sae.latents, c.train.batch_rows = D, F, B
  c.train.micro_batches, c.train.compute_dtype = micro, 'bfloat16'
  c.mesh.data, c.mesh.dict = data, dict_
  for key, value in kw.items():
    c.update_from_flattened_dict({key.replace('__', '.'): value})
  return c


def test_memory_by_arithmetic():
  m = arithmetic.memory(_config())
  assert m.parameters == m.gradients == m.optimiser == 4 * (2 * 1024 * D + 2048)
  assert m.batch == 2 * B * D == arithmetic.memory(_config(), 4).batch // 2
  assert m.activations == B * 1024 * 8 + 8 * B * D
  assert m.total == sum(m)
  parts = arithmetic.memory(_config(micro=4))
  assert parts.activations == m.activations // 4 and parts.batch == m.batch
  split = arithmetic.memory(_config(2, 4, mesh__zero1=True))
  assert split.optimiser == m.optimiser // 2
  assert split.parameters == m.parameters and split.batch == m.batch // 2
  moments = arithmetic.memory(_config(optim__b1=0.9, optim__ema=0.99))
  assert moments.optimiser == 3 * m.optimiser
  aux = arithmetic.memory(_config(act__name='batchtopk'))
  assert aux.activations - m.activations == B * 1024 * 2 + 4 * B * D
  full = arithmetic.memory(_config(train__compute_dtype='float32'))
  assert full.activations - m.activations == B * 1024 * 4


@pytest.mark.parametrize('data,dict_,micro', [(1, 4, 1), (2, 2, 4), (4, 1, 2)])
def test_work_by_arithmetic_is_five_products(data, dict_, micro):
  c = _config(data, dict_, micro)
  flops = sum(k.flops * n for k, n in arithmetic.work(c))
  assert flops * 4 == 5 * 2 * B * D * F
  topk = _config(data, dict_, micro, act__name='topk')
  assert sum(k.flops * n for k, n in arithmetic.work(topk)) * 5 == flops * 8


def test_a_sparse_step_by_arithmetic():
  """One product, and six passes over the 32 / 4 active latents of a row."""
  c = _config(act__name='topk', loss__aux_coef=0.0, train__codes='sparse')
  flops = sum(k.flops * n for k, n in arithmetic.work(c))
  assert flops == 2 * B * D * (F // 4) + 6 * 2 * B * D * 8
  m, dense = arithmetic.memory(c), arithmetic.memory(_config(act__name='topk'))
  assert m.gradients == 0 and m.activations < dense.activations
  c.optim.clip_norm = 1.0  # needs all gradients at once
  assert arithmetic.memory(c).gradients == dense.gradients
  with pytest.raises(UserError, match='codes=sparse'):
    compile_step(c, make_mesh(1, 4), np.float32)


def test_flops_of_a_step():
  count = lambda **kw: perf.step_flops(8, 16, 64, **kw)
  unit = 2 * 8 * 16 * 64
  assert count(aux=False) == {'published': 6 * unit, 'executed': 5 * unit}
  assert count(aux=True)['executed'] == 8 * unit
  sparse = count(aux=False, active=4)
  assert sparse['executed'] == unit + 4 * 2 * 8 * 16 * 4
  assert sparse['published'] == 6 * unit


def test_traffic_by_arithmetic():
  size = lambda c: {
    (x.axis, x.kind): (x.times or 0) * x.elements for x in arithmetic.traffic(c)
  }
  assert size(_config(1, 4, 4)) == {('dict', 'all-reduce'): B * D}
  assert size(_config(2, 2, 2)) == {
    ('dict', 'all-reduce'): B // 2 * D,
    ('data', 'all-reduce'): 2 * F // 2 * D,
  }
  assert size(_config(4, 1, mesh__zero1=True)) == {
    ('data', 'reduce-scatter'): 2 * F * D,
    ('data', 'all-gather'): 2 * F * D,
  }


def test_roofline_takes_the_longer_of_each_kernel_and_adds_the_links():
  v5e = CHIPS['v5e']
  ring = Collective('all-reduce', 'dict', 4, 10**8, 4 * 10**8, 2, '')
  assert roofline.sent(ring) == 2 * 0.75 * 8e8
  found = roofline.roofline(
    [(Kernel(197 * 10**9, 0), 3), (Kernel(0, 819 * 10**6), 2)],
    [ring], v5e, 16, 'bfloat16',
  )  # fmt: skip
  # 4 of 16 chips: half of the torus' links, 200 GB/s one way in all.
  links = 1.2e9 / 1e11
  assert found.compute == pytest.approx(3e-3)
  assert found.hbm == pytest.approx(2e-3)
  assert found.links == pytest.approx(links)
  assert found.step == pytest.approx(5e-3 + links)
  assert found.at_best == pytest.approx(max(3e-3, links))
  assert found.bound == 'links'
  slow = roofline.roofline([(Kernel(10**12, 0), 1)], [], v5e, 1, 'float32')
  assert slow.step == pytest.approx(6e12 / 197e12)


def test_the_work_of_a_compiled_loop_counts_every_turn():
  def step(x, W):
    f = lambda c, _: (jnp.tanh(c @ W), None)
    return jax.lax.scan(f, x, length=7)[0] @ W

  x, W = jnp.ones((64, 128)), jnp.ones((128, 128))
  compiled = jax.jit(step).lower(x, W).compile()
  found = costs.kernels(str(compiled.as_text()))
  product = 2 * 64 * 128 * 128
  assert sum(k.flops * n for k, n in found) == 8 * product
  cost = compiled.cost_analysis() or {}
  assert cost['flops'] < 3 * product  # why it is needed
  moved = sum(k.bytes * n for k, n in found)
  assert moved > 8 * 4 * (128 * 128 + 64 * 128)


def test_work_inside_a_loop_of_unknown_length_is_an_error():
  grow = lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: 2 * x, x)
  text = str(jax.jit(grow).lower(jnp.ones(8)).compile().as_text())
  with pytest.raises(ValueError, match='unknown length'):
    costs.kernels(text)


@pytest.mark.parametrize(
  'name', ['v9:2x2', 'v5e', 'v5e:4', 'v5p:2x2', 'h100:2x4', 'v5e:0x4', '', ':']
)
def test_an_unknown_topology_lists_the_families(name):
  with pytest.raises(UserError) as error:
    topology.parse(name)
  assert all(family in str(error.value) for family in CHIPS)
  assert '\n' not in str(error.value)


def test_a_topology_that_is_too_large():
  with pytest.raises(UserError, match='1024 chips.*at most 256'):
    topology.parse('v5e:32x32')
  assert topology.parse('v5p:8x8x8') == (CHIPS['v5p'], 512)


def test_a_mesh_that_does_not_match_the_topology():
  with pytest.raises(UserError, match='data=2 x dict=4 = 8 devices, .*has 16'):
    plan.plan(_config(2, 4), 'v5p:2x2x4')
  with pytest.raises(UserError, match='= 4 devices, .*has 8'):  # two a chip
    plan.plan(_config(), 'tpu7x:2x2x1')


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install 'sae_jax\[plan\]'"):
    plan.plan(_config(), 'v5e:2x2')


def test_the_compiler_s_memory_error_is_read():
  found = _too_large(
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
    'for HLO temporaries (39.38G) exceeds available HBM (15.75G).'
  )
  assert (found.needed, found.available) == (39.38, 15.75)
  assert _too_large('RESOURCE_EXHAUSTED: no numbers').needed is None


def test_peaks_are_found_by_the_names_that_devices_have():
  kinds = {
    'TPU v5 lite': 'v5e', 'TPU v5': 'v5p', 'TPU v5p': 'v5p', 'TPU v4': 'v4',
    'TPU v6 lite': 'v6e', 'TPU7x': 'tpu7x', 'NVIDIA H100 80GB HBM3': 'h100',
    'NVIDIA A100-SXM4-80GB': 'a100',
  }  # fmt: skip
  for kind, family in kinds.items():
    assert chip_of(kind) == CHIPS[family]
  assert chip_of('cpu') is None


def test_gpus_are_planned_by_arithmetic_and_say_so(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  p = plan.plan(_config(2, 4), 'h100:8')
  assert p['method'] == plan.ARITHMETIC and p['fits']
  assert plan.ARITHMETIC in report.text(p) and 'peak' not in p['memory_gib']
  assert "to compile it: pip install 'sae_jax[plan-gpu]'" in report.text(p)
  assert p['flops']['executed'] * 8 == 10 * B * D * F
  assert p['flops']['published'] * 8 == 12 * B * D * F
  rows = B / p['seconds']['step']
  moved = {'store': rows * D * 2, 'to_all_devices': rows * D * 2 * 4}
  assert p['input_bytes_per_second'] == pytest.approx(moved)
  p = plan.plan(_config(2, 4), 'h100:8', Rows('int8', 'said'))
  moved = {'store': rows * (D + 4), 'to_all_devices': rows * D * 4 * 4}
  assert p['input_bytes_per_second'] == pytest.approx(moved)
  assert p['memory_gib']['batch'] == B // 2 * D * 4 / GIB
  assert 'stored in int8 (said), on the devices float32' in report.text(p)


def test_more_latents_need_more_chips():
  wide = _config(sae__latents=2**25, sae__d_in=12288)
  needed = {r['family']: r['chips_needed'] for r in plan.families(wide)}
  # 825 G parameters: float32 parameter, moment and gradient are 9.2 TiB.
  assert needed['v5p'] == 128 and needed['h100'] is None
  assert plan.chips_needed(_config(), CHIPS['v5e']) == 1
  assert '128' in report.chips(plan.families(wide))


def test_a_search_covers_meshes_and_takes_what_fits(monkeypatch):
  c = _config(sae__latents=2**20, sae__d_in=2304, train__batch_rows=2**16)
  all_ = list(search.candidates(c, 8))
  assert {x.mesh.data for x in all_} == {1, 2, 4, 8}
  assert all(x.mesh.data * x.mesh.dict == 8 for x in all_)
  assert len({(x.mesh.data, x.train.micro_batches) for x in all_}) == len(all_)
  monkeypatch.setattr(gpu, 'installed', lambda: False)
  found = search.search(c, 'h100:8', 4)
  assert len(found) == 4 and all(p['fits'] for p in found)
  times = [p['seconds']['step'] for p in found]
  assert times == sorted(times)
  assert report.flags(found[0]) in report.table(found)


def test_a_search_that_cannot_succeed_says_why():
  with pytest.raises(UserError, match='no mesh on h100:2 fits, the smallest'):
    search.search(_config(sae__latents=2**24, sae__d_in=4096), 'h100:2', 3)
  odd = _config(sae__latents=4095, train__batch_rows=1023)
  with pytest.raises(UserError, match='no mesh of 8 devices divides'):
    search.search(odd, 'h100:8', 3)


@has_libtpu
@pytest.mark.filterwarnings('ignore:Error reading persistent compilation')
@pytest.mark.slow  # 10 s each, which the compiler takes
@pytest.mark.parametrize('data,dict_,micro', [(1, 4, 4), (2, 2, 2)])
def test_the_real_step_compiled_for_a_tpu(data, dict_, micro):
  zero1 = data > 1
  c = _config(data, dict_, micro, mesh__zero1=zero1)
  p = plan.plan(c, 'v5e:2x2')
  assert p['method'] == plan.COMPILED and p['fits']
  # Five products, every micro-batch counted, and little else.
  assert p['flops']['executed'] * 4 == 10 * B * D * F
  once = p['flops']['executed'] / micro
  assert once <= p['cost_analysis']['flops'] < 1.2 * once
  state = arithmetic.memory(c)
  needed = (state.parameters + state.optimiser + state.batch) / GIB
  assert p['memory_gib']['arguments'] == pytest.approx(needed, rel=0.05)
  assert p['memory_gib']['arguments'] < p['memory_gib']['peak']
  moved = {}
  for x in p['collectives']:
    moved[x['axis']] = moved.get(x['axis'], 0) + x['elements']
  # The reconstructions and their small change; gradients once a step.
  assert B // data * D <= moved['dict'] < B // data * D * 1.1 + 10 * F
  if zero1:
    parameters = 2 * F // dict_ * D
    assert 2 * parameters <= moved['data'] < 2.1 * parameters + 10 * F
  assert json.loads(json.dumps(p)) == p
  assert 'fits' in report.text(p)


@has_libtpu
def test_a_mesh_may_split_the_sides_of_a_torus():
  devices = topology.tpu_devices('v5p:4x4x4')
  assert make_mesh(8, 8, devices).shape == {'data': 8, 'dict': 8}


def test_a_gpu_is_described_by_its_maker_s_figures():
  h100, a100 = gpu.target(CHIPS['h100']), gpu.target(CHIPS['a100'])
  # Boost clocks: 1.98 and 1.41 GHz.
  assert 'clock_rate_ghz: 1.983' in h100 and 'clock_rate_ghz: 1.411' in a100
  assert 'shared_memory_per_block_optin: 232448' in h100
  assert 'shared_memory_per_block_optin: 166912' in a100
  assert f'device_memory_size: {141 * GIB}' in gpu.target(CHIPS['h200'])
  assert all(gpu.target(c) for c in CHIPS.values() if not c.tpu)


@has_cuda
@pytest.mark.parametrize('data,dict_,micro', [(1, 8, 4), (4, 2, 1)])
def test_the_real_step_compiled_for_gpus(data, dict_, micro):
  c = _config(data, dict_, micro, mesh__zero1=data > 1)
  p = plan.plan(c, 'h100:8')
  assert p['method'] == plan.COMPILED and p['fits']
  assert p['flops']['executed'] * 8 == 10 * B * D * F
  state = arithmetic.memory(c)
  needed = (state.parameters + state.optimiser + state.batch) / GIB
  assert p['memory_gib']['arguments'] == pytest.approx(needed, rel=0.05)
  assert needed < p['memory_gib']['peak'] < 2 * state.total / GIB
  moved = {(x['axis'], x['kind']): x['elements'] for x in p['collectives']}
  rows = B // data * D
  assert rows <= moved['dict', 'all-reduce'] < rows * 1.1 + 10 * F
  if data > 1:
    parameters = 2 * F // dict_ * D
    for kind in ('reduce-scatter', 'all-gather'):
      assert parameters <= moved['data', kind] < 1.1 * parameters
  assert p['versions']['jax-cuda12-pjrt'] and 'refused' not in p
  assert json.loads(json.dumps(p)) == p


@has_cuda
def test_without_ptxas_one_line_says_what_to_install(monkeypatch):
  error = jax.errors.JaxRuntimeError('UNAVAILABLE: Neither ptxas nor ...')

  def fail(*_):
    raise error

  monkeypatch.setattr(jax.stages.Lowered, 'compile', fail)
  with pytest.raises(UserError, match=r'needs ptxas.*sae_jax\[plan-gpu\]'):
    plan.plan(_config(), 'h100:4')


@has_cuda
def test_the_program_looks_for_no_gpu():
  env = {k: v for k, v in os.environ.items() if k != 'JAX_PLATFORMS'}
  done = _launch('--topology=h100:1', env=env)
  assert done.returncode == 0 and plan.COMPILED in done.stdout
  assert 'Traceback' not in done.stderr


def _launch(*options, env=None):
  return subprocess.run(
    [
      sys.executable, 'launch/plan.py', '--config=configs/jumprelu.py:demo',
      *options,
    ],
    cwd=ROOT, capture_output=True, text=True, timeout=300, env=env,
  )  # fmt: skip


@has_libtpu
def test_the_program_says_what_does_not_fit(tmp_path):
  file = tmp_path / 'plan.json'
  done = _launch(
    '--topology=v5e:1x1', '--config.sae.latents=1048576', f'--json={file}',
    '--config.train.compute_dtype=bfloat16',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'DOES NOT FIT' in done.stdout and 'Traceback' not in done.stderr
  p = json.loads(file.read_text())
  assert not p['fits'] and p['versions']['libtpu']


@pytest.mark.parametrize(
  'options,words',
  [
    (['--topology=v7:2x2'], 'is not known: use one of'),
    (['--topology=v5e:2x2'], 'config.mesh: data=1 x dict=1'),
    ([], '--topology: give chips'),
    (['--topology=h100:1', '--config.sae.latents=-1'], 'must be above 0'),
  ],
)
def test_the_program_s_errors_are_one_line(options, words):
  done = _launch(*options)
  assert done.returncode == 2 and words in done.stderr
  # Where CUDA's plugin is installed, it logs that there is no driver.
  logged = ('cudart_stub', 'before absl::InitializeLog()')
  lines = done.stderr.strip().splitlines()
  lines = [x for x in lines if not any(word in x for word in logged)]
  assert len(lines) == 1 and not done.stdout


def test_the_program_writes_json():
  done = _launch('--topology=h100:1', '--json=-')
  assert json.loads(done.stdout)['topology'] == 'h100:1'
