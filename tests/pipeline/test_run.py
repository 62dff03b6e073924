"""The run in the library's own terms: its figures, its document, its warnings."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest

import vauban
from vauban.config import make_config
from vauban.directions import DirectionResult
from vauban.pipeline import run
from vauban.pipeline.cut_plan import plan_stage
from vauban.pipeline.stages import open_model
from vauban.prompts import model_prompt_sets

SMALL = {("eval", "num_prompts"): 12, ("eval", "max_tokens"): 24}
# Nothing is chosen by answers.
GIVEN = {**SMALL, ("measure", "layer"): "auto", ("cut", "alpha"): 1.0, ("eval", "controls"): False}


@pytest.fixture(scope="module")
def organism_folder():
    return vauban.organism_path("dense")


@pytest.fixture(scope="module")
def plain(organism_folder, tmp_path_factory):
    """A run with the sets of the model's own folder."""
    values = {("model", "path"): str(organism_folder), **SMALL}
    stages: list[tuple[str, int, int]] = []
    output = tmp_path_factory.mktemp("plain") / "out"
    result = run(
        make_config({**values, ("output", "dir"): str(output)}),
        progress=lambda *step: stages.append(step),
    )
    return result, stages


def test_progress_never_goes_back_and_every_stage_ends(plain):
    _, stages = plain
    order = list(dict.fromkeys(stage for stage, _, _ in stages))
    assert order == [
        *("load model", "verify forward pass", "measure", "first tokens", "choose by answers"),
        *("strength", "choose strength", "project", "evaluate", "likelihood", "controls"),
        *("hash the source", "write", "read back"),
    ]
    for name in order:
        done = [(at, total) for stage, at, total in stages if stage == name]
        assert [at for at, _ in done] == sorted(at for at, _ in done)
        assert done[-1][0] == done[-1][1]


def test_the_document_is_json_and_its_hashes_are_those_of_the_files(plain, organism_folder):
    result, _ = plain
    document = json.loads((result.output_dir / "run.json").read_text(encoding="utf-8"))
    assert document == json.loads(json.dumps(result.document))
    for place, folder in (("source", organism_folder), ("written", result.output_dir)):
        for name, digest in document["files"][place].items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        assert "model.safetensors" in document["files"][place]
    sets = model_prompt_sets(organism_folder)
    digest = hashlib.sha256(sets.harmful.read_bytes()).hexdigest()
    assert document["prompts"]["harmful"]["sha256"] == digest


def test_what_was_written_is_the_direction_that_was_measured(plain):
    result, _ = plain
    saved = DirectionResult.load(result.output_dir / "direction.vauban")
    assert saved.layer_index == result.document["direction"]["layer_index"]
    report = vauban.verify_export(result.output_dir)
    assert report.direction_left == result.document["export"]["direction_left"] < 0.02


def test_the_summary_says_the_table_and_the_folder(plain):
    result, _ = plain
    said = result.summary()
    assert "random direction" in said and str(result.output_dir) in said


def test_named_files_on_a_copy_without_vauban_json_give_the_same_figures(
    plain, organism_folder, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(organism_folder, copy)
    sets = model_prompt_sets(organism_folder)
    (copy / "vauban.json").unlink()
    config = make_config(
        {
            ("model", "path"): str(copy),
            ("data", "harmful"): str(sets.harmful),
            ("data", "harmless"): str(sets.harmless),
            ("data", "eval"): str(sets.eval),
            ("output", "dir"): str(tmp_path / "out"),
            **SMALL,
        }
    )
    result = run(config)
    assert result.document["behaviour"] == plain[0].document["behaviour"]
    assert result.document["files"]["written"] == plain[0].document["files"]["written"]
    assert {s["origin"] for s in result.document["prompts"].values()} == {"configuration"}


def test_a_model_that_does_not_refuse_is_said_so(organism_folder, tmp_path):
    rows = vauban.load_labelled_prompts(model_prompt_sets(organism_folder).eval)
    tasks = [row.prompt for row in rows if row.label == "harmless" and row.kind == "task"]
    path = tmp_path / "eval.jsonl"
    found = [{"prompt": p, "label": ("harmful", "harmless")[i % 2]} for i, p in enumerate(tasks)]
    path.write_text("".join(json.dumps(row) + "\n" for row in found[:24]))
    config = make_config(
        {
            ("model", "path"): str(organism_folder),
            ("data", "eval"): str(path),
            ("output", "dir"): str(tmp_path / "out"),
            **GIVEN,
        }
    )
    result = run(config)
    assert any("does not refuse" in text for text in result.warnings)
    assert "does not refuse" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert [row.name for row in result.rows] == ["before", "cut"]


def test_restored_norms_and_chosen_layers_are_evaluated_as_they_are_written(
    organism_folder, tmp_path
):
    config = make_config(
        {
            ("model", "path"): str(organism_folder),
            ("cut", "layers"): "above_median",
            ("cut", "norm_preserve"): "column",
            ("output", "dir"): str(tmp_path / "out"),
            **GIVEN,
        }
    )
    result = run(config)
    document = result.document
    scores = document["direction"]["scores"]["cohens_d"]
    expected = vauban.select_target_layers(scores, "above_median")
    assert document["cut"]["settings"]["layers"] == expected
    written, tokenizer = vauban.load(tmp_path / "out")
    lines = (tmp_path / "out" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    prompts = [pair["prompt"] for pair in pairs[:12]]
    answers = vauban.generate(written, tokenizer, prompts, max_tokens=24)
    same = sum(a == pair["modified"] for a, pair in zip(answers, pairs, strict=False))
    # The file holds bfloat16, the evaluated copy float32; near ties may fall the other way.
    assert same >= 10


def test_blocks_are_ranked_by_a_score_without_scale(plain, organism_folder):
    """The gap of the class means grows with the residual's norm and would take the last blocks."""
    result = DirectionResult.load(plain[0].output_dir / "direction.vauban")
    falling = [float(6 - block) for block in range(6)]
    scores = {**result.scores, "cohens_d": falling}
    opened = open_model(str(organism_folder))
    config = make_config(
        {("model", "path"): str(organism_folder), ("cut", "layers"): "above_median"}
    )
    plan = plan_stage(opened, config, replace(result, scores=scores))
    assert plan.to_dict()["settings"]["layers"] == [0, 1, 2]


def test_a_run_with_another_seed_draws_another_random_direction(plain, organism_folder, tmp_path):
    values = {("model", "path"): str(organism_folder), ("seed",): 1, **SMALL}
    other = run(make_config({**values, ("output", "dir"): str(tmp_path / "out")}))
    kl = [r.document["behaviour"][2]["kl"] for r in (plain[0], other)]
    assert kl[0] != kl[1] and max(kl) < 0.1


def test_results_are_frozen(plain):
    with pytest.raises(AttributeError):
        plain[0].seconds = 0.0
    assert replace(plain[0], seconds=0.0).seconds == 0.0


@pytest.mark.parametrize(("count", "precision"), [(2, "same"), (0, "same"), (2, "float")])
def test_packed_modules_are_rounded_for_what_they_read(tmp_path, count, precision):
    """By default and where they stay packed; run.json says on what."""
    values = {
        ("model", "path"): str(vauban.organism_path("4bit")),
        ("output", "dir"): str(tmp_path / "out"),
        ("output", "calibrate"): count,
        ("output", "precision"): precision,
        **GIVEN,
        ("measure", "layer"): 3,
        ("eval", "num_prompts"): 2,
        ("eval", "max_tokens"): 4,
    }
    document = run(make_config(values)).document
    found = document["cut"]["settings"].get("calibration")
    if count and precision == "same":
        assert found["prompts"] == 2 * count and found["modules"] == len(document["cut"]["writers"])
    else:
        assert found is None
    assert document["export"]["direction_left"] < 0.01
