"""A task of GLUE as the tables of language papers have it: RoBERTa-base, any method.

    python -m jpeft.train --config=configs/glue.py:lora,cola --workdir=runs/cola \
      --config.data.name=glue:glue/CoLA --config.model.source=roberta-base

The folder is that of the download (glue:glue/CoLA) or has exports of it (glue:FOLDER?task=cola).
The argument is METHOD or METHOD,TASK; mnli is scored on the matched half of its dev set, mnli-mm on
the other. AdamW with weight decay 0.1, linear decay after 6 % of warm-up, 128 tokens a row, which
hold nearly all examples. A score is of the dev set after each epoch; `best` of the report is chosen
there, as published rows are, and the last line is not.

Where a paper has no row of RoBERTa-base, its recipe of another encoder stands here: bitfit (BERT),
houlsby (BERT), light_peft (RoBERTa-large), lt_sft (mBERT), ia3 (T0).
"""

from ml_collections import ConfigDict

# {task: (config.task, metric, split to score)}
TASKS = {
  'cola': ('classification', 'matthews', 'dev'),
  'sst2': ('classification', 'accuracy', 'dev'),
  'mrpc': ('classification', 'f1', 'dev'),
  'stsb': ('regression', 'pearson', 'dev'),
  'qqp': ('classification', 'f1', 'dev'),
  'mnli': ('classification', 'accuracy', 'dev_matched'),
  'mnli-mm': ('classification', 'accuracy', 'dev_mismatched'),
  'qnli': ('classification', 'accuracy', 'dev'),
  'rte': ('classification', 'accuracy', 'dev'),
  'wnli': ('classification', 'accuracy', 'dev'),
}
# Learning rate, batch, epochs and hyperparameters of each method, for all tasks.
METHODS = {
  'lora': dict(lr=4e-4, rank=8, alpha=8),  # arXiv 2106.09685, table 9; see LORA
  'pissa': dict(name='lora', lr=1e-4, rank=8, alpha=8, init='pissa'),
  'pst': dict(lr=5e-5, batch=16, epochs=20, rank=8, sparsity=0.9),  # 2205.11005
  'light_peft': dict(lr=3e-4, epochs=10, rank=8, alpha=16, updates=800),  # 2406.03792
  'lt_sft': dict(lr=5e-5, epochs=10, count=1_000_000, first_steps=1000, first_batch=32),
  'mam': dict(lr=1e-4, epochs=10, tokens=16, bottleneck=16, scale=2.0),  # 2110.04366
  'bitfit': dict(lr=4e-4, batch=16, epochs=16),  # 2106.10199
  'houlsby': dict(lr=3e-4, epochs=20, bottleneck=64),  # 1902.00751
  'ia3': dict(lr=3e-3, epochs=20),  # 2205.05638
  'full': dict(lr=2e-5, epochs=10),  # RoBERTa, 1907.11692
}
# {task: (learning rate, batch, epochs)} of LoRA.
LORA = {
  'cola': (4e-4, 32, 80),
  'sst2': (5e-4, 16, 60),
  'mrpc': (4e-4, 16, 30),
  'stsb': (4e-4, 16, 40),
  'qqp': (5e-4, 16, 25),
  'mnli': (5e-4, 16, 30),
  'mnli-mm': (5e-4, 16, 30),
  'qnli': (4e-4, 32, 25),
  'rte': (5e-4, 32, 80),
}


def get_config(argument='lora'):
  method, _, task = argument.partition(',')
  task = task or 'rte'
  if task not in TASKS:
    raise ValueError(f'no task of GLUE is called {task!r}; there is {", ".join(TASKS)}')
  kind, metric, test = TASKS[task]
  chosen = {'lr': 1e-3, 'batch': 32, 'epochs': 10, **METHODS.get(method, {})}
  if method == 'lora' and task in LORA:
    chosen['lr'], chosen['batch'], chosen['epochs'] = LORA[task]
  config = ConfigDict()
  config.task = kind
  config.model = dict(source='roberta-base')
  config.data = dict(
    name=f'glue:glue?task={task.partition("-")[0]}',
    test=test,
    batch_size=chosen.pop('batch'),
    eval_batch_size=64,
    max_length=128,
  )
  config.optimizer = dict(lr=chosen.pop('lr'), weight_decay=0.1)
  config.schedule = dict(name='linear', warmup_fraction=0.06)
  config.epochs = chosen.pop('epochs')
  config.method = {'name': method, **chosen}
  config.eval = dict(metric=metric)
  return config
