"""What a method is: rules, each a pure value, at the sites that a pattern names."""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax

from .generator import Generator
from .keys import named_key
from .layers import Layers, text_of
from .preparation import Preparation
from .sites import Leaf

# What the backward pass must keep of the backbone, from least to most.
NO_BACKPROP = 'no backbone backprop'
PARTIAL_REENTRY = 'partial re-entry'
FULL_CROSSING = 'full crossing'
MEMORY_CLASSES = (NO_BACKPROP, PARTIAL_REENTRY, FULL_CROSSING)

# ((when, names of entries that are not trained from then on), ...)
Stages = tuple[tuple[float, tuple[str, ...]], ...]

# What a Weight needs of the layer that it acts on.
REQUIREMENTS = ('nothing', 'input', 'input in training')
# What a Call needs of the module that it wraps.
CALL_REQUIREMENTS = ('nothing', 'attention')


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
  """The call of a factory that made a rule, such as `lora(rank=8)`.

  Attributes:
    factory: its name.
    hyperparameters: the values of all its arguments, defaults included.
    position: which of the rules that the call made.
  """

  factory: str
  hyperparameters: dict[str, Any]
  position: int

  def __eq__(self, other) -> bool:
    if not isinstance(other, Origin):
      return NotImplemented
    if (self.factory, self.position) != (other.factory, other.position):
      return False
    if self.hyperparameters.keys() != other.hyperparameters.keys():
      return False
    return all(_same(x, other.hyperparameters[n]) for n, x in self.hyperparameters.items())

  def __hash__(self) -> int:
    return hash((self.factory, self.position))

  def __str__(self) -> str:
    shown = ', '.join(f'{name}={value!r}' for name, value in self.hyperparameters.items())
    return f'{self.factory}({shown})'


def _same(a: Any, b: Any) -> bool:
  """Whether two hyperparameters are equal; arrays, whose `==` is an array, if they are one."""
  if a is b:
    return True
  try:
    return bool(a == b)
  except (TypeError, ValueError):
    return False


class _Made:
  """Equality of rules: by the factory call that made them, else by all their fields."""

  name: str
  origin: 'Origin | None'
  layers: 'Layers | None'

  def _identity(self) -> tuple:
    if self.origin is not None:
      return self.name, self.origin, self.layers
    return tuple(getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]

  def __eq__(self, other) -> bool:
    if type(self) is not type(other):
      return NotImplemented
    return self._identity() == other._identity()

  def __hash__(self) -> int:
    return hash((type(self), self._identity()))

  def __repr__(self) -> str:
    return f'{type(self).__name__}({self.name!r})'


def _nothing(key, site, arrays) -> dict:
  return {}


def _check_choice(name: str, requires: str, known: tuple[str, ...]) -> None:
  if requires not in known:
    choices = ', '.join(map(repr, known))
    raise ValueError(f'{name}: requires={requires!r} must be one of {choices}')


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Weight(_Made):
  """Reparametrises arrays that a site owns.

  Attributes:
    name: the method's name: theta[name][site path].
    init: (key, site, arrays) -> t, for one layer.
    apply: (t, site, arrays) -> {array name: new array or box}: computed each time the model reads
      it. What `arrays[name]` gives is plain; `arrays.stored(name)` is the box, where the backbone
      holds one.
    dot: (t, x, y, w, key) -> y', what `apply` does to y = x @ w for the site's only kernel, without
      the kernel: no gradient of its size is ever formed. What `apply` changes beside the kernel is
      computed as for a rule without `dot`. `x` multiplies matrices [fan_in, k] by `@`
      (a convolution does so as a convolution); `w` is a function that returns [fan_in, fan_out],
      and `w.plain` says whether that is the backbone's own array, neither a box nor changed by a
      rule before; `key` is None outside training.
    fixed: entries of t that are not trained: 'gate' is that entry of t, or all that is in it,
      'kernel/a' an entry of an entry, '*/a' the entry 'a' of each. Integers and booleans are never
      trained, and need not be named.
    exact: entries of t, named as in `fixed`, that `dot` gets as stored; the other floats come in
      the dtype of y.
    requires: what the rule needs of a layer, one of REQUIREMENTS. 'input': it acts on the layer's
      input, so `attach` refuses layers without an injection point; 'input in training': the same,
      since dropout acts there.
    outer: names that a Call of the same method puts into `call.local` around the site, and that the
      rule gets as further entries of t: numbers that belong to a call of the model, such as one for
      each example. `apply` can express those alone that are scalars.
    update: (t, site, step, key) -> t: a schedule or a periodic edit, after each training step.
    edit: (state, grads, step, key) -> state: the same for all sites of the method at once, with the
      gradients and the optimizer's moments, see `edits.State`.
    stages: ((when, fixed), ...): from then on `fixed` is what is not trained, with the names that
      the field of that name takes. When: a number of updates, or below 1 a share of all.
    idle: entries of t, named as in `fixed` and among those, that `edit` alone reads: they do not
      enter the model, and a run has them in host memory where it can. See `jpeft.core.idle`.
    restarts: ((entry, axis), ...): entries of which `edit` clears the moments vector by vector, and
      the axis that numbers the vectors. The optimizer then counts the updates of each vector.
    loss: (loss, run) -> (value, out): what is minimised in place of loss(out), where run(**takes)
      is one pass over the batch and gives (out, aux), and loss a `TaskLoss`; see `Tuned.objective`.
    cuts: an entry of the t of a kernel, a number for each of the equal parts that its inputs fall
      into, such as heads or hidden units; parts of 0 may be cut off the model. '' for none.
    penalty: t -> a number, of one layer: the mean over all layers of the rule's name is added to
      what is minimised.
    memory: what the backward pass must keep of the backbone, one of MEMORY_CLASSES.
    head: the rule makes the model's prediction itself, so that no other head has to be trained.
    layers: which layers the rule acts in, see `at`; None for all.
    hint: what to do where no site has what the rule adapts, for the error.
    generator: how t follows from a smaller tree; set by `generated`.
    preparation: the pass before training that the rule waits for, or comes from; set by
      `prepared_by`.
    origin: the factory call that made the rule; set by `factory`.
    by_matrix: whether `init`, `apply` and `dot` are those of one matrix, so that of a stack of them
      each entry of t has one part a matrix, first; set by `matrix`.
  """

  name: str
  init: Callable[..., Any]
  apply: Callable[..., dict]
  dot: Callable[..., jax.Array] | None = None
  fixed: tuple[str, ...] = ()
  exact: tuple[str, ...] = ()
  requires: str = REQUIREMENTS[0]
  outer: tuple[str, ...] = ()
  cuts: str = ''
  update: Callable[..., Any] | None = None
  edit: Callable[..., Any] | None = None
  stages: Stages = ()
  idle: tuple[str, ...] = ()
  restarts: tuple[tuple[str, int], ...] = ()
  loss: Callable[..., Any] | None = None
  penalty: Callable[..., jax.Array] | None = None
  memory: str = FULL_CROSSING
  head: bool = False
  layers: Layers | None = None
  hint: str = ''
  generator: Generator | None = None
  preparation: Preparation | None = None
  origin: Origin | None = None
  by_matrix: bool = False

  def __post_init__(self):
    _check_choice(self.name, self.requires, REQUIREMENTS)
    _check_stages(self)
    if not set(self.idle) <= set(self.fixed):
      raise ValueError(f'{self.name}: idle={self.idle} must be among what is fixed, {self.fixed}')

  # A Weight acts on the call of its module, and takes no arguments of that call.
  method: ClassVar[str] = '__call__'
  takes: ClassVar[tuple[str, ...]] = ()

  @property
  def mergeable(self) -> bool:
    """Whether plain weights express the rule."""
    return True


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Call(_Made):
  """Wraps a site's call.

  Attributes:
    name: the method's name: theta[name][site path].
    apply: (t, call, *args, **kwargs) -> out; `call(*args, **kwargs)` runs what is wrapped. See
      `attach.Bound` for what else a call may ask of the model around it.
    init: (key, site, arrays) -> t, for one layer.
    merge: (t, site, arrays) -> {array name: new array}: the same function as plain weights, if any.
    fixed: entries of t that are not trained, as for Weight.
    exact: entries of t that `apply` gets as stored; the other floats come in the dtype of the
      first array of floats that the module is called with.
    taps: whether the rule records arrays with `call.tap`. It is found out where it is left out, by
      one trace more.
    takes: names of keyword arguments that the rule takes for itself, at the model ('') alone: they
      are given to `tuned.apply` beside those of the model, and the rule does not pass them on.
    requires: what the rule needs of the module, one of CALL_REQUIREMENTS. 'attention': it calls
      `attend`, so `attach` refuses modules whose attention is out of reach.
    update, edit, stages, loss, memory, head, layers, hint, generator, preparation, origin: as for
      Weight.
    method: the method of the module that is wrapped.
    saved_bits: of a value that the backward pass stores of what is wrapped; None for whole values.
  """

  name: str
  apply: Callable[..., Any]
  init: Callable[..., Any] = _nothing
  merge: Callable[..., dict] | None = None
  fixed: tuple[str, ...] = ()
  exact: tuple[str, ...] = ()
  taps: bool = False
  takes: tuple[str, ...] = ()
  requires: str = CALL_REQUIREMENTS[0]
  update: Callable[..., Any] | None = None
  edit: Callable[..., Any] | None = None
  stages: Stages = ()
  loss: Callable[..., Any] | None = None
  memory: str = FULL_CROSSING
  method: str = '__call__'
  saved_bits: int | None = None
  head: bool = False
  layers: Layers | None = None
  hint: str = ''
  generator: Generator | None = None
  preparation: Preparation | None = None
  origin: Origin | None = None

  def __post_init__(self):
    _check_choice(self.name, self.requires, CALL_REQUIREMENTS)
    _check_stages(self)

  @property
  def mergeable(self) -> bool:
    """Whether plain weights express the rule."""
    return self.merge is not None


Rule = Weight | Call


def _check_stages(rule: Rule) -> None:
  """Raises a ValueError if the stages of a rule are no rising numbers."""
  begins = [when for when, _ in rule.stages]
  are_counts = all(isinstance(when, int) and when >= 1 for when in begins)
  are_shares = all(0 < when < 1 for when in begins)
  if not (are_counts or are_shares) or begins != sorted(set(begins)):
    raise ValueError(
      f'{rule.name}: stages begin at rising numbers of updates, or at rising shares of all '
      f'updates below 1, not at {begins}'
    )


def memory_class(rules: Iterable[Rule]) -> str:
  """What the backward pass must keep of the backbone for several rules: the most that one needs."""
  return max((rule.memory for rule in rules), key=MEMORY_CLASSES.index)


class Method(tuple[tuple[str, Rule], ...]):
  """Rules and where they act: ((pattern, rule), ...). Methods are chained like Optax transforms."""

  __slots__ = ()

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys(rule.name for _, rule in self))

  def __repr__(self) -> str:
    calls = []
    for pattern, rule in self:
      if rule.origin is None:
        call = f'at({pattern!r}, {rule!r})'
      elif rule.origin.position == 0:
        call = str(rule.origin)
      else:  # of the same call as the rule before
        continue
      if rule.layers is not None:
        call = f'in_layers({call}, {rule.layers!r})'
      calls.append(call)
    return calls[0] if len(calls) == 1 else f'chain({", ".join(calls)})'


def at(pattern: str, rule: Rule, *, layers: Layers | None = None) -> Method:
  """A method of one rule.

  Args:
    pattern: a regex for whole paths such as 'encoder/block_3/attention/query'; roles in braces,
      such as '{q}' or '{block}', stand for the names that a model family uses.
    rule: what happens there.
    layers: the layers of the model in which it happens, unrolled or scanned: numbers, negative from
      the end; a slice; or a text such as '-4:', '::2' or '0,2,5'. '!-4:' is everything else, also
      what lies outside of all layers. None for all.
  """
  method = Method(((pattern, rule),))
  return method if layers is None else in_layers(method, layers)


def in_layers(method: Method, layers: Layers) -> Method:
  """A method that acts in some layers alone; its rules outside of all layers are left out.

  Args:
    method: such as `lora(8)`.
    layers: which, see `at`.
  """
  if isinstance(layers, slice):
    layers = text_of(layers)
  elif not isinstance(layers, int | str):
    layers = tuple(int(layer) for layer in layers)
  return Method((pattern, dataclasses.replace(rule, layers=layers)) for pattern, rule in method)


def chain(*methods: Method) -> Method:
  """All rules of several methods. At one site Weights act before Calls, each in chain order."""
  return Method(pair for method in methods for pair in method)


def factory(make: Callable[..., Method]) -> Callable[..., Method]:
  """Decorates a function that makes methods: they are equal, and print, by its arguments.

  >>> lora(rank=8) == lora(rank=8)
  True
  """
  signature = inspect.signature(make)

  @functools.wraps(make)
  def made(*args, **kwargs) -> Method:
    method = make(*args, **kwargs)
    given = signature.bind(*args, **kwargs)
    given.apply_defaults()
    position = itertools.count()

    def named(rule: Rule) -> Rule:
      origin = Origin(make.__name__, dict(given.arguments), next(position))
      return dataclasses.replace(rule, origin=origin)

    return Method((pattern, named(rule)) for pattern, rule in method)

  return made


def matrix(
  name: str,
  init,
  weight,
  dot=None,
  *,
  fixed: Iterable[str] = (),
  exact: Iterable[str] = (),
  outer: Iterable[str] = (),
  stages: Stages = (),
  idle: Iterable[str] = (),
  restarts: Iterable[tuple[str, int]] = (),
  **options,
) -> Weight:
  """A Weight written for one [fan_in, fan_out] matrix, for every kernel of a site.

  Dense, DenseGeneral, Einsum, convolution and bare-param kernels are all one case: their axes are
  folded by how the program contracts them; batched kernels (experts) get one theta per matrix.

  Args:
    name: the method's name.
    init: (key, w) -> t.
    weight: (t, w) -> w'.
    dot: (t, x, y, w, key) -> y', see Weight.
    fixed, exact, stages, idle, restarts: entries of the t of one matrix, see Weight.
    outer: further entries that t gets from a call around, see Weight.
    **options: further fields of Weight.
  """

  def mapped(fn, leaf: Leaf):
    for _ in leaf.batch:
      fn = jax.vmap(fn)
    return fn

  def init_site(key, site, arrays):
    theta = {}
    for array in site.matrices:
      leaf, sub = site.leaves[array], named_key(key, array)
      sizes = [leaf.shape[i] for i in leaf.batch]
      keys = jax.random.split(sub, sizes) if sizes else sub
      theta[array] = mapped(init, leaf)(keys, leaf.fold(arrays[array]))
    return theta

  outer = tuple(outer)

  def apart(theta):
    """({array: t of its matrix}, what comes from a call around)."""
    own = {array: t for array, t in theta.items() if array not in outer}
    return own, {entry: theta[entry] for entry in outer}

  def apply_site(theta, site, arrays):
    own, around = apart(theta)
    out = {}
    for array, t in own.items():
      leaf = site.leaves[array]
      new = mapped(lambda t, w: weight({**t, **around}, w), leaf)
      out[array] = leaf.unfold(new(t, leaf.fold(arrays[array])))
    return out

  def dot_site(theta, *rest):
    own, around = apart(theta)
    (t,) = own.values()
    return dot({**t, **around}, *rest)

  # A site's theta is {array: t of its matrix}.
  def of_each(entries):
    return tuple(f'*/{entry}' for entry in entries)

  options['fixed'] = of_each(fixed)
  options['exact'] = of_each(exact)
  options['stages'] = tuple((when, of_each(entries)) for when, entries in stages)
  options['by_matrix'] = True
  options['idle'] = of_each(idle)
  options['restarts'] = tuple((f'*/{entry}', axis) for entry, axis in restarts)
  return Weight(name, init_site, apply_site, dot and dot_site, outer=outer, **options)
