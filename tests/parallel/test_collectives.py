"""Collectives counted from the text of real compiled functions."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax.parallel import hlo
from sae_jax.parallel.collectives import _axis, collectives, summary
from sae_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.smoke

MESH = AbstractMesh((2, 4), ('data', 'dict'))


def _text(function, *shapes):
  """The compiled text of a function inside shard_map over a 2x4 mesh."""
  mesh = make_mesh(2, 4)
  with jax.set_mesh(mesh):
    args = [
      jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, P()))
      for s in shapes
    ]
    mapped = jax.shard_map(
      function, in_specs=P(), out_specs=P(('data', 'dict')), check_vma=False
    )
    return str(jax.jit(mapped).lower(*args).compile().as_text())


def test_every_kind_its_axis_and_its_size():
  def function(x):
    a = jax.lax.psum(x, 'dict')
    b = jax.lax.all_gather(x * 2, 'data', axis=0, tiled=True)
    c = jax.lax.psum_scatter(x * 3, 'dict', scatter_dimension=0, tiled=True)
    d = jax.lax.all_to_all(x * 4, 'dict', 0, 0, tiled=True)
    e = jax.lax.ppermute(x * 5, 'data', [(0, 1), (1, 0)])
    f = jax.lax.pmax(x[0, :3], ('data', 'dict'))
    parts = (a, b, c, d, e, f)
    return jnp.stack([v.sum() for v in parts]).sum()[None]

  assert summary(_text(function, (8, 16)), MESH) == {
    ('dict', 'all-reduce'): (1, 128, 512),
    ('data', 'all-gather'): (1, 256, 1024),
    ('dict', 'reduce-scatter'): (1, 128, 512),
    ('dict', 'all-to-all'): (1, 128, 512),
    ('data', 'collective-permute'): (1, 128, 512),
    ('data+dict', 'all-reduce'): (1, 3, 12),
  }


def test_loops_count_times_their_length():
  def function(x):
    def outer(c, _):
      inner = lambda c, _: (jax.lax.psum(jnp.sin(c), 'dict'), None)
      c, _ = jax.lax.scan(inner, c, length=3)
      return jax.lax.psum(jnp.cos(c), 'data'), None

    return jax.lax.scan(outer, x, length=5)[0].sum()[None]

  assert summary(_text(function, (8,)), MESH) == {
    ('dict', 'all-reduce'): (15, 120, 480),
    ('data', 'all-reduce'): (5, 40, 160),
  }


def test_a_loop_of_unknown_length_is_an_error():
  def function(x):
    go = lambda c: c.sum() < 100
    step = lambda c: jax.lax.psum(jnp.sin(c) + 1, 'dict')
    return jax.lax.while_loop(go, step, x).sum()[None]

  text = _text(function, (8,))
  assert [c.times for c in collectives(text, MESH)] == [None]
  with pytest.raises(ValueError, match='all-reduce over dict .*unknown length'):
    summary(text, MESH)


def test_of_a_conditional_the_branch_that_moves_most():
  def function(x):
    more = lambda: jax.lax.psum(jnp.sin(x), 'dict')
    less = lambda: jax.lax.psum(x[:2], 'data').sum() + jnp.zeros_like(x)
    return jax.lax.cond(x[0] > 0, more, less).sum()[None]

  found = summary(_text(function, (64,)), MESH)
  assert found == {('dict', 'all-reduce'): (1, 64, 256)}


def test_sums_of_several_arrays_and_of_types():
  def function(x):
    y = x.astype(jnp.int8)
    a, b = jax.lax.psum((x, x[:2] * 2), 'dict')
    c = jax.lax.all_gather(y, 'dict', tiled=True)
    return (a.sum() + b.sum() + c.sum())[None]

  found = summary(_text(function, (64,)), MESH)
  elements, size = found['dict', 'all-reduce'][1:]
  assert (elements, size) == (66, 264)
  assert found['dict', 'all-gather'] == (1, 256, 256)


@pytest.mark.parametrize(
  'written',
  [
    '{{0,4},{1,5},{2,6},{3,7}}', '[4,2]<=[2,4]T(1,0)',
    "mesh['data'=2,'dict'=4] {'data'}",
    "mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}",
    "mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}",
    "mesh['a'=2,'b'=2,'c'=2] {'a'}", "mesh['x'=8] {'x':(1)2}",
  ],
)  # fmt: skip
def test_groups_in_every_notation(written):
  assert _axis(f', replica_groups={written}, x=1', MESH) == ('data', 2)


@pytest.mark.parametrize(
  'written', ['[2,4]<=[8]', "mesh['x'=8] {'x':(2)4}", '{{0,1,2,3},{4,5,6,7}}']
)
def test_groups_along_the_other_axis(written):
  assert _axis(f', replica_groups={written}, x=1', MESH) == ('dict', 4)
  assert _axis(', replica_groups={}', MESH) == ('data+dict', 8)


def test_an_unknown_notation_is_an_error():
  with pytest.raises(ValueError, match='unknown notation'):
    _axis(', replica_groups=<new>', MESH)


_LOOP = """
%body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(8)}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %sum = f32[8]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  %end = s32[] get-tuple-element(%p), index=2
  ROOT %t = (s32[], f32[8], s32[]) tuple(%next, %sum, %end)
}

%condition (q: (s32[], f32[8], s32[])) -> pred[] {
  %q = (s32[], f32[8], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %stop = s32[] get-tuple-element(%q), index=2
  ROOT %less = pred[] compare(%j, %stop), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %zero = s32[] constant(1)
  %copy = s32[] copy(%zero)
  %ten = s32[] constant(10)
  %start = (s32[], f32[8], s32[]) tuple(%copy, %a, %ten)
  %loop = (s32[], f32[8], s32[]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
  'old,new,times',
  [
    ('', '', 5), ('direction=LT', 'direction=NE', None),
    ('direction=LT', 'direction=LE', 5), ('constant(10)', 'constant(11)', 5),
    ('constant(10)', 'constant(12)', 6), ('constant(10)', 'constant(1)', 0),
    ('constant(2)', 'constant(-2)', None),
    ('%ten = s32[] constant(10)', '%ten = s32[] bitcast(%a)', None),
    ('(%next, %sum, %end)', '(%next, %sum, %next)', None),
  ],
)  # fmt: skip
def test_trip_counts_from_conditions_as_the_tpu_compiler_leaves_them(
  old, new, times
):
  (found,) = collectives(_LOOP.replace(old, new) if old else _LOOP, MESH)
  assert found.times == times and found.bytes == 32


@pytest.mark.filterwarnings('ignore:Error reading persistent compilation')
def test_the_tpu_compiler_s_text():
  """Its asynchronous pieces count once, its loops without a note."""
  pytest.importorskip('libtpu')
  from sae_jax.scaling.topology import tpu_devices

  devices = tpu_devices('v5e:2x2')
  mesh = make_mesh(2, 2, devices)

  def function(x):
    step = lambda c, _: (jax.lax.psum(jnp.sin(c), 'dict'), None)
    a = jax.lax.scan(step, x, length=7)[0]
    b = jax.lax.all_gather(x, 'data', axis=0, tiled=True)
    c = jax.lax.psum_scatter(b @ x.T, 'dict', scatter_dimension=0, tiled=True)
    return (a.sum() + b.sum() + c.sum())[None]

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    x = jax.ShapeDtypeStruct(
      (512, 512), jnp.float32, sharding=NamedSharding(mesh, P())
    )
    mapped = jax.shard_map(
      function, in_specs=P(), out_specs=P(('data', 'dict')), check_vma=False
    )
    text = str(jax.jit(mapped).trace(x).lower().compile().as_text())
  size = 512 * 512
  assert summary(text, mesh) == {
    ('dict', 'all-reduce'): (7, 7 * size, 28 * size),
    ('data', 'all-gather'): (1, 2 * size, 8 * size),
    ('dict', 'reduce-scatter'): (1, 2 * size, 8 * size),
  }


_PIECES = """
%start (p: f32[4]) -> (f32[4], f32[8]) {
  %p = f32[4]{0} parameter(0)
  %g = f32[8]{0} all-gather(%p), replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
frontend_attributes={chain_id="0"}
  ROOT %c = (f32[4], f32[8]) custom-call(%g), \
custom_call_target="AsyncCollectiveStart"
}

%done (q: f32[4]) -> f32[8] {
  %q = f32[4]{0} parameter(0)
  %h = f32[8]{0} all-gather(%q), replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
frontend_attributes={chain_id="0"}
  ROOT %d = f32[8]{0} custom-call(%h), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[4]) -> f32[8] {
  %a = f32[4]{0} parameter(0)
  %s = (f32[4], f32[8]) fusion(%a), kind=kCustom, calls=%start
  ROOT %e = f32[8]{0} fusion(%a), kind=kCustom, calls=%done
}
"""


def test_the_pieces_of_one_asynchronous_collective_count_once():
  assert summary(_PIECES, MESH) == {('data', 'all-gather'): (1, 8, 32)}


def test_a_text_that_is_no_program():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('')
