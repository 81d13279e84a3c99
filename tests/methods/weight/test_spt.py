"""SPT: entries and their gradient, sensitivity, what a budget is spent on, and the method."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core import Examples, Pass, leaf_paths
from jpeft.methods.weight import sparse
from jpeft.methods.weight.budget import Chosen, allocated, closest, cost
from jpeft.methods.weight.sensitivity import Sensitive, Tensor, accumulated, fresh_head, sensitive
from jpeft.methods.weight.spt import spt
from jpeft.models import ViT
from tests.fixtures import noisy
from tests.methods.golden import full_size

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 8, 8, 3)).astype('float32')
LABELS = np.arange(6) % 3


class Dense(nn.Module):
  """One layer; the weights are [fan_in, fan_out]."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2, use_bias=False, name='fc')(x)


def entries(rows, columns, delta):
  """theta of single entries of a kernel."""
  state = {name: jnp.asarray(x) for name, x in sparse.entries_of(rows, columns).items()}
  return {**state, 'delta': jnp.asarray(delta, jnp.float32)}


def on_dense(rows, columns, delta, x, w):
  """(the output, a vjp in delta and x) of a layer with entries."""

  def init(key, w):
    return entries(rows, columns, np.zeros(len(rows)))

  def dot(t, x, y, w, key):
    return sparse.product(t, x, w())

  method = jpeft.at('fc', jpeft.matrix('sparse', init, lambda t, w: sparse.added(t, w), dot))
  held = {'params': {'fc': {'kernel': w}}}
  tuned = jpeft.attach(Dense(), method, held, x)
  theta = entries(rows, columns, delta)

  def run(delta, x):
    t = {'sparse': {'fc': {'kernel': {**theta, 'delta': delta}}}}
    return tuned.apply(t, held, x)

  return jax.vjp(run, theta['delta'], x)


# Single entries.


def test_the_gradient_of_an_entry():
  x = jnp.array([[1.0, 2], [3, 4]])
  g = jnp.array([[1.0, 0], [0.5, 1]])
  w = jnp.asarray(RNG.normal(size=(2, 2)), jnp.float32)
  # The card's index (0, 1) is output 0 and input 1.
  out, vjp = on_dense([1], [0], [0.3], x, w)
  whole = w.at[1, 0].add(0.3)
  np.testing.assert_allclose(out, x @ whole, rtol=1e-6)
  d_delta, dx = vjp(g)
  assert d_delta.tolist() == [4]
  assert (x.T @ g)[1, 0] == 4  # of the dense gradient
  np.testing.assert_allclose(dx, g @ whole.T, rtol=1e-6)


def test_many_entries_have_the_dense_gradient_at_their_places():
  columns = jnp.asarray(RNG.normal(size=(2, 5, 7)), jnp.float32)
  g = jnp.asarray(RNG.normal(size=(2, 5, 60)), jnp.float32)
  places = np.sort(RNG.permutation(7 * 60)[:300])  # more than are multiplied at a time
  state = sparse.entries_of(places // 60, places % 60)
  assert state['inputs'].tolist() == list(range(7))
  found = sparse.gradient(columns, g, jnp.asarray(state['at']), jnp.asarray(state['out']))
  dense = jnp.einsum('bti,bto->io', columns, g)
  np.testing.assert_allclose(found, dense.reshape(-1)[places], rtol=1e-4, atol=1e-5)


def test_the_backward_pass_keeps_the_columns_that_are_read_each_once():
  x = jnp.asarray(RNG.normal(size=(40, 9)), jnp.float32)
  w = jnp.asarray(RNG.normal(size=(9, 2)), jnp.float32)
  _, vjp = on_dense([2, 2, 5], [0, 1, 1], [0.0, 0, 0], x, w)
  sizes = sorted(leaf.size for leaf in jax.tree.leaves(vjp) if leaf.size >= 40)
  assert sizes == [40 * 2]  # tokens x unique inputs; x itself is not there


# Sensitivity.


def test_squares_of_batches_are_added():
  total = {'w': jnp.zeros(1)}
  for gradient in (1.0, -1.0):
    total = accumulated(total, {'w': jnp.array([gradient])})
  assert total['w'].tolist() == [2]


class Two(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, name='b')(nn.Dense(2, name='a')(x))


def test_the_scores_are_those_of_the_gradients():
  model = Two()
  batches = [Examples((RNG.normal(size=(4, 5)).astype('float32'),), LABELS[:4]) for _ in range(2)]
  held = model.init(jax.random.key(0), batches[0].args[0])

  @jax.grad
  def gradient(held, batch):
    logits = jax.nn.log_softmax(model.apply(held, batch.args[0]))
    return -jnp.mean(logits[jnp.arange(4), batch.labels])

  grads = [leaf_paths(gradient(held, batch)['params']) for batch in batches]
  for group in (2**20, 1):  # all at once, and one module at a time
    own = Pass(model, held, batches)
    places = [(path, array) for path in 'ab' for array in ('kernel', 'bias')]
    tensors = [Tensor(own.sites[path], array, 0, array == 'kernel') for path, array in places]
    found = sensitive(own, tensors, 21, group)
    for number, (path, array) in enumerate(places):
      want = sum(g[f'{path}/{array}'] ** 2 for g in grads).reshape(-1)
      got = np.zeros(want.shape)
      here = found.tensor == number
      got[found.place[here]] = found.score[here]
      np.testing.assert_allclose(got, want, rtol=1e-4)
    assert (np.diff(found.score) <= 0).all()


def test_the_most_sensitive_are_kept_of_groups():
  one = Sensitive.of([np.array([3.0, 0, 1])], 2)
  other = Sensitive.of([np.array([2.0, 4])], 2, first=1)
  both = one.joined(other, 3)
  assert both.tensor.tolist() == [1, 0, 1] and both.place.tolist() == [1, 0, 0]


# What a budget is spent on.


def kind(count, shape):
  return allocated(np.array([count]), [shape], 'lora', 8)


def test_kinds_by_count():
  kernel = (768, 768)
  assert cost(kernel, 'lora', 8) == 12_288
  assert kind(1228, kernel) == (['entries'], 1228)
  assert kind(1229, kernel) == (['structured'], 12_288)
  assert kind(154, (768,)) == (['vector'], 768) and kind(153, (768,)) == ([None], 0)
  assert kind(0, kernel) == ([None], 0)
  assert [kind(c, (768, 3072)).kinds[0] for c in (3071, 3072)] == ['entries', 'structured']
  adapters = {768: 1307, 3072: 5224}
  for width, least in adapters.items():
    found = [allocated(np.array([c]), [(768, width)], 'adapter', 8) for c in (least - 1, least)]
    assert [one.kinds for one in found] == [['entries'], ['structured']]
    assert found[1].total == 2 * width * 8 + 8 + width


def test_the_plan_is_the_closest_of_all_that_are_tried():
  shapes = [(30, 20), (20,), (20, 30), (30,)]
  tensor = RNG.integers(0, 4, 300)

  def allocate(counts, shapes):
    return allocated(counts, shapes, 'lora', 2)

  for budget in (0, 37, 111, 10_000):
    plan = closest(tensor, shapes, budget, allocate, 10, 20)
    totals = {}
    for tau in range(10, 201, 10):
      counts = [int((tensor[:tau] == i).sum()) for i in range(4)]
      totals[tau] = allocate(np.array(counts), shapes).total
    assert plan.total == totals[plan.tau]
    assert abs(plan.total - budget) == min(abs(total - budget) for total in totals.values())


# The method.


def vit(scan=False):
  model = ViT(
    width=16, depth=2, heads=2, mlp_dim=32, patch_size=4, image_size=8, num_classes=3, scan=scan
  )
  return model, jax.jit(model.init)(jax.random.key(0), X)


def prepared(model, held, structured='lora', budget=900):
  method = jpeft.make('spt', budget=budget, structured=structured, rank=8, step=25)
  return jpeft.prepare(method, model, held, [(X[:3], LABELS[:3]), (X[3:], LABELS[3:])])


@pytest.mark.parametrize('scan', [False, True])
def test_it_starts_as_the_backbone_merges_and_has_the_planned_numbers(scan):
  model, held = vit(scan)
  method = prepared(model, held)
  found = jpeft.found_in(method)
  total, tau, budget = found['spt/plan']
  assert budget == 900 and tau % 25 == 0
  kinds = {key.split()[0] for key in found}
  assert {'spt/entries', 'spt/structured', 'spt/token'} <= kinds
  for key in found:  # patches, positions and head are never among them
    path, array = key.partition(' ')[2].rpartition(' ')[::2]
    assert not path.startswith(('head', 'embed/patch')) and 'position' not in array
  tuned = jpeft.attach(model, method, held, X)
  assert jpeft.summary(tuned).trainable == total
  trained = {path.split('/')[0] for path in leaf_paths(tuned.split(tuned.shapes)[0])}
  assert {'spt', 'spt_token', 'head'} <= trained

  @jax.jit
  def outputs(theta, held):
    return (
      tuned.apply(theta, held, X),
      model.apply(held, X),
      model.apply(tuned.merge(theta, held), X),
    )

  theta = jax.jit(tuned.init)(jax.random.key(1), held)
  start, plain, _ = outputs(theta, held)
  np.testing.assert_allclose(start, plain, atol=1e-6)
  moved, _, merged = outputs(noisy(theta), held)
  np.testing.assert_allclose(moved, merged, atol=1e-5)
  assert jnp.abs(moved - plain).max() > 1e-2

  again = jpeft.with_found(jpeft.make('spt', budget=900, rank=8, step=25), found)
  assert jpeft.attach(model, again, held, X).shapes == tuned.shapes


def test_a_stack_is_served_as_its_layers_are():
  model, held = vit()
  scanned = model.clone(scan=True)
  encoder = held['params']['encoder']
  stack = jax.tree.map(lambda *x: jnp.stack(x), encoder['block_0'], encoder['block_1'])
  rest = {name: x for name, x in encoder.items() if not name.startswith('block_')}
  stacked = {'params': {**held['params'], 'encoder': {**rest, 'blocks': stack}}}
  plain = jpeft.attach(model, prepared(model, held), held, X)
  other = jpeft.attach(scanned, prepared(scanned, stacked), stacked, X)
  assert jpeft.summary(plain).trainable == jpeft.summary(other).trainable

  theta = noisy(jax.jit(other.init)(jax.random.key(1), stacked))
  read = leaf_paths(other.expand(theta))

  def of_layer(path, like):
    found = path.replace('block_0', 'blocks').replace('block_1', 'blocks')
    if found == path:
      return read[found]
    x = read[found][int('block_1' in path)]  # what fills up stands behind the rest
    return x[tuple(slice(size) for size in like.shape)]

  leaves = [of_layer(path, like) for path, like in leaf_paths(plain.shapes).items()]
  same = jax.tree.unflatten(jax.tree.structure(plain.shapes), leaves)
  out = jax.jit(plain.apply)(same, held, X)
  np.testing.assert_allclose(out, jax.jit(other.apply)(theta, stacked, X), atol=1e-5)


def test_adapters():
  model, held = vit(scan=True)
  method = prepared(model, held, 'adapter')
  tuned = jpeft.attach(model, method, held, X)
  assert 'spt_adapter' in tuned.shapes
  assert jpeft.summary(tuned).trainable == jpeft.found_in(method)['spt/plan'][0]
  theta = jax.jit(tuned.init)(jax.random.key(1), held)
  start, plain = jax.jit(tuned.apply)(theta, held, X), jax.jit(model.apply)(held, X)
  np.testing.assert_allclose(start, plain, atol=1e-6)
  with pytest.raises(ValueError, match='spt_adapter at .* cannot be merged'):
    tuned.merge(theta, held)


def test_layers_of_a_stack_have_numbers_of_their_own():
  path, array = 'encoder/blocks/mlp/fc1', 'kernel'
  found = {
    f'entries {path} {array}': np.array([[0, 3, 1], [2, 3, 4], [2, 5, 4]], np.int32),
    f'structured {path} {array}': np.array([1], np.int32),
    f'layers {path}': np.array(3),
    'plan': np.array([0, 0, 0]),
  }
  model = ViT(
    width=8, depth=3, heads=2, mlp_dim=16, patch_size=4, image_size=8, num_classes=3, scan=True
  )
  held = jax.eval_shape(model.init, jax.random.key(0), X)
  method = jpeft.with_found(spt(rank=2), {f'spt/{key}': x for key, x in found.items()})
  tuned = jpeft.attach(model, method, held, X)
  trained = leaf_paths(tuned.split(tuned.shapes)[0])
  assert sorted(x.shape for x in trained.values()) == [(1, 2, 16), (1, 8, 2), (3,)]
  assert Chosen.of(found).layers == {path: 3}
  read = tuned.read_shapes['spt'][path][array]
  assert read['delta'].shape == (3, 2) and read['a'].shape == (3, 8, 2)


def test_before_the_pass_it_is_as_large_as_the_budget():
  x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  model, shapes = full_size.of(
    ViT(
      width=768, depth=12, heads=12, mlp_dim=3072, patch_size=16, image_size=224, num_classes=None
    ),
    x,
  )
  tuned = jpeft.attach(model, jpeft.stand_in(spt()), *shapes)
  norms = 25 * 2 * 768
  assert jpeft.summary(tuned).trainable == norms + 72 * ((400_000 - norms) // 72)


def test_the_head_is_drawn_anew_for_the_pass():
  model, held = vit()
  heads = []
  for seed in (0, 1):
    own = Pass(model, held, [Examples((X,), LABELS)], key=jax.random.key(seed))
    heads.append(fresh_head(own)['params']['head'])
  assert not jnp.any(heads[0]['bias']) and jnp.any(heads[0]['kernel'] != heads[1]['kernel'])
  assert 0.01 < float(heads[0]['kernel'].std()) < 0.03


def test_what_is_refused():
  with pytest.raises(ValueError, match="structured='ia3' is none of 'lora', 'adapter'"):
    spt(structured='ia3')
  with pytest.raises(ValueError, match='spt chooses what is trained in a pass'):
    model, held = vit()
    jpeft.attach(model, spt(), held, X)
