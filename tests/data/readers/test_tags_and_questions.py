"""Files of tags, of questions and of plain texts."""

import json

import pytest

from jpeft import data

COLUMNS = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""


def everything(name, labels):
  return data.load(name, 'train+test', labels=labels)


@pytest.fixture
def columns(tmp_path):
  file = tmp_path / 'eng.txt'
  file.write_text(COLUMNS)
  return file


def test_columns(columns):
  source = everything(f'conll:{columns}', 'tags')
  assert source.classes == ['O', 'B-ORG', 'B-PER', 'I-PER']
  found = {tuple(example['words']): example['label'] for example in source}
  assert found == {('EU', 'rejects'): [1, 0], ('Peter', 'Blackburn'): [2, 3]}
  other = everything(f'conll:{columns}?tags=1', 'tags')
  assert other.classes == ['NNP', 'VBZ']


def test_other_columns_and_comments(tmp_path):
  (tmp_path / 'train.conllu').write_text('# text = x\n1\tNew York\tX\n\n1\tx\tY\n')
  (tmp_path / 'test.conllu').write_text('1\ty\tX\n')
  name = f'conll:{tmp_path}?tokens=1&comment=%23&delimiter=%09'
  train = data.load(name, 'train', labels='tags')
  assert sorted(example['words'] for example in train) == [['New York'], ['x']]
  assert [dict(example) for example in data.load(name, 'test', labels='tags')] == [
    {'words': ['y'], 'label': [0]}
  ]


@pytest.mark.parametrize(
  ('content', 'options', 'message'),
  [
    ('a O\nb\n', '', r'line 2 of .*a\.txt has 1 columns, and lines before it have 2'),
    ('a O\n', '?tags=2', r'line 1 of .*a\.txt has 2 columns, .* and none of number 2 \(tags=2\)'),
    ('a\n', '', r'has 1 columns, and words and tags would both be column 0'),
    ('a O\n', '?tags=ner', r'tags=ner must be the number of a column'),
    ('a O\n', '?tag=1', r"unknown option 'tag'; did you mean 'tags'"),
    ('\n-DOCSTART-\n', '', r'a\.txt is empty: there is no sentence'),
  ],
)
def test_columns_that_are_wrong(tmp_path, content, options, message):
  (tmp_path / 'a.txt').write_text(content)
  with pytest.raises(ValueError, match=message):
    everything(f'conll:{tmp_path}/a.txt{options}', 'tags')


def lines(path, *values):
  path.write_text('\n'.join(map(json.dumps, values)))
  return path


def test_tags_of_json_lines(tmp_path):
  file = lines(tmp_path / 'a.jsonl', {'tokens': ['Jane', 'runs'], 'ner': [1, 0]})
  source = everything(f'jsonl:{file}?tags=ner', 'tags')
  assert source.classes == ['0', '1'] and source[0] == {'words': ['Jane', 'runs'], 'label': [1, 0]}
  named = everything(f'jsonl:{file}?tags=ner&names=O,B-PER,I-PER', 'tags')
  assert named.classes == ['O', 'B-PER', 'I-PER'] and named[0]['label'] == [1, 0]


@pytest.mark.parametrize(
  ('values', 'options', 'message'),
  [
    ({'tokens': ['a'], 'ner': ['O']}, '', r"line 1 of .* has no 'tags' .*a\.jsonl\?tags=NAME"),
    ({'tokens': ['a'], 'tags': ['O', 'O']}, '', 'has 1 words, and 2 tags'),
    ({'tokens': 'a b', 'tags': ['O', 'O']}, '', "has 'a b' as its 'tokens'; it must be a list"),
    ({'tokens': ['a'], 'tags': [0.5]}, '', "has 0.5 among its 'tags'"),
    ({'tokens': ['a'], 'tags': [3]}, '?names=O,B-X', 'has the tag 3 .* has 2 of them'),
    ({'tokens': ['a', 1], 'tags': ['O', 'O']}, '', "'tokens' is a list of texts"),
  ],
)
def test_tags_that_are_wrong(tmp_path, values, options, message):
  file = lines(tmp_path / 'a.jsonl', values)
  with pytest.raises(ValueError, match=message):
    everything(f'jsonl:{file}{options}', 'tags')


def article(*questions, context='Jane runs to Rome.'):
  return {'data': [{'title': 'x', 'paragraphs': [{'context': context, 'qas': list(questions)}]}]}


def asked(answers, **more):
  return {'id': 'q7', 'question': 'Who?', 'answers': answers, **more}


JANE = {'text': 'Jane', 'answer_start': 0}


def test_files_of_squad(tmp_path):
  none = asked([], is_impossible=True, plausible_answers=[JANE])
  (tmp_path / 'dev-v2.0.json').write_text(json.dumps(article(asked([JANE, JANE]), none)))
  source = data.load(f'squad:{tmp_path}', 'dev-v2.0', labels='answers')
  assert list(source) == [
    {'question': 'Who?', 'context': 'Jane runs to Rome.', 'answers': [('Jane', 0)] * 2},
    {'question': 'Who?', 'context': 'Jane runs to Rome.', 'answers': []},
  ]


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'x': 1}, r"a\.json is no file of SQuAD \('data'\)"),
    ({'data': [{'paragraphs': [{'qas': []}]}]}, None),
    (
      article(asked([{'text': 'Rome', 'answer_start': 12}])),
      r"question 'q7' of .*: the answer 'Rome' does not stand at answer_start=12 .* but ' Rom'",
    ),
    (article(asked([{'text': 'Rome', 'answer_start': -5}])), 'does not stand at answer_start=-5'),
    (article(asked([{'text': 'Rome'}])), 'an answer is {"text": a text, "answer_start"'),
    (
      article({'id': 'q7', 'question': 'Who?'}),
      r"no file of SQuAD after 0 questions \('answers'\)",
    ),
    (article(asked([JANE]), context=''), 'has an empty question, or an empty context'),
  ],
)
def test_files_of_squad_that_are_wrong(tmp_path, values, message):
  (tmp_path / 'a.json').write_text(json.dumps(values))
  with pytest.raises(ValueError, match=message or 'is empty: there is no question'):
    everything(f'squad:{tmp_path}/a.json', 'answers')


def test_questions_of_json_lines(tmp_path):
  line = {'question': 'Who?', 'context': 'Jane runs.'}
  file = lines(
    tmp_path / 'a.jsonl',
    line | {'answers': {'text': ['Jane'], 'answer_start': [0]}},
    line | {'answers': [JANE]},
    line | {'answers': None},
  )
  source = everything(f'jsonl:{file}', 'answers')
  assert [example['answers'] for example in source] == [[('Jane', 0)], [('Jane', 0)], []]
  with pytest.raises(ValueError, match=r"line 1 of .* has no 'q' .*\?question=NAME"):
    everything(f'jsonl:{file}?question=q', 'answers')
  file = lines(tmp_path / 'b.jsonl', line | {'answers': 'Jane'})
  with pytest.raises(ValueError, match="has 'Jane' as its 'answers'; it must be a list of"):
    everything(f'jsonl:{file}', 'answers')


def test_plain_texts(tmp_path):
  file = tmp_path / 'a.txt'
  file.write_text('one\n two \n\nthree\n')
  texts = lambda name: sorted(example['text'] for example in everything(name, 'nothing'))
  assert texts(f'text:{file}') == ['one', 'three', 'two']
  assert texts(f'text:{file}?by=paragraph') == ['one two', 'three']
  (tmp_path / 'b.csv').write_text('body,label\nx,1\n')
  source = everything(f'csv:{tmp_path}/b.csv?text=body', 'nothing')
  assert source[0]['text'] == 'x' and source.classes == []
  (tmp_path / 'c.jsonl').write_text('{"text": "y"}\n')
  assert texts(f'jsonl:{tmp_path}/c.jsonl') == ['y']
  with pytest.raises(ValueError, match="by=word must be 'line' or 'paragraph'"):
    texts(f'text:{file}?by=word')


@pytest.mark.parametrize(
  ('name', 'labels', 'message'),
  [
    (
      'conll:x',
      'classes',
      "not read for config.task='classification': set config.task to 'tokens'",
    ),
    ('completions:x', 'tags', "for config.task='tokens': set config.task to 'language'"),
    ('csv:x', 'answers', "set config.task to 'classification' or 'masked'"),
    ('connl:x', 'tags', "unknown data set 'connl:x'; did you mean 'conll:PATH'"),
  ],
)
def test_readers_of_other_tasks(name, labels, message):
  with pytest.raises(ValueError, match=message):
    data.load(name, 'train', labels=labels)
