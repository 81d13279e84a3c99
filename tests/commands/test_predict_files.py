"""`jpeft predict --out`: what a folder, a file of lines and a table give."""

import csv
import json
import pathlib

import numpy as np
import pytest

from jpeft import cli, config, data, predict, tasks, training
from tests.commands.test_predict_merge import learn, reviews  # noqa: F401


@pytest.fixture(scope='module')
def images_run(config_file, tmp_path_factory):
  folder = tmp_path_factory.mktemp('images') / 'run'
  training.train(config.load(f'{config_file}:lora', {'steps': '20', 'eval.every': '20'}), folder)
  return folder


@pytest.fixture(scope='module')
def texts_run(config_file, reviews, tmp_path_factory):  # noqa: F811
  """A run on a table of other columns than usual; its backbone knows the words of `reviews`."""
  backbone, table = reviews
  folder = tmp_path_factory.mktemp('texts')
  own = folder / 'own.csv'
  own.write_text(table.read_text().replace(',', ';').replace('text;label', 'review;stars'))
  name = f'{own}?text=review&label=stars&delimiter=;'
  learn(config_file, backbone, name, folder / 'run', **{'model.pool': 'mean'})
  return folder / 'run'


def predicted(run, *words):
  assert predict.main(['--run', str(run), '--input', *map(str, words)]) == 0


def printed(run, capsys, *words):
  """What --json prints."""
  capsys.readouterr()
  predicted(run, *words, '--json')
  return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def table_of(file):
  with file.open(newline='') as lines:
    return list(csv.DictReader(lines))


def test_a_folder_of_images(images_run, images, tmp_path, capsys):
  files = sorted(map(str, (images / 'test').rglob('*.png')))
  expected = printed(images_run, capsys, *files)
  predicted(images_run, images / 'test', '--out', tmp_path / 'a.jsonl')
  lines = (tmp_path / 'a.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines] == expected
  assert f'{tmp_path}/a.jsonl: 10 predictions' in capsys.readouterr().err
  predicted(images_run, images / 'test/red', files[0], '--out', tmp_path / 'a.csv')
  rows = table_of(tmp_path / 'a.csv')
  assert [row['input'] for row in rows] == [*files[5:], files[0]]
  for row, right in zip(rows, [*expected[5:], expected[0]], strict=True):
    assert list(row) == ['input', 'label', 'probability', 'probabilities:blue', 'probabilities:red']
    assert row['label'] == right['label'] and float(row['probability']) == right['probability']
    assert float(row['probabilities:red']) == pytest.approx(right['probabilities']['red'], abs=1e-7)
  assert [path.name for path in sorted(tmp_path.iterdir())] == ['a.csv', 'a.jsonl']


def test_more_images_than_a_batch_are_those_of_one_at_a_time(images_run, images, tmp_path, capsys):
  files = sorted((images / 'train').rglob('*.png')) + sorted((images / 'test').rglob('*.png'))
  assert len(files) == 34
  predicted(images_run, images / 'train', images / 'test', '--out', tmp_path / 'all.jsonl')
  rows = [json.loads(line) for line in (tmp_path / 'all.jsonl').read_text().splitlines()]
  assert [row['input'] for row in rows] == list(map(str, files))
  for i in (0, 31, 32, 33):
    (alone,) = printed(images_run, capsys, files[i])
    assert alone['label'] == rows[i]['label']
    assert alone['probability'] == pytest.approx(rows[i]['probability'], abs=1e-5)


def test_tables_with_the_columns_of_the_run(texts_run, tmp_path, capsys):
  (tmp_path / 'lines.txt').write_text('a great plot\n\nvery poor film\n')
  (tmp_path / 'new.csv').write_text('id;review\n7;a great plot\n3;"very\npoor film"\n')
  (tmp_path / 'new.tsv').write_text('id\tsaid\n9\ta great plot\n')
  (tmp_path / 'new.jsonl').write_text('{"review": "very poor film", "id": [1]}\n')
  by_line = printed(texts_run, capsys, tmp_path / 'lines.txt')
  assert [row['label'] for row in by_line] == ['pos', 'neg']
  predicted(
    texts_run,
    *(tmp_path / 'lines.txt', f'{tmp_path}/new.csv?keep=id'),
    *(f'{tmp_path}/new.tsv?text=said&delimiter=%09&keep=id', f'{tmp_path}/new.jsonl?keep=id'),
    *('--out', tmp_path / 'out.csv'),
  )
  rows = table_of(tmp_path / 'out.csv')
  assert list(rows[0]) == [
    *('input', 'file', 'line', 'kept:id'),
    *('label', 'probability', 'probabilities:neg', 'probabilities:pos'),
  ]
  where = [(pathlib.Path(row['file']).name, row['line'], row['kept:id']) for row in rows]
  assert where == [
    *(('lines.txt', '1', ''), ('lines.txt', '3', '')),
    *(('new.csv', '2', '7'), ('new.csv', '4', '3'), ('new.tsv', '2', '9')),
    ('new.jsonl', '1', '[1]'),
  ]
  assert [row['label'] for row in rows] == ['pos', 'neg', 'pos', 'neg', 'pos', 'neg']
  for row, same in zip(rows, (0, 1, 0, 1, 0, 1), strict=True):
    assert float(row['probability']) == pytest.approx(by_line[same]['probability'], abs=1e-6)
  predicted(texts_run, f'{tmp_path}/new.jsonl?keep=id', '--out', tmp_path / 'out.jsonl')
  (row,) = map(json.loads, (tmp_path / 'out.jsonl').read_text().splitlines())
  assert (
    row['kept'] == {'id': [1]}
    and row['line'] == 1
    and set(row['probabilities'])
    == {
      'neg',
      'pos',
    }
  )


@pytest.mark.parametrize(
  ('words', 'told'),
  [
    (['{lines}', '--out', '{tmp}/a.txt'], 'must end in .csv or .jsonl'),
    (['{lines}', '--out', '{tmp}/none/a.csv'], 'there is no folder'),
    (['{lines}', '--out', '{tmp}/there.csv'], 'is there already; give another file, or --over'),
    (['{lines}', '--out', '{tmp}/a.jsonl', '--json'], 'give FILE.jsonl'),
    (['{lines}', '--overwrite'], '--overwrite is of the file of --out'),
    (['{tmp}'], 'there is no file'),
    (['{tmp}/none.csv?keep=id'], 'there is no file'),
    (['{tmp}/there.csv'], "has no column 'review' .*'text'"),
    (
      ['{tmp}/there.csv?text=text&keep=it'],
      "line 2 of .* no column 'it' to keep; there is 'id'",
    ),
    (['{tmp}/there.csv?txt=text'], "unknown option 'txt'"),
  ],
)
def test_what_cannot_be_read_or_written(texts_run, tmp_path, words, told):
  (tmp_path / 'lines.txt').write_text('a film\n')
  (tmp_path / 'there.csv').write_text('id;text\n1;a film\n')
  filled = [word.format(tmp=tmp_path, lines=tmp_path / 'lines.txt') for word in words]
  with pytest.raises(cli.Mistake, match=told):
    predicted(texts_run, *filled)
  assert {path.name for path in tmp_path.iterdir()} == {'lines.txt', 'there.csv'}


def test_a_file_is_replaced_as_a_whole_or_not_at_all(images_run, images, tmp_path, monkeypatch):
  out = tmp_path / 'a.csv'
  out.write_text('before')
  folder = tmp_path / 'pictures'
  folder.mkdir()
  whole = sorted((images / 'train').rglob('*.png'))
  for i in range(40):
    (folder / f'{i:02}.png').write_bytes(whole[i % len(whole)].read_bytes())
  cut = (folder / '39.png').read_bytes()
  (folder / '39.png').write_bytes(cut[: len(cut) // 2])  # its beginning is that of an image
  with pytest.raises(cli.Mistake, match='39.png is no readable image'):
    predicted(images_run, folder, '--out', out, '--overwrite')
  assert out.read_text() == 'before' and not list(tmp_path.glob('.*'))
  (folder / '39.png').write_bytes(cut)
  predicted(images_run, folder, '--out', out, '--overwrite')
  assert len(table_of(out)) == 40
  (tmp_path / 'empty').mkdir()
  with pytest.raises(cli.Mistake, match='there is no image in the folder'):
    predicted(images_run, tmp_path / 'empty')


def test_options_of_a_run_are_taken_where_a_table_has_them():
  name = 'csv:data/x.csv?text=a%26b&label=y&delimiter=;'
  assert data.like_columns('new.csv', name) == 'new.csv?text=a%26b&label=y&delimiter=%3B'
  assert data.like_columns('new.jsonl?keep=id', name) == 'new.jsonl?text=a%26b&label=y&keep=id'
  assert data.like_columns('new.csv?text=t', name) == 'new.csv?text=t&label=y&delimiter=%3B'
  assert np.all([data.kind_of_table(n) is None for n in ('-', 'a.txt', 'what?.csv', 'a.png')])


def test_a_table_of_images(images_run, images, tmp_path, capsys):
  files = sorted(map(str, (images / 'test').rglob('*.png')))[3:7]
  table = images / 'pictures.csv'
  table.write_text('n,at\n' + ''.join(f'{i},{file}\n' for i, file in enumerate(files)))
  expected = printed(images_run, capsys, *files)
  predicted(images_run, f'{table}?image=at&keep=n', '--out', tmp_path / 'out.jsonl')
  rows = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  for i, (row, right) in enumerate(zip(rows, expected, strict=True)):
    assert (row['file'], row['line'], row['kept']) == (str(table), i + 2, {'n': str(i)})
    assert {name: row[name] for name in right} == right
  with pytest.raises(cli.Mistake, match='say which column has their paths'):
    predicted(images_run, f'{table}?text=at')


def test_answers_with_lists_in_them(tmp_path):
  places = [{'input': 'a b'}, {'input': 'c, d', 'line': 2}]
  found = [
    tasks.Answer((), {'tags': ['X', None], 'values': {'size': 0.5}}),
    tasks.Answer((), {'tags': [], 'values': {'size': 1.5}}),
  ]
  training.save_answers(tmp_path / 'a.csv', places, iter(found))
  assert (tmp_path / 'a.csv').read_text() == (
    'input,line,tags,values:size\na b,,"[""X"", null]",0.5\n"c, d",2,[],1.5\n'
  )
  with pytest.raises(ValueError):
    training.save_answers(tmp_path / 'b.csv', places, iter(found[:1]))
  assert [path.name for path in tmp_path.iterdir()] == ['a.csv']
