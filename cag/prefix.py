"""An opened cache: what users ask. Joins the resident keys and values with documents, template and origin."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray
from torch import Tensor

from cag.errors import UsageError
from cag.generation.answer import Answer, Citation
from cag.generation.citations import CitationIndex
from cag.generation.generate import SamplingOptions
from cag.generation.scheduler import Scheduler
from cag.generation.session import AnswerStream, Session
from cag.identity import check_weights
from cag.model import LanguageModel
from cag.prompt import template_from_json
from cag.residency.resident import ResidentPrefix

if TYPE_CHECKING:
    from cag.corpus import Document
    from cag_store import Manifest


class Prefix:
    """A resident, immutable prefix that any number of sessions share. A context manager: closing gives it back.

    Attributes:
        name, digest: the cache's name when it was opened, and the digest of its manifest.
        manifest: what the store says of it.
        resident: keys and values on the device.
    """

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        resident: ResidentPrefix,
        model: LanguageModel,
        *,
        load_documents: Callable[[], list[Document]],
        on_close: Callable[[], None],
    ) -> None:
        self.name = name
        self.digest = manifest.digest
        self.manifest = manifest
        self.resident = resident
        self.model = model
        self.template = template_from_json(manifest.layout)
        self._load_documents = load_documents
        self._on_close = on_close
        self._citations: CitationIndex | None = None
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Prefix:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the prefix back. Asking afterwards is an error; closing twice is not."""
        if not self._closed:
            self._closed = True
            self._on_close()

    def check_open(self) -> None:
        """Raises: UsageError: the prefix was closed."""
        if self._closed:
            raise UsageError(f"cache {self.name!r} was closed.", hint="Open it again.")

    @property
    def token_ids(self) -> NDArray[Any]:
        """The prefix, one id a token, `[num_tokens]` int64, not to be written to."""
        token_ids = self.resident.token_ids.view()
        token_ids.flags.writeable = False
        return token_ids

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Decoded keys (after RoPE) and values of a layer, `[num_kv_heads, num_tokens, head_dim]`, for inspection.

        The tensors may be the resident ones: do not change them. Of a layer with a window only the end is resident;
        then the whole layer is read from the store, each time. Where latents are what is stored (`kv_shapes` have one
        side), keys and values are made of them here, as the network would make them, values perhaps of another size
        than keys.

        Raises: StoreError: the cache is damaged; UsageError: no such layer.
        """
        self.check_open()
        num_layers = len(self.model.kv_shapes)
        if not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise UsageError(f"layer is {layer!r}; {self.model.model_id} has the layers 0 to {num_layers - 1}.")
        keys, values = self.resident.layer(layer)
        if self.model.kv_shapes[layer].sides == 2:
            return keys, values
        from cag.forward.latent import latent_layers  # which needs transformers

        return latent_layers(self.model.network)[layer].expanded(keys)

    def session(self) -> Session:
        """A session with turns of its own. Raises: ModelError: the weights were written over since they were loaded."""
        self.check_open()
        check_weights(self.model)
        return Session(self)

    def ask(
        self, question: str, options: SamplingOptions | None = None, *, started_at: float | None = None, **sampling: Any
    ) -> Answer:
        """Answer one question in a session of its own.

        Args:
            question: the user's words.
            options: sampling and stop rules; or give its fields as keywords (`max_tokens=64`).
            started_at: as in `Session.stream`.
            **sampling: fields of `SamplingOptions`, in place of `options`.
        """
        return self.session().ask(question, options, started_at=started_at, **sampling)

    def stream(self, question: str, options: SamplingOptions | None = None, **sampling: Any) -> AnswerStream:
        """As `ask`, piece by piece."""
        return self.session().stream(question, options, **sampling)

    def ask_all(
        self, questions: Sequence[str], options: SamplingOptions | None = None, **sampling: Any
    ) -> list[Answer]:
        """Answer questions at the same time, each in a session of its own; the same answers as one by one, sooner.

        Raises: UsageError: one text in place of several; as `ask`, for the first question that fails: the others are
            answered first.
        """
        if isinstance(questions, str) or not isinstance(questions, Iterable):
            raise UsageError(f"the questions are {questions!r}; give a list of texts.")
        scheduler = Scheduler(self.model)
        streams = [self.stream(question, options, **sampling) for question in questions]
        requests = [stream.submit(scheduler, lambda _piece: None) for stream in streams]
        scheduler.run()
        answers = [stream.finish(request) for stream, request in zip(streams, requests, strict=True)]
        return [answer for answer in answers if answer is not None]

    def cite(self, question: str, answer: str) -> tuple[Citation, ...]:
        """Documents and quotes that an answer rests on; see `cag.generation.citations`.

        Raises: StoreError: the texts of the documents are damaged or gone; UsageError: no texts.
        """
        if not isinstance(question, str) or not isinstance(answer, str):
            raise UsageError(f"the question is {question!r} and the answer {answer!r}; they must be texts.")
        with self._lock:
            if self._citations is None:
                documents = self._load_documents()
                self._citations = CitationIndex(documents, [document.path for document in documents])
        return self._citations.cite(question, answer)
