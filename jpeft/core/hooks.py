"""What runs in place of the calls of modules at which rules act."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from .attention import inline
from .backends.protocol import Backend
from .context import Bound, Recording, acting, run_call, run_if, with_outer
from .fused import fused
from .keys import named_key
from .recorded import SitesOfTheta, records_for
from .resolve import Plan, entry_at_module
from .rules import Call, Weight
from .sites import Sites


class Hooks:
  """The hooks of one method on one model: one object a mode.

  The frameworks cache jitted layers by the hook, so that a mode must always have the same one, and
  a hook must have no arrays of its own.

  Attributes:
    number: name of the extra variable with the number of the layer. It is that of this object: it
      changes the structure of the pytree, so that a jitted layer that was traced under the hooks of
      another method is traced again.
  """

  def __init__(
    self,
    backend: Backend,
    sites: Sites,
    plan: Plan,
    sites_of_theta: SitesOfTheta,
    shapes: Callable[[], Any],
  ):
    """Made by Tuned.

    Args:
      backend: of the model.
      sites: of the model.
      plan: where each rule acts.
      sites_of_theta: the sites of the rules, with the layers in which they act.
      shapes: () -> theta as shapes.
    """
    self.number = f'id{id(self)}'
    self._backend = backend
    self._sites = sites
    self._plan = plan
    self._sites_of_theta = sites_of_theta
    self._shapes = shapes
    self._by_mode: dict[tuple[bool, Recording], Callable] = {}

  @functools.cached_property
  def wanted(self) -> frozenset[tuple[str, str]]:
    """(path, method) of the calls that are wrapped."""
    wanted = {(path, '__call__') for path in self._plan.quantized}
    for path, rules in self._plan.wrapped.items():
      wanted |= {(path, rule.method) for rule, _ in rules}
    # Inline attention may run in another form in long contexts.
    wanted |= {(path, '__call__') for path, site in self._sites.items() if site.inline}
    return frozenset(wanted)

  def of_mode(self, training: bool, recording: Recording) -> Callable:
    """The hook of a call of the model: see `Backend.run`."""
    mode = training, recording
    if mode not in self._by_mode:
      self._by_mode[mode] = functools.partial(self._hook, training, recording)
    return self._by_mode[mode]

  def _hook(self, training, recording, path, method, module, call, extras, taps):
    """Wraps one call of one module."""
    if path not in self._plan.wrapped and path not in self._plan.quantized:
      return inline(self._sites[path], module, call)
    key = extras.get('key')
    if key is not None:
      key = jax.random.wrap_key_data(key)
    rules = [(rule, site) for rule, site in self._plan.wrapped[path] if rule.method == method]
    rules = acting(rules, path)
    theta = {}
    for rule, site in rules:
      entry = entry_at_module(rule, site)
      theta[entry] = self._one_layer(extras['theta'].get(entry, {}), rule.name, site.path)
    active = {name: x.reshape(()) for name, x in extras['active'].items()}
    number = self._sites[path].number
    if self._sites[path].axes:
      number = extras[self.number].reshape(())
    if self._sites[path].inline and method == '__call__':
      call = inline(self._sites[path], module, call)
    call = self._with_products(rules, theta, active, training, path, method, module, call, key)
    for position, (rule, site) in enumerate(rules):
      if not isinstance(rule, Call):
        continue

      def own_taps(name=rule.name):
        return records_for(name, taps(), self._sites_of_theta)

      bound = Bound(
        call,
        rule=rule,
        site=site,
        module=module,
        backend=self._backend,
        position=position,
        position_at=functools.partial(self._position, rule.name),
        number=number,
        taps=own_taps,
        recording=recording,
        theta=theta.get(rule.name, {}),
        key=named_key(key, rule.name),
        training=training,
      )
      call = functools.partial(run_call, rule, theta.get(rule.name, {}), bound)
      if rule.name in active:
        call = functools.partial(run_if, active[rule.name], call, bound)
    return call

  def _with_products(self, rules, theta, active, training, path, method, module, call, key):
    """The call of a module with the Weights that act on its product; the call itself without."""
    weights = []
    for rule, site in rules:
      if isinstance(rule, Weight):
        entry = entry_at_module(rule, site)
        t = with_outer(rule, site, theta[entry])
        weights.append((rule, site, t, active.get(entry)))
    box = None
    if path in self._plan.quantized and method == '__call__':
      box = self._backend.stored(module, self._plan.quantized[path])
    if not weights and box is None:
      return call
    for rule, *_ in weights:
      if training and key is None and rule.requires == 'input in training':
        raise ValueError(
          f'{rule.name} dropout at {path!r} needs a random key: call '
          "tuned.apply(..., rngs={'dropout': key})"
        )
    return fused(weights, self._sites[path], module, call, key if training else None, box)

  def _position(self, name: str, path: str) -> int:
    """How many of the rules around the call at a path come before those called `name`."""
    names = [rule.name for rule, _ in self._plan.wrapped.get(path, ()) if rule.method == '__call__']
    return names.index(name) if name in names else len(names)

  def _one_layer(self, t, name: str, path: str):
    """The theta of one layer, without the axes of one that restoring the stack added."""
    site = self._sites_of_theta[name, path]
    if not t or not site.axes:
      return t
    stack = len(site.theta_lengths)
    shapes = self._shapes()[name][path]
    return jax.tree.map(lambda x, shape: x.reshape(shape.shape[stack:]), t, shapes)
