"""The table of step times: ratios within one run, FLOPs of the compiled steps."""

import json

import pytest

from jpeft import cli
from jpeft.bench import speed


def test_ratios_are_to_the_first_method(config_file, capsys):
  assert (
    speed.main([f'--config={config_file}', '--methods=full,linear', '--rounds=2', '--json']) == 0
  )
  full, linear = json.loads(capsys.readouterr().out)
  assert (
    full['method'] == 'full' and full['ratio'] == full['gflop_ratio'] == 1 and full['seconds'] > 0
  )
  assert linear['gflop'] / full['gflop'] == linear['gflop_ratio'] < 0.6 and linear['ratio'] > 0


def test_a_ratio_is_the_median_over_rounds(capsys):
  class Timed:
    """Takes the seconds it is told."""

    gflop = 1.0

    def __init__(self, *seconds):
      self.left = iter((9.0, *seconds))  # the first call is not counted

    def seconds(self):
      return next(self.left)

  first, second = speed.compare({'a': Timed(1, 2, 8), 'b': Timed(2, 3, 4)}, 3)
  assert (first['seconds'], first['ratio'], second['seconds'], second['ratio']) == (2, 1, 3, 1.5)


def test_a_narrow_model_is_as_narrow_as_it_will_be(load):
  cut = {'method.ratio': 0.5, 'method.skip_first': 0, 'method.skip_last': 0}
  narrow = speed.update_of(load('loram', **{'method.rank': 4, **cut}))
  whole = speed.update_of(load('loram', **{'method.rank': 4, **cut, 'method.ratio': 0.0}))
  assert narrow.gflop < 0.8 * whole.gflop and narrow.seconds() > 0


def test_what_follows_from_examples_is_noted(config_file, capsys):
  speed.main([f'--config={config_file}', '--methods=light_peft', '--rounds=1'])
  assert 'light_peft: at most so much is trained' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--rounds=0', 'must be at least 1'),
    ('--methods=linear,lorra', "did you mean 'lora'"),
    ('--round=1', '--round'),
  ],
)
def test_mistakes_are_told_first(config_file, flag, message):
  with pytest.raises(cli.Mistake, match=message):
    speed.main([f'--config={config_file}', '--methods=linear', flag])
