"""Measurements, each with its baseline in the same run; results/ and the pages made from it by publish.

kernels/    each kernel compared with what PyTorch has, and its compilation for every card
speed/      a training step, its growth with size and length, the loader
learning/   time to a given loss, ablations, accuracy after fine-tuning, longer sequences
restarts/   runs killed at named points and at random
gpu/        all that only a card can say, as one script
"""
