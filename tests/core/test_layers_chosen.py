"""`layers=`: rules in some layers of a model, unrolled or scanned."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.models.t5 import T5
from tests.contract.anatomies import described
from tests.core.small import (
  BLOCKS,
  Blocks,
  NnxBlocks,
  X,
  adapter,
  backbone,
  gain,
  low_rank,
  noisy,
  plain,
  shift,
  square,
  stacks,
  train,
)
from tests.fixtures import BACKBONES, leaf_paths

DEPTH = 6
UNROLLED = r'block_\d+'
STACK = 'blocks'
CHOICES = (1, '-2:', '::3', '0,4,-1', (2, 3), slice(None, 2), range(1, 6, 2))


def unrolled_of(held):
  """The variables of Blocks(DEPTH) with the layers of a scanned one."""
  stack = held['params'][STACK]
  return {'params': {f'block_{i}': jax.tree.map(lambda x, i=i: x[i], stack) for i in range(DEPTH)}}


def stacked(theta, name):
  """The theta of unrolled layers as one of a stack."""
  by_rest = {}
  for path in sorted(theta[name]):
    rest = path.partition('/')[2]
    by_rest.setdefault(rest, []).append(theta[name][path])
  joined = {
    f'{STACK}/{rest}'.rstrip('/'): jax.tree.map(lambda *x: jnp.stack(x), *layers)
    for rest, layers in by_rest.items()
  }
  return {name: joined}


METHODS = {
  'low': lambda targets: low_rank(f'{targets}/fc'),
  'low, boxed': lambda targets: low_rank(f'{targets}/fc', dot=False),
  'gain': lambda targets: gain(f'{targets}/fc'),
  'square': lambda targets: square(f'{targets}/fc'),
  'shift': lambda targets: shift(f'{targets}/fc'),
  'train': lambda targets: train(f'{targets}/fc'),
  'adapter': adapter,
  'two': lambda targets: jpeft.chain(low_rank(f'{targets}/fc'), gain(f'{targets}/fc')),
}


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('remat', ('scan', 'scan remat'))
def test_a_scanned_stack_is_the_unrolled_one_bit_for_bit(method, remat):
  scanned, unrolled = Blocks(DEPTH, remat), Blocks(DEPTH)
  held = backbone(scanned)
  flat = unrolled_of(held)
  layers = '1,4'
  one = jpeft.attach(unrolled, jpeft.in_layers(METHODS[method](UNROLLED), layers), flat, X)
  other = jpeft.attach(scanned, jpeft.in_layers(METHODS[method](STACK), layers), held, X)
  theta = noisy(one.init(jax.random.key(0), flat))
  joined = {}
  for name in theta:
    joined |= stacked(theta, name)
  chex.assert_trees_all_equal_shapes_and_dtypes(joined, other.shapes)
  assert jpeft.summary(one).trainable == jpeft.summary(other).trainable

  def run(tuned, theta, held):
    def loss(theta):
      out = tuned.apply(theta, held, X)
      return jnp.sum(out**2), out

    return jax.grad(loss, has_aux=True)(theta)

  grads, out = jax.jit(lambda *args: run(one, *args))(theta, flat)
  stack_grads, stack_out = jax.jit(lambda *args: run(other, *args))(joined, held)
  assert np.abs(out - plain(unrolled, flat, X)).max() > 1e-2
  np.testing.assert_array_equal(stack_out, out)
  for name in theta:
    chex.assert_trees_all_close(stack_grads[name], stacked(grads, name)[name], rtol=1e-5, atol=1e-5)
  if other.mergeable:
    merged = other.merge(joined, held)
    np.testing.assert_allclose(plain(scanned, merged, X), stack_out, rtol=1e-4, atol=1e-5)
    untouched = [i for i in range(DEPTH) if i not in (1, 4)]
    for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(held), strict=True):
      np.testing.assert_array_equal(x[np.array(untouched)], y[np.array(untouched)])


@pytest.mark.parametrize('layers', CHOICES, ids=str)
def test_theta_has_entries_for_the_chosen_layers(layers):
  wanted = {
    '1': [1],
    '-2:': [4, 5],
    '::3': [0, 3],
    '0,4,-1': [0, 4, 5],
    '(2, 3)': [2, 3],
    'slice(None, 2, None)': [0, 1],
    'range(1, 6, 2)': [1, 3, 5],
  }[str(layers)]
  unrolled = Blocks(DEPTH)
  tuned = jpeft.attach(unrolled, jpeft.in_layers(low_rank('.*/fc'), layers), backbone(unrolled), X)
  assert [site.path for _, site in tuned.rules] == [f'block_{i}/fc' for i in wanted]
  for model in (Blocks(DEPTH, 'scan'), NnxBlocks(DEPTH, 'scan')):
    held = backbone(model)
    tuned = jpeft.attach(model, jpeft.in_layers(low_rank('.*/fc'), layers), held, X)
    ((_, site),) = tuned.rules
    assert [site.numbers[i] for i in site.chosen] == wanted
    theta = tuned.init(jax.random.key(0), held)
    assert {x.shape[0] for x in jax.tree.leaves(theta)} == {len(wanted)}
    assert bool(jpeft.check(tuned, held, X)), str(jpeft.check(tuned, held, X))


@pytest.mark.parametrize('stack', ('', 'scan'))
def test_all_layers_are_as_without_a_choice(stack):
  model = Blocks(DEPTH, stack)
  held = backbone(model)
  tuned = jpeft.attach(model, jpeft.in_layers(low_rank('.*/fc'), ':'), held, X)
  free = jpeft.attach(model, low_rank('.*/fc'), held, X)
  chex.assert_trees_all_equal(
    tuned.init(jax.random.key(0), held), free.init(jax.random.key(0), held)
  )


def test_the_start_of_a_layer_does_not_depend_on_the_choice():
  model = Blocks(DEPTH, 'scan')
  held = backbone(model)
  all_layers = jpeft.attach(model, low_rank('.*/fc'), held, X).init(jax.random.key(0), held)
  some = jpeft.attach(model, jpeft.in_layers(low_rank('.*/fc'), '1,4'), held, X)
  chex.assert_trees_all_equal(
    some.init(jax.random.key(0), held), jax.tree.map(lambda x: x[np.array([1, 4])], all_layers)
  )


MODELS = stacks(DEPTH)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('layers', (None, '1,4'))
def test_rules_know_the_number_of_their_layer(name, layers):
  def init(key, site, arrays):
    return {'n': jnp.asarray(arrays.number, jnp.int32)}

  def apply(t, call, x):
    call.aux(theta=t['n'], here=jnp.asarray(call.number))
    return call(x)

  model = MODELS[name]()
  held = backbone(model)
  tuned = jpeft.attach(
    model, jpeft.at(BLOCKS, jpeft.Call('n', apply, init), layers=layers), held, X
  )
  _, aux = tuned.apply(tuned.init(jax.random.key(0), held), held, X, aux=True)
  wanted = np.arange(DEPTH) if layers is None else np.array([1, 4])
  np.testing.assert_array_equal(aux['theta'], wanted)
  np.testing.assert_array_equal(aux['here'], wanted)


@pytest.mark.parametrize('name', MODELS)
def test_taps_state_and_schedules_are_of_the_chosen_layers(name):
  def init(key, site, arrays):
    return {'n': jnp.zeros((), jnp.int32), 's': jnp.ones(())}

  def apply(t, call, x):
    call.tap(mean=x.mean())
    call.write(n=t['n'] + 1)
    leaves, tree = jax.tree.flatten(call(x))
    return jax.tree.unflatten(tree, [leaves[0] * t['s'], *leaves[1:]])

  def root(t, call, x):
    out = call(x)
    call.aux(taps=jnp.concatenate([taps['mean'].reshape(-1) for taps in call.taps().values()]))
    return out

  update = lambda t, site, step, key: {**t, 'n': t['n'] + 10}
  model = MODELS[name]()
  held = backbone(model)
  method = jpeft.chain(
    jpeft.at(BLOCKS, jpeft.Call('m', apply, init, update=update), layers='1,4'),
    jpeft.at('', jpeft.Call('m', root)),
  )
  tuned = jpeft.attach(model, method, held, X)
  theta = tuned.init(jax.random.key(0), held)
  _, aux = jax.jit(lambda theta, held: tuned.apply(theta, held, X, aux=True))(theta, held)
  chex.assert_shape(aux['taps'], (1, 2))
  after = tuned.update(tuned.write_back(theta, aux), 1, jax.random.key(0))
  chex.assert_trees_all_equal_shapes_and_dtypes(after, theta)
  assert all((x == 11).all() for path, x in leaf_paths(after).items() if path.endswith('/n'))


@pytest.mark.parametrize('name', ('linen_vit', 'linen_vit_scan', 'nnx_vit', 'linen_bert'))
def test_layers_of_models_with_a_family(name):
  b = BACKBONES[name]
  with described(b):
    sites = jpeft.sites_of(b.model, b.backbone, *b.args, **b.kwargs)
  found = sites.find('{q}')
  numbers = [number for site in found for number in site.numbers]
  assert numbers == list(range(b.depth)) and {site.depth for site in found} == {b.depth}
  assert all(site.numbers == () for site in sites.find('{head}|{embed}'))


@pytest.mark.parametrize('scan', (False, True))
def test_an_encoder_and_a_decoder_are_numbered_apart(scan):
  model = T5(
    width=32, depth=3, decoder_depth=2, heads=4, mlp_dim=64, vocab=50, head_dim=8, scan=scan
  )
  tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
  held = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
  tuned = jpeft.attach(model, jpeft.in_layers(jpeft.lora(2), '-1'), held, tokens, tokens)
  last = {}
  for _, site in tuned.rules:
    chosen = [site.numbers[i] for i in site.chosen or (0,)]
    last.setdefault(site.path.partition('/')[0], set()).update(chosen)
  assert last == {'encoder': {2}, 'decoder': {1}}


def test_a_choice_and_a_head():
  b = BACKBONES['linen_vit']
  with described(b):
    method = jpeft.chain(jpeft.in_layers(jpeft.lora(2), '-1:'), jpeft.tune('{head}'))
    tuned = jpeft.attach(b.model, method, b.backbone, *b.args, **b.kwargs)
  paths = {site.path for rule, site in tuned.rules if rule.name == 'lora'}
  assert paths and all('encoderblock_1' in path for path in paths)
  assert {site.path for rule, site in tuned.rules if rule.name == 'tune'} == {'head'}


@pytest.mark.parametrize(
  ('layers', 'message'),
  (
    (6, 'layers=6 is not among the 6 layers, 0 to 5 or -6 to -1'),
    ('first', "layers='first' is no choice of layers"),
    ('6:', "low: none of the 6 sites that match '.\\*/fc' is in the layers '6:'"),
  ),
)
def test_a_choice_that_means_nothing(layers, message):
  model = Blocks(DEPTH)
  with pytest.raises(ValueError, match=message):
    jpeft.attach(model, jpeft.in_layers(low_rank('.*/fc'), layers), backbone(model), X)


def test_a_rule_that_changes_shapes_in_some_layers_of_a_stack():
  def longer(t, call, x):
    return call(jnp.concatenate([x, x]))

  def never(t, call, x):
    return x

  model = Blocks(DEPTH, 'scan')
  held = backbone(model)
  for fn, message in ((longer, 'it must keep shapes'), (never, 'called it 0 times')):
    tuned = jpeft.attach(model, jpeft.at('blocks/fc', jpeft.Call('m', fn), layers=0), held, X)
    with pytest.raises(ValueError, match=message):
      tuned.apply({}, held, X)


def test_one_name_in_different_layers_of_a_site():
  model = Blocks(DEPTH, 'scan')
  method = jpeft.chain(
    jpeft.in_layers(low_rank('blocks/fc'), 0), jpeft.in_layers(low_rank('blocks/fc'), 1)
  )
  with pytest.raises(ValueError, match="two rules called 'low' act in different layers"):
    jpeft.attach(model, method, backbone(model), X)


def test_methods_print_and_compare_their_layers():
  method = jpeft.in_layers(jpeft.lora(4), [0, 2])
  assert repr(method).startswith('in_layers(lora(rank=4') and repr(method).endswith(', (0, 2))')
  assert method == jpeft.in_layers(jpeft.lora(4), (0, 2)) != jpeft.lora(4)
  assert hash(jpeft.in_layers(jpeft.lora(4), slice(-4, None)))


@pytest.mark.parametrize('layers', ('!1,-1', '!:2', '!-1'))
def test_everything_but_a_choice(layers):
  model = Blocks(DEPTH, 'scan')
  held = backbone(model)
  tuned = jpeft.attach(model, jpeft.in_layers(low_rank('blocks/fc'), layers), held, X)
  ((_, site),) = tuned.rules
  left_out = set(np.arange(DEPTH)[eval(f'np.r_[{layers[1:]}]')])
  assert set(site.chosen) == set(range(DEPTH)) - left_out


def test_everything_but_a_choice_has_what_lies_outside_of_layers():
  b = BACKBONES['linen_vit']
  with described(b):
    method = jpeft.in_layers(jpeft.norm(), '!-1:')
    tuned = jpeft.attach(b.model, method, b.backbone, *b.args, **b.kwargs)
  assert {site.numbers for _, site in tuned.rules} == {(0,), ()}
