"""Which peers there are: the command that starts each, what it is told to prepare, and where its prefix then lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cag.errors import UsageError
from cag_bench.peers.parties import DISK, MEMORY
from cag_bench.peers.process import PeerProcess

SCRIPTS = Path(__file__).resolve().parent / "scripts"
VLLM, LLAMA_CPP = "vllm", "llama.cpp"


@dataclass(frozen=True)
class PeerSpec:
    """name: in rows. script: the peer's side. python: its own interpreter. sources: where it can have the prefix.
    settings: of `prepare`, beside those that all peers get."""

    name: str
    script: Path
    python: str
    sources: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def command(self) -> list[str]:
        """What starts it."""
        return [self.python, str(self.script)]

    def preparation(self, prefix_ids: list[int], limits: PeerLimits, directory: Path) -> dict[str, Any]:
        """The first request. A peer that can have the prefix in a file is told where in `directory` to put it."""
        paths = {"state_path": str(directory / f"{self.name}.state")} if DISK in self.sources else {}
        return {"do": "prepare", "prefix_ids": prefix_ids, **asdict(limits), **paths, **self.settings}


@dataclass(frozen=True)
class PeerLimits:
    """num_threads: of a peer. max_tokens: of one sequence, prefix included. num_sessions: at once."""

    num_threads: int
    max_tokens: int
    num_sessions: int


@dataclass(frozen=True)
class PeerFacts:
    """What a peer said when it was ready."""

    name: str
    versions: dict[str, str]
    settings: dict[str, Any]
    read_s: float
    state_path: Path | None

    def to_json(self) -> dict[str, Any]:
        """As rows keep it; of the state only its size."""
        size = self.state_path.stat().st_size if self.state_path is not None else None
        facts = {"versions": self.versions, "settings": self.settings, "read_s": self.read_s}
        return facts | {"state_bytes": size}


def named_peers(
    vllm_python: str | None, llama_python: str | None, llama_gguf: list[str], model_directory: Path, *, eager: bool
) -> list[PeerSpec]:
    """The peers whose interpreter was given; a llama.cpp for each GGUF file.

    Raises: `UsageError` for a llama.cpp without a GGUF file, a file that is not there, or two of the same name.
    """
    specs = []
    if vllm_python is not None:
        settings = {"model": str(model_directory), "eager": eager}
        specs.append(PeerSpec(VLLM, SCRIPTS / "vllm_peer.py", vllm_python, (MEMORY,), settings))
    if llama_python is not None:
        if not llama_gguf:
            raise UsageError("llama.cpp needs a model of its own format.", hint="Give --llama-gguf FILE.")
        for path in map(Path, llama_gguf):
            if not path.is_file():
                raise UsageError(f"there is no file {path}.", path=str(path))
            name = LLAMA_CPP if len(llama_gguf) == 1 else f"{LLAMA_CPP}-{path.stem}"
            settings = {"gguf": str(path.resolve()), "flash_attention": False}
            script = SCRIPTS / "llama_cpp_peer.py"
            specs.append(PeerSpec(name, script, llama_python, (MEMORY, DISK), settings))
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise UsageError(f"peers would have the same name: {', '.join(names)}.", hint="Rename a GGUF file.")
    return specs


def read_facts(answer: Mapping[str, Any], spec: PeerSpec, process: PeerProcess) -> PeerFacts:
    """What a peer answers to `prepare`. Raises: `PeerNonsense`."""
    versions, settings, path = answer.get("versions"), answer.get("settings"), answer.get("state_path")
    if not isinstance(versions, dict) or not isinstance(settings, dict):
        raise process.nonsense("names no versions or settings")
    if (DISK in spec.sources) != (isinstance(path, str) and Path(path).is_file()):
        raise process.nonsense(f"has its state in {path!r}")
    read_s = answer.get("read_s")
    if not isinstance(read_s, (int, float)):
        raise process.nonsense(f"says that reading the prefix took {read_s!r} s")
    return PeerFacts(spec.name, versions, settings, float(read_s), Path(path) if isinstance(path, str) else None)
