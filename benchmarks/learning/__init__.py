"""Learning: small models pretrained on the same text (pretraining) and compared.

time_to_loss   time to a given validation loss, with ablations
quality        accuracy after fine-tuning, and loss at lengths beyond those of training
order          what grouping by length does to padding
"""
