"""A method resolved against a model: pure functions over two trees, theta and the backbone."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jpeft import programs
from jpeft.messages import did_you_mean

from .backends.choice import backend_of
from .blame import blame
from .boxes import Arrays, Lazy, read
from .context import NeedsRecording, Recording, check_scalars, with_outer
from .each import apply_each
from .edits import edited
from .entries import combine, named, partition, stop_gradient, stop_where, trained
from .example import taken_apart
from .generator import Generator, Place
from .hooks import Hooks
from .keys import named_key
from .merging import arrays_of, changed, layer_by_layer, merged, narrowed
from .mode import mode_of
from .paths import join_path, leaf_paths
from .recorded import beside_output, write_back
from .resolve import Plan, entry_at_module, plan
from .rules import (
  FULL_CROSSING,
  MEMORY_CLASSES,
  NO_BACKPROP,
  PARTIAL_REENTRY,
  Call,
  Method,
  Rule,
  Weight,
  memory_class,
)
from .sites import Site, Sites
from .stages import begins, staged
from .task_loss import TaskLoss, divergence

# The shares of the FLOPs of frozen products above which a backward pass crosses a part of the
# backbone, or all of it. A frozen head, or a few queries through a block, are below the first.
_PARTIAL_SHARE = 0.25
_FULL_SHARE = 0.5


@dataclasses.dataclass(frozen=True, eq=False)
class Tuned:
  """A method resolved against a model: pure functions over two trees, theta and the backbone.

  Attributes:
    model: the user's module, untouched.
    rules: (rule, site), in the order in which they act.
    sites: all sites of the model.
    method: as given to `attach`.
    backbone: the shapes of what the model stores.
    example: the call that `attach` was given, (args, kwargs) with shapes for arrays.
    begin: of what `at_stage` made, the method as it was attached; else None.
  """

  model: Any
  rules: tuple[tuple[Rule, Site], ...]
  sites: Sites
  method: Method
  backbone: Any
  example: tuple[tuple, dict]
  begin: 'Tuned | None' = None

  # ---- Theta.

  @functools.cached_property
  def shapes(self):
    """theta as shapes; nothing is computed."""
    return jax.eval_shape(self.init, jax.random.key(0), self.backbone)

  def init(self, key: jax.Array, backbone) -> dict:
    """theta = {method name: {site path: arrays}}; in stacked layers the stack comes first.

    Of a method that `generated` made it is the smaller tree, with what sites share at the path ''.
    """
    theta = self._init_rules(key, backbone)
    for name, generator in self.generators.items():
      own_key = named_key(key, name)
      theta[name] = generator.start(name, own_key, self._places(name, theta[name]))
    return theta

  def expand(self, theta):
    """theta as the rules read it: what `generated` methods make of their smaller trees.

    For a method without such parts it is theta itself. It is the theta of the plain method, so that
    `attach(model, lora(8), ...)` can read, merge or export what `generated(lora(8), ...)` learned.
    """
    if not self.generators:
      return theta
    theta = stop_where(theta, self.trainable(theta))
    for name, generator in self.generators.items():
      if name in theta:
        places = self._places(name, self.read_shapes[name])
        theta = theta | {name: generator.expanded(name, theta[name], places)}
    return theta

  def _places(self, name: str, entries) -> dict[str, Place]:
    """What the rules of one name read, in the order of the forward pass."""
    sites = self._sites_of_theta.items()
    return {
      path: Place(site, entries[path])
      for (rule, path), site in sites
      if rule == name and path in entries
    }

  @functools.cached_property
  def generators(self) -> dict[str, Generator]:
    """{name of a method: how its theta follows from a smaller tree}."""
    return {rule.name: rule.generator for rule, _ in self.rules if rule.generator is not None}

  @functools.cached_property
  def read_shapes(self):
    """theta as the rules read it, as shapes."""
    if not self.generators:
      return self.shapes
    return jax.eval_shape(self._init_rules, jax.random.key(0), self.backbone)

  def _init_rules(self, key, backbone) -> dict:
    """What the `init` of all rules makes."""
    flat = backend_of(self.model).arrays(self.model, backbone)
    theta = {}
    for rule, site in self.rules:
      with blame(rule, site, 'init'):
        t = self._init_rule(rule, site, _key_of(key, rule, site), flat)
      if not isinstance(t, dict):
        raise ValueError(
          f'init of {rule.name!r} at {site.path!r} must return a dict of arrays, not '
          f'{type(t).__name__}'
        )
      # A weak type would turn strong at the first update, and compile the training step again.
      t = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), t)
      if jax.tree.leaves(t):
        theta.setdefault(rule.name, {}).setdefault(site.path, {}).update(t)
    return theta

  def _init_rule(self, rule: Rule, site: Site, key, flat):
    whole = arrays_of(site, flat)
    if not site.axes:
      return rule.init(key, site, Arrays(narrowed(site, whole), flat, site.number))
    stacked = jax.tree.map(lambda x: site.choose(site.stack_first(x)), whole)
    numbers = site.choose(jnp.asarray(site.number))

    def one_layer(key, arrays, number):
      return rule.init(key, site, Arrays(narrowed(site, arrays), flat, number))

    return site.per_layer(one_layer)(_layer_keys(key, site), stacked, numbers)

  def site_of(self, name: str, path: str) -> Site:
    """The site of the entries theta[name][path], with the layers of its stack that they are for."""
    return self._sites_of_theta[name, path]

  @functools.cached_property
  def _sites_of_theta(self) -> dict[tuple[str, str], Site]:
    sites = {(rule.name, site.path): site for rule, site in self.rules}
    for name in self.generators:
      sites.setdefault((name, ''), self.sites[''])
    return sites

  def trainable(self, theta) -> Any:
    """A tree of bools: False for entries that a rule names in `fixed`, integers and booleans."""
    fixed = self._fixed_of_rules
    for name, generator in self.generators.items():
      paths = [path for rule, path in self._sites_of_theta if rule == name]
      fixed = fixed | dict.fromkeys([(name, path) for path in paths], generator.fixed)
    return trained(theta, fixed)

  @functools.cached_property
  def _fixed_of_rules(self) -> dict[tuple[str, str], tuple[str, ...]]:
    """{(name of a rule, path): names of entries that are not trained, of theta as it is read}."""
    fixed: dict[tuple[str, str], tuple[str, ...]] = {}
    for rule, site in self.rules:
      here = (rule.name, site.path)
      fixed[here] = fixed.get(here, ()) + rule.fixed
    return fixed

  def split(self, theta) -> tuple[Any, Any]:
    """(what is trained, what is held) of theta: two trees like it, with None in the other's places.

    JAX sees no leaf where there is None, so gradients, optimizers and clipping of the first tree
    know nothing of the second: `jax.grad(lambda trained: loss(tuned.join(trained, held)))`.
    """
    return partition(theta, self.trainable(theta))

  @staticmethod
  def join(trained, held):
    """The theta that `split` took apart."""
    return combine(trained, held)

  def idle(self, theta) -> Any:
    """A tree of bools: True for entries that `edit` alone reads (`Weight.idle`)."""
    return named(theta, self._idle_of_rules)

  def active(self, theta) -> tuple[Any, Any]:
    """(what the model reads, what `edit` alone reads) of theta, or of a part of it.

    There is None in the other's places, and `join` puts them together.
    """
    if not self._idle_of_rules:
      return theta, jax.tree.map(lambda _: None, theta)
    idle, active = partition(theta, self.idle(theta))
    return active, idle

  @functools.cached_property
  def _idle_of_rules(self) -> dict[tuple[str, str], tuple[str, ...]]:
    found = {}
    for rule, site in self.rules:
      if isinstance(rule, Weight) and rule.idle:
        found[rule.name, site.path] = rule.idle
    return found

  # ---- After an update of the optimizer.

  @property
  def updates(self) -> bool:
    """Whether `update` does anything."""
    return any(rule.update for rule, _ in self.rules)

  @property
  def edits(self) -> bool:
    """Whether `edit` does anything."""
    return any(rule.update or rule.edit for rule, _ in self.rules)

  def edit(
    self,
    before,
    theta,
    optimizer,
    grads,
    step,
    key,
    steps: int | None = None,
    backbone: Any = None,
  ) -> tuple[Any, Any]:
    """(theta, optimizer) after the schedules and periodic edits that the method's rules make.

    These are `update` of each rule at each of its sites, and then `edit` of each rule.

    Args:
      before: theta before the optimizer's update.
      theta: after it.
      optimizer: the state of an Optax transform of what is trained.
      grads: of what is trained, as `split` gives it.
      step: how many updates were made, a scalar (it may be traced).
      key: a random key.
      steps: how many are made in all; methods whose edits follow a share of all need it.
      backbone: as given to `attach`; methods whose edits read its kernels need it.

    Raises:
      ValueError: an edit returns something else than it got, or the optimizer keeps no moments in
        the shape of each entry.
    """
    theta = self.update(theta, step, key)
    trained_before = self.split(before)[0]
    each_layer = None
    if backbone is not None:
      each_layer = functools.partial(
        layer_by_layer, backend_of(self.model).arrays(self.model, backbone)
      )
    return edited(
      self.rules, before, theta, trained_before, optimizer, grads, step, key, steps, each_layer
    )

  def stages(self, steps: int) -> tuple[int, ...]:
    """After how many updates other entries are trained: 0, and when the rules' stages begin.

    Args:
      steps: updates in all, of which stages may be shares.

    Raises:
      ValueError: a stage that begins at the last update or after it.
    """
    return begins(self.rules, steps)

  def at_stage(self, number: int, steps: int) -> 'Tuned':
    """The same method with what is trained after `number` of `steps` updates; theta is the same."""
    # A stage replaces what the rules fix at first, whatever the stage before it fixed.
    first = self.begin or self
    rules = staged(first.rules, number, steps)
    if all(new is old for (new, _), (old, _) in zip(rules, first.rules, strict=True)):
      return first
    return dataclasses.replace(first, rules=rules, begin=first)

  def update(self, theta, step, key):
    """theta after the schedules and periodic edits that the method's rules make.

    Args:
      theta: after the optimizer's update.
      step: how many updates were made, a scalar (it may be traced).
      key: a random key.
    """
    theta = {name: dict(sites) for name, sites in theta.items()}
    for rule, site in self.rules:
      if not rule.update or site.path not in theta.get(rule.name, {}):
        continue

      def edit(t, key, rule=rule, site=site):
        with blame(rule, site, 'update'):
          return rule.update(t, site, step, key)

      keys = _layer_keys(_key_of(key, rule, site), site)
      entries = theta[rule.name]
      entries[site.path] = site.per_layer(edit)(entries[site.path], keys)
    return theta

  def only(self, *names: str) -> 'Tuned':
    """The same model with some of its adapters; they read the same theta.

    Raises:
      ValueError: no rule has such a name.
    """
    known = self.method.names
    for name in names:
      if name not in known:
        raise ValueError(f'no adapter is called {name!r}; there are {", ".join(known)}')
    rules = tuple((rule, site) for rule, site in self.rules if rule.name in names)
    method = Method((pattern, rule) for pattern, rule in self.method if rule.name in names)
    return dataclasses.replace(self, rules=rules, method=method, begin=None)

  # ---- The model under the method.

  def apply(self, theta, backbone, *args, aux: bool = False, **kwargs):
    """The model's output under the method; differentiable in theta alone.

    Args:
      theta: from `init`.
      backbone: as given to `attach`; under stop_gradient.
      *args, **kwargs: of the model's call. For Linen `rngs`, `mutable` and `method` are those of
        `Module.apply`; for NNX `rngs={'dropout': key}` seeds the model's streams, `mutable=True` or
        a filter also returns the Variables that the call wrote, `method` names the method.
      aux: also return what rules give beside the output.

    Returns:
      The output, or (output, state) with `mutable`. With `aux` it is the first of two: the second
      is {name: array [layers, ...]} of `call.aux`, over all layers that gave that name, and under
      the key 'written' what `call.write` wrote, for `write_back`.
    """
    backbone = jax.tree.map(stop_gradient, backbone)
    theta = self._read(theta)
    try:
      out, recorded = self._traced(theta, backbone, args, kwargs, aux)
      if not aux:
        return out
      return out, beside_output(recorded, self._sites_of_theta, self._penalties(theta))
    except jax.errors.UnexpectedTracerError as error:
      error.add_note(
        'a rule recorded (tap, aux or write) inside a branch or a loop of the model, out of which '
        'nothing recorded comes: record outside of it'
      )
      raise

  def _penalties(self, theta) -> dict[str, list]:
    """{'penalty of NAME': [numbers of layers]} of the rules that have one."""
    found: dict[str, list] = {}
    for rule, site in self.rules:
      if not isinstance(rule, Weight) or rule.penalty is None:
        continue
      of_layers = rule.penalty
      for _ in site.theta_lengths:
        of_layers = jax.vmap(of_layers)
      numbers = of_layers(self._entry(theta, rule, site))
      found.setdefault(_penalty_of(rule), []).append(jnp.reshape(numbers, -1))
    return found

  def apply_each(self, thetas, index: jax.Array, backbone, *args, rngs=None, **kwargs):
    """The output with a theta for each example of a batch, such as the adapter of each user.

    Each example is computed as a batch of one under its own theta; products with the backbone stay
    one product for the batch. What does not lead with the batch, such as a mask for all, is passed
    on as it is.

    Args:
      thetas: several thetas as one tree, each array led by their number (`jpeft.thetas.stack`).
      index: which theta each example is for, [B] integers.
      backbone: as given to `attach`.
      *args, **kwargs: of the model's call, arrays of examples [B, ...].
      rngs: {name: key}; each example draws numbers of its own.

    Raises:
      ValueError: no argument leads with B, an output does not, or `aux` or `mutable` is asked for.
    """
    return apply_each(self.apply, thetas, index, backbone, args, kwargs, rngs)

  def _traced(self, theta, backbone, args, kwargs, aux: bool) -> tuple[Any, dict]:
    """(output, records); traced once more where a rule records without having said so."""
    backend = backend_of(self.model)
    flat = self._boxed(theta, backend.arrays(self.model, backbone))
    training, key = mode_of(self.model, args, self._kwargs_of_model(kwargs))
    extras = {path: self._extras(theta, path, key) for path in self._plan.wrapped}

    def run(records: bool):
      hook = self._hooks.of_mode(training, Recording(records, aux))
      wanted = self._hooks.wanted
      return backend.run(
        self.model, backbone, flat, extras, hook, wanted, records, args, dict(kwargs)
      )

    if (training, aux) in self._recording_modes or self._taps_are_declared:
      return run(True)
    try:
      return run(False)
    except NeedsRecording:
      self._recording_modes.add((training, aux))
      return run(True)

  @staticmethod
  def write_back(theta, aux: dict):
    """theta with the state that rules wrote in a call of `apply(..., aux=True)`."""
    return write_back(theta, aux)

  @property
  def has_loss(self) -> bool:
    """Whether the method says what training minimises, beside the task's loss."""
    own = any(rule.loss is not None for rule, _ in self.rules)
    return own or any(rule.penalty is not None for rule in self._weights)

  @property
  def _weights(self) -> list[Weight]:
    return [rule for rule, _ in self.rules if isinstance(rule, Weight)]

  def objective(
    self, run: Callable, loss: Callable, between: Callable = divergence
  ) -> tuple[jax.Array, Any, dict]:
    """(value, output, aux): what training minimises, in one or several passes over one theta.

    Args:
      run: (**takes) -> (output, aux), one pass: `apply(..., aux=True)` on a batch, with what the
        method's rules take for themselves.
      loss: output -> a scalar, the task's loss.
      between: (output, told) -> a scalar, how far an output is from another one; the divergence of
        classes if left out. Methods that learn from a pass of their own read it (`TaskLoss`).

    Returns:
      value: `loss(output)`, or what the method makes of it (`loss=` of a rule), and the penalties
        of rules.
      output: of the pass that counts for metrics.
      aux: of all passes, the last one's where several give the same; for `write_back`.
    """
    together: dict[str, Any] = {}

    def recorded(**takes):
      out, aux = run(**takes)
      together.update(aux)
      return out, aux

    own = {rule.loss for rule, _ in self.rules if rule.loss is not None}
    if own:
      (minimised,) = own
      value, out = minimised(TaskLoss(loss, between), recorded)
    else:
      out, _ = recorded()
      value = loss(out)
    penalties = {_penalty_of(rule) for rule in self._weights if rule.penalty is not None}
    for name in sorted(penalties):
      value = value + jnp.mean(together[name])
    return value, out, together

  def _kwargs_of_model(self, kwargs: dict) -> dict:
    """The keyword arguments of a call without those that rules take for themselves."""
    taken = {name for rule, _ in self.rules for name in rule.takes}
    return {name: value for name, value in kwargs.items() if name not in taken}

  def _boxed(self, theta, flat: dict) -> dict:
    """The arrays of the backbone with boxes in place of those that a Weight replaces."""
    flat = dict(flat)
    for rule, site, names in self._plan.boxed:
      # A model that maps over its parameters maps over arrays alone: the new ones are made before
      # it is called.
      if not self.sites.takes_boxes:
        flat |= merged(rule, site, self._entry(theta, rule, site), flat)
        continue
      whole = arrays_of(site, flat)
      t = jax.tree.map(site.spread, self._entry(theta, rule, site))
      if site.chosen is not None:
        t = (t, jnp.asarray(site.active))
      t = jax.tree.map(site.stack_restore, t)
      for name in names:
        flat[join_path(site.owner, name)] = Lazy(whole, t, _Applied(rule, site), name)
    return flat

  def _extras(self, theta, path: str, key):
    """Extra variables stored beside the parameters of the module at `path`.

    They are the theta of the rules there, in which layers of a stack they act, the number of the
    layer (see `Hooks`) and, in training, a random key.
    """
    site = self.sites[path]
    entries = {}
    active = {}
    for rule, own in self._plan.wrapped[path]:
      entry = entry_at_module(rule, own)
      entries[entry] = jax.tree.map(own.spread, self._entry(theta, rule, own))
      if own.chosen is not None:
        active[entry] = jnp.asarray(own.active)
    number = (
      jnp.zeros((), jnp.int32) if site.number is None else jnp.asarray(site.number, jnp.int32)
    )
    extras = {'theta': entries, 'active': active, self._hooks.number: number}
    if key is not None:
      own = named_key(key, site.path)
      extras['key'] = jax.random.key_data(_layer_keys(own, site))
    return jax.tree.map(site.stack_restore, extras)

  def _entry(self, theta, rule: Rule, site: Site):
    """The theta of one rule at one site; {} for a rule without any.

    Raises:
      ValueError: there should be some: theta is of another method.
    """
    try:
      return theta[rule.name][site.path]
    except KeyError:
      if site.path not in self.read_shapes.get(rule.name, {}):
        return {}
      there = ', '.join(theta) or 'nothing'
      raise ValueError(
        f'theta has no entry {rule.name!r} for {site.path!r} (it holds {there}): was it '
        'made by another method?'
      ) from None

  def _read(self, theta):
    """theta as the rules read it, with stop_gradient on the entries that are not trained."""
    theta, _ = self.active(self.expand(theta))
    if not any(rule.fixed for rule, _ in self.rules):
      return theta
    return stop_where(theta, trained(theta, self._fixed_of_rules))

  # ---- What a backward pass crosses.

  @functools.cached_property
  def crossing(self) -> programs.Crossing:
    """Which frozen products a cotangent crosses, by a trace of the example's forward pass."""
    arrays, put = taken_apart(self.example)
    backend = backend_of(self.model)

    def forward(theta, backbone, arrays):
      args, kwargs = backend.fresh(put(arrays))
      return self.apply(theta, backbone, *args, **kwargs)

    return programs.crossing(forward, self.shapes, self.backbone, arrays)

  @property
  def saved_bits(self) -> int | None:
    """The fewest bits of a value that the backward pass stores; None for whole values."""
    found = [rule.saved_bits for rule, _ in self.rules if isinstance(rule, Call)]
    return min((bits for bits in found if bits is not None), default=None)

  @property
  def memory(self) -> str:
    """The memory class: what the backward pass must keep of the backbone.

    It is what the rules declare, or more where a cotangent crosses more of the frozen products.
    """
    declared = memory_class(rule for rule, _ in self.rules)
    proved = NO_BACKPROP
    if self.crossing.share > _PARTIAL_SHARE:
      proved = PARTIAL_REENTRY
    if self.crossing.share > _FULL_SHARE:
      proved = FULL_CROSSING
    return max(declared, proved, key=MEMORY_CLASSES.index)

  @property
  def unused(self) -> list[str]:
    """Paths of trained entries of theta that reach no output of the example's forward pass."""
    paths = list(leaf_paths(self.shapes).items())
    trained = leaf_paths(self.trainable(self.shapes))
    return [paths[i][0] for i in self.crossing.unused if trained[paths[i][0]]]

  # ---- Merging.

  @property
  def mergeable(self) -> bool:
    """Whether `merge` can be called."""
    return not self.unmergeable

  @property
  def unmergeable(self) -> list[tuple[Rule, Site]]:
    """The rules that change the computation in a way that no weights express."""
    return [(rule, site) for rule, site in self.rules if not rule.mergeable]

  def merge(self, theta, backbone, outer: Mapping[str, Any] | None = None):
    """A backbone that the untouched model runs as `apply` runs theta.

    Where a kernel is a box, what replaces it is plain, unless the rule returns a box too.

    Args:
      theta: from `init`.
      backbone: as given to `attach`.
      outer: {name: scalar} for what rules read of each call (`Weight.outer`): the merged weights
        serve all calls at that value.

    Raises:
      ValueError: some rule changes the computation in a way that no weights express, or a number in
        `outer` is missing or read by no rule.
    """
    read_names = {
      entry for rule, _ in self.rules if isinstance(rule, Weight) for entry in rule.outer
    }
    for entry in outer or {}:
      if entry not in read_names:
        raise ValueError(
          f'merge: outer={entry!r} is read by no rule{did_you_mean(entry, read_names)}'
        )
    for rule, site in self.unmergeable:
      raise ValueError(
        f'{rule.name} at {site.path!r} changes the computation, not the weights: it '
        'cannot be merged'
      )
    backend = backend_of(self.model)
    theta = self._read(theta)
    flat = dict(backend.arrays(self.model, backbone))
    for rule, site in self.rules:
      flat |= merged(rule, site, self._entry(theta, rule, site), flat, outer)
    return backend.replace(self.model, backbone, flat)

  # ---- What is resolved once and read at every trace.

  @functools.cached_property
  def _plan(self) -> Plan:
    return plan(self.rules, self.sites)

  @functools.cached_property
  def _hooks(self) -> Hooks:
    backend = backend_of(self.model)
    return Hooks(backend, self.sites, self._plan, self._sites_of_theta, self._entry_shapes)

  def _entry_shapes(self):
    return self.active(self.read_shapes)[0]

  @functools.cached_property
  def _taps_are_declared(self) -> bool:
    return any(isinstance(rule, Call) and rule.taps for rule, _ in self.rules)

  @functools.cached_property
  def _recording_modes(self) -> set[tuple[bool, bool]]:
    """(training, aux) of the calls in which a rule was seen to record."""
    return set()


@dataclasses.dataclass(frozen=True, eq=False)
class _Applied:
  """(theta, arrays) -> new arrays, for a box."""

  rule: Weight
  site: Site

  def __call__(self, theta, arrays):
    active = None
    if self.site.chosen is not None:  # it is computed in every layer, and counts in some
      theta, active = theta
    theta = with_outer(self.rule, self.site, theta)
    check_scalars(self.rule, self.site, theta)
    with blame(self.rule, self.site, 'apply'):
      new = changed(self.rule.apply, theta, self.site, arrays)
    if active is None:
      return new
    return {name: jnp.where(active.reshape(()), read(x), arrays[name]) for name, x in new.items()}


def _key_of(key, rule: Rule, site: Site):
  """A key for a rule at a site that no other rule or site changes."""
  return named_key(key, f'{rule.name} {site.path}')


def _layer_keys(key, site: Site):
  """The key of each layer of a stack that is chosen; the key itself without a stack."""
  if not site.axes:
    return key
  return site.choose(jax.random.split(key, site.lengths))


def _penalty_of(rule: Rule) -> str:
  """What the penalties of the layers of a rule are called beside the output."""
  return f'penalty of {rule.name}'
