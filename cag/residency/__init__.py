"""A prefix in memory: from decoded bytes to keys and values that all sessions attend to, on a CPU and on a GPU."""
