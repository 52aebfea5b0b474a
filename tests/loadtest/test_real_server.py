"""A real server under the command as it is typed, until it is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from serving import eventually, serving

from models.embedded.paths import EMBEDDED

COMMAND = [sys.executable, "-c", "from serve.cli import main; main()", "loadtest", "run"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not (Path(EMBEDDED["tandem-text"]) / "model.safetensors").exists(), reason="no embedded model")
def test_a_server_is_measured_and_its_death_is_a_verdict(tmp_path):
    with serving("tandem-text", "--no-ray", "--threads", "1") as server:
        load = ["--base-url", server.url, "--input-len", "20", "--output-len", "16", "--ignore-eos", "--no-progress"]
        files = ["--result-dir", str(tmp_path), "--result-filename"]
        short = [*load, "--num-prompts", "12", "--request-rate", "40", "--goodput", "e2el:60000", *files, "short.json"]
        done = subprocess.run([*COMMAND, *short], cwd=ROOT, capture_output=True, text=True, timeout=120)
        told = json.loads((tmp_path / "short.json").read_text())
        assert done.returncode == 0, done.stdout + done.stderr
        assert (told["completed"], told["good_share"], told["checks"]["prompt_tokens_off"]) == (12, 1.0, 0.0)
        assert told["queue_share"] is not None and told["groups"]["text"]["total_output_tokens"] == 12 * 16

        given = server.metric("tandem_output_tokens_total")
        endless = [*load, "--num-prompts", "100000", "--max-concurrency", "2", "--lost-after", "1", *files, "lost.json"]
        running = subprocess.Popen(
            [*COMMAND, *endless], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        eventually(lambda: server.metric("tandem_output_tokens_total") > given + 16 * 10, within_s=60)
        for process in [*server.children(), psutil.Process(server.process.pid)]:
            process.kill()
        said, _ = running.communicate(timeout=60)
    assert running.returncode == 3, said
    assert "Verdict: server_lost" in said and "Traceback" not in said
    assert json.loads((tmp_path / "lost.json").read_text())["completed"] > 0
