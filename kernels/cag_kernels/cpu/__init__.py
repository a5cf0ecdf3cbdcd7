"""Code for this processor: how it is emitted, kept and run by threads, and the small steps of a layer for few rows.

`attention` holds what attends to a prefix, `products` what multiplies by weights. Importing this package imports none
of it.
"""
