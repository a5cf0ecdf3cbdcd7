"""llama.cpp as a peer, through the low-level calls of llama-cpp-python: a prefix in memory, or its state from a file.

`prepare` takes `gguf`, `state_path`, `num_threads`, `max_tokens` (of one sequence), `num_sessions` and
`flash_attention`. Keys and values are f16. `sessions` gives every sequence a copy of the prefix of its own, made before
the clock starts, and attends to it alone (`kv_unified` off).
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
from peer_loop import serve

BLOCK_TOKENS, STEP_TOKENS = 2048, 512


class Context:
    """A llama.cpp context with `num_sequences` sequences of at most `max_tokens` tokens."""

    def __init__(
        self, model: Any, num_sequences: int, max_tokens: int, num_threads: int, flash_attention: bool
    ) -> None:
        params = lib.llama_context_default_params()
        params.n_ctx = num_sequences * max_tokens
        params.n_seq_max = num_sequences
        params.kv_unified = False
        params.n_batch, params.n_ubatch = BLOCK_TOKENS, STEP_TOKENS
        params.n_threads = params.n_threads_batch = num_threads
        params.type_k = params.type_v = lib.GGML_TYPE_F16
        params.flash_attn_type = int(flash_attention)
        self.handle = lib.llama_init_from_model(model, params)
        if not self.handle:
            raise RuntimeError("llama.cpp made no context")
        self.memory = lib.llama_get_memory(self.handle)
        self.num_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.batch = lib.llama_batch_init(BLOCK_TOKENS, 0, 1)

    def run(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decode (token, position, sequence, wants a logit) rows; the greedy choice of each row that wants one."""
        starts = range(0, len(rows), BLOCK_TOKENS)
        return [token for start in starts for token in self._run_block(rows[start : start + BLOCK_TOKENS])]

    def _run_block(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """As many rows as a batch has room for."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for place, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = wanted
        code = lib.llama_decode(self.handle, batch)
        if code:
            raise RuntimeError(f"llama_decode answered {code}")
        return [self._choice(place) for place, row in enumerate(rows) if row[3]]

    def _choice(self, place: int) -> int:
        logits = lib.llama_get_logits_ith(self.handle, place)
        return int(np.ctypeslib.as_array(logits, (self.num_vocab,)).argmax())

    def read(self, token_ids: list[int]) -> None:
        """Read a prefix into sequence 0."""
        self.run([(token, place, 0, False) for place, token in enumerate(token_ids)])

    def cut(self, sequence: int, num_tokens: int) -> None:
        """Forget what stands behind the first `num_tokens` of a sequence."""
        lib.llama_memory_seq_rm(self.memory, sequence, num_tokens, -1)

    def save(self, path: str, token_ids: list[int]) -> None:
        """Write the state of sequence 0, to the device."""
        array = (lib.llama_token * len(token_ids))(*token_ids)
        if not lib.llama_state_seq_save_file(self.handle, path.encode(), 0, array, len(token_ids)):
            raise RuntimeError(f"the state was not written to {path}")
        with Path(path).open("rb") as file:
            os.fsync(file.fileno())

    def load(self, path: str, sequence: int, num_tokens: int) -> None:
        """Read a state of `num_tokens` tokens into a sequence."""
        array, count = (lib.llama_token * num_tokens)(), ctypes.c_size_t()
        read = lib.llama_state_seq_load_file(
            self.handle, path.encode(), sequence, array, num_tokens, ctypes.byref(count)
        )
        if not read or count.value != num_tokens:
            raise RuntimeError(f"the state of {num_tokens} tokens was not read from {path}")


class LlamaCppPeer:
    """One model, a context for single questions, and one for many sessions when they are first asked for."""

    def __init__(self) -> None:
        self.model: Any = None
        self.single: Any = None
        self.many: Any = None
        self.options: dict[str, Any] = {}
        self.num_sessions = 0
        self.prefix_ids: list[int] = []
        self.state_path = ""

    def prepare(
        self,
        prefix_ids: list[int],
        gguf: str,
        state_path: str,
        num_threads: int,
        max_tokens: int,
        num_sessions: int,
        flash_attention: bool,
    ) -> dict[str, Any]:
        """Load the model, read the prefix and write its state."""
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(gguf.encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"{gguf} is no model that llama.cpp loads")
        self.options = {"max_tokens": max_tokens, "num_threads": num_threads, "flash_attention": flash_attention}
        self.prefix_ids, self.state_path, self.num_sessions = prefix_ids, state_path, num_sessions
        self.single = Context(self.model, 1, **self.options)
        begin = time.perf_counter()
        self.single.read(prefix_ids)
        read_s = time.perf_counter() - begin
        self.single.save(state_path, prefix_ids)
        return {
            "versions": {"llama-cpp-python": lib.__version__},
            "settings": {
                "weights": _description(self.model),
                "kv": "f16",
                "flash_attention": flash_attention,
                "num_threads": num_threads,
                "system": lib.llama_print_system_info().decode(),
            },
            "read_s": read_s,
            "state_path": state_path,
        }

    def ask(self, source: str, question_ids: list[int], num_tokens: int) -> dict[str, Any]:
        """One question behind the prefix, from memory, or from an empty context and the state's file."""
        num_prefix = len(self.prefix_ids)
        if source == "disk":
            lib.llama_memory_clear(self.single.memory, True)
        else:
            self.single.cut(0, num_prefix)
        begin = time.perf_counter()
        if source == "disk":
            self.single.load(self.state_path, 0, num_prefix)
        loaded = time.perf_counter()
        token_ids = self.single.run(_question_rows(question_ids, num_prefix, 0))
        first = time.perf_counter()
        for place in range(num_tokens - 1):
            token_ids += self.single.run([(token_ids[-1], num_prefix + len(question_ids) + place, 0, True)])
        end = time.perf_counter()
        return {
            "load_s": loaded - begin,
            "ttft_s": first - begin,
            "tpot_s": (end - first) / (num_tokens - 1) if num_tokens > 1 else None,
            "token_ids": token_ids,
            "cached_tokens": num_prefix,
        }

    def sessions(self, questions: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """All questions at once, each behind its own copy of the prefix."""
        self._make_room()
        begin = time.perf_counter()
        num_prefix = len(self.prefix_ids)
        rows = [row for number, ids in enumerate(questions) for row in _question_rows(ids, num_prefix, number)]
        answers = [[token] for token in self.many.run(rows)]
        for place in range(num_tokens - 1):
            rows = [
                (answer[-1], num_prefix + len(ids) + place, number, True)
                for number, (answer, ids) in enumerate(zip(answers, questions, strict=True))
            ]
            for answer, token in zip(answers, self.many.run(rows), strict=True):
                answer.append(token)
        return {"total_s": time.perf_counter() - begin, "token_ids": answers}

    def _make_room(self) -> None:
        """Every sequence stands behind the prefix, and nothing behind it. Copies between streams are real ones."""
        num_prefix = len(self.prefix_ids)
        if self.many is None:
            many = Context(self.model, self.num_sessions, **self.options)
            many.read(self.prefix_ids)
            for sequence in range(1, self.num_sessions):
                lib.llama_memory_seq_cp(many.memory, 0, sequence, -1, -1)
            self.many = many
        for sequence in range(self.num_sessions):
            self.many.cut(sequence, num_prefix)


def _question_rows(question_ids: list[int], num_prefix: int, sequence: int) -> list[tuple[int, int, int, bool]]:
    last = len(question_ids) - 1
    return [(token, num_prefix + place, sequence, place == last) for place, token in enumerate(question_ids)]


def _description(model: Any) -> str:
    buffer = ctypes.create_string_buffer(128)
    lib.llama_model_desc(model, buffer, len(buffer))
    return buffer.value.decode()


if __name__ == "__main__":
    peer = LlamaCppPeer()
    serve({"prepare": peer.prepare, "ask": peer.ask, "sessions": peer.sessions})
