"""Prefix tuning: attention with more keys, masks, inline attention, parity with HF peft."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpeft
from jpeft.core import backend_of
from jpeft.methods.prompt.prefix import prefix
from tests.contract.anatomies import described as family_of
from tests.fixtures import BACKBONES
from tests.fixtures.nnx_models import Llama, rope
from tests.methods.golden import full_size, peft

RNG = np.random.default_rng(0)


class Attend(nn.Module):
  """Calls its attention_fn on the arguments it is called with."""

  attention_fn: object = nn.dot_product_attention

  @nn.compact
  def __call__(self, query, key, value, *rest, **options):
    return self.attention_fn(query, key, value, *rest, **options)


def run(arrays, rows, *rest, attention_fn=nn.dot_product_attention, **options):
  """The output of Attend on arrays (query, key, value), with rows (keys, values) in front."""
  model = Attend(attention_fn)
  tuned = jpeft.attach(
    model, prefix(len(rows[0]), targets=''), {'params': {}}, *arrays, *rest, **options
  )
  theta = {'prefix': {'': dict(zip(('keys', 'values'), map(jnp.asarray, rows), strict=True))}}
  assert jax.tree.map(jnp.shape, theta) == jax.tree.map(jnp.shape, tuned.shapes)
  return tuned.apply(theta, {'params': {}}, *arrays, *rest, **options)


def softmax(scores):
  e = np.exp(scores - scores.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def attention(q, k, v, hidden=None):
  """In numpy: q [B, N, H, K], k and v [B, M, H, K]; `hidden` [.., N, M] are keys not seen."""
  scores = np.einsum('bnhk,bmhk->bhnm', q, k) / np.sqrt(q.shape[-1])
  if hidden is not None:
    scores = np.where(hidden, -np.inf, scores)
  return np.einsum('bhnm,bmhk->bnhk', softmax(scores), v)


def front(rows, x):
  return np.concatenate([np.broadcast_to(rows, (len(x), *rows.shape)), x], 1)


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def test_the_worked_example_and_its_gate():
  heads = lambda x: np.asarray(x, np.float32)[None, :, None]  # [M, K] -> [1, M, 1, K]
  q, k, v = heads([[1, 0]]), heads(np.eye(2)), heads([[1, 0], [0, 2]])
  rows = heads([[2, 0]]), heads([[4, 4]])
  out = run((q, k, v), [x[0] for x in rows])
  np.testing.assert_allclose(out[0, 0, 0], [2.587897, 2.583960], atol=2e-6)
  share = softmax(np.array([2.0, 1.0, 0.0]) / np.sqrt(2))[0]
  np.testing.assert_allclose(share, 0.5759754, atol=1e-7)
  gated = (1 - share) * attention(q, k, v) + share * attention(q, *rows)
  np.testing.assert_allclose(out, gated, atol=1e-6)


TRIANGLE, THIRD_HIDDEN = np.tril(np.ones((4, 4), bool)), np.tile(np.arange(4) != 2, (4, 1))
CAUSAL = {'is_causal': True, 'attention_fn': jax.nn.dot_product_attention}


@pytest.mark.parametrize(
  'rest, options, seen',
  [
    ((), {'mask': THIRD_HIDDEN[None, None]}, THIRD_HIDDEN),
    ((), {'mask': THIRD_HIDDEN[None, None, :1]}, THIRD_HIDDEN),
    ((None, TRIANGLE[None, None]), {}, TRIANGLE),
    ((np.where(TRIANGLE, 0, -1e9)[None, None].astype(np.float32),), {}, TRIANGLE),
    ((), CAUSAL, TRIANGLE),
    ((), {**CAUSAL, 'mask': THIRD_HIDDEN[None, None]}, TRIANGLE & THIRD_HIDDEN),
  ],
  ids=['mask', 'one row', 'by position', 'bias', 'causal', 'causal and mask'],
)
def test_every_query_sees_the_prefix_whatever_is_hidden(rest, options, seen):
  q, k, v = normal(2, 4, 2, 3), normal(2, 4, 2, 3), normal(2, 4, 2, 3)
  rows = normal(5, 2, 3), normal(5, 2, 3)
  out = run((q, k, v), rows, *jax.tree.map(jnp.asarray, rest), **options)
  hidden = np.concatenate([np.zeros((4, 5), bool), ~seen], 1)
  np.testing.assert_allclose(
    out, attention(q, front(rows[0], k), front(rows[1], v), hidden), atol=1e-5
  )
  assert np.abs(out - attention(q, k, v, ~seen)).max() > 0.05


def test_a_mask_of_one_column_is_left_to_broadcast():
  q, k, v = normal(2, 4, 2, 3), normal(2, 4, 2, 3), normal(2, 4, 2, 3)
  rows = normal(5, 2, 3), normal(5, 2, 3)
  out = run((q, k, v), rows, mask=jnp.array([True, True, False, True])[:, None])
  want = attention(q, front(rows[0], k), front(rows[1], v))
  np.testing.assert_allclose(out[:, [0, 1, 3]], want[:, [0, 1, 3]], atol=1e-5)


def test_grouped_heads_get_rows_for_each_key_head():
  q, k, v = normal(2, 4, 4, 3), normal(2, 4, 2, 3), normal(2, 4, 2, 3)
  rows = normal(5, 2, 3), normal(5, 2, 3)
  out = run((q, k, v), rows, attention_fn=jax.nn.dot_product_attention)
  keys, values = (np.repeat(front(*pair), 2, 2) for pair in zip(rows, (k, v), strict=True))
  np.testing.assert_allclose(out, attention(q, keys, values), atol=1e-5)


def test_lengths_of_keys_are_refused():
  arrays = [jnp.zeros((2, 4, 2, 3))] * 3
  with pytest.raises(ValueError, match='key_value_seq_lengths counts keys'):
    run(
      arrays,
      np.zeros((2, 5, 2, 3)),
      key_value_seq_lengths=jnp.array([4, 3]),
      attention_fn=jax.nn.dot_product_attention,
    )


def slots(table, layers, heads):
  """theta of each layer from peft's table [m, 2 * layers * heads * size], cut by hand."""
  size = table.shape[1] // (2 * layers)
  cut = lambda i: jnp.asarray(table[:, i * size : (i + 1) * size].reshape(len(table), heads, -1))
  return [{'keys': cut(2 * i), 'values': cut(2 * i + 1)} for i in range(layers)]


def check(tuned, backbone, args, paths, held, heads):
  """Outputs, and gradients by the table, are those of peft."""

  def logits(table):
    theta = dict(zip(paths, slots(table, len(paths), heads), strict=True))
    return tuned.apply({'prefix': theta}, backbone, *args)

  @jax.jit
  def run(table):
    y, back = jax.vjp(logits, table)
    return y, *back(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

  y, grad = run(jnp.asarray(held['prompt_embeddings']))
  np.testing.assert_allclose(y, held['logits'], atol=2e-5)
  np.testing.assert_allclose(grad, held['grad'], atol=2e-5)


def test_bert_with_a_prefix_is_that_of_peft(tmp_path):
  held = peft.read('prefix', 'bert')
  m = len(held['prompt_embeddings'])
  model, variables, args = peft.bert(tmp_path)
  # There the tokens count on behind the prefix: position i reads row m + i.
  embed = variables['params']['embed']
  table = jnp.roll(embed['position']['embedding'], -m, 0)
  params = {**variables['params'], 'embed': {**embed, 'position': {'embedding': table}}}
  tuned = jpeft.attach(model, prefix(m), {'params': params}, *args)
  check(
    tuned, {'params': params}, args, [f'encoder/block_{i}/attention' for i in range(2)], held, 2
  )


def llama(module, attention_fn, x, start=3):
  """The attention of somebody's Llama, written against an attention function; positions count from
  `start`.
  """
  turned = lambda h: rope(jnp.pad(h, ((0, 0), (start, 0), (0, 0), (0, 0))))[:, start:]
  q, k, v = turned(module.q_proj(x)), turned(module.k_proj(x)), module.v_proj(x)
  mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
  return module.o_proj(attention_fn(q, k, v, mask=mask[None, None]).reshape(x.shape))


@pytest.fixture
def described():
  """Somebody's Llama as an anatomy that has its attention."""
  roles = {'block': r'layers/\d+', 'attention': r'layers/\d+/self_attn', 'final_norm': 'final_norm'}
  jpeft.register_anatomy(jpeft.Anatomy('mine', roles, causal=True, attention=llama))
  yield
  del jpeft.ANATOMIES['mine']


def test_llama_that_attends_inline_is_that_of_peft_through_its_anatomy(described):
  held = peft.read('prefix', 'llama')
  model, state, args = peft.llama()
  tuned = jpeft.attach(model, prefix(3), state, *args)
  check(tuned, state, args, [f'layers/{i}/self_attn' for i in range(2)], held, 2)


def turned(x):
  """Rotates [B, N, H, K] by positions 0, 1, ..: pairs are complex numbers."""
  half = x.shape[-1] // 2
  z = x[..., :half] + 1j * x[..., half:]
  angle = np.arange(x.shape[1])[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
  z = z * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag], -1)


def of_bert(p, x):
  q, k, v = (
    (x @ p[f'self/{n}/kernel'] + p[f'self/{n}/bias']).reshape(*x.shape[:2], 4, 8)
    for n in ('query', 'key', 'value')
  )

  def finish(y):
    y = y.reshape(x.shape) @ p['output/dense/kernel'] + p['output/dense/bias'] + x
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-12)
    return y * p['output/LayerNorm/scale'] + p['output/LayerNorm/bias']

  padded = np.arange(10) >= np.array([[10], [7]])
  return q, k, v, np.tile(padded[:, None, None], (1, 1, 10, 1)), finish


def of_fused(p, x):
  parts = np.split(x @ p['qkv/kernel'] + p['qkv/bias'], 3, -1)
  q, k, v = (part.reshape(*x.shape[:2], 4, 8) for part in parts)
  finish = lambda y: y.reshape(x.shape) @ p['proj/kernel'] + p['proj/bias']
  return q, k, v, np.zeros((16, 16), bool), finish


def of_decoder(p, x, of='{}'):
  to_q, to_kv, to_out = (p[of.format(n)] for n in ('q_einsum', 'kv_einsum', 'attn_vec_einsum'))
  q = np.einsum('bnd,hdk->bnhk', x, to_q)
  k, v = (np.einsum('bnd,gdk->bngk', x, w) for w in to_kv)
  future = ~np.tril(np.ones((10, 10), bool))
  finish = lambda y: np.einsum('bnhk,hkd->bnd', y, to_out)
  return turned(q), turned(k), v, future, finish


def of_gemma(p, x):
  return of_decoder(p, x, '{}/w')


# {backbone: (arrays of the attention module, its input) -> (q, k, v, what is hidden, the rest)}.
BY_HAND = {
  'linen_bert': of_bert,
  'linen_fused': of_fused,
  'linen_gemma': of_gemma,
  'nnx_raw': of_decoder,
}


@pytest.mark.parametrize('name', BY_HAND)
def test_inline_attention_with_a_prefix_in_numpy(name):
  b = BACKBONES[name]

  def record(t, call, x, *args, **kwargs):
    out = call(x, *args, **kwargs)
    call.aux(x=x, y=call.site.stream(out))
    return out

  spied = jpeft.chain(prefix(3), jpeft.at('{attention}', jpeft.Call('spy', record)))
  with family_of(b):
    tuned = jpeft.attach(b.model, spied, b.backbone, *b.args, **b.kwargs)
  theta = tuned.init(jax.random.key(0), b.backbone)
  _, seen = tuned.apply(theta, b.backbone, *b.args, **b.kwargs, aux=True)
  arrays = backend_of(b.model).arrays(b.model, b.backbone)
  layer = 0
  for site in tuned.sites.find(b.roles['attention']):
    inside = {n: x for n, x in arrays.items() if n.startswith(f'{site.path}/')}
    for i in range(site.layers):
      of_layer = lambda x, site=site, i=i: np.asarray(site.take(x, i), np.float64)
      p = {n.removeprefix(f'{site.path}/'): of_layer(x) for n, x in inside.items()}
      x = np.asarray(seen['x'][layer], np.float64)
      q, k, v, hidden, finish = BY_HAND[name](p, x)
      t = {n: np.reshape(x, (-1, *x.shape[-3:]))[i] for n, x in theta['prefix'][site.path].items()}
      keys = np.repeat(front(t['keys'], k), 4 // k.shape[2], 2)
      values = np.repeat(front(t['values'], v), 4 // k.shape[2], 2)
      hidden = np.concatenate([np.zeros((*hidden.shape[:-1], 3), bool), hidden], -1)
      want = finish(attention(q, keys, values, hidden))
      np.testing.assert_allclose(seen['y'][layer], want, atol=5e-5)
      layer += 1
  assert layer == b.depth


def test_a_model_that_attends_inline_is_refused_with_the_way_out():
  model = Llama(rngs=nnx.Rngs(0))
  with pytest.raises(
    ValueError, match="at 'layers/0/self_attn' calls no attention_fn.*register_anatomy"
  ):
    jpeft.attach(model, prefix(3), nnx.state(model), jnp.ones((1, 4), jnp.int32))


BERT_BASE = {
  'model_type': 'bert',
  'vocab_size': 100,
  'hidden_size': 768,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'intermediate_size': 3072,
  'max_position_embeddings': 64,
}
ROBERTA_LARGE = {
  **BERT_BASE,
  'model_type': 'roberta',
  'hidden_size': 1024,
  'num_hidden_layers': 24,
  'num_attention_heads': 16,
  'intermediate_size': 4096,
  'pad_token_id': 1,
}


@pytest.mark.parametrize(
  'config, tokens, count', [(BERT_BASE, 20, 368_640), (ROBERTA_LARGE, 8, 393_216)]
)
def test_counts_of_the_papers(config, tokens, count):
  model = jpeft.models.from_config(config, scan=True)
  model, shapes = full_size.of(model, full_size.tokens())
  assert jpeft.count(jpeft.attach(model, prefix(tokens), *shapes).shapes) == count


def test_starts():
  model, shapes = full_size.of(
    nn.MultiHeadDotProductAttention(4), jax.ShapeDtypeStruct((1, 3, 32), jnp.float32)
  )
  tuned = lambda **hp: jpeft.attach(model, prefix(500, targets='', **hp), *shapes)
  theta = tuned().init(jax.random.key(0), shapes[0])['prefix']['']
  rows = np.stack([theta['keys'], theta['values']])
  assert rows.shape == (2, 500, 4, 8)
  assert np.abs(rows.mean((1, 2, 3))).max() < 0.03 and np.abs(rows.std((1, 2, 3)) - 1).max() < 0.03
  assert np.abs(np.corrcoef(rows[0].ravel(), rows[1].ravel())[0, 1]) < 0.03
  zero = tuned(init='zero').init(jax.random.key(0), shapes[0])
  assert not any(x.any() for x in jax.tree.leaves(zero))


def test_dropout_falls_on_every_row_alone_and_in_training_only():
  q = k = v = jnp.zeros((3, 1, 1, 1))
  rows = jnp.zeros((4000, 1, 1)), jnp.ones((4000, 1, 1))  # the output is the mean of the values
  tuned = jpeft.attach(Attend(), prefix(4000, dropout=0.25, targets=''), {'params': {}}, q, k, v)
  theta = {'prefix': {'': {'keys': rows[0], 'values': rows[1]}}}
  run = lambda **kw: tuned.apply(theta, {'params': {}}, q, k, v, **kw).ravel() * 4001
  np.testing.assert_allclose(run(), 4000, rtol=1e-5)
  dropped = run(rngs={'dropout': jax.random.key(0)})
  np.testing.assert_allclose(dropped / 4000, 1, atol=0.05)
  # Whole rows, scaled by 1 / 0.75.
  np.testing.assert_allclose(dropped * 0.75, np.round(dropped * 0.75), atol=0.02)
  assert len(set(np.round(dropped * 0.75).tolist())) == 3  # every example has its own


@pytest.mark.parametrize(
  'hp, message',
  [
    ({'tokens': -1}, 'tokens=-1 must be a whole number'),
    ({'tokens': 1.5}, 'tokens=1.5'),
    ({'dropout': 2}, r'dropout=2 must lie in \[0, 1\]'),
    ({'init': 'zeros'}, "init='zeros' must be 'normal'"),
  ],
)
def test_bad_hyperparameters(hp, message):
  with pytest.raises(ValueError, match=message):
    prefix(**hp)


def test_rows_that_are_made_of_a_table():
  """Li and Liang's GPT-2 medium, m = 10, h = 512: 25.75 M numbers in training, 491,520 after it."""
  config = {**ROBERTA_LARGE, 'model_type': 'bert'}  # of the same sizes
  model, shapes = full_size.of(jpeft.models.from_config(config, scan=True), full_size.tokens())
  tuned = jpeft.attach(model, prefix(10, hidden=512), *shapes)
  table, first = 10 * 1024, 1024 * 512 + 512
  assert jpeft.count(tuned.shapes) == table + first + 513 * 2 * 24 * 1024 == 25_750_016
  assert jpeft.count(jax.eval_shape(tuned.expand, tuned.shapes)) == 491_520


@pytest.mark.parametrize('scan', [False, True])
def test_made_and_baked_rows_give_the_same(scan):
  b = BACKBONES['linen_vit_scan' if scan else 'linen_vit']
  with family_of(b):
    made = jpeft.attach(b.model, prefix(3, hidden=5), b.backbone, *b.args, **b.kwargs)
    baked = jpeft.attach(b.model, prefix(3), b.backbone, *b.args, **b.kwargs)
  theta = made.init(jax.random.key(0), b.backbone)
  t = theta['prefix']['']
  rows = np.tanh(t['table'] @ t['w1'] + t['b1']) @ t['w2'] + t['b2']
  heads = next(iter(baked.shapes['prefix'].values()))['keys'].shape[-2:]
  rows = rows.reshape(3, -1, 2, *heads)  # as peft views them: [m, layers, keys and values, ..]
  expanded = made.expand(theta)['prefix']
  paths = sorted(expanded)
  keys = np.concatenate([expanded[p]['keys'].reshape(-1, 3, *heads) for p in paths])
  values = np.concatenate([expanded[p]['values'].reshape(-1, 3, *heads) for p in paths])
  np.testing.assert_allclose(keys, rows[:, :, 0].swapaxes(0, 1), atol=1e-6)
  np.testing.assert_allclose(values, rows[:, :, 1].swapaxes(0, 1), atol=1e-6)
  outs = [
    tuned.apply(theta, b.backbone, *b.args, **b.kwargs)
    for tuned, theta in ((made, theta), (baked, made.expand(theta)))
  ]
  np.testing.assert_allclose(*outs, atol=1e-6)
  with pytest.raises(ValueError, match="init='zero' of rows that are made of a table is its own"):
    prefix(3, init='zero', hidden=5)
