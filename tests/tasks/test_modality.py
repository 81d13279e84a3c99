"""What a batch holds, for images, texts and modalities from outside jpeft."""

import dataclasses
import importlib
import types

import chex
import numpy as np
import pytest

import jpeft
from jpeft import config as config_lib
from jpeft import models, tasks
from jpeft.tasks.classification import CLASSIFICATION
from jpeft.training import imports_of

# The package has the function of that name.
table = importlib.import_module('jpeft.tasks.modality')

IMAGES = types.SimpleNamespace(
  preprocess={'image_size': 32, 'mean': (0.5,) * 3, 'std': (0.5,) * 3}, tokenizer=None, config={}
)
TEXTS = types.SimpleNamespace(
  preprocess=None,
  tokenizer='tokenizer.json',
  config={},
  model=models.Bert(8, 1, 2, 8, vocab=9),
)
SOUNDS = types.SimpleNamespace(preprocess=None, tokenizer=None, config={'model_type': 'sound'})

SOUND = tasks.Modality(
  name='sound',
  field='sound',
  key='frames',
  fits=lambda pretrained: pretrained.config.get('model_type') == 'sound',
  transform=lambda config, pretrained, training: (
    lambda example, rng: example | {'frames': example['sound'].reshape(-1, 4)}
  ),
  example=lambda config, pretrained: {'frames': np.zeros((1, 5, 4), np.float32)},
  call=lambda batch: ((batch['frames'],), {}),
  read=lambda names: (list(names), [{'sound': np.zeros(20, np.float32)} for _ in names]),
)


@pytest.fixture
def sound(monkeypatch):
  monkeypatch.setattr(table, '_REGISTERED', {})
  jpeft.register_modality(SOUND)


@pytest.fixture
def config():
  given = {
    'model': {'source': 'somewhere'},
    'data': {'name': 'mine'},
    'method': {'name': 'lora'},
    'steps': 1,
  }
  return config_lib.complete(given)


def test_each_backbone_has_one():
  assert tasks.modality_of(IMAGES).name == 'image'
  assert tasks.modality_of(TEXTS).name == 'text'


def test_example_and_call_agree(config):
  for pretrained in (IMAGES, TEXTS):
    batch = CLASSIFICATION.example(config, pretrained)
    args, kwargs = tasks.inputs(batch)
    assert set(batch) - {'label'} >= {tasks.modality_of(pretrained).key}
    chex.assert_tree_shape_prefix((args, kwargs), (1,))


def test_one_from_outside_serves_the_whole_task(sound, config):
  assert tasks.modality_of(SOUNDS).name == 'sound'
  assert tasks.modality_of(TEXTS).name == 'text'
  batch = CLASSIFICATION.example(config, SOUNDS)
  chex.assert_shape(batch['frames'], (1, 5, 4))
  args, kwargs = tasks.inputs(batch)
  assert args[0] is batch['frames'] and kwargs == {}

  names, examples = tasks.modality('sound').read(['a.npy'])
  labelled = [example | {'label': 1} for example in examples]
  rows, transform = CLASSIFICATION.rows(config, SOUNDS, Source(labelled), False)
  assert names == ['a.npy']
  chex.assert_shape(transform(rows[0], None)['frames'], (5, 4))


def test_a_run_names_the_module_that_registered_it(sound, config):
  assert any('test_modality' in reference for reference in imports_of(config, 'sound'))
  assert imports_of(config, 'text') == []


class Source(list):
  classes = ('a', 'b')


def test_data_of_another_modality_are_refused(config):
  message = "the backbone reads examples of the modality 'image', and mine has examples of the"
  with pytest.raises(ValueError, match=message):
    CLASSIFICATION.rows(config, IMAGES, Source([{'text': 'a', 'label': 0}]), True)
  with pytest.raises(ValueError, match=r"mine has the entries \['label', 'volume'\]"):
    CLASSIFICATION.rows(config, IMAGES, Source([{'volume': 'a', 'label': 0}]), True)


def test_a_batch_of_no_modality_is_refused():
  with pytest.raises(ValueError, match="one of 'image', 'tokens'; this one has label, x"):
    tasks.inputs({'x': 0, 'label': 0})


@pytest.mark.parametrize('attribute', ('name', 'field', 'key'))
def test_what_cannot_be_registered(attribute):
  taken = dataclasses.replace(SOUND, **{attribute: getattr(table.IMAGE, attribute)})
  with pytest.raises(ValueError, match=f"{attribute}='image' is that of the modality 'image'"):
    jpeft.register_modality(taken)


def test_unknown_name():
  with pytest.raises(ValueError, match="unknown modality 'texts'; did you mean 'text'"):
    tasks.modality('texts')


@pytest.mark.parametrize('label', [None, 2, -1])
def test_labels_that_are_no_class_are_named(sound, config, label):
  _, examples = tasks.modality('sound').read(['a.npy'])
  rows, _ = CLASSIFICATION.rows(config, SOUNDS, Source([examples[0] | {'label': label}]), False)
  with pytest.raises(ValueError, match=f'example 0 has the label {label}; there are 2 classes'):
    rows[0]
