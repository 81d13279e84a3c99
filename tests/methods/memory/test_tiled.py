"""MLPs on some tokens at a time: the numbers of whole ones, smaller arrays, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.models import Llama
from tests.contract.anatomies import described
from tests.fixtures import BACKBONES, noisy
from tests.traced import variables_of

TOKENS = jax.random.randint(jax.random.key(0), (2, 11), 0, 50)
HIDDEN = 64
SIZES = {'vocab': 50, 'width': 32, 'heads': 2, 'kv_heads': 1, 'mlp_dim': HIDDEN}
TILED = jpeft.tiled(4)  # pieces of 4, 4 and 3 tokens
LORA = jpeft.lora(2, targets='{linear}')
UNROLLED = {'depth': 1}
SCANNED = {'depth': 2, 'scan': True, 'remat': True}


def llama(**fields):
  model = Llama(**SIZES, **fields)
  return model, noisy(model.init(jax.random.key(1), TOKENS), 0.1)


def loss_of(method, model, backbone, *args, **kwargs):
  """((theta, backbone, args) -> (a scalar of the output, the output), theta)."""
  tuned = jpeft.attach(model, method, backbone, *args, **kwargs)
  theta = noisy(tuned.init(jax.random.key(2), backbone), 0.1)

  def loss(theta, backbone, args):
    out = tuned.apply(theta, backbone, *args, **kwargs)
    return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

  return loss, theta


def assert_near(found, wanted):
  """To 1e-6 of the largest number of each array."""

  def near(x, y):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6 * float(jnp.abs(y).max(initial=0)))

  jax.tree.map(near, found, wanted)


def check(method, model, backbone, *args, **kwargs):
  found = []
  for chosen in (jpeft.chain(method, TILED), method):
    loss, theta = loss_of(chosen, model, backbone, *args, **kwargs)
    found.append(jax.jit(jax.grad(loss, has_aux=True))(theta, backbone, args))
  assert_near(*found)


CASES = {
  'adapters': (jpeft.chain(jpeft.houlsby(2), jpeft.adaptformer(2)), UNROLLED),
  'qst': (jpeft.qst(), SCANNED),
  'full': (jpeft.full(), UNROLLED),
  'lst': (jpeft.lst(2, block='mlp', downsample='pool'), UNROLLED),
  'kept': (LORA, {'depth': 2, 'scan': True}),
}
SLOW = ('full', 'lst', 'kept')


@pytest.mark.parametrize(
  'name', [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]
)
def test_the_numbers_are_those_of_whole_mlps(name):
  method, fields = CASES[name]
  check(method, *llama(**fields), TOKENS)


def test_of_4_bit_kernels_with_blocks_recomputed():
  model, variables = llama(**SCANNED)
  check(LORA, model, jpeft.quantize(model, jpeft.nf4(32), variables, TOKENS), TOKENS)


def test_of_a_model_of_ones_own():
  b = BACKBONES['nnx_vit']
  with described(b):
    check(LORA, b.model, b.backbone, *b.args, **b.kwargs)


@pytest.mark.parametrize('fields', [UNROLLED, SCANNED], ids=['kept', 'recomputed'])
def test_no_hidden_array_is_whole(fields):
  model, variables = llama(**fields)

  def largest(method):
    loss, theta = loss_of(method, model, variables, TOKENS)
    program = jax.make_jaxpr(jax.grad(loss, has_aux=True))(theta, variables, (TOKENS,))
    arrays = [v.aval for v in variables_of(program.jaxpr)]
    return max(x.size for x in arrays if x.shape[-2:] in ((4, HIDDEN), (11, HIDDEN)))

  assert largest(jpeft.chain(LORA, TILED)) == 2 * 4 * HIDDEN
  assert largest(LORA) >= 2 * 11 * HIDDEN


def test_a_mesh_cuts_examples_and_gathers_nothing():
  model, variables = llama(**SCANNED)
  loss, theta = loss_of(jpeft.chain(LORA, TILED), model, variables, TOKENS)
  gradient = jax.jit(jax.grad(loss, has_aux=True))
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('data',))
  spread = jax.device_put(TOKENS, NamedSharding(mesh, P('data')))
  given = jax.device_put((theta, variables), NamedSharding(mesh, P()))
  compiled = gradient.lower(*given, (spread,)).compile()
  assert 'all-gather' not in compiled.as_text()
  found, wanted = compiled(*given, (spread,)), gradient(theta, variables, (TOKENS,))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, wanted)


def test_a_cache_of_earlier_tokens_is_the_same():
  model, variables = llama(**UNROLLED)
  found = []
  for method in (LORA, jpeft.chain(LORA, TILED)):
    tuned = jpeft.attach(model, method, variables, TOKENS)
    theta = noisy(tuned.init(jax.random.key(2), variables), 0.1)
    _, cache = tuned.apply(theta, variables, TOKENS, mutable=['cache'])
    out, _ = tuned.apply(theta, {**variables, **cache}, TOKENS[:, :1], mutable=['cache'])
    found.append((cache, out))
  assert_near(*found)
  merged = [tuned.merge(theta, variables) for tuned in (tuned, tuned.only('lora'))]
  jax.tree.map(np.testing.assert_array_equal, *merged)


def test_what_drops_out_is_refused():
  model, variables = llama(**UNROLLED)
  method = jpeft.chain(jpeft.lora(2, targets='{fc1}', dropout=0.1), TILED)
  tuned = jpeft.attach(model, method, variables, TOKENS)
  rngs = {'dropout': jax.random.key(0)}

  def train(theta):
    return tuned.apply(theta, variables, TOKENS, rngs=rngs, deterministic=False)

  with pytest.raises(
    ValueError, match="mlp' cannot run on some tokens at a time: .* random number"
  ):
    jax.eval_shape(train, tuned.shapes)


def test_what_records_inside_is_refused():
  def apply(t, call, x):
    y = call(x)
    call.aux(mean=y.mean(-1))
    return y

  model, variables = llama(**UNROLLED)
  records = jpeft.at('{fc2}', jpeft.Call('mean', apply))
  tuned = jpeft.attach(model, jpeft.chain(records, TILED), variables, TOKENS)
  tuned.apply({}, variables, TOKENS)  # where nobody asks, nothing is lost
  with pytest.raises(ValueError, match='mean at .*fc2.* records arrays'):
    tuned.apply({}, variables, TOKENS, aux=True)


def test_tokens_are_a_whole_number():
  with pytest.raises(ValueError, match='tiled: tokens=0 must be a whole number, at least 1'):
    jpeft.tiled(0)
