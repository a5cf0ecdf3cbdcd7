"""Products of few rows and a weight, compiled for this processor: packed or in tiles, exact or bounds from 8 bits."""
