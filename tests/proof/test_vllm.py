"""The GPU proof's own logic for vLLM: what it asks and reads, and what it leaves of servers that fail."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from benchmarks.proof import agreement, harness, vllm_agreement
from tests.proof.answering import first_of_free_ports, program

SERVER = """
    backend = argument("--attention-backend")
    if os.environ.get("GLMPLAN_RUN_AS"):
        print("(EngineCore pid=7) ERROR 11-21 10:00:00 [core.py:1] torch.AcceleratorError: CUDA error: on purpose")
        sys.exit("RuntimeError: Engine core initialization failed.\\\\n" + 99 * "the end of a log\\\\n")
    if os.environ.get("GLMPLAN_PORT") == "force":
        print("glmplan port: glmplan=0 vllm=0.33.0 sm=90 compiled_for=90 replaced=a", flush=True)

    class Handler(Answering):
        def do_GET(self):
            self.answer({})
        def do_POST(self):
            asked = self.asked()
            assert asked["logprobs"] == asked["prompt_logprobs"] == 0
            shift = 3.0 if os.environ.get("PROOF_SABOTAGE") == "1" else 0.0
            count = asked["max_tokens"]
            row = lambda token: {str(token): {"logprob": -2.0 - shift, "rank": 1, "decoded_token": None}}
            self.answer({"choices": [{
                "index": number, "token_ids": [5] * count, "logprobs": {"token_logprobs": [-1.0 - shift] * count},
                "prompt_logprobs": [None, *map(row, ids[1:])],
            } for number, ids in reversed(list(enumerate(asked["prompt"])))]})

    serve(Handler)
"""


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> harness.Setting:
    main = tmp_path / "site/vllm/entrypoints/cli/main.py"
    main.parent.mkdir(parents=True)
    for folder in main.parents[:3]:
        (folder / "__init__.py").touch()
    main.write_text(program(SERVER))
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(harness, "FIRST_PORT", first_of_free_ports(8, 60))
    monkeypatch.setattr(harness, "PORT_STEP", 60)
    plugin = harness.install_beside(tmp_path / "plugin", vllm_agreement.VLLM)
    return harness.Setting(
        "0.33.0", tmp_path / "site", plugin, {"plain": tmp_path}, tmp_path / "logs", tmp_path, (0,), vllm_agreement.VLLM
    )


def test_a_whole_agreement_run(setting: harness.Setting):
    jobs = vllm_agreement.jobs(["bf16"], ["sm89"])
    jobs = [job for job in jobs if job.name != "bf16-sm89"]
    outcomes = harness.run(jobs, setting, 200, per_gpu=5, first_wave=2)
    assert [item.error for item in outcomes.values()] == [None] * len(jobs)
    found = agreement.verdict(["bf16"], [], outcomes, len(vllm_agreement.LENGTHS) + len(vllm_agreement.BATCH))
    assert found["holds"], found["lines"]
    answers = outcomes["bf16-stock"].result or {}
    assert (len(answers["single-50"]["prompt"]), len(answers["batch-4"]["prompt"])) == (49, 64)


def test_the_smoke_keeps_every_log_and_prints_the_cause(
    setting: harness.Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert vllm_agreement.smoke(setting, ["bf16"], ["sm80"], tmp_path / "out", 200) == 1
    printed = capsys.readouterr().out
    assert "AcceleratorError: CUDA error: on purpose" in printed[printed.index("--- bf16-sm80") :]
    assert "bf16-port [5, 5, 5, 5, 5, 5, 5, 5] prompt_mean 0.0000 " in printed
    with tarfile.open(tmp_path / "out/smoke-vllm-0.33.0-logs.tar.gz") as packed:
        assert set(packed.getnames()) == {"bf16-stock.log", "bf16-port.log", "bf16-sm80.log"}


def test_the_cause_is_the_first_error_that_stopped_something():
    log = [
        "(APIServer pid=1) WARNING 11-21 14:14:24 [base.py:383] ValueError: Tokenizer not available",
        "(EngineCore pid=2) ERROR 11-21 14:14:24 [core.py:9]   File x, line 1",
        "(EngineCore pid=2) ERROR 11-21 14:14:24 [core.py:9] triton.compiler.errors.CompilationError: at 1:1",
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert vllm_agreement.cause(log)[-1] == log[2]
    assert vllm_agreement.cause([log[0], "glmplan port failed: a sentence.", *log[1:]])[-1].startswith("glmplan port failed")
    assert vllm_agreement.cause(["[rank0]: AssertionError"]) == ["[rank0]: AssertionError"]
    assert vllm_agreement.cause([]) == []
