"""The command line: what it prints, what it refuses, and how it ends."""

import importlib
import io
import json
import logging
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import nanovllm_jax
from nanovllm_jax import SamplingParams
from nanovllm_jax import cli as command_line
from nanovllm_jax.cli import main
from nanovllm_jax.tools import options, profile

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "eos_token_id": 256,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A model of random weights whose tokens are bytes, with a chat template."""
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {sign: i for i, sign in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    fast.save_pretrained(path)
    return path


@pytest.fixture
def cli(model_dir):
    """Run the command line on the tiny model and return its exit status."""
    options = ["--model", str(model_dir), "--load-format", "dummy", "--num-kvcache-blocks", "4",
               "--enforce-eager"]  # fmt: skip
    return lambda *argv: main([*options, *argv])


@pytest.fixture
def no_engine(monkeypatch):
    """Let nothing be loaded or compiled."""

    def refuse(*_, **options):
        pytest.fail("an engine was made")

    monkeypatch.setattr(nanovllm_jax, "LLM", refuse)


def expected(model_dir, prompts, **sampling):
    """The text that the engine itself gives."""
    params = nanovllm_jax.SamplingParams(temperature=0, **sampling)
    with nanovllm_jax.LLM(
        str(model_dir),
        load_format="dummy",
        num_kvcache_blocks=4,
        max_num_seqs=len(prompts),
        enforce_eager=True,
    ) as llm:
        return [result["text"] for result in llm.generate(prompts, params, use_tqdm=False)]


def test_one_prompt_prints_the_whole_completion(cli, model_dir, capsys):
    assert cli("hello", "--max-tokens", "9", "--ignore-eos") == 0
    (text,) = expected(model_dir, ["hello"], max_tokens=9, ignore_eos=True)
    assert capsys.readouterr().out == text + "\n"


def test_several_prompts_print_in_prompt_order(cli, model_dir, capsys):
    prompts = ["first", "second one", "3"]
    assert cli(*prompts, "--max-tokens", "5") == 0
    texts = expected(model_dir, prompts, max_tokens=5)
    pairs = zip(prompts, texts, strict=True)
    assert capsys.readouterr().out == "".join(f">>> {p}\n{t}\n\n" for p, t in pairs)


def test_a_dash_reads_the_prompt_from_standard_input(cli, model_dir, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert cli("-", "--max-tokens", "3") == 0
    (text,) = expected(model_dir, ["two\nlines"], max_tokens=3)
    assert capsys.readouterr().out == text + "\n"


def test_chat_applies_the_template(cli, model_dir, capsys):
    assert cli("--chat", "hi", "--max-tokens", "3") == 0
    (text,) = expected(model_dir, ["[user] hi\n"], max_tokens=3)
    assert capsys.readouterr().out == text + "\n"


def test_a_system_prompt_and_no_thinking_go_into_the_template(cli, model_dir, capsys, tmp_path):
    path = shutil.copytree(model_dir, tmp_path / "model")
    template = (
        "{{ enable_thinking }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    )
    (path / "chat_template.jinja").write_text(template, "utf-8")
    argv = ["--model", str(path), "--max-tokens", "3", "--chat", "hi"]
    assert cli(*argv, "--system", "Be brief.", "--no-think") == 0
    (text,) = expected(model_dir, ["Falsesystem:Be brief.;user:hi;"], max_tokens=3)
    assert capsys.readouterr().out == text + "\n"
    assert cli(*argv) == 0
    (text,) = expected(model_dir, ["user:hi;"], max_tokens=3)
    assert capsys.readouterr().out == text + "\n"


def test_stop_strings_cut_the_answer(cli, model_dir, capsys):
    (text,) = expected(model_dir, ["hello"], max_tokens=30, ignore_eos=True)
    stop = text[10:12]
    argv = ["hello", "--max-tokens", "30", "--ignore-eos", "--stop", "never", "--stop", stop]
    assert cli(*argv) == 0
    captured = capsys.readouterr()
    assert captured.out == text[: text.find(stop)] + "\n"
    assert "cut off" not in captured.err


def test_an_answer_that_is_cut_off_says_so(cli, capsys):
    assert cli("hello", "--max-tokens", "5", "--ignore-eos") == 0
    assert "nanovllm-jax: cut off after 5 tokens; --max-tokens allows" in capsys.readouterr().err
    assert cli("a", "b", "--max-tokens", "5", "--ignore-eos") == 0
    assert "nanovllm-jax: 'b' cut off after 5 tokens" in capsys.readouterr().err
    assert cli("hello", "--max-tokens", "500", "--ignore-eos", "--max-model-len", "64") == 0
    assert "cut off after 59 tokens; --max-model-len allows" in capsys.readouterr().err


@pytest.mark.parametrize("prompts", [["first"], ["first", "s\u00e9cond"]])
def test_json_gives_one_result_a_line(cli, model_dir, capsys, prompts):
    assert cli(*prompts, "--max-tokens", "4", "--ignore-eos", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = expected(model_dir, prompts, max_tokens=4, ignore_eos=True)
    assert [(line["prompt"], line["text"]) for line in lines] == [*zip(prompts, texts, strict=True)]
    for line in lines:
        assert (line["finish_reason"], line["stop_reason"]) == ("length", None)
        assert len(line["token_ids"]) == 4 and "error" not in line


def test_json_has_the_text_of_standard_input(cli, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert cli("-", "--max-tokens", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "two\nlines"


# --- what the model's makers recommend ---


@pytest.fixture
def recommending(model_dir, tmp_path):
    """Give a function that writes a model with a generation_config.json."""

    def make(**settings):
        path = shutil.copytree(model_dir, tmp_path / "recommending", dirs_exist_ok=True)
        (path / "generation_config.json").write_text(json.dumps(settings), "utf-8")
        return path

    return make


QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [256]}


def sampling_of(path, *argv):
    args = command_line._parse(["hi", "--model", str(path), *argv])
    return options.sampling_params(args, path, 256)


def test_defaults_come_from_generation_config_json(recommending, model_dir):
    assert sampling_of(model_dir) == SamplingParams(temperature=0, max_tokens=256), "no file"
    path = recommending(**QWEN3)
    want = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, max_tokens=256)
    assert sampling_of(path) == want
    assert sampling_of(path, "--top-k", "5", "--max-tokens", "9", "--seed", "3") == replace(
        want, top_k=5, max_tokens=9, seed=3
    )
    assert sampling_of(path, "--temperature", "0").temperature == 0
    path = recommending(max_new_tokens=77, min_p=0.1, temperature=0.5, top_k=None)
    assert sampling_of(path) == SamplingParams(temperature=0.5, max_tokens=77, min_p=0.1)
    path = recommending(**QWEN3 | {"do_sample": False})
    assert sampling_of(path) == SamplingParams(temperature=0, max_tokens=256)


def test_a_recommendation_that_is_no_option_is_named_with_its_file(recommending, capsys):
    path = recommending(temperature="hot")
    assert main(["hi", "--model", str(path)]) == 2
    error = capsys.readouterr().err
    assert "generation_config.json: temperature must be a number, got 'hot'" in error


def test_an_option_without_effect_is_refused_whoever_chose_greedy(recommending, capsys):
    path = recommending(**QWEN3)
    assert main(["hi", "--model", str(path), "--temperature", "0", "--top-k", "5"]) == 2
    assert "--top-k does nothing at temperature 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["hi", "--temperature", "-1"], "temperature"),
        (["hi", "--max-tokens", "0"], "max_tokens"),
        (["hi", "--gpu-memory-utilization", "2"], "gpu_memory_utilization"),
        (["hi", "--kvcache-block-size", "100"], "kvcache_block_size"),
        (["hi", "--dtype", "int3"], "int3"),
        (["hi", "--stop-token-ids", "1,x"], "1,x"),
        (["hi", "--no-such-option"], "--no-such-option"),
        (["-", "-"], "standard input"),
        (["x" * 1000], "256"),
        ([""], "empty"),
        (["a", "b", ""], "prompt 3 of 3"),
        (["--", "--chat", "x" * 1000], "prompt 2 of 2"),
        (["ab\udcff"], "byte 0xff at position 2"),
        ([], "PROMPT"),
        (["--"], "PROMPT"),
        (["hi", "--temperature", "nan"], "temperature"),
        (["hi", "--top-k", "5"], "--temperature 0.7"),
        (["hi", "--top-p", "0.5"], "--top-p does nothing"),
        (["hi", "--min-p", "0.5"], "--min-p does nothing"),
        (["hi", "--seed", "0"], "--seed does nothing"),
        (["hi", "--stop-token", "5"], "--stop-token"),  # no abbreviation of --stop-token-ids
        (["hi", "--stop", ""], "empty string"),
        (["hi", "--system", "Be brief."], "--system is for the chat template: add --chat"),
        (["hi", "--no-think"], "--no-think is for the chat template"),
    ],
)
def test_a_bad_request_is_one_line_and_status_2(cli, no_engine, capsys, argv, said):
    assert cli(*argv) == 2
    captured = capsys.readouterr()
    (line,) = [ln for ln in captured.err.splitlines() if ln.startswith("nanovllm-jax: error: ")]
    assert said in line
    assert captured.out == ""
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"ab\xff", "byte 0xff at position 2"),
        ("\u00e9".encode("latin-1"), "byte 0xe9 at position 0"),
        (b"\n", "empty"),
    ],
)
def test_bad_standard_input_is_refused(cli, no_engine, capsys, monkeypatch, given, said):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="latin-1"))
    assert cli("-") == 2
    assert said in capsys.readouterr().err


def test_closed_standard_input_is_refused(cli, no_engine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert cli("-") == 2
    assert "closed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "prompts"),
    [
        (["a", "--chat", "b"], [("a", False), ("b", False)]),
        (["--", "-x"], [("-x", True)]),
        (["--", "bench"], [("bench", True)]),
        (["--", "-", "--"], [("-", True), ("--", True)]),
        (
            ["a", "--max-tokens", "3", "-", "--", "--chat"],
            [(w, w[1:] > "-") for w in ["a", "-", "--chat"]],
        ),
    ],
)
def test_words_behind_two_dashes_are_prompts(argv, prompts):
    assert command_line._parse(argv).prompts == prompts


def test_a_prompt_may_look_like_an_option_or_a_tool(cli, model_dir, capsys):
    prompts = ["bench", "--chat", "-"]
    assert cli("--max-tokens", "3", "--", *prompts) == 0
    texts = expected(model_dir, prompts, max_tokens=3)
    pairs = zip(prompts, texts, strict=True)
    assert capsys.readouterr().out == "".join(f">>> {p}\n{t}\n\n" for p, t in pairs)


def test_no_arguments_show_the_usage(no_engine, capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: nanovllm-jax [options] PROMPT")


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["--nope"], ["hi", "--seed", "1"]])
def test_what_needs_no_model_is_answered_without_jax(argv):
    """Importing JAX and transformers takes seconds."""
    code = "import sys\nfrom nanovllm_jax.cli import main\n"
    code += f"try: main({argv})\nexcept SystemExit: pass\n"
    code += "sys.exit(bool({'jax', 'transformers', 'numpy'} & {*sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.returncode == 0
    if argv == ["--help"]:
        assert all(f"\n  {name} " in done.stdout for name in command_line.TOOLS)


@pytest.mark.parametrize("tool", ["bench", "compare.main", "profile", "sharding"])
def test_tools_take_no_abbreviations(tool):
    parse = importlib.import_module(f"nanovllm_jax.tools.{tool}").parse
    argv = {"bench": ["--random-weights", "0.6B"], "sharding": ["--mesh", "tensor=2"]}.get(tool, [])
    option = {"compare.main": "--work", "sharding": "--cont"}.get(tool, "--max-mod")
    with pytest.raises(options.UsageError, match=option):
        parse([*argv, option, "8"])


def test_a_terminal_that_cannot_show_a_character_gets_a_question_mark(cli, model_dir, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    assert cli("--ignore-eos", "--max-tokens", "20", "\u00e9") == 0
    screen.seek(0)
    (text,) = expected(model_dir, ["\u00e9"], max_tokens=20, ignore_eos=True)
    assert screen.read() == text.encode("ascii", "replace").decode() + "\n"
    assert "?" in text.encode("ascii", "replace").decode()


def test_the_number_of_prompts_does_not_choose_what_is_compiled(model_dir, monkeypatch):
    made = []

    def engine(model, **options):
        made.append(options)
        raise ValueError("enough")

    monkeypatch.setattr(nanovllm_jax, "LLM", engine)
    for count in (1, 2, 3, 100):
        assert main(["--model", str(model_dir), *count * ["hi"]]) == 2
    assert made == [{"max_num_seqs": 8, "max_num_batched_tokens": 256}] * 4  # the model's longest
    made.clear()
    main(["--model", str(model_dir), "hi", "--max-model-len", "128", "--max-num-seqs", "5"])
    assert made == [{"max_model_len": 128, "max_num_seqs": 5, "max_num_batched_tokens": 128}]


def test_warnings_are_one_line(capsys, monkeypatch):
    def warn(argv):
        warnings.warn("a\nb", stacklevel=2)
        return 0

    monkeypatch.setattr(command_line, "generate", warn)
    before = warnings.showwarning
    assert main(["hi"]) == 0
    assert capsys.readouterr().err == "nanovllm-jax: warning: a b\n"
    assert warnings.showwarning is before


def test_a_call_in_a_program_leaves_its_handler_of_interruptions(capsys):
    before = signal.getsignal(signal.SIGINT)
    assert main(["--nope"]) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_missing_model_ends_the_process_with_status_2():
    command = [sys.executable, "-m", "nanovllm_jax", "hi", "--model", "/no/such/model"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 2
    assert "/no/such/model" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupting_ends_with_status_130(cli, capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(nanovllm_jax.LLM, "step_outputs", interrupted)
    assert cli("hi") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_tool_is_reached_by_its_name_and_a_prompt_of_that_name_after_an_option(
    cli, capsys, monkeypatch
):
    monkeypatch.setattr(profile, "main", lambda argv: 40 + len(argv))
    assert main(["profile", "a", "b"]) == 42
    assert cli("--max-tokens", "2", "profile") == 0
    assert capsys.readouterr().out


def test_messages_of_the_engine_go_to_standard_error(capsys, monkeypatch):
    logger = logging.getLogger("nanovllm_jax")
    monkeypatch.setattr(command_line, "generate", lambda argv: logger.info("KV cache") or 0)
    assert main(["hi"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "KV cache\n")
    assert not logger.handlers
