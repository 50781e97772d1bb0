"""A generation engine: continuous batching over a fixed number of slots, tokens in and tokens out.

Samples wait in a queue and take a slot when one is free. Their prefix, the prompt and whatever was generated before an
interruption, enters the cache in one forward pass (prefill); then every step decodes one token for all active rows together.
Rows in use are kept at the front, so a step computes nothing for free slots. No step has a Python loop over rows.

Log-probabilities are those of the distribution sampled from, float32, so they equal what the trainer computes for the same
weights up to rounding. Letters: B active rows, R rows being prefilled, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.errors import UserError
from rl.engine.kv_cache import DecodeAttention, KVCache, PrefillAttention
from rl.engine.sampler import sample
from rl.trajectory import Sample, Segment, Status
from trainer.config import ModelConfig
from trainer.model.transformer import ExpertWeights, LanguageModel, Transformer, expert_shapes

PREFILL_TOKENS = 8192  # of one forward pass, padding included; a single longer prefix is still taken whole


@dataclass(frozen=True)
class EngineSettings:
    """What an engine needs to know besides the model; picklable, the same for every engine of a pool."""

    slots: int  # sequences decoded at once
    max_length: int  # prompt and response tokens of a sequence
    max_new_tokens: int  # response tokens of a sample, interruptions included
    temperature: float
    eos_id: int
    seed: int  # of the sampling noise


class Rows:
    """The state of the sequences in the slots, one entry each; `count` of them are in use, at the front."""

    def __init__(self, settings: EngineSettings, device: torch.device) -> None:
        def integers() -> Tensor:
            return torch.zeros(settings.slots, dtype=torch.int64, device=device)

        self.count = 0
        self.uids = integers()
        self.last_tokens = integers()  # sampled or given, not in the cache yet
        self.lengths = integers()  # tokens in the cache, so also the position of the last token
        self.generated = integers()  # response tokens of the sample so far
        self.fresh = integers()  # of them, those generated since it was submitted
        shape = (settings.slots, settings.max_new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)  # the fresh ones
        self.logprobs = torch.zeros(shape, dtype=torch.float32, device=device)

    def move(self, sources: Tensor, destinations: Tensor) -> None:
        numbers = (self.uids, self.last_tokens, self.lengths, self.generated, self.fresh)
        for entries in (*numbers, self.tokens, self.logprobs):
            entries[destinations] = entries[sources]


class Engine:
    """Generates for samples under one set of weights at a time. Not thread-safe."""

    def __init__(self, config: ModelConfig, settings: EngineSettings, device: torch.device, dtype: torch.dtype) -> None:
        if settings.max_length > config.max_positions:
            raise UserError(
                f"the engine is asked for sequences of {settings.max_length} tokens, but model.max_positions is "
                f"{config.max_positions}; lower loop.sequence_length"
            )
        self._settings, self._device = settings, device
        self._model = _unset_model(config, device, dtype)
        self._cache = KVCache(config, settings.slots, settings.max_length, device, dtype)
        self._rows = Rows(settings, device)
        self._samples: list[Sample] = []  # one for each active row, in the order of the rows
        self._waiting: deque[Sample] = deque()
        self._longest = 0  # an upper bound of the lengths of the active rows, known without asking the device
        self._version: int | None = None

    # ------------------------------------------------------------ what a pool calls

    def load_weights(self, state: Mapping[str, Tensor], version: int) -> None:
        """Copies the tensors of `LanguageModel.state()` in, whatever their dtype and device. The engine must be drained."""
        assert not self._samples and not self._waiting, "weights change only between rounds; drain the engine first"
        self._model.load_state(state)
        self._version = version

    def submit(self, samples: Sequence[Sample]) -> None:
        """Queues pending and partial samples. Raises UserError when one may grow beyond `max_length`."""
        for item in samples:
            assert not item.done, f"sample {item.uid} is {item.status} already"
            if len(item.prompt_ids) + self._settings.max_new_tokens > self._settings.max_length:
                raise UserError(
                    f"a prompt of {len(item.prompt_ids)} tokens and rollout.max_new_tokens = {self._settings.max_new_tokens} "
                    f"exceed loop.sequence_length = {self._settings.max_length}; raise it or lower rollout.max_new_tokens"
                )
        self._waiting.extend(samples)

    @torch.inference_mode()
    def advance(self, tokens: int) -> list[Sample]:
        """Decodes up to `tokens` tokens for every active row; freed slots are refilled on the way. Returns the samples done."""
        assert self._version is not None, "no weights are loaded"
        done: list[Sample] = []
        for _ in range(tokens):
            done += self._admit()
            if not self._samples:
                break
            done += self._release(self._decode())
        return done

    def drain(self) -> list[Sample]:
        """Stops, and returns every sample that is not done with the tokens it has; the slots and the queue are empty then."""
        everything = list(range(len(self._samples)))
        unfinished = [*self._extended(everything, ["partial"] * len(everything)), *self._waiting]
        self._samples, self._rows.count, self._longest = [], 0, 0
        self._waiting.clear()
        return unfinished

    # ------------------------------------------------------------ one decoding step

    def _decode(self) -> Tensor:
        """One token for every active row; returns which rows are done (B,) bool."""
        rows, settings, count = self._rows, self._settings, self._rows.count
        lengths_B, generated_B, fresh_B = rows.lengths[:count], rows.generated[:count], rows.fresh[:count]
        output = self._model.forward(
            rows.last_tokens[:count, None],
            lengths_B[:, None],
            torch.ones(count, 1, dtype=torch.bool, device=self._device),
            DecodeAttention(self._cache, lengths_B, self._longest),
        )
        logits_BV = _logits(output.hidden_BSD[:, 0], self._model.dense.head_VD)
        tokens_B, logprobs_B = sample(logits_BV, rows.uids[:count], generated_B, settings.seed, settings.temperature)
        places_B = torch.arange(count, device=self._device)
        rows.tokens[places_B, fresh_B] = tokens_B
        rows.logprobs[places_B, fresh_B] = logprobs_B
        rows.last_tokens[:count] = tokens_B
        lengths_B += 1
        generated_B += 1
        fresh_B += 1
        self._longest += 1
        return (tokens_B == settings.eos_id) | (generated_B >= settings.max_new_tokens)

    def _release(self, done_B: Tensor) -> list[Sample]:
        """Takes the rows that are done out, and closes the gaps with rows from the back."""
        done = done_B.nonzero().squeeze(1)
        places = done.tolist()
        if not places:
            return []
        ended = (self._rows.last_tokens[done] == self._settings.eos_id).tolist()
        samples = self._extended(places, ["finished" if eos else "truncated" for eos in ended])
        kept = (~done_B).nonzero().squeeze(1)
        count = kept.shape[0]
        gaps, movers = done[done < count], kept[kept >= count]
        self._cache.move(movers, gaps, self._longest)
        self._rows.move(movers, gaps)
        for gap, mover in zip(gaps.tolist(), movers.tolist(), strict=True):
            self._samples[gap] = self._samples[mover]
        del self._samples[count:]
        self._rows.count = count
        self._longest = int(self._rows.lengths[:count].max()) if count else 0
        return samples

    def _extended(self, places: list[int], statuses: Sequence[Status]) -> list[Sample]:
        """The samples in rows `places` with what was generated since they were submitted, if anything."""
        if not places:
            return []
        assert self._version is not None
        fresh = self._rows.fresh[places].tolist()
        tokens, logprobs = self._rows.tokens[places].tolist(), self._rows.logprobs[places].tolist()
        samples = []
        for index, place in enumerate(places):
            length = fresh[index]
            item = self._samples[place]
            if length:
                segment = Segment(tuple(tokens[index][:length]), tuple(logprobs[index][:length]), self._version)
                item = item.extended(segment, statuses[index])
            samples.append(item)
        return samples

    # ------------------------------------------------------------ filling slots

    def _admit(self) -> list[Sample]:
        """Moves waiting samples into free slots, several at a time; returns those that have no token left to generate."""
        slots, full = self._settings.slots, []
        # Prefilling for each freed slot at once would cost a small forward pass a token; an eighth of the slots may idle.
        if slots - self._rows.count < min(len(self._waiting), max(1, slots // 8)):
            return []
        admitted: list[Sample] = []
        while self._waiting and self._rows.count + len(admitted) < slots:
            item = self._waiting.popleft()
            if item.length >= self._settings.max_new_tokens:  # only after a resume with a smaller max_new_tokens
                full.append(replace(item, status="truncated"))
            else:
                admitted.append(item)
        if admitted:
            self._fill_rows(admitted)
        return full

    def _fill_rows(self, samples: list[Sample]) -> None:
        prefixes = [item.prompt_ids + item.response_ids for item in samples]
        first, last = self._rows.count, self._rows.count + len(samples)
        rows = self._rows
        table = [[item.uid, ids[-1], len(ids) - 1, item.length] for item, ids in zip(samples, prefixes, strict=True)]
        columns = torch.tensor(table, device=self._device).unbind(1)
        for entries, column in zip((rows.uids, rows.last_tokens, rows.lengths, rows.generated), columns, strict=True):
            entries[first:last] = column
        rows.fresh[first:last] = 0
        rows.count = last
        self._samples += samples
        self._longest = max(self._longest, *(len(prefix) - 1 for prefix in prefixes))
        # All but the last token: the next decoding step takes that one, and yields what follows it.
        slots_of: dict[tuple[int, ...], list[int]] = {}  # the samples of a fresh group share one prefill
        for slot, prefix in enumerate(prefixes, start=first):
            slots_of.setdefault(prefix[:-1], []).append(slot)
        for batch in _prefill_batches([prefix for prefix in slots_of if prefix]):
            self._prefill(batch, [slots_of[prefix] for prefix in batch])

    def _prefill(self, prefixes: list[tuple[int, ...]], slots: list[list[int]]) -> None:
        """Puts each prefix into the cache of all its slots, in one forward pass."""
        longest = max(len(prefix) for prefix in prefixes)
        padded = [prefix + (0,) * (longest - len(prefix)) for prefix in prefixes]
        lengths_R = torch.tensor([len(prefix) for prefix in prefixes], device=self._device)
        places_S = torch.arange(longest, device=self._device)
        pairs = [(row, slot) for row, group in enumerate(slots) for slot in group]
        sources, targets = torch.tensor(pairs, device=self._device).T
        self._model.forward(
            torch.tensor(padded, device=self._device),
            places_S.expand(len(prefixes), longest),
            places_S < lengths_R[:, None],
            PrefillAttention(self._cache, sources, targets),
        )


def _prefill_batches(prefixes: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Batches of at most PREFILL_TOKENS padded tokens; prefixes of like length together, so that little is padding."""
    batches: list[list[tuple[int, ...]]] = []
    for prefix in sorted(prefixes, key=len):
        if batches and (len(batches[-1]) + 1) * len(prefix) <= PREFILL_TOKENS:
            batches[-1].append(prefix)
        else:
            batches.append([prefix])
    return batches


def _logits(hidden_BD: Tensor, head_VD: Tensor) -> Tensor:
    """(B, V) float32. On a CPU by the same product as the trainer's `token_logprobs`; a GPU's adds up in another order."""
    if hidden_BD.is_cuda and hidden_BD.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden_BD, head_VD.t(), out_dtype=torch.float32)
    return torch.mm(hidden_BD.float(), head_VD.float().t())


def _unset_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A model of the right shape whose weights are still to be loaded."""
    with torch.device(device):
        gate_up_LECD, down_LEDF = (torch.empty(shape, dtype=dtype) for shape in expert_shapes(config))
        bias_LE = torch.zeros(config.num_moe_layers, config.num_experts)
        return LanguageModel(config, Transformer(config).to(dtype), ExpertWeights(gate_up_LECD, down_LEDF), bias_LE)
