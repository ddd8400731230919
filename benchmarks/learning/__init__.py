"""Learning: small models pretrained on the same text (pretraining) and compared.

time_to_loss   time to a given validation loss, with ablations    quality        accuracy after fine-tuning
order          what grouping by length does                       extrapolation  lengths beyond those of training
"""
