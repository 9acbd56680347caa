"""A soak: thousands of requests from two threads through one engine that has too little room.

`python -m scripts.soak` sends random requests to the demo model, through `generate`, `stream` and
`add_request`, and meanwhile aborts some, resets the prefix cache, and interrupts the main thread at
random moments. It fails unless every request is accounted for, the pool's books balance after every
action, greedy requests give the tokens that they give alone, and the memory stays flat.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm_jax import LLM, SamplingParams

DEMO_MODEL = Path(__file__).parents[1] / "nanovllm_jax" / "demo_model"
LONGEST = 60  # Tokens that a request generates at most.
WARM_UP = 2000  # Requests after which the memory's size is taken for the first time.


@dataclass
class Soak:
    """An engine under test, what its prompts give alone, and counts of what has happened."""

    llm: LLM
    prompts: list[list[int]]
    alone: list[list[int]]
    counts: Counter[str] = field(default_factory=Counter)

    def request(self, rng: random.Random, most: int = 3) -> tuple[int, SamplingParams]:
        """Draw a prompt, by its number, and the options of a request; two in three are greedy.

        Args:
            most: completions that the request may ask for.
        """
        i, max_tokens = rng.randrange(len(self.prompts)), rng.randrange(1, LONGEST + 1)
        if rng.random() < 2 / 3:
            stop = [rng.choice(self.alone[i])] if rng.random() < 0.2 else None
            options: dict[str, Any] = {"temperature": 0, "stop_token_ids": stop}
            if rng.random() < 0.2:
                start, text = rng.randrange(100), self.text(self.alone[i])
                options["stop"] = text[start : start + rng.randrange(1, 6)] or None
        else:
            options = {"temperature": rng.uniform(0.1, 3), "top_p": rng.uniform(0.1, 1)}
            options |= {"top_k": rng.randrange(50), "min_p": rng.choice((0, 0.1))}
            options["n"] = rng.choice((1, most))
        return i, SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options)

    def check(self, i: int, params: SamplingParams, token_ids: list[int], whole: bool) -> None:
        """Compare a completion, or the beginning of one, with that of the prompt alone."""
        self.counts["requests"] += 1
        assert 0 < len(token_ids) <= (params.max_tokens or 0) or not whole, "not as many as asked"
        if params.temperature == 0:
            want = self.alone[i][: params.max_tokens]
            for stop in params.stop_token_ids or ():
                want = want[: want.index(stop) + 1] if stop in want else want
            for stop in params.stop_strings:
                lengths = [n for n in range(len(want)) if stop in self.text(want[:n])]
                want = want[: lengths[0]] if lengths else want
            assert token_ids == (want if whole else want[: len(token_ids)]), f"prompt {i}"
            self.counts["greedy"] += 1

    def text(self, token_ids: list[int]) -> str:
        """The text of tokens."""
        assert self.llm.tokenizer
        return str(self.llm.tokenizer.decode(token_ids, skip_special_tokens=True))

    def generate(self, rng: random.Random) -> None:
        requests = [self.request(rng) for _ in range(rng.randrange(1, 12))]
        prompts = [self.prompts[i] for i, _ in requests]
        results = self.llm.generate(prompts, [params for _, params in requests], use_tqdm=False)
        for (i, params), result in zip(requests, results, strict=True):
            for completion in result.get("outputs", [result]):
                self.check(i, params, completion["token_ids"], whole=True)
                assert not any(stop in completion["text"] for stop in params.stop_strings)

    def stream(self, rng: random.Random) -> None:
        i, params = self.request(rng, most=1)
        parts: list[int] = []
        leaves_after = rng.randrange(1, 40)
        for part in self.llm.stream(self.prompts[i], params):
            parts += part
            if len(parts) > leaves_after:  # and with the loop, the stream ends
                self.counts["left streams"] += 1
                self.check(i, params, parts, whole=False)
                return
        self.check(i, params, parts, whole=True)

    def step(self, rng: random.Random) -> None:
        """Add requests under ids of our own, step, and abort some."""
        requests = {}
        for _ in range(rng.randrange(1, 12)):
            i, params = self.request(rng)
            request_id = f"soak-{self.counts['added']}"
            self.counts["added"] += 1
            self.llm.add_request(self.prompts[i], params, request_id)
            requests[request_id] = i, params
        while requests:
            if rng.random() < 0.05:
                self.llm.abort_request(rng.choice(list(requests)))
            for output in self.llm.step_outputs():
                if output.finished:
                    i, params = requests.pop(str(output.request_id))  # KeyError: reported twice
                    reasons = [completion.finish_reason for completion in output.outputs]
                    self.counts["aborts"] += "abort" in reasons
                    for completion, reason in zip(output.outputs, reasons, strict=True):
                        self.check(i, params, completion.token_ids, whole=reason != "abort")

    def act(self, rng: random.Random, *, may_step: bool) -> None:
        """Do one random thing, then check the books."""
        actions = [self.generate, self.stream] + [self.step] * may_step
        rng.choice(actions)(rng)
        if rng.random() < 0.02:
            self.llm.reset_prefix_cache()
            self.counts["resets"] += 1
        self.check_books()

    def check_books(self) -> None:
        """Have the engine's thread check each pool against the sequences that hold blocks."""
        core = self.llm._core

        def check() -> None:
            requests = dict.fromkeys(core.requests.values())  # each once
            seqs = [seq for request in requests for seq in request.seqs]
            for number, pool in enumerate(core.pools):
                pool.check([seq for seq in seqs if seq.block_table and seq.shard == number])

        self.llm._thread.call(check)
        self.counts["checks"] += 1


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread after some time, if the block takes so long."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def interrupt(*_: object) -> None:
    """The handler of the alarm: what Ctrl-C does."""
    raise KeyboardInterrupt


def resident_mib() -> float:
    """Memory of this process that is resident, in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Run the soak and print what has happened."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--requests", type=int, default=20_000, help="how many (default: 20000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    llm = LLM(
        DEMO_MODEL, max_num_seqs=6, max_model_len=768, max_num_batched_tokens=768,
        num_kvcache_blocks=7, dtype="float32",
    )  # fmt: skip
    roots = [[rng.randrange(3, llm.vocab_size) for _ in range(600)] for _ in range(4)]
    lengths = [1, 2, 255, 256, 257, 511, 512, 513, *(rng.randrange(1, 600) for _ in range(32))]
    prompts = [rng.choice(roots)[:n] for n in lengths]
    greedy = SamplingParams(temperature=0, max_tokens=LONGEST, ignore_eos=True)
    alone = [llm.generate([p], greedy, use_tqdm=False)[0]["token_ids"] for p in prompts]
    soak = Soak(llm, prompts, alone)

    failures: list[BaseException] = []
    done = threading.Event()

    def second_user() -> None:
        rng = random.Random(args.seed + 1)
        try:
            while not done.is_set():
                soak.act(rng, may_step=False)
        except BaseException as error:
            failures.append(error)

    other = threading.Thread(target=second_user)
    other.start()
    start, first_mib, shown = time.perf_counter(), 0.0, 0
    signal.signal(signal.SIGALRM, interrupt)
    try:
        while soak.counts["requests"] < args.requests and not failures:
            if rng.random() < 0.3:  # without `step`, of whose requests this script would lose count
                try:
                    with interrupted_after(rng.uniform(1e-4, 0.3)):
                        soak.act(rng, may_step=False)
                except KeyboardInterrupt:
                    soak.counts["interruptions"] += 1
            else:
                soak.act(rng, may_step=True)
            if not first_mib and soak.counts["requests"] >= min(WARM_UP, args.requests // 2):
                first_mib = resident_mib()
            if soak.counts["requests"] >= shown + 1000:
                shown = soak.counts["requests"]
                seconds = time.perf_counter() - start
                print(f"{shown} requests in {seconds:.0f} s, {resident_mib():.0f} MiB", flush=True)
    finally:
        done.set()
        other.join()
    if failures:
        raise failures[0]
    last_mib = resident_mib()
    soak.check_books()
    assert llm.is_finished(), "requests are left over"
    print(dict(soak.counts))
    print(f"memory: {first_mib:.0f} MiB after the first requests, {last_mib:.0f} at the end")
    if last_mib > 1.05 * first_mib:
        sys.exit("the memory has grown by more than 5%")


if __name__ == "__main__":
    main()
