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


class Clock:
  """A clock that stands still until it is moved."""

  def __init__(self):
    self.now = 100.0

  def perf_counter(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  found = Clock()
  monkeypatch.setattr(progress, 'time', found)
  return found


def test_progress_off_a_terminal_is_a_plain_line_now_and_then(clock):
  out = io.StringIO()
  shown = progress.Progress(out)
  shown.stage('compiling')
  updates = shown.stage('update', 10, 4)
  for step in range(5, 11):
    clock.now += 6
    updates.show(step, loss=step / 10)
  shown.note('done')
  assert out.getvalue().splitlines() == [
    'update 6/10  loss 0.6  6.0 s each  0:24 left',
    'update 8/10  loss 0.8  6.0 s each  0:12 left',
    'update 10/10  loss 1  6.0 s each  0:00 left',
    'done',
  ]


def test_the_time_left_is_that_of_updates_alone(clock):
  """Not of the features, the compilation and the first update, which waits for all of them."""
  shown = progress.Progress(io.StringIO())
  features = shown.stage('features', 300)
  clock.now += 50  # its own compilation
  features.add(100)
  assert features.line() == 'features 100/300'
  clock.now += 20
  features.add(100)
  assert features.line() == 'features 200/300  5.0/s  0:20 left'
  updates = shown.stage('update', 1000, 0)
  clock.now += 75
  updates.show(1, loss=float('nan'))
  assert updates.line() == 'update 1/1,000' and updates.seconds_each() is None
  clock.now += 0.1
  updates.show(2)
  assert updates.line(loss=2.5) == 'update 2/1,000  loss 2.5  10.0/s  1:40 left'


def test_a_run_that_goes_on_counts_its_own_updates(clock):
  updates = progress.Progress(io.StringIO()).stage('update', 1000, 900)
  for step in range(901, 951):
    clock.now += 2
    updates.show(step)
  assert updates.line().endswith('2.0 s each  1:40 left')


def test_progress_on_a_terminal_is_one_line(clock):
  out = io.StringIO()
  out.isatty = lambda: True
  shown = progress.Progress(out)
  shown.stage('compiling')
  updates = shown.stage('update', 10)
  for step in range(1, 4):
    clock.now += 1
    updates.show(step, loss=1.0)
  shown.note('done')
  updates.show(4, force=True)
  shown.close()
  assert out.getvalue().count('\n') == 2 and out.getvalue().count('\rupdate') == 4
  assert out.getvalue().startswith('\rcompiling\rupdate 1/10')


def test_a_line_is_rewritten_in_a_notebook_that_asks_for_it():
  out = io.StringIO()
  progress.Progress(out, live=True).put('one')
  assert out.getvalue() == '\rone'


def test_batches_are_counted_as_examples():
  stage = progress.Progress(io.StringIO()).stage('evaluating', 10)
  assert list(progress.counted('abc', 4, stage)) == ['a', 'b', 'c'] and stage.done == 10


@pytest.mark.parametrize(('seconds', 'text'), [(0, '0:00'), (187, '3:07'), (3753, '1:02:33')])
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
