"""`cag doctor`: what this machine has, what will be used, and why."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cag.cli.opening import store_at
from cag.cli.options import DeviceOption, JsonOption, StoreOption
from cag.cli.output import bytes_text, counted, note, print_facts, print_json
from cag.machine.versions import installed_version, unmet_requirements

if TYPE_CHECKING:
    import torch

    from cag.machine.runtime import RuntimePlan
    from cag_store import Store

VERSIONED = (
    "cag-engine",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "llvmlite",
    "numba",
    "zstandard",
    "triton",
    "flash-attn",
    "peft",
)
# Query heads, key/value heads and head_dim of the default model; behind a prefix of 4,096 tokens.
PROBE_HEADS, PROBE_KV_HEADS, PROBE_DIM, PROBE_PREFIX_TOKENS = 12, 2, 128, 4096
PROBES = {"prefill": 512, "question": 16, "answer": 1}  # tokens of a forward


def doctor(device: DeviceOption = None, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Say what this machine has, what will be used, and why."""
    note("measuring what this machine computes best with ...")
    from cag.machine.runtime import choose_device, plan_runtime
    from cag_kernels import prefix_paths

    chosen = choose_device(device or "auto")
    plan = plan_runtime(chosen, measure_again=True)
    opened = store_at(store)
    found = {
        "device": _device_facts(chosen),
        "attention": _attention_facts(chosen, plan),
        "kernels": prefix_paths(chosen),
        "runtime": asdict(plan),
        "memory": _memory_facts(),
        "store": _store_facts(opened),
        "models": _pulled_models(),
        "versions": {"python": platform.python_version()} | {name: installed_version(name) for name in VERSIONED},
        "unmet_requirements": unmet_requirements(),
    }
    if as_json:
        print_json(found)
    else:
        print_report(found)


def _device_facts(device: torch.device) -> dict[str, Any]:
    import torch

    from cag.machine.runtime import processor_name, usable_cores

    cuda = torch.cuda.is_available()
    return {
        "used": device.type,
        "processor": processor_name(),
        "cores": usable_cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if cuda else None,
        "cuda_free_bytes": torch.cuda.mem_get_info()[0] if cuda else None,
        "flash_attn": importlib.util.find_spec("flash_attn") is not None,
        "triton": importlib.util.find_spec("triton") is not None,
    }


def _attention_facts(device: torch.device, plan: RuntimePlan) -> dict[str, str]:
    """For each kind of forward, the path that the kernels choose for it, and what serves that path here."""
    import torch

    from cag_kernels import available_paths, choose_path

    paths = available_paths(device)
    served = {}
    for kind, num_tokens in PROBES.items():
        query = torch.empty(PROBE_HEADS, num_tokens, PROBE_DIM, dtype=getattr(torch, plan.compute_dtype), device=device)
        keys = torch.empty(PROBE_KV_HEADS, PROBE_PREFIX_TOKENS, PROBE_DIM, dtype=torch.bfloat16, device=device)
        path = choose_path(query, keys, window=None, softcap=None, offset=PROBE_PREFIX_TOKENS)
        served[kind] = f"{path}: {paths[path]}"
    return served


def _memory_facts() -> dict[str, int]:
    from cag.machine.memory_limits import available_memory_bytes, total_memory_bytes

    return {"available_bytes": available_memory_bytes(), "total_bytes": total_memory_bytes()}


def _store_facts(store: Store) -> dict[str, Any]:
    from cag.models.progress import folder_bytes
    from cag.models.resources import free_disk_bytes
    from cag_store import is_url
    from cag_store.usage import objects

    url = store.backend.url
    facts: dict[str, Any] = {"path": url, "num_caches": len(store.names())}
    if is_url(url):
        held = sum(info.size_bytes for info in objects(store.backend).values())
        return facts | {"num_bytes": held, "free_disk_bytes": None}
    return facts | {"num_bytes": folder_bytes(Path(url)), "free_disk_bytes": free_disk_bytes(Path(url))}


def _pulled_models() -> list[dict[str, Any]]:
    """The models of the catalogue that are here; directories and the hub's own cache are not looked at."""
    from cag.models import CATALOGUE, model_directory, read_record

    here = []
    for name in CATALOGUE:
        record = read_record(model_directory(name))
        if record is not None:
            num_bytes = sum(file["num_bytes"] for file in record["files"].values())
            here.append({"name": name, "directory": str(model_directory(name)), "num_bytes": num_bytes})
    return here


def print_report(found: dict[str, Any]) -> None:
    """The findings of `doctor`, a line each."""
    device, plan, memory, store = found["device"], found["runtime"], found["memory"], found["store"]
    unmet = found["unmet_requirements"]
    required = "not checked: cag-engine runs from a checkout" if unmet is None else "; ".join(unmet) or "all there"
    free = f" ({bytes_text(device['cuda_free_bytes'])} free)" if device["cuda"] else ""
    facts = {
        "device": device["used"],
        "processor": f"{device['processor']}, {device['cores']} usable cores, {device['cpu_capability']}",
        "CUDA": f"{device['cuda']}{free}" if device["cuda"] else "no device",
        "flash-attn": "installed" if device["flash_attn"] else "not installed",
        "Triton": "installed" if device["triton"] else "not installed",
        "compute": f"{plan['compute_dtype']} ({plan['reason']})",
        "threads": f"{plan['threads_small']} for a question, {plan['threads_large']} for prefill",
        "products": f"{plan['product']} for a question's rows",
    }
    facts |= {f"attention, {kind}": served for kind, served in found["attention"].items()}
    facts |= {f"kernels, {name}": served for name, served in found["kernels"].items()}
    if plan["measured_ms"]:
        facts["measured"] = "products by kind / type / threads / rows:"
    facts |= {f"measured {key}": f"{value:.2f} ms" for key, value in plan["measured_ms"].items()}
    facts |= {
        "memory": f"{bytes_text(memory['available_bytes'])} of {bytes_text(memory['total_bytes'])} available",
        "store": f"{store['path']}: {counted(store['num_caches'], 'cache')}, "
        + bytes_text(store["num_bytes"])
        + ("" if store["free_disk_bytes"] is None else f"; {bytes_text(store['free_disk_bytes'])} of disk free"),
        "models": "; ".join(f"{model['name']} ({bytes_text(model['num_bytes'])})" for model in found["models"])
        or "none pulled",
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version),
        "required": required,
    }
    print_facts(facts)
