"""What the package `datasets` reads: folders, and its cache of the hub. Nothing is fetched."""

import io
import json
import shutil

import pytest
from PIL import Image

from jpeft import data
from tests.data.resuming import check_goes_on

datasets = pytest.importorskip('datasets')


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
  monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  datasets.disable_progress_bars()


def reviews(count, label=None):
  """Texts of two classes, sorted by class; or all with one label."""
  features = datasets.Features(
    {
      'sentence': datasets.Value('string'),
      'label': datasets.ClassLabel(names=['negative', 'positive']),
      'idx': datasets.Value('int32'),
    }
  )
  rows = {
    'sentence': [f't{i}' for i in range(count)],
    'label': [int(i >= count // 2) if label is None else label for i in range(count)],
    'idx': list(range(count)),
  }
  return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def saved(tmp_path):
  """A folder as `save_to_disk` writes it, with a split whose labels are not public."""
  splits = {'train': reviews(40), 'validation': reviews(6), 'test': reviews(4, -1)}
  datasets.DatasetDict(splits).save_to_disk(tmp_path / 'saved', num_shards={'train': 2})
  return tmp_path / 'saved'


def test_texts_with_the_splits_and_classes_of_the_data_set(saved):
  train = data.load(f'hf:{saved}', 'train')
  assert train.classes == ['negative', 'positive']
  assert {e['text']: e['label'] for e in train} == {f't{i}': int(i >= 20) for i in range(40)}
  # Rows sorted by class, as those of imdb, are mixed.
  assert {e['label'] for e in data.load(f'hf:{saved}', 'train[:8]')} == {0, 1}
  assert list(train) == list(data.load(f'hf:{saved}', 'train'))
  assert len(data.load(f'hf:{saved}', 'validation')) == 6
  with pytest.raises(ValueError, match="no split 'test': hf:.*'test' has no labels"):
    data.load(f'hf:{saved}', 'test')
  with pytest.raises(ValueError, match="has no split 'dev'; there is 'train', 'validation'"):
    data.load(f'hf:{saved}', 'dev')


def test_a_folder_of_files_that_datasets_reads(tmp_path):
  (tmp_path / 'files').mkdir()
  lines = [json.dumps({'text': f't{i}', 'label': 'ab'[i % 2]}) for i in range(6)]
  (tmp_path / 'files' / 'train.jsonl').write_text('\n'.join(lines))
  (tmp_path / 'files' / 'test.jsonl').write_text(lines[0])
  source = data.load(f'hf:{tmp_path}/files', 'train', tmp_path / 'other')
  assert {e['text']: e['label'] for e in source} == {f't{i}': i % 2 for i in range(6)}
  assert (tmp_path / 'other').is_dir() and not (tmp_path / 'cache').exists()
  assert len(data.load(f'hf:{tmp_path}/files', 'test')) == 1


def test_images_of_one_undivided_data_set(tmp_path):
  def png(value):
    file = io.BytesIO()
    Image.new('RGB', (5, 3), (value, 0, 0)).save(file, 'png')
    return {'bytes': file.getvalue(), 'path': None}

  features = datasets.Features(
    {'img': datasets.Image(), 'name': datasets.Value('string'), 'fine': datasets.ClassLabel(3)}
  )
  rows = {'img': [*map(png, range(20))], 'name': ['x'] * 20, 'fine': [i % 3 for i in range(20)]}
  datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / 'images')
  train, test = (data.load(f'hf:{tmp_path}/images', split) for split in ('train', 'test'))
  found = {int(e['image'][0, 0, 0]): e['label'] for e in [*train, *test]}
  assert found == {i: i % 3 for i in range(20)} and 0 < len(test) < 10
  assert train[0]['image'].shape == (3, 5, 3) and train.classes == ['0', '1', '2']


def test_images_that_lie_in_files(tmp_path):
  for i in range(4):
    file = tmp_path / 'folder' / 'train' / 'ab'[i % 2] / f'{i}.png'
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (5, 3), (i, 0, 0)).save(file)
  source = data.load(f'hf:{tmp_path}/folder', 'train')
  assert source.classes == ['a', 'b']
  assert {int(e['image'][0, 0, 0]): e['label'] for e in source} == {i: i % 2 for i in range(4)}


def test_chats_and_completions(tmp_path):
  chat = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
  rows = {'prompt_id': ['x'], 'prompt': ['a'], 'messages': [chat]}
  datasets.DatasetDict({'train_sft': datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / 'a')
  assert list(data.load(f'hf:{tmp_path}/a', 'train_sft')) == [{'messages': chat}]
  rows = {'prompt': ['2 + 2'], 'completion': ['4']}
  datasets.DatasetDict({'train': datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / 'b')
  assert list(data.load(f'hf:{tmp_path}/b', 'train')) == [{'prompt': '2 + 2', 'completion': '4'}]


def in_cache(cache, folder, config, split, rows):
  """Puts rows where `datasets` keeps what it fetched of the hub."""
  rows.to_parquet(cache.parent / 'rows.parquet')
  files = {split: str(cache.parent / 'rows.parquet')}
  datasets.load_dataset('parquet', data_files=files, cache_dir=str(cache / 'made'))
  (info,) = (cache / 'made').rglob('dataset_info.json')
  name = folder.rpartition('___')[2]
  place = cache / folder / config / '0.0.0' / 'abc'
  shutil.move(info.parent, place)
  (place / f'parquet-{split}.arrow').rename(place / f'{name}-{split}.arrow')
  values = json.loads((place / 'dataset_info.json').read_text())
  values |= {'config_name': config, 'dataset_name': name, 'builder_name': name}
  (place / 'dataset_info.json').write_text(json.dumps(values))


@pytest.mark.parametrize(
  ('folder', 'name'),
  [
    ('glue', 'glue/sst2'),
    ('glue', 'glue?config=sst2'),
    ('nyu-mll___glue', 'nyu-mll/glue/sst2'),
    ('glue___sst2', 'glue/sst2'),
  ],
)
def test_configurations_of_the_hub(tmp_path, folder, name):
  config = 'default' if folder == 'glue___sst2' else 'sst2'
  in_cache(tmp_path / 'cache', folder, config, 'train', reviews(10))
  found = data.load(f'hf:{name}', 'train')
  assert len(found) == 10 and found.classes == ['negative', 'positive']


# ---- Labels of other kinds.


def save(folder, features, splits):
  """A folder of splits, {name: {column: values}}."""
  made = {}
  for split, rows in splits.items():
    made[split] = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
  datasets.DatasetDict(made).save_to_disk(folder)
  return f'hf:{folder}'


def test_numbers_of_pairs(tmp_path):
  """As in glue/stsb, whose test split has -1 everywhere."""
  text = datasets.Value('string')
  features = {'sentence1': text, 'sentence2': text, 'label': datasets.Value('float32')}

  def rows(*labels):
    texts = [f't{i}' for i in range(len(labels))]
    return {'sentence1': texts, 'sentence2': texts, 'label': labels}

  splits = {'train': rows(5.0, 3.8, -1.0), 'test': rows(-1.0, -1.0)}
  name = save(tmp_path / 'stsb', features, splits) + '?text=sentence1&pair=sentence2'
  source = data.load(name, 'train', labels='numbers')
  found = {(e['text'], e['pair']): float(e['label'][0]) for e in source}
  assert found == pytest.approx({('t0', 't0'): 5.0, ('t1', 't1'): 3.8, ('t2', 't2'): -1.0})
  with pytest.raises(ValueError, match="no split 'test': .*'test' has no labels"):
    data.load(name, 'test', labels='numbers')
  with pytest.raises(
    ValueError, match='row 1 of hf:.* has the label 3.79.*; it must be a text or an'
  ):
    data.load(name, 'train')


def test_stars_as_classes_and_as_numbers(tmp_path):
  features = {'text': datasets.Value('string'), 'stars': datasets.ClassLabel(names=['1', '5'])}
  name = save(tmp_path / 'a', features, {'train': {'text': ['a', 'b'], 'stars': [1, 0]}})
  assert data.load(name, 'train').classes == ['1', '5']
  source = data.load(name, 'train', labels='numbers')
  assert {e['text']: e['label'].tolist() for e in source} == {'a': [5.0], 'b': [1.0]}


def test_sets(tmp_path):
  labels = datasets.Sequence(datasets.ClassLabel(names=['joy', 'fear', 'awe']))
  features = {'text': datasets.Value('string'), 'labels': labels, 'id': datasets.Value('string')}
  rows = {'text': ['x', 'y', 'z'], 'labels': [[0, 2], [], [1]], 'id': ['0', '1', '2']}
  name = save(tmp_path / 'emotions', features, {'train': rows})
  source = data.load(name, 'train', labels='sets')
  assert source.classes == ['joy', 'fear', 'awe']
  found = {e['text']: e['label'].tolist() for e in source}
  assert found == {'x': [1, 0, 1], 'y': [0, 0, 0], 'z': [0, 1, 0]}
  with pytest.raises(ValueError, match="these are texts of config.task='multilabel'"):
    data.load(name, 'train')


def test_tags(tmp_path):
  words = datasets.Sequence(datasets.Value('string'))
  features = {
    'tokens': words,
    'pos_tags': datasets.Sequence(datasets.ClassLabel(names=['NNP', 'VBZ'])),
    'ner_tags': datasets.Sequence(datasets.ClassLabel(names=['O', 'B-ORG', 'I-ORG'])),
  }
  rows = {'tokens': [['EU', 'rejects']], 'pos_tags': [[0, 1]], 'ner_tags': [[1, 0]]}
  name = save(tmp_path / 'conll', features, {'train': rows, 'test': rows})
  source = data.load(f'{name}?tags=ner_tags', 'test', labels='tags')
  assert list(source) == [{'words': ['EU', 'rejects'], 'label': [1, 0]}]
  assert source.classes == ['O', 'B-ORG', 'I-ORG']
  said = r'which column is the tags .*\?tags=COLUMN; .*pos_tags. .list<ClassLabel>., .ner_tags'
  with pytest.raises(ValueError, match=said):
    data.load(name, 'train', labels='tags')
  del features['pos_tags'], rows['pos_tags']
  name = save(tmp_path / 'wnut', features, {'train': rows})
  assert data.load(name, 'train', labels='tags')[0]['label'] == [1, 0]


def test_answers(tmp_path):
  text = datasets.Value('string')
  pieces = {'text': text, 'answer_start': datasets.Value('int32')}
  lists = {name: datasets.Sequence(piece) for name, piece in pieces.items()}
  kinds = {
    'lists': (lists, [{'text': ['Jane'], 'answer_start': [0]}, {'text': [], 'answer_start': []}]),
    'structs': (datasets.List(pieces), [[{'text': 'Jane', 'answer_start': 0}], []]),
  }
  for folder, (feature, answers) in kinds.items():
    features = {'id': text, 'context': text, 'question': text, 'answers': feature}
    rows = {
      'id': ['0', '1'],
      'context': ['Jane runs.'] * 2,
      'question': ['Who?', 'Why?'],
      'answers': answers,
    }
    name = save(tmp_path / folder, features, {'validation': rows})
    found = data.load(name, 'validation', labels='answers')
    assert sorted(found, key=lambda example: example['question']) == [
      {'question': 'Who?', 'context': 'Jane runs.', 'answers': [('Jane', 0)]},
      {'question': 'Why?', 'context': 'Jane runs.', 'answers': []},
    ]


def test_texts_alone(tmp_path):
  rows = {'text': ['a', '', 'b']}
  name = save(tmp_path / 'wiki', {'text': datasets.Value('string')}, {'train': rows})
  source = data.load(name, 'train', labels='nothing')
  assert sorted(e['text'] for e in source) == ['', 'a', 'b'] and source.classes == []


def test_what_is_not_there_is_said_in_one_sentence(tmp_path, saved):
  with pytest.raises(
    FileNotFoundError, match='hf:imdb is not in the cache of datasets, and the hub'
  ):
    data.load('hf:imdb', 'train')
  with pytest.raises(FileNotFoundError, match=r'there is no folder .*/save; did you mean .saved'):
    data.load(f'hf:{tmp_path}/save', 'train')
  with pytest.raises(ValueError, match="names a configuration, 'c', and config=d another"):
    data.load('hf:a/b/c?config=d', 'train')
  (tmp_path / 'a.csv').write_text('text,label\n')
  with pytest.raises(ValueError, match=r'is a file: give its folder, or csv:.*a\.csv'):
    data.load(f'hf:{tmp_path}/a.csv', 'train')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match='empty is nothing that datasets reads'):
    data.load(f'hf:{tmp_path}/empty', 'train')
  with pytest.raises(ValueError, match=r"which column is the label of texts\?|has no column 'y'"):
    data.load(f'hf:{saved}?label=y', 'train')
  with pytest.raises(ValueError, match='unlabelled=class: .label. has the numbers of given names'):
    data.load(f'hf:{saved}?unlabelled=class', 'train')


def test_code_of_a_data_set_is_never_run(tmp_path):
  folder = tmp_path / 'script'
  folder.mkdir()
  ran = tmp_path / 'ran'
  (folder / 'script.py').write_text(f'open({str(ran)!r}, "w")')
  with pytest.raises(ValueError, match='Dataset scripts are no longer supported'):
    data.load(f'hf:{folder}', 'train')
  assert not ran.exists()


def test_batches_go_on_from_any_place(saved):
  def numbers(example, rng):
    return {'label': example['label'], 'text': int(example['text'][1:])}

  def batches():
    return data.Batches(data.load(f'hf:{saved}', 'train'), 4, numbers, seed=3)

  check_goes_on(batches, 13)
