"""Folders of GLUE: the layout of each task's download, and of what people export of them."""

import csv
import json

import pytest

from jpeft import config as config_lib
from jpeft import data, training

# {task: (the first line or None, a line of training, its example)}, as the download has them.
MNLI = 'index promptID pairID genre binary1 binary2 parse1 parse2 sentence1 sentence2'.split()
LAYOUTS = {
  'CoLA': (None, ['gj04', '1', '', 'He "ran.'], {'text': 'He "ran.', 'label': 1}),
  'SST-2': (['sentence', 'label'], ['"so good ', '0'], {'text': '"so good ', 'label': 0}),
  'MRPC': (
    ['Quality', '#1 ID', '#2 ID', '#1 String', '#2 String'],
    ['1', '702', '703', 'He said "no.', 'No, he said'],
    {'text': 'He said "no.', 'pair': 'No, he said', 'label': 1},
  ),
  'STS-B': (
    'index genre filename year old_index source1 source2 sentence1 sentence2 score'.split(),
    ['0', 'captions', 'MSR', '2012', '1', 'none', 'none', 'A plane', 'An airplane', '4.75'],
    {'text': 'A plane', 'pair': 'An airplane', 'label': 4.75},
  ),
  'QQP': (
    ['id', 'qid1', 'qid2', 'question1', 'question2', 'is_duplicate'],
    ['13', '2', '3', 'Why "so?', 'How?', '0'],
    {'text': 'Why "so?', 'pair': 'How?', 'label': 0},
  ),
  'MNLI': (
    [*MNLI, 'label1', 'gold_label'],
    ['0', '1', '1n', 'fiction', '(', '(', '(', '(', 'It rains', 'It is wet']
    + ['entailment', 'neutral'],
    {'text': 'It rains', 'pair': 'It is wet', 'label': 1},
  ),
  'QNLI': (
    ['index', 'question', 'sentence', 'label'],
    ['0', 'When?', 'In 1492.', 'entailment'],
    {'text': 'When?', 'pair': 'In 1492.', 'label': 0},
  ),
  'RTE': (
    ['index', 'sentence1', 'sentence2', 'label'],
    ['0', 'It "fell.', 'It rose.', 'not_entailment'],
    {'text': 'It "fell.', 'pair': 'It rose.', 'label': 1},
  ),
  'WNLI': (
    ['index', 'sentence1', 'sentence2', 'label'],
    ['0', 'I stuck it.', 'It hurt.', '1'],
    {'text': 'I stuck it.', 'pair': 'It hurt.', 'label': 1},
  ),
}


def written(folder, task):
  """The folder of a task: a few lines a split, and a test split without labels."""
  header, row, example = LAYOUTS[task]
  root = folder / task
  root.mkdir(parents=True)
  splits = {'MNLI': ['train', 'dev_matched', 'dev_mismatched']}.get(task, ['train', 'dev'])
  for split in splits:
    lines = [header] if header else []
    lines += [[*row] for _ in range(3)]
    text = '\n'.join('\t'.join(fields) for fields in lines) + '\n'
    (root / f'{split}.tsv').write_text(text, encoding='utf-8-sig' if task == 'MRPC' else 'utf-8')
  names = header[:-1] if header else ['index', 'sentence']
  values = row[:-1] if header else ['0', 'She ran.']
  if task == 'MRPC':
    names, values = ['index', *header[1:]], ['0', *row[1:]]
  if task == 'SST-2':
    names, values = ['index', *names], ['0', *values]
  for split in splits[1:]:
    lines = ['\t'.join(names), '\t'.join(values)]
    (root / f'{split.replace("dev", "test")}.tsv').write_text('\n'.join(lines) + '\n')
  return root, splits, example


@pytest.mark.parametrize('task', LAYOUTS)
def test_the_download_of_each_task(task, tmp_path):
  root, splits, example = written(tmp_path, task)
  kind = 'numbers' if task == 'STS-B' else 'classes'
  for name in (f'glue:{root}', f'glue:{tmp_path}?task={task.lower()}'):
    for split in splits:
      source = data.load(name, split, labels=kind)
      assert len(source) == 3 and source[0] == example, (name, split)
      classes = data.GLUE_TASKS[task.lower().replace('-', '')].classes
      assert source.classes == list(classes or ['score'])
  with pytest.raises(ValueError, match=r'test\w*.tsv has no labels'):
    data.load(f'glue:{root}', splits[1].replace('dev', 'test'), labels=kind)


def test_the_order_of_classes_is_that_of_published_checkpoints(tmp_path):
  root, _, _ = written(tmp_path, 'MNLI')
  assert data.load(f'glue:{root}', 'train').classes == ['entailment', 'neutral', 'contradiction']
  notes = data.load(f'glue:{root}', 'train').notes
  assert any('has 3 rows, and published ones are of 392,702' in note for note in notes)


@pytest.mark.parametrize('suffix', ['csv', 'jsonl', 'json'])
def test_exports_have_other_names_of_columns_and_splits(suffix, tmp_path):
  """As `datasets` writes them: numbers of classes, and -1 for the labels of tests."""
  rows = [
    {'premise': 'It rains, "a lot"', 'hypothesis': 'It is\nwet', 'label': 2, 'idx': 0},
    {'premise': 'It snows', 'hypothesis': 'It is hot', 'label': 0, 'idx': 1},
  ]
  for split in ('train', 'validation_matched', 'test_matched'):
    shown = [row | ({'label': -1} if split[:4] == 'test' else {}) for row in rows]
    text = '\n'.join(map(json.dumps, shown))
    if suffix == 'csv':
      with (tmp_path / f'{split}.csv').open('w', newline='') as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(shown)
    else:
      (tmp_path / f'{split}.{suffix}').write_text(text + '\n')
  source = data.load(f'glue:{tmp_path}?task=mnli', 'dev_matched')
  assert {(e['text'], e['pair'], e['label']) for e in source} == {
    (row['premise'], row['hypothesis'], row['label']) for row in rows
  }
  with pytest.raises(ValueError, match='has no labels'):
    data.load(f'glue:{tmp_path}?task=mnli', 'test_matched')


@pytest.mark.parametrize(
  ('lines', 'said'),
  [
    (['1\ta\tb'], r'line 3 of .*train.tsv has 3 fields between tabs, and its columns are 6'),
    (['1\t2\t3\ta\tb\t1\tc'], r'line 3 of .* has 7 fields'),
    (
      ['1\t2\t3\ta\tb\tyes'],
      "line 3 of .* has 'yes' as its 'is_duplicate'; it must be one of not_",
    ),
  ],
)
def test_malformed_lines_are_named_or_left_out_and_told(lines, said, tmp_path):
  root, _, _ = written(tmp_path, 'QQP')
  file = root / 'train.tsv'
  before = file.read_text().splitlines()
  file.write_text('\n'.join([*before[:2], *lines, *before[2:]]) + '\n')
  with pytest.raises(ValueError, match=said):
    data.load(f'glue:{root}', 'train')
  source = data.load(f'glue:{root}?malformed=skip', 'train')
  assert len(source) == 3
  assert any('1 malformed lines are left out, the first is line 3' in note for note in source.notes)


def test_what_is_no_folder_of_glue_is_told(tmp_path):
  root, _, _ = written(tmp_path, 'RTE')
  for name, said in {
    f'glue:{root}?task=rtee': "no task of GLUE is called 'rtee'; did you mean 'rte'",
    f'glue:{tmp_path}/rtx': "no task of GLUE is called 'rtx'; name it by .task=; did you",
    f'glue:{tmp_path}?task=cola': 'there is no train.tsv in',
    f'glue:{root}?malformed=yes': "must be 'refuse' or 'skip'",
    f'glue:{root}?task=qqp': "has no column 'question1', as QQP of GLUE has",
  }.items():
    with pytest.raises(ValueError, match=said):
      data.load(name, 'train')
  with pytest.raises(FileNotFoundError, match="there is no folder .*RTEE|did you mean 'RTE'"):
    data.load(f'glue:{tmp_path}/RTEE?task=rte', 'train')
  with pytest.raises(ValueError, match="learns classes: set config.task='classification'"):
    data.load(f'glue:{root}', 'train', labels='numbers')
  root, _, _ = written(tmp_path, 'STS-B')
  with pytest.raises(ValueError, match="learns numbers: set config.task='regression'"):
    data.load(f'glue:{root}', 'train')
  (root / 'train.csv').write_text('a\n')
  (root / 'other.tsv').write_text('a\n')
  notes = data.load(f'glue:{root}', 'train', labels='numbers').notes
  assert any('not read are other.tsv, train.csv' in note for note in notes)


@pytest.mark.parametrize('task', LAYOUTS)
def test_a_test_file_is_predicted_with_the_columns_of_its_task(task, tmp_path):
  root, splits, example = written(tmp_path, task)
  file = root / f'{splits[1].replace("dev", "test")}.tsv'
  number = 'id' if task == 'QQP' else 'index'
  (row,) = data.asked(data.glue_input(f'{file}?keep={number}', f'glue:{root}'))
  texts = {part: text for part, text in example.items() if part != 'label'}
  assert row.example == ({'text': 'She ran.'} if task == 'CoLA' else texts)
  labelled = data.asked(data.glue_input(str(root / 'train.tsv'), f'glue:{root}'))
  assert [row.example for row in labelled] == [texts] * 3


def test_the_config_has_the_splits_of_each_task_and_learns_what_it_has(tmp_path):
  for task in data.GLUE_TASKS:
    loaded = config_lib.load(f'configs/glue.py:lora,{task}')
    assert loaded.data.test in data.GLUE_TASKS[task].sizes
    assert (loaded.task == 'regression') == (not data.GLUE_TASKS[task].classes)
  with pytest.raises(ValueError, match="no task of GLUE is called 'colaa'"):
    config_lib.load('configs/glue.py:lora,colaa')


@pytest.mark.parametrize(('task', 'method'), [('CoLA', 'lora'), ('STS-B', 'full')])
def test_a_run_by_the_config(task, method, encoder, tmp_path):
  root = tmp_path / task
  root.mkdir()
  for split, count in (('train', 32), ('dev', 16)):
    lines = []
    for i in range(count):
      text = ['a b', 'c d', 'e f', 'g h'][i % 4]
      row = ['gj04', str(i % 2), '', text]
      if task == 'STS-B':
        row = [*LAYOUTS[task][1][:7], text, 'a b', str(i % 4)]
      lines.append('\t'.join(row))
    if task == 'STS-B':
      lines.insert(0, '\t'.join(LAYOUTS[task][0]))
    (root / f'{split}.tsv').write_text('\n'.join(lines) + '\n')
  overrides = {
    'data.name': f'glue:{root}',
    'model.source': str(encoder),
    'data.max_length': '16',
    'data.batch_size': '8',
    'epochs': 'none',
    'steps': '40',
    'optimizer.lr': '1e-2',
  }
  name = task.lower().replace('-', '')
  loaded = config_lib.load(f'configs/glue.py:{method},{name}', overrides)
  told = training.train(loaded, tmp_path / 'run')
  assert told['eval'][loaded.eval.metric] > 0.9
