"""The card of a delivered model: how it was made, and how it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# By transformers' class: what the model is for, what reads its inputs, what its loss is.
uses = {
    "AutoModelForCausalLM": ("text-generation", "AutoTokenizer", "per token of the right answer"),
    "AutoModelForSequenceClassification": ("text-classification", "AutoTokenizer", "the right class's cross-entropy"),
    "AutoModelForImageClassification": (
        "image-classification",
        "AutoImageProcessor",
        "the right class's cross-entropy",
    ),
}


def describe_privacy(privacy: Mapping[str, Any] | None) -> str:
    """Return the guarantee in one line, with all that gives an epsilon its meaning."""
    if privacy is None:
        return "no differential privacy: the adapter may tell of the training data"
    if privacy["mode"] == "client":
        return (
            f"client-level, for this run: epsilon {privacy['epsilon']:.4g} at delta {privacy['delta']:g} for one "
            f"{privacy['unit']} ({privacy['adjacency']}; sampling {privacy['sampling']}), by {privacy['num_releases']} "
            f"noised sums; trusted: {privacy['trusted']}; who took part is not hidden; accounted by "
            f"{privacy['accountant']}"
        )
    noise = privacy["noise_multiplier"]
    asked = f"noise multiplier {noise:g}" if noise else f"epsilon {privacy['target_epsilon']:g} for this run"
    return (
        f"example-level DP-SGD at every data owner, {asked} at delta {privacy['target_delta']:g}, "
        f"{privacy['adjacency']}, {privacy['sampling']} sampling, accounted by {privacy['accountant']}"
    )


_use_model = """from transformers import AUTO_CLASS, PROCESSOR_CLASS

model = AUTO_CLASS.from_pretrained("PATH_OF_THIS_DIRECTORY")
PROCESSOR = PROCESSOR_CLASS.from_pretrained("PATH_OF_THIS_DIRECTORY")"""
_use_adapter = """from transformers import AUTO_CLASS
from ot_federated.tuning import load_bottlenecks

# Bottleneck adapters are no change of weights: there is no merged model, they are put into the full one.
model = load_bottlenecks(AUTO_CLASS.from_pretrained("THE_FULL_MODEL"), "PATH_OF_THIS_DIRECTORY")"""


def render_model_card(
    summary: Mapping[str, Any], *, table: str, merged: bool = True, auto_class: str = "AutoModelForCausalLM"
) -> str:
    """Return the ``README.md`` of a delivered model, or of an adapter that cannot be merged into one.

    Args:
        summary: The run's summary.
        table: The table of rows, as text.
        merged: Whether the directory holds the plugged-in model; else it holds bottleneck adapters.
        auto_class: transformers' class that loads the model.
    """
    offsite, federation, source = summary["offsite"], summary["federation"], summary["model"]["source"]
    release = f"ot-federated {summary['versions']['ot-federated']}"
    base = "" if source.startswith(("pypi:", "/", ".")) else f"base_model: {source}\n"
    pipeline, processor_class, loss = uses[auto_class]
    use = (_use_model if merged else _use_adapter).replace("PROCESSOR_CLASS", processor_class)
    use = use.replace("AUTO_CLASS", auto_class)
    use = use.replace("PROCESSOR", "processor" if processor_class == "AutoImageProcessor" else "tokenizer")
    asked, connected = federation["num_clients_asked"], federation["num_clients"]
    owners = f"{asked} data owners" if asked == connected else f"{asked} of {connected} connected data owners"
    return f"""---
library_name: transformers
pipeline_tag: {pipeline}
{base}tags:
- offsite-tuning
- federated-learning
- ot-federated
---

# Tuned by federated Offsite-Tuning

This is `{source}` ({summary["model"]["num_parameters"]:,} parameters, {summary["model"]["num_blocks"]} blocks) with
an adapter that {owners} tuned on data that never left them. They saw the first
{offsite["bottom"]} and last {offsite["top"]} blocks and an emulator of the middle (blocks
{", ".join(map(str, offsite["kept_blocks"])) or "none"}; `{offsite["compression"]}`), in all
{offsite["exact_weight_fraction"]:.0%} of the weights as they are. The other blocks never left the model owner.

| | |
|---|---|
| Method | Offsite-Tuning (Xiao, Lin, Han 2023, https://arxiv.org/abs/2302.04870), by {release} |
| Rounds, replies, failures | {federation["num_rounds"]}, {federation["num_replies"]}, {federation["num_failures"]} |
| Weights | {summary["dtype"]} |
| Seed | {summary["seed"]} |
| Privacy | {describe_privacy(summary["privacy"])} |

## Results

Loss is {loss}, in nats. Intervals are 95 %.

```
{table}
```

Made by:

```
{summary["command"]}
```

## Use

```python
{use}
```
"""
