"""Data sets: nothing here imports the rest of the package but its errors and files."""
