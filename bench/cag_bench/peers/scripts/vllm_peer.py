"""vLLM as a peer: its own prefix cache, in one process, stepped directly so that nothing but the engine is timed.

`prepare` takes `model` (directory), `num_threads`, `max_tokens` (of one sequence), `num_sessions` and `eager` (no
compiled graph). vLLM keeps no prefix on disk by itself.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from peer_loop import serve

WARM_UP_TOKENS = 4
KV_CACHE_GIB = "3"


class VllmPeer:
    """One engine. Its clocks run from `add_request` to the step that returns the token."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.prefix_ids: list[int] = []
        self._num_requests = 0

    def prepare(
        self, prefix_ids: list[int], model: str, num_threads: int, max_tokens: int, num_sessions: int, eager: bool
    ) -> dict[str, Any]:
        """Load the model and read the prefix, so that it lies in the prefix cache."""
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_KVCACHE_SPACE=KV_CACHE_GIB,
            VLLM_CPU_OMP_THREADS_BIND=f"0-{num_threads - 1}",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
        )
        import torch
        import vllm
        from vllm import LLM

        self.engine = LLM(
            model,
            dtype="bfloat16",
            max_model_len=max_tokens,
            max_num_batched_tokens=max_tokens,
            max_num_seqs=num_sessions,
            enable_prefix_caching=True,
            enforce_eager=eager,
        ).llm_engine
        self.prefix_ids = prefix_ids
        begin = time.perf_counter()
        self._run([prefix_ids], WARM_UP_TOKENS)
        return {
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
            "settings": {
                "weights": "bfloat16",
                "kv": "bfloat16",
                "eager": eager,
                "num_threads": torch.get_num_threads(),
                "preloaded": [Path(path).name for path in os.environ.get("LD_PRELOAD", "").split(":") if path],
            },
            "read_s": time.perf_counter() - begin,
            "state_path": None,
        }

    def ask(self, source: str, question_ids: list[int], num_tokens: int) -> dict[str, Any]:
        """One question behind the prefix in the cache."""
        if source != "memory":
            raise ValueError(f"vLLM has no prefix on {source}")
        begin = time.perf_counter()
        (output,), (first_at,) = self._run([self.prefix_ids + question_ids], num_tokens)
        end = time.perf_counter()
        return {
            "load_s": 0.0,
            "ttft_s": first_at - begin,
            "tpot_s": (end - first_at) / (num_tokens - 1) if num_tokens > 1 else None,
            "token_ids": list(output.outputs[0].token_ids),
            "cached_tokens": output.num_cached_tokens,
        }

    def sessions(self, questions: list[list[int]], num_tokens: int) -> dict[str, Any]:
        """All questions at once."""
        begin = time.perf_counter()
        outputs, _ = self._run([self.prefix_ids + question for question in questions], num_tokens)
        total_s = time.perf_counter() - begin
        return {"total_s": total_s, "token_ids": [list(output.outputs[0].token_ids) for output in outputs]}

    def _run(self, prompts: list[list[int]], num_tokens: int) -> tuple[list[Any], list[float]]:
        """The last output of each prompt, and when its first token was there."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        names = [str(self._num_requests + place) for place in range(len(prompts))]
        self._num_requests += len(prompts)
        for name, prompt in zip(names, prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        last: dict[str, Any] = {}
        first_at: dict[str, float] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                first_at.setdefault(output.request_id, time.perf_counter())
                last[output.request_id] = output
        return list(last.values()), list(first_at.values())


def preload_openmp() -> None:
    """Start again with Intel's OpenMP in front, where the environment has it, as vLLM's manual advises for a CPU.

    Its threads, bound to cores, would share one otherwise; and they sleep when a millisecond has passed without work.
    """
    library, before = Path(sys.prefix, "lib", "libiomp5.so"), os.environ.get("LD_PRELOAD", "")
    if library.is_file() and "libiomp" not in before:
        os.environ["LD_PRELOAD"] = f"{library}:{before}".rstrip(":")
        os.environ["KMP_BLOCKTIME"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606


if __name__ == "__main__":
    preload_openmp()
    peer = VllmPeer()
    serve({"prepare": peer.prepare, "ask": peer.ask, "sessions": peer.sessions})
