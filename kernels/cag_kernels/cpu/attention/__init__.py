"""Attention of few rows to a long segment, compiled for this processor: numbers and codes, vectors and tiles."""
