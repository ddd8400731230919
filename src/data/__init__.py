"""From MDS shards to the microbatches that the model takes.

source          a dataset's place and weight             shards         index.json and its files: checks, reading
streaming       mosaicml-streaming 0.13, repaired        order          grouping by length, repeated samples
tokenizer       loading, saving, fingerprints            cutting        the first tokens of a text, and crops of it
masking         samples -> padded, masked batch          microbatches   padded batch -> unpadded microbatches
unigram         the unigram baseline                     shared_memory  removal of what killed runs left in /dev/shm

src/data_c4.py puts them together.
"""
