"""`python -m jpeft.bench.layers`: what one layer costs."""

import pytest

from jpeft import planning, programs
from jpeft.bench import layers
from tests.bench.tiny import WORK


def test_a_layer_is_a_step_less_one_with_a_layer_less(monkeypatch):
  depths = []

  def step(work, method, remat, kind, depth, where):
    depths.append(depth)
    return programs.Schedule(100.0 + 5 * depth, 0.0, 1000.0 + 7 * depth, 0.0)

  monkeypatch.setattr(layers, 'step', step)
  for kind, expected in (('unroll', [2, 1]), ('scan', [3, 2])):
    depths.clear()
    assert layers.layer('w1', 'lora', 'none', kind, None) == (5, 7)
    assert depths == expected


def test_a_platform_without_estimates_is_refused(monkeypatch):
  monkeypatch.setattr(layers, 'WORKS', {'tiny': WORK})
  with pytest.raises(ValueError, match='estimates no cycles: give --target=tpu:v5e'):
    layers.layer('tiny', 'lora', 'none', 'unroll', planning.target('cpu'))


def test_unknown_names_are_told(capsys):
  with pytest.raises(SystemExit):
    layers.main(['--remat=all'])
  assert "'all' is none of none, block, dots, packed, packed4" in capsys.readouterr().err
