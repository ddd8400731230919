"""Learning: time_to_loss (with ablations), quality (fine-tuning, longer lengths), order (grouping by length).

pretraining is their training loop.
"""
