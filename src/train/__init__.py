"""From a YAML to a trained model (main.py).

config        every key, its default, unit and meaning       schema       YAML -> dataclasses, all faults at once
builders      config -> Trainer                              models, optim, data   its parts by name
callbacks     what acts on a run                             monitors     what is logged
checkpoint    atomic checkpoints, fallback to the previous   resume       what may change between starts
weights       pretrained weights into any model              processes    ranks and loader workers
run           train, evaluate: a run from its config          validate     main.py --validate
"""
