"""What every folder may import.

errors       the errors that a user can cause     files    atomic writes, locks
environment  commit, versions, device             signals  how processes end, alone or with their parent
hub          Hugging Face Hub: repositories as folders, errors about datasets
streams      files as decompressed bytes
"""
