"""Conformance suites for third parties: subclass one a codec or backend, and pytest runs it. Needs pytest."""

from cag_store.testing.backends import BackendConformance
from cag_store.testing.codecs import CodecConformance, sample_array

__all__ = ["BackendConformance", "CodecConformance", "sample_array"]
