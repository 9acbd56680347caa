"""How GPUs exchange words through their mailboxes: the mailboxes' layout, and the PTX.

Every GPU knows the addresses of its peers' mailboxes, and writes there:

    addresses [peers]                      the peers' mailboxes, 8 bytes each
    calls     [slots]                      how often each slot has been used
    data      [2, peers, slots, block]     by the sender: this call's words, and the last one's

A program owns one slot, or two next to each other, and exchanges with the programs of the same slot
on the other GPUs. Each word is sent beside the number of the call, and a reader looks until it
finds that number beside every word. (NCCL calls this protocol LL.) A pair of words arrives as one,
so there is nothing else to wait for: no barrier, no flag, no order between stores.

In **one crossing** of the link a program sends its words to all, and combines what all have sent.
Each GPU sends n - 1 copies of its array.

In **two crossings** every warp's words have an owner among the GPUs. They are sent to their owner
alone, which combines what all have sent and sends the result to all. That is a reduce-scatter and
an all-gather: each GPU sends 2 (n - 1) / n copies. A result comes to the place of its owner's
words, which is free: only an owner is sent words, and it needs no result from itself.

**Why two halves of the data are enough.** They take turns by the number of the call. What a GPU
writes into a half in call k + 2 must not meet a reader of call k there. Nobody ends a call before
it has a word of that call from every peer, or an owner's result, for which the owner had one from
every peer. A peer sends such words only after its kernel of the call before has ended, and with it
all its reading. So whoever has ended call k + 1, and begins call k + 2, knows that all have ended
call k. A fast GPU may be one call ahead of a slow one, never two, and this holds for each slot
alone, however calls of one and of two crossings, and of different sizes, follow each other.

**More programs than a GPU has room for** are started in their order, as the ones before them end.
So the first one that has not ended everywhere has been started everywhere, and finds its peers.
"""

from collections.abc import Callable
from typing import NamedTuple

# Words of 4 bytes in a slot, and so per program at most; a thread loads four at a time. On two
# H200s the small sums of decoding took 5.1 us (2 KiB) and 8.5 us (160 KiB) with 2,048, and 9.0 and
# 9.8 us with 512. From 640 KiB on, 512 was faster: 10.0 against 11.1 us.
MAX_BLOCK = 2048
# Words of a warp: 32 threads have four each. In two crossings they have the same owner, so that the
# threads of a warp do not part ways.
WARP_WORDS = 128
# Seconds that a program waits for its peers. They start together but for what delays a healthy GPU:
# another queue, a module's first load.
_LIMIT_SECONDS = 20
# Rounds of waiting between two looks at the clock: some milliseconds. A healthy peer needs a few.
_ROUNDS_PER_LOOK = 4096

_WORDS = ["w0", "w1", "w2", "w3"]


class Layout(NamedTuple):
    """The byte offsets of a mailbox's parts."""

    peers: int
    max_words: int

    @property
    def slots(self) -> int:
        return self.max_words // MAX_BLOCK

    @property
    def calls(self) -> int:
        return 8 * self.peers

    @property
    def data(self) -> int:
        end = self.calls + 4 * self.slots
        return end + -end % 128

    @property
    def size(self) -> int:
        return self.data + 2 * self.peers * self.part

    @property
    def part(self) -> int:
        """The bytes of one peer's data, together with the numbers of the calls."""
        return 8 * MAX_BLOCK * self.slots


class Combine(NamedTuple):
    """The PTX that turns four words of every peer into four words of the result."""

    start: str
    add: Callable[[list[str]], str]  # four words of a peer
    finish: Callable[[list[str], list[str]], str]  # (residual, result)


def _add_pairs(words: list[str]) -> str:
    """Add pairs of bfloat16 to eight sums. A bfloat16 is the upper half of a float32."""
    return "".join(
        f"shl.b32 v, {word}, 16; mov.b32 f, v; add.f32 s{2 * i}, s{2 * i}, f;"
        f"and.b32 v, {word}, 0xffff0000; mov.b32 f, v; add.f32 s{2 * i + 1}, s{2 * i + 1}, f;"
        for i, word in enumerate(words)
    )


def _round_pairs(residual: list[str], out: list[str]) -> str:
    rounded = (f"cvt.rn.bf16x2.f32 {out[i]}, s{2 * i + 1}, s{2 * i};" for i in range(4))
    return _add_pairs(residual) + "".join(rounded)


def _add_floats(words: list[str]) -> str:
    return "".join(f"mov.b32 f, {word}; add.f32 s{i}, s{i}, f;" for i, word in enumerate(words))


def _max_keys(words: list[str]) -> str:
    pairs = ((0, words[0], words[1]), (1, words[2], words[3]))
    return "".join(f"mov.b64 k, {{{lo}, {hi}}}; max.u64 m{i}, m{i}, k;" for i, lo, hi in pairs)


# The sum of bfloat16 in float32, to which the residual is added before it is rounded, once.
SUM = Combine("".join(f"mov.f32 s{i}, 0f00000000;" for i in range(8)), _add_pairs, _round_pairs)
# The sum of float32.
ADD = Combine(
    "".join(f"mov.f32 s{i}, 0f00000000;" for i in range(4)),
    _add_floats,
    lambda _, out: "".join(f"mov.b32 {out[i]}, s{i};" for i in range(4)),
)
# The larger of unsigned 64-bit [low, high].
MAX = Combine(
    "mov.u64 m0, 0; mov.u64 m1, 0;",
    _max_keys,
    lambda _, out: "".join(f"mov.b64 {{{out[2 * i]}, {out[2 * i + 1]}}}, m{i};" for i in range(2)),
)


def exchange(layout: Layout, combine: Combine, block: int, *, crossings: int) -> str:
    """Write the exchange as one snippet, because Pallas keeps no order among several.

    Operands: four words each of the result, x and residual; then the byte at which a thread's data
    begins, the mailbox's address low and high, this GPU's number, and the thread's slot, each given
    four times, of which the first counts. A slot below 0 means that these words do not exist.
    """
    peers, part = layout.peers, layout.part
    out, x, residual = (["$" + str(first + i) for i in range(4)] for first in (0, 4, 8))
    offset, low, high, me, slot = (f"${12 + 4 * i}" for i in range(5))
    # The second two words of a slot's threads follow the first two.
    data = (layout.data, layout.data + 4 * min(block, MAX_BLOCK))

    def at(sender: int) -> list[int]:
        return [first + sender * part for first in data]

    def send_to(peer: int, words: list[str]) -> str:
        return f"ld.global.b64 a, [mine+{8 * peer}]; add.u64 a, a, to;" + _store(data, words)

    collect = combine.start
    collect += "".join(_wait(f"FROM{p}", at(p)) + combine.add(_WORDS) for p in range(peers))
    collect += combine.finish(residual, out)
    if crossings == 1:
        send = "".join(send_to(p, x) for p in range(peers))
        receive = collect
    else:
        # The owner of a warp's words, a number that differs from slot to slot as well, so that all
        # GPUs own the same share of many short blocks.
        send = (
            f"and.b32 v, {offset}, {8 * MAX_BLOCK - 1}; div.u32 v, v, {4 * WARP_WORDS};"
            f"add.u32 v, v, {slot}; rem.u32 owner, v, {peers};"
            "mul.wide.u32 o, owner, 8; add.u64 a, mine, o; ld.global.b64 a, [a]; add.u64 a, a, to;"
        ) + _store(data, x)
        others = "".join(
            f"setp.eq.u32 own, {me}, {p}; @own bra NEXT{p}; {send_to(p, out)} NEXT{p}:"
            for p in range(peers)
        )
        receive = (
            f"setp.ne.u32 own, owner, {me}; @own bra GATHER;"
            f"{collect} {others} bra DONE;"
            f"GATHER: mul.wide.u32 o, owner, {part}; add.u64 from, from, o;"
            + _wait("OWNER", at(0))
            + "".join(f"mov.b32 {o}, {w};" for o, w in zip(out, _WORDS, strict=True))
        )
    return f"""{{
        .reg .pred missing, first, late, idle, own;
        .reg .b64 mine, a, to, from, o, k, m0, m1, now, deadline;
        .reg .b32 call, v, owner, rounds, w0, w1, w2, w3, c0, c1, c2, c3;
        .reg .f32 s0, s1, s2, s3, s4, s5, s6, s7, f;
        setp.lt.s32 idle, {slot}, 0;
        @idle bra SENT;
        mov.b64 mine, {{{low}, {high}}};
        mul.wide.u32 o, {slot}, 4;
        add.u64 a, mine, o;
        ld.volatile.global.b32 call, [a+{layout.calls}];
        add.s32 call, call, 1;
        and.b32 v, call, 1;
        mul.wide.u32 from, v, {peers * part};
        cvt.u64.u32 o, {offset};
        add.u64 from, from, o;
        mul.wide.u32 to, {me}, {part};
        add.u64 to, to, from;
        add.u64 from, from, mine;
        {send}
        SENT:
        bar.sync 0;
        @idle bra IDLE;
        and.b32 v, {offset}, {8 * MAX_BLOCK - 1};
        setp.eq.u32 first, v, 0;
        mul.wide.u32 o, {slot}, 4;
        add.u64 a, mine, o;
        @first st.volatile.global.b32 [a+{layout.calls}], call;
        mov.u32 rounds, 0;
        mov.u64 deadline, 0;
        {receive}
        bra DONE;
        IDLE:
        {"".join(f"mov.b32 {word}, 0;" for word in out)}
        DONE:
    }}"""


def _store(data: tuple[int, int], words: list[str]) -> str:
    """Send four words, each beside the call's number, to the mailbox at `a`."""
    return "".join(
        f"st.volatile.global.v4.b32 [a+{place}], {{{one}, call, {two}, call}};"
        for place, one, two in zip(data, words[::2], words[1::2], strict=True)
    )


def _wait(label: str, places: list[int]) -> str:
    """Look until the own mailbox has four words of this call, for `w0` to `w3`."""
    again, arrived = f"{label}_AGAIN", f"{label}_ARRIVED"
    return (
        f"{again}:"
        f"ld.volatile.global.v4.b32 {{w0, c0, w1, c1}}, [from+{places[0]}];"
        f"ld.volatile.global.v4.b32 {{w2, c2, w3, c3}}, [from+{places[1]}];"
        "setp.ne.b32 missing, c0, call;"
        + "".join(f"setp.ne.or.b32 missing, c{i}, call, missing;" for i in (1, 2, 3))
        + f"@!missing bra {arrived};"
        + f"add.u32 rounds, rounds, 1; and.b32 v, rounds, {_ROUNDS_PER_LOOK - 1};"
        + f"setp.ne.b32 missing, v, 0; @missing bra {again};"
        + "mov.u64 now, %globaltimer; setp.eq.u64 first, deadline, 0;"
        + f"@first add.u64 deadline, now, {_LIMIT_SECONDS * 10**9};"
        + f"setp.gt.u64 late, now, deadline; @late trap; bra {again};"
        + f"{arrived}:"
    )
