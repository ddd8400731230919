"""From MDS shards to the microbatches that the model takes.

    tokenizer       loading, saving, fingerprints, the first tokens of a text without tokenizing all of it
    shards          index.json and its files: checks, reading
    streaming       mosaicml-streaming 0.13 with its faults repaired
    order           grouping by length, repeated samples
    masking         samples -> padded, masked batch
    microbatches    padded batch -> unpadded microbatches with their layout
    shared_memory   removal of what killed runs left in /dev/shm

data_c4.py, one folder up, puts them together.
"""
