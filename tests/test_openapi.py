"""What the server's own OpenAPI document lets clients send, and more, drawn at random.

Schemathesis reads the document, draws bodies that fit it and bodies that do not, and checks each
reply: no status from 500 on, only what the document tells of, nothing accepted that does not fit.
Its own command line does the same with thousands of requests:

    schemathesis run http://127.0.0.1:8000/openapi.json --exclude-checks positive_data_acceptance \
        --max-examples 1000 --continue-on-failure
"""

import pytest
from helpers import quick_start
from hypothesis import HealthCheck, Phase, given, settings

from nanovllm_jax import LLM
from nanovllm_jax.tools.options import DEMO_MODEL

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("fastapi")

from schemathesis.generation import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402
from server_thread import serving  # noqa: E402  (needs what is looked for above)

pytestmark = pytest.mark.slow

# A body can fit and be wrong: a token that the vocabulary lacks, or two options at odds.
LAX = [positive_data_acceptance]


@pytest.fixture(scope="module")
def api():
    options = {
        "max_num_seqs": 2,
        "max_model_len": 64,
        "max_num_batched_tokens": 64,
        "num_kvcache_blocks": 2,
    }
    with quick_start(), LLM(DEMO_MODEL, **options) as llm, serving(llm) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize("mode", GenerationMode)
def test_every_reply_is_one_that_the_document_tells_of(api, mode):
    paths = set()
    for found in api.get_all_operations():
        operation = found.ok()
        has_body = operation.method == "post" and operation.path != "/reset_prefix_cache"
        if mode == GenerationMode.NEGATIVE and not has_body:
            continue

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=12 if has_body else 1, deadline=None, derandomize=True, database=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def check(case):
            case.call_and_validate(excluded_checks=LAX, timeout=60)

        check()
        paths.add(operation.path)
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"} <= paths
