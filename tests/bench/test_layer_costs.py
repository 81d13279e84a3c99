"""`python -m jpeft.bench.layers`: what one layer costs."""

import jax
import pytest

from jpeft import planning
from jpeft.bench import layers


class Program:
  """A compiled program of so many layers: each 5 cycles and 7 bytes, and 100 around them."""

  def __init__(self, depth: int, scan: bool):
    self.depth = depth
    self.scan = scan

  def as_text(self) -> str:
    operation = '  %a{} = f32[] fusion(%x), backend_config={{"estimated_cycles":"{}"}}'
    layers = [operation.format(number, 5) for number in range(self.depth)]
    around = operation.format('round', 100)
    lines = [around, *layers]
    loop = []
    if self.scan:
      lines = [around, '  %w = (s32[]) while(%t), condition=%until, body=%body']
      loop = ['%body (x: s32[]) -> s32[] {', layers[0], '}']
      loop += ['%until (x: s32[]) -> pred[] {', f'  %n = s32[] constant({self.depth})', '}']
    return '\n'.join([*loop, 'ENTRY %main (x: f32[]) -> f32[] {', *lines, '}'])

  def cost_analysis(self) -> dict[str, float]:
    rounds = 1 if self.scan else self.depth
    return {'bytes accessed': 100.0 + 7 * rounds}


def test_a_layer_is_two_less_one_or_a_round_of_the_loops(monkeypatch):
  def step(work, method, remat, kind, depth, where):
    return Program(depth, kind == 'scan')

  monkeypatch.setattr(layers, 'step', step)
  assert layers.layer('w1', 'lora', 'none', 'unroll', None) == (5, 7)
  assert layers.layer('w1', 'lora', 'none', 'scan', None) == (5, 107)


def test_a_platform_without_estimates_is_refused(monkeypatch):
  monkeypatch.setattr(layers, 'step', lambda *args: jax.jit(abs).lower(1.0).compile())
  with pytest.raises(ValueError, match='estimates no cycles: give --target=tpu:v5e'):
    layers.layer('w1', 'lora', 'none', 'unroll', planning.target('cpu'))


def test_unknown_names_are_told(capsys):
  with pytest.raises(SystemExit):
    layers.main(['--remat=all'])
  assert "'all' is none of none, block, dots, packed, packed4" in capsys.readouterr().err
