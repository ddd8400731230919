"""From a pretrained model and labelled files to a table of results (finetune.py).

config   every key of a fine-tuning YAML        plan    tasks x seeds -> runs, and which are finished
run      one run: a task, a seed, a device      data    files -> labelled rows, by set
files    files -> columns by name               cells   lists within a cell
squad    questions of SQuAD's files
holdout  a share of rows, class by class        tags    entities in sequences of tags
kinds    rows -> batches, metrics, predictions  model   encoder and head
glue     GLUE's tasks and files                 gpus    runs over devices
table    mean, deviation, 95% interval
predict  predictions for new texts              progress what a run says on the terminal
"""
