"""The only place where a guarantee can be made."""
