"""SSF: a learned scale and shift of every channel behind every linear map, convolution and norm.

Lian et al., 2022, "Scaling & Shifting Your Features" (arXiv 2210.08823); official code
dongzelian/SSF.

  y' = gamma * y + beta, per channel, behind: patch embedding, norm1, q, k, v, attention output,
  norm2, fc1 (before the activation), fc2, final norm.

Every one of these is affine, so the pair is a change of weights, which `merge` writes down. With w,
b the kernel and bias of a layer, g, c the scale and shift of a norm:

  linear, convolution   w' = w * gamma (columns), b' = gamma * b + beta
  norm                  g' = gamma * g,           c' = gamma * c + beta

gamma ~ N(1, 0.02^2) and beta ~ N(0, 0.02^2): the function does not start as the backbone.

Deviations. A layer without bias, or a norm without shift, has nothing that beta could merge into,
and the model is not changed: it has gamma alone, and everything merges. A module that owns several
bare kernels has a gamma for each and no beta. Separate q, k and v have the channels of a fused qkv.
The recipe's weight decay leaves gamma and beta alone; that belongs to the optimizer.
"""

import math

import jax

from jpeft.core import Leaf, Method, Site, Weight, at, factory

from ..check import require

# The standard deviation of gamma and beta at the start.
STARTS = {'normal': 0.02, 'identity': 0.0}


@factory
def ssf(
  targets: str = '{patch}|{norm}|{linear}|{final_norm}', init: str = 'normal', name: str = 'ssf'
) -> Method:
  """Scales and shifts features; merges completely.

  Args:
    targets: pattern of sites; every kernel and every norm's scale that they own gets a gamma.
    init: 'normal', the paper's; 'identity', gamma = 1 and beta = 0: the function starts unchanged.
    name: in theta: {array name: {'scale': gamma, 'shift': beta}}.

  Raises:
    ValueError: an unknown init.
  """
  require(init in STARTS, 'ssf', 'init', init, "must be 'normal' or 'identity'")
  std = STARTS[init]

  def init_site(key, site, arrays):
    keys = iter(jax.random.split(key, 2 * max(len(site.leaves), 1)))
    theta = {}
    for array in _scaled(site):
      channels = _channels(site.leaves[array])
      theta[array] = {'scale': 1.0 + std * jax.random.normal(next(keys), channels)}
      if _shifted(site) is not None:
        theta[array]['shift'] = std * jax.random.normal(next(keys), channels)
    return theta

  def apply(theta, site, arrays):
    new = {}
    for array, t in theta.items():
      leaf = site.leaves[array]
      gamma = t['scale']
      if leaf.is_matrix:
        columns = gamma[..., None, :]  # [*matrices, 1, outputs]
        new[array] = leaf.unfold(leaf.fold(arrays[array]) * columns)
      else:
        gamma = gamma.reshape(leaf.shape)
        # Some norms store g - 1: gamma (g - 1 + offset) = g' - 1 + offset.
        new[array] = arrays[array] * gamma + leaf.offset * (gamma - 1)
      if 'shift' in t:
        bias = _shifted(site)
        shape = site.leaves[bias].shape
        new[bias] = t['scale'].reshape(shape) * arrays[bias] + t['shift'].reshape(shape)
    return new

  def dot(theta, x, y, w, key):
    # The bias, with beta in it, is added by the layer behind this product.
    (t,) = theta.values()
    return y * t['scale']

  return at(targets, Weight(name, init_site, apply, dot))


def _channels(leaf: Leaf) -> tuple[int, ...]:
  """The shape of gamma: (*matrices, outputs) of a kernel, the channels of a norm's scale."""
  if leaf.is_matrix:
    matrices = [leaf.shape[axis] for axis in leaf.batch]
    return (*matrices, leaf.fan_out)
  return (math.prod(leaf.shape),)


def _scaled(site: Site) -> list[str]:
  """The kernels of a site; where there are none, what multiplies the features of a norm."""
  if site.matrices:
    return site.matrices
  return [name for name, leaf in site.leaves.items() if leaf.use == 'mul' and leaf.shape]


def _shifted(site: Site) -> str | None:
  """The array that is added behind the site's only kernel or scale, and can take up beta."""
  scaled = _scaled(site)
  if len(scaled) != 1:
    return None
  size = math.prod(_channels(site.leaves[scaled[0]]))
  added = []
  for name, leaf in site.leaves.items():
    if leaf.use == 'add' and math.prod(leaf.shape) == size:
      added.append(name)
  if len(added) != 1:
    return None
  return added[0]
