"""The scheduler and the block manager together, without a device: policy, and a random machine.

The machine's device is a dictionary from (block, offset) to the tokens that position stands for,
written in the order in which steps are dispatched. A step may be read only after the next one was
dispatched, as the engine does. What each row finds in the cache below its context must be its own
sequence's tokens, and the outputs must be those of a naive loop over one sequence.
"""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from nanovllm_jax.engine.block_manager import BlockManager
from nanovllm_jax.engine.buckets import Bucket
from nanovllm_jax.engine.scheduler import QUIET_ROUNDS, Batch, Scheduler
from nanovllm_jax.engine.sequence import NO_SLOT, Sequence, Status
from nanovllm_jax.sampling_params import SamplingParams

EOS = 0
BLOCK = 4


def make_scheduler(
    num_blocks=8,
    *,
    max_num_seqs=4,
    max_tokens=32,
    max_prefill_seqs=4,
    chunk=None,
    mixed=(),
    eos=(EOS,),
):
    return Scheduler(
        [BlockManager(num_blocks, BLOCK)],
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        max_prefill_seqs=max_prefill_seqs,
        chunk=chunk,
        mixed=mixed,
        eos_token_ids=eos,
    )


def make_seq(seq_id, token_ids, max_tokens=8, **params):
    if isinstance(token_ids, int):
        token_ids = range(100 * seq_id + 1, 100 * seq_id + 1 + token_ids)
    params = SamplingParams(max_tokens=max_tokens, **params)
    return Sequence(seq_id, list(token_ids), params, seed=seq_id, max_tokens=max_tokens)


def add(scheduler, *args, **kwargs):
    seq = make_seq(*args, **kwargs)
    scheduler.add(seq)
    return seq


def step(scheduler, token=9):
    """Run a synchronous round in which every row samples `token`; return (batch, ended)."""
    batch = scheduler.schedule() or Batch.empty()
    return batch, read(scheduler, batch, [token] * len(batch.seqs))


def read(scheduler, batch, token_ids):
    """Read a step's tokens; return the sequences that have ended."""
    return [seq for seq in scheduler.postprocess(batch, token_ids) if seq.is_finished]


def rows(batch):
    return [
        (seq.seq_id, start, length)
        for seq, start, length in zip(batch.seqs, batch.starts, batch.lengths, strict=True)
    ]


# --- policy ---


def test_prompts_are_packed_up_to_the_budget_and_cut():
    scheduler = make_scheduler(num_blocks=20, max_tokens=10)
    for i, n in enumerate((4, 3, 8)):
        add(scheduler, i, n)
    batch = scheduler.schedule()
    assert batch.is_prefill and batch.num_tokens == 10
    assert rows(batch) == [(0, 0, 4), (1, 0, 3), (2, 0, 3)]
    assert batch.yields_token == [True, True, False]


def test_a_cut_prompt_goes_on_where_it_stopped():
    scheduler = make_scheduler(num_blocks=20, max_tokens=10)
    seq = add(scheduler, 0, 25)
    starts = []
    while seq.status is Status.WAITING:
        batch, _ = step(scheduler)
        starts += rows(batch)
    assert starts == [(0, 0, 10), (0, 10, 10), (0, 20, 5)]
    assert seq.completion_token_ids == [9]


def test_decode_takes_every_running_sequence():
    scheduler = make_scheduler()
    for i in range(3):
        add(scheduler, i, 3)
    step(scheduler)
    batch, _ = step(scheduler)
    assert not batch.is_prefill
    assert rows(batch) == [(0, 3, 1), (1, 3, 1), (2, 3, 1)]


def test_prefill_and_decode_alternate_while_both_wait():
    scheduler = make_scheduler(num_blocks=40, max_num_seqs=20, max_tokens=4)
    for i in range(8):
        add(scheduler, i, 4, max_tokens=16)
    kinds = [step(scheduler)[0].is_prefill for _ in range(14)]
    assert kinds == [True, False] * 7


def test_prefills_are_smaller_while_sequences_decode():
    scheduler = make_scheduler(num_blocks=40, max_num_seqs=9, max_tokens=16, chunk=Bucket(3, 2))
    runs = add(scheduler, 0, 4, max_tokens=5)
    for i, n in enumerate((20, 1, 1, 1), start=1):
        add(scheduler, i, n, max_tokens=1)
    batches = [step(scheduler)[0] for _ in range(8)]
    assert [rows(batch) for batch in batches[::2]] == [
        [(0, 0, 4), (1, 0, 12)],  # nobody decodes yet
        [(1, 12, 3)],
        [(1, 15, 3)],
        [(1, 18, 2), (2, 0, 1)],
    ]
    assert all(batch.seqs == [runs] for batch in batches[1::2]) and runs.is_finished
    add(scheduler, 5, 20, max_tokens=1)
    assert rows(step(scheduler)[0]) == [(3, 0, 1), (4, 0, 1), (5, 0, 14)]  # nobody does any more


def test_a_sequence_whose_last_token_is_in_flight_keeps_no_prefill_small():
    scheduler = make_scheduler(num_blocks=40, max_tokens=16, chunk=Bucket(3, 2))
    for i in range(2):
        add(scheduler, i, 16, max_tokens=1)
    assert [rows(scheduler.schedule()) for _ in range(2)] == [[(0, 0, 16)], [(1, 0, 16)]]


def test_a_mixed_batch_has_the_decode_rows_first_and_chunks_in_the_rest_of_its_room():
    rooms = [Bucket(8, 3, True), Bucket(10, 5, True)]
    scheduler = make_scheduler(num_blocks=80, max_num_seqs=9, max_tokens=16, mixed=rooms)
    for i, n in enumerate((2, 2, 20, 4, 1, 1)):
        add(scheduler, i, n, max_tokens=9)
    batches = [step(scheduler)[0] for _ in range(6)]
    assert [rows(batch) for batch in batches] == [
        [(0, 0, 2), (1, 0, 2), (2, 0, 12)],  # nobody decodes yet
        [(0, 2, 1), (1, 2, 1), (2, 12, 6)],
        [(0, 3, 1), (1, 3, 1), (2, 18, 2)],  # three rows are all that this room has
        [(0, 4, 1), (1, 4, 1), (2, 20, 1), (3, 0, 4), (4, 0, 1)],
        # Five decode, and no room has more rows: the rounds alternate, as without mixing.
        [(0, 5, 1), (1, 5, 1), (2, 21, 1), (3, 4, 1), (4, 1, 1)],
        [(5, 0, 1)],
    ]
    assert [batch.num_decodes for batch in batches] == [0, 2, 2, 3, 0, 0]
    assert [batch.is_prefill for batch in batches] == [True] * 4 + [False, True]
    assert [batch.yields_token for batch in batches[1:3]] == [[True] * 2 + [False], [True] * 3]


def test_without_room_for_a_prompt_a_batch_is_no_mixed_one():
    scheduler = make_scheduler(num_blocks=2, mixed=[Bucket(8, 4, True)])
    add(scheduler, 0, 4, max_tokens=4)
    step(scheduler)
    add(scheduler, 1, 5)
    batch, _ = step(scheduler)
    assert not batch.is_prefill and batch.num_decodes == 0 and rows(batch) == [(0, 4, 1)]


def test_a_mixed_batch_is_planned_before_the_last_tokens_are_known():
    """The device has them: one call is always ahead of what the host has read."""
    scheduler = make_scheduler(num_blocks=40, mixed=[Bucket(4, 2, True)])
    runs = add(scheduler, 0, 3, max_tokens=9)
    batches = [scheduler.schedule()]
    new = add(scheduler, 1, 6, max_tokens=3)
    batches += [scheduler.schedule() for _ in range(4)]
    assert [rows(batch) for batch in batches[1:]] == [
        [(0, 3, 1), (1, 0, 3)],
        [(0, 4, 1), (1, 3, 3)],
        [(0, 5, 1), (1, 6, 1)],
        [(0, 6, 1), (1, 7, 1)],
    ]
    assert batches[1].token_ids([0, 1]) == [0, *new.token_ids[:3]], "0: only the device knows"
    for batch in batches:
        read(scheduler, batch, [9] * len(batch.seqs))
    assert runs.completion_token_ids == [9] * 5 and new.is_finished


def test_decode_is_not_starved_by_arriving_prompts():
    """nano-vLLM #73: running sequences waited as long as prompts arrived."""
    scheduler = make_scheduler(num_blocks=40, max_tokens=16)
    runs = add(scheduler, 0, 3, max_tokens=30)
    seq_id, turns = 0, []
    while not runs.is_finished:
        if len(scheduler.waiting) < 2:
            add(scheduler, seq_id := seq_id + 1, 15, max_tokens=1)
        turns.append(runs in step(scheduler)[0].seqs)
    assert "".join(".x"[turn] for turn in turns) == "xx" + ".x" * 28
    assert seq_id > 20


def test_batches_are_in_the_order_of_arrival():
    """mini-sglang #111: batches came in the order of a set."""
    scheduler = make_scheduler(num_blocks=20)
    for i, n in enumerate((9, 3, 7, 5)):
        add(scheduler, i, n, max_tokens=5)
    while not scheduler.is_finished:
        assert [seq.seq_id for seq in step(scheduler)[0].seqs] == [0, 1, 2, 3]


def test_no_more_than_max_num_seqs_are_admitted_in_order():
    scheduler = make_scheduler(num_blocks=40, max_num_seqs=2)
    seqs = [add(scheduler, i, 3, max_tokens=2) for i in range(4)]
    assert [seq.seq_id for seq in step(scheduler)[0].seqs] == [0, 1]
    _, finished = step(scheduler)
    assert finished == seqs[:2]
    assert [seq.seq_id for seq in step(scheduler)[0].seqs] == [2, 3]


def test_a_prefill_batch_holds_no_more_than_max_prefill_seqs():
    scheduler = make_scheduler(num_blocks=40, max_num_seqs=20, max_prefill_seqs=3)
    for i in range(5):
        add(scheduler, i, 2)
    assert len(scheduler.schedule().seqs) == 3


def test_the_newest_is_preempted_and_the_oldest_goes_on():
    scheduler = make_scheduler(num_blocks=2)
    old, new = add(scheduler, 0, 4), add(scheduler, 1, 3)
    step(scheduler)
    batch, _ = step(scheduler)  # old needs its second block
    assert batch.seqs == [old]
    assert new.status is Status.WAITING and not new.block_table and new.slot == NO_SLOT
    assert new.num_tokens == 4  # it keeps the token that it had


def test_a_preempted_sequence_waits_first_and_resumes_with_its_tokens():
    scheduler = make_scheduler(num_blocks=2)
    old, new = add(scheduler, 0, 4, max_tokens=3), add(scheduler, 1, 3)
    add(scheduler, 2, 3)
    step(scheduler)
    while not old.is_finished:
        step(scheduler)
    assert scheduler.waiting[0] is new
    batch, _ = step(scheduler)
    assert batch.is_prefill and rows(batch)[0] == (1, 0, 4)
    assert new.completion_token_ids == [9, 9]


def test_a_sequence_that_outgrows_the_pool_fails_alone():
    """nano-vLLM #274, #277: the engine asserted or hung."""
    scheduler = make_scheduler(num_blocks=2)
    big, small = add(scheduler, 0, 7, max_tokens=20), add(scheduler, 1, 2, max_tokens=3)
    ended = []
    while not scheduler.is_finished:
        ended += step(scheduler)[1]
    assert len(ended) == 2 and set(ended) == {big, small}
    assert (big.finish_reason, small.finish_reason) == ("error", "length")
    assert "9 tokens need 3 blocks of 4, the pool has 2" in big.error
    assert small.error is None and small.completion_token_ids == [9] * 3
    scheduler.pools[0].check([])


def test_a_token_in_flight_may_be_the_last_that_fits():
    """Reading a step late must not fail a sequence that ends with the unread token."""
    scheduler = make_scheduler(num_blocks=1)
    seq = add(scheduler, 0, 3, max_tokens=2)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert scheduler.schedule() is None
    scheduler.postprocess(first, [9])
    assert scheduler.postprocess(second, [9]) == [seq]
    assert seq.error is None and scheduler.is_finished


def test_a_token_in_flight_may_be_eos_and_save_the_sequence():
    scheduler = make_scheduler(num_blocks=1)
    seq = add(scheduler, 0, 3, max_tokens=8)
    first = scheduler.schedule()
    second = scheduler.schedule()  # position 3, the last of the pool
    scheduler.postprocess(first, [9])
    assert scheduler.schedule() is None and not scheduler.failed
    assert scheduler.postprocess(second, [EOS]) == [seq]
    assert seq.error is None


def test_a_row_of_a_sequence_that_has_ended_is_dropped():
    scheduler = make_scheduler()
    seq, other = add(scheduler, 0, 3), add(scheduler, 1, 3)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.postprocess(first, [EOS, 9]) == [seq, other], "both got a token"
    assert scheduler.postprocess(second, [8, 8]) == [other]
    assert seq.completion_token_ids == [EOS]
    assert other.completion_token_ids == [9, 8]


@pytest.mark.parametrize(
    ("params", "sampled", "length"),
    [
        ({}, [5, EOS, 5], 2),
        ({"ignore_eos": True}, [5, EOS, 5, 5], 4),
        ({"stop_token_ids": [7]}, [5, 7, 5], 2),
        ({"stop_token_ids": [7], "ignore_eos": True}, [EOS, 7, 5], 2),
        ({"max_tokens": 1}, [5], 1),
    ],
)
def test_where_a_sequence_ends(params, sampled, length):
    scheduler = make_scheduler()
    seq = add(scheduler, 0, 3, **({"max_tokens": 4} | params))
    for token in sampled[:length]:
        assert not seq.is_finished
        step(scheduler, token)
    assert seq.is_finished and seq.completion_token_ids == sampled[:length]
    last = sampled[length - 1]
    assert seq.finish_reason == ("stop" if last in (EOS, 7) and length < 4 else "length")
    assert seq.stop_reason == (7 if last == 7 else None)


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_abort_frees_everything_whatever_the_state(rounds):
    scheduler = make_scheduler(num_blocks=4, max_tokens=8)
    seq, other = add(scheduler, 0, 9), add(scheduler, 1, 3)
    for _ in range(rounds):
        step(scheduler)
    scheduler.finish(seq, "abort")
    scheduler.finish(seq, "error")
    assert seq.finish_reason == "abort"
    scheduler.pools[0].check([other])
    while not scheduler.is_finished:
        step(scheduler)
    assert len(other.completion_token_ids) == 8
    assert sorted(scheduler.free_slots[0]) == list(range(4))


# --- several decode steps in a call ---


def decoding(count=2, tokens=3, num_blocks=20, **options):
    """A scheduler with sequences that have computed their prompts, and drawn a token."""
    scheduler = make_scheduler(num_blocks)
    seqs = [add(scheduler, i, tokens, **({"max_tokens": 12} | options)) for i in range(count)]
    step(scheduler)
    return scheduler, seqs


def test_a_call_may_take_several_decode_steps_of_every_sequence():
    scheduler, (a, b) = decoding()
    b.max_tokens = 3  # it has drawn one
    batch = scheduler.schedule(4)
    assert batch.num_steps == 4 and rows(batch) == [(0, 3, 4), (1, 3, 2)]
    assert (a.in_flight, b.in_flight) == (4, 2)
    assert len(a.block_table) == 2, "room for all of its steps"
    counts = []
    for part, token_ids in batch.rounds([[5, 6], [7, 8], [9, -1], [10, -1]]):
        counts.append(len(part.seqs))
        scheduler.postprocess(part, token_ids)
    assert counts == [2, 2, 1, 1]
    assert a.completion_token_ids == [9, 5, 7, 9, 10]
    assert b.completion_token_ids == [9, 6, 8] and b.finish_reason == "length"


def test_steps_behind_the_end_of_a_sequence_are_dropped():
    scheduler, (a, b) = decoding()
    first, second = scheduler.schedule(4), scheduler.schedule(4)
    for part, token_ids in first.rounds([[5, 5], [EOS, 5], [6, 5], [6, 5]]):
        scheduler.postprocess(part, token_ids)
    assert a.completion_token_ids == [9, 5, EOS] and a.is_finished
    for part, token_ids in second.rounds([[7, 6]] * 4):
        assert scheduler.postprocess(part, token_ids) == [b]
    assert b.completion_token_ids == [9, 5, 5, 5, 5, 6, 6, 6, 6]
    scheduler.pools[0].check([b])


def test_steps_are_taken_one_by_one_while_somebody_waits():
    scheduler, _ = decoding(count=4)
    add(scheduler, 4, 3)  # no slot is free
    assert scheduler.schedule(4).num_steps == 1


def test_steps_are_taken_one_by_one_for_a_while_after_an_arrival():
    """The next one to arrive waits for one step, not for a long call."""
    scheduler, _ = decoding(max_tokens=1000, num_blocks=600)
    add(scheduler, 2, 3, max_tokens=1000)
    batches = [scheduler.schedule(4) for _ in range(QUIET_ROUNDS + 2)]
    sizes = [batch.num_steps for batch in batches if not batch.is_prefill]
    assert sizes == [1] * (QUIET_ROUNDS - 1) + [4] * 2


def test_requests_that_come_together_do_not_keep_each_other_waiting():
    scheduler, _ = decoding(count=4)
    assert scheduler.schedule(4).num_steps == 4


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 4},  # three are left: a call of four would compute for nobody
        {"top_k": 5},  # `sample` comes between
        {"num_blocks": 3},  # each has a block with one position left, and would need another
    ],
)
def test_steps_are_taken_one_by_one_where_the_host_is_needed(options):
    scheduler, _ = decoding(**options)
    batch = scheduler.schedule(4)
    assert batch.num_steps == 1 and batch.lengths == [1, 1]


# --- a random machine ---


def next_token(prefix, vocab):
    """What the naive model says after these tokens; EOS now and then."""
    state = 17
    for token in prefix:
        state = (state * 1103515245 + token * 12345 + 6789) % 2**31
    return (state >> 7) % vocab


def naive(prompt, seq, vocab):
    """The completion that a loop over this one sequence gives."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < seq.max_tokens:
        tokens.append(next_token(tokens, vocab))
        if tokens[-1] in seq.params.stop_token_ids:
            break
        if tokens[-1] == EOS and not seq.params.ignore_eos:
            break
    return tokens[len(prompt) :]


class EngineMachine(RuleBasedStateMachine):
    """Random requests, steps read late or at once, aborts, resets and steps that fail.

    Among what this finds: blocks freed twice by abort and finish (mini-sglang #113), stale hashes
    of reused blocks (nano-vLLM #163), and tokens that are lost when a preempted sequence is
    computed again (#217).
    """

    @initialize(
        num_blocks=st.integers(2, 9),
        max_num_seqs=st.integers(1, 4),
        max_tokens=st.integers(5, 24),
        max_prefill_seqs=st.integers(1, 4),
        chunk=st.none() | st.builds(Bucket, st.integers(1, 6), st.integers(1, 3)),
        mixed=st.sets(st.integers(1, 5)),
        vocab=st.sampled_from([2, 3, 20]),
    )
    def start(self, num_blocks, max_num_seqs, max_tokens, max_prefill_seqs, chunk, mixed, vocab):
        self.scheduler = make_scheduler(
            num_blocks,
            max_num_seqs=max_num_seqs,
            max_tokens=max_tokens,
            max_prefill_seqs=max_prefill_seqs,
            chunk=chunk,
            mixed=[Bucket(2 * n, n, True) for n in sorted(mixed)],
        )
        self.books = self.scheduler.pools[0]
        self.max_num_seqs, self.vocab = max_num_seqs, vocab
        self.seqs, self.prompts, self.ended, self.aborted = [], {}, [], set()
        self.in_flight = []  # dispatched and not yet read: (batch, tokens)
        self.cache = {}  # (block, offset) -> the tokens up to and with that position
        self.last_token = {}  # slot -> token, on the device
        self.known = {}  # seq -> its tokens, as the device knows them
        self.computed = {}  # seq -> tokens computed in this life
        self.sound = True  # no assertion has failed
        self.after_prefill = False
        self.preempted = []
        preempt = self.scheduler.preempt

        def recording(seq):
            self.preempted.append(seq)
            self.computed.pop(seq, None)
            preempt(seq)

        self.scheduler.preempt = recording

    # Prompts that share prefixes: a few base texts over few tokens, cut and continued.
    @rule(
        base=st.integers(0, 2),
        length=st.integers(1, 17),
        tail=st.lists(st.integers(1, 3), max_size=3),
        max_tokens=st.integers(1, 14),
        ignore_eos=st.booleans(),
        stop=st.sampled_from([(), (1,)]),
    )
    def add(self, base, length, tail, max_tokens, ignore_eos, stop):
        prompt = [1 + (base * (i % 5 + 1) + i) % 3 for i in range(length)] + tail
        prompt = prompt[: len(self.books.blocks) * BLOCK]  # the engine refuses longer ones
        seq = make_seq(
            len(self.seqs), prompt, max_tokens, ignore_eos=ignore_eos, stop_token_ids=stop
        )
        self.prompts[seq], self.known[seq] = prompt, list(prompt)
        self.seqs.append(seq)
        self.scheduler.add(seq)

    @precondition(lambda self: len(self.in_flight) < 2)
    @rule(num_steps=st.integers(1, BLOCK))
    def dispatch(self, num_steps):
        scheduler, self.sound = self.scheduler, False
        decodable = [seq for seq in scheduler.running if seq.num_wanted]
        half_done = next((seq for seq in scheduler.waiting if seq.block_table), None)
        rooms = [room for room in scheduler.mixed if room.num_rows > len(decodable)]
        room = rooms[0] if rooms and scheduler.waiting else None
        self.preempted = []
        free = self.books.num_free_blocks
        quiet = scheduler.quiet_rounds
        waiting = bool(scheduler.waiting)
        wanted = [min(num_steps, seq.num_wanted) for seq in decodable]
        batch = scheduler.schedule(num_steps)
        if batch is None:
            if not self.in_flight:
                self.collect(scheduler.postprocess(Batch.empty(), []))
            self.sound = True
            return
        if not batch.is_prefill or self.after_prefill or room:
            self.check_all_decode(decodable, batch)
        if half_done and (not self.after_prefill or (room and half_done not in self.preempted)):
            assert batch.is_prefill, "prefill starves"
        self.after_prefill = batch.is_prefill
        decodes = [s for s in decodable if s not in self.preempted and not s.is_finished]
        self.check_limits(batch, (room or scheduler.chunk) if decodes else None)
        assert not batch.num_decodes or room
        if batch.num_steps > 1:
            assert not waiting and quiet <= 1 and batch.num_steps == num_steps
            assert batch.lengths == wanted and max(wanted) == num_steps and not self.preempted
            assert self.books.num_free_blocks <= free
        self.in_flight.append((batch, self.execute(batch)))
        self.sound = True

    @precondition(lambda self: self.in_flight)
    @rule()
    def read(self):
        """Read a call, and take in its steps one after another."""
        batch, token_ids = self.in_flight.pop(0)
        for step in batch.rounds(token_ids):
            self.collect(self.scheduler.postprocess(*step))

    @rule(rounds=st.integers(1, 6), num_steps=st.integers(1, BLOCK))
    def run_one_ahead(self, rounds, num_steps):
        for _ in range(rounds):
            while len(self.in_flight) < 2:
                before = len(self.in_flight)
                self.dispatch(num_steps)
                if len(self.in_flight) == before:
                    break
            if self.in_flight:
                self.read()

    @rule()
    def nothing_arrives_for_a_while(self):
        self.scheduler.quiet_rounds = 0

    @precondition(lambda self: self.seqs)
    @rule(data=st.data())
    def abort(self, data):
        seq = data.draw(st.sampled_from(self.seqs))
        if not seq.is_finished:
            self.aborted.add(seq)
        self.scheduler.finish(seq, "abort")

    @rule()
    def reset_prefix_cache(self):
        self.books.reset_prefix_cache()

    @rule(while_reading=st.booleans())
    def a_round_fails(self, while_reading):
        """A step is lost between its schedule and the device, or with what the device knew."""
        if not while_reading and len(self.in_flight) < 2:
            self.scheduler.schedule()
        self.scheduler.recompute_all()
        self.in_flight, self.after_prefill = [], self.scheduler.decode_next
        for lost in (self.cache, self.last_token, self.computed):
            lost.clear()
        self.known = {seq: list(seq.token_ids) for seq in self.seqs}

    @invariant()
    def books_balance(self):
        if self.seqs:
            self.books.check([seq for seq in self.seqs if seq.block_table])
            for block in self.books.cached.values():
                held = [self.cache[block.block_id, i] for i in range(BLOCK)]
                assert list(block.content.tokens) == self.tokens_bytes(held), (
                    "cached before it is written"
                )

    def teardown(self):
        if not getattr(self, "sound", False):
            return
        for _ in range(3000):
            if self.scheduler.is_finished and not self.in_flight:
                break
            self.run_one_ahead(1, BLOCK)
            self.books_balance()
        assert self.scheduler.is_finished, "the machine does not come to an end"
        assert sorted(map(id, self.ended)) == sorted(
            id(seq) for seq in self.seqs if seq not in self.aborted
        ), "a sequence is reported never or twice"
        for seq in self.ended:
            want = naive(self.prompts[seq], seq, self.vocab)
            if seq.error:
                assert seq.completion_token_ids == want[: seq.num_completion_tokens]
            else:
                assert seq.completion_token_ids == want
            assert seq.finish_reason == self.reason(seq)
        self.books.check([])
        assert self.books.num_free_blocks == len(self.books.blocks)
        assert sorted(self.scheduler.free_slots[0]) == list(range(self.max_num_seqs))

    @staticmethod
    def reason(seq):
        """Why a sequence should have ended."""
        if seq.error:
            return "error"
        ends = {*seq.params.stop_token_ids, *([] if seq.params.ignore_eos else [EOS])}
        return "stop" if seq.token_ids[-1] in ends else "length"

    # The parts of a step.

    def execute(self, batch):
        """Run a batch on the device that is a dictionary; returns each step's tokens."""
        if batch.is_prefill:
            return [self.execute_step(batch)]
        sampled = []
        for step in range(batch.num_steps):  # as `decode_steps`
            row_of = {seq: i for i, seq in enumerate(batch.seqs) if batch.lengths[i] > step}
            (part, _) = batch.rounds([[0] * len(batch.seqs)] * batch.num_steps)[step]
            assert part.seqs == [*row_of]
            tokens = dict(zip(part.seqs, self.execute_step(part), strict=True))
            sampled.append([tokens.get(seq, -1) for seq in batch.seqs])
        return sampled

    def execute_step(self, batch):
        work = []
        rows = zip(batch.seqs, batch.starts, batch.lengths, strict=True)
        for i, (seq, start, length) in enumerate(rows):
            if seq in self.computed:
                assert start == self.computed[seq], "a gap or a token computed twice"
            else:  # a new life begins
                assert start == min(seq.num_cached, seq.num_tokens - 1)
            self.computed[seq] = start + length
            known = self.known[seq]
            if not batch.decodes(i):
                row = seq.token_ids[start : start + length]
            else:
                row = [self.last_token[seq.slot]]
            assert row == known[start : start + length], "not the sequence's own tokens"
            work.append((seq, start, start + length, known))
        for seq, start, end, known in work:  # every layer writes before it attends
            for position in range(max(start, seq.num_cached), end):
                self.cache[self.place(seq, position)] = tuple(known[: position + 1])
        tokens = []
        for (seq, _, end, known), samples in zip(work, batch.yields_token, strict=True):
            for position in range(end):
                found = self.cache.get(self.place(seq, position))
                assert found == tuple(known[: position + 1]), "another's keys and values"
            token = next_token(known[:end], self.vocab)
            tokens.append(token)
            self.last_token[seq.slot] = token
            if samples:
                assert len(known) == end, "a token sampled twice"
                known.append(token)
            else:
                assert end < seq.num_tokens
        return tokens

    @staticmethod
    def place(seq, position):
        return seq.block_table[position // BLOCK], position % BLOCK

    @staticmethod
    def tokens_bytes(held):
        from array import array

        return list(array("i", [prefix[-1] for prefix in held]).tobytes())

    def check_limits(self, batch, chunk):
        assert batch.seqs and all(n > 0 for n in batch.lengths)
        assert len({id(seq) for seq in batch.seqs}) == len(batch.seqs)
        if batch.is_prefill:
            room = chunk or self.scheduler.largest
            assert batch.num_tokens <= room.num_tokens and len(batch.seqs) <= room.num_rows
        else:
            assert all(n <= batch.num_steps for n in batch.lengths) and all(batch.yields_token)
        slots = [seq.slot for seq in self.seqs if seq.slot != NO_SLOT]
        assert len(set(slots)) == len(slots) <= self.max_num_seqs
        assert all(0 <= slot < self.max_num_seqs for slot in slots)
        assert all(seq.slot != NO_SLOT for seq in batch.seqs)
        for seq, start, n in zip(batch.seqs, batch.starts, batch.lengths, strict=True):
            assert len(seq.block_table) >= self.books.blocks_for(start + n)

    def check_all_decode(self, decodable, batch):
        """A running sequence sits out its turn only for want of a block."""
        decoding = [seq for i, seq in enumerate(batch.seqs) if batch.decodes(i)]
        for seq in decodable:
            waits = self.books.num_free_blocks == 0 and seq.in_flight > 0
            no_block = waits or seq.error or seq in self.preempted
            assert seq in decoding or no_block, "decode starves"

    def collect(self, advanced):
        for seq in advanced:
            assert seq not in self.aborted
            if not seq.is_finished:
                continue
            self.ended.append(seq)
            if seq.error:
                assert self.books.blocks_for(seq.num_tokens) > len(self.books.blocks)


EngineMachine.TestCase.settings = settings(
    max_examples=500,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
TestEngineMachine = EngineMachine.TestCase
