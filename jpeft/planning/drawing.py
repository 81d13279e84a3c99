"""Parts of pictures that compare methods: a colour for each memory class, labels that lie apart."""

import itertools
from collections.abc import Iterable, Sequence

from jpeft.core import FULL_CROSSING, NO_BACKPROP, PARTIAL_REENTRY
from jpeft.lazy import extra

# (colour, marker): told apart by the colour-blind, and in grey.
_STYLES = {
  NO_BACKPROP: ('#0072B2', 'o'),
  PARTIAL_REENTRY: ('#E69F00', 'D'),
  FULL_CROSSING: ('#D55E00', 's'),
}
# Where a label may stand, in its own widths and heights from its point, the best first: the place
# of its left lower corner.
_PLACES = (
  (0.0, -0.5),  # to the right
  (-1.0, -0.5),  # to the left
  (-0.5, 0.0),  # above
  (-0.5, -1.0),  # below
  (0.0, 0.0),
  (-1.0, 0.0),
  (0.0, -1.0),
  (-1.0, -1.0),
)
_GAPS = (7, 14, 22, 32, 44, 58, 74, 92, 112)  # pixels between a label and its point


def figure(width: float, height: float):
  """A matplotlib figure of some inches, which `savefig` writes without a display.

  Raises:
    ImportError: matplotlib is not installed.
  """
  with extra('plan'):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

  made = Figure(figsize=(width, height), layout='constrained')
  FigureCanvasAgg(made)
  return made


def style(memory_class: str) -> dict[str, str]:
  """Colour and marker of a memory class, as `plot` takes them."""
  color, marker = _STYLES[memory_class]
  return {'color': color, 'marker': marker}


def legend(made, memory_classes: Iterable[str]) -> None:
  """What the colours of a figure mean, below its axes."""
  from matplotlib.lines import Line2D

  present = set(memory_classes)
  lines = [
    Line2D([], [], linestyle='', label=name, **style(name)) for name in _STYLES if name in present
  ]
  made.legend(handles=lines, loc='outside lower center', ncols=len(lines), frameon=False)


def logarithmic(axis, which: str = 'x') -> None:
  """Makes an axis logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

  getattr(axis, f'set_{which}scale')('log')
  ticks = getattr(axis, f'{which}axis')
  ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
  ticks.set_major_formatter(FuncFormatter(_number))
  ticks.set_minor_formatter(NullFormatter())


def _number(value: float, position: int) -> str:
  if value < 1:
    return f'{value:.3g}'
  return f'{value:,.0f}'


def label(
  axis,
  named: Sequence[tuple[str, tuple[float, float]]],
  errors: Sequence[float] | None = None,
  size: float = 8,
) -> None:
  """Writes names beside points, where they lie on no point and on no other name.

  A name that finds no place near its point stands further off, with a line to it.

  Args:
    axis: whose limits are final: they are read here.
    named: (name, place in data units).
    errors: half the height of the bar through each point, in data units; without bars if left out.
    size: of the letters.
  """
  made = axis.figure
  made.canvas.draw()  # places the axes: only now is it known where a point lies
  renderer = made.canvas.get_renderer()
  area = axis.get_window_extent(renderer)
  centres = [tuple(axis.transData.transform(point)) for _, point in named]
  taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in centres]
  for (_, (x, y)), error in zip(named, errors or (), strict=errors is not None):
    left, bottom = axis.transData.transform((x, y - error))
    _, top = axis.transData.transform((x, y + error))
    taken.append((left - 3, bottom, left + 3, top))
  for (name, point), (x, y) in zip(named, centres, strict=True):
    text = axis.annotate(
      name, point, xytext=(0, 0), textcoords='offset pixels', fontsize=size, va='bottom'
    )
    extent = text.get_window_extent(renderer)
    gap, box = _place((x, y), (extent.width, extent.height), taken, area.extents)
    taken.append(box)
    text.set_position((box[0] - x, box[1] - y))
    if gap > _GAPS[1]:
      nearest = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
      ends = axis.transData.inverted().transform([nearest, (x, y)])
      axis.plot(*ends.T, color='0.6', linewidth=0.6, zorder=1)


def _place(point, size, taken, area) -> tuple[int, tuple[float, float, float, float]]:
  """(gap, box) of the first place that is free, else of the first place of all; pixels.

  Args:
    point: that is named.
    size: of the name.
    taken: boxes (left, bottom, right, top) that it must not lie on.
    area: of the axes, which it must not leave.
  """
  x, y = point
  width, height = size
  boxes = []
  for gap, (right, up) in itertools.product(_GAPS, _PLACES):
    left = x + right * width + gap * _sign(2 * right + 1)
    bottom = y + up * height + gap * _sign(2 * up + 1)
    boxes.append((gap, (left, bottom, left + width, bottom + height)))
  for gap, box in boxes:
    is_inside = area[0] <= box[0] and area[1] <= box[1] and box[2] <= area[2] and box[3] <= area[3]
    if is_inside and not any(_overlap(box, other) for other in taken):
      return gap, box
  return boxes[0]


def _sign(value: float) -> int:
  return (value > 0) - (value < 0)


def _overlap(a, b) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
