"""What a writer of rules is told: one sentence with the rule, the place and the way out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft import Call, Weight, at, chain, matrix

X = jax.ShapeDtypeStruct((4, 6), jnp.float32)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, scale=1.0):
    return x + jnp.tanh(nn.Dense(x.shape[-1], name='fc')(x)) * scale


class Model(nn.Module):
  @nn.compact
  def __call__(self, x):
    for i in range(2):
      x = Block(name=f'block_{i}')(x, scale=2.0)
    return nn.Dense(3, name='head')(x)


def traced(method, model=None, kwargs=()):
  """Attaches a method and traces one call."""
  model = model or Model()
  held = jax.eval_shape(model.init, jax.random.key(0), X)
  tuned = jpeft.attach(model, method, held, X)
  return jax.eval_shape(
    lambda theta, held, x: tuned.apply(theta, held, x, **dict(kwargs)), tuned.shapes, held, X
  )


def same(t, call, *args, **kwargs):
  return call(*args, **kwargs)


def one(key, site, arrays):
  return {'z': jnp.ones(())}


def whole(key, w):
  return {'z': jnp.ones(())}


def scaled(t, w):
  return w * t['z']


def weight_of(apply, init=one):
  return at('head', Weight('m', init, apply))


def call_of(apply, init=None, where='head', **fields):
  if init is not None:
    fields['init'] = init
  return at(where, Call('m', apply, **fields))


def dot_of(dot):
  return at('head', matrix('m', whole, scaled, dot))


MISTAKES = {
  # ---- Where a rule acts.
  'a pattern of nothing': (
    at('blok_0', Call('m', same)),
    "no site matches: 'blok_0'. Near it.*block_0",
  ),
  'a pattern of a prefix': (
    at('block', Call('m', same)),
    "no site matches: 'block'. Near it.*block_0",
  ),
  'one alternative of nothing': (
    at('head|haed', Call('m', same)),
    "of 'head|haed', 'haed' names nothing: leave it out",
  ),
  'a role without a family': (at('{q}', Call('m', same)), 'uses the role {q}.*register_anatomy'),
  'a method that is not called': (
    call_of(same, method='attend'),
    r"none has what it adapts, a call of its method 'attend' \(called: __call__",
  ),
  'no array to adapt': (at('block_0', matrix('m', whole, scaled)), 'none has what it adapts'),
  'layers that there are not': (
    at('.*/fc', Call('m', same), layers=7),
    'layers=7 is not among the 2',
  ),
  'layers by a word': (at('.*/fc', Call('m', same), layers='last'), "layers='last' is no choice"),
  'layers at the head': (at('head', Call('m', same), layers=0), "'head' is in the layers 0"),
  # ---- Names.
  'two rules of one name': (
    chain(call_of(same), call_of(same)),
    "two rules called 'm' meet at 'head'.*another name=",
  ),
  'a Weight and a Call of one name': (
    chain(weight_of(lambda t, site, arrays: {'kernel': arrays['kernel'] * t['z']}), call_of(same)),
    "two rules called 'm' meet at 'head'",
  ),
  'a name with a slash': (at('head', Call('a/b', same)), "'a/b', must not be empty or have"),
  'no name': (at('head', Call('', same)), 'must not be empty'),
  # ---- What a Weight returns.
  'apply misspells an array': (
    weight_of(lambda t, site, arrays: {'kernl': arrays['kernel']}),
    "'m' at 'head' returns 'kernl'.*bias, kernel; did you mean 'kernel'",
  ),
  'apply returns another shape': (
    weight_of(lambda t, site, arrays: {'kernel': arrays['kernel'][:5]}),
    "'m' at 'head' returns 'kernel' of shape \\(5, 3\\), and the array is \\(6, 3\\)",
  ),
  'apply reads what init lacks': (
    weight_of(lambda t, site, arrays: {'kernel': arrays['kernel'] * t['y']}),
    "'y'\nin apply of the rule 'm' at 'head'",
  ),
  'apply reads an array that is not there': (
    weight_of(lambda t, site, arrays: {'kernel': arrays['weight']}),
    "'weight'\nin apply of the rule 'm' at 'head'",
  ),
  'init reads an array that is not there': (
    weight_of(lambda t, site, arrays: {}, init=lambda key, site, arrays: {'z': arrays['weight']}),
    "'weight'\nin init of the rule 'm' at 'head'",
  ),
  'init reads an array of the model that is not there': (
    weight_of(
      lambda t, site, arrays: {'kernel': arrays['kernel'] * t['z']},
      init=lambda key, site, arrays: {'z': arrays.model['tail/kernel'].sum()},
    ),
    "'tail/kernel'\nin init of the rule 'm' at 'head'",
  ),
  'init returns an array': (
    call_of(same, lambda key, site, arrays: jnp.ones(3)),
    "'m' at 'head' must return a dict",
  ),
  'init returns nothing': (
    call_of(same, lambda key, site, arrays: None),
    "'m' at 'head' must return a dict of arrays, not NoneType",
  ),
  'fixed names nothing': (
    call_of(same, one, fixed=('y',)),
    "m: fixed='y' names no entry.*there are z",
  ),
  'exact names nothing': (
    call_of(same, one, exact=('y',)),
    "m: exact='y' names no entry.*there are z",
  ),
  'an unknown requirement': (None, "requires='inputs' must be one of"),
  # ---- dot.
  'dot returns another shape': (
    dot_of(lambda t, x, y, w, key: y[..., :2]),
    "'m' at 'head' makes \\(4, 2\\) of an output \\(4, 3\\)",
  ),
  'dot transposes its operand': (
    dot_of(lambda t, x, y, w, key: y + x.T),
    "an Operand has no 'T': it multiplies matrices by @",
  ),
  'dot reads an entry that is not there': (
    dot_of(lambda t, x, y, w, key: y * t['y']),
    "'y'\nin dot of the rule 'm' at 'head'",
  ),
  # ---- What a Call does with the call.
  'a rule lacks an argument': (
    call_of(lambda t, call, x: call(x), where='block_0'),
    "unexpected keyword argument 'scale'\nin apply of the rule 'm' at 'block_0'",
  ),
  'a rule drops a keyword': (
    call_of(lambda t, call, x, **kwargs: call(x), where='block_0'),
    "'m' at 'block_0' drops arguments of the call \\(scale\\): take and pass on",
  ),
  'a rule drops an argument by position': (
    call_of(lambda t, call, *args, **kwargs: call(**kwargs), where='block_0'),
    "'m' at 'block_0' drops arguments of the call \\(1 by position\\)",
  ),
  'a rule returns nothing': (
    call_of(lambda t, call, x: None),
    "'m' at 'head' returns nothing: return what the call gives",
  ),
  'a rule forgets to return': (
    call_of(lambda t, call, x: (call(x), None)[1]),
    "'m' at 'head' returns nothing",
  ),
  'arguments of apply at a layer': (
    call_of(same, takes=('alpha',)),
    "m at 'head': takes=\\('alpha',\\) are arguments of tuned.apply",
  ),
  'outer without a call around': (
    call_of(lambda t, call, x: call(x) + call.outer['u']),
    "not subscriptable\nin apply of the rule 'm' at 'head'",
  ),
  'a key where none came': (
    call_of(lambda t, call, x: call(x) + jax.random.normal(call.rng('noise'))),
    "NoneType.*\nin apply of the rule 'm' at 'head'",
  ),
  'taps that nobody records': (
    at('', Call('m', lambda t, call, x: (call(x), call.taps())[0])),
    "m at '' reads taps, and no rule of that name has recorded any before",
  ),
  'state that is trained': (
    call_of(lambda t, call, x: (call.write(z=1.0), call(x))[1], one),
    'is trained: name it in fixed=',
  ),
  'state that is not there': (
    call_of(lambda t, call, x: (call.write(y=1.0), call(x))[1], one),
    "writes 'y', and its theta has z",
  ),
  'two losses': (
    chain(
      at('', Call('one', same, loss=lambda loss, run: None)),
      at('', Call('two', same, loss=lambda loss, run: (0, 1))),
    ),
    'one and two each say what training minimises',
  ),
  'a theta of another method': ('theta', "theta has no entry 'm' for 'head' \\(it holds other\\)"),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_told_in_a_sentence(mistake):
  method, message = MISTAKES[mistake]
  with pytest.raises(Exception, match=message):
    if method is None:
      Weight('m', one, same, requires='inputs')
    elif method == 'theta':
      model = Model()
      held = jax.eval_shape(model.init, jax.random.key(0), X)
      tuned = jpeft.attach(model, call_of(same, one), held, X)
      jax.eval_shape(tuned.apply, {'other': {}}, held, X)
    else:
      traced(method)


def test_there_are_forty_of_them():
  assert len(MISTAKES) >= 40


def test_the_same_rules_without_mistakes_run():
  assert traced(call_of(same, one)).shape == (4, 3)
  assert traced(dot_of(lambda t, x, y, w, key: y * t['z'])).shape == (4, 3)
  assert traced(weight_of(lambda t, site, arrays: {'kernel': arrays['kernel'] * t['z']})).shape
