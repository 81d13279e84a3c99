"""A method's dropout: on in training, with the key it is given; off in evaluation."""

import jax

import jpeft
from jpeft.methods import REGISTRY
from tests.contract.anatomies import described
from tests.contract.pair import far
from tests.contract.table import error_of, over, prepared, takes_dropout
from tests.fixtures import BACKBONES, leaves_equal, noisy

# Scans that a flag or a mode tells, and a model without dropout of its own, where a key alone says
# it.
TOLD, KEYED = ('linen_vit_scan', 'nnx_vit_scan'), 'nnx_llama'
METHODS = [m for m in REGISTRY if takes_dropout(m)]
PAIRS = [(m, (*TOLD, KEYED)[i % 3]) for i, m in enumerate(METHODS)]
PAIRS = [(m, next(x for x in (b, *TOLD, 'linen_bert') if error_of(m, x) is None)) for m, b in PAIRS]


@over(PAIRS, always=PAIRS[::6], fixture='names')
def test_dropout(names):
  method, name = names
  b = BACKBONES[name]
  with described(b):
    methods = [prepared(method, b, dropout=rate) for rate in (0.5, 0.0)]
    trains, evaluates = (
      [jpeft.attach(model, one, b.backbone, *b.args, **b.kwargs) for one in methods]
      for model in (b.train_model, b.model)
    )
  (dropping, sure), shapes = trains, evaluates[1].shapes
  assert all(tuned.shapes == shapes for tuned in (*trains, *evaluates))

  def run(tuned, theta, held, key=None, **kwargs):
    rngs = {} if key is None else {'rngs': {'dropout': key}}
    return tuned.apply(theta, held, *b.args, **{**b.kwargs, **kwargs}, **rngs)

  def runs(theta, held, key, other):
    """One program: two keys, no dropout of the method; evaluation, without dropout, with a key."""
    train = lambda tuned, key: run(tuned, theta, held, key, **b.train_kwargs)
    evals = [run(tuned, theta, held) for tuned in evaluates]
    if name != KEYED:
      evals.append(run(evaluates[0], theta, held, key))
    return train(dropping, key), train(dropping, other), train(sure, key), evals

  theta = noisy(sure.init(jax.random.key(0), b.backbone))
  keys = [jax.random.key(i) for i in range(2)]
  one, other, none, evals = jax.jit(runs)(theta, b.backbone, *keys)
  assert far(one, other) > 1e-4 and far(one, none) > 1e-4
  assert all(leaves_equal(evals[0], y) for y in evals[1:])
  assert far(one, evals[0]) > 1e-4
  if name == KEYED:
    assert far(none, evals[0]) < 1e-5
