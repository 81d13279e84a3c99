"""`python -m jpeft.bench.quantized`: the cost of a compiled program with 4-bit kernels."""

import pytest

from jpeft.bench import quantized
from jpeft.bench.quantized import Kernel

TEXT = """
HloModule jit_step, is_scheduled=true

%body (arg: (s32[], bf16[8,512])) -> (s32[], bf16[8,512]) {
  %arg = (s32[], bf16[8,512]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[8,512]{1,0} get-tuple-element(%arg), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %w = u8[256,512]{1,0} iota(), iota_dimension=0
  %nf4_matmul.3 = bf16[8,512]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[8,512]{1,0}, u8[256,512]{1,0}}
  ROOT %made = (s32[], bf16[8,512]) tuple(%next, %nf4_matmul.3)
}

%condition (arg.1: (s32[], bf16[8,512])) -> pred[] {
  %arg.1 = (s32[], bf16[8,512]) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %end = s32[] constant(6)
  ROOT %lt = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (a: bf16[8,512], c: u8[256,512]) -> bf16[8,512] {
  %a = bf16[8,512]{1,0} parameter(0)
  %c = u8[256,512]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %y = bf16[8,512]{1,0} negate(%a), backend_config={"window_config":{"estimated_cycles":"100"}}
  %nf4_matmul_transposed.1 = bf16[8,512]{1,0} custom-call(%y, %c), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[8,512]{1,0}, u8[256,512]{1,0}}
  %start = (s32[], bf16[8,512]) tuple(%zero, %nf4_matmul_transposed.1)
  %loop = (s32[], bf16[8,512]) while(%start), condition=%condition, body=%body
  ROOT %result = bf16[8,512]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_kernels_count_with_the_rounds_of_their_loops():
  found = quantized.found_in(TEXT)
  forward = Kernel(8, 512, 512, False)
  backward = Kernel(8, 512, 512, True)
  assert found.cycles == 100 and found.kernels == {forward: 6, backward: 1}
  assert found.total({forward: 10, backward: 7}) == 100 + 6 * 10 + 7


def test_a_kernel_that_is_not_known_is_refused():
  with pytest.raises(ValueError, match='7 calls of kernels, 1 of them known'):
    quantized.found_in(TEXT.replace('%nf4_matmul.3', '%own'))


def test_a_loop_whose_rounds_are_not_known_is_refused():
  with pytest.raises(ValueError, match='rounds of the loops'):
    quantized.found_in(TEXT.replace('direction=LT', 'direction=NE'))
