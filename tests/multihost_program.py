"""One process of an engine over several, as tests/test_multihost.py starts it.

python multihost_program.py MODEL OPTIONS SCENARIO PORT PROCESSES PROCESS_ID
"""

import itertools
import json
import os
import signal
import sys

import jax
from helpers import greedy, prompt, quick_start, tokens

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine.model_runner import TokenFuture


def interrupt(llm, prompts, params):
    """A generate() that ends with an interrupt, while it waits for a step's tokens."""
    result, waits = TokenFuture.result, itertools.count()

    def wait(future):
        if next(waits) == 4:
            raise KeyboardInterrupt
        return result(future)

    TokenFuture.result = wait
    try:
        tokens(llm, prompts, params)
        raise AssertionError("not interrupted")
    except KeyboardInterrupt:
        TokenFuture.result = result


def serve(llm):
    """Everything that process 0 can ask of an engine; what came of it."""
    preempt, preempted = llm.scheduler.preempt, []
    llm.scheduler.preempt = lambda seq: (preempted.append(seq.seq_id), preempt(seq))
    prompts = [prompt(n) for n in (300, 511, 5, 256, 511, 255)]
    params = [
        SamplingParams(
            temperature=1.0, max_tokens=12, ignore_eos=True, seed=i, top_k=20 if i % 2 else 0
        )
        for i in range(6)
    ]
    sampled = tokens(llm, prompts, params)  # more than a step's budget, and than the cache
    stream = llm.stream(prompt(300), greedy(12))
    begun = [next(stream), next(stream)]
    llm.add_request(prompt(40, 1), greedy(5))
    stream.close()  # ends a request that is under way
    (other,) = (ids for _ in range(30) for _, ids in llm.step()[0])
    again = tokens(llm, prompts[:2], params[:2])  # partly from the prefix cache
    llm.add_request(prompt(30, 2), greedy(12))
    interrupt(llm, prompts[:3], params[:3])
    (kept,) = (ids for _ in range(30) for _, ids in llm.step()[0])
    llm.reset_prefix_cache()
    outgrown = llm.generate([prompt(700), prompt(9)], greedy(100), use_tqdm=False)
    return {
        "preempted": preempted,
        "sampled": [*sampled, *again],
        "greedy": [*begun, other, kept, *(out["token_ids"] for out in outgrown)],
        "errors": [out.get("error") for out in outgrown],
    }


def main(model, options, scenario, port, num_processes, process_id):
    jax.distributed.initialize(
        f"localhost:{port}", int(num_processes), int(process_id),
        heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10,
    )  # fmt: skip
    options = json.loads(options)
    if scenario == "differ":
        options["max_num_seqs"] += jax.process_index()
    with quick_start():
        llm = LLM(model, **options)
    if jax.process_index():
        try:
            llm.add_request([1], greedy(1))
        except RuntimeError as error:
            print(error)
        if scenario == "follower dies":
            dispatch, steps = llm.runner.dispatch, iter(range(5))
            llm.runner.dispatch = lambda batch: (
                next(steps, None) is None and os.kill(os.getpid(), signal.SIGKILL),
                dispatch(batch),
            )[1]
        llm.follow()
        print("followed", flush=True)
        return
    if scenario == "serve":
        print("RESULT", json.dumps(serve(llm)), flush=True)
        return  # without exit(): the end of the program is the end of the engine
    for count, _ in enumerate(llm.stream(prompt(5), greedy(200, ignore_eos=True))):
        if count == 10 and scenario == "leader dies":
            os.kill(os.getpid(), signal.SIGKILL)
    print("streamed", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
