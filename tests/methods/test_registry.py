"""The registry: what it says of a method, and methods from outside jpeft."""

import dataclasses
import functools
import inspect
import sys

import numpy as np
import pytest

import jpeft
from jpeft import config, training
from jpeft.config.schema import FIELDS
from jpeft.core import Method, unprepared
from jpeft.methods import REGISTRY, registry
from tests.core.small import gain, shift
from tests.methods.small import IMAGES, vit


def scaled(targets: str = '.*/fc', name: str = 'scaled'):
  return gain(targets, name)


def shifted(targets: str = '.*/fc'):
  return jpeft.chain(shift(targets), jpeft.tune('{head}', head=True))


@pytest.fixture
def registered(monkeypatch):
  monkeypatch.setattr(registry, 'REGISTRY', dict(REGISTRY))
  jpeft.register_method('scaled', scaled, title='a gain a column', paper='2401.00001')
  return registry.REGISTRY


def test_what_the_registry_says_follows_from_the_rules(registered):
  entry = registered['scaled']
  assert (entry.memory, entry.mergeable, entry.head) == ('full crossing', True, False)
  assert entry.module == 'tests.methods.test_registry' or entry.module == __name__
  jpeft.register_method('shifted', shifted, title='a shift')
  assert registered['shifted'].head
  assert REGISTRY['lora'].module is None


def test_it_is_made_by_name_with_the_head(registered):
  method = jpeft.make('scaled', targets='block_0/fc')
  assert method.names == ('scaled', 'head')
  with pytest.raises(ValueError, match="scaled has no hyperparameter 'target'; did you mean"):
    jpeft.make('scaled', target='x')
  with pytest.raises(ValueError, match="no method is called 'scald'; did you mean 'scaled'"):
    jpeft.make('scald')


@pytest.mark.parametrize(
  ('name', 'make', 'error', 'message'),
  (
    ('lora', scaled, ValueError, "'lora' is a method of jpeft"),
    ('my-method', scaled, ValueError, 'must be a Python identifier'),
    ('mine', lambda start=1: None, ValueError, "no config could set the hyperparameter 'start'"),
    ('mine', lambda: None, TypeError, r'make\(\) must return a Method, not NoneType'),
  ),
)
def test_what_cannot_be_registered(registered, name, make, error, message):
  with pytest.raises(error, match=message):
    jpeft.register_method(name, make, title='')


# What no command line can set, and why. Of `prune` it can set all but given scores.
UNSET = {
  'name': 'names the method itself in a config, and theta has it by that name',
  ('vera', 'projections'): 'arrays',
  ('randlora', 'bases'): 'arrays',
}
# Values of arguments whose default is None, by what is in their annotation, the first that is.
GIVEN = {
  'tuple[float, float]': (0.1, 1.0),
  'tuple[int, ...]': (0, 2),
  'Sequence[int]': (0, 2),
  'float': 0.5,
  'int': 3,
  'str': '.*/fc',
  'Any': 'magnitude',
}


def given(parameter: inspect.Parameter):
  """A value that an argument of a factory takes."""
  if parameter.default is not None:
    return parameter.default
  return next(value for kind, value in GIVEN.items() if kind in str(parameter.annotation))


def test_a_config_can_set_every_hyperparameter(monkeypatch, tmp_path):
  of_configs = {key.removeprefix('method.') for key in FIELDS if key.startswith('method.')}
  assert of_configs == {'name', 'head', *registry.RESERVED}
  file = tmp_path / 'tiny.py'
  values = {'model': {'source': 's'}, 'data': {'name': 'd'}, 'steps': 1, 'method': {'name': 'full'}}
  file.write_text(f'def get_config():\n  return {values!r}\n')
  for name, entry in REGISTRY.items():
    parameters = inspect.signature(entry.make).parameters
    assert not set(registry.RESERVED) & set(parameters), name
    wanted = {
      key: given(parameter)
      for key, parameter in parameters.items()
      if key not in UNSET and (name, key) not in UNSET
    }
    flags = [f'--config.method.{key}={config.as_text(value)}' for key, value in wanted.items()]
    command = config.parse([f'--config={file}', f'--config.method.name={name}', *flags])
    made = {}

    @functools.wraps(entry.make)
    def make(found=made, **hyperparameters):
      found.update(hyperparameters)
      return Method()

    recorded = dataclasses.replace(entry, make=make)
    monkeypatch.setitem(registry.REGISTRY, name, recorded)
    training.method_of(command.load())
    monkeypatch.setitem(registry.REGISTRY, name, entry)
    assert made == wanted, name


def test_sequences_of_a_config_that_was_stored_are_lists():
  assert jpeft.make('hst', widths=[8, 8, 8, 8], heads=[1, 1, 1, 1]).names == ('hst',)
  assert jpeft.make('meft', scales=[0.1, 1.0], head=False).names == ('meft',)
  for name in ('lst', 'qst', 'side_tuning', 'sherl'):
    assert jpeft.make(name, layers=[0, 2], head=False) == jpeft.make(
      name, layers=[0, 2], head=False
    )


def test_the_head_that_a_method_makes_anew_is_chosen_by_its_pattern():
  assert jpeft.make('vqt', head='.*/classify') == jpeft.vqt(head='.*/classify')
  assert jpeft.make('head2toe', head='top') == jpeft.methods.head2toe(head='top')
  with pytest.raises(ValueError, match='patterns are for head2toe, vqt') as refused:
    jpeft.make('lora', head='.*/classify')
  assert "lora takes no pattern of a head, and head='.*/classify' is one" in str(refused.value)


def test_a_method_by_name_acts_in_some_layers():
  method = jpeft.make('lora', head=False, rank=2, layers='-1:')
  assert method == jpeft.in_layers(jpeft.lora(rank=2), '-1:')
  with_head = jpeft.make('lora', rank=2, layers='-1:')
  assert [rule.layers for _, rule in with_head] == ['-1:'] * len(method) + [None]
  own = jpeft.make('lst', head=False, layers=(0, 2))  # an argument of its own
  assert own == jpeft.lst(layers=(0, 2))


class Read(Exception):
  """Ends a pass when its batches are read."""


@pytest.mark.parametrize('name', [n for n, e in REGISTRY.items() if unprepared(e.make())])
def test_a_pass_with_fewer_batches_than_asked_for(name):
  """Updates go over them again; what is only measured takes each example once, and says so."""
  make = REGISTRY[name].make
  method = make(**({'channels': 4} if name == 'sct' else {}))  # of a narrow model
  (preparation,) = unprepared(method)
  asked = preparation.batches

  def find(examples):
    raise Read(sum(1 for _ in examples))

  counted = dataclasses.replace(preparation, find=find)
  method = jpeft.Method((p, dataclasses.replace(r, preparation=counted)) for p, r in method)
  model, held = vit()
  with pytest.raises(Read) as read:
    jpeft.prepare(method, model, held, [(IMAGES, np.arange(2))] * 2)
  makes_updates = 'early_updates(' in inspect.getsource(sys.modules[make.__module__])
  assert preparation.again == makes_updates
  if makes_updates:
    assert read.value.args == (asked,) and asked > 2
  elif asked is None or asked > 1:
    assert read.value.args == (2,)
    assert asked is None or 'at most' in make.__doc__.partition(' batches: ')[2].partition('\n')[0]
