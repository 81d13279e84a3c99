"""Configs: defaults, overrides, round trips."""

import json

import pytest

from jpeft import config, training
from jpeft.config.schema import FIELDS

SMALL = {
  'model': {'source': 's'},
  'data': {'name': 'd'},
  'method': {'name': 'lora', 'rank': 4},
  'steps': 3,
}


def test_defaults_fill_what_is_left_out():
  whole = config.complete(SMALL)
  assert (
    whole.optimizer.name == 'adamw' and whole.data.batch_size == 32 and whole.method.head is True
  )
  assert whole.method.rank == 4 and whole.model.num_classes is None
  assert set(config.flatten(whole)) == {*FIELDS, 'method.rank'}


def test_values_are_checked_and_never_mutable_by_typo():
  with pytest.raises(AttributeError):
    config.complete(SMALL).optimizer.lrr = 1
  with pytest.raises(
    ValueError, match="unknown config key 'modle.source'; did you mean 'model.source'"
  ):
    config.complete({**SMALL, 'modle': {'source': 'x'}})
  with pytest.raises(ValueError, match='pairs'):
    config.complete({**SMALL, 'optimizer': {'groups': [('.*', -1.0)]}})
  with pytest.raises(ValueError, match='steps or epochs, not neither'):
    config.complete({k: v for k, v in SMALL.items() if k != 'steps'})


@pytest.mark.parametrize('key', ['data.cache_features', 'eval.generate', 'model.mlp_tokens'])
def test_what_reads_whole_rows_is_refused_where_rows_are_cut(key):
  value = True if key == 'data.cache_features' else 1
  values = {**config.flatten(config.complete(SMALL)), key: value}
  config.complete(config.nest(values))
  with pytest.raises(
    ValueError, match=f'config.{key}=.* and config.mesh.sequence=2: .*; leave one'
  ):
    config.complete(config.nest({**values, 'mesh.sequence': 2}))


def test_integers_serve_as_floats_but_not_the_reverse():
  assert config.complete({**SMALL, 'optimizer': {'lr': 1}}).optimizer.lr == 1.0
  with pytest.raises(ValueError, match='config.steps must be of type int'):
    config.complete({**SMALL, 'steps': 2.5})


def test_what_the_backward_pass_keeps():
  kept = lambda bits: (
    training.method_of(
      config.complete({**SMALL, 'method': {'name': 'lora', 'saved_bits': bits}})
    ).names
  )
  assert kept(4) == ('lora', 'packed', 'head') and kept(None) == ('lora', 'head')
  with pytest.raises(ValueError, match='config.method.saved_bits must be 4, 8 or None, not 3'):
    kept(3)


def test_mlps_on_some_tokens_at_a_time():
  def names(tokens, **method):
    made = config.complete(
      {
        **SMALL,
        'model': {**SMALL['model'], 'mlp_tokens': tokens},
        'method': {'name': 'lora', **method},
      }
    )
    return training.method_of(made).names

  assert names(512) == ('lora', 'head', 'tiled') and names(None) == ('lora', 'head')
  with pytest.raises(ValueError, match='config.model.mlp_tokens must be a number of tokens'):
    names(0)
  with pytest.raises(
    ValueError, match='mlp_tokens and config.method.saved_bits do not go together'
  ):
    names(512, saved_bits=4)


def test_json_round_trip_and_differences(tmp_path):
  one = config.complete({**SMALL, 'optimizer': {'groups': ((r'.*/b', 4.0),)}})
  (tmp_path / 'config.json').write_text(config.to_json(one))
  back = config.from_json(tmp_path / 'config.json')
  assert config.differences(one, back) == []
  other = config.complete({**SMALL, 'seed': 1, 'method': {'name': 'lora', 'alpha': 2}})
  found = config.differences(one, other)
  assert [line.split()[0] for line in found] == [
    'method.alpha',
    'method.rank',
    'optimizer.groups',
    'seed',
  ]
  assert found[-1] == 'seed (0 here, 1 there)'


@pytest.mark.parametrize(
  ('text', 'key', 'value'),
  [
    ('3', 'steps', 3),
    ('1e-2', 'optimizer.lr', 0.01),
    ('true', 'model.scan', True),
    ('dots', 'model.remat', 'dots'),
    ('none', 'model.layers', None),
    ('12', 'data.name', '12'),
    ("[('.*/b', 2)]", 'optimizer.groups', [('.*/b', 2)]),
    ('{q}|{v}', 'method.targets', '{q}|{v}'),
    ('0.5', 'method.dropout', 0.5),
    ('[1, 2]', 'method.layers', [1, 2]),
  ],
)
def test_command_line_values(tmp_path, text, key, value):
  (tmp_path / 'c.py').write_text(f'get_config = lambda: {SMALL!r}')
  found = config.flatten(config.load(str(tmp_path / 'c.py'), {key: text}))[key]
  assert list(found) == value if isinstance(value, list) else found == value


def test_command_line():
  command = config.parse(
    [
      '--config=configs/a.py:lora',
      '--config.steps',
      '5',
      '--config.method.rank=2',
      '--config.optimizer.lr=1',
    ]
  )
  assert command.overrides == {'steps': '5', 'method.rank': '2', 'optimizer.lr': '1'}
  assert str(command.folder()) == 'runs/a-lora'
  assert config.parse(['--config=configs/a.py']).folder().name == 'a'
  baseline = command.baseline('linear')
  assert baseline.reference == 'configs/a.py:linear' and baseline.overrides == {'steps': '5'}


def test_argument_of_get_config(tmp_path):
  (tmp_path / 'c.py').write_text(f'get_config = lambda rank=4: {{**{SMALL!r}, "seed": int(rank)}}')
  assert config.load(f'{tmp_path}/c.py:7').seed == 7
  assert config.load(f'{tmp_path}/c.py').seed == 4
  (tmp_path / 'd.py').write_text(f'get_config = lambda: {SMALL!r}')
  with pytest.raises(ValueError, match='takes no argument'):
    config.load(f'{tmp_path}/d.py:7')


def test_completed_configs_are_json():
  assert json.loads(config.to_json(config.complete(SMALL)))['checkpoint'] == {
    'every': 100,
    'keep': 2,
  }
