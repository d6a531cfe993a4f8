"""Questions and answers about emoji pictures, for small language models and for pictures in the place of words.

The same conversations are text (behind the caption, in the zoo's ``captions``) and visual instructions (behind the
picture, see :class:`~safelight.datamodules.LLaVADataModule`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from safelight.datamodules.emoji import Scene

QUESTIONS = {
    "thing": ("what is this?", "what do you see?"),
    "background": ("what color is the background?",),
    "size": ("how big is it?",),
    "style": ("in which style is it?",),
    "caption": ("describe the picture.",),
}
"""What is asked for (an attribute of a scene) to how it is asked."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}question: {{ message['content'] }}\n"
    "{% else %}answer: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
)
"""How the zoo's language models are asked, in the form that transformers' tokenizers keep."""


def conversation(
    scene: Scene, seed: int, turns: int | None = None, about: Sequence[str] = tuple(QUESTIONS)
) -> list[tuple[str, str]]:
    """Questions about a scene with their answers, the same for the same arguments.

    Args:
        scene: what is shown.
        seed: of order and wording.
        turns: so many questions; None for one to four.
        about: what may be asked for, keys of :data:`QUESTIONS`.
    """
    draw = random.Random(f"{seed}:{scene.caption}")
    asked = draw.sample(sorted(about), min(turns or draw.randint(1, 4), len(about)))
    return [(draw.choice(QUESTIONS[what]), getattr(scene, what)) for what in asked]


def document(scene: Scene, seed: int) -> str:
    """A caption and a conversation about it, as :data:`CHAT_TEMPLATE` writes it."""
    lines = [scene.caption]
    for question, answer in conversation(scene, seed):
        lines += [f"question: {question}", f"answer: {answer}"]
    return "\n".join(lines) + "\n"
