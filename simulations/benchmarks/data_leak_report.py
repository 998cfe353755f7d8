"""The table of ``data_leak``: what attacks found at each level of privacy, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from ot_federated.attacks.membership import judge_attack
from simulations.sweep_report import interval_of

measures = {"auc": "AUC", "tpr_at_1%": "TPR at 1 % FPR", "tpr_at_0.1%": "TPR at 0.1 % FPR"}


def summarise_levels(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry for each level of privacy, with 95 % intervals.

    Means over its runs (Student's t), but for true positive rates: those are of the runs' scores all together, since
    the non-members of one run are too few to allow one in a hundred of them (intervals: Wilson's).
    """
    return [
        summarise(level, [cell for cell in cells if cell["level"] == level])
        for level in dict.fromkeys(cell["level"] for cell in cells)
    ]


def summarise(level: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the runs of one level say together."""
    bounds = [run["one_run_audit"]["epsilon_lower_bound"] for run in runs]
    claims = [run["claimed_epsilon"] for run in runs]
    tokens = [run["token_recovery"] for run in runs if run["token_recovery"] is not None]
    return {
        "level": level,
        "num_runs": len(runs),
        "claimed_epsilon": None if claims[0] is None else max(claims),
        "largest_lower_bound": max(bounds),
        "mean_lower_bound": mean(bounds),
        "num_below_claim": sum(claim is None or bound <= claim for bound, claim in zip(bounds, claims, strict=True)),
        "attacks": {
            name: {"auc": _share([run["membership"][name]["auc"] for run in runs])} | _pool_rates(name, runs)
            for name in runs[0]["membership"]
        },
        "exposure_bits": list(interval_of([run["exposure"]["mean_bits"] for run in runs])),
        "exposure_chance_bits": mean(run["exposure"]["chance_bits"] for run in runs),
        "tokens_recovered": _share([token["recovered"] for token in tokens]) if tokens else None,
        "tokens_chance": mean(token["chance"] for token in tokens) if tokens else None,
        "tokens_chance_interval": [mean(token["chance_interval"][end] for token in tokens) for end in (0, 1)]
        if tokens
        else None,
        "token_auc": _share([token["auc"] for token in tokens]) if tokens else None,
        "num_tokens_at_chance": sum(token["at_chance"] for token in tokens),
        "num_token_runs": len(tokens),
    }


def describe_levels(levels: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the levels: a column each."""
    head = ["", *(f"epsilon {level['level']}" if level["level"] != "none" else "no privacy" for level in levels)]
    rows = [
        ["runs", *(str(level["num_runs"]) for level in levels)],
        ["audited epsilon at least (largest)", *(f"{level['largest_lower_bound']:.2f}" for level in levels)],
        ["runs with the bound below the claim", *(_below(level) for level in levels)],
        *(
            [f"{attack}: {title}", *(_interval(level["attacks"][attack][measure]) for level in levels)]
            for attack in levels[0]["attacks"]
            for measure, title in measures.items()
        ),
        ["canary exposure, bits", *(_bits(level) for level in levels)],
        ["tokens recovered", *(_tokens(level) for level in levels)],
        ["token AUC", *("" if level["token_auc"] is None else _interval(level["token_auc"]) for level in levels)],
        [
            "runs with tokens at chance",
            *(f"{level['num_tokens_at_chance']} of {level['num_token_runs']}" for level in levels),
        ],
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _pool_rates(attack: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, list[float] | None]:
    """Return an attack's true positive rates over the scores of all runs, with intervals; None where too few."""
    members, others = (
        np.concatenate([np.asarray(run["scores"][attack][side]) for run in runs]) for side in ("members", "others")
    )
    found = judge_attack(np.concatenate([members, others]), np.arange(len(members) + len(others)) < len(members))
    return {
        measure: None if found[measure] is None else [found[measure], *found[f"{measure}_interval"]]
        for measure in measures
        if measure != "auc"
    }


def _share(values: Sequence[float]) -> list[float]:
    """Return mean and interval of what lies between 0 and 1."""
    centre, low, high = interval_of(values)
    return [centre, max(0.0, low), min(1.0, high)]


def _below(level: Mapping[str, Any]) -> str:
    if level["claimed_epsilon"] is None:
        return "no claim"
    return f"{level['num_below_claim']} of {level['num_runs']}"


def _interval(values: Sequence[float] | None) -> str:
    if values is None:
        return "too few non-members"
    centre, low, high = values
    return f"{centre:.3f} ({low:.3f} to {high:.3f})"


def _bits(level: Mapping[str, Any]) -> str:
    centre, low, high = level["exposure_bits"]
    return f"{centre:.2f} ({low:.2f} to {high:.2f}; chance {level['exposure_chance_bits']:.2f})"


def _tokens(level: Mapping[str, Any]) -> str:
    if level["tokens_recovered"] is None:
        return "nothing trains that reads them"
    centre, low, high = level["tokens_recovered"]
    return f"{centre:.1%} ({low:.1%} to {high:.1%}; chance {level['tokens_chance']:.1%})"
