"""FourierFT: an update that is a few frequencies.

Gao et al., 2024 (arXiv 2405.03003). For a kernel w [m, n] (the paper's W is its transpose), c [k]
at places (q, p) of a spectrum [n, m], zero elsewhere, that are drawn once and shared by all kernels
of a shape:

  w'_ij = w_ij + s / (m n) sum_k c_k cos(2 pi (p_k i / m + q_k j / n))      c = 0 at first

a cosine of a sum is two products of cosines and sines, so that the update is of rank up to 2 k.
Where that is less work than the kernel the layer computes y' = y + s / (m n) (((x C_m) * c) C_n^T -
((x S_m) * c) S_n^T), and no gradient of the kernel's size is formed. Elsewhere w' is formed, and
again in the backward pass.

The places are those that Hugging Face peft draws by the seed: theta and its files hold c alone,
there fourierft_spectrum.

Deviations. The paper draws c from N(0, 1), so that it starts elsewhere than at the backbone:
init='normal'. A convolution is folded to a matrix as for LoRA.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Method, at, factory, matrix

from ..check import choice, require, whole
from .snell import changed_product


@factory
def fourierft(
  count: int = 1000,
  scale: float = 150.0,
  targets: str = '{q}|{v}',
  init: str = 'zero',
  seed: int = 777,
  name: str = 'fourierft',
) -> Method:
  """Fourier transform fine-tuning.

  Args:
    count: k, frequencies of each kernel.
    scale: s.
    targets: pattern of sites; every kernel they own is adapted.
    init: of c, 'zero' or 'normal'.
    seed: of the places.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, a kernel of fewer numbers than
      `count`.
  """
  whole('fourierft', 'count', count, 1)
  require(scale > 0, 'fourierft', 'scale', scale, 'must be greater than 0')
  choice('fourierft', 'init', init, ('zero', 'normal'))
  whole('fourierft', 'seed', seed, 0)

  def begin(key, w):
    fits = count <= w.size
    require(fits, name, 'count', count, f'frequencies are more than a kernel {[*w.shape]} has')
    c = jnp.zeros(count) if init == 'zero' else jax.random.normal(key, (count,))
    return {'c': c}

  def update(t, shape: tuple[int, int]):
    found = jnp.zeros(shape)
    for sign, of_inputs, of_outputs in waves(seed, shape, count):
      found = found + (of_inputs * (sign * t['c'])) @ of_outputs
    return scale / (shape[0] * shape[1]) * found

  def weight(t, w):
    return w + update(t, w.shape).astype(w.dtype)

  def dot(t, x, y, w, key):
    fan_in, fan_out = shape = x.fan_in, y.shape[-1]
    if 2 * count * (fan_in + fan_out) > fan_in * fan_out:

      def of_shape(t):
        return update(t, shape)

      return changed_product(of_shape, t, x, y, w, key, 0, 0)
    c = scale / (fan_in * fan_out) * t['c']
    for sign, of_inputs, of_outputs in waves(seed, shape, count):
      y = y + sign * ((x @ of_inputs) * c) @ of_outputs.astype(y.dtype)
    return y

  return at(targets, matrix(name, begin, weight, dot))


def waves(seed: int, shape: tuple[int, int], count: int):
  """(sign, of inputs [fan_in, k], of outputs [k, fan_out]) of the cosines, and of the sines."""
  fan_in, fan_out = shape
  places = drawn_places(seed, fan_in * fan_out, count)
  inputs, outputs = _angles(fan_in, places % fan_in), _angles(fan_out, places // fan_in)
  return (1, jnp.cos(inputs), jnp.cos(outputs).T), (-1, jnp.sin(inputs), jnp.sin(outputs).T)


def _angles(size: int, frequencies: np.ndarray) -> jax.Array:
  """2 pi f i / size of the numbers i below a size and frequencies f: [size, k]."""
  # In two parts, so that no product leaves int32 for sizes up to 700,000.
  step = 256
  whole_steps, rest = jnp.divmod(jnp.arange(size)[:, None], step)
  of_steps = (frequencies.astype(np.int64) * step % size).astype(np.int32)
  turns = (whole_steps * of_steps + rest * frequencies) % size
  return 2 * jnp.pi / size * turns.astype(jnp.float32)


@functools.lru_cache(maxsize=64)
def drawn_places(seed: int, size: int, count: int) -> np.ndarray:
  """The first numbers of a permutation of those below a size, as torch.randperm draws it.

  Args:
    seed: of a Mersenne twister.
    size: below 2^32 / 20.
    count: how many.
  """
  # Of all 32 bits numpy gives what its twister gives.
  drawn = np.random.RandomState(seed).randint(0, 2**32, count, np.uint32)
  moved: dict[int, int] = {}  # what stands elsewhere than at its own place
  places = np.empty(count, np.int32)
  for i, number in enumerate(drawn.tolist()):
    other = i + number % (size - i)
    places[i] = moved.get(other, other)
    moved[other] = moved.get(i, i)
  return places
