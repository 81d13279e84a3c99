"""The pass over training examples that a method may need before training.

A method that needs one is a method all the same: its rules have the shapes that plans need, and say
by `preparation` what is missing. `attach` refuses them until `prepare` has made the pass, or
`with_found` has put in what an earlier pass found.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .attach import attach
from .discover import sites_of
from .example import specs_of, taken_apart
from .layers import restricted
from .preparation import Found, Preparation, unprepared
from .rules import Call, Method, at, chain, in_layers
from .sites import Site, Sites
from .tuned import Tuned

# (output, labels) -> a scalar, the loss of each label, or (these losses, their weights).
Loss = Callable[[Any, Any], Any]


class Examples(NamedTuple):
  """A batch of a pass.

  Attributes:
    args: positional arguments of the model's call.
    labels: what the loss compares the output with; they lead with the examples, as args do.
    kwargs: further arguments by name.
    mask: [B], 0 for rows that only fill up; None where all count.
  """

  args: tuple
  labels: Any
  kwargs: Mapping[str, Any] = {}
  mask: Any = None


def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
  """The softmax cross-entropy of each label, from logits [..., C] and integers [...]."""
  return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), labels)


class Pass:
  """What `Preparation.find` gets: a model, and training examples to go over once.

  Attributes:
    model: the user's module.
    backbone: its arrays.
    key: of what is drawn.
    layers: of the model in which the method acts, see `at`; None for all.
    fetch: a tree of arrays on devices -> the same as NumPy arrays.
    beside: what else is trained, such as the head: the method without what waits for a pass.
    storage: the 4-bit format that kernels will be stored in after the pass; None if they stay.
  """

  def __init__(
    self,
    model,
    backbone,
    examples: Iterable[Examples],
    *,
    loss: Loss = cross_entropy,
    key: jax.Array | None = None,
    layers=None,
    fetch: Callable[[Any], Any] = jax.device_get,
    beside: Method | None = None,
    storage: Any = None,
  ):
    """See `prepare`.

    Raises:
      ValueError: there is no batch.
    """
    batches = iter(examples)
    first = next(batches, None)
    if first is None:
      raise ValueError('a pass before training needs batches of training examples: there is none')
    self.model = model
    self.backbone = backbone
    self.key = jax.random.key(0) if key is None else key
    self.layers = layers
    self.fetch = fetch
    self.beside = Method() if beside is None else beside
    self.storage = storage
    self._loss = loss
    self._first = first
    self._examples = itertools.chain([first], batches)

  def __iter__(self) -> Iterator[Examples]:
    return self._examples

  @functools.cached_property
  def sites(self) -> Sites:
    """All sites of the model."""
    args, kwargs = self._specs
    return sites_of(self.model, self.backbone, *args, **kwargs)

  def find(self, pattern: str) -> list[Site]:
    """The sites that a pattern names, with the layers in which the method acts."""
    return _in_layers(self.sites, pattern, self.layers)

  def attached(self, method: Method) -> Tuned:
    """A method attached to the model, in the layers of the pass."""
    args, kwargs = self._specs
    return attach(self.model, method, self.backbone, *args, **kwargs)

  def tapped(self, taps: Method) -> Iterator[tuple[Examples, dict[str, dict[str, np.ndarray]]]]:
    """(batch, {path: {name: array}}) of what rules tap in one forward pass of each batch.

    Args:
      taps: Calls of one name without theta, which record by `call.tap`. Of a stack an array leads
        with the layers in which they act. `call.root` has what the model is called with, by name.
    """
    (name,) = taps.names

    def read(t, call, *args, **kwargs):
      call.local.update(call.inputs(*args, **kwargs))
      call(*args, **kwargs)
      return call.taps()

    if self.layers is not None:
      taps = in_layers(taps, self.layers)
    tuned = self.attached(chain(taps, at('', Call(name, read, taps=True))))

    @jax.jit
    def run(backbone, arrays):
      args, kwargs = self.call_of(arrays)
      return tuned.apply({}, backbone, *args, **kwargs)

    for batch in self:
      yield batch, self.fetch(run(self.backbone, self.arrays_of(batch)))

  def loss(self, tuned: Tuned, theta, backbone, arrays, labels, mask) -> jax.Array:
    """The mean loss of a batch under a method, for `jax.jit` and `jax.grad`.

    Args:
      tuned: from `attached`.
      theta: of it.
      backbone: which may be another than that of the pass.
      arrays: from `arrays_of`.
      labels, mask: of the batch.

    Raises:
      ValueError: the loss is one number for the batch, and some of its rows only fill up.
    """
    args, kwargs = self.call_of(arrays)
    return self.loss_of(tuned.apply(theta, backbone, *args, **kwargs), labels, mask)

  def loss_of(self, outputs, labels, mask) -> jax.Array:
    """The mean loss of the outputs for a batch; raises as `loss` does."""
    found = self._loss(outputs, labels)
    losses, weights = found if isinstance(found, tuple) else (found, jnp.ones(jnp.shape(found)))
    if mask is not None:
      if not jnp.ndim(losses):
        raise ValueError('a batch has rows that only fill up: loss must give that of each label')
      weights = weights * mask.reshape(-1, *(1,) * (jnp.ndim(losses) - 1))
    return (weights * losses).sum() / weights.sum()

  @staticmethod
  def arrays_of(batch: Examples) -> dict[int, Any]:
    """The arrays among the arguments of a batch, to be given to a compiled function."""
    leaves = jax.tree.leaves((batch.args, dict(batch.kwargs)))
    return {i: x for i, x in enumerate(leaves) if hasattr(x, 'shape')}

  def call_of(self, arrays: dict[int, Any]) -> tuple[tuple, dict]:
    """(args, kwargs) of the model's call with the arrays of a batch, from `arrays_of`."""
    return self._put(arrays)

  @functools.cached_property
  def _specs(self) -> tuple[tuple, dict]:
    return specs_of((self._first.args, dict(self._first.kwargs)))

  @functools.cached_property
  def _put(self) -> Callable[[dict[int, Any]], Any]:
    return taken_apart((self._first.args, dict(self._first.kwargs)))[1]


def _in_layers(sites: Sites, pattern: str, layers) -> list[Site]:
  """The sites that a pattern names, with the layers in which a method acts."""
  found: Iterable[Site | None] = sites.find(pattern)
  if layers is not None:
    found = [restricted(site, layers) for site in found if site is not None]
  return [site for site in found if site is not None]


def prepare(
  method: Method,
  model,
  backbone,
  batches: Iterable[Any],
  *,
  loss: Loss = cross_entropy,
  key: jax.Array | None = None,
  storage: Any = None,
  **kwargs,
) -> Method:
  """The method with what a pass over training examples finds; one that needs none as it is.

  `method = jpeft.prepare(jpeft.sct(), model, variables, batches, train=False)`, then `attach`.

  Args:
    method: such as `sct()`, or a chain with it.
    model: a Linen or an NNX module, in evaluation.
    backbone: what it stores.
    batches: of training examples, each (inputs, labels): inputs are the first argument of the
      model, a tuple of arguments, or a dict of them by name. They are gone over once a pass, or
      as often as a pass wants (`Preparation.again`).
    loss: (output, labels) -> a scalar, the loss of each label, or (losses, weights); by default the
      softmax cross-entropy of classes. Methods that need no gradient do not read it.
    key: of what a pass draws, such as a fresh head.
    storage: the format that the kernels of `backbone` will be stored in, such as `jpeft.nf4()`, for
      methods that start at what it loses.
    **kwargs: further arguments of every call of the model, such as train=False.

  Raises:
    ValueError: there are no batches, or the pass cannot serve the model or the labels.
  """
  waiting = unprepared(method)
  if len(waiting) > 1:
    batches = list(batches)
  for preparation in waiting:
    source = itertools.cycle(batches) if preparation.again else batches
    examples = itertools.islice(source, preparation.batches)
    layers = layers_of(method, preparation)
    own = Pass(
      model,
      backbone,
      (_examples(batch, kwargs) for batch in examples),
      loss=loss,
      key=key,
      layers=layers,
      beside=beside(method),
      storage=storage,
    )
    own.attached(stand_in(method))  # what is wrong with patterns is said before the pass
    method = resolved(method, preparation, preparation.find(own))
  return method


def _examples(batch: Any, kwargs: Mapping[str, Any]) -> Examples:
  """A batch of `prepare`.

  Raises:
    ValueError: it is no pair.
  """
  if isinstance(batch, Examples):
    return batch._replace(kwargs={**kwargs, **batch.kwargs})
  if not isinstance(batch, Sequence) or len(batch) != 2:
    raise ValueError(
      f'a batch of a pass before training must be (inputs, labels), not {type(batch).__name__}'
    )
  inputs, labels = batch
  if isinstance(inputs, Mapping):
    return Examples((), labels, {**kwargs, **inputs})
  args = inputs if isinstance(inputs, tuple) else (inputs,)
  return Examples(args, labels, kwargs)


# What was found, put into a method and taken out of it.


def beside(method: Method) -> Method:
  """The rules of a method that wait for no pass."""
  waiting = unprepared(method)
  return Method((pattern, rule) for pattern, rule in method if rule.preparation not in waiting)


def layers_of(method: Method, preparation: Preparation):
  """The layers in which a method acts that waits for a pass; None for all."""
  return next(rule.layers for _, rule in method if rule.preparation is preparation)


def resolved(method: Method, preparation: Preparation, found: Found) -> Method:
  """The method with the rules that follow from a pass in place of those that wait for it."""
  found = {key: np.asarray(x) for key, x in found.items()}
  done = dataclasses.replace(preparation, found=found)
  return _replaced(method, preparation, preparation.resolve(found), done)


def _replaced(
  method: Method, preparation: Preparation, made: Method, done: Preparation | None
) -> Method:
  """The method with other rules in place of those of a preparation.

  Args:
    method: it all.
    preparation: of the rules that go.
    made: the rules that come.
    done: their preparation.
  """
  layers = layers_of(method, preparation)
  if layers is not None:  # what chooses layers by itself has chosen among these
    made = Method(
      pair if pair[1].layers is not None else in_layers(Method((pair,)), layers)[0] for pair in made
    )
  pairs: list = []
  for pattern, rule in method:
    if rule.preparation is not preparation:
      pairs.append((pattern, rule))
    elif made:
      # All that waits for one pass comes from one factory, and stands together.
      pairs += [(p, dataclasses.replace(new, preparation=done)) for p, new in made]
      made = Method()
  if done is not None and not any(rule.preparation is done for _, rule in pairs):
    raise ValueError(f'{done.name}: the pass before training found nothing to train')
  return Method(pairs)


def whole_of(method: Method) -> Method:
  """The method that reads a trained theta on the model from which nothing was cut.

  What prunes for good, such as Light-PEFT, stays as it is. See `widened_theta` for the theta.
  """
  for preparation in {rule.preparation for _, rule in method}:
    if preparation is not None and preparation.whole is not None:
      method = _replaced(method, preparation, preparation.whole(), None)
  return method


def to_store(method: Method, model, backbone, *args, **kwargs) -> Any:
  """The backbone whose kernels are to be stored in 4 bits under a prepared method.

  It is the backbone itself, but for methods such as LoftQ, whose 4-bit kernels stand for kernels
  without what LoRA starts with.

  Args:
    method: from `prepare`.
    model, backbone, *args, **kwargs: as for `attach`; kernels are whole.

  Example:
    >>> held = jpeft.to_store(method, model, variables, tokens)  # doctest: +SKIP
    >>> held = jpeft.quantize(model, jpeft.nf4(), held, tokens)  # doctest: +SKIP
  """
  for preparation in {rule.preparation for _, rule in method}:
    if preparation is None or preparation.stored is None or not preparation.found:
      continue
    changes = preparation.stored(preparation.found)
    layers = layers_of(method, preparation)
    if changes and layers is not None:
      changes = in_layers(changes, layers)
    if changes:
      tuned = attach(model, changes, backbone, *args, **kwargs)
      theta = jax.jit(tuned.init)(jax.random.key(0), backbone)
      backbone = jax.jit(tuned.merge)(theta, backbone)
  return backbone


def with_sizes(method: Method, sites: Sites) -> Method:
  """A method whose passes found as much as they will, where that follows from the model alone.

  It is for plans: which parts were found means nothing.
  """
  for preparation in unprepared(method):
    if preparation.sized is not None:
      layers = layers_of(method, preparation)
      find = functools.partial(_in_layers, sites, layers=layers)
      method = resolved(method, preparation, preparation.sized(find))
  return method


def found_in(method: Method) -> dict[str, np.ndarray]:
  """What the passes of a prepared method found, {'method name/name': array}, to be stored."""
  found = {}
  for _, rule in method:
    if rule.preparation is not None:
      for key, x in (rule.preparation.found or {}).items():
        found[f'{rule.preparation.name}/{key}'] = x
  return found


def with_found(method: Method, found: Found) -> Method:
  """A method with what an earlier pass found, see `found_in`: no data are needed.

  Raises:
    ValueError: there is nothing for one of its passes.
  """
  for preparation in unprepared(method):
    name = preparation.name
    own = {
      key.removeprefix(f'{name}/'): x for key, x in found.items() if key.startswith(f'{name}/')
    }
    if not own:
      raise ValueError(f'{name}: nothing was found for it; there are {", ".join(found) or "none"}')
    method = resolved(method, preparation, own)
  return method


def stand_in(method: Method) -> Method:
  """A method as it is before its passes, for shapes: plans, and checks of patterns."""
  before = {one: dataclasses.replace(one, found={}) for one in unprepared(method)}
  return Method(
    (pattern, dataclasses.replace(rule, preparation=before.get(rule.preparation, rule.preparation)))
    for pattern, rule in method
  )


def prepared_by(method: Method, preparation: Preparation) -> Method:
  """A method that waits for a pass.

  Args:
    method: its rules before the pass. Their shapes are what plans show.
    preparation: what finds the rest.
  """
  named = dataclasses.replace(preparation, name=preparation.name or method.names[0])
  return Method((pattern, dataclasses.replace(rule, preparation=named)) for pattern, rule in method)
