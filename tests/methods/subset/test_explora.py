"""ExPLoRA: counts of the paper, what moves and what does not, merging, and the method after it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft.methods.subset.explora import explora
from tests.contract.anatomies import described
from tests.fixtures import BACKBONES, leaf_paths, noisy
from tests.methods.golden import full_size
from tests.methods.small import IMAGES, vit

LAYOUTS = pytest.mark.parametrize(
  'layout',
  [
    pytest.param('unrolled', marks=pytest.mark.slow),
    'scanned',
    pytest.param('remat', marks=pytest.mark.slow),
  ],
)
FIELDS = {'unrolled': {}, 'scanned': {'scan': True}, 'remat': {'scan': True, 'remat': True}}
STEPS = 10


class Trained:
  """ExPLoRA of the last of three blocks, after ten updates with weight decay."""

  def __init__(self, layout: str):
    self.model, self.variables = vit(**FIELDS[layout])
    self.tuned = jpeft.attach(self.model, explora(layers=-1, rank=4), self.variables, IMAGES)
    self.apply = jax.jit(self.tuned.apply)
    self.plain = jax.jit(self.model.apply)
    self.first = jax.jit(self.tuned.init)(jax.random.key(0), self.variables)
    tx = optax.adamw(1e-2, weight_decay=0.1)

    @jax.jit
    def update(theta, state):
      grads = jax.grad(lambda t: jnp.sin(self.tuned.apply(t, self.variables, IMAGES)).sum())(theta)
      updates, state = tx.update(grads, state, theta)
      return optax.apply_updates(theta, updates), state

    self.theta, self.state = self.first, tx.init(self.first)
    for _ in range(STEPS):
      self.theta, self.state = update(self.theta, self.state)
    self.merged = jax.jit(self.tuned.merge)(self.theta, self.variables)


trained = functools.cache(Trained)


def layers_of(variables):
  """{path with the number of its layer: array} of a ViT, scanned or not."""
  found = {}
  for path, x in leaf_paths(variables).items():
    if '/blocks/' not in path:
      found[path] = np.asarray(x)
      continue
    for i, layer in enumerate(np.asarray(x)):
      found[path.replace('/blocks/', f'/block_{i}/')] = layer
  return found


@functools.cache
def vit_large(**fields):
  shapes = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  model = jpeft.models.ViT(
    width=1024, depth=24, heads=16, mlp_dim=4096, patch_size=16, num_classes=None, **fields
  )
  return full_size.of(model, shapes)


def count(method, **fields):
  model, shapes = vit_large(**fields)
  return jpeft.count(jpeft.attach(model, method, *shapes).shapes)


@LAYOUTS
def test_step_0_is_the_checkpoint(layout):
  t = trained(layout)
  np.testing.assert_array_equal(t.apply(t.first, t.variables, IMAGES), t.plain(t.variables, IMAGES))


def test_counts_of_vit_large():
  assert count(explora(layers=-1, rank=64), scan=True) == 18_721_792
  assert count(jpeft.lora(rank=8), scan=True) == 786_432  # of stage 2
  whole = 12 * 1024**2 + 13 * 1024
  assert count(explora(layers=-1, rank=0, norms=False), scan=True) == whole == 12_596_224


@pytest.mark.slow
def test_counts_of_vit_large_unrolled():
  assert count(explora(layers=-1, rank=64)) == 18_721_792
  assert count(jpeft.lora(rank=8)) == 786_432


@LAYOUTS
def test_what_changes_in_ten_steps(layout):
  t = trained(layout)
  before, after = layers_of(t.variables), layers_of(t.merged)
  for path, x in after.items():
    change = x - before[path]
    in_last = '/block_2/' in path
    is_norm = 'norm' in path
    is_product = path.endswith(('query/kernel', 'value/kernel'))
    assert np.any(change) == (in_last or is_norm or is_product), path
    if is_product and not in_last:
      matrix = change.reshape(32, -1)
      assert np.linalg.matrix_rank(matrix, tol=1e-4 * np.linalg.norm(matrix)) <= 4, path


@LAYOUTS
def test_the_optimizer_has_what_is_trained(layout):
  t = trained(layout)
  kernels = [x for path, x in leaf_paths(t.theta).items() if path.endswith('fc1/kernel')]
  assert [x.size for x in kernels] == [32 * 64]  # of one block of three
  assert jpeft.count(t.state[0].mu) == jpeft.count(t.theta)
  assert jpeft.summary(t.tuned).trainable == jpeft.count(t.theta)


def unrolled(params):
  """The params of a ViT whose blocks are scanned, as those of one whose blocks are not."""
  encoder = dict(params['encoder'])
  stack = encoder.pop('blocks')
  for i in range(3):
    encoder[f'block_{i}'] = jax.tree.map(lambda x, i=i: x[i], stack)
  return {**params, 'encoder': encoder}


def test_scanned_and_unrolled_have_the_same_gradients():
  scanned, variables = vit(scan=True)
  found = []
  for model, held in ((scanned, variables), (vit()[0], {'params': unrolled(variables['params'])})):
    tuned = jpeft.attach(model, explora(layers=(0, -1), rank=4), held, IMAGES)
    theta = jax.jit(tuned.init)(jax.random.key(0), held)
    for entry in theta['explora_lora'].values():  # what is drawn, alike in both
      entry['kernel']['a'] = jnp.ones_like(entry['kernel']['a']) / 8

    @jax.jit
    def stepped(theta, held, tuned=tuned):
      grads = jax.grad(lambda t: jnp.sin(tuned.apply(t, held, IMAGES)).sum())(theta)
      return tuned.merge(jax.tree.map(lambda x, g: x - 0.1 * g, theta, grads), held)

    found.append(layers_of(stepped(theta, held)))
  one, other = found
  assert one.keys() == other.keys()
  for path, x in one.items():
    np.testing.assert_allclose(x, other[path], atol=1e-5, err_msg=path)


@LAYOUTS
def test_merge_gives_the_same_function(layout):
  t = trained(layout)
  merged = t.plain(t.merged, IMAGES)
  apart = np.abs(merged - t.apply(t.theta, t.variables, IMAGES)).max()
  assert apart <= 1e-4 * np.abs(merged).max()


@pytest.mark.slow
def test_merge_gives_the_same_function_at_full_size():
  """On a ViT-L in float32, whose theta is off its start."""
  model, _ = vit_large(scan=True)
  images = jax.random.normal(jax.random.key(1), (1, 224, 224, 3))
  variables = jax.jit(model.init)(jax.random.key(0), images)
  tuned = jpeft.attach(model, explora(), variables, images)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(2), variables), 0.01)
  with jax.default_matmul_precision('highest'):
    merged = jax.jit(model.apply)(jax.jit(tuned.merge)(theta, variables), images)
    out = jax.jit(tuned.apply)(theta, variables, images)
    plain = jax.jit(model.apply)(variables, images)
  assert np.abs(out - plain).max() > 1e-2
  assert np.abs(merged - out).max() <= 1e-4 * np.abs(merged).max()


@LAYOUTS
def test_the_second_stage_begins_as_the_merged_first(layout):
  t = trained(layout)
  second = jpeft.attach(t.model, jpeft.lora(rank=2), t.merged, IMAGES)
  fresh = jax.jit(second.init)(jax.random.key(3), t.merged)
  assert set(fresh) == {'lora'}
  assert all(entry['kernel']['a'].shape[-1] == 2 for entry in fresh['lora'].values())
  out = jax.jit(second.apply)(fresh, t.merged, IMAGES)
  np.testing.assert_array_equal(out, t.plain(t.merged, IMAGES))
  assert np.any(out != t.plain(t.variables, IMAGES))


def shapes_of(method, layout='scanned'):
  model, variables = vit(**FIELDS[layout])
  return jpeft.attach(model, method, variables, IMAGES)


def test_all_blocks_without_products_are_full_training_of_the_blocks():
  tuned = shapes_of(explora(layers=':', rank=0))
  rest = jpeft.tune('{final_norm}', name='explora_norm')
  blocks = shapes_of(jpeft.chain(jpeft.tune('{block}(?:/.*)?', name='explora'), rest))
  assert tuned.shapes == blocks.shapes
  assert [site.chosen for _, site in tuned.rules] == [None] * len(tuned.rules)
  full = shapes_of(jpeft.full()).shapes['full']
  assert all(tuned.shapes['explora'][path] == full[path] for path in tuned.shapes['explora'])
  outside = full.keys() - tuned.shapes['explora'].keys() - tuned.shapes['explora_norm'].keys()
  assert outside == {'embed', 'embed/patch', 'head'}


def test_no_block_and_no_norm_are_lora():
  model, variables = vit(scan=True)
  tuned = shapes_of(explora(layers=None, rank=4, alpha=8, norms=False))
  lora = shapes_of(jpeft.lora(rank=4, alpha=8, name='explora_lora'))
  assert tuned.shapes == lora.shapes
  theta = noisy(jax.jit(tuned.init)(jax.random.key(0), variables), 0.1)
  one, other = (jax.jit(t.apply)(theta, variables, IMAGES) for t in (tuned, lora))
  np.testing.assert_array_equal(one, other)


NAMES = ('linen_vit', 'linen_vit_scan', 'nnx_vit', 'nnx_vit_scan', 'linen_bert', 'nnx_llama')
QUICK = ('linen_vit_scan', 'nnx_vit')


@pytest.mark.parametrize(
  'name', [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in NAMES]
)
def test_blocks_by_number_in_every_naming(name):
  b = BACKBONES[name]
  with described(b):
    tuned = jpeft.attach(b.model, explora(layers=-1, rank=2), b.backbone, *b.args, **b.kwargs)
  numbers = {}
  for rule, site in tuned.rules:
    chosen = range(len(site.numbers)) if site.chosen is None else site.chosen
    numbers.setdefault(rule.name, set()).update(site.numbers[i] for i in chosen)
  last = b.depth - 1
  others = set(range(last))
  assert numbers == {'explora': {last}, 'explora_lora': others, 'explora_norm': others}
  whole = {site.path for rule, site in tuned.rules if rule.name == 'explora'}
  norms = {site.path for site in tuned.sites.find('{norm}') if last in site.numbers}
  assert norms and norms <= whole


def test_what_is_refused():
  with pytest.raises(ValueError, match='leave nothing to train'):
    explora(layers=None, rank=0, norms=False)
  with pytest.raises(ValueError, match='rank=-1 must be a whole number'):
    explora(rank=-1)
  with pytest.raises(ValueError, match='layers=3 is not among the 3 layers'):
    shapes_of(explora(layers=3))
  with pytest.raises(ValueError, match="explora_lora: none of the .* is in the layers '!:'"):
    shapes_of(explora(layers=':'))
