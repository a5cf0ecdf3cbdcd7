"""Whether a stored cache is one of the model that is loaded, so that its keys and values mean what they say.

Knows manifests and a loaded model; reads no keys and values.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cag.errors import CacheMismatch
from cag.model import LanguageModel
from cag.prompt import TextDocument, encode, lay_out, template_from_json
from cag.short_model import with_rope
from cag_store import CacheReader, Manifest

TOKENIZER = "tokenizer"  # in the layout of a manifest: the digest of what tokenized the prompt
_PROBES = (
    "It's 7 a.m.; THEY'LL ask:  is 12,345.60 km far?",
    " two  spaces\t\n\nlines\r\n   and camelCase_names(x)[0] != y",
    "naïve Größe e\u0301 ﬁ Ⅷ ½ — “quoted” … \u00a0\u200b\ufeff",
    "漢字かな 한국어 العربية हिन्दी ภาษาไทย עברית Ελληνικά Русский 🙂👩‍🚀",
)


def check_weights(model: LanguageModel) -> None:
    """Refuse a model whose weights in memory are not those of its fingerprint any more. Raises: ModelError."""
    if model.files is not None and model.device.type == "cpu":
        model.files.check_weights(model.fingerprints.weights)


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


def check_prompt(
    name: str,
    manifest: Manifest,
    reader: CacheReader,
    model: LanguageModel,
    load_documents: Callable[[], Sequence[TextDocument]],
) -> None:
    """Refuse a cache of other tokens than its prompt has here: one tokenizer's files become several tokenizers, by the
    version of transformers and by fields of other files.

    Where another one than the model's tokenized the prompt, or nothing is known of that, all of it is tokenized again.
    Raises: CacheMismatch; StoreError: the texts of the documents are damaged or gone.
    """
    layout = manifest.layout
    if layout.get(TOKENIZER) == tokenizer_digest(model.tokenizer):
        return
    texts = {key: layout[key] for key in ("system_text", "closing_text")}
    again = lay_out(model.tokenizer, template_from_json(layout), load_documents(), **texts).token_ids
    if not np.array_equal(again, reader.token_ids()):
        version = _short(manifest.versions.get("transformers"))
        raise CacheMismatch(
            f"the prompt of cache {name!r} has other tokens ({reader.num_tokens:,}) than {model.model_id} makes of it "
            f"here ({len(again):,}): it was tokenized with transformers {version}, or other "
            "settings of the model.",
            hint=f"Build it again with `cag update {name} PATH...`.",
            part="tokens",
            expected=reader.num_tokens,
            found=len(again),
        )


def tokenizer_digest(tokenizer: Any) -> str:
    """Hex sha256 of what a tokenizer, as it was made of its files, does with texts: its steps before the vocabulary,
    its added tokens, and token ids of a few texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # that slow ones have not
    steps = [backend.normalizer, backend.pre_tokenizer] if backend is not None else []
    added = backend.get_added_tokens_decoder() if backend is not None else {}
    does = {
        "steps": [step and step.__getstate__().decode() for step in steps],
        "added": [
            [number, token.content, token.special, token.normalized, token.lstrip, token.rstrip, token.single_word]
            for number, token in sorted(added.items())
        ],
        "probes": [encode(tokenizer, text, special=False) for text in _PROBES],
    }
    return hashlib.sha256(json.dumps(does).encode()).hexdigest()


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else "none" if value is None else f"{value!s:.100}"
