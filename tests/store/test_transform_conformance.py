"""The conformance suite on codec `transform`: each shape that the suite asks for has a basis of its own."""

import hashlib
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from cag_store.codecs import Codec, JointTransform, codec_from_config
from cag_store.codecs.transform import Basis
from cag_store.dtypes import widen
from cag_store.errors import CorruptEntry
from cag_store.testing import CodecConformance
from cag_store.testing.bases import sample_basis

STEP = -256


@lru_cache
def codec_of_shape(num_kv_heads: int, head_dim: int, exact_tokens: int) -> Codec:
    """Without rotation: `decode_into` knows no position."""
    basis = replace(sample_basis((num_kv_heads,), (head_dim,), 1), layer_rotation=(-1,)).to_bytes()
    digest = hashlib.sha256(basis).hexdigest()
    config = {"id": "transform", "basis": digest, "joint_layers": 1, "step": STEP, "exact_tokens": exact_tokens}
    return codec_from_config(config, lambda digest: basis)


class OfAnyShape(JointTransform):
    """The codec with the basis of whatever it is given."""

    def encode(self, array, dtype, side="keys", start=0):
        return codec_of_shape(array.shape[0], array.shape[-1], self.exact_tokens).encode(array, dtype, side, start)

    def decode_into(self, data, out):
        codec_of_shape(out.shape[0], out.shape[-1], self.exact_tokens).decode_into(data, out)


class TestTransform(CodecConformance):
    configs = []

    def codecs(self):
        return [OfAnyShape("0" * 64, 1, STEP, exact_tokens) for exact_tokens in (4, 0)]

    def tolerance(self, array, dtype, side):
        """Half a step of every component in the same direction, and the storage dtype's rounding."""
        values = np.abs(widen(array, dtype))
        return 2.0 ** (STEP / 64) * np.sqrt(array.shape[0] * array.shape[2]) / 2 * 1.05 + values.max() * 2.0**-8


@pytest.mark.parametrize("exact_tokens", [0, 4])
def test_a_codec_without_its_basis_is_still_its_configuration(exact_tokens):
    codec = codec_of_shape(2, 8, exact_tokens)
    assert codec_from_config(codec.config()) == codec


def test_a_basis_has_one_spelling():
    """An integer among the frequencies would be written again as a float, under another address."""
    data = sample_basis((2, 1), (8, 16), 2).to_bytes()
    start = data.index(b"{")
    size = int.from_bytes(data[start - 4 : start], "little")
    header = data[start : start + size].replace(b"[1.0,", b"[1,", 1)
    assert len(header) == size - 2
    forged = data[: start - 4] + len(header).to_bytes(4, "little") + header + data[start + size :]
    with pytest.raises(CorruptEntry, match="inverse_frequencies"):
        Basis.from_bytes(forged)
