"""Speed: step (tokens per second), scaling (length, size, processes), loader (data), forms (of text), int8."""
