"""VeLoRA: of a trained layer's input, one number a group of channels is kept (arXiv 2405.17991,
roymiles/VeLoRA).

The forward pass is exact. A token x [D] is cut into M groups of s = D / M channels; its backward
pass keeps z = x_g v of each, v [s] a fixed unit vector, and sees z v in place of the group:

  dx = g W (exact)        dW = scale * sum (z v)^T g

The gradient is biased: z v is the projection of a group on v. Lost is sqrt(1 - sum z^2 / sum x^2)
of the input, much where its mean is near 0 (behind a norm). v starts random; `directed` sets it to
the normalised mean group of the first batch, as the paper does, and it stays.

`velora` trains the kernels of layers this way; `projected(lora(32, targets='{v}|{fc2}'))` does the
same for what another method multiplies their inputs with. The gain is there only where the input is
kept for nothing else: of layers that share an input (query, key, value), all have to be treated.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp

from jpeft.core import Call, Method, Operand, Tuned, Weight, at, attach, chain, factory, matrix
from jpeft.residuals import tied


@factory
def velora(
  groups: int = 32, scale: float = 1.0, targets: str = '{v}|{fc2}', name: str = 'velora'
) -> Method:
  """Trains whole kernels, from projected inputs.

  Args:
    groups: M, numbers that are kept of a token; divides the width of the input.
    scale: of the kernel's gradient.
    targets: pattern of sites: layers that multiply the last axis of their input by one kernel.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a layer of another form, or one
      that offers no injection point.
  """
  kernels = matrix(
    name,
    lambda key, w: {'w': w.astype(jnp.promote_types(w.dtype, jnp.float32))},
    lambda t, w: t['w'].astype(w.dtype),
    lambda t, x, y, w, key: x @ t['w'],
  )
  return projected(at(targets, kernels), groups, scale)


@factory
def projected(method: Method, groups: int = 32, scale: float = 1.0) -> Method:
  """A method whose rules see projected inputs in the backward pass.

  Args:
    method: of rules that act on the input of a layer, such as `lora(32, targets='{v}|{fc2}')`.
    groups: M, see `velora`.
    scale: of the gradients of what the inputs are multiplied with.

  Raises:
    ValueError: a rule that does not act on inputs, or a hyperparameter outside its range.
  """
  if int(groups) != groups or groups < 1:
    raise ValueError(f'velora: groups={groups!r} must be a whole number, at least 1')
  for _, rule in method:
    if not isinstance(rule, Weight) or rule.dot is None:
      raise ValueError(
        f'velora: {rule.name} does not multiply the input of a layer, so nothing is to be projected'
      )
  return Method((pattern, _projected(rule, groups, scale)) for pattern, rule in method)


def directed(tuned: Tuned, theta, backbone, *args, **kwargs):
  """theta with every direction v set to the normalised mean group of a batch.

  Args:
    tuned: from `attach`.
    theta: from `tuned.init`.
    backbone: as given to `attach`.
    *args, **kwargs: of the model's call, with the first batch.
  """
  entry = lambda rule, site: theta.get(rule.name, {}).get(site.path, {})
  paths = [(rule.name, site) for rule, site in tuned.rules if 'direction' in entry(rule, site)]
  pattern = '|'.join(dict.fromkeys(re.escape(site.path) for _, site in paths))

  def record(t, call, *args, **kwargs):
    x = next(iter(call.inputs(*args, **kwargs).values()))
    call.tap(mean=x.reshape(-1, x.shape[-1]).astype(jnp.float32).mean(0))
    return call(*args, **kwargs)

  def read(t, call, *args, **kwargs):
    call(*args, **kwargs)
    return call.taps()

  taps = chain(
    at(pattern, Call('velora means', record, taps=True)),
    at('', Call('velora means', read, taps=True)),
  )
  means = attach(tuned.model, chain(tuned.method, taps), backbone, *args, **kwargs).apply(
    theta, backbone, *args, **kwargs
  )
  theta = {name: dict(sites) for name, sites in theta.items()}
  for name, site in paths:
    t, mean = theta[name][site.path], means[site.path]['mean']
    v = mean.reshape(*mean.shape[:-1], -1, t['direction'].shape[-1]).mean(-2)
    theta[name][site.path] = {**t, 'direction': v / jnp.linalg.norm(v, axis=-1, keepdims=True)}
  return theta


def _projected(rule: Weight, groups: int, scale: float) -> Weight:
  inner = lambda t: {name: x for name, x in t.items() if name != 'direction'}

  def init(key, site, arrays):
    for name in site.matrices:
      leaf = site.leaves[name]
      if leaf.use != 'dot_general' or len(leaf.ins) != 1 or leaf.fan_in % groups:
        raise ValueError(
          f'velora: {site.path!r} must multiply one axis of its input, whose length groups={groups} '
          f'divides; its {name} is {list(leaf.shape)}'
        )
    v = jax.random.normal(key, (site.leaves[site.matrices[0]].fan_in // groups,))
    return {**rule.init(key, site, arrays), 'direction': v / jnp.linalg.norm(v)}

  def dot(t, x, y, w, key):
    if x.x.shape[-1] != groups * t['direction'].size:
      raise ValueError(
        f'velora: the input {list(x.x.shape)} of a layer is not multiplied along its last axis'
      )
    return rule.dot(inner(t), _Projected(x.x, x.multiply, t['direction'], scale), y, w, key)

  return dataclasses.replace(
    rule,
    init=init,
    apply=lambda t, site, arrays: rule.apply(inner(t), site, arrays),
    dot=dot,
    fixed=(*rule.fixed, 'direction'),
    exact=(*rule.exact, 'direction'),
    requires='input',
  )


@dataclasses.dataclass(frozen=True)
class _Projected(Operand):
  """An input that the backward pass of a product remembers by its projections."""

  direction: jax.Array
  scale: float

  def __matmul__(self, m: jax.Array) -> jax.Array:
    v = self.direction
    along = lambda m: lambda x: self.multiply(x, m.astype(x.dtype))

    @jax.custom_vjp
    def product(x, m, v):
      return along(m)(x)

    def forward(x, m, v):
      groups = x.reshape(*x.shape[:-1], -1, v.size)
      return along(m)(x), (groups @ v.astype(x.dtype), m, v)

    def backward(kept, g):
      (z, m, v), g = tied(kept, g)
      (dx,) = jax.linear_transpose(along(m), jax.ShapeDtypeStruct(self.x.shape, self.x.dtype))(g)
      rows = (z[..., None] * v.astype(z.dtype)).reshape(-1, m.shape[0])
      dm = jnp.dot(rows.T, g.reshape(-1, g.shape[-1]), preferred_element_type=jnp.float32)
      return dx, (self.scale * dm).astype(m.dtype), jnp.zeros_like(v)

    product.defvjp(forward, backward)
    return product(self.x, m, v)
