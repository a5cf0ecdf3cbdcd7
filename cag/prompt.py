"""The prompt: one chat-template rendering, split once at the question.

Everything before the question is the prefix (system text, each document behind a marker with its number and title, the
closing instruction), everything after it the suffix (question, generation prompt). Pieces are tokenized apart, so no
boundary can move, and the text of documents and questions is never parsed for special tokens. Knows a tokenizer and
documents; knows no model and no store.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from cag.errors import CacheMismatch, CorpusTooLarge, UnsupportedModel, UsageError

SYSTEM_TEXT = (
    "You answer questions about the documents below, and about nothing else. "
    "Give the answer in as few words as possible, copied from the documents: a name, a number with its unit, a short "
    "phrase. If the documents do not contain the answer, say: The documents do not say."
)
# Whitespace and rules of signs give tokens of many characters; a cut makes a few tokens more than the whole has there.
_FEW_CHARACTERS_PER_TOKEN, _CUT_TOKENS = 16, 64
CLOSING_TEXT = "These were all documents. Answer the question from them, in as few words as possible."

# transformers keeps `split_special_tokens` inside the tokenizer: two threads that encode at once would mix it up.
_tokenizer_lock = threading.Lock()
_template_ids: WeakKeyDictionary[Any, dict[str, list[int]]] = WeakKeyDictionary()  # of a tokenizer, by piece

THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),  # gpt-oss
    ("<|channel>thought\n", "<channel|>"),  # Gemma 4
    ("<|think|>", "<|end|><|begin|>assistant<|content|>"),  # Solar Open
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),  # Apriel
)
"""What reasoning models put around what they think before they answer."""

_SYSTEM, _QUESTION, _ANSWER, _NEXT = "\x02sys\x03", "\x02que\x03", "\x02ans\x03", "\x02nxt\x03"


class TextDocument(Protocol):
    """What the prompt needs of a document or passage."""

    @property
    def doc_id(self) -> str:
        """Identity in the corpus."""

    @property
    def title(self) -> str:
        """Shown in the marker."""

    @property
    def text(self) -> str:
        """The words."""


@dataclass(frozen=True)
class PromptTemplate:
    """A model's chat template, cut at system text, question and answer.

    A prompt reads `before` system-part `middle` question `after` answer `between` question `after` answer ...
    `stop_strings` end an answer where the model has no end-of-turn token (models without a chat template).
    """

    before: str
    middle: str
    after: str
    between: str
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class TemplateCut:
    """What a chat template makes of one conversation, cut at system text, questions and answer.

    It reads `before` system-part `middle` question, then `asked` where an answer is asked for, `given` where one was
    given; `between` answer and next question.
    """

    before: str
    middle: str
    asked: str
    given: str
    between: str


PLAIN_TEMPLATE = PromptTemplate("", "\n\nQuestion: ", "\nAnswer:", "\n\nQuestion: ", ("\n\nQuestion:", "\nQuestion:"))


@dataclass(frozen=True)
class DocumentSpan:
    """Tokens `[start, end)` of the prefix that hold one document, its marker included."""

    doc_id: str
    start: int
    end: int


@dataclass(frozen=True)
class PrefixLayout:
    """A tokenized prefix and what is needed to put questions behind it."""

    template: PromptTemplate
    system_text: str
    closing_text: str
    token_ids: np.ndarray[Any, np.dtype[np.int64]]
    spans: tuple[DocumentSpan, ...]

    def to_json(self) -> dict[str, Any]:
        """What the manifest keeps: everything but tokens and spans, which it stores elsewhere."""
        return {
            "template": asdict(self.template),
            "system_text": self.system_text,
            "closing_text": self.closing_text,
            "marker": document_marker(0, "{title}"),
        }


def template_from_json(layout: Mapping[str, Any]) -> PromptTemplate:
    """The template of a stored layout, all of which is looked at. Raises: CacheMismatch: none that this program
    writes."""
    stored = layout.get("template")
    stored = dict(stored) if isinstance(stored, Mapping) else {}
    stops = stored.pop("stop_strings", None)
    texts = [*stored.values(), layout.get("system_text"), layout.get("closing_text")]
    whole = isinstance(stops, list | tuple) and stored.keys() == {"before", "middle", "after", "between"}
    if not whole or not all(isinstance(text, str) for text in [*texts, *(stops or ())]):
        raise CacheMismatch(
            "the cache has no prompt layout that this version knows.",
            hint="Build it again.",
            part="prompt layout",
            expected="template, system text and closing text",
            found=dict(layout),
        )
    return PromptTemplate(**stored, stop_strings=tuple(stops or ()))


def document_marker(number: int, title: str) -> str:
    """The line above document `number` (counted from 1)."""
    return f"\n\n### Document {number}: {title}\n\n"


def read_template(tokenizer: Any) -> PromptTemplate:
    """Cut the tokenizer's chat template; a template without a system role gets the system part before the question.

    Raises:
        UnsupportedModel: a template that changes or repeats what it is given, so that no prefix is stable.
    """
    if not getattr(tokenizer, "chat_template", None):
        return replace(PLAIN_TEMPLATE, before=_text_start(tokenizer))
    cut = cut_template(tokenizer, enable_thinking=False)
    if cut is None:
        raise UnsupportedModel(
            "the chat template changes, repeats or drops what it is given, so no prefix of it is stable.",
            hint="Use a model with an ordinary chat template.",
        )
    return PromptTemplate(cut.before, cut.middle, _answer_opening(cut.asked, cut.given), cut.between)


def cut_template(tokenizer: Any, **choices: Any) -> TemplateCut | None:
    """Cut the tokenizer's chat template; `choices` are what it may look at besides messages. None: it changes, repeats
    or drops what it is given."""
    system_turn = {"role": "system", "content": _SYSTEM}
    question = {"role": "user", "content": _QUESTION}
    for in_parts in (False, True):  # as templates want content that may hold images besides
        for opening in ([system_turn, question], [{"role": "user", "content": f"{_SYSTEM}\n\n{_QUESTION}"}]):
            cut = _cut(tokenizer, opening, choices | {"in_parts": in_parts})
            if cut is not None:
                return cut
    return None


def _text_start(tokenizer: Any) -> str:
    """The token that a tokenizer puts before any text, which models expect there; empty if it has none."""
    first = tokenizer("")["input_ids"][:1]
    return str(tokenizer.bos_token) if tokenizer.bos_token and first == [tokenizer.bos_token_id] else ""


def guarded_template(tokenizer: Any) -> PromptTemplate:
    """`read_template`; from now on the words that mark its turns are special tokens of `tokenizer`, so that `encode`
    takes them in the template's own text only. Some models have them as tokens that any text is parsed for."""
    template = read_template(tokenizer)
    if tokenizer.is_fast:
        pieces = template.before, template.middle, template.after, template.between
        backend = tokenizer.backend_tokenizer
        words = [word for word in backend.get_added_tokens_decoder().values() if word.content.strip()]
        backend.add_special_tokens([word for word in words if any(word.content in piece for piece in pieces)])
    return template


def _cut(tokenizer: Any, opening: list[dict[str, str]], choices: dict[str, Any]) -> TemplateCut | None:
    first = _split(_render(tokenizer, opening, **choices), _SYSTEM, _QUESTION)
    if first is None:
        return None
    before, middle, asked = first
    # some templates move the system text to the last question, so that of later ones is looked for without any
    for beginning in (opening, [{"role": "user", "content": _QUESTION}]):
        turns = [{"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
        later = _split(_render(tokenizer, beginning + turns, **choices), _QUESTION, _ANSWER, _NEXT)
        if later is not None and _SYSTEM not in later[1] + later[2]:
            return TemplateCut(before, middle, asked, later[1], later[2])
    return None


def _split(text: str | None, *marks: str) -> list[str] | None:
    """The text between marks that each stand in it once, in this order, and around them."""
    pieces, rest = [], text or ""
    for mark in marks:
        if rest.count(mark) != 1:
            return None
        piece, rest = rest.split(mark)
        pieces.append(piece)
    return [*pieces, rest]


def _answer_opening(asked: str, given: str) -> str:
    """What stands before an answer: `asked` is what the template ends with when it asks for one, `given` what it has
    before one that was given.

    Where more stands before given ones (gpt-oss: the channel of answers; others: empty thoughts) it is put there, so
    that an answer begins at once. Thoughts that the template opens are closed, for the same reason.
    Source: thoughts that are closed before they begin, arXiv:2504.09858.
    """
    opening = given if given.startswith(asked) and given[len(asked) :].strip() else asked
    end = opened_thoughts(opening)
    return f"{opening.rstrip()}\n\n{end}\n\n" if end else opening


def opened_thoughts(text: str) -> str:
    """The mark that ends the thoughts that `text` has opened; empty if it has opened none."""
    return next((end for begin, end in THOUGHTS if text.rfind(begin) > text.rfind(end)), "")


def _render(tokenizer: Any, messages: list[dict[str, str]], *, in_parts: bool, **choices: Any) -> str | None:
    given: list[Any] = list(messages)
    if in_parts:
        given = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
    try:
        text = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True, **choices)
    except Exception:  # templates raise whatever they like, jinja2's TemplateError for an unknown role
        return None
    return str(text)


def encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids of one piece. With `special` the piece is the template's own and its special tokens are parsed; there
    are few of those, and every question has them.

    Safe to call from several threads with one tokenizer.
    Raises: UsageError: text with a lone half of a surrogate pair, as bytes that are not UTF-8 become in arguments.
    """
    if not text:
        return []
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!r} at character {error.start}"
        raise UsageError(f"text that is not valid Unicode: {found}.", hint="Give it in UTF-8.") from error
    with _tokenizer_lock:
        known = _template_ids.setdefault(tokenizer, {}) if special else {}
        if text not in known:
            encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=not special, verbose=False)
            known[text] = list(encoded["input_ids"])
        return list(known[text])


def lay_out(
    tokenizer: Any,
    template: PromptTemplate,
    documents: Sequence[TextDocument],
    *,
    system_text: str = SYSTEM_TEXT,
    closing_text: str = CLOSING_TEXT,
    max_tokens: int | None = None,
) -> PrefixLayout:
    """Tokenize the prefix over `documents`, in their order. An appended document leaves all earlier tokens alone.

    Raises: CorpusTooLarge: more than `max_tokens` tokens, found without tokenizing much more than these.
    """
    ids = encode(tokenizer, template.before, special=True) + encode(tokenizer, system_text, special=False)
    spans = []
    for number, document in enumerate(documents, start=1):
        start, text = len(ids), document_marker(number, document.title) + document.text
        if max_tokens is not None:
            _check_room(tokenizer, text, max_tokens - start, max_tokens)
        ids += encode(tokenizer, text, special=False)
        spans.append(DocumentSpan(document.doc_id, start, len(ids)))
    ids += encode(tokenizer, f"\n\n{closing_text}", special=False)
    ids += encode(tokenizer, template.middle, special=True)
    return PrefixLayout(template, system_text, closing_text, np.asarray(ids, dtype=np.int64), tuple(spans))


def _check_room(tokenizer: Any, text: str, room: int, max_tokens: int) -> None:
    """Refuse a text that has more tokens than `room`. Raises: CorpusTooLarge."""
    if room < 0 or begins_beyond(tokenizer, text, room):
        raise CorpusTooLarge(f"the corpus has more than {max_tokens} tokens.", num_tokens=max_tokens)


def begins_beyond(tokenizer: Any, text: str, room: int) -> bool:
    """Whether the beginning of a long text has more tokens than `room` already; False where it has few tokens."""
    beginning = text[: _FEW_CHARACTERS_PER_TOKEN * max(room, 0)]
    return len(text) > len(beginning) and len(encode(tokenizer, beginning, special=False)) > room + _CUT_TOKENS


def question_ids(tokenizer: Any, template: PromptTemplate, question: str) -> list[int]:
    """The suffix of a first question: question and generation prompt."""
    return encode(tokenizer, question.strip(), special=False) + encode(tokenizer, template.after, special=True)


def next_question_ids(tokenizer: Any, template: PromptTemplate, question: str) -> list[int]:
    """The suffix of a later question, right behind the answer before it."""
    return encode(tokenizer, template.between, special=True) + question_ids(tokenizer, template, question)


def given_answer_ids(tokenizer: Any, given: str, answer: str) -> list[int]:
    """An answer of an earlier turn with what the template has before it (`given`), right behind its question. A blank
    at the end of that begins the answer, whose first word has it in its token."""
    before = given.rstrip(" ")
    answer = given[len(before) :] + answer.strip()
    return encode(tokenizer, before, special=True) + encode(tokenizer, answer, special=False)


def conversation_ids(
    tokenizer: Any,
    template: PromptTemplate,
    turns: Sequence[tuple[str, str]],
    question: str,
    *,
    given: str | None = None,
) -> list[int]:
    """The suffix of a question behind earlier (question, answer) `turns` of which no token has been read yet. `given`:
    what the template has before answers that were given, if not what it asks for one with."""
    ids: list[int] = []
    given, turn = template.after if given is None else given, replace(template, after="")
    for asked, answer in turns:
        ask = next_question_ids if ids else question_ids
        ids += ask(tokenizer, turn, asked) + given_answer_ids(tokenizer, given, answer)
    ask = next_question_ids if ids else question_ids
    return ids + ask(tokenizer, template, question)
