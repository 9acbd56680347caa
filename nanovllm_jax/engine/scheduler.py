"""Decides what runs next: continuous batching, chunked prefill, preemption.

Each round runs either a prefill batch (chunks of prompts, packed up to a token budget) or a decode
batch (one token of every running sequence). While both kinds of work are there the rounds
alternate, so that neither arriving prompts nor running sequences starve; and a prefill may then be
held to a smaller budget, because every running sequence waits for it. Or else a round does both: in
a mixed batch the decode rows come first, and chunks of prompts get what they leave of the budget.

The batch may be sharded: a sequence then lives in one shard, with the blocks of that shard's pool,
from its admission until it ends or is preempted. Each shard has its part of the slots and of the
token budget; without sharding there is one shard, which has it all.

The scheduler works one call of the device ahead of what the host has read: a sequence may have
sampled tokens `in_flight`. It decides from counts alone, never from the value of such a token. So a
call may take several decode steps, if nothing that the host has to do could come between them.
"""

import itertools
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, replace

from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.buckets import Bucket
from nanovllm_jax.engine.sequence import NO_SLOT, Sequence, Status
from nanovllm_jax.engine.token_scores import StepScores
from nanovllm_jax.outputs import FinishReason

# Rounds after an arrival in which decode steps are taken one by one, so that the next one to arrive
# does not wait long for its prefill.
QUIET_ROUNDS = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """The work of one call: a prefill step, or `num_steps` decode steps.

    Row i computes tokens starts[i] : starts[i] + lengths[i] of seqs[i], in decode steps one in each
    of the first lengths[i] steps. The first `num_decodes` rows of a prefill step, which is then
    mixed, compute what they would in a decode step: the token that the device drew last.
    """

    is_prefill: bool
    seqs: list[Sequence]
    starts: list[int]
    lengths: list[int]
    yields_token: list[bool]  # whether a row's last token yields a new one (no: unfinished prompt)
    num_steps: int = 1
    num_decodes: int = 0

    @classmethod
    def empty(cls, is_prefill: bool = False, num_steps: int = 1) -> "Batch":
        """A batch without rows."""
        return cls(is_prefill, [], [], [], [], num_steps)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def decodes(self, row: int) -> bool:
        """Whether a row computes a token that the device drew, and that the host may not know."""
        return not self.is_prefill or row < self.num_decodes

    def rounds(self, token_ids: list[list[int]]) -> list[tuple["Batch", list[int]]]:
        """Take the call apart into its steps.

        Args:
            token_ids: for each step the tokens that it sampled, one for each row.

        Returns:
            Each step as a batch of its own, and its tokens.
        """
        if self.num_steps == 1:
            return [(self, token_ids[0])]
        rounds = []
        for step, sampled in enumerate(token_ids):
            rows = [i for i, length in enumerate(self.lengths) if length > step]
            seqs, starts = [self.seqs[i] for i in rows], [self.starts[i] + step for i in rows]
            batch = Batch(False, seqs, starts, [1] * len(rows), [True] * len(rows))
            rounds.append((batch, [sampled[i] for i in rows]))
        return rounds

    def token_ids(self, rows: list[int]) -> list[int]:
        """The tokens that these rows compute, one row after another; for a prefill.

        In place of a token that the device drew there is 0.
        """
        token_ids: list[int] = []
        for i in rows:
            if self.decodes(i):
                token_ids.append(0)
                continue
            start = self.starts[i]
            token_ids += self.seqs[i].token_ids[start : start + self.lengths[i]]
        return token_ids

    def rows_of(self, shard: int) -> list[int]:
        """The rows whose sequences live in a shard of the batch."""
        return [i for i, seq in enumerate(self.seqs) if seq.shard == shard]


class Scheduler:
    """Queues of sequences, and the policy over them.

    Args:
        pools: the KV-cache blocks of each shard of the batch.
        max_num_seqs: sequences admitted at once; each holds one slot of the runner's tables.
        max_num_batched_tokens: tokens of one prefill batch at most, in each shard.
        max_prefill_seqs: most sequences in one prefill batch, in each shard.
        chunk: tokens and sequences of one prefill batch while others decode, in each shard; None:
            no other limits than these.
        mixed: the room for decode rows and chunks together in a mixed batch, in each shard: the
            first one in ascending order that has more rows than decode. Empty: no batch is mixed.
        eos_token_ids: tokens that end a sequence unless it ignores them.
    """

    def __init__(
        self,
        pools: list[BlockManager],
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_seqs: int,
        chunk: Bucket | None = None,
        mixed: Collection[Bucket] = (),
        eos_token_ids: Collection[int] = (),
    ):
        self.pools = pools
        self.largest = Bucket(max_num_batched_tokens, max_prefill_seqs)
        self.chunk, self.mixed = chunk, mixed
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting: deque[Sequence] = deque()  # at most one a shard is partly computed; first
        self.running: list[Sequence] = []  # in the order of admission
        shards = range(len(pools))
        self.free_slots = [list(range(s, max_num_seqs, len(pools)))[::-1] for s in shards]
        self.failed: list[Sequence] = []  # ended with an error since the last postprocess
        self.num_preemptions = 0
        self.decode_next = False
        self.quiet_rounds = 0  # for which decode steps are still taken one by one

    @property
    def is_finished(self) -> bool:
        return not (self.waiting or self.running or self.failed)

    def add(self, seq: Sequence) -> None:
        if self.running:
            self.quiet_rounds = QUIET_ROUNDS
        self.waiting.append(seq)

    def schedule(self, num_steps: int = 1) -> Batch | None:
        """Choose the next call's work; None if nothing can run before pending tokens are read.

        Args:
            num_steps: decode steps of the call, if they can be taken without the host.
        """
        if self.waiting and (room := self._mixed_room()):
            batch = self._schedule_mixed(room)
        elif self.decode_next:
            batch = self._schedule_decode(num_steps) or self._schedule_prefill()
        else:
            batch = self._schedule_prefill() or self._schedule_decode(num_steps)
        if batch:
            self.decode_next = batch.is_prefill
        return batch

    def postprocess(
        self, batch: Batch, token_ids: list[int], scores: StepScores | None = None
    ) -> list[Sequence]:
        """Take in a step's sampled tokens, one for each row, and the scores that it has computed.

        Returns:
            The sequences that got a token, and those that failed since the last call. Those that
            have ended have a `finish_reason`.
        """
        advanced, self.failed = self.failed, []
        rows = zip(batch.seqs, batch.yields_token, token_ids, strict=True)
        for row, (seq, yields_token, token_id) in enumerate(rows):
            if seq.finish_reason:  # it may have ended while this was in flight
                continue
            if scores and seq.wants_prompt_scores:
                seq.prompt_scores.update(scores.of_prompt(row))
            if not yields_token:
                continue
            if scores and seq.params.logprobs is not None:  # first: who sees a token sees its score
                seq.scores.append(scores.of_row(row, token_id, seq.params.logprobs))
            seq.in_flight -= 1
            if seq.matcher:
                seq.error = seq.matcher.advance(token_id)
            seq.finish_reason = "error" if seq.error else seq.end_with(token_id, self.eos_token_ids)
            seq.token_ids.append(token_id)  # second: whoever reads a last token reads the reason
            self.pools[seq.shard].cache_full_blocks(seq)
            if seq.finish_reason:
                self.finish(seq, seq.finish_reason)
            advanced.append(seq)
        return advanced

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence, whatever its state, and free what it holds.

        One of its rows may still be in flight, and write to blocks that later steps may have been
        given. That is harmless, because the device runs steps in order.
        """
        if seq.is_finished:
            return
        self._release(seq)
        seq.finish_reason = reason
        seq.status = Status.FINISHED  # last: whoever reads a finished sequence reads all of it

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        for pool in self.pools:
            pool.reset_prefix_cache()

    def preempt(self, seq: Sequence) -> None:
        """Take a sequence's blocks; it waits to be computed again, first of those without any."""
        self.num_preemptions += 1
        self._release(seq)
        seq.status = Status.WAITING
        partly_computed = itertools.takewhile(lambda other: other.block_table, self.waiting)
        self.waiting.insert(len(list(partly_computed)), seq)

    def recompute_all(self) -> None:
        """Take all blocks and forget tokens in flight; all that is admitted is computed again."""
        self.reset_prefix_cache()
        partly_computed = [seq for seq in self.waiting if seq.block_table]
        for seq in [*reversed(partly_computed), *reversed(self.running)]:
            self.preempt(seq)
        for seq in self.waiting:
            seq.in_flight = 0

    def _mixed_room(self) -> Bucket | None:
        """What a mixed batch may hold, if one can hold all that decodes and more."""
        decodes = Counter(seq.shard for seq in self.running if seq.num_wanted)
        most = max(decodes.values(), default=0)
        return next((room for room in self.mixed if room.num_rows > most), None)

    def _schedule_mixed(self, room: Bucket) -> Batch | None:
        """The decode rows, with chunks of prompts if any can run; without decode rows a prefill."""
        decodes = self._schedule_decode(num_steps=1)
        if not decodes:
            return self._schedule_prefill()
        batch = replace(decodes, is_prefill=True, num_decodes=len(decodes.seqs))
        taken = [len(decodes.rows_of(shard)) for shard in range(len(self.pools))]
        tokens_left = [room.num_tokens - n for n in taken]
        self._add_chunks(batch, tokens_left, [room.num_rows - n for n in taken])
        return batch if len(batch.seqs) > batch.num_decodes else decodes

    def _schedule_prefill(self) -> Batch | None:
        batch, room = Batch.empty(is_prefill=True), self.largest
        if self.chunk and any(seq.num_wanted for seq in self.running):
            room = self.chunk
        shards = len(self.pools)
        self._add_chunks(batch, [room.num_tokens] * shards, [room.num_rows] * shards)
        return batch if batch.seqs else None

    def _add_chunks(self, batch: Batch, tokens_left: list[int], rows_left: list[int]) -> None:
        """Put chunks of prompts into a batch, as many as have room in each shard."""
        for seq in list(itertools.islice(self.waiting, sum(rows_left))):
            open_shards = [s for s, n in enumerate(tokens_left) if n > 0 and rows_left[s] > 0]
            if not open_shards:
                break
            if not seq.block_table:  # it is not admitted yet
                if seq.in_flight:
                    break
                if self._outgrew_pool(seq):
                    self._fail(seq)
                    continue
                if not self._admit(seq, open_shards):
                    break
            length = min(seq.num_tokens - seq.num_computed, tokens_left[seq.shard])
            tokens_left[seq.shard] -= length
            rows_left[seq.shard] -= 1
            completes = seq.num_computed + length == seq.num_tokens
            self._add_row(batch, seq, length, completes)
            if completes:
                seq.status = Status.RUNNING
                self.waiting.remove(seq)  # it is among the first, so this is quick
                self.running.append(seq)

    def _schedule_decode(self, num_steps: int) -> Batch | None:
        self.quiet_rounds = max(0, self.quiet_rounds - 1)
        if num_steps > 1 and not self._can_take(num_steps):
            num_steps = 1
        batch = Batch.empty(num_steps=num_steps)
        for seq in list(self.running):
            if seq.status is not Status.RUNNING or not seq.num_wanted:
                continue  # preempted in this round, or its last token is in flight
            length = min(num_steps, seq.num_wanted)
            if self._make_room(seq, length):
                self._add_row(batch, seq, length, True)
        return batch if batch.seqs else None

    def _can_take(self, num_steps: int) -> bool:
        """Whether nothing can come between this many decode steps that needs the host."""
        if self.waiting or self.quiet_rounds:
            return False
        blocks_left = [pool.num_free_blocks for pool in self.pools]
        longest = 0
        for seq in self.running:
            length = min(num_steps, seq.num_wanted)
            blocks_needed = self.pools[seq.shard].blocks_for(seq.num_computed + length)
            blocks_left[seq.shard] -= max(0, blocks_needed - len(seq.block_table))
            longest = max(longest, length)
            if seq.params.filters or seq.needs_sample_all:  # a program between its steps
                return False
        return longest == num_steps and min(blocks_left) >= 0

    def _outgrew_pool(self, seq: Sequence) -> bool:
        """Whether a sequence, which has grown and been preempted, can never be computed again."""
        pool = self.pools[0]
        return pool.blocks_for(seq.num_tokens) > len(pool.blocks)

    def _admit(self, seq: Sequence, shards: list[int]) -> bool:
        """Give a waiting sequence a slot and blocks for all of its tokens in one of `shards`."""
        shards = [shard for shard in shards if self.free_slots[shard]]
        if len(shards) > 1:
            shards.sort(key=lambda s: self._preference(seq, s), reverse=True)
        for shard in shards:
            if self.pools[shard].allocate(seq):
                seq.shard, seq.slot = shard, self.free_slots[shard].pop()
                return True
        return False

    def _preference(self, seq: Sequence, shard: int) -> tuple[int, int, int]:
        """Orders shards: most of the sequence cached, then most slots, then most blocks free."""
        pool = self.pools[shard]
        return pool.num_cached(seq), len(self.free_slots[shard]), pool.num_free_blocks

    def _make_room(self, seq: Sequence, length: int) -> bool:
        """Blocks for the sequence's next tokens, preempting the newest others if need be."""
        while not self.pools[seq.shard].append(seq, length):
            victim = self._newest(seq.shard)
            if victim is not seq:
                self.preempt(victim)
                continue
            if seq is not next(s for s in self.running if s.shard == seq.shard):
                self.preempt(seq)  # the older ones go on and will free blocks
            elif not seq.in_flight:  # a token in flight may be its last: wait for it
                self._fail(seq)
            return False
        return True

    def _newest(self, shard: int) -> Sequence:
        """A shard's last admitted sequence: a partly computed prompt, or else the last to run."""
        partly = (seq for seq in self.waiting if seq.block_table and seq.shard == shard)
        running = (seq for seq in reversed(self.running) if seq.shard == shard)
        return next(partly, None) or next(running)

    def _fail(self, seq: Sequence) -> None:
        pool = self.pools[seq.shard]
        seq.error = (
            f"the sequence outgrew the KV cache: {seq.num_tokens} tokens need "
            f"{pool.blocks_for(seq.num_tokens)} blocks of {pool.block_size}, "
            f"the pool has {len(pool.blocks)}; raise num_kvcache_blocks or "
            f"gpu_memory_utilization, or lower max_tokens"
        )
        self.finish(seq, "error")
        self.failed.append(seq)

    def _add_row(self, batch: Batch, seq: Sequence, length: int, yields_token: bool) -> None:
        """Put the next `length` tokens of a sequence into a batch."""
        batch.seqs.append(seq)
        batch.starts.append(seq.num_computed)
        batch.lengths.append(length)
        batch.yields_token.append(yields_token)
        seq.num_computed += length
        seq.in_flight += yields_token if batch.is_prefill else length
        # Readers may be in this very step: every layer writes keys and values before it attends.
        self.pools[seq.shard].cache_full_blocks(seq)

    def _release(self, seq: Sequence) -> None:
        """Take a sequence out of its queue, and from it what it holds."""
        (self.running if seq.status is Status.RUNNING else self.waiting).remove(seq)
        self.pools[seq.shard].free(seq)
        if seq.slot != NO_SLOT:
            self.free_slots[seq.shard].append(seq.slot)
            seq.slot = NO_SLOT
