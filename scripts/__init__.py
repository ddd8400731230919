"""Small programs beside the command lines: python -m scripts.quickstart, python -m scripts.plot_curves."""
