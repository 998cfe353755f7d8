"""All settings of one run."""

from __future__ import annotations

from dataclasses import dataclass, field

from ot_federated.config.clients import PrivacyConfig, TrainConfig, TuningConfig
from ot_federated.config.offsite import OffsiteConfig
from ot_federated.config.problem import DataConfig, ModelConfig, TaskConfig
from ot_federated.config.server import EvaluationConfig, StrategyConfig
from ot_federated.settings import setting


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of the federation."""

    num_server_rounds: int = setting(3, "Rounds of the federation.", minimum=1)
    seed: int = setting(0, "Everything random but privacy noise derives from it.", minimum=0)
    output_dir: str = setting("", "Directory of the run; empty: runs/<UTC time>.")
    resume: bool = setting(
        False, "Continue the run in output-dir from its last checkpoint; privacy noise is drawn anew."
    )
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    offsite: OffsiteConfig = field(default_factory=OffsiteConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def has_head(self) -> bool:
        """Whether the model ends in a classification head, which trains with the adapter."""
        by_head = self.task.name == "classification" and self.task.classifier == "head"
        return by_head or self.task.name == "image-classification"

    @property
    def reads(self) -> str:
        """What the model reads: ``text`` or ``image``."""
        return "image" if self.task.name == "image-classification" else "text"

    @property
    def label_column(self) -> str:
        """The column of what is to be predicted, by which a simulation divides the data; empty where there is none."""
        return self.columns.get("answer") or self.columns.get("label", "")

    @property
    def columns(self) -> dict[str, str]:
        """The data's column for each field of the task."""
        if self.task.name == "causal-lm":
            return {"text": self.data.text_column}
        data = self.data
        if self.task.name == "classification":
            return {"text": data.text_column, "label": data.label_column}
        if self.task.name == "image-classification":
            return {"image": data.image_column, "label": data.label_column}
        if self.task.name == "instruction":
            return {"prompt": data.prompt_column, "response": data.response_column}
        return {"question": data.question_column, "choices": data.choices_column, "answer": data.answer_column}
