"""VeLoRA: of a trained layer's input the backward pass stores one number a group of channels.

Miles et al., 2024 (arXiv 2405.17991; roymiles/VeLoRA). The forward pass is exact. A token x [D] is
cut into M groups x_g of s = D / M channels; the backward pass stores z = x_g . v of each, v [s] a
fixed unit vector, and computes with z v in place of the group:

  dx = g W (exact)        dW = scale * sum (z v)^T g

The gradient is biased: z v is the projection of a group on v. Lost is sqrt(1 - sum z^2 / sum x^2)
of the input, much where its mean is near 0 (behind a norm). v starts random; `directed` sets it to
the normalised mean group of the first batch, as the paper does, and it stays.

`velora` trains the kernels of layers this way; `projected(lora(32, targets='{v}|{fc2}'))` does the
same for what another method multiplies their inputs with. Memory is saved only where the input is
stored for nothing else: of layers that share an input (query, key, value), all have to be treated.
"""

import dataclasses
import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from einops import rearrange

from jpeft.core import (
  Call,
  Method,
  Operand,
  Site,
  Tuned,
  Weight,
  at,
  attach,
  chain,
  factory,
  matrix,
)
from jpeft.residuals import tied

from ..arguments import first_array
from ..check import whole


@factory
def velora(
  groups: int = 32, scale: float = 1.0, targets: str = '{v}|{fc2}', name: str = 'velora'
) -> Method:
  """Trains whole kernels, from projected inputs.

  Args:
    groups: M, numbers that are stored of a token; divides the width of the input.
    scale: of the kernel's gradient.
    targets: pattern of sites: layers that multiply the last axis of their input by one kernel.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a layer of another form, or one
      that offers no injection point.
  """
  kernels = matrix(name, _copy, _stored, _product)
  return projected(at(targets, kernels), groups, scale)


# The rule for one kernel [fan_in, fan_out] that is trained as a whole; see `jpeft.core.matrix`.


def _copy(key, w) -> dict:
  # Small updates are lost in bfloat16, so theta has at least float32.
  return {'w': w.astype(jnp.promote_types(w.dtype, jnp.float32))}


def _stored(t, w) -> jax.Array:
  return t['w'].astype(w.dtype)


def _product(t, x, y, w, key) -> jax.Array:
  return x @ t['w']


@factory
def projected(method: Method, groups: int = 32, scale: float = 1.0) -> Method:
  """A method whose rules compute with projected inputs in the backward pass.

  Args:
    method: of rules that act on the input of a layer, such as `lora(32, targets='{v}|{fc2}')`.
    groups: M, see `velora`.
    scale: of the gradients of what the inputs are multiplied with.

  Raises:
    ValueError: a rule that does not act on inputs, or a hyperparameter outside its range.
  """
  whole('velora', 'groups', groups, 1)
  rules = []
  for pattern, rule in method:
    if not isinstance(rule, Weight) or rule.dot is None:
      raise ValueError(
        f'velora: {rule.name} does not multiply the input of a layer, so nothing is to be projected'
      )
    rules.append((pattern, _Projected(rule, groups, scale).weight()))
  return Method(rules)


@dataclasses.dataclass(frozen=True, eq=False)
class _Projected:
  """A rule whose input is projected; theta has the direction v [s] beside the rule's own arrays."""

  rule: Weight
  groups: int
  scale: float

  def weight(self) -> Weight:
    return dataclasses.replace(
      self.rule,
      init=self.init,
      apply=self.apply,
      dot=self.dot,
      fixed=(*self.rule.fixed, 'direction'),
      exact=(*self.rule.exact, 'direction'),
      requires='input',
    )

  def init(self, key, site: Site, arrays) -> dict:
    for name in site.matrices:
      leaf = site.leaves[name]
      one_axis = leaf.use == 'dot_general' and len(leaf.ins) == 1
      if not one_axis or leaf.fan_in % self.groups:
        raise ValueError(
          f'velora: {site.path!r} must multiply one axis of its input, whose length '
          f'groups={self.groups} divides; its {name} is {list(leaf.shape)}'
        )
    kernel = site.leaves[site.matrices[0]]
    v = jax.random.normal(key, (kernel.fan_in // self.groups,))
    return {**self.rule.init(key, site, arrays), 'direction': v / jnp.linalg.norm(v)}

  def apply(self, t, site: Site, arrays) -> dict:
    return self.rule.apply(_without_direction(t), site, arrays)

  def dot(self, t, x: Operand, y, w, key) -> jax.Array:
    v = t['direction']
    if x.x.shape[-1] != self.groups * v.size:
      raise ValueError(
        f'velora: the input {list(x.x.shape)} of a layer is not multiplied along its last axis'
      )
    projected = _ProjectedOperand(x.x, x.multiply, x.rows, x.fan_in, v, self.scale)
    return self.rule.dot(_without_direction(t), projected, y, w, key)


def _without_direction(t) -> dict:
  return {name: x for name, x in t.items() if name != 'direction'}


@dataclasses.dataclass(frozen=True)
class _ProjectedOperand(Operand):
  """An input of which the backward pass of a product stores the projections alone."""

  direction: jax.Array
  scale: float

  def __matmul__(self, m: jax.Array) -> jax.Array:
    """x @ m for m [fan_in, k], whose gradient is computed from projections of x."""

    def multiply(x, m):
      return self.multiply(x, m.astype(x.dtype))

    @jax.custom_vjp
    def product(x, m, v):
      return multiply(x, m)

    def forward(x, m, v):
      groups = rearrange(x, '... (m s) -> ... m s', s=v.size)
      z = groups @ v.astype(x.dtype)  # [..., M]
      return multiply(x, m), (z, m, v)

    def backward(stored, g):
      # Tied to the cotangent: XLA could else rebuild the inputs early, and keep those.
      (z, m, v), g = tied(stored, g)
      shape = jax.ShapeDtypeStruct(self.x.shape, self.x.dtype)
      (dx,) = jax.linear_transpose(lambda x: multiply(x, m), shape)(g)
      rows = (z[..., None] * v.astype(z.dtype)).reshape(-1, m.shape[0])  # [tokens, fan_in]
      d_out = g.reshape(-1, g.shape[-1])  # [tokens, k]
      dm = jnp.dot(rows.T, d_out, preferred_element_type=jnp.float32)
      return dx, (self.scale * dm).astype(m.dtype), jnp.zeros_like(v)

    product.defvjp(forward, backward)
    return product(self.x, m, self.direction)


def directed(tuned: Tuned, theta, backbone, *args, **kwargs):
  """theta with every direction v set to the normalised mean group of a batch.

  Args:
    tuned: from `attach`.
    theta: from `tuned.init`.
    backbone: as given to `attach`.
    *args, **kwargs: of the model's call, with the first batch.
  """
  found = []  # (name of the rule, path of the site)
  for rule, site in tuned.rules:
    t = theta.get(rule.name, {}).get(site.path, {})
    if 'direction' in t:
      found.append((rule.name, site.path))
  paths = dict.fromkeys(path for _, path in found)
  method = chain(tuned.method, _means_of_inputs(paths))
  with_means = attach(tuned.model, method, backbone, *args, **kwargs)
  taps = with_means.apply(theta, backbone, *args, **kwargs)

  theta = {name: dict(sites) for name, sites in theta.items()}
  for name, path in found:
    t = theta[name][path]
    size = t['direction'].shape[-1]
    mean = taps[path]['mean']  # [*lengths of a stack, fan_in]
    v = rearrange(mean, '... (m s) -> ... m s', s=size).mean(-2)
    v = v / jnp.linalg.norm(v, axis=-1, keepdims=True)
    theta[name][path] = {**t, 'direction': v}
  return theta


def _means_of_inputs(paths: Iterable[str]) -> Method:
  """A method by which the model returns {path: {'mean': of the input of that site, [fan_in]}}."""

  def record(t, call, *args, **kwargs):
    x = first_array(call, args, kwargs)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    call.tap(mean=rows.mean(0))
    return call(*args, **kwargs)

  def read(t, call, *args, **kwargs):
    call(*args, **kwargs)
    return call.taps()

  pattern = '|'.join(re.escape(path) for path in paths)
  return chain(
    at(pattern, Call('velora means', record, taps=True)),
    at('', Call('velora means', read, taps=True)),
  )
