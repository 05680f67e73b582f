from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cakekv.cli.main import app
from cakekv.store.disk import DiskStore

ask = ["ask", "--question", "What?", "--max-new-tokens", "8"]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def run_json(*arguments: object) -> dict[str, object]:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    data = json.loads(out)
    assert isinstance(data, dict)
    return data


def test_the_second_question_is_restored_from_the_store(tiny_model: Path, document: Path, tmp_path: Path) -> None:
    common = [*ask, "--model", tiny_model, "--document", document, "--store", tmp_path / "store"]
    first = run_json(*common)
    second = run_json(*common, "--mode", "load")
    assert first["report"]["loaded_tokens"] == 0  # type: ignore[index]
    assert second["report"]["loaded_tokens"] > 1000  # type: ignore[index]
    assert second["answer"] == first["answer"]


def test_a_lossy_codec_is_told_of(tiny_model: Path, document: Path, tmp_path: Path) -> None:
    common = [*ask, "--model", tiny_model, "--document", document, "--store", tmp_path / "store", "--mode", "load"]
    run_json(*common, "--codec", "int8")
    report = run_json(*common, "--codec", "int8")["report"]
    assert report["codec"] == "int8"  # type: ignore[index]
    assert report["lossy_tokens"] == report["loaded_tokens"] > 1000  # type: ignore[index]
    _, _, err = run(*common, "--codec", "int8")
    assert "Not exact" in err
    assert run_json(*common)["report"]["loaded_tokens"] == 0  # type: ignore[index]
    code, _, err = run(*common, "--codec", "int9")
    assert (code, "int9" in err) == (2, True)


def test_documents_are_reused_wherever_they_stand(tiny_model: Path, document: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Something else. " * 40)
    store = tmp_path / "store"
    code, out, err = run("store", "learn", store, "--document", document, "--model", tiny_model)
    assert code == 0, err
    assert "of them computed" in out
    common = [*ask, "--model", tiny_model, "--store", store]
    plain = run_json(*common, "--document", document, "--document", other)["report"]
    assert plain["reused_tokens"] == 0  # type: ignore[index]
    both = [*common, "--document", other, "--document", document]
    report = run_json(*both, "--reuse", "epic:link=8", "--mode", "load")["report"]
    assert report["reused_tokens"] > 1000  # type: ignore[index]
    _, _, err = run(*both, "--reuse", "turned", "--mode", "load")
    assert "Not exact" in err
    assert "were reused" in err
    blended = run_json(*both, "--reuse", "blend:recompute=0.2", "--mode", "load")["report"]
    assert 0.1 < blended["blended_tokens"] / blended["reused_tokens"] < 0.3  # type: ignore[index]
    code, _, err = run(*both, "--reuse", "mixed")
    assert (code, "blend" in err) == (2, True)


def test_what_is_computed_may_be_what_is_stored_of_it(tiny_model: Path, document: Path, tmp_path: Path) -> None:
    common = [*ask, "--model", tiny_model, "--document", document, "--store", tmp_path / "store"]
    half = [*common, "--compress", "key_norm:share=0.5", "--compress-front"]
    computed, loaded = run_json(*half, "--mode", "compute"), run_json(*half, "--mode", "load")
    assert loaded["report"]["loaded_tokens"] > 1000  # type: ignore[index]
    assert computed["answer"] == loaded["answer"]
    shares = [one["report"]["kept_share"] for one in (computed, loaded)]  # type: ignore[index]
    assert shares[0] == shares[1] < 0.6
    _, _, err = run(*half)
    assert "Not exact: the answer keeps 5" in err
    code, _, err = run(*common, "--compress-front")
    assert (code, "give a compress that acts at store" in " ".join(err.split())) == (2, True)


def test_drafts_are_told_of(tiny_model: Path, document: Path, tmp_path: Path) -> None:
    common = [*ask, "--model", tiny_model, "--document", document, "--store", tmp_path / "store"]
    report = run_json(*common, "--decode", "quantspec:gamma=3")["report"]
    assert report["decode"] == "quantspec:gamma=3,group=32,recent=128,draft=upper"  # type: ignore[index]
    assert report["drafted_tokens"] >= report["accepted_tokens"]  # type: ignore[index]
    code, _, err = run(*common, "--decode", "quantspec:gamma=3")
    assert (code, "tokens were drafted" in err) == (0, True)
    code, _, err = run(*common, "--decode", "quantspec:gamma=100")
    assert (code, "gamma is 100, but must be 0 to 64" in err) == (2, True)


def test_the_answer_alone_goes_to_standard_output(tiny_model: Path, document: Path, tmp_path: Path) -> None:
    common = [*ask, "--model", tiny_model, "--document", document, "--store", tmp_path / "store"]
    answer = run_json(*common)["answer"]
    code, out, err = run(*common)
    assert code == 0
    assert out == f"{answer}\n"
    assert "TTFT" in err


def test_report_picture_and_trace_are_written(tiny_model: Path, document: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / "new" / name for name in ("report.json", "picture.png", "trace.json")}
    common = [*ask, "--model", tiny_model, "--document", document, "--store", tmp_path / "store", "--mode", "both"]
    run_json(*common)
    data = run_json(
        *common, "--report", files["report.json"], "--picture", files["picture.png"], "--trace", files["trace.json"]
    )
    assert json.loads(files["report.json"].read_text()) == data["report"]
    assert files["picture.png"].read_bytes().startswith(b"\x89PNG")
    assert json.loads(files["trace.json"].read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bandwidth", "fast"], "is not a bandwidth"),
        (["--model", "/no/such/folder"], "there is no model folder"),
        (["--model", "/no/such/model.gguf"], "llama.cpp's format"),
        (["--model", __file__], "is a file"),
        (["--document", "/no/such/file"], "cannot read the document"),
        (["--document", __file__, "--store", "ftp://somewhere"], "unknown kind of store"),
        (["--document", sys.executable], "is not text"),
        (["--store", "{tmp}/s?capacity=much"], "is not a size"),
        (["--document", os.devnull], "is empty"),
        (["--temperature", "1", "--top-p", "0"], "top_p"),
        (["--temperature", "inf"], "temperature"),
        (["--temperature", "1", "--seed", str(2**70)], "seed"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    tiny_model: Path, document: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    defaults = ["--model", tiny_model, "--document", document, "--store", tmp_path / "s"]
    code, out, err = run(*ask, *defaults, *(part.format(tmp=tmp_path) for part in arguments))
    assert code == 2
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert message in errors[0]
    assert "Traceback" not in err


def test_a_document_longer_than_the_context_is_refused_and_can_be_cut(tiny_model: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("Yes.\n\n" * 2000)
    common = [*ask, "--model", tiny_model, "--document", long, "--store", tmp_path / "store"]
    code, _, err = run(*common)
    assert code == 2
    assert "context" in err
    report = run_json(*common, "--tokens", 500)["report"]
    assert report["prompt_tokens"] < 520  # type: ignore[index]


def test_a_question_is_needed_for_a_document_of_ones_own(document: Path) -> None:
    code, _, err = run("ask", "--document", document)
    assert code == 2
    assert "--question" in err


def test_an_unwritable_result_fails_with_exit_code_1(tiny_model: Path, document: Path, tmp_path: Path) -> None:
    common = [*ask, "--model", tiny_model, "--document", document, "--store", tmp_path / "store"]
    code, _, err = run(*common, "--report", "/dev/null/report.json")
    assert code == 1
    assert "cannot write /dev/null/report.json" in err


INTERRUPTIBLE = """
import os
import cakekv.store.throttled as throttled
reserve = throttled.ThrottledStore.reserve
def announced(self, size):
    os.write(1, b"loading\\n")  # whole lines, also from two threads
    return reserve(self, size)
throttled.ThrottledStore.reserve = announced
from cakekv.cli.main import main
main()
"""


def test_an_interrupted_load_exits_with_130_and_leaves_the_store_sound(
    tiny_model: Path, document: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    common = [*ask, "--model", str(tiny_model), "--document", str(document), "--store", str(store)]
    run_json(*common)
    slow = [*common, "--mode", "load", "--bandwidth", "1kB/s"]
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "loading\n"
        for _ in range(3):  # Python drops an interrupt that falls into a finaliser; people press again
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
                break
        err = process.stderr.read()
        assert process.wait(60) == 130, err
    assert "Traceback" not in err
    with DiskStore(store) as opened:
        chunks = opened.stats().chunks
    assert chunks > 20
    verified = run_json("store", "verify", store)
    assert verified["chunks"] == chunks
    assert verified["corrupt"] == []


def test_a_prompt_shorter_than_a_chunk_is_told_so(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Green.")
    common = ["ask", "--question", "?", "--max-new-tokens", "1", "--model", tiny_model, "--store", tmp_path / "store"]
    report = run_json(*common, "--document", tmp_path / "short.txt")["report"]
    _, _, err = run(*common, "--document", tmp_path / "short.txt")
    assert ("nothing of it is stored" in err) == (report["prompt_tokens"] < report["chunk_tokens"])  # type: ignore[index]
    (tmp_path / "long.txt").write_text("Green. " * 100)
    assert "nothing of it is stored" not in run(*common, "--document", tmp_path / "long.txt")[2]
