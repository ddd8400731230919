"""Small programs of the quickstart and for runs: python -m scripts.quickstart, python -m scripts.plot_curves."""
