"""Every kernel compiles to a GPU's machine code as the product launches it; most of them spill no register.

The interpreter proves what the kernels compute; this, that a compiler takes them. No GPU is needed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {90: 227 << 10, 80: 163 << 10}  # of a program, by compute capability
BESIDE_SEGMENTS = ("invert_tile", "split_codes_tile", "split_rows_tile")
WIDE_ACCESSES = ("invert_tile", "turn", "gate_rows")
# Of a thread at most, by capability, kernel and rows of a block, where it is not 0. Blocks of 64 rows are held down to
# 168 registers so that three programs fit a processor, which was faster on an H100 than two that spill nothing; a
# thread of a block of 256 has 128 sums and 64 scores. On sm_80 products take their operands through registers too.
# Few rows that join, or wait for the launch before them, spill outside of the loop over tiles.
SPILLED_BYTES = {
    (90, "attend_few", 8): 16,
    (90, "attend_few", 16): 32,
    (90, "attend_many", 64): 192,
    (90, "attend_many", 256): 320,
    (80, "invert_tile", None): 160,
    (80, "attend_few", 8): 64,
    (80, "attend_few", 16): 64,
    (80, "attend_many", 64): 640,
    (80, "attend_many", 256): 1088,
}
JOINED_SPILLED_BYTES = {90: 64, 80: 128}
OVERLAPPING = {
    "attend_few", "attend_many", "attend_prefix", "attend_tails", "merge", "add_norm", "rotate_store", "gate_rows",
}  # fmt: skip


def check_order(row):
    """Arrivals are counted between two barriers, behind the stores, and parts are read past the first-level cache."""
    order = row["arrivals"]
    assert order.startswith("BABS"), row  # the store is that of the count, back to 0
    assert order.count("l") == (1 if row["page_tokens"] else 0), row  # how many queries have tails: no part
    assert order.count("L") > 0, row
    assert "n" not in order, row
    assert order.count("A") == 1, row


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_every_launch_compiles(capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), str(capability)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    kernels = {row["kernel"] for row in found}
    assert {
        "attend_few",
        "attend_many",
        "attend_prefix",
        "attend_tails",
        "merge",
        "decode",
        "turn",
        "invert_tile",
        "split_codes_tile",
        "split_rows_tile",
        "decode_segment",
        "code_token_groups",
        "add_norm",
        "rotate_store",
        "gate_rows",
    } <= kernels
    launches = {(row["kernel"], row["block_rows"], row["key_bits"]) for row in found if "key_bits" in row}
    assert {("attend_prefix", rows, 16) for rows in (16, 128)} <= launches
    blocks = [("attend_few", 8), ("attend_few", 16), ("attend_many", 64), ("attend_many", 256)]
    assert {(*block, bits) for block in blocks for bits in (8, 4)} <= launches
    joined = [row for row in found if row.get("joined_rows")]
    assert len({(row["key_bits"], row["page_tokens"] > 0) for row in joined}) == len(joined) == 4
    for row in joined:
        check_order(row)
    ahead = {row["kernel"] for row in found if row.get("has_ahead")}
    assert ahead == ({"add_norm", "gate_rows"} if capability >= 90 else set())
    for row in found:
        assert row["waits"] == row.get("overlaps", False) == (capability >= 90 and row["kernel"] in OVERLAPPING), row
        allowed = SPILLED_BYTES.get((capability, row["kernel"], row.get("block_rows")), 0)
        allowed = JOINED_SPILLED_BYTES[capability] if row.get("joined_rows") else allowed
        assert row["spilled_bytes"] <= allowed, row
        assert row["kernel"] != "decode_segment" or row["registers"] <= 64, row
        assert row["shared_bytes"] <= SHARED_BYTES[capability], row
        if row["kernel"] in BESIDE_SEGMENTS:
            beside = 5 * 32 * 64  # registers of five segments of the entropy decoder
            assert row["registers"] * 32 * row["warps"] + beside <= 1 << 16, row
        if row["kernel"] in WIDE_ACCESSES:  # a mask that a compiler can't see through makes all of them narrow
            assert set(row["stored_bytes"]) == {16}, row
