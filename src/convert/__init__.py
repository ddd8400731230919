"""From text to MDS shards (convert_c4.py).

sources      what --source names, the list of its files, their documents; shares of work ("units")
walk         places -> files, each read, skipped, or refused
reasons      why a file is not read
hub          datasets on the Hugging Face Hub, streamed; files at URLs
forms        the forms of text files: one file -> its documents; text, JSON, CSV
tables       Parquet and Arrow     mds    shards of streaming
files        names of forms, parts of files, rows
filters      duplicates and contaminated documents
samples      documents -> token samples, truncated or in chunks
unit         one unit -> a folder of shards, with statistics (stats)
workers      units over processes
work_folder  the folder that lets a conversion be interrupted
conversion   plan, units, merging, report: one split from beginning to end
"""
