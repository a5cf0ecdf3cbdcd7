"""Chat templates of reasoning models in a few lines, and answers that a random network is made to give."""

from collections.abc import Iterator

from cag.generation.generate import Generation
from cag.prompt import encode

_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}"
_DROPS = "{% set c = m['content'].split('</think>')[-1].lstrip('\n') if m['role'] == 'assistant' else m['content'] %}"
_ALL = (
    "{%% for m in messages %%}%s{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\n' }}%s{%% endif %%}"
)

CHOOSES = _ALL % (
    _DROPS + _TURN,
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)
"""As Qwen 3: it thinks unless it is asked not to."""
OPENS = _ALL % (_DROPS + _TURN, "{{ '<think>\n' }}")
"""As DeepSeek R1: thoughts are opened for each answer."""
SAYS_BEFORE = _ALL % (
    "{% if loop.first %}{{ '/think ' if enable_thinking else '/no_think ' }}{% endif %}" + _DROPS + _TURN,
    "",
)
"""As SmolLM 3: what to do stands in the system text."""
CHANNELS = (
    "{% set effort = reasoning_effort if reasoning_effort is defined else 'medium' %}"
    "{{ '<|start|>system<|message|>Reasoning: ' + effort + '\n' }}"
    "{% for m in messages %}"
    "{% if loop.first %}{{ m['content'] + '<|end|>' }}{% elif m['role'] == 'user' %}"
    "{{ '<|start|>user<|message|>' + m['content'] + '<|end|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{# <|channel|>analysis<|message|> is never given #}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
"""As gpt-oss."""
CHANNEL_TOKENS = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>"]


class Forced:
    """Lets all generations say what was put here, in their order; a text is followed by a stop token."""

    def __init__(self, monkeypatch, model) -> None:
        self.model = model
        self._waiting: list[list[int]] = []
        self._of: dict[int, list[int]] = {}
        self._kept: list[Generation] = []  # so that no other one gets its id
        advance = Generation.advance

        def forced(generation, chosen):
            list(chosen)
            return advance(generation, self._next(generation))

        monkeypatch.setattr(Generation, "advance", forced)

    def say(self, *texts: str) -> None:
        """Marks in them are special tokens where the tokenizer has them."""
        for text in texts:
            self._waiting.append([*encode(self.model.tokenizer, text, special=True), min(self.model.stop_ids)])

    def _next(self, generation) -> Iterator[int]:
        if id(generation) not in self._of:
            self._of[id(generation)] = self._waiting.pop(0)
            self._kept.append(generation)
        script, at = self._of[id(generation)], len(generation.token_ids)
        return iter((script[at:] + [script[-1]] * generation.num_choices)[: generation.num_choices])
