"""A corpus cut to so many tokens, and the text that follows the cut, which a model can read on behind the documents.

Documents and a tokenizer in, documents and token ids out; runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cag.building.probes import Branch
from cag.corpus import Document
from cag.corpus.document import text_sha256
from cag.errors import UsageError
from cag.model import LanguageModel
from cag.prompt import PrefixLayout, encode, lay_out

FOLLOWING_TOKENS = 1024
_LEAST_FOLLOWING = 64
_CHARACTERS_PER_TOKEN = 12  # more than there are, in any script


@dataclass(frozen=True)
class CutCorpus:
    """The documents of a cache, the last one perhaps cut off, and the text behind the cut, None where there is too
    little. It goes on behind the documents, `num_document_tokens` from the beginning, not behind the closing text."""

    documents: tuple[Document, ...]
    layout: PrefixLayout
    following: Branch | None

    @property
    def num_document_tokens(self) -> int:
        """Tokens of the prefix up to the end of the last document."""
        return self.layout.spans[-1].end


def cut_corpus(model: LanguageModel, documents: Sequence[Document], num_tokens: int) -> CutCorpus:
    """At most `num_tokens` tokens of prompt and documents.

    Raises: UsageError when not even the beginning of the first document fits.
    """
    layout = _laid_out(model, documents)
    if len(layout.token_ids) <= num_tokens:
        return CutCorpus(tuple(documents), layout, None)
    closing = len(layout.token_ids) - layout.spans[-1].end
    last = next(place for place, span in enumerate(layout.spans) if span.end + closing > num_tokens)
    span, length = layout.spans[last], len(documents[last].text)
    while length > 0:
        share = (num_tokens - closing - span.start) / (span.end - span.start)
        length = min(int(length * max(share, 0)), length - 1)
        text = documents[last].text[:length].rstrip()
        kept = [*documents[:last], *([_with_text(documents[last], text)] if text else [])]
        layout = _laid_out(model, kept) if kept else layout
        if kept and len(layout.token_ids) <= num_tokens:
            behind = [documents[last].text[len(text) :], *(document.text for document in documents[last + 1 :])]
            return CutCorpus(tuple(kept), layout, _following(model, behind, num_tokens))
        if text:
            span = layout.spans[last]
    raise UsageError(f"--tokens {num_tokens} leaves no room for a document.")


def _laid_out(model: LanguageModel, documents: Sequence[Document]) -> PrefixLayout:
    return lay_out(model.tokenizer, model.template, documents)


def _with_text(document: Document, text: str) -> Document:
    return replace(document, text=text, sha256=text_sha256(text))


def _following(model: LanguageModel, texts: Sequence[str], num_tokens: int) -> Branch | None:
    """At most `FOLLOWING_TOKENS` tokens that fit the window, each with the next one as its target."""
    wanted = min(FOLLOWING_TOKENS, model.window_tokens - num_tokens)
    joined = "\n\n".join(texts)[: _CHARACTERS_PER_TOKEN * (wanted + 1)]
    ids = encode(model.tokenizer, joined, special=False)[: wanted + 1]
    return Branch("continuation", tuple(ids[:-1]), tuple(ids[1:])) if len(ids) > _LEAST_FOLLOWING else None
