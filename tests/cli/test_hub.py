"""Hub ids and `hf:` data sets through the real clients, against a local server."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("hub", Path(__file__).with_name("hub.py"))
hub = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(hub)


@pytest.fixture(scope="module")
def endpoint(organism_folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("dataset")
    shutil.copy(organism_folder / "prompts" / "harmful.jsonl", data / "train.jsonl")
    models = {"someone/organism": organism_folder.resolve()}
    with hub.serve(models, {"someone/prompts": data}) as (address, requests):
        yield address, requests


@pytest.fixture
def start(endpoint, environment, tmp_path):
    """`vauban ARGUMENTS` with the local server as the Hub and an empty cache."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        own = {
            "HF_ENDPOINT": endpoint[0],
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        return subprocess.run(
            [sys.executable, "-m", "vauban", *arguments],
            cwd=tmp_path,
            env={**environment, **own},
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


def test_a_model_and_a_data_set_of_the_hub(start, endpoint, tmp_path, organism_folder):
    limits = ("--num-prompts", "4", "--max-tokens", "16", "--no-controls", "--layer", "auto")
    limits += ("--alpha", "1")
    done = start("someone/organism", "-o", "out", "--harmful", "hf:someone/prompts", *limits)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    run = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert run["model"]["hub_id"] == run["direction"]["model_path"] == "someone/organism"
    assert len(run["model"]["revision"]) == 40
    assert run["prompts"]["harmful"]["source"] == "hf:someone/prompts"
    assert run["prompts"]["harmful"]["count"] == 128
    # The other sets came with the model's own vauban.json.
    assert run["prompts"]["harmless"]["origin"] == "model folder"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "base_model: someone/organism" in card
    downloads = [line for line in endpoint[1] if line.startswith("GET") and "train.jsonl" in line]
    assert len(downloads) == 1


def test_a_repository_that_is_not_there(start, tmp_path):
    done = start("someone/absent", "-o", "out")
    assert done.returncode == 2
    assert "someone/absent" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_data_set_without_the_column(start, tmp_path):
    done = start("someone/organism", "-o", "out", "--harmful", "hf:someone/prompts?column=text")
    assert done.returncode == 2
    assert "'text'" in done.stderr and "prompt" in done.stderr
    assert not (tmp_path / "out").exists()
