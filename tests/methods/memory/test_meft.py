"""MEFT: the inverse, counts, gradients beside those of autodiff, what is stored, the start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods import meft
from jpeft.methods.memory.reversible import Layers, Reversible
from jpeft.models import Bert, ViT
from jpeft.models.nn.layers import MLP, Attention
from tests.contract.anatomies import described
from tests.fixtures import BACKBONES, noisy
from tests.kept import residuals
from tests.methods.small import IMAGES, MASK, TOKENS, attached, shapes_of, t5, vit
from tests.params import fast_if


def test_one_layer_and_its_inverse_by_hand():
  layer = Layers(lambda row, x: 2 * x, lambda row, y: y / 2, {})
  x = (jnp.ones(()), jnp.full((), 3.0))
  op = Reversible([layer], x[0], (0.1, 1.0))
  np.testing.assert_allclose(op(x), (6.1, 6.05), rtol=1e-6)
  np.testing.assert_allclose(op.inverse(op.parts[0], {}, ([], []), op(x)), (1, 3), rtol=1e-5)
  swapped = Reversible([layer], x[0], (0.1, 1.0), swap=True)
  np.testing.assert_allclose(swapped(x), (6.05, 6.1), rtol=1e-6)


D, N = 6, 5


def network(depth: int, scanned: bool, key=0):
  """(rows of a stack of tanh layers, one Layers or a list of them)."""
  rng = np.random.default_rng(key)
  rows = {
    'f': jnp.asarray(rng.normal(size=(depth, D, D)) / 3),
    'g': jnp.asarray(rng.normal(size=(depth, D, D)) / 3),
    'mask': jnp.asarray(rng.integers(0, 2, (depth, D))),
  }
  f = lambda row, x: jnp.tanh(x @ row['f']) * row['mask']
  g = lambda row, x: jnp.sin(x @ row['g'])

  def layers(rows):
    if scanned:
      return [Layers(f, g, rows, depth)]
    return [Layers(f, g, jax.tree.map(lambda x: x[i], rows)) for i in range(depth)]

  return rows, layers


def by_autodiff(rows, x, scales, swap):
  (a, b), (x1, x2) = scales, x
  for i in range(len(rows['f'])):
    y1 = a * x1 + jnp.tanh(x2 @ rows['f'][i]) * rows['mask'][i]
    y2 = b * x2 + jnp.sin(y1 @ rows['g'][i])
    x1, x2 = (y2, y1) if swap else (y1, y2)
  return x1, x2


@pytest.mark.parametrize('scanned', [False, True])
@pytest.mark.parametrize(
  'depth, scales, swap, every',
  [
    (12, (1.0, 1.0), False, None),
    (12, (1.0, 1.0), True, None),
    (4, (0.1, 1.0), True, None),
    (4, (0.1, 0.1), False, None),
    (12, (0.1, 1.0), True, 4),
    (7, (0.1, 1.0), True, 3),
    (7, (1.0, 0.1), True, 1),
  ],
)
def test_gradients_are_those_of_autodiff_in_float64(depth, scales, swap, every, scanned):
  with jax.enable_x64(True):
    rows, layers = network(depth, scanned)
    rng = np.random.default_rng(1)
    x, d = ([jnp.asarray(rng.normal(size=(N, D))) for _ in range(2)] for _ in range(2))
    floats = {k: v for k, v in rows.items() if k != 'mask'}
    loss = lambda y: sum(jnp.vdot(a, b) for a, b in zip(y, d, strict=True))
    ours = lambda floats, x: loss(
      Reversible(layers(rows | floats), x[0], scales, swap, every)(tuple(x))
    )
    want = jax.grad(lambda floats, x: loss(by_autodiff(rows | floats, x, scales, swap)), (0, 1))(
      floats, x
    )
    got = jax.jit(jax.grad(ours, (0, 1)))(floats, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
    only = jax.grad(lambda f: ours({'f': f}, x))(rows['f'])
    np.testing.assert_allclose(only, want[0]['f'], rtol=1e-4, atol=1e-6)


def test_the_errors_are_those_of_the_inverse():
  rows, layers = network(6, True)
  unrolled = network(6, False)[1]
  x = (jnp.ones((N, D)), jnp.ones((N, D)))
  make = functools.partial(Reversible, like=x[0], scales=(0.1, 1.0), swap=True)
  whole, parts = make(layers(rows)).errors(x), make(unrolled(rows)).errors(x)
  # It grows from the last layer to the first.
  assert whole.shape == (6,) and np.all(np.diff(np.log(whole)) < 0.5)
  assert whole[0] > 30 * whole[-1] > 0
  assert 0.01 < whole[0] / parts[0] < 100  # of rounding
  often = make(layers(rows), every=2).errors(x)
  assert often.max() < whole[0] / 30


@pytest.mark.parametrize('variant', [1, 2])
def test_bert_base_counts_as_published(variant):
  model = Bert(width=768, depth=12, heads=12, mlp_dim=3072, vocab=100)
  tuned = shapes_of(model, meft(8, variant), jax.ShapeDtypeStruct((1, 8), jnp.int32))
  assert jpeft.count(tuned.shapes) == 313_536
  assert tuned.shapes['meft']['encoder']['down']['kernel'].shape == (12, 768, 8)


def test_both_halves_of_a_block_have_an_adapter():
  model = ViT(
    width=768,
    depth=12,
    heads=12,
    mlp_dim=3072,
    patch_size=16,
    image_size=224,
    num_classes=None,
    scan=True,
  )
  tuned = shapes_of(model, meft(8, 3), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
  assert jpeft.count(tuned.shapes) == 313_536


def layer_norm(p, x):
  x = x - x.mean(-1, keepdims=True)
  return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * p['scale'] + p['bias']


def adapter(t, x):
  return (
    jax.nn.gelu(x @ t['down']['kernel'] + t['down']['bias']) @ t['up']['kernel'] + t['up']['bias']
  )


def reference(held, theta, x, variant, scales, readout):
  """The network of the paper on the blocks of `vit`, written out; x are the embeddings."""
  t, blocks, x1, x2 = theta['meft'], held['params']['encoder'], x, x
  for i in range(3):
    p, at = blocks[f'block_{i}'], f'encoder/block_{i}'
    o = lambda x: Attention(4, 8).apply({'params': p['attention']}, layer_norm(p['norm1'], x))

    def mlp(x):
      h = layer_norm(p['norm2'], x)
      return MLP(64).apply({'params': p['mlp']}, h) + adapter(t[f'{at}/mlp'], h)

    block = lambda x: x + o(x) + mlp(x + o(x))
    if variant == 3:
      attend = lambda x: x + o(x) + adapter(t[f'{at}/attention'], o(x))
      f, g = attend, lambda x: x + mlp(x)
    else:
      alone = lambda x: adapter(jax.tree.map(lambda y: y[i], t['final_norm']), x)
      f, g = (block, alone) if variant == 1 else (alone, block)
    y1 = scales[0] * x1 + f(x2)
    y2 = scales[1] * x2 + g(y1)
    x1, x2 = (y1, y2) if variant == 3 else (y2, y1)
  x = (x1 + x2) / 2 if readout == 'mean' else x1 if variant == 2 else x2
  return (
    layer_norm(held['params']['final_norm'], x)[:, 0] @ held['params']['head']['kernel']
    + held['params']['head']['bias']
  )


def embeddings(model, held):
  keep = lambda module, _: module.name == 'embed'
  run = lambda held: model.apply(
    held, IMAGES, capture_intermediates=keep, mutable=['intermediates']
  )
  _, state = jax.jit(run)(held)
  return state['intermediates']['embed']['__call__'][0]


@pytest.mark.parametrize('variant, readout', [(1, 'mean'), (2, 'last'), (3, 'mean')])
def test_the_network_and_its_gradient_are_those_of_the_equations(variant, readout):
  model, held = vit()
  scales = (0.5, 0.7)
  tuned, theta = attached(model, held, meft(4, variant, scales, None, readout=readout), IMAGES)
  x = embeddings(model, held)
  fns = (
    lambda theta: tuned.apply(theta, held, IMAGES),
    lambda theta: reference(held, theta, x, variant, scales, readout),
  )
  run = lambda fn: jax.jit(jax.value_and_grad(lambda t: jnp.square(fn(t)).sum()))
  (ours, got), (theirs, want) = (run(fn)(theta) for fn in fns)
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * np.abs(b).max()), got, want
  )


@pytest.mark.parametrize(
  'variant, scales, scan',
  fast_if(
    lambda variant, _, scan: scan == (variant == 3),
    [
      (variant, scales, scan)
      for variant, scales in ((1, (1e-6, 1)), (2, (1, 1e-6)), (3, (1e-6, 1e-6)))
      for scan in (False, True)
    ],
  ),
)
def test_without_a_second_stream_and_adapters_it_is_the_backbone(variant, scales, scan):
  model, held = vit(scan=scan, remat=scan)
  tuned = jpeft.attach(model, meft(4, variant, scales, readout='last'), held, IMAGES)
  theta = jax.tree.map(jnp.zeros_like, jax.jit(tuned.init)(jax.random.key(0), held))
  run = jax.jit(lambda theta, held: (tuned.apply(theta, held, IMAGES), model.apply(held, IMAGES)))
  np.testing.assert_allclose(*run(theta, held), atol=1e-4)


def test_it_is_t5_too_context_and_masks_and_all():
  model, held = t5()
  tuned = jpeft.attach(
    model, meft(4, scales=(1e-6, 1), readout='last'), held, TOKENS, TOKENS, mask=MASK
  )
  theta = jax.tree.map(jnp.zeros_like, jax.jit(tuned.init)(jax.random.key(0), held))
  run = lambda run, *a: run(*a, TOKENS, TOKENS, mask=MASK)
  ours, plain = jax.jit(
    lambda theta, held: (run(tuned.apply, theta, held), run(model.apply, held))
  )(theta, held)
  np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-3)


def by_plain_autodiff(self, x):
  """Stands in for Reversible.__call__: the same programs, whose backward pass keeps everything."""
  y, _ = self.forward(self.rows, self.consts, x)
  return y


@pytest.mark.parametrize(
  'name, hp',
  fast_if(
    lambda name, hp: name == 'nnx_vit_scan',
    [
      ('linen_vit_scan', {}),
      ('linen_bert', {'every': 1}),
      ('nnx_vit_scan', {}),
      ('nnx_vit', {'reversible': 1}),
      ('linen_vit_scan', {'reversible': 1}),
    ],
  ),
)
def test_dropout_is_replayed(name, hp, monkeypatch):
  b = BACKBONES[name]
  with described(b):
    method = jpeft.chain(
      meft(4, scales=(1.0, 1.0), dropout=0.3, **hp), jpeft.lora(2, targets='{q}')
    )
    tuned = jpeft.attach(b.train_model, method, b.backbone, *b.args, **b.kwargs)
  theta = noisy(tuned.init(jax.random.key(2), b.backbone))

  def fn(theta, key):
    kwargs = {**b.kwargs, **b.train_kwargs, 'rngs': {'dropout': key}}
    return jnp.square(tuned.apply(theta, b.backbone, *b.args, **kwargs)).sum()

  ours = jax.jit(jax.value_and_grad(lambda *args: fn(*args)))
  (value, got), (other, _) = (ours(theta, jax.random.key(i)) for i in (0, 1))
  monkeypatch.setattr(Reversible, '__call__', by_plain_autodiff)
  same, want = jax.jit(jax.value_and_grad(fn))(theta, jax.random.key(0))
  np.testing.assert_allclose(value, same, rtol=1e-5)
  scale = max(np.abs(x).max() for x in jax.tree.leaves(want))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * scale), got, want)
  assert np.abs(other - value) > 1e-3 * value


B, WIDTH = 2, 32


def kept(depth: int, every: int | None, **fields) -> int:
  """How many arrays of the size of a stream the backward pass keeps."""
  model = ViT(
    width=WIDTH,
    depth=depth,
    heads=4,
    mlp_dim=64,
    patch_size=4,
    image_size=8,
    num_classes=5,
    **fields,
  )
  held = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
  tuned = jpeft.attach(model, meft(4, every=every), held, IMAGES)
  kept = residuals(tuned.apply, tuned.shapes, held, IMAGES)
  found = [x.size for x in kept if x.shape[-3:] == (B, 5, WIDTH)]
  return sum(found) // (B * 5 * WIDTH)


@pytest.mark.parametrize('fields', [{}, {'scan': True}])
def test_what_is_kept_does_not_hang_on_the_depth(fields):
  two = kept(2, None, **fields)
  assert kept(12, None, **fields) == two <= 8
  assert kept(12, 3, **fields) == two + 2 * 3


def test_the_reconstruction_error_is_told():
  model, held = vit(depth=12, scan=True)

  def error(**hp):
    tuned, theta = attached(model, held, meft(4, **hp), IMAGES)
    return jax.jit(lambda theta: jpeft.reconstruction_error(tuned, theta, held, IMAGES))(theta)[
      'final_norm'
    ]

  far, near, kept = error(every=None), error(every=None, scales=(1.0, 1.0)), error(every=2)
  assert far.shape == (12,) and far.max() > 1e6 * near.max() and near.max() < 1e-2
  assert kept.max() < 1e-3 < far.max()
  tuned, theta = attached(model, held, jpeft.lora(2), IMAGES)
  with pytest.raises(ValueError, match='none of the methods lora makes layers reversible'):
    jpeft.reconstruction_error(tuned, theta, held, IMAGES)


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: meft(variant=4), 'variant=4 is none of 1, 2, 3'),
    (lambda: meft(readout='x'), "readout='x' is none of"),
    (lambda: meft(scales=(0, 1)), 'must be two numbers other than 0'),
    (lambda: meft(every=0), 'every=0 must be'),
    (lambda: meft(reversible=4), 'reversible=4 must lie between 1 and the 3 blocks'),
    (lambda: meft(0), 'meft: bottleneck=0 must be'),
  ],
)
def test_bad_options_are_said_before_any_work(make, message):
  model, held = vit()
  with pytest.raises(ValueError, match=message):
    jpeft.attach(model, make(), held, IMAGES)


def test_halves_need_blocks_that_begin_with_norms():
  b = BACKBONES['linen_bert']
  with (
    described(b),
    pytest.raises(ValueError, match='variant 3 takes blocks apart that begin with norms'),
  ):
    jpeft.attach(b.model, meft(4, 3), b.backbone, *b.args, **b.kwargs)
