"""scripts/ray_generate.py: kills lose nothing and repeat nothing; bad input is named."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.tools.options import DEMO_MODEL
from scripts import ray_generate

ROOT = Path(__file__).parents[1]

PROMPTS = [f"Tell me a story about {i} foxes and a lantern." for i in range(96)]
ENGINE = {"max_num_seqs": 8, "max_model_len": 512, "max_num_batched_tokens": 512}


def command(folder, *more):
    """The script's command line over PROMPTS, and with it the file of prompts."""
    rows = [json.dumps({"id": f"p{i}", "prompt": prompt}) for i, prompt in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(rows), "utf-8")
    options = {"actors": 2, "batch-size": 8, "max-tokens": 150, "temperature": 0.0} | {
        name.replace("_", "-"): value for name, value in ENGINE.items()
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [str(folder / "prompts.jsonl"), "--output", str(folder / "out"), *flags, *more]


class Run:
    """The script in a process, with its lines as they come."""

    def __init__(self, argv):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "ray_generate.py"), *argv],
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_DEDUP_LOGS": "0"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        )  # fmt: skip
        self.text = ""

    def __enter__(self):
        self.timer = threading.Timer(300, self.process.kill)
        self.timer.start()
        return self

    def __exit__(self, *exc_info):
        self.timer.cancel()
        self.process.kill()
        self.process.communicate()

    def ready(self):
        """Process ids of the actors whose engines have started."""
        return [int(pid) for pid in re.findall(r"actor (\d+): engine ready", self.text)]

    def until(self, condition):
        """Read lines until `condition` holds after one of them."""
        for line in self.process.stdout:
            self.text += line
            if condition(line):
                return
        pytest.fail(f"the script ended early:\n{self.text}")

    def batches(self, at_least, of_actors=0):
        self.until(
            lambda line: (
                (found := re.match(r"(\d+) of \d+ batches", line))
                and int(found[1]) >= at_least
                and len(self.ready()) >= of_actors
            )
        )

    def end(self):
        self.text += self.process.stdout.read()
        return self.process.wait()


def parts(folder):
    """The finished parts: {name: (when it was written, ids)}."""
    return {
        path.name: (
            path.stat().st_mtime_ns,
            [json.loads(line)["id"] for line in path.open(encoding="utf-8")],
        )
        for path in (folder / "out").glob("part-*.jsonl")
    }


@pytest.mark.slow
def test_a_killed_actor_and_a_killed_driver_lose_and_repeat_nothing(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: the extra [ray]")
    with Run(command(tmp_path)) as first:
        first.batches(1, of_actors=2)
        os.kill(first.ready()[0], signal.SIGKILL)
        done = len(parts(tmp_path))
        first.batches(done + 2)  # goes on without it
        first.process.kill()
    assert not (tmp_path / "out" / "completions.jsonl").exists()
    before = parts(tmp_path)
    assert len(before) < 12, "nothing was left to do: the run was killed too late"

    with Run(command(tmp_path, "--actors=1")) as second:  # which has to come back
        second.until(lambda line: "to do" in line)
        left = int(re.search(r"96 prompts, (\d+) to do", second.text)[1])
        assert 0 < left <= 96 - 8 * len(before)
        second.until(lambda line: second.ready())
        os.kill(second.ready()[0], signal.SIGKILL)
        assert second.end() == 0, second.text
        assert len(second.ready()) == 2

    after = parts(tmp_path)
    assert {name: after[name] for name in before} == before, "a finished part was written again"
    ids = [i for _, part in after.values() for i in part]
    assert sorted(ids) == sorted(f"p{i}" for i in range(96))  # each once, in the parts too

    rows = [
        json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").open(encoding="utf-8")
    ]
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(96)]
    with LLM(str(DEMO_MODEL), **ENGINE) as llm:
        params = SamplingParams(temperature=0, max_tokens=150)
        expected = llm.generate(PROMPTS, params, use_tqdm=False)
    for row, prompt, output in zip(rows, PROMPTS, expected, strict=True):
        assert row == {"id": row["id"], "prompt": prompt} | output


def test_a_refused_prompt_is_reported_beside_the_others(new_engine, checkpoint):
    generate = ray_generate.Generate.__new__(ray_generate.Generate)
    generate.llm = new_engine(checkpoint(tokenizer=True))
    generate.sampling, generate.seed = {"temperature": 1.0, "max_tokens": 4}, 0
    rows = [{"id": i, "prompt": p} for i, p in enumerate(["a b", [], "c", "x" * 800, [1, 2], 7])]
    got = generate.complete(rows)
    assert [row["id"] for row in got] == [0, 1, 2, 3, 4, 5]
    errors = [row.get("error", "") for row in got]
    assert ["empty" in errors[1], "800 tokens" in errors[3], "token ids" in errors[5]] == [True] * 3
    assert [bool(row["token_ids"]) for row in got] == [True, False, True, False, True, False]
    # A prompt's tokens are its own: the same in another batch, other ones under another id.
    assert generate.complete(rows[2:3]) == got[2:3]
    others = [generate.complete([{"id": i, "prompt": "c"}])[0] for i in range(10, 14)]
    assert len({tuple(row["token_ids"]) for row in others}) > 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "x"}', "prompts.jsonl:1 is not like"),
        ('{"id": 1, "prompt": "x"}\nnot json', "prompts.jsonl:2 is not like"),
        ('{"id": 1, "prompt": "x"}\n{"id": 1, "prompt": "y"}', "the id 1 has been used above"),
        ('{"id": 1.5, "prompt": "x"}', "an id is an integer or a string"),
        ("", "has no prompts"),
        (None, "cannot be read"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, capsys, lines, message):
    pytest.importorskip("ray", reason="Ray is not installed: the extra [ray]")
    path = tmp_path / "prompts.jsonl"
    if lines is not None:
        path.write_text(lines, "utf-8")
    assert ray_generate.main([str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_rerun_cannot_mix_two_kinds_of_completions(tmp_path):
    ray_generate.check_settings(tmp_path, {"model": "a", "temperature": 0.0})
    ray_generate.check_settings(tmp_path, {"model": "a", "temperature": 0.0})
    with pytest.raises(ray_generate.UsageError, match=r"temperature=0.0, not 1.0"):
        ray_generate.check_settings(tmp_path, {"model": "a", "temperature": 1.0})


def test_a_changed_prompt_is_run_again_and_appended_ones_are_new(tmp_path):
    rows = [{"id": i, "prompt": f"p{i}"} for i in range(5)]
    first = ray_generate.batches(rows, {}, 2)
    assert [json.loads(batch["rows"]) for batch in first] == [rows[:2], rows[2:4], rows[4:]]
    for batch in first:
        ray_generate.write(tmp_path / batch["name"], json.loads(batch["rows"]))
    done = ray_generate.read_parts(tmp_path)
    assert ray_generate.batches(rows, done, 3) == []
    rows[1] = {"id": 1, "prompt": "another"}
    rows.append({"id": 5, "prompt": "p5"})
    again = [json.loads(batch["rows"]) for batch in ray_generate.batches(rows, done, 2)]
    assert again == [[rows[1]], [rows[5]]]
