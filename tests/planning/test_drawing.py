"""Pictures that compare methods: names lie apart, classes have colours."""

import itertools

import pytest

from jpeft.core import FULL_CROSSING, MEMORY_CLASSES, NO_BACKPROP
from jpeft.planning import drawing, plot
from jpeft.planning.result import Plan

pytest.importorskip('matplotlib')


def overlap(a, b):
  return a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1


@pytest.mark.parametrize('count', [2, 6, 12])
def test_names_of_points_that_pile_up_lie_apart(count):
  figure = drawing.figure(7, 5)
  axis = figure.subplots()
  named = [(f'method_{i}', (1000 + i, 50 + i % 3)) for i in range(count)]
  named.append(('far', (10, 1)))
  for _, point in named:
    axis.plot(*point, **drawing.style(FULL_CROSSING))
  drawing.logarithmic(axis)
  axis.margins(0.1)
  drawing.label(axis, named, [0.5] * len(named))
  figure.canvas.draw()
  boxes = [text.get_window_extent() for text in axis.texts]
  assert [text.get_text() for text in axis.texts] == [name for name, _ in named]
  assert not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))
  points = [axis.transData.transform(point) for _, point in named]
  assert not any(box.contains(*point) for box in boxes for point in points)
  area = axis.get_window_extent()
  for box, point in zip(boxes, points, strict=True):
    assert area.x0 <= box.x0 and box.x1 <= area.x1 and area.y0 <= box.y0 and box.y1 <= area.y1
    assert abs(box.x0 - point[0]) < 200 and abs(box.y0 - point[1]) < 130


def test_each_class_has_a_colour_and_a_marker_of_its_own():
  styles = [drawing.style(name) for name in MEMORY_CLASSES]
  for part in ('color', 'marker'):
    assert len({style[part] for style in styles}) == len(MEMORY_CLASSES)


def test_the_legend_names_the_classes_that_there_are():
  figure = drawing.figure(4, 3)
  figure.subplots()
  drawing.legend(figure, [FULL_CROSSING, NO_BACKPROP, FULL_CROSSING])
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == [NO_BACKPROP, FULL_CROSSING]


def test_a_logarithmic_axis_has_plain_numbers():
  axis = drawing.figure(4, 3).subplots()
  axis.plot([150, 3000], [1, 1])
  drawing.logarithmic(axis)
  axis.figure.canvas.draw()
  shown = {label.get_text() for label in axis.get_xticklabels()}
  assert {'200', '500', '1,000', '2,000'} <= shown


def test_a_plan_that_does_not_fit_is_hollow(tmp_path, monkeypatch):
  made = []
  figure = drawing.figure
  monkeypatch.setattr(drawing, 'figure', lambda *size: made.append(figure(*size)) or made[0])
  facts = {
    'target': 'tpu:v5e',
    'batch': 4,
    'devices': 1,
    'remat': False,
    'trainable': 1,
    'memory_class': NO_BACKPROP,
    'weights': 1,
    'theta': 1,
    'optimizer': 1,
    'argument': 1,
    'temp': 1,
    'exact': True,
    'limit': 2**30,
    'flops': 1e9,
    'forward': 1e9,
    'seconds': 1.0,
  }
  plans = [Plan(method='small', total=2**29, **facts), Plan(method='large', total=2**31, **facts)]
  plot(plans, str(tmp_path / 'plan.png'))
  axis = made[0].axes[0]
  fills = [line.get_fillstyle() for line in axis.lines if line.get_marker() == 'o']
  assert fills == ['full', 'none'] and 'hollow: does not fit' in axis.get_title()
  assert '1 GiB' in axis.get_title()
