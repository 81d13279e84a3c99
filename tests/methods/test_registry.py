"""The registry: what it says of a method, and methods from outside jpeft."""

import dataclasses
import inspect
import sys

import numpy as np
import pytest

import jpeft
from jpeft.config.schema import FIELDS
from jpeft.core import unprepared
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


def test_a_config_can_set_every_hyperparameter():
  of_configs = {key.removeprefix('method.') for key in FIELDS if key.startswith('method.')}
  assert of_configs == {'name', 'head', *registry.RESERVED}
  for name, entry in REGISTRY.items():
    assert not set(registry.RESERVED) & set(inspect.signature(entry.make).parameters), name


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
