"""The text of a compiled program: what it runs, and how often."""

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


def test_loops_run_with_the_rounds_of_those_around_them_and_fusions_are_parts():
  runs = list(programs.parsed(TEXT).runs())
  assert [(run.name, run.rounds, run.loops) for run in runs if not run.part] == [
    ('main', 1, 0),
    ('body', 12, 1),
    ('twice', 12, 2),
  ]
  assert {run.name for run in runs if run.part} == {'fused', 'other', 'condition', 'unknown'}
