"""Visual prompt tuning: the sequence in and around blocks, what goes with it, starts, counts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core import Call, at, chain
from jpeft.methods.prompt.vpt import vpt_deep, vpt_shallow
from jpeft.models import Bert, ViT
from tests.contract.anatomies import described
from tests.fixtures import BACKBONES, noisy, plain
from tests.methods.golden import full_size

IMAGES = jax.random.normal(jax.random.key(0), (2, 12, 12, 3))
TOKENS = jax.random.randint(jax.random.key(1), (2, 7), 0, 20)
METHODS = {'deep': vpt_deep, 'shallow': vpt_shallow}
both = pytest.mark.parametrize('method', METHODS.values(), ids=METHODS)


@functools.cache
def vit(**fields):
  model = ViT(
    **{
      'width': 8,
      'depth': 2,
      'heads': 2,
      'mlp_dim': 16,
      'patch_size': 4,
      'image_size': 12,
      'num_classes': 5,
      **fields,
    }
  )
  return model, noisy(jax.jit(model.init)(jax.random.key(0), IMAGES), 0.3)


def attach(model, method, variables, *args, **kwargs):
  """(tuned, theta off its start)."""
  tuned = jpeft.attach(model, method, variables, *args, **kwargs)
  return tuned, noisy(jax.jit(tuned.init)(jax.random.key(0), variables), 0.5)


def inside(change) -> jpeft.Method:
  """A rule within those of the other methods: change(site path, the block's call, arguments)."""
  return at(
    '{block}', Call('inside', lambda t, call, *args, **kw: change(call.site.path, call, args, kw))
  )


@both
def test_prompts_are_inside_of_every_block_and_nowhere_else(method):
  model, variables = vit(pool='tokens', num_classes=None)
  lengths = {}

  def see(path, call, args, kw):
    lengths[path] = args[0].shape[1]
    return call(*args, **kw)

  tuned, theta = attach(model, chain(inside(see), method(4)), variables, IMAGES)
  lengths.clear()
  assert jax.eval_shape(tuned.apply, theta, variables, IMAGES).shape == (2, 10, 8)
  assert lengths == {f'encoder/block_{i}': 1 + 4 + 9 for i in range(2)}


@both
def test_prompts_are_between_the_class_token_and_the_patches(method):
  model, variables = vit(depth=1)
  seen = []
  see = lambda path, call, args, kw: seen.append(args[0]) or call(*args, **kw)
  tuned, theta = attach(model, chain(inside(see), method(4)), variables, IMAGES)
  seen.clear()
  tuned.apply(theta, variables, IMAGES)
  (prompts,) = jax.tree.leaves(theta)
  bare = jpeft.attach(model, inside(see), variables, IMAGES)
  bare.apply({}, variables, IMAGES)
  (z, *_, x) = seen
  np.testing.assert_array_equal(z[:, 1:5], np.broadcast_to(prompts, (2, 4, 8)))
  np.testing.assert_array_equal(np.delete(z, range(1, 5), 1), x)


@both
def test_only_shallow_prompts_travel(method):
  model, variables = vit()

  def shake(path, call, args, kw):
    y = call(*args, **kw)
    return y.at[:, 1:5].add(7.0) if path != 'encoder/block_1' else y

  tuned, theta = attach(model, method(4), variables, IMAGES)
  shaken = jpeft.attach(model, chain(inside(shake), method(4)), variables, IMAGES)
  one, other = (jax.jit(t.apply)(theta, variables, IMAGES) for t in (tuned, shaken))
  assert (np.abs(one - other).max() == 0) == (method is vpt_deep)
  assert np.abs(one - jax.jit(model.apply)(variables, IMAGES)).max() > 1e-3


@both
def test_no_prompts_are_the_backbone_and_their_order_is_nothing(method):
  model, variables = vit()
  tuned, theta = attach(model, method(0), variables, IMAGES)
  np.testing.assert_array_equal(
    jax.jit(tuned.apply)(theta, variables, IMAGES), jax.jit(model.apply)(variables, IMAGES)
  )
  tuned, theta = attach(model, method(4), variables, IMAGES)
  turned = jax.tree.map(lambda p: p[jnp.array([2, 0, 3, 1])], theta)
  run = jax.jit(tuned.apply)
  one, other = (run(t, variables, IMAGES) for t in (theta, turned))
  np.testing.assert_allclose(one, other, atol=1e-5)


@both
def test_every_prompt_has_a_gradient_and_training_without_dropout_is_evaluation(method):
  model, variables = vit()
  tuned, theta = attach(model, method(4), variables, IMAGES)
  run = lambda theta, **kw: tuned.apply(theta, variables, IMAGES, **kw)
  grads = jax.jit(jax.grad(lambda theta: jnp.sum(jnp.square(run(theta)))))(theta)
  assert all((np.abs(g).max(-1) > 1e-5).all() for g in jax.tree.leaves(grads))
  train = jax.jit(lambda key: run(theta, deterministic=False, rngs={'dropout': key}))
  np.testing.assert_array_equal(train(jax.random.key(0)), train(jax.random.key(1)))


@both
def test_dropout_falls_on_the_prompts_in_training_only(method):
  model, variables = vit(depth=1)
  seen = []
  see = lambda path, call, args, kw: seen.append(args[0][:, 1:-9]) or call(*args, **kw)
  tuned, _ = attach(model, chain(inside(see), method(500, dropout=0.25)), variables, IMAGES)
  theta = jax.tree.map(jnp.ones_like, tuned.shapes, is_leaf=lambda x: hasattr(x, 'shape'))
  seen.clear()
  tuned.apply(theta, variables, IMAGES)
  tuned.apply(theta, variables, IMAGES, deterministic=False, rngs={'dropout': jax.random.key(0)})
  assert (seen[0] == 1).all()
  assert set(np.unique(seen[1]).tolist()) == {0, np.float32(1 / 0.75)}
  assert abs((seen[1] == 0).mean() - 0.25) < 0.02
  assert (seen[1][0] != seen[1][1]).any()


@both
def test_a_scanned_and_rematerialised_stack_is_an_unrolled_one(method):
  model, variables = vit()
  tuned, theta = attach(model, method(4), variables, IMAGES)
  held = variables['params']['encoder']
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *[held[f'block_{i}'] for i in range(2)])
  params = {**variables['params'], 'encoder': {'blocks': stacked}}
  scanned = jpeft.attach(model.clone(scan=True, remat=True), method(4), {'params': params}, IMAGES)
  if method is vpt_deep:
    prompts = [t['prompts'] for t in theta['vpt_deep'].values()]
    other = {'vpt_deep': {'encoder/blocks': {'prompts': jnp.stack(prompts)}}}
  else:
    other = theta
  np.testing.assert_allclose(
    jax.jit(scanned.apply)(other, {'params': params}, IMAGES),
    jax.jit(tuned.apply)(theta, variables, IMAGES),
    atol=1e-5,
  )


@both
def test_a_mean_is_over_the_models_own_tokens(method):
  (tokens, variables), (mean, _) = (
    vit(pool='tokens', num_classes=None),
    vit(pool='mean', num_classes=None),
  )
  tuned, theta = attach(tokens, method(4), variables, IMAGES)
  pooled = jpeft.attach(mean, method(4), variables, IMAGES)
  want = jax.jit(tuned.apply)(theta, variables, IMAGES)[:, 1:].mean(1)
  np.testing.assert_allclose(jax.jit(pooled.apply)(theta, variables, IMAGES), want, atol=1e-6)


@pytest.mark.parametrize('scan', [False, True], ids=['unrolled', 'scanned'])
@both
def test_padding_stays_hidden(method, scan):
  model = Bert(8, 2, 2, 16, vocab=20, num_classes=3, scan=scan)
  variables = noisy(jax.jit(model.init)(jax.random.key(0), TOKENS), 0.3)
  mask = jnp.array([[1] * 7, [1] * 4 + [0] * 3])
  tuned, theta = attach(model, method(4), variables, TOKENS, mask=mask)
  run = jax.jit(lambda tokens: tuned.apply(theta, variables, tokens, mask=mask))
  y = run(TOKENS)
  np.testing.assert_allclose(run(TOKENS.at[1, 4:].set(0))[1], y[1], atol=1e-6)
  assert np.abs(run(TOKENS.at[1, 3].add(1))[1] - y[1]).max() > 1e-3
  bare = jax.jit(lambda variables: model.apply(variables, TOKENS, mask=mask))(variables)
  assert np.abs(y - bare).max() > 1e-3


@pytest.mark.parametrize(
  'name, method', [('linen_gemma', vpt_deep), ('nnx_llama', vpt_deep), ('nnx_llama', vpt_shallow)]
)
def test_decoders_see_prompts_and_no_later_token(name, method):
  b = BACKBONES[name]
  tuned, theta = attach(b.model, method(4), b.backbone, *b.args)
  run = jax.jit(lambda tokens: tuned.apply(theta, b.backbone, tokens))
  y, later = run(*b.args), run(b.args[0].at[:, 6].add(1))
  np.testing.assert_allclose(later[:, :6], y[:, :6], atol=1e-5)
  assert np.abs(later[:, 6:] - y[:, 6:]).max() > 1e-2


class Block(nn.Module):
  """Hands over what it is called with."""

  see: object

  @nn.compact
  def __call__(self, x, **given):
    self.see((x, given))
    return x + nn.Dense(4, name='fc')(x)


class Model(nn.Module):
  see: object

  @nn.compact
  def __call__(self, x, **given):
    return Block(self.see, name='block_0')(x, **given)


def inside_of_block(x, **given):
  """(x, further arguments) as a block gets them behind two prompts, `lead` being 0."""
  seen = []
  model = Model(seen.append)
  variables = jax.jit(model.init)(jax.random.key(0), x, **given)
  jpeft.register_anatomy(jpeft.Anatomy('bare', {'block': 'block_0'}))
  try:
    tuned, theta = attach(model, vpt_deep(2), variables, x, **given)
  finally:
    del jpeft.ANATOMIES['bare']
  tuned.apply(theta, variables, x, **given)
  return seen[-1]


def test_what_goes_with_the_tokens_follows_them():
  triangle = jnp.tril(jnp.ones((3, 3), bool))
  given = {
    'mask': jnp.broadcast_to(triangle, (2, 1, 3, 3)),
    'table': triangle,
    'keys': jnp.array([[1, 1, 1], [1, 1, 0]]),
    'bias': jnp.arange(9.0).reshape(1, 1, 3, 3),
    'queries': jnp.array([True, False, True])[:, None],
    'positions': jnp.arange(3)[None],
    'context': jnp.ones((2, 3, 4)),
    'scale': jnp.ones(()),
  }
  x, wide = inside_of_block(jnp.ones((2, 3, 4)), **given)
  assert x.shape == (2, 5, 4)
  seen = np.array([[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1] * 5], bool)
  np.testing.assert_array_equal(wide['mask'], np.broadcast_to(seen, (2, 1, 5, 5)))
  np.testing.assert_array_equal(wide['table'], seen)
  np.testing.assert_array_equal(wide['keys'], [[1] * 5, [1] * 4 + [0]])
  np.testing.assert_array_equal(
    wide['bias'][0, 0], [[0, 0, 0, 1, 2]] * 3 + [[0, 0, 3, 4, 5], [0, 0, 6, 7, 8]]
  )
  np.testing.assert_array_equal(wide['queries'][:, 0], [True, True, True, False, True])
  np.testing.assert_array_equal(wide['positions'], [range(5)])
  for name in ('context', 'scale'):
    np.testing.assert_array_equal(wide[name], given[name])


@pytest.mark.parametrize('shape', [(2, 3, 4), (3, 4)])
def test_what_is_unknown_of_prompts_is_refused(shape):
  with pytest.raises(ValueError, match=r"turns .* of 'block_0' goes with its 3 tokens"):
    inside_of_block(jnp.ones((2, 3, 4)), turns=jnp.ones(shape))


def test_the_worked_example():
  class Mean(nn.Module):
    """Attention whose scores are all zero for a query of zero."""

    @nn.compact
    def __call__(self, x):
      q = k = v = x[:, :, None]
      return nn.dot_product_attention(q, k, v)[:, :, 0]

  x = jnp.array([[[0.0], [1.0]]])
  model = nn.Sequential([Mean()])
  assert model.apply({'params': {}}, x)[0, 0, 0] == 0.5
  tuned = jpeft.attach(model, vpt_deep(1, blocks='layers_0'), {'params': {}}, x)
  theta = {'vpt_deep': {'layers_0': {'prompts': jnp.array([[2.0]])}}}
  # No anatomy, no special tokens: the prompt stands first and is gone again behind the block.
  np.testing.assert_allclose(tuned.apply(theta, {'params': {}}, x)[0, 0, 0], 1)


@pytest.mark.parametrize(
  'method, count', [(vpt_deep(50), 460_800), (vpt_deep(5), 46_080), (vpt_shallow(5), 3_840)]
)
def test_counts_and_start_on_vit_b16(method, count):
  config = {
    'model_type': 'vit',
    'hidden_size': 768,
    'num_hidden_layers': 12,
    'num_attention_heads': 12,
    'intermediate_size': 3072,
    'patch_size': 16,
    'image_size': 32,
  }
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  model, shapes = full_size.of(jpeft.models.from_config(config, num_classes=10), images)
  tuned = jpeft.attach(model, method, *shapes)
  assert jpeft.count(tuned.shapes) == count
  theta = jax.jit(lambda key: tuned.init(key, shapes[0]))(jax.random.key(0))
  values = np.concatenate([x.ravel() for x in jax.tree.leaves(theta)])
  assert np.abs(values).max() <= 0.0625
  if count > 10_000:
    np.testing.assert_allclose(values.var(), 0.0625**2 / 3, rtol=0.03)


def test_start_of_a_model_without_patches():
  model = Bert(8, 2, 2, 16, vocab=20)
  shapes = full_size.of(model, jax.ShapeDtypeStruct((1, 4), jnp.int32)).shapes
  values = jpeft.attach(model, vpt_deep(500), *shapes).init(jax.random.key(0), shapes[0])
  np.testing.assert_allclose(
    max(np.abs(x).max() for x in jax.tree.leaves(values)), (6 / 16) ** 0.5, rtol=0.01
  )


def test_a_stack_through_modules_before_and_after_it():
  b = BACKBONES['nnx_vit_scan']
  with described(b):
    tuned, theta = attach(b.model, vpt_shallow(4, stack='dropout|blocks|norm'), b.backbone, *b.args)
  assert list(theta['vpt_shallow']) == ['dropout']
  scanned = BACKBONES['linen_vit_scan']  # its family says so
  linen, other = attach(
    scanned.model, vpt_shallow(4), scanned.backbone, *scanned.args, **scanned.kwargs
  )
  assert list(other['vpt_shallow']) == ['Transformer/posembed_input']
  for row, t, held in ((b, tuned, theta), (scanned, linen, other)):
    y = jax.jit(lambda held, t=t, row=row: t.apply(held, row.backbone, *row.args, **row.kwargs))(
      held
    )
    assert y.shape == (2, 10)
    assert np.abs(y - plain(row)).max() > 1e-3


def test_a_sequence_cannot_grow_inside_a_scan():
  b = BACKBONES['linen_gemma']
  with pytest.raises(
    ValueError, match="inside the scanned stack 'layers'; name the modules before and after"
  ):
    jpeft.attach(b.model, vpt_shallow(4), b.backbone, *b.args)


def test_blocks_without_tokens_are_refused():
  b = BACKBONES['linen_cnn']
  with pytest.raises(
    ValueError, match=r"need tokens \[B, N, D\], and ConvBlock at 'block_0' has \(2, 8, 8, 16\)"
  ):
    jpeft.attach(b.model, vpt_deep(4, blocks=b.roles['block']), b.backbone, *b.args, **b.kwargs)


@pytest.mark.parametrize(
  'hp, message',
  [
    ({'tokens': -1}, 'tokens=-1 must be a whole number'),
    ({'tokens': 0.5}, 'tokens=0.5'),
    ({'dropout': 1.5}, r'dropout=1.5 must lie in \[0, 1\]'),
  ],
)
@both
def test_bad_hyperparameters(method, hp, message):
  with pytest.raises(ValueError, match=message):
    method(**hp)
