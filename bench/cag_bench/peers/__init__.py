"""The comparison with other engines: each in a process of its own Python, spoken to in JSON lines, never imported."""
