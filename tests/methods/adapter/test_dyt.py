"""DyT: gates, both passes and their losses, experts, the gathered form and its FLOPs."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.core import TaskLoss
from jpeft.core.task_loss import divergence
from jpeft.methods.adapter.bottleneck import Adapter, beside_norm_and_mlp
from jpeft.methods.adapter.dyt import Experts, _Objective, activated, chosen_tokens, dyt
from jpeft.programs import flops
from tests.fixtures import leaf_paths, noisy
from tests.methods.golden import full_size
from tests.methods.small import IMAGES, vit

RNG = np.random.default_rng(0)
TAU = 5.0
RNGS = {'dropout': jax.random.key(3)}


def attached(method, depth=2, **fields):
  """(model, tuned, variables, theta off its start, whose gates are wide open or shut)."""
  model, variables = vit(depth=depth, **fields)
  tuned = jpeft.attach(model, method, variables, IMAGES)
  return model, tuned, variables, noisy(jax.jit(tuned.init)(jax.random.key(0), variables), 0.3)


def seen(modules: dict[str, str]):
  """(a method that keeps inputs and output of modules, {name: input}, {name: output})."""
  inputs, outputs = {}, {}

  def keeping(name):
    def keep(t, call, x, *args, **kwargs):
      inputs[name] = x
      outputs[name] = call(x, *args, **kwargs)
      return outputs[name]

    return keep

  rules = [jpeft.at(path, jpeft.Call(name, keeping(name))) for name, path in modules.items()]
  return jpeft.chain(*rules), inputs, outputs


def objective(tuned, theta, variables, loss, training=True):
  """(value, output, aux) of what training minimises."""

  def run(**takes):
    rngs = RNGS if training else None
    options = {'deterministic': not training}
    return tuned.apply(theta, variables, IMAGES, aux=True, rngs=rngs, **options, **takes)

  return tuned.objective(run, loss)


# The card's list


@pytest.mark.parametrize('fields', [{}, {'scan': True}], ids=['unrolled', 'scanned'])
def test_the_complete_pass_starts_as_the_backbone(fields):
  model, tuned, variables, _ = attached(dyt(4), **fields)
  theta = tuned.init(jax.random.key(0), variables)
  plain = jax.jit(model.apply)(variables, IMAGES)
  complete = jax.jit(functools.partial(tuned.apply, complete=True))(theta, variables, IMAGES)
  np.testing.assert_allclose(complete, plain, atol=1e-6)
  assert np.abs(jax.jit(tuned.apply)(theta, variables, IMAGES) - plain).max() > 1e-3


@pytest.mark.parametrize(('active', 'expected'), [(0.5, 0.0), (0.75, 0.125), (0.0, 0.5)])
def test_the_rate_loss(active, expected):
  """Of masks of two layers and two images whose mean is `active`."""
  rates = jnp.full((2, 2), active) + jnp.array([[0.25, -0.25], [0.125, -0.125]])
  minimised = _Objective('dyt', 0.5, complete=0, distill=0, balance=2)
  run = lambda: (jnp.ones(3), {'dyt_rate': rates})
  value, out = minimised(TaskLoss(lambda out: 7.0, divergence), run)
  assert value == pytest.approx(7 + expected) and out.shape == (3,)


def test_tokens_are_active_where_their_logit_is_above_zero():
  logits = jnp.array([[0.0, 1e-12, -1e-12, 3, -3]])
  np.testing.assert_array_equal(activated(logits, TAU), [[0, 1, 0, 1, 0]])
  _, tuned, variables, theta = attached(dyt(4))
  kept, inputs, outputs = seen({'norm': '{norm2}', 'mlp': '{mlp}'})
  rates = tuned.apply(theta, variables, IMAGES, aux=True)[1]['dyt_rate']
  both = jpeft.attach(vit(depth=2)[0], jpeft.chain(kept, dyt(4)), variables, IMAGES)
  both.apply(theta, variables, IMAGES)
  gate = theta['dyt']['encoder/block_1/mlp']
  logits = inputs['norm'][:, 1:] @ gate['kernel'] + gate['bias']
  np.testing.assert_allclose(rates[1], (logits[..., 0] > 0).mean(-1))
  assert 0 < rates.mean() < 1


@pytest.mark.parametrize(
  ('fields', 'budget'), [({}, 1.0), ({}, 0.75), ({'scan': True}, 0.75)], ids=str
)
def test_gathered_tokens_give_what_masked_ones_give(fields, budget):
  model, tuned, variables, theta = attached(dyt(4), **fields)
  masked, aux = tuned.apply(theta, variables, IMAGES, aux=True)
  assert 0 < aux['dyt_rate'].max() <= budget
  gathered = jpeft.attach(model, dyt(4, budget=budget), variables, IMAGES)
  kept = jax.jit(gathered.apply)(theta, variables, IMAGES)
  np.testing.assert_allclose(kept, masked, atol=1e-5)


def one_block(method):
  """(output of the block as a function of theta, theta, what the MLP reads and gives, u)."""
  _, tuned, variables, theta = attached(method, depth=1)
  kept, inputs, outputs = seen({'norm': '{norm2}', 'mlp': '{mlp}', 'block': '{block}'})
  model = tuned.model
  whole = jpeft.attach(model, jpeft.chain(kept, method), variables, IMAGES)
  whole.apply(theta, variables, IMAGES, complete=True)
  found = types.SimpleNamespace(
    u=inputs['norm'], mlp=outputs['mlp'], block=inputs['block'], x=inputs['mlp']
  )
  outside = jpeft.attach(model, jpeft.chain(method, kept), variables, IMAGES)

  def block(theta):
    outside.apply(theta, variables, IMAGES)
    return outputs['block']

  return block, theta, found


def test_the_gradient_of_a_logit_is_the_mlp_times_the_slope_of_p():
  """dy/dl = MLP(LN2 u) p (1 - p) / tau, of active and of inactive tokens."""
  block, theta, found = one_block(dyt(4))
  gate = theta['dyt']['encoder/block_0/mlp']
  logits = found.u[:, 1:] @ gate['kernel'] + gate['bias']  # [B, N, 1]
  direction = jax.tree.map(jnp.zeros_like, theta)
  direction['dyt']['encoder/block_0/mlp']['bias'] = jnp.ones(1)  # moves all logits alike
  y, slope = jax.jvp(block, (theta,), (direction,))
  p = jax.nn.sigmoid(logits / TAU)
  expected = found.mlp[:, 1:] * p * (1 - p) / TAU
  active = np.asarray(logits[..., 0] > 0)
  assert active.any() and not active.all()
  for chosen in (active, ~active):
    np.testing.assert_allclose(slope[:, 1:][chosen], expected[chosen], atol=1e-6)
    assert np.abs(slope[:, 1:][chosen]).max() > 1e-3
  adapter = theta['dyt']['encoder/block_0']
  down, up = adapter['down'], adapter['up']
  added = jax.nn.relu(found.u @ down['kernel'] + down['bias']) @ up['kernel'] + up['bias']
  mask = np.concatenate([np.ones((2, 1)), active], 1)[..., None]
  np.testing.assert_allclose(y, found.u + mask * found.mlp + 0.1 * added, atol=1e-5)


def test_the_class_token_is_never_masked_and_moves_no_gate():
  block, theta, found = one_block(dyt(4))
  gate = theta['dyt']['encoder/block_0/mlp']
  shut = {'kernel': jnp.zeros_like(gate['kernel']), 'bias': jnp.full(1, -9.0)}
  closed = {'dyt': {**theta['dyt'], 'encoder/block_0/mlp': shut}}
  out = block(closed)
  adapter = theta['dyt']['encoder/block_0']
  down, up = adapter['down'], adapter['up']
  added = jax.nn.relu(found.u @ down['kernel'] + down['bias']) @ up['kernel'] + up['bias']
  rest = found.u + 0.1 * added
  np.testing.assert_allclose(out[:, 0], (rest + found.mlp)[:, 0], atol=1e-5)
  np.testing.assert_allclose(out[:, 1:], rest[:, 1:], atol=1e-5)
  grads = jax.grad(lambda theta: block(theta)[:, 0].sum())(theta)
  assert not any(x.any() for x in jax.tree.leaves(grads['dyt']['encoder/block_0/mlp']))
  assert any(x.any() for x in jax.tree.leaves(grads['dyt']['encoder/block_0']))


def vit_base(images=1, **fields):
  shapes = jax.ShapeDtypeStruct((images, 224, 224, 3), jnp.float32)
  model = jpeft.models.ViT(
    width=768, depth=12, heads=12, mlp_dim=3072, patch_size=16, num_classes=10, **fields
  )
  return full_size.of(model, shapes)


@pytest.mark.parametrize(
  ('width', 'adapters', 'scan'),
  [(8, 156_768, False), (8, 156_768, True), (16, 304_320, True), (64, 1_189_632, True)],
)
def test_the_counts_on_vit_base(width, adapters, scan):
  base = vit_base(scan=scan)
  tuned = jpeft.attach(base.model, dyt(width), *base.shapes)
  sizes = {path: x.size for path, x in leaf_paths(tuned.shapes).items()}
  gates = sum(size for path, size in sizes.items() if '/mlp/' in path)
  assert (sum(sizes.values()) - gates, gates) == (adapters, 9_228)
  assert jpeft.summary(tuned).trainable == adapters + 9_228


def test_four_experts_on_vit_base():
  base = vit_base(scan=True)
  tuned = jpeft.attach(base.model, dyt(64, experts=4), *base.shapes)
  expected = 4 * 1_189_632 + 12 * 768 * 4
  assert jpeft.summary(tuned).trainable == expected + 9_228 and round(expected / 1e6, 2) == 4.80


def test_the_divergence_sends_no_gradient_into_the_complete_pass():
  minimised = _Objective('dyt', 0.5, complete=0, distill=1, balance=0)
  outs = jnp.asarray(RNG.normal(size=(2, 4, 3)), jnp.float32)

  def value(outs):
    run = lambda complete=False: (outs[int(complete)], {'dyt_rate': jnp.ones((1, 4))})
    return minimised(TaskLoss(lambda out: 0.0, divergence), run)[0]

  found, grads = jax.value_and_grad(value)(outs)
  out, told = (jax.nn.softmax(x) for x in outs)
  assert found == pytest.approx(float((told * jnp.log(told / out)).sum(-1).mean()), rel=1e-5)
  assert not grads[1].any()
  np.testing.assert_allclose(grads[0], (out - told) / 4, atol=1e-6)


def with_adapter(adapter):
  model, variables = vit(depth=1)
  tuned = jpeft.attach(
    model, beside_norm_and_mlp('a', '{block}', '{norm2}', adapter), variables, IMAGES
  )
  return tuned, variables, noisy(tuned.init(jax.random.key(0), variables), 0.3)


PLAIN = Adapter('dyt', 'relu', 'lora', 0.0, 1.0, 4)


def test_one_expert_is_the_plain_adapter():
  plain, variables, theta = with_adapter(PLAIN)
  one, _, _ = with_adapter(Experts(PLAIN, 1))
  ((path, t),) = theta['a'].items()
  led = jax.tree.map(lambda x: x[None], t) | {'router': jnp.ones((32, 1))}
  found = one.apply({'a': {path: led}}, variables, IMAGES)
  np.testing.assert_allclose(found, plain.apply(theta, variables, IMAGES), atol=1e-6)


# Beyond it


def test_experts_are_weighed_for_each_image():
  """Of each image alone, the plain adapter of its own mean of the experts."""
  several, variables, theta = with_adapter(Experts(PLAIN, 3))
  plain, _, _ = with_adapter(PLAIN)
  ((path, t),) = theta['a'].items()
  kept, inputs, _ = seen({'norm': '{norm2}'})
  jpeft.attach(several.model, kept, variables, IMAGES).apply({}, variables, IMAGES)
  shares = jax.nn.softmax(inputs['norm'].mean(1) @ t['router'], -1)
  assert np.abs(shares - 1 / 3).max() > 0.05
  out = several.apply(theta, variables, IMAGES)
  for image, share in enumerate(shares):
    experts = {part: t[part] for part in ('down', 'up')}
    own = jax.tree.map(lambda x, share=share: jnp.tensordot(share, x, 1), experts)
    alone = plain.apply({'a': {path: own}}, variables, IMAGES[image : image + 1])
    np.testing.assert_allclose(out[image : image + 1], alone, atol=1e-5)


def test_beyond_the_budget_tokens_of_the_highest_logits_stay():
  logits = jnp.array([[0.1, 3, -1, 2, 0.2], [-1, -2, -3, -4, -5]])
  np.testing.assert_array_equal(np.sort(chosen_tokens(logits, 0.4)), [[1, 3], [0, 1]])
  assert chosen_tokens(jnp.zeros((1, 100)), 0.07).shape == (1, 7)
  assert chosen_tokens(jnp.zeros((1, 196)), 0.5).shape == (1, 98)
  method = dyt(4, budget=0.5)
  block, theta, found = one_block(method)
  gate = theta['dyt']['encoder/block_0/mlp']
  wide = {'kernel': gate['kernel'], 'bias': jnp.full(1, 9.0)}  # all four tokens are active
  theta = {'dyt': {**theta['dyt'], 'encoder/block_0/mlp': wide}}
  logits = (found.u[:, 1:] @ wide['kernel'] + wide['bias'])[..., 0]
  assert (logits > 0).all()
  shut = {'kernel': jnp.zeros_like(gate['kernel']), 'bias': jnp.full(1, -9.0)}
  rest = block({'dyt': {**theta['dyt'], 'encoder/block_0/mlp': shut}})
  through = np.asarray(jnp.abs(block(theta) - rest).max(-1) > 1e-6)[:, 1:]
  order = np.argsort(-logits, -1)[:, :2]
  np.testing.assert_array_equal(np.sort(np.argwhere(through)[:, 1].reshape(2, 2)), np.sort(order))


def test_training_minimises_the_sum_of_both_passes():
  """In a scan, blocks that run again draw the same noise."""
  loss = lambda out: jnp.mean(out**2)
  found = []
  for remat in (False, True):
    _, tuned, variables, theta = attached(dyt(4, rate=0.3), scan=True, remat=remat)

    def both(theta, tuned=tuned, variables=variables):
      value, out, aux = objective(tuned, theta, variables, loss)
      options = {'rngs': RNGS, 'deterministic': False}
      whole = tuned.apply(theta, variables, IMAGES, complete=True, **options)
      expected = loss(out) + loss(whole) + divergence(out, jax.lax.stop_gradient(whole))
      return value, expected + 2 * (aux['dyt_rate'].mean() - 0.3) ** 2

    (value, expected), grads = jax.jit(jax.value_and_grad(both, has_aux=True))(theta)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))
    found.append(grads)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *found)


def test_noise_in_training_alone():
  """A gate at 0 lets half of the tokens through in training, and none in evaluation."""
  images = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
  model = vit(depth=1)[0].clone(image_size=32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  variables = jax.tree.map(lambda x: jnp.ones(x.shape), variables)
  tuned = jpeft.attach(model, dyt(4), variables, images)
  theta = jax.tree.map(jnp.zeros_like, tuned.shapes)

  @jax.jit
  def rate(theta, key):
    options = {'rngs': {'dropout': key}, 'deterministic': False}
    return tuned.apply(theta, variables, images, aux=True, **options)[1]['dyt_rate']

  rates = [rate(theta, jax.random.key(i)) for i in range(2)]
  assert abs(np.mean(rates) - 0.5) < 0.06 and np.abs(rates[0] - rates[1]).max() > 0
  # P(l + G1 - G2 > 0) = sigmoid(l)
  open_gate = jax.tree.map(lambda x: jnp.full_like(x, 1.0) if x.shape == (1,) else x, theta)
  assert abs(rate(open_gate, jax.random.key(0)).mean() - jax.nn.sigmoid(1.0)) < 0.06
  assert not tuned.apply(theta, variables, images, aux=True)[1]['dyt_rate'].any()
  with pytest.raises(ValueError, match='dyt gate at .* needs a random key'):
    tuned.apply(theta, variables, images, deterministic=False)


def test_without_a_second_loss_there_is_one_pass():
  _, tuned, variables, theta = attached(dyt(4, complete=0, distill=0), depth=1)
  passes = []

  def run(**takes):
    passes.append(takes)
    return tuned.apply(theta, variables, IMAGES, aux=True, **takes)

  tuned.objective(run, jnp.sum)
  assert passes == [{}]


def test_it_cannot_be_merged():
  _, tuned, variables, theta = attached(dyt(4), depth=1)
  with pytest.raises(ValueError, match='dyt at .* changes the computation.*cannot be merged'):
    tuned.merge(theta, variables)


@pytest.mark.parametrize(
  ('hyperparameters', 'message'),
  [
    ({'rate': 1.5}, r'dyt: rate=1.5 must lie in \[0, 1\]'),
    ({'scale': 'learned'}, "dyt: scale='learned' must be a number"),
    ({'budget': 0}, r'dyt: budget=0 must lie in \(0, 1\], or be None'),
    ({'temperature': 0}, 'dyt: temperature=0 must be greater than 0'),
    ({'experts': 0}, 'dyt: experts=0 must be a whole number'),
    ({'distill': -1}, 'dyt: distill=-1 must be at least 0'),
    ({'bottleneck': 0}, 'dyt: bottleneck=0 must be a whole number'),
  ],
)
def test_hyperparameters_are_checked(hyperparameters, message):
  with pytest.raises(ValueError, match=message):
    dyt(**hyperparameters)


def test_an_mlp_before_the_norm_is_refused():
  model, variables = vit(depth=1)
  tuned = jpeft.attach(model, dyt(4, stream='{fc2}'), variables, IMAGES)
  theta = tuned.init(jax.random.key(0), variables)
  with pytest.raises(ValueError, match='is called before anything that stream='):
    tuned.apply(theta, variables, IMAGES)


@pytest.mark.parametrize('hyperparameters', [{'budget': 0.5}, {'experts': 2}], ids=str)
def test_decoders_do_not_look_ahead(hyperparameters):
  tokens = jnp.zeros((1, 4), jnp.int32)
  model = jpeft.models.Llama(width=16, depth=1, heads=2, kv_heads=2, mlp_dim=16, vocab=8)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  jpeft.attach(model, dyt(4), shapes, tokens)
  with pytest.raises(ValueError, match=f'dyt: {list(hyperparameters)[0]}=.* reads later tokens'):
    jpeft.attach(model, dyt(4, **hyperparameters), shapes, tokens)


# FLOPs


def forward(method, scan):
  """(a function of shapes, the shapes) of an evaluation of one image by ViT-B."""
  base = vit_base(scan=scan)
  tuned = jpeft.attach(base.model, method, *base.shapes)
  return jax.jit(tuned.apply), (tuned.shapes, *base.shapes)


def test_a_budget_saves_the_flops_of_the_other_tokens():
  """At r = 0.5 it is 71 % of the MLPs on all tokens, or less: 12.5 of 17.6 GFLOP, of which the
  paper counts one for a multiply-add."""
  counts = []
  for method in (jpeft.chain(), dyt(8), dyt(8, budget=0.5), dyt(64, budget=0.5)):
    fn, shapes = forward(method, scan=True)
    counts.append(flops(fn.trace(*shapes)).all / 2e9)
  plain, masked, narrow, wide = counts
  assert plain == pytest.approx(17.57, abs=0.01)
  assert 17.57 < masked < 17.63
  assert narrow / plain < 0.69 and wide / plain < 0.71
  saved = 98 * 12 * 2 * 768 * 3072 / 1e9  # the rows of 98 tokens in both maps of 12 MLPs
  assert masked - narrow == pytest.approx(saved, abs=1e-6)


@pytest.mark.slow
def test_the_compiled_program_has_these_flops():
  counts = []
  for method in (jpeft.chain(), dyt(64, budget=0.5)):
    fn, shapes = forward(method, scan=False)
    counts.append(fn.trace(*shapes).lower().compile().cost_analysis()['flops'] / 2e9)
  plain, gathered = counts
  print(f'{plain:.2f} GFLOP, gathered {gathered:.2f}')
  assert plain == pytest.approx(17.57, rel=0.02)  # XLA counts what is no product too
  assert gathered / plain < 0.71
