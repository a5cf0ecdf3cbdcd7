"""The peer's side of the protocol: JSON lines on standard input, one answer a line on what was standard output.

    {"do": "prepare", "prefix_ids": [...], ...}              -> versions, settings, read_s, state_path (or null)
    {"do": "ask", "source": "memory" or "disk", "question_ids": [...], "num_tokens": n}
                                                             -> load_s, ttft_s, tpot_s, token_ids, cached_tokens
    {"do": "sessions", "questions": [[...], ...], "num_tokens": n}    -> total_s, token_ids (a list each)

An exception is answered as {"error": text}. The end of standard input ends the process. Runs under the peer's own
Python, so it imports nothing of ours; what libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def serve(operations: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer requests with the operation that they name, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(_answer(operations, json.loads(line))) + "\n")
        answers.flush()


def _answer(operations: dict[str, Callable[..., dict[str, Any]]], request: dict[str, Any]) -> dict[str, Any]:
    try:
        return operations[request.pop("do")](**request)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
