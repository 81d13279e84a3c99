"""The row of a method on VTAB-1k, its means and where its accuracies are from."""

import json

import pytest

from jpeft import config as config_lib
from jpeft.bench import vtab
from jpeft.data import VTAB_TASKS

# VPT-Deep as published: the tasks, the means of the groups, of these, and of the tasks.
VPT_DEEP = [
  *(78.8, 90.8, 65.8, 98.0, 88.3, 78.1, 49.6),
  *(81.8, 96.1, 83.4, 68.4),
  *(68.5, 60.0, 46.5, 72.8, 73.6, 47.9, 32.9, 37.8),
]


def test_means_are_those_of_a_published_row():
  row = dict(zip(VTAB_TASKS, VPT_DEEP, strict=True))
  found = {name: round(value, 2) for name, value in vtab.means(row).items()}
  wanted = [78.49, 82.42, 55.0, 71.97, 69.43]
  assert list(found) == ['natural', 'specialised', 'structured', 'gmean', 'mean19']
  assert list(found.values()) == pytest.approx(wanted, abs=0.011)
  del row['svhn']
  assert list(vtab.means(row)) == ['specialised', 'structured']


@pytest.fixture
def runs(tmp_path):
  """{(task, protocol): the folder of a run}, as the trainer leaves it."""
  folders = {}
  for task, how, end, best in [
    ('cifar', 'test', 0.5, 0.75),
    ('kitti', 'best', 0.25, 0.5),
    ('svhn', 'choose', 0.5, 0.75),
  ]:
    config = config_lib.load(f'vtab:lora,{how}', {'data.name': f'vtab:vtab-1k/{task}'})
    folder = tmp_path / f'{task}-{how}'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config.to_dict()))
    report = {'eval': {'accuracy': end}, 'best': {'value': best}}
    (folder / 'report.json').write_text(json.dumps(report))
    folders[task] = folder
  return folders


def test_a_row_says_where_it_is_from(runs, capsys):
  both = [str(runs['cifar']), str(runs['kitti'])]
  assert vtab.main(both) == 0
  text = capsys.readouterr().out
  assert text.startswith('lora, tested once, at the end\n')
  assert '| cifar' in text and '50.0 %' in text and '25.0 %' in text
  assert 'No means over tasks: there is no run of caltech101, ' in text
  assert vtab.main(['--best', *both]) == 0
  text = capsys.readouterr().out
  assert text.startswith('lora, best on the test images\n') and '75.0 %' in text
  assert vtab.result(runs['svhn'], best=True).protocol == 'on val200, for choices'


def test_rows_of_two_kinds_are_not_mixed(runs):
  results = [vtab.result(runs[task]) for task in ('cifar', 'svhn')]
  with pytest.raises(ValueError, match='one row is of one method and one protocol, and these runs'):
    vtab.page(results)


def test_choosing_never_reads_the_test_images():
  chosen = config_lib.load('vtab:adaptformer,choose')
  assert (chosen.data.train, chosen.data.test) == ('train800', 'val200')
  tested = config_lib.load('vtab:adaptformer')
  assert (tested.data.train, tested.data.test) == ('train800val200', 'test')
  # 100 epochs of 15 batches: the first evaluation is the last.
  assert tested.eval.every == 100 * (1000 // tested.data.batch_size)
  with pytest.raises(ValueError, match="no protocol is called 'tset'; there is test, choose, best"):
    config_lib.load('vtab:adaptformer,tset')


def test_runs_on_other_data(tmp_path, runs):
  with pytest.raises(FileNotFoundError, match='there is no config.json in'):
    vtab.result(tmp_path)
  config = json.loads((runs['cifar'] / 'config.json').read_text())
  for key, value, said in [
    ('test', 'val200', 'a run trained on train800val200 and scored on val200 is in no row'),
    ('name', 'mnist5k', 'is a run on mnist5k, not on a task of VTAB-1k'),
  ]:
    changed = {**config, 'data': {**config['data'], key: value}}
    (runs['cifar'] / 'config.json').write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=said):
      vtab.result(runs['cifar'])
