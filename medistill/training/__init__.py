"""Training networks on soft labels."""
