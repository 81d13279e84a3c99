"""Heads and near kin: the numbers of transformers (make_golden.py), and what is said of heads."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import models
from jpeft.methods.registry import make
from tests.models.goldens import GOLDEN, HEADS, KIN, UNSCANNED, close, golden, outputs

# What is asked for besides the head of the files.
HIDDEN = {'pool': 'tokens'}
OPTIONS = {'vit_mae': HIDDEN, 'dinov3': HIDDEN, 'dinov3_gated': HIDDEN}


def loaded_golden(name, **options):
  return models.load(GOLDEN / name, **OPTIONS.get(name, {}), **options)


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('name', (*HEADS, *KIN))
def test_outputs_equal_transformers(name, scan):
  inputs, arrays = golden(name)
  loaded = loaded_golden(name, scan=scan and name not in UNSCANNED, remat=scan)
  close(outputs(loaded, inputs), arrays['logits'])


@pytest.mark.parametrize('name', (*HEADS, *KIN))
def test_what_is_saved_loads_the_same(name, tmp_path):
  scan = name not in UNSCANNED
  loaded = loaded_golden(name, scan=scan)
  models.save_pretrained(tmp_path, loaded.model, loaded.variables, loaded.config)
  again = models.load(tmp_path, scan=scan)
  assert again.model == loaded.model
  jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
  with open(GOLDEN / name / 'config.json') as file:
    before = json.load(file)['architectures']
  want = {'vit_mae': ['ViTModel'], 'clip': ['CLIPVisionModel']}.get(name, before)
  assert again.config['architectures'] == want


@pytest.mark.parametrize(
  'name,options,shape',
  (
    ('bert_masked', {'num_classes': 4}, (3, 4)),
    ('bert_masked', {'head': 'tokens', 'num_classes': 5}, (3, 18, 5)),
    ('bert_masked', {'head': 'questions', 'num_classes': 2}, (3, 18, 2)),
    ('bert_masked', {'head': None}, (3, 12)),
    ('bert_masked', {'pool': 'tokens'}, (3, 18, 12)),
    ('roberta_masked', {'num_classes': 4}, (3, 4)),
    ('electra_masked', {'num_classes': 4}, (3, 4)),
    ('distilbert_masked', {'num_classes': 4}, (3, 4)),
    ('mpnet', {'head': 'tokens', 'num_classes': 5}, (3, 18, 5)),
    ('llama_yarn', {'num_classes': 4}, (3, 4)),
    ('llama_yarn', {'num_classes': 4, 'pool': 'mean'}, (3, 4)),
    ('llama_yarn', {'head': None}, (3, 12)),
    ('llama_yarn', {'head': None, 'pool': 'tokens'}, (3, 18, 12)),
    ('t5_encoder', {'head': 'tokens', 'num_classes': 5}, (3, 18, 5)),
    ('t5_encoder', {'pool': 'mean'}, (3, 12)),
    ('vit_mae', {'num_classes': 4}, (2, 4)),
    ('dinov2_registers', {'head': None}, (2, 12)),
  ),
)
def test_another_head_than_that_of_the_files(name, options, shape, tmp_path):
  inputs, _ = golden(name)
  loaded = models.load(GOLDEN / name, **options)
  out = outputs(loaded, inputs)
  assert out.shape == shape
  if options.get('num_classes') and shape[-1] != 2:
    assert len(loaded.config['id2label']) == shape[-1]
  models.save_pretrained(tmp_path, loaded.model, loaded.variables, loaded.config)
  again = models.load(tmp_path)
  assert again.model == loaded.model
  np.testing.assert_array_equal(outputs(again, inputs), out)


def test_a_fresh_classifier_has_a_dense_of_its_own_beside_the_pooler_of_the_files(tmp_path):
  """A bare RoBERTa has a pooler, which its classifier does not read."""
  loaded = models.load(GOLDEN / 'roberta', head=None)
  width = loaded.model.width
  loaded.variables['params']['pooler'] = {'kernel': np.eye(width), 'bias': np.ones(width)}
  bare = loaded.model.clone(pooler=True)
  models.save_pretrained(tmp_path, bare, loaded.variables, loaded.config)
  assert models.load(tmp_path).model.pooler
  fresh = models.load(tmp_path, num_classes=3).variables['params']['pooler']
  assert not np.asarray(fresh['bias']).any()


def copied(name, folder, *, rename=None, **changes):
  """A golden folder with another config, and other names of its tensors."""
  shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | changes))
  if rename:
    file = folder / 'model.safetensors'
    tensors = models.read_tensors(file)
    models.write_tensors(file, {rename.get(key, key): x for key, x in tensors.items()})
  return folder


NEXT = 'cls.seq_relationship.weight'


@pytest.mark.parametrize(
  'name,changes,message',
  (
    (
      'bert',
      {'architectures': ['BertForMultipleChoice']},
      'is a BertForMultipleChoice, whose head',
    ),
    (
      'bert_tokens',
      {'rename': {'classifier.weight': NEXT, 'classifier.bias': 'cls.seq_relationship.bias'}},
      "no tensor of such a head, but of 'cls.seq_relationship.weight'; head=None loads bert",
    ),
    (
      'bert_tokens',
      {'architectures': None, 'rename': {'classifier.weight': NEXT}},
      "a head that jpeft does not have, 'cls.seq_relationship.weight'; head=None",
    ),
    (
      'bert_masked',
      {'architectures': ['BertForPreTraining']},
      "is a BertForPreTraining, whose head .* head='masked' takes that part, head=None",
    ),
    (
      'roberta_masked',
      {'architectures': None, 'rename': {'lm_head.layer_norm.bias': 'qa_outputs.weight'}},
      "several heads, and its config names none of them: say head= one of 'questions', 'masked'",
    ),
    (
      'bert_questions',
      {'architectures': ['BertForMaskedLM']},
      "BertForMaskedLM and has no tensor of such a head, but of 'questions'",
    ),
    ('t5_tokens', {'architectures': ['T5ForSequenceClassification']}, 'whose head jpeft does not'),
    (
      'bert_masked',
      {'tie_word_embeddings': False},
      "reads the word table, and this one has a table of its own, 'cls.predictions.decoder.weight'",
    ),
  ),
)
def test_a_head_that_is_not_taken_is_refused_by_name(name, changes, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    models.load(copied(name, tmp_path, **changes))
  if changes.get('rename') is None:
    assert models.load(tmp_path, head=None).model.head is None


@pytest.mark.parametrize(
  'name,options,message',
  (
    ('bert', {'head': 'labels'}, "head 'labels' is unknown; bert has 'classification', 'tokens'"),
    ('vit', {'head': 'tokens'}, "a vit model has no head 'tokens'; vit has 'classification', and"),
    ('bert', {'head': 'questions'}, "no head 'questions'; num_classes=2 makes a fresh one"),
    ('bert', {'head': 'masked'}, "has no head 'masked'$"),
    ('bert_masked', {'head': 'tokens'}, "no head 'tokens'; num_classes= makes a fresh one"),
    ('bert', {'head': None, 'num_classes': 3}, 'makes a fresh head, and head=None asks for none'),
    ('bert', {'head': 'questions', 'num_classes': 3}, '2 outputs, start and end, not 3'),
    ('bert', {'head': 'masked', 'num_classes': 3}, 'gives words: it takes no num_classes'),
    ('llama', {'head': 'text', 'num_classes': 3}, 'gives words: it takes no num_classes'),
    ('bert_tokens', {'pool': 'mean'}, 'reads every token: it takes no pool'),
    ('llama', {'pool': 'mean'}, 'reads every token: it takes no pool'),
    ('t5', {'pool': 'mean'}, 'reads every token: it takes no pool'),
    ('llama', {'pool': 'tokens', 'num_classes': 3}, "'tokens' has no single feature"),
  ),
)
def test_requests_for_heads_that_cannot_be_met(name, options, message):
  with pytest.raises(ValueError, match=message):
    models.load(GOLDEN / name, **options)


def test_a_model_says_what_its_head_lacks():
  tokens = np.ones((1, 4), int)
  run = lambda model, *inputs: jax.eval_shape(model.init, jax.random.key(0), *inputs)
  bert = models.Bert(8, 1, 2, 8, vocab=9)
  with pytest.raises(ValueError, match="head 'tokens' needs num_classes"):
    run(bert.clone(head='tokens'), tokens)
  with pytest.raises(ValueError, match="head 'text' is none of classification, tokens"):
    run(bert.clone(head='text'), tokens)
  with pytest.raises(ValueError, match="head 'masked' gives no labels"):
    run(bert.clone(head='masked', num_classes=3), tokens)
  t5 = models.T5(8, 1, 2, 8, vocab=9)
  with pytest.raises(ValueError, match="has the head 'text', and decoder_tokens were not given"):
    run(t5, tokens)
  with pytest.raises(ValueError, match='has the head None, and decoder_tokens were given'):
    run(t5.clone(head=None), tokens, tokens)


def test_the_last_token_is_found_under_any_padding():
  inputs, _ = golden('llama_labels')
  loaded = models.load(GOLDEN / 'llama_labels')
  want = outputs(loaded, inputs)
  for row, mask in enumerate(inputs['mask'].astype(bool)):
    alone = {'tokens': inputs['tokens'][row : row + 1, mask]}
    np.testing.assert_allclose(outputs(loaded, alone)[0], want[row], atol=1e-5)


@pytest.mark.parametrize('name', ('bert_masked', 'llama_labels', 't5_encoder', 'electra'))
def test_shapes_are_those_of_the_loaded_model(name):
  described = models.describe(GOLDEN / name)
  loaded = models.load(GOLDEN / name)
  assert described.model == loaded.model and described.config == loaded.config
  assert jax.tree.map(jnp.shape, described.variables) == jax.tree.map(jnp.shape, loaded.variables)


METHODS = {'lora': {}, 'lst': {'reduction': 4}, 'vpt_deep': {}, 'prefix': {}}


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
  'name',
  (
    'bert_tokens',
    'bert_masked',
    'electra',
    'llama_labels',
    't5_tokens',
    'dinov2_registers',
    'beit',
  ),
)
def test_methods_train_with_a_head(name, method):
  inputs, arrays = golden(name)
  loaded = models.load(GOLDEN / name, scan=True)
  tuned = jpeft.attach(
    loaded.model, make(method, **METHODS[method]), loaded.variables, **inputs, deterministic=True
  )
  theta = jax.jit(tuned.init)(jax.random.key(0), loaded.variables)
  trained, held = tuned.split(theta)

  def loss(trained):
    theta = tuned.join(trained, held)
    out = tuned.apply(theta, loaded.variables, **inputs, deterministic=True)
    assert out.shape == arrays['logits'].shape
    return jnp.square(out).mean()

  gradients = jax.jit(jax.grad(loss))(trained)
  heads = jax.tree.leaves(gradients['head'])
  assert heads and all(np.abs(x).max() > 0 for x in heads)
  others = [x for rule, part in gradients.items() if rule != 'head' for x in jax.tree.leaves(part)]
  assert any(np.abs(x).max() > 0 for x in others)


def test_vqt_is_refused_where_attention_counts_positions_itself():
  inputs, _ = golden('llama_labels')
  loaded = models.load(GOLDEN / 'llama_labels')
  for given in (inputs, {'tokens': inputs['tokens']}):
    tuned = jpeft.attach(loaded.model, jpeft.vqt(), loaded.variables, **given)
    run = lambda theta, given=given, tuned=tuned: tuned.apply(theta, loaded.variables, **given)
    with pytest.raises(ValueError, match='by the positions of its own tokens, and a summary has'):
      jax.eval_shape(run, tuned.shapes)


@pytest.mark.parametrize('name', ('bert_masked', 'mpnet', 'llama_labels', 't5_tokens'))
def test_narrow_models_keep_their_head(name):
  inputs, _ = golden(name)
  loaded = models.load(GOLDEN / name)
  words = np.unique(np.concatenate([[0, 1], inputs['tokens'].ravel()]))
  keep = jpeft.Keep(layers=(1,), mlp={1: range(9)}, vocabulary=words)
  narrow, small = jpeft.narrowed(loaded.model, loaded.variables, keep)
  got = narrow.apply(small, **{**inputs, 'tokens': np.searchsorted(words, inputs['tokens'])})
  keep = jpeft.Keep(layers=(1,), mlp={1: range(9)})
  model, variables = jpeft.narrowed(loaded.model, loaded.variables, keep)
  want = model.apply(variables, **inputs)
  if name == 'bert_masked':
    want = want[..., words]
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_heads_that_share_a_position_bias_are_not_cut():
  loaded = models.load(GOLDEN / 'mpnet')
  with pytest.raises(ValueError, match='share a position bias, from which no heads are cut'):
    jpeft.narrowed(loaded.model, loaded.variables, jpeft.Keep(heads={0: (0,)}))
