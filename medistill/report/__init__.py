"""One self-contained HTML page for the data protection officer, and the plain words behind it."""
