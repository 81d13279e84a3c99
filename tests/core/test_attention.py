"""`call.attend`: one door to attention, through a field of the module or a form that its family
has.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.core import dot_product
from tests.contract.anatomies import INLINE, described
from tests.core.small import WIDTH, X, backbone, low_rank, plain
from tests.fixtures import BACKBONES, leaves_equal, noisy
from tests.fixtures import plain as plain_of

HEADS = 2
TOKENS = X[None]  # [1, 4, WIDTH]


def capped(query, key, value, bias=None, mask=None):
  """Attention whose logits are capped, as no default has it."""
  logits = 2 * jnp.tanh(jnp.einsum('...qhk,...mhk->...hqm', query, key) / 2)
  return jnp.einsum('...hqm,...mhk->...qhk', jax.nn.softmax(logits), value)


def form(module, attention_fn, x):
  """Attention of Inline and Field, written once."""
  q, k, v = (nn.Dense(WIDTH, name=n)(x).reshape(*x.shape[:2], HEADS, -1) for n in 'qkv')
  return nn.Dense(WIDTH, name='o')(attention_fn(q, k, v).reshape(x.shape))


class Inline(nn.Module):
  @nn.compact
  def __call__(self, x):
    return form(self, capped, x)


class Field(nn.Module):
  attention_fn: Any = capped

  @nn.compact
  def __call__(self, x):
    return form(self, self.attention_fn, x)


class Block(nn.Module):
  attends: Any

  @nn.compact
  def __call__(self, x):
    return x + self.attends(name='attn')(x), None


class Model(nn.Module):
  """Two blocks: block_0, block_1 or, of `scan`, blocks."""

  attends: Any = Inline
  scan: bool = False

  @nn.compact
  def __call__(self, x):
    if not self.scan:
      for i in range(2):
        x, _ = Block(self.attends, name=f'block_{i}')(x)
      return x
    split = {'params': True}
    scan = nn.scan(
      nn.remat(Block, prevent_cse=False), variable_axes={'params': 0}, split_rngs=split, length=2
    )
    return scan(self.attends, name='blocks')(x)[0]


class NnxInline(nnx.Module):
  def __init__(self, rngs):
    for name in 'qkvo':
      setattr(self, name, nnx.Linear(WIDTH, WIDTH, rngs=rngs))

  def __call__(self, x):
    return nnx_form(self, capped, x)


def nnx_form(module, attention_fn, x):
  q, k, v = (getattr(module, n)(x).reshape(*x.shape[:2], HEADS, -1) for n in 'qkv')
  return module.o(attention_fn(q, k, v).reshape(x.shape))


class NnxModel(nnx.Module):
  def __init__(self, rngs=None):
    self.blocks = nnx.List([NnxInline(rngs or nnx.Rngs(0)) for _ in range(2)])

  def __call__(self, x):
    for block in self.blocks:
      x = x + block(x)
    return x


ROLES = {
  'block': r'block(?:s|_\d+)',
  'attention': r'block(?:s|_\d+)/attn',
  'q': r'block(?:s|_\d+)/attn/q',
}
NNX_ROLES = {'block': r'blocks/\d+', 'attention': r'blocks/\d+', 'q': r'blocks/\d+/q'}


@pytest.fixture
def family():
  """(name, roles, ...) -> registers an anatomy until the test ends."""
  names = []

  def register(roles=ROLES, attention=form, **fields):
    jpeft.register_anatomy(jpeft.Anatomy('mine', roles, attention=attention, **fields))
    names.append('mine')

  yield register
  for name in set(names):
    del jpeft.ANATOMIES[name]


def attending(wrap, name='attending', targets='{attention}', **fields):
  """A method that wraps attention by wrap(t, attention_fn), t being one number."""

  def init(key, site, arrays):
    assert site.heads is not None
    return {'s': jnp.full((), 0.7)}

  def apply(t, call, *args, **kwargs):
    return call.attend(lambda attention_fn: wrap(t['s'], attention_fn), *args, **kwargs)

  return jpeft.at(targets, jpeft.Call(name, apply, init, requires='attention', **fields))


def same(s, attention_fn):
  return lambda *args, **kwargs: attention_fn(*args, **kwargs)


def doubled(s, attention_fn):
  return lambda q, k, v, **kwargs: attention_fn(q, k, (1 + s) * v, **kwargs)


def moved(s, attention_fn):
  return lambda q, k, v, **kwargs: attention_fn(q, k, v + s, **kwargs)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('name', INLINE)
def test_the_forms_of_the_fixtures_are_their_modules(name, train):
  b = BACKBONES[name]
  with described(b):
    tuned = jpeft.attach(b.model, attending(same), b.backbone, *b.args, **b.kwargs)
  theta = tuned.init(jax.random.key(0), b.backbone)
  kwargs = {**b.kwargs, **(b.train_kwargs if train else {})}
  rngs = {n: jax.random.key(0) for n in b.rngs_names}
  if train and b.rngs_names:  # dropout draws the same
    kwargs |= {'rngs': rngs, 'mutable': list(b.mutable) or False}
    want = b.model.apply(b.backbone, *b.args, **kwargs)
  else:
    want = plain_of(b)
  out = tuned.apply(theta, b.backbone, *b.args, **kwargs)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-5), out, want)


@pytest.mark.parametrize(
  'name, heads',
  [
    ('linen_bert', (4, 8)),
    ('linen_fused', (4, 8)),
    ('linen_gemma', (1, 8)),
    ('nnx_llama', (2, 8)),
    ('nnx_raw', (1, 8)),
  ],
)
def test_heads_are_known_of_every_form(name, heads):
  b = BACKBONES[name]
  with described(b):
    found = jpeft.sites_of(b.model, b.backbone, *b.args, **b.kwargs).find('{attention}')
  assert found and all(site.heads == heads and site.inline for site in found)


def test_what_attends_by_default_is_the_familys(family):
  family(attention_fn=capped)
  model = Model()
  held = backbone(model, TOKENS)
  tuned = jpeft.attach(model, attending(same), held, TOKENS)
  theta = tuned.init(jax.random.key(0), held)
  assert leaves_equal(tuned.apply(theta, held, TOKENS), plain(model, held, TOKENS))


@pytest.mark.parametrize('dot', [True, False])
def test_nnx_modules_too(family, dot):
  family(NNX_ROLES, nnx_form, attention_fn=capped)
  model = NnxModel()
  held = backbone(model)
  tuned = jpeft.attach(
    model, jpeft.chain(attending(doubled), low_rank('{q}', dot=dot)), held, TOKENS
  )
  theta = noisy(tuned.init(jax.random.key(0), held))
  x = TOKENS
  for i in range(2):
    w = {n: np.asarray(held['blocks'][i][n]['kernel'][...]) for n in 'qkvo'}
    bias = {n: np.asarray(held['blocks'][i][n]['bias'][...]) for n in 'qkvo'}
    t = theta['low'][f'blocks/{i}/q']['kernel']
    w['q'] = w['q'] + t['a'] @ t['b']
    q, k, v = ((x @ w[n] + bias[n]).reshape(1, 4, HEADS, -1) for n in 'qkv')
    y = capped(q, k, (1 + theta['attending'][f'blocks/{i}']['s']) * v)
    x = x + y.reshape(x.shape) @ w['o'] + bias['o']
  np.testing.assert_allclose(tuned.apply(theta, held, TOKENS), x, atol=1e-5)


class Usual(nn.Module):
  """Inline attention of Flax."""

  @nn.compact
  def __call__(self, x):
    return form(self, nn.dot_product_attention, x)


@pytest.mark.parametrize('scan', [False, True])
def test_a_form_makes_no_scores_in_long_contexts(family, monkeypatch, scan):
  """Under a method that leaves attention alone."""
  family()
  model = Model(Usual, scan)
  held = backbone(model, TOKENS)
  tuned = jpeft.attach(model, low_rank('{q}'), held, TOKENS)
  theta = noisy(tuned.init(jax.random.key(0), held))

  def program():
    return str(jax.make_jaxpr(lambda theta: tuned.apply(theta, held, TOKENS))(theta))

  scores = f'f32[1,{HEADS},4,4]'
  short = tuned.apply(theta, held, TOKENS)
  assert scores in program()
  monkeypatch.setattr(dot_product, 'LONG', 16)
  monkeypatch.setattr(dot_product, 'MOST_SCORES', 4)
  assert scores not in program()
  np.testing.assert_allclose(tuned.apply(theta, held, TOKENS), short, atol=1e-5)


def again(name='again'):
  """Runs its module as a function, which is computed again in the backward pass."""

  def apply(t, call, *args, **kwargs):
    fn, arrays = call.pure()
    return jax.checkpoint(fn)(arrays, *args, **kwargs)

  return jpeft.at('{attention}', jpeft.Call(name, apply))


CHAINS = {
  'two': lambda: jpeft.chain(attending(doubled, 'one'), attending(moved, 'two')),
  'two, the other way': lambda: jpeft.chain(attending(moved, 'one'), attending(doubled, 'two')),
  'a function inside': lambda: jpeft.chain(again(), attending(moved, 'one')),
  'a function around': lambda: jpeft.chain(attending(moved, 'one'), again()),
  'a matrix inside': lambda: jpeft.chain(low_rank('{q}'), attending(doubled, 'one')),
  'a boxed one': lambda: jpeft.chain(low_rank('{q}', dot=False), attending(doubled, 'one')),
}


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('name', CHAINS)
def test_a_form_is_as_good_as_a_field(family, name, scan):
  """Order of rules, functions of the module, rules inside, gradients."""
  family(attention_fn=capped)
  runs = []
  for attends in (Field, Inline):
    model = Model(attends, scan)
    held = backbone(model, TOKENS)
    tuned = jpeft.attach(model, CHAINS[name](), held, TOKENS)
    theta = noisy(tuned.init(jax.random.key(0), held))

    def loss(theta, tuned=tuned, held=held):
      out = tuned.apply(theta, held, TOKENS)
      return (out**2).sum(), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(theta)
    assert np.abs(out - plain(model, held, TOKENS)).max() > 1e-2
    runs.append((out, grads))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *runs)
  assert all(jnp.any(g != 0) for g in jax.tree.leaves(runs[0][1]))


def test_a_function_that_is_traced_later_is_wrapped_as_well(family):
  """A custom_vjp inside jit is traced when a gradient is taken, after the rules have run."""
  family(NNX_ROLES, nnx_form, attention_fn=capped)
  model = NnxModel()
  held = backbone(model)

  def saved(t, call, x):
    return call.saving(lambda x: {'x': x}, lambda p: p['x'])(x)

  def around(t, call, x):
    return call.attend(lambda attention_fn: doubled(3.0, attention_fn), x)

  inner = jpeft.at('{attention}', jpeft.Call('saved', saved))
  outer = jpeft.at('{attention}', jpeft.Call('around', around, requires='attention'))
  grads = []
  for method in (jpeft.chain(inner, outer), outer):
    tuned = jpeft.attach(model, method, held, TOKENS)
    run = jax.jit(lambda x, tuned=tuned: jnp.sum(tuned.apply({}, held, x) ** 2))
    grads.append(jax.grad(run)(TOKENS))
  np.testing.assert_allclose(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('attends', [Field, Inline])
def test_some_layers_of_a_stack(family, attends):
  family(attention_fn=capped)
  scanned, unrolled = Model(attends, scan=True), Model(attends)
  held = backbone(scanned, TOKENS)
  stack = held['params']['blocks']
  flat = {'params': {f'block_{i}': jax.tree.map(lambda x, i=i: x[i], stack) for i in range(2)}}
  outs = []
  for model, variables in ((scanned, held), (unrolled, flat)):
    tuned = jpeft.attach(model, jpeft.in_layers(attending(doubled), '1'), variables, TOKENS)
    theta = tuned.init(jax.random.key(0), variables)
    outs.append(tuned.apply(theta, variables, TOKENS))
  np.testing.assert_allclose(*outs, atol=1e-6)


def test_an_injected_field_is_of_the_chosen_layers_alone():
  def apply(t, call, *args, **kwargs):
    with call.inject(attention_fn=doubled(t['s'], capped)):
      return call(*args, **kwargs)

  init = lambda key, site, arrays: {'s': jnp.ones(())}
  model = Model(Field, scan=True)
  held = backbone(model, TOKENS)
  rule = jpeft.at('blocks/attn', jpeft.Call('inject', apply, init))
  outs = []
  for layers in ('0', '1', '0,1'):
    tuned = jpeft.attach(model, jpeft.in_layers(rule, layers), held, TOKENS)
    outs.append(tuned.apply(tuned.init(jax.random.key(0), held), held, TOKENS))
  assert all(np.abs(outs[i] - outs[j]).max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))


def never(module, attention_fn, x):
  return nn.Dense(WIDTH, name='o')(x)


def wide(module, attention_fn, x):
  return form(module, attention_fn, x)[..., :2]


def wrong(module, attention_fn, x, mask):
  return x


@pytest.mark.parametrize(
  'attention, message',
  [
    (never, "'block_0/attn' calls no .*'mine' never calls the attention_fn it is given"),
    (wide, r"'mine' returns \(1, 4, 2\) in place of \(1, 4, 6\)"),
    (wrong, "'mine' fails there: TypeError: .*'mask'"),
    (None, 'give its class that field, or its anatomy `attention`'),
  ],
)
def test_a_wrong_form_is_said_where_attention_is_needed(family, attention, message):
  family(attention=attention)
  model = Model()
  held = backbone(model, TOKENS)
  with pytest.raises(ValueError, match=message):
    jpeft.attach(model, attending(same), held, TOKENS)
  jpeft.attach(model, low_rank('{q}'), held, TOKENS)  # and nowhere else


def test_a_form_serves_the_attention_alone(family):
  family(attention_fn=capped)
  model = Model()
  held = backbone(model, TOKENS)
  with pytest.raises(ValueError, match="Block at 'block_0' .*'mine' has the attention of its {att"):
    jpeft.attach(model, attending(same, targets='{block}'), held, TOKENS)


def test_without_requires_it_is_said_at_the_call(family):
  family(attention=never)
  model = Model()
  held = backbone(model, TOKENS)
  apply = lambda t, call, x: call.attend(lambda fn: fn, x)
  tuned = jpeft.attach(model, jpeft.at('{attention}', jpeft.Call('late', apply)), held, TOKENS)
  with pytest.raises(ValueError, match='late: Inline at .* never calls'):
    tuned.apply({}, held, TOKENS)


def test_a_form_without_a_role():
  with pytest.raises(ValueError, match="'mine' has `attention` and no role {attention}"):
    jpeft.Anatomy('mine', {'block': 'block'}, attention=form)


def test_what_a_call_requires():
  with pytest.raises(ValueError, match="requires='input' must be one of 'nothing', 'attention'"):
    jpeft.Call('mine', lambda t, call: call(), requires='input')
