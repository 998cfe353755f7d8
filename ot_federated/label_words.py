"""The words of labels and the prompt of a classification, as the run config writes them."""

from __future__ import annotations

from ot_federated.errors import ConfigError

placeholder = "{text}"


def parse_label_words(text: str) -> dict[str, str]:
    """Return the word of each label by its name, from ``negative=terrible,positive=great`` or ``terrible,great``.

    Raises:
        ConfigError: If there are fewer than two, or two are equal.
    """
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    words = {label.strip(): (word if separator else label).strip() for label, separator, word in pairs}
    if len(pairs) < 2 or len(words) < len(pairs) or len(set(words.values())) < len(pairs) or not all(words.values()):
        raise ConfigError(
            f"task.label-words={text!r} must name two or more different words, one a label in the order of the labels' "
            "numbers: terrible,great, or with the labels' names negative=terrible,positive=great."
        )
    return words


def check_prompt(prompt: str) -> str:
    """Return a prompt that says where the text belongs.

    Raises:
        ConfigError: If it does not.
    """
    if prompt.count(placeholder) != 1:
        raise ConfigError(f"task.prompt={prompt!r} must have {placeholder} once, where the text belongs.")
    return prompt
