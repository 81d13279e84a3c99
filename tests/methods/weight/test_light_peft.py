"""Light-PEFT: its first phase, what goes by which quantile, the narrow model, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core import Examples, early_updates, falling_adam, weights_of
from jpeft.methods.weight.cuttable import KEPT, LINEAR
from jpeft.methods.weight.early_pruning import decided, least, rank_importance
from jpeft.methods.weight.light_peft import _mean, light_peft
from jpeft.models import Bert, Llama
from tests.fixtures import noisy
from tests.methods.small import IMAGES, shapes_of, vit

RNG = np.random.default_rng(0)
PICTURES = RNG.normal(size=(12, 8, 8, 3)).astype('float32')
BATCHES = [(PICTURES[i : i + 4], np.arange(4)) for i in range(0, 12, 4)]
HP = {'rank': 2, 'updates': 3, 'rate': 1e-2}


@functools.cache
def prepared(scan=False, **hyperparameters):
  """(model, variables, the method after its first phase)."""
  model, held = vit(scan=scan)
  method = light_peft(**HP | hyperparameters)
  return model, held, jpeft.prepare(method, model, held, BATCHES, key=jax.random.key(1))


@functools.cache
def narrow(scan=False):
  """(`Pruned`, its method attached, the theta that it starts with)."""
  model, held, method = prepared(scan)
  small = jpeft.pruned(method, model, held, IMAGES)
  tuned = jpeft.attach(small.model, small.method, small.backbone, IMAGES)
  return small, tuned, jax.jit(tuned.init)(jax.random.key(0), small.backbone)


def found_of(method):
  (found,) = {id(r.preparation): r.preparation.found for _, r in method}.values()
  return found


def started(model, held, method):
  """(tuned, a theta off its start, outputs)."""
  tuned = jpeft.attach(model, method, held, IMAGES)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(0), held))
  return tuned, theta, np.asarray(jax.jit(tuned.apply)(theta, held, IMAGES))


def test_with_masks_of_one_the_first_phase_is_lora():
  model, held = vit()
  first = jpeft.stand_in(light_peft(rank=2, alpha=4))
  tuned, theta, out = started(model, held, first)
  ones = jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.ones_like(x) if path[-1].key == KEPT else x, theta
  )
  plain = jpeft.attach(model, jpeft.lora(rank=2, alpha=4, targets=LINEAR), held, IMAGES)
  own = {
    path: {array: {k: t[k] for k in 'ab'} for array, t in arrays.items()}
    for path, arrays in ones['light_peft'].items()
  }
  expected = jax.jit(plain.apply)({'lora': own}, held, IMAGES)
  np.testing.assert_allclose(jax.jit(tuned.apply)(ones, held, IMAGES), expected, atol=1e-6)
  assert np.abs(out - expected).max() > 1e-3  # masks off one


def test_what_lies_at_a_quantile_goes():
  values = np.array([[0.3, -2.0, 0.9, 0.1, 1.1, 0.5], [6, 5, 4, 3, 2, 1.0]])
  gone = least(values, 1 / 3)
  for row, value in zip(gone, values, strict=True):
    assert row.sum() == 2
    np.testing.assert_array_equal(row, value <= np.quantile(value, 1 / 3))
  assert gone[0].tolist() == [False, True, False, True, False, False]  # by value, not by size
  assert not least(values, 0).any()
  assert least(np.ones(4), 0.9).tolist() == [True, True, True, False]  # never all


def test_importance_of_ranks():
  t = {'a': jnp.array([[1.0, 2], [3, 4]]), 'b': jnp.array([[1.0, 1, 4], [2, 0, 1]])}
  grads = {'a': jnp.array([[1.0, -1], [-1, 1]]), 'b': jnp.array([[1.0, -1, 1], [3, 1, 0]])}
  # Rank 1: |1 - 3| / 2 + |1 - 1 + 4| / 3; rank 2: |-2 + 4| / 2 + |6| / 3.
  np.testing.assert_allclose(rank_importance(t, grads), [1 + 4 / 3, 1 + 2], rtol=1e-6)


def test_masks_learn_at_rates_of_their_own():
  factors = {'a': 1.0, 'heads': 100.0, 'units': 50.0}
  tx = falling_adam(3e-4, 10, lambda path: factors[path[0]])
  grads = {key: jnp.array(2.0) for key in factors}
  updates, _ = tx.update(grads, tx.init(grads), grads)
  for key, factor in factors.items():
    np.testing.assert_allclose(updates[key], -3e-4 * factor, rtol=1e-3)


def test_the_first_phase_moves_masks_at_these_rates():
  one = {'ranks': 0.0, 'modules': 0.0, 'units': 0.0, 'heads': 0.0}
  seen = {}

  def recorded(learned, scores, sites, heads, shares):
    for path, arrays in learned.items():
      for t in arrays.values():
        if KEPT in t:
          seen['heads' if path in heads else 'units'] = np.abs(t[KEPT] - 1).max()
        seen['b'] = max(seen.get('b', 0), np.abs(t['b']).max())
    return decided(learned, scores, sites, heads, shares)

  def first(*args, **kwargs):
    yield next(early_updates(*args, **kwargs))

  model, held = vit()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('jpeft.methods.weight.light_peft.decided', recorded)
    patch.setattr('jpeft.methods.weight.light_peft.early_updates', first)
    jpeft.prepare(light_peft(rank=2, updates=2, rate=1e-4, **one), model, held, BATCHES[:1])
  # Adam's first step is the rate itself.
  np.testing.assert_allclose(seen['b'], 1e-4, rtol=2e-2)
  np.testing.assert_allclose(seen['heads'], 1e-2, rtol=2e-2)
  np.testing.assert_allclose(seen['units'], 5e-3, rtol=2e-2)


@pytest.mark.parametrize('scan', [False, True])
def test_the_narrow_model_is_the_wide_one_with_zeros(scan):
  model, held, method = prepared(scan)
  tuned = jpeft.attach(model, method, held, IMAGES)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  out = jax.jit(tuned.apply)(theta, held, IMAGES)
  small, cut, own = narrow(scan)
  np.testing.assert_allclose(jax.jit(cut.apply)(own, small.backbone, IMAGES), out, atol=1e-5)
  merged = jax.jit(tuned.merge)(theta, held)
  np.testing.assert_allclose(jax.jit(model.apply)(merged, IMAGES), out, atol=1e-5)

  # Two of four heads lie at or below the quantile of a third; hidden units compete over layers.
  assert small.model.heads == 2
  widths = small.model.mlp_dim
  assert len(set(widths)) > 1 and abs(sum(widths) - 64 * 3 * 2 / 3) <= 3
  assert jpeft.nbytes(small.backbone) < jpeft.nbytes(held)


@pytest.mark.parametrize('scan', [False, True])
def test_what_goes_has_no_parameters(scan):
  model, held, method = prepared(scan)
  found = found_of(method)
  ranks = {key: x for key, x in found.items() if key.startswith('ranks ')}
  total = sum(x.size for x in ranks.values())
  left = sum(int(x.any(-1).sum()) for x in ranks.values())
  assert total == 2 * 18 and left <= 18 - 13  # floor(.75 * 17) + 1 of 18 go, or all ranks of more
  tuned = jpeft.attach(model, method, held, IMAGES)
  trained, _ = tuned.split(tuned.shapes)
  expected = 0
  for key, x in ranks.items():
    place = key.removeprefix('ranks ')
    per_rank = found[f'a {place}'].shape[1] + found[f'b {place}'].shape[-1]
    expected += int(x.sum()) * per_rank
  assert sum(x.size for x in jax.tree.leaves(trained)) == expected > 0
  if not scan:
    paths = {path for path, t in trained['light_peft'].items() if jax.tree.leaves(t)}
    assert len(paths) == left


def test_lora_goes_on_from_the_first_phase_and_back_to_the_whole_model():
  model, held, method = prepared()
  found = found_of(method)
  small, _, own = narrow()
  wide = jpeft.attach(model, method, held, IMAGES)
  zeros = jax.tree.map(jnp.zeros_like, jax.jit(wide.init)(jax.random.key(0), held))
  for arrays in zeros['light_peft'].values():
    arrays['kernel'].pop(KEPT, None)
  zeros['light_peft'] = {
    path: arrays for path, arrays in zeros['light_peft'].items() if arrays['kernel']
  }
  back = jax.jit(lambda own, zeros: jpeft.widened_theta(model, small.keep, own, zeros))(own, zeros)
  for path, arrays in back['light_peft'].items():
    place = f'{path} kernel'
    ranks = found[f'ranks {place}'][0]
    a = found[f'a {place}'][0][:, ranks]
    b = found[f'b {place}'][0][ranks]
    a_kept, b_kept = np.ones(len(a), bool), np.ones(b.shape[1], bool)
    block = path.rpartition('/')[0].rpartition('/')[0]
    if path.endswith(('/query', '/key', '/value')):
      b_kept = np.repeat(found[f'parts {block}/attention/out kernel'][0], 8)
    if path.endswith('/out'):
      a_kept = np.repeat(found[f'parts {place}'][0], 8)
    if path.endswith('/fc1'):
      b_kept = found[f'parts {block}/mlp/fc2 kernel'][0]
    if path.endswith('/fc2'):
      a_kept = found[f'parts {place}'][0]
    np.testing.assert_array_equal(arrays['kernel']['a'], a * a_kept[:, None])
    np.testing.assert_array_equal(arrays['kernel']['b'], b * b_kept)


def test_tokens_that_count():
  mask = jnp.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
  rows = jnp.array([1, 1, 0])
  tokens = weights_of(Examples((jnp.zeros((3, 3)),), None, {'mask': mask}, rows))
  np.testing.assert_array_equal(tokens, [[1, 1, 0], [1, 0, 0], [0, 0, 0]])
  ratio = jnp.array([[2.0, 4, 99], [6, 99, 99], [99, 99, 99]])
  assert _mean(ratio, tokens) == 4
  assert _mean(ratio[:, :2], tokens) == (2 + 4 + 6 + 99) / 4  # another sequence, of the same rows


@pytest.mark.slow  # the test above has its parts
def test_padding_does_not_count():
  model = Llama(16, 1, 2, 16, 20, head='text')
  tokens = np.arange(12).reshape(2, 6).astype('int32')
  mask = np.ones((2, 6), int)
  mask[0, 4:] = 0
  held = jax.jit(model.init)(jax.random.key(0), tokens)
  other = np.where(mask, tokens, 19).astype('int32')

  def loss(out, labels):
    return (out**2).mean(-1), labels

  def scores(tokens):
    seen = {}

    def recorded(learned, scores, *rest):
      seen.update(scores)
      return decided(learned, scores, *rest)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr('jpeft.methods.weight.light_peft.decided', recorded)
      batch = ({'tokens': tokens, 'mask': mask}, mask.astype('float32'))
      jpeft.prepare(light_peft(rank=2, updates=2), model, held, [batch] * 2, loss=loss)
    return {key: x for key, x in seen.items() if key.startswith('module ')}

  first, second = scores(tokens), scores(other)
  assert max(x.max() for x in first.values()) > 0
  for key, x in first.items():
    np.testing.assert_allclose(x, second[key], rtol=1e-4, err_msg=key)


def test_counts_of_roberta_large():
  model = Bert(1024, 24, 16, 4096, vocab=50265, positions=514, num_classes=2, scan=True)
  tokens = np.zeros((1, 4), 'int32')
  tuned = shapes_of(model, jpeft.stand_in(light_peft(rank=8)), tokens)
  lora = 24 * 8 * (4 * 2 * 1024 + 2 * (1024 + 4096))
  assert jpeft.summary(tuned).trainable == lora + 24 * (16 + 4096)


@pytest.mark.parametrize(
  ('hyperparameters', 'told'),
  [
    ({'heads': 1.0}, r'heads=1.0 must lie in \[0, 1\)'),
    ({'updates': 1}, 'updates=1 must be a whole number, at least 2'),
    ({'rate': 0}, 'rate=0 must be greater than 0'),
    ({'penalty': -1}, 'penalty=-1 must be at least 0'),
  ],
)
def test_refusals(hyperparameters, told):
  with pytest.raises(ValueError, match=told):
    light_peft(**hyperparameters)


def test_only_what_prunes_is_cut():
  model, held = vit()
  with pytest.raises(ValueError, match='no rule of it prunes the model before training'):
    jpeft.pruned(jpeft.lora(2), model, held, IMAGES)
