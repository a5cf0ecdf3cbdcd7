"""A peer of the tests: speaks the protocol without a model. Its argument says how it fails, if it does."""

import json
import sys
import time
from pathlib import Path

MODE = sys.argv[1] if len(sys.argv) > 1 else "well"
FIRST_S, NEXT_S = 0.5, 0.25
cached_tokens = 100


def prepare(request):
    global cached_tokens
    cached_tokens = len(request["prefix_ids"])
    path = request.get("state_path")
    if path is not None:
        Path(path).write_bytes(b"state" * len(request["prefix_ids"]))
    given = {name: request[name] for name in ("num_threads", "max_tokens", "num_sessions")}
    return {"versions": {"fake": "1"}, "settings": given, "read_s": 1.5, "state_path": path}


def ask(request):
    if MODE == "dies":
        print("out of luck", file=sys.stderr)
        sys.exit(7)
    if MODE == "hangs":
        time.sleep(60)
    count = request["num_tokens"] - (MODE == "short")
    load_s = 0.125 if request["source"] == "disk" else 0.0
    return {
        "load_s": float("nan") if MODE == "nan" else load_s,
        "ttft_s": FIRST_S + load_s,
        "tpot_s": NEXT_S,
        "token_ids": request["question_ids"][:1] * count,
        "cached_tokens": -1 if MODE == "negative" else 0 if MODE == "forgets" else cached_tokens,
    }


def sessions(request):
    answers = [ids[:1] * request["num_tokens"] for ids in request["questions"]]
    return {"total_s": 2.0, "token_ids": answers[: -1 if MODE == "forgets" else None]}


for line in sys.stdin:
    if MODE == "babbles":
        print("loading ...", flush=True)
        continue
    if MODE == "list":
        print("[]", flush=True)
        continue
    asked = json.loads(line)
    if MODE == "refuses":
        print(json.dumps({"error": "MemoryError: no room"}), flush=True)
        continue
    print(json.dumps({"prepare": prepare, "ask": ask, "sessions": sessions}[asked["do"]](asked)), flush=True)
