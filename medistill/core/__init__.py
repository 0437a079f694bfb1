"""The nouns: frozen records and protocols. No algorithm and no input or output lives here."""
