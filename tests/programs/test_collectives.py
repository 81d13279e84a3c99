"""What devices send each other, read off a compiled program."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jpeft.programs import collectives, flops
from jpeft.programs.collectives import collectives_of_text

MESH = {'data': 4, 'model': 2}
TEXT = """HloModule jit_f, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {{
  ROOT %sum = f32[] add(%a, %b)
}}

%all-reduce-scatter.1 (p: f32[8,4]) -> f32[2,4] {{
  %all-reduce.5 = f32[8,4]{{1,0}} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %part = f32[2,4]{{1,0}} dynamic-slice(%all-reduce.5, %i)
}}

%below (p: (s32[], f32[8])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(3)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}}

%round (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %gathered = bf16[4,8]{{1,0:T(8,128)S(1)}} all-gather(%x), {groups}, metadata={{op_name="a/b"}}
  %f = f32[2,4] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %w = (s32[], f32[8]) while(%t), condition=%below, body=%round
  %begun = (f32[4], f32[4]) collective-permute-start(%p), source_target_pairs={{{{0,2}},{{2,0}}}}
  ROOT %moved = f32[4]{{0}} collective-permute-done(%begun)
}}
"""


@pytest.mark.parametrize(
  ('groups', 'axes'),
  [
    ('replica_groups={{0,1},{2,3},{4,5},{6,7}}', ('model',)),
    ('replica_groups=[2,4]<=[4,2]T(1,0)', ('data',)),
    ('replica_groups=[1,8]<=[8]', ('data', 'model')),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}", ('model',)),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ('data',)),
    (
      "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}",
      ('model',),
    ),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", ('data',)),
  ],
)
def test_devices_are_read_in_all_ways_of_writing_them(groups, axes):
  found = {one.kind: one for one in collectives_of_text(TEXT.format(groups=groups), MESH)}
  gathered = found['all-gather']
  assert (gathered.axes, gathered.bytes) == (axes, 64)
  assert (gathered.rounds, gathered.loops, gathered.source) == (3, 1, 'a/b')
  scattered = found['reduce-scatter']
  assert (scattered.axes, scattered.bytes, scattered.rounds) == (('model',), 128, 3)
  moved = found['collective-permute']
  assert (moved.axes, moved.bytes, moved.rounds, moved.loops) == (('data',), 16, 1, 0)


def test_devices_that_are_not_understood_are_an_error():
  with pytest.raises(ValueError, match='not understood'):
    collectives_of_text(TEXT.format(groups='replica_groups=all'), MESH)


def test_a_sum_in_a_loop_counts_once_a_round():
  mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  rows = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, 'model')))

  @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
  def summed(x):
    def round(total, _):
      return jnp.sin(x @ (x.T @ total)), None

    return jax.lax.scan(round, jnp.ones(16), None, length=5)[0]

  (found,) = collectives(summed.trace(rows).lower().compile(), mesh.shape)
  assert (found.kind, found.axes, found.bytes) == ('all-reduce', ('model',), 16 * 4)
  assert (found.rounds, found.loops) == (5, 1)


def test_flops_are_those_of_all_devices():
  mesh = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  x, w = jnp.ones((8, 6)), jnp.ones((6, 10))
  specs = (P('data'), P(None, 'model'))
  on_devices = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=specs, out_specs=P('data', 'model'))
  assert flops(jax.jit(on_devices).trace(x, w)) == flops(jax.jit(jnp.matmul).trace(x, w))
