"""From a YAML to a trained model (main.py).

config        every key, its default, unit and meaning       schema       YAML -> dataclasses, all faults at once
builders      config -> Trainer                              models, optim, data   its parts by name
muon          the optimizer of that name
callbacks     stop, check or change a run                    monitors     metrics and logs
loggers       loggers by name, and their packages
checkpoint    atomic checkpoints, fallback to the previous   resume       settings that may change
weights       pretrained weights into any model              processes    ranks and loader workers
run           train or evaluate from a config                ending       a run's end, and its start after that
validate      main.py --validate                          stoppers     end a run by a metric
yaml12        YAML 1.2, and values from the environment      averages     EMA and SWA
"""
