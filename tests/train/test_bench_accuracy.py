"""The table of accuracies: cells are runs, and what stands in a row follows from them."""

import json
import math

import pytest

from jpeft import run
from jpeft.bench import accuracy, memory


@pytest.fixture
def arguments(config_file, tmp_path):
  return [f'--configs={config_file.parent}', '--tasks=tiny', f'--out={tmp_path / "runs"}',
          f'--docs={tmp_path / "docs" / "a.md"}']


def test_rows_are_means_over_runs_and_complete_runs_are_kept(arguments, tmp_path, capsys):
  flags = [*arguments, '--methods=linear,bitfit', '--seeds=0,1']
  assert accuracy.main(flags) == 0
  page = (tmp_path / 'docs/a.md').read_text()
  assert page.count('| linear') == 1 and page.count('| bitfit') == 1 and '## tiny' in page
  assert '![accuracy against memory](a.png)' in page and (tmp_path / 'docs/a.png').stat().st_size > 1000
  reports = [json.loads((tmp_path / f'runs/tiny/linear-{seed}/report.json').read_text()) for seed in (0, 1)]
  stamps = [p.stat().st_mtime_ns for p in sorted(tmp_path.glob('runs/*/*/report.json'))]
  capsys.readouterr()
  assert accuracy.main([*flags, '--json', '--only-table']) == 0
  row = json.loads(capsys.readouterr().out)[0]
  a, b = (r['eval']['accuracy'] for r in reports)
  known = [r['total_mib'] for r in memory.recorded() if
           r['work'] == 'w1' and r['method'] == 'linear']
  assert row['w1_mib'] in known and f'{row["w1_mib"]:,.0f}' in page and row['step_gflop'] > 0
  assert row['accuracy'] == pytest.approx((a + b) / 2) and row['seeds'] == 2
  # The standard deviation of two numbers is |a - b| / sqrt(2), that of their mean |a - b| / 2.
  assert row['standard_error'] == pytest.approx(abs(a - b) / 2)
  assert math.isclose(row['trainable'], 34) and reports[0]['theta_sha256'] != reports[1]['theta_sha256']
  assert accuracy.main(flags) == 0
  assert stamps == [p.stat().st_mtime_ns for p in sorted(tmp_path.glob('runs/*/*/report.json'))]


@pytest.mark.parametrize(('flag', 'message'), [
  ('--task=tiny', "did you mean 'tasks'"), ('--seeds=a', 'not a list of numbers'), ('--json=1', 'takes no value'),
  ('--out', 'needs a value'), ('--methods=linea', "did you mean 'linear'"), ('--tasks=tini', 'no config file')])
def test_mistakes_are_told_before_anything_is_trained(arguments, tmp_path, flag, message):
  with pytest.raises(run.Mistake, match=message):
    accuracy.main([*arguments, '--methods=linear', flag])
  assert not (tmp_path / 'runs').exists()
