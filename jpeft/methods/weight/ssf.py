"""SSF: a learned scale and shift of every channel behind every linear map, convolution and norm.

Lian et al., 2022, "Scaling & Shifting Your Features" (arXiv 2210.08823); official code
dongzelian/SSF.

  y' = gamma * y + beta, per channel, behind: patch embedding, norm1, q, k, v, attention output,
  norm2, fc1 (before the activation), fc2, final norm.

Every one of these is affine, so the pair is a change of weights, which `merge` writes down:

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

STD = 0.02


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
  if init not in ('normal', 'identity'):
    raise ValueError(f"ssf: init={init!r} must be 'normal' or 'identity'")
  std = STD if init == 'normal' else 0.0

  def begin(key, site, arrays):
    keys = iter(jax.random.split(key, 2 * max(len(site.leaves), 1)))
    draw = lambda leaf, mean: mean + std * jax.random.normal(next(keys), _channels(leaf))
    theta = {}
    for n in _scaled(site):
      theta[n] = {'scale': draw(site.leaves[n], 1.0)}
      if _shifted(site) is not None:
        theta[n]['shift'] = draw(site.leaves[n], 0.0)
    return theta

  def apply(theta, site, arrays):
    new = {}
    for n, t in theta.items():
      leaf = site.leaves[n]
      if leaf.is_matrix:
        new[n] = leaf.unfold(leaf.fold(arrays[n]) * t['scale'][..., None, :])
      else:
        scale = t['scale'].reshape(leaf.shape)
        new[n] = arrays[n] * scale + leaf.offset * (
          scale - 1
        )  # gamma (g + c) = g' + c, where norms store g
      if 'shift' in t:
        bias = _shifted(site)
        scale, shift = (t[k].reshape(site.leaves[bias].shape) for k in ('scale', 'shift'))
        new[bias] = scale * arrays[bias] + shift
    return new

  def dot(theta, x, y, w, key):
    (t,) = theta.values()
    return y * t['scale']

  return at(targets, Weight(name, begin, apply, dot))


def _channels(leaf: Leaf) -> tuple[int, ...]:
  """(matrices, outputs) of a kernel, the channels of a norm's scale."""
  return (
    (*(leaf.shape[i] for i in leaf.batch), leaf.fan_out)
    if leaf.is_matrix
    else (math.prod(leaf.shape),)
  )


def _scaled(site: Site) -> list[str]:
  """The kernels of a site; where there are none, what multiplies the features of a norm."""
  return site.matrices or [n for n, leaf in site.leaves.items() if leaf.use == 'mul' and leaf.shape]


def _shifted(site: Site) -> str | None:
  """The array that is added behind the site's only kernel or scale, and can hold beta."""
  if len(_scaled(site)) != 1:
    return None
  (size,) = {math.prod(_channels(site.leaves[n])) for n in _scaled(site)}
  added = [
    n for n, leaf in site.leaves.items() if leaf.use == 'add' and math.prod(leaf.shape) == size
  ]
  return added[0] if len(added) == 1 else None
