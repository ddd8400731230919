"""Small programs, by python -m scripts.NAME: quickstart, plot_curves, sentence_vectors (from an exported folder)."""
