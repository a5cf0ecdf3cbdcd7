"""Answering without a cache: the whole prompt is computed for each question. The yardstick, and the ground of RAG.

Same template, same generation loop, same stop rules as behind a cache; only what stands in the document place differs.
"""

from __future__ import annotations

import time
from dataclasses import replace

from cag.generation.answer import Answer, CacheOrigin, Usage
from cag.generation.generate import Generation, SamplingOptions
from cag.model import LanguageModel
from cag.prefill import PROMPT_BLOCK_TOKENS
from cag.prompt import SYSTEM_TEXT, PrefixLayout, lay_out, question_ids
from cag.retrieval import Retriever
from cag.short_model import for_length


def ask_fresh(
    model: LanguageModel,
    layout: PrefixLayout,
    question: str,
    options: SamplingOptions | None = None,
    *,
    started_at: float | None = None,
) -> Answer:
    """Compute the prefix of `layout` and the question, then answer. Nothing is cached: `cached_tokens` is 0."""
    begin = time.perf_counter() if started_at is None else started_at
    options = options or SamplingOptions()
    form = model.thinking.form(layout.template, think=options.think)
    prompt = layout.token_ids.tolist() + question_ids(model.tokenizer, form.template, question)
    model = for_length(model, len(prompt) + options.max_tokens)
    state = model.new_state(capacity=len(prompt))
    generation = Generation(
        model, state, prompt, options, started_at=begin, block_tokens=PROMPT_BLOCK_TOKENS, form=form
    ).run()
    return Answer(
        text=generation.text.strip(),
        citations=(),
        usage=Usage(
            len(prompt), 0, len(prompt), len(generation.token_ids), reasoning_tokens=generation.reasoning_tokens
        ),
        timings=generation.timings(),
        cache=CacheOrigin("", "", "none"),
        model=model.model_id,
        finish_reason=generation.finish_reason,
        token_ids=tuple(generation.token_ids),
        reasoning=generation.reasoning.strip(),
    )


class RagPipeline:
    """Retrieve `k` passages, put them where the documents stand, answer. Retrieval is inside the clock."""

    def __init__(self, model: LanguageModel, retriever: Retriever, k: int, *, system_text: str = SYSTEM_TEXT) -> None:
        self.model = model
        self.retriever = retriever
        self.k = k
        self.system_text = system_text

    def ask(self, question: str, options: SamplingOptions | None = None) -> Answer:
        """Answer from the best passages; `timings.retrieve_s` and `ttft_s` include the query's embedding."""
        begin = time.perf_counter()
        passages = [found.passage for found in self.retriever.retrieve(question, self.k)]
        retrieve_s = time.perf_counter() - begin
        layout = lay_out(self.model.tokenizer, self.model.template, passages, system_text=self.system_text)
        answer = ask_fresh(self.model, layout, question, options, started_at=begin)
        return replace(answer, timings=replace(answer.timings, retrieve_s=retrieve_s))
