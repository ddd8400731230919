"""From a pretrained model and labelled files to a table of results (finetune.py).

config   every key of a fine-tuning YAML        plan    tasks x seeds -> runs, and which are finished
run      one run: a task, a seed, a device      data    labelled files -> batches
glue     GLUE's tasks and files                 model   encoder, head and metrics
gpus     runs over devices                      table   mean, deviation, 95% interval
"""
