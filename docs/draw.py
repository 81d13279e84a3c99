"""Draws the pictures of architecture.md: python docs/draw.py"""

import pathlib
import re

import matplotlib

matplotlib.use('svg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

HERE = pathlib.Path(__file__).parent
BLUE, ORANGE, GREY, INK = '#dbe7f5', '#fbe3cd', '#eeeeee', '#222222'

PAGE = HERE / 'architecture.md'


def table() -> list[tuple[str, str]]:
  """(floor, packages) of the table in architecture.md, the highest first."""
  floors = {}
  for floor, name in re.findall(r'\| (\d+) \| `([\w.]+)` \|', PAGE.read_text()):
    floors.setdefault(int(floor), []).append(name.removeprefix('jpeft.'))
  return [(str(floor), '  '.join(floors[floor])) for floor in sorted(floors, reverse=True)]


def canvas(width: float, height: float):
  figure, axes = plt.subplots(figsize=(width, height))
  axes.set_xlim(0, width)
  axes.set_ylim(0, height)
  axes.axis('off')
  figure.subplots_adjust(0, 0, 1, 1)
  return figure, axes


def box(
  axes, x: float, y: float, width: float, height: float, title: str, text: str, color: str
) -> None:
  shape = FancyBboxPatch(
    (x, y), width, height, boxstyle='round,pad=0,rounding_size=0.08', facecolor=color, edgecolor=INK
  )
  axes.add_patch(shape)
  axes.text(x + 0.15, y + height - 0.15, title, weight='bold', va='top', color=INK, size=11)
  axes.text(
    x + 0.15,
    y + height - 0.5,
    text,
    va='top',
    color=INK,
    size=9,
    family='monospace',
    linespacing=1.4,
  )


def arrow(axes, start, end, label: str = '', shift=(0.0, 0.12)) -> None:
  axes.add_patch(
    FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=14, color=INK, linewidth=1.2)
  )
  if label:
    x, y = ((a + b) / 2 + d for a, b, d in zip(start, end, shift, strict=True))
    axes.text(x, y, label, ha='center', color=INK, size=9)


def save(figure, name: str) -> None:
  # The same bytes each time.
  plt.rcParams.update({'svg.hashsalt': name, 'svg.fonttype': 'none'})
  figure.savefig(HERE / name, metadata={'Date': None}, facecolor='white')
  plt.close(figure)
  lines = (HERE / name).read_text().splitlines()
  (HERE / name).write_text('\n'.join(line.rstrip() for line in lines) + '\n')


def trees() -> None:
  figure, axes = canvas(10, 5.2)
  box(axes, 0.2, 3.9, 2.6, 1.1, 'your model', 'Linen or NNX,\nunmodified', GREY)
  box(axes, 0.2, 2.5, 2.6, 1.1, 'method', 'chain(lora(8),\n  tune("{head}"))', GREY)
  box(axes, 3.9, 3.0, 2.4, 1.6, 'Tuned', 'init   apply\nmerge  update\nsummary', GREY)
  arrow(axes, (2.8, 4.4), (3.9, 4.0))
  arrow(axes, (2.8, 3.1), (3.9, 3.6))
  axes.text(3.35, 4.45, 'attach', ha='center', size=9, color=INK)

  backbone = (
    'encoder\n  block_0\n    attention\n      query  kernel, bias\n  ...\nhead     kernel, bias'
  )
  theta = 'lora\n  encoder/block_0/attention/query\n    kernel  a, b\ntune\n  head  kernel, bias'
  box(axes, 0.2, 0.2, 3.6, 1.9, 'backbone: frozen', backbone, BLUE)
  box(axes, 4.3, 0.2, 3.6, 1.9, 'theta: trained', theta, ORANGE)
  box(axes, 8.3, 0.2, 1.5, 1.9, 'optimizer', 'state\nhas the size\nof theta', ORANGE)
  arrow(axes, (3.2, 2.1), (4.2, 3.0), 'stop_gradient', (0.7, -0.3))
  arrow(axes, (5.6, 2.1), (5.6, 3.0), 'init, update', (0.55, -0.05))
  arrow(axes, (8.3, 1.1), (7.9, 1.1))
  arrow(axes, (6.3, 4.2), (7.6, 4.2))
  arrow(axes, (6.3, 3.4), (7.6, 3.4))
  axes.text(
    7.7, 4.2, 'apply: output,\ndifferentiable in theta alone', va='center', size=9, color=INK
  )
  axes.text(7.7, 3.4, 'merge: plain weights\nfor your model', va='center', size=9, color=INK)
  save(figure, 'trees.svg')


def floors() -> None:
  rows = table()
  height = 0.62
  figure, axes = canvas(9, height * len(rows) + 0.3)
  for i, (name, packages) in enumerate(reversed(rows)):
    y = 0.15 + i * height
    shape = FancyBboxPatch(
      (2.3, y),
      6.5,
      height - 0.1,
      boxstyle='round,pad=0,rounding_size=0.06',
      edgecolor=INK,
      facecolor=ORANGE if 'methods' in packages.split() else BLUE,
    )
    axes.add_patch(shape)
    middle = y + (height - 0.1) / 2
    axes.text(2.1, middle, name, ha='right', va='center', color=INK, size=10)
    axes.text(2.5, middle, packages, va='center', color=INK, size=9, family='monospace')
  arrow(axes, (0.25, height * len(rows)), (0.25, 0.2))
  axes.text(0.4, height * len(rows) - 0.1, 'imports', rotation=90, va='top', size=9, color=INK)
  save(figure, 'floors.svg')


if __name__ == '__main__':
  trees()
  floors()
