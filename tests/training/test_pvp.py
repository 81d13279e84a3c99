"""PVP: a method is trained on one data set, and starts the next from there under a fresh head."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jpeft import cli, config, training
from jpeft.training import start as start_lib
from tests.fixtures import leaf_paths, leaves_equal, noisy

LORA = {'method.rank': 2}
FRESH = {'method.start_head': False}
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Built:
  """A method on its model, and its first state."""

  pretrained: object
  tuned: object
  state: dict

  def features(self, theta):
    """What the model computes with the method alone, under its own head."""
    return self.tuned.only('lora').apply(theta, self.pretrained.variables, IMAGES)


def built(config, start=None, outputs=2):
  """What a run of a config begins with."""
  pretrained, tuned = training.build(config, outputs)
  put = None if start is None else start_lib.start_of(config, tuned, start.parent / 'none').put
  backbone = pretrained.variables
  state = training.initial_state(tuned, optax.adam(1e-3), backbone, config.seed, put)
  return Built(pretrained, tuned, state)


@pytest.fixture(scope='module')
def file(config_file, tmp_path_factory):
  """A theta of LoRA and the head of two classes, off its start, as a run ends with it."""
  place = tmp_path_factory.mktemp('before') / 'theta.safetensors'
  first = built(config.load(f'{config_file}:lora', {'method.rank': '2'}))
  training.save_theta(place, noisy(first.state['theta'], 0.3))
  return place


@pytest.fixture(scope='module')
def stages(config_file, tmp_path_factory):
  """(folder of a run of five updates, the same from a theta that was not trained, and two updates
  on a few examples that start from the first)."""
  root = tmp_path_factory.mktemp('stages')
  load = lambda **more: config.load(f'{config_file}:lora', {k: str(v) for k, v in more.items()})
  training.train(load(**LORA, steps=5), root / 'first')
  still = root / 'still.safetensors'
  training.save_theta(still, built(load(**LORA)).state['theta'])
  training.train(load(**LORA, **FRESH, steps=5, **{'method.start': still}), root / 'again')
  few = {'data.shots': 3, 'method.start': root / 'first', 'steps': 2, 'data.batch_size': 2}
  training.train(load(**LORA, **FRESH, **few), root / 'second')
  return root


def test_what_is_taken_are_the_leaves_of_the_method(load, file):
  """1. No backbone, no head, no optimizer state; and the features are the same bits."""
  before = load_file(file)
  settings = load('lora', **LORA, **FRESH, **{'method.start': file})
  second = built(settings, file)
  found = start_lib.start_of(settings, second.tuned, file.parent / 'none')
  assert set(found.arrays) == {path for path in before if path.startswith('lora/')}
  assert set(before) - set(found.arrays) == {'head/head/bias', 'head/head/kernel'}
  assert 'left out, as start_head=False says: head/head/bias, head/head/kernel' in found.told
  theta, _ = training.load_theta(file, second.tuned.shapes)
  assert leaves_equal(second.features(second.state['theta']), second.features(theta))
  plain = second.pretrained.model.apply(second.pretrained.variables, IMAGES)
  assert np.abs(second.features(theta) - plain).max() > 1e-3


def test_the_backbone_is_the_same_before_between_and_after(load, stages):
  """2. A run stops where its backbone has changed, so that what it says at its end held."""
  kept = [json.loads((stages / name / 'run.json').read_text()) for name in ('first', 'second')]
  assert kept[0]['backbone_sha256'] == kept[1]['backbone_sha256']
  pretrained, _ = training.build(load('lora', **LORA), 2)
  assert training.fingerprint(pretrained.variables) == kept[0]['backbone_sha256']
  assert all((stages / name / 'report.json').exists() for name in ('first', 'second'))


@pytest.mark.parametrize(
  ('method', 'here', 'there', 'leaf'),
  [
    ('lora', {'method.rank': 2}, {'method.rank': 4}, 'lora/encoder/block_0/.*/a'),
    ('vpt_deep', {'method.tokens': 2}, {'method.tokens': 3}, 'vpt_deep/encoder/block_0/prompts'),
  ],
)
def test_another_rank_or_length_names_the_leaf(load, tmp_path, method, here, there, leaf):
  """3."""
  _, tuned = training.build(load(method, **here), 2)
  place = tmp_path / 'theta.safetensors'
  training.save_theta(place, jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), tuned.shapes))
  settings = load(method, **there, **FRESH, **{'method.start': place})
  _, other = training.build(settings, 2)
  with pytest.raises(ValueError, match=f"has '{leaf}', float32 .*, where the method has float32"):
    start_lib.start_of(settings, other, tmp_path / 'none')


def test_the_head_is_that_of_a_run_that_starts_from_nothing(load, file):
  """4. It depends on the seed alone, for as many classes as before and for others."""
  settings = load('lora', **LORA, **FRESH, **{'method.start': file})
  head = built(settings, file).state['theta']['head']
  assert leaves_equal(head, built(load('lora', **LORA)).state['theta']['head'])
  other = load('lora', **LORA, **FRESH, **{'method.start': file, 'seed': 1})
  kernel = built(other, file).state['theta']['head']['head']['kernel']
  assert not np.array_equal(kernel, head['head']['kernel'])
  three = built(settings, file, outputs=3).state['theta']
  assert three['head']['head']['kernel'].shape == (16, 3)
  taken = built(load('lora', **LORA, **{'method.start': file}), file).state['theta']
  np.testing.assert_array_equal(
    taken['head']['head']['kernel'], load_file(file)['head/head/kernel']
  )


def test_without_updates_before_it_is_the_method_itself(stages):
  """5. The same seed, and the same theta after five updates."""
  first, again = (load_file(stages / name / 'theta.safetensors') for name in ('first', 'again'))
  assert first.keys() == again.keys()
  for path, x in first.items():
    np.testing.assert_array_equal(again[path], x)


def test_the_optimizer_and_its_count_start_anew(load, file, stages):
  """6."""
  settings = load('lora', **LORA, **FRESH, **{'method.start': file})
  state = built(settings, file).state
  assert state['step'] == 0
  assert not any(x.any() for x in jax.tree.leaves(state['optimizer']))
  assert json.loads((stages / 'second' / 'report.json').read_text())['steps'] == 2


def test_a_run_is_trained_on_a_few_examples_of_each_class(load, stages, tmp_path):
  """7. Which examples a seed draws is in tests/data/test_shots.py."""
  kept = json.loads((stages / 'second' / 'run.json').read_text())
  assert kept['data']['train']['examples'] == 6 and kept['data']['test']['examples'] == 10
  digests = set()
  for seed in range(2):
    settings = load('lora', **LORA, **{'data.shots': 3, 'data.shots_seed': seed, 'steps': 1})
    sources = training.asked.asked(settings, tmp_path / str(seed), {}).model.sources
    digests.add(tuple(sources['train'].rows))
    assert len(sources['train']) == 6 and len(sources['test']) == 10
  assert len(digests) == 2


def test_low_rank_products_merge_after_both_stages(load, file):
  """8."""
  second = built(load('lora', **LORA, **FRESH, **{'method.start': file}), file)
  theta = second.state['theta']
  variables = second.pretrained.variables
  merged = second.pretrained.model.apply(second.tuned.merge(theta, variables), IMAGES)
  np.testing.assert_allclose(second.tuned.apply(theta, variables, IMAGES), merged, atol=1e-5)
  assert np.abs(merged - second.pretrained.model.apply(variables, IMAGES)).max() > 1e-3


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'method.start_head': False}, 'start_head=False leaves out the head of method.start: set'),
    ({'data.shots_seed': 1}, 'data.shots_seed=1 draws data.shots examples of each class: set'),
    ({'data.shots': 13}, "13 examples of each class are asked for, and the split has 12 of 'blue'"),
    ({'data.shots': 1, 'task': 'multilabel'}, "data.shots=1 .* and it is 'multilabel'"),
  ],
)
def test_what_means_nothing_is_refused(load, tmp_path, settings, message):
  with pytest.raises((cli.Mistake, ValueError), match=message):
    training.train(load('lora', **LORA, **settings), tmp_path / 'run')


def test_theta_off_its_start_is_what_the_next_run_starts_from(stages):
  """The run from the command's folder takes what the first has learned, and goes on from it."""
  first, second = (load_file(stages / name / 'theta.safetensors') for name in ('first', 'second'))
  moved = [path for path in first if path.endswith('/b')]
  assert moved and all(np.abs(first[path]).max() > 0 for path in moved)
  for path in moved:  # two updates of at most 1e-2
    assert 0 < np.abs(second[path] - first[path]).max() <= 2.1e-2
  assert leaf_paths(second).keys() == first.keys()
