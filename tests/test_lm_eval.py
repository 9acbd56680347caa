"""scripts/lm_eval_model.py: an engine gives lm-eval what lm-eval's own class has from torch."""

import json
import random
from itertools import chain

import numpy as np
import pytest
from helpers import quick_start
from tokenizers import processors

from nanovllm_jax.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm_jax.tools.options import DEMO_MODEL
from scripts import stories

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: the extra [eval]")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from scripts import lm_eval_model  # noqa: E402
from scripts.lm_eval_model import NanoVLLM, main  # noqa: E402

pytestmark = pytest.mark.slow

ENGINE = {"max_model_len": 160, "max_num_batched_tokens": 256}

# Questions of the task `choices`: long enough to lose their beginning, empty, and ending in spaces.
STORY = "\n\n".join(
    stories.story(random.Random(i), stories.Subject(hero=hero))
    for i, hero in enumerate(stories.KINDS[:2])
)
QUESTIONS = {
    "What is 395 + 659?": ["1054", "1053", "three"],
    "The capital of France is": ["Paris", "London.\nThat is in England"],
    "The capital of France is  ": ["Paris", "London"],
    "": ["Once upon a time", "of of of"],
    STORY: ["They lived happily ever after.", "<|im_end|>", STORY[:200]],
}
COMPLETIONS = ["Once upon a time", "What is 395 + 659?", "The capital of France is ", STORY]

TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "completions": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "1054",
        "generation_kwargs": {"until": ["\n\n", " a ", "."], "max_gen_toks": 20},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DOCUMENTS = {
    "choices": [{"text": text, "choices": choices} for text, choices in QUESTIONS.items()],
    "texts": [{"text": text} for text in (STORY, STORY[:300], "x")],
    "completions": [{"text": text} for text in COMPLETIONS],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the tasks above, which are read without network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, task in TASKS.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, DOCUMENTS[name])), "utf-8")
        source = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": source} | task
        task["test_split"] = "test"
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task), "utf-8")  # JSON is YAML, too
    return tmp_path


def responses(model, folder, *tasks):
    """What lm-eval got from the model for each request: {task: a list for each document}."""
    results = lm_eval.simple_evaluate(
        model,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return {
        name: [sample["filtered_resps"] for sample in samples]
        for name, samples in results["samples"].items()
    }


def scores(model, *pairs):
    """What lm-eval is told of each (context, continuation): log probability, is greedy."""
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return model.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize("name", ["demo", "smollm2"])
def test_an_engine_answers_as_transformers_does_in_float32(name, folder, new_engine, request):
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    path = DEMO_MODEL if name == "demo" else request.getfixturevalue("smollm2")("float32")
    ours = NanoVLLM(new_engine(path, **ENGINE))
    theirs = HFLM(
        pretrained=str(path), dtype="float32", device="cpu", batch_size=1,
        max_length=ours.max_length, softmax_dtype="float64",
    )  # fmt: skip
    assert len(ours.tok_encode(STORY)) > 2 * ours.max_length  # three windows
    found = responses(ours, folder, *TASKS)
    expected = responses(theirs, folder, "choices", "texts")
    theirs._max_length = ENGINE["max_model_len"]  # a score takes two tokens, a completion none
    expected |= responses(theirs, folder, "completions")

    assert [len(found[task]) for task in TASKS] == [5, 3, 4]
    assert found["completions"] == expected["completions"]
    assert len({text for [text] in found["completions"]}) > 2
    choices, wanted = (list(chain(*each["choices"])) for each in (found, expected))
    assert [greedy for _, greedy in choices] == [greedy for _, greedy in wanted]
    assert {greedy for _, greedy in wanted} == {True, False}
    apart = [abs(a - b) for (a, _), (b, _) in zip(choices, wanted, strict=True)]
    texts, wanted = (list(chain(*each["texts"])) for each in (found, expected))
    apart_texts = [abs(a - b) for a, b in zip(texts, wanted, strict=True)]
    print(f"{name}: choices differ by {max(apart):.1e}, texts by {max(apart_texts):.1e}")
    assert len(apart) == 12 and max(apart + apart_texts) < 1e-3


def test_a_server_answers_as_transformers_does_in_float32(folder, new_engine):
    """lm-eval's own client of OpenAI's API: likelihoods from echo and logprobs, and completions."""
    for needed in ("torch", "fastapi", "tenacity"):
        pytest.importorskip(needed)
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from server_thread import serving

    length = 1000  # room for the longest text: where each of the two cuts is its own affair
    llm = new_engine(DEMO_MODEL, max_model_len=length + 2, max_num_batched_tokens=2048)
    path = str(DEMO_MODEL)
    theirs = HFLM(
        pretrained=path, dtype="float32", device="cpu", batch_size=1, max_length=length,
        softmax_dtype="float64",
    )  # fmt: skip
    expected = responses(theirs, folder, *TASKS)
    with serving(llm) as url:
        for batch_size, remote in ((1, False), (4, False), (4, True)):
            ours = LocalCompletionsAPI(
                base_url=f"{url}/v1/completions", model="demo", tokenizer=path,
                tokenizer_backend="remote" if remote else "huggingface", batch_size=batch_size,
                num_concurrent=2, max_length=length, max_retries=1,
            )  # fmt: skip
            found = responses(ours, folder, *TASKS)
            assert found["completions"] == expected["completions"]
            pairs = zip(chain(*found["choices"]), chain(*expected["choices"]), strict=True)
            for (logprob, greedy), (wanted, wanted_greedy) in pairs:
                assert greedy == wanted_greedy and logprob == pytest.approx(wanted, abs=1e-3)
            texts = zip(chain(*found["texts"]), chain(*expected["texts"]), strict=True)
            assert all(a == pytest.approx(b, abs=1e-3) for a, b in texts)


def test_greedy_is_what_has_the_first_rank_at_every_token():
    def output(*ranks, error=None):
        scores = [{i: Logprob(-0.5 - i, rank)} for i, rank in enumerate(ranks)]
        completion = CompletionOutput(0, "", [0])
        positions = [None, {99: Logprob(-7.0, 9)}, *scores]
        return RequestOutput(0, None, [], [completion], True, error, None, positions)

    assert lm_eval_model._score(output(1, 1), [0, 1]) == (-2.0, True)
    assert lm_eval_model._score(output(1, 2), [0, 1]) == (-2.0, False)
    assert lm_eval_model._score(output(2, 1), [1]) == (-1.5, True)
    with pytest.raises(RuntimeError, match="no room"):
        lm_eval_model._score(output(1, error="no room"), [0])


def test_rounds_and_the_batch_do_not_change_scores(new_engine, monkeypatch):
    model = NanoVLLM(new_engine(DEMO_MODEL, **ENGINE))
    pairs = [(f"{i} foxes met", f" {i} hares by the river.") for i in range(20)]
    found = scores(model, *pairs)
    calls = []
    generate = model.llm.generate_outputs
    monkeypatch.setattr(
        model.llm, "generate_outputs", lambda *a, **kw: calls.append(a[0]) or generate(*a, **kw)
    )
    monkeypatch.setattr(lm_eval_model, "ROUND_TOKENS", 50)
    again = scores(model, *pairs)
    assert len(calls) > 4 and sum(map(len, calls)) == len(pairs)
    assert [greedy for _, greedy in again] == [greedy for _, greedy in found]
    np.testing.assert_allclose([a for a, _ in again], [a for a, _ in found], atol=1e-4)
    assert scores(model) == []


def test_what_is_only_spaces_is_scored_as_no_context_is(new_engine):
    model = NanoVLLM(new_engine(DEMO_MODEL, **ENGINE))
    spaces, none, other = scores(model, ("  ", "a fox"), ("", "  a fox"), ("", "a fox"))
    assert spaces == pytest.approx(none, abs=1e-4) and abs(spaces[0] - other[0]) > 0.1
    another = NanoVLLM(model.llm, prefix_token_id=0)
    assert abs(scores(another, ("", "a fox"))[0][0] - other[0]) > 0.1


@pytest.mark.parametrize(("length", "message"), [(0, "got 0"), (159, "1 to 158 tokens.*got 159")])
def test_a_continuation_that_cannot_be_scored_is_refused(fake_engine, length, message):
    model = NanoVLLM(fake_engine(**ENGINE))
    with pytest.raises(ValueError, match=message):
        scores(model, ("a", "b" * length))


def test_a_text_has_one_beginning_of_sequence_token(fake_engine):
    model = NanoVLLM(fake_engine(**ENGINE))
    tokenizer = model.tokenizer
    tokenizer.bos_token = "<end>"
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", tokenizer.bos_token_id)]
    )
    bos, a, b = tokenizer.bos_token_id, *tokenizer.encode("ab", add_special_tokens=False)
    assert model.prefix_token_id == bos
    assert model.tok_encode("ab") == model.tok_encode("<end>ab") == [bos, a, b]
    assert model.tok_encode("ab", add_special_tokens=False) == [a, b]
    assert model._encode_pair("a", "b") == model._encode_pair("<end>a", "b") == ([bos, a], [b])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"temperature": 0, "max_tokens": 99}),
        ({"until": "x", "max_gen_toks": 7}, {"temperature": 0, "max_tokens": 7, "stop": ("x",)}),
        ({"until": ["x", ""], "do_sample": False, "temperature": 1}, {"temperature": 0}),
        ({"do_sample": True}, {"temperature": 1}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
    ],
)
def test_generation_options_mean_what_they_do_in_lm_eval(options, expected):
    params = lm_eval_model._sampling(options, max_gen_toks=99)
    expected = {"max_tokens": 99, "truncate_prompt_tokens": -1} | expected
    stop = expected.pop("stop", params.stop_strings)
    assert {name: getattr(params, name) for name in expected} == expected
    assert params.stop_strings == stop
    with pytest.raises(TypeError, match="num_beams"):
        lm_eval_model._sampling(options | {"num_beams": 4}, max_gen_toks=99)


def test_a_prompt_that_is_too_long_loses_its_beginning(fake_engine):
    """With room for the completion, as far as there is any."""
    model = NanoVLLM(fake_engine(**ENGINE))
    outputs = []
    generate = model.llm.generate_outputs
    model.llm.generate_outputs = lambda *a, **kw: outputs.extend(generate(*a, **kw)) or outputs
    options = {"until": [], "max_gen_toks": 56}
    request = Instance("generate_until", {}, ("a" * 300 + "b" * 60, options), 0)
    [text] = model.generate_until([request], disable_tqdm=True)
    [output] = outputs
    assert output.prompt_token_ids == model.tok_encode("a" * 44 + "b" * 60)
    assert text == output.outputs[0].text and len(output.outputs[0].token_ids) <= 56


def test_a_conversation_is_written_by_the_models_own_template(fake_engine):
    model = NanoVLLM(fake_engine(**ENGINE))
    chat = [{"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(chat) == "[user] Hi [assistant] "
    model.tokenizer.chat_template = "{{ messages[0].content }} {{ enable_thinking }}"
    model = NanoVLLM(model.llm, chat_template_kwargs={"enable_thinking": False})
    assert model.apply_chat_template(chat) == "Hi False"


def test_the_command_line_prints_a_table_and_writes_the_results(folder, capsys):
    engine = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    engine += ["--max-num-seqs=4", "--num-kvcache-blocks=16"]
    tasks = ["--include-path", str(folder), "--tasks", "choices,completions"]
    output = folder / "results.json"
    with quick_start():
        assert main([*tasks, "--limit", "2", "--output", str(output), *engine]) == 0
    table = capsys.readouterr().out
    assert "|choices" in table and "exact_match" in table
    results = json.loads(output.read_text("utf-8"))
    assert [len(results["samples"][task]) for task in ("choices", "completions")] == [2, 2]
    assert results["samples"]["completions"][1]["filtered_resps"] == [" 1054"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["hellaswag,no_such_task"], "no task 'no_such_task'"),
        (["hellaswag", "--no-think"], "does nothing without --apply-chat-template"),
        (["hellaswag", "--model", "no_such_folder"], "no_such_folder"),
    ],
)
def test_bad_usage_is_refused_in_one_line(capsys, options, message):
    assert main(["--tasks", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
