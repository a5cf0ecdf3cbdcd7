"""What a build needs before it computes: an expiry ahead, ids that differ, a codec of such a model, room in the window
and in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import cag_store
from cag.building.options import BuildOptions
from cag.corpus import Document
from cag.errors import CorpusTooLarge, EmptyCorpus, InsufficientResources, UsageError
from cag.machine.runtime import free_memory_bytes
from cag.model import LanguageModel
from cag.prompt import PrefixLayout, lay_out
from cag_store import Store
from cag_store.codecs import Int4

RESERVED_TOKENS = 512  # of the window, kept for question and answer
_FAR_TOO_LARGE = 4  # windows, behind which a corpus is not counted any more


def check_ttl(ttl_s: float) -> None:
    """Raises: UsageError: an expiry that is not ahead, or beyond the calendar."""
    try:
        ahead = isinstance(ttl_s, Real) and ttl_s > 0 and cag_store.utc_after(ttl_s)
    except ValueError as error:
        raise UsageError(f"ttl_s is {ttl_s}: {error}.") from error
    if not ahead:
        raise UsageError(
            f"ttl_s is {ttl_s!r}; it is a number of seconds above 0.", hint="Without one it never expires."
        )


def laid_out(model: LanguageModel, documents: Sequence[Document], options: BuildOptions) -> PrefixLayout:
    """The prefix over `documents`. Raises: CorpusTooLarge: far more tokens than fit, which nobody need count."""
    try:
        return lay_out(
            model.tokenizer,
            options.template or model.template,
            documents,
            system_text=options.system_text,
            closing_text=options.closing_text,
            max_tokens=_FAR_TOO_LARGE * model.window_tokens,
        )
    except CorpusTooLarge as error:
        found = _FAR_TOO_LARGE * model.window_tokens
        raise _too_large(model, found, f"more than {found} tokens, many more than fit") from error


def check_window(model: LanguageModel, layout: PrefixLayout) -> None:
    """Raises: CorpusTooLarge."""
    limit = model.window_tokens - RESERVED_TOKENS
    found = len(layout.token_ids)
    if found > limit:
        raise _too_large(model, found, f"{found} tokens with its prompt, {found - limit} more than fit")


def _too_large(model: LanguageModel, num_tokens: int, told: str) -> CorpusTooLarge:
    return CorpusTooLarge(
        f"the corpus has {told}: {model.model_id} has a window of {model.window_tokens}, of which {RESERVED_TOKENS} "
        "are kept for question and answer.",
        hint="Leave documents out, split the corpus into several caches, or take a model with a longer window.",
        num_tokens=num_tokens,
        window_tokens=model.window_tokens,
    )


def check_ids(documents: Sequence[Document]) -> None:
    """Raises: EmptyCorpus: no documents; UsageError: two of one id."""
    if not documents:
        raise EmptyCorpus("there is no document to build a cache of.", hint="Give at least one.")
    doc_id, times = max(Counter(document.doc_id for document in documents).items(), key=lambda item: item[1])
    if times > 1:
        raise UsageError(f"{times} documents have the id {doc_id!r}.", hint="Citations name documents by their ids.")


def check_codec_of(model: LanguageModel, store: Store, codec: Mapping[str, Any]) -> None:
    """Whether a codec's full configuration can be that of a cache of `model` in `store`.

    Raises: UsageError: layers that the model does not have; EntryNotFound, CorruptEntry: what the codec needs is not in
        the store whole.
    """
    last = max(codec["wide_key_layers"], default=0) if codec["id"] == Int4.codec_id else 0
    if last >= len(model.kv_shapes):
        raise UsageError(
            f"codec int4: wide_key_layers names layer {last}, and {model.model_id} has {len(model.kv_shapes)}, "
            "counted from 0."
        )
    store.codec(codec)
    store.forget_codec(codec)  # measuring and encoding prepare it anew


def check_memory(model: LanguageModel, layout: PrefixLayout) -> None:
    """Raises: InsufficientResources: too little for one copy of the cache."""
    needed = len(layout.token_ids) * model.kv_bytes_per_token + (model.recurrent.num_bytes if model.recurrent else 0)
    free = free_memory_bytes(model.device)
    if needed > free:
        raise InsufficientResources(
            f"the cache needs {needed / 1e9:.2f} GB of memory for {len(layout.token_ids)} tokens, "
            f"and {free / 1e9:.2f} GB are free.",
            hint="Free memory, or use fewer documents or a smaller model.",
        )
