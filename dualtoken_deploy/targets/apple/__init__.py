"""What the two Apple targets share: the torch program to convert, weight compression, packages, their report."""
