"""The tokenizer of a start: its tables by themselves, and transformers' own around them where more is asked.

Does what prompts and answers need just as `PreTrainedTokenizerFast` does it. Knows tokenizers; transformers only when
something else is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer


def read_tables(tables: bytes) -> Tokenizer:
    """Tables as `Tokenizer.to_str` wrote them, without truncation and padding. Raises: ValueError."""
    try:
        found = Tokenizer.from_buffer(tables)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"no tokenizer: {error}") from error
    found.no_truncation()
    found.no_padding()
    return found


class KeptTokenizer:
    """Tokenizes pieces of prompts and detokenizes answers; everything else is asked of the `whole` tokenizer.

    Attributes:
        backend_tokenizer: the tables.
    """

    def __init__(self, tables: Tokenizer, load_whole: Callable[[], Any]) -> None:
        self.backend_tokenizer = tables
        self._load_whole = load_whole
        self._whole: Any = None

    def __call__(self, text: Any, **options: Any) -> Any:
        """Token ids of a text as `input_ids`; without special tokens around it they need no transformers."""
        wanted = options.keys() - {"verbose"}
        if not isinstance(text, str) or wanted != {"add_special_tokens", "split_special_tokens"}:
            return self.whole(text, **options)
        if options["add_special_tokens"]:
            return self.whole(text, **options)
        self.backend_tokenizer.encode_special_tokens = bool(options["split_special_tokens"])
        found = self.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)  # others run meanwhile
        return {"input_ids": found[0].ids}

    def decode(self, token_ids: Sequence[int], **options: Any) -> Any:
        """Text of token ids, as they are where `clean_up_tokenization_spaces` is False."""
        skips = options.get("skip_special_tokens", False)
        if options.keys() != {"skip_special_tokens", "clean_up_tokenization_spaces"}:
            return self.whole.decode(token_ids, **options)
        if options["clean_up_tokenization_spaces"] is not False:
            return self.whole.decode(token_ids, **options)
        return self.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skips)

    @property
    def whole(self) -> Any:
        """transformers' tokenizer, read when it is first needed."""
        if self._whole is None:
            self._whole = self._load_whole()
        return self._whole

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole, name)
