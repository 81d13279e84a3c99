"""The table of accuracies: cells are runs, and what stands in a row follows from them."""

import json
import math

import pytest

from jpeft import cli
from jpeft.bench import accuracy, memory


@pytest.fixture
def arguments(config_file, tmp_path):
  return [
    f'--configs={config_file.parent}',
    '--tasks=tiny',
    f'--out={tmp_path / "runs"}',
    f'--docs={tmp_path / "docs" / "a.md"}',
  ]


def test_rows_are_means_over_runs_and_complete_runs_are_kept(arguments, tmp_path, capsys):
  flags = [*arguments, '--methods=linear,bitfit', '--seeds=0,1']
  assert accuracy.main(flags) == 0
  page = (tmp_path / 'docs/a.md').read_text()
  assert page.count('| linear') == 1 and page.count('| bitfit') == 1 and '## tiny' in page
  assert (
    '![accuracy against memory](a.png)' in page and (tmp_path / 'docs/a.png').stat().st_size > 1000
  )
  reports = [
    json.loads((tmp_path / f'runs/tiny/linear-{seed}/report.json').read_text()) for seed in (0, 1)
  ]
  stamps = [p.stat().st_mtime_ns for p in sorted(tmp_path.glob('runs/*/*/report.json'))]
  capsys.readouterr()
  assert accuracy.main([*flags, '--json', '--only-table']) == 0
  row = json.loads(capsys.readouterr().out)[0]
  a, b = (r['eval']['accuracy'] for r in reports)
  known = [
    r['total_mib'] for r in memory.recorded() if r['work'] == 'w1' and r['method'] == 'linear'
  ]
  assert row['w1_mib'] in known and f'{row["w1_mib"]:,.0f}' in page and row['step_gflop'] > 0
  assert row['accuracy'] == pytest.approx((a + b) / 2) and row['seeds'] == 2
  # The standard deviation of two numbers is |a - b| / sqrt(2), that of their mean |a - b| / 2.
  assert row['standard_error'] == pytest.approx(abs(a - b) / 2)
  assert (
    math.isclose(row['trainable'], 34) and reports[0]['theta_sha256'] != reports[1]['theta_sha256']
  )
  assert len(json.loads((tmp_path / 'docs/a.json').read_text())) == 4
  assert accuracy.main(flags) == 0
  assert stamps == [p.stat().st_mtime_ns for p in sorted(tmp_path.glob('runs/*/*/report.json'))]


def test_the_table_grows_in_parts_and_forgets_settings_that_changed(tmp_path, capsys):
  file, kept = tmp_path / 'a.md', tmp_path / 'a.json'
  (tmp_path / 'speed').mkdir()
  (tmp_path / 'speed/quickstart.json').write_text(json.dumps([{'method': 'lst', 'ratio': 0.27}]))

  def cell(method, seed, right, settings='lr=1'):
    return {
      'task': 'quickstart',
      'method': method,
      'seed': seed,
      'accuracy': right,
      'trainable': 5,
      'total': 1000,
      'memory': 'full crossing',
      'steps': 7,
      'step_gflop': 1.5,
      'settings': settings,
    }

  accuracy.publish(file, [cell('lst', 0, 0.5), cell('vera', 0, 0.75)])
  page = accuracy.publish(file, [cell('lst', 1, 0.75), cell('vera', 0, 0.875)])
  assert (
    '| lst    | 62.5 ± 12.5 % | 2     | 5         | 0.50 %      | 7       | 1.5   | 0.27 | ' in page
  )
  assert '| vera   | 87.5 %        | 1 ' in page and page.index('| vera') < page.index(
    '| lst'
  )  # the best first
  assert file.read_text() == page and '| 1.5   | -    | -' in page  # nobody timed vera
  assert 'leaves' not in capsys.readouterr().err
  accuracy.publish(file, [cell('lst', 2, 0.25, 'lr=2')])
  assert (
    'quickstart lst, seed 1, leaves the table: it was trained with lr=1' in capsys.readouterr().err
  )
  assert [(c['method'], c['seed']) for c in json.loads(kept.read_text())] == [
    ('lst', 2),
    ('vera', 0),
  ]


def test_a_frontier_is_what_nothing_of_its_class_beats():
  def row(method, mib, recomputed, right, kind='full crossing'):
    return {
      'method': method,
      'memory': kind,
      'accuracy': right,
      'w1_mib': mib,
      'w1_recomputed_mib': recomputed,
    }

  rows = [
    row('large', 900, None, 0.9),
    row('small', 900, 300, 0.8),
    row('worse', 500, None, 0.7),
    row('equal', 500, None, 0.8),
    row('none', 100, None, 0.5, 'no backbone backprop'),
    row('better', 100, None, 0.6, 'no backbone backprop'),
  ]
  lines = accuracy.frontiers(rows)
  names = {kind: [row['method'] for row in line] for kind, line in lines.items()}
  assert names == {'full crossing': ['small', 'large'], 'no backbone backprop': ['better']}


def test_another_weight_decay_is_another_setting():
  old, new = ({'task': 't', 'method': 'm', 'seed': seed, 'settings': 'lr=1'} for seed in (0, 1))
  assert accuracy._stale([old], [{**new, 'weight_decay': 0.5}]) == []
  old['weight_decay'] = 0.1
  assert accuracy._stale([old], [{**new, 'weight_decay': 0.5}]) == [old]
  assert accuracy._stale([old], [new]) == []


def test_where_a_start_is_from_is_a_setting_only_of_a_start(load):
  assert 'start' not in accuracy.settings(load('linear'))
  started = accuracy.settings(load('linear', **{'method.start': 'theta.safetensors'}))
  assert 'start=theta.safetensors, start_head=True' in started


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--task=tiny', "did you mean 'tasks'"),
    ('--seeds=a', 'not a list of numbers'),
    ('--json=1', 'takes no value'),
    ('--out', 'needs a value'),
    ('--methods=linea', "did you mean 'linear'"),
    ('--tasks=tini', 'no config file'),
  ],
)
def test_mistakes_are_told_before_anything_is_trained(arguments, tmp_path, flag, message):
  with pytest.raises(cli.Mistake, match=message):
    accuracy.main([*arguments, '--methods=linear', flag])
  assert not (tmp_path / 'runs').exists()
