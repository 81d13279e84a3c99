"""Roles that are a part of a module: an array of several, or a slice of a fused kernel.

A model with fused kernels under a rule at some parts is the same function as the model with a layer
for each part, under the rule at those layers.
"""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import Part
from tests.contract.anatomies import described
from tests.core.small import adapter, low_rank, square, train
from tests.fixtures import BACKBONES, leaf_paths, noisy

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)
SIZES = (8, 4, 4)  # of queries, keys and values


def grouped(first, last):
  """A part of a flat axis of unlike sizes, by the width of the module's input."""
  return lambda site, size: slice(*(n * site.input.shape[-1] // 8 for n in (first, last)))


# {how a kernel is fused: (its layer, its output -> q, k, v, the parts)}.
FUSED = {
  'thirds': (
    functools.partial(nn.Dense, 12),
    lambda y: jnp.split(y, 3, -1),
    [Part('.*qkv', take=(i, 3)) for i in range(3)],
  ),
  'axes': (
    functools.partial(nn.DenseGeneral, (3, 2, 2)),
    lambda y: y.reshape(len(y), 3, 4).swapaxes(0, 1),
    [Part('.*qkv', take=(i, 3)) for i in range(3)],
  ),
  'inner axis': (
    functools.partial(nn.DenseGeneral, (2, 3, 2)),
    lambda y: jnp.moveaxis(y, 2, 0).reshape(3, len(y), 4),
    [Part('.*qkv', take=(i, 3), axis=1) for i in range(3)],
  ),
  'every third': (
    functools.partial(nn.Dense, 12),
    lambda y: [y[:, i::3] for i in range(3)],
    [Part('.*qkv', take=lambda site, size, i=i: slice(i, size, 3)) for i in range(3)],
  ),
  'a list': (
    functools.partial(nn.Dense, 12),
    lambda y: [y[:, np.array(rows)] for rows in ([0, 5, 1, 7], [2, 3, 4, 6], [8, 11, 10, 9])],
    [
      Part('.*qkv', take=lambda site, size, rows=rows: np.array(rows))
      for rows in ([0, 5, 1, 7], [2, 3, 4, 6], [8, 11, 10, 9])
    ],
  ),
  'grouped': (
    functools.partial(nn.Dense, 16),
    lambda y: jnp.split(y, (8, 12), -1),
    [Part('.*qkv', take=grouped(*ends)) for ends in ((0, 8), (8, 12), (12, 16))],
  ),
}


class Block(nn.Module):
  """x [B, 8] -> [B, 8] of q, k and v, from a fused layer or, without a form, from three."""

  form: str | None
  scanned: bool = False
  sizes: tuple = (4, 4, 4)

  @nn.compact
  def __call__(self, x):
    if self.form is None:
      q, k, v = (nn.Dense(n, name=name)(x) for n, name in zip(self.sizes, 'qkv', strict=True))
    else:
      layer, split, _ = FUSED[self.form]
      q, k, v = split(layer(name='qkv')(x))
    k, v = (jnp.tile(y, q.shape[-1] // y.shape[-1]) for y in (k, v))
    x = x + nn.Dense(8, name='o')(jnp.tanh(q * k) + v)
    return (x, None) if self.scanned else x


class Model(nn.Module):
  form: str | None
  scan: bool = False
  sizes: tuple = (4, 4, 4)

  @nn.compact
  def __call__(self, x):
    if self.scan:
      axes = {'variable_axes': {'params': 0}, 'split_rngs': {'params': True}}
      stack = nn.scan(Block, **axes, length=3)
      x, _ = stack(self.form, True, self.sizes, name='blocks')(x)
    else:
      for i in range(3):
        x = Block(self.form, False, self.sizes, name=f'block_{i}')(x)
    return nn.Dense(3, name='head')(x)


BLOCK = r'blocks?(?:_\d)?'


@contextlib.contextmanager
def scheme(**roles):
  jpeft.register_anatomy(jpeft.Anatomy('parts', {'block': BLOCK, 'head': 'head', **roles}))
  try:
    yield
  finally:
    del jpeft.ANATOMIES['parts']


def parts_of(form):
  return scheme(**dict(zip('qkv', FUSED[form][2], strict=True)))


def layers_of_own(theta):
  """theta of the model with a layer for each part."""
  own = {path.replace('qkv:', ''): t for path, t in theta.items()}
  return {path: t for path, t in own.items()}


def taken_apart(held, split):
  """The weights of the model with a layer for each part, of those with fused kernels."""
  flat = {}
  for path, x in leaf_paths(held['params']).items():
    if 'qkv' not in path:
      flat[path] = x
      continue
    # Rows of outputs: the axes of a stack and of the input come first.
    before = ('blocks' in path) + ('kernel' in path)
    rows = x.reshape(-1, *x.shape[before:])
    for name, part in zip('qkv', split(rows), strict=True):
      flat[path.replace('qkv', name)] = part.reshape(*x.shape[:before], -1)
  params = {}
  for path, x in flat.items():
    *parents, name = path.split('/')
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = x
  return {'params': params}


def chained(at):
  """Rules through the product and through the weights, by turns, on parts that overlap."""
  return jpeft.chain(
    low_rank(at('qv'), 'one'),
    square(at('kv')),
    train(at('k'), 'two', ['kernel']),
    low_rank(at('q'), 'three', dot=False),
    square(at('v'), 'four'),
  )


METHODS = {
  'lora': lambda at: jpeft.lora(2, targets=at('qv')),
  'dora': lambda at: jpeft.dora(2, targets=at('qv')),
  'vera': lambda at: jpeft.vera(2, targets=at('kv')),
  'ia3': lambda at: jpeft.ia3(at('kv'), at('q')),
  'ssf': lambda at: jpeft.ssf(at('k')),
  'velora': lambda at: jpeft.velora(4, targets=at('qv')),
  'boxed': lambda at: low_rank(at('qv'), dot=False),
  'trained': lambda at: train(at('qv')),
  'chained': chained,
  'last layers': lambda at: jpeft.in_layers(jpeft.lora(2, targets=at('qv')), '1:'),
}


def dequantized(held):
  is_box = lambda x: isinstance(x, jpeft.Box)
  return jax.tree.map(lambda x: x.unbox() if is_box(x) else x, held, is_leaf=is_box)


def compared(form, method, scan=False, quantized=False):
  sizes = SIZES if form == 'grouped' else (4, 4, 4)
  fused, own = Model(form, scan, sizes), Model(None, scan, sizes)
  held = noisy(fused.init(jax.random.key(0), X))
  with parts_of(form):
    stored = held
    if quantized:
      stored = jpeft.quantize(fused, jpeft.nf4(32), held, X, targets='.*qkv')
      held = dequantized(stored)
    roles = lambda names: '|'.join(f'{{{name}}}' for name in names)
    tuned = jpeft.attach(fused, METHODS[method](roles), stored, X)
  modules = lambda names: f'.*/[{names}]'
  other = jpeft.attach(own, METHODS[method](modules), apart := taken_apart(held, FUSED[form][1]), X)
  theta = noisy(tuned.init(jax.random.key(1), stored))
  renamed = {name: layers_of_own(t) for name, t in theta.items()}
  assert jax.tree.structure(renamed) == jax.tree.structure(other.shapes)

  def run(tuned, theta, held):
    loss = lambda theta: jnp.square(tuned.apply(theta, held, X)).sum()
    return jax.jit(jax.value_and_grad(loss, allow_int=True))(theta)

  value, grads = run(tuned, theta, stored)
  want, want_grads = run(other, renamed, apart)
  np.testing.assert_allclose(value, want, rtol=1e-4)
  grads = {name: layers_of_own(t) for name, t in grads.items()}
  for path, got in leaf_paths(grads).items():
    if got.dtype != jax.dtypes.float0:
      expected = leaf_paths(want_grads)[path]
      np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())
  np.testing.assert_allclose(
    fused.apply(tuned.merge(theta, stored), X),
    tuned.apply(theta, stored, X),
    rtol=1e-3,
    atol=1e-4,
  )
  return tuned, theta, held


@pytest.mark.parametrize('form', FUSED)
@pytest.mark.parametrize('method', ('lora', 'boxed'))
def test_a_part_is_a_layer_of_its_own(form, method):
  tuned, theta, held = compared(form, method)
  merged = tuned.merge(theta, held)
  old, new = (taken_apart(h, FUSED[form][1])['params']['block_0'] for h in (held, merged))
  for name in 'qkv':
    assert np.array_equal(old[name]['kernel'], new[name]['kernel']) == (name == 'k')


@pytest.mark.parametrize('method', sorted(METHODS.keys() - {'lora', 'boxed'}))
def test_every_weight_acts_on_parts(method):
  compared('thirds', method)


@pytest.mark.parametrize('method', ('lora', 'boxed', 'chained', 'last layers', 'ia3'))
def test_in_a_scan(method):
  compared('thirds', method, scan=True)


@pytest.mark.parametrize('scan', (False, True))
@pytest.mark.parametrize('method', ('lora', 'boxed', 'ia3'))
def test_kernels_in_4_bits(method, scan):
  compared('grouped', method, scan, quantized=True)


def test_no_product_of_the_size_of_the_kernel_is_differentiated():
  tuned, theta, held = compared('thirds', 'lora')
  loss = lambda theta: tuned.apply(theta, held, X).sum()
  text = str(jax.make_jaxpr(jax.grad(loss))(theta))
  assert 'f32[8,12]' in text  # the frozen kernel
  assert '8,12] = dot_general' not in text and '12,8] = dot_general' not in text


# ---- Raw arrays of the fixtures.


@pytest.mark.parametrize('name', ('linen_gemma', 'nnx_raw'))
def test_raw_arrays_that_were_not_named_stay(name):
  b = BACKBONES[name]
  with described(b):
    tuned = jpeft.attach(b.model, jpeft.ia3('{v}', '{fc2}'), b.backbone, *b.args, **b.kwargs)
  theta = noisy(tuned.init(jax.random.key(0), b.backbone))
  assert jpeft.count(theta) == b.depth * (8 + 64)
  before, after = leaf_paths(b.backbone), leaf_paths(tuned.merge(theta, b.backbone))
  changed = {path for path in before if not np.array_equal(before[path], after[path])}
  assert {path.split('/')[-1] for path in changed} <= {'w', 'kv_einsum', 'linear'}
  for path in changed:
    if 'kv_einsum' in path:
      keys = lambda x: np.moveaxis(x, -4, 0)[0]
      assert np.array_equal(keys(before[path]), keys(after[path]))
  assert len(changed) == (2 if b.scanned else 2 * b.depth)
  found = jpeft.check(tuned, b.backbone, *b.args, start=1e-5, **b.kwargs)
  assert found, str(found)


def test_the_decoder_family_tells_keys_from_values():
  b = BACKBONES['linen_gemma']
  tuned = jpeft.attach(b.model, jpeft.lora(2), b.backbone, *b.args, **b.kwargs)
  assert tuned.sites.anatomy.name == 'decoder'
  assert {site.path for _, site in tuned.rules} == {
    'layers/attn/q_einsum',
    'layers/attn/kv_einsum:v',
  }


# ---- What is found, and what is refused.


def attached(method, **roles):
  model = Model('thirds')
  with scheme(**roles):
    return jpeft.attach(model, method, jax.eval_shape(model.init, jax.random.key(0), X), X)


THIRDS = dict(zip('qkv', FUSED['thirds'][2], strict=True))


def test_only_roles_name_parts():
  sites = attached(low_rank('head'), **THIRDS).sites
  paths = lambda pattern: [site.path for site in sites.find(pattern)]
  assert paths('.*qkv') == [f'block_{i}/qkv' for i in range(3)]
  assert paths('block_0/.*') == ['block_0/qkv', 'block_0/o']
  assert paths('block_0/qkv|{q}') == ['block_0/qkv', 'block_1/qkv:q', 'block_2/qkv:q']
  (site,) = sites.find('(?=block_1){v}')
  assert site is sites.find('(?=block_1){v}')[0] and site.owner == 'block_1/qkv'
  assert site.leaves['kernel'].shape == (8, 4) and site.leaves['bias'].shape == (4,)


def test_a_part_that_is_all_of_a_module_is_the_module():
  tuned = attached(adapter('{o}'), o=Part('.*/o'))
  assert [site.path for _, site in tuned.rules] == [f'block_{i}/o' for i in range(3)]


@pytest.mark.parametrize(
  ('method', 'roles', 'message'),
  [
    (adapter('{q}'), THIRDS, r"adapter: in '\{q\}', \{q\} is a part of 'block_0/qkv' alone"),
    (
      low_rank('(?!{q}$)block.*'),
      THIRDS,
      r"leaves out a part of 'block_0/qkv', and would name all of it",
    ),
    (
      jpeft.chain(low_rank('{q}'), low_rank('.*qkv')),
      THIRDS,
      "'low' act on 'kernel' at 'block_0/qkv:q' and at 'block_0/qkv', which overlap",
    ),
    (
      low_rank('{q}|{v}'),
      {**THIRDS, 'v': THIRDS['q']},
      "at 'block_0/qkv:q' and at 'block_0/qkv:v', which overlap",
    ),
    (
      low_rank('{q}|{v}'),
      dict.fromkeys('qkv', '.*qkv'),
      r"names 'block_0/qkv', which by the scheme 'parts' is \{k\} too: name all of it "
      r"\('\{q\}\|\{k\}\|\{v\}'\), or say what is which by jpeft.Part",
    ),
    (low_rank('{q}'), {'q': Part('.*qkv', take=(0, 5))}, "whose 12 outputs are not 5 equal pieces"),
    (
      low_rank('{q}'),
      {'q': Part('.*qkv', take=(0, 3), axis=1)},
      r"at 'block_0/qkv', whose output has 1 axes, and not axis=1",
    ),
    (low_rank('{q}'), {'q': Part('.*qkv', take=lambda site, size: slice(20, 30))}, 'takes none'),
    (low_rank('{q}'), {'q': Part('.*qkv', 'w')}, "no site matches: '{q}'"),
    (jpeft.peqa('{q}'), THIRDS, r'\{q\} is a slice of .* scales belong to a whole kernel'),
  ],
)  # fmt: skip
def test_what_cannot_be_meant_is_said(method, roles, message):
  with pytest.raises(ValueError, match=message):
    attached(method, **roles)


@pytest.mark.parametrize('targets', ('{q}|{k}|{v}', '{linear}|{q}', '.*qkv'))
def test_all_of_a_fused_kernel_may_be_named(targets):
  fused = dict.fromkeys(('q', 'k', 'v', 'linear'), '.*qkv')
  tuned = attached(low_rank(targets), **fused)
  assert [site.path for _, site in tuned.rules] == [f'block_{i}/qkv' for i in range(3)]


def test_a_rule_that_tells_arrays_apart_needs_no_parts():
  b = BACKBONES['nnx_raw']
  roles = {'block': r'layers/\d', 'fc1': r'layers/\d/mlp', 'fc2': r'layers/\d/mlp'}
  with scheme(**roles):
    jpeft.attach(b.model, jpeft.ia3(None, '{fc2}', arrays='linear'), b.backbone, *b.args)
    with pytest.raises(ValueError, match=r'is \{fc1\} too'):
      jpeft.attach(b.model, jpeft.ia3(None, '{fc2}'), b.backbone, *b.args)


def test_a_wrong_piece_is_refused_where_it_is_written():
  with pytest.raises(ValueError, match=r'take=\(3, 3\): \(index, count\) is one of count equal'):
    Part('.*qkv', take=(3, 3))


def test_kernels_are_quantized_as_a_whole():
  model = Model('thirds')
  held = model.init(jax.random.key(0), X)
  with scheme(**THIRDS), pytest.raises(ValueError, match=r"\{q\}, a part of 'block_0/qkv'"):
    jpeft.quantize(model, jpeft.nf4(32), held, X, targets='{q}')
