"""From MDS shards to the microbatches that the model takes.

source          a dataset's place and weight             index          index.json: every field checked
streaming       mosaicml-streaming 0.13, repaired        shards         files of index.json: checks, reading
cache           downloading, unpacking, deleting files   shared_memory  removal of what killed runs left in /dev/shm
tokenizer       loading, saving, fingerprints            cutting        the first tokens of a text, and crops of it
order           grouping by length, repeated samples     masking        samples -> padded, masked batch
unigram         the unigram baseline                     microbatches   padded batch -> microbatches
columns         the column of a sample that is read      balance        sequences of each microbatch
                                                         packing        microbatches in one buffer

src/data_c4.py puts them together.
"""
