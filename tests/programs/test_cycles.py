"""Cycles, read from the text of a compiled TPU program."""

import jax
import jax.numpy as jnp

from jpeft import programs

TEXT = """
HloModule jit_step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  ROOT %inner = f32[8]{0} fusion(%p), calls=%other, backend_config={"estimated_cycles":"1000000"}
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  %nested = (s32[]) while(%t), condition=%unknown, body=%twice
}

%condition (arg: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%unknown (arg: (s32[])) -> pred[] {
  %many = s32[] constant(3)
  %other = s32[] constant(4)
}

%twice (arg: (s32[])) -> (s32[]) {
  %b = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"5"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %c = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  %loop = (s32[], f32[8]) while(%t), condition=%condition, body=%body, backend_config={}
}
"""


class Program:
  """A compiled program of which the text is all that there is."""

  def as_text(self) -> str:
    return TEXT


def test_loops_count_with_their_rounds_and_the_inside_of_a_fusion_not():
  assert programs.cycles(Program()) == 100 + 12 * (10 + 5)
  found = [(op.cycles, op.rounds) for op in programs.operations(TEXT)]
  assert found == [(100, 1), (10, 12), (5, 12)]


def test_of_another_platform_nothing_is_known():
  assert programs.cycles(jax.jit(jnp.sin).lower(1.0).compile()) is None
