"""The data of the page "Explore", from runs on the bundled organism: docs/assets/explorer-data.js.

    python docs/figures/explorer.py

Three parts: projections of held-out prompts at every layer and position, behaviour at measured
strengths of the cut, and the trials of a search. About two minutes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import vauban  # before mlx: OpenBLAS

# isort: split
import mlx.core as mx

from vauban.config import make_config
from vauban.pipeline.prompt_sets import eval_set, prompt_set

TARGET = Path(__file__).resolve().parents[1] / "assets" / "explorer-data.js"
POSITIONS, PROMPTS, STRENGTHS = (-1, -2, -3, -4), 24, (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
TRIALS = 40


def projections(model: Any, tokenizer: Any, sets: dict[str, list[str]], held: dict) -> dict:
    """{position: {"layers": [{harmful, harmless, cosine}]}}: each layer's own unit direction."""
    found = {}
    for position in POSITIONS:
        direction = vauban.measure(
            model, tokenizer, sets["harmful"], sets["harmless"], layer="auto", positions=(position,)
        )
        units = direction.directions
        values = {
            label: vauban.collect_activations(
                model, tokenizer, texts[:PROMPTS], positions=(position,)
            )
            for label, texts in held.items()
        }
        found[str(position)] = {
            "chosen": direction.layer_index,
            "layers": [
                {
                    label: _rounded(one.at(layer + 1, position) @ units[layer])
                    for label, one in values.items()
                }
                for layer in range(len(units))
            ],
        }
    return found


def strengths(model: Any, tokenizer: Any, direction: Any, held: dict) -> list[dict]:
    """Behaviour at each strength, and one answer."""
    rows = []
    for alpha in STRENGTHS:
        plan = vauban.plan_cut(model, direction, alpha=alpha) if alpha else ()
        result = vauban.evaluate(
            model, plan, tokenizer, held["harmful"][:PROMPTS], max_tokens=30,
            harmless=held["harmless"][:PROMPTS],
        )  # fmt: skip
        rows.append(
            {
                "alpha": alpha, "refused": result.refusal_rate_modified,
                "harmless": result.over_refusal_modified, "kl": round(result.kl_divergence, 4),
                "degenerate": result.degenerate_modified,
                "prompt": result.answers["harmful"][0]["prompt"],
                "answer": result.answers["harmful"][0]["modified"],
            }
        )  # fmt: skip
    return rows


def trials(result: Any) -> list[dict]:
    """Every finished trial: what it left, what it cost, whether it stands on the front."""
    front = {trial.number for trial in result.front}
    return [
        {
            "number": trial.number, "failed": round(trial.failed, 4), "kl": round(trial.kl, 5),
            "front": trial.number in front, "best": trial.number == result.best().number,
            "parameters": {
                name: round(value, 2) if isinstance(value, float) else value
                for name, value in sorted(trial.parameters.items())
            },
        }
        for trial in result.trials
        if trial.state == "complete"
    ]  # fmt: skip


def _rounded(values: mx.array) -> list[float]:
    return [round(float(value), 2) for value in values.tolist()]


def main() -> None:
    path = vauban.organism_path("dense")
    config = make_config({("model", "path"): str(path)})
    model, tokenizer = vauban.load(path)
    sets = {
        label: list(prompt_set(config, label, path).prompts) for label in ("harmful", "harmless")
    }
    held_out = eval_set(config, path)
    held = {label: held_out.texts(label) for label in ("harmful", "harmless")}
    chosen = vauban.measure(
        model, tokenizer, sets["harmful"], sets["harmless"], layer="answers",
        positions="post_instruction",
    )  # fmt: skip
    found = vauban.search(model, tokenizer, sets["harmful"], sets["harmless"], trials=TRIALS)
    document = {
        "projections": projections(model, tokenizer, sets, held),
        "strengths": strengths(model, tokenizer, chosen, held),
        "residual": chosen.residual_index,
        "search": trials(found),
    }
    TARGET.write_text(f"const EXPLORER = {json.dumps(document)};\n", encoding="utf-8")
    print(f"{TARGET}: {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
