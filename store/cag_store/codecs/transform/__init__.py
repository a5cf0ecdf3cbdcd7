"""The codec `transform` and its basis."""

from cag_store.codecs.transform.basis import Basis, GroupBasis, Rotation
from cag_store.codecs.transform.codec import JointTransform

__all__ = ["Basis", "GroupBasis", "JointTransform", "Rotation"]
