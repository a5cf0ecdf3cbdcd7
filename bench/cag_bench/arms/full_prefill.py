"""The arm without a cache: the whole corpus is read again for each question."""

from __future__ import annotations

from cag.fresh import ask_fresh
from cag.generation.generate import SamplingOptions
from cag.model import LanguageModel
from cag.prompt import PrefixLayout
from cag_bench.arms.base import ArmAnswer, BenchArm


class FullPrefillArm(BenchArm):
    """Prefix and question are computed. Tokenizing the corpus is left out of the clock, in favour of this arm."""

    def __init__(self, name: str, model: LanguageModel, layout: PrefixLayout) -> None:
        super().__init__(name)
        self._model = model
        self._layout = layout

    def ask(self, question: str, options: SamplingOptions) -> ArmAnswer:
        """See `BenchArm`. Raises: `RequestTooLong` when the corpus exceeds the model's window."""
        return ArmAnswer(ask_fresh(self._model, self._layout, question, options))
