"""A forward of a network: the state of sequences, batches of them, and who computes their layers on a CPU and on a
GPU."""
