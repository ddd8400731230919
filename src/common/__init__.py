"""What every folder may use.

errors       the errors that a user can cause     files    complete files and folders, locks
environment  commit, versions, device             signals  processes that end with their parent
hub          folders of the Hugging Face Hub
"""
