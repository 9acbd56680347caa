"""Comparing engines: equal work for all of them, rules that are enforced, one report."""

import json
import math
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import jax
import pytest

from nanovllm_jax import cli
from nanovllm_jax.models import ModelConfig, parameters
from nanovllm_jax.tools import roofline, shapes
from nanovllm_jax.tools.compare import (
    adapters,
    machine,
    main,
    plots,
    random_model,
    results,
    worker,
    workloads,
)
from nanovllm_jax.tools.compare.job import Job, Workload
from nanovllm_jax.tools.compare.results import (
    Absent,
    Check,
    Failure,
    Machine,
    Profile,
    Results,
    Run,
    Settings,
    Skip,
    Start,
    Task,
)
from nanovllm_jax.tools.options import UsageError

ROOT = Path(__file__).parents[1]
TINY = replace(
    shapes.SHAPES["0.6B"], vocab_size=300, hidden_size=32, intermediate_size=64, num_layers=1,
    num_heads=2, num_kv_heads=1, head_dim=16, max_position_embeddings=512, eos_token_ids=(2,),
)  # fmt: skip
SMALL = workloads.Scale(
    prompt=4, output=5, prefill=(2, 8), prefix=(3, 6, 2, 2), stream=(3, 8, 4), rate=100.0,
    bench=(4, 8), max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return random_model.write(tmp_path_factory.mktemp("tiny"), TINY)


# --- the command line ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--engines", "sglang"], "--engines 'sglang' is not known"),
        (["--workloads", "batch2"], "--workloads 'batch2' is not known"),
        (["--engines", ""], "--engines '' is not known"),
        (["--random-weights", "9B"], "9B"),
        (["--random-weights", "8B", "--model", "m"], "not allowed with"),
        (["--limit", "vllm=soon"], "vllm=soon is not"),
        (["--limit", "-3"], "-3 is not"),
        (["--python-path", "vllm=/no/such/folder"], "is not ENGINE=DIR"),
        (["--runs", "0"], "--runs must be positive, got 0"),
        (["--rate", "0"], "--rate must be positive"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--from", "no-such.jsonl"], "--from no-such.jsonl is not there"),
        (["--picture", "x.png"], "name them with --from"),
        (["--model", "no-such-model"], "no-such-model/config.json"),
        (["--colour"], "--colour"),
    ],
)
def test_bad_usage_is_one_line_and_names_the_value(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_options_of_single_engines():
    args = main.parse(["--limit", "90", "--limit", "vllm=200", "--python-path", f"vllm={ROOT}"])
    assert args.limit == {"": 90.0, "vllm": 200.0}
    assert args.python_path == {"vllm": str(ROOT)}


def test_the_order_of_engines_alternates(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(main, "run_worker", lambda job, *others: ran.append(job.engine))
    results.append(tmp_path / "r.jsonl", *sample()[:2])
    args = main.parse(["--engines", "vllm,nanovllm_jax", "--rounds", "3"])
    main.run_all(args, replace(job(), results=tmp_path / "r.jsonl"))
    assert ran == ["nanovllm_jax", "vllm", "vllm", "nanovllm_jax", "nanovllm_jax", "vllm"]


# --- workloads ---


@pytest.mark.parametrize("name", workloads.NAMES)
def test_warm_up_has_other_tokens_of_the_same_kind(name):
    timed, again = (workloads.make(name, SMALL, 0, 300) for _ in range(2))
    warm_up = workloads.make(name, SMALL, 1, 300)
    assert timed.digest == again.digest != warm_up.digest
    assert timed.parts.keys() == warm_up.parts.keys()
    waves = [wave for part in timed.parts.values() for wave in part]
    longest = max(len(p) + n for wave in waves for p, n in zip(*wave, strict=True))
    assert longest <= SMALL.max_model_len
    assert all(0 <= token < 300 for prompts, _ in waves for prompt in prompts for token in prompt)


def test_the_bench_at_full_size_is_nano_vllms():
    [wave] = workloads.make("bench", workloads.SCALES["gpu"], 0, 151936).main
    assert (sum(map(len, wave[0])), sum(wave[1])) == (142_827, 133_966)


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


def described(name, prompts, outputs):
    costs = roofline.CostModel(TINY, parameters(TINY))
    work = Workload(name, name, {"whole": [(prompts, outputs)]})
    return workloads.describe(work, SMALL, costs)


def test_the_least_work_is_what_no_engine_can_avoid():
    q, kv, hidden, mlp, head = 32, 16, 32, 64, 300 * 32
    layer, norms = hidden * (2 * q + 2 * kv) + 3 * hidden * mlp, 2 * 16 + 3 * hidden
    least = described("batch1", [[0] * 3], [3])
    # Five tokens go through the layers, three through the head; token i has i + 1 keys.
    assert least.operations == 2 * (5 * layer + 3 * head) + 4 * q * (1 + 2 + 3 + 4 + 5)
    assert least.bytes == 2 * 2 * (layer + norms + head) + (4 + 5) * 2 * kv * 2


def test_a_shared_prefix_is_computed_once():
    alone = described("prefix", [[0] * 8], [1])
    shared = described("prefix", [[0] * 8] * 2, [1, 1])
    apart = described("prefill", [[0] * 8] * 2, [1, 1])
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


def made(name):
    return workloads.make(name, SMALL, 0, 300)


def job(*names):
    return Job(
        model="", limits=adapters.Limits("cpu", "float32", {"max_num_seqs": 2}), vocab_size=300,
        temperature=0.6, runs=2, check=([], []), cases=[(made(n), made(n)) for n in names],
        results=Path("r.jsonl"), engine="vllm", seconds=math.inf,
    )  # fmt: skip


def test_an_honest_engine_passes():
    engine = Engine()
    run = worker.measure(engine, made("batch16"), job())
    assert set(run.seconds) == {"whole", "first"}
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
        worker.measure(Engine(change), made("batch16"), job())


def test_arriving_requests_are_timed_one_by_one():
    work = made("stream")
    run = worker.measure(Engine(), work, job())
    assert len(run.ttft_s) == 3
    assert all(t > 0 for t in run.ttft_s)
    assert len(run.tpot_s) == sum(n > 1 for n in work.main[0][1])
    assert run.seconds["whole"] >= work.arrivals[-1]


def test_a_stream_with_too_many_tokens_is_found_out():
    work = replace(made("stream"), arrivals=[0.0] * 3)
    with pytest.raises(worker.Unfair, match="in place of"):
        worker.measure(Engine("long"), work, job())


def test_a_workload_that_cannot_fit_the_time_limit_is_not_started():
    one, sixteen = made("batch1"), made("batch16")
    assert worker.reason_to_skip(one, 2, 10.0, []) == ""  # nothing is known yet
    done = [(one, 2.0, 1.0)]  # 6 output tokens, 5 and 1: 2 s to warm up, 1 s after it
    assert worker.reason_to_skip(one, 2, 10.0, done) == ""  # 1 + 3 s
    assert worker.reason_to_skip(sixteen, 2, 10.0, done) == ""  # 16 times the tokens, and the rate
    reason = worker.reason_to_skip(one, 9, 10.0, done)
    assert reason.startswith("would take about 11 s or more (at 6 output tok/s), and 10 s of the")


def test_a_failing_workload_is_recorded_and_the_next_one_run():
    records, work = [], job("batch1", "prefill")
    work.cases[0][0].main[0][1][0] = -1
    worker.measure_all(Engine(), work, records.append)
    assert [(type(r), r.workload) for r in records] == [
        (Failure, "batch1"), (Run, "prefill"), (Run, "prefill")
    ]  # fmt: skip


def test_an_engine_without_steps_skips_the_arrivals():
    class Batches:
        generate, reset_prefix_cache = Engine.generate, Engine.reset_prefix_cache

    records = []
    worker.measure_all(Batches(), job("stream"), records.append)
    reason = "it takes whole batches only, no arriving requests"
    assert records == [Skip("vllm", 0, "stream", reason)]


# --- the random model ---


def test_a_random_model_is_written_once(model_dir):
    [file, *_] = model_dir.glob("*.safetensors")
    before = file.stat().st_mtime_ns
    random_model.write(model_dir, TINY)
    assert file.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_random_model_loads_in_both_frameworks(model_dir, new_engine):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    weights = model.state_dict()
    assert weights["model.norm.weight"].eq(1).all()
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    ours = parameters(ModelConfig.from_directory(model_dir))
    assert model.num_parameters() == sum(x.size for x in jax.tree.leaves(ours))
    assert new_engine(model_dir).tokenizer.decode([5]) == "t5"


# --- adapters and report ---


@pytest.mark.parametrize("name", adapters.ENGINES)
def test_an_adapter_has_at_most_40_lines(name):
    file = Path(adapters.__file__).with_name(f"{name}.py")
    assert len(file.read_text("utf-8").splitlines()) <= 40


def sample(digest="same"):
    """Results of two engines, one of them partly failed, and an absent one."""
    names = {"batch1": 10, "batch16": 160, "prefill": 2, "prefix": 12, "stream": 20, "bench": 30}
    parts = {
        "batch1": ("whole", "first"),
        "batch16": ("whole", "first"),
        "prefix": ("shared", "own"),
    }
    records = [
        Settings("2026-01-01", "a <model>", 5, "float32", "cpu", [], 1, 1, 0.6, 0.1, 0.2, {}),
        Machine("Linux", "3.11", "a CPU", 2, None, 0.5, None),
        *(Task(n, n, 2, 5, 64, t, 8.0, 1e9, 1e9) for n, t in names.items()),
        Absent("vllm", 0, ["vllm"], "pip install vllm"),
        Failure("transformers_eager", 0, "bench", "RuntimeError: out of memory"),
    ]
    for engine, speed in (("nanovllm_jax", 1.0), ("transformers_eager", 2.0)):
        records.append(Start(engine, 0, 3.0, {"numpy": "2"}, "a note"))
        records.append(Check(engine, 0, [[1, int(speed)], [1, 1]]))
        for name in names:
            if engine == "transformers_eager" and name in ("stream", "bench"):
                continue
            seconds = {p: speed / (i + 1) for i, p in enumerate(parts.get(name, ("whole",)))}
            given = digest if engine == "transformers_eager" else "same"
            times = ([0.01, 0.02, 0.03], [0.001, 0.002]) if name == "stream" else ([], [])
            records.append(Run(engine, 0, name, 0, seconds, given, 3.0, *times))
        kinds = {"attention": 0.5, "products": 0.5}
        top = [("dot.1", "products", 0.5)]
        records.append(Profile(engine, 0, "batch16", kinds, None, "operators", top))
    return records


def test_the_figures_are_tokens_over_seconds():
    rows = Results(sample()).figures()
    assert rows["batch16, output tok/s"]["transformers_eager"] == [160 / 2.0]
    assert rows["batch16, ms a token"]["nanovllm_jax"] == [(1.0 - 0.5) / 4 * 1e3]
    assert rows["prefill, input tok/s"]["nanovllm_jax"] == [64.0]
    assert rows["prefix, s with a prefix each"]["transformers_eager"] == [1.0]
    assert rows["bench, output tok/s"] == {"nanovllm_jax": [30.0]}
    assert rows["bench, joules an output token"]["nanovllm_jax"] == [0.1]
    assert rows["stream, median ms to the first token"]["nanovllm_jax"] == [20.0]


def test_the_report_is_one_page_that_says_what_is_there_and_what_is_not(tmp_path):
    pytest.importorskip("matplotlib")
    source, picture = tmp_path / "r.jsonl", tmp_path / "r.png"
    results.append(source, *sample())
    assert main.main(["--from", str(source)]) == 0
    page = (tmp_path / "r.html").read_text("utf-8")
    assert page.count("<svg") == 6
    for words in ("a &lt;model&gt;", "pip install vllm", "<td>28.0</td>", "out of memory",
                  "batch16, ms a token", "p99", "more is better",
                  "first token 2 of 2, all 2 tokens 1 of 2"):  # fmt: skip
        assert words in page, words
    assert "<script" not in page
    assert not any(f'{key}="http' in page for key in ("src", "href"))  # self-contained
    assert main.main(["--from", str(source), "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main.main(["--from", str(source)]) == 0
    assert (tmp_path / "r.html").read_text("utf-8") == page


@pytest.mark.parametrize("name", ["cpu-demo", "h100-0.6B"])
def test_the_reports_of_earlier_versions_can_be_read(name):
    pytest.importorskip("matplotlib")
    found = Results(results.read(ROOT / "docs" / "reports" / f"{name}.jsonl"))
    assert found.engines[0] == "nanovllm_jax"
    assert found.figures()
    assert plots.profiles(found)


def test_the_work_is_still_that_of_the_published_report():
    found = Results(results.read(ROOT / "docs" / "reports" / "h100-0.6B.jsonl"))
    for name in found.tasks:
        made = workloads.make(name, workloads.SCALES["gpu"], 0, 151936)
        assert next(iter(found.of("nanovllm_jax", name))).digest == made.digest


def test_a_report_without_matplotlib_is_bad_usage(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="pip install"):
        main.main(["--model", "any"])


def test_results_of_unequal_work_are_refused():
    with pytest.raises(UsageError, match="different work"):
        Results(sample(digest="another"))


def test_a_damaged_line_of_results_is_named(tmp_path):
    source = tmp_path / "r.jsonl"
    results.append(source, sample()[0])
    for damaged in ('{"kind": "run", ', '{"kind": "run", "engine": "vllm"}', '{"kind": "?"}', "1"):
        (tmp_path / "damaged.jsonl").write_text(f"{source.read_text('utf-8')}{damaged}\n", "utf-8")
        with pytest.raises(UsageError, match="line 2 is no result"):
            results.read(tmp_path / "damaged.jsonl")


# --- from end to end ---


@pytest.fixture
def small(monkeypatch, model_dir, tmp_path):
    """The options of a short comparison, whose results are out.jsonl."""
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(workloads.SCALES, "cpu", SMALL)
    return ["--model", str(model_dir), "--output", str(tmp_path / "out"), "--limit", "120",
            "--runs", "1"]  # fmt: skip


def test_an_engine_runs_in_its_own_process_and_an_absent_one_is_listed(small, tmp_path, capsys):
    names = ("batch1", "batch16", "prefix", "stream")
    argv = [*small, "--engines", "nanovllm_jax,nanovllm", "--workloads", ",".join(names)]
    assert main.main(argv) == 0
    records = results.read(tmp_path / "out.jsonl")
    runs = [(r.engine, r.round, r.workload) for r in records if isinstance(r, Run)]
    assert runs == [("nanovllm_jax", i, n) for i in range(2) for n in names], capsys.readouterr()
    assert [r.engine for r in records if isinstance(r, Absent)] == ["nanovllm"]
    assert [r.workload for r in records if isinstance(r, Profile)] == ["batch16"]
    assert not [r for r in records if isinstance(r, Failure)]
    page = (tmp_path / "out.html").read_text("utf-8")
    assert "nano-vLLM" in page
    assert "absent" in page


def test_engines_are_added_to_results_of_the_same_work_only(small, tmp_path, capsys):
    pytest.importorskip("torch")
    argv = ["compare", *small, "--rounds", "1", "--workloads", "batch1", "--engines"]
    added = [*argv, "transformers_eager", "--add"]
    assert cli.main(added) == 2
    assert "is not there" in capsys.readouterr().err
    assert cli.main([*argv, "nanovllm"]) == 0
    assert cli.main([*added, "--temperature", "0"]) == 2
    assert "the settings of" in capsys.readouterr().err
    assert cli.main([*added, "--workloads", "batch16"]) == 2
    assert "the batch16 of" in capsys.readouterr().err
    assert cli.main([*added, "--runs", "2"]) == 0
    assert cli.main(added) == 2
    assert "has results of transformers_eager already" in capsys.readouterr().err
    found = Results(results.read(tmp_path / "out.jsonl"))
    assert found.engines == ["transformers_eager"]
    assert list(found.absent) == ["nanovllm"]
    assert len(found.of("transformers_eager", "batch1")) == 2
    assert "(rounds: 1, runs in each: 2)" in (tmp_path / "out.html").read_text("utf-8")


def test_a_worker_past_its_limit_is_ended_and_what_it_wrote_is_kept(
    small, tmp_path, monkeypatch, capsys
):
    started = []

    def popen(command, **options):
        file = pickle.loads(Path(command[-1]).read_bytes()).results
        results.append(file, Start("nanovllm_jax", 0, 1.0, {}, ""))
        sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
        started.append(real_popen(sleeper, **options))
        return started[-1]

    real_popen = subprocess.Popen
    monkeypatch.setattr(main.subprocess, "Popen", popen)
    monkeypatch.setattr(main, "GRACE_S", 0.1)
    assert main.main([*small, "--engines", "nanovllm_jax", "--limit", "0.5"]) == 1
    assert "nanovllm_jax failed: stopped after its time limit" in capsys.readouterr().err
    kinds = [type(r) for r in results.read(tmp_path / "out.jsonl")]
    assert kinds[-2:] == [Start, Failure]
    assert [process.poll() is not None for process in started] == [True]
    assert "time limit" in (tmp_path / "out.html").read_text("utf-8")


def worker_process(monkeypatch, code):
    """Have workers run this code, in which `start` writes the engine's report of its start."""

    def popen(command, **options):
        job = pickle.loads(Path(command[-1]).read_bytes())
        start = Start(job.engine, job.round, time.time() - job.started, {}, "")
        line = {"kind": "engine", **asdict(start)}
        write = (
            f"start = lambda: open({str(job.results)!r}, 'a').write({json.dumps(line)!r} + '\\n')"
        )
        program = f"import time\n{write}\n{code}"
        return real_popen([sys.executable, "-c", program], **options)

    real_popen = subprocess.Popen
    monkeypatch.setattr(main.subprocess, "Popen", popen)


def test_a_start_takes_nothing_of_the_limit(small, monkeypatch):
    """With a cold cache, two slow cores compile for longer than an engine may take."""
    worker_process(monkeypatch, "time.sleep(1.5); start(); time.sleep(0.2)")
    assert main.main([*small, "--engines", "nanovllm_jax", "--limit", "0.5"]) == 0


def test_an_engine_that_never_starts_is_ended(small, monkeypatch, capsys):
    worker_process(monkeypatch, "time.sleep(60)")
    monkeypatch.setattr(main, "HANG_S", 1.0)
    assert main.main([*small, "--engines", "nanovllm_jax"]) == 1
    assert "it had not started after 1 s" in capsys.readouterr().err


def test_without_a_limit_of_the_user_what_has_begun_is_completed(small, monkeypatch, tmp_path):
    monkeypatch.setattr(main, "LIMIT_S", {"cpu": 0.1})
    monkeypatch.setattr(main, "GRACE_S", 0.1)
    worker_process(monkeypatch, "start(); time.sleep(1.5)")
    assert main.main([*small, "--engines", "nanovllm_jax"]) == 0


def test_hidden_gpus_are_not_asked(monkeypatch):
    monkeypatch.setattr(machine.subprocess, "run", lambda *args, **options: pytest.fail("asked"))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.describe().gpu is None
    assert machine.energy() == 0


def test_a_worker_of_another_engine_starts_without_jax():
    """Its start is timed, and is its own."""
    code = "import sys, nanovllm_jax.tools.compare.worker; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_worker_ends_with_its_parent_and_takes_its_own_children_along():
    code = """if 1:
        import subprocess, time
        from nanovllm_jax.tools.compare import worker
        worker.end_with_parent()
        print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
        time.sleep(60)
    """
    pipes = dict.fromkeys(["stdin", "stdout"], subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes)
    child = int(process.stdout.readline())
    assert process.poll() is None
    process.stdin.close()  # as the end of the parent does
    assert process.wait(20) == -signal.SIGKILL
    process.stdout.read()  # ends when the child's files are closed, a moment before it is gone
    process.stdout.close()

    def runs():
        try:
            return "State:\tZ" not in Path(f"/proc/{child}/status").read_text(encoding="utf-8")
        except OSError:  # it is gone
            return False

    deadline = time.monotonic() + 20
    while runs():
        assert time.monotonic() < deadline
