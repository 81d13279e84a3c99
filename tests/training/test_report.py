"""Scores, the log, the progress line."""

import io

import jax.numpy as jnp
import numpy as np
import pytest

from jpeft import tasks
from jpeft.training import confusion, metrics, progress, report


def test_loss_against_numpy():
  logits = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
  labels = np.array([1, 0])
  log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  np.testing.assert_allclose(tasks.loss(logits, labels), -log[[0, 1], labels], rtol=1e-6)
  target = 0.7 * np.eye(3)[labels] + 0.1
  np.testing.assert_allclose(tasks.loss(logits, labels, 0.3), -(target * log).sum(-1), rtol=1e-6)
  assert tasks.loss(jnp.asarray(logits, jnp.bfloat16), labels).dtype == jnp.float32


def test_scores_leave_out_rows_that_fill_up():
  logits = jnp.eye(3)[jnp.array([0, 1, 1, 2])]
  task = tasks.TASKS['classification']
  found = task.scores(task.tally(logits, jnp.array([0, 1, 0, 0]), jnp.array([1.0, 1.0, 1.0, 0.0])))
  assert found['accuracy'] == pytest.approx(2 / 3)
  assert found['macro_f1'] == pytest.approx(
    (2 / 3 + 2 / 3) / 2
  )  # the third label neither occurs nor is told
  right, wrong = -np.log(np.e / (np.e + 2)), -np.log(1 / (np.e + 2))
  assert found['loss'] == pytest.approx((2 * right + wrong) / 3, rel=1e-5)


def test_best_evaluation_is_the_first_of_equals():
  rows = [
    {'step': i, 'accuracy': a, 'loss': b}
    for i, a, b in ((1, 0.5, 0.9), (2, 0.8, 0.4), (3, 0.8, 0.2))
  ]
  assert tasks.best('accuracy', rows)['step'] == 2 and tasks.best('loss', rows)['step'] == 3
  assert not tasks.better('accuracy', rows[2], rows[:2]) and tasks.better('loss', rows[2], rows[:2])
  assert tasks.better('accuracy', rows[0], [])


def test_log_goes_on_without_repeating_lines(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  log = metrics.Metrics(file, 0)
  for step in (2, 4, 6):
    log.add(step, 'train', loss=1 / 3 + step)
  with file.open('a') as f:
    f.write('{"step": 8, "spl')  # a kill in the middle of a line
  again = metrics.Metrics(file, 4)
  again.add(6, 'train', loss=0.5)
  rows = metrics.read_metrics(file)
  assert [row['step'] for row in rows] == [2, 4, 6]
  assert metrics.values(rows[1]) == {'loss': 1 / 3 + 4} and metrics.values(rows[2]) == {'loss': 0.5}
  assert again.has(6, 'train') and not again.has(6, 'test')


def test_progress_off_a_terminal_is_plain_lines():
  out = io.StringIO()
  shown = progress.Progress(10, 4, out, every=0)
  shown.show(6, loss=0.5)
  shown.note('done')
  assert out.getvalue().splitlines()[0].startswith('step 6/10  loss 0.5  ')
  assert out.getvalue().endswith('left\ndone\n') and '\r' not in out.getvalue()


def test_progress_on_a_terminal_is_one_line():
  out = io.StringIO()
  out.isatty = lambda: True
  shown = progress.Progress(10, 0, out)
  for step in range(3):
    shown.last = 0
    shown.show(step, loss=1.0)
  shown.note('done')
  assert out.getvalue().count('\n') == 1 and out.getvalue().count('\rstep') == 3


@pytest.mark.parametrize(
  ('seconds', 'text'), [(0, '0:00'), (187, '3:07'), (3753, '1:02:33'), (float('inf'), '?')]
)
def test_clock(seconds, text):
  assert progress.clock(seconds) == text


def test_table_is_aligned_markdown():
  row = {
    'method': 'lst',
    'eval': {'accuracy': 0.912},
    'trainable': 1234,
    'total': 100_000,
    'seconds': 61.2,
    'step_cost': {'flops': 2e9, 'temp_bytes': 3 << 20},
  }
  lines = report.table([row, {**row, 'method': 'linear', 'step_cost': {}}]).splitlines()
  assert len({len(line) for line in lines}) == 1 and len(lines) == 4
  assert [c.strip() for c in lines[2].split('|')[1:-1]] == [
    'lst',
    '91.2 %',
    '1,234',
    '1.23 %',
    '2.0',
    '61',
  ]
  assert lines[3].count('| - ') == 1


def test_what_classes_are_taken_for(tmp_path):
  assert confusion.confusion_section(tmp_path) == []
  counts = np.array([[8, 1, 1], [0, 0, 0], [2, 3, 5.0]])
  confusion.write_confusion(tmp_path, 7, ['a|b', 'none', 'c'], counts)
  page = '\n'.join(confusion.confusion_section(tmp_path))
  rows = [' '.join(line.split()) for line in page.splitlines() if line]
  assert rows[0] == '## Classes, at step 7'
  assert rows[3:6] == [
    r'| a\|b | 10 | 80.0 % | none (1) |',
    '| none | 0 | - | - |',
    '| c | 10 | 50.0 % | none (3) |',
  ]
  assert rows[8:] == [r'| a\|b | 8 | 1 | 1 |', '| none | 0 | 0 | 0 |', '| c | 2 | 3 | 5 |']

  many = [str(number) for number in range(300)]
  confusion.write_confusion(tmp_path, 7, many, np.eye(300))
  page = '\n'.join(confusion.confusion_section(tmp_path))
  assert 'The first 200 of 300; confusion.json has all.' in page and 'prediction' not in page
