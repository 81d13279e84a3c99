"""Losses of texts without whole logits: equal to those of whole logits, and smaller."""

import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval as pe
from jax.sharding import NamedSharding, PartitionSpec

import jpeft
from jpeft import ANATOMIES, models, planning, programs, register_anatomy, tasks, training
from jpeft.contract import distance
from jpeft.core import NotAtHead
from jpeft.models import Llama
from jpeft.models.llama.naming import LLAMA_NAMING
from jpeft.tasks import teachers
from jpeft.tasks.pieces import in_pieces
from tests.contract.anatomies import described
from tests.fixtures import BACKBONES, noisy
from tests.runs import BERT
from tests.traced import variables_of

TOKENS = jax.random.randint(jax.random.key(0), (2, 11), 0, 50)
LABELS = jnp.where(TOKENS % 5 == 0, -1, (TOKENS * 7) % 50)
SIZES = {'vocab': 50, 'width': 16, 'depth': 2, 'heads': 2, 'kv_heads': 1, 'mlp_dim': 24}


def model_of(**fields):
  model = Llama(**SIZES, **fields)
  return model, noisy(model.init(jax.random.key(1), TOKENS), 0.1)


def losses_and_gradients(method, model, variables, smoothing):
  tuned = jpeft.attach(model, method, variables, TOKENS)
  pieces, why = in_pieces(tuned, smoothing, most=2 * 50 * 3)  # of three tokens
  assert why == ''
  theta = noisy(tuned.init(jax.random.key(2), variables))
  weights = jnp.linspace(0.5, 1.5, LABELS.size).reshape(LABELS.shape)

  def whole(theta):
    logits = tuned.apply(theta, variables, TOKENS)
    right = (logits.argmax(-1) == LABELS) & (LABELS >= 0)
    losses = tasks.loss(logits, LABELS, smoothing)
    return (losses * weights).sum(), jnp.stack([losses, right.astype(jnp.float32)], -1)

  def cut(theta):
    losses = pieces.apply(theta, variables, TOKENS, labels=LABELS)
    return (losses[..., 0] * weights).sum(), losses

  return [jax.jit(jax.value_and_grad(fn, has_aux=True))(theta) for fn in (whole, cut)]


METHODS = {
  'lora': jpeft.lora(2),
  'lst': jpeft.lst(2),
  'qst': jpeft.qst(),
  'vpt': jpeft.vpt_deep(2),
}


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('fields', [{}, {'tied': True}, {'scan': True, 'remat': True}], ids=str)
@pytest.mark.parametrize('name', METHODS)
def test_of_a_frozen_head(name, fields, smoothing):
  whole, cut = losses_and_gradients(METHODS[name], *model_of(**fields), smoothing)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), whole, cut)


@pytest.mark.parametrize(
  'method', [jpeft.full(), jpeft.lora(2, targets='{q}|{head}')], ids=['full', 'lora']
)
def test_of_a_trained_head(method):
  whole, cut = losses_and_gradients(method, *model_of(), 0.1)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), whole, cut)


@pytest.mark.parametrize('width', [11, 22])
def test_of_as_many_tokens_as_features(width):
  """What the word table reads and gives is told apart by more than one size."""
  model = Llama(**{**SIZES, 'width': width}, head_dim=4, tied=True)
  variables = model.init(jax.random.key(1), TOKENS)
  tuned = jpeft.attach(model, jpeft.lora(2), variables, TOKENS)
  pieces, why = in_pieces(tuned, most=2 * 50 * 3)
  assert why == ''
  theta = noisy(tuned.init(jax.random.key(2), variables))
  losses = pieces.apply(theta, variables, TOKENS, labels=LABELS)[..., 0]
  want = tasks.loss(tuned.apply(theta, variables, TOKENS), LABELS)
  np.testing.assert_allclose(losses, want, rtol=1e-5, atol=1e-6)


def test_of_a_tied_table_that_is_trained():
  """Its gradient comes from the tokens and from the head."""
  whole, cut = losses_and_gradients(jpeft.full(), *model_of(tied=True), 0.0)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), whole, cut)


@pytest.mark.parametrize('method', [jpeft.full(), jpeft.lora(2)], ids=['full', 'lora'])
@pytest.mark.parametrize('tied', [False, True], ids=['head', 'tied'])
def test_of_logits_with_a_soft_cap(tied, method):
  """The cap is within what runs on some tokens at a time."""
  caps = {'final_cap': 0.2, 'logit_cap': 0.5}
  whole, cut = losses_and_gradients(method, *model_of(tied=tied, **caps), 0.1)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), whole, cut)


MASKED = models.from_config({**BERT, 'vocab_size': 50}, head='masked')


@pytest.mark.parametrize('method', [jpeft.full(), jpeft.lora(2)], ids=['full', 'lora'])
def test_of_a_head_of_masked_words(method):
  """The word table makes the logits, and the head adds a bias."""
  variables = noisy(MASKED.init(jax.random.key(1), TOKENS), 0.1)
  whole, cut = losses_and_gradients(method, MASKED, variables, 0.1)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), whole, cut)


@pytest.mark.parametrize('name', ['linen_gemma', 'nnx_llama', 'nnx_raw'])
def test_of_models_of_others(name):
  b = BACKBONES[name]
  with described(b):
    tuned = jpeft.attach(b.model, jpeft.lora(2, targets='{o}'), b.backbone, *b.args, **b.kwargs)
  pieces, why = in_pieces(tuned, most=2 * 50 * 4)
  assert why == ''
  theta = noisy(tuned.init(jax.random.key(0), b.backbone))
  labels = jnp.roll(b.args[0], -1, 1)

  def whole(theta):
    return tasks.loss(tuned.apply(theta, b.backbone, *b.args, **b.kwargs), labels).sum()

  def cut(theta):
    out = pieces.apply(theta, b.backbone, *b.args, labels=labels, **b.kwargs)
    return out[..., 0].sum()

  found = [jax.jit(jax.value_and_grad(fn))(theta) for fn in (whole, cut)]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *found)


@pytest.mark.parametrize('model', [Llama(**SIZES), MASKED], ids=['llama', 'masked'])
def test_no_array_is_as_large_as_the_logits(model):
  variables = noisy(model.init(jax.random.key(1), TOKENS), 0.1)
  tuned = jpeft.attach(model, jpeft.lora(2), variables, TOKENS)
  pieces, _ = in_pieces(tuned, most=2 * 50 * 2)
  theta = tuned.init(jax.random.key(0), variables)

  def cut(theta):
    return pieces.apply(theta, variables, TOKENS, labels=LABELS)[..., 0].sum()

  traced = jax.make_jaxpr(jax.grad(cut))(theta)
  # Of a table before the head a constant stands for the logits, which nothing reads.
  live, _ = pe.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
  vocabulary = [v.aval.shape for v in variables_of(live) if 50 in v.aval.shape]
  assert vocabulary and max(math.prod(shape) for shape in vocabulary) <= max(2 * 50 * 2, 50 * 16)
  # And the head is multiplied with as often as for whole logits: once forwards, once backwards.
  whole = lambda theta: tasks.loss(tuned.apply(theta, variables, TOKENS), LABELS).sum()
  flops = [programs.flops(jax.jit(jax.grad(fn)).trace(theta)).all for fn in (cut, whole)]
  assert flops[0] <= 1.1 * flops[1]


class Capped(nn.Module):
  """A decoder that caps its logits behind the head."""

  @nn.compact
  def __call__(self, tokens):
    return jnp.tanh(Llama(**SIZES, name='inner')(tokens))


def test_what_cannot_be_cut_says_why():
  model, variables = model_of()
  attach = lambda method: jpeft.attach(model, method, variables, TOKENS)
  reasons = {
    'wraps the head': jpeft.at('{head}', jpeft.Call('own', lambda t, call, *a: call(*a))),
    'drops out at the head': jpeft.lora(2, targets='{head}', dropout=0.1),
  }
  for reason, method in reasons.items():
    tuned = attach(method)
    same, why = in_pieces(tuned)
    assert same is tuned and reason in why
  outer = Capped()
  held = outer.init(jax.random.key(0), TOKENS)
  roles = {role: f'inner/{path}' for role, path in LLAMA_NAMING.roles.items()}
  register_anatomy(dataclasses.replace(LLAMA_NAMING, name='capped', roles=roles))
  try:
    tuned = jpeft.attach(outer, jpeft.tune('inner/final_norm'), held, TOKENS)
    pieces, why = in_pieces(tuned)
  finally:
    del ANATOMIES['capped']
  assert why == ''
  with pytest.raises(NotAtHead, match='the model changes what its head returns'):
    pieces.apply(tuned.init(jax.random.key(0), held), held, TOKENS, labels=LABELS)


@pytest.mark.aot
def test_the_head_of_a_language_model_of_8b():
  """4 x 2,048 tokens of width 4,096 and 128,256 words: 126 MiB beside the arguments, not 2,004."""
  pytest.importorskip('libtpu')
  where = planning.target('tpu:v5e')
  everywhere = NamedSharding(where.mesh(), PartitionSpec())

  def spec(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

  def whole(x, kernel, labels):
    return tasks.loss(x @ jax.lax.stop_gradient(kernel), labels).sum()

  def cut(x, kernel, labels):
    kernel = jax.lax.stop_gradient(kernel)
    return tasks.token_losses(lambda w, x: x @ w, kernel, x, labels, size=128)[..., 0].sum()

  shapes = spec(4, 2048, 4096), spec(4096, 128256), spec(4, 2048, dtype=jnp.int32)
  temporary = []
  flops = []
  for fn in (whole, cut):
    traced = jax.jit(jax.value_and_grad(fn)).trace(*shapes)
    memory = programs.memory(programs.compiled(traced, where.options, programs.nbytes(shapes)))
    temporary.append(memory.temp / 2**20)
    flops.append(programs.flops(traced).all)
  assert temporary[0] > 2000 and temporary[1] < 160
  assert flops[1] <= 1.1 * flops[0]


@pytest.mark.parametrize(
  ('length', 'size', 'parts'), [(12, 4, 2), (13, 6, 3), (8, 8, 1), (5, 2, 2)]
)
def test_pieces_have_the_tokens_of_all_parts(length, size, parts):
  x = np.arange(2 * length).reshape(2, length, 1)
  pieces = teachers.cut(jnp.asarray(x), size, parts, -1)
  np.testing.assert_array_equal(teachers.joined(pieces, length, parts), x)
  first = pieces[0, 0, :: size // parts, 0]
  np.testing.assert_array_equal(first, np.arange(parts) * -(-length // parts))


def test_devices_that_share_a_row_work_at_the_same_piece():
  """The stream is never gathered: each device makes the logits of its own tokens."""
  model, variables = model_of()
  tuned = jpeft.attach(model, jpeft.lora(2), variables, TOKENS)
  theta = noisy(tuned.init(jax.random.key(2), variables))
  mesh = training.mesh(1, 1, 2)
  batch = TOKENS[:, :10], LABELS[:, :10]
  spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec('data', 'sequence')))

  def step(parts):
    pieces, _ = in_pieces(tuned, 0.1, most=2 * 50 * 2, parts=parts)

    def total(theta, tokens, labels):
      return pieces.apply(theta, variables, tokens, labels=labels)[..., 0].sum()

    return jax.jit(jax.value_and_grad(total))

  whole = step(1)(theta, *batch)
  program = step(2).lower(theta, *spread).compile()
  found = program(theta, *spread)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), found, whole)
  sent = [one for one in programs.collectives(program, mesh.shape) if 'head' in one.source]
  assert not any(one.loops for one in sent), sent


@pytest.mark.parametrize('teacher', [False, True], ids=['labels', 'teacher'])
@pytest.mark.parametrize('method', [jpeft.lora(2), jpeft.tune('{head}')], ids=['frozen', 'trained'])
def test_a_head_whose_words_lie_on_several_devices(method, teacher):
  """Each device makes the logits of its words; neither the head nor logits are ever gathered."""
  words = 512
  model = Llama(**{**SIZES, 'vocab': words})
  variables = noisy(model.init(jax.random.key(1), TOKENS), 0.1)
  tuned = jpeft.attach(model, method, variables, TOKENS)
  pieces, _ = in_pieces(tuned, 0.1, most=2 * words * 4)
  states, _ = tasks.head_states(tuned, most=2 * words * 4)
  theta = noisy(tuned.init(jax.random.key(2), variables))

  def losses(theta, variables, tokens, labels):
    if teacher:
      told = states.apply(tuned.init(jax.random.key(3), variables), variables, tokens, states=True)
      labels = tasks.Taught(labels, told, temperature=2.0)
    return pieces.apply(theta, variables, tokens, labels=labels)[..., 0].sum()

  mesh = training.mesh(2, 4)
  everywhere = training.replicated(mesh)
  rows = training.over_data(mesh)
  layout = training.Layout(tuned, mesh, 'sharded', whole_below=0)
  where = everywhere, layout.of_backbone(variables), rows, rows
  spread = jax.jit(jax.value_and_grad(losses), in_shardings=where)
  given = theta, variables, TOKENS, LABELS
  whole = jax.jit(jax.value_and_grad(losses))(*given)
  # Sums in another order differ by the rounding of the largest terms, not of what is left of them.
  for got, want in zip(jax.tree.leaves(spread(*given)), jax.tree.leaves(whole), strict=True):
    assert distance(got, want) < 5e-6
  text = spread.lower(*given).compile().as_text()
  gathered = re.findall(r'= (.*?) all-gather(?:-start)?\(', text)
  sizes = [
    math.prod(int(size) for size in shape.split(',') if size)
    for kinds in gathered
    for shape in re.findall(r'\w+\[([\d,]*)\]', kinds)
  ]
  assert (
    'all-reduce' in text and max(sizes, default=0) < 2 * 4 * words / 4
  )  # of a piece of logits, on 2 x 4 devices
