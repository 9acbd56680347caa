"""scripts/compare: equal work for every engine, rules that are enforced, one report of it all."""

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nanovllm_jax.__main__ import UsageError
from nanovllm_jax.config import ModelConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench  # noqa: E402
from compare import machine, main, profiling, random_model, report, worker, workloads  # noqa: E402
from compare.adapters import ENGINES  # noqa: E402

TINY = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            max_position_embeddings=512, eos_token_id=2)  # fmt: skip
SMALL = workloads.Scale(
    prompt=4, output=5, prefill=(2, 8), prefix=(3, 6, 2, 2), stream=(3, 8, 4), rate=100.0,
    bench=(4, 8), max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return random_model.write(tmp_path_factory.mktemp("tiny"), bench.qwen3_config("0.6B") | TINY)


# --- the command line ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--engines", "sglang"], "--engines sglang is not known"),
        (["--workloads", "batch2"], "--workloads batch2 is not known"),
        (["--engines", ","], "--engines is empty"),
        (["--random-weights", "9B"], "9B is no published size"),
        (["--random-weights", "8B", "--model", "m"], "not both"),
        (["--limit", "vllm=soon"], "--limit vllm=soon is not"),
        (["--limit", "-3"], "--limit -3 is not"),
        (["--python-path", "vllm=/no/such/folder"], "is not ENGINE=DIR"),
        (["--runs", "0"], "--runs 0 must be at least 1"),
        (["--rate", "0"], "--rate 0.0 must be positive"),
        (["--temperature", "-1"], "must not be negative"),
        (["--from", "no-such.jsonl"], "--from no-such.jsonl is not there"),
        (["--model", "no-such-model"], "it has no config.json"),
        (["--colour"], "--colour"),
    ],
)
def test_bad_usage_is_one_line_and_names_the_value(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_options_of_single_engines():
    args = main.parse(["--limit", "90", "--limit", "vllm=200", "--python-path", f"vllm={ROOT}"])
    assert args.limit == {"": 90.0, "vllm": 200.0}
    assert args.python_path == {"vllm": str(ROOT)}


def test_the_order_of_engines_alternates():
    assert [main.order("abc", i) for i in range(3)] == [list("abc"), list("cba"), list("abc")]


# --- workloads ---


@pytest.mark.parametrize("name", workloads.NAMES)
def test_warm_up_has_other_tokens_of_the_same_kind(name):
    timed, again = (asdict(workloads.make(name, SMALL, 0, 300)) for _ in range(2))
    warm_up = asdict(workloads.make(name, SMALL, 1, 300))
    assert worker.digest(timed) == worker.digest(again)
    assert worker.digest(timed) != worker.digest(warm_up)
    assert timed["parts"].keys() == warm_up["parts"].keys()
    waves = [wave for part in timed["parts"].values() for wave in part]
    longest = max(len(p) + n for wave in waves for p, n in zip(*wave, strict=True))
    assert longest <= SMALL.max_model_len
    assert all(0 <= token < 300 for prompts, _ in waves for prompt in prompts for token in prompt)


def test_the_bench_at_full_size_is_nano_vllms():
    work = workloads.make("bench", workloads.SCALES["gpu"], 0, 151936).work
    assert (work.prompt_tokens, work.output_tokens) == (142_827, 133_966)


def test_one_part_shares_a_prefix_and_the_other_has_none():
    parts = workloads.make("prefix", SMALL, 0, 300).parts
    prompts = {label: waves[0][0] + waves[1][0] for label, waves in parts.items()}
    assert [len(waves[0][0]) for waves in parts.values()] == [1, 1]  # ahead of the others
    assert len({tuple(p[:6]) for p in prompts["shared"]}) == 1
    assert len({tuple(p) for p in prompts["shared"]}) == 3
    assert len({tuple(p[:6]) for p in prompts["own"]}) == 3
    assert [len(p) for p in prompts["shared"]] == [len(p) for p in prompts["own"]] == [8] * 3


def test_arrivals_have_the_rate_that_was_asked_for():
    scale = replace(SMALL, stream=(2000, 8, 4), rate=50.0)
    arrivals = workloads.make("stream", scale, 0, 300).arrivals
    assert arrivals == sorted(arrivals)
    assert len(arrivals) / arrivals[-1] == pytest.approx(50, rel=0.1)


def test_need_counts_what_a_step_cannot_avoid(model_dir):
    config = ModelConfig.from_directory(model_dir)
    q, kv, hidden, mlp, head = 32, 16, 32, 64, 300 * 32
    layer = hidden * (2 * q + 2 * kv) + 3 * hidden * mlp + 2 * 16 + 2 * hidden
    need = workloads.Need.of(bench.Workload([[0] * 3], [3]), config)
    # Five tokens go through the layers, three through the head; token i has i + 1 keys.
    pairs = 1 + 2 + 3 + 4 + 5
    products = 2 * (5 * (layer + hidden) + 3 * head)
    assert need.operations == products + 4 * q * pairs
    assert need.bytes == 2 * 2 * (layer + hidden + head) + (4 + 5) * 2 * kv * 2


def test_need_counts_a_shared_prefix_once(model_dir):
    config = ModelConfig.from_directory(model_dir)
    alone = workloads.Need.of(bench.Workload([[0] * 8], [1]), config)
    shared = workloads.Need.of(bench.Workload([[0] * 8] * 2, [1, 1]), config, shared=6)
    apart = workloads.Need.of(bench.Workload([[0] * 8] * 2, [1, 1]), config)
    assert alone.operations < shared.operations < apart.operations == 2 * alone.operations


# --- the rules ---


class Engine:
    """Completes with zeros; `change` spoils what it does."""

    note = ""

    def __init__(self, change=None):
        self.change, self.requests, self.emptied = change, {}, 0

    def generate(self, prompts, outputs, temperature):
        if self.change == "prompts":
            prompts[0].append(1)
        if self.change == "lost":
            return [[0] * n for n in outputs[1:]]
        token = 300 if self.change == "token" else 0
        return [[token] * (n - (self.change == "short")) for n in outputs]

    def reset_prefix_cache(self):
        self.emptied += 1
        return self.change != "cache"

    def add_request(self, prompt, output, temperature):
        name = f"r{len(self.requests)}"
        self.requests[name] = [0, output + (self.change == "long")]
        return name

    def step(self):
        for request in self.requests.values():
            request[0] += request[0] < request[1]
        return [(name, count) for name, (count, _) in self.requests.items()]


JOB = {"vocab_size": 300, "temperature": 0.6, "runs": 2}


def made(name):
    return json.loads(json.dumps(asdict(workloads.make(name, SMALL, 0, 300))))


def test_an_honest_engine_passes():
    engine = Engine()
    result = worker.measure(engine, made("batch16"), JOB)
    assert set(result["seconds"]) == {"whole", "first"}
    assert engine.emptied == 2  # before each part


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("short", "request 0 got 4 output tokens in place of 5"),
        ("lost", "15 completions of 16 requests"),
        ("token", "outside the vocabulary"),
        ("prompts", "changed the prompts"),
        ("cache", "could not be emptied"),
    ],
)
def test_an_unfair_engine_is_found_out(change, message):
    with pytest.raises(worker.Unfair, match=message):
        worker.measure(Engine(change), made("batch16"), JOB)


def test_arriving_requests_are_timed_one_by_one():
    work = made("stream")
    result = worker.measure(Engine(), work, JOB)
    assert len(result["ttft_s"]) == 3
    assert all(t > 0 for t in result["ttft_s"])
    assert len(result["tpot_s"]) == sum(n > 1 for n in work["parts"]["whole"][0][1])
    assert result["seconds"]["whole"] >= work["arrivals"][-1]


def test_a_stream_with_too_many_tokens_is_found_out():
    work = made("stream")
    work["arrivals"] = [0.0] * 3
    with pytest.raises(worker.Unfair, match="in place of"):
        worker.measure(Engine("long"), work, JOB)


def test_a_workload_that_cannot_fit_the_time_limit_is_not_started():
    clock = worker.Clock(10.0)
    assert clock.reason_to_skip(made("batch1"), 2) is None  # nothing is known yet
    clock.learn(made("batch1"), warm_up=2.0, run=1.0)  # 6 output tokens: 5 and 1
    assert clock.reason_to_skip(made("batch1"), 2) is None  # 1 + 3 s
    assert clock.reason_to_skip(made("batch16"), 2) is None  # 16 times the tokens, and the rate
    assert "of the time limit were left" in str(clock.reason_to_skip(made("batch1"), 9))


def test_a_failing_workload_is_recorded_and_the_next_one_run():
    records = []

    def emit(kind, **fields):
        records.append({"kind": kind, **fields})

    cases = [
        {"timed": made(n), "warm_up": made(n), "profile": False} for n in ("batch1", "prefill")
    ]
    cases[0]["timed"]["parts"]["whole"][0][1][0] = -1
    worker.measure_all(Engine(), JOB | {"workloads": cases}, worker.Clock(100), emit)
    assert [(r["kind"], r["workload"]) for r in records] == [
        ("failure", "batch1"), ("run", "prefill"), ("run", "prefill")
    ]  # fmt: skip


def test_an_engine_without_steps_skips_the_arrivals():
    class Batches:
        generate, reset_prefix_cache = Engine.generate, Engine.reset_prefix_cache

    records, name = [], "stream"
    case = {"timed": made(name), "warm_up": made(name), "profile": False}
    emit = lambda kind, **fields: records.append((kind, fields["reason"]))  # noqa: E731
    worker.measure_all(Batches(), JOB | {"workloads": [case]}, worker.Clock(100), emit)
    assert records == [("skip", "it takes whole batches only, no arriving requests")]


# --- profiles ---


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x64", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("void cutlass::device_kernel<flash::enable_sm90<...>>", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("void vllm::reshape_and_cache_flash_kernel", "KV write"),
        ("norm_rope_write", "KV write"),
        ("fusion_3 jit(run)/jit(_draw)/reduce", "sampling"),
        ("triton_poi_fused_mul_silu_0", "norms, activations, the rest"),
        ("Memcpy DtoH", "copies between host and device"),
    ],
)
def test_category_of_a_kernel(name, kind):
    assert profiling.category(name) == kind


def test_overlapping_kernels_count_once():
    times, idle = profiling.uncovered([(0, 4, "a"), (2, 6, "b"), (3, 5, "c"), (8, 9, "a")])
    assert (times, idle) == ({"a": 5, "b": 2}, 2)


def test_nested_operators_count_without_what_they_call():
    assert profiling.self_times([(0, 10, "a"), (1, 4, "b"), (2, 3, "c"), (5, 6, "c")]) == {
        "a": 6, "b": 2, "c": 2
    }  # fmt: skip


# --- the random model ---


def test_a_random_model_is_written_once(model_dir):
    file = model_dir / "model.safetensors"
    before = file.stat().st_mtime_ns
    random_model.write(model_dir, bench.qwen3_config("0.6B") | TINY)
    assert file.stat().st_mtime_ns == before


def test_a_random_model_loads_in_both_frameworks(model_dir, new_engine):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    weights = model.state_dict()
    assert weights["model.norm.weight"].eq(1).all()
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert model.num_parameters() == main.parameters(ModelConfig.from_directory(model_dir))
    assert new_engine(model_dir).tokenizer.decode([5]) == "t5"


# --- adapters and report ---


@pytest.mark.parametrize("name", ENGINES)
def test_an_adapter_has_at_most_40_lines(name):
    file = ROOT / "scripts" / "compare" / "adapters" / f"{name}.py"
    assert len(file.read_text().splitlines()) <= 40


def sample(digest="same"):
    """Results of two engines, one of them partly failed, and an absent one."""
    common = {"round": 0, "run": 0, "joules": 3.0}
    need = {"bytes": 1e9, "operations": 1e9, "rate": 8.0, "requests": 2, "longest_output": 5}
    names = {"batch1": 10, "batch16": 160, "prefill": 2, "prefix": 12, "stream": 20, "bench": 30}
    records = [
        {"kind": "settings", "date": "2026-01-01", "model": "a <model>", "parameters": 5,
         "dtype": "float32", "rounds": 1, "runs": 1, "temperature": 0.6,
         "bandwidth_tb_s": 0.1, "peak_tflop_s": 0.2},
        {"kind": "machine", "cpu": "a CPU", "cores": 2, "gpu": None},
        *({"kind": "workload", "name": n, "title": n, "prompt_tokens": 64, "output_tokens": t,
           **need} for n, t in names.items()),
        {"kind": "absent", "engine": "vllm", "missing": ["vllm"], "install": "pip install vllm"},
        {"kind": "failure", "engine": "transformers_eager", "round": 0, "workload": "bench",
         "reason": "RuntimeError: out of memory"},
    ]  # fmt: skip
    for engine, speed in (("nanovllm_jax", 1.0), ("transformers_eager", 2.0)):
        records.append({"kind": "engine", "engine": engine, "round": 0, "start_s": 3.0,
                        "versions": {"numpy": "2"}, "note": "a note"})  # fmt: skip
        records.append({"kind": "check", "engine": engine, "tokens": [[1, int(speed)], [1, 1]]})
        for name in names:
            parts = {"batch1": ("whole", "first"), "batch16": ("whole", "first"),
                     "prefix": ("shared", "own")}.get(name, ("whole",))  # fmt: skip
            if engine == "transformers_eager" and name in ("stream", "bench"):
                continue
            seconds = {part: speed / (i + 1) for i, part in enumerate(parts)}
            run = {"kind": "run", "engine": engine, "workload": name, "seconds": seconds, **common}
            run["digest"] = digest if engine == "transformers_eager" else "same"
            if name == "stream":
                run |= {"ttft_s": [0.01, 0.02, 0.03], "tpot_s": [0.001, 0.002]}
            records.append(run)
        records.append({"kind": "profile", "engine": engine, "workload": "batch16", "idle": None,
                        "unit": "operators", "top": [["dot.1", "matrix products", 0.5]],
                        "seconds": {"attention": 0.5, "matrix products": 0.5}})  # fmt: skip
    return records


def test_the_figures_are_tokens_over_seconds():
    results = report.Results(sample())
    rows = {title: values for title, _, values in report.figures(results)}
    assert rows["batch 16, output tok/s"]["transformers_eager"] == [160 / 2.0]
    assert rows["batch 16, ms a token"]["nanovllm_jax"] == [(1.0 - 0.5) / 4 * 1e3]
    assert rows["prefill, input tok/s"]["nanovllm_jax"] == [64.0]
    assert rows["bench, output tok/s"] == {"nanovllm_jax": [30.0], "transformers_eager": []}
    assert rows["bench, joules an output token"]["nanovllm_jax"] == [0.1]
    assert rows["arrivals, time to first token, median ms"]["nanovllm_jax"] == [20.0]


def test_percentiles_lie_between_their_neighbours():
    assert report.percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert report.percentile([0.0, 1.0], 90) == pytest.approx(0.9)
    assert report.percentile([7.0], 99) == 7.0


def test_the_report_is_one_page_that_says_what_is_there_and_what_is_not(tmp_path):
    pytest.importorskip("matplotlib")
    source = tmp_path / "r.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in sample()))
    assert main.main(["--from", str(source)]) == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count("<svg") == 6
    for words in ("a &lt;model&gt;", "pip install vllm", "out of memory", "batch 16, ms a token",
                  "p99", "more is better", "first token 2 of 2, all 2 tokens 1 of 2"):  # fmt: skip
        assert words in page, words
    assert "<script" not in page
    assert not any(f'{key}="http' in page for key in ("src", "href"))  # self-contained
    before = page
    assert main.main(["--from", str(source)]) == 0
    assert (tmp_path / "r.html").read_text() == before


def test_results_of_unequal_work_are_refused():
    with pytest.raises(UsageError, match="different work"):
        report.Results(sample(digest="another"))


def test_a_damaged_line_of_results_is_named(tmp_path):
    source = tmp_path / "r.jsonl"
    source.write_text('{"kind": "settings"}\n{"kind": "run", \n')
    with pytest.raises(UsageError, match="line 2 is no result"):
        report.read(source)


# --- from end to end ---


def test_an_engine_runs_in_its_own_process_and_an_absent_one_is_listed(
    model_dir, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(workloads.SCALES, "cpu", SMALL)
    argv = ["--model", str(model_dir), "--engines", "nanovllm_jax,nanovllm", "--rounds", "2"]
    argv += ["--runs", "1", "--workloads", "batch1,batch16,prefix,stream", "--limit", "120"]
    assert main.main([*argv, "--output", str(tmp_path / "out")]) == 0
    records = report.read(tmp_path / "out.jsonl")
    runs = [(r["engine"], r["round"], r["workload"]) for r in records if r["kind"] == "run"]
    names = ("batch1", "batch16", "prefix", "stream")
    assert runs == [("nanovllm_jax", i, n) for i in range(2) for n in names], capsys.readouterr()
    assert [r["engine"] for r in records if r["kind"] == "absent"] == ["nanovllm"]
    assert [r["workload"] for r in records if r["kind"] == "profile"] == ["batch16"]
    assert not [r for r in records if r["kind"] == "failure"]
    page = (tmp_path / "out.html").read_text()
    assert "nano-vLLM" in page
    assert "absent" in page


def test_engines_are_added_to_results_of_the_same_work_only(
    model_dir, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(workloads.SCALES, "cpu", SMALL)
    argv = ["--model", str(model_dir), "--output", str(tmp_path / "out"), "--limit", "120"]
    argv += ["--rounds", "1", "--runs", "1", "--workloads", "batch1", "--engines"]
    added = [*argv, "transformers_eager", "--add"]
    assert main.main(added) == 2
    assert "is not there" in capsys.readouterr().err
    assert main.main([*argv, "nanovllm"]) == 0
    assert main.main([*added, "--temperature", "0"]) == 2
    assert "the settings of" in capsys.readouterr().err
    assert main.main([*added, "--workloads", "batch16"]) == 2
    assert "the batch16 of" in capsys.readouterr().err
    assert main.main([*added, "--runs", "2"]) == 0
    assert main.main(added) == 2
    assert "has results of transformers_eager already" in capsys.readouterr().err
    results = report.Results(report.read(tmp_path / "out.jsonl"))
    assert results.engines == ["transformers_eager"]
    assert list(results.absent) == ["nanovllm"]
    assert len(results.of("batch1", "transformers_eager")) == 2
    page = (tmp_path / "out.html").read_text()
    assert "(rounds: 1, runs in each: 2)" in page


def test_a_worker_past_its_limit_is_ended_and_what_it_wrote_is_kept(
    model_dir, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    started = []
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]

    def popen(command, **options):
        results = json.loads(Path(command[-1]).read_text())["results"]
        line = {"kind": "engine", "engine": "nanovllm_jax", "round": 0, "start_s": 1.0,
                "versions": {}, "note": ""}  # fmt: skip
        with open(results, "a") as file:
            file.write(json.dumps(line) + "\n")
        started.append(subprocess_popen(sleeper, **options))
        return started[-1]

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(main.subprocess, "Popen", popen)
    monkeypatch.setattr(main, "GRACE_S", 0.1)
    argv = ["--model", str(model_dir), "--engines", "nanovllm_jax", "--limit", "0.5"]
    with contextlib.suppress(UsageError):
        assert main.main([*argv, "--output", str(tmp_path / "out")]) == 0
    kinds = [r["kind"] for r in report.read(tmp_path / "out.jsonl")]
    assert kinds[-2:] == ["engine", "failure"]
    assert len(started) == 1
    assert started[0].poll() is not None
    assert "time limit" in (tmp_path / "out.html").read_text()


def test_hidden_gpus_are_not_asked(monkeypatch):
    monkeypatch.setattr(machine.subprocess, "run", lambda *args, **options: pytest.fail("asked"))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpu_name() is None
    assert machine.energy() is None
