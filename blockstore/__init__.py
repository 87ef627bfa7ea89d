"""Block servers and their client: immutable, checksummed, replicated blocks.  Knows neither files nor names."""
