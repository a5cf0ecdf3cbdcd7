"""From documents to a stored cache: reading, encoding, and measuring what a codec has cost in answers."""
