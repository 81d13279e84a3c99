"""What compiled programs take: cycles and bytes, with all rounds of loops."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jpeft import planning, programs
from jpeft.programs.schedule import scheduled

X = jax.ShapeDtypeStruct((16, 32), jnp.float32)
_ONE_ROUND = '"known_trip_count":{"n":"1"}'
WS = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)


def layer(x, w):
  return jnp.tanh(x @ w), jnp.sin(x)


def stack(x, ws):
  y, sines = jax.lax.scan(layer, x, ws)
  return y.sum() + (sines**2).sum()


def compiled(fn, *shapes):
  return jax.jit(fn).lower(*shapes).compile()


def test_bytes_are_those_of_xla_where_nothing_loops():
  def unrolled(x, ws):
    kept = []
    for w in ws:
      x, sine = layer(x, w)
      kept.append(sine)
    return x, jnp.stack(kept)

  for fn in (unrolled, lambda x, ws: jnp.tanh(x @ ws[3] + 1)):
    program = compiled(fn, X, WS)
    found = programs.schedule(program)
    assert found.moved == pytest.approx(program.cost_analysis()['bytes accessed'], rel=0.01)
    assert found.cycles is None and found.kernels == 0


@pytest.mark.parametrize('fn', [stack, jax.grad(stack, argnums=1)])
def test_rounds_of_loops_count(fn):
  """With one round the bytes are those of XLA; slices of what is stacked count as slices."""
  moved = []
  for depth in (4, 8, 12):
    program = compiled(fn, X, jax.ShapeDtypeStruct((depth, 32, 32), jnp.float32))
    moved.append(programs.schedule(program).moved)
    one_round = re.sub(r'"known_trip_count":{"n":"\d+"}', _ONE_ROUND, program.as_text())
    assert _ONE_ROUND in one_round
    by_xla = program.cost_analysis()['bytes accessed']
    assert scheduled(one_round).moved == pytest.approx(by_xla, rel=0.01)
  more = [b - a for a, b in zip(moved, moved[1:], strict=False)]
  assert more[0] == pytest.approx(more[1], rel=0.05)  # a line over the depth
  # A layer reads [16, 32] and [32, 32], and writes two of [16, 32] at least.
  assert more[0] >= 4 * 4 * (3 * 16 * 32 + 32 * 32)


# A loop as the compiler of TPUs writes it, shortened: the counter begins at 1 and ends below 7 in
# steps of 2; %x is on the chip, of the stacked %w a slice is read, and a kernel has no cycles.
LOOP = """
HloModule jit_step, is_scheduled=true

%fused (p0: f32[9,8,128], p1: s32[]) -> f32[8,128] {
  %p0 = f32[9,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %cut = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %out = f32[8,128]{1,0:T(8,128)S(1)} bitcast(%cut)
}

%product (q0: f32[8,128], q1: f32[8,128]) -> f32[8,8] {
  %q0 = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  %q1 = f32[8,128]{1,0:T(8,128)S(1)} parameter(1)
  ROOT %y = f32[8,8]{1,0:T(8,128)} convolution(%q0, %q1), dim_labels=bf_oi->bf
}

%body (state: (s32[], f32[9,8,128], f32[8,8])) -> (s32[], f32[9,8,128], f32[8,8]) {
  %state = (s32[]{:T(128)}, f32[9,8,128]{2,1,0:T(8,128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %w = f32[9,8,128]{2,1,0:T(8,128)} get-tuple-element(%state), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)S(2)} add(%i, %two)
  %row = f32[8,128]{1,0:T(8,128)S(1)} fusion(%w, %i), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"10"}}
  %y.1 = f32[8,8]{1,0:T(8,128)} fusion(%row, %row), kind=kOutput, calls=%product, backend_config={"window_config":{"estimated_cycles":"100"}}
  %own = f32[8,8]{1,0:T(8,128)} custom-call(%y.1), custom_call_target="tpu_custom_call"
  ROOT %made = (s32[]{:T(128)}, f32[9,8,128]{2,1,0:T(8,128)}, f32[8,8]{1,0:T(8,128)}) tuple(%next, %w, %own)
}

%condition (state.1: (s32[], f32[9,8,128], f32[8,8])) -> pred[] {
  %end = s32[]{:T(128)} constant(7)
  %state.1 = (s32[]{:T(128)}, f32[9,8,128]{2,1,0:T(8,128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

ENTRY %main (a: f32[9,8,128], b: f32[8,8]) -> f32[8,8] {
  %a = f32[9,8,128]{2,1,0:T(8,128)} parameter(0)
  %b = f32[8,8]{1,0:T(8,128)} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)S(2)} copy(%one)
  %b.1 = f32[8,8]{1,0:T(8,128)S(1)} copy(%b), backend_config={"window_config":{"estimated_cycles":"7"}}
  %begin = (s32[]{:T(128)}, f32[9,8,128]{2,1,0:T(8,128)}, f32[8,8]{1,0:T(8,128)}) tuple(%start, %a, %b.1)
  %loop = (s32[]{:T(128)}, f32[9,8,128]{2,1,0:T(8,128)}, f32[8,8]{1,0:T(8,128)}) while(%begin), condition=%condition, body=%body
  ROOT %result = f32[8,8]{1,0:T(8,128)} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def test_a_loop_of_a_tpu_by_hand():
  found = scheduled(LOOP)
  assert found.cycles == 7 + 3 * 110 and found.products == 3 * 100 and found.kernels == 3
  square = 4 * 8 * 8
  # Each round reads the counter twice and a slice, writes a square, and has a kernel copy one.
  # Outside, the square goes to the chip, as does the counter's start.
  assert found.moved == 3 * (2 * 4 + 4 + 4 * 8 * 128 + 3 * square) + square + 4


@pytest.mark.parametrize(
  ('old', 'new'), [('direction=LT', 'direction=NE'), ('add(%i', 'multiply(%i')], ids=['end', 'step']
)
def test_a_loop_of_unknown_rounds_has_no_count(old, new):
  assert scheduled(LOOP.replace(old, new)) is None


def test_a_program_that_cannot_be_printed_has_no_count():
  class Program:
    def as_text(self):
      raise jax.errors.JaxRuntimeError('INTERNAL: RET_CHECK failure')

  assert programs.schedule(Program()) is None and scheduled(None) is None


@pytest.mark.aot
def test_a_tpu_counts_scanned_products_as_unrolled_ones():
  pytest.importorskip('libtpu')
  where = planning.target('tpu:v5e')
  everywhere = NamedSharding(where.mesh(), PartitionSpec())

  def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=everywhere)

  def unrolled(x, ws):
    for w in ws:
      x = jnp.tanh(x @ w)
    return x

  def scanned(x, ws):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

  shapes = spec(1024, 4096), spec(6, 4096, 4096)
  both = [programs.schedule(compiled(fn, *shapes)) for fn in (unrolled, scanned)]
  assert both[0].products > 0.9 * both[0].cycles > 0
  assert both[1].products == pytest.approx(both[0].products, rel=0.1)
  weights = 2 * 6 * 4096**2
  assert all(weights <= found.moved <= 1.5 * weights for found in both)
