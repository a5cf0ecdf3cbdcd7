"""Whether a stored cache is one of the model that is loaded, so that its keys and values mean what they say.

Knows manifests and a loaded model; reads no keys and values.
"""

from __future__ import annotations

from cag.errors import CacheMismatch
from cag.model import LanguageModel
from cag.prompt import template_from_json
from cag.short_model import with_rope
from cag_store import CacheReader, Manifest


def check_fingerprints(name: str, manifest: Manifest, model: LanguageModel) -> None:
    """Refuse a cache that another model, adapter, tokenizer or chat template built, or one of whose prompt nothing is
    known. Raises: CacheMismatch."""
    model = with_rope(model, manifest.kv.rope)
    built, loaded = manifest.model, model.fingerprints
    parts = {
        "model": (built.fingerprint, loaded.weights),
        "adapter": (built.adapter_fingerprint, loaded.adapter),
        "tokenizer": (built.tokenizer_fingerprint, loaded.tokenizer),
        "chat template": (built.template_fingerprint, loaded.template),
        "RoPE configuration": (dict(manifest.kv.rope), model.rope),
        "shape of keys and values": (
            [(*shape, manifest.kv.sides) for shape in zip(manifest.kv.num_kv_heads, manifest.kv.head_dim, strict=True)],
            [(shape.num_kv_heads, shape.head_dim, shape.sides) for shape in model.kv_shapes],
        ),
        "key/value type": (manifest.kv.dtype, str(model.kv_dtype).removeprefix("torch.")),
        "kind of layers (recurrent ones)": (manifest.states is not None, model.recurrent is not None),
    }
    for part, (expected, found) in parts.items():
        if expected != found:
            raise CacheMismatch(
                f"cache {name!r} was built with another {part} ({built.id}: {_short(expected)}) than the one loaded "
                f"({model.model_id}: {_short(found)}).",
                hint=f"Load {built.id}, or build the cache again with `cag update {name} PATH...`.",
                part=part,
                expected=expected,
                found=found,
            )
    template_from_json(manifest.layout)


def check_tokens(name: str, reader: CacheReader, model: LanguageModel) -> None:
    """Refuse what no build of this model gives, before there is memory for it. Raises: CacheMismatch."""
    largest = int(reader.token_ids().max())
    bounds = {"token id": (model.vocab_size - 1, largest), "number of tokens": (model.window_tokens, reader.num_tokens)}
    for part, (expected, found) in bounds.items():
        if found > expected:
            raise CacheMismatch(
                f"cache {name!r} has a {part} of {found:,}, and {model.model_id} takes at most {expected:,}.",
                hint="Build it again.",
                part=part,
                expected=expected,
                found=found,
            )


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else "none" if value is None else f"{value!s:.100}"
