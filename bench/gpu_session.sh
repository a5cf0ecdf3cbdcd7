#!/usr/bin/env bash
# Correctness, then figures, on a machine with one CUDA device and little time. Everything stays below OUT.
#
#   bench/gpu_session.sh OUT [SECONDS_FOR_TESTS] [SECONDS_FOR_THE_BENCHMARK] [SECONDS_FOR_ALL]
#
# The benchmark has less where the imports and the tests leave less of all the time.
# Needs a Python with torch (a CUDA build), Triton, transformers, pytest, pytest-timeout and hypothesis, and of the
# project's own requirements zstandard, xxhash, platformdirs, filelock, typer (and what it imports), rich, psutil,
# obstore, bm25s and PyStemmer. Nothing is installed or fetched, the project runs from this checkout. With pytest-xdist,
# kernels compile side by side.
set -u -o pipefail
out=${1:?the folder for results}
test_seconds=${2:-240}
bench_seconds=${3:-300}
all_seconds=${4:-590}
spare=40  # the benchmark may end so much later than its budget
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$root" || exit 1
export PYTHONPATH="$root:$root/kernels:$root/store:$root/bench${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false CAG_HOME="${CAG_HOME:-$out/home}"

timeout --kill-after=10 60 "$python" - <<'CHECK' 2>&1 | tee "$out/machine.txt"
import importlib, torch, transformers, triton
print("torch", torch.__version__, "triton", triton.__version__, "transformers", transformers.__version__)
print("cuda", torch.cuda.is_available(), torch.cuda.get_device_name() if torch.cuda.is_available() else "")
for name in ("zstandard", "xxhash", "platformdirs", "filelock", "typer", "rich", "psutil", "obstore", "bm25s", "Stemmer",
             "pytest", "pytest_timeout", "hypothesis"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        print("missing:", name, error)
CHECK

workers=()
cores=$(nproc)
"$python" -c "import xdist" 2>/dev/null && workers=(-n "${WORKERS:-$((cores < 15 ? cores : 15))}")  # a context each
echo "== tests, ${test_seconds} s at most"
timeout --signal=INT --kill-after=10 "$test_seconds" "$python" -m pytest -m gpu -vv -W default -p no:cacheprovider -ra --timeout 120 \
    "${workers[@]}" tests/kernels $(grep -rl "mark\.gpu" tests/cag) 2>&1 | tee "$out/tests.log"
tests=$?

left=$((all_seconds - SECONDS - spare))
left=$((left < 1 ? 1 : left))
bench_seconds=$((bench_seconds < left ? bench_seconds : left))
echo "== benchmark, ${bench_seconds} s at most"
timeout --kill-after=10 "$((bench_seconds + spare - 10))" "$python" -m cag bench gpu --out "$out/bench" \
    --budget "$bench_seconds" ${BENCH_OPTIONS:-} 2>&1 | tee "$out/bench.log"
bench=$?
rm -rf "$out/home"
echo "tests ended with $tests, the benchmark with $bench" | tee -a "$out/machine.txt"
[ "$tests" -eq 0 ] && [ "$bench" -eq 0 ]
