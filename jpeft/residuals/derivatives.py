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
_STEP = 0.01  # of the grid of the dynamic program
_LAST = 10.0  # where that grid ends
_NODES = 8  # of Gauss-Legendre quadrature, in each cell


class Smooth(NamedTuple):
  """A function and its derivative, in float64; f'(x) + f'(-x) = 1."""

  f: Callable[[np.ndarray], np.ndarray]
  df: Callable[[np.ndarray], np.ndarray]


class Table(NamedTuple):
  """Rising borders and the levels between them: one level more than borders."""

  borders: tuple[float, ...]
  levels: tuple[float, ...]


def _gelu(x):
  return x * special.ndtr(x)


def _d_gelu(x):
  return special.ndtr(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


def _inner(x):
  return np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)


def _gelu_tanh(x):
  return x * (1 + np.tanh(_inner(x))) / 2


def _d_gelu_tanh(x):
  tanh = np.tanh(_inner(x))
  return (1 + tanh) / 2 + x / 2 * (1 - tanh * tanh) * np.sqrt(2 / np.pi) * (
    1 + 3 * 0.044715 * x * x
  )


def _silu(x):
  return x * special.expit(x)


def _d_silu(x):
  sigmoid = special.expit(x)
  return sigmoid * (1 + x * (1 - sigmoid))


QUICK = 1.702


def _quick_gelu(x):
  return x * special.expit(QUICK * x)


def _d_quick_gelu(x):
  return _d_silu(QUICK * x)


def _relu(x):
  return np.maximum(x, 0.0)


def _d_relu(x):
  return (np.asarray(x) > 0) * 1.0


FUNCTIONS: dict[str, Smooth] = {
  'gelu': Smooth(_gelu, _d_gelu),
  'gelu_tanh': Smooth(_gelu_tanh, _d_gelu_tanh),
  'silu': Smooth(_silu, _d_silu),
  'quick_gelu': Smooth(_quick_gelu, _d_quick_gelu),
  'relu': Smooth(_relu, _d_relu),
}


@functools.lru_cache(maxsize=64)
def table(name: str, bits: int = 4) -> Table:
  """The optimal table of a function.

  Args:
    name: one of FUNCTIONS; 'relu' is exact at one bit, whatever `bits` is.
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
  """The optimal table with `pieces` levels for x > 0, the last of them 1, mirrored to x < 0."""
  borders = _solved(smooth, _best_on_grid(smooth, pieces))
  levels = _levels(smooth, borders)
  mirrored_borders = -borders[::-1]
  mirrored_levels = 1 - levels[::-1]
  return Table(
    (*mirrored_borders.tolist(), 0.0, *borders.tolist()),
    (*mirrored_levels.tolist(), *levels.tolist()),
  )


def error(smooth: Smooth, table: Table) -> float:
  """E of a table, by quadrature piece by piece."""
  ends = np.concatenate([[-_END], np.asarray(table.borders), [_END]])
  total = 0.0
  for a, b, level in zip(ends[:-1], ends[1:], table.levels, strict=True):
    x, weights = _nodes(np.linspace(a, b, 2 + int((b - a) / 0.25)))
    total += np.sum(weights * (smooth.df(x) - level) ** 2)
  return float(total)


def slopes(weights, knots) -> Table:
  """The table of sum of weights[i] max(x - knots[i], 0), whose derivative is piecewise constant."""
  levels = np.cumsum(weights)
  return Table(tuple(map(float, knots)), (0.0, *map(float, levels)))


# Published in arXiv 2406.16282: two bits; f is matched closely, f' is not.
REGELU2 = slopes((-0.0492226, 1.0979632, -0.0487406), (-3.1858810, -0.0011788, 3.1908326))
RESILU2 = slopes((-0.0406036, 1.0809254, -0.0403219), (-6.3050462, -0.0008685, 6.3258152))


def _nodes(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Gauss-Legendre nodes and weights of all cells between edges: [cells * _NODES] each."""
  unit_nodes, unit_weights = np.polynomial.legendre.leggauss(_NODES)
  half = np.diff(edges) / 2
  middle = (edges[1:] + edges[:-1]) / 2
  nodes = middle[:, None] + half[:, None] * unit_nodes
  weights = half[:, None] * unit_weights
  return nodes.ravel(), weights.ravel()


def _integrals(fn, edges: np.ndarray) -> np.ndarray:
  """The integral of a function over each cell between edges."""
  x, weights = _nodes(edges)
  return (weights * fn(x)).reshape(-1, _NODES).sum(1)


def _best_on_grid(smooth: Smooth, pieces: int) -> np.ndarray:
  """The best inner borders on a grid over x > 0, by a dynamic program over the pieces.

  A piece [a, b] with the best level costs int f'^2 - (f(b) - f(a))^2 / (b - a); after the last
  border the level is 1.
  """
  grid = np.arange(0, _LAST + _STEP / 2, _STEP)
  size = len(grid)
  f = smooth.f(grid)

  of_cells = _integrals(lambda x: smooth.df(x) ** 2, grid)
  squares = np.concatenate([[0], np.cumsum(of_cells)])  # int f'^2 from 0 to a grid point

  beyond = np.arange(_LAST + 0.25, _END, 0.25)
  of_cells = _integrals(lambda x: (smooth.df(x) - 1) ** 2, np.concatenate([grid, beyond]))
  tails = of_cells[::-1].cumsum()[::-1][:size]  # cost of level 1 from a grid point on

  # cost[i, j] of one piece from grid[i] to grid[j].
  rises = f[None] - f[:, None]
  widths = grid[None] - grid[:, None]
  with np.errstate(divide='ignore', invalid='ignore'):
    cost = squares[None] - squares[:, None] - rises**2 / widths
  cost[np.tril_indices(size)] = np.inf

  # best[j] of all pieces so far, if the last of them ends at grid[j].
  best = np.where(np.arange(size) == 0, 0.0, np.inf)
  origins = []  # for each piece: [where it ends] -> where it begins
  for _ in range(pieces - 1):
    total = best[:, None] + cost
    origins.append(total.argmin(0))
    best = total.min(0)

  at = int((best + tails).argmin())
  borders = []
  for origin in reversed(origins):
    borders.append(grid[at])
    at = origin[at]
  return np.array(borders[::-1])


def _levels(smooth: Smooth, borders: np.ndarray) -> np.ndarray:
  """The best levels for x > 0 between borders, the last of them 1."""
  edges = np.concatenate([[0], borders])
  return np.concatenate([np.diff(smooth.f(edges)) / np.diff(edges), [1.0]])


def _solved(smooth: Smooth, borders: np.ndarray) -> np.ndarray:
  """Newton's method on f'(border) = mean of the levels beside it, from borders on the grid."""
  if not len(borders):
    return borders

  def residual(borders):
    levels = _levels(smooth, borders)
    return smooth.df(borders) - (levels[:-1] + levels[1:]) / 2

  h = 1e-6
  for _ in range(20):
    columns = []
    for direction in np.eye(len(borders)):
      ahead = residual(borders + h * direction)
      behind = residual(borders - h * direction)
      columns.append((ahead - behind) / (2 * h))
    step = np.linalg.solve(np.stack(columns, 1), residual(borders))
    borders = borders - step
    if np.abs(step).max() < 1e-14:
      break
  return borders
