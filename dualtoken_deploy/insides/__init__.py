"""What diagnose holds a bundle against: the values inside the float model, under the names that the bundle has."""
