"""Speed: step (tokens per second), scaling (length, size, processes), roofline, launches, loader, forms, int8."""
