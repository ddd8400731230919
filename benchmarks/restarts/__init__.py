"""Restarts: faults kills runs at the points of crash and at random, and compares them with an undisturbed one."""
