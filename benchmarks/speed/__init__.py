"""Speed: step (tokens per second), scaling (length, size, processes), roofline, loader (data), forms, int8."""
