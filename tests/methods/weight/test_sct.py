"""SCT: the worked example, the choice of channels, counts, merging, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.methods.weight.sct import Scores, most_salient, sct, squares_of
from jpeft.models import ViT
from tests.fixtures import noisy
from tests.methods.golden import full_size
from tests.methods.small import IMAGES, vit

RNG = np.random.default_rng(0)
PICTURES = RNG.normal(size=(12, 8, 8, 3)).astype('float32')
LABELS = np.arange(12) % 3
VIT_B = ViT(
  width=768, depth=12, heads=12, mlp_dim=3072, patch_size=16, image_size=224, num_classes=None
)
T = {
  'channels': jnp.array([1, 3]),
  'kernel': jnp.array([[0.1, 0.2], [0, -0.5]]).T,
  'bias': jnp.array([0.0, 1]),
}


class Layer(nn.Module):
  """A block of a norm, and a layer behind it: what is added before the norm goes round it."""

  @nn.compact
  def __call__(self, x):
    h = nn.LayerNorm(use_bias=False, use_scale=False, name='norm2')(x)
    return x + nn.Dense(x.shape[-1], name='fc2')(h)


def on_layer(x, width=2, **hyperparameters):
  """(tuned, variables) of one block [.., D]."""
  model = Layer()
  variables = model.init(jax.random.key(0), x)
  method = sct(width, blocks='', stream='norm2', **hyperparameters)
  return jpeft.attach(model, jpeft.stand_in(method), variables, x), variables


def batches(size, order=None, images=PICTURES):
  order = np.arange(len(images)) if order is None else order
  return [
    (images[order[i : i + size]], LABELS[order[i : i + size]]) for i in range(0, len(images), size)
  ]


def prepared(method, model, held, size=5, **of_batches):
  return jpeft.prepare(method, model, held, batches(size, **of_batches))


# The map.


def test_the_worked_example():
  x = jnp.array([1.0, 2, 3, 4])
  tuned, variables = on_layer(x[None])
  seen = []

  def record(t, call, x):
    seen.append(x)
    return call(x)

  method = jpeft.chain(jpeft.at('norm2', jpeft.Call('seen', record)), tuned.method)
  both = jpeft.attach(tuned.model, method, variables, x[None])
  variables = jax.tree.map(jnp.zeros_like, variables)  # the layer adds nothing
  out = both.apply({'sct': {'norm2': T}}, variables, x[None])
  np.testing.assert_allclose(out[0], [1, 3, 3, 3], rtol=1e-6)
  (read,) = [x for x in seen if not isinstance(x, jax.core.Tracer)]
  np.testing.assert_array_equal(read, out)


def test_the_other_channels_pass_as_they_are_with_their_gradient():
  x = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
  tuned, variables = on_layer(x, mode='mlp', targets='fc2')
  plain = tuned.model.apply(variables, x)
  out = tuned.apply({'sct': {'fc2': T}}, variables, x)
  np.testing.assert_array_equal(out[:, [0, 2]], plain[:, [0, 2]])
  assert (out[:, [1, 3]] != plain[:, [1, 3]]).all()

  def stream(x):  # what a block does to its input before anything else
    change = x[..., T['channels']] @ T['kernel'] + T['bias']
    return x.at[..., T['channels']].add(change)

  g = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
  (dx,) = jax.vjp(stream, x)[1](g)
  np.testing.assert_array_equal(dx[:, [0, 2]], g[:, [0, 2]])
  attn, variables = on_layer(x)
  zero = jax.tree.map(jnp.zeros_like, variables)  # the block is the stream
  theta = {'sct': {'norm2': T}}
  np.testing.assert_array_equal(attn.apply(theta, zero, x), stream(x))


@pytest.mark.parametrize('mode', ['attn', 'mlp', 'qkv'])
def test_zero_is_the_identity(mode):
  model, held = vit(depth=1)
  method = jpeft.stand_in(sct(4, mode, init='zero'))
  tuned = jpeft.attach(model, method, held, IMAGES)
  theta = jax.jit(tuned.init)(jax.random.key(0), held)
  apply = jax.jit(tuned.apply)
  plain = jax.jit(model.apply)(held, IMAGES)
  np.testing.assert_allclose(apply(theta, held, IMAGES), plain, rtol=1e-6, atol=1e-6)
  assert jnp.abs(apply(noisy(theta), held, IMAGES) - plain).max() > 1e-3


@pytest.mark.parametrize('scaled', ['map', 'identity'])
@pytest.mark.parametrize('mode', ['mlp', 'attn'])
def test_scales(mode, scaled):
  x = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
  options = {'targets': 'fc2'} if mode == 'mlp' else {}
  tuned, variables = on_layer(x, mode=mode, scale=0.25, scaled=scaled, **options)
  site = 'fc2' if mode == 'mlp' else 'norm2'
  if mode == 'attn':
    variables = jax.tree.map(jnp.zeros_like, variables)
    before = x
  else:
    before = tuned.model.apply(variables, x) - x
  out = tuned.apply({'sct': {site: T}}, variables, x)
  chosen = before[:, T['channels']]
  mapped = chosen @ T['kernel'] + T['bias']
  want = 0.25 * chosen + mapped if scaled == 'identity' else chosen + 0.25 * mapped
  want = before.at[:, T['channels']].set(want)
  np.testing.assert_allclose(out, want if mode == 'attn' else x + want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('mode', ['mlp', 'qkv'])
@pytest.mark.parametrize('scan', [False, True])
def test_layers_merge(mode, scan):
  model, held = vit(scan=scan, depth=2)
  method = jpeft.stand_in(sct(4, mode, scale=0.4, scaled='identity'))
  tuned = jpeft.attach(model, method, held, IMAGES)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(0), held))

  @jax.jit
  def both(theta, held):
    return model.apply(tuned.merge(theta, held), IMAGES), tuned.apply(theta, held, IMAGES)

  np.testing.assert_allclose(*both(theta, held), atol=1e-5)


def test_the_stream_does_not_merge():
  x = jnp.ones((1, 4))
  tuned, variables = on_layer(x)
  with pytest.raises(ValueError, match='changes the computation, not the weights: it cannot be'):
    tuned.merge({'sct': {'norm2': T}}, variables)


# The choice.


def test_the_largest_scores_are_chosen_in_order():
  assert most_salient(np.array([0.2, 0.9, 0.5, 0.7]), 2).tolist() == [1, 3]
  assert most_salient(np.array([[1.0, 1, 1, 0]]), 2).tolist() == [[0, 1]]  # of equal ones the first


def test_summed_squares_are_the_stacked_formula():
  features = RNG.normal(size=(12, 5, 8)).astype('float32')  # a class token, and four others
  scores = Scores()
  for rows in np.split(RNG.permutation(12), 4):
    scores.add(np.asarray(squares_of(jnp.asarray(features[rows]), 1))[None], LABELS[rows])
  stacked = [features[LABELS == c][:, 1:].reshape(-1, 8) for c in range(3)]
  want = np.mean([np.linalg.norm(a, axis=0) for a in stacked], 0)
  np.testing.assert_allclose(scores.of_channels()[0], want, rtol=1e-6)


@pytest.mark.parametrize('mode', ['attn', 'mlp', 'qkv'])
def test_what_is_scored(mode):
  """Features of an untouched forward pass, by the model's own intermediates."""
  model, held = vit()
  found = jpeft.found_in(prepared(sct(4, mode), model, held))
  path = 'encoder/block_1'
  seen = {}

  def record(name, t, call, x, *args, **kwargs):
    out = call(x, *args, **kwargs)
    seen[name] = {'norm2': x, 'block': out, 'query': out, 'value': out}[name]
    return out

  def rule(name):
    return jpeft.Call(f'of {name}', lambda *args, **kwargs: record(name, *args, **kwargs))

  places = {
    'norm2': f'{path}/norm2',
    'block': path,
    'query': f'{path}/attention/query',
    'value': f'{path}/attention/value',
  }
  method = jpeft.chain(*(jpeft.at(place, rule(name)) for name, place in places.items()))
  jpeft.attach(model, method, held, PICTURES).apply({}, held, PICTURES)
  of_mode = {'attn': ['norm2'], 'mlp': ['block'], 'qkv': ['query', 'value']}[mode]
  targets = {'attn': f'{path}/norm2', 'mlp': f'{path}/mlp/fc2'}
  for name in of_mode:
    x = np.asarray(seen[name]).reshape(12, 5, 32)[:, 1:]
    norms = [np.linalg.norm(x[LABELS == c].reshape(-1, 32), axis=0) for c in range(3)]
    want = np.sort(np.argsort(-np.mean(norms, 0))[:4])
    assert found[f'sct/{targets.get(mode, places[name])}'].tolist() == [want.tolist()]


def test_neither_order_nor_batches_nor_scale_matter():
  model, held = vit()
  one = jpeft.found_in(prepared(sct(4), model, held))
  other = jpeft.found_in(prepared(sct(4), model, held, size=12, order=RNG.permutation(12)))
  assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
  values = RNG.normal(size=(1, 12, 32))
  plain, scaled = Scores(), Scores()
  plain.add(values**2, LABELS)
  scaled.add((7 * values) ** 2, LABELS)
  chosen = [most_salient(scores.of_channels(), 9) for scores in (plain, scaled)]
  np.testing.assert_array_equal(*chosen)


@pytest.mark.parametrize('mode', ['attn', 'mlp'])
def test_a_stack_is_served_as_its_layers_are(mode):
  model, held = vit()
  scanned = model.clone(scan=True)
  layers = [held['params']['encoder'][f'block_{i}'] for i in range(3)]
  rest = {k: v for k, v in held['params']['encoder'].items() if not k.startswith('block_')}
  stack = jax.tree.map(lambda *x: jnp.stack(x), *layers)
  stacked = {'params': {**held['params'], 'encoder': {**rest, 'blocks': stack}}}
  for layers in (None, '1:'):
    method = sct(4, mode)
    if layers is not None:
      method = jpeft.in_layers(method, layers)
    each = jpeft.found_in(prepared(method, model, held))
    (whole,) = jpeft.found_in(prepared(method, scanned, stacked)).values()
    np.testing.assert_array_equal(np.concatenate(list(each.values())), whole)
    tuned = jpeft.attach(scanned, prepared(method, scanned, stacked), stacked, IMAGES)
    (t,) = jax.jit(tuned.init)(jax.random.key(0), stacked)['sct'].values()
    np.testing.assert_array_equal(t['channels'], whole)


def test_counts_of_the_paper():
  x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  model, shapes = full_size.of(VIT_B, x)
  tuned = jpeft.attach(model, jpeft.stand_in(sct()), *shapes)
  assert jpeft.summary(tuned).trainable == 111_744
  both = jpeft.attach(model, jpeft.stand_in(sct(mode='qkv')), *shapes)
  assert jpeft.summary(both).trainable == 2 * 111_744
  assert len(tuned.shapes['sct']) == 12
  for t in tuned.shapes['sct'].values():
    assert t['channels'].shape == (96,) and t['channels'].dtype == jnp.int32
  chosen = most_salient(RNG.random((12, 768)), 96)
  assert chosen.shape == (12, 96) and (np.diff(chosen) > 0).all()  # unique and sorted


# What is refused.


def test_what_is_refused():
  model, held = vit()
  with pytest.raises(ValueError, match='channels=96 is more than the 32 channels'):
    prepared(sct(), model, held)
  with pytest.raises(ValueError, match='needs the number of a class for each example'):
    jpeft.prepare(sct(4), model, held, [(PICTURES, np.ones((12, 2)))])
  with pytest.raises(ValueError, match="targets='fc2' is of mode='mlp'"):
    sct(4, targets='fc2')
  with pytest.raises(ValueError, match='has not been made'):
    jpeft.attach(model, sct(4), held, IMAGES)

  class Plain(nnx.Module):
    def __init__(self):
      self.fc2 = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
      return self.fc2(x)

  plain = Plain()
  with pytest.raises(ValueError, match="needs a layer with one kernel and a bias .*mode='attn'"):
    jpeft.attach(
      plain,
      jpeft.stand_in(sct(2, 'mlp', targets='fc2')),
      nnx.state(plain),
      jnp.ones((1, 4)),
    )
