"""Several completions of one prompt: their tokens, their share of the cache, and their outputs."""

import time

import pytest
from helpers import Spy, drain, prompt

from nanovllm_jax import SamplingParams
from nanovllm_jax.engine.request import completion_seed


@pytest.fixture
def llm(fake_engine):
    return fake_engine()


FREE = {"max_tokens": 30, "ignore_eos": True}


def test_generate_gives_a_list_of_them_with_the_first_on_top(llm):
    one = SamplingParams(seed=7, **FREE)
    several = SamplingParams(seed=7, n=5, **FREE)
    (alone,) = llm.generate(["abc"], one, use_tqdm=False)
    result, other = llm.generate(["abc", "de"], [several, one], use_tqdm=False)
    assert set(result) == {"text", "token_ids", "outputs"} and len(result["outputs"]) == 5
    assert alone == {"text": result["text"], "token_ids": result["token_ids"]}, "as with n=1"
    assert result["outputs"][0] == alone and set(other) == {"text", "token_ids"}
    assert len({tuple(output["token_ids"]) for output in result["outputs"]}) == 5
    assert llm.generate(["abc"], several, use_tqdm=False) == [result], "its seed decides"


def test_each_completion_is_the_same_in_any_batch(engine):
    llm = engine()
    params = SamplingParams(temperature=1.0, n=3, **FREE)
    many = [SamplingParams(temperature=1.0, n=3, seed=s, **FREE) for s in range(4)]
    together = llm.generate([prompt(300)] * 4, many, use_tqdm=False)
    for seeded, result in zip(many, together, strict=True):
        assert llm.generate([prompt(300)], seeded, use_tqdm=False) == [result]
    drawn = {tuple(o["token_ids"]) for result in together for o in result["outputs"]}
    assert len(drawn) == 12, "no two share a stream"
    (first,), (second,) = (llm.generate([prompt(9)], params, use_tqdm=False) for _ in range(2))
    assert first != second, "without a seed they are new each time"


@pytest.mark.parametrize("mesh", [{"data": 2}, {"data": 2, "tensor": 2}])
def test_completions_over_several_devices_are_the_same(engine, mesh):
    params = SamplingParams(temperature=1.0, n=5, seed=3, top_k=20, **FREE)
    prompts = [prompt(9), prompt(600)]
    want = engine().generate(prompts, params, use_tqdm=False)
    llm = engine(mesh_shape=mesh, num_kvcache_blocks=8)
    assert llm.generate(prompts, params, use_tqdm=False) == want


def test_seeds_of_completions_do_not_meet():
    seeds = [completion_seed(base, i) for base in (0, 1, 2**64 - 1) for i in range(200)]
    assert len({*seeds}) == 600 and all(0 <= seed < 2**64 for seed in seeds)
    assert completion_seed(5, 0) == 5


def test_the_prompts_full_blocks_are_computed_once_in_the_same_step(engine, monkeypatch):
    llm = engine(num_kvcache_blocks=16)
    params = SamplingParams(temperature=1.0, n=4, seed=1, max_tokens=3, ignore_eos=True)
    spy = Spy(llm, monkeypatch)
    llm.generate([prompt(600)], params, use_tqdm=False)
    is_prefill, rows = spy.batches[0]
    assert is_prefill and [length for _, _, length in rows] == [600, 88, 88, 88]
    spy.batches.clear()
    llm.reset_prefix_cache()
    llm.generate([prompt(512)], params, use_tqdm=False)
    assert [length for _, _, length in spy.batches[0][1]] == [512, 1, 1, 1]


def test_their_blocks_fit_a_pool_that_four_prompts_do_not(fake_engine):
    llm = fake_engine(num_kvcache_blocks=6)
    params = SamplingParams(n=4, seed=1, max_tokens=100, ignore_eos=True)
    llm.add_request(prompt(520), params)
    llm.step()
    tables = [seq.block_table for seq in llm.scheduler.running]
    assert len(tables) == 4 and {tuple(table[:2]) for table in tables} == {tuple(tables[0][:2])}
    assert len({table[2] for table in tables}) == 4
    llm.pools[0].check(llm.scheduler.running)
    drain(llm)


def test_step_reports_the_first_ones_tokens_once_all_have_ended(llm):
    params = SamplingParams(n=3, seed=1, max_tokens=60, stop_token_ids=[*range(1, 20)])
    (result,) = llm.generate(["abc"], params, use_tqdm=False)
    lengths = [len(output["token_ids"]) for output in result["outputs"]]
    assert len({*lengths}) > 1, "they end at different times"
    request_id = llm.add_request("abc", params)
    other = llm.add_request("de", SamplingParams(n=2, seed=2, **FREE))
    assert other > request_id + 2
    results, _ = drain(llm)
    assert results[request_id] == result["token_ids"] and results.keys() == {request_id, other}


def test_outputs_have_all_of_them_as_they_grow(llm):
    params = SamplingParams(n=3, seed=1, max_tokens=60, stop_token_ids=[*range(1, 20)], stop="x")
    (want,) = llm.generate(["abc"], params, use_tqdm=False)
    llm.add_request("abc", params, "mine")
    seen = []
    while not llm.is_finished():
        seen += llm.step_outputs()
    assert {output.request_id for output in seen} == {"mine"}
    assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
    for output in seen:
        assert [completion.index for completion in output.outputs] == [0, 1, 2]
        for completion, final in zip(output.outputs, want["outputs"], strict=True):
            assert final["text"].startswith(completion.text)
            done = completion.finish_reason is not None
            assert done == (completion.token_ids == final["token_ids"])
    assert any(
        {completion.finish_reason for completion in output.outputs} > {None} for output in seen
    )


def test_an_abort_ends_all_of_them(llm):
    llm.add_request("abc", SamplingParams(n=3, seed=1, **FREE), "a")
    llm.add_request("abc", SamplingParams(n=2, seed=1, **FREE), "b")
    for _ in range(4):
        llm.step()
    llm.abort_request("a")
    (ended,) = [output for output in llm.step_outputs() if output.finished]
    assert [c.finish_reason for c in ended.outputs] == ["abort"] * 3
    assert all(4 <= len(c.token_ids) < 30 for c in ended.outputs)
    llm.abort_request("a")
    results, _ = drain(llm)
    assert results.keys() == {"b"} and len(results["b"]) == 30
    llm.pools[0].check([])


def test_an_abort_spares_those_that_have_ended(llm):
    params = SamplingParams(n=3, seed=1, max_tokens=60, stop_token_ids=[*range(1, 20)])
    (want,) = llm.generate(["abc"], params, use_tqdm=False)
    first = min(len(output["token_ids"]) for output in want["outputs"])
    request_id = llm.add_request("abc", params)
    for _ in range(first + 1):
        llm.step()
    llm.abort_request(request_id)
    (output,) = llm.step_outputs()
    reasons = [completion.finish_reason for completion in output.outputs]
    assert {*reasons} == {"stop", "abort"} and output.finished


def test_one_that_outgrows_the_cache_leaves_the_others_their_end(fake_engine):
    llm = fake_engine(num_kvcache_blocks=2)
    params = SamplingParams(n=2, seed=1, max_tokens=200, stop_token_ids=[*range(1, 4)])
    (result,) = llm.generate([prompt(505)], params, use_tqdm=False)
    (output,) = llm.generate_outputs([prompt(505)], params, use_tqdm=False)
    reasons = [completion.finish_reason for completion in output.outputs]
    assert "error" in reasons and output.finished
    assert "the pool has 2" in output.error and result["error"] == output.error
    llm.pools[0].check([])


def test_preempted_completions_are_the_same(fake_engine, monkeypatch):
    params = SamplingParams(n=3, seed=7, max_tokens=300, ignore_eos=True)
    want = fake_engine().generate([prompt(250)], params, use_tqdm=False)
    llm = fake_engine(num_kvcache_blocks=4)
    spy = Spy(llm, monkeypatch)
    assert llm.generate([prompt(250)], params, use_tqdm=False) == want
    assert spy.preempted


def test_more_completions_than_slots_wait_for_them(llm):
    (result,) = llm.generate(["abc"], SamplingParams(n=11, seed=1, **FREE), use_tqdm=False)
    assert len({tuple(output["token_ids"]) for output in result["outputs"]}) == 11


def test_a_stream_has_one(llm):
    with pytest.raises(ValueError, match="one completion, got n=2; use generate"):
        next(llm.stream("abc", SamplingParams(n=2)))
    assert llm.is_finished()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, ValueError, r"n must be in 1 to 16384, got 0"),
        ({"n": 10**9}, ValueError, "n must be in 1 to 16384"),
        ({"n": 2.0}, TypeError, "n must be an integer"),
        ({"n": 2, "temperature": 0}, ValueError, "same greedy completion 2 times; raise temp"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**options)


# --- outputs of any request ---


def test_generate_outputs_says_why_each_ended(llm):
    prompts, params = ["abc", "de"], [SamplingParams(seed=1, **FREE), SamplingParams(seed=2, n=2)]
    outputs = llm.generate_outputs(prompts, params, use_tqdm=False)
    results = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert outputs[0].outputs[0].finish_reason == "length"
    assert [c.text for c in outputs[1].outputs] == [r["text"] for r in results[1]["outputs"]]
    completion = outputs[0].outputs[0]
    assert (completion.logprobs, completion.cumulative_logprob) == (None, None)
    assert outputs[0].prompt_logprobs is None


def test_a_requests_times_are_in_order(llm, monkeypatch):
    llm.runner.before_read = lambda: time.sleep(0.01)
    monkeypatch.setattr(time, "time", lambda: 1e9)  # the clock is set; differences stay right
    llm.add_request("abc", SamplingParams(seed=1, n=2, **FREE))
    time.sleep(0.03)
    metrics = []
    while not llm.is_finished():
        metrics += [output.metrics for output in llm.step_outputs()]
    assert {m.arrival_time for m in metrics} == {1e9}
    assert len({m.first_token_time for m in metrics}) == 1
    assert {m.finished_time for m in metrics[:-1]} == {None}
    last = metrics[-1]
    assert last.first_token_time - last.arrival_time > 0.03
    assert last.finished_time - last.first_token_time > 0.05
    assert last.finished_time - last.arrival_time < 60
