"""A causal language model that attends through our kernels, and what identifies it.

The model itself is transformers' own, unchanged: our attention is registered with its attention interface and receives
the state of the sequence as a keyword of the forward. Knows a directory of model files; no documents and no store.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cag.forward.batch import TAIL_PAIRS, Batch, BatchState
from cag.forward.branches import BranchedState
from cag.forward.decoder import FewRowsDecoder, recognize
from cag.forward.device_decoder import DeviceDecoder, recognize_on_device
from cag.forward.kernels_ahead import compile_kernels
from cag.forward.layer_probe import NUM_PROBES, Forward, gives_the_same, probe_ids, probe_network
from cag.forward.pages import PagedState, PagedTail, PagePool
from cag.forward.products import Float32Products, SequencesApart
from cag.forward.recurrent import by_sequence, has_recurrent_layers, remembering
from cag.forward.recurrent_probe import check_pieces, find_recurrent_layers
from cag.forward.replays import StepReplays
from cag.forward.rope import rope_of
from cag.forward.state import SequenceState, Tail, WholeState
from cag.forward.step_cost import ARITHMETIC, SHARED_READING, StepCost
from cag.forward.step_tensors import StepState, StepTensors
from cag.forward.turns import ForwardTurns
from cag.forward.weights import join_network
from cag.machine.runtime import RuntimePlan, choose_device, plan_runtime
from cag.model_files import prepared, read_parts, stop_ids
from cag.models.fingerprint import ModelFingerprints
from cag.models.read_files import ReadFiles
from cag.prompt import PromptTemplate, guarded_template
from cag.short_model import short_model
from cag.starts.begin import Beginning, begin, can_be_kept
from cag.starts.keeping import StartKeeper, digest_of
from cag.starts.record import Start, record_path
from cag.starts.taking import StartedParts, take_start
from cag.thinking import read_thinking
from cag_kernels import FEW_ROWS, has_compiler, vector_lanes
from cag_kernels.device import triton_runs_on

POOL_SHARE = 16  # of a GPU's memory, the part that pages may keep when nobody has any
MakeBranches = Callable[[Any, Sequence[int]], BranchedState]
Chunk = tuple[list[int] | Tensor, SequenceState]  # new tokens, and the sequence that they belong to
Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded. `compute_dtype` "auto" takes what the machine computes best with."""

    device: str = "auto"
    compute_dtype: str = "auto"
    adapter: Path | None = None


class LanguageModel:
    """A loaded model: forwards over a `SequenceState`, tokenizer, prompt template and fingerprints.

    After a start that was kept (`start`, and the parts that were `started` with it) transformers' network is read when
    something needs more than the forward of few rows; it takes over the weights that are here.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        *,
        model_id: str,
        fingerprints: ModelFingerprints,
        plan: RuntimePlan,
        kv_dtype: torch.dtype,
        compute_dtype: torch.dtype,
        adapter: Path | None = None,
        files: ReadFiles | None = None,
        start: Start | None = None,
        started: StartedParts | None = None,
    ) -> None:
        self._network = network if started else prepared(network)
        self._load_network = started.load_network if started else None
        self._network_lock = threading.Lock()
        self.tokenizer, self.plan = tokenizer, plan
        self.model_id, self.adapter = model_id, adapter
        self.fingerprints, self.files = fingerprints, files
        self.kv_dtype, self.compute_dtype = kv_dtype, compute_dtype
        self.device = next(network.parameters()).device
        self.turns = ForwardTurns(plan)
        self.most_read_tokens = 0  # of one sequence, by this process
        self.decodes_streams = triton_runs_on(self.device)  # caches are decoded there, not on the CPU
        self.template: PromptTemplate = start.prompt_template if start else guarded_template(tokenizer)
        self.thinking = start.model_thinking if start else read_thinking(tokenizer, self.template)
        recurs = has_recurrent_layers(self._network.config)
        self.recurrent = find_recurrent_layers(self.network, self.device) if recurs else None
        probed = started.probed if started else probe_network(self.network, self.device, self.recurrent)
        self.kv_shapes, self.rules, self.seen = probed.kv_shapes, probed.rules, probed.seen
        # None: each layer has keys and values of its own
        self.places = probed.places if len(probed.kv_shapes) < len(probed.places) else None
        self.pages = PagePool(self.kv_shapes, kv_dtype, self.device)
        if self.device.type == "cpu":
            compile_kernels(self._network, self.kv_shapes, self.rules, kv_dtype, compute_dtype)
        self.decoder = self._decoder_of(start) if start else self._checked_decoder()
        self._apart = SequencesApart(self._network if self.device.type == "cpu" and self.decoder is None else None)
        self.device_decoder: DeviceDecoder | None = None
        self.replays: StepReplays | None = None
        if self.device.type == "cuda" and self.recurrent is None:
            self.run_in_steps(capture=True)
        if self.recurrent is not None:
            check_pieces(self, exactly=self.compute_dtype == torch.float32)
        self.stop_ids = frozenset(start.stop_ids) if start else stop_ids(network, tokenizer, self.template)
        self.short: LanguageModel | None = short_model(self)

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        model_id: str,
        options: ModelOptions | None = None,
        beginning: Beginning | None = None,
    ) -> LanguageModel:
        """Load a directory of Hugging Face files, by a start that was kept where one holds; its `beginning` may have
        been made before.

        Raises:
            UnsupportedModel: an architecture whose attention or prompt the engine cannot serve.
            InsufficientResources: too little memory, said before the weights are read.
            ModelError: files that transformers cannot load.
        """
        options = options or ModelOptions()
        device = choose_device(options.device)
        plan = plan_runtime(device)
        wanted = {"device": options.device, "dtype": options.compute_dtype}
        path = record_path(directory, **wanted)
        kept, begun = can_be_kept(options.adapter, **wanted), beginning
        if not kept or begun is None or begun.path != path:  # of another model, or without its adapter
            begun = begin(directory, adapter=options.adapter, **wanted)
        started = take_start(begun, plan) if begun is not None else None
        if begun is not None and started is not None:
            model = cls._from_start(started, begun.start, model_id, plan)
            if model.decoder is not None:
                return model
        keeper = StartKeeper.before_reading(directory, path) if kept else None
        parts = read_parts(directory, plan, device, options.compute_dtype, options.adapter)
        model = cls(model_id=model_id, plan=plan, adapter=options.adapter, **vars(parts))
        if keeper is not None:
            keeper.keep(model)
        return model

    @classmethod
    def _from_start(cls, started: StartedParts, start: Start, model_id: str, plan: RuntimePlan) -> LanguageModel:
        return cls(
            started.network,
            started.tokenizer,
            model_id=model_id,
            fingerprints=started.fingerprints,
            files=started.files,
            plan=plan,
            kv_dtype=getattr(torch, start.stored_dtype),
            compute_dtype=getattr(torch, start.compute_dtype),
            start=start,
            started=started,
        )

    @property
    def network(self) -> Any:
        """transformers' own network, read when it is first needed. Safe with several threads.

        Raises: ModelError: its files are not those any more that were loaded.
        """
        with self._network_lock:
            if self._load_network is not None:
                self._network, self._load_network = prepared(self._load_network()), None
            return self._network

    @property
    def window_tokens(self) -> int:
        """Tokens that prompt and answer may have together."""
        return int(self._network.config.get_text_config().max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """Token ids that it knows, counted from 0."""
        return int(self._network.config.get_text_config().vocab_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token over all layers, uncompressed."""
        return sum(shape.width for shape in self.kv_shapes) * self.kv_dtype.itemsize

    @property
    def attends_to_codes(self) -> bool:
        """Whether questions attend to a prefix in codes as quickly as to numbers: Triton's kernels do, and on a CPU
        compiled code without caps."""
        compiled = has_compiler() and all(rule.softcap is None for rule in self.rules)
        return triton_runs_on(self.device) if self.device.type == "cuda" else compiled

    @property
    def rows_stay_apart(self) -> bool:
        """Whether a token's logits are the same bits whatever other tokens the forward has (`most_rows` says when)."""
        return self.decoder is not None and self.decoder.rows_stay_apart

    @property
    def step_cost(self) -> StepCost:
        """What more tokens in a step cost here, for those that may be run along."""
        multiplies = self.device.type == "cpu" and self.compute_dtype == torch.float32
        return ARITHMETIC[vector_lanes()] if multiplies else SHARED_READING

    def most_rows(self, state: SequenceState, *, exactly: bool) -> int:
        """How many tokens of a sequence a forward may have that takes the place of single steps; `exactly`: whether
        each must have the bits of a single step, not only its numbers but for rounding."""
        most = min(FEW_ROWS, TAIL_PAIRS // max(1, state.num_tail))
        alone = (exactly and not self.rows_stay_apart) or self.recurrent is not None  # which cannot go back a token
        return 1 if alone else max(1, most)

    @property
    def rope(self) -> dict[str, Any]:
        """What positions mean in this model's keys; part of a cache's identity."""
        return rope_of(self._network)

    def new_state(self, prefix: Any = None, *, capacity: int = 0) -> WholeState:
        """An empty sequence behind `prefix` (or behind nothing), with room for `capacity` tokens of its own in one
        piece."""
        return WholeState(Tail(self.kv_shapes, self.kv_dtype, self.device, capacity), prefix, self.recurrent)

    def new_session_state(self, prefix: Any = None) -> PagedState:
        """An empty sequence whose own tokens take pages of the model's pool; several of them fit into one forward."""
        return PagedState(PagedTail(self.pages), prefix, self.recurrent)

    def settle_pages(self) -> None:
        """Give back the memory of pages that nobody has, if nobody has any; for a moment without work."""
        with self.turns.turn(0):
            self.pages.settle()

    def forward(self, token_ids: list[int] | Tensor, state: SequenceState, *, num_logits: int = 1) -> Tensor:
        """Run new tokens of a sequence; their keys and values join its tail.

        Safe to call from several threads with a state each: they take turns.

        Returns:
            Logits of the last `num_logits` tokens (all if 0), `[num_logits, vocab_size]` float32.
        """
        return self.forward_together([(token_ids, state)], num_logits=num_logits)

    def forward_together(
        self,
        chunks: Sequence[Chunk],
        *,
        num_logits: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Run new tokens of several sequences in one forward; their keys and values join their tails.

        Args:
            chunks: new tokens and the sequence they belong to; several only of `new_session_state`, with at most
                `FEW_ROWS` tokens each, and neighbours where they stand behind one prefix.
            num_logits: of how many last tokens of each sequence; 1 if None. A number, as in `forward`, only for a
                single sequence.

        Returns:
            Logits of the last tokens of each sequence, one sequence behind the other, `[num_wanted, vocab_size]`
            float32.
        """
        return self._together(chunks, num_logits, self._run)

    def choose_together(self, chunks: Sequence[Chunk], *, num_choices: Sequence[int]) -> list[int]:
        """As `forward_together`, for who wants nothing but the greedy choice: in the place of each row of logits the
        token with the largest one, the lowest of equal ones. It is the same whether a quick way finds it or not."""
        return self._together(chunks, num_choices, self._choose)

    @torch.inference_mode()
    def _together(
        self,
        chunks: Sequence[Chunk],
        num_wanted: int | Sequence[int] | None,
        run: Callable[[Tensor, BatchState, list[int]], Result],
    ) -> Result:
        pieces = [torch.as_tensor(token_ids, dtype=torch.long, device="cpu") for token_ids, _ in chunks]
        states, counts = [state for _, state in chunks], [len(piece) for piece in pieces]
        ids = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        with self.turns.turn(len(ids)):
            for state, count in zip(states, counts, strict=True):
                state.begin(count)
            batch = BatchState(states, counts)
            result = run(ids, batch, batch.last_rows(num_wanted))
            batch.finish()
        self.most_read_tokens = max(self.most_read_tokens, *(state.num_tail for state in states))
        return result

    def _choose(self, ids: Tensor, batch: BatchState, wanted: list[int]) -> list[int]:
        if self.replays is None and self.decoder is not None and self.decoder.serves(batch):
            return self.decoder.choose(ids, batch, wanted)
        chosen: list[int] = self._run(ids, batch, wanted).argmax(dim=-1).tolist()
        return chosen

    def _run(self, ids: Tensor, batch: BatchState, wanted: list[int]) -> Tensor:
        if self.recurrent is not None and batch.num_sequences > 1 and not batch.are_alike:
            return batch.run_alike(ids, wanted, self._run)
        if self.replays is not None and self.replays.serves(batch):
            return self.replays.forward(ids, batch, wanted)
        if self.decoder is not None and self.decoder.serves(batch):
            return self.decoder.forward(ids, batch, wanted)
        long = len(ids) > FEW_ROWS and self.device.type == "cpu"
        if batch.num_sequences == 1 and (long or isinstance(batch.states[0].tail, Tail)):
            placed = ids.to(self.device), batch.positions(self.device)
            return self._network_forward(*placed, batch.states[0], len(wanted))
        tensors = batch.upload(ids, wanted, self.device)
        with self._apart(batch.counts, batch.num_of_each(wanted)):
            return self.run_step(tensors, batch)

    def run_step(self, tensors: StepTensors, state: StepState) -> Tensor:
        """Logits of the wanted rows of a step, by its shortest way on this device."""
        if self.device_decoder is not None:
            return self.device_decoder.forward(tensors, state)
        return self._network_forward(tensors.ids, tensors.positions, state, tensors.wanted)

    @torch.inference_mode()
    def forward_branches(
        self, branches: Sequence[list[int]], prefix: Any, rows: list[int], make_state: MakeBranches = BranchedState
    ) -> Tensor:
        """Run several sequences of token ids behind `prefix` (`PrefixLayers`), apart from each other, in one forward
        (with recurrent layers one by one); nothing of them is kept.

        Computes in float32 whatever the model computes in: in 16 bits rounding alone makes any two runs differ by more
        than a good codec does. Logits `[len(rows), vocab_size]` float32 are those of `rows`, ascending, counted over
        all branches one behind the other. `make_state`: where the state is to do more than attend.
        """
        if self.recurrent is not None and len(branches) > 1:
            parts = by_sequence(branches, rows)
            return torch.cat([self.forward_branches(one, prefix, own, make_state) for one, own in parts])
        ids = torch.tensor([token for branch in branches for token in branch], dtype=torch.long, device=self.device)
        state = make_state(prefix, [len(branch) for branch in branches])
        with self.turns.turn(len(ids)), Float32Products():
            positions, wanted = state.positions().to(self.device), torch.tensor(rows, device=self.device).long()
            return self._network_forward(ids, positions, state, wanted)

    def _network_forward(self, ids: Tensor, positions: Tensor, state: Any, num_logits: int | Tensor) -> Tensor:
        shape = (1 if self.recurrent is None else len(state.sequences), -1)
        with remembering(state, self.recurrent) as attention:
            output = self.network(
                input_ids=ids.view(shape),
                position_ids=positions.view(shape),
                use_cache=False,
                logits_to_keep=num_logits,
                cag_pause=self.turns.pause,
                cag_places=self.places,
                **attention,
            )
        logits: Tensor = output.logits.flatten(0, 1).float()
        return logits

    def run_in_steps(self, *, capture: bool) -> None:
        """Run the steps of sessions padded to buckets of sizes; with `capture` they are recorded in CUDA graphs.

        A GPU does so from the start. Only before there are sessions: they get another pool of pages.
        """
        kept_bytes = torch.cuda.mem_get_info(self.device)[1] // POOL_SHARE if self.device.type == "cuda" else 0
        self.pages = PagePool(self.kv_shapes, self.kv_dtype, self.device, has_scratch=True, kept_bytes=kept_bytes)
        join_network(self.network)
        self.device_decoder = self._checked_device_decoder()
        self.replays = StepReplays(self.run_step, self.pages, self.device, capture=capture)

    @torch.inference_mode()
    def _checked_decoder(self) -> FewRowsDecoder | None:
        """The quick forward for few rows, if it gives the logits of the network's own on a probe."""
        decoder = self._recognized(self.network) if self.device.type == "cpu" and self.recurrent is None else None
        if decoder is None:
            return None

        def in_two_parts(_ids: Tensor, _positions: Tensor, chosen: Sequence[int] | None) -> Tensor:
            return self.probe(decoder, chosen)

        return decoder if self._gives_the_same(in_two_parts) else None

    def _recognized(self, network: Any) -> FewRowsDecoder | None:
        return recognize(network, self.kv_shapes[0].head_dim, self.seen, self.plan.product, self.kv_dtype)

    def _decoder_of(self, start: Start) -> FewRowsDecoder | None:
        """The quick forward for few rows, if it gives to the bit what it gave when it was last compared with that of
        the network."""
        decoder = self._recognized(self._network)
        return decoder if decoder is not None and digest_of(self.probe(decoder)) == start.probe_sha256 else None

    @torch.inference_mode()
    def probe(self, decoder: FewRowsDecoder, chosen: Sequence[int] | None = None) -> Tensor:
        """Logits `[NUM_PROBES, vocab_size]` of the probe tokens by a forward of few rows, the last one by itself."""
        state, found, ids = self.new_state(capacity=NUM_PROBES), [], probe_ids(self._network)
        for part in (ids[:-1], ids[-1:]):
            batch = Batch([state], [len(part)])
            self.plan.use_threads(len(part))
            found.append(decoder.forward(part, batch, slice(None), chosen).clone())
            batch.finish()
        return torch.cat(found)

    @torch.inference_mode()
    def _checked_device_decoder(self) -> DeviceDecoder | None:
        """The forward of few launches, if it gives the logits of the network's own on a probe."""
        decoder = recognize_on_device(self.network, self.seen)
        if decoder is None:
            return None

        def in_pages(ids: Tensor, _positions: Tensor, chosen: Sequence[int] | None) -> Tensor:
            state = self.new_session_state()
            state.begin(NUM_PROBES)
            batch = BatchState([state], [NUM_PROBES])
            return decoder.forward(batch.upload(ids, range(NUM_PROBES), self.device), batch, chosen)

        return decoder if self._gives_the_same(in_pages) else None

    def _gives_the_same(self, other: Forward) -> bool:
        return gives_the_same(self.network, self.seen, self._own, other, exactly=self.compute_dtype == torch.float32)

    def _own(self, ids: Tensor, positions: Tensor, _chosen: Sequence[int] | None) -> Tensor:
        state = self.new_state(capacity=NUM_PROBES)
        return self._network_forward(ids.to(self.device), positions.to(self.device), state, 0)
