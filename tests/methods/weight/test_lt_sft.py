"""LT-SFT: the choice of entries, the rewind, what is trained, the penalty, sums, and counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.core import leaf_paths
from jpeft.methods.weight.lt_sft import lt_sft, most_changed
from jpeft.models import Bert, ViT
from tests.fixtures import noisy
from tests.methods.golden import full_size

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 8, 8, 3)).astype('float32')
LABELS = np.arange(6) % 3
BATCHES = [(X[:3], LABELS[:3]), (X[3:], LABELS[3:])]
COUNT = 200


@functools.cache
def vit(scan=False):
  model = ViT(
    width=16, depth=2, heads=2, mlp_dim=32, patch_size=4, image_size=8, num_classes=3, scan=scan
  )
  return model, jax.jit(model.init)(jax.random.key(0), X)


def prepared(model, held, **hyperparameters):
  options = dict(count=COUNT, first_steps=4, first_lr=1e-3) | hyperparameters
  return jpeft.prepare(jpeft.make('lt_sft', **options), model, held, BATCHES)


@pytest.fixture(scope='module')
def plain():
  """(model, held, tuned, what was found)."""
  model, held = vit()
  method = prepared(model, held)
  return model, held, jpeft.attach(model, method, held, X), jpeft.found_in(method)


def loss_of(tuned, held):
  def loss(theta):
    logits = jax.nn.log_softmax(tuned.apply(theta, held, X))
    return -jnp.mean(logits[jnp.arange(6), LABELS])

  return loss


def entries(found):
  """{path of an array: its rising places, row by row}."""
  return {
    key.removeprefix('lt_sft/entries ').replace(' ', '/'): x
    for key, x in found.items()
    if key.startswith('lt_sft/entries')
  }


# The choice.


def test_the_largest_changes_are_chosen():
  change = np.abs(np.array([0, 0.1, -0.3, 0.05, 0.2], np.float32))
  (places,) = most_changed([change], 2)
  assert places.tolist() == [2, 4] and change[places].min() == np.float32(0.2)
  parts = most_changed([change[:3], change[3:]], 3)
  assert [x.tolist() for x in parts] == [[1, 2], [1]]


def test_of_equal_changes_as_many_are_chosen_as_are_wanted():
  parts = most_changed([np.array([1.0, 2, 1]), np.array([1.0, 3])], 4)
  assert [x.tolist() for x in parts] == [[0, 1, 2], [1]]
  # What did not change is not taken.
  parts = most_changed([np.array([0.0, 2]), np.array([0.0])], 3)
  assert [x.tolist() for x in parts] == [[1], []]


def test_the_entries_are_those_that_full_tuning_moves_the_most(plain):
  model, held, _, found = plain
  full = jpeft.attach(model, jpeft.full(), held, X)
  theta = start = jax.jit(full.init)(jax.random.key(1), held)
  tx = optax.adam(optax.linear_schedule(1e-3, 0, 4))
  state = tx.init(theta)

  @jax.jit
  def update(theta, state, x, labels):
    def loss(theta):
      logits = jax.nn.log_softmax(full.apply(theta, held, x))
      return -jnp.mean(logits[jnp.arange(3), labels])

    updates, state = tx.update(jax.grad(loss)(theta), state)
    return optax.apply_updates(theta, updates), state

  for x, labels in BATCHES * 2:
    theta, state = update(theta, state, x, labels)
  change = leaf_paths(jax.tree.map(lambda a, b: np.abs(a - b), theta, start)['full'])
  change = {path: x.reshape(-1) for path, x in change.items() if not path.startswith('head/')}
  threshold = np.sort(np.concatenate(list(change.values())))[-COUNT]
  chosen = entries(found)
  assert sum(map(len, chosen.values())) == COUNT
  # Adam's first steps are of one size, so that some changes differ by rounding alone.
  for path, x in change.items():
    places = chosen.get(path, np.zeros((0, 2), int))[:, 1]
    left = np.delete(x, places)
    assert places.size == 0 or x[places].min() >= threshold * (1 - 1e-4)
    assert left.max() <= threshold * (1 + 1e-4)


# The second phase.


@pytest.mark.parametrize('scan', [False, True])
def test_it_starts_from_the_same_bits_and_moves_its_entries_alone(plain, scan):
  model, held, tuned, found = plain
  if scan:
    model, held = vit(scan)
    method = prepared(model, held)
    tuned, found = jpeft.attach(model, method, held, X), jpeft.found_in(method)
  trained = tuned.split(tuned.shapes)[0]
  head = sum(x.size for x in jax.tree.leaves(trained['head']))
  assert sum(x.size for x in jax.tree.leaves(trained)) == COUNT + head == COUNT + 51

  theta = jax.jit(tuned.init)(jax.random.key(1), held)
  merge = jax.jit(tuned.merge)
  jax.tree.map(np.testing.assert_array_equal, merge(theta, held), held)
  moved = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, theta)
  for path, x in leaf_paths(merge(moved, held)['params']).items():
    if not path.startswith('head/'):
      want = len(entries(found).get(path, ()))
      assert (x != leaf_paths(held['params'])[path]).sum() == want, path

  out = jax.jit(tuned.apply)(noisy(theta), held, X)
  np.testing.assert_allclose(out, jax.jit(model.apply)(merge(noisy(theta), held), X), atol=1e-5)
  again = jpeft.with_found(jpeft.make('lt_sft', count=COUNT), found)
  assert jpeft.attach(model, again, held, X).shapes == tuned.shapes


def test_the_compact_optimizer_is_masked_adam(plain):
  """And what is not chosen keeps its bits, whatever momentum does."""
  model, held, tuned, found = plain
  tx = optax.adam(1e-2)
  full = jpeft.attach(model, jpeft.full(), held, X)
  dense = start = jax.jit(full.init)(jax.random.key(1), held)
  chosen = entries(found)
  masks = leaf_paths(jax.tree.map(jnp.zeros_like, dense)['full'])
  for path in masks:
    if path.startswith('head/'):
      masks[path] = jnp.ones_like(masks[path])
    elif path in chosen:
      ones = jnp.zeros(masks[path].size).at[chosen[path][:, 1]].set(1)
      masks[path] = ones.reshape(masks[path].shape)
  mask = jax.tree.unflatten(jax.tree.structure(dense), list(masks.values()))

  @jax.jit
  def dense_update(theta, state):
    updates, state = tx.update(jax.grad(loss_of(full, held))(theta), state)
    return optax.apply_updates(theta, jax.tree.map(jnp.multiply, updates, mask)), state

  @jax.jit
  def update(theta, state):
    trained, rest = tuned.split(theta)
    grads = jax.grad(lambda p: loss_of(tuned, held)(tuned.join(p, rest)))(trained)
    updates, state = tx.update(grads, state, trained)
    return tuned.join(optax.apply_updates(trained, updates), rest), state

  theta = jax.jit(tuned.init)(jax.random.key(1), held)
  dense_state, state = tx.init(dense), tx.init(tuned.split(theta)[0])
  for _ in range(3):
    dense, dense_state = dense_update(dense, dense_state)
    theta, state = update(theta, state)
  want = leaf_paths(full.merge(dense, held))
  for path, x in leaf_paths(tuned.merge(theta, held)).items():
    np.testing.assert_allclose(x, want[path], atol=1e-6, err_msg=path)
  assert jnp.abs(want['params/head/kernel'] - start['full']['head']['kernel']).max() > 1e-3


@pytest.mark.parametrize('scan', [False, True])
def test_the_penalty_pulls_each_entry_by_a_number(scan):
  model, held = vit(scan)
  tuned = jpeft.attach(model, prepared(model, held, l1=0.1), held, X)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(1), held))
  trained, rest = tuned.split(theta)

  @jax.jit
  @jax.grad
  def gradient(trained):
    run = lambda: tuned.apply(tuned.join(trained, rest), held, X, aux=True)
    return tuned.objective(run, lambda out: jnp.zeros(()))[0]

  number = sum(x.size for x in jax.tree.leaves(held))
  grads = gradient(trained)['lt_sft']
  jax.tree.map(
    lambda g, x: np.testing.assert_allclose(g, 0.1 / number * np.sign(x), rtol=1e-5),
    grads,
    trained['lt_sft'],
  )


def test_differences_are_added_in_any_order_and_taken_away():
  model, held = vit()
  names = ('language', 'task')
  methods = [
    jpeft.prepare(
      lt_sft(50, 2, 1e-3, name=name), model, held, BATCHES if name == 'task' else BATCHES[::-1]
    )
    for name in names
  ]
  thetas = {}
  for i, method in enumerate(methods):
    tuned = jpeft.attach(model, method, held, X)
    thetas |= noisy(jax.jit(tuned.init)(jax.random.key(i), held), i)
  both = jpeft.attach(model, jpeft.chain(*methods), held, X)
  turned = jpeft.attach(model, jpeft.chain(*methods[::-1]), held, X)
  one, other = jax.jit(lambda t, held: (both.merge(t, held), turned.merge(t, held)))(thetas, held)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)

  taken_away = jax.tree_util.tree_map_with_path(
    lambda path, x: -x if path[-1].key == 'delta' else x, thetas
  )
  back = jax.jit(both.merge)(taken_away, one)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, held)
  changed = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (one, held)), strict=True)]
  assert any(changed)

  # A task is learned on top of a language, whose entries stay.
  base = jpeft.frozen(methods[0], thetas)
  tuned = jpeft.attach(model, jpeft.chain(base, methods[1]), held, X)
  assert sum(x.size for x in jax.tree.leaves(tuned.split(tuned.shapes)[0])) == 50


def test_what_may_be_trained_is_chosen_by_patterns():
  model, held = vit()
  own = dict(count=COUNT, first_steps=1, first_lr=1e-3, targets='{block}/.*', skip='{norm}')
  found = jpeft.found_in(prepared(model, held, **own))
  assert all('/block_' in path and 'norm' not in path for path in entries(found))
  method = jpeft.in_layers(lt_sft(COUNT, 1, 1e-3), '1:')
  found = jpeft.found_in(jpeft.prepare(method, model, held, BATCHES))
  assert all('/block_1/' in path for path in entries(found))


def test_examples_are_read_again_until_there_are_enough():
  model, held = vit()
  read = []

  def batches():
    for batch in BATCHES:
      read.append(len(read))
      yield batch

  jpeft.prepare(lt_sft(COUNT, 5, 1e-3), model, held, batches())
  assert read == [0, 1]  # each once, and then from memory


def test_counts_on_mbert():
  """k as the paper sets it, to be the size of adapters; what an optimizer has of it."""
  words = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  model = Bert(width=768, depth=12, heads=12, mlp_dim=3072, vocab=119547, pooler=True, scan=True)
  model, shapes = full_size.of(model, words)
  adapters = jpeft.attach(model, jpeft.pfeiffer(reduction=2), *shapes)
  assert jpeft.summary(adapters).trainable == 7_091_712
  for k in (14_174_208, 7_091_712, 3_550_464, 1_779_840, 894_528, 451_872, 7_387_776, 14_155_776):
    tuned = jpeft.attach(model, jpeft.stand_in(lt_sft(k)), *shapes)
    assert abs(jpeft.summary(tuned).trainable - k) <= 200  # one rounding for each of 199 arrays
  path = 'encoder/blocks/mlp/fc1'
  x = np.stack([np.zeros(451_872, int), np.arange(451_872)], 1)
  found = {
    f'layers {path}': np.array(12),
    f'entries {path} kernel': x,
    'chosen': np.array([451_872, 451_872, 1, 1, 1]),
  }
  named = {f'lt_sft/{key}': value for key, value in found.items()}
  tuned = jpeft.attach(model, jpeft.with_found(lt_sft(451_872), named), *shapes)
  trained, _ = tuned.split(tuned.shapes)
  moments = jax.eval_shape(optax.adam(1e-3).init, trained)[0].mu
  assert [m.shape for m in jax.tree.leaves(moments)] == [(451_872,)]


@pytest.mark.parametrize(
  ('hyperparameters', 'message'),
  [
    ({'count': 0}, 'lt_sft: count=0 must be a whole number'),
    ({'first_steps': 0.5}, 'lt_sft: first_steps=0.5 must be a whole number'),
    ({'first_lr': 0}, 'lt_sft: first_lr=0 must be greater than 0'),
    ({'l1': -1}, 'lt_sft: l1=-1 must be at least 0'),
  ],
)
def test_hyperparameters_are_checked(hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    lt_sft(**hyperparameters)


def test_more_entries_than_there_are_is_refused():
  model, held = vit()
  with pytest.raises(ValueError, match='is more than the .* numbers that may be trained'):
    prepared(model, held, count=10**6)
