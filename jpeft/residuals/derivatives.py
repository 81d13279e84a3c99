"""Tables for derivatives stored as codes: a K-piece constant q in place of f'.

A table is 2^k - 1 rising borders and 2^k levels: q(x) = levels[#{i : borders[i] < x}]. The optimal
one minimises

  E = int over R of (f'(x) - q(x))^2 dx,    K = 2^k pieces

(few-bit backward, Novikov et al., 2022, arXiv 2202.00441). E is finite only if the outermost levels
are the limits 0 and 1 of f'. Inside, level = (f(b) - f(a)) / (b - a) on a piece [a, b], and
f'(border) is the mean of the two levels beside it. f' is not monotone and has many local optima, so
a dynamic program on a grid finds the right one, and Newton's method then solves the equations.
f'(x) + f'(-x) = 1 makes the optimum symmetric: only x > 0 is computed.

Function-matching tables (Approx-BP, Yang et al., 2024, arXiv 2406.16282) are slopes of a sum of
ReLUs near f.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import special

_END = 40.0  # beyond it f' of every function here equals its limit in float64
_STEP = 0.01


class Smooth(NamedTuple):
  """A function with its derivatives, in float64; f'(x) + f'(-x) = 1."""

  f: Callable[[np.ndarray], np.ndarray]
  df: Callable[[np.ndarray], np.ndarray]


class Table(NamedTuple):
  """Borders, rising, and the levels between them; one level more than borders."""

  borders: tuple[float, ...]
  levels: tuple[float, ...]


def _gelu(x):
  return x * special.ndtr(x)


def _d_gelu(x):
  return special.ndtr(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


def _inner(x):
  return np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)


def _d_gelu_tanh(x):
  t = np.tanh(_inner(x))
  return (1 + t) / 2 + x / 2 * (1 - t * t) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x * x)


def _d_silu(x):
  s = special.expit(x)
  return s * (1 + x * (1 - s))


QUICK = 1.702

FUNCTIONS: dict[str, Smooth] = {
  'gelu': Smooth(_gelu, _d_gelu),
  'gelu_tanh': Smooth(lambda x: x * (1 + np.tanh(_inner(x))) / 2, _d_gelu_tanh),
  'silu': Smooth(lambda x: x * special.expit(x), _d_silu),
  'quick_gelu': Smooth(lambda x: x * special.expit(QUICK * x), lambda x: _d_silu(QUICK * x)),
  'relu': Smooth(lambda x: np.maximum(x, 0.0), lambda x: (np.asarray(x) > 0) * 1.0),
}


@functools.lru_cache(maxsize=64)
def table(name: str, bits: int = 4) -> Table:
  """The optimal table of a function.

  Args:
    name: one of FUNCTIONS; 'relu' is exact at one bit, whatever is asked for.
    bits: k; 2^k levels.

  Raises:
    ValueError: an unknown function, or a number of bits that a byte is no multiple of.
  """
  if name not in FUNCTIONS:
    raise ValueError(f'no table for {name!r}; there are {", ".join(FUNCTIONS)}')
  if bits not in (1, 2, 4):
    raise ValueError(f'bits={bits!r} must be 1, 2 or 4')
  if name == 'relu':
    return Table((0.0,), (0.0, 1.0))
  if name == 'quick_gelu':
    borders, levels = table('silu', bits)
    return Table(tuple(b / QUICK for b in borders), levels)
  return optimal(FUNCTIONS[name], 2**bits // 2)


def optimal(smooth: Smooth, pieces: int) -> Table:
  """The table with `pieces` levels for x > 0, the last of them 1, and their mirror images for x <
  0.
  """
  borders = _polished(smooth, _on_grid(smooth, pieces))
  levels = _levels(smooth, borders)
  return Table(
    (*(-borders[::-1]).tolist(), 0.0, *borders.tolist()),
    (*(1 - levels[::-1]).tolist(), *levels.tolist()),
  )


def error(f: Smooth, t: Table) -> float:
  """E of a table, by quadrature piece by piece."""
  ends = np.concatenate([[-_END], np.asarray(t.borders), [_END]])
  total = 0.0
  for a, b, level in zip(ends[:-1], ends[1:], t.levels, strict=True):
    x, w = _nodes(np.linspace(a, b, 2 + int((b - a) / 0.25)))
    total += np.sum(w * (f.df(x) - level) ** 2)
  return float(total)


def slopes(weights, knots) -> Table:
  """The table of sum of weights[i] max(x - knots[i], 0), whose derivative is piecewise constant."""
  return Table(tuple(map(float, knots)), (0.0, *map(float, np.cumsum(weights))))


# Published in arXiv 2406.16282: two bits; f is matched closely, f' is not.
REGELU2 = slopes((-0.0492226, 1.0979632, -0.0487406), (-3.1858810, -0.0011788, 3.1908326))
RESILU2 = slopes((-0.0406036, 1.0809254, -0.0403219), (-6.3050462, -0.0008685, 6.3258152))


def _nodes(edges):
  """Gauss-Legendre nodes and weights of all cells between edges."""
  u, w = np.polynomial.legendre.leggauss(8)
  half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
  return (middle[:, None] + half[:, None] * u).ravel(), (half[:, None] * w).ravel()


def _on_grid(smooth: Smooth, pieces: int) -> np.ndarray:
  """The best inner borders on a grid: cost of [a, b] = int f'^2 - (f(b) - f(a))^2 / (b - a); the
  tail is held at 1.
  """
  grid = np.arange(0, 10 + _STEP / 2, _STEP)
  x, w = _nodes(grid)
  squares = np.concatenate(
    [[0], np.cumsum((w * smooth.df(x) ** 2).reshape(len(grid) - 1, -1).sum(1))]
  )
  x, w = _nodes(np.concatenate([grid, np.arange(10.25, _END, 0.25)]))
  tails = (w * (smooth.df(x) - 1) ** 2).reshape(-1, 8).sum(1)[::-1].cumsum()[::-1][: len(grid)]
  f, n = smooth.f(grid), len(grid)
  with np.errstate(divide='ignore', invalid='ignore'):
    cost = (
      squares[None] - squares[:, None] - (f[None] - f[:, None]) ** 2 / (grid[None] - grid[:, None])
    )
  cost[np.tril_indices(n)] = np.inf
  best, steps = np.where(np.arange(n) == 0, 0.0, np.inf), []
  for _ in range(pieces - 1):
    total = best[:, None] + cost
    steps.append(total.argmin(0))
    best = total.min(0)
  at, borders = int((best + tails).argmin()), []
  for back in reversed(steps):
    borders.append(grid[at])
    at = back[at]
  return np.array(borders[::-1])


def _levels(smooth: Smooth, borders) -> np.ndarray:
  edges = np.concatenate([[0], borders])
  return np.concatenate([np.diff(smooth.f(edges)) / np.diff(edges), [1.0]])


def _polished(smooth: Smooth, borders) -> np.ndarray:
  """Newton's method on f'(border) = mean of the levels beside it."""

  def residual(b):
    levels = _levels(smooth, b)
    return smooth.df(b) - (levels[:-1] + levels[1:]) / 2

  h = 1e-6
  for _ in range(20 if len(borders) else 0):
    jacobian = np.stack(
      [
        (residual(borders + h * e) - residual(borders - h * e)) / (2 * h)
        for e in np.eye(len(borders))
      ],
      1,
    )
    step = np.linalg.solve(jacobian, residual(borders))
    borders = borders - step
    if np.abs(step).max() < 1e-14:
      break
  return borders
