"""Files of the first release decode for ever. They are never rewritten; a new format version adds new ones."""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from cag_store import Store, codec_from_config, storage_dtype

GOLDEN = Path(__file__).parent / "golden"
SEGMENTS = [segment for path in sorted(GOLDEN.glob("segments-*.json")) for segment in json.loads(path.read_text())]


@pytest.mark.parametrize(
    "segment", SEGMENTS, ids=lambda segment: f"{segment['codec']['id']}-{segment['dtype']}-{segment['side']}"
)
def test_segments(segment):
    out = np.empty(segment["shape"], dtype=storage_dtype(segment["dtype"]))
    place = segment["side"], segment.get("layer", 0), segment.get("start", 0)
    codec_from_config(segment["codec"]).decode_layers_into(base64.b64decode(segment["encoded"]), [out], *place)
    assert hashlib.sha256(out.tobytes()).hexdigest() == segment["decoded_sha256"]


def test_a_whole_store():
    golden = json.loads((GOLDEN / "store-1.json").read_text())
    store = Store.in_memory()
    for path, data in golden["objects"].items():
        store.backend.replace(path, base64.b64decode(data))
    store.verify("golden").raise_first()
    _, manifest = store.resolve("golden")
    with store.reader(manifest) as reader:
        dtype = storage_dtype(manifest.kv.dtype)
        shapes = zip(manifest.kv.num_kv_heads, manifest.kv.head_dim, strict=True)
        buffers = [tuple(np.zeros((heads, manifest.num_tokens, dim), dtype) for _ in range(2)) for heads, dim in shapes]
        reader.load(buffers)
        assert reader.token_ids().tolist() == golden["token_ids"]
    decoded = b"".join(side.tobytes() for pair in buffers for side in pair)
    assert hashlib.sha256(decoded).hexdigest() == golden["decoded_sha256"]


def test_segments_of_a_codec_with_a_basis():
    golden = json.loads((GOLDEN / "transform-1.json").read_text())
    basis = base64.b64decode(golden["basis"])
    assert hashlib.sha256(basis).hexdigest() == golden["codec"]["basis"]
    codec = codec_from_config(golden["codec"], lambda digest: basis)
    for segment in golden["segments"]:
        outs = [np.empty(shape, dtype=storage_dtype(segment["dtype"])) for shape in segment["shapes"]]
        data = base64.b64decode(segment["encoded"])
        codec.decode_layers_into(data, outs, segment["side"], segment["first_layer"], segment["start"])
        decoded = b"".join(out.tobytes() for out in outs)
        assert hashlib.sha256(decoded).hexdigest() == segment["decoded_sha256"]
